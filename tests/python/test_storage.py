"""Storage modes of a pool: the same bytes, export and import, the packed copy of a module."""

import pytest

np = pytest.importorskip("numpy")

import moe  # noqa: E402

T, D, F, E = 9, 7, 19, 3
MODES = ["row_major", "prepacked", "panels"]
rng = np.random.default_rng(3)
X, DY = rng.standard_normal((2, T, D)).astype("float32")


def layer_of(context, storage, **fields):
    pool = moe.Experts(context, d_model=D, d_hidden=F, num_experts=E, activation="swiglu",
                       storage=storage, bias=1, **fields)  # fmt: skip
    layer = moe.Layer(moe.Gate(context, d_model=D, num_experts=E, top_k=2), pool)
    layer.init_parameters(5)
    return layer


def logical(pool, grad=False):
    """W1, W3 and W2, whatever they are called."""
    if "w13" in pool.parameters:
        both = pool.export_parameter("w13", grad)
        return [both[:, :, :F], both[:, :, F:], pool.export_parameter("w2", grad)]
    return [pool.export_parameter(name, grad) for name in ("w1", "w3", "w2")]


def test_every_mode_gives_the_same_bytes(context):
    results = []
    for storage in MODES:
        layer = layer_of(context, storage)
        step = moe.Pass(layer)
        y = layer.forward(step, X)
        dx = layer.backward(step, DY)
        assert layer.experts.config.storage == moe.Storage[storage.upper()]
        results.append([y, dx, *logical(layer.experts), *logical(layer.experts, grad=True)])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert np.array_equal(a, b)


def test_panels_are_flat_and_opaque(context):
    pool = layer_of(context, "panels").experts
    parameter = pool.parameters["w13"]
    assert parameter.opaque and parameter.shape == (E, D, 2 * F)
    assert parameter.data.shape == parameter.grad.shape == (parameter.size,)
    assert parameter.size == E * D * 2 * 32 > E * D * 2 * F
    assert not pool.parameters["b1"].opaque and pool.parameters["b1"].data.shape == (E, F)
    parameter.data[...] *= 2  # element by element
    assert np.array_equal(pool.export_parameter("w13"),
                          2 * layer_of(context, "panels").experts.export_parameter("w13"))  # fmt: skip


@pytest.mark.parametrize("storage", MODES)
def test_export_and_import(context, storage):
    layer = layer_of(context, storage)
    pool, step = layer.experts, moe.Pass(layer)
    before = layer.forward(step, X).copy()
    w2 = pool.export_parameter("w2")
    pool.import_parameter("w2", 2 * w2[1:], first=1)
    assert np.array_equal(pool.export_parameter("w2", first=1), 2 * w2[1:])
    assert np.array_equal(pool.export_parameter("w2", first=0, count=1), w2[:1])
    assert not np.array_equal(layer.forward(step, X), before)
    pool.import_parameter("w2", w2)
    assert np.array_equal(layer.forward(step, X), before)
    pool.import_parameter("w2", np.ones_like(w2), grad=True)
    assert (pool.export_parameter("w2", grad=True) == 1).all()
    with pytest.raises(KeyError, match="w9"):
        pool.export_parameter("w9")
    with pytest.raises(ValueError, match="shape"):
        pool.import_parameter("w2", w2[:, 1:])
    with pytest.raises(ValueError, match="contiguous"):
        pool.import_parameter("w2", w2[::2])
    with pytest.raises(TypeError, match="float32"):
        pool.import_parameter("w2", w2.astype("float64"))
    with pytest.raises(moe.InvalidArgument, match="count"):
        pool.import_parameter("w2", w2, first=1)


def test_a_packed_copy_is_stale_until_told(context):
    layer = layer_of(context, "prepacked")
    pool, step = layer.experts, moe.Pass(layer)
    before = layer.forward(step, X).copy()
    pool.parameters["w1"].data[...] *= 2
    assert np.array_equal(layer.forward(step, X), before)
    pool.weights_changed()
    assert not np.array_equal(layer.forward(step, X), before)


def test_bound_data_is_not_imported_to(context):
    pool = layer_of(context, "prepacked").experts
    pool.parameters["w2"].bind(np.zeros((E, F, D), "float32"))
    with pytest.raises(moe.InvalidState, match="bound"):
        pool.import_parameter("w2", np.ones((E, F, D), "float32"))
    assert (pool.export_parameter("w2") == 0).all()


def test_files_are_the_same_in_every_mode(context, io, tmp_path):
    files = []
    for storage in MODES:
        layer = layer_of(context, storage)
        moments = {name: np.zeros(p.array_shape, "float32")
                   for name, p in layer.parameters.items()}  # fmt: skip
        items = {"layer.": layer, "m.": io.Values(layer, moments)}
        if files:
            layer.init_parameters(8)
            io.load(str(files[0]), items)
            assert any(m.any() for m in moments.values())
        else:
            for m in moments.values():
                m[...] = rng.standard_normal(m.shape)
        files.append(tmp_path / storage)
        io.save(str(files[-1]), items)
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()
