/* pass_layout.c - the memory of a pass: one block, cut into arrays for one shape of batch.
 *
 * The plan comes first, so that it stays where it is when a recompute makes the block larger. Every
 * size grows with T, N, E and G, so a block for the largest batch serves all smaller ones. */
#include "pass_state.h"

#include <string.h>

enum { RESULTS = MOE_LOSS_SLOTS + MOE_STAT_SLOTS };

/* Whether only experts of the best groups may be chosen. */
static bool group_limited(const moe_gate_config *c)
{
    return c->kind == MOE_GATE_TOP_K && c->top_groups < c->expert_groups;
}

/* Whether the choice needs a matrix of its own. */
static bool needs_scores(const moe_gate_config *c)
{
    return c->selection_bias || group_limited(c) || c->choice_noise ||
           c->kind == MOE_GATE_SINKHORN || moe__gate_takes_tokens(c);
}

/* Rows, candidates and entries of a level. */
typedef struct level_size {
    int64_t rows, width, entries, parts;
} level_size;

static void find_levels(const moe__pass_shape *s, level_size size[2])
{
    const moe_gate_config *c = s->gate;
    int64_t groups = moe__mul(s->tokens, c->top_groups);
    size[0] = (level_size){s->tokens, s->num_experts, s->entries, 1};
    size[1] = (level_size){0, 0, 0, 0};
    if (c->kind != MOE_GATE_HIERARCHICAL) return;
    size[0] = (level_size){s->tokens, c->expert_groups, groups, 1};
    size[1] = (level_size){groups, c->num_experts / c->expert_groups, s->entries, c->expert_groups};
}

/* Elements of the larger level's matrix, or -1. */
static int64_t largest_matrix(const level_size size[2])
{
    int64_t first = moe__mul(size[0].rows, size[0].width);
    int64_t second = moe__mul(size[1].rows, size[1].width);
    return first < 0 || second < 0 ? -1 : moe__max(first, second);
}

static void lay_out_level(moe__gate_level *l, moe__arena *arena, const moe__pass_shape *s,
                          const level_size *size, int64_t real_size)
{
    int64_t matrix = moe__mul(size->rows, size->width);
    bool logits = s->gate->kind != MOE_GATE_HASH || s->gate->d_model > 0 || s->logits_in;
    bool two = s->gate->kind == MOE_GATE_HIERARCHICAL;
    l->logits = logits ? moe__arena_take(arena, matrix, real_size) : NULL;
    l->noisy = s->noise ? moe__arena_take(arena, matrix, real_size) : l->logits;
    l->noise_raw = s->noise ? moe__arena_take(arena, matrix, real_size) : NULL;
    l->noise_std = s->noise ? moe__arena_take(arena, matrix, real_size) : NULL;
    l->noise = s->noise ? moe__arena_take(arena, matrix, real_size) : NULL;
    l->kth = moe__gate_is_noisy(s->gate)
                 ? moe__arena_take(arena, moe__mul(size->rows, 2), sizeof *l->kth)
                 : NULL;
    if (!two) return; /* else they are the plan's */
    l->choice = moe__arena_take(arena, size->entries, sizeof *l->choice);
    l->weight = moe__arena_take(arena, size->entries, real_size);
}

static void lay_out_route(moe_pass *pass, moe__arena *arena, const moe__pass_shape *s,
                          int64_t real_size)
{
    const moe_gate_config *c = s->gate;
    moe__route_job *r = &pass->route;
    bool two = c->kind == MOE_GATE_HIERARCHICAL, sinkhorn = c->kind == MOE_GATE_SINKHORN;
    bool limited = group_limited(c);
    level_size size[2];
    find_levels(s, size);
    r->levels = two ? 2 : 1;
    for (int32_t i = 0; i < r->levels; i++)
        lay_out_level(&r->level[i], arena, s, &size[i], real_size);
    r->x_jittered = s->jitter ? moe__arena_take(arena, moe__mul(s->tokens, c->d_model), real_size)
                              : NULL;
    pass->token_priority = s->priority ? moe__arena_take(arena, s->tokens, real_size) : NULL;
    r->group_score = limited
                         ? moe__arena_take(arena, moe__mul(s->tokens, c->expert_groups), real_size)
                         : NULL;
    r->group_ids = limited ? moe__arena_take(arena, moe__mul(s->tokens, c->top_groups),
                                             sizeof *r->group_ids)
                           : NULL;
    r->taken = moe__gate_takes_tokens(c) ? moe__arena_take(arena, s->entries, sizeof *r->taken)
                                         : NULL;
    r->column_factor = sinkhorn ? moe__arena_take(arena, moe__mul(3, s->num_experts),
                                                  sizeof *r->column_factor)
                                : NULL;
    r->row_factor = sinkhorn ? moe__arena_take(arena, s->tokens, sizeof *r->row_factor) : NULL;
    r->tile_begin = moe__arena_take(arena, moe__add(two ? c->expert_groups : 1, 1),
                                    sizeof *r->tile_begin);
    r->columns = needs_scores(c) ? pass->losses.columns : NULL;
    pass->second_begin = two ? moe__arena_take(arena, moe__add(size[1].rows, 1),
                                               sizeof *pass->second_begin)
                             : NULL;
}

