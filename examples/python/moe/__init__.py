"""The sparsely-gated Mixture-of-Experts layer, forward and backward, on the CPU or a GPU.

    import numpy, moe

    context = moe.Context()
    gate = moe.Gate(context, d_model=64, num_experts=8, top_k=2)
    experts = moe.Experts(context, d_model=64, d_hidden=256, num_experts=8)
    layer = moe.Layer(gate, experts)
    layer.init_parameters(seed=1)
    step = moe.Pass(layer)
    x = numpy.random.default_rng(0).standard_normal((100, 64), dtype="float32")
    y = layer.forward(step, x)
    dx = layer.backward(step, numpy.ones_like(y))

Arrays are numpy's or anything else with the buffer protocol or DLPack, and are never copied.
Keyword arguments are the fields of the library's structs, which its headers describe; fields that
hold a constant also take its name: kind="noisy_top_k".
"""

from . import io
from ._callbacks import ExpertCall
from ._constants import (
    FROM_CONFIG,
    NO_EXPERTS,
    SAME,
    Activation,
    Backend,
    Backward,
    Batch,
    Capacity,
    Check,
    ChoiceNoise,
    Drop,
    Dropped,
    DType,
    Exchange,
    ExpertsKind,
    Forward,
    GateKind,
    Glu,
    Isa,
    Kind,
    Log,
    Loss,
    LossScope,
    Order,
    Output,
    Parameters,
    PlanUse,
    Received,
    Round,
    Rows,
    Score,
    SecondChoice,
    Secondary,
    SequenceCounts,
    Shard,
    Stat,
    Status,
    Storage,
    Tensor,
    Time,
    Values,
    WeightLayout,
    WeightOn,
)
from ._device import DeviceArray
from ._library import (
    BufferTooSmall,
    CallbackFailed,
    CorruptData,
    DeviceFailed,
    Error,
    InvalidArgument,
    InvalidState,
    NotSupported,
    OutOfMemory,
    SizeOverflow,
    SystemRefused,
    constant,
    library_path,
    load,
    load_cuda,
    load_nccl,
    version,
)
from ._preset import Preset, describe, preset, presets
from .context import Comm, Context, CudaContext, World
from .functions import (
    Flops,
    GradientReport,
    GradientsDisagree,
    Memory,
    check_gradients,
    cv_squared,
    experts_config,
    flops,
    gate_config,
    layer_config,
    memory,
    noise4,
    selection_bias_step,
)
from .objects import Experts, Gate, Layer
from .parameter import Parameter
from .passes import Losses, Pass, Report, Stats
from .plan import Plan, PlanArrays

__all__ = [
    "Activation", "Backend", "Backward", "Batch", "BufferTooSmall", "CallbackFailed", "Capacity",
    "Check", "ChoiceNoise", "Comm", "Context", "CorruptData", "CudaContext", "DType", "DeviceArray",
    "DeviceFailed", "Drop", "Dropped", "Error", "Exchange", "ExpertCall", "Experts", "ExpertsKind",
    "FROM_CONFIG", "Flops", "Forward", "Gate", "GateKind", "Glu", "GradientReport",
    "GradientsDisagree", "InvalidArgument", "InvalidState", "Isa", "Kind", "Layer", "Log", "Loss",
    "LossScope", "Losses", "Memory", "NO_EXPERTS", "NotSupported", "Order", "OutOfMemory", "Output",
    "Parameter", "Parameters", "Pass", "Plan", "PlanArrays", "PlanUse", "Preset", "Received",
    "Report", "Round", "Rows", "SAME", "Score", "SecondChoice", "Secondary", "SequenceCounts",
    "Shard", "SizeOverflow", "Stat", "Stats", "Status", "Storage", "SystemRefused", "Tensor",
    "Time", "Values", "WeightLayout", "WeightOn", "World", "check_gradients", "constant",
    "cv_squared", "describe", "experts_config", "flops", "gate_config", "io", "layer_config",
    "library_path", "load", "load_cuda", "load_nccl", "memory", "noise4", "preset", "presets",
    "selection_bias_step", "version",
]  # fmt: skip
