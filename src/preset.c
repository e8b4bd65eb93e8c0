/* preset.c - conventions by name: one function a preset, one table.
 *
 * A preset begins from the defaults of every convention, so that it depends on its name alone, and
 * sets what the paper or the system has. Sizes, dtypes, layouts, seeds and handles stay the host's.
 * Weights of losses are those of the published recipes, in the units of moe/gate.h; where a system
 * sums n_e/T in place of n_e/(T K), the weight here is K times its coefficient. */
#include "pass_state.h"

#include <float.h>
#include <string.h>

typedef struct configs {
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
} configs;

/* ---- building blocks ------------------------------------------------------------------------- */

static void top_k(configs *c, int64_t k, int32_t order, int32_t renormalize)
{
    c->g.kind = MOE_GATE_TOP_K;
    c->g.top_k = k;
    c->g.order = order;
    c->g.renormalize = renormalize;
}

static void capacity(configs *c, double train, double eval, int32_t rounding, int64_t minimum)
{
    c->g.capacity_kind = MOE_CAPACITY_FACTOR;
    c->g.capacity_factor = train;
    c->g.capacity_factor_eval = eval;
    c->g.capacity_rounding = rounding;
    c->g.capacity_minimum = minimum;
}

static void noisy(configs *c, int64_t k, double weight)
{
    c->g.kind = MOE_GATE_NOISY_TOP_K;
    c->g.top_k = k;
    c->g.importance_weight = c->g.load_weight = weight;
}

/* ---- the papers ------------------------------------------------------------------------------ */

static void shazeer2017(configs *c) { noisy(c, 4, 0.1); }

static void hierarchical2017(configs *c)
{
    noisy(c, 2, 0.1);
    c->g.kind = MOE_GATE_HIERARCHICAL;
    c->g.top_groups = 2;
}

static void balanced2017(configs *c)
{
    c->g.kind = MOE_GATE_BALANCED;
    c->g.top_k = 4;
    capacity(c, 1, 0, MOE_ROUND_DOWN, 1);
    c->g.threshold_weight = 1;
}

static void multimodel(configs *c) { noisy(c, 4, 0.01); }

static void gshard(configs *c)
{
    top_k(c, 2, MOE_ORDER_SCORE_THEN_SELECT, 1);
    c->g.renormalize_epsilon = 1e-9;
    c->g.second_choice = MOE_SECOND_CHOICE_RANDOM;
    c->g.second_threshold = 0.5;
    capacity(c, 1, 0, MOE_ROUND_DOWN, 4);
    c->g.drop_policy = MOE_DROP_CHOICE;
    c->g.gshard_weight = 0.01;
    c->g.loss_scope = MOE_LOSS_SCOPE_GROUP;
}

static void switch_transformer(configs *c)
{
    top_k(c, 1, MOE_ORDER_SCORE_THEN_SELECT, 0);
    c->g.jitter = 0.01;
    capacity(c, 1.25, 2, MOE_ROUND_DOWN, 4);
    c->g.switch_weight = 0.01;
}

/* ---- the systems ----------------------------------------------------------------------------- */

static void deepspeed_top1(configs *c)
{
    top_k(c, 1, MOE_ORDER_SCORE_THEN_SELECT, 0);
    capacity(c, 1, 0, MOE_ROUND_UP, 4);
    c->g.drop_policy = MOE_DROP_RANDOM;
    c->g.switch_weight = 0.01;
}

static void deepspeed_top2(configs *c)
{
    top_k(c, 2, MOE_ORDER_SCORE_THEN_SELECT, 0);
    c->g.choice_noise = MOE_CHOICE_NOISE_GUMBEL_REST;
    capacity(c, 1, 0, MOE_ROUND_UP, 4);
    c->g.drop_policy = MOE_DROP_CHOICE;
    c->g.renormalize_after_drop = 1;
    c->g.renormalize_minimum = (double)FLT_EPSILON;
    c->g.gshard_weight = 0.01;
}

static void prmoe(configs *c)
{
    deepspeed_top1(c);
    c->l.residual_mix = 1;
}

