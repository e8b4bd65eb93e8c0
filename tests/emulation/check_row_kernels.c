/* check_row_kernels.c - dispatch, combine, the output's gradient (cuda/dispatch.cu, combine.cu) and
 * the fills (cuda/fill.cu) on the emulated device, against the CPU.
 *
 * All sums are floats that are rounded once when they are stored, so of 16 bits the CPU's float
 * step is the reference: of widened inputs, its outputs narrowed. Padded rows it does not have: its
 * plan gets the places as rows. */
#include "device_copy.h"
#include "support/suite.h"

static char name[256]; /* of the case */
static moe_context *context;
static const moe__backend *cpu;

static void setup(void)
{
    context = test_context();
    cpu = moe__cpu_backend(MOE_ISA_PLAIN, MOE_DTYPE_F32);
}
static void teardown(void) { moe_context_destroy(context); }

/* ---- matrices of a storage type -------------------------------------------------------------- */

static float widen(int32_t dtype, const void *data, int64_t i)
{
    if (dtype == MOE_DTYPE_F32) return ((const float *)data)[i];
    uint16_t bits = ((const uint16_t *)data)[i];
    return dtype == MOE_DTYPE_BF16 ? moe__from_bf16(bits) : moe__from_f16(bits);
}
static void narrow(int32_t dtype, void *data, int64_t i, float v)
{
    if (dtype == MOE_DTYPE_F32)
        ((float *)data)[i] = v;
    else
        ((uint16_t *)data)[i] = dtype == MOE_DTYPE_BF16 ? moe__to_bf16(v) : moe__to_f16(v);
}

/* rows [rows,stride] on the host as floats, and the same on the device, `shift` elements behind an
 * aligned address. */
typedef struct matrix {
    int64_t rows, stride, shift, count;
    int32_t dtype;
    float *host;
    char *block, *device;
} matrix;

static matrix draw_matrix(int32_t dtype, int64_t rows, int64_t width, int aligned)
{
    int64_t size = moe__dtype_size(dtype),
            gap = aligned ? 16 / size * draw_in(0, 2) : draw_in(0, 3);
    matrix m = {rows, width + gap, aligned ? 0 : draw_in(0, 2), 0, dtype, NULL, NULL, NULL};
    m.count = rows * m.stride;
    m.host = malloc((size_t)(m.count + 1) * sizeof *m.host);
    char *stored = calloc((size_t)(m.count + m.shift + 1), (size_t)size);
    for (int64_t i = 0; i < m.count; i++) {
        narrow(dtype, stored, m.shift + i, draw_chance(1) ? draw_tied() : draw_float());
        m.host[i] = widen(dtype, stored, m.shift + i);
    }
    m.block = on_device(stored, (size_t)((m.count + m.shift) * size));
    m.device = m.block + m.shift * size;
    free(stored);
    return m;
}

/* What the host has, narrowed, is what the device has; the gaps too. */
static void same_matrix(const matrix *m, const char *what)
{
    int64_t size = moe__dtype_size(m->dtype);
    char *found = off_device(m->block, (size_t)((m->count + m->shift) * size));
    char *wanted = calloc((size_t)m->count + 1, (size_t)size);
    for (int64_t i = 0; i < m->count; i++) {
        narrow(m->dtype, wanted, i, m->host[i]);
        float a = widen(m->dtype, wanted, i), b = widen(m->dtype, found, m->shift + i);
        ck_assert_msg(moe__bits_f32(a) == moe__bits_f32(b) || (a != a && b != b),
                      "%s: %s[%lld,%lld] is %a, not %a", name, what, (ll)(i / m->stride),
                      (ll)(i % m->stride), b, a);
    }
    free(found);
    free(wanted);
}

static void free_matrix(matrix *m)
{
    free(m->host);
    ok(cudaFree(m->block));
}

/* ---- a case ---------------------------------------------------------------------------------- */

typedef struct row_case {
    int32_t dtype;
    int64_t T, N, width, places; /* rows of the arrays of rows */
    moe__plan_arrays plan, on;   /* host: rows are places */
    uint8_t *mask, *mask_on;
    float *weights, *weights_on, *grad, *grad_on; /* [N] */
    matrix x, y, saved, rows_in, rows_out;
    moe__rows_job host, device;
} row_case;

