/* pool_model_library.c - the library's objects for a pool_model, its parameters and gradients in
 * the model's order, and the host's experts. */
#include "support/layer_case.h"
#include "support/pool_model.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

/* ---- elements -------------------------------------------------------------------------------- */

static double get(int32_t dtype, const void *data, int64_t i)
{
    return dtype == MOE_DTYPE_F64 ? ((const double *)data)[i] : (double)((const float *)data)[i];
}
static void put(int32_t dtype, void *data, int64_t i, double value)
{
    if (dtype == MOE_DTYPE_F64)
        ((double *)data)[i] = value;
    else
        ((float *)data)[i] = (float)value;
}

double pool_model_at(const pool_model *m, const void *data, int64_t i)
{
    return get(m->dtype, data, i);
}
void pool_model_put(const pool_model *m, void *data, int64_t i, double value)
{
    put(m->dtype, data, i, value);
}
size_t pool_model_element(const pool_model *m) { return m->dtype == MOE_DTYPE_F64 ? 8 : 4; }

int64_t pool_model_elements(const model_part *p, int which)
{
    switch (which) {
    case MODEL_W1:
    case MODEL_W3: return p->E * p->D * p->F;
    case MODEL_B1:
    case MODEL_B3: return p->E * p->F;
    case MODEL_W2: return p->E * p->F * p->O;
    default: return p->E * p->O;
    }
}

/* ---- the host's experts ---------------------------------------------------------------------- */

/* z = x W1 + b1 of a row is kept in the workspace, F doubles; ReLU only. */
static int check_call(model_part *p, const moe_expert_call *c)
{
    p->calls++;
    if (c->struct_size != sizeof *c || c->rows < 1 || c->expert < 0 || c->expert >= p->E || !c->x ||
        !c->out || !c->workspace || (uintptr_t)c->workspace % 8 != 0)
        p->wrong++;
    if (p->ordered && c->expert <= p->last_expert) p->wrong++;
    if (p->ordered && p->last_expert < 0 && (uintptr_t)c->workspace % 64 != 0) p->wrong++;
    p->last_expert = c->expert;
    return c->expert == p->fail_expert ? p->fail_with : 0;
}

/* Lets a NaN through. */
static double relu(double z) { return z < 0 ? 0 : z; }

static int32_t host_forward(void *user, const moe_expert_call *c)
{
    model_part *p = user;
    int failure = check_call(p, c);
    const double *w1 = p->p[MODEL_W1] + c->expert * p->D * p->F;
    const double *w2 = p->p[MODEL_W2] + c->expert * p->F * p->O;
    if (c->dout || c->dx) p->wrong++;
    for (int64_t r = 0; r < c->rows; r++) {
        double *z = (double *)c->workspace + r * p->F;
        for (int64_t j = 0; j < p->F; j++) {
            z[j] = p->bias ? p->p[MODEL_B1][c->expert * p->F + j] : 0;
            for (int64_t i = 0; i < p->D; i++)
                z[j] += get(c->dtype, c->x, r * p->D + i) * w1[i * p->F + j];
        }
        for (int64_t o = 0; o < p->O; o++) {
            double sum = p->bias ? p->p[MODEL_B2][c->expert * p->O + o] : 0;
            for (int64_t j = 0; j < p->F; j++) sum += relu(z[j]) * w2[j * p->O + o];
            put(c->dtype, c->out, r * p->O + o, sum);
        }
    }
    return p->fail_backward ? 0 : failure;
}

