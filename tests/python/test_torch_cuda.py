"""moe.torch on a GPU: against the same layer on the CPU, streams, 16 bits, graphs."""

import copy

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no GPU", allow_module_level=True)

import moe  # noqa: E402
from moe.torch import MoELayer, checkpoint  # noqa: E402

try:
    moe.load_cuda()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

T, D, F, E, K = 96, 32, 48, 8, 2


def small(**fields):
    fields.setdefault("gate", {"init_std": 0.5, "switch_weight": 0.1})
    return MoELayer(D, F, E, K, activation="swiglu", **{"experts": {"bias": 1}, **fields})


def numbers(seed, *shape, **where):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(**where)


def step(layer, x, dy):
    """Output, loss, and the gradients of x and of all parameters."""
    x = x.detach().requires_grad_()
    out = layer(x)
    ((out.y * dy).sum() + out.losses.sum()).backward()
    grads = [p.grad for p in layer.parameters()]
    layer.zero_grad(set_to_none=True)
    return [out.y.detach(), out.losses.detach(), x.grad, *grads]


def close(there, here, tolerance):
    for a, b in zip(there, here):
        assert a.is_cuda and a.dtype == b.dtype
        assert torch.allclose(a.cpu().float(), b.float(), atol=tolerance, rtol=tolerance)


def test_a_step_is_that_of_the_cpu():
    here = small()
    there = copy.deepcopy(here).cuda()
    x, dy = numbers(1, T, D), numbers(2, T, D)
    close(step(there, x.cuda(), dy.cuda()), step(here, x, dy), 1e-4)
    assert there.context.device == torch.cuda.current_device()
    assert all(p.is_cuda for p in there.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bits_have_the_dtype_of_their_parameters(dtype):
    here = small(dtype=dtype)
    there = copy.deepcopy(here).cuda()
    x, dy = numbers(1, T, D, dtype=dtype), numbers(2, T, D, dtype=dtype)
    close(step(there, x.cuda(), dy.cuda()), step(here, x, dy), 0.1)


def test_calls_are_on_the_current_stream():
    layer = small(device="cuda")
    x, dy = numbers(1, T, D, device="cuda"), numbers(2, T, D, device="cuda")
    wanted = step(layer, x, dy)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # what is read is written behind this
        late = torch.empty_like(x).copy_(x)
        found = step(layer, late, dy)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_a_step_without_inference_memory_goes_through_the_caching_allocator():
    layer = small(device="cuda")
    x = numbers(1, T, D, device="cuda")
    before = torch.cuda.memory_allocated()
    layer(x)
    assert torch.cuda.memory_allocated() > before


@pytest.mark.parametrize("whole", [False, True])
def test_checkpoints_give_the_same_gradients(whole):
    plain = small(device="cuda")
    kept = small(device="cuda", checkpoint=not whole)
    x, dy = numbers(1, T, D, device="cuda"), numbers(2, T, D, device="cuda")
    call = (lambda x: checkpoint(lambda x: kept(x), x)) if whole else kept
    wanted = step(plain, x, dy)
    leaf = x.detach().requires_grad_()
    out = call(leaf)
    ((out.y * dy).sum() + out.losses.sum()).backward()
    assert torch.equal(out.y, wanted[0]) and torch.equal(leaf.grad, wanted[2])


def test_the_programs_own_routing():
    layer = small(device="cuda", gate=None)
    here = small(gate=None)
    x = numbers(1, T, D)
    ids = torch.randint(E, (T, K), generator=torch.Generator().manual_seed(3))
    weights = numbers(4, T, K).abs()
    there = layer(x.cuda(), ids=ids.cuda(), weights=weights.cuda().requires_grad_())
    assert torch.allclose(there.y.cpu(), here(x, ids=ids, weights=weights).y, atol=1e-4)
    there.y.sum().backward()


def test_tensors_must_be_on_the_layers_device():
    layer = small(device="cuda")
    x = numbers(1, T, D)
    with pytest.raises(ValueError, match="x is on cpu; the layer's parameters are on cuda:0"):
        layer(x)
    layer.gate.cpu()
    with pytest.raises(ValueError, match="is on cuda:0; the layer's parameters are on cpu"):
        layer(x)
    with pytest.raises(ValueError, match="the parameters are on cuda:0; the context is"):
        small(device="cuda", context=moe.Context())
    with pytest.raises(moe.NotSupported):
        small(device="cuda", dtype=torch.float64)


def test_the_selection_bias_moves_as_on_the_cpu():
    gate = {"init_std": 0.5, "selection_bias": 1}
    here, x = small(gate=gate), numbers(1, T, D)
    there = copy.deepcopy(here).cuda()
    here.update_selection_bias(here(x, keep_plan=True).plan, 0.1)
    there.update_selection_bias(there(x.cuda(), keep_plan=True).plan, 0.1)
    assert torch.equal(there.gate.selection_bias.cpu(), here.gate.selection_bias)


def padded():
    room = T  # no expert has more rows
    gate = {"init_std": 0.5, "switch_weight": 0.1, "capacity_kind": "number", "capacity": room}
    layer = {"exchange": "padded", "padded_rows": room}
    return small(device="cuda", gate=gate, layer=layer)


def test_a_padded_step_is_captured_and_replayed():
    layer = padded()
    x, dy = numbers(1, T, D, device="cuda"), numbers(2, T, D, device="cuda")
    leaf = x.clone().requires_grad_()

    def run():
        out = layer(leaf)
        ((out.y * dy).sum() + out.losses.sum()).backward()
        return out.y.detach()

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(warm)
    leaf.grad = None
    layer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    captured = [y, leaf.grad, *(p.grad for p in layer.parameters())]
    for seed in (5, 6):
        with torch.no_grad():
            leaf.copy_(numbers(seed, T, D))
        graph.replay()
        found = [t.clone() for t in captured]
        wanted = step(layer, leaf.detach().clone(), dy)  # another pass: the graph keeps its own
        graph.replay()
        for a, again, b in zip(found, captured, [wanted[0], *wanted[2:]]):
            assert torch.equal(a, again) and torch.equal(a, b)


def test_an_exact_step_refuses_to_be_captured():
    layer = small(device="cuda")
    x = numbers(1, T, D, device="cuda")
    with torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        with pytest.raises(moe.InvalidState, match="captured"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                layer(x)
