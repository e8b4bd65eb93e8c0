/* sort.cu - a stable radix sort of a plan's entries, 8 bits at a time, least significant first.
 *
 * A pass has three kernels: every tile counts its digits, prefix sums over (digit, tile) say where
 * those of each go, and every tile puts its entries there, in order. One tile does all by itself.
 * Tiles are 8 warps with 128 entries each, in order; lanes with the same digit find each other by 8
 * votes. Nothing depends on the order in which blocks run. */
#include "sort.h"

#include "scan.h"

enum { WARPS = 8, ROUNDS = MOE_SORT_TILE / (32 * WARPS) };

/* A pass: in -> out by (number >> shift) & 255. */
struct moe_sort_pass {
    const int64_t *in; /* NULL: all entries, and those with slot -1 are left out */
    int64_t *out;
    const int64_t *group_capacity;
    int32_t source, shift;
};

MOE_DEVICE int32_t moe_digit_of(const moe_sort_pass &pass, const moe__plan_arrays &p, int64_t n)
{
    int64_t number, group;
    switch (pass.source) {
    case MOE_DIGIT_EXPERT: number = p.expert_of_entry[n]; break;
    case MOE_DIGIT_GROUP: number = p.slot_of_entry[n] >> 32; break;
    case MOE_DIGIT_KEY: number = p.slot_of_entry[n] & 0xffffffff; break;
    default:
        group = p.slot_of_entry[n] >> 32;
        number = pass.group_capacity[group] < 0 ? 0 : n - p.token_begin[moe_token_of_entry(p, n)];
    }
    return (int32_t)((number >> pass.shift) & (MOE_SORT_BINS - 1));
}

/* The entry at place i of a pass, or -1. */
MOE_DEVICE int64_t moe_sorted_entry(const moe_sort_pass &pass, const moe__plan_arrays &p, int64_t i)
{
    if (pass.in) return i < p.expert_begin[p.num_experts] ? pass.in[i] : -1;
    return i < p.entries && p.slot_of_entry[i] >= 0 && p.expert_of_entry[i] >= 0 ? i : -1;
}

/* Lanes whose digit is this lane's; digits are -1 or of 8 bits. */
MOE_DEVICE uint32_t moe_lanes_alike(int32_t digit)
{
    uint32_t alike = moe_ballot(digit >= 0);
    for (int bit = 0; bit < 8; bit++) {
        uint32_t set = moe_ballot((digit >> bit) & 1);
        alike &= (digit >> bit) & 1 ? set : ~set;
    }
    return alike;
}

/* begin[digit * tiles + tile] = how many the tile has; digits are below `bins`. */
MOE_GLOBAL(256)
moe_sort_count(moe_sort_pass pass, moe__plan_arrays p, int64_t *begin, int32_t bins)
{
    MOE_SHARED(int32_t, count, MOE_SORT_BINS);
    int64_t tile = (int64_t)blockIdx.x * MOE_SORT_TILE;
    count[threadIdx.x] = 0;
    moe_block_sync();
    for (int i = (int)threadIdx.x; i < MOE_SORT_TILE; i += 256) {
        int64_t n = moe_sorted_entry(pass, p, tile + i);
        if (n >= 0) moe_atomic_add(&count[moe_digit_of(pass, p, n)], 1);
    }
    moe_block_sync();
    if ((int)threadIdx.x < bins)
        begin[(int64_t)threadIdx.x * gridDim.x + blockIdx.x] = count[threadIdx.x];
}

