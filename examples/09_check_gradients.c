/* 09_check_gradients.c - are the gradients right, for my configuration, on my machine? The library
 * answers by central differences in double precision.
 *
 * Introduces: moe_check_gradients, moe_gradient_check, moe_gradient_report. */
#include "example.h"

#include <string.h>

enum { D = 24, F = 40, E = 6, K = 2 };

/* A configuration with a bit of everything: a noisy gate with its losses, capacity, gated experts
 * with biases whose gate and up projections are interleaved, the sigmoid of the 2017 paper. */
static moe_layer *make_layer(moe_context *context)
{
    moe_gate *gate;
    moe_experts *experts;
    moe_layer *layer;
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    OK(moe_gate_config_init(&g, sizeof g));
    g.d_model = D, g.num_experts = E, g.top_k = K, g.kind = MOE_GATE_NOISY_TOP_K;
    g.importance_weight = g.load_weight = 0.1, g.z_weight = 0.01;
    g.capacity_kind = MOE_CAPACITY_FACTOR, g.capacity_factor = 1.25;
    OK(moe_gate_create(&gate, context, &g));
    OK(moe_experts_config_init(&e, sizeof e));
    e.d_model = D, e.d_hidden = F, e.num_experts = E, e.bias = 1;
    e.activation = MOE_ACTIVATION_SWIGLU, e.glu_order = MOE_GLU_INTERLEAVED;
    OK(moe_experts_create(&experts, context, &e));
    OK(moe_layer_config_init(&l, sizeof l));
    l.gate = gate, l.experts = experts, l.output = MOE_OUTPUT_SIGMOID;
    OK(moe_layer_create(&layer, &l));
    moe_gate_destroy(gate), moe_experts_destroy(experts); /* the layer holds them */
    return layer;
}

/* The report comes line by line. With --verbose it is shown whole; errors differ in their last
 * digits from machine to machine, so that the quiet form shows the names only. */
static void show(void *user, int32_t level, const char *line)
{
    char name[64];
    if (*(const int *)user)
        printf("%s%s\n", level == MOE_LOG_ERROR ? "! " : "", line);
    else if (strstr(line, "agrees") && sscanf(line, "%63s", name) == 1)
        printf("  %-20s agrees\n", name);
}

int main(int argc, char **argv)
{
    int verbose = argc > 1 && strcmp(argv[1], "--verbose") == 0;
    moe_context *context;
    OK(moe_context_create(&context, NULL));
    moe_layer *layer = make_layer(context);

    /* snippet: check */
    moe_gradient_check c;
    moe_gradient_report r;
    OK(moe_gradient_check_init(&c, sizeof c));
    OK(moe_gradient_report_init(&r, sizeof r));
    c.tokens = 40, c.probes = 50;
    c.report = show, c.report_user = &verbose;
    moe_status status = moe_check_gradients(layer, &c, &r);
    if (status != MOE_OK) fprintf(stderr, "%s\n", moe_last_error()); /* which, where, how far off */
    /* end snippet */

    printf("%d tensors, %d elements that disagree, largest error below 1e-6: %s\n", (int)r.tensors,
           (int)r.disagreements, r.worst < 1e-6 ? "yes" : "no");
    moe_layer_destroy(layer), moe_context_destroy(context);
    return status != MOE_OK;
}
