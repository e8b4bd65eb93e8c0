/* moe/nccl.h - a group of ranks over NCCL.
 *
 * In the library libmoe_nccl (pkg-config moe-nccl), which needs NCCL 2.18 or newer, the CUDA
 * runtime and libmoe_cuda; this header needs none of them: handles are void *. What newer versions
 * of NCCL have is looked up when a communicator is made, so that the host decides which one is
 * loaded.
 *
 *   ranks       those of an ncclComm_t of the host, in its order; its device is the context's. The
 *               host's communicator is never aborted, revoked, finalised or destroyed: with
 *               `duplicate` the group has a communicator of its own, split off it
 *   rows        device memory is sent by grouped ncclSend and ncclRecv on the exchange's stream,
 *               without a copy, and to itself by cudaMemcpyAsync; pairs of ranks without rows send
 *               nothing. Host memory goes through staging of the group, on a stream of its own,
 *               with a note of what is sent and expected: another number of rows or bytes than
 *               expected is found on both sides, and every pair of ranks meets in it. Rows of
 *               device memory have no note: counts must have been agreed on before
 *   waiting     on the host by asking an event and ncclCommGetAsyncError until the deadline;
 *               nothing is synchronised. Host memory of more than 1984 bytes for one rank goes in
 *               rounds, of these bytes first and then of 256 KiB / P for each rank, 8 KiB at least;
 *               all but the last are waited for where the exchange is started. Ordered exchanges
 *               wait for nothing, except that a non-blocking communicator is asked until it has put
 *               the work on the stream
 *   capture     ordered exchanges may be captured in a graph; capture is a collective property:
 *               all ranks capture the same ones, and connections must have been made. An exchange
 *               that would wait is refused with MOE_ERROR_INVALID_STATE if its stream is being
 *               captured; nothing is sent then and the group goes on
 *   missing     after the deadline of host memory those ranks are named from which nothing has
 *               come. The silent ones are among them; since NCCL serves peers in turns, one that
 *               waits behind a silent rank may be named as well. Of device memory and of rounds
 *               after the first they are not known
 *   failure     is not symmetric: NCCL tells no other rank that one gave up. The others find out
 *               at their own deadline, or by an error of NCCL. moe_comm_abort ends the waits of
 *               this rank alone. With `duplicate` it also revokes the group's communicator (aborts
 *               it, before NCCL 2.28.7), so that streams go on, with rows that are undefined;
 *               without, a stream waits until the host aborts its communicator
 *   memory      4 MiB of device memory by cudaMalloc for up to 32 ranks, above that 128 KiB for
 *               each rank; as much pinned memory, and 2 KiB more for each rank; none for one rank.
 *               Allocated at creation, nothing after that. NCCL's own buffers come on top. After a
 *               failure none is freed before the work that may touch it is known to be done: until
 *               then it stays, also when the group is destroyed, or could not be created; a thread
 *               then waits for that, with the group's memory and a reference to the context, and
 *               frees it.
 *               Rows of device memory that are under way are counted in moe_comm_pending_bytes;
 *               rows of host memory are copies in the group's own. If a non-blocking communicator
 *               of the host is still in progress at a deadline, the end is never known, and it
 *               stays for good
 *   ending      moe_comm_destroy waits for what this rank has given to NCCL, and with `duplicate`
 *               for the other ranks to destroy theirs, since NCCL finalises together; neither
 *               longer than the timeout. Graphs that have exchanges of the group are destroyed
 *               before, their executables too: until then NCCL does not end a communicator
 *   order       NCCL serves exchanges of a communicator in the order of the calls, whatever their
 *               streams; the host's own calls on a borrowed communicator are between them, in the
 *               same places on every rank
 *   fork        a child process can destroy a communicator of its parent, and nothing else */
#ifndef MOE_NCCL_H
#define MOE_NCCL_H

#include <moe/comm.h>
#include <moe/context.h>
#include <moe/status.h>
#include <moe/types.h>

MOE_BEGIN_DECLS

/* How a group over NCCL is made. Fill with moe_nccl_config_init, then set `comm`. `duplicate` and
 * `warm_up` are the same on every rank: where they differ creation or the first exchange fails. */
typedef struct moe_nccl_config {
    uint64_t struct_size;
    void *comm;        /* ncclComm_t, blocking or not; the host's. Required. Not used any more after
                          the creation with `duplicate`, else until the group is destroyed or has
                          failed */
    void *stream;      /* cudaStream_t of the context's device for exchanges of host memory, the
                          host's, which outlives the group; default NULL: one of the group's own */
    double timeout;    /* seconds that any wait of the group may take, above 0, at most 1e9; default
                          60. What is read behind an ordered exchange, such as the counts of a
                          layer's forward, is waited for by the context: wait_seconds of
                          moe_cuda_config */
    int32_t duplicate; /* 1: a communicator of the group's own (ncclCommSplit of all ranks, without
                          shared resources, non-blocking); nothing may be under way on `comm` then,
                          or NCCL may hang; default 0 */
    int32_t warm_up;   /* 1 (default): every rank meets every other at creation. 0: the first
                          exchange makes the connections, and on a blocking communicator it
                          blocks in NCCL, whatever the deadline, for as long as a rank does not
                          come */
} moe_nccl_config;

/* Writes every default and the caller's size. Returns as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_nccl_config_init(moe_nccl_config *config, size_t size);

/* Creates a communicator over the ranks of an NCCL communicator; every one of them must make this
 * call. Its capabilities are all of MOE_COMM_*.
 *   comm     out: the new communicator; untouched on error
 *   context  of moe_cuda_context_create, on the device of config->comm; holds a reference
 *   config   required
 * Connections are made on a thread that ends with the call. If the deadline has passed and it is
 * inside NCCL, as happens with a blocking communicator when a rank does not come, the thread is
 * left there with what it holds: the group's memory and a reference to the context. It ends, and
 * gives that back, when NCCL returns, which it does when the host aborts config->comm.
 * Returns MOE_OK or
 *   MOE_ERROR_INVALID_ARGUMENT  also for a context that is not on a GPU, or on another device than
 *                               config->comm: the message has both; and for a config->stream of
 *                               another device
 *   MOE_ERROR_INVALID_STATE     config->stream is being captured
 *   MOE_ERROR_TIMEOUT           not all ranks came
 *   MOE_ERROR_TRANSPORT         NCCL failed, with its words, or another rank has another version of
 *                               this library
 *   MOE_ERROR_DEVICE            CUDA failed; the message has its words
 *   MOE_ERROR_NOT_SUPPORTED     NCCL is older than moe_nccl_oldest_version: the message has both;
 *                               or libmoe is of another version
 *   MOE_ERROR_OUT_OF_MEMORY, MOE_ERROR_SYSTEM (no thread) or an error of the struct's size
 * A rank that fails before the ranks meet does not tell the others. Since 0.1. */
MOE_API moe_status moe_comm_create_nccl(moe_comm **comm, moe_context *context,
                                        const moe_nccl_config *config);

/* Returns the version of NCCL that is loaded, as NCCL writes it: 22809 is 2.28.9. 0 if NCCL does
 * not tell. Since 0.1. */
MOE_API int32_t moe_nccl_version(void);

/* Returns the oldest version of NCCL that can be used: 21800. Since 0.1. */
MOE_API int32_t moe_nccl_oldest_version(void);

MOE_END_DECLS

#endif
