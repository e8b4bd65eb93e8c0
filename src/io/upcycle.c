/* upcycle.c - a dense feed-forward network into every expert (Komatsuzaki et al. 2022).
 *
 *     W1_e = W1[slice,:] + noise,   W3_e likewise,   W2_e = scale W2[:,slice] + noise
 *     b1_e = b1[slice],             b3_e likewise,   b2_e = b2
 *
 * slice: hidden units (e mod G) F to (e mod G + 1) F - 1, G = H / F. The noise of element (in, out)
 * is number out % 4 of Philox with key = seed and counter {200 << 24 | tensor, expert, in, out /
 * 4}, and it is there where the uniform number of counter {201 << 24 | ...} is below
 * noise_fraction. */
#include "io.h"
#include "philox.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { PURPOSE_NOISE = 200, PURPOSE_CHOICE = 201 };

static void upcycle_defaults(void *instance)
{
    *(moe_upcycle_args *)instance = (moe_upcycle_args){.noise_fraction = 1,
                                                       .output_scale = 1,
                                                       .weight_layout = MOE_WEIGHT_OUT_IN};
}

const moe__struct_info moe__io_upcycle_info = MOE__STRUCT_INFO(moe_upcycle_args, upcycle_defaults);

moe_status moe_upcycle_args_init(moe_upcycle_args *args, size_t size)
{
    return moe__module_struct_init(&moe__io_upcycle_info, args, size, __func__);
}

/* The dense network: host memory, or what was read from a file. */
typedef struct dense {
    const moe_upcycle_args *a;
    const void *data[IO_POOL_TENSORS];
    void *memory[IO_POOL_TENSORS];
    int64_t width, D, O; /* H */
    int32_t dtype;
} dense;

/* ---- from a file ----------------------------------------------------------------------------- */

/* [out,in] of a tensor of the dense network. */
static void extent(const dense *d, int tensor, int64_t *out, int64_t *in)
{
    bool second = tensor == IO_W2 || tensor == IO_B2;
    *out = second ? d->O : d->width;
    *in = tensor > IO_W2 ? 1 : second ? d->width : d->D;
}

static moe_status find(const moe_file *file, const char *name, int64_t *index, const char *function)
{
    *index = moe_file_find(file, name);
    if (*index < 0) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "the file has no %.300s", name);
    return MOE_OK;
}

static moe_status read_one(dense *d, int tensor, const char *name, const char *function)
{
    const moe_file *file = d->a->file;
    int64_t index, out, in, shape[2];
    char want[64], found[160];
    MOE_TRY(find(file, name, &index, function));
    const moe__io_tensor *t = &file->tensor[index];
    extent(d, tensor, &out, &in);
    int32_t dims = tensor > IO_W2 ? 1 : 2;
    bool in_out = d->a->weight_layout == MOE_WEIGHT_IN_OUT;
    shape[0] = dims == 2 && in_out ? in : out;
    shape[1] = in_out ? out : in;
    if (t->dims != dims || memcmp(t->shape, shape, (size_t)dims * sizeof *shape) != 0)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "%.200s should have shape %s and has %s", name,
               moe__io_shape_text(want, sizeof want, shape, dims),
               moe__io_shape_text(found, sizeof found, t->shape, t->dims));
    if (!moe__io_is_float(t->dtype))
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "%.200s is %s", name, moe__io_dtype_name(t->dtype));
    int64_t bytes = moe__mul(t->count, moe__io_dtype_size(d->dtype));
    d->memory[tensor] = bytes < 0 ? NULL : malloc((size_t)bytes + 1);
    if (!d->memory[tensor]) REFUSE_MEMORY();
    d->data[tensor] = d->memory[tensor];
    return moe_file_read(file, index, d->memory[tensor], 0, MOE_FILE_ALL, d->dtype);
}

