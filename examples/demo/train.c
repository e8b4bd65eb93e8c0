/* train.c - see train.h. A signal only sets a flag; it is looked at between steps, after the report
 * and the log row of the step, so that a run that goes on writes the rows of one that was never
 * interrupted. */
#include "train.h"

#include "checkpoint.h"
#include "log.h"

#include <stdio.h>

/* When this run began, and at what step and second of the whole training. */
typedef struct stopwatch {
    double begin, seconds_before;
    int64_t step_before;
} stopwatch;

/* One line for both models; on a terminal always the same line, in a file a line for about a
 * fiftieth of the run. */
static void print_progress(const trainer *t, const held_out *held, const stopwatch *watch)
{
    static const char *const names[MODELS] = {"MoE", "dense"};
    const trainer_state *s = &t->state;
    int64_t done = s->step - watch->step_before, left = t->options->steps - s->step;
    double elapsed = trainer_clock() - watch->begin;
    int64_t often = t->options->report, every = often * (1 + t->options->steps / (50 * often));
    int tty = ranks_terminal(t->ranks),
        seconds = (int)(elapsed / (double)done * (double)left + 0.5);
    if (!tty && s->step % every != 0 && left > 0) return;
    printf("%sstep %lld/%lld", tty ? "\r" : "", (long long)s->step, (long long)t->options->steps);
    for (int i = 0; i < MODELS; i++)
        if (t->used[i]) printf("  %s %.3f held-out %.3f", names[i], s->bits[i], held->bits[i]);
    printf("  %.0f bytes/s  %d:%02d left%s", (double)(done * t->options->batch) / elapsed,
           seconds / 60, seconds % 60, tty && left > 0 ? "   " : "\n");
    fflush(stdout);
}

static int report(trainer *t, log_file *log, const stopwatch *watch)
{
    held_out held;
    const options *o = t->options;
    if (o->quiet && !o->log) return 0;
    if (trainer_measure(t, HELD_BATCHES, &held, NULL, NULL) != 0) return -1;
    if (!o->quiet) print_progress(t, &held, watch);
    double seconds = watch->seconds_before + trainer_clock() - watch->begin;
    return ranks_agree(t->ranks, log_row(log, t, &held, seconds));
}

/* Whether a signal came to any rank; then it has come to all. One that comes while the ranks
 * compare is looked at before the next step. */
static int look_for_signal(const trainer *t, int *came)
{
    *came = trainer_signal;
    if (ranks_most(t->ranks, came) != 0) return -1;
    if (*came) trainer_signal = *came;
    return 0;
}

static int run_steps(trainer *t, log_file *log, const stopwatch *watch)
{
    const options *o = t->options;
    int came = 0;
    while (t->state.step < o->steps) {
        if (look_for_signal(t, &came) != 0) return TRAIN_FAILED;
        if (came) return TRAIN_INTERRUPTED;
        if (trainer_step(t) != 0) return TRAIN_FAILED;
        int64_t step = t->state.step;
        if ((step % o->report == 0 || step == o->steps) && report(t, log, watch) != 0)
            return TRAIN_FAILED;
        if (o->save_every > 0 && step % o->save_every == 0 && step < o->steps &&
            checkpoint_save(t, o->save) != 0)
            return TRAIN_FAILED;
    }
    return TRAIN_DONE;
}

static void tell_interruption(const trainer *t)
{
    const options *o = t->options;
    printf("\ninterrupted after step %lld of %lld; ", (long long)t->state.step,
           (long long)o->steps);
    if (o->save)
        printf("saved: go on with the same options and --resume %s\n", o->save);
    else
        printf("nothing was saved, for --save was not given\n");
}

/* Files are rank 0's. */
static int begin(trainer *t, log_file *log, double *seconds_before)
{
    const options *o = t->options;
    int first = t->ranks->rank == 0;
    if (ranks_agree(t->ranks, first && o->save ? checkpoint_probe(o->save) : 0) != 0) return -1;
    if (o->resume && checkpoint_load(t, o->resume) != 0) return -1;
    if (o->resume && !o->quiet)
        printf("going on after step %lld of %s\n", (long long)t->state.step, o->resume);
    return ranks_agree(t->ranks, first ? log_open(log, o->log, t, seconds_before) : 0);
}

int train(trainer *t)
{
    const options *o = t->options;
    log_file log = {0};
    stopwatch watch = {0};
    if (begin(t, &log, &watch.seconds_before) != 0) {
        log_close(&log);
        return TRAIN_FAILED;
    }
    watch.step_before = t->state.step;
    watch.begin = trainer_clock();
    if (!o->quiet)
        printf("bits per byte of training (moving average) and of held-out text, the less the "
               "better:\n");
    int result = run_steps(t, &log, &watch);
    int closed = log_close(&log);
    if (result == TRAIN_FAILED) return result;
    if (ranks_agree(t->ranks, closed) != 0) return TRAIN_FAILED;
    if (o->save && checkpoint_save(t, o->save) != 0)
        return result == TRAIN_DONE ? TRAIN_UNSAVED : TRAIN_FAILED;
    if (result == TRAIN_INTERRUPTED) tell_interruption(t);
    return result;
}
