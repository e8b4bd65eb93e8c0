"""moe.torch.MoELayer: values, gradients, losses, modes, shapes, and what it refuses."""

import copy
import sys

import pytest

torch = pytest.importorskip("torch")

import moe  # noqa: E402
from conftest import PACKAGE  # noqa: E402

sys.path.insert(0, str(PACKAGE))
import compare_eager  # noqa: E402
from eager_moe import EagerMoE  # noqa: E402
from moe.torch import MoELayer, loss  # noqa: E402
from torch_layers import NOISY, numbers, small, step_of  # noqa: E402

# ---- values and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", compare_eager.CONFIGURATIONS)
def test_eager_layer_agrees(name, dtype):
    torch.manual_seed(7)
    error = compare_eager.compare(compare_eager.CONFIGURATIONS[name], 70, dtype)
    assert len(error) >= 5
    for tensor, value in error.items():
        assert value <= compare_eager.TOLERANCE[dtype], (tensor, value)


def test_comparison_finds_an_error(monkeypatch):
    from moe import _torch_engine

    right = _torch_engine.Engine.backward

    def wrong(self, lease, x, gate_x, parameters, dy, *rest):
        right(self, lease, x, gate_x, parameters, dy * 1.0001, *rest)

    monkeypatch.setattr(_torch_engine.Engine, "backward", wrong)
    torch.manual_seed(7)
    error = compare_eager.compare(compare_eager.CONFIGURATIONS["mixtral"], 70, torch.float32)
    assert error["experts.w1"] > 5e-5


GRADCHECK = {
    "noisy": {},
    "switch": dict(gate={"order": "score_then_select", "switch_weight": 0.3, "z_weight": 0.2,
                         "init_std": 0.5}),
    "sigmoid": dict(activation="swiglu", gate={
        "score": "sigmoid", "order": "score_then_select", "renormalize": 1, "bias": 1,
        "sequence_weight": 0.2, "init_std": 0.5}),
    "capacity": dict(activation="gelu_erf", experts={"d_out": 3}, gate={
        "capacity_kind": "number", "capacity": 3, "renormalize_after_drop": 1, "init_std": 0.5}),
    "interleaved": dict(activation="geglu_tanh", experts={
        "bias": 1, "glu_order": "interleaved", "weight_layout": "out_in"}, output="sigmoid"),
    "checkpointed": dict(checkpoint=True),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck(name):
    layer = small(**GRADCHECK[name])
    x = numbers(7, 6, grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, step=3)[:2], (x, *layer.parameters()))


def test_gradcheck_of_host_logits_and_gate_x():
    layer = small(gate={"d_model": 0, "z_weight": 0.3})
    x, logits = numbers(6, 6, grad=True), numbers(6, 4, seed=2, grad=True)
    assert torch.autograd.gradcheck(lambda x, z: layer(x, logits=z)[:2], (x, logits))
    layer = small(gate={"d_model": 3, "init_std": 0.5})
    seen = numbers(6, 3, seed=2, grad=True)
    assert torch.autograd.gradcheck(lambda x, g: layer(x, gate_x=g)[:2], (x, seen))


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_gradcheck_of_host_routing(ids_dtype):
    layer = small(gate=None)
    x, weights = numbers(5, 6, grad=True), numbers(5, 2, seed=2, grad=True)
    ids = torch.tensor([[0, 1], [3, -1], [2, 2], [1, 0], [-1, -1]], dtype=ids_dtype)
    run = lambda x, w, *_: layer(x, ids=ids, weights=w).y  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, weights, *layer.parameters()))
    grad = torch.autograd.grad(run(x, weights).sum(), weights)[0]
    assert grad[1, 1] == 0 and (grad[4] == 0).all() and grad[0, 0] != 0


