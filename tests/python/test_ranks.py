"""Layers on several ranks: a world of threads against one rank with all tokens and experts."""

import array
import re

import pytest

import moe

np = pytest.importorskip("numpy")

from rank_cases import (  # noqa: E402
    D, E, F, K, assert_same, make, numbers, on_ranks, result, tokens_of, train, train_whole,
)  # fmt: skip

COUNTS = (5, 3, 4)
# Not in order, one rank without experts.
PLACES = ([3, 0], [], [2, 1])
LOSSES = {"importance_weight": 0.3, "switch_weight": 0.2, "z_weight": 0.1}


def train_ranks(counts, places, **fields):
    x, dy, rows = tokens_of(counts)

    def work(rank, context, comm):
        place = places[rank]
        layer = make(context, len(place), comm, placement=place, **fields)
        found = train(layer, x[rows[rank]], dy[rows[rank]])
        found["norm"] = layer.gradient_norm()
        return found

    return on_ranks(len(counts), work)


@pytest.fixture(scope="module")
def whole(context):
    """One rank, and the norm of its gradient."""
    layer = make(context)
    return {**train_whole(COUNTS, layer), "norm": layer.gradient_norm()}


# ---- where the experts are ----------------------------------------------------------------------


def test_any_placement_is_one_rank(whole):
    parts = train_ranks(COUNTS, PLACES)
    assert_same(whole, parts)
    assert all(part["norm"] == whole["norm"] > 0 for part in parts)
    # In order of rank these are other experts, so it is the numbers that count.
    other = train_ranks(COUNTS, ([0, 1], [], [2, 3]))
    assert other[0].keys() != parts[0].keys()
    assert_same(whole, other)


@pytest.mark.parametrize("kind", [
    list, tuple, np.array, lambda p: np.array(p, "uint8"), lambda p: array.array("i", p), iter,
])  # fmt: skip
def test_a_placement_is_any_sequence_of_integers(kind):
    def work(rank, context, comm):
        layer = make(context, 2, comm, placement=kind([[1, 2], [3, 0]][rank]))
        config = layer.config
        assert config.placement and layer.dims.num_experts == E
        assert layer.experts.dims.num_experts == 2
        assert layer.parameters["experts.w1"].shape[0] == 2
        layer.close()
        return layer.closed, config.placement[:2]

    assert on_ranks(2, work) == [(True, [1, 2]), (True, [3, 0])]


def test_experts_have_numbers(context):
    assert make(context).expert_numbers == [0, 1, 2, 3]
    assert make(context).config.expert_slices == 1 and not make(context).config.placement
    alone = make(context, comm=moe.Comm(context), placement=[2, 0, 3, 1])
    assert alone.expert_numbers == [2, 0, 3, 1]
    # The numbers of one layer say nothing of another's pool.
    again = moe.Layer(alone.gate, alone.experts, alone.config, comm=moe.Comm(context))
    assert again.expert_numbers == [0, 1, 2, 3]

    def work(rank, context, comm):
        layer = make(context, len(PLACES[rank]), comm, placement=PLACES[rank])
        rest = make(context, [0, 4, 0][rank], comm)  # in order of rank, most have none
        return layer.expert_numbers, rest.expert_numbers, rest.experts.config.num_experts

    assert on_ranks(3, work) == [
        ([3, 0], [], moe.NO_EXPERTS), ([], [0, 1, 2, 3], 4), ([2, 1], [], moe.NO_EXPERTS),
    ]  # fmt: skip


@pytest.mark.parametrize("places, message", [
    (([0, 1], [2, 9]), r"placement\[1\] of rank 1 is 9; there are 4 experts"),
    (([-3, 1], [2, 3]), r"placement\[0\] of rank 0 is -3"),
    (([0, 1], [1, 2]), "no rank's placement has expert 3"),
])  # fmt: skip
def test_a_wrong_placement_is_refused_on_every_rank(places, message):
    def work(rank, context, comm):
        with pytest.raises(moe.InvalidArgument, match=message):
            make(context, 2, comm, placement=places[rank])
        comm.barrier()  # the group goes on
        return make(context, 2, comm, placement=[[2, 1], [0, 3]][rank]).expert_numbers

    assert on_ranks(2, work) == [[2, 1], [0, 3]]


