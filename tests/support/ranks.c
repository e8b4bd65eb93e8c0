/* ranks.c - the work of one rank shared out over several: ranks.h. */
#include "support/ranks.h"
#include "support/layer_case.h"
#include "support/real.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int32_t ranks_way(int32_t kind, uint64_t number)
{
    return (int32_t)((number + 2 * (uint64_t)kind) % RANKS_WAYS);
}

int64_t ranks_tokens(int32_t ranks, int32_t rank)
{
    static const int64_t TOKENS[RANKS_MOST + 1][RANKS_MOST] = {
        [1] = {19},
        [2] = {12, 7},
        [3] = {0, 13, 6},
        [4] = {5, 0, 11, 3},
        [8] = {2, 0, 5, 1, 0, 4, 3, 4},
        [16] = {1, 0, 3, 0, 2, 1, 0, 0, 4, 1, 0, 2, 0, 3, 1, 1}};
    return TOKENS[ranks][rank];
}

static bool sliced(int32_t way) { return way == WAY_SLICES || way == WAY_ALL_AT_ONCE; }
static bool chunked(int32_t way) { return way == WAY_CHUNKS || way == WAY_ALL_AT_ONCE; }
static bool global(int32_t way) { return way == WAY_GLOBAL || way == WAY_ALL_AT_ONCE; }

bool ranks_way_by_node(int32_t way) { return !chunked(way) && way != WAY_PADDED; }

/* ---- the whole ------------------------------------------------------------------------------- */

/* Losses of a rank's own tokens are not those of the whole, so they are off. */
static void losses_off(moe_gate_config *g)
{
    g->importance_weight = g->load_weight = g->switch_weight = g->gshard_weight = 0;
    g->z_weight = g->sequence_weight = g->threshold_weight = 0;
}

/* f64 and f32, or what a device has. */
static int32_t dtype_of(uint64_t number)
{
    static const int32_t ON_GPU[] = {MOE_DTYPE_F32, MOE_DTYPE_BF16, MOE_DTYPE_F16};
    if (ON_DEVICE) return ON_GPU[(number + number / RANKS_WAYS) % 3];
    return number % 2 ? MOE_DTYPE_F32 : MOE_DTYPE_F64;
}

void whole_make(whole *w, int32_t kind, uint64_t number, int32_t ranks, int32_t way)
{
    memset(w, 0, sizeof *w);
    w->context = new_context();
    w->way = way;
    family *f = &w->f;
    family_draw(f, kind, number, dtype_of(number));
    if (!global(way)) losses_off(&f->g);
    if (!ON_DEVICE && f->e.kind == MOE_EXPERTS_FEED_FORWARD && number % 5 == 2)
        f->e.storage = MOE_STORAGE_PREPACKED;
    if (sliced(way)) {
        MUST(moe_comm_create_self(&w->comm, w->context));
        f->l.comm = w->comm, f->l.expert_slices = 2;
        f->e.num_experts *= 2, f->e.bias = 0;
    }
    f->T = RANKS_TOKENS, f->G = ranks;
    family_make(f, w->context);
    family_batch_make(&w->b, f);
    for (int32_t r = 0; r < ranks; r++)
        w->b.group_begin[r + 1] = w->b.group_begin[r] + ranks_tokens(ranks, r);
    size_t used = strlen(f->text);
    (void)snprintf(f->text + used, sizeof f->text - used, " way %d", (int)way);
    w->D = f->e.d_model, w->O = w->b.y_bytes / RANKS_TOKENS;
    w->element = (int64_t)number_bytes(f->g.dtype);
    w->real = (int64_t)number_bytes(number_real(f->g.dtype));
    w->O /= w->element;
}

void whole_run(whole *w)
{
    MUST(moe_pass_create(&w->pass, w->f.layer, NULL));
    MUST(moe_layer_forward(w->f.layer, w->pass, &w->b.fwd));
    MUST(moe_layer_backward(w->f.layer, w->pass, &w->b.bwd));
}

