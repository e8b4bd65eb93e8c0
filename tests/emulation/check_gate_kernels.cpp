/* check_gate_kernels.cpp - the gate's CUDA slots against the CPU's plain ones, on random jobs.
 *
 * A job is laid out three times with the same offsets: for the CPU, on the device, and for what
 * comes back. Routing is compared bit for bit, losses to 1e-12 and gradients to 1e-5 of the
 * largest. Rows of plans and the sum of a hierarchical gate's rows are the CPU's here too.
 *   check_gate_kernels [first seed] [number of jobs] */
#include "backend_cuda.h"
#include "route.h"
#include "losses.h"
#include "router_gemm.h"

#include "gate_support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* The slots of the gate for one element type. */
struct slots {
    int32_t dtype;
    moe_status (*route_forward)(moe__route_job *);
    moe_status (*route_count)(moe__route_job *, int64_t *);
    moe_status (*losses_forward)(moe__losses_job *);
    moe_status (*gate_backward)(moe__gate_backward_job *);
    moe_status (*plan_rows)(moe__plan_rows_job *);
    moe_status (*dispatch_backward)(moe__rows_job *);
};

#define SLOTS(type, TYPE)                                                        \
    extern "C" {                                                                 \
    moe_status moe__cpu_route_forward_##type##_plain(moe__route_job *);          \
    moe_status moe__cpu_route_count_##type##_plain(moe__route_job *, int64_t *); \
    moe_status moe__cpu_losses_forward_##type##_plain(moe__losses_job *);        \
    moe_status moe__cpu_gate_backward_##type##_plain(moe__gate_backward_job *);  \
    moe_status moe__cpu_plan_rows_##type##_plain(moe__plan_rows_job *);          \
    moe_status moe__cpu_dispatch_backward_##type##_plain(moe__rows_job *);       \
    }                                                                            \
    static const slots cpu_##type = {MOE_DTYPE_##TYPE,                           \
                                     moe__cpu_route_forward_##type##_plain,      \
                                     moe__cpu_route_count_##type##_plain,        \
                                     moe__cpu_losses_forward_##type##_plain,     \
                                     moe__cpu_gate_backward_##type##_plain,      \
                                     moe__cpu_plan_rows_##type##_plain,          \
                                     moe__cpu_dispatch_backward_##type##_plain}; \
    static const slots cuda_##type = {MOE_DTYPE_##TYPE,                          \
                                      moe__cuda_route_forward_##type,            \
                                      moe__cuda_route_count_##type,              \
                                      moe__cuda_losses_forward_##type,           \
                                      moe__cuda_gate_backward_##type,            \
                                      NULL,                                      \
                                      NULL};
SLOTS(f32, F32)
SLOTS(bf16, BF16)
SLOTS(f16, F16)
static const slots *const all_cpu[] = {&cpu_f32, &cpu_bf16, &cpu_f16};
static const slots *const all_cuda[] = {&cuda_f32, &cuda_bf16, &cuda_f16};
static const slots *on_cpu, *on_cuda; /* of this job */

enum { LIMIT = 1 << 20 };

/* ---- a job ----------------------------------------------------------------------------------- */

struct shape {
    moe_gate_config config;
    int32_t choose, levels, noise, logits_in, jitter, train, masked, sinkhorn, grouped, bias;
    int32_t selection_bias, priority, kth, plain_ids, noise_in, hash_alone, dtype_x, dtype_w,
        dtype_dw;
    int32_t transposed, importance_only;
    int64_t T, D, E, K, G, A, top_groups, N, valid, scoped, softmax, sequence, threshold;
    double weights[MOE_LOSS_SLOTS];
    double wanted_scale;
    int32_t has_loss_grad, has_entry_grad, has_dx, dx_add, d_logits;
};

struct world {
    char *base;
    int64_t bytes, routed, summed; /* where outputs of the route, of the losses end */
    moe__route_job route;
    moe__plan_arrays plan, primary;
    moe__losses_job losses;
    moe__gate_backward_job back;
    uint8_t *mask;
    int64_t *token_key, *taken;
    float *entry_grad, *loss_grad, *results;
};

static moe__matrices matrix(moe__arena *a, int64_t parts, int64_t rows, int64_t cols, int32_t dtype,
                            bool transposed)
{
    moe__matrices m = {};
    m.base = moe__arena_take(a, parts * rows * cols, moe__dtype_size(dtype));
    if (!m.base) m.base = (void *)1;
    m.stride_expert = rows * cols;
    m.stride_row = transposed ? 1 : cols;
    m.stride_col = transposed ? rows : 1;
    m.dtype = dtype;
    m.wide = dtype == MOE_DTYPE_F32;
    return m;
}

static void lay_out_plan(moe__plan_arrays *p, moe__arena *a, int64_t T, int64_t N, int64_t E,
                         int64_t G)
{
    p->tokens = T, p->entries = N, p->num_experts = E, p->groups = G, p->rows = 0;
    p->token_begin = (int64_t *)moe__arena_take(a, T + 1, 8);
    p->expert_of_entry = (int32_t *)moe__arena_take(a, N, 4);
    p->weight_of_entry = moe__arena_take(a, N, 4);
    p->row_of_entry = (int64_t *)moe__arena_take(a, N, 8);
    p->slot_of_entry = (int64_t *)moe__arena_take(a, N, 8);
    p->expert_begin = (int64_t *)moe__arena_take(a, E + 1, 8);
    p->token_of_row = (int64_t *)moe__arena_take(a, N, 8);
    p->entry_of_row = (int64_t *)moe__arena_take(a, N, 8);
    p->group_begin = (int64_t *)moe__arena_take(a, G + 1, 8);
    p->dtype = MOE_DTYPE_F32;
}

