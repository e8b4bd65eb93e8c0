/* router_gemm.cu - the products that router_gemm.h describes.
 *
 * A block of 256 threads makes a tile of TM x TN = 4096 elements, 4 x 4 by each thread, 16 indices
 * of the summed dimension at a time through shared memory. Tiles are 64 x 64, or 256 x 16 where n
 * is at most 16. A sum over rows with too few tiles for a GPU is cut into partial sums, tile by
 * tile in scratch, which are added in order. */
#include "router_gemm.h"

#define TILE_K 16
#define TILE_THREADS 256
#define TILE_ELEMENTS 4096
#define TILE_PAD 4
/* Sums over rows are cut until there are so many tiles, or so few rows in each. */
#define TILES_WANTED 256
#define ROWS_OF_PART 128

/* ---- operands -------------------------------------------------------------------------------- */

/* Element (i,k) is data[row of (i or k) + ...]: a matrix of which TILE x 16 go to shared memory.
 * Where one of the two strides is 1, 4 elements lie together. index is of i, or of k. */
struct tile_operand {
    const char *data;
    int64_t stride_i, stride_k;
    const int64_t *index;
    int32_t index_k, dtype;
    bool along_k; /* 4 elements along k are loaded together, else along i */
    bool aligned; /* and may be by 16 bytes */
};

MOE_DEVICE int64_t size_of(int32_t dtype) { return dtype == MOE_DTYPE_F32 ? 4 : 2; }

MOE_DEVICE bool is_aligned(const void *data, int64_t stride, int32_t dtype)
{
    return (uintptr_t)data % (uintptr_t)(4 * size_of(dtype)) == 0 && stride % 4 == 0;
}

/* Matrix p, its offset included; NULL: not wanted. */
MOE_DEVICE char *matrix_of(const moe__matrices *m, int64_t p)
{
    char *data = (char *)(m->each ? m->each[p] : m->base);
    int64_t at = m->offset + (m->each ? 0 : p * m->stride_expert);
    return data ? data + at * size_of(m->dtype) : NULL;
}

MOE_DEVICE bool is_there(const moe__matrices *m) { return m->base || m->each; }

/* a [rows,k] or its transpose: index_k if the rows are k, which is summed over. */
MOE_DEVICE tile_operand operand_of_rows(const moe_row_operand *a, bool index_k)
{
    tile_operand o = {(const char *)a->data,
                      index_k ? 1 : a->stride,
                      index_k ? a->stride : 1,
                      a->index,
                      index_k,
                      a->dtype,
                      !index_k,
                      is_aligned(a->data, a->stride, a->dtype)};
    return o;
}

/* b [k,n] with i its columns. */
MOE_DEVICE tile_operand operand_of_matrix(const moe__matrices *b, int64_t p)
{
    const char *data = matrix_of(b, p);
    bool along_k = b->stride_col != 1 && b->stride_row == 1;
    tile_operand o = {data,
                      b->stride_col,
                      b->stride_row,
                      NULL,
                      0,
                      b->dtype,
                      along_k,
                      is_aligned(data, along_k ? b->stride_col : b->stride_row, b->dtype)};
    return o;
}

MOE_DEVICE void read4(float v[4], const float *p)
{
    uint4 four = moe_load16(p);
    v[0] = moe__from_bits_f32(four.x), v[1] = moe__from_bits_f32(four.y);
    v[2] = moe__from_bits_f32(four.z), v[3] = moe__from_bits_f32(four.w);
}

/* v[0..4) = elements at, at + step, ...; beyond count 0. */
MOE_DEVICE void load4(float v[4], const tile_operand *o, int64_t at, int64_t step, int64_t count)
{
    MOE_UNROLLED for (int j = 0; j < 4; j++) v[j] = 0.0f;
    if (count >= 4 && step == 1 && o->aligned && o->dtype == MOE_DTYPE_F32) {
        read4(v, (const float *)(o->data + at * 4));
    } else {
        MOE_UNROLLED for (int j = 0; j < 4; j++) if (j < count)
            v[j] = moe_element(o->data, o->dtype, at + j * step);
    }
}

