/* pass_state.h - what a pass holds, and how its memory is cut.
 *
 * A pass keeps the jobs it gave to the backend in its forward; the backward hands them back, so
 * that everything a backward needs is here and nowhere else. */
#ifndef MOE_PASS_STATE_H
#define MOE_PASS_STATE_H

#include "internal.h"
#include "ranks.h"

/* Every flag of a forward. */
enum {
    MOE__FORWARD_FLAGS = MOE_FORWARD_TRAIN | MOE_FORWARD_NO_SAVE | MOE_FORWARD_PLAN_ONLY |
                         MOE_FORWARD_RECOMPUTE | MOE_FORWARD_ADD
};

enum {
    MOE__PASS_EMPTY = 0, /* before the first forward, after reserve */
    MOE__PASS_PLAN = 1,  /* a forward that kept the routing only */
    MOE__PASS_SAVED = 2, /* ready for a backward */
    MOE__PASS_FAILED = 3 /* a forward or backward failed in the middle */
};

enum { MOE__USE_GATE = 1, MOE__USE_EXPERTS = 2, MOE__USE_LAYER = 4 };

/* The shared experts or the residual branch of a layer: a pool that every token visits. */
typedef struct moe__branch {
    moe_experts *experts;  /* NULL: not there */
    moe__plan_arrays plan; /* every token to every expert */
    moe__experts_job job;
    void *entry_grad;       /* [N] by the plan's weights; NULL: they are 1 */
    int64_t *segment_begin; /* [E G + 1] rows of each expert's token groups */
} moe__branch;

/* Checked arguments of a forward: strides and defaults resolved. */
typedef struct moe__forward {
    moe_forward_args a;
    const double *weights; /* of the losses */
    int64_t top_k;
    int64_t entries; /* -1: known when the gate has run, see moe__run_forward */
    int32_t uses;    /* MOE__USE_* */
    bool route;      /* the gate runs */
    bool replay;     /* the plan is there already: handed in, or kept for a recompute */
    bool own_plan;   /* it is the pass's own */
    bool everyone;   /* no gate and no plan: every token to the one expert */
    bool recompute;
} moe__forward;

/* How far a call is. */
enum { MOE__PHASE_NONE = 0, MOE__PHASE_STARTED = 1, MOE__PHASE_WORKED = 2 };

/* The call that a pass is in. */
typedef struct moe__call {
    moe__forward f;      /* of the last forward */
    moe_backward_args b; /* of the last backward */
    const moe__backend *kernels;
    int32_t phase; /* MOE__PHASE_* */
    int32_t save;  /* activations are kept */
} moe__call;

struct moe_pass {
    moe_context *context;
    moe__workers workers; /* of the call: every job's */
    moe_layer *layer;     /* may be NULL */
    moe_gate *gate;       /* may be NULL */
    moe_experts *experts; /* may be NULL */
    char *memory;
    int64_t capacity; /* bytes of memory */
    int64_t used;     /* most bytes of it that a forward or reserve has needed */
    int32_t host_memory;
    int32_t state;
    int32_t uses;   /* MOE__USE_*: what the last forward ran over */
    int32_t routed; /* 1: its gate ran, 0: a plan with weights was replayed */
    int32_t gate_saw_x;
    int32_t logits_from_host;

    moe_plan plan;
    moe_plan primary;            /* of a hierarchical gate */
    int32_t primary_shown;       /* 1: moe_pass_primary_plan may show it */
    moe_gate_config gate_config; /* what it comes to in this call: see gate_call.c */
    moe__route_job route;
    moe__losses_job losses;
    moe__experts_job experts_job;
    moe__gate_backward_job gate_job;
    moe__branch shared, residual;
    moe__mix_job shared_mix, residual_mix;
    moe__ranks ranks;
    moe__call call;
    bool backward; /* the call is one */
    bool begun;    /* memory->begin has been called, and end has not */
    moe_pass_report report;
    double lap_from;
    moe__plan_arrays mixed; /* the plan with weights times the routed part's coefficient */
    const void *x;
    int64_t x_stride;
    const void *gate_x;
    int64_t gate_x_stride;
    void *y_saved;           /* [T,O], with a sigmoid on the layer's output */
    void *dy_inner;          /* [T,O], likewise */
    void *entry_grad;        /* [N] */
    void *plan_weight;       /* [N] weights before dropping */
    void *token_priority;    /* [T] or NULL */
    int64_t *second_begin;   /* [T top_groups + 1] entries of the second level's rows */
    int64_t *rows_of_expert; /* [E] */
    uint8_t *mask;           /* [T] copy */
    int64_t *valid_token, *valid_begin;
    int64_t *group_capacity;
    double weights[MOE_LOSS_SLOTS];
    double *results; /* [MOE_LOSS_SLOTS + MOE_STAT_SLOTS] losses, statistics; of backend memory */
    double *again;   /* the same of a recompute, which no one asks for */
};

