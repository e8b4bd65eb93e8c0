/* main.c - trains a byte-level language model with a Mixture-of-Experts layer on text of this
 * machine.
 *
 *     build/demo [--file PATH] [--steps N] [--experts E] [--top-k K] [--threads N] [--seed N]
 *                [--rate R] [--no-balance]
 *
 * A progress line shows step, training loss in nats, bits per byte of training and of held-out
 * text, speed and time left; the end shows how the experts shared the load. */
#define _XOPEN_SOURCE 700
#include "model.h"
#include "text.h"

#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { TOKENS = 2048, HELD_BATCHES = 4, REPORT_EVERY = 25 };
static const size_t TEXT_LIMIT = (size_t)8 << 20;
static const double PI = 3.14159265358979323846;

typedef struct options {
    const char *file;
    int64_t steps;
    double rate;
    model_options model;
} options;

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void usage(FILE *to)
{
    fprintf(to, "usage: demo [--file FILE_OR_DIRECTORY] [--steps N] [--experts E] [--top-k K]\n"
                "            [--threads N] [--seed N] [--rate R] [--no-balance]\n");
}

/* A whole number in [low, high], or exits the program's way: -1 with a message. */
static int read_number(const char *name, const char *value, int64_t low, int64_t high, int64_t *out)
{
    char *end;
    long long number = strtoll(value, &end, 10);
    if (*value == 0 || *end != 0 || number < low || number > high) {
        fprintf(stderr, "--%s %s: a number from %lld to %lld is needed\n", name, value,
                (long long)low, (long long)high);
        return -1;
    }
    *out = number;
    return 0;
}

static int read_rate(const char *value, double *rate)
{
    char *end;
    *rate = strtod(value, &end);
    if (*value != 0 && *end == 0 && *rate > 0 && *rate < 1) return 0;
    fprintf(stderr, "--rate %s: a number above 0 and below 1 is needed\n", value);
    return -1;
}

static int read_option(options *o, int which, const char *value)
{
    int64_t number = 0;
    switch (which) {
    case 'f': o->file = value; return 0;
    case 's': return read_number("steps", value, 1, 10000000, &o->steps);
    case 'e': return read_number("experts", value, 1, 4096, &o->model.experts);
    case 'k': return read_number("top-k", value, 1, 4096, &o->model.top_k);
    case 'r': return read_rate(value, &o->rate);
    case 'b': o->model.balance = 0; return 0;
    case 't':
        if (read_number("threads", value, 0, 4096, &number) != 0) return -1;
        o->model.threads = (int32_t)number;
        return 0;
    case 'd':
        if (read_number("seed", value, 0, INT64_MAX, &number) != 0) return -1;
        o->model.seed = (uint64_t)number;
        return 0;
    default: usage(stderr); return -1;
    }
}

static int read_options(options *o, int argc, char **argv)
{
    static const struct option names[] = {
        {"file", required_argument, NULL, 'f'},    {"steps", required_argument, NULL, 's'},
        {"experts", required_argument, NULL, 'e'}, {"top-k", required_argument, NULL, 'k'},
        {"threads", required_argument, NULL, 't'}, {"seed", required_argument, NULL, 'd'},
        {"rate", required_argument, NULL, 'r'},    {"no-balance", no_argument, NULL, 'b'},
        {"help", no_argument, NULL, 'h'},          {NULL, 0, NULL, 0}};
    *o = (options){.file = "/usr/include", .steps = 2000, .rate = 3e-3};
    o->model =
        (model_options){.experts = 16, .top_k = 2, .tokens = TOKENS, .balance = 0.02, .seed = 1};
    for (int which; (which = getopt_long(argc, argv, "h", names, NULL)) != -1;) {
        if (which == 'h') {
            usage(stdout);
            return 1;
        }
        if (read_option(o, which, optarg) != 0) return -1;
    }
    if (optind < argc) {
        fprintf(stderr, "%s: not an option\n", argv[optind]);
        return -1;
    }
    return 0;
}

/* Where bytes to predict are: random places with CONTEXT bytes before them. SplitMix64 (Steele
 * 2014). */
static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static void pick_positions(int64_t *positions, size_t begin, size_t end, uint64_t *state)
{
    for (int t = 0; t < TOKENS; t++)
        positions[t] = (int64_t)(begin + CONTEXT + next_random(state) % (end - begin - CONTEXT));
}

/* Bits per byte of held-out text, always the same places. */
static int held_out_bits(model *m, const text *t, double *bits, double *load)
{
    int64_t positions[TOKENS];
    uint64_t state = 12345;
    model_result result;
    *bits = 0;
    for (int batch = 0; batch < HELD_BATCHES; batch++) {
        pick_positions(positions, t->train_size, t->size, &state);
        if (model_run(m, t->bytes, positions, TOKENS, 0, 0, &result, load) != 0) return -1;
        *bits += result.bits / HELD_BATCHES;
    }
    return 0;
}