/* begin as the prefix sums have left it; NULL: there is one tile. */
MOE_GLOBAL(256)
moe_sort_place(moe_sort_pass pass, moe__plan_arrays p, const int64_t *begin, int32_t bins)
{
    MOE_SHARED(int32_t, count, WARPS * MOE_SORT_BINS); /* [WARPS][BINS] */
    MOE_SHARED(int64_t, first, MOE_SORT_BINS);
    MOE_SHARED(int64_t, warp_sum, 32);
    int thread = (int)threadIdx.x, lane = thread % 32, warp = thread / 32;
    int64_t at = (int64_t)blockIdx.x * MOE_SORT_TILE + warp * (ROUNDS * 32) + lane, all;
    int64_t entry[ROUNDS];
    int32_t digit[ROUNDS], rank[ROUNDS], *mine = count + warp * MOE_SORT_BINS, sum = 0;
    for (int w = 0; w < WARPS; w++) count[w * MOE_SORT_BINS + thread] = 0;
    moe_block_sync();

    /* the rank of each among those of its warp */
    for (int r = 0; r < ROUNDS; r++) {
        entry[r] = moe_sorted_entry(pass, p, at + r * 32);
        digit[r] = entry[r] >= 0 ? moe_digit_of(pass, p, entry[r]) : -1;
        uint32_t alike = moe_lanes_alike(digit[r]);
        int32_t before = moe_popcount(alike & ((1u << lane) - 1));
        rank[r] = digit[r] >= 0 ? mine[digit[r]] + before : 0;
        moe_warp_sync();
        if (digit[r] >= 0 && before == 0) mine[digit[r]] += moe_popcount(alike);
        moe_warp_sync();
    }
    moe_block_sync();

    /* thread d: where digit d of each warp begins */
    for (int w = 0; w < WARPS; w++) {
        int32_t *counted = &count[w * MOE_SORT_BINS + thread], own = *counted;
        *counted = sum;
        sum += own;
    }
    int64_t before = moe_block_scan(sum, 256, warp_sum, &all);
    first[thread] = !begin          ? before
                    : thread < bins ? begin[(int64_t)thread * gridDim.x + blockIdx.x]
                                    : 0;
    if (!begin && thread == 0) p.expert_begin[p.num_experts] = all;
    moe_block_sync();
    for (int r = 0; r < ROUNDS; r++)
        if (digit[r] >= 0) pass.out[first[digit[r]] + mine[digit[r]] + rank[r]] = entry[r];
}

static moe_status sort_by_digit(const moe__workers *workers, const moe__plan_arrays *p,
                                const moe_sort_pass &pass, int32_t bins)
{
    int64_t tiles = (p->entries + MOE_SORT_TILE - 1) / MOE_SORT_TILE;
    /* bins tiles < N / 2 words for more than one tile */
    int64_t *begin = tiles > 1 ? p->row_of_entry : NULL;
    dim3 grid((unsigned)tiles), block(256);
    if (begin) {
        int64_t *total = p->expert_begin + p->num_experts;
        MOE_TRY(moe__cuda_launch(workers, "sort", moe_sort_count, grid, block, 0, pass, *p, begin,
                                 bins));
        MOE_TRY(moe__cuda_scan(workers, begin, bins * tiles, begin + bins * tiles, total));
    }
    return moe__cuda_launch(workers, "sort", moe_sort_place, grid, block, 0, pass, *p, begin, bins);
}

/* 8 bits of a number that is at most `most`: passes it takes, and digits of the one at shift. */
static int32_t passes_of(int64_t most)
{
    int32_t passes = 1;
    while ((most >> (8 * passes)) > 0) passes++;
    return passes;
}

moe_status moe__cuda_sort_entries(const moe__workers *workers, const moe__plan_arrays *plan,
                                  const int64_t *group_capacity, const moe_sort_key *keys,
                                  int32_t count)
{
    moe_sort_pass pass = {NULL, NULL, group_capacity, 0, 0};
    int32_t left = 0;
    for (int32_t i = 0; i < count; i++) left += passes_of(keys[i].most);
    for (int32_t i = 0; i < count; i++)
        for (pass.shift = 0; pass.shift < 8 * passes_of(keys[i].most); pass.shift += 8) {
            int64_t bins = moe__min((keys[i].most >> pass.shift) + 1, MOE_SORT_BINS);
            left--;
            pass.source = keys[i].source;
            pass.out = left % 2 == 0 ? plan->entry_of_row : plan->token_of_row;
            MOE_TRY(sort_by_digit(workers, plan, pass, (int32_t)bins));
            pass.in = pass.out;
        }
    return MOE_OK;
}