/* Rows of `plan` on the device; on the host the places where they lie. */
static void make_plan(row_case *c, int64_t E, int64_t G, int64_t K)
{
    c->plan = draw_plan(c->T, K, E, G, draw_chance(50));
    int64_t most = 0, N = c->N = c->plan.entries;
    moe__plan_rows_job job = {.workers = test_workers(context, 0),
                              .plan = &c->plan,
                              .token_mask = c->mask};
    ck_assert_int_eq(cpu->plan_rows(&job), MOE_OK);
    for (int64_t n = 0; n < N; n++) ((float *)c->plan.weight_of_entry)[n] = draw_float();
    device_plan(&c->on, &c->plan);
    c->on.rows = -1;
    for (int64_t e = 0; e < E; e++)
        most = moe__max(most, c->plan.expert_begin[e + 1] - c->plan.expert_begin[e]);
    int64_t C = draw_chance(50) ? 0 : draw_in(1, most + 1);
    c->places = C > 0 ? E * C : N;
    c->device.padded_rows = C;
    for (int64_t n = 0; n < N && C > 0; n++) {
        int64_t e = c->plan.expert_of_entry[n], row = c->plan.row_of_entry[n];
        if (row < 0) continue;
        row -= c->plan.expert_begin[e];
        c->plan.row_of_entry[n] = row < C ? e * C + row : -1;
    }
}

static void set_job(row_case *c, moe__rows_job *job, int device)
{
#define PLACE(m) (device ? (void *)(m).device : (void *)(m).host)
    job->workers = test_workers(context, 0);
    job->plan = device ? &c->on : &c->plan;
    job->width = c->width;
    job->tokens_in = PLACE(c->x);
    job->tokens_in_stride = c->x.stride;
    job->tokens_out = PLACE(c->y);
    job->tokens_out_stride = c->y.stride;
    job->rows_in = PLACE(c->rows_in);
    job->rows_in_stride = c->rows_in.stride;
    job->rows_out = PLACE(c->rows_out);
    job->rows_out_stride = c->rows_out.stride;
    job->tokens_saved = PLACE(c->saved);
    job->token_mask = device ? c->mask_on : c->mask;
    job->entry_weight_grad = device ? c->grad_on : c->grad;
    job->weights = device ? c->weights_on : c->weights;
#undef PLACE
}

static float *draw_floats(int64_t n)
{
    float *v = malloc((size_t)(n + 1) * sizeof *v);
    for (int64_t i = 0; i < n; i++) v[i] = draw_float();
    return v;
}

static void draw_case(row_case *c, int32_t dtype)
{
    int aligned = draw_chance(60);
    memset(c, 0, sizeof *c);
    c->dtype = dtype;
    c->T = draw_below(draw_chance(80) ? 12 : 60);
    c->width = draw_chance(80) ? draw_in(1, 80) : draw_in(81, 1200);
    if (aligned) c->width = (c->width + 7) / 8 * 8;
    c->mask = draw_chance(50) ? draw_mask(c->T) : NULL;
    make_plan(c, draw_in(1, 20), draw_in(1, 3), draw_chance(90) ? draw_in(0, 5) : draw_in(30, 70));
    c->x = draw_matrix(dtype, c->T, c->width, aligned);
    c->y = draw_matrix(dtype, c->T, c->width, aligned);
    c->saved = draw_matrix(dtype, c->T, c->width, aligned);
    c->saved.stride = c->width; /* dense, the rest untouched */
    c->rows_in = draw_matrix(dtype, c->places, c->width, aligned);
    c->rows_out = draw_matrix(dtype, c->places, c->width, aligned);
    c->mask_on = on_device(c->mask, (size_t)c->T);
    c->grad = draw_floats(c->N);
    c->grad_on = on_device(c->grad, (size_t)c->N * sizeof(float));
    c->weights = draw_floats(c->N);
    c->weights_on = on_device(c->weights, (size_t)c->N * sizeof(float));
    set_job(c, &c->host, 0);
    set_job(c, &c->device, 1);
}

