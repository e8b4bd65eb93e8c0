/* bench_work.c - what all peers work on: routings, tokens, weights, and the memory they lie in. */
#include "bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

double bench_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

double bench_memory(const char *field)
{
    char line[256];
    double kilobytes = 0;
    size_t length = strlen(field);
    FILE *status = fopen("/proc/self/status", "r");
    while (status && fgets(line, sizeof line, status))
        if (strncmp(line, field, length) == 0 && line[length] == ':')
            kilobytes = atof(line + length + 1);
    if (status) (void)fclose(status);
    return 1024 * kilobytes;
}

void bench_must(moe_status status, const char *what)
{
    if (status == MOE_OK) return;
    (void)fprintf(stderr, "bench: %s: %s\n", what, moe_last_error());
    exit(1);
}

double bench_flops(const bench_options *o)
{
    double products = (o->gated ? 3.0 : 2.0) * (o->backward ? 3 : 1);
    return 2 * products * (double)(o->T * o->K) * (double)o->D * (double)o->F;
}

/* ---- memory ---------------------------------------------------------------------------------- */

enum { HUGE_PAGE = 2 << 20 };

/* Whole huge pages, so that an array begins and ends at one. */
static size_t whole(int64_t bytes)
{
    return ((size_t)(bytes > 0 ? bytes : 1) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
}

/* A small array may be one of many; only a large one gets pages of its own. */
static bool small(int64_t bytes) { return bytes < HUGE_PAGE; }

void *bench_room(int64_t bytes)
{
    size_t size = whole(bytes);
    char *at;
    if (small(bytes)) {
        void *memory = aligned_alloc(4096, ((size_t)bytes + 4096) / 4096 * 4096);
        if (memory) return memset(memory, 0, (size_t)bytes);
    } else if ((at = mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) != MAP_FAILED) {
        size_t before = (HUGE_PAGE - (uintptr_t)at % HUGE_PAGE) % HUGE_PAGE;
        if (before > 0) munmap(at, before);
        if (before < HUGE_PAGE) munmap(at + before + size, HUGE_PAGE - before);
        (void)madvise(at + before, size, MADV_HUGEPAGE);
        return at + before;
    }
    (void)fprintf(stderr, "bench: no memory for %lld bytes\n", (long long)bytes);
    exit(1);
}

void bench_room_free(void *memory, int64_t bytes)
{
    if (!memory) return;
    if (small(bytes))
        free(memory);
    else
        munmap(memory, whole(bytes));
}

static void *pool_alloc(void *user, uint64_t size, uint64_t alignment)
{
    (void)user, (void)alignment; /* at most 4096 */
    return bench_room((int64_t)size);
}

static void pool_free(void *user, void *memory, uint64_t size)
{
    (void)user;
    bench_room_free(memory, (int64_t)size);
}

/* ---- numbers --------------------------------------------------------------------------------- */

static uint64_t next(uint64_t *state)
{
    *state ^= *state << 13, *state ^= *state >> 7, *state ^= *state << 17;
    return *state;
}

static double uniform(uint64_t *state) { return (double)(next(state) >> 11) * 0x1p-53; }

static void fill(float *a, int64_t count, uint64_t *state)
{
    for (int64_t i = 0; i < count; i++) a[i] = (float)(2 * uniform(state) - 1);
}

static void shuffle(int32_t *a, int64_t count, uint64_t *state)
{
    for (int64_t i = count - 1; i > 0; i--) {
        int64_t j = (int64_t)(next(state) % (uint64_t)(i + 1));
        int32_t kept = a[i];
        a[i] = a[j], a[j] = kept;
    }
}

/* ---- routings -------------------------------------------------------------------------------- */

/* One order of chance of all experts after the other; `place` goes on from routing to routing. A
 * token that would end one order and begin the next begins the next. */
static void route_evenly(int32_t *ids, const bench_options *o, int32_t *order, int64_t *place,
                         uint64_t *state)
{
    for (int64_t t = 0; t < o->T; t++) {
        if (*place + o->K > o->E) *place = 0;
        if (*place == 0) shuffle(order, o->E, state);
        for (int64_t k = 0; k < o->K; k++) ids[t * o->K + k] = order[(*place)++];
    }
}

/* The rank that u of 0 to sum[E-1] falls to. */
static int64_t rank_of(const double *sum, int64_t E, double u)
{
    int64_t low = 0, high = E - 1;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (sum[middle] < u)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static bool is_among(int32_t id, const int32_t *ids, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        if (ids[i] == id) return true;
    return false;
}

/* Expert of rank r in an order of chance with probability 1/r. One that the token has already is
 * drawn again a hundred times; then the next in order is taken. */
static void route_zipf(int32_t *ids, const bench_options *o, const int32_t *order,
                       const double *sum, uint64_t *state)
{
    for (int64_t t = 0; t < o->T; t++)
        for (int64_t k = 0; k < o->K; k++) {
            int32_t *chosen = ids + t * o->K;
            int64_t rank = 0;
            for (int tries = 0; tries < 100; tries++) {
                rank = rank_of(sum, o->E, uniform(state) * sum[o->E - 1]);
                if (!is_among(order[rank], chosen, k)) break;
            }
            while (is_among(order[rank], chosen, k)) rank = (rank + 1) % o->E;
            chosen[k] = order[rank];
        }
}

static void read_routing(int32_t *ids, const bench_options *o)
{
    FILE *file = fopen(o->routing, "r");
    for (int64_t i = 0; i < o->T * o->K; i++) {
        long id = -1;
        if (file && fscanf(file, "%ld", &id) == 1 && id >= 0 && id < o->E) {
            ids[i] = (int32_t)id;
            continue;
        }
        (void)fprintf(stderr, "bench: %s: token %lld has no id of 0 to %lld at place %lld\n",
                      o->routing, (long long)(i / o->K), (long long)o->E - 1,
                      (long long)(i % o->K));
        exit(2);
    }
    (void)fclose(file);
}

static void make_routings(bench_work *w, uint64_t *state)
{
    const bench_options *o = w->o;
    int32_t *order = bench_room(o->E * (int64_t)sizeof *order);
    double *sum = bench_room(o->E * (int64_t)sizeof *sum);
    int64_t place = 0;
    for (int64_t e = 0; e < o->E; e++)
        order[e] = (int32_t)e, sum[e] = (e > 0 ? sum[e - 1] : 0) + 1 / (double)(e + 1);
    w->even_ids = bench_room(w->R * (int64_t)sizeof *w->even_ids);
    route_evenly(w->even_ids, o, order, &place, state);
    place = 0;
    for (int i = 0; i < w->routings; i++) {
        int32_t *ids = bench_ids(w, i);
        if (strcmp(o->routing, "balanced") == 0)
            route_evenly(ids, o, order, &place, state);
        else if (strcmp(o->routing, "zipf") == 0)
            route_zipf(ids, o, order, sum, state);
        else
            read_routing(ids, o);
    }
    bench_room_free(order, o->E * (int64_t)sizeof *order);
    bench_room_free(sum, o->E * (int64_t)sizeof *sum);
}

int32_t *bench_ids(const bench_work *w, int64_t call) { return w->ids + call % w->routings * w->R; }

/* ---- all of it ------------------------------------------------------------------------------- */

static float *floats(int64_t count) { return bench_room(count * (int64_t)sizeof(float)); }

void bench_work_make(bench_work *w, const bench_options *o, bench_crew *crew)
{
    uint64_t state = 88172645463325252u + o->seed;
    int64_t turns = o->E / (o->T * o->K);
    *w = (bench_work){.o = o, .crew = crew, .R = o->T * o->K};
    w->wide = o->gated ? 2 * o->F : o->F;
    w->routings = turns > 8 ? 8 : turns < 1 ? 1 : (int)turns;
    if (strcmp(o->routing, "balanced") != 0) w->routings = 1;
    w->ids = bench_room(w->routings * w->R * (int64_t)sizeof *w->ids);
    make_routings(w, &state);
    w->entry_weight = floats(w->R), w->entry_weight_grad = floats(w->R);
    w->x = floats(o->T * o->D), w->y = floats(o->T * o->D);
    w->dx = floats(o->T * o->D), w->dy = floats(o->T * o->D);
    fill(w->x, o->T * o->D, &state), fill(w->dy, o->T * o->D, &state);
    for (int64_t t = 0; t < o->T; t++) {
        float *row = w->entry_weight + t * o->K, sum = 0;
        for (int64_t k = 0; k < o->K; k++) sum += row[k] = 0.1f + (float)uniform(&state);
        for (int64_t k = 0; k < o->K; k++) row[k] /= sum;
    }
}

void bench_experts_config(moe_experts_config *c, const bench_options *o)
{
    MUST(moe_experts_config_init(c, sizeof *c));
    c->d_model = o->D, c->d_hidden = o->F, c->num_experts = o->E;
    c->activation = o->gated ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_RELU;
    if (o->gated) c->glu_order = MOE_GLU_GATE_UP;
    c->parameters = o->backward ? MOE_PARAMETERS_OWNED : MOE_PARAMETERS_OWNED_NO_GRAD;
}

/* One thread's share of a parameter: uniform numbers of the size that the library would draw. */
typedef struct drawn {
    const bench_crew *crew;
    float *data;
    int64_t count;
    float most;
    uint64_t seed;
} drawn;

static void draw(void *argument, int thread)
{
    const drawn *d = argument;
    uint64_t state = d->seed + 2654435769u * (uint64_t)(thread + 1);
    int64_t begin, end;
    bench_share(d->count, bench_crew_threads(d->crew), thread, &begin, &end);
    for (int64_t i = begin; i < end; i++)
        d->data[i] = d->most * (float)(int32_t)(next(&state) >> 32) * 0x1p-31f;
}

/* With --check the library's first values, which are the same in every storage mode; they take
 * seconds. Else any numbers: what is opaque may be written element by element. */
void bench_fill_pool(const bench_work *w, moe_experts *pool)
{
    moe_parameter_record p;
    if (w->o->check) {
        MUST(moe_experts_init_parameters(pool, w->o->seed));
        return;
    }
    MUST(moe_parameter_record_init(&p, sizeof p));
    for (int64_t i = 0; i < moe_experts_parameter_count(pool); i++) {
        MUST(moe_experts_parameter(pool, i, &p));
        drawn d = {w->crew, p.data, p.element_count, 0, w->o->seed + (uint64_t)i};
        d.most = sqrtf(3 / (float)p.global_shape[1]);
        bench_crew_run(w->crew, draw, &d);
    }
}

void bench_work_weights(bench_work *w)
{
    moe_context_config c;
    moe_experts_config e;
    moe_parameter_record p;
    if (w->w1) return;
    MUST(moe_context_config_init(&c, sizeof c));
    c.alloc = pool_alloc, c.free = pool_free, c.threads = w->o->threads;
    MUST(moe_context_create(&w->context, &c));
    bench_experts_config(&e, w->o);
    MUST(moe_experts_create(&w->pool, w->context, &e));
    bench_fill_pool(w, w->pool);
    MUST(moe_parameter_record_init(&p, sizeof p));
    for (int i = 0; i < 2; i++) {
        const char *name = i == 1 ? "w2" : w->o->gated ? "w13" : "w1";
        MUST(moe_experts_parameter(w->pool, moe_experts_parameter_find(w->pool, name), &p));
        *(i == 1 ? &w->w2 : &w->w1) = p.data, *(i == 1 ? &w->g2 : &w->g1) = p.grad;
    }
}

void bench_work_free(bench_work *w)
{
    int64_t tokens = w->o->T * w->o->D * (int64_t)sizeof(float),
            rows = w->R * (int64_t)sizeof(float);
    moe_experts_destroy(w->pool), moe_context_destroy(w->context);
    bench_room_free(w->x, tokens), bench_room_free(w->y, tokens);
    bench_room_free(w->dx, tokens), bench_room_free(w->dy, tokens);
    bench_room_free(w->entry_weight, rows), bench_room_free(w->entry_weight_grad, rows);
    bench_room_free(w->ids, w->routings * rows), bench_room_free(w->even_ids, rows);
}
