/* ranks.c - see ranks.h: over moe_comm, whatever is below it. */
#define _XOPEN_SOURCE 700
#include "ranks.h"

#include "model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int ranks_terminal(const ranks *r) { return r->size == 1 && isatty(STDOUT_FILENO); }

int64_t ranks_share(int64_t n, int64_t parts, int64_t part)
{
    int64_t more = n % parts;
    return n / parts * part + (part < more ? part : more);
}

void ranks_shares(int64_t *begin, int64_t n, int64_t parts)
{
    for (int64_t q = 0; q <= parts; q++) begin[q] = ranks_share(n, parts, q);
}

int ranks_gather(const ranks *r, void *all, const int64_t *begin, const void *own,
                 int64_t row_bytes)
{
    if (r->size > 1)
        TRY(moe_comm_all_gather(r->comm, all, begin, own, row_bytes));
    else
        memcpy(all, own, (size_t)(begin[1] * row_bytes));
    return 0;
}

int ranks_gather_to_first(const ranks *r, void *all, const int64_t *begin, const void *own,
                          int64_t row_bytes)
{
    int64_t none[MOST_RANKS + 1] = {0}, to_first[MOST_RANKS + 1] = {0};
    moe_exchange e;
    if (r->size == 1) return ranks_gather(r, all, begin, own, row_bytes);
    for (int32_t q = 0; q < r->size; q++) to_first[q + 1] = begin[r->rank + 1] - begin[r->rank];
    TRY(moe_exchange_init(&e, sizeof e));
    e.recv = all;
    e.recv_begin = r->rank == 0 ? begin : none;
    e.send = own;
    e.send_begin = to_first;
    e.row_bytes = row_bytes;
    TRY(moe_comm_exchange(r->comm, &e));
    return 0;
}

/* ---- sums ------------------------------------------------------------------------------------ */

/* Parts of this rank's slice, one after another, added to the first. */
typedef void (*add_fn)(void *to, const void *from, int64_t count);

static void add_floats(void *to, const void *from, int64_t count)
{
    float *sum = to;
    const float *part = from;
    for (int64_t i = 0; i < count; i++) sum[i] += part[i];
}

static void add_doubles(void *to, const void *from, int64_t count)
{
    double *sum = to;
    const double *part = from;
    for (int64_t i = 0; i < count; i++) sum[i] += part[i];
}

/* Each rank receives its slice of everyone's values, adds them up in order of rank, and hands the
 * sum to all. A transport's own sum would have an order of its own. */
static int sum_slices(const ranks *r, void *values, int64_t count, char *slices, int64_t size,
                      add_fn add)
{
    int64_t begin[MOST_RANKS + 1] = {0}, same[MOST_RANKS + 1] = {0};
    moe_exchange e;
    ranks_shares(begin, count, r->size);
    int64_t own = begin[r->rank + 1] - begin[r->rank];
    for (int32_t q = 0; q <= r->size; q++) same[q] = q * own;
    TRY(moe_exchange_init(&e, sizeof e));
    e.recv = slices;
    e.recv_begin = same;
    e.send = values;
    e.send_begin = begin;
    e.row_bytes = size;
    TRY(moe_comm_exchange(r->comm, &e));
    for (int32_t q = 1; q < r->size; q++) add(slices, slices + q * own * size, own);
    return ranks_gather(r, values, begin, slices, size);
}

static int sum(const ranks *r, void *values, int64_t count, int64_t size, add_fn add)
{
    if (r->size == 1 || count == 0) return 0;
    char *slices = malloc((size_t)((count / r->size + 1) * r->size * size));
    if (!slices) {
        fprintf(stderr, "out of memory\n");
        return -1;
    }
    int result = sum_slices(r, values, count, slices, size, add);
    free(slices);
    return result;
}

int ranks_sum_floats(const ranks *r, float *values, int64_t count)
{
    return sum(r, values, count, sizeof *values, add_floats);
}

int ranks_sum_doubles(const ranks *r, double *values, int64_t count)
{
    return sum(r, values, count, sizeof *values, add_doubles);
}

/* ---- agreement ------------------------------------------------------------------------------- */

int ranks_broadcast(const ranks *r, void *data, int64_t bytes)
{
    int64_t begin[MOST_RANKS + 1] = {0};
    if (r->size == 1 || bytes == 0) return 0;
    begin[0] = 0;
    for (int32_t q = 1; q <= r->size; q++) begin[q] = bytes;
    void *own = r->rank == 0 ? malloc((size_t)bytes) : NULL;
    if (r->rank == 0 && !own) {
        fprintf(stderr, "out of memory\n");
        return -1;
    }
    if (own) memcpy(own, data, (size_t)bytes);
    int result = ranks_gather(r, data, begin, own, 1);
    free(own);
    return result;
}

int ranks_most(const ranks *r, int *value)
{
    int all[MOST_RANKS] = {0};
    int64_t begin[MOST_RANKS + 1] = {0};
    if (r->size == 1) return 0;
    ranks_shares(begin, r->size, r->size);
    if (ranks_gather(r, all, begin, value, sizeof *value) != 0) return -1;
    for (int32_t q = 0; q < r->size; q++) *value = all[q] > *value ? all[q] : *value;
    return 0;
}

int ranks_agree(const ranks *r, int result)
{
    return ranks_broadcast(r, &result, sizeof result) != 0 ? -1 : result;
}
