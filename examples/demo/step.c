/* step.c - forward and backward of the model of model.h, part by part; forward and backward of each
 * part stand side by side. What runs here outside of libmoe runs in one thread, so that results do
 * not depend on the number of threads. */
#include "model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* This rank's part of a batch. */
typedef struct part {
    const batch *batch;
    const uint8_t *text;
    const int64_t *positions; /* [tokens] */
    int64_t first, tokens;    /* first: its first byte's number in the batch */
    int64_t groups, group_begin[MOST_GROUPS + 1];
} part;

/* ---- parts of our own ------------------------------------------------------------------------ */

/* x[t] = embedding of the CONTEXT bytes before positions[t]; backward sums dx over the bytes of a
 * group. */
static void embed(const model *m, const part *p)
{
    for (int64_t t = 0; t < p->tokens; t++)
        for (int c = 0; c < CONTEXT; c++)
            memcpy(m->x + (t * CONTEXT + c) * EMBED,
                   m->embedding + p->text[p->positions[t] - CONTEXT + c] * EMBED,
                   EMBED * sizeof(float));
}

static void embed_backward(model *m, const part *p, int64_t group)
{
    memset(m->embedding_grad, 0, BYTES * EMBED * sizeof(float));
    for (int64_t t = p->group_begin[group]; t < p->group_begin[group + 1]; t++)
        for (int c = 0; c < CONTEXT; c++) {
            float *grad = m->embedding_grad + p->text[p->positions[t] - CONTEXT + c] * EMBED;
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

/* Cross-entropy in bits, of each byte; dlogits = (softmax - one hot) / bytes of the batch. */
static void cross_entropy(model *m, const part *p)
{
    float all = (float)p->batch->tokens;
    for (int64_t t = 0; t < p->tokens; t++) {
        const float *z = m->logits + t * BYTES;
        float *d = m->dlogits + t * BYTES, max = z[0], sum = 0;
        uint8_t wanted = p->text[p->positions[t]];
        for (int b = 1; b < BYTES; b++) max = z[b] > max ? z[b] : max;
        for (int b = 0; b < BYTES; b++) sum += d[b] = expf(z[b] - max);
        for (int b = 0; b < BYTES; b++) d[b] /= sum * all;
        m->own_bits[t] = (max + logf(sum) - z[wanted]) * 1.44269504f;
        d[wanted] -= 1 / all;
    }
}

/* Each byte's bits on every rank, and their mean: the same sum for any number of ranks. */
static int mean_bits(model *m, const part *p, double *mean)
{
    int64_t T = p->batch->tokens, begin[MOST_RANKS + 1];
    double bits = 0;
    ranks_shares(begin, T, m->ranks->size);
    if (ranks_gather(m->ranks, m->bits, begin, m->own_bits, sizeof *m->bits) != 0) return -1;
    for (int64_t t = 0; t < T; t++) bits += (double)m->bits[t];
    *mean = bits / (double)T;
    return 0;
}

/* ---- gradients of groups and ranks ----------------------------------------------------------- */

/* Adds the gradient of a group to those of the groups before it. After the last group the gradient
 * is their sum. */
static void add_group(const weights *w, int64_t group, int64_t groups)
{
    size_t bytes = (size_t)w->count * sizeof *w->grad;
    if (!w->sum) return;
    if (group == 0)
        memcpy(w->sum, w->grad, bytes);
    else
        for (int64_t i = 0; i < w->count; i++) w->sum[i] += w->grad[i];
    if (group == groups - 1) memcpy(w->grad, w->sum, bytes);
}

static void add_group_of(const model *m, const network *n, int64_t group)
{
    for (int i = 0; i < n->weights_count; i++)
        add_group(&m->parameters[n->first_weights + i], group, m->groups);
}

/* A layer's gradients come to the host. */
static int fetch_gradients(const model *m, const network *n)
{
    for (int i = 0; i < n->weights_count; i++) {
        const weights *w = &m->parameters[n->first_weights + i];
        if (device_back(w->grad, w->layer_grad, floats_bytes(w->count)) != 0) return -1;
    }
    return 0;
}

/* Sums over the ranks: those of a layer with a gate by the library, which leaves each rank its own
 * experts. */
static int reduce(const model *m)
{
    const network *gated = m->middle.gate ? &m->middle : NULL;
    if (gated) TRY(moe_layer_reduce_gradients(gated->layer, NULL));
    if (gated && fetch_gradients(m, gated) != 0) return -1;
    for (int i = 0; i < m->parameter_count; i++) {
        const weights *w = &m->parameters[i];
        if (gated && i >= gated->first_weights && i < gated->first_weights + gated->weights_count)
            continue;
        if (ranks_sum_floats(m->ranks, w->grad, w->count) != 0) return -1;
    }
    return 0;
}

/* ---- layers of libmoe ------------------------------------------------------------------------ */

/* y = network(x): all at once with a gate, else group by group. */
static int network_forward(const network *n, const part *p, const float *x, float *y)
{
    moe_forward_args f;
    const float *in = device_in(n->x, x, floats_bytes(p->tokens * n->in));
    float *out = device_out(n->y, y);
    if (!in) return -1;
    TRY(moe_forward_args_init(&f, sizeof f));
    f.flags = p->batch->train ? MOE_FORWARD_TRAIN : MOE_FORWARD_NO_SAVE;
    f.step = p->batch->step;
    for (int64_t i = 0; i < n->passes; i++) {
        int64_t begin = p->group_begin[i];
        int64_t end = n->gate ? p->tokens : p->group_begin[i + 1];
        f.token_first = p->first + begin;
        f.tokens = end - begin;
        f.x = in + begin * n->in;
        f.y = out + begin * n->out;
        if (n->gate) {
            f.groups = p->groups;
            f.group_begin = p->group_begin;
        }
        TRY(moe_layer_forward(n->layer, n->pass[i], &f));
    }
    return device_back(y, out, floats_bytes(p->tokens * n->out));
}

static int network_backward(const model *m, const network *n, const part *p, const float *dy,
                            float *dx)
{
    moe_backward_args b;
    const float *in = device_in(n->dy, dy, floats_bytes(p->tokens * n->out));
    float *out = device_out(n->dx, dx);
    if (!in) return -1;
    TRY(moe_backward_args_init(&b, sizeof b));
    b.flags = MOE_BACKWARD_OVERWRITE;
    for (int64_t i = 0; i < n->passes; i++) {
        b.dy = in + p->group_begin[i] * n->out;
        b.dx = out + p->group_begin[i] * n->in;
        TRY(moe_layer_backward(n->layer, n->pass[i], &b));
        if (n->gate) continue; /* the library sums */
        if (fetch_gradients(m, n) != 0) return -1;
        add_group_of(m, n, i);
    }
    return device_back(dx, out, floats_bytes(p->tokens * n->in));
}

/* ---- the whole ------------------------------------------------------------------------------- */

static int run_backward(model *m, const part *p)
{
    size_t row_bytes = (size_t)(p->tokens * WIDTH) * sizeof(float);
    if (network_backward(m, &m->output, p, m->dlogits, m->dn2) != 0) return -1;
    memset(m->dh, 0, row_bytes);
    norm_backward(m->dh, m->dn2, m->n2, m->mixed, p->tokens); /* mixed holds h' */
    /* the gradient by h' is the gradient by the middle's output too */
    if (network_backward(m, &m->middle, p, m->dh, m->dn1) != 0) return -1;
    norm_backward(m->dh, m->dn1, m->n1, m->h, p->tokens);
    if (network_backward(m, &m->input, p, m->dh, m->dx) != 0) return -1;
    for (int64_t g = 0; g < m->groups; g++) {
        embed_backward(m, p, g);
        add_group(&m->parameters[0], g, m->groups);
    }
    return reduce(m);
}

/* Of all ranks: every one has the same. */
static int balance_loss(const model *m, double *loss)
{
    moe_losses losses;
    *loss = 0;
    if (m->options.dense) return 0;
    TRY(moe_losses_init(&losses, sizeof losses));
    TRY(moe_pass_losses(m->middle.pass[0], &losses));
    *loss = losses.total;
    return 0;
}

static int run(model *m, const batch *b, model_result *result)
{
    part p = {.batch = b, .text = b->text, .groups = m->groups};
    model_own_bytes(m, b->tokens, &p.first, &p.tokens);
    p.positions = b->positions + p.first;
    ranks_shares(p.group_begin, p.tokens, m->groups);
    embed(m, &p);
    if (network_forward(&m->input, &p, m->x, m->h) != 0) return -1;
    norm(m->n1, m->h, p.tokens);
    if (network_forward(&m->middle, &p, m->n1, m->mixed) != 0) return -1;
    for (int64_t i = 0; i < p.tokens * WIDTH; i++) m->mixed[i] += m->h[i];
    norm(m->n2, m->mixed, p.tokens);
    if (network_forward(&m->output, &p, m->n2, m->logits) != 0) return -1;
    cross_entropy(m, &p);
    if (mean_bits(m, &p, &result->bits) != 0) return -1;
    if (balance_loss(m, &result->balance_loss) != 0) return -1;
    return b->train ? run_backward(m, &p) : 0;
}

/* A rank that fails here may be the only one: then the group ends, so that no rank, and no GPU,
 * waits for what will not come. */
int model_run(model *m, const batch *b, model_result *result)
{
    int failed = run(m, b, result);
    if (failed) moe_comm_abort(m->comm);
    return failed;
}
