/* cublas_product.c - the arithmetic of the fake libcublas.
 *
 * Sums are of floats, in ascending k, each product and each sum rounded: panels of op(A), MR rows
 * wide, and of op(B), NR columns wide, are widened to float and multiplied. Where beta is 0, C is
 * not read; where alpha or k is 0, A and B are not. */
#include "internal.h"
#include "cublas.h"
#include "half.h"

#include <stdlib.h>
#include <string.h>

enum { MR = 32, NR = 4 };

size_t emu_type_bytes(cudaDataType type)
{
    return type == CUDA_R_32F ? 4 : type == CUDA_R_16BF || type == CUDA_R_16F ? 2 : 0;
}

static float load(const void *p, int64_t i, cudaDataType type)
{
    if (type == CUDA_R_32F) return ((const float *)p)[i];
    uint16_t h = ((const uint16_t *)p)[i];
    return type == CUDA_R_16BF ? moe__from_bf16(h) : moe__from_f16(h);
}

static void store(void *p, int64_t i, cudaDataType type, float x)
{
    if (type == CUDA_R_32F)
        ((float *)p)[i] = x;
    else
        ((uint16_t *)p)[i] = type == CUDA_R_16BF ? moe__to_bf16(x) : moe__to_f16(x);
}

/* To 10 fraction bits, nearest, ties to even. */
static float to_tf32(float x)
{
    uint32_t u = moe__bits_f32(x);
    if ((u & 0x7f800000u) == 0x7f800000u) return x;
    return moe__from_bits_f32((u + 0xfffu + ((u >> 13) & 1u)) & ~0x1fffu);
}

/* Element (i, l) of a matrix to out[l * width + i % width] of panel i / width; rows past the end
 * are zeros. `row` and `column` are the steps of the matrix in memory. */
static float *panels(const struct emu_product *p, const void *from, int64_t rows, int64_t row,
                     int64_t column, int width)
{
    int64_t count = (rows + width - 1) / width;
    float *out = calloc((size_t)(count * width * p->k), sizeof *out);
    if (out == NULL) abort();
    for (int64_t i = 0; i < rows; i++) {
        float *to = out + i / width * width * p->k + i % width;
        for (int64_t l = 0; l < p->k; l++) {
            float x = load(from, i * row + l * column, p->in);
            to[l * width] = p->tf32 ? to_tf32(x) : x;
        }
    }
    return out;
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("default", "avx2")))
#endif
static void
tile(const float *restrict a, const float *restrict b, int64_t k, float *restrict sums)
{
    float s[NR][MR] = {{0}};
    for (int64_t l = 0; l < k; l++) {
        for (int j = 0; j < NR; j++) {
            float y = b[l * NR + j];
            for (int i = 0; i < MR; i++) s[j][i] += a[l * MR + i] * y;
        }
    }
    memcpy(sums, s, sizeof s);
}

static void write_tile(const struct emu_product *p, void *c, int64_t row, int64_t column,
                       const float *sums)
{
    for (int64_t j = 0; j < NR && column + j < p->n; j++) {
        for (int64_t i = 0; i < MR && row + i < p->m; i++) {
            int64_t at = row + i + (column + j) * p->ldc;
            float x = p->alpha * sums[j * MR + i];
            if (p->beta != 0.0f) x += p->beta * load(c, at, p->out);
            store(c, at, p->out, x);
        }
    }
}

static void multiply_one(const struct emu_product *p, const void *a, const void *b, void *c)
{
    bool empty = p->k == 0 || p->alpha == 0.0f;
    float sums[MR * NR] = {0}, *left = NULL, *right = NULL;
    if (!empty) {
        left = panels(p, a, p->m, p->a_transposed ? p->lda : 1, p->a_transposed ? 1 : p->lda, MR);
        right = panels(p, b, p->n, p->b_transposed ? 1 : p->ldb, p->b_transposed ? p->ldb : 1, NR);
    }
    for (int64_t j = 0; j < p->n; j += NR) {
        for (int64_t i = 0; i < p->m; i += MR) {
            if (!empty) tile(left + i * p->k, right + j * p->k, p->k, sums);
            write_tile(p, c, i, j, sums);
        }
        for (int64_t column = j; column < j + NR && column < p->n; column++)
            emu_mark_written((char *)c + (size_t)(column * p->ldc) * emu_type_bytes(p->out),
                             (size_t)p->m * emu_type_bytes(p->out));
    }
    free(left);
    free(right);
}

static const char *operand_fault(const void *p, int64_t rows, int64_t columns, int64_t ld,
                                 cudaDataType type)
{
    if (rows == 0 || columns == 0) return NULL;
    if (((uintptr_t)p & (emu_type_bytes(type) - 1)) != 0) return "not aligned to its elements";
    return emu_range_fault(p, (size_t)((columns - 1) * ld + rows) * emu_type_bytes(type));
}

/* What cuBLAS requires of pointers in arrays where tensor cores multiply: where k elements are a
 * multiple of 16 bytes, or of 4, addresses are one too. A device reports a misaligned address. */
static bool are_misaligned(const struct emu_product *p, const void *a, const void *b, const void *c)
{
    uintptr_t bits = (uintptr_t)a | (uintptr_t)b | (uintptr_t)c;
    size_t row = (size_t)p->k * emu_type_bytes(p->in);
    if (!p->arrays || (p->in == CUDA_R_32F && !p->tf32)) return false;
    return (row % 16 == 0 && bits % 16 != 0) || (row % 4 == 0 && bits % 4 != 0);
}

/* The addresses of an array are known only now. */
static bool operands_are_wrong(const struct emu_product *p, const void *a, const void *b, void *c)
{
    bool t = p->a_transposed, u = p->b_transposed;
    const char *fault = operand_fault(a, t ? p->k : p->m, t ? p->m : p->k, p->lda, p->in);
    if (fault == NULL) fault = operand_fault(b, u ? p->n : p->k, u ? p->k : p->n, p->ldb, p->in);
    if (fault == NULL) fault = operand_fault(c, p->m, p->n, p->ldc, p->out);
    if (fault == NULL && are_misaligned(p, a, b, c)) fault = "not aligned as its k asks";
    if (fault != NULL) emu_mistake("an operand of cuBLAS: %s", fault);
    return fault != NULL;
}

void emu_multiply(const struct emu_product *given)
{
    struct emu_product p = *given;
    if (p.scalars_on_device) {
        p.alpha = *p.alpha_at;
        p.beta = *p.beta_at;
    }
    size_t in = emu_type_bytes(p.in), out = emu_type_bytes(p.out);
    for (int64_t i = 0; i < p.count; i++) {
        const void *a = (const char *)p.a + (size_t)(i * p.stride_a) * in;
        const void *b = (const char *)p.b + (size_t)(i * p.stride_b) * in;
        void *c = (char *)p.c + (size_t)(i * p.stride_c) * out;
        if (p.arrays) {
            a = ((const void *const *)p.a)[i];
            b = ((const void *const *)p.b)[i];
            c = ((void *const *)p.c)[i];
        }
        if (operands_are_wrong(&p, a, b, c)) return;
        multiply_one(&p, a, b, c);
    }
}
