/* check_cuda_overlap.c - exchanges on a stream of the host beside the call's: what runs while rows
 * are under way, that results are the same bytes, graphs, refusals and failures. */
#include "cuda_ranks_case.h"
#include "nccl_fake.h"

enum { SEEDS = 2 };

/* ---- results --------------------------------------------------------------------------------- */

static void test_the_same_bytes(void)
{
    for (uint64_t seed = 1; seed <= SEEDS; seed++)
        for (int i = 0; i < 3 * TRANSPORTS * 2; i++) {
            static const int RANKS[] = {1, 2, 4};
            group g = {.ranks = RANKS[i % 3],
                       .transport = i / 3 % TRANSPORTS,
                       .padded_rows = i / 9 % 2 ? 26 : 0,
                       .global = seed % 2,
                       .branches = 1,
                       .beside = 1,
                       .run = run_twice};
            emu_set_seed(seed);
            run_group(&g);
            compare(&g);
            end_group(&g);
        }
}

/* Ranks may differ in it; and rows that go by way of nodes do so beside. */
static void test_ranks_that_differ(void)
{
    static const struct {
        int padded_rows, nodes, beside;
    } WAYS[] = {{0, 0, 2}, {26, 0, 2}, {0, 2, 1}, {0, 2, 2}};
    for (int i = 0; i < 2 * 4; i++) {
        group g = {.ranks = 4,
                   .transport = i / 4 ? OVER_NCCL : DIRECT,
                   .padded_rows = WAYS[i % 4].padded_rows,
                   .branches = 1,
                   .beside = WAYS[i % 4].beside,
                   .nodes = WAYS[i % 4].nodes,
                   .run = run_twice};
        emu_set_seed((uint64_t)i + 1);
        run_group(&g);
        for (int r = 0; r < g.ranks; r++)
            MUST((g.seat[r].beside != NULL) == (g.beside == 1 || r % 2 == 1));
        compare(&g);
        end_group(&g);
    }
}

/* ---- what runs beside ------------------------------------------------------------------------ */

/* Until nothing moves any more, as long as the other ranks do nothing. */
static void let_run(const seat *s)
{
    for (int i = 0; i < 1000; i++) (void)cudaStreamQuery(s->stream);
}

/* Rank 0 is alone in its call, so that its rows cannot have gone. With a stream beside, its
 * branches have been computed then; without, they have not begun. */
static void see_pending(seat *s, int backward)
{
    emu_record_start();
    GOOD(start_call(s, backward));
    size_t before = given(s->stream, 0, 0), from = calls_so_far();
    GOOD(work_call(s, backward));
    size_t branches = given(s->stream, from, 1), later = given(s->stream, from, 0);
    MUST(branches >= 4 && (s->beside ? later > branches : later == branches));
    let_run(s);
    MUST(emu_ran(s->beside ? s->beside : s->stream, "nccl") == 0);
    MUST(emu_ran(s->stream, NULL) == before + (s->beside ? branches : 0));
    emu_record_stop();
}

static void run_pending(seat *s)
{
    run_step(s); /* makes connections */
    CUDA(cudaStreamSynchronize(s->stream));
    for (int backward = 0; backward < 2; backward++) {
        (void)pthread_barrier_wait(&meeting);
        if (s->rank == 0) see_pending(s, backward);
        (void)pthread_barrier_wait(&meeting);
        if (s->rank != 0) GOOD(start_call(s, backward));
        GOOD(finish_call(s, backward)); /* and the work before, of the others */
        CUDA(cudaStreamSynchronize(s->stream));
    }
}

static void test_branches_run_while_rows_travel(void)
{
    for (uint64_t seed = 1; seed <= SEEDS; seed++)
        for (int i = 0; i < 4; i++) {
            group g = {.ranks = i / 2 ? 4 : 2,
                       .transport = OVER_NCCL,
                       .padded_rows = 26,
                       .branches = 1,
                       .beside = i % 2,
                       .run = run_pending};
            emu_set_seed(seed);
            run_with_barrier(&g);
            compare(&g);
            end_group(&g);
        }
}

