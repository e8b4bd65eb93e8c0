/* plan_file.c - checking a plan, and saving it to memory and loading it again.
 *
 *     "MOEPLAN1", then int64 little-endian: tokens, entries, rows, num_experts, groups, dtype;
 *     token_begin[T+1], group_begin[G+1], expert_begin[E+1], row_of_entry[N], slot_of_entry[N] as
 *     int64;
 *     expert_of_entry[N] as int32; weight_of_entry[N] as f32 or f64; FNV-1a of all before it as
 *     uint64
 *
 * token_of_row and entry_of_row follow from the rest and are not saved. All sizes are bounded by
 * the number of bytes, so that a forged file cannot ask for more memory than a few times its own
 * size. */
#include "plan_block.h"

#include <string.h>

#define CORRUPT(...) REFUSE(MOE_ERROR_CORRUPT_DATA, __VA_ARGS__)

static const char MAGIC[8] = {'M', 'O', 'E', 'P', 'L', 'A', 'N', '1'};

enum { HEADER_WORDS = 6, HEADER_BYTES = 8 + 8 * HEADER_WORDS };

/* ---- check ----------------------------------------------------------------------------------- */

static moe_status check_prefix(const char *name, const int64_t *begin, int64_t count, int64_t end,
                               const char *function)
{
    if (begin[0] != 0) CORRUPT("%s[0] is %lld", name, (ll)begin[0]);
    for (int64_t i = 0; i < count; i++)
        if (begin[i + 1] < begin[i] || begin[i + 1] > end)
            CORRUPT("%s[%lld] is %lld after %lld", name, (ll)i + 1, (ll)begin[i + 1], (ll)begin[i]);
    if (begin[count] != end)
        CORRUPT("%s[%lld] is %lld instead of %lld", name, (ll)count, (ll)begin[count], (ll)end);
    return MOE_OK;
}

static bool weight_is_zero(const moe__plan_arrays *p, int64_t n)
{
    return p->dtype == MOE_DTYPE_F64 ? ((const double *)p->weight_of_entry)[n] == 0
                                     : ((const float *)p->weight_of_entry)[n] == 0;
}

moe_status moe__plan_check_entries(const moe__plan_arrays *p, const char *function)
{
    MOE_TRY(check_prefix("token_begin", p->token_begin, p->tokens, p->entries, function));
    MOE_TRY(check_prefix("group_begin", p->group_begin, p->groups, p->tokens, function));
    for (int64_t n = 0; n < p->entries; n++) {
        int64_t row = p->row_of_entry[n], slot = p->slot_of_entry[n];
        if (p->expert_of_entry[n] < -1 || p->expert_of_entry[n] >= p->num_experts)
            CORRUPT("expert_of_entry[%lld] is %d", (ll)n, (int)p->expert_of_entry[n]);
        if (row < -1 || row >= p->rows) CORRUPT("row_of_entry[%lld] is %lld", (ll)n, (ll)row);
        if (row >= 0 && p->expert_of_entry[n] < 0)
            CORRUPT("entry %lld has row %lld and no expert", (ll)n, (ll)row);
        if ((row < 0) != (slot == -1) || slot < -1 || slot >= p->entries)
            CORRUPT("slot_of_entry[%lld] is %lld where the row is %lld", (ll)n, (ll)slot, (ll)row);
        if (row < 0 && !weight_is_zero(p, n))
            CORRUPT("weight_of_entry[%lld] is not 0 without a row", (ll)n);
    }
    return MOE_OK;
}

/* Rows are a bijection with the kept entries, sorted by (expert, token, entry): entries are in
 * order of token, so within an expert entry_of_row ascends. */
