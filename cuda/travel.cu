/* travel.cu - rows that travel between ranks. As src/cpu/travel.c:
 *
 *     pack        columns of rows, one after another in a row that travels
 *     order       a plan of what came: a token is a position, rows go by (slot, source)
 *     merge       row by row: slice 0, plus slice 1, and so on
 *     entry_grad  gradients by weights, of each entry from its row
 *
 * Rows that travel are multiples of 16 bytes and begin at such, so that x, dy and dx of an even
 * width move 16 bytes at once. How many rows there are is read on the device. */
#include "row_access.h"

static dim3 threads_for(int64_t count) { return dim3((unsigned)((count + 255) / 256)); }

/* The first row of all ranges, and the end of the last. */
MOE_DEVICE int64_t moe_first_moved(const moe__moves &m) { return m.first ? m.first[0] : 0; }
MOE_DEVICE int64_t moe_moved_rows(const moe__moves &m)
{
    return m.first ? m.first[m.count] : m.most;
}

/* ---- packing --------------------------------------------------------------------------------- */

/* Column of a packed row: `unit` bytes of it are moved at once. */
struct moe_packed_column {
    const char *from;
    const int64_t *index;
    const moe__window *window;
    int64_t stride, bytes, at;
    int32_t by_place, unit;
};

struct moe_packing {
    moe__moves moves;
    char *to;
    int64_t row_bytes, columns;
    moe_packed_column column[MOE__COLUMNS];
};

/* Every `threads`-th unit from number `mine` on. */
template <typename U>
MOE_DEVICE void moe_pack_units(char *to, const char *from, int64_t bytes, int mine, int threads)
{
    const U *in = (const U *)(const void *)from;
    U *out = (U *)(void *)to;
    for (int64_t i = mine; i < bytes / (int64_t)sizeof(U); i += threads) out[i] = in[i];
}

/* A number from another rank may be any. */
MOE_DEVICE int64_t moe_in_window(const moe__window &w, int64_t number)
{
    return w.base + (number >= 0 && number < w.rows ? number : 0);
}

/* Which row it is, where that is written, and the range of the move that it is in. */
struct moe_packed_row {
    int64_t row, place, range;
};

MOE_DEVICE void moe_pack_column(const moe_packed_column &c, char *to, const moe_packed_row &r,
                                int mine, int threads)
{
    int64_t at = c.by_place ? r.place : r.row;
    if (c.index) at = c.index[at];
    if (c.window) at = moe_in_window(c.window[r.range], at);
    const char *from = c.from + at * c.stride;
    to += c.at;
    if (c.unit == 16) {
        for (int64_t i = (int64_t)mine * 16; i < c.bytes; i += (int64_t)threads * 16)
            moe_store16(to + i, moe_load16(from + i));
    } else if (c.unit == 4) {
        moe_pack_units<uint32_t>(to, from, c.bytes, mine, threads);
    } else if (c.unit == 2) {
        moe_pack_units<uint16_t>(to, from, c.bytes, mine, threads);
    } else {
        moe_pack_units<uint8_t>(to, from, c.bytes, mine, threads);
    }
}

/* 2^shift threads for a row */
MOE_GLOBAL(256) moe_travel_pack(moe_packing p, int shift)
{
    int64_t i = moe__block_row(shift) + moe_first_moved(p.moves);
    moe_packed_row r = {i, i, 0};
    if (i >= moe_moved_rows(p.moves)) return;
    if (p.moves.first) {
        int64_t s = moe_range_of(p.moves.first, p.moves.count, i);
        r = {p.moves.from[s] + i - p.moves.first[s], p.moves.to[s] + i - p.moves.first[s], s};
    }
    for (int64_t c = 0; c < p.columns; c++)
        moe_pack_column(p.column[c], p.to + r.place * p.row_bytes, r, moe__block_column(shift),
                        1 << shift);
}

static int32_t unit_of(const moe__pack_job *job, const moe__column *c)
{
    uint64_t all = (uint64_t)(uintptr_t)c->from | (uint64_t)(uintptr_t)job->to |
                   (uint64_t)c->stride | (uint64_t)c->bytes | (uint64_t)c->at |
                   (uint64_t)job->row_bytes;
    return all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : all % 2 == 0 ? 2 : 1;
}

