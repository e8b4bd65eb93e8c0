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

/* Numbers of parts and segments, as the job and moves have them. */
typedef struct part_tables {
    int64_t *part_begin, *segment_begin, *segment_at;
} part_tables;

static void lay_out_parts(const moe_pass *pass, moe__arena *arena, part_tables *t)
{
    int64_t P = moe__pass_comm(pass)->size, own = local_groups(pass);
    int64_t word = (int64_t)sizeof(int64_t);
    t->part_begin = moe__arena_take(arena, own + 1, word);
    t->segment_begin = moe__arena_take(arena, moe__add(moe__mul(P, own), 1), word);
    t->segment_at = moe__arena_take(arena, moe__mul(P, own), word);
}

static void lay_out_counts(moe_pass *pass, moe__arena *arena)
{
    moe__second *s = &pass->ranks.second;
    int64_t P = moe__pass_comm(pass)->size, own = local_groups(pass);
    int64_t word = (int64_t)sizeof(int64_t);
    part_tables t;
    lay_out_parts(pass, arena, &t); /* first: one block with the device's */
    s->part_begin = t.part_begin;
    s->segment_begin = t.segment_begin;
    s->segment_at = t.segment_at;
    s->in_count = moe__arena_take(arena, moe__mul(P, own), word);
    s->send_begin = moe__arena_take(arena, P + 1, word);
    s->recv_begin = moe__arena_take(arena, P + 1, word);
    s->job.tile_begin = moe__arena_take(arena, own + 1, word);
}

static int64_t part_bytes(const moe_pass *pass)
{
    part_tables counted;
    moe__arena arena = {NULL, 0};
    lay_out_parts(pass, &arena, &counted);
    return arena.used;
}

moe_status moe__second_prepare(moe_pass *pass, const char *function)
{
    moe__second *s = &pass->ranks.second;
    moe__arena arena = {NULL, 0};
    lay_out_counts(pass, &arena);
    MOE_TRY(moe__ranks_room(pass, &s->counts, MOE__ON_HOST, arena.used, function));
    arena = (moe__arena){s->counts.memory, 0};
    lay_out_counts(pass, &arena);
    s->job.part_begin = s->part_begin;
    s->job.segment_begin = s->segment_begin;
    s->there_segment_at = s->segment_at;
    if (moe__ranks_on_host(pass)) return MOE_OK;
    MOE_TRY(moe__ranks_room(pass, &s->device, MOE__ON_BACKEND, part_bytes(pass), function));
    part_tables t;
    arena = (moe__arena){s->device.memory, 0};
    lay_out_parts(pass, &arena, &t);
    s->job.part_begin = t.part_begin;
    s->job.segment_begin = t.segment_begin;
    s->there_segment_at = t.segment_at;
    return MOE_OK;
}

/* Bytes of rows: of x, jittered or not, of logits and raw noise, of dx. */
typedef struct second_sizes {
    int64_t x, numbers, dx, most;
} second_sizes;

static second_sizes sizes_of(const moe_pass *pass, bool noise)
{
    int64_t D = pass->gate->config.d_model, B = width_of(pass);
    bool jitter = pass->route.x_jittered != NULL, host = moe__ranks_on_host(pass);
    int64_t real = moe__dtype_size(moe__real_dtype(pass->gate->config.dtype));
    int64_t size = jitter ? real : moe__dtype_size(pass->gate->config.dtype);
    second_sizes z = {.x = moe__ranks_whole(host, D * size),
                      .numbers = moe__ranks_whole(host, (noise ? 2 : 1) * B * real),
                      .dx = moe__ranks_whole(host, D * real)};
    z.most = moe__max(moe__max(z.x, z.dx), z.numbers);
    return z;
}

/* noise: logits and raw noise travel. */
static void lay_out_rows(moe_pass *pass, moe__arena *arena, int64_t sent, int64_t came, bool noise)
{
    moe__second *s = &pass->ranks.second;
    second_sizes z = sizes_of(pass, noise);
    int64_t D = pass->gate->config.d_model, B = width_of(pass);
    int64_t real = moe__dtype_size(moe__real_dtype(pass->gate->config.dtype));
    s->job.index = moe__arena_take(arena, came, (int64_t)sizeof *s->index);
    s->x = moe__arena_take(arena, came, z.x);
    s->d = moe__arena_take(arena, came, z.numbers);
    s->here = moe__arena_take(arena, sent, z.most);
    s->there = moe__arena_take(arena, came, z.most);
    s->job.logits = moe__arena_take(arena, moe__mul(came, B), real);
    s->job.noise_raw = noise ? moe__arena_take(arena, moe__mul(came, B), real) : NULL;
    s->job.dx_rows = moe__arena_take(arena, moe__mul(came, D), real);
}

