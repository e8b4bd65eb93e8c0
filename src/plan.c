/* plan.c - the plan object: its arrays, its life, and building one from a host's routing.
 *
 * A plan made by a host owns one block of memory with all its arrays; a plan inside a pass lives in
 * the pass's block. Replacing is always: check everything, make the new block, swap. */
#include "plan_block.h"

#include "philox.h"

#include <string.h>

/* ---- structs --------------------------------------------------------------------------------- */

static void args_defaults(void *instance)
{
    *(moe_plan_args *)instance = (moe_plan_args){.id_dtype = MOE_DTYPE_I32,
                                                 .capacity = MOE_FROM_CONFIG};
}
static void view_defaults(void *instance) { *(moe_plan_view *)instance = (moe_plan_view){0}; }

const moe__struct_info moe__plan_args_info = {"moe_plan_args", sizeof(moe_plan_args),
                                              offsetof(moe_plan_args, seed), args_defaults};
const moe__struct_info moe__plan_view_info = MOE__STRUCT_INFO(moe_plan_view, view_defaults);

moe_status moe_plan_args_init(moe_plan_args *args, size_t size)
{
    return moe__struct_init(&moe__plan_args_info, args, size, __func__);
}
moe_status moe_plan_view_init(moe_plan_view *view, size_t size)
{
    return moe__struct_init(&moe__plan_view_info, view, size, __func__);
}

/* ---- arrays ---------------------------------------------------------------------------------- */

void moe__plan_layout(moe__plan_arrays *p, moe__arena *arena, int64_t tokens, int64_t entries,
                      int64_t num_experts, int64_t groups, int32_t dtype)
{
    p->tokens = tokens;
    p->entries = entries;
    p->rows = 0;
    p->num_experts = num_experts;
    p->groups = groups;
    p->dtype = dtype;
    p->token_begin = moe__arena_take(arena, moe__add(tokens, 1), sizeof *p->token_begin);
    p->expert_of_entry = moe__arena_take(arena, entries, sizeof *p->expert_of_entry);
    p->weight_of_entry = moe__arena_take(arena, entries, moe__dtype_size(dtype));
    p->row_of_entry = moe__arena_take(arena, entries, sizeof *p->row_of_entry);
    p->slot_of_entry = moe__arena_take(arena, entries, sizeof *p->slot_of_entry);
    p->expert_begin = moe__arena_take(arena, moe__add(num_experts, 1), sizeof *p->expert_begin);
    p->token_of_row = moe__arena_take(arena, entries, sizeof *p->token_of_row);
    p->entry_of_row = moe__arena_take(arena, entries, sizeof *p->entry_of_row);
    p->group_begin = moe__arena_take(arena, moe__add(groups, 1), sizeof *p->group_begin);
}

static void copy(void *to, const void *from, int64_t count, int64_t size)
{
    if (count > 0) memcpy(to, from, (size_t)(count * size));
}

moe_status moe__plan_copy_arrays(const moe__workers *w, moe__plan_arrays *to,
                                 const moe__plan_arrays *from)
{
    const moe__memory *memory = w->context->memory;
    int64_t word = sizeof(int64_t), rows = from->rows < 0 ? from->entries : from->rows;
    int64_t N = from->entries;
    const struct {
        void *to;
        const void *from;
        int64_t bytes;
    } array[] = {{to->token_begin, from->token_begin, (from->tokens + 1) * word},
                 {to->expert_of_entry, from->expert_of_entry, N * (int64_t)sizeof(int32_t)},
                 {to->weight_of_entry, from->weight_of_entry, N * moe__dtype_size(from->dtype)},
                 {to->row_of_entry, from->row_of_entry, N * word},
                 {to->slot_of_entry, from->slot_of_entry, N * word},
                 {to->expert_begin, from->expert_begin, (from->num_experts + 1) * word},
                 {to->token_of_row, from->token_of_row, rows * word},
                 {to->entry_of_row, from->entry_of_row, rows * word},
                 {to->group_begin, from->group_begin, (from->groups + 1) * word}};
    to->rows = from->rows;
    for (size_t i = 0; i < sizeof array / sizeof *array; i++)
        MOE_TRY(memory->copy(w, array[i].to, array[i].from, array[i].bytes));
    return MOE_OK;
}

