/* backend.h - the tables a backend fills: one coarse function per step of a layer, and its memory.
 *
 * src/ checks arguments, lays out memory and orders the steps; a backend computes them and trusts
 * what it is given. Arrays are in backend memory, which src/ never touches but through
 * moe__memory; what is a plain field, or said to be the host's, is the host's. Element type and
 * instruction set are the table's. Where that type has 16 bits, elements are: tokens and their
 * gradients (x, y, dx, dy, gate_x), the rows of experts (x_rows, z1, z3, h, out and their
 * gradients), y_saved, and parameters unless their operand says otherwise; everything else that
 * has no type of its own, such as logits, noise, weights and what is made of them, is float. "may
 * be NULL" is said where it holds. A backend may put its work on the stream of the call and return
 * before it is done. Every function returns MOE_OK or why it failed: the host's parallel-for
 * (MOE_ERROR_CALLBACK), a device (MOE_ERROR_DEVICE). C11 and C++. */
#ifndef MOE_BACKEND_H
#define MOE_BACKEND_H

#include "base.h"
#include "cpu/grouped_gemm.h" /* moe__rows, moe__matrices: plain descriptions, no kernel */
#include "travel.h"

MOE_BEGIN_DECLS

/* What a pass needs to know of a pool to make room for it; of a pool of parts, the most of each. */
typedef struct moe__experts_room {
    int64_t d_model, d_hidden, d_out, num_experts;
    int64_t workspace_per_row; /* bytes of the host's experts */
    int32_t dtype;
    bool gated;
    bool x_rows;         /* rows of x are gathered */
    bool dz;             /* so are gradients by the rows of out */
    bool keep_h;         /* h has memory of its own; else it is made again where it is needed */
    bool combine_weight; /* parts differ in what the weight multiplies */
} moe__experts_room;

/* What a pass must have room for. */
typedef struct moe__pass_shape {
    const moe_gate_config *gate;                /* NULL: no gate */
    const moe__experts_room *experts;           /* NULL: no experts */
    const moe__experts_room *shared, *residual; /* NULL: not there */
    int64_t tokens, entries, num_experts, groups, top_k;
    int64_t padded_rows; /* rows of each expert of the pool, used or not; 0: those there are */
    int32_t dtype, threads;
    int32_t route;                     /* 1: the gate runs (no plan with weights) */
    int32_t noise;                     /* 1: it draws noise */
    int32_t logits_in;                 /* 1: the host may bring the logits */
    int32_t jitter;                    /* 1: its input is jittered */
    int32_t save;                      /* 1: a backward will come */
    int32_t output_sigmoid;            /* of the layer */
    int32_t shared_gate, residual_mix; /* likewise */
    int32_t ranks;          /* 1: experts live on several ranks: their rows are in moe__ranks */
    int32_t share_ranks;    /* P if losses are of all ranks' tokens, else 0 */
    int32_t plain_counts;   /* 1: plain_ids are needed */
    int32_t columns;        /* 1: a loss, the load or the choice needs columns */
    int32_t priority;       /* 1: token_priority is needed */
    int32_t softmax_losses; /* 1: switch, gshard or z is on */
    int32_t sequence;       /* 1: the sequence loss is on */
    int32_t threshold;      /* 1: the threshold loss is on */
} moe__pass_shape;

/* Backend memory, and what orders the work in it. Of every context, never NULL. The host's memory
 * is src/memory.c; where a function may be NULL there is nothing to do. But for note_touched and
 * zero_strided, all may be called outside of begin and end. */
