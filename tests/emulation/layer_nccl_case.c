/* layer_nccl_case.c - layer_nccl_case.h. */
#include "layer_nccl_case.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const int64_t TOKENS[MOST_RANKS] = {5, 0, 7, 3, 0, 4, 2, 1};

int64_t layer_tokens(int rank) { return TOKENS[rank]; }

int64_t layer_first(int rank)
{
    int64_t first = 0;
    for (int r = 0; r < rank; r++) first += TOKENS[r];
    return first;
}

static size_t bytes_of(int32_t dtype)
{
    return dtype == MOE_DTYPE_BF16 || dtype == MOE_DTYPE_F16 ? 2 : 4;
}

/* ---- arrays ---------------------------------------------------------------------------------- */

/* Numbers of 4 significant bits, which every dtype has. */
static void write_number(unsigned char *to, int32_t dtype, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint16_t half = (uint16_t)(bits >> 16);
    if (dtype == MOE_DTYPE_F16)
        half = value == 0 ? 0
                          : (uint16_t)((bits >> 16 & 0x8000) |
                                       (((bits >> 23 & 0xff) - 112) << 10 & 0x7c00) |
                                       (bits >> 13 & 0x3ff));
    if (bytes_of(dtype) == 2)
        memcpy(to, &half, sizeof half);
    else
        memcpy(to, &value, sizeof value);
}

static void *numbers_from(struct rank_case *r, int32_t dtype, int64_t first, int64_t count,
                          int salt)
{
    size_t size = bytes_of(dtype), bytes = (size_t)(count * LAYER_D) * size;
    unsigned char *host = malloc(bytes + 1);
    void *device = NULL;
    for (int64_t i = 0; i < count * LAYER_D; i++) {
        int64_t at = first * LAYER_D + i;
        float value = (float)((at * 7 + at * at % 13 + salt) % 17 - 8) / 8;
        write_number(host + (size_t)i * size, dtype, value);
    }
    CUDA(cudaMalloc(&device, bytes + 1));
    if (bytes) CUDA(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, r->stream));
    CUDA(cudaStreamSynchronize(r->stream));
    free(host);
    return device;
}

static void make_arrays(struct rank_case *r, rank_layer *l)
{
    l->x = numbers_from(r, l->kind->dtype, l->first, l->tokens, 3);
    l->dy = numbers_from(r, l->kind->dtype, l->first, l->tokens, 5);
    l->y = numbers_from(r, l->kind->dtype, 0, l->tokens, 0);
    l->dx = numbers_from(r, l->kind->dtype, 0, l->tokens, 0);
}

/* ---- life ------------------------------------------------------------------------------------ */

static void share_experts(struct rank_case *r, rank_layer *l)
{
    int64_t units = LAYER_E * (l->kind->slices ? l->kind->slices : 1);
    l->own = 0;
    for (int64_t n = 0; n < units; n++) {
        int64_t owner = n * r->ranks / units;
        if (l->kind->last_first) owner = r->ranks - 1 - n * (r->ranks - 1) / units;
        if (owner == r->rank) l->numbers[l->own++] = n;
    }
}

static void make_parts(struct rank_case *r, rank_layer *l)
{
    const layer_kind *kind = l->kind;
    moe_gate_config g;
    moe_experts_config e;
    GOOD(moe_gate_config_init(&g, sizeof g));
    g.d_model = LAYER_D, g.num_experts = LAYER_E, g.top_k = LAYER_K, g.init_std = 0.5;
    g.dtype = kind->dtype;
    g.switch_weight = kind->global ? 0.01 : 0;
    GOOD(moe_gate_create(&l->gate, l->c->context, &g));
    GOOD(moe_experts_config_init(&e, sizeof e));
    e.d_model = LAYER_D, e.d_hidden = LAYER_F, e.activation = MOE_ACTIVATION_SWIGLU;
    e.dtype = kind->dtype, e.num_experts = l->own ? l->own : MOE_NO_EXPERTS;
    GOOD(moe_experts_create(&l->experts, l->c->context, &e));
}

static void put_beside(struct rank_case *r, rank_layer *l)
{
    moe_cuda_pass_config c;
    CUDA(cudaStreamCreateWithFlags(&l->beside, cudaStreamNonBlocking));
    GOOD(moe_cuda_pass_config_init(&c, sizeof c));
    c.exchange_stream = l->beside;
    GOOD(moe_cuda_pass_set(l->pass, &c));
}

