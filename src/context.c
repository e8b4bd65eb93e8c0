/* context.c - the context: where work runs, its memory and its parallel work. */
#include "internal.h"
#include "cpus.h"
#include "pool.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* ---- config ---------------------------------------------------------------------------------- */

static void config_defaults(void *instance)
{
    *(moe_context_config *)instance = (moe_context_config){.log_level = MOE_LOG_WARNING};
}

const moe__struct_info moe__context_config_info = MOE__STRUCT_INFO(moe_context_config,
                                                                   config_defaults);

moe_status moe_context_config_init(moe_context_config *config, size_t size)
{
    return moe__struct_init(&moe__context_config_info, config, size, __func__);
}

static const char *isa_name(int32_t isa)
{
    return isa == MOE_ISA_AVX512 ? "MOE_ISA_AVX512"
           : isa == MOE_ISA_AVX2 ? "MOE_ISA_AVX2"
                                 : "MOE_ISA_PLAIN";
}

static moe_status check_config(const moe_context_config *c, const char *function)
{
    if (c->backend == MOE_BACKEND_CUDA)
        REFUSE(MOE_ERROR_NOT_SUPPORTED,
               "backend MOE_BACKEND_CUDA is made by moe_cuda_context_create of libmoe_cuda");
    if (c->backend != MOE_BACKEND_CPU) REFUSE_ARGUMENT("backend is %d", (int)c->backend);
    if (c->isa < MOE_ISA_AUTO || c->isa > MOE_ISA_AVX512) REFUSE_ARGUMENT("isa is %d", (int)c->isa);
    if (c->threads < 0 || c->threads > MOE__MAX_THREADS)
        REFUSE_ARGUMENT("threads is %d; it must be in [0, %d]", (int)c->threads, MOE__MAX_THREADS);
    if (c->log_level < MOE_LOG_ERROR || c->log_level > MOE_LOG_DEBUG)
        REFUSE_ARGUMENT("log_level is %d", (int)c->log_level);
    if (!c->alloc != !c->free)
        REFUSE_ARGUMENT("%s is given without %s", c->alloc ? "alloc" : "free",
                        c->alloc ? "free" : "alloc");
    if (c->parallel && c->threads == 0)
        REFUSE_ARGUMENT("parallel is given and threads is 0: say how many tasks run at once");
    if (c->isa != MOE_ISA_AUTO && !moe__cpu_backend(c->isa, MOE_DTYPE_F32))
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "isa is %s, the best of this machine and build is %s",
               isa_name(c->isa), isa_name(moe__cpu_best_isa()));
    return MOE_OK;
}

/* ---- memory ---------------------------------------------------------------------------------- */

/* From this size on the default allocator maps pages: they come zeroed, and untouched ones cost
 * nothing. Which way memory goes back is told by its size. */
static const int64_t MAP_FROM = (int64_t)1 << 20;
static const int64_t HUGE_FROM = (int64_t)8 << 20;

static void *default_alloc(int64_t bytes)
{
    void *memory = NULL;
    if (bytes < MAP_FROM) return posix_memalign(&memory, 64, (size_t)bytes) == 0 ? memory : NULL;
    memory = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return NULL;
#ifdef MADV_HUGEPAGE
    if (bytes >= HUGE_FROM) (void)madvise(memory, (size_t)bytes, MADV_HUGEPAGE);
#endif
    return memory;
}

static void default_free(void *memory, int64_t bytes)
{
    if (bytes < MAP_FROM)
        free(memory);
    else
        (void)munmap(memory, (size_t)bytes);
}

static void *allocate(const moe_context *c, int64_t bytes)
{
    if (bytes <= 0 || (uint64_t)bytes > SIZE_MAX) return NULL;
    return c->alloc ? c->alloc(c->alloc_user, (uint64_t)bytes, 64) : default_alloc(bytes);
}

static void release(const moe_context *c, void *memory, int64_t bytes)
{
    if (!memory) return;
    if (c->free)
        c->free(c->alloc_user, memory, (uint64_t)bytes);
    else
        default_free(memory, bytes);
}

void *moe__alloc(moe_context *context, int64_t bytes) { return allocate(context, bytes); }

void *moe__alloc_zeroed(moe_context *context, int64_t bytes)
{
    void *memory = allocate(context, bytes);
    if (memory && (context->alloc || bytes < MAP_FROM)) memset(memory, 0, (size_t)bytes);
    return memory;
}

void moe__free(moe_context *context, void *memory, int64_t bytes)
{
    release(context, memory, bytes);
}

/* ---- life ------------------------------------------------------------------------------------ */

/* Memory and threads of a context that is described. */
static moe_status make(moe_context **context, const moe_context *c, const char *function)
{
    moe_context *made = allocate(c, sizeof *c);
    if (!made) REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no memory for the context");
    *made = *c;
    atomic_init(&made->references, 1);
    if (!made->parallel && made->threads > 1) {
        made->pool = moe__pool_create(made, made->threads);
        if (!made->pool) {
            release(c, made, sizeof *c);
            REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no memory for %d threads", (int)c->threads);
        }
    }
    *context = made;
    return MOE_OK;
}

