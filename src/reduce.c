/* reduce.c - gradients of replicated parameters, summed over ranks in order of rank.
 *
 *     every rank: slice p of its gradient to rank p;  rank p: sum of its slices from rank 0 on;
 *     all: every slice from its rank
 *
 * Never the transport's own sum, whose order is its own: so the bytes are those of one rank with
 * the same token groups, if each rank had one group and gradients began at 0. A ring would send as
 * many bytes. */
#include "pass_state.h"

#include <string.h>

/* ---- one gradient as a dense vector ---------------------------------------------------------- */

/* Copies between dense memory and a gradient of any strides, or of one pointer per expert. */
static void copy_on_host(const moe__parameter *p, char *dense, bool to_dense)
{
    const int64_t *n = p->shape, *s = p->grad_stride, size = moe__dtype_size(p->grad_dtype);
    for (int64_t i = 0; i < n[0]; i++) {
        char *part = p->grad_each ? p->grad_each[i] : (char *)p->grad + i * s[0] * size;
        for (int64_t j = 0; j < n[1]; j++)
            for (int64_t k = 0; k < n[2]; k++, dense += size) {
                char *at = part ? part + moe__parameter_place(p, s, j, k) * size : NULL;
                if (to_dense && !at)
                    memset(dense, 0, (size_t)size);
                else if (to_dense)
                    memcpy(dense, at, (size_t)size);
                else if (at)
                    memcpy(at, dense, (size_t)size);
            }
    }
}

/* Memory for one parameter after another. */
typedef struct reduction {
    moe__workers workers;
    moe_comm *comm;
    int64_t *begin, *same;      /* [P+1] slices; P equal blocks of this rank's slice */
    char *dense, *slices;       /* of the backend's memory */
    char *stage_out, *stage_in; /* of the host's, where the transport takes no other */
    int64_t dense_bytes, slices_bytes, begin_bytes;
} reduction;

/* The same where the gradient is not the host's. */
static moe_status copy_gradient(const reduction *r, const moe__parameter *p, bool to_dense)
{
    const moe__memory *memory = r->workers.context->memory;
    const int64_t *n = p->shape, *s = p->grad_stride, size = moe__dtype_size(p->grad_dtype);
    int64_t count[3] = {p->grad_each ? 1 : n[0], n[1], n[2]}, dense[3] = {n[1] * n[2], n[2], 1};
    if (memory->is_host) {
        copy_on_host(p, r->dense, to_dense);
        return MOE_OK;
    }
    for (int64_t i = 0; i < (p->grad_each ? n[0] : 1); i++) {
        char *at = p->grad_each ? p->grad_each[i] : p->grad, *flat = r->dense + i * dense[0] * size;
        if (!at && to_dense) MOE_TRY(memory->zero(&r->workers, flat, dense[0] * size));
        if (!at) continue;
        MOE_TRY(to_dense ? memory->copy_strided(&r->workers, flat, dense, at, s, count, size)
                         : memory->copy_strided(&r->workers, at, s, flat, dense, count, size));
    }
    return MOE_OK;
}

/* ---- the sum --------------------------------------------------------------------------------- */

/* Of the backend's memory, or through the host's. */
static moe_status exchange(const reduction *r, moe_exchange *e)
{
    const moe__memory *memory = r->workers.context->memory;
    void *recv = e->recv;
    int64_t out = e->send_begin[e->to_all ? 1 : r->comm->size] * e->row_bytes;
    int64_t in = e->recv_begin[r->comm->size] * e->row_bytes;
    if (memory->is_host) return moe_comm_exchange(r->comm, e);
    if (!r->stage_out) {
        e->memory = MOE_COMM_DEVICE_MEMORY;
        e->stream = r->workers.stream;
        e->ordered = 1;
        return moe_comm_exchange(r->comm, e);
    }
    MOE_TRY(memory->fetch(&r->workers, r->stage_out, e->send, out));
    e->send = r->stage_out;
    e->recv = r->stage_in;
    MOE_TRY(moe_comm_exchange(r->comm, e));
    return memory->store(&r->workers, recv, r->stage_in, in);
}

static moe_status reduce_one(reduction *r, const moe__parameter *p, const moe__backend *kernels)
{
    int64_t n = moe__parameter_elements(p), size = moe__dtype_size(p->grad_dtype);
    int32_t P = r->comm->size, rank = r->comm->rank;
    for (int64_t q = 0; q <= P; q++) r->begin[q] = n / P * q + moe__min(q, n % P);
    int64_t own = r->begin[rank + 1] - r->begin[rank];
    const int64_t once[2] = {0, own};
    for (int64_t q = 0; q <= P; q++) r->same[q] = q * own;
    MOE_TRY(copy_gradient(r, p, true));
    moe_exchange e = {.struct_size = sizeof e,
                      .recv = r->slices,
                      .recv_begin = r->same,
                      .send = r->dense,
                      .send_begin = r->begin,
                      .row_bytes = size};
    MOE_TRY(exchange(r, &e));
    MOE_TRY(kernels->travel_add(&r->workers, r->slices, own, P, p->grad_dtype));
    e = (moe_exchange){.struct_size = sizeof e,
                       .recv = r->dense,
                       .recv_begin = r->begin,
                       .send = r->slices,
                       .send_begin = once,
                       .row_bytes = size,
                       .to_all = 1};
    MOE_TRY(exchange(r, &e));
    return copy_gradient(r, p, false);
}

