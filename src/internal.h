/* internal.h - what the files of src/ share: errors, structs of growing size, memory, parallel
 * work, and the objects behind the handles. Includes no CUDA, MPI or NCCL header; src/cpu
 * includes it too. */
#ifndef MOE_INTERNAL_H
#define MOE_INTERNAL_H

#include "backend.h"

#include <fenv.h>
#include <stdatomic.h>

/* ---- structs of growing size (struct.c) ------------------------------------------------------ */

/* One per public struct, each beside the code that owns it. */
extern const moe__struct_info moe__context_config_info, moe__gate_config_info,
    moe__experts_config_info, moe__expert_callbacks_info, moe__layer_config_info,
    moe__pass_config_info, moe__binding_info, moe__parameter_record_info, moe__forward_args_info,
    moe__backward_args_info, moe__losses_info, moe__stats_info, moe__tensor_view_info,
    moe__plan_args_info, moe__plan_view_info, moe__rows_args_info, moe__cost_query_info,
    moe__cost_info, moe__gradient_check_info, moe__gradient_report_info, moe__collectives_info,
    moe__exchange_info;

/* The body of every moe_*_init. */
moe_status moe__struct_init(const moe__struct_info *info, void *instance, size_t size,
                            const char *function);
/* Reads a caller's struct of any legal size into `known` (info->size bytes): defaults first, then
 * what the caller has. known's struct_size becomes info->size. A NULL `from` gives all defaults if
 * `null_ok`, else MOE_ERROR_INVALID_ARGUMENT. */
moe_status moe__struct_read(const moe__struct_info *info, void *known, const void *from,
                            bool null_ok, const char *function);
/* Checks a caller's output struct before work is done, and writes `known` into it (zeroing a longer
 * tail) keeping the caller's struct_size. */
moe_status moe__struct_check_out(const moe__struct_info *info, const void *to,
                                 const char *function);
void moe__struct_write(const moe__struct_info *info, void *to, const void *known);

/* ---- context: memory and parallel work (context.c, pool.c) ----------------------------------- */

typedef struct moe__pool moe__pool;

struct moe_context {
    atomic_int references;
    int32_t backend, isa, threads, log_level;
    moe_alloc_fn alloc;
    moe_free_fn free;
    void *alloc_user;
    moe_parallel_fn parallel; /* NULL: pool */
    void *parallel_user;
    moe_log_fn log;
    void *log_user;
    moe__pool *pool;
    const moe__memory *memory;
    const moe__backend *kernels[4]; /* by dtype; NULL: not supported */
    void *of_context;               /* the backend's */
};

void moe__context_retain(moe_context *context);
/* A context of a module's backend: the host's side of `host` (NULL: defaults), one thread.
 * context_destroy of the memory is called when it ends, not if this fails. */
moe_status moe__context_make(moe_context **context, const moe_context_config *host,
                             const moe__memory *memory, const moe__backend *const kernels[4],
                             void *of_context, const char *function);
/* The host's memory. memory.c */
extern const moe__memory moe__host_memory;
/* What calls outside of a pass give the backend. */
static inline moe__workers moe__workers_of(moe_context *context, const char *function, void *stream)
{
    moe__workers w = {.context = context, .function = function, .stream = stream};
    return w;
}
/* MOE_ERROR_INVALID_ARGUMENT for a stream of a backend that has none. */
moe_status moe__check_stream(const moe_context *context, const void *stream, const char *function);

/* 64-byte aligned memory of the context's allocator; NULL if there is none or bytes <= 0. */
void *moe__alloc(moe_context *context, int64_t bytes);
/* The same, zero-filled; with the default allocator untouched pages stay unmapped. */
void *moe__alloc_zeroed(moe_context *context, int64_t bytes);
void moe__free(moe_context *context, void *memory, int64_t bytes); /* NULL is legal */

#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
void moe__log(const moe_context *context, int32_t level, const char *format, ...);

/* Runs task(argument, i) for i in [0, count), each under the default floating-point environment, on
 * the host's parallel-for or the pool, the calling thread taking part. Work that is cut finer than
 * into context->threads tasks uses an atomic counter in `argument`. count <= 1 runs in place. */