static void lay_out_level(moe__gate_level *l, moe__arena *a, const shape *s, int64_t rows,
                          int64_t width, int64_t K, int64_t parts)
{
    l->rows = rows, l->width = width, l->top_k = K, l->parts = parts;
    if (!s->hash_alone) l->logits = moe__arena_take(a, rows * width, 4);
    l->noisy = s->noise ? moe__arena_take(a, rows * width, 4) : l->logits;
    if (s->noise) {
        l->noise_raw = moe__arena_take(a, rows * width, 4);
        l->noise_std = moe__arena_take(a, rows * width, 4);
        l->noise = moe__arena_take(a, rows * width, 4);
    }
    if (s->kth) l->kth = (int32_t *)moe__arena_take(a, rows * 2, 4);
    l->noise_stride = parts * width + 3;
    l->noise_in = s->noise_in ? moe__arena_take(a, s->T * l->noise_stride, 4) : NULL;
    l->noise_stream = 77;
    l->weight_matrix = matrix(a, parts, s->D, width, s->dtype_w, s->transposed);
    if (s->bias) l->bias = matrix(a, parts, 1, width, s->dtype_w, false);
    if (s->noise) l->noise_weight = matrix(a, parts, s->D, width, s->dtype_w, s->transposed);
}

static void lay_out(world *w, const shape *s, char *base)
{
    moe__arena arena = {base, 0}, *a = &arena;
    moe__route_job *r = &w->route;
    int64_t A = s->A, P = s->T * s->top_groups, width = s->E / A, T = s->T, E = s->E;
    bool two = s->levels == 2;
    memset(w, 0, sizeof *w);
    w->base = base;
    lay_out_plan(&w->plan, a, T, s->N, E, s->G);
    if (two) lay_out_plan(&w->primary, a, T, P, A, s->G);
    w->mask = (uint8_t *)moe__arena_take(a, T, 1);
    w->token_key = (int64_t *)moe__arena_take(a, T, 8);
    w->taken = (int64_t *)moe__arena_take(a, s->G, 8);
    int64_t *valid_begin = (int64_t *)moe__arena_take(a, s->G + 1, 8);
    int64_t *valid_token = (int64_t *)moe__arena_take(a, T, 8);
    int64_t *second_begin = (int64_t *)moe__arena_take(a, P + 1, 8);
    r->config = &s->config;
    r->choose = s->choose, r->levels = s->levels, r->tokens = T, r->input_width = s->D;
    r->x_stride = s->D + 4;
    r->x = moe__arena_take(a, T * r->x_stride, moe__dtype_size(s->dtype_x));
    r->x_jittered = s->jitter ? moe__arena_take(a, T * s->D, 4) : NULL;
    r->jitter_stream = 5, r->choice_stream = 6, r->step = 3, r->token_first = 100;
    r->train = s->train;
    r->logits_stride = E + 2;
    r->logits_in = s->logits_in ? moe__arena_take(a, T * r->logits_stride, 4) : NULL;
    r->token_mask = s->masked ? w->mask : NULL;
    r->token_key = w->token_key;
    if (s->selection_bias) r->selection_bias = matrix(a, 1, 1, E, MOE_DTYPE_F32, false);
    if (s->threshold || s->choose == MOE__CHOOSE_THRESHOLD)
        r->threshold = matrix(a, 1, 1, E, MOE_DTYPE_F32, false);
    r->groups = s->G, r->group_begin = w->plan.group_begin;
    r->valid_begin = valid_begin, r->valid_token = valid_token;
    r->taken_of_group = s->choose == MOE__CHOOSE_BY_EXPERT ? w->taken : NULL;
    r->token_begin = w->plan.token_begin, r->expert_of_entry = w->plan.expert_of_entry;
    r->slot_of_entry = w->plan.slot_of_entry;
    r->weight = moe__arena_take(a, s->N, 4);
    r->token_priority = s->priority ? moe__arena_take(a, T, 4) : NULL;
    moe__gate_level *first = &r->level[0], *second = &r->level[1];
    if (two) {
        lay_out_level(first, a, s, T, A, s->top_groups, 1);
        first->bias = moe__matrices();
        lay_out_level(second, a, s, P, width, s->K, A);
        first->choice = (int32_t *)moe__arena_take(a, P, 4);
        first->weight = moe__arena_take(a, P, 4);
        second->choice = (int32_t *)moe__arena_take(a, P * s->K, 4);
        second->weight = moe__arena_take(a, P * s->K, 4);
        first->entry_begin = w->primary.token_begin;
        second->entry_begin = second_begin;
        second->part_begin = w->primary.expert_begin;
        second->token_of_row = w->primary.token_of_row;
        r->primary = &w->primary;
    } else {
        lay_out_level(first, a, s, T, E, s->config.top_k, 1);
        first->choice = w->plan.expert_of_entry, first->weight = r->weight;
        first->entry_begin = w->plan.token_begin;
    }
    float *columns = (float *)moe__arena_take(a, moe__max(T * E, P * width), 4);
    r->columns = columns;
    if (s->grouped) {
        r->group_score = moe__arena_take(a, T * A, 4);
        r->group_ids = (int32_t *)moe__arena_take(a, T * s->top_groups, 4);
    }
    r->taken = (int32_t *)moe__arena_take(a, s->N, 4);
    if (s->sinkhorn) {
        r->column_factor = (double *)moe__arena_take(a, 3 * E, 8);
        r->row_factor = (double *)moe__arena_take(a, T, 8);
    }
    r->tile_begin = (int64_t *)moe__arena_take(a, A + 2, 8);
    w->routed = a->used;

    moe__losses_job *l = &w->losses;
    l->route = r, l->plan = &w->plan, l->weights = s->weights;
    l->valid_token = s->masked ? valid_token : NULL, l->valid_begin = valid_begin;
    l->importance = (double *)moe__arena_take(a, E, 8),
    l->load = (double *)moe__arena_take(a, E, 8);
    l->counts = (int64_t *)moe__arena_take(a, E, 8);
    l->first_counts = (int64_t *)moe__arena_take(a, E, 8);
    if (two) {
        l->primary_load = (double *)moe__arena_take(a, A, 8);
        l->part_load = (double *)moe__arena_take(a, E, 8);
        l->part_rows = (double *)moe__arena_take(a, A, 8);
    }
    l->scoped = s->scoped != 0, l->scopes = s->scoped ? s->G : 1;
    l->score_sum = s->softmax ? (double *)moe__arena_take(a, l->scopes * E, 8) : NULL;
    l->scope_counts = s->scoped ? (int64_t *)moe__arena_take(a, s->G * E, 8) : l->counts;
    l->scope_first = s->scoped ? (int64_t *)moe__arena_take(a, s->G * E, 8) : l->first_counts;
    if (s->sequence) {
        l->sequence_sum = (double *)moe__arena_take(a, s->G * E, 8);
        l->sequence_counts = (int64_t *)moe__arena_take(a, s->G * E, 8);
        l->sequence_scale = (double *)moe__arena_take(a, s->G, 8);
    }
    if (s->threshold) l->over_taken = (int64_t *)moe__arena_take(a, E, 8);
    l->rows_of_expert = (int64_t *)moe__arena_take(a, E, 8);
    l->value = (double *)moe__arena_take(a, MOE_LOSS_SLOTS, 8);
    l->stats = (double *)moe__arena_take(a, MOE_STAT_SLOTS, 8);
    l->sums = (double *)moe__arena_take(a, MOE__SUM_SLOTS, 8);
    l->columns = columns;
    l->token_value = (double *)moe__arena_take(a, T, 8);
    l->plain_ids = s->plain_ids ? (int32_t *)moe__arena_take(a, T * s->config.top_k, 4) : NULL;
    w->summed = a->used;

    moe__gate_backward_job *b = &w->back;
    w->loss_grad = (float *)moe__arena_take(a, MOE_LOSS_SLOTS, 4);
    w->results = (float *)moe__arena_take(a, MOE_LOSS_SLOTS + MOE_STAT_SLOTS, 4);
    w->entry_grad = (float *)moe__arena_take(a, s->N, 4);
    b->losses = l;
    b->loss_grad = s->has_loss_grad ? w->loss_grad : NULL;
    b->entry_weight_grad = s->has_entry_grad ? w->entry_grad : NULL;
    b->loss_factor = (double *)moe__arena_take(a, MOE_LOSS_SLOTS, 8);
    b->d_weight = moe__arena_take(a, s->N, 4);
    b->d_importance = (double *)moe__arena_take(a, E, 8);
    b->d_load = (double *)moe__arena_take(a, E, 8);
    b->d_score = s->softmax ? moe__arena_take(a, l->scopes * E, 4) : NULL;
    b->dx_stride = s->D + 1;
    b->dx = s->has_dx ? moe__arena_take(a, T * b->dx_stride, moe__dtype_size(s->dtype_x)) : NULL;
    b->dx_add = s->dx_add;
    b->d_x_jittered = s->jitter ? moe__arena_take(a, T * s->D, 4) : NULL;
    b->d_logits_stride = E + 1;
    b->d_logits_out = s->d_logits ? moe__arena_take(a, T * b->d_logits_stride, 4) : NULL;
    b->logits_from_host = s->logits_in;
    if (s->threshold) b->d_threshold = matrix(a, 1, 1, E, MOE_DTYPE_F32, false);
    for (int i = 0; i < s->levels; i++) {
        moe__gate_level *v = &r->level[i];
        int64_t entries = two ? (i ? P * s->K : P) : s->N;
        v->scores = moe__arena_take(a, entries, 4);
        v->d_weight = two ? moe__arena_take(a, entries, 4) : b->d_weight;
        v->d_load = (double *)moe__arena_take(a, v->parts * v->width, 8);
        v->d_logits = moe__arena_take(a, v->rows * v->width, 4);
        v->d_noisy = moe__arena_take(a, v->rows * v->width, 4);
        if (s->noise) v->d_noise_raw = moe__arena_take(a, v->rows * v->width, 4);
        v->d_weight_matrix = matrix(a, v->parts, s->D, v->width, s->dtype_dw, s->transposed);
        if (v->bias.base) v->d_bias = matrix(a, v->parts, 1, v->width, s->dtype_dw, false);
        if (s->noise)
            v->d_noise_weight = matrix(a, v->parts, s->D, v->width, s->dtype_dw, s->transposed);
    }
    if (two) {
        second->segment_begin = (int64_t *)moe__arena_take(a, A * s->G + 1, 8);
        second->dx_rows = moe__arena_take(a, P * s->D, 4);
    }
    w->bytes = a->used;
}

