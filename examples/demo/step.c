/* step.c - forward and backward of the model of model.h, part by part; forward and backward of each
 * part stand side by side. What runs here outside of libmoe runs in one thread, so that results do
 * not depend on the number of threads. */
#include "model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- parts of our own ------------------------------------------------------------------------ */

/* x[t] = embedding of the CONTEXT bytes before positions[t]; backward adds dx to their
 * gradients. */
static void embed(const model *m, const uint8_t *text, const int64_t *positions, int64_t T)
{
    for (int64_t t = 0; t < T; t++)
        for (int c = 0; c < CONTEXT; c++)
            memcpy(m->x + (t * CONTEXT + c) * EMBED,
                   m->embedding + text[positions[t] - CONTEXT + c] * EMBED, EMBED * sizeof(float));
}

static void embed_backward(model *m, const uint8_t *text, const int64_t *positions, int64_t T)
{
    memset(m->embedding_grad, 0, BYTES * EMBED * sizeof(float));
    for (int64_t t = 0; t < T; t++)
        for (int c = 0; c < CONTEXT; c++) {
            float *grad = m->embedding_grad + text[positions[t] - CONTEXT + c] * EMBED;
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

/* Cross-entropy in bits, of each byte and their mean; dlogits = (softmax - one hot) / T. */
static double cross_entropy(model *m, const uint8_t *text, const int64_t *positions, int64_t T)
{
    double bits = 0;
    for (int64_t t = 0; t < T; t++) {
        const float *z = m->logits + t * BYTES;
        float *d = m->dlogits + t * BYTES, max = z[0], sum = 0;
        uint8_t wanted = text[positions[t]];
        for (int b = 1; b < BYTES; b++) max = z[b] > max ? z[b] : max;
        for (int b = 0; b < BYTES; b++) sum += d[b] = expf(z[b] - max);
        for (int b = 0; b < BYTES; b++) d[b] /= sum * (float)T;
        m->bits[t] = (max + logf(sum) - z[wanted]) * 1.44269504f;
        bits += (double)m->bits[t];
        d[wanted] -= 1 / (float)T;
    }
    return bits / (double)T;
}

/* ---- layers of libmoe ------------------------------------------------------------------------ */

static int network_forward(const network *n, const float *x, float *y, int64_t T, int64_t step,
                           int train)
{
    moe_forward_args f;
    TRY(moe_forward_args_init(&f, sizeof f));
    f.flags = train ? MOE_FORWARD_TRAIN : MOE_FORWARD_NO_SAVE;
    f.tokens = T;
    f.step = step;
    f.x = x;
    f.y = y;
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

/* ---- the whole ------------------------------------------------------------------------------- */

static int run_backward(model *m, const uint8_t *text, const int64_t *positions, int64_t T)
{
    size_t row_bytes = (size_t)(T * WIDTH) * sizeof(float);
    if (network_backward(&m->output, m->dlogits, m->dn2) != 0) return -1;
    memset(m->dh, 0, row_bytes);
    norm_backward(m->dh, m->dn2, m->n2, m->mixed, T); /* mixed holds h' */
    /* the gradient by h' is the gradient by the middle's output too */
    if (network_backward(&m->middle, m->dh, m->dn1) != 0) return -1;
    norm_backward(m->dh, m->dn1, m->n1, m->h, T);
    if (network_backward(&m->input, m->dh, m->dx) != 0) return -1;
    embed_backward(m, text, positions, T);
    return 0;
}

static int balance_loss(const model *m, double *loss)
{
    moe_losses losses;
    *loss = 0;
    if (m->options.dense) return 0;
    TRY(moe_losses_init(&losses, sizeof losses));
    TRY(moe_pass_losses(m->middle.pass, &losses));
    *loss = losses.total;
    return 0;
}

int model_run(model *m, const uint8_t *text, const int64_t *positions, int64_t tokens, int64_t step,
              int train, model_result *result)
{
    embed(m, text, positions, tokens);
    if (network_forward(&m->input, m->x, m->h, tokens, step, train) != 0) return -1;
    norm(m->n1, m->h, tokens);
    if (network_forward(&m->middle, m->n1, m->mixed, tokens, step, train) != 0) return -1;
    for (int64_t i = 0; i < tokens * WIDTH; i++) m->mixed[i] += m->h[i];
    norm(m->n2, m->mixed, tokens);
    if (network_forward(&m->output, m->n2, m->logits, tokens, step, train) != 0) return -1;
    result->bits = cross_entropy(m, text, positions, tokens);
    if (balance_loss(m, &result->balance_loss) != 0) return -1;
    return train ? run_backward(m, text, positions, tokens) : 0;
}