/* shared[k][i] = element (first_i + i, first_k + k) for i < TILE, k < 16; 0 from ends on. Threads
 * walk the dense dimension. */
template <int TILE>
MOE_DEVICE void load_tile(float (*shared)[TILE + TILE_PAD], const tile_operand *o, int64_t first_i,
                          int64_t end_i, int64_t first_k, int64_t end_k)
{
    for (int quad = (int)threadIdx.x; quad < TILE * TILE_K / 4; quad += TILE_THREADS) {
        float v[4];
        bool along_k = o->along_k;
        int i = along_k ? quad / (TILE_K / 4) : quad % (TILE / 4) * 4;
        int k = along_k ? quad % (TILE_K / 4) * 4 : quad / (TILE / 4);
        int64_t row_i = first_i + i, row_k = first_k + k;
        bool there = row_i < end_i && row_k < end_k;
        int64_t count = !there ? 0 : along_k ? end_k - row_k : end_i - row_i;
        if (there && o->index && o->index_k) row_k = o->index[row_k];
        if (there && o->index && !o->index_k) row_i = o->index[row_i];
        load4(v, o, row_i * o->stride_i + row_k * o->stride_k, along_k ? 1 : o->stride_i, count);
        MOE_UNROLLED for (int j = 0; j < 4; j++)
            shared[along_k ? k + j : k][along_k ? i : i + j] = v[j];
    }
}

/* ---- a tile ---------------------------------------------------------------------------------- */

/* sum[i][j] += a(i,k) b(j,k) over k in [first_k, end_k), in order; i = 4 (thread / (TN/4)) and on,
 * j = 4 (thread % (TN/4)) and on. */
template <int TM, int TN>
MOE_DEVICE void multiply(float sum[4][4], float (*shared_a)[TM + TILE_PAD],
                         float (*shared_b)[TN + TILE_PAD], const tile_operand *a,
                         const tile_operand *b, const int64_t first[2], const int64_t end[2],
                         int64_t first_k, int64_t end_k)
{
    int i = (int)threadIdx.x / (TN / 4) * 4, j = (int)threadIdx.x % (TN / 4) * 4;
    for (int64_t k = first_k; k < end_k; k += TILE_K) {
        load_tile<TM>(shared_a, a, first[0], end[0], k, end_k);
        load_tile<TN>(shared_b, b, first[1], end[1], k, end_k);
        moe_block_sync();
        int count = end_k - k < TILE_K ? (int)(end_k - k) : TILE_K;
        for (int kk = 0; kk < count; kk++) {
            float column[4], row[4];
            read4(column, &shared_a[kk][i]);
            read4(row, &shared_b[kk][j]);
            MOE_UNROLLED for (int y = 0; y < 4; y++) MOE_UNROLLED for (int x = 0; x < 4; x++)
                sum[y][x] = moe__fma_f32(column[y], row[x], sum[y][x]);
        }
        moe_block_sync();
    }
}

/* The part whose tiles of `tile` rows hold number `number`, all parts' tiles counted one after
 * another, and its first row there: found by the first warp, 32 parts at a time. place[0] = -1:
 * there are fewer tiles. */
