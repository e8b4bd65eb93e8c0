"""moe.torch.MoELayer with a preset, shared experts, a residual branch, buffers and keys."""

import copy

import pytest

torch = pytest.importorskip("torch")

import moe  # noqa: E402
from torch_layers import MoELayer, numbers, small, step_of  # noqa: E402

T, D, E = 9, 6, 4
PLAIN = {"init_std": 0.5}
BIASED = {"init_std": 0.5, "selection_bias": 1, "order": "score_then_select", "score": "sigmoid"}


def relu_network(part, x):
    return torch.relu(x @ part.w1[0]) @ part.w2[0]


def surrounded(**more):
    return small(gate=PLAIN, experts={}, activation="relu", **more)


def test_shared_experts_are_a_module_with_its_own_width():
    layer = surrounded(shared={"d_hidden": 7}, layer={"shared_gate": 1})
    names = set(dict(layer.named_parameters()))
    assert names == {"gate.weight", "experts.w1", "experts.w2", "shared.w1", "shared.w2",
                     "shared_gate"}  # fmt: skip
    assert layer.shared.w1.shape == (1, D, 7) and not layer.shared_gate.any()  # begins at 0
    with torch.no_grad():
        layer.shared_gate.copy_(numbers(D))
    bare = surrounded()
    bare.load_state_dict(
        {name: t for name, t in layer.state_dict().items() if "shared" not in name}
    )
    x = numbers(T, D, grad=True)
    want = bare(x).y + torch.sigmoid(x @ layer.shared_gate)[:, None] * relu_network(layer.shared, x)
    got = layer(x).y
    assert torch.allclose(got, want, rtol=1e-12)
    shared = [layer.shared.w1, layer.shared.w2, layer.shared_gate, x]
    dy = numbers(T, D, seed=4)
    for a, b in zip(torch.autograd.grad(got, shared, dy), torch.autograd.grad(want, shared, dy)):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_a_residual_branch_with_a_learned_mix():
    layer = surrounded(residual={}, layer={"residual_mix": 1})
    with torch.no_grad():
        layer.residual_mix_bias.copy_(torch.tensor([0.5, -0.25]))
    assert layer.residual_mix.shape == (D, 2) and layer.residual.w1.shape == (1, D, 5)
    bare = surrounded()
    bare.load_state_dict(
        {name: t for name, t in layer.state_dict().items() if "residual" not in name}
    )
    x = numbers(T, D, grad=True)
    c = torch.softmax(x @ layer.residual_mix + layer.residual_mix_bias, -1)
    want = c[:, :1] * bare(x).y + c[:, 1:] * relu_network(layer.residual, x)
    got = layer(x).y
    assert torch.allclose(got, want, rtol=1e-12)
    own = [layer.residual_mix, layer.residual_mix_bias, layer.residual.w2, x]
    for a, b in zip(torch.autograd.grad(got.sum(), own), torch.autograd.grad(want.sum(), own)):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_gradcheck_through_everything_around_the_experts():
    layer = surrounded(shared={"d_hidden": 3}, residual={"d_hidden": 2},
                       layer={"shared_gate": 1, "residual_mix": 1})  # fmt: skip
    x = numbers(4, D, grad=True)
    names, values = zip(*((n, p.detach().requires_grad_()) for n, p in layer.named_parameters()))

    def run(x, *parameters):
        for name, value in zip(names, parameters):
            part, _, own = name.rpartition(".")
            owner = getattr(layer, part) if part else layer
            owner._parameters[own] = value
        return layer(x).y

    assert torch.autograd.gradcheck(run, (x, *values))


def test_a_selection_bias_is_a_buffer_that_balances():
    layer = small(gate=BIASED)
    bias = layer.gate.selection_bias
    assert "gate.selection_bias" in dict(layer.named_buffers())
    assert "gate.selection_bias" not in dict(layer.named_parameters())
    assert "gate.selection_bias" in layer.state_dict() and not bias.any()
    x = numbers(40, D, grad=True)
    out = layer(x, keep_plan=True)
    (out.y.sum() + out.losses.sum()).backward()
    assert layer.gate.weight.grad is not None and bias.grad is None
    counts = torch.bincount(torch.as_tensor(out.plan.arrays().expert_of_entry).long(), minlength=E)
    want = 0.5 * torch.sign(counts.double().mean() - counts)
    layer.update_selection_bias(out.plan, rate=0.5)
    assert torch.equal(bias, want)
    layer.update_selection_bias(counts, rate=0.5)
    assert torch.equal(bias, 2 * want)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x).y, layer(x).y)
    assert layer.float().gate.selection_bias.dtype == torch.float32
    layer.update_selection_bias(counts, rate=0.5)
    with pytest.raises(moe.InvalidState, match="selection_bias"):
        small().update_selection_bias(counts)


