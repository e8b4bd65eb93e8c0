/* moe/gate.h - the gating network: from a token to its experts and their weights, and the losses.
 *
 *     logits = u(gate_x) Wg (+ bias)                             [T,E], u the input jitter
 *     H      = logits + noise * sd,  sd = (softplus(u(gate_x) Wnoise) + noise_epsilon) * train
 *     ids    = by `kind`; ties go to the lower index, NaN ranks below all numbers
 *     weight = by `score` and `order`, then times route_scale
 *     rows   = by capacity and drop_policy
 *
 * Each option is one step of that path and works with all kinds unless a clash is named.
 *
 * Sources: [1] Shazeer et al. 2017, arXiv 1701.06538; [2] GShard 2006.16668; [3] Switch 2101.03961;
 * [4] ST-MoE 2202.08906; [5] Expert Choice 2202.09368; [6] DeepSeek-V3 2412.19437; [7] 2408.15664
 * (balancing without a loss); [8] V-MoE 2106.05974; [9] DeepSpeed-MoE 2201.05596; [10] Hash Layers
 * 2106.04426; [11] BASE 2103.16716. docs/numerics.md has every formula. */
#ifndef MOE_GATE_H
#define MOE_GATE_H

#include <moe/pass.h>
#include <moe/status.h>
#include <moe/types.h>

MOE_BEGIN_DECLS

/* How experts are chosen. */
enum {
    MOE_GATE_TOP_K = 0,         /* the K largest logits, or selection scores */
    MOE_GATE_NOISY_TOP_K = 1,   /* the K largest of H, softmax over those K; [1] eq. 3-5 */
    MOE_GATE_SOFTMAX_DENSE = 2, /* every expert for every token, softmax of all logits; [1] eq. 2 */
    MOE_GATE_BALANCED = 3,      /* strictly balanced, [1] appendix F: in training each expert takes
                                   its `capacity` best tokens of each group, else a token goes to
                                   the experts whose softmax is above their threshold; the weights
                                   of a token are divided by their sum. Entries per token vary */
    MOE_GATE_HIERARCHICAL = 4,  /* [1] appendix B: a noisy gate chooses top_groups of expert_groups
                                   groups, a noisy gate of each chosen group top_k of its E /
                                   expert_groups experts; weights are products */
    MOE_GATE_EXPERT_CHOICE = 5, /* each expert takes its `capacity` best tokens of each group; [5].
                                   Entries per token vary */
    MOE_GATE_HASH = 6,          /* K distinct experts drawn by token_key; [10] */
    MOE_GATE_SINKHORN = 7       /* in training the K largest after Sinkhorn's normalisation of the
                                   group's exp(logits), else the K largest logits; [11] */
};

/* What turns a logit into a score. */
enum { MOE_SCORE_SOFTMAX = 0, MOE_SCORE_SIGMOID = 1 };

/* How the weights of the K chosen come from the scores (MOE_GATE_TOP_K). */
enum {
    MOE_ORDER_SELECT_THEN_SCORE = 0, /* softmax over the K chosen logits; softmax only */
    MOE_ORDER_SCORE_THEN_SELECT = 1  /* scores over all E, those of the K chosen, see renormalize */
};

/* Noise on the choice alone, drawn with MOE_FORWARD_TRAIN; weights and losses do not see it. */
enum {
    MOE_CHOICE_NOISE_NONE = 0,
    MOE_CHOICE_NOISE_GUMBEL = 1,     /* logits + Gumbel noise choose; DeepSpeed's RSample */
    MOE_CHOICE_NOISE_GUMBEL_REST = 2 /* the first choice is without, the others with it;
                                        DeepSpeed's top-2 */
};

/* Whether the choices after the first get a row. The test is of the weight before dropping. One
 * that gets none is dropped, as for a full expert. */
enum {
    MOE_SECOND_CHOICE_ALL = 0,
    MOE_SECOND_CHOICE_NONE = 1,
    MOE_SECOND_CHOICE_THRESHOLD = 2, /* weight > second_threshold */
    MOE_SECOND_CHOICE_RANDOM = 3     /* with MOE_FORWARD_TRAIN: a uniform number is below weight /
                                        max(second_threshold, 1e-9); [2] has 1/2. Else all */
};

/* Over what the switch and gshard losses take their means. */
enum {
    MOE_LOSS_SCOPE_BATCH = 0, /* all tokens of the call */
    MOE_LOSS_SCOPE_GROUP = 1  /* each token group; mean over the groups that have tokens */
};

