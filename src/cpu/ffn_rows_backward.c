/* ffn_rows_backward.c - an expert's backward on a block of its rows, but for the weights'
 * gradients:
 *
 *     dh = dz W2^T,   h, dz1, dz3 by the activation,   dx_row = dz1 W1^T [+ dz3 W3^T]
 *
 * Here weights are the left operand: rows lie across the vectors, packed as lanes, and TILE_M lines
 * of W2 or W1, each contiguous along the sum, are read where they are in their panels or copied.
 * What micro_left makes has a hidden column in each line and is turned before it is used. The sums
 * of dz1 W1^T and of dz3 W3^T are chains of their own, added at the end. */
#include "cpu/ffn_rows.h"

#include <string.h>

enum {
    /* Of a sum before the next lanes have their turn: lines of the weights that stay in the first
     * cache meanwhile. */
    LEFT_K = 128,
    LEFT_GROUP = (GROUP - (SPILL - TILE_M)) / TILE_M *
                 TILE_M, /* columns of a line, with its spill */
    CHAIN = SPILL * LANES,
    LINES = TILE_M * MOE__PANEL, /* of one panel */
    MAX_ROWS = 6 * LANES,
    MIN_ROWS = 32
};

ffn_block MOE_KERNEL(ffn_block_backward)(int64_t d_hidden, int64_t d_out, bool gated)
{
    ffn_block b = {0};
    if (d_out < 1 || d_hidden < 1 || d_out > BLOCK_BYTES || d_hidden > BLOCK_BYTES) return b;
    int64_t width = d_out + (gated ? 2 : 1) * d_hidden;
    b.rows = BLOCK_BYTES / (int64_t)sizeof(real) / width;
    b.rows = b.rows < MIN_ROWS ? 0 : moe__min(b.rows, MAX_ROWS) / LANES * LANES;
    if (b.rows == 0) return b;
    b.ahead = take(&b.reals, 1);
    b.first = take(&b.reals, b.rows * d_out);
    b.second = take(&b.reals, b.rows * d_hidden);
    b.third = take(&b.reals, gated ? b.rows * d_hidden : 0);
    b.panel = take(&b.reals, 2 * (LEFT_K / HALF_PANEL) * LINES);
    b.chain = take(&b.reals, 2 * (b.rows / LANES) * CHAIN);
    b.line = take(&b.reals, b.rows * GROUP + SPILL);
    b.line3 = take(&b.reals, b.rows * GROUP + SPILL);
    return b;
}

/* ---- a product by lines of weights ----------------------------------------------------------- */

/* A matrix as [k,n] whose sums are along k, and the rows it multiplies, packed [k][LANES] for every
 * LANES of them. */
typedef struct left_operand {
    const moe__matrices *m;
    const void *at;
    int64_t k;
    const real *lanes;
    int64_t width, line;        /* of a panel; bytes from line to line */
    int32_t offset[MOE__PANEL]; /* read_ahead */
} left_operand;

/* While the lanes are multiplied by the lines of a panel, as many lines are fetched. */
static left_operand left_of(const moe__matrices *m, int64_t e, int64_t k, const real *lanes,
                            int64_t rows)
{
    int64_t bytes = WIDE(m->wide) ? (int64_t)sizeof(real) : (int64_t)sizeof(element);
    int64_t tiles = blocks(rows, LANES);
    left_operand w = {.m = m, .at = matrix_of(m, e), .k = k, .lanes = lanes};
    w.width = m->panel ? m->panel : MOE__PANEL;
    w.line = m->stride_col * bytes;
    for (int64_t q = 0; q < w.width; q++) {
        int64_t place = q * TILE_M / (tiles * w.width) * w.line;
        w.offset[q] = place > INT32_MAX ? 0 : (int32_t)place;
    }
    return w;
}

/* Elements p .. p+count-1 of the sums of columns i .. i+n-1, as micro_left reads them. */
typedef struct lines {
    const real *at;
    int64_t step, width;
    read_ahead ahead;
    int64_t ahead_group; /* bytes from panel to panel */
} lines;

