/* ffn_rows.c - an expert's forward on a block of its rows:
 *
 *     z1 = x W1 + b1,  z3 = x W3 + b3,  h = act(z1) [* z3],  out = h W2 + b2
 *
 * The rows of a block are packed once. Panel by panel of W1 (with W3 in the other half of it) GROUP
 * columns of z are made, activated, kept if a backward will come, and packed as the left operand of
 * W2, whose panels follow: ffn_group.c. */
#include "cpu/ffn_group.h"

#include <string.h>

enum {
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
    b.panel = take(&b.reals, ROOM_K * MOE__PANEL);
    b.ahead = take(&b.reals, 2 * moe__max(d_model, d_hidden) + 1);
    b.line = take(&b.reals, b.rows * GROUP);
    b.line3 = take(&b.reals, b.rows * GROUP);
    b.h = take(&b.reals, b.rows * GROUP);
    return b;
}

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

/* Columns of a group: of a few rows that read weights by rows, all that its lines have room for. */
static int64_t group_width(const ffn_block *b, const weights *w, int64_t rows)
{
    return few_by_rows(w, rows) ? b->rows / FEW_M * GROUP : GROUP;
}

/* z and h of hidden columns j .. j+width-1, h packed as the next operand's columns. */
static void hidden_group(const ffn_run *run, const packed *x, const weights *w,
                         const weights *after, int64_t r, int64_t j, int64_t width, real *s)
{
    const ffn_block *b = &run->block;
    element *h = (element *)(void *)(s + b->h);
    int64_t tiles = blocks(x->rows, TILE_M), F = w->n;
    const lines z = {s + b->line, s + b->line3, moe__max(width, GROUP)};
    MOE_KERNEL(ffn_group)(x, w, after, j, width, &z, s + b->panel);
    for (int64_t i = 0; i < x->rows; i++)
        for (int64_t l = 0; l < width; l += GROUP) {
            int64_t at = i * z.stride + l;
            activate_row(run, r + i, j + l, moe__min(GROUP, width - l), z.out + at, z.out3 + at,
                         h + at);
        }
    moe__rows rows = {.data = h, .stride = z.stride};
    const real *scale = run->hidden_scale;
    if (scale) rows.scale = scale + r;
    for (int64_t q = 0; q < tiles; q++) {
        int64_t i = part(x->rows, tiles, q), m = part(x->rows, tiles, q + 1) - i;
        real *to = s + b->second + q * (TILE_M * F + SPILL) + j * m;
        MOE_KERNEL(pack_rows)(to, m, &rows, i, m, 0, width);
    }
}

/* Columns j .. j+n-1 of out, from what the product wrote of them. */
static void store_out(const moe__experts_job *job, const lines *from, int64_t r, int64_t rows,
                      int64_t j, int64_t n)
{
    int64_t O = job->config->d_out;
    for (int64_t i = 0; i < rows; i++) {
        element *out = (element *)job->out + (r + i) * O + j;
        for (int64_t l = 0; l < n; l++) out[l] = put(from->out[i * from->stride + l]);
    }
}

/* out of all columns. */
static void out_groups(const ffn_run *run, const packed *h, const weights *w, const weights *after,
                       int64_t r, real *s)
{
    const moe__experts_job *job = run->job;
    const ffn_block *b = &run->block;
    int64_t O = w->n, most = group_width(b, w, h->rows);
    for (int64_t j = 0; j < O; j += most) {
        int64_t n = moe__min(most, O - j);
        bool direct = WIDE(0) && (n % MOE__PANEL == 0 || most > GROUP);
        lines to = {s + b->line, NULL, most};
        if (direct) to = (lines){(real *)job->out + r * O + j, NULL, O};
        MOE_KERNEL(ffn_group)(h, w, after, j, n, &to, s + b->panel);
        if (!direct) store_out(job, &to, r, h->rows, j, n);
    }
}

void MOE_KERNEL(ffn_rows_forward)(const ffn_run *run, int64_t e, int64_t next, int64_t r, int64_t m,
                                  real *s)
{
    const moe__experts_job *job = run->job;
    const moe_experts_config *c = job->config;
    const ffn_block *b = &run->block;
    int64_t D = c->d_model, F = c->d_hidden;
    const moe__matrices *w3 = job->z3 ? &job->w3 : NULL;
    weights in = MOE_KERNEL(ffn_weights)(&job->w1, w3, &job->b1, &job->b3, e, D, F), after;
    weights out = MOE_KERNEL(ffn_weights)(&job->w2, NULL, &job->b2, NULL, e, F, c->d_out);
    const packed x = {s + b->first, TILE_M * D + SPILL, D, m};
    const packed h = {s + b->second, TILE_M * F + SPILL, F, m};

    MOE_KERNEL(ffn_plan_fetches)(&in, &out, m, (int32_t *)(void *)(s + b->ahead));
    after = in;
    move_weights(&after, next);
    pack_tiles(s + b->first, x.step, &run->in, r, m, D);
    int64_t most = group_width(b, &in, m);
    for (int64_t j = 0; j < F; j += most)
        hidden_group(run, &x, &in, &out, r, j, moe__min(most, F - j), s);
    out_groups(run, &h, &out, &after, r, s);
}
