/* moe/parameter.h - records of parameters, and binding them to the host's memory.
 *
 * Gate, experts and layer list their parameters with the same three calls (count, find, record) and
 * bind them with the fourth. The optimizer is the host's: it walks the records.
 *
 * A parameter lives in memory of its object (MOE_PARAMETERS_OWNED) or of the host. It may be bound
 * again at any time at which no pass is between its forward and its backward with the old contents,
 * as often as every step, without any allocation. The library never writes to bound data (a
 * read-only mapping is legal), writes gradients only in backward, zero_gradients and import calls,
 * and touches either only inside a call.
 *
 * Weights of a pool with MOE_STORAGE_PANELS are opaque. `shape` is the logical one; data and
 * gradient are element_count elements each, in one and the same order, which is the library's own,
 * with zeros between what belongs to the shape: an optimizer that treats each element alike, and
 * keeps 0 where data, gradient and its own state are 0, walks all of them. The zeros of the
 * gradient stay; those of the data must. A gated pool has one such parameter for W1 and W3, "w13",
 * whatever its glu_order; biases are as ever. */
#ifndef MOE_PARAMETER_H
#define MOE_PARAMETER_H

#include <moe/status.h>
#include <moe/types.h>

MOE_BEGIN_DECLS

/* Where the parameters of an object live at its creation. */
enum {
    MOE_PARAMETERS_OWNED = 0,         /* data and gradients in memory of the object, all zero at
                                         first */
    MOE_PARAMETERS_OWNED_NO_GRAD = 1, /* data only: for inference; gradients may still be bound */
    MOE_PARAMETERS_BOUND = 2          /* none: each must be bound before the first forward */
};

enum {
    MOE_KIND_WEIGHT = 0,   /* trained by gradient descent */
    MOE_KIND_BUFFER = 1,   /* not trained by gradient: a selection bias */
    MOE_KIND_THRESHOLD = 2 /* trained by gradient of the threshold loss only */
};

/* How a parameter is spread over the ranks of an expert-parallel group. */
enum {
    MOE_SHARD_REPLICATED = 0,  /* the same on every rank; its gradients must be summed over ranks */
    MOE_SHARD_EXPERT = 1,      /* each rank has some of the experts, or of the groups' gates */
    MOE_SHARD_EXPERT_WIDTH = 2 /* each rank has a slice of every expert's hidden width */
};

/* One parameter as the library sees it. Filled by moe_*_parameter. */
typedef struct moe_parameter_record {
    uint64_t struct_size;
    const char *name; /* "experts.w1"; lives as long as the object that was asked */
    void *data;       /* first element, backend memory; NULL if not bound yet, or if each expert
                         has its own pointer (data_per_expert) */
    void *grad;       /* the same for the gradient; NULL also if the gradient is not wanted */
    void *const *data_per_expert; /* [E] if bound so, else NULL; the library's copy of the list */
    void *const *grad_per_expert; /* [E] if bound so, else NULL; entries may be NULL */
    int64_t element_count;        /* elements of the local data: product of shape; more if opaque */
    int64_t shape[MOE_MAX_DIMS];  /* local; dims beyond `dims` are 1 */
    int64_t global_shape[MOE_MAX_DIMS];  /* over all ranks */
    int64_t global_offset[MOE_MAX_DIMS]; /* of the local part in the global one; [0] is -1 if this
                                            rank's experts are none in a row: see
                                            moe_layer_expert_number */
    int64_t data_stride[MOE_MAX_DIMS];   /* in elements; 0 beyond `dims`; all 0 if opaque */
    int64_t grad_stride[MOE_MAX_DIMS];
    int32_t dims;       /* used dimensions, 1 to MOE_MAX_DIMS */
    int32_t kind;       /* MOE_KIND_* */
    int32_t data_dtype; /* MOE_DTYPE_* */
    int32_t grad_dtype; /* of an object's own memory f32 where its dtype has 16 bits */
    int32_t sharding;   /* MOE_SHARD_* */
    int32_t trainable;  /* 1 if a gradient is computed when grad is given */
    int32_t opaque;     /* 1: element order is the library's own (MOE_STORAGE_PANELS): update
                          element by element, do not index */
    int32_t owned;      /* 1: memory of the library, 0: bound */
} moe_parameter_record;

