/* check_cuda_ranks.c - a layer whose ranks are on devices of their own: the bytes of one device
 * that has all, in memory that the host may not touch; what it calls and waits for; captures; calls
 * that are refused, that do not fit, and transports that fail. */
#include "cuda_ranks_case.h"

#include <time.h>

static void test_ranks_on_their_devices(void)
{
    for (uint64_t seed = 1; seed <= 2; seed++)
        for (int i = 0; i < 3 * TRANSPORTS * 2 * 2; i++) {
            static const int RANKS[] = {1, 2, 4};
            group g = {.ranks = RANKS[i % 3],
                       .transport = i / 3 % TRANSPORTS,
                       .padded_rows = i / 9 % 2 ? 26 : 0,
                       .global = i / 18,
                       .run = run_step};
            emu_set_seed(seed);
            run_group(&g);
            compare(&g);
            end_group(&g);
        }
}

/* Communicators of nodes and rails are split from that of all; exchanges are on the stream of the
 * calls, or beside branches. */
static void test_ranks_by_way_of_nodes(void)
{
    for (int i = 0; i < 24; i++) {
        group g = {.ranks = 4,
                   .transport = i / 6 % 2 ? OVER_NCCL : DIRECT,
                   .nodes = 1 << i % 3,
                   .global = i / 3 % 2,
                   .branches = i / 12,
                   .beside = i / 12,
                   .run = run_step};
        emu_set_seed((uint64_t)i + 1);
        run_group(&g);
        compare(&g);
        end_group(&g);
    }
}

/* ---- calls ----------------------------------------------------------------------------------- */

static void record(group *g)
{
    run_with_barrier(g);
    MUST(emu_count(EMU_CALL_SYNCHRONIZE) == 0 && emu_count(EMU_CALL_ALLOCATE) == 0);
    MUST(emu_count(EMU_CALL_ALLOCATE_HOST) == 0 && emu_count(EMU_CALL_FREE) == 0);
}

/* One copy of the rows of each expert and one wait for it, a table in each direction. */
static void test_exact_rows_wait_once(void)
{
    for (int ranks = 1; ranks <= 4; ranks *= 2) {
        group g = {.ranks = ranks, .transport = DIRECT, .run = run_in_order};
        record(&g);
        MUST(emu_count(EMU_CALL_FROM_DEVICE) == (uint64_t)ranks);
        MUST(emu_count_bytes(EMU_CALL_FROM_DEVICE) == (uint64_t)ranks * (E + 1) * 8);
        MUST(emu_count(EMU_CALL_TO_DEVICE) == 2 * (uint64_t)ranks);
        end_group(&g);
    }
}

/* By way of nodes also the tokens of each node are copied, behind the same work. */
static void test_rows_by_way_of_nodes_wait_twice(void)
{
    group g = {.ranks = 4, .transport = DIRECT, .nodes = 2, .run = run_in_order};
    record(&g);
    MUST(emu_count(EMU_CALL_FROM_DEVICE) == 2 * 4);
    MUST(emu_count_bytes(EMU_CALL_FROM_DEVICE) == 4 * ((E + 1) + (2 + 1)) * 8);
    MUST(emu_count(EMU_CALL_TO_DEVICE) == 2 * 4);
    end_group(&g);
}

/* Nothing is asked of a device but a word of each call, which nobody waits for. */
static void test_padded_rows_do_not_wait(void)
{
    for (int i = 0; i < 12; i++) {
        group g = {.ranks = 1 << i % 3,
                   .transport = i / 6 ? OVER_NCCL : DIRECT,
                   .padded_rows = 26,
                   .global = i / 3 % 2,
                   .run = run_in_order};
        record(&g);
        MUST(emu_count(EMU_CALL_QUERY) == 0 && emu_count(EMU_CALL_TO_DEVICE) == 0);
        MUST(emu_count(EMU_CALL_FROM_DEVICE) == 2 * (uint64_t)g.ranks);
        MUST(emu_count_bytes(EMU_CALL_FROM_DEVICE) == 2 * (uint64_t)g.ranks * 8);
        end_group(&g);
    }
}

/* ---- captures -------------------------------------------------------------------------------- */

static void test_padded_rows_in_a_graph(void)
{
    for (int i = 0; i < 6; i++) {
        if (i % 3 && !HAS_NCCL) continue; /* the other transports are for one capture */
        group g = {.ranks = 1 << i % 3,
                   .transport = i % 3 ? OVER_NCCL : DIRECT,
                   .padded_rows = 26,
                   .global = i / 3,
                   .run = run_captured};
        run_with_barrier(&g);
        compare(&g);
        end_group(&g);
    }
}

