"""The structs and callback types of the C interface in ctypes; _prototypes.py has the functions.

Structs have the names of the C types in camel case (moe_gate_config is GateConfig) and exactly
their fields; handles and pointers to elements are c_void_p. The tests compare all of it with the
headers.
"""

from __future__ import annotations

import re
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char_p,
    c_double,
    c_int32,
    c_int64,
    c_uint64,
    c_uint8,
    c_void_p,
)
from typing import List, Type

from ._constants import FILE_MAX_DIMS, LOSS_SLOTS, MAX_DIMS, STAT_SLOTS, TIME_SLOTS

# ---- callbacks ----------------------------------------------------------------------------------

AllocFn = CFUNCTYPE(c_void_p, c_void_p, c_uint64, c_uint64)
FreeFn = CFUNCTYPE(None, c_void_p, c_void_p, c_uint64)
TaskFn = CFUNCTYPE(None, c_void_p, c_int64)
ParallelFn = CFUNCTYPE(c_int32, c_void_p, c_int64, TaskFn, c_void_p)
LogFn = CFUNCTYPE(None, c_void_p, c_int32, c_char_p)
ExpertFn = CFUNCTYPE(c_int32, c_void_p, c_void_p)  # the second is a moe_expert_call
CudaAllocFn = CFUNCTYPE(c_void_p, c_void_p, c_uint64, c_uint64, c_void_p)
CudaFreeFn = CFUNCTYPE(None, c_void_p, c_void_p, c_uint64, c_void_p)

# ---- structs ------------------------------------------------------------------------------------

_Dims = c_int64 * MAX_DIMS
_FileDims = c_int64 * FILE_MAX_DIMS


class ContextConfig(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("backend", c_int32),
        ("isa", c_int32),
        ("threads", c_int32),
        ("log_level", c_int32),
        ("alloc", AllocFn),
        ("free", FreeFn),
        ("alloc_user", c_void_p),
        ("parallel", ParallelFn),
        ("parallel_user", c_void_p),
        ("log", LogFn),
        ("log_user", c_void_p),
    ]


class GateConfig(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("d_model", c_int64),
        ("num_experts", c_int64),
        ("top_k", c_int64),
        ("kind", c_int32),
        ("score", c_int32),
        ("order", c_int32),
        ("renormalize", c_int32),
        ("renormalize_epsilon", c_double),
        ("route_scale", c_double),
        ("bias", c_int32),
        ("selection_bias", c_int32),
        ("expert_groups", c_int64),
        ("top_groups", c_int64),
        ("group_score", c_int32),
        ("dtype", c_int32),
        ("noise_epsilon", c_double),
        ("cdf_guard", c_double),
        ("jitter", c_double),
        ("seed", c_uint64),
        ("stream_id", c_int32),
        ("cv_ddof", c_int32),
        ("importance_weight", c_double),
        ("load_weight", c_double),
        ("switch_weight", c_double),
        ("gshard_weight", c_double),
        ("z_weight", c_double),
        ("sequence_weight", c_double),
        ("sequence_score", c_int32),
        ("sequence_counts", c_int32),
        ("capacity_kind", c_int32),
        ("capacity_rounding", c_int32),
        ("capacity", c_int64),
        ("capacity_factor", c_double),
        ("capacity_minimum", c_int64),
        ("drop_policy", c_int32),
        ("renormalize_after_drop", c_int32),
        ("parameters", c_int32),
        ("reserved", c_int32),
        ("init_std", c_double),
        ("threshold_weight", c_double),
        ("renormalize_minimum", c_double),
        ("capacity_factor_eval", c_double),
        ("capacity_multiple", c_int64),
        ("second_threshold", c_double),
        ("sinkhorn_tolerance", c_double),
        ("sinkhorn_iterations", c_int32),
        ("choice_noise", c_int32),
        ("second_choice", c_int32),
        ("loss_scope", c_int32),
        ("secondary", c_int32),
        ("reserved2", c_int32),
        ("local_groups", c_int64),
    ]


