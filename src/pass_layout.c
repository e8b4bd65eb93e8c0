/* pass_layout.c - the memory of a pass: one block, cut into arrays for one shape of batch.
 *
 * The plan comes first, so that it stays where it is when a recompute makes the block larger. Every
 * size grows with T, N, E and G, so a block for the largest batch serves all smaller ones. */
#include "pass_state.h"

#include <string.h>

static void lay_out_route(moe_pass *pass, moe__arena *arena, const moe__pass_shape *s,
                          int64_t real_size)
{
    moe__route_job *r = &pass->route;
    int64_t matrix = moe__mul(s->tokens, s->num_experts);
    r->logits = moe__arena_take(arena, matrix, real_size);
    r->noisy = s->noise ? moe__arena_take(arena, matrix, real_size) : r->logits;
    r->noise_raw = s->noise ? moe__arena_take(arena, matrix, real_size) : NULL;
    r->noise_std = s->noise ? moe__arena_take(arena, matrix, real_size) : NULL;
    r->noise = s->noise ? moe__arena_take(arena, matrix, real_size) : NULL;
    r->kth = s->gate->kind == MOE_GATE_NOISY_TOP_K
                 ? moe__arena_take(arena, moe__mul(s->tokens, 2), sizeof *r->kth)
                 : NULL;
    r->tile_begin = moe__arena_take(arena, 2, sizeof *r->tile_begin);
}

static void lay_out_losses(moe_pass *pass, moe__arena *arena, const moe__pass_shape *s,
                           int64_t real_size)
{
    moe__losses_job *l = &pass->losses;
    int64_t E = s->num_experts, by_group = moe__mul(s->groups, E);
    l->importance = moe__arena_take(arena, E, sizeof *l->importance);
    l->load = moe__arena_take(arena, E, sizeof *l->load);
    l->counts = moe__arena_take(arena, E, sizeof *l->counts);
    l->first_counts = moe__arena_take(arena, E, sizeof *l->first_counts);
    l->token_value = moe__arena_take(arena, s->tokens, sizeof *l->token_value);
    l->score_sum = s->columns ? moe__arena_take(arena, E, sizeof *l->score_sum) : NULL;
    l->columns = s->columns ? moe__arena_take(arena, moe__mul(s->tokens, E), real_size) : NULL;
    l->sequence_sum = s->sequence ? moe__arena_take(arena, by_group, sizeof *l->sequence_sum)
                                  : NULL;
    l->sequence_counts = s->sequence ? moe__arena_take(arena, by_group, sizeof *l->sequence_counts)
                                     : NULL;
    l->sequence_scale = s->sequence ? moe__arena_take(arena, s->groups, sizeof *l->sequence_scale)
                                    : NULL;
    l->plain_ids = s->plain_counts
                       ? moe__arena_take(arena, moe__mul(s->tokens, s->top_k), sizeof *l->plain_ids)
                       : NULL;
}

static void lay_out_gate_backward(moe_pass *pass, moe__arena *arena, const moe__pass_shape *s,
                                  int64_t real_size)
{
    moe__gate_backward_job *b = &pass->gate_job;
    int64_t matrix = moe__mul(s->tokens, s->num_experts);
    b->d_weight = moe__arena_take(arena, s->entries, real_size);
    b->scores = moe__arena_take(arena, s->entries, real_size);
    b->d_logits = moe__arena_take(arena, matrix, real_size);
    b->d_noisy = moe__arena_take(arena, matrix, real_size);
    b->d_noise_raw = s->noise ? moe__arena_take(arena, matrix, real_size) : NULL;
    b->d_importance = moe__arena_take(arena, s->num_experts, sizeof *b->d_importance);
    b->d_load = moe__arena_take(arena, s->num_experts, sizeof *b->d_load);
    b->d_score = moe__arena_take(arena, s->num_experts, real_size);
}

