/* expert_ffn.c - every expert's network on its rows, forward and backward, as src/cpu/expert_ffn.c
 * has it. The kernels are in expert_rows.cu, activation.cu and column_sums.cu, the products in
 * grouped_gemm.c; this is their order.
 *
 *     z1 = x W1 + b1,  z3 = x W3 + b3,  h = act(z1) [* z3],  out = o(h W2 + b2)
 *
 * Where W1 and W3 are one parameter [D,2F] they are one product z [R,2F], which lies on z1 and what
 * follows it, and so do their gradients on dh:
 *
 *     z1 [R,F] ..... z3 [R,F]        z row by row: [z1 z3], [z3 z1] or z1 and z3 in turn
 *
 * h, where it is not kept, and dh, before it becomes dz, lie in the rows of z and dz. */
#include "expert_rows.h"
#include "grouped_gemm.h"

/* ---- scratch --------------------------------------------------------------------------------- */

/* Of workers->scratch: gathered rows, the parts of column sums, pointers of experts. */
typedef struct scratch {
    void *rows; /* [rows, max(D,O)] */
    float *sums;
    void **pointers; /* [3 E] */
} scratch;

static int64_t lay_out(scratch *s, char *base, int64_t elements, int64_t experts, int64_t size)
{
    moe__arena arena = {base, 0};
    s->rows = moe__arena_take(&arena, elements, size);
    s->sums = (float *)moe__arena_take(&arena, moe__cuda_partial_bytes(), 1);
    s->pointers = (void **)moe__arena_take(&arena, moe__mul(3, experts), sizeof *s->pointers);
    return arena.used;
}

static int64_t room_bytes(const moe__experts_room *room, int64_t rows)
{
    scratch s;
    if (!room) return 0;
    return lay_out(&s, NULL, moe__mul(rows, moe__max(room->d_model, room->d_out)),
                   room->num_experts, moe__dtype_size(room->dtype));
}

int64_t moe__cuda_experts_scratch(const moe__pass_shape *shape)
{
    if (!shape) return 0;
    const moe__experts_room *all[3] = {shape->experts, shape->shared, shape->residual};
    int64_t most = 0;
    for (int i = 0; i < 3; i++) {
        const moe__experts_room *room = all[i];
        if (!room) continue;
        int64_t rows = i > 0                    ? moe__mul(shape->tokens, room->num_experts)
                       : shape->padded_rows > 0 ? moe__mul(shape->padded_rows, room->num_experts)
                                                : shape->entries;
        int64_t bytes = room_bytes(room, rows);
        if (bytes < 0) return -1;
        most = moe__max(most, bytes);
    }
    return most;
}

/* ---- the job as the files below it see it ---------------------------------------------------- */

typedef struct ffn {
    const moe__experts_job *job;
    const moe__workers *workers;
    moe__cuda_map map;
    moe__cuda_groups groups;
    scratch scratch;
    int64_t D, F, O, size;
    int32_t dtype;
    bool gated, fused;
    bool in_turn;
    int64_t at1, at3; /* of z1 and z3 in a row of z, where fused */
} ffn;

static void *offset(const ffn *f, void *rows, int64_t elements)
{
    return rows ? (char *)rows + elements * f->size : NULL;
}

/* Element 0 of the job's first row. */
static void *first_row(const ffn *f, void *rows, int64_t width)
{
    return offset(f, rows, f->map.first * width);
}

static float *weight_of_row(const ffn *f) { return (float *)f->job->weight_of_row + f->map.first; }

/* Whether the matrices are the two halves of one, which the order then describes. */
static bool are_fused(const moe__matrices *one, const moe__matrices *three, int32_t order,
                      int64_t F)
{
    int64_t between = three->offset - one->offset, step = one->stride_col;
    if (one->base != three->base || one->each != three->each || (!one->base && !one->each) ||
        one->stride_expert != three->stride_expert || one->stride_row != three->stride_row ||
        one->stride_col != three->stride_col)
        return false;
    switch (order) {
    case MOE_GLU_GATE_UP: return between == F * step;
    case MOE_GLU_UP_GATE: return between == -F * step;
    case MOE_GLU_INTERLEAVED: return 2 * between == step;
    default: return false;
    }
}

/* The whole of them, [k,2F]. */
static moe__matrices whole(const ffn *f, moe__matrices one, const moe__matrices *three)
{
    if (f->job->config->glu_order == MOE_GLU_UP_GATE) one.offset = three->offset;
    if (f->in_turn) one.stride_col /= 2;
    return one;
}

