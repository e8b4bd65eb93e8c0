/* check_ffn_kernels.c - the experts' slots of the CUDA backend on random jobs against plain loops.
 *
 *     check_ffn_kernels [first seed [count]]
 *
 * Every job runs twice: the second time it must allocate nothing, synchronise nothing and, padded,
 * move nothing between host and device. Padded jobs also run from a captured graph. */
#include "cuda_internal.h"
#include "ffn_reference.h"
#include "half.h"
#include "recorder.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static moe_context *context;
static cudaStream_t stream;
static int failures;

#define MUST(call)                                                                     \
    do {                                                                               \
        if ((call) != 0) {                                                             \
            printf("%s:%d: %s: %s, %s\n", __FILE__, __LINE__, #call, moe_last_error(), \
                   emu_last_message());                                                \
            exit(1);                                                                   \
        }                                                                              \
    } while (0)

/* ---- memory ---------------------------------------------------------------------------------- */

enum { MOST_BLOCKS = 256 };
static void *blocks[MOST_BLOCKS];
static int block_count;

static void *device(int64_t bytes, const void *from)
{
    void *p = NULL;
    MUST(cudaMalloc(&p, (size_t)(bytes > 0 ? bytes : 1)));
    if (from && bytes > 0)
        MUST(cudaMemcpyAsync(p, from, (size_t)bytes, cudaMemcpyHostToDevice, stream));
    blocks[block_count++] = p;
    return p;
}

static void put_element(void *to, int64_t i, double v, int32_t dtype)
{
    if (dtype == MOE_DTYPE_F32)
        ((float *)to)[i] = (float)v;
    else
        ((uint16_t *)to)[i] = dtype == MOE_DTYPE_BF16 ? moe__to_bf16((float)v)
                                                      : moe__to_f16((float)v);
}
static double get_element(const void *from, int64_t i, int32_t dtype)
{
    if (dtype == MOE_DTYPE_F32) return (double)((const float *)from)[i];
    uint16_t h = ((const uint16_t *)from)[i];
    return (double)(dtype == MOE_DTYPE_BF16 ? moe__from_bf16(h) : moe__from_f16(h));
}

static void *upload(const double *v, int64_t n, int32_t dtype)
{
    void *host = calloc((size_t)n + 1, 4);
    for (int64_t i = 0; i < n; i++) put_element(host, i, v[i], dtype);
    void *p = device(n * moe__dtype_size(dtype), host);
    free(host);
    return p;
}

static double *download(const void *p, int64_t n, int32_t dtype)
{
    void *host = calloc((size_t)n + 1, 4);
    double *v = calloc((size_t)n + 1, sizeof *v);
    if (n > 0)
        MUST(cudaMemcpy(host, p, (size_t)(n * moe__dtype_size(dtype)), cudaMemcpyDeviceToHost));
    for (int64_t i = 0; i < n; i++) v[i] = get_element(host, i, dtype);
    free(host);
    return v;
}

/* ---- the job --------------------------------------------------------------------------------- */

typedef struct run {
    ffn_case *c;
    moe__plan_arrays plan;
    moe__experts_job job;
    void *memory[2][TENSORS]; /* of data and gradients on the device */
    void *each[2][TENSORS][16];
    void *arena;
    int64_t arena_bytes;
} run;

static moe__matrices matrices(run *r, int number, int gradient)
{
    const ffn_case *c = r->c;
    bool fused = c->config.glu_order != MOE_GLU_SEPARATE;
    int from = fused && number == W3 ? W1 : fused && number == B3 ? B1 : number;
    int half = number == W3 || number == B3;
    const ffn_tensor *t = &(gradient ? c->grad : c->data)[from];
    moe__matrices m = {0};
    if (!t->there || ((number == W3 || number == B3) && !c->gated)) return m;
    m.dtype = t->dtype;
    m.stride_expert = t->stride_expert, m.stride_row = t->stride_row, m.stride_col = t->stride_col;
    if (t->each) {
        m.each = r->each[gradient][from];
        m.stride_expert = 0;
    } else {
        m.base = r->memory[gradient][from];
    }
    if (!fused || number == W2 || number == B2) return m;
    m.offset = ffn_place(c, t, 0, 0, 0, half);
    if (c->config.glu_order == MOE_GLU_INTERLEAVED) m.stride_col *= 2;
    return m;
}

