"""docs/cost-model.md worked out once more, by its formulas alone, beside what moe-cost says.

Of examples/tools/moe_cost only what makes a case and what says its cost is called; shapes and
clusters are written down again too.
"""

import sys
from dataclasses import replace
from math import ceil, comb, log2
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "tools"))

from moe_cost import command, cost, models, report  # noqa: E402

# D, F, E, K, matrices, shared experts, their width, groups, top groups, other parameters of gate,
# shared experts and layer, other parameters of an expert (biases)
SHAPES = {
    "mixtral": (4096, 14336, 8, 2, 3, 0, 0, 1, 1, 0, 0),
    "olmoe": (2048, 1024, 64, 8, 3, 0, 0, 1, 1, 0, 0),
    "qwen2": (2048, 1408, 60, 4, 3, 1, 5632, 1, 1, 2048, 0),
    "gpt_oss": (2880, 2880, 128, 4, 3, 0, 0, 1, 1, 128, 2 * 2880 + 2880),
    "llama4": (5120, 8192, 16, 1, 3, 1, 8192, 1, 1, 0, 0),
    "deepseek_v2": (5120, 1536, 160, 6, 3, 2, 1536, 8, 3, 0, 0),
    "deepseek_v3": (7168, 2048, 256, 8, 3, 1, 2048, 8, 4, 256, 0),
}
# peak, memory, node, network
CLUSTERS = {
    "a100": (312e12, 2039e9, 225e9, 22.5e9),
    "h100": (989e12, 3350e9, 337e9, 45e9),
    "h800": (989e12, 3350e9, 155e9, 45e9),
}
EFFICIENCY, LATENCY, MESSAGE, LAUNCH, ELEMENT = 0.55, 5e-6, 1e-7, 3e-6, 2

# model, cluster, GPUs, GPUs a node, P, L, T, and what differs
CASES = [
    ("mixtral", "h100", 1, 1, 1, 1, 4096, {}),
    ("mixtral", "h100", 8, 8, 8, 8, 4096, {}),
    ("mixtral", "h100", 64, 8, 8, 1, 64, {}),
    ("mixtral", "h100", 4096, 8, 8, 8, 1 << 20, {"overlap_gradients": True}),
    ("mixtral", "a100", 64, 2, 2, 2, 4096, {"gradient_dtype": "bfloat16", "accumulate": 3}),
    ("qwen2", "h100", 60, 10, 60, 10, 512, {}),
    ("qwen2", "h100", 24, 6, 12, 6, 1000, {"dedup": "node", "overlap_shared": True}),
    ("qwen2", "h800", 36, 12, 12, 4, 1, {"dedup": "rank"}),
    ("olmoe", "h100", 48, 8, 16, 8, 4096, {"dedup": "node", "chunks": 4}),
    ("olmoe", "h100", 64, 8, 8, 1, 300, {"dedup": "node"}),
    ("llama4", "h100", 16, 8, 16, 8, 2048, {"dedup": "node", "dispatch_bytes": 1.03125}),
    ("llama4", "a100", 4096, 8, 16, 2, 8192, {}),
    ("gpt_oss", "h100", 128, 8, 128, 8, 4096, {"dedup": "rank", "training": False}),
    ("deepseek_v2", "h100", 160, 8, 160, 8, 777, {"dedup": "rank"}),
    ("deepseek_v3", "h800", 256, 8, 256, 8, 128, {"dispatch_bytes": 1.03125, "training": False}),
    ("deepseek_v3", "h100", 64, 8, 64, 8, 4096, {"dedup": "node", "chunks": 8}),
    ("deepseek_v3", "h100", 64, 8, 64, 8, 4096,
     {"dedup": "node", "visits": "most", "dispatch_bytes": 1, "combine_bytes": 4}),
]  # fmt: skip


