/* layer_parameters.c - the parameters of a run: owned, or bound to odd strides or to a pointer for
 * each expert; written and read in the reference's order whatever the layout. */
#include "support/layer_case.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PATTERN = 0x5a };

/* A tensor of the reference: [E,rows,cols] of a pool, or [rows,cols] of a gate (experts = 1). */
typedef struct place {
    moe_parameter_record record;
    int found, out_in;
    int64_t experts, rows, cols, first, step;
} place;

static void find_parameter(const layer_run *r, const char *name, moe_parameter_record *record,
                           int *found)
{
    int64_t of_gate = moe_gate_parameter_find(r->gate, name);
    int64_t of_pool = moe_experts_parameter_find(r->experts, name);
    MUST(moe_parameter_record_init(record, sizeof *record));
    *found = of_gate >= 0 || of_pool >= 0;
    if (of_gate >= 0) MUST(moe_gate_parameter(r->gate, of_gate, record));
    if (of_pool >= 0) MUST(moe_experts_parameter(r->experts, of_pool, record));
}

static place pool_place(const layer_run *r, const char *name, const char *fused, int up,
                        int64_t rows, int64_t cols, int is_bias)
{
    place p = {.experts = r->c->E, .rows = rows, .cols = cols, .step = 1};
    find_parameter(r, name, &p.record, &p.found);
    p.out_in = r->c->layout == MOE_WEIGHT_OUT_IN && !is_bias;
    if (p.found || !fused) return p;
    find_parameter(r, fused, &p.record, &p.found);
    if (r->c->glu_order == MOE_GLU_INTERLEAVED) p.step = 2, p.first = up;
    if (r->c->glu_order == MOE_GLU_GATE_UP) p.first = up ? cols : 0;
    if (r->c->glu_order == MOE_GLU_UP_GATE) p.first = up ? 0 : cols;
    return p;
}

static place place_of(const layer_run *r, const char *name)
{
    const layer_case *c = r->c;
    place p = {.experts = 1, .rows = c->p.gate_D, .cols = c->E, .step = 1};
    if (strcmp(name, "dW1") == 0) return pool_place(r, "w1", "w13", 0, c->D, c->F, 0);
    if (strcmp(name, "dW3") == 0) return pool_place(r, "w3", "w13", 1, c->D, c->F, 0);
    if (strcmp(name, "dW2") == 0) return pool_place(r, "w2", NULL, 0, c->F, c->p.O, 0);
    if (strcmp(name, "db1") == 0) return pool_place(r, "b1", "b13", 0, 1, c->F, 1);
    if (strcmp(name, "db3") == 0) return pool_place(r, "b3", "b13", 1, 1, c->F, 1);
    if (strcmp(name, "db2") == 0) return pool_place(r, "b2", NULL, 0, 1, c->p.O, 1);
    if (strcmp(name, "dbg") == 0) p.rows = 1;
    find_parameter(r,
                   strcmp(name, "dWg") == 0   ? "weight"
                   : strcmp(name, "dbg") == 0 ? "bias"
                                              : "noise_weight",
                   &p.record, &p.found);
    return p;
}

/* Element (e,i,j) in the parameter's data or gradient; NULL without one. */
static char *element_of(const layer_run *r, const place *p, int gradient, int64_t e, int64_t i,
                        int64_t j)
{
    const moe_parameter_record *record = &p->record;
    const int64_t *s = gradient ? record->grad_stride : record->data_stride;
    void *const *each = gradient ? record->grad_per_expert : record->data_per_expert;
    char *base = each ? each[e] : gradient ? record->grad : record->data;
    int64_t column = p->first + j * p->step, at = each ? 0 : e * s[0];
    if (!base) return NULL;
    if (record->dims == 1)
        at = column * s[0];
    else if (record->sharding == MOE_SHARD_REPLICATED)
        at = i * s[0] + column * s[1];
    else if (record->dims == 2)
        at += column * s[1];
    else
        at += p->out_in ? column * s[1] + i * s[2] : i * s[1] + column * s[2];
    return base + at * (int64_t)layer_run_element(r);
}

static void set_parameter(layer_run *r, const char *name, const double *from)
{
    place p = place_of(r, name);
    if (!p.found) return;
    ck_assert_ptr_nonnull(from);
    for (int64_t e = 0; e < p.experts; e++)
        for (int64_t i = 0; i < p.rows; i++)
            for (int64_t j = 0; j < p.cols; j++)
                layer_run_set(r, element_of(r, &p, 0, e, i, j), 0,
                              from[(e * p.rows + i) * p.cols + j]);
}

void layer_run_set_parameters(layer_run *r, const ref_problem *p)
{
    set_parameter(r, "dWg", p->Wg), set_parameter(r, "dbg", p->bg), set_parameter(r, "dWn", p->Wn);
    set_parameter(r, "dW1", p->W1), set_parameter(r, "dW3", p->W3), set_parameter(r, "dW2", p->W2);
    set_parameter(r, "db1", p->b1), set_parameter(r, "db3", p->b3), set_parameter(r, "db2", p->b2);
}