static void find_halves(ffn *f)
{
    const moe__experts_job *job = f->job;
    int32_t order = job->config->glu_order;
    f->gated = job->z3 != NULL;
    f->fused = f->gated && are_fused(&job->w1, &job->w3, order, f->F);
    f->in_turn = f->fused && order == MOE_GLU_INTERLEAVED;
    f->at1 = f->fused && order == MOE_GLU_UP_GATE ? f->F : 0;
    f->at3 = f->in_turn ? 1 : f->fused && order == MOE_GLU_GATE_UP ? f->F : 0;
}

/* Sizes, rows and scratch. */
static moe_status begin(ffn *f, const moe__experts_job *job, int32_t dtype)
{
    const moe_experts_config *c = job->config;
    const moe__plan_arrays *plan = job->plan;
    const int64_t *expert_begin = NULL;
    int64_t E = plan->num_experts;
    *f = (ffn){.job = job, .workers = &job->workers, .dtype = dtype};
    f->D = c->d_model, f->F = c->d_hidden, f->O = c->d_out;
    f->size = moe__dtype_size(dtype);
    if (c->kind == MOE_EXPERTS_CALLBACK)
        return moe__cuda_fail(MOE_ERROR_NOT_SUPPORTED, f->workers,
                              "experts of kind MOE_EXPERTS_CALLBACK are not there on CUDA");
    if (job->padded_rows == 0) MOE_TRY(moe__cuda_counts(f->workers, plan, &expert_begin));
    f->map = (moe__cuda_map){.expert_begin = plan->expert_begin,
                             .token_of_row = plan->token_of_row,
                             .entry_of_row = plan->entry_of_row,
                             .experts = E,
                             .padded = job->padded_rows};
    f->map.first = expert_begin ? expert_begin[0] : 0;
    f->map.rows = expert_begin ? expert_begin[E] - expert_begin[0] : E * job->padded_rows;
    (void)lay_out(&f->scratch, f->workers->scratch, f->map.rows * moe__max(f->D, f->O), E, f->size);
    f->groups = (moe__cuda_groups){.workers = f->workers,
                                   .experts = E,
                                   .expert_begin = expert_begin,
                                   .padded = job->padded_rows,
                                   .rows = f->map.rows,
                                   .dtype = dtype,
                                   .pointers = f->scratch.pointers};
    find_halves(f);
    return MOE_OK;
}

/* ---- pieces ---------------------------------------------------------------------------------- */

/* A bias or its gradient, [E,n], as kernels read it: pointers of the host go to the device, to
 * number `place` of the three tables. */
static moe_status vectors_of(const ffn *f, const moe__matrices *m, int place, moe__cuda_vectors *v)
{
    *v = (moe__cuda_vectors){.base = m->base,
                             .stride_expert = m->stride_expert,
                             .stride = m->stride_col,
                             .offset = m->offset};
    if (!m->each) return MOE_OK;
    void **table = f->scratch.pointers + place * f->map.experts;
    v->base = NULL;
    v->each = table;
    return moe__cuda_put_pointers(f->workers, table, (const void *const *)m->each, f->map.experts);
}

/* Rows of x, times their weight where it belongs, in scratch. entries: the weights of the rows are
 * found as well. */
static moe_status gather_x(const ffn *f, void *to, bool entries)
{
    const moe__experts_job *job = f->job;
    moe__cuda_gather g = {.map = f->map,
                          .from = job->x,
                          .to = to,
                          .weight_of_row = weight_of_row(f),
                          .from_stride = job->x_stride,
                          .width = f->D,
                          .dtype = f->dtype};
    if (entries) g.weight_of_entry = (const float *)job->plan->weight_of_entry;
    g.weighted = job->config->weight_position == MOE_WEIGHT_ON_INPUT &&
                 job->config->kind != MOE_EXPERTS_IDENTITY;
    return moe__cuda_run_gather(f->workers, &g);
}

/* Rows of dy times their weight, or through the output function. */
static moe_status gather_dy(const ffn *f, void *to, bool weighted, bool sigmoid)
{
    const moe__experts_job *job = f->job;
    moe__cuda_gather g = {.map = f->map,
                          .from = job->dy,
                          .out = sigmoid ? first_row(f, job->out, f->O) : NULL,
                          .to = to,
                          .weight_of_row = weight_of_row(f),
                          .from_stride = job->dy_stride,
                          .width = f->O,
                          .weighted = weighted,
                          .dtype = f->dtype};
    return moe__cuda_run_gather(f->workers, &g);
}

