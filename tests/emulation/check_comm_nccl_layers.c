/* check_comm_nccl_layers.c - layers over the fake NCCL, ranks as threads and as processes: the
 * bytes of one device, and what all ranks ask of NCCL: every send has its receive, in the same
 * order, and all have the same collectives. Failures are in check_comm_nccl_layer_faults.c. */
#include "layer_nccl_case.h"
#include "support/ranks_asked.h"
#include "support/suite.h"

#include <check.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const layer_kind KINDS[] = {
    {.name = "exact"},
    {.name = "exact, bf16", .dtype = MOE_DTYPE_BF16, .last_first = true},
    {.name = "exact, f16", .dtype = MOE_DTYPE_F16},
    {.name = "padded", .padded_rows = 44},
    {.name = "padded, bf16", .dtype = MOE_DTYPE_BF16, .padded_rows = 44, .last_first = true},
    {.name = "padded, losses of all", .padded_rows = 44, .global = true},
    {.name = "losses of all", .global = true, .last_first = true},
    {.name = "slices", .slices = 2},
    {.name = "slices, f16", .slices = 2, .dtype = MOE_DTYPE_F16, .last_first = true},
    {.name = "rounds", .received = MOE_RECEIVED_CHUNK, .max_received = 3},
    {.name = "enough room", .received = MOE_RECEIVED_ERROR, .max_received = 44},
    {.name = "enough room by position", .received = MOE_RECEIVED_DROP_POSITION, .max_received = 44},
    {.name = "enough room by score", .received = MOE_RECEIVED_DROP_SCORE, .max_received = 44}};
enum { KIND_COUNT = sizeof KINDS / sizeof *KINDS };

static const layer_kind *kind; /* of the test, before its ranks start */
static int how;

/* ---- the bytes of one device ----------------------------------------------------------------- */

/* Three steps: what is left of one does not matter to the next. */
static void run_steps(struct rank_case *r, const rank_comm *c, const layer_kind *k)
{
    rank_layer l;
    double squared[3];
    make_layer(r, &l, c, k);
    for (int i = 0; i < 3; i++) {
        if (i > 0) GOOD(moe_layer_zero_gradients(l.layer, r->stream));
        squared[i] = layer_step(r, &l);
        EXPECT(squared[i] == squared[0]);
    }
    compare_with_one(r, &l, squared[0]);
    free_layer(r, &l);
}

static void body_steps(struct rank_case *r)
{
    rank_comm c;
    join(r, &c, how, 30);
    run_steps(r, &c, kind);
    leave(r, &c);
}

/* Several layers on one group. */
static void body_layers(struct rank_case *r)
{
    rank_comm c;
    join(r, &c, r->process ? DUPLICATE : 0, 30);
    for (int i = 0; i < KIND_COUNT; i += 2) run_steps(r, &c, &KINDS[i]);
    leave(r, &c);
}

static const struct named_body BODIES[] = {{.name = "layers", .body = body_layers}, {.name = NULL}};

START_TEST(test_layers_on_threads)
{
    static const int HOW[] = {0, DUPLICATE, NOT_BLOCKING, NOT_BLOCKING | DUPLICATE, COLD};
    for (int ranks = 2; ranks <= 8; ranks *= 2) {
        if (!ranks_asked(ranks, ranks == 2)) continue;
        kind = &KINDS[_i], how = HOW[(_i + ranks) % 5];
        emu_set_seed((uint64_t)(_i + ranks));
        int failures = on_threads(ranks, body_steps);
        ck_assert_msg(failures == 0 && all_is_gone(), "%s on %d ranks: %d failures", kind->name,
                      ranks, failures);
    }
}
END_TEST

START_TEST(test_layers_on_processes)
{
    for (int ranks = 2; ranks <= 8; ranks *= 2) {
        if (!ranks_asked(ranks, ranks == 2)) continue;
        int failures = on_processes(ranks, &BODIES[0]);
        ck_assert_msg(failures == 0, "%d processes: %d failures", ranks, failures);
    }
}
END_TEST

