/* check_mix_kernels.c - the layer's own coefficients (cuda/mix.cu) on the emulated device against
 * the CPU.
 *
 * Inputs and weights are small multiples of powers of two, so that any order of a forward product
 * gives its exact sums: what is not a product's gradient is equal to the bit. */
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

typedef moe_status mix_step(moe__mix_job *);
typedef struct steps {
    int32_t dtype;
    mix_step *forward, *backward;
} steps;
static const steps STEPS_OF[] = {
    {MOE_DTYPE_F32, moe__cuda_mix_forward_f32, moe__cuda_mix_backward_f32},
    {MOE_DTYPE_BF16, moe__cuda_mix_forward_bf16, moe__cuda_mix_backward_bf16},
    {MOE_DTYPE_F16, moe__cuda_mix_forward_f16, moe__cuda_mix_backward_f16}};

/* Numbers of both sides: floats on the host, of `dtype` on the device. */
typedef struct numbers {
    float *host;
    void *device;
    int64_t count;
    int32_t dtype;
} numbers;

static uint16_t half_of(int32_t dtype, float v)
{
    return dtype == MOE_DTYPE_BF16 ? moe__to_bf16(v) : moe__to_f16(v);
}

static numbers draw_numbers(int64_t count, int32_t dtype)
{
    numbers v = {host_array(count, sizeof(float)), NULL, count, dtype};
    uint16_t *halves = host_array(count, sizeof *halves);
    for (int64_t i = 0; i < count; i++) {
        v.host[i] = (float)draw_in(-8, 8) / 8.0f;
        halves[i] = half_of(dtype, v.host[i]);
    }
    v.device = dtype == MOE_DTYPE_F32 ? on_device(v.host, (size_t)count * sizeof(float))
                                      : on_device(halves, (size_t)count * sizeof *halves);
    free(halves);
    return v;
}

/* Within a few roundings of the largest number, and one of a 16-bit number. */
static void near_numbers(const numbers *v, const char *what)
{
    float most = 1.0f, unit = v->dtype == MOE_DTYPE_F32    ? 0.0f
                              : v->dtype == MOE_DTYPE_BF16 ? 0x1p-8f
                                                           : 0x1p-11f;
    bool wide = v->dtype == MOE_DTYPE_F32;
    void *found = off_device(v->device, (size_t)v->count * (wide ? 4 : 2));
    for (int64_t i = 0; i < v->count; i++)
        most = moe__abs_f32(v->host[i]) > most ? moe__abs_f32(v->host[i]) : most;
    for (int64_t i = 0; i < v->count; i++) {
        uint16_t bits = wide ? 0 : ((uint16_t *)found)[i];
        float f = wide                         ? ((float *)found)[i]
                  : v->dtype == MOE_DTYPE_BF16 ? moe__from_bf16(bits)
                                               : moe__from_f16(bits);
        ck_assert_msg(moe__abs_f32(f - v->host[i]) <= most * (unit + 0x1p-20f),
                      "%s: %s[%lld] is %a, not %a", name, what, (ll)i, f, v->host[i]);
    }
    free(found);
}

