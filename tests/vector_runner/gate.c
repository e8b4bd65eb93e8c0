/* gate.c - a gate of a case: its config and parameters, what a routed pass shows, and the
 * operations of the papers' softmax gates. */
#include "run.h"

#include <stdio.h>
#include <string.h>

int choose(run *r, const char *key, const char *fallback, const name_value *choices, int32_t *out)
{
    const char *text = case_text(r->c, key, fallback);
    for (; choices->name; choices++) {
        if (strcmp(choices->name, text) != 0) continue;
        *out = choices->value;
        return 0;
    }
    return run_fail(r, "option %s has the unknown value %s", key, text);
}

static const name_value SCORES[] = {
    {"softmax", MOE_SCORE_SOFTMAX}, {"sigmoid", MOE_SCORE_SIGMOID}, {NULL, 0}};
static const name_value ORDERS[] = {
    {"post", MOE_ORDER_SELECT_THEN_SCORE}, {"pre", MOE_ORDER_SCORE_THEN_SELECT}, {NULL, 0}};
static const name_value GROUP_SCORES[] = {{"max", 1}, {"top2sum", 2}, {NULL, 0}};
static const name_value GATINGS[] = {{"topk", MOE_GATE_TOP_K},
                                     {"noisy_topk", MOE_GATE_NOISY_TOP_K},
                                     {"softmax_dense", MOE_GATE_SOFTMAX_DENSE},
                                     {"balanced", MOE_GATE_BALANCED},
                                     {"hier", MOE_GATE_HIERARCHICAL},
                                     {"expert_choice", MOE_GATE_EXPERT_CHOICE},
                                     {NULL, 0}};
static const name_value COUNTS[] = {
    {"scores", MOE_SEQUENCE_COUNTS_SCORES}, {"routed", MOE_SEQUENCE_COUNTS_ROUTED}, {NULL, 0}};
const name_value POLICIES[] = {{"token", MOE_DROP_TOKEN_ORDER},
                               {"choice", MOE_DROP_CHOICE},
                               {"bpr", MOE_DROP_BATCH_PRIORITY},
                               {"score", MOE_DROP_SCORE},
                               {NULL, 0}};

static int routing_config(run *r, moe_gate_config *g)
{
    vector_case *c = r->c;
    TRY(choose(r, "score", "softmax", SCORES, &g->score));
    TRY(choose(r, "order", "post", ORDERS, &g->order));
    TRY(choose(r, "group_score", "max", GROUP_SCORES, &g->group_score));
    g->route_scale = case_number(c, "route_scale", 1);
    g->expert_groups = case_integer(c, "n_groups", 1);
    g->top_groups = case_integer(c, "topk_groups", 1);
    g->selection_bias = case_tensor(c, "in", "bias") != NULL;
    (void)case_number(c, "bias_rate", 0);
    int32_t renormalize = (int32_t)case_integer(c, "renorm", 0);
    double epsilon = case_number(c, "renorm_eps", 0);
    if (g->order == MOE_ORDER_SELECT_THEN_SCORE) { /* post: softmax over the chosen, whatever
                                                      else is said */
        g->score = MOE_SCORE_SOFTMAX;
        return 0;
    }
    g->renormalize = renormalize;
    g->renormalize_epsilon = epsilon;
    return 0;
}

/* Tokens that an expert takes (`m`, or `capacity` of expert choice), or rows it has room for. */
static int capacity_config(run *r, moe_gate_config *g)
{
    vector_case *c = r->c;
    const char *key = g->kind == MOE_GATE_BALANCED ? "m" : "capacity";
    int takes = g->kind == MOE_GATE_BALANCED || g->kind == MOE_GATE_EXPERT_CHOICE;
    if (takes && !case_has(c, key)) return run_fail(r, "there is no option %s", key);
    if (!case_has(c, key)) return 0;
    g->capacity_kind = MOE_CAPACITY_NUMBER;
    g->capacity = case_integer(c, key, 0);
    if (takes) return 0;
    TRY(choose(r, "policy", "token", POLICIES, &g->drop_policy));
    g->renormalize_after_drop = (int32_t)case_integer(c, "renorm_after_drop", 0);
    return 0;
}

