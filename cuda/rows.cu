/* rows.cu - from entries to rows: who is kept, and the order by expert. As src/cpu/rows.c, which
 * says who is: here every rule is an order of the entries that ask, by expert and group and then
 *   TOKEN_ORDER     entry
 *   CHOICE          choice, entry
 *   BATCH_PRIORITY  choice, priority of the token, entry
 *   SCORE, RANDOM   key, entry
 * in which the first of each (expert, group), up to its capacity, stay. Rows are the entries that
 * stay in the order by expert and entry. Both are stable sorts (sort.cu); nothing is quadratic, and
 * the host does not learn how many rows there are.
 *
 * Until the rows are written, their arrays are scratch of the sort, and slot_of_entry holds what
 * sort.h says. No other scratch. */
#include "sort.h"

/* ---- who asks, and its key ------------------------------------------------------------------- */

/* Blocks of the second choices' random numbers begin here, beyond expert / 4 of any expert. */
#define SECOND_CHOICE_BLOCK 0x80000000u

/* What the kernels need of a job. */
struct moe_ask {
    const uint8_t *token_mask;
    const int64_t *group_capacity;
    const void *token_priority; /* [T] float */
    int32_t drop_policy, second_choice;
    double second_threshold;
    uint64_t seed;
    uint32_t drop_stream, step, token_first, zero;
};

MOE_DEVICE uint32_t moe_draw_bits(const moe_ask &ask, int64_t t, uint32_t first_block,
                                  int64_t number)
{
    uint32_t words[4], lane = (uint32_t)number % 4;
    moe__counter(words, ask.drop_stream, ask.step, ask.token_first + (uint32_t)t,
                 first_block + (uint32_t)(number / 4));
    moe__philox(ask.seed, words, words);
    return lane == 0 ? words[0] : lane == 1 ? words[1] : lane == 2 ? words[2] : words[3];
}

MOE_DEVICE bool moe_asks_for_row(const moe_ask &ask, const moe__plan_arrays &p, int64_t t,
                                 int64_t n)
{
    int64_t choice = n - p.token_begin[t];
    if (p.expert_of_entry[n] < 0 || (ask.token_mask && !ask.token_mask[t])) return false;
    if (choice == 0 || ask.second_choice == MOE_SECOND_CHOICE_ALL) return true;
    if (ask.second_choice == MOE_SECOND_CHOICE_NONE) return false;
    double weight = ((const float *)p.weight_of_entry)[n], threshold = ask.second_threshold;
    if (ask.second_choice == MOE_SECOND_CHOICE_THRESHOLD) return weight > threshold;
    double u = moe__uniform_f32(moe_draw_bits(ask, t, SECOND_CHOICE_BLOCK, choice));
    return u < weight / (threshold > 1e-9 ? threshold : 1e-9);
}

/* An integer in the reverse order of the values: -0 is +0, NaN is above all. */
MOE_DEVICE uint32_t moe_descending(float v)
{
    uint32_t bits = moe__bits_f32(v + 0.0f);
    if (v != v) return 0xffffffffu;
    return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}

/* What the policy sorts by, small first. The bits of moe__uniform_f32 are in the order of its
 * values. */
MOE_DEVICE uint32_t moe_key_of(const moe_ask &ask, const moe__plan_arrays &p, int64_t t, int64_t n)
{
    switch (ask.drop_policy) {
    case MOE_DROP_BATCH_PRIORITY: return moe_descending(((const float *)ask.token_priority)[t]);
    case MOE_DROP_SCORE: return moe_descending(((const float *)p.weight_of_entry)[n]);
    case MOE_DROP_RANDOM: return 0x7fffffu - (moe_draw_bits(ask, t, 0, p.expert_of_entry[n]) >> 9);
    default: return 0;
    }
}

/* slot_of_entry: group << 32 | key for an entry that asks for a row, else -1. Without limits its
 * group is of no interest, and where there is none its key neither. */