/* Which tokens a sequence loss counts for an expert. */
enum {
    MOE_SEQUENCE_COUNTS_SCORES = 0, /* the K largest plain scores of a token; [6] eq. 18 */
    MOE_SEQUENCE_COUNTS_ROUTED = 1  /* the experts the token is routed to */
};

/* How many rows an expert takes from a token group. */
enum {
    MOE_CAPACITY_NONE = 0,   /* dropless */
    MOE_CAPACITY_NUMBER = 1, /* `capacity` rows */
    MOE_CAPACITY_FACTOR = 2  /* max(capacity_minimum, round(capacity_factor * K * T_group / E)),
                                then up to a multiple of capacity_multiple, at most T_group * K;
                                T_group counts the unmasked tokens of the group */
};
enum {
    MOE_ROUND_UP = 0,
    MOE_ROUND_DOWN = 1,
    MOE_ROUND_NEAREST = 2,
    MOE_ROUND_PER_CHOICE = 3, /* K floor(capacity_factor ceil(T_group / E)); Tutel */
    MOE_ROUND_TOKENS_UP = 4   /* floor(K ceil(capacity_factor T_group) / E); FastMoE */
};

/* Which entries stay when an expert is full. An order of consideration, or which of an expert's
 * entries are the best; equal ones in order of token, then of choice. */
enum {
    MOE_DROP_TOKEN_ORDER = 0,    /* in order of token, then of choice */
    MOE_DROP_CHOICE = 1,         /* all first choices in order of token, then all second; [2] */
    MOE_DROP_BATCH_PRIORITY = 2, /* as CHOICE, with the tokens in descending order of their largest
                                    score over all experts; [8] */
    MOE_DROP_SCORE = 3,          /* the largest weights stay */
    MOE_DROP_RANDOM = 4          /* the largest uniform numbers, drawn for (token, expert), stay;
                                    DeepSpeed's random token selection */
};

#define MOE_INIT_DEFAULT (-1.0) /* init_std by the rule of moe_*_init_parameters */

/* Where the secondary gates of MOE_GATE_HIERARCHICAL are, in a layer over a comm ([1] 3.2: each
 * secondary MoE is on one device). */
enum {
    MOE_SECONDARY_REPLICATED = 0, /* all of them on every rank */
    MOE_SECONDARY_WITH_GROUP = 1  /* with their group's experts on one rank: rows go there first,
                                     and logits come back. "weight" and "noise_weight" are
                                     [local_groups,D,B], sharded: rank 0 has the first groups, and
                                     so on. For layers alone; not with MOE_EXCHANGE_PADDED, slices
                                     or replicas */
};

/* Returns MOE_INIT_DEFAULT, for callers that cannot read a macro. Any thread. Since 0.1. */
MOE_API double moe_init_default(void);

/* How a gate is made. Fill with moe_gate_config_init, then change what you need. Loss weights are 0
 * = off by default. A loss is multiplied by its weight. */
