/* experts.c - pools of experts, and the operation of one on given rows.
 *
 * Weights are handed over in every layout and GLU order the library has; the gradients come back
 * the same way and are compared in the case's own order. */
#include "pool.h"

#include <stdio.h>
#include <string.h>

static const struct {
    const char *name;
    int32_t value;
} ACTIVATIONS[] = {
    {"relu", MOE_ACTIVATION_RELU},           {"gelu_tanh", MOE_ACTIVATION_GELU_TANH},
    {"gelu_erf", MOE_ACTIVATION_GELU_ERF},   {"silu", MOE_ACTIVATION_SILU},
    {"swiglu", MOE_ACTIVATION_SWIGLU},       {"geglu_tanh", MOE_ACTIVATION_GEGLU_TANH},
    {"geglu_erf", MOE_ACTIVATION_GEGLU_ERF}, {"reglu", MOE_ACTIVATION_REGLU}};

static int activation(run *r, int32_t *out)
{
    const char *act = case_text(r->c, "act", "relu");
    for (size_t i = 0; i < sizeof ACTIVATIONS / sizeof *ACTIVATIONS; i++)
        if (strcmp(ACTIVATIONS[i].name, act) == 0) return *out = ACTIVATIONS[i].value, 0;
    return run_fail(r, "unknown activation %s", act);
}

/* ---- layouts --------------------------------------------------------------------------------- */

/* Where column j of half h (0 gate, 1 up) lies among `width` stored columns. */
static int64_t stored_column(const storage *s, int64_t j, int half, int64_t width)
{
    switch (s->glu_order) {
    case MOE_GLU_GATE_UP: return half * (width / 2) + j;
    case MOE_GLU_UP_GATE: return (1 - half) * (width / 2) + j;
    case MOE_GLU_INTERLEAVED: return 2 * j + half;
    default: return j;
    }
}

/* Element (e,i,j) of half h in a stored [E,rows,width], or [E,width,rows] for MOE_WEIGHT_OUT_IN. */
static int64_t place(const storage *s, int64_t e, int64_t i, int64_t j, int half, int64_t rows,
                     int64_t width)
{
    int64_t column = stored_column(s, j, half, width);
    return s->layout == MOE_WEIGHT_OUT_IN ? (e * width + column) * rows + i
                                          : (e * rows + i) * width + column;
}

/* Copies a case's [E,rows,cols] into the stored form, or back (`out` set) from the gradient. rows =
 * 1 with is_bias for vectors, which the layout leaves alone. */
static void convert(run *r, pool *p, stored *to, const void *from, double *out, int64_t rows,
                    int64_t cols, int half, int64_t width, int is_bias)
{
    storage s = r->o.storage;
    if (is_bias) s.layout = MOE_WEIGHT_IN_OUT;
    if (width == cols) s.glu_order = MOE_GLU_SEPARATE;
    for (int64_t e = 0; e < p->E; e++)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < cols; j++) {
                int64_t from_at = (e * rows + i) * cols + j;
                int64_t at = place(&s, e, i, j, half, rows, width);
                if (out)
                    out[from_at] = real_at(r, to->grad, at);
                else
                    set_real(r, to->data, at, from ? real_at(r, from, from_at) : 0);
            }
}

static int fused(const run *r, const pool *p)
{
    return p->gated && r->o.storage.glu_order != MOE_GLU_SEPARATE;
}

void stored_reset(run *r, stored *s, int64_t count)
{
    s->data = run_reals(r, count);
    s->grad = run_reals(r, count);
    /* An overwriting backward must not mind what was there. */
    for (int64_t i = 0; r->o.storage.strided && i < count; i++) set_real(r, s->grad, i, 1e6);
}

/* Every tensor of the pool in the stored form, with fresh gradients. */
static void store_pool(run *r, pool *p)
{
    int64_t F = p->F, W = fused(r, p) ? 2 * F : F;
    int has_bias = p->b[1] || p->b[2] || p->b[3];
    stored *w3 = fused(r, p) ? &p->w1 : &p->w3, *b3 = fused(r, p) ? &p->b1 : &p->b3;
    stored_reset(r, &p->w1, p->E * p->D * W);
    stored_reset(r, &p->w2, p->E * F * p->O);
    if (p->gated && !fused(r, p)) stored_reset(r, &p->w3, p->E * p->D * F);
    convert(r, p, &p->w1, p->W[1], NULL, p->D, F, 0, W, 0);
    if (p->gated) convert(r, p, w3, p->W[3], NULL, p->D, F, 1, W, 0);
    convert(r, p, &p->w2, p->W[2], NULL, F, p->O, 0, p->O, 0);
    if (!has_bias) return;
    stored_reset(r, &p->b1, p->E * W);
    stored_reset(r, &p->b2, p->E * p->O);
    if (p->gated && !fused(r, p)) stored_reset(r, &p->b3, p->E * F);
    convert(r, p, &p->b1, p->b[1], NULL, 1, F, 0, W, 1);
    if (p->gated) convert(r, p, b3, p->b[3], NULL, 1, F, 1, W, 1);
    convert(r, p, &p->b2, p->b[2], NULL, 1, p->O, 0, p->O, 1);
}

