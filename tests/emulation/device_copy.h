/* device_copy.h - for suites that run a step on the CPU and on the emulated device, from the same
 * inputs, and compare the memory: copies of exactly the size, random numbers, comparisons. */
#ifndef DEVICE_COPY_H
#define DEVICE_COPY_H

#include "backend_cuda.h"
#include "half.h"
#include "philox.h"

#include <check.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- what kernels need of other files; weak, for those may be linked too --------------------- */

__attribute__((weak)) moe_status moe__cuda_status(cudaError_t error, const moe__workers *workers,
                                                  const char *what)
{
    if (error == cudaSuccess) return MOE_OK;
    fprintf(stderr, "%s: %s: %s\n", workers->function, what, cudaGetErrorString(error));
    return MOE_ERROR_DEVICE;
}
/* Never called: products of these suites are too narrow for cuBLAS. */
__attribute__((weak)) moe_status moe__cuda_cublas(const moe__workers *workers,
                                                  cublasHandle_t *handle)
{
    (void)workers;
    (void)handle;
    return MOE_ERROR_DEVICE;
}
__attribute__((weak)) moe_status moe__cublas_status(cublasStatus_t status,
                                                    const moe__workers *workers, const char *what)
{
    (void)status;
    (void)workers;
    (void)what;
    return MOE_ERROR_DEVICE;
}
__attribute__((weak)) moe_status moe__cuda_fail(moe_status status, const moe__workers *workers,
                                                const char *format, ...)
{
    fprintf(stderr, "%s: %s\n", workers->function, format);
    return status;
}
__attribute__((weak)) moe_status moe__cuda_fetch(const moe__workers *workers, void *host,
                                                 const void *device, int64_t bytes)
{
    cudaStream_t stream = workers->stream;
    cudaMemcpyAsync(host, device, (size_t)bytes, cudaMemcpyDeviceToHost, stream);
    return moe__cuda_status(cudaStreamSynchronize(stream), workers, "fetch");
}

/* Random cases of a test; slow builds take fewer. */
/* Of each random test; MOE_TEST_CASES for more or fewer. */
static inline int test_cases(void)
{
    const char *asked = getenv("MOE_TEST_CASES");
    return asked ? atoi(asked) : 60;
}

/* ---- random numbers -------------------------------------------------------------------------- */

static uint64_t draw_state = 1;
static uint32_t draw(void)
{
    draw_state = draw_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(draw_state >> 33);
}
static int64_t draw_below(int64_t n) { return (int64_t)(draw() % (uint64_t)n); }
static int64_t draw_in(int64_t low, int64_t high) { return low + draw_below(high - low + 1); }
static int draw_chance(int percent) { return draw_below(100) < percent; }
static float draw_float(void) { return (float)draw_in(-1000, 1000) / 512.0f; }

/* Few values, and those that are hard to order. */
static inline float draw_tied(void)
{
    static const float hard[] = {0.0f, -0.0f, 1.0f, 0.5f, -0.25f, 1e-40f, 3e38f};
    if (draw_chance(4)) return (float)NAN;
    if (draw_chance(4)) return draw_chance(50) ? (float)INFINITY : -(float)INFINITY;
    return draw_chance(40) ? hard[draw_below(7)] : (float)draw_below(40) / 16.0f;
}

/* ---- memory ---------------------------------------------------------------------------------- */

static void ok(cudaError_t error)
{
    ck_assert_msg(error == cudaSuccess, "%s", cudaGetErrorString(error));
}

/* The device's copy of `bytes` of the host; NULL of NULL. */
static inline void *on_device(const void *host, size_t bytes)
{
    void *device = NULL;
    if (!host) return NULL;
    ok(cudaMalloc(&device, bytes ? bytes : 1));
    if (bytes) ok(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice));
    return device;
}
static inline void *off_device(const void *device, size_t bytes)
{
    void *host = malloc(bytes + 1);
    if (bytes) ok(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost));
    return host;
}

/* `bytes` of the device are those of the host. One assertion for all: Check writes each to a file. */
static inline void same_bytes(const void *host, const void *device, size_t bytes, const char *what,
                              const char *name)
{
    char *found = off_device(device, bytes);
    size_t i = 0;
    while (i < bytes && found[i] == ((const char *)host)[i]) i++;
    ck_assert_msg(i == bytes, "%s: %s differs at byte %zu of %zu", name, what, i, bytes);
    free(found);
}
/* The same, and any NaN is any other. */
static inline void same_floats(const float *host, const void *device, int64_t count,
                               const char *what, const char *name)
{
    float *found = off_device(device, (size_t)count * sizeof *host);
    int64_t i = 0;
    while (i < count && (memcmp(found + i, host + i, sizeof *host) == 0 ||
                         (found[i] != found[i] && host[i] != host[i])))
        i++;
    if (i < count) ck_abort_msg("%s: %s[%lld] is %a, not %a", name, what, (ll)i, found[i], host[i]);
    free(found);
}
#define SAME_WORDS(host, device, count, what, name) \
    same_bytes(host, device, (size_t)(count) * sizeof *(host), what, name)

