/* bench_products.c - peers made of a library's sgemm: one dense chain, and loops over experts.
 *
 *     xs = x[token_of_row];  pre = xs W1;  h = act(pre);  z = h W2;  y[t] = sum of weight z
 *     dz = weight dy[t];  dW2 = h^T dz;  dh = dz W2^T;  dW1 = xs^T dpre;  dx[t] = sum of dpre W1^T
 *
 * dense_openblas  one expert with all R rows, neither gathered nor combined: the same FLOPs
 * loop_openblas   expert by expert, threads inside sgemm
 * omp_openblas    experts shared out among threads, the largest first, sgemm on one thread each
 * loop_onednn     the same with dnnl_sgemm
 *
 * Grouping is part of a call. Rows that only a backward would read are kept by thread, so that a
 * forward alone finds them in its cache. */
#include "bench.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct product_peer {
    const bench_work *w;
    const int32_t *ids;
    bench_sgemm product;
    bool dense, inside; /* inside: threads are the library's */
    int64_t experts;
    float *x, *dy;          /* of the dense chain: [R,D] */
    int64_t *begin, *place; /* [experts+1] */
    int64_t *row_of_entry, *entry_of_row, *order;
    float *xs, *pre, *h, *z, *dz, *dh, *dpre, *dxs; /* pre is h and dpre dh without "up" */
    int64_t scratch; /* rows of a thread's own, or 0: row r is at r */
    atomic_llong next;
} product_peer;

/* ---- grouping -------------------------------------------------------------------------------- */

static int by_rows(const void *a, const void *b, void *argument)
{
    const int64_t *begin = argument, i = *(const int64_t *)a, j = *(const int64_t *)b;
    int64_t m = begin[i + 1] - begin[i], n = begin[j + 1] - begin[j];
    return m != n ? (m > n ? -1 : 1) : (i > j) - (i < j);
}

static void group(product_peer *p)
{
    int64_t R = p->w->R, E = p->experts;
    if (p->dense) return;
    memset(p->begin, 0, (size_t)(E + 1) * sizeof *p->begin);
    for (int64_t i = 0; i < R; i++) p->begin[p->ids[i] + 1]++;
    for (int64_t e = 0; e < E; e++) p->begin[e + 1] += p->begin[e];
    memcpy(p->place, p->begin, (size_t)E * sizeof *p->place);
    for (int64_t i = 0; i < R; i++) {
        int64_t row = p->place[p->ids[i]]++;
        p->row_of_entry[i] = row, p->entry_of_row[row] = i;
    }
    for (int64_t e = 0; e < E; e++) p->order[e] = e;
    if (!p->inside) qsort_r(p->order, (size_t)E, sizeof *p->order, by_rows, p->begin);
}

/* ---- one expert ------------------------------------------------------------------------------ */

typedef struct activation {
    product_peer *p;
    float *to, *pre, *dh; /* dh: NULL for a forward */
    int64_t rows;
} activation;

static void activate_share(void *argument, int thread)
{
    activation *a = argument;
    const bench_work *w = a->p->w;
    int64_t F = w->o->F, from, to;
    bench_share(a->rows, bench_crew_threads(w->crew), thread, &from, &to);
    if (a->dh)
        bench_activation_backward(a->to + from * w->wide, a->pre + from * w->wide, a->dh + from * F,
                                  to - from, F, w->o->gated);
    else
        bench_activation(a->to + from * F, a->pre + from * w->wide, to - from, F, w->o->gated);
}

/* The dense chain's is long enough for all threads. */
static void activate(product_peer *p, float *to, float *pre, float *dh, int64_t rows)
{
    const bench_options *o = p->w->o;
    activation a = {p, to, pre, dh, rows};
    if (p->dense)
        bench_crew_run(p->w->crew, activate_share, &a);
    else if (dh)
        bench_activation_backward(to, pre, dh, rows, o->F, o->gated);
    else
        bench_activation(to, pre, rows, o->F, o->gated);
}

static float *rows_at(const product_peer *p, float *rows, int64_t width, int64_t e, int thread)
{
    return rows + width * (p->scratch > 0 ? p->scratch * thread : p->begin[e]);
}

