/* moe/types.h - handles, element types and the words used in every header of libmoe.
 *
 * Dimension letters, the same everywhere: T tokens, K experts per token, E experts, D model width,
 * F hidden width of an expert, O output width (D unless stated), N entries of a plan, R dispatched
 * rows, G token groups. The gradient of `x` is `dx`.
 *
 * Arrays are row-major, the last index fastest. A stride counts elements, not bytes; a row stride
 * of 0 means "the row's width". Sizes and offsets are int64_t. Integer constants are enumerators;
 * the fields that hold them are int32_t, never an enum type, so that the layout of a struct does
 * not depend on a compiler. Pointers to elements are `void *`; the element type is the dtype of the
 * object they are given to. "Backend memory" is memory the context computes in: host memory on CPU.
 *
 * Structs that may grow begin with `struct_size`, the caller's sizeof, written by an exported
 * moe_*_init together with every default. A field that an older, shorter struct lacks takes its
 * default. A longer struct from a newer caller is accepted if all that this library does not know
 * is zero, and refused with MOE_ERROR_STRUCT_TOO_NEW otherwise.
 *
 * Threads: distinct objects may be used from distinct threads; what else is allowed is said at each
 * call. Functions with no such remark may be called from any thread on objects no other thread is
 * changing. */
#ifndef MOE_TYPES_H
#define MOE_TYPES_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#ifdef MOE_BUILD
#define MOE_API __declspec(dllexport)
#else
#define MOE_API
#endif
#elif defined(__GNUC__)
#define MOE_API __attribute__((visibility("default")))
#else
#define MOE_API
#endif

#ifdef __cplusplus
#define MOE_BEGIN_DECLS extern "C" {
#define MOE_END_DECLS }
#else
#define MOE_BEGIN_DECLS
#define MOE_END_DECLS
#endif

MOE_BEGIN_DECLS

/* Opaque objects. Each is made by its create call and given up by its destroy call. An object holds
 * a reference on every object it was created from, so a program may destroy its handles in any
 * order. */
typedef struct moe_context moe_context; /* where work runs; moe/context.h */
typedef struct moe_gate moe_gate;       /* the trainable gating network; moe/gate.h */
typedef struct moe_experts moe_experts; /* a pool of feed-forward experts; moe/experts.h */
typedef struct moe_comm moe_comm;       /* an expert-parallel group; moe/comm.h */
typedef struct moe_world moe_world;     /* ranks as threads of one process; moe/comm.h */
typedef struct moe_layer moe_layer;     /* gate, experts and what surrounds them; moe/layer.h */
typedef struct moe_plan moe_plan;       /* one routing: which token goes where; moe/plan.h */
typedef struct moe_pass moe_pass;       /* one micro-batch in flight; moe/pass.h */

/* Result of every call that can fail: MOE_OK (0) or a negative number of moe/status.h. */
typedef int32_t moe_status;

/* Element types. The dtype of gate, pool and layer is what numbers are stored as: x, gate_x, y,
 * their gradients, the experts' rows that a pass keeps, and parameters. They are also computed
 * with, but for MOE_DTYPE_BF16 and MOE_DTYPE_F16: then elements are widened when read, everything
 * is computed and summed in f32, and what is stored is rounded once, to nearest even; on CUDA what
 * an expert with biases adds them to is rounded before the addition as well. Of such a layer "real"
 * is f32: the dtype of logits, noise, the weights of a plan and their gradients, losses,
 * statistics, and, of an object's own memory, of gradients of parameters, selection_bias and
 * threshold. A layer's plan has dtype real. Not on several ranks, MOE_ERROR_NOT_SUPPORTED. */
enum {
    MOE_DTYPE_F32 = 0,  /* IEEE binary32 */
    MOE_DTYPE_F64 = 1,  /* IEEE binary64 */
    MOE_DTYPE_BF16 = 2, /* upper half of binary32 */
    MOE_DTYPE_F16 = 3,  /* IEEE binary16 */
    MOE_DTYPE_I32 = 16, /* int32_t, for expert ids only */
    MOE_DTYPE_I64 = 17  /* int64_t, for expert ids only */
};

/* Values with a meaning of their own in several structs. */
enum {
    MOE_FROM_CONFIG = -1, /* in per-call structs: what the object's config says */
    MOE_SAME = -1,        /* in configs: the same as the dimension it normally equals */
    MOE_NO_EXPERTS = -2,  /* num_experts of a pool: a rank without experts */
    MOE_MAX_DIMS = 4      /* most dimensions of a parameter */
};

MOE_END_DECLS

#endif
