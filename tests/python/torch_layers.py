"""What the tests of moe.torch share: a small layer, numbers, and the gradients of one step."""

import sys

import torch

from conftest import PACKAGE

sys.path.insert(0, str(PACKAGE))
from moe.torch import MoELayer  # noqa: E402

NOISY = {"kind": "noisy_top_k", "importance_weight": 0.1, "load_weight": 0.1, "init_std": 0.5}


def small(dtype=torch.float64, **more):
    arguments = dict(d_model=6, d_hidden=5, num_experts=4, top_k=2, activation="silu", seed=3,
                     gate=dict(NOISY), experts={"bias": 1}, dtype=dtype)  # fmt: skip
    arguments.update(more)
    return MoELayer(**arguments)


def numbers(*shape, seed=1, dtype=torch.float64, grad=False):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return made.requires_grad_(grad)


def step_of(layer, x, **arguments):
    """Gradients of x and of all parameters of sum(y^2) + losses."""
    out = layer(x, step=4, **arguments)
    return torch.autograd.grad((out.y**2).sum() + out.losses.sum(), [x, *layer.parameters()])
