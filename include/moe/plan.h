/* moe/plan.h - one routing as compressed rows, and dispatch and combine around it.
 *
 * A plan says which token goes to which expert with what weight. Token t has the entries
 * token_begin[t] .. token_begin[t+1]-1, one per chosen expert, in order of choice; their number may
 * vary from token to token. An entry that is kept has a row; the rows are sorted by (expert, token,
 * entry), so that the rows of expert e are expert_begin[e] .. expert_begin[e+1]-1. A plan is made
 * by a gate, or by a host that routes by itself with moe_plan_build. */
#ifndef MOE_PLAN_H
#define MOE_PLAN_H

#include <moe/status.h>
#include <moe/types.h>

MOE_BEGIN_DECLS

/* A routing of the host. Fill with moe_plan_args_init, then set what you use. Everything is
 * copied. */
typedef struct moe_plan_args {
    uint64_t struct_size;
    int64_t tokens;                 /* T >= 0 */
    int64_t num_experts;            /* E, 1 to 2^31 - 1 */
    int64_t top_k;                  /* K >= 0 entries of every token, if token_begin is NULL */
    const int64_t *token_begin;     /* in: [T+1] ascending from 0, or NULL: t * top_k */
    const void *expert_ids;         /* in: [N] expert of each entry; -1: none, the entry has no
                                       row. The same expert twice in a token is legal: two rows */
    const void *weights;            /* in: [N] weight of each entry; NULL: all 1 */
    int32_t id_dtype;               /* MOE_DTYPE_I32 (default) or MOE_DTYPE_I64 */
    int32_t dtype;                  /* of weights, here and in the plan: MOE_DTYPE_F32 (default),
                                       also of layers whose dtype has 16 bits, or F64 */
    const uint8_t *token_mask;      /* in: [T] 0: the token gets no rows; NULL: all are tokens */
    const int64_t *group_begin;     /* in: [groups+1] or NULL; capacity acts per group */
    int64_t groups;                 /* 0 = one, with or without group_begin */
    int64_t capacity;               /* rows of an expert in each group; default MOE_FROM_CONFIG
                                       (-1) = no limit */
    int32_t drop_policy;            /* MOE_DROP_*, for a capacity; default token order */
    int32_t renormalize_after_drop; /* as in moe_gate_config; default 0 */
    const void *token_priority;     /* in: [T] of dtype, for MOE_DROP_BATCH_PRIORITY, which needs
                                       it for a capacity; else NULL. NaN ranks last */
    uint64_t seed;                  /* of MOE_DROP_RANDOM; default 0 */
    int64_t step;                   /* likewise; below 2^32, as token_first + T; default 0 */
    int64_t token_first;            /* global number of token 0; default 0 */
} moe_plan_args;

/* The arrays of a plan, read-only, host memory on CPU. Valid until the plan changes. */
typedef struct moe_plan_view {
    uint64_t struct_size;
    int64_t tokens;                 /* T */
    int64_t entries;                /* N */
    int64_t rows;                   /* R <= N */
    int64_t num_experts;            /* E */
    int64_t groups;                 /* G >= 1 */
    const int64_t *token_begin;     /* [T+1] exclusive prefix: entries of token t */
    const int32_t *expert_of_entry; /* [N] -1: none */
    const void *weight_of_entry;    /* [N] dtype: what combine uses; 0 for an entry without a row */
    const int64_t *row_of_entry;    /* [N] -1: no row (dropped, masked, or id -1) */
    const int64_t *slot_of_entry;   /* [N] place in the expert's buffer of its group, 0, 1, ... in
                                       order of admission, or of entry where MOE_DROP_SCORE or
                                       RANDOM chose and where there is no capacity; -1 without a
                                       row */
    const int64_t *expert_begin;    /* [E+1] exclusive prefix: rows of expert e */
    const int64_t *token_of_row;    /* [R] */
    const int64_t *entry_of_row;    /* [R] */
    const int64_t *group_begin;     /* [G+1] first token of each group */
    int32_t dtype;                  /* of weight_of_entry */
    int32_t reserved;
} moe_plan_view;

/* Write every default and the caller's size. Return as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_plan_args_init(moe_plan_args *args, size_t size);
/* The same for a view. Since 0.1. */
MOE_API moe_status moe_plan_view_init(moe_plan_view *view, size_t size);

/* Creates an empty plan (T = 0, E = 1).
 *   plan     out: the new plan; untouched on error
 *   context  holds a reference
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT or MOE_ERROR_OUT_OF_MEMORY. Since 0.1. */
MOE_API moe_status moe_plan_create(moe_plan **plan, moe_context *context);

/* Gives up the plan. NULL is legal, and so is a plan of moe_pass_plan, which is left alone.
 * Since 0.1. */
MOE_API void moe_plan_destroy(moe_plan *plan);