extern "C" moe_status moe__cuda_travel_pack(const moe__pack_job *job)
{
    moe_packing p = {};
    int64_t widest = 1; /* units of a column */
    if (job->moves.most == 0) return MOE_OK;
    p.moves = job->moves;
    p.to = (char *)job->to;
    p.row_bytes = job->row_bytes;
    p.columns = job->columns;
    for (int64_t i = 0; i < job->columns; i++) {
        const moe__column *c = &job->column[i];
        int32_t unit = unit_of(job, c);
        p.column[i] = {(const char *)c->from, c->index, c->window, c->stride, c->bytes, c->at,
                       c->by_place,           unit};
        widest = moe__max(widest, c->bytes / unit);
    }
    moe__row_launch launch = moe__launch_rows(job->moves.most, widest, 1);
    return moe__cuda_launch(&job->workers, "travel_pack", moe_travel_pack, launch.grid,
                            dim3(MOE__ROW_THREADS), 0, p, launch.shift);
}

/* ---- the owner's plan ------------------------------------------------------------------------ */

struct moe_ordering {
    moe__plan_arrays plan;
    moe__moves moves;
    int64_t sources;
    const char *x;
    int64_t row_bytes, weight_at, holes;
};

/* What every position has, and where each slot begins. */
MOE_GLOBAL(256) moe_travel_positions(moe_ordering o)
{
    int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    const moe__plan_arrays &p = o.plan;
    if (i <= p.tokens) p.token_begin[i] = i;
    if (i <= p.num_experts) p.expert_begin[i] = o.moves.first[i * o.sources];
    if (i < 2) p.group_begin[i] = i * p.tokens;
    if (i >= p.tokens || !o.holes) return;
    p.row_of_entry[i] = p.slot_of_entry[i] = -1;
    p.expert_of_entry[i] = -1;
}

MOE_GLOBAL(256) moe_travel_order(moe_ordering o)
{
    int64_t row = (int64_t)blockIdx.x * 256 + threadIdx.x + moe_first_moved(o.moves);
    const moe__plan_arrays &p = o.plan;
    if (row >= moe_moved_rows(o.moves)) return;
    int64_t s = moe_range_of(o.moves.first, o.moves.count, row);
    int64_t at = o.moves.to[s] + row - o.moves.first[s];
    p.token_of_row[row] = p.entry_of_row[row] = at;
    p.row_of_entry[at] = row;
    p.slot_of_entry[at] = 0;
    p.expert_of_entry[at] = (int32_t)(s / o.sources);
    ((float *)p.weight_of_entry)[at] = *(const float *)(o.x + at * o.row_bytes + o.weight_at);
}

extern "C" moe_status moe__cuda_travel_order(const moe__order_job *job)
{
    moe_ordering o = {*job->plan,     job->moves,     job->sources, (const char *)job->x,
                      job->row_bytes, job->weight_at, job->holes};
    int64_t positions = moe__max(job->plan->tokens, job->plan->num_experts) + 2;
    MOE_TRY(moe__cuda_launch(&job->workers, "travel_order", moe_travel_positions,
                             threads_for(positions), dim3(256), 0, o));
    if (job->moves.most == 0) return MOE_OK;
    return moe__cuda_launch(&job->workers, "travel_order", moe_travel_order,
                            threads_for(job->moves.most), dim3(256), 0, o);
}

/* ---- what comes back ------------------------------------------------------------------------- */

struct moe_merging {
    moe__plan_arrays plan;
    const int64_t *slot_of_number, *all_at;
    const char *results;
    char *merged;
    int64_t slices, row_bytes, width, real_at, padded_rows;
};

/* Row n of slice s of expert e. */
MOE_DEVICE const char *moe_slice_of(const moe_merging &m, int64_t e, int64_t s, int64_t n)
{
    return m.results + (m.all_at[m.slot_of_number[e * m.slices + s]] + n) * m.row_bytes;
}

/* Which row is row r of `merged`; false: none. */
MOE_DEVICE bool moe_merged_row(const moe_merging &m, int64_t r, int64_t *e, int64_t *n)
{
    const int64_t *begin = m.plan.expert_begin;
    if (m.padded_rows > 0) {
        *e = r / m.padded_rows;
        *n = r - *e * m.padded_rows;
        return *e < m.plan.num_experts && *n < begin[*e + 1] - begin[*e];
    }
    if (r >= begin[m.plan.num_experts]) return false;
    *e = m.plan.expert_of_entry[m.plan.entry_of_row[r]];
    *n = r - begin[*e];
    return true;
}

