/* layer_case.h - one configuration of a layer with random contents, run through the library and
 * through the reference, and compared tensor by tensor. */
#ifndef LAYER_CASE_H
#define LAYER_CASE_H

#include "reference/reference.h"
#include "support/real.h"

#include <moe/moe.h>

/* What is varied. Zero is the plain choice for every field but those with a comment; see
 * layer_case_make. */
typedef struct layer_case {
    const char *name;
    int64_t T, D, E, F, K;
    int64_t O, gate_D; /* 0: D */
    int kind, score, order, renormalize, router_bias, logits_in;
    int activation, expert_bias, expert_sigmoid, layer_sigmoid;
    int layout, glu_order;
    int no_experts; /* 1: the gate alone, with a random gradient by the weights */
    int eval;       /* 1: no noise */
    int cv_ddof, sequence_softmax, sequence_routed;
    int capacity_kind; /* MOE_CAPACITY_* */
    int64_t capacity, capacity_minimum;
    double capacity_factor;
    int capacity_rounding, renormalize_after_drop;
    int64_t groups; /* 0: one */
    int masked;     /* 1: about a quarter of the tokens is padding, with NaN inside */
    double weight[REF_LOSSES], route_scale /* 0: 1 */, renormalize_epsilon,
        noise_epsilon /* 0: 0.01 */;
    double spread;    /* of the inputs; 0: 1 */
    int loss_factors; /* 1: backward gets a factor for each loss, one of them 0 */
    int philox;       /* 1: the library draws the noise */
    int per_call;     /* 1: K, capacity and loss weights come with the call, not with the config */
    int replay;  /* 1: a plan's ids, 2: its ids and weights; some are -1, some twice in a token */
    int no_gate; /* 1: a layer without a gate, 2: the pool's own calls; needs replay 2 */
    int strided; /* 1: rows of every operand lie apart, with a pattern between them */
    int moved;   /* 1: x and gate_x are elsewhere in the backward */
    int split;   /* 1: d_gate_x is wanted although the gate sees x */
    int bound;   /* 1: parameters in host memory of odd strides, 2: a pointer for each expert */
    int packed;  /* 1: pools with MOE_STORAGE_PREPACKED */
    int selection_bias, expert_groups, top_groups, group_score; /* hierarchical: A and KP */
    int thresholds; /* 1: of a balanced gate: about 1/E; 0: all 0 */
    int sinkhorn_iterations, loss_by_group, capacity_multiple, drop_policy, second_choice;
    int shared, shared_gate;    /* number of shared experts; 1: with a gate */
    int residual, residual_mix; /* 1: a residual branch; 1: mixed, not added */
    int branch_activation;      /* of both */
    int dropped, position;      /* MOE_DROPPED_*, MOE_WEIGHT_ON_* of the routed experts */
    double renormalize_minimum, capacity_factor_eval, second_threshold;
    double alpha, limit, offset; /* of SwiGLU in the routed experts */
    int64_t padded_rows;         /* on a device: of MOE_EXCHANGE_PADDED; 0: exact */
    int32_t element;    /* MOE_DTYPE_BF16 or _F16: what tokens and weights are rounded to; 0: f32 */
    int half_gradients; /* 1: bound gradients are of 16 bits too, not f32 */
    /* filled by layer_case_make */
    ref_problem p;
    int64_t *group_begin;
    uint8_t *mask;
    int32_t *ids;       /* [T,K] of a replay, or of a hash */
    int64_t *token_key; /* [T] of a hash */
    double call_weights[MOE_LOSS_SLOTS];
    double *arrays[64];
    int array_count;
} layer_case;

/* A configuration drawn at random; what contradicts itself is mended. */
layer_case layer_case_draw(uint64_t *state);
/* Its contents, and back. */
void layer_case_make(layer_case *c, uint64_t seed);
void layer_case_free(layer_case *c);
void layer_case_print(const layer_case *c, char *text, size_t size);

/* layer_hash.c: token_key, and the ids that go with it as p.fixed_ids. */
void layer_case_hash(layer_case *c, uint64_t *state);

/* Whether the number of entries differs from token to token. */
int layer_case_varies(const layer_case *c);

/* A parameter of the layer: where it is in a problem, its gradient in a result, and what it is
 * called by its object. */
enum { OF_GATE, OF_ROUTED, OF_SHARED, OF_RESIDUAL, OF_LAYER, OWNERS };

typedef struct layer_tensor {
    const char *name; /* of its gradient: "dW1", of shared experts "dsW1", of the branch "drW1" */
    int owner;
    const char *parameter, *fused; /* "w1", and "w13" where both GLU parts are one */
    size_t in_problem, in_result;  /* offsets of double pointers; a buffer has no gradient: 0 */
} layer_tensor;

enum { LAYER_TENSORS = 28 };
extern const layer_tensor layer_tensors[LAYER_TENSORS];

const double **layer_tensor_input(ref_problem *p, const layer_tensor *t);
const double *layer_tensor_gradient(const ref_result *r, const layer_tensor *t);
/* [experts,rows,cols] of a case; vectors have one row. Returns the number of elements. */
int64_t layer_tensor_shape(const ref_problem *p, const layer_tensor *t, int64_t *experts,
                           int64_t *rows, int64_t *cols);