void whole_free(whole *w)
{
    moe_pass_destroy(w->pass), family_batch_free(&w->b), family_free(&w->f);
    moe_comm_destroy(w->comm), moe_context_destroy(w->context);
}

/* ---- a rank ---------------------------------------------------------------------------------- */

static bool is_of_experts(const char *name) { return strncmp(name, "experts.", 8) == 0; }
static bool is_of_groups(const part *p, const char *name)
{
    return p->with_group &&
           (strcmp(name, "gate.weight") == 0 || strcmp(name, "gate.noise_weight") == 0);
}

/* The parameters of the whole layer, of experts those of this rank. */
static void copy_parameters(part *p)
{
    moe_parameter_record to, from;
    MUST(moe_parameter_record_init(&to, sizeof to));
    MUST(moe_parameter_record_init(&from, sizeof from));
    for (int64_t i = 0; i < moe_layer_parameter_count(p->f.layer); i++) {
        MUST(moe_layer_parameter(p->f.layer, i, &to));
        MUST(moe_layer_parameter(p->w->f.layer, i, &from));
        int64_t ahead = 0, size = (int64_t)number_bytes(to.data_dtype);
        if (is_of_groups(p, to.name)) {
            ck_assert_int_eq(to.global_shape[0], from.shape[0]);
            ck_assert_int_eq(to.global_offset[0], p->first_group);
            ahead = p->first_group * (from.element_count / from.shape[0]) * size;
        }
        if (!is_of_experts(to.name)) {
            memcpy(to.data, (const char *)from.data + ahead, (size_t)(to.element_count * size));
            continue;
        }
        ck_assert_int_eq(to.global_shape[0], p->w->f.e.num_experts);
        int64_t each = from.element_count / p->w->f.e.num_experts * size;
        for (int64_t e = 0; e < p->experts; e++) {
            ck_assert_int_eq(moe_layer_expert_number(p->f.layer, e), p->numbers[e]);
            memcpy((char *)to.data + e * each, (const char *)from.data + p->numbers[e] * each,
                   (size_t)each);
        }
    }
}

static void configure(part *p)
{
    moe_layer_config *l = &p->f.l;
    int32_t way = p->w->way;
    l->placement = way == WAY_SHARDS || way == WAY_PADDED ? NULL : p->numbers;
    if (chunked(way)) {
        l->received = MOE_RECEIVED_CHUNK;
        l->max_received = 1 + (int64_t)(p->number + (uint64_t)p->rank) % 7;
    }
    if (way == WAY_PADDED) l->exchange = MOE_EXCHANGE_PADDED, l->padded_rows = 4 * RANKS_TOKENS;
    static const int64_t PARTS[] = {1, 2, 3, MOE_COMM_REQUESTS};
    if (!chunked(way) && way != WAY_PADDED && !p->node_comm)
        l->exchange_chunks = PARTS[p->number % COUNT(PARTS)];
    if (global(way)) l->loss_batch = MOE_BATCH_GLOBAL;
    l->node_comm = p->node_comm, l->rail_comm = p->rail_comm;
}

static void make_part(part *p)
{
    moe_context_config c;
    family *f = &p->f;
    *f = p->w->f;
    f->gate = NULL, f->experts = f->shared_experts = f->residual_experts = NULL, f->layer = NULL;
    MUST(moe_context_config_init(&c, sizeof c));
    c.threads = 1 + p->rank % 2;
    MUST(moe_context_create(&p->context, &c));
    p->comm = p->connect(p);
    if (p->with_group) f->g.secondary = MOE_SECONDARY_WITH_GROUP, f->g.local_groups = p->groups;
    MUST(moe_gate_create(&f->gate, p->context, &f->g));
    f->e.num_experts = p->experts > 0 ? p->experts : MOE_NO_EXPERTS;
    MUST(moe_experts_create(&f->experts, p->context, &f->e));
    if (f->has_shared) MUST(moe_experts_create(&f->shared_experts, p->context, &f->shared));
    if (f->has_residual) MUST(moe_experts_create(&f->residual_experts, p->context, &f->residual));
    f->l.gate = f->gate, f->l.experts = f->experts, f->l.comm = p->comm;
    f->l.shared = f->shared_experts, f->l.residual = f->residual_experts;
    configure(p);
    MUST(moe_layer_create(&f->layer, &f->l));
    copy_parameters(p);
}

