"""Pools that are more than feed-forward experts: the host's own, identity, and pools of parts."""

import gc
import weakref

import pytest

np = pytest.importorskip("numpy")

import moe  # noqa: E402

T, D, E = 11, 6, 4
rng = np.random.default_rng(8)
X, DY = rng.standard_normal((2, T, D))
GATE = {"d_model": D, "num_experts": E, "top_k": 2, "dtype": "float64"}


def layer_of(context, experts, **gate):
    layer = moe.Layer(moe.Gate(context, **{**GATE, **gate}), experts)
    layer.gate.parameters["weight"].data[...] = np.sin(np.arange(D * E)).reshape(D, E)
    return layer


class Scaled:
    """z = factor_e x^2 as experts of the host, with gradients of its own."""

    def __init__(self):
        self.factor = np.arange(1.0, E + 1)
        self.grad = np.zeros(E)
        self.seen = []

    def forward(self, call):
        self.seen.append((call.expert, call.rows))
        assert call.dout is None and not call.x.flags.writeable
        square = call.workspace.view("float64")
        square[...] = call.x**2
        call.out[...] = self.factor[call.expert] * square

    def backward(self, call):
        assert call.workspace.view("float64").tobytes() == (call.x**2).tobytes()
        if call.parameters:
            self.grad[call.expert] += (call.dout * call.x**2).sum()
        if call.dx is not None:
            call.dx[...] = 2 * self.factor[call.expert] * call.x * call.dout


def test_experts_of_the_host_forward_and_backward(context):
    own = Scaled()
    pool = moe.Experts(context, d_model=D, num_experts=E, dtype="float64", workspace_per_row=8 * D,
                       callbacks=(own.forward, own.backward))  # fmt: skip
    assert pool.config.kind == moe.ExpertsKind.CALLBACK and not pool.parameters
    layer = layer_of(context, pool)
    step = moe.Pass(layer)
    y = layer.forward(step, X)
    plan = step.plan.arrays()
    assert own.seen == [(e, n) for e, n in enumerate(np.diff(plan.expert_begin)) if n]
    gates = np.zeros((T, E))
    np.put_along_axis(gates, plan.expert_of_entry.reshape(T, 2), plan.weight_of_entry.reshape(T, 2),
                      axis=1)  # fmt: skip
    np.testing.assert_allclose(y, (gates @ own.factor)[:, None] * X**2, rtol=1e-13)
    weights = np.zeros(plan.weight_of_entry.shape)
    dx = layer.backward(step, DY, entry_weight_grad=weights)
    through = 2 * (gates @ own.factor)[:, None] * X * DY
    logits = np.zeros((T, E))
    layer.backward(step, DY, flags=moe.Backward.OVERWRITE, d_logits_out=logits)
    by_gate = logits @ layer.parameters["gate.weight"].data.T
    np.testing.assert_allclose(dx, through + by_gate, rtol=1e-12, atol=1e-13)
    want = gates.T @ (DY * X**2).sum(axis=1)
    np.testing.assert_allclose(own.grad, 2 * want, rtol=1e-12)
    before = own.grad.copy()
    layer.backward(step, DY, flags=moe.Backward.SKIP_PARAMETERS)
    assert own.grad.tolist() == before.tolist()


def test_an_exception_of_an_expert_is_the_cause_of_the_error(context):
    def forward(call):
        raise KeyError("expert")

    layer = layer_of(context, moe.Experts(context, d_model=D, num_experts=E, dtype="float64",
                                          callbacks=forward))  # fmt: skip
    with pytest.raises(moe.CallbackFailed) as caught:
        layer.forward(moe.Pass(layer), X)
    assert isinstance(caught.value.__cause__, KeyError)


def test_without_a_backward_there_is_none(context):
    layer = layer_of(context, moe.Experts(context, d_model=D, num_experts=E, dtype="float64",
                                          callbacks=lambda call: call.out.fill(1.0)))  # fmt: skip
    step = moe.Pass(layer)
    np.testing.assert_allclose(layer.forward(step, X), np.ones((T, D)))
    with pytest.raises(moe.InvalidState):
        layer.backward(step, DY)


def test_an_expert_may_be_a_layer(context, make):
    inner = make(gate={"dtype": "float64"}, experts={"dtype": "float64"})
    passes = {}

    def forward(call):
        passes[call.expert] = moe.Pass(inner)
        inner.forward(passes[call.expert], call.x, y=call.out, flags=moe.Forward.NO_SAVE)

    layer = layer_of(context, moe.Experts(context, d_model=D, num_experts=E, dtype="float64",
                                          callbacks=forward))  # fmt: skip
    y = layer.forward(moe.Pass(layer), X)
    np.testing.assert_allclose(y, inner.forward(moe.Pass(inner), X), rtol=1e-13)


