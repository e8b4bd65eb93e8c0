"""Forward and backward in three calls each, and passes that end in the middle of one."""

import gc
import os
import weakref

import pytest

import moe
from moe import _handle

np = pytest.importorskip("numpy")

from rank_cases import (  # noqa: E402
    D, E, assert_same, make, numbers, on_ranks, result, tokens_of, train_whole,
)  # fmt: skip

COUNTS = (5, 4)
PLACES = ([3, 0], [2, 1])


class Watched(np.ndarray):
    """An array that a weak reference may look at."""


def watched(*shape):
    return numbers(7, *shape).view(Watched)


def can_bind(layer):
    """Whether gate, pool and layer are free: a binding is refused while a call has them."""
    found = set()
    for name in ("gate.weight", "experts.w1"):
        try:
            layer.parameters[name].unbind()
            found.add(True)
        except moe.InvalidState as error:
            assert "is in use by another call" in str(error)
            found.add(False)
    assert len(found) == 1
    return found.pop()


# ---- the same as one call -----------------------------------------------------------------------


@pytest.mark.parametrize("work", [True, False])
def test_phases_are_a_call_in_pieces(context, work):
    x, dy, _ = tokens_of(COUNTS)
    groups = np.array([0, *np.cumsum(COUNTS)])
    whole, layer = train_whole(COUNTS, make(context)), make(context)
    step, y, dx = moe.Pass(layer), np.full_like(x, 7), np.full_like(x, 7)
    assert layer.forward_start(step, x, y=y, group_begin=groups) is None
    if work:
        assert layer.forward_work(step) is None
    assert layer.forward_finish(step) is y
    assert layer.backward_start(step, dy, dx=dx) is None
    if work:
        assert layer.backward_work(step) is None
    assert layer.backward_finish(step) is dx
    assert_same(whole, [result(layer, step, y, dx)])
    # Arrays of the layer's own making, shaped as x.
    layer.forward_start(step, x.reshape(3, 3, D))
    y = layer.forward_finish(step)
    layer.backward_start(step, dy)
    assert y.shape == layer.backward_finish(step).shape == (3, 3, D)
    layer.backward_start(step, dy, flags=moe.Backward.SKIP_DX)
    assert layer.backward_finish(step) is None


def test_two_passes_in_flight_are_plain_calls(context):
    inputs = [tokens_of(COUNTS), tokens_of(COUNTS[::-1])]
    wholes = [train_whole(counts, make(context)) for counts in (COUNTS, COUNTS[::-1])]

    def work(rank, context, comm):
        layer = make(context, 2, comm, placement=PLACES[rank])
        steps = [moe.Pass(layer), moe.Pass(layer)]
        mine = [(x[rows[rank]], dy[rows[rank]]) for x, dy, rows in inputs]
        for step, (x, _) in zip(steps, mine):
            layer.forward_start(step, x)
        for step in steps[::-1]:
            layer.forward_work(step)
        ys = [layer.forward_finish(step) for step in steps]
        found = []
        for step, y, (_, dy) in zip(steps, ys, mine):
            layer.zero_gradients()
            layer.backward_start(step, dy)
            layer.backward_work(step)
            dx = layer.backward_finish(step)
            layer.reduce_gradients()
            found.append(result(layer, step, y, dx))
        return found

    for whole, parts in zip(wholes, zip(*on_ranks(2, work))):
        assert_same(whole, parts)
        assert all(part["report"].rows_sent > 0 for part in parts)


def test_a_forward_goes_on_during_a_backward(context):
    x, dy, rows = tokens_of(COUNTS)
    whole = train_whole(COUNTS, make(context))

    def work(rank, context, comm):
        layer = make(context, 2, comm, placement=PLACES[rank])
        first, second = moe.Pass(layer), moe.Pass(layer)
        y = layer.forward(first, x[rows[rank]])
        layer.backward_start(first, dy[rows[rank]])
        layer.forward_start(second, x[rows[rank]])
        layer.backward_work(first)
        layer.forward_work(second)
        dx = layer.backward_finish(first)
        again = layer.forward_finish(second)
        layer.reduce_gradients()
        return result(layer, first, y, dx), again

    parts = on_ranks(2, work)
    assert_same(whole, [part for part, _ in parts])
    assert np.concatenate([again for _, again in parts]).tobytes() == whole["y"].tobytes()


def test_a_plan_may_be_replayed_in_phases(context):
    layer, x = make(context), numbers(1, 8, D)
    step, other = moe.Pass(layer), moe.Pass(layer)
    want = layer.forward(step, x).tobytes()
    layer.forward_start(other, x, plan=step.plan, plan_use="ids")
    assert layer.forward(step, x, plan=step.plan).tobytes() == want  # the pass's own
    layer.forward_start(step, x, plan=step.plan)
    assert layer.forward_finish(other).tobytes() == layer.forward_finish(step).tobytes() == want


