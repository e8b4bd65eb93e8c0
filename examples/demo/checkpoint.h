/* checkpoint.h - a training run in a file, to go on from exactly. */
#ifndef DEMO_CHECKPOINT_H
#define DEMO_CHECKPOINT_H

#include "trainer.h"

/* Finds out before hours of work whether a checkpoint can be written at `path`; an old one stays.
 * Returns 0, or -1 with a message on stderr. */
int checkpoint_probe(const char *path);

/* Writes the run to a temporary file beside `path`, which then takes the name `path`: there is
 * always a whole checkpoint or none. Returns 0, or -1 with a message on stderr. */
int checkpoint_save(const trainer *t, const char *path);

/* Reads a run into a trainer made with the same options and text. A file that is damaged, foreign,
 * or of other options or another text is refused with a message on stderr that says why; the
 * trainer is unchanged then. Returns 0 or -1. */
int checkpoint_load(trainer *t, const char *path);

#endif
