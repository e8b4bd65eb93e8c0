/* check_gate_kinds.c - what each kind of gate chooses and how many rows an expert takes, found here
 * once more from the formulas; random choices by their frequencies. Gradients are
 * check_family's. */
#include "philox.h"
#include "support/layer_case.h"
#include "support/suite.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- a gate with host logits ----------------------------------------------------------------- */

/* A gate of width 0, its pass and the view of its last plan. */
typedef struct routing {
    moe_context *context;
    moe_gate *gate;
    moe_pass *pass;
    moe_gate_config g;
    moe_forward_args f;
    moe_plan_view v;
    scalar *logits; /* [T,E] */
} routing;

static void routing_begin(routing *r, int32_t kind, int64_t T, int64_t E, int64_t K)
{
    memset(r, 0, sizeof *r);
    r->context = new_context();
    MUST(moe_gate_config_init(&r->g, sizeof r->g));
    MUST(moe_forward_args_init(&r->f, sizeof r->f));
    MUST(moe_plan_view_init(&r->v, sizeof r->v));
    r->g.kind = kind, r->g.num_experts = E, r->g.top_k = K, r->g.dtype = REAL;
    r->logits = calloc((size_t)(T * E), sizeof *r->logits);
    ck_assert_ptr_nonnull(r->logits);
    uint64_t state = 77;
    for (int64_t i = 0; i < T * E; i++) r->logits[i] = (scalar)random_normal(&state);
    r->f.tokens = T, r->f.logits_in = r->logits;
}

/* Makes the gate at the first call. */
static void route(routing *r)
{
    const moe_plan *plan;
    if (!r->gate) {
        MUST(moe_gate_create(&r->gate, r->context, &r->g));
        MUST(moe_pass_create_for_gate(&r->pass, r->gate, NULL));
    }
    MUST(moe_gate_forward(r->gate, r->pass, &r->f));
    MUST(moe_pass_plan(r->pass, &plan));
    MUST(moe_plan_check(plan));
    MUST(moe_plan_get(plan, &r->v));
}

static void routing_end(routing *r)
{
    free(r->logits);
    moe_pass_destroy(r->pass), moe_gate_destroy(r->gate), moe_context_destroy(r->context);
}

static double weight_at(const routing *r, int64_t n)
{
    return (double)((const scalar *)r->v.weight_of_entry)[n];
}

/* softmax(logits)[t,e] */
static double score_at(const routing *r, int64_t t, int64_t e)
{
    const scalar *l = r->logits + t * r->g.num_experts;
    double sum = 0;
    for (int64_t i = 0; i < r->g.num_experts; i++) sum += exp((double)l[i] - (double)l[e]);
    return 1 / sum;
}

/* The entry of (t, e), or -1. */
static int64_t entry_at(const routing *r, int64_t t, int64_t e)
{
    for (int64_t n = r->v.token_begin[t]; n < r->v.token_begin[t + 1]; n++)
        if (r->v.expert_of_entry[n] == e) return n;
    return -1;
}

/* ---- hash ------------------------------------------------------------------------------------ */

START_TEST(test_hash_experts_depend_on_seed_and_key_alone)
{
    enum { T = 600, E = 7, K = 3 };
    int64_t key[T], uses[E] = {0};
    int32_t first[K];
    routing r;
    routing_begin(&r, MOE_GATE_HASH, T, E, K);
    for (int t = 0; t < T; t++) key[t] = t < 2 ? 5 : 1000003LL * t - 17;
    r.f.token_key = key, r.f.logits_in = NULL;
    route(&r);
    memcpy(first, r.v.expert_of_entry, sizeof first);
    for (int t = 0; t < T; t++)
        for (int j = 0; j < K; j++) {
            int32_t e = r.v.expert_of_entry[t * K + j];
            ck_assert(e >= 0 && e < E);
            for (int i = 0; i < j; i++) ck_assert_int_ne(e, r.v.expert_of_entry[t * K + i]);
            ck_assert_double_eq_tol(weight_at(&r, t * K + j), 1.0 / K, TOLERANCE(1e-15));
            uses[e]++;
        }
    ck_assert_mem_eq(first, r.v.expert_of_entry + K, sizeof first); /* the same key */
    for (int e = 0; e < E; e++) ck_assert_int_lt(llabs(uses[e] - T * K / E), 70);
    r.f.step = 8, r.f.token_first = 99, r.f.flags = MOE_FORWARD_TRAIN, r.f.tokens = 1;
    route(&r);
    ck_assert_mem_eq(first, r.v.expert_of_entry, sizeof first);
    routing_end(&r);
}
END_TEST

/* Draw j is floor(w (E - j) / 2^32) among what is left in ascending order, w of {hash, j / 4,
 * key}. */
START_TEST(test_hash_is_the_documented_function)
{
    enum { T = 40, E = 9, K = 9 };
    int64_t key[T];
    routing r;
    routing_begin(&r, MOE_GATE_HASH, T, E, K);
    r.g.seed = 0x123456789abcdef0u, r.g.stream_id = 6;
    for (int t = 0; t < T; t++) key[t] = (int64_t)t * 0x10000001LL - 3;
    r.f.token_key = key;
    route(&r);
    for (int t = 0; t < T; t++) {
        int left[E], count = E;
        uint32_t word[4];
        for (int e = 0; e < E; e++) left[e] = e;
        for (int j = 0; j < K; j++, count--) {
            moe__counter(word, 6u << 16 | 5u << 24, (uint32_t)(j / 4), (uint32_t)key[t],
                         (uint32_t)((uint64_t)key[t] >> 32));
            moe__philox(r.g.seed, word, word);
            int at = (int)((uint64_t)word[j % 4] * (uint64_t)count >> 32);
            ck_assert_int_eq(r.v.expert_of_entry[t * K + j], left[at]);
            memmove(left + at, left + at + 1, (size_t)(count - at - 1) * sizeof *left);
        }
    }
    routing_end(&r);
}
END_TEST

START_TEST(test_hash_weights_come_from_logits_if_there_are_any)
{
    enum { T = 5, E = 6, K = 2 };
    const int64_t key[T] = {1, 2, 3, 4, 5};
    routing r;
    routing_begin(&r, MOE_GATE_HASH, T, E, K);
    r.g.order = MOE_ORDER_SCORE_THEN_SELECT;
    r.f.token_key = key;
    route(&r);
    for (int64_t n = 0; n < T * K; n++)
        ck_assert_double_eq_tol(weight_at(&r, n), score_at(&r, n / K, r.v.expert_of_entry[n]),
                                TOLERANCE(1e-14));
    r.f.token_key = NULL;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_forward(r.gate, r.pass, &r.f));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "token_key"));
    routing_end(&r);
}
END_TEST

