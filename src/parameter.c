/* parameter.c - the parameters of gate, pool and layer: what there is, where it lives, binding,
 * zeroing.
 *
 * A parameter is [E,rows,cols] or [E,cols] in a pool, [rows,cols] or [cols] in a gate. Data and
 * gradient each live at a base with strides, or (pools only) at one pointer per expert. Of an
 * object whose elements have 16 bits, own gradients are f32, and so are a gate's own selection_bias
 * and thresholds, which take small steps. */
#include "pass_state.h"

#include <string.h>

/* ---- structs --------------------------------------------------------------------------------- */

static void binding_defaults(void *instance) { *(moe_binding *)instance = (moe_binding){0}; }
static void record_defaults(void *instance)
{
    *(moe_parameter_record *)instance = (moe_parameter_record){0};
}

const moe__struct_info moe__binding_info = MOE__STRUCT_INFO(moe_binding, binding_defaults);
const moe__struct_info moe__parameter_record_info = MOE__STRUCT_INFO(moe_parameter_record,
                                                                     record_defaults);

moe_status moe_binding_init(moe_binding *binding, size_t size)
{
    return moe__struct_init(&moe__binding_info, binding, size, __func__);
}
moe_status moe_parameter_record_init(moe_parameter_record *record, size_t size)
{
    return moe__struct_init(&moe__parameter_record_info, record, size, __func__);
}

/* ---- the list -------------------------------------------------------------------------------- */

static void contiguous(int64_t stride[MOE_MAX_DIMS], const int64_t *shape, int32_t dims)
{
    int64_t step = 1;
    for (int32_t d = MOE_MAX_DIMS - 1; d >= 0; d--) {
        stride[d] = d < dims ? step : 0;
        if (d < dims) step = moe__mul(step, shape[d]);
    }
}

int64_t moe__parameter_elements(const moe__parameter *p)
{
    int64_t count = 1;
    for (int32_t d = 0; d < p->dims; d++) count = moe__mul(count, p->shape[d]);
    return count;
}

int64_t moe__parameter_span(const moe__parameter *p, const int64_t *stride, int first,
                            int64_t *lowest)
{
    int64_t span = 1;
    *lowest = 0;
    for (int d = first; d < 3; d++) {
        int64_t reach = (p->shape[d] - 1) * stride[d];
        if (reach < 0) *lowest += reach;
        span += reach < 0 ? -reach : reach;
    }
    return span;
}

moe__parameter *moe__parameter_add(moe__parameter_list *list, const char *name, int32_t per_expert,
                                   int32_t dims, const int64_t *shape, int32_t dtype,
                                   int32_t init_tensor, double init_std)
{
    moe__parameter *p = &list->p[list->count++];
    *p = (moe__parameter){.name = name,
                          .dims = dims,
                          .per_expert = per_expert,
                          .dtype = dtype,
                          .data_dtype = dtype,
                          .grad_dtype = moe__real_dtype(dtype),
                          .object_dtype = dtype,
                          .init_tensor = init_tensor,
                          .init_std = init_std,
                          .kind = MOE_KIND_WEIGHT,
                          .sharding = per_expert ? MOE_SHARD_EXPERT : MOE_SHARD_REPLICATED};
    for (int32_t d = 0; d < MOE_MAX_DIMS; d++) p->shape[d] = d < dims ? shape[d] : 1;
    contiguous(p->data_stride, p->shape, dims);
    memcpy(p->grad_stride, p->data_stride, sizeof p->grad_stride);
    return p;
}

moe__matrices moe__parameter_operand(const moe__parameter *p, bool gradient)
{
    const int64_t *stride = gradient ? p->grad_stride : p->data_stride;
    int32_t first = p->per_expert; /* dimensions before the matrix or vector */
    bool matrix = p->dims - first == 2;
    return (moe__matrices){.dtype = gradient ? p->grad_dtype : p->data_dtype,
                           .base = gradient ? p->grad : p->data,
                           .each = gradient ? p->grad_each : p->data_each,
                           .stride_expert = first ? stride[0] : 0,
                           .stride_row = matrix ? stride[first] : 0,
                           .stride_col = stride[p->dims - 1],
                           .wide = moe__parameter_is_wide(p, gradient)};
}

