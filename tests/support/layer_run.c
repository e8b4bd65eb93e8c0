/* layer_run.c - the library's objects for a case, and its forward and backward. */
#include "support/layer_case.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

enum { PATTERN = 0x5a };

static void *narrowed(int32_t dtype, const double *from, int64_t count)
{
    void *to = calloc((size_t)count + 1, number_bytes(dtype));
    ck_assert_ptr_nonnull(to);
    for (int64_t i = 0; from && i < count; i++) number_set(to, i, dtype, from[i]);
    return to;
}

/* ---- objects --------------------------------------------------------------------------------- */

static void set_losses(moe_gate_config *g, const double *weight)
{
    g->importance_weight = weight[0], g->load_weight = weight[1], g->switch_weight = weight[2];
    g->gshard_weight = weight[3], g->z_weight = weight[4], g->sequence_weight = weight[5];
    g->threshold_weight = weight[6];
}

static void set_family(moe_gate_config *g, const layer_case *c)
{
    g->selection_bias = c->selection_bias, g->group_score = c->group_score;
    if (c->expert_groups) g->expert_groups = c->expert_groups, g->top_groups = c->top_groups;
    g->renormalize_minimum = c->renormalize_minimum, g->loss_scope = c->loss_by_group;
    g->sinkhorn_iterations = c->sinkhorn_iterations, g->capacity_multiple = c->capacity_multiple;
    g->capacity_factor_eval = c->capacity_factor_eval, g->drop_policy = c->drop_policy;
    g->second_choice = c->second_choice, g->second_threshold = c->second_threshold;
}

static void make_gate(layer_run *r)
{
    static const double none[REF_LOSSES] = {0};
    const layer_case *c = r->c;
    moe_gate_config g;
    MUST(moe_gate_config_init(&g, sizeof g));
    g.d_model = c->p.gate_D, g.num_experts = c->E,
    g.top_k = (c->per_call && !c->replay) || c->K == 0 ? 1 : c->K;
    g.kind = c->kind, g.score = c->score, g.order = c->order, g.renormalize = c->renormalize;
    g.renormalize_epsilon = c->renormalize_epsilon, g.route_scale = c->p.route_scale;
    g.bias = c->router_bias, g.dtype = r->dtype, g.seed = CASE_SEED, g.stream_id = CASE_STREAM;
    g.noise_epsilon = c->p.noise_epsilon, g.cv_ddof = c->cv_ddof;
    set_losses(&g, c->per_call ? none : c->weight);
    g.sequence_score = c->sequence_softmax ? MOE_SCORE_SOFTMAX : MOE_SCORE_SIGMOID;
    g.sequence_counts = c->sequence_routed;
    g.capacity_kind = c->capacity_kind, g.capacity = c->per_call ? 1 : c->capacity;
    g.capacity_factor = c->capacity_factor, g.capacity_rounding = c->capacity_rounding;
    g.capacity_minimum = c->capacity_minimum, g.renormalize_after_drop = c->renormalize_after_drop;
    set_family(&g, c);
    if (c->bound) g.parameters = MOE_PARAMETERS_BOUND;
    MUST(moe_gate_create(&r->gate, r->context, &g));
}

static void make_pool(layer_run *r, moe_experts **experts, const ref_pool *q)
{
    const layer_case *c = r->c;
    moe_experts_config e;
    if (!q->E) return;
    MUST(moe_experts_config_init(&e, sizeof e));
    e.d_model = c->D, e.d_hidden = q->F, e.d_out = c->p.O, e.num_experts = q->E;
    e.activation = q->activation, e.bias = c->expert_bias, e.dtype = r->dtype;
    e.glu_order = q->activation >= MOE_ACTIVATION_SWIGLU ? c->glu_order : 0;
    e.weight_layout = c->layout, e.output = q->sigmoid, e.weight_position = q->position;
    e.activation_alpha = q->alpha, e.activation_limit = q->limit, e.activation_offset = q->offset;
    if (c->bound) e.parameters = MOE_PARAMETERS_BOUND;
    if (c->packed) e.storage = MOE_STORAGE_PREPACKED;
    MUST(moe_experts_create(experts, r->context, &e));
}

