/* check_io_upcycle.c - a dense network made into experts: whole, in slices, from memory in either
 * order or from a file, with noise where it is wanted. */
#include "support/files.h"
#include "support/layer_case.h"
#include "support/model_file.h"
#include "support/suite.h"

#include <moe/io.h>

#include <check.h>
#include <math.h>

/* A dense network of `slices` times the width, in f64. */
typedef struct dense {
    double w1[4 * F * D], w3[4 * F * D], w2[4 * F * D], b1[4 * F], b3[4 * F], b2[D];
} dense;

static void draw(dense *n)
{
    uint64_t state = 9;
    double *all = n->w1;
    for (size_t i = 0; i < sizeof *n / sizeof *all; i++) all[i] = random_normal(&state) / 8;
}

static void dense_forward(const dense *n, int64_t width, int gated, const double *x, double *y)
{
    for (int64_t d = 0; d < D; d++) y[d] = n->b2[d];
    for (int64_t h = 0; h < width; h++) {
        double g = n->b1[h], u = n->b3[h];
        for (int64_t d = 0; d < D; d++) g += x[d] * n->w1[h * D + d], u += x[d] * n->w3[h * D + d];
        double a = gated ? silu(g) * u : silu(g);
        for (int64_t d = 0; d < D; d++) y[d] += a * n->w2[d * width + h];
    }
}

static moe_upcycle_args args_of(const dense *n, int64_t width)
{
    moe_upcycle_args a;
    MUST(moe_upcycle_args_init(&a, sizeof a));
    a.w1 = n->w1, a.w3 = n->w3, a.w2 = n->w2, a.b1 = n->b1, a.b3 = n->b3, a.b2 = n->b2;
    a.width = width, a.dtype = MOE_DTYPE_F64;
    return a;
}

START_TEST(test_upcycled_layer_is_the_dense_network)
{
    static dense n;
    moe_context *context = new_context();
    double x[T * D], y[T * D], want[D];
    uint64_t state = 3;
    draw(&n);
    for (int i = 0; i < T * D; i++) x[i] = random_normal(&state);
    for (int way = 0; way < 9; way++) {
        int gated = way < 8;
        setup s = {.layout = way % 2,
                   .glu_order = way / 2 % 4,
                   .bias = 1,
                   .dtype = MOE_DTYPE_F64,
                   .activation = gated ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_SILU};
        moe_layer *layer = make_layer(context, &s);
        moe_upcycle_args a = args_of(&n, F);
        moe_pass *pass = NULL;
        moe_forward_args f;
        MUST(moe_layer_init_parameters(layer, 1));
        MUST(moe_upcycle(layer, &a));
        MUST(moe_pass_create(&pass, layer, NULL));
        MUST(moe_forward_args_init(&f, sizeof f));
        f.tokens = T, f.x = x, f.y = y;
        MUST(moe_layer_forward(layer, pass, &f));
        for (int t = 0; t < T; t++) {
            dense_forward(&n, F, gated, x + t * D, want);
            for (int d = 0; d < D; d++) ck_assert_double_eq_tol(y[t * D + d], want[d], 1e-12);
        }
        moe_pass_destroy(pass), moe_layer_destroy(layer);
    }
    moe_context_destroy(context);
}
END_TEST