class Page:
    """A case by the page's formulas."""

    def __init__(self, model, cluster, gpus, node, ranks, local, tokens, fields):
        self.D, self.F, self.E, self.K, self.M, self.shared, shared_width = SHAPES[model][:7]
        self.A, self.g, self.more, self.biases = SHAPES[model][7:]
        self.peak, self.memory, self.inside, self.network = CLUSTERS[cluster]
        self.G, self.node, self.P, self.L, self.T = gpus, node, ranks, local, tokens
        self.N, self.N_r, self.wide = ranks // local, tokens * self.K, self.shared * shared_width
        self.setup = replace(cost.Setup(gpus, node, ranks, local, tokens), **fields)
        self.chunks, self.e_g = self.setup.chunks, self.setup.gradient_bytes

    # ---- copies and exchanges

    def visits(self, units):
        """V of units that lie inside a group each, as all of CASES do."""
        size, candidates = self.E // units, self.g * self.E // self.A
        assert (self.E // self.A) % size == 0
        miss = comb(candidates - size, self.K) / comb(candidates, self.K)
        return units * self.g / self.A * (1 - miss)

    def copies(self):
        k = self.K if self.setup.dedup == "none" else self.visits(self.P)
        if self.setup.dedup != "node":
            return k * (1 - 1 / self.N), k * (1 / self.N - 1 / self.P)
        nodes = self.visits(self.N) if self.setup.visits == "mean" else min(self.N, self.K, self.g)
        return nodes * (1 - 1 / self.N), k * (1 - 1 / self.L)

    def ratio(self, h, speed):
        size = self.setup.dispatch_bytes + self.setup.combine_bytes
        return h / self.K * size * self.peak * EFFICIENCY / (2 * self.M * self.F * speed)

    def exchange(self, size):
        if self.P == 1:
            return 0
        away, near = (h * self.T * self.D * size for h in self.copies())
        staged = self.setup.dedup == "node" and self.N > 1
        peers = self.N - 1 if staged else self.P - self.L
        away = away / self.network + self.chunks * MESSAGE * peers
        near = near / self.inside + self.chunks * MESSAGE * (self.L - 1)
        start = self.chunks * LATENCY
        if not staged:
            return max(away, near) + start
        return max(away, near) + min(away, near) / self.chunks + (2 if self.L > 1 else 1) * start

    # ---- kernels

    def kernel(self, size, flops=0, launches=1):
        return max(flops / (self.peak * EFFICIENCY), size / self.memory, launches * LAUNCH)

    def gemm(self, back):
        touched = self.E / self.P * (1 - (1 - self.K / self.E) ** (self.T * self.P))
        weights = touched * self.M * self.D * self.F * (ELEMENT + back * self.e_g)
        rows = (1 + back) * self.N_r * (2 * self.D + self.M * self.F) * ELEMENT
        flops = (1 + back) * 2 * self.N_r * self.M * self.D * self.F
        return self.kernel(weights + rows, flops, 2 + 2 * back)

    def activation(self, back):
        return self.kernel((1 + back) * self.M * self.N_r * self.F * ELEMENT)

    def branch(self, back):
        if not self.shared:
            return 0
        weights, flops = self.M * self.D * self.wide, 2 * self.T * self.M * self.D * self.wide
        rows = (1 + back) * self.T * (2 * self.D + self.M * self.wide) * ELEMENT
        size = weights * (ELEMENT + back * self.e_g) + rows
        middle = (1 + back) * self.M * self.T * self.wide * ELEMENT
        return self.kernel(size, (1 + back) * flops, 2 + 2 * back) + self.kernel(middle)

    def others(self, back):
        moved = 2 * self.kernel((self.T + self.N_r) * self.D * ELEMENT)
        x, router = self.T * self.D * ELEMENT, 4 * (self.D * self.E + self.T * self.E)
        flops = 2 * self.T * self.D * self.E
        if back:
            gate = self.kernel(2 * x + 2 * router, 2 * flops, 2)
            return moved + gate + self.kernel(8 * self.T * self.E)
        scores = self.kernel(8 * (self.T * self.E + self.N_r))
        return moved + self.kernel(x + router, flops) + scores + self.kernel(12 * self.N_r, 0, 3)

    # ---- passes and sums of gradients

    def passed(self, back):
        """Time, GEMM, communication."""
        out = self.setup.combine_bytes if back else self.setup.dispatch_bytes
        travel = self.exchange(out) + self.exchange(self.setup.combine_bytes)
        branch, work = self.branch(back), self.gemm(back) + self.activation(back)
        beside = min(travel, branch) if self.setup.overlap_shared else 0
        shown = travel - beside
        both = max(shown, work) + min(shown, work) / self.chunks
        return both + branch + self.others(back), self.gemm(back), travel

    def all_reduce(self, size, i, n):
        if i * n == 1:
            return 0
        links = 2 * size * (i - 1) / i / self.inside + 2 * size / i * (n - 1) / n / self.network
        return links + LATENCY + MESSAGE * (2 * (i - 1) + 2 * ceil(log2(n)))

    def parameters(self):
        """Of every rank, and of a rank's experts."""
        branch = self.M * self.D * self.wide
        expert = self.M * self.D * self.F + self.biases
        return self.D * self.E + branch + self.more, self.E // self.P * expert

    def gradients(self):
        (everywhere, mine), replicas = self.parameters(), self.G // self.P
        beside = min(replicas, self.node // self.L)
        return self.all_reduce(everywhere * self.e_g, self.node, self.G // self.node) + (
            self.all_reduce(mine * self.e_g, beside, replicas // beside)
        )

    def outputs(self):
        row = (2 * self.D + self.M * self.F) * ELEMENT
        away, near = self.copies()
        forward, gemm, travel = self.passed(0)
        found = {
            "forward_us": forward * 1e6, "forward_gemm_us": gemm * 1e6,
            "forward_dispatch_us": self.exchange(self.setup.dispatch_bytes) * 1e6,
            "forward_combine_us": self.exchange(self.setup.combine_bytes) * 1e6,
            "r_network": self.ratio(away, self.network), "r_node": self.ratio(near, self.inside),
            "rows_bytes": self.N_r * row,
            "rows_worst_bytes": self.T * self.P * min(self.K, self.E // self.P) * row,
            "ratio": travel / gemm,
        }  # fmt: skip
        if self.setup.training:
            found.update(self.trained(forward, gemm, travel))
        return found

    def trained(self, forward, gemm, travel):
        backward, gemm_back, travel_back = self.passed(1)
        sums = self.gradients()
        left = max(0, sums - backward) if self.setup.overlap_gradients else sums
        step = self.setup.accumulate * (forward + backward) + left
        products = 2 * self.T * self.D * (self.E + self.M * (self.K * self.F + self.wide))
        work = self.setup.accumulate * 3 * products
        return {
            "backward_us": backward * 1e6, "backward_gemm_us": gemm_back * 1e6,
            "gradients_us": sums * 1e6, "step_us": step * 1e6,
            "ratio": (travel + travel_back) / (gemm + gemm_back),
            "utilisation": work / (step * self.peak),
            "gradient_bytes": sum(self.parameters()) * self.e_g,
        }  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:7])))
def test_a_case_is_the_formulas_of_the_page(case):
    page = Page(*case)
    model = models.resolve(case[0], models.MODELS[case[0]], None, None)
    said = report.outputs(cost.cost(model, command.CLUSTERS[case[1]], page.setup))
    for name, value in page.outputs().items():
        assert said[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