# ---- misuse -------------------------------------------------------------------------------------


def test_calls_out_of_turn_are_refused(context):
    layer, other = make(context), make(context)
    step, x = moe.Pass(layer), numbers(1, 8, D)
    for refused in (layer.forward_work, layer.forward_finish):
        with pytest.raises(moe.InvalidState, match="no forward of the pass has been started"):
            refused(step)
    with pytest.raises(moe.InvalidState, match="backward needs a forward on this pass first"):
        layer.backward_start(step, x)
    want = layer.forward(moe.Pass(layer), x)
    layer.forward_start(step, x)
    in_the_middle = (
        lambda: layer.forward_start(step, x[:3]), lambda: layer.forward(step, x[:3]),
        lambda: layer.backward(step, x), lambda: layer.backward_start(step, x),
        lambda: step.losses, lambda: step.stats, lambda: step.report, lambda: step.plan,
        lambda: step.tensor("counts"), lambda: step.reserve(50), step.trim,
    )  # fmt: skip
    for refused in in_the_middle:
        with pytest.raises(moe.InvalidState, match="the pass is in the middle of a forward"):
            refused()
    with pytest.raises(moe.InvalidState, match="no backward of the pass has been started"):
        layer.backward_finish(step)
    with pytest.raises(moe.InvalidArgument, match="the pass was made for another layer"):
        other.forward_finish(step)
    layer.forward_work(step)
    with pytest.raises(moe.InvalidState, match="the work of the forward is done"):
        layer.forward_work(step)
    assert not can_bind(layer) and can_bind(other)
    assert layer.forward_finish(step).tobytes() == want.tobytes()
    assert can_bind(layer)
    with pytest.raises(moe.InvalidState, match="no forward of the pass has been started"):
        layer.forward_finish(step)
    layer.backward_start(step, x)
    with pytest.raises(moe.InvalidState, match="in the middle of a backward"):
        layer.forward(step, x)
    second = moe.Pass(layer)
    layer.forward(second, x)
    for refused in (layer.backward, layer.backward_start):
        with pytest.raises(moe.InvalidState, match="another backward of the gate is running"):
            refused(second, x)
    dx = layer.backward_finish(step)
    assert layer.backward(second, x).tobytes() == dx.tobytes()


def test_a_start_that_fails_leaves_nothing_behind(context):
    layer, x = make(context), numbers(1, 8, D)
    step = moe.Pass(layer)
    want = layer.forward(step, x)
    plan = step.plan
    for wrong in ({"top_k": 9}, {"y": np.zeros((8, D + 1))}, {"tokens": 7}):
        with pytest.raises(ValueError):
            layer.forward_start(step, x, **wrong)
    with pytest.raises(TypeError, match="has no field 'colour'"):
        layer.forward_start(step, x, colour=1)
    assert can_bind(layer) and plan.tokens == 8  # the pass is as it was
    assert step.handle.flight is None
    assert layer.backward(step, want).shape == x.shape
    layer.forward_start(step, x)
    with pytest.raises(moe.InvalidState, match="ended with a later call"):
        plan.tokens
    assert layer.forward_finish(step).tobytes() == want.tobytes()


def test_a_callback_that_fails_in_the_work_ends_the_call(context):
    fail = [True]

    def forward(call):
        if fail[0]:
            raise KeyError("on purpose")
        np.copyto(call.out, call.x)

    gate = moe.Gate(context, d_model=D, num_experts=E, dtype="float64")
    pool = moe.Experts(context, d_model=D, num_experts=E, dtype="float64", callbacks=forward)
    layer, x = moe.Layer(gate, pool), numbers(1, 8, D)
    step = moe.Pass(layer)
    layer.forward_start(step, x)
    with pytest.raises(moe.CallbackFailed) as caught:
        layer.forward_work(step)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(moe.InvalidState, match="no forward of the pass has been started"):
        layer.forward_finish(step)
    gate.parameters["weight"].unbind()
    fail[0] = False
    layer.forward_start(step, x)
    assert layer.forward_finish(step).shape == x.shape


# ---- memory -------------------------------------------------------------------------------------


def test_arrays_are_kept_until_the_finish(context):
    layer = make(context)
    step = moe.Pass(layer)
    arrays = {"x": watched(8, D), "y": watched(8, D), "stats_out": watched(16)}
    gone = {name: weakref.ref(array) for name, array in arrays.items()}
    layer.forward_start(step, **arrays, flags=moe.Forward.NO_SAVE)
    del arrays
    gc.collect()
    assert all(ref() is not None for ref in gone.values())
    layer.forward_work(step)
    assert layer.forward_finish(step) is gone["y"]()
    assert gone["x"]() is gone["y"]() is gone["stats_out"]() is None
    layer.forward(step, numbers(1, 8, D))
    dy, dx = watched(8, D), watched(8, D)
    gone = weakref.ref(dy), weakref.ref(dx)
    layer.backward_start(step, dy, dx=dx)
    del dy, dx
    gc.collect()
    assert all(ref() is not None for ref in gone)
    assert layer.backward_finish(step) is gone[1]()
    assert gone[0]() is gone[1]() is None


