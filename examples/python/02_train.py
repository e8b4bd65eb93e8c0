"""Training with Adam on the touched experts only.

The layer learns a function that is another one in each of eight regions of its input, so that
experts have something to specialise in. The optimizer walks layer.parameters, whose data and grad
are the library's memory itself; of the experts' tensors it steps only the slices that met a token.
"""

import argparse
from typing import Any, Dict, Tuple

import numpy as np

import moe

D, F, E, K, REGIONS = 16, 32, 8, 2, 8


class Adam:
    """Adam over views; `only` picks the experts to step."""

    def __init__(self, parameters: Dict[str, moe.Parameter], rate: float) -> None:
        self.rate = rate
        self.state = {
            name: (p.data, p.grad, np.zeros_like(p.data), np.zeros_like(p.data))
            for name, p in parameters.items()
        }
        self.steps = {name: np.zeros(E) for name in parameters}

    # snippet: adam
    def step(self, touched: np.ndarray) -> None:
        for name, (data, grad, m, v) in self.state.items():
            only: Any = np.flatnonzero(touched) if name.startswith("experts.") else slice(None)
            self.steps[name][only] += 1
            count = self.steps[name][only].reshape(-1, *[1] * (data.ndim - 1))
            if not name.startswith("experts."):
                count = count[0]
            m[only] += 0.1 * (grad[only] - m[only])
            v[only] += 0.001 * (grad[only] ** 2 - v[only])
            mean, square = m[only] / (1 - 0.9**count), v[only] / (1 - 0.999**count)
            data[only] -= (self.rate * mean / (np.sqrt(square) + 1e-8)).astype(data.dtype)
    # end snippet


def batch(rng: np.random.Generator, task: Tuple[Any, Any], size: int) -> Tuple[Any, Any]:
    """Inputs around eight centres, each with a linear map of its own."""
    centres, maps = task
    region = rng.integers(REGIONS, size=size)
    x = centres[region] + 0.3 * rng.standard_normal((size, D))
    y = np.einsum("td,tdo->to", x, maps[region])
    return x.astype("float32"), y.astype("float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()

    rng = np.random.default_rng(1)
    task = rng.standard_normal((REGIONS, D)), rng.standard_normal((REGIONS, D, D)) / D**0.5
    context = moe.Context()
    gate = moe.Gate(context, d_model=D, num_experts=E, top_k=K, kind="noisy_top_k",
                    importance_weight=0.01, load_weight=0.01)  # fmt: skip
    experts = moe.Experts(context, d_model=D, d_hidden=F, num_experts=E, bias=1)
    layer = moe.Layer(gate, experts)
    layer.init_parameters(seed=2)
    step = moe.Pass(layer)
    adam = Adam(layer.parameters, 5e-3)
    y = np.empty((options.tokens, D), "float32")
    dx = np.empty((options.tokens, D), "float32")
    first = last = 0.0
    for number in range(options.steps):
        x, target = batch(rng, task, options.tokens)
        # snippet: step
        layer.zero_gradients()
        layer.forward(step, x, y=y, flags=moe.Forward.TRAIN, step=number)
        error = y - target
        layer.backward(step, 2 / error.size * error, dx=dx)
        last = float((error**2).mean())
        first = first or last
        touched = experts.touched()
        adam.step(touched)
        # end snippet
        if number % 50 == 0 or number == options.steps - 1:
            print(f"step {number:4}  loss {last:.4f}  auxiliary {step.losses.total:.4f}  "
                  f"experts touched {int(touched.sum())}")  # fmt: skip
    print(f"loss {first:.4f} -> {last:.4f}")
    assert last < 0.5 * first, "the loss did not go down"


if __name__ == "__main__":
    main()
