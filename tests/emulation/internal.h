/* internal.h - what the files of the fake libcudart share: the lock, errors, memory, streams.
 *
 * The library is C without sanitizers. Every call of the API takes one lock (emu_enter), so all
 * state below is plain. Device memory is readable only between emu_memory_open and
 * emu_memory_close. */
#ifndef EMU_INTERNAL_H
#define EMU_INTERNAL_H

#include <stdbool.h>

#include "emulator.h"
#include "recorder.h"

#define EMU_DEVICES 8
#define EMU_THREADS 1024
#define EMU_WARP 32
#define EMU_SHARED_PLAIN (48 * 1024)
#define EMU_SHARED_LIMIT (227 * 1024)

/* ---- errors and the lock. errors.c ----------------------------------------------------------- */

enum emu_safety {
    EMU_SAFE,   /* legal while a stream captures */
    EMU_UNSAFE, /* refused while a stream of the thread, or of any in the global mode, captures */
    EMU_QUIET   /* also answers after a sticky error */
};

/* Begins a call: takes the lock, plays the faults, checks what holds for every call. */
cudaError_t emu_enter(const char *name, enum emu_safety safety);
/* Ends it: remembers an error for cudaGetLastError, gives the lock back. */
cudaError_t emu_leave(cudaError_t status);
void emu_lock(void);
void emu_unlock(void);
/* Gives the lock away until something changed, or some milliseconds; memory is to be closed. */
void emu_wait(void);
void emu_notify(void); /* something changed */