static moe_status reduce_all(moe_layer *layer, reduction *r)
{
    const moe__backend *kernels = moe__kernels(layer->context, layer->experts->config.dtype);
    for (int64_t i = 0; i < layer->listing.count; i++) {
        const moe__listed *entry = &layer->listing.entry[i];
        const moe__parameter *p = moe__listed_parameter(&layer->listing, i);
        if (moe__is_spread(layer, entry)) continue; /* each rank has its own */
        if (p->grad || p->grad_each) MOE_TRY(reduce_one(r, p, kernels));
    }
    return MOE_OK;
}

/* Within a phase, as calls of a pass. */
static moe_status run(moe_layer *layer, reduction *r)
{
    const moe__memory *memory = layer->context->memory;
    fenv_t saved;
    moe__fenv_enter(&saved);
    moe_status status = memory->begin ? memory->begin(&r->workers) : MOE_OK;
    bool begun = status == MOE_OK;
    if (begun) status = reduce_all(layer, r);
    if (begun && memory->end) memory->end(&r->workers);
    moe__fenv_leave(&saved);
    return status;
}

/* ---- memory ---------------------------------------------------------------------------------- */

/* A stream that is being captured is refused what would wait or allocate, on every rank alike:
 * nothing has been sent, so that the group goes on. */
static moe_status check_capture(const moe_layer *layer, const reduction *r)
{
    const moe__memory *memory = layer->context->memory;
    bool grows = r->dense_bytes + r->slices_bytes > layer->reduction_bytes;
    if (!memory->may_wait || (!grows && moe__comm_takes(r->comm, layer->context))) return MOE_OK;
    return memory->may_wait(&r->workers);
}

/* The layer keeps it where it is not the host's: to give it back would wait for the stream. */
static moe_status make_rows(moe_layer *layer, reduction *r)
{
    const moe__memory *memory = layer->context->memory;
    int64_t bytes = moe__add(r->dense_bytes, r->slices_bytes);
    if (memory->is_host) {
        r->dense = moe__alloc(layer->context, r->dense_bytes);
        r->slices = moe__alloc(layer->context, r->slices_bytes);
    } else {
        if (bytes > layer->reduction_bytes) {
            void *larger = memory->alloc(layer->context, bytes, false);
            if (larger) memory->free(layer->context, layer->reduction, layer->reduction_bytes);
            if (larger) layer->reduction = larger, layer->reduction_bytes = bytes;
        }
        if (bytes <= layer->reduction_bytes) {
            r->dense = layer->reduction;
            r->slices = r->dense + r->dense_bytes;
        }
        if (!moe__comm_takes(r->comm, layer->context)) {
            r->stage_out = moe__alloc(layer->context, r->slices_bytes);
            r->stage_in = moe__alloc(layer->context, r->slices_bytes);
        }
    }
    r->begin = moe__alloc(layer->context, r->begin_bytes);
    r->same = moe__alloc(layer->context, r->begin_bytes);
    bool stage = memory->is_host || moe__comm_takes(r->comm, layer->context) ||
                 r->slices_bytes == 0 || (r->stage_out && r->stage_in);
    if (r->begin && r->same && stage && (r->dense_bytes == 0 || (r->dense && r->slices)))
        return MOE_OK;
    return moe__fail(MOE_ERROR_OUT_OF_MEMORY, r->workers.function,
                     "no memory for gradients of %lld bytes", (ll)r->dense_bytes);
}

static void free_rows(const moe_layer *layer, const reduction *r)
{
    if (layer->context->memory->is_host) {
        moe__comm_free(r->comm, layer->context, r->dense, r->dense_bytes);
        moe__comm_free(r->comm, layer->context, r->slices, r->slices_bytes);
    }
    moe__comm_free(r->comm, layer->context, r->stage_out, r->slices_bytes);
    moe__comm_free(r->comm, layer->context, r->stage_in, r->slices_bytes);
    moe__comm_free(r->comm, layer->context, r->begin, r->begin_bytes);
    moe__comm_free(r->comm, layer->context, r->same, r->begin_bytes);
}

moe_status moe_layer_reduce_gradients(moe_layer *layer, void *stream)
{
    const char *function = __func__;
    if (!layer) REFUSE_ARGUMENT("layer is NULL");
    MOE_TRY(moe__check_stream(layer->context, stream, function));
    if (!layer->where || layer->comm->size == 1) return MOE_OK;
    int64_t most = 0, P = layer->comm->size, size = 0;
    for (int64_t i = 0; i < layer->listing.count; i++) {
        const moe__parameter *p = moe__listed_parameter(&layer->listing, i);
        if (moe__is_spread(layer, &layer->listing.entry[i])) continue;
        most = moe__max(most, moe__parameter_elements(p));
        size = moe__max(size, moe__dtype_size(p->grad_dtype));
    }
    reduction r = {.workers = moe__workers_of(layer->context, function, stream),
                   .comm = layer->comm,
                   .begin_bytes = (P + 1) * (int64_t)sizeof(int64_t),
                   .dense_bytes = (most * size + 255) / 256 * 256,
                   .slices_bytes = (most / P + 1) * P * size};
    moe_status status = check_capture(layer, &r);
    if (status == MOE_ERROR_INVALID_STATE) return status;
    if (status == MOE_OK) status = make_rows(layer, &r);
    if (status == MOE_OK) status = run(layer, &r);
    if (status != MOE_OK) moe_comm_abort(layer->comm); /* the others wait for this rank */
    free_rows(layer, &r);
    return status;
}
