"""Result and arguments of every function of the libraries, as ctypes types.

Handles and pointers to elements are c_void_p. The tests compare the tables with the headers and the
symbol maps.
"""

from __future__ import annotations

from ctypes import (
    POINTER,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_uint64,
    c_uint8,
    c_void_p,
)
from typing import Any, Dict, List, Tuple

from ._abi import (
    CUDA_STRUCTS,
    FILLED_BY_LIBRARY,
    IO_STRUCTS,
    MPI_STRUCTS,
    NCCL_STRUCTS,
    STRUCTS,
    BackwardArgs,
    Binding,
    CheckpointItem,
    Collectives,
    ContextConfig,
    Cost,
    CostQuery,
    CudaConfig,
    CudaPassConfig,
    Exchange,
    ExpertsConfig,
    FileRecord,
    ForwardArgs,
    GateConfig,
    GradientCheck,
    GradientReport,
    ImportOptions,
    LayerConfig,
    LoadOptions,
    LoadReport,
    Losses,
    MpiOptions,
    NcclConfig,
    ParameterRecord,
    PassConfig,
    PassReport,
    PlanArgs,
    PlanView,
    RowsArgs,
    SaveOptions,
    Stats,
    TensorNames,
    TensorView,
    UpcycleArgs,
    c_name,
)

_status = c_int32
_handle = c_void_p
_new = POINTER(c_void_p)  # where a create call puts its handle

