"""Activation checkpointing: the recompute takes the routing of the first run, whatever it would
choose by itself, and gradients are those of the plain run to the last bit."""

import sys

import pytest

torch = pytest.importorskip("torch")

import moe  # noqa: E402
from conftest import PACKAGE  # noqa: E402

sys.path.insert(0, str(PACKAGE))
from moe.torch import MoELayer, checkpoint  # noqa: E402
from torch.utils.checkpoint import checkpoint as torch_checkpoint  # noqa: E402

REENTRANT = pytest.mark.parametrize("use_reentrant", [False, True])


class Block(torch.nn.Module):
    """Two MoE layers with residuals."""

    def __init__(self, **more):
        super().__init__()
        arguments = dict(d_model=8, d_hidden=16, num_experts=6, top_k=2, gate={
            "kind": "noisy_top_k", "importance_weight": 0.1, "load_weight": 0.1, "init_std": 0.5,
        }, dtype=torch.float64)  # fmt: skip
        arguments.update(more)
        self.first = MoELayer(**arguments, seed=1)
        self.second = MoELayer(**arguments, seed=2, layer_id=1)

    def forward(self, x):
        a = self.first(x)
        b = self.second(x + a.y)
        return x + a.y + b.y, a.losses.sum() + b.losses.sum()


def inputs():
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.requires_grad_()


def gradients(block, x, run):
    torch.manual_seed(5)
    y, losses = run(block, x)
    return [y, losses, *torch.autograd.grad((y**2).sum() + losses, [x, *block.parameters()])]


def same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b):
        assert torch.equal(one, other)


@REENTRANT
def test_checkpoint_gives_the_same_bytes(use_reentrant):
    block, x = Block(), inputs()
    want = gradients(block, x, lambda block, x: block(x))
    if use_reentrant:  # has no autograd.grad
        torch.manual_seed(5)
        y, losses = checkpoint(block, x, use_reentrant=True)
        ((y**2).sum() + losses).backward()
        got = [y, losses, x.grad, *(p.grad for p in block.parameters())]
    else:
        got = gradients(block, x, lambda block, x: checkpoint(block, x))
    same(want, got)


def test_module_that_checkpoints_itself():
    x = inputs()
    want = gradients(Block(), x, lambda block, x: block(x))
    same(want, gradients(Block(checkpoint=True), x, lambda block, x: block(x)))


@REENTRANT
def test_plain_torch_checkpoint_draws_the_same_noise(use_reentrant):
    block, x = Block(), inputs()
    want = gradients(block, x, lambda block, x: block(x))
    torch.manual_seed(5)
    y, losses = torch_checkpoint(block, x, use_reentrant=use_reentrant)
    ((y**2).sum() + losses).backward()
    same(want, [y, losses, x.grad, *(p.grad for p in block.parameters())])


@REENTRANT
def test_recompute_never_routes_anew(use_reentrant):
    """x is another one in the second run: by itself the gate would choose other experts."""
    layer = MoELayer(8, 16, 6, 1, gate={"init_std": 1.0}, dtype=torch.float64)
    x, plans, flip = inputs(), [], [1.0]

    def run(x):
        out = layer(x * flip[0], keep_plan=True)
        plans.append([int(e) for e in out.plan.arrays().expert_of_entry])
        flip[0] = -1.0
        return out.y**2  # saved after the plan was noted, so that the second run gets that far

    y = checkpoint(run, x, use_reentrant=use_reentrant)
    y.sum().backward()
    assert len(plans) == 2 and plans[0] == plans[1]
    free = layer(-x, keep_plan=True).plan.arrays().expert_of_entry
    assert [int(e) for e in free] != plans[0]


@REENTRANT
def test_losses_are_those_of_the_first_run(use_reentrant):
    layer = MoELayer(8, 16, 6, 2, gate={"switch_weight": 1.0, "init_std": 1.0}, dtype=torch.float64)
    seen, x = [], inputs()

    def run(x):
        out = layer(x)
        seen.append(out.losses.detach().clone())
        return out.y**2, out.losses

    y, losses = checkpoint(run, x, use_reentrant=use_reentrant)
    (y.sum() + losses.sum()).backward()
    assert len(seen) == 2 and torch.equal(seen[0], seen[1]) and seen[0][moe.Loss.SWITCH] > 0


def test_checkpoint_keeps_less():
    """Between forward and backward a checkpointed layer holds the routing, not the activations."""
    x = torch.randn(512, 64, requires_grad=True)
    held = {}
    for name in ("plain", "itself", "function"):
        layer = MoELayer(64, 1024, 4, 2, checkpoint=name == "itself")
        run = lambda x: layer(x).y  # noqa: B023, E731 - used in this round only
        y = checkpoint(run, x) if name == "function" else run(x)
        engine = layer._engine(torch.float32)
        held[name] = sum(lease.pass_.bytes for lease in engine._leases if lease.pass_ is not None)
        y.sum().backward()
        assert name == "plain" or not engine.passes  # nor is memory kept for others
    assert held["itself"] < held["plain"] / 50 and held["function"] < held["plain"] / 50
    assert held["plain"] > 512 * 2 * 1024 * 4