static void make_objects(layer_run *r)
{
    const layer_case *c = r->c;
    moe_layer_config l;
    if (!c->no_gate) make_gate(r);
    if (c->no_experts) {
        MUST(moe_pass_create_for_gate(&r->pass, r->gate, NULL));
        return;
    }
    make_pool(r, &r->experts, &c->p.routed);
    if (c->no_gate == 2) {
        MUST(moe_pass_create_for_experts(&r->pass, r->experts, NULL));
        return;
    }
    MUST(moe_layer_config_init(&l, sizeof l));
    make_pool(r, &r->shared, &c->p.shared);
    make_pool(r, &r->residual, &c->p.residual);
    l.gate = r->gate, l.experts = r->experts, l.output = c->layer_sigmoid, l.layer_id = CASE_LAYER;
    l.shared = r->shared, l.residual = r->residual, l.dropped = c->dropped;
    l.shared_gate = c->shared_gate, l.residual_mix = c->residual_mix;
    if (c->padded_rows) l.exchange = MOE_EXCHANGE_PADDED, l.padded_rows = c->padded_rows;
    if (c->bound) l.parameters = MOE_PARAMETERS_BOUND;
    MUST(moe_layer_create(&r->layer, &l));
    MUST(moe_pass_create(&r->pass, r->layer, NULL));
}

/* The plan of a replay. Capacity acts when a plan is made, so it is the plan's here. */
static void make_plan(layer_run *r)
{
    const ref_problem *p = &r->c->p;
    moe_plan_args a;
    if (!r->c->replay) return;
    void *weights = p->fixed_weights ? narrowed(r->real, p->fixed_weights, p->T * p->K) : NULL;
    MUST(moe_plan_args_init(&a, sizeof a));
    a.tokens = p->T, a.num_experts = p->E, a.top_k = p->K, a.expert_ids = r->c->ids,
    a.weights = weights;
    a.dtype = r->real, a.token_mask = p->mask, a.group_begin = p->group_begin, a.groups = p->groups;
    if (p->capacity >= 0) a.capacity = p->capacity;
    a.renormalize_after_drop = p->renormalize_after_drop, a.drop_policy = p->drop_policy;
    MUST(moe_plan_create(&r->plan, r->context));
    MUST(moe_plan_build(r->plan, &a));
    free(weights);
}

/* ---- arguments ------------------------------------------------------------------------------- */

static void make_arrays(layer_run *r)
{
    const ref_problem *p = &r->c->p;
    int32_t dtype = r->dtype, real = r->real;
    r->x = narrowed(dtype, p->x, p->T * p->D);
    r->gate_x = p->gate_x ? narrowed(dtype, p->gate_x, p->T * p->gate_D) : NULL;
    r->logits_in = p->logits_in ? narrowed(real, p->logits_in, p->T * p->E) : NULL;
    r->noise = narrowed(real, p->noise, p->T * p->E);
    if (p->noise_primary)
        r->noise_primary = narrowed(real, p->noise_primary, p->T * p->expert_groups);
    r->dy = narrowed(dtype, p->dy, p->T * p->O);
    r->weight_grad = narrowed(real, p->weight_grad, p->T * p->K);
    r->y = narrowed(dtype, NULL, p->T * p->O);
    for (int64_t i = 0; i < p->T * p->O && p->dropped == MOE_DROPPED_UNTOUCHED; i++)
        number_set(r->y, i, dtype, p->untouched);
    r->dx = narrowed(dtype, NULL, p->T * p->D);
    r->d_gate_x = narrowed(dtype, NULL, p->T * p->gate_D);
    r->d_logits = narrowed(real, NULL, p->T * p->E);
    r->entry_grad = narrowed(real, NULL, p->T * p->K);
    for (int i = 0; i < REF_LOSSES; i++) number_set(r->loss_grad, i, real, p->factor[i]);
}

