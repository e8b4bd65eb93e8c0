/* moe/pass.h - a step: the arguments of forward and backward, and what is known afterwards.
 *
 * A pass is one micro-batch in flight. It holds the plan, what the backward needs and the
 * workspace, so that a layer has no state of its own and several passes may be in flight over one
 * layer. It is reused step after step: after the first step at a size, or after moe_pass_reserve, a
 * step allocates nothing (moe_pass_trim gives memory back). A pass belongs to one thread at a time.
 *
 * The pass remembers the addresses of x and gate_x, not their contents: they must stay valid and
 * unchanged until the backward, or be handed in again there. All else is copied. */
#ifndef MOE_PASS_H
#define MOE_PASS_H

#include <moe/status.h>
#include <moe/types.h>

MOE_BEGIN_DECLS

/* The losses, as indices of the arrays below. */
enum {
    MOE_LOSS_IMPORTANCE = 0,
    MOE_LOSS_LOAD = 1,
    MOE_LOSS_SWITCH = 2,
    MOE_LOSS_GSHARD = 3,
    MOE_LOSS_Z = 4,
    MOE_LOSS_SEQUENCE = 5,
    MOE_LOSS_THRESHOLD = 6, /* of MOE_GATE_BALANCED, with MOE_FORWARD_TRAIN */
    MOE_LOSS_SLOTS = 16     /* length of every array of losses, for good; unused slots are 0 */
};

/* The statistics, as indices of the arrays below. */
enum {
    MOE_STAT_TOKENS = 0,        /* unmasked tokens */
    MOE_STAT_ENTRIES = 1,       /* (token, expert) pairs routed, before dropping */
    MOE_STAT_ROWS = 2,          /* pairs kept */
    MOE_STAT_DROPPED = 3,       /* pairs dropped for capacity */
    MOE_STAT_TOUCHED = 4,       /* experts with at least one row */
    MOE_STAT_CV_IMPORTANCE = 5, /* coefficient of variation (cv_ddof of the gate) of importance */
    MOE_STAT_CV_LOAD = 6,       /* of the load: the smooth load where there is one, else the
                                   counts */
    MOE_STAT_MAX_OVER_MEAN = 7, /* largest count over mean count, before dropping; 0 without
                                   entries */
    MOE_STAT_LOAD_ENTROPY = 8,  /* entropy in nats of counts / sum(counts); ln E is perfect
                                   balance */
    MOE_STAT_GATE_ENTROPY = 9,  /* mean over tokens of the entropy in nats of a token's weights /
                                   their sum */
    MOE_STAT_SLOTS = 16         /* length of every array of statistics, for good; unused slots
                                   are 0 */
};

/* Flags of a forward. */
enum {
    MOE_FORWARD_TRAIN = 1,     /* the gate draws its noise */
    MOE_FORWARD_NO_SAVE = 2,   /* inference: keep nothing for a backward, use less memory */
    MOE_FORWARD_PLAN_ONLY = 4, /* activation checkpointing: keep the routing, not the
                                  activations. Before the backward, call forward again with
                                  MOE_FORWARD_RECOMPUTE */
    MOE_FORWARD_RECOMPUTE = 8, /* rebuild on this pass what MOE_FORWARD_PLAN_ONLY left out, from
                                  the same arguments: the selection is the kept one, losses and
                                  statistics stay what they were and are not written again, y may
                                  be NULL */
    MOE_FORWARD_ADD = 16       /* y = y + result instead of y = result */
};

/* What a plan that is handed in is used for. */
enum {
    MOE_PLAN_IDS_AND_WEIGHTS = 0, /* all of it: the gate does not run, losses are 0, gradients by
                                     the weights go to entry_weight_grad */
    MOE_PLAN_IDS = 1 /* who goes where, and what was dropped; the gate computes weights and
                        losses anew for these ids, differentiably */
};