moe_status moe__parallel(moe_context *context, int64_t count, moe_task_fn task, void *argument,
                         const char *function);

/* Splits [0, count) into ranges of at least `grain` and runs body(argument, begin, end) for each.
 * For work where every element is independent. */
typedef void (*moe__range_fn)(void *argument, int64_t begin, int64_t end);
moe_status moe__parallel_range(moe_context *context, int64_t count, int64_t grain,
                               moe__range_fn body, void *argument, const char *function);

/* A public call that computes on the calling thread stands between these two, so that a caller's
 * rounding mode or flush-to-zero changes nothing. */
static inline void moe__fenv_enter(fenv_t *saved)
{
    (void)fegetenv(saved);
    (void)fesetenv(FE_DFL_ENV);
}
static inline void moe__fenv_leave(const fenv_t *saved) { (void)fesetenv(saved); }

static inline const moe__backend *moe__kernels(const moe_context *context, int32_t dtype)
{
    return dtype >= 0 && dtype < 4 ? context->kernels[dtype] : NULL;
}

/* ---- plan (plan.c) --------------------------------------------------------------------------- */

struct moe_plan {
    moe_context *context;
    moe__plan_arrays a;
    void *memory; /* of all arrays; NULL for a plan inside a pass */
    int64_t bytes;
    bool of_pass;
    const moe__workers *workers; /* of its pass, whose stream its arrays are written on; or NULL */
};

/* Takes the arrays of a plan of these sizes out of `arena` and sets the sizes (rows = 0). */
void moe__plan_layout(moe__plan_arrays *plan, moe__arena *arena, int64_t tokens, int64_t entries,
                      int64_t num_experts, int64_t groups, int32_t dtype);
/* Copies everything; `to` has been laid out for from's sizes. */
moe_status moe__plan_copy_arrays(const moe__workers *workers, moe__plan_arrays *to,
                                 const moe__plan_arrays *from);
/* Checks group_begin[groups+1]: from 0 to tokens, ascending. NULL with groups 0 or 1 is good. */
moe_status moe__check_groups(const int64_t *group_begin, int64_t groups, int64_t tokens,
                             const char *function);

/* ---- parameters (parameter.c) ---------------------------------------------------------------- */

/* One parameter of a gate or pool: [E,rows,cols] or, for a vector, [E,cols] or [cols]. */
typedef struct moe__parameter {
    const char *name;
    int64_t shape[MOE_MAX_DIMS];
    int32_t dims;
    int32_t per_expert;             /* 1: the first dimension is the expert */
    int32_t dtype;                  /* of memory of its own */
    int32_t data_dtype, grad_dtype; /* of what is there now */
    int32_t object_dtype;           /* what a binding may have, beside f32: see may_be_f32 */
    int32_t may_be_f32;             /* data of a router whose elements have 16 bits */
    int32_t init_tensor; /* number in the counter of init_parameters, frozen: see parameter.c */
    double init_std;     /* 0: zeros */
    void *own_data, *own_grad; /* memory of the object, or NULL */
    int64_t own_bytes, own_grad_bytes;
    void *data, *grad;             /* element 0, or NULL */
    void **data_each, **grad_each; /* [E] or NULL; point into `lists` */
    void **lists;                  /* [2E] or NULL; kept once allocated */
    int64_t data_stride[MOE_MAX_DIMS], grad_stride[MOE_MAX_DIMS];
    int32_t owned;    /* data is own_data */
    int32_t kind;     /* MOE_KIND_* */
    int32_t sharding; /* MOE_SHARD_* */
    int32_t out_in;   /* 1: [E,out,in] */
    int32_t fused;    /* MOE_GLU_* of W1 and W3, or b1 and b3, in one; 0: it is not fused */
    int32_t panel;    /* in panels, that many columns of a matrix in each (grouped_gemm.h), and
                         stride[0] is an expert's elements; 0: by strides */
} moe__parameter;

enum { MOE__MAX_PARAMETERS = 6 };

typedef struct moe__parameter_list {
    moe_context *context;
    int64_t count;
    int64_t num_experts;
    moe__parameter p[MOE__MAX_PARAMETERS];
    atomic_llong changes; /* of data, that a copy of it must follow */
    int32_t weight_layout;
} moe__parameter_list;