def test_a_view_is_not_moved_by_a_start(context):
    layer, x = make(context), numbers(1, 8, D)
    step = moe.Pass(layer)
    layer.forward(step, x)
    view = step.tensor("counts", copy=False)
    with pytest.raises(moe.InvalidState, match="forward: 1 views of the pass are in use"):
        layer.forward_start(step, x)
    assert can_bind(layer)
    layer.backward_start(step, x)  # moves nothing
    step.close()  # the view lives on, and so does the pass
    assert view.sum() == 16 and not can_bind(layer)
    del view
    assert can_bind(layer)


# ---- passes that end in the middle --------------------------------------------------------------


def end_by_close(held):
    held.pop().close()


def end_by_deletion(held):
    held.clear()


def end_by_collection(held):
    held[0].cycle = held
    del held


@pytest.mark.parametrize("end", [end_by_close, end_by_deletion, end_by_collection])
@pytest.mark.parametrize("worked", [True, False])
def test_a_pass_may_end_in_the_middle_of_a_call(context, end, worked):
    layer, x = make(context), numbers(1, 8, D)
    want = layer.forward(moe.Pass(layer), x)
    for direction in ("forward", "backward"):
        step, arrays = moe.Pass(layer), watched(8, D)
        layer.forward(step, x)
        getattr(layer, direction + "_start")(step, arrays)
        if worked:
            getattr(layer, direction + "_work")(step)
        gone, held = weakref.ref(arrays), [step]
        del step, arrays
        assert not can_bind(layer)
        end(held)
        del held
        gc.collect()
        assert can_bind(layer) and gone() is None
    step = moe.Pass(layer)
    assert layer.forward(step, x).tobytes() == want.tobytes()
    layer.backward(step, x)  # no other one is running


def test_a_plan_does_not_keep_a_closed_call(context):
    layer, x = make(context), numbers(1, 8, D)
    step = moe.Pass(layer)
    layer.forward(step, x)
    plan = step.plan
    layer.backward_start(step, x)
    assert plan.tokens == 8
    step.close()
    assert can_bind(layer)
    with pytest.raises(moe.InvalidState, match="ended with a later call"):
        plan.tokens


def test_closing_in_a_callback_waits_for_its_end():
    steps = []

    def parallel(count, task):
        while steps:
            steps.pop().close()
            assert len(_handle._deferred) == 1
        for i in range(count):
            task(i)

    layer = make(moe.Context(threads=2, parallel=parallel))
    x = numbers(1, 8, D)
    other, step = moe.Pass(layer), moe.Pass(layer)
    layer.forward(other, x)
    layer.forward_start(step, x)
    steps.append(step)
    layer.forward(other, numbers(1, 500, D))
    assert steps == []
    other.losses
    assert len(_handle._deferred) == 0 and can_bind(layer)


def test_a_pass_that_ends_in_the_middle_ends_the_group(context):
    x, _, rows = tokens_of(COUNTS)

    def work(rank, context, comm):
        layer = make(context, 2, comm, placement=PLACES[rank])
        step = moe.Pass(layer)
        layer.forward_start(step, x[rows[rank]])
        comm.barrier()  # each is between its start and its finish
        if rank == 0:
            step.close()
            assert can_bind(layer)
        else:
            with pytest.raises(moe.Error, match="rank 0 gave up"):
                layer.forward_finish(step)
        with pytest.raises(moe.Error):
            layer.forward(moe.Pass(layer), x[rows[rank]])
        assert can_bind(layer)
        return True

    assert on_ranks(2, work) == [True, True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_finishes_the_call(script):
    source = (
        "import os, sys, warnings\nwarnings.simplefilter('ignore')\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import moe\nfrom rank_cases import make, numbers\n"
        "layer, x = make(moe.Context(threads=2)), numbers(1, 8, 6)\n"
        "step = moe.Pass(layer)\n"
        "want = layer.forward(moe.Pass(layer), x).tobytes()\n"
        "layer.forward_start(step, x)\n"
        "child = os.fork()\n"
        "ok = layer.forward_finish(step).tobytes() == want\n"
        "layer.parameters['gate.weight'].unbind()\n"
        "ok = ok and layer.forward(step, x).tobytes() == want\n"
        "if child == 0: os._exit(0 if ok else 1)\n"
        "print(ok, os.waitpid(child, 0)[1])\n"
    )
    assert script(source, os.path.dirname(__file__)) == "True 0\n"
