/* layer_parameters.c - the parameters of a run: owned, or bound to odd strides or to a pointer for
 * each expert; written and read in the reference's order whatever the layout. */
#include "support/layer_case.h"

#include <check.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PATTERN = 0x5a };

/* ---- the reference's tensors ----------------------------------------------------------------- */

#define TENSOR(name, owner, parameter, fused, input, gradient)       \
    {                                                                \
        name, owner, parameter, fused, offsetof(ref_problem, input), \
            offsetof(ref_result, gradient)                           \
    }
#define POOL(prefix, owner, pool)                                       \
    TENSOR("d" prefix "W1", owner, "w1", "w13", pool.W1, pool.dW1),     \
        TENSOR("d" prefix "b1", owner, "b1", "b13", pool.b1, pool.db1), \
        TENSOR("d" prefix "W3", owner, "w3", "w13", pool.W3, pool.dW3), \
        TENSOR("d" prefix "b3", owner, "b3", "b13", pool.b3, pool.db3), \
        TENSOR("d" prefix "W2", owner, "w2", NULL, pool.W2, pool.dW2),  \
        TENSOR("d" prefix "b2", owner, "b2", NULL, pool.b2, pool.db2)

const layer_tensor layer_tensors[LAYER_TENSORS] = {
    TENSOR("dWg", OF_GATE, "weight", NULL, Wg, dWg),
    TENSOR("dbg", OF_GATE, "bias", NULL, bg, dbg),
    TENSOR("dWn", OF_GATE, "noise_weight", NULL, Wn, dWn),
    TENSOR("dWp", OF_GATE, "primary_weight", NULL, Wp, dWp),
    TENSOR("dWq", OF_GATE, "primary_noise_weight", NULL, Wq, dWq),
    TENSOR("d_threshold", OF_GATE, "threshold", NULL, threshold, d_threshold),
    {"selection bias", OF_GATE, "selection_bias", NULL, offsetof(ref_problem, selection_bias), 0},
    POOL("", OF_ROUTED, routed),
    POOL("s", OF_SHARED, shared),
    POOL("r", OF_RESIDUAL, residual),
    TENSOR("dws", OF_LAYER, "shared_gate", NULL, ws, dws),
    TENSOR("dWc", OF_LAYER, "residual_mix", NULL, Wc, dWc),
    TENSOR("dbc", OF_LAYER, "residual_mix_bias", NULL, bc, dbc)};

const double **layer_tensor_input(ref_problem *p, const layer_tensor *t)
{
    return (const double **)(void *)((char *)p + t->in_problem);
}

const double *layer_tensor_gradient(const ref_result *r, const layer_tensor *t)
{
    return *(double *const *)(const void *)((const char *)r + t->in_result);
}

const ref_pool *layer_pool_of(const ref_problem *p, int owner)
{
    return owner == OF_SHARED ? &p->shared : owner == OF_RESIDUAL ? &p->residual : &p->routed;
}

int64_t layer_tensor_shape(const ref_problem *p, const layer_tensor *t, int64_t *experts,
                           int64_t *rows, int64_t *cols)
{
    const char *name = t->parameter;
    const ref_pool *q = layer_pool_of(p, t->owner);
    int two = p->kind == MOE_GATE_HIERARCHICAL;
    *experts = *rows = 1;
    if (t->owner == OF_LAYER) {
        *rows = strcmp(name, "residual_mix") == 0 ? p->D : 1;
        *cols = strcmp(name, "shared_gate") == 0 ? p->D : 2;
    } else if (t->owner == OF_GATE) {
        *cols = p->E;
        if (strstr(name, "weight")) *rows = p->gate_D;
        if (strstr(name, "primary")) *cols = p->expert_groups;
        if (two && *cols == p->E && *rows == p->gate_D && !strstr(name, "primary"))
            *experts = p->expert_groups, *cols = p->E / p->expert_groups;
    } else {
        *experts = q->E;
        *cols = name[1] == '2' ? p->O : q->F;
        if (name[0] == 'w') *rows = name[1] == '2' ? q->F : p->D;
    }
    return *experts * *rows * *cols;
}

