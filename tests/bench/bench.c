/* bench.c - bench: libmoe and its peers on one shape, in turns, a line each.
 *
 *     bench --shape d --pass fwdbwd --weights rowmajor --peer dense_openblas --peer loop_onednn
 *     peer,shape,routing,pass,median_ms,gflops,rss_mib,min_ms
 *
 * In every round each peer has one turn, and each round begins with another peer. A turn is one
 * call, or the median of several where a call is short. Before a turn everything sleeps, since the
 * threads of some libraries go on spinning after a call. `gflops` is of the median; of a stream of
 * memory it is GB/s. `rss_mib` is the peak of this process, all peers together. */
#include "bench.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SLEEP_US = 60000, MOST_CALLS = 64 };
static const double least_seconds = 0.02; /* of a turn */

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *a, int count)
{
    qsort(a, (size_t)count, sizeof *a, by_value);
    return count % 2 ? a[count / 2] : 0.5 * (a[count / 2 - 1] + a[count / 2]);
}

/* ---- agreement ------------------------------------------------------------------------------- */

/* What a call leaves: y, and after a backward dx and the gradients by the weights of the plan. */
typedef struct result {
    float *a[3];
    int64_t count[3];
} result;

static result result_of(const bench_work *w)
{
    int64_t tokens = w->o->T * w->o->D;
    bool b = w->o->backward;
    return (result){{w->y, w->dx, w->entry_weight_grad}, {tokens, b ? tokens : 0, b ? w->R : 0}};
}

static result keep(const bench_work *w)
{
    result from = result_of(w), to = from;
    for (int i = 0; i < 3; i++) {
        to.a[i] = bench_room(from.count[i] * 4);
        memcpy(to.a[i], from.a[i], (size_t)from.count[i] * 4);
    }
    return to;
}

/* The largest difference over the largest number. */
static double difference(const result *x, const result *y)
{
    double worst = 0;
    for (int i = 0; i < 3; i++) {
        double most = 1e-30, apart = 0;
        for (int64_t j = 0; j < x->count[i]; j++) {
            apart = fmax(apart, fabs((double)x->a[i][j] - (double)y->a[i][j]));
            most = fmax(most, fabs((double)x->a[i][j]));
        }
        worst = fmax(worst, apart / most);
    }
    return worst;
}

/* A sum over both weight gradients, with factors that tell elements apart; *size: of magnitudes. */
static double gradient_sum(const bench_work *w, double *size)
{
    double sum = 0;
    int64_t count = w->g1 ? w->o->E * w->o->D * w->o->F : 0;
    *size = 0;
    for (int64_t i = 0; i < count; i++) {
        double g1 = (double)w->g1[i], g2 = (double)w->g2[i];
        sum += (double)(i % 5 - 2) * g1 + (double)(i % 7 - 3) * g2;
        *size += fabs(g1) + fabs(g2);
    }
    return sum;
}

/* Every peer once, from results that are wiped: the first comparable one is what the others must
 * equal. Returns 0, or 1 if --check is given and one does not. */
static int check_peers(bench_peer *peers, int count, const bench_work *w)
{
    result first = {{0}, {0}}, mine = result_of(w);
    double sum = 0, size = 0;
    int status = 0;
    for (int i = 0; i < count; i++) {
        double off = 0;
        for (int j = 0; j < 3; j++) memset(mine.a[j], 0, (size_t)mine.count[j] * 4);
        peers[i].first_seconds = peers[i].run(&peers[i], 0);
        if (!peers[i].comparable) continue;
        if (!first.a[0]) {
            first = keep(w), sum = gradient_sum(w, &size);
            continue;
        }
        off = difference(&first, &mine);
        if (size > 0) off = fmax(off, fabs(gradient_sum(w, &size) - sum) / size);
        if (off < 1e-4) continue;
        (void)fprintf(stderr, "bench: %s differs by %.1e from the first\n", peers[i].name, off);
        status = w->o->check;
    }
    for (int j = 0; j < 3 && first.a[0]; j++) bench_room_free(first.a[j], first.count[j] * 4);
    return status;
}

/* ---- turns ----------------------------------------------------------------------------------- */

static double check_sum; /* of what has been computed, so that it has been */

static void turn(bench_peer *p, int round, int calls, const bench_work *w)
{
    double seconds[MOST_CALLS], second[MOST_CALLS];
    for (int i = 0; i < calls; i++) {
        seconds[i] = p->run(p, (int64_t)round * calls + i);
        second[i] = p->second_seconds;
        for (int64_t j = 0; j < w->o->T * w->o->D; j += 997) check_sum += (double)w->y[j];
    }
    p->ms[round] = 1e3 * median(seconds, calls);
    p->second_ms[round] = 1e3 * median(second, calls);
}