/* Exact rows need words of all ranks first, so that what CUDA was told has to do: the rows' own
 * stream, work on the call's, a wait there. Waits of rank s's streams, and work between the
 * exchanges and the next wait of its stream. */
static void read_order(const seat *s, int waits[2], int *exchanges, int *between)
{
    const struct emu_call *list;
    size_t calls = emu_calls(&list);
    uint64_t last = 0;
    int open = 0;
    for (size_t i = 0; i < calls; i++) {
        int own = list[i].stream == s->stream, beside = list[i].stream == s->beside;
        if (list[i].kind == EMU_CALL_WAIT) waits[beside] += own || beside;
        if (list[i].kind == EMU_CALL_NCCL && beside && list[i].group != last)
            last = list[i].group, open = 1, ++*exchanges;
        if (own && list[i].kind == EMU_CALL_WAIT) open = 0;
        *between += own && open && list[i].kind == EMU_CALL_GEMM;
    }
}

static void test_exact_rows_travel_beside(void)
{
    group g = {.ranks = 2, .transport = OVER_NCCL, .branches = 1, .beside = 1, .run = run_in_order};
    run_with_barrier(&g);
    for (int r = 0; r < g.ranks; r++) {
        int waits[2] = {0, 0}, exchanges = 0, between = 0;
        read_order(&g.seat[r], waits, &exchanges, &between);
        MUST(exchanges == 4 && waits[0] == 4 && waits[1] == 4);
        MUST(TOKENS[r] == 0 || between >= 6); /* products of two branches, there and back */
    }
    compare(&g);
    end_group(&g);
}

/* ---- two batches ----------------------------------------------------------------------------- */

/* Batch a is on the rank's stream, b, the same tokens, on one of its own; rows of both go on the
 * same stream. While b's rows wait for the others, a's experts are done. */
static void run_two_batches(seat *s)
{
    seat b = *s;
    float *y = on_device(s->device, NULL, MOST * D * sizeof(float));
    run_step(s);
    b.a.y = y;
    CUDA(cudaStreamCreateWithFlags(&b.stream, cudaStreamNonBlocking));
    GOOD(moe_pass_create(&b.pass, s->layer, NULL));
    set_beside(&b, b.pass);
    CUDA(cudaStreamSynchronize(s->stream));
    (void)pthread_barrier_wait(&meeting);
    if (s->rank == 0) emu_record_start();
    (void)pthread_barrier_wait(&meeting);
    GOOD(start_call(s, 0));
    if (s->rank == 0) GOOD(start_call(&b, 0));
    (void)pthread_barrier_wait(&meeting);
    if (s->rank == 0) {
        GOOD(work_call(s, 0));
        size_t put = given(s->stream, 0, 0);
        let_run(s);
        MUST(emu_ran(s->beside, "nccl") == 1 && emu_ran(s->stream, NULL) == put);
        emu_record_stop();
    }
    (void)pthread_barrier_wait(&meeting);
    if (s->rank != 0) GOOD(start_call(&b, 0));
    if (s->rank != 0) GOOD(work_call(s, 0));
    GOOD(work_call(&b, 0));
    GOOD(finish_call(s, 0));
    GOOD(finish_call(&b, 0));
    CUDA(cudaStreamSynchronize(b.stream));
    CUDA(cudaStreamSynchronize(s->stream));
    if (TOKENS[s->rank]) same(s->a.y, y, (size_t)TOKENS[s->rank] * D);
    moe_pass_destroy(b.pass);
    CUDA(cudaStreamDestroy(b.stream));
    CUDA(cudaFree(y));
    GOOD(backward_of(s));
}

static void test_two_batches(void)
{
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        group g = {.ranks = seed == 1 ? 4 : 2,
                   .transport = OVER_NCCL,
                   .padded_rows = 26,
                   .branches = 1,
                   .beside = 1,
                   .run = run_two_batches};
        emu_set_seed(seed);
        run_with_barrier(&g);
        compare(&g);
        end_group(&g);
    }
}

