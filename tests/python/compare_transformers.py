"""Agreement with the MoE blocks of transformers: same weights, same input, same gradient of y.

A block of the installed transformers gets random weights; libmoe computes in the very same memory,
configured by the preset of the model's name and nothing but sizes and layouts. Compared are the
sets of chosen experts, their weights, y, dx and the gradient of every parameter, in float32 and
float64 and in several shapes. A number is max |libmoe - transformers| / max |transformers|, the
largest over the shapes. Exit status 1 if a set differs or a number is above LIMIT.

Most routers of transformers cast logits or scores to float32 whatever the model's dtype. In a
float64 run that alone would be an error of 1e-7, so wide() makes these casts casts to float64: the
rows marked * are the blocks' own code with `.float()` and `torch.float32` meaning double.

load_balancing_loss_func of transformers is E sum_e f_e P_e with f_e the entries of expert e over
the number of tokens, so that sum f = K. libmoe's switch loss divides by the number of entries, as
the paper's f does for K = 1: the former is K times the latter, and switch_weight is K here. Other
weights of losses that a preset has are 0: the blocks add no losses.

`make check-transformers`, or this file with the names of some blocks.
"""

import contextlib
import itertools
import sys
from typing import Any, Callable, Dict, NamedTuple

import torch
import transformers
from transformers.models.dbrx import modeling_dbrx as dbrx_
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss_
from transformers.models.llama4 import modeling_llama4 as llama4_
from transformers.models.mixtral import modeling_mixtral as mixtral_
from transformers.models.olmoe import modeling_olmoe as olmoe_
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2_
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_

import moe

LIMIT = {torch.float64: 1e-10, torch.float32: 1e-4}
COLUMNS = ("weights", "y", "dx", "router", "gate, up", "down", "biases", "shared", "shared gate")


class Shape(NamedTuple):
    """Sizes of one comparison; groups and top_groups are for DeepSeek."""

    batch: int
    sequence: int
    d: int
    f: int
    e: int
    k: int
    groups: int
    top_groups: int


SHAPES = (
    Shape(2, 20, 64, 96, 16, 4, 4, 2),
    Shape(3, 13, 51, 37, 9, 2, 3, 2),
    Shape(1, 1, 16, 8, 5, 3, 1, 1),
    Shape(2, 64, 128, 24, 32, 8, 8, 4),
)


class Bound(NamedTuple):
    """A tensor of the block that a parameter of libmoe is bound to."""

    column: str
    tensor: torch.Tensor
    view: Callable = lambda tensor: tensor  # the same memory in the parameter's shape


class Block(NamedTuple):
    """A block of transformers and how libmoe sees it."""

    module: Any
    preset: str
    fields: Dict[str, Any]  # sizes and layouts, all that the preset does not say
    bound: Dict[str, Bound]
    route: Callable[[torch.Tensor], torch.Tensor]  # x [T,D] to dense weights [T,E]
    shared: int = 0  # hidden width of the shared expert; 0: none
    spread: float = 1.0  # of the random weights of experts


# ---- what the adapters have in common -----------------------------------------------------------


def turned(tensor):
    return tensor.transpose(-1, -2)


def dense(scores, ids, experts):
    """[T,K] weights and ids as [T,E], 0 where an expert is not chosen."""
    return torch.zeros(len(ids), experts, dtype=scores.dtype).scatter(1, ids, scores)


def top_k_route(router, experts):
    """For routers that return (logits, scores [T,K], ids [T,K])."""
    return lambda x: dense(*router(x)[1:], experts)


def sizes(s, **fields):
    return {"d_model": s.d, "d_hidden": s.f, "num_experts": s.e, "top_k": s.k, **fields}


def usual(s, **fields):
    """Experts as transformers keeps most: [E,2F,D], gate then up, and [E,D,F]."""
    return sizes(s, weight_layout="out_in", glu_order="gate_up", **fields)


def fused(router, experts):
    return {
        "gate.weight": Bound("router", router.weight, turned),
        "experts.w13": Bound("gate, up", experts.gate_up_proj),
        "experts.w2": Bound("down", experts.down_proj),
    }


def shared_mlp(mlp):
    """A pool of one expert on three nn.Linear."""
    names = {"w1": mlp.gate_proj, "w3": mlp.up_proj, "w2": mlp.down_proj}
    return {f"shared.{name}": Bound("shared", linear.weight, lambda w: w[None])
            for name, linear in names.items()}  # fmt: skip


