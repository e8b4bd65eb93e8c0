"""The files of moe.io against the safetensors package, and files that are broken."""

import gc
import json
import os
import struct
import threading

import pytest

import moe

np = pytest.importorskip("numpy")
from io_cases import numbers, same  # noqa: E402 - needs numpy

pytestmark = pytest.mark.usefixtures("io")

KNOWN = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32",
         "uint16", "uint8", "bool", "complex64"]  # fmt: skip
SAVED = ["float64", "float32", "float16", "int64", "int32"]


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


def write(path, header, data=b"", length=None):
    """A file of a header as JSON, or as it is, and bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


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
