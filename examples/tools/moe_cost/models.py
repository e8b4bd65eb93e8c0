"""Sizes of published models, and what libmoe says of a layer of theirs.

Presets of the library have conventions and no sizes, so the sizes are here. What can be asked of
the library is: arithmetic (moe_layer_flops), parameters, gradients and passes (moe_layer_memory),
how many experts a token meets, how many matrices an expert has, groups of experts.
"""

from dataclasses import dataclass
from typing import Any, Optional

import moe

ELEMENT = 2  # bytes of bf16, the type of weights and rows
DTYPE = "bfloat16"
GRADIENT_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Sizes:
    """Of one MoE layer, and how many a model has."""

    preset: str
    d_model: int = 0
    d_hidden: int = 0
    experts: int = 0
    layers: int = 1
    shared: int = 0
    shared_hidden: int = 0  # 0: as d_hidden
    top_k: int = 0  # 0: the preset's
    activation: str = ""  # "": the preset's


MODELS = {
    "mixtral": Sizes("mixtral", 4096, 14336, 8, 32),
    "mixtral_8x22b": Sizes("mixtral", 6144, 16384, 8, 56),
    "dbrx": Sizes("dbrx", 6144, 10752, 16, 40),
    "olmoe": Sizes("olmoe", 2048, 1024, 64, 16),
    "qwen2": Sizes("qwen2", 2048, 1408, 60, 24, 1, 5632),
    "qwen2_57b": Sizes("qwen2", 3584, 2560, 64, 28, 1, 20480, 8),
    "qwen3": Sizes("qwen3", 2048, 768, 128, 48),
    "qwen3_235b": Sizes("qwen3", 4096, 1536, 128, 94),
    "deepseek_v2": Sizes("deepseek_v2", 5120, 1536, 160, 59, 2),
    "deepseek_v3": Sizes("deepseek_v3", 7168, 2048, 256, 58, 1),
    "gpt_oss": Sizes("gpt_oss", 2880, 2880, 128, 36),
    "gpt_oss_20b": Sizes("gpt_oss", 2880, 2880, 32, 24),
    "llama4": Sizes("llama4", 5120, 8192, 16, 48, 1),
    "llama4_maverick": Sizes("llama4", 5120, 8192, 128, 24, 1),
}


@dataclass(frozen=True)
class Parameters:
    count: int
    bytes: int


