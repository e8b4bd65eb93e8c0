/* travel.c - rows that travel between ranks: packing, the owner's plan, what comes back.
 *
 *     pack        columns of rows, one after another in a row that travels
 *     unique      the tokens that have rows for a node, in order
 *     order       a plan of what came: a token is a position, rows go by (slot, source)
 *     merge       row by row: slice 0, plus slice 1, and so on
 *     entry_grad  gradients by weights, of each entry from its row */
#include "cpu/kernels.h"
#include "reals.h"

#include <string.h>

/* ---- packing --------------------------------------------------------------------------------- */

/* A number from another rank may be any. */
static int64_t in_window(const moe__window *w, int64_t number)
{
    return w->base + (number >= 0 && number < w->rows ? number : 0);
}

static void pack_row(const moe__pack_job *job, int64_t from, int64_t place, int64_t range)
{
    char *to = (char *)job->to + place * job->row_bytes;
    for (int64_t c = 0; c < job->columns; c++) {
        const moe__column *column = &job->column[c];
        int64_t at = column->by_place ? place : from;
        if (column->index) at = column->index[at];
        if (column->window) at = in_window(&column->window[range], at);
        memcpy(to + column->at, (const char *)column->from + at * column->stride,
               (size_t)column->bytes);
    }
}

static void pack_range(void *argument, int64_t begin, int64_t end)
{
    const moe__pack_job *job = argument;
    const moe__moves *m = &job->moves;
    if (!m->first) {
        for (int64_t i = begin; i < end; i++) pack_row(job, i, i, 0);
        return;
    }
    begin += m->first[0], end += m->first[0];
    int64_t s = run_of(m->first, m->count, begin);
    for (int64_t i = begin; i < end; i++) {
        while (i >= m->first[s + 1]) s++;
        pack_row(job, m->from[s] + i - m->first[s], m->to[s] + i - m->first[s], s);
    }
}

moe_status MOE_KERNEL(travel_pack)(const moe__pack_job *job)
{
    const moe__moves *m = &job->moves;
    int64_t rows = m->first ? m->first[m->count] - m->first[0] : m->most;
    return moe__parallel_range(job->workers.context, rows, 64, pack_range, (void *)(uintptr_t)job,
                               job->workers.function);
}

/* ---- tokens of nodes ------------------------------------------------------------------------- */

/* place first is 1 or 0. */
moe_status MOE_KERNEL(travel_unique)(const moe__unique_job *job)
{
    const moe__plan_arrays *plan = job->plan;
    int64_t T = plan->tokens, S = job->slices, count = 0;
    for (int64_t i = 0; i < job->nodes * T; i++) job->place[i] = 0;
    for (int64_t r = 0; r < plan->rows; r++) {
        int64_t number = plan->expert_of_entry[plan->entry_of_row[r]] * S;
        for (int64_t s = 0; s < S; s++)
            job->place[job->node_of_number[number + s] * T + plan->token_of_row[r]] = 1;
    }
    for (int64_t n = 0; n < job->nodes; n++) {
        job->begin[n] = count;
        for (int64_t t = 0; t < T; t++) {
            if (!job->place[n * T + t]) continue;
            job->place[n * T + t] = count - job->begin[n];
            job->token[count++] = t;
        }
    }
    job->begin[job->nodes] = count;
    return MOE_OK;
}

/* ---- the owner's plan ------------------------------------------------------------------------ */

moe_status MOE_KERNEL(travel_order)(const moe__order_job *job)
{
    moe__plan_arrays *plan = job->plan;
    const moe__moves *m = &job->moves;
    real *weight = plan->weight_of_entry;
    for (int64_t i = 0; i < plan->entries && job->holes; i++)
        plan->row_of_entry[i] = plan->slot_of_entry[i] = plan->expert_of_entry[i] = -1;
    for (int64_t s = 0; s < m->count; s++)
        for (int64_t row = m->first[s], at = m->to[s]; row < m->first[s + 1]; row++, at++) {
            plan->token_of_row[row] = plan->entry_of_row[row] = at;
            plan->row_of_entry[at] = row;
            plan->slot_of_entry[at] = 0;
            plan->expert_of_entry[at] = (int32_t)(s / job->sources);
            memcpy(weight + at, (const char *)job->x + at * job->row_bytes + job->weight_at,
                   sizeof *weight);
        }
    for (int64_t i = 0; i <= plan->num_experts; i++)
        plan->expert_begin[i] = m->first[i * job->sources];
    for (int64_t t = 0; t <= plan->tokens; t++) plan->token_begin[t] = t;
    plan->group_begin[0] = 0, plan->group_begin[1] = plan->tokens;
    plan->rows = m->first[m->count];
    return MOE_OK;
}