/* The workers of a call of the pass that has not begun: those it has are the last call's. */
static inline moe__workers moe__call_workers(const moe_pass *pass, void *stream,
                                             const char *function)
{
    moe__workers w = pass->workers;
    w.function = function;
    w.stream = stream;
    return w;
}

/* Cuts `arena` into the arrays of `pass` for this shape; with a NULL base it counts. */
void moe__pass_layout(moe_pass *pass, moe__arena *arena, const moe__pass_shape *shape);

/* Bytes a pass of this shape needs, or -1 on overflow. */
int64_t moe__pass_shape_bytes(const moe_context *context, const moe__pass_shape *shape);

/* Makes room for the shape, keeping the plan at the front if `keep_plan`, in a call whose stream is
 * that of `call`; NULL: outside of one. Nothing changes on error. */
moe_status moe__pass_make_room(moe_pass *pass, const moe__pass_shape *shape, bool keep_plan,
                               const moe__workers *call, const char *function);

/* Frees the block, unless a transport may still touch it: some exchanges are of its arrays. */
void moe__pass_free_memory(moe_pass *pass);

/* Leaves the pass the memory of its plan, or none if it keeps no plan. Nothing changes on error. */
moe_status moe__pass_trim(moe_pass *pass, const char *function);

/* arguments.c: everything that can be wrong is found here, before anything is written. */
moe_status moe__forward_check(moe__forward *f, const moe_pass *pass, const moe_forward_args *args,
                              int32_t uses, const char *function);
moe_status moe__backward_check(moe_backward_args *b, const moe_pass *pass,
                               const moe_backward_args *args, int32_t uses, const char *function);

/* forward.c, backward.c: the steps over gate, experts or both, in phases or at once. A pass between
 * them is in pass->call. */
moe_status moe__forward_start(moe_pass *pass, const moe_forward_args *args, int32_t uses,
                              const char *function);
moe_status moe__forward_work(moe_pass *pass, const char *function);
moe_status moe__forward_finish(moe_pass *pass, const char *function);
moe_status moe__run_forward(moe_pass *pass, const moe_forward_args *args, int32_t uses,
                            const char *function);
moe_status moe__backward_start(moe_pass *pass, const moe_backward_args *args, int32_t uses,
                               const char *function);
moe_status moe__backward_work(moe_pass *pass, const char *function);
moe_status moe__backward_finish(moe_pass *pass, const char *function);
moe_status moe__run_backward(moe_pass *pass, const moe_backward_args *args, int32_t uses,
                             const char *function);
/* Of a pass that is destroyed in the middle of one: gate and pools are free again. */
void moe__backward_abandon(moe_pass *pass);

/* layer.c: what they share. */
/* MOE_ERROR_INVALID_STATE in the middle of a call. */
moe_status moe__pass_check_idle(const moe_pass *pass, const char *function);
/* Likewise, and with no exchange left for another call. */
moe_status moe__pass_check_start(const moe_pass *pass, int32_t uses, const char *function);
/* What the steps of a call share: the public function, for messages, and its stream. */
void moe__set_workers(moe_pass *pass, const char *function, void *stream);
moe_status moe__fail_on_ranks(moe_pass *pass, int32_t uses, moe_status status,
                              const char *function);
/* The same of a call that is refused before its first phase, with the stream that it was given. */
moe_status moe__refuse_on_ranks(moe_pass *pass, int32_t uses, moe_status status,
                                const char *function, void *stream);
/* What begins and ends every phase but a start's checks; leaving, the ranks hear of a failure. What
 * entering returns must be handed to leaving, whether the phase ran or not. */
moe_status moe__enter_phase(moe_pass *pass, const char *function, void *stream, fenv_t *saved);
moe_status moe__leave_phase(moe_pass *pass, int32_t uses, moe_status status, const char *function,
                            const fenv_t *saved);
/* The report: begins a call, goes on after the host had its turn, and gives the time since the last
 * of these to MOE_TIME_*. */
void moe__begin_report(moe_pass *pass);
void moe__continue_report(moe_pass *pass);
void moe__lap(moe_pass *pass, int slot);