/* Strides of memory of the object's own. */
static void use_own_strides(moe__parameter *p)
{
    contiguous(p->data_stride, p->shape, p->dims);
    if (p->panel) {
        memset(p->data_stride, 0, sizeof p->data_stride);
        p->data_stride[0] = p->shape[0] > 0 ? moe__parameter_stored(p) / p->shape[0] : 0;
    }
    memcpy(p->grad_stride, p->data_stride, sizeof p->grad_stride);
}

/* Numbers of tensors in the counter of init_parameters, frozen; see parameter_init.c. */
enum {
    GATE_WEIGHT = 1,
    GATE_BIAS,
    GATE_NOISE,
    PRIMARY_WEIGHT,
    PRIMARY_NOISE,
    RESIDUAL_MIX,
    NOT_DRAWN,
    W1 = 16,
    B1,
    W3,
    B3,
    W2,
    B2
};

/* [D,A], and [A,D,B] with a matrix for each group. */
static void describe_two_levels(const moe_gate_config *c, moe__parameter_list *list, double std)
{
    const int64_t first[2] = {c->d_model, c->expert_groups};
    bool with_group = c->secondary == MOE_SECONDARY_WITH_GROUP;
    int64_t here = with_group ? c->local_groups : c->expert_groups;
    const int64_t second[3] = {here, c->d_model, c->num_experts / c->expert_groups};
    list->num_experts = here;
    moe__parameter_add(list, "primary_weight", 0, 2, first, c->dtype, PRIMARY_WEIGHT, std);
    moe__parameter_add(list, "primary_noise_weight", 0, 2, first, c->dtype, PRIMARY_NOISE, std);
    moe__parameter_add(list, "weight", 1, 3, second, c->dtype, GATE_WEIGHT, std);
    moe__parameter_add(list, "noise_weight", 1, 3, second, c->dtype, GATE_NOISE, std);
    for (int64_t i = 0; i < list->count; i++)
        if (!with_group) list->p[i].sharding = MOE_SHARD_REPLICATED;
}

/* A gate's data may be f32 whatever its elements; buffer and thresholds of its own always are. */
static void use_f32(moe__parameter_list *list)
{
    for (int64_t i = 0; i < list->count; i++) {
        moe__parameter *p = &list->p[i];
        p->may_be_f32 = 1;
        if (p->kind != MOE_KIND_WEIGHT) p->dtype = p->data_dtype = moe__real_dtype(p->dtype);
    }
}

void moe__gate_parameters_describe(moe_gate *gate)
{
    const moe_gate_config *c = &gate->config;
    moe__parameter_list *list = &gate->parameters;
    const int64_t matrix[2] = {c->d_model, c->num_experts}, *E = &matrix[1];
    bool noisy = c->kind == MOE_GATE_NOISY_TOP_K, two = c->kind == MOE_GATE_HIERARCHICAL;
    double std = c->init_std != MOE_INIT_DEFAULT ? c->init_std : noisy || two ? 0 : 0.02;
    list->context = gate->context;
    list->num_experts = c->num_experts;
    if (two) {
        describe_two_levels(c, list, std);
        use_f32(list);
        return;
    }
    if (c->d_model > 0) {
        moe__parameter_add(list, "weight", 0, 2, matrix, c->dtype, GATE_WEIGHT, std);
        if (c->bias) moe__parameter_add(list, "bias", 0, 1, E, c->dtype, GATE_BIAS, 0);
        if (noisy)
            moe__parameter_add(list, "noise_weight", 0, 2, matrix, c->dtype, GATE_NOISE, std);
    }
    if (c->selection_bias)
        moe__parameter_add(list, "selection_bias", 0, 1, E, c->dtype, NOT_DRAWN, 0)->kind =
            MOE_KIND_BUFFER;
    if (c->kind == MOE_GATE_BALANCED)
        moe__parameter_add(list, "threshold", 0, 1, E, c->dtype, NOT_DRAWN, 0)->kind =
            MOE_KIND_THRESHOLD;
    use_f32(list);
}

