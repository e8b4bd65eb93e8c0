/* describe.c - a configuration in words, with its formulas and its numbers in them. */
#include "pass_state.h"
#include "printer.h"

#include <string.h>

static const char *dtype_name(int32_t dtype)
{
    static const char *const NAME[] = {"f32", "f64", "bf16", "f16"};
    return NAME[dtype];
}

/* ---- gate: logits, choice -------------------------------------------------------------------- */

static void print_logits(moe__printer *p, const moe_gate_config *c)
{
    int64_t D = c->d_model, E = c->num_experts, A = c->expert_groups;
    bool two = c->kind == MOE_GATE_HIERARCHICAL;
    const char *x = c->jitter > 0 ? "x'" : "x";
    if (c->jitter > 0)
        moe__print(p, "  input     x' = x u, u uniform in (%g, %g), in training\n", 1 - c->jitter,
                   1 + c->jitter);
    if (D == 0) {
        moe__print(p, "  logits    [T,%d] from the host%s\n", E,
                   c->kind == MOE_GATE_HASH ? ", or none" : "");
    } else if (two) {
        moe__print(p,
                   "  logits    of groups %s Wp, \"primary_weight\" [%d,%d]; of the experts of a "
                   "chosen group i %s Wi, \"weight\" [%d,%d,%d]%s\n",
                   x, D, A, x, c->secondary ? c->local_groups : A, D, E / A,
                   c->secondary ? ", on the rank of the group's experts" : "");
    } else {
        moe__print(p, "  logits    %s Wg%s, \"weight\" [%d,%d]%s\n", x, c->bias ? " + b" : "", D, E,
                   c->bias ? ", \"bias\"" : "");
    }
    if (moe__gate_is_noisy(c))
        moe__print(p,
                   "  noise     H = logits + N(0,1) (softplus(%s Wnoise) + %g) in training, else H "
                   "= logits, \"noise_weight\"%s\n",
                   x, c->noise_epsilon, two ? " and \"primary_noise_weight\"" : "");
}

static void print_choice_of_top(moe__printer *p, const moe_gate_config *c)
{
    moe__print(p, "  choice    the %d first by ", c->top_k);
    if (c->kind == MOE_GATE_NOISY_TOP_K)
        moe__print(p, "H");
    else if (c->selection_bias)
        moe__print(p, "score + \"selection_bias\"");
    else if (c->choice_noise == MOE_CHOICE_NOISE_GUMBEL)
        moe__print(p, "logit + Gumbel noise in training, else by logit");
    else if (c->choice_noise == MOE_CHOICE_NOISE_GUMBEL_REST)
        moe__print(p, "logit, in training all but the first by logit + Gumbel noise");
    else
        moe__print(p, "logit");
    if (c->kind == MOE_GATE_TOP_K && c->top_groups < c->expert_groups)
        moe__print(p,
                   ", among the experts of the best %d of %d groups; a group's score is the sum "
                   "of its %d largest",
                   c->top_groups, c->expert_groups, moe__max(c->group_score, 1));
    moe__print(p, "; ties go to the lower index\n");
}

static void print_choice(moe__printer *p, const moe_gate_config *c)
{
    switch (c->kind) {
    case MOE_GATE_SOFTMAX_DENSE: moe__print(p, "  choice    every expert\n"); break;
    case MOE_GATE_HIERARCHICAL:
        moe__print(p, "  choice    the %d first groups by H, of each the %d first experts by H\n",
                   c->top_groups, c->top_k);
        break;
    case MOE_GATE_EXPERT_CHOICE:
        moe__print(p,
                   "  choice    each expert takes the C tokens of a group with its best scores\n");
        break;
    case MOE_GATE_BALANCED:
        moe__print(p,
                   "  choice    in training each expert takes the C tokens of a group with its "
                   "best scores, else a token goes to the experts with score > \"threshold\" "
                   "[%d]\n",
                   c->num_experts);
        break;
    case MOE_GATE_HASH:
        moe__print(p, "  choice    %d distinct experts drawn by token_key\n", c->top_k);
        break;
    case MOE_GATE_SINKHORN:
        moe__print(p,
                   "  choice    the %d first by d_e exp(logit), d balancing the group's matrix to "
                   "%g in at most %d rounds, in training; else by logit\n",
                   c->top_k, c->sinkhorn_tolerance != 0 ? c->sinkhorn_tolerance : 1e-4,
                   (int64_t)(c->sinkhorn_iterations ? c->sinkhorn_iterations : 100));
        break;
    default: print_choice_of_top(p, c);
    }
}

