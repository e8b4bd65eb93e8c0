/* ranks_join.c - the layers of a group become one: what must be alike is compared, and every rank
 * learns where the experts are. */
#include "pass_state.h"

#include <string.h>

/* ---- what must be alike ---------------------------------------------------------------------- */

/* A number of a config that must be the same on every rank. */
typedef struct field {
    const char *name;
    size_t offset;
    char type; /* i, l, d: int32_t, int64_t, double */
} field;

/* Words of a rank. */
enum {
    STATUS = 0,
    SLOTS = 1,
    GROUPS = 2,
    PARAMETERS = 3,
    NODE = 4,
    NUMBER = 5,
    COMPARED = 6,
    FIELDS = 96
};

#define OF_GATE(type, name)                          \
    {                                                \
#name, offsetof(moe_gate_config, name), type \
    }
static const field GATE[] = {{"gate num_experts", offsetof(moe_gate_config, num_experts), 'l'},
                             {"gate kind", offsetof(moe_gate_config, kind), 'i'},
                             {"gate d_model", offsetof(moe_gate_config, d_model), 'l'},
                             OF_GATE('l', top_k),
                             OF_GATE('i', score),
                             OF_GATE('i', order),
                             OF_GATE('i', renormalize),
                             OF_GATE('d', renormalize_epsilon),
                             OF_GATE('d', route_scale),
                             OF_GATE('i', bias),
                             OF_GATE('i', selection_bias),
                             OF_GATE('l', expert_groups),
                             OF_GATE('l', top_groups),
                             OF_GATE('i', group_score),
                             OF_GATE('d', noise_epsilon),
                             OF_GATE('d', cdf_guard),
                             OF_GATE('d', jitter),
                             OF_GATE('l', seed),
                             OF_GATE('i', stream_id),
                             OF_GATE('i', cv_ddof),
                             OF_GATE('d', importance_weight),
                             OF_GATE('d', load_weight),
                             OF_GATE('d', switch_weight),
                             OF_GATE('d', gshard_weight),
                             OF_GATE('d', z_weight),
                             OF_GATE('d', sequence_weight),
                             OF_GATE('i', sequence_score),
                             OF_GATE('i', sequence_counts),
                             OF_GATE('i', capacity_kind),
                             OF_GATE('i', capacity_rounding),
                             OF_GATE('l', capacity),
                             OF_GATE('d', capacity_factor),
                             OF_GATE('l', capacity_minimum),
                             OF_GATE('i', drop_policy),
                             OF_GATE('i', renormalize_after_drop),
                             OF_GATE('d', threshold_weight),
                             OF_GATE('d', renormalize_minimum),
                             OF_GATE('d', capacity_factor_eval),
                             OF_GATE('l', capacity_multiple),
                             OF_GATE('d', second_threshold),
                             OF_GATE('d', sinkhorn_tolerance),
                             OF_GATE('i', sinkhorn_iterations),
                             OF_GATE('i', choice_noise),
                             OF_GATE('i', second_choice),
                             OF_GATE('i', loss_scope),
                             OF_GATE('i', secondary)};

/* Experts of one rank may be wider than another's or of another kind, unless they are slices; what
 * every rank has is reduced, so it is of one shape. */
#define OF_POOL(type, name)                             \
    {                                                   \
#name, offsetof(moe_experts_config, name), type \
    }
static const field POOL[] = {OF_POOL('l', d_model), OF_POOL('l', d_out), OF_POOL('i', dtype),
                             OF_POOL('i', weight_position)};
static const field SLICE[] = {OF_POOL('l', d_hidden), OF_POOL('i', activation)};
#define OF_BRANCH(type, name)                                                    \
    {                                                                            \
#name " of shared or residual", offsetof(moe_experts_config, name), type \
    }
static const field BRANCH[] = {OF_BRANCH('l', num_experts),     OF_BRANCH('l', d_hidden),
                               OF_BRANCH('i', activation),      OF_BRANCH('i', kind),
                               OF_BRANCH('i', weight_position), OF_BRANCH('i', bias),
                               OF_BRANCH('i', output),          OF_BRANCH('i', glu_order),
                               OF_BRANCH('i', weight_layout),   OF_BRANCH('i', storage)};

#define OF_LAYER(type, name)                          \
    {                                                 \
#name, offsetof(moe_layer_config, name), type \
    }
