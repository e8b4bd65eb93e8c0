/* ranks.h - what bench_ranks measures: ranks.c measures it, ranks_print.c shows it. */
#ifndef BENCH_RANKS_H
#define BENCH_RANKS_H

#include <mpi.h>

#include <moe/moe.h>

enum { ALONE = 0, EXACT, PADDED, CHUNK, MODES };
enum { FORWARD = 0, BACKWARD, CALLS, STEP = CALLS, LINES };
enum { TOTAL = 5, TIMES }; /* after MOE_TIME_GATE to MOE_TIME_COMBINE, which are 0 to 4 */
enum { MOST_STEPS = 1000, MOST_GROUPS = 16 };

extern const char *const MODE_NAME[MODES], *const LINE_NAME[LINES];

/* The command line; numbers are of a rank. */
typedef struct bench_sizes {
    int64_t tokens, experts, k, d, f, o, steps, chunk;
    int ranks[MOST_GROUPS], groups;
} bench_sizes;

/* The first `size` ranks. */
typedef struct group {
    int size;
    MPI_Comm mpi; /* MPI_COMM_NULL on other ranks */
    moe_comm *comm;
    moe_gate *gate;
    int64_t sent, received; /* rows of this rank to and from others */
    int64_t fullest;        /* rows from a rank to an expert */
} group;

/* Bytes of a call. */
typedef struct wire {
    int64_t words; /* before and between rows */
    int64_t rows;  /* measured, without words */
    int64_t must;  /* what rows must be */
    int64_t least; /* rows that are routed to other ranks, once each way */
} wire;

/* One way to exchange in one group. */
typedef struct way {
    group *in;
    int mode;
    moe_layer *layer;
    moe_pass *pass;
    wire wire[CALLS];                              /* of this rank */
    double milliseconds[LINES][TIMES][MOST_STEPS]; /* likewise */
} way;

/* All of it, on this rank. */
typedef struct bench_ranks {
    bench_sizes sizes;
    int rank, size;
    moe_context *context;
    moe_experts *pool;
    moe_gate *alone; /* of this rank's experts */
    float *x, *y, *dx, *dy;
    group groups[MOST_GROUPS];
    way *ways[MOST_GROUPS * MODES];
    int way_count, failed;
} bench_ranks;

/* Every rank makes this call; rank 0 prints, of the numbers of all. */
void bench_print(const bench_ranks *b);

#endif