/* Flags of a backward. */
enum {
    MOE_BACKWARD_OVERWRITE = 1,       /* parameter gradients are set (0 for untouched experts);
                                         default: added to */
    MOE_BACKWARD_SKIP_DX = 2,         /* dx, d_gate_x and d_logits_out are not computed */
    MOE_BACKWARD_SKIP_PARAMETERS = 4, /* parameter gradients are not computed */
    MOE_BACKWARD_ADD_DX = 8           /* dx and d_gate_x are added to; default: set */
};

/* Arguments of a forward. Fill with moe_forward_args_init, then set what you use. Which fields a
 * call reads is said at the call; others must have their default. */
typedef struct moe_forward_args {
    uint64_t struct_size;
    uint64_t flags;      /* MOE_FORWARD_*; default 0 */
    int64_t tokens;      /* T >= 0; default 0, which is legal */
    int64_t token_first; /* global number of row 0, for the noise; default 0 */
    int64_t step;        /* number of the step, for the noise; default 0. With noise, step and
                            token_first + T must be below 2^32 */
    void *y;             /* out: [T,O] */
    int64_t y_stride;    /* elements between rows; 0 = O */
    const void *x;       /* in: [T,D]; must not overlap y */
    int64_t x_stride;    /* 0 = D */
    const void *gate_x;  /* in: [T,D of the gate], what the gate sees; NULL = x */
    int64_t gate_x_stride;
    const void *logits_in;      /* in: [T,E] clean logits of the host instead of gate_x Wg +
                                   bias, or NULL */
    int64_t logits_stride;      /* 0 = E */
    const void *noise;          /* in: [T,E] standard normal numbers of the host, or NULL: Philox */
    int64_t noise_stride;       /* 0 = E */
    const uint8_t *token_mask;  /* in: [T] 0: padding: no rows, no capacity, no load, in no loss,
                                   y = 0; NULL: all are tokens */
    const int64_t *group_begin; /* in: [groups+1] first token of each group, ascending from 0 to
                                   T, or NULL: one group */
    int64_t groups;             /* 0 = one group, with or without group_begin */
    const int64_t *token_key;   /* in: [T] what MOE_GATE_HASH draws the experts from: a word, a
                                   task; required there without a plan, NULL elsewhere */
    const moe_plan *plan;       /* in: a routing to replay, copied, the pass's own included (but
                                   for its primary one); or NULL: the gate routes. Without a
                                   gate NULL is for a pool of one expert: every token visits
                                   it with weight 1 */
    int32_t plan_use;           /* MOE_PLAN_*; default MOE_PLAN_IDS_AND_WEIGHTS */
    int32_t reserved;           /* 0 */
    int64_t top_k;              /* K of this call; default MOE_FROM_CONFIG */
    int64_t capacity;           /* rows of an expert per group in this call; default
                                   MOE_FROM_CONFIG */
    const double *loss_weights; /* in: [MOE_LOSS_SLOTS] finite weights of this call instead of
                                   the config's, or NULL */
    void *losses_out;           /* out: [MOE_LOSS_SLOTS] weighted losses, real (the layer's dtype,
                                   or f32 where that has 16 bits), backend memory; or NULL */
    void *stats_out;            /* out: [MOE_STAT_SLOTS] the same for the statistics; or NULL */
    void *stream;               /* NULL on CPU */
    const void *noise_primary;  /* in: [T,expert_groups] numbers of the host for the primary gate of
                                   MOE_GATE_HIERARCHICAL, together with noise; or NULL */
    int64_t noise_primary_stride; /* 0 = expert_groups */
} moe_forward_args;

/* Arguments of a backward. Fill with moe_backward_args_init, then set what you use. dx, dy, x and
 * their like are of the layer's dtype; d_logits_out, entry_weight_grad and loss_grad are real: that
 * dtype, or f32 where it has 16 bits. */
