/* check_plan_kernels.c - the steps that make plans, on the emulated device against the CPU: batch
 * (cuda/batch.cu) and plan_rows (cuda/rows.cu, sort.cu, scan.cu). Integers and weights to the bit. */
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

/* ---- plan_rows ------------------------------------------------------------------------------- */

static void same_plan(const moe__plan_arrays *host, const moe__plan_arrays *device)
{
    int64_t N = host->entries;
    SAME_WORDS(host->token_begin, device->token_begin, host->tokens + 1, "token_begin", name);
    SAME_WORDS(host->expert_of_entry, device->expert_of_entry, N, "expert_of_entry", name);
    SAME_WORDS(host->expert_begin, device->expert_begin, host->num_experts + 1, "expert_begin",
               name);
    SAME_WORDS(host->slot_of_entry, device->slot_of_entry, N, "slot_of_entry", name);
    SAME_WORDS(host->row_of_entry, device->row_of_entry, N, "row_of_entry", name);
    SAME_WORDS(host->token_of_row, device->token_of_row, host->rows, "token_of_row", name);
    SAME_WORDS(host->entry_of_row, device->entry_of_row, host->rows, "entry_of_row", name);
    SAME_WORDS(host->group_begin, device->group_begin, host->groups + 1, "group_begin", name);
    same_floats(host->weight_of_entry, device->weight_of_entry, N, "weight_of_entry", name);
}

static void draw_weights(moe__plan_arrays *host, moe__plan_arrays *device)
{
    size_t bytes = (size_t)host->entries * sizeof(float);
    for (int64_t n = 0; n < host->entries; n++) ((float *)host->weight_of_entry)[n] = draw_tied();
    if (bytes)
        ok(cudaMemcpy(device->weight_of_entry, host->weight_of_entry, bytes,
                      cudaMemcpyHostToDevice));
}

static void run_both(moe__plan_rows_job *host, moe__plan_rows_job *device)
{
    ck_assert_int_eq(cpu->plan_rows(host), MOE_OK);
    ck_assert_int_eq(moe__cuda_plan_rows(device), MOE_OK);
    if (!host->keep_rows) ck_assert_int_eq(device->plan->rows, -1);
    ok(cudaDeviceSynchronize());
    same_plan(host->plan, device->plan);
}

/* Everything of one job that can be drawn. */
static void draw_job(moe__plan_rows_job *job, int32_t policy)
{
    int64_t T = job->plan->tokens, G = job->plan->groups, N = job->plan->entries;
    int64_t most = 2 * N / job->plan->num_experts / G + 2;
    job->drop_policy = policy;
    job->second_choice = draw_chance(50) ? 0 : (int32_t)draw_in(0, 3);
    job->second_threshold = (double)draw_below(20) / 10;
    job->renormalize_after_drop = draw_chance(50);
    job->renormalize_minimum = draw_chance(50) ? 0.0 : 0.7;
    job->seed = draw();
    job->drop_stream = moe__stream(3, 1, MOE__PURPOSE_DROP);
    job->step = draw_below(5);
    job->token_first = draw_below(1000);
    if (draw_chance(50)) job->token_mask = draw_mask(T);
    if (!draw_chance(85)) return;
    int64_t *capacity = malloc((size_t)(G + 1) * sizeof *capacity);
    for (int64_t g = 0; g < G; g++) capacity[g] = draw_chance(15) ? -1 : draw_below(most);
    job->group_capacity = capacity;
    if (policy != MOE_DROP_BATCH_PRIORITY) return;
    float *priority = malloc((size_t)(T + 1) * sizeof *priority);
    for (int64_t t = 0; t < T; t++) priority[t] = draw_tied();
    job->token_priority = priority;
}

static void check_job(moe__plan_arrays plan, int32_t policy)
{
    int64_t T = plan.tokens, G = plan.groups;
    moe__plan_arrays on;
    device_plan(&on, &plan);
    moe__plan_rows_job host = {.workers = test_workers(context, 0), .plan = &plan};
    draw_job(&host, policy);
    moe__plan_rows_job device = host;
    device.plan = &on;
    device.token_mask = on_device(host.token_mask, (size_t)T);
    device.group_capacity = on_device(host.group_capacity, (size_t)G * sizeof(int64_t));
    device.token_priority = on_device(host.token_priority, (size_t)T * sizeof(float));
    snprintf(name, sizeof name,
             "T %lld N %lld E %lld G %lld policy %d second %d mask %d capacity %d renormalize %d",
             (ll)T, (ll)plan.entries, (ll)plan.num_experts, (ll)G, policy, host.second_choice,
             host.token_mask != NULL, host.group_capacity != NULL, host.renormalize_after_drop);
    run_both(&host, &device);

    host.keep_rows = device.keep_rows = 1; /* weights only */
    draw_weights(&plan, &on);
    run_both(&host, &device);

    host.keep_rows = device.keep_rows = 0; /* some of the slots */
    host.keep_slots = device.keep_slots = 1;
    host.group_capacity = device.group_capacity = NULL;
    for (int64_t n = 0; n < plan.entries; n++)
        if (draw_chance(20)) plan.slot_of_entry[n] = -1;
    if (plan.entries > 0)
        ok(cudaMemcpy(on.slot_of_entry, plan.slot_of_entry, (size_t)plan.entries * sizeof(int64_t),
                      cudaMemcpyHostToDevice));
    draw_weights(&plan, &on);
    run_both(&host, &device);
    free_plans(&plan, &on);
}

