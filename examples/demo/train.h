/* train.h - a whole run: resume, steps, reports, log, checkpoints. */
#ifndef DEMO_TRAIN_H
#define DEMO_TRAIN_H

#include "trainer.h"

/* TRAIN_UNSAVED: all steps are done, and the last checkpoint could not be saved. */
enum { TRAIN_DONE = 0, TRAIN_INTERRUPTED = 1, TRAIN_UNSAVED = 2, TRAIN_FAILED = -1 };

/* Trains to the last step, or to the step in which a signal came. */
int train(trainer *t);

#endif
