/* expert_other.c - experts that are no network of the library.
 *
 *     identity:   out[r] = x[t],  dx_row = weight dy[t]
 *     callback:   the host's forward(x rows) = out rows, backward(weight dy rows) = dx rows
 *
 * t is token_of_row[r]. The host's functions see an expert's rows dense and in order, on the
 * calling thread. */
#include "cpu/expert_other.h"

#include <fenv.h>
#include <string.h>

/* ---- rows ------------------------------------------------------------------------------------ */

/* to[r,:] = from[token_of_row[r],:] */
typedef struct gather {
    const moe__experts_job *job;
    const element *from;
    int64_t stride, width;
    element *to;
    bool weighted; /* times the row's weight */
} gather;

static void gather_range(void *argument, int64_t begin, int64_t end)
{
    const gather *g = argument;
    const real *weight = g->job->weight_of_row;
    int64_t first = job_first(g->job);
    for (int64_t r = first + begin; r < first + end; r++) {
        const element *from = g->from + g->job->plan->token_of_row[r] * g->stride;
        element *to = g->to + r * g->width;
        if (!g->weighted)
            memcpy(to, from, (size_t)g->width * sizeof *to);
        else
            for (int64_t j = 0; j < g->width; j++) to[j] = put(weight[r] * get(from[j]));
    }
}

static moe_status gather_rows(gather *g)
{
    const moe__workers *w = &g->job->workers;
    return moe__parallel_range(w->context, job_rows(g->job), 64, gather_range, g, w->function);
}

static moe_status gather_x(const moe__experts_job *job, void *to)
{
    gather g = {job, job->x, job->x_stride, job->config->d_model, to, false};
    return gather_rows(&g);
}

static moe_status gather_dy(const moe__experts_job *job, void *to)
{
    gather g = {job, job->dy, job->dy_stride, job->config->d_out, to, true};
    return gather_rows(&g);
}

/* ---- identity -------------------------------------------------------------------------------- */

moe_status MOE_KERNEL(identity_forward)(moe__experts_job *job) { return gather_x(job, job->out); }

moe_status MOE_KERNEL(identity_backward)(moe__experts_job *job)
{
    return job->dx_rows ? gather_dy(job, job->dx_rows) : MOE_OK;
}

/* ---- the host's functions -------------------------------------------------------------------- */

static void *row_of(const void *rows, int64_t r, int64_t bytes)
{
    return rows ? (char *)(uintptr_t)rows + r * bytes : NULL;
}

/* Calls `function` for every expert that has rows. The default floating-point environment is set
 * again after each: a host may have changed it. */
static moe_status call_host(const moe__experts_job *job, moe_expert_fn function, bool backward)
{
    const moe_experts_config *c = job->config;
    const int64_t *begin = job->plan->expert_begin;
    int64_t x_bytes = c->d_model * (int64_t)sizeof(element);
    int64_t out_bytes = c->d_out * (int64_t)sizeof(element);
    for (int64_t e = 0; e < job->plan->num_experts; e++) {
        int64_t r = begin[e];
        if (begin[e + 1] == r) continue;
        moe_expert_call call = {
            .struct_size = sizeof call,
            .expert = job->first_expert + e,
            .rows = begin[e + 1] - r,
            .x = row_of(job->x_rows, r, x_bytes),
            .out = row_of(job->out, r, out_bytes),
            .workspace = row_of(job->workspace, r - begin[0], c->callbacks->workspace_per_row),
            .dtype = c->dtype};
        if (backward) {
            call.dout = row_of(job->dz, r, out_bytes);
            call.dx = row_of(job->dx_rows, r, x_bytes);
            call.parameters = job->parameters;
        }
        int32_t answer = function(c->callbacks->user, &call);
        (void)fesetenv(FE_DFL_ENV);
        if (answer != 0)
            return moe__fail(MOE_ERROR_CALLBACK, job->workers.function,
                             "the %s of expert %lld returned %d", backward ? "backward" : "forward",
                             (ll)call.expert, (int)answer);
    }
    return MOE_OK;
}

moe_status MOE_KERNEL(callback_forward)(moe__experts_job *job)
{
    MOE_TRY(gather_x(job, job->x_rows));
    return call_host(job, job->config->callbacks->forward, false);
}

moe_status MOE_KERNEL(callback_backward)(moe__experts_job *job)
{
    MOE_TRY(gather_dy(job, job->dz));
    return call_host(job, job->config->callbacks->backward, true);
}