/* In phases, or at once. */
static void run_steps(part *p, moe_pass *pass, const moe_forward_args *fwd,
                      const moe_backward_args *bwd)
{
    moe_layer *layer = p->f.layer;
    bool phases = p->w->way == WAY_PHASES || p->w->way == WAY_ALL_AT_ONCE;
    if (!phases) {
        MUST(moe_layer_forward(layer, pass, fwd));
        MUST(moe_layer_backward(layer, pass, bwd));
        return;
    }
    MUST(moe_layer_forward_start(layer, pass, fwd));
    if (p->number % 3) MUST(moe_layer_forward_work(layer, pass));
    MUST(moe_layer_forward_finish(layer, pass));
    MUST(moe_layer_backward_start(layer, pass, bwd));
    if (p->number % 2) MUST(moe_layer_backward_work(layer, pass));
    MUST(moe_layer_backward_finish(layer, pass));
}

/* Its tokens through its layer. */
static void run_part(part *p)
{
    const family_batch *b = &p->w->b;
    moe_pass *pass = NULL;
    moe_forward_args fwd = b->fwd;
    moe_backward_args bwd = b->bwd;
    int64_t x = p->w->D * p->w->element, o = p->w->O * p->w->element, first = p->first_token;
    MUST(moe_pass_create(&pass, p->f.layer, NULL));
    p->y = calloc((size_t)(p->tokens * o) + 1, 1), p->dx = calloc((size_t)(p->tokens * x) + 1, 1);
    ck_assert(p->y && p->dx);
    fwd.tokens = p->tokens, fwd.token_first += first, fwd.groups = 1, fwd.group_begin = NULL;
    fwd.x = (const char *)b->x + first * x, fwd.y = p->y;
    if (fwd.logits_in)
        fwd.logits_in = (const char *)fwd.logits_in + first * p->f.g.num_experts * p->w->real;
    if (fwd.token_key) fwd.token_key += first;
    if (fwd.token_mask) fwd.token_mask += first;
    bwd.dy = (const char *)b->dy + first * o, bwd.dx = p->dx;
    run_steps(p, pass, &fwd, &bwd);
    MUST(moe_losses_init(&p->losses, sizeof p->losses));
    MUST(moe_stats_init(&p->stats, sizeof p->stats));
    MUST(moe_pass_losses(pass, &p->losses));
    MUST(moe_pass_stats(pass, &p->stats));
    MUST(moe_layer_reduce_gradients(p->f.layer, NULL));
    MUST(moe_layer_gradient_norm(p->f.layer, &p->squared, NULL));
    moe_pass_destroy(pass);
}

void part_run(part *p)
{
    make_part(p);
    run_part(p);
}

void part_free(part *p)
{
    free(p->y), free(p->dx);
    family_free(&p->f);
    moe_comm_destroy(p->node_comm), moe_comm_destroy(p->rail_comm);
    moe_comm_destroy(p->comm), moe_context_destroy(p->context);
}

/* ---- comparison ------------------------------------------------------------------------------ */

static void same(const part *p, const char *what, const void *got, const void *want, int64_t bytes)
{
    ck_assert_msg(memcmp(got, want, (size_t)bytes) == 0, "%s of rank %d of %d, %s", what,
                  (int)p->rank, (int)p->ranks, p->w->f.text);
}

