/* nccl_fake.h - what tests ask of the fake libnccl: faults, what is pending, what is left.
 *
 * Exported by it beside NCCL's calls; a program that links the real one cannot use it. Ranks are
 * threads of a process, or processes that got one's ncclUniqueId, or both. A rank's number is the
 * one in the communicator that makes the call, whichever it is; -1 means every rank of the process.
 * All functions may be called from any thread.
 *
 * MOE_EMULATION_NCCL does the same for a process at its start, a list with commas:
 *     fail=RANK:FUNCTION:N:RESULT  async=RANK:N:RESULT  absent=RANK:N  delay=RANK:N:MILLISECONDS
 *     polls=N  share  leaks                     as in fail=1:ncclSend:3:2,polls=4
 * A list item that cannot be read ends the program. */
#ifndef EMU_NCCL_FAKE_H
#define EMU_NCCL_FAKE_H

#include <stddef.h>
#include <stdint.h>

#include <nccl.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- faults ---------------------------------------------------------------------------------- */

/* The n-th call from now (1 is the next) of the function by the rank gives the result and does
 * nothing else, once. In a group that is the call's result and, as with NCCL, the group's. Calls
 * without a communicator, ncclGroupEnd among them, belong to -1. */
void emu_nccl_fail(int rank, const char *function, int n, ncclResult_t result);
/* The n-th operation from now that the rank's stream comes to (a group is one) does not begin, and
 * the rank's communicator has the asynchronous error: nothing of it goes on until it is aborted.
 * The other ranks are told nothing. */
void emu_nccl_async_error(int rank, int n, ncclResult_t result);
/* That operation and all later ones of the rank never begin: everybody's stay pending, and no
 * communicator has an error. */
void emu_nccl_absent(int rank, int n);
/* That operation begins so much later than it could. */
void emu_nccl_delay(int rank, int n, int milliseconds);
/* Each call on a communicator that does not block is in progress until ncclCommGetAsyncError was
 * asked n times; -1, as it is at the start: a call that waits for others once, others now and then
 * by the seed; 0: only as long as it waits for others. */
void emu_nccl_polls(int n);
/* An all-to-all moves nothing before all ranks have begun it; else, as with NCCL, whose all-to-all
 * is a send and a receive of each pair, what two ranks have for each other once both have. */
void emu_nccl_whole(int on);
/* Several ranks may have one device, as on several nodes. */
void emu_nccl_share_device(int allowed);
/* Takes back all of that, environment included. */
void emu_nccl_heal(void);

/* ---- questions ------------------------------------------------------------------------------- */

/* Communicators of the process that are neither destroyed nor aborted. */
size_t emu_nccl_live(void);
/* At the end of the process those are a mistake, which is printed and ends it with abort(). */
void emu_nccl_report_leaks(int on);
/* How often a call had to wait, on the host, until other ranks came to connect: what a warm-up is
 * for. Communicators being made do not count. */
uint64_t emu_nccl_host_waits(void);
/* One line for each rank of the process with an operation that has begun and is not complete: what
 * waits for whom. "" without any. Valid until the next call of this by the thread. */
const char *emu_nccl_pending(void);

#ifdef __cplusplus
}
#endif

#endif
