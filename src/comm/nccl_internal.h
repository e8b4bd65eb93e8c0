/* nccl_internal.h - what the files of libmoe_nccl share: the group, its exchanges, the device's
 * scope. Of CUDA and NCCL only what their oldest supported versions have; the rest is looked up. */
#ifndef MOE_NCCL_INTERNAL_H
#define MOE_NCCL_INTERNAL_H

#include <nccl.h>

#include "internal.h"
#include "module.h"

#include <moe/cuda.h>
#include <moe/nccl.h>
#include <pthread.h>
#include <sys/types.h>

#if NCCL_VERSION_CODE < 21800
#error "libmoe_nccl needs the headers of NCCL 2.18 or newer"
#endif

enum {
    MOE__NCCL_OLDEST = 21800,
    MOE__NCCL_FRAME = 2048,    /* bytes of the first message of a pair: a note and what fits */
    MOE__NCCL_PIECE = 8192,    /* least bytes of a pair in a later round */
    MOE__NCCL_STAGING = 262144 /* bytes of a round to all ranks, if that is more */
};

/* What a rank says of the rows that it sends; the head of a frame. */
typedef struct moe__nccl_note {
    uint64_t protocol; /* of this library */
    int64_t number;    /* of the exchange, counted by every rank alike */
    int64_t rows, expected, row_bytes, reserved[3];
} moe__nccl_note;

enum { MOE__NCCL_INLINE = MOE__NCCL_FRAME - (int)sizeof(moe__nccl_note) };

/* One exchange, or one round of it: bytes for rank p at send + send_at[p], from it at recv +
 * recv_at[p], on the device. */
typedef struct moe__nccl_group moe__nccl_group;
typedef struct moe__nccl_exchange {
    moe__nccl_group *group;
    moe_exchange e;
    int64_t number, round, last_round;
    double deadline;
    const char *send;
    char *recv;
    int64_t *send_at, *send_bytes, *recv_at, *recv_bytes; /* [P] */
    char *pinned_send, *pinned_recv, *staged_send, *staged_recv;
    cudaEvent_t done;
    bool on_host;  /* rows of host memory */
    bool together; /* their first round is one ncclAlltoAll, else sends and receives */
    bool recorded; /* done tells when the round is over; else nothing was put on the stream */
    bool posted;   /* NCCL has something of it */
    bool bad;      /* not all of it could be put there */
    bool active;
} moe__nccl_exchange;

enum { MOE__NCCL_MEETING, MOE__NCCL_MET, MOE__NCCL_LEFT };

struct moe__nccl_group {
    moe_context *context;
    ncclComm_t nccl;     /* NULL: aborted */
    bool owned;          /* it is a duplicate */
    bool own_stream;     /* the next is the group's */
    cudaStream_t stream; /* of host memory */
    cudaStream_t side;   /* looks into staging while `stream` is stuck */
    int32_t device, rank, size;
    double timeout;
    pid_t process;        /* that made it */
    int64_t next;         /* number of the next exchange */
    int64_t piece;        /* bytes of a pair in a later round */
    pthread_mutex_t lock; /* around calls of NCCL on the communicator */
    atomic_bool wanted;   /* it is to be aborted by whoever has the lock */
    atomic_bool aborted;
    bool in_progress; /* as far as is known: a call that does not block */
    bool unsettled;   /* NCCL may still put work on a stream, and must be left alone */
    moe__nccl_exchange exchange[MOE_COMM_REQUESTS + 1]; /* the last for ordered ones */
    char *pinned, *staged;                              /* all staging */
    char *peek;                                         /* [P,FRAME] of pinned */
    int64_t pinned_bytes, staged_bytes, memory_bytes;
    void *memory;     /* of the host: the exchanges' arrays */
    int64_t *no_rows; /* [P+1] zeros */
    cudaEvent_t last; /* of all that NCCL has, whichever streams it is on */
    bool last_recorded;
    ncclResult_t (*revoke)(ncclComm_t comm, int flags); /* NULL before 2.28.7 */
    ncclResult_t (*all_to_all)(const void *send, void *recv, size_t count, ncclDataType_t type,
                               ncclComm_t comm, cudaStream_t stream); /* NULL before 2.28.3 */
    /* The thread of the creation. */
    atomic_int meeting; /* whether it or the caller has come to the end first */
    double deadline;
    bool duplicate, warm_up;
    bool splitting; /* given up while NCCL makes the next */
    ncclComm_t split;
    int32_t answer;
    char why[400];
};

/* ---- nccl_device.c --------------------------------------------------------------------------- */

/* The group's device is the thread's until leave, and work beside a capture of the thread is
 * allowed; an error of the host's own that it has not asked for stays. False: then no leave. */