def test_host_routing_of_any_shape():
    layer = small(gate=None)
    x, ids = numbers(2, 3, 6), torch.tensor([[[0, 1], [3, 2], [1, 1]], [[2, 0], [-1, 3], [0, 2]]])
    weights = numbers(2, 3, 2, seed=2)
    want = layer(x, ids=ids, weights=weights).y
    for i in (0, 1):
        for j in (0, 1, 2):  # one token
            one = layer(x[i, j], ids=ids[i, j], weights=weights[i, j]).y
            assert one.shape == (6,) and torch.equal(one, want[i, j])
    flat = layer(x[0], ids=ids[0, :, 0], weights=weights[0, :, 0]).y  # one expert a token
    assert torch.equal(flat, layer(x[0], ids=ids[0, :, :1], weights=weights[0, :, :1]).y)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    masked = layer(x, ids=ids, weights=weights, mask=mask).y
    assert (masked[0, 2] == 0).all() and torch.equal(masked[mask], want[mask])
    none = layer(x[:0], ids=ids[:0], weights=weights[:0].requires_grad_())
    none.y.sum().backward()
    assert none.y.shape == (0, 3, 6)
    with pytest.raises(ValueError, match="for 6 tokens"):
        layer(x, ids=ids[0, 0], weights=weights[0, 0])


def test_noise_is_the_librarys():
    layer, x = small(num_experts=4, layer_id=3, gate={**NOISY, "seed": 9}), numbers(5, 6)
    rows = [list(moe.noise4(9, layer_id=3, step=7, token=100 + token)) for token in range(5)]
    noise = torch.tensor(rows, dtype=torch.float64)
    assert torch.equal(layer(x, step=7, token_first=100).y, layer(x, noise=noise).y)


def test_losses_are_differentiable_one_by_one():
    layer, x = small(), numbers(9, 6, grad=True)
    out = layer(x, step=1)
    weight = layer.gate.weight
    load = torch.autograd.grad(loss(out.losses, "load"), weight, retain_graph=True)[0]
    importance = torch.autograd.grad(loss(out.losses, "importance"), weight, retain_graph=True)[0]
    sum_of = 3 * loss(out.losses, "load") + loss(out.losses, "importance")
    both = torch.autograd.grad(sum_of, weight, retain_graph=True)[0]
    none = torch.autograd.grad((0 * out.y).sum(), weight)[0]  # losses unused: no gradient of theirs
    assert load.abs().max() > 0 and importance.abs().max() > 0
    assert torch.allclose(both, 3 * load + importance, rtol=1e-10)
    assert (none == 0).all()
    with pytest.raises(ValueError, match="no loss 'weight'"):
        loss(out.losses, "weight")


def test_training_follows_the_eager_layer():
    config = dict(d_model=6, d_hidden=8, num_experts=4, top_k=2, gate=dict(NOISY))
    layer = MoELayer(**config, dtype=torch.float64, seed=3)
    eager, p = EagerMoE(**config), {}
    for name, tensor in layer.named_parameters():
        p[name] = tensor.detach().clone().requires_grad_()
    ours = torch.optim.Adam(layer.parameters(), lr=0.01)
    theirs = torch.optim.Adam(p.values(), lr=0.01)
    curve = []
    for step in range(20):
        x, noise = numbers(24, 6, seed=step), numbers(24, 4, seed=100 + step)
        out, want = layer(x, noise=noise), eager(p, x, noise)
        a = ((out.y - x.sin()) ** 2).mean() + out.losses.sum()
        b = ((want.y - x.sin()) ** 2).mean() + sum(want.losses.values())
        for optimizer, value in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        assert abs(float(a.detach()) - float(b.detach())) < 1e-10
        curve.append(float(a.detach()))
    assert sum(curve[-5:]) < sum(curve[:5])


# ---- a module among modules ---------------------------------------------------------------------


def test_parameters_are_used_where_they_lie():
    layer = small(experts={"bias": 0})
    names = [name for name, _ in layer.named_parameters()]
    assert names == ["gate.weight", "gate.noise_weight", "experts.w1", "experts.w2"]
    bound = layer._engine(torch.float64).layer.parameters
    x = numbers(5, 6)
    before = layer(x, step=1).y
    for name, tensor in layer.named_parameters():
        assert bound[name].record.data == tensor.data_ptr()
    with torch.no_grad():
        layer.experts.w2.mul_(2)  # changed in place: seen in the next call
    assert torch.equal(layer(x, step=1).y, 2 * before)
    with torch.no_grad():  # strides of its own
        wide = torch.empty(4, 6, 10, dtype=torch.float64)[:, :, ::2]
        wide.copy_(layer.experts.w1)
        layer.experts.w1.data = wide
    assert not layer.experts.w1.is_contiguous()
    assert torch.equal(layer(x, step=1).y, 2 * before)
    assert bound["experts.w1"].record.data_stride[2] == 2


