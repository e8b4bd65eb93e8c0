/* mpi.c - ranks over MPI: messages between two ranks only, so that silence has a name.
 *
 * An exchange sends every rank a note (its number, rows and bytes of a row) and, if there are rows,
 * the rows. What a rank sends is checked against what is expected here before it counts as
 * received. A rank that gives up sends every other a message without contents on a second
 * duplicate, whose tag is the rank it waited for. No call blocks. */
#include <mpi.h>

#include "internal.h"
#include "module.h"

#include <moe/mpi.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

enum { TAG_NOTE = 1, TAG_ROWS = 2 };

/* What a rank says of the rows it sends. */
typedef struct note {
    int64_t number; /* of the exchange, counted by every rank alike */
    int64_t rows, row_bytes, reserved;
} note;

/* One exchange. The four requests of rank p: note in, rows in, note out, rows out. */
enum { NOTE_IN, ROWS_IN, NOTE_OUT, ROWS_OUT, PER_RANK };

typedef struct mpi_group mpi_group;
typedef struct mpi_exchange {
    mpi_group *group;
    MPI_Request *request; /* [P,PER_RANK] */
    note *in, *out;       /* [P] */
    int64_t *expected;    /* [P] rows from each rank */
    int64_t number, row_bytes, bytes;
    int32_t noted; /* ranks whose note is good */
    bool active;
    bool bad;  /* not all of its messages could be posted */
    bool kept; /* given up with messages under way */
} mpi_exchange;

struct mpi_group {
    moe_context *context;
    MPI_Comm comm, alarm; /* duplicates of the host's */
    int32_t rank, size;
    int64_t next;        /* number of the next exchange */
    int32_t silent;      /* the first rank that was waited for in vain, or -1 */
    int32_t first;       /* the first rank that gave up, as far as this one was told, or -1 */
    pthread_t owner;     /* the thread that made it */
    bool any_thread;     /* MPI may be called from any thread */
    atomic_bool alarmed; /* the others have been told */
    atomic_bool wanted;  /* they are to be told by the owner */
    bool failed, made;
    mpi_exchange exchange[MOE_COMM_REQUESTS];
    void *memory;
    int64_t bytes;
    char why[MPI_MAX_ERROR_STRING + 120];
};

/* ---- errors of MPI --------------------------------------------------------------------------- */

static int32_t say(mpi_group *g, const char *call, int code)
{
    int length = 0;
    char text[MPI_MAX_ERROR_STRING + 1] = "";
    if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) text[0] = 0;
    (void)snprintf(g->why, sizeof g->why, "%s: %s", call, text);
    g->failed = true;
    return 1;
}

