/* check_memory.c - every n-th allocation failing once, nothing leaked, and no allocation in the steady state.
 *
 * The allocator of the context counts and fails; malloc and its family, as the library's objects call
 * them, are counted by the linker's --wrap. */
#include "support/layer_case.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* ---- what the library asks the C library for --------------------------------------------------------- */

static _Atomic long c_calls;

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *memory, size_t size);
int __real_posix_memalign(void **memory, size_t alignment, size_t size);
void *__real_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_realloc(void *memory, size_t size);
int __wrap_posix_memalign(void **memory, size_t alignment, size_t size);
void *__wrap_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset);

void *__wrap_malloc(size_t size)
{
    c_calls++;
    return __real_malloc(size);
}
void *__wrap_calloc(size_t count, size_t size)
{
    c_calls++;
    return __real_calloc(count, size);
}
void *__wrap_realloc(void *memory, size_t size)
{
    c_calls++;
    return __real_realloc(memory, size);
}
int __wrap_posix_memalign(void **memory, size_t alignment, size_t size)
{
    c_calls++;
    return __real_posix_memalign(memory, alignment, size);
}
void *__wrap_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset)
{
    c_calls++;
    return __real_mmap(at, size, protection, flags, fd, offset);
}

/* ---- an allocator that fails --------------------------------------------------------------------------- */

typedef struct failing {
    long calls, fail_at; /* the call that fails, from 1; 0: none */
    long blocks;
    uint64_t bytes;
} failing;

static void *failing_alloc(void *user, uint64_t size, uint64_t alignment)
{
    failing *f = user;
    void *memory = NULL;
    if (++f->calls == f->fail_at) return NULL;
    if (__real_posix_memalign(&memory, (size_t)alignment, (size_t)size) != 0) return NULL;
    memset(memory, 0xa5, (size_t)size); /* nobody may count on zeros */
    f->blocks++;
    f->bytes += size;
    return memory;
}

static void failing_free(void *user, void *memory, uint64_t size)
{
    failing *f = user;
    f->blocks--;
    f->bytes -= size;
    free(memory);
}

static moe_context_config failing_config(failing *f)
{
    moe_context_config k;
    ck_assert_int_eq(moe_context_config_init(&k, sizeof k), MOE_OK);
    k.alloc = failing_alloc;
    k.free = failing_free;
    k.alloc_user = f;
    k.threads = 2;
    return k;
}

/* ---- a whole life ------------------------------------------------------------------------------------------ */

typedef struct life {
    moe_context *context;
    moe_gate *gate;
    moe_experts *experts;
    moe_comm *comm;
    moe_layer *layer;
    moe_pass *pass, *gate_pass;
    moe_plan *plan;
} life;

static void end_life(life *l)
{
    moe_pass_destroy(l->pass);
    moe_pass_destroy(l->gate_pass);
    moe_plan_destroy(l->plan);
    moe_layer_destroy(l->layer);
    moe_comm_destroy(l->comm);
    moe_experts_destroy(l->experts);
    moe_gate_destroy(l->gate);
    moe_context_destroy(l->context);
}

#define GO(call)                                                                                   \
    do {                                                                                           \
        moe_status go_status = (call);                                                             \
        if (go_status != MOE_OK) return go_status;                                                 \
    } while (0)

static moe_status make_objects(life *l, failing *f)
{
    moe_context_config k = failing_config(f);
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config c;
    GO(moe_context_create(&l->context, &k));
    GO(moe_gate_config_init(&g, sizeof g));
    g.d_model = 8, g.num_experts = 4, g.top_k = 2, g.kind = MOE_GATE_NOISY_TOP_K, g.bias = 1;
    g.load_weight = g.sequence_weight = 0.1;
    GO(moe_gate_create(&l->gate, l->context, &g));
    GO(moe_experts_config_init(&e, sizeof e));
    e.d_model = 8, e.d_hidden = 6, e.num_experts = 4, e.bias = 1, e.activation = MOE_ACTIVATION_SWIGLU;
    GO(moe_experts_create(&l->experts, l->context, &e));
    GO(moe_comm_create_self(&l->comm, l->context));
    GO(moe_layer_config_init(&c, sizeof c));
    c.gate = l->gate, c.experts = l->experts, c.comm = l->comm;
    GO(moe_layer_create(&l->layer, &c));
    GO(moe_pass_create(&l->pass, l->layer, NULL));
    GO(moe_pass_create_for_gate(&l->gate_pass, l->gate, NULL));
    return moe_plan_create(&l->plan, l->context);
}

