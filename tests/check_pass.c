/* check_pass.c - a pass that has been trimmed: what stays, what is gone, and that the step goes on
 * as if nothing had happened; an x that has moved between forward and backward; and a layer of one
 * expert with nothing to choose. */
#include "support/real.h"
#include "support/suite.h"

#include <moe/moe.h>

#include <check.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { T = 64, D = 16, F = 96, E = 8, K = 2 };

typedef struct host {
    moe_context *context;
    moe_gate *gate;
    moe_experts *experts;
    moe_layer *layer;
    moe_pass *pass;
    float x[T * D], y[T * D], dy[T * D], dx[T * D];
} host;

static int fail_next; /* the allocation to refuse, from 1; 0: none */
static long long live;

static void *alloc(void *user, uint64_t size, uint64_t alignment)
{
    (void)user;
    if (fail_next > 0 && --fail_next == 0) return NULL;
    live += (long long)size;
    return aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
}

static void give_back(void *user, void *memory, uint64_t size)
{
    (void)user;
    live -= (long long)size;
    free(memory);
}

static void make(host *h, const moe_pass_config *config)
{
    moe_context_config c;
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    fail_next = 0;
    ck_assert_int_eq(moe_context_config_init(&c, sizeof c), MOE_OK);
    c.alloc = alloc, c.free = give_back;
    ck_assert_int_eq(moe_context_create(&h->context, &c), MOE_OK);
    ck_assert_int_eq(moe_gate_config_init(&g, sizeof g), MOE_OK);
    g.d_model = D, g.num_experts = E, g.top_k = K, g.kind = MOE_GATE_NOISY_TOP_K;
    g.importance_weight = g.load_weight = 0.1;
    g.capacity_kind = MOE_CAPACITY_FACTOR;
    ck_assert_int_eq(moe_gate_create(&h->gate, h->context, &g), MOE_OK);
    ck_assert_int_eq(moe_experts_config_init(&e, sizeof e), MOE_OK);
    e.d_model = D, e.d_hidden = F, e.num_experts = E, e.activation = MOE_ACTIVATION_SWIGLU;
    ck_assert_int_eq(moe_experts_create(&h->experts, h->context, &e), MOE_OK);
    ck_assert_int_eq(moe_layer_config_init(&l, sizeof l), MOE_OK);
    l.gate = h->gate, l.experts = h->experts, l.output = MOE_OUTPUT_SIGMOID;
    ck_assert_int_eq(moe_layer_create(&h->layer, &l), MOE_OK);
    ck_assert_int_eq(moe_layer_init_parameters(h->layer, 1), MOE_OK);
    ck_assert_int_eq(moe_pass_create(&h->pass, h->layer, config), MOE_OK);
    for (int i = 0; i < T * D; i++) {
        h->x[i] = (float)((i * 7919) % 101) / 50.0f - 1;
        h->dy[i] = (float)((i * 104729) % 103) / 51.0f - 1;
    }
}

static void free_all(host *h)
{
    moe_pass_destroy(h->pass);
    moe_layer_destroy(h->layer);
    moe_experts_destroy(h->experts);
    moe_gate_destroy(h->gate);
    moe_context_destroy(h->context);
}

/* The last host of a test: nothing may be left. */
static void drop(host *h)
{
    free_all(h);
    ck_assert_int_eq(live, 0);
}

static moe_status forward(host *h, uint64_t flags)
{
    moe_forward_args f;
    ck_assert_int_eq(moe_forward_args_init(&f, sizeof f), MOE_OK);
    f.flags = MOE_FORWARD_TRAIN | flags;
    f.tokens = T, f.x = h->x, f.y = flags & MOE_FORWARD_RECOMPUTE ? NULL : h->y;
    return moe_layer_forward(h->layer, h->pass, &f);
}

static moe_status backward(host *h)
{
    moe_backward_args b;
    ck_assert_int_eq(moe_backward_args_init(&b, sizeof b), MOE_OK);
    b.flags = MOE_BACKWARD_OVERWRITE, b.dy = h->dy, b.dx = h->dx;
    return moe_layer_backward(h->layer, h->pass, &b);
}

static void assert_same_gradients(const moe_layer *a, const moe_layer *b)
{
    for (int64_t i = 0; i < moe_layer_parameter_count(a); i++) {
        moe_parameter_record p, q;
        ck_assert_int_eq(moe_parameter_record_init(&p, sizeof p), MOE_OK);
        ck_assert_int_eq(moe_parameter_record_init(&q, sizeof q), MOE_OK);
        ck_assert_int_eq(moe_layer_parameter(a, i, &p), MOE_OK);
        ck_assert_int_eq(moe_layer_parameter(b, i, &q), MOE_OK);
        ck_assert_int_eq(memcmp(p.grad, q.grad, (size_t)p.element_count * sizeof(float)), 0);
    }
}