/* ---- inputs ---------------------------------------------------------------------------------- */

static void fill(float *v, int64_t n, float scale)
{
    for (int64_t i = 0; i < n; i++) v[i] = scale * normal();
}
static void fill_element(void *data, int32_t dtype, int64_t i, float v)
{
    if (dtype == MOE_DTYPE_F32)
        ((float *)data)[i] = v;
    else
        ((uint16_t *)data)[i] = dtype == MOE_DTYPE_BF16 ? moe__to_bf16(v) : moe__to_f16(v);
}
static void fill_matrix(const moe__matrices *m, int64_t n, float scale)
{
    for (int64_t i = 0; m->base && i < n; i++) fill_element(m->base, m->dtype, i, scale * normal());
}

/* Logits with ties, and now and then what is no number. */
static void fill_logits(float *v, int64_t n)
{
    int kind = (int)below(4);
    for (int64_t i = 0; i < n; i++) {
        v[i] = kind == 0 ? (float)below(5) - 2 : 2 * normal();
        if (kind == 1 && chance(1)) v[i] = NAN;
        if (kind == 1 && chance(1)) v[i] = chance(50) ? INFINITY : -INFINITY;
        if (kind == 0 && chance(5)) v[i] = -0.0f;
    }
}

static void fill_world(world *w, const shape *s)
{
    moe__route_job *r = &w->route;
    int64_t T = s->T, E = s->E, valid = 0;
    memset(w->base, 0xff, (size_t)w->bytes);
    for (int64_t t = 0; t <= T; t++) w->plan.token_begin[t] = t * (s->N / moe__max(T, 1));
    for (int64_t g = 0; g <= s->G; g++) w->plan.group_begin[g] = T * g * g / (s->G * s->G);
    int64_t *valid_begin = (int64_t *)r->valid_begin, *valid_token = (int64_t *)r->valid_token;
    for (int64_t t = 0; t < T; t++) w->mask[t] = !s->masked || !chance(30);
    for (int64_t g = 0; g < s->G; g++) {
        valid_begin[g] = valid;
        for (int64_t t = w->plan.group_begin[g]; t < w->plan.group_begin[g + 1]; t++)
            if (w->mask[t]) valid_token[valid++] = t;
    }
    valid_begin[s->G] = valid;
    for (int64_t t = 0; t < T; t++) w->token_key[t] = ((int64_t)draw() << 20) + draw();
    for (int64_t i = 0; i < T * r->x_stride; i++)
        fill_element((void *)r->x, s->dtype_x, i, normal());
    if (r->logits_in) fill_logits((float *)r->logits_in, T * r->logits_stride);
    fill_matrix(&r->selection_bias, E, 0.3f);
    for (int64_t i = 0; r->threshold.base && i < E; i++)
        ((float *)r->threshold.base)[i] = (0.5f + (float)below(100) / 50) / (float)E;
    for (int i = 0; i < s->levels; i++) {
        moe__gate_level *l = &r->level[i];
        fill_matrix(&l->weight_matrix, l->parts * s->D * l->width, 0.5f);
        fill_matrix(&l->bias, l->parts * l->width, 0.5f);
        fill_matrix(&l->noise_weight, l->parts * s->D * l->width, 0.5f);
        if (l->noise_in) fill((float *)l->noise_in, T * l->noise_stride, 1);
    }
    if (s->levels == 2) {
        int64_t P = T * s->top_groups;
        for (int64_t t = 0; t <= T; t++) w->primary.token_begin[t] = t * s->top_groups;
        for (int64_t n = 0; n <= P; n++) ((int64_t *)r->level[1].entry_begin)[n] = n * s->K;
        memcpy(w->primary.group_begin, w->plan.group_begin, (size_t)(s->G + 1) * 8);
    }
    for (int64_t n = 0; s->choose == MOE__CHOOSE_GIVEN && n < s->N; n++) {
        int64_t width = E / s->A, group = (n / s->K * 7 + 3) % s->A;
        bool none = chance(10);
        w->plan.expert_of_entry[n] = (int32_t)(none             ? -1
                                               : s->levels == 2 ? group * width + below(width)
                                                                : below(E));
    }
    fill(w->loss_grad, MOE_LOSS_SLOTS, 1);
    fill(w->entry_grad, s->N, 1);
    if (w->back.dx)
        for (int64_t i = 0; i < T * w->back.dx_stride; i++)
            fill_element(w->back.dx, s->dtype_x, i, normal());
    fill_matrix(&w->back.d_threshold, E, 1);
    for (int i = 0; i < s->levels; i++) {
        moe__gate_level *l = &r->level[i];
        fill_matrix(&l->d_weight_matrix, l->parts * s->D * l->width, 1);
        fill_matrix(&l->d_bias, l->parts * l->width, 1);
        fill_matrix(&l->d_noise_weight, l->parts * s->D * l->width, 1);
    }
}