class ExpertCall(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("expert", c_int64),
        ("rows", c_int64),
        ("x", c_void_p),
        ("out", c_void_p),
        ("dout", c_void_p),
        ("dx", c_void_p),
        ("workspace", c_void_p),
        ("dtype", c_int32),
        ("parameters", c_int32),
    ]


class ExpertCallbacks(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("user", c_void_p),
        ("forward", ExpertFn),
        ("backward", ExpertFn),
        ("workspace_per_row", c_int64),
    ]


class ExpertsConfig(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("d_model", c_int64),
        ("d_hidden", c_int64),
        ("d_out", c_int64),
        ("num_experts", c_int64),
        ("activation", c_int32),
        ("bias", c_int32),
        ("glu_order", c_int32),
        ("weight_layout", c_int32),
        ("storage", c_int32),
        ("dtype", c_int32),
        ("output", c_int32),
        ("weight_position", c_int32),
        ("activation_alpha", c_double),
        ("activation_limit", c_double),
        ("activation_offset", c_double),
        ("parameters", c_int32),
        ("reserved", c_int32),
        ("init_std", c_double),
        ("callbacks", POINTER(ExpertCallbacks)),
        ("kind", c_int32),
        ("reserved2", c_int32),
    ]


class LayerConfig(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("gate", c_void_p),
        ("experts", c_void_p),
        ("shared", c_void_p),
        ("residual", c_void_p),
        ("comm", c_void_p),
        ("output", c_int32),
        ("layer_id", c_int32),
        ("shared_gate", c_int32),
        ("residual_mix", c_int32),
        ("dropped", c_int32),
        ("parameters", c_int32),
        ("expert_slices", c_int64),
        ("placement", POINTER(c_int64)),
        ("max_received", c_int64),
        ("padded_rows", c_int64),
        ("exchange", c_int32),
        ("received", c_int32),
        ("loss_batch", c_int32),
        ("reserved", c_int32),
        ("node_comm", c_void_p),
        ("rail_comm", c_void_p),
        ("exchange_chunks", c_int64),
    ]


class CostQuery(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("gate", POINTER(GateConfig)),
        ("experts", POINTER(ExpertsConfig)),
        ("layer", POINTER(LayerConfig)),
        ("tokens", c_int64),
        ("groups", c_int64),
        ("top_k", c_int64),
        ("flags", c_uint64),
        ("threads", c_int32),
        ("reserved", c_int32),
        ("shared", POINTER(ExpertsConfig)),
        ("residual", POINTER(ExpertsConfig)),
        ("context", c_void_p),
    ]


class Cost(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("parameter_bytes", c_int64),
        ("gradient_bytes", c_int64),
        ("parameter_count", c_int64),
        ("pass_bytes", c_int64),
        ("forward_flops", c_int64),
        ("backward_flops", c_int64),
        ("active_parameters", c_int64),
    ]


class ParameterRecord(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("name", c_char_p),
        ("data", c_void_p),
        ("grad", c_void_p),
        ("data_per_expert", POINTER(c_void_p)),
        ("grad_per_expert", POINTER(c_void_p)),
        ("element_count", c_int64),
        ("shape", _Dims),
        ("global_shape", _Dims),
        ("global_offset", _Dims),
        ("data_stride", _Dims),
        ("grad_stride", _Dims),
        ("dims", c_int32),
        ("kind", c_int32),
        ("data_dtype", c_int32),
        ("grad_dtype", c_int32),
        ("sharding", c_int32),
        ("trainable", c_int32),
        ("opaque", c_int32),
        ("owned", c_int32),
    ]


class Binding(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("data", c_void_p),
        ("grad", c_void_p),
        ("data_per_expert", POINTER(c_void_p)),
        ("grad_per_expert", POINTER(c_void_p)),
        ("data_stride", _Dims),
        ("grad_stride", _Dims),
        ("data_dtype", c_int32),
        ("grad_dtype", c_int32),
    ]


