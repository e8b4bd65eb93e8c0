/* ranks.c - bench_ranks [NAME=VALUE]...: weak scaling of a layer over MPI, and what it sends.
 *
 * Tokens and experts of a rank are the same for any number of ranks, so with perfect scaling a step
 * takes as long on all of them. Every number of ranks is a group of the first ranks of one mpirun;
 * the steps of all groups and ways to exchange take turns, so that the noise of the machine meets
 * all, and ranks that are not in a group sleep. One rank goes through the exchange too, with
 * itself.
 *
 *     alone     each rank by itself, at the same time, without a communicator: what the machine
 *               gives, for the others to be compared with
 *     exact     MOE_EXCHANGE_EXACT
 *     padded    MOE_EXCHANGE_PADDED, with as many rows as the fullest expert has from a rank
 *     chunk     MOE_RECEIVED_CHUNK: a rank takes `chunk` rows at once, five eighths of what comes
 *               on average, so in two rounds; its backward sends x and weights again
 *
 * Routing is the same in every step and way. Fails if the rows on the wire are other bytes than
 * what their number says: exact ones then are the least that a way by rows can send. */
#include "ranks.h"

#include <moe/mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { WARM_STEPS = 2 };

const char *const MODE_NAME[] = {"alone", "exact", "padded", "chunk"};
const char *const LINE_NAME[] = {"forward", "backward", "step"};

static bench_ranks bench = {
    .sizes = {.tokens = 512, .experts = 8, .k = 2, .d = 512, .f = 1024, .steps = 15}};

static void stop(const char *what, const char *why)
{
    (void)fprintf(stderr, "rank %d: %s: %s\n", bench.rank, what, why);
    (void)MPI_Abort(MPI_COMM_WORLD, 1);
    _exit(1);
}
static void must(moe_status status, const char *what)
{
    if (status != MOE_OK) stop(what, moe_last_error());
}
#define MUST(call) must(call, #call)

static void *room(size_t count, size_t size)
{
    void *memory = calloc(count, size);
    if (!memory) stop("calloc", "no memory");
    return memory;
}

/* All ranks of the program; those that come early sleep and leave their core alone. */
static void meet(void)
{
    MPI_Request request;
    int done = 0;
    (void)MPI_Ibarrier(MPI_COMM_WORLD, &request);
    while (MPI_Test(&request, &done, MPI_STATUS_IGNORE), !done) {
        struct timespec pause = {0, 500000};
        (void)nanosleep(&pause, NULL);
    }
}

/* Xorshift. */
static uint32_t next_bits(uint32_t *bits)
{
    *bits ^= *bits << 13, *bits ^= *bits >> 17, *bits ^= *bits << 5;
    return *bits;
}

/* ---- a step ---------------------------------------------------------------------------------- */

static void forward(const way *w, int64_t tokens)
{
    moe_forward_args f;
    MUST(moe_forward_args_init(&f, sizeof f));
    f.tokens = tokens, f.x = bench.x, f.y = bench.y, f.flags = MOE_FORWARD_TRAIN;
    f.token_first = bench.rank * bench.sizes.tokens;
    MUST(moe_layer_forward(w->layer, w->pass, &f));
}

static void backward(const way *w)
{
    moe_backward_args b;
    MUST(moe_backward_args_init(&b, sizeof b));
    b.dy = bench.dy, b.dx = bench.dx, b.flags = MOE_BACKWARD_OVERWRITE;
    MUST(moe_layer_backward(w->layer, w->pass, &b));
}

static moe_pass_report report_of(const way *w)
{
    moe_pass_report r;
    MUST(moe_pass_report_init(&r, sizeof r));
    MUST(moe_pass_get_report(w->pass, &r));
    return r;
}

/* Seconds of the two calls; each begins when all ranks of the group are there. */
static void run(const way *w, double seconds[CALLS])
{
    for (int c = 0; c < CALLS; c++) {
        (void)MPI_Barrier(w->in->mpi);
        double begin = MPI_Wtime();
        c == FORWARD ? forward(w, bench.sizes.tokens) : backward(w);
        seconds[c] = MPI_Wtime() - begin;
    }
}

