/* check_kernel_twin.c - the build with TWIN=1 notices what it is for: a fast table that differs
 * from the plain one in a bit, in each slot. Runs in every build: the fast table is a false one.
 */
#include "support/layer_case.h"
#include "support/suite.h"

#include "cpu/twin/twin.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern const moe__backend moe__cpu_table_f32_plain;
#define PLAIN (&moe__cpu_table_f32_plain)

/* ---- a table that is wrong in one slot ------------------------------------------------------- */

static const char *wrong; /* slot; NULL: none */

/* What is spoiled, by the names of the slots' parameters. */
#define AT_route_count entries
#define AT_route_forward job->weight
#define AT_second_forward job->logits
#define AT_second_backward job->dx_rows
#define AT_losses_forward job->importance
#define AT_gate_backward job->losses->route->level[0].d_weight_matrix.base
#define AT_batch_forward job->mask
#define AT_entries_taken entries
#define AT_everyone_forward plan->weight_of_entry
#define AT_write_results losses_out
#define AT_plan_rows job->plan->row_of_entry
#define AT_mix_forward job->coefficient
#define AT_mix_backward job->dx
#define AT_dispatch_forward job->rows_out
#define AT_dispatch_backward job->tokens_out
#define AT_combine_forward job->tokens_out
#define AT_combine_backward job->entry_weight_grad
#define AT_experts_forward job->out
#define AT_experts_backward job->db2.base
#define AT_output_backward job->tokens_out
#define AT_matrices_copy job->to.base

/* A shared expert has no bias. */
static void spoil(void *at)
{
    if (at) *(unsigned char *)at ^= 1;
}