static void set_options(row_case *c, int save)
{
    moe__rows_job *job = &c->host;
    job->add = draw_chance(30);
    job->unweighted = draw_chance(30);
    job->sigmoid = draw_chance(30);
    job->dropped = (int32_t)draw_in(0, 2);
    if (!save) job->tokens_saved = c->device.tokens_saved = NULL;
    if (draw_chance(50)) job->weights = c->device.weights = NULL;
    c->device.add = job->add;
    c->device.unweighted = job->unweighted;
    c->device.sigmoid = job->sigmoid;
    c->device.dropped = job->dropped;
    snprintf(
        name, sizeof name,
        "dtype %d T %lld N %lld width %lld padded %lld mask %d add %d unweighted %d sigmoid %d "
        "dropped %d",
        c->dtype, (ll)c->T, (ll)c->N, (ll)c->width, (ll)c->device.padded_rows, c->mask != NULL,
        job->add, job->unweighted, job->sigmoid, job->dropped);
}

/* All that any step may have written. */
static void same_case(row_case *c)
{
    ok(cudaDeviceSynchronize());
    same_matrix(&c->x, "tokens_in");
    same_matrix(&c->y, "tokens_out");
    same_matrix(&c->saved, "tokens_saved");
    same_matrix(&c->rows_in, "rows_in");
    same_matrix(&c->rows_out, "rows_out");
    same_floats(c->grad, c->grad_on, c->N, "entry_weight_grad", name);
}

static void free_case(row_case *c)
{
    matrix *all[] = {&c->x, &c->y, &c->saved, &c->rows_in, &c->rows_out};
    for (int i = 0; i < 5; i++) free_matrix(all[i]);
    free_plans(&c->plan, &c->on);
    free(c->mask);
    free(c->grad);
    free(c->weights);
    ok(cudaFree(c->mask_on));
    ok(cudaFree(c->grad_on));
    ok(cudaFree(c->weights_on));
}

typedef moe_status step(moe__rows_job *);
typedef struct steps {
    int32_t dtype;
    step *dispatch_forward, *dispatch_backward, *combine_forward, *combine_backward,
        *output_backward;
} steps;
#define STEPS(dtype, type)                                                            \
    {                                                                                 \
        dtype, moe__cuda_dispatch_forward_##type, moe__cuda_dispatch_backward_##type, \
            moe__cuda_combine_forward_##type, moe__cuda_combine_backward_##type,      \
            moe__cuda_output_backward_##type                                          \
    }
static const steps STEPS_OF[] = {STEPS(MOE_DTYPE_F32, f32), STEPS(MOE_DTYPE_BF16, bf16),
                                 STEPS(MOE_DTYPE_F16, f16)};

/* The CPU's copies rows of the order by expert; here those of the places. */
static void dispatch_to_places(const row_case *c)
{
    for (int64_t t = 0; t < c->T; t++)
        for (int64_t n = c->plan.token_begin[t]; n < c->plan.token_begin[t + 1]; n++)
            if (c->plan.row_of_entry[n] >= 0)
                memcpy(c->rows_out.host + c->plan.row_of_entry[n] * c->rows_out.stride,
                       c->x.host + t * c->x.stride, (size_t)c->width * sizeof(float));
}

START_TEST(test_dispatch_as_cpu_random)
{
    const steps *s = &STEPS_OF[_i];
    draw_state = 3 + (uint64_t)_i;
    for (int i = 0; i < test_cases(); i++) {
        row_case c;
        draw_case(&c, s->dtype);
        set_options(&c, 1);
        if (c.device.padded_rows > 0)
            dispatch_to_places(&c);
        else
            ck_assert_int_eq(cpu->dispatch_forward(&c.host), MOE_OK);
        ck_assert_int_eq(s->dispatch_forward(&c.device), MOE_OK);
        same_case(&c);
        ck_assert_int_eq(cpu->dispatch_backward(&c.host), MOE_OK);
        ck_assert_int_eq(s->dispatch_backward(&c.device), MOE_OK);
        same_case(&c);
        free_case(&c);
    }
}
END_TEST

START_TEST(test_combine_as_cpu_random)
{
    const steps *s = &STEPS_OF[_i];
    draw_state = 13 + (uint64_t)_i;
    for (int i = 0; i < test_cases(); i++) {
        row_case c;
        draw_case(&c, s->dtype);
        set_options(&c, draw_chance(50));
        ck_assert_int_eq(cpu->combine_forward(&c.host), MOE_OK);
        ck_assert_int_eq(s->combine_forward(&c.device), MOE_OK);
        same_case(&c);
        if (draw_chance(30)) c.host.rows_out = c.device.rows_out = NULL;
        if (draw_chance(30)) c.host.entry_weight_grad = c.device.entry_weight_grad = NULL;
        ck_assert_int_eq(cpu->combine_backward(&c.host), MOE_OK);
        ck_assert_int_eq(s->combine_backward(&c.device), MOE_OK);
        same_case(&c);
        free_case(&c);
    }
}
END_TEST

