"""torch_peer.py - PyTorch as a peer of bench: a loop over experts, forward and forward + backward.

    torch_peer.py --shape T,D,F,E,K,relu|swiglu [--routing balanced|FILE] [--pass fwd|fwdbwd]
                  [--threads N] [--rounds N] [--seed N] [--serve]

Prints the line of bench: peer,shape,routing,pass,median_ms,gflops,rss_mib,min_ms. With --serve it
takes turns: "ready" when it is, then the milliseconds of one call for each line of its input. The
loop is what eager code does: entries sorted by expert, rows of each by their indices, two products,
index_add of the weighted result; experts without rows are skipped. Gradients are set, not added.
"""

import argparse
import resource
import statistics
import sys
import time

SHAPES = {
    "a": "1024,512,1024,32,4,relu", "b": "4096,512,1024,256,4,relu",
    "c": "2048,768,3072,64,1,relu", "d": "1024,1024,512,64,8,swiglu",
    "e1": "1,2048,1024,64,8,swiglu", "e4": "4,2048,1024,64,8,swiglu",
    "e16": "16,2048,1024,64,8,swiglu", "f": "8192,64,64,4096,2,relu",
}  # fmt: skip


def shape_of(text):
    words = SHAPES.get(text, text).split(",")
    if len(words) != 6 or words[5] not in ("relu", "swiglu"):
        raise argparse.ArgumentTypeError(f"{text} is no shape")
    return text.replace(",", "x"), *(int(word) for word in words[:5]), words[5] == "swiglu"


def read_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", type=shape_of, default=shape_of("a"))
    parser.add_argument("--routing", default="balanced")
    parser.add_argument("--pass", dest="direction", choices=("fwd", "fwdbwd"), default="fwd")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve", action="store_true")
    return parser.parse_args()


class Loop:
    def __init__(self, torch, options):
        self.torch, self.backward = torch, options.direction == "fwdbwd"
        self.name, self.T, self.D, self.F, self.E, self.K, self.gated = options.shape
        torch.manual_seed(options.seed)
        if options.routing == "balanced":
            self.routings = [(torch.arange(self.T * self.K) % self.E).reshape(self.T, self.K)]
        else:
            with open(options.routing) as file:
                rows = [[int(word) for word in line.split()] for line in file]
            self.routings = torch.tensor(rows).split(self.T)
        self.calls = 0
        wide = 2 * self.F if self.gated else self.F
        self.x, self.dy = self.numbers(self.T, self.D), self.numbers(self.T, self.D)
        self.gates = torch.full((self.T, self.K), 1.0 / self.K)
        # A matrix of each expert: as [E,D,F] every gradient would be as large as all of them.
        self.w1 = [self.numbers(self.D, wide) * 0.05 for _ in range(self.E)]
        self.w2 = [self.numbers(self.F, self.D) * 0.05 for _ in range(self.E)]
        if self.backward:
            for tensor in (self.x, self.gates, *self.w1, *self.w2):
                tensor.requires_grad_(True)

    def numbers(self, *sizes):
        return self.torch.empty(*sizes).uniform_(-1, 1)

    def forward(self):
        y = self.torch.zeros(self.T, self.D)
        ids = self.routings[self.calls % len(self.routings)].flatten()
        self.calls += 1
        order = self.torch.argsort(ids, stable=True)
        rows = self.torch.bincount(ids, minlength=self.E).tolist()
        for e, entries in enumerate(order.split(rows)):
            if rows[e] == 0:
                continue
            tokens = entries // self.K
            h = self.x[tokens] @ self.w1[e]
            if self.gated:
                g, u = h.chunk(2, dim=1)
                h = self.torch.nn.functional.silu(g) * u
            else:
                h = self.torch.relu(h)
            z = h @ self.w2[e] * self.gates.flatten()[entries, None]
            y = y.index_add(0, tokens, z) if self.backward else y.index_add_(0, tokens, z)
        return y

    def step(self):
        begin = time.perf_counter()
        if self.backward:
            for tensor in (self.x, self.gates, *self.w1, *self.w2):
                tensor.grad = None
            y = self.forward()
            y.backward(self.dy)
        else:
            with self.torch.no_grad():
                y = self.forward()
        return time.perf_counter() - begin, y

    def flops(self):
        products = (3 if self.gated else 2) * (3 if self.backward else 1)
        return 2 * products * self.T * self.K * self.D * self.F


def serve(step):
    print("ready", flush=True)
    for _ in sys.stdin:
        print(f"{1e3 * step():.6f}", flush=True)


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    options = read_arguments()
    try:
        import torch
    except ImportError:
        sys.exit("torch_loop: not installed")
    if options.threads > 0:
        torch.set_num_threads(options.threads)
    loop = Loop(torch, options)
    loop.step()
    if options.serve:
        serve(lambda: loop.step()[0])
        return
    times = [1e3 * loop.step()[0] for _ in range(options.rounds)]
    middle = statistics.median(times)
    print(f"torch_loop,{loop.name},{options.routing},{options.direction},{middle:.4f},"
          f"{1e-6 * loop.flops() / middle:.2f},{peak_mib():.1f},{min(times):.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
