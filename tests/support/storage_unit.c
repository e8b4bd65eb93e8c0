/* storage_unit.c - pools of the storage modes: storage_unit.h. */
#include "support/storage_unit.h"

#include "reals.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const names[UNIT_TENSORS] = {"w1", "w3", "w2", "b1", "b3", "b2"};
static const char *const fused_names[UNIT_TENSORS] = {"w13", "w13", NULL, "b13", "b13", NULL};

static void *take(int64_t bytes)
{
    void *memory = NULL;
    ck_assert_int_eq(posix_memalign(&memory, 64, (size_t)bytes + 64), 0);
    memset(memory, 0, (size_t)bytes + 64);
    return memory;
}

/* In [-1,1), of few bits, so that every dtype holds it. */
static double draw(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return ((double)(*state >> 57) - 64) / 64;
}

/* ---- where things are ------------------------------------------------------------------------ */

static moe_parameter_record record_at(const storage_unit *u, int64_t index)
{
    moe_parameter_record r;
    MUST(moe_parameter_record_init(&r, sizeof r));
    MUST(moe_experts_parameter(u->pool, index, &r));
    return r;
}

/* The parameter that holds a tensor, or -1; *half: -1 all of it, 0 the gate's part, 1 the other. */
static int64_t find(const storage_unit *u, int tensor, int *half)
{
    int64_t index = moe_experts_parameter_find(u->pool, names[tensor]);
    *half = -1;
    if (index >= 0 || !fused_names[tensor]) return index;
    index = moe_experts_parameter_find(u->pool, fused_names[tensor]);
    *half = tensor == UNIT_W3 || tensor == UNIT_B3;
    /* b1 alone is of a pool that is not gated */
    return u->e.activation >= MOE_ACTIVATION_SWIGLU ? index : -1;
}

static void extent(const storage_unit *u, int tensor, int64_t *rows, int64_t *cols)
{
    bool second = tensor == UNIT_W2 || tensor == UNIT_B2;
    *rows = tensor >= UNIT_B1 ? 1 : second ? u->e.d_hidden : u->e.d_model;
    *cols = second ? u->e.d_out : u->e.d_hidden;
}

/* The place of element (e,i,j) of a tensor in its parameter's dense form. */
static int64_t place(const storage_unit *u, int tensor, int half, int64_t e, int64_t i, int64_t j)
{
    int64_t rows, cols;
    extent(u, tensor, &rows, &cols);
    if (half >= 0 && u->e.glu_order == MOE_GLU_INTERLEAVED)
        j = 2 * j + half;
    else if (half >= 0)
        j += half == (u->e.glu_order != MOE_GLU_UP_GATE) ? cols : 0;
    if (half >= 0) cols *= 2;
    bool out_in = tensor < UNIT_B1 && u->e.weight_layout == MOE_WEIGHT_OUT_IN;
    return e * rows * cols + (out_in ? j * rows + i : i * cols + j);
}

int64_t storage_unit_count(const storage_unit *u, int tensor)
{
    int half;
    int64_t rows, cols;
    extent(u, tensor, &rows, &cols);
    return find(u, tensor, &half) < 0 ? 0 : u->e.num_experts * rows * cols;
}

/* The parameter in dense memory of the test. */
static char *dense_of(const storage_unit *u, int64_t index, int32_t what, int32_t *dtype)
{
    moe_parameter_record r = record_at(u, index);
    *dtype = what == MOE_PARAMETER_DATA ? r.data_dtype : r.grad_dtype;
    char *dense = take(r.shape[0] * r.shape[1] * r.shape[2] * 8);
    MUST(moe_experts_export(u->pool, index, what, 0, r.shape[0], dense));
    return dense;
}

double *storage_unit_read(const storage_unit *u, int tensor, int32_t what)
{
    int half;
    int32_t dtype;
    int64_t index = find(u, tensor, &half), rows, cols, n = 0;
    if (index < 0) return NULL;
    extent(u, tensor, &rows, &cols);
    char *dense = dense_of(u, index, what, &dtype);
    double *values = take(u->e.num_experts * rows * cols * (int64_t)sizeof *values);
    for (int64_t e = 0; e < u->e.num_experts; e++)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < cols; j++)
                values[n++] = moe__real_at(dense, place(u, tensor, half, e, i, j), dtype);
    free(dense);
    return values;
}

/* ---- setting --------------------------------------------------------------------------------- */

/* Dense values into the bound memory of a parameter. */
static void write_bound(storage_unit *u, int64_t index, const char *dense, int64_t size)
{
    moe_parameter_record r = record_at(u, index);
    for (int64_t e = 0; e < r.shape[0]; e++)
        for (int64_t i = 0; i < r.shape[1]; i++)
            for (int64_t j = 0; j < r.shape[2]; j++, dense += size) {
                int64_t at = i * r.data_stride[1] + j * r.data_stride[2];
                char *base = r.data_per_expert ? r.data_per_expert[e]
                                               : (char *)r.data + e * r.data_stride[0] * size;
                memcpy(base + at * size, dense, (size_t)size);
            }
}

