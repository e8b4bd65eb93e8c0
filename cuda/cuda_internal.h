/* cuda_internal.h - what the host files of cuda/ share: a context's and a pass's own things, the
 * wait, memory. C11, host code. */
#ifndef MOE_CUDA_INTERNAL_H
#define MOE_CUDA_INTERNAL_H

#include "backend_cuda.h"
#include "module.h"

#include <moe/cuda.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>

/* Pinned memory for copies of any size, piece by piece. */
typedef struct moe__cuda_staging {
    char *pinned;
    int64_t bytes;
    cudaEvent_t done; /* of the last copy */
    bool busy;        /* which has not been waited for */
} moe__cuda_staging;

/* Streams that calls have used, so that memory goes back to a host's allocator when their work is
 * done. */
enum { MOE__CUDA_STREAMS = 16 };
typedef struct moe__cuda_use {
    void *stream;
    cudaEvent_t done;
    bool used;
} moe__cuda_use;

typedef struct moe__cuda_context {
    int32_t device;
    bool tf32, check_pointers;
    int64_t cublas_workspace_bytes;
    double wait_seconds;
    moe_cuda_alloc_fn alloc;
    moe_cuda_free_fn free;
    void *alloc_user;
    moe_alloc_fn host_alloc; /* of this struct */
    moe_free_fn host_free;
    void *host_user;
    pid_t process;       /* that made it */
    atomic_int failed;   /* cudaError_t the device cannot recover from; 0: none */
    cudaStream_t stream; /* the context's own, for fresh memory; waits for nothing */
    pthread_mutex_t mutex;
    moe__cuda_staging staging; /* of calls outside of a pass; under the mutex, as the next */
    moe__cuda_use use[MOE__CUDA_STREAMS];
} moe__cuda_context;

/* Pinned memory of copies to the device that nobody waits for, in turn. */
enum { MOE__CUDA_PUTS = 4 };

/* The rows of each expert of one plan, on the host. */
enum { MOE__CUDA_PLANS = 4 };
typedef struct moe__cuda_plan_counts {
    const int64_t *expert_begin; /* the key: the plan's array; NULL: free */
    int64_t experts;
    int64_t *pinned; /* [experts+1] */
    int64_t room;
    cudaEvent_t done;
    int32_t under_way; /* 1: the copy has not been waited for */
    uint64_t turn;     /* of its last use */
} moe__cuda_plan_counts;

/* Arguments of a grouped product on the host: arrays of one block. */
typedef struct moe__cuda_group_arrays {
    const void **x, **y;
    void **c;
    cublasOperation_t *op_x, *op_y;
    int *m, *n, *k, *ld_x, *ld_y, *ld_c, *size;
    float *alpha, *beta;
} moe__cuda_group_arrays;

typedef struct moe__cuda_pass {
    moe_context *context;
    moe__cuda_context *c;
    cublasHandle_t cublas;
    void *workspace;
    bool on_stream; /* cublas works on `stream` */
    void *stream;
    moe_cuda_pass_config host; /* what the host gave; NULL fields: nothing */
    moe__cuda_staging staging;
    moe__cuda_staging put[MOE__CUDA_PUTS];
    uint64_t puts;  /* so far */
    int64_t *noted; /* pinned: a word that came from the device */
    moe__cuda_plan_counts plan[MOE__CUDA_PLANS];
    uint64_t turn;
    void *groups; /* memory of moe__cuda_group_arrays */
    int64_t group_bytes;
    void *matrix; /* of the device: one matrix whose own strides no product takes */
    int64_t matrix_bytes;
    cudaEvent_t forked;                   /* of the host's exchange_stream; NULL: it has given */
    cudaEvent_t ended[MOE_COMM_REQUESTS]; /* none yet. Ends of exchanges there, in turn: */
    uint32_t ends, joined;                /* those recorded, and those that were joined */
    bool fork_open;                       /* an exchange may be there whose end is not recorded */
} moe__cuda_pass;

static inline moe__cuda_context *moe__cuda_of(const moe__workers *workers)
{
    return (moe__cuda_context *)moe__module_of_context(workers->context);
}

/* ---- context.c ------------------------------------------------------------------------------- */