double *layer_run_gradient(const layer_run *r, const char *name, int64_t *count)
{
    place p = place_of(r, name);
    *count = p.found ? p.experts * p.rows * p.cols : 0;
    double *to = calloc((size_t)*count + 1, sizeof *to);
    ck_assert_ptr_nonnull(to);
    for (int64_t n = 0; n < *count; n++) {
        const char *from = element_of(r, &p, 1, n / p.cols / p.rows, n / p.cols % p.rows,
                                      n % p.cols);
        to[n] = from ? layer_run_at(r, from, 0) : (double)NAN;
    }
    return to;
}

uint64_t layer_run_hash(const layer_run *r)
{
    static const char *const names[] = {"dWg", "dbg", "dWn", "dW1", "db1",
                                        "dW3", "db3", "dW2", "db2"};
    const ref_problem *p = &r->c->p;
    const void *outputs[] = {r->y, r->dx, r->d_gate_x, r->d_logits};
    const int64_t counts[] = {p->T * p->O, p->T * p->D, p->T * p->gate_D, p->T * p->E};
    uint64_t hash = 0xcbf29ce484222325u;
    for (int i = 0; i < 4; i++)
        for (size_t b = 0; b < (size_t)counts[i] * layer_run_element(r); b++)
            hash = (hash ^ ((const unsigned char *)outputs[i])[b]) * 0x100000001b3u;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        int64_t count;
        double *gradient = layer_run_gradient(r, names[i], &count);
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

static char *patterned(const layer_run *r, int64_t count)
{
    size_t bytes = (size_t)count * layer_run_element(r);
    char *memory = malloc(bytes + 1);
    ck_assert_ptr_nonnull(memory);
    memset(memory, PATTERN, bytes);
    return memory;
}

static void bind_strided(layer_run *r, const moe_parameter_record *record, bound_memory *m,
                         moe_binding *b)
{
    int64_t element = (int64_t)layer_run_element(r), first;
    m->data_count = odd_strides(record->shape, record->dims, 0, b->data_stride, &first);
    m->data = patterned(r, m->data_count);
    b->data = m->data + first * element;
    m->grad_count = odd_strides(record->shape, record->dims, 1, b->grad_stride, &first);
    m->grad = patterned(r, m->grad_count);
    b->grad = m->grad + first * element;
}

/* Each expert's part by itself; the gradient of expert 1 is not wanted. */
static void bind_each(layer_run *r, const moe_parameter_record *record, bound_memory *m,
                      moe_binding *b)
{
    int64_t count = record->element_count / record->shape[0];
    ck_assert_int_le(record->shape[0], 16);
    for (int64_t e = 0; e < record->shape[0]; e++) {
        m->data_each[e] = patterned(r, count);
        m->grad_each[e] = e == 1 ? NULL : patterned(r, count);
    }
    b->data_per_expert = (const void *const *)m->data_each;
    b->grad_per_expert = m->grad_each;
}

static void bind_one(layer_run *r, int of_gate, int64_t index, bound_memory *m)
{
    moe_parameter_record record;
    moe_binding b;
    MUST(moe_parameter_record_init(&record, sizeof record));
    MUST(of_gate ? moe_gate_parameter(r->gate, index, &record)
                 : moe_experts_parameter(r->experts, index, &record));
    MUST(moe_binding_init(&b, sizeof b));
    b.data_dtype = b.grad_dtype = r->dtype;
    if (r->c->bound == 2 && !of_gate)
        bind_each(r, &record, m, &b);
    else
        bind_strided(r, &record, m, &b);
    MUST(of_gate ? moe_gate_bind(r->gate, index, &b) : moe_experts_bind(r->experts, index, &b));
}

void layer_run_bind(layer_run *r)
{
    int used = 0;
    for (int64_t i = 0; i < moe_gate_parameter_count(r->gate); i++)
        bind_one(r, 1, i, &r->bound[used++]);
    for (int64_t i = 0; i < moe_experts_parameter_count(r->experts); i++)
        bind_one(r, 0, i, &r->bound[used++]);
    if (r->gate) MUST(moe_gate_zero_gradients(r->gate, NULL));
    if (r->experts) MUST(moe_experts_zero_gradients(r->experts, NULL));
}

/* ---- gaps ------------------------------------------------------------------------------------ */

/* Elements of bound gradients that belong to no element of the parameter must keep their
 * pattern. */
static int gaps_broken(const layer_run *r, const moe_parameter_record *record,
                       const bound_memory *m)
{
    size_t element = layer_run_element(r);
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
    int used = 0;
    moe_parameter_record record;
    static char failure[64];
    MUST(moe_parameter_record_init(&record, sizeof record));
    int64_t of_gate = moe_gate_parameter_count(r->gate),
            count = of_gate + moe_experts_parameter_count(r->experts);
    for (int64_t i = 0; i < count && r->c->bound; i++, used++) {
        MUST(i < of_gate ? moe_gate_parameter(r->gate, i, &record)
                         : moe_experts_parameter(r->experts, i - of_gate, &record));
        if (!r->bound[used].grad || !gaps_broken(r, &record, &r->bound[used])) continue;
        (void)snprintf(failure, sizeof failure, "gradient of %s: written between its elements",
                       record.name);
        return failure;
    }
    return "";
}