typedef struct moe_backward_args {
    uint64_t struct_size;
    uint64_t flags;    /* MOE_BACKWARD_*; default 0 */
    void *dx;          /* out: [T,D], or NULL = not wanted. Holds the gate's share as well when
                          the gate saw x and d_gate_x is NULL */
    int64_t dx_stride; /* 0 = D */
    const void *dy;    /* in: [T,O]; must not overlap dx */
    int64_t dy_stride; /* 0 = O */
    void *d_gate_x;    /* out: [T,D of the gate] the gate's share by itself, or NULL */
    int64_t d_gate_x_stride;
    void *d_logits_out;      /* out: [T,E] gradient by the clean logits, set, never added; or
                                NULL */
    int64_t d_logits_stride; /* 0 = E */
    void *entry_weight_grad; /* [N] gradient by the plan's weights, in order of entry, or NULL:
                                out of a layer's or pool's backward, in to a gate's */
    const void *loss_grad;   /* in: [MOE_LOSS_SLOTS] a factor for each loss, real, backend memory;
                                NULL = 1. 0 switches a loss off */
    const void *x;           /* in: x of the forward if its memory moved; NULL = where it was */
    const void *gate_x;      /* in: likewise; NULL = where it was, or x if gate_x was NULL then */
    void *stream;            /* NULL on CPU */
    int64_t x_stride;        /* of x, if it is given; 0 = as in the forward */
    int64_t gate_x_stride;   /* of gate_x, likewise */
} moe_backward_args;

/* Write every default and the caller's size. Return as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_forward_args_init(moe_forward_args *args, size_t size);
/* The same for a backward. Since 0.1. */
MOE_API moe_status moe_backward_args_init(moe_backward_args *args, size_t size);

/* How a pass is made. */
typedef struct moe_pass_config {
    uint64_t struct_size;
    void *workspace;         /* backend memory for everything the pass keeps, aligned to 64
                                bytes, the host's; default NULL: allocated by the context's
                                allocator, and grown as needed */
    int64_t workspace_bytes; /* its size; a forward that needs more gets
                                MOE_ERROR_BUFFER_TOO_SMALL and the message says how much.
                                moe_layer_memory tells before */
} moe_pass_config;

/* Writes every default and the caller's size. Returns as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_pass_config_init(moe_pass_config *config, size_t size);

/* Creates a pass for a layer, for a gate alone or for a pool alone.
 *   pass    out: the new pass; untouched on error
 *   layer   gate, experts: what it serves; holds a reference
 *   config  NULL for the defaults
 * Allocates little; memory for a batch comes with the first forward or moe_pass_reserve.
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT, MOE_ERROR_OUT_OF_MEMORY or an error of the struct's
 * size. Since 0.1. */
MOE_API moe_status moe_pass_create(moe_pass **pass, moe_layer *layer,
                                   const moe_pass_config *config);
/* As above, for a gate alone. Since 0.1. */
MOE_API moe_status moe_pass_create_for_gate(moe_pass **pass, moe_gate *gate,
                                            const moe_pass_config *config);
/* As above, for a pool alone. Since 0.1. */
MOE_API moe_status moe_pass_create_for_experts(moe_pass **pass, moe_experts *experts,
                                               const moe_pass_config *config);

/* Gives up the pass and its memory. NULL is legal. Since 0.1. */
MOE_API void moe_pass_destroy(moe_pass *pass);

/* Allocates for batches of up to `max_tokens` tokens in up to `max_groups` groups with `max_top_k`
 * experts a token (MOE_FROM_CONFIG: the gate's; a pass without a gate needs the K of the plans, or
 * 1 where there are none), so that no forward or backward up to that size allocates; on several
 * ranks without max_received, with rail_comm, with MOE_RECEIVED_DROP_SCORE and for
 * MOE_SECONDARY_WITH_GROUP, memory for other ranks' rows is allocated when they come. Memory
 * shrinks by moe_pass_trim only. What the pass held is lost: a backward needs a new forward.
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT, MOE_ERROR_OVERFLOW, MOE_ERROR_OUT_OF_MEMORY or
 * MOE_ERROR_BUFFER_TOO_SMALL; on error the pass is as it was. Since 0.1. */
MOE_API moe_status moe_pass_reserve(moe_pass *pass, int64_t max_tokens, int64_t max_groups,
                                    int64_t max_top_k);