/* ---- blocks ---------------------------------------------------------------------------------- */

/* Sizes and bytes of the block, before there is memory. */
static moe_status measure(moe__plan_block *block, int64_t tokens, int64_t entries,
                          int64_t num_experts, int64_t groups, int32_t dtype, const char *function)
{
    moe__arena arena = {NULL, 0};
    moe__plan_layout(&block->a, &arena, tokens, entries, num_experts, groups, dtype);
    block->bytes = arena.used;
    if (block->bytes < 0)
        REFUSE(MOE_ERROR_OVERFLOW,
               "a plan of %lld tokens, %lld entries and %lld groups does not fit in 63 bits",
               (ll)tokens, (ll)entries, (ll)groups);
    return MOE_OK;
}

moe_status moe__plan_block_create(moe__plan_block *block, moe_context *context, int64_t tokens,
                                  int64_t entries, int64_t num_experts, int64_t groups,
                                  int32_t dtype, const char *function)
{
    MOE_TRY(measure(block, tokens, entries, num_experts, groups, dtype, function));
    block->memory = moe__alloc(context, block->bytes);
    if (!block->memory)
        REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no %lld bytes for the plan", (ll)block->bytes);
    moe__arena arena = {block->memory, 0};
    moe__plan_layout(&block->a, &arena, tokens, entries, num_experts, groups, dtype);
    return MOE_OK;
}

moe__workers moe__plan_workers(const moe_plan *plan, const char *function)
{
    moe__workers w = moe__workers_of(plan->context, function, NULL);
    if (plan->workers) w = *plan->workers;
    w.function = function;
    return w;
}

void moe__plan_block_free(moe_context *context, moe__plan_block *block)
{
    moe__free(context, block->memory, block->bytes);
}

moe_status moe__plan_adopt(moe_plan *plan, moe__plan_block *block, const char *function)
{
    moe_context *context = plan->context;
    const moe__memory *memory = context->memory;
    if (!memory->is_host) {
        moe__workers workers = moe__workers_of(context, function, NULL);
        int64_t rows = block->a.rows;
        void *there = memory->alloc(context, block->bytes, false);
        moe_status status = there ? memory->store(&workers, there, block->memory, block->bytes)
                                  : moe__fail(MOE_ERROR_OUT_OF_MEMORY, function,
                                              "no %lld bytes for the plan", (ll)block->bytes);
        moe__plan_block_free(context, block);
        if (status != MOE_OK) {
            memory->free(context, there, block->bytes);
            return status;
        }
        moe__arena arena = {there, 0};
        moe__plan_layout(&block->a, &arena, block->a.tokens, block->a.entries, block->a.num_experts,
                         block->a.groups, block->a.dtype);
        block->a.rows = rows;
        block->memory = there;
    }
    memory->free(context, plan->memory, plan->bytes);
    plan->a = block->a;
    plan->memory = block->memory;
    plan->bytes = block->bytes;
    return MOE_OK;
}

moe_status moe__plan_on_host(const moe_plan *plan, moe__plan_block *block, moe_context *context,
                             const moe__workers *workers)
{
    const moe__plan_arrays *a = &plan->a;
    const moe__memory *memory = plan->context->memory;
    *block = (moe__plan_block){.a = *a};
    if (memory->is_host) return MOE_OK;
    MOE_TRY(moe__plan_block_create(block, context, a->tokens, a->entries, a->num_experts, a->groups,
                                   a->dtype, workers->function));
    moe_status status = memory->fetch(workers, block->memory, a->token_begin, block->bytes);
    if (status == MOE_OK)
        block->a.rows = block->a.expert_begin[a->num_experts];
    else
        moe__plan_block_free(context, block);
    return status;
}

moe_status moe__plan_check_own(const moe_plan *plan, const char *function)
{
    if (!plan) REFUSE_ARGUMENT("plan is NULL");
    if (plan->of_pass) REFUSE(MOE_ERROR_INVALID_STATE, "the plan belongs to a pass");
    return MOE_OK;
}

/* ---- life ------------------------------------------------------------------------------------ */