/* ---- what comes back ------------------------------------------------------------------------- */

static void merge_range(void *argument, int64_t begin, int64_t end)
{
    const moe__merge_job *job = argument;
    const moe__plan_arrays *plan = job->plan;
    const int64_t S = job->slices, bytes = job->row_bytes;
    for (int64_t r = begin; r < end; r++) {
        int64_t e = plan->expert_of_entry[plan->entry_of_row[r]], n = r - plan->expert_begin[e];
        const int64_t *slot = job->slot_of_number + e * S;
        const char *results = job->results;
        char *to = (char *)job->merged + r * bytes;
        memcpy(to, results + (job->all_at[slot[0]] + n) * bytes, (size_t)bytes);
        for (int64_t j = 0; j < job->width && S > 1; j++) { /* 16 bits are rounded once */
            real sum = get_at(to, j, 0);
            for (int64_t s = 1; s < S; s++)
                sum += get_at(results + (job->all_at[slot[s]] + n) * bytes, j, 0);
            put_at(to, j, 0, sum);
        }
        for (int64_t s = 1; s < S && job->real_at >= 0; s++) {
            const char *from = results + (job->all_at[slot[s]] + n) * bytes + job->real_at;
            *(real *)(void *)(to + job->real_at) += *(const real *)(const void *)from;
        }
    }
}

moe_status MOE_KERNEL(travel_merge)(const moe__merge_job *job)
{
    return moe__parallel_range(job->workers.context, job->plan->rows, 64, merge_range,
                               (void *)(uintptr_t)job, job->workers.function);
}

moe_status MOE_KERNEL(travel_entry_grad)(const moe__entry_grad_job *job)
{
    const moe__plan_arrays *plan = job->plan;
    real *grad = job->entry_grad;
    for (int64_t n = 0; n < plan->entries; n++) grad[n] = R(0.0);
    for (int64_t r = 0; r < plan->rows; r++)
        memcpy(grad + plan->entry_of_row[r],
               (const char *)job->rows + r * job->row_bytes + job->real_at, sizeof *grad);
    return MOE_OK;
}

/* ---- what does not stay ---------------------------------------------------------------------- */

moe_status MOE_KERNEL(travel_drop)(const moe__drop_job *job)
{
    const moe__moves *m = &job->moves;
    for (int64_t s = 0; s < m->count; s++)
        for (int64_t i = m->first[s]; i < m->first[s + 1]; i++) {
            int64_t n = i - m->first[s];
            if (job->keep ? job->keep[i] : n < job->stay[s]) continue;
            job->plan->slot_of_entry[job->plan->entry_of_row[m->from[s] + n]] = -1;
        }
    return MOE_OK;
}

/* ---- sums over ranks ------------------------------------------------------------------------- */

moe_status MOE_KERNEL(travel_add)(const moe__workers *workers, void *parts, int64_t n,
                                  int64_t count, int32_t dtype)
{
    (void)workers;
    for (int64_t i = 0; i < n; i++) {
        if (dtype == MOE_DTYPE_F64) {
            double *v = (double *)parts + i;
            for (int64_t p = 1; p < count; p++) v[0] += v[p * n];
        } else {
            float sum = (float)moe__real_at(parts, i, dtype);
            for (int64_t p = 1; p < count; p++) sum += (float)moe__real_at(parts, p * n + i, dtype);
            moe__set_real(parts, i, dtype, sum);
        }
    }
    return MOE_OK;
}