/* Adds one parameter to the list (not allocated yet): a weight, sharded by expert if per_expert. */
moe__parameter *moe__parameter_add(moe__parameter_list *list, const char *name, int32_t per_expert,
                                   int32_t dims, const int64_t *shape, int32_t dtype,
                                   int32_t init_tensor, double init_std);
/* Allocates what `parameters` (MOE_PARAMETERS_*) asks for; on error everything is freed again. */
moe_status moe__parameters_allocate(moe__parameter_list *list, int32_t parameters,
                                    const char *function);
void moe__parameters_free(moe__parameter_list *list);
moe_status moe__parameters_zero_gradients(const moe__workers *workers, moe__parameter_list *list);
/* MOE_ERROR_INVALID_STATE naming the first parameter that has no data. */
moe_status moe__parameters_check_bound(const moe__parameter_list *list, const char *function);
/* Product of the shape, or -1 if it does not fit. */
int64_t moe__parameter_elements(const moe__parameter *p);
/* Elements of its own memory, those between the shape's included; or -1. */
int64_t moe__parameter_stored(const moe__parameter *p);
/* The same memory as [E,panels,elements] if it is in panels; else a copy. */
moe__parameter moe__parameter_as_stored(const moe__parameter *p);
/* Elements from the lowest to the highest place that dimensions first..2 reach with the strides,
 * and the lowest place. */
int64_t moe__parameter_span(const moe__parameter *p, const int64_t *stride, int first,
                            int64_t *lowest);
const moe__parameter *moe__parameter_by_name(const moe__parameter_list *list, const char *name);
/* Whether its data or gradient is what is computed with, rather than 16 bits. */
static inline int32_t moe__parameter_is_wide(const moe__parameter *p, bool gradient)
{
    return !moe__is_half(gradient ? p->grad_dtype : p->data_dtype);
}
/* [each,rows,cols], [rows,cols] or [cols] of its data or gradient. */
moe__matrices moe__parameter_operand(const moe__parameter *p, bool gradient);

/* Which half (0 gate, 1 up) a column of a fused parameter is of, and its column there. */
static inline int64_t moe__column_of_half(int32_t fused, int64_t column, int64_t width,
                                          int32_t *half)
{
    if (fused == MOE_GLU_INTERLEAVED) {
        *half = (int32_t)(column & 1);
        return column >> 1;
    }
    bool second = column >= width;
    *half = second == (fused == MOE_GLU_GATE_UP);
    return second ? column - width : column;
}
/* Where element (j,k) of an expert's [shape[1],shape[2]] lies, from the expert's first. */
static inline int64_t moe__parameter_place(const moe__parameter *p, const int64_t *stride,
                                           int64_t j, int64_t k)
{
    if (!p->panel) return j * stride[1] + k * stride[2];
    int64_t rows = p->shape[p->out_in ? 2 : 1], cols = p->shape[p->out_in ? 1 : 2];
    int64_t row = p->out_in ? k : j, col = p->out_in ? j : k;
    int32_t half = 0, panel = p->panel;
    if (p->fused) col = moe__column_of_half(p->fused, col, cols / 2, &half);
    return col / panel * (rows * MOE__PANEL) + half * panel + row * MOE__PANEL + col % panel;
}

/* ---- what an object lists (listing.c) -------------------------------------------------------- */

enum { MOE__NAME_BYTES = 32 };

/* One parameter of some list, under the name that the listing object has for it. */
typedef struct moe__listed {
    moe__parameter_list *list;
    int64_t index; /* in that list */
    char name[MOE__NAME_BYTES];
} moe__listed;

/* The parameters of an object that is made of others, in the order of its numbering. The lists are
 * the others'. */
typedef struct moe__listing {
    moe__listed *entry;
    int64_t count, room;
} moe__listing;

/* Memory for `room` parameters; none needed for 0. */
moe_status moe__listing_create(moe__listing *listing, moe_context *context, int64_t room,
                               const char *function);
