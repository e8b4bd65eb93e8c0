/* twin.h - the build with TWIN=1: every slot of a fast CPU table is followed by that of its plain
 * twin on the same memory, and what the two wrote is compared. The first element that differs fails
 * the call with MOE_ERROR_INTERNAL and both values.
 *
 *     tables.c    the tables        gate_slots.c, row_slots.c    what each slot writes
 *     regions.c   copies and comparisons
 *
 * Compared are the arrays that a slot is to leave behind, and fields of its job. Not: scratch,
 * which holds what the plain table left; the sums of dW that have ended while an expert's rows come
 * in several calls (moe__dw_sums.ended), for they may hold nothing yet. No release has these
 * files. */
#ifndef MOE_CPU_TWIN_H
#define MOE_CPU_TWIN_H

#include "internal.h"

typedef struct moe__kernel_twin_pair {
    const moe__backend *fast, *plain;
    int32_t dtype; /* of the elements of both */
} moe__kernel_twin_pair;

/* ---- regions.c ------------------------------------------------------------------------------- */

enum { MOE__KERNEL_TWIN_BYTE = -1 }; /* beside MOE_DTYPE_*: of a mask */

/* Memory that a slot writes: `lines` lines of `width` elements. */
typedef struct moe__region {
    const char *name;
    char *base;           /* line l begins at element (index ? index[l] : l) stride */
    int64_t lines, width; /* of matrices: experts times rows, and columns */
    int64_t stride;
    const int64_t *index;
    const moe__matrices *matrices; /* or NULL */
    int64_t rows;                  /* of each matrix */
    const int64_t *used;           /* only so many lines have a meaning; NULL: all */
    int32_t dtype;
} moe__region;

/* The elements of some regions, packed. */
typedef struct moe__snapshot {
    char *memory;
    int64_t bytes;
} moe__snapshot;

enum { MOE__KERNEL_TWIN_REGIONS = 56, MOE__KERNEL_TWIN_HOOKS = 2 };

/* One call of a slot. */
typedef struct moe__kernel_twin {
    const moe__kernel_twin_pair *pair;
    const char *slot;
    const moe__workers *workers;
    moe__region region[MOE__KERNEL_TWIN_REGIONS];
    int32_t count;
    int32_t late;  /* regions from here on have been added after the fast table's run */
    bool too_many; /* regions */
    bool again;    /* it is the plain table's turn */
    moe__snapshot before, after, after_late;
    moe__snapshot hook[MOE__KERNEL_TWIN_HOOKS][2]; /* before and after what is done only once */
    int32_t hooks, replayed;
} moe__kernel_twin;

/* Each adds a region, unless it is NULL or empty: n elements; n of which *used have a meaning;
 * [lines,width]; [experts,rows,cols]. */
void moe__kernel_twin_vector(moe__kernel_twin *t, const char *name, void *base, int64_t n,
                             int32_t dtype);
void moe__kernel_twin_used(moe__kernel_twin *t, const char *name, void *base, int64_t n,
                           const int64_t *used, int32_t dtype);
moe__region *moe__kernel_twin_rows(moe__kernel_twin *t, const char *name, void *base, int64_t lines,
                                   int64_t width, int64_t stride, int32_t dtype);
void moe__kernel_twin_matrices(moe__kernel_twin *t, const char *name, const moe__matrices *m,
                               int64_t experts, int64_t rows, int64_t cols);

/* Saves the regions. */
moe_status moe__kernel_twin_begin(moe__kernel_twin *t);
/* The fast table has returned `status`: saves what it wrote, and puts back what was there. Regions
 * that have been added since are filled with rubbish. */
moe_status moe__kernel_twin_between(moe__kernel_twin *t, moe_status status);
/* The plain table has returned `status`: MOE_ERROR_INTERNAL with the first element that differs. */
moe_status moe__kernel_twin_end(moe__kernel_twin *t, moe_status status);
void moe__kernel_twin_free(moe__kernel_twin *t);

/* Around what a slot must do only once: they save the state before and after it. In the plain
 * table's turn moe__kernel_twin_replay stands for it: compares with the one and makes the other. */
moe_status moe__kernel_twin_hook_begin(moe__kernel_twin *t);
moe_status moe__kernel_twin_hook_end(moe__kernel_twin *t, moe_status status);
moe_status moe__kernel_twin_replay(moe__kernel_twin *t);

/* ---- gate_slots.c, row_slots.c --------------------------------------------------------------- */

