"""A block of a published model: read from its safetensors file, run, and written again.

The script first makes such a file, with the names that transformers gives a Mixtral block and the
weights in bfloat16; a real model differs in size alone, and is opened by its directory. Needs a
package with libmoe_io.
"""

import tempfile
from pathlib import Path
from typing import Any, Dict

import numpy as np

import moe

T, D, F, E, BLOCK = 10, 32, 48, 8, 3
PREFIX = f"model.layers.{BLOCK}.block_sparse_moe."


def weights() -> Dict[str, np.ndarray]:
    """The block's tensors: matrices are [out,in], one of each kind for every expert."""
    rng = np.random.default_rng(0)
    shapes = {"gate.weight": (E, D)}
    for e in range(E):
        shapes[f"experts.{e}.w1.weight"] = shapes[f"experts.{e}.w3.weight"] = (F, D)
        shapes[f"experts.{e}.w2.weight"] = (D, F)
    return {PREFIX + name: rng.standard_normal(shape) / 4 for name, shape in shapes.items()}


def plain(x: np.ndarray, w: Any) -> np.ndarray:
    """The block's equations, token by token: the two best experts, weighted by their softmax."""
    y = np.zeros_like(x)
    for t, logits in enumerate(x @ w[PREFIX + "gate.weight"].T):
        best = np.argsort(-logits)[:2]
        share = np.exp(logits[best] - logits[best[0]])
        for e, weight in zip(best, share / share.sum()):
            w1, w3, w2 = (w[f"{PREFIX}experts.{e}.{name}.weight"] for name in ("w1", "w3", "w2"))
            a = w1 @ x[t]
            y[t] += weight * (w2 @ (a / (1 + np.exp(-a)) * (w3 @ x[t])))
    return y


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory)
        moe.io.save(model / "model.safetensors", weights(), store_dtype="bfloat16")
        x = np.random.default_rng(1).standard_normal((T, D))

        # snippet: import
        p = moe.preset("mixtral", d_model=D, d_hidden=F, num_experts=E, dtype="float64")
        layer = p.make(moe.Context())  # what the gate does is the config's, weights are the file's
        with moe.io.File(model) as file:  # a directory, its index, or one file
            moe.io.import_(layer, file, "mixtral", block=BLOCK)
            gate = file.entry(PREFIX + "gate.weight")
            expected = plain(x, file)  # a mapping from names to arrays
        y = layer.forward(moe.Pass(layer), x)
        # end snippet
        print(f"{len(weights())} tensors; the gate's is {gate.shape} {gate.dtype}")
        print(f"y[0,0] = {y[0, 0]:.9f}, by the equations {expected[0, 0]:.9f}")
        assert np.allclose(y, expected, rtol=1e-12, atol=1e-12), "the block computes something else"

        # snippet: export
        moe.io.export(model / "again.safetensors", layer, "mixtral", BLOCK, store_dtype="bfloat16")
        with moe.io.File(model) as one, moe.io.File(model / "again.safetensors") as two:
            assert all(np.array_equal(one[name], two[name]) for name in one)
        # end snippet
        print("exported again: the same names and numbers")


if __name__ == "__main__":
    main()