@pytest.mark.parametrize("name", ["itself", "function", "reentrant"])
def test_backward_lets_activations_go(name):
    """A loss holds the whole graph while its backward runs: what one layer has computed anew must
    be gone before the next one does so, or nothing is saved where memory is needed most."""
    x, held = torch.randn(512, 64, requires_grad=True), []
    layers = [MoELayer(64, 1024, 4, 2, checkpoint=name == "itself", seed=i) for i in range(4)]

    def measure(_):
        leases = [lease for layer in layers for lease in layer._engine(torch.float32)._leases]
        held.append(sum(lease.pass_.bytes for lease in leases if lease.pass_ is not None))

    y = x
    for layer in layers:
        run = lambda x, layer=layer: layer(x).y  # noqa: E731
        y = run(y) if name == "itself" else checkpoint(run, y, use_reentrant=name == "reentrant")
        y.register_hook(measure)
    y.sum().backward()
    measure(None)
    hidden = 512 * 2 * 1024 * 4  # bytes of one layer
    assert len(held) == 5 and max(held) < hidden / 10
    assert all(p.grad is not None for layer in layers for p in layer.parameters())


@REENTRANT
def test_layers_without_gradients_in_a_checkpoint(use_reentrant):
    """A teacher inside a checkpointed function: replayed as the rest, and nothing of it is kept."""
    teacher, pupil, seen = MoELayer(64, 1024, 4, 2, seed=1), MoELayer(64, 64, 4, 2, seed=2), []

    def run(x):
        with torch.no_grad():
            wanted = teacher(x, keep_plan=True)
        seen.append((wanted.y.clone(), wanted.plan.save()))
        return (pupil(x).y - wanted.y) ** 2

    value = checkpoint(run, torch.randn(64, 64, requires_grad=True), use_reentrant=use_reentrant)
    value.sum().backward()
    assert len(seen) == 2 and torch.equal(seen[0][0], seen[1][0]) and seen[0][1] == seen[1][1]
    assert all(p.grad is None for p in teacher.parameters())
    leases = teacher._engine(torch.float32)._leases
    assert sum(lease.pass_.bytes for lease in leases if lease.pass_ is not None) < 64 * 2 * 1024


@pytest.mark.parametrize("arguments", [
    {}, {"top_k": 1}, {"capacity": 3}, {"mask": torch.arange(32) % 5 > 0},
    {"group_begin": torch.tensor([0, 10, 32]), "capacity": 2},
], ids=["plain", "top_k", "capacity", "mask", "groups"])  # fmt: skip
def test_second_backward_after_activations_are_gone(arguments):
    """The third way to compute activations: on a new pass, with the routing kept as a plan."""
    config = dict(d_model=8, d_hidden=16, num_experts=6, top_k=2, dtype=torch.float64, gate={
        "kind": "noisy_top_k", "importance_weight": 0.1, "load_weight": 0.1, "z_weight": 0.1,
        "renormalize_after_drop": 1, "init_std": 0.5})  # fmt: skip
    grads = []
    for own in (False, True):
        layer, x = MoELayer(**config, checkpoint=own, output="sigmoid"), inputs()
        out = layer(x, step=3, **arguments)
        value, wanted = (out.y**2).sum() + out.losses.sum(), [x, *layer.parameters()]
        grads += [torch.autograd.grad(value, wanted, retain_graph=True) for _ in range(2)]
    for other in grads[1:]:
        same(grads[0], other)


def test_second_backward_with_the_programs_routing():
    x, grads = inputs(), []
    ids = torch.tensor([[e % 6, (e + 2) % 6] for e in range(32)])
    weights = torch.rand(32, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights.requires_grad_()
    for own in (False, True):
        layer = MoELayer(8, 16, 6, 2, gate=None, dtype=torch.float64, checkpoint=own)
        value = (layer(x, ids=ids, weights=weights).y ** 2).sum()
        wanted = [x, weights, *layer.parameters()]
        grads += [torch.autograd.grad(value, wanted, retain_graph=True) for _ in range(2)]
    for other in grads[1:]:
        same(grads[0], other)


@REENTRANT
def test_a_checkpoint_in_a_checkpoint_never_routes_anew(use_reentrant):
    layer = MoELayer(8, 16, 6, 1, gate={"init_std": 1.0}, dtype=torch.float64)
    plans, flip = [], [1.0]

    def inner(x):
        out = layer(x * flip[0], keep_plan=True)
        plans.append(list(out.plan.arrays().expert_of_entry))
        flip[0] = -1.0
        return out.y**2

    def outer(x):
        return checkpoint(inner, x, use_reentrant=use_reentrant) ** 2

    checkpoint(outer, inputs(), use_reentrant=use_reentrant).sum().backward()
    assert len(plans) >= 2 and all(list(plan) == list(plans[0]) for plan in plans)


@REENTRANT
def test_checkpoint_with_retained_graph(use_reentrant):
    block, x = Block(), inputs()
    torch.manual_seed(5)
    y, losses = checkpoint(block, x, use_reentrant=use_reentrant)
    value = (y**2).sum() + losses
    value.backward(retain_graph=True)
    first = [p.grad.clone() for p in block.parameters()]
    for _ in range(3):  # other work meanwhile must not take the passes away
        block(x)[0].sum().backward()
    block.zero_grad(set_to_none=True)
    value.backward()
    same(first, [p.grad for p in block.parameters()])


def test_checkpoint_without_gradients_just_runs():
    block, x = Block(), inputs()
    with torch.no_grad():
        torch.manual_seed(5)
        y, _ = checkpoint(block, x)
        torch.manual_seed(5)
        assert torch.equal(y, block(x)[0])
    engine = block.first._engine(torch.float64)
    assert len(engine.passes) == 1


def test_other_order_in_the_recompute_is_refused():
    block, x, order = Block(), inputs(), [0]

    def run(x):
        layers = (block.first, block.second)
        order[0] += 1
        for layer in layers if order[0] == 1 else reversed(layers):
            x = x + layer(x).y
        return x

    y = checkpoint(run, x)
    with pytest.raises(RuntimeError, match="another order"):
        y.sum().backward()
