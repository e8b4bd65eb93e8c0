/* rows.c - from entries to rows: who is kept, and the order by expert.
 *
 * An entry asks for a row if it names an expert, its token is not masked, and second_choice lets
 * it. Of each group's entries an expert takes at most the group's capacity:
 *   TOKEN_ORDER     who comes first, in order of token, then of choice
 *   CHOICE          who comes first, in order of choice, then of token
 *   BATCH_PRIORITY  likewise, the tokens in descending order of token_priority
 *   SCORE, RANDOM   the largest weights, or random numbers; slots in order of entry
 * Equal ones stay in order of entry and NaN ranks last. Rows are sorted by (expert, token, entry)
 * with one counting sort, runs of tokens side by side. O(N + E) in all, and a merge sort of tokens
 * or of crowded experts' entries.
 *
 * Until the rows are written, their arrays are scratch: row_of_entry holds keys, then the ends of
 * tokens, token_of_row a list of entries, entry_of_row the other half of the merge sort. */
#include "cpu/kernels.h"
#include "philox.h"

#include <string.h>

/* ---- who asks, and its key ------------------------------------------------------------------- */

/* Blocks of the second choices' random numbers begin here, beyond expert / 4 of any expert. */
#define SECOND_CHOICE_BLOCK 0x80000000u

static uint32_t draw_bits(const moe__plan_rows_job *job, int64_t t, uint32_t first_block,
                          int64_t number)
{
    uint32_t words[4];
    moe__counter(words, job->drop_stream, (uint32_t)job->step, (uint32_t)(job->token_first + t),
                 first_block + (uint32_t)(number / 4));
    moe__philox(job->seed, words, words);
    return words[number % 4];
}

static int asks_for_row(const moe__plan_rows_job *job, int64_t t, int64_t n)
{
    const moe__plan_arrays *p = job->plan;
    int64_t choice = n - p->token_begin[t];
    if (p->expert_of_entry[n] < 0 || (job->token_mask && !job->token_mask[t])) return 0;
    if (choice == 0 || job->second_choice == MOE_SECOND_CHOICE_ALL) return 1;
    if (job->second_choice == MOE_SECOND_CHOICE_NONE) return 0;
    double weight = ((const real *)p->weight_of_entry)[n], threshold = job->second_threshold;
    if (job->second_choice == MOE_SECOND_CHOICE_THRESHOLD) return weight > threshold;
    double u = moe__uniform_f32(draw_bits(job, t, SECOND_CHOICE_BLOCK, choice));
    return u < weight / (threshold > 1e-9 ? threshold : 1e-9);
}

/* An integer in the order of the values: -0 is +0, NaN is below all. */
static int64_t ordered(real value)
{
    double v = (double)value + 0.0;
    int64_t bits;
    if (v != v) return INT64_MIN;
    memcpy(&bits, &v, sizeof bits);
    return bits < 0 ? bits ^ INT64_MAX : bits;
}

/* What the policy sorts by. The bits of moe__uniform_f32 are in the order of its values. */
static int64_t key_of(const moe__plan_rows_job *job, int64_t t, int64_t n)
{
    const moe__plan_arrays *p = job->plan;
    switch (job->drop_policy) {
    case MOE_DROP_BATCH_PRIORITY: return ordered(((const real *)job->token_priority)[t]);
    case MOE_DROP_SCORE: return ordered(((const real *)p->weight_of_entry)[n]);
    case MOE_DROP_RANDOM:
        return p->slot_of_entry[n] < 0 ? 0 : draw_bits(job, t, 0, p->expert_of_entry[n]) >> 9;
    default: return 0;
    }
}

/* slot_of_entry: 0 for an entry that asks for a row, else -1; its key in row_of_entry. */
static void ask_range(void *argument, int64_t begin, int64_t end)
{
    const moe__plan_rows_job *job = argument;
    const moe__plan_arrays *p = job->plan;
    for (int64_t t = begin; t < end; t++)
        for (int64_t n = p->token_begin[t]; n < p->token_begin[t + 1]; n++) {
            p->slot_of_entry[n] = asks_for_row(job, t, n) - 1;
            if (job->group_capacity) p->row_of_entry[n] = key_of(job, t, n);
        }
}

