"""Times of one MoE layer: kernels, exchanges of rows, sums of gradients; and memory of a rank.

Ranks of a group of P lie L to a node, on N = P / L nodes; other groups have other GPUs. See
docs/cost-model.md.
"""

from dataclasses import dataclass, replace
from math import ceil, log2

from . import kernels, routing
from .models import ELEMENT, GRADIENT_BYTES


@dataclass(frozen=True)
class Setup:
    gpus: int
    gpus_per_node: int
    ep: int  # P
    ranks_per_node: int  # L
    tokens: int  # T, of each GPU
    dispatch_bytes: float = 2
    combine_bytes: float = 2
    gradient_dtype: str = "float32"
    accumulate: int = 1  # micro-batches of a step, after which gradients are summed
    dedup: str = "none"  # none, rank, node
    visits: str = "mean"  # mean, or most: of nodes, by a token with dedup node
    chunks: int = 1
    overlap_shared: bool = False
    overlap_gradients: bool = False
    training: bool = True

    @property
    def nodes(self):
        return self.ep // self.ranks_per_node

    @property
    def gradient_bytes(self):
        return GRADIENT_BYTES[self.gradient_dtype]


def limited(model, setup, most_nodes):
    """The model with its experts in one group a node, of which a token visits at most_nodes."""
    return replace(model, groups=setup.nodes, top_groups=most_nodes)


@dataclass(frozen=True)
class Copies:
    """Of a token, on average: over the network and inside a node."""

    network: float
    node: float


def copies(model, setup):
    """How often a token travels in one direction."""
    p, n, l = setup.ep, setup.nodes, setup.ranks_per_node
    chosen = (model.experts, model.top_k, model.groups, model.top_groups)
    if setup.dedup == "none":
        return Copies(model.top_k * (1 - 1 / n), model.top_k * (1 / n - 1 / p))
    ranks = routing.expected_visits(p, *chosen)
    if setup.dedup == "rank":
        return Copies(ranks * (1 - 1 / n), ranks * (1 / n - 1 / p))
    # By node: over the network to the GPU of the same place, and from there to the ranks.
    visits = routing.most_visits if setup.visits == "most" else routing.expected_visits
    return Copies(visits(n, *chosen) * (1 - 1 / n), ranks * (1 - 1 / l))


def closed_form(model, cluster, h, size, gbs):
    """R = (h/K) (b_d + b_c) PEAK eff / (2 M F B): a link's time over that of the forward's GEMM."""
    work = 2 * model.matrices * model.d_hidden * gbs * 1e9
    return h / model.top_k * size * cluster.flops / work


def pipelined(first, second, chunks):
    """Two stages of work cut into chunks: the longer one, and one chunk of the other."""
    return max(first, second) + min(first, second) / chunks


def exchange(model, cluster, setup, size):
    """Seconds in which rows of `size` bytes an element travel in one direction."""
    c, p, l = copies(model, setup), setup.ep, setup.ranks_per_node
    row = setup.tokens * model.d_model * size
    if p == 1:
        return 0.0
    two_stages = setup.dedup == "node" and setup.nodes > 1
    peers = setup.nodes - 1 if two_stages else p - l
    start, each = cluster.latency_us * 1e-6, cluster.message_us * 1e-6 * setup.chunks
    network = row * c.network / (cluster.network_gbs * 1e9) + each * peers
    node = row * c.node / (cluster.node_gbs * 1e9) + each * (l - 1)
    if two_stages:
        stages = 2 if l > 1 else 1
        return pipelined(network, node, setup.chunks) + stages * setup.chunks * start
    return max(network, node) + setup.chunks * start


@dataclass(frozen=True)
class Pass:
    """A forward or a backward, in seconds."""

    kernels: tuple  # of (kernel, seconds)
    dispatch: float
    combine: float
    hidden: float  # of dispatch and combine, behind shared experts and other chunks

    def of(self, *names):
        return sum(t for kernel, t in self.kernels if kernel.name in names)

    @property
    def gemm(self):
        return self.of("GEMM")

    @property
    def communication(self):
        return self.dispatch + self.combine

    @property
    def computing(self):
        return sum(t for _, t in self.kernels)

    @property
    def total(self):
        return self.computing + self.communication - self.hidden


def pass_cost(model, cluster, setup, backward=False):
    if backward:
        work = kernels.backward(model, setup.tokens, setup.ep, setup.gradient_bytes)
        out = setup.combine_bytes  # gradients of outputs have the type of outputs
    else:
        work = kernels.forward(model, setup.tokens, setup.ep)
        out = setup.dispatch_bytes
    timed = tuple((kernel, kernel.seconds(cluster)) for kernel in work)
    dispatch = exchange(model, cluster, setup, out)
    combine = exchange(model, cluster, setup, setup.combine_bytes)
    known = Pass(timed, dispatch, combine, 0.0)
    left, hidden = known.communication, 0.0
    if setup.overlap_shared:
        hidden = min(left, known.of("shared GEMM", "shared activation"))
        left -= hidden
    experts = known.of("GEMM", "activation", "activation, row dot")
    hidden += left + experts - pipelined(left, experts, setup.chunks)
    return replace(known, hidden=hidden)