const ref_pool *layer_pool_of(const ref_problem *p, int owner);

/* Numbers of the noise when the library draws it. */
enum { CASE_SEED = 42, CASE_LAYER = 5, CASE_STREAM = 3, CASE_STEP = 9, CASE_TOKEN_FIRST = 1000 };

/* A row operand of the host, dense for the test; for strided cases a wide copy is what the
 * library sees. */
typedef struct row_operand {
    void *dense, *wide;
    int64_t rows, width, stride; /* stride 0: no wide copy */
    size_t element;
    int is_output;
} row_operand;

/* Memory of a bound parameter. */
typedef struct bound_memory {
    char *data, *grad;
    int64_t data_count, grad_count; /* elements */
    size_t data_element, grad_element;
    void *data_each[16], *grad_each[16];
} bound_memory;

enum { RUN_OPERANDS = 10, RUN_PARAMETERS = 28 };

/* The library's objects and results for a case; results are widened to double. */
typedef struct layer_run {
    const layer_case *c;
    int32_t dtype, real; /* of tokens and rows; of logits, noise, weights and their gradients */
    moe_context *context;
    moe_gate *gate;
    moe_experts *experts, *shared, *residual;
    moe_layer *layer;
    moe_pass *pass;
    moe_plan *plan;                                        /* replayed */
    void *x, *gate_x, *dy;                                 /* inputs of the dtype */
    void *logits_in, *noise, *noise_primary, *weight_grad; /* real */
    void *y, *dx, *d_gate_x;                               /* outputs of the dtype */
    void *d_logits, *entry_grad;                           /* real */
    double loss_grad[MOE_LOSS_SLOTS];                      /* real */
    void *moved_x, *moved_gate_x;
    row_operand rows[RUN_OPERANDS];
    bound_memory bound[RUN_PARAMETERS];
    moe_forward_args f;
    moe_backward_args b;
    const ref_result *want; /* of layer_run_compare */
} layer_run;

/* Makes context (from `config`, may be NULL), objects with the case's parameters, and arguments.
 * Aborts the test on an error. */
void layer_run_make(layer_run *r, const layer_case *c, int32_t dtype,
                    const moe_context_config *config);
void layer_run_free(layer_run *r);
/* For strided cases they also copy inputs out, results back, and check what lies between rows. */
moe_status layer_run_forward(layer_run *r);
moe_status layer_run_backward(layer_run *r);

/* Bytes of an element, and element i of an array, of a dtype. */
size_t number_bytes(int32_t dtype);
double number_at(const void *data, int64_t i, int32_t dtype);
void number_set(void *data, int64_t i, int32_t dtype, double value);
/* Of 16 bits; what such a layer computes with. */
int number_is_half(int32_t dtype);
int32_t number_real(int32_t dtype);
/* Writes double data into the parameters, mapping layout and GLU order. */
void layer_run_set_parameters(layer_run *r, const ref_problem *p);

/* The slot [T,K] of the reference where an entry of the pass's plan lies. */
int64_t layer_run_slot(const layer_run *r, const moe_plan_view *v, int64_t t, int64_t n);
/* The pass's plan. */
void layer_run_view(const layer_run *r, moe_plan_view *v);

/* Compares everything with the reference; "" or the tensor, the index and both values. */
const char *layer_run_compare(layer_run *r, const ref_result *want);

/* A parameter's gradient in the reference's order; malloc'd. name as in ref_result: "dW1", ...
 * Elements without a gradient are NaN. */
double *layer_run_gradient(const layer_run *r, const char *name, int64_t *count);

/* FNV-1a over y, dx, d_gate_x, d_logits and every gradient. */
uint64_t layer_run_hash(const layer_run *r);

/* layer_parameters.c: binds every parameter as the case asks, and checks the gaps. */
void layer_run_bind(layer_run *r);
const char *layer_run_check_gaps(const layer_run *r);

/* Deterministic numbers: uniform in [0,1), roughly normal. */
double random_uniform(uint64_t *state);
double random_normal(uint64_t *state);

/* Contents and objects of a case at once, and back. */
void layer_run_begin(layer_run *r, layer_case *c, int32_t dtype);
void layer_run_end(layer_run *r, layer_case *c);
/* A context of the defaults. */
moe_context *new_context(void);

#define COUNT(table) (sizeof(table) / sizeof *(table))

/* Ends the test unless the call answers with `status`. */
#define REFUSED(status, call)                                               \
    do {                                                                    \
        moe_status refused_status = (call);                                 \
        ck_assert_msg(refused_status == (status), "%s gave %s (%s)", #call, \
                      moe_status_name(refused_status), moe_last_error());   \
    } while (0)

/* Ends the test with the library's message unless the call succeeds. */
#define MUST(call)                                                                  \
    do {                                                                            \
        moe_status must_status = (call);                                            \
        if (must_status != MOE_OK) ck_abort_msg("%s: %s", #call, moe_last_error()); \
    } while (0)

#endif