/* ---- experts that take tokens ---------------------------------------------------------------- */

/* Whether (value, token) a is among the C first of expert e in tokens [first, last). */
static int among_best(const routing *r, int64_t t, int64_t e, int64_t first, int64_t last,
                      int64_t C, const uint8_t *mask, int64_t *rank)
{
    double own = score_at(r, t, e);
    *rank = 0;
    for (int64_t i = first; i < last; i++) {
        double other = score_at(r, i, e);
        if (i != t && (!mask || mask[i])) *rank += other > own || (other == own && i < t);
    }
    return *rank < C;
}

START_TEST(test_expert_choice_takes_the_best_tokens_of_each_group)
{
    enum { T = 24, E = 5, C = 3 };
    const int64_t begin[4] = {0, 10, 12, T};
    uint8_t mask[T];
    routing r;
    routing_begin(&r, MOE_GATE_EXPERT_CHOICE, T, E, 2);
    r.g.capacity_kind = MOE_CAPACITY_NUMBER, r.g.capacity = C;
    for (int t = 0; t < T; t++) mask[t] = t % 5 != 1;
    for (int64_t t = 0; t < E; t++) r.logits[t] = r.logits[2 * E + t]; /* two equal tokens */
    r.f.groups = 3, r.f.group_begin = begin, r.f.token_mask = mask;
    route(&r);
    for (int g = 0; g < 3; g++)
        for (int64_t t = begin[g]; t < begin[g + 1]; t++)
            for (int64_t e = 0; e < E; e++) {
                int64_t rank, n = entry_at(&r, t, e);
                int best = mask[t] && among_best(&r, t, e, begin[g], begin[g + 1], C, mask, &rank);
                ck_assert_msg((n >= 0) == best, "token %d expert %d", (int)t, (int)e);
                if (n < 0) continue;
                ck_assert_int_eq(r.v.slot_of_entry[n], rank);
                ck_assert_double_eq_tol(weight_at(&r, n), score_at(&r, t, e), TOLERANCE(1e-14));
            }
    ck_assert_int_eq(r.v.entries, E * (C + 1 + C)); /* the second group has one token that counts */
    ck_assert_int_eq(r.v.rows, r.v.entries);
    routing_end(&r);
}
END_TEST

/* In training every expert has exactly m tokens; then thresholds choose, and a token's weights are
 * its scores divided by their sum. */
START_TEST(test_balanced_gate_is_balanced)
{
    enum { T = 30, E = 6, M = 10 };
    double value = 0;
    scalar *threshold = calloc(2 * E, sizeof *threshold), *d_threshold = threshold + E;
    routing r;
    moe_binding b;
    moe_losses losses;
    moe_backward_args back;
    routing_begin(&r, MOE_GATE_BALANCED, T, E, 2);
    r.g.capacity_kind = MOE_CAPACITY_FACTOR, r.g.threshold_weight = 1; /* m = K T / E */
    r.g.parameters = MOE_PARAMETERS_BOUND;
    for (int e = 0; e < E; e++) threshold[e] = (scalar)(0.1 + 0.03 * e);
    MUST(moe_gate_create(&r.gate, r.context, &r.g));
    MUST(moe_pass_create_for_gate(&r.pass, r.gate, NULL));
    r.f.flags = MOE_FORWARD_TRAIN;
    REFUSED(MOE_ERROR_INVALID_STATE, moe_gate_forward(r.gate, r.pass, &r.f)); /* not bound */
    MUST(moe_binding_init(&b, sizeof b));
    b.data = threshold, b.grad = d_threshold, b.data_dtype = b.grad_dtype = REAL;
    MUST(moe_gate_bind(r.gate, moe_gate_parameter_find(r.gate, "threshold"), &b));
    route(&r);
    for (int e = 0; e < E; e++) ck_assert_int_eq(r.v.expert_begin[e + 1] - r.v.expert_begin[e], M);
    for (int t = 0; t < T; t++)
        for (int e = 0; e < E; e++) {
            int64_t rank;
            double p = score_at(&r, t, e);
            int taken = entry_at(&r, t, e) >= 0, above = p > (double)threshold[e];
            ck_assert_int_eq(taken, among_best(&r, t, e, 0, T, M, NULL, &rank));
            value += (above - taken) * (p - (double)threshold[e]);
            d_threshold[e] += (scalar)(above - taken); /* minus what the backward must add */
        }
    MUST(moe_losses_init(&losses, sizeof losses));
    MUST(moe_backward_args_init(&back, sizeof back));
    MUST(moe_pass_losses(r.pass, &losses));
    ck_assert_double_eq_tol(losses.value[MOE_LOSS_THRESHOLD], value, TOLERANCE(1e-12));
    MUST(moe_gate_backward(r.gate, r.pass, &back));
    for (int e = 0; e < E; e++)
        ck_assert_double_eq_tol((double)d_threshold[e], 0, TOLERANCE(1e-12));
    r.f.flags = 0;
    route(&r);
    for (int t = 0; t < T; t++) {
        double sum = 0, total = 0;
        for (int e = 0; e < E; e++) {
            int64_t n = entry_at(&r, t, e);
            ck_assert_int_eq(n >= 0, score_at(&r, t, e) > (double)threshold[e]);
            if (n >= 0) sum += score_at(&r, t, e), total += weight_at(&r, n);
        }
        for (int e = 0; e < E; e++)
            if (entry_at(&r, t, e) >= 0)
                ck_assert_double_eq_tol(weight_at(&r, entry_at(&r, t, e)), score_at(&r, t, e) / sum,
                                        TOLERANCE(1e-13));
        ck_assert(total == 0 || fabs(total - 1) < TOLERANCE(1e-13));
    }
    routing_end(&r);
    free(threshold);
}
END_TEST