/* y, dx and every gradient of two hosts are the same bytes. */
static void assert_same(const host *a, const host *b)
{
    ck_assert_int_eq(memcmp(a->y, b->y, sizeof a->y), 0);
    ck_assert_int_eq(memcmp(a->dx, b->dx, sizeof a->dx), 0);
    assert_same_gradients(a->layer, b->layer);
}

static double total_loss(const moe_pass *pass)
{
    moe_losses l;
    ck_assert_int_eq(moe_losses_init(&l, sizeof l), MOE_OK);
    ck_assert_int_eq(moe_pass_losses(pass, &l), MOE_OK);
    return l.total;
}

static int has_tensor(const moe_pass *pass, int32_t what)
{
    moe_tensor_view v;
    ck_assert_int_eq(moe_tensor_view_init(&v, sizeof v), MOE_OK);
    return moe_pass_tensor(pass, what, &v) == MOE_OK;
}

START_TEST(test_pass_trim_keeps_the_routing_and_nothing_else)
{
    static host plain, trimmed;
    const moe_plan *plan;
    moe_plan *kept;
    int64_t size = 0, again = 0;
    static char bytes[65536], after[65536];
    make(&plain, NULL), make(&trimmed, NULL);
    ck_assert_int_eq(forward(&plain, 0), MOE_OK);
    ck_assert_int_eq(backward(&plain), MOE_OK);

    ck_assert_int_eq(forward(&trimmed, MOE_FORWARD_PLAN_ONLY), MOE_OK);
    double loss = total_loss(trimmed.pass);
    int64_t before = moe_pass_bytes(trimmed.pass);
    ck_assert_int_eq(moe_pass_plan(trimmed.pass, &plan), MOE_OK);
    ck_assert_int_eq(moe_plan_save(plan, bytes, sizeof bytes, &size), MOE_OK);
    ck_assert(has_tensor(trimmed.pass, MOE_TENSOR_COUNTS));
    for (int twice = 0; twice < 2; twice++) {
        ck_assert_int_eq(moe_pass_trim(trimmed.pass), MOE_OK);
        ck_assert_int_lt(moe_pass_bytes(trimmed.pass), before / 20);
        ck_assert_int_gt(moe_pass_bytes(trimmed.pass), 0);
    }
    ck_assert(total_loss(trimmed.pass) == loss && loss == total_loss(plain.pass));
    for (int32_t what = MOE_TENSOR_LOGITS; what <= MOE_TENSOR_ROWS; what++)
        ck_assert(!has_tensor(trimmed.pass, what));
    ck_assert_int_eq(moe_pass_plan(trimmed.pass, &plan), MOE_OK);
    ck_assert_int_eq(moe_plan_check(plan), MOE_OK);
    ck_assert_int_eq(moe_plan_save(plan, after, sizeof after, &again), MOE_OK);
    ck_assert(size == again && memcmp(bytes, after, (size_t)size) == 0);
    ck_assert_int_eq(moe_plan_create(&kept, trimmed.context), MOE_OK);
    ck_assert_int_eq(moe_plan_copy(kept, plan), MOE_OK);
    moe_plan_destroy(kept);

    ck_assert_int_eq(backward(&trimmed), MOE_ERROR_INVALID_STATE);
    ck_assert_int_eq(forward(&trimmed, MOE_FORWARD_RECOMPUTE), MOE_OK);
    ck_assert_int_eq(backward(&trimmed), MOE_OK);
    assert_same(&plain, &trimmed);
    ck_assert(has_tensor(trimmed.pass, MOE_TENSOR_COUNTS) && total_loss(trimmed.pass) == loss);
    free_all(&trimmed);
    drop(&plain);
}
END_TEST

START_TEST(test_pass_trim_leaves_activations_alone)
{
    static host plain, trimmed;
    make(&plain, NULL), make(&trimmed, NULL);
    ck_assert_int_eq(forward(&plain, 0), MOE_OK);
    ck_assert_int_eq(forward(&trimmed, 0), MOE_OK);
    ck_assert_int_eq(moe_pass_trim(trimmed.pass), MOE_OK);
    ck_assert_int_eq(moe_pass_bytes(trimmed.pass), moe_pass_bytes(plain.pass));
    ck_assert(has_tensor(trimmed.pass, MOE_TENSOR_LOGITS));
    ck_assert_int_eq(backward(&plain), MOE_OK);
    ck_assert_int_eq(backward(&trimmed), MOE_OK);
    assert_same(&plain, &trimmed);
    free_all(&plain);
    drop(&trimmed);
}
END_TEST

