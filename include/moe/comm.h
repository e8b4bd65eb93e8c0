/* moe/comm.h - a group of ranks and its collectives.
 *
 * A communicator is a table of collectives with a deadline. There is the group of one rank, a world
 * of threads in one process, groups over MPI (moe/mpi.h) and NCCL (moe/nccl.h), and over the host's
 * own collectives.
 *
 * Every rank of a group makes the same calls in the same order; no call waits longer than the
 * group's timeout. After a failure a communicator has failed for good: its later calls return
 * MOE_ERROR_TRANSPORT at once, and all that is left is to destroy it. A communicator, and with it
 * all layers made with it, belongs to one thread at a time, moe_comm_abort excepted.
 * docs/expert-parallel.md has the whole picture. */
#ifndef MOE_COMM_H
#define MOE_COMM_H

#include <moe/status.h>
#include <moe/types.h>

MOE_BEGIN_DECLS

/* What a table of collectives can do, as bits. */
enum {
    MOE_COMM_HOST_MEMORY = 1,    /* buffers in host memory */
    MOE_COMM_DEVICE_MEMORY = 2,  /* buffers in device memory */
    MOE_COMM_STREAM_ORDERED = 4, /* work is put on a stream and waits for it */
    MOE_COMM_CAPTURABLE = 8      /* ordered exchanges may be captured in a graph */
};

/* What the test of an exchange tells. */
enum { MOE_COMM_PENDING = 0, MOE_COMM_DONE = 1 };

enum { MOE_COMM_NO_REQUEST = -1 }; /* the request of an ordered exchange: nobody waits for it */

/* Rows from every rank to every rank. Row r of rank p's part is at recv + (recv_begin[p] + r) *
 * row_bytes; what is for rank p is rows send_begin[p] to send_begin[p+1] - 1 of send. All of it
 * stays valid and unchanged until the exchange is done; of an ordered one recv and send until the
 * stream has passed it, and the two begins, which are always the host's, until the call returns.
 * recv and send do not overlap. */
typedef struct moe_exchange {
    uint64_t struct_size;
    void *recv;                /* out: [recv_begin[P]] rows */
    const int64_t *recv_begin; /* in: [P+1] ascending from 0 */
    const void *send;          /* in: [send_begin[P]] rows */
    const int64_t *send_begin; /* in: [P+1] ascending from 0; [2] with to_all */
    int64_t row_bytes;         /* >= 1, the same on every rank */
    int32_t to_all;            /* 1: rows 0 to send_begin[1] - 1 go to every rank; default 0 */
    int32_t memory;            /* of recv and send: MOE_COMM_HOST_MEMORY or MOE_COMM_DEVICE_MEMORY;
                                  default 0: of the host */
    void *stream;              /* of the context's device: a table with MOE_COMM_STREAM_ORDERED
                                  sends rows of device memory behind what is on it, others do not
                                  read it; default NULL: the device's legacy default stream */
    int32_t ordered;           /* 1: nobody waits: what is put on the stream later finds the rows
                                  there. For device memory on a table with MOE_COMM_STREAM_ORDERED;
                                  default 0 */
    int32_t reserved;          /* 0 */
} moe_exchange;

/* The functions of a table of collectives; see moe_collectives. */
typedef int32_t (*moe_exchange_start_fn)(void *user, const moe_exchange *exchange, void **request);
typedef int32_t (*moe_exchange_test_fn)(void *user, void *request, int32_t *done);
typedef int64_t (*moe_exchange_cancel_fn)(void *user, void *request);
typedef void (*moe_exchange_missing_fn)(void *user, void *request, uint8_t *missing);
typedef int32_t (*moe_comm_poll_fn)(void *user);
typedef void (*moe_comm_user_fn)(void *user);

/* Answers of exchange_start and exchange_test other than 0 that are no plain failure. */
enum {
    MOE_COMM_REFUSED = -1000, /* of start: nothing was sent and the communicator goes on, as when a
                                 stream is being captured: MOE_ERROR_INVALID_STATE */
    MOE_COMM_LATE = -1001     /* a wait inside the function took `timeout`: MOE_ERROR_TIMEOUT, which
                                 ends the communicator; *request is set unless ordered */
};

/* The host's collectives. A function returns 0, MOE_COMM_REFUSED or MOE_COMM_LATE where these are
 * possible, or anything else for a failure, which ends the communicator. None may wait for longer
 * than `timeout` of the table. */