/* Thresholds above every score leave no entry at all, below every score all of them. */
START_TEST(test_balanced_gate_has_any_number_of_entries)
{
    enum { T = 4, E = 3 };
    routing r;
    moe_parameter_record p;
    routing_begin(&r, MOE_GATE_BALANCED, T, E, 1);
    r.g.capacity_kind = MOE_CAPACITY_NUMBER, r.g.capacity = 1;
    route(&r); /* thresholds begin at 0 */
    ck_assert_int_eq(r.v.entries, T * E);
    MUST(moe_parameter_record_init(&p, sizeof p));
    MUST(moe_gate_parameter(r.gate, moe_gate_parameter_find(r.gate, "threshold"), &p));
    ck_assert_int_eq(p.kind, MOE_KIND_THRESHOLD);
    ck_assert_int_eq(p.trainable, 1);
    for (int e = 0; e < E; e++) ((scalar *)p.data)[e] = 1;
    route(&r);
    ck_assert_int_eq(r.v.entries, 0);
    ck_assert_int_eq(r.v.rows, 0);
    r.f.tokens = 0;
    route(&r);
    ck_assert_int_eq(r.v.tokens, 0);
    routing_end(&r);
}
END_TEST

/* ---- random choices -------------------------------------------------------------------------- */

/* The largest of logits plus Gumbel noise is e with probability softmax(logits)_e; weights do not
 * see the noise. */
START_TEST(test_gumbel_noise_chooses_as_often_as_the_softmax_says)
{
    enum { T = 40000, E = 4 };
    const double logits[E] = {0.5, -0.2, 1, -1.5};
    int64_t first[E] = {0}, second[E] = {0};
    routing r;
    routing_begin(&r, MOE_GATE_TOP_K, T, E, 2);
    r.g.order = MOE_ORDER_SCORE_THEN_SELECT;
    r.g.choice_noise = _i ? MOE_CHOICE_NOISE_GUMBEL_REST : MOE_CHOICE_NOISE_GUMBEL;
    for (int64_t i = 0; i < T * E; i++) r.logits[i] = (scalar)logits[i % E];
    r.f.flags = MOE_FORWARD_TRAIN;
    route(&r);
    for (int64_t t = 0; t < T; t++) {
        first[r.v.expert_of_entry[2 * t]]++, second[r.v.expert_of_entry[2 * t + 1]]++;
        for (int64_t n = 2 * t; n < 2 * t + 2; n++)
            ck_assert_double_eq_tol(weight_at(&r, n), score_at(&r, 0, r.v.expert_of_entry[n]),
                                    TOLERANCE(1e-14));
    }
    double rest = 1 - score_at(&r, 0, 2);
    for (int e = 0; e < E; e++) {
        double want = _i ? e == 2 : score_at(&r, 0, e);
        ck_assert_double_eq_tol((double)first[e] / T, want, 0.012);
        if (_i && e != 2)
            ck_assert_double_eq_tol((double)second[e] / T, score_at(&r, 0, e) / rest, 0.012);
    }
    r.f.flags = 0; /* no noise */
    route(&r);
    for (int64_t t = 0; t < T; t++) ck_assert_int_eq(r.v.expert_of_entry[2 * t], 2);
    routing_end(&r);
}
END_TEST

/* ---- Sinkhorn -------------------------------------------------------------------------------- */

/* d0 = 1 / (T (c d1 + 1e-8)), d1 = 1 / (E (d0 c + 1e-8)) in turn until the mean change of d1 is
 * at most the tolerance; then the largest of c d1. */
START_TEST(test_sinkhorn_chooses_by_the_balanced_matrix)
{
    enum { T = 50, E = 5 };
    double c[T * E], d0[T], d1[E];
    int64_t balanced[E] = {0}, plain[E] = {0};
    routing r;
    routing_begin(&r, MOE_GATE_SINKHORN, T, E, 1);
    r.g.score = MOE_SCORE_SIGMOID;
    for (int64_t i = 0; i < T * E; i++) r.logits[i] += i % E == 3 ? 2 : 0; /* all want 3 */
    for (int i = 0; i < T * E; i++) c[i] = exp((double)r.logits[i]);
    for (int e = 0; e < E; e++) d1[e] = 1;
    for (int round = 0; round < 100; round++) {
        double change = 0;
        for (int t = 0; t < T; t++) {
            double sum = 0;
            for (int e = 0; e < E; e++) sum += c[t * E + e] * d1[e];
            d0[t] = 1 / (T * (sum + 1e-8));
        }
        for (int e = 0; e < E; e++) {
            double sum = 0;
            for (int t = 0; t < T; t++) sum += d0[t] * c[t * E + e];
            double next = 1 / (E * (sum + 1e-8));
            change += fabs(next - d1[e]);
            d1[e] = next;
        }
        if (change / E <= 1e-4) break;
    }
    r.f.flags = MOE_FORWARD_TRAIN;
    route(&r);
    for (int t = 0; t < T; t++) {
        int best = 0;
        for (int e = 1; e < E; e++)
            if (c[t * E + e] * d1[e] > c[t * E + best] * d1[best]) best = e;
        ck_assert_int_eq(r.v.expert_of_entry[t], best);
        ck_assert_double_eq_tol(weight_at(&r, t), 1 / (1 + exp(-(double)r.logits[t * E + best])),
                                TOLERANCE(1e-14));
        balanced[best]++;
    }
    r.f.flags = 0;
    route(&r);
    for (int t = 0; t < T; t++) plain[r.v.expert_of_entry[t]]++;
    ck_assert_int_gt(plain[3], 30);
    ck_assert_int_lt(balanced[3], 20);
    routing_end(&r);
}
END_TEST

/* ---- capacity -------------------------------------------------------------------------------- */

typedef struct rounding {
    int32_t rounding;
    double factor, eval_factor;
    int64_t K, minimum, multiple, want,
        want_eval; /* rows of an expert, of 22 tokens and 8 experts */
} rounding;

static const rounding ROUNDINGS[] = {
    {MOE_ROUND_UP, 1, 0, 2, 0, 0, 6, 6}, /* 5.5 */
    {MOE_ROUND_DOWN, 1, 0, 2, 0, 0, 5, 5},
    {MOE_ROUND_NEAREST, 1, 0, 2, 0, 0, 6, 6},
    {MOE_ROUND_NEAREST, 0.9, 0, 2, 0, 0, 5, 5},     /* 4.95 */
    {MOE_ROUND_PER_CHOICE, 1.25, 0, 2, 0, 0, 6, 6}, /* 2 floor(1.25 * 3) */
    {MOE_ROUND_TOKENS_UP, 1.2, 0, 2, 0, 0, 6, 6},   /* floor(2 ceil(26.4) / 8) */
    {MOE_ROUND_UP, 1, 2, 2, 0, 0, 6, 11},
    {MOE_ROUND_UP, 1, 0, 1, 4, 0, 4, 4}, /* 2.75 */
    {MOE_ROUND_UP, 1, 0, 1, 0, 8, 8, 8},
    {MOE_ROUND_UP, 0, 0, 2, 0, 0, 0, 0},
    {MOE_ROUND_UP, 100, 0, 1, 0, 64, 22, 22}, /* never more than there are */
};

