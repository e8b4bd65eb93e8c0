/* layout.c - a layer's parameters as logical tensors, whatever layout, GLU order or strides they
 * are kept in: of a pool W1, W3, W2, b1, b3, b2 of each expert as [out,in] or [out]. Opaque ones
 * are described by a dense copy, which is written back when all has been read. */
#include "io.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const TENSOR_NAMES[IO_POOL_TENSORS] = {"w1", "w3", "w2", "b1", "b3", "b2"};

const char *moe__io_tensor_name(int32_t tensor) { return TENSOR_NAMES[tensor]; }

/* ---- names ----------------------------------------------------------------------------------- */

static const char *const PREFIXES[] = {"gate.", "experts.", "shared.", "residual."};

/* The object of a parameter; *rest: its name there. */
static int32_t owner_of(const char *name, const char **rest)
{
    *rest = name;
    for (int32_t owner = 0; owner < 4; owner++) {
        size_t n = strlen(PREFIXES[owner]);
        if (strncmp(name, PREFIXES[owner], n) != 0) continue;
        *rest = name + n;
        return owner;
    }
    return IO_LAYER;
}

/* "0.w1": the part before the point; a plain pool's have none. */
static int32_t part_of(const char **rest)
{
    const char *point = strchr(*rest, '.');
    int32_t part = 0;
    if (!point) return 0;
    for (const char *c = *rest; c < point && part < MOE_MAX_PARTS; c++)
        part = part * 10 + (*c - '0');
    *rest = point + 1;
    return part;
}

/* ---- one parameter --------------------------------------------------------------------------- */

static moe__io_parameter *add(moe__io_layer *l, const moe__io_parameter *p)
{
    if (!moe__io_grow((void **)&l->parameter, &l->room, l->count, sizeof *p)) return NULL;
    l->parameter[l->count] = *p;
    return &l->parameter[l->count++];
}

static const moe_experts *pool_of(const moe__io_layer *l, int32_t owner)
{
    return owner == IO_ROUTED   ? l->config.experts
           : owner == IO_SHARED ? l->config.shared
                                : l->config.residual;
}

/* Output dimension, or its half, and input dimension of the record's shape and strides. */
static void place_matrix(moe__io_parameter *p, const int64_t *stride, int32_t layout)
{
    int in = layout == MOE_WEIGHT_OUT_IN ? 2 : 1, out = 3 - in;
    p->rows = p->record.shape[out];
    p->cols = p->record.shape[in];
    p->stride_row = stride[out];
    p->stride_col = stride[in];
}

/* Half of a fused parameter: 0 the gate projection, 1 the up projection. */
static void take_half(moe__io_parameter *p, int half, int32_t order, bool matrix)
{
    int64_t *count = matrix ? &p->rows : &p->cols;
    int64_t *stride = matrix ? &p->stride_row : &p->stride_col;
    *count /= 2;
    if (order == MOE_GLU_INTERLEAVED) {
        p->origin = half * *stride;
        *stride *= 2;
    } else {
        bool second = (half == 1) == (order == MOE_GLU_GATE_UP);
        p->origin = second ? *count * *stride : 0;
    }
}

static bool add_pool_tensor(moe__io_layer *l, moe__io_parameter p, const char *name,
                            const moe_experts_config *c, const int64_t *stride)
{
    bool matrix = name[0] == 'w', fused = strcmp(name + 1, "13") == 0;
    int32_t first = matrix ? IO_W1 : IO_B1;
    p.stride_expert = stride[0];
    if (matrix) {
        place_matrix(&p, stride, c->weight_layout);
    } else {
        p.rows = 1, p.cols = p.record.shape[1];
        p.stride_col = stride[1];
    }
    if (!fused) {
        p.tensor = first + (name[1] == '3' ? 1 : name[1] == '2' ? 2 : 0);
        return add(l, &p) != NULL;
    }
    for (int half = 0; half < 2; half++) {
        moe__io_parameter h = p;
        h.tensor = first + half;
        take_half(&h, half, c->glu_order == MOE_GLU_SEPARATE ? MOE_GLU_GATE_UP : c->glu_order,
                  matrix);
        if (!add(l, &h)) return false;
    }
    return true;
}

