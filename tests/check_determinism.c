/* check_determinism.c - the same bytes for any number of threads, any instruction set, the host's
 * own parallel-for in any order, any floating-point environment of the caller, and any split of a
 * batch.
 *
 * Sizes give at least 8 tiles a product and are no multiple of a tile. */
#include "support/layer_cases.h"
#include "support/suite.h"

#include <check.h>
#include <fenv.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

static layer_case big_case(void)
{
    layer_case c = {.name = "determinism",
                    .T = 1201,
                    .D = 300,
                    .E = 8,
                    .F = 520,
                    .K = 2,
                    .kind = MOE_GATE_NOISY_TOP_K,
                    .activation = MOE_ACTIVATION_GEGLU_TANH,
                    .expert_bias = 1,
                    .groups = 3,
                    .weight = {0.1, 0.1, 0.1, 0.1, 0.01, 0.1}};
    if (getenv("MOE_SANITIZED"))
        c.T = 301, c.D = 70, c.F = 90; /* still several tiles, in a tenth of the time */
    return c;
}

/* Everything a training step leaves, as one number. */
static uint64_t step_hash(const layer_case *c, int32_t dtype, const moe_context_config *config)
{
    layer_run r;
    layer_run_make(&r, c, dtype, config);
    r.f.noise = r.f.noise_primary = NULL; /* the library's own */
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    moe_losses losses;
    ck_assert_int_eq(moe_losses_init(&losses, sizeof losses), MOE_OK);
    ck_assert_int_eq(moe_pass_losses(r.pass, &losses), MOE_OK);
    uint64_t hash = layer_run_hash(&r);
    for (size_t b = 0; b < sizeof losses; b++)
        hash = (hash ^ ((const unsigned char *)&losses)[b]) * 0x100000001b3u;
    layer_run_free(&r);
    return hash;
}

static moe_context_config with(int32_t threads, int32_t isa)
{
    moe_context_config k;
    ck_assert_int_eq(moe_context_config_init(&k, sizeof k), MOE_OK);
    k.threads = threads;
    k.isa = isa;
    return k;
}

START_TEST(test_determinism_over_threads_and_instruction_sets)
{
    static const int32_t threads[] = {1, 2, 3, 7};
    layer_case c = big_case();
    int32_t dtype = _i;
    if (_i) c.T = c.T / 3, c.D = 77, c.F = 101;
    layer_case_make(&c, 1);
    moe_context_config k = with(1, MOE_ISA_AUTO);
    uint64_t want = step_hash(&c, dtype, &k);
    for (size_t t = 0; t < sizeof threads / sizeof *threads; t++)
        for (int32_t isa = MOE_ISA_PLAIN; isa <= MOE_ISA_AVX512; isa++) {
            moe_context *probe;
            k = with(threads[t], isa);
            c.packed = threads[t] == 3; /* a packed copy of the weights changes nothing either */
            if (isa == MOE_ISA_PLAIN && threads[t] != 2) continue; /* slow without the hardware */
            if (moe_context_create(&probe, &k) == MOE_ERROR_NOT_SUPPORTED) continue;
            moe_context_destroy(probe);
            ck_assert_msg(step_hash(&c, dtype, &k) == want, "%d threads, isa %d", (int)threads[t],
                          (int)isa);
        }
    layer_case_free(&c);
}
END_TEST

/* Every configuration of the table, ten times as many tokens: each step has several tasks. Under a
 * sanitizer the element types take turns, and AUTO, which is one of the others, is left out. */
START_TEST(test_determinism_of_every_configuration)
{
    layer_case c = layer_cases[_i];
    if (c.T > 3) c.T *= 10;
    if (c.capacity > 0) c.capacity *= 8;
    int32_t first = getenv("MOE_SANITIZED") ? MOE_ISA_PLAIN : MOE_ISA_AUTO;
    layer_case_make(&c, 7);
    for (int32_t dtype = MOE_DTYPE_F32; dtype <= MOE_DTYPE_F16; dtype++) {
        if (getenv("MOE_SANITIZED") && dtype != _i % 4) continue;
        moe_context_config k = with(1, MOE_ISA_PLAIN);
        uint64_t want = step_hash(&c, dtype, &k);
        for (int32_t isa = first; isa <= MOE_ISA_AVX512; isa++) {
            moe_context *probe;
            k = with(2 + isa, isa);
            if (moe_context_create(&probe, &k) == MOE_ERROR_NOT_SUPPORTED) continue;
            moe_context_destroy(probe);
            ck_assert_msg(step_hash(&c, dtype, &k) == want, "%s: isa %d, dtype %d", c.name,
                          (int)isa, (int)dtype);
        }
        if (getenv("MOE_VERBOSE")) /* for tests/neon */
            printf("step %s %d %016llx\n", c.name, (int)dtype, (unsigned long long)want);
    }
    layer_case_free(&c);
}
END_TEST