/* X(v, slot, parameters, arguments) for every slot that computes; v is passed on. */
#define MOE__KERNEL_TWIN_SLOTS(X, v)                                                               \
    X(v, route_count, (moe__route_job * job, int64_t * entries), (job, entries))                   \
    X(v, route_forward, (moe__route_job * job), (job))                                             \
    X(v, second_forward, (moe__second_job * job), (job))                                           \
    X(v, second_backward, (moe__second_job * job), (job))                                          \
    X(v, losses_forward, (moe__losses_job * job), (job))                                           \
    X(v, gate_backward, (moe__gate_backward_job * job), (job))                                     \
    X(v, batch_forward, (moe__batch_job * job), (job))                                             \
    X(v, entries_taken, (const moe__batch_job *job, int64_t *entries), (job, entries))             \
    X(v, everyone_forward, (const moe__workers *workers, moe__plan_arrays *plan), (workers, plan)) \
    X(v, write_results, (const moe__losses_job *job, void *losses_out, void *stats_out),           \
      (job, losses_out, stats_out))                                                                \
    X(v, plan_rows, (moe__plan_rows_job * job), (job))                                             \
    X(v, mix_forward, (moe__mix_job * job), (job))                                                 \
    X(v, mix_backward, (moe__mix_job * job), (job))                                                \
    X(v, dispatch_forward, (moe__rows_job * job), (job))                                           \
    X(v, dispatch_backward, (moe__rows_job * job), (job))                                          \
    X(v, combine_forward, (moe__rows_job * job), (job))                                            \
    X(v, combine_backward, (moe__rows_job * job), (job))                                           \
    X(v, experts_forward, (moe__experts_job * job), (job))                                         \
    X(v, experts_backward, (moe__experts_job * job), (job))                                        \
    X(v, output_backward, (moe__rows_job * job), (job))                                            \
    X(v, matrices_copy, (const moe__copy_job *job), (job))

/* Those that move rows between ranks, or a batch's sums: plain C in every table, so that the fast
 * one runs alone. */
#define MOE__KERNEL_TWIN_ALONE(X, v)                                                      \
    X(v, travel_pack, (const moe__pack_job *job), (job))                                  \
    X(v, travel_unique, (const moe__unique_job *job), (job))                              \
    X(v, travel_order, (const moe__order_job *job), (job))                                \
    X(v, travel_merge, (const moe__merge_job *job), (job))                                \
    X(v, travel_entry_grad, (const moe__entry_grad_job *job), (job))                      \
    X(v, travel_drop, (const moe__drop_job *job), (job))                                  \
    X(v, travel_add,                                                                      \
      (const moe__workers *workers, void *parts, int64_t n, int64_t count, int32_t kind), \
      (workers, parts, n, count, kind))                                                   \
    X(v, loss_sums,                                                                       \
      (moe__losses_job * job, double *numbers, bool partial, bool put, int64_t *count),   \
      (job, numbers, partial, put, count))

#define MOE__KERNEL_TWIN_OPEN(...) __VA_ARGS__
#define MOE__KERNEL_TWIN_ONE(v, slot, parameters, arguments) +1

/* A slot that is forgotten above is found here: all are there but `name`, `worker_bytes`, and the
 * two of blocks, which the host's memory does not need. */
_Static_assert(sizeof(moe__backend) == (4 MOE__KERNEL_TWIN_SLOTS(MOE__KERNEL_TWIN_ONE, unused)
                                            MOE__KERNEL_TWIN_ALONE(MOE__KERNEL_TWIN_ONE, unused)) *
                                           sizeof(const char *),
               "every slot of a backend has a twin");

/* moe__kernel_twin_<slot>(pair, ...): both tables, one after the other. */
#define MOE__KERNEL_TWIN_DECLARE(v, slot, parameters, arguments)          \
    moe_status moe__kernel_twin_##slot(const moe__kernel_twin_pair *pair, \
                                       MOE__KERNEL_TWIN_OPEN parameters);
MOE__KERNEL_TWIN_SLOTS(MOE__KERNEL_TWIN_DECLARE, unused)
int64_t moe__kernel_twin_worker_bytes(const moe__kernel_twin_pair *pair,
                                      const moe__pass_shape *shape);

/* ---- tables.c -------------------------------------------------------------------------------- */

#define MOE__KERNEL_TWIN_CALL(v, slot, parameters, arguments)                       \
    static moe_status v##_##slot parameters                                         \
    {                                                                               \
        return moe__kernel_twin_##slot(&v##_pair, MOE__KERNEL_TWIN_OPEN arguments); \
    }
#define MOE__KERNEL_TWIN_PASS(v, slot, parameters, arguments)        \
    static moe_status v##_##slot parameters                          \
    {                                                                \
        return v##_pair.fast->slot(MOE__KERNEL_TWIN_OPEN arguments); \
    }
#define MOE__KERNEL_TWIN_FIELD(v, slot, parameters, arguments) .slot = v##_##slot,

/* The table <v>_twins of a pair of tables. */
#define MOE__KERNEL_TWIN_TABLE(v, fast_table, plain_table, dtype)                            \
    static const moe__kernel_twin_pair v##_pair = {fast_table, plain_table, dtype};          \
    MOE__KERNEL_TWIN_SLOTS(MOE__KERNEL_TWIN_CALL, v)                                         \
    MOE__KERNEL_TWIN_ALONE(MOE__KERNEL_TWIN_PASS, v)                                         \
    static int64_t v##_worker_bytes(const moe__pass_shape *shape)                            \
    {                                                                                        \
        return moe__kernel_twin_worker_bytes(&v##_pair, shape);                              \
    }                                                                                        \
    static const moe__backend v##_twins = {.name = "cpu " #v " and twin",                    \
                                           .worker_bytes = v##_worker_bytes,                 \
                                           MOE__KERNEL_TWIN_SLOTS(MOE__KERNEL_TWIN_FIELD, v) \
                                               MOE__KERNEL_TWIN_ALONE(MOE__KERNEL_TWIN_FIELD, v)};

/* The table of a fast one and its twin; a table that has none is returned as it is. */
const moe__backend *moe__kernel_twin_backend(const moe__backend *fast);

#endif
