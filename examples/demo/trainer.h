/* trainer.h - the MoE model and its dense twin in training, side by side. */
#ifndef DEMO_TRAINER_H
#define DEMO_TRAINER_H

#include "model.h"
#include "options.h"
#include "text.h"

#include <signal.h>

enum { MOE = 0, DENSE = 1, MODELS = 2 };

/* Batches of held-out text at a report and, sixteen times as many, at the end. */
#ifndef DEMO_HELD
#define DEMO_HELD 4 /* as DEMO_TOKENS */
#endif
enum { HELD_BATCHES = DEMO_HELD, FINAL_BATCHES = 16 * DEMO_HELD };

/* All that a checkpoint keeps besides the parameters, in `state`. */
typedef struct trainer_state {
    int64_t step;        /* steps done */
    uint64_t random;     /* of the places to train on */
    double bits[MODELS]; /* training bits per byte, a moving average */
    double balance_loss; /* of the last step */
} trainer_state;

typedef struct trainer {
    const options *options;
    const text *text;
    const ranks *ranks;
    moe_context *context;
    moe_comm *comm;
    model models[MODELS];
    int used[MODELS]; /* 0: --only asked for the other */
    trainer_state state;
    double seconds[MODELS]; /* spent in the steps of each; no part of the state */
} trainer;

/* How the experts of the MoE model shared the entries of a held-out measurement. */
typedef struct sharing {
    int64_t experts;
    double busiest; /* largest count over the mean */
    double entropy; /* in nats; ln E is perfect balance */
    int64_t idle;   /* experts with less than 1/(4E) of the entries */
} sharing;

/* What was measured on held-out text. */
typedef struct held_out {
    double bits[MODELS];
    double error;    /* standard error of bits[DENSE] - bits[MOE], byte by byte */
    sharing sharing; /* zero without the MoE model */
} held_out;

/* Seconds of a clock that only runs forward. */
double trainer_clock(void);

/* Set by SIGINT and SIGTERM: the number of the signal. */
extern volatile sig_atomic_t trainer_signal;
void trainer_catch_signals(void);

/* Return 0, or -1 with a message on stderr. Every rank makes every call but trainer_destroy, and
 * has the same results. */
int trainer_create(trainer *t, const options *o, const text *corpus, const ranks *r);
void trainer_destroy(trainer *t);

/* Warm-up, then half a cosine down to a twentieth of the rate: the rate of step `step`. */
double trainer_rate(const options *o, int64_t step);

/* One step of each model on the same batch. */
int trainer_step(trainer *t);

/* Measures on `batches` batches at places that are always the same. by_read, by_next: [experts *
 * CLASSES] each, counts of (expert, class) by the last byte read and by the byte to predict, or
 * both NULL. */
int trainer_measure(trainer *t, int batches, held_out *held, double *by_read, double *by_next);

#endif
