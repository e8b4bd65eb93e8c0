/* model.c - see model.h for the picture. Forward and backward of each part stand side by side. */
#include "model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TRY(call)                                      \
    do {                                               \
        if ((call) != MOE_OK) {                        \
            fprintf(stderr, "%s\n", moe_last_error()); \
            return -1;                                 \
        }                                              \
    } while (0)

/* ---- making it ------------------------------------------------------------------------------- */

static int add_weights(model *m, const char *name, float *data, float *grad, int64_t count)
{
    weights *w = &m->parameters[m->parameter_count++];
    *w = (weights){.name = name, .data = data, .grad = grad, .count = count};
    w->mean = calloc((size_t)count, sizeof *w->mean);
    w->square = calloc((size_t)count, sizeof *w->square);
    if (w->mean && w->square) return 0;
    fprintf(stderr, "out of memory\n");
    return -1;
}

/* Every parameter of a layer joins the list the optimizer walks. */
static int add_layer(model *m, moe_layer *layer)
{
    for (int64_t i = 0; i < moe_layer_parameter_count(layer); i++) {
        moe_parameter_record p;
        TRY(moe_parameter_record_init(&p, sizeof p));
        TRY(moe_layer_parameter(layer, i, &p));
        if (add_weights(m, p.name, p.data, p.grad, p.element_count) != 0) return -1;
    }
    return 0;
}

static int make_mixture(model *m)
{
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    TRY(moe_gate_config_init(&g, sizeof g));
    g.d_model = WIDTH;
    g.num_experts = m->options.experts;
    g.top_k = m->options.top_k;
    g.kind = MOE_GATE_NOISY_TOP_K;
    g.importance_weight = g.load_weight = m->options.balance;
    g.seed = m->options.seed;
    TRY(moe_gate_create(&m->gate, m->context, &g));
    TRY(moe_experts_config_init(&e, sizeof e));
    e.d_model = WIDTH;
    e.d_hidden = HIDDEN;
    e.num_experts = m->options.experts;
    TRY(moe_experts_create(&m->experts, m->context, &e));
    TRY(moe_layer_config_init(&l, sizeof l));
    l.gate = m->gate;
    l.experts = m->experts;
    TRY(moe_layer_create(&m->layer, &l));
    TRY(moe_layer_init_parameters(m->layer, m->options.seed));
    TRY(moe_pass_create(&m->pass, m->layer, NULL));
    return add_layer(m, m->layer);
}

/* relu(x W1 + b1) W2 + b2, as a pool of one expert. */
static int make_network(model *m, network *n, int64_t in, int64_t hidden, int64_t out,
                        uint64_t seed)
{
    moe_experts_config e;
    moe_layer_config l;
    TRY(moe_experts_config_init(&e, sizeof e));
    e.d_model = in;
    e.d_hidden = hidden;
    e.d_out = out;
    e.num_experts = 1;
    e.bias = 1;
    TRY(moe_experts_create(&n->pool, m->context, &e));
    TRY(moe_layer_config_init(&l, sizeof l));
    l.experts = n->pool;
    TRY(moe_layer_create(&n->layer, &l));
    TRY(moe_layer_init_parameters(n->layer, seed));
    TRY(moe_pass_create(&n->pass, n->layer, NULL));
    TRY(moe_plan_create(&n->plan, m->context));
    return add_layer(m, n->layer);
}

static float *floats(int64_t count) { return calloc((size_t)count, sizeof(float)); }

static int make_buffers(model *m)
{
    int64_t T = m->options.tokens;
    m->x = floats(T * CONTEXT * EMBED), m->dx = floats(T * CONTEXT * EMBED);
    m->h = floats(T * WIDTH), m->dh = floats(T * WIDTH);
    m->n1 = floats(T * WIDTH), m->dn1 = floats(T * WIDTH), m->mixed = floats(T * WIDTH);
    m->n2 = floats(T * WIDTH), m->dn2 = floats(T * WIDTH);
    m->logits = floats(T * BYTES), m->dlogits = floats(T * BYTES);
    if (m->x && m->dx && m->h && m->dh && m->n1 && m->dn1 && m->mixed && m->n2 && m->dn2 &&
        m->logits && m->dlogits)
        return 0;
    fprintf(stderr, "out of memory\n");
    return -1;
}

static int make_embedding(model *m)
{
    float *data = floats(BYTES * EMBED), *grad = floats(BYTES * EMBED);
    if (!data || !grad) {
        free(data);
        free(grad);
        fprintf(stderr, "out of memory\n");
        return -1;
    }
    m->embedding = &m->parameters[m->parameter_count];
    for (int64_t i = 0; i < BYTES * EMBED; i++) { /* uniform in [-1,1), the same every time */
        uint32_t bits = (uint32_t)i * 2654435761u + (uint32_t)m->options.seed;
        bits ^= bits >> 15;
        bits *= 2246822519u;
        data[i] = (float)((bits >> 8) & 0xffff) / 32768.0f - 1.0f;
    }
    return add_weights(m, "embedding", data, grad, BYTES * EMBED);
}

