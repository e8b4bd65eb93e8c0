/* 02_training.c - backward and an optimizer step, twice: an ordinary Adam, and the memory-frugal
 * one of Shazeer et al. 2017 (arXiv 1701.06538, appendix D), both walking only the experts that met
 * a token.
 *
 * Introduces: moe_layer_backward, moe_layer_zero_gradients, moe_pass_losses,
 * moe_layer_parameter_count, moe_layer_parameter, moe_experts_touched.
 *
 * The task is made for experts: inputs come from 16 clusters, each with a linear map of its own to
 * learn. A cluster is easy for one expert and hard for one small network. */
#include "example.h"

#include <math.h>
#include <string.h>

enum { T = 48, D = 16, F = 16, E = 48, K = 2, CLUSTERS = 16, STEPS = 1500, PARAMETERS = 4 };

typedef struct model {
    moe_context *context;
    moe_gate *gate;
    moe_experts *experts;
    moe_layer *layer;
    moe_pass *pass;
} model;

static void make(model *m)
{
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    OK(moe_context_create(&m->context, NULL));
    OK(moe_gate_config_init(&g, sizeof g));
    g.d_model = D, g.num_experts = E, g.top_k = K, g.kind = MOE_GATE_NOISY_TOP_K;
    g.importance_weight = g.load_weight = 0.01;
    OK(moe_gate_create(&m->gate, m->context, &g));
    OK(moe_experts_config_init(&e, sizeof e));
    e.d_model = D, e.d_hidden = F, e.num_experts = E;
    OK(moe_experts_create(&m->experts, m->context, &e));
    OK(moe_layer_config_init(&l, sizeof l));
    l.gate = m->gate, l.experts = m->experts;
    OK(moe_layer_create(&m->layer, &l));
    OK(moe_layer_init_parameters(m->layer, 3));
    OK(moe_pass_create(&m->pass, m->layer, NULL));
}

static void drop(model *m)
{
    moe_pass_destroy(m->pass);
    moe_layer_destroy(m->layer);
    moe_experts_destroy(m->experts);
    moe_gate_destroy(m->gate);
    moe_context_destroy(m->context);
}

/* ---- the task -------------------------------------------------------------------------------- */

/* x = the cluster's centre + a little noise, target = the cluster's matrix times the noise. Of the
 * clusters a batch shows 4, so that not every expert meets a token in every step. */
static void draw_batch(float *x, float *target, int step, uint64_t *state)
{
    static float centre[CLUSTERS][D], map[CLUSTERS][D][D];
    if (step == 0) fill(centre[0], CLUSTERS * D, 11), fill(map[0][0], CLUSTERS * D * D, 12);
    for (int t = 0; t < T; t++) {
        int c = (step * 4 + t % 4) % CLUSTERS;
        float noise[D];
        for (int i = 0; i < D; i++) noise[i] = next_number(state);
        for (int i = 0; i < D; i++) x[t * D + i] = centre[c][i] + 0.5f * noise[i];
        for (int i = 0; i < D; i++) {
            target[t * D + i] = 0;
            for (int j = 0; j < D; j++) target[t * D + i] += 0.5f * map[c][i][j] * noise[j];
        }
    }
}

/* snippet: train-step */
/* One step: the mean squared error, its gradient by y, and through the layer to every parameter. */
static double step_gradients(model *m, const float *x, const float *target, int step)
{
    static float y[T * D], dy[T * D];
    moe_forward_args f;
    moe_backward_args b;
    double error = 0;

    OK(moe_forward_args_init(&f, sizeof f));
    f.flags = MOE_FORWARD_TRAIN; /* the gate explores: noise, drawn from (seed, step, token) */
    f.step = step;
    f.tokens = T, f.x = x, f.y = y;
    OK(moe_layer_forward(m->layer, m->pass, &f));

    for (int i = 0; i < T * D; i++) {
        float off = y[i] - target[i];
        error += (double)(off * off) / (T * D);
        dy[i] = 2 * off / (T * D);
    }

    OK(moe_layer_zero_gradients(m->layer, NULL)); /* gradients are added to */
    OK(moe_backward_args_init(&b, sizeof b));
    b.dy = dy; /* b.dx stays NULL: nothing lies before this layer */
    OK(moe_layer_backward(m->layer, m->pass, &b));
    return error; /* the balance losses' gradients are in there as well */
}
/* end snippet */

