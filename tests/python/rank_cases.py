"""Layers on ranks that are threads, and the one rank that they are compared with."""

import threading

import numpy as np

import moe

D, F, E, K = 6, 5, 4, 2
TIMEOUT = 20  # seconds that a wait may take before the test fails


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def make(context, experts=E, comm=None, gate=(), hidden=F, **fields):
    """A layer with `experts` of the E experts (or slices)."""
    gate = moe.Gate(context, d_model=D, num_experts=E, top_k=K, dtype="float64", **dict(gate))
    pool = moe.Experts(
        context, d_model=D, d_hidden=hidden, num_experts=experts or moe.NO_EXPERTS,
        dtype="float64",
    )  # fmt: skip
    layer = moe.Layer(gate, pool, comm=comm, **fields)
    set_parameters(layer)
    return layer


def set_parameters(layer):
    """The same values on every rank; of experts those that their numbers have."""
    total = E * layer.config.expert_slices
    for i, (name, p) in enumerate(layer.parameters.items()):
        if name.startswith("experts."):
            p.data[...] = numbers(i, total, *p.shape[1:])[layer.expert_numbers]
        else:
            p.data[...] = numbers(i, *p.shape)


def tokens_of(counts):
    """x and dy for all ranks, and the rows of each."""
    ends = np.cumsum(counts)
    rows = [slice(end - count, end) for end, count in zip(ends, counts)]
    return numbers(50, ends[-1], D), numbers(51, ends[-1], D), rows


def result(layer, step, y, dx=None):
    """What a step left: y, dx, gradients by name, or by name and number for an expert."""
    found = {"y": y, "dx": dx, "losses": step.losses, "stats": step.stats, "report": step.report,
             "plan": step.plan.arrays()}  # fmt: skip
    for name, p in layer.parameters.items():
        if name.startswith("experts."):
            for number, grad in zip(layer.expert_numbers, p.grad):
                found[name, number] = grad.copy()
        else:
            found[name] = p.grad.copy()
    return found


def train(layer, x, dy, **arguments):
    """A step with a backward."""
    step = moe.Pass(layer)
    y = layer.forward(step, x, **arguments)
    dx = layer.backward(step, dy)
    layer.reduce_gradients()
    return result(layer, step, y, dx)


def train_whole(counts, layer):
    """The step of one rank, a token group for each rank."""
    x, dy, _ = tokens_of(counts)
    return train(layer, x, dy, group_begin=np.concatenate([[0], np.cumsum(counts)]))


def on_ranks(size, work):
    """work(rank, context, comm) on each rank of a world; the results, or the first error."""
    # A world is made in a context that outlives it; each rank computes in its own.
    world, found, errors = moe.World(moe.Context(threads=1), size), [None] * size, []

    def run(rank):
        own = moe.Context(threads=1)
        with world.comm(own, rank, timeout=TIMEOUT) as comm:
            try:
                found[rank] = work(rank, own, comm)
            except BaseException as error:  # raised again in the thread of the test
                errors.append(error)
                comm.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * TIMEOUT)
        assert not thread.is_alive(), "a rank does not come back"
    if errors:
        raise errors[0]
    return found


def assert_same(whole, parts, dx=True):
    """The ranks have together the bytes of the one rank."""
    for name in ("y", "dx") if dx else ("y",):
        assert np.concatenate([p[name] for p in parts]).tobytes() == whole[name].tobytes(), name
    if not dx:
        return
    gradients = [key for key, value in whole.items() if isinstance(value, np.ndarray)]
    for key in set(gradients) - {"y", "dx"}:
        holders = [part[key] for part in parts if key in part]
        assert len(holders) == (1 if isinstance(key, tuple) else len(parts)), key
        for held in holders:
            assert held.tobytes() == whole[key].tobytes(), key