class ForwardArgs(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("flags", c_uint64),
        ("tokens", c_int64),
        ("token_first", c_int64),
        ("step", c_int64),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("gate_x", c_void_p),
        ("gate_x_stride", c_int64),
        ("logits_in", c_void_p),
        ("logits_stride", c_int64),
        ("noise", c_void_p),
        ("noise_stride", c_int64),
        ("token_mask", c_void_p),
        ("group_begin", c_void_p),
        ("groups", c_int64),
        ("token_key", c_void_p),
        ("plan", c_void_p),
        ("plan_use", c_int32),
        ("reserved", c_int32),
        ("top_k", c_int64),
        ("capacity", c_int64),
        ("loss_weights", c_void_p),
        ("losses_out", c_void_p),
        ("stats_out", c_void_p),
        ("stream", c_void_p),
        ("noise_primary", c_void_p),
        ("noise_primary_stride", c_int64),
    ]


class BackwardArgs(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("flags", c_uint64),
        ("dx", c_void_p),
        ("dx_stride", c_int64),
        ("dy", c_void_p),
        ("dy_stride", c_int64),
        ("d_gate_x", c_void_p),
        ("d_gate_x_stride", c_int64),
        ("d_logits_out", c_void_p),
        ("d_logits_stride", c_int64),
        ("entry_weight_grad", c_void_p),
        ("loss_grad", c_void_p),
        ("x", c_void_p),
        ("gate_x", c_void_p),
        ("stream", c_void_p),
        ("x_stride", c_int64),
        ("gate_x_stride", c_int64),
    ]


class PassConfig(Structure):
    _fields_ = [("struct_size", c_uint64), ("workspace", c_void_p), ("workspace_bytes", c_int64)]


class Losses(Structure):
    _fields_ = [("struct_size", c_uint64), ("total", c_double), ("value", c_double * LOSS_SLOTS)]


class Stats(Structure):
    _fields_ = [("struct_size", c_uint64), ("value", c_double * STAT_SLOTS)]


class PassReport(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("forward_seconds", c_double * TIME_SLOTS),
        ("backward_seconds", c_double * TIME_SLOTS),
        ("rows_sent", c_int64),
        ("rows_received", c_int64),
        ("rounds", c_int64),
        ("forward_bytes_sent", c_int64),
        ("backward_bytes_sent", c_int64),
        ("forward_bytes_received", c_int64),
        ("backward_bytes_received", c_int64),
        ("rows_to_nodes", c_int64),
        ("forward_bytes_to_nodes", c_int64),
        ("backward_bytes_to_nodes", c_int64),
    ]


class TensorView(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("data", c_void_p),
        ("shape", _Dims),
        ("dims", c_int32),
        ("dtype", c_int32),
    ]


class PlanArgs(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("tokens", c_int64),
        ("num_experts", c_int64),
        ("top_k", c_int64),
        ("token_begin", c_void_p),
        ("expert_ids", c_void_p),
        ("weights", c_void_p),
        ("id_dtype", c_int32),
        ("dtype", c_int32),
        ("token_mask", c_void_p),
        ("group_begin", c_void_p),
        ("groups", c_int64),
        ("capacity", c_int64),
        ("drop_policy", c_int32),
        ("renormalize_after_drop", c_int32),
        ("token_priority", c_void_p),
        ("seed", c_uint64),
        ("step", c_int64),
        ("token_first", c_int64),
    ]


class PlanView(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("tokens", c_int64),
        ("entries", c_int64),
        ("rows", c_int64),
        ("num_experts", c_int64),
        ("groups", c_int64),
        ("token_begin", c_void_p),
        ("expert_of_entry", c_void_p),
        ("weight_of_entry", c_void_p),
        ("row_of_entry", c_void_p),
        ("slot_of_entry", c_void_p),
        ("expert_begin", c_void_p),
        ("token_of_row", c_void_p),
        ("entry_of_row", c_void_p),
        ("group_begin", c_void_p),
        ("dtype", c_int32),
        ("reserved", c_int32),
    ]


