/* experts.c - the expert pool: its life, its parts and its calls. The config is in
 * experts_config.c, where weights lie in storage.c, the steps are in experts_step.c. */
#include "pass_state.h"

#include <string.h>

/* ---- life ------------------------------------------------------------------------------------ */

/* Touched experts: a byte each, and the list of their numbers. No experts: one of each. */
static int64_t mark_bytes(int64_t num_experts) { return moe__max(num_experts, 1); }
static int64_t touched_bytes(int64_t num_experts)
{
    return moe__mul(mark_bytes(num_experts), (int64_t)sizeof(int32_t));
}

static moe_status make_touched(moe_experts *e, const char *function)
{
    int64_t E = e->config.num_experts;
    e->touched = e->context->memory->alloc(e->context, mark_bytes(E), true);
    e->touched_list = moe__alloc_zeroed(e->context, touched_bytes(E));
    if (!e->touched || !e->touched_list)
        REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no memory for %lld experts", (ll)E);
    return MOE_OK;
}

/* Memory of an object, its parts left alone. */
static void free_pool(moe_experts *e)
{
    moe_context *context = e->context;
    int64_t E = e->config.num_experts;
    moe__listing_free(&e->listing, context);
    moe__parameters_free(&e->parameters);
    moe__storage_free(e);
    context->memory->free(context, e->touched, mark_bytes(E));
    moe__free(context, e->touched_list, touched_bytes(E));
    moe__free(context, e, sizeof *e);
}

static moe_experts *new_pool(moe_context *context, const moe_experts_config *c)
{
    moe_experts *e = moe__alloc_zeroed(context, sizeof *e);
    if (!e) return NULL;
    atomic_init(&e->references, 1);
    atomic_flag_clear(&e->backward_running);
    atomic_init(&e->packed.holds, 0);
    atomic_flag_clear(&e->packed.busy);
    atomic_init(&e->parameters.changes, 1);
    e->context = context;
    e->config = *c;
    e->parameters.context = context;
    return e;
}

static moe_status fill_pool(moe_experts *e, const moe_expert_callbacks *callbacks,
                            const char *function)
{
    e->callbacks = *callbacks;
    e->config.callbacks = e->config.kind == MOE_EXPERTS_CALLBACK ? &e->callbacks : NULL;
    e->room = moe__experts_room_of(&e->config, callbacks);
    if (!e->context->memory->is_host) e->room.keep_h = true;
    e->part[0] = e;
    e->parts = 1;
    MOE_TRY(make_touched(e, function));
    moe__experts_parameters_describe(e);
    MOE_TRY(moe__listing_create(&e->listing, e->context, e->parameters.count, function));
    moe__listing_add(&e->listing, "", &e->parameters);
    MOE_TRY(moe__storage_allocate(e, function));
    return moe__parameters_allocate(&e->parameters, e->config.parameters, function);
}

moe_status moe__experts_make(moe_experts **experts, moe_context *context,
                             const moe_experts_config *config, bool one_w13, const char *function)
{
    moe_experts_config c;
    moe_expert_callbacks callbacks;
    if (!experts || !context) REFUSE_ARGUMENT("%s is NULL", experts ? "context" : "experts");
    MOE_TRY(moe__struct_read(&moe__experts_config_info, &c, config, false, function));
    MOE_TRY(moe__experts_config_check(&c, &callbacks, function));
    if (!moe__kernels(context, c.dtype))
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "dtype %d is not available on %s", (int)c.dtype,
               context->memory->name);
    if (c.kind == MOE_EXPERTS_CALLBACK && !context->memory->is_host)
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "kind MOE_EXPERTS_CALLBACK is not available on %s",
               context->memory->name);
    MOE_TRY(moe__storage_check(context, &c, function));
    moe_experts *e = new_pool(context, &c);
    if (!e) REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no memory for the pool");
    e->one_w13 = one_w13 || c.storage == MOE_STORAGE_PANELS;
    moe_status status = fill_pool(e, &callbacks, function);
    if (status != MOE_OK) {
        free_pool(e);
        return status;
    }
    moe__context_retain(context);
    *experts = e;
    return MOE_OK;
}