/* ---- who is kept ----------------------------------------------------------------------------- */

/* The entries of a group are [first, last). */
typedef struct entry_range {
    int64_t first, last;
} entry_range;

static entry_range entries_of(const moe__plan_arrays *p, int64_t g)
{
    return (entry_range){p->token_begin[p->group_begin[g]], p->token_begin[p->group_begin[g + 1]]};
}

/* Counters of the experts, between groups all 0. */
static int64_t *counters(const moe__plan_arrays *p) { return p->expert_begin + 1; }

/* Only those that the group can have touched: there may be many more experts than entries. */
static void reset_counters(const moe__plan_arrays *p, entry_range group)
{
    for (int64_t n = group.first; n < group.last; n++)
        if (p->expert_of_entry[n] >= 0) counters(p)[p->expert_of_entry[n]] = 0;
}

/* The next slot of its expert for an entry that asks, if there is room; room < 0: always. */
static void give_slot(const moe__plan_arrays *p, int64_t n, int64_t room)
{
    if (p->slot_of_entry[n] < 0) return;
    int64_t *used = counters(p) + p->expert_of_entry[n];
    p->slot_of_entry[n] = room < 0 || *used < room ? (*used)++ : -1;
}

/* Stable, largest key[id] first. scratch: as long as ids. */
static void sort_descending(int64_t *ids, int64_t count, const int64_t *key, int64_t *scratch)
{
    int64_t *from = ids, *to = scratch;
    for (int64_t width = 1; width < count; width *= 2) {
        for (int64_t begin = 0; begin < count; begin += 2 * width) {
            int64_t middle = moe__min(begin + width, count);
            int64_t end = moe__min(begin + 2 * width, count), left = begin, right = middle;
            for (int64_t i = begin; i < end; i++) {
                int take_left = right == end ||
                                (left < middle && key[from[left]] >= key[from[right]]);
                to[i] = from[take_left ? left++ : right++];
            }
        }
        int64_t *swap = from;
        from = to;
        to = swap;
    }
    if (from != ids) memcpy(ids, from, (size_t)count * sizeof *ids);
}

/* Round after round, each token's next choice. Tokens in order, or by the keys of their entries. */
static void give_by_choice(const moe__plan_arrays *p, int64_t g, int64_t room, int by_priority)
{
    int64_t *next = p->token_of_row, *end_of = p->row_of_entry, count = 0;
    int64_t begin = p->group_begin[g], end = p->group_begin[g + 1];
    for (int64_t t = begin; t < end; t++)
        if (p->token_begin[t] < p->token_begin[t + 1]) next[count++] = p->token_begin[t];
    if (by_priority) sort_descending(next, count, p->row_of_entry, p->entry_of_row);
    for (int64_t t = begin; t < end; t++)
        for (int64_t n = p->token_begin[t]; n < p->token_begin[t + 1]; n++)
            end_of[n] = p->token_begin[t + 1];
    while (count > 0) {
        int64_t left = 0;
        for (int64_t i = 0; i < count; i++) {
            int64_t n = next[i];
            give_slot(p, n, room);
            if (n + 1 < end_of[n]) next[left++] = n + 1;
        }
        count = left;
    }
}

/* Where more than `room` entries ask for an expert, all but those of the largest keys are turned
 * away. The entries of crowded experts are listed expert after expert; once the first of one has
 * claimed places for all, its counter holds -1 - (the next place), which ends as their end. */
static void turn_away(const moe__plan_arrays *p, entry_range group, int64_t room)
{
    int64_t *used = counters(p), *crowd = p->token_of_row, count = 0, end;
    for (int64_t n = group.first; n < group.last; n++)
        if (p->slot_of_entry[n] >= 0) used[p->expert_of_entry[n]]++;
    for (int64_t n = group.first; n < group.last; n++) {
        if (p->slot_of_entry[n] < 0) continue;
        int64_t *u = used + p->expert_of_entry[n];
        if (*u > room) {
            int64_t places = *u;
            *u = -1 - count;
            count += places;
        }
        if (*u < 0) {
            crowd[-1 - *u] = n;
            --*u;
        }
    }
    for (int64_t begin = 0; begin < count; begin = end) {
        end = -1 - used[p->expert_of_entry[crowd[begin]]];
        sort_descending(crowd + begin, end - begin, p->row_of_entry, p->entry_of_row);
        for (int64_t i = begin + room; i < end; i++) p->slot_of_entry[crowd[i]] = -1;
    }
    reset_counters(p, group);
}

