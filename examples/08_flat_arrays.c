/* 08_flat_arrays.c - inside a plain C training program that keeps all its parameters in one array
 * of floats and all its gradients in another, as small trainers do: the layer's part of both is
 * where the trainer says, one loop is the optimizer, one fwrite the checkpoint.
 *
 * Introduces: moe_layer_parameter for sizes before memory exists, moe_layer_bind into one array.
 *
 * The model predicts a byte from the two before it: embedding (two rows side by side) -> x + MoE(x)
 * -> logits. Its text is its own source. */
#include "example.h"

#include <math.h>
#include <string.h>

enum { T = 256, HALF = 16, D = 2 * HALF, F = 48, E = 8, K = 2, V = 128, STEPS = 300 };

/* One tensor in the flat arrays. The first two are the trainer's, the others the layer's. */
typedef struct tensor {
    const char *name;
    int64_t offset, count;
} tensor;

enum { EMBEDDING, HEAD, LAYER, MOST = 12 };

typedef struct trainer {
    moe_context *context;
    moe_gate *gate;
    moe_experts *experts;
    moe_layer *layer;
    moe_pass *pass;
    tensor tensors[MOST];
    int tensor_count;
    int64_t count; /* floats of all tensors */
    float *params, *grads, *mean, *square;
} trainer;

static void add_tensor(trainer *t, const char *name, int64_t count)
{
    HOLDS(t->tensor_count < MOST);
    t->tensors[t->tensor_count++] = (tensor){name, t->count, count};
    t->count += count;
}

static void make_layer(trainer *t)
{
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    OK(moe_context_create(&t->context, NULL));
    OK(moe_gate_config_init(&g, sizeof g));
    g.d_model = D, g.num_experts = E, g.top_k = K, g.kind = MOE_GATE_NOISY_TOP_K;
    g.importance_weight = g.load_weight = 0.01;
    OK(moe_experts_config_init(&e, sizeof e));
    e.d_model = D, e.d_hidden = F, e.num_experts = E;
    g.parameters = e.parameters = MOE_PARAMETERS_BOUND; /* the layer allocates none */
    OK(moe_gate_create(&t->gate, t->context, &g));
    OK(moe_experts_create(&t->experts, t->context, &e));
    OK(moe_layer_config_init(&l, sizeof l));
    l.gate = t->gate, l.experts = t->experts;
    OK(moe_layer_create(&t->layer, &l));
    OK(moe_pass_create(&t->pass, t->layer, NULL));
}

/* snippet: flat */
/* The records tell names and sizes; then there is memory, and each tensor is bound to its place. */
static void make_arrays(trainer *t)
{
    add_tensor(t, "embedding", 2 * V * HALF);
    add_tensor(t, "head", D * V);
    for (int64_t i = 0; i < moe_layer_parameter_count(t->layer); i++) {
        moe_parameter_record p;
        OK(moe_parameter_record_init(&p, sizeof p));
        OK(moe_layer_parameter(t->layer, i, &p));
        add_tensor(t, p.name, p.element_count);
    }
    size_t n = (size_t)t->count;
    t->params = calloc(n, sizeof(float)), t->grads = calloc(n, sizeof(float));
    t->mean = calloc(n, sizeof(float)), t->square = calloc(n, sizeof(float));
    HOLDS(t->params && t->grads && t->mean && t->square);

    for (int64_t i = 0; i < moe_layer_parameter_count(t->layer); i++) {
        moe_binding b;
        OK(moe_binding_init(&b, sizeof b));
        b.data = t->params + t->tensors[LAYER + i].offset;
        b.grad = t->grads + t->tensors[LAYER + i].offset;
        OK(moe_layer_bind(t->layer, i, &b));
    }
}
/* end snippet */

static float *param(const trainer *t, int which) { return t->params + t->tensors[which].offset; }
static float *grad(const trainer *t, int which) { return t->grads + t->tensors[which].offset; }

/* Gate and head start at zero (the 2017 paper's advice for a noisy gate), the rest small. */
static void first_values(trainer *t)
{
    for (int i = 0; i < t->tensor_count; i++) {
        const char *name = t->tensors[i].name;
        float scale = i == EMBEDDING ? 1.0f : strncmp(name, "experts.w", 9) == 0 ? 0.25f : 0;
        fill(param(t, i), t->tensors[i].count, 20 + (uint64_t)i);
        for (int64_t j = 0; j < t->tensors[i].count; j++) param(t, i)[j] *= scale;
    }
}

static void drop(trainer *t)
{
    free(t->params), free(t->grads), free(t->mean), free(t->square);
    moe_pass_destroy(t->pass), moe_layer_destroy(t->layer);
    moe_experts_destroy(t->experts), moe_gate_destroy(t->gate), moe_context_destroy(t->context);
}

/* ---- the model ------------------------------------------------------------------------------- */

static struct {
    float x[T * D], h[T * D], logits[T * V], dlogits[T * V], dh[T * D], dx[T * D];
} a; /* activations */

/* Mean cross-entropy in bits, and its gradient by the logits. */
static double cross_entropy(const unsigned char *text)
{
    double bits = 0;
    for (int t = 0; t < T; t++) {
        const float *z = a.logits + t * V;
        double max = (double)z[0], sum = 0;
        for (int v = 1; v < V; v++) max = fmax(max, (double)z[v]);
        for (int v = 0; v < V; v++) sum += exp((double)z[v] - max);
        for (int v = 0; v < V; v++)
            a.dlogits[t * V + v] = (float)(exp((double)z[v] - max) / sum / T);
        bits -= ((double)z[text[t + 2]] - max - log(sum)) / log(2.0) / T;
        a.dlogits[t * V + text[t + 2]] -= 1.0f / T;
    }
    return bits;
}