/* ---- calls and captures ---------------------------------------------------------------------- */

static void test_padded_rows_do_not_wait(void)
{
    for (int i = 0; i < 6; i++) {
        group g = {.ranks = 1 << i % 3,
                   .transport = i / 3 ? OVER_NCCL : DIRECT,
                   .padded_rows = 26,
                   .branches = 1,
                   .beside = 1,
                   .run = run_in_order};
        run_with_barrier(&g);
        MUST(emu_count(EMU_CALL_QUERY) == 0 && emu_count(EMU_CALL_TO_DEVICE) == 0);
        MUST(emu_count(EMU_CALL_SYNCHRONIZE) == 0 && emu_count(EMU_CALL_OBJECT) == 0);
        MUST(emu_count(EMU_CALL_ALLOCATE) == 0 && emu_count(EMU_CALL_ALLOCATE_HOST) == 0);
        end_group(&g);
    }
}

static void test_graphs(void)
{
    for (uint64_t seed = 1; seed <= SEEDS; seed++)
        for (int i = 0; i < 6; i++) {
            group g = {.ranks = 1 << i % 3,
                       .transport = i % 3 ? OVER_NCCL : DIRECT,
                       .padded_rows = 26,
                       .global = i / 3,
                       .branches = 1,
                       .beside = 1,
                       .run = run_captured};
            emu_set_seed(seed);
            run_with_barrier(&g);
            compare(&g);
            end_group(&g);
        }
}

/* ---- refusals -------------------------------------------------------------------------------- */

static void run_refusals(seat *s)
{
    moe_cuda_pass_config c;
    cudaStream_t elsewhere;
    moe_pass *pass = NULL;
    run_step(s);
    CUDA(cudaSetDevice(1));
    CUDA(cudaStreamCreateWithFlags(&elsewhere, cudaStreamNonBlocking));
    CUDA(cudaSetDevice(0));
    GOOD(moe_cuda_pass_config_init(&c, sizeof c));
    MUST(c.exchange_stream == NULL);
    c.exchange_stream = cudaStreamLegacy;
    MUST(moe_cuda_pass_set(s->pass, &c) == MOE_ERROR_INVALID_ARGUMENT && SAID("default stream"));
    c.exchange_stream = cudaStreamPerThread;
    MUST(moe_cuda_pass_set(s->pass, &c) == MOE_ERROR_INVALID_ARGUMENT && SAID("default stream"));
    c.exchange_stream = elsewhere;
    MUST(moe_cuda_pass_set(s->pass, &c) == MOE_ERROR_INVALID_ARGUMENT);
    MUST(SAID("exchange_stream is of device 1, the context is on device 0"));
    GOOD(moe_pass_create(&pass, s->layer, NULL));
    c.exchange_stream = s->beside;
    for (int i = 1; i <= 2; i++) {
        emu_fail("cudaEventCreate", i, cudaErrorInvalidValue);
        MUST(moe_cuda_pass_set(pass, &c) == MOE_ERROR_DEVICE && SAID("exchange_stream"));
    }
    moe_pass_destroy(pass);
    GOOD(start_call(s, 0));
    MUST(moe_cuda_pass_set(s->pass, &c) == MOE_ERROR_INVALID_STATE && SAID("exchange_stream"));
    MUST(moe_cuda_pass_set(s->pass, NULL) == MOE_ERROR_INVALID_STATE);
    GOOD(finish_call(s, 0));
    c.exchange_stream = s->stream; /* that of the calls: as if there was none */
    GOOD(moe_cuda_pass_set(s->pass, &c));
    run_step(s);
    c.struct_size = offsetof(moe_cuda_pass_config, exchange_stream); /* of an older program */
    GOOD(moe_cuda_pass_set(s->pass, &c));
    run_step(s);
    CUDA(cudaStreamSynchronize(s->stream));
    CUDA(cudaStreamDestroy(elsewhere));
}