static void show_one(run *r, pool *p, const char *name, const char *suffix, stored *s, int64_t rows,
                     int64_t cols, int half, int64_t width, int is_bias)
{
    char full[48];
    if (s->opaque &&
        moe_experts_export(s->opaque, s->index, MOE_PARAMETER_GRADIENT, 0, p->E, s->grad) != MOE_OK)
        (void)run_fail(r, "%s", moe_last_error());
    (void)snprintf(full, sizeof full, "d%s%s%s", p->prefix, name, suffix);
    convert(r, p, s, NULL, result_reals(r, full, p->E * rows * cols), rows, cols, half, width,
            is_bias);
}

void show_gradients(run *r, pool *p, const char *suffix)
{
    int64_t F = p->F, W = fused(r, p) ? 2 * F : F;
    int has_bias = p->b[1] || p->b[2] || p->b[3];
    stored *w3 = fused(r, p) ? &p->w1 : &p->w3, *b3 = fused(r, p) ? &p->b1 : &p->b3;
    show_one(r, p, "W1", suffix, &p->w1, p->D, F, 0, W, 0);
    if (p->gated) show_one(r, p, "W3", suffix, w3, p->D, F, 1, W, 0);
    show_one(r, p, "W2", suffix, &p->w2, F, p->O, 0, p->O, 0);
    if (!has_bias) return;
    show_one(r, p, "b1", suffix, &p->b1, 1, F, 0, W, 1);
    if (p->gated) show_one(r, p, "b3", suffix, b3, 1, F, 1, W, 1);
    show_one(r, p, "b2", suffix, &p->b2, 1, p->O, 0, p->O, 1);
}

static int bind_one(run *r, moe_experts *experts, const char *name, stored *s)
{
    moe_binding b;
    int64_t index = moe_experts_parameter_find(experts, name);
    if (index < 0) return 0;
    if (!s->data) return run_fail(r, "the case has no tensor for %s", name);
    moe_parameter_record p;
    CALL(r, moe_parameter_record_init(&p, sizeof p));
    CALL(r, moe_experts_parameter(experts, index, &p));
    s->opaque = p.opaque ? experts : NULL;
    s->index = index;
    if (p.opaque) {
        CALL(r, moe_experts_import(experts, index, MOE_PARAMETER_DATA, 0, p.shape[0], s->data));
        CALL(r, moe_experts_import(experts, index, MOE_PARAMETER_GRADIENT, 0, p.shape[0], s->grad));
        return 0;
    }
    CALL(r, moe_binding_init(&b, sizeof b));
    b.data = s->data;
    b.grad = s->grad;
    b.data_dtype = b.grad_dtype = r->o.dtype;
    CALL(r, moe_experts_bind(experts, index, &b));
    return 0;
}

int bind_pool(run *r, moe_experts *experts, pool *p)
{
    store_pool(r, p);
    TRY(bind_one(r, experts, fused(r, p) ? "w13" : "w1", &p->w1));
    TRY(bind_one(r, experts, "w3", &p->w3));
    TRY(bind_one(r, experts, "w2", &p->w2));
    TRY(bind_one(r, experts, fused(r, p) ? "b13" : "b1", &p->b1));
    TRY(bind_one(r, experts, "b3", &p->b3));
    return bind_one(r, experts, "b2", &p->b2);
}

int make_pool(run *r, pool *p, const char *prefix, moe_experts **experts)
{
    char name[16];
    moe_experts_config e;
    memset(p, 0, sizeof *p);
    p->prefix = prefix;
    int leading = prefix[0] == 0; /* shared and residual pools have no E */
    (void)snprintf(name, sizeof name, "%sW1", prefix);
    tensor *w1 = case_tensor(r->c, "in", name);
    (void)snprintf(name, sizeof name, "%sW2", prefix);
    tensor *w2 = case_tensor(r->c, "in", name);
    if (!w1 || !w2 || w1->dims != 2 + leading || w2->dims != 2 + leading)
        return run_fail(r, "the case has no %sW1 and %sW2", prefix, prefix);
    for (int i = 1; i <= 3; i++) {
        (void)snprintf(name, sizeof name, "%sW%d", prefix, i);
        p->W[i] = run_input(r, name);
        (void)snprintf(name, sizeof name, "%sb%d", prefix, i);
        p->b[i] = run_input(r, name);
    }
    p->E = leading ? w1->dim[0] : 1;
    p->D = w1->dim[leading];
    p->F = w1->dim[leading + 1];
    p->O = w2->dim[leading + 1];
    CALL(r, moe_experts_config_init(&e, sizeof e));
    TRY(activation(r, &e.activation));
    p->gated = e.activation >= MOE_ACTIVATION_SWIGLU;
    e.d_model = p->D;
    e.d_hidden = p->F;
    e.d_out = p->O;
    e.num_experts = p->E;
    e.bias = p->b[1] || p->b[2] || p->b[3];
    e.dtype = r->o.dtype;
    e.weight_layout = r->o.storage.layout;
    if (p->gated) e.glu_order = r->o.storage.glu_order;
    e.storage = r->o.storage.mode;
    if (e.storage != MOE_STORAGE_PANELS) e.parameters = MOE_PARAMETERS_BOUND;
    e.output = leading && case_integer(r->c, "expert_sigmoid", 0) ? MOE_OUTPUT_SIGMOID
                                                                  : MOE_OUTPUT_LINEAR;
    CALL(r, moe_experts_create(experts, r->context, &e));
    return 0;
}