void moe__layer_parameters_describe(moe_layer *layer)
{
    const moe_layer_config *c = &layer->config;
    const moe_experts_config *e = &layer->experts->config;
    moe__parameter_list *list = &layer->parameters;
    const int64_t mix[2] = {e->d_model, 2};
    list->context = layer->context;
    list->num_experts = e->num_experts;
    if (c->shared && c->shared_gate)
        moe__parameter_add(list, "shared_gate", 0, 1, mix, e->dtype, NOT_DRAWN, 0);
    if (c->residual && c->residual_mix) {
        moe__parameter_add(list, "residual_mix", 0, 2, mix, e->dtype, RESIDUAL_MIX, 0.02);
        moe__parameter_add(list, "residual_mix_bias", 0, 1, &mix[1], e->dtype, NOT_DRAWN, 0);
    }
}

/* The same bits whatever the caller's rounding. */
static double inverse_root(int64_t n)
{
    fenv_t saved;
    moe__fenv_enter(&saved);
    double root = 1 / __builtin_sqrt((double)n);
    moe__fenv_leave(&saved);
    return root;
}

/* fused: MOE_GLU_* of a parameter that is W1 and W3, else 0. */
static void add_expert_weight(moe_experts *experts, const char *name, int64_t in, int64_t out,
                              int32_t tensor, int64_t fan_in, int32_t fused)
{
    const moe_experts_config *c = &experts->config;
    bool out_in = c->weight_layout == MOE_WEIGHT_OUT_IN;
    const int64_t shape[3] = {c->num_experts, out_in ? out : in, out_in ? in : out};
    double std = c->init_std != MOE_INIT_DEFAULT ? c->init_std : inverse_root(fan_in);
    moe__parameter *p = moe__parameter_add(&experts->parameters, name, 1, 3, shape, c->dtype,
                                           tensor, std);
    p->out_in = out_in;
    p->fused = fused;
    if (c->storage != MOE_STORAGE_PANELS) return;
    p->panel = fused ? MOE__PANEL / 2 : MOE__PANEL;
    use_own_strides(p);
}

static void add_expert_bias(moe_experts *experts, const char *name, int64_t width, int32_t tensor,
                            int32_t fused)
{
    const moe_experts_config *c = &experts->config;
    const int64_t shape[2] = {c->num_experts, width};
    if (c->bias)
        moe__parameter_add(&experts->parameters, name, 1, 2, shape, c->dtype, tensor, 0)->fused =
            fused;
}

void moe__experts_parameters_describe(moe_experts *experts)
{
    const moe_experts_config *c = &experts->config;
    moe__parameter_list *list = &experts->parameters;
    int64_t D = c->d_model, F = c->d_hidden, O = c->d_out;
    int32_t order = c->glu_order;
    bool gated = moe__is_gated(c->activation), one_b13 = gated && order != MOE_GLU_SEPARATE;
    bool one_w13 = one_b13 || (gated && experts->one_w13);
    list->context = experts->context;
    list->num_experts = c->num_experts;
    list->weight_layout = c->weight_layout;
    if (c->kind != MOE_EXPERTS_FEED_FORWARD) return;
    if (one_w13)
        add_expert_weight(experts, "w13", D, moe__mul(2, F), W1, D,
                          order == MOE_GLU_SEPARATE ? MOE_GLU_GATE_UP : order);
    else
        add_expert_weight(experts, "w1", D, F, W1, D, 0);
    if (one_b13)
        add_expert_bias(experts, "b13", moe__mul(2, F), B1, order);
    else
        add_expert_bias(experts, "b1", F, B1, 0);
    if (gated && !one_w13) add_expert_weight(experts, "w3", D, F, W3, D, 0);
    if (gated && !one_b13) add_expert_bias(experts, "b3", F, B3, 0);
    add_expert_weight(experts, "w2", F, O, W2, F, 0);
    add_expert_bias(experts, "b2", O, B2, 0);
}