/* The shape for a batch; weights are the losses'. layer NULL: the defaults. pass_layout.c */
moe__pass_shape moe__pass_shape_of(const moe_gate_config *gate, const moe__experts_room *experts,
                                   const moe_layer_config *layer, const double *weights, bool route,
                                   bool replay, uint64_t flags);

/* Checks of configs, shared by create and the cost queries. experts: resolves d_out and reads the
 * callbacks. */
moe_status moe__gate_config_check(const moe_gate_config *config, const char *function);
moe_status moe__experts_config_check(moe_experts_config *config, moe_expert_callbacks *callbacks,
                                     const char *function);
moe_status moe__layer_config_check(const moe_layer_config *config, const char *function);

moe__experts_room moe__experts_room_of(const moe_experts_config *config,
                                       const moe_expert_callbacks *callbacks);

/* The operands of a pool's parameters; data (packed: weights of the copy), or gradients.
 * storage.c */
void moe__experts_operands(const moe_experts *experts, moe__experts_job *job, bool packed);
void moe__experts_gradients(const moe_experts *experts, moe__experts_job *job, bool wanted);

/* The rooms of a layer's branches. pass_layout.c */
void moe__pass_shape_branches(moe__pass_shape *shape, const moe_pass *pass);

/* gate_config.c */
/* A gate config's weights as an array. */
void moe__gate_loss_weights(const moe_gate_config *config, double weights[MOE_LOSS_SLOTS]);
const char *moe__gate_kind_name(int32_t kind);

/* gate_call.c: a gate in one call. */
/* Whether its experts take tokens, so that the entries of a token vary. */
bool moe__gate_takes_tokens(const moe_gate_config *config);
bool moe__gate_is_noisy(const moe_gate_config *config);
/* The largest top_k, and the entries of a token with this one: of kinds where they vary their
 * mean. */
int64_t moe__gate_most_k(const moe_gate_config *config);
int64_t moe__gate_entries_per_token(const moe_gate_config *config, int64_t top_k);
/* What the kernels see. */
moe_gate_config moe__gate_config_of_call(const moe_gate_config *config, int64_t top_k);
/* Entries of a gate whose experts take tokens, or -1; and the most that any gate makes of a batch,
 * or -1. Under the default floating-point environment. */
int64_t moe__gate_entries_taken(const moe_gate_config *config, const moe_forward_args *args,
                                int64_t top_k);
int64_t moe__gate_most_entries(const moe_gate_config *config, int64_t tokens, int64_t groups,
                               int64_t top_k, bool train);
/* Whether an expert takes a limited number of rows in this call. */
bool moe__gate_is_limited(const moe_gate_config *config, const moe_forward_args *args);
/* The jobs of the steps. Plan, mask and primary plan are laid out. */
void moe__gate_fill_batch(const moe_pass *pass, const moe__forward *f, moe__batch_job *job);
void moe__gate_fill_route(moe_pass *pass, const moe__forward *f);
void moe__gate_fill_rows(moe_pass *pass, const moe__forward *f, moe__plan_rows_job *rows);
void moe__gate_fill_losses(moe_pass *pass, const moe__forward *f);
/* The strided operands of its parameters; data, or gradients. */
void moe__gate_operands(const moe_gate *gate, moe__route_job *job);
void moe__gate_gradients(const moe_gate *gate, moe__route_job *job, moe__gate_backward_job *back,
                         bool wanted);

/* branch.c: shared experts, residual branch and their coefficients. */
/* Finds the coefficients and the branches' plans; *routed is then the plan of the routed
 * experts. */
moe_status moe__branches_begin(moe_pass *pass, const moe__forward *f, const moe__backend *kernels,
                               const moe__plan_arrays **routed);
/* Runs their experts. */
moe_status moe__branches_work(moe_pass *pass, const moe__backend *kernels);
/* Adds the branches to y, where `routed` has put the routed part; then a sigmoid if asked, and a
 * copy of the result in `saved`, or NULL. */
moe_status moe__branches_forward(moe_pass *pass, const moe__rows_job *routed, bool sigmoid,
                                 void *saved, const moe__backend *kernels);
/* Runs their experts' backward. */
moe_status moe__branches_work_backward(moe_pass *pass, bool want_dx, const moe__backend *kernels);
/* After the routed experts: adds to dx and to the parameter gradients, and makes entry_grad that by
 * the plan's weights. */
moe_status moe__branches_backward(moe_pass *pass, const moe_backward_args *b,
                                  const moe__backend *kernels);
static inline bool moe__pass_has_branches(const moe_pass *pass, int32_t uses)
{
    return (uses & MOE__USE_LAYER) && (pass->shared.experts || pass->residual.experts);
}