START_TEST(test_plan_rows_as_cpu_random)
{
    draw_state = 77 + (uint64_t)_i;
    for (int i = 0; i < test_cases(); i++) {
        int64_t T = draw_chance(5) ? draw_below(2) : draw_below(draw_chance(70) ? 60 : 300);
        int64_t K = draw_in(0, draw_chance(80) ? 8 : 40), E = draw_chance(10) ? 1 : draw_in(2, 300);
        int64_t G = draw_chance(50) ? 1 : draw_in(2, 9);
        check_job(draw_plan(T, K, E, G, draw_chance(50)), _i);
    }
}
END_TEST

/* Ids of three digits; groups of two; a token with more entries than one digit of choices. */
START_TEST(test_plan_rows_as_cpu_many_digits)
{
    draw_state = 5 + (uint64_t)_i;
    check_job(draw_plan(50, 8, 70000, 3, 1), _i);
    check_job(draw_plan(700, 2, 30, 600, 1), _i);
    check_job(draw_plan(3, 900, 300, 2, 1), _i);
    check_job(draw_plan(300, 7, 256, 1, 1), _i);
    check_job(draw_plan(300, 7, 257, 4, 0), _i);
}
END_TEST

/* So many tiles that prefix sums take three kernels. */
START_TEST(test_plan_rows_as_cpu_many_tiles)
{
    draw_state = 9;
    check_job(draw_plan(18000, 8, 300, 2, 1), MOE_DROP_TOKEN_ORDER);
}
END_TEST

/* ---- batch ----------------------------------------------------------------------------------- */

static void draw_capacity(moe_gate_config *c)
{
    static const double factors[] = {0, 0.5, 1, 1.25, 2.0 / 3, 1e300, 17};
    memset(c, 0, sizeof *c);
    c->num_experts = draw_in(1, 300);
    c->top_k = draw_in(1, 8);
    c->top_groups = draw_in(1, 3);
    c->kind = draw_chance(50) ? MOE_GATE_TOP_K : MOE_GATE_EXPERT_CHOICE;
    if (draw_chance(10)) c->kind = MOE_GATE_HIERARCHICAL;
    if (draw_chance(10)) c->kind = MOE_GATE_SOFTMAX_DENSE;
    c->capacity_kind = draw_chance(30) ? MOE_CAPACITY_NUMBER : MOE_CAPACITY_FACTOR;
    c->capacity = draw_below(20);
    c->capacity_factor = factors[draw_below(7)];
    c->capacity_factor_eval = draw_chance(30) ? factors[draw_below(7)] : 0;
    c->capacity_rounding = (int32_t)draw_in(0, 4);
    c->capacity_minimum = draw_chance(30) ? draw_below(9) : 0;
    c->capacity_multiple = draw_chance(30) ? draw_below(9) : 0;
}

typedef struct batch_outputs {
    moe__plan_arrays plan, primary;
    uint8_t *mask;
    int64_t *valid_token, *valid_begin, *second_begin, *group_capacity;
} batch_outputs;

static void set_outputs(moe__batch_job *job, batch_outputs *out, int primary, int limited)
{
    job->plan = &out->plan;
    job->mask = out->mask;
    job->valid_token = out->valid_token;
    job->valid_begin = out->valid_begin;
    job->primary = primary ? &out->primary : NULL;
    job->second_begin = out->second_begin;
    job->group_capacity = limited ? out->group_capacity : NULL;
}

