"""Compares moe.torch.MoELayer with the same equations in plain PyTorch.

For each configuration, with the same parameters, inputs and noise: the largest difference of the
output, of the losses and of every gradient, relative to the tensor's largest magnitude, in float64
and in float32. Ends with status 1 if one is beyond its tolerance.

    python compare_eager.py [--tokens N] [--seed N]
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, Dict, Tuple

import torch

import moe
from eager_moe import EagerMoE
from moe.torch import MoELayer

D, F, E, K = 48, 40, 8, 2

# name: keyword arguments of MoELayer
CONFIGURATIONS: Dict[str, Dict[str, Any]] = {
    "shazeer 2017": dict(output="sigmoid", gate={
        "kind": "noisy_top_k", "importance_weight": 0.1, "load_weight": 0.1}),
    "softmax dense": dict(activation="silu", gate={
        "kind": "softmax_dense", "importance_weight": 0.5}),
    "switch": dict(top_k=1, gate={
        "order": "score_then_select", "switch_weight": 0.01, "z_weight": 0.001,
        "capacity_kind": "number", "capacity": 12}, activation="gelu_tanh"),
    "gshard": dict(gate={
        "order": "score_then_select", "renormalize": 1, "gshard_weight": 0.01,
        "capacity_kind": "number", "capacity": 20, "renormalize_after_drop": 1}),
    "mixtral": dict(activation="swiglu", gate={"switch_weight": 0.02}),
    "sigmoid renorm": dict(top_k=3, activation="swiglu", experts={"bias": 1}, gate={
        "score": "sigmoid", "order": "score_then_select", "renormalize": 1,
        "renormalize_epsilon": 1e-20, "route_scale": 2.5, "sequence_weight": 0.1}),
    "router bias": dict(activation="geglu_erf", experts={"bias": 1, "d_out": 24}, gate={
        "bias": 1, "importance_weight": 0.3}),
    "expert sigmoid": dict(activation="gelu_erf", experts={"output": "sigmoid", "bias": 1}),
    "reglu, geglu": dict(activation="reglu", gate={"z_weight": 0.1}),
}  # fmt: skip

COLUMNS = ["y", "losses", "x", "gate.weight", "gate.bias", "gate.noise_weight", "experts.w1",
           "experts.b1", "experts.w3", "experts.b3", "experts.w2", "experts.b2"]  # fmt: skip

# Both sides round every operation once; f32 sums of some hundred terms differ by some 1e-7 of the
# largest term, and cancellation in a softmax's or a loss's gradient takes another digit.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest magnitude of b."""
    largest = float(b.detach().abs().max()) if b.numel() else 0.0
    off = float((a - b).detach().abs().max()) if b.numel() else 0.0
    return off / largest if largest else off


def inputs(layer: MoELayer, tokens: int, dtype: torch.dtype) -> Tuple[torch.Tensor, ...]:
    """x, noise, the gradient by y, and parameters that are all at work."""
    with torch.no_grad():
        for name, p in layer.named_parameters():
            scale = 0.5 if p.dim() < 3 else p.shape[1] ** -0.5
            p.copy_(torch.randn(p.shape, dtype=dtype) * scale)
    x = torch.randn(tokens, D, dtype=dtype, requires_grad=True)
    noise = torch.randn(tokens, E, dtype=dtype)
    return x, noise, torch.randn(tokens, layer_out(layer), dtype=dtype)


def layer_out(layer: MoELayer) -> int:
    return int(layer.experts.w2.shape[2])


def compare(config: Dict[str, Any], tokens: int, dtype: torch.dtype) -> Dict[str, float]:
    """The largest relative error of each tensor."""
    arguments = {"d_model": D, "d_hidden": F, "num_experts": E, "top_k": K, **config}
    layer = MoELayer(**arguments, dtype=dtype)
    x, noise, dy = inputs(layer, tokens, dtype)
    noisy = config.get("gate", {}).get("kind") == "noisy_top_k"
    ours = layer(x, noise=noise if noisy else None)
    parameters = dict(layer.named_parameters())
    wanted = [x, *parameters.values()]
    got = torch.autograd.grad((ours.y * dy).sum() + ours.losses.sum(), wanted)
    theirs = EagerMoE(**arguments)(parameters, x, noise if noisy else None)
    total = (theirs.y * dy).sum() + sum(theirs.losses.values())
    want = torch.autograd.grad(total, wanted)
    error = {"y": relative(ours.y, theirs.y)}
    if theirs.losses:
        error["losses"] = max(
            relative(ours.losses[moe.Loss[name.upper()]], value)
            for name, value in theirs.losses.items()
        )
    error.update(zip(["x", *parameters], map(relative, got, want)))
    return error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=96, help="tokens of a batch (96)")
    parser.add_argument("--seed", type=int, default=1, help="of everything drawn (1)")
    options = parser.parse_args()
    if options.tokens < 1:
        parser.error(f"--tokens {options.tokens}: at least 1 is needed")
    bad = 0
    print(f"PyTorch {torch.__version__}, libmoe {moe.version()}: largest relative errors, "
          f"T {options.tokens}, D {D}, F {F}, E {E}")  # fmt: skip
    for dtype, tolerance in TOLERANCE.items():
        torch.manual_seed(options.seed)
        print(f"\n{str(dtype)[6:]}, tolerance {tolerance:.0e}")
        names = [c.replace("gate.", "g.").replace("experts.", "").replace("noise_weight", "noise")
                 for c in COLUMNS]  # fmt: skip
        print(f"{'configuration':15}" + "".join(f"{name:>9}" for name in names))
        for name, config in CONFIGURATIONS.items():
            error = compare(config, options.tokens, dtype)
            bad += sum(not value <= tolerance for value in error.values())
            print(f"{name:15}" + "".join(
                f"{error[c]:9.1e}" if c in error else f"{'-':>9}" for c in COLUMNS))  # fmt: skip
    print(f"\n{bad} beyond tolerance")
    return bad != 0


if __name__ == "__main__":
    sys.exit(main())
