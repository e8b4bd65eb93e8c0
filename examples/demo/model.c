/* model.c - making the model of model.h, what it costs, and its optimizer. The forward and the
 * backward are in step.c. */
#include "model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int model_failed(const char *call)
{
    const char *message = moe_last_error();
    fprintf(stderr, "%s\n", *message ? message : call);
    return -1;
}

static int out_of_memory(void)
{
    fprintf(stderr, "out of memory\n");
    return -1;
}

/* ---- configs --------------------------------------------------------------------------------- */

static int gate_config(const model_options *o, moe_gate_config *g)
{
    TRY(moe_gate_config_init(g, sizeof *g));
    g->d_model = WIDTH;
    g->num_experts = o->experts;
    g->top_k = o->top_k;
    g->kind = MOE_GATE_NOISY_TOP_K;
    g->seed = o->seed;
    g->importance_weight = g->load_weight = o->balance;
    return 0;
}

static int pool_config(moe_experts_config *e, int64_t in, int64_t hidden, int64_t out,
                       int64_t experts)
{
    TRY(moe_experts_config_init(e, sizeof *e));
    e->d_model = in;
    e->d_hidden = hidden;
    e->d_out = out;
    e->num_experts = experts;
    return 0;
}

/* ---- what it costs --------------------------------------------------------------------------- */

/* Multiply-adds of one token's forward in training. */
static int count_layer(const moe_gate_config *gate, const moe_experts_config *experts, int64_t *out)
{
    moe_cost_query q;
    moe_cost c;
    TRY(moe_cost_query_init(&q, sizeof q));
    TRY(moe_cost_init(&c, sizeof c));
    q.gate = gate;
    q.experts = experts;
    q.tokens = 1;
    q.flags = MOE_FORWARD_TRAIN;
    if (!gate) q.top_k = 1;
    TRY(moe_layer_flops(&q, &c));
    *out = c.forward_flops / 2;
    return 0;
}

static int count_mixture(const model_options *o, model_cost *cost)
{
    moe_gate_config g;
    moe_experts_config e;
    if (gate_config(o, &g) != 0 || pool_config(&e, WIDTH, o->hidden, WIDTH, o->experts) != 0)
        return -1;
    cost->gate = 2 * (int64_t)WIDTH * o->experts;
    return count_layer(&g, &e, &cost->middle);
}

int model_dense_hidden(const model_options *o, int64_t *hidden)
{
    model_cost mixture;
    moe_experts_config e;
    int64_t narrowest;
    const int64_t unit = 2 * (int64_t)WIDTH; /* what a hidden unit costs */
    if (count_mixture(o, &mixture) != 0 || pool_config(&e, WIDTH, 1, WIDTH, 1) != 0 ||
        count_layer(NULL, &e, &narrowest) != 0)
        return -1;
    int64_t more = mixture.middle - narrowest;
    *hidden = 1 + (more > 0 ? (more + unit - 1) / unit : 0);
    return 0;
}

int model_count_cost(const model_options *o, model_cost *cost)
{
    moe_experts_config e;
    int64_t hidden, input, output;
    *cost = (model_cost){0};
    if (pool_config(&e, CONTEXT * EMBED, WIDTH, WIDTH, 1) != 0 ||
        count_layer(NULL, &e, &input) != 0 || pool_config(&e, WIDTH, WIDTH, BYTES, 1) != 0 ||
        count_layer(NULL, &e, &output) != 0)
        return -1;
    cost->ends = input + output;
    if (!o->dense) return count_mixture(o, cost);
    if (model_dense_hidden(o, &hidden) != 0 || pool_config(&e, WIDTH, hidden, WIDTH, 1) != 0)
        return -1;
    return count_layer(NULL, &e, &cost->middle);
}

int64_t model_count_parameters(const model *m)
{
    int64_t count = 0;
    for (int i = 0; i < m->parameter_count; i++) {
        const weights *w = &m->parameters[i];
        count += w->count / w->parts * w->all_parts;
    }
    return count;
}

