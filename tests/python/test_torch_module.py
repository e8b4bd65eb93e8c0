"""moe.torch.MoELayer as a module in a program: saving, copying, resuming, threads, memory."""

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
from torch_layers import MoELayer, numbers, small, step_of  # noqa: E402


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
    for step in range(1000):
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


def test_resuming_repeats_the_noise():
    """Noise follows PyTorch's generator, so that saving its state, as for dropout, is enough."""

    def steps(layer, optimizer, count):
        for i in range(count):
            out = layer(numbers(16, 6, seed=i))
            optimizer.zero_grad()
            (out.y.pow(2).sum() + out.losses.sum()).backward()
            optimizer.step()

    layer = small()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    torch.manual_seed(4)
    steps(layer, optimizer, 3)
    buffer = io.BytesIO()
    torch.save([layer.state_dict(), optimizer.state_dict(), torch.get_rng_state()], buffer)
    steps(layer, optimizer, 3)
    buffer.seek(0)
    saved = torch.load(buffer)
    torch.manual_seed(99)
    fresh = small(seed=8)
    fresh.load_state_dict(saved[0])
    optimizer = torch.optim.Adam(fresh.parameters(), lr=0.01)
    optimizer.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    steps(fresh, optimizer, 3)
    for a, b in zip(layer.parameters(), fresh.parameters()):
        assert torch.equal(a, b)
