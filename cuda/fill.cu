/* fill.cu - zeros in strided memory, copies of strided matrices, and which experts had rows. */
#include "backend_cuda.h"

struct moe_box {
    int64_t count[3], stride[3];
};

/* base[i stride[0] + j stride[1] + k stride[2]] = 0, k the fastest thread */
template <typename E> MOE_GLOBAL(256) moe_fill_zero(E *base, moe_box box, int64_t total)
{
    int64_t step = (int64_t)gridDim.x * 256;
    for (int64_t at = (int64_t)blockIdx.x * 256 + threadIdx.x; at < total; at += step) {
        int64_t row = at / box.count[2], k = at - row * box.count[2];
        int64_t i = row / box.count[1], j = row - i * box.count[1];
        base[i * box.stride[0] + j * box.stride[1] + k * box.stride[2]] = 0;
    }
}

template <typename E>
static moe_status zero(const moe__workers *workers, void *base, const moe_box &box)
{
    int64_t total = moe__mul(box.count[0], moe__mul(box.count[1], box.count[2]));
    int64_t blocks = moe__min((total + 255) / 256, 0x7fffffff);
    if (total <= 0) return MOE_OK;
    return moe__cuda_launch(workers, "zero", moe_fill_zero<E>, dim3((unsigned)blocks), dim3(256), 0,
                            (E *)base, box, total);
}

/* The dimension with the smallest stride comes last. */
static moe_box fastest_last(const int64_t count[3], const int64_t stride[3])
{
    moe_box box;
    int last = 2;
    for (int d = 0; d < 3; d++) {
        box.count[d] = count[d];
        box.stride[d] = stride[d];
        if (count[d] > 1 && (count[last] <= 1 || stride[d] < stride[last])) last = d;
    }
    box.count[2] = count[last];
    box.stride[2] = stride[last];
    box.count[last] = count[2];
    box.stride[last] = stride[2];
    return box;
}

extern "C" moe_status moe__cuda_zero_strided(const moe__workers *workers, void *base,
                                             const int64_t count[3], const int64_t stride[3],
                                             int64_t element)
{
    moe_box box = fastest_last(count, stride);
    switch (element) {
    case 1: return zero<uint8_t>(workers, base, box);
    case 2: return zero<uint16_t>(workers, base, box);
    case 4: return zero<uint32_t>(workers, base, box);
    default: return zero<uint64_t>(workers, base, box);
    }
}

/* to[i to_row + j to_col] = from[i from_row + j from_col] of a matrix [.,n] */
struct moe_strides {
    int64_t row, col;
};

template <typename E>
MOE_GLOBAL(256)
moe_copy_matrix(E *to, moe_strides out, const E *from, moe_strides in, int64_t n, int64_t total)
{
    int64_t step = (int64_t)gridDim.x * 256;
    for (int64_t at = (int64_t)blockIdx.x * 256 + threadIdx.x; at < total; at += step) {
        int64_t i = at / n, j = at - i * n;
        to[i * out.row + j * out.col] = from[i * in.row + j * in.col];
    }
}

template <typename E>
static moe_status copy(const moe__workers *workers, void *to, moe_strides out, const void *from,
                       moe_strides in, int64_t k, int64_t n)
{
    int64_t blocks = moe__min((k * n + 255) / 256, 0x7fffffff);
    return moe__cuda_launch(workers, "copy of a matrix", moe_copy_matrix<E>, dim3((unsigned)blocks),
                            dim3(256), 0, (E *)to, out, (const E *)from, in, n, k * n);
}

extern "C" moe_status moe__cuda_copy_matrix(const moe__workers *workers, void *to,
                                            const int64_t to_stride[2], const void *from,
                                            const int64_t from_stride[2], int64_t k, int64_t n,
                                            int64_t element)
{
    moe_strides out = {to_stride[0], to_stride[1]}, in = {from_stride[0], from_stride[1]};
    if (k <= 0 || n <= 0) return MOE_OK;
    return element == 2 ? copy<uint16_t>(workers, to, out, from, in, k, n)
                        : copy<uint32_t>(workers, to, out, from, in, k, n);
}

struct moe_box_copy {
    int64_t count[3], to[3], from[3];
};

/* Element (i,j,k), k the fastest thread. */
template <typename E>
MOE_GLOBAL(256)
moe_copy_box(E *to, const E *from, moe_box_copy box, int64_t total)
{
    int64_t step = (int64_t)gridDim.x * 256;
    for (int64_t at = (int64_t)blockIdx.x * 256 + threadIdx.x; at < total; at += step) {
        int64_t row = at / box.count[2], k = at - row * box.count[2];
        int64_t i = row / box.count[1], j = row - i * box.count[1];
        to[i * box.to[0] + j * box.to[1] + k * box.to[2]] =
            from[i * box.from[0] + j * box.from[1] + k * box.from[2]];
    }
}

template <typename E>
static moe_status copy_box(const moe__workers *workers, void *to, const void *from,
                           const moe_box_copy &box)
{
    int64_t total = moe__mul(box.count[0], moe__mul(box.count[1], box.count[2]));
    int64_t blocks = moe__min((total + 255) / 256, 0x7fffffff);
    if (total <= 0) return MOE_OK;
    return moe__cuda_launch(workers, "copy of a tensor", moe_copy_box<E>, dim3((unsigned)blocks),
                            dim3(256), 0, (E *)to, (const E *)from, box, total);
}

extern "C" moe_status moe__cuda_copy_strided(const moe__workers *workers, void *to,
                                             const int64_t to_stride[3], const void *from,
                                             const int64_t from_stride[3], const int64_t count[3],
                                             int64_t element)
{
    moe_box_copy box;
    for (int d = 0; d < 3; d++)
        box.count[d] = count[d], box.to[d] = to_stride[d], box.from[d] = from_stride[d];
    return element == 2 ? copy_box<uint16_t>(workers, to, from, box)
                        : copy_box<uint32_t>(workers, to, from, box);
}

/* touched[e] = 1 for every expert with rows; forget: 0 for the others */
MOE_GLOBAL(256)
moe_fill_touched(uint8_t *touched, const int64_t *expert_begin, int64_t num_experts, int32_t forget)
{
    int64_t e = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (e >= num_experts) return;
    bool rows = expert_begin[e] < expert_begin[e + 1];
    if (rows || forget) touched[e] = rows;
}

extern "C" moe_status moe__cuda_note_touched(const moe__workers *workers, uint8_t *touched,
                                             const moe__plan_arrays *plan, bool forget)
{
    if (plan->num_experts == 0) return MOE_OK;
    return moe__cuda_launch(workers, "touched", moe_fill_touched,
                            dim3((unsigned)((plan->num_experts + 255) / 256)), dim3(256), 0,
                            touched, plan->expert_begin, plan->num_experts, forget);
}