static const field LAYER[] = {
    OF_LAYER('i', output),       OF_LAYER('i', layer_id),       OF_LAYER('i', shared_gate),
    OF_LAYER('i', residual_mix), OF_LAYER('i', dropped),        OF_LAYER('l', expert_slices),
    OF_LAYER('l', padded_rows),  OF_LAYER('i', exchange),       OF_LAYER('i', received),
    OF_LAYER('i', loss_batch),   OF_LAYER('l', exchange_chunks)};

/* Rows of a GPU are longer than those of a CPU, and go another way where a transport takes them. */
typedef struct ways {
    int64_t memory, node_memory, rail_memory, nodes, width;
} ways;
#define OF_WAYS(name, member)             \
    {                                     \
        name, offsetof(ways, member), 'l' \
    }
static const field WAYS[] = {
    OF_WAYS("memory of rows (0 CPU, 1 GPU, 2 GPU sent from there)", memory),
    OF_WAYS("the size of node_comm", width), OF_WAYS("the size of rail_comm", nodes),
    OF_WAYS("memory of rows of node_comm (as of comm)", node_memory),
    OF_WAYS("memory of rows of rail_comm (as of comm)", rail_memory)};

/* The words of a rank, and what they are called. */
typedef struct description {
    const field *field[FIELDS];
    int64_t *word;
    int count;
} description;

/* from NULL: not there. */
static void describe(description *d, const field *f, size_t n, const void *from)
{
    for (size_t i = 0; i < n; i++) {
        const char *at = from ? (const char *)from + f[i].offset : NULL;
        int64_t value = -1;
        int32_t small;
        if (at && f[i].type == 'i') memcpy(&small, at, sizeof small), value = small;
        if (at && f[i].type != 'i') memcpy(&value, at, sizeof value);
        d->field[d->count] = &f[i];
        d->word[d->count++] = value;
    }
}
#define DESCRIBE(d, fields, from) describe(d, fields, sizeof(fields) / sizeof(fields)[0], from)

_Static_assert(COMPARED + sizeof GATE / sizeof *GATE + sizeof POOL / sizeof *POOL +
                       sizeof SLICE / sizeof *SLICE + 2 * sizeof BRANCH / sizeof *BRANCH +
                       sizeof LAYER / sizeof *LAYER + sizeof WAYS / sizeof *WAYS <=
                   FIELDS,
               "a rank's words have room for all");

static int64_t memory_of(const moe_context *context, const moe_comm *comm)
{
    if (!comm || context->memory->is_host) return 0;
    return moe__comm_takes(comm, context) ? 2 : 1;
}

static void describe_layer(description *d, const moe_layer_config *c)
{
    const moe_experts_config *e = &c->experts->config;
    const moe_context *context = c->experts->context;
    const ways w = {.memory = memory_of(context, c->comm),
                    .node_memory = memory_of(context, c->node_comm),
                    .rail_memory = memory_of(context, c->rail_comm),
                    .nodes = c->rail_comm ? c->rail_comm->size : 0,
                    .width = c->node_comm ? c->node_comm->size : 0};
    DESCRIBE(d, WAYS, &w);
    DESCRIBE(d, GATE, c->gate ? &c->gate->config : NULL);
    DESCRIBE(d, POOL, e);
    DESCRIBE(d, SLICE, c->expert_slices > 1 ? e : NULL);
    DESCRIBE(d, LAYER, c);
    DESCRIBE(d, BRANCH, c->shared ? &c->shared->config : NULL);
    DESCRIBE(d, BRANCH, c->residual ? &c->residual->config : NULL);
}

static moe_status refuse_difference(const field *f, int64_t there, int32_t rank, int64_t first,
                                    const char *function)
{
    double a, b;
    memcpy(&a, &there, sizeof a), memcpy(&b, &first, sizeof b);
    if (f->type == 'd')
        REFUSE_ARGUMENT("%s is %.17g on rank %d and %.17g on rank 0", f->name, a, (int)rank, b);
    REFUSE_ARGUMENT("%s is %lld on rank %d and %lld on rank 0", f->name, (ll)there, (int)rank,
                    (ll)first);
}