static void note_times(way *w, int step, const double seconds[CALLS])
{
    moe_pass_report r = report_of(w);
    for (int i = 0; i < TIMES; i++) {
        double f = 1e3 * (i == TOTAL ? seconds[FORWARD] : r.forward_seconds[i]);
        double b = 1e3 * (i == TOTAL ? seconds[BACKWARD] : r.backward_seconds[i]);
        w->milliseconds[FORWARD][i][step] = f;
        w->milliseconds[BACKWARD][i][step] = b;
        w->milliseconds[STEP][i][step] = f + b;
    }
}

/* ---- bytes ----------------------------------------------------------------------------------- */

static int64_t bytes_of(const way *w, int call)
{
    moe_pass_report r = report_of(w);
    return call == FORWARD ? r.forward_bytes_sent : r.backward_bytes_sent;
}

/* Of MOE_EXCHANGE_PADDED words are whole rows at the head of a block, whichever way they travel:
 * three and one for each expert going there, three coming back. */
static int64_t header_rows(void)
{
    int64_t there = (8 * (3 + bench.sizes.experts) + 4 * (bench.sizes.d + 1) - 1) /
                    (4 * (bench.sizes.d + 1));
    int64_t back = (8 * 3 + 4 * bench.sizes.o - 1) / (4 * bench.sizes.o);
    return there > back ? there : back;
}

/* Words are what a call without tokens sends, since it has no rows; blocks are always sent. */
static void find_words(way *w)
{
    int64_t header = (w->in->size - 1) * header_rows() * 4 * (bench.sizes.d + 1 + bench.sizes.o);
    forward(w, 0);
    backward(w);
    for (int c = 0; c < CALLS; c++) w->wire[c].words = w->mode == PADDED ? header : bytes_of(w, c);
}

/* Rows to and from other ranks, from the routing itself. */
static void count_rows(group *g, const moe_pass *pass)
{
    const moe_plan *plan;
    moe_plan_view v;
    int64_t *to = room((size_t)g->size, sizeof *to), *from = room((size_t)g->size, sizeof *from);
    MUST(moe_pass_plan(pass, &plan));
    MUST(moe_plan_view_init(&v, sizeof v));
    MUST(moe_plan_get(plan, &v));
    g->sent = g->received = g->fullest = 0;
    for (int64_t e = 0; e < v.num_experts; e++) {
        int64_t rows = v.expert_begin[e + 1] - v.expert_begin[e];
        to[e / bench.sizes.experts] += rows;
        if (rows > g->fullest) g->fullest = rows;
    }
    (void)MPI_Alltoall(to, 1, MPI_INT64_T, from, 1, MPI_INT64_T, g->mpi);
    for (int p = 0; p < g->size; p++)
        if (p != bench.rank) g->sent += to[p], g->received += from[p];
    (void)MPI_Allreduce(MPI_IN_PLACE, &g->fullest, 1, MPI_INT64_T, MPI_MAX, g->mpi);
    free(to), free(from);
}

/* A row there and its result back: x and a weight, O; O, then D and the gradient by the weight. */
static void check_wire(way *w)
{
    const group *g = w->in;
    moe_pass_report r = report_of(w);
    int64_t there = 4 * (bench.sizes.d + 1), back = 4 * bench.sizes.o,
            again = r.rounds > 1 ? there : 0;
    int64_t block = (g->size - 1) * bench.sizes.experts * g->fullest;
    int64_t there_are = w->mode == ALONE ? 0 : g->sent, come = w->mode == ALONE ? 0 : g->received;
    int64_t sent = w->mode == PADDED ? block : there_are;
    int64_t received = w->mode == PADDED ? block : come;
    for (int c = 0; c < CALLS; c++) {
        wire *x = &w->wire[c];
        int64_t out = c == FORWARD ? there : back, in = c == FORWARD ? back : there;
        x->rows = bytes_of(w, c) - x->words;
        x->must = sent * (out + (c == BACKWARD ? again : 0)) + received * in;
        x->least = there_are * out + come * in;
        if (x->rows == x->must && r.rows_sent == there_are && r.rows_received == come) continue;
        (void)fprintf(stderr, "rank %d, %s on %d ranks, %s: %lld rows are %lld bytes, not %lld\n",
                      bench.rank, MODE_NAME[w->mode], g->size, LINE_NAME[c], (long long)r.rows_sent,
                      (long long)x->rows, (long long)x->must);
        bench.failed = 1;
    }
}

/* ---- making it ------------------------------------------------------------------------------- */