START_TEST(test_pass_trim_makes_an_idle_pass_new)
{
    static host h;
    const moe_plan *plan;
    make(&h, NULL);
    ck_assert_int_eq(moe_pass_trim(h.pass), MOE_OK); /* before any forward */
    for (int twice = 0; twice < 2; twice++) {
        ck_assert_int_eq(forward(&h, MOE_FORWARD_NO_SAVE), MOE_OK);
        ck_assert_int_gt(moe_pass_bytes(h.pass), 0);
        ck_assert_int_eq(moe_pass_trim(h.pass), MOE_OK);
        ck_assert_int_eq(moe_pass_bytes(h.pass), 0);
        ck_assert_int_eq(moe_pass_plan(h.pass, &plan), MOE_ERROR_INVALID_STATE);
        ck_assert(!has_tensor(h.pass, MOE_TENSOR_COUNTS));
        ck_assert_int_eq(forward(&h, MOE_FORWARD_RECOMPUTE), MOE_ERROR_INVALID_STATE);
    }
    ck_assert_int_eq(moe_pass_reserve(h.pass, T, 1, MOE_FROM_CONFIG), MOE_OK);
    ck_assert_int_gt(moe_pass_bytes(h.pass), 0);
    ck_assert_int_eq(moe_pass_trim(h.pass), MOE_OK);
    ck_assert_int_eq(moe_pass_bytes(h.pass), 0);
    ck_assert_int_eq(moe_pass_trim(NULL), MOE_ERROR_INVALID_ARGUMENT);
    drop(&h);
}
END_TEST

START_TEST(test_pass_trim_leaves_the_hosts_workspace_alone)
{
    static host h;
    moe_pass_config w;
    int64_t bytes = ON_DEVICE ? 16 << 20 : 4 << 20;
    void *workspace = aligned_alloc(64, (size_t)bytes);
    ck_assert_int_eq(moe_pass_config_init(&w, sizeof w), MOE_OK);
    w.workspace = workspace, w.workspace_bytes = bytes;
    make(&h, &w);
    ck_assert_int_eq(forward(&h, MOE_FORWARD_PLAN_ONLY), MOE_OK);
    int64_t used = moe_pass_bytes(h.pass);
    ck_assert_int_eq(moe_pass_trim(h.pass), MOE_OK);
    ck_assert_int_eq(moe_pass_bytes(h.pass), used);
    ck_assert(has_tensor(h.pass, MOE_TENSOR_COUNTS));
    ck_assert_int_eq(forward(&h, MOE_FORWARD_RECOMPUTE), MOE_OK);
    ck_assert_int_eq(backward(&h), MOE_OK);
    drop(&h);
    free(workspace);
}
END_TEST

START_TEST(test_pass_trim_without_memory_changes_nothing)
{
    static host h;
    const moe_plan *plan;
    make(&h, NULL);
    ck_assert_int_eq(forward(&h, MOE_FORWARD_PLAN_ONLY), MOE_OK);
    int64_t bytes = moe_pass_bytes(h.pass);
    fail_next = 1;
    ck_assert_int_eq(moe_pass_trim(h.pass), MOE_ERROR_OUT_OF_MEMORY);
    ck_assert_int_eq(moe_pass_bytes(h.pass), bytes);
    ck_assert(has_tensor(h.pass, MOE_TENSOR_COUNTS));
    ck_assert_int_eq(moe_pass_plan(h.pass, &plan), MOE_OK);
    ck_assert_int_eq(moe_plan_check(plan), MOE_OK);
    ck_assert_int_eq(forward(&h, MOE_FORWARD_RECOMPUTE), MOE_OK);
    ck_assert_int_eq(backward(&h), MOE_OK);
    drop(&h);
}
END_TEST