/* ---- two optimizers -------------------------------------------------------------------------- */

/* What an optimizer keeps for a parameter of `parts` matrices [rows,cols]: a gate has one matrix,
 * a pool one for each expert. */
typedef struct moments {
    int64_t parts, rows, cols;
    float *mean, *square; /* Adam: [parts,rows,cols] each */
    float *row, *col;     /* frugal: [parts,rows] and [parts,cols] averages of squared gradients */
    float *power;         /* [parts,2] beta1^n and beta2^n of a part that was updated n times */
} moments;

typedef struct optimizer {
    int frugal;
    int64_t bytes;
    moments of[PARAMETERS];
} optimizer;

static void *zeros(optimizer *o, int64_t count, size_t size)
{
    void *memory = calloc((size_t)count, size);
    HOLDS(memory != NULL);
    o->bytes += count * (int64_t)size;
    return memory;
}

static moe_parameter_record record_of(const model *m, int64_t index)
{
    moe_parameter_record p;
    OK(moe_parameter_record_init(&p, sizeof p));
    OK(moe_layer_parameter(m->layer, index, &p));
    return p;
}

static void optimizer_make(optimizer *o, const model *m, int frugal)
{
    *o = (optimizer){.frugal = frugal};
    HOLDS(moe_layer_parameter_count(m->layer) == PARAMETERS); /* gate: 2, experts: 2 */
    for (int64_t i = 0; i < moe_layer_parameter_count(m->layer); i++) {
        moe_parameter_record p = record_of(m, i);
        moments *k = &o->of[i];
        k->parts = p.dims == 3 ? p.shape[0] : 1;
        k->rows = p.shape[p.dims - 2], k->cols = p.shape[p.dims - 1];
        k->power = zeros(o, k->parts * 2, sizeof *k->power);
        for (int64_t j = 0; j < k->parts * 2; j++) k->power[j] = 1;
        if (frugal) {
            k->row = zeros(o, k->parts * k->rows, sizeof(float));
            k->col = zeros(o, k->parts * k->cols, sizeof(float));
        } else {
            k->mean = zeros(o, p.element_count, sizeof(float));
            k->square = zeros(o, p.element_count, sizeof(float));
        }
    }
}

static void optimizer_free(optimizer *o)
{
    for (int i = 0; i < PARAMETERS; i++) {
        moments *k = &o->of[i];
        free(k->mean), free(k->square), free(k->row), free(k->col), free(k->power);
    }
}

static const float BETA1 = 0.9f, BETA2 = 0.99f, EPSILON = 1e-8f, RATE = 0.01f;

/* Adam (Kingma & Ba 2015, arXiv 1412.6980) on one matrix. */
static void adam(const moments *k, int64_t part, float *data, const float *grad)
{
    int64_t at = part * k->rows * k->cols, n = k->rows * k->cols;
    float *mean = k->mean + at, *square = k->square + at;
    float left1 = 1 - k->power[2 * part], left2 = 1 - k->power[2 * part + 1];
    for (int64_t i = 0; i < n; i++) {
        mean[i] = BETA1 * mean[i] + (1 - BETA1) * grad[i];
        square[i] = BETA2 * square[i] + (1 - BETA2) * grad[i] * grad[i];
        data[i] -= RATE * (mean[i] / left1) / (sqrtf(square[i] / left2) + EPSILON);
    }
}

/* snippet: frugal-adam */
/* Appendix D: no first moment (beta1 = 0), and of the second moments only the averages over each
 * row and each column; the estimate of an element is their product over the mean of either. A
 * matrix [rows,cols] costs rows + cols numbers instead of 2 rows cols. */
