/* ffn_rows.c - blocks of rows of all experts, and an expert's forward on one:
 *
 *     z1 = x W1 + b1,  z3 = x W3 + b3,  h = act(z1) [* z3],  out = h W2 + b2
 *
 * The rows of a block are packed once. Panel by panel of W1 (with W3 in the other half of it) GROUP
 * columns of z are made, activated, kept if a backward will come, and packed as the left operand of
 * W2, whose panels follow. While the rows are multiplied by one panel, the next is fetched from
 * memory: a panel in place is never copied, and of other weights GROUP columns of ROOM_K rows are
 * packed at a time. */
#include "cpu/ffn_rows.h"

#include <string.h>

_Static_assert(TILE_V == 2, "a tile has a vector of each half of a panel");

enum {
    PANEL_BYTES = 28 * 1024, /* of a panel: with the rows of a tile, what the first cache holds */
    PANEL_K = PANEL_BYTES / MOE__PANEL / (int)sizeof(real),
    ROOM_K = 256, /* rows of weights that are packed at a time */
    NEAR = 256,   /* rows of a panel from what is read by one tile to what is fetched */
    FEW_ROWS = 4,
    FEW_K = 16,
    MAX_ROWS = 13 * 14,
    MIN_ROWS = 40 /* below, every panel is read too often */
};

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
    b.panel = take(&b.reals, GROUP / HALF_PANEL * ROOM_K * MOE__PANEL);
    b.ahead = take(&b.reals, 2 * moe__max(d_model, d_hidden) + 1);
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