def test_first_values_are_the_librarys():
    layer = MoELayer(6, 5, 4, 2, gate={"init_std": 0.3}, experts={"bias": 1}, seed=11)
    owner = moe.Layer(
        moe.Gate(layer.context, d_model=6, num_experts=4, top_k=2, init_std=0.3),
        moe.Experts(layer.context, d_model=6, d_hidden=5, num_experts=4, bias=1),
    )
    owner.init_parameters(11)
    for name, tensor in layer.named_parameters():
        there = memoryview(owner.parameters[name].data).cast("B").tobytes()
        assert tensor.detach().numpy().tobytes() == there
    layer.reset_parameters(12)
    assert not torch.equal(layer.experts.w1, MoELayer(6, 5, 4, 2, seed=11).experts.w1)


def test_grad_none_accumulation_and_freezing():
    layer, x = small(), numbers(8, 6)
    assert all(p.grad is None for p in layer.parameters())
    layer(x, step=1).y.sum().backward()
    once = [p.grad.clone() for p in layer.parameters()]
    layer(x, step=1).y.sum().backward()
    for p, first in zip(layer.parameters(), once):
        assert torch.equal(p.grad, first + first)
    layer.zero_grad(set_to_none=True)
    layer.experts.w1.requires_grad_(False)
    layer.gate.requires_grad_(False)
    layer(x, step=1).y.sum().backward()
    assert layer.experts.w1.grad is None and layer.gate.weight.grad is None
    assert torch.equal(layer.experts.w2.grad, dict(zip(layer._names, once))["experts.w2"])
    bound = layer._engine(torch.float64).layer.parameters
    assert not bound["experts.w1"].record.grad  # not wanted: not computed


def test_micro_batches_equal_one_batch():
    layer, x = small(gate={"kind": "noisy_top_k", "init_std": 0.5}), numbers(12, 6)
    whole = layer(x, step=5)
    parts = [layer(x[i : i + 4], step=5, token_first=i) for i in (0, 4, 8)]
    assert torch.equal(whole.y, torch.cat([part.y for part in parts]))
    sum(part.y.pow(2).sum() for part in reversed(parts)).backward()  # three passes in flight
    split = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad(set_to_none=True)
    whole.y.pow(2).sum().backward()
    for p, other in zip(layer.parameters(), split):
        assert torch.allclose(p.grad, other, rtol=1e-12, atol=1e-14)


def test_several_layers_in_flight():
    first, second = small(seed=1), small(seed=2, layer_id=1)
    x = numbers(3, 4, 6, grad=True)
    assert torch.autograd.gradcheck(lambda x: second(first(x, step=1).y.tanh(), step=1).y, (x,))


def test_backward_twice_and_retain_graph():
    layer, x = small(), numbers(5, 6, grad=True)
    value = layer(x, step=1).y.sum()
    first = torch.autograd.grad(value, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(value, x)[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, x)


def test_double_backward_is_refused():
    layer, x = small(), numbers(5, 6, grad=True)
    grad = torch.autograd.grad((layer(x, step=1).y ** 2).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_changes_in_place_are_found():
    layer, x = small(), numbers(5, 6, grad=True)
    moved = x * 1
    value = layer(moved, step=1).y.sum()
    moved.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    value = layer(x, step=1).y.sum()
    with torch.no_grad():
        layer.experts.w1.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_saved_tensors_may_be_packed_elsewhere():
    layer = small(gate={"d_model": 3, "init_std": 0.5})
    wide, seen = numbers(7, 12), numbers(7, 5, seed=2)

    def run():
        layer.zero_grad(set_to_none=True)
        out = layer(wide[:, :6], gate_x=seen[:, :3], step=1)  # rows apart; what is packed is not
        out.y.pow(2).sum().backward()
        return [p.grad for p in layer.parameters()]

    want = run()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), torch.from_numpy):
        got = run()
    for a, b in zip(want, got):
        assert torch.equal(a, b)


