/* parameter_init.c - first values of owned parameters, and gradients set to zero.
 *
 * Element (expert, row, column) of the logical matrix W1, W3, W2 [in,out], or of the router's
 * [D,E], is std times the normal number column % 4 of the counter
 *
 *     {purpose 2 << 24 | stream << 16 | tensor, expert, row, column / 4}
 *
 * stream: a gate's stream_id; of a layer's pools 0 for the routed, 1 the shared, 2 the residual
 * one; whatever layout, GLU order or dtype it is stored in: see docs/numerics.md, "Initial
 * parameters". */
#include "pass_state.h"
#include "philox.h"
#include "reals.h"

#include <string.h>

typedef struct fill {
    const moe__parameter *p;
    uint64_t seed;
    uint32_t stream_id;
    void *to;               /* host memory, dense */
    int64_t rows, cols;     /* logical, of one expert's matrix as stored: inputs and outputs */
    const int64_t *numbers; /* of the experts, or groups, on all ranks; NULL: 0 and on */
} fill;

enum { UP_AFTER_GATE = 2 }; /* tensor number of W3 minus that of W1 */

/* Which tensor a stored output column is of, and its column there. */
static int64_t logical_column(const fill *f, int64_t column, uint32_t *tensor)
{
    int32_t half = 0;
    if (f->p->fused) column = moe__column_of_half(f->p->fused, column, f->cols / 2, &half);
    if (half) *tensor += UP_AFTER_GATE;
    return column;
}

static float first_value(const fill *f, int64_t expert, int64_t row, int64_t column)
{
    uint32_t tensor = (uint32_t)f->p->init_tensor, counter[4], bits[4];
    float four[4];
    column = logical_column(f, column, &tensor);
    moe__counter(counter, moe__stream(tensor, f->stream_id, MOE__PURPOSE_INIT),
                 (uint32_t)(f->numbers ? f->numbers[expert] : expert), (uint32_t)row,
                 (uint32_t)(column / 4));
    moe__philox(f->seed, counter, bits);
    moe__normal4(bits, four);
    return (float)(f->p->init_std * (double)four[column % 4]);
}

/* Stored rows [begin,end) of all experts' matrices: the first stored dimension after the expert. */
static void fill_range(void *argument, int64_t begin, int64_t end)
{
    const fill *f = argument;
    const moe__parameter *p = f->p;
    bool out_in = p->out_in != 0;
    int64_t stored_rows = out_in ? f->cols : f->rows, width = out_in ? f->rows : f->cols;
    for (int64_t r = begin; r < end; r++)
        for (int64_t j = 0; j < width; j++) {
            int64_t expert = r / stored_rows, i = r % stored_rows;
            float value = first_value(f, expert, out_in ? j : i, out_in ? i : j);
            int64_t at = p->panel ? expert * p->data_stride[0] +
                                        moe__parameter_place(p, p->data_stride, i, j)
                                  : r * width + j;
            moe__set_real(f->to, at, p->dtype, (double)value);
        }
}

static moe_status draw_one(const moe__parameter_list *list, const moe__parameter *p, void *to,
                           uint64_t seed, int32_t stream_id, const int64_t *numbers,
                           const char *function)
{
    int64_t experts = p->per_expert ? p->shape[0] : 1;
    int64_t first = p->shape[p->per_expert], second = p->shape[p->per_expert + 1];
    bool out_in = p->out_in != 0;
    fill f = {.p = p,
              .to = to,
              .seed = seed,
              .stream_id = (uint32_t)stream_id,
              .numbers = p->per_expert ? numbers : NULL,
              .rows = out_in ? second : first,
              .cols = out_in ? first : second};
    return moe__parallel_range(list->context, experts * first, moe__max(1, 4096 / second),
                               fill_range, &f, function);
}

/* Drawn where they are, or on the host and copied, which waits: zeros too are there for any
 * stream. */
static moe_status init_one(const moe__parameter_list *list, const moe__parameter *p, uint64_t seed,
                           int32_t stream_id, const int64_t *numbers, const char *function)
{
    moe_context *context = list->context;
    const moe__memory *memory = context->memory;
    moe__workers workers = moe__workers_of(context, function, NULL);
    bool drawn = p->init_std != 0 && p->dims - p->per_expert == 2;
    if (!p->owned) return MOE_OK;
    if (!drawn && memory->is_host) return memory->zero(&workers, p->own_data, p->own_bytes);
    if (memory->is_host) return draw_one(list, p, p->own_data, seed, stream_id, numbers, function);
    void *host = moe__alloc_zeroed(context, p->own_bytes);
    if (!host) REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no %lld bytes for %s", (ll)p->own_bytes, p->name);
    moe_status status = drawn ? draw_one(list, p, host, seed, stream_id, numbers, function)
                              : MOE_OK;
    if (status == MOE_OK) status = memory->store(&workers, p->own_data, host, p->own_bytes);
    moe__free(context, host, p->own_bytes);
    return status;
}