/* slot_of_entry: place within (group, expert) in order of admission, -1 for what has no row. `all`:
 * who asks has a row, and its slot follows from it. */
static moe_status admit(moe__plan_rows_job *job, int all)
{
    const moe__plan_arrays *p = job->plan;
    MOE_TRY(moe__parallel_range(job->workers.context, p->tokens, 1024, ask_range, job,
                                job->workers.function));
    for (int64_t g = 0; g < p->groups && !all; g++) {
        int64_t room = job->group_capacity ? job->group_capacity[g] : -1;
        int32_t policy = room < 0 ? MOE_DROP_TOKEN_ORDER : job->drop_policy;
        entry_range group = entries_of(p, g);
        if (policy == MOE_DROP_SCORE || policy == MOE_DROP_RANDOM) turn_away(p, group, room);
        if (policy == MOE_DROP_CHOICE || policy == MOE_DROP_BATCH_PRIORITY)
            give_by_choice(p, g, room, policy == MOE_DROP_BATCH_PRIORITY);
        else
            for (int64_t n = group.first; n < group.last; n++) give_slot(p, n, room);
        reset_counters(p, group);
    }
    return MOE_OK;
}

/* ---- rows and weights ------------------------------------------------------------------------ */

/* The tokens in `chunks` runs. Where there is more than one, `count` [chunks,E] holds the rows of
 * each run at each expert, then where the next of them lies. */
typedef struct row_sort {
    moe__plan_rows_job *job;
    int64_t *count, chunks;
    int give_slots; /* a slot is the place among the expert's rows */
} row_sort;

static int64_t chunk_begin(const row_sort *sort, int64_t c)
{
    return sort->job->plan->tokens * c / sort->chunks;
}

static void count_range(void *argument, int64_t begin, int64_t end)
{
    const row_sort *sort = argument;
    const moe__plan_arrays *p = sort->job->plan;
    for (int64_t c = begin; c < end; c++) {
        int64_t *count = sort->count + c * p->num_experts;
        memset(count, 0, (size_t)p->num_experts * sizeof *count);
        int64_t last = p->token_begin[chunk_begin(sort, c + 1)];
        for (int64_t n = p->token_begin[chunk_begin(sort, c)]; n < last; n++)
            if (p->slot_of_entry[n] >= 0) count[p->expert_of_entry[n]]++;
    }
}

/* expert_begin, and where each run's rows begin at each expert. */
static void place_runs(const row_sort *sort)
{
    moe__plan_arrays *p = sort->job->plan;
    int64_t rows = 0, E = p->num_experts;
    for (int64_t e = 0; e < E; e++) {
        p->expert_begin[e] = rows;
        for (int64_t c = 0; c < sort->chunks; c++) {
            int64_t count = sort->count[c * E + e];
            sort->count[c * E + e] = rows;
            rows += count;
        }
    }
    p->expert_begin[E] = rows;
}

static void number_range(void *argument, int64_t begin, int64_t end)
{
    const row_sort *sort = argument;
    const moe__plan_arrays *p = sort->job->plan;
    for (int64_t c = begin; c < end; c++) {
        int64_t *next = sort->count + c * p->num_experts;
        int64_t last = p->token_begin[chunk_begin(sort, c + 1)];
        for (int64_t n = p->token_begin[chunk_begin(sort, c)]; n < last; n++)
            p->row_of_entry[n] = p->slot_of_entry[n] < 0 ? -1 : next[p->expert_of_entry[n]]++;
    }
}