static void contiguous(int64_t stride[MOE_MAX_DIMS], const int64_t *shape, int32_t dims)
{
    int64_t step = 1;
    for (int32_t d = MOE_MAX_DIMS - 1; d >= 0; d--) {
        stride[d] = d < dims ? step : 0;
        if (d < dims) step *= shape[d];
    }
}

/* Replaces the memory of the record by `values` in the record's shape. */
static void use_values(moe__io_parameter *p, void *values)
{
    p->values = values;
    p->record.data = values;
    p->record.data_per_expert = NULL;
    contiguous(p->record.data_stride, p->record.shape, p->record.dims);
}

/* Describes an opaque parameter, or the host's values in its order, by a dense copy. */
static moe_status stage(moe__io_layer *l, moe__io_parameter *p, void *opaque, const char *function)
{
    const int64_t *n = p->record.shape;
    int64_t count = moe__mul(moe__mul(n[0], n[1]), n[2]);
    int64_t bytes = moe__mul(count, moe__io_dtype_size(p->record.data_dtype));
    moe__io_staged s = {.index = p->index, .opaque = opaque};
    if (!moe__io_grow((void **)&l->staged, &l->staged_room, l->staged_count, sizeof s))
        REFUSE_MEMORY();
    s.dense = bytes < 0 ? NULL : malloc((size_t)bytes + 1);
    if (!s.dense) REFUSE_MEMORY();
    l->staged[l->staged_count++] = s;
    use_values(p, s.dense);
    if (!opaque) p->values = NULL;
    return moe__module_move(l->layer, p->index, opaque, s.dense, true, function);
}

/* Of experts that are none in a row; those of every parameter are alike. */
static moe_status find_numbers(moe__io_layer *l, const moe_layer *layer, moe__io_parameter *p,
                               const char *function)
{
    if (!l->numbers) {
        l->numbers = malloc((size_t)(p->local + p->all) * sizeof *l->numbers);
        if (!l->numbers) REFUSE_MEMORY();
        int64_t *local_of = l->numbers + p->local;
        for (int64_t e = 0; e < p->all; e++) local_of[e] = -1;
        for (int64_t i = 0; i < p->local; i++) {
            l->numbers[i] = moe_layer_expert_number(layer, i);
            local_of[l->numbers[i]] = i;
        }
    }
    p->numbers = l->numbers;
    p->local_of = l->numbers + p->local;
    return MOE_OK;
}

static moe_status describe_one(moe__io_layer *l, const moe_layer *layer, int64_t index,
                               void *const *values, const char *function)
{
    moe__io_parameter p = {.record = {.struct_size = sizeof p.record}, .index = index};
    moe_experts_config c = {.struct_size = sizeof c};
    const char *name;
    MOE_TRY(moe_layer_parameter(layer, index, &p.record));
    if (values && !values[index]) return MOE_OK;
    if (p.record.opaque)
        MOE_TRY(stage(l, &p, values ? values[index] : NULL, function));
    else if (values)
        use_values(&p, values[index]);
    p.owner = owner_of(p.record.name, &name);
    if (p.owner == IO_GATE || p.owner == IO_LAYER) {
        if (!add(l, &p)) REFUSE_MEMORY();
        return MOE_OK;
    }
    const moe_experts *pool = pool_of(l, p.owner);
    p.part = part_of(&name);
    for (int32_t i = 0; i < p.part; i++) {
        MOE_TRY(moe_experts_get_config(moe__module_part(pool, i), &c));
        p.begin += c.num_experts;
    }
    MOE_TRY(moe_experts_get_config(moe__module_part(pool, p.part), &c));
    p.first = p.begin + p.record.global_offset[0];
    p.local = p.record.shape[0];
    p.all = p.record.global_shape[0];
    if (p.record.global_offset[0] < 0) MOE_TRY(find_numbers(l, layer, &p, function));
    if (!add_pool_tensor(l, p, name, &c, p.record.data_stride)) REFUSE_MEMORY();
    return MOE_OK;
}

