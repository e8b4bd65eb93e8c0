/* storage.c - where the weights of a pool lie: by strides, in panels, or both; the copy in panels,
 * and dense copies for the host.
 *
 *     ROW_MAJOR   by strides
 *     PREPACKED   by strides, and once more in panels in memory of the pool
 *     PANELS      in panels: "w13" or "w1", and "w2"
 *
 * Panels are those of cpu/grouped_gemm.h: W1 and W3 of a gated expert share each of theirs. */
#include "pass_state.h"

#include <string.h>

/* ---- panels ---------------------------------------------------------------------------------- */

static int32_t panel_of(bool gated) { return gated ? MOE__PANEL / 2 : MOE__PANEL; }

/* Elements of [rows,cols], or of two such that share panels; -1: too many. */
static int64_t panel_elements(int64_t rows, int64_t cols, int32_t panel)
{
    int64_t panels = cols / panel + (cols % panel != 0);
    return moe__mul(moe__mul(rows, MOE__PANEL), panels);
}

/* Of W1 (with W3), and of W2. */
static void count_elements(const moe_experts_config *c, int64_t elements[2])
{
    elements[0] = panel_elements(c->d_model, c->d_hidden, panel_of(moe__is_gated(c->activation)));
    elements[1] = panel_elements(c->d_hidden, c->d_out, MOE__PANEL);
}

int64_t moe__storage_panel_elements(const moe_experts_config *config)
{
    int64_t elements[2];
    count_elements(config, elements);
    return moe__add(elements[0], elements[1]);
}

/* Rows and columns of an expert's matrix; of a fused parameter, of one half of it. */
static void extent(const moe__parameter *p, int64_t *rows, int64_t *cols)
{
    bool matrix = p->dims == 3;
    *rows = matrix ? p->shape[p->out_in ? 2 : 1] : 1;
    *cols = p->shape[!matrix || p->out_in ? 1 : 2] / (p->fused ? 2 : 1);
}

int64_t moe__parameter_stored(const moe__parameter *p)
{
    int64_t rows, cols;
    if (!p->panel) return moe__parameter_elements(p);
    extent(p, &rows, &cols);
    return moe__mul(p->shape[0], panel_elements(rows, cols, p->panel));
}

moe__parameter moe__parameter_as_stored(const moe__parameter *p)
{
    moe__parameter stored = *p;
    int64_t rows, cols;
    if (!p->panel) return stored;
    extent(p, &rows, &cols);
    stored.shape[2] = rows * MOE__PANEL;
    stored.shape[1] = p->data_stride[0] / stored.shape[2];
    stored.data_stride[1] = stored.grad_stride[1] = stored.shape[2];
    stored.data_stride[2] = stored.grad_stride[2] = 1;
    stored.panel = 0;
    return stored;
}

moe_status moe__storage_check(const moe_context *context, const moe_experts_config *config,
                              const char *function)
{
    const moe__backend *kernels = moe__kernels(context, config->dtype);
    if (config->storage != MOE_STORAGE_ROW_MAJOR && kernels && !kernels->matrices_copy)
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "storage %s is not available on %s",
               config->storage == MOE_STORAGE_PANELS ? "MOE_STORAGE_PANELS"
                                                     : "MOE_STORAGE_PREPACKED",
               context->memory->name);
    return MOE_OK;
}

/* ---- operands -------------------------------------------------------------------------------- */

/* Where its columns lie that are of `half` (0 gate, 1 up); of one that is not fused, all. */
static moe__matrices place_columns(moe__matrices m, const moe__parameter *p, const int64_t *stride,
                                   int32_t half)
{
    int64_t rows, cols, first = half * (int64_t)p->panel, step = 1;
    extent(p, &rows, &cols);
    if (p->panel) {
        m.offset = first;
        m.stride_row = MOE__PANEL, m.stride_col = 1;
        m.panel = p->panel, m.panel_step = rows * MOE__PANEL;
        return m;
    }
    m.stride_row = p->dims == 3 ? stride[p->out_in ? 2 : 1] : 0;
    m.stride_col = stride[p->dims == 2 || p->out_in ? 1 : 2];
    if (p->fused == MOE_GLU_INTERLEAVED)
        first = half, step = 2;
    else if (p->fused)
        first = half == (p->fused == MOE_GLU_GATE_UP) ? cols : 0;
    m.offset = first * m.stride_col;
    m.stride_col *= step;
    return m;
}

