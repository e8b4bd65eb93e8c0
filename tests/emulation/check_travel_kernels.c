/* check_travel_kernels.c - rows that travel between ranks (cuda/travel.cu, fill.cu) on the emulated
 * device: against the CPU's step, byte for byte, and where there is none against what the test
 * finds itself. */
#include "device_copy.h"
#include "support/suite.h"

static char name[256]; /* of the case */
static moe_context *context;

static void setup(void) { context = test_context(); }
static void teardown(void) { moe_context_destroy(context); }

static const int32_t DTYPES[] = {MOE_DTYPE_F32, MOE_DTYPE_BF16, MOE_DTYPE_F16};
static const moe__backend *cpu_of(int32_t dtype) { return moe__cpu_backend(MOE_ISA_PLAIN, dtype); }

static void *random_bytes(int64_t bytes)
{
    uint8_t *p = malloc((size_t)bytes + 1);
    for (int64_t i = 0; i < bytes; i++) p[i] = (uint8_t)draw();
    return p;
}

/* Elements of a dtype that add up to no NaN. */
static void draw_elements(void *to, int64_t count, int32_t dtype)
{
    for (int64_t i = 0; i < count; i++) {
        float v = draw_float();
        if (dtype == MOE_DTYPE_F64)
            ((double *)to)[i] = (double)v;
        else if (dtype == MOE_DTYPE_F32)
            ((float *)to)[i] = v;
        else
            ((uint16_t *)to)[i] = dtype == MOE_DTYPE_BF16 ? moe__to_bf16(v) : moe__to_f16(v);
    }
}

/* ---- moves ----------------------------------------------------------------------------------- */

typedef struct both_moves {
    moe__moves host, device;
    int64_t most_from, most_to; /* rows of what is read and written */
} both_moves;

static int64_t *words(int64_t count) { return calloc((size_t)count + 1, sizeof(int64_t)); }

/* Ranges with gaps between them. */
static both_moves draw_moves(int64_t count)
{
    both_moves b = {.host.count = count};
    int64_t *first = words(count + 1), *from = words(count), *to = words(count);
    for (int64_t s = 0; s < count; s++) {
        int64_t rows = draw_chance(30) ? 0 : draw_in(1, 9);
        from[s] = b.most_from + draw_below(3), to[s] = b.most_to + draw_below(3);
        first[s + 1] = first[s] + rows;
        b.most_from = from[s] + rows, b.most_to = to[s] + rows;
    }
    b.host.most = first[count] + draw_below(5); /* a bound */
    b.host.first = first, b.host.from = from, b.host.to = to;
    b.device = b.host;
    b.device.first = on_device(first, (size_t)(count + 1) * 8);
    b.device.from = on_device(from, (size_t)count * 8);
    b.device.to = on_device(to, (size_t)count * 8);
    return b;
}

static void free_moves(both_moves *b)
{
    free((void *)(uintptr_t)b->host.first), free((void *)(uintptr_t)b->host.from);
    free((void *)(uintptr_t)b->host.to);
    ok(cudaFree((void *)(uintptr_t)b->device.first));
    ok(cudaFree((void *)(uintptr_t)b->device.from));
    ok(cudaFree((void *)(uintptr_t)b->device.to));
}

/* The same from range `n` on. */
static moe__moves from_range(moe__moves m, const moe__moves *host, int64_t n)
{
    m.count -= n, m.most -= host->first[n] - host->first[0];
    m.first += n, m.from += n, m.to += n;
    return m;
}

/* ---- packing --------------------------------------------------------------------------------- */

