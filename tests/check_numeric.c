/* check_numeric.c - numeric.h and philox.h: error in ulp against long double libm, special values,
 * known answers of Philox, the normal transform, and checksums of a fixed sweep of each function.
 * The checksums must hold for every compiler, optimisation level and vector width, so each sweep is
 * a loop that the compiler may vectorise. -DCHECK_STRIDE=61 -DCHECK_PRINT measures the errors that
 * numeric.h states (minutes). */
#include "support/suite.h"

#include <check.h>
#include <float.h>
#include <math.h>
#include <stdio.h>

#include "numeric.h"
#include "philox.h"

#ifndef CHECK_STRIDE
#define CHECK_STRIDE 8191
#endif

#define SWEEP(name)                                                   \
    static void sweep_##name##_f32(const float *x, float *y, int n)   \
    {                                                                 \
        for (int i = 0; i < n; i++) {                                 \
            y[i] = moe__##name##_f32(x[i]);                           \
        }                                                             \
    }                                                                 \
    static void sweep_##name##_f64(const double *x, double *y, int n) \
    {                                                                 \
        for (int i = 0; i < n; i++) {                                 \
            y[i] = moe__##name##_f64(x[i]);                           \
        }                                                             \
    }

SWEEP(exp)
SWEEP(log)
SWEEP(log1p_unit)
SWEEP(erf)
SWEEP(tanh)
SWEEP(softplus)
SWEEP(sigmoid)
SWEEP(normal_pdf)
SWEEP(normal_cdf)

static long double ref_softplus(long double z)
{
    return z > 0 ? z + log1pl(expl(-z)) : log1pl(expl(z));
}

static long double ref_sigmoid(long double z)
{
    long double t = expl(-fabsl(z));
    return (z < 0 ? t : 1) / (1 + t);
}

/* The square in two exact parts: z^2 = a^2 + (z - a)(z + a), a of 24 bits. */
static long double ref_normal_pdf(long double z)
{
    long double a = fabsl(z) < 100 ? (float)z : z, rest = fabsl(z) < 100 ? (z - a) * (z + a) : 0;
    return expl(-a * a / 2) * expl(-rest / 2) * 0.398942280401432677939946059934381868L;
}

static long double ref_normal_cdf(long double z)
{
    return erfcl(z * -0.707106781186547524400844362104849039L) / 2;
}

enum { EXP, LOG, LOG1P, ERF, TANH, SOFTPLUS, SIGMOID, PDF, CDF, FUNCTIONS };

#define ROW(name) #name, sweep_##name##_f32, sweep_##name##_f64

/* Samples are all bit patterns (whole = 1) and, uniformly, [lo32, hi32] or [lo64, hi64]. */
static const struct {
    const char *name;
    void (*f32)(const float *, float *, int);
    void (*f64)(const double *, double *, int);
    long double (*ref)(long double);
    int whole;
    float lo32, hi32;
    double lo64, hi64;
    double ulp32, ulp64;
    uint64_t sum32, sum64;
} table[FUNCTIONS] = {
    {ROW(exp), expl, 1, -105, 90, -750, 711, 2, 2, 0x5d043b01bbce6cb4u, 0xc6d1a20fbe9fe986u},
    {ROW(log), logl, 1, 0, 4, 0, 4, 2, 2, 0x5674258eee92920au, 0x251c88a53b0df291u},
    {ROW(log1p_unit), log1pl, 0, 0, 1, 0, 1, 2, 2, 0x4955414f42abdb88u, 0x0d61a831d58ee483u},
    {ROW(erf), erfl, 1, -4.5f, 4.5f, -6.5, 6.5, 2, 4, 0x11af95ff50cbce28u, 0x2bc2e00a82e1f993u},
    {ROW(tanh), tanhl, 1, -11, 11, -21, 21, 2, 4, 0x83dea127dea9a1edu, 0x372bb9efe6909ed8u},
    {ROW(softplus), ref_softplus, 1, -105, 20, -750, 40, 2, 4, 0xc58cdeb1363fc442u,
     0xa81caf53b6551454u},
    {ROW(sigmoid), ref_sigmoid, 1, -105, 20, -750, 40, 2, 4, 0x5ba1c1c46e7994b8u,
     0x64133ff277348fbeu},
    {ROW(normal_pdf), ref_normal_pdf, 1, -15, 15, -40, 40, 2, 4, 0xc7892944548501f5u,
     0x0580451bc30588abu},
    {ROW(normal_cdf), ref_normal_cdf, 1, -15, 7, -40, 9, 8, 16, 0x804d2a3d885258d5u,
     0xf111b96d8edffca8u},
};

