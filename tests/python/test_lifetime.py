"""Objects may go in any order, by hand, by the garbage collector, at exit and after a fork."""

import array
import ctypes
import gc
import itertools
import os
import sys
import weakref

import pytest

import moe
from moe import _handle

T, D = 8, 6


def numbers(count=T * D):
    return array.array("f", [(i % 7 - 3) / 4 for i in range(count)])


def build(**context):
    context = moe.Context(threads=2, **context)
    gate = moe.Gate(context, d_model=D, num_experts=4, top_k=2, init_std=0.5)
    experts = moe.Experts(context, d_model=D, d_hidden=5, num_experts=4)
    layer = moe.Layer(gate, experts, comm=moe.Comm(context))
    layer.init_parameters(1)
    step = moe.Pass(layer)
    layer.forward(step, numbers())
    return {"context": context, "gate": gate, "experts": experts, "layer": layer, "pass": step,
            "plan": step.plan, "copy": step.plan.copy(),
            "data": layer.parameters["experts.w1"].data,
            "counts": step.tensor("counts", copy=False)}  # fmt: skip


def test_objects_go_in_any_order():
    names = list(build())
    for shift, order in itertools.product(range(len(names)), (1, -1)):
        objects = build()
        for name in (names[shift:] + names[:shift])[::order]:
            del objects[name]
            gc.collect(0)
    gc.collect()


def test_closing_in_any_order():
    names = ["context", "gate", "experts", "layer", "pass", "plan", "copy"]
    for shift in range(len(names)):
        objects = build()
        for name in names[shift:] + names[:shift]:
            objects[name].close()
            objects[name].close()
            assert objects[name].closed


def test_use_after_close_is_refused():
    objects = build()
    layer, step = objects["layer"], objects["pass"]
    step.close()
    with pytest.raises(moe.InvalidState, match="this Pass has been closed"):
        layer.forward(step, numbers())
    with moe.Pass(layer) as other:
        layer.forward(other, numbers())
    with pytest.raises(moe.InvalidState):
        other.losses
    layer.close()
    with pytest.raises(moe.InvalidState, match="this Layer has been closed"):
        layer.init_parameters(1)
    assert repr(layer) == "<moe.Layer closed>"


def test_a_view_keeps_what_it_looks_into():
    objects = build()
    data, counts = objects["data"], objects["counts"]
    before = bytes(data), bytes(counts)
    handle = weakref.ref(objects["experts"].handle)
    for name in ("context", "gate", "experts", "layer"):
        objects[name].close()
    objects.clear()
    gc.collect()
    churn = [bytearray(1000) for _ in range(1000)]
    assert (bytes(data), bytes(counts)) == before and churn
    assert handle() is not None
    del data, counts
    gc.collect()
    assert handle() is None


def test_a_forward_that_would_move_a_view_is_refused():
    objects = build()
    step, layer = objects["pass"], objects["layer"]
    with pytest.raises(moe.InvalidState, match="forward: 1 views of the pass are in use"):
        layer.forward(step, numbers(50 * D))
    with pytest.raises(moe.InvalidState, match="reserve"):
        step.reserve(100)
    del objects["counts"]
    layer.forward(step, numbers(50 * D))
    with pytest.raises(moe.InvalidState, match="ended with a later call"):
        objects["plan"].tokens
    assert objects["copy"].tokens == T and step.plan.tokens == 50


def test_x_is_kept_until_the_next_forward():
    objects = build()
    layer, step = objects["layer"], objects["pass"]
    del objects["counts"]

    class Watched(array.array):
        pass

    x = Watched("f", numbers())
    gone = weakref.ref(x)
    layer.forward(step, x)
    del x
    gc.collect()
    assert gone() is not None
    dy = numbers()
    first = bytes(layer.backward(step, dy))
    assert bytes(layer.backward(step, dy)) == first
    with pytest.raises(ValueError):
        layer.forward(step, numbers(), y=numbers(D))  # refused: the pass is as it was
    assert gone() is not None
    layer.forward(step, numbers())
    assert gone() is None
    y = Watched("f", numbers())
    gone = weakref.ref(y)
    layer.forward(step, y, flags=moe.Forward.NO_SAVE)
    del y
    assert gone() is None, "no backward will look at it"


def test_bound_memory_is_kept_until_it_is_bound_anew():
    objects = build()
    experts = objects["experts"]

    class Watched(bytearray):
        pass

    shape = experts.parameters["w1"].shape
    raw = Watched(4 * 4 * D * 5)
    gone = weakref.ref(raw)
    experts.parameters["w1"].bind(memoryview(raw).cast("f", shape))
    del raw
    experts.close()
    del experts, objects["experts"]
    gc.collect()
    assert gone() is not None
    objects["layer"].forward(moe.Pass(objects["layer"]), numbers())
    objects["layer"].parameters["experts.w1"].unbind()
    assert gone() is None


