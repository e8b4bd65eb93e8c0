/* layer.c - whole layers: gate, experts, shared expert and residual branch, with all gradients. */
#include "pool.h"

#include <stdio.h>
#include <string.h>

/* The pools of a case; those it has no tensors for are empty. */
typedef struct layer_pools {
    pool routed, shared, residual;
} layer_pools;

/* ---- parameters ------------------------------------------------------------------------------ */

/* A parameter of gate or layer, and the tensor of the case for it. */
typedef struct parameter_name {
    const char *name, *tensor;
} parameter_name;

static const parameter_name FLAT[] = {{"weight", "Wg"},
                                      {"noise_weight", "Wnoise"},
                                      {"selection_bias", "bias"},
                                      {"threshold", "thr"},
                                      {NULL, NULL}};
static const parameter_name TWO_LEVELS[] = {{"primary_weight", "Wg_p"},
                                            {"primary_noise_weight", "Wnoise_p"},
                                            {"weight", "Wg_s"},
                                            {"noise_weight", "Wnoise_s"},
                                            {NULL, NULL}};
static const parameter_name OF_LAYER[] = {
    {"shared_gate", "wsg"}, {"residual_mix", "Wc"}, {"residual_mix_bias", "bc"}, {NULL, NULL}};

enum { MOST_NAMES = 4 };

/* A fresh gradient for each name; bound through the gate, or through the layer. */
static int bind_names(run *r, const parameter_name *names, int of_layer, stored *to)
{
    for (; names->name; names++, to++) {
        moe_binding b;
        tensor *t = case_tensor(r->c, "in", names->tensor);
        int64_t index = of_layer ? moe_layer_parameter_find(r->layer, names->name)
                                 : moe_gate_parameter_find(r->gate, names->name);
        if (index < 0 && t && strcmp(names->name, "noise_weight") != 0)
            return run_fail(r, "there is no parameter %s for the tensor %s", names->name,
                            names->tensor);
        if (index < 0) continue;
        stored_reset(r, to, t ? t->count : case_integer(r->c, "E", 0));
        if (t) to->data = run_input(r, names->tensor); /* else zeros: thresholds nobody asks for */
        if (!t && strcmp(names->name, "threshold") != 0)
            return run_fail(r, "the case has no tensor for %s", names->name);
        CALL(r, moe_binding_init(&b, sizeof b));
        b.data = to->data;
        b.grad = strcmp(names->name, "selection_bias") == 0 ? NULL : to->grad;
        b.data_dtype = b.grad_dtype = r->o.dtype;
        CALL(r, of_layer ? moe_layer_bind(r->layer, index, &b) : moe_gate_bind(r->gate, index, &b));
    }
    return 0;
}

static void show_names(run *r, const parameter_name *names, const stored *from, const char *suffix)
{
    for (; names->name; names++, from++) {
        char name[48];
        tensor *t = case_tensor(r->c, "in", names->tensor);
        if (!t || !from->grad) continue;
        (void)snprintf(name, sizeof name, "d%s%s", names->tensor, suffix);
        result_copy(r, name, from->grad, t->count);
    }
}

static int bind_all(run *r, layer_pools *p, const parameter_name *names, stored of_gate[MOST_NAMES],
                    stored of_layer[MOST_NAMES])
{
    memset(of_gate, 0, MOST_NAMES * sizeof *of_gate);
    memset(of_layer, 0, MOST_NAMES * sizeof *of_layer);
    TRY(bind_names(r, names, 0, of_gate));
    TRY(bind_names(r, OF_LAYER, 1, of_layer));
    TRY(bind_pool(r, r->experts, &p->routed));
    if (r->shared) TRY(bind_pool(r, r->shared, &p->shared));
    if (r->residual) TRY(bind_pool(r, r->residual, &p->residual));
    return 0;
}

/* Binds everything with fresh gradients, goes back with this dy, and shows the gradients. */
static int layer_gradients(run *r, layer_pools *p, const parameter_name *names, const char *suffix,
                           const void *dy, int64_t T)
{
    int64_t D = p->routed.D, O = p->routed.O;
    moe_backward_args b;
    char name[48];
    stored of_gate[MOST_NAMES], of_layer[MOST_NAMES];
    TRY(bind_all(r, p, names, of_gate, of_layer));
    CALL(r, moe_backward_args_init(&b, sizeof b));
    b.flags = r->o.storage.strided ? MOE_BACKWARD_OVERWRITE : 0;
    b.dy = spread(r, dy ? dy : run_reals(r, T * O), T, O);
    b.dy_stride = stride_of(r, O);
    b.dx = spread(r, NULL, T, D);
    b.dx_stride = stride_of(r, D);
    CALL(r, moe_layer_backward(r->layer, r->pass, &b));
    (void)snprintf(name, sizeof name, "dx%s", suffix);
    TRY(gather(r, name, b.dx, T, D));
    show_names(r, names, of_gate, suffix);
    show_names(r, OF_LAYER, of_layer, suffix);
    show_gradients(r, &p->routed, suffix);
    if (r->shared) show_gradients(r, &p->shared, suffix);
    if (r->residual) show_gradients(r, &p->residual, suffix);
    return 0;
}

/* ---- objects --------------------------------------------------------------------------------- */