static void test_refusals(void)
{
    group g = {.ranks = 1,
               .transport = DIRECT,
               .padded_rows = 26,
               .branches = 1,
               .beside = 1,
               .run = run_refusals};
    run_group(&g);
    compare(&g);
    end_group(&g);
}

/* A capture of its own cannot wait for the call's stream: no row travels. */
static void run_captured_beside(seat *s)
{
    cudaGraph_t graph = NULL;
    run_step(s);
    CUDA(cudaStreamSynchronize(s->stream));
    (void)pthread_barrier_wait(&meeting);
    CUDA(cudaStreamBeginCapture(s->beside, cudaStreamCaptureModeThreadLocal));
    MUST(forward_of(s, TOKENS[s->rank]) == MOE_ERROR_DEVICE && SAID("of exchange_stream"));
    (void)cudaStreamEndCapture(s->beside, &graph);
    if (graph) CUDA(cudaGraphDestroy(graph));
    MUST(moe_comm_poll(s->comm) == MOE_ERROR_TRANSPORT);
}

static void test_stream_in_a_capture_of_its_own(void)
{
    for (int i = 0; i < 2 && HAS_NCCL; i++) {
        group g = {.ranks = 2,
                   .transport = OVER_NCCL,
                   .padded_rows = i ? 26 : 0,
                   .beside = 1,
                   .run = run_captured_beside};
        run_with_barrier(&g);
        end_group(&g);
    }
}

/* The last rank gets a call wrong: its stream has what it took part with all the same. */
static void run_declined(seat *s)
{
    int odd = s->rank == s->g->ranks - 1;
    run_step(s);
    (void)note(s, 0, forward_of(s, odd ? -1 : TOKENS[s->rank]));
    check_joined(s);
    (void)note(s, 1, forward_of(s, TOKENS[s->rank])); /* tells of the earlier one */
    GOOD(backward_of(s));
    run_step(s);
}

static void test_rank_that_declines(void)
{
    for (int i = 0; i < 4; i++) {
        group g = {.ranks = 2 << i % 2,
                   .transport = i / 2 ? OVER_NCCL : DIRECT,
                   .padded_rows = 26,
                   .branches = 1,
                   .beside = 1,
                   .run = run_declined};
        run_group(&g);
        for (int r = 0; r < g.ranks; r++) {
            bool odd = r == g.ranks - 1;
            MUST(g.seat[r].status[0] == (odd ? MOE_ERROR_INVALID_ARGUMENT : MOE_OK));
            MUST(g.seat[r].status[1] == (odd ? MOE_OK : MOE_ERROR_INVALID_ARGUMENT));
        }
        compare(&g);
        end_group(&g);
    }
}

/* ---- failures -------------------------------------------------------------------------------- */

static const char *failing_call;
static int failing_number;

/* A capture in which a call fails ends as one of the stream of the calls alone. */
static void run_failing_capture(seat *s)
{
    cudaGraph_t graph = NULL;
    run_step(s);
    (void)pthread_barrier_wait(&meeting);
    if (s->rank == 1) emu_nccl_fail(1, "ncclSend", failing_number, ncclSystemError);
    (void)pthread_barrier_wait(&meeting);
    CUDA(cudaStreamBeginCapture(s->stream, cudaStreamCaptureModeRelaxed));
    moe_status status = forward_of(s, TOKENS[s->rank]);
    MUST(s->rank == 0 || status == MOE_ERROR_TRANSPORT);
    CUDA(cudaStreamEndCapture(s->stream, &graph));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaStreamQuery(s->beside)); /* in no capture */
}

static void test_captured_exchange_that_fails(void)
{
    for (failing_number = 1; failing_number <= 2; failing_number++) { /* rows, what they become */
        group g = {.ranks = 2,
                   .transport = OVER_NCCL,
                   .padded_rows = 26,
                   .branches = 1,
                   .beside = 1,
                   .run = run_failing_capture};
        run_with_barrier(&g);
        end_group(&g);
    }
}

