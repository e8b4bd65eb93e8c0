/* graph.c - stream capture, and graphs: nodes with what they depend on, run in any order of those.
 *
 * A captured stream remembers the nodes that its next one depends on; events carry such sets to
 * other streams, which join the capture. What CUDA refuses while a stream captures is refused and
 * spoils the capture. Captures that ended are kept, for events may still point at them. */
#include "internal.h"

#include <stdlib.h>
#include <string.h>

struct node {
    struct emu_work *work;
    int *before, before_count;
};

struct CUgraph_st {
    struct node *nodes;
    int count;
    int references;
};

struct emu_capture {
    struct emu_capture *next;
    struct CUgraph_st *graph;
    struct CUstream_st *origin;
    const void *thread;
    enum cudaStreamCaptureMode mode;
    bool ended, spoiled;
    struct CUstream_st **members;
    int member_count;
};

static struct emu_capture *captures;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static __thread char this_thread;

static void *grown(void *p, size_t bytes)
{
    void *q = realloc(p, bytes > 0 ? bytes : 1);
    if (q == NULL) abort();
    return q;
}

/* ---- what a capture forbids ------------------------------------------------------------------ */

bool emu_captures(const struct CUstream_st *stream) { return stream->capture != NULL; }

void emu_capture_spoil(struct CUstream_st *stream)
{
    if (stream->capture != NULL) stream->capture->spoiled = true;
}

bool emu_capture_forbids(void)
{
    bool forbidden = false;
    if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
    for (struct emu_capture *c = captures; c != NULL; c = c->next) {
        if (c->ended || c->mode == cudaStreamCaptureModeRelaxed) continue;
        bool mine = c->thread == &this_thread;
        bool global = c->mode == cudaStreamCaptureModeGlobal &&
                      thread_mode == cudaStreamCaptureModeGlobal;
        if (!mine && !global) continue;
        c->spoiled = forbidden = true;
    }
    return forbidden;
}

cudaError_t emu_capture_legacy(struct CUstream_st *stream)
{
    for (struct emu_capture *c = captures; c != NULL; c = c->next) {
        if (c->ended || c->origin->device != stream->device) continue;
        if ((c->origin->flags & cudaStreamNonBlocking) != 0) continue;
        c->spoiled = true;
        return emu_refuse(cudaErrorStreamCaptureImplicit,
                          "the default stream used while a blocking stream captures");
    }
    return cudaSuccess;
}

/* ---- capturing ------------------------------------------------------------------------------- */

static void depend_on(struct CUstream_st *stream, const int *nodes, int count)
{
    stream->nodes = grown(stream->nodes, (size_t)(stream->node_count + count) * sizeof *nodes);
    for (int i = 0; i < count; i++) {
        bool known = false;
        for (int j = 0; j < stream->node_count; j++) known |= stream->nodes[j] == nodes[i];
        if (!known) stream->nodes[stream->node_count++] = nodes[i];
    }
}

static void join(struct CUstream_st *stream, struct emu_capture *c)
{
    stream->capture = c;
    stream->node_count = 0;
    c->members = grown(c->members, (size_t)(c->member_count + 1) * sizeof *c->members);
    c->members[c->member_count++] = stream;
}

cudaError_t emu_capture_work(struct CUstream_st *stream, struct emu_work *work)
{
    struct emu_capture *c = stream->capture;
    if (c->spoiled) {
        emu_work_drop(work);
        return cudaErrorStreamCaptureInvalidated;
    }
    struct CUgraph_st *g = c->graph;
    work->device = stream->device;
    g->nodes = grown(g->nodes, (size_t)(g->count + 1) * sizeof *g->nodes);
    struct node *n = &g->nodes[g->count];
    n->work = work;
    n->before_count = stream->node_count;
    n->before = grown(NULL, (size_t)stream->node_count * sizeof *n->before);
    memcpy(n->before, stream->nodes, (size_t)stream->node_count * sizeof *n->before);
    stream->node_count = 0;
    depend_on(stream, &g->count, 1);
    g->count++;
    return cudaSuccess;
}

cudaError_t emu_capture_record(struct CUstream_st *stream, struct emu_mark *mark)
{
    mark->capture = stream->capture;
    mark->node_count = stream->node_count;
    mark->nodes = grown(NULL, (size_t)stream->node_count * sizeof *mark->nodes);
    memcpy(mark->nodes, stream->nodes, (size_t)stream->node_count * sizeof *mark->nodes);
    return cudaSuccess;
}