static void make_forward(layer_run *r)
{
    const ref_problem *p = &r->c->p;
    const layer_case *c = r->c;
    int routes = !p->fixed_weights, two = routes && p->kind == MOE_GATE_HIERARCHICAL;
    int noisy = two || (routes && p->kind == MOE_GATE_NOISY_TOP_K);
    moe_forward_args *f = &r->f;
    MUST(moe_forward_args_init(f, sizeof *f));
    f->tokens = p->T, f->x = r->x, f->gate_x = routes ? r->gate_x : NULL;
    f->logits_in = routes ? r->logits_in : NULL;
    f->flags = c->eval ? 0 : MOE_FORWARD_TRAIN;
    f->y = c->no_experts ? NULL : r->y;
    f->noise = noisy && !c->philox ? r->noise : NULL;
    f->noise_primary = two && !c->philox ? r->noise_primary : NULL;
    f->token_key = routes ? c->token_key : NULL;
    f->step = CASE_STEP, f->token_first = CASE_TOKEN_FIRST;
    f->token_mask = p->mask, f->group_begin = p->group_begin, f->groups = p->groups;
    f->plan = r->plan, f->plan_use = c->replay == 1 ? MOE_PLAN_IDS : MOE_PLAN_IDS_AND_WEIGHTS;
    if (!c->per_call) return;
    f->loss_weights = c->call_weights;
    if (c->replay) return; /* K and capacity are the plan's */
    f->top_k = c->K;
    if (p->capacity >= 0) f->capacity = p->capacity;
}

static void make_backward(layer_run *r)
{
    const ref_problem *p = &r->c->p;
    const layer_case *c = r->c;
    moe_backward_args *b = &r->b;
    int routes = !p->fixed_weights;
    MUST(moe_backward_args_init(b, sizeof *b));
    b->dx = c->no_experts && (p->gate_x || c->split) ? NULL : r->dx;
    b->d_logits_out = routes && p->kind != MOE_GATE_HIERARCHICAL ? r->d_logits : NULL;
    b->dy = c->no_experts ? NULL : r->dy;
    b->entry_weight_grad = c->no_experts ? r->weight_grad : r->entry_grad;
    b->d_gate_x = routes && (p->gate_x || c->split) ? r->d_gate_x : NULL;
    b->loss_grad = c->loss_factors ? r->loss_grad : NULL;
}

/* ---- rows apart ------------------------------------------------------------------------------ */

static void widen(layer_run *r, int i, const void *dense, int64_t width, const void *argument,
                  int64_t *stride, int is_output)
{
    int real = dense == r->logits_in || dense == r->noise || dense == r->noise_primary ||
               dense == r->d_logits;
    size_t element = number_bytes(real ? r->real : r->dtype);
    row_operand *o = &r->rows[i];
    int64_t apart = width + 1 + 3 * i;
    if (!argument || argument != dense || r->c->T == 0) return;
    o->dense = (void *)(uintptr_t)dense, o->rows = r->c->T, o->width = width,
    o->is_output = is_output;
    o->stride = *stride = apart;
    o->element = element;
    o->wide = malloc((size_t)(o->rows * apart) * element);
    ck_assert_ptr_nonnull(o->wide);
    memset(o->wide, PATTERN, (size_t)(o->rows * apart) * element);
}

