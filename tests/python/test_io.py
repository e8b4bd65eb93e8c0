"""moe.io: files against the safetensors package, checkpoints over layouts and ranks, models' names,
dense networks, and what is refused."""

import gc
import json
import os
import struct
import threading

import pytest

import moe

np = pytest.importorskip("numpy")
pytestmark = pytest.mark.usefixtures("io")

D, F, E, K = 6, 5, 4, 2
KNOWN = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32",
         "uint16", "uint8", "bool", "complex64"]  # fmt: skip
SAVED = ["float64", "float32", "float16", "int64", "int32"]


@pytest.fixture(scope="module")
def safetensors():
    pytest.importorskip("safetensors.numpy")
    import safetensors

    return safetensors


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def of_dtype(dtype, *shape):
    """Bits drawn at random; only what compares equal to itself."""
    rng = np.random.default_rng(7)
    if dtype == "bool":
        return rng.integers(2, size=shape).astype(bool)
    if dtype == "complex64":
        return (numbers(1, *shape) + 1j * numbers(2, *shape)).astype(dtype)
    if dtype.startswith("float"):
        return (100 * numbers(3, *shape)).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, size=shape, dtype=dtype, endpoint=True)


def bf16_bits(x):
    """float32 to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, "float32").view("uint32")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("uint16")


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def write(path, header, data=b"", length=None):
    """A file of a header as JSON, or as it is, and bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# ---- files --------------------------------------------------------------------------------------


def test_what_safetensors_wrote_is_read(safetensors, tmp_path):
    tensors = {dtype: of_dtype(dtype, 4, 3) for dtype in KNOWN}
    tensors.update(scalar=np.array(2.5), empty=np.zeros((0, 3), "f"), deep=numbers(5, 2, 1, 3, 2))
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata={"by": "ümlaut", "": "empty"})
    with moe.io.File(path) as file:
        assert list(file) == sorted(tensors) and len(file) == len(tensors)
        assert dict(file.metadata) == {"by": "ümlaut", "": "empty"}
        assert file.metadata["by"] == "ümlaut" and "nobody" not in file.metadata
        for name, expected in tensors.items():
            entry = file.entry(name)
            assert (entry.name, entry.shape, entry.dtype, entry.bytes, entry.path) == (
                name, expected.shape, str(expected.dtype), expected.nbytes, str(path))  # fmt: skip
            assert same(file[name], expected), name
            with open(path, "rb") as raw:
                raw.seek(entry.offset)
                assert raw.read(entry.bytes) == expected.tobytes()
        assert [entry.name for entry in file.entries()] == list(file)


def test_what_is_saved_safetensors_reads(safetensors, tmp_path):
    tensors = {dtype: of_dtype(dtype, 3, 2) for dtype in SAVED}
    tensors.update(scalar=np.array(7), empty=np.zeros((2, 0)), deep=numbers(5, *range(1, 9)))
    path = tmp_path / "a.safetensors"
    moe.io.save(path, tensors, metadata={"by": "ümlaut"})
    found = safetensors.numpy.load_file(path)
    assert set(found) == set(tensors)
    for name, expected in tensors.items():
        assert same(found[name], expected), name
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"by": "ümlaut", "libmoe.checkpoint": "1"}


