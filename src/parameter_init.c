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
    const moe__parameter_list *list;
    const moe__parameter *p;
    uint64_t seed;
    uint32_t stream_id;
    int64_t rows, cols;     /* logical, of one expert's matrix as stored: inputs and outputs */
    const int64_t *numbers; /* of the experts, or groups, on all ranks; NULL: 0 and on */
} fill;

enum { UP_AFTER_GATE = 2 }; /* tensor number of W3 minus that of W1 */

/* Which half of a fused parameter a stored output column is, and its column there. */
static int64_t logical_column(const fill *f, int64_t column, uint32_t *tensor)
{
    int64_t half = f->cols / 2;
    bool fused = strcmp(f->p->name, "w13") == 0, up = false;
    if (!fused) return column;
    switch (f->list->glu_order) {
    case MOE_GLU_INTERLEAVED:
        up = column % 2 == 1;
        column = column / 2;
        break;
    default:
        up = (column >= half) == (f->list->glu_order == MOE_GLU_GATE_UP);
        column = column % half;
    }
    if (up) *tensor += UP_AFTER_GATE;
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
    bool out_in = f->p->per_expert && f->list->weight_layout == MOE_WEIGHT_OUT_IN;
    int64_t stored_rows = out_in ? f->cols : f->rows, width = out_in ? f->rows : f->cols;
    for (int64_t r = begin; r < end; r++)
        for (int64_t j = 0; j < width; j++) {
            int64_t expert = r / stored_rows, i = r % stored_rows;
            float value = first_value(f, expert, out_in ? j : i, out_in ? i : j);
            moe__set_real(f->p->own_data, r * width + j, f->p->dtype, (double)value);
        }
}

static moe_status init_one(const moe__parameter_list *list, const moe__parameter *p, uint64_t seed,
                           int32_t stream_id, const int64_t *numbers, const char *function)
{
    int matrix_dims = p->dims - p->per_expert;
    int64_t experts = p->per_expert ? p->shape[0] : 1;
    if (!p->owned) return MOE_OK;
    if (p->init_std == 0 || matrix_dims < 2) {
        memset(p->own_data, 0, (size_t)p->own_bytes);
        return MOE_OK;
    }
    int64_t first = p->shape[p->per_expert], second = p->shape[p->per_expert + 1];
    bool out_in = p->per_expert && list->weight_layout == MOE_WEIGHT_OUT_IN;
    fill f = {.list = list,
              .p = p,
              .seed = seed,
              .stream_id = (uint32_t)stream_id,
              .numbers = p->per_expert ? numbers : NULL,
              .rows = out_in ? second : first,
              .cols = out_in ? first : second};
    return moe__parallel_range(list->context, experts * first, moe__max(1, 4096 / second),
                               fill_range, &f, function);
}

static moe_status init_all(const moe__parameter_list *list, uint64_t seed, int32_t stream_id,
                           const int64_t *numbers, const char *function)
{
    fenv_t saved;
    moe_status status = MOE_OK;
    moe__fenv_enter(&saved);
    for (int64_t i = 0; i < list->count && status == MOE_OK; i++)
        status = init_one(list, &list->p[i], seed, stream_id, numbers, function);
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
    const moe_gate *gate = layer->gate;
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

/* experts NULL: the whole of every gradient; else, of a pool's, the parts of those `count`. */
static moe_status zero_gradients(moe__parameter_list *list, const int32_t *experts, int64_t count,
                                 const char *function)
{
    for (int64_t i = 0; i < list->count; i++) {
        const moe__parameter *p = &list->p[i];
        zeroing z = {p, experts};
        if ((!p->grad && !p->grad_each) || moe__parameter_elements(p) == 0) continue;
        int64_t width = p->shape[p->dims - 1], rows = moe__parameter_elements(p) / width;
        if (experts) rows = rows / p->shape[0] * count;
        MOE_TRY(moe__parallel_range(list->context, rows, moe__max(1, 65536 / width), zero_range, &z,
                                    function));
    }
    return MOE_OK;
}

moe_status moe__parameters_zero_gradients(moe__parameter_list *list, const char *function)
{
    return zero_gradients(list, NULL, 0, function);
}

static moe_status check_stream(const void *stream, const char *function)
{
    if (stream) REFUSE_ARGUMENT("stream must be NULL on CPU");
    return MOE_OK;
}

static moe_status zero_pool(moe_experts *experts, bool whole, const char *function)
{
    for (int64_t i = 0; i < experts->parts; i++) {
        moe_experts *part = experts->part[i];
        MOE_TRY(zero_gradients(&part->parameters, whole ? NULL : part->touched_list,
                               part->touched_count, function));
        for (int64_t n = 0; n < part->touched_count; n++) part->touched[part->touched_list[n]] = 0;
        part->touched_count = 0;
    }
    return MOE_OK;
}

static moe_status zero_layer(moe_layer *layer, bool whole, const char *function)
{
    if (layer->gate) MOE_TRY(zero_gradients(&layer->gate->parameters, NULL, 0, function));
    MOE_TRY(zero_gradients(&layer->parameters, NULL, 0, function));
    if (layer->shared) MOE_TRY(zero_pool(layer->shared, whole, function));
    if (layer->residual) MOE_TRY(zero_pool(layer->residual, whole, function));
    return zero_pool(layer->experts, whole, function);
}

moe_status moe_gate_zero_gradients(moe_gate *gate, void *stream)
{
    if (!gate) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "gate is NULL");
    MOE_TRY(check_stream(stream, __func__));
    return zero_gradients(&gate->parameters, NULL, 0, __func__);
}

moe_status moe_experts_zero_gradients(moe_experts *experts, void *stream)
{
    if (!experts) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "experts is NULL");
    MOE_TRY(check_stream(stream, __func__));
    return zero_pool(experts, true, __func__);
}

moe_status moe_layer_zero_gradients(moe_layer *layer, void *stream)
{
    if (!layer) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "layer is NULL");
    MOE_TRY(check_stream(stream, __func__));
    return zero_layer(layer, true, __func__);
}

moe_status moe_experts_zero_touched_gradients(moe_experts *experts, void *stream)
{
    if (!experts) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "experts is NULL");
    MOE_TRY(check_stream(stream, __func__));
    return zero_pool(experts, false, __func__);
}

moe_status moe_layer_zero_touched_gradients(moe_layer *layer, void *stream)
{
    if (!layer) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "layer is NULL");
    MOE_TRY(check_stream(stream, __func__));
    return zero_layer(layer, false, __func__);
}
