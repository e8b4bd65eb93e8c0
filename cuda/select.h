/* select.h - the total order of logits, and the K best by it: by a warp, or by a block.
 *
 * Larger values come first, equal values in order of index, NaN after every number, as in
 * src/cpu/select.h. The order of a candidate is one integer, its key: 32 bits that fall as the
 * value rises, then the index. No two are equal, so that any exact way to sort gives the same
 * ids. */
#ifndef MOE_CUDA_SELECT_H
#define MOE_CUDA_SELECT_H

#include "lanes.h"

#define MOE_NO_KEY 0xffffffffffffffffu

/* -0 is +0; NaN is last, after -infinity. */
MOE_DEVICE uint32_t moe_order_of(float value)
{
    uint32_t u = moe__bits_f32(value + 0.0f);
    uint32_t rising = (u & 0x80000000u) != 0 ? ~u : u | 0x80000000u;
    return value == value ? ~rising : 0xffffffffu;
}

MOE_DEVICE uint64_t moe_order_key(float value, int64_t index)
{
    return (uint64_t)moe_order_of(value) << 32 | (uint32_t)index;
}

/* Candidates 0 to count - 1 of a row of values: all, all but one, or those of some groups, whose
 * numbers are ascending: the order of the candidates is that of the row. */
struct moe_candidates {
    const float *v;
    const int32_t *groups; /* NULL: all */
    int32_t size;          /* experts of a group */
    int32_t skip;          /* this one is none; more than any: none is left out */
    int64_t count;
};

/* Place of a candidate in the row. */
MOE_DEVICE int32_t moe_place_of(const moe_candidates *c, int32_t i)
{
    return c->groups ? c->groups[i / c->size] * c->size + i % c->size : i + (i >= c->skip);
}

MOE_DEVICE uint64_t moe_key_of(const moe_candidates *c, int32_t i)
{
    return moe_order_key(c->v[moe_place_of(c, i)], i);
}

/* The first candidate after the key `last`; all threads of the warp get it. `from_start`: the first
 * of all. */
MOE_DEVICE uint64_t moe_next_key(const moe_candidates *c, bool from_start, uint64_t last)
{
    uint64_t best = MOE_NO_KEY;
    for (int64_t i = moe_lane(); i < c->count; i += MOE_WARP) {
        uint64_t key = moe_key_of(c, (int32_t)i);
        if (key < best && (from_start || key > last)) best = key;
    }
    return moe_warp_least(best);
}

/* ids[0..k) = places of the first k candidates, first to last, by one warp: k rounds. */
MOE_DEVICE void moe_select_warp(int32_t *ids, int64_t k, const moe_candidates *c)
{
    uint64_t last = 0;
    for (int64_t round = 0; round < k; round++) {
        last = moe_next_key(c, round == 0, last);
        if (moe_lane() == 0) ids[round] = moe_place_of(c, (int32_t)(uint32_t)last);
    }
}

/* ---- by a block of 256 threads --------------------------------------------------------------- */

#define MOE_SELECT_THREADS 256
#define MOE_SORT_KEYS 2048 /* sorted at once, in shared memory */

struct moe_select_shared {
    uint64_t key[MOE_SORT_KEYS];
    uint32_t histogram[256];
    uint32_t below[8], equal[8]; /* of each warp */
    uint32_t threshold, rank;
};

/* The order `threshold` of the k-th candidate, found 8 bits at a time, and how many of the
 * candidates with that order are among the first k. */
MOE_DEVICE void moe_find_threshold(moe_select_shared *s, int k, const moe_candidates *c)
{
    uint32_t prefix = 0, known = 0, rank = (uint32_t)k;
    int count = (int)c->count;
    for (int shift = 24; shift >= 0; shift -= 8) {
        s->histogram[threadIdx.x] = 0;
        moe_block_sync();
        for (int i = (int)threadIdx.x; i < count; i += MOE_SELECT_THREADS) {
            uint32_t order = moe_order_of(c->v[moe_place_of(c, i)]);
            if ((order & known) == prefix)
                (void)moe_atomic_add(&s->histogram[order >> shift & 255u], 1u);
        }
        moe_block_sync();
        if (threadIdx.x == 0) {
            uint32_t digit = 0;
            while (rank > s->histogram[digit]) rank -= s->histogram[digit++];
            s->threshold = prefix | digit << shift;
            s->rank = rank;
        }
        moe_block_sync();
        prefix = s->threshold;
        rank = s->rank;
        known |= 255u << shift;
    }
}

