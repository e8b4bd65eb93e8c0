"""Shared experts, the residual branch, selection bias, and gates that need arrays of their own."""

import pytest

np = pytest.importorskip("numpy")

import moe  # noqa: E402

T, D, E = 12, 6, 4
rng = np.random.default_rng(11)
X, DY = rng.standard_normal((2, T, D))


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def pool_of(context, width, count=1, **fields):
    fields = {"d_model": D, "d_hidden": width, "num_experts": count, "dtype": "float64", **fields}
    pool = moe.Experts(context, **fields)
    for p in pool.parameters.values():
        p.data[...] = 0.5 * rng.standard_normal(p.shape)
    return pool


def gate_of(context, **fields):
    gate = moe.Gate(context, **{"d_model": D, "num_experts": E, "top_k": 2, "dtype": "float64",
                                **fields})  # fmt: skip
    for p in gate.parameters.values():
        p.data[...] = rng.standard_normal(p.shape)
    return gate


def relu_network(pool, x):
    p = pool.parameters
    return np.maximum(x @ p["w1"].data[0], 0) @ p["w2"].data[0]


def routed(layer, x):
    """y without what surrounds it."""
    bare = moe.Layer(layer.gate, layer.experts)
    return bare.forward(moe.Pass(bare), x)


def test_shared_experts_and_their_gate(context):
    gate, pool, shared = gate_of(context), pool_of(context, 5, E), pool_of(context, 7)
    layer = moe.Layer(gate, pool, shared=shared, shared_gate=1)
    assert layer.shared is shared
    names = ["gate.weight", "experts.w1", "experts.w2", "shared.w1", "shared.w2", "shared_gate"]
    assert sorted(layer.parameters) == sorted(names)
    own, grad = rng.standard_normal(D), np.zeros(D)
    layer.parameters["shared_gate"].bind(own, grad)
    assert layer.parameters["shared_gate"].data is own
    step = moe.Pass(layer)
    y = layer.forward(step, X)
    s, z = sigmoid(X @ own), relu_network(shared, X)
    np.testing.assert_allclose(y, routed(layer, X) + s[:, None] * z, rtol=1e-12, atol=1e-13)
    layer.backward(step, DY)
    np.testing.assert_allclose(grad, X.T @ ((DY * z).sum(1) * s * (1 - s)), rtol=1e-11, atol=1e-13)
    h = np.maximum(X @ shared.parameters["w1"].data[0], 0)
    np.testing.assert_allclose(shared.parameters["w2"].grad[0], h.T @ (s[:, None] * DY),
                               rtol=1e-11, atol=1e-13)  # fmt: skip
    layer.zero_gradients()
    assert not grad.any() and not shared.parameters["w2"].grad.any()
    report = moe.check_gradients(layer, tokens=9, probes=6, parameters="current")
    assert report.disagreements == 0


def test_a_residual_branch_mixed_and_plain(context):
    gate, pool, residual = gate_of(context), pool_of(context, 5, E), pool_of(context, 7)
    plain = moe.Layer(gate, pool, residual=residual)
    z, base = relu_network(residual, X), routed(plain, X)
    y = plain.forward(moe.Pass(plain), X)
    np.testing.assert_allclose(y, base + z, rtol=1e-12, atol=1e-13)
    mixed = moe.Layer(gate, pool, moe.layer_config(residual_mix=1), residual=residual)
    wc, bc = mixed.parameters["residual_mix"], mixed.parameters["residual_mix_bias"]
    assert wc.shape == (D, 2) and bc.shape == (2,)
    wc.data[...], bc.data[...] = rng.standard_normal((D, 2)), rng.standard_normal(2)
    c = np.exp(X @ wc.data + bc.data)
    c /= c.sum(axis=1, keepdims=True)
    y = mixed.forward(moe.Pass(mixed), X)
    np.testing.assert_allclose(y, c[:, :1] * base + c[:, 1:] * z, rtol=1e-12, atol=1e-13)


def test_a_layers_own_parameters_begin_and_outlive_its_close(context):
    layer = moe.Layer(gate_of(context), pool_of(context, 5, E), shared=pool_of(context, 7),
                      shared_gate=1, residual=pool_of(context, 3), residual_mix=1)  # fmt: skip
    layer.init_parameters(5)
    assert not layer.parameters["shared_gate"].data.any()  # a coefficient of 1/2
    p = layer.parameters["residual_mix"]
    assert p.owned and p.trainable and p.grad is not None and p.data.any()
    layer.close()
    assert p.data.any()


def test_dropped_tokens_pass_through(context):
    gate = gate_of(context, top_k=1, capacity_kind="number", capacity=1)
    layer = moe.Layer(gate, pool_of(context, 5, E), dropped="pass_through")
    step = moe.Pass(layer)
    y = layer.forward(step, X)
    dropped = step.plan.arrays().row_of_entry < 0
    assert dropped.any()
    np.testing.assert_array_equal(y[dropped], X[dropped])


def test_selection_bias_balances_without_a_loss(context):
    gate = gate_of(context, selection_bias=1, score="sigmoid", order="score_then_select")
    bias = gate.parameters["selection_bias"]
    assert bias.kind == moe.Kind.BUFFER and bias.grad is None
    bias.data[...] = 0
    step = moe.Pass(gate)
    gate.forward(step, X)
    counts = step.tensor("counts")
    gate.update_selection_bias(counts, rate=0.25)
    want = 0.25 * np.sign(counts.mean() - counts)
    np.testing.assert_array_equal(bias.data, want)
    np.testing.assert_array_equal(moe.selection_bias_step(np.zeros(E), counts, 0.25), want)
    mine = np.ones(E, "float32")
    assert moe.selection_bias_step(mine, counts, 0.25, out=mine) is mine
    np.testing.assert_array_equal(mine, 1 + want.astype("float32"))
    bias.data[...] = [0, 0, 10, 20]
    gate.forward(step, X)
    ids = step.plan.arrays().expert_of_entry.reshape(T, 2)
    assert (ids == [3, 2]).all()
    weights = step.plan.arrays().weight_of_entry.reshape(T, 2)
    logits = step.tensor("logits")
    np.testing.assert_allclose(weights, sigmoid(logits[:, [3, 2]]), rtol=1e-13)


