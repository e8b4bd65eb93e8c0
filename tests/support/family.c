/* family.c - see family.h. */
#include "support/family.h"

#include "support/layer_case.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- configs --------------------------------------------------------------------------------- */

static int pick(family *f, int n) { return (int)(random_uniform(&f->state) * n); }
static double one_of(family *f, double a, double b) { return pick(f, 2) ? a : b; }

static int chooses_by_logits(int32_t kind)
{
    return kind == MOE_GATE_NOISY_TOP_K || kind == MOE_GATE_SOFTMAX_DENSE ||
           kind == MOE_GATE_BALANCED || kind == MOE_GATE_HIERARCHICAL;
}

static void draw_weighting(family *f)
{
    moe_gate_config *g = &f->g;
    g->route_scale = one_of(f, 1, 1.7);
    if (chooses_by_logits(g->kind)) return;
    g->score = pick(f, 2), g->order = pick(f, 2);
    g->renormalize = (g->score || g->order) && pick(f, 2);
    g->renormalize_epsilon = one_of(f, 0, 1e-3);
    if (pick(f, 3) == 0) g->renormalize_minimum = one_of(f, 0.6, 2);
}

static void draw_selection(family *f)
{
    moe_gate_config *g = &f->g;
    int64_t E = g->num_experts;
    if (g->kind == MOE_GATE_TOP_K) {
        g->selection_bias = pick(f, 2);
        if (pick(f, 2)) {
            g->expert_groups = 2, g->top_groups = 1 + pick(f, 2);
            g->group_score = pick(f, (int)(E / 2) + 1);
        } else if (!g->selection_bias) {
            g->choice_noise = pick(f, 3);
        }
        if (g->top_k > g->top_groups * (E / g->expert_groups)) g->top_k = E / 2;
    }
    if (g->kind == MOE_GATE_HIERARCHICAL) {
        g->expert_groups = E == 8 ? 4 : 2, g->top_groups = 1 + pick(f, 2);
        g->top_k = 1 + pick(f, 2);
    }
}

static void draw_losses(family *f)
{
    moe_gate_config *g = &f->g;
    int noisy = g->kind == MOE_GATE_NOISY_TOP_K || g->kind == MOE_GATE_HIERARCHICAL;
    g->cv_ddof = pick(f, 2), g->loss_scope = pick(f, 2);
    g->sequence_score = pick(f, 2), g->sequence_counts = pick(f, 2);
    g->importance_weight = one_of(f, 0, 0.3);
    if (noisy) g->load_weight = one_of(f, 0, 0.4);
    if (g->kind == MOE_GATE_BALANCED) g->threshold_weight = one_of(f, 0, 0.5);
    if (g->kind == MOE_GATE_HIERARCHICAL) return;
    g->switch_weight = one_of(f, 0, 0.5), g->gshard_weight = one_of(f, 0, 0.6);
    g->z_weight = one_of(f, 0, 0.1), g->sequence_weight = one_of(f, 0, 0.7);
}

static void draw_capacity(family *f)
{
    moe_gate_config *g = &f->g;
    g->capacity_kind = pick(f, 3), g->capacity_rounding = pick(f, 5);
    g->capacity = pick(f, 6), g->capacity_factor = 0.5 + 0.25 * pick(f, 5);
    g->capacity_minimum = pick(f, 3), g->capacity_multiple = pick(f, 3);
    g->capacity_factor_eval = pick(f, 2);
    if (g->kind == MOE_GATE_BALANCED || g->kind == MOE_GATE_EXPERT_CHOICE) {
        if (!g->capacity_kind) g->capacity_kind = 1 + pick(f, 2);
        return;
    }
    g->drop_policy = pick(f, 5);
    if (g->kind == MOE_GATE_HIERARCHICAL && g->drop_policy == MOE_DROP_BATCH_PRIORITY)
        g->drop_policy = MOE_DROP_CHOICE;
    g->renormalize_after_drop = pick(f, 2);
    g->second_choice = pick(f, 4), g->second_threshold = 0.3;
}

static void draw_layer(family *f)
{
    moe_layer_config *l = &f->l;
    moe_experts_config *e = &f->e;
    f->has_shared = pick(f, 2), f->has_residual = pick(f, 2);
    f->shared = f->residual = *e;
    f->shared.num_experts = 1 + pick(f, 2), f->shared.d_hidden = 2 + pick(f, 3);
    f->shared.weight_position = f->residual.weight_position = MOE_WEIGHT_ON_OUTPUT;
    f->residual.num_experts = 1, f->residual.activation = MOE_ACTIVATION_GELU_TANH;
    l->shared_gate = f->has_shared && pick(f, 2);
    l->residual_mix = f->has_residual && pick(f, 2);
    l->output = pick(f, 3) == 0, l->layer_id = pick(f, 9);
    if (l->residual_mix) e->weight_position = MOE_WEIGHT_ON_OUTPUT;
    if (!l->output && !l->residual_mix) l->dropped = pick(f, 3);
    if (l->dropped == MOE_DROPPED_UNTOUCHED && (f->has_shared || f->has_residual)) l->dropped = 0;
    if (l->dropped == MOE_DROPPED_PASS_THROUGH)
        e->d_out = f->shared.d_out = f->residual.d_out = MOE_SAME;
}