/* Rows that an expert takes of each group. */
static int64_t fill_taken(world *w, const shape *s, int64_t seed)
{
    int64_t entries = 0;
    for (int64_t g = 0; g < s->G; g++) {
        int64_t valid = w->route.valid_begin[g + 1] - w->route.valid_begin[g];
        w->taken[g] = moe__min(valid, (seed + g) % 3 == 0 ? valid : (seed % 7) + valid / 3);
        entries += s->E * w->taken[g];
    }
    return entries;
}

static shape draw_shape(bool large, bool huge)
{
    shape s = {};
    enum {
        PLAIN,
        BIAS,
        GROUPS,
        GUMBEL,
        REST,
        SINKHORN,
        ALL,
        KEY,
        BY_EXPERT,
        THRESHOLD,
        GIVEN,
        TWO,
        TWO_GIVEN,
        KINDS
    };
    int kind = (int)below(KINDS);
    moe_gate_config *c = &s.config;
    static const int64_t some_e[] = {1, 2, 3, 5, 8, 16, 31, 32, 33, 64, 100, 300};
    s.T = chance(8) ? 0 : 1 + below(large ? 200 : 60);
    s.E = some_e[below(12)];
    s.D = 1 + below(31); /* beyond, cuBLAS makes the products */
    s.G = 1 + below(3);
    s.A = s.top_groups = s.levels = 1;
    s.masked = chance(40);
    s.train = 1;
    s.noise = chance(40);
    s.noise_in = s.noise && chance(30);
    s.jitter = chance(20);
    s.bias = chance(40);
    s.transposed = chance(30);
    s.priority = chance(40);
    int type = chance(60) ? 0 : 1 + (int)below(2);
    on_cpu = all_cpu[type], on_cuda = all_cuda[type];
    s.dtype_x = on_cpu->dtype;
    s.dtype_w = chance(50) ? MOE_DTYPE_F32 : s.dtype_x;
    s.dtype_dw = chance(50) ? MOE_DTYPE_F32 : s.dtype_x;
    s.choose = MOE__CHOOSE_TOP;
    if (kind == BIAS) s.selection_bias = 1;
    if (kind == GROUPS || kind == TWO || kind == TWO_GIVEN) {
        s.A = 1 + below(6);
        s.E = s.A * (1 + below(kind == GROUPS ? 40 : 12));
        s.top_groups = 1 + below(s.A);
        s.grouped = kind == GROUPS;
        s.selection_bias = s.grouped && chance(50);
        c->group_score = (int32_t)below(moe__min(s.E / s.A, 3) + 1);
    }
    if (kind == TWO || kind == TWO_GIVEN) s.levels = 2;
    if (huge) { /* more than a block sorts at once */
        kind = chance(50) ? BY_EXPERT : kind == GROUPS ? GROUPS : PLAIN;
        s.T = kind == BY_EXPERT ? 4000 + below(3000) : 1 + below(3);
        s.E = kind == BY_EXPERT ? 2 : s.A * ((2100 + below(4000)) / s.A);
        s.levels = 1, s.choose = MOE__CHOOSE_TOP;
        if (kind != GROUPS) s.A = s.top_groups = 1, s.grouped = s.selection_bias = 0;
    }
    c->num_experts = s.E;
    s.K = 1 + below(s.levels == 2 || s.grouped ? s.E / s.A : chance(80) ? moe__min(s.E, 8) : s.E);
    if (chance(10)) s.K = s.levels == 2 || s.grouped ? s.E / s.A : s.E;
    if (huge && kind != BY_EXPERT) s.K = s.E / s.A * s.top_groups - below(20);
    if (kind == GUMBEL) c->choice_noise = MOE_CHOICE_NOISE_GUMBEL;
    if (kind == REST) c->choice_noise = MOE_CHOICE_NOISE_GUMBEL_REST;
    s.sinkhorn = kind == SINKHORN;
    if (s.sinkhorn) s.noise = s.noise_in = 0;
    if (kind == ALL) s.choose = MOE__CHOOSE_ALL, s.K = s.E;
    if (kind == KEY) s.choose = MOE__CHOOSE_KEY, s.K = moe__min(s.K, 6), s.hash_alone = chance(30);
    if (kind == BY_EXPERT) s.choose = MOE__CHOOSE_BY_EXPERT;
    if (kind == THRESHOLD) s.choose = MOE__CHOOSE_THRESHOLD;
    if (kind == GIVEN || kind == TWO_GIVEN) s.choose = MOE__CHOOSE_GIVEN;
    s.N = s.T * s.top_groups * s.K;
    if (s.levels == 1) s.N = s.T * s.K;
    if (kind == BY_EXPERT || kind == THRESHOLD) s.N = s.T * s.E;
    c->d_model = s.D, c->top_k = s.K, c->expert_groups = s.A, c->top_groups = s.top_groups;
    c->score = chance(50) ? MOE_SCORE_SOFTMAX : MOE_SCORE_SIGMOID;
    c->order = chance(50) ? MOE_ORDER_SELECT_THEN_SCORE : MOE_ORDER_SCORE_THEN_SELECT;
    if (kind == BY_EXPERT || kind == THRESHOLD) c->order = MOE_ORDER_SCORE_THEN_SELECT;
    c->renormalize = chance(50);
    c->renormalize_epsilon = chance(30) ? 1e-3 : 0;
    c->renormalize_minimum = chance(20) ? 0.4 : 0;
    c->renormalize_after_drop = chance(40);
    c->route_scale = chance(50) ? 1 : 2.5;
    c->noise_epsilon = 1e-2, c->cdf_guard = 1e-20, c->jitter = 0.1, c->seed = draw();
    c->cv_ddof = chance(50);
    c->sequence_score = chance(50) ? MOE_SCORE_SOFTMAX : MOE_SCORE_SIGMOID;
    c->sinkhorn_iterations = chance(50) ? 1 + (int32_t)below(6) : 20;
    if (s.hash_alone) s.noise = s.noise_in = s.jitter = s.bias = s.priority = 0;
    s.logits_in = !s.hash_alone && s.levels == 1 && chance(50);
    s.kth = s.noise || (!s.hash_alone && chance(30));
    if (s.levels == 2) s.kth = 1, s.priority = 0;
    if (s.levels == 1 && !s.hash_alone) {
        s.softmax = chance(60);
        s.scoped = s.softmax && chance(40);
        s.sequence = chance(40);
        s.plain_ids = s.sequence && chance(50);
        s.threshold = chance(30);
    }
    if (chance(80)) s.weights[MOE_LOSS_IMPORTANCE] = 0.5;
    if (s.kth && chance(80)) s.weights[MOE_LOSS_LOAD] = 0.7;
    if (s.softmax) {
        if (chance(70)) s.weights[MOE_LOSS_SWITCH] = 0.3;
        if (chance(70)) s.weights[MOE_LOSS_GSHARD] = 0.4;
        if (chance(70)) s.weights[MOE_LOSS_Z] = 0.2;
    }
    if (s.sequence) s.weights[MOE_LOSS_SEQUENCE] = 0.6;
    if (s.threshold) s.weights[MOE_LOSS_THRESHOLD] = 0.8;
    s.has_loss_grad = chance(50), s.has_entry_grad = chance(85), s.has_dx = chance(80);
    s.dx_add = chance(50), s.d_logits = s.levels == 1 && !s.hash_alone && chance(40);
    return s;
}