def test_bfloat16_and_small_floats_are_bits_or_numbers(safetensors, tmp_path):
    bits = np.array([[0x3F80, 0xC049, 0x0001], [0x7F80, 0x8000, 0x3EAB]], "uint16")
    small = np.arange(256, dtype="uint8").reshape(16, 16)
    specs = {
        name: safetensors.TensorSpec(
            dtype=dtype, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, dtype, array in (("half", "bfloat16", bits), ("small", "float8_e4m3fn", small),
                                   ("other", "float8_e5m2", small))
    }  # fmt: skip
    safetensors.serialize_file(specs, tmp_path / "a.safetensors")
    wide = (bits.astype("uint32") << 16).view("float32")
    with moe.io.File(tmp_path / "a.safetensors") as file:
        assert [file.entry(name).dtype for name in ("half", "small", "other")] == [
            "bfloat16", "float8_e4m3fn", "float8_e5m2"]  # fmt: skip
        assert same(file["half"], wide)
        assert same(file.read("half", dtype="bfloat16"), bits)
        assert same(file.read("half", 1, dtype="float64"), wide[1:].astype("float64"))
        assert same(file["small"], small) and same(file["other"], small)
        with pytest.raises(moe.NotSupported, match="small"):
            file.read("small", dtype="float32")


def test_saving_as_bfloat16_rounds_to_even(safetensors, tmp_path):
    x = numbers(1, 50, 3).astype("float32")
    ties = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF], "uint32").view("float32")
    path = tmp_path / "a.safetensors"
    moe.io.save(path, {"x": x, "ties": ties, "n": np.arange(3)}, store_dtype="bfloat16")
    found = dict(safetensors.deserialize(path.read_bytes()))
    assert found["x"]["dtype"] == "BF16" and found["n"]["dtype"] == "I64"
    assert bytes(found["x"]["data"]) == bf16_bits(x).tobytes()
    assert bytes(found["ties"]["data"]) == np.array([0x3F80, 0x3F82, 0x7F80], "uint16").tobytes()


def test_arrays_of_other_packages(tmp_path):
    torch = pytest.importorskip("torch")
    x = torch.arange(6, dtype=torch.float32).reshape(2, 3).to(torch.bfloat16)
    moe.io.save(tmp_path / "a", {"x": x})
    back = torch.zeros(2, 3, dtype=torch.bfloat16)
    with moe.io.File(tmp_path / "a") as file:
        assert file.entry("x").dtype == "bfloat16"
        assert file.read("x", out=back) is back and torch.equal(back, x)
        assert file["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert moe.io.load(tmp_path / "a", {"x": torch.zeros_like(x)}).loaded == 1


def test_arrays_of_ml_dtypes(tmp_path):
    ml = pytest.importorskip("ml_dtypes")
    x = numbers(1, 4, 3).astype(ml.bfloat16)
    moe.io.save(tmp_path / "a", {"x": x})
    with moe.io.File(tmp_path / "a") as file:
        assert same(file.read("x", dtype=ml.bfloat16), x)
        assert same(file.read("x", dtype="bfloat16"), x.view("uint16"))
        back = np.zeros_like(x)
        assert same(file.read("x", out=back), x)


def test_ranges_and_conversions(tmp_path):
    x, n = numbers(1, 7, 2, 3), np.array([1, -5, 2**31 - 1])
    moe.io.save(tmp_path / "a", {"x": x, "n": n, "one": np.array(1.5), "big": n + 1})
    with moe.io.File(tmp_path / "a") as file:
        assert same(file.read("x", 2, 3), x[2:5])
        assert same(file.read("x", 5), x[5:])
        assert file.read("x", 7).shape == (0, 2, 3)
        assert same(file.read("x", dtype=np.float32), x.astype("float32"))
        assert same(file.read("x", dtype=moe.DType.F16), x.astype("float16"))
        assert same(file.read("x", 6, dtype="bfloat16"), bf16_bits(x[6:]))
        assert same(file.read("n", dtype="int32"), n.astype("int32"))
        assert same(file.read("one", dtype="float32"), np.array(1.5, "float32"))
        out = np.zeros((2, 2, 3), "float32")
        assert file.read("x", 1, 2, out=out) is out and same(out, x[1:3].astype("float32"))
        for first, count in ((-1, 2), (6, 2), (8, None), (0, -1), (0, 8)):
            with pytest.raises(ValueError, match=f"first is {first} .*dimension of x is 7"):
                file.read("x", first, count)
        with pytest.raises(moe.SizeOverflow, match="big"):
            file.read("big", dtype="int32")
        with pytest.raises(moe.NotSupported, match="x"):
            file.read("x", dtype="int32")
        with pytest.raises(ValueError, match=r"out has shape \(3,\); wanted \(7, 2, 3\)"):
            file.read("x", out=np.zeros(3))
        with pytest.raises(ValueError, match="out.*not contiguous"):
            file.read("x", out=np.zeros((7, 2, 6))[..., ::2])
        with pytest.raises(TypeError, match="out holds float64.*wanted float32"):
            file.read("x", dtype="float32", out=np.zeros(x.shape))
        with pytest.raises(ValueError, match="dtype is 'float31'"):
            file.read("x", dtype="float31")
        with pytest.raises(KeyError, match="has no tensor 'y'"):
            file["y"]
        assert "y" not in file and "x" in file and "x\0" not in file and 3 not in file


def test_a_sharded_model_by_index_and_directory(safetensors, tmp_path):
    parts = [{"a": numbers(1, 3), "c": numbers(2, 2, 2)}, {"b": numbers(3, 4)}]
    weights = {}
    for i, tensors in enumerate(parts):
        name = f"model-{i + 1:05}-of-00002.safetensors"
        safetensors.numpy.save_file(tensors, tmp_path / name)
        weights.update(dict.fromkeys(tensors, name))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 88}, "weight_map": weights}))
    for path in (index, tmp_path, str(tmp_path), os.fsencode(tmp_path)):
        with moe.io.File(path) as file:
            assert list(file) == ["a", "b", "c"]
            assert file.metadata["total_size"] == "88"
            assert os.path.basename(file.entry("b").path) == weights["b"]
            for name, expected in {**parts[0], **parts[1]}.items():
                assert same(file[name], expected)
    index.write_text(json.dumps({"metadata": {}, "weight_map": {**weights, "d": weights["b"]}}))
    with pytest.raises(moe.CorruptData, match="d"):
        moe.io.File(index)