/* all [P,FIELDS] */
static moe_status compare(const int64_t *all, const description *d, int32_t P, const char *function)
{
    for (int32_t p = 0; p < P; p++) {
        int64_t word = all[p * FIELDS + STATUS];
        moe_status status = moe__is_status(word) ? (moe_status)word : MOE_ERROR_TRANSPORT;
        if (status != MOE_OK) REFUSE(status, "rank %d failed: %s", (int)p, moe_status_text(status));
    }
    for (int32_t p = 1; p < P; p++)
        for (int i = 0; i < d->count; i++) {
            int64_t there = all[p * FIELDS + COMPARED + i], first = all[COMPARED + i];
            if (there != first) return refuse_difference(d->field[i], there, p, first, function);
        }
    return MOE_OK;
}

/* ---- where the experts are ------------------------------------------------------------------- */

static void lay_out(moe__placement *w, moe__arena *arena, int64_t P, int64_t groups)
{
    (void)moe__arena_take(arena, 1, sizeof *w);
    w->first_slot = moe__arena_take(arena, P + 1, sizeof *w->first_slot);
    w->number_of_slot = moe__arena_take(arena, w->slots, sizeof *w->number_of_slot);
    w->slot_of_number = moe__arena_take(arena, w->numbers, sizeof *w->slot_of_number);
    w->first_holder = moe__arena_take(arena, w->numbers, sizeof *w->first_holder);
    w->first_group = groups ? moe__arena_take(arena, P + 1, sizeof *w->first_group) : NULL;
    w->groups = groups ? moe__arena_take(arena, groups, sizeof *w->groups) : NULL;
    if (w->grid.nodes) moe__grid_lay_out(&w->grid, arena, P);
}

/* One block for the struct and its arrays, or NULL. */
static moe__placement *make(moe_context *context, int64_t slots, int64_t numbers, int64_t P,
                            int64_t groups, bool grid)
{
    moe__placement sizes = {.slots = slots, .numbers = numbers, .grid.nodes = grid};
    moe__arena arena = {NULL, 0};
    lay_out(&sizes, &arena, P, groups);
    moe__placement *w = moe__alloc(context, arena.used);
    if (!w) return NULL;
    *w = sizes;
    w->bytes = arena.used;
    arena = (moe__arena){(char *)w, 0};
    lay_out(w, &arena, P, groups);
    return w;
}

/* Who holds what, from number_of_slot: this rank sends to itself, else to replica rank mod count.
 * Until a number's slot is known slot_of_number counts: its slots, then -2 less those to pass
 * by. */
static void find_holders(moe__placement *w, int32_t rank)
{
    int64_t *of = w->slot_of_number;
    for (int64_t v = 0; v < w->numbers; v++) of[v] = 0, w->first_holder[v] = -1;
    for (int64_t s = 0; s < w->slots; s++) {
        int64_t v = w->number_of_slot[s];
        if (of[v]++ == 0) w->first_holder[v] = s;
        w->replicas = w->replicas || of[v] > 1;
    }
    for (int64_t v = 0; v < w->numbers; v++) of[v] = of[v] > 0 ? -2 - rank % of[v] : -1;
    for (int64_t s = 0; s < w->slots; s++) {
        int64_t v = w->number_of_slot[s];
        if (of[v] == -2)
            of[v] = s;
        else if (of[v] < -2)
            of[v]++;
    }
    for (int64_t s = w->first_slot[rank + 1] - 1; s >= w->first_slot[rank]; s--)
        of[w->number_of_slot[s]] = s;
}

static moe_status check_numbers(const moe__placement *w, int32_t P, const char *function)
{
    for (int32_t p = 0; p < P; p++)
        for (int64_t s = w->first_slot[p]; s < w->first_slot[p + 1]; s++)
            if (w->number_of_slot[s] < 0 || w->number_of_slot[s] >= w->numbers)
                REFUSE_ARGUMENT("placement[%lld] of rank %d is %lld; there are %lld experts%s",
                                (ll)(s - w->first_slot[p]), (int)p, (ll)w->number_of_slot[s],
                                (ll)w->numbers, w->slices > 1 ? " or slices" : "");
    return MOE_OK;
}

static moe_status check_holders(const moe__placement *w, const char *function)
{
    for (int64_t v = 0; v < w->numbers; v++)
        if (w->slot_of_number[v] < 0) REFUSE_ARGUMENT("no rank's placement has expert %lld", (ll)v);
    return MOE_OK;
}