/* ---- making it ------------------------------------------------------------------------------- */

/* How many experts a rank holds. */
static int64_t model_experts(const model *m, int32_t rank)
{
    int64_t E = m->options.experts, P = m->ranks->size;
    return ranks_share(E, P, rank + 1) - ranks_share(E, P, rank);
}

void model_own_bytes(const model *m, int64_t tokens, int64_t *first, int64_t *count)
{
    int64_t P = m->ranks->size, rank = m->ranks->rank;
    *first = ranks_share(tokens, P, rank);
    *count = ranks_share(tokens, P, rank + 1) - *first;
}

/* Of a batch on one rank: rank 0's, the most. */
static int64_t most_tokens(const model *m)
{
    return ranks_share(m->options.tokens, m->ranks->size, 1);
}

static int add_weights(model *m, const weights *new)
{
    if (m->parameter_count == MODEL_MAX_PARAMETERS) {
        fprintf(stderr, "%s: more than %d parameters\n", new->name, MODEL_MAX_PARAMETERS);
        return -1;
    }
    weights *w = &m->parameters[m->parameter_count++];
    *w = *new;
    w->mean = calloc((size_t)w->count, sizeof *w->mean);
    w->square = calloc((size_t)w->count, sizeof *w->square);
    return w->mean && w->square ? 0 : out_of_memory();
}

/* Room for the sum of the gradients of groups, where there are several. */
static int add_sum(model *m, weights *w)
{
    if (m->groups == 1) return 0;
    w->sum = calloc((size_t)w->count, sizeof *w->sum);
    return w->sum ? 0 : out_of_memory();
}

/* The host's arrays for those of a layer. */
static int take_home(weights *w)
{
    if (device_host(&w->data, w->layer_data, floats_bytes(w->count)) != 0) return -1;
    return device_host(&w->grad, w->layer_grad, floats_bytes(w->count));
}

/* Every parameter of a layer joins the list the optimizer walks. */
static int add_layer(model *m, network *n)
{
    n->first_weights = m->parameter_count;
    for (int64_t i = 0; i < moe_layer_parameter_count(n->layer); i++) {
        moe_parameter_record p;
        TRY(moe_parameter_record_init(&p, sizeof p));
        TRY(moe_layer_parameter(n->layer, i, &p));
        weights w = {.name = p.name,
                     .layer_data = p.data,
                     .layer_grad = p.grad,
                     .count = p.element_count,
                     .parts = 1,
                     .all_parts = 1};
        if (n->gate && strncmp(p.name, "experts.", 8) == 0) {
            w.parts = model_experts(m, m->ranks->rank);
            w.all_parts = m->options.experts;
        }
        if (add_weights(m, &w) != 0) return -1;
        weights *added = &m->parameters[m->parameter_count - 1];
        if (take_home(added) != 0 || (!n->gate && add_sum(m, added) != 0)) return -1;
    }
    n->weights_count = m->parameter_count - n->first_weights;
    return 0;
}

static int make_passes(const model *m, network *n)
{
    int64_t count = n->gate ? 1 : m->groups;
    n->pass = calloc((size_t)count, sizeof *n->pass);
    if (!n->pass) return out_of_memory();
    for (; n->passes < count; n->passes++)
        TRY(moe_pass_create(&n->pass[n->passes], n->layer, NULL));
    return 0;
}

static int make_rooms(const model *m, network *n)
{
    int64_t T = most_tokens(m);
    if (device_room(&n->x, floats_bytes(T * n->in)) != 0) return -1;
    if (device_room(&n->y, floats_bytes(T * n->out)) != 0) return -1;
    if (device_room(&n->dy, floats_bytes(T * n->out)) != 0) return -1;
    return device_room(&n->dx, floats_bytes(T * n->in));
}

/* The layer of a pool, and of a gate if the network has one: then the ranks share its experts, and
 * the losses that spread the load are of the bytes of all ranks, as the paper's are of a batch. */