MOE_DEVICE void find_tile(int64_t place[2], const moe_row_ranges *ranges, int64_t tile,
                          int64_t number)
{
    if (!ranges->begin) {
        place[0] = number * tile < ranges->rows ? 0 : -1;
        place[1] = number * tile;
        return;
    }
    place[0] = -1;
    place[1] = 0;
    for (int64_t first = 0; first < ranges->parts && place[0] < 0; first += MOE_WARP) {
        int64_t p = first + moe_lane(), rows = 0, begin = 0;
        if (p < ranges->parts) {
            begin = ranges->begin[p * ranges->step];
            rows = ranges->begin[(p + 1) * ranges->step] - begin;
        }
        int64_t tiles = (rows + tile - 1) / tile, end = tiles;
        for (int by = 1; by < MOE_WARP; by *= 2) {
            int64_t before = moe_shuffle_up(end, by);
            if (moe_lane() >= by) end += before;
        }
        bool mine = number < end && number >= end - tiles;
        uint32_t found = moe_ballot(mine);
        if (found != 0) {
            int holder = 31 - moe_clz(found);
            place[0] = moe_shuffle(p, holder);
            place[1] = moe_shuffle(begin + (number - (end - tiles)) * tile, holder);
        }
        number -= moe_shuffle(end, MOE_WARP - 1);
    }
}

/* The end of the rows of a part. */
MOE_DEVICE int64_t end_of_part(const moe_row_ranges *ranges, int64_t p)
{
    return ranges->begin ? ranges->begin[(p + 1) * ranges->step] : ranges->rows;
}

/* ---- rows ------------------------------------------------------------------------------------ */

/* out[r,j] (=|+=) v (+ bias) */
MOE_DEVICE void store_row(const moe_rows_product *job, int64_t r, int64_t j, const char *bias,
                          float v)
{
    int64_t at = r * job->out_stride + j;
    if (bias) v = v + moe_element(bias, job->bias.dtype, j * job->bias.stride_col);
    if (job->add) v = moe_element(job->out, job->out_dtype, at) + v;
    moe_set_element(job->out, job->out_dtype, at, v);
}

template <int TM, int TN> MOE_GLOBAL(TILE_THREADS) moe_router_rows(moe_rows_product job)
{
    MOE_SHARED(float, shared_a, TILE_K *(TM + TILE_PAD));
    MOE_SHARED(float, shared_b, TILE_K *(TN + TILE_PAD));
    MOE_SHARED(int64_t, place, 2);
    int64_t tiles_n = (job.n + TN - 1) / TN, column = (int64_t)blockIdx.x % tiles_n * TN;
    float sum[4][4] = {};
    if (threadIdx.x < MOE_WARP) {
        int64_t found[2];
        find_tile(found, &job.ranges, TM, (int64_t)blockIdx.x / tiles_n);
        if (threadIdx.x == 0) place[0] = found[0], place[1] = found[1];
    }
    moe_block_sync();
    int64_t part = place[0], row = place[1];
    if (part < 0) return;
    int64_t first[2] = {row, column}, end[2] = {end_of_part(&job.ranges, part), job.n};
    tile_operand a = operand_of_rows(&job.a, false), b = operand_of_matrix(&job.b, part);
    multiply<TM, TN>(sum, (float(*)[TM + TILE_PAD]) shared_a, (float(*)[TN + TILE_PAD]) shared_b,
                     &a, &b, first, end, 0, job.k);
    const char *bias = is_there(&job.bias) ? matrix_of(&job.bias, part) : NULL;
    row += (int)threadIdx.x / (TN / 4) * 4;
    column += (int)threadIdx.x % (TN / 4) * 4;
    MOE_UNROLLED for (int y = 0; y < 4; y++)
        MOE_UNROLLED for (int x = 0; x < 4; x++) if (row + y < end[0] && column + x < end[1])
            store_row(&job, row + y, column + x, bias, sum[y][x]);
}