@pytest.mark.parametrize("placement, error, message", [
    ([0, 1, 2], ValueError, r"placement is [0, 1, 2]: 3 numbers; the pool has 4 experts"),
    ([0, 1, 2.5, 3], TypeError, "placement[2] must be an integer, not 2.5"),
    ([0, "one", 2, 3], TypeError, "placement[1] must be an integer, not 'one'"),
    ([0, 1, 2, 2**63], ValueError, f"placement[3] is {2**63}"),
    (np.zeros((4, 1)), TypeError, "placement[0] must be an integer"),
    (7, TypeError, "placement must be a sequence of integers, not 7"),
])  # fmt: skip
def test_what_is_no_placement_is_refused(context, placement, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make(context, comm=moe.Comm(context), placement=placement)


def test_fields_for_ranks_need_a_comm(context):
    for fields in ({"placement": [0, 1, 2, 3]}, {"expert_slices": 2}, {"max_received": 5},
                   {"exchange": "padded", "padded_rows": 3}):  # fmt: skip
        with pytest.raises(moe.InvalidArgument, match="is given, comm is NULL"):
            make(context, **fields)
    with pytest.raises(ValueError, match="received is 'most'; it can be error, drop_position"):
        make(context, received="most")


def test_replicas_serve_the_ranks_they_are_on(context, whole):
    x, dy, rows = tokens_of(COUNTS[:2])

    def work(rank, context, comm):
        layer = make(context, E, comm, placement=[[0, 1, 2, 3], [3, 2, 1, 0]][rank])
        step = moe.Pass(layer)
        with pytest.raises(moe.NotSupported, match="NO_SAVE"):
            layer.forward(step, x[rows[rank]])
        return layer.forward(step, x[rows[rank]], flags=moe.Forward.NO_SAVE), step.report

    parts = on_ranks(2, work)
    assert np.concatenate([y for y, _ in parts]).tobytes() == whole["y"][: len(x)].tobytes()
    assert [report.rows_sent for _, report in parts] == [0, 0]


def test_a_rank_without_experts_has_parameters_without_elements(context):
    def work(rank, context, comm):
        layer = make(context, E if rank else 0, comm)
        if rank == 0:
            p = layer.parameters["experts.w1"]
            assert p.shape[0] == p.data.size == p.grad.size == 0
            assert layer.experts.touched().shape == (0,)
            p.bind(np.zeros(p.shape), np.zeros(p.shape))
            p.unbind()
        layer.zero_gradients()
        x = numbers(1, 3, D)
        y = layer.forward(moe.Pass(layer), x)
        return y.tobytes() == layer.forward(moe.Pass(layer), x).tobytes()

    assert on_ranks(2, work) == [True, True]


def test_checkpoints_know_experts_by_their_numbers(io, context, tmp_path):
    path = str(tmp_path / "ranks.safetensors")

    def work(rank, context, comm):
        layer = make(context, len(PLACES[rank]), comm, placement=PLACES[rank])
        io.save(path, {"layer.": layer}, comm=comm)
        other = make(context, [1, 2, 1][rank], comm, placement=[[2], [3, 1], [0]][rank])
        for p in other.parameters.values():
            p.data[...] = 0
        io.load(path, {"layer.": other}, comm=comm)
        w1 = other.parameters["experts.w1"].data
        return dict(zip(other.expert_numbers, w1.copy()))

    found, want = on_ranks(3, work), make(context).parameters["experts.w1"].data
    for number, values in {**found[0], **found[1], **found[2]}.items():
        assert values.tobytes() == want[number].tobytes()
    assert sum(map(len, found)) == E


# ---- slices, bounds, padding, losses ------------------------------------------------------------


def test_slices_on_ranks_are_slices_on_one(context):
    counts = COUNTS[:2]
    alone = make(context, 2 * E, moe.Comm(context), expert_slices=2)
    assert alone.expert_numbers == list(range(2 * E))
    whole = train_whole(counts, alone)
    assert_same(whole, train_ranks(counts, ([0, 3, 5, 6, 7], [4, 2, 1]), expert_slices=2))
    # An expert is the sum of its slices: pairs of neighbours side by side.
    wide = make(context, hidden=2 * F)
    for name, p in alone.parameters.items():
        same = wide.parameters[name].data
        if name == "experts.w1":
            same[...] = p.data.reshape(E, 2, D, F).transpose(0, 2, 1, 3).reshape(same.shape)
        else:
            same[...] = p.data.reshape(same.shape)
    assert np.allclose(train_whole(counts, wide)["y"], whole["y"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fields, rounds", [
    ({}, 1),
    ({"received": "chunk", "max_received": 1000}, 1),
    ({"received": "chunk", "max_received": 3}, 4),
    ({"exchange": "padded", "padded_rows": max(COUNTS)}, 1),
])  # fmt: skip
def test_bounds_that_drop_nothing_change_no_byte(whole, fields, rounds):
    parts = train_ranks(COUNTS, PLACES, **fields)
    assert_same(whole, parts)
    assert all(part["stats"].dropped == 0 for part in parts)
    assert {part["report"].rounds == 1 for part in parts} == {rounds == 1}
    assert all(part["report"].rounds >= rounds for part in parts)


def test_more_rows_than_the_bound_are_an_error_on_every_rank(whole):
    x, dy, rows = tokens_of(COUNTS)

    def work(rank, context, comm):
        fields = ({"max_received": 1 if rank == 2 else 0}, {"exchange": "padded", "padded_rows": 1})
        for few in fields:
            layer = make(context, len(PLACES[rank]), comm, placement=PLACES[rank], **few)
            step = moe.Pass(layer)
            with pytest.raises(moe.BufferTooSmall):
                layer.forward(step, x[rows[rank]])
        comm.barrier()

    on_ranks(len(COUNTS), work)


@pytest.mark.parametrize("received", ["drop_score", "drop_position"])
def test_rows_above_the_bound_are_dropped(whole, received):
    x, dy, rows = tokens_of(COUNTS)
    most = [4, 0, 3]  # 0: no bound, of the rank without experts

    def work(rank, context, comm):
        layer = make(
            context, len(PLACES[rank]), comm, placement=PLACES[rank], received=received,
            max_received=most[rank],
        )  # fmt: skip
        step = moe.Pass(layer)
        y = layer.forward(step, x[rows[rank]])
        dx = layer.backward(step, dy[rows[rank]])
        return result(layer, step, y, dx)

    parts = on_ranks(3, work)
    owner = {number: rank for rank, place in enumerate(PLACES) for number in place}
    kept, lost = {0: [], 2: []}, {0: [], 2: []}
    weights = iter(whole["plan"].weight_of_entry)  # before some became 0
    for part in parts:
        plan, stats = part["plan"], part["stats"]
        stays = plan.row_of_entry >= 0
        assert stats.entries == K * stats.tokens == len(stays)
        assert (stats.rows, stats.dropped) == (stays.sum(), (~stays).sum())
        assert not plan.weight_of_entry[~stays].any()
        for expert, here, weight in zip(plan.expert_of_entry, stays, weights):
            (kept if here else lost)[owner[expert]].append(weight)
    assert [len(kept[rank]) for rank in (0, 2)] == [most[0], most[2]]
    assert all(len(lost[rank]) > 0 for rank in lost)
    by_score = all(min(kept[rank]) >= max(lost[rank]) for rank in kept)
    assert by_score == (received == "drop_score")
    assert np.concatenate([part["y"] for part in parts]).tobytes() != whole["y"].tobytes()


def test_losses_of_all_ranks_are_those_of_one(context):
    whole = train_whole(COUNTS, make(context, gate=LOSSES))
    parts = train_ranks(COUNTS, PLACES, gate=LOSSES, loss_batch="global")
    assert whole["losses"].total > 0
    for part in parts:
        assert part["losses"] == whole["losses"]
        assert part["stats"] == whole["stats"]
    assert_same(whole, parts)
    own = train_ranks(COUNTS, PLACES, gate=LOSSES, loss_batch="local")
    assert len({part["losses"] for part in own}) == len(COUNTS)
    assert sum(part["stats"].tokens for part in own) == whole["stats"].tokens


def test_rows_by_way_of_nodes_are_one_rank(whole):
    x, dy, rows = tokens_of(COUNTS)
    rail = moe.World(moe.Context(threads=1), 3)  # three nodes of one rank

    def work(rank, context, comm):
        place, across = PLACES[rank], rail.comm(context, rank, timeout=20)
        layer = make(context, len(place), comm, placement=place,
                     node_comm=moe.Comm(context), rail_comm=across)  # fmt: skip
        found = train(layer, x[rows[rank]], dy[rows[rank]])
        with pytest.raises(moe.InvalidArgument, match="node_comm is given, rail_comm is NULL"):
            make(context, len(place), comm, placement=place, node_comm=moe.Comm(context))
        return found

    parts = on_ranks(3, work)
    assert_same(whole, parts)
    for part in parts:
        report = part["report"]
        assert 0 < report.rows_to_nodes <= report.rows_sent
        assert 0 < report.forward_bytes_to_nodes < report.forward_bytes_sent


# ---- report -------------------------------------------------------------------------------------


def test_the_report_counts_rows_and_bytes(context):
    x, dy, rows = tokens_of(COUNTS)

    def work(rank, context, comm):
        layer = make(context, len(PLACES[rank]), comm, placement=PLACES[rank])
        step = moe.Pass(layer)
        with pytest.raises(moe.InvalidState, match="has had no forward"):
            step.report
        layer.forward(step, x[rows[rank]])
        forward, experts = step.report, step.plan.arrays().expert_of_entry
        layer.backward(step, dy[rows[rank]])
        return forward, step.report, experts

    parts = on_ranks(3, work)
    owner = np.array([0, 2, 2, 0])
    for rank, (forward, backward, experts) in enumerate(parts):
        here = [(owner[other] == rank).sum() for r, (_, _, other) in enumerate(parts) if r != rank]
        assert forward.rows_sent == (owner[experts] != rank).sum()
        assert forward.rows_received == sum(here)
        assert forward.rounds == 1
        # Rows of x with their weights there, rows of y back, and what is said beforehand.
        least = 8 * (forward.rows_sent * (D + 1) + forward.rows_received * D)
        assert least < forward.forward_bytes_sent < least + 1000
        assert forward.backward_bytes_sent == forward.backward_bytes_received == 0
        least = 8 * (forward.rows_sent * D + forward.rows_received * (D + 1))
        assert least < backward.backward_bytes_sent < least + 1000
        names = [name.lower() for name in moe.Time.__members__]
        assert list(forward.forward_seconds) == list(forward.backward_seconds) == names
        assert all(value >= 0 for value in forward.forward_seconds.values())
        assert sum(forward.forward_seconds.values()) > 0
        assert set(forward.backward_seconds.values()) == {0}
        assert sum(backward.backward_seconds.values()) > 0
        assert backward.forward_seconds == forward.forward_seconds
    for direction in ("forward", "backward"):
        sent = sum(getattr(part[1], direction + "_bytes_sent") for part in parts)
        assert sent == sum(getattr(part[1], direction + "_bytes_received") for part in parts)


def test_one_rank_reports_no_rows(context):
    report = train_whole(COUNTS, make(context))["report"]
    assert report[2:] == (0,) * 10
    assert report.forward_seconds["exchange"] == 0 < report.forward_seconds["experts"]
    assert report.backward_seconds["experts"] > 0


# ---- a rank that gives up -----------------------------------------------------------------------


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