/* Gives memory back that the pass does not need for what it holds: after a forward with
 * MOE_FORWARD_PLAN_ONLY all but the routing, so that a checkpointed layer waits for its backward in
 * little memory; of a pass that waits for no backward (MOE_FORWARD_NO_SAVE, a failed call) all, and
 * the pass is as new. A pass that holds activations, or works in the host's workspace, is left as
 * it is. Ends the plan and the tensors that the pass has shown; moe_pass_plan shows a kept plan
 * again, losses and statistics of a kept plan stay. The next forward allocates anew.
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT, or MOE_ERROR_OUT_OF_MEMORY with the pass as it was:
 * the routing moves to memory of its own. Since 0.1. */
MOE_API moe_status moe_pass_trim(moe_pass *pass);

/* Returns the bytes of backend memory the pass holds (or the part of the host's workspace it has
 * used); 0 for NULL. Since 0.1. */
MOE_API int64_t moe_pass_bytes(const moe_pass *pass);

/* The routing of the last forward.
 *   plan  out: belongs to the pass; valid until its next forward, reserve, trim or destroy. May be
 *         replayed in other passes meanwhile, or kept with moe_plan_copy or moe_plan_save
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT, or MOE_ERROR_INVALID_STATE before a forward. Since
 * 0.1. */
MOE_API moe_status moe_pass_plan(const moe_pass *pass, const moe_plan **plan);

/* The primary routing of the last forward of a MOE_GATE_HIERARCHICAL: expert_groups in place of
 * experts, top_groups entries a token, nothing dropped. Its rows, sorted by group, are the rows of
 * the [rows, E / expert_groups] tensors of moe_pass_tensor.
 *   plan  out: as of moe_pass_plan
 * Returns as moe_pass_plan; MOE_ERROR_INVALID_STATE also for other kinds, after a replay and after
 * moe_pass_trim. Since 0.1. */
MOE_API moe_status moe_pass_primary_plan(const moe_pass *pass, const moe_plan **plan);

/* The losses of the last forward. */
typedef struct moe_losses {
    uint64_t struct_size;
    double total;                 /* sum of value[] */
    double value[MOE_LOSS_SLOTS]; /* each multiplied by its weight */
} moe_losses;

/* The statistics of the last forward. */
typedef struct moe_stats {
    uint64_t struct_size;
    double value[MOE_STAT_SLOTS]; /* MOE_STAT_* */
} moe_stats;

/* Write every default (0) and the caller's size. Return as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_losses_init(moe_losses *losses, size_t size);
/* The same for statistics. Since 0.1. */
MOE_API moe_status moe_stats_init(moe_stats *stats, size_t size);

/* Copy the losses, or the statistics, of the last forward; on a GPU they wait for its stream.
 *   losses, stats  in: struct_size; out: the rest
 * Return MOE_OK, MOE_ERROR_INVALID_ARGUMENT, MOE_ERROR_INVALID_STATE before a forward,
 * MOE_ERROR_BUFFER_TOO_SMALL if an expert had more rows than padded_rows on a GPU, there also what
 * another rank failed with where nobody waited for it, an error of the device or of the struct's
 * size. Since 0.1. */
MOE_API moe_status moe_pass_losses(const moe_pass *pass, moe_losses *losses);
/* As above, for the statistics. Since 0.1. */
MOE_API moe_status moe_pass_stats(const moe_pass *pass, moe_stats *stats);

/* Where the time of a call goes, as indices of the arrays below. */
enum {
    MOE_TIME_GATE = 0,     /* routing, losses, statistics; their gradients */
    MOE_TIME_PACK = 1,     /* rows into and out of what travels */
    MOE_TIME_EXCHANGE = 2, /* waiting for other ranks, counts and rows */
    MOE_TIME_EXPERTS = 3,  /* routed, shared and residual experts */
    MOE_TIME_COMBINE = 4,  /* y, or dx, from the rows */
    MOE_TIME_SLOTS = 8     /* length of both arrays, for good; unused slots are 0 */
};