typedef struct moe_collectives {
    uint64_t struct_size;
    void *user;            /* handed to all */
    int32_t rank;          /* of this process, 0 to size - 1 */
    int32_t size;          /* P >= 1 */
    uint64_t capabilities; /* MOE_COMM_*; must have MOE_COMM_HOST_MEMORY */
    double timeout;        /* seconds that any wait may take, > 0; default 60 */
    /* Starts an exchange; *request is handed to test until that says MOE_COMM_DONE. At most
     * MOE_COMM_REQUESTS are in flight. An exchange of device memory is handed to a table with
     * MOE_COMM_DEVICE_MEMORY only, an ordered one to a table with MOE_COMM_STREAM_ORDERED only:
     * that one is never tested nor cancelled, and *request is not read. Required. */
    moe_exchange_start_fn exchange_start;
    /* *done = MOE_COMM_DONE or MOE_COMM_PENDING, without waiting. Required. */
    moe_exchange_test_fn exchange_test;
    /* Gives a request up after a failure, without waiting long. Returns the bytes of memory that
     * the transport may still touch, of recv, send and its own: 0 if it has let go of all. What it
     * has not let go of is not freed, see moe_comm_pending_bytes; but the two begins may go. NULL:
     * it lets go of nothing. */
    moe_exchange_cancel_fn exchange_cancel;
    /* Which ranks a request still waits for: missing[p] = 1, else 0. For messages; may be NULL. */
    moe_exchange_missing_fn missing;
    /* Returns 0 while all is well, without waiting. May be NULL. */
    moe_comm_poll_fn poll;
    /* Makes the other ranks' waits end with a failure. Any thread, any number of times. May be
     * NULL. */
    moe_comm_user_fn abort;
    /* The communicator is gone. May be NULL. */
    moe_comm_user_fn release;
} moe_collectives;

enum { MOE_COMM_REQUESTS = 8 }; /* most exchanges in flight on a communicator */

/* Write every default and the caller's size. Return as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_collectives_init(moe_collectives *collectives, size_t size);
/* The same for an exchange. Since 0.1. */
MOE_API moe_status moe_exchange_init(moe_exchange *exchange, size_t size);

/* Creates a communicator over the host's collectives.
 *   comm         out: the new communicator; untouched on error
 *   context      holds a reference
 *   collectives  copied; `user` is the host's until `release`
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT, MOE_ERROR_OUT_OF_MEMORY or an error of the struct's
 * size. Nothing is exchanged. Since 0.1. */
MOE_API moe_status moe_comm_create(moe_comm **comm, moe_context *context,
                                   const moe_collectives *collectives);

/* Creates the group of one rank.
 *   comm     out: the new group; untouched on error
 *   context  holds a reference
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT or MOE_ERROR_OUT_OF_MEMORY. Since 0.1. */
MOE_API moe_status moe_comm_create_self(moe_comm **comm, moe_context *context);

/* Creates a world of `size` ranks in this process: each rank is a communicator of its own, made by
 * moe_comm_create_in_world, for a thread of the host.
 *   world    out: the new world; untouched on error
 *   context  holds a reference
 *   size     1 to 4096
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT, MOE_ERROR_OUT_OF_MEMORY, MOE_ERROR_SYSTEM. Since
 * 0.1. */
MOE_API moe_status moe_world_create(moe_world **world, moe_context *context, int32_t size);

/* Gives up the program's reference; communicators hold theirs. NULL is legal. Since 0.1. */
MOE_API void moe_world_destroy(moe_world *world);

/* Creates the communicator of one rank of a world.
 *   comm     out: the new communicator; untouched on error
 *   world    holds a reference
 *   context  holds a reference; each rank may have its own
 *   rank     0 to size - 1, each once
 *   timeout  seconds that any wait may take, > 0
 * Waits for nobody. Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT, MOE_ERROR_INVALID_STATE if the rank
 * is taken, MOE_ERROR_OUT_OF_MEMORY. Since 0.1. */
MOE_API moe_status moe_comm_create_in_world(moe_comm **comm, moe_world *world, moe_context *context,
                                            int32_t rank, double timeout);

/* Gives up the program's reference. NULL is legal. Since 0.1. */
MOE_API void moe_comm_destroy(moe_comm *comm);