static void make_objects(struct rank_case *r, rank_layer *l, bool alone)
{
    const layer_kind *kind = l->kind;
    moe_layer_config c;
    make_parts(r, l);
    GOOD(moe_layer_config_init(&c, sizeof c));
    c.gate = l->gate, c.experts = l->experts, c.comm = l->c->comm;
    if (kind->slices) c.expert_slices = kind->slices;
    if (kind->global) c.loss_batch = MOE_BATCH_GLOBAL;
    if (!alone) {
        c.placement = l->numbers;
        c.received = kind->received, c.max_received = kind->max_received;
        if (kind->padded_rows) c.exchange = MOE_EXCHANGE_PADDED, c.padded_rows = kind->padded_rows;
        if (kind->chunks) c.exchange_chunks = kind->chunks;
        c.node_comm = l->c->node_comm, c.rail_comm = l->c->rail_comm;
    }
    GOOD(moe_layer_create(&l->layer, &c));
    GOOD(moe_layer_init_parameters(l->layer, 1));
    GOOD(moe_pass_create(&l->pass, l->layer, NULL));
    if (kind->beside && !alone) put_beside(r, l);
    make_arrays(r, l);
}

void make_layer(struct rank_case *r, rank_layer *l, const rank_comm *c, const layer_kind *kind)
{
    memset(l, 0, sizeof *l);
    l->c = c;
    l->kind = kind, l->first = layer_first(r->rank), l->tokens = layer_tokens(r->rank);
    share_experts(r, l);
    make_objects(r, l, false);
}

void free_layer(struct rank_case *r, rank_layer *l)
{
    moe_pass_destroy(l->pass), moe_layer_destroy(l->layer);
    moe_experts_destroy(l->experts), moe_gate_destroy(l->gate);
    CUDA(cudaFree(l->x)), CUDA(cudaFree(l->y)), CUDA(cudaFree(l->dy)), CUDA(cudaFree(l->dx));
    if (l->beside) CUDA(cudaStreamDestroy(l->beside));
}

/* ---- calls ----------------------------------------------------------------------------------- */

static moe_forward_args forward_args(struct rank_case *r, const rank_layer *l, int64_t tokens)
{
    moe_forward_args f;
    GOOD(moe_forward_args_init(&f, sizeof f));
    f.tokens = tokens, f.token_first = l->first, f.x = l->x, f.y = l->y, f.stream = r->stream;
    f.flags = MOE_FORWARD_TRAIN;
    return f;
}

static moe_backward_args backward_args(struct rank_case *r, const rank_layer *l)
{
    moe_backward_args b;
    GOOD(moe_backward_args_init(&b, sizeof b));
    b.dy = l->dy, b.dx = l->dx, b.flags = MOE_BACKWARD_OVERWRITE, b.stream = r->stream;
    return b;
}

moe_status layer_forward(struct rank_case *r, rank_layer *l, int64_t tokens)
{
    moe_forward_args f = forward_args(r, l, tokens);
    return moe_layer_forward(l->layer, l->pass, &f);
}

moe_status layer_backward(struct rank_case *r, rank_layer *l)
{
    moe_backward_args b = backward_args(r, l);
    return moe_layer_backward(l->layer, l->pass, &b);
}

moe_status layer_start(struct rank_case *r, rank_layer *l, bool backward)
{
    moe_forward_args f = forward_args(r, l, l->tokens);
    moe_backward_args b = backward_args(r, l);
    return backward ? moe_layer_backward_start(l->layer, l->pass, &b)
                    : moe_layer_forward_start(l->layer, l->pass, &f);
}

double layer_step(struct rank_case *r, rank_layer *l)
{
    double squared = -1;
    GOOD(layer_forward(r, l, l->tokens));
    GOOD(layer_backward(r, l));
    GOOD(moe_layer_reduce_gradients(l->layer, r->stream));
    GOOD(moe_layer_gradient_norm(l->layer, &squared, r->stream));
    return squared;
}

/* ---- comparison ------------------------------------------------------------------------------ */

static void *on_host(struct rank_case *r, const void *device, int64_t bytes)
{
    void *host = malloc((size_t)bytes + 1);
    if (bytes)
        CUDA(cudaMemcpyAsync(host, device, (size_t)bytes, cudaMemcpyDeviceToHost, r->stream));
    CUDA(cudaStreamSynchronize(r->stream));
    return host;
}