typedef struct moe__memory {
    const char *name;
    int32_t is_host; /* 1: src/ may read and write it as any memory, and there is no stream */
    /* 64-byte aligned; NULL if there is none. zeroed: filled with zeros, at once */
    void *(*alloc)(moe_context *context, int64_t bytes, bool zeroed);
    void (*free)(moe_context *context, void *memory, int64_t bytes);
    /* On the stream: zeros; a copy within backend memory. */
    moe_status (*zero)(const moe__workers *workers, void *to, int64_t bytes);
    moe_status (*copy)(const moe__workers *workers, void *to, const void *from, int64_t bytes);
    /* To and from the host's memory, behind what is on the stream; both wait until it is done. What
     * is fetched may be in the host's memory already. */
    moe_status (*fetch)(const moe__workers *workers, void *host, const void *from, int64_t bytes);
    moe_status (*store)(const moe__workers *workers, void *to, const void *host, int64_t bytes);
    /* On the stream: zeros at base[i stride[0] + j stride[1] + k stride[2]], i < count[0] and so
     * on, elements of `element` bytes. */
    moe_status (*zero_strided)(const moe__workers *workers, void *base, const int64_t count[3],
                               const int64_t stride[3], int64_t element);
    /* On the stream: element (i,j,k) of `from` to (i,j,k) of `to`, each by its strides, i <
     * count[0] and so on, elements of 2 or 4 bytes. NULL where is_host. */
    moe_status (*copy_strided)(const moe__workers *workers, void *to, const int64_t to_stride[3],
                               const void *from, const int64_t from_stride[3],
                               const int64_t count[3], int64_t element);
    /* On the stream of a pass: from the host's memory, which may change when this returns. Waits
     * only for earlier copies of the same kind, and not for the stream. NULL where is_host. */
    moe_status (*put)(const moe__workers *workers, void *to, const void *host, int64_t bytes);
    /* touched[e] = 1 for every expert with rows; forget: 0 for the others. NULL where is_host. */
    moe_status (*note_touched)(const moe__workers *workers, uint8_t *touched,
                               const moe__plan_arrays *plan, bool forget);
    /* What the backend keeps for a pass; or NULL. */
    moe_status (*pass_create)(moe_context *context, void **of_pass, const char *function);
    void (*pass_destroy)(moe_context *context, void *of_pass);
    /* Around every phase of a call: NULL, or the device of the context becomes the thread's, and
     * what it was comes back. begin refuses a stream that is not of the device, and what is left of
     * an earlier failure; then there is no end. */
    moe_status (*begin)(const moe__workers *workers);
    void (*end)(const moe__workers *workers);
    /* Rows of a plan are final: what is known of earlier ones there is forgotten, and if this call
     * will ask (wanted), what the host needs of them starts on its way. NULL: nothing to do. */
    moe_status (*plan_ready)(const moe__workers *workers, const moe__plan_arrays *plan,
                             bool wanted);
    /* expert_begin [E+1] of a plan of the pass on the host, until another plan is asked for: after
     * one bounded wait, unless the host knew it. NULL where is_host. */
    moe_status (*plan_counts)(const moe__workers *workers, const moe__plan_arrays *plan,
                              const int64_t **expert_begin);
    /* Tells expert_begin [E+1] of a plan, which the host knows before the stream does. NULL where
     * is_host. */
    moe_status (*plan_known)(const moe__workers *workers, const moe__plan_arrays *plan,
                             const int64_t *expert_begin);
    /* On the stream of a pass: a copy of a word of backend memory to the host, which nobody waits
     * for. noted: the last that has come, 0 before; it is forgotten. NULL where is_host. */
    moe_status (*note)(const moe__workers *workers, const int64_t *word);
    int64_t (*noted)(const moe__workers *workers);
    void (*context_destroy)(void *of_context); /* or NULL */
    /* Refuses `memory`, the field `name` of a call, if the backend cannot read and write it there;
     * NULL is good. NULL: any memory is good. */
    moe_status (*check_pointer)(const moe__workers *workers, const char *name, const void *memory);
    /* Refuses a stream that the host cannot wait for: one that is being captured. Before a call
     * that will wait launches anything. NULL: it can. */
    moe_status (*may_wait)(const moe__workers *workers);
    /* An exchange beside the stream of the call. fork: where to put it, behind what is on the
     * call's stream now; that stream itself if the host gave the pass none. end_fork: it has been
     * put there. join: what is put on the call's stream later runs behind the first one that was
     * not joined, of MOE_COMM_REQUESTS at most; all: behind all of them, also if end_fork was not
     * reached. Without a fork nothing. NULL where is_host. */
    moe_status (*fork)(const moe__workers *workers, void **stream);
    moe_status (*end_fork)(const moe__workers *workers);
    moe_status (*join)(const moe__workers *workers, bool all);
} moe__memory;