int model_create(model *m, const model_options *options)
{
    moe_context_config c;
    memset(m, 0, sizeof *m);
    m->options = *options;
    TRY(moe_context_config_init(&c, sizeof c));
    c.threads = options->threads;
    TRY(moe_context_create(&m->context, &c));
    if (make_embedding(m) != 0 || make_mixture(m) != 0 || make_buffers(m) != 0) return -1;
    if (make_network(m, &m->input, CONTEXT * EMBED, WIDTH, WIDTH, options->seed + 1) != 0)
        return -1;
    return make_network(m, &m->output, WIDTH, WIDTH, BYTES, options->seed + 2);
}

static void destroy_network(network *n)
{
    moe_pass_destroy(n->pass);
    moe_plan_destroy(n->plan);
    moe_layer_destroy(n->layer);
    moe_experts_destroy(n->pool);
}

void model_destroy(model *m)
{
    float *buffers[] = {m->x,     m->dx, m->h,   m->dh,     m->n1,     m->dn1,
                        m->mixed, m->n2, m->dn2, m->logits, m->dlogits};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
    if (m->embedding) {
        free(m->embedding->data);
        free(m->embedding->grad);
    }
    for (int i = 0; i < m->parameter_count; i++) {
        free(m->parameters[i].mean);
        free(m->parameters[i].square);
    }
    destroy_network(&m->input);
    destroy_network(&m->output);
    moe_pass_destroy(m->pass);
    moe_layer_destroy(m->layer);
    moe_experts_destroy(m->experts);
    moe_gate_destroy(m->gate);
    moe_context_destroy(m->context);
}

/* ---- the parts ------------------------------------------------------------------------------- */

/* x[t] = embedding of the CONTEXT bytes before positions[t]; backward adds dx to their
 * gradients. */
static void embed(const model *m, const uint8_t *text, const int64_t *positions, int64_t T)
{
    for (int64_t t = 0; t < T; t++)
        for (int c = 0; c < CONTEXT; c++)
            memcpy(m->x + (t * CONTEXT + c) * EMBED,
                   m->embedding->data + text[positions[t] - CONTEXT + c] * EMBED,
                   EMBED * sizeof(float));
}

static void embed_backward(model *m, const uint8_t *text, const int64_t *positions, int64_t T)
{
    memset(m->embedding->grad, 0, (size_t)m->embedding->count * sizeof(float));
    for (int64_t t = 0; t < T; t++)
        for (int c = 0; c < CONTEXT; c++) {
            float *grad = m->embedding->grad + text[positions[t] - CONTEXT + c] * EMBED;
            const float *dx = m->dx + (t * CONTEXT + c) * EMBED;
            for (int j = 0; j < EMBED; j++) grad[j] += dx[j];
        }
}

static float rms(const float *x)
{
    float sum = 1e-6f;
    for (int j = 0; j < WIDTH; j++) sum += x[j] * x[j] / WIDTH;
    return sqrtf(sum);
}

/* out = x / rms(x) */
static void norm(float *out, const float *x, int64_t T)
{
    for (int64_t t = 0; t < T; t++, x += WIDTH, out += WIDTH) {
        float scale = 1 / rms(x);
        for (int j = 0; j < WIDTH; j++) out[j] = x[j] * scale;
    }
}

/* dx += (dout - out (dout . out) / WIDTH) / rms(x) */
static void norm_backward(float *dx, const float *dout, const float *out, const float *x, int64_t T)
{
    for (int64_t t = 0; t < T; t++, x += WIDTH, out += WIDTH, dout += WIDTH, dx += WIDTH) {
        float scale = 1 / rms(x), dot = 0;
        for (int j = 0; j < WIDTH; j++) dot += dout[j] * out[j] / WIDTH;
        for (int j = 0; j < WIDTH; j++) dx[j] += (dout[j] - out[j] * dot) * scale;
    }
}

/* Mean cross-entropy in bits; dlogits = (softmax - one hot) / T. */
static double cross_entropy(const model *m, const uint8_t *text, const int64_t *positions,
                            int64_t T)
{
    double bits = 0;
    for (int64_t t = 0; t < T; t++) {
        const float *z = m->logits + t * BYTES;
        float *d = m->dlogits + t * BYTES, max = z[0], sum = 0;
        uint8_t wanted = text[positions[t]];
        for (int b = 1; b < BYTES; b++) max = z[b] > max ? z[b] : max;
        for (int b = 0; b < BYTES; b++) sum += d[b] = expf(z[b] - max);
        for (int b = 0; b < BYTES; b++) d[b] /= sum * (float)T;
        bits -= (double)(z[wanted] - max - logf(sum)) / log(2.0);
        d[wanted] -= 1 / (float)T;
    }
    return bits / (double)T;
}

static int network_forward(const network *n, const float *x, float *y, int64_t T)
{
    moe_forward_args f;
    TRY(moe_forward_args_init(&f, sizeof f));
    f.tokens = T;
    f.x = x;
    f.y = y;
    f.plan = n->plan;
    TRY(moe_layer_forward(n->layer, n->pass, &f));
    return 0;
}

