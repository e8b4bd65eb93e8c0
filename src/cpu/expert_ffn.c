/* expert_ffn.c - every expert's network on its rows, forward and backward.
 *
 *     z1 = x W1 + b1,  z3 = x W3 + b3,  h = act(z1) [* z3],  out = o(h W2 + b2)
 *
 * Row r of a plan is token token_of_row[r]; x is gathered while it is packed. o is the identity or
 * the logistic function. The weight w of a row's entry multiplies out (in combine), h, or x, as the
 * config says. Shapes: x [T,D], z1, z3, h [R,F], out [R,O], all of elements; the rows are those of
 * the job's experts, expert_begin[0] and on. */
#include "cpu/activation.h"
#include "cpu/expert_other.h"
#include "cpu/ffn_rows.h"
#include "cpu/lanes.h"
#include "cpu/tiles.h"
#include "numeric.h"

/* What a worker needs for tiles, and for blocks of rows of the pools there are. */
int64_t MOE_KERNEL(worker_bytes)(const moe__pass_shape *shape)
{
    const moe__experts_room *rooms[3] = {0};
    int64_t bytes = (int64_t)MOE_KERNEL(gemm_scratch)();
    if (shape) rooms[0] = shape->experts, rooms[1] = shape->shared, rooms[2] = shape->residual;
    for (int i = 0; i < 3; i++) {
        const moe__experts_room *c = rooms[i];
        if (!c) continue;
        ffn_block forward = MOE_KERNEL(ffn_block_forward)(c->d_model, c->d_hidden);
        bytes = moe__max(bytes, forward.reals * (int64_t)sizeof(real));
        if (!shape->save) continue;
        ffn_block backward = MOE_KERNEL(ffn_block_backward)(c->d_hidden, c->d_out, c->gated);
        bytes = moe__max(bytes, backward.reals * (int64_t)sizeof(real));
    }
    return (bytes + 63) & ~(int64_t)63;
}

/* out[rows,n] = a[rows,k] b[k,n] (+ bias), expert by expert. */
static moe_status product(const moe__experts_job *job, int64_t k, int64_t n, moe__rows a,
                          moe__matrices b, const moe__matrices *bias, void *out, int32_t add)
{
    moe__gemm_rows_job gemm = {.experts = job->plan->num_experts,
                               .expert_begin = job->plan->expert_begin,
                               .k = k,
                               .n = n,
                               .a = a,
                               .b = b,
                               .out = out,
                               .out_stride = n,
                               .out_add = add,
                               .tile_begin = job->tile_begin};
    if (bias) gemm.bias = *bias;
    return run_gemm_rows(&job->workers, &gemm);
}

/* x and h as the products read them: times the entry's weight where it belongs. */
static moe__rows input_rows(const moe__experts_job *job)
{
    bool weighted = job->config->weight_position == MOE_WEIGHT_ON_INPUT;
    return (moe__rows){.data = job->x,
                       .stride = job->x_stride,
                       .row_index = job->plan->token_of_row,
                       .scale = weighted ? job->weight_of_row : NULL};
}
static moe__rows hidden_rows(const moe__experts_job *job)
{
    bool weighted = job->config->weight_position == MOE_WEIGHT_ON_HIDDEN;
    return (moe__rows){.data = job->h,
                       .stride = job->config->d_hidden,
                       .scale = weighted ? job->weight_of_row : NULL};
}

/* h made again from what was kept. */
static moe__rows activated_rows(const moe__experts_job *job, const activation *act)
{
    return (moe__rows){.data = job->z1,
                       .stride = job->config->d_hidden,
                       .activation = act,
                       .second = job->z3};
}

/* Element 0 of the first row of the job's experts. */
static element *first_row(const moe__experts_job *job, void *rows, int64_t width)
{
    return rows ? (element *)rows + job_first(job) * width : NULL;
}

static void sigmoid_range(void *argument, int64_t begin, int64_t end)
{
    element *out = argument;
    for (int64_t i = begin; i < end; i++) out[i] = put(r_sigmoid(get(out[i])));
}

static moe_status ffn_forward(moe__experts_job *job)
{
    const moe__workers *w = &job->workers;
    const moe_experts_config *c = job->config;
    int64_t rows = job_rows(job), D = c->d_model, F = c->d_hidden, O = c->d_out;
    moe__rows x = input_rows(job), h = hidden_rows(job);
    ffn_run run = {.job = job,
                   .block = MOE_KERNEL(ffn_block_forward)(D, F),
                   .act = MOE_KERNEL(activation_of)(c),
                   .in = x,
                   .hidden_scale = h.scale,
                   .body = MOE_KERNEL(ffn_rows_forward)};

    if (MOE_KERNEL(ffn_run_begin)(&run)) {
        MOE_TRY(MOE_KERNEL(ffn_run_all)(&run));
    } else {
        MOE_TRY(product(job, D, F, x, job->w1, &job->b1, job->z1, 0));
        if (job->z3) MOE_TRY(product(job, D, F, x, job->w3, &job->b3, job->z3, 0));
        MOE_TRY(MOE_KERNEL(activation_forward)(w, c, rows * F, first_row(job, job->h, F),
                                               first_row(job, job->z1, F),
                                               first_row(job, job->z3, F)));
        MOE_TRY(product(job, F, O, h, job->w2, &job->b2, job->out, 0));
    }
    if (c->output != MOE_OUTPUT_SIGMOID) return MOE_OK;
    return moe__parallel_range(w->context, rows * O, 16384, sigmoid_range,
                               first_row(job, job->out, O), w->function);
}