static void check_batch(int64_t T, int64_t G)
{
    moe_gate_config config;
    int primary = draw_chance(30), limited = draw_chance(80);
    int64_t A = draw_in(1, 4), *groups = malloc((size_t)(G + 1) * sizeof *groups);
    moe__pass_shape shape = {.tokens = T, .groups = G};
    draw_capacity(&config);
    draw_groups(groups, T, G);
    batch_outputs host = {
        host_plan(T, 0, 1, G),          host_plan(T, T * A, 1, G), host_array(T, 1),
        host_array(T, sizeof(int64_t)), host_array(G + 1, 8),      host_array(T * A + 1, 8),
        host_array(G, sizeof(int64_t))};
    batch_outputs device = {host.plan,
                            host.primary,
                            on_device(host.mask, (size_t)T),
                            on_device(host.valid_token, (size_t)T * 8),
                            on_device(host.valid_begin, (size_t)(G + 1) * 8),
                            on_device(host.second_begin, (size_t)(T * A + 1) * 8),
                            on_device(host.group_capacity, (size_t)G * 8)};
    device_plan(&device.plan, &host.plan);
    device_plan(&device.primary, &host.primary);
    moe__batch_job job = {.workers = test_workers(context, moe__cuda_batch_scratch(&shape)),
                          .tokens = T,
                          .groups = G,
                          .entries_per_token = draw_below(9),
                          .group_begin = G > 1 || draw_chance(50) ? groups : NULL,
                          .token_mask = draw_chance(60) ? draw_mask(T) : NULL,
                          .primary_per_token = A,
                          .second_per_row = draw_below(5),
                          .config = &config,
                          .capacity = draw_chance(20) ? draw_below(30) : MOE_FROM_CONFIG,
                          .train = draw_chance(50)};
    moe__batch_job other = job;
    set_outputs(&job, &host, primary, limited);
    set_outputs(&other, &device, primary, limited);
    other.token_mask = on_device(job.token_mask, (size_t)T);
    snprintf(name, sizeof name, "T %lld G %lld mask %d primary %d limited %d kind %d", (ll)T, (ll)G,
             job.token_mask != NULL, primary, limited, config.kind);
    for (int given = 0; given < 2; given++) { /* the second call finds the plan there */
        int64_t taken = 0, found = 0;
        job.given = other.given = given;
        ck_assert_int_eq(cpu->batch_forward(&job), MOE_OK);
        ck_assert_int_eq(moe__cuda_batch_forward(&other), MOE_OK);
        SAME_WORDS(host.plan.token_begin, device.plan.token_begin, T + 1, "token_begin", name);
        SAME_WORDS(host.plan.group_begin, device.plan.group_begin, G + 1, "group_begin", name);
        SAME_WORDS(host.primary.token_begin, device.primary.token_begin, T + 1, "primary", name);
        SAME_WORDS(host.primary.group_begin, device.primary.group_begin, G + 1, "primary", name);
        SAME_WORDS(host.mask, device.mask, T, "mask", name);
        SAME_WORDS(host.valid_token, device.valid_token, T, "valid_token", name);
        SAME_WORDS(host.valid_begin, device.valid_begin, G + 1, "valid_begin", name);
        SAME_WORDS(host.second_begin, device.second_begin, T * A + 1, "second_begin", name);
        SAME_WORDS(host.group_capacity, device.group_capacity, G, "group_capacity", name);
        if (!limited) continue;
        ck_assert_int_eq(cpu->entries_taken(&job, &taken), MOE_OK);
        ck_assert_int_eq(moe__cuda_entries_taken(&other, &found), MOE_OK);
        ck_assert_msg(taken == found, "%s: %lld entries, not %lld", name, (ll)found, (ll)taken);
    }
    free_plans(&host.plan, &device.plan);
    free_plans(&host.primary, &device.primary);
}

START_TEST(test_batch_as_cpu_random)
{
    draw_state = 31 + (uint64_t)_i;
    for (int i = 0; i < test_cases(); i++)
        check_batch(draw_chance(10) ? 0 : draw_below(draw_chance(80) ? 100 : 3000),
                    draw_chance(50) ? 1 : draw_in(2, draw_chance(90) ? 9 : 700));
}
END_TEST

START_TEST(test_everyone_as_cpu)
{
    for (int64_t T = 0; T < 400; T += 133)
        for (int64_t E = 1; E < 9; E += 3) {
            moe__plan_arrays host = host_plan(T, T * E, E, 1), device;
            device_plan(&device, &host);
            moe__workers workers = test_workers(context, 0);
            snprintf(name, sizeof name, "T %lld E %lld", (ll)T, (ll)E);
            ck_assert_int_eq(cpu->everyone_forward(&workers, &host), MOE_OK);
            ck_assert_int_eq(moe__cuda_everyone_forward(&workers, &device), MOE_OK);
            SAME_WORDS(host.token_begin, device.token_begin, T + 1, "token_begin", name);
            SAME_WORDS(host.expert_of_entry, device.expert_of_entry, T * E, "expert_of_entry",
                       name);
            same_floats(host.weight_of_entry, device.weight_of_entry, T * E, "weights", name);
            free_plans(&host, &device);
        }
}
END_TEST

int main(int argc, char **argv)
{
    Suite *suite = suite_create("plan kernels");
    TCase *tests = tcase_create("plan kernels"), *large = tcase_create("large");
    (void)argv;
    tcase_set_timeout(tests, 600);
    tcase_set_timeout(large, 600);
    tcase_set_tags(large, "large");
    tcase_add_checked_fixture(large, setup, teardown);
    tcase_add_test(large, test_plan_rows_as_cpu_many_tiles);
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_add_loop_test(tests, test_plan_rows_as_cpu_random, 0, 5);
    tcase_add_loop_test(large, test_plan_rows_as_cpu_many_digits, 0, 5);
    tcase_add_loop_test(tests, test_batch_as_cpu_random, 0, 2);
    tcase_add_test(tests, test_everyone_as_cpu);
    suite_add_tcase(suite, tests);
    suite_add_tcase(suite, large);
    return run_suite(suite, argc < 2);
}