/* Points the arguments at wide copies. */
static void spread_rows(layer_run *r)
{
    const ref_problem *p = &r->c->p;
    moe_forward_args *f = &r->f;
    moe_backward_args *b = &r->b;
    widen(r, 0, r->x, p->D, f->x, &f->x_stride, 0);
    widen(r, 1, r->gate_x, p->gate_D, f->gate_x, &f->gate_x_stride, 0);
    widen(r, 2, r->logits_in, p->E, f->logits_in, &f->logits_stride, 0);
    widen(r, 3, r->noise, p->E, f->noise, &f->noise_stride, 0);
    widen(r, 4, r->dy, p->O, b->dy, &b->dy_stride, 0);
    widen(r, 5, r->y, p->O, f->y, &f->y_stride, 1);
    widen(r, 6, r->dx, p->D, b->dx, &b->dx_stride, 1);
    widen(r, 7, r->d_gate_x, p->gate_D, b->d_gate_x, &b->d_gate_x_stride, 1);
    widen(r, 8, r->d_logits, p->E, b->d_logits_out, &b->d_logits_stride, 1);
    widen(r, 9, r->noise_primary, p->expert_groups, f->noise_primary, &f->noise_primary_stride, 0);
    if (r->rows[9].wide) f->noise_primary = r->rows[9].wide;
    const void **in[] = {&f->x, &f->gate_x, &f->logits_in, &f->noise, &b->dy};
    void **out[] = {&f->y, &b->dx, &b->d_gate_x, &b->d_logits_out};
    for (int i = 0; i < 5; i++)
        if (r->rows[i].wide) *in[i] = r->rows[i].wide;
    for (int i = 0; i < 4; i++)
        if (r->rows[5 + i].wide) *out[i] = r->rows[5 + i].wide;
}

/* Inputs (is_output 0) to the wide copies, or outputs back, with a look at what lies between. Check
 * keeps the place of every assertion that is met: none for each byte. */
static void move_rows(layer_run *r, int is_output)
{
    for (int i = 0; i < RUN_OPERANDS; i++) {
        row_operand *o = &r->rows[i];
        size_t bytes = (size_t)o->width * o->element, apart = (size_t)o->stride * o->element;
        if (!o->wide || o->is_output != is_output) continue;
        for (int64_t t = 0; t < o->rows; t++) {
            char *wide = (char *)o->wide + (size_t)t * apart,
                 *dense = (char *)o->dense + (size_t)t * bytes;
            memcpy(is_output ? dense : wide, is_output ? wide : dense, bytes);
            for (size_t at = bytes; at < apart; at++)
                if (wide[at] != PATTERN)
                    ck_abort_msg("operand %d: written between rows, after row %lld", i,
                                 (long long)t);
        }
    }
}

/* ---- the run --------------------------------------------------------------------------------- */

void layer_run_make(layer_run *r, const layer_case *c, int32_t dtype,
                    const moe_context_config *config)
{
    memset(r, 0, sizeof *r);
    r->c = c;
    r->dtype = dtype;
#ifdef MOE_TEST_DEVICE
    if (dtype == MOE_DTYPE_F64) r->dtype = MOE_DTYPE_F32; /* there is no other */
#endif
    r->real = number_real(r->dtype);
    MUST(moe_context_create(&r->context, config));
    make_objects(r);
    make_plan(r);
    make_arrays(r);
    make_forward(r);
    make_backward(r);
    if (c->strided) spread_rows(r);
    if (c->bound) layer_run_bind(r);
    layer_run_set_parameters(r, &c->p);
}

void layer_run_free(layer_run *r)
{
    void *all[] = {r->x,
                   r->gate_x,
                   r->logits_in,
                   r->noise,
                   r->dy,
                   r->weight_grad,
                   r->moved_x,
                   r->y,
                   r->dx,
                   r->d_gate_x,
                   r->d_logits,
                   r->entry_grad,
                   r->moved_gate_x,
                   r->noise_primary};
    moe_pass_destroy(r->pass);
    moe_layer_destroy(r->layer);
    moe_experts_destroy(r->experts);
    moe_experts_destroy(r->shared);
    moe_experts_destroy(r->residual);
    moe_gate_destroy(r->gate);
    moe_plan_destroy(r->plan);
    moe_context_destroy(r->context);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    for (int i = 0; i < RUN_OPERANDS; i++) free(r->rows[i].wide);
    for (int i = 0; i < RUN_PARAMETERS; i++) {
        free(r->bound[i].data), free(r->bound[i].grad);
        for (int e = 0; e < 16; e++) free(r->bound[i].data_each[e]), free(r->bound[i].grad_each[e]);
    }
}