static void expert_forward(product_peer *p, int64_t e, int thread)
{
    const bench_work *w = p->w;
    int64_t D = w->o->D, F = w->o->F, first = p->begin[e], n = p->begin[e + 1] - first;
    float *xs = p->dense ? p->x : rows_at(p, p->xs, D, e, thread);
    float *pre = rows_at(p, p->pre, w->wide, e, thread), *h = rows_at(p, p->h, F, e, thread);
    if (n == 0) return;
    for (int64_t r = 0; r < n && !p->dense; r++)
        memcpy(xs + r * D, w->x + p->entry_of_row[first + r] / w->o->K * D, (size_t)D * sizeof *xs);
    p->product(false, false, n, w->wide, D, xs, w->w1 + e * D * w->wide, pre);
    activate(p, h, pre, NULL, n);
    p->product(false, false, n, D, F, h, w->w2 + e * F * D, p->z + first * D);
}

static void expert_backward(product_peer *p, int64_t e, int thread)
{
    const bench_work *w = p->w;
    int64_t D = w->o->D, F = w->o->F, first = p->begin[e], n = p->begin[e + 1] - first;
    float *xs = p->dense ? p->x : p->xs + first * D, *h = p->h + first * F;
    float *pre = p->pre + first * w->wide, *dz = p->dense ? p->dy : p->dz + first * D;
    float *dh = p->dh + first * F, *dpre = p->dpre + first * w->wide;
    float *g1 = w->g1 + e * D * w->wide, *g2 = w->g2 + e * F * D;
    (void)thread;
    if (n == 0) {
        memset(g1, 0, (size_t)(D * w->wide) * sizeof *g1);
        memset(g2, 0, (size_t)(F * D) * sizeof *g2);
        return;
    }
    for (int64_t r = 0; r < n && !p->dense; r++) {
        int64_t entry = p->entry_of_row[first + r];
        const float *dy = w->dy + entry / w->o->K * D;
        w->entry_weight_grad[entry] = bench_dot(p->z + (first + r) * D, dy, D);
        bench_scale_row(dz + r * D, w->entry_weight[entry], dy, D, false);
    }
    p->product(true, false, F, D, n, h, dz, g2);
    p->product(false, true, n, F, D, dz, w->w2 + e * F * D, dh);
    activate(p, dpre, pre, dh, n);
    p->product(true, false, D, w->wide, n, xs, dpre, g1);
    p->product(false, true, n, D, w->wide, dpre, w->w1 + e * D * w->wide, p->dxs + first * D);
}

/* ---- all of them ----------------------------------------------------------------------------- */

static void experts_of_thread(product_peer *p, int thread,
                              void (*expert)(product_peer *, int64_t, int))
{
    int64_t i;
    while ((i = atomic_fetch_add(&p->next, 1)) < p->experts) expert(p, p->order[i], thread);
}

static void forward_thread(void *p, int thread) { experts_of_thread(p, thread, expert_forward); }

static void backward_thread(void *p, int thread) { experts_of_thread(p, thread, expert_backward); }

static void combine_thread(void *argument, int thread)
{
    const product_peer *p = argument;
    const bench_work *w = p->w;
    int64_t D = w->o->D, from, to;
    bench_share(w->o->T, bench_crew_threads(w->crew), thread, &from, &to);
    for (int64_t i = from * w->o->K; i < to * w->o->K; i++)
        bench_scale_row(w->y + i / w->o->K * D, w->entry_weight[i], p->z + p->row_of_entry[i] * D,
                        D, i % w->o->K > 0);
}

static void combine_backward_thread(void *argument, int thread)
{
    const product_peer *p = argument;
    const bench_work *w = p->w;
    int64_t D = w->o->D, from, to;
    bench_share(w->o->T, bench_crew_threads(w->crew), thread, &from, &to);
    for (int64_t i = from * w->o->K; i < to * w->o->K; i++)
        bench_scale_row(w->dx + i / w->o->K * D, 1, p->dxs + p->row_of_entry[i] * D, D,
                        i % w->o->K > 0);
}

static void all_experts(product_peer *p, bench_job job)
{
    atomic_store(&p->next, 0);
    if (p->inside)
        job(p, 0);
    else
        bench_crew_run(p->w->crew, job, p);
}