/* ---- jobs of the steps ----------------------------------------------------------------------- */

/* What is known of a batch before anything is computed. src/cpu/batch.c */
typedef struct moe__batch_job {
    moe__workers workers;
    int64_t tokens, groups;     /* T, G */
    moe__plan_arrays *plan;     /* sizes are set; out, unless `given`: token_begin, group_begin */
    int64_t entries_per_token;  /* token_begin[t] = t entries_per_token */
    int32_t given;              /* 1: the plan is there */
    const int64_t *group_begin; /* [G+1] the host's; NULL: one group, or given */
    const uint8_t *token_mask;  /* [T] or NULL */
    uint8_t *mask;              /* out: [T] 1, or 0 for masked tokens */
    int64_t *valid_token;       /* out: [T] numbers of the unmasked tokens */
    int64_t *valid_begin;       /* out: [G+1] first of each group among them */
    moe__plan_arrays *primary;  /* out: of two levels: token_begin, group_begin; or NULL */
    int64_t primary_per_token;  /* entries of a token there */
    int64_t *second_begin;      /* out: [primary entries + 1] = r second_per_row; with primary */
    int64_t second_per_row;
    const moe_gate_config *config; /* of the capacity, as the steps see it */
    int64_t capacity;              /* of this call; MOE_FROM_CONFIG: the config's */
    int32_t train;
    int64_t *group_capacity; /* out: [G] rows of an expert in each group; NULL: no limit */
} moe__batch_job;

/* How experts come to tokens; every MOE_GATE_* is one of these with some score (gate.c). */
enum {
    MOE__CHOOSE_TOP = 0,       /* the K first by logits, or by selection scores */
    MOE__CHOOSE_ALL = 1,       /* every expert */
    MOE__CHOOSE_GIVEN = 2,     /* the ids are there already: a replay */
    MOE__CHOOSE_KEY = 3,       /* drawn by the token's key */
    MOE__CHOOSE_BY_EXPERT = 4, /* each expert takes its best tokens of each group */
    MOE__CHOOSE_THRESHOLD = 5  /* the experts whose score is above their threshold */
};

/* One decision among `width` candidates for each of `rows` rows. A flat gate has one level: its
 * rows are the tokens, its candidates the experts. A hierarchical gate has two: tokens among
 * groups, then the rows of that routing, sorted by group, among the experts of their group. */
typedef struct moe__gate_level {
    int64_t rows, width, top_k;
    int64_t parts;               /* 1, or the number of groups: each has weights of its own */
    const int64_t *part_begin;   /* [parts+1] rows of each part */
    const int64_t *token_of_row; /* [rows], NULL: a row is a token */
    const int64_t *entry_begin;  /* [rows+1] */
    moe__matrices weight_matrix, bias, noise_weight; /* [parts][D,width]; base NULL: not there */
    const void *noise_in; /* of token t and part i at t * stride + i * width; NULL: Philox */
    int64_t noise_stride;
    uint32_t noise_stream; /* first counter word */
    void *logits;          /* [rows,width] clean; NULL: there are none */
    void *noisy;           /* [rows,width] H; = logits without noise */
    void *noise_raw;       /* [rows,width] x Wnoise; NULL without noise, as the next two */
    void *noise_std;       /* [rows,width] sd */
    void *noise;           /* [rows,width] */
    int32_t *choice;       /* [entries] candidates in order of choice, -1: none */
    void *weight;          /* [entries] before dropping */
    int32_t *kth;          /* [rows,2] the worst chosen and the best other candidate (-1:
                                    none): the thresholds of the load; or NULL */
    /* backward: scratch */
    void *d_weight, *scores;  /* [entries] by the weights before dropping; scores again */
    void *d_logits, *d_noisy; /* [rows,width] by the clean logits; by H */
    void *d_noise_raw;        /* [rows,width]; NULL without noise */
    double *d_load;           /* [parts,width] */
    moe__matrices d_weight_matrix, d_bias, d_noise_weight; /* NULL: not wanted; added to */
    int64_t *segment_begin; /* [parts*G+1] rows of each part's token groups */
    void *dx_rows;          /* [rows,D] reals; NULL where a row is a token */
} moe__gate_level;