void storage_unit_write(storage_unit *u, int tensor, const double *values)
{
    int half;
    int32_t dtype;
    int64_t index = find(u, tensor, &half), rows, cols;
    extent(u, tensor, &rows, &cols);
    char *dense = dense_of(u, index, MOE_PARAMETER_DATA, &dtype);
    for (int64_t e = 0; e < u->e.num_experts; e++)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < cols; j++)
                moe__set_real(dense, place(u, tensor, half, e, i, j), dtype, *values++);
    if (u->where == UNIT_OWNED)
        MUST(moe_experts_import(u->pool, index, MOE_PARAMETER_DATA, 0, u->e.num_experts, dense));
    else
        write_bound(u, index, dense, moe__dtype_size(dtype));
    free(dense);
}

void storage_unit_draw(storage_unit *u, uint64_t seed)
{
    for (int tensor = 0; tensor < UNIT_TENSORS; tensor++) {
        int64_t count = storage_unit_count(u, tensor);
        uint64_t state = seed * 31 + (uint64_t)tensor;
        double *values = take(count * (int64_t)sizeof *values);
        for (int64_t i = 0; i < count; i++) values[i] = draw(&state) / 4;
        if (count) storage_unit_write(u, tensor, values);
        free(values);
    }
}

/* Memory with gaps for one parameter, data and gradient differently strided. */
static void bind_one(storage_unit *u, int64_t index)
{
    unit_memory *m = &u->memory[index];
    moe_parameter_record r = record_at(u, index);
    moe_binding *b = &m->binding;
    int64_t element = moe__dtype_size(u->e.dtype), real = element < 4 ? 4 : element;
    int64_t row = r.dims == 3 ? r.shape[2] + 3 : 1, expert = r.shape[1] * row + 5;
    MUST(moe_binding_init(b, sizeof *b));
    m->data = take(r.shape[0] * expert * element);
    m->grad = take(r.shape[0] * (expert + 2) * real);
    b->data_stride[0] = expert, b->grad_stride[0] = expert + 2;
    b->data_stride[1] = b->grad_stride[1] = row;
    b->data_stride[2] = b->grad_stride[2] = r.dims == 3;
    b->data_dtype = u->e.dtype, b->grad_dtype = real == 8 ? MOE_DTYPE_F64 : MOE_DTYPE_F32;
    for (int64_t e = 0; e < r.shape[0]; e++) {
        m->data_each[e] = m->data + e * expert * element;
        m->grad_each[e] = m->grad + e * (expert + 2) * real;
    }
    if (u->where == UNIT_EACH) {
        b->data_per_expert = (const void *const *)m->data_each;
        b->grad_per_expert = m->grad_each;
    } else {
        b->data = m->data, b->grad = m->grad;
    }
    MUST(moe_experts_bind(u->pool, index, b));
}

/* ---- making ---------------------------------------------------------------------------------- */

moe_experts_config storage_config(int32_t activation, int32_t storage, int32_t dtype)
{
    moe_experts_config e;
    MUST(moe_experts_config_init(&e, sizeof e));
    e.d_model = 37, e.d_hidden = 45, e.d_out = 70, e.num_experts = 4;
    e.activation = activation, e.storage = storage, e.dtype = dtype, e.bias = 1;
    return e;
}

static void make_plan(storage_unit *u, uint64_t *state)
{
    moe_plan_args a;
    int64_t n = u->T * u->K;
    int32_t *ids = take(n * 4), real = u->e.dtype == MOE_DTYPE_F64 ? MOE_DTYPE_F64 : MOE_DTYPE_F32;
    void *weights = take(n * 8);
    for (int64_t i = 0; i < n; i++) {
        /* the last expert has no rows */
        ids[i] = (int32_t)((i * i + i / 3) % (u->e.num_experts > 1 ? u->e.num_experts - 1 : 1));
        moe__set_real(weights, i, real, draw(state));
    }
    MUST(moe_plan_create(&u->plan, u->context));
    MUST(moe_plan_args_init(&a, sizeof a));
    a.tokens = u->T, a.num_experts = u->e.num_experts, a.top_k = u->K;
    a.expert_ids = ids, a.weights = weights, a.dtype = real;
    MUST(moe_plan_build(u->plan, &a));
    free(ids), free(weights);
}

static void make_batch(storage_unit *u)
{
    uint64_t state = 99;
    int64_t element = moe__dtype_size(u->e.dtype);
    u->x_bytes = u->T * u->e.d_model * element;
    u->y_bytes = u->T * u->e.d_out * element;
    u->w_bytes = u->T * u->K * (u->e.dtype == MOE_DTYPE_F64 ? 8 : 4);
    u->x = take(u->x_bytes), u->dx = take(u->x_bytes);
    u->y = take(u->y_bytes), u->dy = take(u->y_bytes), u->dw = take(u->w_bytes);
    for (int64_t i = 0; i < u->T * u->e.d_model; i++)
        moe__set_real(u->x, i, u->e.dtype, draw(&state));
    for (int64_t i = 0; i < u->T * u->e.d_out; i++)
        moe__set_real(u->dy, i, u->e.dtype, draw(&state));
    make_plan(u, &state);
    MUST(moe_forward_args_init(&u->f, sizeof u->f));
    MUST(moe_backward_args_init(&u->b, sizeof u->b));
    u->f.tokens = u->T, u->f.x = u->x, u->f.y = u->y, u->f.plan = u->plan;
    u->b.dy = u->dy, u->b.dx = u->dx, u->b.entry_weight_grad = u->dw;
}