/* At most MOE_NARROW columns: a warp for each row, its threads the lanes of 32 chains. */
MOE_GLOBAL(TILE_THREADS) moe_router_narrow(moe_rows_product job)
{
    int64_t row = moe_warp(), part = 0;
    int64_t rows = job.ranges.begin ? job.ranges.begin[job.ranges.parts * job.ranges.step]
                                    : job.ranges.rows;
    float sum[MOE_NARROW] = {};
    if (row >= rows) return;
    while (job.ranges.begin && row >= job.ranges.begin[(part + 1) * job.ranges.step]) part++;
    int64_t a = (job.a.index ? job.a.index[row] : row) * job.a.stride;
    const char *b = matrix_of(&job.b, part);
    for (int64_t k = moe_lane(); k < job.k; k += MOE_WARP) {
        float v = moe_element(job.a.data, job.a.dtype, a + k);
        MOE_UNROLLED for (int j = 0; j < MOE_NARROW; j++) if (j < job.n) sum[j] = moe__fma_f32(
            v, moe_element(b, job.b.dtype, k * job.b.stride_row + j * job.b.stride_col), sum[j]);
    }
    const char *bias = is_there(&job.bias) ? matrix_of(&job.bias, part) : NULL;
    MOE_UNROLLED for (int j = 0; j < MOE_NARROW; j++)
    {
        float v = moe_warp_sum(sum[j]);
        if (j < job.n && moe_lane() == 0) store_row(&job, row, j, bias, v);
    }
}

/* out[r,:] += bias, after cuBLAS. */
MOE_GLOBAL(TILE_THREADS) moe_router_bias(moe_rows_product job)
{
    int64_t i = moe_thread();
    if (i >= job.ranges.rows * job.n) return;
    int64_t row = i / job.n, j = i % job.n;
    store_row(&job, row, j, matrix_of(&job.bias, 0), 0.0f);
}

/* ---- sums over rows -------------------------------------------------------------------------- */

/* How a sum over rows is cut. */
struct dw_cut {
    int64_t tiles_k, tiles_n, splits;
    float *partial; /* [splits][parts][tiles][4096]; NULL: one split, added at once */
};

MOE_DEVICE void add_to_matrix(const moe__matrices *m, char *data, int64_t i, int64_t j, float v)
{
    int64_t at = i * m->stride_row + j * m->stride_col;
    moe_set_element(data, m->dtype, at, moe_element(data, m->dtype, at) + v);
}

template <int TM, int TN> MOE_GLOBAL(TILE_THREADS) moe_router_dw(moe_dw_product job, dw_cut cut)
{
    MOE_SHARED(float, shared_a, TILE_K *(TM + TILE_PAD));
    MOE_SHARED(float, shared_b, TILE_K *(TN + TILE_PAD));
    int64_t tiles = cut.tiles_k * cut.tiles_n, at = blockIdx.x;
    int64_t tile = at % tiles, part = at / tiles % job.ranges.parts, split = at / tiles;
    split /= job.ranges.parts;
    int64_t first[2] = {tile / cut.tiles_n * TM, tile % cut.tiles_n * TN}, end[2] = {job.k, job.n};
    int64_t begin = job.ranges.begin ? job.ranges.begin[part * job.ranges.step] : 0;
    int64_t rows = end_of_part(&job.ranges, part) - begin;
    float sum[4][4] = {};
    tile_operand a = operand_of_rows(&job.a, true), g = operand_of_rows(&job.g, true);
    multiply<TM, TN>(sum, (float(*)[TM + TILE_PAD]) shared_a, (float(*)[TN + TILE_PAD]) shared_b,
                     &a, &g, first, end, begin + rows * split / cut.splits,
                     begin + rows * (split + 1) / cut.splits);
    int i = (int)threadIdx.x / (TN / 4) * 4, j = (int)threadIdx.x % (TN / 4) * 4;
    char *dw = matrix_of(&job.dw, part);
    MOE_UNROLLED for (int y = 0; y < 4; y++) MOE_UNROLLED for (int x = 0; x < 4; x++)
    {
        if (cut.partial)
            cut.partial[at * TILE_ELEMENTS + (i + y) * TN + j + x] = sum[y][x];
        else if (dw && first[0] + i + y < end[0] && first[1] + j + x < end[1])
            add_to_matrix(&job.dw, dw, first[0] + i + y, first[1] + j + x, sum[y][x]);
    }
}