static void weight_of_row_range(void *argument, int64_t begin, int64_t end)
{
    const moe__experts_job *job = argument;
    const real *weight = job->plan->weight_of_entry;
    real *of_row = job->weight_of_row;
    int64_t first = job_first(job);
    for (int64_t r = first + begin; r < first + end; r++)
        of_row[r] = weight[job->plan->entry_of_row[r]];
}

moe_status MOE_KERNEL(experts_forward)(moe__experts_job *job)
{
    const moe__workers *w = &job->workers;
    MOE_TRY(moe__parallel_range(w->context, job_rows(job), 4096, weight_of_row_range, job,
                                w->function));
    switch (job->config->kind) {
    case MOE_EXPERTS_IDENTITY: return MOE_KERNEL(identity_forward)(job);
    case MOE_EXPERTS_CALLBACK: return MOE_KERNEL(callback_forward)(job);
    default: return ffn_forward(job);
    }
}

/* ---- backward -------------------------------------------------------------------------------- */

/* dz[r] = weight_r dy[t] o'(z) for o the logistic function: weight dy out (1 - out). */
static void dz_range(void *argument, int64_t begin, int64_t end)
{
    const moe__experts_job *job = argument;
    bool weighted = job->config->weight_position == MOE_WEIGHT_ON_OUTPUT;
    int64_t O = job->config->d_out, first = job_first(job);
    for (int64_t r = first + begin; r < first + end; r++) {
        const element *dy = (const element *)job->dy + job->plan->token_of_row[r] * job->dy_stride;
        const element *out = (const element *)job->out + r * O;
        element *dz = (element *)job->dz + r * O;
        real weight = weighted ? ((const real *)job->weight_of_row)[r] : R(1.0);
        for (int64_t j = 0; j < O; j++) {
            real o = get(out[j]);
            dz[j] = put(weight * get(dy[j]) * (o * (R(1.0) - o)));
        }
    }
}

/* dw[k,n] (=|+=) a^T g over each expert's rows, and dbias[n] (=|+=) their column sums. */
static moe_status weight_gradient(const moe__experts_job *job, int64_t k, int64_t n, moe__rows a,
                                  moe__rows g, const moe__matrices *dw, const moe__matrices *dbias,
                                  int weight)
{
    bool grouped = job->segment_begin != NULL;
    if (!has(dw) && !has(dbias)) return MOE_OK;
    moe__gemm_dw_job gemm = {.experts = job->plan->num_experts,
                             .segment_begin = grouped ? job->segment_begin
                                                      : job->plan->expert_begin,
                             .segments_per_expert = grouped ? job->segments : 1,
                             .k = k,
                             .n = n,
                             .a = a,
                             .g = g,
                             .dw = *dw,
                             .dbias = *dbias,
                             .overwrite = job->overwrite,
                             .carry = job->carry ? &job->carry[weight] : NULL,
                             .tile_begin = job->tile_begin};
    return run_gemm_dw(&job->workers, &gemm);
}

/* The gradient by a weight is the dot product of what it multiplied with the gradient by the
 * product: dy . out, dh . h, dx_row . x. Where it multiplied h or x, the gradient goes on times the
 * weight. */
static void output_weight_range(void *argument, int64_t begin, int64_t end)
{
    const moe__experts_job *job = argument;
    const moe__plan_arrays *p = job->plan;
    real *grad = job->entry_weight_grad;
    int64_t O = job->config->d_out, first = job_first(job);
    for (int64_t r = first + begin; r < first + end; r++)
        grad[p->entry_of_row[r]] = element_dot((const element *)job->dy +
                                                   p->token_of_row[r] * job->dy_stride,
                                               (const element *)job->out + r * O, O);
}

static void weigh_row(const moe__experts_job *job, int64_t r, const element *in, element *d,
                      int64_t width)
{
    real *grad = job->entry_weight_grad, weight = ((const real *)job->weight_of_row)[r];
    if (grad) grad[job->plan->entry_of_row[r]] = element_dot(d, in, width);
    for (int64_t j = 0; j < width; j++) d[j] = put(weight * get(d[j]));
}