/* ---- the host's parallel-for ----------------------------------------------------------------- */

enum { HOST_THREADS = 7, MOST_TASKS = 64 };

typedef struct host_loop {
    moe_task_fn task;
    void *argument;
    int64_t order[MOST_TASKS];
    int64_t count;
    _Atomic int64_t next;
} host_loop;

static void *host_thread(void *argument)
{
    host_loop *loop = argument;
    for (;;) {
        int64_t at = loop->next++;
        if (at >= loop->count) return NULL;
        loop->task(loop->argument, loop->order[at]);
    }
}

/* The last task first, all on the calling thread. */
static int32_t reversed_parallel(void *user, int64_t count, moe_task_fn task, void *argument)
{
    (void)user;
    for (int64_t i = count - 1; i >= 0; i--) task(argument, i);
    return 0;
}

static int32_t shuffled_parallel(void *user, int64_t count, moe_task_fn task, void *argument)
{
    uint64_t *state = user;
    pthread_t threads[HOST_THREADS];
    host_loop loop = {.task = task, .argument = argument, .count = count};
    if (count > MOST_TASKS) return 1;
    for (int64_t i = 0; i < count; i++) loop.order[i] = i;
    for (int64_t i = count - 1; i > 0; i--) {
        int64_t j = (int64_t)(random_uniform(state) * (double)(i + 1)), swap = loop.order[i];
        loop.order[i] = loop.order[j];
        loop.order[j] = swap;
    }
    for (int i = 0; i < HOST_THREADS; i++)
        if (pthread_create(&threads[i], NULL, host_thread, &loop) != 0) return 2;
    for (int i = 0; i < HOST_THREADS; i++) (void)pthread_join(threads[i], NULL);
    return 0;
}

START_TEST(test_determinism_with_the_hosts_loop_in_any_order)
{
    layer_case c = big_case();
    uint64_t state = 11;
    layer_case_make(&c, 2);
    moe_context_config k = with(2, MOE_ISA_AUTO);
    uint64_t want = step_hash(&c, MOE_DTYPE_F32, &k);
    k = with(HOST_THREADS, MOE_ISA_AUTO);
    k.parallel = shuffled_parallel;
    k.parallel_user = &state;
    for (int turn = 0; turn < 3; turn++) ck_assert_uint_eq(step_hash(&c, MOE_DTYPE_F32, &k), want);
    k.parallel = reversed_parallel;
    ck_assert_uint_eq(step_hash(&c, MOE_DTYPE_F32, &k), want);
    layer_case_free(&c);
}
END_TEST

/* ---- the caller's floating-point environment ------------------------------------------------- */

START_TEST(test_determinism_whatever_the_callers_rounding_and_flushing)
{
    layer_case c = big_case();
    layer_run r;
    fenv_t before;
    c.T = 101, c.spread = 1e-18; /* squares are denormal: flushing would show */
    layer_case_make(&c, 3);
    moe_context_config k = with(2, MOE_ISA_AUTO);
    uint64_t want = step_hash(&c, MOE_DTYPE_F32, &k), got;
    layer_run_make(&r, &c, MOE_DTYPE_F32, &k);
    r.f.noise = NULL;
    (void)fegetenv(&before);
    (void)fesetround(FE_UPWARD);
#if defined(__x86_64__)
    unsigned flushing = _mm_getcsr() | 0x8040u;
    _mm_setcsr(flushing);
#endif
    moe_status forward = layer_run_forward(&r), backward = layer_run_backward(&r);
    int rounding = fegetround();
#if defined(__x86_64__)
    unsigned after = _mm_getcsr() & ~0x3fu; /* without the sticky flags */
    _mm_setcsr(flushing & ~0x3fu);
    int kept = after == (flushing & ~0x3fu);
#else
    int kept = 1;
#endif
    (void)fesetenv(&before);
    ck_assert_int_eq(forward, MOE_OK);
    ck_assert_int_eq(backward, MOE_OK);
    ck_assert_msg(kept, "the caller's flush-to-zero was not put back");
    ck_assert_int_eq(rounding, FE_UPWARD);
    layer_run_free(&r);
    (void)fesetround(FE_UPWARD);
    got = step_hash(&c, MOE_DTYPE_F32, &k);
    (void)fesetenv(&before);
    ck_assert_uint_eq(got, want);
    layer_case_free(&c);
}
END_TEST

