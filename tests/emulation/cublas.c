/* cublas.c - the calls of the fake libcublas: handles, what is refused, products put on streams.
 *
 * Refused is what the real library refuses or what would be wrong with it: combinations of types,
 * leading dimensions, operands that are not the device's, arrays of pointers on the host, a
 * workspace that is not aligned. The products run when their stream does. */
#include "internal.h"
#include "cublas.h"

#include <stdlib.h>
#include <string.h>

struct cublasContext {
    int device;
    cudaStream_t stream;
    cublasMath_t math;
    cublasPointerMode_t pointers;
    void *workspace;
};

/* ---- beginning and end of a call ------------------------------------------------------------- */

static cublasStatus_t enter(const char *name)
{
    emu_lock();
    cudaError_t fault = emu_fault(name);
    emu_unlock();
    cudaError_t status = emu_enter("", EMU_SAFE);
    if (fault != cudaSuccess) return (cublasStatus_t)fault;
    if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
        return CUBLAS_STATUS_NOT_INITIALIZED;
    }
    return status == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

static cublasStatus_t leave(cublasStatus_t status)
{
    emu_leave(cudaSuccess);
    return status;
}

#define REFUSE(status, ...) (emu_refuse(cudaErrorInvalidValue, __VA_ARGS__), status)

cublasStatus_t cublasCreate_v2(cublasHandle_t *out)
{
    cublasStatus_t status = enter("cublasCreate");
    if (status == CUBLAS_STATUS_SUCCESS && emu_capture_forbids()) {
        status = REFUSE(CUBLAS_STATUS_NOT_INITIALIZED, "cublasCreate while a stream captures");
    }
    if (status == CUBLAS_STATUS_SUCCESS) {
        struct cublasContext *h = calloc(1, sizeof *h);
        if (h == NULL) abort();
        h->device = emu_device();
        *out = h;
        emu_object(1);
        emu_record(EMU_CALL_OBJECT, "cublasCreate", NULL, 0, NULL, NULL);
    }
    return leave(status);
}

cublasStatus_t cublasDestroy_v2(cublasHandle_t h)
{
    cublasStatus_t status = enter("cublasDestroy");
    if (h == NULL) return leave(CUBLAS_STATUS_NOT_INITIALIZED);
    emu_finish_device(h->device);
    emu_object(-1);
    emu_record(EMU_CALL_OBJECT, "cublasDestroy", NULL, 0, NULL, NULL);
    free(h);
    return leave(status);
}

/* As the real one does, it takes the workspace back. */
cublasStatus_t cublasSetStream_v2(cublasHandle_t h, cudaStream_t stream)
{
    cublasStatus_t status = enter("cublasSetStream");
    if (status == CUBLAS_STATUS_SUCCESS) {
        h->stream = stream;
        h->workspace = NULL;
    }
    return leave(status);
}

cublasStatus_t cublasGetStream_v2(cublasHandle_t h, cudaStream_t *stream)
{
    *stream = h->stream;
    return CUBLAS_STATUS_SUCCESS;
}

static int on_device(const void *p)
{
    return emu_place_of(p) == EMU_DEVICE || emu_place_of(p) == EMU_MANAGED;
}

cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t h, void *p, size_t bytes)
{
    cublasStatus_t status = enter("cublasSetWorkspace");
    if (status == CUBLAS_STATUS_SUCCESS && bytes > 0) {
        if (((uintptr_t)p & 255) != 0) {
            status = REFUSE(CUBLAS_STATUS_INVALID_VALUE, "a workspace not aligned to 256 bytes");
        } else if (!on_device(p) || emu_range_fault(p, bytes) != NULL) {
            status = REFUSE(CUBLAS_STATUS_INVALID_VALUE, "a workspace: %s",
                            !on_device(p) ? "not of the device" : emu_range_fault(p, bytes));
        }
    }
    if (status == CUBLAS_STATUS_SUCCESS) h->workspace = p;
    return leave(status);
}

cublasStatus_t cublasSetMathMode(cublasHandle_t h, cublasMath_t mode)
{
    cublasStatus_t status = enter("cublasSetMathMode");
    if (status == CUBLAS_STATUS_SUCCESS) h->math = mode;
    return leave(status);
}