typedef struct moe_gate_config {
    uint64_t struct_size;
    int64_t d_model;            /* D, width of gate_x; default 0: the gate has no weights and
                                   every forward brings logits_in; a hash gate then gives every
                                   expert of a token the weight 1/K */
    int64_t num_experts;        /* E, 1 to 2^31 - 1; default 0 is refused */
    int64_t top_k;              /* K, 1 to E; default 1. Ignored by MOE_GATE_SOFTMAX_DENSE (K =
                                   E). Of a chosen group for MOE_GATE_HIERARCHICAL; the mean number
                                   for MOE_GATE_BALANCED and MOE_GATE_EXPERT_CHOICE */
    int32_t kind;               /* MOE_GATE_*; default MOE_GATE_TOP_K */
    int32_t score;              /* MOE_SCORE_*; default softmax */
    int32_t order;              /* MOE_ORDER_*; default MOE_ORDER_SELECT_THEN_SCORE */
    int32_t renormalize;        /* 1: divide the K scores by (their sum + renormalize_epsilon);
                                   for MOE_ORDER_SCORE_THEN_SELECT; default 0 */
    double renormalize_epsilon; /* default 0 */
    double route_scale;         /* last factor on every weight; default 1 */
    int32_t bias;               /* 1: a trained bias [E] on the logits; default 0 */
    int32_t selection_bias;     /* 1: a buffer "selection_bias" [E] is added to the scores for the
                                   selection only; [6], [7]; default 0 */
    int64_t expert_groups;      /* equal runs of experts, dividing E: only experts of the top_groups
                                   best may be chosen ([6]); or the primary gate's groups; default
                                   1 */
    int64_t top_groups;         /* 1 to expert_groups; default 1 */
    int32_t group_score;        /* n: a group's score is the sum of its n largest selection scores;
                                   0 as 1: its largest; at most E / expert_groups; default 0 */
    int32_t dtype;              /* MOE_DTYPE_* of x and parameters; default f32. Logits and weights
                                   are of it too, or f32 where it has 16 bits: see moe/types.h */

    double noise_epsilon; /* added to softplus; default 1e-2 as the authors' code; the paper has
                             0 */
    double cdf_guard;     /* added to sqrt(2) sd in the load's quotient; default 1e-20 */
    double jitter;        /* r < 1: in training each element of gate_x is multiplied by a number
                             uniform in (1 - r, 1 + r); [3]; default 0 */
    uint64_t seed;        /* key of the noise; default 0 */
    int32_t stream_id;    /* number of this gate in the noise counter, 0 to 255; default 0 */
    int32_t cv_ddof;      /* 0: population variance in CV^2, 1: sample variance; default 0 */

    double importance_weight; /* CV^2 of sum_t gates; [1] eq. 6-7 */
    double load_weight;       /* CV^2 of the smooth load; [1] eq. 8-11; MOE_GATE_NOISY_TOP_K only */
    double switch_weight;     /* E sum_i counts_i/(T K) mean_t P_i; [3] */
    double gshard_weight;     /* E sum_i first_i/T mean_t P_i; [2] times E^2 */
    double z_weight;          /* mean_t logsumexp(logits)^2; [4] */
    double sequence_weight;   /* E sum_i counts_i/(T K) mean_t s_i/sum_j s_j for each token
                                 group, mean over the groups that have tokens; [6] eq. 17-20 */
    int32_t sequence_score;   /* MOE_SCORE_* of s; default MOE_SCORE_SIGMOID as in [6] */
    int32_t sequence_counts;  /* MOE_SEQUENCE_COUNTS_*; default MOE_SEQUENCE_COUNTS_SCORES */

    int32_t capacity_kind;          /* MOE_CAPACITY_*; default MOE_CAPACITY_NONE */
    int32_t capacity_rounding;      /* MOE_ROUND_*; default MOE_ROUND_UP */
    int64_t capacity;               /* rows of an expert for MOE_CAPACITY_NUMBER; default 0 =
                                       none get any */
    double capacity_factor;         /* default 1 */
    int64_t capacity_minimum;       /* default 0 */
    int32_t drop_policy;            /* MOE_DROP_*; default MOE_DROP_TOKEN_ORDER */
    int32_t renormalize_after_drop; /* 1: kept weights of a token are divided by their sum, a
                                       token that keeps none gets 0; default 0 */
    int32_t parameters;             /* MOE_PARAMETERS_*; default MOE_PARAMETERS_OWNED */
    int32_t reserved;               /* 0 */
    double init_std;                /* default MOE_INIT_DEFAULT */

    double threshold_weight;     /* threshold loss of MOE_GATE_BALANCED; [1] eq. 20; default 0 */
    double renormalize_minimum;  /* renormalisation, before or after a drop, divides by no less;
                                    default 0 */
    double capacity_factor_eval; /* without MOE_FORWARD_TRAIN; default 0: capacity_factor */
    int64_t capacity_multiple;   /* default 0, as 1 */
    double second_threshold;     /* default 0 */
    double sinkhorn_tolerance;   /* mean change of the column factors at which to stop; default 0:
                                    1e-4 */
    int32_t sinkhorn_iterations; /* most rounds; default 0: 100 */
    int32_t choice_noise;        /* MOE_CHOICE_NOISE_*; default none */
    int32_t second_choice;       /* MOE_SECOND_CHOICE_*; default all */
    int32_t loss_scope;          /* MOE_LOSS_SCOPE_*; default batch */
    int32_t secondary;           /* MOE_SECONDARY_*, of MOE_GATE_HIERARCHICAL; default replicated */
    int32_t reserved2;           /* 0 */
    int64_t local_groups;        /* of MOE_SECONDARY_WITH_GROUP: groups whose secondary gate this
                                    object has, 0 to expert_groups; else 0 */
} moe_gate_config;

/* Writes every default and the caller's size. Returns as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_gate_config_init(moe_gate_config *config, size_t size);

/* Creates a gate.
 *   gate     out: the new gate; untouched on error
 *   context  holds a reference
 *   config   copied
 * Owned parameters are zero until moe_gate_init_parameters.
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT, MOE_ERROR_NOT_SUPPORTED, MOE_ERROR_OVERFLOW,
 * MOE_ERROR_OUT_OF_MEMORY or an error of the struct's size. Since 0.1. */