/* row_of_entry and expert_begin by one counter an expert; expert_begin is all 0. */
static void number_in_turn(const moe__plan_arrays *p)
{
    int64_t *begin = p->expert_begin, rows = 0;
    for (int64_t n = 0; n < p->entries; n++)
        if (p->slot_of_entry[n] >= 0) begin[p->expert_of_entry[n] + 1]++;
    for (int64_t e = 0; e < p->num_experts; e++) { /* begin[e + 1] becomes the first row of e */
        int64_t count = begin[e + 1];
        begin[e + 1] = rows;
        rows += count;
    }
    for (int64_t n = 0; n < p->entries; n++) /* begin[e + 1] ends as the first row of e + 1 */
        p->row_of_entry[n] = p->slot_of_entry[n] < 0 ? -1 : begin[p->expert_of_entry[n] + 1]++;
}

/* What a row knows of its entry. */
static void note_range(void *argument, int64_t begin, int64_t end)
{
    const row_sort *sort = argument;
    const moe__plan_arrays *p = sort->job->plan;
    for (int64_t t = begin; t < end; t++)
        for (int64_t n = p->token_begin[t]; n < p->token_begin[t + 1]; n++) {
            int64_t row = p->row_of_entry[n];
            if (row < 0) continue;
            p->token_of_row[row] = t;
            p->entry_of_row[row] = n;
            if (sort->give_slots)
                p->slot_of_entry[n] = row - p->expert_begin[p->expert_of_entry[n]];
        }
}

/* row_of_entry, expert_begin, token_of_row, entry_of_row from the slots. Runs of tokens are counted
 * and numbered side by side where their counters fit into token_of_row, which is written last. */
static moe_status sort_by_expert(moe__plan_rows_job *job, int give_slots)
{
    moe__plan_arrays *p = job->plan;
    moe_context *context = job->workers.context;
    const char *function = job->workers.function;
    row_sort sort = {job, p->token_of_row, moe__min(context->threads, p->entries / p->num_experts),
                     give_slots};
    sort.chunks = moe__min(sort.chunks, p->entries / 2048);
    if (sort.chunks > 1) {
        MOE_TRY(moe__parallel_range(context, sort.chunks, 1, count_range, &sort, function));
        place_runs(&sort);
        MOE_TRY(moe__parallel_range(context, sort.chunks, 1, number_range, &sort, function));
    } else {
        number_in_turn(p);
    }
    p->rows = p->expert_begin[p->num_experts];
    return moe__parallel_range(context, p->tokens, 1024, note_range, &sort, function);
}

/* Weights of entries without a row become +0, whatever the sum; if asked, a token's others are
 * divided by their sum S, or by renormalize_minimum where S is less than a positive one, or are 0
 * where the divisor is 0. */
static void weigh_range(void *argument, int64_t begin, int64_t end)
{
    const moe__plan_rows_job *job = argument;
    const moe__plan_arrays *p = job->plan;
    const real minimum = (real)job->renormalize_minimum;
    real *w = p->weight_of_entry;
    for (int64_t t = begin; t < end; t++) {
        int64_t first = p->token_begin[t], last = p->token_begin[t + 1];
        real sum = R(0.0);
        for (int64_t n = first; n < last; n++) {
            if (p->row_of_entry[n] < 0)
                w[n] = R(0.0);
            else
                sum = sum + w[n];
        }
        if (minimum > R(0.0) && sum < minimum) sum = minimum;
        for (int64_t n = first; n < last && job->renormalize_after_drop; n++)
            if (p->row_of_entry[n] >= 0) w[n] = sum != R(0.0) ? w[n] / sum : R(0.0);
    }
}

moe_status MOE_KERNEL(plan_rows)(moe__plan_rows_job *job)
{
    const moe__plan_arrays *p = job->plan;
    if (!job->keep_rows) {
        int in_order = !job->keep_slots && !job->group_capacity && p->groups == 1;
        memset(p->expert_begin, 0, (size_t)(p->num_experts + 1) * sizeof *p->expert_begin);
        if (!job->keep_slots) MOE_TRY(admit(job, in_order));
        MOE_TRY(sort_by_expert(job, in_order));
    }
    return moe__parallel_range(job->workers.context, p->tokens, 1024, weigh_range, job,
                               job->workers.function);
}
