"""Checkpoints of moe.io: layers, values and arrays, over layouts and on two ranks."""

import os
import threading

import pytest

import moe

np = pytest.importorskip("numpy")
from io_cases import D, E, F, draw, layer_of, numbers, part_of, same  # noqa: E402 - needs numpy

pytestmark = pytest.mark.usefixtures("io")


def moments_of(layer, first=0):
    parameters = layer.parameters.items()
    return {name: part_of(name, p, 100 + i, first) for i, (name, p) in enumerate(parameters)}


def test_a_layers_checkpoint_goes_round(safetensors, context, tmp_path):
    path, layer, step = tmp_path / "a.safetensors", layer_of(context), np.array(17)
    draw(layer)
    m = moments_of(layer)
    items = {"layers.3.": layer, "m.": moe.io.Values(layer, m), "step": step}
    moe.io.save(path, items, metadata={"run": "7"})
    found = safetensors.numpy.load_file(path)
    w1 = layer.parameters["experts.w1"]
    assert w1.shape == (E, D, F)
    for e in range(E):
        assert same(found[f"layers.3.experts.{e}.w1"], np.ascontiguousarray(w1.data[e].T))
        assert same(found[f"m.experts.{e}.w1"], np.ascontiguousarray(m["experts.w1"][e].T))
    assert found["step"] == 17
    other = layer_of(context, pool={"weight_layout": "out_in", "glu_order": "interleaved"})
    x = numbers(9, 5, D)
    assert moe.io.load(path, {"layers.3.": other}, lenient=True).loaded * 2 + 1 == len(found)
    assert same(other.forward(moe.Pass(other), x), layer.forward(moe.Pass(layer), x))
    back, again = layer_of(context), {name: np.zeros_like(v) for name, v in m.items()}
    number = np.zeros((), "int64")
    report = moe.io.load(
        path, {"layers.3.": back, "m.": moe.io.Values(back, again), "step": number}
    )
    assert report == moe.io.LoadReport(len(found), 0, 0) and number == 17
    for name, p in layer.parameters.items():
        assert same(back.parameters[name].data, p.data) and same(again[name], m[name]), name
    before = path.read_bytes()
    moe.io.save(path, {"layers.3.": other, "m.": moe.io.Values(back, again), "step": number},
                metadata={"run": "7"})  # fmt: skip
    assert path.read_bytes() == before  # whatever the layout


def test_what_another_program_wrote_is_loaded(safetensors, context, tmp_path):
    layer, path = layer_of(context, around=False, pool={"bias": 0}), tmp_path / "a.safetensors"
    draw(layer)
    data = {name: p.data for name, p in layer.parameters.items()}
    tensors = {"gate.weight": data["gate.weight"].copy()}
    for e in range(E):
        for name in ("w1", "w3", "w2"):
            tensors[f"experts.{e}.{name}"] = np.ascontiguousarray(data["experts." + name][e].T)
    safetensors.numpy.save_file(
        {name: t.astype("float32") for name, t in tensors.items()}, path
    )
    other = layer_of(context, around=False, pool={"bias": 0})
    with pytest.raises(moe.InvalidArgument, match="F64.*F32|F32.*F64"):
        moe.io.load(path, {"": other})
    assert moe.io.load(path, {"": other}, convert=True).loaded == 1 + 3 * E
    for name, p in other.parameters.items():
        assert same(p.data, data[name].astype("float32").astype("float64")), name


