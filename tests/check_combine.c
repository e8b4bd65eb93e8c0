/* check_combine.c - dispatch and combine of plan.h, in both directions, and the kernels behind
 * them. */
#include "support/plan_case.h"
#include "support/suite.h"

/* ---- dispatch and combine -------------------------------------------------------------------- */

/* What a call is given and what must come of it: rows of `width` numbers, `stride` apart. The gaps
 * are compared too. */
typedef struct matrix {
    void *data;
    int64_t rows, width, stride;
    int32_t dtype;
} matrix;

static matrix make_matrix(int32_t dtype, int64_t rows, int64_t width, int64_t gap)
{
    matrix m = {NULL, rows, width, width + gap, dtype};
    m.data = numbers(dtype, rows * m.stride);
    return m;
}
static matrix copy_of(const matrix *from)
{
    matrix m = *from;
    size_t bytes = (size_t)(m.rows * m.stride + 1) * size_of(m.dtype);
    m.data = malloc(bytes);
    memcpy(m.data, from->data, bytes);
    return m;
}
static double at(const matrix *m, int64_t i, int64_t j)
{
    return get(m->data, m->dtype, i * m->stride + j);
}
static void put(matrix *m, int64_t i, int64_t j, double v)
{
    set(m->data, m->dtype, i * m->stride + j, v);
}
static void same_matrix(const matrix *a, const matrix *b, const char *what)
{
    same_bytes(a->data, b->data, (size_t)(a->rows * a->stride) * size_of(a->dtype), what);
}

/* The promised sum of a token's rows; `weighted` by fused multiply-adds from +0. */
static double sum_of(const moe_plan_view *v, const matrix *rows, int64_t t, int64_t j, int weighted)
{
    double sum = 0;
    int any = 0;
    for (int64_t n = v->token_begin[t]; n < v->token_begin[t + 1]; n++) {
        if (v->row_of_entry[n] < 0) continue;
        double x = at(rows, v->row_of_entry[n], j);
        if (weighted)
            sum = multiply_add(v->dtype, get(v->weight_of_entry, v->dtype, n), x, sum);
        else
            sum = any ? add(v->dtype, sum, x) : x;
        any = 1;
    }
    return sum;
}

static double dot(const matrix *a, int64_t i, const matrix *b, int64_t k)
{
    double lane[16] = {0};
    for (int64_t j = 0; j < a->width; j++)
        lane[j % 16] = multiply_add(a->dtype, at(a, i, j), at(b, k, j), lane[j % 16]);
    for (int half = 8; half; half /= 2)
        for (int l = 0; l < half; l++) lane[l] = add(a->dtype, lane[l], lane[l + half]);
    return lane[0];
}

typedef struct operands {
    moe_plan *plan;
    moe_plan_view v;
    moe_rows_args args;
    matrix tokens, rows, tokens_out, rows_out;
} operands;

static operands *make_operands(moe_plan *plan, int64_t width, int64_t gap)
{
    operands *o = calloc(1, sizeof *o);
    o->plan = plan, o->v = view_of(plan);
    o->tokens = make_matrix(o->v.dtype, o->v.tokens, width, gap);
    o->rows = make_matrix(o->v.dtype, o->v.rows, width, 2 * gap);
    o->tokens_out = make_matrix(o->v.dtype, o->v.tokens, width, 3 * gap);
    o->rows_out = make_matrix(o->v.dtype, o->v.rows, width, gap);
    OK(moe_rows_args_init(&o->args, sizeof o->args));
    o->args.width = width, o->args.dtype = o->v.dtype;
    o->args.tokens_in = o->tokens.data, o->args.tokens_in_stride = gap ? o->tokens.stride : 0;
    o->args.rows_in = o->rows.data, o->args.rows_in_stride = gap ? o->rows.stride : 0;
    o->args.tokens_out = o->tokens_out.data,
    o->args.tokens_out_stride = gap ? o->tokens_out.stride : 0;
    o->args.rows_out = o->rows_out.data, o->args.rows_out_stride = gap ? o->rows_out.stride : 0;
    return o;
}

static void free_operands(operands *o)
{
    free(o->tokens.data), free(o->rows.data), free(o->tokens_out.data), free(o->rows_out.data),
        free(o);
}