START_TEST(test_capacity_is_rounded_as_asked)
{
    enum { T = 22, E = 8 };
    const rounding *want = &ROUNDINGS[_i];
    routing r;
    routing_begin(&r, MOE_GATE_TOP_K, T, E, want->K);
    r.g.capacity_kind = MOE_CAPACITY_FACTOR, r.g.capacity_rounding = want->rounding;
    r.g.capacity_factor = want->factor, r.g.capacity_factor_eval = want->eval_factor;
    r.g.capacity_minimum = want->minimum, r.g.capacity_multiple = want->multiple;
    for (int64_t t = 0; t < T; t++) r.logits[t * E + 2] = 9; /* all want 2 */
    r.f.flags = MOE_FORWARD_TRAIN;
    route(&r);
    ck_assert_int_eq(r.v.expert_begin[3] - r.v.expert_begin[2], want->want);
    r.f.flags = 0;
    route(&r);
    ck_assert_int_eq(r.v.expert_begin[3] - r.v.expert_begin[2], want->want_eval);
    routing_end(&r);
}
END_TEST

/* ---- selection bias -------------------------------------------------------------------------- */

START_TEST(test_selection_bias_moves_the_choice_and_not_the_weights)
{
    enum { T = 64, E = 4 };
    routing r;
    moe_tensor_view counts;
    moe_parameter_record p;
    routing_begin(&r, MOE_GATE_TOP_K, T, E, 1);
    r.g.score = MOE_SCORE_SIGMOID, r.g.selection_bias = 1;
    for (int64_t t = 0; t < T; t++) r.logits[t * E + 1] += 3;
    route(&r);
    MUST(moe_tensor_view_init(&counts, sizeof counts));
    MUST(moe_parameter_record_init(&p, sizeof p));
    MUST(moe_gate_parameter(r.gate, moe_gate_parameter_find(r.gate, "selection_bias"), &p));
    ck_assert_int_eq(p.kind, MOE_KIND_BUFFER);
    ck_assert_int_eq(p.trainable, 0);
    ck_assert_ptr_null(p.grad);
    MUST(moe_pass_tensor(r.pass, MOE_TENSOR_COUNTS, &counts));
    const int64_t *n = counts.data;
    ck_assert_int_gt(n[1], T / 2);
    MUST(moe_gate_update_selection_bias(r.gate, n, 0.001));
    for (int e = 0; e < E; e++)
        ck_assert(((const scalar *)p.data)[e] == (scalar)(n[e] < T / E   ? 0.001
                                                          : n[e] > T / E ? -0.001
                                                                         : 0));
    for (int step = 0; step < 600; step++) {
        route(&r);
        MUST(moe_pass_tensor(r.pass, MOE_TENSOR_COUNTS, &counts));
        MUST(moe_gate_update_selection_bias(r.gate, counts.data, 0.001));
    }
    n = counts.data;
    for (int e = 0; e < E; e++) ck_assert_int_lt(llabs(n[e] - T / E), 5);
    for (int64_t i = 0; i < T; i++) {
        double l = (double)r.logits[i * E + r.v.expert_of_entry[i]];
        ck_assert_double_eq_tol(weight_at(&r, i), 1 / (1 + exp(-l)), TOLERANCE(1e-14));
    }
    routing_end(&r);
}
END_TEST

START_TEST(test_selection_bias_calls_refuse)
{
    float *bias = calloc(6, sizeof *bias), *next = bias + 3;
    const int64_t counts[3] = {5, 1, 3}, negative[3] = {1, -1, 0}, huge[2] = {INT64_MAX, 1};
    moe_context *context = new_context();
    moe_gate *gate = NULL;
    moe_gate_config g;
    moe_binding b;
    ck_assert_ptr_nonnull(bias);
    for (int e = 0; e < 3; e++) bias[e] = (float)(e + 1), next[e] = 9;
    MUST(moe_selection_bias_step(next, bias, counts, 3, 0.5, MOE_DTYPE_F32));
    ck_assert(next[0] == 0.5f && next[1] == 2.5f && next[2] == 3); /* 3 is the mean */
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_selection_bias_step(NULL, bias, counts, 3, 1, 0));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_selection_bias_step(next, NULL, counts, 3, 1, 0));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_selection_bias_step(next, bias, NULL, 3, 1, 0));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_selection_bias_step(next, bias, counts, -1, 1, 0));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_selection_bias_step(next, bias, counts, 3, NAN, 0));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_selection_bias_step(next, bias, negative, 3, 1, 0));
    REFUSED(MOE_ERROR_OVERFLOW, moe_selection_bias_step(next, bias, huge, 2, 1, 0));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_selection_bias_step(next, bias, counts, 3, 1, 77));
    REFUSED(MOE_ERROR_NOT_SUPPORTED,
            moe_selection_bias_step(next, bias, counts, 3, 1, MOE_DTYPE_BF16));
    ck_assert(next[0] == 0.5f);
    MUST(moe_gate_config_init(&g, sizeof g));
    g.num_experts = 3;
    MUST(moe_gate_create(&gate, context, &g));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_gate_update_selection_bias(gate, counts, 1));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_update_selection_bias(NULL, counts, 1));
    moe_gate_destroy(gate);
    g.selection_bias = 1;
    MUST(moe_gate_create(&gate, context, &g));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_update_selection_bias(gate, NULL, 1));
    MUST(moe_binding_init(&b, sizeof b));
    b.data = bias, b.grad = next;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_bind(gate, 0, &b)); /* a buffer has none */
    b.grad = NULL;
    MUST(moe_gate_bind(gate, 0, &b));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_gate_update_selection_bias(gate, counts, 1));
    ck_assert(bias[0] == 1);
    moe_gate_destroy(gate), moe_context_destroy(context);
    free(bias);
}
END_TEST

/* ---- two levels ------------------------------------------------------------------------------ */

