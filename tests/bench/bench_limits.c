/* bench_limits.c - what the machine can do at most: fused multiply-adds, and streams of memory.
 *
 * fma_peak        twelve independent chains of vectors in each thread, nothing but registers
 * read_bandwidth  the sum of 512 MiB of huge pages, each thread its share
 * copy_bandwidth  one half of them into the other: bytes read and written
 *
 * Vectors are the compiler's own type, as wide as the best of AVX-512, AVX2 and the baseline that
 * the machine has. To be compiled with contraction, so that a * b + c is one instruction. */
#include "bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CHAINS = 12, TURNS = 4 << 20, STREAM_BYTES = 512 << 20 };

typedef float v4 __attribute__((vector_size(16), aligned(16)));
typedef float v8 __attribute__((vector_size(32), aligned(32)));
typedef float v16 __attribute__((vector_size(64), aligned(64)));

typedef struct limit_peer {
    const bench_work *w;
    double (*multiply)(int64_t turns);
    double (*sum)(const float *a, int64_t count);
    float *stream;
    double sink[BENCH_MOST_THREADS]; /* so that nothing is left out */
    int what;                        /* 0, 1, 2 as above */
} limit_peer;

/* The chains stay finite: c = 0.999999 c + 1e-6 goes to 1. */
#define DEFINE(NAME, VECTOR, TARGET)                                                   \
    TARGET static double multiply_##NAME(int64_t turns)                                \
    {                                                                                  \
        VECTOR c[CHAINS], a = {0}, b = {0}, all = {0};                                 \
        double sum = 0;                                                                \
        a += 0.999999f, b += 1e-6f;                                                    \
        for (int i = 0; i < CHAINS; i++) c[i] = b * (float)i;                          \
        for (int64_t n = 0; n < turns; n++) {                                          \
            c[0] = c[0] * a + b, c[1] = c[1] * a + b, c[2] = c[2] * a + b;             \
            c[3] = c[3] * a + b, c[4] = c[4] * a + b, c[5] = c[5] * a + b;             \
            c[6] = c[6] * a + b, c[7] = c[7] * a + b, c[8] = c[8] * a + b;             \
            c[9] = c[9] * a + b, c[10] = c[10] * a + b, c[11] = c[11] * a + b;         \
        }                                                                              \
        for (int i = 0; i < CHAINS; i++) all += c[i];                                  \
        for (size_t i = 0; i < sizeof all / sizeof(float); i++) sum += (double)all[i]; \
        return sum;                                                                    \
    }                                                                                  \
    TARGET static double sum_##NAME(const float *from, int64_t count)                  \
    {                                                                                  \
        const VECTOR *a = (const VECTOR *)(const void *)from;                          \
        int64_t vectors = count / (int64_t)(sizeof *a / sizeof *from);                 \
        VECTOR s[8], all = {0};                                                        \
        double sum = 0;                                                                \
        for (int i = 0; i < 8; i++) s[i] = all;                                        \
        for (int64_t i = 0; i + 8 <= vectors; i += 8) {                                \
            s[0] += a[i], s[1] += a[i + 1], s[2] += a[i + 2], s[3] += a[i + 3];        \
            s[4] += a[i + 4], s[5] += a[i + 5], s[6] += a[i + 6], s[7] += a[i + 7];    \
        }                                                                              \
        for (int i = 0; i < 8; i++) all += s[i];                                       \
        for (size_t i = 0; i < sizeof all / sizeof(float); i++) sum += (double)all[i]; \
        return sum;                                                                    \
    }

DEFINE(base, v4, )
#if defined(__x86_64__)
DEFINE(avx2, v8, __attribute__((target("avx2,fma"))))
DEFINE(avx512, v16, __attribute__((target("avx512f"))))
#endif

/* The widest vectors that machine and --isa allow; returns their number of floats. */
static int choose(limit_peer *p)
{
    p->multiply = multiply_base, p->sum = sum_base;
#if defined(__x86_64__)
    int32_t isa = p->w->o->isa;
    if (__builtin_cpu_supports("avx512f") && (isa == MOE_ISA_AUTO || isa == MOE_ISA_AVX512)) {
        p->multiply = multiply_avx512, p->sum = sum_avx512;
        return 16;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && isa != MOE_ISA_PLAIN) {
        p->multiply = multiply_avx2, p->sum = sum_avx2;
        return 8;
    }
#endif
    return 4;
}

static void share(void *argument, int thread)
{
    limit_peer *p = argument;
    int64_t floats = STREAM_BYTES / (int64_t)sizeof(float), begin, end;
    if (p->what == 0) {
        p->sink[thread] += p->multiply(TURNS);
    } else if (p->what == 1) {
        bench_share(floats / 1024, p->w->o->threads, thread, &begin, &end);
        p->sink[thread] += p->sum(p->stream + begin * 1024, (end - begin) * 1024);
    } else {
        bench_share(floats / 2, p->w->o->threads, thread, &begin, &end);
        memcpy(p->stream + floats / 2 + begin, p->stream + begin, (size_t)(end - begin) * 4);
    }
}

static double run(bench_peer *peer, int64_t call)
{
    limit_peer *p = peer->state;
    double begin = bench_now();
    (void)call;
    bench_crew_run(p->w->crew, share, p);
    return bench_now() - begin;
}

static void end(bench_peer *peer)
{
    limit_peer *p = peer->state;
    volatile double sink = 0;
    for (int i = 0; i < p->w->o->threads; i++) sink += p->sink[i];
    (void)sink;
    bench_room_free(p->stream, p->stream ? STREAM_BYTES : 0);
    free(p);
}

/* By the threads that read it. */
static void touch(void *argument, int thread)
{
    limit_peer *p = argument;
    int64_t floats = STREAM_BYTES / (int64_t)sizeof(float), begin, last;
    bench_share(floats, p->w->o->threads, thread, &begin, &last);
    for (int64_t i = begin; i < last; i++) p->stream[i] = 1e-6f;
}

bool bench_limit_peer(bench_peer *peer, bench_work *w, const char *name)
{
    limit_peer *p = calloc(1, sizeof *p);
    if (!p) exit(1);
    p->w = w, p->what = name[0] == 'f' ? 0 : name[0] == 'r' ? 1 : 2;
    *peer = (bench_peer){.name = name, .state = p, .run = run, .end = end};
    peer->amount = 2.0 * CHAINS * choose(p) * TURNS * w->o->threads;
    if (p->what > 0) {
        peer->amount = STREAM_BYTES;
        p->stream = bench_room(STREAM_BYTES);
        bench_crew_run(w->crew, touch, p);
    }
    return true;
}