/* route: logits -> noise -> choice -> weights. src/cpu/route.c, choose.c */
typedef struct moe__route_job moe__route_job;
struct moe__route_job {
    moe__workers workers;
    const moe_gate_config *config; /* as the steps see it: top_k is the K of this call, see
                                      gate.c */
    int32_t choose;                /* MOE__CHOOSE_* */
    int32_t levels;                /* 1, or 2 for a hierarchical gate */
    int64_t tokens;                /* T */
    int64_t input_width;           /* D of the gate */
    const void *x;                 /* [T,D], NULL if logits_in and no noise */
    int64_t x_stride;
    void *x_jittered; /* [T,D] dense reals, what the products read for x; NULL without jitter */
    uint32_t jitter_stream, choice_stream;
    const void *logits_in; /* [T,E] or NULL */
    int64_t logits_stride;
    const uint8_t *token_mask;               /* or NULL */
    const int64_t *token_key;                /* [T] of MOE__CHOOSE_KEY */
    moe__matrices selection_bias, threshold; /* [E]; base NULL: not there */
    int64_t step, token_first;
    int32_t train;
    int64_t groups;                /* G */
    const int64_t *group_begin;    /* [G+1] first token of each group */
    const int64_t *valid_begin;    /* [G+1] first of each group among the unmasked tokens */
    const int64_t *valid_token;    /* [valid] their numbers */
    const int64_t *taken_of_group; /* [G] tokens an expert takes of a group;
                                      MOE__CHOOSE_BY_EXPERT */
    moe__gate_level level[2];
    moe__plan_arrays *primary; /* [T,A] routing of level 0 if there are two: laid out; filled
                                  here */
    /* the plan: written unless given */
    int64_t *token_begin;     /* [T+1]; written where the entries of a token vary */
    int32_t *expert_of_entry; /* [N]; -1 for masked tokens */
    int64_t *slot_of_entry;   /* [N] written by MOE__CHOOSE_BY_EXPERT */
    void *weight;             /* [N] before dropping */
    void *token_priority;     /* out: [T] largest score; NULL: not wanted */
    /* scratch */
    void *columns;         /* [most rows x width of a level] real: selection scores; or NULL */
    void *group_score;     /* [T,expert_groups] real of group-limited selection */
    int32_t *group_ids;    /* [T,top_groups] */
    int32_t *taken;        /* [N] of MOE__CHOOSE_BY_EXPERT */
    double *column_factor; /* [3,E] of Sinkhorn */
    double *row_factor;    /* [T] of Sinkhorn */
    int64_t *tile_begin;   /* [parts+1] */
    /* Makes logits and noise_raw of level 1 where its parameters are on other ranks; NULL: here.
     * ranks_second.c */
    moe_status (*second)(moe__route_job *job);
    void *second_user;
};

