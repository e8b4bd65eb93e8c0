/* check_half.c - bf16 and f16: the conversions exhaustively, layers against the reference, and what
 * docs/numerics.md says of 16-bit layers. */
#include "half.h"
#include "support/layer_cases.h"
#include "support/layer_check.h"
#include "support/suite.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>

static const int32_t halves[] = {MOE_DTYPE_BF16, MOE_DTYPE_F16};

/* ---- conversions ----------------------------------------------------------------------------- */

static float widen(uint16_t h, int32_t dtype)
{
    return dtype == MOE_DTYPE_BF16 ? moe__from_bf16(h) : moe__from_f16(h);
}
static uint16_t narrow(float x, int32_t dtype)
{
    return dtype == MOE_DTYPE_BF16 ? moe__to_bf16(x) : moe__to_f16(x);
}

static uint32_t quiet_bit(int32_t dtype) { return dtype == MOE_DTYPE_BF16 ? 0x40 : 0x200; }

START_TEST(test_half_numbers_widen_exactly_and_come_back)
{
    int32_t dtype = halves[_i];
    for (uint32_t h = 0; h < 65536; h++) {
        uint16_t bits = (uint16_t)h;
        double want = number_at(&bits, 0, dtype);
        float got = widen(bits, dtype);
        uint16_t back = narrow(got, dtype);
        if (isnan(want)) {
            ck_assert_msg(isnan(got), "%#x widens to %a", h, (double)got);
            ck_assert_uint_eq(back, h | quiet_bit(dtype));
        } else {
            ck_assert_msg((double)got == want && !signbit(got) == !signbit(want),
                          "%#x widens to %a, want %a", h, (double)got, want);
            ck_assert_uint_eq(back, h);
        }
    }
}
END_TEST

/* One float against the test's own rounding in double. Of millions Check would keep every place. */
static void narrows(uint32_t bits, int32_t dtype)
{
    float x = moe__from_bits_f32(bits);
    uint16_t want, got = narrow(x, dtype);
    number_set(&want, 0, dtype, (double)x);
    if (!isnan(x)) {
        if (got != want) ck_abort_msg("%a narrows to %#x, want %#x", (double)x, got, want);
    } else if (!isnan(widen(got, dtype)) || !(got & quiet_bit(dtype)) || got >> 15 != bits >> 31) {
        ck_abort_msg("NaN %#x narrows to %#x", bits, got);
    }
}

/* Every boundary between two numbers of 16 bits, and the floats beside it. */
START_TEST(test_half_numbers_narrow_to_nearest_even_at_every_boundary)
{
    int32_t dtype = halves[_i];
    for (uint32_t h = 0; h < 0x8000; h++) {
        double low = (double)widen((uint16_t)h, dtype);
        double high = (double)widen((uint16_t)(h + 1), dtype);
        if (isnan(low) || isnan(high)) continue;
        if (isinf(low)) continue;
        if (isinf(high)) high = low + (low - (double)widen((uint16_t)(h - 1), dtype));
        uint32_t middle = moe__bits_f32((float)((low + high) / 2));
        for (uint32_t near = middle - 2; near != middle + 3; near++)
            narrows(near & 0x7fffffff, dtype), narrows(near | 0x80000000u, dtype);
    }
}
END_TEST

/* Every 4099th float: all exponents, infinities and NaN among them. */
START_TEST(test_half_numbers_narrow_as_double_arithmetic_says)
{
    for (uint64_t bits = 0; bits < (uint64_t)1 << 32; bits += 4099)
        narrows((uint32_t)bits, halves[_i]);
    for (uint32_t bits = 0x7f7fffff; bits < 0x7f800003; bits++) narrows(bits, halves[_i]);
    for (uint32_t bits = 0; bits < 3; bits++) narrows(bits, halves[_i]);
}
END_TEST

/* ---- the reference --------------------------------------------------------------------------- */

/* Odd seeds: bound gradients have 16 bits as well. */
static void compare(layer_case *c, uint64_t seed, int32_t dtype)
{
    c->element = dtype, c->half_gradients = seed % 2 == 1;
    layer_case_check(c, seed, dtype);
}

START_TEST(test_half_layer_agrees_with_reference)
{
    layer_case c = layer_cases[_i / 2];
    compare(&c, (uint64_t)_i / 2 + 1, halves[_i % 2]);
}
END_TEST

/* Sums of one or two numbers cancel too often for an error to say anything. */
static void widen_case(layer_case *c)
{
    int64_t *size[] = {&c->T, &c->D, &c->F, &c->O, &c->gate_D};
    for (size_t i = 0; i < COUNT(size); i++)
        if (*size[i] > 0 && *size[i] < 4) *size[i] += 4;
}

START_TEST(test_half_layer_agrees_with_reference_for_random_configurations)
{
    const char *long_run = getenv("MOE_LONG");
    int count = long_run && long_run[0] == '1' ? 5000 : 400;
    uint64_t state = 1626;
    for (int i = 0; i < count; i++) {
        layer_case c = layer_case_draw(&state);
        widen_case(&c);
        compare(&c, (uint64_t)i, halves[i / 2 % 2]);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("half");
    TCase *tests = tcase_create("conversions, reference and sentences");
    tcase_set_timeout(tests, 600);
    tcase_add_loop_test(tests, test_half_numbers_widen_exactly_and_come_back, 0, 2);
    tcase_add_loop_test(tests, test_half_numbers_narrow_to_nearest_even_at_every_boundary, 0, 2);
    tcase_add_loop_test(tests, test_half_numbers_narrow_as_double_arithmetic_says, 0, 2);
    tcase_add_loop_test(tests, test_half_layer_agrees_with_reference, 0, 2 * LAYER_CASES);
    tcase_add_test(tests, test_half_layer_agrees_with_reference_for_random_configurations);
    suite_add_tcase(suite, tests);
    return run_suite(suite, 1);
}
