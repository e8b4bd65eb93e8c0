/* check_gemm.c - the grouped products of every CPU variant against the chain rule taken literally.
 *
 * The reference computes each element as docs/numerics.md says it: one fma after the other, blocks
 * of 4096 rows, segments in order. A variant must give the same bytes, tiles in any order, scratch
 * full of rubbish, and may touch nothing else. Values of both types are kept in double, which
 * holds a float. */
#include "support/suite.h"

#include <check.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/grouped_gemm.h"

/* ---- variants -------------------------------------------------------------------------------- */

typedef struct variant {
    const char *name;
    bool f64;
    int64_t (*rows_plan)(moe__gemm_rows_job *);
    int64_t (*dw_plan)(moe__gemm_dw_job *);
    size_t (*scratch)(void);
    void (*rows_tile)(const moe__gemm_rows_job *, int64_t, void *);
    void (*dw_tile)(const moe__gemm_dw_job *, int64_t, void *);
} variant;

#define DECLARE(v)                                                                 \
    int64_t moe__cpu_gemm_rows_plan_##v(moe__gemm_rows_job *);                     \
    int64_t moe__cpu_gemm_dw_plan_##v(moe__gemm_dw_job *);                         \
    size_t moe__cpu_gemm_scratch_##v(void);                                        \
    void moe__cpu_gemm_rows_tile_##v(const moe__gemm_rows_job *, int64_t, void *); \
    void moe__cpu_gemm_dw_tile_##v(const moe__gemm_dw_job *, int64_t, void *);
#define VARIANT(v, is_f64)                                                                    \
    {                                                                                         \
#v, is_f64, moe__cpu_gemm_rows_plan_##v, moe__cpu_gemm_dw_plan_##v,                   \
            moe__cpu_gemm_scratch_##v, moe__cpu_gemm_rows_tile_##v, moe__cpu_gemm_dw_tile_##v \
    }

DECLARE(f32_plain)
DECLARE(f64_plain)
#if defined(__x86_64__)
DECLARE(f32_avx2)
DECLARE(f64_avx2)
DECLARE(f32_avx512)
DECLARE(f64_avx512)
#endif

static const variant variants[] = {
    VARIANT(f32_plain, false),  VARIANT(f64_plain, true),
#if defined(__x86_64__)
    VARIANT(f32_avx2, false),   VARIANT(f64_avx2, true),
    VARIANT(f32_avx512, false), VARIANT(f64_avx512, true),
#endif
};
enum { VARIANTS = sizeof variants / sizeof variants[0] };

