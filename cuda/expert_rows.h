/* expert_rows.h - what the files of the experts share: which rows a job has, and the kernels over
 * them that expert_ffn.c calls. C11 and C++.
 *
 * "Row" is a local number from 0, the row of every array of the job that is given by its first row.
 * Exact: the rows of the job's experts one after the other. Padded: row e C + s is row s of expert
 * e, and those from its count on are padding: no kernel here reads it, and it is written as zeros
 * where a product over rows will read it. The descriptions are kernel arguments as they are:
 * numbers and device pointers. */
#ifndef MOE_CUDA_EXPERT_ROWS_H
#define MOE_CUDA_EXPERT_ROWS_H

#include "backend_cuda.h"

MOE_BEGIN_DECLS

typedef struct moe__cuda_map {
    const int64_t *expert_begin; /* [experts+1] of the plan, on the device */
    const int64_t *token_of_row, *entry_of_row;
    int64_t experts;
    int64_t padded; /* C, or 0: exact */
    int64_t first;  /* the plan's number of row 0; exact only */
    int64_t rows;
} moe__cuda_map;

/* One vector for each expert: element (e,j) is (each ? each[e] : base + e stride_expert)[offset +
 * j stride]; each is an array on the device. Neither: not there. */
typedef struct moe__cuda_vectors {
    const void *base;
    void *const *each;
    int64_t stride_expert, stride, offset;
} moe__cuda_vectors;

/* to[r,:] = weight_r from[token of r,:] (out[r,:] (1 - out[r,:])). The weights are those of the
 * entries, then also stored in weight_of_row, or with weight_of_entry NULL weight_of_row. */
typedef struct moe__cuda_gather {
    moe__cuda_map map;
    const void *from; /* [T,width] */
    const void *out;  /* [rows,width]; NULL: without that factor */
    void *to;         /* [rows,width] */
    const float *weight_of_entry;
    float *weight_of_row;
    int64_t from_stride, width;
    int32_t weighted; /* 0: 1 instead of weight_r */
    int32_t dtype;
} moe__cuda_gather;

/* grad of the entry of r = a[r,:] . b[r,:] in 16 lanes; then a[r,:] *= weight_r. */
typedef struct moe__cuda_dot {
    moe__cuda_map map;
    void *a;
    const void *b;
    float *entry_grad;          /* NULL: no product */
    const float *weight_of_row; /* NULL: a stays */
    int64_t a_stride, b_stride, width;
    int32_t a_of_token, b_of_token; /* 1: row r is the row of its token */
    int32_t dtype, reserved;
} moe__cuda_dot;

/* out[r,:] = o(out[r,:] + bias of its expert) */
typedef struct moe__cuda_output {
    moe__cuda_map map;
    moe__cuda_vectors bias;
    void *out; /* [rows,width] */
    int64_t width;
    int32_t sigmoid, dtype;
} moe__cuda_output;

/* Forward: z (+ bias, kept if `keep`), h = act(z1) [* z3] [* weight]. Backward, from dh: dz1, dz3,
 * and h again. The arrays of a forward may lie on each other, and those of a backward, where a row
 * of z or dz and a row of h or dh begin at the same place, or dh of an interleaved one in the upper
 * half: see activation.cu. */
typedef struct moe__cuda_activation {
    moe__cuda_map map;
    moe__cuda_vectors b1, b3;
    void *z1, *z3; /* z3 NULL: not gated */
    void *h, *dh;
    void *dz1, *dz3;
    const float *weight_of_row;            /* what multiplies h; or NULL */
    float *entry_grad;                     /* backward with weight_of_row: dh . h; or NULL */
    int64_t width;                         /* F */
    int64_t z_stride, h_stride, dh_stride; /* dz has z's */
    int32_t step;                          /* of z1, z3, dz1, dz3 along a row: 1, or 2 */
    int32_t keep;
    int32_t kind, dtype;
    float alpha, limit, beyond; /* beyond: what is added to the clamped z3 */
    int32_t reserved;
} moe__cuda_activation;

/* The sums of the columns of g over each expert's rows, set or added to. */
typedef struct moe__cuda_sums {
    moe__cuda_map map;
    moe__cuda_vectors sum; /* each[e] may be NULL: not wanted */
    const void *g;
    float *partial; /* [experts,slices,width] with more than one slice */
    int64_t width, stride, tiles, slices;
    int32_t overwrite, dtype;
    int32_t sum_dtype, reserved;
} moe__cuda_sums;

/* The experts' activation: kind, alpha, limit, beyond of the config. activation.cu */
void moe__cuda_activation_of(const moe_experts_config *config, moe__cuda_activation *a);
moe_status moe__cuda_activation_forward(const moe__workers *workers, const moe__cuda_activation *a);
moe_status moe__cuda_activation_backward(const moe__workers *workers,
                                         const moe__cuda_activation *a);

/* expert_rows.cu */
moe_status moe__cuda_run_gather(const moe__workers *workers, const moe__cuda_gather *gather);
moe_status moe__cuda_run_dot(const moe__workers *workers, const moe__cuda_dot *dot);
moe_status moe__cuda_run_output(const moe__workers *workers, const moe__cuda_output *output);
/* table[i] = pointers[i], i < count: an array of the host, to the device without a copy. */
moe_status moe__cuda_put_pointers(const moe__workers *workers, void **table,
                                  const void *const *pointers, int64_t count);

/* column_sums.cu. Chooses the slices; `partial` is of moe__cuda_partial_bytes(). */
moe_status moe__cuda_column_sums(const moe__workers *workers, moe__cuda_sums *sums);
int64_t moe__cuda_partial_bytes(void);

MOE_END_DECLS

#endif