static moe_status check_rows(const moe__plan_arrays *p, const char *function)
{
    int64_t kept = 0;
    MOE_TRY(check_prefix("expert_begin", p->expert_begin, p->num_experts, p->rows, function));
    for (int64_t n = 0; n < p->entries; n++) kept += p->row_of_entry[n] >= 0;
    if (kept != p->rows) CORRUPT("%lld entries have rows, rows is %lld", (ll)kept, (ll)p->rows);
    for (int64_t e = 0; e < p->num_experts; e++)
        for (int64_t r = p->expert_begin[e]; r < p->expert_begin[e + 1]; r++) {
            int64_t n = p->entry_of_row[r], t = p->token_of_row[r];
            if (n < 0 || n >= p->entries || p->row_of_entry[n] != r || p->expert_of_entry[n] != e)
                CORRUPT("entry_of_row[%lld] is %lld", (ll)r, (ll)n);
            if (t < 0 || t >= p->tokens || n < p->token_begin[t] || n >= p->token_begin[t + 1])
                CORRUPT("token_of_row[%lld] is %lld", (ll)r, (ll)t);
            if (r > p->expert_begin[e] && p->entry_of_row[r - 1] >= n)
                CORRUPT("rows %lld and %lld are out of order", (ll)r - 1, (ll)r);
        }
    return MOE_OK;
}

/* The rows of one (group, expert), which stand together. */
typedef struct buffer_rows {
    int64_t expert, group, first, end;
} buffer_rows;

/* From one to the next with rows, starting from all 0; false after the last. */
static bool next_buffer(const moe__plan_arrays *p, buffer_rows *b)
{
    if (b->end == p->rows) return false;
    b->first = b->end++;
    while (p->expert_begin[b->expert + 1] <= b->first) b->expert++, b->group = 0;
    while (p->group_begin[b->group + 1] <= p->token_of_row[b->first]) b->group++;
    while (b->end < p->expert_begin[b->expert + 1] &&
           p->token_of_row[b->end] < p->group_begin[b->group + 1])
        b->end++;
    return true;
}

/* Each number below the count of a buffer's rows is the slot of one of them: bit first + slot of
 * `seen` is set once. */
static moe_status check_permutations(const moe__plan_arrays *p, uint8_t *seen, const char *function)
{
    buffer_rows b = {0, 0, 0, 0};
    while (next_buffer(p, &b))
        for (int64_t r = b.first; r < b.end; r++) {
            int64_t n = p->entry_of_row[r], slot = p->slot_of_entry[n], place = b.first + slot;
            unsigned bit = 1u << (place & 7);
            if (slot >= b.end - b.first)
                CORRUPT("slot_of_entry[%lld] is %lld, its expert has %lld rows in the group", (ll)n,
                        (ll)slot, (ll)(b.end - b.first));
            if (seen[place >> 3] & bit)
                CORRUPT("slot_of_entry[%lld] is %lld, as of another entry", (ll)n, (ll)slot);
            seen[place >> 3] = (uint8_t)(seen[place >> 3] | bit);
        }
    return MOE_OK;
}

/* The slots of each (group, expert) are 0, 1, ... in some order; most often in order of row, which
 * takes no memory to see. The rows have been checked. */
static moe_status check_slots(moe_context *context, const moe__plan_arrays *p, const char *function)
{
    buffer_rows b = {0, 0, 0, 0};
    bool ascend = true;
    while (ascend && next_buffer(p, &b))
        for (int64_t r = b.first; r < b.end; r++)
            ascend = ascend && p->slot_of_entry[p->entry_of_row[r]] == r - b.first;
    if (ascend) return MOE_OK;
    int64_t bytes = p->rows / 8 + 1;
    uint8_t *seen = moe__alloc_zeroed(context, bytes);
    if (!seen) REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no %lld bytes to check the slots", (ll)bytes);
    moe_status status = check_permutations(p, seen, function);
    moe__free(context, seen, bytes);
    return status;
}

moe_status moe_plan_check(const moe_plan *plan)
{
    if (!plan) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "plan is NULL");
    moe__plan_block there;
    moe__workers workers = moe__plan_workers(plan, __func__);
    MOE_TRY(moe__plan_on_host(plan, &there, plan->context, &workers));
    moe_status status = moe__plan_check_entries(&there.a, __func__);
    if (status == MOE_OK) status = check_rows(&there.a, __func__);
    if (status == MOE_OK) status = check_slots(plan->context, &there.a, __func__);
    moe__plan_block_free(plan->context, &there);
    return status;
}

/* ---- bytes ----------------------------------------------------------------------------------- */

/* Little-endian reading and writing of one block of memory, whatever the machine's order. */
static void put(unsigned char **at, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++) *(*at)++ = (unsigned char)(value >> (8 * i));
}

