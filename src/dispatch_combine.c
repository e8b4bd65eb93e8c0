/* dispatch_combine.c - dispatch and combine around a host's own experts: their arguments. */
#include "internal.h"

static void args_defaults(void *instance) { *(moe_rows_args *)instance = (moe_rows_args){0}; }

const moe__struct_info moe__rows_args_info = MOE__STRUCT_INFO(moe_rows_args, args_defaults);

moe_status moe_rows_args_init(moe_rows_args *args, size_t size)
{
    return moe__struct_init(&moe__rows_args_info, args, size, __func__);
}

enum { TOKENS_IN = 1, TOKENS_OUT = 2, ROWS_IN = 4, ROWS_OUT = 8, ROWS_IN_FOR_WEIGHTS = 16 };

/* `needs` says which matrices the call cannot do without. */
static moe_status read_args(moe__rows_job *job, const moe__backend **kernels, const moe_plan *plan,
                            const moe_rows_args *args, int needs, const char *function)
{
    moe_rows_args a;
    if (!plan) REFUSE_ARGUMENT("plan is NULL");
    MOE_TRY(moe__struct_read(&moe__rows_args_info, &a, args, false, function));
    if (a.flags & ~(uint64_t)(MOE_ROWS_ADD | MOE_ROWS_UNWEIGHTED))
        REFUSE_ARGUMENT("flags 0x%llx has unknown bits", (unsigned long long)a.flags);
    if (a.width < 1) REFUSE_ARGUMENT("width is %lld", (ll)a.width);
    if (moe__real_dtype(a.dtype) != plan->a.dtype)
        REFUSE_ARGUMENT("dtype is %d, the plan's is %d", (int)a.dtype, (int)plan->a.dtype);
    if (a.reserved != 0) REFUSE_ARGUMENT("reserved is %d", (int)a.reserved);
    MOE_TRY(moe__check_stream(plan->context, a.stream, function));
    int64_t T = plan->a.tokens, element = moe__dtype_size(a.dtype);
    int64_t rows = plan->a.rows < 0 ? plan->a.entries : plan->a.rows; /* at most */
    MOE_TRY(moe__check_matrix("tokens_in", a.tokens_in, &a.tokens_in_stride, T, a.width, element,
                              needs & TOKENS_IN, function));
    MOE_TRY(moe__check_matrix("tokens_out", a.tokens_out, &a.tokens_out_stride, T, a.width, element,
                              needs & TOKENS_OUT, function));
    bool reads_rows = (needs & ROWS_IN) || ((needs & ROWS_IN_FOR_WEIGHTS) && a.entry_weight_grad);
    MOE_TRY(moe__check_matrix("rows_in", a.rows_in, &a.rows_in_stride, rows, a.width, element,
                              reads_rows, function));
    MOE_TRY(moe__check_matrix("rows_out", a.rows_out, &a.rows_out_stride, rows, a.width, element,
                              needs & ROWS_OUT, function));
    const moe__memory *memory = plan->context->memory;
    moe__workers workers = moe__workers_of(plan->context, function, a.stream);
    const struct {
        const char *name;
        const void *data;
    } array[] = {{"tokens_in", a.tokens_in},
                 {"tokens_out", a.tokens_out},
                 {"rows_in", a.rows_in},
                 {"rows_out", a.rows_out},
                 {"entry_weight_grad", a.entry_weight_grad}};
    for (size_t i = 0; memory->check_pointer && T > 0 && i < sizeof array / sizeof *array; i++)
        MOE_TRY(memory->check_pointer(&workers, array[i].name, array[i].data));
    *job = (moe__rows_job){.workers = moe__workers_of(plan->context, function, a.stream),
                           .plan = &plan->a,
                           .width = a.width,
                           .tokens_in = a.tokens_in,
                           .tokens_in_stride = a.tokens_in_stride,
                           .tokens_out = a.tokens_out,
                           .tokens_out_stride = a.tokens_out_stride,
                           .rows_in = a.rows_in,
                           .rows_in_stride = a.rows_in_stride,
                           .rows_out = a.rows_out,
                           .rows_out_stride = a.rows_out_stride,
                           .entry_weight_grad = a.entry_weight_grad,
                           .add = (a.flags & MOE_ROWS_ADD) != 0,
                           .unweighted = (a.flags & MOE_ROWS_UNWEIGHTED) != 0};
    *kernels = moe__kernels(plan->context, a.dtype);
    return MOE_OK;
}

static moe_status run(moe_status (*slot)(moe__rows_job *), moe__rows_job *job)
{
    const moe__memory *memory = job->workers.context->memory;
    fenv_t saved;
    moe__fenv_enter(&saved);
    moe_status status = memory->begin ? memory->begin(&job->workers) : MOE_OK;
    if (status == MOE_OK) {
        status = slot(job);
        if (memory->end) memory->end(&job->workers);
    }
    moe__fenv_leave(&saved);
    return status;
}

moe_status moe_dispatch_forward(const moe_plan *plan, const moe_rows_args *args)
{
    moe__rows_job job;
    const moe__backend *kernels;
    MOE_TRY(read_args(&job, &kernels, plan, args, TOKENS_IN | ROWS_OUT, __func__));
    return run(kernels->dispatch_forward, &job);
}

moe_status moe_dispatch_backward(const moe_plan *plan, const moe_rows_args *args)
{
    moe__rows_job job;
    const moe__backend *kernels;
    MOE_TRY(read_args(&job, &kernels, plan, args, ROWS_IN | TOKENS_OUT, __func__));
    return run(kernels->dispatch_backward, &job);
}

moe_status moe_combine_forward(const moe_plan *plan, const moe_rows_args *args)
{
    moe__rows_job job;
    const moe__backend *kernels;
    MOE_TRY(read_args(&job, &kernels, plan, args, ROWS_IN | TOKENS_OUT, __func__));
    return run(kernels->combine_forward, &job);
}

moe_status moe_combine_backward(const moe_plan *plan, const moe_rows_args *args)
{
    moe__rows_job job;
    const moe__backend *kernels;
    MOE_TRY(read_args(&job, &kernels, plan, args, TOKENS_IN | ROWS_IN_FOR_WEIGHTS, __func__));
    if (!job.rows_out && !job.entry_weight_grad && plan->a.rows != 0)
        return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__,
                         "rows_out and entry_weight_grad are both NULL");
    return run(kernels->combine_backward, &job);
}