static void make_shared(void)
{
    moe_context_config c;
    moe_experts_config e;
    size_t in = (size_t)(bench.sizes.tokens * bench.sizes.d),
           out = (size_t)(bench.sizes.tokens * bench.sizes.o);
    uint32_t bits = 2463534242u + (uint32_t)bench.rank;
    MUST(moe_context_config_init(&c, sizeof c));
    c.threads = 1;
    MUST(moe_context_create(&bench.context, &c));
    MUST(moe_experts_config_init(&e, sizeof e));
    e.d_model = bench.sizes.d, e.d_hidden = bench.sizes.f, e.d_out = bench.sizes.o,
    e.num_experts = bench.sizes.experts;
    MUST(moe_experts_create(&bench.pool, bench.context, &e));
    bench.x = room(in, sizeof(float)), bench.dx = room(in, sizeof(float));
    bench.y = room(out, sizeof(float)), bench.dy = room(out, sizeof(float));
    for (size_t i = 0; i < in; i++) bench.x[i] = (float)(int32_t)next_bits(&bits) * 0x1p-31f;
    for (size_t i = 0; i < out; i++) bench.dy[i] = (float)(int32_t)next_bits(&bits) * 0x1p-31f;
}

static void make_gate(moe_gate **gate, int64_t experts)
{
    moe_gate_config c;
    MUST(moe_gate_config_init(&c, sizeof c));
    c.d_model = bench.sizes.d, c.num_experts = experts, c.top_k = bench.sizes.k;
    MUST(moe_gate_create(gate, bench.context, &c));
}

static void make_group(group *g, int size)
{
    g->size = size;
    (void)MPI_Comm_split(MPI_COMM_WORLD, bench.rank < size ? 0 : MPI_UNDEFINED, bench.rank,
                         &g->mpi);
    if (g->mpi == MPI_COMM_NULL) return;
    MUST(moe_comm_create_mpi(&g->comm, bench.context, g->mpi, NULL));
    make_gate(&g->gate, size * bench.sizes.experts);
}

static void make_layer(way *w)
{
    moe_layer_config l;
    int64_t *placement = room((size_t)bench.sizes.experts, sizeof *placement);
    for (int64_t i = 0; i < bench.sizes.experts; i++)
        placement[i] = bench.rank * bench.sizes.experts + i;
    MUST(moe_layer_config_init(&l, sizeof l));
    l.gate = w->mode == ALONE ? bench.alone : w->in->gate, l.experts = bench.pool;
    if (w->mode != ALONE) {
        l.comm = w->in->comm;
        l.placement = placement; /* as without; but then one rank has no exchange */
    }
    if (w->mode == PADDED) {
        l.exchange = MOE_EXCHANGE_PADDED;
        l.padded_rows = w->in->fullest;
    }
    if (w->mode == CHUNK) {
        l.received = MOE_RECEIVED_CHUNK;
        l.max_received = bench.sizes.chunk;
    }
    MUST(moe_layer_create(&w->layer, &l));
    MUST(moe_layer_init_parameters(w->layer, 1));
    MUST(moe_pass_create(&w->pass, w->layer, NULL));
    free(placement);
}

/* The first steps allocate; exact ones find how many rows there are. */
static void make_way(group *g, int mode)
{
    way *w = room(1, sizeof *w);
    double seconds[CALLS];
    w->in = g, w->mode = mode;
    bench.ways[bench.way_count++] = w;
    if (g->mpi != MPI_COMM_NULL) {
        make_layer(w);
        find_words(w);
        for (int n = 0; n < WARM_STEPS; n++) {
            run(w, seconds);
            if (mode == EXACT) count_rows(g, w->pass);
            check_wire(w);
        }
    }
    meet();
}

static void make_all(void)
{
    make_shared();
    make_gate(&bench.alone, bench.sizes.experts);
    for (int i = 0; i < bench.sizes.groups; i++) {
        group *g = &bench.groups[i];
        make_group(g, bench.sizes.ranks[i]);
        for (int mode = ALONE; mode < MODES; mode++) make_way(g, mode);
    }
}

static void free_all(void)
{
    for (int i = 0; i < bench.way_count; i++) {
        moe_pass_destroy(bench.ways[i]->pass), moe_layer_destroy(bench.ways[i]->layer);
        free(bench.ways[i]);
    }
    for (int i = 0; i < bench.sizes.groups; i++) {
        group *g = &bench.groups[i];
        moe_gate_destroy(g->gate), moe_comm_destroy(g->comm);
        if (g->mpi != MPI_COMM_NULL) (void)MPI_Comm_free(&g->mpi);
    }
    moe_gate_destroy(bench.alone), moe_experts_destroy(bench.pool),
        moe_context_destroy(bench.context);
    free(bench.x), free(bench.y), free(bench.dx), free(bench.dy);
}