def test_cycles_are_collected():
    gone = []
    for _ in range(3):
        objects = build(log=lambda level, text, me=None: None)
        cycle = {"objects": objects}
        objects["self"] = cycle
        objects["layer"].owner = objects
        gone.append(weakref.ref(objects["pass"].handle))
        gone.append(weakref.ref(objects["context"].handle))
    del objects, cycle
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


def test_a_callback_that_holds_the_layer_is_collected_with_it():
    class Host:
        def alloc(self, size, alignment):
            return pool.take(size, alignment)

        def free(self, memory, size):
            pool.give(memory)

    class Pool:
        def __init__(self):
            self.live = {}

        def take(self, size, alignment):
            raw = bytearray(size + alignment)
            import ctypes

            address = ctypes.addressof(ctypes.c_char.from_buffer(raw))
            aligned = address + -address % alignment
            self.live[aligned] = raw
            return aligned

        def give(self, memory):
            del self.live[memory]

    pool = Pool()
    host = Host()
    # Without the arrays: numpy's hide what they refer to from the collector.
    host.objects = build(alloc=(host.alloc, host.free))
    del host.objects["data"], host.objects["counts"]
    assert pool.live
    gone = weakref.ref(host)
    del host
    gc.collect()
    _handle.destroy_deferred()
    gc.collect()
    assert gone() is None and pool.live == {}


def test_collecting_inside_a_callback_waits_for_its_end():
    """The collector may find a context while another call of the same library is in a callback."""
    rubbish = []

    def parallel(count, task):
        rubbish.clear()
        gc.collect()
        assert len(_handle._deferred) > 0
        for i in range(count):
            task(i)

    objects = build(parallel=None)
    rubbish.append(build())
    context = moe.Context(threads=2, parallel=parallel)
    gate = moe.Gate(context, d_model=D, num_experts=4, top_k=2)
    gate.init_parameters(1)
    step = moe.Pass(gate)
    gate.forward(step, numbers())
    step.losses
    assert len(_handle._deferred) == 0 and objects


EXIT = """
import array, atexit, sys, moe
sys.path.insert(0, sys.argv[1])
from test_lifetime import build, numbers
kept = build(log=print)
layer, step, data = kept["layer"], kept["pass"], kept["data"]
class Late:
    def __del__(self):
        assert bytes(data)
late = Late()
late.me = late
@atexit.register
def end():
    layer.forward(moe.Pass(layer), numbers())
    print("at exit", len(bytes(data)))
"""


def test_the_interpreter_goes_down_cleanly(script):
    here = os.path.dirname(__file__)
    assert script(EXIT, here) == "at exit 480\n"
    assert script(EXIT + "del kept, layer.gate, layer.experts\nkept = layer.parameters", here)


def test_the_interpreter_goes_down_with_a_thread_in_a_call(script):
    text = script(
        "import sys, threading, time\nsys.path.insert(0, sys.argv[1])\n"
        "import moe\nfrom test_lifetime import build, numbers, D\n"
        "layer = build()['layer']\n"
        "def work():\n"
        "    step, x = moe.Pass(layer), numbers(4000 * D)\n"
        "    while True: layer.forward(step, x)\n"
        "threading.Thread(target=work, daemon=True).start()\n"
        "time.sleep(0.2)\nprint('end')\n",
        os.path.dirname(__file__),
    )
    assert text == "end\n"


FORK = """
import os, sys, threading
sys.path.insert(0, sys.argv[1])
import moe
from test_lifetime import build, numbers
objects = build()
layer, step = objects["layer"], objects["pass"]
del objects["counts"]
want = bytes(layer.forward(step, numbers()))
# Another thread is in a call while this one forks; its locks must not stay shut in the child.
busy = threading.Event()
def work():
    other = moe.Pass(layer)
    while not busy.is_set():
        layer.forward(other, numbers(2000 * 6))
thread = threading.Thread(target=work)
thread.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        ok = bytes(layer.forward(step, numbers())) == want
        p = layer.parameters["experts.w1"]
        p.bind(p.data, None)
        ok = ok and bytes(layer.forward(step, numbers())) == want
        del objects
        sys.stdout.flush()
        os._exit(0 if ok else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
busy.set()
thread.join()
assert bytes(layer.forward(step, numbers())) == want
print("parent goes on")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_goes_on(script):
    source = "import warnings\nwarnings.simplefilter('ignore')\n" + FORK
    assert script(source, os.path.dirname(__file__)) == "parent goes on\n"


def test_memory_does_not_grow():
    def round_():
        objects = build()
        shape = objects["layer"].parameters["experts.w1"].shape
        memory = memoryview(bytearray(4 * 4 * D * 5)).cast("f", shape)
        objects["layer"].parameters["experts.w1"].bind(memory)

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    for _ in range(30):
        round_()
    gc.collect()
    before = resident()
    for _ in range(200):
        round_()
    gc.collect()
    assert resident() - before < 500, "pages of 4 KiB"