cudaError_t emu_capture_wait(struct CUstream_st *stream, struct emu_mark *mark)
{
    if (mark->capture == NULL || mark->capture->ended) {
        emu_capture_spoil(stream);
        return emu_refuse(cudaErrorStreamCaptureIsolation,
                          "a captured stream waits for an event of another capture or of none");
    }
    if (stream->capture == NULL) join(stream, mark->capture);
    if (stream->capture != mark->capture) {
        emu_capture_spoil(stream);
        mark->capture->spoiled = true;
        return emu_refuse(cudaErrorStreamCaptureMerge, "two captures wait for each other");
    }
    depend_on(stream, mark->nodes, mark->node_count);
    return cudaSuccess;
}

static void graph_drop(struct CUgraph_st *g)
{
    if (g == NULL || --g->references > 0) return;
    for (int i = 0; i < g->count; i++) {
        emu_work_drop(g->nodes[i].work);
        free(g->nodes[i].before);
    }
    free(g->nodes);
    free(g);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode)
{
    cudaError_t status = emu_enter("cudaStreamBeginCapture", EMU_SAFE);
    struct CUstream_st *s = status == cudaSuccess ? emu_stream(handle, &status) : NULL;
    if (s != NULL && s->legacy) {
        status = emu_refuse(cudaErrorStreamCaptureUnsupported, "the default stream cannot capture");
    } else if (s != NULL && s->capture != NULL) {
        status = cudaErrorIllegalState;
    } else if (s != NULL) {
        struct emu_capture *c = calloc(1, sizeof *c);
        if (c == NULL) abort();
        c->graph = calloc(1, sizeof *c->graph);
        if (c->graph == NULL) abort();
        c->graph->references = 1;
        c->origin = s;
        c->thread = &this_thread;
        c->mode = mode;
        c->next = captures;
        captures = c;
        join(s, c);
    }
    return emu_leave(status);
}

/* Has every stream that joined come back to the origin? */
static bool all_joined(const struct emu_capture *c)
{
    const struct CUgraph_st *g = c->graph;
    bool *reached = calloc((size_t)g->count + 1, sizeof *reached), joined = true;
    if (reached == NULL) abort();
    for (int i = 0; i < c->origin->node_count; i++) reached[c->origin->nodes[i]] = true;
    for (int n = g->count - 1; n >= 0; n--) {
        for (int i = 0; reached[n] && i < g->nodes[n].before_count; i++) {
            reached[g->nodes[n].before[i]] = true;
        }
    }
    for (int m = 0; m < c->member_count; m++) {
        const struct CUstream_st *s = c->members[m];
        for (int i = 0; i < s->node_count; i++) joined &= reached[s->nodes[i]];
    }
    free(reached);
    return joined;
}

static cudaError_t end_capture(struct CUstream_st *s, cudaGraph_t *out)
{
    struct emu_capture *c = s->capture;
    if (c == NULL) return cudaErrorIllegalState;
    if (c->origin != s) return cudaErrorStreamCaptureUnmatched;
    if (c->thread != &this_thread && c->mode != cudaStreamCaptureModeRelaxed) {
        return cudaErrorStreamCaptureWrongThread;
    }
    cudaError_t status = c->spoiled ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
    if (status == cudaSuccess && !all_joined(c)) {
        status = emu_refuse(cudaErrorStreamCaptureUnjoined, "a stream of the capture did not join");
    }
    for (int m = 0; m < c->member_count; m++) {
        c->members[m]->capture = NULL;
        c->members[m]->node_count = 0;
    }
    c->ended = true;
    *out = status == cudaSuccess ? c->graph : NULL;
    if (status != cudaSuccess) graph_drop(c->graph);
    c->graph = NULL;
    return status;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *out)
{
    cudaError_t status = emu_enter("cudaStreamEndCapture", EMU_SAFE);
    struct CUstream_st *s = status == cudaSuccess ? emu_stream(handle, &status) : NULL;
    if (s != NULL) status = end_capture(s, out);
    return emu_leave(status);
}

static enum cudaStreamCaptureStatus capture_status(const struct CUstream_st *s)
{
    return s->capture == NULL    ? cudaStreamCaptureStatusNone
           : s->capture->spoiled ? cudaStreamCaptureStatusInvalidated
                                 : cudaStreamCaptureStatusActive;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus *out)
{
    cudaError_t status = emu_enter("cudaStreamIsCapturing", EMU_SAFE);
    struct CUstream_st *s = status == cudaSuccess ? emu_stream(handle, &status) : NULL;
    if (s != NULL) *out = capture_status(s);
    return emu_leave(status);
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, enum cudaStreamCaptureStatus *out,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count)
{
    cudaError_t status = emu_enter("cudaStreamGetCaptureInfo", EMU_SAFE);
    struct CUstream_st *s = status == cudaSuccess ? emu_stream(handle, &status) : NULL;
    if (s != NULL) {
        *out = capture_status(s);
        if (id != NULL) *id = (unsigned long long)(uintptr_t)s->capture;
        if (graph != NULL) *graph = s->capture != NULL ? s->capture->graph : NULL;
        if (nodes != NULL) *nodes = NULL;
        if (edges != NULL) *edges = NULL;
        if (count != NULL) *count = 0;
    }
    return emu_leave(status);
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode)
{
    enum cudaStreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return cudaSuccess;
}