moe_status moe_experts_create(moe_experts **experts, moe_context *context,
                              const moe_experts_config *config)
{
    return moe__experts_make(experts, context, config, false, __func__);
}

/* ---- parts ----------------------------------------------------------------------------------- */

static moe_status check_part(moe_experts *const *parts, int64_t i, const char *function)
{
    const moe_experts *p = parts[i], *first = parts[0];
    if (!p) REFUSE_ARGUMENT("parts[%lld] is NULL", (ll)i);
    if (p->made_of_parts) REFUSE_ARGUMENT("parts[%lld] is made of parts itself", (ll)i);
    if (p->config.num_experts == 0) REFUSE_ARGUMENT("parts[%lld] has no experts", (ll)i);
    for (int64_t j = 0; j < i; j++)
        if (parts[j] == p) REFUSE_ARGUMENT("parts[%lld] is parts[%lld] again", (ll)i, (ll)j);
    if (p->context != first->context)
        REFUSE_ARGUMENT("parts[%lld] and parts[0] are of different contexts", (ll)i);
    if (p->config.dtype != first->config.dtype)
        REFUSE_ARGUMENT("dtype of parts[%lld] is %d, of parts[0] %d", (ll)i, (int)p->config.dtype,
                        (int)first->config.dtype);
    if (p->config.d_model != first->config.d_model)
        REFUSE_ARGUMENT("d_model of parts[%lld] is %lld, of parts[0] %lld", (ll)i,
                        (ll)p->config.d_model, (ll)first->config.d_model);
    if (p->config.d_out != first->config.d_out)
        REFUSE_ARGUMENT("d_out of parts[%lld] is %lld, of parts[0] %lld", (ll)i,
                        (ll)p->config.d_out, (ll)first->config.d_out);
    return MOE_OK;
}

/* A part's workspace begins at its first row times the most bytes a row, which must leave it
 * aligned. */
static moe_status add_room(moe__experts_room *all, const moe_experts *part, const char *function)
{
    const moe__experts_room *r = &part->room;
    int64_t workspace = moe__add(r->workspace_per_row, 63);
    if (workspace < 0)
        REFUSE(MOE_ERROR_OVERFLOW, "workspace_per_row is %lld", (ll)r->workspace_per_row);
    all->d_hidden = moe__max(all->d_hidden, r->d_hidden);
    all->workspace_per_row = moe__max(all->workspace_per_row, workspace & ~(int64_t)63);
    all->gated = all->gated || r->gated;
    all->x_rows = all->x_rows || r->x_rows;
    all->dz = all->dz || r->dz;
    all->keep_h = all->keep_h || r->keep_h;
    return MOE_OK;
}

static moe_status take_parts(moe_experts *e, moe_experts *const *parts, int64_t count,
                             const char *function)
{
    int64_t named = 0;
    const moe_experts_config *first = &parts[0]->config;
    e->made_of_parts = true;
    e->parts = count;
    e->room = (moe__experts_room){.d_model = first->d_model,
                                  .d_out = first->d_out,
                                  .num_experts = e->config.num_experts,
                                  .dtype = first->dtype};
    for (int64_t i = 0; i < count; i++) {
        const moe_experts_config *c = &parts[i]->config;
        e->part[i] = parts[i];
        named += parts[i]->listing.count;
        e->room.combine_weight = e->room.combine_weight ||
                                 (c->weight_position == MOE_WEIGHT_ON_OUTPUT) !=
                                     (first->weight_position == MOE_WEIGHT_ON_OUTPUT);
        MOE_TRY(add_room(&e->room, parts[i], function));
    }
    MOE_TRY(moe__listing_create(&e->listing, e->context, named, function));
    for (int64_t i = 0; i < count; i++) {
        const char prefix[] = {(char)('0' + i), '.', 0};
        moe__listing_add_all(&e->listing, prefix, &parts[i]->listing);
    }
    return MOE_OK;
}