static void same(struct rank_case *r, const rank_layer *l, const char *what, const void *got,
                 const void *want, int64_t bytes)
{
    void *a = on_host(r, got, bytes), *b = on_host(r, want, bytes);
    char text[100];
    (void)snprintf(text, sizeof text, "%s is that of one device, %s", what, l->kind->name);
    expect(r, memcmp(a, b, (size_t)bytes) == 0, text, __FILE__, __LINE__);
    free(a), free(b);
}

/* Sums over tokens, cut elsewhere; gradients of all are float. */
static void near(struct rank_case *r, const rank_layer *l, const char *what, const float *got,
                 const float *want, int64_t count)
{
    float *a = on_host(r, got, count * 4), *b = on_host(r, want, count * 4);
    double most = 0, off = 0;
    char text[140];
    for (int64_t i = 0; i < count; i++) {
        most = fmax(most, fabs(b[i]));
        off = fmax(off, fabs((double)a[i] - b[i]));
    }
    (void)snprintf(text, sizeof text, "%s is near that of one device, %s: off by %g of %g", what,
                   l->kind->name, off, most);
    expect(r, most > 0 && off <= 1e-5 * most, text, __FILE__, __LINE__);
    free(a), free(b);
}

/* Some of the experts' gradients may be zero; a round adds its own sums. */
static void compare_gradient(struct rank_case *r, const rank_layer *l, const rank_layer *one,
                             int64_t i)
{
    moe_parameter_record own, all;
    GOOD(moe_parameter_record_init(&own, sizeof own));
    GOOD(moe_parameter_record_init(&all, sizeof all));
    GOOD(moe_layer_parameter(l->layer, i, &own));
    GOOD(moe_layer_parameter(one->layer, i, &all));
    EXPECT(own.grad_dtype == MOE_DTYPE_F32 && strcmp(own.name, all.name) == 0);
    if (strncmp(own.name, "experts.", 8) != 0) {
        near(r, l, own.name, own.grad, all.grad, own.element_count);
        return;
    }
    int64_t each = all.element_count / one->own;
    for (int64_t e = 0; e < l->own; e++)
        if (l->kind->received != MOE_RECEIVED_CHUNK)
            same(r, l, own.name, (float *)own.grad + e * each,
                 (float *)all.grad + l->numbers[e] * each, each * 4);
}

/* One device with all tokens, a group for each rank. */
static void make_one(struct rank_case *r, rank_layer *one, rank_comm *alone, const layer_kind *kind,
                     int64_t *begin)
{
    memset(one, 0, sizeof *one), memset(alone, 0, sizeof *alone);
    for (int p = 0; p <= r->ranks; p++) begin[p] = layer_first(p);
    one->kind = kind, one->tokens = begin[r->ranks];
    one->own = LAYER_E * (kind->slices ? kind->slices : 1);
    alone->context = context_of_rank(r);
    GOOD(moe_comm_create_self(&alone->comm, alone->context));
    one->c = alone;
    make_objects(r, one, true);
}

void compare_with_one(struct rank_case *r, const rank_layer *l, double squared)
{
    rank_layer one;
    rank_comm alone;
    int64_t begin[MOST_RANKS + 1];
    moe_forward_args f;
    double want = -1;
    make_one(r, &one, &alone, l->kind, begin);
    GOOD(moe_forward_args_init(&f, sizeof f));
    f.tokens = one.tokens, f.groups = r->ranks, f.group_begin = begin;
    f.x = one.x, f.y = one.y, f.stream = r->stream, f.flags = MOE_FORWARD_TRAIN;
    GOOD(moe_layer_forward(one.layer, one.pass, &f));
    GOOD(layer_backward(r, &one));
    int64_t row = LAYER_D * (int64_t)bytes_of(l->kind->dtype);
    same(r, l, "y", l->y, (char *)one.y + l->first * row, l->tokens * row);
    if (!l->kind->global) /* which comes through sums over tokens */
        same(r, l, "dx", l->dx, (char *)one.dx + l->first * row, l->tokens * row);
    for (int64_t i = 0; i < moe_layer_parameter_count(l->layer); i++)
        compare_gradient(r, l, &one, i);
    GOOD(moe_layer_gradient_norm(one.layer, &want, r->stream));
    EXPECT(want > 0 && fabs(squared - want) <= 1e-5 * want);
    free_layer(r, &one);
    moe_comm_destroy(alone.comm), moe_context_destroy(alone.context);
}
