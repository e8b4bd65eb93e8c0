/* checkpoint.h - a training run in a file, to go on from exactly. */
#ifndef DEMO_CHECKPOINT_H
#define DEMO_CHECKPOINT_H

#include "trainer.h"

/* Finds out before hours of work whether a checkpoint can be written at `path`; an old one stays,
 * and a file that is neither empty nor one, whole or damaged, is not to be overwritten. Returns 0,
 * or -1 with a message on stderr. */
int checkpoint_probe(const char *path);

/* Rank 0 writes the run to a temporary file beside `path`, which then takes the name `path`: there
 * is always a whole checkpoint or none. The same bytes for any number of ranks that had the same
 * parameters. Every rank makes this call. Returns 0, or -1 with a message on stderr. */
int checkpoint_save(const trainer *t, const char *path);

/* Reads a run into a trainer made with the same options and text. A file that is damaged, foreign,
 * or of other options or another text is refused with a message on stderr that says why; the
 * trainer is unchanged then. Rank 0 reads; every rank makes this call. Returns 0 or -1. */
int checkpoint_load(trainer *t, const char *path);

#endif