static moe_status init_all(moe__parameter_list *list, uint64_t seed, int32_t stream_id,
                           const int64_t *numbers, const char *function)
{
    fenv_t saved;
    moe_status status = MOE_OK;
    moe__fenv_enter(&saved);
    for (int64_t i = 0; i < list->count && status == MOE_OK; i++)
        status = init_one(list, &list->p[i], seed, stream_id, numbers, function);
    (void)atomic_fetch_add(&list->changes, 1);
    moe__fenv_leave(&saved);
    return status;
}

moe_status moe_gate_init_parameters(moe_gate *gate, uint64_t seed)
{
    if (!gate) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "gate is NULL");
    return init_all(&gate->parameters, seed, gate->config.stream_id, NULL, __func__);
}

/* stream_id: 0 for a pool by itself and for the routed one, so that a layer's pools differ. */
static moe_status init_pool(moe_experts *experts, uint64_t seed, int32_t stream_id,
                            const int64_t *numbers, const char *function)
{
    for (int64_t i = 0; i < experts->parts; i++)
        MOE_TRY(init_all(&experts->part[i]->parameters, seed, stream_id, numbers, function));
    return MOE_OK;
}

moe_status moe_experts_init_parameters(moe_experts *experts, uint64_t seed)
{
    if (!experts) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "experts is NULL");
    return init_pool(experts, seed, 0, NULL, __func__);
}

moe_status moe_layer_init_parameters(moe_layer *layer, uint64_t seed)
{
    if (!layer) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "layer is NULL");
    const moe__placement *w = layer->where;
    moe_gate *gate = layer->gate;
    if (gate)
        MOE_TRY(init_all(&gate->parameters, seed, gate->config.stream_id,
                         w && w->groups ? w->groups + w->first_group[layer->comm->rank] : NULL,
                         __func__));
    const int64_t *numbers = w ? w->number_of_slot + w->first_slot[layer->comm->rank] : NULL;
    MOE_TRY(init_pool(layer->experts, seed, 0, numbers, __func__));
    if (layer->shared) MOE_TRY(init_pool(layer->shared, seed, 1, NULL, __func__));
    if (layer->residual) MOE_TRY(init_pool(layer->residual, seed, 2, NULL, __func__));
    return init_all(&layer->parameters, seed, 0, NULL, __func__);
}

/* ---- zero ------------------------------------------------------------------------------------ */

/* The rows of a gradient, everything but the last dimension: of all experts, or of those listed. */
typedef struct zeroing {
    const moe__parameter *p;
    const int32_t *experts; /* NULL: all */
} zeroing;

static void zero_range(void *argument, int64_t begin, int64_t end)
{
    const zeroing *z = argument;
    const moe__parameter *p = z->p;
    int64_t element = moe__dtype_size(p->grad_dtype), width = p->shape[p->dims - 1];
    int64_t rows = p->dims == 3 ? p->shape[1] : 1, step = p->grad_stride[p->dims - 1];
    for (int64_t r = begin; r < end; r++) {
        int64_t outer = p->dims == 1 ? 0 : r / rows, inner = p->dims == 3 ? r % rows : 0;
        if (z->experts) outer = z->experts[outer];
        char *base = p->grad_each ? p->grad_each[outer] : p->grad;
        int64_t at = (p->grad_each || p->dims == 1 ? 0 : outer * p->grad_stride[0]) +
                     (p->dims == 3 ? inner * p->grad_stride[1] : 0);
        if (!base) continue;
        if (step == 1) {
            memset(base + at * element, 0, (size_t)(width * element));
            continue;
        }
        for (int64_t j = 0; j < width; j++)
            memset(base + (at + j * step) * element, 0, (size_t)element);
    }
}

/* A gradient that is not in the host's memory: all of it, in pieces with one stride each. */
static moe_status zero_elsewhere(const moe__workers *workers, const moe__parameter *p)
{
    const moe__memory *memory = workers->context->memory;
    int64_t element = moe__dtype_size(p->grad_dtype), count[3], stride[3];
    for (int d = 0; d < 3; d++) {
        count[d] = d < p->dims ? p->shape[d] : 1;
        stride[d] = d < p->dims ? p->grad_stride[d] : 0;
    }
    if (!p->grad_each) return memory->zero_strided(workers, p->grad, count, stride, element);
    int64_t experts = count[0];
    count[0] = 1;
    for (int64_t e = 0; e < experts; e++)
        if (p->grad_each[e])
            MOE_TRY(memory->zero_strided(workers, p->grad_each[e], count, stride, element));
    return MOE_OK;
}

