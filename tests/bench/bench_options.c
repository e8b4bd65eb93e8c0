/* bench_options.c - the command line of bench, checked: what is wrong is named with its value. */
#include "bench.h"

#include <errno.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const char *const bench_peer_names[] = {"fma_peak",
                                        "read_bandwidth",
                                        "copy_bandwidth",
                                        "dense_openblas",
                                        "loop_openblas",
                                        "omp_openblas",
                                        "loop_onednn",
                                        "torch_loop",
                                        "ggml",
                                        "one_thread",
                                        "balanced",
                                        "layer",
                                        NULL};

static const struct {
    const char *name;
    int64_t T, D, F, E, K;
    bool gated;
} shapes[] = {
    {"a", 1024, 512, 1024, 32, 4, false}, {"b", 4096, 512, 1024, 256, 4, false},
    {"c", 2048, 768, 3072, 64, 1, false}, {"d", 1024, 1024, 512, 64, 8, true},
    {"e1", 1, 2048, 1024, 64, 8, true},   {"e4", 4, 2048, 1024, 64, 8, true},
    {"e16", 16, 2048, 1024, 64, 8, true}, {"f", 8192, 64, 64, 4096, 2, false},
};

static const char *const storages[] = {"rowmajor", "prepacked", "panels"};
static const char *const isas[] = {"auto", "plain", "avx2", "avx512"};

static const char usage[] =
    "usage: bench [--shape a|b|c|d|e1|e4|e16|f|T,D,F,E,K,relu|swiglu]\n"
    "             [--routing balanced|zipf|FILE] [--pass fwd|fwdbwd] [--threads N]\n"
    "             [--weights panels|prepacked|rowmajor ...] [--dtype f32] [--peer NAME ...]\n"
    "             [--rounds N] [--seed N] [--isa auto|plain|avx2|avx512] [--raw FILE]\n"
    "             [--python PROGRAM] [--check] [--memory] [--one-call]\n"
    "prints: peer,shape,routing,pass,median_ms,gflops,rss_mib,min_ms\n"
    "FILE has the K expert ids of a token on each line. --raw appends every round to FILE. --check\n"
    "fails if peers disagree. --memory measures the memory of libmoe alone. --one-call calls each\n"
    "peer once in a turn, and not before. Peers: ";

static int refuse(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    (void)fputs("bench: ", stderr);
    (void)vfprintf(stderr, format, list);
    (void)fputs("; bench --help lists what there is\n", stderr);
    va_end(list);
    return 2;
}

/* The place of `text` in the list, or -1. */
static int find(const char *text, const char *const *list, int count)
{
    for (int i = 0; i < count && list[i]; i++)
        if (strcmp(text, list[i]) == 0) return i;
    return -1;
}

static bool number(const char *text, int64_t least, int64_t most, int64_t *value, char **end)
{
    errno = 0;
    *value = strtoll(text, end, 10);
    return errno == 0 && *end != text && *value >= least && *value <= most;
}

static int read_custom_shape(bench_options *o, const char *text)
{
    int64_t *const sizes[] = {&o->T, &o->D, &o->F, &o->E, &o->K};
    const char *at = text;
    for (int i = 0; i < 5; i++) {
        char *end;
        if (!number(at, 1, 1 << 24, sizes[i], &end) || *end != ',')
            return refuse("--shape %s is neither a name nor T,D,F,E,K,relu or ,swiglu", text);
        at = end + 1;
    }
    o->gated = strcmp(at, "swiglu") == 0;
    if (!o->gated && strcmp(at, "relu") != 0)
        return refuse("--shape %s: the activation is relu or swiglu, not \"%s\"", text, at);
    if (o->K > o->E)
        return refuse("--shape %s: K = %lld experts a token of E = %lld", text, (long long)o->K,
                      (long long)o->E);
    if ((double)o->E * (double)o->D * (double)o->F > 4e9 || (double)o->T * (double)o->K > 1e8)
        return refuse("--shape %s is too large", text);
    /* A comma would split the line that is printed. */
    for (char *c = o->shape; *c; c++)
        if (*c == ',') *c = 'x';
    return 0;
}

static int read_shape(bench_options *o, const char *text)
{
    if (strlen(text) >= sizeof o->shape) return refuse("--shape %s is too long", text);
    (void)snprintf(o->shape, sizeof o->shape, "%s", text);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        if (strcmp(text, shapes[i].name) != 0) continue;
        o->T = shapes[i].T, o->D = shapes[i].D, o->F = shapes[i].F, o->E = shapes[i].E;
        o->K = shapes[i].K, o->gated = shapes[i].gated;
        return 0;
    }
    return read_custom_shape(o, text);
}

static int read_count(const char *option, const char *text, int64_t most, int *value)
{
    char *end;
    int64_t n;
    if (!number(text, 1, most, &n, &end) || *end)
        return refuse("--%s %s is no number from 1 to %lld", option, text, (long long)most);
    *value = (int)n;
    return 0;
}

