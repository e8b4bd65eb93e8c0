"""Outputs, losses and every gradient of a layer against its equations in numpy."""

import pytest

np = pytest.importorskip("numpy")

import moe  # noqa: E402
from reference import Layer as Reference  # noqa: E402

T, D, E = 9, 6, 4
GATE = {"d_model": D, "num_experts": E, "top_k": 2}

CASES = {
    "plain": ({}, {}),
    "gate bias, expert biases, gelu": ({"bias": 1}, {"bias": 1, "activation": "gelu_erf"}),
    "scores of all, switch and z": (
        {"order": "score_then_select", "switch_weight": 0.3, "z_weight": 0.2},
        {"activation": "gelu_tanh"},
    ),
    "renormalized sigmoid, sequence": (
        {"score": "sigmoid", "renormalize": 1, "route_scale": 2.5, "sequence_weight": 0.4},
        {"activation": "swiglu", "bias": 1},
    ),
    "noisy, importance and load": (
        {"kind": "noisy_top_k", "importance_weight": 0.3, "load_weight": 0.2},
        {"activation": "silu"},
    ),
    "one expert a token, gshard": (
        {"top_k": 1, "order": "score_then_select", "gshard_weight": 0.5},
        {"activation": "reglu"},
    ),
    "dense": ({"kind": "softmax_dense", "importance_weight": 0.1}, {"output": "sigmoid"}),
    "capacity": ({"capacity_kind": "number", "capacity": 3}, {"activation": "geglu_erf"}),
}


def case_of(make, name, output="linear"):
    gate, experts = CASES[name]
    gate, experts = {**GATE, **gate}, {"d_hidden": 5, **experts}
    layer = make(gate={**gate, "dtype": "float64"}, experts={**experts, "dtype": "float64"},
                 output=output)  # fmt: skip
    rng = np.random.default_rng(5)
    for p in layer.parameters.values():
        p.data[...] = 0.6 * rng.standard_normal(p.shape)
    x, dy = rng.standard_normal((T, D)), rng.standard_normal((T, D))
    noise = rng.standard_normal((T, E)) if gate.get("kind") == "noisy_top_k" else None
    return layer, Reference(gate, experts, output), x, dy, noise


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_losses_follow_the_equations(make, name):
    layer, reference, x, _, noise = case_of(make, name)
    step = moe.Pass(layer)
    y = layer.forward(step, x, noise=noise, flags=moe.Forward.TRAIN)
    values = {name: p.data for name, p in layer.parameters.items()}
    want, losses, ids = reference.run(x, values, noise)
    np.testing.assert_allclose(y, want, rtol=1e-12, atol=1e-13)
    got = step.losses._asdict()
    assert got.pop("total") == pytest.approx(sum(losses.values()), rel=1e-11)
    for loss, value in got.items():
        assert value == pytest.approx(losses.get(loss, 0.0), rel=1e-11), loss
    if name == "dense":  # the library lists all experts in their own order
        ids = np.sort(ids, axis=1)
    assert step.plan.arrays().expert_of_entry.reshape(ids.shape).tolist() == ids.tolist()


@pytest.mark.parametrize("name", CASES)
def test_every_gradient_agrees_with_differences_of_the_equations(make, name):
    layer, reference, x, dy, noise = case_of(make, name)
    step = moe.Pass(layer)
    layer.forward(step, x, noise=noise, flags=moe.Forward.TRAIN)
    dx = layer.backward(step, dy)
    values = {name: p.data.copy() for name, p in layer.parameters.items()}
    _, _, ids = reference.run(x, values, noise)
    got = {"x": dx, **{name: p.grad for name, p in layer.parameters.items()}}
    moved = {"x": x.copy(), **values}

    def total():
        y, losses, _ = reference.run(moved["x"], moved, noise, ids)
        return (y * dy).sum() + sum(losses.values())

    h = 1e-6
    for tensor, gradient in got.items():
        flat = moved[tensor].reshape(-1)
        want = np.empty(flat.size)
        for i in range(flat.size):
            kept = flat[i]
            flat[i] = kept + h
            up = total()
            flat[i] = kept - h
            want[i] = (up - total()) / (2 * h)
            flat[i] = kept
        scale = 1 + np.abs(want).max()
        np.testing.assert_allclose(gradient.reshape(-1), want, atol=2e-8 * scale, err_msg=tensor)


