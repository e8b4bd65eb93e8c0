/* check_twin.c - the f64 copy of a layer that moe_check_gradients moves about.
 *
 *     L = sum(y * dy) + sum(losses)
 *
 * It uses the library through its public calls, as a host would, so that what is checked is what a
 * host gets. The plan of the first forward is replayed in all others: selections, masks and drops
 * are constants of every gradient. */
#include "check_twin.h"
#include "numeric.h"
#include "philox.h"
#include "reals.h"

#include <float.h>
#include <string.h>

/* ---- numbers --------------------------------------------------------------------------------- */

/* Normal numbers times `scale`; each `which` has its own. */
static void draw(double *to, int64_t count, double scale, uint64_t seed, uint32_t which)
{
    for (int64_t i = 0; i < count; i += 4) {
        uint32_t counter[4];
        float normal[4];
        moe__counter(counter, moe__stream(0, which, MOE__PURPOSE_CHECK), (uint32_t)(i >> 34), 0,
                     (uint32_t)(i >> 2));
        moe__philox(seed, counter, counter);
        moe__normal4(counter, normal);
        for (int64_t j = i; j < i + 4 && j < count; j++) to[j] = scale * (double)normal[j - i];
    }
}

/* Weights of about unit gain, and biases that matter. */
static double drawn_scale(const moe__parameter *p, int32_t weight_layout)
{
    int32_t matrix = p->dims - p->per_expert == 2;
    int32_t in = p->per_expert && weight_layout == MOE_WEIGHT_OUT_IN ? p->dims - 1 : p->dims - 2;
    return matrix ? 1 / moe__sqrt_f64((double)p->shape[in]) : 0.5;
}

/* The layer's own values, of any strides and dtype, in the order of the shape. */
static void convert(double *to, const moe__parameter *p)
{
    const int64_t *n = p->shape, *s = p->data_stride;
    int64_t size = moe__dtype_size(p->data_dtype);
    for (int64_t i = 0; i < n[0]; i++) {
        const char *part = p->data_each ? p->data_each[i] : (const char *)p->data + i * s[0] * size;
        for (int64_t j = 0; j < n[1]; j++)
            for (int64_t k = 0; k < n[2]; k++) {
                const void *at = part + moe__parameter_place(p, s, j, k) * size;
                *to++ = moe__real_at(at, 0, p->data_dtype);
            }
    }
}

/* The same where the host cannot read them: over a copy of each expert in turn, or of the whole. */
static moe_status convert_copies(double *to, const moe__parameter *p, moe_context *context,
                                 const char *function)
{
    moe__workers workers = moe__workers_of(context, function, NULL);
    int64_t lowest, size = moe__dtype_size(p->data_dtype), count = p->per_expert ? p->shape[0] : 1;
    int64_t bytes = moe__parameter_span(p, p->data_stride, p->per_expert, &lowest) * size;
    int64_t elements = moe__parameter_elements(p);
    moe_status status = MOE_OK;
    if (elements == 0) return MOE_OK;
    char *copy = moe__alloc(context, bytes);
    if (!copy) REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no %lld bytes for %s", (ll)bytes, p->name);
    for (int64_t i = 0; i < count && status == MOE_OK; i++) {
        moe__parameter here = *p;
        const char *from = p->data_each ? p->data_each[i]
                                        : (const char *)p->data + i * p->data_stride[0] * size;
        status = context->memory->fetch(&workers, copy, from + lowest * size, bytes);
        here.data = copy - lowest * size;
        here.data_each = NULL;
        here.shape[0] = p->shape[0] / count;
        if (status == MOE_OK) convert(to + i * (elements / count), &here);
    }
    moe__free(context, copy, bytes);
    return status;
}