/* ---- where they are -------------------------------------------------------------------------- */

/* Objects by owner; NULL where the run has none. */
static moe_experts *pool_of(const layer_run *r, int owner)
{
    return owner == OF_ROUTED ? r->experts : owner == OF_SHARED ? r->shared : r->residual;
}

static int64_t find(const layer_run *r, int owner, const char *name)
{
    if (owner == OF_GATE) return moe_gate_parameter_find(r->gate, name);
    if (owner == OF_LAYER) return moe_layer_parameter_find(r->layer, name);
    return moe_experts_parameter_find(pool_of(r, owner), name);
}

static void describe(const layer_run *r, int owner, int64_t index, moe_parameter_record *record)
{
    MUST(moe_parameter_record_init(record, sizeof *record));
    MUST(owner == OF_GATE    ? moe_gate_parameter(r->gate, index, record)
         : owner == OF_LAYER ? moe_layer_parameter(r->layer, index, record)
                             : moe_experts_parameter(pool_of(r, owner), index, record));
}

/* A tensor of the reference in a parameter's record. */
typedef struct place {
    moe_parameter_record record;
    int found, out_in, by_expert;
    int64_t experts, rows, cols, first, step;
} place;

static place place_of(const layer_run *r, const layer_tensor *t)
{
    place p = {.step = 1, .by_expert = t->owner != OF_GATE && t->owner != OF_LAYER};
    int64_t index = find(r, t->owner, t->parameter);
    int up = t->parameter[1] == '3', glu_order = r->c->glu_order;
    (void)layer_tensor_shape(&r->c->p, t, &p.experts, &p.rows, &p.cols);
    p.out_in = p.by_expert && t->parameter[0] == 'w' && r->c->layout == MOE_WEIGHT_OUT_IN;
    if (index < 0 && t->fused) {
        index = find(r, t->owner, t->fused);
        if (glu_order == MOE_GLU_INTERLEAVED) p.step = 2, p.first = up;
        if (glu_order == MOE_GLU_GATE_UP) p.first = up ? p.cols : 0;
        if (glu_order == MOE_GLU_UP_GATE) p.first = up ? 0 : p.cols;
    }
    p.found = index >= 0;
    if (p.found) describe(r, t->owner, index, &p.record);
    return p;
}

/* Element (e,i,j) in the parameter's data or gradient; NULL without one. */
static char *element_of(const place *p, int gradient, int64_t e, int64_t i, int64_t j)
{
    const moe_parameter_record *record = &p->record;
    const int64_t *s = gradient ? record->grad_stride : record->data_stride;
    void *const *each = gradient ? record->grad_per_expert : record->data_per_expert;
    char *base = each ? each[e] : gradient ? record->grad : record->data;
    int64_t column = p->first + j * p->step, at = each ? 0 : e * s[0];
    if (!base) return NULL;
    if (record->dims == 1)
        at = column * s[0];
    else if (record->dims == 2 && !p->by_expert)
        at = i * s[0] + column * s[1];
    else if (record->dims == 2)
        at += column * s[1];
    else
        at += p->out_in ? column * s[1] + i * s[2] : i * s[1] + column * s[2];
    return base + at * (int64_t)number_bytes(gradient ? record->grad_dtype : record->data_dtype);
}

void layer_run_set_parameters(layer_run *r, const ref_problem *p)
{
    for (int k = 0; k < LAYER_TENSORS; k++) {
        place at = place_of(r, &layer_tensors[k]);
        const double *from = *layer_tensor_input((ref_problem *)(uintptr_t)p, &layer_tensors[k]);
        if (!at.found) continue;
        ck_assert_ptr_nonnull(from);
        for (int64_t e = 0; e < at.experts; e++)
            for (int64_t i = 0; i < at.rows; i++)
                for (int64_t j = 0; j < at.cols; j++)
                    number_set(element_of(&at, 0, e, i, j), 0, at.record.data_dtype,
                               from[(e * at.rows + i) * at.cols + j]);
    }
    moe_experts *pools[] = {r->experts, r->shared, r->residual};
    for (int i = 0; i < 3; i++)
        if (pools[i]) MUST(moe_experts_weights_changed(pools[i]));
}

