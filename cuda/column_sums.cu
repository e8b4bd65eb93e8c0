/* column_sums.cu - gradients of biases: the sums of the columns of g over each expert's rows.
 *
 * A block sums 64 columns over a slice of an expert's rows: thread rows take every n-th row, then a
 * tree adds them in a fixed order. With few experts and columns the rows are cut into slices, whose
 * sums a second kernel adds in ascending order. The order depends on sizes and counts alone. */
#include "row_access.h"

enum { TILE = 64, MOST_SLICES = 64, WANTED_BLOCKS = 1024 };

/* sum (=|+=) x in the type of the gradient. */
template <typename T>
MOE_DEVICE void set_sum(const moe__cuda_sums &s, int64_t expert, int64_t j, float x, bool none)
{
    void *base = s.sum.each ? s.sum.each[expert] : const_cast<void *>(s.sum.base);
    int64_t at = (s.sum.each ? 0 : expert * s.sum.stride_expert) + s.sum.offset + j * s.sum.stride;
    if (!base || (none && !s.overwrite)) return;
    if (s.sum_dtype == MOE_DTYPE_F32) {
        float *sum = (float *)base + at;
        *sum = s.overwrite ? x : *sum + x;
    } else {
        T *sum = (T *)base + at;
        moe_narrow(sum, s.overwrite ? x : moe_widen(*sum) + x);
    }
}

template <typename T, int V> MOE_GLOBAL(256) moe__cuda_sum_slices(const moe__cuda_sums s)
{
    const int across = TILE / V, deep = 256 / across;
    MOE_SHARED(float, part, 256 * V);
    uint32_t tiles = (uint32_t)s.tiles, slices = (uint32_t)s.slices;
    int64_t expert = blockIdx.x / tiles, slice = blockIdx.y;
    int64_t j = (int64_t)(blockIdx.x % tiles) * TILE + (int64_t)(threadIdx.x % across) * V;
    int depth = (int)threadIdx.x / across;
    int64_t begin = s.map.expert_begin[expert], count = s.map.expert_begin[expert + 1] - begin;
    if (s.map.padded && count > s.map.padded) count = s.map.padded;
    int64_t first = s.map.padded ? expert * s.map.padded : begin - s.map.first;
    int64_t each = ((uint32_t)count + slices - 1) / slices; /* an expert has less than 2^31 rows */
    int64_t low = slice * each, high = low + each < count ? low + each : count;
    const T *g = (const T *)s.g + first * s.stride + j;
    float sum[V] = {0.0f};
    for (int64_t r = low + depth; r < high && j < s.width; r += deep) {
        float x[V];
        moe__load<V>(g + r * s.stride, x);
        for (int i = 0; i < V; i++) sum[i] = sum[i] + x[i];
    }
    for (int i = 0; i < V; i++) part[(int)threadIdx.x * V + i] = sum[i];
    for (int apart = deep / 2; apart > 0; apart /= 2) {
        moe_block_sync();
        for (int i = 0; depth < apart && i < V; i++)
            part[(int)threadIdx.x * V + i] += part[((int)threadIdx.x + apart * across) * V + i];
    }
    if (depth > 0 || j >= s.width) return;
    for (int i = 0; i < V; i++) {
        float x = part[(int)threadIdx.x * V + i];
        if (s.slices > 1)
            s.partial[(expert * s.slices + slice) * s.width + j + i] = x;
        else
            set_sum<T>(s, expert, j + i, x, count == 0);
    }
}

template <typename T> MOE_GLOBAL(256) moe__cuda_sum_finish(const moe__cuda_sums s)
{
    int64_t n = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (n >= s.map.experts * s.width) return;
    int64_t expert = n / s.width, j = n % s.width;
    const float *partial = s.partial + expert * s.slices * s.width + j;
    float sum = 0.0f;
    for (int64_t i = 0; i < s.slices; i++) sum = sum + partial[i * s.width];
    set_sum<T>(s, expert, j, sum, s.map.expert_begin[expert + 1] == s.map.expert_begin[expert]);
}

template <typename T>
static moe_status sums_of(const moe__workers *workers, const moe__cuda_sums &s)
{
    const int V = moe_pack_of<T>::N;
    bool aligned = s.width % V == 0 && moe_rows_aligned<T>(s.g, s.stride);
    dim3 grid((unsigned)(s.map.experts * s.tiles), (unsigned)s.slices);
    MOE_TRY(moe__cuda_launch(workers, "column sums",
                             aligned ? moe__cuda_sum_slices<T, V> : moe__cuda_sum_slices<T, 1>,
                             grid, dim3(256), 0, s));
    if (s.slices == 1) return MOE_OK;
    int64_t blocks = (s.map.experts * s.width + 255) / 256;
    return moe__cuda_launch(workers, "column sums", moe__cuda_sum_finish<T>, dim3((unsigned)blocks),
                            dim3(256), 0, s);
}

/* With more than one slice there are at most WANTED_BLOCKS blocks, each with a tile of sums. */
extern "C" int64_t moe__cuda_partial_bytes(void)
{
    return (int64_t)WANTED_BLOCKS * TILE * (int64_t)sizeof(float);
}

extern "C" moe_status moe__cuda_column_sums(const moe__workers *workers, moe__cuda_sums *s)
{
    s->tiles = (s->width + TILE - 1) / TILE;
    s->slices = moe__min(MOST_SLICES, WANTED_BLOCKS / moe__max(1, s->map.experts * s->tiles));
    s->slices = moe__max(1, moe__min(s->slices, s->map.rows / 64));
    return MOE_CUDA_BY_DTYPE(s->dtype, sums_of, workers, *s);
}