U8 = b'"t":{"dtype":"U8","shape":[4],"data_offsets":'
HOSTILE = {
    "short": (b"\x05\0", "has 2 bytes, too few"),
    "length": (struct.pack("<Q", 2**63 - 1) + b"{}", "would have 9223372036854775807 bytes"),
    "object": ({"a": 1}, "a is no object"),
    "json": (b"{'a'}", "a.safetensors, byte 2"),
    "dtype": ({"t": tensor("F31", [1], 0, 4)}, "t has the unknown dtype F31"),
    "overlap": ({"t": tensor("F32", [1], 0, 4), "u": tensor("F32", [1], 2, 6)}, "u .*byte 2.* t"),
    "hole": ({"t": tensor("F32", [1], 4, 8)}, "bytes 0 to 3 .*before t"),
    "size": ({"t": tensor("F32", [3], 0, 8)}, "t has 8 bytes by its offsets, 12 by its shape"),
    "negative": ({"t": tensor("F32", [-1], 0, 4)}, r"shape\[0\] of t is no size: -1"),
    "product": ({"t": tensor("F32", [2**40, 2**40], 0, 8)}, "shape of t does not fit"),
    "beyond": ({"t": tensor("F32", [4], 0, 16)}, "t ends at byte 16 of 8"),
    "twice": (b"{" + U8 + b"[0,4]}," + U8 + b"[4,8]}}", 'duplicate object key.*"t"'),
    "control": ({"t\0u": tensor("F32", [2], 0, 8)}, "NUL byte in object key"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_broken_file_is_refused_by_name_and_value(case, tmp_path):
    header, says = HOSTILE[case]
    path = tmp_path / "a.safetensors"
    if case in ("short", "length"):
        path.write_bytes(header)
    else:
        write(path, header, bytes(8))
    with pytest.raises(moe.CorruptData, match=says):
        moe.io.File(path)
    into = np.zeros(1, "float32")
    with pytest.raises(moe.CorruptData, match=says):
        moe.io.load(path, {"t": into}, lenient=True)
    assert not into.any()


def test_a_file_that_is_not_there_or_shrinks(tmp_path):
    with pytest.raises(moe.SystemRefused, match="nowhere.*No such file"):
        moe.io.File(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="NUL"):
        moe.io.File("a\0b")
    path = tmp_path / "a"
    moe.io.save(path, {"x": numbers(1, 1000)})
    with moe.io.File(path) as file:
        os.truncate(path, 1000)
        with pytest.raises(moe.SystemRefused, match=str(path)):
            file["x"]
    assert file.closed and "closed" in repr(file)
    with pytest.raises(moe.InvalidState, match="closed"):
        file["x"]


def test_a_file_is_closed_with_its_last_user(tmp_path):
    moe.io.save(tmp_path / "a", {"x": np.arange(3)})
    before = len(os.listdir("/proc/self/fd"))
    files = [moe.io.File(tmp_path / "a") for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before + 5
    metadata = files[0].metadata
    assert files[0] != files[1] and len(set(files)) == 5
    files[0].close()
    del files
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(moe.InvalidState):
        len(metadata)


def test_threads_read_one_file(tmp_path):
    x = numbers(1, 64, 100)
    moe.io.save(tmp_path / "a", {"x": x})
    wrong = []
    with moe.io.File(tmp_path / "a") as file:

        def run(seed):
            for row in np.random.default_rng(seed).integers(64, size=200):
                if not same(file.read("x", int(row), 1), x[row : row + 1]):
                    wrong.append(row)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_files_without_numpy(script, tmp_path):
    path = tmp_path / "a"
    moe.io.save(path, {"x": np.array([[1, 2], [3, 4.5]]), "h": np.ones(2, "float16")})
    text = script(
        "import sys\nsys.modules['numpy'] = None\nimport array, moe\n"
        "with moe.io.File(sys.argv[1]) as file:\n"
        "    print(file['x'].tolist(), file.read('x', 1, dtype='float32').tolist())\n"
        "    try: file['h']\n"
        "    except TypeError as error: print(error)\n"
        "    print(file.read('h', dtype='float64').tolist())\n"
        "moe.io.save(sys.argv[1], {'n': array.array('q', [5, 6])})\n"
        "print(moe.io.File(sys.argv[1])['n'].tolist())\n",
        str(path),
    )
    assert text.splitlines() == [
        "[[1.0, 2.0], [3.0, 4.5]] [[3.0, 4.5]]", "h: an array of float16 needs numpy, or give out=",
        "[1.0, 1.0]", "[5, 6]"]  # fmt: skip


# ---- checkpoints --------------------------------------------------------------------------------


def layer_of(context, experts=E, comm=None, pool=(), gate=(), around=True):
    """A layer of E experts, of which this rank has some; around them a shared one and its gate."""
    gate = {"d_model": D, "num_experts": E, "top_k": K, "dtype": "float64", **dict(gate)}
    pool = {"d_model": D, "d_hidden": F, "dtype": "float64", "activation": "swiglu", "bias": 1,
            **dict(pool)}  # fmt: skip
    shared = moe.Experts(context, **pool, num_experts=1) if around else None
    return moe.Layer(moe.Gate(context, **gate), moe.Experts(context, **pool, num_experts=experts),
                     shared=shared, shared_gate=int(around), comm=comm)  # fmt: skip


def part_of(name, p, seed, first):
    """What a rank has of numbers that are the same on all; its experts are those from first on."""
    if name.startswith("experts."):
        return numbers(seed, E, *p.shape[1:])[first : first + p.shape[0]].copy()
    return numbers(seed, *p.shape)


def draw(layer, first=0):
    for i, (name, p) in enumerate(layer.parameters.items()):
        p.data[...] = part_of(name, p, i, first)


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


# ---- models -------------------------------------------------------------------------------------


def mixtral_file(safetensors, path, block=3):
    """A block as transformers names it, and the reference's parameters of it, in double."""
    prefix = f"model.layers.{block}.block_sparse_moe."
    gate = numbers(1, E, D).astype("float32")
    weights = {"w1": numbers(2, E, F, D), "w3": numbers(3, E, F, D), "w2": numbers(4, E, D, F)}
    tensors = {prefix + "gate.weight": gate, "model.norm.weight": numbers(5, D).astype("float32")}
    p = {"gate.weight": gate.T.astype("float64")}
    for name, w in weights.items():
        w = w.astype("float32")
        p["experts." + name] = np.swapaxes(w, 1, 2).astype("float64")
        for e in range(E):
            tensors[f"{prefix}experts.{e}.{name}.weight"] = np.ascontiguousarray(w[e])
    safetensors.numpy.save_file(tensors, path)
    return tensors, p


def mixtral_layer(context, **fields):
    sizes = {"d_model": D, "d_hidden": F, "num_experts": E, "dtype": "float64"}
    return moe.preset("mixtral", **sizes, **fields).make(context)


def test_import_of_a_mixtral_block_computes_what_numpy_does(safetensors, context, tmp_path):
    import reference

    path = tmp_path / "model.safetensors"
    tensors, p = mixtral_file(safetensors, path)
    model = reference.Layer(
        {"num_experts": E, "top_k": 2, "order": "score_then_select", "renormalize": 1},
        {"activation": "swiglu"},
    )
    x = numbers(6, 11, D)
    expected, _, _ = model.run(x, p)
    for source in (path, tmp_path, moe.io.File(path)):
        for fields in ({}, {"weight_layout": "out_in", "glu_order": "up_gate"}):
            layer = mixtral_layer(context, **fields)
            moe.io.import_(layer, source, "mixtral", 3)
            y = layer.forward(moe.Pass(layer), x)
            np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-13)
    moe.io.export(tmp_path / "out", layer, moe.io.Family.MIXTRAL, 3, store_dtype="float32",
                  metadata={"format": "pt"})  # fmt: skip
    assert moe.io.File(tmp_path / "out").metadata["format"] == "pt"
    found = safetensors.numpy.load_file(tmp_path / "out")
    assert set(found) == set(tensors) - {"model.norm.weight"}
    assert all(same(found[name], tensors[name]) for name in found)


def test_what_the_names_lack_and_bound_memory_are_options(safetensors, context, tmp_path):
    mixtral_file(safetensors, tmp_path / "a")
    layer, n = layer_of(context), dense_network(F)
    draw(layer)
    shared, mine = layer.parameters["shared.w1"].data.copy(), np.zeros((E, D, F))
    with pytest.raises(moe.InvalidArgument, match="b1|shared"):
        moe.io.import_(layer, tmp_path / "a", "mixtral", 3)
    moe.io.import_(layer, tmp_path / "a", "mixtral", 3, lenient=True)
    w1 = layer.parameters["experts.w1"].data.copy()
    assert same(w1, mixtral_file(safetensors, tmp_path / "a")[1]["experts.w1"])
    assert same(layer.parameters["shared.w1"].data, shared)
    layer.parameters["experts.w1"].bind(mine)
    for call in (lambda **o: moe.io.import_(layer, tmp_path / "a", "mixtral", 3, lenient=True, **o),
                 lambda **o: moe.io.upcycle(layer, **n, **o)):  # fmt: skip
        mine[...] = 0
        with pytest.raises(moe.InvalidState, match="experts.w1.*write_bound"):
            call()
        assert not mine.any()
        call(write_bound=True)
        assert mine.all()


def test_names_of_ones_own(safetensors, context, tmp_path):
    mixtral_file(safetensors, tmp_path / "a")
    layer = mixtral_layer(context)
    moe.io.import_(layer, tmp_path / "a", "mixtral", 3)
    names = moe.io.family_names("qwen3_moe")
    assert names.w1 == "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"
    assert names.weight_layout == moe.WeightLayout.OUT_IN and names.gate_bias is None
    fused = names._replace(w1=None, w3=None, w13="b{layer}.up", w2="b{layer}.down",
                           gate="b{layer}.g", weight_layout="in_out",
                           glu_order=moe.Glu.INTERLEAVED)  # fmt: skip
    moe.io.export(tmp_path / "b", layer, names=fused, block=5)
    with moe.io.File(tmp_path / "b") as file:
        assert {name: file.entry(name).shape for name in file} == {
            "b5.down": (E, F, D), "b5.g": (E, D), "b5.up": (E, D, 2 * F)}  # fmt: skip
        up = file["b5.up"]
    assert same(np.ascontiguousarray(up[..., ::2]), layer.parameters["experts.w1"].data)
    other = mixtral_layer(context)
    moe.io.import_(other, tmp_path / "b", names=fused, block=5)
    assert all(same(p.data, layer.parameters[name].data) for name, p in other.parameters.items())
    assert moe.io.TensorNames(gate="g").glu_order == moe.Glu.GATE_UP


@pytest.mark.parametrize("family", moe.io.Family)
def test_every_family_has_names(family):
    names = moe.io.family_names(family)
    assert names == moe.io.family_names(family.name.lower())
    assert "{layer}" in names.gate and "{layer}" in names.w2


def test_what_import_refuses(safetensors, context, tmp_path):
    mixtral_file(safetensors, tmp_path / "a")
    layer = mixtral_layer(context)
    for options, error, says in (
        ({"family": "mixtral", "block": 4}, moe.InvalidArgument, r"model\.layers\.4\."),
        ({"family": "mixtral", "block": -1}, moe.InvalidArgument, "-1"),
        ({"family": "qwen3_moe", "block": 3}, moe.InvalidArgument, r"mlp\.gate\.weight"),
        ({"family": "nonesuch"}, ValueError, "family is 'nonesuch'; it can be mixtral"),
        ({"family": 99}, moe.InvalidArgument, "99"),
        ({}, TypeError, "a family or names"),
        ({"names": moe.io.TensorNames(gate="a\0")}, ValueError, "NUL"),
    ):
        with pytest.raises(error, match=says):
            moe.io.import_(layer, tmp_path / "a", **options)
    wide = moe.preset("mixtral", d_model=D, d_hidden=F + 1, num_experts=E).make(context)
    before = [p.data.copy() for p in wide.parameters.values()]
    with pytest.raises(moe.InvalidArgument, match=r"\[6,6\].*\[5,6\]|\[5,6\].*\[6,6\]"):
        moe.io.import_(wide, tmp_path / "a", "mixtral", 3)
    assert all(same(p.data, old) for p, old in zip(wide.parameters.values(), before))
    with pytest.raises(moe.InvalidArgument, match="b1|bias"):
        moe.io.export(tmp_path / "b", layer_of(context, around=False), "mixtral")
    assert not (tmp_path / "b").exists()


# ---- from a dense network -----------------------------------------------------------------------


def dense_layer(context, **fields):
    fields = {"renormalize": 1, "order": "score_then_select", **fields}
    return layer_of(context, around=False, gate=fields)


def dense_network(width):
    w1, w3, w2 = numbers(1, width, D), numbers(2, width, D), numbers(3, D, width)
    return {"w1": w1, "w3": w3, "w2": w2, "b1": numbers(4, width), "b2": numbers(5, D)}


def dense_forward(n, x):
    h = x @ n["w1"].T + n["b1"]
    return (h / (1 + np.exp(-h)) * (x @ n["w3"].T)) @ n["w2"].T + n["b2"]


@pytest.mark.parametrize("way", ["arrays", "in_out", "file", "path"])
def test_an_upcycled_layer_computes_what_the_network_did(context, tmp_path, way):
    n, layer, x = dense_network(F), dense_layer(context), numbers(6, 9, D)
    layer.init_parameters(1)
    gate = layer.parameters["gate.weight"].data.copy()
    given = {"file": None, **n}
    if way == "in_out":
        given = {k: np.ascontiguousarray(v.T) if v.ndim == 2 else v for k, v in n.items()}
    if way in ("file", "path"):
        moe.io.save(tmp_path / "a", {f"mlp.{name}": array for name, array in n.items()})
        given = {name: f"mlp.{name}" for name in n}
        given["file"] = moe.io.File(tmp_path / "a") if way == "file" else tmp_path / "a"
    moe.io.upcycle(layer, **given, weight_layout="in_out" if way == "in_out" else "out_in")
    y = layer.forward(moe.Pass(layer), x)
    np.testing.assert_allclose(y, dense_forward(n, x), rtol=1e-12, atol=1e-13)
    assert same(layer.parameters["gate.weight"].data, gate)


def test_upcycling_in_slices_with_noise(context):
    n, layer = dense_network(2 * F), dense_layer(context)
    moe.io.upcycle(layer, **n, output_scale=2)
    w1, w2 = layer.parameters["experts.w1"].data, layer.parameters["experts.w2"].data
    for e in range(E):
        part = slice(e % 2 * F, (e % 2 + 1) * F)
        assert (w1[e] == n["w1"][part].T).all() and (w2[e] == 2 * n["w2"][:, part].T).all()
    plain = w1.copy()
    moe.io.upcycle(layer, **n, noise_std=0.1, noise_fraction=0.5, seed=3)
    moved = (w1 != plain).mean()
    assert 0.3 < moved < 0.7 and not (w1[0] == w1[2]).all()
    noisy = w1.copy()
    moe.io.upcycle(layer, **n, noise_std=0.1, noise_fraction=0.5, seed=4)
    assert not (w1 == noisy).all()
    moe.io.upcycle(layer, **n, noise_std=0.1, noise_fraction=0.5, seed=3)
    assert same(w1, noisy)


def test_what_upcycling_refuses(context, tmp_path):
    n, layer = dense_network(F), dense_layer(context)
    draw(layer)
    before = {name: p.data.copy() for name, p in layer.parameters.items()}
    for change, error, says in (
        ({"w1": numbers(1, F, D + 1)}, ValueError, r"w1 has shape \(5, 7\); wanted \(5, 6\)"),
        ({"w2": numbers(1, F, D)}, ValueError, r"w2 has shape \(5, 6\); wanted \(6, 5\)"),
        ({"b2": numbers(1, F)}, ValueError, r"b2 has shape \(5,\); wanted \(6,\)"),
        ({"w3": n["w3"].astype("f")}, TypeError, "w3 holds float32.*wanted float64"),
        ({"w3": None}, moe.InvalidArgument, "w3"),
        ({"w1": numbers(1, 3)}, ValueError, r"w1 has shape \(3,\); wanted a matrix"),
        ({"w1": "mlp.w1"}, TypeError, "w1 must be an array"),
        ({"noise": 1}, TypeError, "no field 'noise'; did you mean noise_std"),
        ({"noise_std": -1.0}, moe.InvalidArgument, "noise_std is -1"),
        ({"file": tmp_path / "none"}, TypeError, "w1 must be a str"),
        (dense_network(F + 1), moe.InvalidArgument, "6 wide"),
        (dense_network(0), moe.InvalidArgument, "width is 0"),
    ):
        with pytest.raises(error, match=says):
            moe.io.upcycle(layer, **{**n, **change})
    moe.io.save(tmp_path / "a", n)
    with pytest.raises(moe.InvalidArgument, match="nothere"):
        moe.io.upcycle(layer, w1="w1", w3="nothere", w2="w2", file=tmp_path / "a")
    assert all(same(p.data, before[name]) for name, p in layer.parameters.items())