double *layer_run_gradient(const layer_run *r, const char *name, int64_t *count)
{
    const layer_tensor *t = layer_tensors;
    while (strcmp(t->name, name) != 0) ck_assert_ptr_ne(++t, layer_tensors + LAYER_TENSORS);
    place p = place_of(r, t);
    *count = p.found ? p.experts * p.rows * p.cols : 0;
    double *to = calloc((size_t)*count + 1, sizeof *to);
    ck_assert_ptr_nonnull(to);
    for (int64_t n = 0; n < *count; n++) {
        const char *from = element_of(&p, 1, n / p.cols / p.rows, n / p.cols % p.rows, n % p.cols);
        to[n] = from ? number_at(from, 0, p.record.grad_dtype) : (double)NAN;
    }
    return to;
}

uint64_t layer_run_hash(const layer_run *r)
{
    const ref_problem *p = &r->c->p;
    const void *outputs[] = {r->y, r->dx, r->d_gate_x, r->d_logits};
    const int64_t counts[] = {p->T * p->O, p->T * p->D, p->T * p->gate_D, p->T * p->E};
    uint64_t hash = 0xcbf29ce484222325u;
    for (int i = 0; i < 4; i++)
        for (size_t b = 0; b < (size_t)counts[i] * number_bytes(i == 3 ? r->real : r->dtype); b++)
            hash = (hash ^ ((const unsigned char *)outputs[i])[b]) * 0x100000001b3u;
    for (int i = 0; i < LAYER_TENSORS; i++) {
        int64_t count;
        double *gradient = layer_run_gradient(r, layer_tensors[i].name, &count);
        for (size_t b = 0; b < (size_t)count * sizeof *gradient; b++)
            hash = (hash ^ ((const unsigned char *)gradient)[b]) * 0x100000001b3u;
        free(gradient);
    }
    return hash;
}

/* ---- binding --------------------------------------------------------------------------------- */

/* Odd strides for a shape: data transposed with gaps, gradients with gaps and one dimension
 * backwards.
 * Returns the number of elements and, in *first, where element 0 lies. */
static int64_t odd_strides(const int64_t *shape, int dims, int gradient, int64_t *stride,
                           int64_t *first)
{
    int64_t last = shape[dims - 1], before = dims > 1 ? shape[dims - 2] : 1;
    *first = 0;
    if (dims == 1) {
        stride[0] = gradient ? -2 : 3;
        if (gradient) *first = 2 * (last - 1);
        return 3 * last;
    }
    stride[dims - 1] = gradient ? 2 : before + 1;
    stride[dims - 2] = gradient ? -(2 * last + 1) : 1;
    if (gradient) *first = (2 * last + 1) * (before - 1);
    int64_t matrix = gradient ? (2 * last + 1) * before + 3 : (before + 1) * last + 2;
    if (dims == 3) stride[0] = matrix;
    return dims == 3 ? shape[0] * matrix : matrix;
}

static char *patterned(int64_t count, int32_t dtype)
{
    size_t bytes = (size_t)count * number_bytes(dtype);
    char *memory = malloc(bytes + 1);
    ck_assert_ptr_nonnull(memory);
    memset(memory, PATTERN, bytes);
    return memory;
}

static void bind_strided(const moe_parameter_record *record, bound_memory *m, moe_binding *b)
{
    int64_t first;
    m->data_element = number_bytes(b->data_dtype), m->grad_element = number_bytes(b->grad_dtype);
    m->data_count = odd_strides(record->shape, record->dims, 0, b->data_stride, &first);
    m->data = patterned(m->data_count, b->data_dtype);
    b->data = m->data + first * (int64_t)m->data_element;
    if (!record->trainable) return;
    m->grad_count = odd_strides(record->shape, record->dims, 1, b->grad_stride, &first);
    m->grad = patterned(m->grad_count, b->grad_dtype);
    b->grad = m->grad + first * (int64_t)m->grad_element;
}

