/* nccl_reduce.c - types of NCCL and sums over ranks, in the order of the ranks. */
#include "nccl_internal.h"
#include "half.h"

#include <stdio.h>
#include <string.h>

static const struct {
    const char *name;
    size_t bytes;
} types[ncclNumTypes] = {
    [ncclInt8] = {"int8", 1},           [ncclUint8] = {"uint8", 1},
    [ncclInt32] = {"int32", 4},         [ncclUint32] = {"uint32", 4},
    [ncclInt64] = {"int64", 8},         [ncclUint64] = {"uint64", 8},
    [ncclFloat16] = {"float16", 2},     [ncclFloat32] = {"float32", 4},
    [ncclFloat64] = {"float64", 8},     [ncclBfloat16] = {"bfloat16", 2},
    [ncclFloat8e4m3] = {"fp8 e4m3", 1}, [ncclFloat8e5m2] = {"fp8 e5m2", 1},
};

size_t nccl_type_bytes(ncclDataType_t type)
{
    return (unsigned)type < ncclNumTypes ? types[type].bytes : 0;
}

const char *nccl_type_name(ncclDataType_t type)
{
    return (unsigned)type < ncclNumTypes ? types[type].name : "no type";
}

/* A function that reduces element i of all ranks in type C; T is what it is stored as. */
#define REDUCE(function, T, C, read, write)                                         \
    static void function(void *out, const void *const *in, int ranks, size_t count, \
                         ncclRedOp_t op)                                            \
    {                                                                               \
        for (size_t i = 0; i < count; i++) {                                        \
            C sum = (C)read(((const T *)in[0])[i]);                                 \
            for (int r = 1; r < ranks; r++) {                                       \
                C x = (C)read(((const T *)in[r])[i]);                               \
                sum = op == ncclProd  ? (C)(sum * x)                                \
                      : op == ncclMax ? (x > sum ? x : sum)                         \
                      : op == ncclMin ? (x < sum ? x : sum)                         \
                                      : (C)(sum + x);                               \
            }                                                                       \
            if (op == ncclAvg) sum = (C)(sum / (C)ranks);                           \
            ((T *)out)[i] = (T)write(sum);                                          \
        }                                                                           \
    }
REDUCE(reduce_i8, int8_t, int8_t, , )
REDUCE(reduce_u8, uint8_t, uint8_t, , )
REDUCE(reduce_i32, int32_t, int32_t, , )
REDUCE(reduce_u32, uint32_t, uint32_t, , )
REDUCE(reduce_i64, int64_t, int64_t, , )
REDUCE(reduce_u64, uint64_t, uint64_t, , )
REDUCE(reduce_f32, float, float, , )
REDUCE(reduce_f64, double, double, , )
REDUCE(reduce_f16, uint16_t, float, moe__from_f16, moe__to_f16)
REDUCE(reduce_bf16, uint16_t, float, moe__from_bf16, moe__to_bf16)

bool nccl_reduce(void *out, const void *const *in, int ranks, size_t count, ncclDataType_t type,
                 ncclRedOp_t op)
{
    static void (*const reduce[ncclNumTypes])(void *, const void *const *, int, size_t,
                                              ncclRedOp_t) = {
        [ncclInt8] = reduce_i8,       [ncclUint8] = reduce_u8,    [ncclInt32] = reduce_i32,
        [ncclUint32] = reduce_u32,    [ncclInt64] = reduce_i64,   [ncclUint64] = reduce_u64,
        [ncclFloat16] = reduce_f16,   [ncclFloat32] = reduce_f32, [ncclFloat64] = reduce_f64,
        [ncclBfloat16] = reduce_bf16,
    };
    if ((unsigned)type >= ncclNumTypes || reduce[type] == NULL || (unsigned)op >= ncclNumOps) {
        return false;
    }
    if (count > 0) reduce[type](out, in, ranks, count, op);
    return true;
}

/* ---- words for messages ---------------------------------------------------------------------- */

const char *nccl_call_name(enum nccl_kind kind)
{
    static const char *const names[] = {"ncclSend",      "ncclRecv",      "ncclAlltoAll",
                                        "ncclAllGather", "ncclAllReduce", "ncclReduceScatter",
                                        "ncclBroadcast"};
    return names[kind];
}

void nccl_describe(char *text, size_t bytes, const struct nccl_transfer *t)
{
    const char *way = t->kind == NCCL_SEND        ? " to "
                      : t->kind == NCCL_RECEIVE   ? " from "
                      : t->kind == NCCL_BROADCAST ? " of "
                                                  : "";
    char peer[16] = "", op[16] = "";
    if (way[0] != 0) snprintf(peer, sizeof peer, "%d", t->peer);
    if (t->kind == NCCL_ALL_REDUCE || t->kind == NCCL_REDUCE_SCATTER) {
        snprintf(op, sizeof op, ", op %d", (int)t->op);
    }
    snprintf(text, bytes, "call %llu, %s%s%s, %zu %s%s%s", (unsigned long long)t->call,
             nccl_call_name(t->kind), way, peer, t->count, nccl_type_name(t->type), op,
             t->captured ? ", captured" : "");
}