static moe_status make_room(moe_pass *pass, int64_t sent, int64_t came, bool noise,
                            const char *function)
{
    moe__second *s = &pass->ranks.second;
    int64_t most = sizes_of(pass, noise).most;
    moe__arena arena = {NULL, 0};
    lay_out_rows(pass, &arena, sent, came, noise);
    MOE_TRY(moe__ranks_room(pass, &s->rows, MOE__ON_BACKEND, arena.used, function));
    arena = (moe__arena){s->rows.memory, 0};
    lay_out_rows(pass, &arena, sent, came, noise);
    s->index = (int64_t *)(uintptr_t)s->job.index;
    if (moe__ranks_on_host(pass)) return MOE_OK;
    int64_t bytes = moe__mul(came, (int64_t)sizeof *s->index);
    MOE_TRY(moe__ranks_room(pass, &s->index_room, MOE__ON_HOST, moe__max(bytes, 1), function));
    s->index = s->index_room.memory;
    return moe__ranks_make_stage(pass, moe__mul(moe__max(sent, came), most),
                                 moe__mul(moe__max(sent, came), most), function);
}

void moe__second_trim(moe_pass *pass)
{
    moe__second *s = &pass->ranks.second;
    moe__ranks_give_back(pass, &s->rows, MOE__ON_BACKEND);
    moe__ranks_give_back(pass, &s->index_room, MOE__ON_HOST);
}

void moe__second_free(moe_pass *pass)
{
    moe__second *s = &pass->ranks.second;
    moe__second_trim(pass);
    moe__ranks_give_back(pass, &s->device, MOE__ON_BACKEND);
    moe__ranks_give_back(pass, &s->counts, MOE__ON_HOST);
}

/* ---- rows ------------------------------------------------------------------------------------ */

/* Of a call that declines: any numbers do, as they are sent as 0. */
moe__counts moe__second_counts(const moe_pass *pass)
{
    const moe__placement *w = pass->layer->where;
    return (moe__counts){w->groups, w->first_group, local_groups(pass), false};
}

/* Ranges of the primary plan's rows, and of what comes. */
static void find_places(moe_pass *pass, const int64_t *expert_begin)
{
    moe__second *s = &pass->ranks.second;
    int64_t P = moe__pass_comm(pass)->size, own = local_groups(pass);
    s->recv_begin[0] = 0;
    for (int64_t p = 0; p <= P; p++)
        s->send_begin[p] = expert_begin[pass->layer->where->first_group[p]];
    for (int64_t p = 0; p < P; p++) {
        s->recv_begin[p + 1] = s->recv_begin[p];
        for (int64_t i = 0; i < own; i++) s->recv_begin[p + 1] += s->in_count[p * own + i];
    }
}

/* The owner's order of what comes. */
static moe_status order_rows(moe_pass *pass)
{
    moe__second *s = &pass->ranks.second;
    const moe__memory *memory = pass->context->memory;
    int64_t P = moe__pass_comm(pass)->size, own = local_groups(pass), row = 0;
    int64_t *next = pass->ranks.out_begin; /* of each source; the words are here already */
    for (int64_t p = 0; p < P; p++) next[p] = s->recv_begin[p];
    for (int64_t i = 0; i < own; i++) {
        s->part_begin[i] = row;
        for (int64_t p = 0; p < P; p++) {
            s->segment_begin[i * P + p] = row;
            s->segment_at[i * P + p] = next[p];
            for (int64_t n = 0; n < s->in_count[p * own + i]; n++) s->index[row++] = next[p]++;
        }
    }
    s->came = s->part_begin[own] = s->segment_begin[own * P] = row;
    if (memory->is_host) return MOE_OK;
    MOE_TRY(memory->put(&pass->workers, s->device.memory, s->counts.memory, part_bytes(pass)));
    return memory->put(&pass->workers, (void *)(uintptr_t)s->job.index, s->index,
                       row * (int64_t)sizeof *s->index);
}

/* Rows to the owners, or back. */
static moe_status move(moe_pass *pass, void *to, const void *from, int64_t bytes, bool back)
{
    moe__second *s = &pass->ranks.second;
    return moe__ranks_move(pass, to, back ? s->send_begin : s->recv_begin, from,
                           back ? s->recv_begin : s->send_begin, bytes);
}

/* The owner's rows to where they came. */
static moe__moves moves_back(const moe_pass *pass)
{
    const moe__second *s = &pass->ranks.second;
    return (moe__moves){.count = s->job.parts * s->job.segments,
                        .most = s->came,
                        .first = s->job.segment_begin,
                        .from = s->job.segment_begin,
                        .to = s->there_segment_at};
}

/* The rows of two matrices [rows,B] in one row, or of the first alone. */
static void pair_of(moe__column column[2], const void *first, const void *second, int64_t bytes)
{
    column[0] = (moe__column){.from = first, .stride = bytes, .bytes = bytes};
    column[1] = (moe__column){.from = second, .stride = bytes, .bytes = bytes, .at = bytes};
}

/* ---- forward --------------------------------------------------------------------------------- */