static double run(bench_peer *peer, int64_t call)
{
    product_peer *p = peer->state;
    double begin;
    bench_blas_threads(p->inside ? p->w->o->threads : 1);
    begin = bench_now();
    p->ids = bench_ids(p->w, call);
    group(p);
    all_experts(p, forward_thread);
    if (!p->dense) bench_crew_run(p->w->crew, combine_thread, p);
    if (p->w->o->backward) {
        all_experts(p, backward_thread);
        if (!p->dense) bench_crew_run(p->w->crew, combine_backward_thread, p);
    }
    return bench_now() - begin;
}

/* ---- making one ------------------------------------------------------------------------------ */

static void end(bench_peer *peer)
{
    product_peer *p = peer->state;
    const bench_options *o = p->w->o;
    int64_t rows = p->w->R + p->scratch * o->threads, size = (int64_t)sizeof(float) * rows;
    bench_room_free(p->xs, size * o->D), bench_room_free(p->z, size * o->D);
    bench_room_free(p->h, size * o->F), bench_room_free(p->dh, size * o->F);
    bench_room_free(p->dz, size * o->D), bench_room_free(p->dxs, size * o->D);
    if (o->gated) {
        bench_room_free(p->pre, size * p->w->wide);
        bench_room_free(p->dpre, size * p->w->wide);
    }
    bench_room_free(p->x, size * o->D), bench_room_free(p->dy, size * o->D);
    free(p->begin), free(p->place), free(p->order);
    free(p->row_of_entry), free(p->entry_of_row);
    free(p);
}

static int64_t *numbers(int64_t count)
{
    int64_t *a = calloc((size_t)count, sizeof *a);
    if (!a) exit(1);
    return a;
}

/* The most rows an expert has in any call. */
static int64_t most_rows(product_peer *p)
{
    int64_t most = 0;
    for (int i = 0; i < p->w->routings; i++) {
        p->ids = bench_ids(p->w, i);
        group(p);
        for (int64_t e = 0; e < p->experts; e++)
            if (p->begin[e + 1] - p->begin[e] > most) most = p->begin[e + 1] - p->begin[e];
    }
    return most;
}

static void make_rows(product_peer *p)
{
    const bench_work *w = p->w;
    int64_t rows = w->R, D = w->o->D, F = w->o->F;
    p->begin = numbers(p->experts + 1), p->place = numbers(p->experts + 1);
    p->order = numbers(p->experts + 1);
    p->row_of_entry = numbers(rows), p->entry_of_row = numbers(rows);
    p->begin[p->experts] = rows;
    if (!w->o->backward && !p->dense) p->scratch = most_rows(p);
    rows = (rows + p->scratch * w->o->threads) * (int64_t)sizeof(float);
    p->xs = bench_room(rows * D), p->z = bench_room(rows * D);
    p->h = bench_room(rows * F), p->pre = w->o->gated ? bench_room(rows * w->wide) : p->h;
    if (p->dense) {
        p->x = bench_room(rows * D);
        for (int64_t r = 0; r < w->R; r++)
            memcpy(p->x + r * D, w->x + r / w->o->K * D, (size_t)D * sizeof(float));
    }
    if (!w->o->backward) return;
    if (p->dense) {
        p->dy = bench_room(rows * D);
        for (int64_t r = 0; r < w->R; r++)
            memcpy(p->dy + r * D, w->dy + r / w->o->K * D, (size_t)D * sizeof(float));
    }
    p->dz = bench_room(rows * D), p->dxs = bench_room(rows * D);
    p->dh = bench_room(rows * F), p->dpre = w->o->gated ? bench_room(rows * w->wide) : p->dh;
}

bool bench_product_peer(bench_peer *peer, bench_work *w, const char *name)
{
    product_peer *p = calloc(1, sizeof *p);
    if (!p) exit(1);
    p->product = bench_blas(strcmp(name, "loop_onednn") == 0 ? "onednn" : "openblas");
    if (!p->product) {
        (void)fprintf(stderr,
                      "bench: %s left out: its library was not there when bench was built\n", name);
        free(p);
        return false;
    }
    bench_work_weights(w);
    p->w = w, p->dense = strcmp(name, "dense_openblas") == 0;
    p->inside = p->dense || strcmp(name, "loop_openblas") == 0;
    p->experts = p->dense ? 1 : w->o->E;
    make_rows(p);
    if (!p->inside) bench_crew_run(w->crew, bench_blas_thread, NULL);
    *peer = (bench_peer){.name = name, .state = p, .run = run, .end = end};
    peer->amount = bench_flops(w->o), peer->comparable = !p->dense;
    return true;
}
