/* ffn_rows.c - blocks of rows of all experts, and an expert's forward on one:
 *
 *     z1 = x W1 + b1,  z3 = x W3 + b3,  h = act(z1) [* z3],  out = h W2 + b2
 *
 * The rows of a block are packed once. Panel by panel of W1 (with W3 in the other half of it) GROUP
 * columns of z are made, activated, kept if a backward will come, and packed as the left operand of
 * W2, whose panels follow. While the rows are multiplied by one panel, the next is fetched from
 * memory: a panel in place is never copied, and other weights are packed one panel at a time. */
#include "cpu/ffn_rows.h"

#include <string.h>

_Static_assert(TILE_V == 2, "a tile has a vector of each half of a panel");

enum {
    PANEL_BYTES = 28 * 1024,   /* of a panel: with the rows of a tile, what the first cache holds */
    BLOCK_BYTES = 1200 * 1024, /* of packed rows: what stays in the second cache of most machines */
    PANEL_K = PANEL_BYTES / MOE__PANEL / (int)sizeof(real),
    MAX_ROWS = 13 * 14,
    MIN_ROWS = 40 /* below, every panel is read too often */
};

static int64_t take(int64_t *reals, int64_t count)
{
    int64_t at = *reals;
    *reals += (count + 15) & ~(int64_t)15;
    return at;
}

/* Rows whose packed operands have `width` numbers each. */
static int64_t rows_for(int64_t width)
{
    int64_t rows = BLOCK_BYTES / (int64_t)sizeof(real) / width;
    return rows < MIN_ROWS ? 0 : moe__min(rows, MAX_ROWS);
}

ffn_block MOE_KERNEL(ffn_block_forward)(int64_t d_model, int64_t d_hidden)
{
    ffn_block b = {0};
    if (d_model < 1 || d_hidden < 1 || d_model > BLOCK_BYTES || d_hidden > BLOCK_BYTES) return b;
    b.rows = rows_for(d_model + d_hidden) / TILE_M * TILE_M;
    if (b.rows == 0) return b;
    int64_t tiles = b.rows / TILE_M + 1;
    b.first = take(&b.reals, tiles * (TILE_M * d_model + SPILL));
    b.second = take(&b.reals, tiles * (TILE_M * d_hidden + SPILL));
    b.panel = take(&b.reals, moe__max(d_model, d_hidden) * MOE__PANEL);
    b.line = take(&b.reals, b.rows * GROUP);
    b.line3 = take(&b.reals, b.rows * GROUP);
    b.h = take(&b.reals, b.rows * GROUP);
    return b;
}

/* ---- blocks ---------------------------------------------------------------------------------- */

/* Rows of a block of expert e: at most run->block.rows, equal within 1. */
static int64_t blocks_of(const ffn_run *run, int64_t e)
{
    const int64_t *begin = run->job->plan->expert_begin;
    return blocks(begin[e + 1] - begin[e], run->block.rows);
}

/* tile_begin[i] counts the blocks before the i-th expert of tile_order: those with large blocks
 * first, so that no thread begins a long one when the others end. */
static void order_experts(ffn_run *run)
{
    enum { CLASSES = 8 };
    const moe__experts_job *job = run->job;
    const int64_t *begin = job->plan->expert_begin;
    int64_t experts = job->plan->num_experts, first[CLASSES + 1] = {0};
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t e = 0; e < experts; e++) {
            int64_t rows = begin[e + 1] - begin[e], count = blocks_of(run, e);
            if (rows == 0) continue;
            int64_t size = (rows / count * CLASSES - 1) / run->block.rows;
            int64_t rank = CLASSES - 1 - moe__max(0, moe__min(size, CLASSES - 1));
            if (pass == 0)
                first[rank + 1]++;
            else
                job->tile_order[first[rank]++] = e;
        }
        for (int i = 0; pass == 0 && i < CLASSES; i++) first[i + 1] += first[i];
        if (pass == 0) run->used = first[CLASSES];
    }
    job->tile_begin[0] = 0;
    for (int64_t i = 0; i < run->used; i++)
        job->tile_begin[i + 1] = job->tile_begin[i] + blocks_of(run, job->tile_order[i]);
    run->count = job->tile_begin[run->used];
}

bool MOE_KERNEL(ffn_run_begin)(ffn_run *run)
{
    const moe__experts_job *job = run->job;
    const moe__plan_arrays *plan = job->plan;
    int64_t rows = plan->expert_begin[plan->num_experts] - plan->expert_begin[0];
    int64_t threads = job->workers.context->threads;
    if (run->block.rows == 0 || rows == 0 ||
        job->workers.worker_bytes < run->block.reals * (int64_t)sizeof(real))
        return false;
    /* So small that the threads end together. */
    int64_t fair = moe__max(2 * TILE_M, rows / (8 * threads));
    run->block.rows = moe__min(run->block.rows, fair);
    order_experts(run);
    atomic_init(&run->next, 0);
    return threads == 1 || run->count >= 2 * threads;
}