/* ---- the command line ------------------------------------------------------------------------ */

static int read_ranks(const char *list)
{
    char *end;
    for (bench.sizes.groups = 0; *list && bench.sizes.groups < MOST_GROUPS; list = end) {
        long n = strtol(list, &end, 10);
        if (end == list || n < 1 || n > bench.size) return -1;
        bench.sizes.ranks[bench.sizes.groups++] = (int)n;
        end += strspn(end, ", ");
    }
    return *list || bench.sizes.groups == 0 ? -1 : 0;
}

static int read_argument(const char *argument)
{
    const struct {
        const char *name;
        int64_t *value;
    } names[] = {{"tokens=", &bench.sizes.tokens}, {"experts=", &bench.sizes.experts},
                 {"k=", &bench.sizes.k},           {"d=", &bench.sizes.d},
                 {"f=", &bench.sizes.f},           {"o=", &bench.sizes.o},
                 {"steps=", &bench.sizes.steps},   {"chunk=", &bench.sizes.chunk}};
    if (strncmp(argument, "ranks=", 6) == 0) return read_ranks(argument + 6);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        size_t length = strlen(names[i].name);
        char *end;
        if (strncmp(argument, names[i].name, length) != 0) continue;
        *names[i].value = strtoll(argument + length, &end, 10);
        return *end || *names[i].value < 1 || *names[i].value > 1 << 24 ? -1 : 0;
    }
    return -1;
}

static int read_arguments(int argc, char **argv)
{
    bench.sizes.ranks[0] = 1, bench.sizes.ranks[1] = bench.size,
    bench.sizes.groups = bench.size > 1 ? 2 : 1;
    for (int i = 1; i < argc; i++)
        if (read_argument(argv[i]) != 0) {
            if (bench.rank == 0)
                (void)fprintf(stderr,
                              "%s: not understood; ranks=LIST tokens= experts= k= d= f= o= "
                              "chunk= steps=, at most the ranks there are\n",
                              argv[i]);
            return -1;
        }
    if (bench.sizes.o == 0) bench.sizes.o = bench.sizes.d;
    if (bench.sizes.steps > MOST_STEPS) bench.sizes.steps = MOST_STEPS;
    if (bench.sizes.k > bench.sizes.experts) bench.sizes.k = bench.sizes.experts;
    if (bench.sizes.chunk == 0)
        bench.sizes.chunk = (5 * bench.sizes.tokens * bench.sizes.k + 7) / 8;
    return 0;
}

/* The order of a turn, the same on every rank: who comes after whom is chance. */
static void shuffle(int *order, uint32_t bits)
{
    for (int i = 0; i < bench.way_count; i++) order[i] = i;
    for (int i = bench.way_count - 1; i > 0; i--) {
        int j = (int)(next_bits(&bits) % (uint32_t)(i + 1)), kept = order[i];
        order[i] = order[j], order[j] = kept;
    }
}

static void measure(void)
{
    int order[MOST_GROUPS * MODES];
    double seconds[CALLS];
    for (int n = 0; n < (int)bench.sizes.steps; n++) {
        shuffle(order, 2654435769u * (uint32_t)(n + 1));
        for (int i = 0; i < bench.way_count; i++) {
            way *w = bench.ways[order[i]];
            if (w->in->mpi != MPI_COMM_NULL) {
                run(w, seconds);
                note_times(w, n, seconds);
                check_wire(w);
            }
            meet();
        }
    }
    (void)MPI_Allreduce(MPI_IN_PLACE, &bench.failed, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
}

int main(int argc, char **argv)
{
    int level, bad;
    (void)MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
    (void)MPI_Comm_rank(MPI_COMM_WORLD, &bench.rank);
    (void)MPI_Comm_size(MPI_COMM_WORLD, &bench.size);
    bad = read_arguments(argc, argv) != 0;
    if (!bad) {
        make_all();
        measure();
        bench_print(&bench);
        free_all();
    }
    (void)MPI_Finalize();
    return bad ? 2 : bench.failed;
}
