/* log.h - the CSV log, one row a report. */
#ifndef DEMO_LOG_H
#define DEMO_LOG_H

#include "trainer.h"

#include <stdio.h>

typedef struct log_file {
    FILE *file; /* NULL: none was asked for */
    const char *path;
} log_file;

/* Opens a new log, or for a trainer that has done steps goes on with one: later rows are cut off,
 * and *seconds and t->seconds become what the last row that stays says. Returns 0, or -1 with a
 * message on stderr. */
int log_open(log_file *l, const char *path, trainer *t, double *seconds);
int log_row(log_file *l, const trainer *t, const held_out *held, double seconds);
/* Returns -1 with a message if something could not be written. */
int log_close(log_file *l);

#endif