#define FALSE_SLOT(v, slot, parameters, arguments)                                \
    static moe_status v##_##slot parameters                                       \
    {                                                                             \
        moe_status status = PLAIN->slot arguments;                                \
        if (status == MOE_OK && wrong && !strcmp(wrong, #slot)) spoil(AT_##slot); \
        return status;                                                            \
    }
MOE__KERNEL_TWIN_SLOTS(FALSE_SLOT, bad)

static int64_t bad_worker_bytes(const moe__pass_shape *shape) { return PLAIN->worker_bytes(shape); }
static const moe__backend false_table = {.name = "false",
                                         .worker_bytes = bad_worker_bytes,
                                         MOE__KERNEL_TWIN_SLOTS(MOE__KERNEL_TWIN_FIELD, bad)};
MOE__KERNEL_TWIN_TABLE(watched, &false_table, PLAIN, MOE_DTYPE_F32)

/* ---- a layer on that table ------------------------------------------------------------------- */

enum { T = 10, D = 8, F = 12, E = 4 };

typedef struct host {
    int calls, failing; /* of the allocator: the call that fails; 0: none */
    int forwards, backwards;
} host;

static void *host_alloc(void *user, uint64_t bytes, uint64_t alignment)
{
    host *h = user;
    void *memory = NULL;
    if (h->failing && ++h->calls == h->failing) return NULL;
    return posix_memalign(&memory, (size_t)alignment, (size_t)bytes) == 0 ? memory : NULL;
}
static void host_free(void *user, void *memory, uint64_t bytes)
{
    (void)user, (void)bytes;
    free(memory);
}

static int32_t host_forward(void *user, const moe_expert_call *call)
{
    ((host *)user)->forwards++;
    memcpy(call->out, call->x, (size_t)(call->rows * D) * sizeof(float));
    return 0;
}
static int32_t host_backward(void *user, const moe_expert_call *call)
{
    ((host *)user)->backwards++;
    memcpy(call->dx, call->dout, (size_t)(call->rows * D) * sizeof(float));
    return 0;
}

typedef struct unit {
    host h;
    moe_context *context;
    moe_gate *gate;
    moe_experts *pool, *shared;
    moe_layer *layer;
    moe_pass *pass;
    float x[T * D], y[T * D], dx[T * D], losses[MOE_LOSS_SLOTS];
} unit;

static moe_expert_callbacks callbacks_of(unit *u)
{
    moe_expert_callbacks c;
    MUST(moe_expert_callbacks_init(&c, sizeof c));
    c.user = &u->h, c.forward = host_forward, c.backward = host_backward;
    return c;
}

/* A gate of `kind` over experts, those of the host if `callback`; a shared expert with a gate, and
 * an output function. The tables are the watched ones, or the plain one by itself. */
static unit *make_unit(int32_t kind, int callback, int watched)
{
    unit *u = calloc(1, sizeof *u);
    moe_context_config c;
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    const moe_expert_callbacks callbacks = callbacks_of(u);
    MUST(moe_context_config_init(&c, sizeof c));
    c.threads = 1, c.alloc = host_alloc, c.free = host_free, c.alloc_user = &u->h;
    MUST(moe_context_create(&u->context, &c));
    u->context->kernels[MOE_DTYPE_F32] = watched ? &watched_twins : PLAIN;
    MUST(moe_gate_config_init(&g, sizeof g));
    g.d_model = D, g.num_experts = E, g.top_k = 2, g.kind = kind, g.importance_weight = 0.1f;
    MUST(moe_gate_create(&u->gate, u->context, &g));
    MUST(moe_experts_config_init(&e, sizeof e));
    e.d_model = D, e.num_experts = 1, e.d_hidden = F;
    MUST(moe_experts_create(&u->shared, u->context, &e));
    e.num_experts = E;
    if (callback)
        e.kind = MOE_EXPERTS_CALLBACK, e.d_hidden = 0, e.callbacks = &callbacks;
    else
        e.bias = 1, e.storage = MOE_STORAGE_PREPACKED, e.activation = MOE_ACTIVATION_SWIGLU;
    MUST(moe_experts_create(&u->pool, u->context, &e));
    MUST(moe_layer_config_init(&l, sizeof l));
    l.gate = u->gate, l.experts = u->pool, l.shared = u->shared, l.shared_gate = 1;
    l.output = MOE_OUTPUT_SIGMOID;
    MUST(moe_layer_create(&u->layer, &l));
    MUST(moe_layer_init_parameters(u->layer, 1));
    MUST(moe_pass_create(&u->pass, u->layer, NULL));
    for (int i = 0; i < T * D; i++) u->x[i] = (float)((i * 37) % 19 - 9) / 8;
    return u;
}

static void free_unit(unit *u)
{
    moe_pass_destroy(u->pass), moe_layer_destroy(u->layer), moe_gate_destroy(u->gate);
    moe_experts_destroy(u->pool), moe_experts_destroy(u->shared);
    moe_context_destroy(u->context);
    free(u);
}

static moe_status step(unit *u)
{
    moe_forward_args f;
    moe_backward_args b;
    MUST(moe_forward_args_init(&f, sizeof f));
    f.tokens = T, f.x = u->x, f.y = u->y, f.flags = MOE_FORWARD_TRAIN, f.losses_out = u->losses;
    MUST(moe_backward_args_init(&b, sizeof b));
    b.dy = u->x, b.dx = u->dx;
    MOE_TRY(moe_layer_forward(u->layer, u->pass, &f));
    return moe_layer_backward(u->layer, u->pass, &b);
}

static void must_find(moe_status status, const char *slot)
{
    char names[128];
    snprintf(names, sizeof names, ": %s: ", slot);
    if (status != MOE_ERROR_INTERNAL || !strstr(moe_last_error(), names) ||
        !strstr(moe_last_error(), "by 'false' and "))
        ck_abort_msg("%s: status %d, %s", slot, (int)status, moe_last_error());
}

/* Of a right table, or of one whose slot `wrong` is. */
static void must_be(int right, moe_status status)
{
    if (right)
        MUST(status);
    else
        must_find(status, wrong);
}

/* Each slot that a step of the layer calls. */
static const char *const in_a_step[] = {
    "route_forward",    "losses_forward",    "gate_backward",   "batch_forward",
    "everyone_forward", "write_results",     "plan_rows",       "mix_forward",
    "mix_backward",     "dispatch_backward", "combine_forward", "experts_forward",
    "experts_backward", "output_backward",   "matrices_copy",
};
enum { IN_A_STEP = sizeof in_a_step / sizeof in_a_step[0] };

START_TEST(test_twin_finds_wrong_bit_in_a_step)
{
    unit *u = make_unit(MOE_GATE_NOISY_TOP_K, 0, 1);
    wrong = in_a_step[_i];
    must_find(step(u), in_a_step[_i]);
    free_unit(u);
}
END_TEST

/* What is added to is added once: two steps are those of the plain table by itself. */
START_TEST(test_twin_right_table_changes_nothing)
{
    unit *u = make_unit(MOE_GATE_NOISY_TOP_K, 0, 1), *v = make_unit(MOE_GATE_NOISY_TOP_K, 0, 0);
    wrong = NULL;
    for (int i = 0; i < 2; i++) {
        MUST(step(u));
        MUST(step(v));
    }
    ck_assert_mem_eq(u->y, v->y, sizeof u->y);
    ck_assert_mem_eq(u->dx, v->dx, sizeof u->dx);
    for (int64_t i = 0; i < moe_layer_parameter_count(u->layer); i++) {
        moe_parameter_record p, q;
        MUST(moe_parameter_record_init(&p, sizeof p));
        MUST(moe_parameter_record_init(&q, sizeof q));
        MUST(moe_layer_parameter(u->layer, i, &p));
        MUST(moe_layer_parameter(v->layer, i, &q));
        if (p.grad) ck_assert_mem_eq(p.grad, q.grad, (size_t)p.element_count * sizeof(float));
    }
    free_unit(u), free_unit(v);
}
END_TEST

/* The host's experts are called once for every expert with rows, forward and backward. */
START_TEST(test_twin_calls_the_host_once)
{
    unit *u = make_unit(MOE_GATE_SOFTMAX_DENSE, 1, 1);
    wrong = NULL;
    MUST(step(u));
    ck_assert_int_eq(u->h.forwards, E);
    ck_assert_int_eq(u->h.backwards, E);
    free_unit(u);
}
END_TEST

/* Each allocation of a step fails once: that is the call's status. */
START_TEST(test_twin_survives_no_memory)
{
    wrong = NULL;
    for (int n = 1, done = 0; !done; n++) {
        unit *u = make_unit(MOE_GATE_NOISY_TOP_K, 0, 1);
        u->h.calls = 0, u->h.failing = n;
        moe_status status = step(u);
        u->h.failing = 0;
        done = status == MOE_OK;
        if (!done) ck_assert_int_eq(status, MOE_ERROR_OUT_OF_MEMORY);
        ck_assert(!done || n > 40); /* two copies for each of more than twenty calls */
        free_unit(u);
    }
}
END_TEST

/* ---- slots that such a step does not call ---------------------------------------------------- */

static moe__workers workers_of(unit *u)
{
    return (moe__workers){.context = u->context, .function = "test"};
}

/* Three tokens, each with two rows. */
static moe__plan_arrays plan_of(void)
{
    static int64_t token_begin[] = {0, 2, 4, 6}, row_of_entry[] = {0, 3, 1, 4, 2, 5};
    static int64_t token_of_row[] = {0, 1, 2, 0, 1, 2}, expert_begin[] = {0, 3, 6};
    static int64_t entry_of_row[] = {0, 2, 4, 1, 3, 5}, group_begin[] = {0, 3};
    static float weight[] = {0.5f, 0.25f, 1, 2, 0.125f, 3};
    return (moe__plan_arrays){.tokens = 3,
                              .entries = 6,
                              .rows = 6,
                              .num_experts = 2,
                              .groups = 1,
                              .token_begin = token_begin,
                              .row_of_entry = row_of_entry,
                              .token_of_row = token_of_row,
                              .entry_of_row = entry_of_row,
                              .expert_begin = expert_begin,
                              .group_begin = group_begin,
                              .weight_of_entry = weight,
                              .dtype = MOE_DTYPE_F32};
}

START_TEST(test_twin_finds_wrong_bit_of_rows)
{
    unit *u = make_unit(MOE_GATE_NOISY_TOP_K, 0, 1);
    moe__plan_arrays plan = plan_of();
    float out[6 * D], grad[6];
    moe__rows_job job = {.workers = workers_of(u),
                         .plan = &plan,
                         .width = 4,
                         .tokens_in = u->x,
                         .tokens_in_stride = D,
                         .rows_in = u->x,
                         .rows_in_stride = D,
                         .rows_out = out,
                         .rows_out_stride = D,
                         .entry_weight_grad = grad};
    for (int i = 0; i < 6 * D; i++) out[i] = NAN; /* 4 of each 8 stay, and are not looked at */
    for (int right = 1; right >= 0; right--) {
        moe_status status;
        wrong = right ? NULL : "dispatch_forward";
        status = watched_twins.dispatch_forward(&job);
        must_be(right, status);
        wrong = right ? NULL : "combine_backward";
        status = watched_twins.combine_backward(&job);
        must_be(right, status);
        ck_assert(isnan(out[4]) && !isnan(out[8]));
    }
    ck_assert(strstr(moe_last_error(), "entry_weight_grad[0] is ") != NULL);
    free_unit(u);
}
END_TEST

START_TEST(test_twin_finds_wrong_bit_of_second_gates)
{
    unit *u = make_unit(MOE_GATE_NOISY_TOP_K, 0, 1);
    int64_t begin[] = {0, 3}, index[] = {2, 0, 1}, tile_begin[2];
    float logits[3 * 3], dx[3 * 4], dw[4 * 3] = {0};
    moe__workers workers = workers_of(u);
    workers.worker_bytes = watched_twins.worker_bytes(NULL);
    workers.scratch = host_alloc(&u->h, (uint64_t)workers.worker_bytes, 64);
    moe__second_job job = {.workers = workers,
                           .parts = 1,
                           .part_begin = begin,
                           .segments = 1,
                           .segment_begin = begin,
                           .input_width = 4,
                           .width = 3,
                           .x = u->x,
                           .index = index,
                           .logits = logits,
                           .d = u->x,
                           .d_stride = 3,
                           .dx_rows = dx,
                           .tile_begin = tile_begin};
    job.weight_matrix = (moe__matrices){.base = u->x + 20,
                                        .stride_row = 3,
                                        .stride_col = 1,
                                        .dtype = MOE_DTYPE_F32,
                                        .wide = 1};
    job.d_weight_matrix = job.weight_matrix;
    job.d_weight_matrix.base = dw;
    for (int right = 1; right >= 0; right--) {
        wrong = right ? NULL : "second_forward";
        must_be(right, watched_twins.second_forward(&job));
        wrong = right ? NULL : "second_backward";
        must_be(right, watched_twins.second_backward(&job));
    }
    free(workers.scratch);
    free_unit(u);
}
END_TEST

START_TEST(test_twin_finds_wrong_bit_of_counts)
{
    unit *u = make_unit(MOE_GATE_NOISY_TOP_K, 0, 1);
    int64_t capacity[] = {2}, valid_begin[] = {0, 3}, entries = -1, token_begin[4];
    moe_gate_config g;
    MUST(moe_gate_config_init(&g, sizeof g));
    g.num_experts = E;
    moe__batch_job batch = {.workers = workers_of(u),
                            .groups = 1,
                            .group_capacity = capacity,
                            .valid_begin = valid_begin,
                            .config = &g};
    float logits[3 * E], threshold[E] = {0};
    moe__route_job route = {.workers = workers_of(u),
                            .config = &g,
                            .tokens = 3,
                            .groups = 1,
                            .levels = 1,
                            .choose = MOE__CHOOSE_THRESHOLD,
                            .logits_in = u->x,
                            .logits_stride = D,
                            .threshold = {.base = threshold, .stride_col = 1, .wide = 1},
                            .token_begin = token_begin,
                            .columns = u->y};
    route.level[0] = (moe__gate_level){.rows = 3, .width = E, .parts = 1, .logits = logits};
    wrong = NULL;
    MUST(watched_twins.entries_taken(&batch, &entries));
    ck_assert_int_eq(entries, 2 * E);
    MUST(watched_twins.route_count(&route, &entries));
    ck_assert_int_eq(entries, 3 * E);
    wrong = "entries_taken";
    must_find(watched_twins.entries_taken(&batch, &entries), wrong);
    wrong = "route_count";
    must_find(watched_twins.route_count(&route, &entries), wrong);
    ck_assert(strstr(moe_last_error(), "entries[0] is 13 (0x000000000000000d) by") != NULL);
    free_unit(u);
}
END_TEST

/* Of two kinds of NaN neither is wrong; a number is, and its index is that of the matrix. */
START_TEST(test_twin_compares_matrices_and_nans)
{
    static const uint32_t quiet = 0x7fc00000u, other = 0xffc00001u;
    unit *u = make_unit(MOE_GATE_NOISY_TOP_K, 0, 1);
    const moe__kernel_twin_pair pair = {&false_table, PLAIN, MOE_DTYPE_F32};
    moe__workers workers = workers_of(u);
    float memory[2 * 3 * 8];
    void *each[3] = {memory, NULL, memory + 24};
    /* [3 experts][2,4], the columns two apart, no matrix for the second expert */
    moe__matrices m = {.each = each,
                       .offset = 1,
                       .stride_row = 8,
                       .stride_col = 2,
                       .dtype = MOE_DTYPE_F32};
    for (int differs = 0; differs < 2; differs++) {
        moe__kernel_twin t = {.pair = &pair, .slot = "slot", .workers = &workers};
        for (int i = 0; i < 48; i++) memory[i] = (float)i;
        moe__kernel_twin_matrices(&t, "m", &m, 3, 2, 4);
        MUST(moe__kernel_twin_begin(&t));
        memcpy(&memory[24 + 1 + 8 + 2 * 3], &quiet, 4);
        memory[24 + 1] = 7;
        MUST(moe__kernel_twin_between(&t, MOE_OK));
        ck_assert(memory[24 + 1] == 25 && memory[24 + 15] == 39);
        memory[24 + 1] = 7;
        memcpy(&memory[24 + 1 + 8 + 2 * 3], &other, 4);
        if (differs) memory[24 + 1 + 8 + 2] = -3;
        memory[0] = 99; /* between the columns */
        moe_status status = moe__kernel_twin_end(&t, MOE_OK);
        moe__kernel_twin_free(&t);
        ck_assert_int_eq(status, differs ? MOE_ERROR_INTERNAL : MOE_OK);
    }
    ck_assert_str_eq(moe_last_error(), "test: slot: m[2,1,1] is 35 (0x420c0000) by 'false' and "
                                       "-3 (0xc0400000) by 'cpu f32_plain'");
    free_unit(u);
}
END_TEST

/* What must not happen twice is put back in the second turn, if all is as it was before it. */
START_TEST(test_twin_replays_a_hook)
{
    unit *u = make_unit(MOE_GATE_NOISY_TOP_K, 0, 1);
    const moe__kernel_twin_pair pair = {&false_table, PLAIN, MOE_DTYPE_F32};
    moe__workers workers = workers_of(u);
    for (int differs = 0; differs < 2; differs++) {
        moe__kernel_twin t = {.pair = &pair, .slot = "slot", .workers = &workers};
        float v[2] = {1, 2};
        moe__kernel_twin_vector(&t, "v", v, 2, MOE_DTYPE_F32);
        MUST(moe__kernel_twin_begin(&t));
        v[0] = 3;
        MUST(moe__kernel_twin_hook_begin(&t));
        v[1] = 5; /* the hook */
        MUST(moe__kernel_twin_hook_end(&t, MOE_OK));
        MUST(moe__kernel_twin_between(&t, MOE_OK));
        v[0] = differs ? 4 : 3;
        moe_status status = moe__kernel_twin_replay(&t);
        ck_assert_int_eq(status, differs ? MOE_ERROR_INTERNAL : MOE_OK);
        if (!differs) ck_assert(v[1] == 5);
        if (!differs) MUST(moe__kernel_twin_end(&t, MOE_OK));
        if (!differs) ck_assert_int_eq(moe__kernel_twin_replay(&t), MOE_ERROR_INTERNAL);
        moe__kernel_twin_free(&t);
    }
    free_unit(u);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("kernel twin");
    TCase *tests = add_case(suite, "kernel twin");
    tcase_add_loop_test(tests, test_twin_finds_wrong_bit_in_a_step, 0, IN_A_STEP);
    tcase_add_test(tests, test_twin_right_table_changes_nothing);
    tcase_add_test(tests, test_twin_calls_the_host_once);
    tcase_add_test(tests, test_twin_survives_no_memory);
    tcase_add_test(tests, test_twin_finds_wrong_bit_of_rows);
    tcase_add_test(tests, test_twin_finds_wrong_bit_of_second_gates);
    tcase_add_test(tests, test_twin_finds_wrong_bit_of_counts);
    tcase_add_test(tests, test_twin_compares_matrices_and_nans);
    tcase_add_test(tests, test_twin_replays_a_hook);
    return run_suite(suite, 1);
}
