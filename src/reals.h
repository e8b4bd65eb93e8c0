/* reals.h - one number of any element type, for what is done a number at a time. */
#ifndef MOE_REALS_H
#define MOE_REALS_H

#include "half.h"
#include "internal.h"

/* Element i. */
static inline double moe__real_at(const void *memory, int64_t i, int32_t dtype)
{
    switch (dtype) {
    case MOE_DTYPE_F64: return ((const double *)memory)[i];
    case MOE_DTYPE_BF16: return (double)moe__from_bf16(((const uint16_t *)memory)[i]);
    case MOE_DTYPE_F16: return (double)moe__from_f16(((const uint16_t *)memory)[i]);
    default: return (double)((const float *)memory)[i];
    }
}

/* To 16 bits by way of float. */
static inline void moe__set_real(void *memory, int64_t i, int32_t dtype, double value)
{
    switch (dtype) {
    case MOE_DTYPE_F64: ((double *)memory)[i] = value; break;
    case MOE_DTYPE_BF16: ((uint16_t *)memory)[i] = moe__to_bf16((float)value); break;
    case MOE_DTYPE_F16: ((uint16_t *)memory)[i] = moe__to_f16((float)value); break;
    default: ((float *)memory)[i] = (float)value;
    }
}

#endif
