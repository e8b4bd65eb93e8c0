/* moe/experts.h - a pool of E experts: feed-forward, identity, or the host's own.
 *
 *     plain:  h = act(x W1 + b1),                    z = h W2 + b2
 *     gated:  h = act(x W1 + b1) * (x W3 + b3),      z = h W2 + b2     (Shazeer 2020, arXiv
 *             2002.05202)
 *
 * x is [rows,D], h [rows,F], z [rows,O]. A pool may serve several gates and layers; one backward at
 * a time per pool (another one meanwhile gets MOE_ERROR_INVALID_STATE), any number of forwards. */
#ifndef MOE_EXPERTS_H
#define MOE_EXPERTS_H

#include <moe/pass.h>
#include <moe/status.h>
#include <moe/types.h>

MOE_BEGIN_DECLS

/* gelu_tanh(z) = z/2 (1 + tanh(sqrt(2/pi)(z + 0.044715 z^3))), gelu_erf(z) = z Phi(z), silu(z) =
 * z sigmoid(z), relu'(0) = 0. From MOE_ACTIVATION_SWIGLU on there are W3 and b3. */
enum {
    MOE_ACTIVATION_RELU = 0,
    MOE_ACTIVATION_GELU_TANH = 1,
    MOE_ACTIVATION_GELU_ERF = 2,
    MOE_ACTIVATION_SILU = 3,
    MOE_ACTIVATION_SWIGLU = 16, /* act = silu */
    MOE_ACTIVATION_GEGLU_TANH = 17,
    MOE_ACTIVATION_GEGLU_ERF = 18,
    MOE_ACTIVATION_REGLU = 19 /* act = relu */
};

/* Where the gate (W1) and up (W3) projections of a gated expert lie. */
enum {
    MOE_GLU_SEPARATE = 0,   /* two parameters, "w1" and "w3" */
    MOE_GLU_GATE_UP = 1,    /* one parameter "w13" with 2F columns: W1's, then W3's */
    MOE_GLU_UP_GATE = 2,    /* W3's, then W1's */
    MOE_GLU_INTERLEAVED = 3 /* gate 0, up 0, gate 1, up 1, ... */
};

/* Order of a weight's last two dimensions. */
enum {
    MOE_WEIGHT_IN_OUT = 0, /* [E,in,out]: y = x W */
    MOE_WEIGHT_OUT_IN = 1  /* [E,out,in]: y = x W^T, as torch.nn.Linear */
};

/* How the pool keeps its weights. The mode changes no result: outputs and gradients have the same
 * bytes in all three. A context of a GPU has row-major only and refuses the others with
 * MOE_ERROR_NOT_SUPPORTED; kinds without weights refuse them with MOE_ERROR_INVALID_ARGUMENT. */
enum {
    MOE_STORAGE_ROW_MAJOR = 0, /* as the parameter records say; packed on the fly */
    MOE_STORAGE_PREPACKED = 1, /* as row-major, and the pool keeps a packed copy of the weights (not
                                  the biases) in memory of its own, which forward and backward read.
                                  It is renewed, at most once for all changes, by the next forward
                                  or backward after creation, a binding of a weight to other memory,
                                  moe_experts_weights_changed, init_parameters, an import or a load.
                                  Whoever writes to the weights in another way has to call
                                  moe_experts_weights_changed: until then what is computed with is
                                  the old weights */
    MOE_STORAGE_PANELS = 2     /* packed and nothing else: weights and their gradients are opaque
                                  parameters, owned (MOE_PARAMETERS_BOUND is refused with
                                  MOE_ERROR_INVALID_ARGUMENT), in an order that the library reads
                                  and writes as it lies. moe_experts_export and moe_experts_import
                                  take them out and in. See moe/parameter.h */
};

/* A function applied to an output; also used by the layer. */
enum { MOE_OUTPUT_LINEAR = 0, MOE_OUTPUT_SIGMOID = 1 };

enum { MOE_MAX_PARTS = 8 }; /* most parts of a pool */

/* What the plan's weight multiplies. */
enum {
    MOE_WEIGHT_ON_OUTPUT = 0, /* z */
    MOE_WEIGHT_ON_HIDDEN = 1, /* h: z = (weight h) W2 + b2 */
    MOE_WEIGHT_ON_INPUT = 2   /* x: z = expert(weight x); Llama 4 */
};

/* What an expert of a pool is. */
enum {
    MOE_EXPERTS_FEED_FORWARD = 0,
    MOE_EXPERTS_IDENTITY = 1, /* z = x: a zero-computation expert (arXiv 2410.07348); O = D, no
                                 parameters, d_hidden 0 */
    MOE_EXPERTS_CALLBACK = 2  /* the host's functions; d_hidden 0, no parameters here */
};