@dataclass(frozen=True)
class Model:
    """A layer whose every number is known."""

    name: str
    d_model: int
    d_hidden: int
    experts: int
    top_k: int
    matrices: int  # of an expert: 2, or 3 if gated
    activation: str
    layers: int
    shared: int
    shared_hidden: int
    groups: int  # of experts, of which a token chooses top_groups; 1 and 1: no limit
    top_groups: int
    gate: Any
    pool: Any
    layer: Any
    branch: Any  # shared experts, or None

    def flops(self, tokens):
        """Forward of gate, routed and shared experts: products alone; the backward has twice.

        The library counts a weighted sum of outputs with a pool, which is no GEMM: 2 O a row.
        """
        gate = moe.flops(self.gate, tokens=tokens).forward_flops
        routed = self._products(self.pool, tokens, self.top_k)
        shared = self._products(self.branch, tokens, self.shared) if self.shared else 0
        return gate, routed, shared

    def _products(self, pool, tokens, top_k):
        counted = moe.flops(None, pool, tokens=tokens, top_k=top_k).forward_flops
        return counted - 2 * tokens * top_k * self.d_model

    def parameters(self, ranks):
        """Count and bytes of what every rank has (all but routed experts), and of its experts."""
        whole = moe.memory(self.gate, self.pool, self.layer, shared=self.branch)
        routed = moe.memory(None, self.pool, top_k=0)
        mine = moe.memory(None, self._pool(self.experts // ranks), top_k=0)
        everywhere = Parameters(
            whole.parameter_count - routed.parameter_count,
            whole.parameter_bytes - routed.parameter_bytes,
        )
        return everywhere, Parameters(mine.parameter_count, mine.parameter_bytes)

    def pass_bytes(self, tokens, training):
        """Of a pass in which as many rows come as leave."""
        return moe.memory(
            self.gate, self.pool, self.layer, shared=self.branch, tokens=tokens, threads=1,
            flags=moe.Forward.TRAIN if training else moe.Forward.NO_SAVE,
        ).pass_bytes  # fmt: skip

    def _pool(self, experts):
        return moe.experts_config(
            d_model=self.d_model, d_hidden=self.d_hidden, num_experts=experts, dtype=DTYPE,
            activation=self.pool.activation, bias=self.pool.bias,
        )  # fmt: skip


def per_token(gate, pool):
    """Experts a token meets. The library has it for every gate, in the active parameters."""
    one = moe.experts_config(
        d_model=pool.d_model, d_hidden=pool.d_hidden, num_experts=1, activation=pool.activation,
        bias=pool.bias, dtype=DTYPE,
    )  # fmt: skip
    expert = moe.memory(None, one, top_k=1)
    active = moe.memory(gate, pool).active_parameters - moe.memory(gate).active_parameters
    return active // expert.parameter_count


def resolve(name: str, sizes: Sizes, groups: Optional[int], top_groups: Optional[int]) -> Model:
    """A model of these sizes; ValueError or moe.Error says what does not fit."""
    fields = {"d_model": sizes.d_model, "d_hidden": sizes.d_hidden, "num_experts": sizes.experts}
    for field, value in fields.items():
        if value < 1:
            flag = "experts" if field == "num_experts" else field.replace("_", "-")
            raise ValueError(f"--{flag} is needed: {name} is known by its conventions only")
    fields.update({"top_k": sizes.top_k} if sizes.top_k else {})
    fields.update({"activation": sizes.activation} if sizes.activation else {})
    made = moe.preset(sizes.preset, **fields, dtype=DTYPE)
    if made.gate.kind == moe.GateKind.HIERARCHICAL:
        raise ValueError(f"{name}: routing by two levels of gates is not in this model")
    if groups is None:
        groups, top_groups = made.gate.expert_groups or 1, made.gate.top_groups or 1
    hidden, branch = sizes.shared_hidden or sizes.d_hidden, None
    plain = moe.experts_config(
        d_model=1, d_hidden=1, num_experts=1, activation=made.experts.activation, dtype=DTYPE
    )
    if sizes.shared:
        branch = moe.experts_config(
            d_model=sizes.d_model, d_hidden=hidden, num_experts=sizes.shared, dtype=DTYPE,
            activation=made.experts.activation, bias=made.experts.bias,
        )  # fmt: skip
    else:
        made.layer.shared_gate = 0
    made.layer.residual_mix = 0  # a residual branch costs what a shared expert does: --shared 1
    top_k = per_token(made.gate, made.experts)
    check_groups(name, sizes.experts, top_k, groups, top_groups)
    return Model(
        name, sizes.d_model, sizes.d_hidden, sizes.experts, top_k,
        moe.memory(None, plain, top_k=0).parameter_count,
        moe.Activation(made.experts.activation).name.lower(), sizes.layers, sizes.shared, hidden,
        groups, top_groups, made.gate, made.experts, made.layer, branch,
    )  # fmt: skip


def check_groups(name, experts, top_k, groups, top_groups):
    if experts % groups:
        raise ValueError(f"{name}: {experts} experts do not divide into {groups} groups")
    if top_groups > groups:
        raise ValueError(f"{name}: {top_groups} of {groups} groups cannot be chosen")
    if top_groups * (experts // groups) < top_k:
        raise ValueError(
            f"{name}: {top_groups} groups of {experts // groups} experts are less than "
            f"{top_k} experts a token"
        )