/* Sets p to the value of `from`, of objects of a context, or draws it as number `which`. */
static moe_status set_parameter(const moe__parameter *p, const moe__parameter *from,
                                moe_context *context, int32_t weight_layout,
                                const moe_gradient_check *check, uint32_t which,
                                const char *function)
{
    if (check->parameters != MOE_CHECK_CURRENT)
        draw(p->own_data, moe__parameter_elements(p), drawn_scale(p, weight_layout), check->seed,
             which);
    else if (!from->data && !from->data_each)
        REFUSE(MOE_ERROR_INVALID_STATE, "parameter %s is not bound", from->name);
    else if (!context->memory->is_host)
        return convert_copies(p->own_data, from, context, function);
    else
        convert(p->own_data, from);
    return MOE_OK;
}

/* The parameters of a gate, or a layer's own. */
static moe_status set_list(const moe__parameter_list *list, const moe__parameter_list *from,
                           const moe_gradient_check *check, uint32_t first, const char *function)
{
    for (int64_t i = 0; i < list->count; i++)
        MOE_TRY(set_parameter(&list->p[i], &from->p[i], from->context, list->weight_layout, check,
                              first + (uint32_t)i, function));
    return MOE_OK;
}

static moe_status set_pool(moe_experts *experts, const moe_experts *from,
                           const moe_gradient_check *check, uint32_t first, const char *function)
{
    const moe__listing *l = &experts->listing;
    for (int64_t i = 0; i < l->count; i++)
        MOE_TRY(set_parameter(moe__listed_parameter(l, i), moe__listed_parameter(&from->listing, i),
                              from->context, l->entry[i].list->weight_layout, check,
                              first + (uint32_t)i, function));
    return MOE_OK;
}

/* ---- making it ------------------------------------------------------------------------------- */

/* The host's own experts, which are told to leave the gradients of their parameters alone: the
 * layer is not to be changed. */
static int32_t host_forward(void *user, const moe_expert_call *call)
{
    const moe_expert_callbacks *host = user;
    return host->forward(host->user, call);
}
static int32_t host_backward(void *user, const moe_expert_call *call)
{
    const moe_expert_callbacks *host = user;
    moe_expert_call quiet = *call;
    quiet.parameters = 0;
    return host->backward(host->user, &quiet);
}

static moe_status copy_one(moe__twin *t, const moe_experts *from, moe_experts **to)
{
    moe_experts_config c = from->config;
    moe_expert_callbacks callbacks = from->callbacks;
    c.dtype = MOE_DTYPE_F64;
    c.parameters = MOE_PARAMETERS_OWNED;
    c.storage = MOE_STORAGE_ROW_MAJOR;
    if (c.callbacks) {
        t->host[t->hosts] = from->callbacks;
        callbacks.user = &t->host[t->hosts++];
        callbacks.forward = host_forward;
        callbacks.backward = from->callbacks.backward ? host_backward : NULL;
        c.callbacks = &callbacks;
    }
    return moe__experts_make(to, t->context, &c, from->one_w13, __func__);
}

/* A pool in f64; parts are made anew and then belong to the pool. */
static moe_status copy_pool(moe__twin *t, const moe_experts *from, moe_experts **to)
{
    moe_experts *part[MOE_MAX_PARTS] = {NULL};
    moe_status status = MOE_OK;
    if (!from->made_of_parts) return copy_one(t, from, to);
    for (int64_t i = 0; i < from->parts && status == MOE_OK; i++)
        status = copy_one(t, from->part[i], &part[i]);
    if (status == MOE_OK) status = moe_experts_create_parts(to, part, from->parts);
    for (int64_t i = 0; i < from->parts; i++) moe_experts_destroy(part[i]);
    return status;
}

/* A layer whose memory is not the host's has a twin on the CPU, with the same allocator. */
static moe_status find_context(moe__twin *t, const moe_layer *layer)
{
    const moe_context *of_layer = layer->context;
    moe_context_config c;
    t->context = layer->context;
    if (of_layer->memory->is_host) return MOE_OK;
    t->context = NULL;
    MOE_TRY(moe_context_config_init(&c, sizeof c));
    c.alloc = of_layer->alloc, c.free = of_layer->free, c.alloc_user = of_layer->alloc_user;
    c.log = of_layer->log, c.log_user = of_layer->log_user, c.log_level = of_layer->log_level;
    MOE_TRY(moe_context_create(&t->own, &c));
    t->context = t->own;
    return MOE_OK;
}