/* ---- what is asked of NCCL ------------------------------------------------------------------- */

static bool is(const struct emu_call *call, const char *name)
{
    return strcmp(call->name, name) == 0;
}

/* What is of a pair: what `rank` sends to `peer` or receives from it, and its collectives, which
 * are everybody's. The next from *at on; NULL at the end. */
static const struct emu_call *next_of(const struct emu_call *list, size_t count, size_t *at,
                                      int rank, int peer, bool sends)
{
    while (*at < count) {
        const struct emu_call *call = &list[(*at)++];
        if (call->kind != EMU_CALL_NCCL || call->rank != rank) continue;
        if (call->peer < 0) return call;
        if (call->peer == peer && is(call, sends ? "ncclSend" : "ncclRecv")) return call;
    }
    return NULL;
}

/* All that rank a sends to b, b receives, of as many bytes, between the same collectives. */
static void match_pair(struct rank_case *r, const struct emu_call *list, size_t count, int a, int b)
{
    size_t at_a = 0, at_b = 0;
    const struct emu_call *out, *in;
    do {
        out = next_of(list, count, &at_a, a, b, true);
        in = next_of(list, count, &at_b, b, a, false);
        EXPECT((out == NULL) == (in == NULL));
        if (!out || !in) break;
        EXPECT(out->bytes == in->bytes && (out->peer < 0) == (in->peer < 0));
        if (out->peer < 0) EXPECT(strcmp(out->name, in->name) == 0);
    } while (out && in);
}

/* Frames of host memory go in one all-to-all where NCCL has that. */
static void match_all(struct rank_case *r)
{
    enum { FRAME = 2048 };
    const struct emu_call *list;
    size_t count = emu_calls(&list);
    int sent = 0, frames = 0, together = 0;
    for (size_t i = 0; i < count; i++) {
        const struct emu_call *call = &list[i];
        if (call->kind != EMU_CALL_NCCL) continue;
        EXPECT(is(call, "ncclSend") || is(call, "ncclRecv") || is(call, "ncclAlltoAll"));
        sent += is(call, "ncclSend");
        frames += is(call, "ncclSend") && call->bytes == FRAME;
        together += is(call, "ncclAlltoAll");
    }
    bool has_it = dlsym(RTLD_DEFAULT, "ncclAlltoAll") != NULL;
    EXPECT(sent > r->ranks && (has_it ? together : frames) > 0);
    EXPECT((has_it ? frames : together) == 0);
    for (int a = 0; a < r->ranks; a++)
        for (int b = 0; b < r->ranks; b++)
            if (a != b) match_pair(r, list, count, a, b);
}

/* What rank 0 gets wrong. */
enum { ALL_RIGHT, WRONG_FORWARD, WRONG_BACKWARD, MISTAKES };
static int mistake;

/* A call that is refused is made again; where nobody waits the others are told by the next one. */
static void run_declining(struct rank_case *r, rank_layer *l)
{
    bool odd = r->rank == 0, padded = kind->padded_rows > 0;
    void *dy = l->dy;
    moe_status status = layer_forward(r, l, odd && mistake == WRONG_FORWARD ? -1 : l->tokens);
    if (mistake == WRONG_FORWARD) {
        EXPECT(status == (padded && !odd ? MOE_OK : MOE_ERROR_INVALID_ARGUMENT));
        CUDA(cudaStreamSynchronize(r->stream));
        status = layer_forward(r, l, l->tokens);
        EXPECT(status == (padded && !odd ? MOE_ERROR_INVALID_ARGUMENT : MOE_OK));
        if (padded && !odd) SAID("failed");
    } else {
        EXPECT(status == MOE_OK);
    }
    if (mistake == WRONG_BACKWARD && odd) l->dy = NULL;
    status = layer_backward(r, l);
    l->dy = dy;
    if (mistake != WRONG_BACKWARD) {
        EXPECT(status == MOE_OK);
        return;
    }
    EXPECT(status == (padded && !odd ? MOE_OK : MOE_ERROR_INVALID_ARGUMENT));
    CUDA(cudaStreamSynchronize(r->stream));
    status = layer_backward(r, l);
    EXPECT(status == MOE_OK || (padded && !odd && status == MOE_ERROR_INVALID_ARGUMENT));
}