/* Of the routing, before everything that depends on how it is used, so that it stays where it
 * is. */
static void lay_out_primary(moe_pass *pass, moe__arena *arena, const moe__pass_shape *s)
{
    const moe_gate_config *c = s->gate;
    moe__plan_layout(&pass->primary.a, arena, s->tokens, moe__mul(s->tokens, c->top_groups),
                     c->expert_groups, s->groups, moe__real_dtype(s->dtype));
}

static void lay_out_losses(moe_pass *pass, moe__arena *arena, const moe__pass_shape *s,
                           int64_t real_size)
{
    moe__losses_job *l = &pass->losses;
    int64_t E = s->num_experts, by_group = moe__mul(s->groups, E), columns = 0;
    bool two = s->gate && s->route && s->gate->kind == MOE_GATE_HIERARCHICAL;
    bool scoped = s->softmax_losses && s->gate->loss_scope == MOE_LOSS_SCOPE_GROUP;
    l->importance = moe__arena_take(arena, E, sizeof *l->importance);
    l->load = moe__arena_take(arena, E, sizeof *l->load);
    l->counts = moe__arena_take(arena, E, sizeof *l->counts);
    l->first_counts = moe__arena_take(arena, E, sizeof *l->first_counts);
    l->token_value = moe__arena_take(arena, s->tokens, sizeof *l->token_value);
    l->sums = moe__arena_take(arena, MOE__SUM_SLOTS, sizeof *l->sums);
    l->primary_load = two ? moe__arena_take(arena, s->gate->expert_groups, sizeof *l->primary_load)
                          : NULL;
    l->part_load = two ? moe__arena_take(arena, E, sizeof *l->part_load) : NULL;
    l->scoped = scoped;
    l->scopes = scoped ? s->groups : 1;
    l->scope_counts = scoped ? moe__arena_take(arena, by_group, sizeof *l->scope_counts) : NULL;
    l->scope_first = scoped ? moe__arena_take(arena, by_group, sizeof *l->scope_first) : NULL;
    l->score_sum = s->softmax_losses
                       ? moe__arena_take(arena, scoped ? by_group : E, sizeof *l->score_sum)
                       : NULL;
    l->sequence_sum = s->sequence ? moe__arena_take(arena, by_group, sizeof *l->sequence_sum)
                                  : NULL;
    l->sequence_counts = s->sequence ? moe__arena_take(arena, by_group, sizeof *l->sequence_counts)
                                     : NULL;
    l->sequence_scale = s->sequence ? moe__arena_take(arena, s->groups, sizeof *l->sequence_scale)
                                    : NULL;
    l->plain_ids = s->plain_counts
                       ? moe__arena_take(arena, moe__mul(s->tokens, s->top_k), sizeof *l->plain_ids)
                       : NULL;
    l->over_taken = s->threshold ? moe__arena_take(arena, E, sizeof *l->over_taken) : NULL;
    int64_t parts = two ? s->gate->expert_groups : 0;
    l->part_rows = two ? moe__arena_take(arena, parts, sizeof *l->part_rows) : NULL;
    l->rows_of_expert = pass->rows_of_expert;
    l->shared = s->share_ranks > 0
                    ? moe__arena_take(arena, moe__share_numbers(s->share_ranks, E, parts),
                                      sizeof *l->shared)
                    : NULL;
    if (s->columns) {
        level_size size[2];
        find_levels(s, size);
        columns = largest_matrix(size);
    }
    l->columns = s->columns ? moe__arena_take(arena, columns, real_size) : NULL;
}