/* ---- matrices with gaps ---------------------------------------------------------------------- */

int64_t stride_of(const run *r, int64_t width) { return r->o.storage.strided ? width + 3 : width; }

void *spread(run *r, const void *dense, int64_t rows, int64_t width)
{
    int64_t stride = stride_of(r, width);
    void *to = run_reals(r, rows * stride);
    for (int64_t i = 0; i < rows * stride; i++) set_real(r, to, i, -77);
    for (int64_t i = 0; dense && i < rows * width; i++)
        set_real(r, to, i / width * stride + i % width, real_at(r, dense, i));
    return to;
}

int gather(run *r, const char *name, const void *from, int64_t rows, int64_t width)
{
    int64_t stride = stride_of(r, width);
    double *to = result_reals(r, name, rows * width);
    for (int64_t i = 0; i < rows * stride; i++) {
        if (i % stride < width)
            to[i / stride * width + i % stride] = real_at(r, from, i);
        else if (real_at(r, from, i) != -77)
            return run_fail(r, "%s: a gap between rows was written", name);
    }
    return 0;
}

/* ---- ffn_grouped ----------------------------------------------------------------------------- */

/* Token t goes to the one expert whose range holds it. */
static int plan_from_offsets(run *r, const pool *p, int64_t T)
{
    tensor *offsets = case_tensor(r->c, "in", "offsets");
    moe_plan_args a;
    int32_t *ids = run_alloc(r, T * 4);
    if (!offsets || offsets->count != p->E + 1) return run_fail(r, "offsets do not fit E");
    const int32_t *begin = offsets->data;
    for (int64_t e = 0; e < p->E; e++)
        if (begin[0] != 0 || begin[e] > begin[e + 1] || begin[p->E] != T)
            return run_fail(r, "offsets do not ascend from 0 to T");
    for (int64_t e = 0; e < p->E; e++)
        for (int64_t t = begin[e]; t < begin[e + 1]; t++) ids[t] = (int32_t)e;
    CALL(r, moe_plan_create(&r->plan, r->context));
    CALL(r, moe_plan_args_init(&a, sizeof a));
    a.tokens = T;
    a.num_experts = p->E;
    a.top_k = 1;
    a.expert_ids = ids;
    a.dtype = r->o.dtype;
    CALL(r, moe_plan_build(r->plan, &a));
    return 0;
}

int op_ffn_grouped(run *r)
{
    pool p;
    moe_forward_args f;
    moe_backward_args b;
    tensor *x = case_tensor(r->c, "in", "x");
    if (!x || x->dims != 2) return run_fail(r, "there is no tensor x");
    int64_t T = x->dim[0];
    static const char *const dims[] = {"T", "R", "D", "E", "F"};
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++) (void)case_integer(r->c, dims[i], 0);
    TRY(make_pool(r, &p, "", &r->experts));
    TRY(bind_pool(r, r->experts, &p));
    TRY(plan_from_offsets(r, &p, T));
    CALL(r, moe_pass_create_for_experts(&r->pass, r->experts, NULL));
    CALL(r, moe_forward_args_init(&f, sizeof f));
    f.tokens = T;
    f.x = spread(r, run_input(r, "x"), T, p.D);
    f.x_stride = stride_of(r, p.D);
    f.y = spread(r, NULL, T, p.O);
    f.y_stride = stride_of(r, p.O);
    f.plan = r->plan;
    CALL(r, moe_experts_forward(r->experts, r->pass, &f));
    TRY(gather(r, "y", f.y, T, p.O));
    CALL(r, moe_backward_args_init(&b, sizeof b));
    b.flags = r->o.storage.strided ? MOE_BACKWARD_OVERWRITE : 0;
    b.dy = spread(r, run_input(r, "dy"), T, p.O);
    b.dy_stride = stride_of(r, p.O);
    b.dx = spread(r, NULL, T, p.D);
    b.dx_stride = stride_of(r, p.D);
    CALL(r, moe_experts_backward(r->experts, r->pass, &b));
    TRY(gather(r, "dx", b.dx, T, p.D));
    show_gradients(r, &p, "");
    return 0;
}