/* One allocation for each expert, or one for all. */
static void upload_tensor(run *r, int gradient, int number)
{
    const ffn_tensor *t = &(gradient ? r->c->grad : r->c->data)[number];
    if (!t->there) return;
    if (!t->each) {
        r->memory[gradient][number] = upload(t->value, t->elements, t->dtype);
        return;
    }
    for (int64_t e = 0; e < r->c->E; e++)
        r->each[gradient][number][e] = t->skip[e] ? NULL
                                                  : upload(t->value + e * t->stride_expert,
                                                           t->stride_expert, t->dtype);
}

static void lay_out(run *r, char *base)
{
    ffn_case *c = r->c;
    moe__experts_job *j = &r->job;
    moe__arena a = {base, 0};
    int64_t rows = c->C > 0 ? moe__max(c->E * c->C, c->N) : c->N, size = moe__dtype_size(c->dtype);
    j->z1 = moe__arena_take(&a, rows * c->F, size);
    j->z3 = c->gated ? moe__arena_take(&a, rows * c->F, size) : NULL;
    j->h = c->save ? moe__arena_take(&a, rows * c->F, size) : j->z1;
    j->out = moe__arena_take(&a, rows * c->O, size);
    j->weight_of_row = moe__arena_take(&a, rows, 4);
    j->dh = moe__arena_take(&a, rows * c->F, size);
    j->dz3 = c->gated ? moe__arena_take(&a, rows * c->F, size) : NULL;
    j->dx_rows = moe__arena_take(&a, rows * c->D, size);
    j->entry_weight_grad = moe__arena_take(&a, c->N, 4);
    r->arena_bytes = a.used;
}

static void set_up(run *r, ffn_case *c, void *of_pass)
{
    memset(r, 0, sizeof *r);
    r->c = c;
    moe__experts_room room = {.d_model = c->D,
                              .d_hidden = c->F,
                              .d_out = c->O,
                              .num_experts = c->E,
                              .dtype = c->dtype,
                              .gated = c->gated};
    moe__pass_shape shape = {.experts = &room,
                             .tokens = c->T,
                             .entries = c->N,
                             .num_experts = c->E,
                             .padded_rows = c->C,
                             .dtype = c->dtype};
    int64_t scratch = (moe__cuda_experts_scratch(&shape) + 63) & ~(int64_t)63;
    for (int gradient = 0; gradient < 2; gradient++)
        for (int i = 0; i < TENSORS; i++) upload_tensor(r, gradient, i);
    r->plan = (moe__plan_arrays){.tokens = c->T,
                                 .entries = c->N,
                                 .rows = -1,
                                 .num_experts = c->E,
                                 .groups = 1};
    r->plan.expert_begin = device((c->E + 1) * 8, c->expert_begin);
    r->plan.token_of_row = device(c->R * 8, c->token_of_row);
    r->plan.entry_of_row = device(c->R * 8, c->entry_of_row);
    r->plan.weight_of_entry = upload(c->weight, c->N, MOE_DTYPE_F32);
    lay_out(r, NULL);
    r->arena = device(r->arena_bytes, NULL);
    if (r->arena_bytes > 0) MUST(cudaMemsetAsync(r->arena, 0xff, (size_t)r->arena_bytes, stream));
    lay_out(r, r->arena);
    moe__experts_job *j = &r->job;
    j->workers = (moe__workers){context, device(scratch, NULL), scratch, "check", stream, of_pass};
    MUST(cudaMemsetAsync(j->workers.scratch, 0xff, (size_t)scratch, stream));
    j->config = &c->config;
    j->plan = &r->plan;
    j->padded_rows = c->C;
    j->x = upload(c->x, c->T * c->x_stride, c->dtype);
    j->x_stride = c->x_stride;
    j->dy = upload(c->dy, c->T * c->dy_stride, c->dtype);
    j->dy_stride = c->dy_stride;
    j->overwrite = c->overwrite;
    j->w1 = matrices(r, W1, 0), j->b1 = matrices(r, B1, 0), j->w3 = matrices(r, W3, 0);
    j->b3 = matrices(r, B3, 0), j->w2 = matrices(r, W2, 0), j->b2 = matrices(r, B2, 0);
    j->dw1 = matrices(r, W1, 1), j->db1 = matrices(r, B1, 1), j->dw3 = matrices(r, W3, 1);
    j->db3 = matrices(r, B3, 1), j->dw2 = matrices(r, W2, 1), j->db2 = matrices(r, B2, 1);
    if (!c->want_dx) j->dx_rows = NULL;
    if (!c->want_weights) j->entry_weight_grad = NULL;
    MUST(cudaDeviceSynchronize()); /* the stream does not wait for the default stream */
}