typedef struct moe__nccl_scope {
    int previous;
    enum cudaStreamCaptureMode mode;
    cudaError_t host_error, error;
} moe__nccl_scope;
bool moe__nccl_enter(const moe__nccl_group *g, moe__nccl_scope *scope);
/* The same by the owner: says why not. */
bool moe__nccl_enter_call(moe__nccl_group *g, moe__nccl_scope *scope);
void moe__nccl_leave(const moe__nccl_scope *scope);

double moe__nccl_seconds(void);
/* Between two questions. */
void moe__nccl_rest(double waited);

/* Write g->why and return 1. */
int32_t moe__nccl_say_cuda(moe__nccl_group *g, const char *call, cudaError_t error);
int32_t moe__nccl_say(moe__nccl_group *g, const char *call, ncclResult_t result);

/* Whether the host's stream takes work of the group's device: an event of that says so. It is not
 * being captured. */
bool moe__nccl_has_stream(const moe__nccl_group *g);
/* Streams, events, staging; a failure leaves what there is to moe__nccl_unequip. */
cudaError_t moe__nccl_equip(moe__nccl_group *g);
/* Frees them. */
void moe__nccl_unequip(moe__nccl_group *g);
/* Whether all that was put on streams is done; asks for `wait` seconds. */
bool moe__nccl_is_idle(moe__nccl_group *g, double wait);
/* ELSEWHERE: the legacy stream, while another one is being captured. */
enum { MOE__NCCL_NOT_CAPTURED, MOE__NCCL_CAPTURED, MOE__NCCL_ELSEWHERE };
cudaError_t moe__nccl_captured(cudaStream_t stream, int *captured);

/* ---- nccl_frames.c --------------------------------------------------------------------------- */

static inline int64_t moe__nccl_rows_to(const moe_exchange *e, int32_t p)
{
    return e->to_all ? e->send_begin[1] : e->send_begin[p + 1] - e->send_begin[p];
}
static inline int64_t moe__nccl_rows_from(const moe_exchange *e, int32_t p)
{
    return e->recv_begin[p + 1] - e->recv_begin[p];
}
static inline const char *moe__nccl_sent(const moe_exchange *e, int32_t p)
{
    return (const char *)e->send + (e->to_all ? 0 : e->send_begin[p]) * e->row_bytes;
}
static inline char *moe__nccl_received(const moe_exchange *e, int32_t p)
{
    return (char *)e->recv + e->recv_begin[p] * e->row_bytes;
}

/* Rounds that rows of host memory take on this rank, less one. */
int64_t moe__nccl_last_round(const moe__nccl_exchange *x);
/* Lays out one round and writes what it sends to pinned memory. */
void moe__nccl_pack(moe__nccl_exchange *x);
/* Reads what has come in pinned memory; 1 if it is not what is expected here. */
int32_t moe__nccl_unpack(moe__nccl_exchange *x);
/* Whether a frame is of this exchange. */
bool moe__nccl_has_come(const moe__nccl_exchange *x, const char *frame);

/* ---- nccl_calls.c ---------------------------------------------------------------------------- */

/* The communicator is this thread's between begin and end; false if the group has given up. */
bool moe__nccl_begin(moe__nccl_group *g);
void moe__nccl_end(moe__nccl_group *g);
void moe__nccl_abort(void *user);
/* *state: ncclSuccess or ncclInProgress; anything else is g->why and 1. */
int32_t moe__nccl_ask(moe__nccl_group *g, ncclResult_t *state);
/* Asks until the communicator has done what was put on it without blocking. Returns 0, 1 or
 * MOE_COMM_LATE. */
int32_t moe__nccl_settle(moe__nccl_group *g, double deadline);
/* Sends and receives what is laid out. Returns as settle. */
int32_t moe__nccl_post(moe__nccl_exchange *x, cudaStream_t stream);

/* ---- nccl_end.c ------------------------------------------------------------------------------ */

/* As enter_call, of a thread of the library. Its device stays: to go back to device 0 would make a
 * context there. */
bool moe__nccl_enter_thread(moe__nccl_group *g, moe__nccl_scope *scope);
/* Signals are for the host's threads. Returns as pthread_create. */
int moe__nccl_start_thread(pthread_t *thread, void *(*body)(void *), moe__nccl_group *g);
/* The group is gone; what NCCL may still touch stays until it is done, with a thread that waits. */
void moe__nccl_end_group(moe__nccl_group *g);

/* ---- nccl_exchange.c ------------------------------------------------------------------------- */

/* Meets every other rank, no later than the deadline. */
int32_t moe__nccl_meet(moe__nccl_group *g, double deadline);

int32_t moe__nccl_start(void *user, const moe_exchange *exchange, void **request);
int32_t moe__nccl_test(void *user, void *request, int32_t *done);
int64_t moe__nccl_cancel(void *user, void *request);
void moe__nccl_missing(void *user, void *request, uint8_t *missing);
int32_t moe__nccl_poll(void *user);

#endif
