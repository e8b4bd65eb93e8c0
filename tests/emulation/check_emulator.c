/* check_emulator.c - the emulator itself: correct kernels give right answers, streams and graphs
 * keep CUDA's order, products are right, faults and counters do what recorder.h says.
 *
 * Runs in every flavour and under several seeds; what must be found is in check_planted.sh. */
#include "sample.h"
#include "recorder.h"
#include "half.h"
#include "philox.h"

#include <check.h>
#include <cublas_v2.h>
#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define OK(call) ck_assert_msg((call) == cudaSuccess, "%s: %s", #call, emu_last_message())

static cudaStream_t stream;

static void begin(void)
{
    emu_heal();
    OK(cudaSetDevice(0));
    OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
}

static void end(void)
{
    OK(cudaStreamDestroy(stream));
    OK(cudaDeviceSynchronize());
}

static void *on_device(const void *from, size_t bytes)
{
    void *p = NULL;
    OK(cudaMalloc(&p, bytes));
    if (from != NULL)
        OK(cudaMemcpyAsync(p, from, bytes, cudaMemcpyHostToDevice, stream));
    else
        OK(cudaMemsetAsync(p, 0, bytes, stream));
    return p;
}

/* Also waits for the stream. */
static void from_device(void *to, const void *from, size_t bytes)
{
    OK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream));
}

/* ---- kernels --------------------------------------------------------------------------------- */

START_TEST(test_kernel_row_sums)
{
    enum { ROWS = 5, N = 700 };
    float x[ROWS * N], sums[ROWS];
    for (int i = 0; i < ROWS * N; i++) x[i] = (float)(i % 9);
    float *dx = on_device(x, sizeof x), *out = on_device(NULL, sizeof sums);
    OK(sample_row_sums(out, dx, ROWS, N, stream));
    from_device(sums, out, sizeof sums);
    for (int r = 0; r < ROWS; r++) {
        float sum = 0;
        for (int i = 0; i < N; i++) sum += x[r * N + i];
        ck_assert_msg(sums[r] == sum, "row %d: %g, not %g", r, sums[r], sum);
    }
    OK(cudaFree(dx));
    OK(cudaFree(out));
}
END_TEST

START_TEST(test_kernel_scan)
{
    enum { N = 777 };
    int32_t x[N], out[N], sum = 0;
    for (int i = 0; i < N; i++) x[i] = i % 5 - 1;
    int32_t *dx = on_device(x, sizeof x), *d = on_device(NULL, sizeof out);
    OK(sample_scan(d, dx, N, stream));
    from_device(out, d, sizeof out);
    for (int i = 0; i < N; i++) {
        sum += x[i];
        ck_assert_int_eq(out[i], sum);
    }
    OK(cudaFree(dx));
    OK(cudaFree(d));
}
END_TEST

START_TEST(test_kernel_histogram)
{
    enum { N = 3000, BINS = 37 };
    int32_t x[N], count[BINS], wanted[BINS] = {0};
    for (int i = 0; i < N; i++) {
        x[i] = i * i % BINS;
        wanted[x[i]]++;
    }
    int32_t *dx = on_device(x, sizeof x), *d = on_device(NULL, sizeof count);
    OK(sample_histogram(d, dx, N, BINS, stream));
    from_device(count, d, sizeof count);
    for (int b = 0; b < BINS; b++) ck_assert_int_eq(count[b], wanted[b]);
    OK(cudaFree(dx));
    OK(cudaFree(d));
}
END_TEST

