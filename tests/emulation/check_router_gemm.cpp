/* check_router_gemm.cpp - the router's products against sums in double, for random shapes, element
 * types, strides, parts and indices, cuBLAS and the narrow kernel among them.
 *   check_router_gemm [first seed] [number of products] */
#include "gate_support.h"
#include "router_gemm.h"

#include <math.h>

static int64_t failures;

/* An array on both sides. */
struct both {
    char *host, *device;
    int64_t bytes;
};

static both take(int64_t bytes)
{
    both b = {(char *)calloc(1, (size_t)bytes + 64), NULL, bytes};
    if (cudaMalloc((void **)&b.device, (size_t)bytes + 64) != cudaSuccess) exit(printf("memory\n"));
    return b;
}
static void up(const both *b)
{
    cudaMemcpy(b->device, b->host, (size_t)b->bytes, cudaMemcpyHostToDevice);
}
static void give(both *b)
{
    free(b->host);
    cudaFree(b->device);
}

static double element(const void *data, int32_t dtype, int64_t i)
{
    if (dtype == MOE_DTYPE_F32) return ((const float *)data)[i];
    uint16_t bits = ((const uint16_t *)data)[i];
    return dtype == MOE_DTYPE_BF16 ? moe__from_bf16(bits) : moe__from_f16(bits);
}

static both random_elements(int64_t n, int32_t dtype)
{
    both b = take(n * moe__dtype_size(dtype));
    for (int64_t i = 0; i < n; i++) {
        float v = normal();
        if (dtype == MOE_DTYPE_F32)
            ((float *)(void *)b.host)[i] = v;
        else
            ((uint16_t *)(void *)b.host)[i] = dtype == MOE_DTYPE_BF16 ? moe__to_bf16(v)
                                                                      : moe__to_f16(v);
    }
    up(&b);
    return b;
}

static int32_t any_dtype(void)
{
    static const int32_t all[] = {MOE_DTYPE_F32, MOE_DTYPE_F32, MOE_DTYPE_BF16, MOE_DTYPE_F16};
    return all[below(4)];
}
static double bound_of(int32_t dtype, double scale)
{
    double ulp = dtype == MOE_DTYPE_F32 ? 2e-6 : dtype == MOE_DTYPE_BF16 ? 0x1p-8 : 0x1p-11;
    return ulp * scale + 1e-5 * scale;
}

/* [parts][rows,cols] with a gap behind each row and matrix. */
static moe__matrices strides(int64_t rows, int64_t cols, int32_t dtype)
{
    bool transposed = chance(40);
    int64_t gap = chance(50) ? 0 : below(5), inner = transposed ? rows : cols;
    moe__matrices m = {};
    m.stride_row = transposed ? 1 : inner + gap;
    m.stride_col = transposed ? inner + gap : 1;
    m.stride_expert = (inner + gap) * (transposed ? cols : rows) + below(3);
    m.offset = below(2) * 4;
    m.dtype = dtype;
    m.wide = dtype == MOE_DTYPE_F32;
    return m;
}
static int64_t at(const moe__matrices *m, int64_t p, int64_t i, int64_t j)
{
    return m->offset + p * m->stride_expert + i * m->stride_row + j * m->stride_col;
}
static int64_t elements(const moe__matrices *m, int64_t parts)
{
    return parts * m->stride_expert + 8;
}

static void compare(const char *what, uint64_t seed, double got, double want, double bound)
{
    if (fabs(got - want) <= bound) return;
    if (failures++ < 20)
        printf("%s, seed %llu: %.9g, expected %.9g\n", what, (unsigned long long)seed, got, want);
}

struct batch {
    int64_t rows, parts, total; /* rows used; in the arrays */
    both begin, index;
    bool indexed, ranged;
};