/* The device of the context is the thread's until leave, and work beside any capture of the thread
 * is allowed. Scopes may be one in another. False: it cannot be; *error says why. No leave then. */
typedef struct moe__cuda_scope {
    const moe__cuda_context *outer; /* of the scope around this one, or NULL */
    int previous;
    enum cudaStreamCaptureMode mode;
} moe__cuda_scope;
bool moe__cuda_enter(const moe__cuda_context *c, moe__cuda_scope *scope, cudaError_t *error);
void moe__cuda_leave(const moe__cuda_scope *scope);
/* The same for a call: an error, and then no leave, also if the context cannot be used. */
moe_status moe__cuda_enter_call(const moe__workers *workers, moe__cuda_scope *scope);
/* Takes back the last error of CUDA, which was of a call here. One from before stays. */
void moe__cuda_forget_error(void);

/* MOE_ERROR_DEVICE if the device has failed or the context is another process's. */
moe_status moe__cuda_check_alive(const moe__workers *workers);
/* Waits for the event, no longer than the context says. */
moe_status moe__cuda_wait(const moe__workers *workers, cudaEvent_t event, const char *what);
/* MOE_ERROR_INVALID_STATE if the stream of the call is being captured. */
moe_status moe__cuda_may_wait(const moe__workers *workers);
cublasComputeType_t moe__cuda_compute_type(const moe__workers *workers, int32_t dtype);
void moe__cuda_context_destroy(void *of_context);

/* ---- memory.c -------------------------------------------------------------------------------- */

void *moe__cuda_memory_alloc(moe_context *context, int64_t bytes, bool zeroed);
void moe__cuda_memory_free(moe_context *context, void *memory, int64_t bytes);
/* The device is the thread's. */
cudaError_t moe__cuda_staging_create(moe__cuda_staging *staging, int64_t bytes);
void moe__cuda_staging_destroy(moe__cuda_staging *staging);
extern const moe__memory moe__cuda_memory;
/* Refuses the stream of a field `name` that is of another device than the context. */
moe_status moe__cuda_check_stream(const moe__workers *workers, const char *name, void *stream);

/* ---- pass.c ---------------------------------------------------------------------------------- */

moe_status moe__cuda_pass_create(moe_context *context, void **of_pass, const char *function);
void moe__cuda_pass_destroy(moe_context *context, void *of_pass);
moe_status moe__cuda_plan_ready(const moe__workers *workers, const moe__plan_arrays *plan,
                                bool wanted);
moe_status moe__cuda_plan_known(const moe__workers *workers, const moe__plan_arrays *plan,
                                const int64_t *expert_begin);
moe_status moe__cuda_note(const moe__workers *workers, const int64_t *word);
int64_t moe__cuda_noted(const moe__workers *workers);
moe_status moe__cuda_put(const moe__workers *workers, void *to, const void *host, int64_t bytes);
/* Room for the arguments of `count` products, until the next call. */
moe_status moe__cuda_group_room(const moe__workers *workers, int64_t count,
                                moe__cuda_group_arrays *arrays);

/* Memory of the device for one matrix, until the next call; kept, so that later calls find it. */
moe_status moe__cuda_matrix_room(const moe__workers *workers, int64_t bytes, void **matrix);

/* ---- exchange_stream.c ----------------------------------------------------------------------- */

/* Refuses what cannot be an exchange_stream; makes what is needed for one. */
moe_status moe__cuda_take_stream(const moe__workers *workers, void *stream);
moe_status moe__cuda_fork(const moe__workers *workers, void **stream);
moe_status moe__cuda_end_fork(const moe__workers *workers);
moe_status moe__cuda_join(const moe__workers *workers, bool all);
/* Whether the exchange_stream has what was not joined. */
static inline bool moe__cuda_is_forked(const moe__cuda_pass *pass)
{
    return pass->fork_open || pass->ends != pass->joined;
}
/* The events of a pass that goes. */
void moe__cuda_drop_events(moe__cuda_pass *pass);

/* ---- table.c --------------------------------------------------------------------------------- */

/* [4] by MOE_DTYPE_* */
extern const moe__backend *const moe__cuda_tables[4];

#endif
