/* check_cuda_chunks.c - rows of a layer that travel in parts, on a stream beside the call's: the
 * same bytes, and experts of one part that are computed while another is under way. */
#include "cuda_ranks_case.h"
#include "nccl_fake.h"

enum { SEEDS = 3 };

static void test_the_same_bytes_in_chunks(void)
{
    for (uint64_t seed = 1; seed <= SEEDS; seed++)
        for (int i = 0; i < 3 * TRANSPORTS; i++) {
            static const int RANKS[] = {1, 2, 4}, CHUNKS[] = {2, 3, MOE_COMM_REQUESTS};
            group g = {.ranks = RANKS[i % 3],
                       .transport = i / 3,
                       .chunks = CHUNKS[(i + (int)seed) % 3],
                       .branches = i % 2,
                       .beside = 1,
                       .run = run_twice};
            emu_set_seed(seed);
            run_group(&g);
            compare(&g);
            end_group(&g);
        }
}

/* ---- what runs meanwhile --------------------------------------------------------------------- */

/* Up to the n-th wait of the stream from call number `from` on: work of any kind, and products
 * after the wait before that. */
static size_t given_until(const void *stream, size_t from, int n, int *products)
{
    const struct emu_call *list;
    size_t calls = emu_calls(&list), count = 0;
    for (size_t i = from; i < calls && n > 0; i++) {
        if (list[i].stream != stream) continue;
        if (list[i].kind == EMU_CALL_WAIT && --n > 0) *products = 0;
        count += list[i].kind <= EMU_CALL_SET;
        *products += list[i].kind == EMU_CALL_GEMM;
    }
    return count;
}

static int seen[2];

/* The second chunk of rank 0's rows is late: its experts of the first are done before it has
 * come. A machine that stops in the middle has not seen it. */
static void see_chunk(seat *s, int backward)
{
    int products = 0;
    size_t before = given(s->stream, 0, 0), from = calls_so_far();
    GOOD(work_call(s, backward));
    size_t first = before + given_until(s->stream, from, 2, &products);
    MUST(products >= 3);
    size_t exchanges = emu_ran(s->beside, "nccl");
    while (emu_ran(s->stream, NULL) < first && exchanges < 2) {
        (void)cudaStreamQuery(s->stream);
        exchanges = emu_ran(s->beside, "nccl");
    }
    seen[backward] |= emu_ran(s->stream, NULL) == first && emu_ran(s->beside, "nccl") == 1;
}

static void run_late_chunk(seat *s)
{
    run_step(s);
    CUDA(cudaStreamSynchronize(s->stream));
    for (int backward = 0; backward < 2; backward++) {
        (void)pthread_barrier_wait(&meeting);
        if (s->rank == 0) { /* after words, in a forward answers, and a chunk */
            emu_record_start();
            emu_nccl_delay(0, backward ? 3 : 4, 1000);
        }
        (void)pthread_barrier_wait(&meeting);
        GOOD(start_call(s, backward));
        (void)pthread_barrier_wait(&meeting);
        if (s->rank == 0) see_chunk(s, backward);
        if (s->rank == 0) emu_record_stop();
        (void)pthread_barrier_wait(&meeting);
        GOOD(finish_call(s, backward));
        check_joined(s);
    }
}

static void test_experts_run_while_a_chunk_travels(void)
{
    seen[0] = seen[1] = 0;
    for (int i = 0; i < 6 && !(seen[0] && seen[1]); i++) {
        group g = {.ranks = i % 2 ? 4 : 2,
                   .transport = OVER_NCCL,
                   .chunks = 2,
                   .beside = 1,
                   .run = run_late_chunk};
        emu_set_seed((uint64_t)i + 1);
        run_with_barrier(&g);
        emu_nccl_heal();
        compare(&g);
        end_group(&g);
    }
    MUST(seen[0] && seen[1]);
}

/* All rows are on their way before the first wait; what becomes of a chunk leaves before the wait
 * for the next. */
static void test_order_of_chunks(void)
{
    group g = {.ranks = 2, .transport = OVER_NCCL, .chunks = 2, .beside = 1, .run = run_in_order};
    run_with_barrier(&g);
    for (int r = 0; r < g.ranks; r++) {
        const struct emu_call *list;
        const seat *s = &g.seat[r];
        size_t calls = emu_calls(&list), length = 0;
        uint64_t last = 0;
        char order[64] = "";
        for (size_t i = 0; i < calls; i++) { /* x: an exchange, w: a wait of the call's stream */
            bool exchange = list[i].stream == s->beside && list[i].kind == EMU_CALL_NCCL;
            if (exchange && list[i].group == last) continue;
            if (exchange) last = list[i].group;
            bool waits = list[i].stream == s->stream && list[i].kind == EMU_CALL_WAIT;
            if ((exchange || waits) && length < 63) order[length++] = exchange ? 'x' : 'w';
        }
        MUST(strcmp(order, "xxwxwxwwxxwxwxww") == 0);
    }
    compare(&g);
    end_group(&g);
}

int main(int count, char **arguments)
{
    (void)setenv("MOE_EMULATION_DEVICES", "8", 1);
    static const host_test TESTS[] = {
        {"the same bytes in chunks", test_the_same_bytes_in_chunks},
        {"experts run while a chunk travels", test_experts_run_while_a_chunk_travels},
        {"order of chunks", test_order_of_chunks}};
    return run_host_tests(TESTS, sizeof TESTS / sizeof *TESTS, count, arguments);
}