static void run_with_a_failure(seat *s)
{
    (void)pthread_barrier_wait(&meeting);
    if (s->rank == 0) emu_fail(failing_call, failing_number, cudaErrorInvalidValue);
    (void)pthread_barrier_wait(&meeting);
    (void)note(s, 0, forward_of(s, TOKENS[s->rank]));
    (void)note(s, 1, backward_of(s));
    (void)pthread_barrier_wait(&meeting);
    if (s->rank == 0) emu_fail(failing_call, 0, 0);
    set_beside(s, s->pass); /* the pass is in no call */
    CUDA(cudaStreamSynchronize(s->beside));
}

static void test_calls_that_fail(void)
{
    static const char *const CALLS[] = {"cudaStreamWaitEvent", "cudaEventRecord"};
    for (int i = 0; i < 2 * 12; i++) {
        group g = {.ranks = 2,
                   .transport = DIRECT,
                   .padded_rows = i / 2 % 2 ? 26 : 0,
                   .branches = 1,
                   .beside = 1,
                   .run = run_with_a_failure};
        failing_call = CALLS[i % 2], failing_number = 1 + i / 2;
        run_with_barrier(&g);
        if (i < 4) MUST(g.seat[0].status[0] || g.seat[1].status[0]);
        end_group(&g);
    }
}

/* ---- a pass that goes in the middle ---------------------------------------------------------- */

static cudaStream_t watched;

static void *host_alloc(void *user, uint64_t bytes, uint64_t alignment, void *stream)
{
    void *memory = NULL;
    (void)user, (void)alignment, (void)stream;
    return cudaMalloc(&memory, bytes) == cudaSuccess ? memory : NULL;
}

/* What goes back may be used by anybody: no row may be on its way into it. */
static void host_free(void *user, void *memory, uint64_t bytes, void *stream)
{
    (void)user, (void)bytes, (void)stream;
    if (watched) MUST(cudaStreamQuery(watched) == cudaSuccess);
    CUDA(cudaFree(memory));
}

static void test_pass_that_goes(void)
{
    for (uint64_t seed = 1; seed <= 8; seed++) {
        group g = {.ranks = 1, .padded_rows = 26, .branches = 1, .beside = 1};
        seat *s = &g.seat[0];
        moe_cuda_config c = config_of(0);
        emu_set_seed(seed);
        *s = (seat){.g = &g};
        c.alloc = host_alloc, c.free = host_free;
        GOOD(moe_cuda_context_create(&s->context, &c));
        g.devices = device_world_create(s->context, 1);
        s->comm = device_world_connect(g.devices, s->context, 0, 20);
        make_objects(s, E);
        make_layer(s);
        make_arrays(s, 0, T);
        set_beside(s, s->pass);
        watched = s->beside;
        GOOD(start_call(s, 0));
        moe_pass_destroy(s->pass);
        s->pass = NULL, watched = NULL;
        end_group(&g);
    }
}

int main(int count, char **arguments)
{
    (void)setenv("MOE_EMULATION_DEVICES", "8", 1);
    static const host_test TESTS[] = {
        {"the same bytes", test_the_same_bytes},
        {"ranks that differ", test_ranks_that_differ},
        {"branches run while rows travel", test_branches_run_while_rows_travel},
        {"exact rows travel beside", test_exact_rows_travel_beside},
        {"two batches", test_two_batches},
        {"padded rows do not wait", test_padded_rows_do_not_wait},
        {"graphs", test_graphs},
        {"refusals", test_refusals},
        {"stream in a capture of its own", test_stream_in_a_capture_of_its_own},
        {"rank that declines", test_rank_that_declines},
        {"captured exchange that fails", test_captured_exchange_that_fails},
        {"calls that fail", test_calls_that_fail},
        {"pass that goes", test_pass_that_goes}};
    return run_host_tests(TESTS, sizeof TESTS / sizeof *TESTS, count, arguments);
}