/* Widths that are moved 16, 4, 2 bytes at once, or one. */
static void check_pack(int64_t unit)
{
    both_moves m = draw_moves(draw_in(1, 40));
    moe__pack_job host = {.workers = test_workers(context, 0), .columns = draw_in(1, 3)}, device;
    int64_t rows = moe__max(m.most_from, m.most_to) + 1, at = 0, *index = words(rows);
    if (draw_chance(20)) m.host.first = m.device.first = NULL, m.host.most = m.device.most = rows;
    for (int64_t i = 0; i < rows; i++) index[i] = draw_below(rows);
    host.moves = m.host;
    device = host;
    device.moves = m.device;
    if (m.host.first && draw_chance(50)) {
        int64_t n = draw_below(m.host.count);
        host.moves = from_range(m.host, &m.host, n);
        device.moves = from_range(m.device, &m.host, n);
    }
    void *there = on_device(index, (size_t)rows * 8), *memory[MOE__COLUMNS][2];
    int64_t ranges = m.host.first ? m.host.count : 0;
    moe__window *window = host_array(ranges + 1, sizeof *window); /* the index may be outside */
    for (int64_t s = 0; s < ranges; s++) {
        window[s].base = draw_below(rows);
        window[s].rows = draw_in(1, rows - window[s].base);
    }
    void *windows = on_device(window, (size_t)(ranges + 1) * sizeof *window);
    for (int64_t c = 0; c < host.columns; c++) {
        int64_t bytes = unit * draw_in(1, 40), stride = bytes + unit * draw_below(3);
        memory[c][0] = random_bytes(rows * stride);
        memory[c][1] = on_device(memory[c][0], (size_t)(rows * stride));
        host.column[c] = (moe__column){.from = memory[c][0],
                                       .index = draw_chance(50) ? index : NULL,
                                       .stride = stride,
                                       .bytes = bytes,
                                       .at = at,
                                       .by_place = draw_chance(30)};
        device.column[c] = host.column[c];
        device.column[c].from = memory[c][1];
        if (host.column[c].index) device.column[c].index = there;
        if (ranges && host.column[c].index && draw_chance(40))
            host.column[c].window = window, device.column[c].window = windows;
        at += bytes + unit * draw_below(2);
    }
    host.row_bytes = device.row_bytes = at;
    host.to = random_bytes(rows * at);
    device.to = on_device(host.to, (size_t)(rows * at));
    (void)snprintf(name, sizeof name, "unit %lld rows %lld", (ll)unit, (ll)rows);
    ck_assert_int_eq(cpu_of(MOE_DTYPE_F32)->travel_pack(&host), MOE_OK);
    ck_assert_int_eq(moe__cuda_travel_pack(&device), MOE_OK);
    ok(cudaDeviceSynchronize());
    same_bytes(host.to, device.to, (size_t)(rows * at), "to", name);
    for (int64_t c = 0; c < host.columns; c++) free(memory[c][0]), ok(cudaFree(memory[c][1]));
    free(host.to), free(index), free(window), ok(cudaFree(windows)), ok(cudaFree(device.to)),
        ok(cudaFree(there));
}

START_TEST(test_pack_as_cpu)
{
    static const int64_t UNITS[] = {16, 4, 2, 1};
    draw_state = 7;
    for (int i = 0; i < test_cases(); i++) check_pack(UNITS[i % 4]);
}
END_TEST

/* ---- tokens of nodes ------------------------------------------------------------------------- */