PROTOTYPES: Dict[str, Tuple[Any, List[Any]]] = {
    "moe_status_name": (c_char_p, [_status]),
    "moe_status_text": (c_char_p, [_status]),
    "moe_last_error": (c_char_p, []),
    "moe_clear_last_error": (None, []),
    "moe_version_number": (c_int32, []),
    "moe_version_string": (c_char_p, []),
    "moe_constant": (_status, [POINTER(c_int64), c_char_p]),
    "moe_context_create": (_status, [_new, POINTER(ContextConfig)]),
    "moe_context_destroy": (None, [_handle]),
    "moe_context_threads": (c_int32, [_handle]),
    "moe_context_isa": (c_int32, [_handle]),
    "moe_context_backend": (c_int32, [_handle]),
    "moe_gate_create": (_status, [_new, _handle, POINTER(GateConfig)]),
    "moe_gate_get_config": (_status, [_handle, POINTER(GateConfig)]),
    "moe_gate_update_selection_bias": (_status, [_handle, POINTER(c_int64), c_double]),
    "moe_selection_bias_step": (
        _status, [c_void_p, c_void_p, POINTER(c_int64), c_int64, c_double, c_int32]
    ),
    "moe_init_default": (c_double, []),
    "moe_cv_squared": (_status, [POINTER(c_double), c_void_p, c_void_p, c_int64, c_int32, c_int32]),
    "moe_noise4": (_status, [POINTER(c_float), c_uint64, c_int32, c_int32] + 3 * [c_int64]),
    "moe_experts_create": (_status, [_new, _handle, POINTER(ExpertsConfig)]),
    "moe_experts_create_parts": (_status, [_new, _new, c_int64]),
    "moe_experts_get_config": (_status, [_handle, POINTER(ExpertsConfig)]),
    "moe_experts_weights_changed": (_status, [_handle]),
    "moe_experts_export": (_status, [_handle, c_int64, c_int32, c_int64, c_int64, c_void_p]),
    "moe_experts_import": (_status, [_handle, c_int64, c_int32, c_int64, c_int64, c_void_p]),
    "moe_experts_touched": (_status, [_handle, POINTER(c_uint8), POINTER(c_int64)]),
    "moe_experts_zero_touched_gradients": (_status, [_handle, c_void_p]),
    "moe_layer_create": (_status, [_new, POINTER(LayerConfig)]),
    "moe_layer_get_config": (_status, [_handle, POINTER(LayerConfig)]),
    "moe_layer_expert_number": (c_int64, [_handle, c_int64]),
    "moe_layer_zero_touched_gradients": (_status, [_handle, c_void_p]),
    "moe_layer_memory": (_status, [POINTER(CostQuery), POINTER(Cost)]),
    "moe_layer_flops": (_status, [POINTER(CostQuery), POINTER(Cost)]),
    "moe_comm_create_self": (_status, [_new, _handle]),
    "moe_comm_create": (_status, [_new, _handle, POINTER(Collectives)]),
    "moe_world_create": (_status, [_new, _handle, c_int32]),
    "moe_world_destroy": (None, [_handle]),
    "moe_comm_create_in_world": (_status, [_new, _handle, _handle, c_int32, c_double]),
    "moe_comm_capabilities": (c_uint64, [_handle]),
    "moe_comm_exchange": (_status, [_handle, POINTER(Exchange)]),
    "moe_comm_exchange_start": (_status, [_handle, POINTER(Exchange), c_void_p]),
    "moe_comm_exchange_test": (_status, [_handle, c_int32, c_void_p]),
    "moe_comm_exchange_finish": (_status, [_handle, c_int32]),
    "moe_comm_all_to_all": (_status, [_handle, c_void_p, c_void_p, c_int64]),
    "moe_comm_all_gather": (_status, [_handle, c_void_p, POINTER(c_int64), c_void_p, c_int64]),
    "moe_comm_barrier": (_status, [_handle]),
    "moe_comm_poll": (_status, [_handle]),
    "moe_comm_abort": (None, [_handle]),
    "moe_comm_pending_bytes": (c_int64, [_handle]),
    "moe_layer_gradient_norm": (_status, [_handle, POINTER(c_double), c_void_p]),
    "moe_layer_reduce_gradients": (_status, [_handle, c_void_p]),
    "moe_comm_destroy": (None, [_handle]),
    "moe_comm_rank": (c_int32, [_handle]),
    "moe_comm_size": (c_int32, [_handle]),
    "moe_pass_create": (_status, [_new, _handle, POINTER(PassConfig)]),
    "moe_pass_create_for_gate": (_status, [_new, _handle, POINTER(PassConfig)]),
    "moe_pass_create_for_experts": (_status, [_new, _handle, POINTER(PassConfig)]),
    "moe_pass_destroy": (None, [_handle]),
    "moe_pass_reserve": (_status, [_handle, c_int64, c_int64, c_int64]),
    "moe_pass_bytes": (c_int64, [_handle]),
    "moe_pass_plan": (_status, [_handle, _new]),
    "moe_pass_primary_plan": (_status, [_handle, _new]),
    "moe_pass_losses": (_status, [_handle, POINTER(Losses)]),
    "moe_pass_stats": (_status, [_handle, POINTER(Stats)]),
    "moe_pass_get_report": (_status, [_handle, POINTER(PassReport)]),
    "moe_pass_tensor": (_status, [_handle, c_int32, POINTER(TensorView)]),
    "moe_pass_trim": (_status, [_handle]),
    "moe_plan_create": (_status, [_new, _handle]),
    "moe_plan_destroy": (None, [_handle]),
    "moe_plan_build": (_status, [_handle, POINTER(PlanArgs)]),
    "moe_plan_copy": (_status, [_handle, _handle]),
    "moe_plan_get": (_status, [_handle, POINTER(PlanView)]),
    "moe_plan_check": (_status, [_handle]),
    "moe_plan_save": (_status, [_handle, c_void_p, c_int64, POINTER(c_int64)]),
    "moe_plan_load": (_status, [_handle, c_void_p, c_int64]),
    "moe_preset_count": (c_int64, []),
    "moe_preset_name": (c_char_p, [c_int64]),
    "moe_preset_source": (c_char_p, [c_int64]),
    "moe_check_gradients": (_status, [_handle, POINTER(GradientCheck), POINTER(GradientReport)]),
}

_configs = [POINTER(GateConfig), POINTER(ExpertsConfig), POINTER(LayerConfig)]
PROTOTYPES["moe_preset"] = (_status, [c_char_p, *_configs])
PROTOTYPES["moe_describe"] = (_status, [c_char_p, c_int64, POINTER(c_int64), *_configs])

