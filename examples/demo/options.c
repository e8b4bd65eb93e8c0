/* options.c - reading the command line; nonsense is refused with its value. */
#define _XOPEN_SOURCE 700
#include "options.h"

#include "model.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { DEMO_STEPS = 4500, SWEEP_STEPS = 2000 };

static const char USAGE[] =
    "usage: demo [option]...   train a byte-level language model with a Mixture-of-Experts layer\n"
    "                          and its dense twin of equal multiply-adds per byte\n"
    "  --file PATH      text to learn, a file or a directory (default /usr/include)\n"
    "  --steps N        steps of each model (default %d, with --sweep %d)\n"
    "  --experts E      experts of the MoE layer (default %d)\n"
    "  --top-k K        experts a byte visits (default %d)\n"
    "  --hidden F       hidden width of an expert (default %d)\n"
    "  --batch N        bytes of a step (default %d, the most)\n"
    "  --groups G       sum gradients by groups of bytes, as G ranks do (default 1, or the ranks)\n"
    "  --rate R         largest learning rate (default %g)\n"
    "  --balance W      weight of the importance and of the load loss (default %g)\n"
    "  --no-balance     the same as --balance 0: watch the experts collapse\n"
    "  --seed N         of parameters, batches and noise (default 1)\n"
    "  --threads N      of each rank; 0, the default: as many as the machine gives, 1 on ranks\n"
    "  --only moe|dense train one of the two\n"
    "  --report N       steps between reports (default %d)\n"
    "  --log FILE       write a CSV row at every report\n"
    "  --save FILE      write a checkpoint at the end and when interrupted\n"
    "  --save-every N   and after every N steps\n"
    "  --resume FILE    go on from a checkpoint, made with the same options and text\n"
    "  --sweep          three learning rates by three seeds; prints a Markdown table\n"
    "  --quiet          no progress, no picture\n";

static const options DEFAULTS = {
    .file = "/usr/include",
    .steps = 0, /* set when it is known whether it is a sweep */
    .experts = 16,
    .top_k = 2,
    .hidden = 256,
    .batch = TOKENS,
    .seed = 1,
    .report = 25,
    .rate = 4e-3,
    .balance = 0.02,
};

static void usage(void)
{
    printf(USAGE, DEMO_STEPS, SWEEP_STEPS, (int)DEFAULTS.experts, (int)DEFAULTS.top_k,
           (int)DEFAULTS.hidden, TOKENS, DEFAULTS.rate, DEFAULTS.balance, (int)DEFAULTS.report);
    printf("%s", ranks_usage);
}

/* A whole number in [low, high]. */
static int read_number(const char *name, const char *value, int64_t low, int64_t high, int64_t *out)
{
    char *end;
    errno = 0;
    long long number = strtoll(value, &end, 10);
    if (*value == 0 || *end != 0 || errno != 0 || number < low || number > high) {
        fprintf(stderr, "--%s %s: a whole number from %lld to %lld is needed\n", name, value,
                (long long)low, (long long)high);
        return -1;
    }
    *out = number;
    return 0;
}

/* A number in [low, high], or in (low, high] for `above`. */
static int read_real(const char *name, const char *value, double low, double high, int above,
                     double *out)
{
    char *end;
    double number = strtod(value, &end);
    if (*value != 0 && *end == 0 && number <= high && (above ? number > low : number >= low)) {
        *out = number;
        return 0;
    }
    fprintf(stderr, "--%s %s: a number %s %g and at most %g is needed\n", name, value,
            above ? "above" : "from", low, high);
    return -1;
}

static int read_only(const char *value, int *only)
{
    if (strcmp(value, "moe") == 0) return *only = ONLY_MOE, 0;
    if (strcmp(value, "dense") == 0) return *only = ONLY_DENSE, 0;
    fprintf(stderr, "--only %s: moe or dense is needed\n", value);
    return -1;
}

static int read_name(const char *name, const char *value, const char **out)
{
    *out = value;
    if (*value != 0) return 0;
    fprintf(stderr, "--%s: an empty name\n", name);
    return -1;
}

static int read_option(options *o, int which, const char *value)
{
    int64_t number = 0;
    switch (which) {
    case 'f': return read_name("file", value, &o->file);
    case 'l': return read_name("log", value, &o->log);
    case 'w': return read_name("save", value, &o->save);
    case 'u': return read_name("resume", value, &o->resume);
    case 's': return read_number("steps", value, 1, 10000000, &o->steps);
    case 'v': return read_number("save-every", value, 1, 10000000, &o->save_every);
    case 'i': return read_number("report", value, 1, 10000000, &o->report);
    case 'e': return read_number("experts", value, 1, 4096, &o->experts);
    case 'k': return read_number("top-k", value, 1, 4096, &o->top_k);
    case 'n': return read_number("hidden", value, 1, 65536, &o->hidden);
    case 'c': return read_number("batch", value, 1, TOKENS, &o->batch);
    case 'g': return read_number("groups", value, 1, MOST_GROUPS, &o->groups);
    case 'r': return read_real("rate", value, 0, 1, 1, &o->rate);
    case 'a': return read_real("balance", value, 0, 1000, 0, &o->balance);
    case 'b': return o->balance = 0, 0;
    case 'o': return read_only(value, &o->only);
    case 'q': return o->quiet = 1, 0;
    case 'p': return o->sweep = 1, 0;
    case 't':
        if (read_number("threads", value, 0, 4096, &number) != 0) return -1;
        return o->threads = (int32_t)number, 0;
    case 'd':
        if (read_number("seed", value, 0, INT64_MAX - 16, &number) != 0) return -1;
        return o->seed = (uint64_t)number, 0;
    default: fprintf(stderr, "demo --help lists the options\n"); return -1;
    }
}