static moe_status bind_per_expert(life *l, float *memory)
{
    moe_binding b;
    const void *data[4];
    for (int e = 0; e < 4; e++) data[e] = memory + e * 48;
    GO(moe_binding_init(&b, sizeof b));
    b.data_per_expert = data;
    return moe_experts_bind(l->experts, moe_experts_parameter_find(l->experts, "w1"), &b);
}

static moe_status use_objects(life *l)
{
    static float x[16 * 8], y[16 * 8], dy[16 * 8], dx[16 * 8], weights[4 * 48];
    static unsigned char saved[8192];
    const moe_plan *routed;
    int64_t size;
    moe_forward_args f;
    moe_backward_args b;
    GO(moe_forward_args_init(&f, sizeof f));
    GO(moe_backward_args_init(&b, sizeof b));
    f.tokens = 9, f.x = x, f.y = y, f.flags = MOE_FORWARD_TRAIN;
    b.dy = dy, b.dx = dx;
    GO(moe_layer_forward(l->layer, l->pass, &f));
    GO(moe_layer_backward(l->layer, l->pass, &b));
    GO(moe_pass_reserve(l->pass, 16, 2, MOE_FROM_CONFIG));
    f.tokens = 16;
    GO(moe_layer_forward(l->layer, l->pass, &f));
    GO(moe_pass_plan(l->pass, &routed));
    GO(moe_plan_copy(l->plan, routed));
    GO(moe_plan_save(l->plan, saved, sizeof saved, &size));
    GO(moe_plan_load(l->plan, saved, size));
    f.y = NULL;
    GO(moe_gate_forward(l->gate, l->gate_pass, &f));
    GO(bind_per_expert(l, weights));
    f.y = y, f.flags = MOE_FORWARD_NO_SAVE;
    return moe_layer_forward(l->layer, l->pass, &f);
}

START_TEST(test_memory_survives_every_failing_allocation)
{
    long tried = 0;
    for (long n = 1;; n++) {
        failing f = {.fail_at = n};
        life l = {0};
        moe_status status = make_objects(&l, &f);
        if (status == MOE_OK) status = use_objects(&l);
        int reached = f.calls >= n;
        if (reached) {
            ck_assert_msg(status == MOE_ERROR_OUT_OF_MEMORY, "allocation %ld failed: %s (%s)", n,
                          moe_status_name(status), moe_last_error());
            if (l.plan && l.pass && l.gate_pass) /* all objects are there: the same calls work now */
                ck_assert_msg(use_objects(&l) == MOE_OK, "after allocation %ld: %s", n, moe_last_error());
        }
        end_life(&l);
        ck_assert_msg(f.blocks == 0 && f.bytes == 0, "allocation %ld: %ld blocks leaked", n, f.blocks);
        if (!reached) {
            ck_assert_int_eq(status, MOE_OK);
            break;
        }
        tried = n;
    }
    printf("every one of %ld allocations failed once\n", tried);
    ck_assert_int_gt(tried, 20);
}
END_TEST

/* ---- the steady state ---------------------------------------------------------------------------------- */

/* No assertion here: the test library allocates in them. */
static int step(layer_run *r, int64_t tokens, uint64_t flags)
{
    r->f.tokens = tokens;
    r->f.flags = flags;
    return layer_run_forward(r) != MOE_OK || layer_run_backward(r) != MOE_OK ||
           moe_layer_zero_gradients(r->layer, NULL) != MOE_OK;
}

START_TEST(test_memory_second_step_allocates_nothing)
{
    layer_case c = {.name = "steady", .T = 300, .D = 40, .E = 6, .F = 50, .K = 2, .kind = MOE_GATE_NOISY_TOP_K,
                    .activation = MOE_ACTIVATION_SWIGLU, .weight = {0.1, 0.1, 0.1, 0.1, 0.1, 0.1}};
    failing f = {0};
    layer_run r;
    layer_case_make(&c, 1);
    moe_context_config k = failing_config(&f);
    layer_run_make(&r, &c, MOE_DTYPE_F32, &k);
    if (_i) ck_assert_int_eq(moe_pass_reserve(r.pass, 300, 1, MOE_FROM_CONFIG), MOE_OK);
    int bad = step(&r, _i ? 1 : 300, MOE_FORWARD_TRAIN); /* the threads are started by the first work */
    long calls = f.calls, of_c = c_calls;
    for (int i = 0; i < 5; i++) bad += step(&r, 300 - 50 * i, i % 2 ? 0 : MOE_FORWARD_TRAIN);
    calls = f.calls - calls;
    of_c = c_calls - of_c;
    ck_assert_int_eq(bad, 0);
    ck_assert_int_eq(calls, 0);
    ck_assert_int_eq(of_c, 0);
    layer_run_free(&r);
    ck_assert_int_eq(f.blocks, 0);
    layer_case_free(&c);
}
END_TEST

