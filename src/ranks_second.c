/* ranks_second.c - secondary gates that live with their group's experts (Shazeer et al. 2017, 3.2).
 *
 *     forward    each (token, group) row of x goes to the group's rank, its logits come back; the
 *                choice among the experts is made where the token is
 *     backward   gradients by the logits go there, dx comes back; the parameters' are summed there
 *
 * Rows of the primary plan are sorted by group, and groups are in order of rank, so those of a rank
 * are a range. The owner works on them by (group, source, token), the order of one rank. */
#include "ranks_rows.h"

static int64_t local_groups(const moe_pass *pass) { return pass->gate->config.local_groups; }
static int64_t width_of(const moe_pass *pass)
{
    return pass->gate->config.num_experts / pass->gate->config.expert_groups;
}

/* ---- memory ---------------------------------------------------------------------------------- */

static void lay_out_counts(moe_pass *pass, moe__arena *arena)
{
    moe__second *s = &pass->ranks.second;
    int64_t P = moe__pass_comm(pass)->size, own = local_groups(pass),
            word = (int64_t)sizeof(int64_t);
    s->in_count = moe__arena_take(arena, moe__mul(P, own), word);
    s->send_begin = moe__arena_take(arena, P + 1, word);
    s->recv_begin = moe__arena_take(arena, P + 1, word);
    s->job.part_begin = moe__arena_take(arena, own + 1, word);
    s->job.segment_begin = moe__arena_take(arena, moe__add(moe__mul(P, own), 1), word);
    s->job.tile_begin = moe__arena_take(arena, own + 1, word);
}

moe_status moe__second_prepare(moe_pass *pass, const char *function)
{
    moe__second *s = &pass->ranks.second;
    moe__arena arena = {NULL, 0};
    lay_out_counts(pass, &arena);
    MOE_TRY(moe__ranks_room(pass, &s->counts_memory, &s->counts_bytes, arena.used, function));
    arena = (moe__arena){s->counts_memory, 0};
    lay_out_counts(pass, &arena);
    return MOE_OK;
}

/* noise: logits and raw noise travel. */
static void lay_out_rows(moe_pass *pass, moe__arena *arena, int64_t sent, int64_t came, bool noise)
{
    moe__second *s = &pass->ranks.second;
    int64_t D = pass->gate->config.d_model, B = width_of(pass), both = noise ? 2 * B : B;
    int64_t size = moe__dtype_size(pass->gate->config.dtype), most = moe__max(D, both);
    s->index = moe__arena_take(arena, came, (int64_t)sizeof *s->index);
    s->x = moe__arena_take(arena, moe__mul(came, D), size);
    s->d = moe__arena_take(arena, moe__mul(came, both), size);
    s->here = moe__arena_take(arena, moe__mul(sent, most), size);
    s->there = moe__arena_take(arena, moe__mul(came, most), size);
    s->job.logits = moe__arena_take(arena, moe__mul(came, B), size);
    s->job.noise_raw = noise ? moe__arena_take(arena, moe__mul(came, B), size) : NULL;
    s->job.dx_rows = moe__arena_take(arena, moe__mul(came, D), size);
}

static moe_status make_room(moe_pass *pass, int64_t sent, int64_t came, bool noise,
                            const char *function)
{
    moe__second *s = &pass->ranks.second;
    moe__arena arena = {NULL, 0};
    lay_out_rows(pass, &arena, sent, came, noise);
    MOE_TRY(moe__ranks_room(pass, &s->rows_memory, &s->rows_bytes, arena.used, function));
    arena = (moe__arena){s->rows_memory, 0};
    lay_out_rows(pass, &arena, sent, came, noise);
    return MOE_OK;
}

void moe__second_trim(moe_pass *pass)
{
    moe__second *s = &pass->ranks.second;
    moe__ranks_give_back(pass, &s->rows_memory, &s->rows_bytes);
}

void moe__second_free(moe_pass *pass)
{
    moe__second *s = &pass->ranks.second;
    moe__second_trim(pass);
    moe__ranks_give_back(pass, &s->counts_memory, &s->counts_bytes);
}