moe_status moe_context_create(moe_context **context, const moe_context_config *config)
{
    moe_context_config k;
    if (!context) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "context is NULL");
    MOE_TRY(moe__struct_read(&moe__context_config_info, &k, config, true, __func__));
    MOE_TRY(check_config(&k, __func__));
    moe_context c = {.backend = k.backend,
                     .isa = k.isa ? k.isa : moe__cpu_best_isa(),
                     .threads = k.threads ? k.threads : moe__available_threads(),
                     .log_level = k.log_level,
                     .alloc = k.alloc,
                     .free = k.free,
                     .alloc_user = k.alloc_user,
                     .parallel = k.parallel,
                     .parallel_user = k.parallel_user,
                     .log = k.log,
                     .log_user = k.log_user};
    c.memory = &moe__host_memory;
    for (int32_t dtype = 0; dtype < 4; dtype++) c.kernels[dtype] = moe__cpu_backend(c.isa, dtype);
    return make(context, &c, __func__);
}

moe_status moe__context_make(moe_context **context, const moe_context_config *host,
                             const moe__memory *memory, const moe__backend *const kernels[4],
                             void *of_context, const char *function)
{
    moe_context_config given, k;
    MOE_TRY(moe__struct_read(&moe__context_config_info, &given, host, true, function));
    config_defaults(&k);
    k.alloc = given.alloc, k.free = given.free, k.alloc_user = given.alloc_user;
    k.log = given.log, k.log_level = given.log_level, k.log_user = given.log_user;
    MOE_TRY(check_config(&k, function));
    moe_context c = {.backend = MOE_BACKEND_CUDA,
                     .isa = moe__cpu_best_isa(),
                     .threads = 1,
                     .log_level = k.log_level,
                     .alloc = k.alloc,
                     .free = k.free,
                     .alloc_user = k.alloc_user,
                     .log = k.log,
                     .log_user = k.log_user,
                     .memory = memory,
                     .of_context = of_context};
    memcpy(c.kernels, kernels, sizeof c.kernels);
    return make(context, &c, function);
}

moe_status moe__check_stream(const moe_context *context, const void *stream, const char *function)
{
    if (stream && context->memory->is_host) REFUSE_ARGUMENT("stream must be NULL on CPU");
    return MOE_OK;
}

void moe__context_retain(moe_context *context) { atomic_fetch_add(&context->references, 1); }

void moe_context_destroy(moe_context *context)
{
    if (!context || atomic_fetch_sub(&context->references, 1) != 1) return;
    moe__pool_destroy(context, context->pool);
    if (context->memory->context_destroy) context->memory->context_destroy(context->of_context);
    if (context->free)
        context->free(context->alloc_user, context, sizeof *context);
    else
        default_free(context, sizeof *context);
}

int32_t moe_context_threads(const moe_context *context) { return context ? context->threads : 0; }

int32_t moe_context_isa(const moe_context *context) { return context ? context->isa : 0; }

int32_t moe_context_backend(const moe_context *context) { return context ? context->backend : -1; }

/* ---- log ------------------------------------------------------------------------------------- */

void moe__log(const moe_context *context, int32_t level, const char *format, ...)
{
    char text[512];
    va_list arguments;
    if (!context->log || level > context->log_level) return;
    va_start(arguments, format);
    (void)vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    context->log(context->log_user, level, text);
}

/* ---- parallel work --------------------------------------------------------------------------- */

/* A host's parallel-for is trusted to run every task once, and its calls are counted. */
typedef struct host_run {
    moe_task_fn task;
    void *argument;
    int64_t count;
    _Atomic int64_t ran;
} host_run;

static void host_task(void *argument, int64_t index)
{
    host_run *run = argument;
    fenv_t saved;
    if (index >= 0 && index < run->count) {
        moe__fenv_enter(&saved);
        run->task(run->argument, index);
        moe__fenv_leave(&saved);
    }
    (void)atomic_fetch_add(&run->ran, 1);
}

static moe_status run_on_host(moe_context *context, int64_t count, moe_task_fn task, void *argument,
                              const char *function)
{
    host_run run = {.task = task, .argument = argument, .count = count};
    int32_t result = context->parallel(context->parallel_user, count, host_task, &run);
    int64_t ran = atomic_load(&run.ran);
    if (result != 0) REFUSE(MOE_ERROR_CALLBACK, "the host's parallel-for returned %d", (int)result);
    if (ran != count)
        REFUSE(MOE_ERROR_CALLBACK, "the host's parallel-for ran %lld of %lld tasks", (ll)ran,
               (ll)count);
    return MOE_OK;
}

moe_status moe__parallel(moe_context *context, int64_t count, moe_task_fn task, void *argument,
                         const char *function)
{
    fenv_t saved;
    if (count > 1 && context->parallel)
        return run_on_host(context, count, task, argument, function);
    if (count > 1 && context->pool) {
        moe__pool_run(context->pool, count, task, argument);
        return MOE_OK;
    }
    moe__fenv_enter(&saved);
    for (int64_t i = 0; i < count; i++) task(argument, i);
    moe__fenv_leave(&saved);
    return MOE_OK;
}

typedef struct range_run {
    moe__range_fn body;
    void *argument;
    int64_t each, longer; /* elements of a range; the first `longer` ranges have one more */
} range_run;

static void range_task(void *argument, int64_t index)
{
    const range_run *run = argument;
    int64_t begin = index * run->each + moe__min(index, run->longer);
    run->body(run->argument, begin, begin + run->each + (index < run->longer));
}

moe_status moe__parallel_range(moe_context *context, int64_t count, int64_t grain,
                               moe__range_fn body, void *argument, const char *function)
{
    if (count <= 0) return MOE_OK;
    /* A few ranges for every thread, so that a slow one does not hold up the rest. */
    int64_t most = context->threads > 1 ? 4 * (int64_t)context->threads : 1;
    int64_t ranges = moe__max(1, moe__min(most, count / grain));
    range_run run = {body, argument, count / ranges, count % ranges};
    return moe__parallel(context, ranges, range_task, &run, function);
}