void family_draw(family *f, int32_t kind, uint64_t number, int32_t dtype)
{
    memset(f, 0, sizeof *f);
    f->number = number, f->state = number * 2654435761u + 17 * (uint64_t)kind + 1;
    MUST(moe_gate_config_init(&f->g, sizeof f->g));
    MUST(moe_experts_config_init(&f->e, sizeof f->e));
    MUST(moe_layer_config_init(&f->l, sizeof f->l));
    moe_gate_config *g = &f->g;
    int64_t D = 3 + pick(f, 4);
    g->kind = kind, g->dtype = dtype, g->seed = number, g->stream_id = pick(f, 4);
    g->num_experts = pick(f, 2) ? 8 : 4, g->top_k = 1 + pick(f, 3);
    g->d_model = D;
    if (kind != MOE_GATE_NOISY_TOP_K && kind != MOE_GATE_HIERARCHICAL && pick(f, 6) == 0)
        g->d_model = 0;
    g->bias = g->d_model > 0 && kind != MOE_GATE_HIERARCHICAL && pick(f, 2);
    if (g->d_model > 0 && pick(f, 3) == 0) g->jitter = 0.2;
    draw_weighting(f), draw_selection(f), draw_losses(f), draw_capacity(f);
    f->e.d_model = D, f->e.d_hidden = 1 + pick(f, 5), f->e.num_experts = g->num_experts;
    f->e.d_out = pick(f, 2) ? MOE_SAME : 2 + pick(f, 3), f->e.dtype = dtype, f->e.bias = pick(f, 2);
    f->e.activation = pick(f, 2) ? MOE_ACTIVATION_SILU : MOE_ACTIVATION_SWIGLU;
    f->e.weight_position = pick(f, 3);
    f->e.storage = ON_DEVICE ? MOE_STORAGE_ROW_MAJOR : (int32_t)(number / 2 % 3);
    draw_layer(f);
    f->T = 1 + pick(f, 14), f->G = 1 + pick(f, 3);
    if (f->G > f->T) f->G = f->T;
    f->train = pick(f, 3) != 0, f->masked = pick(f, 3) == 0;
    (void)snprintf(f->text, sizeof f->text,
                   "kind %d number %llu: D %d E %d K %d T %d G %d train %d score %d order %d "
                   "renormalize %d capacity %d policy %d shared %d/%d residual %d/%d dropped %d",
                   (int)kind, (unsigned long long)number, (int)D, (int)g->num_experts,
                   (int)g->top_k, (int)f->T, (int)f->G, f->train, (int)g->score, (int)g->order,
                   (int)g->renormalize, (int)g->capacity_kind, (int)g->drop_policy, f->has_shared,
                   (int)f->l.shared_gate, f->has_residual, (int)f->l.residual_mix,
                   (int)f->l.dropped);
}

/* ---- objects --------------------------------------------------------------------------------- */

/* An opaque parameter by way of dense memory. */
static void draw_opaque(family *f, const moe_parameter_record *p, double scale)
{
    moe_experts *pool = strncmp(p->name, "experts.", 8) == 0  ? f->experts
                        : strncmp(p->name, "shared.", 7) == 0 ? f->shared_experts
                                                              : f->residual_experts;
    int64_t index = moe_experts_parameter_find(pool, strchr(p->name, '.') + 1);
    int64_t count = p->shape[0] * p->shape[1] * p->shape[2];
    void *dense = calloc((size_t)count + 1, sizeof(double));
    ck_assert_ptr_nonnull(dense);
    for (int64_t j = 0; j < count; j++)
        number_set(dense, j, f->g.dtype, scale * random_normal(&f->state));
    MUST(moe_experts_import(pool, index, MOE_PARAMETER_DATA, 0, p->shape[0], dense));
    free(dense);
}

/* Normal numbers in every parameter: owned data is written through the record, as a host may. */
static void draw_parameters(family *f)
{
    moe_parameter_record p;
    MUST(moe_parameter_record_init(&p, sizeof p));
    for (int64_t i = 0; i < moe_layer_parameter_count(f->layer); i++) {
        MUST(moe_layer_parameter(f->layer, i, &p));
        double scale = p.kind == MOE_KIND_THRESHOLD ? 0.05 : 0.5;
        if (p.opaque) draw_opaque(f, &p, scale);
        for (int64_t j = 0; j < p.element_count && !p.opaque; j++)
            number_set(p.data, j, p.data_dtype, scale * random_normal(&f->state));
        for (int64_t j = 0; j < p.element_count && p.kind == MOE_KIND_THRESHOLD; j++)
            number_set(p.data, j, p.data_dtype, 1.0 / (double)f->g.num_experts);
    }
}

