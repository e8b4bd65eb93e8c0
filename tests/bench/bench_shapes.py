"""bench_shapes.py - from the rounds of bench to ratios, and the ratios beside their targets."""

import collections
import csv
import os
import statistics

Shape = collections.namedtuple("Shape", "T D F E K gated")
SHAPES = {
    "a": Shape(1024, 512, 1024, 32, 4, False),
    "b": Shape(4096, 512, 1024, 256, 4, False),
    "c": Shape(2048, 768, 3072, 64, 1, False),
    "d": Shape(1024, 1024, 512, 64, 8, True),
    "e1": Shape(1, 2048, 1024, 64, 8, True),
    "e4": Shape(4, 2048, 1024, 64, 8, True),
    "e16": Shape(16, 2048, 1024, 64, 8, True),
    "f": Shape(8192, 64, 64, 4096, 2, False),
}
PASS_NAME = {"fwd": "forward", "fwdbwd": "forward + backward"}


def flops(shape, direction):
    s = SHAPES[shape]
    products = (3 if s.gated else 2) * (3 if direction == "fwdbwd" else 1)
    return 2 * products * s.T * s.K * s.D * s.F


def weight_bytes(shape):
    """Of the experts that a balanced routing meets."""
    s = SHAPES[shape]
    return 4 * min(s.E, s.T * s.K) * (3 if s.gated else 2) * s.D * s.F


def least_bytes(shape, direction):
    """Weights once, or twice and their gradients once; x and y, or also dy and dx."""
    s = SHAPES[shape]
    backward = direction == "fwdbwd"
    return weight_bytes(shape) * (3 if backward else 1) + 8 * s.T * s.D * (2 if backward else 1)


class Measured:
    """The rounds of a peer in one run."""

    def __init__(self):
        self.ms, self.amount = [], 0.0

    def rate(self):
        """GFLOP/s, or GB/s of a stream."""
        return 1e-6 * self.amount / statistics.median(self.ms)

    def best(self):
        return 1e-6 * self.amount / min(self.ms)


def read_raw(path):
    """{(peer, shape, routing, pass, run)}: peers of one run have one number, in order of runs."""
    found, run, last, seen = {}, 0, None, set()
    with open(path) as file:
        for peer, shape, routing, direction, _threads, number, ms, amount in csv.reader(file):
            key = (shape, routing, direction)
            if number == "0":
                if key != last or peer in seen:
                    run, last, seen = run + 1, key, set()
                seen.add(peer)
            m = found.setdefault((peer, *key, run), Measured())
            m.ms.append(float(ms))
            m.amount = float(amount)
    return found


def pair(rounds, one, other, shape, routing, direction):
    """Measurements of two peers in a run that has both, or None."""
    for (peer, *key, run), m in rounds.items():
        if peer == one and key == [shape, routing, direction]:
            n = rounds.get((other, *key, run))
            if n:
                return m, n
    return None


def ratio(rounds, one, other, shape, direction, routing="balanced"):
    """Median over rounds of one's time over the other's, or None."""
    both = pair(rounds, one, other, shape, routing, direction)
    return both and statistics.median(a / b for a, b in zip(both[0].ms, both[1].ms))


def fastest(rounds, one, other, shape, direction, modes):
    """(ratio, mode) of the packed mode that is ahead."""
    found = [(ratio(rounds, f"libmoe_{mode}", other, shape, direction), mode) for mode in modes]
    found = [pair for pair in found if pair[0] is not None]
    return min(found) if found else (None, None)


def peak_share(rounds, name, shape):
    """Of the FMA peak: by medians of ratios, and the best round over the best of the peak."""
    both = pair(rounds, name, "fma_peak", shape, "balanced", "fwd")
    if not both:
        return None, None
    mine, peak = both
    shares = [mine.amount / a / (peak.amount / b) for a, b in zip(mine.ms, peak.ms)]
    return statistics.median(shares), mine.best() / peak.best()