class RowsArgs(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("flags", c_uint64),
        ("width", c_int64),
        ("tokens_in", c_void_p),
        ("tokens_in_stride", c_int64),
        ("tokens_out", c_void_p),
        ("tokens_out_stride", c_int64),
        ("rows_in", c_void_p),
        ("rows_in_stride", c_int64),
        ("rows_out", c_void_p),
        ("rows_out_stride", c_int64),
        ("entry_weight_grad", c_void_p),
        ("dtype", c_int32),
        ("reserved", c_int32),
        ("stream", c_void_p),
    ]


class GradientCheck(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("tokens", c_int64),
        ("groups", c_int64),
        ("probes", c_int64),
        ("seed", c_uint64),
        ("step", c_double),
        ("tolerance", c_double),
        ("parameters", c_int32),
        ("train", c_int32),
        ("report", LogFn),
        ("report_user", c_void_p),
    ]


class GradientReport(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("tensors", c_int64),
        ("probes", c_int64),
        ("disagreements", c_int64),
        ("kinks", c_int64),
        ("worst", c_double),
        ("worst_name", c_char_p),
        ("worst_index", c_int64),
        ("worst_gradient", c_double),
        ("worst_difference", c_double),
    ]


class Exchange(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("recv", c_void_p),
        ("recv_begin", POINTER(c_int64)),
        ("send", c_void_p),
        ("send_begin", POINTER(c_int64)),
        ("row_bytes", c_int64),
        ("to_all", c_int32),
        ("memory", c_int32),
        ("stream", c_void_p),
        ("ordered", c_int32),
        ("reserved", c_int32),
    ]


class Collectives(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("user", c_void_p),
        ("rank", c_int32),
        ("size", c_int32),
        ("capabilities", c_uint64),
        ("timeout", c_double),
        ("exchange_start", CFUNCTYPE(c_int32, c_void_p, POINTER(Exchange), POINTER(c_void_p))),
        ("exchange_test", CFUNCTYPE(c_int32, c_void_p, c_void_p, POINTER(c_int32))),
        ("exchange_cancel", CFUNCTYPE(c_int64, c_void_p, c_void_p)),
        ("missing", CFUNCTYPE(None, c_void_p, c_void_p, POINTER(c_uint8))),
        ("poll", CFUNCTYPE(c_int32, c_void_p)),
        ("abort", CFUNCTYPE(None, c_void_p)),
        ("release", CFUNCTYPE(None, c_void_p)),
    ]


# ---- structs of libmoe_io, libmoe_mpi, libmoe_cuda and libmoe_nccl ------------------------------


class FileRecord(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("name", c_char_p),
        ("path", c_char_p),
        ("shape", _FileDims),
        ("element_count", c_int64),
        ("bytes", c_int64),
        ("offset", c_int64),
        ("dims", c_int32),
        ("dtype", c_int32),
    ]


class CheckpointItem(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("name", c_char_p),
        ("layer", c_void_p),
        ("values", POINTER(c_void_p)),
        ("data", c_void_p),
        ("shape", _FileDims),
        ("dims", c_int32),
        ("dtype", c_int32),
    ]


class SaveOptions(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("metadata_keys", POINTER(c_char_p)),
        ("metadata_values", POINTER(c_char_p)),
        ("metadata_count", c_int64),
        ("comm", c_void_p),
        ("store_dtype", c_int32),
        ("reserved", c_int32),
    ]


class LoadOptions(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("comm", c_void_p),
        ("report", LogFn),
        ("report_user", c_void_p),
        ("lenient", c_int32),
        ("convert", c_int32),
        ("write_bound", c_int32),
        ("reserved", c_int32),
    ]


