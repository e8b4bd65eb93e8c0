/* grouped_gemm.h - products of the rows of experts with their matrices, by cuBLAS. Host code. */
#ifndef MOE_CUDA_GROUPED_GEMM_H
#define MOE_CUDA_GROUPED_GEMM_H

#include "backend_cuda.h"

MOE_BEGIN_DECLS

/* The rows of the products of one job. */
typedef struct moe__cuda_groups {
    const moe__workers *workers;
    int64_t experts;
    const int64_t *expert_begin; /* [experts+1] on the host; NULL where padded */
    int64_t padded;              /* C: row 0 of expert e is row e C; 0: expert_begin[e] -
                                    expert_begin[0] */
    int64_t rows;
    int32_t dtype; /* of rows and weights */
    int32_t reserved;
    void **pointers; /* [3 experts] scratch on the device */
} moe__cuda_groups;

/* A dense matrix [rows,width] by its first row. */
typedef struct moe__cuda_dense {
    void *data;
    int64_t stride;
} moe__cuda_dense;

/* MOE_ERROR_NOT_SUPPORTED with the parameter's name for what cuBLAS cannot count and for a dtype:
 * gradients may be of the rows' type or f32. Any strides are good; where neither rows nor columns
 * are contiguous a copy is multiplied, expert by expert. k by n. */
moe_status moe__cuda_check_matrices(const moe__cuda_groups *g, const char *name, moe__matrices m,
                                    int64_t k, int64_t n, bool gradient);

/* out[rows,n] (=|+=) a[rows,k] b[k,n], expert by expert; b transposed: it is [n,k]. */
moe_status moe__cuda_product(const moe__cuda_groups *g, int64_t k, int64_t n, moe__cuda_dense a,
                             moe__matrices b, bool transposed, moe__cuda_dense out, bool add);

/* dw[k,n] (=|+=) a[rows,k]^T d[rows,n], expert by expert; overwrite: 0 for experts without rows. */
moe_status moe__cuda_weight_gradient(const moe__cuda_groups *g, int64_t k, int64_t n,
                                     moe__cuda_dense a, moe__cuda_dense d, moe__matrices dw,
                                     bool overwrite);

MOE_END_DECLS

#endif