/* dw += the partial sums, in order. */
template <int TM, int TN> MOE_GLOBAL(TILE_THREADS) moe_router_add_dw(moe_dw_product job, dw_cut cut)
{
    int64_t n = moe_thread(), size = job.k * job.n, tiles = cut.tiles_k * cut.tiles_n;
    float sum = 0.0f;
    if (n >= size * job.ranges.parts) return;
    int64_t part = n / size, i = n % size / job.n, j = n % job.n;
    int64_t place = part * tiles + i / TM * cut.tiles_n + j / TN;
    int64_t element = i % TM * TN + j % TN;
    char *dw = matrix_of(&job.dw, part);
    if (!dw) return;
    for (int64_t s = 0; s < cut.splits; s++) {
        sum = sum + cut.partial[place * TILE_ELEMENTS + element];
        place += job.ranges.parts * tiles;
    }
    add_to_matrix(&job.dw, dw, i, j, sum);
}

/* dbias: 32 columns by 8 rows of threads for each part and 32 columns; each thread has every 8th
 * row of its column, then the 8 in order. */
MOE_GLOBAL(TILE_THREADS) moe_router_dbias(moe_dw_product job)
{
    MOE_SHARED(float, shared, TILE_THREADS);
    int64_t blocks = (job.n + MOE_WARP - 1) / MOE_WARP, part = (int64_t)blockIdx.x / blocks;
    int64_t j = (int64_t)blockIdx.x % blocks * MOE_WARP + moe_lane();
    int64_t begin = job.ranges.begin ? job.ranges.begin[part * job.ranges.step] : 0;
    int64_t end = end_of_part(&job.ranges, part);
    float sum = 0.0f;
    for (int64_t r = begin + threadIdx.x / MOE_WARP; r < end && j < job.n; r += 8) {
        int64_t row = job.g.index ? job.g.index[r] : r;
        sum = sum + moe_element(job.g.data, job.g.dtype, row * job.g.stride + j);
    }
    shared[threadIdx.x] = sum;
    moe_block_sync();
    char *dbias = matrix_of(&job.dbias, part);
    if (threadIdx.x >= MOE_WARP || j >= job.n || !dbias) return;
    for (int i = 1; i < 8; i++) sum = sum + shared[i * MOE_WARP + (int)threadIdx.x];
    add_to_matrix(&job.dbias, dbias, 0, j, sum);
}

/* ---- cuBLAS ---------------------------------------------------------------------------------- */

/* A row-major matrix as cuBLAS sees it, columns first: its transpose. */
struct blas_operand {
    const void *data;
    cublasOperation_t operation;
    int64_t stride;
};

static bool fits_int(int64_t n) { return n > 0 && n <= INT32_MAX; }

/* Of elements with one stride 1: as it is, or transposed. */
static bool matrix_for_blas(blas_operand *o, const moe__matrices *m)
{
    bool rows = m->stride_col == 1;
    int64_t size = moe__dtype_size(m->dtype);
    o->data = m->base ? (const char *)m->base + m->offset * size : NULL;
    o->operation = rows ? CUBLAS_OP_N : CUBLAS_OP_T;
    o->stride = rows ? m->stride_row : m->stride_col;
    return m->base && (rows || m->stride_row == 1) && fits_int(o->stride);
}

/* 16-bit operands as cuBLAS likes them best. */
static bool blas_aligned(const void *data, int64_t stride, int32_t dtype)
{
    return dtype == MOE_DTYPE_F32 || ((uintptr_t)data % 16 == 0 && stride % 8 == 0);
}

/* Pedantic: never TF32, whatever the environment says. */
static cublasComputeType_t compute_type(int32_t dtype)
{
    return dtype == MOE_DTYPE_F32 ? CUBLAS_COMPUTE_32F_PEDANTIC : CUBLAS_COMPUTE_32F;
}

static cudaDataType_t blas_type(int32_t dtype)
{
    return dtype == MOE_DTYPE_F32 ? CUDA_R_32F : dtype == MOE_DTYPE_BF16 ? CUDA_R_16BF : CUDA_R_16F;
}