/* Both calls that write tokens, set and added to, weighted or not. */
static void check_to_tokens(operands *o, int combine, uint64_t flags)
{
    matrix expected = copy_of(&o->tokens_out);
    for (int64_t t = 0; t < o->v.tokens; t++)
        for (int64_t j = 0; j < o->args.width; j++) {
            double sum = sum_of(&o->v, &o->rows, t, j, combine && !(flags & MOE_ROWS_UNWEIGHTED));
            if (flags & MOE_ROWS_ADD) sum = add(o->v.dtype, at(&expected, t, j), sum);
            put(&expected, t, j, sum);
        }
    o->args.flags = flags;
    OK(combine ? moe_combine_forward(o->plan, &o->args) : moe_dispatch_backward(o->plan, &o->args));
    same_matrix(&expected, &o->tokens_out, combine ? "combine_forward" : "dispatch_backward");
    free(expected.data);
}

static void check_to_rows(operands *o, int combine, uint64_t flags)
{
    matrix expected = copy_of(&o->rows_out);
    void *grad = numbers(o->v.dtype, o->v.entries), *dots = numbers(o->v.dtype, o->v.entries);
    for (int64_t n = 0; n < o->v.entries; n++) set(dots, o->v.dtype, n, 0);
    for (int64_t i = 0; i < o->v.rows; i++) {
        int64_t t = o->v.token_of_row[i], n = o->v.entry_of_row[i];
        double w = combine && !(flags & MOE_ROWS_UNWEIGHTED)
                       ? get(o->v.weight_of_entry, o->v.dtype, n)
                       : 1;
        for (int64_t j = 0; j < o->args.width; j++)
            put(&expected, i, j, multiply(o->v.dtype, w, at(&o->tokens, t, j)));
        set(dots, o->v.dtype, n, dot(&o->tokens, t, &o->rows, i));
    }
    o->args.flags = flags;
    o->args.entry_weight_grad = combine ? grad : NULL;
    OK(combine ? moe_combine_backward(o->plan, &o->args) : moe_dispatch_forward(o->plan, &o->args));
    same_matrix(&expected, &o->rows_out, combine ? "combine_backward" : "dispatch_forward");
    if (combine)
        same_bytes(grad, dots, (size_t)o->v.entries * size_of(o->v.dtype), "entry_weight_grad");
    o->args.entry_weight_grad = NULL;
    free(expected.data), free(grad), free(dots);
}

START_TEST(test_rows_case)
{
    static const int64_t widths[] = {1, 15, 16, 37, 64, 130};
    const plan_case *c = &cases[_i];
    routing *r = make_routing(c, (uint64_t)_i);
    moe_plan *plan = make_plan(c, r);
    for (size_t w = 0; w < sizeof widths / sizeof widths[0]; w++) {
        if (c->tokens > 1000 && w % 2) continue;
        for (int64_t gap = 0; gap <= 3; gap += 3) {
            operands *o = make_operands(plan, widths[w], gap);
            for (uint64_t flags = 0; flags < 4; flags++) check_to_tokens(o, 1, flags);
            check_to_tokens(o, 0, 0), check_to_tokens(o, 0, MOE_ROWS_ADD);
            check_to_rows(o, 0, 0);
            check_to_rows(o, 1, 0), check_to_rows(o, 1, MOE_ROWS_UNWEIGHTED);
            free_operands(o);
        }
    }
    moe_plan_destroy(plan);
    free_routing(r);
}
END_TEST

static double inner(const matrix *a, const matrix *b)
{
    double sum = 0;
    for (int64_t i = 0; i < a->rows; i++)
        for (int64_t j = 0; j < a->width; j++) sum += at(a, i, j) * at(b, i, j);
    return sum;
}

/* <dispatch(x), r> = <x, dispatch_backward(r)>, the same for combine, and by the weights:
 * sum_n w_n dw_n = <combine(r), d>. */