int gate_config(run *r, moe_gate_config *g, const char *gating)
{
    vector_case *c = r->c;
    int found = 0;
    CALL(r, moe_gate_config_init(g, sizeof *g));
    for (const name_value *k = GATINGS; k->name; k++)
        if (strcmp(k->name, gating) == 0) g->kind = k->value, found = 1;
    if (!found) return run_fail(r, "unknown gating %s", gating);
    g->num_experts = case_integer(c, "E", 0);
    g->top_k = case_integer(c, "K", 1);
    if (g->kind == MOE_GATE_HIERARCHICAL) { /* A groups of B experts */
        g->expert_groups = case_integer(c, "A", 1);
        g->num_experts = g->expert_groups * case_integer(c, "B", 1);
        g->top_groups = case_integer(c, "KP", 1);
        g->top_k = case_integer(c, "KS", 1);
    }
    g->dtype = r->o.dtype;
    g->parameters = MOE_PARAMETERS_BOUND;
    g->noise_epsilon = case_number(c, "noise_eps", g->noise_epsilon);
    g->cdf_guard = case_number(c, "cdf_guard", g->cdf_guard);
    g->cv_ddof = (int32_t)case_integer(c, "cv_ddof", 0);
    g->importance_weight = case_number(c, "w_importance", 0);
    g->load_weight = case_number(c, "w_load", 0);
    g->switch_weight = case_number(c, "w_switch", 0);
    g->gshard_weight = case_number(c, "w_gshard", 0);
    g->z_weight = case_number(c, "w_z", 0);
    g->sequence_weight = case_number(c, "w_seqaux", 0);
    (void)case_number(c, "load_grad", 1); /* says which gradients the case has */
    TRY(choose(r, "seqaux_counts", "scores", COUNTS, &g->sequence_counts));
    if (g->kind == MOE_GATE_NOISY_TOP_K && case_integer(c, "train", 1) &&
        !case_tensor(c, "in", "noise"))
        return run_fail(r, "there is no tensor noise");
    TRY(capacity_config(r, g));
    if (g->kind == MOE_GATE_BALANCED && strcmp(c->op, "gate_balanced") == 0)
        g->threshold_weight = 1; /* loss_batchwise */
    if (g->kind == MOE_GATE_TOP_K) TRY(routing_config(r, g));
    return 0;
}

int bind_gate(run *r, const char *name, void *data, void *grad)
{
    moe_binding b;
    int64_t index = moe_gate_parameter_find(r->gate, name);
    if (index < 0) return run_fail(r, "the gate has no parameter %s", name);
    if (!data) return run_fail(r, "the case has no tensor for the gate's %s", name);
    CALL(r, moe_binding_init(&b, sizeof b));
    b.data = data;
    b.grad = grad;
    b.data_dtype = b.grad_dtype = r->o.dtype;
    CALL(r, moe_gate_bind(r->gate, index, &b));
    return 0;
}

int show_tensor(run *r, const char *name, int32_t what, int64_t count, int or_zero)
{
    moe_tensor_view v;
    CALL(r, moe_tensor_view_init(&v, sizeof v));
    moe_status status = moe_pass_tensor(r->pass, what, &v);
    if (status == MOE_ERROR_INVALID_STATE && or_zero) {
        (void)result_reals(r, name, count);
        return 0;
    }
    CALL(r, status);
    if (v.dtype == MOE_DTYPE_I64) {
        int32_t *to = result_ints(r, name, count);
        for (int64_t i = 0; i < count; i++) to[i] = (int32_t)((const int64_t *)v.data)[i];
    } else if (v.dtype == MOE_DTYPE_F64) {
        memcpy(result_reals(r, name, count), v.data, (size_t)count * 8);
    } else {
        result_copy(r, name, v.data, count);
    }
    return 0;
}