/* ---- rows ------------------------------------------------------------------------------------ */

/* Of a call that declines: any numbers do, as they are sent as 0. */
moe__counts moe__second_counts(const moe_pass *pass)
{
    const moe__placement *w = pass->layer->where;
    return (moe__counts){w->groups, w->first_group, local_groups(pass)};
}

/* Ranges of the primary plan's rows, and the owner's order of what comes. */
static void find_places(moe_pass *pass, const moe__plan_arrays *primary)
{
    moe__second *s = &pass->ranks.second;
    int64_t P = moe__pass_comm(pass)->size, own = local_groups(pass);
    s->recv_begin[0] = 0;
    for (int64_t p = 0; p <= P; p++)
        s->send_begin[p] = primary->expert_begin[pass->layer->where->first_group[p]];
    for (int64_t p = 0; p < P; p++) {
        s->recv_begin[p + 1] = s->recv_begin[p];
        for (int64_t i = 0; i < own; i++) s->recv_begin[p + 1] += s->in_count[p * own + i];
    }
}

static void order_rows(moe_pass *pass)
{
    moe__second *s = &pass->ranks.second;
    int64_t P = moe__pass_comm(pass)->size, own = local_groups(pass), row = 0;
    int64_t *next = pass->ranks.out_begin; /* of each source; the words are here already */
    for (int64_t p = 0; p < P; p++) next[p] = s->recv_begin[p];
    for (int64_t i = 0; i < own; i++) {
        s->job.part_begin[i] = row;
        for (int64_t p = 0; p < P; p++) {
            s->job.segment_begin[i * P + p] = row;
            for (int64_t n = 0; n < s->in_count[p * own + i]; n++) s->index[row++] = next[p]++;
        }
    }
    s->job.part_begin[own] = s->job.segment_begin[own * P] = row;
}

/* Rows to the owners, or back. */
static moe_status move(moe_pass *pass, void *to, const void *from, int64_t bytes, bool back)
{
    moe__second *s = &pass->ranks.second;
    return moe__ranks_exchange(pass, to, back ? s->send_begin : s->recv_begin, from,
                               back ? s->recv_begin : s->send_begin, bytes);
}

/* ---- forward --------------------------------------------------------------------------------- */

static moe_status fetch_logits(moe_pass *pass, moe__route_job *route)
{
    moe__second *s = &pass->ranks.second;
    const moe__plan_arrays *primary = route->primary;
    moe__gate_level *level = &route->level[1];
    int64_t D = route->input_width, B = level->width, size = moe__dtype_size(primary->dtype);
    int64_t rows = primary->rows, came = s->job.part_begin[s->job.parts];
    int columns = level->noise ? 2 : 1;
    const moe__column x = {route->x_jittered ? route->x_jittered : route->x, primary->token_of_row,
                           (route->x_jittered ? D : route->x_stride) * size, D * size};
    const moe__column logits[2] = {{s->job.logits, NULL, B * size, B * size},
                                   {s->job.noise_raw, NULL, B * size, B * size}};
    MOE_TRY(moe__ranks_pack(pass, s->here, NULL, 0, rows, &x, 1));
    MOE_TRY(move(pass, s->x, s->here, D * size, false));
    s->job.workers = route->workers;
    s->job.x = s->x;
    s->job.index = s->index;
    s->job.input_width = D;
    s->job.width = B;
    s->job.weight_matrix = level->weight_matrix;
    s->job.noise_weight = level->noise_weight;
    MOE_TRY(pass->call.kernels->second_forward(&s->job));
    MOE_TRY(moe__ranks_pack(pass, s->there, s->index, 0, came, logits, columns));
    MOE_TRY(move(pass, s->here, s->there, columns * B * size, true));
    const moe__column back = {s->here, NULL, columns * B * size, B * size};
    const moe__column raw = {(const char *)s->here + B * size, NULL, 2 * B * size, B * size};
    MOE_TRY(moe__ranks_pack(pass, level->logits, NULL, 0, rows, &back, 1));
    if (level->noise) MOE_TRY(moe__ranks_pack(pass, level->noise_raw, NULL, 0, rows, &raw, 1));
    return MOE_OK;
}

