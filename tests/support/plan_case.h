/* plan_case.h - routings of a host and what must come of them; shared by check_plan.c and
 * check_combine.c.
 *
 * The oracle is naive: an entry is kept if fewer than the capacity of kept entries before it share
 * its group and expert; a row's number is the count of kept entries that come before it in (expert,
 * entry). Sums are formed in the order and type the library promises, so every comparison is of
 * bytes. */
#ifndef PLAN_CASE_H
#define PLAN_CASE_H

#include <check.h>
#include <fenv.h>
#include <math.h>
#include <moe/moe.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"
#include "numeric.h"
#include "support/real.h"

#define OK(call)                                                               \
    do {                                                                       \
        moe_status ok_status = (call);                                         \
        ck_assert_msg(ok_status == MOE_OK, "%s: %s", #call, moe_last_error()); \
    } while (0)
#define FAILS(call, status) ck_assert_str_eq(moe_status_name(call), #status)

/* WIDE is double where there is one. */
enum {
    F32 = MOE_DTYPE_F32,
    F64 = MOE_DTYPE_F64,
    WIDE = REAL,
    I32 = MOE_DTYPE_I32,
    I64 = MOE_DTYPE_I64
};

/* ---- numbers of either type ------------------------------------------------------------------ */

static uint64_t seed;

static inline uint64_t draw(uint64_t below)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (seed >> 33) % below;
}
static inline size_t size_of(int32_t dtype)
{
    return dtype == F64 ? sizeof(double) : sizeof(float);
}
static inline double get(const void *a, int32_t dtype, int64_t i)
{
    return dtype == F64 ? ((const double *)a)[i] : (double)((const float *)a)[i];
}
static inline void set(void *a, int32_t dtype, int64_t i, double value)
{
    if (dtype == F64)
        ((double *)a)[i] = value;
    else
        ((float *)a)[i] = (float)value;
}
static inline double add(int32_t dtype, double a, double b)
{
    return dtype == F64 ? a + b : (double)((float)a + (float)b);
}
static inline double multiply(int32_t dtype, double a, double b)
{
    return dtype == F64 ? a * b : (double)((float)a * (float)b);
}
static inline double divide(int32_t dtype, double a, double b)
{
    return dtype == F64 ? a / b : (double)((float)a / (float)b);
}
static inline double multiply_add(int32_t dtype, double a, double b, double c)
{
    return dtype == F64 ? fma(a, b, c) : (double)fmaf((float)a, (float)b, (float)c);
}

/* n numbers in (-1, 1). */
static inline void *numbers(int32_t dtype, int64_t n)
{
    void *a = calloc((size_t)n + 1, sizeof(double));
    for (int64_t i = 0; i < n; i++) set(a, dtype, i, (double)draw(2000001) / 1000000 - 1);
    return a;
}

/* ---- a case: a routing of the host and what must come of it ---------------------------------- */

typedef struct plan_case {
    int64_t tokens, experts, least_k, most_k, groups; /* least_k == most_k: token_begin NULL */
    int64_t capacity;
    int32_t mask, renormalize, dtype, id_dtype, isa, threads;
} plan_case;

static const plan_case cases[] = {
    {0, 1, 0, 0, 0, -1, 0, 0, F32, I32, MOE_ISA_AUTO, 1},
    {0, 7, 2, 2, 3, 4, 0, 1, WIDE, I64, MOE_ISA_AUTO, 1},
    {1, 1, 1, 1, 0, -1, 0, 0, F32, I32, MOE_ISA_PLAIN, 1},
    {9, 1, 3, 3, 1, 5, 0, 1, WIDE, I32, MOE_ISA_AUTO, 2},
    {5, 3, 0, 0, 0, -1, 0, 0, F32, I32, MOE_ISA_AUTO, 1},
    {40, 5, 2, 2, 0, -1, 0, 0, F32, I32, MOE_ISA_AUTO, 1},
    {40, 5, 2, 2, 0, -1, 1, 0, F32, I64, MOE_ISA_AUTO, 3},
    {64, 8, 4, 4, 4, 5, 1, 1, F32, I32, MOE_ISA_PLAIN, 2},
    {64, 8, 4, 4, 4, 0, 0, 1, WIDE, I64, MOE_ISA_AUTO, 2},
    {100, 300, 0, 9, 7, 2, 1, 1, WIDE, I32, MOE_ISA_AUTO, 1},
    {100, 6, 0, 9, 30, 2, 1, 1, F32, I64, MOE_ISA_AUTO, 1},
    {3000, 11, 0, 4, 3, 150, 1, 1, F32, I32, MOE_ISA_AUTO, 4},
    {3000, 4096, 2, 2, 0, 1, 0, 0, WIDE, I32, MOE_ISA_PLAIN, 4},
};
enum { CASES = sizeof cases / sizeof cases[0] };