MOE_GLOBAL(256) moe_rows_ask(moe_ask ask, moe__plan_arrays p)
{
    int64_t n = (int64_t)blockIdx.x * 256 + threadIdx.x, slot = -1;
    if (n >= p.entries) return;
    int64_t t = moe_token_of_entry(p, n);
    if (moe_asks_for_row(ask, p, t, n)) {
        int64_t g = ask.group_capacity ? moe_range_of(p.group_begin, p.groups, t) : 0;
        bool limited = ask.group_capacity && ask.group_capacity[g] >= 0;
        slot = g << 32 | (limited ? moe_key_of(ask, p, t, n) : 0);
    }
    p.slot_of_entry[n] = slot;
}

/* ---- who is kept ----------------------------------------------------------------------------- */

/* expert_begin[e] = the first place of expert e in the sorted list, whose length expert_begin[E]
 * is; row_of_entry = -1. */
MOE_GLOBAL(256) moe_rows_begin(moe__plan_arrays p)
{
    int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i < p.entries) p.row_of_entry[i] = -1;
    if (i >= p.num_experts) return;
    int64_t low = 0, high = p.expert_begin[p.num_experts];
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (p.expert_of_entry[p.entry_of_row[middle]] < i)
            low = middle + 1;
        else
            high = middle;
    }
    p.expert_begin[i] = low;
}

/* The first place of (expert e, group g) in the sorted list, not after `at`, which is one of them:
 * within an expert, groups are in order. */
MOE_DEVICE int64_t moe_group_begin(const moe__plan_arrays &p, int64_t e, int64_t g, int64_t at)
{
    int64_t low = p.expert_begin[e], high = at;
    if (g == 0) return low;
    int64_t first = p.token_begin[p.group_begin[g]];
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (p.entry_of_row[middle] < first)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* slot_of_entry: place within (group, expert) in the policy's order, -1 from the capacity on. */
MOE_GLOBAL(256) moe_rows_admit(moe__plan_arrays p, const int64_t *group_capacity)
{
    int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= p.expert_begin[p.num_experts]) return;
    int64_t n = p.entry_of_row[i], g = p.slot_of_entry[n] >> 32, room = group_capacity[g];
    int64_t slot = i - moe_group_begin(p, p.expert_of_entry[n], g, i);
    p.slot_of_entry[n] = room < 0 || slot < room ? slot : -1;
}

/* ---- rows and weights ------------------------------------------------------------------------ */

/* row_of_entry and token_of_row from the sorted list, which is entry_of_row; with `slots` the slots
 * in order of entry. */
MOE_GLOBAL(256) moe_rows_write(moe__plan_arrays p, int32_t slots)
{
    int64_t row = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (row >= p.expert_begin[p.num_experts]) return;
    int64_t n = p.entry_of_row[row], t = moe_token_of_entry(p, n);
    p.row_of_entry[n] = row;
    p.token_of_row[row] = t;
    if (!slots) return;
    int64_t g = p.groups > 1 ? moe_range_of(p.group_begin, p.groups, t) : 0;
    p.slot_of_entry[n] = row - moe_group_begin(p, p.expert_of_entry[n], g, row);
}

/* Weights of entries without a row become +0, whatever the sum; if asked, a token's others are
 * divided by their sum S, or by the minimum where S is less than a positive one, or are 0 where the
 * divisor is 0. */
MOE_GLOBAL(256) moe_rows_weigh(moe__plan_arrays p, int32_t renormalize, float minimum)
{
    int64_t t = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (t >= p.tokens) return;
    int64_t first = p.token_begin[t], last = p.token_begin[t + 1];
    float *w = (float *)p.weight_of_entry, sum = 0.0f;
    for (int64_t n = first; n < last; n++) {
        if (p.row_of_entry[n] < 0)
            w[n] = 0.0f;
        else
            sum = sum + w[n];
    }
    if (minimum > 0.0f && sum < minimum) sum = minimum;
    for (int64_t n = first; n < last && renormalize; n++)
        if (p.row_of_entry[n] >= 0) w[n] = sum != 0.0f ? w[n] / sum : 0.0f;
}

/* ---- the slot -------------------------------------------------------------------------------- */

static dim3 threads_for(int64_t count) { return dim3((unsigned)((count + 255) / 256)); }

/* The list of entries with a slot in entry_of_row, in the order of keys and then by expert; where
 * each expert begins in it. */
