/* tables.c - the fast CPU tables of this build, each with its plain twin. */
#include "cpu/twin/twin.h"

#ifdef MOE_HAVE_X86
#define PAIR(dtype, number, isa)                                           \
    extern const moe__backend moe__cpu_table_##dtype##_##isa;              \
    extern const moe__backend moe__cpu_table_##dtype##_plain;              \
    MOE__KERNEL_TWIN_TABLE(dtype##_##isa, &moe__cpu_table_##dtype##_##isa, \
                           &moe__cpu_table_##dtype##_plain, number)

PAIR(f32, MOE_DTYPE_F32, avx2)
PAIR(f64, MOE_DTYPE_F64, avx2)
PAIR(bf16, MOE_DTYPE_BF16, avx2)
PAIR(f16, MOE_DTYPE_F16, avx2)
PAIR(f32, MOE_DTYPE_F32, avx512)
PAIR(f64, MOE_DTYPE_F64, avx512)
PAIR(bf16, MOE_DTYPE_BF16, avx512)
PAIR(f16, MOE_DTYPE_F16, avx512)

static const struct {
    const moe__kernel_twin_pair *pair;
    const moe__backend *twins;
} tables[] = {
    {&f32_avx2_pair, &f32_avx2_twins},       {&f64_avx2_pair, &f64_avx2_twins},
    {&bf16_avx2_pair, &bf16_avx2_twins},     {&f16_avx2_pair, &f16_avx2_twins},
    {&f32_avx512_pair, &f32_avx512_twins},   {&f64_avx512_pair, &f64_avx512_twins},
    {&bf16_avx512_pair, &bf16_avx512_twins}, {&f16_avx512_pair, &f16_avx512_twins},
};
#endif

const moe__backend *moe__kernel_twin_backend(const moe__backend *fast)
{
#ifdef MOE_HAVE_X86
    for (size_t i = 0; i < sizeof tables / sizeof tables[0]; i++)
        if (tables[i].pair->fast == fast) return tables[i].twins;
#endif
    return fast;
}