def test_strict_and_lenient_loads(context, tmp_path):
    layer, path, lines = layer_of(context), tmp_path / "a", []
    draw(layer)
    before = {name: p.data.copy() for name, p in layer.parameters.items()}
    moe.io.save(path, {"": layer, "left": np.arange(3), "n": np.arange(4)})
    n, more = np.zeros(4, "int64"), np.full(2, 9.0)
    for p in layer.parameters.values():
        p.data[...] = 0
    with pytest.raises(moe.InvalidArgument, match="more"):
        moe.io.load(path, {"": layer, "left": np.zeros(3, int), "n": n, "more": more})
    with pytest.raises(moe.InvalidArgument, match="left"):
        moe.io.load(path, {"": layer, "n": n})
    with pytest.raises(moe.InvalidArgument, match=r"n.*\[5\].*\[4\]|n.*\[4\].*\[5\]"):
        moe.io.load(path, {"": layer, "n": np.zeros(5, int)}, lenient=True)
    assert not n.any() and not any(p.data.any() for p in layer.parameters.values())
    report = moe.io.load(path, {"": layer, "n": n, "more": more}, lenient=True,
                         report=lambda level, text: lines.append(text))  # fmt: skip
    assert report == moe.io.LoadReport(len(moe.io.File(path)) - 1, 1, 1)
    assert len(lines) == 2 and any("more" in line for line in lines)
    assert any("left" in line for line in lines)
    assert n.tolist() == [0, 1, 2, 3] and more.tolist() == [9, 9]
    assert all(same(p.data, before[name]) for name, p in layer.parameters.items())

    def fail(level, text):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        moe.io.load(path, {"": layer, "n": n}, lenient=True, report=fail)


def test_bound_parameters_are_written_only_if_allowed(context, tmp_path):
    layer, path = layer_of(context), tmp_path / "a"
    draw(layer)
    weights = layer.parameters["gate.weight"].data.copy()
    moe.io.save(path, {"": layer})
    mine = np.zeros_like(weights)
    layer.parameters["gate.weight"].bind(mine)
    with pytest.raises(moe.InvalidState, match="gate.weight.*write_bound"):
        moe.io.load(path, {"": layer})
    assert not mine.any()
    moe.io.load(path, {"": layer}, write_bound=True)
    assert same(mine, weights)


def test_items_are_checked_by_name(context, tmp_path):
    layer, path = layer_of(context), tmp_path / "a"
    moe.io.save(path, {"old": np.arange(2)})
    before = path.read_bytes()
    values, shape = moe.io.Values, layer.parameters["gate.weight"].shape
    read_only = np.zeros(2)
    read_only.flags.writeable = False
    for items, error, says in (
        ({"x": [1, 2]}, TypeError, "x must be an array.*list"),
        ({"x": np.zeros(2, "uint8")}, TypeError, "x holds uint8"),
        ({"x": np.zeros((4, 4))[:, ::2]}, ValueError, "x: shape.*not contiguous"),
        ({"x": np.zeros((1,) * 9)}, ValueError, "x has shape .*at most 8"),
        ({"m.": values(layer, {"gate.wait": 0})}, ValueError, "did you mean gate.weight"),
        ({"m.": values(layer, {"gate.weight": np.ones(3)})}, ValueError, "m.gate.weight has shape"),
        ({"m.": values(layer, {"gate.weight": np.zeros(shape, "f")})}, TypeError, "wanted float64"),
        ({"a\0": np.zeros(1)}, ValueError, "NUL"),
        ({5: np.zeros(1)}, TypeError, "name of an item must be a str, not 5"),
        ({"": np.zeros(1)}, moe.InvalidArgument, "no name"),
        ({"": layer, "gate.weight": np.zeros(1)}, moe.InvalidArgument, "gate.weight"),
        ({}, moe.InvalidArgument, "count is 0"),
    ):
        with pytest.raises(error, match=says):
            moe.io.save(path, items)
    for options, error, says in (
        ({"metadata": {"a": 1}}, TypeError, "metadata a must be a str, not 1"),
        ({"metadata": {"libmoe.x": ""}}, moe.InvalidArgument, "libmoe.x"),
        ({"store_dtype": "int32"}, moe.InvalidArgument, "store_dtype"),
        ({"store_dtype": "f99"}, ValueError, "store_dtype is 'f99'"),
    ):
        with pytest.raises(error, match=says):
            moe.io.save(path, {"": layer}, **options)
    with pytest.raises(ValueError, match="old is read-only"):
        moe.io.load(path, {"old": read_only})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a"]
    with pytest.raises(moe.SystemRefused, match="nowhere"):
        moe.io.save(tmp_path / "nowhere" / "a", {"x": np.zeros(1)})