enum { BLOCK = 1000 };

/* |got - want| in units of the last place of want, in a format of `digits` bits and least exponent
 * `min_exp`; infinity counts as 2^max_exp. */
static double ulp_error(long double got, long double want, int digits, int min_exp, int max_exp)
{
    long double top = ldexpl(1, max_exp);
    if (isnan(got) || isnan(want)) {
        return isnan(got) && isnan(want) ? 0 : HUGE_VAL;
    }
    got = got > top ? top : got < -top ? -top : got;
    want = want > top ? top : want < -top ? -top : want;
    int e = want != 0 ? ilogbl(want) + 1 : min_exp;
    return (double)(fabsl(got - want) / ldexpl(1, (e < min_exp ? min_exp : e) - digits));
}

static void check_error(const char *name, const char *type, double x, double worst, double bound)
{
#ifdef CHECK_PRINT
    printf("%s_%s %.3f ulp\n", name, type, worst);
#endif
    ck_assert_msg(worst <= bound, "%s_%s(%a): %.3f ulp", name, type, x, worst);
}

/* Sample k of function f: odd ones uniform in the interval, even ones over the bit patterns. */
static float sample_f32(int f, uint64_t k)
{
    uint32_t counter[4] = {(uint32_t)k, (uint32_t)(k >> 32), 32, 0}, bits[4];
    moe__philox(1, counter, bits);
    float u = (float)(int32_t)(bits[1] >> 8) * 0x1p-24f;
    return table[f].whole && k % 2 == 0
               ? moe__from_bits_f32(bits[0])
               : moe__fma_f32(u, table[f].hi32 - table[f].lo32, table[f].lo32);
}

static double sample_f64(int f, uint64_t k)
{
    uint32_t counter[4] = {(uint32_t)k, (uint32_t)(k >> 32), 64, 0}, bits[4];
    moe__philox(1, counter, bits);
    uint64_t word = (uint64_t)bits[0] << 32 | bits[1];
    double u = (double)(int64_t)(word >> 11) * 0x1p-53;
    return table[f].whole && k % 2 == 0
               ? moe__from_bits_f64(word)
               : moe__fma_f64(u, table[f].hi64 - table[f].lo64, table[f].lo64);
}

START_TEST(test_numeric_error_f32_within_bound)
{
    static float x[BLOCK], y[BLOCK];
    double worst = 0;
    float where = 0;
    for (uint64_t k = 0; k < (1ull << 32) / CHECK_STRIDE; k += BLOCK) {
        for (int i = 0; i < BLOCK; i++) {
            x[i] = sample_f32(_i, k + (uint64_t)i);
        }
        table[_i].f32(x, y, BLOCK);
        for (int i = 0; i < BLOCK; i++) {
            double e = ulp_error(y[i], table[_i].ref(x[i]), FLT_MANT_DIG, FLT_MIN_EXP, FLT_MAX_EXP);
            where = e > worst ? x[i] : where;
            worst = e > worst ? e : worst;
        }
    }
    check_error(table[_i].name, "f32", (double)where, worst, table[_i].ulp32);
}
END_TEST

START_TEST(test_numeric_error_f64_within_bound)
{
    static double x[BLOCK], y[BLOCK];
    double worst = 0, where = 0;
    for (uint64_t k = 0; k < (1ull << 32) / CHECK_STRIDE; k += BLOCK) {
        for (int i = 0; i < BLOCK; i++) {
            x[i] = sample_f64(_i, k + (uint64_t)i);
        }
        table[_i].f64(x, y, BLOCK);
        for (int i = 0; i < BLOCK; i++) {
            double e = ulp_error(y[i], table[_i].ref(x[i]), DBL_MANT_DIG, DBL_MIN_EXP, DBL_MAX_EXP);
            where = e > worst ? x[i] : where;
            worst = e > worst ? e : worst;
        }
    }
    check_error(table[_i].name, "f64", where, worst, table[_i].ulp64);
}
END_TEST