/* x in another place with other strides, the old place spoiled: the same gradients. */
START_TEST(test_pass_backward_takes_x_where_it_lies_now)
{
    static host plain, moved;
    static float wide[T * (D + 5)];
    moe_backward_args b;
    make(&plain, NULL), make(&moved, NULL);
    ck_assert_int_eq(forward(&plain, 0), MOE_OK);
    ck_assert_int_eq(backward(&plain), MOE_OK);
    ck_assert_int_eq(forward(&moved, 0), MOE_OK);
    for (int t = 0; t < T; t++) memcpy(wide + t * (D + 5), moved.x + t * D, D * sizeof(float));
    memset(moved.x, 0xff, sizeof moved.x); /* NaN */
    ck_assert_int_eq(moe_backward_args_init(&b, sizeof b), MOE_OK);
    b.flags = MOE_BACKWARD_OVERWRITE, b.dy = moved.dy, b.dx = moved.dx;
    b.x = wide, b.x_stride = D - 1;
    ck_assert_int_eq(moe_layer_backward(moved.layer, moved.pass, &b), MOE_ERROR_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "x_stride is 15"));
    b.x_stride = -1;
    ck_assert_int_eq(moe_layer_backward(moved.layer, moved.pass, &b), MOE_ERROR_INVALID_ARGUMENT);
    b.x_stride = D + 5;
    ck_assert_int_eq(moe_layer_backward(moved.layer, moved.pass, &b), MOE_OK);
    assert_same(&plain, &moved);
    memcpy(moved.x, plain.x, sizeof moved.x); /* and the next one where it was */
    ck_assert_int_eq(backward(&moved), MOE_OK);
    assert_same(&plain, &moved);
    free_all(&plain);
    drop(&moved);
}
END_TEST

/* A program built before the strides were there: a shorter struct, and the forward's strides. */
START_TEST(test_pass_backward_of_the_first_release)
{
    static host h, plain;
    moe_backward_args b;
    make(&h, NULL), make(&plain, NULL);
    ck_assert_int_eq(forward(&plain, 0), MOE_OK);
    ck_assert_int_eq(backward(&plain), MOE_OK);
    ck_assert_int_eq(forward(&h, 0), MOE_OK);
    memset(&b, 0xff, sizeof b);
    ck_assert_int_eq(moe_backward_args_init(&b, offsetof(moe_backward_args, x_stride)), MOE_OK);
    b.flags = MOE_BACKWARD_OVERWRITE, b.dy = h.dy, b.dx = h.dx, b.x = h.x;
    ck_assert_int_eq(moe_layer_backward(h.layer, h.pass, &b), MOE_OK);
    assert_same(&plain, &h);
    ck_assert_int_eq(moe_backward_args_init(&b, offsetof(moe_backward_args, stream)),
                     MOE_ERROR_STRUCT_TOO_OLD);
    free_all(&plain);
    drop(&h);
}
END_TEST

/* ---- a network of one expert: no gate, no plan ----------------------------------------------- */

typedef struct network {
    moe_context *context;
    moe_experts *experts;
    moe_layer *layer;
    moe_pass *pass;
    float y[T * D], dx[T * D], entry_grad[T];
} network;

static void make_network(network *n, int64_t count)
{
    moe_experts_config e;
    moe_layer_config l;
    ck_assert_int_eq(moe_context_create(&n->context, NULL), MOE_OK);
    ck_assert_int_eq(moe_experts_config_init(&e, sizeof e), MOE_OK);
    e.d_model = D, e.d_hidden = F, e.num_experts = count, e.bias = 1;
    ck_assert_int_eq(moe_experts_create(&n->experts, n->context, &e), MOE_OK);
    ck_assert_int_eq(moe_experts_init_parameters(n->experts, 4), MOE_OK);
    ck_assert_int_eq(moe_layer_config_init(&l, sizeof l), MOE_OK);
    l.experts = n->experts, l.output = MOE_OUTPUT_SIGMOID;
    ck_assert_int_eq(moe_layer_create(&n->layer, &l), MOE_OK);
    ck_assert_int_eq(moe_pass_create(&n->pass, n->layer, NULL), MOE_OK);
}

static void free_network(network *n)
{
    moe_pass_destroy(n->pass), moe_layer_destroy(n->layer);
    moe_experts_destroy(n->experts), moe_context_destroy(n->context);
}

/* One step with `plan` or without; with `recompute` in two forwards. */
static void run_network(network *n, const float *x, const float *dy, const uint8_t *mask,
                        const moe_plan *plan, int recompute)
{
    moe_forward_args f;
    moe_backward_args b;
    ck_assert_int_eq(moe_forward_args_init(&f, sizeof f), MOE_OK);
    f.tokens = T, f.x = x, f.y = n->y, f.token_mask = mask, f.plan = plan;
    f.flags = recompute ? MOE_FORWARD_PLAN_ONLY : 0;
    ck_assert_int_eq(moe_layer_forward(n->layer, n->pass, &f), MOE_OK);
    if (recompute) {
        ck_assert_int_eq(moe_pass_trim(n->pass), MOE_OK);
        f.flags = MOE_FORWARD_RECOMPUTE, f.plan = NULL;
        ck_assert_int_eq(moe_layer_forward(n->layer, n->pass, &f), MOE_OK);
    }
    ck_assert_int_eq(moe_backward_args_init(&b, sizeof b), MOE_OK);
    b.flags = MOE_BACKWARD_OVERWRITE;
    b.dy = dy, b.dx = n->dx, b.entry_weight_grad = n->entry_grad;
    ck_assert_int_eq(moe_layer_backward(n->layer, n->pass, &b), MOE_OK);
}