START_TEST(test_output_backward_as_cpu_random)
{
    const steps *s = &STEPS_OF[_i];
    draw_state = 23 + (uint64_t)_i;
    for (int i = 0; i < test_cases(); i++) {
        row_case c;
        draw_case(&c, s->dtype);
        set_options(&c, 1);
        ck_assert_int_eq(cpu->output_backward(&c.host), MOE_OK);
        ck_assert_int_eq(s->output_backward(&c.device), MOE_OK);
        same_case(&c);
        free_case(&c);
    }
}
END_TEST

/* ---- fills ----------------------------------------------------------------------------------- */

START_TEST(test_zero_strided_as_host_random)
{
    draw_state = 41;
    for (int i = 0; i < 100; i++) {
        int64_t element = (int64_t)1 << draw_below(4);
        int64_t count[3] = {draw_below(6), draw_below(9), draw_below(40)};
        int64_t inner = draw_in(1, 3), middle = inner * count[2] + draw_below(4);
        int64_t stride[3] = {middle * count[1] + draw_below(3), middle, inner};
        int turn = (int)draw_below(3); /* any dimension may be the fastest */
        for (int d = 0; d < turn; d++) {
            int64_t c = count[2], s = stride[2];
            count[2] = count[1];
            stride[2] = stride[1];
            count[1] = count[0];
            stride[1] = stride[0];
            count[0] = c;
            stride[0] = s;
        }
        size_t bytes = 1 + (size_t)element;
        for (int d = 0; d < 3; d++) bytes += (size_t)(count[d] * stride[d] * element);
        char *host = host_array((int64_t)bytes, 1), *device = on_device(host, bytes);
        moe__workers workers = test_workers(context, 0);
        snprintf(name, sizeof name, "element %lld counts %lld %lld %lld", (ll)element, (ll)count[0],
                 (ll)count[1], (ll)count[2]);
        for (int64_t at = 0; at < count[0] * count[1] * count[2]; at++) {
            int64_t j = at / count[2], place = j / count[1] * stride[0];
            place += j % count[1] * stride[1] + at % count[2] * stride[2];
            memset(host + place * element, 0, (size_t)element);
        }
        ck_assert_int_eq(moe__cuda_zero_strided(&workers, device, count, stride, element), MOE_OK);
        same_bytes(host, device, bytes, "memory", name);
        free(host);
        ok(cudaFree(device));
    }
}
END_TEST

START_TEST(test_note_touched_forgets_if_asked)
{
    int64_t begin[] = {0, 0, 3, 3, 4};
    uint8_t before[] = {1, 0, 0, 1}, kept[] = {1, 1, 0, 1}, forgotten[] = {0, 1, 0, 1};
    moe__plan_arrays plan = {.num_experts = 4, .expert_begin = on_device(begin, sizeof begin)};
    moe__workers workers = test_workers(context, 0);
    uint8_t *touched = on_device(before, sizeof before);
    ck_assert_int_eq(moe__cuda_note_touched(&workers, touched, &plan, false), MOE_OK);
    same_bytes(kept, touched, sizeof kept, "touched", "kept");
    ck_assert_int_eq(moe__cuda_note_touched(&workers, touched, &plan, true), MOE_OK);
    same_bytes(forgotten, touched, sizeof kept, "touched", "forgotten");
    ok(cudaFree(touched));
    ok(cudaFree(plan.expert_begin));
}
END_TEST

int main(int argc, char **argv)
{
    Suite *suite = suite_create("row kernels");
    TCase *tests = tcase_create("row kernels");
    (void)argv;
    tcase_set_timeout(tests, 600);
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_add_loop_test(tests, test_dispatch_as_cpu_random, 0, 3);
    tcase_add_loop_test(tests, test_combine_as_cpu_random, 0, 3);
    tcase_add_loop_test(tests, test_output_backward_as_cpu_random, 0, 3);
    tcase_add_test(tests, test_zero_strided_as_host_random);
    tcase_add_test(tests, test_note_touched_forgets_if_asked);
    suite_add_tcase(suite, tests);
    return run_suite(suite, argc < 2);
}
