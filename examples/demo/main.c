/* main.c - trains a byte-level language model with a Mixture-of-Experts layer and its dense twin of
 * equal multiply-adds per byte, side by side, on text of this machine.
 *
 *     build/demo [--file PATH] [--steps N] [--no-balance] ...        (build/demo --help)
 *
 * Shows both models' progress, how the experts share the bytes and what they specialise in, and
 * ends with one line that says which model predicts held-out text better. */
#define _XOPEN_SOURCE 700
#include "classes.h"
#include "picture.h"
#include "sweep.h"
#include "train.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static const size_t TEXT_LIMIT = (size_t)8 << 20;

static void print_bytes(size_t bytes, const char *what)
{
    if (bytes < 100000)
        printf("%zu bytes %s", bytes, what);
    else
        printf("%.2f MB %s", (double)bytes / 1e6, what);
}

static void print_text(const options *o, const text *t)
{
    printf("text: %s, %zu file%s (%zu left out), ", o->file, t->files, t->files == 1 ? "" : "s",
           t->skipped);
    print_bytes(t->train_size, "to train on, ");
    print_bytes(t->size - t->train_size, "held out\n");
}

/* What both models are and cost, so that a reader can check that the comparison is fair. */
static int print_models(const options *o)
{
    model_options twin = {.experts = o->experts, .top_k = o->top_k, .hidden = o->hidden};
    model_cost moe, dense;
    int64_t hidden;
    if (model_count_cost(&twin, &moe) != 0 || model_dense_hidden(&twin, &hidden) != 0) return -1;
    twin.dense = 1;
    if (model_count_cost(&twin, &dense) != 0) return -1;
    printf("MoE:   %lld experts of %d x %lld x %d, %lld for each byte, noisy top-k gate\n"
           "dense: one expert of %d x %lld x %d for every byte\n",
           (long long)o->experts, WIDTH, (long long)o->hidden, WIDTH, (long long)o->top_k, WIDTH,
           (long long)hidden, WIDTH);
    printf("multiply-adds per byte, forward in training, as moe_layer_flops counts them:\n"
           "  MoE layer    %8lld = experts %lld + gate with noise %lld + combine %lld\n"
           "  dense layer  %8lld = expert %lld + combine %lld\n"
           "  whole models %8lld and %lld, with %lld for the networks around the layer\n",
           (long long)moe.middle, (long long)(2 * WIDTH * o->hidden * o->top_k),
           (long long)moe.gate,
           (long long)(moe.middle - moe.gate - 2 * WIDTH * o->hidden * o->top_k),
           (long long)dense.middle, (long long)(2 * WIDTH * hidden),
           (long long)(dense.middle - 2 * WIDTH * hidden), (long long)(moe.middle + moe.ends),
           (long long)(dense.middle + dense.ends), (long long)moe.ends);
    return 0;
}

static void print_parameters(const trainer *t)
{
    printf("parameters:");
    for (int i = 0; i < MODELS; i++)
        if (t->used[i])
            printf(" %s %.2f M;", i == MOE ? "MoE" : "dense",
                   (double)model_count_parameters(&t->models[i]) / 1e6);
    printf(" %d steps of %d bytes, %d bytes of context, ", (int)t->options->steps,
           (int)t->options->batch, CONTEXT);
    device_print(t->context);
    printf("\n\n");
}

/* n things of P ranks, each of which has the smallest or one more. */
static void print_shares(int64_t n, int64_t P, const char *what)
{
    int64_t least = n / P, most = ranks_share(n, P, 1);
    if (least == most)
        printf("%lld %s", (long long)least, what);
    else
        printf("%lld or %lld %s", (long long)least, (long long)most, what);
}

static void print_ranks(const options *o, const ranks *r)
{
    if (r->size == 1) return;
    printf("%d ranks of ", (int)r->size);
    print_shares(o->experts, r->size, "experts and ");
    print_shares(o->batch, r->size, "bytes of a step; results are ");
    /* a GPU sums a gate's gradient over as many bytes as it is given, a rank or all */
    if (moe_context_backend(r->context) != MOE_BACKEND_CPU) printf("near ");
    printf("those of one rank");
    printf("\nwith --groups %d\n", (int)r->size);
}

/* The losses exist to prevent this, so it is said aloud. A short run gives them no time, and bytes
 * that are all alike cannot be spread. */
static void print_balance(const options *o, const sharing *s)
{
    if (4 * s->idle < s->experts && s->busiest < 4) return;
    printf(
        "\nWARNING: the load is uneven: the busiest expert takes %.2f times the mean, %lld of %lld "
        "experts\ntake less than a quarter of it%s\n",
        s->busiest, (long long)s->idle, (long long)s->experts,
        o->balance > 0 ? "; more steps or a larger --balance may spread it"
                       : ", as was to be expected with --no-balance");
}

