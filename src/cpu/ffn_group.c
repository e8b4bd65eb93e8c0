/* ffn_group.c - rows of a block times a group of columns.
 *
 * Panel by panel: while the rows are multiplied by one, the next is fetched from memory. A panel in
 * place is never copied; of other weights one panel of ROOM_K rows is packed at a time; and a few
 * rows read weights by rows as they are. */
#include "cpu/ffn_group.h"

_Static_assert(TILE_V == 2, "a tile has a vector of each half of a panel");

enum {
    PANEL_BYTES = 28 * 1024, /* of a panel: with the rows of a tile, what the first cache holds */
    PANEL_K = PANEL_BYTES / MOE__PANEL / (int)sizeof(real),
    STEPS = PANEL_K > ROOM_K ? PANEL_K : ROOM_K, /* of one product of several tiles, at most */
    NEAR = 256,           /* rows of a panel from what is read by one tile to what is fetched */
    FEW_BYTES = 32 * 1024 /* the same where a few rows read weights by rows */
};

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

weights MOE_KERNEL(ffn_weights)(const moe__matrices *m, const moe__matrices *m3,
                                const moe__matrices *b, const moe__matrices *b3, int64_t e,
                                int64_t k, int64_t n)
{
    weights w = {.m = m, .m3 = m3, .b = b, .b3 = b3, .k = k, .n = n};
    w.at = matrix_of(m, e);
    w.at3 = m3 ? matrix_of(m3, e) : NULL;
    w.bias = matrix_of(b, e);
    w.bias3 = m3 ? matrix_of(b3, e) : NULL;
    w.in_place = are_panels(m, m3, w.at, w.at3);
    w.by_rows = are_rows(m) && (!m3 || are_rows(m3));
    return w;
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

/* As many steps as one product has. */
void MOE_KERNEL(ffn_plan_fetches)(weights *in, weights *out, int64_t rows, int32_t *room)
{
    int64_t most = moe__max(in->k, out->k), tiles = blocks(rows, TILE_M);
    int64_t steps = tiles == 1 ? most : moe__min(most, STEPS);
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

/* To columns j .. j+n-1 of rows that are sums by now. */
static void add_bias(int64_t rows, const moe__matrices *b, const void *bias, int64_t j, int64_t n,
                     real *out, int64_t stride)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t l = 0; l < n; l++)
            out[i * stride + l] += get_at(bias, (j + l) * b->stride_col, b->wide);
}

/* Where rows k and on of one of the two matrices are fetched from: when its own are over, `after`'s
 * are read. */
static few_ahead few_ahead_of(const weights *w, const weights *after, bool third, int64_t k,
                              int64_t j)
{
    const moe__matrices *m = third ? w->m3 : w->m;
    const void *at = third ? w->at3 : w->at;
    if (k >= w->k && after->by_rows && (!third || after->m3)) {
        m = third ? after->m3 : after->m;
        at = third ? after->at3 : after->at;
        k -= w->k;
        j = 0;
    }
    return (few_ahead){place_at(at, element_of(m, k, j), 1), m->stride_row};
}

/* For a few rows packing does not pay: rows of weights are read once, in order, FEW_K at a time,
 * and sums wait in the lines, which the first cache holds. */
static void group_by_rows(const packed *a, const weights *w, const weights *after, int64_t j,
                          int64_t n, const lines *to)
{
    int64_t bytes = n * (int64_t)sizeof(real);
    int64_t distance = blocks(FEW_BYTES, bytes * FEW_K) * FEW_K;
    few_job job = {.m = a->rows, .n = n, .out_stride = to->stride};
    for (int64_t k = 0; k < w->k; k += FEW_K) {
        job.k = moe__min(FEW_K, w->k - k);
        job.fresh = k == 0;
        job.a = a->at + k * a->rows;
        for (int third = 0; third <= (w->m3 != NULL); third++) {
            const moe__matrices *m = third ? w->m3 : w->m;
            job.b = place_at(third ? w->at3 : w->at, element_of(m, k, j), 1);
            job.b_stride = m->stride_row;
            job.out = third ? to->out3 : to->out;
            job.ahead = few_ahead_of(w, after, third, k + distance, j);
            MOE_KERNEL(micro_few)(&job);
        }
    }
    if (w->bias) add_bias(a->rows, w->b, w->bias, j, n, to->out, to->stride);
    if (w->bias3) add_bias(a->rows, w->b3, w->bias3, j, n, to->out3, to->stride);
}

/* Other weights: ROOM_K rows of a panel are packed into the first cache and meet all rows there,
 * then those of the next; meanwhile the ROOM_K rows after them of all columns are fetched. */
static void group_packed(const packed *a, const weights *w, const weights *after, int64_t j,
                         int64_t n, const lines *to, real *room)
{
    int64_t tiles = blocks(a->rows, TILE_M), width = panel_width(w);
    real bias[MOE__PANEL];
    for (int64_t k = 0; k < w->k; k += ROOM_K) {
        int64_t count = moe__min(ROOM_K, w->k - k);
        for (int64_t l = 0; l < n; l += width) {
            lines here = lines_from(to, l);
            panel b = {.at = room,
                       .k = k,
                       .count = count,
                       .stride = MOE__PANEL,
                       .half = w->m3 ? HALF_PANEL : 0};
            bool more = k + count < w->k, next = j + n < w->n;
            pack_panel(w, k, count, j + l, moe__min(width, n - l), room);
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

void MOE_KERNEL(ffn_group)(const packed *a, const weights *w, const weights *after, int64_t j,
                           int64_t n, const lines *to, real *room)
{
    if (w->in_place)
        group_in_place(a, w, after, j, n, to);
    else if (few_by_rows(w, a->rows))
        group_by_rows(a, w, after, j, n, to);
    else
        group_packed(a, w, after, j, n, to, room);
}
