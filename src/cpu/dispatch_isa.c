/* dispatch_isa.c - chooses among the CPU tables by what the machine can do. Compiled once. */
#include "internal.h"

extern const moe__backend moe__cpu_table_f32_plain, moe__cpu_table_f64_plain;
#ifdef MOE_HAVE_X86
extern const moe__backend moe__cpu_table_f32_avx2, moe__cpu_table_f64_avx2;
extern const moe__backend moe__cpu_table_f32_avx512, moe__cpu_table_f64_avx512;
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
    int f64 = dtype == MOE_DTYPE_F64;
    if (isa < MOE_ISA_PLAIN || isa > moe__cpu_best_isa()) return NULL;
    if (dtype != MOE_DTYPE_F32 && !f64) return NULL;
#ifdef MOE_HAVE_X86
    if (isa == MOE_ISA_AVX512) return f64 ? &moe__cpu_table_f64_avx512 : &moe__cpu_table_f32_avx512;
    if (isa == MOE_ISA_AVX2) return f64 ? &moe__cpu_table_f64_avx2 : &moe__cpu_table_f32_avx2;
#endif
    return f64 ? &moe__cpu_table_f64_plain : &moe__cpu_table_f32_plain;
}
