/* dispatch_isa.c - chooses among the CPU tables by what the machine can do. Compiled once. */
#include "internal.h"

#ifdef MOE_TWIN
#include "cpu/twin/twin.h"
#define FAST(table) moe__kernel_twin_backend(table)
#else
#define FAST(table) (table)
#endif

#define TABLES(isa)                                                                \
    extern const moe__backend moe__cpu_table_f32_##isa, moe__cpu_table_f64_##isa;  \
    extern const moe__backend moe__cpu_table_bf16_##isa, moe__cpu_table_f16_##isa; \
    static const moe__backend *const isa[] = {                                     \
        [MOE_DTYPE_F32] = &moe__cpu_table_f32_##isa,                               \
        [MOE_DTYPE_F64] = &moe__cpu_table_f64_##isa,                               \
        [MOE_DTYPE_BF16] = &moe__cpu_table_bf16_##isa,                             \
        [MOE_DTYPE_F16] = &moe__cpu_table_f16_##isa,                               \
    };

TABLES(plain)
#ifdef MOE_HAVE_X86
TABLES(avx2)
TABLES(avx512)
#endif

int32_t moe__cpu_best_isa(void)
{
#ifdef MOE_HAVE_X86
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return MOE_ISA_PLAIN;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
        return MOE_ISA_AVX512;
    return MOE_ISA_AVX2;
#else
    return MOE_ISA_PLAIN;
#endif
}

const moe__backend *moe__cpu_backend(int32_t isa, int32_t dtype)
{
    if (isa < MOE_ISA_PLAIN || isa > moe__cpu_best_isa()) return NULL;
    if (dtype < MOE_DTYPE_F32 || dtype > MOE_DTYPE_F16) return NULL;
#ifdef MOE_HAVE_X86
    if (isa == MOE_ISA_AVX512) return FAST(avx512[dtype]);
    if (isa == MOE_ISA_AVX2) return FAST(avx2[dtype]);
#endif
    return plain[dtype];
}
