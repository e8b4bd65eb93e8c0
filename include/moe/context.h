/* moe/context.h - where work runs: backend, threads, instruction set, allocator, log.
 *
 * A program normally makes one context and gives it to every object it creates. The library has no
 * other global state. */
#ifndef MOE_CONTEXT_H
#define MOE_CONTEXT_H

#include <moe/status.h>
#include <moe/types.h>

MOE_BEGIN_DECLS

enum {
    MOE_BACKEND_CPU = 0, /* host memory, CPU threads; always available */
    MOE_BACKEND_CUDA = 1 /* an NVIDIA GPU; MOE_ERROR_NOT_SUPPORTED in this build */
};

/* Instruction sets of the CPU backend. Results are the same bytes with each of them. */
enum {
    MOE_ISA_AUTO = 0,  /* the best this machine can run */
    MOE_ISA_PLAIN = 1, /* portable C; slow where the baseline has no fused multiply-add */
    MOE_ISA_AVX2 = 2,  /* x86-64 with AVX2 and FMA */
    MOE_ISA_AVX512 = 3 /* x86-64 with AVX-512 F, VL, BW and DQ */
};

enum { MOE_LOG_ERROR = 0, MOE_LOG_WARNING = 1, MOE_LOG_INFO = 2, MOE_LOG_DEBUG = 3 };

/* Gives `size` bytes (size > 0) aligned to `alignment`, a power of two from 16 to 4096, or NULL if
 * there are none. Called from the thread that called the library, and must not call it back. */
typedef void *(*moe_alloc_fn)(void *user, uint64_t size, uint64_t alignment);

/* Takes back memory of the matching moe_alloc_fn; never called with NULL. `size` is as
 * allocated. Must not call the library. */
typedef void (*moe_free_fn)(void *user, void *memory, uint64_t size);

/* One unit of parallel work, to be called by a host's moe_parallel_fn. */
typedef void (*moe_task_fn)(void *argument, int64_t index);

/* Calls task(argument, i) once for every i in [0, count), in any order, on any threads, one after
 * the other or at once, and returns when all have returned: 0, or another number to report that
 * something failed (the calling library function then returns MOE_ERROR_CALLBACK with that number
 * in its message). Tasks never call the library's public functions and do not wait for each
 * other. */
typedef int32_t (*moe_parallel_fn)(void *user, int64_t count, moe_task_fn task, void *argument);

/* Receives one line of text without a newline. May be called from any thread that is in a call of
 * this context, never from the library's workers. Must not call the library. */
typedef void (*moe_log_fn)(void *user, int32_t level, const char *text);

/* How a context is made. Fill with moe_context_config_init, then change what you need. */
typedef struct moe_context_config {
    uint64_t struct_size;
    int32_t backend;    /* MOE_BACKEND_*; default MOE_BACKEND_CPU */
    int32_t isa;        /* MOE_ISA_*, the most that may be used; default MOE_ISA_AUTO. One that
                           this machine cannot run is refused with MOE_ERROR_NOT_SUPPORTED */
    int32_t threads;    /* how many tasks run at once, the caller's thread included, up to 4096;
                           default 0: as many as the affinity mask and the cgroup's CPU quota
                           allow. With `parallel` it says how many the host runs and must be
                           given */
    int32_t log_level;  /* MOE_LOG_*: what is passed to `log`; default MOE_LOG_WARNING */
    moe_alloc_fn alloc; /* default NULL: the C library. Given together with `free` or not at all */
    moe_free_fn free;
    void *alloc_user;         /* handed to both */
    moe_parallel_fn parallel; /* default NULL: the library's own threads, started at the first
                                 use, parked when idle, all signals blocked, made anew in a
                                 forked child */
    void *parallel_user;
    moe_log_fn log; /* default NULL: nothing is logged */
    void *log_user;
} moe_context_config;

/* Writes every default and the caller's size.
 *   config  out: `size` bytes
 *   size    sizeof *config
 * Returns MOE_OK; MOE_ERROR_INVALID_ARGUMENT for NULL, MOE_ERROR_STRUCT_TOO_OLD or
 * MOE_ERROR_STRUCT_SIZE for a size that no release had, with nothing written. Since 0.1. */
MOE_API moe_status moe_context_config_init(moe_context_config *config, size_t size);

/* Creates a context.
 *   context  out: the new context; untouched on error
 *   config   NULL for all defaults
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT, MOE_ERROR_NOT_SUPPORTED, MOE_ERROR_OUT_OF_MEMORY or
 * an error of the struct's size. Threads are started later, by the first call with work for them;
 * if the system refuses one then, the call goes on with fewer. Since 0.1. */
MOE_API moe_status moe_context_create(moe_context **context, const moe_context_config *config);

/* Gives up the program's reference. The context ends when nothing made from it is left; its threads
 * are joined then. NULL is legal. Since 0.1. */
MOE_API void moe_context_destroy(moe_context *context);

/* Returns the number of tasks that run at once, the caller's thread included; 0 for NULL. Since
 * 0.1. */
MOE_API int32_t moe_context_threads(const moe_context *context);

/* Returns MOE_ISA_PLAIN, MOE_ISA_AVX2 or MOE_ISA_AVX512, what the context uses; 0 for NULL.
 * Since 0.1. */
MOE_API int32_t moe_context_isa(const moe_context *context);

/* Returns the context's MOE_BACKEND_*; -1 for NULL. Since 0.1. */
MOE_API int32_t moe_context_backend(const moe_context *context);

MOE_END_DECLS

#endif