static void tear_down(void)
{
    while (block_count > 0) MUST(cudaFree(blocks[--block_count]));
}

/* ---- comparing ------------------------------------------------------------------------------- */

/* Two roundings of the type, and what order of sums makes of f32. */
static double tolerance(int32_t dtype)
{
    return dtype == MOE_DTYPE_BF16 ? 0x1p-6 : dtype == MOE_DTYPE_F16 ? 0x1p-9 : 2e-5;
}

static void compare(const run *r, const char *what, double got, double want, double scale,
                    int32_t dtype, int64_t i, int64_t j)
{
    double bound = tolerance(dtype) * (fabs(want) + scale);
    if (fabs(got - want) <= bound) return;
    if (failures++ > 20) return;
    printf("%s[%lld,%lld] is %.9g, %.9g is right (bound %g): ", what, (ll)i, (ll)j, got, want,
           bound);
    ffn_case_print(r->c);
}

/* Rows [R,width] of the plan. */
static void compare_rows(const run *r, const char *what, const void *rows, int64_t width,
                         const double *want)
{
    const ffn_case *c = r->c;
    int64_t count = c->C > 0 ? c->E * c->C : c->R;
    double *got = download(rows, count * width, c->dtype), scale = 0;
    for (int64_t i = 0; i < c->R * width; i++) scale = fmax(scale, fabs(want[i]));
    for (int64_t e = 0; e < c->E; e++)
        for (int64_t n = c->expert_begin[e]; n < c->expert_begin[e + 1]; n++)
            for (int64_t j = 0; j < width; j++) {
                int64_t at = c->C > 0 ? e * c->C + n - c->expert_begin[e] : n;
                compare(r, what, got[at * width + j], want[n * width + j], scale / 4, c->dtype, n,
                        j);
            }
    free(got);
}

static void compare_gradient(const run *r, int number)
{
    static const char *const name[TENSORS] = {"dw1", "db1", "dw3", "db3", "dw2", "db2"};
    const ffn_tensor *t = &r->c->grad[number];
    double scale = 0;
    int32_t dtype = r->c->dtype;
    if (!t->there) return;
    for (int64_t i = 0; i < t->elements; i++) scale = fmax(scale, fabs(t->want[i]));
    for (int64_t e = 0; e < r->c->E; e++) {
        if (t->skip[e]) continue;
        const void *p = t->each ? r->each[1][number][e]
                                : (char *)r->memory[1][number] +
                                      e * t->stride_expert * moe__dtype_size(t->dtype);
        double *got = download(p, t->stride_expert, t->dtype);
        for (int64_t i = 0; i < t->rows; i++)
            for (int64_t j = 0; j < t->cols; j++) {
                int64_t at = i * t->stride_row + j * t->stride_col;
                compare(r, name[number], got[at], t->want[e * t->stride_expert + at], scale / 4,
                        dtype, e, at);
            }
        free(got);
    }
}

static void compare_all(const run *r)
{
    ffn_case *c = r->c;
    compare_rows(r, "out", r->job.out, c->O, c->out);
    if (!c->save) return;
    if (r->job.dx_rows) compare_rows(r, "dx", r->job.dx_rows, c->D, c->dx_rows);
    if (r->job.entry_weight_grad) {
        double *got = download(r->job.entry_weight_grad, c->N, MOE_DTYPE_F32);
        for (int64_t row = 0; row < c->R; row++) {
            int64_t n = c->entry_of_row[row];
            compare(r, "d weight", got[n], c->entry_grad[n], 1, c->dtype, n, 0);
        }
        free(got);
    }
    for (int i = 0; i < TENSORS; i++) compare_gradient(r, i);
}

/* ---- running --------------------------------------------------------------------------------- */

static moe_status forward(run *r)
{
    moe_status (*const slot[4])(moe__experts_job *) = {moe__cuda_experts_forward_f32, NULL,
                                                       moe__cuda_experts_forward_bf16,
                                                       moe__cuda_experts_forward_f16};
    return slot[r->c->dtype](&r->job);
}
static moe_status backward(run *r)
{
    moe_status (*const slot[4])(moe__experts_job *) = {moe__cuda_experts_backward_f32, NULL,
                                                       moe__cuda_experts_backward_bf16,
                                                       moe__cuda_experts_backward_f16};
    return slot[r->c->dtype](&r->job);
}