/* The primary plan, its tensors, and which plans a hierarchical gate replays. */
START_TEST(test_hierarchical_gate_shows_its_primary_routing)
{
    enum { T = 9, D = 5, A = 3, B = 4, KP = 2, KS = 2 };
    float x[T * D], rows = 0;
    moe_tensor_view v;
    moe_plan_view p;
    const moe_plan *plan, *primary;
    moe_plan *copy = NULL;
    routing r;
    uint64_t state = 5;
    routing_begin(&r, MOE_GATE_HIERARCHICAL, T, A * B, KS);
    r.g.d_model = D, r.g.expert_groups = A, r.g.top_groups = KP, r.g.dtype = MOE_DTYPE_F32;
    r.g.init_std = 1;
    for (int i = 0; i < T * D; i++) x[i] = (float)random_normal(&state);
    MUST(moe_gate_create(&r.gate, r.context, &r.g));
    MUST(moe_gate_init_parameters(r.gate, 3));
    MUST(moe_pass_create_for_gate(&r.pass, r.gate, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_forward(r.gate, r.pass, &r.f)); /* logits */
    r.f.logits_in = NULL, r.f.x = x, r.f.flags = MOE_FORWARD_TRAIN;
    route(&r);
    ck_assert_int_eq(r.v.entries, T * KP * KS);
    MUST(moe_pass_primary_plan(r.pass, &primary));
    MUST(moe_plan_check(primary));
    MUST(moe_plan_view_init(&p, sizeof p));
    MUST(moe_plan_get(primary, &p));
    ck_assert_int_eq(p.num_experts, A);
    for (int64_t n = 0; n < T * KP; n++) {
        float sum = 0;
        for (int j = 0; j < KS; j++) {
            int64_t e = r.v.expert_of_entry[n * KS + j];
            ck_assert_int_eq(e / B, p.expert_of_entry[n]);
            sum += ((const float *)r.v.weight_of_entry)[n * KS + j];
        }
        ck_assert_float_eq_tol(sum, ((const float *)p.weight_of_entry)[n], 1e-6f);
        rows += sum;
    }
    ck_assert_float_eq_tol(rows, T, 1e-4f);
    MUST(moe_tensor_view_init(&v, sizeof v));
    MUST(moe_pass_tensor(r.pass, MOE_TENSOR_LOGITS, &v));
    ck_assert_int_eq(v.shape[0], T * KP);
    ck_assert_int_eq(v.shape[1], B);
    MUST(moe_pass_tensor(r.pass, MOE_TENSOR_PRIMARY_LOAD, &v));
    ck_assert_int_eq(v.shape[0], A);
    MUST(moe_pass_plan(r.pass, &plan));
    MUST(moe_plan_create(&copy, r.context));
    MUST(moe_plan_copy(copy, plan));
    r.f.plan = copy, r.f.plan_use = MOE_PLAN_IDS;
    route(&r);
    REFUSED(MOE_ERROR_INVALID_STATE, moe_pass_primary_plan(r.pass, &primary));
    moe_plan_args a;
    MUST(moe_plan_args_init(&a, sizeof a));
    int32_t ids[T * KP * KS];
    memcpy(ids, r.v.expert_of_entry, sizeof ids);
    ids[5] = (ids[4] + B) % (A * B); /* of another group than its neighbour */
    a.tokens = T, a.num_experts = A * B, a.top_k = KP * KS, a.expert_ids = ids;
    MUST(moe_plan_build(copy, &a));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_forward(r.gate, r.pass, &r.f));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "group"));
    a.top_k = KS;
    MUST(moe_plan_build(copy, &a));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_forward(r.gate, r.pass, &r.f));
    r.f.plan = NULL, r.f.noise = x;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_forward(r.gate, r.pass, &r.f));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "noise_primary"));
    moe_plan_destroy(copy), routing_end(&r);
}
END_TEST

/* One group is the flat noisy gate, byte for byte: its primary weight is 1, its load that of the
 * flat gate. A group for each expert is that gate with the softmax one level up. */
START_TEST(test_hierarchical_gate_of_one_level_is_the_flat_one)
{
    enum { T = 15, D = 4, E = 6, K = 2 };
    double load[2][E];
    scalar x[T * D], weight[2][T * K];
    int32_t ids[2][T * K];
    uint64_t state = 2;
    for (int i = 0; i < T * D; i++) x[i] = (scalar)random_normal(&state);
    for (int two = 0; two < 2; two++) {
        routing r;
        moe_tensor_view v;
        moe_losses losses;
        routing_begin(&r, two ? MOE_GATE_HIERARCHICAL : MOE_GATE_NOISY_TOP_K, T, E, K);
        r.g.d_model = D, r.g.init_std = 1, r.g.load_weight = 1, r.g.seed = 4;
        MUST(moe_gate_create(&r.gate, r.context, &r.g));
        MUST(moe_gate_init_parameters(r.gate, 3));
        MUST(moe_pass_create_for_gate(&r.pass, r.gate, NULL));
        r.f.logits_in = NULL, r.f.x = x, r.f.flags = MOE_FORWARD_TRAIN;
        route(&r);
        MUST(moe_tensor_view_init(&v, sizeof v));
        MUST(moe_losses_init(&losses, sizeof losses));
        MUST(moe_pass_tensor(r.pass, MOE_TENSOR_LOAD, &v));
        MUST(moe_pass_losses(r.pass, &losses));
        ck_assert_double_gt(losses.value[MOE_LOSS_LOAD], 0);
        memcpy(load[two], v.data, sizeof load[two]);
        memcpy(weight[two], r.v.weight_of_entry, sizeof weight[two]);
        memcpy(ids[two], r.v.expert_of_entry, sizeof ids[two]);
        routing_end(&r);
    }
    ck_assert_mem_eq(ids[0], ids[1], sizeof ids[0]);
    ck_assert_mem_eq(weight[0], weight[1], sizeof weight[0]);
    for (int e = 0; e < E; e++) ck_assert_double_eq_tol(load[0][e], load[1][e], TOLERANCE(1e-13));
    routing r;
    routing_begin(&r, MOE_GATE_HIERARCHICAL, T, E, 1);
    r.g.d_model = D, r.g.init_std = 1, r.g.expert_groups = E, r.g.top_groups = K;
    MUST(moe_gate_create(&r.gate, r.context, &r.g));
    MUST(moe_gate_init_parameters(r.gate, 3));
    MUST(moe_pass_create_for_gate(&r.pass, r.gate, NULL));
    r.f.logits_in = NULL, r.f.x = x;
    route(&r);
    for (int64_t t = 0; t < T; t++)
        ck_assert_double_eq_tol(weight_at(&r, 2 * t) + weight_at(&r, 2 * t + 1), 1,
                                TOLERANCE(1e-14));
    routing_end(&r);
}
END_TEST

/* ---- jitter and splits ----------------------------------------------------------------------- */