/* ---- what the other files of cuda/ have ------------------------------------------------------ */

static world *device_world, *shadow;

static void down(void)
{
    if (cudaDeviceSynchronize() != cudaSuccess ||
        cudaMemcpy(shadow->base, device_world->base, (size_t)device_world->bytes,
                   cudaMemcpyDeviceToHost) != cudaSuccess)
        exit(printf("copy down failed: %s\n", cudaGetErrorString(cudaGetLastError())));
}
static void up(void)
{
    if (cudaMemcpy(device_world->base, shadow->base, (size_t)device_world->bytes,
                   cudaMemcpyHostToDevice) != cudaSuccess)
        exit(printf("copy up failed\n"));
}

extern "C" {
moe_status moe__cuda_plan_rows(moe__plan_rows_job *job)
{
    moe__plan_rows_job host = *job;
    down();
    host.workers = shadow->route.workers;
    host.plan = job->plan == &device_world->primary ? &shadow->primary : &shadow->plan;
    host.token_mask = job->token_mask ? shadow->mask : NULL;
    MOE_TRY(on_cpu->plan_rows(&host));
    up();
    return MOE_OK;
}
static moe_status dispatch_backward(moe__rows_job *job)
{
    moe__rows_job host = *job;
    down();
    host.workers = shadow->route.workers;
    host.plan = &shadow->primary;
    shadow->primary.rows = shadow->primary.expert_begin[shadow->primary.num_experts];
    host.rows_in = shadow->base + ((const char *)job->rows_in - device_world->base);
    host.tokens_out = shadow->base + ((char *)job->tokens_out - device_world->base);
    MOE_TRY(on_cpu->dispatch_backward(&host));
    up();
    return MOE_OK;
}
moe_status moe__cuda_dispatch_backward_f32(moe__rows_job *job) { return dispatch_backward(job); }
moe_status moe__cuda_dispatch_backward_bf16(moe__rows_job *job) { return dispatch_backward(job); }
moe_status moe__cuda_dispatch_backward_f16(moe__rows_job *job) { return dispatch_backward(job); }

/* Of src/, on one thread. */
moe_status moe__parallel(moe_context *, int64_t count, void (*task)(void *, int64_t),
                         void *argument, const char *)
{
    for (int64_t i = 0; i < count; i++) task(argument, i);
    return MOE_OK;
}
moe_status moe__parallel_range(moe_context *, int64_t count, int64_t,
                               void (*body)(void *, int64_t, int64_t), void *argument, const char *)
{
    if (count > 0) body(argument, 0, count);
    return MOE_OK;
}
}