/* Slices, the other order, a file, and noise where it is wanted. */
START_TEST(test_upcycling_cuts_and_disturbs)
{
    static dense n, turned;
    moe_context *context = new_context();
    files_maker m = {.used = 0};
    moe_file *file = NULL;
    enum { H = 2 * F };
    draw(&n);
    turned = n;
    for (int h = 0; h < H; h++)
        for (int d = 0; d < D; d++) {
            turned.w1[d * H + h] = n.w1[h * D + d], turned.w3[d * H + h] = n.w3[h * D + d];
            turned.w2[h * D + d] = n.w2[d * H + h];
        }
    memcpy(files_add(&m, "g", "F64", "64,64", 8 * H * D), n.w1, 8 * H * D);
    memcpy(files_add(&m, "u", "F64", "64,64", 8 * H * D), n.w3, 8 * H * D);
    memcpy(files_add(&m, "d", "F64", "64,64", 8 * H * D), n.w2, 8 * H * D);
    files_finish(&m, files_path("dense"));
    MUST(moe_file_open(&file, files_path("dense")));
    setup s = {.dtype = MOE_DTYPE_F64, .glu_order = MOE_GLU_INTERLEAVED}, t = s;
    t.layout = 1, t.glu_order = 0;
    for (int way = 0; way < 3; way++) {
        moe_layer *layer = make_layer(context, &s);
        moe_upcycle_args a = args_of(way == 1 ? &turned : &n, H);
        if (way == 1) a.weight_layout = MOE_WEIGHT_IN_OUT;
        if (way == 2) {
            a.file = file, a.w1 = a.w3 = a.w2 = a.b1 = a.b3 = a.b2 = NULL, a.width = 0;
            a.w1_name = "g", a.w3_name = "u", a.w2_name = "d";
        }
        a.output_scale = 2;
        MUST(moe_upcycle(layer, &a));
        tensor_place w1 = find_tensor(layer, &s, W1), w3 = find_tensor(layer, &s, W3),
                     w2 = find_tensor(layer, &s, W2);
        for (int e = 0; e < E; e++)
            for (int f = 0; f < F; f++)
                for (int d = 0; d < D; d++) {
                    int h = e % 2 * F + f;
                    int same = element_of(&w1, e, f, d) == n.w1[h * D + d] &&
                               element_of(&w3, e, f, d) == n.w3[h * D + d] &&
                               element_of(&w2, e, d, f) == 2 * n.w2[d * H + h];
                    if (!same) ck_abort_msg("way %d, expert %d, %d, %d", way, e, f, d);
                }
        moe_layer_destroy(layer);
    }
    moe_layer *layer = make_layer(context, &s), *other = make_layer(context, &t);
    moe_upcycle_args a = args_of(&n, H);
    a.noise_std = 0.01, a.noise_fraction = 0.5, a.seed = 77;
    MUST(moe_upcycle(layer, &a));
    MUST(moe_upcycle(other, &a));
    double sum = 0, square = 0, most = 0;
    int disturbed = 0, alike = 0;
    tensor_place w1 = find_tensor(layer, &s, W1), other_w1 = find_tensor(other, &t, W1);
    for (int e = 0; e < E; e++)
        for (int f = 0; f < F; f++)
            for (int d = 0; d < D; d++) {
                double x = element_of(&w1, e, f, d), by = x - n.w1[(e % 2 * F + f) * D + d];
                if (x != element_of(&other_w1, e, f, d)) ck_abort_msg("layouts differ");
                alike += e >= 2 && x == element_of(&w1, e - 2, f, d);
                disturbed += by != 0, sum += by, square += by * by, most = fmax(most, fabs(by));
            }
    ck_assert_int_gt(disturbed, E * F * D * 48 / 100);
    ck_assert_int_lt(disturbed, E * F * D * 52 / 100);
    ck_assert_int_lt(alike, E / 2 * F * D * 30 / 100); /* where neither has noise */
    ck_assert_double_eq_tol(sum / disturbed, 0, 5e-4);
    ck_assert_double_eq_tol(sqrt(square / disturbed), 0.01, 5e-4);
    ck_assert_double_lt(most, 0.06);
    moe_layer_destroy(layer), moe_layer_destroy(other);
    moe_file_close(file), moe_context_destroy(context);
}
END_TEST

/* A network of no hidden units has no slices. */
START_TEST(test_upcycling_refuses_an_empty_network)
{
    moe_context *context = new_context();
    files_maker m = {.used = 0};
    moe_file *file = NULL;
    setup s = {.dtype = MOE_DTYPE_F32};
    moe_layer *layer = make_layer(context, &s);
    MUST(moe_layer_init_parameters(layer, 5));
    uint64_t before = hash_of(layer);
    memset(files_add(&m, "other", "F32", "2", 8), 0, 8);
    (void)files_add(&m, "g", "F32", "0,64", 0), (void)files_add(&m, "u", "F32", "0,64", 0);
    (void)files_add(&m, "d", "F32", "64,0", 0);
    files_finish(&m, files_path("empty"));
    MUST(moe_file_open(&file, files_path("empty")));
    moe_upcycle_args a;
    MUST(moe_upcycle_args_init(&a, sizeof a));
    a.file = file, a.w1_name = "g", a.w3_name = "u", a.w2_name = "d";
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_upcycle(layer, &a));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "0 wide"));
    ck_assert_uint_eq(hash_of(layer), before);
    moe_file_close(file), moe_layer_destroy(layer), moe_context_destroy(context);
}
END_TEST

START_TEST(test_upcycling_refuses)
{
    static dense n;
    moe_context *context = new_context();
    setup s = {.dtype = MOE_DTYPE_F32, .bias = 1};
    moe_layer *layer = make_layer(context, &s);
    MUST(moe_layer_init_parameters(layer, 5));
    uint64_t before = hash_of(layer);
    draw(&n);
    moe_upcycle_args a, good = args_of(&n, F);
#define BAD(change) \
    a = good;       \
    change;         \
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_upcycle(layer, &a))
    BAD(a.width = F + 1);
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "33 wide"));
    BAD(a.width = F / 2);
    BAD(a.width = 0);
    BAD(a.width = -1);
    BAD(a.w1 = NULL);
    BAD(a.w3 = NULL);
    BAD(a.w2 = NULL);
    BAD(a.dtype = MOE_DTYPE_I32);
    BAD(a.weight_layout = 2);
    BAD(a.noise_std = -1);
    BAD(a.noise_std = (double)NAN);
    BAD(a.noise_fraction = 1.5);
    BAD(a.output_scale = (double)INFINITY);
    BAD(a.reserved = 1);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_upcycle(layer, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_upcycle(NULL, &good));
    ck_assert_uint_eq(hash_of(layer), before);
    moe_layer_destroy(layer), moe_context_destroy(context);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("io_upcycle");
    TCase *c = tcase_create("dense");
    tcase_set_timeout(c, 300);
    tcase_add_checked_fixture(c, files_begin, files_end);
    tcase_add_test(c, test_upcycled_layer_is_the_dense_network);
    tcase_add_test(c, test_upcycling_cuts_and_disturbs);
    tcase_add_test(c, test_upcycling_refuses);
    tcase_add_test(c, test_upcycling_refuses_an_empty_network);
    suite_add_tcase(suite, c);
    return run_suite(suite, 1);
}