int show_gates(run *r, const char *name, const moe_plan *plan, int64_t T, int64_t E)
{
    moe_plan_view v;
    CALL(r, moe_plan_view_init(&v, sizeof v));
    CALL(r, moe_plan_get(plan, &v));
    if (v.tokens != T || v.num_experts != E)
        return run_fail(r, "the plan of %s is of %lld tokens and %lld experts", name,
                        (long long)v.tokens, (long long)v.num_experts);
    double *gates = result_reals(r, name, T * E);
    for (int64_t t = 0; t < T; t++)
        for (int64_t n = v.token_begin[t]; n < v.token_begin[t + 1]; n++)
            if (v.expert_of_entry[n] >= 0)
                gates[t * E + v.expert_of_entry[n]] += real_at(r, v.weight_of_entry, n);
    return 0;
}

int pass_view(run *r, moe_plan_view *v)
{
    const moe_plan *plan;
    CALL(r, moe_pass_plan(r->pass, &plan));
    CALL(r, moe_plan_view_init(v, sizeof *v));
    CALL(r, moe_plan_get(plan, v));
    return 0;
}

int show_plan(run *r, int64_t T, int64_t E, int64_t K, const char *weight_name)
{
    const moe_plan *plan;
    moe_plan_view v;
    CALL(r, moe_pass_plan(r->pass, &plan));
    CALL(r, moe_plan_check(plan));
    TRY(show_gates(r, "gates", plan, T, E));
    TRY(pass_view(r, &v));
    int32_t *perm = result_ints(r, "perm_token", v.rows);
    for (int64_t row = 0; row < v.rows; row++) perm[row] = (int32_t)v.token_of_row[row];
    if (!weight_name) return 0;
    if (v.entries != T * K) return run_fail(r, "the plan has %lld entries", (long long)v.entries);
    double *w = result_reals(r, weight_name, v.entries);
    int32_t *idx = result_ints(r, "topk_idx", v.entries), *keep = result_ints(r, "keep", v.entries);
    for (int64_t n = 0; n < v.entries; n++) {
        idx[n] = v.expert_of_entry[n];
        w[n] = real_at(r, v.weight_of_entry, n);
        keep[n] = v.row_of_entry[n] >= 0;
    }
    return 0;
}

int loss_results(run *r)
{
    static const name_value names[] = {{"loss_importance", MOE_LOSS_IMPORTANCE},
                                       {"loss_load", MOE_LOSS_LOAD},
                                       {"loss_switch", MOE_LOSS_SWITCH},
                                       {"loss_gshard", MOE_LOSS_GSHARD},
                                       {"loss_zloss", MOE_LOSS_Z},
                                       {"loss_z", MOE_LOSS_Z},
                                       {"loss_seqaux", MOE_LOSS_SEQUENCE},
                                       {"loss_batchwise", MOE_LOSS_THRESHOLD},
                                       {NULL, 0}};
    moe_losses losses;
    CALL(r, moe_losses_init(&losses, sizeof losses));
    CALL(r, moe_pass_losses(r->pass, &losses));
    for (const name_value *n = names; n->name; n++)
        *result_reals(r, n->name, 1) = losses.value[n->value];
    return 0;
}

int show_gate(run *r, int64_t T, int64_t E, int64_t K, const char *weight_name)
{
    TRY(show_tensor(r, "logits", MOE_TENSOR_LOGITS, T * E, 0));
    TRY(show_tensor(r, "clean", MOE_TENSOR_LOGITS, T * E, 0));
    TRY(show_tensor(r, "H", MOE_TENSOR_NOISY_LOGITS, T * E, 0));
    TRY(show_tensor(r, "sd", MOE_TENSOR_NOISE_STD, T * E, 1));
    TRY(show_tensor(r, "importance", MOE_TENSOR_IMPORTANCE, E, 0));
    TRY(show_tensor(r, "load", MOE_TENSOR_LOAD, E, 0));
    TRY(loss_results(r));
    return show_plan(r, T, E, K, weight_name);
}

