/* sweep.h - both models with three learning rates by three seeds. */
#ifndef DEMO_SWEEP_H
#define DEMO_SWEEP_H

#include "options.h"
#include "text.h"

/* Prints Markdown tables as runs finish. Returns as train. */
int sweep(const options *o, const text *corpus, const ranks *r);

#endif
