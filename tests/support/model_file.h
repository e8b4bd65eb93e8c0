/* model_file.h - a layer of any layout for the suites of models, and its elements by their place in
 * the logical tensor. */
#ifndef MODEL_FILE_H
#define MODEL_FILE_H

#include "support/layer_case.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { D = 64, F = 32, E = 4, K = 2, T = 5 };

/* ---- a layer and its numbers in one order ---------------------------------------------------- */

typedef struct setup {
    int layout, glu_order, bias, gate_bias, selection_bias, shared, shared_gate, activation;
    int64_t experts, width, d_model; /* 0: E, F, D */
    int32_t dtype;
    moe_comm *comm;
    int64_t local; /* 0: all */
} setup;

static inline moe_layer *make_layer(moe_context *context, const setup *s)
{
    moe_gate *gate;
    moe_experts *pool, *shared = NULL;
    moe_layer *layer;
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    MUST(moe_gate_config_init(&g, sizeof g));
    g.d_model = s->d_model ? s->d_model : D, g.num_experts = s->experts ? s->experts : E;
    g.top_k = K, g.dtype = s->dtype, g.bias = s->gate_bias, g.selection_bias = s->selection_bias;
    g.order = MOE_ORDER_SCORE_THEN_SELECT, g.renormalize = 1;
    MUST(moe_gate_create(&gate, context, &g));
    MUST(moe_experts_config_init(&e, sizeof e));
    e.d_model = g.d_model, e.d_hidden = s->width ? s->width : F;
    e.num_experts = s->local ? s->local : g.num_experts;
    e.dtype = s->dtype, e.bias = s->bias, e.weight_layout = s->layout;
    e.activation = s->activation ? s->activation : MOE_ACTIVATION_SWIGLU;
    if (e.activation >= MOE_ACTIVATION_SWIGLU) e.glu_order = s->glu_order;
    MUST(moe_experts_create(&pool, context, &e));
    e.num_experts = s->shared, e.bias = 0;
    if (s->shared) MUST(moe_experts_create(&shared, context, &e));
    MUST(moe_layer_config_init(&l, sizeof l));
    l.gate = gate, l.experts = pool, l.shared = shared, l.shared_gate = s->shared_gate;
    l.comm = s->comm;
    MUST(moe_layer_create(&layer, &l));
    moe_gate_destroy(gate), moe_experts_destroy(pool), moe_experts_destroy(shared);
    return layer;
}

/* A number that says where it belongs, exact in bf16: small multiples of powers of two. */
static inline float number(int tensor, int64_t e, int64_t out, int64_t in)
{
    uint32_t h = (uint32_t)(tensor * 7919 + e * 104729 + out * 1299709 + in * 15485863);
    h ^= h >> 13, h *= 0x5bd1e995u, h ^= h >> 15;
    return (float)((int)(h & 127) - 64) / 256;
}
enum { GATE, W1, W3, W2, B1, B3, B2, S1, S3, S2, GATE_BIAS, SELECTION, SHARED_GATE };

static inline uint16_t bf16(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return (uint16_t)(u >> 16);
}

/* ---- what a layer has ------------------------------------------------------------------------ */

/* A tensor of the numbers in a layer: the record of the parameter that holds it. */
typedef struct tensor_place {
    const setup *s;
    moe_parameter_record r;
    int tensor, pool, half, fused;
} tensor_place;

static inline tensor_place find_tensor(const moe_layer *layer, const setup *s, int tensor)
{
    static const char *const NAMES[] = {
        "gate.weight", "experts.w1",          "experts.w3", "experts.w2", "experts.b1",
        "experts.b3",  "experts.b2",          "shared.w1",  "shared.w3",  "shared.w2",
        "gate.bias",   "gate.selection_bias", "shared_gate"};
    char name[40];
    tensor_place p = {.s = s, .tensor = tensor};
    p.pool = (tensor >= W1 && tensor <= B2) || (tensor >= S1 && tensor <= S2);
    (void)snprintf(name, sizeof name, "%s", NAMES[tensor]);
    char *last = name + strlen(name) - 1;
    p.half = *last == '3';
    p.fused = p.pool && *last != '2' && s->glu_order != MOE_GLU_SEPARATE;
    if (p.fused) (void)snprintf(last, 3, "13");
    int64_t index = moe_layer_parameter_find(layer, name);
    ck_assert_msg(index >= 0, "%s", name);
    MUST(moe_parameter_record_init(&p.r, sizeof p.r));
    MUST(moe_layer_parameter(layer, index, &p.r));
    return p;
}

/* Element [out,in] of an expert's logical tensor, found from the layer's config by itself. */
static inline double element_of(const tensor_place *p, int64_t e, int64_t out, int64_t in)
{
    const setup *s = p->s;
    const moe_parameter_record *r = &p->r;
    if (p->fused && s->glu_order == MOE_GLU_INTERLEAVED) out = 2 * out + p->half;
    if (p->fused && s->glu_order == MOE_GLU_GATE_UP) out += p->half ? F : 0;
    if (p->fused && s->glu_order == MOE_GLU_UP_GATE) out += p->half ? 0 : F;
    int64_t at = p->tensor == GATE ? in * r->data_stride[0] + out * r->data_stride[1]
                 : !p->pool        ? out * r->data_stride[0]
                 : r->dims == 2    ? e * r->data_stride[0] + out * r->data_stride[1]
                 : s->layout
                     ? e * r->data_stride[0] + out * r->data_stride[1] + in * r->data_stride[2]
                     : e * r->data_stride[0] + in * r->data_stride[1] + out * r->data_stride[2];
    return r->data_dtype == MOE_DTYPE_F64 ? ((double *)r->data)[at]
                                          : (double)((float *)r->data)[at];
}

static inline double element(const moe_layer *layer, const setup *s, int tensor, int64_t e,
                             int64_t out, int64_t in)
{
    tensor_place p = find_tensor(layer, s, tensor);
    return element_of(&p, e, out, in);
}

static inline double silu(double z) { return z / (1 + exp(-z)); }

static inline uint64_t hash_of(const moe_layer *layer)
{
    uint64_t hash = 0;
    moe_parameter_record r;
    MUST(moe_parameter_record_init(&r, sizeof r));
    for (int64_t i = 0; i < moe_layer_parameter_count(layer); i++) {
        MUST(moe_layer_parameter(layer, i, &r));
        for (int64_t n = 0; n < 4 * r.element_count; n++)
            hash = (hash ^ ((const unsigned char *)r.data)[n]) * 0x100000001b3u;
    }
    return hash;
}

#endif
