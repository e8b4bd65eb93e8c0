/* capacity.h - how many rows an expert may have in a token group. C11, C++ and kernels.
 *
 *     floor, ceil, ...(f K tokens / E), at least the minimum, up to a multiple, at most K tokens
 *
 * All in double, each operation rounded once: the host and every device find the same number. What
 * a rule needs of a gate's config is copied out of it, for a kernel takes plain values. */
#ifndef MOE_CAPACITY_H
#define MOE_CAPACITY_H

#include <moe/gate.h>

#include "numeric.h"

/* Gates whose experts choose their tokens. */
static inline int moe__takes_tokens(const moe_gate_config *c)
{
    return c->kind == MOE_GATE_BALANCED || c->kind == MOE_GATE_EXPERT_CHOICE;
}

/* Entries of a token; of gates that take tokens, on the average. */
static inline int64_t moe__entries_per_token(const moe_gate_config *c, int64_t top_k)
{
    if (c->kind == MOE_GATE_SOFTMAX_DENSE) return c->num_experts;
    return c->kind == MOE_GATE_HIERARCHICAL ? c->top_groups * top_k : top_k;
}

typedef struct moe__capacity_rule {
    int64_t number; /* rows, whatever the tokens; -1: by the factor */
    int64_t num_experts, entries_per_token, minimum, multiple;
    double factor;
    int32_t rounding;       /* MOE_ROUND_* */
    int32_t at_most_tokens; /* 1: never more than the group's tokens */
} moe__capacity_rule;

/* Of a call: its own capacity or, with MOE_FROM_CONFIG, what the config says, which has a limit. */
static inline moe__capacity_rule moe__capacity_rule_of(const moe_gate_config *c, int64_t capacity,
                                                       int32_t train)
{
    moe__capacity_rule rule;
    int number = c->capacity_kind == MOE_CAPACITY_NUMBER;
    rule.number = capacity != MOE_FROM_CONFIG ? capacity : number ? c->capacity : -1;
    rule.num_experts = c->num_experts;
    rule.entries_per_token = moe__entries_per_token(c, c->top_k);
    rule.minimum = c->capacity_minimum;
    rule.multiple = c->capacity_multiple;
    rule.factor = !train && c->capacity_factor_eval > 0 ? c->capacity_factor_eval
                                                        : c->capacity_factor;
    rule.rounding = c->capacity_rounding;
    rule.at_most_tokens = moe__takes_tokens(c);
    return rule;
}

/* Of numbers that are not negative; from 2^53 on all are whole. */
MOE_FN double moe__round_down(double x) { return x < 9e15 ? (double)(int64_t)x : x; }
MOE_FN double moe__round_up(double x)
{
    double down = moe__round_down(x);
    return down + (down < x ? 1.0 : 0.0);
}

MOE_FN double moe__round_capacity(const moe__capacity_rule *rule, double tokens)
{
    double E = (double)rule->num_experts, K = (double)rule->entries_per_token;
    double factor = rule->factor;
    switch (rule->rounding) {
    case MOE_ROUND_PER_CHOICE: return K * moe__round_down(factor * moe__round_up(tokens / E));
    case MOE_ROUND_TOKENS_UP: return moe__round_down(K * moe__round_up(factor * tokens) / E);
    case MOE_ROUND_UP: return moe__round_up(factor * K * tokens / E);
    case MOE_ROUND_NEAREST: return moe__round_down(factor * K * tokens / E + 0.5);
    default: return moe__round_down(factor * K * tokens / E);
    }
}

/* Rows of an expert for a group of `tokens` unmasked tokens; never beyond what it could send, of
 * which -1 says that it does not fit in 63 bits. */
MOE_FN int64_t moe__factor_capacity(const moe__capacity_rule *rule, int64_t tokens)
{
    int64_t K = rule->entries_per_token;
    int64_t most = K > 0 && tokens > INT64_MAX / K ? -1 : tokens * K;
    double rounded = moe__round_capacity(rule, (double)tokens);
    int64_t rows = rounded < (double)most ? (int64_t)rounded : most; /* NaN: inf times no tokens */
    rows = rows > rule->minimum ? rows : rule->minimum;
    if (rule->multiple > 1 && rows % rule->multiple != 0) {
        int64_t more = rule->multiple - rows % rule->multiple;
        rows = rows > INT64_MAX - more ? -1 : rows + more;
    }
    return rows < 0 || rows > most ? most : rows;
}

MOE_FN int64_t moe__capacity_of_group(const moe__capacity_rule *rule, int64_t tokens)
{
    int64_t rows = rule->number >= 0 ? rule->number : moe__factor_capacity(rule, tokens);
    return rule->at_most_tokens && rows > tokens ? tokens : rows;
}

#endif