/* losses and statistics, and their gradients. src/cpu/losses.c, load.c */
typedef struct moe__losses_job moe__losses_job;
struct moe__losses_job {
    moe__route_job *route;        /* everything that forward made */
    const moe__plan_arrays *plan; /* after dropping */
    const double *weights;        /* [MOE_LOSS_SLOTS] of this call */
    const int64_t *valid_token;   /* numbers of the unmasked tokens, NULL without a mask: all */
    const int64_t *valid_begin;   /* [G+1] first of each group among them; [G]: how many */
    double *importance, *load;    /* out: [E] */
    double *primary_load;         /* out: [A]; NULL but for a hierarchical gate, as the next */
    double *part_load;            /* out: [E] load of each expert among the rows of its group */
    int64_t *counts;              /* out: [E] before dropping */
    int64_t *first_counts;        /* out: [E] */
    bool scoped;                  /* switch and gshard are means over the groups */
    int64_t scopes;               /* G if scoped, else 1 */
    double *score_sum;            /* out: [scopes,E] sum_t P; NULL if off */
    int64_t *scope_counts;        /* out: [scopes,E]; = counts if not scoped */
    int64_t *scope_first;         /* out: [scopes,E]; = first_counts if not scoped */
    double *sequence_sum;         /* out: [G,E] sum_t s/sum s; NULL if off */
    int64_t *sequence_counts;     /* out: [G,E]; NULL if off */
    double *sequence_scale;       /* out: [G]; NULL if off */
    int64_t *over_taken;          /* out: [E] entries less tokens above the threshold; of all
                                     ranks on rank 0, and then 0 elsewhere; NULL if off */
    int64_t *rows_of_expert;      /* out: [E] rows of the plan; of all ranks */
    double *part_rows;            /* out: [A] rows of each group of a hierarchical gate, or NULL */
    double tokens, groups;        /* out: unmasked tokens; groups that have some */
    double rows;                  /* out: of the plan */
    double with_logits;           /* out: ranks whose call has logits: with none there is no loss */
    double z_sum, threshold_sum, entropy_sum; /* out: over tokens */
    /* Makes sums over this rank's tokens those over all ranks: once all are there; and, with
     * `partial`, what of losses is formed group by group, once these are. NULL: one rank, or each
     * by itself. share.c */
    moe_status (*share)(moe__losses_job *job, bool partial);
    void *share_user;
    int32_t share_both; /* 1: `partial` comes in every call, whatever losses are on */
    int32_t reserved;
    double *shared;      /* scratch of share */
    double *value;       /* out: [MOE_LOSS_SLOTS] weighted */
    double *stats;       /* out: [MOE_STAT_SLOTS] */
    double *sums;        /* [MOE__SUM_SLOTS] where the plain fields above live if the host does not
                            wait for them; else NULL */
    void *columns;       /* scratch [most rows x width] real; NULL if no loss needs it */
    double *token_value; /* scratch [T] */
    int32_t *plain_ids;  /* scratch [T,K] for sequence counts by plain scores; NULL if
                                     the routed experts are counted */
};

/* Gradient of the gate. src/cpu/gate_backward.c, losses.c, load.c */
typedef struct moe__gate_backward_job moe__gate_backward_job;
struct moe__gate_backward_job {
    moe__losses_job *losses;
    const void *loss_grad;         /* [MOE_LOSS_SLOTS] real, the caller's; NULL: 1 */
    double *loss_factor;           /* out: [MOE_LOSS_SLOTS] weight times loss_grad; 0 where the
                                      weight is */
    const void *entry_weight_grad; /* [N] by the plan's (kept) weights, or NULL = 0 */
    void *d_weight;                /* scratch [N]: by the weights before dropping */
    double *d_importance;          /* scratch [E] */
    double *d_load;                /* scratch [E] */
    void *d_score;                 /* scratch [scopes,E] real */
    void *dx;                      /* [T,D] or NULL */
    int64_t dx_stride;
    int32_t dx_add;
    void *d_x_jittered; /* scratch [T,D] reals; NULL without jitter */
    void *d_logits_out; /* [T,E] or NULL */
    int64_t d_logits_stride;
    moe__matrices d_threshold; /* NULL: not wanted; added to */
    int32_t logits_from_host;  /* 1: no gradient by weight, bias and x through the clean logits */
    /* As moe__route_job's: gradients by the parameters of level 1 there, and its dx_rows if dx. */
    moe_status (*second)(moe__gate_backward_job *job);
};

/* Secondary gates over rows of several ranks: logits[r] = x W_i for the rows r of group i, and the
 * same for the noise; the gradients. src/cpu/second.c */
typedef struct moe__second_job {
    moe__workers workers;
    int64_t parts;          /* groups */
    int64_t *part_begin;    /* [parts+1] */
    int64_t segments;       /* ranks */
    int64_t *segment_begin; /* [parts * segments + 1] */
    int64_t input_width, width;
    const void *x; /* [rows,D] x_stride apart in any order; row r is index[r] */
    const int64_t *index;
    int64_t rows, x_stride;
    int32_t x_wide;                            /* 1: x is reals */
    int32_t with_noise;                        /* backward: d has gradients by noise_raw */
    moe__matrices weight_matrix, noise_weight; /* noise: base NULL without it */
    void *logits, *noise_raw;                  /* out: [rows,width] */
    const void *d;                             /* [rows,d_stride] by logits, then by noise_raw;
                                                  order as x */
    int64_t d_stride;
    void *dx_rows;                                 /* out: [rows,D], or NULL */
    moe__matrices d_weight_matrix, d_noise_weight; /* NULL: not wanted; added to */
    int64_t *tile_begin;                           /* scratch [parts+1] */
} moe__second_job;

