/* recorder.h - what tests ask of the emulator: what was called, what shall fail, what was moved.
 *
 * Exported by the fake libcudart; a program that links the real one cannot use it. All functions
 * may be called from any thread and synchronise nothing. */
#ifndef EMU_RECORDER_H
#define EMU_RECORDER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- calls ----------------------------------------------------------------------------------- */

enum emu_kind {
    EMU_CALL_LAUNCH,    /* a kernel */
    EMU_CALL_GEMM,      /* a product of the fake cuBLAS */
    EMU_CALL_TO_DEVICE, /* copies by direction; managed memory counts as the device's */
    EMU_CALL_FROM_DEVICE,
    EMU_CALL_ON_DEVICE,
    EMU_CALL_ON_HOST,
    EMU_CALL_SET,         /* cudaMemset */
    EMU_CALL_SYNCHRONIZE, /* of a device, a stream or an event; blocking copies too */
    EMU_CALL_QUERY,       /* of a stream or an event */
    EMU_CALL_RECORD,      /* of an event */
    EMU_CALL_WAIT,        /* of a stream for an event */
    EMU_CALL_ALLOCATE,    /* device and managed memory */
    EMU_CALL_FREE,
    EMU_CALL_ALLOCATE_HOST,
    EMU_CALL_FREE_HOST,
    EMU_CALL_OBJECT, /* streams, events, graphs, handles: made and destroyed */
    EMU_CALL_GRAPH,  /* a graph launched */
    EMU_CALL_HOST_FUNCTION,
    EMU_CALL_NCCL, /* a transfer of the fake NCCL put on its stream, a call that makes or ends one's
                      communicator: nccl_fake.h */
    EMU_CALL_KINDS
};

struct emu_call {
    enum emu_kind kind;
    const char *name; /* the kernel's, or the function's */
    const void *stream;
    size_t bytes;
    const void *to, *from;
    int device;
    /* Of NCCL's calls, else 0: the communicator, the rank in it, the other side or root or -1, and
     * the group, counted by the rank from 1, of which the call was a part. */
    const void *comm;
    int rank, peer;
    uint64_t group;
};

/* Counters and the list start at zero; the list grows between start and stop. */
void emu_record_start(void);
void emu_record_stop(void);
/* The list, valid until the next emu_record_start. */
size_t emu_calls(const struct emu_call **list);
/* Counted since emu_record_start. */
uint64_t emu_count(enum emu_kind kind);
uint64_t emu_count_bytes(enum emu_kind kind);
const char *emu_kind_name(enum emu_kind kind);

/* What the stream has done since emu_record_start: kernels, products, copies and NCCL's operations,
 * which are "nccl", with this name; NULL: all of them. */
size_t emu_ran(const void *stream, const char *name);

/* ---- faults ---------------------------------------------------------------------------------- */

/* The n-th call from now (1 is the next) of the function fails with the error, a cudaError_t or
 * cublasStatus_t, once. The name is the function's, "kernel" for launches. n = 0 takes it back.
 * MOE_EMULATION_FAIL="cudaMalloc:3,kernel:1:719" does the same at the start. */
void emu_fail(const char *function, int n, int error);
/* The n-th kernel from now faults while it runs: later calls give cudaErrorIllegalAddress. */
void emu_fail_kernel(int n);
/* Takes back all faults and heals the devices, which a program cannot do on a real one. */
void emu_heal(void);

/* Called instead of abort() at a mistake in a kernel or a launch. The kernel is then given up and
 * the device has a sticky cudaErrorLaunchFailure. NULL: abort again. */
void emu_on_mistake(void (*handler)(const char *message));
/* The last refusal or mistake, "" when there was none. */
const char *emu_last_message(void);

/* Allocations of this kind that are not freed: 0 device and managed, 1 pinned. */
size_t emu_live_allocations(int pinned);
/* Streams, events and graphs that are not destroyed. */
size_t emu_live_objects(void);

/* Starts the random choices anew, as MOE_EMULATION_SEED does. */
void emu_set_seed(uint64_t seed);

/* ---- kernels --------------------------------------------------------------------------------- */

/* The kernels of the program, launched or not: 0 at the end, else 1 with the name and launches. */
int emu_kernel(size_t index, const char **name, uint64_t *launches);

/* ---- traffic: programs of the traffic flavour only ------------------------------------------- */

struct emu_traffic {
    const char *kernel;
    uint64_t launches;
    uint64_t bytes_read, bytes_written;       /* of global memory, by all threads */
    uint64_t sectors_read, sectors_written;   /* of 32 bytes, a warp's access counted once */
    uint64_t distinct_read, distinct_written; /* sectors of a launch, each counted once */
};

void emu_traffic_reset(void);
/* 0 past the last kernel, else 1 with its sums. */
int emu_traffic(size_t index, struct emu_traffic *out);

#ifdef __cplusplus
}
#endif

#endif