cublasStatus_t cublasGetMathMode(cublasHandle_t h, cublasMath_t *mode)
{
    *mode = h->math;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t h, cublasPointerMode_t mode)
{
    cublasStatus_t status = enter("cublasSetPointerMode");
    if (status == CUBLAS_STATUS_SUCCESS) h->pointers = mode;
    return leave(status);
}

cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t h, cublasPointerMode_t *mode)
{
    *mode = h->pointers;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetVersion_v2(cublasHandle_t h, int *version)
{
    (void)h;
    *version = CUBLAS_VERSION;
    return CUBLAS_STATUS_SUCCESS;
}

static const struct {
    cublasStatus_t status;
    const char *name, *text;
} statuses[] = {
    {CUBLAS_STATUS_SUCCESS, "CUBLAS_STATUS_SUCCESS", "success"},
    {CUBLAS_STATUS_NOT_INITIALIZED, "CUBLAS_STATUS_NOT_INITIALIZED", "not initialized"},
    {CUBLAS_STATUS_ALLOC_FAILED, "CUBLAS_STATUS_ALLOC_FAILED", "allocation failed"},
    {CUBLAS_STATUS_INVALID_VALUE, "CUBLAS_STATUS_INVALID_VALUE", "invalid value"},
    {CUBLAS_STATUS_ARCH_MISMATCH, "CUBLAS_STATUS_ARCH_MISMATCH", "architecture mismatch"},
    {CUBLAS_STATUS_EXECUTION_FAILED, "CUBLAS_STATUS_EXECUTION_FAILED", "execution failed"},
    {CUBLAS_STATUS_INTERNAL_ERROR, "CUBLAS_STATUS_INTERNAL_ERROR", "internal error"},
    {CUBLAS_STATUS_NOT_SUPPORTED, "CUBLAS_STATUS_NOT_SUPPORTED", "not supported"},
};

const char *cublasGetStatusName(cublasStatus_t status)
{
    for (size_t i = 0; i < sizeof statuses / sizeof statuses[0]; i++) {
        if (statuses[i].status == status) return statuses[i].name;
    }
    return "unknown cublas status";
}

const char *cublasGetStatusString(cublasStatus_t status)
{
    for (size_t i = 0; i < sizeof statuses / sizeof statuses[0]; i++) {
        if (statuses[i].status == status) return statuses[i].text;
    }
    return "unknown cublas status";
}

/* ---- checks ---------------------------------------------------------------------------------- */

struct types {
    cudaDataType a, b, c;
    cublasComputeType_t compute;
    bool grouped;
};

/* The rows of the real table that sum in float, of real numbers. */
static cublasStatus_t check_types(const cublasHandle_t h, const struct types *t,
                                  struct emu_product *p)
{
    bool plain = t->compute == CUBLAS_COMPUTE_32F || t->compute == CUBLAS_COMPUTE_32F_PEDANTIC;
    bool tf32 = t->compute == CUBLAS_COMPUTE_32F_FAST_TF32;
    bool half = t->a == CUDA_R_16BF || t->a == CUDA_R_16F;
    bool known = t->a == t->b && (half || t->a == CUDA_R_32F);
    bool out = t->c == t->a || (half && t->c == CUDA_R_32F && !t->grouped);
    if (!known || !out || !(plain || (tf32 && !half))) {
        return REFUSE(CUBLAS_STATUS_NOT_SUPPORTED,
                      "types %d, %d, %d with compute type %d are not in cuBLAS's table", t->a, t->b,
                      t->c, t->compute);
    }
    p->in = t->a;
    p->out = t->c;
    p->tf32 = !half &&
              (tf32 || (t->compute == CUBLAS_COMPUTE_32F && h->math == CUBLAS_TF32_TENSOR_OP_MATH));
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t check_shape(const struct emu_product *p)
{
    int64_t a_rows = p->a_transposed ? p->k : p->m, b_rows = p->b_transposed ? p->n : p->k;
    if (p->m < 0 || p->n < 0 || p->k < 0 || p->count < 0) {
        return REFUSE(CUBLAS_STATUS_INVALID_VALUE, "a negative size");
    }
    if (p->lda < (a_rows > 1 ? a_rows : 1) || p->ldb < (b_rows > 1 ? b_rows : 1) ||
        p->ldc < (p->m > 1 ? p->m : 1)) {
        return REFUSE(CUBLAS_STATUS_INVALID_VALUE,
                      "leading dimensions %lld, %lld, %lld of m, n, k = %lld, %lld, %lld",
                      (long long)p->lda, (long long)p->ldb, (long long)p->ldc, (long long)p->m,
                      (long long)p->n, (long long)p->k);
    }
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t check_scalars(const cublasHandle_t h, const void *alpha, const void *beta,
                                    struct emu_product *p)
{
    bool device = h->pointers == CUBLAS_POINTER_MODE_DEVICE;
    if (alpha == NULL || beta == NULL) {
        return REFUSE(CUBLAS_STATUS_INVALID_VALUE, "alpha or beta is NULL");
    }
    if ((emu_place_of(alpha) == EMU_DEVICE) != device ||
        (emu_place_of(beta) == EMU_DEVICE) != device) {
        return REFUSE(CUBLAS_STATUS_INVALID_VALUE, "alpha and beta are not where the mode says");
    }
    p->scalars_on_device = device;
    p->alpha_at = alpha;
    p->beta_at = beta;
    if (!device) {
        p->alpha = *p->alpha_at;
        p->beta = *p->beta_at;
    }
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t check_place(const char *what, const void *p, size_t bytes)
{
    enum emu_place place = emu_place_of(p);
    if (bytes == 0) return CUBLAS_STATUS_SUCCESS;
    if (place != EMU_DEVICE && place != EMU_MANAGED) {
        return REFUSE(CUBLAS_STATUS_INVALID_VALUE, "%s, %p, is host memory", what, p);
    }
    const char *fault = emu_range_fault(p, bytes);
    if (fault == NULL && place == EMU_DEVICE && !emu_peers(emu_device(), emu_find(p)->device)) {
        fault = "memory of another device";
    }
    if (fault == NULL) return CUBLAS_STATUS_SUCCESS;
    return REFUSE(CUBLAS_STATUS_INVALID_VALUE, "%s: %s", what, fault);
}

static size_t operand_bytes(int64_t rows, int64_t columns, int64_t ld, int64_t stride,
                            int64_t count, cudaDataType type)
{
    if (rows == 0 || columns == 0 || count == 0) return 0;
    return (size_t)((count - 1) * stride + (columns - 1) * ld + rows) * emu_type_bytes(type);
}

static cublasStatus_t check_operands(const struct emu_product *p)
{
    bool t = p->a_transposed, u = p->b_transposed;
    size_t list = p->arrays ? (size_t)p->count * sizeof(void *) : 0;
    size_t a = operand_bytes(t ? p->k : p->m, t ? p->m : p->k, p->lda, p->stride_a, p->count,
                             p->in);
    size_t b = operand_bytes(u ? p->n : p->k, u ? p->k : p->n, p->ldb, p->stride_b, p->count,
                             p->in);
    size_t c = operand_bytes(p->m, p->n, p->ldc, p->stride_c, p->count, p->out);
    const char *kind = p->arrays ? "an array of pointers" : "an operand";
    cublasStatus_t status = check_place(kind, p->a, p->arrays ? list : a);
    if (status == CUBLAS_STATUS_SUCCESS) status = check_place(kind, p->b, p->arrays ? list : b);
    if (status == CUBLAS_STATUS_SUCCESS) status = check_place(kind, p->c, p->arrays ? list : c);
    size_t in = p->arrays ? sizeof(void *) : emu_type_bytes(p->in);
    size_t out = p->arrays ? sizeof(void *) : emu_type_bytes(p->out);
    if (status == CUBLAS_STATUS_SUCCESS && ((((uintptr_t)p->a | (uintptr_t)p->b) & (in - 1)) != 0 ||
                                            ((uintptr_t)p->c & (out - 1)) != 0)) {
        status = REFUSE(CUBLAS_STATUS_INVALID_VALUE, "an operand is not aligned to its elements");
    }
    return status;
}

/* ---- products -------------------------------------------------------------------------------- */

static void run_products(void *closure)
{
    const int64_t *count = closure;
    const struct emu_product *p = (const void *)((char *)closure + 16);
    for (int64_t i = 0; i < *count; i++) emu_multiply(&p[i]);
}

static cublasStatus_t put(cublasHandle_t h, const char *name, const struct emu_product *p,
                          int64_t count)
{
    cudaError_t status = cudaSuccess;
    struct CUstream_st *stream = emu_stream(h->stream, &status);
    if (stream == NULL) return CUBLAS_STATUS_EXECUTION_FAILED;
    if (stream->device != emu_device() || h->device != emu_device()) {
        return REFUSE(CUBLAS_STATUS_INVALID_VALUE,
                      "%s: handle of device %d, stream of %d, current %d", name, h->device,
                      stream->device, emu_device());
    }
    size_t bytes = (size_t)count * sizeof *p;
    struct emu_work *work = emu_work_new(name, run_products, NULL, 16 + bytes);
    memcpy(work->closure, &count, sizeof count);
    memcpy(work->closure + 16, p, bytes);
    emu_record(EMU_CALL_GEMM, name, stream, 0, p->c, p->a);
    return emu_put(stream, work) == cudaSuccess ? CUBLAS_STATUS_SUCCESS
                                                : CUBLAS_STATUS_EXECUTION_FAILED;
}

/* All of a call with one shape. */
static cublasStatus_t product(cublasHandle_t h, const char *name, struct emu_product *p,
                              const struct types *types, const void *alpha, const void *beta)
{
    cublasStatus_t status = enter(name);
    if (status == CUBLAS_STATUS_SUCCESS && h == NULL) status = CUBLAS_STATUS_NOT_INITIALIZED;
    if (status == CUBLAS_STATUS_SUCCESS) status = check_types(h, types, p);
    if (status == CUBLAS_STATUS_SUCCESS) status = check_shape(p);
    if (status == CUBLAS_STATUS_SUCCESS) status = check_scalars(h, alpha, beta, p);
    bool empty = p->m == 0 || p->n == 0 || p->count == 0;
    if (status == CUBLAS_STATUS_SUCCESS && !empty) status = check_operands(p);
    if (status == CUBLAS_STATUS_SUCCESS && !empty) status = put(h, name, p, 1);
    return leave(status);
}

#define TRANSPOSED(op) ((op) != CUBLAS_OP_N)

cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t transa, cublasOperation_t transb,
                            int m, int n, int k, const void *alpha, const void *a,
                            cudaDataType a_type, int lda, const void *b, cudaDataType b_type,
                            int ldb, const void *beta, void *c, cudaDataType c_type, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t algo)
{
    struct types types = {a_type, b_type, c_type, compute, false};
    struct emu_product p = {.a_transposed = TRANSPOSED(transa),
                            .b_transposed = TRANSPOSED(transb),
                            .m = m,
                            .n = n,
                            .k = k,
                            .lda = lda,
                            .ldb = ldb,
                            .ldc = ldc,
                            .count = 1,
                            .a = a,
                            .b = b,
                            .c = c};
    (void)algo;
    return product(h, "cublasGemmEx", &p, &types, alpha, beta);
}

cublasStatus_t cublasSgemm_v2(cublasHandle_t h, cublasOperation_t transa, cublasOperation_t transb,
                              int m, int n, int k, const float *alpha, const float *a, int lda,
                              const float *b, int ldb, const float *beta, float *c, int ldc)
{
    struct types types = {CUDA_R_32F, CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F, false};
    struct emu_product p = {.a_transposed = TRANSPOSED(transa),
                            .b_transposed = TRANSPOSED(transb),
                            .m = m,
                            .n = n,
                            .k = k,
                            .lda = lda,
                            .ldb = ldb,
                            .ldc = ldc,
                            .count = 1,
                            .a = a,
                            .b = b,
                            .c = c};
    return product(h, "cublasSgemm", &p, &types, alpha, beta);
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t h, cublasOperation_t transa,
                                          cublasOperation_t transb, int m, int n, int k,
                                          const void *alpha, const void *a, cudaDataType a_type,
                                          int lda, long long stride_a, const void *b,
                                          cudaDataType b_type, int ldb, long long stride_b,
                                          const void *beta, void *c, cudaDataType c_type, int ldc,
                                          long long stride_c, int count,
                                          cublasComputeType_t compute, cublasGemmAlgo_t algo)
{
    struct types types = {a_type, b_type, c_type, compute, false};
    struct emu_product p = {.a_transposed = TRANSPOSED(transa),
                            .b_transposed = TRANSPOSED(transb),
                            .m = m,
                            .n = n,
                            .k = k,
                            .lda = lda,
                            .ldb = ldb,
                            .ldc = ldc,
                            .count = count,
                            .a = a,
                            .b = b,
                            .c = c,
                            .stride_a = stride_a,
                            .stride_b = stride_b,
                            .stride_c = stride_c};
    (void)algo;
    return product(h, "cublasGemmStridedBatchedEx", &p, &types, alpha, beta);
}

cublasStatus_t cublasGemmBatchedEx(cublasHandle_t h, cublasOperation_t transa,
                                   cublasOperation_t transb, int m, int n, int k, const void *alpha,
                                   const void *const a[], cudaDataType a_type, int lda,
                                   const void *const b[], cudaDataType b_type, int ldb,
                                   const void *beta, void *const c[], cudaDataType c_type, int ldc,
                                   int count, cublasComputeType_t compute, cublasGemmAlgo_t algo)
{
    struct types types = {a_type, b_type, c_type, compute, false};
    struct emu_product p = {.a_transposed = TRANSPOSED(transa),
                            .b_transposed = TRANSPOSED(transb),
                            .arrays = true,
                            .m = m,
                            .n = n,
                            .k = k,
                            .lda = lda,
                            .ldb = ldb,
                            .ldc = ldc,
                            .count = count,
                            .a = a,
                            .b = b,
                            .c = (void *)c};
    (void)algo;
    return product(h, "cublasGemmBatchedEx", &p, &types, alpha, beta);
}

/* Shapes and scalars of each group on the host, the pointers of all groups in one device array. */
cublasStatus_t cublasGemmGroupedBatchedEx(
    cublasHandle_t h, const cublasOperation_t transa[], const cublasOperation_t transb[],
    const int m[], const int n[], const int k[], const void *alpha, const void *const a[],
    cudaDataType a_type, const int lda[], const void *const b[], cudaDataType b_type,
    const int ldb[], const void *beta, void *const c[], cudaDataType c_type, const int ldc[],
    int group_count, const int group_size[], cublasComputeType_t compute)
{
    struct types types = {a_type, b_type, c_type, compute, true};
    cublasStatus_t status = enter("cublasGemmGroupedBatchedEx");
    struct emu_product *p = calloc(group_count > 0 ? (size_t)group_count : 1, sizeof *p);
    int64_t begin = 0;
    if (p == NULL) abort();
    if (status == CUBLAS_STATUS_SUCCESS && h->pointers != CUBLAS_POINTER_MODE_HOST) {
        status = REFUSE(CUBLAS_STATUS_NOT_SUPPORTED, "grouped products take scalars of the host");
    }
    if (group_count < 0) status = CUBLAS_STATUS_INVALID_VALUE;
    for (int g = 0; g < group_count && status == CUBLAS_STATUS_SUCCESS; g++) {
        struct emu_product one = {.a_transposed = TRANSPOSED(transa[g]),
                                  .b_transposed = TRANSPOSED(transb[g]),
                                  .arrays = true,
                                  .m = m[g],
                                  .n = n[g],
                                  .k = k[g],
                                  .lda = lda[g],
                                  .ldb = ldb[g],
                                  .ldc = ldc[g],
                                  .count = group_size[g],
                                  .a = a + begin,
                                  .b = b + begin,
                                  .c = (void *)(c + begin)};
        begin += group_size[g];
        status = check_types(h, &types, &one);
        if (status == CUBLAS_STATUS_SUCCESS) status = check_shape(&one);
        if (status == CUBLAS_STATUS_SUCCESS) {
            status = check_scalars(h, (const float *)alpha + g, (const float *)beta + g, &one);
        }
        if (status == CUBLAS_STATUS_SUCCESS) status = check_operands(&one);
        p[g] = one;
    }
    if (status == CUBLAS_STATUS_SUCCESS && begin > 0) {
        status = put(h, "cublasGemmGroupedBatchedEx", p, group_count);
    }
    free(p);
    return leave(status);
}
