/* ranks_print.c - the tables of bench_ranks. */
#include "ranks.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* On rank 0: parts become means of the ranks, totals the slowest rank's; bytes become sums. */
static void join(const bench_ranks *b, way *w)
{
    const group *g = w->in;
    int steps = (int)b->sizes.steps, words = CALLS * (int)(sizeof(wire) / sizeof(int64_t));
    if (g->mpi == MPI_COMM_NULL) return;
    for (int l = 0; l < LINES; l++)
        for (int i = 0; i < TIMES; i++) {
            double *own = w->milliseconds[l][i];
            (void)MPI_Reduce(b->rank == 0 ? MPI_IN_PLACE : own, own, steps, MPI_DOUBLE,
                             i == TOTAL ? MPI_MAX : MPI_SUM, 0, g->mpi);
            for (int n = 0; n < steps && i != TOTAL; n++) own[n] /= g->size;
        }
    (void)MPI_Reduce(b->rank == 0 ? MPI_IN_PLACE : w->wire, w->wire, words, MPI_INT64_T, MPI_SUM, 0,
                     g->mpi);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(const way *w, int line, int time, int64_t steps)
{
    double sorted[MOST_STEPS];
    memcpy(sorted, w->milliseconds[line][time], (size_t)steps * sizeof *sorted);
    qsort(sorted, (size_t)steps, sizeof *sorted, by_value);
    return sorted[steps / 2];
}

/* The same way in the first group. */
static const way *base_of(const bench_ranks *b, const way *w)
{
    for (int i = 0; i < b->way_count; i++)
        if (b->ways[i]->mode == w->mode) return b->ways[i];
    return w;
}

static void print_head(const bench_ranks *b)
{
    const bench_sizes *s = &b->sizes;
    char library[MPI_MAX_LIBRARY_VERSION_STRING];
    int length;
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    (void)MPI_Get_library_version(library, &length);
    library[strcspn(library, ",\n")] = 0;
    for (char *c = library; *c; c++) *c = *c == '\t' ? ' ' : *c;
    (void)printf("%lld tokens and %lld experts a rank, %lld experts a token; D %lld, F %lld, "
                 "O %lld, f32; one thread a rank\n",
                 (long long)s->tokens, (long long)s->experts, (long long)s->k, (long long)s->d,
                 (long long)s->f, (long long)s->o);
    (void)printf("%s, %ld cores%s\n", library, cores,
                 b->size > cores ? ": fewer than ranks, whose times mean nothing" : "");
}

static void print_time(const bench_ranks *b, const way *w, int line)
{
    static const char *const FORMAT[] = {"%7.2f", "%7.2f", "%9.2f", "%8.2f", "%8.2f", "%8.2f"};
    int64_t steps = b->sizes.steps;
    double total = median(w, line, TOTAL, steps);
    (void)printf("%-7s %5d %-8s", MODE_NAME[w->mode], w->in->size, LINE_NAME[line]);
    for (int i = 0; i < TIMES; i++) (void)printf(FORMAT[i], median(w, line, i, steps));
    (void)printf("%9.0f %10.2f %8.1f%%\n", 1e3 * (double)b->sizes.tokens / total,
                 median(base_of(b, w), line, TOTAL, steps) / total,
                 100 * median(w, line, MOE_TIME_EXCHANGE, steps) / total);
}

static void print_times(const bench_ranks *b)
{
    (void)printf("\nmilliseconds, medians of %lld steps: parts are means of the ranks, the total "
                 "is the slowest rank's;\ntokens per second of a rank\n",
                 (long long)b->sizes.steps);
    (void)printf("way     ranks call       gate   pack exchange experts combine   total tokens/s "
                 "efficiency exchange\n");
    for (int i = 0; i < b->way_count; i++)
        for (int l = 0; l < LINES; l++) print_time(b, b->ways[i], l);
}

static void print_bytes(const bench_ranks *b)
{
    (void)printf("\nbytes sent, a token\n"
                 "way     ranks call          words        rows     must be       least  "
                 "over least\n");
    for (int i = 0; i < b->way_count; i++)
        for (int c = 0; c < CALLS; c++) {
            const way *w = b->ways[i];
            const wire *x = &w->wire[c];
            double tokens = (double)(b->sizes.tokens * w->in->size), least = (double)x->least;
            if (w->in->size == 1 || w->mode == ALONE) continue;
            (void)printf("%-7s %5d %-8s%11.2f %11.2f %11.2f %11.2f %11.2f%s\n", MODE_NAME[w->mode],
                         w->in->size, LINE_NAME[c], (double)x->words / tokens,
                         (double)x->rows / tokens, (double)x->must / tokens, least / tokens,
                         least > 0 ? (double)x->rows / least : 1,
                         x->rows == x->must ? "" : "  WRONG");
        }
}

static void print_hints(const bench_ranks *b)
{
    int base = b->sizes.ranks[0];
    (void)printf(
        "\nefficiency  time of the same way on %d rank%s over this time. At 1.00 P ranks do "
        "P times the work;\n"
        "            the machine itself gives as much as `alone` has.\n",
        base, base == 1 ? "" : "s");
    (void)puts(
        "exchange    its share of the total. No work is done in it: messages, and waiting for "
        "ranks that\n"
        "            have more rows or less of the machine. What is done between start and "
        "finish can\n"
        "            hide that much at most.\n"
        "pack, gate  grow with the rows for other ranks, and with the experts of all ranks; "
        "experts only\n"
        "            as in `alone`.\n"
        "least       each routed row that leaves its rank, once there and once back. Padded "
        "sends more as\n"
        "            rows are uneven; a backward of chunk in several rounds sends x and "
        "weights again.");
}

void bench_print(const bench_ranks *b)
{
    for (int i = 0; i < b->way_count; i++) join(b, b->ways[i]);
    if (b->rank > 0) return;
    print_head(b);
    print_times(b);
    print_bytes(b);
    print_hints(b);
    (void)printf("\n%s\n", b->failed ? "FAILED: rows are not the bytes that they must be"
                                     : "100%: rows are the bytes that they must be in every step");
}