moe_status moe_experts_create_parts(moe_experts **experts, moe_experts *const *parts, int64_t count)
{
    const char *function = __func__;
    int64_t E = 0;
    if (!experts || !parts) REFUSE_ARGUMENT("%s is NULL", experts ? "parts" : "experts");
    MOE_TRY(moe__check_range("count", count, 1, MOE_MAX_PARTS, function));
    for (int64_t i = 0; i < count; i++) {
        MOE_TRY(check_part(parts, i, function));
        E += parts[i]->config.num_experts; /* 8 of 2^31 fit */
    }
    if (E > INT32_MAX)
        REFUSE(MOE_ERROR_OVERFLOW, "the parts have %lld experts, at most 2^31 - 1 are possible",
               (ll)E);
    if (!parts[0]->context->memory->is_host)
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "a pool of parts is not available on %s",
               parts[0]->context->memory->name);
    const moe_experts_config *first = &parts[0]->config;
    const moe_experts_config c = {.struct_size = sizeof c,
                                  .d_model = first->d_model,
                                  .d_out = first->d_out,
                                  .num_experts = E,
                                  .dtype = first->dtype,
                                  .init_std = MOE_INIT_DEFAULT};
    moe_experts *e = new_pool(parts[0]->context, &c);
    if (!e) REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no memory for the pool");
    moe_status status = take_parts(e, parts, count, function);
    if (status != MOE_OK) {
        free_pool(e);
        return status;
    }
    for (int64_t i = 0; i < count; i++) moe__experts_retain(parts[i]);
    moe__context_retain(e->context);
    *experts = e;
    return MOE_OK;
}

void moe__experts_retain(moe_experts *experts) { atomic_fetch_add(&experts->references, 1); }

void moe_experts_destroy(moe_experts *experts)
{
    if (!experts || atomic_fetch_sub(&experts->references, 1) != 1) return;
    moe_context *context = experts->context;
    for (int64_t i = 0; experts->made_of_parts && i < experts->parts; i++)
        moe_experts_destroy(experts->part[i]);
    free_pool(experts);
    moe_context_destroy(context);
}

moe_status moe_experts_get_config(const moe_experts *experts, moe_experts_config *config)
{
    if (!experts) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "experts is NULL");
    MOE_TRY(moe__struct_check_out(&moe__experts_config_info, config, __func__));
    moe_experts_config known = experts->config;
    if (known.num_experts == 0) known.num_experts = MOE_NO_EXPERTS;
    moe__struct_write(&moe__experts_config_info, config, &known);
    return MOE_OK;
}

moe_status moe_experts_weights_changed(moe_experts *experts)
{
    if (!experts) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "experts is NULL");
    for (int64_t i = 0; i < experts->parts; i++)
        (void)atomic_fetch_add(&experts->part[i]->parameters.changes, 1);
    return MOE_OK;
}

moe_status moe_experts_touched(const moe_experts *experts, uint8_t *touched, int64_t *count)
{
    if (!experts || !touched)
        return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "%s is NULL",
                         experts ? "touched" : "experts");
    const moe__memory *memory = experts->context->memory;
    int64_t sum = 0;
    if (!memory->is_host) {
        int64_t E = experts->config.num_experts;
        moe__workers workers = {.context = experts->context, .function = __func__};
        MOE_TRY(memory->fetch(&workers, touched, experts->touched, E));
        for (int64_t e = 0; e < E; e++) sum += touched[e];
        if (count) *count = sum;
        return MOE_OK;
    }
    for (int64_t i = 0; i < experts->parts; i++) {
        const moe_experts *part = experts->part[i];
        memcpy(touched, part->touched, (size_t)part->config.num_experts);
        touched += part->config.num_experts;
        sum += part->touched_count;
    }
    if (count) *count = sum;
    return MOE_OK;
}

/* ---- what the steps ask ---------------------------------------------------------------------- */

static void forget_part(moe_experts *part)
{
    for (int64_t i = 0; i < part->touched_count; i++) part->touched[part->touched_list[i]] = 0;
    part->touched_count = 0;
}

