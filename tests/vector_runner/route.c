/* route.c - operations of a gate on logits, of one that balances strictly, and what a host that
 * routes by itself calls. */
#include "run.h"

#include <stdio.h>
#include <string.h>

/* ---- gate_balanced --------------------------------------------------------------------------- */

/* mask and gates of the last forward. */
static int show_masked(run *r, const char *mode, int64_t T, int64_t E)
{
    const moe_plan *plan;
    moe_plan_view v;
    char name[48];
    CALL(r, moe_pass_plan(r->pass, &plan));
    CALL(r, moe_plan_check(plan));
    (void)snprintf(name, sizeof name, "gates_%s", mode);
    TRY(show_gates(r, name, plan, T, E));
    TRY(pass_view(r, &v));
    (void)snprintf(name, sizeof name, "mask_%s", mode);
    int32_t *mask = result_ints(r, name, T * E);
    for (int64_t t = 0; t < T; t++)
        for (int64_t n = v.token_begin[t]; n < v.token_begin[t + 1]; n++)
            if (v.expert_of_entry[n] >= 0)
                mask[t * E + v.expert_of_entry[n]] = v.row_of_entry[n] >= 0;
    return 0;
}

/* gsigma: all gates of a dense gate with the same weights. */
static int show_gsigma(run *r, const moe_forward_args *f, int64_t E)
{
    const moe_plan *plan;
    TRY(make_gate(r, "softmax_dense", case_integer(r->c, "D", 0)));
    TRY(bind_gate(r, "weight", run_input(r, "Wg"), NULL));
    CALL(r, moe_gate_forward(r->gate, r->pass, f));
    CALL(r, moe_pass_plan(r->pass, &plan));
    TRY(show_gates(r, "gsigma", plan, f->tokens, E));
    moe_pass_destroy(r->pass);
    moe_gate_destroy(r->gate);
    r->pass = NULL;
    r->gate = NULL;
    return 0;
}

int op_balanced(run *r)
{
    int64_t T = case_integer(r->c, "T", 0), E = case_integer(r->c, "E", 0);
    moe_forward_args f;
    void *entry_grad = NULL, *dgates = run_input(r, "dgates");
    CALL(r, moe_forward_args_init(&f, sizeof f));
    f.tokens = T;
    f.x = run_input(r, "x");
    TRY(show_gsigma(r, &f, E));
    TRY(make_gate(r, "balanced", case_integer(r->c, "D", 0)));
    TRY(bind_gate(r, "weight", run_input(r, "Wg"), NULL));
    TRY(bind_gate(r, "threshold", run_input(r, "thr"), NULL));
    CALL(r, moe_gate_forward(r->gate, r->pass, &f));
    TRY(show_masked(r, "threshold", T, E));
    f.flags = MOE_FORWARD_TRAIN;
    CALL(r, moe_gate_forward(r->gate, r->pass, &f));
    TRY(show_masked(r, "batchwise", T, E));
    TRY(loss_results(r));
    TRY(gather_grad(r, dgates, E, &entry_grad));
    TRY(gate_gradients(r, "_gates", entry_grad, -1, T));
    return gate_gradients(r, "_lb", NULL, MOE_LOSS_THRESHOLD, T);
}

/* ---- logits of the host ---------------------------------------------------------------------- */

/* d_logits of one backward, as a result. */
static int logit_gradients(run *r, const char *name, void *entry_grad, int loss, int64_t count)
{
    moe_backward_args b;
    void *factors = run_reals(r, MOE_LOSS_SLOTS), *d_logits = run_reals(r, count);
    if (loss >= 0) set_real(r, factors, loss, 1);
    CALL(r, moe_backward_args_init(&b, sizeof b));
    b.d_logits_out = d_logits;
    b.entry_weight_grad = entry_grad;
    b.loss_grad = factors;
    CALL(r, moe_gate_backward(r->gate, r->pass, &b));
    result_copy(r, name, d_logits, count);
    return 0;
}