static moe_status sort_entries(const moe__plan_rows_job *job, moe_sort_key *keys, int32_t count)
{
    const moe__plan_arrays *p = job->plan;
    int64_t threads = moe__max(p->entries, p->num_experts);
    keys[count] = {MOE_DIGIT_EXPERT, p->num_experts - 1};
    MOE_TRY(moe__cuda_sort_entries(&job->workers, p, job->group_capacity, keys, count + 1));
    return moe__cuda_launch(&job->workers, "plan_rows", moe_rows_begin, threads_for(threads),
                            dim3(256), 0, *p);
}

/* slot_of_entry: place within (group, expert) in order of admission, -1 for what has no row;
 * without limits 0, and the rows give the places. */
static moe_status admit(const moe__plan_rows_job *job)
{
    const moe__plan_arrays *p = job->plan;
    const int32_t policy = job->drop_policy;
    moe_sort_key keys[4];
    int32_t count = 0;
    moe_ask ask = {job->token_mask,
                   job->group_capacity,
                   job->token_priority,
                   job->drop_policy,
                   job->second_choice,
                   job->second_threshold,
                   job->seed,
                   job->drop_stream,
                   (uint32_t)job->step,
                   (uint32_t)job->token_first,
                   0};
    MOE_TRY(moe__cuda_launch(&job->workers, "plan_rows", moe_rows_ask, threads_for(p->entries),
                             dim3(256), 0, ask, *p));
    if (!job->group_capacity) return MOE_OK;
    if (policy == MOE_DROP_SCORE || policy == MOE_DROP_BATCH_PRIORITY)
        keys[count++] = {MOE_DIGIT_KEY, 0xffffffff};
    if (policy == MOE_DROP_RANDOM) keys[count++] = {MOE_DIGIT_KEY, 0x7fffff};
    if (policy == MOE_DROP_CHOICE || policy == MOE_DROP_BATCH_PRIORITY)
        keys[count++] = {MOE_DIGIT_CHOICE, p->entries - 1};
    if (count > 0 && p->groups > 1) keys[count++] = {MOE_DIGIT_GROUP, p->groups - 1};
    MOE_TRY(sort_entries(job, keys, count));
    return moe__cuda_launch(&job->workers, "plan_rows", moe_rows_admit, threads_for(p->entries),
                            dim3(256), 0, *p, job->group_capacity);
}

/* row_of_entry, expert_begin, token_of_row, entry_of_row from the slots. */
static moe_status sort_by_expert(const moe__plan_rows_job *job)
{
    const moe__plan_arrays *p = job->plan;
    bool by_choice = job->drop_policy == MOE_DROP_CHOICE ||
                     job->drop_policy == MOE_DROP_BATCH_PRIORITY;
    int32_t slots = !job->keep_slots && !(job->group_capacity && by_choice);
    moe_sort_key keys[1];
    MOE_TRY(sort_entries(job, keys, 0));
    return moe__cuda_launch(&job->workers, "plan_rows", moe_rows_write, threads_for(p->entries),
                            dim3(256), 0, *p, slots);
}

extern "C" int64_t moe__cuda_rows_scratch(const moe__pass_shape *shape)
{
    (void)shape;
    return 0;
}

extern "C" moe_status moe__cuda_plan_rows(moe__plan_rows_job *job)
{
    moe__plan_arrays *p = job->plan;
    if (!job->keep_rows) {
        p->rows = -1;
        if (p->entries == 0) {
            size_t bytes = (size_t)(p->num_experts + 1) * sizeof *p->expert_begin;
            cudaStream_t stream = (cudaStream_t)job->workers.stream;
            cudaError_t error = cudaMemsetAsync(p->expert_begin, 0, bytes, stream);
            return error == cudaSuccess ? MOE_OK
                                        : moe__cuda_status(error, &job->workers, "plan_rows");
        }
        if (!job->keep_slots) MOE_TRY(admit(job));
        MOE_TRY(sort_by_expert(job));
    }
    if (p->entries == 0) return MOE_OK;
    return moe__cuda_launch(&job->workers, "plan_rows", moe_rows_weigh, threads_for(p->tokens),
                            dim3(256), 0, *p, job->renormalize_after_drop,
                            (float)job->renormalize_minimum);
}