/* A call of the host's own experts: the rows of one of them. Size-versioned like all structs. */
typedef struct moe_expert_call {
    uint64_t struct_size;
    int64_t expert;     /* number in the pool that was given the callbacks, from 0 */
    int64_t rows;       /* >= 1 */
    const void *x;      /* in: [rows,D] dense, gathered */
    void *out;          /* out of a forward, in to a backward: [rows,O] dense */
    const void *dout;   /* backward: in: [rows,O] gradient by out, the weight applied */
    void *dx;           /* backward: out: [rows,D] dense, to be set; NULL: not wanted */
    void *workspace;    /* [rows, workspace_per_row] bytes, 64-byte aligned at the first row of the
                         pool: what a forward leaves there its backward finds; NULL for 0 */
    int32_t dtype;      /* MOE_DTYPE_* of all of these: the pool's, or f64 in a
                         moe_check_gradients */
    int32_t parameters; /* backward: 1 if gradients of the host's parameters are wanted: add them */
} moe_expert_call;

/* Returns 0, or anything else to fail the step with MOE_ERROR_CALLBACK. */
typedef int32_t (*moe_expert_fn)(void *user, const moe_expert_call *call);

/* The host's own experts. They are called on the thread that called the library, expert by expert
 * in ascending order, under the default floating-point environment; experts without rows are not
 * called. They must not call the library with the same pass. */
typedef struct moe_expert_callbacks {
    uint64_t struct_size;
    void *user;                /* handed to both */
    moe_expert_fn forward;     /* required */
    moe_expert_fn backward;    /* NULL: a backward is refused with MOE_ERROR_INVALID_STATE */
    int64_t workspace_per_row; /* bytes kept between forward and backward; default 0 */
} moe_expert_callbacks;

/* Writes every default (0) and the caller's size. Returns as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_expert_callbacks_init(moe_expert_callbacks *callbacks, size_t size);

/* How a pool is made. Fill with moe_experts_config_init, then change what you need. */
typedef struct moe_experts_config {
    uint64_t struct_size;
    int64_t d_model;          /* D >= 1; default 0 is refused */
    int64_t d_hidden;         /* F >= 1; default 0 is for kinds without a hidden layer */
    int64_t d_out;            /* O >= 1; default MOE_SAME = D */
    int64_t num_experts;      /* E, 1 to 2^31 - 1; default 0 is refused. MOE_NO_EXPERTS: none, the
                                 pool of a rank that has no experts */
    int32_t activation;       /* MOE_ACTIVATION_*; default ReLU */
    int32_t bias;             /* 1: b1, b2 (and b3); default 0 */
    int32_t glu_order;        /* MOE_GLU_*; default separate */
    int32_t weight_layout;    /* MOE_WEIGHT_IN_OUT or MOE_WEIGHT_OUT_IN; default [E,in,out] */
    int32_t storage;          /* MOE_STORAGE_*; default row-major */
    int32_t dtype;            /* MOE_DTYPE_* of x, y and parameters; default f32 */
    int32_t output;           /* MOE_OUTPUT_*, of each expert's z before the weight; default
                                 linear */
    int32_t weight_position;  /* MOE_WEIGHT_ON_*; default output */
    double activation_alpha;  /* MOE_ACTIVATION_SWIGLU only: act(g) = g sigmoid(alpha g); default
                                 0, as 1 */
    double activation_limit;  /* likewise: g = min(x W1 + b1, limit), u = x W3 + b3 clamped to
                                 [-limit, limit]; default 0: none */
    double activation_offset; /* likewise: h = act(g) (u + offset); default 0. gpt-oss has 1.702, 7,
                                 1 */
    int32_t parameters;       /* MOE_PARAMETERS_*; default MOE_PARAMETERS_OWNED */
    int32_t reserved;         /* 0 */
    double init_std;          /* default MOE_INIT_DEFAULT (-1): 1/sqrt(fan_in) */
    const moe_expert_callbacks *callbacks; /* of MOE_EXPERTS_CALLBACK, copied; else NULL. Of
                                              moe_experts_get_config: lives as long as the pool */
    int32_t kind;                          /* MOE_EXPERTS_*; default feed-forward */
    int32_t reserved2;                     /* 0 */
} moe_experts_config;

/* Writes every default and the caller's size. Returns as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_experts_config_init(moe_experts_config *config, size_t size);

/* Creates a pool.
 *   experts  out: the new pool; untouched on error
 *   context  holds a reference
 *   config   copied
 * Owned parameters are zero until moe_experts_init_parameters.
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT, MOE_ERROR_NOT_SUPPORTED, MOE_ERROR_OVERFLOW,
 * MOE_ERROR_OUT_OF_MEMORY or an error of the struct's size. Since 0.1. */
MOE_API moe_status moe_experts_create(moe_experts **experts, moe_context *context,
                                      const moe_experts_config *config);

/* Creates a pool of several pools: experts of different width, kind or activation behind one gate.
 * The experts of part 0 come first, then those of part 1, and so on.
 *   experts  out: the new pool; untouched on error
 *   parts    in: [count] pools of one context, dtype, D and O; a reference on each is held. None
 *            may itself be made of parts, or be there twice
 *   count    1 to MOE_MAX_PARTS
 * Parameters are the parts', named "0.w1", "1.w1", ...: binding one binds it in the part, and
 * moe_experts_init_parameters gives each part what it would get alone, so that parts of one shape
 * begin alike: give such parts seeds of their own. Touched experts and a running backward are the
 * parts' too. The config that moe_experts_get_config gives has d_hidden 0 and the sum of the parts'
 * num_experts.
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT, MOE_ERROR_OVERFLOW, MOE_ERROR_OUT_OF_MEMORY. Since
 * 0.1. */