static void tutel(configs *c)
{
    top_k(c, 2, MOE_ORDER_SCORE_THEN_SELECT, 1);
    c->g.renormalize_minimum = (double)FLT_EPSILON;
    capacity(c, 1, 0, MOE_ROUND_PER_CHOICE, 0);
    c->g.drop_policy = MOE_DROP_CHOICE;
    c->g.gshard_weight = 0.01;
}

static void megablocks(configs *c)
{
    top_k(c, 1, MOE_ORDER_SCORE_THEN_SELECT, 0);
    c->g.switch_weight = 0.1;
    c->e.activation = MOE_ACTIVATION_GELU_TANH;
}

/* ---- the models ------------------------------------------------------------------------------ */

static void mixtral(configs *c)
{
    top_k(c, 2, MOE_ORDER_SELECT_THEN_SCORE, 0);
    c->g.switch_weight = 2 * 0.02;
    c->e.activation = MOE_ACTIVATION_SWIGLU;
}

static void dbrx(configs *c)
{
    top_k(c, 4, MOE_ORDER_SCORE_THEN_SELECT, 1);
    c->g.switch_weight = 4 * 0.05;
    c->e.activation = MOE_ACTIVATION_SWIGLU;
}

static void olmoe(configs *c)
{
    top_k(c, 8, MOE_ORDER_SCORE_THEN_SELECT, 0);
    c->g.switch_weight = 0.01;
    c->g.z_weight = 0.001;
    c->e.activation = MOE_ACTIVATION_SWIGLU;
}

static void qwen2(configs *c)
{
    top_k(c, 4, MOE_ORDER_SCORE_THEN_SELECT, 0);
    c->g.switch_weight = 4 * 0.001;
    c->e.activation = MOE_ACTIVATION_SWIGLU;
    c->l.shared_gate = 1;
}

static void qwen3(configs *c)
{
    top_k(c, 8, MOE_ORDER_SCORE_THEN_SELECT, 1);
    c->g.switch_weight = 8 * 0.001;
    c->e.activation = MOE_ACTIVATION_SWIGLU;
}

static void deepseek_v2(configs *c)
{
    top_k(c, 6, MOE_ORDER_SCORE_THEN_SELECT, 0);
    c->g.expert_groups = 8;
    c->g.top_groups = 3;
    c->g.route_scale = 16;
    c->g.sequence_weight = 0.003;
    c->g.sequence_score = MOE_SCORE_SOFTMAX;
    c->g.sequence_counts = MOE_SEQUENCE_COUNTS_ROUTED;
    c->e.activation = MOE_ACTIVATION_SWIGLU;
}

static void deepseek_v3(configs *c)
{
    top_k(c, 8, MOE_ORDER_SCORE_THEN_SELECT, 1);
    c->g.score = MOE_SCORE_SIGMOID;
    c->g.renormalize_epsilon = 1e-20;
    c->g.selection_bias = 1;
    c->g.expert_groups = 8;
    c->g.top_groups = 4;
    c->g.group_score = 2;
    c->g.route_scale = 2.5;
    c->g.sequence_weight = 1e-4;
    c->e.activation = MOE_ACTIVATION_SWIGLU;
}

static void gpt_oss(configs *c)
{
    top_k(c, 4, MOE_ORDER_SELECT_THEN_SCORE, 0);
    c->g.bias = 1;
    c->e.activation = MOE_ACTIVATION_SWIGLU;
    c->e.activation_alpha = 1.702;
    c->e.activation_limit = 7;
    c->e.activation_offset = 1;
    c->e.bias = 1;
}

static void llama4(configs *c)
{
    top_k(c, 1, MOE_ORDER_SCORE_THEN_SELECT, 0);
    c->g.score = MOE_SCORE_SIGMOID;
    c->e.activation = MOE_ACTIVATION_SWIGLU;
    c->e.weight_position = MOE_WEIGHT_ON_INPUT;
}

/* ---- the table ------------------------------------------------------------------------------- */