moe_status moe_plan_create(moe_plan **plan, moe_context *context)
{
    moe__plan_block block;
    if (!plan || !context)
        return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "%s is NULL",
                         plan ? "context" : "plan");
    moe_plan *p = moe__alloc_zeroed(context, sizeof *p);
    if (!p) return moe__fail(MOE_ERROR_OUT_OF_MEMORY, __func__, "no memory for the plan");
    moe_status status = moe__plan_block_create(&block, context, 0, 0, 1, 1, MOE_DTYPE_F32,
                                               __func__);
    if (status != MOE_OK) {
        moe__free(context, p, sizeof *p);
        return status;
    }
    memset(block.memory, 0, (size_t)block.bytes);
    p->context = context;
    status = moe__plan_adopt(p, &block, __func__);
    if (status != MOE_OK) {
        moe__free(context, p, sizeof *p);
        return status;
    }
    moe__context_retain(context);
    *plan = p;
    return MOE_OK;
}

void moe_plan_destroy(moe_plan *plan)
{
    if (!plan || plan->of_pass) return;
    moe_context *context = plan->context;
    context->memory->free(context, plan->memory, plan->bytes);
    moe__free(context, plan, sizeof *plan);
    moe_context_destroy(context);
}

/* A block with the arrays of a plan in the host's memory. */
static moe_status copy_block(moe__plan_block *block, moe_context *context,
                             const moe__plan_arrays *a, const char *function)
{
    moe_context host = {.memory = &moe__host_memory};
    moe__workers workers = moe__workers_of(&host, function, NULL);
    MOE_TRY(moe__plan_block_create(block, context, a->tokens, a->entries, a->num_experts, a->groups,
                                   a->dtype, function));
    return moe__plan_copy_arrays(&workers, &block->a, a);
}

moe_status moe_plan_copy(moe_plan *plan, const moe_plan *from)
{
    moe__plan_block block;
    MOE_TRY(moe__plan_check_own(plan, __func__));
    if (!from) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "from is NULL");
    if (plan == from) return MOE_OK;
    if (!plan->context->memory->is_host || !from->context->memory->is_host) {
        moe__plan_block there;
        moe__workers workers = moe__plan_workers(from, __func__);
        MOE_TRY(moe__plan_on_host(from, &there, plan->context, &workers));
        if (from->context->memory->is_host)
            MOE_TRY(copy_block(&there, plan->context, &from->a, __func__));
        return moe__plan_adopt(plan, &there, __func__);
    }
    MOE_TRY(copy_block(&block, plan->context, &from->a, __func__));
    return moe__plan_adopt(plan, &block, __func__);
}

moe_status moe_plan_get(const moe_plan *plan, moe_plan_view *view)
{
    if (!plan) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "plan is NULL");
    MOE_TRY(moe__struct_check_out(&moe__plan_view_info, view, __func__));
    const moe__plan_arrays *a = &plan->a;
    const moe__memory *memory = plan->context->memory;
    int64_t rows = a->rows;
    if (rows < 0) { /* a device knows */
        moe__workers workers = moe__plan_workers(plan, __func__);
        MOE_TRY(memory->fetch(&workers, &rows, a->expert_begin + a->num_experts, sizeof rows));
    }
    moe_plan_view known = {.tokens = a->tokens,
                           .entries = a->entries,
                           .rows = rows,
                           .num_experts = a->num_experts,
                           .groups = a->groups,
                           .token_begin = a->token_begin,
                           .expert_of_entry = a->expert_of_entry,
                           .weight_of_entry = a->weight_of_entry,
                           .row_of_entry = a->row_of_entry,
                           .slot_of_entry = a->slot_of_entry,
                           .expert_begin = a->expert_begin,
                           .token_of_row = a->token_of_row,
                           .entry_of_row = a->entry_of_row,
                           .group_begin = a->group_begin,
                           .dtype = a->dtype};
    moe__struct_write(&moe__plan_view_info, view, &known);
    return MOE_OK;
}

/* ---- build ----------------------------------------------------------------------------------- */