/* Initial parameters, CV^2 and the host's noise do not see the caller's rounding either. */
static uint64_t small_calls_hash(void)
{
    layer_case c = {.name = "small calls", .T = 1, .D = 33, .E = 4, .F = 17, .K = 2};
    layer_run r;
    const double v[5] = {0.1, 0.7, 1.3, 0.2, 1e-3};
    double cv, dv[5];
    float noise[4];
    uint64_t hash = 0xcbf29ce484222325u;
    layer_case_make(&c, 1);
    layer_run_make(&r, &c, MOE_DTYPE_F32, NULL);
    MUST(moe_layer_init_parameters(r.layer, 5));
    for (int64_t i = 0; i < moe_layer_parameter_count(r.layer); i++) {
        moe_parameter_record p;
        MUST(moe_parameter_record_init(&p, sizeof p));
        MUST(moe_layer_parameter(r.layer, i, &p));
        for (int64_t b = 0; b < p.element_count * 4; b++)
            hash = (hash ^ ((const unsigned char *)p.data)[b]) * 0x100000001b3u;
    }
    MUST(moe_cv_squared(&cv, dv, v, 5, 1, MOE_DTYPE_F64));
    MUST(moe_noise4(noise, 9, 1, 2, 3, 4, 5));
    for (size_t b = 0; b < sizeof dv; b++)
        hash = (hash ^ ((const unsigned char *)dv)[b]) * 0x100000001b3u;
    for (size_t b = 0; b < sizeof cv; b++)
        hash = (hash ^ ((const unsigned char *)&cv)[b]) * 0x100000001b3u;
    for (size_t b = 0; b < sizeof noise; b++)
        hash = (hash ^ ((const unsigned char *)noise)[b]) * 0x100000001b3u;
    layer_run_free(&r);
    layer_case_free(&c);
    return hash;
}

START_TEST(test_determinism_of_small_calls_whatever_the_callers_rounding)
{
    static const int modes[] = {FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
    uint64_t want = small_calls_hash();
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        (void)fesetround(modes[i]);
        uint64_t got = small_calls_hash();
        (void)fesetround(FE_TONEAREST);
        ck_assert_uint_eq(got, want);
    }
}
END_TEST

/* ---- batches --------------------------------------------------------------------------------- */

/* y and dx of tokens [first, first + count) computed as a batch of their own. */
static void run_piece(layer_run *whole, int64_t first, int64_t count)
{
    const layer_case *c = whole->c;
    layer_run piece = *whole;
    size_t element = whole->dtype == MOE_DTYPE_F64 ? 8 : 4;
    char *y = calloc((size_t)(count * c->p.O), element),
         *dx = calloc((size_t)(count * c->D), element);
    ck_assert(y && dx);
    piece.f.tokens = count;
    piece.f.token_first = first;
    piece.f.x = (char *)whole->x + (size_t)(first * c->D) * element;
    piece.f.y = y;
    piece.b.dy = (char *)whole->dy + (size_t)(first * c->p.O) * element;
    piece.b.dx = dx;
    piece.b.d_logits_out = piece.b.entry_weight_grad = NULL;
    ck_assert_msg(layer_run_forward(&piece) == MOE_OK, "%s", moe_last_error());
    ck_assert_msg(layer_run_backward(&piece) == MOE_OK, "%s", moe_last_error());
    ck_assert_msg(memcmp(y, (char *)whole->y + (size_t)(first * c->p.O) * element,
                         (size_t)(count * c->p.O) * element) == 0,
                  "y of tokens %lld to %lld", (long long)first, (long long)(first + count - 1));
    ck_assert_msg(memcmp(dx, (char *)whole->dx + (size_t)(first * c->D) * element,
                         (size_t)(count * c->D) * element) == 0,
                  "dx of tokens %lld to %lld", (long long)first, (long long)(first + count - 1));
    free(y);
    free(dx);
}