/* The layer's own coefficients of a token: s = sigmoid(x w) of the shared part (width 1), or c =
 * softmax(x W + b) of routed and residual part (width 2), and what they multiply: the weights of a
 * plan for each. src/cpu/mix.c */
typedef struct moe__mix_job {
    moe__workers workers;
    int64_t tokens, input_width, width;
    const void *x; /* [T,D] */
    int64_t x_stride;
    moe__matrices weight_matrix, bias; /* [D,width], [width] */
    const uint8_t *token_mask;         /* or NULL: coefficients of masked tokens are 0 */
    void *coefficient;                 /* out: [T,width] */
    const moe__plan_arrays *plan[2];   /* of column i */
    const void *weight_in[2];          /* [N] of that plan; NULL: 1 */
    void *weight_out[2];               /* out: [N] coefficient times weight_in */
    /* backward */
    void *entry_grad[2]; /* [N] in: by weight_out; out: by weight_in */
    void *d_coefficient; /* scratch [T,width] */
    void *dx;            /* [T,D] added to, or NULL */
    int64_t dx_stride;
    moe__matrices d_weight_matrix, d_bias; /* NULL: not wanted; added to */
    int64_t groups;
    const int64_t *valid_begin, *valid_token; /* as of moe__losses_job */
    int64_t *tile_begin;                      /* scratch [2] */
} moe__mix_job;

/* Rows of a plan: which entries stay, their order by expert. src/cpu/rows.c */
typedef struct moe__plan_rows_job {
    moe__workers workers;          /* scratch unused; context for threads */
    moe__plan_arrays *plan;        /* in: sizes, token_begin, expert_of_entry, weight_of_entry
                                      (before dropping), group_begin; out: the rest, and
                                      weight_of_entry with 0 where there is no row, renormalised
                                      if asked */
    const uint8_t *token_mask;     /* or NULL: a masked token's entries get no row */
    const int64_t *group_capacity; /* [G] rows of an expert in each group, -1 = no limit; NULL =
                                      no limits */
    int32_t drop_policy;           /* of groups with a limit */
    int32_t renormalize_after_drop;
    double renormalize_minimum; /* the divisor is no less; 0: whatever the sum is */
    int32_t keep_rows;          /* 1: replay: row, slot and order arrays are given; do the weights
                                   only */
    int32_t keep_slots;         /* 1: slot_of_entry is given, -1 for what has no row: the experts
                                   chose, nothing is refused or dropped */
    int32_t second_choice;      /* MOE_SECOND_CHOICE_*, by the weight before dropping; ALL where
                                   RANDOM does not apply */
    double second_threshold;
    const void *token_priority; /* [T] of MOE_DROP_BATCH_PRIORITY with limits, else NULL */
    uint64_t seed;              /* of the random policies */
    uint32_t drop_stream;       /* first counter word, purpose MOE__PURPOSE_DROP */
    int64_t step, token_first;
} moe__plan_rows_job;