/* Matrices that a level's backward is done with before the next begins: one for the larger. */
static void lay_out_level_matrices(moe__route_job *r, moe__arena *arena, const moe__pass_shape *s,
                                   const level_size size[2], int64_t real_size)
{
    int64_t matrix = largest_matrix(size);
    void *d_logits = moe__arena_take(arena, matrix, real_size);
    void *d_noisy = moe__arena_take(arena, matrix, real_size);
    void *d_noise_raw = s->noise ? moe__arena_take(arena, matrix, real_size) : NULL;
    for (int32_t i = 0; i < r->levels; i++) {
        r->level[i].d_logits = d_logits;
        r->level[i].d_noisy = d_noisy;
        r->level[i].d_noise_raw = d_noise_raw;
    }
}

static void lay_out_level_backward(moe__gate_level *l, moe__arena *arena, const level_size *size,
                                   int64_t real_size)
{
    l->scores = moe__arena_take(arena, size->entries, real_size);
    l->d_load = moe__arena_take(arena, moe__mul(size->parts, size->width), sizeof *l->d_load);
}

static void lay_out_gate_backward(moe_pass *pass, moe__arena *arena, const moe__pass_shape *s,
                                  int64_t real_size)
{
    const moe_gate_config *c = s->gate;
    moe__gate_backward_job *b = &pass->gate_job;
    moe__route_job *r = &pass->route;
    bool scoped = c->loss_scope == MOE_LOSS_SCOPE_GROUP;
    level_size size[2];
    find_levels(s, size);
    b->d_weight = moe__arena_take(arena, s->entries, real_size);
    b->loss_factor = moe__arena_take(arena, MOE_LOSS_SLOTS, sizeof *b->loss_factor);
    lay_out_level_matrices(r, arena, s, size, real_size);
    for (int32_t i = 0; i < r->levels; i++) {
        lay_out_level_backward(&r->level[i], arena, &size[i], real_size);
        r->level[i].d_weight = r->levels == 1 ? b->d_weight
                                              : moe__arena_take(arena, size[i].entries, real_size);
    }
    if (r->levels == 2) {
        int64_t segments = moe__mul(size[1].parts, s->groups);
        r->level[1].segment_begin = moe__arena_take(arena, moe__add(segments, 1), sizeof(int64_t));
        r->level[1].dx_rows = moe__arena_take(arena, moe__mul(size[1].rows, c->d_model), real_size);
    }
    b->d_importance = moe__arena_take(arena, s->num_experts, sizeof *b->d_importance);
    b->d_load = moe__arena_take(arena, s->num_experts, sizeof *b->d_load);
    b->d_score = moe__arena_take(
        arena, scoped ? moe__mul(s->groups, s->num_experts) : s->num_experts, real_size);
    b->d_x_jittered = s->jitter ? moe__arena_take(arena, moe__mul(s->tokens, c->d_model), real_size)
                                : NULL;
}

void moe__lay_out_experts(moe__experts_job *e, moe__arena *arena, const moe__experts_room *c,
                          int64_t entries, bool save, int32_t dtype)
{
    int64_t size = moe__dtype_size(dtype), real_size = moe__dtype_size(moe__real_dtype(dtype));
    int64_t hidden = moe__mul(entries, c->d_hidden), output = moe__mul(entries, c->d_out);
    int64_t input = moe__mul(entries, c->d_model), bytes = c->workspace_per_row;
    e->z1 = moe__arena_take(arena, hidden, size);
    e->z3 = c->gated ? moe__arena_take(arena, hidden, size) : NULL;
    e->dh = save ? moe__arena_take(arena, hidden, size) : NULL;
    e->dz3 = save && c->gated ? moe__arena_take(arena, hidden, size) : NULL; /* after dh */
    e->h = !save ? e->z1 : c->keep_h ? moe__arena_take(arena, hidden, size) : e->dh;
    e->out = moe__arena_take(arena, output, size);
    e->weight_of_row = moe__arena_take(arena, entries, real_size);
    e->tile_begin = moe__arena_take(arena, moe__add(c->num_experts, 1), sizeof *e->tile_begin);
    e->tile_order = moe__arena_take(arena, c->num_experts, sizeof *e->tile_order);
    e->x_rows = c->x_rows ? moe__arena_take(arena, input, size) : NULL;
    e->workspace = bytes ? moe__arena_take(arena, entries, bytes) : NULL;
    e->combine_weight = c->combine_weight ? moe__arena_take(arena, entries, real_size) : NULL;
    if (!save) return;
    e->dz = c->dz ? moe__arena_take(arena, output, size) : NULL;
    e->dx_rows = moe__arena_take(arena, input, size);
}

