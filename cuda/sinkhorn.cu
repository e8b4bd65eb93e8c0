/* sinkhorn.cu - a gate's choice after Sinkhorn's normalisation, as in src/cpu/choose.c.
 *
 *     c = exp(logit - max)
 *     d0_t = 1 / (T_g (sum_e d1_e c_te + 1e-8)),  d1_e = 1 / (E (sum_t d0_t c_te + 1e-8))
 *     until the mean change of d1 is at most the tolerance; columns = d1_e c_te
 *
 * Each token group by itself, all at once; a group that is done lets the rounds that are left go
 * by. The sums are chains of fused multiply-adds in double in ascending index, as on the CPU: who
 * is chosen hangs on their last bit. */
#include "route.h"
#include "weigh.h"

#define ROWS_THREADS 64
#define TILE_WIDTH 33 /* one more than a warp: no bank is asked twice */

struct moe_sinkhorn {
    int64_t tokens, E, groups;
    const int64_t *group_begin, *valid_begin;
    const uint8_t *token_mask;
    float *c;           /* [T,E] */
    double *row_factor; /* [T] */
    double *factor;     /* [G,2,E]: d1, and its change */
    int32_t *done;      /* [G] */
    double tolerance;   /* of the sum of changes */
};

/* c = exp(h - max); a warp for each token. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_sinkhorn_exponentials(moe_sinkhorn s, const float *h)
{
    int64_t t = moe_warp();
    float max = -moe_infinity();
    if (t >= s.tokens) return;
    h += t * s.E;
    for (int64_t e = moe_lane(); e < s.E; e += MOE_WARP) max = h[e] > max ? h[e] : max;
    max = moe_warp_max(max);
    for (int64_t e = moe_lane(); e < s.E; e += MOE_WARP)
        s.c[t * s.E + e] = moe__exp_f32(h[e] - max);
}

MOE_GLOBAL(MOE_ROUTE_THREADS) moe_sinkhorn_start(moe_sinkhorn s)
{
    int64_t g = moe_thread() / s.E, e = moe_thread() % s.E;
    if (g >= s.groups) return;
    s.factor[g * 2 * s.E + e] = 1;
    if (e == 0) s.done[g] = s.valid_begin[g + 1] == s.valid_begin[g];
}

/* d0 of 64 tokens, a thread for each; 64 x 32 of c at a time through shared memory. */
MOE_GLOBAL(ROWS_THREADS) moe_sinkhorn_rows(moe_sinkhorn s)
{
    MOE_SHARED(float, tile, ROWS_THREADS *TILE_WIDTH);
    int64_t first = (int64_t)blockIdx.x * ROWS_THREADS, t = first + threadIdx.x;
    bool there = t < s.tokens && !moe_is_masked(s.token_mask, t);
    int64_t g = t < s.tokens ? moe_range_of(s.group_begin, s.groups, t) : 0;
    const double *factor = s.factor + g * 2 * s.E;
    double sum = 0;
    for (int64_t e = 0; e < s.E; e += MOE_WARP) {
        for (int i = (int)threadIdx.x / MOE_WARP; i < ROWS_THREADS; i += ROWS_THREADS / MOE_WARP)
            if (first + i < s.tokens && e + moe_lane() < s.E)
                tile[i * TILE_WIDTH + moe_lane()] = s.c[(first + i) * s.E + e + moe_lane()];
        moe_block_sync();
        for (int j = 0; j < MOE_WARP && e + j < s.E && there; j++)
            sum = moe__fma_f64(factor[e + j], (double)tile[(int)threadIdx.x * TILE_WIDTH + j], sum);
        moe_block_sync();
    }
    if (t >= s.tokens || s.done[g]) return;
    double tokens = (double)(s.valid_begin[g + 1] - s.valid_begin[g]);
    s.row_factor[t] = there ? 1 / (tokens * (sum + 1e-8)) : 0;
}

/* d1 of 64 experts of a group, a thread for each. */
MOE_GLOBAL(ROWS_THREADS) moe_sinkhorn_columns(moe_sinkhorn s, int64_t blocks)
{
    int64_t g = (int64_t)blockIdx.x / blocks;
    int64_t e = (int64_t)blockIdx.x % blocks * ROWS_THREADS + threadIdx.x;
    double *factor = s.factor + g * 2 * s.E, sum = 0;
    if (e >= s.E || s.done[g]) return;
    for (int64_t t = s.group_begin[g]; t < s.group_begin[g + 1]; t++)
        if (!moe_is_masked(s.token_mask, t))
            sum = moe__fma_f64(s.row_factor[t], (double)s.c[t * s.E + e], sum);
    double next = 1 / ((double)s.E * (sum + 1e-8)), change = factor[e] - next;
    factor[s.E + e] = change < 0 ? -change : change;
    factor[e] = next;
}

