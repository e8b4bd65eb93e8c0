/* move.c - blocks between a file and memory, in chunks of whole rows, or of a part of a long row:
 * converted on the way, taken from or spread over the views that a block is made of. */
#include "io.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { CHUNK = 1 << 16, F8_BLOCK = 128, MX_BLOCK = 32 }; /* elements */

/* Some rows and columns of a block. */
typedef struct range {
    int64_t row, rows, col, cols;
} range;

typedef struct mover {
    const moe__io_plan *plan;
    const moe_file *file;
    const char *function;
    char *raw, *values; /* [CHUNK] of 8 bytes: as in the file, as in memory */
} mover;

static bool begin(mover *m)
{
    m->raw = malloc(2 * 8 * (size_t)CHUNK);
    m->values = m->raw ? m->raw + 8 * CHUNK : NULL;
    return m->raw != NULL;
}

/* The next range of a block, from all 0; false at the end. */
static bool next_range(const moe__io_block *b, range *r)
{
    if (b->rows <= 0 || b->cols <= 0) return false;
    if (r->cols > 0 && r->col + r->cols < b->cols) {
        r->col += r->cols;
    } else {
        r->row += r->rows;
        r->col = 0;
    }
    if (r->row >= b->rows) return false;
    r->rows = b->cols >= CHUNK ? 1 : moe__min(CHUNK / b->cols, b->rows - r->row);
    r->cols = b->cols >= CHUNK ? moe__min(CHUNK, b->cols - r->col) : b->cols;
    return true;
}

/* ---- views ----------------------------------------------------------------------------------- */

/* The numbers k with low <= first + k step < low + count, below `most`. */
static void inside(int64_t first, int64_t step, int64_t most, int64_t low, int64_t count,
                   int64_t *from, int64_t *to)
{
    int64_t end = low + count;
    *from = low <= first ? 0 : (low - first + step - 1) / step;
    *to = end <= first ? 0 : moe__min(most, (end - first + step - 1) / step);
}

/* n elements of `size` bytes, strides in elements. */
static void copy_strided(char *to, int64_t to_stride, const char *from, int64_t from_stride,
                         int64_t n, int64_t size)
{
    if (to_stride == 1 && from_stride == 1) {
        memcpy(to, from, (size_t)(n * size));
        return;
    }
    for (int64_t i = 0; i < n; i++) switch (size) {
        case 4: memcpy(to + 4 * i * to_stride, from + 4 * i * from_stride, 4); break;
        case 8: memcpy(to + 8 * i * to_stride, from + 8 * i * from_stride, 8); break;
        case 2: memcpy(to + 2 * i * to_stride, from + 2 * i * from_stride, 2); break;
        default: to[i * to_stride] = from[i * from_stride];
        }
}

/* Between `values` (the range, dense) and a view. */
static void move_view(const moe__io_source *s, char *values, const range *r, int64_t size,
                      bool to_memory)
{
    int64_t k, rows, l, cols;
    inside(s->row, s->row_step, s->rows, r->row, r->rows, &k, &rows);
    inside(s->col, s->col_step, s->cols, r->col, r->cols, &l, &cols);
    if (l >= cols) return;
    for (; k < rows; k++) {
        int64_t row = s->row + k * s->row_step - r->row, col = s->col + l * s->col_step - r->col;
        char *dense = values + (row * r->cols + col) * size;
        char *memory = s->base + (k * s->stride_row + l * s->stride_col) * size;
        if (to_memory)
            copy_strided(memory, s->stride_col, dense, s->col_step, cols - l, size);
        else
            copy_strided(dense, s->col_step, memory, s->stride_col, cols - l, size);
    }
}

static void move_views(const mover *m, const moe__io_block *b, const range *r, bool to_memory)
{
    int64_t size = moe__io_dtype_size(m->plan->entry[b->entry].memory);
    for (int64_t i = b->source; i >= 0; i = m->plan->source[i].next)
        move_view(&m->plan->source[i], m->values, r, size, to_memory);
}

/* ---- codings --------------------------------------------------------------------------------- */

/* 2^(scale - 127) times a number of four bits: sign, two of exponent, one of fraction. The low half
 * of a byte is the first. `at` and n are multiples of 32. */
static moe_status read_mxfp4(const mover *m, const moe__io_entry *e, int64_t at, int64_t n,
                             float *to)
{
    static const float VALUES[16] = {0,     .5f,  1,  1.5f,  2,  3,  4,  6,
                                     -0.0f, -.5f, -1, -1.5f, -2, -3, -4, -6};
    const moe__io_tensor *blocks = &m->file->tensor[e->file_index];
    const moe__io_tensor *scales = &m->file->tensor[e->scale_index];
    uint8_t *bytes = (uint8_t *)m->raw, *scale = bytes + CHUNK;
    MOE_TRY(
        moe__io_pread(m->file, blocks->shard, bytes, n / 2, blocks->offset + at / 2, m->function));
    MOE_TRY(moe__io_pread(m->file, scales->shard, scale, n / MX_BLOCK,
                          scales->offset + at / MX_BLOCK, m->function));
    for (int64_t i = 0; i < n; i++) {
        float factor = __builtin_ldexpf(1, scale[i / MX_BLOCK] - 127);
        to[i] = VALUES[i & 1 ? bytes[i / 2] >> 4 : bytes[i / 2] & 15] * factor;
    }
    return MOE_OK;
}