/* ---- comparisons ----------------------------------------------------------------------------- */

static int64_t failures;

static void fail(const char *what, int64_t i, double a, double b)
{
    if (failures++ < 20) printf("  %s[%lld]: cpu %.17g, cuda %.17g\n", what, (ll)i, a, b);
}

static void same_bits(const char *what, const void *a, const void *b, int64_t n)
{
    for (int64_t i = 0; a && i < n; i++) {
        float x = ((const float *)a)[i], y = ((const float *)b)[i];
        if (memcmp(&x, &y, 4) != 0 && !(x != x && y != y)) {
            fail(what, i, x, y);
            return;
        }
    }
}
template <typename T> static void same_ints(const char *what, const T *a, const T *b, int64_t n)
{
    for (int64_t i = 0; a && i < n; i++)
        if (a[i] != b[i]) {
            fail(what, i, (double)a[i], (double)b[i]);
            return;
        }
}
template <typename T>
static void close_to(const char *what, const T *a, const T *b, int64_t n, double bound,
                     bool relative)
{
    double largest = 0;
    for (int64_t i = 0; a && i < n; i++)
        if (isfinite((double)a[i]) && fabs((double)a[i]) > largest) largest = fabs((double)a[i]);
    for (int64_t i = 0; a && i < n; i++) {
        double x = (double)a[i], y = (double)b[i];
        double scale = relative ? fabs(x) : largest;
        if (x != x && y != y) continue;
        if (x == y || fabs(x - y) <= bound * scale + (relative ? 1e-30 : 1e-6)) continue;
        fail(what, i, x, y);
        return;
    }
}

static void elements_close(const char *what, const void *a, const void *b, int64_t n, int32_t dtype)
{
    if (dtype == MOE_DTYPE_F32) {
        close_to(what, (const float *)a, (const float *)b, n, 1e-5, false);
        return;
    }
    float *wide = (float *)malloc((size_t)(2 * n + 1) * sizeof(float));
    for (int64_t i = 0; a && i < 2 * n; i++) {
        uint16_t bits = ((const uint16_t *)(i < n ? a : b))[i % n];
        wide[i] = dtype == MOE_DTYPE_BF16 ? moe__from_bf16(bits) : moe__from_f16(bits);
    }
    if (a) close_to(what, wide, wide + n, n, dtype == MOE_DTYPE_BF16 ? 0x1p-7 : 0x1p-10, false);
    free(wide);
}
static void matrices_close(const char *what, const moe__matrices *a, const moe__matrices *b,
                           int64_t n)
{
    elements_close(what, a->base, b->base, n, a->dtype);
}

static void compare_routing(const world *a, const world *b, const shape *s)
{
    for (int i = 0; i < s->levels; i++) {
        const moe__gate_level *l = &a->route.level[i], *m = &b->route.level[i];
        int64_t rows = i ? a->primary.expert_begin[s->A] : s->T, n = rows * l->width;
        same_bits("logits", l->logits, m->logits, n);
        same_bits("noisy", l->noisy, m->noisy, n);
        same_bits("noise_raw", l->noise_raw, m->noise_raw, n);
        same_bits("noise_std", l->noise_std, m->noise_std, n);
        same_bits("noise", l->noise, m->noise, n);
        same_ints("kth", l->kth, m->kth, rows * 2);
        if (s->levels == 2) {
            int64_t entries = i ? rows * s->K : s->T * s->top_groups;
            same_ints("choice", l->choice, m->choice, entries);
            same_bits("level weight", l->weight, m->weight, entries);
        }
    }
    int64_t entries = a->plan.token_begin[s->T];
    same_ints("token_begin", a->plan.token_begin, b->plan.token_begin, s->T + 1);
    same_ints("expert", a->plan.expert_of_entry, b->plan.expert_of_entry, entries);
    same_bits("weight", a->route.weight, b->route.weight, entries);
    if (s->choose == MOE__CHOOSE_BY_EXPERT)
        same_ints("slot", a->plan.slot_of_entry, b->plan.slot_of_entry, entries);
    same_bits("priority", a->route.token_priority, b->route.token_priority, s->T);
    same_bits("x'", a->route.x_jittered, b->route.x_jittered, s->T * s->D);
}