static batch random_batch(void)
{
    batch b = {};
    b.parts = chance(60) ? 1 : 1 + below(40);
    b.ranged = b.parts > 1 || chance(30);
    b.rows = chance(5) ? 0 : 1 + below(chance(30) ? 600 : 150);
    b.total = b.rows + below(20);
    b.begin = take((b.parts + 1) * 8);
    b.index = take((b.total + 1) * 8);
    int64_t *begin = (int64_t *)(void *)b.begin.host, *index = (int64_t *)(void *)b.index.host;
    for (int64_t p = 1; p < b.parts; p++) begin[p] = below(b.rows + 1);
    begin[b.parts] = b.rows;
    for (int64_t p = 1; p < b.parts; p++) /* ascending */
        for (int64_t q = p; q > 1 && begin[q] < begin[q - 1]; q--) {
            int64_t swap = begin[q];
            begin[q] = begin[q - 1], begin[q - 1] = swap;
        }
    for (int64_t r = 0; r < b.total; r++) index[r] = below(b.total);
    b.indexed = chance(40);
    up(&b.begin), up(&b.index);
    return b;
}
static moe_row_ranges ranges_of(const batch *b)
{
    moe_row_ranges r = {b->ranged ? b->total : b->rows, b->parts,
                        b->ranged ? (const int64_t *)(void *)b->begin.device : NULL, 1};
    return r;
}
static int64_t row_of(const batch *b, int64_t r, bool indexed)
{
    return indexed ? ((int64_t *)(void *)b->index.host)[r] : r;
}
static int64_t part_of(const batch *b, int64_t r)
{
    const int64_t *begin = (const int64_t *)(void *)b->begin.host;
    int64_t p = 0;
    while (r >= begin[p + 1]) p++;
    return p;
}

static int64_t any_width(bool narrow)
{
    return narrow ? 1 + below(4) : chance(30) ? 1 + below(20) : 1 + below(chance(20) ? 300 : 90);
}

static void check_rows(uint64_t seed, const moe__workers *workers)
{
    batch rows = random_batch();
    moe_rows_product job = {};
    job.ranges = ranges_of(&rows);
    job.k = any_width(false), job.n = any_width(chance(25));
    int32_t a_type = any_dtype(), b_type = chance(60) ? a_type : any_dtype();
    bool blas = seed % 8 == 1 && rows.parts == 1; /* what goes to cuBLAS, and a bias after it */
    if (blas) {
        rows.ranged = rows.indexed = false;
        job.ranges = ranges_of(&rows);
        job.k += 32, job.n += 8, a_type = b_type = MOE_DTYPE_F32;
    }
    job.a.stride = job.k + (chance(50) ? (8 - job.k % 8) % 8 : below(4)), job.a.dtype = a_type;
    job.b = strides(job.k, job.n, b_type);
    job.bias = strides(1, job.n, any_dtype());
    job.bias.stride_col = 1, job.bias.stride_expert = job.n;
    bool bias = chance(50) || blas;
    job.out_dtype = chance(70) || blas ? MOE_DTYPE_F32 : any_dtype();
    job.out_stride = job.n + below(3), job.add = chance(40);
    both a = random_elements((rows.total + 1) * job.a.stride, a_type);
    both b = random_elements(elements(&job.b, rows.parts), b_type);
    both c = random_elements(elements(&job.bias, rows.parts), job.bias.dtype);
    both out = random_elements((rows.total + 1) * job.out_stride, job.out_dtype);
    both got = take(out.bytes);
    job.a.data = a.device, job.a.index = rows.indexed ? (int64_t *)(void *)rows.index.device : NULL;
    job.b.base = b.device, job.bias.base = bias ? c.device : NULL;
    job.out = out.device;
    if (moe__cuda_rows_product(workers, &job) != MOE_OK) exit(1);
    cudaDeviceSynchronize();
    cudaMemcpy(got.host, out.device, (size_t)out.bytes, cudaMemcpyDeviceToHost);
    for (int64_t r = 0; r < rows.total; r++)
        for (int64_t j = 0; j < job.out_stride; j++) {
            int64_t place = r * job.out_stride + j;
            double want = element(out.host, job.out_dtype, place), scale = 1;
            if (r < rows.rows && j < job.n) {
                int64_t p = part_of(&rows, r), from = row_of(&rows, r, rows.indexed) * job.a.stride;
                if (!job.add) want = 0;
                if (bias) want += element(c.host, job.bias.dtype, at(&job.bias, p, 0, j));
                for (int64_t k = 0; k < job.k; k++) {
                    double term = element(a.host, a_type, from + k) *
                                  element(b.host, b_type, at(&job.b, p, k, j));
                    want += term, scale += fabs(term);
                }
            }
            compare("rows", seed, element(got.host, job.out_dtype, place), want,
                    r < rows.rows && j < job.n ? bound_of(job.out_dtype, scale + fabs(want)) : 0);
        }
    give(&a), give(&b), give(&c), give(&out), give(&got), give(&rows.begin), give(&rows.index);
}

