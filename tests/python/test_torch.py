"""moe.torch.MoELayer: values and gradients, and everything a training program does with a module."""

import copy
import gc
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import moe  # noqa: E402
from conftest import PACKAGE  # noqa: E402

sys.path.insert(0, str(PACKAGE))
import compare_eager  # noqa: E402
from eager_moe import EagerMoE  # noqa: E402
from moe.torch import MoELayer, loss  # noqa: E402

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


def test_losses_are_differentiable_one_by_one():
    layer, x = small(), numbers(9, 6, grad=True)
    out = layer(x, step=1)
    weight = layer.gate.weight
    load = torch.autograd.grad(loss(out.losses, "load"), weight, retain_graph=True)[0]
    importance = torch.autograd.grad(loss(out.losses, "importance"), weight, retain_graph=True)[0]
    both = torch.autograd.grad(3 * loss(out.losses, "load") + loss(out.losses, "importance"), weight,
                               retain_graph=True)[0]  # fmt: skip
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
    with pytest.raises(TypeError, match="x is torch.bfloat16; the layer's parameters are torch.float32"):
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
    with pytest.raises(TypeError, match="torch.float16"):
        small().half()(x.half())
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


# ---- keeping and moving -------------------------------------------------------------------------


def test_state_dict_deepcopy_and_pickle():
    layer, x = small(), numbers(8, 6, grad=True)
    want = step_of(layer, x)
    fresh = small(seed=99)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    try:
        loaded = torch.load(buffer, weights_only=False)
    except TypeError:  # before weights_only
        buffer.seek(0)
        loaded = torch.load(buffer)
    for twin in (fresh, copy.deepcopy(layer), loaded):
        for a, b in zip(want, step_of(twin, x)):
            assert torch.equal(a, b)
        assert twin.experts.w1.data_ptr() != layer.experts.w1.data_ptr()
    with pytest.raises(RuntimeError, match="size mismatch"):
        small(num_experts=5).load_state_dict(layer.state_dict())


def test_double_and_float():
    layer, x = small(torch.float32), numbers(8, 6, dtype=torch.float32)
    single = layer(x, step=1).y
    double = layer.double()(x.double(), step=1).y
    assert double.dtype == torch.float64
    assert torch.allclose(single.double(), double, atol=1e-5)
    assert torch.equal(layer.float()(x, step=1).y, single)


def test_passes_come_back():
    layer, x = small(), numbers(8, 6)
    engine = layer._engine(torch.float64)
    for step in range(300):
        out = layer(x, step=step)
        if step % 3:
            out.y.sum().backward()  # every third graph dies unused
    del out
    gc.collect()
    assert len(engine.passes) <= 2
    kept = []
    for step in range(20):  # outputs are kept, but their graphs have been freed
        out = layer(x, step=step)
        out.y.sum().backward()
        kept.append(out)
    assert len(engine.passes) + sum(lease.pass_ is not None for lease in engine._leases) <= 3
    alive = [layer(x, step=step).y for step in range(5)]  # these may still be asked
    assert sum(lease.pass_ is not None for lease in engine._leases) >= 5
    sum(y.sum() for y in alive).backward()


def test_threads():
    layer, x = small(), numbers(64, 6)
    want = step_of(layer, x.clone().requires_grad_())
    failed = []

    def work(module):
        try:
            for _ in range(25):
                mine = x.clone().requires_grad_()
                for a, b in zip(want, step_of(module, mine)):
                    assert torch.equal(a, b)
        except BaseException as error:  # noqa: B902 - reported below
            failed.append(error)

    modules = [layer, layer, copy.deepcopy(layer), copy.deepcopy(layer)]
    threads = [threading.Thread(target=work, args=(module,)) for module in modules]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


def test_own_context():
    own = moe.Context(threads=1)
    layer, x = small(context=own), numbers(8, 6, grad=True)
    assert layer.context is own and copy.deepcopy(layer).context is own
    for a, b in zip(step_of(layer, x), step_of(small(), x)):
        assert torch.equal(a, b)  # the same bytes for any number of threads


@pytest.mark.parametrize("arguments", [[], ["--checkpoint"]])
def test_example_trains(arguments):
    done = subprocess.run([sys.executable, str(PACKAGE / "03_torch.py"), *arguments], timeout=300,
                          env={**os.environ, "PYTHONPATH": str(Path(moe.__file__).parents[1])},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and "visits 2 experts" in done.stdout, done.stdout + done.stderr


def test_interpreter_ends_cleanly_with_graphs_alive(script):
    out = script(
        "import torch\nfrom moe.torch import MoELayer\n"
        "layer = MoELayer(8, 8, 4, 2)\n"
        "kept = [layer(torch.randn(5, 8)) for _ in range(3)]\n"
        "kept[0].y.sum().backward()\nprint('end')\n"
    )
    assert out == "end\n"
