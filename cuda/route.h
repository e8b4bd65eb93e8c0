/* route.h - what the files of the gate share: what kernels see of a level, where rows and parts
 * are, elements of parameters, launches over rows; as src/cpu/route.h.
 *
 * All of the router is float, but for x and dx, which are of the storage type T, and the
 * parameters, which have a dtype of their own. */
#ifndef MOE_CUDA_ROUTE_H
#define MOE_CUDA_ROUTE_H

#include "backend_cuda.h"
#include "lanes.h"

#define MOE_ROUTE_THREADS 256
#define MOE_ROUTE_ROWS 8 /* of a block with a warp for each */

/* Structs that are arguments of kernels have no padding: the emulator looks for stray addresses in
 * them. */

/* ---- elements -------------------------------------------------------------------------------- */

template <typename T> struct moe_dtype_of;
template <> struct moe_dtype_of<float> {
    enum { value = MOE_DTYPE_F32 };
};
template <> struct moe_dtype_of<moe_bf16> {
    enum { value = MOE_DTYPE_BF16 };
};
template <> struct moe_dtype_of<moe_f16> {
    enum { value = MOE_DTYPE_F16 };
};

/* Element i, widened; and stored, rounded once. */
MOE_DEVICE float moe_element(const void *data, int32_t dtype, int64_t i)
{
    if (dtype == MOE_DTYPE_F32) return ((const float *)data)[i];
    uint16_t bits = ((const uint16_t *)data)[i];
    return dtype == MOE_DTYPE_BF16 ? moe__from_bf16(bits) : moe__from_f16(bits);
}
MOE_DEVICE void moe_set_element(void *data, int32_t dtype, int64_t i, float v)
{
    if (dtype == MOE_DTYPE_F32)
        ((float *)data)[i] = v;
    else
        ((uint16_t *)data)[i] = dtype == MOE_DTYPE_BF16 ? moe__to_bf16(v) : moe__to_f16(v);
}

/* A vector parameter; data NULL: not there. */
struct moe_vector {
    void *data;
    int64_t offset, stride;
    int32_t dtype, reserved;
};

static inline moe_vector moe_vector_of(const moe__matrices *m)
{
    moe_vector v = {m->base, m->offset, m->stride_col, m->dtype, 0};
    return v;
}
MOE_DEVICE float moe_vector_at(const moe_vector *v, int64_t i)
{
    return moe_element(v->data, v->dtype, v->offset + i * v->stride);
}

/* ---- rows ------------------------------------------------------------------------------------ */

/* The arrays of a moe__gate_level; rows is a bound where part_begin is there. */
struct moe_level {
    int64_t rows, width, parts;
    const int64_t *part_begin, *token_of_row, *entry_begin;
    const uint8_t *token_mask;
    float *logits, *noisy, *noise_raw, *noise_std, *noise;
    int32_t *choice;
    float *weight;
    int32_t *kth;
};

static inline moe_level moe_level_of(const moe__route_job *job, const moe__gate_level *level)
{
    moe_level l = {level->rows,
                   level->width,
                   level->parts,
                   level->part_begin,
                   level->token_of_row,
                   level->entry_begin,
                   job->token_mask,
                   (float *)level->logits,
                   (float *)level->noisy,
                   (float *)level->noise_raw,
                   (float *)level->noise_std,
                   (float *)level->noise,
                   level->choice,
                   (float *)level->weight,
                   level->kth};
    return l;
}

MOE_DEVICE int64_t moe_rows_of(const moe_level *l)
{
    return l->part_begin ? l->part_begin[l->parts] : l->rows;
}
MOE_DEVICE int64_t moe_token_of(const moe_level *l, int64_t row)
{
    return l->token_of_row ? l->token_of_row[row] : row;
}
MOE_DEVICE bool moe_is_masked(const uint8_t *mask, int64_t token) { return mask && !mask[token]; }

MOE_DEVICE int64_t moe_part_of(const moe_level *l, int64_t row)
{
    return l->part_begin ? moe_range_of(l->part_begin, l->parts, row) : 0;
}

/* The number of this thread, and of its warp, in the grid. */
MOE_DEVICE int64_t moe_thread(void) { return (int64_t)blockIdx.x * blockDim.x + threadIdx.x; }
MOE_DEVICE int64_t moe_warp(void) { return moe_thread() / MOE_WARP; }

/* ---- launches -------------------------------------------------------------------------------- */

/* Blocks of 256 threads for `items`, per_block each; none, no launch. */
template <class... P>
static inline moe_status moe_over(const moe__workers *workers, const char *name,
                                  void (*kernel)(P...), int64_t items, int64_t per_block,
                                  typename moe_same<P>::type... args)
{
    int64_t blocks = (items + per_block - 1) / per_block;
    if (items <= 0) return MOE_OK;
    if (blocks > INT32_MAX)
        return moe__cuda_fail(MOE_ERROR_OVERFLOW, workers, "%s needs %lld blocks", name,
                              (ll)blocks);
    return moe__cuda_launch(workers, name, kernel, dim3((unsigned)blocks), dim3(MOE_ROUTE_THREADS),
                            0, args...);
}

/* A thread for each item; a warp for each row. */
template <class... P>
static inline moe_status moe_over_items(const moe__workers *workers, const char *name,
                                        void (*kernel)(P...), int64_t items,
                                        typename moe_same<P>::type... args)
{
    return moe_over(workers, name, kernel, items, MOE_ROUTE_THREADS, args...);
}
template <class... P>
static inline moe_status moe_over_rows(const moe__workers *workers, const char *name,
                                       void (*kernel)(P...), int64_t rows,
                                       typename moe_same<P>::type... args)
{
    return moe_over(workers, name, kernel, rows, MOE_ROUTE_ROWS, args...);
}

/* ---- steps ----------------------------------------------------------------------------------- */

/* choose.cu: ids of the rows of a level. take.cu and sinkhorn.cu: those that need all tokens. */
moe_status moe__cuda_choose_rows(const moe__route_job *job, const moe__gate_level *level);
moe_status moe__cuda_choose_by_expert(const moe__route_job *job);
moe_status moe__cuda_choose_above(const moe__route_job *job);
moe_status moe__cuda_count_above(const moe__route_job *job);
moe_status moe__cuda_sinkhorn(const moe__route_job *job);

/* What draws the jitter of the input. */
struct moe_jitter {
    uint64_t seed;
    uint32_t stream, step;
    int64_t token_first;
    float r;
    int32_t reserved;
};

static inline moe_jitter moe_jitter_of(const moe__route_job *job)
{
    moe_jitter j = {job->config->seed, job->jitter_stream,         (uint32_t)job->step,
                    job->token_first,  (float)job->config->jitter, 0};
    return j;
}

/* Factors of columns [first, first + 4) of a token, first a multiple of 4. */
MOE_DEVICE void moe_jitter4(const moe_jitter *j, int64_t token, int64_t first, float factor[4])
{
    uint32_t word[4];
    moe__counter(word, j->stream, j->step, (uint32_t)(j->token_first + token),
                 (uint32_t)(first / 4));
    moe__philox(j->seed, word, word);
    for (int i = 0; i < 4; i++)
        factor[i] = moe__fma_f32(j->r, 2.0f * moe__uniform_f32(word[i]) - 1.0f, 1.0f);
}

#endif