static void compare_losses(const world *a, const world *b, const shape *s)
{
    const moe__losses_job *l = &a->losses, *m = &b->losses;
    int64_t E = s->E;
    double sums[MOE__SUM_SLOTS] = {l->tokens, l->groups,        l->rows,       l->with_logits,
                                   l->z_sum,  l->threshold_sum, l->entropy_sum};
    close_to("sums", sums, m->sums, MOE__SUM_SLOTS, 1e-11, true);
    same_ints("counts", l->counts, m->counts, E);
    same_ints("first_counts", l->first_counts, m->first_counts, E);
    same_ints("rows_of_expert", l->rows_of_expert, m->rows_of_expert, E);
    close_to("importance", l->importance, m->importance, E, 1e-12, true);
    close_to("load", l->load, m->load, E, 1e-12, true);
    close_to("primary_load", l->primary_load, m->primary_load, s->A, 1e-12, true);
    close_to("part_load", l->part_load, m->part_load, E, 1e-12, true);
    if (!s->hash_alone) {
        if (l->weights[MOE_LOSS_SWITCH] != 0 || l->weights[MOE_LOSS_GSHARD] != 0 ||
            l->weights[MOE_LOSS_Z] != 0) {
            close_to("score_sum", l->score_sum, m->score_sum, l->scopes * E, 1e-12, true);
            same_ints("scope_counts", l->scope_counts, m->scope_counts, l->scopes * E);
            same_ints("scope_first", l->scope_first, m->scope_first, l->scopes * E);
        }
        close_to("sequence_sum", l->sequence_sum, m->sequence_sum, s->G * E, 1e-12, true);
        same_ints("sequence_counts", l->sequence_counts, m->sequence_counts, s->G * E);
        close_to("sequence_scale", l->sequence_scale, m->sequence_scale, s->G, 1e-12, true);
        same_ints("over_taken", l->over_taken, m->over_taken, E);
    }
    close_to("value", l->value, m->value, MOE_LOSS_SLOTS, 1e-11, true);
    close_to("stats", l->stats, m->stats, MOE_STAT_SLOTS, 1e-11, true);
    for (int i = 0; i < MOE_LOSS_SLOTS + MOE_STAT_SLOTS; i++) {
        double v = i < MOE_LOSS_SLOTS ? m->value[i] : m->stats[i - MOE_LOSS_SLOTS];
        float result = (float)v;
        same_bits("results", &result, b->results + i, 1);
    }
}

static void compare_gradients(const world *a, const world *b, const shape *s)
{
    close_to("loss_factor", a->back.loss_factor, b->back.loss_factor, MOE_LOSS_SLOTS, 1e-15, true);
    if (!s->hash_alone)
        for (int i = 0; i < s->levels; i++) {
            const moe__gate_level *l = &a->route.level[i], *m = &b->route.level[i];
            int64_t rows = i ? a->primary.expert_begin[s->A] : s->T;
            close_to("d_logits", (float *)l->d_logits, (float *)m->d_logits, rows * l->width, 1e-5,
                     false);
            close_to("d_noise_raw", (float *)l->d_noise_raw, (float *)m->d_noise_raw,
                     rows * l->width, 1e-5, false);
            matrices_close("d_weight", &l->d_weight_matrix, &m->d_weight_matrix,
                           l->parts * s->D * l->width);
            matrices_close("d_bias", &l->d_bias, &m->d_bias, l->parts * l->width);
            matrices_close("d_noise_weight", &l->d_noise_weight, &m->d_noise_weight,
                           l->parts * s->D * l->width);
        }
    elements_close("dx", a->back.dx, b->back.dx, s->T * a->back.dx_stride, s->dtype_x);
    close_to("d_threshold", (float *)a->back.d_threshold.base, (float *)b->back.d_threshold.base,
             s->E, 1e-6, false);
    if (a->back.d_logits_out)
        close_to("d_logits_out", (float *)a->back.d_logits_out, (float *)b->back.d_logits_out,
                 s->T * a->back.d_logits_stride, 1e-5, false);
}

/* ---- a run ----------------------------------------------------------------------------------- */

static void check(moe_status status, const char *what)
{
    if (status != MOE_OK) exit(printf("%s: status %d\n", what, (int)status));
}

static void drop_some(world *w, const shape *s)
{
    moe__plan_rows_job rows = {};
    memcpy(w->plan.weight_of_entry, w->route.weight, (size_t)s->N * 4);
    rows.workers = w->route.workers;
    rows.plan = &w->plan;
    rows.token_mask = w->route.token_mask;
    rows.keep_slots = s->choose == MOE__CHOOSE_BY_EXPERT;
    rows.renormalize_after_drop = s->config.renormalize_after_drop;
    rows.renormalize_minimum = s->config.renormalize_minimum;
    rows.second_choice = chance(40) ? MOE_SECOND_CHOICE_NONE : MOE_SECOND_CHOICE_ALL;
    check(on_cpu->plan_rows(&rows), "plan_rows");
}

static moe__pass_shape pass_shape_of(const shape *s)
{
    moe__pass_shape p = {};
    p.gate = &s->config, p.tokens = s->T, p.entries = s->N, p.num_experts = s->E, p.groups = s->G;
    p.top_k = s->K;
    return p;
}

