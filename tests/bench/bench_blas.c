/* bench_blas.c - sgemm of the libraries that were there when bench was built.
 *
 * OpenBLAS runs on as many threads as it is told to. oneDNN's threads are OpenMP's, whose number
 * each calling thread has for itself: all say one. */
#include "bench.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifdef HAVE_OPENBLAS
#include <cblas.h>

static void openblas(bool at, bool bt, int64_t m, int64_t n, int64_t k, const float *a,
                     const float *b, float *c)
{
    cblas_sgemm(CblasRowMajor, at ? CblasTrans : CblasNoTrans, bt ? CblasTrans : CblasNoTrans,
                (blasint)m, (blasint)n, (blasint)k, 1, a, (blasint)(at ? m : k), b,
                (blasint)(bt ? k : n), 0, c, (blasint)n);
}
#endif

#ifdef HAVE_ONEDNN
#include <dnnl.h>

static void onednn(bool at, bool bt, int64_t m, int64_t n, int64_t k, const float *a,
                   const float *b, float *c)
{
    if (dnnl_sgemm(at ? 'T' : 'N', bt ? 'T' : 'N', m, n, k, 1, a, at ? m : k, b, bt ? k : n, 0, c,
                   n) != dnnl_success)
        exit(1);
}
#endif

bench_sgemm bench_blas(const char *library)
{
#ifdef HAVE_OPENBLAS
    if (strcmp(library, "openblas") == 0) return openblas;
#endif
#ifdef HAVE_ONEDNN
    if (strcmp(library, "onednn") == 0) return onednn;
#endif
    (void)library;
    return NULL;
}

void bench_blas_threads(int threads)
{
#ifdef HAVE_OPENBLAS
    openblas_set_num_threads(threads);
#endif
    (void)threads;
}

void bench_blas_thread(void *argument, int thread)
{
    void (*set)(int);
    void *symbol = dlsym(RTLD_DEFAULT, "omp_set_num_threads");
    (void)argument, (void)thread;
    memcpy(&set, &symbol, sizeof set);
    if (symbol) set(1);
}

/* OpenBLAS takes a processor that is newer than itself for an old one, at a fifth of the speed.
 * What it should take it for is read when it is loaded, so the program begins again. */
void bench_blas_core(char **argv)
{
#if defined(HAVE_OPENBLAS) && defined(__x86_64__)
    const char *core = __builtin_cpu_supports("avx512f") ? "SkylakeX"
                       : __builtin_cpu_supports("avx2")  ? "Haswell"
                                                         : NULL;
    if (!core || getenv("OPENBLAS_CORETYPE") || strcmp(openblas_get_corename(), "Prescott") != 0)
        return;
    (void)fprintf(stderr, "bench: OpenBLAS does not know this processor: OPENBLAS_CORETYPE=%s\n",
                  core);
    if (setenv("OPENBLAS_CORETYPE", core, 1) == 0) execv("/proc/self/exe", argv);
#endif
    (void)argv;
}