template <typename T, int V> MOE_GLOBAL(256) moe_travel_merge(moe_merging m, int shift)
{
    int64_t r = moe__block_row(shift), e, n;
    if (!moe_merged_row(m, r, &e, &n)) return;
    char *to = m.merged + r * m.row_bytes;
    for (int64_t j = (int64_t)moe__block_column(shift) * V; j < m.width; j += (int64_t)V << shift) {
        float sum[V], x[V];
        moe__load<V>((const T *)moe_slice_of(m, e, 0, n) + j, sum);
        for (int64_t s = 1; s < m.slices; s++) {
            moe__load<V>((const T *)moe_slice_of(m, e, s, n) + j, x);
            for (int i = 0; i < V; i++) sum[i] = sum[i] + x[i];
        }
        moe__store<V>((T *)to + j, sum);
    }
    if (m.real_at < 0 || moe__block_column(shift) != 0) return;
    float sum = *(const float *)(moe_slice_of(m, e, 0, n) + m.real_at);
    for (int64_t s = 1; s < m.slices; s++)
        sum = sum + *(const float *)(moe_slice_of(m, e, s, n) + m.real_at);
    *(float *)(to + m.real_at) = sum;
}

template <typename T> static moe_status travel_merge(const moe__merge_job *job)
{
    const int V = moe_pack_of<T>::N;
    bool aligned = job->width % V == 0 && job->row_bytes % 16 == 0;
    moe_merging m = {
        *job->plan,          job->slot_of_number, job->all_at,    (const char *)job->results,
        (char *)job->merged, job->slices,         job->row_bytes, job->width,
        job->real_at,        job->padded_rows};
    if (job->most == 0) return MOE_OK;
    moe__row_launch launch = moe__launch_rows(job->most, job->width, aligned ? V : 1);
    return moe__cuda_launch(&job->workers, "travel_merge",
                            aligned ? moe_travel_merge<T, V> : moe_travel_merge<T, 1>, launch.grid,
                            dim3(MOE__ROW_THREADS), 0, m, launch.shift);
}

MOE_CUDA_SLOT(travel_merge, const moe__merge_job *)

MOE_GLOBAL(256)
moe_travel_entry_grad(moe__plan_arrays p, const char *rows, int64_t row_bytes, int64_t padded_rows,
                      float *grad)
{
    int64_t n = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (n >= p.entries) return;
    int64_t row = moe_place_of_entry(p, n, padded_rows);
    grad[n] = row >= 0 ? *(const float *)(rows + row * row_bytes) : 0.0f;
}

extern "C" moe_status moe__cuda_travel_entry_grad(const moe__entry_grad_job *job)
{
    if (job->plan->entries == 0) return MOE_OK;
    return moe__cuda_launch(&job->workers, "travel_entry_grad", moe_travel_entry_grad,
                            threads_for(job->plan->entries), dim3(256), 0, *job->plan,
                            (const char *)job->rows + job->real_at, job->row_bytes,
                            job->padded_rows, (float *)job->entry_grad);
}

/* ---- blocks ---------------------------------------------------------------------------------- */

struct moe_blocks {
    int64_t ranks, rank, slots, own, slices, padded_rows;
    const int64_t *first_slot, *number_of_slot, *slot_of_number;
    const int64_t *expert_begin; /* NULL: no rows */
    char *blocks;
    int64_t block_bytes, words[3], calls, counts;
    int64_t *first, *from, *record;
};

static moe_blocks blocks_of(const moe__blocks_job *job)
{
    moe_blocks b = {job->ranks,
                    job->rank,
                    job->slots,
                    job->own,
                    job->slices,
                    job->padded_rows,
                    job->first_slot,
                    job->number_of_slot,
                    job->slot_of_number,
                    job->plan ? job->plan->expert_begin : NULL,
                    (char *)job->blocks,
                    job->block_bytes,
                    {job->words[0], job->words[1], job->words[2]},
                    job->calls,
                    job->counts,
                    job->first,
                    job->from,
                    job->record};
    return b;
}