START_TEST(test_determinism_over_splits_of_the_batch)
{
    layer_case c = big_case();
    layer_run r;
    c.groups = 0;
    c.T = 257;
    memset(c.weight, 0, sizeof c.weight); /* losses see the batch */
    layer_case_make(&c, 4);
    layer_run_make(&r, &c, _i ? MOE_DTYPE_F64 : MOE_DTYPE_F32, NULL);
    r.f.noise = NULL;
    r.f.token_first = 0;
    ck_assert_msg(layer_run_forward(&r) == MOE_OK, "%s", moe_last_error());
    ck_assert_msg(layer_run_backward(&r) == MOE_OK, "%s", moe_last_error());
    run_piece(&r, 0, 128);
    run_piece(&r, 128, 129);
    for (int64_t t = 0; t < 40; t++) run_piece(&r, t * 6, 1 + t % 7);
    layer_run_free(&r);
    layer_case_free(&c);
}
END_TEST

/* Inference one token at a time gives what the batch gives, whatever else is in the batch. */
START_TEST(test_determinism_of_single_tokens_in_inference)
{
    layer_case c = big_case();
    layer_run r;
    c.T = 64, c.groups = 0, c.eval = 1, c.kind = MOE_GATE_TOP_K, c.order = 1, c.renormalize = 1;
    memset(c.weight, 0, sizeof c.weight);
    layer_case_make(&c, 5);
    moe_context_config k = with(3, MOE_ISA_AUTO);
    layer_run_make(&r, &c, _i ? MOE_DTYPE_F64 : MOE_DTYPE_F32, &k);
    size_t row = (size_t)c.D * number_bytes(r.dtype);
    r.f.flags = MOE_FORWARD_NO_SAVE;
    MUST(layer_run_forward(&r));
    char *y = malloc(row);
    ck_assert_ptr_nonnull(y);
    moe_forward_args f = r.f;
    for (int64_t t = 0; t < c.T; t++) {
        f.tokens = 1, f.x = (char *)r.x + (size_t)t * row, f.y = y;
        MUST(moe_layer_forward(r.layer, r.pass, &f));
        ck_assert_msg(memcmp(y, (char *)r.y + (size_t)t * row, row) == 0, "token %lld",
                      (long long)t);
    }
    free(y);
    layer_run_free(&r);
    layer_case_free(&c);
}
END_TEST

/* ---- threads of the host --------------------------------------------------------------------- */

/* Forwards of one layer at once, each with its own pass, from several threads. */
typedef struct one_forward {
    layer_run *run;
    moe_pass *pass;
    void *y;
    moe_status status;
} one_forward;

static void *forward_thread(void *argument)
{
    one_forward *f = argument;
    moe_forward_args args = f->run->f;
    args.y = f->y;
    for (int i = 0; i < 20 && f->status == MOE_OK; i++)
        f->status = moe_layer_forward(f->run->layer, f->pass, &args);
    return NULL;
}

START_TEST(test_layer_forwards_of_distinct_passes_run_at_once)
{
    layer_case c = {.name = "threads",
                    .D = 20,
                    .E = 5,
                    .F = 40,
                    .K = 2,
                    .kind = MOE_GATE_NOISY_TOP_K,
                    .weight = {0.1, 0.1, 0.1, 0.1, 0.01, 0.1}};
    layer_run r;
    one_forward f[4];
    pthread_t threads[4];
    c.T = 200;
    layer_case_make(&c, 9);
    layer_run_make(&r, &c, MOE_DTYPE_F32, NULL);
    MUST(layer_run_forward(&r));
    size_t bytes = (size_t)(c.T * c.D) * 4;
    for (int i = 0; i < 4; i++) {
        f[i] = (one_forward){.run = &r, .y = malloc(bytes)};
        ck_assert_ptr_nonnull(f[i].y);
        MUST(moe_pass_create(&f[i].pass, r.layer, NULL));
        ck_assert_int_eq(pthread_create(&threads[i], NULL, forward_thread, &f[i]), 0);
    }
    for (int i = 0; i < 4; i++) {
        ck_assert_int_eq(pthread_join(threads[i], NULL), 0);
        ck_assert_int_eq(f[i].status, MOE_OK);
        ck_assert_mem_eq(f[i].y, r.y, bytes);
        moe_pass_destroy(f[i].pass);
        free(f[i].y);
    }
    layer_run_free(&r);
    layer_case_free(&c);
}
END_TEST