/* Ends of every range, both signs, and the neighbours of the thresholds inside the functions. */
START_TEST(test_numeric_error_edges_within_bound)
{
    static const double edge[] = {
        0,       0x1p-149,   0x1p-126, 0x1p-24,   0x1p-1074, 0x1p-1022, 0x1p-1023,
        0.25,    0.34657359, 0.5,      0.6931472, 0.85,      1,         1.4142135,
        2,       4,          6,        8.3,       10,        14,        15,
        16.6,    20,         37.6,     38.5,      40,        87.3,      88.72,
        88.73,   89,         103.97,   104,       708.4,     709.78,    709.79,
        710,     745.13,     746,      1e4,       1e38,      1e308,     (double)FLT_MAX,
        DBL_MAX, HUGE_VAL};
    int f = _i;
    for (size_t i = 0; i < sizeof edge / sizeof *edge; i++) {
        for (int s = 0; s < 6; s++) {
            double x = s & 1 ? -edge[i] : edge[i], y;
            x = s / 2 == 0 ? x : nextafter(x, s / 2 == 1 ? HUGE_VAL : -HUGE_VAL);
            float x32 = (float)x, y32;
            x32 = s / 2 == 0 ? x32 : nextafterf(x32, s / 2 == 1 ? HUGE_VALF : -HUGE_VALF);
            if (table[f].whole || (x >= 0 && x <= 1 && x32 <= 1)) {
                table[f].f32(&x32, &y32, 1);
                table[f].f64(&x, &y, 1);
                double e32 = ulp_error(y32, table[f].ref(x32), FLT_MANT_DIG, FLT_MIN_EXP,
                                       FLT_MAX_EXP);
                double e = ulp_error(y, table[f].ref(x), DBL_MANT_DIG, DBL_MIN_EXP, DBL_MAX_EXP);
                ck_assert_msg(e32 <= table[f].ulp32, "%s_f32(%a) = %a: %.3f ulp", table[f].name,
                              (double)x32, (double)y32, e32);
                ck_assert_msg(e <= table[f].ulp64, "%s_f64(%a) = %a: %.3f ulp", table[f].name, x, y,
                              e);
            }
        }
    }
}
END_TEST

START_TEST(test_numeric_nan_comes_back_unchanged)
{
    float x = moe__from_bits_f32(0xffc01234u), y;
    double x64 = moe__from_bits_f64(0xfff8000000001234u), y64;
    table[_i].f32(&x, &y, 1);
    table[_i].f64(&x64, &y64, 1);
    ck_assert(_i == LOG1P ? isnan(y) : moe__bits_f32(y) == moe__bits_f32(x));
    ck_assert(_i == LOG1P ? isnan(y64) : moe__bits_f64(y64) == moe__bits_f64(x64));
}
END_TEST

START_TEST(test_numeric_specials_exact)
{
    const float inf = HUGE_VALF;
    const struct {
        int f;
        float x, want;
    } c[] = {
        {EXP, inf, inf},
        {EXP, -inf, 0},
        {EXP, 0, 1},
        {EXP, 1e30f, inf},
        {EXP, -1e30f, 0},
        {LOG, 0, -inf},
        {LOG, -0.0f, -inf},
        {LOG, inf, inf},
        {LOG, 1, 0},
        {ERF, inf, 1},
        {ERF, -inf, -1},
        {ERF, -0.0f, -0.0f},
        {TANH, inf, 1},
        {TANH, -inf, -1},
        {TANH, -0.0f, -0.0f},
        {TANH, 0x1p-149f, 0x1p-149f},
        {SOFTPLUS, inf, inf},
        {SOFTPLUS, -inf, 0},
        {SOFTPLUS, 1000, 1000},
        {SIGMOID, inf, 1},
        {SIGMOID, -inf, 0},
        {SIGMOID, 0, 0.5f},
        {PDF, inf, 0},
        {PDF, -inf, 0},
        {CDF, inf, 1},
        {CDF, -inf, 0},
        {CDF, 0, 0.5f},
    };
    for (size_t i = 0; i < sizeof c / sizeof *c; i++) {
        float y;
        double x = (double)c[i].x, y64;
        table[c[i].f].f32(&c[i].x, &y, 1);
        ck_assert_msg(moe__bits_f32(y) == moe__bits_f32(c[i].want), "%s_f32(%a) = %a",
                      table[c[i].f].name, x, (double)y);
        if (x != 0x1p-149) {
            table[c[i].f].f64(&x, &y64, 1);
            ck_assert_msg(moe__bits_f64(y64) == moe__bits_f64((double)c[i].want), "%s_f64(%a) = %a",
                          table[c[i].f].name, x, y64);
        }
    }
    ck_assert_uint_eq(moe__bits_f32(moe__log_f32(-1)), 0x7fc00000u);
    ck_assert_uint_eq(moe__bits_f64(moe__log_f64(-HUGE_VAL)), 0x7ff8000000000000u);
}
END_TEST