def test_a_sigmoid_after_the_layer(make):
    layer, reference, x, dy, _ = case_of(make, "plain", output="sigmoid")
    step = moe.Pass(layer)
    y = layer.forward(step, x)
    want, _, _ = reference.run(x, {name: p.data for name, p in layer.parameters.items()})
    np.testing.assert_allclose(y, want, rtol=1e-12)


def test_the_library_checks_its_own_gradients(make):
    layer = make(gate={"kind": "noisy_top_k", "load_weight": 0.1}, experts={"activation": "silu"})
    lines = []
    report = moe.check_gradients(layer, report=lambda level, text: lines.append((level, text)),
                                 tokens=12, probes=6)  # fmt: skip
    assert report.disagreements == 0 and report.tensors == 5 and report.probes > 0
    text = "\n".join(line for _, line in lines)
    assert all(name in text for name in ["x", *layer.parameters])
    assert {level for level, _ in lines} == {moe.Log.INFO}
    with pytest.raises(moe.GradientsDisagree) as caught:
        moe.check_gradients(layer, tokens=12, probes=0, step=0.3, tolerance=1e-9)  # too long a step
    wrong = caught.value.report
    assert wrong.disagreements > 0 and wrong.worst > 0 and wrong.worst_name in str(caught.value)
    assert caught.value.status == moe.Status.WRONG_GRADIENT
    assert moe.check_gradients(layer, parameters="current", tokens=12, probes=6).probes > 0


def test_flags_of_forward_and_backward(make):
    layer, _, x, dy, _ = case_of(make, "plain")
    step = moe.Pass(layer)
    y = layer.forward(step, x)
    dx = layer.backward(step, dy)
    w1 = layer.parameters["experts.w1"]
    once = w1.grad.copy()
    assert layer.backward(step, dy, flags=moe.Backward.SKIP_DX) is None
    np.testing.assert_allclose(w1.grad, 2 * once)
    layer.backward(step, dy, flags=moe.Backward.OVERWRITE)
    np.testing.assert_array_equal(w1.grad, once)
    twice = dx.copy()
    layer.backward(step, dy, dx=twice, flags=moe.Backward.ADD_DX)
    np.testing.assert_allclose(twice, 2 * dx)
    added = y.copy()
    assert layer.forward(step, x, y=added, flags=moe.Forward.ADD) is added
    np.testing.assert_allclose(added, 2 * y)
    layer.zero_gradients()
    assert not w1.grad.any() and not layer.experts.touched().any()


def test_recompute_gives_the_same_gradients(make):
    layer, _, x, dy, _ = case_of(make, "noisy, importance and load")
    step = moe.Pass(layer)
    layer.forward(step, x, flags=moe.Forward.TRAIN, step=4)
    dx = layer.backward(step, dy)
    layer.forward(step, x, flags=moe.Forward.TRAIN | moe.Forward.PLAN_ONLY, step=4)
    with pytest.raises(moe.InvalidState):
        layer.backward(step, dy)
    flags = moe.Forward.TRAIN | moe.Forward.RECOMPUTE
    plan = step.plan
    step.trim()
    with pytest.raises(moe.InvalidState, match="ended with a later call"):
        plan.tokens
    assert step.plan.tokens == T
    assert layer.forward(step, x.copy(), flags=flags, step=4) is None
    assert layer.backward(step, dy).tobytes() == dx.tobytes()


def test_gate_and_experts_by_themselves_are_the_layer(make):
    layer, _, x, dy, _ = case_of(make, "plain")
    step = moe.Pass(layer)
    y = layer.forward(step, x)
    dx = layer.backward(step, dy)
    grads = {name: p.grad.copy() for name, p in layer.parameters.items()}
    layer.zero_gradients()
    gate_pass, pool_pass = moe.Pass(layer.gate), moe.Pass(layer.experts)
    assert layer.gate.forward(gate_pass, x) is None
    plan = gate_pass.plan
    y2 = layer.experts.forward(pool_pass, x, plan=plan)
    weight_grad = np.zeros(plan.entries)
    dx2 = layer.experts.backward(pool_pass, dy, entry_weight_grad=weight_grad)
    dx2 += layer.gate.backward(gate_pass, entry_weight_grad=weight_grad)
    assert y2.tobytes() == y.tobytes()
    np.testing.assert_allclose(dx2, dx, rtol=1e-12, atol=1e-14)
    for name, p in layer.parameters.items():
        np.testing.assert_allclose(p.grad, grads[name], rtol=1e-12, atol=1e-14)