/* ---- gate: weights, rows --------------------------------------------------------------------- */

static void print_divisor(moe__printer *p, double epsilon, double minimum)
{
    if (epsilon != 0)
        moe__print(p, "(their sum + %g)", epsilon);
    else
        moe__print(p, "their sum");
    if (minimum > 0) moe__print(p, ", but at least %g", minimum);
}

static void print_weights(moe__printer *p, const moe_gate_config *config)
{
    moe_gate_config c = moe__gate_config_of_call(config, config->top_k);
    bool sigmoid = c.score == MOE_SCORE_SIGMOID;
    moe__print(p, "  weights   ");
    if (c.kind == MOE_GATE_HIERARCHICAL) {
        moe__print(p, "softmax of H over the chosen groups, times softmax of H over the chosen "
                      "experts of the group");
    } else if (c.kind == MOE_GATE_HASH && c.d_model == 0) {
        moe__print(p, "1/%d without logits; with them ", c.top_k);
    }
    if (c.kind != MOE_GATE_HIERARCHICAL) {
        if (!sigmoid && c.order == MOE_ORDER_SELECT_THEN_SCORE)
            moe__print(p, "softmax of %s over the chosen",
                       c.kind == MOE_GATE_NOISY_TOP_K ? "H" : "the logits");
        else
            moe__print(p, "score = %s, of the chosen",
                       sigmoid ? "sigmoid(logit)" : "softmax over all logits");
        if (c.renormalize) {
            moe__print(p, ", divided by ");
            print_divisor(p, c.renormalize_epsilon, c.renormalize_minimum);
        }
    }
    if (c.route_scale != 1) moe__print(p, ", times %g", c.route_scale);
    moe__print(p, "\n");
}

static const char *round_name(int32_t rounding)
{
    return rounding == MOE_ROUND_UP ? "ceil" : rounding == MOE_ROUND_DOWN ? "floor" : "round";
}

static void print_factor(moe__printer *p, const moe_gate_config *c, double factor)
{
    int64_t K = moe__gate_entries_per_token(c, c->top_k), E = c->num_experts;
    if (c->capacity_minimum > 0) moe__print(p, "max(%d, ", c->capacity_minimum);
    if (c->capacity_rounding == MOE_ROUND_PER_CHOICE)
        moe__print(p, "%d floor(%g ceil(T_g / %d))", K, factor, E);
    else if (c->capacity_rounding == MOE_ROUND_TOKENS_UP)
        moe__print(p, "floor(%d ceil(%g T_g) / %d)", K, factor, E);
    else
        moe__print(p, "%s(%g * %d T_g / %d)", round_name(c->capacity_rounding), factor, K, E);
    if (c->capacity_minimum > 0) moe__print(p, ")");
}

static void print_capacity(moe__printer *p, const moe_gate_config *c)
{
    moe__print(p, "  rows      C = ");
    if (c->capacity_kind == MOE_CAPACITY_NUMBER) {
        moe__print(p, "%d", c->capacity);
    } else {
        print_factor(p, c, c->capacity_factor);
        if (c->capacity_factor_eval > 0) {
            moe__print(p, " in training, else ");
            print_factor(p, c, c->capacity_factor_eval);
        }
        if (c->capacity_multiple > 1)
            moe__print(p, ", up to a multiple of %d", c->capacity_multiple);
        moe__print(p, ", at most %d T_g", moe__gate_entries_per_token(c, c->top_k));
    }
    moe__print(p, " of an expert in each token group (of T_g tokens)");
}