/* out (=|+=) a b of one part of all rows; *done: whether the types and strides allow it. */
static moe_status rows_by_blas(const moe__workers *workers, const moe_rows_product *job, bool *done)
{
    cublasHandle_t handle;
    blas_operand b;
    float alpha = 1.0f, beta = job->add ? 1.0f : 0.0f;
    *done = matrix_for_blas(&b, &job->b) && job->ranges.parts == 1 && !job->ranges.begin &&
            !job->a.index && job->a.dtype == job->b.dtype && job->out_dtype == MOE_DTYPE_F32 &&
            job->n >= 8 && job->k >= 32 && fits_int(job->ranges.rows) && fits_int(job->n) &&
            fits_int(job->k) && job->a.stride >= job->k && fits_int(job->a.stride) &&
            job->out_stride >= job->n && fits_int(job->out_stride) &&
            b.stride >= (b.operation == CUBLAS_OP_N ? job->n : job->k) &&
            blas_aligned(job->a.data, job->a.stride, job->a.dtype) &&
            blas_aligned(b.data, b.stride, job->b.dtype);
    if (!*done) return MOE_OK;
    MOE_TRY(moe__cuda_cublas(workers, &handle));
    MOE_TRY(moe__cublas_status(cublasGemmEx(handle, b.operation, CUBLAS_OP_N, (int)job->n,
                                            (int)job->ranges.rows, (int)job->k, &alpha, b.data,
                                            blas_type(job->b.dtype), (int)b.stride, job->a.data,
                                            blas_type(job->a.dtype), (int)job->a.stride, &beta,
                                            job->out, CUDA_R_32F, (int)job->out_stride,
                                            compute_type(job->a.dtype), CUBLAS_GEMM_DEFAULT),
                               workers, "cublasGemmEx"));
    if (!moe_is_there(&job->bias)) return MOE_OK;
    moe_rows_product bias = *job;
    bias.add = 1;
    return moe_over_items(workers, "moe_router_bias", moe_router_bias, job->ranges.rows * job->n,
                          bias);
}

/* dw += a^T g of one part of all rows, floats. */
static moe_status dw_by_blas(const moe__workers *workers, const moe_dw_product *job, bool *done)
{
    cublasHandle_t handle;
    blas_operand dw;
    float one = 1.0f;
    *done = matrix_for_blas(&dw, &job->dw) && job->ranges.parts == 1 && !job->ranges.begin &&
            !job->a.index && !job->g.index && job->a.dtype == MOE_DTYPE_F32 &&
            job->g.dtype == MOE_DTYPE_F32 && job->dw.dtype == MOE_DTYPE_F32 && job->n >= 8 &&
            job->k >= 32 && fits_int(job->n) && fits_int(job->k) && fits_int(job->ranges.rows) &&
            job->a.stride >= job->k && fits_int(job->a.stride) && job->g.stride >= job->n &&
            fits_int(job->g.stride) && dw.stride >= (dw.operation == CUBLAS_OP_N ? job->n : job->k);
    if (!*done) return MOE_OK;
    MOE_TRY(moe__cuda_cublas(workers, &handle));
    /* By rows dw is there [n,k] = g^T a, by columns [k,n] = a^T g. */
    bool by_rows = dw.operation == CUBLAS_OP_N;
    const moe_row_operand *x = by_rows ? &job->g : &job->a, *y = by_rows ? &job->a : &job->g;
    int m = (int)(by_rows ? job->n : job->k), n = (int)(by_rows ? job->k : job->n);
    cublasStatus_t status = cublasGemmEx(
        handle, CUBLAS_OP_N, CUBLAS_OP_T, m, n, (int)job->ranges.rows, &one, x->data, CUDA_R_32F,
        (int)x->stride, y->data, CUDA_R_32F, (int)y->stride, &one, (void *)(uintptr_t)dw.data,
        CUDA_R_32F, (int)dw.stride, compute_type(MOE_DTYPE_F32), CUBLAS_GEMM_DEFAULT);
    return moe__cublas_status(status, workers, "cublasGemmEx");
}

