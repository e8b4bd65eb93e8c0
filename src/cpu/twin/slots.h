/* slots.h - what the two files of slots share. Private to src/cpu/twin. */
#ifndef MOE_CPU_TWIN_SLOTS_H
#define MOE_CPU_TWIN_SLOTS_H

#include "cpu/twin/twin.h"

enum { F64 = MOE_DTYPE_F64, I32 = MOE_DTYPE_I32, I64 = MOE_DTYPE_I64 };

static inline moe__kernel_twin twin_of(const moe__kernel_twin_pair *pair, const char *slot,
                                       const moe__workers *workers)
{
    return (moe__kernel_twin){.pair = pair, .slot = slot, .workers = workers};
}

/* What is computed with. */
static inline int32_t real_of(const moe__kernel_twin_pair *pair)
{
    return moe__real_dtype(pair->dtype);
}

/* status = what the slot says of both tables. */
#define BOTH(slot, ...)                                                                          \
    do {                                                                                         \
        status = moe__kernel_twin_begin(&t);                                                     \
        if (status == MOE_OK)                                                                    \
            status = moe__kernel_twin_between(&t, pair->fast->slot(__VA_ARGS__));                \
        if (status == MOE_OK) status = moe__kernel_twin_end(&t, pair->plain->slot(__VA_ARGS__)); \
        moe__kernel_twin_free(&t);                                                               \
    } while (0)

/* All arrays of a plan but token_begin and group_begin. `choice`: who was chosen, too. */
void moe__kernel_twin_plan(moe__kernel_twin *t, moe__plan_arrays *p, bool choice);

#endif