static void print_rows(moe__printer *p, const moe_gate_config *c)
{
    static const char *const ORDER[] = {
        "in order of token, then of choice", "all first choices in order of token, then all second",
        "all first choices, the tokens in descending order of their largest score, then all second",
        "the largest weights", "the largest of uniform numbers"};
    if (c->capacity_kind == MOE_CAPACITY_NONE) {
        moe__print(p, "  rows      dropless");
    } else {
        print_capacity(p, c);
        if (!moe__gate_takes_tokens(c)) moe__print(p, "; who stays: %s", ORDER[c->drop_policy]);
    }
    if (c->second_choice == MOE_SECOND_CHOICE_NONE)
        moe__print(p, "; choices after the first get none");
    else if (c->second_choice == MOE_SECOND_CHOICE_THRESHOLD)
        moe__print(p, "; choices after the first only with weight > %g", c->second_threshold);
    else if (c->second_choice == MOE_SECOND_CHOICE_RANDOM)
        moe__print(p, "; choices after the first with probability weight / %g, in training",
                   c->second_threshold > 1e-9 ? c->second_threshold : 1e-9);
    if (c->renormalize_after_drop) {
        moe__print(p, "; kept weights are divided by ");
        print_divisor(p, 0, c->renormalize_minimum);
    }
    moe__print(p, "\n");
}

/* ---- gate: losses ---------------------------------------------------------------------------- */

static void print_loss(moe__printer *p, double weight, const char *name, const char *formula)
{
    if (weight != 0) moe__print(p, "  loss      %g %s: %s\n", weight, name, formula);
}

static void print_losses(moe__printer *p, const moe_gate_config *c)
{
    bool group = c->loss_scope == MOE_LOSS_SCOPE_GROUP, two = c->kind == MOE_GATE_HIERARCHICAL;
    bool sigmoid = c->sequence_score == MOE_SCORE_SIGMOID;
    bool routed = c->sequence_counts == MOE_SEQUENCE_COUNTS_ROUTED;
    print_loss(p, c->importance_weight, "importance", "CV^2 of sum_t weight");
    print_loss(p, c->load_weight, "load",
               two ? "CV^2 of load_ij = load_i load(X_i)_j / |X_i|"
                   : "CV^2 of sum_t Phi((logit - threshold of choice) / sd)");
    print_loss(p, c->switch_weight, "switch",
               group ? "E sum_e n_e/sum(n) mean_t softmax(logits)_e, mean over token groups"
                     : "E sum_e n_e/sum(n) mean_t softmax(logits)_e");
    print_loss(p, c->gshard_weight, "gshard",
               group ? "E sum_e first_e/T mean_t softmax(logits)_e, mean over token groups"
                     : "E sum_e first_e/T mean_t softmax(logits)_e");
    print_loss(p, c->z_weight, "z", "mean_t logsumexp(logits)^2");
    if (c->sequence_weight != 0)
        moe__print(p,
                   "  loss      %g sequence: E sum_e n_e/sum(n) mean_t s_e/sum(s) of each token "
                   "group, s = %s, n %s\n",
                   c->sequence_weight, sigmoid ? "sigmoid(logits)" : "softmax(logits)",
                   routed ? "the entries" : "the K largest scores");
    print_loss(p, c->threshold_weight, "threshold",
               "sum_te ((score > threshold) - chosen) (score - threshold)");
}

static void print_gate(moe__printer *p, const moe_gate_config *c)
{
    int64_t K = moe__gate_entries_per_token(c, c->top_k);
    moe__print(p, "Gate %s, %s: %d of %d experts a token%s\n", moe__gate_kind_name(c->kind),
               dtype_name(c->dtype), K, c->num_experts,
               moe__gate_takes_tokens(c) ? " on the average" : "");
    print_logits(p, c);
    print_choice(p, c);
    print_weights(p, c);
    print_rows(p, c);
    print_losses(p, c);
}

