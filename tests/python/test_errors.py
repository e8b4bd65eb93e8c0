"""Errors are exceptions that say what is wrong with which value."""

import array

import pytest

import moe
from moe import _library


def test_every_error_is_a_python_error_too():
    kinds = {
        moe.InvalidArgument: ValueError, moe.OutOfMemory: MemoryError,
        moe.InvalidState: RuntimeError,
        moe.NotSupported: NotImplementedError, moe.SizeOverflow: OverflowError,
        moe.BufferTooSmall: ValueError, moe.CorruptData: ValueError,
        moe.CallbackFailed: RuntimeError, moe.SystemRefused: OSError,
        moe.DeviceFailed: RuntimeError,
    }  # fmt: skip
    assert {kind for kind in _library.ERRORS.values()} == set(kinds)
    for status, kind in _library.ERRORS.items():
        error = kind("a message", int(status), "MOE_ERROR")
        assert isinstance(error, (moe.Error, kinds[kind])) and issubclass(kind, kinds[kind])
        assert str(error) == "a message" and error.status == status


def test_an_error_has_status_name_and_the_librarys_message(context):
    with pytest.raises(moe.InvalidArgument) as caught:
        moe.Gate(context, d_model=4, num_experts=4, top_k=9)
    error = caught.value
    assert error.status == moe.Status.INVALID_ARGUMENT
    assert error.name == "MOE_ERROR_INVALID_ARGUMENT"
    assert "moe_gate_create" in str(error) and "top_k" in str(error) and "9" in str(error)
    with pytest.raises(moe.NotSupported):
        pool = moe.Experts(context, d_model=4, d_hidden=4, num_experts=4, storage="panels")
        pool.parameters["w1"].bind(memoryview(bytearray(256)).cast("f", (4, 4, 4)))
    with pytest.raises(moe.SizeOverflow):
        moe.Experts(context, d_model=2**40, d_hidden=2**40, num_experts=4)
    with pytest.raises(moe.NotSupported):
        moe.Context(backend="cuda")


@pytest.mark.parametrize("fields, error, message", [
    ({"topk": 2}, TypeError, "moe_gate_config has no field 'topk'; did you mean top_k"),
    ({"struct_size": 2}, TypeError, "no field 'struct_size'"),
    ({"reserved": 2}, TypeError, "no field 'reserved'"),
    ({"kind": "noisy"}, ValueError, "kind is 'noisy'; it can be top_k, noisy_top_k"),
    ({"kind": 2**40}, ValueError, "kind is 1099511627776; it must be from"),
    ({"top_k": 2**63}, ValueError, "top_k is 9223372036854775808"),
    ({"seed": -1}, ValueError, "seed is -1; it must be from 0"),
    ({"top_k": 1.5}, TypeError, "top_k must be an integer, not 1.5"),
    ({"top_k": "two"}, TypeError, "top_k must be a number, not 'two'"),
    ({"z_weight": None}, TypeError, "z_weight must be a number, not None"),
    ({"kind": 77}, moe.InvalidArgument, "77"),
])  # fmt: skip
def test_fields_are_checked_by_name(context, fields, error, message):
    with pytest.raises(error, match=message):
        moe.Gate(context, **{"d_model": 4, "num_experts": 4, **fields})


def test_names_and_members_are_the_same(context):
    by_name = moe.Gate(context, d_model=4, num_experts=4, kind="noisy_top_k",
                       dtype="float64").config  # fmt: skip
    by_member = moe.Gate(context, d_model=4, num_experts=4, kind=moe.GateKind.NOISY_TOP_K,
                         dtype=moe.DType.F64).config  # fmt: skip
    assert bytes(by_name) == bytes(by_member)
    assert by_name.kind == moe.GateKind.NOISY_TOP_K and by_name.dtype == moe.DType.F64


def test_keywords_of_calls_are_checked_by_name(make):
    layer = make()
    step = moe.Pass(layer)
    x = array.array("f", [0.25] * 12)
    with pytest.raises(TypeError, match="no field 'token_frist'; did you mean token_first"):
        layer.forward(step, x, token_frist=1)
    with pytest.raises(TypeError, match="no field 'losses_ou'; did you mean losses_out"):
        layer.forward(step, x, losses_ou=1)
    with pytest.raises(TypeError, match="no field 'y_stride'"):
        layer.forward(step, x, y_stride=1)
    with pytest.raises(ValueError, match="there is no tensor 'count'; there are logits"):
        step.tensor("count")
    with pytest.raises(TypeError, match="tokens must be an integer"):
        layer.forward(step, x, tokens=2.5)
    with pytest.raises(ValueError, match="x has shape .12,.: 2 rows; wanted 3"):
        layer.forward(step, x, tokens=3)


def test_calls_in_a_wrong_state(make, context):
    layer = make()
    step = moe.Pass(layer)
    x = array.array("f", [0.25] * 12)
    for ask in ("losses", "stats", "plan"):
        with pytest.raises(moe.InvalidState):
            getattr(step, ask)
    with pytest.raises(moe.InvalidState, match="needs a forward"):
        layer.backward(step, x)
    layer.forward(step, x)
    step.reserve(5)
    with pytest.raises(moe.InvalidState, match="needs a forward"):
        layer.backward(step, x)
    layer.forward(step, x, flags=moe.Forward.NO_SAVE)
    with pytest.raises(moe.InvalidState):
        layer.backward(step, x)
    with pytest.raises(moe.InvalidState):
        step.tensor("logits")
    with pytest.raises(moe.InvalidArgument, match="another layer"):
        make().forward(step, x)
    bound = moe.Experts(context, d_model=6, d_hidden=5, num_experts=4, parameters="bound")
    assert bound.parameters["w1"].data is None
    unready = moe.Layer(layer.gate, bound)
    with pytest.raises(moe.InvalidState, match="w1"):
        unready.forward(moe.Pass(unready), x)
    with pytest.raises(moe.InvalidState):
        bound.parameters["w1"].unbind()


def test_x_may_move_and_lie_differently(make):
    np = pytest.importorskip("numpy")
    layer = make()
    step = moe.Pass(layer)
    x = np.random.default_rng(0).standard_normal((4, 6)).astype("float32")
    layer.forward(step, x)
    dx = layer.backward(step, x)
    assert layer.backward(step, x, x=x.copy()).tobytes() == dx.tobytes()
    layer.forward(step, x)
    before, wide = x.copy(), np.zeros((4, 12), "float32")
    wide[:, :6] = x
    x[:] = np.nan  # the old place is not looked at
    assert layer.backward(step, before, x=wide[:, :6]).tobytes() == dx.tobytes()
    x[:] = before
    with pytest.raises(moe.InvalidState, match="gate_x is given and the forward had none"):
        layer.backward(step, x, gate_x=x)


def test_a_layer_needs_experts(context):
    with pytest.raises(TypeError, match="a layer needs experts"):
        moe.Layer()
    with pytest.raises(moe.InvalidArgument):
        moe.Layer(
            moe.Gate(context, d_model=4, num_experts=4),
            moe.Experts(context, d_model=4, d_hidden=4, num_experts=5),
        )