/* Rows of a pool for `entries` entries. */
static void lay_out_experts(moe__experts_job *e, moe__arena *arena, const moe__experts_room *c,
                            int64_t entries, bool save, int64_t real_size)
{
    int64_t hidden = moe__mul(entries, c->d_hidden), output = moe__mul(entries, c->d_out);
    int64_t input = moe__mul(entries, c->d_model), bytes = c->workspace_per_row;
    e->z1 = moe__arena_take(arena, hidden, real_size);
    e->z3 = c->gated ? moe__arena_take(arena, hidden, real_size) : NULL;
    e->h = save ? moe__arena_take(arena, hidden, real_size) : e->z1;
    e->out = moe__arena_take(arena, output, real_size);
    e->weight_of_row = moe__arena_take(arena, entries, real_size);
    e->tile_begin = moe__arena_take(arena, moe__add(c->num_experts, 1), sizeof *e->tile_begin);
    e->x_rows = c->x_rows ? moe__arena_take(arena, input, real_size) : NULL;
    e->workspace = bytes ? moe__arena_take(arena, entries, bytes) : NULL;
    e->combine_weight = c->combine_weight ? moe__arena_take(arena, entries, real_size) : NULL;
    if (!save) return;
    e->dz = c->dz ? moe__arena_take(arena, output, real_size) : NULL;
    e->dh = moe__arena_take(arena, hidden, real_size);
    e->dz3 = c->gated ? moe__arena_take(arena, hidden, real_size) : NULL;
    e->dx_rows = moe__arena_take(arena, input, real_size);
}

/* Scratch of a worker, the same whatever instruction set a context is restricted to. */
static int64_t most_worker_bytes(int32_t dtype)
{
    int64_t plain = moe__cpu_backend(MOE_ISA_PLAIN, dtype)->worker_bytes();
    return moe__max(plain, moe__cpu_backend(moe__cpu_best_isa(), dtype)->worker_bytes());
}

void moe__pass_layout(moe_pass *pass, moe__arena *arena, const moe__pass_shape *s)
{
    int64_t real_size = moe__dtype_size(s->dtype);
    int64_t worker_bytes = most_worker_bytes(s->dtype);
    moe__plan_layout(&pass->plan.a, arena, s->tokens, s->entries, s->num_experts, s->groups,
                     s->dtype);
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
    if (s->experts)
        lay_out_experts(&pass->experts_job, arena, s->experts, s->entries, s->save, real_size);
    int64_t output = s->experts ? moe__mul(s->tokens, s->experts->d_out) : 0;
    bool saved = s->experts && s->output_sigmoid && s->save;
    pass->y_saved = saved ? moe__arena_take(arena, output, real_size) : NULL;
    pass->dy_inner = saved ? moe__arena_take(arena, output, real_size) : NULL;
    char *scratch = moe__arena_take(arena, s->threads, worker_bytes);
    moe__workers workers = {pass->context, scratch, worker_bytes, ""};
    pass->route.workers = pass->experts_job.workers = workers;
}

moe__pass_shape moe__pass_shape_of(const moe_gate_config *gate, const moe__experts_room *experts,
                                   int32_t layer_output, const double *weights, bool route,
                                   bool replay, uint64_t flags)
{
    moe__pass_shape s;
    memset(&s, 0, sizeof s);
    bool noisy = gate && gate->kind == MOE_GATE_NOISY_TOP_K;
    bool losses = false;
    for (int i = MOE_LOSS_LOAD; i < MOE_LOSS_SLOTS; i++) losses = losses || weights[i] != 0;
    s.gate = gate;
    s.experts = experts;
    s.dtype = gate ? gate->dtype : experts->dtype;
    s.num_experts = gate ? gate->num_experts : experts->num_experts;
    s.route = gate && route;
    s.noise = s.route && noisy && (flags & MOE_FORWARD_TRAIN) != 0;
    s.save = (flags & (MOE_FORWARD_NO_SAVE | MOE_FORWARD_PLAN_ONLY)) == 0;
    s.output_sigmoid = layer_output == MOE_OUTPUT_SIGMOID;
    s.sequence = s.route && weights[MOE_LOSS_SEQUENCE] != 0;
    s.plain_counts = s.sequence && gate->sequence_counts == MOE_SEQUENCE_COUNTS_SCORES &&
                     (replay || noisy);
    s.columns = s.route && (s.save || noisy || losses);
    return s;
}