START_TEST(test_memory_of_a_pass_is_what_the_query_said)
{
    layer_case c = {.name = "query", .T = 77, .D = 24, .E = 5, .F = 30, .O = 17, .K = 3, .order = 1,
                    .groups = 2, .layer_sigmoid = 1, .expert_bias = 1, .weight = {0.1, 0, 0.1, 0.1, 0.1, 0.1}};
    layer_run r;
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    moe_cost_query q;
    moe_cost cost;
    layer_case_make(&c, 1);
    layer_run_make(&r, &c, _i ? MOE_DTYPE_F64 : MOE_DTYPE_F32, NULL);
    ck_assert_int_eq(moe_gate_config_init(&g, sizeof g) | moe_experts_config_init(&e, sizeof e) |
                         moe_layer_config_init(&l, sizeof l) | moe_cost_query_init(&q, sizeof q) |
                         moe_cost_init(&cost, sizeof cost), MOE_OK);
    ck_assert_int_eq(moe_gate_get_config(r.gate, &g), MOE_OK);
    ck_assert_int_eq(moe_experts_get_config(r.experts, &e), MOE_OK);
    ck_assert_int_eq(moe_layer_get_config(r.layer, &l), MOE_OK);
    q.gate = &g, q.experts = &e, q.layer = &l, q.tokens = 77, q.groups = 2, q.flags = MOE_FORWARD_TRAIN;
    q.threads = moe_context_threads(r.context);
    ck_assert_msg(moe_layer_memory(&q, &cost) == MOE_OK, "%s", moe_last_error());
    ck_assert_int_eq(layer_run_forward(&r), MOE_OK);
    ck_assert_int_eq(moe_pass_bytes(r.pass), cost.pass_bytes);
    int64_t count = 0;
    for (int64_t i = 0; i < moe_layer_parameter_count(r.layer); i++) {
        moe_parameter_record p;
        ck_assert_int_eq(moe_parameter_record_init(&p, sizeof p), MOE_OK);
        ck_assert_int_eq(moe_layer_parameter(r.layer, i, &p), MOE_OK);
        count += p.element_count;
    }
    ck_assert_int_eq(cost.parameter_count, count);
    ck_assert_int_eq(cost.parameter_bytes, count * (_i ? 8 : 4));
    ck_assert_int_eq(cost.active_parameters, 24 * 5 + 3 * (24 * 30 + 30 * 17 + 30 + 17));
    ck_assert_int_eq(moe_layer_flops(&q, &cost), MOE_OK);
    ck_assert_int_eq(cost.forward_flops, 2 * 77 * (24 * 5 + 3 * (24 * 30 + 30 * 17 + 17)));
    ck_assert_int_eq(cost.backward_flops, 2 * cost.forward_flops);

    /* A workspace of that size is enough, and one byte less is not. */
    moe_pass_config config;
    void *workspace = NULL;
    ck_assert_int_eq(__real_posix_memalign(&workspace, 64, (size_t)cost.pass_bytes), 0);
    ck_assert_int_eq(moe_pass_config_init(&config, sizeof config), MOE_OK);
    for (int less = 0; less < 2; less++) {
        moe_pass_destroy(r.pass);
        config.workspace = workspace;
        config.workspace_bytes = cost.pass_bytes - less;
        ck_assert_int_eq(moe_pass_create(&r.pass, r.layer, &config), MOE_OK);
        ck_assert_int_eq(layer_run_forward(&r), less ? MOE_ERROR_BUFFER_TOO_SMALL : MOE_OK);
    }
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "bytes of workspace"));
    layer_run_free(&r);
    free(workspace);
    layer_case_free(&c);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("memory");
    TCase *tests = tcase_create("allocation");
    tcase_set_timeout(tests, 300);
    tcase_add_test(tests, test_memory_survives_every_failing_allocation);
    tcase_add_loop_test(tests, test_memory_second_step_allocates_nothing, 0, 2);
    tcase_add_loop_test(tests, test_memory_of_a_pass_is_what_the_query_said, 0, 2);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
