/* trainer.c - see trainer.h. The two models never share a random number: places come from one
 * generator for both, noise from libmoe's counter. */
#define _XOPEN_SOURCE 700
#include "trainer.h"

#include "classes.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

volatile sig_atomic_t trainer_signal = 0;

static void note_signal(int number) { trainer_signal = number; }

void trainer_catch_signals(void)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = note_signal;
    action.sa_flags = SA_RESTART;
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

double trainer_clock(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

int trainer_create(trainer *t, const options *o, const text *corpus, const ranks *r)
{
    memset(t, 0, sizeof *t);
    t->options = o;
    t->text = corpus;
    t->ranks = r;
    t->state.random = o->seed;
    if (device_context(&t->context, o->threads) != 0) return -1;
    if (ranks_join(r, t->context, &t->comm) != 0) return -1;
    for (int i = 0; i < MODELS; i++) {
        model_options m = {.experts = o->experts,
                           .top_k = o->top_k,
                           .hidden = o->hidden,
                           .tokens = TOKENS,
                           .groups = o->groups,
                           .dense = i == DENSE,
                           .seed = o->seed,
                           .balance = o->balance};
        t->used[i] = o->only == ONLY_BOTH || (o->only == ONLY_MOE) == (i == MOE);
        if (t->used[i] && model_create(&t->models[i], t->context, r, t->comm, &m) != 0) return -1;
    }
    return 0;
}

void trainer_destroy(trainer *t)
{
    for (int i = 0; i < MODELS; i++) model_destroy(&t->models[i]);
    moe_comm_destroy(t->comm);
    moe_context_destroy(t->context);
    t->comm = NULL;
    t->context = NULL;
}

/* SplitMix64 (Steele, Lea, Flood 2014). */
static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Random places with CONTEXT bytes before them in the same part of the text. */
static void pick_positions(int64_t *positions, int64_t count, size_t begin, size_t end,
                           uint64_t *state)
{
    for (int64_t i = 0; i < count; i++)
        positions[i] = (int64_t)(begin + CONTEXT + next_random(state) % (end - begin - CONTEXT));
}

double trainer_rate(const options *o, int64_t step)
{
    const double warm = 40, pi = 3.14159265358979323846;
    double rate = o->rate * (0.05 + 0.475 * (1 + cos(pi * (double)step / (double)o->steps)));
    return (double)step < warm ? rate * ((double)step + 1) / warm : rate;
}

int trainer_step(trainer *t)
{
    int64_t positions[TOKENS];
    trainer_state *s = &t->state;
    model_result result;
    const batch b = {t->text->bytes, positions, t->options->batch, s->step, 1};
    pick_positions(positions, b.tokens, 0, t->text->train_size, &s->random);
    for (int i = 0; i < MODELS; i++) {
        model *m = &t->models[i];
        double begin = trainer_clock();
        if (!t->used[i]) continue;
        if (model_run(m, &b, &result) != 0 ||
            model_update(m, s->step, trainer_rate(t->options, s->step)) != 0)
            return -1;
        s->bits[i] = s->step == 0 ? result.bits : 0.95 * s->bits[i] + 0.05 * result.bits;
        t->seconds[i] += trainer_clock() - begin;
        if (i == MOE) s->balance_loss = result.balance_loss;
    }
    s->step++;
    return 0;
}

/* ---- held-out text --------------------------------------------------------------------------- */

/* A copy of what a layer shows, wherever that is; the caller's to free. NULL on failure. */
static void *copy_of(const void *shown, int64_t bytes)
{
    void *copy = malloc((size_t)bytes + 1);
    if (!copy) fprintf(stderr, "out of memory\n");
    if (copy && device_back(copy, shown, bytes) == 0) return copy;
    free(copy);
    return NULL;
}

/* Adds how many bytes of the batch each expert had: the layer counts those of all ranks. */
static int count_entries(const trainer *t, double *counts)
{
    moe_tensor_view v;
    TRY(moe_tensor_view_init(&v, sizeof v));
    TRY(moe_pass_tensor(t->models[MOE].middle.pass[0], MOE_TENSOR_COUNTS, &v));
    int64_t *entries = copy_of(v.data, v.shape[0] * (int64_t)sizeof *entries);
    if (!entries) return -1;
    for (int64_t e = 0; e < v.shape[0]; e++) counts[e] += (double)entries[e];
    free(entries);
    return 0;
}

/* Adds where the bytes of this rank went, by their classes. */
static int count_classes(const trainer *t, const int64_t *positions, double *by_read,
                         double *by_next)
{
    const moe_plan *plan;
    moe_plan_view v;
    int64_t first, tokens;
    model_own_bytes(&t->models[MOE], TOKENS, &first, &tokens);
    TRY(moe_pass_plan(t->models[MOE].middle.pass[0], &plan));
    TRY(moe_plan_view_init(&v, sizeof v));
    TRY(moe_plan_get(plan, &v));
    int64_t *begin = copy_of(v.token_begin, (v.tokens + 1) * (int64_t)sizeof *begin);
    int32_t *expert = copy_of(v.expert_of_entry, v.entries * (int64_t)sizeof *expert);
    for (int64_t token = 0; begin && expert && token < v.tokens; token++) {
        int read = class_of_byte(t->text->bytes[positions[first + token] - 1]);
        int next = class_of_byte(t->text->bytes[positions[first + token]]);
        for (int64_t i = begin[token]; i < begin[token + 1]; i++) {
            by_read[expert[i] * CLASSES + read]++;
            by_next[expert[i] * CLASSES + next]++;
        }
    }
    int failed = !begin || !expert;
    free(begin);
    free(expert);
    return failed ? -1 : 0;
}

/* What the last batch adds to the counts; tables may be NULL. */
static int count_batch(const trainer *t, const int64_t *positions, double *counts, double *by_read,
                       double *by_next)
{
    if (count_entries(t, counts) != 0) return -1;
    return by_read ? count_classes(t, positions, by_read, by_next) : 0;
}

static sharing share(const double *counts, int64_t experts)
{
    sharing s = {.experts = experts};
    double sum = 0, most = 0;
    for (int64_t e = 0; e < experts; e++) sum += counts[e], most = fmax(most, counts[e]);
    for (int64_t e = 0; e < experts; e++) {
        double part = counts[e] / sum;
        if (part > 0) s.entropy -= part * log(part);
        s.idle += 4 * (double)experts * part < 1;
    }
    s.busiest = most / sum * (double)experts;
    return s;
}

/* One batch of both models; sums[i] and squares collect bits and squared differences. */
static int measure_batch(trainer *t, const int64_t *positions, double *sums, double *square)
{
    model_result result;
    const batch b = {t->text->bytes, positions, TOKENS, 0, 0};
    for (int i = 0; i < MODELS; i++) {
        if (!t->used[i]) continue;
        if (model_run(&t->models[i], &b, &result) != 0) return -1;
        sums[i] += result.bits * TOKENS;
    }
    if (!t->used[MOE] || !t->used[DENSE]) return 0;
    for (int j = 0; j < TOKENS; j++) {
        double difference = (double)(t->models[DENSE].bits[j] - t->models[MOE].bits[j]);
        *square += difference * difference;
    }
    return 0;
}

int trainer_measure(trainer *t, int batches, held_out *held, double *by_read, double *by_next)
{
    int64_t positions[TOKENS], experts = t->options->experts;
    uint64_t random = 12345;
    double sums[MODELS] = {0}, square = 0, bytes = (double)batches * TOKENS;
    double *counts = calloc((size_t)experts, sizeof *counts);
    int failed = !counts;
    *held = (held_out){0};
    for (int i = 0; i < batches && !failed; i++) {
        pick_positions(positions, TOKENS, t->text->train_size, t->text->size, &random);
        failed = measure_batch(t, positions, sums, &square) != 0 ||
                 (t->used[MOE] && count_batch(t, positions, counts, by_read, by_next) != 0);
    }
    if (!failed && t->used[MOE] && by_read)
        failed = ranks_sum_doubles(t->ranks, by_read, experts * CLASSES) != 0 ||
                 ranks_sum_doubles(t->ranks, by_next, experts * CLASSES) != 0;
    for (int i = 0; i < MODELS; i++) held->bits[i] = sums[i] / bytes;
    double mean = held->bits[DENSE] - held->bits[MOE];
    /* Of a short text the same bytes come again and again, which makes no more evidence. */
    double evidence = fmin(bytes, (double)(t->text->size - t->text->train_size));
    held->error = sqrt(fmax(square / bytes - mean * mean, 0) / evidence);
    if (!failed && t->used[MOE]) held->sharing = share(counts, experts);
    free(counts);
    return failed ? -1 : 0;
}