static int make_layer(model *m, network *n, uint64_t seed)
{
    moe_layer_config l;
    TRY(moe_layer_config_init(&l, sizeof l));
    l.gate = n->gate;
    l.experts = n->pool;
    if (n->gate) l.comm = m->comm, l.loss_batch = MOE_BATCH_GLOBAL;
    TRY(moe_layer_create(&n->layer, &l));
    TRY(moe_layer_init_parameters(n->layer, seed));
    if (make_passes(m, n) != 0 || make_rooms(m, n) != 0) return -1;
    return add_layer(m, n);
}

static int make_pool(network *n, moe_context *context, const moe_experts_config *e)
{
    n->in = e->d_model;
    n->out = e->d_out;
    TRY(moe_experts_create(&n->pool, context, e));
    return 0;
}

/* relu(x W1 + b1) W2 + b2, as a pool of one expert. */
static int make_network(model *m, network *n, moe_context *context, int64_t in, int64_t out,
                        uint64_t seed)
{
    moe_experts_config e;
    if (pool_config(&e, in, WIDTH, out, 1) != 0) return -1;
    e.bias = 1;
    return make_pool(n, context, &e) != 0 ? -1 : make_layer(m, n, seed);
}

/* The MoE layer, or one expert of the same cost; neither has biases. */
static int make_middle(model *m, moe_context *context)
{
    const model_options *o = &m->options;
    moe_gate_config g;
    moe_experts_config e;
    int64_t hidden = o->hidden, experts = o->dense ? 1 : model_experts(m, m->ranks->rank);
    if (gate_config(o, &g) != 0) return -1;
    if (o->dense && model_dense_hidden(o, &hidden) != 0) return -1;
    if (pool_config(&e, WIDTH, hidden, WIDTH, experts) != 0) return -1;
    if (!o->dense) TRY(moe_gate_create(&m->middle.gate, context, &g));
    return make_pool(&m->middle, context, &e) != 0 ? -1 : make_layer(m, &m->middle, o->seed);
}

static float *floats(int64_t count) { return calloc((size_t)count, sizeof(float)); }

static int make_buffers(model *m)
{
    int64_t T = most_tokens(m);
    m->touched = calloc((size_t)m->options.experts, 1);
    m->x = floats(T * CONTEXT * EMBED), m->dx = floats(T * CONTEXT * EMBED);
    m->h = floats(T * WIDTH), m->dh = floats(T * WIDTH);
    m->n1 = floats(T * WIDTH), m->dn1 = floats(T * WIDTH), m->mixed = floats(T * WIDTH);
    m->n2 = floats(T * WIDTH), m->dn2 = floats(T * WIDTH);
    m->logits = floats(T * BYTES), m->dlogits = floats(T * BYTES);
    m->own_bits = floats(T), m->bits = floats(m->options.tokens);
    return m->touched && m->x && m->dx && m->h && m->dh && m->n1 && m->dn1 && m->mixed && m->n2 &&
                   m->dn2 && m->logits && m->dlogits && m->own_bits && m->bits
               ? 0
               : out_of_memory();
}

static int make_embedding(model *m)
{
    m->embedding = floats(BYTES * EMBED);
    m->embedding_grad = floats(BYTES * EMBED);
    if (!m->embedding || !m->embedding_grad) return out_of_memory();
    for (int64_t i = 0; i < BYTES * EMBED; i++) { /* uniform in [-1,1), the same every time */
        uint32_t bits = (uint32_t)i * 2654435761u + (uint32_t)m->options.seed;
        bits ^= bits >> 15;
        bits *= 2246822519u;
        m->embedding[i] = (float)((bits >> 8) & 0xffff) / 32768.0f - 1.0f;
    }
    const weights w = {"embedding", m->embedding,  m->embedding_grad, .count = BYTES * EMBED,
                       .parts = 1,  .all_parts = 1};
    return add_weights(m, &w) != 0 ? -1 : add_sum(m, &m->parameters[0]);
}