/* A plan's rows in any order of token, with tokens that have none. */
static void check_unique(int64_t T)
{
    int64_t nodes = draw_in(1, 5), E = draw_in(1, 9), slices = draw_in(1, 2), rows = 0;
    int64_t entries = T * draw_in(0, 4), all = nodes * T;
    moe__plan_arrays host = host_plan(T, entries, E, 1), device;
    int64_t *node = words(E * slices), *place = words(all), *token = words(all);
    int64_t *begin = words(nodes + 1);
    for (int64_t v = 0; v < E * slices; v++) node[v] = draw_below(nodes);
    for (int64_t e = 0; e < E; e++) {
        host.expert_begin[e] = rows;
        while (rows < entries && draw_chance(e + 1 < E ? 70 : 95)) {
            host.token_of_row[rows] = draw_below(T), host.entry_of_row[rows] = rows;
            host.expert_of_entry[rows++] = (int32_t)e;
        }
    }
    host.expert_begin[E] = host.rows = rows;
    device_plan(&device, &host);
    moe__unique_job h = {.workers = test_workers(context, 0),
                         .plan = &host,
                         .nodes = nodes,
                         .slices = slices,
                         .node_of_number = node,
                         .place = place,
                         .token = token,
                         .begin = begin};
    moe__unique_job d = h;
    device.rows = -1; /* which the host does not know */
    d.plan = &device, d.node_of_number = on_device(node, (size_t)(E * slices) * 8);
    d.place = on_device(place, (size_t)(all + 1) * 8),
    d.token = on_device(token, (size_t)(all + 1) * 8);
    d.begin = on_device(begin, (size_t)(nodes + 1) * 8);
    int64_t *scratch = words(2 * all + 8);
    d.scratch = on_device(scratch, (size_t)(2 * all + 8) * 8);
    (void)snprintf(name, sizeof name, "tokens %lld nodes %lld rows %lld", (ll)T, (ll)nodes,
                   (ll)rows);
    ck_assert_int_eq(cpu_of(MOE_DTYPE_F32)->travel_unique(&h), MOE_OK);
    ck_assert_int_eq(moe__cuda_travel_unique(&d), MOE_OK);
    ok(cudaDeviceSynchronize());
    same_bytes(begin, d.begin, (size_t)(nodes + 1) * 8, "begin", name);
    same_bytes(token, d.token, (size_t)begin[nodes] * 8, "token", name);
    same_bytes(place, d.place, (size_t)all * 8, "place", name); /* 0 where there is none, on both */
    for (int64_t n = 0, i = 0; n < nodes; n++)                  /* and by hand */
        for (int64_t t = 0; t < T; t++) {
            bool has = false;
            for (int64_t r = 0; r < rows; r++)
                for (int64_t s = 0; s < slices; s++)
                    has |= host.token_of_row[r] == t &&
                           node[host.expert_of_entry[r] * slices + s] == n;
            if (!has) continue;
            ck_assert_msg(token[i] == t && place[n * T + t] == i - begin[n], "%s", name);
            i++;
        }
    int64_t *arrays[] = {node, place, token, begin, scratch};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) free(arrays[i]);
    ok(cudaFree((void *)(uintptr_t)d.node_of_number)), ok(cudaFree(d.place)), ok(cudaFree(d.token));
    ok(cudaFree(d.begin)), ok(cudaFree(d.scratch));
    free_plans(&host, &device);
}

START_TEST(test_unique_as_cpu)
{
    draw_state = 21;
    check_unique(0), check_unique(1), check_unique(700);
    for (int i = 0; i < test_cases(); i++) check_unique(draw_in(1, 40));
}
END_TEST

/* ---- the owner's plan ------------------------------------------------------------------------ */