def stream_share(rounds, name, shape):
    """Time of the weights at read bandwidth over the time taken."""
    both = pair(rounds, name, "read_bandwidth", shape, "balanced", "fwd")
    if not both:
        return None
    mine, stream = both
    scale = weight_bytes(shape) / stream.amount
    return statistics.median(b * scale / a for a, b in zip(mine.ms, stream.ms))


def memory_lines(out):
    with open(os.path.join(out, "memory.csv")) as file:
        return [(row[2], *(float(x) for x in row[5:9])) for row in csv.reader(file)]


def judge(value, sign, target):
    if value is None:
        return "not measured"
    return "met" if (value <= target if sign == "<=" else value >= target) else "not met"


def targets(rounds, out, main, scale):
    """(what, value, <= or >=, target, remark) of every target that this program can measure."""
    packed = [mode for mode in ("panels", "prepacked") if main != "rowmajor"] or ["rowmajor"]
    mine = f"libmoe_{main}"
    for shape, target in (("a", 0.75), ("b", 0.55), ("d", 0.85)):
        value, mode = fastest(rounds, mine, "dense_openblas", shape, "fwd", packed)
        yield f"{shape}: forward / dense chain", value, "<=", target, mode
    for shape in "abd":
        shares = {mode: peak_share(rounds, f"libmoe_{mode}", shape) for mode in packed}
        mode = max(packed, key=lambda mode: shares[mode][1] or 0)
        middle, best = shares[mode]
        remark = f"{mode}, median {middle:.2f}" if middle else None
        yield f"{shape}: share of the FMA peak, best round", best, ">=", 0.85, remark
    for shape in ("c", "f", "e1", "e4", "e16"):
        shares = {mode: stream_share(rounds, f"libmoe_{mode}", shape) for mode in packed}
        mode = max(packed, key=lambda mode: shares[mode] or 0)
        yield f"{shape}: share of the weight stream's time", shares[mode], ">=", 0.90, mode
    for shape, target in (("a", 0.85), ("b", 0.75), ("d", 0.90), ("c", 1.2)):
        value, mode = fastest(rounds, mine, "dense_openblas", shape, "fwdbwd", packed)
        yield f"{shape}: forward + backward / dense chain", value, "<=", target, mode
    for shape in SHAPES:
        value = ratio(rounds, "libmoe_rowmajor", "loop_onednn", shape, "fwd")
        yield f"{shape}: row-major, forward / oneDNN loop", value, "<=", 1.0, "rowmajor"
    for shape in "abcd":
        value = ratio(rounds, "ggml", mine, shape, "fwd")
        yield f"{shape}: forward, ggml / libmoe", value, ">=", 3.5, main
    for shape in "abcd":
        value = ratio(rounds, "torch_loop", mine, shape, "fwdbwd")
        yield f"{shape}: forward + backward, PyTorch loop / libmoe", value, ">=", 3.0, main
    for shape in ("e1", "e4", "e16"):
        value, mode = fastest(rounds, mine, "ggml", shape, "fwd", packed)
        yield f"{shape}: decoding, ggml / libmoe", value and 1 / value, ">=", 1.0, mode
    yield from smaller_targets(rounds, out, main, scale)


def smaller_targets(rounds, out, main, scale):
    mine = f"libmoe_{main}"
    for shape, direction in [(s, "fwd") for s in "abcdf"] + [("a", "fwdbwd"), ("d", "fwdbwd")]:
        value = ratio(rounds, mine, f"balanced_{main}", shape, direction, "zipf")
        yield f"{shape}: {PASS_NAME[direction]}, Zipf / balanced", value, "<=", 1.1, main
    for shape in "abd":
        both = pair(rounds, f"one_thread_{main}", mine, shape, "balanced", "fwd")
        value = both and statistics.median(a / b for a, b in zip(both[0].ms, both[1].ms))
        best = f"best rounds {min(both[0].ms) / min(both[1].ms):.2f}" if both else None
        yield f"{shape}: forward, one thread / all threads", value, ">=", 1.9, best
    for shape, peak, least, held, steady in memory_lines(out):
        remark = f"pass {held:.0f} MiB"
        yield (f"{shape}: peak memory / parameters, gradients, activations",
               peak / least, "<=", 1.1, remark)  # fmt: skip
        yield f"{shape}: allocations in three steady steps", steady, "<=", 0, None
    for shape in "abcd":
        for direction in ("fwd", "fwdbwd"):
            value = ratio(rounds, "layer_routing", "layer", shape, direction)
            if value is None and direction == "fwdbwd":
                continue
            yield (f"{shape}: {PASS_NAME[direction]}, gate, plan and combine / layer",
                   value, "<=", 0.05, main)  # fmt: skip
    yield ("131,072 experts / 4,096, time a token at as many rows an expert", scale, "<=", 1.5,
           "bench_scale: with its optimizer step")  # fmt: skip


