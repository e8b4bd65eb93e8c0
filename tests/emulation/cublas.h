/* cublas.h - what the two files of the fake libcublas share: a product, ready to run. */
#ifndef EMU_CUBLAS_H
#define EMU_CUBLAS_H

#include <stdbool.h>

#include <cublas_v2.h>

/* C = alpha op(A) op(B) + beta C for each of `count` products, column by column in memory. The
 * operands are apart by a stride, or each stands in an array of device memory. */
struct emu_product {
    bool a_transposed, b_transposed, tf32, arrays, scalars_on_device;
    int64_t m, n, k, lda, ldb, ldc, count;
    cudaDataType in, out;
    const void *a, *b;
    void *c;
    int64_t stride_a, stride_b, stride_c; /* in elements */
    float alpha, beta;
    const float *alpha_at, *beta_at;
};

size_t emu_type_bytes(cudaDataType type);
void emu_multiply(const struct emu_product *p);

#endif