moe_status moe__layer_list_parameters(moe_layer *layer, const char *function)
{
    moe__listing *l = &layer->listing;
    int64_t room = layer->experts->listing.count + layer->parameters.count;
    if (layer->gate) room += layer->gate->parameters.count;
    if (layer->shared) room += layer->shared->listing.count;
    if (layer->residual) room += layer->residual->listing.count;
    MOE_TRY(moe__listing_create(l, layer->context, room, function));
    if (layer->gate) moe__listing_add(l, "gate.", &layer->gate->parameters);
    moe__listing_add_all(l, "experts.", &layer->experts->listing);
    if (layer->shared) moe__listing_add_all(l, "shared.", &layer->shared->listing);
    if (layer->residual) moe__listing_add_all(l, "residual.", &layer->residual->listing);
    moe__listing_add(l, "", &layer->parameters);
    return MOE_OK;
}

/* ---- memory ---------------------------------------------------------------------------------- */

/* Two pointers for each expert; of none, one. */
static int64_t lists_bytes(const moe__parameter_list *list)
{
    return moe__max(2 * list->num_experts, 1) * (int64_t)sizeof(void *);
}

void moe__parameters_free(moe__parameter_list *list)
{
    const moe__memory *memory = list->context ? list->context->memory : NULL;
    for (int64_t i = 0; i < list->count; i++) {
        moe__parameter *p = &list->p[i];
        memory->free(list->context, p->own_data, p->own_bytes);
        memory->free(list->context, p->own_grad, p->own_grad_bytes);
        moe__free(list->context, p->lists, lists_bytes(list));
    }
    list->count = 0;
}

static void use_own(moe__parameter *p)
{
    p->data = p->own_data;
    p->grad = p->own_grad;
    p->data_each = p->grad_each = NULL;
    p->data_dtype = p->dtype;
    p->grad_dtype = moe__real_dtype(p->dtype);
    p->owned = p->own_data != NULL;
    use_own_strides(p);
}

moe_status moe__parameters_allocate(moe__parameter_list *list, int32_t parameters,
                                    const char *function)
{
    const moe__memory *memory = list->context->memory;
    moe_status status = MOE_OK;
    for (int64_t i = 0; i < list->count && status == MOE_OK; i++) {
        moe__parameter *p = &list->p[i];
        int64_t count = moe__parameter_elements(p) < 0 ? -1 : moe__parameter_stored(p);
        p->own_bytes = moe__mul(count, moe__dtype_size(p->dtype));
        p->own_grad_bytes = moe__mul(count, moe__dtype_size(moe__real_dtype(p->dtype)));
        if (p->own_bytes < 0 || p->own_grad_bytes < 0) {
            status = moe__fail(MOE_ERROR_OVERFLOW, function, "%s does not fit in 63 bits", p->name);
            break;
        }
        if (parameters == MOE_PARAMETERS_BOUND) continue;
        p->own_bytes = moe__max(p->own_bytes, 1); /* a pool without experts has an address too */
        p->own_grad_bytes = moe__max(p->own_grad_bytes, 1);
        bool grad = parameters == MOE_PARAMETERS_OWNED && p->kind != MOE_KIND_BUFFER;
        p->own_data = memory->alloc(list->context, p->own_bytes, true);
        if (p->own_data && grad)
            p->own_grad = memory->alloc(list->context, p->own_grad_bytes, true);
        if (!p->own_data || (grad && !p->own_grad))
            status = moe__fail(MOE_ERROR_OUT_OF_MEMORY, function, "no %lld bytes for %s",
                               (ll)p->own_bytes, p->name);
        else
            use_own(p);
    }
    if (status != MOE_OK) moe__parameters_free(list);
    return status;
}

