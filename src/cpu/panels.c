/* panels.c - weights from strides to panels and back.
 *
 *     to[e,i,j] = from[e,i,j],  i < rows, j < cols, whatever the orders (grouped_gemm.h)
 *
 * A task is a group of up to MOE__PANEL columns of one matrix, cut in blocks of rows and columns
 * small enough that both sides stay in the first cache, whichever of them is contiguous. */
#include "cpu/kernels.h"

enum { BLOCK = 64, LINE_ELEMENTS = 16 };

/* The place of column j in row 0 of matrix e, and how far rows and columns are apart there: within
 * a panel and up to its end. */
typedef struct column {
    char *at;
    int64_t row, col;
} column;

static column column_of(const moe__matrices *m, int64_t e, int64_t j)
{
    int64_t size = moe__dtype_size(m->dtype), place = m->offset;
    char *base = m->each ? m->each[e] : m->base;
    if (!base) return (column){0};
    if (!m->each) place += e * m->stride_expert;
    place += m->panel ? j / m->panel * m->panel_step + j % m->panel : j * m->stride_col;
    return (column){base + place * size, m->stride_row * size, m->stride_col * size};
}

#define COPY(type)                                                  \
    for (int64_t i = 0; i < rows; i++)                              \
        for (int64_t j = 0; j < cols; j++)                          \
            *(type *)(void *)(to.at + i * to.row + j * to.col) = *( \
                const type *)(const void *)(from.at + i * from.row + j * from.col);

static void copy_block(column to, column from, int64_t rows, int64_t cols, int64_t size)
{
    if (size == 2) {
        COPY(uint16_t)
    } else if (size == 4) {
        COPY(uint32_t)
    } else {
        COPY(uint64_t)
    }
}
#undef COPY

/* Columns that are together on both sides. */
static int64_t group_of(const moe__copy_job *job)
{
    int64_t from = job->from.panel ? job->from.panel : MOE__PANEL;
    int64_t to = job->to.panel ? job->to.panel : MOE__PANEL;
    return moe__min(from, to);
}

static void copy_range(void *argument, int64_t begin, int64_t end)
{
    const moe__copy_job *job = argument;
    int64_t group = group_of(job), groups = (job->cols + group - 1) / group;
    int64_t size = moe__dtype_size(job->from.dtype);
    for (int64_t n = begin; n < end; n++) {
        int64_t e = n / groups, j = n % groups * group;
        int64_t cols = moe__min(group, job->cols - j);
        column from = column_of(&job->from, e, j), to = column_of(&job->to, e, j);
        if (!from.at || !to.at) continue;
        for (int64_t i = 0; i < job->rows; i += LINE_ELEMENTS) {
            int64_t rows = moe__min(LINE_ELEMENTS, job->rows - i);
            column f = {from.at + i * from.row, from.row, from.col};
            column t = {to.at + i * to.row, to.row, to.col};
            copy_block(t, f, rows, cols, size);
        }
    }
}

moe_status MOE_KERNEL(matrices_copy)(const moe__copy_job *job)
{
    int64_t group = group_of(job), groups = (job->cols + group - 1) / group;
    int64_t grain = moe__max(1, 65536 / moe__max(1, job->rows * group));
    return moe__parallel_range(job->workers.context, job->experts * groups, grain, copy_range,
                               (void *)(uintptr_t)job, job->workers.function);
}