_items = [c_char_p, POINTER(CheckpointItem), c_int64]
IO_PROTOTYPES: Dict[str, Tuple[Any, List[Any]]] = {
    "moe_file_open": (_status, [_new, c_char_p]),
    "moe_file_close": (None, [_handle]),
    "moe_file_count": (c_int64, [_handle]),
    "moe_file_find": (c_int64, [_handle, c_char_p]),
    "moe_file_entry": (_status, [_handle, c_int64, POINTER(FileRecord)]),
    "moe_file_read": (_status, [_handle, c_int64, c_void_p, c_int64, c_int64, c_int32]),
    "moe_file_metadata_count": (c_int64, [_handle]),
    "moe_file_metadata": (_status, [_handle, c_int64, POINTER(c_char_p), POINTER(c_char_p)]),
    "moe_file_metadata_find": (c_char_p, [_handle, c_char_p]),
    "moe_checkpoint_save": (_status, [*_items, POINTER(SaveOptions)]),
    "moe_checkpoint_load": (_status, [*_items, POINTER(LoadOptions), POINTER(LoadReport)]),
    "moe_family_names": (_status, [POINTER(TensorNames), c_int32]),
    "moe_import": (_status, [_handle, _handle, c_int32, c_int64, POINTER(ImportOptions)]),
    "moe_export": (
        _status,
        [c_char_p, _handle, c_int32, c_int64, POINTER(TensorNames), POINTER(SaveOptions)],
    ),
    "moe_upcycle": (_status, [_handle, POINTER(UpcycleArgs)]),
}
# Without moe_comm_create_mpi, which takes an MPI_Comm.
MPI_PROTOTYPES: Dict[str, Tuple[Any, List[Any]]] = {
    "moe_comm_create_mpi_f": (_status, [_new, _handle, c_int32, POINTER(MpiOptions)]),
}

CUDA_PROTOTYPES: Dict[str, Tuple[Any, List[Any]]] = {
    "moe_cuda_context_create": (_status, [_new, POINTER(CudaConfig)]),
    "moe_cuda_poll": (_status, [_handle]),
    "moe_cuda_device": (c_int32, [_handle]),
    "moe_cuda_pass_set": (_status, [_handle, POINTER(CudaPassConfig)]),
}

NCCL_PROTOTYPES: Dict[str, Tuple[Any, List[Any]]] = {
    "moe_comm_create_nccl": (_status, [_new, _handle, POINTER(NcclConfig)]),
    "moe_nccl_version": (c_int32, []),
    "moe_nccl_oldest_version": (c_int32, []),
}

for _table, _structs in (
    (PROTOTYPES, STRUCTS), (IO_PROTOTYPES, IO_STRUCTS), (MPI_PROTOTYPES, MPI_STRUCTS),
    (CUDA_PROTOTYPES, CUDA_STRUCTS), (NCCL_PROTOTYPES, NCCL_STRUCTS),
):  # fmt: skip
    for _struct in _structs:
        if _struct not in FILLED_BY_LIBRARY:
            _table[c_name(_struct) + "_init"] = (_status, [POINTER(_struct), c_size_t])
for _object in ("gate", "experts", "layer"):
    _prefix = "moe_" + _object
    PROTOTYPES[_prefix + "_destroy"] = (None, [_handle])
    PROTOTYPES[_prefix + "_forward"] = (_status, [_handle, _handle, POINTER(ForwardArgs)])
    PROTOTYPES[_prefix + "_backward"] = (_status, [_handle, _handle, POINTER(BackwardArgs)])
    PROTOTYPES[_prefix + "_parameter_count"] = (c_int64, [_handle])
    PROTOTYPES[_prefix + "_parameter_find"] = (c_int64, [_handle, c_char_p])
    PROTOTYPES[_prefix + "_parameter"] = (_status, [_handle, c_int64, POINTER(ParameterRecord)])
    PROTOTYPES[_prefix + "_bind"] = (_status, [_handle, c_int64, POINTER(Binding)])
    PROTOTYPES[_prefix + "_zero_gradients"] = (_status, [_handle, c_void_p])
    PROTOTYPES[_prefix + "_init_parameters"] = (_status, [_handle, c_uint64])
for _direction, _args in (("forward", ForwardArgs), ("backward", BackwardArgs)):
    _prefix = "moe_layer_" + _direction
    PROTOTYPES[_prefix + "_start"] = (_status, [_handle, _handle, POINTER(_args)])
    PROTOTYPES[_prefix + "_work"] = (_status, [_handle, _handle])
    PROTOTYPES[_prefix + "_finish"] = (_status, [_handle, _handle])
for _step in ("dispatch", "combine"):
    for _direction in ("forward", "backward"):
        PROTOTYPES[f"moe_{_step}_{_direction}"] = (_status, [_handle, POINTER(RowsArgs)])