moe_status moe__parameters_check_bound(const moe__parameter_list *list, const char *function)
{
    for (int64_t i = 0; i < list->count; i++)
        if (!list->p[i].data && !list->p[i].data_each)
            REFUSE(MOE_ERROR_INVALID_STATE, "parameter %s is not bound", list->p[i].name);
    return MOE_OK;
}

const moe__parameter *moe__parameter_by_name(const moe__parameter_list *list, const char *name)
{
    for (int64_t i = 0; i < list->count; i++)
        if (strcmp(list->p[i].name, name) == 0) return &list->p[i];
    return NULL;
}

/* ---- count, find, record --------------------------------------------------------------------- */

int64_t moe_gate_parameter_count(const moe_gate *gate) { return gate ? gate->parameters.count : 0; }

int64_t moe_experts_parameter_count(const moe_experts *experts)
{
    return experts ? experts->listing.count : 0;
}

int64_t moe_layer_parameter_count(const moe_layer *layer)
{
    return layer ? layer->listing.count : 0;
}

static int64_t find(const moe__parameter_list *list, const char *name)
{
    const moe__parameter *p = moe__parameter_by_name(list, name);
    return p ? p - list->p : -1;
}

int64_t moe_gate_parameter_find(const moe_gate *gate, const char *name)
{
    return gate && name ? find(&gate->parameters, name) : -1;
}

int64_t moe_experts_parameter_find(const moe_experts *experts, const char *name)
{
    return experts && name ? moe__listing_find(&experts->listing, name) : -1;
}

int64_t moe_layer_parameter_find(const moe_layer *layer, const char *name)
{
    return layer && name ? moe__listing_find(&layer->listing, name) : -1;
}

static moe_status check_index(int64_t index, int64_t count, const char *function)
{
    if (index < 0 || index >= count)
        REFUSE_ARGUMENT("index is %lld, there are %lld parameters", (ll)index, (ll)count);
    return MOE_OK;
}

/* `first` of `experts` on all ranks is where the local part begins; experts 0: no other rank has
 * any. */
static moe_status write_record(const moe__parameter *p, const char *name, int64_t first,
                               int64_t experts, moe_parameter_record *record, const char *function)
{
    moe_parameter_record known = {.name = name,
                                  .data = p->data,
                                  .grad = p->grad,
                                  .data_per_expert = p->data_each,
                                  .grad_per_expert = p->grad_each,
                                  .element_count = moe__parameter_stored(p),
                                  .dims = p->dims,
                                  .kind = p->kind,
                                  .data_dtype = p->data_dtype,
                                  .grad_dtype = p->grad_dtype,
                                  .sharding = p->sharding,
                                  .trainable = p->kind != MOE_KIND_BUFFER,
                                  .opaque = p->panel != 0,
                                  .owned = p->owned};
    MOE_TRY(moe__struct_check_out(&moe__parameter_record_info, record, function));
    memcpy(known.shape, p->shape, sizeof known.shape);
    memcpy(known.global_shape, p->shape, sizeof known.global_shape);
    if (!p->panel) {
        memcpy(known.data_stride, p->data_stride, sizeof known.data_stride);
        memcpy(known.grad_stride, p->grad_stride, sizeof known.grad_stride);
    }
    if (experts > 0) known.global_shape[0] = experts, known.global_offset[0] = first;
    moe__struct_write(&moe__parameter_record_info, record, &known);
    return MOE_OK;
}

moe_status moe_gate_parameter(const moe_gate *gate, int64_t index, moe_parameter_record *record)
{
    if (!gate) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "gate is NULL");
    MOE_TRY(check_index(index, gate->parameters.count, __func__));
    return write_record(&gate->parameters.p[index], gate->parameters.p[index].name, 0, 0, record,
                        __func__);
}