#define TRY_MPI(g, call, arguments)                                    \
    do {                                                               \
        int try_code = call arguments;                                 \
        if (try_code != MPI_SUCCESS) return say((g), #call, try_code); \
    } while (0)

/* ---- giving up ------------------------------------------------------------------------------- */

/* Tells every other rank, once. Nothing of this rank's memory is sent. The tag says why: 0, or 1 +
 * the rank that was waited for in vain, or 1 + P + the rank that gave up before, so that a word
 * passed on names where it began. */
static void tell_others(mpi_group *g)
{
    int finalized = 0;
    int tag = g->silent >= 0 ? g->silent + 1 : g->first >= 0 ? g->size + 1 + g->first : 0;
    if (atomic_exchange(&g->alarmed, true)) return;
    (void)MPI_Finalized(&finalized);
    for (int32_t p = 0; p < g->size && !finalized; p++) {
        MPI_Request request = MPI_REQUEST_NULL;
        if (p == g->rank) continue;
        if (MPI_Isend(NULL, 0, MPI_BYTE, p, tag, g->alarm, &request) == MPI_SUCCESS)
            (void)MPI_Request_free(&request);
    }
}

static void mpi_abort(void *user)
{
    mpi_group *g = user;
    if (g->any_thread || pthread_equal(pthread_self(), g->owner))
        tell_others(g);
    else
        atomic_store(&g->wanted, true);
}

/* Whether another rank has given up; says which. */
static int32_t mpi_poll(void *user)
{
    mpi_group *g = user;
    MPI_Status status;
    int there = 0;
    if (atomic_load(&g->wanted)) tell_others(g);
    TRY_MPI(g, MPI_Iprobe, (MPI_ANY_SOURCE, MPI_ANY_TAG, g->alarm, &there, &status));
    if (!there) return 0;
    g->first = status.MPI_TAG > g->size ? status.MPI_TAG - g->size - 1 : status.MPI_SOURCE;
    g->silent = status.MPI_TAG > 0 && status.MPI_TAG <= g->size ? status.MPI_TAG - 1 : -1;
    if (g->silent >= 0)
        (void)snprintf(g->why, sizeof g->why, "rank %d gave up waiting for rank %d",
                       status.MPI_SOURCE, (int)g->silent);
    else
        (void)snprintf(g->why, sizeof g->why, "rank %d gave up", (int)g->first);
    g->failed = true;
    return 1;
}

/* ---- exchange -------------------------------------------------------------------------------- */

/* One row as one element, so that counts are rows. */
static int32_t make_row(mpi_group *g, int64_t bytes, MPI_Datatype *row)
{
    if (bytes > INT32_MAX) {
        (void)snprintf(g->why, sizeof g->why, "a row of %lld bytes is more than MPI counts",
                       (ll)bytes);
        return 1;
    }
    TRY_MPI(g, MPI_Type_contiguous, ((int)bytes, MPI_BYTE, row));
    TRY_MPI(g, MPI_Type_commit, (row));
    return 0;
}

static int32_t too_many(mpi_group *g, const char *what, int32_t rank, int64_t rows)
{
    if (rows <= INT32_MAX) return 0;
    (void)snprintf(g->why, sizeof g->why, "%lld rows %s rank %d are more than MPI counts", (ll)rows,
                   what, (int)rank);
    return 1;
}

/* Posts all messages of one exchange with one rank. */
static int32_t post(mpi_exchange *x, const moe_exchange *e, int32_t p, MPI_Datatype row)
{
    mpi_group *g = x->group;
    MPI_Request *request = x->request + (int64_t)p * PER_RANK;
    int64_t first = e->to_all ? 0 : e->send_begin[p];
    int64_t rows = e->to_all ? e->send_begin[1] : e->send_begin[p + 1] - e->send_begin[p];
    int64_t expected = e->recv_begin[p + 1] - e->recv_begin[p];
    x->expected[p] = expected;
    x->out[p] = (note){x->number, rows, e->row_bytes, 0};
    if (too_many(g, "to", p, rows) || too_many(g, "from", p, expected)) return 1;
    char *recv = e->recv ? (char *)e->recv + e->recv_begin[p] * e->row_bytes : NULL;
    const char *send = e->send ? (const char *)e->send + first * e->row_bytes : NULL;
    TRY_MPI(g, MPI_Irecv,
            (&x->in[p], (int)sizeof *x->in, MPI_BYTE, p, TAG_NOTE, g->comm, &request[NOTE_IN]));
    if (expected > 0)
        TRY_MPI(g, MPI_Irecv, (recv, (int)expected, row, p, TAG_ROWS, g->comm, &request[ROWS_IN]));
    TRY_MPI(g, MPI_Isend,
            (&x->out[p], (int)sizeof *x->out, MPI_BYTE, p, TAG_NOTE, g->comm, &request[NOTE_OUT]));
    if (rows > 0)
        TRY_MPI(g, MPI_Isend, (send, (int)rows, row, p, TAG_ROWS, g->comm, &request[ROWS_OUT]));
    return 0;
}

/* This rank's own rows. */
static int32_t copy_own(mpi_exchange *x, const moe_exchange *e)
{
    mpi_group *g = x->group;
    int32_t p = g->rank;
    int64_t first = e->to_all ? 0 : e->send_begin[p];
    int64_t rows = e->to_all ? e->send_begin[1] : e->send_begin[p + 1] - e->send_begin[p];
    int64_t expected = e->recv_begin[p + 1] - e->recv_begin[p];
    if (rows != expected) {
        (void)snprintf(g->why, sizeof g->why, "%lld rows for itself, %lld are expected", (ll)rows,
                       (ll)expected);
        return 1;
    }
    if (rows > 0)
        memcpy((char *)e->recv + e->recv_begin[p] * e->row_bytes,
               (const char *)e->send + first * e->row_bytes, (size_t)(rows * e->row_bytes));
    return 0;
}

static int32_t mpi_start(void *user, const moe_exchange *e, void **handle)
{
    mpi_group *g = user;
    mpi_exchange *x = NULL;
    MPI_Datatype row = MPI_DATATYPE_NULL;
    for (int i = 0; i < MOE_COMM_REQUESTS && !x; i++)
        if (!g->exchange[i].active && !g->exchange[i].kept) x = &g->exchange[i];
    if (!x || g->failed) return 1; /* there is one: the communicator starts no more */
    if (make_row(g, e->row_bytes, &row)) return 1;
    x->number = g->next++;
    x->row_bytes = e->row_bytes;
    x->bytes = (e->recv_begin[g->size] + e->send_begin[e->to_all ? 1 : g->size]) * e->row_bytes;
    x->noted = 1; /* its own */
    x->active = true;
    x->bad = false;
    for (int64_t i = 0; i < (int64_t)g->size * PER_RANK; i++) x->request[i] = MPI_REQUEST_NULL;
    x->bad = copy_own(x, e) != 0;
    /* Each rank begins with its neighbour, so that not all send to the same one. */
    for (int32_t i = 1; i < g->size && !x->bad; i++)
        x->bad = post(x, e, (g->rank + i) % g->size, row) != 0;
    (void)MPI_Type_free(&row);
    *handle = x; /* also if bad, which a test tells: then what was posted is given up with it */
    return 0;
}

/* Compares a note that has come with what is expected. */
static int32_t check_note(mpi_exchange *x, int32_t p)
{
    mpi_group *g = x->group;
    const note *in = &x->in[p];
    if (in->number == x->number && in->rows == x->expected[p] && in->row_bytes == x->row_bytes)
        return 0;
    (void)snprintf(
        g->why, sizeof g->why,
        "in exchange %lld rank %d sends %lld rows of %lld bytes in its exchange %lld, here "
        "%lld of %lld are expected",
        (ll)x->number, (int)p, (ll)in->rows, (ll)in->row_bytes, (ll)in->number, (ll)x->expected[p],
        (ll)x->row_bytes);
    g->failed = true;
    return 1;
}

/* Notes first: rows of another number than expected here are MPI's error, without the numbers. */
static int32_t test_notes(mpi_exchange *x)
{
    mpi_group *g = x->group;
    for (int32_t p = 0; p < g->size && x->noted < g->size; p++) {
        MPI_Request *request = &x->request[(int64_t)p * PER_RANK + NOTE_IN];
        int done = 0;
        if (*request == MPI_REQUEST_NULL) continue;
        TRY_MPI(g, MPI_Test, (request, &done, MPI_STATUS_IGNORE));
        if (!done) continue;
        if (check_note(x, p)) return 1;
        x->noted++;
    }
    return 0;
}

/* All messages, each until it is done. */
static int32_t test_messages(mpi_exchange *x, int *all)
{
    mpi_group *g = x->group;
    *all = 1;
    for (int64_t i = 0; i < (int64_t)g->size * PER_RANK; i++) {
        int done = 1;
        if (x->request[i] != MPI_REQUEST_NULL)
            TRY_MPI(g, MPI_Test, (&x->request[i], &done, MPI_STATUS_IGNORE));
        *all = *all && done;
    }
    return 0;
}

static int32_t mpi_test(void *user, void *handle, int32_t *done)
{
    mpi_group *g = user;
    mpi_exchange *x = handle;
    int all = 0;
    if (x->bad || test_notes(x)) return 1;
    if (x->noted == g->size && test_messages(x, &all)) return 1;
    if (all) {
        x->active = false;
        *done = MOE_COMM_DONE;
        return 0;
    }
    return mpi_poll(g); /* what is complete stays so, whoever gives up after it */
}

static void mpi_missing(void *user, void *handle, uint8_t *missing)
{
    mpi_group *g = user;
    const mpi_exchange *x = handle;
    g->silent = -1;
    for (int32_t p = 0; p < g->size; p++) {
        int here = 1;
        for (int i = 0; i < PER_RANK && here; i++) {
            MPI_Request request = x->request[(int64_t)p * PER_RANK + i];
            if (request != MPI_REQUEST_NULL &&
                MPI_Request_get_status(request, &here, MPI_STATUS_IGNORE) != MPI_SUCCESS)
                here = 0;
        }
        missing[p] = !here;
        if (!here && g->silent < 0) g->silent = p;
    }
}

/* Receives can be withdrawn unless they are under way; sends cannot, but short ones are
 * complete. */
static int64_t mpi_cancel(void *user, void *handle)
{
    mpi_group *g = user;
    mpi_exchange *x = handle;
    int all = 0, finalized = 0;
    (void)MPI_Finalized(&finalized);
    for (int64_t i = 0; i < (int64_t)g->size * PER_RANK && !finalized; i++)
        if ((i % PER_RANK == NOTE_IN || i % PER_RANK == ROWS_IN) &&
            x->request[i] != MPI_REQUEST_NULL)
            (void)MPI_Cancel(&x->request[i]);
    for (int turn = 0; turn < 100 && !all && !finalized; turn++) {
        struct timespec pause = {0, 1000000};
        all = 1;
        for (int64_t i = 0; i < (int64_t)g->size * PER_RANK; i++) {
            int done = 1;
            if (x->request[i] != MPI_REQUEST_NULL)
                (void)MPI_Test(&x->request[i], &done, MPI_STATUS_IGNORE);
            all = all && done;
        }
        if (!all) (void)nanosleep(&pause, NULL);
    }
    x->active = false;
    x->kept = !all && !finalized;
    return x->kept ? x->bytes + g->bytes : 0;
}

/* ---- life ------------------------------------------------------------------------------------ */

static void free_group(mpi_group *g)
{
    moe__module_free(g->context, g->memory, g->bytes);
    moe__module_free(g->context, g, sizeof *g);
}

static void mpi_release(void *user)
{
    mpi_group *g = user;
    int finalized = 0;
    bool kept = false;
    (void)MPI_Finalized(&finalized);
    if (atomic_load(&g->wanted) || !g->made) tell_others(g);
    for (int i = 0; i < MOE_COMM_REQUESTS; i++) kept = kept || g->exchange[i].kept;
    /* To free a communicator is a call of all ranks: not one to make after a failure. */
    if (!finalized && !g->failed && !atomic_load(&g->alarmed)) {
        (void)MPI_Comm_free(&g->comm);
        (void)MPI_Comm_free(&g->alarm);
    }
    if (!kept) free_group(g); /* else messages under way may touch it */
}

static const char *mpi_why(void *user) { return ((mpi_group *)user)->why; }

static int64_t lay_out(mpi_group *g, char *memory)
{
    moe__arena arena = {memory, 0};
    for (int i = 0; i < MOE_COMM_REQUESTS; i++) {
        mpi_exchange *x = &g->exchange[i];
        x->group = g;
        x->request = moe__arena_take(&arena, (int64_t)g->size * PER_RANK, sizeof *x->request);
        x->in = moe__arena_take(&arena, g->size, sizeof *x->in);
        x->out = moe__arena_take(&arena, g->size, sizeof *x->out);
        x->expected = moe__arena_take(&arena, g->size, sizeof *x->expected);
    }
    return arena.used;
}

static mpi_group *make_group(moe_context *context, int size, int rank, int level)
{
    mpi_group *g = moe__module_alloc(context, sizeof *g);
    if (!g) return NULL;
    g->context = context;
    g->rank = rank;
    g->size = size;
    g->silent = -1;
    g->owner = pthread_self();
    g->any_thread = level == MPI_THREAD_MULTIPLE;
    g->first = -1;
    g->comm = g->alarm = MPI_COMM_NULL;
    atomic_init(&g->alarmed, false);
    atomic_init(&g->wanted, false);
    g->bytes = lay_out(g, NULL);
    g->memory = moe__module_alloc(context, g->bytes);
    if (!g->memory) {
        moe__module_free(context, g, sizeof *g);
        return NULL;
    }
    (void)lay_out(g, g->memory);
    return g;
}

/* Duplicates the host's communicator, waiting no longer than the timeout. */
static moe_status duplicate(MPI_Comm from, MPI_Comm *to, double timeout, const char *function)
{
    char text[160];
    MPI_Request request;
    int done = 0;
    int code = MPI_Comm_idup(from, to, &request);
    double begin = MPI_Wtime();
    while (code == MPI_SUCCESS && !done) {
        struct timespec pause = {0, 200000};
        code = MPI_Test(&request, &done, MPI_STATUS_IGNORE);
        if (code == MPI_SUCCESS && !done && MPI_Wtime() - begin > timeout) {
            (void)snprintf(text, sizeof text, "waited %g s for all ranks to make this call",
                           timeout);
            return moe__module_fail(MOE_ERROR_TIMEOUT, function, text);
        }
        if (!done) (void)nanosleep(&pause, NULL);
    }
    if (code == MPI_SUCCESS) code = MPI_Comm_set_errhandler(*to, MPI_ERRORS_RETURN);
    if (code == MPI_SUCCESS) return MOE_OK;
    (void)snprintf(text, sizeof text, "MPI_Comm_idup failed with %d", code);
    return moe__module_fail(MOE_ERROR_TRANSPORT, function, text);
}

static moe_status check_begun(const char *function)
{
    int begun = 0, finalized = 0;
    (void)MPI_Initialized(&begun);
    (void)MPI_Finalized(&finalized);
    if (begun && !finalized) return MOE_OK;
    return moe__module_fail(MOE_ERROR_INVALID_STATE, function,
                            begun ? "MPI has been finalised" : "MPI is not initialised");
}

static moe_status check_handle(MPI_Comm handle, int *level, const char *function)
{
    int inter = 0;
    if (!handle || handle == MPI_COMM_NULL)
        return moe__module_fail(MOE_ERROR_INVALID_ARGUMENT, function, "handle is MPI_COMM_NULL");
    if (MPI_Comm_test_inter(handle, &inter) != MPI_SUCCESS || inter)
        return moe__module_fail(MOE_ERROR_INVALID_ARGUMENT, function,
                                "handle is no intracommunicator");
    (void)MPI_Query_thread(level);
    return MOE_OK;
}

static void options_defaults(void *instance)
{
    *(moe_mpi_options *)instance = (moe_mpi_options){.timeout = 60};
}
static const moe__struct_info options_info = MOE__STRUCT_INFO(moe_mpi_options, options_defaults);

moe_status moe_mpi_options_init(moe_mpi_options *options, size_t size)
{
    return moe__module_struct_init(&options_info, options, size, __func__);
}

static moe_status read_options(moe_mpi_options *o, const moe_mpi_options *options,
                               const char *function)
{
    char text[120];
    if (moe__module_version() != MOE__MODULE_VERSION) {
        (void)snprintf(text, sizeof text, "this module needs interface %d of libmoe, which has %d",
                       MOE__MODULE_VERSION, (int)moe__module_version());
        return moe__module_fail(MOE_ERROR_NOT_SUPPORTED, function, text);
    }
    MOE_TRY(moe__module_struct_read(&options_info, o, options, function));
    if (o->timeout > 0 && o->timeout <= 1e9) return MOE_OK;
    (void)snprintf(text, sizeof text, "timeout is %g; it must be above 0 and at most 1e9 seconds",
                   o->timeout);
    return moe__module_fail(MOE_ERROR_INVALID_ARGUMENT, function, text);
}

static moe_status create(moe_comm **comm, moe_context *context, MPI_Comm handle,
                         const moe_mpi_options *options, const char *function)
{
    moe_mpi_options o;
    int level = MPI_THREAD_SINGLE, size = 0, rank = 0;
    if (!comm || !context)
        return moe__module_fail(MOE_ERROR_INVALID_ARGUMENT, function,
                                comm ? "context is NULL" : "comm is NULL");
    MOE_TRY(read_options(&o, options, function));
    MOE_TRY(check_begun(function));
    MOE_TRY(check_handle(handle, &level, function));
    (void)MPI_Comm_size(handle, &size);
    (void)MPI_Comm_rank(handle, &rank);
    mpi_group *g = make_group(context, size, rank, level);
    if (!g) return moe__module_fail(MOE_ERROR_OUT_OF_MEMORY, function, "no memory for the group");
    moe_status status = duplicate(handle, &g->comm, o.timeout, function);
    if (status == MOE_OK) status = duplicate(handle, &g->alarm, o.timeout, function);
    /* A duplicate that is still being made is written to g: that stays. */
    if (status == MOE_ERROR_TIMEOUT) return status;
    if (status != MOE_OK) {
        free_group(g);
        return status;
    }
    moe_collectives table = {.struct_size = sizeof table,
                             .user = g,
                             .rank = rank,
                             .size = size,
                             .capabilities = MOE_COMM_HOST_MEMORY,
                             .timeout = o.timeout,
                             .exchange_start = mpi_start,
                             .exchange_test = mpi_test,
                             .exchange_cancel = mpi_cancel,
                             .missing = mpi_missing,
                             .poll = mpi_poll,
                             .abort = mpi_abort,
                             .release = mpi_release};
    status = moe__module_comm(comm, context, &table, mpi_why, function);
    if (status == MOE_OK) g->made = true;
    return status;
}

moe_status moe_comm_create_mpi(moe_comm **comm, moe_context *context, MPI_Comm handle,
                               const moe_mpi_options *options)
{
    return create(comm, context, handle, options, __func__);
}

moe_status moe_comm_create_mpi_f(moe_comm **comm, moe_context *context, int32_t handle,
                                 const moe_mpi_options *options)
{
    MOE_TRY(check_begun(__func__)); /* before that a handle is none */
    return create(comm, context, MPI_Comm_f2c((MPI_Fint)handle), options, __func__);
}