void moe__listing_free(moe__listing *listing, moe_context *context);
/* Adds a list's parameters, or all of another listing, with `prefix` before their names. */
void moe__listing_add(moe__listing *listing, const char *prefix, moe__parameter_list *list);
void moe__listing_add_all(moe__listing *listing, const char *prefix, const moe__listing *from);
int64_t moe__listing_find(const moe__listing *listing, const char *name); /* -1: not there */
static inline moe__parameter *moe__listed_parameter(const moe__listing *listing, int64_t index)
{
    const moe__listed *entry = &listing->entry[index];
    return &entry->list->p[entry->index];
}

/* ---- gate, experts, layer, comm -------------------------------------------------------------- */

struct moe_gate {
    atomic_int references;
    atomic_flag backward_running;
    moe_context *context;
    moe_gate_config config;
    moe__parameter_list parameters;
};

/* An exchange in flight. */
typedef struct moe__request {
    void *handle; /* of the table */
    const void *recv, *send;
    int64_t recv_bytes, send_bytes;
    bool used;
    bool kept; /* given up, and the transport may still touch its memory */
} moe__request;

/* The weights of MOE_STORAGE_PREPACKED once more, in panels: W1 (with W3), W2. storage.c */
typedef struct moe__packed {
    void *data[2]; /* NULL: there is no copy */
    int64_t bytes[2];
    atomic_llong holds; /* of the list's `changes`; another number: it is to be made anew */
    atomic_flag busy;   /* somebody makes it */
} moe__packed;

struct moe_experts {
    atomic_int references;
    atomic_flag backward_running;
    moe_context *context;
    moe_experts_config config;      /* d_out resolved; callbacks are the next field, or NULL */
    moe_expert_callbacks callbacks; /* of MOE_EXPERTS_CALLBACK */
    moe__experts_room room;
    moe__parameter_list parameters;   /* its own: none of a pool of parts */
    moe__listing listing;             /* its own, or the parts' */
    moe_experts *part[MOE_MAX_PARTS]; /* referenced; part[0] is the pool itself, not referenced,
                                         unless it is made of parts */
    int64_t parts;                    /* >= 1 */
    uint8_t *touched;      /* [E] since the last zero_gradients; NULL of a pool of parts */
    int32_t *touched_list; /* [E] the numbers of those, in any order */
    int64_t touched_count;
    moe__packed packed;
    bool made_of_parts;
    bool one_w13; /* W1 and W3 are one parameter, whatever glu_order says of the biases */
};

struct moe_comm {
    atomic_int references;
    moe_context *context;
    int32_t rank, size;
    moe_collectives table;
    const char *(*why)(void *user); /* why a function of a table of the library failed, or NULL */
    atomic_bool failed;
    moe__request request[MOE_COMM_REQUESTS];
    int64_t pending_bytes;
    int64_t *scratch; /* [2 (P + 1)] begins of the simple collectives */
    uint8_t *missing; /* [P] */
};

struct moe_layer {
    atomic_int references;
    moe_context *context;
    moe_layer_config config;
    moe_gate *gate; /* may be NULL */
    moe_experts *experts;
    moe_experts *shared, *residual; /* may be NULL */
    moe_comm *comm;                 /* may be NULL */
    moe__parameter_list parameters; /* its own: shared_gate, residual_mix, residual_mix_bias */
    moe__listing listing;           /* "gate.weight", ... */
    int64_t num_experts;            /* of all ranks */
    int64_t *placement;             /* copy of the config's, or NULL */
    struct moe__placement *where;   /* NULL: the experts are all here, and no exchange is needed */
    void *reduction; /* memory of the backend for moe_layer_reduce_gradients, where it is kept */
    int64_t reduction_bytes;
};

/* Whether a listed parameter is spread over the ranks: all others are the same on every rank. */
static inline bool moe__is_of_gate(const moe_layer *layer, const moe__listed *entry)
{
    return layer->gate && entry->list == &layer->gate->parameters;
}
static inline bool moe__is_spread(const moe_layer *layer, const moe__listed *entry)
{
    if (!layer->where) return false;
    if (moe__is_of_gate(layer, entry))
        return layer->gate->config.secondary == MOE_SECONDARY_WITH_GROUP &&
               entry->list->p[entry->index].per_expert;
    return entry->list == &layer->experts->parameters;
}