/* [E,in,out] or [E,out] of a parameter, or of a half of it. */
static moe__matrices half_of(const moe__parameter *p, int32_t half, bool gradient)
{
    const int64_t *stride = gradient ? p->grad_stride : p->data_stride;
    const moe__matrices m = {.dtype = gradient ? p->grad_dtype : p->data_dtype,
                             .base = gradient ? p->grad : p->data,
                             .each = gradient ? p->grad_each : p->data_each,
                             .stride_expert = stride[0],
                             .wide = moe__parameter_is_wide(p, gradient)};
    return place_columns(m, p, stride, p->fused ? half : 0);
}

/* `fused` holds it if there is no `name`. */
static moe__matrices find(const moe_experts *experts, const char *name, const char *fused,
                          int32_t half, bool gradient)
{
    const moe__parameter *p = moe__parameter_by_name(&experts->parameters, name);
    if (!p && fused) p = moe__parameter_by_name(&experts->parameters, fused);
    return p ? half_of(p, half, gradient) : (moe__matrices){0};
}

static void operands(const moe_experts *e, bool gradient, moe__matrices m[6])
{
    m[0] = find(e, "w1", "w13", 0, gradient);
    m[1] = find(e, "b1", "b13", 0, gradient);
    m[2] = find(e, "w3", "w13", 1, gradient);
    m[3] = find(e, "b3", "b13", 1, gradient);
    m[4] = find(e, "w2", NULL, 0, gradient);
    m[5] = find(e, "b2", NULL, 0, gradient);
}

/* Number `which` of a pool's packed copy, and of it the columns of `half`. */
static moe__matrices of_copy(const moe_experts *e, int32_t which, int32_t half)
{
    int64_t elements[2], rows = which ? e->config.d_hidden : e->config.d_model;
    int32_t panel = panel_of(which == 0 && moe__is_gated(e->config.activation));
    count_elements(&e->config, elements);
    return (moe__matrices){.base = e->packed.data[which],
                           .offset = half * (int64_t)panel,
                           .stride_expert = elements[which],
                           .stride_row = MOE__PANEL,
                           .stride_col = 1,
                           .panel = panel,
                           .panel_step = rows * MOE__PANEL,
                           .dtype = e->config.dtype,
                           .wide = !moe__is_half(e->config.dtype)};
}

/* Weights m[0], m[2] and m[4] as they are in the copy. */
static void use_copy(const moe_experts *e, moe__matrices m[6])
{
    m[0] = of_copy(e, 0, 0);
    if (moe__is_gated(e->config.activation)) m[2] = of_copy(e, 0, 1);
    m[4] = of_copy(e, 1, 0);
}

/* Operands that begin at a later expert. */
static void skip_experts(moe__matrices m[6], int64_t experts)
{
    for (int i = 0; i < 6; i++) {
        if (m[i].each)
            m[i].each += experts;
        else
            m[i].offset += experts * m[i].stride_expert;
    }
}

void moe__experts_operands(const moe_experts *experts, moe__experts_job *job, bool packed)
{
    moe__matrices m[6];
    operands(experts, false, m);
    if (packed) use_copy(experts, m);
    skip_experts(m, job->first_expert);
    job->w1 = m[0], job->b1 = m[1], job->w3 = m[2];
    job->b3 = m[3], job->w2 = m[4], job->b2 = m[5];
}

void moe__experts_gradients(const moe_experts *experts, moe__experts_job *job, bool wanted)
{
    moe__matrices m[6];
    memset(m, 0, sizeof m);
    if (wanted) operands(experts, true, m);
    skip_experts(m, job->first_expert);
    job->dw1 = m[0], job->db1 = m[1], job->dw3 = m[2];
    job->db3 = m[3], job->dw2 = m[4], job->db2 = m[5];
}