static void host_row_backward(model_part *p, const moe_expert_call *c, int64_t r)
{
    const double *z = (const double *)c->workspace + r * p->F;
    int64_t e = c->expert;
    for (int64_t j = 0; j < p->F; j++) {
        double dz = 0;
        for (int64_t o = 0; o < p->O; o++) {
            double d = get(c->dtype, c->dout, r * p->O + o);
            int64_t at = (e * p->F + j) * p->O + o;
            if (z[j] > 0) dz += d * p->p[MODEL_W2][at];
            if (c->parameters) p->host_d[MODEL_W2][at] += d * relu(z[j]);
            if (c->parameters && p->bias && j == 0) p->host_d[MODEL_B2][e * p->O + o] += d;
        }
        if (c->parameters && p->bias) p->host_d[MODEL_B1][e * p->F + j] += dz;
        for (int64_t i = 0; i < p->D; i++) {
            int64_t at = (e * p->D + i) * p->F + j;
            double before = c->dx && j > 0 ? get(c->dtype, c->dx, r * p->D + i) : 0;
            if (c->parameters) p->host_d[MODEL_W1][at] += dz * get(c->dtype, c->x, r * p->D + i);
            if (c->dx) put(c->dtype, c->dx, r * p->D + i, before + dz * p->p[MODEL_W1][at]);
        }
    }
}

static int32_t host_backward(void *user, const moe_expert_call *c)
{
    model_part *p = user;
    int failure = check_call(p, c);
    if (!c->dout) p->wrong++;
    p->parameters_seen = c->parameters, p->dx_seen = c->dx != NULL;
    if (p->during) p->during(p->during_argument);
    for (int64_t r = 0; r < c->rows; r++) host_row_backward(p, c, r);
    return failure;
}

static void set_ordered(pool_model *m, int ordered)
{
    for (int i = 0; i < m->parts; i++) {
        m->part[i].ordered = ordered;
        m->part[i].last_expert = -1;
        m->part[i].calls = ordered ? 0 : m->part[i].calls;
    }
}

moe_status pool_model_forward(pool_model *m)
{
    set_ordered(m, 1);
    moe_status status = moe_experts_forward(m->pool, m->pass, &m->f);
    set_ordered(m, 0);
    return status;
}

moe_status pool_model_backward(pool_model *m)
{
    set_ordered(m, 1);
    moe_status status = moe_experts_backward(m->pool, m->pass, &m->b);
    set_ordered(m, 0);
    return status;
}

/* ---- objects --------------------------------------------------------------------------------- */

moe_experts_config pool_model_config(const pool_model *m, model_part *p,
                                     moe_expert_callbacks *callbacks)
{
    moe_experts_config c;
    MUST(moe_experts_config_init(&c, sizeof c));
    MUST(moe_expert_callbacks_init(callbacks, sizeof *callbacks));
    callbacks->user = p, callbacks->forward = host_forward, callbacks->backward = host_backward;
    callbacks->workspace_per_row = p->F * (int64_t)sizeof(double);
    c.d_model = m->D, c.d_out = m->O, c.num_experts = p->E, c.kind = p->kind, c.dtype = m->dtype;
    if (p->kind == MOE_EXPERTS_CALLBACK) c.callbacks = callbacks;
    if (p->kind != MOE_EXPERTS_FEED_FORWARD) return c;
    c.d_hidden = p->F, c.activation = p->activation, c.bias = p->bias, c.glu_order = p->glu_order;
    c.weight_layout = p->layout, c.weight_position = p->position, c.output = p->sigmoid;
    c.activation_alpha = p->alpha, c.activation_limit = p->limit, c.activation_offset = p->offset;
    return c;
}

/* Where element (i, j) of a logical [in,out] or [out] parameter lies in the library's: its name,
 * and the number within the expert. */
static const char *place(const model_part *p, int which, int64_t i, int64_t j, int64_t *at)
{
    static const char *const names[] = {"w1", "b1", "w3", "b3", "w2", "b2"};
    int64_t in = which == MODEL_W2 ? p->F : p->D, out = which >= MODEL_W2 ? p->O : p->F;
    int fused = p->glu_order != MOE_GLU_SEPARATE && which < MODEL_W2;
    int up = which == MODEL_W3 || which == MODEL_B3, vector = which % 2 == 1;
    if (fused) {
        j = p->glu_order == MOE_GLU_INTERLEAVED       ? 2 * j + up
            : up == (p->glu_order == MOE_GLU_GATE_UP) ? j + out
                                                      : j;
        out = 2 * out;
    }
    *at = vector ? j : p->layout == MOE_WEIGHT_OUT_IN ? j * in + i : i * out + j;
    return !fused ? names[which] : vector ? "b13" : "w13";
}