# ---- one adapter a model ------------------------------------------------------------------------


def mixtral(s):
    config = transformers.MixtralConfig(
        hidden_size=s.d, intermediate_size=s.f, num_local_experts=s.e, num_experts_per_tok=s.k
    )
    block = mixtral_.MixtralSparseMoeBlock(config)
    bound = fused(block.gate, block.experts)
    return Block(block, "mixtral", usual(s), bound, top_k_route(block.gate, s.e))


def qwen3_moe(s):
    config = transformers.Qwen3MoeConfig(
        hidden_size=s.d, moe_intermediate_size=s.f, num_experts=s.e, num_experts_per_tok=s.k,
        norm_topk_prob=True,  # as in the released models; the class has False
    )  # fmt: skip
    block = qwen3_.Qwen3MoeSparseMoeBlock(config)
    bound = fused(block.gate, block.experts)
    return Block(block, "qwen3", usual(s), bound, top_k_route(block.gate, s.e))


def olmoe(s):
    config = transformers.OlmoeConfig(
        hidden_size=s.d, intermediate_size=s.f, num_experts=s.e, num_experts_per_tok=s.k
    )
    block = olmoe_.OlmoeSparseMoeBlock(config)
    bound = fused(block.gate, block.experts)
    return Block(block, "olmoe", usual(s), bound, top_k_route(block.gate, s.e))


def qwen2_moe(s):
    config = transformers.Qwen2MoeConfig(
        hidden_size=s.d, moe_intermediate_size=s.f, num_experts=s.e, num_experts_per_tok=s.k,
        shared_expert_intermediate_size=2 * s.f + 3,
    )  # fmt: skip
    block = qwen2_.Qwen2MoeSparseMoeBlock(config)
    bound = fused(block.gate, block.experts) | shared_mlp(block.shared_expert)
    gate = block.shared_expert_gate.weight
    bound["shared_gate"] = Bound("shared gate", gate, lambda w: w[0])
    route = top_k_route(block.gate, s.e)
    return Block(block, "qwen2", usual(s), bound, route, shared=2 * s.f + 3)


def deepseek_v3(s):
    config = transformers.DeepseekV3Config(
        hidden_size=s.d, moe_intermediate_size=s.f, n_routed_experts=s.e, num_experts_per_tok=s.k,
        n_group=s.groups, topk_group=s.top_groups, n_shared_experts=2,
    )  # fmt: skip
    block = deepseek_.DeepseekV3MoE(config)
    bound = fused(block.gate, block.experts) | shared_mlp(block.shared_experts)
    bound["gate.selection_bias"] = Bound("", block.gate.e_score_correction_bias)  # a buffer
    fields = usual(s, expert_groups=s.groups, top_groups=s.top_groups)
    route = top_k_route(block.gate, s.e)
    return Block(block, "deepseek_v3", fields, bound, route, shared=2 * s.f)


def gpt_oss(s):
    config = transformers.GptOssConfig(
        hidden_size=s.d, intermediate_size=s.f, num_local_experts=s.e, num_experts_per_tok=s.k
    )
    block = gpt_oss_.GptOssMLP(config)
    experts = block.experts
    bound = fused(block.router, experts) | {
        "gate.bias": Bound("biases", block.router.bias),
        "experts.b13": Bound("biases", experts.gate_up_proj_bias),
        "experts.b2": Bound("biases", experts.down_proj_bias),
    }
    fields = sizes(s, weight_layout="in_out", glu_order="interleaved")
    # By shape, between a twentieth and a half of the projections are beyond the limit of 7.
    return Block(block, "gpt_oss", fields, bound, top_k_route(block.router, s.e), spread=6.0)


def llama4(s):
    """Every expert runs on every token there; the input of those not chosen is 0."""
    config = transformers.Llama4TextConfig(
        hidden_size=s.d, intermediate_size=s.f, num_local_experts=s.e, num_experts_per_tok=s.k
    )
    block = llama4_.Llama4TextMoe(config)
    bound = fused(block.router, block.experts) | shared_mlp(block.shared_expert)
    fields = sizes(s, weight_layout="in_out", glu_order="gate_up")
    return Block(block, "llama4", fields, bound, lambda x: block.router(x)[0], shared=s.f)