START_TEST(test_numeric_sincospi_within_bound)
{
    const long double pi = 3.141592653589793238462643383279502884L;
    double worst = 0;
    float where = 0;
    for (uint32_t k = 0; k < 1u << 24; k += CHECK_STRIDE / 16 + 1) {
        float u = (float)(int32_t)k * 0x1p-23f, s, c;
        moe__sincospi_f32(u, &s, &c);
        /* Reduced exactly first: near its zeros sinl(pi u) would be that of the rounded pi u. */
        int quadrant = (int)(2 * u + 0.5f);
        long double r = (long double)u - quadrant / 2.0L;
        long double sine = sinl(pi * r), cosine = cosl(pi * r);
        long double a = quadrant & 1 ? cosine : sine, b = quadrant & 1 ? -sine : cosine;
        a = quadrant & 2 ? -a : a;
        b = quadrant & 2 ? -b : b;
        double e = fmax(ulp_error(s, a, FLT_MANT_DIG, FLT_MIN_EXP, FLT_MAX_EXP),
                        ulp_error(c, b, FLT_MANT_DIG, FLT_MIN_EXP, FLT_MAX_EXP));
        where = e > worst ? u : where;
        worst = e > worst ? e : worst;
    }
    check_error("sincospi", "f32", (double)where, worst, 2);
}
END_TEST

static uint64_t fnv1a(uint64_t sum, uint64_t word, int bytes)
{
    for (int i = 0; i < bytes; i++) {
        sum = (sum ^ (word >> 8 * i & 0xff)) * 0x100000001b3u;
    }
    return sum;
}

/* 10^5 samples of function _i, FNV-1a over the bytes of the results, low byte first. */
START_TEST(test_numeric_sweep_bitwise_golden)
{
    static float x[BLOCK], y[BLOCK];
    static double x64[BLOCK], y64[BLOCK];
    uint64_t sum32 = 0xcbf29ce484222325u, sum64 = sum32;
    for (uint64_t k = 0; k < 100000; k += BLOCK) {
        for (int i = 0; i < BLOCK; i++) {
            x[i] = sample_f32(_i, k + (uint64_t)i);
            x64[i] = sample_f64(_i, k + (uint64_t)i);
        }
        table[_i].f32(x, y, BLOCK);
        table[_i].f64(x64, y64, BLOCK);
        for (int i = 0; i < BLOCK; i++) {
            sum32 = fnv1a(sum32, moe__bits_f32(y[i]), 4);
            sum64 = fnv1a(sum64, moe__bits_f64(y64[i]), 8);
        }
    }
    ck_assert_msg(sum32 == table[_i].sum32, "%s_f32: %016llx", table[_i].name,
                  (unsigned long long)sum32);
    ck_assert_msg(sum64 == table[_i].sum64, "%s_f64: %016llx", table[_i].name,
                  (unsigned long long)sum64);
}
END_TEST