static moe_status read_dense(dense *d, bool gated, const char *function)
{
    const moe_upcycle_args *a = d->a;
    const char *names[IO_POOL_TENSORS] = {a->w1_name, a->w3_name, a->w2_name,
                                          a->b1_name, a->b3_name, a->b2_name};
    int64_t index;
    d->dtype = MOE_DTYPE_F64;
    if (!names[IO_W1]) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "w1_name is NULL");
    if (d->width == 0) {
        MOE_TRY(find(a->file, names[IO_W1], &index, function));
        d->width = a->file->tensor[index].shape[a->weight_layout == MOE_WEIGHT_IN_OUT];
    }
    for (int t = 0; t < IO_POOL_TENSORS; t++)
        if (names[t] && (gated || (t != IO_W3 && t != IO_B3)))
            MOE_TRY(read_one(d, t, names[t], function));
    return MOE_OK;
}

/* ---- checks ---------------------------------------------------------------------------------- */

static moe_status check_args(const moe_upcycle_args *a, const char *function)
{
    if (!a->file && !moe__io_is_float(a->dtype))
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "dtype is %d", (int)a->dtype);
    if (a->weight_layout != MOE_WEIGHT_OUT_IN && a->weight_layout != MOE_WEIGHT_IN_OUT)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "weight_layout is %d", (int)a->weight_layout);
    if (!(a->noise_std >= 0) || isinf(a->noise_std))
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "noise_std is %g", a->noise_std);
    if (!(a->noise_fraction >= 0 && a->noise_fraction <= 1))
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "noise_fraction is %g; it must be in [0, 1]",
               a->noise_fraction);
    if (!isfinite(a->output_scale))
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "output_scale is %g", a->output_scale);
    if (a->width < 0 || (!a->file && a->width == 0))
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "width is %lld", (ll)a->width);
    if (a->reserved) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "reserved is not 0");
    return MOE_OK;
}

static int64_t hidden_of(const moe__io_parameter *p)
{
    return p->tensor == IO_W2 ? p->cols : p->tensor == IO_W1 || p->tensor == IO_W3 ? p->rows : -1;
}

static moe_status check_parameter(const dense *d, const moe__io_parameter *p, bool write_bound,
                                  const char *function)
{
    const moe_parameter_record *r = &p->record;
    int64_t hidden = hidden_of(p);
    if (!r->data && !r->data_per_expert)
        REFUSE(MOE_ERROR_INVALID_STATE, "parameter %s is not bound", r->name);
    if (!r->owned && !write_bound)
        REFUSE(MOE_ERROR_INVALID_STATE,
               "parameter %s is bound to the host's memory, and write_bound is 0", r->name);
    if (p->tensor <= IO_W2 && !d->data[p->tensor])
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "%s is NULL", moe__io_tensor_name(p->tensor));
    if (hidden > 0 && (d->width == 0 || d->width % hidden))
        REFUSE(MOE_ERROR_INVALID_ARGUMENT,
               "the dense network is %lld wide, %s has experts of %lld: no multiple", (ll)d->width,
               r->name, (ll)hidden);
    return MOE_OK;
}

/* ---- values ---------------------------------------------------------------------------------- */

static double noise(const moe_upcycle_args *a, int32_t tensor, int64_t expert, int64_t in,
                    int64_t out)
{
    uint32_t counter[4], bits[4];
    float four[4];
    if (a->noise_std == 0) return 0;
    if (a->noise_fraction < 1) {
        moe__counter(counter, moe__stream((uint32_t)tensor, 0, PURPOSE_CHOICE), (uint32_t)expert,
                     (uint32_t)in, (uint32_t)(out / 4));
        moe__philox(a->seed, counter, bits);
        if ((double)moe__uniform_f32(bits[out % 4]) >= a->noise_fraction) return 0;
    }
    moe__counter(counter, moe__stream((uint32_t)tensor, 0, PURPOSE_NOISE), (uint32_t)expert,
                 (uint32_t)in, (uint32_t)(out / 4));
    moe__philox(a->seed, counter, bits);
    moe__normal4(bits, four);
    return a->noise_std * (double)four[out % 4];
}

