/* picture.h - what the experts learned, in characters. */
#ifndef DEMO_PICTURE_H
#define DEMO_PICTURE_H

#include "trainer.h"

/* Prints how the experts shared the held-out bytes, and which kinds of bytes each takes. The tables
 * are trainer_measure's. colour: 1 for a terminal. Returns 0, or -1 with a message on stderr. */
int picture_print(const held_out *held, int64_t top_k, const double *by_read, const double *by_next,
                  int colour);

#endif