void family_make(family *f, moe_context *context)
{
    MUST(moe_gate_create(&f->gate, context, &f->g));
    MUST(moe_experts_create(&f->experts, context, &f->e));
    if (f->has_shared) MUST(moe_experts_create(&f->shared_experts, context, &f->shared));
    if (f->has_residual) MUST(moe_experts_create(&f->residual_experts, context, &f->residual));
    f->l.gate = f->gate, f->l.experts = f->experts;
    f->l.shared = f->shared_experts, f->l.residual = f->residual_experts;
    MUST(moe_layer_create(&f->layer, &f->l));
    draw_parameters(f);
}

void family_free(family *f)
{
    moe_layer_destroy(f->layer), moe_gate_destroy(f->gate), moe_experts_destroy(f->experts);
    moe_experts_destroy(f->shared_experts), moe_experts_destroy(f->residual_experts);
}

/* ---- a batch --------------------------------------------------------------------------------- */

static void *normals(family *f, int64_t count, int32_t dtype)
{
    void *data = calloc((size_t)count + 1, sizeof(double));
    ck_assert_ptr_nonnull(data);
    for (int64_t i = 0; i < count; i++) number_set(data, i, dtype, random_normal(&f->state));
    return data;
}

void family_batch_make(family_batch *b, family *f)
{
    memset(b, 0, sizeof *b);
    int32_t dtype = f->g.dtype;
    size_t size = number_bytes(dtype);
    int64_t O = f->e.d_out == MOE_SAME ? f->e.d_model : f->e.d_out;
    b->x = normals(f, f->T * f->e.d_model, dtype), b->dx = normals(f, f->T * f->e.d_model, dtype);
    b->dy = normals(f, f->T * O, dtype), b->y = normals(f, f->T * O, dtype);
    b->x_bytes = f->T * f->e.d_model * (int64_t)size, b->y_bytes = f->T * O * (int64_t)size;
    MUST(moe_forward_args_init(&b->fwd, sizeof b->fwd));
    MUST(moe_backward_args_init(&b->bwd, sizeof b->bwd));
    b->fwd.tokens = f->T, b->fwd.x = b->x, b->fwd.y = b->y, b->fwd.step = 3;
    b->fwd.token_first = 100;
    b->fwd.flags = f->train ? MOE_FORWARD_TRAIN : 0;
    if (f->g.d_model == 0)
        b->fwd.logits_in = normals(f, f->T * f->g.num_experts, number_real(dtype));
    for (int64_t g = 0; g <= f->G; g++) b->group_begin[g] = f->T * g / f->G;
    b->fwd.groups = f->G, b->fwd.group_begin = b->group_begin;
    if (f->g.kind == MOE_GATE_HASH) {
        b->key = calloc((size_t)f->T, sizeof *b->key);
        ck_assert_ptr_nonnull(b->key);
        for (int64_t t = 0; t < f->T; t++) b->key[t] = t * t - 5;
        b->fwd.token_key = b->key;
    }
    if (f->masked) {
        b->mask = calloc((size_t)f->T, 1);
        ck_assert_ptr_nonnull(b->mask);
        for (int64_t t = 0; t < f->T; t++) b->mask[t] = random_uniform(&f->state) > 0.25;
        b->fwd.token_mask = b->mask;
    }
    b->bwd.dy = b->dy, b->bwd.dx = b->dx;
}

void family_batch_free(family_batch *b)
{
    free(b->x), free(b->dx), free(b->y), free(b->dy), free(b->key), free(b->mask);
    free((void *)(uintptr_t)b->fwd.logits_in);
}

static uint64_t mix(uint64_t hash, const void *data, int64_t bytes)
{
    for (int64_t i = 0; i < bytes; i++)
        hash = (hash ^ ((const unsigned char *)data)[i]) * 1099511628211u;
    return hash;
}

uint64_t family_hash(const family *f, const family_batch *b, const moe_pass *pass)
{
    uint64_t hash = 14695981039346656037u;
    int64_t size = (int64_t)number_bytes(number_real(f->g.dtype));
    moe_losses losses;
    moe_plan_view plan;
    const moe_plan *handle;
    moe_parameter_record p;
    MUST(moe_losses_init(&losses, sizeof losses));
    MUST(moe_plan_view_init(&plan, sizeof plan));
    MUST(moe_parameter_record_init(&p, sizeof p));
    MUST(moe_pass_losses(pass, &losses));
    MUST(moe_pass_plan(pass, &handle));
    MUST(moe_plan_get(handle, &plan));
    hash = mix(hash, losses.value, sizeof losses.value);
    hash = mix(hash, plan.weight_of_entry, plan.entries * size);
    hash = mix(hash, plan.expert_of_entry, plan.entries * 4);
    hash = mix(hash, b->y, b->y_bytes), hash = mix(hash, b->dx, b->x_bytes);
    for (int64_t i = 0; i < moe_layer_parameter_count(f->layer); i++) {
        MUST(moe_layer_parameter(f->layer, i, &p));
        if (p.grad) hash = mix(hash, p.grad, p.element_count * (int64_t)number_bytes(p.grad_dtype));
    }
    return hash;
}
