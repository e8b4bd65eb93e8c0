/* gate_config.c - the config of a gate: its defaults, and what it may not be. */
#include "pass_state.h"

#include <string.h>

static void gate_defaults(void *instance)
{
    moe_gate_config *c = instance;
    *c = (moe_gate_config){
        .top_k = 1,
        .route_scale = 1,
        .expert_groups = 1,
        .top_groups = 1,
        .noise_epsilon = 1e-2,
        .cdf_guard = 1e-20,
        .sequence_score = MOE_SCORE_SIGMOID,
        .capacity_factor = 1,
        .init_std = MOE_INIT_DEFAULT,
    };
}

const moe__struct_info moe__gate_config_info = {"moe_gate_config", sizeof(moe_gate_config),
                                                offsetof(moe_gate_config, threshold_weight),
                                                gate_defaults};

moe_status moe_gate_config_init(moe_gate_config *config, size_t size)
{
    return moe__struct_init(&moe__gate_config_info, config, size, __func__);
}

double moe_init_default(void) { return MOE_INIT_DEFAULT; }

void moe__gate_loss_weights(const moe_gate_config *c, double weights[MOE_LOSS_SLOTS])
{
    memset(weights, 0, MOE_LOSS_SLOTS * sizeof *weights);
    weights[MOE_LOSS_IMPORTANCE] = c->importance_weight;
    weights[MOE_LOSS_LOAD] = c->load_weight;
    weights[MOE_LOSS_SWITCH] = c->switch_weight;
    weights[MOE_LOSS_GSHARD] = c->gshard_weight;
    weights[MOE_LOSS_Z] = c->z_weight;
    weights[MOE_LOSS_SEQUENCE] = c->sequence_weight;
    weights[MOE_LOSS_THRESHOLD] = c->threshold_weight;
}

const char *moe__gate_kind_name(int32_t kind)
{
    static const char *const NAME[] = {
        "MOE_GATE_TOP_K",    "MOE_GATE_NOISY_TOP_K",  "MOE_GATE_SOFTMAX_DENSE",
        "MOE_GATE_BALANCED", "MOE_GATE_HIERARCHICAL", "MOE_GATE_EXPERT_CHOICE",
        "MOE_GATE_HASH",     "MOE_GATE_SINKHORN",
    };
    return NAME[kind];
}

/* ---- single fields --------------------------------------------------------------------------- */

/* Finite and not negative. */
static moe_status check_factor(const char *name, double value, const char *function)
{
    if (!(value >= 0 && value <= 1.7976931348623157e308))
        REFUSE_ARGUMENT("%s is %g; it must be finite and not negative", name, value);
    return MOE_OK;
}

static moe_status check_finite(const char *name, double value, const char *function)
{
    if (!(value - value == 0)) REFUSE_ARGUMENT("%s is %g; it must be finite", name, value);
    return MOE_OK;
}

/* Fields that hold one of a few numbers. */
static moe_status check_choices(const moe_gate_config *c, const char *function)
{
    const struct {
        const char *name;
        int64_t value, low, high;
    } field[] = {
        {"kind", c->kind, 0, MOE_GATE_SINKHORN},
        {"score", c->score, 0, MOE_SCORE_SIGMOID},
        {"order", c->order, 0, MOE_ORDER_SCORE_THEN_SELECT},
        {"renormalize", c->renormalize, 0, 1},
        {"bias", c->bias, 0, 1},
        {"selection_bias", c->selection_bias, 0, 1},
        {"group_score", c->group_score, 0, c->num_experts / c->expert_groups},
        {"cv_ddof", c->cv_ddof, 0, 1},
        {"stream_id", c->stream_id, 0, 255},
        {"sequence_score", c->sequence_score, 0, MOE_SCORE_SIGMOID},
        {"sequence_counts", c->sequence_counts, 0, MOE_SEQUENCE_COUNTS_ROUTED},
        {"capacity_kind", c->capacity_kind, 0, MOE_CAPACITY_FACTOR},
        {"capacity_rounding", c->capacity_rounding, 0, MOE_ROUND_TOKENS_UP},
        {"capacity", c->capacity, 0, INT64_MAX},
        {"capacity_minimum", c->capacity_minimum, 0, INT64_MAX},
        {"capacity_multiple", c->capacity_multiple, 0, INT64_MAX},
        {"drop_policy", c->drop_policy, 0, MOE_DROP_RANDOM},
        {"renormalize_after_drop", c->renormalize_after_drop, 0, 1},
        {"parameters", c->parameters, 0, MOE_PARAMETERS_BOUND},
        {"sinkhorn_iterations", c->sinkhorn_iterations, 0, INT32_MAX},
        {"choice_noise", c->choice_noise, 0, MOE_CHOICE_NOISE_GUMBEL_REST},
        {"second_choice", c->second_choice, 0, MOE_SECOND_CHOICE_RANDOM},
        {"loss_scope", c->loss_scope, 0, MOE_LOSS_SCOPE_GROUP},
        {"reserved", c->reserved, 0, 0},
    };
    for (size_t i = 0; i < sizeof field / sizeof *field; i++)
        MOE_TRY(
            moe__check_range(field[i].name, field[i].value, field[i].low, field[i].high, function));
    return MOE_OK;
}