static void run_refused_capture(seat *s)
{
    cudaGraph_t graph = NULL;
    run_step(s);
    CUDA(cudaStreamBeginCapture(s->stream, cudaStreamCaptureModeGlobal));
    MUST(forward_of(s, TOKENS[0]) == MOE_ERROR_INVALID_STATE && SAID("captured"));
    (void)cudaStreamEndCapture(s->stream, &graph);
    if (graph) CUDA(cudaGraphDestroy(graph));
}

static void test_exact_rows_refuse_a_capture(void)
{
    group g = {.ranks = 1, .transport = THROUGH_HOST, .run = run_refused_capture};
    run_group(&g);
    end_group(&g);
}

/* ---- calls that are refused ------------------------------------------------------------------ */

/* Rank 1 gets a forward, then a backward wrong; the others hear of it later, and all go on. */
static void run_declined(seat *s)
{
    int odd = s->rank == s->g->ranks - 1;
    (void)note(s, 0, forward_of(s, odd ? -1 : TOKENS[s->rank]));
    if (s->status[0] == MOE_OK) (void)note(s, 1, losses_at(s));
    (void)note(s, 2, backward_of(s));
    CUDA(cudaStreamSynchronize(s->stream));
    (void)note(s, 3, forward_of(s, TOKENS[s->rank])); /* done, and tells of the earlier one */
    GOOD(losses_at(s));
    GOOD(backward_of(s));
    run_step(s);
}

static void test_padded_rank_that_declines(void)
{
    for (int i = 0; i < 4; i++) {
        group g = {.ranks = 2 << i % 2,
                   .transport = DIRECT,
                   .padded_rows = 26,
                   .global = i / 2,
                   .run = run_declined};
        run_group(&g);
        for (int r = 0; r < g.ranks; r++) {
            const seat *s = &g.seat[r];
            char who[32];
            (void)snprintf(who, sizeof who, "rank %d failed: ", g.ranks - 1);
            if (r == g.ranks - 1) {
                MUST(s->status[0] == MOE_ERROR_INVALID_ARGUMENT &&
                     strstr(s->error[0], "tokens is -1"));
                MUST(s->status[2] == MOE_ERROR_INVALID_STATE && s->status[3] == MOE_OK);
                continue;
            }
            MUST(s->status[0] == MOE_OK && s->status[1] == MOE_ERROR_INVALID_ARGUMENT);
            MUST(strstr(s->error[1], who) && s->status[2] == MOE_ERROR_INVALID_ARGUMENT);
            MUST(s->status[3] == MOE_ERROR_INVALID_STATE && strstr(s->error[3], who));
        }
        compare(&g);
        end_group(&g);
    }
}

static void run_tight(seat *s)
{
    (void)note(s, 0, forward_of(s, TOKENS[s->rank]));
    (void)note(s, 1, losses_at(s));
    CUDA(cudaStreamSynchronize(s->stream));
    (void)note(s, 2, backward_of(s));
    (void)note(s, 3, losses_at(s));
}

/* With room for one row of each expert from each rank. */
static void test_padded_rows_that_do_not_fit(void)
{
    group g = {.ranks = 4, .transport = DIRECT, .padded_rows = 1, .run = run_tight};
    run_group(&g);
    for (int r = 0; r < g.ranks; r++) {
        const seat *s = &g.seat[r];
        MUST(s->status[0] == MOE_OK && s->status[1] == MOE_ERROR_BUFFER_TOO_SMALL);
        MUST(s->status[2] == MOE_ERROR_BUFFER_TOO_SMALL && s->status[3] == MOE_OK);
        MUST(strstr(s->error[1], TOKENS[r] ? "padded_rows, which is 1" : "failed: "));
    }
    end_group(&g);
}

/* ---- a rank on a CPU ------------------------------------------------------------------------- */

/* Rank 1 has no device: its rows are shorter. */
static void run_without_device(seat *s)
{
    moe_context *device = s->context;
    moe_layer_config l;
    moe_layer *layer = NULL;
    if (s->rank == 1) {
        moe_experts_destroy(s->experts), moe_gate_destroy(s->gate), moe_comm_destroy(s->comm);
        s->experts = NULL, s->gate = NULL, s->comm = NULL;
        GOOD(moe_context_create(&s->context, NULL));
        GOOD(moe_comm_create_in_world(&s->comm, s->g->other, s->context, 1, 20));
        make_objects(s, E / 2);
    } else {
        moe_comm_destroy(s->comm);
        GOOD(moe_comm_create_in_world(&s->comm, s->g->other, s->context, 0, 20));
    }
    GOOD(moe_layer_config_init(&l, sizeof l));
    l.gate = s->gate, l.experts = s->experts, l.comm = s->comm;
    (void)note(s, 0, moe_layer_create(&layer, &l));
    if (s->rank == 1) moe_context_destroy(device);
}