static void body_recorded(struct rank_case *r)
{
    rank_comm c;
    rank_layer l;
    double squared;
    join(r, &c, how, 30);
    make_layer(r, &l, &c, kind);
    (void)layer_step(r, &l);
    meet(r);
    if (r->rank == 0) emu_record_start();
    meet(r);
    run_declining(r, &l);
    GOOD(moe_layer_reduce_gradients(l.layer, r->stream));
    GOOD(moe_layer_gradient_norm(l.layer, &squared, r->stream));
    CUDA(cudaStreamSynchronize(r->stream));
    meet(r);
    if (r->rank == 0) emu_record_stop();
    if (r->rank == 0) match_all(r);
    meet(r);
    (void)layer_forward(r, &l, l.tokens); /* which may tell of the earlier one */
    CUDA(cudaStreamSynchronize(r->stream));
    GOOD(moe_layer_zero_gradients(l.layer, r->stream));
    compare_with_one(r, &l, layer_step(r, &l));
    free_layer(r, &l);
    leave(r, &c);
}

START_TEST(test_every_send_has_its_receive)
{
    for (int ranks = 2; ranks <= 8; ranks *= 2) {
        if (!ranks_asked(ranks, ranks == 2)) continue;
        for (mistake = 0; mistake < MISTAKES; mistake++) {
            kind = &KINDS[_i], how = _i % 2 ? NOT_BLOCKING : 0;
            int failures = on_threads(ranks, body_recorded);
            ck_assert_msg(failures == 0 && all_is_gone(), "%s on %d ranks, mistake %d: %d failures",
                          kind->name, ranks, mistake, failures);
        }
    }
}
END_TEST

/* ---- calls in a capture ---------------------------------------------------------------------- */

static const layer_kind PADDED = {.name = "padded, captured", .padded_rows = 44};

static cudaGraphExec_t end_capture(struct rank_case *r)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec = NULL;
    CUDA(cudaStreamEndCapture(r->stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    CUDA(cudaGraphDestroy(graph));
    return exec;
}

/* What would wait or allocate is refused, on all ranks, and the group goes on. */
static void refuse_in_capture(struct rank_case *r, rank_layer *l)
{
    double squared = -1;
    moe_losses losses;
    GOOD(moe_losses_init(&losses, sizeof losses));
    CUDA(cudaStreamBeginCapture(r->stream, cudaStreamCaptureModeThreadLocal));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_layer_gradient_norm(l->layer, &squared, r->stream));
    SAID("the stream is being captured");
    REFUSED(MOE_ERROR_INVALID_STATE, moe_layer_reduce_gradients(l->layer, r->stream));
    SAID("the stream is being captured");
    REFUSED(MOE_ERROR_INVALID_STATE, moe_pass_losses(l->pass, &losses));
    CUDA(cudaGraphExecDestroy(end_capture(r)));
    EXPECT(squared == -1);
    GOOD(moe_comm_poll(l->c->comm));
}

