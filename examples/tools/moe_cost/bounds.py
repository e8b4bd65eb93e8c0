"""Where a layer turns from one bound to another, in closed form."""

from dataclasses import dataclass, replace

from . import cost, kernels
from .models import ELEMENT


@dataclass(frozen=True)
class Ratios:
    """R of the forward by link, exact once tokens are many and messages few."""

    network: float
    node: float
    at_most: float  # the network's, if every token visits as many nodes as it may

    @property
    def slowest(self):
        return max(self.network, self.node)


def ratios(model, cluster, setup):
    size = setup.dispatch_bytes + setup.combine_bytes
    c, most = cost.copies(model, setup), cost.copies(model, replace(setup, visits="most"))
    return Ratios(
        cost.closed_form(model, cluster, c.network, size, cluster.network_gbs),
        cost.closed_form(model, cluster, c.node, size, cluster.node_gbs),
        cost.closed_form(model, cluster, most.network, size, cluster.network_gbs),
    )


def break_even_width(model, cluster, setup):
    """The F at which R is 1: R goes with 1 / F."""
    return model.d_hidden * ratios(model, cluster, setup).slowest


def break_even_gbs(model, cluster, setup):
    """The network's speed at which its R is 1; 0 if nothing crosses it."""
    return cluster.network_gbs * ratios(model, cluster, setup).network


def widths(model, setup):
    """Expert-parallel widths that divide experts, GPUs and nodes, from the narrowest on."""
    node = min(setup.gpus_per_node, setup.gpus)
    return [
        p for p in range(1, min(model.experts, setup.gpus) + 1)
        if model.experts % p == 0 and setup.gpus % p == 0 and (node % p == 0 or p % node == 0)
    ]  # fmt: skip


def first_bound_width(model, cluster, setup):
    """The narrowest expert parallelism, packed into nodes, with R above 1; None: there is none."""
    node = min(setup.gpus_per_node, setup.gpus)
    for p in widths(model, setup):
        if ratios(model, cluster, replace(setup, ep=p, ranks_per_node=min(node, p))).slowest > 1:
            return p
    return None


def compute_bound_tokens(model, cluster, setup):
    """Tokens a GPU from which the forward's GEMM waits for arithmetic, not for its weights.

    T (flops a token / rate) = (weights + T bytes a token) / memory, with rows for every expert;
    None if the bytes of rows alone take longer.
    """
    memory = cluster.memory_gbs * 1e9
    weights = kernels.weight_bytes(replace(model, top_k=model.experts), 1, setup.ep, ELEMENT)
    rows = model.top_k * (2 * model.d_model + model.matrices * model.d_hidden) * ELEMENT
    work = 2 * model.top_k * model.matrices * model.d_model * model.d_hidden
    left = work / cluster.flops - rows / memory
    return weights / memory / left if left > 0 else None