def test_loss_scale_is_exact():
    layer, x = small(torch.float32), numbers(9, 6, dtype=torch.float32, grad=True)
    plain = step_of(layer, x)
    out = layer(x, step=4)
    scaled = torch.autograd.grad(
        65536 * ((out.y**2).sum() + out.losses.sum()), [x, *layer.parameters()]
    )
    for a, b in zip(plain, scaled):
        assert torch.equal(a * 65536, b)


@pytest.mark.skipif(not hasattr(torch, "amp") or not hasattr(torch.amp, "GradScaler"),
                    reason="no GradScaler for CPU in this PyTorch")  # fmt: skip
def test_grad_scaler():
    layer, x = small(torch.float32), numbers(9, 6, dtype=torch.float32)
    twin = copy.deepcopy(layer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for module, scale in ((layer, True), (twin, False)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        out = module(x, step=1)
        value = out.y.pow(2).sum() + out.losses.sum()
        if scale:
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            value.backward()
            optimizer.step()
    for a, b in zip(layer.parameters(), twin.parameters()):
        assert torch.equal(a, b)


def test_autocast_computes_in_the_parameters_dtype():
    layer, x = small(torch.float32), numbers(9, 6, dtype=torch.float32)
    with pytest.raises(TypeError, match="x is torch.bfloat16; .* are torch.float32"):
        layer(x.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x.bfloat16(), step=1)
    assert out.y.dtype == torch.float32
    assert torch.equal(out.y, layer(x.bfloat16().float(), step=1).y)
    out.y.sum().backward()
    assert layer.experts.w1.grad.dtype == torch.float32


# ---- modes --------------------------------------------------------------------------------------


def test_train_and_eval():
    layer, x = small(), numbers(64, 6)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    assert not torch.equal(first.y, second.y)  # other noise in each call
    torch.manual_seed(1)
    assert torch.equal(first.y, layer(x).y)  # and the same again from the same seed
    layer.eval()
    state = torch.get_rng_state()
    assert torch.equal(layer(x).y, layer(x).y)
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        out = layer(x)
    assert not out.y.requires_grad and out.y.grad_fn is None
    with torch.inference_mode():
        assert torch.equal(layer(x).y, out.y)


def test_shapes_padding_and_nothing_at_all():
    layer, x = small(), numbers(2, 3, 4, 6)
    assert layer(x, step=1).y.shape == (2, 3, 4, 6)
    assert layer(x[0, 0, 0], step=1).y.shape == (6,)
    empty = layer(x[:0], step=1)
    (empty.y.sum() + empty.losses.sum()).backward()
    assert empty.y.shape == (0, 3, 4, 6) and (layer.experts.w1.grad == 0).all()
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[1, 2] = False
    out = layer(x, step=1, mask=mask)
    assert (out.y[1, 2] == 0).all() and out.stats[moe.Stat.TOKENS] == 20
    rows = numbers(5, 12)[:, :6]  # rows apart from each other
    assert torch.equal(layer(rows, step=1).y, layer(rows.contiguous(), step=1).y)
    columns = numbers(6, 5).t()  # elements apart from each other
    assert torch.equal(layer(columns, step=1).y, layer(columns.contiguous(), step=1).y)
    wide = numbers(1, 6).expand(5, 6)
    assert torch.equal(layer(wide, step=1).y, layer(wide.contiguous(), step=1).y)


def test_groups_and_capacity_of_a_call():
    layer, x = small(), numbers(12, 6)
    out = layer(x, step=1, group_begin=torch.tensor([0, 6, 12]), capacity=1)
    assert out.stats[moe.Stat.ROWS] <= 8 and out.stats[moe.Stat.DROPPED] >= 16
    assert layer(x, step=1, top_k=1).stats[moe.Stat.ENTRIES] == 12


def test_nonsense_is_refused():
    layer, x = small(), numbers(5, 6)
    with pytest.raises(ValueError, match=r"x has shape \(5, 5\); wanted \(5, 6\)"):
        layer(x[:, :5])
    with pytest.raises(TypeError, match="x is torch.float32"):
        layer(x.float())
    with pytest.raises(ValueError, match="mask has 4 elements; there are 5 tokens"):
        layer(x, mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask is torch.int64"):
        layer(x, mask=torch.ones(5, dtype=torch.int64))
    with pytest.raises(TypeError, match="ids and weights go together"):
        layer(x, ids=torch.zeros(5, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="expert id 9"):
        layer(x, ids=torch.full((5, 2), 9), weights=numbers(5, 2))
    with pytest.raises(ValueError, match="group_begin"):
        layer(x, group_begin=torch.tensor([0, 7, 5]))
    with pytest.raises(ValueError, match="x is on meta"):
        layer(x.to("meta"))
    with pytest.raises(ValueError, match=r"experts.w2 has shape \(3, 5, 6\); wanted \(4, 5, 6\)"):
        changed = small()
        changed.experts.w2.data = numbers(3, 5, 6)
        changed(x)
    with pytest.raises(ValueError, match="elements would share a place"):
        changed.experts.w2.data = numbers(5, 6).expand(4, 5, 6)
        changed(x)
    with pytest.raises(TypeError, match="torch.int32"):
        small(dtype=torch.int32)
    with pytest.raises(TypeError, match="torch.float64; the layer's parameters are torch.float16"):
        small().half()(x)
    with pytest.raises(TypeError, match="top_kk"):
        small(gate={"top_kk": 2})
    with pytest.raises(TypeError, match="dtype is not a field"):
        small(experts={"dtype": "float32"})
    with pytest.raises(ValueError, match="top_k is 9"):
        small(top_k=9)
    assert layer(x, step=1).y.shape == (5, 6)  # nothing is broken by any of it


def test_plans_are_kept_and_replayed():
    layer, x = small(), numbers(8, 6)
    out = layer(x, step=1, keep_plan=True)
    assert out.plan.tokens == 8
    with torch.no_grad():
        layer.gate.weight.mul_(-1)
    other = layer(x, step=1, plan=out.plan, keep_plan=True)
    assert other.plan.save() != out.plan.save()  # weights are anew
    before = out.plan.arrays().expert_of_entry
    assert list(other.plan.arrays().expert_of_entry) == list(before)  # experts are not


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_of_16_bits_is_near_one_of_float32(dtype):
    ulp = torch.finfo(dtype).eps / 2
    half, wide = small(dtype=dtype), small(dtype=torch.float32)
    half.reset_parameters(4)
    for to, value in zip(wide.tensors(), half.tensors()):
        to.data.copy_(value.float())
    x = numbers(9, 6, dtype=dtype)
    out, want = half(x, step=4), wide(x.float(), step=4)
    assert out.y.dtype == dtype and out.losses.dtype == torch.float32
    assert torch.equal(out.losses, want.losses)
    (out.y.float() ** 2).sum().backward()
    (want.y**2).sum().backward()
    pairs = [(out.y, want.y)] + [(a.grad, b.grad) for a, b in zip(half.parameters(),
                                                                 wide.parameters())]  # fmt: skip
    for got, expected in pairs:
        assert got.dtype == dtype
        assert (got.float() - expected).norm() <= 16 * ulp * expected.norm() + 1e-6


def test_a_gate_may_be_float32_in_a_layer_of_16_bits():
    layer = small(dtype=torch.bfloat16, gate={"selection_bias": 1})
    assert layer.gate.selection_bias.dtype == torch.float32
    x = numbers(9, 6, dtype=torch.bfloat16)
    y = layer(x).y
    layer.gate.float()
    assert torch.equal(layer(x).y, y)
    layer(x).y.sum().backward()
    assert layer.gate.weight.grad.dtype == torch.float32
    layer.experts.float()
    with pytest.raises(TypeError, match="x is torch.bfloat16"):
        layer(x)
