/* picture.c - see picture.h: bars for the load, a heat table for the kinds of bytes. At most 100
 * columns of plain ASCII; colour on a terminal only. */
#include "picture.h"

#include "classes.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BAR = 60, MOST_ROWS = 64 };

/* An expert as a row of the pictures. */
typedef struct row {
    int64_t expert;
    int favourite; /* the class of which it takes most, compared with the others */
    double load, lift;
} row;

static double sum_of(const double *values, int64_t count, int64_t stride)
{
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += values[i * stride];
    return sum;
}

/* How much a class tells of the expert, in bits: sum p(e,c) log2(p(e,c) / p(e) p(c)). */
static double mutual_information(const double *table, int64_t experts)
{
    double bits = 0, all = sum_of(table, experts * CLASSES, 1);
    for (int64_t e = 0; e < experts; e++)
        for (int c = 0; c < CLASSES; c++) {
            double both = table[e * CLASSES + c];
            double apart = sum_of(table + e * CLASSES, CLASSES, 1) *
                           sum_of(table + c, experts, CLASSES);
            if (both > 0) bits += both / all * log2(both * all / apart);
        }
    return bits;
}

static double class_entropy(const double *table, int64_t experts)
{
    double bits = 0, all = sum_of(table, experts * CLASSES, 1);
    for (int c = 0; c < CLASSES; c++) {
        double part = sum_of(table + c, experts, CLASSES) / all;
        if (part > 0) bits -= part * log2(part);
    }
    return bits;
}

/* ---- rows in an order that shows something --------------------------------------------------- */

static int by_load(const void *a, const void *b)
{
    const row *x = a, *y = b;
    if (x->load != y->load) return x->load < y->load ? 1 : -1;
    return x->expert < y->expert ? -1 : 1;
}

static int by_favourite(const void *a, const void *b)
{
    const row *x = a, *y = b;
    if (x->favourite != y->favourite) return x->favourite - y->favourite;
    if (x->lift != y->lift) return x->lift < y->lift ? 1 : -1;
    return x->expert < y->expert ? -1 : 1;
}

static row *make_rows(const double *table, int64_t experts)
{
    double all = sum_of(table, experts * CLASSES, 1);
    row *rows = calloc((size_t)experts, sizeof *rows);
    if (!rows) return NULL;
    for (int64_t e = 0; e < experts; e++) {
        row *r = &rows[e];
        *r = (row){.expert = e, .load = sum_of(table + e * CLASSES, CLASSES, 1)};
        for (int c = 0; c < CLASSES; c++) {
            double usual = r->load * sum_of(table + c, experts, CLASSES) / all;
            double lift = usual > 0 ? table[e * CLASSES + c] / usual : 0;
            /* A few bytes of a rare class are no preference. */
            if (lift > r->lift && table[e * CLASSES + c] > 0.02 * r->load)
                r->lift = lift, r->favourite = c;
        }
    }
    return rows;
}

/* ---- the two pictures ------------------------------------------------------------------------ */

static void print_bars(const row *rows, int64_t shown, const held_out *held, int64_t top_k)
{
    double all = 0, most = 0;
    for (int64_t i = 0; i < held->sharing.experts; i++)
        all += rows[i].load, most = fmax(most, rows[i].load);
    printf(
        "\nHow the %lld experts share the held-out bytes (each byte visits %lld; an even share is "
        "%.2f%%)\n",
        (long long)held->sharing.experts, (long long)top_k, 100 / (double)held->sharing.experts);
    for (int64_t i = 0; i < shown; i++) {
        int length = (int)(BAR * rows[i].load / most + 0.5);
        printf("  expert %4lld %6.2f%% |%.*s\n", (long long)rows[i].expert,
               100 * rows[i].load / all, length,
               "############################################################");
    }
    if (shown < held->sharing.experts)
        printf("  and %lld experts with less\n", (long long)(held->sharing.experts - shown));
    printf(
        "  busiest %.2f times the mean; entropy %.2f of at most %.2f nats; %lld below a quarter of "
        "the mean\n",
        held->sharing.busiest, held->sharing.entropy, log((double)held->sharing.experts),
        (long long)held->sharing.idle);
}

/* A percentage behind a mark that grows with it, in three colours on a terminal. */
static void print_cell(double part, int colour)
{
    static const char marks[] = " .:-=+*#%@";
    int level = (int)(sqrt(part) * 10);
    level = level > 9 ? 9 : level;
    if (colour && level > 0) printf("\033[%sm", level < 4 ? "36" : level < 7 ? "33" : "1;31");
    if (part >= 0.005)
        printf("  %c%c%4.0f", marks[level], marks[level], 100 * part);
    else
        printf("  %c%c   .", marks[level], marks[level]);
    if (colour && level > 0) printf("\033[0m");
}

static void print_heat(const row *rows, int64_t shown, int64_t experts, const double *table,
                       const char *what, int colour)
{
    printf("\nWhich kinds of bytes each expert takes, by %s\n  %-11s", what, "");
    for (int c = 0; c < CLASSES; c++) printf("  %6s", class_name(c));
    printf("\n");
    for (int64_t i = 0; i < shown; i++) {
        const double *counts = table + rows[i].expert * CLASSES;
        if (rows[i].load == 0) continue;
        printf("  expert %4lld", (long long)rows[i].expert);
        for (int c = 0; c < CLASSES; c++) print_cell(counts[c] / rows[i].load, colour);
        printf("\n");
    }
    double all = sum_of(table, experts * CLASSES, 1);
    printf("  all bytes  ");
    for (int c = 0; c < CLASSES; c++) print_cell(sum_of(table + c, experts, CLASSES) / all, colour);
    printf(
        "\n  A row says of what an expert's bytes consist, in percent. Were there no specialists, "
        "every row\n  would look like the last one.\n");
}

int picture_print(const held_out *held, int64_t top_k, const double *by_read, const double *by_next,
                  int colour)
{
    int64_t experts = held->sharing.experts, shown = experts < MOST_ROWS ? experts : MOST_ROWS;
    double read = mutual_information(by_read, experts), next = mutual_information(by_next, experts);
    const double *table = read >= next ? by_read : by_next;
    row *rows = make_rows(table, experts);
    if (!rows) {
        fprintf(stderr, "out of memory\n");
        return -1;
    }
    qsort(rows, (size_t)experts, sizeof *rows, by_load);
    print_bars(rows, shown, held, top_k);
    qsort(rows, (size_t)shown, sizeof *rows, by_favourite);
    print_heat(rows, shown, experts, table,
               read >= next ? "the last byte read" : "the byte to predict", colour);
    printf(
        "  The choice of expert tells %.2f of the %.2f bits of the kind of the last byte read, and "
        "%.2f of\n  the %.2f of the byte to predict.\n",
        read, class_entropy(by_read, experts), next, class_entropy(by_next, experts));
    free(rows);
    return 0;
}