static bool can_run(const variant *v)
{
#if defined(__x86_64__)
    if (strstr(v->name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    if (strstr(v->name, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return strstr(v->name, "plain") != NULL;
}

/* ---- numbers --------------------------------------------------------------------------------- */

static uint64_t random_state = 1;

static int64_t random_below(int64_t n)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (int64_t)((random_state >> 33) % (uint64_t)n);
}

/* Mostly in [-1,1]; zeros of both signs, and numbers whose products underflow. */
static double random_value(void)
{
    double value = (double)random_below(2000001) / 1e6 - 1;
    int64_t kind = random_below(32);
    return kind == 0 ? 0.0 : kind == 1 ? -0.0 : kind == 2 ? value * 1e-30 : value;
}

static double fma_of(bool f64, double a, double b, double c)
{
    return f64 ? fma(a, b, c) : (double)fmaf((float)a, (float)b, (float)c);
}
static double add_of(bool f64, double a, double b)
{
    return f64 ? a + b : (double)((float)a + (float)b);
}
static double mul_of(bool f64, double a, double b)
{
    return f64 ? a * b : (double)((float)a * (float)b);
}

/* count elements that begin one element after an aligned address and end where the memory does. */
typedef struct buffer {
    void *memory;
    int64_t count;
    bool f64;
} buffer;

static size_t width(const buffer *b) { return b->f64 ? sizeof(double) : sizeof(float); }
static void *start(const buffer *b) { return (char *)b->memory + width(b); }

static double get(const buffer *b, int64_t i)
{
    if (i < 0 || i >= b->count)
        ck_abort_msg("element %lld of %lld", (long long)i, (long long)b->count);
    return b->f64 ? ((double *)start(b))[i] : (double)((float *)start(b))[i];
}

static void set(buffer *b, int64_t i, double value)
{
    if (i < 0 || i >= b->count)
        ck_abort_msg("element %lld of %lld", (long long)i, (long long)b->count);
    if (b->f64)
        ((double *)start(b))[i] = value;
    else
        ((float *)start(b))[i] = (float)value;
}

static buffer new_buffer(bool f64, int64_t count)
{
    buffer b = {NULL, count, f64};
    b.memory = calloc((size_t)count + 1, width(&b));
    ck_assert_ptr_nonnull(b.memory);
    for (int64_t i = 0; i < count; i++) set(&b, i, random_value());
    return b;
}

static buffer copy_buffer(const buffer *from)
{
    buffer b = *from;
    size_t bytes = ((size_t)b.count + 1) * width(&b);
    b.memory = malloc(bytes);
    ck_assert_ptr_nonnull(b.memory);
    memcpy(b.memory, from->memory, bytes);
    return b;
}

static void assert_same(const buffer *got, const buffer *want, const char *what, const char *text)
{
    for (int64_t i = 0; i < want->count; i++) {
        if (!memcmp((char *)start(got) + (size_t)i * width(got),
                    (char *)start(want) + (size_t)i * width(want), width(want)))
            continue;
        ck_abort_msg("%s: %s[%lld] is %a, not %a", text, what, (long long)i, get(got, i),
                     get(want, i));
    }
}

/* ---- cases ----------------------------------------------------------------------------------- */

/* PANELS: whole ones, and the second half of shared ones; _T: of the transposed matrix. */
enum {
    IN_OUT,
    OUT_IN,
    IN_OUT_BY_2,
    OUT_IN_BY_2,
    PANELS,
    PANELS_T,
    HALF_PANELS,
    HALF_PANELS_T,
    FORMS
};
enum { MAX_EXPERTS = 16, MAX_SEGMENTS = 64 };

/* One job of either kind; every flag 0 or 1. */
typedef struct gemm_case {
    int64_t k, n, experts;
    int64_t rows[MAX_SEGMENTS]; /* of each segment; for a rows job of each expert */
    int64_t segments_per_expert;
    int form, each, padded, gather, scale, bias, out_index, add, skip;
} gemm_case;

static void describe(char *text, size_t size, const gemm_case *c, const char *kind,
                     const char *name)
{
    snprintf(text, size,
             "%s %s k %lld n %lld experts %lld x %lld form %d each %d padded %d gather %d scale %d"
             " bias %d out_index %d add %d skip %d",
             kind, name, (long long)c->k, (long long)c->n, (long long)c->experts,
             (long long)c->segments_per_expert, c->form, c->each, c->padded, c->gather, c->scale,
             c->bias, c->out_index, c->add, c->skip);
}

static int64_t row_limits(const gemm_case *c, int64_t *begin)
{
    begin[0] = 3; /* rows before the first expert belong to nobody */
    for (int64_t s = 0; s < c->experts * c->segments_per_expert; s++)
        begin[s + 1] = begin[s] + c->rows[s];
    return begin[c->experts * c->segments_per_expert] + 2;
}

/* An operand of `count` logical rows with its memory: gathered rows are a shuffled choice of
 * physical ones. */
typedef struct operand {
    buffer data, scale;
    int64_t *index;
    moe__rows rows;
} operand;

static int64_t *new_permutation(int64_t n)
{
    int64_t *p = malloc(sizeof *p * (size_t)(n + 1));
    ck_assert_ptr_nonnull(p);
    for (int64_t i = 0; i < n; i++) p[i] = i;
    for (int64_t i = n - 1; i > 0; i--) {
        int64_t j = random_below(i + 1), swap = p[i];
        p[i] = p[j];
        p[j] = swap;
    }
    return p;
}

static operand new_operand(const gemm_case *c, bool f64, int64_t count, int64_t columns)
{
    operand o = {.index = new_permutation(count)};
    int64_t stride = columns + (c->padded ? 5 : 0);
    o.data = new_buffer(f64, (count - 1) * stride + columns);
    o.scale = new_buffer(f64, count);
    o.rows = (moe__rows){.data = start(&o.data),
                         .stride = stride,
                         .row_index = c->gather ? o.index : NULL,
                         .scale = c->scale ? start(&o.scale) : NULL};
    return o;
}

static double element(const operand *o, int64_t r, int64_t i)
{
    int64_t row = o->rows.row_index ? o->rows.row_index[r] : r;
    double value = get(&o->data, row * o->rows.stride + i);
    return o->rows.scale ? mul_of(o->data.f64, value, get(&o->scale, r)) : value;
}

/* Its logical rows one after the other, so that a reference finds each element once. */
static double *new_dense_operand(const operand *o, int64_t rows, int64_t columns)
{
    double *dense = malloc(sizeof *dense * (size_t)(rows * columns + 1));
    ck_assert_ptr_nonnull(dense);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < columns; i++) dense[r * columns + i] = element(o, r, i);
    return dense;
}

static void free_operand(operand *o)
{
    free(o->data.memory);
    free(o->scale.memory);
    free(o->index);
}

/* Matrices [k,n] of all experts, and how a job is told of them. With each, expert e's memory is
 * elsewhere in the buffer, and for a gradient every third expert's is not wanted. */
typedef struct matrices {
    buffer data;
    void *each[MAX_EXPERTS];
    moe__matrices m;
} matrices;

static int64_t panels_stride(moe__matrices *m, int form, int64_t k, int64_t n, int64_t gap)
{
    bool half = form >= HALF_PANELS, turned = form == PANELS_T || form == HALF_PANELS_T;
    int64_t rows = turned ? n : k, columns = turned ? k : n;
    m->panel = half ? MOE__PANEL / 2 : MOE__PANEL;
    m->offset = half ? MOE__PANEL / 2 : 0;
    m->stride_row = turned ? 1 : MOE__PANEL;
    m->stride_col = turned ? MOE__PANEL : 1;
    m->panel_step = (rows + gap) * MOE__PANEL;
    return (columns / m->panel + 1) * m->panel_step + 1;
}

static void new_matrices(matrices *w, const gemm_case *c, bool f64, int form, int64_t k, int64_t n,
                         int gradient)
{
    int64_t step = form >= IN_OUT_BY_2 ? 2 : 1, gap = c->padded ? 3 : 0;
    int out_in = form == OUT_IN || form == OUT_IN_BY_2;
    memset(w, 0, sizeof *w);
    if (form >= PANELS) {
        w->m.stride_expert = panels_stride(&w->m, form, k, n, gap);
    } else {
        w->m.offset = step - 1;
        w->m.stride_row = out_in ? step : step * n + gap;
        w->m.stride_col = out_in ? step * k + gap : step;
        w->m.stride_expert = k > 0 && n > 0 ? (k * n + k + n) * step + gap * (k + n) : 1;
    }
    w->data = new_buffer(f64, c->experts * w->m.stride_expert);
    for (int64_t e = 0; e < c->experts; e++)
        w->each[e] = gradient && c->skip && e % 3 == 1
                         ? NULL
                         : (char *)start(&w->data) +
                               (size_t)((c->experts - 1 - e) * w->m.stride_expert) *
                                   width(&w->data);
    if (c->each)
        w->m.each = w->each;
    else
        w->m.base = start(&w->data);
}

static int64_t place_of(const matrices *w, const gemm_case *c, int64_t e, int64_t i, int64_t j)
{
    const moe__matrices *m = &w->m;
    int64_t first = (c->each ? c->experts - 1 - e : e) * m->stride_expert + m->offset;
    if (m->panel && m->stride_row == 1)
        return first + i / m->panel * m->panel_step + i % m->panel + j * MOE__PANEL;
    if (m->panel) return first + j / m->panel * m->panel_step + j % m->panel + i * MOE__PANEL;
    return first + i * m->stride_row + j * m->stride_col;
}

/* The matrix [k,n] of expert e, row by row. */
static double *new_dense_matrix(const matrices *w, const gemm_case *c, int64_t e)
{
    double *dense = malloc(sizeof *dense * (size_t)(c->k * c->n + 1));
    ck_assert_ptr_nonnull(dense);
    for (int64_t i = 0; i < c->k; i++)
        for (int64_t j = 0; j < c->n; j++)
            dense[i * c->n + j] = get(&w->data, place_of(w, c, e, i, j));
    return dense;
}

/* The same matrices in a copy of their memory. */
static void copy_matrices(matrices *to, const matrices *from)
{
    *to = *from;
    to->data = copy_buffer(&from->data);
    for (int e = 0; e < MAX_EXPERTS; e++)
        if (from->each[e])
            to->each[e] = (char *)to->data.memory +
                          ((char *)from->each[e] - (char *)from->data.memory);
    if (from->m.each) to->m.each = to->each;
    if (from->m.base) to->m.base = start(&to->data);
}

/* ---- running tiles --------------------------------------------------------------------------- */

typedef struct tile_run {
    const variant *v;
    const moe__gemm_rows_job *rows; /* one of the two */
    const moe__gemm_dw_job *dw;
    const int64_t *order;
    int64_t tiles;
    _Atomic int64_t next;
} tile_run;

static void *run_worker(void *argument)
{
    tile_run *run = argument;
    size_t bytes = (run->v->scratch() + 63) & ~(size_t)63;
    void *scratch = aligned_alloc(64, bytes);
    if (!scratch) return NULL;
    for (;;) {
        int64_t i = atomic_fetch_add(&run->next, 1);
        if (i >= run->tiles) break;
        memset(scratch, 0xff, bytes); /* NaN */
        if (run->rows)
            run->v->rows_tile(run->rows, run->order[i], scratch);
        else
            run->v->dw_tile(run->dw, run->order[i], scratch);
    }
    free(scratch);
    return NULL;
}

static void run_tiles(tile_run *run, int threads)
{
    pthread_t thread[8];
    int64_t *order = new_permutation(run->tiles);
    run->order = order;
    if (threads <= 1) run_worker(run);
    for (int t = 0; threads > 1 && t < threads; t++)
        ck_assert_int_eq(pthread_create(&thread[t], NULL, run_worker, run), 0);
    for (int t = 0; threads > 1 && t < threads; t++) pthread_join(thread[t], NULL);
    ck_assert_int_ge(atomic_load(&run->next), run->tiles);
    free(order);
}

/* ---- rows times weights ---------------------------------------------------------------------- */

/* a[k] times column j of b[k,n], one fma after the other. */
static double chain_of(bool f64, const double *a, const double *b, int64_t k, int64_t n, int64_t j)
{
    double acc = 0;
    for (int64_t p = 0; p < k; p++) acc = fma_of(f64, a[p], b[p * n + j], acc);
    return acc;
}

static void reference_rows(const gemm_case *c, const int64_t *begin, const operand *a,
                           const matrices *b, const matrices *bias, const moe__gemm_rows_job *job,
                           buffer *out)
{
    bool f64 = out->f64;
    double *left = new_dense_operand(a, begin[c->experts], c->k);
    for (int64_t e = 0; e < c->experts; e++) {
        double *right = new_dense_matrix(b, c, e);
        for (int64_t r = begin[e]; r < begin[e + 1]; r++)
            for (int64_t j = 0; j < c->n; j++) {
                double acc = chain_of(f64, left + r * c->k, right, c->k, c->n, j);
                if (c->bias) acc = add_of(f64, acc, get(&bias->data, place_of(bias, c, e, 0, j)));
                int64_t at = (c->out_index ? job->out_index[r] : r) * job->out_stride + j;
                set(out, at, c->add ? add_of(f64, get(out, at), acc) : acc);
            }
        free(right);
    }
    free(left);
}

static void check_rows_type(const gemm_case *c, bool f64, int threads)
{
    int64_t begin[MAX_SEGMENTS + 1], tile_begin[MAX_EXPERTS + 1];
    int64_t count = row_limits(c, begin), out_stride = c->n + (c->padded ? 7 : 0);
    int64_t *out_index = new_permutation(count);
    operand a = new_operand(c, f64, count, c->k);
    matrices b, bias;
    new_matrices(&b, c, f64, c->form, c->k, c->n, 0);
    new_matrices(&bias, c, f64, c->form % PANELS, 1, c->n, 0);
    buffer before = new_buffer(f64, (count - 1) * out_stride + c->n), want = copy_buffer(&before);
    moe__gemm_rows_job job = {.experts = c->experts,
                              .expert_begin = begin,
                              .k = c->k,
                              .n = c->n,
                              .a = a.rows,
                              .b = b.m,
                              .out_stride = out_stride,
                              .out_index = c->out_index ? out_index : NULL,
                              .out_add = c->add,
                              .tile_begin = tile_begin};
    if (c->bias) job.bias = bias.m;
    reference_rows(c, begin, &a, &b, &bias, &job, &want);
    for (int i = 0; i < VARIANTS; i++) {
        const variant *v = &variants[i];
        if (v->f64 != f64 || !can_run(v)) continue;
        char text[300];
        describe(text, sizeof text, c, "rows", v->name);
        buffer out = copy_buffer(&before);
        job.out = start(&out);
        tile_run run = {.v = v, .rows = &job, .tiles = v->rows_plan(&job)};
        run_tiles(&run, threads);
        assert_same(&out, &want, "out", text);
        free(out.memory);
    }
    free_operand(&a);
    free(b.data.memory);
    free(bias.data.memory);
    free(before.memory);
    free(want.memory);
    free(out_index);
}

static void check_rows(gemm_case c, int threads)
{
    c.segments_per_expert = 1;
    check_rows_type(&c, false, threads);
    check_rows_type(&c, true, threads);
}

/* ---- dW -------------------------------------------------------------------------------------- */

/* Both operands of a dW job, their rows one after the other. */
typedef struct dense_pair {
    double *a, *g;
} dense_pair;

/* The sum over the segments of expert e of a[r,i] g[r,j], or, i = -1, of g[r,j]. */
static double reference_sum(const gemm_case *c, bool f64, const int64_t *begin,
                            const dense_pair *of, int64_t e, int64_t i, int64_t j)
{
    double sum = 0;
    int64_t first = e * c->segments_per_expert, any = 0;
    for (int64_t s = first; s < first + c->segments_per_expert; s++) {
        double segment = 0;
        for (int64_t r = begin[s]; r < begin[s + 1]; r += 4096) {
            double acc = 0;
            for (int64_t q = r; q < r + 4096 && q < begin[s + 1]; q++)
                acc = i < 0 ? add_of(f64, acc, of->g[q * c->n + j])
                            : fma_of(f64, of->a[q * c->k + i], of->g[q * c->n + j], acc);
            segment = r == begin[s] ? acc : add_of(f64, segment, acc);
        }
        if (begin[s + 1] > begin[s]) sum = any++ ? add_of(f64, sum, segment) : segment;
    }
    return sum;
}

/* to (=|+=) sums over rows, for [k,n] or, k = 0 and as_bias, for [n]. */
static void reference_dw(const gemm_case *c, const int64_t *begin, const dense_pair *of,
                         matrices *to, int as_bias)
{
    bool f64 = to->data.f64;
    for (int64_t e = 0; e < c->experts; e++) {
        int64_t first = e * c->segments_per_expert;
        if (c->each && !to->each[e]) continue;
        if (c->add && begin[first + c->segments_per_expert] == begin[first]) continue;
        for (int64_t i = 0; i < (as_bias ? 1 : c->k); i++)
            for (int64_t j = 0; j < c->n; j++) {
                double sum = reference_sum(c, f64, begin, of, e, as_bias ? -1 : i, j);
                int64_t at = place_of(to, c, e, i, j);
                set(&to->data, at, c->add ? add_of(f64, get(&to->data, at), sum) : sum);
            }
    }
}

/* What both gradients must be, over what they are. */
static void reference_gradients(const gemm_case *c, const int64_t *begin, const operand *a,
                                const operand *g, matrices *dw, matrices *dbias)
{
    int64_t rows = begin[c->experts * c->segments_per_expert];
    dense_pair of = {new_dense_operand(a, rows, c->k), new_dense_operand(g, rows, c->n)};
    reference_dw(c, begin, &of, dw, 0);
    if (c->bias) reference_dw(c, begin, &of, dbias, 1);
    free(of.a);
    free(of.g);
}

static void check_dw_type(const gemm_case *c, bool f64, int threads)
{
    int64_t begin[MAX_SEGMENTS + 1], tile_begin[MAX_EXPERTS + 1], count = row_limits(c, begin);
    operand a = new_operand(c, f64, count, c->k), g = new_operand(c, f64, count, c->n);
    matrices dw, dbias, want, want_bias;
    new_matrices(&dw, c, f64, c->form, c->k, c->n, 1);
    new_matrices(&dbias, c, f64, c->form % PANELS, 1, c->n, 1);
    copy_matrices(&want, &dw);
    copy_matrices(&want_bias, &dbias);
    reference_gradients(c, begin, &a, &g, &want, &want_bias);
    for (int i = 0; i < VARIANTS; i++) {
        const variant *v = &variants[i];
        if (v->f64 != f64 || !can_run(v)) continue;
        char text[300];
        describe(text, sizeof text, c, "dw", v->name);
        matrices got, got_bias;
        copy_matrices(&got, &dw);
        copy_matrices(&got_bias, &dbias);
        moe__gemm_dw_job job = {.experts = c->experts,
                                .segment_begin = begin,
                                .segments_per_expert = c->segments_per_expert,
                                .k = c->k,
                                .n = c->n,
                                .a = a.rows,
                                .g = g.rows,
                                .dw = got.m,
                                .overwrite = !c->add,
                                .tile_begin = tile_begin};
        if (c->bias) job.dbias = got_bias.m;
        tile_run run = {.v = v, .dw = &job, .tiles = v->dw_plan(&job)};
        run_tiles(&run, threads);
        assert_same(&got.data, &want.data, "dw", text);
        assert_same(&got_bias.data, &want_bias.data, "dbias", text);
        free(got.data.memory);
        free(got_bias.data.memory);
    }
    free_operand(&a);
    free_operand(&g);
    matrices *all[] = {&dw, &dbias, &want, &want_bias};
    for (int i = 0; i < 4; i++) free(all[i]->data.memory);
}

static void check_dw(gemm_case c, int threads)
{
    if (c.segments_per_expert == 0) c.segments_per_expert = 1;
    if (c.form == PANELS_T || c.form == HALF_PANELS_T) c.form--; /* never gradients */
    check_dw_type(&c, false, threads);
    check_dw_type(&c, true, threads);
}

/* ---- tests ----------------------------------------------------------------------------------- */

static const int64_t sizes[] = {0, 1, 3, 31, 33, 257};
enum { SIZES = 6 };

/* One of so many cases: fewer in builds that are slow. */
static int apart(void) { return getenv("MOE_SANITIZED") ? 3 : 1; }

START_TEST(test_gemm_rows_all_sizes)
{
    gemm_case c = {.experts = 6, .rows = {0, 1, 13, 14, 15, 113}, .form = _i % FORMS};
    c.k = sizes[_i];
    for (int n = _i % apart(); n < SIZES; n += apart()) {
        c.n = sizes[n];
        c.form = (_i + n) % FORMS;
        check_rows(c, 1);
    }
}
END_TEST

START_TEST(test_gemm_rows_all_strides)
{
    gemm_case c = {.k = 300, .n = 70, .experts = 4, .rows = {3, 20, 0, 5}, .form = _i, .bias = 1};
    for (int options = 0; options < 4; options++) {
        c.each = options & 1;
        c.padded = options >> 1;
        check_rows(c, 1);
    }
}
END_TEST

START_TEST(test_gemm_rows_many_blocks)
{
    if (_i % apart() != 0) return; /* an odd number: both values of `add` */
    gemm_case c = {.k = 520, .n = 530, .experts = 1, .rows = {17}, .bias = 1, .add = _i % 2};
    c.form = _i / 2;
    check_rows(c, 1);
}
END_TEST

START_TEST(test_gemm_rows_one_expert_has_all)
{
    gemm_case c =
        {.k = 20, .n = 40, .experts = 5, .rows = {0, 0, 0, 457, 0}, .gather = 1, .out_index = 1};
    check_rows(c, 1);
    check_rows((gemm_case){.k = 20, .n = 40, .experts = 3}, 1);
    check_rows((gemm_case){.k = 20, .n = 40}, 1);
}
END_TEST

static gemm_case random_case(int max_rows)
{
    gemm_case c = {.k = random_below(70), .n = random_below(70), .experts = 1 + random_below(6)};
    c.segments_per_expert = random_below(2) ? 1 : 1 + random_below(4);
    for (int s = 0; s < MAX_SEGMENTS; s++)
        c.rows[s] = random_below(3) ? random_below(max_rows) : random_below(3);
    c.form = (int)random_below(FORMS);
    int *flag[] = {&c.each, &c.padded, &c.gather, &c.scale, &c.bias, &c.out_index, &c.add, &c.skip};
    for (int i = 0; i < 8; i++) *flag[i] = (int)random_below(2);
    return c;
}

START_TEST(test_gemm_rows_random)
{
    random_state = 100 + (uint64_t)_i;
    for (int i = 0; i < 40 / apart(); i++) check_rows(random_case(40), 1);
}
END_TEST

START_TEST(test_gemm_rows_concurrent_tiles)
{
    gemm_case c = {.k = 30, .n = 600, .experts = 4, .rows = {150, 2, 0, 40}, .bias = 1, .scale = 1};
    check_rows(c, 4);
}
END_TEST

START_TEST(test_gemm_dw_all_sizes)
{
    gemm_case c = {.experts = 6, .rows = {0, 1, 13, 14, 15, 113}, .form = _i % FORMS, .bias = 1};
    c.k = sizes[_i];
    c.add = _i % 2;
    for (int n = _i % apart(); n < SIZES; n += apart()) {
        c.n = sizes[n];
        c.form = (_i + n) % FORMS;
        check_dw(c, 1);
    }
}
END_TEST

START_TEST(test_gemm_dw_more_rows_than_a_block)
{
    gemm_case c =
        {.k = 15, .n = 35, .experts = 4, .rows = {4096, 0, 4097, 8200}, .bias = 1, .gather = 1};
    c.add = _i;
    check_dw(c, 1);
}
END_TEST

START_TEST(test_gemm_dw_segments_in_order)
{
    gemm_case c = {.k = 33, .n = 20, .experts = 2, .segments_per_expert = 4, .bias = 1, .scale = 1};
    const int64_t rows[8] = {300, 0, 4100, 7, 0, 0, 0, 0};
    memcpy(c.rows, rows, sizeof rows);
    c.add = _i;
    check_dw(c, 1);
}
END_TEST

START_TEST(test_gemm_dw_gradient_not_wanted)
{
    gemm_case c =
        {.k = 40, .n = 50, .experts = 7, .rows = {9, 8, 0, 3, 40, 0, 1}, .each = 1, .skip = 1};
    c.bias = 1;
    c.add = _i % 2;
    c.form = _i / 2;
    check_dw(c, 1);
}
END_TEST

START_TEST(test_gemm_dw_random)
{
    random_state = 200 + (uint64_t)_i;
    for (int i = 0; i < 40 / apart(); i++) check_dw(random_case(60), 1);
}
END_TEST

START_TEST(test_gemm_dw_concurrent_tiles)
{
    gemm_case c = {.k = 300, .n = 600, .experts = 3, .rows = {20, 0, 5}, .bias = 1};
    check_dw(c, 4);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("gemm");
    TCase *tcase = tcase_create("gemm");
    tcase_set_timeout(tcase, 300);
    tcase_add_loop_test(tcase, test_gemm_rows_all_sizes, 0, SIZES);
    tcase_add_loop_test(tcase, test_gemm_rows_all_strides, 0, FORMS);
    tcase_add_loop_test(tcase, test_gemm_rows_many_blocks, 0, 2 * FORMS);
    tcase_add_test(tcase, test_gemm_rows_one_expert_has_all);
    tcase_add_loop_test(tcase, test_gemm_rows_random, 0, 5);
    tcase_add_test(tcase, test_gemm_rows_concurrent_tiles);
    tcase_add_loop_test(tcase, test_gemm_dw_all_sizes, 0, SIZES);
    tcase_add_loop_test(tcase, test_gemm_dw_more_rows_than_a_block, 0, 2);
    tcase_add_loop_test(tcase, test_gemm_dw_segments_in_order, 0, 2);
    tcase_add_loop_test(tcase, test_gemm_dw_gradient_not_wanted, 0, 2 * FORMS);
    tcase_add_loop_test(tcase, test_gemm_dw_random, 0, 5);
    tcase_add_test(tcase, test_gemm_dw_concurrent_tiles);
    suite_add_tcase(suite, tcase);
    return run_suite(suite, 1);
}