/* Within some units of the last place of the largest; sums in which much cancels are small. */
static void near(const part *p, const char *what, const void *got, const void *want, int64_t count,
                 int32_t dtype)
{
    double most = 0.1, unit = dtype == MOE_DTYPE_BF16  ? 0x1p-8
                              : dtype == MOE_DTYPE_F16 ? 0x1p-11
                                                       : 0x1p-24;
    for (int64_t i = 0; i < count; i++) most = fmax(most, fabs(number_at(want, i, dtype)));
    for (int64_t i = 0; i < count; i++) {
        double a = number_at(got, i, dtype), b = number_at(want, i, dtype);
        ck_assert_msg(fabs(a - b) <= 16 * unit * most || (a != a && b != b),
                      "%s[%lld] is %g, not %g, on rank %d of %d, %s", what, (long long)i, a, b,
                      (int)p->rank, (int)p->ranks, p->w->f.text);
    }
}

/* Sums over rows of an expert, one product; a round adds its own. Biases' are cut by the shape. */
static bool is_exact(const part *p, const char *name)
{
    if (!ON_DEVICE) return true;
    return is_of_experts(name) && name[8] == 'w' && !chunked(p->w->way);
}

static void compare_gradient(const part *p, const moe_parameter_record *r, const void *got,
                             const void *want, int64_t count)
{
    if (is_exact(p, r->name))
        same(p, r->name, got, want, count * (int64_t)number_bytes(r->grad_dtype));
    else
        near(p, r->name, got, want, count, r->grad_dtype);
}

/* Gradients of experts are the bytes of theirs, of replicated parameters those of one rank. */
static void compare_gradients(const part *p)
{
    const whole *w = p->w;
    moe_parameter_record want, got;
    MUST(moe_parameter_record_init(&want, sizeof want));
    MUST(moe_parameter_record_init(&got, sizeof got));
    for (int64_t i = 0; i < moe_layer_parameter_count(w->f.layer); i++) {
        MUST(moe_layer_parameter(w->f.layer, i, &want));
        MUST(moe_layer_parameter(p->f.layer, i, &got));
        if (!want.grad) continue;
        int64_t size = (int64_t)number_bytes(want.grad_dtype);
        if (!is_of_experts(want.name)) {
            int64_t ahead = is_of_groups(p, want.name)
                                ? p->first_group * (want.element_count / want.shape[0]) * size
                                : 0;
            compare_gradient(p, &got, got.grad, (const char *)want.grad + ahead, got.element_count);
            continue;
        }
        int64_t each = want.element_count / w->f.e.num_experts;
        for (int64_t e = 0; e < p->experts; e++)
            compare_gradient(p, &got, (const char *)got.grad + e * each * size,
                             (const char *)want.grad + p->numbers[e] * each * size, each);
    }
}

static void near_double(const part *p, const char *what, int i, double got, double want)
{
    double room = ON_DEVICE ? 1e-6 * fabs(want) + 1e-9 : 0;
    ck_assert_msg(fabs(got - want) <= room, "%s %d: %.17g, %.17g on rank %d, %s", what, i, want,
                  got, (int)p->rank, p->w->f.text);
}

static void compare_shared(const part *p)
{
    moe_losses losses;
    moe_stats stats;
    MUST(moe_losses_init(&losses, sizeof losses));
    MUST(moe_stats_init(&stats, sizeof stats));
    MUST(moe_pass_losses(p->w->pass, &losses));
    MUST(moe_pass_stats(p->w->pass, &stats));
    for (int i = 0; i < MOE_LOSS_SLOTS; i++)
        near_double(p, "loss", i, p->losses.value[i], losses.value[i]);
    for (int i = 0; i < MOE_STAT_SLOTS; i++)
        near_double(p, "statistic", i, p->stats.value[i], stats.value[i]);
}

void part_compare(const part *p)
{
    const whole *w = p->w;
    int64_t x = w->D * w->element, o = w->O * w->element;
    if (w->f.l.dropped != MOE_DROPPED_UNTOUCHED)
        same(p, "y", p->y, (const char *)w->b.y + p->first_token * o, p->tokens * o);
    const char *dx = (const char *)w->b.dx + p->first_token * x;
    if (ON_DEVICE && global(w->way)) /* through sums over tokens */
        near(p, "dx", p->dx, dx, p->tokens * w->D, w->f.g.dtype);
    else
        same(p, "dx", p->dx, dx, p->tokens * x);
    compare_gradients(p);
    if (global(w->way)) compare_shared(p);
    double squared = -1;
    MUST(moe_layer_gradient_norm(w->f.layer, &squared, NULL));
    double room = ON_DEVICE ? (w->element == 2 ? 0x1p-4 : 1e-5) * squared : 0;
    ck_assert_msg(fabs(squared - p->squared) <= room, "norm %.17g, %.17g on rank %d of %d, %s",
                  squared, p->squared, (int)p->rank, (int)p->ranks, w->f.text);
}

