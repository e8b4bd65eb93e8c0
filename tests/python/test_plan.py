"""Plans of the host's own routing: built, shown, saved, and dispatch and combine around experts."""

import array

import pytest

import moe

np = pytest.importorskip("numpy")

IDS = np.array([[2, 0], [1, 1], [0, -1], [2, 1]], "int32")
WEIGHTS = np.array([[0.75, 0.25], [0.5, 0.5], [1.0, 9.0], [0.125, 0.875]], "float32")


@pytest.fixture
def plan(context):
    return moe.Plan(context).build(IDS, WEIGHTS, num_experts=3)


def test_arrays_of_a_plan(plan):
    assert (plan.tokens, plan.entries, plan.rows, plan.num_experts, plan.groups) == (4, 8, 7, 3, 1)
    a = plan.arrays()
    assert a.token_begin.tolist() == [0, 2, 4, 6, 8]
    assert a.expert_of_entry.tolist() == [2, 0, 1, 1, 0, -1, 2, 1]
    assert a.expert_begin.tolist() == [0, 2, 5, 7]
    assert a.token_of_row.tolist() == [0, 2, 1, 1, 3, 0, 3]
    assert a.entry_of_row.tolist() == [1, 4, 2, 3, 7, 0, 6]
    assert a.row_of_entry.tolist() == [5, 0, 2, 3, 1, -1, 6, 4]
    assert a.weight_of_entry.tolist() == [0.75, 0.25, 0.5, 0.5, 1, 0, 0.125, 0.875]
    assert a.group_begin.tolist() == [0, 4]
    plan.check()
    assert repr(plan) == "<moe.Plan tokens=4 entries=8 rows=7>"


def test_views_of_a_plan_hold_it_still(plan, context):
    view = plan.arrays(copy=False)
    assert not view.expert_begin.flags.writeable
    with pytest.raises(moe.InvalidState, match="views of the plan are in use"):
        plan.build(IDS, WEIGHTS, num_experts=3)
    begin = view.expert_begin
    del view
    with pytest.raises(moe.InvalidState):
        plan.load(plan.save())
    del begin
    plan.build(IDS[:1], num_experts=3)
    assert plan.tokens == 1 and plan.arrays().weight_of_entry.tolist() == [1, 1]


def test_ragged_tokens_masks_and_capacity(context):
    ids = np.array([0, 1, 0, 0, 1], "int64")
    begin = np.array([0, 2, 2, 5])
    plan = moe.Plan(context).build(ids, token_begin=begin, num_experts=2, capacity=2)
    assert plan.tokens == 3 and plan.arrays().row_of_entry.tolist() == [0, 2, 1, -1, 3]
    plan.build(ids, token_begin=begin, num_experts=2, token_mask=np.array([0, 1, 1], "uint8"))
    assert plan.arrays().row_of_entry.tolist() == [-1, -1, 0, 1, 2]
    plan.build(ids, top_k=1, num_experts=2, group_begin=np.array([0, 2, 5]), capacity=1)
    assert plan.groups == 2 and plan.rows == 4


@pytest.mark.parametrize("keywords, message", [
    ({"expert_ids": IDS.astype("float32")}, "expert_ids holds float32.*wanted int32 or int64"),
    ({"expert_ids": IDS.T}, "expert_ids: strides"),
    ({"weights": WEIGHTS[:2]}, "weights has 4 elements; wanted 8"),
    ({"weights": WEIGHTS.astype("int32")}, "weights holds int32"),
    ({"token_begin": np.array([0, 100])}, "last element of token_begin is 100; expert_ids has 8"),
    ({"top_k": 3}, r"tokens \* top_k is 2 \* 3"),
    ({"num_experts": 2}, "token 0.* 2"),
    ({"topk": 3}, "moe_plan_args has no field 'topk'; did you mean top_k"),
])  # fmt: skip
def test_a_bad_routing_is_refused_and_the_plan_kept(plan, keywords, message):
    arguments = {"expert_ids": IDS, "weights": WEIGHTS, "num_experts": 3, **keywords}
    with pytest.raises((TypeError, ValueError), match=message):
        plan.build(arguments.pop("expert_ids"), **arguments)
    assert plan.rows == 7


