/* scale.c - bench_scale [ROWS [STEPS]]: training steps of a hierarchical layer (Shazeer et al.
 * 2017, appendix B) with 4,096 and with 131,072 experts, D = F = 64, two of each of two groups.
 *
 * A step is forward, backward, and an optimizer step on the experts that met a token. The large
 * layer sees ROWS rows an expert; the small one once as many an expert, once as many in all. Each
 * layer runs in a process of its own, whose largest resident memory is compared with what
 * parameters, gradients and pass take by moe_layer_memory. Steps of the three alternate, so that
 * the noise of the machine meets all. */
#include <moe/moe.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { D = 64, F = 64, KP = 2, KS = 2, MOST_STEPS = 64 };

typedef struct side {
    int64_t groups, each; /* A and B */
    int64_t tokens;
    pid_t child;
    int ask, answer; /* pipes */
} side;

/* What a child tells after each step; the last time also of its memory. */
typedef struct answer {
    double seconds, expected_bytes, peak_bytes;
    int64_t touched;
} answer;

static void must(moe_status status, const char *what)
{
    if (status == MOE_OK) return;
    fprintf(stderr, "%s: %s\n", what, moe_last_error());
    exit(1);
}
#define MUST(call) must(call, #call)

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* VmHWM of /proc/self/status. */
static double peak_bytes(void)
{
    char line[256];
    double kilobytes = 0;
    FILE *status = fopen("/proc/self/status", "r");
    while (status && fgets(line, sizeof line, status))
        if (strncmp(line, "VmHWM:", 6) == 0) kilobytes = atof(line + 6);
    if (status) fclose(status);
    return 1024 * kilobytes;
}

/* ---- the layer ------------------------------------------------------------------------------- */

typedef struct model {
    moe_context *context;
    moe_gate *gate;
    moe_experts *experts;
    moe_layer *layer;
    moe_pass *pass;
    int64_t E, T;
    float *x, *y, *dx;
    uint8_t *touched;
    double expected_bytes;
} model;

static void make_model(model *m, const side *s, int64_t T)
{
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    moe_cost_query q;
    moe_cost cost;
    m->E = s->groups * s->each, m->T = T;
    MUST(moe_context_create(&m->context, NULL));
    MUST(moe_gate_config_init(&g, sizeof g));
    MUST(moe_experts_config_init(&e, sizeof e));
    MUST(moe_layer_config_init(&l, sizeof l));
    g.kind = MOE_GATE_HIERARCHICAL, g.d_model = D, g.num_experts = m->E,
    g.expert_groups = s->groups;
    g.top_groups = KP, g.top_k = KS, g.importance_weight = g.load_weight = 0.1;
    e.d_model = D, e.d_hidden = F, e.num_experts = m->E;
    MUST(moe_gate_create(&m->gate, m->context, &g));
    MUST(moe_experts_create(&m->experts, m->context, &e));
    l.gate = m->gate, l.experts = m->experts;
    MUST(moe_layer_create(&m->layer, &l));
    MUST(moe_layer_init_parameters(m->layer, 1));
    MUST(moe_pass_create(&m->pass, m->layer, NULL));
    MUST(moe_cost_query_init(&q, sizeof q));
    MUST(moe_cost_init(&cost, sizeof cost));
    q.gate = &g, q.experts = &e, q.tokens = T, q.flags = MOE_FORWARD_TRAIN;
    MUST(moe_layer_memory(&q, &cost));
    m->expected_bytes = (double)(cost.parameter_bytes + cost.gradient_bytes + cost.pass_bytes);
    m->x = malloc((size_t)(T * D) * sizeof(float)), m->y = malloc((size_t)(T * D) * sizeof(float));
    m->dx = malloc((size_t)(T * D) * sizeof(float)), m->touched = malloc((size_t)m->E);
    if (!m->x || !m->y || !m->dx || !m->touched) exit(1);
    for (int64_t i = 0; i < T * D; i++) m->x[i] = (float)(rand() % 2001 - 1000) * 1e-3f;
}

static void free_model(model *m)
{
    moe_pass_destroy(m->pass), moe_layer_destroy(m->layer), moe_gate_destroy(m->gate);
    moe_experts_destroy(m->experts), moe_context_destroy(m->context);
    free(m->x), free(m->y), free(m->dx), free(m->touched);
}

/* One thread's share of an update: experts begin to end - 1 that met a token, or elements. */
typedef struct update {
    const model *m;
    float *data;
    const float *grad;
    int64_t begin, end, width;
} update;

static void *run_update(void *argument)
{
    const update *u = argument;
    for (int64_t e = u->begin; e < u->end; e++) {
        if (u->width > 1 && !u->m->touched[e]) continue;
        for (int64_t j = e * u->width; j < (e + 1) * u->width; j++)
            u->data[j] -= 1e-3f * u->grad[j];
    }
    return NULL;
}