/* ---- shares ---------------------------------------------------------------------------------- */

/* In order: at least one each where there are enough, and of any sizes. */
static void share_in_order(part *parts, int64_t count, uint64_t number, int32_t ranks)
{
    int64_t next = 0;
    for (int32_t r = 0; r < ranks; r++) {
        int64_t left = count - next, others = count >= ranks ? ranks - 1 - r : 0;
        int64_t most = left - others, own = r == ranks - 1 ? left : 0;
        if (r < ranks - 1 && most > 0 && count >= ranks)
            own = 1 + (int64_t)(number + (uint64_t)r) % most;
        if (r < ranks - 1 && most > 0 && count < ranks) own = (int64_t)(number + (uint64_t)r) % 2;
        for (int64_t i = 0; i < own; i++) parts[r].numbers[i] = next++;
        parts[r].experts = own;
    }
}

/* Each to some rank, the last numbers first. */
static void share_anyhow(part *parts, int64_t count, uint64_t number, int32_t ranks)
{
    uint64_t state = number + 77;
    for (int64_t v = count - 1; v >= 0; v--) {
        part *p = &parts[(int32_t)(random_uniform(&state) * ranks)];
        p->numbers[p->experts++] = v;
    }
}

/* Groups in order, each with all of its experts, the last numbers first. */
static void share_by_group(part *parts, const whole *w, uint64_t number, int32_t ranks)
{
    int64_t groups = w->f.g.expert_groups, width = w->f.g.num_experts / groups, next = 0;
    for (int32_t r = 0; r < ranks; r++) {
        part *p = &parts[r];
        int64_t left = groups - next;
        p->with_group = true, p->first_group = next;
        p->groups = r == ranks - 1 ? left : (int64_t)((number + (uint64_t)r) % 3);
        if (p->groups > left) p->groups = left;
        next += p->groups;
        p->experts = p->groups * width;
        for (int64_t i = 0; i < p->experts; i++)
            p->numbers[i] = (p->first_group + p->groups) * width - 1 - i;
    }
}

void parts_share(part *parts, const whole *w, uint64_t number, int32_t ranks)
{
    int64_t token = 0, count = w->f.e.num_experts;
    for (int32_t r = 0; r < ranks; r++) {
        parts[r] = (part){.w = w,
                          .rank = r,
                          .ranks = ranks,
                          .first_token = token,
                          .tokens = ranks_tokens(ranks, r),
                          .number = number};
        token += parts[r].tokens;
    }
    bool by_group = w->f.g.kind == MOE_GATE_HIERARCHICAL && w->way != WAY_SHARDS &&
                    w->way != WAY_PADDED && !sliced(w->way);
    if (by_group) {
        share_by_group(parts, w, number, ranks);
    } else if (w->way == WAY_SHARDS || w->way == WAY_PADDED) {
        share_in_order(parts, count, number, ranks);
    } else if (w->way == WAY_ONE_OWNER) {
        for (int64_t v = 0; v < count; v++) parts[ranks - 1].numbers[v] = v;
        parts[ranks - 1].experts = count;
    } else {
        share_anyhow(parts, count, number, ranks);
    }
}

void parts_by_node(part *parts, int32_t ranks, int32_t nodes, uint64_t number)
{
    int32_t width = ranks / nodes;
    bool in_turn = number % 2;
    for (int32_t r = 0; r < ranks; r++) {
        parts[r].nodes = nodes;
        parts[r].node = in_turn ? r % nodes : r / width;
        parts[r].in_node = in_turn ? r / nodes : r % width;
    }
}
