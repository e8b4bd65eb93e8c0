/* check_memory.c - every n-th allocation failing once, nothing leaked, and no allocation in the
 * steady state.
 *
 * The allocator of the context counts and fails; malloc and its family, as the library's objects
 * call them, are counted by the linker's --wrap. */
#include "support/bad_fields.h"
#include "support/layer_case.h"
#include "support/suite.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* ---- what the library asks the C library for ------------------------------------------------- */

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

/* ---- an allocator that fails ----------------------------------------------------------------- */

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

/* ---- a whole life ---------------------------------------------------------------------------- */

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

#define GO(call)                                   \
    do {                                           \
        moe_status go_status = (call);             \
        if (go_status != MOE_OK) return go_status; \
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
    e.d_model = 8, e.d_hidden = 6, e.num_experts = 4, e.bias = 1,
    e.activation = MOE_ACTIVATION_SWIGLU;
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

/* A step whose activations are made anew, with more memory than its first half, and a replay. */
static moe_status checkpoint(life *l, moe_forward_args *f, moe_backward_args *b)
{
    moe_pass *pass = NULL;
    GO(moe_pass_create(&pass, l->layer, NULL));
    f->flags = MOE_FORWARD_TRAIN | MOE_FORWARD_PLAN_ONLY;
    moe_status status = moe_layer_forward(l->layer, pass, f);
    f->flags = MOE_FORWARD_TRAIN | MOE_FORWARD_RECOMPUTE;
    if (status == MOE_OK) status = moe_layer_forward(l->layer, pass, f);
    if (status == MOE_OK) status = moe_layer_backward(l->layer, pass, b);
    f->flags = 0, f->plan = l->plan, f->plan_use = MOE_PLAN_IDS;
    if (status == MOE_OK) status = moe_layer_forward(l->layer, pass, f);
    moe_pass_destroy(pass);
    return status;
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
    GO(moe_layer_forward(l->layer, l->pass, &f));
    return checkpoint(l, &f, &b);
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
            if (l.plan && l.pass &&
                l.gate_pass) /* all objects are there: the same calls work now */
                ck_assert_msg(use_objects(&l) == MOE_OK, "after allocation %ld: %s", n,
                              moe_last_error());
        }
        end_life(&l);
        ck_assert_msg(f.blocks == 0 && f.bytes == 0, "allocation %ld: %ld blocks leaked", n,
                      f.blocks);
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

/* ---- the steady state ------------------------------------------------------------------------ */

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
    layer_case c = {.name = "steady",
                    .T = 300,
                    .D = 40,
                    .E = 6,
                    .F = 50,
                    .K = 2,
                    .kind = MOE_GATE_NOISY_TOP_K,
                    .activation = MOE_ACTIVATION_SWIGLU,
                    .weight = {0.1, 0.1, 0.1, 0.1, 0.1, 0.1}};
    failing f = {0};
    layer_run r;
    layer_case_make(&c, 1);
    moe_context_config k = failing_config(&f);
    layer_run_make(&r, &c, MOE_DTYPE_F32, &k);
    if (_i) ck_assert_int_eq(moe_pass_reserve(r.pass, 300, 1, MOE_FROM_CONFIG), MOE_OK);
    int bad = step(&r, _i ? 1 : 300,
                   MOE_FORWARD_TRAIN); /* the threads are started by the first work */
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

/* After a reserve no call up to that size allocates: other K, groups, loss weights of the call, a
 * replay, a recompute. */
static moe_status every_kind_of_step(layer_run *r, const moe_plan *plan)
{
    static const double weights[MOE_LOSS_SLOTS] = {0.1, 0.1, 0.1, 0.1, 0.1, 0.1};
    static const int64_t groups[4] = {0, 20, 20, 60};
    moe_forward_args good = r->f;
    r->f.flags = MOE_FORWARD_TRAIN;
    GO(layer_run_forward(r));
    GO(layer_run_backward(r));
    r->f.top_k = 3, r->f.groups = 3, r->f.group_begin = groups;
    GO(layer_run_forward(r));
    r->f = good, r->f.flags = MOE_FORWARD_TRAIN, r->f.loss_weights = weights;
    GO(layer_run_forward(r));
    GO(layer_run_backward(r));
    r->f = good, r->f.plan = plan, r->f.plan_use = MOE_PLAN_IDS;
    GO(layer_run_forward(r));
    r->f = good, r->f.flags = MOE_FORWARD_TRAIN | MOE_FORWARD_PLAN_ONLY;
    GO(layer_run_forward(r));
    r->f.flags = MOE_FORWARD_TRAIN | MOE_FORWARD_RECOMPUTE;
    GO(layer_run_forward(r));
    GO(layer_run_backward(r));
    r->f = good, r->f.flags = MOE_FORWARD_NO_SAVE;
    return layer_run_forward(r);
}

START_TEST(test_memory_reserved_is_enough_for_every_kind_of_step)
{
    layer_case c = {.name = "reserved",
                    .T = 60,
                    .D = 8,
                    .E = 6,
                    .F = 10,
                    .K = 2,
                    .kind = MOE_GATE_NOISY_TOP_K};
    failing f = {0};
    layer_run r;
    const moe_plan *routed;
    moe_plan *plan = NULL;
    layer_case_make(&c, 1);
    moe_context_config k = failing_config(&f);
    layer_run_make(&r, &c, MOE_DTYPE_F32, &k);
    r.b.entry_weight_grad = NULL;
    MUST(layer_run_forward(&r));
    MUST(moe_pass_plan(r.pass, &routed));
    MUST(moe_plan_create(&plan, r.context));
    MUST(moe_plan_copy(plan, routed));
    MUST(moe_pass_reserve(r.pass, 60, 3, 3));
    REFUSED(MOE_ERROR_INVALID_STATE, layer_run_backward(&r)); /* what it held is lost */
    long calls = f.calls, of_c = c_calls;
    moe_status status = every_kind_of_step(&r, plan);
    calls = f.calls - calls, of_c = c_calls - of_c;
    ck_assert_msg(status == MOE_OK, "%s", moe_last_error());
    ck_assert_int_eq(calls, 0);
    ck_assert_int_eq(of_c, 0);

    /* No slack from K or groups: only the loss weights of the call are not the config's. */
    static const double weights[MOE_LOSS_SLOTS] = {0.1, 0.1, 0.1, 0.1, 0.1, 0.1};
    moe_pass_destroy(r.pass);
    MUST(moe_pass_create(&r.pass, r.layer, NULL));
    MUST(moe_pass_reserve(r.pass, 60, 1, MOE_FROM_CONFIG));
    r.f.flags = MOE_FORWARD_TRAIN, r.f.loss_weights = weights;
    calls = f.calls;
    MUST(layer_run_forward(&r));
    ck_assert_msg(f.calls == calls,
                  "loss weights of the call made a forward allocate after a reserve");
    moe_plan_destroy(plan);
    layer_run_free(&r);
    ck_assert_int_eq(f.blocks, 0);
    layer_case_free(&c);
}
END_TEST

/* A forward that finds no memory leaves the pass with the forward it held; so does a failing
 * recompute with its plan. */
START_TEST(test_memory_failure_leaves_the_pass_as_it_was)
{
    layer_case c = {.name = "kept", .T = 50, .D = 8, .E = 6, .F = 10, .K = 2, .weight = {0.1}};
    failing f = {0};
    layer_run r;
    layer_case_make(&c, 1);
    moe_context_config k = failing_config(&f);
    layer_run_make(&r, &c, MOE_DTYPE_F32, &k);
    r.f.tokens = 20;
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    uint64_t want = layer_run_hash(&r);
    MUST(moe_layer_zero_gradients(r.layer, NULL));
    f.fail_at = f.calls + 1, r.f.tokens = 50;
    REFUSED(MOE_ERROR_OUT_OF_MEMORY, layer_run_forward(&r));
    f.fail_at = f.calls + 1;
    REFUSED(MOE_ERROR_OUT_OF_MEMORY, moe_pass_reserve(r.pass, 50, 1, 2));
    MUST(layer_run_backward(&r));
    ck_assert_uint_eq(layer_run_hash(&r), want);

    moe_pass_destroy(r.pass);
    MUST(moe_pass_create(&r.pass, r.layer, NULL));
    MUST(moe_layer_zero_gradients(r.layer, NULL));
    r.f.tokens = 20, r.f.flags = MOE_FORWARD_PLAN_ONLY;
    MUST(layer_run_forward(&r));
    r.f.flags = MOE_FORWARD_RECOMPUTE;
    f.fail_at = f.calls + 1;
    REFUSED(MOE_ERROR_OUT_OF_MEMORY, layer_run_forward(&r));
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    ck_assert_uint_eq(layer_run_hash(&r), want);
    layer_run_free(&r);
    ck_assert_int_eq(f.blocks, 0);
    layer_case_free(&c);
}
END_TEST

/* moe_pass_bytes with the host's workspace is the part that has been used. */
START_TEST(test_memory_used_of_a_workspace_is_what_it_needs)
{
    layer_case c = {.name = "workspace", .T = 50, .D = 8, .E = 6, .F = 10, .K = 2};
    layer_run r;
    moe_pass_config config;
    void *workspace = NULL;
    layer_case_make(&c, 1);
    layer_run_make(&r, &c, MOE_DTYPE_F32, NULL);
    ck_assert_int_eq(moe_pass_bytes(r.pass), 0);
    MUST(layer_run_forward(&r));
    int64_t needed = moe_pass_bytes(r.pass);
    moe_pass_destroy(r.pass);
    ck_assert_int_eq(__real_posix_memalign(&workspace, 64, (size_t)needed * 2), 0);
    MUST(moe_pass_config_init(&config, sizeof config));
    config.workspace = workspace, config.workspace_bytes = needed * 2;
    MUST(moe_pass_create(&r.pass, r.layer, &config));
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    ck_assert_int_eq(moe_pass_bytes(r.pass), needed);
    layer_run_free(&r);
    free(workspace);
    layer_case_free(&c);
}
END_TEST

static char some_workspace[4096];
START_TEST(test_pass_create_refuses_bad_workspaces)
{
    static const bad_field bad[] = {
        BAD_INTEGER(moe_pass_config, struct_size, 2, STRUCT_SIZE),
        BAD_INTEGER(moe_pass_config, struct_size, 16, STRUCT_TOO_OLD),
        BAD_INTEGER(moe_pass_config, workspace_bytes, -1, INVALID_ARGUMENT),
        BAD_POINTER(moe_pass_config, workspace, some_workspace + 1, INVALID_ARGUMENT),
        BAD_POINTER(moe_pass_config, workspace, NULL, INVALID_ARGUMENT)};
    layer_case c = {.name = "workspaces", .T = 3, .D = 8, .E = 6, .F = 10, .K = 2};
    layer_run r;
    layer_case_make(&c, 1);
    layer_run_make(&r, &c, MOE_DTYPE_F32, NULL);
    for (size_t i = 0; i < COUNT(bad); i++) {
        moe_pass_config config;
        moe_pass *untouched = (moe_pass *)(uintptr_t)16, *pass = untouched;
        MUST(moe_pass_config_init(&config, sizeof config));
        config.workspace = (void *)(((uintptr_t)some_workspace + 63) & ~(uintptr_t)63),
        config.workspace_bytes = 2048;
        bad_field_put(&bad[i], &config);
        const char *complaint = bad_field_complaint(&bad[i],
                                                    moe_pass_create(&pass, r.layer, &config));
        ck_assert_msg(complaint[0] == 0, "moe_pass_create: %s", complaint);
        ck_assert_ptr_eq(pass, untouched);
    }
    layer_run_free(&r);
    layer_case_free(&c);
}
END_TEST

/* ---- cost ------------------------------------------------------------------------------------ */

START_TEST(test_layer_cost_refuses_bad_fields)
{
    static const bad_field bad[] = {BAD_INTEGER(moe_cost_query, struct_size, 1, STRUCT_SIZE),
                                    BAD_INTEGER(moe_cost_query, tokens, -1, INVALID_ARGUMENT),
                                    BAD_INTEGER(moe_cost_query, groups, -1, INVALID_ARGUMENT),
                                    BAD_INTEGER(moe_cost_query, top_k, 0, INVALID_ARGUMENT),
                                    BAD_INTEGER(moe_cost_query, top_k, 9, INVALID_ARGUMENT),
                                    BAD_INTEGER(moe_cost_query, top_k, -2, INVALID_ARGUMENT),
                                    BAD_INTEGER(moe_cost_query, threads, -1, INVALID_ARGUMENT),
                                    BAD_INTEGER(moe_cost_query, flags, 1 << 20, INVALID_ARGUMENT),
                                    BAD_INTEGER(moe_cost_query, reserved, 1, INVALID_ARGUMENT),
                                    BAD_INTEGER(moe_cost_query, tokens, INT64_MAX, OVERFLOW)};
    moe_gate_config g;
    moe_experts_config e;
    moe_cost_query good;
    moe_cost cost;
    MUST(moe_gate_config_init(&g, sizeof g));
    MUST(moe_experts_config_init(&e, sizeof e));
    MUST(moe_cost_query_init(&good, sizeof good));
    MUST(moe_cost_init(&cost, sizeof cost));
    g.d_model = e.d_model = 8, e.d_hidden = 6, g.num_experts = e.num_experts = 8, g.top_k = 2;
    good.gate = &g, good.experts = &e, good.tokens = 5, good.threads = 2;
    cost.pass_bytes = cost.forward_flops = -77;
    for (size_t i = 0; i < COUNT(bad); i++)
        for (int flops = 0; flops < 2; flops++) {
            moe_cost_query q = good;
            bad_field_put(&bad[i], &q);
            moe_status got = flops ? moe_layer_flops(&q, &cost) : moe_layer_memory(&q, &cost);
            ck_assert_msg(got == bad[i].status, "%s %lld: %s gave %s", bad[i].name,
                          (long long)bad[i].integer, flops ? "moe_layer_flops" : "moe_layer_memory",
                          moe_status_name(got));
            ck_assert(cost.pass_bytes == -77 && cost.forward_flops == -77);
        }
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_memory(NULL, &cost));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_memory(&good, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_flops(NULL, &cost));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_flops(&good, NULL));
    e.num_experts = 7;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_memory(&good, &cost));
    e.num_experts = 8, e.dtype = MOE_DTYPE_F64; /* moe_layer_create refuses the pair as well */
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_memory(&good, &cost));
    good.gate = NULL; /* top_k must then be given */
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_memory(&good, &cost));
}
END_TEST

