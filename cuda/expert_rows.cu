/* expert_rows.cu - what is done to the rows of experts around their products.
 *
 *     gather:  to[r] = weight_r x[t] or weight_r dy[t] out (1 - out),   t the token of row r
 *     output:  out[r] = o(out[r] + b2)
 *     dot:     the gradient by a weight, a[r] . b[r];  a[r] = weight_r a[r]
 *
 * Each reads and writes every element once: bound by memory, 16 bytes at once where rows are
 * aligned. */
#include "row_access.h"

/* ---- gather ---------------------------------------------------------------------------------- */

template <typename T, int V>
MOE_GLOBAL(256)
moe__cuda_gather_rows(const moe__cuda_gather g, int shift)
{
    int64_t r = moe__block_row(shift);
    int column = moe__block_column(shift);
    moe__row at = moe__find_row(g.map, r, false);
    if (r >= g.map.rows) return;
    float weight = 0.0f;
    const T *from = (const T *)g.from, *out = (const T *)g.out + r * g.width;
    T *to = (T *)g.to + r * g.width;
    if (at.number >= 0) {
        weight = g.weight_of_entry ? g.weight_of_entry[g.map.entry_of_row[at.number]]
                 : g.weighted      ? g.weight_of_row[r]
                                   : 1.0f;
        from += g.map.token_of_row[at.number] * g.from_stride;
    }
    if (g.weight_of_entry && column == 0) g.weight_of_row[r] = weight;
    for (int64_t j = (int64_t)column * V; j < g.width; j += (int64_t)V << shift) {
        float x[V] = {0.0f};
        if (at.number >= 0) {
            moe__load<V>(from + j, x);
            if (g.weighted)
                for (int i = 0; i < V; i++) x[i] = weight * x[i];
            if (g.out) {
                float o[V];
                moe__load<V>(out + j, o);
                for (int i = 0; i < V; i++) x[i] = x[i] * (o[i] * (1.0f - o[i]));
            }
        }
        moe__store<V>(to + j, x);
    }
}

template <typename T>
static moe_status gather(const moe__workers *workers, const moe__cuda_gather &g)
{
    const int V = moe_pack_of<T>::N;
    bool aligned = g.width % V == 0 && moe_rows_aligned<T>(g.from, g.from_stride) &&
                   moe_rows_aligned<T>(g.out, g.width) && moe_rows_aligned<T>(g.to, g.width);
    moe__row_launch launch = moe__launch_rows(g.map.rows, g.width, aligned ? V : 1);
    return moe__cuda_launch(workers, "gather",
                            aligned ? moe__cuda_gather_rows<T, V> : moe__cuda_gather_rows<T, 1>,
                            launch.grid, dim3(MOE__ROW_THREADS), 0, g, launch.shift);
}

extern "C" moe_status moe__cuda_run_gather(const moe__workers *workers, const moe__cuda_gather *g)
{
    if (g->map.rows == 0) return MOE_OK;
    return MOE_CUDA_BY_DTYPE(g->dtype, gather, workers, *g);
}

/* ---- output ---------------------------------------------------------------------------------- */

template <typename T, int V>
MOE_GLOBAL(256)
moe__cuda_output_rows(const moe__cuda_output o, int shift)
{
    int64_t r = moe__block_row(shift);
    bool biased = o.bias.base || o.bias.each;
    moe__row at = moe__find_row(o.map, r, biased);
    if (at.number < 0) return;
    const T *bias = moe__vector_of<T>(o.bias, at.expert);
    T *out = (T *)o.out + r * o.width;
    for (int64_t j = (int64_t)moe__block_column(shift) * V; j < o.width; j += (int64_t)V << shift) {
        float x[V];
        moe__load<V>(out + j, x);
        if (biased)
            for (int i = 0; i < V; i++) x[i] += moe_widen(bias[(j + i) * o.bias.stride]);
        if (o.sigmoid)
            for (int i = 0; i < V; i++) x[i] = moe__sigmoid_f32(x[i]);
        moe__store<V>(out + j, x);
    }
}

template <typename T>
static moe_status output(const moe__workers *workers, const moe__cuda_output &o)
{
    const int V = moe_pack_of<T>::N;
    bool aligned = o.width % V == 0 && moe_rows_aligned<T>(o.out, o.width);
    moe__row_launch launch = moe__launch_rows(o.map.rows, o.width, aligned ? V : 1);
    return moe__cuda_launch(workers, "output",
                            aligned ? moe__cuda_output_rows<T, V> : moe__cuda_output_rows<T, 1>,
                            launch.grid, dim3(MOE__ROW_THREADS), 0, o, launch.shift);
}