static void check_mix(const steps *s, int64_t T, int64_t D, int32_t width, int64_t G)
{
    moe__plan_arrays plan[2], on[2];
    int64_t *groups = host_array(G + 1, 8), *valid_begin = host_array(G + 1, 8);
    int64_t *valid = host_array(T, 8), tiles[2], count = 0;
    uint8_t *mask = draw_chance(60) ? draw_mask(T) : NULL;
    moe__pass_shape shape = {.shared_gate = 1};
    moe__experts_room room = {.d_model = D};
    shape.experts = &room;
    draw_groups(groups, T, G);
    for (int64_t g = 0; g <= G; g++)
        for (valid_begin[g] = count; g < G && groups[g] < groups[g + 1]; groups[g]++)
            if (!mask || mask[groups[g]]) valid[count++] = groups[g];
    numbers x = draw_numbers(T * D, s->dtype), dx = draw_numbers(T * D, s->dtype);
    numbers w = draw_numbers(D * width, MOE_DTYPE_F32), b = draw_numbers(width, MOE_DTYPE_F32);
    numbers dw = draw_numbers(D * width, MOE_DTYPE_F32), db = draw_numbers(width, MOE_DTYPE_F32);
    numbers c = draw_numbers(T * width, MOE_DTYPE_F32), d = draw_numbers(T * width, MOE_DTYPE_F32);
    numbers in[2], out[2], grad[2];
    moe__mix_job host = {.workers = test_workers(context, 0),
                         .tokens = T,
                         .input_width = D,
                         .width = width,
                         .x = x.host,
                         .x_stride = D,
                         .weight_matrix = {.base = w.host, .stride_row = width, .stride_col = 1},
                         .token_mask = mask,
                         .coefficient = c.host,
                         .d_coefficient = d.host,
                         .dx = dx.host,
                         .dx_stride = D,
                         .d_weight_matrix = {.base = dw.host, .stride_row = width, .stride_col = 1},
                         .groups = G,
                         .valid_begin = valid_begin,
                         .valid_token = mask ? valid : NULL,
                         .tile_begin = tiles};
    host.workers.worker_bytes = (cpu->worker_bytes(NULL) + 63) & ~(int64_t)63;
    host.workers.scratch = aligned_alloc(64, (size_t)host.workers.worker_bytes);
    if (width == 2) {
        host.bias = (moe__matrices){.base = b.host, .stride_col = 1};
        host.d_bias = (moe__matrices){.base = db.host, .stride_col = 1};
    }
    moe__mix_job device = host;
    device.workers = test_workers(context, moe__cuda_mix_scratch(&shape) + 64);
    device.x = x.device;
    device.weight_matrix.base = w.device;
    device.d_weight_matrix.base = dw.device;
    device.bias.base = width == 2 ? b.device : NULL;
    device.d_bias.base = width == 2 ? db.device : NULL;
    device.token_mask = on_device(mask, (size_t)T);
    device.coefficient = c.device;
    device.d_coefficient = d.device;
    device.dx = dx.device;
    device.valid_begin = on_device(valid_begin, (size_t)(G + 1) * 8);
    device.valid_token = on_device(host.valid_token, (size_t)T * 8);
    for (int i = 0; i < width; i++) {
        plan[i] = draw_plan(T, 4, 8, 1, draw_chance(50));
        moe__plan_rows_job rows = {.workers = test_workers(context, 0),
                                   .plan = &plan[i],
                                   .token_mask = mask};
        ck_assert_int_eq(cpu->plan_rows(&rows), MOE_OK);
        device_plan(&on[i], &plan[i]);
        in[i] = draw_numbers(plan[i].entries, MOE_DTYPE_F32);
        out[i] = draw_numbers(plan[i].entries, MOE_DTYPE_F32);
        grad[i] = draw_numbers(plan[i].entries, MOE_DTYPE_F32);
        bool weighted = draw_chance(70);
        host.plan[i] = &plan[i];
        host.weight_in[i] = weighted ? in[i].host : NULL;
        host.weight_out[i] = out[i].host;
        host.entry_grad[i] = grad[i].host;
        device.plan[i] = &on[i];
        device.weight_in[i] = weighted ? in[i].device : NULL;
        device.weight_out[i] = out[i].device;
        device.entry_grad[i] = grad[i].device;
    }
    snprintf(name, sizeof name, "dtype %d T %lld D %lld width %d G %lld mask %d", s->dtype, (ll)T,
             (ll)D, width, (ll)G, mask != NULL);
    ck_assert_int_eq(cpu->mix_forward(&host), MOE_OK);
    ck_assert_int_eq(s->forward(&device), MOE_OK);
    ck_assert_int_eq(cpu->mix_backward(&host), MOE_OK);
    ck_assert_int_eq(s->backward(&device), MOE_OK);
    ok(cudaDeviceSynchronize());
    same_floats(c.host, c.device, T * width, "coefficient", name);
    same_floats(d.host, d.device, T * width, "d_coefficient", name);
    for (int i = 0; i < width; i++) {
        same_floats(out[i].host, out[i].device, out[i].count, "weight_out", name);
        same_floats(grad[i].host, grad[i].device, grad[i].count, "entry_grad", name);
    }
    near_numbers(&dx, "dx");
    near_numbers(&dw, "d_weight_matrix");
    near_numbers(&db, "d_bias");
}

START_TEST(test_mix_as_cpu_random)
{
    draw_state = 51 + (uint64_t)_i;
    for (int i = 0; i < 20; i++)
        check_mix(&STEPS_OF[_i], draw_below(draw_chance(80) ? 40 : 300), draw_in(1, 40),
                  (int32_t)draw_in(1, 2), draw_in(1, 3));
}
END_TEST

int main(int argc, char **argv)
{
    Suite *suite = suite_create("mix kernels");
    TCase *tests = tcase_create("mix kernels");
    (void)argv;
    tcase_set_timeout(tests, 600);
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_add_loop_test(tests, test_mix_as_cpu_random, 0, 3);
    suite_add_tcase(suite, tests);
    return run_suite(suite, argc < 2);
}