def dbrx(s):
    """w1 and v1 are [E F,D], and so is w2: only a view makes it [E,D,F]."""
    config = transformers.DbrxConfig(
        d_model=s.d,
        ffn_config={"hidden_size": s.d, "ffn_hidden_size": s.f, "moe_num_experts": s.e,
                    "moe_top_k": s.k, "moe_normalize_expert_weights": 1.0},
    )  # fmt: skip
    block = dbrx_.DbrxFFN(config)
    mlp, router = block.experts.mlp, block.router
    bound = {
        "gate.weight": Bound("router", router.layer.weight, turned),
        "experts.w1": Bound("gate, up", mlp.w1, lambda w: w.view(s.e, s.f, s.d)),
        "experts.w3": Bound("gate, up", mlp.v1, lambda w: w.view(s.e, s.f, s.d)),
        "experts.w2": Bound("down", mlp.w2, lambda w: turned(w.view(s.e, s.f, s.d))),
    }

    def route(x):
        return dense(*block.route_tokens_to_experts(router(x)), s.e)

    return Block(block, "dbrx", sizes(s, weight_layout="out_in"), bound, route)


MODELS = {"Mixtral": mixtral, "Qwen3-MoE": qwen3_moe, "OLMoE": olmoe, "Qwen2-MoE": qwen2_moe,
          "DeepSeek-V3": deepseek_v3, "gpt-oss": gpt_oss, "Llama 4": llama4,
          "DBRX": dbrx}  # fmt: skip
FLOAT32_CASTS = set(MODELS) - {"gpt-oss", "DBRX"}
LOSSES = {name: module.load_balancing_loss_func
          for name, module in (("Mixtral", mixtral_), ("OLMoE", olmoe_))}  # fmt: skip


# ---- both sides ---------------------------------------------------------------------------------


@contextlib.contextmanager
def wide(dtype):
    """Make casts to float32 casts to float64 meanwhile, if that is the dtype."""
    if dtype is torch.float32:
        yield
        return
    kept = torch.float, torch.float32, torch.Tensor.float
    torch.float = torch.float32 = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float, torch.float32, torch.Tensor.float = kept


def drawn(name, s, dtype):
    """A block of this dtype with random weights."""
    torch.set_default_dtype(dtype)
    with wide(dtype):
        block = MODELS[name](s)
    torch.set_default_dtype(torch.float32)
    module = block.module.eval()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        spread = block.spread if "experts" in name else 1.0
        std = 0.3 if "bias" in name else spread * tensor.shape[-1] ** -0.5
        tensor.data.normal_(0.0, std)
    return block


def libmoe_layer(context, block, dtype, **loss):
    """libmoe on the block's memory: the layer, and its gradients by parameter. The blocks have no losses: those
    that the preset's recipe adds are off, but for those given."""
    own = {"dtype": str(dtype).replace("torch.", ""), "parameters": "bound"}
    off = {"switch_weight": 0, "z_weight": 0, "sequence_weight": 0}
    preset, shared = moe.preset(block.preset, **own, **block.fields, **{**off, **loss}), None
    if block.shared:
        shared = moe.Experts(context, d_model=preset.experts.d_model, d_hidden=block.shared,
                             num_experts=1, activation="swiglu", weight_layout="out_in",
                             **own)  # fmt: skip
    layer = preset.make(context, shared=shared)
    parameters, grads = layer.parameters, {}
    if set(parameters) != set(block.bound):
        raise SystemExit(f"{block.preset}: {sorted(parameters)} is not {sorted(block.bound)}")
    for name, bound in block.bound.items():
        data, grad = bound.tensor.detach(), None
        if bound.column:
            grads[name] = torch.zeros_like(data)
            grad = bound.view(grads[name])
        parameters[name].bind(bound.view(data), grad)
    return layer, grads


def error(got, want):
    """max |got - want| / max |want|, infinite for a NaN."""
    scale, distance = want.abs().max().item(), (got - want).abs().max().item()
    ratio = distance / scale if scale else distance
    return ratio if ratio == ratio else float("inf")


def plan_weights(step, s):
    """[T,E] weights of libmoe's routing."""
    plan = step.plan.arrays()
    ids = torch.as_tensor(plan.expert_of_entry).long().view(-1, s.k)
    return dense(torch.as_tensor(plan.weight_of_entry).view(-1, s.k), ids, s.e)