int gather_grad(run *r, const void *dense, int64_t E, void **out)
{
    moe_plan_view v;
    TRY(pass_view(r, &v));
    *out = run_reals(r, v.entries);
    for (int64_t t = 0; t < v.tokens; t++)
        for (int64_t n = v.token_begin[t]; n < v.token_begin[t + 1]; n++)
            if (v.expert_of_entry[n] >= 0)
                set_real(r, *out, n, real_at(r, dense, t * E + v.expert_of_entry[n]));
    return 0;
}

int gate_gradients(run *r, const char *suffix, void *entry_grad, int loss, int64_t T)
{
    int64_t D = case_integer(r->c, "D", 0), E = case_integer(r->c, "E", 0);
    moe_backward_args b;
    char name[48];
    void *factors = run_reals(r, MOE_LOSS_SLOTS), *dx = run_reals(r, T * D);
    void *dWg = run_reals(r, D * E), *dWnoise = run_reals(r, D * E);
    void *dthr = run_reals(r, E);
    if (loss >= 0) set_real(r, factors, loss, 1);
    TRY(bind_gate(r, "weight", run_input(r, "Wg"), dWg));
    if (moe_gate_parameter_find(r->gate, "noise_weight") >= 0)
        TRY(bind_gate(r, "noise_weight", run_input(r, "Wnoise"), dWnoise));
    if (moe_gate_parameter_find(r->gate, "threshold") >= 0)
        TRY(bind_gate(r, "threshold", run_input(r, "thr"), dthr));
    CALL(r, moe_backward_args_init(&b, sizeof b));
    b.dx = dx;
    b.entry_weight_grad = entry_grad;
    b.loss_grad = factors;
    CALL(r, moe_gate_backward(r->gate, r->pass, &b));
    (void)snprintf(name, sizeof name, "dx%s", suffix);
    result_copy(r, name, dx, T * D);
    (void)snprintf(name, sizeof name, "dWg%s", suffix);
    result_copy(r, name, dWg, D * E);
    (void)snprintf(name, sizeof name, "dWnoise%s", suffix);
    result_copy(r, name, dWnoise, D * E);
    (void)snprintf(name, sizeof name, "dthr%s", suffix);
    result_copy(r, name, dthr, E);
    return 0;
}

int make_gate(run *r, const char *gating, int64_t d_model)
{
    moe_gate_config g;
    TRY(gate_config(r, &g, gating));
    g.d_model = d_model;
    CALL(r, moe_gate_create(&r->gate, r->context, &g));
    CALL(r, moe_pass_create_for_gate(&r->pass, r->gate, NULL));
    return 0;
}

int op_gate(run *r)
{
    int64_t T = case_integer(r->c, "T", 0), E = case_integer(r->c, "E", 0);
    int noisy = strcmp(r->c->op, "gate_noisy_topk") == 0;
    int64_t K = noisy ? case_integer(r->c, "K", 1) : E;
    moe_forward_args f;
    void *entry_grad = NULL, *dgates = run_input(r, "dgates");
    TRY(make_gate(r, noisy ? "noisy_topk" : "softmax_dense", case_integer(r->c, "D", 0)));
    TRY(bind_gate(r, "weight", run_input(r, "Wg"), NULL));
    if (noisy) TRY(bind_gate(r, "noise_weight", run_input(r, "Wnoise"), NULL));
    CALL(r, moe_forward_args_init(&f, sizeof f));
    f.tokens = T;
    f.x = run_input(r, "x");
    f.noise = run_input(r, "noise");
    f.flags = case_integer(r->c, "train", 1) ? MOE_FORWARD_TRAIN : 0;
    CALL(r, moe_gate_forward(r->gate, r->pass, &f));
    TRY(show_gate(r, T, E, K, "topk_val"));
    TRY(gather_grad(r, dgates, E, &entry_grad));
    if (!noisy) return gate_gradients(r, "", entry_grad, -1, T);
    TRY(gate_gradients(r, "_gates", entry_grad, -1, T));
    TRY(gate_gradients(r, "_imp", NULL, MOE_LOSS_IMPORTANCE, T));
    return gate_gradients(r, "_load", NULL, MOE_LOSS_LOAD, T);
}