void storage_unit_make(storage_unit *u, const moe_context_config *context,
                       const moe_experts_config *e, int32_t where, uint64_t seed)
{
    memset(u, 0, sizeof *u);
    u->e = *e, u->T = 33, u->K = 2, u->where = where;
    if (u->e.d_out == MOE_SAME) u->e.d_out = u->e.d_model;
    if (where != UNIT_OWNED) u->e.parameters = MOE_PARAMETERS_BOUND;
    MUST(moe_context_create(&u->context, context));
    MUST(moe_experts_create(&u->pool, u->context, &u->e));
    for (int64_t i = 0; where != UNIT_OWNED && i < moe_experts_parameter_count(u->pool); i++)
        bind_one(u, i);
    storage_unit_draw(u, seed);
    MUST(moe_pass_create_for_experts(&u->pass, u->pool, NULL));
    make_batch(u);
}

void storage_unit_free(storage_unit *u)
{
    moe_pass_destroy(u->pass);
    moe_plan_destroy(u->plan);
    moe_experts_destroy(u->pool);
    moe_context_destroy(u->context);
    for (int i = 0; i < UNIT_TENSORS; i++) free(u->memory[i].data), free(u->memory[i].grad);
    free(u->x), free(u->y), free(u->dy), free(u->dx), free(u->dw);
}

/* ---- running and comparing ------------------------------------------------------------------- */

void storage_unit_step(storage_unit *u, uint64_t backward_flags)
{
    memset(u->y, 0x5a, (size_t)u->y_bytes), memset(u->dx, 0x5a, (size_t)u->x_bytes);
    MUST(moe_experts_forward(u->pool, u->pass, &u->f));
    u->b.flags = backward_flags;
    MUST(moe_experts_backward(u->pool, u->pass, &u->b));
}

const char *storage_unit_compare(const storage_unit *a, const storage_unit *b, int gradients)
{
    static char text[160];
    if (memcmp(a->y, b->y, (size_t)a->y_bytes) != 0) return "y";
    if (!gradients) return "";
    if (memcmp(a->dx, b->dx, (size_t)a->x_bytes) != 0) return "dx";
    if (memcmp(a->dw, b->dw, (size_t)a->w_bytes) != 0) return "entry_weight_grad";
    for (int tensor = 0; tensor < UNIT_TENSORS; tensor++) {
        int64_t bad = -1, count = storage_unit_count(a, tensor);
        double *g = storage_unit_read(a, tensor, MOE_PARAMETER_GRADIENT);
        double *h = storage_unit_read(b, tensor, MOE_PARAMETER_GRADIENT);
        if (!g != !h) return names[tensor];
        for (int64_t i = 0; i < count && bad < 0; i++)
            if (memcmp(&g[i], &h[i], sizeof *g) != 0) bad = i;
        if (bad >= 0)
            (void)snprintf(text, sizeof text, "gradient of %s, element %lld: %.9g and %.9g",
                           names[tensor], (long long)bad, g[bad], h[bad]);
        free(g), free(h);
        if (bad >= 0) return text;
    }
    return "";
}

int64_t storage_unit_filling(const storage_unit *u)
{
    int64_t found = 0;
    for (int64_t index = 0; index < moe_experts_parameter_count(u->pool); index++) {
        moe_parameter_record r = record_at(u, index);
        int64_t logical = r.shape[0] * r.shape[1] * r.shape[2], in_shape = 0, of_grad = 0;
        if (!r.opaque) continue;
        if (r.element_count < logical) return -1;
        /* What is not 0 in the panels must be so in the dense form, and there alone. */
        int32_t dtype;
        char *dense = dense_of(u, index, MOE_PARAMETER_DATA, &dtype);
        for (int64_t i = 0; i < logical; i++) in_shape += moe__real_at(dense, i, dtype) != 0;
        for (int64_t i = 0; i < r.element_count; i++)
            in_shape -= moe__real_at(r.data, i, dtype) != 0;
        free(dense);
        if (!r.grad) return in_shape < 0 ? -in_shape : in_shape;
        dense = dense_of(u, index, MOE_PARAMETER_GRADIENT, &dtype);
        for (int64_t i = 0; i < logical; i++) of_grad += moe__real_at(dense, i, dtype) != 0;
        for (int64_t i = 0; i < r.element_count; i++)
            of_grad -= moe__real_at(r.grad, i, dtype) != 0;
        free(dense);
        found += (in_shape < 0 ? -in_shape : in_shape) + (of_grad < 0 ? -of_grad : of_grad);
    }
    return found;
}