/* What the last forward, and the last backward after it, took. */
typedef struct moe_pass_report {
    uint64_t struct_size;
    double forward_seconds[MOE_TIME_SLOTS];  /* wall time, by a monotonic clock */
    double backward_seconds[MOE_TIME_SLOTS]; /* 0 without a backward */
    int64_t rows_sent;              /* of the forward, to experts on other ranks; 0 on one rank, and
                                        where the host does not wait to know them, as the next */
    int64_t rows_received;          /* from other ranks for this rank's experts */
    int64_t rounds;                 /* exchanges of rows each way; 0 on one rank */
    int64_t forward_bytes_sent;     /* to other ranks, counts, padding and results included */
    int64_t backward_bytes_sent;    /* likewise */
    int64_t forward_bytes_received; /* from other ranks */
    int64_t backward_bytes_received; /* likewise */
    int64_t rows_to_nodes;           /* with rail_comm of the layer: of the forward, rows of tokens
                                       to other nodes, each node once; else 0, as the next */
    int64_t forward_bytes_to_nodes;  /* of forward_bytes_sent those of these rows and what goes
                                        with them */
    int64_t backward_bytes_to_nodes; /* likewise */
} moe_pass_report;

/* Writes every default (0) and the caller's size. Returns as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_pass_report_init(moe_pass_report *report, size_t size);

/* Copies the report of the last calls.
 *   report  in: struct_size; out: the rest
 * Returns as moe_pass_stats. Since 0.1. */
MOE_API moe_status moe_pass_get_report(const moe_pass *pass, moe_pass_report *report);

/* What else a pass can show of its last forward. [shape] dtype; "real" is the layer's dtype, or f32
 * where that has 16 bits. */
enum {
    MOE_TENSOR_LOGITS = 0,       /* [T,E] real: clean logits, before noise */
    MOE_TENSOR_NOISY_LOGITS = 1, /* [T,E] real: H; the clean logits where there is no noise */
    MOE_TENSOR_NOISE_STD = 2,    /* [T,E] real: sd; MOE_GATE_NOISY_TOP_K with MOE_FORWARD_TRAIN
                                    only */
    MOE_TENSOR_IMPORTANCE = 3,   /* [E] f64: sum over tokens of the weights, before dropping */
    MOE_TENSOR_LOAD = 4,         /* [E] f64: smooth load ([1] eq. 10), or for kinds without one
                                    the counts */
    MOE_TENSOR_COUNTS = 5,       /* [E] i64: entries per expert, before dropping */
    MOE_TENSOR_ROWS = 6,         /* [E] i64: rows per expert, after dropping */
    MOE_TENSOR_PRIMARY_LOAD = 7  /* [expert_groups] f64: the primary gate's load;
                                    MOE_GATE_HIERARCHICAL only */
    /* MOE_TENSOR_IMPORTANCE and on are over all ranks with MOE_BATCH_GLOBAL. */
};

/* A tensor of a pass, read-only. */
typedef struct moe_tensor_view {
    uint64_t struct_size;
    const void *data;
    int64_t shape[MOE_MAX_DIMS]; /* dims beyond `dims` are 1 */
    int32_t dims;
    int32_t dtype; /* MOE_DTYPE_* */
} moe_tensor_view;

/* Writes every default (0) and the caller's size. Returns as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_tensor_view_init(moe_tensor_view *view, size_t size);

/* Shows a tensor of the last forward.
 *   view  in: struct_size; out: the rest. The memory belongs to the pass and is valid until its
 *         next forward, reserve, trim or destroy
 *   what  MOE_TENSOR_*
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT, or MOE_ERROR_INVALID_STATE if the last forward did
 * not make it or it was trimmed: before a forward, after one with MOE_FORWARD_NO_SAVE or
 * MOE_FORWARD_PLAN_ONLY (for the [T,E] tensors), or where a plan with weights was replayed.
 * Since 0.1. */
MOE_API moe_status moe_pass_tensor(const moe_pass *pass, int32_t what, moe_tensor_view *view);

MOE_END_DECLS

#endif