/* What a pass takes, asked and found, for each kind of pass and forward. */
START_TEST(test_memory_of_every_kind_of_pass_is_what_the_query_said)
{
    static const uint64_t flags[] = {0, MOE_FORWARD_TRAIN, MOE_FORWARD_NO_SAVE,
                                     MOE_FORWARD_TRAIN | MOE_FORWARD_NO_SAVE,
                                     MOE_FORWARD_TRAIN | MOE_FORWARD_PLAN_ONLY};
    static const int64_t tokens[] = {0, 1, 70};
    layer_case c = {.name = "query",
                    .T = 70,
                    .D = 8,
                    .E = 6,
                    .F = 10,
                    .O = 3,
                    .K = 2,
                    .kind = MOE_GATE_NOISY_TOP_K,
                    .expert_sigmoid = 1,
                    .activation = MOE_ACTIVATION_SWIGLU,
                    .weight = {0.1, 0.1, 0, 0, 0, 0.1}};
    moe_gate_config g;
    moe_experts_config e;
    moe_cost_query q;
    moe_cost cost;
    layer_run r;
    c.no_experts = _i == 1, c.layer_sigmoid = _i == 2;
    if (_i == 3) c.replay = 2, c.no_gate = 2, c.kind = 0, memset(c.weight, 0, sizeof c.weight);
    layer_case_make(&c, 1);
    MUST(moe_gate_config_init(&g, sizeof g));
    MUST(moe_experts_config_init(&e, sizeof e));
    MUST(moe_cost_query_init(&q, sizeof q));
    MUST(moe_cost_init(&cost, sizeof cost));
    for (size_t i = 0; i < COUNT(flags) * COUNT(tokens); i++) {
        moe_layer_config l;
        layer_run_make(&r, &c, MOE_DTYPE_F32, NULL);
        MUST(moe_layer_config_init(&l, sizeof l));
        if (r.gate) MUST(moe_gate_get_config(r.gate, &g));
        if (r.experts) MUST(moe_experts_get_config(r.experts, &e));
        if (r.layer) MUST(moe_layer_get_config(r.layer, &l));
        q.gate = r.gate ? &g : NULL, q.experts = r.experts ? &e : NULL, q.layer = &l;
        q.top_k = r.gate ? MOE_FROM_CONFIG : 2;
        q.threads = moe_context_threads(r.context);
        q.tokens = r.f.tokens = tokens[i % COUNT(tokens)];
        q.flags = r.f.flags = flags[i / COUNT(tokens)];
        if (r.plan) {
            moe_plan_args a;
            MUST(moe_plan_args_init(&a, sizeof a));
            a.tokens = q.tokens, a.num_experts = 6, a.top_k = 2, a.expert_ids = c.ids;
            MUST(moe_plan_build(r.plan, &a));
        }
        MUST(moe_layer_memory(&q, &cost));
        MUST(layer_run_forward(&r));
        ck_assert_msg(moe_pass_bytes(r.pass) == cost.pass_bytes,
                      "flags %llu, %lld tokens: the pass has %lld bytes, said %lld",
                      (unsigned long long)q.flags, (long long)q.tokens,
                      (long long)moe_pass_bytes(r.pass), (long long)cost.pass_bytes);
        layer_run_free(&r);
    }
    layer_case_free(&c);
}
END_TEST