/* ---- all ------------------------------------------------------------------------------------- */

moe_status moe__io_describe(moe__io_layer *l, const moe_layer *layer, void *const *values,
                            const char *function)
{
    *l = (moe__io_layer){.layer = layer,
                         .config = {.struct_size = sizeof l->config},
                         .gate = {.struct_size = sizeof l->gate},
                         .size = 1,
                         .values = values != NULL};
    if (!moe__module_on_host(layer))
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "the layer's parameters are not in the host's memory");
    MOE_TRY(moe_layer_get_config(layer, &l->config));
    if (l->config.gate) MOE_TRY(moe_gate_get_config(l->config.gate, &l->gate));
    if (l->config.comm) l->size = moe_comm_size(l->config.comm);
    moe_status status = MOE_OK;
    for (int64_t i = 0; i < moe_layer_parameter_count(layer) && status == MOE_OK; i++)
        status = describe_one(l, layer, i, values, function);
    if (status != MOE_OK) moe__io_describe_free(l);
    return status;
}

moe_status moe__io_describe_whole(moe__io_layer *l, const moe_layer *layer, const char *function)
{
    MOE_TRY(moe__io_describe(l, layer, NULL, function));
    if (l->config.expert_slices == 1) return MOE_OK;
    int64_t slices = l->config.expert_slices;
    moe__io_describe_free(l);
    REFUSE(MOE_ERROR_NOT_SUPPORTED, "the layer's experts are in %lld slices", (ll)slices);
}

void moe__io_describe_free(moe__io_layer *l)
{
    free(l->parameter);
    free(l->numbers);
    for (int64_t i = 0; i < l->staged_count; i++) free(l->staged[i].dense);
    free(l->staged);
    l->parameter = NULL;
    l->numbers = NULL;
    l->staged = NULL;
    l->count = l->staged_count = l->staged_room = 0;
}

char *moe__io_expert_base(const moe__io_parameter *p, int64_t expert)
{
    const moe_parameter_record *r = &p->record;
    int64_t size = moe__io_dtype_size(r->data_dtype);
    if (r->data_per_expert) return (char *)r->data_per_expert[expert] + p->origin * size;
    return (char *)r->data + (expert * p->stride_expert + p->origin) * size;
}

moe_status moe__io_check_memory(const moe__io_layer *l, bool to_write, bool write_bound,
                                const char *function)
{
    for (int64_t i = 0; i < l->count; i++) {
        const moe__io_parameter *p = &l->parameter[i];
        if (!p->record.data && !p->record.data_per_expert)
            REFUSE(MOE_ERROR_INVALID_STATE, "parameter %s is not bound", p->record.name);
        if (to_write && !p->values && !p->record.owned && !write_bound)
            REFUSE(MOE_ERROR_INVALID_STATE,
                   "parameter %s is bound to the host's memory, and write_bound is 0",
                   p->record.name);
    }
    return MOE_OK;
}

moe_status moe__io_written(const moe__io_layer *l, const char *function)
{
    for (int64_t i = 0; i < l->staged_count; i++) {
        const moe__io_staged *s = &l->staged[i];
        MOE_TRY(moe__module_move(l->layer, s->index, s->opaque, s->dense, false, function));
    }
    if (l->values) return MOE_OK;
    MOE_TRY(moe_experts_weights_changed(l->config.experts));
    if (l->config.shared) MOE_TRY(moe_experts_weights_changed(l->config.shared));
    if (l->config.residual) MOE_TRY(moe_experts_weights_changed(l->config.residual));
    return MOE_OK;
}
