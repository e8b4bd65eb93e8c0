/* pass.c - what a pass has of CUDA: a cuBLAS handle and its workspace, pinned memory, and the rows
 * of each expert of its plans on the host. */
#include "cuda_internal.h"

#include <string.h>

/* ---- life ------------------------------------------------------------------------------------ */

enum { STAGING_BYTES = 1 << 16 };

/* f32 sums whatever the type of the factors; no sum by atomics, which is cuBLAS's default. */
static cublasStatus_t make_cublas(moe__cuda_pass *p)
{
    cublasStatus_t status = cublasCreate(&p->cublas);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasSetMathMode(
            p->cublas,
            (cublasMath_t)(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
    return status;
}

static moe_status equip(moe__cuda_pass *p, const moe__workers *w)
{
    int64_t bytes = p->c->cublas_workspace_bytes;
    MOE_TRY(moe__cublas_status(make_cublas(p), w, "cublasCreate"));
    if (bytes > 0 && !(p->workspace = moe__cuda_memory_alloc(p->context, bytes, false)))
        return moe__cuda_fail(MOE_ERROR_OUT_OF_MEMORY, w, "no %lld bytes for cuBLAS", (ll)bytes);
    MOE_TRY(moe__cuda_status(moe__cuda_staging_create(&p->staging, STAGING_BYTES), w,
                             "pinned memory of the pass"));
    MOE_TRY(
        moe__cuda_status(cudaHostAlloc((void **)&p->noted, sizeof *p->noted, cudaHostAllocDefault),
                         w, "pinned memory of the pass"));
    *p->noted = 0;
    for (int i = 0; i < MOE__CUDA_PLANS; i++)
        MOE_TRY(moe__cuda_status(cudaEventCreateWithFlags(&p->plan[i].done, cudaEventDisableTiming),
                                 w, "an event of the pass"));
    return MOE_OK;
}

moe_status moe__cuda_pass_create(moe_context *context, void **of_pass, const char *function)
{
    moe__workers w;
    moe__cuda_scope scope;
    cudaError_t error;
    memset(&w, 0, sizeof w);
    w.context = context;
    w.function = function;
    MOE_TRY(moe__cuda_check_alive(&w));
    moe__cuda_pass *p = moe__module_alloc(context, sizeof *p);
    if (!p) return moe__cuda_fail(MOE_ERROR_OUT_OF_MEMORY, &w, "no memory for the pass");
    p->context = context;
    p->c = moe__cuda_of(&w);
    if (!moe__cuda_enter(p->c, &scope, &error)) {
        moe__module_free(context, p, sizeof *p);
        return moe__cuda_status(error, &w, "cudaSetDevice");
    }
    moe_status status = equip(p, &w);
    moe__cuda_leave(&scope);
    if (status == MOE_OK)
        *of_pass = p;
    else
        moe__cuda_pass_destroy(context, p);
    return status;
}

void moe__cuda_pass_destroy(moe_context *context, void *of_pass)
{
    moe__cuda_pass *p = of_pass;
    moe__cuda_scope scope;
    cudaError_t error;
    if (!p) return;
    if (moe__cuda_enter(p->c, &scope, &error)) {
        if (p->cublas) (void)cublasDestroy(p->cublas);
        moe__cuda_staging_destroy(&p->staging);
        for (int i = 0; i < MOE__CUDA_PUTS; i++) moe__cuda_staging_destroy(&p->put[i]);
        if (p->noted) (void)cudaFreeHost(p->noted);
        moe__cuda_drop_events(p);
        for (int i = 0; i < MOE__CUDA_PLANS; i++) {
            if (p->plan[i].done) (void)cudaEventDestroy(p->plan[i].done);
            if (p->plan[i].pinned) (void)cudaFreeHost(p->plan[i].pinned);
        }
        moe__cuda_leave(&scope);
    }
    moe__cuda_memory_free(context, p->workspace, p->c->cublas_workspace_bytes);
    moe__cuda_memory_free(context, p->matrix, p->matrix_bytes);
    moe__module_free(context, p->groups, p->group_bytes);
    moe__module_free(context, p, sizeof *p);
}

/* ---- what the host gives --------------------------------------------------------------------- */

static void pass_config_defaults(void *instance)
{
    *(moe_cuda_pass_config *)instance = (moe_cuda_pass_config){0};
}
/* What came after the first fields begins at exchange_stream. */
static const moe__struct_info pass_config_info = {
    "moe_cuda_pass_config", sizeof(moe_cuda_pass_config),
    offsetof(moe_cuda_pass_config, exchange_stream), pass_config_defaults};

moe_status moe_cuda_pass_config_init(moe_cuda_pass_config *config, size_t size)
{
    return moe__module_struct_init(&pass_config_info, config, size, __func__);
}

moe_status moe_cuda_pass_set(moe_pass *pass, const moe_cuda_pass_config *config)
{
    moe_cuda_pass_config k;
    moe__cuda_pass *p = pass ? moe__module_of_pass(pass) : NULL;
    if (!p)
        return moe__module_fail(MOE_ERROR_INVALID_ARGUMENT, __func__,
                                pass ? "pass is not of a context on a GPU" : "pass is NULL");
    MOE_TRY(moe__module_struct_read(&pass_config_info, &k, config, __func__));
    if (k.workspace_bytes < 0 || (k.workspace_bytes > 0) != (k.workspace != NULL))
        return moe__module_fail(MOE_ERROR_INVALID_ARGUMENT, __func__,
                                k.workspace ? "workspace_bytes is not above 0"
                                            : "workspace_bytes is not 0 and workspace is NULL");
    if (((uintptr_t)k.workspace & 255) != 0)
        return moe__module_fail(MOE_ERROR_INVALID_ARGUMENT, __func__,
                                "workspace is not aligned to 256 bytes");
    moe__workers w = {.context = p->context, .function = __func__};
    if (moe__cuda_is_forked(p))
        return moe__module_fail(MOE_ERROR_INVALID_STATE, __func__,
                                "the pass is in a call, and rows are on exchange_stream");
    MOE_TRY(moe__cuda_memory.check_pointer(&w, "workspace", k.workspace));
    w.of_pass = p;
    MOE_TRY(moe__cuda_take_stream(&w, k.exchange_stream));
    p->host = k;
    p->on_stream = false;
    return MOE_OK;
}

/* To set the stream takes the workspace away. A host's handle may have been anywhere. */
moe_status moe__cuda_cublas(const moe__workers *workers, cublasHandle_t *handle)
{
    moe__cuda_pass *p = workers->of_pass;
    if (!p) return moe__cuda_fail(MOE_ERROR_INTERNAL, workers, "a product outside of a pass");
    bool theirs = p->host.cublas != NULL;
    *handle = theirs ? (cublasHandle_t)p->host.cublas : p->cublas;
    if (!theirs && p->on_stream && p->stream == workers->stream) return MOE_OK;
    void *workspace = p->host.workspace ? p->host.workspace : p->workspace;
    int64_t bytes = p->host.workspace ? p->host.workspace_bytes : p->c->cublas_workspace_bytes;
    MOE_TRY(moe__cublas_status(cublasSetStream(*handle, (cudaStream_t)workers->stream), workers,
                               "cublasSetStream"));
    MOE_TRY(moe__cublas_status(cublasSetWorkspace(*handle, workspace, (size_t)bytes), workers,
                               "cublasSetWorkspace"));
    if (theirs)
        return moe__cublas_status(cublasSetPointerMode(*handle, CUBLAS_POINTER_MODE_HOST), workers,
                                  "cublasSetPointerMode");
    p->on_stream = true;
    p->stream = workers->stream;
    return MOE_OK;
}

/* ---- rows of each expert --------------------------------------------------------------------- */

/* The plan that `begin` points into: a part of a pool has a part of its array. */
static moe__cuda_plan_counts *find_plan(moe__cuda_pass *p, const int64_t *begin, int64_t experts)
{
    for (int i = 0; i < MOE__CUDA_PLANS; i++) {
        moe__cuda_plan_counts *r = &p->plan[i];
        if (r->expert_begin && begin >= r->expert_begin &&
            begin + experts <= r->expert_begin + r->experts)
            return r;
    }
    return NULL;
}

/* Its own place if it has one, a free one, or that of the plan used longest ago. */
static moe__cuda_plan_counts *place_of(moe__cuda_pass *p, const int64_t *begin)
{
    moe__cuda_plan_counts *oldest = &p->plan[0];
    for (int i = 0; i < MOE__CUDA_PLANS; i++)
        if (p->plan[i].expert_begin == begin) return &p->plan[i];
    for (int i = 0; i < MOE__CUDA_PLANS; i++) {
        if (!p->plan[i].expert_begin) return &p->plan[i];
        if (p->plan[i].turn < oldest->turn) oldest = &p->plan[i];
    }
    return oldest;
}

/* The plan is there anew: what is known of any whose array lay where its array lies is not true any
 * more. */
static void forget_plans(moe__cuda_pass *p, const moe__plan_arrays *plan)
{
    const int64_t *begin = plan->expert_begin, *end = begin + plan->num_experts;
    for (int i = 0; i < MOE__CUDA_PLANS; i++) {
        moe__cuda_plan_counts *r = &p->plan[i];
        if (r->expert_begin && r->expert_begin <= end && begin <= r->expert_begin + r->experts)
            r->expert_begin = NULL;
    }
}

static moe_status wait_for_plan(const moe__workers *workers, moe__cuda_plan_counts *r)
{
    if (r->under_way) MOE_TRY(moe__cuda_wait(workers, r->done, "the rows of each expert"));
    r->under_way = 0;
    return MOE_OK;
}

static moe_status make_room(const moe__workers *workers, moe__cuda_plan_counts *r, int64_t count)
{
    void *pinned = NULL;
    if (count <= r->room) return MOE_OK;
    cudaError_t error = cudaHostAlloc(&pinned, (size_t)count * sizeof *r->pinned,
                                      cudaHostAllocDefault);
    MOE_TRY(moe__cuda_status(error, workers, "pinned memory for the rows of each expert"));
    if (r->pinned) (void)cudaFreeHost(r->pinned);
    r->pinned = pinned;
    r->room = count;
    return MOE_OK;
}

static moe_status start_copy(const moe__workers *workers, const moe__plan_arrays *plan,
                             moe__cuda_plan_counts **place)
{
    moe__cuda_pass *p = workers->of_pass;
    moe__cuda_plan_counts *r = place_of(p, plan->expert_begin);
    cudaStream_t stream = (cudaStream_t)workers->stream;
    size_t bytes = (size_t)(plan->num_experts + 1) * sizeof *r->pinned;
    MOE_TRY(wait_for_plan(workers, r));
    forget_plans(p, plan);
    r->expert_begin = NULL;
    MOE_TRY(make_room(workers, r, plan->num_experts + 1));
    MOE_TRY(moe__cuda_status(
        cudaMemcpyAsync(r->pinned, plan->expert_begin, bytes, cudaMemcpyDeviceToHost, stream),
        workers, "cudaMemcpyAsync"));
    r->under_way = 1;
    MOE_TRY(moe__cuda_status(cudaEventRecord(r->done, stream), workers, "cudaEventRecord"));
    r->expert_begin = plan->expert_begin;
    r->experts = plan->num_experts;
    r->turn = ++p->turn;
    *place = r;
    return MOE_OK;
}

/* While the stream is captured there is nothing to start: whoever asks for the rows is refused. */
moe_status moe__cuda_plan_ready(const moe__workers *workers, const moe__plan_arrays *plan,
                                bool wanted)
{
    moe__cuda_plan_counts *r;
    moe__cuda_pass *p = workers->of_pass;
    enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    if (!p) return MOE_OK;
    if (wanted)
        MOE_TRY(moe__cuda_status(cudaStreamIsCapturing((cudaStream_t)workers->stream, &capture),
                                 workers, "cudaStreamIsCapturing"));
    if (wanted && capture == cudaStreamCaptureStatusNone) return start_copy(workers, plan, &r);
    forget_plans(p, plan);
    return MOE_OK;
}

moe_status moe__cuda_counts(const moe__workers *workers, const moe__plan_arrays *plan,
                            const int64_t **expert_begin)
{
    moe__cuda_pass *p = workers->of_pass;
    if (!p) return moe__cuda_fail(MOE_ERROR_INTERNAL, workers, "rows of experts outside of a pass");
    moe__cuda_plan_counts *r = find_plan(p, plan->expert_begin, plan->num_experts);
    if (!r && plan->entries == 0) {
        MOE_TRY(moe__cuda_plan_known(workers, plan, NULL));
        r = find_plan(p, plan->expert_begin, plan->num_experts);
    }
    if (!r || r->under_way) MOE_TRY(moe__cuda_may_wait(workers));
    if (!r) MOE_TRY(start_copy(workers, plan, &r));
    MOE_TRY(wait_for_plan(workers, r));
    r->turn = ++p->turn;
    *expert_begin = r->pinned + (plan->expert_begin - r->expert_begin);
    return MOE_OK;
}

moe_status moe__cuda_plan_known(const moe__workers *workers, const moe__plan_arrays *plan,
                                const int64_t *expert_begin)
{
    moe__cuda_pass *p = workers->of_pass;
    size_t bytes = (size_t)(plan->num_experts + 1) * sizeof *expert_begin;
    if (!p) return moe__cuda_fail(MOE_ERROR_INTERNAL, workers, "rows of experts outside of a pass");
    moe__cuda_plan_counts *r = place_of(p, plan->expert_begin);
    MOE_TRY(wait_for_plan(workers, r));
    forget_plans(p, plan);
    r->expert_begin = NULL;
    MOE_TRY(make_room(workers, r, plan->num_experts + 1));
    memset(r->pinned, 0, bytes); /* of a plan without entries nobody needs to tell */
    if (expert_begin) memcpy(r->pinned, expert_begin, bytes);
    r->expert_begin = plan->expert_begin;
    r->experts = plan->num_experts;
    r->turn = ++p->turn;
    return MOE_OK;
}

/* ---- copies that nobody waits for ------------------------------------------------------------ */

static moe_status wait_for_put(const moe__workers *workers, moe__cuda_staging *s)
{
    if (s->busy) MOE_TRY(moe__cuda_wait(workers, s->done, "a table"));
    s->busy = false;
    return MOE_OK;
}

/* All of them at once, so that a later call finds them. */
static moe_status make_puts(const moe__workers *workers, int64_t bytes)
{
    enum { LEAST = 4096 };
    moe__cuda_pass *p = workers->of_pass;
    for (int i = 0; i < MOE__CUDA_PUTS; i++) {
        if (bytes <= p->put[i].bytes) continue;
        MOE_TRY(wait_for_put(workers, &p->put[i]));
        moe__cuda_staging_destroy(&p->put[i]);
        MOE_TRY(moe__cuda_status(moe__cuda_staging_create(&p->put[i], moe__max(bytes, LEAST)),
                                 workers, "pinned memory for tables"));
    }
    return MOE_OK;
}

static moe_status put(const moe__workers *workers, void *to, const void *host, int64_t bytes)
{
    moe__cuda_pass *p = workers->of_pass;
    cudaStream_t stream = (cudaStream_t)workers->stream;
    moe__cuda_staging *s = &p->put[p->puts++ % MOE__CUDA_PUTS];
    MOE_TRY(make_puts(workers, bytes));
    MOE_TRY(wait_for_put(workers, s));
    memcpy(s->pinned, host, (size_t)bytes);
    MOE_TRY(moe__cuda_status(
        cudaMemcpyAsync(to, s->pinned, (size_t)bytes, cudaMemcpyHostToDevice, stream), workers,
        "cudaMemcpyAsync"));
    s->busy = true;
    return moe__cuda_status(cudaEventRecord(s->done, stream), workers, "cudaEventRecord");
}

moe_status moe__cuda_put(const moe__workers *workers, void *to, const void *host, int64_t bytes)
{
    moe__cuda_scope scope;
    if (bytes <= 0) return MOE_OK;
    if (!workers->of_pass)
        return moe__cuda_fail(MOE_ERROR_INTERNAL, workers, "a table outside of a pass");
    MOE_TRY(moe__cuda_may_wait(workers));
    MOE_TRY(moe__cuda_enter_call(workers, &scope));
    moe_status status = put(workers, to, host, bytes);
    moe__cuda_leave(&scope);
    return status;
}

moe_status moe__cuda_note(const moe__workers *workers, const int64_t *word)
{
    moe__cuda_pass *p = workers->of_pass;
    return moe__cuda_status(cudaMemcpyAsync(p->noted, word, sizeof *word, cudaMemcpyDeviceToHost,
                                            (cudaStream_t)workers->stream),
                            workers, "cudaMemcpyAsync");
}

int64_t moe__cuda_noted(const moe__workers *workers)
{
    moe__cuda_pass *p = workers->of_pass;
    return __atomic_exchange_n(p->noted, 0, __ATOMIC_RELAXED);
}

/* ---- arguments of grouped products ----------------------------------------------------------- */

static int64_t lay_out_groups(moe__cuda_group_arrays *a, void *memory, int64_t count)
{
    moe__arena arena = {memory, 0};
    int **numbers[] = {&a->m, &a->n, &a->k, &a->ld_x, &a->ld_y, &a->ld_c, &a->size};
    a->x = moe__arena_take(&arena, count, sizeof *a->x);
    a->y = moe__arena_take(&arena, count, sizeof *a->y);
    a->c = moe__arena_take(&arena, count, sizeof *a->c);
    a->op_x = moe__arena_take(&arena, count, sizeof *a->op_x);
    a->op_y = moe__arena_take(&arena, count, sizeof *a->op_y);
    a->alpha = moe__arena_take(&arena, count, sizeof *a->alpha);
    a->beta = moe__arena_take(&arena, count, sizeof *a->beta);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        *numbers[i] = moe__arena_take(&arena, count, sizeof(int));
    return arena.used;
}

moe_status moe__cuda_group_room(const moe__workers *workers, int64_t count,
                                moe__cuda_group_arrays *arrays)
{
    moe__cuda_pass *p = workers->of_pass;
    int64_t bytes = lay_out_groups(arrays, NULL, count);
    if (bytes > p->group_bytes) {
        void *groups = moe__module_alloc(p->context, bytes);
        if (!groups)
            return moe__cuda_fail(MOE_ERROR_OUT_OF_MEMORY, workers,
                                  "no %lld bytes for %lld products", (ll)bytes, (ll)count);
        moe__module_free(p->context, p->groups, p->group_bytes);
        p->groups = groups;
        p->group_bytes = bytes;
    }
    (void)lay_out_groups(arrays, p->groups, count);
    return MOE_OK;
}

moe_status moe__cuda_matrix_room(const moe__workers *workers, int64_t bytes, void **matrix)
{
    moe__cuda_pass *p = workers->of_pass;
    if (bytes > p->matrix_bytes) {
        MOE_TRY(moe__cuda_may_wait(workers)); /* nor allocate */
        if (p->matrix) {                      /* this call may still use it */
            MOE_TRY(
                moe__cuda_status(cudaEventRecord(p->staging.done, (cudaStream_t)workers->stream),
                                 workers, "cudaEventRecord"));
            MOE_TRY(moe__cuda_wait(workers, p->staging.done, "a matrix"));
        }
        void *larger = moe__cuda_memory_alloc(p->context, bytes, false);
        if (!larger)
            return moe__cuda_fail(MOE_ERROR_OUT_OF_MEMORY, workers, "no %lld bytes for a matrix",
                                  (ll)bytes);
        moe__cuda_memory_free(p->context, p->matrix, p->matrix_bytes);
        p->matrix = larger;
        p->matrix_bytes = bytes;
    }
    *matrix = p->matrix;
    return MOE_OK;
}