/* Where rows of z and h begin. */
static moe__cuda_dense z_rows(const ffn *f)
{
    return (moe__cuda_dense){first_row(f, f->job->z1, f->F), f->fused ? 2 * f->F : f->F};
}
static moe__cuda_dense h_rows(const ffn *f)
{
    return f->job->h == f->job->z1 ? z_rows(f)
                                   : (moe__cuda_dense){first_row(f, f->job->h, f->F), f->F};
}
/* dh, before it is dz: of an array in turn in the upper half, where dz is written last. */
static moe__cuda_dense dh_rows(const ffn *f)
{
    moe__cuda_dense dh = {first_row(f, f->job->dh, f->F), f->fused ? 2 * f->F : f->F};
    if (f->in_turn) dh.data = offset(f, dh.data, f->F);
    return dh;
}

static moe__cuda_activation activation_of(const ffn *f)
{
    moe__cuda_dense z = z_rows(f), h = h_rows(f);
    moe__cuda_activation a = {.map = f->map,
                              .z1 = offset(f, z.data, f->at1),
                              .h = h.data,
                              .width = f->F,
                              .z_stride = z.stride,
                              .h_stride = h.stride,
                              .step = f->in_turn ? 2 : 1,
                              .dtype = f->dtype};
    if (f->gated) a.z3 = f->fused ? offset(f, z.data, f->at3) : first_row(f, f->job->z3, f->F);
    if (f->job->config->weight_position == MOE_WEIGHT_ON_HIDDEN) a.weight_of_row = weight_of_row(f);
    moe__cuda_activation_of(f->job->config, &a);
    return a;
}

/* ---- forward --------------------------------------------------------------------------------- */

static moe_status check_weights(const ffn *f)
{
    const moe__experts_job *job = f->job;
    const moe__cuda_groups *g = &f->groups;
    if (f->fused)
        MOE_TRY(
            moe__cuda_check_matrices(g, "w13", whole(f, job->w1, &job->w3), f->D, 2 * f->F, false));
    else
        MOE_TRY(moe__cuda_check_matrices(g, "w1", job->w1, f->D, f->F, false));
    if (f->gated && !f->fused)
        MOE_TRY(moe__cuda_check_matrices(g, "w3", job->w3, f->D, f->F, false));
    return moe__cuda_check_matrices(g, "w2", job->w2, f->F, f->O, false);
}

/* z = x W */
static moe_status hidden_products(const ffn *f, moe__cuda_dense x)
{
    const moe__experts_job *job = f->job;
    const moe__cuda_groups *g = &f->groups;
    moe__cuda_dense z1 = z_rows(f), z3 = {first_row(f, job->z3, f->F), f->F};
    if (f->fused)
        return moe__cuda_product(g, f->D, 2 * f->F, x, whole(f, job->w1, &job->w3), false, z1,
                                 false);
    MOE_TRY(moe__cuda_product(g, f->D, f->F, x, job->w1, false, z1, false));
    if (!f->gated) return MOE_OK;
    return moe__cuda_product(g, f->D, f->F, x, job->w3, false, z3, false);
}

static moe_status activate(const ffn *f)
{
    const moe__experts_job *job = f->job;
    moe__cuda_activation a = activation_of(f);
    a.keep = job->h != job->z1;
    MOE_TRY(vectors_of(f, &job->b1, 0, &a.b1));
    if (f->gated) MOE_TRY(vectors_of(f, &job->b3, 1, &a.b3));
    return moe__cuda_activation_forward(f->workers, &a);
}

static moe_status ffn_forward(const ffn *f)
{
    const moe__experts_job *job = f->job;
    moe__cuda_dense x = {f->scratch.rows, f->D}, out = {first_row(f, job->out, f->O), f->O};
    moe__cuda_output o = {.map = f->map,
                          .out = out.data,
                          .width = f->O,
                          .sigmoid = job->config->output == MOE_OUTPUT_SIGMOID,
                          .dtype = f->dtype};
    MOE_TRY(check_weights(f));
    MOE_TRY(gather_x(f, x.data, true));
    MOE_TRY(hidden_products(f, x));
    MOE_TRY(activate(f));
    MOE_TRY(moe__cuda_product(&f->groups, f->F, f->O, h_rows(f), job->w2, false, out, false));
    MOE_TRY(vectors_of(f, &job->b2, 2, &o.bias));
    return moe__cuda_run_output(f->workers, &o);
}