/* Gather and its adjoint, combine and its adjoint. src/cpu/dispatch.c, src/cpu/combine.c */
typedef struct moe__rows_job {
    moe__workers workers;
    const moe__plan_arrays *plan;
    int64_t width;
    const void *tokens_in;
    int64_t tokens_in_stride; /* [T,width] */
    void *tokens_out;
    int64_t tokens_out_stride;
    const void *rows_in;
    int64_t rows_in_stride; /* [R,width] */
    void *rows_out;
    int64_t rows_out_stride;        /* may be NULL in combine_backward */
    void *entry_weight_grad;        /* [N] or NULL */
    int32_t add;                    /* tokens_out += */
    int32_t rows_wide, tokens_wide; /* dispatch_backward: rows_in, and then tokens_out too, are
                                       reals */
    int32_t unweighted;
    const void *weights;       /* combine_forward: [N] instead of the plan's, or NULL */
    int32_t sigmoid;           /* combine_forward: of the sum, added or not */
    int32_t dropped;           /* MOE_DROPPED_*: combine_forward takes tokens_in for a token without
                                  rows, or lets tokens_out be; dispatch_backward likewise */
    void *tokens_saved;        /* combine_forward: [T,width] dense copy of the result, or NULL */
    const uint8_t *token_mask; /* combine_forward, dispatch_backward: masked tokens get 0, whatever
                                  the functions above; or NULL */
    int64_t padded_rows;       /* C: row r of expert e lies at e C + r - expert_begin[e]; 0: at r */
} moe__rows_job;

/* The experts of a pool, or of one part of it. All arrays have an entry or row for every one of the
 * plan; the job is about the rows of its experts, expert_begin[0] to expert_begin[num_experts], and
 * about the entries those rows belong to. src/cpu/expert_ffn.c, expert_other.c, activation.c,
 * grouped_gemm.c */
typedef struct moe__experts_job {
    moe__workers workers;
    const moe_experts_config *config; /* d_out resolved; callbacks are the pool's copy */
    const moe__plan_arrays *plan;     /* num_experts and expert_begin are the part's */
    const void *x;                    /* [T,D] */
    int64_t x_stride;
    int64_t first_expert;                       /* of the plan's, in the pool: a plan may be of some
                                                   of its experts. Operands begin there */
    int64_t padded_rows;                        /* as of moe__rows_job: all arrays of rows */
    moe__matrices w1, b1, w3, b3, w2, b2;       /* NULL: not there */
    moe__matrices dw1, db1, dw3, db3, dw2, db2; /* NULL: not wanted */
    int32_t overwrite;
    int32_t parameters;  /* 1: the host's experts are to add gradients of their parameters */
    void *z1, *z3;       /* [R,F] before the activation, kept for backward; z3 NULL if not gated */
    void *h;             /* [R,F] z1 when nothing is kept; kept for backward, or, on the host's
                            memory, dh: then the backward makes it again from z1 and z3 */
    void *out;           /* [R,O] outputs of the experts, after the output function; kept */
    void *weight_of_row; /* [R] kept */
    int64_t *tile_begin, *tile_order; /* scratch [E+1], [E] */
    const int64_t *segment_begin;     /* [E * segments + 1] rows of each expert's token groups:
                                     parameter gradients are summed group by group; NULL: as one */
    int64_t segments;                 /* token groups */
    const moe__dw_carry *carry;       /* [3] of w1, w3, w2: rows come in several calls; or NULL */
    void *x_rows;                     /* [R,D] of the host's experts, kept; else NULL */
    void *workspace;      /* [R,workspace_per_row] bytes from the job's first row on, kept; or
                            NULL */
    void *combine_weight; /* [N] what combine multiplies, of a pool whose parts differ in
                             weight_position; else NULL. Not the kernels' */
    /* backward */
    const void *dy; /* [T,O] */
    int64_t dy_stride;
    void *dz;                /* [R,O] scratch: with output sigmoid, and dout of the host's experts;
                                else NULL */
    void *dh;                /* [R,F] scratch */
    void *dz3;               /* [R,F] scratch; NULL if not gated */
    void *dx_rows;           /* [R,D] out; NULL = not wanted; with MOE_WEIGHT_ON_INPUT needed for
                                entry_weight_grad too */
    void *entry_weight_grad; /* [N] out, only of entries with a row, or NULL */
} moe__experts_job;

/* Matrices from one order to another: strided to panels, or back. src/cpu/panels.c */
typedef struct moe__copy_job {
    moe__workers workers;
    int64_t experts, rows, cols; /* each matrix is [rows,cols] */
    moe__matrices from, to; /* of one dtype; panels of `to` have zeros beyond the matrix already */
} moe__copy_job;