/* The place in tile_order of the expert a block belongs to. */
static int64_t place_of_block(const ffn_run *run, int64_t block)
{
    const int64_t *begin = run->job->tile_begin;
    int64_t low = 0, high = run->used - 1;
    while (low < high) {
        int64_t middle = low + (high - low + 1) / 2;
        if (begin[middle] <= block)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

static void run_blocks(const ffn_run *run, int64_t from, int64_t to, real *scratch)
{
    const moe__experts_job *job = run->job;
    const int64_t *tile_begin = job->tile_begin, *begin = job->plan->expert_begin;
    int64_t at = place_of_block(run, from);
    for (int64_t block = from; block < to; block++) {
        while (block >= tile_begin[at + 1]) at++;
        int64_t e = job->tile_order[at], rows = begin[e + 1] - begin[e];
        int64_t parts = blocks_of(run, e), i = block - tile_begin[at], r = part(rows, parts, i);
        bool last = block + 1 == tile_begin[at + 1];
        int64_t next = last && at + 1 < run->used ? job->tile_order[at + 1] : e;
        run->body(run, e, next, begin[e] + r, part(rows, parts, i + 1) - r, scratch);
    }
}

/* Small blocks are taken several at a time, one at a time at the end. */
static void run_task(void *argument, int64_t index)
{
    enum { MOST = 16 };
    ffn_run *run = argument;
    const moe__workers *w = &run->job->workers;
    real *scratch = (real *)(void *)(w->scratch + index * w->worker_bytes);
    for (;;) {
        int64_t left = run->count - atomic_load_explicit(&run->next, memory_order_relaxed);
        int64_t some = moe__max(1, moe__min(MOST, left / (8 * (int64_t)w->context->threads)));
        int64_t from = atomic_fetch_add_explicit(&run->next, some, memory_order_relaxed);
        if (from >= run->count) return;
        run_blocks(run, from, moe__min(run->count, from + some), scratch);
    }
}

moe_status MOE_KERNEL(ffn_run_all)(ffn_run *run)
{
    const moe__workers *w = &run->job->workers;
    int64_t tasks = moe__min(run->count, w->context->threads);
    return moe__parallel(w->context, tasks, run_task, run, w->function);
}

/* ---- a product by one panel ------------------------------------------------------------------ */

/* The left operand: [k] lines of the rows of a tile, tiles `step` apart. */
typedef struct packed {
    const real *at;
    int64_t step, k, rows;
} packed;

/* Columns of a right operand, and what to fetch meanwhile. */
typedef struct panel {
    const real *at; /* [k][MOE__PANEL] */
    bool halves;    /* of W1 and of W3 */
    read_ahead ahead;
    real bias[MOE__PANEL]; /* in the order of tiles */
    bool biased;
} panel;

/* Rows k .. k+count-1 of a panel times tile q: the chains begin, or go on, in out. */
static void times_piece(const packed *a, const panel *b, int64_t q, int64_t k, int64_t count,
                        real *out, real *out3, int64_t out_stride)
{
    int64_t tiles = blocks(a->rows, TILE_M), width = b->halves ? VEC_N : TILE_N;
    int64_t i = part(a->rows, tiles, q), m = part(a->rows, tiles, q + 1) - i;
    micro_job job = {.k = count,
                     .a = a->at + q * a->step + k * m,
                     .b_stride = MOE__PANEL,
                     .b_step = b->halves ? HALF_PANEL : VEC_N,
                     .from_stride = out_stride,
                     .out_stride = out_stride,
                     .ahead = b->ahead};
    job.ahead.first = k * tiles + q * count;
    for (int64_t sub = 0; sub < MOE__PANEL / TILE_N; sub++) {
        job.b = b->at + k * MOE__PANEL + sub * width;
        job.out[0] = out + i * out_stride + sub * width;
        job.out[1] = b->halves ? out3 + i * out_stride + sub * width : job.out[0] + VEC_N;
        for (int v = 0; v < TILE_V; v++) job.from[v] = k > 0 ? job.out[v] : NULL;
        job.bias = b->biased && k + count == a->k ? b->bias + sub * TILE_N : NULL;
        MOE_KERNEL(micro_right)(m, &job);
        job.ahead.step = 0;
    }
}

/* out[rows] (and, of halves, out3), lines out_stride apart: as much of the panel as the first cache
 * holds, times all rows, then the rest of it. */
static void times_panel(const packed *a, const panel *b, real *out, real *out3, int64_t out_stride)
{
    int64_t tiles = blocks(a->rows, TILE_M), parts = tiles > 1 ? blocks(a->k, PANEL_K) : 1;
    for (int64_t p = 0; p < parts; p++) {
        int64_t k = part(a->k, parts, p), count = part(a->k, parts, p + 1) - k;
        for (int64_t q = 0; q < tiles; q++) times_piece(a, b, q, k, count, out, out3, out_stride);
    }
}

/* Weights of one expert, W1 alone or with W3, as panels to come. */
typedef struct weights {
    const moe__matrices *m, *m3; /* m3 NULL: no halves */
    const void *at, *at3;
    int64_t k, n;
} weights;

static weights weights_of(const moe__matrices *m, const moe__matrices *m3, int64_t e, int64_t k,
                          int64_t n)
{
    return (weights){m, m3, matrix_of(m, e), m3 ? matrix_of(m3, e) : NULL, k, n};
}

/* Columns of each of the weights that one panel holds. */
static int64_t panel_width(const weights *w) { return w->m3 ? HALF_PANEL : MOE__PANEL; }

static bool in_place(const weights *w)
{
    if (!WIDE(w->m->wide) || w->m->stride_col != 1 || w->m->panel != panel_width(w)) return false;
    return !w->m3 || (w->m3->panel == HALF_PANEL && (const char *)w->at3 - (const char *)w->at ==
                                                        HALF_PANEL * (int64_t)sizeof(real));
}

/* What fetches panel j while another is multiplied by `tiles` tiles of rows. */
static read_ahead ahead_of(const weights *w, int64_t j, int64_t tiles)
{
    int64_t bytes = WIDE(w->m->wide) ? (int64_t)sizeof(real) : (int64_t)sizeof(element);
    const char *at = place_at(w->at, element_of(w->m, 0, j), w->m->wide);
    read_ahead ahead = {.at = at, .too = at + 64, .rate = AHEAD_ONE / tiles};
    ahead.step = w->m->stride_col == 1 ? w->m->stride_row * bytes : 128;
    if (w->m3 && !in_place(w)) ahead.too = place_at(w->at3, element_of(w->m3, 0, j), w->m3->wide);
    return ahead;
}

/* Columns from j on, packed into `room` unless they are a panel already. */
static void take_panel(panel *to, const weights *w, int64_t j, real *room)
{
    int64_t width = panel_width(w), n = moe__min(width, w->n - j);
    to->halves = w->m3 != NULL;
    to->at = room;
    if (in_place(w)) {
        to->at = place_at(w->at, element_of(w->m, 0, j), 1);
        return;
    }
    MOE_KERNEL(pack_columns)(room, MOE__PANEL, width, w->m, w->at, 0, w->k, j, n);
    if (w->m3)
        MOE_KERNEL(pack_columns)(room + width, MOE__PANEL, width, w->m3, w->at3, 0, w->k, j, n);
}

/* Biases of the same columns, vector by vector as tiles have them. */
static void take_bias(panel *to, const moe__matrices *bias, const moe__matrices *bias3, int64_t e,
                      int64_t j, int64_t n)
{
    const void *at[2] = {matrix_of(bias, e), to->halves ? matrix_of(bias3, e) : NULL};
    to->biased = at[0] != NULL;
    for (int64_t l = 0; to->biased && l < MOE__PANEL; l++) {
        int64_t half = to->halves ? l / VEC_N % 2 : 0;
        int64_t column = to->halves ? l / TILE_N * VEC_N + l % VEC_N : l;
        const moe__matrices *m = half ? bias3 : bias;
        to->bias[l] = j + column < n ? get_at(at[half], (j + column) * m->stride_col, m->wide)
                                     : R(0.0);
    }
}

/* ---- forward --------------------------------------------------------------------------------- */

static void pack_tiles(real *to, int64_t step, const moe__rows *a, int64_t r, int64_t m, int64_t k)
{
    int64_t tiles = blocks(m, TILE_M);
    for (int64_t q = 0; q < tiles; q++) {
        int64_t i = part(m, tiles, q), width = part(m, tiles, q + 1) - i;
        MOE_KERNEL(pack_rows)(to + q * step, width, a, r + i, width, 0, k);
    }
}

/* count elements that are reals here, or rounded into `room`. */
static const element *as_elements(const real *from, element *room, int64_t count)
{
#ifdef MOE_HALF
    for (int64_t i = 0; i < count; i++) room[i] = put(from[i]);
    return room;
#else
    (void)room, (void)count;
    return from;
#endif
}

/* h[width] of row r from what the products wrote of its columns j on. */
static void activate_row(const ffn_run *run, int64_t r, int64_t j, int64_t width, const real *z1,
                         const real *z3, element *h)
{
    const moe__experts_job *job = run->job;
    bool saved = job->h != job->z1;
    int64_t at = r * job->config->d_hidden + j;
    element room1[GROUP], room3[GROUP];
    const element *e1 = as_elements(z1, room1, width);
    const element *e3 = job->z3 ? as_elements(z3, room3, width) : NULL;
    MOE_KERNEL(activate)(&run->act, width, h, e1, e3);
    if (!saved) return;
    /* Its gradient by the weight needs h before the backward has made it again. */
    if (job->config->weight_position == MOE_WEIGHT_ON_HIDDEN)
        memcpy((element *)job->h + at, h, (size_t)width * sizeof *h);
    memcpy((element *)job->z1 + at, e1, (size_t)width * sizeof *e1);
    if (e3) memcpy((element *)job->z3 + at, e3, (size_t)width * sizeof *e3);
}

/* z and h of hidden columns j .. j+width-1, h packed as the next operand's columns. */
static void hidden_group(const ffn_run *run, const packed *x, const weights *w,
                         const weights *after, int64_t e, int64_t r, int64_t j, int64_t width,
                         real *s)
{
    const moe__experts_job *job = run->job;
    const ffn_block *b = &run->block;
    real *z1 = s + b->line, *z3 = s + b->line3;
    element *h = (element *)(void *)(s + b->h);
    int64_t tiles = blocks(x->rows, TILE_M), F = w->n;
    panel p;
    for (int64_t l = 0; l < width; l += panel_width(w)) {
        int64_t next = j + l + panel_width(w);
        take_panel(&p, w, j + l, s + b->panel);
        take_bias(&p, &job->b1, &job->b3, e, j + l, F);
        p.ahead = next < F ? ahead_of(w, next, tiles) : ahead_of(after, 0, tiles);
        times_panel(x, &p, z1 + l, z3 + l, GROUP);
    }
    for (int64_t i = 0; i < x->rows; i++)
        activate_row(run, r + i, j, width, z1 + i * GROUP, z3 + i * GROUP, h + i * GROUP);
    moe__rows rows = {.data = h, .stride = GROUP};
    const real *scale = run->hidden_scale;
    if (scale) rows.scale = scale + r;
    for (int64_t q = 0; q < tiles; q++) {
        int64_t i = part(x->rows, tiles, q), m = part(x->rows, tiles, q + 1) - i;
        real *to = s + b->second + q * (TILE_M * F + SPILL) + j * m;
        MOE_KERNEL(pack_rows)(to, m, &rows, i, m, 0, width);
    }
}

/* Columns j .. j+n-1 of out, from what the product wrote of them. */
static void store_out(const moe__experts_job *job, const real *line, int64_t r, int64_t rows,
                      int64_t j, int64_t n)
{
    int64_t O = job->config->d_out;
    for (int64_t i = 0; i < rows; i++) {
        element *out = (element *)job->out + (r + i) * O + j;
        for (int64_t l = 0; l < n; l++) out[l] = put(line[i * GROUP + l]);
    }
}

void MOE_KERNEL(ffn_rows_forward)(const ffn_run *run, int64_t e, int64_t next, int64_t r, int64_t m,
                                  real *s)
{
    const moe__experts_job *job = run->job;
    const moe_experts_config *c = job->config;
    const ffn_block *b = &run->block;
    int64_t D = c->d_model, F = c->d_hidden, O = c->d_out, tiles = blocks(m, TILE_M);
    const moe__matrices *w3 = job->z3 ? &job->w3 : NULL;
    weights in = weights_of(&job->w1, w3, e, D, F), out = weights_of(&job->w2, NULL, e, F, O);
    weights after = weights_of(&job->w1, w3, next, D, F);
    packed x = {s + b->first, TILE_M * D + SPILL, D, m};
    packed h = {s + b->second, TILE_M * F + SPILL, F, m};
    panel p;

    pack_tiles(s + b->first, x.step, &run->in, r, m, D);
    for (int64_t j = 0; j < F; j += GROUP)
        hidden_group(run, &x, &in, &out, e, r, j, moe__min(GROUP, F - j), s);
    for (int64_t j = 0; j < O; j += MOE__PANEL) {
        int64_t n = moe__min(MOE__PANEL, O - j);
        bool direct = WIDE(0) && n == MOE__PANEL;
        take_panel(&p, &out, j, s + b->panel);
        take_bias(&p, &job->b2, NULL, e, j, O);
        p.ahead = j + n < O ? ahead_of(&out, j + n, tiles) : ahead_of(&after, 0, tiles);
        real *to = direct ? (real *)job->out + r * O + j : s + b->line;
        times_panel(&h, &p, to, NULL, direct ? O : GROUP);
        if (!direct) store_out(job, to, r, m, j, n);
    }
}