/* ---- experts --------------------------------------------------------------------------------- */

static const char *activation_name(int32_t activation)
{
    switch (activation) {
    case MOE_ACTIVATION_GELU_TANH:
    case MOE_ACTIVATION_GEGLU_TANH: return "gelu_tanh";
    case MOE_ACTIVATION_GELU_ERF:
    case MOE_ACTIVATION_GEGLU_ERF: return "gelu_erf";
    case MOE_ACTIVATION_SILU:
    case MOE_ACTIVATION_SWIGLU: return "silu";
    default: return "relu";
    }
}

static void print_hidden(moe__printer *p, const moe_experts_config *c, const char *x)
{
    const char *b1 = c->bias ? " + b1" : "", *b3 = c->bias ? " + b3" : "";
    double alpha = c->activation_alpha != 0 ? c->activation_alpha : 1;
    bool clamped = alpha != 1 || c->activation_limit != 0 || c->activation_offset != 0;
    if (!clamped) {
        moe__print(p, "  hidden    h = %s(%s W1%s)", activation_name(c->activation), x, b1);
        if (moe__is_gated(c->activation)) moe__print(p, " * (%s W3%s)", x, b3);
        moe__print(p, "\n");
        return;
    }
    moe__print(p, "  hidden    g = %s W1%s, u = %s W3%s", x, b1, x, b3);
    if (c->activation_limit != 0)
        moe__print(p, ", g at most %g, u in [-%g, %g]", c->activation_limit, c->activation_limit,
                   c->activation_limit);
    moe__print(p, "; h = g sigmoid(%g g) (u + %g)\n", alpha, c->activation_offset);
}

static void print_experts(moe__printer *p, const moe_experts_config *c)
{
    bool on_input = c->weight_position == MOE_WEIGHT_ON_INPUT;
    bool on_hidden = c->weight_position == MOE_WEIGHT_ON_HIDDEN;
    moe__print(p, "Experts, %s: %d ", dtype_name(c->dtype), c->num_experts);
    if (c->kind == MOE_EXPERTS_IDENTITY) {
        moe__print(p, "that give x back [%d]\n", c->d_model);
        return;
    }
    if (c->kind == MOE_EXPERTS_CALLBACK)
        moe__print(p, "of the host, from %d to %d\n", c->d_model, c->d_out);
    else
        moe__print(p, "of widths %d, %d, %d\n", c->d_model, c->d_hidden, c->d_out);
    if (c->kind == MOE_EXPERTS_FEED_FORWARD) {
        print_hidden(p, c, on_input ? "(w x)" : "x");
        moe__print(p, "  output    z = %sh%s W2%s\n", on_hidden ? "(w " : "", on_hidden ? ")" : "",
                   c->bias ? " + b2" : "");
    }
    if (c->output == MOE_OUTPUT_SIGMOID) moe__print(p, "  then      sigmoid(z)\n");
    moe__print(p, "  weight    the token's weight w multiplies %s\n",
               on_input    ? "the input"
               : on_hidden ? "the hidden values"
                           : "the output");
}

/* ---- layer ----------------------------------------------------------------------------------- */

/* What is not as by default. */
static void print_ranks(moe__printer *p, const moe_layer_config *c)
{
    static const char *const RECEIVED[] = {"more are an error", "the first of each rank and expert",
                                           "those of the largest weights", "in rounds"};
    if (c->expert_slices > 1)
        moe__print(p, "  slices    an expert is the sum of %d networks of this width\n",
                   c->expert_slices);
    if (c->exchange == MOE_EXCHANGE_PADDED)
        moe__print(p, "  exchange  %d rows from each rank to each expert, used or not\n",
                   c->padded_rows);
    if (c->rail_comm)
        moe__print(p, "  nodes     a token's row goes to each once, and on from there\n");
    if (c->exchange_chunks > 1)
        moe__print(p, "  exchange  in %d parts, each while the experts of another are computed\n",
                   c->exchange_chunks);
    if (c->max_received > 0)
        moe__print(p, "  received  at most %d rows of all ranks at once: %s\n", c->max_received,
                   RECEIVED[c->received]);
    if (c->loss_batch == MOE_BATCH_GLOBAL)
        moe__print(p, "  losses    and statistics are of the tokens of all ranks\n");
}