/* Copies between the model's order and the library's data or gradient. */
static void transfer(const model_part *p, int which, double *model, int gradient, int to_library)
{
    moe_parameter_record r;
    int vector = which % 2 == 1;
    int64_t in = vector ? 1 : which == MODEL_W2 ? p->F : p->D, at;
    int64_t out = which >= MODEL_W2 ? p->O : p->F;
    MUST(moe_parameter_record_init(&r, sizeof r));
    int64_t index = moe_experts_parameter_find(p->pool, place(p, which, 0, 0, &at));
    ck_assert_int_ge(index, 0);
    MUST(moe_experts_parameter(p->pool, index, &r));
    void *data = gradient ? r.grad : r.data;
    for (int64_t e = 0; e < p->E; e++)
        for (int64_t i = 0; i < in; i++)
            for (int64_t j = 0; j < out; j++, model++) {
                (void)place(p, which, i, j, &at);
                at += e * (r.element_count / p->E);
                if (to_library)
                    put(r.data_dtype, data, at, *model);
                else
                    *model = get(r.data_dtype, data, at);
            }
}

void pool_model_set_parameters(const model_part *p)
{
    for (int w = 0; w < MODEL_PARAMETERS; w++)
        if (p->kind == MOE_EXPERTS_FEED_FORWARD && p->p[w]) transfer(p, w, p->p[w], 0, 1);
}

double *pool_model_gradient(const model_part *p, int which, int64_t *count)
{
    *count = pool_model_elements(p, which);
    double *to = calloc((size_t)*count + 1, sizeof *to);
    ck_assert_ptr_nonnull(to);
    if (p->kind == MOE_EXPERTS_CALLBACK)
        memcpy(to, p->host_d[which], (size_t)*count * sizeof *to);
    else
        transfer(p, which, to, 1, 0);
    return to;
}

/* Numbers that the dtype holds exactly. */
static double *drawn(const pool_model *m, int64_t count, double scale, uint64_t *state)
{
    double *to = calloc((size_t)count + 1, sizeof *to);
    ck_assert_ptr_nonnull(to);
    for (int64_t i = 0; i < count; i++) {
        to[i] = scale * random_normal(state);
        if (m->dtype == MOE_DTYPE_F32) to[i] = (double)(float)to[i];
    }
    return to;
}

static void make_part(pool_model *m, model_part *p, uint64_t *state)
{
    moe_expert_callbacks callbacks;
    p->D = m->D, p->O = m->O, p->fail_expert = -1, p->last_expert = -1;
    moe_experts_config c = pool_model_config(m, p, &callbacks);
    MUST(moe_experts_create(&p->pool, m->context, &c));
    for (int w = 0; w < MODEL_PARAMETERS && p->kind != MOE_EXPERTS_IDENTITY; w++) {
        int up = w == MODEL_W3 || w == MODEL_B3;
        if ((w % 2 == 1 && !p->bias) || (up && p->activation < MOE_ACTIVATION_SWIGLU)) continue;
        p->p[w] = drawn(m, pool_model_elements(p, w), w % 2 ? 0.5 : 0.4, state);
        p->d[w] = calloc((size_t)pool_model_elements(p, w) + 1, sizeof(double));
        p->host_d[w] = calloc((size_t)pool_model_elements(p, w) + 1, sizeof(double));
        ck_assert(p->d[w] && p->host_d[w]);
    }
    pool_model_set_parameters(p);
    m->E += p->E;
}

static void *narrowed(const pool_model *m, const double *from, int64_t count)
{
    void *to = calloc((size_t)count + 1, pool_model_element(m));
    ck_assert_ptr_nonnull(to);
    for (int64_t i = 0; from && i < count; i++) pool_model_put(m, to, i, from[i]);
    return to;
}

