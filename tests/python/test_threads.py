"""Calls release the GIL; objects refuse what two threads must not do at once."""

import array
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import moe

D = 64


def floats(count):
    pattern = array.array("f", [(i - 5) / 8 for i in range(11)])
    return (pattern * (count // 11 + 1))[:count]


@pytest.fixture(scope="module")
def layer():
    context = moe.Context(threads=1)
    gate = moe.Gate(context, d_model=D, num_experts=4, top_k=2)
    made = moe.Layer(gate, moe.Experts(context, d_model=D, d_hidden=256, num_experts=4))
    made.init_parameters(1)
    return made


def tokens_for(layer, seconds):
    """A batch whose forward takes about this long."""
    tokens = 1024
    while True:
        step, x = moe.Pass(layer), floats(tokens * D)
        layer.forward(step, x)
        start = time.perf_counter()
        layer.forward(step, x)
        if time.perf_counter() - start >= seconds or tokens > 500_000:
            return step, x
        tokens *= 2


def counts_during(seconds_of):
    """How often another thread counts while seconds_of() runs, and for how long that is."""
    counted, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            counted[0] += 1

    counter = threading.Thread(target=count)
    counter.start()
    try:
        time.sleep(0.02)
        before, start = counted[0], time.perf_counter()
        seconds_of()
        return counted[0] - before, time.perf_counter() - start
    finally:
        stop.set()
        counter.join()


def test_another_thread_runs_during_a_forward(layer):
    step, x = tokens_for(layer, 0.2)
    # With the GIL held the counter would get a slice of 5 ms before and after the call, a
    # twentieth of the time. Several attempts, for a machine that is busy with something else.
    shares = []
    for _ in range(5):
        alone, duration = counts_during(lambda: time.sleep(0.2))
        during, length = counts_during(lambda: layer.forward(step, x))
        shares.append(during / length / (alone / duration))
        if shares[-1] > 0.25:
            return
    pytest.fail(f"shares of the time: {shares}")


def test_threads_use_one_layer_at_once(layer):
    x = floats(300 * D)
    want = bytes(layer.forward(moe.Pass(layer), x))

    def work(_):
        step = moe.Pass(layer)
        return [bytes(layer.forward(step, x)) == want for _ in range(5)]

    with ThreadPoolExecutor(4) as executor:
        assert all(all(same) for same in executor.map(work, range(8)))


def during_a_forward(layer, action):
    """Runs `action` while another thread is inside a forward of `layer`; gives both outcomes."""
    entered, release = threading.Event(), threading.Event()

    def parallel(count, task):
        entered.set()
        release.wait(10)
        for i in range(count):
            task(i)

    context = moe.Context(threads=2, parallel=parallel)
    gate = moe.Gate(context, d_model=D, num_experts=4, top_k=2)
    slow = moe.Layer(gate, moe.Experts(context, d_model=D, d_hidden=8, num_experts=4))
    step = moe.Pass(slow)
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(slow.forward, step, floats(500 * D))
        try:
            assert entered.wait(10)
            action(slow, step)
        finally:
            release.set()
        return future.result()


def test_a_pass_serves_one_call_at_a_time(layer):
    def action(slow, step):
        with pytest.raises(moe.InvalidState, match="the pass is in use by another call"):
            slow.forward(step, floats(D))
        with pytest.raises(moe.InvalidState, match="the pass is in use"):
            step.losses

    assert len(during_a_forward(layer, action)) == 500


def test_binding_during_a_call_is_refused(layer):
    def action(slow, step):
        p = slow.parameters["experts.w1"]
        with pytest.raises(moe.InvalidState, match="the experts of experts.w1 is in use"):
            p.bind(p.data)
        assert p.data is not None  # looking is legal

    during_a_forward(layer, action)


def test_closing_during_a_call_waits_for_its_end(layer):
    def action(slow, step):
        step.close()
        slow.close()
        slow.gate.close()

    y = during_a_forward(layer, action)
    assert len(y) == 500


def test_the_message_is_that_of_the_thread(layer):
    barrier = threading.Barrier(4)

    def work(k):
        messages = set()
        for _ in range(50):
            barrier.wait()
            with pytest.raises(moe.InvalidArgument) as caught:
                moe.Gate(context, d_model=4, num_experts=4, top_k=100 + k)
            messages.add(str(caught.value))
        return messages

    context = moe.Context(threads=1)
    with ThreadPoolExecutor(4) as executor:
        for k, messages in enumerate(executor.map(work, range(4))):
            assert len(messages) == 1 and f"{100 + k}" in messages.pop()