static moe_status forward_steps(moe_pass *pass, moe__route_job *route, const char *function)
{
    moe__second *s = &pass->ranks.second;
    const moe__plan_arrays *primary = route->primary;
    int64_t came, own = local_groups(pass);
    int64_t *rows = pass->ranks.place; /* free until the experts' rows are counted */
    for (int64_t i = 0; i < pass->gate->config.expert_groups; i++)
        rows[i] = primary->expert_begin[i + 1] - primary->expert_begin[i];
    const moe__counts counts = {rows, pass->layer->where->first_group, own};
    moe__lap(pass, MOE_TIME_GATE);
    MOE_TRY(moe__ranks_exchange_words(pass, false, &counts, MOE_OK, function));
    MOE_TRY(moe__ranks_read_counts(pass, own, s->in_count, &came, function));
    MOE_TRY(moe__ranks_agree_on(
        pass, make_room(pass, primary->rows, came, route->level[1].noise != NULL, function),
        function));
    s->job.parts = own;
    s->job.segments = moe__pass_comm(pass)->size;
    find_places(pass, primary);
    order_rows(pass);
    MOE_TRY(fetch_logits(pass, route));
    moe__lap(pass, MOE_TIME_PACK);
    return MOE_OK;
}

static moe_status second_forward(moe__route_job *route)
{
    moe_pass *pass = route->second_user;
    return forward_steps(pass, route, route->workers.function);
}

/* ---- backward -------------------------------------------------------------------------------- */

static moe_status backward_steps(moe_pass *pass, moe__gate_backward_job *gate)
{
    moe__second *s = &pass->ranks.second;
    moe__route_job *route = gate->losses->route;
    moe__gate_level *level = &route->level[1];
    int64_t D = route->input_width, B = level->width, rows = route->primary->rows;
    int64_t size = moe__dtype_size(route->primary->dtype), came = s->job.part_begin[s->job.parts];
    int columns = level->noise ? 2 : 1;
    const moe__column d[2] = {{level->d_logits, NULL, B * size, B * size},
                              {level->d_noise_raw, NULL, B * size, B * size}};
    void *dx_rows = s->job.dx_rows;
    MOE_TRY(moe__ranks_pack(pass, s->here, NULL, 0, rows, d, columns));
    MOE_TRY(move(pass, s->d, s->here, columns * B * size, false));
    s->job.workers = route->workers;
    s->job.d = s->d;
    s->job.d_stride = columns * B;
    s->job.weight_matrix = level->weight_matrix;
    s->job.noise_weight = level->noise_weight;
    s->job.d_weight_matrix = level->d_weight_matrix;
    s->job.d_noise_weight = level->d_noise_weight;
    bool dx_wanted = pass->ranks.wanted & MOE__WANT_GATE_DX; /* by some rank */
    s->job.dx_rows = dx_wanted ? dx_rows : NULL;
    moe_status status = pass->call.kernels->second_backward(&s->job);
    s->job.dx_rows = dx_rows;
    if (status != MOE_OK || !dx_wanted) return status;
    const moe__column dx = {dx_rows, NULL, D * size, D * size};
    MOE_TRY(moe__ranks_pack(pass, s->there, s->index, 0, came, &dx, 1));
    return move(pass, level->dx_rows, s->there, D * size, true);
}

static moe_status second_backward(moe__gate_backward_job *gate)
{
    moe_pass *pass = gate->losses->route->second_user;
    moe__lap(pass, MOE_TIME_GATE);
    return backward_steps(pass, gate);
}

/* ---- the hooks ------------------------------------------------------------------------------- */

void moe__second_hook(moe_pass *pass, int32_t uses)
{
    bool elsewhere = moe__pass_has_ranks(pass, uses) && pass->layer->where->first_group;
    pass->route.second = elsewhere ? second_forward : NULL;
    pass->gate_job.second = elsewhere ? second_backward : NULL;
    pass->route.second_user = pass;
}