static void assert_same_network(const network *a, const network *b)
{
    ck_assert_int_eq(memcmp(a->y, b->y, sizeof a->y), 0);
    ck_assert_int_eq(memcmp(a->dx, b->dx, sizeof a->dx), 0);
    ck_assert_int_eq(memcmp(a->entry_grad, b->entry_grad, sizeof a->entry_grad), 0);
    assert_same_gradients(a->layer, b->layer);
}

START_TEST(test_pass_without_gate_or_plan_visits_the_one_expert)
{
    static network planned, plain;
    static int32_t ids[T];
    static float x[T * D], dy[T * D];
    static uint8_t mask[T];
    moe_plan *plan;
    const moe_plan *made;
    moe_plan_args a;
    for (int i = 0; i < T * D; i++) x[i] = (float)(i % 17) / 8 - 1, dy[i] = (float)(i % 13) / 6 - 1;
    for (int t = 0; t < T; t++) mask[t] = t % 5 != 2;
    make_network(&planned, 1), make_network(&plain, 1);
    ck_assert_int_eq(moe_plan_create(&plan, planned.context), MOE_OK);
    for (int masked = 0; masked < 2; masked++) {
        ck_assert_int_eq(moe_plan_args_init(&a, sizeof a), MOE_OK);
        a.tokens = T, a.num_experts = 1, a.top_k = 1, a.expert_ids = ids;
        a.token_mask = masked ? mask : NULL;
        ck_assert_int_eq(moe_plan_build(plan, &a), MOE_OK);
        run_network(&planned, x, dy, a.token_mask, plan, 0);
        for (int recompute = 0; recompute < 2; recompute++) {
            run_network(&plain, x, dy, a.token_mask, NULL, recompute);
            assert_same_network(&planned, &plain);
            ck_assert_int_eq(moe_pass_plan(plain.pass, &made), MOE_OK);
            ck_assert_int_eq(moe_plan_check(made), MOE_OK);
        }
        ck_assert(plain.y[0] > 0 && (!masked || plain.y[2 * D] == 0));
    }
    moe_plan_destroy(plan);
    free_network(&planned), free_network(&plain);
}
END_TEST

START_TEST(test_pass_without_gate_or_plan_refuses_a_choice)
{
    static network one, two;
    static float x[T * D];
    moe_forward_args f;
    make_network(&one, 1), make_network(&two, 2);
    ck_assert_int_eq(moe_forward_args_init(&f, sizeof f), MOE_OK);
    f.tokens = T, f.x = x, f.y = one.y;
    ck_assert_int_eq(moe_layer_forward(two.layer, two.pass, &f), MOE_ERROR_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "among 2 experts"));
    f.top_k = 1;
    ck_assert_int_eq(moe_layer_forward(one.layer, one.pass, &f), MOE_ERROR_INVALID_ARGUMENT);
    f.top_k = MOE_FROM_CONFIG, f.capacity = 3;
    ck_assert_int_eq(moe_layer_forward(one.layer, one.pass, &f), MOE_ERROR_INVALID_ARGUMENT);
    f.capacity = MOE_FROM_CONFIG, f.tokens = 0, f.x = NULL, f.y = NULL;
    ck_assert_int_eq(moe_layer_forward(one.layer, one.pass, &f), MOE_OK);
    free_network(&one), free_network(&two);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("pass");
    TCase *cases = add_case(suite, "trim");
    tcase_add_test(cases, test_pass_trim_keeps_the_routing_and_nothing_else);
    tcase_add_test(cases, test_pass_trim_leaves_activations_alone);
    tcase_add_test(cases, test_pass_trim_makes_an_idle_pass_new);
    tcase_add_test(cases, test_pass_trim_leaves_the_hosts_workspace_alone);
    tcase_add_test(cases, test_pass_trim_without_memory_changes_nothing);
    cases = add_case(suite, "backward");
    tcase_add_test(cases, test_pass_backward_takes_x_where_it_lies_now);
    tcase_add_test(cases, test_pass_backward_of_the_first_release);
    tcase_add_test(cases, test_pass_without_gate_or_plan_visits_the_one_expert);
    tcase_add_test(cases, test_pass_without_gate_or_plan_refuses_a_choice);
    return run_suite(suite, 1);
}
