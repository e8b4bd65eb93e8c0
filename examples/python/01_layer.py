"""One layer, forward and backward, and what is known afterwards.

A noisy top-2 gate over eight experts (Shazeer et al. 2017) routes a batch; the script prints the
losses, how the tokens spread, and checks dx against a difference of two forwards.
"""

import numpy as np

import moe

T, D, F, E, K = 96, 32, 64, 8, 2


def main() -> None:
    # snippet: layer
    context = moe.Context()
    gate = moe.Gate(context, d_model=D, num_experts=E, top_k=K, kind="noisy_top_k", dtype="float64",
                    importance_weight=0.1, load_weight=0.1, init_std=0.02)  # fmt: skip
    experts = moe.Experts(context, d_model=D, d_hidden=F, num_experts=E, dtype="float64",
                          activation="silu", bias=1)  # fmt: skip
    layer = moe.Layer(gate, experts)
    layer.init_parameters(seed=1)
    # end snippet
    print(f"libmoe {moe.version()}, {context.threads} threads, {context.isa.name}")
    for name, p in layer.parameters.items():
        print(f"  {name:18} {str(p.shape):14} {p.dtype}")

    rng = np.random.default_rng(0)
    x = rng.standard_normal((T, D))
    dy = rng.standard_normal((T, D))
    # snippet: pass
    step = moe.Pass(layer)
    y = layer.forward(step, x, flags=moe.Forward.TRAIN, step=7)
    dx = layer.backward(step, dy)
    # end snippet
    losses = step.losses._asdict()
    print("losses", {name: round(value, 6) for name, value in losses.items() if value})
    print("rows of each expert", step.tensor("rows").tolist())

    # L = sum(y dy) + losses; move one element of x and see. The plan is kept, so that no token
    # changes its experts between the two forwards.
    plan = step.plan.copy()

    def loss(moved: np.ndarray) -> float:
        out = layer.forward(
            step, moved, flags=moe.Forward.TRAIN, step=7, plan=plan, plan_use=moe.PlanUse.IDS
        )
        return float((out * dy).sum()) + step.losses.total

    h = 1e-5
    up, down = x.copy(), x.copy()
    up[3, 5] += h
    down[3, 5] -= h
    difference = (loss(up) - loss(down)) / (2 * h)
    print(f"dx[3,5] = {dx[3, 5]:.9f}, by differences {difference:.9f}")
    assert abs(dx[3, 5] - difference) < 1e-6 * max(1.0, abs(difference)), "the gradient is wrong"
    assert y.shape == x.shape


if __name__ == "__main__":
    main()