/* logits = (x u) Wg with the documented u; tokens one by one give what the batch gives. */
START_TEST(test_jitter_multiplies_the_gates_input)
{
    enum { T = 7, D = 6, E = 3 };
    double low = 2, high = 0;
    scalar x[T * D];
    routing r;
    moe_tensor_view v;
    moe_parameter_record w;
    uint64_t state = 8;
    routing_begin(&r, MOE_GATE_TOP_K, T, E, 1);
    r.g.d_model = D, r.g.jitter = 0.25, r.g.seed = 11, r.g.stream_id = 2, r.g.init_std = 1;
    for (int i = 0; i < T * D; i++) x[i] = (scalar)random_normal(&state);
    MUST(moe_gate_create(&r.gate, r.context, &r.g));
    MUST(moe_gate_init_parameters(r.gate, 3));
    MUST(moe_pass_create_for_gate(&r.pass, r.gate, NULL));
    MUST(moe_tensor_view_init(&v, sizeof v));
    MUST(moe_parameter_record_init(&w, sizeof w));
    MUST(moe_gate_parameter(r.gate, 0, &w));
    r.f.logits_in = NULL, r.f.flags = MOE_FORWARD_TRAIN, r.f.step = 4;
    for (int t = 0; t < T; t++) {
        r.f.x = x + t * D, r.f.tokens = 1, r.f.token_first = 50 + t;
        route(&r);
        MUST(moe_pass_tensor(r.pass, MOE_TENSOR_LOGITS, &v));
        double want[E] = {0};
        for (int j = 0; j < D; j++) {
            uint32_t word[4];
            moe__counter(word, 2u << 16 | 3u << 24, 4, 50u + (uint32_t)t, (uint32_t)(j / 4));
            moe__philox(11, word, word);
            double u = 1 + 0.25 * (2 * (double)moe__uniform_f32(word[j % 4]) - 1);
            low = fmin(low, u), high = fmax(high, u);
            for (int e = 0; e < E; e++)
                want[e] += (double)x[t * D + j] * u * (double)((const scalar *)w.data)[j * E + e];
        }
        for (int e = 0; e < E; e++)
            ck_assert_double_eq_tol((double)((const scalar *)v.data)[e], want[e], TOLERANCE(1e-12));
    }
    ck_assert(low > 0.75 && low < 0.85 && high < 1.25 && high > 1.15);
    routing_end(&r);
}
END_TEST

/* With the host's logits nothing reads x, which need not be there. */
START_TEST(test_jitter_leaves_the_hosts_logits_alone)
{
    enum { T = 4, E = 3 };
    scalar d[T * E] = {0}, dx[T * 2];
    routing r;
    moe_backward_args b;
    routing_begin(&r, MOE_GATE_TOP_K, T, E, 2);
    r.g.d_model = 2, r.g.jitter = 0.5;
    r.f.flags = MOE_FORWARD_TRAIN;
    route(&r);
    MUST(moe_backward_args_init(&b, sizeof b));
    b.entry_weight_grad = d, b.dx = dx;
    memset(dx, 0xff, sizeof dx);
    MUST(moe_gate_backward(r.gate, r.pass, &b));
    for (int i = 0; i < T * 2; i++) ck_assert(dx[i] == 0);
    routing_end(&r);
}
END_TEST

/* ---- losses of each group -------------------------------------------------------------------- */

/* With MOE_LOSS_SCOPE_GROUP the losses are the mean of those of the groups by themselves. */
START_TEST(test_loss_scope_group_is_the_mean_over_groups)
{
    enum { T = 20, E = 4 };
    const int64_t begin[5] = {0, 6, 6, 15, T};
    double want[2] = {0}, batch[2];
    routing r;
    moe_losses losses;
    routing_begin(&r, MOE_GATE_TOP_K, T, E, 2);
    r.g.switch_weight = 2, r.g.gshard_weight = 3;
    MUST(moe_losses_init(&losses, sizeof losses));
    const scalar *all = r.logits;
    for (int g = 0; g < 4; g++) {
        r.f.tokens = begin[g + 1] - begin[g], r.f.logits_in = all + begin[g] * E;
        route(&r);
        MUST(moe_pass_losses(r.pass, &losses));
        want[0] += losses.value[MOE_LOSS_SWITCH] / 3; /* one group is empty */
        want[1] += losses.value[MOE_LOSS_GSHARD] / 3;
    }
    r.f.tokens = T, r.f.logits_in = all;
    route(&r);
    MUST(moe_pass_losses(r.pass, &losses));
    batch[0] = losses.value[MOE_LOSS_SWITCH], batch[1] = losses.value[MOE_LOSS_GSHARD];
    moe_pass_destroy(r.pass), moe_gate_destroy(r.gate);
    r.gate = NULL, r.pass = NULL;
    r.g.loss_scope = MOE_LOSS_SCOPE_GROUP, r.f.groups = 4, r.f.group_begin = begin;
    route(&r);
    MUST(moe_pass_losses(r.pass, &losses));
    ck_assert_double_eq_tol(losses.value[MOE_LOSS_SWITCH], want[0], TOLERANCE(1e-13));
    ck_assert_double_eq_tol(losses.value[MOE_LOSS_GSHARD], want[1], TOLERANCE(1e-13));
    ck_assert(fabs(batch[0] - want[0]) > 1e-6 && fabs(batch[1] - want[1]) > 1e-6);
    routing_end(&r);
}
END_TEST

/* ---- odd weights ----------------------------------------------------------------------------- */

/* Scores that sum to 0 renormalise to weights 0; a minimum is divided by instead of a smaller
 * sum. */
START_TEST(test_renormalising_nothing_gives_nothing)
{
    enum { T = 1, E = 3 };
    routing r;
    routing_begin(&r, MOE_GATE_TOP_K, T, E, 2);
    r.g.score = MOE_SCORE_SIGMOID, r.g.renormalize = 1;
    for (int e = 0; e < E; e++) r.logits[e] = -2000;
    route(&r);
    ck_assert_double_eq(weight_at(&r, 0), 0);
    ck_assert_double_eq(weight_at(&r, 1), 0);
    routing_end(&r);
    routing_begin(&r, MOE_GATE_TOP_K, T, E, 2);
    r.g.score = MOE_SCORE_SIGMOID, r.g.renormalize = 1, r.g.renormalize_minimum = 8;
    route(&r);
    double l = (double)r.logits[r.v.expert_of_entry[0]];
    ck_assert_double_eq_tol(weight_at(&r, 0), 1 / (1 + exp(-l)) / 8, TOLERANCE(1e-15));
    routing_end(&r);
}
END_TEST

/* ---- corners --------------------------------------------------------------------------------- */

/* Priorities are scores: a policy that asks for them is harmless without a limit, refused with
 * one. */