def test_callbacks_are_kept_and_given_up(context):
    own = Scaled()
    pool = moe.Experts(context, d_model=D, num_experts=E, dtype="float64",
                       workspace_per_row=8 * D, callbacks=own.forward)  # fmt: skip
    layer = layer_of(context, pool)
    seen = weakref.ref(own)
    del own
    gc.collect()
    layer.forward(moe.Pass(layer), X)
    assert seen() is not None
    del layer, pool
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("callbacks", [3, (None, len), (len, 3), (len, len, len)])
def test_callbacks_are_callables(context, callbacks):
    with pytest.raises(TypeError, match="callbacks must be a callable, or a pair"):
        moe.Experts(context, d_model=D, num_experts=E, callbacks=callbacks)


def test_a_workspace_is_for_callbacks(context):
    with pytest.raises(TypeError, match="without callbacks"):
        moe.Experts(context, d_model=D, d_hidden=4, num_experts=E, workspace_per_row=8)


def test_the_config_of_such_a_pool_needs_its_callbacks_again(context):
    pool = moe.Experts(context, d_model=D, num_experts=E, callbacks=lambda call: call.out.fill(2))
    with pytest.raises(TypeError, match="give them again"):
        moe.Experts(context, pool.config)
    again = moe.Experts(context, pool.config, callbacks=lambda call: call.out.fill(3))
    layer = moe.Layer(moe.Gate(context, **{**GATE, "dtype": "float32"}), again)
    assert (layer.forward(moe.Pass(layer), X.astype("float32")) == 3).all()


def test_an_identity_expert_gives_x(context):
    pool = moe.Experts(context, kind="identity", d_model=D, num_experts=E, dtype="float64")
    layer = layer_of(context, pool, top_k=1)
    np.testing.assert_array_equal(layer.forward(moe.Pass(layer), X), X)
    assert "kind=identity" in repr(pool)


def parts_of(context):
    one = moe.Experts(context, d_model=D, d_hidden=5, num_experts=3, activation="swiglu",
                      dtype="float64")  # fmt: skip
    two = moe.Experts(context, kind="identity", d_model=D, num_experts=1, dtype="float64")
    return one, two


def test_parts_are_one_pool_and_share_their_parameters(context):
    one, two = parts_of(context)
    pool = moe.Experts.of_parts([one, two])
    assert pool.config.num_experts == E
    layer = layer_of(context, pool)
    assert list(layer.parameters) == ["gate.weight", "experts.0.w1", "experts.0.w3", "experts.0.w2"]
    w1 = rng.standard_normal((3, D, 5))
    grad = np.zeros_like(w1)
    layer.parameters["experts.0.w1"].bind(w1, grad)
    assert one.parameters["w1"].data is w1
    for name in ("w3", "w2"):
        p = one.parameters[name]
        p.data[...] = rng.standard_normal(p.shape)
    step = moe.Pass(layer)
    y = layer.forward(step, X)
    plan = step.plan
    values = {name: p.data for name, p in one.parameters.items()}
    want = np.zeros((T, D))
    a = plan.arrays()
    for t, e, w in zip(np.repeat(np.arange(T), 2), a.expert_of_entry, a.weight_of_entry):
        z = X[t]
        if e < 3:
            g, u = X[t] @ values["w1"][e], X[t] @ values["w3"][e]
            z = (g / (1 + np.exp(-g)) * u) @ values["w2"][e]
        want[t] += w * z
    np.testing.assert_allclose(y, want, rtol=1e-12, atol=1e-13)
    layer.backward(step, DY)
    assert grad.any()
    layer.zero_touched_gradients()
    assert not grad.any() and not pool.touched().any()
    pool.zero_touched_gradients()
    one.zero_touched_gradients()


def test_parts_are_checked_by_the_library(context):
    one, two = parts_of(context)
    with pytest.raises(moe.InvalidArgument):
        moe.Experts.of_parts([one, one])
    with pytest.raises(moe.InvalidArgument):
        moe.Experts.of_parts([])
    with pytest.raises(moe.InvalidArgument):
        moe.Experts.of_parts([moe.Experts.of_parts([one, two])])


@pytest.mark.parametrize("position", moe.WeightOn)
def test_where_the_weight_goes(context, position):
    layer = layer_of(context, moe.Experts(context, d_model=D, d_hidden=5, num_experts=E,
                                          dtype="float64", weight_position=position))  # fmt: skip
    layer.experts.init_parameters(3)
    step = moe.Pass(layer)
    y = layer.forward(step, X)
    a = step.plan.arrays()
    w1, w2 = (layer.parameters[f"experts.{name}"].data for name in ("w1", "w2"))
    want = np.zeros((T, D))
    for t, e, w in zip(np.repeat(np.arange(T), 2), a.expert_of_entry, a.weight_of_entry):
        want[t] += w * np.maximum(X[t] @ w1[e], 0) @ w2[e]  # ReLU: w > 0 commutes with all of it
    np.testing.assert_allclose(y, want, rtol=1e-12, atol=1e-13)