static moe_status make_objects(moe__twin *t, const moe_layer *layer)
{
    moe_layer_config l = layer->config;
    MOE_TRY(copy_pool(t, layer->experts, &t->experts));
    if (layer->gate) {
        moe_gate_config g = layer->gate->config;
        g.dtype = MOE_DTYPE_F64;
        g.parameters = MOE_PARAMETERS_OWNED;
        g.secondary = MOE_SECONDARY_REPLICATED, g.local_groups = 0; /* one rank has them all */
        MOE_TRY(moe_gate_create(&t->gate, t->context, &g));
    }
    if (layer->shared) MOE_TRY(copy_pool(t, layer->shared, &t->shared));
    if (layer->residual) MOE_TRY(copy_pool(t, layer->residual, &t->residual));
    l.gate = t->gate;
    l.experts = t->experts;
    l.shared = t->shared;
    l.residual = t->residual;
    l.parameters = MOE_PARAMETERS_OWNED;
    l.comm = NULL;
    MOE_TRY(moe_layer_create(&t->layer, &l));
    MOE_TRY(moe_pass_create(&t->saved, t->layer, NULL));
    MOE_TRY(moe_pass_create(&t->moved, t->layer, NULL));
    return moe_plan_create(&t->plan, t->context);
}

/* Every array of the twin: counted with base NULL, handed out else. */
static void lay_out(moe__twin *t, const moe_layer *layer, moe__arena *arena)
{
    const moe_experts_config *e = &layer->experts->config;
    const moe_gate_config *g = layer->gate ? &layer->gate->config : NULL;
    int64_t T = t->tokens, size = (int64_t)sizeof(double), D = moe__mul(T, e->d_model);
    t->outputs = moe__mul(T, e->d_out);
    t->x = moe__arena_take(arena, D, size), t->dx = moe__arena_take(arena, D, size);
    t->dy = moe__arena_take(arena, t->outputs, size);
    t->here.y = moe__arena_take(arena, t->outputs, size);
    t->up.y = moe__arena_take(arena, t->outputs, size);
    t->down.y = moe__arena_take(arena, t->outputs, size);
    t->group_begin = moe__arena_take(arena, t->groups + 1, (int64_t)sizeof(int64_t));
    if (g && g->kind == MOE_GATE_HASH) t->key = moe__arena_take(arena, T, (int64_t)sizeof *t->key);
    if (g && g->d_model == 0) {
        int64_t n = moe__mul(T, g->num_experts);
        t->logits = moe__arena_take(arena, n, size), t->d_logits = moe__arena_take(arena, n, size);
    } else if (g && g->d_model != e->d_model) {
        int64_t n = moe__mul(T, g->d_model);
        t->gate_x = moe__arena_take(arena, n, size), t->d_gate_x = moe__arena_take(arena, n, size);
    } else if (!g) {
        int64_t n = moe__mul(T, 2);
        t->weights = moe__arena_take(arena, n, size),
        t->d_weights = moe__arena_take(arena, n, size);
        t->ids = moe__arena_take(arena, n, (int64_t)sizeof *t->ids);
    }
}

static moe_status allocate(moe__twin *t, const moe_layer *layer, const char *function)
{
    moe__arena arena = {NULL, 0};
    lay_out(t, layer, &arena);
    if (arena.used < 0)
        REFUSE(MOE_ERROR_OVERFLOW, "inputs and outputs of %lld tokens do not fit in 63 bits",
               (ll)t->tokens);
    t->bytes = arena.used;
    t->memory = moe__alloc_zeroed(t->context, t->bytes);
    if (!t->memory) REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no %lld bytes for inputs", (ll)t->bytes);
    arena = (moe__arena){t->memory, 0};
    lay_out(t, layer, &arena);
    return MOE_OK;
}