/* ids = the first k candidates in order of index. */
MOE_DEVICE void moe_gather_first(moe_select_shared *s, int32_t *ids, const moe_candidates *c)
{
    uint32_t threshold = s->threshold, rank = s->rank, below = 0, equal = 0;
    uint32_t before = (1u << moe_lane()) - 1;
    int warp = (int)(threadIdx.x / MOE_WARP);
    for (int first = 0; first < (int)c->count; first += MOE_SELECT_THREADS) {
        int i = first + (int)threadIdx.x;
        bool there = i < (int)c->count;
        uint32_t order = there ? moe_order_of(c->v[moe_place_of(c, i)]) : 0;
        bool is_below = there && order < threshold, is_equal = there && order == threshold;
        uint32_t warp_below = moe_ballot(is_below), warp_equal = moe_ballot(is_equal);
        if (moe_lane() == 0) {
            s->below[warp] = (uint32_t)moe_popcount(warp_below);
            s->equal[warp] = (uint32_t)moe_popcount(warp_equal);
        }
        moe_block_sync();
        uint32_t my_below = below + (uint32_t)moe_popcount(warp_below & before);
        uint32_t my_equal = equal + (uint32_t)moe_popcount(warp_equal & before);
        for (int w = 0; w < 8; w++) {
            my_below += w < warp ? s->below[w] : 0;
            my_equal += w < warp ? s->equal[w] : 0;
            below += s->below[w];
            equal += s->equal[w];
        }
        if (is_below || (is_equal && my_equal < rank))
            ids[my_below + (my_equal < rank ? my_equal : rank)] = i;
        moe_block_sync();
    }
}

/* Bitonic sort of count (at most MOE_SORT_KEYS) ids. */
MOE_DEVICE void moe_sort_some(moe_select_shared *s, int32_t *ids, int count,
                              const moe_candidates *c)
{
    int size = 2;
    while (size < count) size *= 2;
    for (int i = (int)threadIdx.x; i < size; i += MOE_SELECT_THREADS)
        s->key[i] = i < count ? moe_key_of(c, ids[i]) : MOE_NO_KEY;
    moe_block_sync();
    for (int run = 2; run <= size; run *= 2)
        for (int step = run / 2; step > 0; step /= 2) {
            for (int i = (int)threadIdx.x; i < size / 2; i += MOE_SELECT_THREADS) {
                int low = i / step * 2 * step + i % step, high = low + step;
                uint64_t a = s->key[low], b = s->key[high];
                if ((a > b) == ((low & run) == 0)) s->key[low] = b, s->key[high] = a;
            }
            moe_block_sync();
        }
    for (int i = (int)threadIdx.x; i < count; i += MOE_SELECT_THREADS)
        ids[i] = (int32_t)(uint32_t)s->key[i];
    moe_block_sync();
}

/* Merges sorted runs of `run` ids in pairs: each finds its place in the other run of its pair. */
MOE_DEVICE void moe_merge_runs(int32_t *to, const int32_t *from, int count, int run,
                               const moe_candidates *c)
{
    for (int i = (int)threadIdx.x; i < count; i += MOE_SELECT_THREADS) {
        int mine = i / run, pair = mine / 2 * 2 * run, other = (mine ^ 1) * run;
        int begin = other < count ? other : count;
        int low = begin, high = count - begin > run ? begin + run : count;
        uint64_t key = moe_key_of(c, from[i]);
        while (low < high) {
            int middle = low + (high - low) / 2;
            if (moe_key_of(c, from[middle]) < key)
                low = middle + 1;
            else
                high = middle;
        }
        to[pair + (i - mine * run) + (low - begin)] = from[i];
    }
    moe_block_sync();
}

/* ids[0..k) = places of the first k candidates, first to last; scratch: as long, used where k is
 * beyond MOE_SORT_KEYS. Radix selection, bitonic sort, merges. */
MOE_DEVICE void moe_select_block(moe_select_shared *s, int32_t *ids, int32_t *scratch, int k,
                                 const moe_candidates *c)
{
    int32_t *from = ids, *to = scratch;
    if (k < c->count) {
        moe_find_threshold(s, k, c);
        moe_gather_first(s, ids, c);
    } else {
        for (int i = (int)threadIdx.x; i < k; i += MOE_SELECT_THREADS) ids[i] = i;
        moe_block_sync();
    }
    for (int first = 0; first < k; first += MOE_SORT_KEYS)
        moe_sort_some(s, ids + first, k - first < MOE_SORT_KEYS ? k - first : MOE_SORT_KEYS, c);
    for (int run = MOE_SORT_KEYS; run < k; run = run < k / 2 ? run * 2 : k) {
        moe_merge_runs(to, from, k, run, c);
        int32_t *swap = from;
        from = to;
        to = swap;
    }
    for (int i = (int)threadIdx.x; i < k; i += MOE_SELECT_THREADS)
        ids[i] = moe_place_of(c, from[i]);
    moe_block_sync();
}

#endif