START_TEST(test_kernel_transpose)
{
    enum { ROWS = 45, COLUMNS = 70 };
    float x[ROWS * COLUMNS], y[ROWS * COLUMNS];
    uint16_t h[ROWS * COLUMNS], g[ROWS * COLUMNS];
    for (int i = 0; i < ROWS * COLUMNS; i++) {
        x[i] = (float)i;
        h[i] = (uint16_t)(i * 7);
    }
    float *dx = on_device(x, sizeof x), *dy = on_device(NULL, sizeof y);
    uint16_t *dh = on_device(h, sizeof h), *dg = on_device(NULL, sizeof g);
    OK(sample_transpose_f32(dy, dx, ROWS, COLUMNS, stream));
    OK(sample_transpose_u16(dg, dh, ROWS, COLUMNS, stream));
    from_device(y, dy, sizeof y);
    from_device(g, dg, sizeof g);
    for (int i = 0; i < ROWS; i++) {
        for (int j = 0; j < COLUMNS; j++) {
            ck_assert(y[j * ROWS + i] == x[i * COLUMNS + j]);
            ck_assert(g[j * ROWS + i] == h[i * COLUMNS + j]);
        }
    }
    OK(cudaFree(dx));
    OK(cudaFree(dy));
    OK(cudaFree(dh));
    OK(cudaFree(dg));
}
END_TEST

START_TEST(test_kernel_warp)
{
    int64_t out[64];
    int64_t *d = on_device(NULL, sizeof out);
    OK(sample_warp(d, 64, stream));
    from_device(out, d, sizeof out);
    for (int64_t t = 0; t < 64; t++) {
        int64_t lane = t % 32, clz = lane == 0 ? 32 : __builtin_clz((unsigned)lane);
        int64_t wanted = 11 + 100 + 200 + 5000 + (lane < 31 ? lane + 1 : 31) * 10000 +
                         (lane ^ 31) * 1000000 + clz * 100000000;
        ck_assert_int_eq(out[t], wanted);
    }
    OK(cudaFree(d));
}
END_TEST

START_TEST(test_kernel_shared_over_48k)
{
    enum { N = 20000 };
    float *x = malloc(N * sizeof *x);
    for (int i = 0; i < N; i++) x[i] = (float)i;
    float *d = on_device(x, N * sizeof *x);
    OK(sample_reverse(d, N, stream));
    from_device(x, d, N * sizeof *x);
    for (int i = 0; i < N; i++) ck_assert(x[i] == (float)(N - 1 - i));
    OK(cudaFree(d));
    free(x);
}
END_TEST

START_TEST(test_kernel_atomics)
{
    enum { N = 600 };
    int64_t x[N], out[3] = {-1000000, 1000000, 0}, sum = 0;
    int32_t out32[3] = {-1000000, 1000000, 0};
    for (int i = 0; i < N; i++) sum += x[i] = (i * 7919) % 1009 - 500;
    int64_t *dx = on_device(x, sizeof x), *d = on_device(out, sizeof out);
    int32_t *d32 = on_device(out32, sizeof out32);
    OK(sample_extremes(d, d32, dx, N, stream));
    from_device(out, d, sizeof out);
    from_device(out32, d32, sizeof out32);
    for (int i = 0; i < N; i++) {
        ck_assert(x[i] <= out[0] && x[i] >= out[1] && x[i] <= out32[0] && x[i] >= out32[1]);
    }
    ck_assert_int_eq(out[2], sum);
    ck_assert_int_eq(out32[2], N);
    OK(cudaFree(dx));
    OK(cudaFree(d));
    OK(cudaFree(d32));
}
END_TEST

/* The arithmetic of the library's headers gives the bytes of the host. */
START_TEST(test_kernel_philox)
{
    enum { N = 300 };
    float out[N], normals[4];
    uint32_t words[4];
    float *d = on_device(NULL, sizeof out);
    OK(sample_philox(d, N, 12345, stream));
    from_device(out, d, sizeof out);
    for (uint32_t i = 0; i < N; i++) {
        moe__counter(words, moe__stream(1, 2, MOE__PURPOSE_NOISE), 0, i, 0);
        moe__philox(12345, words, words);
        moe__normal4(words, normals);
        float rounded = moe__from_bf16(moe__to_bf16(normals[2])) +
                        moe__from_f16(moe__to_f16(normals[3]));
        float wanted = normals[0] + moe__exp_f32(normals[1]) + rounded;
        ck_assert_msg(out[i] == wanted, "%u: %g, not %g", i, out[i], wanted);
    }
    OK(cudaFree(d));
}
END_TEST

/* ---- streams, events, graphs ----------------------------------------------------------------- */