static void print_layer(moe__printer *p, const moe_layer_config *c)
{
    static const char *const DROPPED[] = {"0", "x", "left as it is"};
    moe__print(p, "Layer\n  y         ");
    if (c->residual_mix)
        moe__print(p, "c0 routed + c1 residual, c = softmax(x \"residual_mix\" + "
                      "\"residual_mix_bias\")");
    else
        moe__print(p, c->residual ? "routed + residual" : "routed");
    if (c->shared_gate)
        moe__print(p, " + sigmoid(x \"shared_gate\") shared");
    else if (c->shared)
        moe__print(p, " + shared");
    if (c->output == MOE_OUTPUT_SIGMOID) moe__print(p, "; then sigmoid");
    moe__print(p, "\n  dropped   the routed part of a token without rows is %s\n",
               DROPPED[c->dropped]);
    print_ranks(p, c);
}

/* ---- the call -------------------------------------------------------------------------------- */

typedef struct description {
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
} description;

static moe_status read_configs(description *d, const moe_gate_config *gate,
                               const moe_experts_config *experts, const moe_layer_config *layer,
                               const char *function)
{
    moe_expert_callbacks callbacks;
    if (gate) {
        MOE_TRY(moe__struct_read(&moe__gate_config_info, &d->g, gate, false, function));
        MOE_TRY(moe__gate_config_check(&d->g, function));
    }
    if (experts) {
        MOE_TRY(moe__struct_read(&moe__experts_config_info, &d->e, experts, false, function));
        MOE_TRY(moe__experts_config_check(&d->e, &callbacks, function));
    }
    if (!layer) return MOE_OK;
    MOE_TRY(moe__struct_read(&moe__layer_config_info, &d->l, layer, false, function));
    return moe__layer_config_check(&d->l, function);
}

moe_status moe_describe(char *text, int64_t capacity, int64_t *size, const moe_gate_config *gate,
                        const moe_experts_config *experts, const moe_layer_config *layer)
{
    const char *function = __func__;
    description d;
    moe__printer count = {NULL, 0, 0}, print = {text, capacity, 0};
    if (!size) REFUSE_ARGUMENT("size is NULL");
    if (capacity < 0) REFUSE_ARGUMENT("capacity is %lld", (ll)capacity);
    if (!text && capacity > 0) REFUSE_ARGUMENT("text is NULL, capacity is %lld", (ll)capacity);
    if (!gate && !experts && !layer) REFUSE_ARGUMENT("gate, experts and layer are all NULL");
    memset(&d, 0, sizeof d);
    MOE_TRY(read_configs(&d, gate, experts, layer, function));
    fenv_t saved;
    moe__fenv_enter(&saved);
    for (int turn = 0; turn < 2; turn++) {
        moe__printer *p = turn ? &print : &count;
        if (turn && count.used + 1 > capacity) break;
        if (gate) print_gate(p, &d.g);
        if (experts) print_experts(p, &d.e);
        if (layer) print_layer(p, &d.l);
    }
    moe__fenv_leave(&saved);
    *size = count.used + 1;
    if (count.used + 1 > capacity)
        REFUSE(MOE_ERROR_BUFFER_TOO_SMALL, "the text needs %lld bytes, capacity is %lld",
               (ll)(count.used + 1), (ll)capacity);
    text[count.used] = 0;
    return MOE_OK;
}