/* ---- the packed copy ------------------------------------------------------------------------- */

moe_status moe__storage_allocate(moe_experts *e, const char *function)
{
    const moe_experts_config *c = &e->config;
    int64_t elements[2];
    if (c->storage != MOE_STORAGE_PREPACKED || c->num_experts == 0) return MOE_OK;
    count_elements(c, elements);
    for (int i = 0; i < 2; i++) {
        int64_t bytes = moe__mul(moe__mul(c->num_experts, elements[i]), moe__dtype_size(c->dtype));
        if (bytes < 0) REFUSE(MOE_ERROR_OVERFLOW, "packed weights do not fit in 63 bits");
        e->packed.data[i] = e->context->memory->alloc(e->context, bytes, true);
        if (!e->packed.data[i])
            REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no %lld bytes for packed weights", (ll)bytes);
        e->packed.bytes[i] = bytes;
    }
    return MOE_OK;
}

void moe__storage_free(moe_experts *e)
{
    for (int i = 0; i < 2; i++)
        e->context->memory->free(e->context, e->packed.data[i], e->packed.bytes[i]);
}

static moe_status pack(const moe_experts *e, const moe__workers *workers)
{
    const moe_experts_config *c = &e->config;
    const moe__backend *kernels = moe__kernels(e->context, c->dtype);
    moe__matrices from[6], to[6];
    memset(to, 0, sizeof to);
    operands(e, false, from);
    use_copy(e, to);
    for (int i = 0; i < 6; i += 2) {
        const moe__copy_job job = {.workers = *workers,
                                   .experts = c->num_experts,
                                   .rows = i < 4 ? c->d_model : c->d_hidden,
                                   .cols = i < 4 ? c->d_hidden : c->d_out,
                                   .from = from[i],
                                   .to = to[i]};
        if (to[i].base) MOE_TRY(kernels->matrices_copy(&job));
    }
    return MOE_OK;
}

/* Whoever comes while another call makes the copy reads the parameters themselves, which gives the
 * same bytes: to wait for that call could be to wait for one's own thread, where the host's
 * parallel-for lets a thread that waits begin other work. */
moe_status moe__storage_renew(moe_experts *e, const moe__workers *workers, bool *packed)
{
    moe__packed *copy = &e->packed;
    moe_status status = MOE_OK;
    *packed = copy->data[0] && atomic_load(&copy->holds) == atomic_load(&e->parameters.changes);
    if (*packed || !copy->data[0] || atomic_flag_test_and_set(&copy->busy)) return MOE_OK;
    long long now = atomic_load(&e->parameters.changes);
    if (atomic_load(&copy->holds) != now) status = pack(e, workers);
    if (status == MOE_OK) atomic_store(&copy->holds, now);
    *packed = status == MOE_OK;
    atomic_flag_clear(&copy->busy);
    return status;
}

/* ---- dense copies ---------------------------------------------------------------------------- */

/* Copies `count` experts from number `first` on between the parameter and dense memory. */
static moe_status move(moe_context *context, const moe__parameter *p, bool gradient, int64_t first,
                       int64_t count, void *dense, bool to_dense, const char *function)
{
    int32_t dtype = gradient ? p->grad_dtype : p->data_dtype;
    moe__parameter plain = *p;
    int64_t size = moe__dtype_size(dtype), step = 1;
    moe__copy_job job = {.workers = moe__workers_of(context, function, NULL), .experts = count};
    extent(p, &job.rows, &job.cols);
    plain.panel = 0;
    plain.data = dense, plain.data_each = NULL, plain.data_dtype = dtype;
    for (int32_t d = p->dims - 1; d >= 0; d--) plain.data_stride[d] = step, step *= p->shape[d];
    for (int32_t half = 0; half < (p->fused ? 2 : 1); half++) {
        moe__matrices here = half_of(p, half, gradient), there = half_of(&plain, half, false);
        if (here.each)
            here.each += first;
        else
            here.base = (char *)here.base + first * here.stride_expert * size;
        job.from = to_dense ? here : there;
        job.to = to_dense ? there : here;
        MOE_TRY(moe__kernels(context, MOE_DTYPE_F32)->matrices_copy(&job));
    }
    return MOE_OK;
}