/* Two entries a token where no gate chooses: experts in turn, so that all are met. */
static void draw_inputs(moe__twin *t, const moe_layer *layer, uint64_t seed)
{
    const moe_gate_config *g = layer->gate ? &layer->gate->config : NULL;
    int64_t E = layer->experts->config.num_experts, T = t->tokens;
    draw(t->x, T * layer->experts->config.d_model, 1, seed, 0);
    draw(t->dy, t->outputs, 1, seed, 1);
    if (t->gate_x) draw(t->gate_x, T * g->d_model, 1, seed, 2);
    if (t->logits) draw(t->logits, T * E, 1, seed, 3);
    if (t->weights) draw(t->weights, T * 2, 1, seed, 4);
    for (int64_t i = 0; t->key && i < T; i++) t->key[i] = i;
    for (int64_t n = 0; t->ids && n < 2 * T; n++) t->ids[n] = (int32_t)((n + n / E) % E);
    for (int64_t i = 0; i <= t->groups; i++)
        t->group_begin[i] = i == t->groups ? T : T / t->groups * i + moe__min(i, T % t->groups);
}

/* ---- L --------------------------------------------------------------------------------------- */

static moe_status build_plan(moe__twin *t)
{
    moe_plan_args a;
    MOE_TRY(moe_plan_args_init(&a, sizeof a));
    a.tokens = t->tokens;
    a.num_experts = t->experts->config.num_experts;
    a.top_k = 2;
    a.expert_ids = t->ids;
    a.weights = t->weights;
    a.dtype = MOE_DTYPE_F64;
    a.groups = t->groups;
    a.group_begin = t->group_begin;
    return moe_plan_build(t->plan, &a);
}

static moe_status run_forward(moe__twin *t, moe_pass *pass, const moe_plan *plan, uint64_t flags,
                              moe__twin_value *value)
{
    moe_forward_args f;
    MOE_TRY(moe_forward_args_init(&f, sizeof f));
    f.flags = flags | (t->train ? (uint64_t)MOE_FORWARD_TRAIN : 0);
    f.tokens = t->tokens;
    f.x = t->x;
    f.y = value->y;
    f.gate_x = t->gate_x;
    f.logits_in = t->logits;
    f.groups = t->groups;
    f.group_begin = t->group_begin;
    f.token_key = plan ? NULL : t->key;
    f.plan = plan;
    f.plan_use = t->gate && plan ? MOE_PLAN_IDS : MOE_PLAN_IDS_AND_WEIGHTS;
    f.losses_out = value->losses;
    return moe_layer_forward(t->layer, pass, &f);
}

/* The first forward, whose routing is kept, and the only backward. */
static moe_status find_gradients(moe__twin *t)
{
    moe_backward_args b;
    const moe_plan *routed;
    double sum = 0;
    if (!t->gate) MOE_TRY(build_plan(t));
    MOE_TRY(run_forward(t, t->saved, t->gate ? NULL : t->plan, 0, &t->here));
    if (t->gate) {
        MOE_TRY(moe_pass_plan(t->saved, &routed));
        MOE_TRY(moe_plan_copy(t->plan, routed));
    }
    MOE_TRY(moe_backward_args_init(&b, sizeof b));
    b.dx = t->dx;
    b.dy = t->dy;
    b.d_gate_x = t->d_gate_x;
    b.d_logits_out = t->d_logits;
    b.entry_weight_grad = t->d_weights;
    MOE_TRY(moe_layer_backward(t->layer, t->saved, &b));
    for (int64_t i = 0; i < t->outputs; i++) {
        double term = t->here.y[i] * t->dy[i];
        sum += term * term;
    }
    for (int i = 0; i < MOE_LOSS_SLOTS; i++) sum += t->here.losses[i] * t->here.losses[i];
    t->rounding = 16 * DBL_EPSILON * moe__sqrt_f64(sum);
    return MOE_OK;
}

/* L(to) - L(from), element by element, so that only differences are summed. */
static double difference(const moe__twin *t, const moe__twin_value *to, const moe__twin_value *from)
{
    double sum = 0;
    for (int64_t i = 0; i < t->outputs; i++) sum += (to->y[i] - from->y[i]) * t->dy[i];
    for (int i = 0; i < MOE_LOSS_SLOTS; i++) sum += to->losses[i] - from->losses[i];
    return sum;
}

