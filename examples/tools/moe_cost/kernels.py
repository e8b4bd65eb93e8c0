"""Arithmetic and bytes of each kernel of a layer on one rank.

The bytes are floors: each array is read or written once, at the memory's full speed. T tokens
leave, N = T K rows come (routing is balanced), e bytes an element. A kernel takes the longest of
its arithmetic, its bytes and its launches.
"""

from dataclasses import dataclass

from .models import ELEMENT

WIDE = 4  # bytes of the router's f32 logits and weights, and of 32-bit ids
LIMITS = ("arithmetic", "memory", "launches")


@dataclass(frozen=True)
class Kernel:
    name: str
    bytes: float
    flops: float = 0.0
    launches: int = 1

    def times(self, cluster):
        """Seconds by LIMITS; the kernel takes the longest."""
        return (
            self.flops / cluster.flops,
            self.bytes / (cluster.memory_gbs * 1e9),
            self.launches * cluster.launch_us * 1e-6,
        )

    def seconds(self, cluster):
        return max(self.times(cluster))

    def limit(self, cluster):
        times = self.times(cluster)
        return LIMITS[times.index(max(times))]


def touched_share(model, tokens, ranks):
    """Of the experts, how many have any row: each token of all ranks misses one with 1 - K/E."""
    return 1 - (1 - model.top_k / model.experts) ** (tokens * ranks)


def weight_bytes(model, tokens, ranks, size):
    """Of a rank's experts that have rows, with `size` bytes an element."""
    expert = model.matrices * model.d_model * model.d_hidden
    return model.experts / ranks * touched_share(model, tokens, ranks) * expert * size


def branch_kernels(model, tokens, flops, gradient_bytes, backward):
    """Shared experts: every token meets each; a GEMM of all of them, then the activation."""
    if not model.shared:
        return []
    d, f = model.d_model, model.shared * model.shared_hidden
    weights = model.matrices * d * f
    rows = tokens * (2 * d + model.matrices * f) * ELEMENT
    middle = model.matrices * tokens * f * ELEMENT
    if not backward:
        return [
            Kernel("shared GEMM", weights * ELEMENT + rows, flops, 2),
            Kernel("shared activation", middle),
        ]
    return [
        Kernel("shared GEMM", weights * (ELEMENT + gradient_bytes) + 2 * rows, 2 * flops, 4),
        Kernel("shared activation", 2 * middle),
    ]


def forward(model, tokens, ranks):
    d, f, e = model.d_model, model.d_hidden, model.experts
    rows = tokens * model.top_k
    gate_flops, routed_flops, shared_flops = model.flops(tokens)
    moved = (tokens + rows) * d * ELEMENT
    gemm = rows * (2 * d + model.matrices * f) * ELEMENT
    return [
        Kernel("gate logits", tokens * d * ELEMENT + (d * e + tokens * e) * WIDE, gate_flops),
        Kernel("scores, top-k", 2 * tokens * e * WIDE + 2 * rows * WIDE),
        Kernel("positions", 3 * rows * WIDE, launches=3),
        Kernel("permute", moved),
        Kernel("GEMM", weight_bytes(model, tokens, ranks, ELEMENT) + gemm, routed_flops, 2),
        Kernel("activation", model.matrices * rows * f * ELEMENT),
        Kernel("combine", moved),
        *branch_kernels(model, tokens, shared_flops, 0, False),
    ]


def backward(model, tokens, ranks, gradient_bytes):
    d, f, e = model.d_model, model.d_hidden, model.experts
    rows = tokens * model.top_k
    gate_flops, routed_flops, shared_flops = model.flops(tokens)
    moved = (tokens + rows) * d * ELEMENT
    gemm = 2 * rows * (2 * d + model.matrices * f) * ELEMENT
    weights = weight_bytes(model, tokens, ranks, ELEMENT + gradient_bytes)
    router = 2 * tokens * d * ELEMENT + 2 * (d * e + tokens * e) * WIDE
    return [
        Kernel("dy gather", moved),
        Kernel("activation, row dot", 2 * model.matrices * rows * f * ELEMENT),
        Kernel("GEMM", weights + gemm, 2 * routed_flops, 4),
        Kernel("dx combine", moved),
        Kernel("scores", 2 * tokens * e * WIDE),
        Kernel("gate", router, 2 * gate_flops, 2),
        *branch_kernels(model, tokens, shared_flops, gradient_bytes, True),
    ]