static void hidden_weight_range(void *argument, int64_t begin, int64_t end)
{
    const moe__experts_job *job = argument;
    int64_t F = job->config->d_hidden, first = job_first(job);
    for (int64_t r = first + begin; r < first + end; r++)
        weigh_row(job, r, (const element *)job->h + r * F, (element *)job->dh + r * F, F);
}

static void input_weight_range(void *argument, int64_t begin, int64_t end)
{
    const moe__experts_job *job = argument;
    int64_t D = job->config->d_model, first = job_first(job);
    for (int64_t r = first + begin; r < first + end; r++)
        weigh_row(job, r, (const element *)job->x + job->plan->token_of_row[r] * job->x_stride,
                  (element *)job->dx_rows + r * D, D);
}

static moe_status over_rows(moe__experts_job *job, moe__range_fn body)
{
    const moe__workers *w = &job->workers;
    return moe__parallel_range(w->context, job_rows(job), 64, body, job, w->function);
}

/* dx_row = dz1 W1^T + dz3 W3^T */
static moe_status input_gradient(moe__experts_job *job, moe__rows dz1, moe__rows dz3)
{
    int64_t D = job->config->d_model, F = job->config->d_hidden;
    MOE_TRY(product(job, F, D, dz1, transposed(job->w1), NULL, job->dx_rows, 0));
    if (job->z3) MOE_TRY(product(job, F, D, dz3, transposed(job->w3), NULL, job->dx_rows, 1));
    if (job->config->weight_position != MOE_WEIGHT_ON_INPUT) return MOE_OK;
    return over_rows(job, input_weight_range);
}

/* y[t] = sum weight_r out[r]:  dz = weight dy o';  dh = dz W2^T;  dz1, dz3 by the activation;
 * dx_row as above;  dW2 = h^T dz,  dW1 = x^T dz1,  dW3 = x^T dz3, biases their sums. With the
 * weight on h: dz = dy o', dh = weight dz W2^T, dW2 = (weight h)^T dz; likewise on x. */
static moe_status ffn_backward(moe__experts_job *job)
{
    const moe__workers *w = &job->workers;
    const moe_experts_config *c = job->config;
    int64_t rows = job_rows(job), D = c->d_model, F = c->d_hidden, O = c->d_out;
    moe__rows x = input_rows(job), h = hidden_rows(job);
    moe__rows dz1 = {.data = job->dh, .stride = F}, dz3 = {.data = job->dz3, .stride = F};
    moe__rows dz = {.data = job->dy,
                    .stride = job->dy_stride,
                    .row_index = job->plan->token_of_row};
    if (c->weight_position == MOE_WEIGHT_ON_OUTPUT) dz.scale = job->weight_of_row;

    if (c->output == MOE_OUTPUT_SIGMOID) {
        MOE_TRY(over_rows(job, dz_range));
        dz = (moe__rows){.data = job->dz, .stride = O};
    }
    ffn_run run = {.job = job,
                   .block = MOE_KERNEL(ffn_block_backward)(F, O, job->z3 != NULL),
                   .act = MOE_KERNEL(activation_of)(c),
                   .in = dz,
                   .body = MOE_KERNEL(ffn_rows_backward)};
    bool by_blocks = c->weight_position == MOE_WEIGHT_ON_OUTPUT && MOE_KERNEL(ffn_run_begin)(&run);
    if (by_blocks) {
        MOE_TRY(MOE_KERNEL(ffn_run_all)(&run));
    } else {
        MOE_TRY(product(job, O, F, dz, transposed(job->w2), NULL, job->dh, 0));
        if (c->weight_position == MOE_WEIGHT_ON_HIDDEN)
            MOE_TRY(over_rows(job, hidden_weight_range));
        MOE_TRY(MOE_KERNEL(activation_backward)(
            w, c, rows * F, first_row(job, job->dh, F), first_row(job, job->dz3, F),
            first_row(job, job->h, F), first_row(job, job->z1, F), first_row(job, job->z3, F)));
    }
    if (job->h == job->dh) h = activated_rows(job, &run.act);
    MOE_TRY(weight_gradient(job, F, O, h, dz, &job->dw2, &job->db2, 2));
    MOE_TRY(weight_gradient(job, D, F, x, dz1, &job->dw1, &job->db1, 0));
    if (job->z3) MOE_TRY(weight_gradient(job, D, F, x, dz3, &job->dw3, &job->db3, 1));
    return job->dx_rows && !by_blocks ? input_gradient(job, dz1, dz3) : MOE_OK;
}

moe_status MOE_KERNEL(experts_backward)(moe__experts_job *job)
{
    const moe_experts_config *c = job->config;
    if (job->entry_weight_grad && c->weight_position == MOE_WEIGHT_ON_OUTPUT)
        MOE_TRY(over_rows(job, output_weight_range));
    switch (c->kind) {
    case MOE_EXPERTS_IDENTITY: return MOE_KERNEL(identity_backward)(job);
    case MOE_EXPERTS_CALLBACK: return MOE_KERNEL(callback_backward)(job);
    default: return ffn_backward(job);
    }
}