static void measure(bench_peer *peers, int count, const bench_work *w)
{
    int calls[BENCH_MOST_PEERS];
    for (int i = 0; i < count; i++) {
        calls[i] = 1;
        if (w->o->one_call) continue;
        double seconds = peers[i].first_seconds;
        if (seconds < least_seconds) seconds = peers[i].run(&peers[i], 1);
        calls[i] = (int)fmax(1, fmin(MOST_CALLS, ceil(least_seconds / fmax(seconds, 1e-9))));
    }
    for (int round = 0; round < w->o->rounds; round++)
        for (int i = 0; i < count; i++) {
            int p = (i + round) % count;
            if (count > 1) usleep(SLEEP_US);
            turn(&peers[p], round, calls[p], w);
        }
}

/* ---- lines ----------------------------------------------------------------------------------- */

static void print_line(const bench_options *o, const char *name, double amount, double *ms)
{
    double sorted[BENCH_MOST_ROUNDS], middle;
    memcpy(sorted, ms, (size_t)o->rounds * sizeof *ms);
    middle = median(sorted, o->rounds);
    printf("%s,%s,%s,%s,%.4f,%.2f,%.1f,%.4f\n", name, o->shape, o->routing,
           o->backward ? "fwdbwd" : "fwd", middle, middle > 0 ? 1e-6 * amount / middle : 0,
           bench_memory("VmHWM") / 1048576, sorted[0]);
    (void)fflush(stdout);
}

static int append_raw(const bench_options *o, const char *name, double amount, const double *ms)
{
    FILE *file = fopen(o->raw, "a");
    for (int i = 0; file && i < o->rounds; i++)
        (void)fprintf(file, "%s,%s,%s,%s,%d,%d,%.6f,%.0f\n", name, o->shape, o->routing,
                      o->backward ? "fwdbwd" : "fwd", o->threads, i, ms[i], amount);
    if (file && fclose(file) == 0) return 0;
    (void)fprintf(stderr, "bench: %s: %s\n", o->raw, strerror(errno));
    return 1;
}

static int print_peers(bench_peer *peers, int count, const bench_options *o)
{
    int status = 0;
    for (int i = 0; i < count; i++) {
        bench_peer *p = &peers[i];
        print_line(o, p->name, p->amount, p->ms);
        if (o->raw) status |= append_raw(o, p->name, p->amount, p->ms);
        if (!p->second) continue;
        print_line(o, p->second, 0, p->second_ms);
        if (o->raw) status |= append_raw(o, p->second, 0, p->second_ms);
    }
    return status;
}

/* ---- all of it ------------------------------------------------------------------------------- */

static bool make_peer(bench_peer *p, bench_work *w, const char *name)
{
    const bench_options *o = w->o;
    if (strcmp(name, "one_thread") == 0) return bench_moe_peer(p, w, o->storage[0], 1, false);
    if (strcmp(name, "balanced") == 0) return bench_moe_peer(p, w, o->storage[0], o->threads, true);
    if (strcmp(name, "layer") == 0) return bench_layer_peer(p, w, o->storage[0]);
    if (strcmp(name, "torch_loop") == 0 || strcmp(name, "ggml") == 0)
        return bench_remote_peer(p, w, name);
    if (strstr(name, "_openblas") || strcmp(name, "loop_onednn") == 0)
        return bench_product_peer(p, w, name);
    return bench_limit_peer(p, w, name);
}

static int make_peers(bench_peer *peers, bench_work *w)
{
    const bench_options *o = w->o;
    int count = 0;
    for (int i = 0; i < o->storages; i++)
        count += bench_moe_peer(&peers[count], w, o->storage[i], o->threads, false);
    if (count == 0) return 0;
    for (int i = 0; i < o->peer_count; i++) count += make_peer(&peers[count], w, o->peers[i]);
    for (int i = 0; i < count; i++) {
        peers[i].ms = calloc((size_t)o->rounds, sizeof(double));
        peers[i].second_ms = calloc((size_t)o->rounds, sizeof(double));
        if (!peers[i].ms || !peers[i].second_ms) exit(1);
    }
    return count;
}

int main(int argc, char **argv)
{
    static bench_options o;
    static bench_peer peers[BENCH_MOST_PEERS];
    bench_work w;
    bench_crew *crew;
    int count, status = bench_read_options(&o, argc, argv);
    if (status != 0) return status < 0 ? 0 : status;
    if (o.peer_count > 0) bench_blas_core(argv);
    if (o.memory) return bench_memory_run(&o);
    crew = bench_crew_start(o.threads);
    bench_work_make(&w, &o, crew);
    count = make_peers(peers, &w);
    status = count == 0 ? 1 : o.one_call ? 0 : check_peers(peers, count, &w);
    if (status == 0) {
        measure(peers, count, &w);
        status = print_peers(peers, count, &o);
        (void)fprintf(stderr, "check sum %g\n", check_sum);
    }
    for (int i = 0; i < count; i++)
        peers[i].end(&peers[i]), free(peers[i].ms), free(peers[i].second_ms);
    bench_work_free(&w);
    bench_crew_stop(crew);
    return status;
}