/* Secondary gates: rank 0 has the first groups, and so on, each with all of its experts. */
static moe_status find_groups(moe__placement *w, const int64_t *all, int64_t groups, int32_t P,
                              const char *function)
{
    int64_t width = w->numbers / groups;
    if (w->replicas)
        REFUSE_ARGUMENT("experts have replicas, secondary gates live with their groups");
    w->first_group[0] = 0;
    for (int32_t p = 0; p < P; p++)
        w->first_group[p + 1] = w->first_group[p] + all[p * FIELDS + GROUPS];
    if (w->first_group[P] != groups)
        REFUSE_ARGUMENT("local_groups of all ranks are %lld, the gate has %lld groups",
                        (ll)w->first_group[P], (ll)groups);
    for (int64_t i = 0; i < groups; i++) w->groups[i] = i;
    for (int32_t p = 0; p < P; p++)
        for (int64_t v = w->first_group[p] * width; v < w->first_group[p + 1] * width; v++) {
            int64_t s = w->slot_of_number[v];
            if (s < w->first_slot[p] || s >= w->first_slot[p + 1])
                REFUSE_ARGUMENT(
                    "expert %lld is not on rank %d, which has the secondary gate of its "
                    "group %lld",
                    (ll)v, (int)p, (ll)(v / width));
        }
    return MOE_OK;
}

/* The header of a block of MOE_EXCHANGE_PADDED is some whole rows, whichever way they travel. */
static int64_t header_rows(const moe__placement *w, const moe_experts_config *e, bool on_host)
{
    moe__row_sizes size = moe__row_sizes_of(e, on_host);
    int64_t word = (int64_t)sizeof(int64_t);
    int64_t words = (MOE__RANKS_HEADER + w->most_slots) * word, few = MOE__RANKS_HEADER * word;
    return moe__max((words + size.x - 1) / size.x, (few + size.dy - 1) / size.dy);
}

static moe_status find_places(moe_layer *layer, const int64_t *all, const char *function)
{
    const moe_layer_config *c = &layer->config;
    int32_t P = c->comm->size, rank = c->comm->rank;
    int64_t slots = 0, own = c->experts->config.num_experts;
    for (int32_t p = 0; p < P; p++) slots = moe__add(slots, all[p * FIELDS + SLOTS]);
    int64_t E = c->gate ? c->gate->config.num_experts : slots / c->expert_slices;
    const moe_gate_config *g = c->gate ? &c->gate->config : NULL;
    int64_t groups = g && g->secondary ? g->expert_groups : 0;
    if (E > slots / c->expert_slices) /* on every rank alike, before memory is asked for */
        REFUSE_ARGUMENT("the gate has %lld experts%s, the pools of all ranks have %lld", (ll)E,
                        c->expert_slices > 1 ? " in slices" : "", (ll)slots);
    moe__placement *w = make(layer->context, slots, moe__mul(E, c->expert_slices), P, groups,
                             c->rail_comm != NULL);
    int64_t *numbers = moe__alloc(layer->context, moe__max(own, 1) * (int64_t)sizeof *numbers);
    moe_status status = MOE_OK;
    if (!w || !numbers)
        status = moe__fail(MOE_ERROR_OUT_OF_MEMORY, function, "no memory for %lld experts",
                           (ll)slots);
    if (status != MOE_OK) {
        moe_comm_abort(c->comm); /* the others wait for this rank's numbers */
        goto done;
    }
    w->slices = c->expert_slices;
    w->first_slot[0] = 0;
    for (int32_t p = 0; p < P; p++) {
        w->first_slot[p + 1] = w->first_slot[p] + all[p * FIELDS + SLOTS];
        w->most_slots = moe__max(w->most_slots, all[p * FIELDS + SLOTS]);
        w->most_parameters = moe__max(w->most_parameters, all[p * FIELDS + PARAMETERS]);
    }
    for (int64_t i = 0; i < own; i++)
        numbers[i] = c->placement ? c->placement[i] : w->first_slot[rank] + i;
    status = moe_comm_all_gather(c->comm, w->number_of_slot, w->first_slot, numbers,
                                 (int64_t)sizeof *numbers);
    if (status != MOE_OK) goto done;
    status = check_numbers(w, P, function);
    if (status == MOE_OK) find_holders(w, rank);
    if (status == MOE_OK) status = check_holders(w, function);
    if (status == MOE_OK && groups) status = find_groups(w, all, groups, P, function);
    w->in_order = w->slices == 1 && slots == w->numbers;
    for (int64_t s = 0; s < slots && w->in_order; s++) w->in_order = w->number_of_slot[s] == s;
    if (status == MOE_OK && c->rail_comm)
        status = moe__grid_find(w, c, all + NODE, all + NUMBER, FIELDS, function);
    w->header_rows = c->exchange == MOE_EXCHANGE_PADDED
                         ? header_rows(w, &c->experts->config, layer->context->memory->is_host)
                         : 0;
done:
    moe__layer_free(c, layer->context, numbers, moe__max(own, 1) * (int64_t)sizeof *numbers);
    if (status != MOE_OK) {
        if (w) moe__layer_free(c, layer->context, w, w->bytes);
        return status;
    }
    layer->where = w;
    layer->num_experts = E;
    return MOE_OK;
}