START_TEST(test_stream_order_by_events)
{
    enum { N = 256, STEPS = 10 };
    cudaStream_t second;
    cudaEvent_t there, back;
    float x[N] = {0};
    OK(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking));
    OK(cudaEventCreateWithFlags(&there, cudaEventDisableTiming));
    OK(cudaEventCreateWithFlags(&back, cudaEventDisableTiming));
    float *d = on_device(x, sizeof x);
    for (int i = 0; i < STEPS; i++) {
        OK(sample_affine(d, d, N, 2.0f, 0.0f, stream));
        OK(cudaEventRecord(there, stream));
        OK(cudaStreamWaitEvent(second, there, 0));
        OK(sample_affine(d, d, N, 1.0f, 1.0f, second));
        OK(cudaEventRecord(back, second));
        OK(cudaStreamWaitEvent(stream, back, 0));
    }
    OK(cudaEventDestroy(there));
    OK(cudaEventDestroy(back));
    OK(cudaStreamDestroy(second));
    from_device(x, d, sizeof x);
    for (int i = 0; i < N; i++) ck_assert(x[i] == (float)((1 << STEPS) - 1));
    OK(cudaFree(d));
}
END_TEST

/* The default stream waits for blocking streams, and they for it. */
START_TEST(test_stream_default_orders)
{
    enum { N = 256 };
    cudaStream_t blocking;
    float x[N];
    OK(cudaStreamCreate(&blocking));
    float *d = on_device(NULL, sizeof x);
    OK(cudaStreamSynchronize(stream));
    for (int i = 0; i < 8; i++) {
        OK(sample_affine(d, d, N, 2.0f, 0.0f, blocking));
        OK(sample_affine(d, d, N, 1.0f, 1.0f, NULL));
    }
    OK(cudaMemcpy(x, d, sizeof x, cudaMemcpyDeviceToHost));
    ck_assert(x[0] == 255.0f && x[N - 1] == 255.0f);
    OK(cudaStreamDestroy(blocking));
    OK(cudaFree(d));
}
END_TEST

START_TEST(test_stream_pageable_copy_is_staged)
{
    float x[4] = {1, 2, 3, 4}, y[4];
    float *d = on_device(x, sizeof x);
    memset(x, 0, sizeof x);
    from_device(y, d, sizeof y);
    ck_assert(y[0] == 1 && y[3] == 4);
    OK(cudaFree(d));
}
END_TEST

/* What another stream reads after a blocking copy from `host`: how often the old bytes. */
static int reads_too_early(const float *host, float *d, int times)
{
    int early = 0;
    for (int i = 0; i < times; i++) {
        float found = -1;
        OK(cudaMemsetAsync(d, 0, sizeof *d, stream));
        OK(cudaStreamSynchronize(stream));
        OK(cudaMemcpy(d, host, sizeof *d, cudaMemcpyHostToDevice));
        from_device(&found, d, sizeof found);
        ck_assert(found == 0 || found == *host);
        early += found == 0;
        OK(cudaMemcpy(&found, d, sizeof found, cudaMemcpyDeviceToHost)); /* behind it */
        ck_assert(found == *host);
    }
    return early;
}

/* From pageable memory the default stream alone may count on the bytes, from pinned everybody. */
START_TEST(test_stream_blocking_copy_to_the_device)
{
    enum { TIMES = 60 };
    float x = 7, *pinned = NULL, *d = on_device(NULL, sizeof x);
    OK(cudaMallocHost((void **)&pinned, sizeof x));
    *pinned = 8;
    int early = reads_too_early(&x, d, TIMES);
    ck_assert_msg(early > 0 && early < TIMES, "%d of %d read old bytes", early, TIMES);
    ck_assert_int_eq(reads_too_early(pinned, d, TIMES), 0);
    OK(cudaFreeHost(pinned));
    OK(cudaFree(d));
}
END_TEST