def target_table(rounds, out, main, scale, part=False):
    """Of a part only what was measured."""
    text = ["| what | target | measured | | remark |", "|---|---|---|---|---|"]
    words = []
    for what, value, sign, target, remark in targets(rounds, out, main, scale):
        shown = "" if value is None else f"{value:.0f}" if target == 0 else f"{value:.3f}"
        words.append(judge(value, sign, target))
        if value is not None or not part:
            text.append(f"| {what} | {sign} {target:g} | {shown} | {words[-1]} | {remark or ''} |")
    count = collections.Counter(words)
    return text + ["", ", ".join(f"{count[w]} {w}" for w in ("met", "not met", "not measured")), ""]


def columns_of(rounds, routing="balanced"):
    """Runs with a dense chain or a stream, in order, and their peers."""
    runs, peers = [], []
    for (peer, shape, route, direction, run), _ in rounds.items():
        anchored = ("dense_openblas", shape, route, direction, run) in rounds
        anchored |= ("read_bandwidth", shape, route, direction, run) in rounds
        if route != routing or not anchored:
            continue
        if (shape, direction, run) not in runs:
            runs.append((shape, direction, run))
        if peer not in peers:
            peers.append(peer)
    return runs, peers


def peer_tables(rounds):
    """Time over the dense chain, and GFLOP/s (GB/s of weights where tokens are few)."""
    runs, peers = columns_of(rounds)
    dense = [r for r in runs if ("dense_openblas", r[0], "balanced", r[1], r[2]) in rounds]
    text = ["Time over the dense chain:", ""]
    head = [f"{shape} {'fwd' if direction == 'fwd' else 'f+b'}" for shape, direction, _ in dense]
    text += ["| peer | " + " | ".join(head) + " |", "|---" * (len(dense) + 1) + "|"]
    for peer in peers:
        if peer in ("fma_peak", "read_bandwidth", "copy_bandwidth"):
            continue
        cells = [ratio(rounds, peer, "dense_openblas", *run[:2]) for run in dense]
        words = ["" if cell is None else f"{cell:.2f}" for cell in cells]
        text.append(f"| {peer} | " + " | ".join(words) + " |")
    text += ["", "Median GFLOP/s; GB/s of weights for e1, e4, e16 and of the streams:", ""]
    head = [f"{shape} {'fwd' if direction == 'fwd' else 'f+b'}" for shape, direction, _ in runs]
    text += ["| peer | " + " | ".join(head) + " |", "|---" * (len(runs) + 1) + "|"]
    for peer in peers:
        cells = []
        for shape, direction, run in runs:
            m = rounds.get((peer, shape, "balanced", direction, run))
            rate = m and m.rate()
            if m and shape.startswith("e") and m.amount == flops(shape, direction):
                rate *= weight_bytes(shape) / m.amount
            cells.append("" if m is None else f"{rate:.1f}")
        text.append(f"| {peer} | " + " | ".join(cells) + " |")
    return text + [""]


def memory_table(out):
    text = ["| shape | peak MiB of a training step | parameters, gradients, activations | over | "
            "pass | allocations when steady |", "|---|---|---|---|---|---|"]  # fmt: skip
    for shape, peak, least, held, steady in memory_lines(out):
        text.append(f"| {shape} | {peak:.0f} | {least:.0f} | {peak / least:.3f} | {held:.0f} | "
                    f"{steady:.0f} |")  # fmt: skip
    return text + [""]