/* ---- joining --------------------------------------------------------------------------------- */

bool moe__ranks_travels(const moe_layer_config *c)
{
    return c->comm && (c->comm->size > 1 || c->expert_slices > 1 || c->placement || c->rail_comm ||
                       c->max_received > 0 || c->exchange == MOE_EXCHANGE_PADDED);
}

/* own: [FIELDS] after all: [P,FIELDS] */
static moe_status gather(moe_comm *comm, int64_t *all, int64_t *begin)
{
    for (int32_t p = 0; p <= comm->size; p++) begin[p] = p;
    return moe_comm_all_gather(comm, all, begin, all + (int64_t)comm->size * FIELDS,
                               FIELDS * (int64_t)sizeof *all);
}

/* With a status that is none of success this rank only says so. */
static moe_status join(moe_comm *comm, moe_context *context, moe_layer *layer, moe_status own,
                       const char *function)
{
    int32_t P = comm->size;
    description d = {.count = 0};
    int64_t bytes = (int64_t)(P + 1) * (int64_t)sizeof(int64_t);
    int64_t *all = moe__alloc_zeroed(context, bytes * FIELDS), *begin = moe__alloc(context, bytes);
    moe_status status = own;
    if (!all || !begin) {
        if (status == MOE_OK)
            status = moe__fail(MOE_ERROR_OUT_OF_MEMORY, function, "no memory for %d ranks", (int)P);
        moe_comm_abort(comm);
    } else {
        int64_t *words = all + (int64_t)P * FIELDS;
        words[STATUS] = own;
        if (layer) words[SLOTS] = layer->config.experts->config.num_experts;
        if (layer) words[PARAMETERS] = layer->config.experts->parameters.count;
        if (layer && layer->gate) words[GROUPS] = layer->gate->config.local_groups;
        if (layer && layer->config.rail_comm) words[NODE] = layer->config.rail_comm->rank;
        if (layer && layer->config.rail_comm) words[NUMBER] = layer->config.node_comm->rank;
        d.word = words + COMPARED;
        if (layer) describe_layer(&d, &layer->config);
        moe_status sent = gather(comm, all, begin);
        if (status == MOE_OK) status = sent;
        if (status == MOE_OK) status = compare(all, &d, P, function);
        if (status == MOE_OK) status = find_places(layer, all, function);
    }
    moe__comm_free(comm, context, all, bytes * FIELDS);
    moe__comm_free(comm, context, begin, bytes);
    return status;
}

moe_status moe__ranks_join(moe_layer *layer, const char *function)
{
    if (!moe__ranks_travels(&layer->config)) return MOE_OK;
    return join(layer->config.comm, layer->context, layer, MOE_OK, function);
}

/* The message is that of the failure, also when telling the others fails. */
moe_status moe__ranks_join_failed(const moe_layer_config *c, moe_status status,
                                  const char *function)
{
    char message[MOE__MESSAGE_SIZE];
    if (status == MOE_OK || !c->comm || c->comm->size == 1) return status;
    memcpy(message, moe_last_error(), sizeof message);
    (void)join(c->comm, c->comm->context, NULL, status, function);
    moe__restore_message(message);
    return status;
}

void moe__ranks_leave(moe_layer *layer)
{
    if (layer->where)
        moe__comm_free(layer->comm, layer->context, layer->where, layer->where->bytes);
    layer->where = NULL;
}