/* bias_next, by the rule on the host's own memory. */
static int show_next_bias(run *r, int64_t E)
{
    moe_tensor_view v;
    void *next = run_reals(r, E);
    if (!case_has(r->c, "bias_rate") || !case_tensor(r->c, "in", "bias")) return 0;
    CALL(r, moe_tensor_view_init(&v, sizeof v));
    CALL(r, moe_pass_tensor(r->pass, MOE_TENSOR_COUNTS, &v));
    CALL(r, moe_selection_bias_step(next, run_input(r, "bias"), v.data, E,
                                    case_number(r->c, "bias_rate", 0), r->o.dtype));
    result_copy(r, "bias_next", next, E);
    return 0;
}

int op_route(run *r)
{
    int64_t T = case_integer(r->c, "T", 0), E = case_integer(r->c, "E", 0);
    moe_forward_args f;
    TRY(make_gate(r, "topk", 0));
    if (moe_gate_parameter_find(r->gate, "selection_bias") >= 0)
        TRY(bind_gate(r, "selection_bias", run_input(r, "bias"), NULL));
    CALL(r, moe_forward_args_init(&f, sizeof f));
    f.tokens = T;
    f.logits_in = run_input(r, "logits");
    CALL(r, moe_gate_forward(r->gate, r->pass, &f));
    TRY(show_gate(r, T, E, case_integer(r->c, "K", 1), "topk_w"));
    TRY(show_tensor(r, "counts", MOE_TENSOR_COUNTS, E, 0));
    TRY(show_next_bias(r, E));
    return logit_gradients(r, "dlogits", run_input(r, "dw"), -1, T * E);
}

/* tok and w in each expert's own order, which is the plan's slots. */
static int show_taken(run *r, int64_t E, int64_t capacity)
{
    moe_plan_view v;
    int32_t *tok = result_ints(r, "tok", E * capacity);
    double *w = result_reals(r, "w", E * capacity);
    TRY(pass_view(r, &v));
    if (v.rows != E * capacity)
        return run_fail(r, "the plan has %lld rows, want %lld", (long long)v.rows,
                        (long long)(E * capacity));
    for (int64_t row = 0; row < v.rows; row++) {
        int64_t n = v.entry_of_row[row], slot = v.slot_of_entry[n];
        if (slot < 0 || slot >= capacity)
            return run_fail(r, "the slot of row %lld is %lld", (long long)row, (long long)slot);
        tok[v.expert_of_entry[n] * capacity + slot] = (int32_t)v.token_of_row[row];
        w[v.expert_of_entry[n] * capacity + slot] = real_at(r, v.weight_of_entry, n);
    }
    return 0;
}

int op_expert_choice(run *r)
{
    int64_t T = case_integer(r->c, "T", 0), E = case_integer(r->c, "E", 0);
    moe_forward_args f;
    void *entry_grad = NULL;
    TRY(make_gate(r, "expert_choice", 0));
    CALL(r, moe_forward_args_init(&f, sizeof f));
    f.tokens = T;
    f.logits_in = run_input(r, "logits");
    CALL(r, moe_gate_forward(r->gate, r->pass, &f));
    TRY(show_gate(r, T, E, 0, NULL));
    TRY(show_taken(r, E, case_integer(r->c, "capacity", 0)));
    TRY(gather_grad(r, run_input(r, "dgates"), E, &entry_grad));
    return logit_gradients(r, "dlogits", entry_grad, -1, T * E);
}