def test_a_layer_in_a_call_is_neither_saved_nor_loaded(context, tmp_path):
    path, inside = tmp_path / "a", []

    def forward(call):
        call.out[...] = call.x
        for what in (moe.io.save, moe.io.load):
            try:
                what(path, {"": layer})
            except moe.InvalidState as error:
                inside.append(str(error))

    pool = moe.Experts(context, d_model=D, num_experts=E, callbacks=forward)
    layer = moe.Layer(moe.Gate(context, d_model=D, num_experts=E, top_k=1), pool)
    layer.init_parameters(1)
    moe.io.save(path, {"": layer})
    layer.forward(moe.Pass(layer), np.ones((1, D), "float32"))
    assert len(inside) == 2 and all("in use by another call" in text for text in inside)
    moe.io.load(path, {"": layer})


# ---- ranks --------------------------------------------------------------------------------------


def on_two_ranks(context, work):
    """work(layer, first, comm) on a world of two threads, with one expert and with E - 1."""
    world, results = moe.World(context, 2), {}

    def run(rank):
        own = moe.Context(threads=1)
        try:
            with world.comm(own, rank, timeout=20) as comm:
                layer = layer_of(own, experts=1 if rank == 0 else E - 1, comm=comm)
                results[rank] = work(layer, rank, comm)
        except Exception as error:  # the assertion of the caller shows it
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results[0], results[1]


def test_a_checkpoint_of_two_ranks_is_that_of_one(context, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    whole = layer_of(context)
    draw(whole)
    moe.io.save(one, {"": whole, "m.": moe.io.Values(whole, moments_of(whole)), "n": np.arange(3)})

    def save(layer, first, comm):
        draw(layer, first)
        moments = moe.io.Values(layer, moments_of(layer, first))
        moe.io.save(two, {"": layer, "m.": moments, "n": np.arange(3)}, comm=comm)

    assert on_two_ranks(context, save) == (None, None)
    assert two.read_bytes() == one.read_bytes() and sorted(os.listdir(tmp_path)) == ["one", "two"]

    def load(layer, first, comm):
        again = {name: np.zeros(p.shape) for name, p in layer.parameters.items()}
        n = np.zeros(3, "int64")
        items = {"": layer, "m.": moe.io.Values(layer, again), "n": n}
        report = moe.io.load(one, items)
        expected = moments_of(layer, first)
        assert n.tolist() == [0, 1, 2]
        assert all(same(again[name], value) for name, value in expected.items())
        drawn = {name: p.data.copy() for name, p in layer.parameters.items()}
        draw(layer, first)
        assert all(same(p.data, drawn[name]) for name, p in layer.parameters.items())
        return report

    count = len(moe.io.File(one))
    assert on_two_ranks(context, load) == ((count, 0, 0), (count, 0, 0))
    back = layer_of(context)
    moe.io.load(two, {"": back}, lenient=True)
    assert all(same(p.data, whole.parameters[name].data) for name, p in back.parameters.items())


def test_arrays_alone_need_the_communicator(context, tmp_path):
    path = tmp_path / "a"

    def work(layer, rank, comm):
        moe.io.save(path, {"x": np.full(3, 5.0 + rank)}, comm=comm)
        x = np.zeros(3)
        report = moe.io.load(path, {"x": x}, comm=comm)
        try:
            moe.io.load(path, {"x": np.zeros(3 + rank)}, comm=comm)
        except moe.InvalidArgument as error:
            return x.tolist(), report, "[3]" in str(error) and "[4]" in str(error)

    # Rank 0's array, on both; and both hear of rank 1's mistake.
    assert on_two_ranks(context, work) == 2 * (([5.0, 5.0, 5.0], (1, 0, 0), True),)
    assert os.listdir(tmp_path) == ["a"]


def test_every_rank_gets_the_verdict(context, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def save(layer, first, comm):
        moe.io.save(path, {"": layer, f"of rank {first}": np.zeros(1)})

    for error in on_two_ranks(context, save):
        assert isinstance(error, moe.InvalidArgument), error
        assert "rank 1 has other names" in str(error)

    def load(layer, first, comm):
        moe.io.load(path, {"": layer})

    first, second = on_two_ranks(context, load)
    assert isinstance(first, moe.CorruptData) and isinstance(second, moe.CorruptData)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]