def test_saved_plans(plan, context):
    saved = plan.save()
    again = moe.Plan(context).load(saved)
    assert again.save() == saved == plan.copy().save()
    for keep, got in zip(plan.arrays(), again.arrays()):
        assert keep.tolist() == got.tolist()
    damaged = bytearray(saved)
    damaged[len(saved) // 2] ^= 1
    with pytest.raises(moe.CorruptData) as caught:
        again.load(damaged)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(moe.CorruptData):
        again.load(saved[:-1])
    assert again.save() == saved


def test_dispatch_and_combine_around_the_hosts_experts(plan):
    x = np.arange(12, dtype="float32").reshape(4, 3)
    a = plan.arrays()
    rows = plan.dispatch_forward(x)
    assert rows.tolist() == x[a.token_of_row].tolist()
    y = plan.combine_forward(rows)
    weight_of_row = a.weight_of_entry[a.entry_of_row]
    want = np.zeros_like(x)
    np.add.at(want, a.token_of_row, weight_of_row[:, None] * rows)
    np.testing.assert_allclose(y, want, rtol=1e-6)
    dy = np.ones_like(y)
    weight_grad = np.full(8, np.nan, "float32")
    d_rows = plan.combine_backward(dy, rows, entry_weight_grad=weight_grad)
    assert d_rows.tolist() == np.repeat(weight_of_row[:, None], 3, axis=1).tolist()
    assert weight_grad.tolist() == [3, 3, 12, 12, 21, 0, 30, 30]
    dx = plan.dispatch_backward(d_rows)
    np.testing.assert_allclose(dx[0], [1, 1, 1])
    kept = dx.copy()
    assert plan.dispatch_backward(d_rows, dx, flags=moe.Rows.ADD) is dx
    np.testing.assert_allclose(dx, 2 * kept)
    plain = plan.combine_forward(rows, flags=moe.Rows.UNWEIGHTED)
    assert plain[1].tolist() == (2 * x[1]).tolist()


def test_rows_of_the_wrong_size_are_refused(plan):
    x = np.zeros((4, 3), "float32")
    with pytest.raises(ValueError, match="tokens_in has shape .5, 3.: 5 rows; wanted 4"):
        plan.dispatch_forward(np.zeros((5, 3), "float32"))
    with pytest.raises(TypeError, match="rows_in holds float64"):
        plan.combine_forward(np.zeros((7, 3)))
    with pytest.raises(ValueError, match="rows_out has shape"):
        plan.dispatch_forward(x, np.zeros((6, 3), "float32"))
    with pytest.raises(ValueError, match="entry_weight_grad has shape"):
        short = np.zeros(7, "float32")
        plan.combine_backward(x, np.zeros((7, 3), "float32"), entry_weight_grad=short)
    with pytest.raises(ValueError, match="tokens_out must be given with Rows.ADD"):
        plan.combine_forward(np.zeros((7, 3), "float32"), flags=moe.Rows.ADD)


def test_a_layer_replays_a_plan(make, plan, context):
    layer = make(gate={"num_experts": 3})
    x = np.random.default_rng(0).standard_normal((4, 6)).astype("float32")
    step, other = moe.Pass(layer), moe.Pass(layer)
    layer.forward(step, x, plan=plan)
    assert step.plan.arrays().expert_of_entry.tolist() == IDS.reshape(-1).tolist()
    grad = np.empty(8, "float32")
    layer.backward(step, np.ones((4, 6), "float32"), entry_weight_grad=grad)
    assert grad[5] == 0 and np.abs(grad).sum() > 0
    layer.forward(other, x, plan=step.plan, plan_use="ids")
    assert other.plan.arrays().row_of_entry.tolist() == plan.arrays().row_of_entry.tolist()
    with pytest.raises(moe.InvalidState):
        step.plan.build(IDS, num_experts=3)


def test_a_layer_without_a_gate(context, plan):
    experts = moe.Experts(context, d_model=6, d_hidden=4, num_experts=3, d_out=2)
    layer = moe.Layer(experts=experts)
    layer.init_parameters(1)
    x = array.array("f", [0.5] * 24)
    step = moe.Pass(layer)
    assert memoryview(layer.forward(step, x, plan=plan)).shape == (4, 2)
    with pytest.raises(moe.InvalidArgument):
        layer.forward(step, x)


def test_an_empty_plan_and_an_empty_batch(make, context):
    plan = moe.Plan(context)
    assert plan.tokens == 0 and plan.num_experts == 1
    plan.build(np.zeros((0, 2), "int32"), num_experts=3)
    assert plan.entries == 0 and len(plan.save()) > 0
    layer = make()
    step = moe.Pass(layer)
    y = layer.forward(step, np.zeros((0, 6), "float32"))
    assert y.shape == (0, 6) and step.stats.tokens == 0
    assert layer.backward(step, y).shape == (0, 6)
