/* log.c - see log.h. Rows are written with as many digits as a double needs, so that two logs can
 * be compared as text; a cell of a model that is not trained is empty. */
#define _XOPEN_SOURCE 700
#include "log.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

static const char HEADER[] =
    "step,seconds,moe_seconds,dense_seconds,moe_train_bits,moe_held_bits,dense_train_bits,"
    "dense_held_bits,balance_loss,busiest_over_mean,load_entropy_nats,idle_experts,learning_rate\n";

static int failed(const log_file *l, const char *what)
{
    fprintf(stderr, "%s: %s: %s\n", l->path, what, strerror(errno));
    return -1;
}

/* Leaves the file at the end of the last row whose step is at most the trainer's. */
static int keep_rows(log_file *l, trainer *t, double *seconds)
{
    char line[1024];
    long end;
    if (!fgets(line, sizeof line, l->file)) {
        rewind(l->file);
        return fputs(HEADER, l->file) < 0 ? failed(l, "cannot write") : 0;
    }
    if (strcmp(line, HEADER) != 0) {
        fprintf(stderr, "%s: not a log of this program: its first row is %.60s\n", l->path, line);
        return -1;
    }
    for (end = ftell(l->file); fgets(line, sizeof line, l->file); end = ftell(l->file)) {
        long long row;
        double all, each[MODELS];
        if (!strchr(line, '\n') ||
            sscanf(line, "%lld,%lf,%lf,%lf", &row, &all, &each[MOE], &each[DENSE]) != 4 ||
            row > t->state.step)
            break;
        *seconds = all;
        memcpy(t->seconds, each, sizeof each);
    }
    if (end < 0 || fseek(l->file, end, SEEK_SET) != 0) return failed(l, "cannot seek");
    return ftruncate(fileno(l->file), end) != 0 ? failed(l, "cannot cut") : 0;
}

int log_open(log_file *l, const char *path, trainer *t, double *seconds)
{
    *l = (log_file){.path = path};
    if (!path) return 0;
    if (t->state.step > 0) l->file = fopen(path, "r+");
    if (l->file) return keep_rows(l, t, seconds);
    l->file = fopen(path, "w");
    if (!l->file) return failed(l, "cannot open");
    return fputs(HEADER, l->file) < 0 || fflush(l->file) != 0 ? failed(l, "cannot write") : 0;
}

int log_row(log_file *l, const trainer *t, const held_out *held, double seconds)
{
    if (!l->file) return 0;
    fprintf(l->file, "%lld,%.2f,%.2f,%.2f", (long long)t->state.step, seconds, t->seconds[MOE],
            t->seconds[DENSE]);
    for (int i = 0; i < MODELS; i++) {
        if (t->used[i])
            fprintf(l->file, ",%.17g,%.17g", t->state.bits[i], held->bits[i]);
        else
            fprintf(l->file, ",,");
    }
    if (t->used[MOE])
        fprintf(l->file, ",%.17g,%.17g,%.17g,%lld", t->state.balance_loss, held->sharing.busiest,
                held->sharing.entropy, (long long)held->sharing.idle);
    else
        fprintf(l->file, ",,,,");
    fprintf(l->file, ",%.17g\n", trainer_rate(t->options, t->state.step - 1));
    return fflush(l->file) != 0 ? failed(l, "cannot write") : 0;
}

int log_close(log_file *l)
{
    if (!l->file) return 0;
    int bad = ferror(l->file);
    if (fclose(l->file) != 0) bad = 1;
    l->file = NULL;
    return bad ? failed(l, "cannot write") : 0;
}