START_TEST(test_hash_without_logits_has_no_priorities)
{
    enum { T = 6, E = 4 };
    int64_t key[T] = {3, 1, 4, 1, 5, 9};
    routing r;
    routing_begin(&r, MOE_GATE_HASH, T, E, 2);
    r.g.drop_policy = MOE_DROP_BATCH_PRIORITY;
    r.f.token_key = key, r.f.logits_in = NULL;
    route(&r);
    ck_assert_int_eq(r.v.rows, T * 2);
    r.f.capacity = 1;
    ck_assert_int_eq(moe_gate_forward(r.gate, r.pass, &r.f), MOE_ERROR_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "MOE_GATE_HASH"));
    r.f.logits_in = r.logits;
    route(&r);
    ck_assert_int_le(r.v.rows, E);
    routing_end(&r);
}
END_TEST

/* Nothing is jittered where the logits are the host's: no x is needed, and dx gets nothing. */
START_TEST(test_jitter_lets_host_logits_be)
{
    enum { T = 5, D = 3, E = 4 };
    scalar x[T * D] = {0}, dx[T * D], grad[T * 2], d_logits[T * E];
    moe_backward_args b;
    routing r;
    routing_begin(&r, MOE_GATE_TOP_K, T, E, 2);
    r.g.d_model = D, r.g.jitter = 0.1;
    r.f.flags = MOE_FORWARD_TRAIN, r.f.step = -1; /* no numbers are drawn */
    route(&r);
    r.f.x = x;
    route(&r);
    MUST(moe_backward_args_init(&b, sizeof b));
    for (int i = 0; i < T * 2; i++) grad[i] = (scalar)i;
    for (int i = 0; i < T * D; i++) dx[i] = (scalar)(7 + i);
    b.entry_weight_grad = grad, b.dx = dx, b.d_logits_out = d_logits, b.flags = MOE_BACKWARD_ADD_DX;
    MUST(moe_gate_backward(r.gate, r.pass, &b));
    for (int i = 0; i < T * D; i++) ck_assert(dx[i] == (scalar)(7 + i));
    ck_assert(d_logits[r.v.expert_of_entry[0]] != 0);
    b.flags = 0;
    MUST(moe_gate_backward(r.gate, r.pass, &b));
    for (int i = 0; i < T * D; i++) ck_assert(dx[i] == 0);
    routing_end(&r);
}
END_TEST

/* The threshold loss of a routing of the host's does not depend on the order of its ids. */
START_TEST(test_threshold_loss_of_ids_in_any_order)
{
    enum { T = 2, E = 4 };
    const int32_t ids[2][T * 2] = {{0, 2, 1, 3}, {2, 0, 3, 1}};
    double loss[2];
    scalar gradient[2][T * E];
    moe_losses l;
    moe_plan *plan = NULL;
    moe_plan_args a;
    moe_backward_args b;
    routing r;
    routing_begin(&r, MOE_GATE_BALANCED, T, E, 2);
    r.g.capacity_kind = MOE_CAPACITY_FACTOR, r.g.threshold_weight = 1;
    r.f.flags = MOE_FORWARD_TRAIN;
    route(&r);
    MUST(moe_losses_init(&l, sizeof l));
    MUST(moe_backward_args_init(&b, sizeof b));
    MUST(moe_plan_args_init(&a, sizeof a));
    MUST(moe_plan_create(&plan, r.context));
    a.tokens = T, a.num_experts = E, a.top_k = 2, a.dtype = REAL;
    for (int i = 0; i < 2; i++) {
        a.expert_ids = ids[i], r.f.plan = plan, r.f.plan_use = MOE_PLAN_IDS;
        MUST(moe_plan_build(plan, &a));
        route(&r);
        MUST(moe_pass_losses(r.pass, &l));
        loss[i] = l.value[MOE_LOSS_THRESHOLD], b.d_logits_out = gradient[i];
        MUST(moe_gate_backward(r.gate, r.pass, &b));
    }
    double expected = 0; /* the thresholds are 0: all experts are above */
    for (int t = 0; t < T; t++)
        for (int e = 0; e < E; e++) expected += entry_at(&r, t, e) < 0 ? score_at(&r, t, e) : 0;
    ck_assert_double_eq_tol(loss[0], expected, TOLERANCE(1e-14));
    ck_assert_double_eq(loss[1], loss[0]);
    for (int i = 0; i < T * E; i++) ck_assert(gradient[1][i] == gradient[0][i]);
    moe_plan_destroy(plan);
    routing_end(&r);
}
END_TEST

/* A routing is replayed as it is even where the gate would now give a group the weight 0. */
START_TEST(test_hierarchical_replay_keeps_a_group_whose_weight_vanished)
{
    enum { T = 3, A = 4, B = 2, K = 2 };
    scalar x[T] = {1, 1, 1}, dx[T], grad[T * 4];
    int32_t ids[T * 4];
    moe_parameter_record p;
    moe_plan *plan = NULL;
    const moe_plan *routed;
    moe_backward_args b;
    routing r;
    routing_begin(&r, MOE_GATE_HIERARCHICAL, T, A * B, K);
    r.g.d_model = 1, r.g.expert_groups = A, r.g.top_groups = 2, r.g.importance_weight = 1;
    r.f.logits_in = NULL, r.f.x = x;
    route(&r);
    memcpy(ids, r.v.expert_of_entry, sizeof ids);
    MUST(moe_plan_create(&plan, r.context));
    MUST(moe_pass_plan(r.pass, &routed));
    MUST(moe_plan_copy(plan, routed));
    MUST(moe_parameter_record_init(&p, sizeof p));
    MUST(moe_gate_parameter(r.gate, moe_gate_parameter_find(r.gate, "primary_weight"), &p));
    for (int i = 0; i < A; i++) ((scalar *)p.data)[i] = (scalar)(5000 * i);
    r.f.plan = plan, r.f.plan_use = MOE_PLAN_IDS;
    route(&r); /* checks the plan */
    ck_assert_mem_eq(ids, r.v.expert_of_entry, sizeof ids);
    ck_assert_int_eq(r.v.rows, T * 4);
    for (int t = 0; t < T; t++) { /* groups 0 and 1 */
        ck_assert_double_eq(weight_at(&r, t * 4), 0);
        ck_assert_double_eq(weight_at(&r, t * 4 + 1), 0);
        ck_assert_double_eq(weight_at(&r, t * 4 + 2) + weight_at(&r, t * 4 + 3), 1);
    }
    MUST(moe_backward_args_init(&b, sizeof b));
    for (int i = 0; i < T * 4; i++) grad[i] = (scalar)i;
    b.entry_weight_grad = grad, b.dx = dx;
    MUST(moe_gate_backward(r.gate, r.pass, &b));
    for (int t = 0; t < T; t++) ck_assert(isfinite(dx[t]));
    moe_plan_destroy(plan);
    routing_end(&r);
}
END_TEST