moe_status moe__check_groups(const int64_t *group_begin, int64_t groups, int64_t tokens,
                             const char *function)
{
    if (groups < 0) REFUSE_ARGUMENT("groups is %lld", (ll)groups);
    if (!group_begin && groups > 1)
        REFUSE_ARGUMENT("group_begin is NULL, groups is %lld", (ll)groups);
    if (!group_begin) return MOE_OK;
    if (groups == 0) groups = 1;
    if (group_begin[0] != 0) REFUSE_ARGUMENT("group_begin[0] is %lld", (ll)group_begin[0]);
    for (int64_t g = 0; g < groups; g++)
        if (group_begin[g + 1] < group_begin[g])
            REFUSE_ARGUMENT("group_begin[%lld] is %lld after %lld", (ll)g + 1,
                            (ll)group_begin[g + 1], (ll)group_begin[g]);
    if (group_begin[groups] != tokens)
        REFUSE_ARGUMENT("group_begin[%lld] is %lld, there are %lld tokens", (ll)groups,
                        (ll)group_begin[groups], (ll)tokens);
    return MOE_OK;
}

/* What the drop policy reads. Without a capacity there is nothing to drop, and nothing is
 * needed. */
static moe_status check_drop(const moe_plan_args *a, const char *function)
{
    const int64_t limit = (int64_t)1 << 32; /* words of the counter have 32 bits */
    if (a->drop_policy < MOE_DROP_TOKEN_ORDER || a->drop_policy > MOE_DROP_RANDOM)
        REFUSE_ARGUMENT("drop_policy is %d", (int)a->drop_policy);
    if (a->token_priority && a->drop_policy != MOE_DROP_BATCH_PRIORITY)
        REFUSE_ARGUMENT("token_priority clashes with drop_policy %d; only "
                        "MOE_DROP_BATCH_PRIORITY reads it",
                        (int)a->drop_policy);
    if (a->capacity < 0) return MOE_OK;
    if (a->drop_policy == MOE_DROP_BATCH_PRIORITY && !a->token_priority && a->tokens > 0)
        REFUSE_ARGUMENT("token_priority is NULL for %lld tokens; drop_policy "
                        "MOE_DROP_BATCH_PRIORITY needs it",
                        (ll)a->tokens);
    if (a->drop_policy != MOE_DROP_RANDOM) return MOE_OK;
    if (a->step < 0 || a->step >= limit)
        REFUSE_ARGUMENT("step is %lld; with MOE_DROP_RANDOM it must be in [0, 2^32)", (ll)a->step);
    if (a->token_first < 0 || a->token_first >= limit || a->tokens > limit - a->token_first)
        REFUSE_ARGUMENT(
            "token_first is %lld with %lld tokens; with MOE_DROP_RANDOM both must stay below 2^32",
            (ll)a->token_first, (ll)a->tokens);
    return MOE_OK;
}

static moe_status check_fields(const moe_plan_args *a, const char *function)
{
    if (a->tokens < 0) REFUSE_ARGUMENT("tokens is %lld", (ll)a->tokens);
    if (a->num_experts < 1 || a->num_experts > INT32_MAX)
        REFUSE_ARGUMENT("num_experts is %lld; it must be in [1, 2^31 - 1]", (ll)a->num_experts);
    if (a->id_dtype != MOE_DTYPE_I32 && a->id_dtype != MOE_DTYPE_I64)
        REFUSE_ARGUMENT("id_dtype is %d", (int)a->id_dtype);
    if (moe__is_half(a->dtype))
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "dtype is %d; the plan of a 16-bit layer is of f32",
               (int)a->dtype);
    if (a->dtype != MOE_DTYPE_F32 && a->dtype != MOE_DTYPE_F64)
        REFUSE_ARGUMENT("dtype is %d", (int)a->dtype);
    if (a->capacity < MOE_FROM_CONFIG) REFUSE_ARGUMENT("capacity is %lld", (ll)a->capacity);
    if (a->renormalize_after_drop < 0 || a->renormalize_after_drop > 1)
        REFUSE_ARGUMENT("renormalize_after_drop is %d", (int)a->renormalize_after_drop);
    return check_drop(a, function);
}

