"""moe.io and weights from elsewhere: a model's names, and dense networks, against numpy."""

import pytest

import moe

np = pytest.importorskip("numpy")
import reference  # noqa: E402 - needs numpy
from io_cases import D, E, F, draw, layer_of, numbers, same  # noqa: E402

pytestmark = pytest.mark.usefixtures("io")


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
