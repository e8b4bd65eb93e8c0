"""Python callables as parallel-for, allocator and log, and what becomes of their exceptions."""

import array
import ctypes
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import moe

D = 16


def floats(count):
    return array.array("f", [(i % 11 - 5) / 8 for i in range(count)])


def layer_on(context):
    gate = moe.Gate(context, d_model=D, num_experts=4, top_k=2, init_std=0.5)
    layer = moe.Layer(gate, moe.Experts(context, d_model=D, d_hidden=32, num_experts=4))
    layer.init_parameters(1)
    return layer


def result(context, tokens=300):
    layer = layer_on(context)
    step = moe.Pass(layer)
    y = layer.forward(step, floats(tokens * D))
    dx = layer.backward(step, floats(tokens * D))
    return bytes(y), bytes(dx), bytes(layer.parameters["experts.w1"].grad)


@pytest.fixture(scope="module")
def want():
    return result(moe.Context(threads=1))


def test_a_function_runs_the_tasks(want):
    calls = []

    def parallel(count, task):
        calls.append(count)
        for i in reversed(range(count)):
            task(i)

    assert result(moe.Context(threads=3, parallel=parallel)) == want
    assert max(calls) > 1


def test_threads_run_the_tasks(want):
    def parallel(count, task):
        threads = [threading.Thread(target=task, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return 0

    assert result(moe.Context(threads=3, parallel=parallel)) == want


def test_an_executor_runs_the_tasks(want):
    with ThreadPoolExecutor(3) as executor:
        context = moe.Context(parallel=executor)
        assert context.threads == 3
        assert result(context) == want
        layer = layer_on(context)
    with pytest.raises(moe.CallbackFailed) as caught:  # the executor is shut down
        layer.forward(moe.Pass(layer), floats(300 * D))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_an_exception_in_parallel_is_the_cause_of_the_error(want):
    fail = [False]

    def parallel(count, task):
        if fail[0]:
            raise KeyError("from the host")
        for i in range(count):
            task(i)

    layer = layer_on(moe.Context(threads=2, parallel=parallel))
    step = moe.Pass(layer)
    layer.forward(step, floats(300 * D))
    fail[0] = True
    with pytest.raises(moe.CallbackFailed) as caught:
        layer.forward(step, floats(300 * D))
    assert caught.value.status == moe.Status.CALLBACK
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(moe.InvalidState):
        layer.backward(step, floats(300 * D))
    fail[0] = False
    assert bytes(layer.forward(step, floats(300 * D))) == want[0]


def test_a_number_from_parallel_is_in_the_message():
    layer = layer_on(moe.Context(threads=2, parallel=lambda count, task: 77))
    with pytest.raises(moe.CallbackFailed, match="77") as caught:
        layer.forward(moe.Pass(layer), floats(300 * D))
    assert caught.value.__cause__ is None


def test_keyboard_interrupt_comes_through_itself():
    def parallel(count, task):
        raise KeyboardInterrupt

    layer = layer_on(moe.Context(threads=2, parallel=parallel))
    with pytest.raises(KeyboardInterrupt):
        layer.forward(moe.Pass(layer), floats(300 * D))


class Allocator:
    """Memory out of bytearrays; fails or raises on demand."""

    def __init__(self):
        self.live = {}
        self.allow = 10**9
        self.error = None

    def alloc(self, size, alignment):
        if self.error is not None:
            raise self.error
        if self.allow == 0:
            return None
        self.allow -= 1
        raw = bytearray(size + alignment)
        address = ctypes.addressof(ctypes.c_char.from_buffer(raw))
        aligned = address + -address % alignment
        self.live[aligned] = size, raw
        return aligned

    def free(self, memory, size):
        assert self.live.pop(memory)[0] == size


def test_an_allocator_gives_all_memory_and_gets_it_back(want):
    allocator = Allocator()
    assert result(moe.Context(threads=2, alloc=(allocator.alloc, allocator.free))) == want
    gc.collect()
    assert allocator.live == {}


def test_an_allocator_that_has_no_memory_at_any_point():
    points = 0
    for allow in range(1000):
        allocator = Allocator()
        allocator.allow = allow
        try:
            result(moe.Context(threads=2, alloc=(allocator.alloc, allocator.free)))
        except moe.OutOfMemory as error:
            assert isinstance(error, MemoryError)
            points += 1
            error.__traceback__ = None
        else:
            break
        gc.collect()
        assert allocator.live == {}
    assert points > 5


def test_an_exception_in_alloc_is_the_cause():
    allocator = Allocator()
    context = moe.Context(alloc=(allocator.alloc, allocator.free))
    allocator.error = KeyError("no more")
    with pytest.raises(moe.OutOfMemory) as caught:
        moe.Plan(context)
    assert caught.value.__cause__ is allocator.error




LOG = """
import resource, moe
lines = []
context = moe.Context(threads=64, log=lambda level, text: {body})
gate = moe.Gate(context, d_model=16, num_experts=4, top_k=2)
import array
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
try:
    gate.forward(moe.Pass(gate), array.array("f", bytes(4 * 16 * 4000)))
    print("forward went on")
except BaseException as error:
    print("raised", repr(error))
for line in lines: print(*line)
"""


def test_log_lines_and_exceptions_in_log(script):
    text = script(LOG.replace("{body}", "lines.append((level, text))"))
    assert text.startswith("forward went on\n1 "), text
    text = script(LOG.replace("{body}", "1 / 0"))
    assert text == "raised ZeroDivisionError('division by zero')\n"


def test_a_callback_that_calls_the_library_is_refused():
    def parallel(count, task):
        moe.Plan(context)

    context = moe.Context(threads=2, parallel=parallel)
    layer = layer_on(context)
    with pytest.raises(moe.CallbackFailed) as caught:
        layer.forward(moe.Pass(layer), floats(300 * D))
    assert "a callback must not call the library" in str(caught.value.__cause__)


def test_callbacks_live_as_long_as_what_needs_them(want):
    def make():
        def parallel(count, task):
            for i in range(count):
                task(i)

        allocator = Allocator()
        context = moe.Context(threads=2, parallel=parallel, alloc=(allocator.alloc, allocator.free))
        return layer_on(context), allocator.live

    layer, live = make()
    gc.collect()
    churn = [bytearray(64) for _ in range(10000)]
    assert bytes(layer.forward(moe.Pass(layer), floats(300 * D))) == want[0] and churn
    layer.close()
    layer.gate.close()
    layer.experts.close()
    del layer
    gc.collect()
    assert live == {}


@pytest.mark.parametrize("keywords, message", [
    ({"parallel": 3}, "parallel must be a callable or an executor"),
    ({"alloc": len}, "alloc must be a pair of callables"),
    ({"alloc": (len, 3)}, "alloc must be a pair of callables"),
    ({"log": "yes"}, "log must be a callable"),
])  # fmt: skip
def test_what_is_no_callback_is_refused(keywords, message):
    with pytest.raises(TypeError, match=message):
        moe.Context(**keywords)


def test_parallel_needs_to_know_how_many():
    with pytest.raises(moe.InvalidArgument, match="threads"):
        moe.Context(parallel=lambda count, task: 0)