/* Of all experts, or without holes of those from `lo` on. */
static void check_order(int holes)
{
    int64_t sources = draw_in(1, 6), own = draw_in(1, 9);
    both_moves m = draw_moves(own * sources);
    int64_t *to = (int64_t *)(uintptr_t)m.host.to, T = 0, rows = m.host.first[own * sources];
    for (int64_t s = 0; s < own * sources && !holes; s++) to[s] = m.host.first[s];
    ok(cudaMemcpy((void *)(uintptr_t)m.device.to, to, (size_t)(own * sources) * 8,
                  cudaMemcpyHostToDevice));
    T = holes ? m.most_to + draw_below(4) : rows;
    moe__plan_arrays host = host_plan(T, T, own, 1), device;
    device_plan(&device, &host);
    int64_t lo = holes ? 0 : draw_below(own);
    moe__plan_arrays host_view = host, device_view = device;
    host_view.num_experts = device_view.num_experts = own - lo;
    host_view.expert_begin += lo, device_view.expert_begin += lo;
    int64_t weight_at = 4 * draw_below(4), row_bytes = 16 + 16 * draw_below(3);
    void *x = host_array(T * row_bytes / 4, sizeof(float));
    draw_elements(x, T * row_bytes / 4, MOE_DTYPE_F32);
    moe__order_job h = {.workers = test_workers(context, 0),
                        .plan = &host_view,
                        .sources = sources,
                        .moves = from_range(m.host, &m.host, lo * sources),
                        .holes = holes,
                        .x = x,
                        .row_bytes = row_bytes,
                        .weight_at = weight_at};
    moe__order_job d = h;
    d.plan = &device_view, d.moves = from_range(m.device, &m.host, lo * sources),
    d.x = on_device(x, (size_t)(T * row_bytes));
    (void)snprintf(name, sizeof name, "own %lld sources %lld holes %d", (ll)own, (ll)sources,
                   holes);
    ck_assert_int_eq(cpu_of(MOE_DTYPE_F32)->travel_order(&h), MOE_OK);
    ck_assert_int_eq(moe__cuda_travel_order(&d), MOE_OK);
    ok(cudaDeviceSynchronize());
#define SAME(field, count, element) \
    same_bytes(host.field, device.field, (size_t)(count) * (element), #field, name);
    EACH_PLAN_ARRAY(&host, SAME)
#undef SAME
    free(x), ok(cudaFree((void *)(uintptr_t)d.x));
    free_plans(&host, &device), free_moves(&m);
}

START_TEST(test_order_as_cpu)
{
    draw_state = 8;
    for (int i = 0; i < test_cases(); i++) check_order(i % 2);
}
END_TEST

/* ---- what comes back ------------------------------------------------------------------------- */

/* A plan with its rows, on both sides. */
static moe__plan_arrays plan_with_rows(int64_t T, int64_t K, int64_t E)
{
    moe__plan_arrays p = draw_plan(T, K, E, 1, 0);
    moe__plan_rows_job job = {.workers = test_workers(context, 0), .plan = &p};
    ck_assert_int_eq(cpu_of(MOE_DTYPE_F32)->plan_rows(&job), MOE_OK);
    return p;
}

typedef moe_status merge_step(const moe__merge_job *);
static merge_step *const MERGE[] = {moe__cuda_travel_merge_f32, moe__cuda_travel_merge_bf16,
                                    moe__cuda_travel_merge_f16};

/* Of what was padded, row n of expert e lies at e C + n. */
static void same_merged(const moe__merge_job *h, const moe__merge_job *d, int64_t element,
                        int64_t C)
{
    const moe__plan_arrays *p = h->plan;
    int64_t rows = C ? p->num_experts * C : p->rows;
    char *found = off_device(d->merged, (size_t)(rows * h->row_bytes));
    for (int64_t r = 0; r < p->rows; r++) {
        int64_t e = p->expert_of_entry[p->entry_of_row[r]];
        const char *want = (const char *)h->merged + r * h->row_bytes;
        const char *got = found + (C ? e * C + r - p->expert_begin[e] : r) * h->row_bytes;
        ck_assert_msg(memcmp(want, got, (size_t)(h->width * element)) == 0, "%s: row %lld", name,
                      (ll)r);
        if (h->real_at >= 0)
            ck_assert_msg(memcmp(want + h->real_at, got + h->real_at, 4) == 0, "%s: real %lld",
                          name, (ll)r);
    }
    free(found);
}

static void check_merge(int which, int padded)
{
    int32_t dtype = DTYPES[which];
    int64_t T = draw_in(1, 30), E = draw_in(1, 9), S = draw_in(1, 3),
            element = moe__dtype_size(dtype);
    moe__plan_arrays host = plan_with_rows(T, draw_in(1, 3), E), device;
    int64_t C = padded ? host.rows + 1 : 0, all = 0;
    device_plan(&device, &host);
    int64_t width = draw_chance(50) ? 8 * draw_in(1, 30) : draw_in(1, 70);
    int64_t real_at = draw_chance(60) ? (width * element + 3) / 4 * 4 : -1;
    int64_t bytes = (moe__max(width * element, real_at + 4) + 15) / 16 * 16;
    int64_t *slot = words(E * S), *at = words(E * S);
    for (int64_t v = 0; v < E * S; v++) slot[v] = E * S - 1 - v;
    for (int64_t v = 0; v < E * S; v++) {
        at[slot[v]] = all;
        all += host.expert_begin[v / S + 1] - host.expert_begin[v / S];
    }
    void *results = host_array(all * bytes / element, (size_t)element);
    draw_elements(results, all * bytes / element, dtype);
    for (int64_t r = 0; r < all && real_at >= 0; r++)
        draw_elements((char *)results + r * bytes + real_at, 1, MOE_DTYPE_F32);
    moe__merge_job h = {.workers = test_workers(context, 0),
                        .plan = &host,
                        .most = padded ? E * C : host.rows,
                        .slices = S,
                        .slot_of_number = slot,
                        .all_at = at,
                        .results = results,
                        .merged = host_array(host.rows * bytes, 1),
                        .row_bytes = bytes,
                        .width = width,
                        .real_at = real_at};
    moe__merge_job d = h;
    d.plan = &device, d.slot_of_number = on_device(slot, (size_t)(E * S) * 8);
    d.all_at = on_device(at, (size_t)(E * S) * 8);
    d.results = on_device(results, (size_t)(all * bytes));
    d.padded_rows = C;
    ok(cudaMalloc(&d.merged, (size_t)((C ? E * C : host.rows) * bytes + 16)));
    (void)snprintf(name, sizeof name, "dtype %d width %lld real %lld S %lld C %lld", dtype,
                   (ll)width, (ll)real_at, (ll)S, (ll)C);
    ck_assert_int_eq(cpu_of(dtype)->travel_merge(&h), MOE_OK);
    ck_assert_int_eq(MERGE[which](&d), MOE_OK);
    ok(cudaDeviceSynchronize());
    same_merged(&h, &d, element, C);
    moe__entry_grad_job g = {.workers = h.workers,
                             .plan = &host,
                             .rows = h.merged,
                             .row_bytes = bytes,
                             .real_at = real_at,
                             .entry_grad = host_array(host.entries, 4)};
    moe__entry_grad_job on = g;
    on.plan = &device, on.rows = d.merged, on.padded_rows = C;
    on.entry_grad = on_device(g.entry_grad, (size_t)host.entries * 4);
    if (real_at >= 0) {
        ck_assert_int_eq(cpu_of(dtype)->travel_entry_grad(&g), MOE_OK);
        ck_assert_int_eq(moe__cuda_travel_entry_grad(&on), MOE_OK);
        ok(cudaDeviceSynchronize());
        same_floats(g.entry_grad, on.entry_grad, host.entries, "entry_grad", name);
    }
    free(results), free(slot), free(at), free(h.merged), free(g.entry_grad);
    ok(cudaFree((void *)(uintptr_t)d.results)), ok(cudaFree(d.merged)), ok(cudaFree(on.entry_grad));
    ok(cudaFree((void *)(uintptr_t)d.slot_of_number)), ok(cudaFree((void *)(uintptr_t)d.all_at));
    free_plans(&host, &device);
}

START_TEST(test_merge_as_cpu)
{
    draw_state = 9 + (uint64_t)_i;
    for (int i = 0; i < test_cases(); i++) check_merge(_i, i % 3 == 0);
}
END_TEST

/* ---- what does not stay ---------------------------------------------------------------------- */

static void check_drop(int by_score)
{
    moe__plan_arrays host = plan_with_rows(draw_in(1, 60), 2, draw_in(1, 9)), device;
    int64_t E = host.num_experts, *stay = words(E);
    uint8_t *keep = malloc((size_t)host.rows + 1);
    for (int64_t e = 0; e < E; e++) stay[e] = draw_below(8);
    for (int64_t r = 0; r < host.rows; r++) keep[r] = draw_chance(60);
    device_plan(&device, &host);
    moe__drop_job h = {.workers = test_workers(context, 0),
                       .plan = &host,
                       .moves = {.count = E,
                                 .most = host.rows,
                                 .first = host.expert_begin,
                                 .from = host.expert_begin},
                       .stay = stay,
                       .keep = by_score ? keep : NULL};
    moe__drop_job d = h;
    d.plan = &device, d.moves.first = d.moves.from = device.expert_begin;
    d.stay = on_device(stay, (size_t)E * 8);
    if (by_score) d.keep = on_device(keep, (size_t)host.rows);
    (void)snprintf(name, sizeof name, "E %lld rows %lld", (ll)E, (ll)host.rows);
    ck_assert_int_eq(cpu_of(MOE_DTYPE_F32)->travel_drop(&h), MOE_OK);
    ck_assert_int_eq(moe__cuda_travel_drop(&d), MOE_OK);
    ok(cudaDeviceSynchronize());
    SAME_WORDS(host.slot_of_entry, device.slot_of_entry, host.entries, "slot_of_entry", name);
    ok(cudaFree((void *)(uintptr_t)d.stay));
    if (by_score) ok(cudaFree((void *)(uintptr_t)d.keep));
    free(stay), free(keep), free_plans(&host, &device);
}

START_TEST(test_drop_as_cpu)
{
    draw_state = 10;
    for (int i = 0; i < test_cases(); i++) check_drop(i % 2);
}
END_TEST

/* ---- sums over ranks ------------------------------------------------------------------------- */

START_TEST(test_add_as_cpu)
{
    static const int32_t ALL[] = {MOE_DTYPE_F64, MOE_DTYPE_F32, MOE_DTYPE_BF16, MOE_DTYPE_F16};
    moe__workers w = test_workers(context, 0);
    draw_state = 11;
    for (int i = 0; i < test_cases(); i++) {
        int32_t dtype = ALL[i % 4];
        int64_t n = draw_below(600), count = draw_in(1, 9), size = moe__dtype_size(dtype);
        void *host = host_array(n * count, (size_t)size);
        draw_elements(host, n * count, dtype);
        void *device = on_device(host, (size_t)(n * count * size));
        (void)snprintf(name, sizeof name, "dtype %d n %lld count %lld", dtype, (ll)n, (ll)count);
        ck_assert_int_eq(cpu_of(MOE_DTYPE_F32)->travel_add(&w, host, n, count, dtype), MOE_OK);
        ck_assert_int_eq(moe__cuda_travel_add(&w, device, n, count, dtype), MOE_OK);
        ok(cudaDeviceSynchronize());
        same_bytes(host, device, (size_t)(n * size), "sum", name);
        free(host), ok(cudaFree(device));
    }
}
END_TEST

/* ---- blocks ---------------------------------------------------------------------------------- */

typedef struct blocks_case {
    int64_t P, own, C, block_words, *first_slot, *number, *begin, *blocks;
    moe__blocks_job job;
    moe__plan_arrays plan;
} blocks_case;

static void *moved(void *host, int64_t bytes)
{
    void *device = on_device(host, (size_t)bytes);
    free(host);
    return device;
}

/* `own` experts on each rank, in order, each with up to two rows more than fit now and then. */
static blocks_case draw_blocks(int64_t P, int64_t own, int64_t C, int chance)
{
    blocks_case b = {.P = P, .own = own, .C = C};
    int64_t slots = P * own;
    b.first_slot = words(P + 1), b.number = words(slots), b.begin = words(slots + 1);
    for (int64_t p = 0; p <= P; p++) b.first_slot[p] = p * own;
    for (int64_t s = 0; s < slots; s++) {
        b.number[s] = s;
        b.begin[s + 1] = b.begin[s] + (draw_chance(chance) ? C + draw_in(1, 2) : draw_in(0, C));
    }
    b.block_words = 3 + own + draw_below(3);
    b.block_words += b.block_words % 2;
    b.blocks = random_bytes(P * b.block_words * 8);
    b.plan = (moe__plan_arrays){.num_experts = slots};
    b.plan.expert_begin = on_device(b.begin, (size_t)(slots + 1) * 8);
    b.job = (moe__blocks_job){.workers = test_workers(context, 0),
                              .plan = &b.plan,
                              .ranks = P,
                              .rank = P - 1,
                              .slots = slots,
                              .own = own,
                              .slices = 1,
                              .padded_rows = C,
                              .first_slot = on_device(b.first_slot, (size_t)(P + 1) * 8),
                              .number_of_slot = on_device(b.number, (size_t)slots * 8),
                              .slot_of_number = on_device(b.number, (size_t)slots * 8),
                              .blocks = on_device(b.blocks, (size_t)(P * b.block_words * 8)),
                              .block_bytes = b.block_words * 8,
                              .words = {1, 5, MOE_OK},
                              .calls = 4,
                              .counts = 1,
                              .first = moved(words(slots + 1), (slots + 1) * 8),
                              .from = moved(words(slots), slots * 8),
                              .record = moved(words(1), 8)};
    return b;
}

/* Apart, for a compiler that takes a number for one below 0 warns of the sizes. */
static __attribute__((noinline)) int64_t *words_of_device(const void *device, int64_t count)
{
    return off_device(device, (size_t)count * 8);
}

static int64_t record_of(const blocks_case *b)
{
    int64_t record;
    ok(cudaMemcpy(&record, b->job.record, 8, cudaMemcpyDeviceToHost));
    return record;
}

static void free_blocks(blocks_case *b)
{
    free(b->first_slot), free(b->number), free(b->begin), free(b->blocks);
    ok(cudaFree((void *)(uintptr_t)b->job.first_slot));
    ok(cudaFree((void *)(uintptr_t)b->job.number_of_slot));
    ok(cudaFree((void *)(uintptr_t)b->job.slot_of_number));
    ok(cudaFree(b->job.blocks)), ok(cudaFree(b->job.first)), ok(cudaFree(b->job.from));
    ok(cudaFree(b->job.record)), ok(cudaFree(b->plan.expert_begin));
}

START_TEST(test_blocks_are_written)
{
    draw_state = 12;
    for (int i = 0; i < test_cases(); i++) {
        blocks_case b = draw_blocks(draw_in(1, 9), draw_in(1, i % 7 ? 9 : 90), draw_in(1, 6),
                                    i % 2);
        int64_t at = 0, over = -1, slots = b.job.slots;
        ck_assert_int_eq(moe__cuda_travel_write_blocks(&b.job), MOE_OK);
        ok(cudaDeviceSynchronize());
        int64_t *first = words_of_device(b.job.first, slots + 1);
        int64_t *from = words_of_device(b.job.from, slots);
        int64_t *got = words_of_device(b.job.blocks, b.P * b.block_words);
        for (int64_t s = 0; s < slots; s++) {
            int64_t rows = b.begin[s + 1] - b.begin[s], kept = moe__min(rows, b.C);
            if (rows > b.C) over = s;
            ck_assert(first[s] == at && from[s] == b.begin[s]);
            ck_assert_int_eq(got[s / b.own * b.block_words + 3 + s % b.own], kept);
            at += kept;
        }
        ck_assert_int_eq(first[slots], at);
        for (int64_t p = 0; p < b.P; p++) {
            const int64_t *words_of = got + p * b.block_words;
            ck_assert(words_of[0] == 1 && words_of[1] == 5);
            ck_assert_int_eq(words_of[2], over < 0 ? MOE_OK : MOE_ERROR_BUFFER_TOO_SMALL);
            for (int64_t k = 3 + b.own; k < b.block_words; k++) /* rows */
                ck_assert(words_of[k] == b.blocks[p * b.block_words + k]);
        }
        int64_t want = (int64_t)MOE__BLOCKS_ROWS << 56 | (b.P - 1) << 32 | over;
        ck_assert(record_of(&b) == (over < 0 ? 0 : want));
        free(first), free(from), free(got), free_blocks(&b);
    }
}
END_TEST

/* What is wrong with a block: nothing, another call or layer, a status, a count. */
START_TEST(test_blocks_are_read)
{
    draw_state = 13;
    for (int i = 0; i < test_cases(); i++) {
        blocks_case b = draw_blocks(draw_in(2, 9), draw_in(1, i % 7 ? 9 : 90), draw_in(1, 6), 0);
        int64_t bad = draw_below(b.P - 1), at = 0, kind = i % 6, P = b.P, want = 0;
        for (int64_t p = 0; p < P; p++) {
            int64_t *w = b.blocks + p * b.block_words;
            w[0] = 1, w[1] = 5, w[2] = MOE_OK;
            for (int64_t k = 0; k < b.own; k++) w[3 + k] = draw_in(0, b.C);
        }
        int64_t *wrong = b.blocks + bad * b.block_words;
        if (kind == 1) wrong[0] = 2, want = (int64_t)MOE__BLOCKS_CALL << 56 | bad << 32;
        if (kind == 2) wrong[1] = 6, want = (int64_t)MOE__BLOCKS_CALL << 56 | bad << 32;
        if (kind == 3) wrong[2] = 77, want = (int64_t)MOE__BLOCKS_CALL << 56 | bad << 32;
        if (kind == 4) wrong[2] = -3, want = (int64_t)MOE__BLOCKS_FAILED << 56 | bad << 32 | 3;
        if (kind == 5)
            wrong[3] = b.C + 1, want = (int64_t)MOE__BLOCKS_COUNT << 56 | bad << 32 | (b.C + 1);
        ok(cudaMemcpy(b.job.blocks, b.blocks, (size_t)(P * b.block_words * 8),
                      cudaMemcpyHostToDevice));
        ck_assert_int_eq(moe__cuda_travel_read_blocks(&b.job), MOE_OK);
        ok(cudaDeviceSynchronize());
        int64_t *first = words_of_device(b.job.first, b.own * P + 1);
        int64_t *from = words_of_device(b.job.from, b.own * P);
        for (int64_t k = 0; k < b.own; k++) {
            int64_t begin = at;
            for (int64_t p = 0; p < P; p++) {
                bool none = p == bad && (kind == 5 ? k == 0 : kind > 0);
                ck_assert_int_eq(first[k * P + p], at);
                ck_assert_int_eq(from[k * P + p], k * P * b.C + at - begin);
                at += none ? 0 : b.blocks[p * b.block_words + 3 + k];
            }
        }
        ck_assert_int_eq(first[b.own * P], at);
        ck_assert(record_of(&b) == want);
        free(first), free(from), free_blocks(&b);
    }
}
END_TEST

/* ---- strided copies -------------------------------------------------------------------------- */

START_TEST(test_copies_of_tensors)
{
    moe__workers w = test_workers(context, 0);
    draw_state = 14;
    for (int i = 0; i < test_cases(); i++) {
        int64_t n[3] = {draw_in(0, 4), draw_in(1, 9), draw_in(1, 40)}, size = i % 2 ? 2 : 4;
        int64_t dense[3] = {n[1] * n[2], n[2], 1}, odd[3] = {2 * n[1] * n[2] + 1, 2, 2 * n[1]};
        int64_t elements = n[0] * odd[0] + 1;
        char *from = random_bytes(elements * size), *to = random_bytes(elements * size);
        char *there = on_device(from, (size_t)(elements * size));
        char *copy = on_device(to, (size_t)(elements * size));
        const int64_t *a = i % 3 ? odd : dense, *b = i % 3 == 1 ? dense : odd;
        ck_assert_int_eq(moe__cuda_copy_strided(&w, copy, a, there, b, n, size), MOE_OK);
        ok(cudaDeviceSynchronize());
        for (int64_t x = 0; x < n[0]; x++)
            for (int64_t y = 0; y < n[1]; y++)
                for (int64_t z = 0; z < n[2]; z++)
                    memcpy(to + (x * a[0] + y * a[1] + z * a[2]) * size,
                           from + (x * b[0] + y * b[1] + z * b[2]) * size, (size_t)size);
        same_bytes(to, copy, (size_t)(elements * size), "to", "a tensor");
        free(from), free(to), ok(cudaFree(there)), ok(cudaFree(copy));
    }
}
END_TEST

int main(int argc, char **argv)
{
    Suite *suite = suite_create("travel kernels");
    TCase *tests = tcase_create("travel kernels");
    (void)argv;
    tcase_set_timeout(tests, 600);
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_add_test(tests, test_pack_as_cpu);
    tcase_add_test(tests, test_unique_as_cpu);
    tcase_add_test(tests, test_order_as_cpu);
    tcase_add_loop_test(tests, test_merge_as_cpu, 0, 3);
    tcase_add_test(tests, test_drop_as_cpu);
    tcase_add_test(tests, test_add_as_cpu);
    tcase_add_test(tests, test_blocks_are_written);
    tcase_add_test(tests, test_blocks_are_read);
    tcase_add_test(tests, test_copies_of_tensors);
    suite_add_tcase(suite, tests);
    return run_suite(suite, argc < 2);
}