/* A host's loop that reports failure at its n-th call: the pass is failed until its next forward,
 * and everything works again after it. */
typedef struct failing_loop {
    int calls, fail_at;
} failing_loop;

static int32_t failing_parallel(void *user, int64_t count, moe_task_fn task, void *argument)
{
    failing_loop *loop = user;
    if (++loop->calls == loop->fail_at) return 4711;
    for (int64_t i = 0; i < count; i++) task(argument, i);
    return 0;
}

START_TEST(test_layer_survives_every_failure_of_the_hosts_loop)
{
    layer_case c = {.name = "threads",
                    .D = 20,
                    .E = 5,
                    .F = 40,
                    .K = 2,
                    .kind = MOE_GATE_NOISY_TOP_K,
                    .weight = {0.1, 0.1, 0.1, 0.1, 0.01, 0.1}};
    layer_run r;
    failing_loop loop = {0, 0};
    moe_context_config k;
    int failed = 0, of_backward = 0;
    c.T = 300;
    MUST(moe_context_config_init(&k, sizeof k));
    k.parallel = failing_parallel, k.parallel_user = &loop, k.threads = 3;
    layer_case_make(&c, 9);
    layer_run_make(&r, &c, MOE_DTYPE_F32, &k);
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    uint64_t want = layer_run_hash(&r);
    for (int n = 1; n <= 10000; n++) {
        loop.calls = 0, loop.fail_at = n;
        moe_status forward = layer_run_forward(&r);
        moe_status backward = forward == MOE_OK ? layer_run_backward(&r) : MOE_OK;
        loop.fail_at = 0;
        if (forward == MOE_OK && backward == MOE_OK) break;
        ck_assert_int_eq(forward == MOE_OK ? backward : forward, MOE_ERROR_CALLBACK);
        ck_assert_ptr_nonnull(strstr(moe_last_error(), "4711"));
        ck_assert_int_eq(layer_run_backward(&r), MOE_ERROR_INVALID_STATE);
        MUST(moe_layer_zero_gradients(r.layer, NULL));
        MUST(layer_run_forward(&r));
        MUST(layer_run_backward(&r));
        ck_assert_uint_eq(layer_run_hash(&r), want);
        failed++, of_backward += forward == MOE_OK;
    }
    ck_assert_int_gt(failed, 15);
    ck_assert_int_gt(of_backward, 5);
    layer_run_free(&r);
    layer_case_free(&c);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("determinism");
    TCase *tests = tcase_create("bytes");
    tcase_set_timeout(tests, 600);
    tcase_add_loop_test(tests, test_determinism_over_threads_and_instruction_sets, 0, 4);
    tcase_add_test(tests, test_determinism_with_the_hosts_loop_in_any_order);
    tcase_add_test(tests, test_determinism_whatever_the_callers_rounding_and_flushing);
    tcase_add_loop_test(tests, test_determinism_of_every_configuration, 0, LAYER_CASES);
    tcase_add_test(tests, test_determinism_of_small_calls_whatever_the_callers_rounding);
    tcase_add_loop_test(tests, test_determinism_of_single_tokens_in_inference, 0, 2);
    tcase_add_test(tests, test_layer_forwards_of_distinct_passes_run_at_once);
    tcase_add_test(tests, test_layer_survives_every_failure_of_the_hosts_loop);
    tcase_add_loop_test(tests, test_determinism_over_splits_of_the_batch, 0, 2);
    suite_add_tcase(suite, tests);
    return run_suite(suite, 1);
}