MOE_API moe_status moe_gate_create(moe_gate **gate, moe_context *context,
                                   const moe_gate_config *config);

/* Gives up the program's reference. NULL is legal. Since 0.1. */
MOE_API void moe_gate_destroy(moe_gate *gate);

/* Writes the config the gate was made with. config: in: struct_size; out: the rest.
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT or an error of the struct's size. Since 0.1. */
MOE_API moe_status moe_gate_get_config(const moe_gate *gate, moe_gate_config *config);

/* Routes a batch: logits, selection, weights, capacity, losses. The plan is then
 * moe_pass_plan(pass).
 *   pass  made for this gate, or for a layer with it; holds afterwards what the backward needs
 *   args  reads tokens, token_first, step, flags, x or gate_x or logits_in, noise, token_mask,
 *         groups, plan and plan_use, top_k, capacity, loss_weights, losses_out, stats_out; `y` must
 *         be NULL
 * Returns as moe_layer_forward. Since 0.1. */
MOE_API moe_status moe_gate_forward(moe_gate *gate, moe_pass *pass, const moe_forward_args *args);

/* Gradients of the weights' use and of the losses, by the gate's input and parameters.
 *   pass  after a moe_gate_forward that kept its logits: without MOE_FORWARD_NO_SAVE and
 *         MOE_FORWARD_PLAN_ONLY
 *   args  reads entry_weight_grad [N] (in; the gradient by each weight of the plan, NULL = 0; not
 *         looked at for entries without a row, whose weight is 0), loss_grad, x or gate_x if they
 *         moved; writes d_gate_x if it is given and else dx, d_logits_out and the parameter
 *         gradients. `dy` must be NULL
 * Returns as moe_layer_backward. Since 0.1. */
MOE_API moe_status moe_gate_backward(moe_gate *gate, moe_pass *pass, const moe_backward_args *args);

/* Balances without a loss ([6], [7]): bias_e += rate sign(mean(counts) - counts_e), for the buffer
 * "selection_bias" of a gate that owns it.
 *   counts  in: [E] entries per expert (MOE_TENSOR_COUNTS), which the host sums over micro-batches
 *           and ranks
 *   rate    finite; [7] has 0.001
 * Not while another thread is in a call on the gate. Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT, or
 * MOE_ERROR_INVALID_STATE if the gate has no such buffer or it is bound: the library never writes
 * to bound data, see moe_selection_bias_step. Since 0.1. */
MOE_API moe_status moe_gate_update_selection_bias(moe_gate *gate, const int64_t *counts,
                                                  double rate);

/* The same rule on the host's own memory.
 *   next    out: [n]; may be `bias`
 *   bias    in: [n]
 *   counts  in: [n]
 *   n       >= 0
 *   dtype   MOE_DTYPE_F32 or MOE_DTYPE_F64, of next and bias
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT, MOE_ERROR_NOT_SUPPORTED. Any thread. Since 0.1. */
MOE_API moe_status moe_selection_bias_step(void *next, const void *bias, const int64_t *counts,
                                           int64_t n, double rate, int32_t dtype);

/* CV^2 of a vector and its gradient, for a host that routes by itself ([1] eq. 6-7):
 * Var(v) / (mean(v)^2 + 1e-10), Var over n (ddof 0) or n-1 (ddof 1; 0 if n = 1).
 *   cv2    out: the value; may be NULL
 *   dv     out: [n] gradient of cv2 by v; may be NULL
 *   v      [n]
 *   dtype  MOE_DTYPE_F32 or MOE_DTYPE_F64, of v and dv
 *   n      >= 0; n = 0 gives 0
 * Sums run in double. Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT, MOE_ERROR_NOT_SUPPORTED. Any
 * thread.
 * Since 0.1. */
MOE_API moe_status moe_cv_squared(double *cv2, void *dv, const void *v, int64_t n, int32_t ddof,
                                  int32_t dtype);

/* The first four standard normal numbers the gate's noise uses at (seed, stream, step, token,
 * block): those of experts 4*block .. 4*block+3. For checks, and for hosts that want the same noise
 * elsewhere.
 *   out  [4]
 * Returns MOE_OK or MOE_ERROR_INVALID_ARGUMENT. Any thread. Since 0.1. */
MOE_API moe_status moe_noise4(float *out, uint64_t seed, int32_t layer_id, int32_t stream_id,
                              int64_t step, int64_t token, int64_t block);

MOE_END_DECLS

#endif