/* The sums of gradients, once they have been made, are in the graph. */
static void body_captured(struct rank_case *r)
{
    rank_comm c;
    rank_layer l;
    double squared = -1;
    join(r, &c, how, 30);
    make_layer(r, &l, &c, kind);
    GOOD(layer_forward(r, &l, l.tokens));
    GOOD(layer_backward(r, &l));
    CUDA(cudaStreamSynchronize(r->stream));
    refuse_in_capture(r, &l);
    (void)layer_step(r, &l);
    if (kind->padded_rows) {
        CUDA(cudaStreamBeginCapture(r->stream, cudaStreamCaptureModeThreadLocal));
        GOOD(layer_forward(r, &l, l.tokens));
        GOOD(layer_backward(r, &l));
        GOOD(moe_layer_reduce_gradients(l.layer, r->stream));
        cudaGraphExec_t exec = end_capture(r);
        for (int i = 0; i < 2; i++) CUDA(cudaGraphLaunch(exec, r->stream));
        GOOD(moe_layer_gradient_norm(l.layer, &squared, r->stream));
        CUDA(cudaGraphExecDestroy(exec));
    } else {
        squared = layer_step(r, &l);
    }
    compare_with_one(r, &l, squared);
    free_layer(r, &l);
    leave(r, &c);
}

START_TEST(test_calls_in_a_capture)
{
    for (int ranks = 2; ranks <= 4; ranks *= 2) {
        if (!ranks_asked(ranks, ranks == 2)) continue;
        for (int i = 0; i < 4; i++) {
            kind = i % 2 ? &KINDS[0] : &PADDED, how = i / 2 ? DUPLICATE : 0;
            int failures = on_threads(ranks, body_captured);
            ck_assert_msg(failures == 0 && all_is_gone(), "%s on %d ranks: %d failures", kind->name,
                          ranks, failures);
        }
    }
}
END_TEST

/* ---- a pass that goes in the middle ---------------------------------------------------------- */

/* That ends the group of its rank; the others' streams wait for the rest of the call. */
static void body_pass_that_goes(struct rank_case *r)
{
    rank_comm c;
    rank_layer l;
    join(r, &c, how, 30);
    make_layer(r, &l, &c, kind);
    (void)layer_step(r, &l);
    CUDA(cudaStreamSynchronize(r->stream));
    GOOD(layer_start(r, &l, mistake == WRONG_BACKWARD));
    meet(r);
    if (r->rank == 1) {
        moe_pass_destroy(l.pass), l.pass = NULL;
        REFUSED(MOE_ERROR_TRANSPORT, moe_comm_poll(c.comm));
        SAID("rank 1 of 2: the communicator has failed before");
    }
    meet(r);
    NCCL(ncclCommAbort(r->comm));
    r->comm = NULL;
    meet(r);
    CUDA(cudaStreamSynchronize(r->stream));
    free_layer(r, &l);
    moe_comm_destroy(c.comm), moe_context_destroy(c.context);
}

START_TEST(test_pass_that_goes_ends_the_group)
{
    for (int i = 0; i < 8; i++) {
        kind = i % 2 ? &KINDS[0] : &PADDED, how = i / 2 % 2 ? DUPLICATE : 0;
        mistake = i / 4 ? WRONG_BACKWARD : WRONG_FORWARD;
        int failures = on_threads(2, body_pass_that_goes);
        ck_assert_msg(failures == 0 && all_is_gone(), "%s, kind %d, call %d: %d failures",
                      kind->name, how, mistake, failures);
    }
}
END_TEST

int main(int argc, char **argv)
{
    begin_program();
    if (argc == 7 && strcmp(argv[1], "--rank") == 0) return run_as_rank(argv, BODIES);
    Suite *suite = suite_create("comm_nccl_layers");
    TCase *tcase = tcase_create("layers");
    tcase_set_timeout(tcase, 300);
    tcase_add_loop_test(tcase, test_layers_on_threads, 0, KIND_COUNT);
    tcase_add_test(tcase, test_layers_on_processes);
    tcase_add_loop_test(tcase, test_every_send_has_its_receive, 0, KIND_COUNT);
    tcase_add_test(tcase, test_calls_in_a_capture);
    tcase_add_test(tcase, test_pass_that_goes_ends_the_group);
    suite_add_tcase(suite, tcase);
    return run_suite(suite, 0);
}
