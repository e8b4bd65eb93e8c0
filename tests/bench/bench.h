/* bench.h - the parts of `bench`: one shape, one routing, one pass, and peers that take turns.
 *
 * bench_options.c reads the command line, bench_work.c makes what all peers work on, and each of
 * bench_moe.c, bench_layer.c, bench_products.c, bench_limits.c and bench_remote.c makes peers.
 * bench.c lets them take turns and prints. T, D, F, E, K as in moe/types.h, R = T K rows. */
#ifndef BENCH_H
#define BENCH_H

#include <moe/moe.h>

#include <stdbool.h>
#include <stdint.h>

enum { BENCH_MOST_PEERS = 24, BENCH_MOST_ROUNDS = 1000, BENCH_MOST_THREADS = 256 };

/* ---- the command line ------------------------------------------------------------------------ */

typedef struct bench_options {
    char shape[64];
    int64_t T, D, F, E, K;
    bool gated;           /* SwiGLU, else ReLU */
    const char *routing;  /* balanced, zipf, or a file of ids */
    bool backward, check; /* --pass fwdbwd; --check */
    int threads, rounds;
    int32_t isa; /* MOE_ISA_* */
    uint64_t seed;
    int32_t storage[3]; /* MOE_STORAGE_*, in the order of the command line */
    int storages;
    const char *peers[BENCH_MOST_PEERS];
    int peer_count;
    const char *raw;    /* file that gets a line for every round, or NULL */
    const char *python; /* that runs the peers written in Python */
    bool memory, one_call;
} bench_options;

/* Returns 0, or prints what is wrong and returns the exit status. */
int bench_read_options(bench_options *o, int argc, char **argv);
/* All names that --peer takes. */
extern const char *const bench_peer_names[];
const char *bench_storage_name(int32_t storage);

/* ---- threads --------------------------------------------------------------------------------- */

typedef struct bench_crew bench_crew;
typedef void (*bench_job)(void *argument, int thread);

bench_crew *bench_crew_start(int threads);
/* job(argument, i) on each thread i of the crew; the caller is thread 0. */
void bench_crew_run(bench_crew *crew, bench_job job, void *argument);
int bench_crew_threads(const bench_crew *crew);
void bench_crew_stop(bench_crew *crew);
/* Thread i's share of count: *begin to *end - 1. */
void bench_share(int64_t count, int threads, int i, int64_t *begin, int64_t *end);

/* ---- what all peers work on ------------------------------------------------------------------ */

/* Calls go through `routings` routings in turn, so that decoding does not find its few experts in
 * the cache. Weights are row-major, [E,D,wide] and [E,F,D] with the gate's columns before those of
 * "up"; they and their gradients lie in huge pages. */
typedef struct bench_work {
    const bench_options *o;
    bench_crew *crew;
    int64_t R, wide; /* wide: F, or 2 F where experts are gated */
    int routings;
    int32_t *ids;        /* [routings,T,K] */
    int32_t *even_ids;   /* [T,K] of a balanced routing */
    float *entry_weight; /* [T,K] */
    float *x, *y, *dy, *dx, *entry_weight_grad;
    float *w1, *w2, *g1, *g2; /* NULL until bench_work_weights; g1, g2 NULL without a backward */
    moe_context *context;     /* whose pool holds these */
    moe_experts *pool;
} bench_work;

void bench_work_make(bench_work *w, const bench_options *o, bench_crew *crew);
void bench_work_weights(bench_work *w);
/* Gives every parameter of a pool numbers. */
void bench_fill_pool(const bench_work *w, moe_experts *pool);
void bench_work_free(bench_work *w);
int32_t *bench_ids(const bench_work *w, int64_t call);
/* Zeroed, in huge pages where it is large; never NULL. */
void *bench_room(int64_t bytes);
void bench_room_free(void *memory, int64_t bytes);
/* Of the products of one call, forward or forward and backward. */
double bench_flops(const bench_options *o);

double bench_now(void);
/* VmHWM or VmRSS of this process, in bytes. */
double bench_memory(const char *field);
void bench_must(moe_status status, const char *what);
#define MUST(call) bench_must(call, #call)

/* ---- peers ----------------------------------------------------------------------------------- */

typedef struct bench_peer bench_peer;
struct bench_peer {
    const char *name;
    void *state;
    double (*run)(bench_peer *p, int64_t call); /* returns seconds */
    void (*end)(bench_peer *p);
    double amount;          /* FLOPs of a call, or bytes of a stream: what `gflops` divides */
    bool comparable;        /* y, dx and the gradients of its call are in the work's arrays */
    const char *second;     /* name of a part of its time, or NULL */
    double second_seconds;  /* of the last call */
    double first_seconds;   /* of the call before the rounds */
    double *ms, *second_ms; /* [rounds] */
};

/* Each makes a peer and returns true, or says on stderr why there is none and returns false. */
bool bench_moe_peer(bench_peer *p, bench_work *w, int32_t storage, int threads, bool even);
bool bench_layer_peer(bench_peer *p, bench_work *w, int32_t storage);
bool bench_product_peer(bench_peer *p, bench_work *w, const char *name);
bool bench_limit_peer(bench_peer *p, bench_work *w, const char *name);
bool bench_remote_peer(bench_peer *p, bench_work *w, const char *name);

/* The config of the pool that all peers stand for. */
void bench_experts_config(moe_experts_config *c, const bench_options *o);
/* --memory: a few steps of a pool of its own, then one line. */
int bench_memory_run(const bench_options *o);

/* ---- libraries ------------------------------------------------------------------------------- */

/* C [m,n] = A B, all row-major; at, bt: A is stored [k,m], B [n,k]. */
typedef void (*bench_sgemm)(bool at, bool bt, int64_t m, int64_t n, int64_t k, const float *a,
                            const float *b, float *c);
/* Of openblas or onednn, or NULL. */
bench_sgemm bench_blas(const char *library);
void bench_blas_threads(int threads);
/* A bench_job: products that this thread of the crew asks for run on it alone. */
void bench_blas_thread(void *argument, int thread);
/* May start the program anew. */
void bench_blas_core(char **argv);

/* ---- rows, in plain C for every instruction set ---------------------------------------------- */

void bench_activation(float *h, const float *pre, int64_t rows, int64_t F, bool gated);
/* dpre may be pre, dh may be h where experts are not gated. */
void bench_activation_backward(float *dpre, const float *pre, const float *dh, int64_t rows,
                               int64_t F, bool gated);
/* y = a x, or y = y + a x. */
void bench_scale_row(float *y, float a, const float *x, int64_t n, bool add);
float bench_dot(const float *x, const float *y, int64_t n);

#endif