/* Seconds of a clock that never goes back. comm.c */
double moe__seconds(void);
void moe__gate_retain(moe_gate *gate);
void moe__experts_retain(moe_experts *experts);
void moe__comm_retain(moe_comm *comm);
/* Whether the transport may still touch this memory, after a failure. comm may be NULL. */
bool moe__comm_keeps(const moe_comm *comm, const void *memory, int64_t bytes);
/* Frees memory that exchanges of `comm` (or NULL) may have used, unless the transport may still
 * touch it. */
void moe__comm_free(const moe_comm *comm, moe_context *context, void *memory, int64_t bytes);
/* Whether exchanges may be of the memory of the context's backend: of a device, without a wait. */
bool moe__comm_takes(const moe_comm *comm, const moe_context *context);
/* Whether ordered exchanges may be captured. */
static inline bool moe__comm_captures(const moe_comm *comm)
{
    return (comm->table.capabilities & MOE_COMM_CAPTURABLE) != 0;
}
/* How many exchanges are, at most MOE_COMM_REQUESTS; of NULL none. */
int32_t moe__comm_in_flight(const moe_comm *comm);
/* Gives up an exchange that is in flight, which ends the communicator. */
void moe__comm_give_up(moe_comm *comm, int32_t request);
/* Makes a communicator over a table of the library's own; release is called if this fails. */
moe_status moe__comm_make(moe_comm **comm, moe_context *context, const moe_collectives *table,
                          const char *(*why)(void *user), const char *function);
void moe__layer_retain(moe_layer *layer);

/* Lists the parameters that a config asks for; allocates nothing. parameter.c */
void moe__gate_parameters_describe(moe_gate *gate);
void moe__experts_parameters_describe(moe_experts *experts);
void moe__layer_parameters_describe(moe_layer *layer);
/* Fills layer->listing: "gate.", "experts.", "shared." or "residual." before the object's own, then
 * the layer's. */
moe_status moe__layer_list_parameters(moe_layer *layer, const char *function);

/* As moe_experts_create; one_w13: of a gated pool W1 and W3 are one parameter in any case.
 * experts.c
 */
moe_status moe__experts_make(moe_experts **experts, moe_context *context,
                             const moe_experts_config *config, bool one_w13, const char *function);

/* storage.c */
/* Whether this backend keeps weights so. */
moe_status moe__storage_check(const moe_context *context, const moe_experts_config *config,
                              const char *function);
/* Elements that an expert's weights take in panels, or -1. */
int64_t moe__storage_panel_elements(const moe_experts_config *config);
/* Memory of the packed copy, if the pool has one. */
moe_status moe__storage_allocate(moe_experts *experts, const char *function);
void moe__storage_free(moe_experts *experts);
/* Makes the copy anew if weights have changed. *packed: it is there to be read. */
moe_status moe__storage_renew(moe_experts *experts, const moe__workers *workers, bool *packed);
/* Copies between an opaque parameter, or memory in its order, and dense memory in its shape. */
moe_status moe__storage_move(const moe_layer *layer, int64_t index, void *opaque, void *dense,
                             bool to_dense, const char *function);

/* MOE_ERROR_INVALID_STATE naming the first parameter of the pool that has no data; before a
 * backward also if the host's experts have none. experts.c */
moe_status moe__experts_check_bound(const moe_experts *experts, const char *function);
moe_status moe__experts_check_backward(const moe_experts *experts, const char *function);
/* Takes the pool and its parts for a backward, or none of them and returns false. */
bool moe__experts_begin_backward(moe_experts *experts);
void moe__experts_end_backward(moe_experts *experts);
/* Remembers the experts that have rows as touched, and if the job overwrites forgets the others. */
moe_status moe__experts_note_touched(moe_experts *experts, const moe__experts_job *job);

/* Forgets all. */
moe_status moe__experts_forget_touched(moe_experts *experts, const moe__workers *workers);

static inline bool moe__is_gated(int32_t activation) { return activation >= MOE_ACTIVATION_SWIGLU; }

#endif