static void frugal_adam(const moments *k, int64_t part, float *data, const float *grad)
{
    float *row = k->row + part * k->rows, *col = k->col + part * k->cols, mean = 0;
    float left = 1 - k->power[2 * part + 1];
    for (int64_t j = 0; j < k->cols; j++) col[j] *= BETA2;
    for (int64_t i = 0; i < k->rows; i++) {
        float sum = 0;
        for (int64_t j = 0; j < k->cols; j++) {
            float square = grad[i * k->cols + j] * grad[i * k->cols + j];
            sum += square;
            col[j] += (1 - BETA2) * square / (float)k->rows;
        }
        row[i] = BETA2 * row[i] + (1 - BETA2) * sum / (float)k->cols;
        mean += row[i] / (float)k->rows;
    }
    for (int64_t i = 0; i < k->rows; i++)
        for (int64_t j = 0; j < k->cols; j++) {
            float square = mean > 0 ? row[i] * col[j] / mean : 0;
            float *to = &data[i * k->cols + j];
            *to -= RATE * grad[i * k->cols + j] / (sqrtf(square / left) + EPSILON);
        }
}
/* end snippet */

/* snippet: touched */
/* Only experts that received a gradient are walked: with E in the thousands and a few tokens each,
 * that is most of the optimizer's time. The others keep parameters and moments as they are. */
static int64_t update(optimizer *o, const model *m)
{
    uint8_t touched[E];
    int64_t count;
    OK(moe_experts_touched(m->experts, touched, &count));
    for (int64_t i = 0; i < moe_layer_parameter_count(m->layer); i++) {
        moe_parameter_record p = record_of(m, i);
        moments *k = &o->of[i];
        for (int64_t part = 0; part < k->parts; part++) {
            int64_t at = part * k->rows * k->cols;
            if (p.sharding == MOE_SHARD_EXPERT && !touched[part]) continue;
            k->power[2 * part] *= BETA1, k->power[2 * part + 1] *= BETA2;
            (o->frugal ? frugal_adam : adam)(k, part, (float *)p.data + at, (float *)p.grad + at);
        }
    }
    return count;
}
/* end snippet */

int main(void)
{
    static float x[T * D], target[T * D];
    model m[2];
    optimizer o[2];
    double error[2] = {0, 0}, first = 0;
    int64_t walked = 0;
    uint64_t state = 1;
    for (int which = 0; which < 2; which++)
        make(&m[which]), optimizer_make(&o[which], &m[which], which);
    printf("step   Adam    frugal   (mean squared error)\n");
    for (int step = 0; step < STEPS; step++) {
        draw_batch(x, target, step, &state);
        for (int which = 0; which < 2; which++) {
            double now = step_gradients(&m[which], x, target, step);
            error[which] = step == 0 ? now : 0.9 * error[which] + 0.1 * now;
            walked += update(&o[which], &m[which]);
        }
        if (step == 0) first = error[0];
        if (step % 300 == 0 || step + 1 == STEPS)
            printf("%4d  %7.3f %7.3f\n", step, error[0], error[1]);
    }
    moe_losses losses;
    OK(moe_losses_init(&losses, sizeof losses));
    OK(moe_pass_losses(m[0].pass, &losses));
    printf("balance losses of the last step: importance %.3f, load %.3f\n",
           losses.value[MOE_LOSS_IMPORTANCE], losses.value[MOE_LOSS_LOAD]);
    printf("experts walked per step: %.0f of %d\n", (double)walked / (2 * STEPS), E);
    printf("optimizer memory: Adam %d bytes, frugal %d bytes\n", (int)o[0].bytes, (int)o[1].bytes);
    HOLDS(error[0] < first / 3 && error[1] < first / 3);
    HOLDS(walked < (int64_t)2 * STEPS * E);
    for (int which = 0; which < 2; which++) optimizer_free(&o[which]), drop(&m[which]);
    return 0;
}