static moe_status check_numbers(const moe_gate_config *c, const char *function)
{
    const struct {
        const char *name;
        double value;
        bool factor; /* not negative */
    } field[] = {
        {"renormalize_epsilon", c->renormalize_epsilon, true},
        {"renormalize_minimum", c->renormalize_minimum, true},
        {"route_scale", c->route_scale, false},
        {"noise_epsilon", c->noise_epsilon, true},
        {"cdf_guard", c->cdf_guard, true},
        {"jitter", c->jitter, true},
        {"importance_weight", c->importance_weight, false},
        {"load_weight", c->load_weight, false},
        {"switch_weight", c->switch_weight, false},
        {"gshard_weight", c->gshard_weight, false},
        {"z_weight", c->z_weight, false},
        {"sequence_weight", c->sequence_weight, false},
        {"threshold_weight", c->threshold_weight, false},
        {"capacity_factor", c->capacity_factor, true},
        {"capacity_factor_eval", c->capacity_factor_eval, true},
        {"second_threshold", c->second_threshold, true},
        {"sinkhorn_tolerance", c->sinkhorn_tolerance, true},
    };
    for (size_t i = 0; i < sizeof field / sizeof *field; i++)
        MOE_TRY(field[i].factor ? check_factor(field[i].name, field[i].value, function)
                                : check_finite(field[i].name, field[i].value, function));
    if (c->jitter >= 1) REFUSE_ARGUMENT("jitter is %g; it must be below 1", c->jitter);
    if (c->init_std != MOE_INIT_DEFAULT) return check_factor("init_std", c->init_std, function);
    return MOE_OK;
}

static moe_status check_dtype(const moe_gate_config *c, const char *function)
{
    return moe__check_range("dtype", c->dtype, MOE_DTYPE_F32, MOE_DTYPE_F16, function);
}

/* ---- fields that contradict each other ------------------------------------------------------- */

/* How the weights come about: some kinds leave no choice. */
static moe_status check_weighting(const moe_gate_config *c, const char *function)
{
    const char *kind = moe__gate_kind_name(c->kind);
    bool chosen = c->kind == MOE_GATE_NOISY_TOP_K || c->kind == MOE_GATE_SOFTMAX_DENSE ||
                  c->kind == MOE_GATE_HIERARCHICAL;
    if ((chosen || c->kind == MOE_GATE_BALANCED) &&
        (c->score != MOE_SCORE_SOFTMAX || c->order || c->renormalize))
        REFUSE_ARGUMENT("kind %s clashes with score %d, order %d, renormalize %d: it is %s", kind,
                        (int)c->score, (int)c->order, (int)c->renormalize,
                        chosen ? "a softmax over the chosen logits"
                               : "a softmax over all logits, divided by the sum of the chosen");
    if (c->renormalize && c->score == MOE_SCORE_SOFTMAX &&
        c->order != MOE_ORDER_SCORE_THEN_SELECT && c->kind != MOE_GATE_EXPERT_CHOICE)
        REFUSE_ARGUMENT("renormalize 1 clashes with order MOE_ORDER_SELECT_THEN_SCORE");
    return MOE_OK;
}

/* What only the K largest can do. */
static moe_status check_selection(const moe_gate_config *c, const char *function)
{
    const char *kind = moe__gate_kind_name(c->kind);
    bool top = c->kind == MOE_GATE_TOP_K;
    if (c->selection_bias && !top) REFUSE_ARGUMENT("selection_bias 1 clashes with kind %s", kind);
    if (c->choice_noise && !top)
        REFUSE_ARGUMENT("choice_noise %d clashes with kind %s", (int)c->choice_noise, kind);
    if (c->choice_noise && c->selection_bias)
        REFUSE_ARGUMENT("choice_noise %d clashes with selection_bias 1", (int)c->choice_noise);
    if (c->expert_groups > 1 && !top && c->kind != MOE_GATE_HIERARCHICAL)
        REFUSE_ARGUMENT("expert_groups %lld clashes with kind %s", (ll)c->expert_groups, kind);
    if (c->num_experts % c->expert_groups != 0)
        REFUSE_ARGUMENT("expert_groups is %lld; it must divide num_experts %lld",
                        (ll)c->expert_groups, (ll)c->num_experts);
    if (c->choice_noise && c->expert_groups > 1)
        REFUSE_ARGUMENT("choice_noise %d clashes with expert_groups %lld", (int)c->choice_noise,
                        (ll)c->expert_groups);
    if (c->group_score && !top)
        REFUSE_ARGUMENT("group_score %d clashes with kind %s", (int)c->group_score, kind);
    return MOE_OK;
}