def test_loss_weights_and_factors_by_name(make):
    layer, _, x, dy, _ = case_of(make, "scores of all, switch and z")
    step = moe.Pass(layer)
    losses, stats = np.zeros(16), np.zeros(16)
    layer.forward(step, x, loss_weights={"z": 1.0, moe.Loss.GSHARD: 0.5}, losses_out=losses,
                  stats_out=stats)  # fmt: skip
    assert step.losses.switch == 0 and step.losses.z > 0 and step.losses.gshard > 0
    assert losses[moe.Loss.Z] == step.losses.z and stats[moe.Stat.TOKENS] == T
    off = layer.backward(step, 0 * dy, loss_grad={"z": 0, "gshard": 0})
    assert not off.any()
    on = layer.backward(step, 0 * dy)
    assert on.any()
    doubled = layer.backward(step, 0 * dy, loss_grad={"z": 2, "gshard": 2})
    np.testing.assert_allclose(doubled, 2 * on)
    with pytest.raises(ValueError, match="no loss 'zz'"):
        layer.forward(step, x, loss_weights={"zz": 1.0})


def test_a_gate_without_weights_takes_the_hosts_logits(context):
    gate = moe.Gate(context, num_experts=E, top_k=1)
    step = moe.Pass(gate)
    logits = np.eye(E, dtype="float32")[[2, 0, 3]]
    gate.forward(step, logits_in=logits)
    assert step.plan.arrays().expert_of_entry.tolist() == [2, 0, 3]
    d_logits = np.empty((3, E), "float32")
    assert gate.backward(step, d_logits_out=d_logits) is None
    assert step.tensor("logits").tolist() == logits.tolist()


def test_tokens_mask_and_groups(make):
    layer = make(gate={"capacity_kind": "number", "capacity": 2})
    x = np.random.default_rng(0).standard_normal((3, 4, D)).astype("float32")
    step = moe.Pass(layer)
    mask = np.ones(12, bool)
    mask[5] = False
    y = layer.forward(step, x, token_mask=mask, group_begin=np.array([0, 4, 8, 12]))
    assert y.shape == x.shape and not y.reshape(12, D)[5].any()
    assert step.plan.groups == 3 and step.stats.tokens == 11
    assert layer.backward(step, np.ones_like(y)).shape == x.shape


def test_costs_are_known_before(make):
    gate = moe.gate_config(d_model=64, num_experts=8, top_k=2)
    experts = moe.experts_config(d_model=64, d_hidden=128, num_experts=8)
    cost = moe.memory(gate, experts, tokens=100)
    assert cost.parameter_count == 64 * 8 + 2 * 8 * 64 * 128
    assert cost.parameter_bytes == 4 * cost.parameter_count
    assert moe.flops(gate, experts, tokens=200).forward_flops == 2 * moe.flops(
        gate, experts, tokens=100
    ).forward_flops
    layer = make()
    step = moe.Pass(layer)
    step.reserve(50)
    assert step.bytes >= moe.memory(layer.gate, layer.experts, tokens=50, threads=2).pass_bytes > 0


def test_small_functions():
    v = np.array([1.0, 2.0, 4.0])
    dv = np.empty(3)
    assert moe.cv_squared(v, dv=dv) == pytest.approx(np.var(v) / np.mean(v) ** 2, rel=1e-9)
    assert moe.cv_squared(v, ddof=1) == pytest.approx(np.var(v, ddof=1) / np.mean(v) ** 2, rel=1e-9)
    assert dv @ v == pytest.approx(0, abs=1e-9)  # CV^2 does not change with scale
    assert np.float32(moe.noise4(42)).view("uint32").tolist() == [
        0xBFD73394, 0xBEA43738, 0xBF0F51EE, 0x3F27D2E1,
    ]  # fmt: skip