/* Whether every expert has padded_rows rows, used or not, in the backend's memory. */
static inline bool moe__pass_is_padded(const moe_pass *pass, int32_t uses)
{
    return (uses & MOE__USE_LAYER) && !pass->context->memory->is_host &&
           pass->layer->config.exchange == MOE_EXCHANGE_PADDED;
}

/* Whether rows of a layer on ranks travel in blocks that the host does not wait for. */
static inline bool moe__ranks_blind(const moe_pass *pass)
{
    const moe_layer *layer = pass->layer;
    return layer && layer->where && layer->config.exchange == MOE_EXCHANGE_PADDED &&
           !pass->context->memory->is_host && moe__comm_takes(layer->comm, pass->context);
}

/* Whether a call of the pass must know on the host how many rows its experts have. */
static inline bool moe__pass_counts_rows(const moe_pass *pass, int32_t uses)
{
    bool ranks = (uses & MOE__USE_LAYER) && pass->layer->where;
    bool known = ranks ? moe__ranks_blind(pass) : moe__pass_is_padded(pass, uses);
    return (uses & MOE__USE_EXPERTS) && !known;
}

/* Rows of a pool for `entries` entries. pass_layout.c */
void moe__lay_out_experts(moe__experts_job *e, moe__arena *arena, const moe__experts_room *c,
                          int64_t entries, bool save, int32_t dtype);

/* Experts on several ranks. After a failure of any of these the call ends by moe__fail_on_ranks. */
static inline bool moe__pass_has_ranks(const moe_pass *pass, int32_t uses)
{
    return (uses & MOE__USE_LAYER) && pass->layer->where;
}
static inline moe_comm *moe__pass_comm(const moe_pass *pass) { return pass->layer->comm; }

/* ranks_words.c: before rows move. */
/* Memory that a pass needs to take part at all. */
moe_status moe__ranks_prepare(moe_pass *pass, const char *function);
/* All ranks go on with a forward, or none does. *dropped: slot_of_entry of some entries is -1 now,
 * for which there was no room. save: a backward will come */
moe_status moe__ranks_agree(moe_pass *pass, bool save, bool *dropped, const char *function);
/* The counts of the plan, which is another now. */
moe_status moe__ranks_count(moe_pass *pass);
/* All ranks begin a backward, or none does and nothing has been written. */
moe_status moe__ranks_agree_backward(moe_pass *pass, const char *function);
/* A call that fails with `status` before it has reached the others still takes part, so that all
 * ranks return an error and none waits. Returns `status`, or why the others were not told. */
moe_status moe__ranks_decline(moe_pass *pass, bool backward, moe_status status,
                              const char *function);
moe_status moe__ranks_decline_padded(moe_pass *pass, bool backward, moe_status status);
/* What a rank says first, and whether what another said is good. */
void moe__ranks_header(const moe_pass *pass, bool backward, moe_status status, int64_t *words);
moe_status moe__ranks_check_header(moe_pass *pass, int64_t rank, bool backward,
                                   const int64_t *words, const char *function);

/* ranks.c: the rows. A forward makes ranks.back_rows, the outputs of the plan's rows; a backward
 * makes what moe__experts_rows_backward does for experts_job, in ranks.back_rows the dx of the
 * rows. */
moe_status moe__ranks_send(moe_pass *pass);
moe_status moe__ranks_work(moe_pass *pass, const moe__backend *kernels, const char *function);
moe_status moe__ranks_receive(moe_pass *pass);
moe_status moe__ranks_send_backward(moe_pass *pass);
moe_status moe__ranks_check_backward(moe_pass *pass, const char *function);
moe_status moe__ranks_work_backward(moe_pass *pass, const moe__backend *kernels);
moe_status moe__ranks_receive_backward(moe_pass *pass);
/* ranks_blind.c: what an earlier call on ranks that nobody waited for came to, once; MOE_OK in all
 * other cases. What the last one has come to so far, after a wait. Rows of an expert among
 * back_rows, used or not; 0: only those used. */
moe_status moe__ranks_earlier(moe_pass *pass, const char *function);
moe_status moe__ranks_look(const moe_pass *pass, const char *function);
int64_t moe__ranks_padding(const moe_pass *pass);
/* Gives up what is in flight, and ends the waits of the others. */
void moe__ranks_abort(moe_pass *pass);
/* After a failure: gives up what is in flight, and ends the waits of the others if they do not know
 * of it. */
moe_status moe__ranks_stop(moe_pass *pass, moe_status status);