/* One expert's tensor: expert is its number for the gate, e its number here. */
static void fill(const dense *d, const moe__io_parameter *p, int64_t expert, int64_t e,
                 int64_t slices)
{
    char *base = moe__io_expert_base(p, e);
    bool matrix = p->tensor <= IO_W2, in_out = d->a->weight_layout == MOE_WEIGHT_IN_OUT;
    int64_t out_count = matrix ? p->rows : p->cols, in_count = matrix ? p->cols : 1, out_all,
            in_all;
    int64_t out_stride = matrix ? p->stride_row : p->stride_col, slice = expert % slices;
    bool second = p->tensor == IO_W2 || p->tensor == IO_B2;
    int64_t out_first = second ? 0 : slice * out_count;
    int64_t in_first = p->tensor == IO_W2 ? slice * in_count : 0;
    double scale = p->tensor == IO_W2 ? d->a->output_scale : 1;
    extent(d, p->tensor, &out_all, &in_all);
    for (int64_t j = 0; j < out_count; j++)
        for (int64_t i = 0; i < in_count; i++) {
            int64_t row = out_first + j, col = in_first + i;
            int64_t from = in_out ? col * out_all + row : row * in_all + col;
            double x = d->data[p->tensor] ? moe__io_element(d->data[p->tensor], d->dtype, from) : 0;
            x *= scale;
            if (matrix) x += noise(d->a, p->tensor, expert, i, j);
            moe__io_set_element(base, p->record.data_dtype, j * out_stride + i * p->stride_col, x);
        }
}

/* F of the parameter's part. */
static int64_t hidden_of_part(const moe__io_layer *l, int32_t part)
{
    for (int64_t i = 0; i < l->count; i++)
        if (l->parameter[i].owner == IO_ROUTED && l->parameter[i].part == part &&
            hidden_of(&l->parameter[i]) > 0)
            return hidden_of(&l->parameter[i]);
    return 1;
}

static void fill_all(const dense *d, const moe__io_layer *l)
{
    fenv_t saved;
    moe__fenv_enter(&saved);
    for (int64_t i = 0; i < l->count; i++) {
        const moe__io_parameter *p = &l->parameter[i];
        if (p->owner != IO_ROUTED) continue;
        int64_t slices = d->width / hidden_of_part(l, p->part);
        for (int64_t e = 0; e < p->local; e++) fill(d, p, moe__io_number(p, e), e, slices);
    }
    moe__fenv_leave(&saved);
}

/* ---- the call -------------------------------------------------------------------------------- */

static moe_status upcycle(const moe__io_layer *l, dense *d, const char *function)
{
    const moe_upcycle_args *a = d->a;
    moe_experts_config c = {.struct_size = sizeof c};
    bool gated = false, any = false;
    MOE_TRY(check_args(a, function));
    MOE_TRY(moe_experts_get_config(l->config.experts, &c));
    d->D = c.d_model, d->O = c.d_out, d->width = a->width, d->dtype = a->dtype;
    for (int64_t i = 0; i < l->count; i++) {
        any = any || l->parameter[i].owner == IO_ROUTED;
        gated = gated || (l->parameter[i].owner == IO_ROUTED && l->parameter[i].tensor == IO_W3);
    }
    if (!any) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "the layer has no feed-forward experts");
    const void *given[IO_POOL_TENSORS] = {a->w1, a->w3, a->w2, a->b1, a->b3, a->b2};
    if (a->file)
        MOE_TRY(read_dense(d, gated, function));
    else
        memcpy(d->data, given, sizeof given);
    for (int64_t i = 0; i < l->count; i++)
        if (l->parameter[i].owner == IO_ROUTED)
            MOE_TRY(check_parameter(d, &l->parameter[i], a->write_bound == 1, function));
    fill_all(d, l);
    return moe__io_written(l, function);
}

moe_status moe_upcycle(moe_layer *layer, const moe_upcycle_args *args)
{
    const char *function = __func__;
    moe_upcycle_args a;
    moe__io_layer l;
    MOE_TRY(moe__io_enter(function));
    if (!layer || !args) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "%s is NULL", layer ? "args" : "layer");
    MOE_TRY(MOE__IO_READ(moe__io_upcycle_info, &a, args, function));
    MOE_TRY(moe__io_describe_whole(&l, layer, function));
    dense d = {.a = &a};
    moe_status status = upcycle(&l, &d, function);
    for (int t = 0; t < IO_POOL_TENSORS; t++) free(d.memory[t]);
    moe__io_describe_free(&l);
    return status;
}
