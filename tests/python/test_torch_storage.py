"""moe.torch.MoELayer with a packed copy of the weights: what is seen of writes to the tensors."""

import pytest

torch = pytest.importorskip("torch")

from torch_layers import numbers, small, step_of  # noqa: E402


def pair(**more):
    return small(**more), small(storage="prepacked", **more)


def same(plain, packed, x):
    return all(torch.equal(a, b) for a, b in zip(step_of(plain, x), step_of(packed, x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_training_gives_the_same_weights(dtype):
    plain, packed = pair(dtype=dtype, residual={}, shared={})
    x = numbers(8, 6, dtype=dtype)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.002) for layer in (plain, packed)]
    for _ in range(4):
        for layer, optimizer in zip((plain, packed), optimizers):
            optimizer.zero_grad()
            out = layer(x, step=1)
            ((out.y**2).sum() + out.losses.sum()).backward()
            optimizer.step()
    for (name, a), (_, b) in zip(plain.named_parameters(), packed.named_parameters()):
        assert torch.equal(a, b), name


def test_writes_in_place_are_seen():
    plain, packed = pair()
    x = numbers(8, 6, grad=True)
    assert same(plain, packed, x)
    for layer in (plain, packed):
        with torch.no_grad():
            layer.experts.w1.mul_(2)
    assert same(plain, packed, x)
    plain.load_state_dict(small(seed=9).state_dict())
    packed.load_state_dict(small(seed=9).state_dict())
    assert same(plain, packed, x)
    for layer in (plain, packed):
        layer.experts.w2 = torch.nn.Parameter(torch.ones_like(layer.experts.w2))
    assert same(plain, packed, x)


def test_writes_past_torch_must_be_told():
    _, packed = pair()
    x = numbers(8, 6)
    before = packed(x, step=1).y
    packed.experts.w1.detach().numpy()[...] *= 2
    assert torch.equal(packed(x, step=1).y, before)
    packed.weights_changed()
    assert not torch.equal(packed(x, step=1).y, before)


def test_copies_are_made_once_a_change(monkeypatch):
    _, packed = pair()
    x = numbers(8, 6, grad=True)
    engine = packed._engine(torch.float64)
    told = []
    monkeypatch.setattr(engine, "weights_changed", lambda: told.append(1))
    for _ in range(3):
        step_of(packed, x)
    assert len(told) == 1
    with torch.no_grad():
        packed.experts.w1.add_(1)
    step_of(packed, x), step_of(packed, x)
    assert len(told) == 2


def test_panels_are_refused():
    with pytest.raises(ValueError, match="panels"):
        small(storage="panels")