/* It waits for what its stream has, then takes the bytes. */
START_TEST(test_stream_blocking_copy_waits_before)
{
    float x = 7, *pinned = NULL, *d = on_device(&x, sizeof x), *e = on_device(NULL, sizeof x);
    OK(cudaStreamSynchronize(stream));
    OK(cudaMallocHost((void **)&pinned, sizeof x));
    *pinned = 0;
    OK(cudaMemcpyAsync(pinned, d, sizeof x, cudaMemcpyDeviceToHost, NULL));
    OK(cudaMemcpy(e, &x, sizeof x, cudaMemcpyHostToDevice));
    ck_assert(*pinned == 7);
    x = 9;
    OK(cudaMemcpy(&x, e, sizeof x, cudaMemcpyDeviceToHost));
    ck_assert(x == 7);
    OK(cudaFreeHost(pinned));
    OK(cudaFree(d));
    OK(cudaFree(e));
}
END_TEST

typedef struct polled {
    uint64_t *word, wrong;
    int stop;
} polled;

static void *poll_word(void *data)
{
    polled *p = data;
    while (!__atomic_load_n(&p->stop, __ATOMIC_ACQUIRE)) {
        uint64_t word = __atomic_load_n(p->word, __ATOMIC_RELAXED);
        p->wrong += word != 0 && word != UINT64_MAX;
    }
    return NULL;
}

/* The host may poll an aligned word of pinned memory that copies go to: no race, nor half a word. */
START_TEST(test_stream_copies_a_word_whole)
{
    const uint64_t both[2] = {0, UINT64_MAX};
    uint64_t *d = on_device(both, sizeof both);
    polled p = {NULL, 0, 0};
    pthread_t thread;
    OK(cudaMallocHost((void **)&p.word, sizeof *p.word));
    *p.word = 0;
    ck_assert_int_eq(pthread_create(&thread, NULL, poll_word, &p), 0);
    for (int i = 0; i < 200; i++) {
        char *half = (char *)p.word + i % 4 / 2 * 4; /* then its halves, both to the same */
        OK(cudaMemcpyAsync(p.word, d + i % 2, sizeof *d, cudaMemcpyDeviceToHost, stream));
        OK(cudaMemcpyAsync(half, d + i % 2, 4, cudaMemcpyDeviceToHost, stream));
        OK(cudaStreamSynchronize(stream));
    }
    __atomic_store_n(&p.stop, 1, __ATOMIC_RELEASE);
    ck_assert_int_eq(pthread_join(thread, NULL), 0);
    ck_assert_uint_eq(p.wrong, 0);
    ck_assert(*p.word == UINT64_MAX);
    OK(cudaFreeHost(p.word));
    OK(cudaFree(d));
}
END_TEST

START_TEST(test_event_query_comes_to_an_end)
{
    cudaEvent_t e;
    int asked = 0;
    float *d = on_device(NULL, 64);
    OK(cudaEventCreate(&e));
    OK(cudaEventRecord(e, stream));
    while (cudaEventQuery(e) == cudaErrorNotReady) asked++;
    ck_assert_int_lt(asked, 1000);
    OK(cudaEventDestroy(e));
    OK(cudaFree(d));
    cudaGetLastError();
}
END_TEST

static void add(void *data) { *(int *)data += 1; }

START_TEST(test_graph_of_two_streams)
{
    enum { N = 256 };
    cudaStream_t second;
    cudaEvent_t fork, join;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    int calls = 0;
    float x[N], y[N];
    OK(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking));
    OK(cudaEventCreate(&fork));
    OK(cudaEventCreate(&join));
    float *a = on_device(NULL, sizeof x), *b = on_device(NULL, sizeof y);
    OK(cudaStreamSynchronize(stream));
    OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    OK(sample_affine(a, a, N, 1.0f, 1.0f, stream));
    OK(cudaEventRecord(fork, stream));
    OK(cudaStreamWaitEvent(second, fork, 0));
    OK(sample_affine(b, a, N, 10.0f, 0.0f, second));
    OK(cudaLaunchHostFunc(second, add, &calls));
    OK(cudaEventRecord(join, second));
    OK(cudaStreamWaitEvent(stream, join, 0));
    OK(sample_affine(b, b, N, 1.0f, 0.5f, stream));
    OK(cudaStreamEndCapture(stream, &graph));
    OK(cudaGraphInstantiate(&exec, graph, 0));
    OK(cudaGraphDestroy(graph));
    for (int i = 0; i < 3; i++) OK(cudaGraphLaunch(exec, stream));
    from_device(x, a, sizeof x);
    from_device(y, b, sizeof y);
    ck_assert(x[7] == 3.0f && y[7] == 30.5f);
    ck_assert_int_eq(calls, 3);
    OK(cudaGraphExecDestroy(exec));
    OK(cudaEventDestroy(fork));
    OK(cudaEventDestroy(join));
    OK(cudaStreamDestroy(second));
    OK(cudaFree(a));
    OK(cudaFree(b));
}
END_TEST

