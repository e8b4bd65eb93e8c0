/* capacity.h - how many rows an expert takes of a token group (GShard, arXiv 2006.16668, and how
 * others round), the same on host and device. C11 and C++. Includes numeric.h for MOE_FN. */
#ifndef MOE_CAPACITY_H
#define MOE_CAPACITY_H

#include "base.h"
#include "numeric.h"

/* Entries of a token; of kinds where they vary their mean. */
MOE_FN int64_t moe__entries_per_token(const moe_gate_config *c, int64_t top_k)
{
    if (c->kind == MOE_GATE_SOFTMAX_DENSE) return c->num_experts;
    return c->kind == MOE_GATE_HIERARCHICAL ? c->top_groups * top_k : top_k;
}

/* Whether a gate's experts take tokens, so that the entries of a token vary. */
MOE_FN int moe__takes_tokens(const moe_gate_config *c)
{
    return c->kind == MOE_GATE_BALANCED || c->kind == MOE_GATE_EXPERT_CHOICE;
}

/* Of numbers that are not negative; from 2^53 on all are whole. */
MOE_FN double moe__round_down(double x) { return x < 9e15 ? (double)(int64_t)x : x; }
MOE_FN double moe__round_up(double x)
{
    return moe__round_down(x) + (moe__round_down(x) < x ? 1 : 0);
}

MOE_FN double moe__round_capacity(const moe_gate_config *c, double factor, double K, double tokens)
{
    double E = (double)c->num_experts;
    switch (c->capacity_rounding) {
    case MOE_ROUND_PER_CHOICE: return K * moe__round_down(factor * moe__round_up(tokens / E));
    case MOE_ROUND_TOKENS_UP: return moe__round_down(K * moe__round_up(factor * tokens) / E);
    case MOE_ROUND_UP: return moe__round_up(factor * K * tokens / E);
    case MOE_ROUND_NEAREST: return moe__round_down(factor * K * tokens / E + 0.5);
    default: return moe__round_down(factor * K * tokens / E);
    }
}

/* a * b, or INT64_MAX; neither is negative. */
MOE_FN int64_t moe__mul_saturated(int64_t a, int64_t b)
{
    return b != 0 && a > INT64_MAX / b ? INT64_MAX : a * b;
}

/* Rows of an expert for a group of `tokens` unmasked tokens; never beyond what it could send. */
MOE_FN int64_t moe__factor_capacity(const moe_gate_config *c, int64_t tokens, int32_t train)
{
    int64_t K = moe__entries_per_token(c, c->top_k), most = moe__mul_saturated(tokens, K);
    double factor = !train && c->capacity_factor_eval > 0 ? c->capacity_factor_eval
                                                          : c->capacity_factor;
    double rounded = moe__round_capacity(c, factor, (double)K, (double)tokens);
    int64_t rows = rounded < (double)most ? (int64_t)rounded : most; /* NaN: inf times no tokens */
    if (rows < c->capacity_minimum) rows = c->capacity_minimum;
    if (c->capacity_multiple > 1 && rows % c->capacity_multiple != 0) {
        int64_t more = c->capacity_multiple - rows % c->capacity_multiple;
        rows = rows > INT64_MAX - more ? INT64_MAX : rows + more;
    }
    return rows > most ? most : rows;
}

/* `capacity` is the call's, or MOE_FROM_CONFIG. Experts that take tokens take no more than there
 * are. */
MOE_FN int64_t moe__capacity_of_group(const moe_gate_config *c, int64_t capacity, int64_t tokens,
                                      int32_t train)
{
    int64_t rows = capacity != MOE_FROM_CONFIG ? capacity
                   : c->capacity_kind == MOE_CAPACITY_NUMBER
                       ? c->capacity
                       : moe__factor_capacity(c, tokens, train);
    return moe__takes_tokens(c) && rows > tokens ? tokens : rows;
}

#endif