/* Scratch of a worker, on a CPU the same whatever instruction set a context is restricted to. */
static int64_t most_worker_bytes(const moe_context *context, const moe__pass_shape *s)
{
    if (context && !context->memory->is_host) return context->kernels[s->dtype]->worker_bytes(s);
    int64_t plain = moe__cpu_backend(MOE_ISA_PLAIN, s->dtype)->worker_bytes(s);
    return moe__max(plain, moe__cpu_backend(moe__cpu_best_isa(), s->dtype)->worker_bytes(s));
}

/* A pool that every token visits, with all its experts. */
static void lay_out_branch(moe__branch *b, moe__arena *arena, const moe__experts_room *room,
                           const moe__pass_shape *s, bool weighted, int64_t real_size)
{
    int64_t entries = moe__mul(s->tokens, room->num_experts);
    moe__plan_layout(&b->plan, arena, s->tokens, entries, room->num_experts, s->groups,
                     moe__real_dtype(s->dtype));
    b->entry_grad = weighted && s->save ? moe__arena_take(arena, entries, real_size) : NULL;
    int64_t segments = moe__mul(room->num_experts, s->groups);
    b->segment_begin = s->save
                           ? moe__arena_take(arena, moe__add(segments, 1), sizeof *b->segment_begin)
                           : NULL;
    moe__lay_out_experts(&b->job, arena, room, entries, s->save, s->dtype);
}

/* Coefficients [T,width] of the layer. */
static void lay_out_mix(moe__mix_job *mix, moe__arena *arena, const moe__pass_shape *s,
                        int64_t width, int64_t real_size)
{
    int64_t count = moe__mul(s->tokens, width);
    mix->width = width;
    mix->coefficient = moe__arena_take(arena, count, real_size);
    mix->d_coefficient = s->save ? moe__arena_take(arena, count, real_size) : NULL;
    mix->tile_begin = moe__arena_take(arena, 2, sizeof *mix->tile_begin);
}

static void lay_out_branches(moe_pass *pass, moe__arena *arena, const moe__pass_shape *s,
                             int64_t real_size)
{
    if (s->shared) {
        lay_out_branch(&pass->shared, arena, s->shared, s, s->shared_gate, real_size);
        if (s->shared_gate) lay_out_mix(&pass->shared_mix, arena, s, 1, real_size);
    }
    if (!s->residual) return;
    lay_out_branch(&pass->residual, arena, s->residual, s, s->residual_mix, real_size);
    if (!s->residual_mix) return;
    lay_out_mix(&pass->residual_mix, arena, s, 2, real_size);
    pass->mixed.weight_of_entry = moe__arena_take(arena, s->entries, real_size);
}

void moe__pass_layout(moe_pass *pass, moe__arena *arena, const moe__pass_shape *s)
{
    int64_t real_size = moe__dtype_size(moe__real_dtype(s->dtype));
    int64_t worker_bytes = most_worker_bytes(pass->context, s);
    bool two = s->gate && s->route && s->gate->kind == MOE_GATE_HIERARCHICAL;
    moe__plan_layout(&pass->plan.a, arena, s->tokens, s->entries, s->num_experts, s->groups,
                     moe__real_dtype(s->dtype));
    pass->results = moe__arena_take(arena, RESULTS, sizeof *pass->results);
    if (two) lay_out_primary(pass, arena, s);
    pass->again = moe__arena_take(arena, RESULTS, sizeof *pass->again);
    pass->plan_weight = moe__arena_take(arena, s->entries, real_size);
    pass->rows_of_expert = moe__arena_take(arena, s->num_experts, sizeof *pass->rows_of_expert);
    pass->entry_grad = s->save ? moe__arena_take(arena, s->entries, real_size) : NULL;
    pass->mask = moe__arena_take(arena, s->tokens, 1);
    pass->valid_token = moe__arena_take(arena, s->tokens, sizeof *pass->valid_token);
    pass->valid_begin = moe__arena_take(arena, moe__add(s->groups, 1), sizeof *pass->valid_begin);
    pass->group_capacity = moe__arena_take(arena, s->groups, sizeof *pass->group_capacity);
    lay_out_losses(pass, arena, s, real_size);
    if (s->gate && s->route) lay_out_route(pass, arena, s, real_size);
    if (s->gate && s->route && s->save) lay_out_gate_backward(pass, arena, s, real_size);
    if (s->experts && !s->ranks) {
        int64_t rows = s->padded_rows > 0 ? moe__mul(s->padded_rows, s->experts->num_experts)
                                          : s->entries;
        pass->experts_job.padded_rows = s->padded_rows;
        moe__lay_out_experts(&pass->experts_job, arena, s->experts,
                             rows < 0 ? rows : moe__max(rows, s->entries), s->save, s->dtype);
    }
    lay_out_branches(pass, arena, s, real_size);
    int64_t output = s->experts ? moe__mul(s->tokens, s->experts->d_out) : 0;
    bool saved = s->experts && s->output_sigmoid && s->save;
    int64_t size = moe__dtype_size(s->dtype);
    pass->y_saved = saved ? moe__arena_take(arena, output, size) : NULL;
    pass->dy_inner = saved ? moe__arena_take(arena, output, size) : NULL;
    pass->workers.scratch = moe__arena_take(arena, s->threads, worker_bytes);
    pass->workers.worker_bytes = worker_bytes;
    moe__set_workers(pass, pass->workers.function, pass->workers.stream);
}