static const struct {
    const char *name, *source;
    void (*set)(configs *c);
} PRESETS[] = {
    {"shazeer2017",
     "Shazeer et al. 2017, arXiv 1701.06538, eq. 1-11, section 5.1; noise as in the "
     "authors' tensor2tensor/utils/expert_utils.py",
     shazeer2017},
    {"hierarchical2017", "Shazeer et al. 2017, arXiv 1701.06538, appendix B and C.1",
     hierarchical2017},
    {"balanced2017", "Shazeer et al. 2017, arXiv 1701.06538, appendix F, eq. 15-20", balanced2017},
    {"multimodel",
     "Kaiser et al. 2017, arXiv 1706.05137, section 2; "
     "tensor2tensor/models/research/multimodel.py",
     multimodel},
    {"gshard",
     "Lepikhin et al. 2020, arXiv 2006.16668, algorithm 1; "
     "tensor2tensor/models/research/moe.py",
     gshard},
    {"switch", "Fedus et al. 2021, arXiv 2101.03961, eq. 1-6; tensor2tensor/models/research/moe.py",
     switch_transformer},
    {"deepspeed_top1", "DeepSpeed, deepspeed/moe/sharded_moe.py, top1gating", deepspeed_top1},
    {"deepspeed_top2", "DeepSpeed, deepspeed/moe/sharded_moe.py, top2gating", deepspeed_top2},
    {"prmoe", "Rajbhandari et al. 2022, arXiv 2201.05596; DeepSpeed, deepspeed/moe/layer.py",
     prmoe},
    {"tutel", "Tutel, tutel/impls/fast_dispatch.py, losses.py", tutel},
    {"megablocks", "MegaBlocks, megablocks/layers/router.py, moe.py", megablocks},
    {"mixtral", "Jiang et al. 2024, arXiv 2401.04088; transformers, modeling_mixtral.py", mixtral},
    {"dbrx", "DBRX; transformers, modeling_dbrx.py", dbrx},
    {"olmoe", "Muennighoff et al. 2024, arXiv 2409.02060; transformers, modeling_olmoe.py", olmoe},
    {"qwen2", "Qwen2-MoE, arXiv 2407.10671; transformers, modeling_qwen2_moe.py", qwen2},
    {"qwen3", "Qwen3-MoE, arXiv 2505.09388; transformers, modeling_qwen3_moe.py", qwen3},
    {"deepseek_v2",
     "DeepSeek-AI 2024, arXiv 2405.04434, eq. 20-25; transformers, "
     "modeling_deepseek_v2.py",
     deepseek_v2},
    {"deepseek_v3",
     "DeepSeek-AI 2024, arXiv 2412.19437, eq. 12-20; transformers, "
     "modeling_deepseek_v3.py",
     deepseek_v3},
    {"gpt_oss", "gpt-oss, arXiv 2508.10925; transformers, modeling_gpt_oss.py", gpt_oss},
    {"llama4", "Llama 4; transformers, modeling_llama4.py", llama4},
};
enum { COUNT = sizeof PRESETS / sizeof *PRESETS };

int64_t moe_preset_count(void) { return COUNT; }

const char *moe_preset_name(int64_t index)
{
    return index >= 0 && index < COUNT ? PRESETS[index].name : NULL;
}

const char *moe_preset_source(int64_t index)
{
    return index >= 0 && index < COUNT ? PRESETS[index].source : NULL;
}

/* ---- filling a host's configs ---------------------------------------------------------------- */

static void keep_gate(moe_gate_config *to, const moe_gate_config *host)
{
    moe__gate_config_info.defaults(to);
    to->d_model = host->d_model;
    to->num_experts = host->num_experts;
    to->dtype = host->dtype;
    to->seed = host->seed;
    to->stream_id = host->stream_id;
    to->parameters = host->parameters;
    to->init_std = host->init_std;
}

