/* check_big.c - beyond 2^31 elements, by sparse mappings: strides and offsets that do not fit 32
 * bits give the same bytes as compact memory; and sizes that fit nothing are refused. */
#include "support/layer_case.h"
#include "support/suite.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static const int64_t FAR = (int64_t)3 << 30; /* elements: more than 2^31 */

static float *map_floats(int64_t count)
{
    void *memory = mmap(NULL, (size_t)count * sizeof(float), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    ck_assert_msg(memory != MAP_FAILED, "no mapping of %lld floats", (long long)count);
    return memory;
}

static void unmap_floats(float *memory, int64_t count)
{
    (void)munmap(memory, (size_t)count * sizeof(float));
}

/* Copies rows of `width` between memories of different strides. */
static void copy_rows(float *to, int64_t to_stride, const float *from, int64_t from_stride,
                      int64_t rows, int64_t width)
{
    for (int64_t i = 0; i < rows; i++)
        memcpy(to + i * to_stride, from + i * from_stride, (size_t)width * sizeof *to);
}

START_TEST(test_big_strides_of_tokens)
{
    layer_case c = {.name = "big",
                    .T = 4,
                    .D = 9,
                    .E = 3,
                    .F = 5,
                    .K = 2,
                    .kind = MOE_GATE_NOISY_TOP_K,
                    .weight = {0.1, 0.1, 0, 0, 0, 0}};
    layer_run r;
    layer_case_make(&c, 1);
    layer_run_make(&r, &c, MOE_DTYPE_F32, NULL);
    ck_assert_int_eq(layer_run_forward(&r), MOE_OK);
    ck_assert_int_eq(layer_run_backward(&r), MOE_OK);
    int64_t size = 3 * FAR + 9;
    float *x = map_floats(size), *y = map_floats(size), *dy = map_floats(size),
          *dx = map_floats(size);
    copy_rows(x, FAR, r.x, 9, 4, 9);
    copy_rows(dy, FAR, r.dy, 9, 4, 9);
    r.f.x = x, r.f.y = y, r.b.dy = dy, r.b.dx = dx;
    r.f.x_stride = r.f.y_stride = r.b.dy_stride = r.b.dx_stride = FAR;
    ck_assert_int_eq(layer_run_forward(&r), MOE_OK);
    ck_assert_int_eq(layer_run_backward(&r), MOE_OK);
    for (int64_t t = 0; t < 4; t++) {
        ck_assert_mem_eq(y + t * FAR, (float *)r.y + t * 9, 9 * sizeof *y);
        ck_assert_mem_eq(dx + t * FAR, (float *)r.dx + t * 9, 9 * sizeof *dx);
    }
    unmap_floats(x, size), unmap_floats(y, size), unmap_floats(dy, size), unmap_floats(dx, size);
    layer_run_free(&r);
    layer_case_free(&c);
}
END_TEST

START_TEST(test_big_strides_of_experts)
{
    layer_case c = {.name = "big",
                    .T = 7,
                    .D = 9,
                    .E = 3,
                    .F = 5,
                    .K = 2,
                    .activation = MOE_ACTIVATION_SWIGLU};
    layer_run r;
    moe_parameter_record p;
    moe_binding b;
    layer_case_make(&c, 2);
    layer_run_make(&r, &c, MOE_DTYPE_F32, NULL);
    ck_assert_int_eq(layer_run_forward(&r), MOE_OK);
    ck_assert_int_eq(layer_run_backward(&r), MOE_OK);
    float y[7 * 9];
    memcpy(y, r.y, sizeof y);
    int64_t index = moe_experts_parameter_find(r.experts, "w1"), size = 2 * FAR + 45;
    ck_assert_int_eq(moe_parameter_record_init(&p, sizeof p), MOE_OK);
    ck_assert_int_eq(moe_experts_parameter(r.experts, index, &p), MOE_OK);
    float *w = map_floats(size), *dw = map_floats(size);
    copy_rows(w, FAR, p.data, 45, 3, 45);
    ck_assert_int_eq(moe_binding_init(&b, sizeof b), MOE_OK);
    b.data = w, b.grad = dw;
    b.data_stride[0] = b.grad_stride[0] = FAR;
    b.data_stride[1] = b.grad_stride[1] = 5;
    b.data_stride[2] = b.grad_stride[2] = 1;
    ck_assert_msg(moe_experts_bind(r.experts, index, &b) == MOE_OK, "%s", moe_last_error());
    ck_assert_int_eq(layer_run_forward(&r), MOE_OK);
    ck_assert_int_eq(layer_run_backward(&r), MOE_OK);
    ck_assert_mem_eq(r.y, y, sizeof y);
    for (int64_t e = 0; e < 3; e++)
        ck_assert_mem_eq(dw + e * FAR, (float *)p.grad + e * 45, 45 * sizeof *dw);
    unmap_floats(w, size), unmap_floats(dw, size);
    layer_run_free(&r);
    layer_case_free(&c);
}
END_TEST

/* The questions about cost, and a gate, of such sizes. */
static void refuse_queries(const moe_gate *like, int64_t size)
{
    moe_gate_config g;
    moe_experts_config e;
    moe_cost_query q;
    moe_cost cost;
    MUST(moe_gate_config_init(&g, sizeof g));
    MUST(moe_gate_get_config(like, &g));
    MUST(moe_experts_config_init(&e, sizeof e));
    MUST(moe_cost_query_init(&q, sizeof q));
    MUST(moe_cost_init(&cost, sizeof cost));
    e.d_model = 9, e.d_hidden = 5, e.num_experts = 3;
    q.gate = &g, q.experts = &e, q.tokens = size;
    ck_assert_int_eq(moe_layer_memory(&q, &cost), MOE_ERROR_OVERFLOW);
    ck_assert_int_eq(moe_layer_flops(&q, &cost), MOE_ERROR_OVERFLOW);
    q.tokens = 4, e.d_hidden = size;
    ck_assert_int_eq(moe_layer_memory(&q, &cost), MOE_ERROR_OVERFLOW);
    e.d_hidden = 5, q.groups = size;
    if (size >= INT64_MAX / 8) ck_assert_int_eq(moe_layer_memory(&q, &cost), MOE_ERROR_OVERFLOW);
}

/* Sizes that overflow somewhere are refused; nothing is allocated for them, nothing crashes. */
START_TEST(test_big_sizes_are_refused)
{
    static const int64_t sizes[] = {INT64_MAX, INT64_MAX / 2, (int64_t)1 << 62, (int64_t)1 << 60,
                                    (int64_t)1 << 58};
    layer_case c = {.name = "big", .T = 4, .D = 9, .E = 3, .F = 5, .K = 2};
    layer_run r;
    layer_case_make(&c, 1);
    layer_run_make(&r, &c, MOE_DTYPE_F32, NULL);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        r.f.tokens = sizes[i];
        ck_assert_int_eq(layer_run_forward(&r), MOE_ERROR_OVERFLOW);
        r.f.tokens = 4;
        r.f.x_stride = sizes[i];
        if (sizes[i] >> 60 > 0) /* else the rows' bytes fit in 63 bits */
            ck_assert_int_eq(layer_run_forward(&r), MOE_ERROR_OVERFLOW);
        r.f.x_stride = 0;
        moe_status status = moe_pass_reserve(r.pass, sizes[i], 1, MOE_FROM_CONFIG);
        ck_assert_msg(status == MOE_ERROR_OVERFLOW || status == MOE_ERROR_OUT_OF_MEMORY, "%s",
                      moe_status_name(status));
        moe_experts_config e;
        moe_experts *pool = NULL;
        ck_assert_int_eq(moe_experts_config_init(&e, sizeof e), MOE_OK);
        e.d_model = sizes[i], e.d_hidden = 8, e.num_experts = 4;
        status = moe_experts_create(&pool, r.context, &e);
        ck_assert_msg(status == MOE_ERROR_OVERFLOW || status == MOE_ERROR_OUT_OF_MEMORY, "%s",
                      moe_status_name(status));
        ck_assert_ptr_null(pool);
        e.d_model = 8, e.d_hidden = sizes[i];
        status = moe_experts_create(&pool, r.context, &e);
        ck_assert_msg(status == MOE_ERROR_OVERFLOW || status == MOE_ERROR_OUT_OF_MEMORY, "%s",
                      moe_status_name(status));
        refuse_queries(r.gate, sizes[i]);
    }
    ck_assert_int_eq(layer_run_forward(&r), MOE_OK);
    layer_run_free(&r);
    layer_case_free(&c);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("big");
    TCase *tests = tcase_create("beyond 2^31");
    tcase_set_timeout(tests, 300);
    tcase_add_test(tests, test_big_strides_of_tokens);
    tcase_add_test(tests, test_big_strides_of_experts);
    tcase_add_test(tests, test_big_sizes_are_refused);
    suite_add_tcase(suite, tests);
    return run_suite(suite, 1);
}
