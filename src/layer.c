/* layer.c - the layer's calls: a forward or backward at once, or in its three phases. The steps are
 * in forward.c and backward.c, the object is in layer_object.c. */
#include "pass_state.h"

#include <string.h>

/* ---- what the phases share ------------------------------------------------------------------- */

moe_status moe__pass_check_idle(const moe_pass *pass, const char *function)
{
    if (pass->call.phase != MOE__PHASE_NONE)
        REFUSE(MOE_ERROR_INVALID_STATE, "the pass is in the middle of a %s",
               pass->backward ? "backward" : "forward");
    return MOE_OK;
}

/* With every rank's passes alike, they all refuse here, and no exchange is begun. */
moe_status moe__pass_check_start(const moe_pass *pass, int32_t uses, const char *function)
{
    MOE_TRY(moe__pass_check_idle(pass, function));
    if (!moe__pass_has_ranks(pass, uses)) return MOE_OK;
    const moe_comm *comm = moe__pass_comm(pass), *rail = pass->layer->config.rail_comm;
    int32_t held = moe__comm_in_flight(comm) + (rail != comm ? moe__comm_in_flight(rail) : 0);
    int64_t chunks = moe__ranks_chunks(pass);
    if (held + chunks <= MOE_COMM_REQUESTS) return MOE_OK;
    if (chunks > 1)
        REFUSE(MOE_ERROR_INVALID_STATE, "%d exchanges of the group are in flight, a call has %lld",
               (int)held, (ll)chunks);
    /* A pass between start and finish has one, of either. */
    REFUSE(MOE_ERROR_INVALID_STATE, "%d passes of the group are between start and finish",
           MOE_COMM_REQUESTS);
}

void moe__set_workers(moe_pass *pass, const char *function, void *stream)
{
    pass->workers.function = function;
    pass->workers.stream = stream;
    pass->route.workers = pass->experts_job.workers = pass->workers;
}

/* A layer on several ranks takes part in every call, so that the others need not wait for one that
 * fails here; and what it has in flight is given up. */
moe_status moe__fail_on_ranks(moe_pass *pass, int32_t uses, moe_status status, const char *function)
{
    if (status == MOE_OK || !moe__pass_has_ranks(pass, uses)) return status;
    if (pass->ranks.took_part) return moe__ranks_stop(pass, status);
    const moe_pass_report report = pass->report; /* a call that is refused is in none */
    status = moe__ranks_decline(pass, pass->backward, status, function);
    pass->report = report;
    return status;
}

moe_status moe__refuse_on_ranks(moe_pass *pass, int32_t uses, moe_status status,
                                const char *function, void *stream)
{
    const moe__memory *memory = pass->context->memory;
    const moe__workers held = pass->workers;
    char message[MOE__MESSAGE_SIZE];
    if (memory->is_host || !moe__pass_has_ranks(pass, uses))
        return moe__fail_on_ranks(pass, uses, status, function);
    memcpy(message, moe_last_error(), sizeof message);
    pass->workers.stream = stream;
    pass->workers.function = function;
    bool begun = memory->begin && memory->begin(&pass->workers) == MOE_OK;
    moe__restore_message(message);
    status = moe__fail_on_ranks(pass, uses, status, function);
    if (begun) memory->end(&pass->workers);
    pass->workers = held;
    return status;
}

void moe__begin_report(moe_pass *pass)
{
    if (!pass->backward) pass->report = (moe_pass_report){.struct_size = sizeof pass->report};
    for (int i = 0; i < MOE_TIME_SLOTS; i++) pass->report.backward_seconds[i] = 0;
    pass->report.backward_bytes_sent = pass->report.backward_bytes_received = 0;
    moe__continue_report(pass);
}

void moe__continue_report(moe_pass *pass) { pass->lap_from = moe__seconds(); }

void moe__lap(moe_pass *pass, int slot)
{
    double now = moe__seconds();
    double *seconds = pass->backward ? pass->report.backward_seconds : pass->report.forward_seconds;
    seconds[slot] += now - pass->lap_from;
    pass->lap_from = now;
}

moe_status moe__enter_phase(moe_pass *pass, const char *function, void *stream, fenv_t *saved)
{
    const moe__memory *memory = pass->context->memory;
    moe__set_workers(pass, function, stream);
    moe__continue_report(pass);
    moe__fenv_enter(saved);
    moe_status status = memory->begin ? memory->begin(&pass->workers) : MOE_OK;
    pass->begun = status == MOE_OK;
    return status;
}