/* Plain gradient descent on everything of the gate and on the touched experts, on two threads. */
static int64_t optimizer_step(model *m)
{
    moe_parameter_record p;
    int64_t touched = 0;
    MUST(moe_experts_touched(m->experts, m->touched, &touched));
    MUST(moe_parameter_record_init(&p, sizeof p));
    for (int64_t i = 0; i < moe_layer_parameter_count(m->layer); i++) {
        MUST(moe_layer_parameter(m->layer, i, &p));
        int64_t parts = p.sharding == MOE_SHARD_EXPERT ? m->E : p.element_count;
        update half[2] = {{m, p.data, p.grad, 0, parts / 2, p.element_count / parts},
                          {m, p.data, p.grad, parts / 2, parts, p.element_count / parts}};
        pthread_t other;
        if (pthread_create(&other, NULL, run_update, &half[1]) != 0) exit(1);
        run_update(&half[0]);
        pthread_join(other, NULL);
    }
    return touched;
}

/* Learns to give x back. Nearly all experts have rows, so gradients are set, not zeroed and added
 * to. */
static int64_t step(model *m, int64_t number)
{
    moe_forward_args f;
    moe_backward_args b;
    MUST(moe_forward_args_init(&f, sizeof f));
    MUST(moe_backward_args_init(&b, sizeof b));
    f.x = m->x, f.y = m->y, f.tokens = m->T, f.step = number, f.flags = MOE_FORWARD_TRAIN;
    MUST(moe_layer_forward(m->layer, m->pass, &f));
    for (int64_t i = 0; i < m->T * D; i++) m->y[i] = (m->y[i] - m->x[i]) / (float)m->T;
    b.dy = m->y, b.dx = m->dx, b.flags = MOE_BACKWARD_OVERWRITE;
    MUST(moe_layer_backward(m->layer, m->pass, &b));
    return optimizer_step(m);
}

/* ---- two processes --------------------------------------------------------------------------- */

static void child_main(const side *s, int64_t T, int ask, int out)
{
    model m;
    char go;
    int64_t number = 0;
    memset(&m, 0, sizeof m);
    make_model(&m, s, T);
    (void)step(&m, number++); /* the first allocates */
    while (read(ask, &go, 1) == 1 && go == 'g') {
        answer a = {.expected_bytes = m.expected_bytes};
        double begin = now();
        a.touched = step(&m, number++);
        a.seconds = now() - begin;
        a.peak_bytes = peak_bytes() - 3 * (double)(T * D) * sizeof(float);
        if (write(out, &a, sizeof a) != (ssize_t)sizeof a) break;
    }
    free_model(&m);
    exit(0);
}

static void start(side *s, int64_t T)
{
    int ask[2], reply[2];
    if (pipe(ask) != 0 || pipe(reply) != 0) exit(1);
    s->child = fork();
    if (s->child == 0) {
        close(ask[1]), close(reply[0]);
        child_main(s, T, ask[0], reply[1]);
    }
    close(ask[0]), close(reply[1]);
    s->ask = ask[1], s->answer = reply[0];
}

static answer one_step(const side *s)
{
    answer a;
    if (s->child < 0 || write(s->ask, "g", 1) != 1 || read(s->answer, &a, sizeof a) != sizeof a) {
        fprintf(stderr, "a child ended early\n");
        exit(1);
    }
    return a;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void report(const side *s, const answer *a, double median)
{
    int64_t E = s->groups * s->each;
    printf(
        "%7lld experts (%lld x %lld), %7lld tokens: %7.2f us a token, %7lld experts touched, peak "
        "%.3f GiB = %.3f x parameters + gradients + pass\n",
        (long long)E, (long long)s->groups, (long long)s->each, (long long)s->tokens,
        1e6 * median / (double)s->tokens, (long long)a->touched, a->peak_bytes / 1073741824,
        a->peak_bytes / a->expected_bytes);
}

int main(int argc, char **argv)
{
    enum { SIDES = 3 };
    int64_t rows = argc > 1 ? atoll(argv[1]) : 4;
    int64_t small = 16 * 256 * rows / (KP * KS), large = 512 * 256 * rows / (KP * KS);
    side sides[SIDES] = {{.groups = 16, .each = 256, .tokens = small},
                         {.groups = 16, .each = 256, .tokens = large},
                         {.groups = 512, .each = 256, .tokens = large}};
    int steps = argc > 2 ? atoi(argv[2]) : 5;
    double seconds[SIDES][MOST_STEPS], per_token[SIDES];
    answer last[SIDES];
    if (rows < 1 || steps < 1 || steps > MOST_STEPS) {
        fprintf(stderr, "usage: bench_scale [ROWS [STEPS]], STEPS at most %d\n", MOST_STEPS);
        return 2;
    }
    for (int i = 0; i < SIDES; i++) start(&sides[i], sides[i].tokens);
    for (int n = 0; n < steps; n++)
        for (int i = 0; i < SIDES; i++)
            last[i] = one_step(&sides[i]), seconds[i][n] = last[i].seconds;
    printf("D = F = 64, %d of each of %d groups, median of %d steps\n", KS, KP, steps);
    for (int i = 0; i < SIDES; i++) {
        qsort(seconds[i], (size_t)steps, sizeof **seconds, by_value);
        report(&sides[i], &last[i], seconds[i][steps / 2]);
        per_token[i] = seconds[i][steps / 2] / (double)sides[i].tokens;
        if (write(sides[i].ask, "q", 1) != 1) return 1;
        waitpid(sides[i].child, NULL, 0);
    }
    printf("time per token of the large one: %.2f x at as many rows an expert, %.2f x at as many "
           "tokens\n",
           per_token[2] / per_token[0], per_token[2] / per_token[1]);
    return 0;
}