def test_selection_bias_says_what_it_needs(context):
    gate = gate_of(context, selection_bias=1, order="score_then_select")
    with pytest.raises(ValueError, match=r"counts has shape \(3,\); wanted \(4,\)"):
        gate.update_selection_bias(np.zeros(3, "int64"))
    with pytest.raises(TypeError, match="counts holds float64"):
        gate.update_selection_bias(np.zeros(4))
    with pytest.raises(moe.InvalidArgument):
        gate.update_selection_bias(np.zeros(4, "int64"), rate=float("nan"))
    bound = np.zeros(4)
    gate.parameters["selection_bias"].bind(bound)
    with pytest.raises(moe.InvalidState):  # the library never writes to bound data
        gate.update_selection_bias(np.ones(4, "int64"))
    with pytest.raises(moe.InvalidState):
        gate_of(context).update_selection_bias(np.ones(4, "int64"))
    with pytest.raises(TypeError, match="out holds float32"):
        moe.selection_bias_step(np.zeros(4), np.ones(4, "int64"), out=np.zeros(4, "float32"))


def test_a_hash_gate_draws_by_token_key(context):
    gate = gate_of(context, kind="hash")
    step = moe.Pass(gate)
    key = np.array([5, 9] * (T // 2))
    gate.forward(step, X, token_key=key)
    ids = step.plan.arrays().expert_of_entry.reshape(T, 2)
    assert (ids == ids[:2].tolist() * (T // 2)).all() and (ids[:, 0] != ids[:, 1]).all()
    with pytest.raises(moe.InvalidArgument, match="token_key"):
        gate.forward(step, X)
    with pytest.raises(ValueError, match="token_key has shape"):
        gate.forward(step, X, token_key=key[:3])
    with pytest.raises(TypeError, match="token_key holds int32"):
        gate.forward(step, X, token_key=key.astype("int32"))


def test_a_hierarchical_gate_shows_its_primary_routing(context):
    gate = gate_of(context, kind="hierarchical", expert_groups=2, top_groups=1, top_k=1,
                   load_weight=0.1)  # fmt: skip
    step = moe.Pass(gate)
    noise, primary = np.zeros((T, E)), np.zeros((T, 2))
    gate.forward(step, X, noise=noise, noise_primary=primary, flags=moe.Forward.TRAIN)
    plan = step.primary_plan
    assert (plan.num_experts, plan.entries, plan.rows) == (2, T, T)
    groups = plan.arrays().expert_of_entry
    best = (X @ gate.parameters["primary_weight"].data).argmax(axis=1)
    assert groups.tolist() == best.tolist()
    assert (step.plan.arrays().expert_of_entry // 2).tolist() == best.tolist()
    assert step.tensor("primary_load").shape == (2,)
    with pytest.raises(ValueError, match="noise_primary has shape"):
        gate.forward(step, X, noise=noise, noise_primary=noise, flags=moe.Forward.TRAIN)
    plain = gate_of(context)
    with pytest.raises(ValueError, match="noise_primary is given and this call has no use"):
        plain.forward(moe.Pass(plain), X, noise_primary=primary)
    with pytest.raises(moe.InvalidState):
        other = moe.Pass(plain)
        plain.forward(other, X)
        other.primary_plan


def test_the_cost_of_what_surrounds_a_layer(context):
    gate, pool, shared = gate_of(context), pool_of(context, 5, E), pool_of(context, 7)
    alone = moe.memory(gate, pool, tokens=T)
    layer = moe.Layer(gate, pool, shared=shared, shared_gate=1)
    both = moe.memory(gate, pool, layer, shared=shared, tokens=T)
    assert both.parameter_count - alone.parameter_count == 2 * D * 7 + D
    assert both.pass_bytes > alone.pass_bytes
    more = moe.flops(gate, pool, shared=shared.config, tokens=T)
    assert more.forward_flops - moe.flops(gate, pool, tokens=T).forward_flops >= 4 * T * D * 7


def test_a_plan_drops_by_priority_and_by_lot(context):
    ids = np.zeros((5, 1), "int32")
    plan = moe.Plan(context)
    priority = np.array([1, 5, 2, 9, 3], "float32")
    plan.build(ids, num_experts=1, capacity=2, drop_policy="batch_priority",
               token_priority=priority)  # fmt: skip
    assert plan.arrays().token_of_row.tolist() == [1, 3]
    with pytest.raises(moe.InvalidArgument, match="token_priority"):
        plan.build(ids, num_experts=1, capacity=2, drop_policy="batch_priority")
    lot = {"num_experts": 1, "capacity": 1, "drop_policy": "random", "seed": 7}
    winners = [
        plan.build(ids, **lot, step=step).arrays().token_of_row.tolist() for step in range(20)
    ]
    assert len({tuple(one) for one in winners}) > 2
    step = next(n for n, one in enumerate(winners) if one != [0])
    rest = plan.build(ids[1:], **lot, step=step, token_first=1)  # the same lots
    assert rest.arrays().token_of_row.tolist() == [winners[step][0] - 1]