/* A number of eight bits times the scale of its 128 x 128 block. */
static moe_status read_f8(const mover *m, const moe__io_entry *e, int64_t at, int64_t n, float *to)
{
    const moe__io_tensor *t = &m->file->tensor[e->file_index];
    const moe__io_tensor *scales = &m->file->tensor[e->scale_index];
    int64_t cols = e->shape[1], width = scales->shape[1], have = -1, first = 0;
    float scale[CHUNK / F8_BLOCK + 2];
    MOE_TRY(moe__io_pread(m->file, t->shard, m->raw, n, t->offset + at, m->function));
    for (int64_t i = 0; i < n; i++) {
        int64_t row = (at + i) / cols, block = (at + i) % cols / F8_BLOCK;
        if (row / F8_BLOCK != have) { /* a range is whole rows, or part of one */
            have = row / F8_BLOCK, first = block;
            int64_t count = moe__min(width - first, CHUNK / F8_BLOCK + 2);
            MOE_TRY(moe__io_pread(m->file, scales->shard, scale, 4 * count,
                                  scales->offset + 4 * (have * width + first), m->function));
        }
        to[i] = moe__io_f8_e4m3((uint8_t)m->raw[i]) * scale[block - first];
    }
    return MOE_OK;
}

/* ---- reading --------------------------------------------------------------------------------- */

/* n elements of an entry, from number `at`, into m->values in the memory's dtype. */
static moe_status read_values(const mover *m, const moe__io_entry *e, int64_t at, int64_t n)
{
    const moe__io_tensor *t = &m->file->tensor[e->file_index];
    int64_t size = moe__io_dtype_size(t->dtype);
    int32_t dtype = t->dtype;
    char *to = t->dtype == e->memory ? m->values : m->raw;
    if (e->coding == IO_PLAIN) {
        MOE_TRY(moe__io_pread(m->file, t->shard, to, n * size, t->offset + at * size, m->function));
    } else {
        /* floats behind the bytes they come from */
        float *floats = (float *)(void *)(m->raw + 4 * CHUNK);
        MOE_TRY(e->coding == IO_MXFP4 ? read_mxfp4(m, e, at, n, floats)
                                      : read_f8(m, e, at, n, floats));
        dtype = MOE_DTYPE_F32;
        to = (char *)floats;
        if (e->memory == MOE_DTYPE_F32) memcpy(m->values, floats, (size_t)n * 4);
    }
    if (dtype != e->memory) (void)moe__io_convert(m->values, e->memory, to, dtype, n);
    return MOE_OK;
}

static moe_status read_block(const mover *m, const moe__io_block *b)
{
    const moe__io_entry *e = &m->plan->entry[b->entry];
    range r = {0, 0, 0, 0};
    if (e->file_index < 0) return MOE_OK; /* missing, and that is allowed */
    while (next_range(b, &r)) {
        MOE_TRY(read_values(m, e, b->first + r.row * b->cols + r.col, r.rows * r.cols));
        move_views(m, b, &r, true);
    }
    return MOE_OK;
}

moe_status moe__io_read_blocks(const moe__io_plan *plan, const moe_file *file, const char *function)
{
    mover m = {.plan = plan, .file = file, .function = function};
    moe_status status = MOE_OK;
    if (!begin(&m)) REFUSE_MEMORY();
    for (int64_t i = 0; i < plan->blocks && status == MOE_OK; i++)
        status = read_block(&m, &plan->block[i]);
    free(m.raw);
    return status;
}

/* ---- writing --------------------------------------------------------------------------------- */

moe_status moe__io_pwrite(int fd, const void *from, int64_t bytes, int64_t offset, const char *path,
                          const char *function)
{
    int64_t done = 0;
    while (done < bytes) {
        ssize_t n = pwrite(fd, (const char *)from + done, (size_t)moe__min(bytes - done, 1 << 30),
                           (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return moe__io_system(function, "write", path, n < 0 ? errno : ENOSPC);
        done += n;
    }
    return MOE_OK;
}

static moe_status write_block(const mover *m, const moe__io_block *b, int fd, const char *path)
{
    const moe__io_entry *e = &m->plan->entry[b->entry];
    int64_t size = moe__io_dtype_size(e->dtype);
    range r = {0, 0, 0, 0};
    while (next_range(b, &r)) {
        int64_t at = b->first + r.row * b->cols + r.col, n = r.rows * r.cols;
        const char *from = m->values;
        move_views(m, b, &r, false);
        if (e->dtype != e->memory) {
            (void)moe__io_convert(m->raw, e->dtype, m->values, e->memory, n);
            from = m->raw;
        }
        MOE_TRY(moe__io_pwrite(fd, from, n * size, e->offset + at * size, path, m->function));
    }
    return MOE_OK;
}

moe_status moe__io_write_blocks(const moe__io_plan *plan, int fd, const char *path,
                                const char *function)
{
    mover m = {.plan = plan, .function = function};
    moe_status status = MOE_OK;
    if (!begin(&m)) REFUSE_MEMORY();
    for (int64_t i = 0; i < plan->blocks && status == MOE_OK; i++)
        status = write_block(&m, &plan->block[i], fd, path);
    free(m.raw);
    return status;
}