/* The number of entries, after checking token_begin or top_k. */
static moe_status count_entries(const moe_plan_args *a, int64_t *entries, const char *function)
{
    if (a->token_begin) {
        if (a->token_begin[0] != 0)
            REFUSE_ARGUMENT("token_begin[0] is %lld", (ll)a->token_begin[0]);
        for (int64_t t = 0; t < a->tokens; t++)
            if (a->token_begin[t + 1] < a->token_begin[t])
                REFUSE_ARGUMENT("token_begin[%lld] is %lld after %lld", (ll)t + 1,
                                (ll)a->token_begin[t + 1], (ll)a->token_begin[t]);
        *entries = a->token_begin[a->tokens];
    } else {
        if (a->top_k < 0) REFUSE_ARGUMENT("top_k is %lld", (ll)a->top_k);
        *entries = moe__mul(a->tokens, a->top_k);
        if (*entries < 0)
            REFUSE(MOE_ERROR_OVERFLOW, "%lld tokens of %lld experts do not fit in 63 bits",
                   (ll)a->tokens, (ll)a->top_k);
    }
    if (*entries > 0 && !a->expert_ids)
        REFUSE_ARGUMENT("expert_ids is NULL for %lld entries", (ll)*entries);
    return MOE_OK;
}

static int64_t id_of_entry(const moe_plan_args *a, int64_t n)
{
    return a->id_dtype == MOE_DTYPE_I64 ? ((const int64_t *)a->expert_ids)[n]
                                        : ((const int32_t *)a->expert_ids)[n];
}

static moe_status check_ids(const moe_plan_args *a, int64_t entries, const char *function)
{
    for (int64_t n = 0; n < entries; n++) {
        int64_t id = id_of_entry(a, n), t = 0;
        if (id >= -1 && id < a->num_experts) continue;
        if (!a->token_begin) t = n / a->top_k;
        while (a->token_begin && a->token_begin[t + 1] <= n) t++;
        REFUSE_ARGUMENT("token %lld, entry %lld: expert id %lld is not in [-1, %lld)", (ll)t, (ll)n,
                        (ll)id, (ll)a->num_experts);
    }
    return MOE_OK;
}

/* Copies what the host gave into the new arrays. */
static void take_routing(moe__plan_arrays *p, const moe_plan_args *a)
{
    for (int64_t t = 0; t <= a->tokens; t++)
        p->token_begin[t] = a->token_begin ? a->token_begin[t] : t * a->top_k;
    for (int64_t g = 0; g <= p->groups; g++)
        p->group_begin[g] = a->group_begin ? a->group_begin[g] : g * a->tokens;
    for (int64_t n = 0; n < p->entries; n++) p->expert_of_entry[n] = (int32_t)id_of_entry(a, n);
    if (a->weights) {
        copy(p->weight_of_entry, a->weights, p->entries, moe__dtype_size(p->dtype));
        return;
    }
    for (int64_t n = 0; n < p->entries; n++) {
        if (p->dtype == MOE_DTYPE_F64)
            ((double *)p->weight_of_entry)[n] = 1;
        else
            ((float *)p->weight_of_entry)[n] = 1;
    }
}

static moe_status make_rows(moe_context *context, moe__plan_arrays *p, const moe_plan_args *a,
                            int64_t *group_capacity, const char *function)
{
    fenv_t saved;
    moe__plan_rows_job job = {.workers = {.context = context, .function = function},
                              .plan = p,
                              .token_mask = a->token_mask,
                              .group_capacity = a->capacity >= 0 ? group_capacity : NULL,
                              .drop_policy = a->drop_policy,
                              .renormalize_after_drop = a->renormalize_after_drop,
                              .token_priority = a->token_priority,
                              .seed = a->seed,
                              .drop_stream = moe__stream(0, 0, MOE__PURPOSE_DROP),
                              .step = a->step,
                              .token_first = a->token_first};
    for (int64_t g = 0; a->capacity >= 0 && g < p->groups; g++) group_capacity[g] = a->capacity;
    moe__fenv_enter(&saved);
    moe_status status = moe__cpu_backend(context->isa, p->dtype)->plan_rows(&job);
    moe__fenv_leave(&saved);
    return status;
}

/* ---- arrays that are not the host's ---------------------------------------------------------- */

/* Copies of a routing's arrays in the host's memory. */
typedef struct host_copies {
    void *array[5];
    int64_t bytes[5];
} host_copies;