def compare(context, name, s, dtype):
    """The fraction of tokens with equal sets, and an error for each column that there is."""
    torch.manual_seed(s.d)
    block = drawn(name, s, dtype)
    x = torch.randn(s.batch, s.sequence, s.d, dtype=dtype, requires_grad=True)
    dy = torch.randn(s.batch, s.sequence, s.d, dtype=dtype)
    with wide(dtype):
        y = block.module(x)
        y = (y[0] if isinstance(y, tuple) else y).view_as(x)
        y.backward(dy)
        weights = block.route(x.detach().view(-1, s.d)).detach()
    layer, grads = libmoe_layer(context, block, dtype)
    step = moe.Pass(layer)
    flat = x.detach().view(-1, s.d)
    got_y = torch.as_tensor(layer.forward(step, flat)).view_as(x)
    dx = torch.as_tensor(layer.backward(step, dy.view(-1, s.d))).view_as(x)
    got_weights = plan_weights(step, s)
    sets = ((got_weights > 0) == (weights > 0)).all(dim=1).double().mean().item()
    errors = {"weights": error(got_weights, weights), "y": error(got_y, y.detach()),
              "dx": error(dx, x.grad)}  # fmt: skip
    for name, grad in grads.items():
        bound = block.bound[name]
        one = error(grad, bound.tensor.grad)
        errors[bound.column] = max(errors.get(bound.column, 0.0), one)
    return sets, errors


def compare_loss(context, name, s, dtype, masked):
    """The load balancing loss alone: its value (in the column of y), dx, the router's gradient."""
    torch.manual_seed(s.e)
    block = drawn(name, s, dtype)
    x = torch.randn(s.batch * s.sequence, s.d, dtype=dtype, requires_grad=True)
    router = block.bound["gate.weight"].tensor
    mask = torch.rand(s.batch, s.sequence) < 0.7 if masked and s.sequence > 1 else None
    with wide(dtype):
        loss = LOSSES[name]((block.module.gate(x)[0],), s.e, s.k, mask)
        loss.backward()
    layer, grads = libmoe_layer(context, block, dtype, switch_weight=s.k)
    step = moe.Pass(layer)
    layer.forward(step, x.detach(), token_mask=None if mask is None else mask.view(-1))
    dx = torch.as_tensor(layer.backward(step, torch.zeros_like(x.detach())))
    value = torch.tensor(step.losses.switch, dtype=torch.float64)
    return {"y": error(value, loss.detach()), "dx": error(dx, x.grad),
            "router": error(grads["gate.weight"], router.grad)}  # fmt: skip


# ---- the tables ---------------------------------------------------------------------------------


def line(name, dtype, sets, errors):
    """A row of the table, and whether it agrees."""
    good = sets is None or sets == 1.0
    cells = [name, str(dtype).replace("torch.", ""), "" if sets is None else f"{sets:g}"]
    for column in COLUMNS:
        value = errors.get(column)
        good = good and (value is None or value <= LIMIT[dtype])
        cells.append("" if value is None else f"{value:.1e}")
    print("| " + " | ".join(cells) + " |" + ("" if good else "  <-- FAILED"), flush=True)
    return good


def worst(results):
    """The smallest fraction and the largest errors of several shapes."""
    fraction, errors = 1.0, {}
    for sets, one in results:
        fraction = min(fraction, sets)
        for column, value in one.items():
            errors[column] = max(errors.get(column, 0.0), value)
    return fraction, errors


def main(chosen):
    transformers.logging.set_verbosity_error()  # of a block outside its model
    context = moe.Context(threads=2)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(f"libmoe {moe.version()}, {versions}\n")
    print("| block | dtype | equal sets | " + " | ".join(COLUMNS) + " |")
    print("|---" * (3 + len(COLUMNS)) + "|")
    good = True
    for name in chosen or MODELS:
        for dtype in LIMIT:
            mark = "*" if dtype is torch.float64 and name in FLOAT32_CASTS else ""
            results = worst(compare(context, name, s, dtype) for s in SHAPES)
            good &= line(name + mark, dtype, *results)
    for name, masked in itertools.product(() if chosen else LOSSES, (False, True)):
        for dtype in LIMIT:
            mark = ", masked" * masked + "*" * (dtype is torch.float64)
            _, errors = worst((1.0, compare_loss(context, name, s, dtype, masked)) for s in SHAPES)
            good &= line(f"{name} loss{mark}", dtype, None, errors)
    print("\n* casts to float32 made casts to float64, see the file's head")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
