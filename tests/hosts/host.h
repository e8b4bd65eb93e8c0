/* host.h - what the host programs share: checking, numbers, and one small layer.
 *
 * Each program of this directory is one kind of consumer: it uses the library as such a host would
 * and says what it showed. They read as examples; the acceptance test of the interface is that
 * they do. */
#ifndef HOST_H
#define HOST_H

#include <moe/moe.h>

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Ends the program with the library's message if a call fails. */
#define OK(call)                                                                  \
    do {                                                                          \
        if ((call) != MOE_OK) {                                                   \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, moe_last_error()); \
            exit(1);                                                              \
        }                                                                         \
    } while (0)

/* Ends the program if what it is to show is not so. */
#define SHOW(condition)                                                             \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                                \
        }                                                                           \
    } while (0)

enum { D = 24, F = 40, E = 6, K = 2, T = 64 };

/* Roughly normal numbers, the same every time. */
static inline void fill(float *to, int64_t count, uint64_t seed)
{
    for (int64_t i = 0; i < count; i++) {
        float sum = -2;
        for (int j = 0; j < 4; j++) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            sum += (float)(seed >> 40) / 16777216.0f;
        }
        to[i] = sum;
    }
}

static inline float *floats(int64_t count)
{
    float *memory = calloc((size_t)count + 1, sizeof *memory);
    SHOW(memory != NULL);
    return memory;
}

static inline int same(const void *a, const void *b, int64_t count)
{
    return memcmp(a, b, (size_t)count * sizeof(float)) == 0;
}

/* A noisy gate, a SwiGLU pool with biases, and the layer of both. */
typedef struct small {
    moe_context *context;
    moe_gate *gate;
    moe_experts *experts;
    moe_layer *layer;
    moe_pass *pass;
} small;

static inline moe_gate_config gate_config(void)
{
    moe_gate_config g;
    OK(moe_gate_config_init(&g, sizeof g));
    g.d_model = D, g.num_experts = E, g.top_k = K, g.kind = MOE_GATE_NOISY_TOP_K;
    g.importance_weight = g.load_weight = 0.1;
    g.seed = 7;
    return g;
}

static inline moe_experts_config experts_config(void)
{
    moe_experts_config e;
    OK(moe_experts_config_init(&e, sizeof e));
    e.d_model = D, e.d_hidden = F, e.num_experts = E, e.bias = 1;
    e.activation = MOE_ACTIVATION_SWIGLU;
    return e;
}

/* The context is made from `config` (NULL: defaults); parameters live where `parameters` says. */
static inline void small_make(small *s, const moe_context_config *config, int32_t parameters)
{
    moe_gate_config g = gate_config();
    moe_experts_config e = experts_config();
    moe_layer_config l;
    g.parameters = e.parameters = parameters;
    OK(moe_context_create(&s->context, config));
    OK(moe_gate_create(&s->gate, s->context, &g));
    OK(moe_experts_create(&s->experts, s->context, &e));
    OK(moe_layer_config_init(&l, sizeof l));
    l.gate = s->gate, l.experts = s->experts;
    OK(moe_layer_create(&s->layer, &l));
    OK(moe_layer_init_parameters(s->layer, 1));
    OK(moe_pass_create(&s->pass, s->layer, NULL));
}

static inline void small_free(small *s)
{
    moe_pass_destroy(s->pass);
    moe_layer_destroy(s->layer);
    moe_experts_destroy(s->experts);
    moe_gate_destroy(s->gate);
    moe_context_destroy(s->context);
}

static inline moe_forward_args forward_args(const float *x, float *y, int64_t tokens)
{
    moe_forward_args f;
    OK(moe_forward_args_init(&f, sizeof f));
    f.x = x, f.y = y, f.tokens = tokens, f.flags = MOE_FORWARD_TRAIN;
    return f;
}

static inline moe_backward_args backward_args(const float *dy, float *dx)
{
    moe_backward_args b;
    OK(moe_backward_args_init(&b, sizeof b));
    b.dy = dy, b.dx = dx;
    return b;
}

static inline moe_parameter_record record_of(const moe_layer *layer, int64_t index)
{
    moe_parameter_record p;
    OK(moe_parameter_record_init(&p, sizeof p));
    OK(moe_layer_parameter(layer, index, &p));
    return p;
}

/* Whether all gradients of two layers are the same bytes. */
static inline int same_gradients(const moe_layer *a, const moe_layer *b)
{
    for (int64_t i = 0; i < moe_layer_parameter_count(a); i++) {
        moe_parameter_record p = record_of(a, i), q = record_of(b, i);
        if (!same(p.grad, q.grad, p.element_count)) return 0;
    }
    return 1;
}

/* Gate weights that are not zero, so that routing means something. */
static inline void set_gate(const moe_layer *layer)
{
    for (int64_t i = 0; i < moe_layer_parameter_count(layer); i++) {
        moe_parameter_record p = record_of(layer, i);
        if (strncmp(p.name, "gate.", 5) == 0 && p.owned)
            fill(p.data, p.element_count, 100 + (uint64_t)i);
    }
}

#endif
