/* 12_checkpoint.c - a training run that is saved, stopped and resumed: the layer, Adam's moments
 * and the step in one safetensors file, which is there whole or not at all. The resumed run ends
 * with the bytes of one that was never stopped. Needs libmoe_io.
 *
 * Introduces: moe_checkpoint_save, moe_checkpoint_load, moe_file_open, moe_file_entry. */
#include "example.h"

#include <math.h>
#include <moe/io.h>
#include <string.h>
#include <unistd.h>

enum { T = 64, D = 8, F = 16, E = 4, K = 2, PARAMETERS = 4, ITEMS = 4, SAVED = 40, STEPS = 60 };

/* All that a run is. What is not here, data and noise, follows from the number of the step. */
typedef struct run {
    moe_context *context;
    moe_gate *gate;
    moe_experts *experts;
    moe_layer *layer;
    moe_pass *pass;
    void *mean[PARAMETERS], *square[PARAMETERS]; /* Adam's moments, shaped as the parameters */
    int64_t step;
} run;

static moe_parameter_record record_of(const run *r, int64_t index)
{
    moe_parameter_record p;
    OK(moe_parameter_record_init(&p, sizeof p));
    OK(moe_layer_parameter(r->layer, index, &p));
    return p;
}

static void make(run *r)
{
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    OK(moe_context_create(&r->context, NULL));
    OK(moe_gate_config_init(&g, sizeof g));
    g.d_model = D, g.num_experts = E, g.top_k = K, g.kind = MOE_GATE_NOISY_TOP_K;
    OK(moe_gate_create(&r->gate, r->context, &g));
    OK(moe_experts_config_init(&e, sizeof e));
    e.d_model = D, e.d_hidden = F, e.num_experts = E;
    OK(moe_experts_create(&r->experts, r->context, &e));
    OK(moe_layer_config_init(&l, sizeof l));
    l.gate = r->gate, l.experts = r->experts;
    OK(moe_layer_create(&r->layer, &l));
    OK(moe_pass_create(&r->pass, r->layer, NULL));
    HOLDS(moe_layer_parameter_count(r->layer) == PARAMETERS);
    for (int64_t i = 0; i < PARAMETERS; i++) {
        size_t count = (size_t)record_of(r, i).element_count;
        r->mean[i] = calloc(count, sizeof(float)), r->square[i] = calloc(count, sizeof(float));
        HOLDS(r->mean[i] && r->square[i]);
    }
    r->step = 0;
}

static void end(run *r)
{
    for (int64_t i = 0; i < PARAMETERS; i++) free(r->mean[i]), free(r->square[i]);
    moe_pass_destroy(r->pass), moe_layer_destroy(r->layer), moe_experts_destroy(r->experts);
    moe_gate_destroy(r->gate), moe_context_destroy(r->context);
}

static void adam(run *r)
{
    double power = (double)r->step + 1;
    float first = (float)(1 - pow(0.9, power)), second = (float)(1 - pow(0.999, power));
    for (int64_t i = 0; i < PARAMETERS; i++) {
        moe_parameter_record p = record_of(r, i);
        float *data = p.data, *grad = p.grad, *mean = r->mean[i], *square = r->square[i];
        for (int64_t n = 0; n < p.element_count; n++) {
            mean[n] += 0.1f * (grad[n] - mean[n]);
            square[n] += 0.001f * (grad[n] * grad[n] - square[n]);
            data[n] -= 0.01f * mean[n] / first / (sqrtf(square[n] / second) + 1e-8f);
        }
    }
}

/* One step: each token's elements in reverse are to be learned. Returns the mean squared error. */
static double train(run *r)
{
    static float x[T * D], y[T * D], dy[T * D];
    moe_forward_args f;
    moe_backward_args b;
    double error = 0;
    fill(x, T * D, 100 + (uint64_t)r->step);
    OK(moe_forward_args_init(&f, sizeof f));
    f.flags = MOE_FORWARD_TRAIN, f.step = r->step;
    f.tokens = T, f.x = x, f.y = y;
    OK(moe_layer_forward(r->layer, r->pass, &f));
    for (int i = 0; i < T * D; i++) {
        float off = y[i] - x[i / D * D + D - 1 - i % D];
        error += (double)(off * off) / (T * D);
        dy[i] = 2 * off / (T * D);
    }
    OK(moe_backward_args_init(&b, sizeof b));
    b.flags = MOE_BACKWARD_OVERWRITE, b.dy = dy;
    OK(moe_layer_backward(r->layer, r->pass, &b));
    adam(r);
    r->step++;
    return error;
}