MOE_DEVICE int64_t *moe_words_of(const moe_blocks &b, int64_t p)
{
    return (int64_t *)(void *)(b.blocks + p * b.block_bytes);
}

MOE_DEVICE void moe_record(const moe_blocks &b, int64_t kind, int64_t rank, int64_t number)
{
    (void)moe_atomic_max(b.record, kind << 56 | rank << 32 | (number & 0xffffffff));
}

/* The sum of the counts before this thread's, of 256 threads that have `mine` each. */
MOE_DEVICE int64_t moe_before(int64_t mine, int64_t *shared)
{
    int64_t sum = 0;
    shared[threadIdx.x] = mine;
    moe_block_sync();
    for (int i = 0; i < (int)threadIdx.x; i++) sum += shared[i];
    return sum;
}

/* Rows of this rank for a slot. */
MOE_DEVICE int64_t moe_rows_of_slot(const moe_blocks &b, int64_t s, int64_t *row, int64_t *expert)
{
    int64_t v = b.number_of_slot[s];
    *expert = v / b.slices;
    *row = b.expert_begin[*expert];
    return b.slot_of_number[v] == s ? b.expert_begin[*expert + 1] - *row : 0;
}

/* Each thread has a run of slots. One block. */
MOE_GLOBAL(256) moe_travel_write_blocks(moe_blocks b)
{
    MOE_SHARED(int64_t, shared, 256);
    MOE_SHARED(int32_t, over, 1);
    int64_t each = (b.slots + 255) / 256, s = (int64_t)threadIdx.x * each, mine = 0, row, expert;
    int64_t end = s + each < b.slots ? s + each : b.slots;
    bool counted = b.counts && b.expert_begin;
    if (threadIdx.x == 0) over[0] = 0;
    moe_block_sync();
    for (int64_t i = s; i < end && counted; i++) {
        int64_t rows = moe_rows_of_slot(b, i, &row, &expert);
        mine += rows < b.padded_rows ? rows : b.padded_rows;
        if (rows <= b.padded_rows) continue;
        (void)moe_atomic_max(over, 1);
        moe_record(b, MOE__BLOCKS_ROWS, b.rank, expert);
    }
    int64_t at = moe_before(mine, shared);
    for (int64_t i = s; i < end && b.counts; i++) {
        int64_t p = moe_range_of(b.first_slot, b.ranks, i), rows = 0;
        if (counted) {
            rows = moe_rows_of_slot(b, i, &row, &expert);
            rows = rows < b.padded_rows ? rows : b.padded_rows;
            b.first[i] = at;
            b.from[i] = row;
            at += rows;
            if (i + 1 == b.slots) b.first[b.slots] = at;
        }
        moe_words_of(b, p)[3 + i - b.first_slot[p]] = rows;
    }
    for (int64_t p = threadIdx.x; p < b.ranks; p += 256) {
        int64_t *words = moe_words_of(b, p);
        words[0] = b.words[0];
        words[1] = b.words[1];
        words[2] = over[0] ? (int64_t)MOE_ERROR_BUFFER_TOO_SMALL : b.words[2];
    }
}

extern "C" moe_status moe__cuda_travel_write_blocks(const moe__blocks_job *job)
{
    return moe__cuda_launch(&job->workers, "travel_write_blocks", moe_travel_write_blocks, dim3(1),
                            dim3(256), 0, blocks_of(job));
}

/* Whether a rank's block is of this call and it goes on; else that is noted. */
MOE_DEVICE bool moe_block_is_good(const moe_blocks &b, int64_t p)
{
    const int64_t *words = moe_words_of(b, p);
    bool same = words[0] >= 0 && words[0] % b.calls == b.words[0] % b.calls &&
                words[1] == b.words[1] && words[2] <= MOE_OK && words[2] >= MOE_STATUS_LAST;
    if (!same)
        moe_record(b, MOE__BLOCKS_CALL, p, 0);
    else if (words[2] != MOE_OK && p != b.rank)
        moe_record(b, MOE__BLOCKS_FAILED, p, -words[2]);
    return same && (words[2] == MOE_OK || words[2] == MOE_ERROR_BUFFER_TOO_SMALL);
}

