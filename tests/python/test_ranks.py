"""Layers on several ranks: a world of threads against one rank with all tokens and experts."""

import threading

import pytest

import moe

np = pytest.importorskip("numpy")

D, F, E, TOKENS = 6, 5, 4, (5, 3)


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def layer_of(context, experts, comm=None):
    gate = moe.Gate(context, d_model=D, num_experts=E, top_k=2, dtype="float64")
    pool = moe.Experts(context, d_model=D, d_hidden=F, num_experts=experts, dtype="float64")
    return moe.Layer(gate, pool, comm=comm)


def set_parameters(layer, first):
    for i, (name, p) in enumerate(layer.parameters.items()):
        whole = numbers(i, *((E,) + tuple(p.shape[1:]) if "experts" in name else p.shape))
        p.data[...] = whole[first : first + p.shape[0]] if "experts" in name else whole


def test_a_world_of_threads_is_one_rank(context):
    x, dy = numbers(50, sum(TOKENS), D), numbers(51, sum(TOKENS), D)
    whole = layer_of(context, E)
    set_parameters(whole, 0)
    step = moe.Pass(whole)
    y = whole.forward(step, x, group_begin=np.array([0, TOKENS[0], sum(TOKENS)]))
    dx = whole.backward(step, dy)
    world, results = moe.World(context, 2), {}

    def run(rank):
        own = moe.Context(threads=1)
        with world.comm(own, rank, timeout=20) as comm:
            layer = layer_of(own, 1 if rank == 0 else E - 1, comm)
            set_parameters(layer, rank)
            rows = slice(0, TOKENS[0]) if rank == 0 else slice(TOKENS[0], None)
            step = moe.Pass(layer)
            got = layer.forward(step, x[rows])
            got_dx = layer.backward(step, dy[rows])
            layer.reduce_gradients()
            comm.barrier()
            comm.poll()
            gate = layer.parameters["gate.weight"].grad.copy()
            results[rank] = (comm.size, got, got_dx, gate, layer.gradient_norm())

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0][0] == results[1][0] == 2
    assert np.concatenate([results[0][1], results[1][1]]).tobytes() == y.tobytes()
    assert np.concatenate([results[0][2], results[1][2]]).tobytes() == dx.tobytes()
    for rank in range(2):
        assert results[rank][3].tobytes() == whole.parameters["gate.weight"].grad.tobytes()
        assert results[rank][4] == whole.gradient_norm() > 0


def test_a_rank_that_gives_up_ends_the_waits(context):
    world = moe.World(context, 2)
    first, second = world.comm(context, 0, timeout=20), world.comm(context, 1, timeout=20)
    second.abort()
    with pytest.raises(moe.Error, match="rank 1 gave up"):
        first.barrier()
    with pytest.raises(moe.Error, match="has failed before"):
        first.poll()
    with pytest.raises(moe.InvalidState, match="rank 0 of the world is taken"):
        world.comm(context, 0)