/* Makes the plan of a host's own routing.
 *   plan  made by moe_plan_create (one of moe_pass_plan is refused with MOE_ERROR_INVALID_STATE,
 *         here, in copy and in load); what it held is replaced, and kept on error
 * Returns MOE_OK; MOE_ERROR_INVALID_ARGUMENT for a bad field or an id outside [-1, E), the message
 * names token, entry and id; MOE_ERROR_NOT_SUPPORTED, MOE_ERROR_OVERFLOW, MOE_ERROR_OUT_OF_MEMORY
 * or an error of the struct's size. Since 0.1. */
MOE_API moe_status moe_plan_build(moe_plan *plan, const moe_plan_args *args);

/* Makes `plan` a copy of `from`. Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT,
 * MOE_ERROR_OUT_OF_MEMORY.
 * Since 0.1. */
MOE_API moe_status moe_plan_copy(moe_plan *plan, const moe_plan *from);

/* Shows a plan's arrays. view: in: struct_size; out: the rest. Returns MOE_OK,
 * MOE_ERROR_INVALID_ARGUMENT or an error of the struct's size. Since 0.1. */
MOE_API moe_status moe_plan_get(const moe_plan *plan, moe_plan_view *view);

/* Checks every invariant written above. Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT for NULL,
 * MOE_ERROR_CORRUPT_DATA with the first broken one, or, where slots are not in order of entry,
 * MOE_ERROR_OUT_OF_MEMORY. Since 0.1. */
MOE_API moe_status moe_plan_check(const moe_plan *plan);

/* Saves a plan to memory: little-endian, with a version and a checksum, the same bytes for the same
 * plan.
 *   buffer  out: `capacity` bytes; may be NULL if capacity is 0
 *   size    out: bytes needed; always written if the arguments are good
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT, or MOE_ERROR_BUFFER_TOO_SMALL with nothing written to
 * buffer. Since 0.1. */
MOE_API moe_status moe_plan_save(const moe_plan *plan, void *buffer, int64_t capacity,
                                 int64_t *size);

/* Loads what moe_plan_save wrote, after checking all of it.
 *   plan  what it held is replaced, and kept on error
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT, MOE_ERROR_CORRUPT_DATA, MOE_ERROR_OUT_OF_MEMORY.
 * Since 0.1. */
MOE_API moe_status moe_plan_load(moe_plan *plan, const void *buffer, int64_t size);

/* Arguments of dispatch and combine around the host's own experts. "tokens" are arrays [T,width] in
 * order of token, "rows" [R,width] in order of row. */
typedef struct moe_rows_args {
    uint64_t struct_size;
    uint64_t flags;        /* MOE_ROWS_*; default 0. One that a call has no use for is ignored */
    int64_t width;         /* elements of a row, >= 1 */
    const void *tokens_in; /* [T,width] or NULL, as each call says */
    int64_t tokens_in_stride;
    void *tokens_out; /* [T,width] */
    int64_t tokens_out_stride;
    const void *rows_in; /* [R,width] */
    int64_t rows_in_stride;
    void *rows_out; /* [R,width] */
    int64_t rows_out_stride;
    void *entry_weight_grad; /* [N], the plan's dtype */
    int32_t dtype;           /* of tokens and rows: the plan's, MOE_DTYPE_F32 (default) or F64; or,
                                with a plan of f32, MOE_DTYPE_BF16 or F16 */
    int32_t reserved;        /* 0 */
    void *stream;            /* NULL on CPU */
} moe_rows_args;

enum {
    MOE_ROWS_ADD = 1,       /* tokens_out is added to instead of set */
    MOE_ROWS_UNWEIGHTED = 2 /* combine with weights of 1 (the host's experts have applied them) */
};

/* Writes every default and the caller's size. Returns as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_rows_args_init(moe_rows_args *args, size_t size);

/* Gathers: rows_out[r] = tokens_in[token_of_row[r]]. Backward: tokens_out[t] = sum over the rows of
 * token t, in order of entry, of rows_in. Return MOE_OK, MOE_ERROR_INVALID_ARGUMENT,
 * MOE_ERROR_NOT_SUPPORTED, MOE_ERROR_CALLBACK or an error of the struct's size. Since 0.1. */
MOE_API moe_status moe_dispatch_forward(const moe_plan *plan, const moe_rows_args *args);
/* The adjoint of dispatch, as above. Since 0.1. */
MOE_API moe_status moe_dispatch_backward(const moe_plan *plan, const moe_rows_args *args);

/* Combines: tokens_out[t] = sum over the entries of t that have a row, in order of entry, of weight
 * * rows_in[row]; a token without rows gets 0. Backward: rows_out[r] = weight *
 * tokens_in[token_of_row[r]] (tokens_in = the gradient by the combined tokens), and, if
 * entry_weight_grad is given, the gradient by each weight: the dot product of tokens_in[t] with
 * rows_in[row] (the forward's rows), 0 for entries without a row. Return as
 * moe_dispatch_forward. Since 0.1. */
MOE_API moe_status moe_combine_forward(const moe_plan *plan, const moe_rows_args *args);
/* The adjoint of combine, as above. Since 0.1. */
MOE_API moe_status moe_combine_backward(const moe_plan *plan, const moe_rows_args *args);

MOE_END_DECLS

#endif