static inline moe__workers test_workers(moe_context *context, int64_t scratch)
{
    moe__workers w = {.context = context, .function = "test", .worker_bytes = scratch};
    if (scratch > 0) ok(cudaMalloc((void **)&w.scratch, (size_t)scratch));
    return w;
}

static inline moe_context *test_context(void)
{
    moe_context_config config;
    moe_context *context = NULL;
    ck_assert_int_eq(moe_context_config_init(&config, sizeof config), MOE_OK);
    config.threads = 1;
    ck_assert_int_eq(moe_context_create(&context, &config), MOE_OK);
    return context;
}

/* ---- plans ----------------------------------------------------------------------------------- */

/* Rows that were not written hold this. */
enum { UNWRITTEN = 0x5a };

static inline void *host_array(int64_t count, size_t element)
{
    size_t bytes = (size_t)count * element;
    void *p = malloc(bytes + 1);
    memset(p, UNWRITTEN, bytes);
    return p;
}

static inline moe__plan_arrays host_plan(int64_t T, int64_t N, int64_t E, int64_t G)
{
    moe__plan_arrays p;
    memset(&p, 0, sizeof p);
    p.tokens = T;
    p.entries = N;
    p.num_experts = E;
    p.groups = G;
    p.dtype = MOE_DTYPE_F32;
    p.token_begin = host_array(T + 1, sizeof(int64_t));
    p.expert_of_entry = host_array(N, sizeof(int32_t));
    p.weight_of_entry = host_array(N, sizeof(float));
    p.row_of_entry = host_array(N, sizeof(int64_t));
    p.slot_of_entry = host_array(N, sizeof(int64_t));
    p.expert_begin = host_array(E + 1, sizeof(int64_t));
    p.token_of_row = host_array(N, sizeof(int64_t));
    p.entry_of_row = host_array(N, sizeof(int64_t));
    p.group_begin = host_array(G + 1, sizeof(int64_t));
    return p;
}

#define EACH_PLAN_ARRAY(p, DO)                              \
    DO(token_begin, (p)->tokens + 1, sizeof(int64_t))       \
    DO(expert_of_entry, (p)->entries, sizeof(int32_t))      \
    DO(weight_of_entry, (p)->entries, sizeof(float))        \
    DO(row_of_entry, (p)->entries, sizeof(int64_t))         \
    DO(slot_of_entry, (p)->entries, sizeof(int64_t))        \
    DO(expert_begin, (p)->num_experts + 1, sizeof(int64_t)) \
    DO(token_of_row, (p)->entries, sizeof(int64_t))         \
    DO(entry_of_row, (p)->entries, sizeof(int64_t))         \
    DO(group_begin, (p)->groups + 1, sizeof(int64_t))

static inline void device_plan(moe__plan_arrays *p, const moe__plan_arrays *host)
{
    *p = *host;
#define COPY(name, count, element) p->name = on_device(host->name, (size_t)(count)*element);
    EACH_PLAN_ARRAY(host, COPY)
#undef COPY
}

static inline void free_plans(moe__plan_arrays *host, moe__plan_arrays *device)
{
#define FREE(name, count, element) \
    free(host->name);              \
    ok(cudaFree(device->name));
    EACH_PLAN_ARRAY(host, FREE)
#undef FREE
}

/* G groups of T tokens, some of them empty. */
static inline void draw_groups(int64_t *group_begin, int64_t T, int64_t G)
{
    group_begin[0] = 0;
    for (int64_t g = 1; g < G; g++)
        group_begin[g] = draw_in(group_begin[g - 1],
                                 moe__min(T, group_begin[g - 1] + 2 * T / G + 1));
    group_begin[G] = T;
}

/* Random entries: the same number for every token, or not. Few experts are crowded. */
static inline moe__plan_arrays draw_plan(int64_t T, int64_t K, int64_t E, int64_t G, int same)
{
    int64_t N = 0, *begin = malloc((size_t)(T + 1) * sizeof *begin);
    for (int64_t t = 0; t < T; t++) {
        begin[t] = N;
        N += same ? K : draw_in(0, K);
    }
    begin[T] = N;
    moe__plan_arrays p = host_plan(T, N, E, G);
    memcpy(p.token_begin, begin, (size_t)(T + 1) * sizeof *begin);
    free(begin);
    draw_groups(p.group_begin, T, G);
    int64_t crowd = draw_in(1, E);
    for (int64_t n = 0; n < N; n++) {
        int64_t most = draw_chance(60) ? crowd : E;
        p.expert_of_entry[n] = draw_chance(5) ? -1 : (int32_t)draw_below(most);
        ((float *)p.weight_of_entry)[n] = draw_tied();
    }
    return p;
}

static inline uint8_t *draw_mask(int64_t T)
{
    uint8_t *mask = malloc((size_t)T + 1);
    for (int64_t t = 0; t < T; t++) mask[t] = draw_chance(80) ? (uint8_t)draw_in(1, 255) : 0;
    return mask;
}

#endif