/* Memory of the host for one parameter. A gradient that is NULL is not wanted and its work is
 * saved. */
typedef struct moe_binding {
    uint64_t struct_size;
    const void *data; /* element 0 of the parameter; NULL only if data_per_expert is given */
    void *grad;       /* element 0 of its gradient, or NULL; may not overlap data */
    const void *const *data_per_expert; /* [E] one pointer per expert to its own part (the
                                           parameter without its leading E), instead of `data`;
                                           copied. Experts' parameters only */
    void *const *grad_per_expert;       /* [E], instead of `grad`; entries may be NULL = not
                                           wanted; copied */
    int64_t data_stride[MOE_MAX_DIMS];  /* in elements, one per dimension of the record's shape;
                                           all 0 = contiguous. With data_per_expert the first
                                           entry is ignored. A stride may be negative; elements
                                           may not overlap */
    int64_t grad_stride[MOE_MAX_DIMS];
    int32_t data_dtype; /* default MOE_DTYPE_F32; must be the object's dtype; of a gate whose dtype
                           has 16 bits, that or f32 */
    int32_t grad_dtype; /* default MOE_DTYPE_F32; must be the object's dtype, or f32 where that has
                           16 bits. One of 16 bits is widened, added to in f32 and rounded */
} moe_binding;

/* Write every default (all zero) and the caller's size. Returns as moe_context_config_init.
 * Since 0.1. */
MOE_API moe_status moe_parameter_record_init(moe_parameter_record *record, size_t size);
/* As above, for a binding. Since 0.1. */
MOE_API moe_status moe_binding_init(moe_binding *binding, size_t size);

/* The number of parameters; 0 for NULL. Since 0.1. */
MOE_API int64_t moe_gate_parameter_count(const moe_gate *gate);
/* As above, for a pool. Since 0.1. */
MOE_API int64_t moe_experts_parameter_count(const moe_experts *experts);
/* As above, for a layer. Since 0.1. */
MOE_API int64_t moe_layer_parameter_count(const moe_layer *layer);

/* The index of a parameter by its name, or -1 if there is none of that name or an argument is NULL.
 * A gate has "weight" [D,E], "bias" [E], "noise_weight" [D,E]; experts have "w1" [E,D,F], "b1"
 * [E,F], "w3" and "b3" of the same shapes for gated activations (with a fused GLU order "w13"
 * [E,D,2F] and "b13" [E,2F] in place of the four, with MOE_STORAGE_PANELS "w13" in any case), "w2"
 * [E,F,O], "b2" [E,O]; with MOE_WEIGHT_OUT_IN the last two dimensions of weights are exchanged. A
 * layer puts "gate.", "experts.", "shared." and "residual." before, and has "shared_gate" [D],
 * "residual_mix" [D,2] and "residual_mix_bias" [2] of its own. Gates also have "selection_bias" [E]
 * (a buffer), "threshold" [E] (of MOE_GATE_BALANCED) and, if hierarchical with A groups of B
 * experts, "primary_weight" [D,A], "primary_noise_weight" [D,A], "weight" [A,D,B] and
 * "noise_weight" [A,D,B]. A pool of parts has "0.w1", "1.w1", ..., in a layer "experts.0.w1". Only
 * what the config asks for is there. Since 0.1. */
MOE_API int64_t moe_gate_parameter_find(const moe_gate *gate, const char *name);
/* As above, for a pool. Since 0.1. */
MOE_API int64_t moe_experts_parameter_find(const moe_experts *experts, const char *name);
/* As above, for a layer. Since 0.1. */
MOE_API int64_t moe_layer_parameter_find(const moe_layer *layer, const char *name);

/* Describes parameter `index`.
 *   record  in: struct_size; out: the rest
 *   index   0 <= index < count
 * Returns MOE_OK or MOE_ERROR_INVALID_ARGUMENT, or an error of the struct's size. Since 0.1. */