class LoadReport(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("loaded", c_int64),
        ("missing", c_int64),
        ("unexpected", c_int64),
    ]


class TensorNames(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("gate", c_char_p),
        ("gate_bias", c_char_p),
        ("selection_bias", c_char_p),
        ("w1", c_char_p),
        ("w3", c_char_p),
        ("w13", c_char_p),
        ("w2", c_char_p),
        ("b1", c_char_p),
        ("b3", c_char_p),
        ("b13", c_char_p),
        ("b2", c_char_p),
        ("shared_w1", c_char_p),
        ("shared_w3", c_char_p),
        ("shared_w2", c_char_p),
        ("shared_gate", c_char_p),
        ("weight_layout", c_int32),
        ("glu_order", c_int32),
    ]


class ImportOptions(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("names", POINTER(TensorNames)),
        ("lenient", c_int32),
        ("write_bound", c_int32),
    ]


class UpcycleArgs(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("w1", c_void_p),
        ("w3", c_void_p),
        ("w2", c_void_p),
        ("b1", c_void_p),
        ("b3", c_void_p),
        ("b2", c_void_p),
        ("file", c_void_p),
        ("w1_name", c_char_p),
        ("w3_name", c_char_p),
        ("w2_name", c_char_p),
        ("b1_name", c_char_p),
        ("b3_name", c_char_p),
        ("b2_name", c_char_p),
        ("width", c_int64),
        ("noise_std", c_double),
        ("noise_fraction", c_double),
        ("output_scale", c_double),
        ("seed", c_uint64),
        ("dtype", c_int32),
        ("weight_layout", c_int32),
        ("write_bound", c_int32),
        ("reserved", c_int32),
    ]


class MpiOptions(Structure):
    _fields_ = [("struct_size", c_uint64), ("timeout", c_double)]


class CudaConfig(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("device", c_int32),
        ("tf32", c_int32),
        ("cublas_workspace_bytes", c_int64),
        ("wait_seconds", c_double),
        ("check_pointers", c_int32),
        ("reserved", c_int32),
        ("alloc", CudaAllocFn),
        ("free", CudaFreeFn),
        ("alloc_user", c_void_p),
        ("host", POINTER(ContextConfig)),
    ]


class CudaPassConfig(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("cublas", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_int64),
        ("exchange_stream", c_void_p),
    ]


class NcclConfig(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("comm", c_void_p),
        ("stream", c_void_p),
        ("timeout", c_double),
        ("duplicate", c_int32),
        ("warm_up", c_int32),
    ]


STRUCTS: List[Type[Structure]] = [
    ContextConfig, GateConfig, ExpertCall, ExpertCallbacks, ExpertsConfig, LayerConfig, CostQuery,
    Cost, ParameterRecord, Binding,
    ForwardArgs, BackwardArgs, PassConfig, Losses, Stats, PassReport, TensorView, PlanArgs,
    PlanView, RowsArgs, GradientCheck, GradientReport, Exchange, Collectives,
]  # fmt: skip
IO_STRUCTS: List[Type[Structure]] = [
    FileRecord, CheckpointItem, SaveOptions, LoadOptions, LoadReport, TensorNames, ImportOptions,
    UpcycleArgs,
]  # fmt: skip
MPI_STRUCTS: List[Type[Structure]] = [MpiOptions]
CUDA_STRUCTS: List[Type[Structure]] = [CudaConfig, CudaPassConfig]
NCCL_STRUCTS: List[Type[Structure]] = [NcclConfig]
FILLED_BY_LIBRARY: List[Type[Structure]] = [ExpertCall]  # the only ones without an init function


def c_name(struct: Type[Structure]) -> str:
    """The C name of a struct: GateConfig is moe_gate_config."""
    return "moe" + re.sub("[A-Z]", lambda letter: "_" + letter.group().lower(), struct.__name__)