/* A call that is refused: the message is kept for emu_last_message. Returns status. */
cudaError_t emu_refuse(cudaError_t status, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
/* A mistake that no correct program makes: prints the message and the seed, and calls the handler
 * or aborts. */
void emu_mistake(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* From now on every call on the device gives the error. */
void emu_make_sticky(int device, cudaError_t status);
cudaError_t emu_sticky(int device);
void emu_clear_sticky(void);

int emu_device_count(void);
int emu_device(void); /* of the calling thread */
void emu_set_device(int device);
bool emu_peers(int device, int other);
bool *emu_in_host_function(void);

/* ---- random numbers. random.c ---------------------------------------------------------------- */

uint64_t emu_seed(void);
uint32_t emu_random(uint32_t below);
bool emu_coin(uint32_t one_in);
bool emu_eager(void);
const char *emu_option(const char *name); /* the environment, NULL when unset or empty */

/* ---- memory. memory.c ------------------------------------------------------------------------ */

enum emu_place { EMU_DEVICE, EMU_PINNED, EMU_MANAGED, EMU_PAGEABLE };

struct emu_allocation {
    unsigned char *begin; /* what the caller has */
    size_t bytes;
    unsigned char *pages; /* with the red zones */
    size_t page_bytes;
    enum emu_place place;
    int device;
    bool freed;
    unsigned char *written;         /* a byte a byte, with traffic only */
    uint32_t *read_by, *written_by; /* the launch that last touched a sector, with traffic only */
};

void *emu_allocate(enum emu_place place, int device, size_t bytes);
/* The allocation around an address, freed ones and their red zones included. */
struct emu_allocation *emu_find(const void *address);
void emu_release(struct emu_allocation *a);
size_t emu_allocated(int device);
bool emu_register_host(void *p, size_t bytes);
bool emu_unregister_host(void *p);
/* PAGEABLE for what is not ours. */
enum emu_place emu_place_of(const void *address);
/* NULL when [p, p + bytes) lies in one live allocation, else what is wrong with it. */
const char *emu_range_fault(const void *p, size_t bytes);
bool emu_is_host_memory(const void *p);
void emu_memory_open(void);
void emu_memory_close(void);
/* Closes it for host code that runs in between, and opens it again. */
int emu_memory_suspend(void);
void emu_memory_resume(int opened);
/* Red zones of all live allocations as they were? What is said when they are not names `what`. */
void emu_check_red_zones(const char *what);
void emu_fill(void *p, size_t bytes);
bool emu_untouched(const void *p, size_t bytes);
void emu_poison(const void *p, size_t bytes);
void emu_unpoison(const void *p, size_t bytes);

/* ---- kernels. registry.c, kernel.c, fiber.c -------------------------------------------------- */

struct emu_kernel {
    const void *address;
    char *name;
    int bound; /* threads of a block at most, 0 unknown */
    size_t shared_allowed;
    uint64_t launched;
};

struct emu_kernel *emu_kernel_of(const void *address);
struct emu_kernel *emu_kernel_at(size_t index); /* NULL past the last */

struct emu_run {
    struct emu_kernel *kernel;
    void (*thread)(const void *kernel, const void *arguments);
    const void *arguments;
    dim3 grid, block;
    size_t shared;
    int device;
};

/* Runs it to the end; false after a mistake that the handler took. */
bool emu_run_kernel(const struct emu_run *run);
/* "kernel k, block (0, 0, 0), thread (1, 0, 0)" while one runs, else NULL. */
const char *emu_where(void);
/* Leaves the running thread, and with it the kernel, after a mistake. */
void emu_give_up(void);
/* Shared memory of a block. shared.c */
void emu_shared_begin(size_t dynamic, size_t allowed);
void emu_shared_end(void);
bool emu_in_shared(const void *p, size_t bytes);

struct emu_fiber {
    void *stack_pointer;
    unsigned char *stack;
    size_t stack_bytes;
    void *tsan, *asan;
    void (*main)(void);
    void *context; /* ucontext_t where there is no switch in assembly */
};

/* Before the threads of a kernel, of at most this many a block, run. */
void emu_fibers_prepare(int count);
/* A fiber that begins in main when it is switched to. Its stack is kept for the next. */
struct emu_fiber *emu_fiber_get(int index, void (*main)(void));
/* From the fiber, or the thread, `from` to `to`. */
void emu_fiber_switch(struct emu_fiber *from, struct emu_fiber *to);
struct emu_fiber *emu_fiber_enter(void);     /* first thing in main; gives the fiber */
void emu_fiber_host(struct emu_fiber *host); /* the calling thread as a fiber */
void emu_fibers_abandon(int count);          /* they will not come back from where they are */
bool emu_threads_sanitized(void);
void emu_acquire(void *p);
void emu_release_to(void *p);
void emu_forget(void *p, size_t bytes); /* TSan: nobody has touched these bytes */
/* 4 or 8 aligned bytes, as one access each way. */
void emu_copy_word(void *to, const void *from, size_t bytes);

/* ---- traffic. traffic.c ---------------------------------------------------------------------- */

bool emu_traffic_on(void);
void emu_traffic_begin(const struct emu_run *run);
void emu_traffic_end(void);
void emu_traffic_block(void);
void emu_traffic_shared(const void *p, size_t bytes);
void emu_mark_written(const void *p, size_t bytes);
void emu_copy_written(const void *to, const void *from, size_t bytes);
bool emu_on_stack(const void *p);

/* ---- streams and graphs. stream.c, progress.c, graph.c --------------------------------------- */

enum emu_step { EMU_BLOCKED, EMU_MOVED, EMU_DONE };

/* Something to run, with the closure it runs on. Shared by a queue and a graph. */
struct emu_work {
    int references;
    bool host; /* runs with device memory closed */
    int device;
    const char *name;
    void (*run)(void *closure);
    /* In place of run, for what may have to wait for others: called again and again until it is
     * done. What one execution needs is in *state, NULL at first and freed by the last call, or by
     * give_up when there is none. */
    enum emu_step (*step)(void *closure, void **state);
    void (*give_up)(void *closure, void *state);
    void (*drop)(void *closure); /* with the last reference; may be NULL */
    size_t bytes;
    _Alignas(16) unsigned char closure[];
};

struct emu_work *emu_work_new(const char *name, void (*run)(void *), const void *closure,
                              size_t bytes);
void emu_work_drop(struct emu_work *work);
/* Not again after EMU_DONE. */
enum emu_step emu_work_step(struct emu_work *work, void **state);

struct emu_graph;
struct emu_capture;

/* A recorded event: done when the record has run. */
struct emu_mark {
    int references;
    bool done;
    double time;
    struct CUstream_st *stream;
    struct emu_capture *capture; /* recorded while capturing: the nodes it stands for */
    int *nodes, node_count;
};

struct emu_item {
    struct emu_item *next;
    uint64_t number;
    struct emu_work *work;
    void *state;
    bool running; /* its work is on the host's stack */
    struct emu_mark *record, *wait;
};

struct CUstream_st {
    struct CUstream_st *next;
    uint32_t magic;
    int device;
    unsigned flags;
    bool legacy, destroyed;
    int waiters;    /* of the host: it may not go */
    int reserved;   /* by a communicator whose call is in progress: nobody may use it */
    uint64_t tried; /* by emu_run_one */
    struct emu_item *head, **tail;
    struct emu_capture *capture;
    int *nodes, node_count; /* the next captured node depends on these */
};

struct CUevent_st {
    struct CUevent_st *next;
    uint32_t magic;
    int device;
    unsigned flags;
    struct emu_mark *mark; /* NULL before the first record */
};

extern struct CUstream_st *emu_streams;
extern uint64_t emu_next_number; /* of the item that is put next */

/* The stream of a handle, or NULL with *status set. */
struct CUstream_st *emu_stream(cudaStream_t handle, cudaError_t *status);
struct CUstream_st *emu_legacy_stream(int device);
bool emu_event_valid(cudaEvent_t event);
void emu_object(int change); /* one more, or one less, that the program has to destroy */
/* Queues the work, or captures it. Owns it from then on. */
cudaError_t emu_put(struct CUstream_st *stream, struct emu_work *work);
cudaError_t emu_put_record(struct CUstream_st *stream, struct CUevent_st *event);
cudaError_t emu_put_wait(struct CUstream_st *stream, struct emu_mark *mark);
void emu_mark_drop(struct emu_mark *mark);

/* Run what is queued: until the stream is empty, the mark is done, the device is idle, or a bit. */
void emu_finish_stream(struct CUstream_st *stream);
void emu_finish_mark(struct emu_mark *mark);
void emu_finish_device(int device);
void emu_jitter(void);
/* Of a random stream that may move, the next thing. False when none may. */
bool emu_run_one(void);
/* Called before anything runs: what else the devices do by themselves. */
void emu_on_progress(void (*hook)(void));
void emu_run_all(void);                   /* that may run */
void emu_sweep(void);                     /* destroyed streams that have nothing left */
cudaError_t emu_kill_streams(int device); /* drops all that is queued, after a sticky error */

bool emu_capture_forbids(void);
void emu_capture_spoil(struct CUstream_st *stream);
cudaError_t emu_capture_work(struct CUstream_st *stream, struct emu_work *work);
cudaError_t emu_capture_record(struct CUstream_st *stream, struct emu_mark *mark);
cudaError_t emu_capture_wait(struct CUstream_st *stream, struct emu_mark *mark);
bool emu_captures(const struct CUstream_st *stream);
/* The legacy stream may not be used while a stream that synchronises with it captures. */
cudaError_t emu_capture_legacy(struct CUstream_st *stream);

/* ---- the recorder. recorder.c ---------------------------------------------------------------- */

void emu_record(enum emu_kind kind, const char *name, const void *stream, size_t bytes,
                const void *to, const void *from);
void emu_record_ran(const char *name, const void *stream);
void emu_record_call(const struct emu_call *call);
cudaError_t emu_fault(const char *name);
bool emu_take_kernel_fault(void);

#endif