static int network_backward(const network *n, const float *dy, float *dx)
{
    moe_backward_args b;
    TRY(moe_backward_args_init(&b, sizeof b));
    b.flags = MOE_BACKWARD_OVERWRITE;
    b.dy = dy;
    b.dx = dx;
    TRY(moe_layer_backward(n->layer, n->pass, &b));
    return 0;
}

static int mixture_forward(model *m, int64_t T, int64_t step, int train, model_result *result,
                           double *load)
{
    moe_forward_args f;
    moe_losses losses;
    moe_tensor_view counts;
    TRY(moe_forward_args_init(&f, sizeof f));
    f.flags = train ? MOE_FORWARD_TRAIN : 0;
    f.tokens = T;
    f.step = step;
    f.x = m->n1;
    f.y = m->mixed;
    TRY(moe_layer_forward(m->layer, m->pass, &f));
    TRY(moe_losses_init(&losses, sizeof losses));
    TRY(moe_pass_losses(m->pass, &losses));
    result->balance_loss = losses.total;
    if (!load) return 0;
    TRY(moe_tensor_view_init(&counts, sizeof counts));
    TRY(moe_pass_tensor(m->pass, MOE_TENSOR_COUNTS, &counts));
    for (int64_t e = 0; e < m->options.experts; e++)
        load[e] += (double)((const int64_t *)counts.data)[e];
    return 0;
}

static int mixture_backward(model *m)
{
    moe_backward_args b;
    TRY(moe_backward_args_init(&b, sizeof b));
    b.flags = MOE_BACKWARD_OVERWRITE;
    b.dy = m->dh; /* the gradient by h' is the gradient by the mixture's output too */
    b.dx = m->dn1;
    TRY(moe_layer_backward(m->layer, m->pass, &b));
    return 0;
}

/* ---- the whole ------------------------------------------------------------------------------- */

/* The plans of the one-expert networks: token t to expert 0. */
static int plan_networks(model *m, int64_t T)
{
    moe_plan_args a;
    if (T == m->planned) return 0;
    int32_t *ids = calloc((size_t)T, sizeof *ids);
    TRY(moe_plan_args_init(&a, sizeof a));
    a.tokens = T;
    a.num_experts = 1;
    a.top_k = 1;
    a.expert_ids = ids;
    moe_status input = ids ? moe_plan_build(m->input.plan, &a) : MOE_ERROR_OUT_OF_MEMORY;
    moe_status output = ids ? moe_plan_build(m->output.plan, &a) : MOE_ERROR_OUT_OF_MEMORY;
    free(ids);
    TRY(input);
    TRY(output);
    m->planned = T;
    return 0;
}

static int run_backward(model *m, const uint8_t *text, const int64_t *positions, int64_t T)
{
    size_t row_bytes = (size_t)(T * WIDTH) * sizeof(float);
    if (network_backward(&m->output, m->dlogits, m->dn2) != 0) return -1;
    memset(m->dh, 0, row_bytes);
    norm_backward(m->dh, m->dn2, m->n2, m->mixed, T); /* mixed holds h' */
    if (mixture_backward(m) != 0) return -1;
    norm_backward(m->dh, m->dn1, m->n1, m->h, T);
    if (network_backward(&m->input, m->dh, m->dx) != 0) return -1;
    embed_backward(m, text, positions, T);
    return 0;
}

int model_run(model *m, const uint8_t *text, const int64_t *positions, int64_t tokens, int64_t step,
              int train, model_result *result, double *load)
{
    if (plan_networks(m, tokens) != 0) return -1;
    embed(m, text, positions, tokens);
    if (network_forward(&m->input, m->x, m->h, tokens) != 0) return -1;
    norm(m->n1, m->h, tokens);
    if (mixture_forward(m, tokens, step, train, result, load) != 0) return -1;
    for (int64_t i = 0; i < tokens * WIDTH; i++) m->mixed[i] += m->h[i];
    norm(m->n2, m->mixed, tokens);
    if (network_forward(&m->output, m->n2, m->logits, tokens) != 0) return -1;
    result->bits = cross_entropy(m, text, positions, tokens);
    return train ? run_backward(m, text, positions, tokens) : 0;
}

void model_update(model *m, int64_t step, double rate)
{
    const float beta1 = 0.9f, beta2 = 0.99f, epsilon = 1e-8f;
    float size = (float)(rate * sqrt(1 - pow(beta2, (double)step + 1)) /
                         (1 - pow(beta1, (double)step + 1)));
    for (int i = 0; i < m->parameter_count; i++) {
        weights *w = &m->parameters[i];
        for (int64_t j = 0; j < w->count; j++) {
            float g = w->grad[j];
            w->mean[j] = beta1 * w->mean[j] + (1 - beta1) * g;
            w->square[j] = beta2 * w->square[j] + (1 - beta2) * g * g;
            w->data[j] -= size * w->mean[j] / (sqrtf(w->square[j]) + epsilon);
        }
    }
}
