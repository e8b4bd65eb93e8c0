/* cuda_ranks_case.h - what the suites of ranks on devices share: a rank with its objects, a group
 * of them on threads, and the bytes of one device that has all. */
#ifndef MOE_TEST_CUDA_RANKS_CASE_H
#define MOE_TEST_CUDA_RANKS_CASE_H

#include "cuda_host.h"
#include "support/device/device_world.h"

#include <pthread.h>

#ifdef EMU_NCCL /* there is an nccl.h */
#include <moe/nccl.h>
#include <nccl.h>
#endif

enum { MOST_RANKS = 4 };
extern const int TOKENS[MOST_RANKS], FIRST[MOST_RANKS + 1];

/* How ranks are connected; over NCCL a rank has a device of its own. Without NCCL that is the one
 * before. */
#ifdef EMU_NCCL
enum { THROUGH_HOST, DIRECT, OVER_NCCL, TRANSPORTS, HAS_NCCL = 1 };
#else
enum { THROUGH_HOST, DIRECT, TRANSPORTS, OVER_NCCL = DIRECT, HAS_NCCL = 0 };
typedef int ncclComm_t, ncclUniqueId;
#endif

typedef struct group group;
typedef struct seat {
    group *g;
    int rank, device;
    moe_context *context;
    moe_comm *comm, *node_comm, *rail_comm; /* the last two with nodes */
    ncclComm_t nccl, node_nccl, rail_nccl;
    moe_gate *gate;
    moe_experts *experts;
    moe_experts *shared, *residual; /* or NULL */
    moe_layer *layer;
    moe_pass *pass;
    cudaStream_t stream;
    cudaStream_t beside; /* the pass's exchange_stream, or NULL */
    arrays a;
    moe_status status[4];
    char error[4][256];
} seat;

struct group {
    int ranks, transport;
    int padded_rows; /* 0: exact */
    int global;      /* losses of all ranks */
    int branches;    /* shared experts and a residual branch */
    int beside;      /* 1: ranks have an exchange_stream; 2: every other has */
    int chunks;      /* exchange_chunks; 0: the default */
    int nodes;       /* 0: rows go straight; else ranks in turn are on so many; not THROUGH_HOST */
    void (*run)(seat *s);
    moe_world *world, *other;
    device_world *devices, *node_devices[MOST_RANKS], *rail_devices[MOST_RANKS];
    ncclUniqueId id;
    seat seat[MOST_RANKS];
};

/* Keeps the status of a call of the rank as its i-th, with the message. */
moe_status note(seat *s, int i, moe_status status);
/* Gate and `own` experts; branches if the group has them. */
void make_objects(seat *s, int64_t own);
/* A layer of them, and its pass; arrays of `count` tokens from `first` on, and streams. */
void make_layer(seat *s);
void make_arrays(seat *s, int first, int count);
/* Gives the pass the rank's exchange_stream. */
void set_beside(const seat *s, moe_pass *pass);
moe_forward_args forward_args_of(const seat *s, int tokens);
moe_backward_args backward_args_of(const seat *s);
moe_status forward_of(seat *s, int tokens);
moe_status backward_of(seat *s);
moe_status losses_at(seat *s);
/* A forward, a backward, and what follows them. */
void run_step(seat *s);
/* Every rank makes its objects and runs g->run on a thread; they stay until end_group. */
void run_group(group *g);
void end_group(group *g);
/* y, dx and the experts' gradients of every rank are the bytes of one device that has all; with
 * losses of all ranks dx goes through sums over tokens. */
void compare(group *g);
/* Numbers of devices are the same bytes. */
void same(const float *a, const float *b, size_t count);

/* ---- calls in turn, and what was done -------------------------------------------------------- */

/* For g->run, where all ranks meet. */
extern pthread_barrier_t meeting;
void run_with_barrier(group *g);
/* The stream of the calls is waited for: then nothing is left on the exchange_stream. */
void check_joined(const seat *s);
/* The phases of a forward, or of a backward. */
moe_status start_call(seat *s, int backward);
moe_status work_call(seat *s, int backward);
moe_status finish_call(seat *s, int backward);
/* Kernels, products and copies that a stream was given since emu_record_start, from call number
 * `from` on; to_wait: up to its next wait for another stream. No other thread calls anything. */
size_t given(const void *stream, size_t from, int to_wait);
size_t calls_so_far(void);
/* For g->run: two steps; a step, and a forward and backward that are recorded, or captured in a
 * graph that runs twice. */
void run_twice(seat *s);
void run_in_order(seat *s);
void run_captured(seat *s);

#endif