static void print_times(const trainer *t)
{
    printf("\ntime in training steps:");
    for (int i = 0; i < MODELS; i++)
        if (t->used[i]) printf("  %s %.1f s", i == MOE ? "MoE" : "dense", t->seconds[i]);
    printf("\n");
}

/* The last line of the output; scripts read it. A difference within two standard errors is none. */
static void print_verdict(const trainer *t, const held_out *held)
{
    double gain = held->bits[DENSE] - held->bits[MOE];
    printf("held-out bits per byte:");
    if (t->used[MOE]) printf(" MoE %.4f,", held->bits[MOE]);
    if (t->used[DENSE]) printf(" dense %.4f,", held->bits[DENSE]);
    printf(" unigram %.4f", text_unigram_bits(t->text));
    if (t->used[MOE] && t->used[DENSE]) {
        const char *winner = gain > 0 ? "the MoE wins by" : "dense wins by";
        if (fabs(gain) <= 2 * held->error) winner = "a draw,";
        printf("; %s %.4f +- %.4f", winner, fabs(gain), held->error);
    }
    printf("\n");
}

static int print_end(trainer *t)
{
    const options *o = t->options;
    size_t cells = (size_t)o->experts * CLASSES;
    double *by_read = calloc(cells, sizeof *by_read), *by_next = calloc(cells, sizeof *by_next);
    held_out held;
    int bad = !by_read || !by_next;
    if (bad) fprintf(stderr, "out of memory\n");
    if (!bad) bad = trainer_measure(t, FINAL_BATCHES, &held, by_read, by_next) != 0;
    if (!bad && t->used[MOE] && !o->quiet)
        bad = picture_print(&held, o->top_k, by_read, by_next, ranks_terminal(t->ranks)) != 0;
    if (!bad) {
        if (t->used[MOE]) print_balance(o, &held.sharing);
        if (!o->quiet) print_times(t);
        print_verdict(t, &held);
    }
    free(by_read);
    free(by_next);
    return bad ? TRAIN_FAILED : TRAIN_DONE;
}

static int train_once(const options *o, const text *corpus, const ranks *r)
{
    trainer t;
    int result = trainer_create(&t, o, corpus, r) != 0 ? TRAIN_FAILED : TRAIN_DONE;
    if (result == TRAIN_DONE && !o->quiet) print_parameters(&t);
    if (result == TRAIN_DONE) result = train(&t);
    int saved = result != TRAIN_UNSAVED;
    if (result == TRAIN_DONE || !saved) result = print_end(&t);
    trainer_destroy(&t);
    return saved ? result : TRAIN_FAILED;
}

/* Rank 0 reads, and says what is wrong; the others have the same command line. */
static int read_options(options *o, const ranks *r, int argc, char **argv)
{
    int told = ranks_agree(r, r->rank == 0 ? options_read(o, r, argc, argv) : 0);
    return told != 0 || r->rank == 0 ? told : options_read(o, r, argc, argv);
}

/* Rank 0 reads the text for all. */
static int read_text(const options *o, const ranks *r, text *t)
{
    if (ranks_agree(r, r->rank == 0 ? text_read(t, o->file, TEXT_LIMIT) : 0) != 0) return -1;
    uint8_t *bytes = r->rank == 0 ? t->bytes : NULL;
    if (ranks_broadcast(r, t, sizeof *t) != 0) return -1;
    t->bytes = bytes ? bytes : malloc(t->size);
    if (t->bytes) return ranks_broadcast(r, t->bytes, (int64_t)t->size);
    fprintf(stderr, "out of memory\n");
    return -1;
}

/* Returns the exit code. */
static int run(const ranks *r, int argc, char **argv)
{
    options o;
    text t = {0};
    int told = read_options(&o, r, argc, argv);
    if (told != 0) return told < 0 ? 2 : 0;
    if (read_text(&o, r, &t) != 0) {
        text_free(&t);
        return 1;
    }
    trainer_catch_signals();
    int result = TRAIN_DONE;
    if (!o.quiet) {
        print_text(&o, &t);
        print_ranks(&o, r);
        result = print_models(&o);
    }
    if (result == TRAIN_DONE) result = o.sweep ? sweep(&o, &t, r) : train_once(&o, &t, r);
    text_free(&t);
    if (result == TRAIN_INTERRUPTED) return 128 + trainer_signal;
    return result == TRAIN_DONE ? 0 : 1;
}

int main(int argc, char **argv)
{
    ranks r;
    setvbuf(stdout, NULL, _IOLBF, 0); /* in a file too an error stands behind what was before it */
    if (ranks_begin(&r, &argc, &argv) != 0) return 1;
    int code = run(&r, argc, argv);
    ranks_end(&r, code);
    return code;
}