static moe_status check_values(const moe_experts *experts, const moe__parameter *p,
                               const char *name, int32_t what, int64_t first, int64_t count,
                               const char *function)
{
    bool gradient = what == MOE_PARAMETER_GRADIENT;
    void *const *each = gradient ? p->grad_each : p->data_each;
    if (!experts->context->memory->is_host)
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "not available on %s", experts->context->memory->name);
    if (!(gradient ? p->grad : p->data) && !each)
        REFUSE(MOE_ERROR_INVALID_STATE, gradient ? "%s has no gradient" : "%s is not bound", name);
    for (int64_t e = first; each && e < first + count; e++)
        if (!each[e])
            REFUSE(MOE_ERROR_INVALID_STATE, "%s of expert %lld has no gradient", name, (ll)e);
    return MOE_OK;
}

/* Finds the parameter that a call is about; everything that can be refused is refused here. */
static moe_status find_values(const moe_experts *experts, int64_t index, int32_t what,
                              int64_t first, int64_t count, const void *dense,
                              const moe__listed **found, const char *function)
{
    if (!experts) REFUSE_ARGUMENT("experts is NULL");
    if (index < 0 || index >= experts->listing.count)
        REFUSE_ARGUMENT("index is %lld, there are %lld parameters", (ll)index,
                        (ll)experts->listing.count);
    *found = &experts->listing.entry[index];
    const moe__parameter *p = moe__listed_parameter(&experts->listing, index);
    int64_t E = p->shape[0];
    MOE_TRY(moe__check_range("what", what, MOE_PARAMETER_DATA, MOE_PARAMETER_GRADIENT, function));
    MOE_TRY(moe__check_range("first_expert", first, 0, E, function));
    MOE_TRY(moe__check_range("count", count, 0, E - first, function));
    if (!dense && count > 0) REFUSE_ARGUMENT("the dense memory is NULL");
    return check_values(experts, p, (*found)->name, what, first, count, function);
}

moe_status moe_experts_export(const moe_experts *experts, int64_t index, int32_t what,
                              int64_t first_expert, int64_t count, void *to)
{
    const moe__listed *found;
    MOE_TRY(find_values(experts, index, what, first_expert, count, to, &found, __func__));
    return move(experts->context, &found->list->p[found->index], what == MOE_PARAMETER_GRADIENT,
                first_expert, count, to, true, __func__);
}

moe_status moe_experts_import(moe_experts *experts, int64_t index, int32_t what,
                              int64_t first_expert, int64_t count, const void *from)
{
    const char *function = __func__;
    const moe__listed *found;
    bool gradient = what == MOE_PARAMETER_GRADIENT;
    MOE_TRY(find_values(experts, index, what, first_expert, count, from, &found, function));
    const moe__parameter *p = &found->list->p[found->index];
    if (!gradient && !p->owned)
        REFUSE(MOE_ERROR_INVALID_STATE, "%s is bound to the host's memory, which is not written",
               found->name);
    if (!gradient) (void)atomic_fetch_add(&found->list->changes, 1);
    return move(experts->context, p, gradient, first_expert, count, (void *)(uintptr_t)from, false,
                function);
}

moe_status moe__storage_move(const moe_layer *layer, int64_t index, void *opaque, void *dense,
                             bool to_dense, const char *function)
{
    const moe__listed *entry = &layer->listing.entry[index];
    moe__parameter p = entry->list->p[entry->index];
    if (opaque) p.data = opaque;
    if (!opaque && !to_dense) (void)atomic_fetch_add(&entry->list->changes, 1);
    return move(layer->context, &p, false, 0, p.shape[0], dense, to_dense, function);
}