/* Whether the changes of a group, in order, sum to no more than the tolerance; a warp for each. */
MOE_GLOBAL(MOE_WARP) moe_sinkhorn_check(moe_sinkhorn s)
{
    int64_t g = blockIdx.x;
    const double *change = s.factor + g * 2 * s.E + s.E;
    double sum = 0;
    if (s.done[g]) return;
    for (int64_t e = 0; e < s.E; e += MOE_WARP) {
        double mine = e + moe_lane() < s.E ? change[e + moe_lane()] : 0;
        for (int lane = 0; lane < MOE_WARP; lane++) {
            double other = moe_shuffle(mine, lane);
            if (e + lane < s.E) sum += other;
        }
    }
    moe_warp_sync();
    if (moe_lane() == 0 && !(sum > s.tolerance)) s.done[g] = 1;
}

/* columns = d1_e c_te: a row's order is that of the normalised matrix. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_sinkhorn_balance(moe_sinkhorn s)
{
    int64_t t = moe_thread() / s.E, e = moe_thread() % s.E;
    if (t >= s.tokens) return;
    int64_t g = moe_range_of(s.group_begin, s.groups, t);
    if (s.valid_begin[g + 1] == s.valid_begin[g]) return;
    float *c = s.c + t * s.E + e;
    *c = (float)(s.factor[g * 2 * s.E + e] * (double)*c);
}

/* Scratch, from its beginning. */
static void lay_out(moe_sinkhorn *s, moe__arena *arena)
{
    s->factor = (double *)moe__arena_take(arena, moe__mul(s->groups, moe__mul(2, s->E)),
                                          sizeof(double));
    s->done = (int32_t *)moe__arena_take(arena, s->groups, sizeof(int32_t));
}

static moe_status round_of(const moe__workers *w, const moe_sinkhorn *s)
{
    int64_t blocks = (s->E + ROWS_THREADS - 1) / ROWS_THREADS;
    dim3 rows((unsigned)((s->tokens + ROWS_THREADS - 1) / ROWS_THREADS));
    MOE_TRY(moe__cuda_launch(w, "moe_sinkhorn_rows", moe_sinkhorn_rows, rows, dim3(ROWS_THREADS), 0,
                             *s));
    MOE_TRY(moe__cuda_launch(w, "moe_sinkhorn_columns", moe_sinkhorn_columns,
                             dim3((unsigned)(blocks * s->groups)), dim3(ROWS_THREADS), 0, *s,
                             blocks));
    return moe__cuda_launch(w, "moe_sinkhorn_check", moe_sinkhorn_check, dim3((unsigned)s->groups),
                            dim3(MOE_WARP), 0, *s);
}

moe_status moe__cuda_sinkhorn(const moe__route_job *job)
{
    const moe__workers *w = &job->workers;
    const moe_gate_config *c = job->config;
    int64_t E = job->level[0].width, T = job->tokens;
    int64_t rounds = c->sinkhorn_iterations ? c->sinkhorn_iterations : 100;
    double tolerance = c->sinkhorn_tolerance != 0 ? c->sinkhorn_tolerance : 1e-4;
    moe__arena arena = {w->scratch, 0};
    moe_sinkhorn s = {};
    if (T == 0) return MOE_OK;
    s.tokens = T, s.E = E, s.groups = job->groups;
    s.group_begin = job->group_begin, s.valid_begin = job->valid_begin;
    s.token_mask = job->token_mask;
    s.c = (float *)job->columns;
    s.row_factor = job->row_factor;
    s.tolerance = tolerance * (double)E;
    lay_out(&s, &arena);
    MOE_TRY(moe_over_rows(w, "moe_sinkhorn_exponentials", moe_sinkhorn_exponentials, T, s,
                          (const float *)job->level[0].noisy));
    MOE_TRY(moe_over_items(w, "moe_sinkhorn_start", moe_sinkhorn_start, s.groups * E, s));
    for (int64_t round = 0; round < rounds; round++) MOE_TRY(round_of(w, &s));
    return moe_over_items(w, "moe_sinkhorn_balance", moe_sinkhorn_balance, T * E, s);
}

/* Of this file, choose.cu and take.cu: a second list of the entries to sort them with, or factors
 * of the groups. */
int64_t moe__cuda_choose_scratch(const moe__pass_shape *shape)
{
    moe__arena entries = {NULL, 0}, factors = {NULL, 0};
    moe_sinkhorn s = {};
    if (!shape || !shape->gate) return 0;
    (void)moe__arena_take(&entries, shape->entries, sizeof(int32_t));
    s.E = shape->num_experts;
    s.groups = shape->groups;
    if (shape->gate->kind == MOE_GATE_SINKHORN) lay_out(&s, &factors);
    return entries.used < 0 || factors.used < 0 ? -1 : moe__max(entries.used, factors.used);
}
