/* nccl.c - groups of ranks over NCCL: creation of a communicator.
 *
 * A first contact of two ranks blocks inside NCCL when one of them does not come, so the ranks meet
 * on a thread of the creation; the caller waits for that, not for NCCL. */
#include "nccl_internal.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* ---- config ---------------------------------------------------------------------------------- */

static void config_defaults(void *instance)
{
    *(moe_nccl_config *)instance = (moe_nccl_config){.timeout = 60, .warm_up = 1};
}
static const moe__struct_info config_info = MOE__STRUCT_INFO(moe_nccl_config, config_defaults);

moe_status moe_nccl_config_init(moe_nccl_config *config, size_t size)
{
    return moe__module_struct_init(&config_info, config, size, __func__);
}

int32_t moe_nccl_version(void)
{
    int version = 0;
    return ncclGetVersion(&version) == ncclSuccess ? version : 0;
}

int32_t moe_nccl_oldest_version(void) { return MOE__NCCL_OLDEST; }

static moe_status check_versions(const char *function)
{
    char text[160];
    int32_t version = moe_nccl_version();
    if (moe__module_version() != MOE__MODULE_VERSION)
        (void)snprintf(text, sizeof text, "this module needs interface %d of libmoe, which has %d",
                       MOE__MODULE_VERSION, (int)moe__module_version());
    else if (version < MOE__NCCL_OLDEST)
        (void)snprintf(text, sizeof text, "NCCL is version %d; %d (2.18.0) or newer is needed",
                       (int)version, MOE__NCCL_OLDEST);
    else
        return MOE_OK;
    return moe__module_fail(MOE_ERROR_NOT_SUPPORTED, function, text);
}

static moe_status read_config(moe_nccl_config *k, const moe_nccl_config *config,
                              const char *function)
{
    char text[160] = "";
    MOE_TRY(check_versions(function));
    if (!config) return moe__module_fail(MOE_ERROR_INVALID_ARGUMENT, function, "config is NULL");
    MOE_TRY(moe__module_struct_read(&config_info, k, config, function));
    if (!k->comm)
        (void)snprintf(text, sizeof text, "config->comm is NULL");
    else if (!(k->timeout > 0 && k->timeout <= 1e9))
        (void)snprintf(text, sizeof text,
                       "timeout is %g; it must be above 0 and at most 1e9 seconds", k->timeout);
    else if (k->duplicate != 0 && k->duplicate != 1)
        (void)snprintf(text, sizeof text, "duplicate is %d", (int)k->duplicate);
    else if (k->warm_up != 0 && k->warm_up != 1)
        (void)snprintf(text, sizeof text, "warm_up is %d", (int)k->warm_up);
    return text[0] ? moe__module_fail(MOE_ERROR_INVALID_ARGUMENT, function, text) : MOE_OK;
}

/* ---- the group ------------------------------------------------------------------------------- */

static int64_t lay_out(moe__nccl_group *g, void *memory)
{
    moe__arena arena = {memory, 0};
    g->no_rows = moe__arena_take(&arena, (int64_t)g->size + 1, sizeof *g->no_rows);
    for (int i = 0; i <= MOE_COMM_REQUESTS; i++) {
        moe__nccl_exchange *x = &g->exchange[i];
        x->group = g;
        x->send_at = moe__arena_take(&arena, g->size, sizeof *x->send_at);
        x->send_bytes = moe__arena_take(&arena, g->size, sizeof *x->send_bytes);
        x->recv_at = moe__arena_take(&arena, g->size, sizeof *x->recv_at);
        x->recv_bytes = moe__arena_take(&arena, g->size, sizeof *x->recv_bytes);
    }
    return arena.used;
}

/* What the host's communicator says of itself, once it is ready. */
static int32_t read_communicator(moe__nccl_group *g)
{
    int size = 0, rank = 0, device = 0;
    const char *call = "ncclCommCount";
    int32_t answer = moe__nccl_settle(g, g->deadline);
    if (answer != 0) return answer;
    ncclResult_t result = ncclCommCount(g->nccl, &size);
    if (result == ncclSuccess) call = "ncclCommUserRank", result = ncclCommUserRank(g->nccl, &rank);
    if (result == ncclSuccess)
        call = "ncclCommCuDevice", result = ncclCommCuDevice(g->nccl, &device);
    if (result != ncclSuccess) return moe__nccl_say(g, call, result);
    g->size = size;
    g->rank = rank;
    g->device = device;
    return 0;
}

static moe_status fail(const moe__nccl_group *g, moe_status status, const char *function)
{
    return moe__module_fail(status, function, g->why);
}

static moe_status too_late(moe__nccl_group *g, const char *function)
{
    (void)snprintf(g->why, sizeof g->why, "rank %d of %d waited %g s for all ranks", (int)g->rank,
                   (int)g->size, g->timeout);
    return fail(g, MOE_ERROR_TIMEOUT, function);
}