/* Puts the gradients back to what they were. */
static void restore_gradients(run *r)
{
    for (int i = 0; i < TENSORS; i++) {
        const ffn_tensor *t = &r->c->grad[i];
        if (!t->there) continue;
        for (int64_t e = 0; e < r->c->E; e++) {
            int64_t size = moe__dtype_size(t->dtype);
            char *to = t->each ? r->each[1][i][e]
                               : (char *)r->memory[1][i] + e * t->stride_expert * size;
            void *host = calloc((size_t)t->stride_expert + 1, 4);
            for (int64_t k = 0; k < t->stride_expert; k++)
                put_element(host, k, t->value[e * t->stride_expert + k], t->dtype);
            if (to)
                MUST(cudaMemcpyAsync(to, host, (size_t)(t->stride_expert * size),
                                     cudaMemcpyHostToDevice, stream));
            free(host);
        }
    }
}

static void expect_none(const run *r, enum emu_kind kind)
{
    if (emu_count(kind) == 0) return;
    printf("%llu calls of %s in the second run: ", (unsigned long long)emu_count(kind),
           emu_kind_name(kind));
    ffn_case_print(r->c);
    failures++;
}

static void run_again(run *r)
{
    restore_gradients(r);
    MUST(cudaDeviceSynchronize());
    emu_record_start();
    if (r->c->C == 0) MUST(moe__cuda_plan_ready(&r->job.workers, &r->plan, true));
    MUST(forward(r));
    if (r->c->save) MUST(backward(r));
    emu_record_stop();
    expect_none(r, EMU_CALL_ALLOCATE);
    expect_none(r, EMU_CALL_ALLOCATE_HOST);
    expect_none(r, EMU_CALL_SYNCHRONIZE);
    expect_none(r, EMU_CALL_OBJECT);
    expect_none(r, EMU_CALL_TO_DEVICE);
    if (r->c->C > 0) {
        expect_none(r, EMU_CALL_FROM_DEVICE);
        expect_none(r, EMU_CALL_QUERY);
    }
    MUST(cudaStreamSynchronize(stream));
    compare_all(r);
}

static void run_captured(run *r)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    restore_gradients(r);
    MUST(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    MUST(forward(r));
    if (r->c->save) MUST(backward(r));
    MUST(cudaStreamEndCapture(stream, &graph));
    MUST(cudaGraphInstantiate(&exec, graph, 0));
    MUST(cudaGraphLaunch(exec, stream));
    MUST(cudaStreamSynchronize(stream));
    MUST(cudaGraphExecDestroy(exec));
    MUST(cudaGraphDestroy(graph));
    compare_all(r);
}

static void run_case(uint64_t seed, void *of_pass)
{
    ffn_case c;
    run r;
    ffn_case_make(&c, seed);
    set_up(&r, &c, of_pass);
    int before = failures;
    if (c.C == 0) MUST(moe__cuda_plan_ready(&r.job.workers, &r.plan, true));
    moe_status status = forward(&r);
    if (status == MOE_OK && c.save) status = backward(&r);
    if (status != MOE_OK) {
        printf("%s: ", moe_last_error());
        ffn_case_print(&c);
        failures++;
    } else {
        MUST(cudaStreamSynchronize(stream));
        compare_all(&r);
        if (failures == before) run_again(&r);
        if (failures == before && c.C > 0) run_captured(&r);
    }
    if (failures > before) printf("seed %llu\n", (unsigned long long)seed);
    tear_down();
    ffn_case_free(&c);
}

int main(int argc, char **argv)
{
    uint64_t first = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    uint64_t count = argc > 2 ? strtoull(argv[2], NULL, 0) : 300;
    moe_cuda_config config;
    void *of_pass = NULL;
    MUST(moe_cuda_config_init(&config, sizeof config));
    config.wait_seconds = 20;
    MUST(moe_cuda_context_create(&context, &config));
    MUST(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    MUST(moe__cuda_memory.pass_create(context, &of_pass, "check"));
    for (uint64_t i = 0; i < count && failures < 20; i++) run_case(first + i, of_pass);
    moe__cuda_memory.pass_destroy(context, of_pass);
    moe_context_destroy(context);
    MUST(cudaStreamDestroy(stream));
    if (emu_live_allocations(0) + emu_live_allocations(1) + emu_live_objects() > 0) {
        printf("left: %zu of the device, %zu pinned, %zu objects\n", emu_live_allocations(0),
               emu_live_allocations(1), emu_live_objects());
        failures++;
    }
    printf("experts on CUDA: %llu jobs, %d failures\n", (unsigned long long)count, failures);
    return failures != 0;
}