/* ---- products -------------------------------------------------------------------------------- */

static float widened(const uint16_t *p, const float *f, int i, cudaDataType type)
{
    return type == CUDA_R_32F    ? f[i]
           : type == CUDA_R_16BF ? moe__from_bf16(p[i])
                                 : moe__from_f16(p[i]);
}

static void check_product(cublasHandle_t h, cudaDataType type, int ta, int tb, float beta)
{
    enum { M = 37, N = 9, K = 21, LD = 40 };
    float a[LD * LD], b[LD * LD], c[LD * LD], got[LD * LD], alpha = 0.5f;
    uint16_t ha[LD * LD], hb[LD * LD];
    for (int i = 0; i < LD * LD; i++) {
        a[i] = (float)(i % 11 - 5) / 4;
        b[i] = (float)(i % 7 - 3) / 8;
        c[i] = beta == 0.0f ? NAN : (float)(i % 3);
        ha[i] = type == CUDA_R_16BF ? moe__to_bf16(a[i]) : moe__to_f16(a[i]);
        hb[i] = type == CUDA_R_16BF ? moe__to_bf16(b[i]) : moe__to_f16(b[i]);
    }
    bool wide = type == CUDA_R_32F;
    void *da = on_device(wide ? (void *)a : ha, wide ? sizeof a : sizeof ha);
    void *db = on_device(wide ? (void *)b : hb, wide ? sizeof b : sizeof hb);
    float *dc = on_device(c, sizeof c);
    ck_assert_int_eq(cublasGemmEx(h, ta ? CUBLAS_OP_T : CUBLAS_OP_N, tb ? CUBLAS_OP_T : CUBLAS_OP_N,
                                  M, N, K, &alpha, da, type, LD, db, type, LD, &beta, dc,
                                  CUDA_R_32F, LD, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
                     CUBLAS_STATUS_SUCCESS);
    from_device(got, dc, sizeof got);
    for (int i = 0; i < M; i++) {
        for (int j = 0; j < N; j++) {
            float sum = 0;
            for (int l = 0; l < K; l++) {
                sum += widened(ha, a, ta ? l + i * LD : i + l * LD, type) *
                       widened(hb, b, tb ? j + l * LD : l + j * LD, type);
            }
            float wanted = alpha * sum + (beta != 0.0f ? beta * c[i + j * LD] : 0.0f);
            ck_assert_msg(got[i + j * LD] == wanted, "type %d, %d %d: %g, not %g", type, i, j,
                          got[i + j * LD], wanted);
        }
    }
    OK(cudaFree(da));
    OK(cudaFree(db));
    OK(cudaFree(dc));
}

START_TEST(test_product_types_and_transposes)
{
    const cudaDataType types[] = {CUDA_R_32F, CUDA_R_16BF, CUDA_R_16F};
    cublasHandle_t h;
    ck_assert_int_eq(cublasCreate(&h), CUBLAS_STATUS_SUCCESS);
    ck_assert_int_eq(cublasSetStream(h, stream), CUBLAS_STATUS_SUCCESS);
    for (int t = 0; t < 3; t++) {
        for (int i = 0; i < 4; i++) check_product(h, types[t], i & 1, i >> 1, i == 3 ? 2.0f : 0.0f);
    }
    ck_assert_int_eq(cublasDestroy(h), CUBLAS_STATUS_SUCCESS);
}
END_TEST

START_TEST(test_product_grouped)
{
    float x[64], got[64];
    float alpha[2] = {1, 2}, beta[2] = {0, 0};
    cublasHandle_t h;
    cublasOperation_t ops[2] = {CUBLAS_OP_N, CUBLAS_OP_N};
    int size[2] = {4, 2}, ld[2] = {4, 4}, count[2] = {1, 1};
    for (int i = 0; i < 64; i++) x[i] = i % 5 == 0 ? 1.0f : 0.0f;
    float *d = on_device(x, sizeof x), *out = on_device(NULL, sizeof x);
    const void *in_pointers[2] = {d, d};
    void *out_pointers[2] = {out, out + 32};
    void *in = on_device(in_pointers, sizeof in_pointers);
    void *to = on_device(out_pointers, sizeof out_pointers);
    ck_assert_int_eq(cublasCreate(&h), CUBLAS_STATUS_SUCCESS);
    ck_assert_int_eq(cublasSetStream(h, stream), CUBLAS_STATUS_SUCCESS);
    ck_assert_int_eq(cublasGemmGroupedBatchedEx(h, ops, ops, size, size, size, alpha, in,
                                                CUDA_R_32F, ld, in, CUDA_R_32F, ld, beta, to,
                                                CUDA_R_32F, ld, 2, count, CUBLAS_COMPUTE_32F),
                     CUBLAS_STATUS_SUCCESS);
    from_device(got, out, sizeof got);
    for (int i = 0; i < 16; i++) ck_assert(got[i] == (i % 5 == 0 ? 1.0f : 0.0f));
    ck_assert(got[32] == 2.0f && got[33] == 0.0f && got[37] == 2.0f && got[40] == 0.0f);
    ck_assert_int_eq(cublasDestroy(h), CUBLAS_STATUS_SUCCESS);
    OK(cudaFree(d));
    OK(cudaFree(out));
    OK(cudaFree(in));
    OK(cudaFree(to));
}
END_TEST

/* ---- the recorder ---------------------------------------------------------------------------- */

START_TEST(test_recorder_counts)
{
    const struct emu_call *list;
    float *d = on_device(NULL, 4096);
    emu_record_start();
    OK(sample_affine(d, d, 1024, 1.0f, 1.0f, stream));
    OK(sample_affine(d, d, 1024, 1.0f, 1.0f, stream));
    ck_assert_uint_eq(emu_count(EMU_CALL_LAUNCH), 2);
    ck_assert_uint_eq(emu_count(EMU_CALL_SYNCHRONIZE), 0);
    ck_assert_uint_eq(emu_count(EMU_CALL_ALLOCATE), 0);
    ck_assert_uint_eq(emu_calls(&list), 2);
    ck_assert_str_eq(list[0].name, "affine");
    ck_assert_ptr_eq(list[0].stream, stream);
    emu_record_stop();
    OK(cudaFree(d));
}
END_TEST

START_TEST(test_recorder_faults)
{
    void *p = NULL;
    emu_fail("cudaMalloc", 2, cudaErrorMemoryAllocation);
    OK(cudaMalloc(&p, 16));
    OK(cudaFree(p));
    ck_assert_int_eq(cudaMalloc(&p, 16), cudaErrorMemoryAllocation);
    ck_assert_int_eq(cudaGetLastError(), cudaErrorMemoryAllocation);
    float *d = on_device(NULL, 4096);
    emu_fail_kernel(1);
    OK(sample_affine(d, d, 1024, 1.0f, 1.0f, stream));
    ck_assert_int_eq(cudaStreamSynchronize(stream), cudaErrorIllegalAddress);
    ck_assert_int_eq(cudaMalloc(&p, 16), cudaErrorIllegalAddress);
    ck_assert_int_eq(cudaGetLastError(), cudaErrorIllegalAddress);
    emu_heal();
    OK(cudaFree(d));
}
END_TEST

static int mistakes;
static void count_mistake(const char *message) { mistakes += message[0] != 0; }

START_TEST(test_mistake_handler)
{
    float *d = on_device(NULL, 4096);
    mistakes = 0;
    emu_on_mistake(count_mistake);
    ck_assert_int_ne(sample_warp((int64_t *)(void *)d, 33, stream), cudaSuccess);
    ck_assert_int_eq(mistakes, 1);
    emu_on_mistake(NULL);
    cudaGetLastError();
    OK(cudaFree(d));
}
END_TEST

START_TEST(test_registry_names_kernels)
{
    const char *name;
    uint64_t launches;
    int affine = 0, transposes = 0;
    float *d = on_device(NULL, 4096);
    OK(sample_transpose_f32(d, d + 512, 8, 8, stream));
    OK(cudaFree(d));
    for (size_t i = 0; emu_kernel(i, &name, &launches); i++) {
        affine += strcmp(name, "affine") == 0;
        transposes += strncmp(name, "transpose<", 10) == 0;
    }
    ck_assert_int_eq(affine, 1);
    ck_assert_int_ge(transposes, 1);
}
END_TEST

/* 1024 floats: 128 sectors each way, each once. */
START_TEST(test_traffic_counts_sectors)
{
    struct emu_traffic t;
    float *d = on_device(NULL, 4096);
    emu_traffic_reset();
    OK(sample_affine(d, d, 1024, 1.0f, 1.0f, stream));
    OK(cudaStreamSynchronize(stream));
    if (emu_traffic(0, &t)) {
        ck_assert_str_eq(t.kernel, "affine");
        ck_assert_uint_eq(t.bytes_read, 4096);
        ck_assert_uint_eq(t.bytes_written, 4096);
        ck_assert_uint_eq(t.sectors_read, 128);
        ck_assert_uint_eq(t.sectors_written, 128);
        ck_assert_uint_eq(t.distinct_read, 128);
    }
    OK(cudaFree(d));
}
END_TEST

START_TEST(test_memory_kinds)
{
    struct cudaPointerAttributes a;
    void *p = NULL, *pinned = NULL;
    int x;
    OK(cudaMalloc(&p, 100));
    OK(cudaMallocHost(&pinned, 100));
    OK(cudaPointerGetAttributes(&a, (char *)p + 50));
    ck_assert_int_eq(a.type, cudaMemoryTypeDevice);
    OK(cudaPointerGetAttributes(&a, pinned));
    ck_assert_int_eq(a.type, cudaMemoryTypeHost);
    OK(cudaPointerGetAttributes(&a, &x));
    ck_assert_int_eq(a.type, cudaMemoryTypeUnregistered);
    ck_assert_uint_eq((uintptr_t)p % 256, 0);
    OK(cudaFree(p));
    ck_assert_int_eq(cudaFree(p), cudaErrorInvalidValue);
    OK(cudaFreeHost(pinned));
    ck_assert_uint_eq(emu_live_allocations(0), 0);
    ck_assert_uint_eq(emu_live_allocations(1), 0);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {test_kernel_row_sums,
                                  test_kernel_scan,
                                  test_kernel_histogram,
                                  test_kernel_transpose,
                                  test_kernel_warp,
                                  test_kernel_shared_over_48k,
                                  test_kernel_atomics,
                                  test_kernel_philox,
                                  test_stream_order_by_events,
                                  test_stream_default_orders,
                                  test_stream_pageable_copy_is_staged,
                                  test_stream_blocking_copy_to_the_device,
                                  test_stream_blocking_copy_waits_before,
                                  test_stream_copies_a_word_whole,
                                  test_event_query_comes_to_an_end,
                                  test_graph_of_two_streams,
                                  test_product_types_and_transposes,
                                  test_product_grouped,
                                  test_recorder_counts,
                                  test_recorder_faults,
                                  test_mistake_handler,
                                  test_registry_names_kernels,
                                  test_traffic_counts_sectors,
                                  test_memory_kinds};
    Suite *suite = suite_create("emulator");
    TCase *tcase = tcase_create("emulator");
    tcase_add_checked_fixture(tcase, begin, end);
    tcase_set_timeout(tcase, 120);
    for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++) tcase_add_test(tcase, tests[i]);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