static moe_status make_group(moe__nccl_group **group, moe_context *context,
                             const moe_nccl_config *k, const char *function)
{
    moe__nccl_group *g = moe__module_alloc(context, sizeof *g);
    if (!g) return moe__module_fail(MOE_ERROR_OUT_OF_MEMORY, function, "no memory for the group");
    g->context = context;
    g->nccl = (ncclComm_t)k->comm;
    g->stream = (cudaStream_t)k->stream;
    g->own_stream = !k->stream;
    g->timeout = k->timeout;
    g->deadline = moe__nccl_seconds() + k->timeout;
    g->duplicate = k->duplicate != 0;
    g->warm_up = k->warm_up != 0;
    g->next = !g->warm_up; /* the meeting is number 0, also where there is none */
    g->process = getpid();
    *(void **)&g->revoke = dlsym(RTLD_DEFAULT, "ncclCommRevoke");
    *(void **)&g->all_to_all = dlsym(RTLD_DEFAULT, "ncclAlltoAll");
    atomic_init(&g->wanted, false);
    atomic_init(&g->aborted, false);
    atomic_init(&g->meeting, MOE__NCCL_MEETING);
    if (pthread_mutex_init(&g->lock, NULL) != 0) {
        moe__module_free(context, g, sizeof *g);
        return moe__module_fail(MOE_ERROR_SYSTEM, function, "no mutex");
    }
    moe__module_retain(context);
    *group = g;
    int32_t answer = read_communicator(g);
    if (answer != 0)
        return answer == MOE_COMM_LATE ? too_late(g, function)
                                       : fail(g, MOE_ERROR_TRANSPORT, function);
    g->piece = moe__max(MOE__NCCL_PIECE, MOE__NCCL_STAGING / g->size / 64 * 64);
    g->memory_bytes = lay_out(g, NULL);
    g->memory = moe__module_alloc(context, g->memory_bytes);
    if (!g->memory) {
        g->memory_bytes = 0;
        return moe__module_fail(MOE_ERROR_OUT_OF_MEMORY, function, "no memory for the group");
    }
    (void)lay_out(g, g->memory);
    return MOE_OK;
}

static moe_status equip(moe__nccl_group *g, const char *function)
{
    moe__nccl_scope scope;
    int captured = MOE__NCCL_NOT_CAPTURED;
    if (!moe__nccl_enter_call(g, &scope)) return fail(g, MOE_ERROR_DEVICE, function);
    cudaError_t error = cudaSuccess;
    if (!g->own_stream) error = moe__nccl_captured(g->stream, &captured);
    bool fits = error != cudaSuccess || captured || moe__nccl_has_stream(g);
    if (error == cudaSuccess && !captured && fits) error = moe__nccl_equip(g);
    if (error != cudaSuccess) (void)moe__nccl_say_cuda(g, "streams and staging", error);
    moe__nccl_leave(&scope);
    if (captured)
        return moe__module_fail(MOE_ERROR_INVALID_STATE, function,
                                "config->stream is being captured");
    if (!fits) {
        (void)snprintf(g->why, sizeof g->why, "config->stream is no stream of device %d",
                       (int)g->device);
        return fail(g, MOE_ERROR_INVALID_ARGUMENT, function);
    }
    if (error == cudaSuccess) return MOE_OK;
    return fail(g, error == cudaErrorMemoryAllocation ? MOE_ERROR_OUT_OF_MEMORY : MOE_ERROR_DEVICE,
                function);
}

/* ---- the table ------------------------------------------------------------------------------- */

static void nccl_release(void *user) { moe__nccl_end_group(user); }

static const char *nccl_why(void *user) { return ((moe__nccl_group *)user)->why; }

/* ---- meeting --------------------------------------------------------------------------------- */

/* Of a communicator that does not block NCCL writes the duplicate when it is made; the call may say
 * ncclSuccess before. One that failed is handed out too, and owned: it ends with the group. */
static int32_t split(moe__nccl_group *g)
{
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    config.splitShare = 0;
    if (!moe__nccl_begin(g)) return 1;
    ncclResult_t result = ncclCommSplit(g->nccl, 0, g->rank, &g->split, &config);
    moe__nccl_end(g);
    int32_t answer = 0;
    if (result == ncclSuccess || result == ncclInProgress) {
        g->in_progress = !g->split; /* as far as that shows */
        answer = moe__nccl_settle(g, g->deadline);
        g->splitting = answer != 0 && g->in_progress;
        if (g->splitting) return answer;
    } else {
        answer = moe__nccl_say(g, "ncclCommSplit", result);
    }
    g->owned = g->split != NULL;
    if (g->owned) g->nccl = g->split;
    if (answer != 0) return answer;
    if (!g->owned) return moe__nccl_say(g, "ncclCommSplit", ncclInternalError);
    return moe__nccl_settle(g, g->deadline);
}