moe_status layer_run_forward(layer_run *r)
{
    move_rows(r, 0);
    moe_status status = r->layer     ? moe_layer_forward(r->layer, r->pass, &r->f)
                        : r->experts ? moe_experts_forward(r->experts, r->pass, &r->f)
                                     : moe_gate_forward(r->gate, r->pass, &r->f);
    move_rows(r, 1);
    return status;
}

/* A copy of an input at another address; the original is spoilt, for nobody may read it any
 * more. */
static void *move_away(const void *from, int64_t count, size_t element)
{
    size_t bytes = (size_t)count * element;
    void *to = malloc(bytes + 1);
    ck_assert_ptr_nonnull(to);
    memcpy(to, from, bytes);
    memset((void *)(uintptr_t)from, 0xff, bytes); /* NaN */
    return to;
}

static void move_inputs(layer_run *r)
{
    const ref_problem *p = &r->c->p;
    size_t element = number_bytes(r->dtype);
    if (r->moved_x || p->T == 0) return;
    int64_t x_stride = r->f.x_stride ? r->f.x_stride : p->D;
    int64_t gate_stride = r->f.gate_x_stride ? r->f.gate_x_stride : p->gate_D;
    r->b.x = r->moved_x = move_away(r->f.x, p->T * x_stride, element);
    if (r->f.gate_x)
        r->b.gate_x = r->moved_gate_x = move_away(r->f.gate_x, p->T * gate_stride, element);
}

void layer_run_view(const layer_run *r, moe_plan_view *v)
{
    const moe_plan *plan;
    MUST(moe_pass_plan(r->pass, &plan));
    MUST(moe_plan_check(plan));
    MUST(moe_plan_view_init(v, sizeof *v));
    MUST(moe_plan_get(plan, v));
}

int64_t layer_run_slot(const layer_run *r, const moe_plan_view *v, int64_t t, int64_t n)
{
    if (n - v->token_begin[t] >= r->c->p.K) ck_abort_msg("entry %lld of K", (long long)n);
    return t * r->c->p.K + n - v->token_begin[t];
}

/* The gradient by the weights of the plan's entries, where their number is not known before. */
static void pack_weight_grad(layer_run *r)
{
    moe_plan_view v;
    layer_run_view(r, &v);
    for (int64_t t = 0; t < v.tokens; t++)
        for (int64_t n = v.token_begin[t]; n < v.token_begin[t + 1]; n++)
            number_set(r->weight_grad, n, r->real,
                       r->c->p.weight_grad[layer_run_slot(r, &v, t, n)]);
}

moe_status layer_run_backward(layer_run *r)
{
    if (r->c->no_experts && layer_case_varies(r->c)) pack_weight_grad(r);
    if (!r->moved_x) move_rows(r, 0);
    if (r->c->moved) move_inputs(r);
    moe_status status = r->layer     ? moe_layer_backward(r->layer, r->pass, &r->b)
                        : r->experts ? moe_experts_backward(r->experts, r->pass, &r->b)
                                     : moe_gate_backward(r->gate, r->pass, &r->b);
    move_rows(r, 1);
    return status;
}

/* ---- for suites of sentences ----------------------------------------------------------------- */

void layer_run_begin(layer_run *r, layer_case *c, int32_t dtype)
{
    layer_case_make(c, 9);
    layer_run_make(r, c, dtype, NULL);
}

void layer_run_end(layer_run *r, layer_case *c)
{
    layer_run_free(r);
    layer_case_free(c);
}

moe_context *new_context(void)
{
    moe_context *context = NULL;
    MUST(moe_context_create(&context, NULL));
    return context;
}