/* snippet: items */
/* What a checkpoint holds: the same list saves and loads. */
static void list(run *r, moe_checkpoint_item items[ITEMS])
{
    for (int i = 0; i < ITEMS; i++) OK(moe_checkpoint_item_init(&items[i], sizeof items[i]));
    items[0].name = "layer.", items[0].layer = r->layer; /* its parameters */
    items[1].name = "adam.mean.", items[1].layer = r->layer, items[1].values = r->mean;
    items[2].name = "adam.square.", items[2].layer = r->layer, items[2].values = r->square;
    items[3].name = "step", items[3].data = &r->step, items[3].dtype = MOE_DTYPE_I64;
}

/* The file before, if there is one, stays whatever it is until the new one is on the disk. */
static void save(run *r, const char *path)
{
    moe_checkpoint_item items[ITEMS];
    list(r, items);
    OK(moe_checkpoint_save(path, items, ITEMS, NULL));
}

/* All names, shapes and types are checked before the first number is written. */
static void resume(run *r, const char *path)
{
    moe_checkpoint_item items[ITEMS];
    list(r, items);
    OK(moe_checkpoint_load(path, items, ITEMS, NULL, NULL));
}
/* end snippet */

/* Any program that reads safetensors sees these. */
static void show(const char *path)
{
    moe_file *file;
    moe_file_record t;
    OK(moe_file_open(&file, path));
    OK(moe_file_record_init(&t, sizeof t));
    printf("%d tensors, of experts and gate:\n", (int)moe_file_count(file));
    for (int64_t i = 0; i < moe_file_count(file); i++) {
        OK(moe_file_entry(file, i, &t));
        if (strncmp(t.name, "layer.", 6) == 0)
            printf("  %-24s [%d,%d]\n", t.name, (int)t.shape[0], (int)t.shape[1]);
    }
    moe_file_close(file);
}

static int same(const run *a, const run *b)
{
    int differ = a->step != b->step;
    for (int64_t i = 0; i < PARAMETERS; i++) {
        moe_parameter_record p = record_of(a, i);
        size_t bytes = (size_t)p.element_count * sizeof(float);
        differ |= memcmp(p.data, record_of(b, i).data, bytes);
        differ |= memcmp(a->mean[i], b->mean[i], bytes);
        differ |= memcmp(a->square[i], b->square[i], bytes);
    }
    return !differ;
}

int main(void)
{
    char directory[] = "/tmp/libmoe-XXXXXX", path[sizeof directory + 20];
    double error = 0, again = 0;
    run first, second;
    HOLDS(mkdtemp(directory) != NULL);
    (void)snprintf(path, sizeof path, "%s/run.safetensors", directory);

    make(&first);
    OK(moe_layer_init_parameters(first.layer, 1));
    printf("step %2d  error %.3f\n", 0, train(&first));
    while (first.step < SAVED) error = train(&first);
    save(&first, path);
    printf("step %2d  error %.3f  saved: ", SAVED - 1, error);
    show(path);
    while (first.step < STEPS) error = train(&first);
    printf("step %2d  error %.3f\n", STEPS - 1, error);

    make(&second); /* as in a new process: nothing is left but the file */
    resume(&second, path);
    HOLDS(second.step == SAVED && !same(&first, &second));
    while (second.step < STEPS) again = train(&second);
    HOLDS(same(&first, &second));
    printf("step %2d  error %.3f  resumed: every parameter and moment is the same to the bit\n",
           STEPS - 1, again);

    (void)unlink(path), (void)rmdir(directory);
    end(&first), end(&second);
    return 0;
}