/* Each expert's part by itself; the gradient of expert 1 is not wanted. */
static void bind_each(const moe_parameter_record *record, bound_memory *m, moe_binding *b)
{
    int64_t count = record->element_count / record->shape[0];
    ck_assert_int_le(record->shape[0], 16);
    for (int64_t e = 0; e < record->shape[0]; e++) {
        m->data_each[e] = patterned(count, b->data_dtype);
        m->grad_each[e] = e == 1 ? NULL : patterned(count, b->grad_dtype);
    }
    b->data_per_expert = (const void *const *)m->data_each;
    b->grad_per_expert = m->grad_each;
}

/* The parameter of a tensor that the run has memory for by itself: not the second half of a fused
 * one. Returns its index, or -1. */
static int64_t index_of(const layer_run *r, const layer_tensor *t)
{
    int64_t index = find(r, t->owner, t->parameter);
    return index >= 0 || !t->fused || t->parameter[1] == '3' ? index : find(r, t->owner, t->fused);
}

static void bind_one(layer_run *r, const layer_tensor *t, int64_t index, bound_memory *m)
{
    moe_parameter_record record;
    moe_binding b;
    int of_pool = t->owner != OF_GATE && t->owner != OF_LAYER;
    describe(r, t->owner, index, &record);
    MUST(moe_binding_init(&b, sizeof b));
    b.data_dtype = record.data_dtype; /* f32 of a 16-bit gate's buffer */
    b.grad_dtype = r->c->half_gradients ? r->dtype : r->real;
    if (r->c->bound == 2 && of_pool)
        bind_each(&record, m, &b);
    else
        bind_strided(&record, m, &b);
    MUST(t->owner == OF_GATE    ? moe_gate_bind(r->gate, index, &b)
         : t->owner == OF_LAYER ? moe_layer_bind(r->layer, index, &b)
                                : moe_experts_bind(pool_of(r, t->owner), index, &b));
}

void layer_run_bind(layer_run *r)
{
    for (int k = 0; k < LAYER_TENSORS; k++) {
        int64_t index = index_of(r, &layer_tensors[k]);
        if (index >= 0) bind_one(r, &layer_tensors[k], index, &r->bound[k]);
    }
    if (r->layer) {
        MUST(moe_layer_zero_gradients(r->layer, NULL));
        return;
    }
    if (r->gate) MUST(moe_gate_zero_gradients(r->gate, NULL));
    if (r->experts) MUST(moe_experts_zero_gradients(r->experts, NULL));
}

/* ---- gaps ------------------------------------------------------------------------------------ */

/* Elements of bound gradients that belong to no element of the parameter must keep their
 * pattern. */
static int gaps_broken(const moe_parameter_record *record, const bound_memory *m)
{
    size_t element = m->grad_element;
    char *used = calloc((size_t)m->grad_count + 1, 1);
    int broken = 0;
    ck_assert_ptr_nonnull(used);
    int64_t zero = ((char *)record->grad - m->grad) / (int64_t)element;
    for (int64_t n = 0; n < record->element_count; n++) {
        int64_t rest = n, at = zero;
        for (int d = record->dims - 1; d >= 0; d--) {
            at += rest % record->shape[d] * record->grad_stride[d];
            rest /= record->shape[d];
        }
        used[at] = 1;
    }
    for (int64_t i = 0; i < m->grad_count; i++)
        for (size_t b = 0; b < element && !used[i]; b++)
            broken |= m->grad[(size_t)i * element + b] != PATTERN;
    free(used);
    return broken;
}

const char *layer_run_check_gaps(const layer_run *r)
{
    static char failure[64];
    for (int k = 0; k < LAYER_TENSORS && r->c->bound; k++) {
        moe_parameter_record record;
        int64_t index = index_of(r, &layer_tensors[k]);
        if (index < 0 || !r->bound[k].grad) continue;
        describe(r, layer_tensors[k].owner, index, &record);
        if (!gaps_broken(&record, &r->bound[k])) continue;
        (void)snprintf(failure, sizeof failure, "gradient of %s: written between its elements",
                       record.name);
        return failure;
    }
    return "";
}
