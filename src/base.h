/* base.h - what every file of the library may use, kernels in C++ included: errors, sizes, a block
 * of memory cut into arrays, a plan's arrays. C11 and C++. */
#ifndef MOE_BASE_H
#define MOE_BASE_H

#include <moe/moe.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

MOE_BEGIN_DECLS

/* ---- errors (status.c) ----------------------------------------------------------------------- */

/* Records the thread's message, "function: reason with values", and returns `status`. The function
 * that finds an error calls it; everyone above passes the code on. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
moe_status
moe__fail(moe_status status, const char *function, const char *format, ...);
enum { MOE__MESSAGE_SIZE = 512 };
/* Whether a number from elsewhere is a status at all. */
static inline bool moe__is_status(int64_t word)
{
    return word <= MOE_OK && word >= MOE_STATUS_LAST;
}
/* Makes a copy of moe_last_error() the message again. */
void moe__restore_message(const char message[MOE__MESSAGE_SIZE]);

/* For functions that are told whom they check for: const char *function. */
#define REFUSE(status, ...) return moe__fail(status, function, __VA_ARGS__)
#define REFUSE_ARGUMENT(...) REFUSE(MOE_ERROR_INVALID_ARGUMENT, __VA_ARGS__)

typedef long long ll; /* for %lld */

#define MOE_TRY(call)                                \
    do {                                             \
        moe_status try_status = (call);              \
        if (try_status != MOE_OK) return try_status; \
    } while (0)

/* MOE_ERROR_INVALID_ARGUMENT with the field's name and value unless low <= value <= high. */
moe_status moe__check_range(const char *name, int64_t value, int64_t low, int64_t high,
                            const char *function);

/* A matrix [rows,width] of the host: resolves stride 0, checks it and the size of the whole. */
moe_status moe__check_matrix(const char *name, const void *data, int64_t *stride, int64_t rows,
                             int64_t width, int64_t element, bool required, const char *function);

/* ---- structs of growing size (struct.c) ------------------------------------------------------ */

/* All of a public struct that this library knows: `size` now, `first_size` in its first release. */
typedef struct moe__struct_info {
    const char *name;
    size_t size, first_size;
    void (*defaults)(void *instance); /* writes every field but struct_size */
} moe__struct_info;

/* A struct that has not grown since its first release. */
#define MOE__STRUCT_INFO(type, defaults)            \
    {                                               \
#type, sizeof(type), sizeof(type), defaults \
    }

/* ---- sizes ----------------------------------------------------------------------------------- */

/* Product or sum of non-negative sizes, or -1 if it does not fit in int64_t or one is -1. */
static inline int64_t moe__mul(int64_t a, int64_t b)
{
    if (a < 0 || b < 0) return -1;
    return b != 0 && a > INT64_MAX / b ? -1 : a * b;
}
static inline int64_t moe__add(int64_t a, int64_t b)
{
    if (a < 0 || b < 0) return -1;
    return a > INT64_MAX - b ? -1 : a + b;
}
static inline int64_t moe__min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t moe__max(int64_t a, int64_t b) { return a > b ? a : b; }

/* Bytes of one element; 0 for a number that is no dtype. */
static inline int64_t moe__dtype_size(int32_t dtype)
{
    switch (dtype) {
    case MOE_DTYPE_F32:
    case MOE_DTYPE_I32: return 4;
    case MOE_DTYPE_F64:
    case MOE_DTYPE_I64: return 8;
    case MOE_DTYPE_BF16:
    case MOE_DTYPE_F16: return 2;
    default: return 0;
    }
}

static inline bool moe__is_half(int32_t dtype)
{
    return dtype == MOE_DTYPE_BF16 || dtype == MOE_DTYPE_F16;
}
/* What is computed with, and what logits, weights and losses are. */
static inline int32_t moe__real_dtype(int32_t dtype)
{
    return moe__is_half(dtype) ? MOE_DTYPE_F32 : dtype;
}

/* ---- one block of memory cut into arrays ----------------------------------------------------- */

/* With base NULL it only counts, so the same layout code answers "how much" and hands out. */
typedef struct moe__arena {
    char *base;
    int64_t used; /* -1: overflow */
} moe__arena;

/* count elements of `size` bytes, 64-byte aligned; NULL while counting. */
static inline void *moe__arena_take(moe__arena *arena, int64_t count, int64_t size)
{
    int64_t bytes = moe__mul(count, size);
    int64_t begin = arena->used;
    int64_t end = moe__add(begin, moe__add(bytes, 63));
    arena->used = end < 0 ? -1 : end & ~(int64_t)63;
    return arena->base && end >= 0 ? arena->base + begin : NULL;
}

/* ---- a plan's arrays ------------------------------------------------------------------------- */

/* The arrays of moe_plan_view, writable. */
typedef struct moe__plan_arrays {
    int64_t tokens, entries, rows, num_experts, groups;
    int64_t *token_begin;     /* [T+1] */
    int32_t *expert_of_entry; /* [N] */
    void *weight_of_entry;    /* [N] dtype */
    int64_t *row_of_entry;    /* [N] */
    int64_t *slot_of_entry;   /* [N] */
    int64_t *expert_begin;    /* [E+1] */
    int64_t *token_of_row;    /* [N], R used */
    int64_t *entry_of_row;    /* [N], R used */
    int64_t *group_begin;     /* [G+1] */
    int32_t dtype;
    int32_t zero; /* kernels take plans by value: no bytes without a name */
} moe__plan_arrays;

/* ---- what every step is given ---------------------------------------------------------------- */

/* Scratch: pieces of worker_bytes each, one for each thread. */
typedef struct moe__workers {
    moe_context *context;
    char *scratch;        /* 64-byte aligned backend memory, nothing in it is kept */
    int64_t worker_bytes; /* of the table, a multiple of 64 */
    const char *function; /* public call, for messages */
    void *stream;         /* of this call */
    void *of_pass;        /* what the backend keeps for the pass, of moe__memory.pass_create; NULL
                             outside of a pass */
} moe__workers;

MOE_END_DECLS

#endif