static void keep_experts(moe_experts_config *to, const moe_experts_config *host)
{
    moe__experts_config_info.defaults(to);
    to->d_model = host->d_model;
    to->d_hidden = host->d_hidden;
    to->d_out = host->d_out;
    to->num_experts = host->num_experts;
    to->glu_order = host->glu_order;
    to->weight_layout = host->weight_layout;
    to->storage = host->storage;
    to->dtype = host->dtype;
    to->parameters = host->parameters;
    to->init_std = host->init_std;
}

static void keep_layer(moe_layer_config *to, const moe_layer_config *host)
{
    moe__layer_config_info.defaults(to);
    to->gate = host->gate;
    to->experts = host->experts;
    to->shared = host->shared;
    to->residual = host->residual;
    to->comm = host->comm;
    to->node_comm = host->node_comm;
    to->rail_comm = host->rail_comm;
    to->layer_id = host->layer_id;
    to->parameters = host->parameters;
}

/* A struct of an older host must have every field that the preset sets. */
static moe_status check_room(const moe__struct_info *info, const void *host, const void *preset,
                             const char *name, const char *function)
{
    union {
        moe_gate_config g;
        moe_experts_config e;
        moe_layer_config l;
    } plain;
    uint64_t size = *(const uint64_t *)host;
    if (size >= info->size) return MOE_OK;
    memset(&plain, 0, sizeof plain);
    info->defaults(&plain);
    if (memcmp((const char *)&plain + size, (const char *)preset + size, info->size - size) != 0)
        REFUSE(MOE_ERROR_STRUCT_TOO_OLD, "%s of %llu bytes has no room for what preset \"%s\" sets",
               info->name, (unsigned long long)size, name);
    return MOE_OK;
}

/* The preset on what is kept of the host's configs. */
static void make(configs *c, const configs *host, bool has_gate, bool has_experts, bool has_layer,
                 int64_t index)
{
    memset(c, 0, sizeof *c);
    moe__gate_config_info.defaults(&c->g);
    moe__experts_config_info.defaults(&c->e);
    moe__layer_config_info.defaults(&c->l);
    if (has_gate) keep_gate(&c->g, &host->g);
    if (has_experts) keep_experts(&c->e, &host->e);
    if (has_layer) keep_layer(&c->l, &host->l);
    PRESETS[index].set(c);
    /* The split E = A x B of a hierarchical gate is a size. */
    if (c->g.kind == MOE_GATE_HIERARCHICAL && has_gate) c->g.expert_groups = host->g.expert_groups;
    c->g.struct_size = sizeof c->g;
    c->e.struct_size = sizeof c->e;
    c->l.struct_size = sizeof c->l;
}

moe_status moe_preset(const char *name, moe_gate_config *gate, moe_experts_config *experts,
                      moe_layer_config *layer)
{
    const char *function = __func__;
    configs host, c;
    int64_t index = 0;
    if (!name) REFUSE_ARGUMENT("name is NULL");
    while (index < COUNT && strcmp(PRESETS[index].name, name) != 0) index++;
    if (index == COUNT) REFUSE_ARGUMENT("there is no preset \"%.40s\"", name);
    memset(&host, 0, sizeof host);
    if (gate) MOE_TRY(moe__struct_read(&moe__gate_config_info, &host.g, gate, false, function));
    if (experts)
        MOE_TRY(moe__struct_read(&moe__experts_config_info, &host.e, experts, false, function));
    if (layer) MOE_TRY(moe__struct_read(&moe__layer_config_info, &host.l, layer, false, function));
    make(&c, &host, gate != NULL, experts != NULL, layer != NULL, index);
    if (gate) MOE_TRY(check_room(&moe__gate_config_info, gate, &c.g, name, function));
    if (experts) MOE_TRY(check_room(&moe__experts_config_info, experts, &c.e, name, function));
    if (layer) MOE_TRY(check_room(&moe__layer_config_info, layer, &c.l, name, function));
    if (gate) moe__struct_write(&moe__gate_config_info, gate, &c.g);
    if (experts) moe__struct_write(&moe__experts_config_info, experts, &c.e);
    if (layer) moe__struct_write(&moe__layer_config_info, layer, &c.l);
    return MOE_OK;
}