START_TEST(test_rows_adjoint)
{
    static const plan_case c = {200, 9, 0, 4, 3, 20, 1, 1, WIDE, I32, MOE_ISA_AUTO, 2};
    routing *r = make_routing(&c, 4);
    moe_plan *plan = make_plan(&c, r);
    operands *o = make_operands(plan, 33, 2);
    scalar *grad = numbers(WIDE, o->v.entries);
    double by_weights = 0;
    OK(moe_dispatch_forward(plan, &o->args));
    OK(moe_dispatch_backward(plan, &o->args));
    ck_assert_double_eq_tol(inner(&o->rows_out, &o->rows), inner(&o->tokens, &o->tokens_out),
                            ON_DEVICE ? 2e-3 : 1e-10);
    o->args.entry_weight_grad = grad;
    OK(moe_combine_forward(plan, &o->args));
    OK(moe_combine_backward(plan, &o->args));
    double expected = inner(&o->tokens_out, &o->tokens);
    ck_assert_double_eq_tol(inner(&o->rows, &o->rows_out), expected, ON_DEVICE ? 2e-3 : 1e-10);
    for (int64_t n = 0; n < o->v.entries; n++)
        by_weights += get(o->v.weight_of_entry, WIDE, n) * (double)grad[n];
    ck_assert_double_eq_tol(by_weights, expected, ON_DEVICE ? 2e-3 : 1e-10);
    free(grad);
    free_operands(o);
    moe_plan_destroy(plan);
    free_routing(r);
}
END_TEST

START_TEST(test_rows_optional_arrays)
{
    small *s = make_small();
    OK(moe_plan_build(s->plan, &s->args));
    operands *o = make_operands(s->plan, 5, 0);
    matrix untouched = copy_of(&o->rows_out);
    float grad[6], with_rows[6];
    o->args.tokens_out = NULL, o->args.rows_out = NULL; /* only the gradient by the weights */
    o->args.entry_weight_grad = grad;
    OK(moe_combine_backward(s->plan, &o->args));
    same_matrix(&untouched, &o->rows_out, "rows_out");
    o->args.rows_out = o->rows_out.data, o->args.entry_weight_grad = with_rows;
    OK(moe_combine_backward(s->plan, &o->args));
    same_bytes(grad, with_rows, sizeof grad, "entry_weight_grad");
    o->args.rows_in = NULL, o->args.entry_weight_grad = NULL; /* only the rows */
    OK(moe_combine_backward(s->plan, &o->args));
    o->args.entry_weight_grad = grad; /* read by combine_backward alone */
    OK(moe_dispatch_forward(s->plan, &o->args));
    free(untouched.data);
    free_operands(o);
    free_small(s);
}
END_TEST

/* T = 0, or no rows: nothing is read, pointers may be NULL. */
START_TEST(test_rows_nothing_to_do)
{
    small *s = make_small();
    moe_rows_args args;
    OK(moe_rows_args_init(&args, sizeof args));
    args.width = 4;
    OK(moe_dispatch_forward(s->plan, &args));
    OK(moe_dispatch_backward(s->plan, &args));
    OK(moe_combine_forward(s->plan, &args));
    OK(moe_combine_backward(s->plan, &args));
    s->args.capacity = 0;
    OK(moe_plan_build(s->plan, &s->args));
    float tokens[12], zeros[12] = {0}, grad[6];
    memset(tokens, 0x7f, sizeof tokens), memset(grad, 0x7f, sizeof grad);
    args.tokens_out = tokens;
    OK(moe_combine_forward(s->plan, &args));
    same_bytes(tokens, zeros, sizeof tokens, "tokens without rows");
    args.tokens_in = tokens, args.tokens_out = NULL, args.entry_weight_grad = grad;
    OK(moe_combine_backward(s->plan, &args));
    same_bytes(grad, zeros, sizeof grad, "entry_weight_grad without rows");
    free_small(s);
}
END_TEST

typedef moe_status (*rows_call)(const moe_plan *plan, const moe_rows_args *args);

#define ROWS_CALL(name)                                                     \
    static moe_status name(const moe_plan *plan, const moe_rows_args *args) \
    {                                                                       \
        return moe_##name(plan, args); /* which may be a macro */           \
    }
ROWS_CALL(dispatch_forward)
ROWS_CALL(dispatch_backward)
ROWS_CALL(combine_forward)
ROWS_CALL(combine_backward)

static void refused_by_all(const operands *o, const moe_rows_args *args, moe_status expected,
                           int line)
{
    static const rows_call calls[4] = {dispatch_forward, dispatch_backward, combine_forward,
                                       combine_backward};
    for (int i = 0; i < 4; i++) {
        moe_status status = calls[i](o->plan, args);
        ck_assert_msg(status == expected, "line %d, call %d gives %s", line, i,
                      moe_status_name(status));
    }
}