moe_status moe_experts_parameter(const moe_experts *experts, int64_t index,
                                 moe_parameter_record *record)
{
    if (!experts) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "experts is NULL");
    MOE_TRY(check_index(index, experts->listing.count, __func__));
    return write_record(moe__listed_parameter(&experts->listing, index),
                        experts->listing.entry[index].name, 0, 0, record, __func__);
}

/* Where this rank's experts begin among all, or -1 if they are not a range. */
static int64_t first_number(const moe_layer *layer)
{
    int64_t count = layer->experts->config.num_experts;
    int64_t first = count > 0 ? moe__expert_number(layer, 0) : 0;
    for (int64_t i = 1; i < count; i++)
        if (moe__expert_number(layer, i) != first + i) return -1;
    return first;
}

moe_status moe_layer_parameter(const moe_layer *layer, int64_t index, moe_parameter_record *record)
{
    if (!layer) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "layer is NULL");
    MOE_TRY(check_index(index, layer->listing.count, __func__));
    const moe__listed *entry = &layer->listing.entry[index];
    bool spread = moe__is_spread(layer, entry);
    if (spread && moe__is_of_gate(layer, entry))
        return write_record(moe__listed_parameter(&layer->listing, index), entry->name,
                            layer->where->first_group[layer->comm->rank],
                            layer->gate->config.expert_groups, record, __func__);
    return write_record(moe__listed_parameter(&layer->listing, index), entry->name,
                        spread ? first_number(layer) : 0, spread ? layer->where->numbers : 0,
                        record, __func__);
}

/* ---- bind ------------------------------------------------------------------------------------ */

static bool all_zero(const int64_t stride[MOE_MAX_DIMS])
{
    for (int d = 0; d < MOE_MAX_DIMS; d++)
        if (stride[d] != 0) return false;
    return true;
}

/* Resolves the strides of a binding and refuses those that make elements share a place: taken by
 * size, each must step over all that the smaller ones span. `first` is 1 with a pointer per
 * expert. */
static moe_status resolve_strides(int64_t out[MOE_MAX_DIMS], const int64_t asked[MOE_MAX_DIMS],
                                  const moe__parameter *p, int32_t dtype, int32_t first,
                                  const char *which, const char *function)
{
    bool used[MOE_MAX_DIMS] = {false};
    int64_t span = 1; /* elements from the first to the last place so far */
    contiguous(out, p->shape, p->dims);
    if (all_zero(asked)) return MOE_OK;
    for (int32_t d = first; d < p->dims; d++) out[d] = asked[d];
    for (int32_t taken = first; taken < p->dims; taken++) {
        int32_t least = -1;
        for (int32_t d = first; d < p->dims; d++) {
            if (out[d] == INT64_MIN)
                REFUSE(MOE_ERROR_OVERFLOW, "%s_stride[%d] of %s", which, (int)d, p->name);
            int64_t size = out[d] < 0 ? -out[d] : out[d];
            int64_t best = least < 0 ? 0 : out[least] < 0 ? -out[least] : out[least];
            if (!used[d] && (least < 0 || size < best)) least = d;
        }
        used[least] = true;
        int64_t size = out[least] < 0 ? -out[least] : out[least];
        if (p->shape[least] <= 1) continue;
        if (size < span)
            REFUSE_ARGUMENT("%s_stride[%d] of %s is %lld: elements would share a place", which,
                            (int)least, p->name, (ll)out[least]);
        span = moe__add(span, moe__mul(size, p->shape[least] - 1));
        if (moe__mul(span, moe__dtype_size(dtype)) < 0)
            REFUSE(MOE_ERROR_OVERFLOW, "%s_stride[%d] of %s is %lld", which, (int)least, p->name,
                   (ll)out[least]);
    }
    return MOE_OK;
}