/* ---- graphs ---------------------------------------------------------------------------------- */

/* One launch of a graph, which may stop where a node waits for others. */
struct run {
    int left;
    struct run_node {
        bool done, blocked;
        void *state;
    } nodes[];
};

static struct run *new_run(const struct CUgraph_st *g)
{
    struct run *run = calloc(1, sizeof *run + (size_t)g->count * sizeof run->nodes[0]);
    if (run == NULL) abort();
    run->left = g->count;
    return run;
}

/* Of the nodes whose predecessors have run a random one, -1 when all of them are blocked. */
static int next_node(const struct CUgraph_st *g, const struct run *run)
{
    int chosen = -1;
    uint32_t seen = 0;
    for (int n = 0; n < g->count; n++) {
        bool may = !run->nodes[n].done && !run->nodes[n].blocked;
        for (int i = 0; may && i < g->nodes[n].before_count; i++) {
            may = run->nodes[g->nodes[n].before[i]].done;
        }
        if (may && emu_coin(++seen)) chosen = n;
    }
    return chosen;
}

static enum emu_step step_graph(void *closure, void **state)
{
    struct CUgraph_st *g = *(struct CUgraph_st **)closure;
    struct run *run = *state != NULL ? *state : (*state = new_run(g));
    bool moved = false;
    for (int n = next_node(g, run); n >= 0; n = next_node(g, run)) {
        enum emu_step step = emu_work_step(g->nodes[n].work, &run->nodes[n].state);
        run->nodes[n].done = step == EMU_DONE;
        run->nodes[n].blocked = step == EMU_BLOCKED;
        run->left -= step == EMU_DONE;
        moved |= step != EMU_BLOCKED;
    }
    for (int n = 0; n < g->count; n++) run->nodes[n].blocked = false;
    if (run->left > 0) return moved ? EMU_MOVED : EMU_BLOCKED;
    free(run);
    *state = NULL;
    return EMU_DONE;
}

static void give_up_graph(void *closure, void *state)
{
    struct CUgraph_st *g = *(struct CUgraph_st **)closure;
    struct run *run = state;
    for (int n = 0; n < g->count; n++) {
        struct emu_work *work = g->nodes[n].work;
        if (run->nodes[n].state != NULL) work->give_up(work->closure, run->nodes[n].state);
    }
    free(run);
}

static void drop_launch(void *closure) { graph_drop(*(struct CUgraph_st **)closure); }

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long flags)
{
    cudaError_t status = emu_enter("cudaGraphInstantiate", EMU_SAFE);
    (void)flags;
    if (status == cudaSuccess && graph == NULL) status = cudaErrorInvalidValue;
    if (status == cudaSuccess) {
        graph->references++;
        *out = (cudaGraphExec_t)(void *)graph;
    }
    return emu_leave(status);
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *out, cudaGraph_t graph,
                                          unsigned long long flags)
{
    return cudaGraphInstantiate(out, graph, flags);
}

/* A launch holds the graph, which may be destroyed while it is pending. */
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t handle)
{
    cudaError_t status = emu_enter("cudaGraphLaunch", EMU_SAFE);
    struct CUstream_st *s = status == cudaSuccess ? emu_stream(handle, &status) : NULL;
    if (s != NULL && exec == NULL) {
        status = cudaErrorInvalidValue;
    } else if (s != NULL) {
        emu_record(EMU_CALL_GRAPH, "cudaGraphLaunch", s, 0, NULL, NULL);
        struct emu_work *work = emu_work_new("graph", NULL, &exec, sizeof exec);
        ((struct CUgraph_st *)(void *)exec)->references++;
        work->step = step_graph;
        work->give_up = give_up_graph;
        work->drop = drop_launch;
        status = emu_put(s, work);
    }
    return emu_leave(status);
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    cudaError_t status = emu_enter("cudaGraphDestroy", EMU_SAFE);
    if (status == cudaSuccess) graph_drop(graph);
    return emu_leave(status);
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    cudaError_t status = emu_enter("cudaGraphExecDestroy", EMU_SAFE);
    if (status == cudaSuccess) graph_drop((struct CUgraph_st *)(void *)exec);
    return emu_leave(status);
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count)
{
    cudaError_t status = emu_enter("cudaGraphGetNodes", EMU_SAFE);
    if (status == cudaSuccess && nodes != NULL) status = cudaErrorNotSupported;
    if (status == cudaSuccess) *count = (size_t)graph->count;
    return emu_leave(status);
}
