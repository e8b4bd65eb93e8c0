/* check_nccl_fake.c - the fake libnccl moves data as NCCL does: what goes where, in which order,
 * what waits for whom; as threads and as processes.
 *
 * Faults are in check_nccl_faults.c, refusals in check_nccl_refusals.c, mistakes in
 * check_nccl_mistakes.c. */
#include "nccl_case.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

/* ---- collectives ----------------------------------------------------------------------------- */

static void body_all_to_all(struct rank_case *r)
{
    enum { N = 7 };
    size_t n = (size_t)(N * r->ranks);
    float got[16 * N];
    make_comm(r);
    float *send = floats(r, n, 1000.0f * (float)r->rank), *receive = floats(r, n, 0.0f);
    NCCL(ncclAlltoAll(send, receive, N, ncclFloat, r->comm, r->stream));
    read_floats(r, got, receive, n);
    for (int p = 0; p < r->ranks; p++) {
        for (int i = 0; i < N; i++) {
            EXPECT(got[p * N + i] == 1000.0f * (float)p + (float)(r->rank * N + i));
        }
    }
    end_comm(r);
    CUDA(cudaFree(send));
    CUDA(cudaFree(receive));
}

static void body_collectives(struct rank_case *r)
{
    enum { N = 5 };
    int ranks = r->ranks, rank = r->rank;
    size_t n = (size_t)(N * ranks);
    float got[16 * N], total = 0;
    make_comm(r);
    float *x = floats(r, n, (float)rank), *y = floats(r, n, 0.0f);
    for (int p = 0; p < ranks; p++) total += (float)p;
    NCCL(ncclAllGather(x, y, N, ncclFloat, r->comm, r->stream));
    read_floats(r, got, y, n);
    for (int i = 0; i < N * ranks; i++) EXPECT(got[i] == (float)(i / N + i % N));
    NCCL(ncclReduceScatter(x, y, N, ncclFloat, ncclSum, r->comm, r->stream));
    read_floats(r, got, y, N);
    for (int i = 0; i < N; i++) EXPECT(got[i] == total + (float)(ranks * (rank * N + i)));
    NCCL(ncclAllReduce(x, y, N, ncclFloat, ncclMax, r->comm, r->stream));
    read_floats(r, got, y, N);
    for (int i = 0; i < N; i++) EXPECT(got[i] == (float)(ranks - 1 + i));
    NCCL(ncclAllReduce(x, x, N, ncclFloat, ncclAvg, r->comm, r->stream));
    NCCL(ncclBroadcast(x, y, N, ncclFloat, ranks - 1, r->comm, r->stream));
    read_floats(r, got, y, N);
    for (int i = 0; i < N; i++) EXPECT(got[i] == total / (float)ranks + (float)i);
    NCCL(ncclBroadcast(rank == 0 ? x + 1 : x, x, 1, ncclFloat, 0, r->comm, r->stream));
    end_comm(r);
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

/* ---- pairs ----------------------------------------------------------------------------------- */

/* Rank a sends (a + 2 b) % 3 rows to b: many pairs have none, and the own rows go the same way. */
static void body_variable_rows(struct rank_case *r)
{
    enum { ROW = 3 };
    int ranks = r->ranks, rank = r->rank, at = 0, from = 0;
    float got[16 * 2 * ROW];
    make_comm(r);
    float *send = floats(r, 16 * 2 * ROW, 0.0f), *receive = floats(r, 16 * 2 * ROW, 0.0f);
    for (int p = 0; p < ranks; p++) at += (rank + 2 * p) % 3;
    float *rows = floats(r, (size_t)at * ROW + 1, 1000.0f * (float)rank);
    NCCL(ncclGroupStart());
    at = 0;
    for (int p = 0; p < ranks; p++) {
        int out = (rank + 2 * p) % 3, in = (p + 2 * rank) % 3;
        NCCL(ncclSend(rows + at, (size_t)out * ROW, ncclFloat, p, r->comm, r->stream));
        NCCL(ncclRecv(receive + from, (size_t)in * ROW, ncclFloat, p, r->comm, r->stream));
        at += out * ROW;
        from += in * ROW;
    }
    NCCL(ncclGroupEnd());
    read_floats(r, got, receive, (size_t)from);
    from = 0;
    for (int p = 0; p < ranks; p++) {
        int before = 0, in = (p + 2 * rank) % 3;
        for (int q = 0; q < rank; q++) before += (p + 2 * q) % 3;
        for (int i = 0; i < in * ROW; i++) {
            EXPECT(got[from++] == 1000.0f * (float)p + (float)(before * ROW + i));
        }
    }
    end_comm(r);
    CUDA(cudaFree(send));
    CUDA(cudaFree(receive));
    CUDA(cudaFree(rows));
}

/* Three messages to the next rank, in one group and after it, are received in their order. */
static void body_order_of_a_pair(struct rank_case *r)
{
    int next = (r->rank + 1) % r->ranks, before = (r->rank + r->ranks - 1) % r->ranks;
    float got[3];
    make_comm(r);
    float *x = floats(r, 3, 10.0f * (float)r->rank), *y = floats(r, 3, 0.0f);
    NCCL(ncclGroupStart());
    NCCL(ncclRecv(y, 1, ncclFloat, before, r->comm, r->stream));
    NCCL(ncclSend(x, 1, ncclFloat, next, r->comm, r->stream));
    NCCL(ncclSend(x + 1, 1, ncclFloat, next, r->comm, r->stream));
    NCCL(ncclRecv(y + 1, 1, ncclFloat, before, r->comm, r->stream));
    NCCL(ncclGroupEnd());
    NCCL(ncclGroupStart());
    NCCL(ncclSend(x + 2, 1, ncclFloat, next, r->comm, r->stream));
    NCCL(ncclRecv(y + 2, 1, ncclFloat, before, r->comm, r->stream));
    NCCL(ncclGroupEnd());
    read_floats(r, got, y, 3);
    for (int i = 0; i < 3; i++) EXPECT(got[i] == 10.0f * (float)before + (float)i);
    end_comm(r);
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

/* A call returns while the peer is away; its stream and event are not ready, what it receives is
 * not there, and other streams go on. */
static void body_asynchronous(struct rank_case *r)
{
    cudaStream_t other;
    cudaEvent_t event;
    float got;
    make_comm(r);
    CUDA(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
    CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    float *x = floats(r, 1, (float)r->rank), *y = floats(r, (size_t)r->ranks, 0.0f);
    if (r->rank == 0) {
        NCCL(ncclAllGather(x, y, 1, ncclFloat, r->comm, r->stream));
        CUDA(cudaEventRecord(event, r->stream));
        EXPECT(stays_pending(r->stream));
        EXPECT(cudaEventQuery(event) == cudaErrorNotReady);
        CUDA(cudaMemcpyAsync(&got, y + 1, sizeof got, cudaMemcpyDeviceToHost, other));
        EXPECT(all_nan(&got, 1));
    }
    meet(r);
    if (r->rank > 0) NCCL(ncclAllGather(x, y, 1, ncclFloat, r->comm, r->stream));
    if (r->rank == 0) CUDA(cudaEventSynchronize(event));
    read_floats(r, &got, y + r->ranks - 1, 1);
    EXPECT(got == (float)(r->ranks - 1));
    end_comm(r);
    CUDA(cudaStreamDestroy(other));
    CUDA(cudaEventDestroy(event));
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

/* ---- graphs ---------------------------------------------------------------------------------- */

static void body_graph(struct rank_case *r)
{
    enum { LAUNCHES = 3 };
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    float got[16];
    size_t n = (size_t)r->ranks;
    make_comm(r);
    float *x = floats(r, n, (float)(r->rank * r->ranks)), *y = floats(r, n, 0.0f);
    CUDA(cudaStreamBeginCapture(r->stream, cudaStreamCaptureModeThreadLocal));
    NCCL(ncclAlltoAll(x, y, 1, ncclFloat, r->comm, r->stream));
    NCCL(ncclAllReduce(y, x, n, ncclFloat, ncclSum, r->comm, r->stream));
    CUDA(cudaStreamEndCapture(r->stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    CUDA(cudaGraphDestroy(graph));
    for (int i = 0; i < LAUNCHES; i++) CUDA(cudaGraphLaunch(exec, r->stream));
    CUDA(cudaGraphExecDestroy(exec));
    read_floats(r, got, x, n);
    float sums[16] = {0}, sent[16];
    for (int launch = 0; launch < LAUNCHES; launch++) {
        /* y[i] of rank q is x[q] of rank i: from the second launch on all ranks have one x. */
        for (int i = 0; i < r->ranks; i++) {
            sums[i] = 0;
            for (int q = 0; q < r->ranks; q++) {
                sums[i] += launch == 0 ? (float)(i * r->ranks + q) : sent[q];
            }
        }
        memcpy(sent, sums, sizeof sent);
    }
    for (int i = 0; i < r->ranks; i++) EXPECT(got[i] == sums[i]);
    CUDA(cudaStreamSynchronize(r->stream));
    end_comm(r);
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

/* ---- streams and groups ---------------------------------------------------------------------- */

/* A group on two streams waits for both and lets both wait; operations of one communicator on
 * several streams keep the order of the calls. */
static void body_streams(struct rank_case *r)
{
    enum { N = 1000 };
    cudaStream_t other;
    float got[N], *p[2] = {NULL, NULL};
    int next = (r->rank + 1) % r->ranks, before = (r->rank + r->ranks - 1) % r->ranks;
    make_comm(r);
    CUDA(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
    float *x = floats(r, N, 10000.0f * (float)r->rank), *y = floats(r, N, 0.0f);
    for (int i = 0; i < 2; i++) CUDA(cudaMalloc((void **)&p[i], N * sizeof(float)));
    for (int i = 0; i < 5; i++) {
        CUDA(cudaMemcpyAsync(p[0], x, N * sizeof *x, cudaMemcpyDeviceToDevice, r->stream));
        CUDA(cudaMemsetAsync(p[1], 0, N * sizeof *x, other));
        NCCL(ncclGroupStart());
        NCCL(ncclRecv(p[1], N, ncclFloat, before, r->comm, other));
        NCCL(ncclSend(p[0], N, ncclFloat, next, r->comm, r->stream));
        NCCL(ncclGroupEnd());
        CUDA(cudaMemsetAsync(p[0], 0, N * sizeof *x, r->stream));
        CUDA(cudaMemcpyAsync(y, p[1], N * sizeof *x, cudaMemcpyDeviceToDevice, other));
        CUDA(cudaStreamSynchronize(other));
        read_floats(r, got, y, N);
        EXPECT(got[0] == 10000.0f * (float)before && got[N - 1] == got[0] + N - 1);
        NCCL(ncclAllReduce(x, p[0], N, ncclFloat, ncclSum, r->comm, r->stream));
        NCCL(ncclAllReduce(x, p[1], N, ncclFloat, ncclMin, r->comm, other));
        read_floats(r, got, p[0], 1);
        EXPECT(got[0] == 10000.0f * (float)(r->ranks * (r->ranks - 1) / 2));
        CUDA(cudaStreamSynchronize(other));
        read_floats(r, got, p[1], 1);
        EXPECT(got[0] == 0.0f);
    }
    end_comm(r);
    CUDA(cudaStreamDestroy(other));
    for (int i = 0; i < 2; i++) CUDA(cudaFree(p[i]));
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

/* One thread, all ranks. */
static void body_init_all(struct rank_case *r)
{
    enum { P = 4 };
    ncclComm_t comms[P];
    cudaStream_t streams[P];
    float *x[P], *y[P], got[P];
    int device = -1;
    NCCL(ncclCommInitAll(comms, P, NULL));
    for (int p = 0; p < P; p++) {
        CUDA(cudaSetDevice(p));
        CUDA(cudaStreamCreateWithFlags(&streams[p], cudaStreamNonBlocking));
        CUDA(cudaMalloc((void **)&x[p], P * sizeof(float)));
        CUDA(cudaMalloc((void **)&y[p], P * sizeof(float)));
        float value[P] = {(float)p, (float)p, (float)p, (float)p};
        CUDA(cudaMemcpyAsync(x[p], value, sizeof value, cudaMemcpyHostToDevice, streams[p]));
        NCCL(ncclCommCuDevice(comms[p], &device));
        EXPECT(device == p);
    }
    NCCL(ncclGroupStart());
    for (int p = 0; p < P; p++) {
        CUDA(cudaSetDevice(p));
        NCCL(ncclAlltoAll(x[p], y[p], 1, ncclFloat, comms[p], streams[p]));
    }
    NCCL(ncclGroupEnd());
    for (int p = 0; p < P; p++) {
        CUDA(cudaSetDevice(p));
        CUDA(cudaMemcpyAsync(got, y[p], sizeof got, cudaMemcpyDeviceToHost, streams[p]));
        for (int q = 0; q < P; q++) EXPECT(got[q] == (float)q);
        NCCL(ncclCommDestroy(comms[p]));
        CUDA(cudaStreamDestroy(streams[p]));
        CUDA(cudaFree(x[p]));
        CUDA(cudaFree(y[p]));
    }
    CUDA(cudaSetDevice(r->rank));
}

/* Even and odd ranks, in reverse order; the last rank goes without. */
static void body_split(struct rank_case *r)
{
    ncclComm_t child = NULL, none = r->comm;
    int ranks = 0, rank = -1, wanted = (r->ranks - r->rank - 1) / 2;
    bool alone = r->rank == r->ranks - 1;
    float got;
    make_comm(r);
    NCCL(ncclCommSplit(r->comm, r->rank % 2, -r->rank, &child, NULL));
    NCCL(ncclCommCount(child, &ranks));
    NCCL(ncclCommUserRank(child, &rank));
    EXPECT(ranks == r->ranks / 2 && rank == wanted);
    float *x = floats(r, 1, (float)r->rank), *y = floats(r, 1, 0.0f);
    NCCL(ncclAllReduce(x, y, 1, ncclFloat, ncclMax, child, r->stream));
    read_floats(r, &got, y, 1);
    EXPECT(got == (float)(r->ranks - 2 + r->rank % 2));
    NCCL(ncclCommDestroy(child));
    NCCL(ncclCommSplit(r->comm, alone ? NCCL_SPLIT_NOCOLOR : 3, 0, &none, NULL));
    EXPECT((none == NULL) == alone);
    if (!alone) NCCL(ncclCommCount(none, &ranks));
    if (!alone) EXPECT(ranks == r->ranks - 1);
    if (!alone) NCCL(ncclCommDestroy(none));
    end_comm(r);
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

/* A thread waits for its stream, in calls within calls too; the thread that it waits for works. */
static void body_lock_is_free(struct rank_case *r)
{
    float got;
    void *given = NULL;
    make_comm(r);
    float *x = floats(r, 16, 1.0f), *y = floats(r, 16, 0.0f);
    for (int time = 0; time < 2; time++) {
        meet(r);
        if (r->rank > 0) {
            sleep_ms(20);
            float *z = floats(r, 4, 2.0f);
            read_floats(r, &got, z, 1);
            EXPECT(got == 2.0f);
            CUDA(cudaFree(z));
        }
        NCCL(ncclMemAlloc(&given, 64));
        NCCL(ncclAllReduce(x, y, 16, ncclFloat, ncclSum, r->comm, r->stream));
        if (time == 0) CUDA(cudaStreamSynchronize(r->stream));
        NCCL(ncclMemFree(given));
        EXPECT(cudaStreamQuery(r->stream) == cudaSuccess);
        read_floats(r, &got, y, 1);
        EXPECT(got == (float)r->ranks);
    }
    end_comm(r);
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

/* ---- types ----------------------------------------------------------------------------------- */

static void reduce_one(struct rank_case *r, ncclDataType_t type, size_t bytes, uint64_t mine,
                       uint64_t wanted)
{
    unsigned char *p = NULL;
    uint64_t got = 0;
    CUDA(cudaMalloc((void **)&p, 16));
    CUDA(cudaMemcpyAsync(p, &mine, bytes, cudaMemcpyHostToDevice, r->stream));
    NCCL(ncclAllReduce(p, p, 1, type, ncclSum, r->comm, r->stream));
    CUDA(cudaMemcpyAsync(&got, p, bytes, cudaMemcpyDeviceToHost, r->stream));
    EXPECT(got == wanted);
    CUDA(cudaFree(p));
}

/* 1 + 1, and 1.5 + 1.5 as bits. */
static void body_types(struct rank_case *r)
{
    make_comm(r);
    reduce_one(r, ncclInt8, 1, 1, 2);
    reduce_one(r, ncclUint8, 1, 200, 144);
    reduce_one(r, ncclInt32, 4, 1, 2);
    reduce_one(r, ncclUint32, 4, 1, 2);
    reduce_one(r, ncclInt64, 8, (uint64_t)1 << 40, (uint64_t)1 << 41);
    reduce_one(r, ncclUint64, 8, 1, 2);
    reduce_one(r, ncclFloat16, 2, 0x3e00, 0x4200);
    reduce_one(r, ncclBfloat16, 2, 0x3fc0, 0x4040);
    reduce_one(r, ncclFloat32, 4, 0x3fc00000, 0x40400000);
    reduce_one(r, ncclFloat64, 8, 0x3ff8000000000000, 0x4008000000000000);
    end_comm(r);
}

/* ---- the recorder ---------------------------------------------------------------------------- */

/* One step: what a rank's device was asked between start and stop. */
static void body_recorder(struct rank_case *r)
{
    const struct emu_call *list;
    float *p = NULL;
    make_comm(r);
    CUDA(cudaMalloc((void **)&p, 1024));
    meet(r);
    if (r->rank == 0) emu_record_start();
    meet(r);
    NCCL(ncclGroupStart());
    NCCL(ncclSend(p, 4, ncclFloat, 1 - r->rank, r->comm, r->stream));
    NCCL(ncclRecv(p + 8, 4, ncclFloat, 1 - r->rank, r->comm, r->stream));
    NCCL(ncclGroupEnd());
    NCCL(ncclAllGather(p, p + 16, 2, ncclFloat, r->comm, r->stream));
    meet(r);
    if (r->rank == 0) emu_record_stop();
    meet(r);
    size_t calls = emu_calls(&list), mine = 0;
    const char *const names[] = {"ncclSend", "ncclRecv", "ncclAllGather"};
    EXPECT(calls == 6 && emu_count(EMU_CALL_NCCL) == 6 && emu_count(EMU_CALL_SYNCHRONIZE) == 0);
    for (size_t i = 0; i < calls; i++) {
        const struct emu_call *c = &list[i];
        if (c->rank != r->rank) continue;
        EXPECT(mine < 3 && strcmp(c->name, names[mine]) == 0 && c->stream == r->stream);
        EXPECT(c->comm == r->comm && c->device == r->rank);
        EXPECT(c->peer == (mine < 2 ? 1 - r->rank : -1) && c->bytes == (mine < 2 ? 16 : 8));
        EXPECT(c->from == (mine == 1 ? NULL : p) && c->group == list[0].group + (mine == 2));
        mine++;
    }
    EXPECT(mine == 3);
    meet(r);
    CUDA(cudaStreamSynchronize(r->stream));
    end_comm(r);
    CUDA(cudaFree(p));
}

/* ---- versions -------------------------------------------------------------------------------- */

/* The library of 2.18 beside this one: what came later is not there, the rest is. */
static void body_versions(struct rank_case *r)
{
    int version = 0;
    ncclResult_t (*get_version)(int *) = NULL;
    NCCL(ncclGetVersion(&version));
    EXPECT(version == NCCL_VERSION_CODE && NCCL_VERSION_CODE == 22809);
    Dl_info info;
    char path[4096];
    EXPECT(dladdr((void *)(uintptr_t)ncclGetVersion, &info) != 0);
    snprintf(path, sizeof path, "%.*s/nccl_218/libnccl.so.2",
             (int)(strrchr(info.dli_fname, '/') - info.dli_fname), info.dli_fname);
    void *old = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    EXPECT(old != NULL);
    if (old == NULL) return;
    *(void **)&get_version = dlsym(old, "ncclGetVersion");
    EXPECT(get_version != NULL && get_version(&version) == ncclSuccess && version == 21805);
    const char *const later[] = {"ncclAlltoAll", "ncclCommRevoke",   "ncclMemAlloc",
                                 "ncclMemFree",  "ncclCommRegister", "ncclCommDeregister"};
    for (size_t i = 0; i < sizeof later / sizeof later[0]; i++) {
        EXPECT(dlsym(old, later[i]) == NULL && dlsym(RTLD_DEFAULT, later[i]) != NULL);
    }
    EXPECT(dlsym(old, "ncclSend") != NULL && dlsym(old, "ncclCommSplit") != NULL);
    dlclose(old);
}

static const struct named_body bodies[] = {
    {.name = "all_to_all", .body = body_all_to_all, .processes = true},
    {.name = "collectives", .body = body_collectives, .processes = true},
    {.name = "variable_rows", .body = body_variable_rows, .processes = true},
    {.name = "order_of_a_pair", .body = body_order_of_a_pair, .processes = true},
    {.name = "asynchronous", .body = body_asynchronous, .processes = true},
    {.name = "graph", .body = body_graph, .processes = true},
    {.name = "streams", .body = body_streams, .processes = true},
    {.name = "split", .body = body_split, .processes = true},
    {.name = "lock_is_free", .body = body_lock_is_free, .processes = true},
    {.name = "init_all", .body = body_init_all, .ranks = 1},
    {.name = "types", .body = body_types, .ranks = 2},
    {.name = "recorder", .body = body_recorder, .ranks = 2},
    {.name = "versions", .body = body_versions, .ranks = 1},
    {.name = NULL},
};

int main(int argc, char **argv) { return run_bodies(argc, argv, "nccl_fake", bodies); }
