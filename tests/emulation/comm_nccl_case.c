/* comm_nccl_case.c - comm_nccl_case.h. */
#include "comm_nccl_case.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void said(struct rank_case *r, const char *text, const char *file, int line)
{
    bool found = strstr(moe_last_error(), text) != NULL;
    if (!found) printf("%s:%d: wanted: %s\n", file, line, text);
    expect(r, found, moe_last_error(), file, line);
}

void begin_program(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    setenv("MOE_EMULATION_DEVICES", "8", 1);
    setenv("MOE_EMULATION_QUIET", "1", 0);
}

/* ---- life ------------------------------------------------------------------------------------ */

void make_nccl(struct rank_case *r, int how)
{
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclResult_t state = ncclInProgress;
    if (how & NOT_BLOCKING) config.blocking = 0;
    ncclResult_t result = ncclCommInitRankConfig(&r->comm, r->ranks, r->id, r->rank, &config);
    EXPECT(result == ncclSuccess || (result == ncclInProgress && (how & NOT_BLOCKING)));
    while (result == ncclInProgress && state == ncclInProgress) {
        NCCL(ncclCommGetAsyncError(r->comm, &state));
        sleep_ms(1);
    }
}

moe_context *context_of_rank(struct rank_case *r)
{
    moe_cuda_config config;
    moe_context *context = NULL;
    GOOD(moe_cuda_config_init(&config, sizeof config));
    config.device = r->rank % 8;
    config.wait_seconds = 20;
    config.cublas_workspace_bytes = 1 << 18; /* the emulator fills it */
    GOOD(moe_cuda_context_create(&context, &config));
    return context;
}

void prepare(struct rank_case *r, rank_comm *c, int how, double timeout)
{
    memset(c, 0, sizeof *c);
    make_nccl(r, how);
    c->context = context_of_rank(r);
    GOOD(moe_nccl_config_init(&c->config, sizeof c->config));
    EXPECT(c->config.timeout == 60 && c->config.duplicate == 0 && c->config.warm_up == 1);
    EXPECT(c->config.comm == NULL && c->config.stream == NULL);
    c->config.comm = r->comm;
    c->config.timeout = timeout;
    c->config.duplicate = (how & DUPLICATE) != 0;
    c->config.warm_up = (how & COLD) == 0;
}

void join(struct rank_case *r, rank_comm *c, int how, double timeout)
{
    prepare(r, c, how, timeout);
    meet(r);
    GOOD(moe_comm_create_nccl(&c->comm, c->context, &c->config));
    EXPECT(moe_comm_rank(c->comm) == r->rank && moe_comm_size(c->comm) == r->ranks);
    EXPECT(moe_comm_capabilities(c->comm) == 15);
}

void refuse(struct rank_case *r, const rank_comm *c, moe_status code, const char *text)
{
    moe_comm *comm = NULL;
    EXPECT(moe_comm_create_nccl(&comm, c->context, &c->config) == code);
    said(r, text, __FILE__, __LINE__);
    EXPECT(comm == NULL);
}

void leave(struct rank_case *r, rank_comm *c)
{
    ncclResult_t state = ncclInProgress;
    moe_comm_destroy(c->comm);
    moe_context_destroy(c->context);
    meet(r);
    if (!r->comm) return;
    while (ncclCommGetAsyncError(r->comm, &state) == ncclSuccess && state == ncclInProgress)
        sleep_ms(1);
    NCCL(ncclCommDestroy(r->comm));
    r->comm = NULL;
}

void leave_after_failure(struct rank_case *r, rank_comm *c)
{
    meet(r);
    NCCL(ncclCommAbort(r->comm));
    r->comm = NULL;
    moe_comm_destroy(c->comm);
    moe_context_destroy(c->context);
}

bool all_is_gone(void)
{
    for (int i = 0; i < 2000; i++) {
        if (emu_live_allocations(0) + emu_live_allocations(1) + emu_live_objects() == 0 &&
            emu_nccl_live() == 0)
            return true;
        sleep_ms(1);
    }
    printf("left: %zu of devices, %zu pinned, %zu objects, %zu communicators\n",
           emu_live_allocations(0), emu_live_allocations(1), emu_live_objects(), emu_nccl_live());
    return false;
}

/* ---- rows ------------------------------------------------------------------------------------ */

static int64_t rows_of(int from, int to, int n)
{
    return (from * 7 + to * 3 + n * 5) % 4 * ((from + to + n) % 3);
}

static unsigned char byte_of(int from, int to, int n, int64_t at)
{
    return (unsigned char)(from * 31 + to * 17 + n * 7 + (int)(at % 251));
}

void fill_rows(struct rank_case *r, rank_rows *m, int n, int64_t row_bytes)
{
    memset(m, 0, sizeof *m);
    GOOD(moe_exchange_init(&m->e, sizeof m->e));
    for (int p = 0; p < r->ranks; p++) {
        m->recv_begin[p + 1] = m->recv_begin[p] + rows_of(p, r->rank, n);
        m->send_begin[p + 1] = m->send_begin[p] + rows_of(r->rank, p, n);
    }
    m->recv = calloc((size_t)(m->recv_begin[r->ranks] * row_bytes) + 1, 1);
    m->send = calloc((size_t)(m->send_begin[r->ranks] * row_bytes) + 1, 1);
    for (int p = 0; p < r->ranks; p++)
        for (int64_t i = 0; i < rows_of(r->rank, p, n) * row_bytes; i++)
            m->send[m->send_begin[p] * row_bytes + i] = byte_of(r->rank, p, n, i);
    m->e.recv = m->recv, m->e.send = m->send, m->e.row_bytes = row_bytes;
    m->e.recv_begin = m->recv_begin, m->e.send_begin = m->send_begin;
}

void check_rows(struct rank_case *r, const rank_rows *m, int n)
{
    int64_t row_bytes = m->e.row_bytes, bad = 0;
    for (int p = 0; p < r->ranks; p++)
        for (int64_t i = 0; i < rows_of(p, r->rank, n) * row_bytes; i++)
            bad += m->recv[m->recv_begin[p] * row_bytes + i] != byte_of(p, r->rank, n, i);
    EXPECT(bad == 0);
}

void rows_to_device(struct rank_case *r, rank_rows *m)
{
    size_t in = (size_t)(m->recv_begin[r->ranks] * m->e.row_bytes);
    size_t out = (size_t)(m->send_begin[r->ranks] * m->e.row_bytes);
    CUDA(cudaMalloc(&m->device_recv, in + 1));
    CUDA(cudaMalloc(&m->device_send, out + 1));
    if (out > 0)
        CUDA(cudaMemcpyAsync(m->device_send, m->send, out, cudaMemcpyHostToDevice, r->stream));
    m->e.recv = m->device_recv, m->e.send = m->device_send;
    m->e.memory = MOE_COMM_DEVICE_MEMORY, m->e.stream = r->stream;
}

/* Nobody has waited: what is put on the stream finds the rows. */
void rows_from_device(struct rank_case *r, rank_rows *m)
{
    size_t in = (size_t)(m->recv_begin[r->ranks] * m->e.row_bytes);
    if (in > 0)
        CUDA(cudaMemcpyAsync(m->recv, m->device_recv, in, cudaMemcpyDeviceToHost, r->stream));
    CUDA(cudaStreamSynchronize(r->stream));
}

void free_rows(struct rank_case *r, rank_rows *m)
{
    if (m->device_recv) CUDA(cudaFree(m->device_recv));
    if (m->device_send) CUDA(cudaFree(m->device_send));
    free(m->recv), free(m->send);
}