extern "C" moe_status moe__cuda_run_output(const moe__workers *workers, const moe__cuda_output *o)
{
    bool biased = o->bias.base || o->bias.each;
    if (o->map.rows == 0 || (!biased && !o->sigmoid)) return MOE_OK;
    return MOE_CUDA_BY_DTYPE(o->dtype, output, workers, *o);
}

/* ---- dot ------------------------------------------------------------------------------------- */

/* The 16 lanes of src/cpu/lanes.h are the accumulators of 16 / V threads: the upper steps of the
 * tree are between threads, the lower ones within one. */
template <typename T, int V> MOE_GLOBAL(256) moe__cuda_dot_rows(const moe__cuda_dot d)
{
    const int threads = 16 / V;
    int64_t r = (int64_t)blockIdx.x * (256 / threads) + threadIdx.x / threads;
    int t = (int)threadIdx.x % threads;
    moe__row at = moe__find_row(d.map, r, false);
    int64_t token = at.number >= 0 ? d.map.token_of_row[at.number] : 0;
    T *a = (T *)d.a + (d.a_of_token ? token : r) * d.a_stride;
    const T *b = (const T *)d.b + (d.b_of_token ? token : r) * d.b_stride;
    int64_t width = at.number >= 0 ? d.width : 0;
    if (d.entry_grad) {
        float lane[V] = {0.0f};
        for (int64_t j = (int64_t)t * V; j < width; j += 16) {
            float x[V], y[V];
            moe__load<V>(a + j, x);
            moe__load<V>(b + j, y);
            for (int i = 0; i < V; i++) lane[i] = moe__fma_f32(x[i], y[i], lane[i]);
        }
        float sum = moe__lane_tree<V>(lane);
        if (at.number >= 0 && t == 0) d.entry_grad[d.map.entry_of_row[at.number]] = sum;
    }
    if (!d.weight_of_row || at.number < 0) return;
    float weight = d.weight_of_row[r];
    for (int64_t j = (int64_t)t * V; j < width; j += 16) {
        float x[V];
        moe__load<V>(a + j, x);
        for (int i = 0; i < V; i++) x[i] = weight * x[i];
        moe__store<V>(a + j, x);
    }
}

template <typename T> static moe_status dot(const moe__workers *workers, const moe__cuda_dot &d)
{
    const int V = moe_pack_of<T>::N;
    bool aligned = d.width % V == 0 && moe_rows_aligned<T>(d.a, d.a_stride) &&
                   moe_rows_aligned<T>(d.b, d.b_stride);
    int64_t rows = 256 / (16 / (aligned ? V : 1)); /* of a block */
    dim3 grid((unsigned)((d.map.rows + rows - 1) / rows));
    return moe__cuda_launch(workers, "dot",
                            aligned ? moe__cuda_dot_rows<T, V> : moe__cuda_dot_rows<T, 1>, grid,
                            dim3(256), 0, d);
}

extern "C" moe_status moe__cuda_run_dot(const moe__workers *workers, const moe__cuda_dot *d)
{
    if (d->map.rows == 0 || (!d->entry_grad && !d->weight_of_row)) return MOE_OK;
    return MOE_CUDA_BY_DTYPE(d->dtype, dot, workers, *d);
}

/* ---- pointers -------------------------------------------------------------------------------- */

/* An array of the host travels in the arguments of kernels. */
enum { POINTERS = 256 };
struct moe__cuda_pointers {
    const void *p[POINTERS];
};

MOE_GLOBAL(256) moe__cuda_write_pointers(void **table, const moe__cuda_pointers pointers, int count)
{
    if ((int)threadIdx.x < count) table[threadIdx.x] = const_cast<void *>(pointers.p[threadIdx.x]);
}

extern "C" moe_status moe__cuda_put_pointers(const moe__workers *workers, void **table,
                                             const void *const *pointers, int64_t count)
{
    for (int64_t i = 0; i < count; i += POINTERS) {
        moe__cuda_pointers some = {};
        int n = (int)moe__min(count - i, POINTERS);
        for (int k = 0; k < n; k++) some.p[k] = pointers[i + k];
        MOE_TRY(moe__cuda_launch(workers, "pointers", moe__cuda_write_pointers, dim3(1), dim3(256),
                                 0, table + i, some, n));
    }
    return MOE_OK;
}