static lines take_lines(const left_operand *w, int64_t p, int64_t count, int64_t i, int64_t n,
                        real *room)
{
    const moe__matrices *m = w->m;
    int64_t bytes = WIDE(m->wide) ? (int64_t)sizeof(real) : (int64_t)sizeof(element);
    const char *next = place_at(w->at, element_of(m, p, i + TILE_M), m->wide);
    lines l = {.at = room,
               .step = LINES,
               .width = w->width,
               .ahead = {.at = next, .too = next + 64, .next = 1}};
    l.ahead_group = (m->panel ? m->panel_step : l.width * m->stride_row) * bytes;
    if (WIDE(m->wide) && m->panel && m->stride_row == 1 && n == TILE_M) {
        l.at = place_at(w->at, element_of(m, p, i), 1);
        l.step = m->panel_step;
    } else {
        MOE_KERNEL(pack_lines)(room, l.width, m, w->at, p, count, i, n);
    }
    return l;
}

/* The block p .. p+count-1 of the sums, for all rows. */
static void times_lines(const left_operand *w, const lines *l, int64_t p, int64_t count,
                        int64_t rows, real *chain)
{
    int64_t tiles = blocks(rows, LANES);
    for (int64_t t = 0; t < tiles; t++, chain += CHAIN) {
        int64_t vectors = blocks(moe__min(LANES, rows - t * LANES), VEC_N);
        left_job job = {.groups = count / l->width,
                        .width = l->width,
                        .w = l->at,
                        .w_step = l->step,
                        .b = w->lanes + (t * w->k + p) * LANES,
                        .chain = chain,
                        .fresh = p == 0,
                        .ahead = l->ahead,
                        .ahead_group = l->ahead_group};
        int64_t first = t * TILE_M / tiles * w->line;
        job.ahead.at += first;
        job.ahead.too += first;
        job.ahead.offset = w->offset;
        if (job.groups > 0) MOE_KERNEL(micro_left)(vectors, &job);
        int64_t done = job.groups * l->width;
        if (done == count) continue;
        job.fresh = p + done == 0;
        job.w += job.groups * l->step;
        job.b += done * LANES;
        job.width = count - done;
        job.groups = 1;
        MOE_KERNEL(micro_left)(vectors, &job);
    }
}

/* out[rows of GROUP] = chain[TILE_M][lanes] turned; whole vectors spill to the right. */
static void turn(real *out, const real *chain, int64_t rows)
{
    for (int64_t t = 0; t < rows; t += LANES, chain += CHAIN)
        for (int64_t l = t; l < moe__min(rows, t + LANES); l += VEC_N)
            for (int64_t i = 0; i < SPILL; i += VEC_N) {
                vec v[VEC_N];
                V_UNROLL
                for (int q = 0; q < VEC_N; q++) v[q] = v_load(chain + (i + q) * LANES + l - t);
                v_transpose(v);
                int64_t count = moe__min(VEC_N, rows - l);
                for (int64_t q = 0; q < count; q++) v_store(out + (l + q) * GROUP + i, v[q]);
            }
}

/* line[o][rows][n of GROUP] = columns j .. j+n-1 of the rows times each of `operands` matrices. */
static void times_left(const left_operand *w, int64_t operands, int64_t j, int64_t n, int64_t rows,
                       const ffn_block *b, real *s)
{
    int64_t chains = blocks(rows, LANES) * CHAIN, k = w[0].k;
    real *chain = s + b->chain;
    for (int64_t i = 0; i < n; i += TILE_M) {
        for (int64_t p = 0; p < k; p += LEFT_K)
            for (int64_t o = 0; o < operands; o++) {
                int64_t count = moe__min(LEFT_K, k - p);
                lines l = take_lines(&w[o], p, count, j + i, moe__min(TILE_M, n - i), s + b->panel);
                times_lines(&w[o], &l, p, count, rows, chain + o * chains);
            }
        for (int64_t o = 0; o < operands; o++)
            turn(s + (o ? b->line3 : b->line) + i, chain + o * chains, rows);
    }
}