moe_status moe__experts_forget_touched(moe_experts *experts, const moe__workers *workers)
{
    const moe__memory *memory = experts->context->memory;
    if (!memory->is_host)
        return memory->zero(workers, experts->touched, experts->config.num_experts);
    for (int64_t i = 0; i < experts->parts; i++) forget_part(experts->part[i]);
    return MOE_OK;
}

/* Experts first .. first+count-1 of a part. */
static void note_part(moe_experts *part, int64_t first, int64_t count, const int64_t *begin,
                      bool overwrite)
{
    if (overwrite && first == 0) forget_part(part);
    begin -= first;
    for (int64_t e = first; e < first + count; e++) {
        if (part->touched[e] || begin[e + 1] == begin[e]) continue;
        part->touched[e] = 1;
        part->touched_list[part->touched_count++] = (int32_t)e;
    }
}

moe_status moe__experts_note_touched(moe_experts *experts, const moe__experts_job *job)
{
    const moe__memory *memory = experts->context->memory;
    const int64_t *begin = job->plan->expert_begin;
    bool overwrite = job->overwrite != 0;
    if (!memory->is_host)
        return memory->note_touched(&job->workers, experts->touched + job->first_expert, job->plan,
                                    overwrite);
    for (int64_t i = 0; i < experts->parts; i++) {
        int64_t count = moe__min(experts->part[i]->config.num_experts, job->plan->num_experts);
        note_part(experts->part[i], job->first_expert, count, begin, overwrite);
        begin += count;
    }
    return MOE_OK;
}

moe_status moe__experts_check_bound(const moe_experts *experts, const char *function)
{
    for (int64_t i = 0; i < experts->listing.count; i++) {
        const moe__parameter *p = moe__listed_parameter(&experts->listing, i);
        if (!p->data && !p->data_each)
            REFUSE(MOE_ERROR_INVALID_STATE, "parameter %s is not bound",
                   experts->listing.entry[i].name);
    }
    return MOE_OK;
}

moe_status moe__experts_check_backward(const moe_experts *experts, const char *function)
{
    for (int64_t i = 0; i < experts->parts; i++) {
        const moe_experts *part = experts->part[i];
        if (part->config.kind == MOE_EXPERTS_CALLBACK && !part->callbacks.backward)
            REFUSE(MOE_ERROR_INVALID_STATE, "backward of the callbacks is NULL");
    }
    return moe__experts_check_bound(experts, function);
}

bool moe__experts_begin_backward(moe_experts *experts)
{
    int64_t taken = 0;
    if (atomic_flag_test_and_set(&experts->backward_running)) return false;
    if (!experts->made_of_parts) return true;
    while (taken < experts->parts &&
           !atomic_flag_test_and_set(&experts->part[taken]->backward_running))
        taken++;
    if (taken == experts->parts) return true;
    while (taken > 0) atomic_flag_clear(&experts->part[--taken]->backward_running);
    atomic_flag_clear(&experts->backward_running);
    return false;
}

void moe__experts_end_backward(moe_experts *experts)
{
    for (int64_t i = 0; experts->made_of_parts && i < experts->parts; i++)
        atomic_flag_clear(&experts->part[i]->backward_running);
    atomic_flag_clear(&experts->backward_running);
}

/* ---- work ------------------------------------------------------------------------------------ */

static moe_status check_pass(const moe_experts *experts, const moe_pass *pass, const char *function)
{
    if (!experts) REFUSE_ARGUMENT("experts is NULL");
    if (!pass) REFUSE_ARGUMENT("pass is NULL");
    if (pass->experts != experts) REFUSE_ARGUMENT("the pass was made for another pool");
    return MOE_OK;
}

moe_status moe_experts_forward(moe_experts *experts, moe_pass *pass, const moe_forward_args *args)
{
    MOE_TRY(check_pass(experts, pass, __func__));
    return moe__run_forward(pass, args, MOE__USE_EXPERTS, __func__);
}

moe_status moe_experts_backward(moe_experts *experts, moe_pass *pass, const moe_backward_args *args)
{
    MOE_TRY(check_pass(experts, pass, __func__));
    return moe__run_backward(pass, args, MOE__USE_EXPERTS, __func__);
}