static void run_blocks(const ffn_run *run, int64_t from, int64_t to, real *scratch)
{
    const moe__experts_job *job = run->job;
    const int64_t *tile_begin = job->tile_begin, *begin = job->plan->expert_begin;
    int64_t at = run_of(tile_begin, run->used, from);
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
    *(int32_t *)(void *)(scratch + run->block.ahead) = 0;
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

/* ---- a product by a group of columns --------------------------------------------------------- */

/* The left operand: [k] lines of the rows of a tile, tiles `step` apart. */
typedef struct packed {
    const real *at;
    int64_t step, k, rows;
} packed;

/* Weights of one expert, W1 alone or with W3, of n columns each, with their biases. */
typedef struct weights {
    const moe__matrices *m, *m3, *b, *b3; /* m3 NULL: no halves */
    const void *at, *at3, *bias, *bias3;  /* biases may be NULL */
    int64_t k, n;
    bool in_place; /* they lie in panels that need no packing */
    bool by_rows;  /* their rows are contiguous, and what is computed with; W3's are others */
    /* How they are fetched: rows so many bytes apart, of 2^bits pieces, step by step. */
    int64_t row, piece;
    int32_t bits, *offset;
} weights;

/* Where a group goes: lines of rows, out3 of W3's half. */
typedef struct lines {
    real *out, *out3;
    int64_t stride;
} lines;

/* Rows k .. k+count-1 of MOE__PANEL columns, and what to fetch meanwhile. */
typedef struct panel {
    const real *at; /* row k */
    int64_t k, count;
    int64_t stride, half; /* from row to row, and from W1's half to W3's; half 0: of W1 alone */
    const real *bias;     /* [MOE__PANEL] in the order of tiles, with the last rows; or NULL */
    const weights *fetch; /* while this is multiplied, those of `at`, `too` and on */
    const char *fetch_at, *fetch_too;
    int64_t fetch_first; /* steps before this panel's */
} panel;

static bool are_panels(const moe__matrices *m, const moe__matrices *m3, const void *at,
                       const void *at3)
{
    if (!WIDE(m->wide) || m->stride_col != 1) return false;
    if (!m3) return m->panel == MOE__PANEL;
    return m->panel == HALF_PANEL && m3->panel == HALF_PANEL &&
           (const char *)at3 - (const char *)at == HALF_PANEL * (int64_t)sizeof(real);
}

static bool are_rows(const moe__matrices *m)
{
    return WIDE(m->wide) && m->stride_col == 1 && m->panel == 0;
}

/* bias NULL: none are there. */
static weights weights_of(const moe__matrices *m, const moe__matrices *m3, const moe__matrices *b,
                          const moe__matrices *b3, int64_t e, int64_t k, int64_t n)
{
    weights w = {.m = m, .m3 = m3, .b = b, .b3 = b3, .k = k, .n = n};
    w.at = matrix_of(m, e);
    w.at3 = m3 ? matrix_of(m3, e) : NULL;
    w.bias = matrix_of(b, e);
    w.bias3 = m3 ? matrix_of(b3, e) : NULL;
    w.in_place = are_panels(m, m3, w.at, w.at3);
    w.by_rows = are_rows(m) &&
                (!m3 || (are_rows(m3) && m3->stride_row == m->stride_row && w.at3 != w.at));
    return w;
}

/* The same of another expert. */
static void move_weights(weights *w, int64_t e)
{
    w->at = matrix_of(w->m, e);
    w->at3 = w->m3 ? matrix_of(w->m3, e) : NULL;
}

/* Columns of each of the weights that one panel holds. */
static int64_t panel_width(const weights *w) { return w->m3 ? HALF_PANEL : MOE__PANEL; }

/* Fills offset[0 .. steps-1], unless they are there, for products by so many tiles of rows: every
 * piece has its step. */
static void plan_fetch(weights *w, int32_t *offset, int64_t steps, int64_t tiles, bool filled)
{
    enum { ONE = 1 << 20 };
    int64_t bytes = WIDE(w->m->wide) ? (int64_t)sizeof(real) : (int64_t)sizeof(element);
    int64_t margin = 0;
    w->row = w->m->stride_col == 1 ? w->m->stride_row * bytes : 128;
    w->piece = w->bits = 0;
    if (!w->in_place && w->m->stride_col == 1) { /* a row of GROUP columns, panel by panel */
        w->piece = w->m3 ? 64 : 128;
        w->bits = w->m3 ? 3 : 2;
        margin = ((int64_t)1 << w->bits) - 1;
    }
    w->offset = offset;
    if (filled) return;
    int64_t rate = ONE / tiles + ONE * margin / moe__min(steps, ROOM_K);
    if ((steps * rate / ONE / (1 << w->bits) + 1) * w->row > INT32_MAX) rate = 0;
    for (int64_t p = 0; p < steps; p++) {
        int64_t number = p * rate / ONE, row = number >> w->bits;
        offset[p] = (int32_t)(row * w->row + (number - (row << w->bits)) * w->piece);
    }
}

/* As many steps as one product has. room[0] says for how many tiles the rest was filled; 0: not. */
static void plan_fetches(weights *in, weights *out, int64_t rows, int32_t *room)
{
    int64_t most = moe__max(in->k, out->k), tiles = blocks(rows, TILE_M);
    int64_t steps = tiles == 1 ? most : moe__min(most, ROOM_K);
    plan_fetch(in, room + 1, steps, tiles, *room == tiles);
    plan_fetch(out, room + 1 + most, steps, tiles, *room == tiles);
    *room = (int32_t)tiles;
}

/* Fetches columns j.. of rows from k on. */
static void fetch_with(panel *b, const weights *w, int64_t k, int64_t j, int64_t first)
{
    b->fetch = w;
    b->fetch_at = place_at(w->at, element_of(w->m, k, j), w->m->wide);
    b->fetch_too = b->fetch_at + 64;
    if (w->m3 && !w->in_place)
        b->fetch_too = place_at(w->at3, element_of(w->m3, k, j), w->m3->wide);
    b->fetch_first = first;
}

static read_ahead ahead_of(const panel *b, int64_t step, int64_t tiles)
{
    const weights *w = b->fetch;
    int64_t row = ((b->fetch_first + step) / tiles >> w->bits) * w->row;
    return (read_ahead){b->fetch_at + row, b->fetch_too + row, w->offset, 1};
}

/* Biases of columns j and on, vector by vector as tiles have them. */
static const real *bias_of(const weights *w, int64_t j, real *bias)
{
    if (!w->bias) return NULL;
    for (int64_t l = 0; l < MOE__PANEL; l++) {
        bool second = w->m3 && l / VEC_N % 2;
        int64_t column = j + (w->m3 ? l / TILE_N * VEC_N + l % VEC_N : l);
        const moe__matrices *m = second ? w->b3 : w->b;
        const void *at = second ? w->bias3 : w->bias;
        bias[l] = column < w->n ? get_at(at, column * m->stride_col, m->wide) : R(0.0);
    }
    return bias;
}

/* A panel times tile q: the chains begin, or go on, in out. */
static void times_piece(const packed *a, const panel *b, int64_t q, const lines *to)
{
    int64_t tiles = blocks(a->rows, TILE_M), width = b->half ? VEC_N : TILE_N;
    int64_t i = part(a->rows, tiles, q), m = part(a->rows, tiles, q + 1) - i;
    micro_job job = {.k = b->count,
                     .a = a->at + q * a->step + b->k * m,
                     .b_stride = b->stride,
                     .b_step = b->half ? b->half : VEC_N,
                     .from_stride = to->stride,
                     .out_stride = to->stride,
                     .ahead = ahead_of(b, q * b->count, tiles)};
    for (int64_t sub = 0; sub < MOE__PANEL / TILE_N; sub++) {
        int64_t at = i * to->stride + sub * width;
        job.b = b->at + sub * width;
        job.out[0] = to->out + at;
        job.out[1] = b->half ? to->out3 + at : job.out[0] + VEC_N;
        for (int v = 0; v < TILE_V; v++) job.from[v] = b->k > 0 ? job.out[v] : NULL;
        job.bias = b->bias ? b->bias + sub * TILE_N : NULL;
        MOE_KERNEL(micro_right)(m, &job);
        job.ahead = no_ahead(b->at);
    }
}

static void times_panel(const packed *a, const panel *b, const lines *to)
{
    int64_t tiles = blocks(a->rows, TILE_M);
    for (int64_t q = 0; q < tiles; q++) times_piece(a, b, q, to);
}

static lines lines_from(const lines *to, int64_t j)
{
    return (lines){to->out + j, to->out3 ? to->out3 + j : NULL, to->stride};
}

/* Panels where they are: as much of one as the first cache holds, times all rows, then the rest. */
static void group_in_place(const packed *a, const weights *w, const weights *after, int64_t j,
                           int64_t n, const lines *to)
{
    int64_t tiles = blocks(a->rows, TILE_M), parts = tiles > 1 ? blocks(w->k, PANEL_K) : 1;
    int64_t width = panel_width(w);
    real bias[MOE__PANEL];
    for (int64_t l = 0; l < n; l += width) {
        int64_t next = j + l + width;
        lines here = lines_from(to, l);
        const real *at = place_at(w->at, element_of(w->m, 0, j + l), 1);
        for (int64_t p = 0; p < parts; p++) {
            int64_t k = part(w->k, parts, p), count = part(w->k, parts, p + 1) - k;
            panel b = {.at = at + k * MOE__PANEL,
                       .k = k,
                       .count = count,
                       .stride = MOE__PANEL,
                       .half = w->m3 ? HALF_PANEL : 0,
                       .bias = k + count == w->k ? bias_of(w, j + l, bias) : NULL};
            if (next >= w->n)
                fetch_with(&b, after, 0, 0, k * tiles);
            else if (tiles == 1 && w->k > NEAR)
                fetch_with(&b, w, NEAR, j + l, 0);
            else
                fetch_with(&b, w, 0, next, k * tiles);
            times_panel(a, &b, &here);
        }
    }
}

/* Columns j .. j+n-1 of rows k .. k+count-1 as a panel. */
static void pack_panel(const weights *w, int64_t k, int64_t count, int64_t j, int64_t n, real *room)
{
    int64_t width = panel_width(w);
    MOE_KERNEL(pack_columns)(room, MOE__PANEL, width, w->m, w->at, k, count, j, n);
    if (w->m3)
        MOE_KERNEL(pack_columns)(room + width, MOE__PANEL, width, w->m3, w->at3, k, count, j, n);
}

/* For a few rows packing does not pay: FEW_K rows of all columns in turn, read in order. */
static void group_by_rows(const packed *a, const weights *w, int64_t j, int64_t n, const lines *to,
                          real *room)
{
    int64_t width = panel_width(w);
    real bias[MOE__PANEL];
    for (int64_t k = 0; k < w->k; k += FEW_K)
        for (int64_t l = 0; l < n; l += width) {
            lines here = lines_from(to, l);
            bool whole = l + width <= n;
            panel b = {.at = place_at(w->at, element_of(w->m, k, j + l), 1),
                       .k = k,
                       .count = moe__min(FEW_K, w->k - k),
                       .stride = w->m->stride_row};
            fetch_with(&b, w, k + FEW_K + l / width * (FEW_K * width / GROUP), j, 0);
            if (w->m3) b.half = ((intptr_t)w->at3 - (intptr_t)w->at) / (intptr_t)sizeof(real);
            if (!whole) {
                pack_panel(w, k, b.count, j + l, moe__min(width, n - l), room);
                b.at = room;
                b.stride = MOE__PANEL;
                b.half = w->m3 ? HALF_PANEL : 0;
            }
            if (k + b.count == w->k) b.bias = bias_of(w, j + l, bias);
            times_panel(a, &b, &here);
        }
}

/* Other weights: ROOM_K rows of all columns are packed, as panels, and those after them fetched. */
static void group_packed(const packed *a, const weights *w, const weights *after, int64_t j,
                         int64_t n, const lines *to, real *room)
{
    int64_t tiles = blocks(a->rows, TILE_M), width = panel_width(w);
    real bias[MOE__PANEL];
    for (int64_t k = 0; k < w->k; k += ROOM_K) {
        int64_t count = moe__min(ROOM_K, w->k - k);
        for (int64_t l = 0; l < n; l += width)
            pack_panel(w, k, count, j + l, moe__min(width, n - l),
                       room + l / width * (ROOM_K * MOE__PANEL));
        for (int64_t l = 0; l < n; l += width) {
            lines here = lines_from(to, l);
            panel b = {.at = room + l / width * (ROOM_K * MOE__PANEL),
                       .k = k,
                       .count = count,
                       .stride = MOE__PANEL,
                       .half = w->m3 ? HALF_PANEL : 0};
            bool more = k + count < w->k, next = j + n < w->n;
            fetch_with(&b, more || next ? w : after, more ? k + count : 0,
                       more   ? j
                       : next ? j + n
                              : 0,
                       l / width * tiles * count);
            if (k + count == w->k) b.bias = bias_of(w, j + l, bias);
            times_panel(a, &b, &here);
        }
    }
}

/* Rows times columns j .. j+n-1, at most GROUP of them. `after` is read next. */
static void times_group(const packed *a, const weights *w, const weights *after, int64_t j,
                        int64_t n, const lines *to, real *room)
{
    if (w->in_place)
        group_in_place(a, w, after, j, n, to);
    else if (w->by_rows && a->rows <= FEW_ROWS)
        group_by_rows(a, w, j, n, to, room);
    else
        group_packed(a, w, after, j, n, to, room);
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
                         const weights *after, int64_t r, int64_t j, int64_t width, real *s)
{
    const ffn_block *b = &run->block;
    element *h = (element *)(void *)(s + b->h);
    int64_t tiles = blocks(x->rows, TILE_M), F = w->n;
    const lines z = {s + b->line, s + b->line3, GROUP};
    times_group(x, w, after, j, width, &z, s + b->panel);
    for (int64_t i = 0; i < x->rows; i++)
        activate_row(run, r + i, j, width, z.out + i * GROUP, z.out3 + i * GROUP, h + i * GROUP);
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
    int64_t D = c->d_model, F = c->d_hidden, O = c->d_out;
    const moe__matrices *w3 = job->z3 ? &job->w3 : NULL;
    weights in = weights_of(&job->w1, w3, &job->b1, &job->b3, e, D, F), after;
    weights out = weights_of(&job->w2, NULL, &job->b2, NULL, e, F, O);
    const packed x = {s + b->first, TILE_M * D + SPILL, D, m};
    const packed h = {s + b->second, TILE_M * F + SPILL, F, m};

    plan_fetches(&in, &out, m, (int32_t *)(void *)(s + b->ahead));
    after = in;
    move_weights(&after, next);
    pack_tiles(s + b->first, x.step, &run->in, r, m, D);
    for (int64_t j = 0; j < F; j += GROUP)
        hidden_group(run, &x, &in, &out, r, j, moe__min(GROUP, F - j), s);
    for (int64_t j = 0; j < O; j += GROUP) {
        int64_t n = moe__min(GROUP, O - j);
        bool direct = WIDE(0) && n % MOE__PANEL == 0;
        lines to = {s + b->line, NULL, GROUP};
        if (direct) to = (lines){(real *)job->out + r * O + j, NULL, O};
        times_group(&h, &out, &after, j, n, &to, s + b->panel);
        if (!direct) store_out(job, to.out, r, m, j, n);
    }
}