typedef struct routing {
    moe_plan_args args;
    int64_t entries, rows, *token_begin, *group_begin;
    int32_t *ids32;
    int64_t *ids64;
    uint8_t *mask;
    void *weights;
    /* what must come of it */
    void *weight;
    int64_t *row, *slot;
} routing;

static inline int64_t id_of(const routing *r, int64_t n) { return r->ids64[n]; }

static inline int64_t group_of(const routing *r, int64_t t)
{
    int64_t g = 0;
    while (r->args.group_begin && t >= r->group_begin[g + 1]) g++;
    return g;
}

/* Slots and weights, token by token. */
static inline void expect_slots(routing *r)
{
    int64_t *used = calloc((size_t)r->args.num_experts, sizeof *used), group = 0;
    for (int64_t t = 0; t < r->args.tokens; t++) {
        if (group_of(r, t) != group)
            memset(used, 0, (size_t)r->args.num_experts * sizeof *used), group = group_of(r, t);
        double sum = 0;
        for (int64_t n = r->token_begin[t]; n < r->token_begin[t + 1]; n++) {
            int kept = id_of(r, n) >= 0 && (!r->args.token_mask || r->mask[t]) &&
                       (r->args.capacity < 0 || used[id_of(r, n)] < r->args.capacity);
            r->slot[n] = kept ? used[id_of(r, n)]++ : -1;
            if (kept) sum = add(r->args.dtype, sum, get(r->weights, r->args.dtype, n));
        }
        for (int64_t n = r->token_begin[t]; n < r->token_begin[t + 1]; n++) {
            double w = get(r->weights, r->args.dtype, n);
            if (r->args.renormalize_after_drop) w = sum == 0 ? 0 : divide(r->args.dtype, w, sum);
            set(r->weight, r->args.dtype, n, r->slot[n] < 0 ? 0 : w);
        }
    }
    free(used);
}

static inline void expect(routing *r)
{
    int64_t *first = calloc((size_t)r->args.num_experts + 1, sizeof *first);
    expect_slots(r);
    for (int64_t n = 0; n < r->entries; n++)
        if (r->slot[n] >= 0) first[id_of(r, n) + 1]++, r->rows++;
    for (int64_t e = 0; e < r->args.num_experts; e++) first[e + 1] += first[e];
    for (int64_t n = 0; n < r->entries; n++) r->row[n] = r->slot[n] < 0 ? -1 : first[id_of(r, n)]++;
    free(first);
}

static inline void *words(int64_t n) { return calloc((size_t)n + 1, sizeof(int64_t)); }

/* Ids of -1 among the others, duplicates, masked tokens, groups without tokens. */
static inline routing *make_routing(const plan_case *c, uint64_t number)
{
    routing *r = calloc(1, sizeof *r);
    seed = number * 977 + 1;
    OK(moe_plan_args_init(&r->args, sizeof r->args));
    r->token_begin = words(c->tokens + 1);
    for (int64_t t = 0; t < c->tokens; t++)
        r->token_begin[t + 1] = r->token_begin[t] + c->least_k +
                                (int64_t)draw((uint64_t)(c->most_k - c->least_k + 1));
    r->entries = r->token_begin[c->tokens];
    r->ids32 = words(r->entries), r->ids64 = words(r->entries);
    r->row = words(r->entries), r->slot = words(r->entries), r->weight = words(r->entries);
    r->weights = numbers(c->dtype, r->entries);
    r->mask = calloc((size_t)c->tokens + 1, 1);
    r->group_begin = words(c->groups + 1);
    for (int64_t n = 0; n < r->entries; n++)
        r->ids32[n] = (int32_t)(r->ids64[n] = (int64_t)draw((uint64_t)c->experts + 1) - 1);
    for (int64_t t = 0; t < c->tokens; t++) r->mask[t] = (uint8_t)(draw(4) * 85);
    for (int64_t g = 1; g < c->groups; g++)
        r->group_begin[g] = r->group_begin[g - 1] +
                            (int64_t)draw((uint64_t)(c->tokens - r->group_begin[g - 1]) / 2 + 1);
    r->group_begin[c->groups] = c->groups ? c->tokens : 0;
    r->args.tokens = c->tokens, r->args.num_experts = c->experts, r->args.top_k = c->least_k;
    r->args.token_begin = c->least_k == c->most_k ? NULL : r->token_begin;
    r->args.id_dtype = c->id_dtype, r->args.dtype = c->dtype;
    r->args.expert_ids = c->id_dtype == I64 ? (void *)r->ids64 : (void *)r->ids32;
    r->args.weights = r->weights;
    r->args.token_mask = c->mask ? r->mask : NULL;
    r->args.groups = c->groups, r->args.group_begin = c->groups ? r->group_begin : NULL;
    r->args.capacity = c->capacity, r->args.renormalize_after_drop = c->renormalize;
    expect(r);
    return r;
}