static uint64_t take(const unsigned char **at, int bytes)
{
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++) value |= (uint64_t) * (*at)++ << (8 * i);
    return value;
}

static void put_words(unsigned char **at, const int64_t *words, int64_t count)
{
    for (int64_t i = 0; i < count; i++) put(at, (uint64_t)words[i], 8);
}

static void take_words(const unsigned char **at, int64_t *words, int64_t count)
{
    for (int64_t i = 0; i < count; i++) words[i] = (int64_t)take(at, 8);
}

static uint64_t fnv1a(const unsigned char *bytes, int64_t count)
{
    uint64_t hash = 0xcbf29ce484222325u;
    for (int64_t i = 0; i < count; i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
    return hash;
}

/* Bytes of a saved plan, or -1 on overflow. */
static int64_t saved_bytes(int64_t tokens, int64_t entries, int64_t experts, int64_t groups,
                           int32_t dtype)
{
    int64_t words = moe__add(moe__add(moe__add(tokens, experts), groups), 3);
    int64_t per_entry = 8 + 8 + 4 + moe__dtype_size(dtype);
    int64_t arrays = moe__add(moe__mul(words, 8), moe__mul(entries, per_entry));
    return moe__add(arrays, HEADER_BYTES + 8);
}

moe_status moe_plan_save(const moe_plan *plan, void *buffer, int64_t capacity, int64_t *size)
{
    const char *function = __func__;
    if (!plan) REFUSE_ARGUMENT("plan is NULL");
    if (!size) REFUSE_ARGUMENT("size is NULL");
    if (capacity < 0) REFUSE_ARGUMENT("capacity is %lld", (ll)capacity);
    if (!buffer && capacity > 0) REFUSE_ARGUMENT("buffer is NULL, capacity is %lld", (ll)capacity);
    moe__plan_block there;
    const moe__plan_arrays *p = &plan->a;
    int64_t bytes = saved_bytes(p->tokens, p->entries, p->num_experts, p->groups, p->dtype);
    unsigned char *at = buffer;
    *size = bytes;
    if (capacity < bytes)
        REFUSE(MOE_ERROR_BUFFER_TOO_SMALL, "capacity is %lld, %lld bytes are needed", (ll)capacity,
               (ll)bytes);
    moe__workers workers = moe__plan_workers(plan, function);
    MOE_TRY(moe__plan_on_host(plan, &there, plan->context, &workers));
    p = &there.a;
    memcpy(at, MAGIC, sizeof MAGIC);
    at += sizeof MAGIC;
    const int64_t header[HEADER_WORDS] = {p->tokens,      p->entries, p->rows,
                                          p->num_experts, p->groups,  p->dtype};
    put_words(&at, header, HEADER_WORDS);
    put_words(&at, p->token_begin, p->tokens + 1);
    put_words(&at, p->group_begin, p->groups + 1);
    put_words(&at, p->expert_begin, p->num_experts + 1);
    put_words(&at, p->row_of_entry, p->entries);
    put_words(&at, p->slot_of_entry, p->entries);
    for (int64_t n = 0; n < p->entries; n++) put(&at, (uint32_t)p->expert_of_entry[n], 4);
    int size_of_weight = (int)moe__dtype_size(p->dtype);
    for (int64_t n = 0; n < p->entries; n++) {
        uint64_t f64 = 0;
        uint32_t f32 = 0;
        if (p->dtype == MOE_DTYPE_F64)
            memcpy(&f64, (const double *)p->weight_of_entry + n, sizeof f64);
        else
            memcpy(&f32, (const float *)p->weight_of_entry + n, sizeof f32);
        put(&at, p->dtype == MOE_DTYPE_F64 ? f64 : f32, size_of_weight);
    }
    put(&at, fnv1a(buffer, bytes - 8), 8);
    moe__plan_block_free(plan->context, &there);
    return MOE_OK;
}

/* ---- load ------------------------------------------------------------------------------------ */

/* Magic, checksum, and sizes that fit the bytes that are there. */
static moe_status check_header(const unsigned char *bytes, int64_t size,
                               int64_t header[HEADER_WORDS], const char *function)
{
    const unsigned char *at = bytes + sizeof MAGIC;
    if (size < HEADER_BYTES + 8) CORRUPT("%lld bytes are too few for a plan", (ll)size);
    if (memcmp(bytes, MAGIC, sizeof MAGIC) != 0) CORRUPT("the data does not begin with MOEPLAN1");
    const unsigned char *end = bytes + size - 8;
    if (take(&end, 8) != fnv1a(bytes, size - 8)) CORRUPT("the checksum does not fit");
    take_words(&at, header, HEADER_WORDS);
    int64_t tokens = header[0], entries = header[1], rows = header[2], experts = header[3];
    if (tokens < 0 || entries < 0 || rows < 0 || rows > entries || experts < 1 ||
        experts > INT32_MAX || header[4] < 1 ||
        (header[5] != MOE_DTYPE_F32 && header[5] != MOE_DTYPE_F64))
        CORRUPT("tokens %lld, entries %lld, rows %lld, experts %lld, groups %lld, dtype %lld",
                (ll)tokens, (ll)entries, (ll)rows, (ll)experts, (ll)header[4], (ll)header[5]);
    if (saved_bytes(tokens, entries, experts, header[4], (int32_t)header[5]) != size)
        CORRUPT("%lld bytes do not fit %lld tokens and %lld entries", (ll)size, (ll)tokens,
                (ll)entries);
    return MOE_OK;
}

static void take_arrays(moe__plan_arrays *p, const unsigned char *at)
{
    take_words(&at, p->token_begin, p->tokens + 1);
    take_words(&at, p->group_begin, p->groups + 1);
    take_words(&at, p->expert_begin, p->num_experts + 1);
    take_words(&at, p->row_of_entry, p->entries);
    take_words(&at, p->slot_of_entry, p->entries);
    for (int64_t n = 0; n < p->entries; n++)
        p->expert_of_entry[n] = (int32_t)(uint32_t)take(&at, 4);
    for (int64_t n = 0; n < p->entries; n++) {
        uint64_t bits = take(&at, (int)moe__dtype_size(p->dtype));
        uint32_t low = (uint32_t)bits;
        if (p->dtype == MOE_DTYPE_F64)
            memcpy((double *)p->weight_of_entry + n, &bits, sizeof bits);
        else
            memcpy((float *)p->weight_of_entry + n, &low, sizeof low);
    }
}

/* token_of_row and entry_of_row from checked entries. check_rows finds what does not fit. */
static void rebuild_rows(moe__plan_arrays *p)
{
    for (int64_t r = 0; r < p->rows; r++) p->token_of_row[r] = p->entry_of_row[r] = -1;
    for (int64_t t = 0; t < p->tokens; t++)
        for (int64_t n = p->token_begin[t]; n < p->token_begin[t + 1]; n++) {
            int64_t row = p->row_of_entry[n];
            if (row < 0) continue;
            p->token_of_row[row] = t;
            p->entry_of_row[row] = n;
        }
}

moe_status moe_plan_load(moe_plan *plan, const void *buffer, int64_t size)
{
    const char *function = __func__;
    int64_t header[HEADER_WORDS];
    moe__plan_block block;
    MOE_TRY(moe__plan_check_own(plan, function));
    if (!buffer) REFUSE_ARGUMENT("buffer is NULL");
    if (size < 0) REFUSE_ARGUMENT("size is %lld", (ll)size);
    MOE_TRY(check_header(buffer, size, header, function));
    MOE_TRY(moe__plan_block_create(&block, plan->context, header[0], header[1], header[3],
                                   header[4], (int32_t)header[5], function));
    block.a.rows = header[2];
    take_arrays(&block.a, (const unsigned char *)buffer + HEADER_BYTES);
    moe_status status = moe__plan_check_entries(&block.a, function);
    if (status == MOE_OK) {
        rebuild_rows(&block.a);
        status = check_rows(&block.a, function);
    }
    if (status == MOE_OK) status = check_slots(plan->context, &block.a, function);
    if (status != MOE_OK) {
        moe__plan_block_free(plan->context, &block);
        return status;
    }
    return moe__plan_adopt(plan, &block, function);
}