/* Warm-up, then a half cosine down to a tenth. */
static double rate_at(const options *o, int64_t step)
{
    double warm = 20, done = (double)step / (double)o->steps;
    double rate = o->rate * (0.1 + 0.45 * (1 + cos(PI * done)));
    return (double)step < warm ? rate * ((double)step + 1) / warm : rate;
}

static void print_progress(const options *o, int64_t step, double bits, double balance, double held,
                           double elapsed)
{
    double left = elapsed / (double)step * (double)(o->steps - step);
    printf("%sstep %5lld/%lld  loss %6.4f  balance %6.4f  bits/byte %5.3f  held-out %5.3f  "
           "%6.0f tokens/s  %3.0f s left%s",
           isatty(1) ? "\r" : "", (long long)step, (long long)o->steps, bits * log(2.0), balance,
           bits, held, (double)(step * TOKENS) / elapsed, left,
           isatty(1) && step < o->steps ? "   " : "\n");
    fflush(stdout);
}

static int train(const options *o, const text *t, model *m, double *held)
{
    int64_t positions[TOKENS];
    uint64_t state = o->model.seed;
    double begin = seconds(), bits = 0, balance = 0;
    model_result result;
    for (int64_t step = 0; step < o->steps; step++) {
        pick_positions(positions, 0, t->train_size, &state);
        if (model_run(m, t->bytes, positions, TOKENS, step, 1, &result, NULL) != 0) return -1;
        model_update(m, step, rate_at(o, step));
        bits = step == 0 ? result.bits : 0.9 * bits + 0.1 * result.bits;
        balance = result.balance_loss;
        if ((step + 1) % REPORT_EVERY != 0 && step + 1 != o->steps) continue;
        if (held_out_bits(m, t, held, NULL) != 0) return -1;
        print_progress(o, step + 1, bits, balance, *held, seconds() - begin);
    }
    return 0;
}

/* How the experts shared the held-out bytes. */
static int print_load(model *m, const text *t)
{
    int64_t E = m->options.experts;
    double bits, sum = 0, most = 0, entropy = 0;
    double *load = calloc((size_t)E, sizeof *load);
    if (!load || held_out_bits(m, t, &bits, load) != 0) {
        free(load);
        return -1;
    }
    for (int64_t e = 0; e < E; e++) sum += load[e], most = load[e] > most ? load[e] : most;
    printf("\nHow the %lld experts shared the held-out bytes (%lld of them for each byte):\n",
           (long long)E, (long long)m->options.top_k);
    for (int64_t e = 0; e < E; e++) {
        double share = load[e] / sum;
        int length = most > 0 ? (int)(50 * load[e] / most + 0.5) : 0;
        if (share > 0) entropy -= share * log(share);
        printf("  expert %3lld %5.1f%% ", (long long)e, 100 * share);
        for (int i = 0; i < length; i++) putchar('#');
        putchar('\n');
    }
    printf("busiest expert: %.2f times the mean; entropy %.2f of at most %.2f nats\n",
           most / sum * (double)E, entropy, log((double)E));
    free(load);
    return 0;
}

static int64_t count_parameters(const model *m)
{
    int64_t count = 0;
    for (int i = 0; i < m->parameter_count; i++) count += m->parameters[i].count;
    return count;
}

static int run(const options *o, const text *t, model *m)
{
    double unigram = text_unigram_bits(t), held = 0;
    printf("text: %s, %zu files, %.1f MB to train on, %.1f MB held out\n", o->file, t->files,
           (double)t->train_size / 1e6, (double)(t->size - t->train_size) / 1e6);
    printf("held-out bits per byte if bytes were independent (unigram): %.3f\n", unigram);
    if (model_create(m, &o->model) != 0) return -1;
    printf(
        "model: %d bytes of context, %lld experts of %d x %d, %lld for each byte, %.2f M parameters, "
        "%d threads\n\n",
        CONTEXT, (long long)o->model.experts, WIDTH, HIDDEN, (long long)o->model.top_k,
        (double)count_parameters(m) / 1e6, (int)moe_context_threads(m->context));
    if (train(o, t, m, &held) != 0 || print_load(m, t) != 0) return -1;
    printf("\nheld-out text: %.3f bits per byte, unigram %.3f\n", held, unigram);
    return 0;
}

int main(int argc, char **argv)
{
    options o;
    text t;
    model m = {0};
    int told = read_options(&o, argc, argv);
    if (told != 0) return told < 0 ? 2 : 0;
    if (o.model.top_k > o.model.experts) {
        fprintf(stderr, "--top-k %lld is more than --experts %lld\n", (long long)o.model.top_k,
                (long long)o.model.experts);
        return 2;
    }
    if (text_read(&t, o.file, TEXT_LIMIT) != 0) return 1;
    int status = run(&o, &t, &m);
    model_destroy(&m);
    text_free(&t);
    return status != 0;
}