static void free_copies(moe_context *context, host_copies *c)
{
    for (int i = 0; i < 5; i++) moe__free(context, c->array[i], c->bytes[i]);
}

static moe_status copy_to_host(moe_context *context, host_copies *c, int i, const void **from,
                               int64_t bytes, const char *function)
{
    moe__workers workers = moe__workers_of(context, function, NULL);
    if (!*from || bytes <= 0 || context->memory->is_host) return MOE_OK;
    c->array[i] = moe__alloc(context, bytes);
    c->bytes[i] = bytes;
    if (!c->array[i]) REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no %lld bytes", (ll)bytes);
    MOE_TRY(context->memory->fetch(&workers, c->array[i], *from, bytes));
    *from = c->array[i];
    return MOE_OK;
}

/* The arrays of tokens, then of entries, whose number is known by then. */
static moe_status tokens_to_host(moe_context *context, host_copies *c, moe_plan_args *a,
                                 const char *function)
{
    const void *begin = a->token_begin, *mask = a->token_mask;
    MOE_TRY(
        copy_to_host(context, c, 0, &begin, (a->tokens + 1) * (int64_t)sizeof(int64_t), function));
    MOE_TRY(copy_to_host(context, c, 1, &mask, a->tokens, function));
    MOE_TRY(copy_to_host(context, c, 2, &a->token_priority, a->tokens * moe__dtype_size(a->dtype),
                         function));
    a->token_begin = begin;
    a->token_mask = mask;
    return MOE_OK;
}

static moe_status entries_to_host(moe_context *context, host_copies *c, moe_plan_args *a,
                                  int64_t entries, const char *function)
{
    MOE_TRY(copy_to_host(context, c, 3, &a->expert_ids, entries * moe__dtype_size(a->id_dtype),
                         function));
    return copy_to_host(context, c, 4, &a->weights, entries * moe__dtype_size(a->dtype), function);
}

/* Everything that can be wrong, and then the block. Fields were checked. */
static moe_status build(moe_context *context, moe__plan_block *block, host_copies *copies,
                        moe_plan_args *a, const char *function)
{
    /* Sizes are known to fit before an array of that size is read. */
    int64_t groups = moe__max(a->groups, 1), capacity_bytes = moe__mul(groups, sizeof(int64_t));
    int64_t entries = 0;
    MOE_TRY(measure(block, a->tokens, 0, a->num_experts, groups, a->dtype, function));
    MOE_TRY(moe__check_groups(a->group_begin, a->groups, a->tokens, function));
    MOE_TRY(tokens_to_host(context, copies, a, function));
    MOE_TRY(count_entries(a, &entries, function));
    MOE_TRY(measure(block, a->tokens, entries, a->num_experts, groups, a->dtype, function));
    MOE_TRY(entries_to_host(context, copies, a, entries, function));
    MOE_TRY(check_ids(a, entries, function));
    MOE_TRY(moe__plan_block_create(block, context, a->tokens, entries, a->num_experts, groups,
                                   a->dtype, function));
    int64_t *group_capacity = moe__alloc(context, capacity_bytes);
    moe_status status = group_capacity ? MOE_OK
                                       : moe__fail(MOE_ERROR_OUT_OF_MEMORY, function,
                                                   "no memory for %lld groups", (ll)groups);
    if (status == MOE_OK) {
        take_routing(&block->a, a);
        status = make_rows(context, &block->a, a, group_capacity, function);
    }
    moe__free(context, group_capacity, capacity_bytes);
    if (status != MOE_OK) moe__plan_block_free(context, block);
    return status;
}

moe_status moe_plan_build(moe_plan *plan, const moe_plan_args *args)
{
    moe_plan_args a;
    moe__plan_block block;
    host_copies copies = {{NULL}, {0}};
    MOE_TRY(moe__plan_check_own(plan, __func__));
    MOE_TRY(moe__struct_read(&moe__plan_args_info, &a, args, false, __func__));
    MOE_TRY(check_fields(&a, __func__));
    moe_status status = build(plan->context, &block, &copies, &a, __func__);
    free_copies(plan->context, &copies);
    return status == MOE_OK ? moe__plan_adopt(plan, &block, __func__) : status;
}