#define REFUSED(status, ...)                     \
    do {                                         \
        moe_rows_args a = o->args;               \
        __VA_ARGS__;                             \
        refused_by_all(o, &a, status, __LINE__); \
    } while (0)

START_TEST(test_rows_refuses)
{
    small *s = make_small();
    OK(moe_plan_build(s->plan, &s->args));
    operands *o = make_operands(s->plan, 4, 0);
    matrix tokens = copy_of(&o->tokens_out), rows = copy_of(&o->rows_out);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.width = 0);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.width = -4);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.dtype = F64);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.dtype = MOE_DTYPE_I32);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.flags = 4);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.reserved = 1);
    if (!ON_DEVICE) /* which takes any stream */
        REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.stream = s);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.tokens_in = NULL, a.rows_in = NULL);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.tokens_in_stride = a.rows_in_stride = 3);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.tokens_in_stride = a.rows_in_stride = -4);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.tokens_out_stride = a.rows_out_stride = 3);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.tokens_out = NULL, a.rows_out = NULL);
    REFUSED(MOE_ERROR_OVERFLOW, a.width = INT64_MAX / 2);
    REFUSED(MOE_ERROR_STRUCT_TOO_OLD, a.struct_size = 24);
    refused_by_all(o, NULL, MOE_ERROR_INVALID_ARGUMENT, __LINE__);
    moe_plan *plan = o->plan;
    o->plan = NULL;
    refused_by_all(o, &o->args, MOE_ERROR_INVALID_ARGUMENT, __LINE__);
    o->plan = plan;
    moe_rows_args a = o->args;
    a.rows_in = NULL, a.entry_weight_grad = s->weights;
    FAILS(moe_combine_backward(s->plan, &a), MOE_ERROR_INVALID_ARGUMENT);
    same_matrix(&tokens, &o->tokens_out, "tokens_out"),
        same_matrix(&rows, &o->rows_out, "rows_out");
    free(tokens.data), free(rows.data);
    free_operands(o);
    free_small(s);
}
END_TEST

/* A stride below the width is no matter where there is one row; the width still has to fit. */
START_TEST(test_rows_single_token_stride)
{
    small *s = make_small();
    s->args.tokens = 1, s->args.top_k = 1;
    OK(moe_plan_build(s->plan, &s->args));
    operands *o = make_operands(s->plan, 4, 0);
    o->args.tokens_in_stride = o->args.rows_out_stride = 1;
    OK(moe_dispatch_forward(s->plan, &o->args));
    same_bytes(o->tokens.data, o->rows_out.data, 16, "one row");
    o->args.width = INT64_MAX;
    FAILS(moe_dispatch_forward(s->plan, &o->args), MOE_ERROR_OVERFLOW);
    free_operands(o);
    free_small(s);
}
END_TEST

/* ---- what only the library's own calls reach ------------------------------------------------- */

static double sigmoid_of(int32_t dtype, double x)
{
    return dtype == F64 ? moe__sigmoid_f64(x) : (double)moe__sigmoid_f32((float)x);
}

/* combine with the logistic function, a mask over tokens that do have rows, and the dense copy;
 * then the gradient through it. */
START_TEST(test_combine_output_case)
{
    const plan_case *c = &cases[_i];
    routing *r = make_routing(c, (uint64_t)_i);
    moe_plan *plan = make_plan(c, r);
    operands *o = make_operands(plan, 37, 3);
    const moe__backend *kernels = moe__kernels(plan->context, c->dtype);
    for (int sigmoid = 0; sigmoid < 2; sigmoid++) {
        matrix expected = copy_of(&o->tokens_out), dense = make_matrix(c->dtype, c->tokens, 37, 0);
        matrix copied = copy_of(&dense), through = copy_of(&o->tokens_out);
        for (int64_t t = 0; t < c->tokens; t++)
            for (int64_t j = 0; j < 37; j++) {
                double sum = sum_of(&o->v, &o->rows, t, j, 1);
                double y = !r->mask[t] ? 0 : sigmoid ? sigmoid_of(c->dtype, sum) : sum;
                double slope = multiply(c->dtype, y, add(c->dtype, 1, -y));
                put(&expected, t, j, y), put(&dense, t, j, y);
                put(&through, t, j, multiply(c->dtype, at(&o->tokens, t, j), slope));
            }
        moe__rows_job job = {.workers = {.context = plan->context, .function = "test"},
                             .plan = &plan->a,
                             .width = 37,
                             .tokens_in = o->tokens.data,
                             .tokens_in_stride = o->tokens.stride,
                             .tokens_out = o->tokens_out.data,
                             .tokens_out_stride = o->tokens_out.stride,
                             .rows_in = o->rows.data,
                             .rows_in_stride = o->rows.stride,
                             .sigmoid = sigmoid,
                             .tokens_saved = copied.data,
                             .token_mask = r->mask};
        OK(WAITED(kernels->combine_forward(&job)));
        same_matrix(&expected, &o->tokens_out, "tokens_out");
        same_matrix(&dense, &copied, "tokens_saved");
        OK(WAITED(kernels->output_backward(&job)));
        same_matrix(&through, &o->tokens_out, "output_backward");
        free(expected.data), free(dense.data), free(copied.data), free(through.data);
    }
    free_operands(o);
    moe_plan_destroy(plan);
    free_routing(r);
}
END_TEST