static moe_status fetch_logits(moe_pass *pass, moe__route_job *route, int64_t rows)
{
    moe__second *s = &pass->ranks.second;
    const moe__plan_arrays *primary = route->primary;
    moe__gate_level *level = &route->level[1];
    second_sizes z = sizes_of(pass, level->noise != NULL);
    bool jitter = route->x_jittered != NULL;
    int64_t D = route->input_width, B = level->width, real = moe__dtype_size(primary->dtype);
    int64_t size = jitter ? real : moe__dtype_size(pass->gate->config.dtype);
    int64_t columns = level->noise ? 2 : 1;
    const moe__column x = {.from = jitter ? route->x_jittered : route->x,
                           .index = primary->token_of_row,
                           .stride = (jitter ? D : route->x_stride) * size,
                           .bytes = D * size};
    const moe__moves all = {.most = rows}, there = moves_back(pass);
    moe__column numbers[2];
    MOE_TRY(moe__ranks_pack(pass, &all, s->here, z.x, &x, 1));
    MOE_TRY(move(pass, s->x, s->here, z.x, false));
    s->job.workers = route->workers;
    s->job.x = s->x;
    s->job.x_stride = z.x / size;
    s->job.x_wide = jitter;
    s->job.rows = s->came;
    s->job.input_width = D;
    s->job.width = B;
    s->job.weight_matrix = level->weight_matrix;
    s->job.noise_weight = level->noise_weight;
    MOE_TRY(pass->call.kernels->second_forward(&s->job));
    pair_of(numbers, s->job.logits, s->job.noise_raw, B * real);
    MOE_TRY(moe__ranks_pack(pass, &there, s->there, z.numbers, numbers, columns));
    MOE_TRY(move(pass, s->here, s->there, z.numbers, true));
    moe__column back = {.from = s->here, .stride = z.numbers, .bytes = B * real};
    MOE_TRY(moe__ranks_pack(pass, &all, level->logits, B * real, &back, 1));
    back.from = (const char *)s->here + B * real;
    return level->noise ? moe__ranks_pack(pass, &all, level->noise_raw, B * real, &back, 1)
                        : MOE_OK;
}

static moe_status forward_steps(moe_pass *pass, moe__route_job *route, const char *function)
{
    moe__second *s = &pass->ranks.second;
    const int64_t *begin;
    int64_t came, own = local_groups(pass), groups = pass->gate->config.expert_groups;
    int64_t *rows = pass->ranks.place; /* free until the experts' rows are counted */
    MOE_TRY(moe__ranks_plan_counts(pass, route->primary, &begin));
    for (int64_t i = 0; i < groups; i++) rows[i] = begin[i + 1] - begin[i];
    const moe__counts counts = {rows, pass->layer->where->first_group, own, false};
    moe__lap(pass, MOE_TIME_GATE);
    MOE_TRY(moe__ranks_exchange_words(pass, false, &counts, MOE_OK, function));
    MOE_TRY(moe__ranks_read_counts(pass, own, s->in_count, &came, function));
    MOE_TRY(moe__ranks_agree_on(
        pass, make_room(pass, begin[groups], came, route->level[1].noise != NULL, function),
        function));
    s->job.parts = own;
    s->job.segments = moe__pass_comm(pass)->size;
    find_places(pass, begin);
    MOE_TRY(order_rows(pass));
    MOE_TRY(fetch_logits(pass, route, begin[groups]));
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
    int64_t real = moe__dtype_size(route->primary->dtype);
    int64_t dx_bytes = route->input_width * real, columns = level->noise ? 2 : 1;
    second_sizes z = sizes_of(pass, level->noise != NULL);
    const moe__moves all = {.most = s->send_begin[moe__pass_comm(pass)->size]};
    const moe__moves there = moves_back(pass);
    moe__column d[2];
    void *dx_rows = s->job.dx_rows;
    pair_of(d, level->d_logits, level->d_noise_raw, level->width * real);
    MOE_TRY(moe__ranks_pack(pass, &all, s->here, z.numbers, d, columns));
    MOE_TRY(move(pass, s->d, s->here, z.numbers, false));
    s->job.workers = route->workers;
    s->job.d = s->d;
    s->job.d_stride = z.numbers / real;
    s->job.with_noise = level->noise != NULL;
    s->job.weight_matrix = level->weight_matrix;
    s->job.noise_weight = level->noise_weight;
    s->job.d_weight_matrix = level->d_weight_matrix;
    s->job.d_noise_weight = level->d_noise_weight;
    bool dx_wanted = pass->ranks.wanted & MOE__WANT_GATE_DX; /* by some rank */
    s->job.dx_rows = dx_wanted ? dx_rows : NULL;
    moe_status status = pass->call.kernels->second_backward(&s->job);
    s->job.dx_rows = dx_rows;
    if (status != MOE_OK || !dx_wanted) return status;
    const moe__column dx = {.from = dx_rows, .stride = dx_bytes, .bytes = dx_bytes};
    const moe__column back = {.from = s->here, .stride = z.dx, .bytes = dx_bytes};
    MOE_TRY(moe__ranks_pack(pass, &there, s->there, z.dx, &dx, 1));
    if (z.dx == dx_bytes) return move(pass, level->dx_rows, s->there, dx_bytes, true);
    MOE_TRY(move(pass, s->here, s->there, z.dx, true));
    return moe__ranks_pack(pass, &all, level->dx_rows, dx_bytes, &back, 1);
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