static int make_layer(run *r, layer_pools *p, const char *gating)
{
    moe_gate_config g;
    moe_layer_config l;
    memset(p, 0, sizeof *p);
    TRY(gate_config(r, &g, gating));
    g.d_model = case_integer(r->c, "D", 0);
    CALL(r, moe_gate_create(&r->gate, r->context, &g));
    TRY(make_pool(r, &p->routed, "", &r->experts));
    CALL(r, moe_layer_config_init(&l, sizeof l));
    l.gate = r->gate;
    l.experts = r->experts;
    l.parameters = MOE_PARAMETERS_BOUND;
    l.output = case_integer(r->c, "out_sigmoid", 0) ? MOE_OUTPUT_SIGMOID : MOE_OUTPUT_LINEAR;
    if (case_tensor(r->c, "in", "sW1")) {
        TRY(make_pool(r, &p->shared, "s", &r->shared));
        l.shared = r->shared;
        l.shared_gate = case_tensor(r->c, "in", "wsg") != NULL;
    }
    if (case_tensor(r->c, "in", "rW1")) {
        TRY(make_pool(r, &p->residual, "r", &r->residual));
        l.residual = r->residual;
        l.residual_mix = case_tensor(r->c, "in", "Wc") != NULL;
    }
    CALL(r, moe_layer_create(&r->layer, &l));
    CALL(r, moe_pass_create(&r->pass, r->layer, NULL));
    return 0;
}

static int layer_forward(run *r, layer_pools *p, const parameter_name *names, moe_forward_args *f)
{
    int64_t T = case_integer(r->c, "T", 0), D = p->routed.D, O = p->routed.O;
    stored of_gate[MOST_NAMES], of_layer[MOST_NAMES];
    TRY(bind_all(r, p, names, of_gate, of_layer));
    f->tokens = T;
    f->flags = case_integer(r->c, "train", 1) ? MOE_FORWARD_TRAIN : 0;
    f->x = spread(r, run_input(r, "x"), T, D);
    f->x_stride = stride_of(r, D);
    f->y = spread(r, NULL, T, O);
    f->y_stride = stride_of(r, O);
    CALL(r, moe_layer_forward(r->layer, r->pass, f));
    return gather(r, "y", f->y, T, O);
}

/* counts of a layer are the kept rows of each expert. */
static int show_counts(run *r, int64_t E)
{
    moe_tensor_view v;
    CALL(r, moe_tensor_view_init(&v, sizeof v));
    CALL(r, moe_pass_tensor(r->pass, MOE_TENSOR_ROWS, &v));
    int32_t *counts = result_ints(r, "counts", E);
    for (int64_t e = 0; e < E; e++) counts[e] = (int32_t)((const int64_t *)v.data)[e];
    return 0;
}

/* ---- moe_layer ------------------------------------------------------------------------------- */

int op_layer(run *r)
{
    layer_pools p;
    moe_forward_args f;
    int64_t T = case_integer(r->c, "T", 0), E = case_integer(r->c, "E", 0);
    int64_t K = case_integer(r->c, "K", 1);
    const char *gating = case_text(r->c, "gating", "topk");
    int varies = strcmp(gating, "balanced") == 0 || strcmp(gating, "expert_choice") == 0;
    if (strcmp(gating, "softmax_dense") == 0) K = E;
    (void)case_integer(r->c, "F", 0);
    TRY(make_layer(r, &p, gating));
    CALL(r, moe_forward_args_init(&f, sizeof f));
    f.noise = run_input(r, "noise");
    TRY(layer_forward(r, &p, FLAT, &f));
    TRY(show_gate(r, T, E, K, varies ? NULL : "topk_w"));
    TRY(show_counts(r, E));
    TRY(layer_gradients(r, &p, FLAT, "", run_input(r, "dy"), T));
    return layer_gradients(r, &p, FLAT, "_aux", NULL, T);
}

/* ---- moe_hier -------------------------------------------------------------------------------- */

int op_hier(run *r)
{
    layer_pools p;
    moe_forward_args f;
    const moe_plan *primary;
    int64_t T = case_integer(r->c, "T", 0), A = case_integer(r->c, "A", 1);
    int64_t E = A * case_integer(r->c, "B", 1);
    int64_t K = case_integer(r->c, "KP", 1) * case_integer(r->c, "KS", 1);
    (void)case_integer(r->c, "F", 0);
    TRY(make_layer(r, &p, "hier"));
    CALL(r, moe_forward_args_init(&f, sizeof f));
    f.noise = run_input(r, "noise_s");
    f.noise_primary = run_input(r, "noise_p");
    TRY(layer_forward(r, &p, TWO_LEVELS, &f));
    CALL(r, moe_pass_primary_plan(r->pass, &primary));
    TRY(show_gates(r, "gates_primary", primary, T, A));
    TRY(show_plan(r, T, E, K, "topk_w"));
    TRY(show_tensor(r, "importance_h", MOE_TENSOR_IMPORTANCE, E, 0));
    TRY(show_tensor(r, "load_h", MOE_TENSOR_LOAD, E, 0));
    TRY(show_tensor(r, "load_primary", MOE_TENSOR_PRIMARY_LOAD, A, 0));
    TRY(loss_results(r));
    TRY(show_counts(r, E));
    TRY(layer_gradients(r, &p, TWO_LEVELS, "", run_input(r, "dy"), T));
    return layer_gradients(r, &p, TWO_LEVELS, "_aux", NULL, T);
}