moe__pass_shape moe__pass_shape_of(const moe_gate_config *gate, const moe__experts_room *experts,
                                   const moe_layer_config *layer, const double *weights, bool route,
                                   bool replay, uint64_t flags)
{
    moe__pass_shape s;
    memset(&s, 0, sizeof s);
    bool noisy = gate && moe__gate_is_noisy(gate), train = (flags & MOE_FORWARD_TRAIN) != 0;
    bool plain = gate && gate->kind == MOE_GATE_TOP_K && !gate->choice_noise &&
                 !gate->selection_bias && gate->expert_groups == 1;
    s.gate = gate;
    s.experts = experts;
    s.dtype = gate ? gate->dtype : experts->dtype;
    s.num_experts = gate ? gate->num_experts : experts->num_experts;
    s.save = (flags & (MOE_FORWARD_NO_SAVE | MOE_FORWARD_PLAN_ONLY)) == 0;
    s.output_sigmoid = layer && layer->output == MOE_OUTPUT_SIGMOID;
    s.shared_gate = layer && layer->shared_gate;
    s.residual_mix = layer && layer->residual_mix;
    s.route = gate && route;
    if (!s.route) return s;
    s.noise = noisy && train;
    s.jitter = gate->jitter > 0 && train;
    s.logits_in = 1;
    s.softmax_losses = weights[MOE_LOSS_SWITCH] != 0 || weights[MOE_LOSS_GSHARD] != 0 ||
                       weights[MOE_LOSS_Z] != 0;
    s.sequence = weights[MOE_LOSS_SEQUENCE] != 0;
    s.threshold = weights[MOE_LOSS_THRESHOLD] != 0 && train && gate->kind == MOE_GATE_BALANCED;
    s.plain_counts = s.sequence && gate->sequence_counts == MOE_SEQUENCE_COUNTS_SCORES &&
                     (replay || !plain);
    s.columns = s.save || noisy || s.softmax_losses || s.sequence || s.threshold ||
                needs_scores(gate);
    s.priority = gate->drop_policy == MOE_DROP_BATCH_PRIORITY;
    return s;
}

void moe__pass_shape_branches(moe__pass_shape *shape, const moe_pass *pass)
{
    bool padded = moe__pass_is_padded(pass, MOE__USE_LAYER);
    shape->padded_rows = padded ? pass->layer->config.padded_rows : 0;
    shape->shared = pass->shared.experts ? &pass->shared.experts->room : NULL;
    shape->residual = pass->residual.experts ? &pass->residual.experts->room : NULL;
}

int64_t moe__pass_shape_bytes(const moe_context *context, const moe__pass_shape *shape)
{
    moe_pass scratch;
    moe__arena arena = {NULL, 0};
    memset(&scratch, 0, sizeof scratch);
    scratch.context = (moe_context *)(uintptr_t)context; /* read only */
    moe__pass_layout(&scratch, &arena, shape);
    return arena.used;
}

/* Lays out a plan of the sizes of `like` at the front of the block, and behind it the results of
 * its forward; returns their bytes, which is where the next array begins. */