/* experts NULL: the whole of every gradient; else, of a pool's, the parts of those `count`. */
static moe_status zero_gradients(const moe__workers *workers, moe__parameter_list *list,
                                 const int32_t *experts, int64_t count)
{
    for (int64_t i = 0; i < list->count; i++) {
        const moe__parameter stored = moe__parameter_as_stored(&list->p[i]), *p = &stored;
        zeroing z = {p, experts};
        if ((!p->grad && !p->grad_each) || moe__parameter_elements(p) == 0) continue;
        if (!workers->context->memory->is_host) {
            MOE_TRY(zero_elsewhere(workers, p));
            continue;
        }
        int64_t width = p->shape[p->dims - 1], rows = moe__parameter_elements(p) / width;
        if (experts) rows = rows / p->shape[0] * count;
        MOE_TRY(moe__parallel_range(list->context, rows, moe__max(1, 65536 / width), zero_range, &z,
                                    workers->function));
    }
    return MOE_OK;
}

moe_status moe__parameters_zero_gradients(const moe__workers *workers, moe__parameter_list *list)
{
    return zero_gradients(workers, list, NULL, 0);
}

/* Where the host does not know which experts were touched, all are set to zero. */
static moe_status zero_pool(const moe__workers *workers, moe_experts *experts, bool whole)
{
    const moe__memory *memory = workers->context->memory;
    for (int64_t i = 0; i < experts->parts; i++) {
        moe_experts *part = experts->part[i];
        MOE_TRY(zero_gradients(workers, &part->parameters, whole ? NULL : part->touched_list,
                               part->touched_count));
        if (!memory->is_host)
            MOE_TRY(memory->zero(workers, part->touched, part->config.num_experts));
        for (int64_t n = 0; n < part->touched_count; n++) part->touched[part->touched_list[n]] = 0;
        part->touched_count = 0;
    }
    return MOE_OK;
}

static moe_status zero_layer(const moe__workers *workers, moe_layer *layer, bool whole)
{
    if (layer->gate) MOE_TRY(zero_gradients(workers, &layer->gate->parameters, NULL, 0));
    MOE_TRY(zero_gradients(workers, &layer->parameters, NULL, 0));
    if (layer->shared) MOE_TRY(zero_pool(workers, layer->shared, whole));
    if (layer->residual) MOE_TRY(zero_pool(workers, layer->residual, whole));
    return zero_pool(workers, layer->experts, whole);
}

/* Of a gate, a pool or a layer: one of them. */
static moe_status zero(moe_context *context, moe_gate *gate, moe_experts *experts, moe_layer *layer,
                       bool whole, void *stream, const char *function)
{
    const moe__memory *memory = context->memory;
    moe__workers workers = moe__workers_of(context, function, stream);
    MOE_TRY(moe__check_stream(context, stream, function));
    moe_status status = memory->begin ? memory->begin(&workers) : MOE_OK;
    if (status != MOE_OK) return status;
    status = gate      ? zero_gradients(&workers, &gate->parameters, NULL, 0)
             : experts ? zero_pool(&workers, experts, whole)
                       : zero_layer(&workers, layer, whole);
    if (memory->end) memory->end(&workers);
    return status;
}

moe_status moe_gate_zero_gradients(moe_gate *gate, void *stream)
{
    if (!gate) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "gate is NULL");
    return zero(gate->context, gate, NULL, NULL, true, stream, __func__);
}

static moe_status zero_experts(moe_experts *experts, bool whole, void *stream, const char *function)
{
    if (!experts) REFUSE_ARGUMENT("experts is NULL");
    return zero(experts->context, NULL, experts, NULL, whole, stream, function);
}

static moe_status zero_of_layer(moe_layer *layer, bool whole, void *stream, const char *function)
{
    if (!layer) REFUSE_ARGUMENT("layer is NULL");
    return zero(layer->context, NULL, NULL, layer, whole, stream, function);
}

moe_status moe_experts_zero_gradients(moe_experts *experts, void *stream)
{
    return zero_experts(experts, true, stream, __func__);
}

moe_status moe_layer_zero_gradients(moe_layer *layer, void *stream)
{
    return zero_of_layer(layer, true, stream, __func__);
}

moe_status moe_experts_zero_touched_gradients(moe_experts *experts, void *stream)
{
    return zero_experts(experts, false, stream, __func__);
}

moe_status moe_layer_zero_touched_gradients(moe_layer *layer, void *stream)
{
    return zero_of_layer(layer, false, stream, __func__);
}
