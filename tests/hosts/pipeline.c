/* pipeline.c - a pipeline schedule: four micro-batches in flight over three layers, one forward one
 * backward (1F1B). Each micro-batch has a pass per layer; gradients add up as if they came one
 * after the other. */
#include "host.h"

enum { LAYERS = 3, PASSES = 4, MICRO = 16 };

typedef struct flight {
    moe_pass *pass[LAYERS];
    float *act[LAYERS + 1], *grad[LAYERS + 1]; /* inputs of each layer and the last output */
} flight;

static void forward(small *layers, flight *f, int64_t micro)
{
    for (int l = 0; l < LAYERS; l++) {
        moe_forward_args a = forward_args(f->act[l], f->act[l + 1], MICRO);
        a.token_first = micro * MICRO;
        OK(moe_layer_forward(layers[l].layer, f->pass[l], &a));
    }
}

static void backward(small *layers, flight *f)
{
    for (int l = LAYERS - 1; l >= 0; l--) {
        moe_backward_args b = backward_args(f->grad[l + 1], f->grad[l]);
        OK(moe_layer_backward(layers[l].layer, f->pass[l], &b));
    }
}

static void make_flights(flight *flights, small *layers)
{
    for (int m = 0; m < PASSES; m++)
        for (int l = 0; l <= LAYERS; l++) {
            flights[m].act[l] = floats(MICRO * D), flights[m].grad[l] = floats(MICRO * D);
            if (l == 0) fill(flights[m].act[l], MICRO * D, 10 + (uint64_t)m);
            if (l == LAYERS) fill(flights[m].grad[l], MICRO * D, 20 + (uint64_t)m);
            if (l < LAYERS) OK(moe_pass_create(&flights[m].pass[l], layers[l].layer, NULL));
        }
}

static void free_flights(flight *flights)
{
    for (int m = 0; m < PASSES; m++)
        for (int l = 0; l <= LAYERS; l++) {
            free(flights[m].act[l]), free(flights[m].grad[l]);
            if (l < LAYERS) moe_pass_destroy(flights[m].pass[l]);
        }
}

int main(void)
{
    /* F0 F1 F2 B0 F3 B1 B2 B3: up to three micro-batches between forward and backward */
    static const int schedule[] = {0, 1, 2, -1, 3, -2, -3, -4};
    small one[LAYERS], many[LAYERS];
    flight in_order[PASSES], in_flight[PASSES];
    for (int l = 0; l < LAYERS; l++) {
        small_make(&one[l], NULL, MOE_PARAMETERS_OWNED),
            small_make(&many[l], NULL, MOE_PARAMETERS_OWNED);
        set_gate(one[l].layer), set_gate(many[l].layer);
    }
    make_flights(in_order, one), make_flights(in_flight, many);
    for (int m = 0; m < PASSES; m++) forward(one, &in_order[m], m), backward(one, &in_order[m]);
    for (size_t i = 0; i < sizeof schedule / sizeof *schedule; i++) {
        if (schedule[i] >= 0)
            forward(many, &in_flight[schedule[i]], schedule[i]);
        else
            backward(many, &in_flight[-schedule[i] - 1]);
    }
    for (int m = 0; m < PASSES; m++) {
        SHOW(same(in_order[m].act[LAYERS], in_flight[m].act[LAYERS], MICRO * D));
        SHOW(same(in_order[m].grad[0], in_flight[m].grad[0], MICRO * D));
    }
    for (int l = 0; l < LAYERS; l++) SHOW(same_gradients(one[l].layer, many[l].layer));
    free_flights(in_order), free_flights(in_flight);
    for (int l = 0; l < LAYERS; l++) small_free(&one[l]), small_free(&many[l]);
    printf("four passes over three layers, 1F1B: the bytes of one after the other; ok\n");
    return 0;
}