int model_create(model *m, moe_context *context, const ranks *r, moe_comm *comm,
                 const model_options *options)
{
    memset(m, 0, sizeof *m);
    m->options = *options;
    m->ranks = r;
    m->comm = comm;
    m->groups = r->size > 1 ? 1 : options->groups;
    if (make_embedding(m) != 0 || make_middle(m, context) != 0 || make_buffers(m) != 0) return -1;
    if (make_network(m, &m->input, context, CONTEXT * EMBED, WIDTH, options->seed + 1) != 0)
        return -1;
    return make_network(m, &m->output, context, WIDTH, BYTES, options->seed + 2);
}

static void destroy_network(network *n)
{
    for (int64_t g = 0; g < n->passes; g++) moe_pass_destroy(n->pass[g]);
    free(n->pass);
    device_free(n->x);
    device_free(n->y);
    device_free(n->dy);
    device_free(n->dx);
    moe_layer_destroy(n->layer);
    moe_experts_destroy(n->pool);
    moe_gate_destroy(n->gate);
}

void model_destroy(model *m)
{
    float *buffers[] = {m->x,       m->dx,       m->h,    m->dh,        m->n1,
                        m->dn1,     m->mixed,    m->n2,   m->dn2,       m->logits,
                        m->dlogits, m->own_bits, m->bits, m->embedding, m->embedding_grad};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
    free(m->touched);
    for (int i = 0; i < m->parameter_count; i++) {
        free(m->parameters[i].mean);
        free(m->parameters[i].square);
        free(m->parameters[i].sum);
        if (!m->parameters[i].layer_data) continue;
        device_host_free(m->parameters[i].data);
        device_host_free(m->parameters[i].grad);
    }
    destroy_network(&m->input);
    destroy_network(&m->middle);
    destroy_network(&m->output);
    memset(m, 0, sizeof *m);
}

/* ---- the optimizer --------------------------------------------------------------------------- */

static void adam(const weights *w, int64_t begin, int64_t end, float size)
{
    const float beta1 = 0.9f, beta2 = 0.99f, epsilon = 1e-8f;
    float *restrict data = w->data, *restrict mean = w->mean, *restrict square = w->square;
    const float *restrict grad = w->grad;
    for (int64_t j = begin; j < end; j++) {
        float g = grad[j];
        mean[j] = beta1 * mean[j] + (1 - beta1) * g;
        square[j] = beta2 * square[j] + (1 - beta2) * g * g;
        data[j] -= size * mean[j] / (sqrtf(square[j]) + epsilon);
    }
}

/* Skipping untouched experts is "lazy" Adam, as for the rows of an embedding table that a batch did
 * not look up. Strictly, Adam would let the moments decay and the old momentum move such an expert
 * although nothing was learned about it; and experts that are asleep would cost memory traffic. The
 * bias correction counts all steps: an expert that first wakes when it has faded begins with a step
 * of the usual size all the same, since 1 - beta1 = sqrt(1 - beta2). */
int model_update(model *m, int64_t step, double rate)
{
    double t = (double)step + 1;
    float size = (float)(rate * sqrt(1 - pow(0.99, t)) / (1 - pow(0.9, t)));
    TRY(moe_experts_touched(m->middle.pool, m->touched, NULL));
    for (int i = 0; i < m->parameter_count; i++) {
        const weights *w = &m->parameters[i];
        int64_t part = w->count / w->parts;
        for (int64_t e = 0; e < w->parts; e++)
            if (w->all_parts == 1 || m->touched[e]) adam(w, e * part, (e + 1) * part, size);
    }
    return model_place(m);
}

int model_place(const model *m)
{
    for (int i = 0; i < m->parameter_count; i++) {
        const weights *w = &m->parameters[i];
        if (w->layer_data && !device_in(w->layer_data, w->data, floats_bytes(w->count))) return -1;
    }
    return 0;
}