static int64_t scratch_of(const shape *s)
{
    moe__pass_shape p = pass_shape_of(s);
    int64_t bytes = moe__cuda_route_scratch(&p);
    bytes = moe__max(bytes, moe__cuda_choose_scratch(&p));
    bytes = moe__max(bytes, moe__cuda_losses_scratch(&p));
    return moe__max(bytes, moe__cuda_gate_backward_scratch(&p));
}

static void run_one(uint64_t seed)
{
    random_state = seed * 2654435761u + 12345;
    for (int i = 0; i < 4; i++) draw();
    shape s = draw_shape(seed % 4 == 0, seed % 150 == 149);
    moe_gate_config *c = &s.config;
    c->kind = s.levels == 2 ? MOE_GATE_HIERARCHICAL
              : s.sinkhorn  ? MOE_GATE_SINKHORN
                            : MOE_GATE_TOP_K;
    world cpu, gpu, back;
    int64_t before = failures, counted_cpu = 0, counted_gpu = 0;
    lay_out(&cpu, &s, NULL);
    int64_t bytes = cpu.bytes;
    lay_out(&cpu, &s, (char *)aligned_alloc(64, (size_t)bytes + 64));
    fill_world(&cpu, &s);
    if (s.choose == MOE__CHOOSE_BY_EXPERT) fill_taken(&cpu, &s, (int64_t)seed);
    char *device = NULL, *scratch = NULL;
    int64_t scratch_bytes = scratch_of(&s);
    cudaStream_t stream;
    if (cudaMalloc((void **)&device, (size_t)bytes + 64) != cudaSuccess ||
        cudaMalloc((void **)&scratch, (size_t)scratch_bytes + 64) != cudaSuccess ||
        cudaStreamCreate(&stream) != cudaSuccess)
        exit(printf("no device memory\n"));
    lay_out(&gpu, &s, device);
    lay_out(&back, &s, (char *)aligned_alloc(64, (size_t)bytes + 64));
    device_world = &gpu, shadow = &back;
    memcpy(back.base, cpu.base, (size_t)bytes);
    up();
    cpu.route.workers.scratch = back.route.workers.scratch = (char *)aligned_alloc(64, LIMIT * 8);
    cpu.route.workers.worker_bytes = back.route.workers.worker_bytes = LIMIT * 8;
    static char context[4096];
    memset(context, 0, sizeof context);
    ((int32_t *)context)[3] = 1;
    cpu.route.workers.context = back.route.workers.context = (moe_context *)(void *)context;
    cpu.route.workers.function = back.route.workers.function = gpu.route.workers.function = "check";
    gpu.route.workers.scratch = scratch;
    gpu.route.workers.worker_bytes = scratch_bytes;
    gpu.route.workers.stream = stream;

    if (s.choose == MOE__CHOOSE_THRESHOLD) {
        check(on_cpu->route_count(&cpu.route, &counted_cpu), "cpu count");
        check(on_cuda->route_count(&gpu.route, &counted_gpu), "cuda count");
        if (counted_cpu != counted_gpu) fail("count", 0, (double)counted_cpu, (double)counted_gpu);
    }
    check(on_cpu->route_forward(&cpu.route), "cpu route");
    check(on_cuda->route_forward(&gpu.route), "cuda route");
    down();
    compare_routing(&cpu, &back, &s);
    int64_t rows_of_second = cpu.route.level[1].rows;
    if (gpu.route.level[1].rows != (s.levels == 2 ? s.T * s.top_groups : 0))
        fail("level[1].rows", 0, 0, (double)gpu.route.level[1].rows);
    (void)rows_of_second;

    s.N = cpu.plan.token_begin[s.T];
    cpu.plan.entries = gpu.plan.entries = back.plan.entries = s.N;
    drop_some(&cpu, &s);
    memcpy(back.base, cpu.base, (size_t)cpu.routed);
    up();
    check(on_cpu->losses_forward(&cpu.losses), "cpu losses");
    check(on_cuda->losses_forward(&gpu.losses), "cuda losses");
    check(moe__cuda_write_results(&gpu.losses, gpu.results, gpu.results + MOE_LOSS_SLOTS),
          "cuda results");
    down();
    compare_losses(&cpu, &back, &s);

    check(on_cpu->gate_backward(&cpu.back), "cpu backward");
    check(on_cuda->gate_backward(&gpu.back), "cuda backward");
    down();
    compare_gradients(&cpu, &back, &s);

    if (failures > before)
        printf("seed %llu: T %lld D %lld E %lld K %lld G %lld A %lld choose %d levels %d noise %d "
               "logits_in %d masked %d score %d order %d renormalize %d kth %d sinkhorn %d "
               "grouped %d bias %d choice_noise %d given N %lld scoped %d dtype %d %d\n",
               (unsigned long long)seed, (ll)s.T, (ll)s.D, (ll)s.E, (ll)s.K, (ll)s.G, (ll)s.A,
               s.choose, s.levels, s.noise, s.logits_in, s.masked, c->score, c->order,
               c->renormalize, s.kth, s.sinkhorn, s.grouped, s.selection_bias, c->choice_noise,
               (ll)s.N, (int)s.scoped, s.dtype_x, s.dtype_w);
    free(cpu.base), free(back.base), free(cpu.route.workers.scratch);
    cudaStreamDestroy(stream);
    cudaFree(device), cudaFree(scratch);
}

int main(int argc, char **argv)
{
    uint64_t first = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    uint64_t count = argc > 2 ? strtoull(argv[2], NULL, 10) : 200;
    for (uint64_t seed = first; seed < first + count; seed++) run_one(seed);
    printf("check_gate_kernels: %llu jobs, %lld differences\n", (unsigned long long)count,
           (ll)failures);
    return failures != 0;
}