typedef struct moe__backend {
    const char *name;                                      /* "cpu f32 avx512" */
    int64_t (*worker_bytes)(const moe__pass_shape *shape); /* NULL shape: of a call without pass */
    /* *entries = what MOE__CHOOSE_THRESHOLD will choose; needs the logits' room alone */
    moe_status (*route_count)(moe__route_job *job, int64_t *entries);
    moe_status (*route_forward)(moe__route_job *job);
    moe_status (*second_forward)(moe__second_job *job);
    moe_status (*second_backward)(moe__second_job *job);
    moe_status (*losses_forward)(moe__losses_job *job);
    moe_status (*gate_backward)(moe__gate_backward_job *job);
    moe_status (*batch_forward)(moe__batch_job *job);
    /* How many entries experts take that take tokens: E min(group_capacity, unmasked tokens),
     * summed over the groups; waits */
    moe_status (*entries_taken)(const moe__batch_job *job, int64_t *entries);
    /* Every token to every expert with weight 1: token_begin, expert_of_entry, weight_of_entry */
    moe_status (*everyone_forward)(const moe__workers *workers, moe__plan_arrays *plan);
    /* The losses and statistics as the caller's reals; either may be NULL */
    moe_status (*write_results)(const moe__losses_job *job, void *losses_out, void *stats_out);
    moe_status (*plan_rows)(moe__plan_rows_job *job);
    moe_status (*mix_forward)(moe__mix_job *job);
    moe_status (*mix_backward)(moe__mix_job *job);
    moe_status (*dispatch_forward)(moe__rows_job *job);
    moe_status (*dispatch_backward)(moe__rows_job *job);
    moe_status (*combine_forward)(moe__rows_job *job);
    moe_status (*combine_backward)(moe__rows_job *job);
    /* out[r] of every row; combine makes y of them */
    moe_status (*experts_forward)(moe__experts_job *job);
    /* entry_weight_grad, parameter gradients and dx_rows; dispatch_backward makes dx of them */
    moe_status (*experts_backward)(moe__experts_job *job);
    /* dy_out[t] = dy[t] * y (1 - y), dense [T,O]; tokens_in = dy, tokens_saved = y, tokens_out */
    moe_status (*output_backward)(moe__rows_job *job);
    /* NULL: this backend has no panels */
    moe_status (*matrices_copy)(const moe__copy_job *job);
    /* Rows that travel between ranks: travel.h. unique: the tokens of each node. order: the plan
     * of what came. merge, entry_grad: what came back, in the order of this rank's plan. drop: rows
     * that do not stay */
    moe_status (*travel_pack)(const moe__pack_job *job);
    moe_status (*travel_unique)(const moe__unique_job *job);
    moe_status (*travel_order)(const moe__order_job *job);
    moe_status (*travel_merge)(const moe__merge_job *job);
    moe_status (*travel_entry_grad)(const moe__entry_grad_job *job);
    moe_status (*travel_drop)(const moe__drop_job *job);
    /* Headers of blocks that go, and of those that came. NULL: of a backend on the host */
    moe_status (*travel_write_blocks)(const moe__blocks_job *job);
    moe_status (*travel_read_blocks)(const moe__blocks_job *job);
    /* parts[0][i] += parts[1][i] + ... one after the other, count arrays of n elements of a dtype,
     * MOE_DTYPE_F64 included; 16 bits are rounded once */
    moe_status (*travel_add)(const moe__workers *workers, void *parts, int64_t n, int64_t count,
                             int32_t dtype);
    /* Sums of a batch as a vector of doubles, or with `put` from one, in an order that is the
     * backend's: all, or with `partial` what of losses is formed group by group. *count: of them */
    moe_status (*loss_sums)(moe__losses_job *job, double *numbers, bool partial, bool put,
                            int64_t *count);
} moe__backend;

enum { MOE__SUM_SLOTS = 16 }; /* doubles of moe__losses_job.sums; the backend numbers them */

/* Every CPU table of this build, or NULL where the compiler cannot make it. src/cpu/table.c */
const moe__backend *moe__cpu_backend(int32_t isa, int32_t dtype);
/* The best MOE_ISA_* that this machine and this build have. */
int32_t moe__cpu_best_isa(void);

MOE_END_DECLS

#endif
