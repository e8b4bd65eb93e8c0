"""Layers, numbers and comparisons for the tests of moe.io."""

import numpy as np

import moe

D, F, E, K = 6, 5, 4, 2


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def layer_of(context, experts=E, comm=None, pool=(), gate=(), around=True):
    """A layer of E experts, of which this rank has some; around them a shared one and its gate."""
    gate = {"d_model": D, "num_experts": E, "top_k": K, "dtype": "float64", **dict(gate)}
    pool = {"d_model": D, "d_hidden": F, "dtype": "float64", "activation": "swiglu", "bias": 1,
            **dict(pool)}  # fmt: skip
    shared = moe.Experts(context, **pool, num_experts=1) if around else None
    return moe.Layer(moe.Gate(context, **gate), moe.Experts(context, **pool, num_experts=experts),
                     shared=shared, shared_gate=int(around), comm=comm)  # fmt: skip


def part_of(name, p, seed, first):
    """What a rank has of numbers that are the same on all; its experts are those from first on."""
    if name.startswith("experts."):
        return numbers(seed, E, *p.shape[1:])[first : first + p.shape[0]].copy()
    return numbers(seed, *p.shape)


def draw(layer, first=0):
    for i, (name, p) in enumerate(layer.parameters.items()):
        p.data[...] = part_of(name, p, i, first)