moe_status moe__leave_phase(moe_pass *pass, int32_t uses, moe_status status, const char *function,
                            const fenv_t *saved)
{
    const moe__memory *memory = pass->context->memory;
    status = moe__fail_on_ranks(pass, uses, status, function);
    if (memory->end && pass->begun) memory->end(&pass->workers);
    pass->begun = false;
    moe__fenv_leave(saved);
    return status;
}

/* ---- the calls ------------------------------------------------------------------------------- */

static moe_status check_pass(const moe_layer *layer, const moe_pass *pass, const char *function)
{
    if (!layer) REFUSE_ARGUMENT("layer is NULL");
    if (!pass) REFUSE_ARGUMENT("pass is NULL");
    if (pass->layer != layer) REFUSE_ARGUMENT("the pass was made for another layer");
    return MOE_OK;
}

static int32_t uses_of(const moe_layer *layer)
{
    return MOE__USE_LAYER | MOE__USE_EXPERTS | (layer->gate ? MOE__USE_GATE : 0);
}

moe_status moe_layer_forward(moe_layer *layer, moe_pass *pass, const moe_forward_args *args)
{
    MOE_TRY(check_pass(layer, pass, __func__));
    return moe__run_forward(pass, args, uses_of(layer), __func__);
}

moe_status moe_layer_backward(moe_layer *layer, moe_pass *pass, const moe_backward_args *args)
{
    MOE_TRY(check_pass(layer, pass, __func__));
    return moe__run_backward(pass, args, uses_of(layer), __func__);
}

/* ---- in phases ------------------------------------------------------------------------------- */

/* Whether the pass is between start and finish of a forward, or of a backward, with its work still
 * to be done if `to_work`. */
static moe_status check_phase(const moe_layer *layer, const moe_pass *pass, bool backward,
                              bool to_work, const char *function)
{
    MOE_TRY(check_pass(layer, pass, function));
    const char *name = backward ? "backward" : "forward";
    if (pass->call.phase == MOE__PHASE_NONE || pass->backward != backward)
        REFUSE(MOE_ERROR_INVALID_STATE, "no %s of the pass has been started", name);
    if (to_work && pass->call.phase == MOE__PHASE_WORKED)
        REFUSE(MOE_ERROR_INVALID_STATE, "the work of the %s is done", name);
    return MOE_OK;
}

moe_status moe_layer_forward_start(moe_layer *layer, moe_pass *pass, const moe_forward_args *args)
{
    MOE_TRY(check_pass(layer, pass, __func__));
    return moe__forward_start(pass, args, uses_of(layer), __func__);
}

moe_status moe_layer_forward_work(moe_layer *layer, moe_pass *pass)
{
    MOE_TRY(check_phase(layer, pass, false, true, __func__));
    return moe__forward_work(pass, __func__);
}

moe_status moe_layer_forward_finish(moe_layer *layer, moe_pass *pass)
{
    MOE_TRY(check_phase(layer, pass, false, false, __func__));
    if (pass->call.phase == MOE__PHASE_STARTED) MOE_TRY(moe__forward_work(pass, __func__));
    return moe__forward_finish(pass, __func__);
}

moe_status moe_layer_backward_start(moe_layer *layer, moe_pass *pass, const moe_backward_args *args)
{
    MOE_TRY(check_pass(layer, pass, __func__));
    return moe__backward_start(pass, args, uses_of(layer), __func__);
}

moe_status moe_layer_backward_work(moe_layer *layer, moe_pass *pass)
{
    MOE_TRY(check_phase(layer, pass, true, true, __func__));
    return moe__backward_work(pass, __func__);
}

moe_status moe_layer_backward_finish(moe_layer *layer, moe_pass *pass)
{
    MOE_TRY(check_phase(layer, pass, true, false, __func__));
    if (pass->call.phase == MOE__PHASE_STARTED) MOE_TRY(moe__backward_work(pass, __func__));
    return moe__backward_finish(pass, __func__);
}

int64_t moe_layer_expert_number(const moe_layer *layer, int64_t index)
{
    if (!layer || index < 0 || index >= layer->experts->config.num_experts) return -1;
    return moe__expert_number(layer, index);
}
