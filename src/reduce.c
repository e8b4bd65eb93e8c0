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
static void copy_gradient(const moe__parameter *p, char *dense, bool to_dense)
{
    const int64_t *n = p->shape, *s = p->grad_stride, size = moe__dtype_size(p->dtype);
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

void moe__add_reals(void *to, const void *from, int64_t n, int32_t dtype)
{
    for (int64_t i = 0; i < n; i++) {
        if (dtype == MOE_DTYPE_F64)
            ((double *)to)[i] += ((const double *)from)[i];
        else
            ((float *)to)[i] += ((const float *)from)[i];
    }
}

/* ---- the sum --------------------------------------------------------------------------------- */

/* Memory for one parameter after another. */
typedef struct reduction {
    moe_comm *comm;
    int64_t *begin, *same; /* [P+1] slices; P equal blocks of this rank's slice */
    char *dense, *slices;
    int64_t dense_bytes, slices_bytes, begin_bytes;
} reduction;

static moe_status reduce_one(reduction *r, const moe__parameter *p)
{
    int64_t n = moe__parameter_elements(p), size = moe__dtype_size(p->dtype);
    int32_t P = r->comm->size, rank = r->comm->rank;
    for (int64_t q = 0; q <= P; q++) r->begin[q] = n / P * q + moe__min(q, n % P);
    int64_t own = r->begin[rank + 1] - r->begin[rank];
    for (int64_t q = 0; q <= P; q++) r->same[q] = q * own;
    copy_gradient(p, r->dense, true);
    moe_exchange e = {.struct_size = sizeof e,
                      .recv = r->slices,
                      .recv_begin = r->same,
                      .send = r->dense,
                      .send_begin = r->begin,
                      .row_bytes = size};
    MOE_TRY(moe_comm_exchange(r->comm, &e));
    for (int64_t q = 1; q < P; q++)
        moe__add_reals(r->slices, r->slices + q * own * size, own, p->dtype);
    MOE_TRY(moe_comm_all_gather(r->comm, r->dense, r->begin, r->slices, size));
    copy_gradient(p, r->dense, false);
    return MOE_OK;
}

static moe_status reduce_all(moe_layer *layer, reduction *r)
{
    for (int64_t i = 0; i < layer->listing.count; i++) {
        const moe__listed *entry = &layer->listing.entry[i];
        const moe__parameter *p = moe__listed_parameter(&layer->listing, i);
        if (moe__is_spread(layer, entry)) continue; /* each rank has its own */
        if (p->grad || p->grad_each) MOE_TRY(reduce_one(r, p));
    }
    return MOE_OK;
}

moe_status moe_layer_reduce_gradients(moe_layer *layer, void *stream)
{
    const char *function = __func__;
    if (!layer) REFUSE_ARGUMENT("layer is NULL");
    if (stream) REFUSE_ARGUMENT("stream must be NULL on CPU");
    if (!layer->where || layer->comm->size == 1) return MOE_OK;
    int64_t most = 0, P = layer->comm->size;
    for (int64_t i = 0; i < layer->listing.count; i++)
        if (!moe__is_spread(layer, &layer->listing.entry[i]))
            most = moe__max(most,
                            moe__parameter_elements(moe__listed_parameter(&layer->listing, i)));
    int64_t size = moe__dtype_size(layer->experts->config.dtype);
    reduction r = {.comm = layer->comm,
                   .begin_bytes = (P + 1) * (int64_t)sizeof(int64_t),
                   .dense_bytes = most * size,
                   .slices_bytes = (most / P + 1) * P * size};
    r.begin = moe__alloc(layer->context, r.begin_bytes);
    r.same = moe__alloc(layer->context, r.begin_bytes);
    r.dense = moe__alloc(layer->context, r.dense_bytes);
    r.slices = moe__alloc(layer->context, r.slices_bytes);
    moe_status status = MOE_OK;
    fenv_t saved;
    moe__fenv_enter(&saved);
    if (!r.begin || !r.same || (most > 0 && (!r.dense || !r.slices)))
        status = moe__fail(MOE_ERROR_OUT_OF_MEMORY, function, "no memory for %lld gradients",
                           (ll)most);
    else
        status = reduce_all(layer, &r);
    moe__fenv_leave(&saved);
    if (status != MOE_OK) moe_comm_abort(layer->comm); /* the others wait for this rank */
    moe__comm_free(layer->comm, layer->context, r.begin, r.begin_bytes);
    moe__comm_free(layer->comm, layer->context, r.same, r.begin_bytes);
    moe__comm_free(layer->comm, layer->context, r.dense, r.dense_bytes);
    moe__comm_free(layer->comm, layer->context, r.slices, r.slices_bytes);
    return status;
}