/* A moved weight of the plan is one only in a plan built anew; it is built once more when the
 * weight is back. */
static moe_status value_at(moe__twin *t, const moe__twin_tensor *tensor, double *at, double moved,
                           moe__twin_value *value)
{
    bool planned = tensor->value == t->weights;
    double kept = *at;
    *at = moved;
    moe_status status = planned ? build_plan(t) : MOE_OK;
    if (status == MOE_OK) status = run_forward(t, t->moved, t->plan, MOE_FORWARD_NO_SAVE, value);
    *at = kept;
    if (status == MOE_OK && planned) status = build_plan(t);
    return status;
}

moe_status moe__twin_differences(moe__twin *t, const moe__twin_tensor *tensor, int64_t index,
                                 double step, double side[2])
{
    double *at = tensor->value + index, here = *at, up = here + step, down = here - step;
    MOE_TRY(value_at(t, tensor, at, up, &t->up));
    MOE_TRY(value_at(t, tensor, at, down, &t->down));
    side[0] = difference(t, &t->up, &t->here) / (up - here);
    side[1] = difference(t, &t->here, &t->down) / (here - down);
    return MOE_OK;
}

/* ---- the whole ------------------------------------------------------------------------------- */

static void add_tensor(moe__twin *t, const char *name, double *value, double *grad, int64_t count)
{
    if (value) t->tensor[t->tensors++] = (moe__twin_tensor){name, value, grad, count};
}

/* What is compared, under the names the layer has for them. */
static void list_tensors(moe__twin *t, const moe_layer *layer)
{
    int64_t E = t->experts->config.num_experts, width = t->gate ? t->gate->config.d_model : 0;
    int64_t T = t->tokens;
    add_tensor(t, "x", t->x, t->dx, T * t->experts->config.d_model);
    add_tensor(t, "gate_x", t->gate_x, t->d_gate_x, T * width);
    add_tensor(t, "logits", t->logits, t->d_logits, T * E);
    add_tensor(t, "weights", t->weights, t->d_weights, 2 * T);
    for (int64_t i = 0; i < t->layer->listing.count; i++) {
        const moe__parameter *p = moe__listed_parameter(&t->layer->listing, i);
        if (p->kind != MOE_KIND_BUFFER)
            add_tensor(t, layer->listing.entry[i].name, p->own_data, p->own_grad,
                       moe__parameter_elements(p));
    }
}

moe_status moe__twin_create(moe__twin *t, const moe_layer *layer, const moe_gradient_check *check,
                            const char *function)
{
    *t = (moe__twin){.tokens = check->tokens, .groups = check->groups, .train = check->train};
    MOE_TRY(find_context(t, layer));
    MOE_TRY(make_objects(t, layer));
    MOE_TRY(allocate(t, layer, function));
    draw_inputs(t, layer, check->seed);
    if (t->gate)
        MOE_TRY(set_list(&t->gate->parameters, &layer->gate->parameters, check, 16, function));
    MOE_TRY(set_list(&t->layer->parameters, &layer->parameters, check, 24, function));
    MOE_TRY(set_pool(t->experts, layer->experts, check, 32, function));
    if (t->shared) MOE_TRY(set_pool(t->shared, layer->shared, check, 96, function));
    if (t->residual) MOE_TRY(set_pool(t->residual, layer->residual, check, 160, function));
    MOE_TRY(find_gradients(t));
    list_tensors(t, layer);
    return MOE_OK;
}

void moe__twin_free(moe__twin *t)
{
    moe_plan_destroy(t->plan);
    moe_pass_destroy(t->moved);
    moe_pass_destroy(t->saved);
    moe_layer_destroy(t->layer);
    moe_experts_destroy(t->experts);
    moe_experts_destroy(t->shared);
    moe_experts_destroy(t->residual);
    moe_gate_destroy(t->gate);
    if (t->memory) moe__free(t->context, t->memory, t->bytes);
    moe_context_destroy(t->own);
}