MOE_API moe_status moe_gate_parameter(const moe_gate *gate, int64_t index,
                                      moe_parameter_record *record);
/* As above, for a pool. Since 0.1. */
MOE_API moe_status moe_experts_parameter(const moe_experts *experts, int64_t index,
                                         moe_parameter_record *record);
/* As above, for a layer. Since 0.1. */
MOE_API moe_status moe_layer_parameter(const moe_layer *layer, int64_t index,
                                       moe_parameter_record *record);

/* Binds parameter `index` to memory of the host, or back to the object's own.
 *   binding  copied, lists of pointers included; NULL: back to the object's own memory, whose
 *            contents are what they were (MOE_ERROR_INVALID_STATE if the object owns none)
 * The memory stays the host's and must live until it is bound anew, or until the last call that
 * uses the object has returned. Not while another thread is in a call on the object. A weight that
 * is bound to the memory, strides and dtype it has already, as to bind another gradient, is not
 * taken for changed: see MOE_STORAGE_PREPACKED. Binding through a layer binds the gate's or pool's
 * parameter, in every layer that shares it. No allocation, except that the first use of per-expert
 * pointers for a parameter allocates their list.
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT, MOE_ERROR_NOT_SUPPORTED for a dtype other than those
 * or memory for opaque storage, MOE_ERROR_OUT_OF_MEMORY, MOE_ERROR_INVALID_STATE. Since
 * 0.1. */
MOE_API moe_status moe_gate_bind(moe_gate *gate, int64_t index, const moe_binding *binding);
/* As above, for a pool. Since 0.1. */
MOE_API moe_status moe_experts_bind(moe_experts *experts, int64_t index,
                                    const moe_binding *binding);
/* As above, for a layer. Since 0.1. */
MOE_API moe_status moe_layer_bind(moe_layer *layer, int64_t index, const moe_binding *binding);

/* Sets every gradient that is owned or bound to zero, and forgets which experts were touched.
 *   stream  must be NULL on CPU
 * Returns MOE_OK or MOE_ERROR_INVALID_ARGUMENT. Since 0.1. */
MOE_API moe_status moe_gate_zero_gradients(moe_gate *gate, void *stream);
/* As above, for a pool. Since 0.1. */
MOE_API moe_status moe_experts_zero_gradients(moe_experts *experts, void *stream);
/* As above, for a layer. Since 0.1. */
MOE_API moe_status moe_layer_zero_gradients(moe_layer *layer, void *stream);

/* As the two above, but of a pool's gradients only those of the experts that were touched since the
 * last zeroing: as good if none but the library's backward writes to the others, and its time does
 * not grow with the number of experts. Returns as they do. Since 0.1. */
MOE_API moe_status moe_experts_zero_touched_gradients(moe_experts *experts, void *stream);
/* As above, for a layer: its gate and its own parameters whole. Since 0.1. */
MOE_API moe_status moe_layer_zero_touched_gradients(moe_layer *layer, void *stream);

/* Gives every owned parameter its first value; bound data is never written and is left out. The
 * same seed gives the same number for a logical element whatever the storage mode, layout, GLU
 * order, dtype (rounded from f32) or number of ranks: normal numbers of Philox 4x32-10 with key =
 * seed and counter = (stream; expert; row; column/4), see docs/numerics.md.
 * Standard deviation: config's init_std, or if that is MOE_INIT_DEFAULT 1/sqrt(fan_in) for experts,
 * 0 for a noisy or hierarchical gate (Shazeer et al. 2017, appendix A), 0.02 for other gates and
 * for a layer's residual_mix. Biases, thresholds and a layer's shared_gate are 0.
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT. Since 0.1. */
MOE_API moe_status moe_gate_init_parameters(moe_gate *gate, uint64_t seed);
/* As above, for a pool. Since 0.1. */
MOE_API moe_status moe_experts_init_parameters(moe_experts *experts, uint64_t seed);
/* As above, for a layer. Since 0.1. */
MOE_API moe_status moe_layer_init_parameters(moe_layer *layer, uint64_t seed);

MOE_END_DECLS

#endif