static moe_status forward(const moe__experts_job *job, int32_t dtype)
{
    ffn f;
    if (job->plan->num_experts == 0) return MOE_OK;
    MOE_TRY(begin(&f, job, dtype));
    if (job->config->kind == MOE_EXPERTS_IDENTITY)
        return gather_x(&f, first_row(&f, job->out, f.O), true);
    return ffn_forward(&f);
}

/* ---- backward -------------------------------------------------------------------------------- */

static bool has(const moe__matrices *m) { return m->base || m->each; }

static moe_status check_gradients(const ffn *f)
{
    const moe__experts_job *job = f->job;
    const moe__cuda_groups *g = &f->groups;
    MOE_TRY(check_weights(f));
    if (f->fused && has(&job->dw1)) {
        if (!are_fused(&job->dw1, &job->dw3, job->config->glu_order, f->F))
            return moe__cuda_fail(MOE_ERROR_NOT_SUPPORTED, f->workers,
                                  "w1 and w3 are one matrix and their gradients are not");
        MOE_TRY(moe__cuda_check_matrices(g, "w13", whole(f, job->dw1, &job->dw3), f->D, 2 * f->F,
                                         true));
    } else {
        MOE_TRY(moe__cuda_check_matrices(g, "w1", job->dw1, f->D, f->F, true));
        MOE_TRY(moe__cuda_check_matrices(g, "w3", job->dw3, f->D, f->F, true));
    }
    return moe__cuda_check_matrices(g, "w2", job->dw2, f->F, f->O, true);
}

static moe_status bias_gradient(const ffn *f, moe__cuda_dense d, int64_t n, const moe__matrices *db)
{
    const moe__experts_job *job = f->job;
    moe__cuda_sums s = {.map = f->map,
                        .g = d.data,
                        .partial = f->scratch.sums,
                        .width = n,
                        .stride = d.stride,
                        .overwrite = job->overwrite,
                        .dtype = f->dtype,
                        .sum_dtype = db->dtype};
    if (!has(db)) return MOE_OK;
    MOE_TRY(vectors_of(f, db, 0, &s.sum));
    return moe__cuda_column_sums(f->workers, &s);
}

/* dW (=|+=) a^T d, db its column sums. */
static moe_status gradients(const ffn *f, int64_t k, int64_t n, moe__cuda_dense a,
                            moe__cuda_dense d, const moe__matrices *dw, const moe__matrices *db)
{
    MOE_TRY(bias_gradient(f, d, n, db));
    return moe__cuda_weight_gradient(&f->groups, k, n, a, d, *dw, f->job->overwrite != 0);
}

/* The rows of dz of W1 and of W3, or of both. */
static moe__cuda_dense dz_rows(const ffn *f, bool third)
{
    void *dz = third ? f->job->dz3 : f->job->dh;
    return (moe__cuda_dense){first_row(f, dz, f->F), f->fused ? 2 * f->F : f->F};
}

static moe_status first_gradients(const ffn *f)
{
    const moe__experts_job *job = f->job;
    moe__cuda_dense x = {f->scratch.rows, f->D};
    if (!has(&job->dw1) && !has(&job->db1) && !has(&job->dw3) && !has(&job->db3)) return MOE_OK;
    if (has(&job->dw1) || has(&job->dw3)) MOE_TRY(gather_x(f, x.data, false));
    if (f->fused) {
        moe__matrices dw = has(&job->dw1) ? whole(f, job->dw1, &job->dw3) : job->dw1;
        moe__matrices db = has(&job->db1) ? whole(f, job->db1, &job->db3) : job->db1;
        return gradients(f, f->D, 2 * f->F, x, dz_rows(f, false), &dw, &db);
    }
    MOE_TRY(gradients(f, f->D, f->F, x, dz_rows(f, false), &job->dw1, &job->db1));
    if (!f->gated) return MOE_OK;
    return gradients(f, f->D, f->F, x, dz_rows(f, true), &job->dw3, &job->db3);
}

/* dx_row = dz1 W1^T + dz3 W3^T; with the weight on x it goes on times the weight, and its product
 * with x is the gradient by it. */