int64_t moe__pass_shape_bytes(const moe__pass_shape *shape)
{
    moe_pass scratch;
    moe__arena arena = {NULL, 0};
    memset(&scratch, 0, sizeof scratch);
    moe__pass_layout(&scratch, &arena, shape);
    return arena.used;
}

/* Lays out a plan of the sizes of `like` at the front of the block; returns its bytes, which is
 * where the next array begins. */
static int64_t lay_out_plan(moe__plan_arrays *plan, char *base, const moe__plan_arrays *like)
{
    moe__arena arena = {base, 0};
    moe__plan_layout(plan, &arena, like->tokens, like->entries, like->num_experts, like->groups,
                     like->dtype);
    plan->rows = like->rows;
    return arena.used;
}

static int64_t plan_bytes(const moe_pass *pass)
{
    moe__plan_arrays plan;
    return lay_out_plan(&plan, NULL, &pass->plan.a);
}

/* Moves the block to memory of another size with its first `keep` bytes; the old one lives until
 * the new one is there. */
static moe_status move_to(moe_pass *pass, int64_t bytes, int64_t keep, const char *function)
{
    if (pass->host_memory)
        return moe__fail(MOE_ERROR_BUFFER_TOO_SMALL, function,
                         "the pass needs %lld bytes of workspace, the host gave %lld", (ll)bytes,
                         (ll)pass->capacity);
    char *memory = moe__alloc(pass->context, bytes);
    if (!memory)
        return moe__fail(MOE_ERROR_OUT_OF_MEMORY, function, "no %lld bytes for the pass",
                         (ll)bytes);
    if (keep > 0) memcpy(memory, pass->memory, (size_t)keep);
    moe__free(pass->context, pass->memory, pass->capacity);
    pass->memory = memory;
    pass->capacity = bytes;
    return MOE_OK;
}

moe_status moe__pass_trim(moe_pass *pass, const char *function)
{
    if (pass->host_memory || pass->state == MOE__PASS_SAVED) return MOE_OK;
    if (pass->state == MOE__PASS_PLAN) {
        int64_t bytes = plan_bytes(pass);
        if (bytes < pass->capacity) MOE_TRY(move_to(pass, bytes, bytes, function));
        moe__plan_arrays kept = pass->plan.a;
        (void)lay_out_plan(&pass->plan.a, pass->memory, &kept);
    } else {
        moe__free(pass->context, pass->memory, pass->capacity);
        pass->memory = NULL;
        pass->capacity = 0;
        pass->state = MOE__PASS_EMPTY;
        pass->uses = 0;
    }
    /* What moe_pass_tensor would show lay in the part that is gone. */
    pass->losses.importance = pass->losses.load = NULL;
    pass->losses.counts = pass->rows_of_expert = NULL;
    return MOE_OK;
}

moe_status moe__pass_make_room(moe_pass *pass, const moe__pass_shape *shape, bool keep_plan,
                               const char *function)
{
    int64_t bytes = moe__pass_shape_bytes(shape);
    int64_t rows = pass->plan.a.rows;
    if (bytes < 0)
        return moe__fail(MOE_ERROR_OVERFLOW, function,
                         "the pass for %lld tokens is larger than the address space",
                         (ll)shape->tokens);
    if (bytes > pass->capacity)
        MOE_TRY(move_to(pass, bytes, keep_plan ? plan_bytes(pass) : 0, function));
    moe__arena arena = {pass->memory, 0};
    moe__pass_layout(pass, &arena, shape);
    pass->used = moe__max(pass->used, bytes);
    pass->plan.a.rows = keep_plan ? rows : 0;
    return MOE_OK;
}
