"""Conventions by name, configs as a starting point, and configurations in words."""

import pytest

import moe

SIZES = {"d_model": 6, "d_hidden": 5, "num_experts": 4}


def test_every_preset_has_a_name_and_a_source():
    known = moe.presets()
    assert {"mixtral", "deepseek_v3", "gpt_oss"} <= set(known)
    assert all(source.strip() for source in known.values())
    for name in known:
        made = moe.preset(name)
        assert made.gate.d_model == 0 and made.gate.num_experts == 0  # never a size
        assert made.experts.d_model == 0 and made.experts.d_hidden == 0


def test_a_preset_is_its_conventions_and_the_fields_given():
    made = moe.preset("mixtral", **SIZES, dtype="float64", parameters="bound", z_weight=0.1,
                      weight_layout="out_in", layer_id=3)  # fmt: skip
    gate, experts, layer = made
    assert (gate.order, gate.renormalize, gate.top_k) == (moe.Order.SELECT_THEN_SCORE, 0, 2)
    assert experts.activation == moe.Activation.SWIGLU
    assert (gate.d_model, gate.num_experts, gate.z_weight) == (6, 4, 0.1)
    assert (experts.d_model, experts.d_hidden, experts.num_experts) == (6, 5, 4)
    assert experts.weight_layout == moe.WeightLayout.OUT_IN
    assert gate.dtype == experts.dtype == moe.DType.F64
    assert gate.parameters == experts.parameters == layer.parameters == moe.Parameters.BOUND
    assert layer.layer_id == 3
    assert moe.preset("deepseek_v3", top_k=3).gate.top_k == 3


def test_what_a_preset_cannot_know_is_refused():
    with pytest.raises(moe.InvalidArgument, match="nonesuch"):
        moe.preset("nonesuch")
    with pytest.raises(TypeError, match="a preset has no field 'topk'; did you mean top_k"):
        moe.preset("mixtral", topk=2)
    with pytest.raises(TypeError, match="bias is a field of gate and experts"):
        moe.preset("mixtral", bias=1)
    with pytest.raises(ValueError, match="score is 'soft'; it can be softmax, sigmoid"):
        moe.preset("mixtral", score="soft")


def test_a_layer_of_a_preset_is_one_of_its_fields(context, make):
    np = pytest.importorskip("numpy")
    layer = moe.preset("mixtral", **SIZES, dtype="float64").make(context)
    same = make(gate={"dtype": "float64"}, experts={"dtype": "float64", "activation": "swiglu"})
    rng = np.random.default_rng(2)
    assert list(layer.parameters) == list(same.parameters)
    for name, p in layer.parameters.items():
        p.data[...] = same.parameters[name].data[...] = rng.standard_normal(p.shape)
    x = rng.standard_normal((7, 6))
    results = [one.forward(moe.Pass(one), x).tobytes() for one in (layer, same)]
    assert results[0] == results[1]


def test_a_config_is_where_an_object_starts(context):
    made = moe.preset("mixtral", **SIZES)
    gate = moe.Gate(context, made.gate, top_k=3, kind="noisy_top_k", order="select_then_score",
                    renormalize=0)  # fmt: skip
    assert gate.config.top_k == 3 and gate.config.kind == moe.GateKind.NOISY_TOP_K
    assert made.gate.top_k == 2  # the config itself stays
    pool = moe.Experts(context, made.experts, bias=1)
    assert pool.config.bias == 1 and pool.config.activation == moe.Activation.SWIGLU
    layer = moe.Layer(gate, pool, moe.layer_config(output="sigmoid"), layer_id=2)
    assert layer.config.output == moe.Output.SIGMOID and layer.config.layer_id == 2
    again = moe.Gate(context, gate.config)
    assert repr(again) == repr(gate)
    with pytest.raises(TypeError, match="a config must be a moe_gate_config"):
        moe.Gate(context, made.experts)


def test_a_description_is_text_with_the_numbers(context):
    made = moe.preset("deepseek_v3", d_model=6, d_hidden=5, num_experts=8, top_k=3,
                      expert_groups=4, top_groups=2)  # fmt: skip
    text = moe.describe(made.gate, made.experts)
    assert text == moe.describe(made.gate, made.experts) and text.count("\n") > 2
    assert "2.5" in text and "8" in text  # the scale of the weights, and E
    assert moe.describe(made.gate) != text
    gate, pool = moe.Gate(context, made.gate), moe.Experts(context, made.experts)
    assert moe.describe(gate, pool) == text
    layer = moe.Layer(gate, pool)
    assert moe.describe(layer=layer) == moe.describe(gate, pool, layer)


def test_a_description_refuses_what_create_refuses(context):
    with pytest.raises(moe.InvalidArgument):
        moe.describe()
    bad = moe.gate_config(d_model=4, num_experts=4, top_k=9)
    with pytest.raises(moe.InvalidArgument) as described:
        moe.describe(bad)
    with pytest.raises(moe.InvalidArgument) as created:
        moe.Gate(context, bad)
    assert str(described.value).split(": ", 1)[1] == str(created.value).split(": ", 1)[1]