/* Returns the number of this rank, from 0; -1 for NULL. Since 0.1. */
MOE_API int32_t moe_comm_rank(const moe_comm *comm);

/* Returns the number of ranks; 0 for NULL. Since 0.1. */
MOE_API int32_t moe_comm_size(const moe_comm *comm);

/* Returns MOE_COMM_* bits; 0 for NULL. Since 0.1. */
MOE_API uint64_t moe_comm_capabilities(const moe_comm *comm);

/* Exchanges rows, waiting until done.
 *   exchange  see moe_exchange; pointers may be NULL where there are no rows. An ordered one is on
 *             its stream when the call returns
 * Returns MOE_OK or
 *   MOE_ERROR_INVALID_ARGUMENT  nothing was sent; also for a memory or an order that the table's
 *                               capabilities lack, and for recv and send that overlap
 *   MOE_ERROR_OVERFLOW          the bytes do not fit in 63 bits; nothing was sent
 *   MOE_ERROR_TIMEOUT           the message names the ranks that did not come
 *   MOE_ERROR_TRANSPORT         a rank gave up, sent another number of rows or bytes than expected
 *                               here (the message has both), or this communicator had failed
 *   MOE_ERROR_INVALID_STATE     the transport refused it, as in a stream that is being captured;
 *                               nothing was sent
 * Since 0.1. */
MOE_API moe_status moe_comm_exchange(moe_comm *comm, const moe_exchange *exchange);

/* Starts an exchange that is finished by moe_comm_exchange_finish, so that work overlaps.
 *   request  out: its number on this communicator; MOE_COMM_NO_REQUEST of an ordered exchange
 * Returns as moe_comm_exchange; MOE_ERROR_INVALID_STATE if MOE_COMM_REQUESTS are in flight. Since
 * 0.1. */
MOE_API moe_status moe_comm_exchange_start(moe_comm *comm, const moe_exchange *exchange,
                                           int32_t *request);

/* Tells whether an exchange is done, without waiting. done: out: MOE_COMM_DONE or MOE_COMM_PENDING.
 * A request that is done is gone; MOE_COMM_NO_REQUEST is always done. Returns as moe_comm_exchange;
 * MOE_ERROR_INVALID_ARGUMENT also for a number that is no request. Since 0.1. */
MOE_API moe_status moe_comm_exchange_test(moe_comm *comm, int32_t request, int32_t *done);

/* Waits until an exchange is done. Returns as moe_comm_exchange_test. Since 0.1. */
MOE_API moe_status moe_comm_exchange_finish(moe_comm *comm, int32_t request);

/* The same bytes from every rank to every rank: block p of recv is what rank p sent for this rank.
 *   recv, send  [P * bytes]
 * Returns as moe_comm_exchange. Since 0.1. */
MOE_API moe_status moe_comm_all_to_all(moe_comm *comm, void *recv, const void *send, int64_t bytes);

/* Rows of every rank on every rank.
 *   recv        out: [recv_begin[P]] rows
 *   recv_begin  in: [P+1] ascending from 0; recv_begin[r+1] - recv_begin[r] rows are this rank's
 *               own
 *   send        in: those
 * Returns as moe_comm_exchange. Since 0.1. */
MOE_API moe_status moe_comm_all_gather(moe_comm *comm, void *recv, const int64_t *recv_begin,
                                       const void *send, int64_t row_bytes);

/* Waits until every rank has made this call. Returns as moe_comm_exchange. Since 0.1. */
MOE_API moe_status moe_comm_barrier(moe_comm *comm);

/* Returns MOE_OK, or MOE_ERROR_TRANSPORT if the communicator or another rank has failed, as far as
 * is known here. Waits for nothing. Since 0.1. */
MOE_API moe_status moe_comm_poll(moe_comm *comm);

/* Makes the waits of all ranks end with MOE_ERROR_TRANSPORT. Any thread; NULL is legal. Since
 * 0.1. */
MOE_API void moe_comm_abort(moe_comm *comm);

/* Returns the bytes of memory that requests given up still own, because the transport cannot
 * withdraw them. Buffers of the library among them stay allocated for good; the host must not free
 * its own before its transport has ended. 0 for NULL. Since 0.1. */
MOE_API int64_t moe_comm_pending_bytes(const moe_comm *comm);

MOE_END_DECLS

#endif