/* ranks_exchange.c: chunks that rows travel in; 1 where they go through the host's memory. */
int64_t moe__ranks_chunks(const moe_pass *pass);

/* ranks_second.c: makes the gate's jobs ask other ranks for what secondary gates there do. */
void moe__second_hook(moe_pass *pass, int32_t uses);

/* ranks_memory.c */
/* Frees memory that exchanges of a layer may have used, unless a transport may still touch it.
 * config: NULL of what is of no layer. */
void moe__layer_free(const moe_layer_config *config, moe_context *context, void *memory,
                     int64_t bytes);
void moe__ranks_free(moe_pass *pass);
/* With max_received: memory for as many rows as may come, and for this rank's `entries`, if the
 * pass has less; else none. The pass's rows are where they were until it takes it, or forgets
 * it. */
moe_status moe__ranks_set_aside(moe_pass *pass, int64_t entries, moe__room *room,
                                const char *function);
void moe__ranks_take_memory(moe_pass *pass, const moe__room *room);
void moe__ranks_forget_memory(moe_pass *pass, moe__room *room);
/* What a pass has for ranks. */
int64_t moe__ranks_bytes(const moe_pass *pass);
/* Gives back the rows. */
void moe__ranks_trim(moe_pass *pass);

/* share.c: losses and statistics of all ranks' tokens. */
/* Numbers of scratch for P ranks, E experts and `parts` groups of a hierarchical gate; or -1. */
int64_t moe__share_numbers(int64_t P, int64_t E, int64_t parts);
/* The same of a layer's ranks at most; 0 if they do not share. */
int64_t moe__share_most(const moe_layer *layer);
/* Takes part for a rank that declines. */
moe_status moe__share_nothing(moe_pass *pass);
/* Ranks that share, or 0. */
int32_t moe__share_ranks(const moe_layer *layer);
/* Makes the job share, if the layer does. */
void moe__share_losses(moe_pass *pass, int32_t uses);

/* ranks_grid.c */
/* Arrays of a grid of P ranks; what each rank is in it, `apart` words from one to the next; with
 * others that disagree it is refused on every rank. */
void moe__grid_lay_out(moe__grid *grid, moe__arena *arena, int64_t P);
moe_status moe__grid_find(moe__placement *where, const moe_layer_config *config,
                          const int64_t *node, const int64_t *number, int64_t apart,
                          const char *function);

/* ranks_join.c */
/* Compares the layers of a group and finds where the experts are; on every rank at once. */
moe_status moe__ranks_join(moe_layer *layer, const char *function);
/* Whether the layer's rows go through an exchange. */
bool moe__ranks_travels(const moe_layer_config *config);
/* A layer that is not made after all tells the others. Returns `status`. */
moe_status moe__ranks_join_failed(const moe_layer_config *config, moe_status status,
                                  const char *function);
void moe__ranks_leave(moe_layer *layer);
/* The number of this rank's expert `index` among those of all ranks. */
static inline int64_t moe__expert_number(const moe_layer *layer, int64_t index)
{
    const moe__placement *w = layer->where;
    return w ? w->number_of_slot[w->first_slot[layer->comm->rank] + index] : index;
}

/* Experts of the gate or pool of a pass, on all ranks. */
/* Of tokens and rows; the plan's is that of what is computed with. */
static inline int32_t moe__pass_dtype(const moe_pass *pass)
{
    return pass->gate ? pass->gate->config.dtype : pass->experts->config.dtype;
}
static inline int64_t moe__pass_experts(const moe_pass *pass)
{
    if (pass->layer) return pass->layer->num_experts;
    return pass->gate ? pass->gate->config.num_experts : pass->experts->config.num_experts;
}

/* experts_step.c: the rows of a pool, part by part. `job` was laid out for the pool's room.
 * forward: job has plan and x; makes out. */
moe_status moe__experts_rows_forward(const moe_experts *experts, moe__experts_job *job,
                                     const moe__backend *kernels);
/* Makes combine multiply and sum the rows of `job`: plan, width, rows_in and weights. */
void moe__experts_combine(const moe_experts *experts, const moe__experts_job *job,
                          moe__rows_job *combine);
/* backward: job has plan, x, dy, overwrite, parameters (0: no gradient by any) and
 * entry_weight_grad, or NULL; makes that for all entries, parameter gradients and, if `want_dx`,
 * dx_rows. */
moe_status moe__experts_rows_backward(moe_experts *experts, moe__experts_job *job, bool want_dx,
                                      const moe__backend *kernels);

#endif