def all_reduce(cluster, size, inside, nodes):
    """Sums `size` bytes over `inside` GPUs of each of `nodes` nodes: a ring, a part across."""
    if inside * nodes == 1:
        return 0.0
    steps = 2 * (inside - 1) + 2 * ceil(log2(nodes))
    node = 2 * size * (inside - 1) / inside / (cluster.node_gbs * 1e9)
    network = 2 * size / inside * (nodes - 1) / nodes / (cluster.network_gbs * 1e9)
    return node + network + cluster.latency_us * 1e-6 + steps * cluster.message_us * 1e-6


def gradients(model, cluster, setup):
    """Seconds to sum gradients once: of what all GPUs have, and of experts over their replicas."""
    everywhere, mine = model.parameters(setup.ep)
    inside = min(setup.gpus, setup.gpus_per_node)
    nodes = setup.gpus // inside
    size = everywhere.count * setup.gradient_bytes
    replicas = setup.gpus // setup.ep
    beside = min(replicas, max(1, inside // setup.ranks_per_node))
    experts = mine.count * setup.gradient_bytes
    return (
        all_reduce(cluster, size, inside, nodes),
        all_reduce(cluster, experts, beside, replicas // beside),
    )


@dataclass(frozen=True)
class Memory:
    """Of a rank and layer, in bytes."""

    parameters: int
    gradients: int  # in the type that is chosen
    activations: int  # moe_pass_bytes of the library, on a CPU
    rows: float  # that come: x, y and the hidden units, balanced
    rows_worst: float  # if every token of every rank chooses this rank


def memory(model, setup):
    everywhere, mine = model.parameters(setup.ep)
    row = (2 * model.d_model + model.matrices * model.d_hidden) * ELEMENT
    most = min(model.top_k, model.experts // setup.ep)
    return Memory(
        everywhere.bytes + mine.bytes,
        (everywhere.count + mine.count) * setup.gradient_bytes * setup.training,
        model.pass_bytes(setup.tokens, setup.training),
        setup.tokens * model.top_k * row,
        setup.tokens * setup.ep * most * row,
    )


@dataclass(frozen=True)
class Cost:
    model: object
    cluster: object
    setup: Setup
    forward: Pass
    backward: object  # Pass, or None for inference
    everywhere: float  # seconds of gradients of gate and shared experts
    experts: float  # and of experts with replicas
    memory: Memory

    @property
    def gradients(self):
        """Seconds of sums of gradients that nothing hides."""
        seconds = self.everywhere + self.experts
        if self.setup.overlap_gradients and self.backward:
            return max(0.0, seconds - self.backward.total)
        return seconds

    @property
    def passes(self):
        return (self.forward, self.backward) if self.backward else (self.forward,)

    @property
    def step(self):
        return self.setup.accumulate * sum(one.total for one in self.passes) + self.gradients

    @property
    def ratio(self):
        """Communication over the GEMM of routed experts, of all passes; nothing hidden."""
        return sum(p.communication for p in self.passes) / sum(p.gemm for p in self.passes)

    @property
    def utilisation(self):
        """Arithmetic of the layer's products over what the peak would do in a step."""
        work = sum(self.model.flops(self.setup.tokens)) * (3 if self.backward else 1)
        return self.setup.accumulate * work / (self.step * self.cluster.peak_tflops * 1e12)

    def limits(self):
        """Seconds of a step by what they are spent on.

        The exposed exchanges, LIMITS of the kernels, and sums of gradients that nothing hides.
        """
        spent = dict.fromkeys(("communication", *kernels.LIMITS), 0.0)
        for one in self.passes:
            spent["communication"] += one.communication - one.hidden
            for kernel, seconds in one.kernels:
                spent[kernel.limit(self.cluster)] += seconds
        step = {name: self.setup.accumulate * seconds for name, seconds in spent.items()}
        return {**step, "gradients": self.gradients} if self.backward else step

    @property
    def bound_by(self):
        spent = self.limits()
        return max(spent, key=spent.get)


def cost(model, cluster, setup):
    sums = gradients(model, cluster, setup) if setup.training else (0.0, 0.0)
    return Cost(
        model, cluster, setup, pass_cost(model, cluster, setup),
        pass_cost(model, cluster, setup, True) if setup.training else None, *sums,
        memory(model, setup),
    )  # fmt: skip