static moe_status check_pointers(const moe__parameter *p, const moe_binding *b, int64_t experts,
                                 const char *function)
{
    if ((b->data_per_expert || b->grad_per_expert) && !p->per_expert)
        REFUSE_ARGUMENT("%s has no experts: a pointer per expert clashes with it", p->name);
    if ((b->grad || b->grad_per_expert) && p->kind == MOE_KIND_BUFFER)
        REFUSE_ARGUMENT("%s is a buffer: it has no gradient", p->name);
    if (b->data && b->data_per_expert)
        REFUSE_ARGUMENT("%s: data and data_per_expert are both given", p->name);
    if (b->grad && b->grad_per_expert)
        REFUSE_ARGUMENT("%s: grad and grad_per_expert are both given", p->name);
    if (!b->data && !b->data_per_expert) REFUSE_ARGUMENT("%s: data is NULL", p->name);
    if (b->grad && b->grad == b->data) REFUSE_ARGUMENT("%s: grad and data are the same", p->name);
    for (int64_t e = 0; b->data_per_expert && e < experts; e++) {
        if (!b->data_per_expert[e])
            REFUSE_ARGUMENT("%s: data of expert %lld is NULL", p->name, (ll)e);
        if (b->grad_per_expert && b->grad_per_expert[e] == b->data_per_expert[e])
            REFUSE_ARGUMENT("%s: grad and data of expert %lld are the same", p->name, (ll)e);
    }
    return MOE_OK;
}

/* Of a backend that cannot use any memory. */
static moe_status check_memory(const moe__parameter_list *list, const moe__parameter *p,
                               const moe_binding *b, const char *function)
{
    moe_status (*check)(const moe__workers *, const char *,
                        const void *) = list->context->memory->check_pointer;
    moe__workers workers = moe__workers_of(list->context, function, NULL);
    if (!check || moe__parameter_elements(p) == 0) return MOE_OK;
    MOE_TRY(check(&workers, p->name, b->data));
    MOE_TRY(check(&workers, p->name, b->grad));
    for (int64_t e = 0; b->data_per_expert && e < list->num_experts; e++)
        MOE_TRY(check(&workers, p->name, b->data_per_expert[e]));
    for (int64_t e = 0; b->grad_per_expert && e < list->num_experts; e++)
        MOE_TRY(check(&workers, p->name, b->grad_per_expert[e]));
    return MOE_OK;
}

static moe_status check_dtypes(const moe__parameter *p, const moe_binding *b, const char *function)
{
    if (moe__dtype_size(b->data_dtype) == 0 || b->data_dtype >= MOE_DTYPE_I32)
        REFUSE_ARGUMENT("%s: data_dtype is %d", p->name, (int)b->data_dtype);
    if (moe__dtype_size(b->grad_dtype) == 0 || b->grad_dtype >= MOE_DTYPE_I32)
        REFUSE_ARGUMENT("%s: grad_dtype is %d", p->name, (int)b->grad_dtype);
    if (b->data_dtype != p->object_dtype &&
        !(p->may_be_f32 && b->data_dtype == moe__real_dtype(p->object_dtype)))
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "%s: data_dtype is %d, the object's is %d", p->name,
               (int)b->data_dtype, (int)p->object_dtype);
    if ((b->grad || b->grad_per_expert) && b->grad_dtype != p->object_dtype &&
        b->grad_dtype != moe__real_dtype(p->object_dtype))
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "%s: grad_dtype is %d, the object's is %d", p->name,
               (int)b->grad_dtype, (int)p->object_dtype);
    return MOE_OK;
}

/* The parameter's lists of pointers, made at their first use and kept. */
static moe_status make_lists(moe__parameter_list *list, moe__parameter *p, const char *function)
{
    if (p->lists) return MOE_OK;
    p->lists = moe__alloc(list->context, lists_bytes(list));
    if (!p->lists)
        REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no memory for %lld pointers of %s",
               (ll)(2 * list->num_experts), p->name);
    return MOE_OK;
}