static moe_status input_gradient(const ffn *f)
{
    const moe__experts_job *job = f->job;
    const moe__cuda_groups *g = &f->groups;
    moe__cuda_dense dx = {first_row(f, job->dx_rows, f->D), f->D};
    if (f->fused) {
        MOE_TRY(moe__cuda_product(g, 2 * f->F, f->D, dz_rows(f, false), whole(f, job->w1, &job->w3),
                                  true, dx, false));
    } else {
        MOE_TRY(moe__cuda_product(g, f->F, f->D, dz_rows(f, false), job->w1, true, dx, false));
        if (f->gated)
            MOE_TRY(moe__cuda_product(g, f->F, f->D, dz_rows(f, true), job->w3, true, dx, true));
    }
    if (job->config->weight_position != MOE_WEIGHT_ON_INPUT) return MOE_OK;
    moe__cuda_dot d = {.map = f->map,
                       .a = dx.data,
                       .b = job->x,
                       .entry_grad = (float *)job->entry_weight_grad,
                       .weight_of_row = weight_of_row(f),
                       .a_stride = f->D,
                       .b_stride = job->x_stride,
                       .width = f->D,
                       .b_of_token = 1,
                       .dtype = f->dtype};
    return moe__cuda_run_dot(f->workers, &d);
}

/* dh becomes dz, and h is computed again. */
static moe_status differentiate(const ffn *f)
{
    const moe__experts_job *job = f->job;
    moe__cuda_activation a = activation_of(f);
    moe__cuda_dense dh = dh_rows(f), dz = dz_rows(f, false);
    a.dh = dh.data;
    a.dh_stride = dh.stride;
    a.dz1 = offset(f, dz.data, f->at1);
    if (f->gated) a.dz3 = f->fused ? offset(f, dz.data, f->at3) : dz_rows(f, true).data;
    if (a.weight_of_row) a.entry_grad = (float *)job->entry_weight_grad;
    return moe__cuda_activation_backward(f->workers, &a);
}

static moe_status ffn_backward(const ffn *f)
{
    const moe__experts_job *job = f->job;
    const moe_experts_config *c = job->config;
    bool weighted = c->weight_position == MOE_WEIGHT_ON_OUTPUT;
    moe__cuda_dense dz = {f->scratch.rows, f->O};
    MOE_TRY(gather_dy(f, dz.data, weighted, c->output == MOE_OUTPUT_SIGMOID));
    MOE_TRY(moe__cuda_product(&f->groups, f->O, f->F, dz, job->w2, true, dh_rows(f), false));
    MOE_TRY(differentiate(f));
    MOE_TRY(gradients(f, f->F, f->O, h_rows(f), dz, &job->dw2, &job->db2));
    MOE_TRY(first_gradients(f));
    return job->dx_rows ? input_gradient(f) : MOE_OK;
}

/* The weight multiplied out: its gradient is dy . out. */
static moe_status output_weight(const ffn *f)
{
    const moe__experts_job *job = f->job;
    moe__cuda_dot d = {.map = f->map,
                       .a = (void *)(uintptr_t)job->dy,
                       .b = first_row(f, job->out, f->O),
                       .entry_grad = (float *)job->entry_weight_grad,
                       .a_stride = job->dy_stride,
                       .b_stride = f->O,
                       .width = f->O,
                       .a_of_token = 1,
                       .dtype = f->dtype};
    return moe__cuda_run_dot(f->workers, &d);
}

static moe_status backward(const moe__experts_job *job, int32_t dtype)
{
    ffn f;
    bool identity = job->config->kind == MOE_EXPERTS_IDENTITY;
    if (job->plan->num_experts == 0) return MOE_OK;
    MOE_TRY(begin(&f, job, dtype));
    if (!identity) MOE_TRY(check_gradients(&f));
    if (job->config->weight_position == MOE_WEIGHT_ON_OUTPUT) MOE_TRY(output_weight(&f));
    if (!identity) return ffn_backward(&f);
    if (!job->dx_rows) return MOE_OK;
    return gather_dy(&f, first_row(&f, job->dx_rows, f.D), true, false);
}

/* ---- slots ----------------------------------------------------------------------------------- */

#define SLOTS(type, dtype)                                              \
    moe_status moe__cuda_experts_forward_##type(moe__experts_job *job)  \
    {                                                                   \
        return forward(job, dtype);                                     \
    }                                                                   \
    moe_status moe__cuda_experts_backward_##type(moe__experts_job *job) \
    {                                                                   \
        return backward(job, dtype);                                    \
    }
SLOTS(f32, MOE_DTYPE_F32)
SLOTS(bf16, MOE_DTYPE_BF16)
SLOTS(f16, MOE_DTYPE_F16)