static void check_dw(uint64_t seed, const moe__workers *workers)
{
    batch rows = random_batch();
    moe_dw_product job = {};
    job.ranges = ranges_of(&rows);
    job.k = any_width(false), job.n = any_width(chance(25));
    int32_t a_type = any_dtype(), dw_type = any_dtype();
    bool g_indexed = rows.indexed && chance(50);
    job.a.stride = job.k + below(4), job.a.dtype = a_type;
    job.g.stride = job.n + below(4), job.g.dtype = chance(80) ? MOE_DTYPE_F32 : any_dtype();
    job.dw = strides(job.k, job.n, dw_type);
    job.dbias.dtype = any_dtype(), job.dbias.stride_col = 1, job.dbias.stride_expert = job.n;
    both a = random_elements((rows.total + 1) * job.a.stride, a_type);
    both g = random_elements((rows.total + 1) * job.g.stride, job.g.dtype);
    both dw = random_elements(elements(&job.dw, rows.parts), dw_type);
    both dbias = random_elements(rows.parts * job.n, job.dbias.dtype);
    both got = take(dw.bytes), got_bias = take(dbias.bytes);
    both scratch = take(moe__cuda_dw_scratch(rows.parts, job.k, job.n));
    moe__workers w = *workers;
    w.scratch = scratch.device;
    const int64_t *index = (const int64_t *)(void *)rows.index.device;
    job.a.data = a.device, job.a.index = rows.indexed ? index : NULL;
    job.g.data = g.device, job.g.index = g_indexed ? index : NULL;
    job.dw.base = dw.device, job.dbias.base = chance(50) ? dbias.device : NULL;
    if (moe__cuda_dw_product(&w, &job) != MOE_OK) exit(1);
    cudaDeviceSynchronize();
    cudaMemcpy(got.host, dw.device, (size_t)dw.bytes, cudaMemcpyDeviceToHost);
    cudaMemcpy(got_bias.host, dbias.device, (size_t)dbias.bytes, cudaMemcpyDeviceToHost);
    const int64_t *begin = (const int64_t *)(void *)rows.begin.host;
    for (int64_t p = 0; p < rows.parts; p++)
        for (int64_t j = 0; j < job.n; j++) {
            double bias = element(dbias.host, job.dbias.dtype, p * job.n + j), size = 1;
            for (int64_t r = begin[p]; r < begin[p + 1] && job.dbias.base; r++) {
                double v = element(g.host, job.g.dtype,
                                   row_of(&rows, r, g_indexed) * job.g.stride + j);
                bias += v, size += fabs(v);
            }
            compare("dbias", seed, element(got_bias.host, job.dbias.dtype, p * job.n + j), bias,
                    bound_of(job.dbias.dtype, size + fabs(bias)));
            for (int64_t i = 0; i < job.k; i++) {
                int64_t place = at(&job.dw, p, i, j);
                double want = element(dw.host, dw_type, place), scale = 1;
                for (int64_t r = begin[p]; r < begin[p + 1]; r++) {
                    double term = element(a.host, a_type,
                                          row_of(&rows, r, rows.indexed) * job.a.stride + i) *
                                  element(g.host, job.g.dtype,
                                          row_of(&rows, r, g_indexed) * job.g.stride + j);
                    want += term, scale += fabs(term);
                }
                compare("dw", seed, element(got.host, dw_type, place), want,
                        bound_of(dw_type, scale + fabs(want)));
            }
        }
    give(&a), give(&g), give(&dw), give(&dbias), give(&got), give(&got_bias), give(&scratch);
    give(&rows.begin), give(&rows.index);
}

int main(int argc, char **argv)
{
    uint64_t first = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    uint64_t count = argc > 2 ? strtoull(argv[2], NULL, 10) : 200;
    moe__workers workers = {};
    workers.function = "check";
    for (uint64_t seed = first; seed < first + count; seed++) {
        random_state = seed * 2654435761u + 12345;
        for (int i = 0; i < 4; i++) draw();
        if (seed % 2)
            check_rows(seed, &workers);
        else
            check_dw(seed, &workers);
    }
    printf("check_router_gemm: %llu products, %lld differences\n", (unsigned long long)count,
           (ll)failures);
    return failures != 0;
}