/* Whether the data would lie elsewhere than now. */
static bool moves_data(const moe__parameter *p, const moe_binding *b, const int64_t *stride,
                       int64_t experts)
{
    if (p->data != b->data || p->data_dtype != b->data_dtype ||
        !p->data_each != !b->data_per_expert ||
        memcmp(p->data_stride, stride, sizeof p->data_stride) != 0)
        return true;
    for (int64_t e = 0; b->data_per_expert && e < experts; e++)
        if (p->data_each[e] != b->data_per_expert[e]) return true;
    return false;
}

static moe_status bind(moe__parameter_list *list, int64_t index, const moe_binding *binding,
                       const char *function)
{
    moe_binding b;
    int64_t data_stride[MOE_MAX_DIMS], grad_stride[MOE_MAX_DIMS], E = list->num_experts;
    MOE_TRY(check_index(index, list->count, function));
    moe__parameter *p = &list->p[index];
    if (!binding) {
        if (!p->own_data) REFUSE(MOE_ERROR_INVALID_STATE, "%s has no memory of its own", p->name);
        if (!p->owned) (void)atomic_fetch_add(&list->changes, 1);
        use_own(p);
        return MOE_OK;
    }
    if (p->panel)
        REFUSE(MOE_ERROR_NOT_SUPPORTED,
               "%s is kept in MOE_STORAGE_PANELS: it cannot be bound to memory of the host",
               p->name);
    MOE_TRY(moe__struct_read(&moe__binding_info, &b, binding, false, function));
    MOE_TRY(check_pointers(p, &b, E, function));
    MOE_TRY(check_dtypes(p, &b, function));
    MOE_TRY(check_memory(list, p, &b, function));
    MOE_TRY(resolve_strides(data_stride, b.data_stride, p, b.data_dtype, b.data_per_expert != NULL,
                            "data", function));
    MOE_TRY(resolve_strides(grad_stride, b.grad_stride, p, b.grad_dtype, b.grad_per_expert != NULL,
                            "grad", function));
    if (b.data_per_expert || b.grad_per_expert) MOE_TRY(make_lists(list, p, function));
    if (p->dims == 3 && moves_data(p, &b, data_stride, E))
        (void)atomic_fetch_add(&list->changes, 1);
    for (int64_t e = 0; b.data_per_expert && e < E; e++)
        p->lists[e] = (void *)(uintptr_t)b.data_per_expert[e]; /* read only */
    for (int64_t e = 0; b.grad_per_expert && e < E; e++) p->lists[E + e] = b.grad_per_expert[e];
    p->data = (void *)(uintptr_t)b.data; /* read only */
    p->grad = b.grad;
    p->data_dtype = b.data_dtype;
    p->grad_dtype = b.grad_dtype;
    p->data_each = b.data_per_expert ? p->lists : NULL;
    p->grad_each = b.grad_per_expert ? p->lists + E : NULL;
    memcpy(p->data_stride, data_stride, sizeof data_stride);
    memcpy(p->grad_stride, grad_stride, sizeof grad_stride);
    p->owned = 0;
    return MOE_OK;
}

static moe_status bind_listed(const moe__listing *listing, int64_t index,
                              const moe_binding *binding, const char *function)
{
    MOE_TRY(check_index(index, listing->count, function));
    return bind(listing->entry[index].list, listing->entry[index].index, binding, function);
}

moe_status moe_gate_bind(moe_gate *gate, int64_t index, const moe_binding *binding)
{
    if (!gate) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "gate is NULL");
    return bind(&gate->parameters, index, binding, __func__);
}

moe_status moe_experts_bind(moe_experts *experts, int64_t index, const moe_binding *binding)
{
    if (!experts) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "experts is NULL");
    return bind_listed(&experts->listing, index, binding, __func__);
}

moe_status moe_layer_bind(moe_layer *layer, int64_t index, const moe_binding *binding)
{
    if (!layer) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "layer is NULL");
    return bind_listed(&layer->listing, index, binding, __func__);
}