static void *meet(void *argument)
{
    moe__nccl_group *g = argument;
    moe__nccl_scope scope;
    g->answer = 1;
    if (moe__nccl_enter_thread(g, &scope)) {
        g->answer = g->duplicate ? split(g) : 0;
        if (g->answer == 0 && g->warm_up) g->answer = moe__nccl_meet(g, g->deadline);
        moe__nccl_leave(&scope);
    }
    if (atomic_exchange(&g->meeting, MOE__NCCL_MET) == MOE__NCCL_LEFT) {
        atomic_store(&g->aborted, true);
        moe__nccl_end_group(g);
    }
    return NULL;
}

/* True if the thread has come to its end; else it is inside NCCL and owns the group from now on. A
 * thread that is not there begins no call of NCCL after the deadline: the host may abort its
 * communicator when it has the error. */
static bool wait_for(moe__nccl_group *g, pthread_t thread)
{
    const double grace = 0.7; /* longer than it takes a thread to find out, if the process runs */
    double begin = moe__nccl_seconds(), now = begin, over = 0;
    while (atomic_load(&g->meeting) == MOE__NCCL_MEETING && over < grace) {
        double before = now;
        moe__nccl_rest(now - begin);
        now = moe__nccl_seconds();
        if (now <= g->deadline) continue;
        atomic_store(&g->wanted, true);
        over += now - before < 1e-3 ? now - before : 1e-3; /* it may have been stopped */
    }
    if (atomic_load(&g->meeting) == MOE__NCCL_MEETING &&
        atomic_exchange(&g->meeting, MOE__NCCL_LEFT) == MOE__NCCL_MEETING) {
        (void)pthread_detach(thread);
        return false;
    }
    (void)pthread_join(thread, NULL);
    return true;
}

/* All ranks meet. *group is NULL after an error that leaves it to the thread. */
static moe_status bring_together(moe__nccl_group **group, const char *function)
{
    moe__nccl_group *g = *group;
    pthread_t thread;
    char text[160];
    if (g->size == 1 || (!g->duplicate && !g->warm_up)) return MOE_OK;
    (void)snprintf(
        text, sizeof text,
        "rank %d of %d waited %g s for all ranks to make this call; NCCL has not returned",
        (int)g->rank, (int)g->size, g->timeout);
    if (moe__nccl_start_thread(&thread, meet, g) != 0)
        return moe__module_fail(MOE_ERROR_SYSTEM, function, "no thread");
    if (!wait_for(g, thread)) {
        *group = NULL;
        return moe__module_fail(MOE_ERROR_TIMEOUT, function, text);
    }
    if (g->answer == 0) return MOE_OK;
    bool late = g->answer == MOE_COMM_LATE || atomic_load(&g->wanted);
    atomic_store(&g->wanted, true); /* work of this rank waits for others */
    return late ? too_late(g, function) : fail(g, MOE_ERROR_TRANSPORT, function);
}

/* ---- creation -------------------------------------------------------------------------------- */

static moe_status check_device(const moe__nccl_group *g, const char *function)
{
    char text[120];
    int32_t device = moe_cuda_device(g->context);
    if (device == g->device) return MOE_OK;
    (void)snprintf(text, sizeof text, "config->comm is on device %d, the context is on device %d",
                   (int)g->device, (int)device);
    return moe__module_fail(MOE_ERROR_INVALID_ARGUMENT, function, text);
}

static moe_status make_ready(moe__nccl_group **group, moe_context *context,
                             const moe_nccl_config *k, const char *function)
{
    MOE_TRY(make_group(group, context, k, function));
    MOE_TRY(check_device(*group, function));
    MOE_TRY(equip(*group, function));
    return bring_together(group, function);
}

moe_status moe_comm_create_nccl(moe_comm **comm, moe_context *context,
                                const moe_nccl_config *config)
{
    moe_nccl_config k;
    moe__nccl_group *g = NULL;
    const char *function = __func__;
    if (!comm || !context)
        return moe__module_fail(MOE_ERROR_INVALID_ARGUMENT, function,
                                comm ? "context is NULL" : "comm is NULL");
    MOE_TRY(read_config(&k, config, function));
    if (moe_cuda_device(context) < 0)
        return moe__module_fail(MOE_ERROR_INVALID_ARGUMENT, function, "context is not on a GPU");
    moe_status status = make_ready(&g, context, &k, function);
    if (status != MOE_OK) {
        if (g) moe__nccl_end_group(g);
        return status;
    }
    moe_collectives table = {.struct_size = sizeof table,
                             .user = g,
                             .rank = g->rank,
                             .size = g->size,
                             .capabilities = MOE_COMM_HOST_MEMORY | MOE_COMM_DEVICE_MEMORY |
                                             MOE_COMM_STREAM_ORDERED | MOE_COMM_CAPTURABLE,
                             .timeout = k.timeout,
                             .exchange_start = moe__nccl_start,
                             .exchange_test = moe__nccl_test,
                             .exchange_cancel = moe__nccl_cancel,
                             .missing = moe__nccl_missing,
                             .poll = moe__nccl_poll,
                             .abort = moe__nccl_abort,
                             .release = nccl_release};
    return moe__module_comm(comm, context, &table, nccl_why, function);
}