MOE_API moe_status moe_experts_create_parts(moe_experts **experts, moe_experts *const *parts,
                                            int64_t count);

/* Gives up the program's reference. NULL is legal. Since 0.1. */
MOE_API void moe_experts_destroy(moe_experts *experts);

/* Writes the config the pool was made with. config: in: struct_size; out: the rest.
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT or an error of the struct's size. Since 0.1. */
MOE_API moe_status moe_experts_get_config(const moe_experts *experts, moe_experts_config *config);

/* y[t] = sum over the entries of token t of weight * expert(x[t]), in order of entry. A token
 * without rows gets 0.
 *   pass  made for this pool, or for a layer with it
 *   args  reads tokens, x, y, flags (MOE_FORWARD_ADD, MOE_FORWARD_NO_SAVE), plan (used with its ids
 *         and weights; its T, E and dtype must fit; copied; NULL only if E = 1: every token visits
 *         the one expert with weight 1)
 * Returns as moe_layer_forward. Since 0.1. */
MOE_API moe_status moe_experts_forward(moe_experts *experts, moe_pass *pass,
                                       const moe_forward_args *args);

/* Gradients by x, by the plan's weights and by the parameters.
 *   args  reads dy, x if it moved, flags; writes dx, entry_weight_grad [N] (out; may be NULL; 0 for
 *         entries without a row) and the parameter gradients
 * Returns as moe_layer_backward. Since 0.1. */
MOE_API moe_status moe_experts_backward(moe_experts *experts, moe_pass *pass,
                                        const moe_backward_args *args);

/* Tells the pool, or all parts of it, that weight data changed, so that the packed copy of
 * MOE_STORAGE_PREPACKED is renewed at the next use. Costs nothing in itself, and has no effect in
 * the other modes. Weights change between calls: not while a forward or backward of another thread
 * uses the pool. Returns MOE_OK or MOE_ERROR_INVALID_ARGUMENT. Since 0.1. */
MOE_API moe_status moe_experts_weights_changed(moe_experts *experts);

/* What moe_experts_export and moe_experts_import move. */
enum { MOE_PARAMETER_DATA = 0, MOE_PARAMETER_GRADIENT = 1 };

/* Copies a parameter of some experts to dense memory, whatever the storage mode, strides or
 * pointers per expert: the same bytes in every mode.
 *   index         0 <= index < moe_experts_parameter_count
 *   what          MOE_PARAMETER_*
 *   first_expert  number in the parameter's first dimension, from 0
 *   count         experts from there on; 0 is legal
 *   to            out: [count, shape[1], shape[2]] of the record's shape, contiguous:
 *                 [count,in,out], with MOE_WEIGHT_OUT_IN [count,out,in]; of a bias
 *                 [count, shape[1]]. Columns of "w13" are in glu_order, with MOE_GLU_SEPARATE W1's,
 *                 then W3's. Elements of the record's data_dtype or grad_dtype, aligned for that.
 *                 NULL only if count is 0
 * Any thread, while no other writes to the parameter. Allocates nothing.
 * Returns MOE_OK; having written nothing MOE_ERROR_INVALID_ARGUMENT, MOE_ERROR_INVALID_STATE (the
 * parameter is not bound, or has no gradient, or that of an expert is NULL),
 * MOE_ERROR_NOT_SUPPORTED (memory that is not the host's); MOE_ERROR_CALLBACK of the host's
 * parallel-for. Since 0.1. */
MOE_API moe_status moe_experts_export(const moe_experts *experts, int64_t index, int32_t what,
                                      int64_t first_expert, int64_t count, void *to);

/* The reverse: sets a parameter of some experts from dense memory.
 *   from  in: as `to` above; may not overlap the parameter
 * Imported data counts as moe_experts_weights_changed. Imported gradients do not make an expert
 * touched. As any change of weights, not while another thread is in a call on the pool.
 * Returns as moe_experts_export; and MOE_ERROR_INVALID_STATE for data that is bound: the library
 * writes to its own only. Since 0.1. */
MOE_API moe_status moe_experts_import(moe_experts *experts, int64_t index, int32_t what,
                                      int64_t first_expert, int64_t count, const void *from);

/* Which experts have received gradients since the last zero_gradients (or the last overwriting
 * backward): only those need an optimizer step.
 *   experts  the pool
 *   touched  out: [E] 1 if touched, else 0
 *   count    out: how many are 1; may be NULL
 * Returns MOE_OK or MOE_ERROR_INVALID_ARGUMENT. Since 0.1. */
MOE_API moe_status moe_experts_touched(const moe_experts *experts, uint8_t *touched,
                                       int64_t *count);

MOE_END_DECLS

#endif