/* ---- calls ----------------------------------------------------------------------------------- */

template <int TM, int TN>
static moe_status rows_by_tiles(const moe__workers *workers, const moe_rows_product *job)
{
    int64_t tiles = job->ranges.rows / TM + (job->ranges.begin ? job->ranges.parts : 1);
    return moe_over(workers, "moe_router_rows", moe_router_rows<TM, TN>,
                    tiles * ((job->n + TN - 1) / TN), 1, *job);
}

moe_status moe__cuda_rows_product(const moe__workers *workers, const moe_rows_product *job)
{
    bool done;
    if (job->ranges.rows <= 0 || job->n <= 0) return MOE_OK;
    MOE_TRY(rows_by_blas(workers, job, &done));
    if (done) return MOE_OK;
    if (job->n <= MOE_NARROW && job->k > 64)
        return moe_over_rows(workers, "moe_router_narrow", moe_router_narrow, job->ranges.rows,
                             *job);
    return job->n <= 16 ? rows_by_tiles<256, 16>(workers, job)
                        : rows_by_tiles<64, 64>(workers, job);
}

/* Tiles of dw and the parts that its sum is cut into, by the shape alone. */
static dw_cut cut_of(int64_t parts, int64_t k, int64_t n, int64_t rows)
{
    bool narrow = n <= 16;
    dw_cut cut = {(k + (narrow ? 255 : 63)) / (narrow ? 256 : 64),
                  (n + (narrow ? 15 : 63)) / (narrow ? 16 : 64), 1, NULL};
    int64_t tiles = cut.tiles_k * cut.tiles_n * parts;
    if (tiles > 0 && tiles < TILES_WANTED)
        cut.splits = moe__max(moe__min(TILES_WANTED / tiles, rows / parts / ROWS_OF_PART), 1);
    return cut;
}

template <int TM, int TN>
static moe_status dw_by_tiles(const moe__workers *workers, const moe_dw_product *job, dw_cut cut)
{
    int64_t tiles = cut.tiles_k * cut.tiles_n * job->ranges.parts;
    if (cut.splits > 1) cut.partial = (float *)workers->scratch;
    MOE_TRY(moe_over(workers, "moe_router_dw", moe_router_dw<TM, TN>, tiles * cut.splits, 1, *job,
                     cut));
    if (!cut.partial) return MOE_OK;
    return moe_over_items(workers, "moe_router_add_dw", moe_router_add_dw<TM, TN>,
                          job->k * job->n * job->ranges.parts, *job, cut);
}

moe_status moe__cuda_dw_product(const moe__workers *workers, const moe_dw_product *job)
{
    bool done = !moe_is_there(&job->dw);
    dw_cut cut = cut_of(job->ranges.parts, job->k, job->n, job->ranges.rows);
    if (job->ranges.rows <= 0 || job->n <= 0) return MOE_OK;
    if (moe_is_there(&job->dbias))
        MOE_TRY(moe_over(workers, "moe_router_dbias", moe_router_dbias,
                         job->ranges.parts * ((job->n + MOE_WARP - 1) / MOE_WARP), 1, *job));
    if (!done) MOE_TRY(dw_by_blas(workers, job, &done));
    if (done) return MOE_OK;
    return job->n <= 16 ? dw_by_tiles<256, 16>(workers, job, cut)
                        : dw_by_tiles<64, 64>(workers, job, cut);
}

int64_t moe__cuda_dw_scratch(int64_t parts, int64_t k, int64_t n)
{
    dw_cut cut = cut_of(parts, k, n, INT64_MAX);
    int64_t tiles = cut.tiles_k * cut.tiles_n * parts;
    return cut.splits > 1 ? tiles * cut.splits * TILE_ELEMENTS * (int64_t)sizeof(float) : 0;
}