/* The known-answer vectors of Random123, philox4x32 with 10 rounds. */
START_TEST(test_numeric_philox_known_answers)
{
    static const struct {
        uint32_t counter[4];
        uint64_t key;
        uint32_t want[4];
    } c[] = {
        {{0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{~0u, ~0u, ~0u, ~0u}, ~0ull, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         0x299f31d0a4093822,
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < sizeof c / sizeof *c; i++) {
        uint32_t out[4];
        moe__philox(c[i].key, c[i].counter, out);
        for (int j = 0; j < 4; j++) {
            ck_assert_msg(out[j] == c[i].want[j], "vector %zu word %d: %08x", i, j, out[j]);
        }
    }
}
END_TEST

START_TEST(test_numeric_counter_layout)
{
    uint32_t counter[4];
    moe__counter(counter, moe__stream(0x1234, 0x56, MOE__PURPOSE_DROP), 7, 8, 9);
    ck_assert_uint_eq(counter[0], 0x04561234u);
    ck_assert_uint_eq(counter[1], 7);
    ck_assert_uint_eq(counter[2], 8);
    ck_assert_uint_eq(counter[3], 9);
    ck_assert_uint_eq(moe__bits_f32(moe__uniform_f32(0)), moe__bits_f32(0x1p-24f));
    ck_assert_uint_eq(moe__bits_f32(moe__uniform_f32(~0u)), moe__bits_f32(1 - 0x1p-24f));
}
END_TEST

/* Seed 42, layer 0, gate 0, step 0: tokens 0 to 3, experts 0 to 3. */
START_TEST(test_numeric_normal4_golden)
{
    static const uint32_t want[4][4] = {
        {0xbfd73394, 0xbea43738, 0xbf0f51ee, 0x3f27d2e1}, /* -1.681 -0.3207 -0.5598  0.6556 */
        {0x3d98159d, 0xbe4182c8, 0xbf56bb3e, 0xbe82ad46}, /* 0.07426 -0.1890 -0.8388 -0.2552 */
        {0x3fd8fada, 0x3c3f6099, 0xbfea27e8, 0xbfd6ef03}, /*  1.695 0.01168 -1.829 -1.679 */
        {0x3f791140, 0xbee34204, 0xbf7e3032, 0x3ebab751}, /*  0.9729 -0.4439 -0.9929  0.3647 */
    };
    for (uint32_t token = 0; token < 4; token++) {
        uint32_t counter[4], bits[4];
        float out[4];
        moe__counter(counter, moe__stream(0, 0, MOE__PURPOSE_NOISE), 0, token, 0);
        moe__philox(42, counter, bits);
        moe__normal4(bits, out);
        for (int j = 0; j < 4; j++) {
            ck_assert_msg(moe__bits_f32(out[j]) == want[token][j], "token %u expert %d: %08x",
                          token, j, moe__bits_f32(out[j]));
        }
    }
}
END_TEST

/* 10^6 draws; the bounds are about five standard errors. */
START_TEST(test_numeric_normal4_moments)
{
    const int n = 1000000;
    double sum[5] = {0};
    int beyond2 = 0, beyond4 = 0;
    for (int k = 0; k < n / 4; k++) {
        uint32_t counter[4], bits[4];
        float out[4];
        moe__counter(counter, moe__stream(3, 1, MOE__PURPOSE_NOISE), 5, (uint32_t)k, 2);
        moe__philox(20240607, counter, bits);
        moe__normal4(bits, out);
        for (int j = 0; j < 4; j++) {
            double z = (double)out[j], power = 1;
            for (int m = 1; m <= 4; m++) {
                sum[m] += power *= z;
            }
            beyond2 += fabs(z) > 2;
            beyond4 += fabs(z) > 4;
        }
    }
    ck_assert_double_eq_tol(sum[1] / n, 0, 5e-3);
    ck_assert_double_eq_tol(sum[2] / n, 1, 7.1e-3);
    ck_assert_double_eq_tol(sum[3] / n, 0, 2e-2);
    ck_assert_double_eq_tol(sum[4] / n, 3, 5e-2);
    ck_assert_double_eq_tol((double)beyond2 / n, 0.0455003, 1.1e-3);
    ck_assert_int_ge(beyond4, 25);
    ck_assert_int_le(beyond4, 105);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("numeric");
    TCase *tcase = tcase_create("numeric");
    tcase_set_timeout(tcase, CHECK_STRIDE < 1000 ? 3600 : 120);
    tcase_add_loop_test(tcase, test_numeric_error_f32_within_bound, 0, FUNCTIONS);
    tcase_add_loop_test(tcase, test_numeric_error_f64_within_bound, 0, FUNCTIONS);
    tcase_add_loop_test(tcase, test_numeric_error_edges_within_bound, 0, FUNCTIONS);
    tcase_add_loop_test(tcase, test_numeric_nan_comes_back_unchanged, 0, FUNCTIONS);
    tcase_add_test(tcase, test_numeric_specials_exact);
    tcase_add_test(tcase, test_numeric_sincospi_within_bound);
    tcase_add_loop_test(tcase, test_numeric_sweep_bitwise_golden, 0, FUNCTIONS);
    tcase_add_test(tcase, test_numeric_philox_known_answers);
    tcase_add_test(tcase, test_numeric_counter_layout);
    tcase_add_test(tcase, test_numeric_normal4_golden);
    tcase_add_test(tcase, test_numeric_normal4_moments);
    suite_add_tcase(suite, tcase);
    return run_suite(suite, 1);
}