int op_aux_losses(run *r)
{
    int64_t T = case_integer(r->c, "T", 0), E = case_integer(r->c, "E", 0);
    moe_gate_config g;
    moe_forward_args f;
    moe_losses losses;
    TRY(gate_config(r, &g, "topk"));
    g.switch_weight = g.gshard_weight = g.z_weight = g.sequence_weight = 1;
    CALL(r, moe_gate_create(&r->gate, r->context, &g));
    CALL(r, moe_pass_create_for_gate(&r->pass, r->gate, NULL));
    CALL(r, moe_forward_args_init(&f, sizeof f));
    f.tokens = T;
    f.logits_in = run_input(r, "logits");
    CALL(r, moe_gate_forward(r->gate, r->pass, &f));
    TRY(show_gate(r, T, E, g.top_k, "topk_w"));
    TRY(show_tensor(r, "counts", MOE_TENSOR_COUNTS, E, 0));
    CALL(r, moe_losses_init(&losses, sizeof losses));
    CALL(r, moe_pass_losses(r->pass, &losses));
    *result_reals(r, "switch", 1) = losses.value[MOE_LOSS_SWITCH];
    *result_reals(r, "gshard", 1) = losses.value[MOE_LOSS_GSHARD];
    *result_reals(r, "zloss", 1) = losses.value[MOE_LOSS_Z];
    *result_reals(r, "seqaux", 1) = losses.value[MOE_LOSS_SEQUENCE];
    TRY(logit_gradients(r, "dlogits_switch", NULL, MOE_LOSS_SWITCH, T * E));
    TRY(logit_gradients(r, "dlogits_gshard", NULL, MOE_LOSS_GSHARD, T * E));
    TRY(logit_gradients(r, "dlogits_zloss", NULL, MOE_LOSS_Z, T * E));
    return logit_gradients(r, "dlogits_seqaux", NULL, MOE_LOSS_SEQUENCE, T * E);
}

/* ---- what a host that routes by itself calls ------------------------------------------------- */

int op_cv(run *r)
{
    tensor *t = case_tensor(r->c, "in", "v");
    void *v = run_input(r, "v");
    if (!t) return run_fail(r, "there is no tensor v");
    for (int32_t ddof = 0; ddof < 2; ddof++) {
        void *dv = run_reals(r, t->count);
        double *cv2 = result_reals(r, ddof ? "cv2_sample" : "cv2_pop", 1);
        CALL(r, moe_cv_squared(cv2, dv, v, t->count, ddof, r->o.dtype));
        result_copy(r, ddof ? "dv_sample" : "dv_pop", dv, t->count);
    }
    return 0;
}

int op_capacity(run *r)
{
    int64_t T = case_integer(r->c, "T", 0), K = case_integer(r->c, "K", 1);
    tensor *ids = case_tensor(r->c, "in", "topk_idx");
    moe_plan_args a;
    moe_plan_view v;
    if (!ids) return run_fail(r, "there is no tensor topk_idx");
    CALL(r, moe_plan_create(&r->plan, r->context));
    CALL(r, moe_plan_args_init(&a, sizeof a));
    a.tokens = T;
    a.num_experts = case_integer(r->c, "E", 0);
    a.top_k = K;
    a.expert_ids = ids->data;
    a.weights = run_input(r, "topk_w");
    a.dtype = r->o.dtype;
    a.capacity = case_integer(r->c, "capacity", MOE_FROM_CONFIG);
    TRY(choose(r, "policy", "token", POLICIES, &a.drop_policy));
    if (a.drop_policy == MOE_DROP_BATCH_PRIORITY) a.token_priority = run_input(r, "prio");
    for (int renormalize = 0; renormalize < 2; renormalize++) {
        a.renormalize_after_drop = renormalize;
        CALL(r, moe_plan_build(r->plan, &a));
        CALL(r, moe_plan_check(r->plan));
        CALL(r, moe_plan_view_init(&v, sizeof v));
        CALL(r, moe_plan_get(r->plan, &v));
        result_copy(r, renormalize ? "w_kept_renorm" : "w_kept", v.weight_of_entry, T * K);
    }
    int32_t *keep = result_ints(r, "keep", T * K), *pos = result_ints(r, "pos", T * K);
    for (int64_t n = 0; n < T * K; n++) {
        keep[n] = v.row_of_entry[n] >= 0;
        pos[n] = (int32_t)v.slot_of_entry[n];
    }
    return 0;
}