/* Whether two names are of one file; NULL is the name of none. */
static int same_file(const char *a, const char *b)
{
    struct stat x, y;
    if (!a || !b) return 0;
    if (strcmp(a, b) == 0) return 1;
    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

/* What is written must not take the place of what is read, nor of one another. A run may save where
 * it resumed from: the old checkpoint stays until the new one is whole. */
static int check_files(const options *o)
{
    const struct {
        const char *name, *file, *other, *other_file;
    } pairs[] = {{"--log", o->log, "--file", o->file},
                 {"--log", o->log, "--resume", o->resume},
                 {"--save", o->save, "--file", o->file},
                 {"--save", o->save, "--log", o->log}};
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        if (!same_file(pairs[i].file, pairs[i].other_file)) continue;
        fprintf(stderr, "%s %s: the file of %s\n", pairs[i].name, pairs[i].file, pairs[i].other);
        return -1;
    }
    return 0;
}

static int check(const options *o)
{
    if (o->top_k > o->experts) {
        fprintf(stderr, "--top-k %lld is more than --experts %lld\n", (long long)o->top_k,
                (long long)o->experts);
        return -1;
    }
    if (o->save_every > 0 && !o->save) {
        fprintf(stderr, "--save-every %lld: --save must say where\n", (long long)o->save_every);
        return -1;
    }
    if (o->sweep && (o->log || o->save || o->resume || o->only != ONLY_BOTH)) {
        fprintf(stderr, "--sweep goes with none of --log, --save, --resume, --only\n");
        return -1;
    }
    return 0;
}

/* A system may promise memory that it has not, and end the program when it is used: experts that
 * cannot fit are refused before. */
static int check_memory(const options *o, const ranks *r)
{
    const double arrays = 4 * sizeof(float); /* value, gradient and two moments */
    double needed = arrays * 2 * WIDTH * (double)o->hidden * (double)o->experts / r->size;
    double there = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    if (there <= 0 || needed <= there) return 0;
    fprintf(stderr,
            "--experts %lld --hidden %lld: %.1f GB for training, this machine has %.1f GB\n",
            (long long)o->experts, (long long)o->hidden, needed / 1e9, there / 1e9);
    return -1;
}

/* What the number of ranks decides. */
static int settle(options *o, const ranks *r)
{
    if (r->size > 1 && o->groups != 0 && o->groups != r->size) {
        fprintf(stderr, "--groups %lld: %d ranks are %d groups\n", (long long)o->groups,
                (int)r->size, (int)r->size);
        return -1;
    }
    if (o->experts < r->size) {
        fprintf(stderr, "--experts %lld: each of %d ranks needs at least one\n",
                (long long)o->experts, (int)r->size);
        return -1;
    }
    if (o->groups == 0) o->groups = r->size;
    if (o->threads == 0 && r->size > 1) o->threads = 1;
    return 0;
}

int options_read(options *o, const ranks *r, int argc, char **argv)
{
    static const struct option names[] = {{"file", required_argument, NULL, 'f'},
                                          {"steps", required_argument, NULL, 's'},
                                          {"experts", required_argument, NULL, 'e'},
                                          {"top-k", required_argument, NULL, 'k'},
                                          {"hidden", required_argument, NULL, 'n'},
                                          {"batch", required_argument, NULL, 'c'},
                                          {"groups", required_argument, NULL, 'g'},
                                          {"threads", required_argument, NULL, 't'},
                                          {"seed", required_argument, NULL, 'd'},
                                          {"rate", required_argument, NULL, 'r'},
                                          {"balance", required_argument, NULL, 'a'},
                                          {"no-balance", no_argument, NULL, 'b'},
                                          {"only", required_argument, NULL, 'o'},
                                          {"report", required_argument, NULL, 'i'},
                                          {"log", required_argument, NULL, 'l'},
                                          {"save", required_argument, NULL, 'w'},
                                          {"save-every", required_argument, NULL, 'v'},
                                          {"resume", required_argument, NULL, 'u'},
                                          {"sweep", no_argument, NULL, 'p'},
                                          {"quiet", no_argument, NULL, 'q'},
                                          {"help", no_argument, NULL, 'h'},
                                          {NULL, 0, NULL, 0}};
    *o = DEFAULTS;
    for (int which; (which = getopt_long(argc, argv, "h", names, NULL)) != -1;) {
        if (which == 'h') return usage(), 1;
        if (read_option(o, which, optarg) != 0) return -1;
    }
    if (optind < argc) {
        fprintf(stderr, "%s: not an option\n", argv[optind]);
        return -1;
    }
    if (o->steps == 0) o->steps = o->sweep ? SWEEP_STEPS : DEMO_STEPS;
    if (check(o) != 0 || settle(o, r) != 0) return -1;
    /* what depends on the machine is rank 0's to say, so that no rank goes on alone */
    return r->rank == 0 && (check_files(o) != 0 || check_memory(o, r) != 0) ? -1 : 0;
}