static int64_t lay_out_plan(moe__plan_arrays *plan, double **results, char *base,
                            const moe__plan_arrays *like)
{
    moe__arena arena = {base, 0};
    moe__plan_layout(plan, &arena, like->tokens, like->entries, like->num_experts, like->groups,
                     like->dtype);
    plan->rows = like->rows;
    *results = moe__arena_take(&arena, RESULTS, sizeof **results);
    return arena.used;
}

static int64_t plan_bytes(const moe_pass *pass)
{
    moe__plan_arrays plan;
    double *results;
    return lay_out_plan(&plan, &results, NULL, &pass->plan.a);
}

void moe__pass_free_memory(moe_pass *pass)
{
    const moe__memory *where = pass->context->memory;
    if (where->is_host)
        moe__layer_free(pass->layer ? &pass->layer->config : NULL, pass->context, pass->memory,
                        pass->capacity);
    else
        where->free(pass->context, pass->memory, pass->capacity);
    pass->memory = NULL;
    pass->capacity = 0;
}

/* Moves the block to memory of another size with its first `keep` bytes, copied on the stream of
 * `call`; the old one lives until the new one is there. To give it back may wait for the stream,
 * and what a capture holds may use it. */
static moe_status move_to(moe_pass *pass, int64_t bytes, int64_t keep, const moe__workers *call,
                          const char *function)
{
    if (pass->host_memory)
        return moe__fail(MOE_ERROR_BUFFER_TOO_SMALL, function,
                         "the pass needs %lld bytes of workspace, the host gave %lld", (ll)bytes,
                         (ll)pass->capacity);
    const moe__memory *where = pass->context->memory;
    if (call && pass->memory && where->may_wait) MOE_TRY(where->may_wait(call));
    char *memory = where->alloc(pass->context, bytes, false);
    if (!memory)
        return moe__fail(MOE_ERROR_OUT_OF_MEMORY, function, "no %lld bytes for the pass",
                         (ll)bytes);
    moe_status status = call ? where->copy(call, memory, pass->memory, keep) : MOE_OK;
    if (status != MOE_OK) {
        where->free(pass->context, memory, bytes);
        return status;
    }
    moe__pass_free_memory(pass);
    pass->memory = memory;
    pass->capacity = bytes;
    return MOE_OK;
}

moe_status moe__pass_trim(moe_pass *pass, const char *function)
{
    if (pass->state == MOE__PASS_SAVED) return MOE_OK;
    moe__ranks_trim(pass); /* keeps what it needs to take part */
    if (pass->host_memory) return MOE_OK;
    if (pass->state == MOE__PASS_PLAN) {
        int64_t bytes = plan_bytes(pass);
        moe__workers call = pass->workers;
        call.function = function;
        if (bytes < pass->capacity) MOE_TRY(move_to(pass, bytes, bytes, &call, function));
        moe__plan_arrays kept = pass->plan.a;
        (void)lay_out_plan(&pass->plan.a, &pass->results, pass->memory, &kept);
    } else {
        moe__pass_free_memory(pass);
        pass->state = MOE__PASS_EMPTY;
        pass->uses = 0;
    }
    /* What moe_pass_tensor would show lay in the part that is gone. */
    pass->losses.importance = pass->losses.load = NULL;
    pass->losses.counts = pass->rows_of_expert = NULL;
    pass->losses.primary_load = NULL;
    pass->primary_shown = 0;
    return MOE_OK;
}

moe_status moe__pass_make_room(moe_pass *pass, const moe__pass_shape *shape, bool keep_plan,
                               const moe__workers *call, const char *function)
{
    int64_t bytes = moe__pass_shape_bytes(pass->context, shape);
    int64_t rows = pass->plan.a.rows;
    if (bytes < 0)
        return moe__fail(MOE_ERROR_OVERFLOW, function,
                         "the pass for %lld tokens is larger than the address space",
                         (ll)shape->tokens);
    if (bytes > pass->capacity)
        MOE_TRY(move_to(pass, bytes, keep_plan ? plan_bytes(pass) : 0, call, function));
    moe__arena arena = {pass->memory, 0};
    moe__pass_layout(pass, &arena, shape);
    pass->used = moe__max(pass->used, bytes);
    pass->plan.a.rows = keep_plan ? rows : 0;
    return MOE_OK;
}
