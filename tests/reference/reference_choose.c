/* reference_choose.c - who is chosen, by each kind of gate. */
#include "reference/reference_parts.h"

#include <stdlib.h>

void ref__score_row(const ref_problem *p, const ref_result *r, int64_t t, double *s)
{
    const double *z = r->logits + t * p->E;
    (void)ref__softmax_row(z, p->E, s);
    for (int64_t e = 0; e < p->E && p->score; e++) s[e] = sigmoid(z[e]);
}

/* ---- the K largest --------------------------------------------------------------------------- */

/* The K first of the allowed experts by v; allowed NULL: all. */
static void first_of(const ref_problem *p, const double *v, const int *allowed, int32_t *ids)
{
    for (int32_t e = 0; e < p->E; e++) {
        int64_t rank = 0;
        if (allowed && !allowed[e]) continue;
        for (int32_t i = 0; i < p->E; i++)
            rank += i != e && (!allowed || allowed[i]) && before(v, i, e);
        if (rank < p->K) ids[rank] = e;
    }
}

/* allowed[e]: e is in one of the best groups; a group's score is the sum of its n largest v. */
static void best_groups(const ref_problem *p, const double *v, int *allowed)
{
    int64_t G = p->expert_groups, size = p->E / G, n = p->group_score > 1 ? p->group_score : 1;
    double *score = reals(G);
    for (int64_t g = 0; g < G; g++)
        for (int64_t k = 0; k < n; k++)
            for (int32_t i = 0; i < size; i++)
                if (rank_of(v + g * size, size, i) == k) score[g] += v[g * size + i];
    for (int32_t e = 0; e < p->E; e++)
        allowed[e] = rank_of(score, G, (int32_t)(e / size)) < p->top_groups;
    free(score);
}

/* By score plus bias, in the best groups. Without a bias the order is that of the logits. */
static void choose_by_score(const ref_problem *p, const ref_result *r, int64_t t, int32_t *ids)
{
    const double *h = r->H + t * p->E;
    double *s = reals(p->E);
    int *allowed = room(p->E, sizeof *allowed), groups = p->expert_groups > 1;
    ref__score_row(p, r, t, s);
    for (int64_t e = 0; e < p->E && p->selection_bias; e++) s[e] += p->selection_bias[e];
    if (groups) best_groups(p, p->selection_bias || p->group_score > 1 ? s : h, allowed);
    first_of(p, p->selection_bias ? s : h, groups ? allowed : NULL, ids);
    free(s), free(allowed);
}

/* ---- Sinkhorn -------------------------------------------------------------------------------- */

/* The doubly normalised exp(logits) of one group: rows sum to 1/T_g, columns to 1/E. */
static void sinkhorn(const ref_problem *p, const ref_result *r, int64_t g, double *normalised)
{
    int64_t first = group_first(p, g), last = group_first(p, g + 1);
    double *d0 = reals(p->T), *d1 = reals(p->E), change = INFINITY;
    double tolerance = p->sinkhorn_tolerance != 0 ? p->sinkhorn_tolerance : 1e-4;
    int rounds = p->sinkhorn_iterations ? p->sinkhorn_iterations : 100;
    double tokens = (double)valid_tokens(p, first, last);
    for (int64_t e = 0; e < p->E; e++) d1[e] = 1;
    for (int round = 0; round < rounds && change > tolerance; round++) {
        for (int64_t t = first; t < last; t++) {
            double sum = 0;
            for (int64_t e = 0; e < p->E; e++) sum += d1[e] * exp(r->logits[t * p->E + e]);
            d0[t] = masked(p, t) ? 0 : 1 / tokens / (sum + 1e-8);
        }
        change = 0;
        for (int64_t e = 0; e < p->E; e++) {
            double sum = 0;
            for (int64_t t = first; t < last; t++)
                if (!masked(p, t)) sum += d0[t] * exp(r->logits[t * p->E + e]);
            double next = 1 / (double)p->E / (sum + 1e-8);
            change += fabs(next - d1[e]) / (double)p->E;
            d1[e] = next;
        }
    }
    for (int64_t t = first; t < last; t++)
        for (int64_t e = 0; e < p->E; e++)
            normalised[t * p->E + e] = d0[t] * exp(r->logits[t * p->E + e]) * d1[e];
    free(d0), free(d1);
}

