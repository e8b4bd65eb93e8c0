/* run.h - one run of one case: the objects, the numbers the library gave, and how it ended. */
#ifndef VECTOR_RUN_H
#define VECTOR_RUN_H

#include "case.h"

#include <moe/moe.h>

enum { MAX_RESULTS = 128, MAX_BLOCKS = 1024 };

/* How the weights of a pool are stored; every case with experts passes in each of these ways. */
typedef struct storage {
    const char *name;
    int32_t layout, glu_order;
    int strided;  /* 1: x, y, dy and dx have gaps, gradients are overwritten instead of added to */
    int32_t mode; /* MOE_STORAGE_* */
} storage;

typedef struct run_options {
    int32_t dtype, threads, isa;
    int verbose;
    const char *layout; /* the one storage to run, or NULL: all */
    storage storage;
} run_options;

typedef struct result {
    char name[48];
    int is_int;
    int64_t count;
    double *real;
    int32_t *integer;
} result;

typedef struct run {
    vector_case *c;
    run_options o;
    moe_context *context;
    moe_gate *gate;
    moe_experts *experts, *shared, *residual;
    moe_layer *layer;
    moe_pass *pass;
    moe_plan *plan;
    result results[MAX_RESULTS];
    int result_count;
    void *blocks[MAX_BLOCKS];
    int block_count;
    int skipped, failed;
    char why[768];
} run;

/* Ends the run with a message; returns -1. */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
int run_fail(run *r, const char *format, ...);
/* Ends the run for an error of the library: MOE_ERROR_NOT_SUPPORTED is a skip. Returns -1. */
int run_status(run *r, const char *what, moe_status status);

#define CALL(r, call)                                                        \
    do {                                                                     \
        moe_status call_status = (call);                                     \
        if (call_status != MOE_OK) return run_status(r, #call, call_status); \
    } while (0)
#define TRY(call)                   \
    do {                            \
        if ((call) != 0) return -1; \
    } while (0)

/* Zeroed memory that lives as long as the run. */
void *run_alloc(run *r, int64_t bytes);
/* Room for `count` numbers of the run's dtype, and a tensor converted to it (NULL if there is
 * none). */
void *run_reals(run *r, int64_t count);
void *run_input(run *r, const char *name);
double real_at(const run *r, const void *data, int64_t i);
void set_real(const run *r, void *data, int64_t i, double value);

/* Room for a result, to be compared with the out tensor of that name. */
double *result_reals(run *r, const char *name, int64_t count);
int32_t *result_ints(run *r, const char *name, int64_t count);
/* A result that is an array of the run's dtype. */
void result_copy(run *r, const char *name, const void *data, int64_t count);

/* The operations. Each fills results; 0 or -1. */
int op_cv(run *r);
int op_capacity(run *r);
int op_gate(run *r); /* gate_softmax, gate_noisy_topk */
int op_balanced(run *r);
int op_route(run *r);
int op_expert_choice(run *r);
int op_aux_losses(run *r);
int op_ffn_grouped(run *r);
int op_layer(run *r);
int op_hier(run *r);

/* gate.c: an option that is one of a few words. */
typedef struct name_value {
    const char *name;
    int32_t value;
} name_value;

extern const name_value POLICIES[];
int choose(run *r, const char *key, const char *fallback, const name_value *choices, int32_t *out);

/* The config of a case's gate; a gate and its pass; memory for one of its parameters. */
int gate_config(run *r, moe_gate_config *g, const char *gating);
int make_gate(run *r, const char *gating, int64_t d_model);
int bind_gate(run *r, const char *name, void *data, void *grad);

/* What a routed pass shows. weight_name NULL: the entries of a token vary, only the dense gates and
 * the order of rows are shown. */
int show_gate(run *r, int64_t T, int64_t E, int64_t K, const char *weight_name);
/* Of them the plan: gates[T,E], perm_token, topk_idx, keep and the K weights. */
int show_plan(run *r, int64_t T, int64_t E, int64_t K, const char *weight_name);
/* A plan's weights scattered to [T,E]. */
int show_gates(run *r, const char *name, const moe_plan *plan, int64_t T, int64_t E);
/* A [..] tensor of the pass as a result; zeros of `count` if the pass has none and `or_zero`. */
int show_tensor(run *r, const char *name, int32_t what, int64_t count, int or_zero);
int loss_results(run *r);
int pass_view(run *r, moe_plan_view *v);

/* The gradient by the plan's weights from a dense [T,E] one. */
int gather_grad(run *r, const void *dense, int64_t E, void **out);
/* One scalar's gradients by x, Wg, Wnoise and thr, under names with a suffix. `loss` < 0: no loss
 * counts. */
int gate_gradients(run *r, const char *suffix, void *entry_grad, int loss, int64_t T);

#endif