/* A replay keeps rows, slots and order, and makes the weights of fresh ones. */
START_TEST(test_plan_rows_keeps_rows_case)
{
    const plan_case *c = &cases[_i];
    routing *r = make_routing(c, (uint64_t)_i);
    moe_plan *plan = make_plan(c, r), *again = make_plan(c, r);
    moe__plan_rows_job job = {.workers = {.context = again->context, .function = "test"},
                              .plan = &again->a,
                              .renormalize_after_drop = c->renormalize,
                              .keep_rows = 1};
    size_t bytes = (size_t)r->entries * size_of(c->dtype);
    if (bytes) memcpy(again->a.weight_of_entry, r->weights, bytes);
    OK(WAITED(moe__kernels(again->context, c->dtype)->plan_rows(&job)));
    same_plan(plan, again);
    moe_plan_destroy(plan), moe_plan_destroy(again);
    free_routing(r);
}
END_TEST

#ifndef MOE_TEST_DEVICE /* which has neither */
/* Every instruction set and number of threads gives the same bytes for the longest sums. */
START_TEST(test_rows_same_bytes_everywhere)
{
    plan_case c = {500, 20, 5, 5, 0, -1, 1, 1, F32, I32, MOE_ISA_PLAIN, 1};
    routing *r = make_routing(&c, 6);
    matrix out[2];
    void *grad[2];
    for (int isa = MOE_ISA_PLAIN; isa <= MOE_ISA_AVX512; isa++)
        for (int threads = 1; threads <= 4; threads += 3) {
            if (!moe__cpu_backend(isa, F32)) continue;
            int first = isa == MOE_ISA_PLAIN && threads == 1;
            c.isa = isa, c.threads = threads;
            moe_plan *plan = make_plan(&c, r);
            seed = 1;
            operands *o = make_operands(plan, 1003, 0);
            o->args.entry_weight_grad = grad[!first] = numbers(F32, o->v.entries);
            OK(moe_combine_forward(plan, &o->args));
            OK(moe_combine_backward(plan, &o->args));
            out[!first] = copy_of(&o->tokens_out);
            if (!first) {
                same_matrix(&out[0], &out[1], "combine_forward");
                same_bytes(grad[0], grad[1], (size_t)o->v.entries * 4, "entry_weight_grad");
                free(out[1].data), free(grad[1]);
            }
            free_operands(o);
            moe_plan_destroy(plan);
        }
    free(out[0].data), free(grad[0]);
    free_routing(r);
}
END_TEST
#endif

int main(void)
{
    Suite *suite = suite_create("combine");
    TCase *tests = tcase_create("combine");
    tcase_set_timeout(tests, 120);
    tcase_add_loop_test(tests, test_rows_case, 0, CASES);
    tcase_add_test(tests, test_rows_adjoint);
    tcase_add_test(tests, test_rows_optional_arrays);
    tcase_add_test(tests, test_rows_nothing_to_do);
    tcase_add_test(tests, test_rows_refuses);
    tcase_add_test(tests, test_rows_single_token_stride);
    tcase_add_loop_test(tests, test_combine_output_case, 0, CASES);
    tcase_add_loop_test(tests, test_plan_rows_keeps_rows_case, 0, CASES);
#ifndef MOE_TEST_DEVICE
    tcase_add_test(tests, test_rows_same_bytes_everywhere);
#endif
    suite_add_tcase(suite, tests);
    return run_suite(suite, 1);
}