START_TEST(test_memory_of_a_pass_is_what_the_query_said)
{
    layer_case c = {.name = "query",
                    .T = 77,
                    .D = 24,
                    .E = 5,
                    .F = 30,
                    .O = 17,
                    .K = 3,
                    .order = 1,
                    .groups = 2,
                    .layer_sigmoid = 1,
                    .expert_bias = 1,
                    .weight = {0.1, 0, 0.1, 0.1, 0.1, 0.1}};
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
                         moe_cost_init(&cost, sizeof cost),
                     MOE_OK);
    ck_assert_int_eq(moe_gate_get_config(r.gate, &g), MOE_OK);
    ck_assert_int_eq(moe_experts_get_config(r.experts, &e), MOE_OK);
    ck_assert_int_eq(moe_layer_get_config(r.layer, &l), MOE_OK);
    q.gate = &g, q.experts = &e, q.layer = &l, q.tokens = 77, q.groups = 2,
    q.flags = MOE_FORWARD_TRAIN;
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
    tcase_add_test(tests, test_memory_reserved_is_enough_for_every_kind_of_step);
    tcase_add_test(tests, test_memory_failure_leaves_the_pass_as_it_was);
    tcase_add_test(tests, test_memory_used_of_a_workspace_is_what_it_needs);
    tcase_add_test(tests, test_pass_create_refuses_bad_workspaces);
    tcase_add_test(tests, test_layer_cost_refuses_bad_fields);
    tcase_add_loop_test(tests, test_memory_of_every_kind_of_pass_is_what_the_query_said, 0, 4);
    tcase_add_loop_test(tests, test_memory_of_a_pass_is_what_the_query_said, 0, 2);
    suite_add_tcase(suite, tests);
    return run_suite(suite, 1);
}