/* ---- backward -------------------------------------------------------------------------------- */

static void pack_lanes(real *to, const moe__rows *a, int64_t r, int64_t rows, int64_t p, int64_t k,
                       int64_t all)
{
    for (int64_t t = 0; t < rows; t += LANES) MOE_KERNEL(pack_rows)
    (to + t * all + p * LANES, LANES, a, r + t, moe__min(LANES, rows - t), p, k);
}

/* Hidden columns j .. j+n-1 of rows r and on, from line: h, dz1, dz3. */
static void activate_group(const ffn_run *run, const real *line, int64_t r, int64_t rows, int64_t j,
                           int64_t n)
{
    const moe__experts_job *job = run->job;
    element room[GROUP];
    for (int64_t i = 0; i < rows; i++) {
        int64_t at = (r + i) * job->config->d_hidden + j;
        element *dh = (element *)job->dh + at;
        element *h = job->h == job->dh ? room : (element *)job->h + at;
        for (int64_t l = 0; l < n; l++) dh[l] = put(line[i * GROUP + l]);
        MOE_KERNEL(activate_backward)
        (&run->act, n, dh, job->z3 ? (element *)job->dz3 + at : NULL, h,
         (const element *)job->z1 + at, job->z3 ? (const element *)job->z3 + at : NULL);
    }
}

/* Columns j .. j+n-1 of dx_rows: line, then line3 added to what that was rounded to. */
static void store_dx(const moe__experts_job *job, const real *line, const real *line3, int64_t r,
                     int64_t rows, int64_t j, int64_t n)
{
    int64_t D = job->config->d_model;
    for (int64_t i = 0; i < rows; i++, line += GROUP, line3 += GROUP) {
        element *dx = (element *)job->dx_rows + (r + i) * D + j;
        if (job->z3)
            for (int64_t l = 0; l < n; l++) dx[l] = put(get(put(line[l])) + line3[l]);
        else
            for (int64_t l = 0; l < n; l++) dx[l] = put(line[l]);
    }
}

void MOE_KERNEL(ffn_rows_backward)(const ffn_run *run, int64_t e, int64_t next, int64_t r,
                                   int64_t m, real *s)
{
    const moe__experts_job *job = run->job;
    const ffn_block *b = &run->block;
    int64_t D = job->config->d_model, F = job->config->d_hidden, O = job->config->d_out;
    moe__matrices w2 = transposed(job->w2), w1 = transposed(job->w1), w3 = transposed(job->w3);
    moe__rows dz1 = {.data = job->dh, .stride = F}, dz3 = {.data = job->dz3, .stride = F};
    const left_operand out = left_of(&w2, e, O, s + b->first, m);
    left_operand in[2] = {left_of(&w1, e, F, s + b->second, m)};
    if (job->z3) in[1] = left_of(&w3, e, F, s + b->third, m);

    (void)next;
    pack_lanes(s + b->first, &run->in, r, m, 0, O, O);
    for (int64_t j = 0; j < F; j += LEFT_GROUP) {
        int64_t n = moe__min(LEFT_GROUP, F - j);
        times_left(&out, 1, j, n, m, b, s);
        activate_group(run, s + b->line, r, m, j, n);
        pack_lanes(s + b->second, &dz1, r, m, j, n, F);
        if (job->z3) pack_lanes(s + b->third, &dz3, r, m, j, n, F);
    }
    for (int64_t j = 0; j < D && job->dx_rows; j += LEFT_GROUP) {
        int64_t n = moe__min(LEFT_GROUP, D - j);
        times_left(in, job->z3 ? 2 : 1, j, n, m, b, s);
        store_dx(job, s + b->line, s + b->line3, r, m, j, n);
    }
}