static void test_rank_on_a_cpu(void)
{
    group g = {.ranks = 2, .transport = THROUGH_HOST, .run = run_without_device};
    moe_context *context = NULL;
    GOOD(moe_context_create(&context, NULL));
    GOOD(moe_world_create(&g.other, context, 2));
    run_group(&g);
    for (int r = 0; r < 2; r++) {
        MUST(g.seat[r].status[0] == MOE_ERROR_INVALID_ARGUMENT);
        MUST(strstr(g.seat[r].error[0], "is 0 on rank 1 and 1 on rank 0"));
    }
    moe_world_destroy(g.other), moe_context_destroy(context);
    end_group(&g);
}

/* ---- transports that fail -------------------------------------------------------------------- */

/* Rank 1 cannot send its rows: nobody waits for it longer than that. */
static void run_failing(seat *s)
{
    run_step(s);
    (void)pthread_barrier_wait(&meeting);
    if (s->rank == 1) device_world_fail(s->g->devices, 1);
    (void)pthread_barrier_wait(&meeting);
    (void)note(s, 0, forward_of(s, TOKENS[s->rank]));
    (void)note(s, 1, backward_of(s));
}

static void test_exchange_that_fails(void)
{
    for (int padded = 0; padded < 2; padded++) {
        group g = {.ranks = 2, .transport = DIRECT, .padded_rows = padded * 26, .run = run_failing};
        run_with_barrier(&g);
        for (int r = 0; r < g.ranks; r++) {
            MUST(g.seat[r].status[0] == MOE_ERROR_TRANSPORT);
            MUST(g.seat[r].status[1] == MOE_ERROR_INVALID_STATE ||
                 g.seat[r].status[1] == MOE_ERROR_TRANSPORT);
        }
        end_group(&g);
    }
}

/* ---- calls of CUDA that fail ----------------------------------------------------------------- */

static const char *failing_call;
static int failing_number;

/* Some rank's n-th call fails; every rank returns long before the timeout. */
static void run_with_a_failure(seat *s)
{
    (void)pthread_barrier_wait(&meeting);
    if (s->rank == 0) emu_fail(failing_call, failing_number, cudaErrorInvalidValue);
    (void)pthread_barrier_wait(&meeting);
    time_t begin = time(NULL);
    (void)note(s, 0, forward_of(s, TOKENS[s->rank]));
    (void)note(s, 1, backward_of(s));
    (void)note(s, 2, moe_layer_reduce_gradients(s->layer, s->stream));
    MUST(time(NULL) - begin < 15);
    (void)pthread_barrier_wait(&meeting);
    if (s->rank == 0) emu_fail(failing_call, 0, 0);
}

static void fail_at(const char *call, int number, int transport, int padded)
{
    group g = {.ranks = 2,
               .transport = transport,
               .padded_rows = padded * 26,
               .global = number % 2,
               .run = run_with_a_failure};
    int failed = 0;
    failing_call = call, failing_number = number;
    run_with_barrier(&g);
    for (int i = 0; i < 6; i++) failed += g.seat[i % 2].status[i / 2] != MOE_OK;
    MUST(failed > 0 || number > 1);
    end_group(&g);
}

static void test_calls_that_fail(void)
{
    static const char *const CALLS[] = {"cudaMemcpyAsync", "kernel", "cudaEventRecord",
                                        "cublasGemmEx"};
    static const int NUMBERS[] = {1, 3, 8, 21, 40};
    for (int i = 0; i < 4 * 5; i++)
        for (int way = 0; way < 4; way++)
            if (strcmp(CALLS[i % 4], "cublasGemmEx") != 0 || way % 2 == 0) /* padded: another */
                fail_at(CALLS[i % 4], NUMBERS[i / 4], way / 2, way % 2);
}

int main(int count, char **arguments)
{
    (void)setenv("MOE_EMULATION_DEVICES", "8", 1);
    static const host_test TESTS[] = {
        {"ranks on their devices", test_ranks_on_their_devices},
        {"ranks by way of nodes", test_ranks_by_way_of_nodes},
        {"exact rows wait once", test_exact_rows_wait_once},
        {"rows by way of nodes wait twice", test_rows_by_way_of_nodes_wait_twice},
        {"padded rows do not wait", test_padded_rows_do_not_wait},
        {"padded rows in a graph", test_padded_rows_in_a_graph},
        {"exact rows refuse a capture", test_exact_rows_refuse_a_capture},
        {"padded rank that declines", test_padded_rank_that_declines},
        {"padded rows that do not fit", test_padded_rows_that_do_not_fit},
        {"rank on a CPU", test_rank_on_a_cpu},
        {"exchange that fails", test_exchange_that_fails},
        {"calls that fail", test_calls_that_fail}};
    return run_host_tests(TESTS, sizeof TESTS / sizeof *TESTS, count, arguments);
}