/* What needs weights of the gate's own, or one level, or a load. */
static moe_status check_kind(const moe_gate_config *c, const char *function)
{
    const char *kind = moe__gate_kind_name(c->kind);
    bool two = c->kind == MOE_GATE_HIERARCHICAL, noisy = two || c->kind == MOE_GATE_NOISY_TOP_K;
    if (noisy && c->d_model == 0)
        REFUSE_ARGUMENT("kind %s clashes with d_model 0: its noise needs weights", kind);
    if (!noisy && c->load_weight != 0)
        REFUSE_ARGUMENT("load_weight %g clashes with kind %s: only MOE_GATE_NOISY_TOP_K and "
                        "MOE_GATE_HIERARCHICAL have a load loss",
                        c->load_weight, kind);
    if (c->threshold_weight != 0 && c->kind != MOE_GATE_BALANCED)
        REFUSE_ARGUMENT("threshold_weight %g clashes with kind %s: only MOE_GATE_BALANCED has "
                        "thresholds",
                        c->threshold_weight, kind);
    if (c->d_model == 0 && c->bias) REFUSE_ARGUMENT("bias 1 clashes with d_model 0");
    if (c->d_model == 0 && c->jitter > 0)
        REFUSE_ARGUMENT("jitter %g clashes with d_model 0", c->jitter);
    if (!two) return MOE_OK;
    if (c->bias) REFUSE_ARGUMENT("bias 1 clashes with kind %s", kind);
    const struct {
        const char *name;
        double value;
    } loss[] = {{"switch_weight", c->switch_weight},
                {"gshard_weight", c->gshard_weight},
                {"z_weight", c->z_weight},
                {"sequence_weight", c->sequence_weight}};
    for (size_t i = 0; i < sizeof loss / sizeof *loss; i++)
        if (loss[i].value != 0)
            REFUSE_ARGUMENT("%s %g clashes with kind %s: it has no logits of all experts",
                            loss[i].name, loss[i].value, kind);
    return MOE_OK;
}

/* Secondary gates that live with their groups. */
static moe_status check_secondary(const moe_gate_config *c, const char *function)
{
    bool with_group = c->secondary == MOE_SECONDARY_WITH_GROUP;
    MOE_TRY(moe__check_range("secondary", c->secondary, 0, MOE_SECONDARY_WITH_GROUP, function));
    MOE_TRY(moe__check_range("reserved2", c->reserved2, 0, 0, function));
    if (with_group && c->kind != MOE_GATE_HIERARCHICAL)
        REFUSE_ARGUMENT("secondary MOE_SECONDARY_WITH_GROUP clashes with kind %s",
                        moe__gate_kind_name(c->kind));
    return moe__check_range("local_groups", c->local_groups, 0, with_group ? c->expert_groups : 0,
                            function);
}

/* Experts that take tokens need a capacity, and then nothing is dropped. */
static moe_status check_capacity(const moe_gate_config *c, const char *function)
{
    const char *kind = moe__gate_kind_name(c->kind);
    if (c->drop_policy == MOE_DROP_BATCH_PRIORITY && c->kind == MOE_GATE_HIERARCHICAL)
        REFUSE_ARGUMENT("drop_policy MOE_DROP_BATCH_PRIORITY clashes with kind %s: it has no "
                        "scores of all experts",
                        kind);
    if (!moe__gate_takes_tokens(c)) return MOE_OK;
    if (c->capacity_kind == MOE_CAPACITY_NONE)
        REFUSE_ARGUMENT("capacity_kind MOE_CAPACITY_NONE clashes with kind %s: its experts take "
                        "`capacity` tokens",
                        kind);
    if (c->drop_policy != MOE_DROP_TOKEN_ORDER)
        REFUSE_ARGUMENT("drop_policy %d clashes with kind %s: it drops nothing",
                        (int)c->drop_policy, kind);
    if (c->second_choice)
        REFUSE_ARGUMENT("second_choice %d clashes with kind %s: it has no choices of a token",
                        (int)c->second_choice, kind);
    if (c->renormalize_after_drop)
        REFUSE_ARGUMENT("renormalize_after_drop 1 clashes with kind %s: it drops nothing", kind);
    return MOE_OK;
}

moe_status moe__gate_config_check(const moe_gate_config *c, const char *function)
{
    MOE_TRY(moe__check_range("num_experts", c->num_experts, 1, INT32_MAX, function));
    MOE_TRY(moe__check_range("d_model", c->d_model, 0, INT64_MAX, function));
    MOE_TRY(moe__check_range("expert_groups", c->expert_groups, 1, c->num_experts, function));
    MOE_TRY(moe__check_range("top_groups", c->top_groups, 1, c->expert_groups, function));
    MOE_TRY(check_choices(c, function));
    MOE_TRY(check_numbers(c, function));
    MOE_TRY(check_dtype(c, function));
    MOE_TRY(check_selection(c, function));
    MOE_TRY(check_secondary(c, function));
    if (c->kind != MOE_GATE_SOFTMAX_DENSE)
        MOE_TRY(moe__check_range("top_k", c->top_k, 1, moe__gate_most_k(c), function));
    MOE_TRY(check_weighting(c, function));
    MOE_TRY(check_kind(c, function));
    return check_capacity(c, function);
}