MOE_DEVICE int64_t moe_rows_of_block(const moe_blocks &b, int64_t p, int64_t slot)
{
    int64_t rows = moe_words_of(b, p)[3 + slot];
    if (!moe_block_is_good(b, p)) return 0;
    if (rows >= 0 && rows <= b.padded_rows) return rows;
    moe_record(b, MOE__BLOCKS_COUNT, p, rows);
    return 0;
}

/* Each thread has a run of (slot, source). One block. */
MOE_GLOBAL(256) moe_travel_read_blocks(moe_blocks b)
{
    MOE_SHARED(int64_t, shared, 256);
    int64_t count = b.counts ? b.own * b.ranks : 0, each = (count + 255) / 256, mine = 0;
    int64_t begin = (int64_t)threadIdx.x * each, end = begin + each < count ? begin + each : count;
    for (int64_t p = threadIdx.x; p < b.ranks; p += 256) (void)moe_block_is_good(b, p);
    for (int64_t i = begin; i < end; i++) mine += moe_rows_of_block(b, i % b.ranks, i / b.ranks);
    int64_t at = moe_before(mine, shared);
    for (int64_t i = begin; i < end; i++) {
        b.first[i] = at;
        at += moe_rows_of_block(b, i % b.ranks, i / b.ranks);
    }
    if (b.counts && (begin < count ? end == count : count + (int64_t)threadIdx.x == 0))
        b.first[count] = at;
    moe_block_sync();
    for (int64_t i = begin; i < end; i++) {
        int64_t slot = i / b.ranks;
        b.from[i] = slot * b.ranks * b.padded_rows + b.first[i] - b.first[slot * b.ranks];
    }
}

extern "C" moe_status moe__cuda_travel_read_blocks(const moe__blocks_job *job)
{
    return moe__cuda_launch(&job->workers, "travel_read_blocks", moe_travel_read_blocks, dim3(1),
                            dim3(256), 0, blocks_of(job));
}

/* ---- what does not stay ---------------------------------------------------------------------- */

MOE_GLOBAL(256)
moe_travel_drop(moe__plan_arrays p, moe__moves m, const int64_t *stay, const uint8_t *keep)
{
    int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= moe_moved_rows(m)) return;
    int64_t s = moe_range_of(m.first, m.count, i), n = i - m.first[s];
    if (keep ? keep[i] != 0 : n < stay[s]) return;
    p.slot_of_entry[p.entry_of_row[m.from[s] + n]] = -1;
}

extern "C" moe_status moe__cuda_travel_drop(const moe__drop_job *job)
{
    if (job->moves.most == 0) return MOE_OK;
    return moe__cuda_launch(&job->workers, "travel_drop", moe_travel_drop,
                            threads_for(job->moves.most), dim3(256), 0, *job->plan, job->moves,
                            job->stay, job->keep);
}

/* ---- sums over ranks ------------------------------------------------------------------------- */

template <typename T> MOE_GLOBAL(256) moe_travel_add(T *parts, int64_t n, int64_t count)
{
    int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= n) return;
    float sum = moe_widen(parts[i]);
    for (int64_t p = 1; p < count; p++) sum = sum + moe_widen(parts[p * n + i]);
    moe_narrow(&parts[i], sum);
}

MOE_GLOBAL(256) moe_travel_add_doubles(double *parts, int64_t n, int64_t count)
{
    int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= n) return;
    double sum = parts[i];
    for (int64_t p = 1; p < count; p++) sum = sum + parts[p * n + i];
    parts[i] = sum;
}

template <typename T>
static moe_status add(const moe__workers *workers, void *parts, int64_t n, int64_t count)
{
    return moe__cuda_launch(workers, "travel_add", moe_travel_add<T>, threads_for(n), dim3(256), 0,
                            (T *)parts, n, count);
}

extern "C" moe_status moe__cuda_travel_add(const moe__workers *workers, void *parts, int64_t n,
                                           int64_t count, int32_t dtype)
{
    if (n == 0) return MOE_OK;
    if (dtype != MOE_DTYPE_F64) return MOE_CUDA_BY_DTYPE(dtype, add, workers, parts, n, count);
    return moe__cuda_launch(workers, "travel_add", moe_travel_add_doubles, threads_for(n),
                            dim3(256), 0, (double *)parts, n, count);
}