static void make_plan(pool_model *m)
{
    moe_plan_args a;
    void *w = narrowed(m, m->w, m->T * m->K);
    MUST(moe_plan_args_init(&a, sizeof a));
    a.tokens = m->T, a.num_experts = m->E, a.top_k = m->K, a.expert_ids = m->ids, a.weights = w;
    a.dtype = m->dtype;
    MUST(moe_plan_create(&m->plan, m->context));
    MUST(moe_plan_build(m->plan, &a));
    free(w);
}

void pool_model_make(pool_model *m, moe_context *context, uint64_t seed)
{
    moe_experts *parts[MOE_MAX_PARTS];
    int64_t N = m->T * m->K;
    m->E = 0, m->context = context;
    if (!context) {
        moe_context_config k;
        MUST(moe_context_config_init(&k, sizeof k));
        k.threads = 2;
        MUST(moe_context_create(&m->context, &k));
    }
    for (int i = 0; i < m->parts; i++) make_part(m, &m->part[i], &seed);
    for (int i = 0; i < m->parts; i++) parts[i] = m->part[i].pool;
    m->pool = parts[0];
    if (m->whole || m->parts > 1) MUST(moe_experts_create_parts(&m->pool, parts, m->parts));
    m->ids = calloc((size_t)N + 1, sizeof *m->ids);
    m->w = drawn(m, N, 1, &seed), m->dw = drawn(m, N, 0, &seed);
    m->x = drawn(m, m->T * m->D, 1, &seed), m->dx = drawn(m, m->T * m->D, 0, &seed);
    m->dy = drawn(m, m->T * m->O, 1, &seed), m->y = drawn(m, m->T * m->O, 0, &seed);
    /* Expert 0 gets none, and one entry in eight has no expert. */
    for (int64_t n = 0; n < N; n++) {
        int64_t e = (int64_t)(random_uniform(&seed) * (double)m->E);
        m->ids[n] = random_uniform(&seed) < 0.125 ? -1 : e == 0 ? (int32_t)m->E - 1 : (int32_t)e;
    }
    make_plan(m);
    MUST(moe_pass_create_for_experts(&m->pass, m->pool, NULL));
    m->lib_x = narrowed(m, m->x, m->T * m->D), m->lib_dx = narrowed(m, NULL, m->T * m->D);
    m->lib_y = narrowed(m, NULL, m->T * m->O), m->lib_dy = narrowed(m, m->dy, m->T * m->O);
    m->lib_dw = narrowed(m, NULL, N);
    MUST(moe_forward_args_init(&m->f, sizeof m->f));
    m->f.tokens = m->T, m->f.x = m->lib_x, m->f.y = m->lib_y, m->f.plan = m->plan;
    MUST(moe_backward_args_init(&m->b, sizeof m->b));
    m->b.dy = m->lib_dy, m->b.dx = m->lib_dx, m->b.entry_weight_grad = m->lib_dw;
}

void pool_model_free(pool_model *m)
{
    void *memory[] = {m->ids, m->w,     m->dw,    m->x,      m->dx,     m->dy,
                      m->y,   m->lib_x, m->lib_y, m->lib_dx, m->lib_dy, m->lib_dw};
    for (size_t i = 0; i < COUNT(memory); i++) free(memory[i]);
    moe_plan_destroy(m->plan);
    for (int i = 0; i < m->parts; i++) {
        ck_assert_int_eq(m->part[i].wrong, 0);
        if (m->part[i].pool != m->pool) moe_experts_destroy(m->part[i].pool);
        for (int w = 0; w < MODEL_PARAMETERS; w++)
            free(m->part[i].p[w]), free(m->part[i].d[w]), free(m->part[i].host_d[w]);
    }
    moe_experts_destroy(m->pool);
    moe_pass_destroy(m->pass);
    moe_context_destroy(m->context);
}