static int read_seed(bench_options *o, const char *text)
{
    char *end;
    errno = 0;
    o->seed = strtoull(text, &end, 10);
    return errno || end == text || *end || *text == '-' ? refuse("--seed %s is no number", text)
                                                        : 0;
}

static int add_peer(bench_options *o, const char *text)
{
    if (find(text, bench_peer_names, BENCH_MOST_PEERS) < 0)
        return refuse("--peer %s is not known", text);
    if (find(text, o->peers, o->peer_count) >= 0) return refuse("--peer %s is there twice", text);
    o->peers[o->peer_count++] = text;
    return 0;
}

static int add_storage(bench_options *o, const char *text)
{
    int found = find(text, storages, 3);
    if (found < 0) return refuse("--weights %s is not panels, prepacked or rowmajor", text);
    for (int i = 0; i < o->storages; i++)
        if (o->storage[i] == found) return refuse("--weights %s is there twice", text);
    o->storage[o->storages++] = found;
    return 0;
}

static int read_word(bench_options *o, const char *option, const char *text)
{
    if (strcmp(option, "routing") == 0) {
        o->routing = text;
        if (strcmp(text, "balanced") != 0 && strcmp(text, "zipf") != 0 && access(text, R_OK) != 0)
            return refuse("--routing %s is not balanced, zipf or a file that can be read", text);
    } else if (strcmp(option, "pass") == 0) {
        o->backward = strcmp(text, "fwdbwd") == 0;
        if (!o->backward && strcmp(text, "fwd") != 0)
            return refuse("--pass %s is not fwd or fwdbwd", text);
    } else if (strcmp(option, "dtype") == 0) {
        if (strcmp(text, "f32") != 0) return refuse("--dtype %s is not f32", text);
    } else if (strcmp(option, "isa") == 0) {
        if ((o->isa = find(text, isas, 4)) < 0)
            return refuse("--isa %s is not auto, plain, avx2 or avx512", text);
    } else if (strcmp(option, "raw") == 0) {
        o->raw = text;
    } else {
        o->python = text;
    }
    return 0;
}

static void print_usage(void)
{
    (void)fputs(usage, stdout);
    for (int i = 0; bench_peer_names[i]; i++) printf("%s%s", i ? " " : "", bench_peer_names[i]);
    puts("");
}

static int read_option(bench_options *o, const char *name, const char *text)
{
    if (strcmp(name, "shape") == 0) return read_shape(o, text);
    if (strcmp(name, "threads") == 0)
        return read_count(name, text, BENCH_MOST_THREADS, &o->threads);
    if (strcmp(name, "rounds") == 0) return read_count(name, text, BENCH_MOST_ROUNDS, &o->rounds);
    if (strcmp(name, "seed") == 0) return read_seed(o, text);
    if (strcmp(name, "peer") == 0) return add_peer(o, text);
    if (strcmp(name, "weights") == 0) return add_storage(o, text);
    if (strcmp(name, "check") == 0) return o->check = true, 0;
    if (strcmp(name, "memory") == 0) return o->memory = true, 0;
    if (strcmp(name, "one-call") == 0) return o->one_call = true, 0;
    return read_word(o, name, text);
}

int bench_read_options(bench_options *o, int argc, char **argv)
{
    static const struct option known[] = {
        {"shape", 1, 0, 0},   {"routing", 1, 0, 0}, {"pass", 1, 0, 0},     {"threads", 1, 0, 0},
        {"weights", 1, 0, 0}, {"dtype", 1, 0, 0},   {"peer", 1, 0, 0},     {"rounds", 1, 0, 0},
        {"seed", 1, 0, 0},    {"isa", 1, 0, 0},     {"raw", 1, 0, 0},      {"python", 1, 0, 0},
        {"check", 0, 0, 0},   {"memory", 0, 0, 0},  {"one-call", 0, 0, 0}, {"help", 0, 0, 'h'},
        {0, 0, 0, 0}};
    int c, index, status = read_shape(o, "a");
    o->routing = "balanced", o->rounds = 7, o->seed = 1, o->python = "python3";
    o->threads = (int)sysconf(_SC_NPROCESSORS_ONLN);
    if (o->threads > BENCH_MOST_THREADS) o->threads = BENCH_MOST_THREADS;
    opterr = 0;
    while (status == 0 && (c = getopt_long(argc, argv, "h", known, &index)) != -1) {
        if (c == 'h') return print_usage(), -1;
        if (c == '?') return refuse("%s is not known or lacks its value", argv[optind - 1]);
        status = read_option(o, known[index].name, optarg);
    }
    if (status == 0 && optind < argc) status = refuse("%s is no option", argv[optind]);
    if (o->storages == 0) o->storage[o->storages++] = MOE_STORAGE_ROW_MAJOR;
    return status;
}

const char *bench_storage_name(int32_t storage) { return storages[storage]; }