/* text[t], text[t+1] -> text[t+2], for T places */
static double forward(trainer *m, const unsigned char *text, int step)
{
    for (int t = 0; t < T; t++)
        for (int side = 0; side < 2; side++)
            memcpy(a.x + t * D + side * HALF,
                   param(m, EMBEDDING) + (side * V + text[t + side]) * HALF, HALF * sizeof(float));
    memcpy(a.h, a.x, sizeof a.h);
    moe_forward_args f;
    OK(moe_forward_args_init(&f, sizeof f));
    f.flags = MOE_FORWARD_TRAIN | MOE_FORWARD_ADD; /* h += MoE(x): the residual is in y already */
    f.step = step, f.tokens = T, f.x = a.x, f.y = a.h;
    OK(moe_layer_forward(m->layer, m->pass, &f));
    for (int t = 0; t < T; t++)
        for (int v = 0; v < V; v++) {
            float sum = 0;
            for (int j = 0; j < D; j++) sum += a.h[t * D + j] * param(m, HEAD)[j * V + v];
            a.logits[t * V + v] = sum;
        }
    return cross_entropy(text);
}

static void backward(trainer *m, const unsigned char *text)
{
    memset(m->grads, 0, (size_t)m->count * sizeof(float)); /* every gradient, the layer's too */
    for (int t = 0; t < T; t++)
        for (int j = 0; j < D; j++) {
            float sum = 0;
            for (int v = 0; v < V; v++) {
                sum += a.dlogits[t * V + v] * param(m, HEAD)[j * V + v];
                grad(m, HEAD)[j * V + v] += a.dlogits[t * V + v] * a.h[t * D + j];
            }
            a.dh[t * D + j] = a.dx[t * D + j] = sum;
        }
    moe_backward_args b;
    OK(moe_backward_args_init(&b, sizeof b));
    b.flags = MOE_BACKWARD_ADD_DX; /* dx = dh of the residual, plus the layer's */
    b.dy = a.dh, b.dx = a.dx;
    OK(moe_layer_backward(m->layer, m->pass, &b));
    for (int t = 0; t < T; t++)
        for (int side = 0; side < 2; side++)
            for (int j = 0; j < HALF; j++)
                grad(m, EMBEDDING)[(side * V + text[t + side]) * HALF + j] +=
                    a.dx[t * D + side * HALF + j];
}

/* snippet: adamw */
/* One loop over everything (Loshchilov & Hutter, arXiv 1711.05101). */
static void adamw(trainer *m, float left1, float left2)
{
    const float rate = 3e-3f, beta1 = 0.9f, beta2 = 0.99f, decay = 0.01f;
    for (int64_t i = 0; i < m->count; i++) {
        float g = m->grads[i];
        m->mean[i] = beta1 * m->mean[i] + (1 - beta1) * g;
        m->square[i] = beta2 * m->square[i] + (1 - beta2) * g * g;
        float move = (m->mean[i] / left1) / (sqrtf(m->square[i] / left2) + 1e-8f);
        m->params[i] -= rate * (move + decay * m->params[i]);
    }
}
/* end snippet */

/* The whole model is one array: saving and loading it is one call each. */
static void save_and_load(trainer *m, const unsigned char *text, int step)
{
    size_t n = (size_t)m->count;
    double before = forward(m, text, step);
    FILE *file = tmpfile();
    HOLDS(file && fwrite(m->params, sizeof(float), n, file) == n);
    memset(m->params, 0, n * sizeof(float));
    HOLDS(forward(m, text, step) != before);
    rewind(file);
    HOLDS(fread(m->params, sizeof(float), n, file) == n);
    HOLDS(fclose(file) == 0);
    HOLDS(forward(m, text, step) == before); /* the layer reads what is in the array now */
    printf("checkpoint of %d floats: the loss is the same to the last bit\n", (int)m->count);
}

int main(void)
{
    static unsigned char text[65536];
    trainer m = {0};
    double bits = 0, first = 0;
    float power1 = 1, power2 = 1;
    uint64_t state = 5;
    FILE *source = fopen(__FILE__, "rb");
    HOLDS(source != NULL);
    int size = (int)fread(text, 1, sizeof text, source);
    HOLDS(fclose(source) == 0 && size > T + 2);
    for (int i = 0; i < size; i++) text[i] &= 127;

    make_layer(&m), make_arrays(&m), first_values(&m);
    for (int i = 0; i < m.tensor_count; i++)
        printf("%-18s %6d floats at %6d\n", m.tensors[i].name, (int)m.tensors[i].count,
               (int)m.tensors[i].offset);
    for (int step = 0; step < STEPS; step++) {
        int at = (int)((next_number(&state) + 1) / 2 * (float)(size - T - 2));
        double now = forward(&m, text + at, step);
        backward(&m, text + at);
        power1 *= 0.9f, power2 *= 0.99f;
        adamw(&m, 1 - power1, 1 - power2);
        bits = step == 0 ? now : 0.95 * bits + 0.05 * now;
        if (step == 0) first = now;
    }
    HOLDS(first > 6.9 && bits < 3);
    printf("bits per byte of this source: %.1f at first, below 3 after %d steps\n", first, STEPS);
    save_and_load(&m, text, STEPS);
    drop(&m);
    return 0;
}
