/* options.h - what the command line says. */
#ifndef DEMO_OPTIONS_H
#define DEMO_OPTIONS_H

#include "ranks.h"

#include <stdint.h>

enum { ONLY_BOTH = 0, ONLY_MOE = 1, ONLY_DENSE = 2 };

typedef struct options {
    const char *file;                /* text: a file or a directory */
    const char *log, *save, *resume; /* NULL: not asked for */
    int64_t steps, save_every;       /* save_every 0: at the end only */
    int64_t report;                  /* steps between reports */
    int64_t experts, top_k, hidden;
    int64_t batch, groups; /* bytes of a step, and in how many groups */
    uint64_t seed;
    int32_t threads; /* 0: as many as the machine gives, on several ranks 1 */
    double rate, balance;
    int only, quiet, sweep;
} options;

/* Returns 0, 1 after --help, or -1 with a message on stderr. */
int options_read(options *o, const ranks *r, int argc, char **argv);

#endif