static inline void free_routing(routing *r)
{
    void *all[] = {r->token_begin, r->group_begin, r->ids32, r->ids64, r->mask,
                   r->weights,     r->weight,      r->row,   r->slot,  r};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
}

static inline moe_context *make_context(int32_t threads, int32_t isa)
{
    moe_context *context;
    moe_context_config config;
    OK(moe_context_config_init(&config, sizeof config));
    config.threads = threads, config.isa = isa;
    OK(moe_context_create(&context, &config));
    return context;
}

static inline moe_plan *make_plan(const plan_case *c, const routing *r)
{
    moe_plan *plan;
    moe_context *context = make_context(c->threads, c->isa);
    OK(moe_plan_create(&plan, context));
    moe_context_destroy(context); /* the plan holds its own reference */
    OK(moe_plan_build(plan, &r->args));
    return plan;
}

static inline moe_plan_view view_of(const moe_plan *plan)
{
    moe_plan_view view;
    OK(moe_plan_view_init(&view, sizeof view));
    OK(moe_plan_get(plan, &view));
    return view;
}

static inline int64_t *saved(const moe_plan *plan, int64_t *size)
{
    FAILS(moe_plan_save(plan, NULL, 0, size), MOE_ERROR_BUFFER_TOO_SMALL);
    int64_t *bytes = calloc(1, (size_t)*size);
    OK(moe_plan_save(plan, bytes, *size, size));
    return bytes;
}

static inline void same_bytes(const void *a, const void *b, size_t bytes, const char *what)
{
    for (size_t i = 0; i < bytes; i++)
        if (((const char *)a)[i] != ((const char *)b)[i])
            ck_abort_msg("%s: byte %zu of %zu differs", what, i, bytes);
}

static inline void same_plan(const moe_plan *a, const moe_plan *b)
{
    int64_t size_a, size_b;
    void *bytes_a = saved(a, &size_a), *bytes_b = saved(b, &size_b);
    moe_plan_view v = view_of(a), w = view_of(b);
    ck_assert_int_eq(size_a, size_b);
    same_bytes(bytes_a, bytes_b, (size_t)size_a, "saved plan");
    same_bytes(v.expert_begin, w.expert_begin, (size_t)(v.num_experts + 1) * 8, "expert_begin");
    same_bytes(v.token_of_row, w.token_of_row, (size_t)v.rows * 8, "token_of_row");
    same_bytes(v.entry_of_row, w.entry_of_row, (size_t)v.rows * 8, "entry_of_row");
    free(bytes_a), free(bytes_b);
}

/* Three tokens: ids and weights as given, capacity 1 unless changed. */
typedef struct small {
    moe_plan *plan;
    moe_plan_args args;
    int32_t ids[6];
    float weights[6];
} small;

static inline small *make_small(void)
{
    static const int32_t ids[6] = {0, 1, 0, 2, 2, 2};
    static const float weights[6] = {0.5F, 0.5F, 0.75F, 0.25F, 0.5F, 1.5F};
    small *s = calloc(1, sizeof *s);
    moe_context *context = make_context(1, MOE_ISA_AUTO);
    OK(moe_plan_create(&s->plan, context));
    moe_context_destroy(context);
    memcpy(s->ids, ids, sizeof ids);
    memcpy(s->weights, weights, sizeof weights);
    OK(moe_plan_args_init(&s->args, sizeof s->args));
    s->args.tokens = 3, s->args.top_k = 2, s->args.num_experts = 3;
    s->args.expert_ids = s->ids, s->args.weights = s->weights;
    return s;
}

static inline void free_small(small *s)
{
    moe_plan_destroy(s->plan);
    free(s);
}

#endif