static void choose_by_sinkhorn(const ref_problem *p, ref_result *r)
{
    double *normalised = reals(p->T * p->E);
    for (int64_t g = 0; g < groups_of(p); g++) sinkhorn(p, r, g, normalised);
    for (int64_t t = 0; t < p->T; t++) first_of(p, normalised + t * p->E, NULL, r->ids + t * p->K);
    free(normalised);
}

/* ---- entries of varying number --------------------------------------------------------------- */

/* Experts of a token in ascending order. */
static void list_chosen(const ref_problem *p, ref_result *r, int64_t t, const int *chosen,
                        const int64_t *slot)
{
    int64_t n = t * p->K;
    for (int32_t e = 0; e < p->E; e++)
        if (chosen[e]) r->slot[n] = slot ? slot[e] : -1, r->ids[n++] = e;
}

/* Whether token a comes before b at expert e. */
static int token_before(const ref_problem *p, const double *s, int64_t e, int64_t a, int64_t b)
{
    double u = s[a * p->E + e], v = s[b * p->E + e];
    if (isnan(u) || isnan(v)) return isnan(u) == isnan(v) ? a < b : isnan(v);
    return u != v ? u > v : a < b;
}

/* Each expert takes its best tokens of each group. */
static void choose_by_expert(const ref_problem *p, ref_result *r)
{
    double *s = reals(p->T * p->E);
    int *chosen = room(p->E, sizeof *chosen);
    int64_t *rank = room(p->E, sizeof *rank);
    for (int64_t t = 0; t < p->T; t++) ref__score_row(p, r, t, s + t * p->E);
    for (int64_t g = 0; g < groups_of(p); g++)
        for (int64_t t = group_first(p, g); t < group_first(p, g + 1); t++) {
            if (masked(p, t)) continue;
            for (int64_t e = 0; e < p->E; e++) {
                rank[e] = 0;
                for (int64_t i = group_first(p, g); i < group_first(p, g + 1); i++)
                    rank[e] += i != t && !masked(p, i) && token_before(p, s, e, i, t);
                chosen[e] = rank[e] < ref__capacity_of_group(p, g);
            }
            list_chosen(p, r, t, chosen, rank);
        }
    free(s), free(chosen), free(rank);
}

static void choose_above(const ref_problem *p, ref_result *r)
{
    double *s = reals(p->E);
    int *chosen = room(p->E, sizeof *chosen);
    for (int64_t t = 0; t < p->T; t++) {
        if (masked(p, t)) continue;
        ref__score_row(p, r, t, s);
        for (int64_t e = 0; e < p->E; e++) chosen[e] = s[e] > p->threshold[e];
        list_chosen(p, r, t, chosen, NULL);
    }
    free(s), free(chosen);
}

/* ---- all ------------------------------------------------------------------------------------- */

static void choose_token(const ref_problem *p, ref_result *r, int64_t t)
{
    int32_t *ids = r->ids + t * p->K;
    if (p->kind == DENSE) {
        for (int32_t e = 0; e < p->E; e++) ids[e] = e;
    } else if (p->kind == TOP_K && (p->selection_bias || p->expert_groups > 1)) {
        choose_by_score(p, r, t, ids);
    } else {
        first_of(p, r->H + t * p->E, NULL, ids);
    }
}

void ref__select_experts(const ref_problem *p, ref_result *r)
{
    int by_expert = p->kind == EXPERT_CHOICE || (p->kind == BALANCED && p->train);
    for (int64_t n = 0; n < p->T * p->K; n++) r->ids[n] = p->fixed_ids ? p->fixed_ids[n] : -1;
    if (!p->fixed_ids && by_expert)
        choose_by_expert(p, r);
    else if (!p->fixed_ids && p->kind == BALANCED)
        choose_above(p, r);
    else if (!p->fixed_ids && p->kind == SINKHORN && p->train)
        choose_by_sinkhorn(p, r);
    else
        for (int64_t t = 0; t < p->T && !p->fixed_ids; t++) choose_token(p, r, t);
    for (int64_t n = 0; n < p->T * p->K; n++)
        if (masked(p, n / p->K)) r->ids[n] = -1;
}