def test_selection_bias_evens_out_the_load():
    layer = small(gate=BIASED)
    x = numbers(400, D) + 1  # all tokens alike to a degree, so that some experts are preferred
    first = layer(x).stats[moe.Stat.MAX_OVER_MEAN]
    assert first > 1.2
    for _ in range(300):
        layer.update_selection_bias(layer(x, keep_plan=True).plan, rate=0.002)
    assert layer(x).stats[moe.Stat.MAX_OVER_MEAN] < 0.5 * (first - 1) + 1


def test_a_preset_and_what_is_set_beside_it():
    layer = MoELayer(D, 5, E, preset="mixtral", dtype=torch.float64)
    gate = layer._engine(torch.float64).layer.gate
    assert gate.config.top_k == 2 and gate.config.order == moe.Order.SELECT_THEN_SCORE
    assert set(dict(layer.named_parameters())) == {
        "gate.weight", "experts.w1", "experts.w3", "experts.w2"}  # fmt: skip
    other = MoELayer(D, 5, E, 1, preset="qwen3", gate={"renormalize": 0}, dtype=torch.float64)
    config = other._engine(torch.float64).layer.gate.config
    assert config.top_k == 1 and config.renormalize == 0
    x = numbers(T, D, grad=True)
    for gradient in step_of(layer, x):
        assert gradient.isfinite().all() and gradient.any()
    with pytest.raises(moe.InvalidArgument, match="nonesuch"):
        MoELayer(D, 5, E, preset="nonesuch")


def test_a_hash_gate_takes_keys():
    layer = small(gate={"kind": "hash", "init_std": 0.5})
    key = torch.tensor([3, 8, 3, 8, 3, 1])
    out = layer(numbers(6, D), token_key=key, keep_plan=True)
    ids = torch.as_tensor(out.plan.arrays().expert_of_entry).reshape(6, 2)
    assert torch.equal(ids[0], ids[2]) and torch.equal(ids[1], ids[3])
    with pytest.raises(TypeError, match="token_key is torch.int32"):
        layer(numbers(6, D), token_key=key.int())
    with pytest.raises(ValueError, match="token_key has 5 elements; there are 6 tokens"):
        layer(numbers(6, D), token_key=key[:5])


def test_a_hierarchical_gate_takes_noise_for_both_of_its_levels():
    layer = small(top_k=1, gate={"kind": "hierarchical", "expert_groups": 2, "top_groups": 1,
                                 "init_std": 0.5})  # fmt: skip
    x = numbers(T, D)
    noise, primary = numbers(T, E, seed=5), numbers(T, 2, seed=6)
    first = layer(x, noise=noise, noise_primary=primary, step=1).y
    assert torch.equal(layer(x, noise=noise, noise_primary=primary, step=2).y, first)
    assert not torch.equal(layer(x, step=1).y, layer(x, step=2).y)
    torch.manual_seed(1)
    drawn = layer(x).y
    torch.manual_seed(1)
    assert torch.equal(layer(x).y, drawn)


@pytest.mark.parametrize("gate", [
    {"kind": "noisy_top_k"}, {"choice_noise": "gumbel"}, {"jitter": 0.2},
    {"capacity_kind": "number", "capacity": 2, "drop_policy": "random"},
    {"second_choice": "random", "second_threshold": 0.9, "order": "score_then_select"},
])  # fmt: skip
def test_each_kind_of_noise_comes_from_the_generator(gate):
    layer = small(gate={**PLAIN, **gate})
    with torch.no_grad():
        for p in layer.gate.parameters():
            p.copy_(numbers(*p.shape))
    x = numbers(64, D)
    torch.manual_seed(1)
    first, second = layer(x).y, layer(x).y
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(layer(x).y, first)
    layer.eval()
    assert torch.equal(layer(x).y, layer(x).y)


def test_fields_that_the_tensors_say_are_refused():
    for name in ("shared", "residual", "layer"):
        with pytest.raises(TypeError, match="parameters is not a field to give"):
            small(**{name: {"parameters": "bound"}})