/* With one expert in each group the primary routing has the shape of a plan of the gate; its memory
 * is the pass's, which the forward is about to use. */
START_TEST(test_own_primary_routing_is_not_replayed)
{
    enum { T = 9, E = 4 };
    scalar x[T];
    const moe_plan *primary;
    moe_plan *copy = NULL;
    routing r;
    routing_begin(&r, MOE_GATE_HIERARCHICAL, T, E, 1);
    r.g.d_model = 1, r.g.expert_groups = E, r.g.top_groups = 2;
    for (int t = 0; t < T; t++) x[t] = (scalar)t;
    r.f.logits_in = NULL, r.f.x = x, r.f.flags = MOE_FORWARD_NO_SAVE;
    route(&r);
    MUST(moe_pass_primary_plan(r.pass, &primary));
    MUST(moe_plan_create(&copy, r.context));
    MUST(moe_plan_copy(copy, primary));
    r.f.plan = primary, r.f.plan_use = MOE_PLAN_IDS, r.f.flags = MOE_FORWARD_TRAIN;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_forward(r.gate, r.pass, &r.f));
    MUST(moe_plan_check(primary)); /* the pass is as it was */
    r.f.plan = copy;
    route(&r);
    ck_assert_int_eq(r.v.entries, T * 2);
    moe_plan_destroy(copy);
    routing_end(&r);
}
END_TEST

/* What a threshold gate needs is known when it has counted. Without the memory the pass is failed;
 * a smaller batch then goes through. */
START_TEST(test_thresholds_in_a_workspace_that_is_too_small)
{
    enum { T = 64, E = 8 };
    moe_context_config c;
    moe_cost_query q;
    moe_cost cost;
    moe_pass_config p;
    moe_backward_args b;
    const moe_plan *plan;
    routing r;
    routing_begin(&r, MOE_GATE_BALANCED, T, E, 1);
    r.g.capacity_kind = MOE_CAPACITY_FACTOR, r.g.d_model = 1;
    MUST(moe_cost_query_init(&q, sizeof q));
    MUST(moe_cost_init(&cost, sizeof cost));
    MUST(moe_pass_config_init(&p, sizeof p));
    MUST(moe_backward_args_init(&b, sizeof b));
    q.gate = &r.g, q.tokens = T, q.threads = 1;
    if (ON_DEVICE) q.context = r.context;
    MUST(moe_layer_memory(&q, &cost));
    p.workspace_bytes = cost.pass_bytes - T,
    p.workspace = aligned_alloc(64, (size_t)cost.pass_bytes);
    ck_assert_ptr_nonnull(p.workspace);
    moe_context_destroy(r.context), r.context = NULL;
    MUST(moe_context_config_init(&c, sizeof c));
    c.threads = 1;
    MUST(moe_context_create(&r.context, &c));
    MUST(moe_gate_create(&r.gate, r.context, &r.g));
    MUST(moe_pass_create_for_gate(&r.pass, r.gate, &p));
    ck_assert_int_eq(moe_gate_forward(r.gate, r.pass, &r.f), MOE_ERROR_BUFFER_TOO_SMALL);
    ck_assert_int_eq(moe_pass_plan(r.pass, &plan), MOE_ERROR_INVALID_STATE);
    ck_assert_int_eq(moe_gate_backward(r.gate, r.pass, &b), MOE_ERROR_INVALID_STATE);
    r.f.tokens = T / 2;
    route(&r); /* thresholds are 0: all experts */
    ck_assert_int_eq(r.v.entries, T / 2 * E);
    MUST(moe_gate_backward(r.gate, r.pass, &b));
    moe_pass_destroy(r.pass), r.pass = NULL;
    p.workspace_bytes = cost.pass_bytes, r.f.tokens = T;
    MUST(moe_pass_create_for_gate(&r.pass, r.gate, &p));
    route(&r);
    ck_assert_int_eq(moe_pass_bytes(r.pass), cost.pass_bytes);
    routing_end(&r);
    free(p.workspace);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("gate kinds");
    TCase *c = tcase_create("kinds");
    tcase_set_timeout(c, 60);
    tcase_add_test(c, test_hash_experts_depend_on_seed_and_key_alone);
    tcase_add_test(c, test_hash_is_the_documented_function);
    tcase_add_test(c, test_hash_weights_come_from_logits_if_there_are_any);
    tcase_add_test(c, test_expert_choice_takes_the_best_tokens_of_each_group);
    tcase_add_test(c, test_balanced_gate_is_balanced);
    tcase_add_test(c, test_balanced_gate_has_any_number_of_entries);
    tcase_add_loop_test(c, test_gumbel_noise_chooses_as_often_as_the_softmax_says, 0, 2);
    tcase_add_test(c, test_sinkhorn_chooses_by_the_balanced_matrix);
    tcase_add_loop_test(c, test_capacity_is_rounded_as_asked, 0, COUNT(ROUNDINGS));
    tcase_add_test(c, test_selection_bias_moves_the_choice_and_not_the_weights);
    tcase_add_test(c, test_selection_bias_calls_refuse);
    tcase_add_test(c, test_hierarchical_gate_shows_its_primary_routing);
    tcase_add_test(c, test_hierarchical_gate_of_one_level_is_the_flat_one);
    tcase_add_test(c, test_jitter_multiplies_the_gates_input);
    tcase_add_test(c, test_jitter_leaves_the_hosts_logits_alone);
    tcase_add_test(c, test_loss_scope_group_is_the_mean_over_groups);
    tcase_add_test(c, test_renormalising_nothing_gives_nothing);
    tcase_add_test(c, test_hash_without_logits_has_no_priorities);
    tcase_add_test(c, test_jitter_lets_host_logits_be);
    tcase_add_test(c, test_threshold_loss_of_ids_in_any_order);
    tcase_add_test(c, test_hierarchical_replay_keeps_a_group_whose_weight_vanished);
    tcase_add_test(c, test_own_primary_routing_is_not_replayed);
    tcase_add_test(c, test_thresholds_in_a_workspace_that_is_too_small);
    suite_add_tcase(suite, c);
    return run_suite(suite, 1);
}
