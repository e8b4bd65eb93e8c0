/* 11_global_workspace.c - a shared global workspace, as in Goyal et al. 2022, "Coordination Among
 * Neural Modules Through a Shared Global Workspace" (arXiv 2103.01197): N specialists compete to
 * write into a few slots, and all of them read the slots. For specialist t of example g, slot s:
 *
 *     h_t  = tanh(x_t Wh)                                      what the specialist knows
 *     m_gs = sum over the C specialists t that slot s takes of  p_ts h_t                  (write)
 *     r_t  = sum over all slots s of  a_ts m_gs                                (read: broadcast)
 *     y_t  = own . h_t + heard . r_t
 *     p    = sigmoid(h Wwrite),  a = softmax over the slots of (h Wread)
 *
 * The slots are the "experts" of two gates. MOE_GATE_EXPERT_CHOICE is the competition as the paper
 * has it: it is the slot that takes its C best specialists of an example (a token group), by the
 * product of the slot's query, a column of Wwrite, with their states, so that a slot is never empty
 * and never overflows. With MOE_GATE_TOP_K it would be the specialists that choose, and a capacity
 * would drop some in order of token. MOE_GATE_SOFTMAX_DENSE is the broadcast. The weights p and a
 * are how both gates learn.
 *
 * Introduces: MOE_GATE_EXPERT_CHOICE, MOE_GATE_SOFTMAX_DENSE, group_begin, MOE_ROWS_ADD, two gates
 * in one model.
 *
 * The task needs coordination: each specialist sees one item of a list. One item is marked A,
 * another B. Every specialist is asked for the value of A or of B, and sees neither. */
#include "example.h"

#include <math.h>
#include <string.h>

enum { G = 32, N = 8, T = G * N, D = 5, H = 12, S = 2, C = 1, R = G * S * C, STEPS = 400 };
enum { VALUE, MARKED_A, MARKED_B, QUESTION, ONE }; /* the D numbers of an item */

/* One direction between specialists and slots: a gate, and its last routing. */
typedef struct way {
    moe_gate *gate;
    moe_pass *pass;
    const moe_plan *plan;
    moe_plan_view v;
} way;

typedef struct specialists {
    double wh[D][H], own[H], heard[H];
} specialists;

typedef struct tensor {
    const char *name;
    double *data, *grad;
    int64_t count;
} tensor;

typedef double slots[G][S][H];

typedef struct model {
    moe_context *context;
    way write, read;
    int cut; /* 1: nobody hears the workspace */
    specialists all, grad;
    tensor tensors[3];
    double mean[200], square[200]; /* Adam's, for all tensors one after the other */
    double x[T][D], target[T];
    double h[T][H], wrote[R][H], shown[T * S][H], r[T][H], y[T];
    slots slot;
} model;

static moe_rows_args rows_args(void)
{
    moe_rows_args r;
    OK(moe_rows_args_init(&r, sizeof r));
    r.width = H, r.dtype = MOE_DTYPE_F64;
    return r;
}

static double dot(const double *a, const double *b)
{
    double sum = 0;
    for (int j = 0; j < H; j++) sum += a[j] * b[j];
    return sum;
}

/* to += factor * from */
static void add(double *to, double factor, const double *from)
{
    for (int j = 0; j < H; j++) to[j] += factor * from[j];
}

/* ---- forward --------------------------------------------------------------------------------- */

/* Each example is a token group: its slots take from its own N specialists. */
static void route(way *w, const model *m)
{
    int64_t begin[G + 1];
    moe_forward_args f;
    for (int g = 0; g <= G; g++) begin[g] = g * N;
    OK(moe_forward_args_init(&f, sizeof f));
    f.tokens = T, f.x = m->h, f.group_begin = begin, f.groups = G;
    OK(moe_gate_forward(w->gate, w->pass, &f));
    OK(moe_pass_plan(w->pass, &w->plan));
    OK(moe_plan_view_init(&w->v, sizeof w->v));
    OK(moe_plan_get(w->plan, &w->v));
}

/* snippet: workspace-forward */
/* The slot that row r of a plan belongs to: its "expert", in the example of its token. */
static double *slot_of(slots all, const moe_plan_view *v, int64_t r)
{
    return all[v->token_of_row[r] / N][v->expert_of_entry[v->entry_of_row[r]]];
}

static void write_and_read(model *m)
{
    const moe_plan_view *w = &m->write.v, *v = &m->read.v;
    moe_rows_args gather = rows_args(), sum = rows_args();

    /* Write: the winners' states are gathered, and added up in the slots that took them. */
    route(&m->write, m);
    gather.tokens_in = m->h, gather.rows_out = m->wrote;
    OK(moe_dispatch_forward(m->write.plan, &gather));
    memset(m->slot, 0, sizeof m->slot);
    for (int64_t r = 0; r < w->rows; r++) {
        double p = ((const double *)w->weight_of_entry)[w->entry_of_row[r]];
        add(slot_of(m->slot, w, r), p, m->wrote[r]);
    }

    /* Read: a slot is an expert that tells every specialist of its example the same. */
    route(&m->read, m);
    for (int64_t r = 0; r < v->rows; r++)
        memcpy(m->shown[r], slot_of(m->slot, v, r), sizeof m->shown[r]);
    sum.rows_in = m->shown, sum.tokens_out = m->r;
    OK(moe_combine_forward(m->read.plan, &sum));
}
/* end snippet */

/* Returns the mean squared error. */
static double forward(model *m)
{
    double error = 0;
    for (int t = 0; t < T; t++) {
        memset(m->h[t], 0, sizeof m->h[t]), memset(m->r[t], 0, sizeof m->r[t]);
        for (int i = 0; i < D; i++) add(m->h[t], m->x[t][i], m->all.wh[i]);
        for (int j = 0; j < H; j++) m->h[t][j] = tanh(m->h[t][j]);
    }
    if (!m->cut) write_and_read(m);
    for (int t = 0; t < T; t++) {
        m->y[t] = dot(m->all.own, m->h[t]) + dot(m->all.heard, m->r[t]);
        error += (m->y[t] - m->target[t]) * (m->y[t] - m->target[t]) / T;
    }
    return error;
}

/* ---- backward -------------------------------------------------------------------------------- */

/* snippet: workspace-backward */
/* The gate's own part: the gradient of its weight, and its share of dh, which is added. */
static void route_backward(way *w, double *dweight, double dh[T][H])
{
    moe_backward_args b;
    OK(moe_backward_args_init(&b, sizeof b));
    b.flags = MOE_BACKWARD_OVERWRITE | MOE_BACKWARD_ADD_DX;
    b.entry_weight_grad = dweight, b.dx = dh;
    OK(moe_gate_backward(w->gate, w->pass, &b));
}

/* dr -> dh, the same way back. */
static void write_and_read_backward(model *m, double dr[T][H], double dh[T][H])
{
    static double dshown[T * S][H], da[T * S], dwrote[R][H], dp[R];
    static slots dslot;
    const moe_plan_view *w = &m->write.v, *v = &m->read.v;
    moe_rows_args spread = rows_args(), gather = rows_args();

    /* dshown = a dr,  da = dr . shown;  dm = sum of all dshown that showed m */
    spread.tokens_in = dr, spread.rows_in = m->shown;
    spread.rows_out = dshown, spread.entry_weight_grad = da;
    OK(moe_combine_backward(m->read.plan, &spread));
    memset(dslot, 0, sizeof dslot);
    for (int64_t r = 0; r < v->rows; r++) add(slot_of(dslot, v, r), 1, dshown[r]);
    route_backward(&m->read, da, dh);

    /* dp = dm . h,  dh = p dm for those who wrote */
    memset(dwrote, 0, sizeof dwrote);
    for (int64_t r = 0; r < w->rows; r++) {
        double p = ((const double *)w->weight_of_entry)[w->entry_of_row[r]];
        dp[w->entry_of_row[r]] = dot(slot_of(dslot, w, r), m->wrote[r]);
        add(dwrote[r], p, slot_of(dslot, w, r));
    }
    gather.flags = MOE_ROWS_ADD;
    gather.rows_in = dwrote, gather.tokens_out = dh;
    OK(moe_dispatch_backward(m->write.plan, &gather));
    route_backward(&m->write, dp, dh);
}
/* end snippet */

static void backward(model *m)
{
    static double dh[T][H], dr[T][H];
    memset(dh, 0, sizeof dh), memset(dr, 0, sizeof dr), memset(&m->grad, 0, sizeof m->grad);
    for (int t = 0; t < T; t++) {
        double dy = 2 * (m->y[t] - m->target[t]) / T;
        add(m->grad.own, dy, m->h[t]), add(dh[t], dy, m->all.own);
        add(m->grad.heard, dy, m->r[t]), add(dr[t], dy, m->all.heard);
    }
    if (!m->cut) write_and_read_backward(m, dr, dh);
    for (int t = 0; t < T; t++) {
        for (int j = 0; j < H; j++) dh[t][j] *= 1 - m->h[t][j] * m->h[t][j];
        for (int i = 0; i < D; i++) add(m->grad.wh[i], m->x[t][i], dh[t]);
    }
}

/* ---- the model, the task, training ----------------------------------------------------------- */

static tensor make_way(const model *m, way *w, int32_t kind, const char *name)
{
    moe_gate_config g;
    moe_parameter_record p;
    OK(moe_gate_config_init(&g, sizeof g));
    g.d_model = H, g.num_experts = S, g.kind = kind, g.dtype = MOE_DTYPE_F64;
    if (kind == MOE_GATE_EXPERT_CHOICE) {
        g.score = MOE_SCORE_SIGMOID;
        g.capacity_kind = MOE_CAPACITY_NUMBER, g.capacity = C;
    }
    OK(moe_gate_create(&w->gate, m->context, &g));
    OK(moe_pass_create_for_gate(&w->pass, w->gate, NULL));
    OK(moe_parameter_record_init(&p, sizeof p));
    OK(moe_gate_parameter(w->gate, moe_gate_parameter_find(w->gate, "weight"), &p));
    return (tensor){name, p.data, p.grad, p.element_count};
}

static void make(model *m, int cut)
{
    uint64_t state = 3;
    m->cut = cut;
    OK(moe_context_create(&m->context, NULL));
    m->tensors[0] = (tensor){"specialists", m->all.wh[0], m->grad.wh[0], (D + 2) * H};
    m->tensors[1] = make_way(m, &m->write, MOE_GATE_EXPERT_CHOICE, "write gate");
    m->tensors[2] = make_way(m, &m->read, MOE_GATE_SOFTMAX_DENSE, "read gate");
    for (const tensor *k = m->tensors; k < m->tensors + 3; k++)
        for (int64_t i = 0; i < k->count; i++) k->data[i] = 0.5 * (double)next_number(&state);
}

static void drop(model *m)
{
    moe_pass_destroy(m->write.pass), moe_pass_destroy(m->read.pass);
    moe_gate_destroy(m->write.gate), moe_gate_destroy(m->read.gate);
    moe_context_destroy(m->context);
}

static void draw_batch(model *m, uint64_t *state)
{
    for (int g = 0; g < G; g++) {
        double(*x)[D] = &m->x[g * N];
        int a = (int)((1 + next_number(state)) / 2 * N);
        int b = (a + 1 + (int)((1 + next_number(state)) / 2 * (N - 1))) % N;
        for (int n = 0; n < N; n++) {
            x[n][VALUE] = (double)next_number(state);
            x[n][MARKED_A] = n == a, x[n][MARKED_B] = n == b, x[n][ONE] = 1;
            x[n][QUESTION] = next_number(state) < 0 ? -1 : 1;
        }
        for (int n = 0; n < N; n++) m->target[g * N + n] = x[x[n][QUESTION] > 0 ? a : b][VALUE];
    }
}

/* Adam (Kingma & Ba 2015, arXiv 1412.6980). */
static void update(model *m, int step)
{
    const double beta1 = 0.9, beta2 = 0.99, rate = 0.02;
    double left1 = 1 - pow(beta1, step + 1), left2 = 1 - pow(beta2, step + 1);
    double *mean = m->mean, *square = m->square;
    for (const tensor *k = m->tensors; k < m->tensors + 3; k++)
        for (int64_t i = 0; i < k->count; i++, mean++, square++) {
            *mean = beta1 * *mean + (1 - beta1) * k->grad[i];
            *square = beta2 * *square + (1 - beta2) * k->grad[i] * k->grad[i];
            k->data[i] -= rate * (*mean / left1) / (sqrt(*square / left2) + 1e-8);
        }
}

/* ---- what is shown --------------------------------------------------------------------------- */

/* The gradients against central differences, so small that nobody else gets to write. */
static void check(model *m)
{
    const double step = 1e-6;
    forward(m), backward(m);
    for (const tensor *k = m->tensors; k < m->tensors + 3; k++) {
        for (int64_t i = 0; i < k->count; i++) {
            double here = k->data[i];
            k->data[i] = here + step;
            double up = forward(m);
            k->data[i] = here - step;
            double down = forward(m);
            k->data[i] = here;
            HOLDS(fabs((up - down) / (2 * step) - k->grad[i]) < 1e-7);
        }
        printf("%-11s: the gradient agrees with central differences\n", k->name);
    }
}

/* Example 0 of the batch: who wrote, and what each answers. */
static void show(const model *m)
{
    const moe_plan_view *w = &m->write.v;
    printf("specialist  value  mark  writes to  asked  answers\n");
    for (int t = 0; t < N; t++) {
        int64_t n = w->token_begin[t];
        const double *x = m->x[t];
        const char *mark = x[MARKED_A] > 0 ? "A" : x[MARKED_B] > 0 ? "B" : " ";
        printf("%10d  %5.2f  %4s  ", t, x[VALUE], mark);
        if (n < w->token_begin[t + 1])
            printf("   slot %d", (int)w->expert_of_entry[n]);
        else
            printf("         ");
        printf("  %5s    %5.2f\n", x[QUESTION] > 0 ? "A" : "B", m->y[t]);
    }
}

int main(void)
{
    enum { TESTS = 20 };
    static model m[2]; /* the same network with the workspace, and with the workspace cut off */
    double before[2], after[2] = {0, 0};
    int64_t marked = 0;
    for (int cut = 0; cut < 2; cut++) {
        uint64_t state = 1;
        make(&m[cut], cut);
        for (int step = 0; step < STEPS; step++) {
            draw_batch(&m[cut], &state);
            if (step == 0 && !cut) check(&m[cut]);
            double error = forward(&m[cut]);
            if (step == 0) before[cut] = error;
            backward(&m[cut]), update(&m[cut], step);
        }
        for (int test = 0; test < TESTS; test++) { /* lists that are new */
            draw_batch(&m[cut], &state);
            after[cut] += forward(&m[cut]) / TESTS;
            for (int64_t r = 0; r < m[cut].write.v.rows; r++) {
                const double *x = m[cut].x[m[cut].write.v.token_of_row[r]];
                marked += x[MARKED_A] > 0 || x[MARKED_B] > 0;
            }
        }
    }
    show(&m[0]);
    printf("new lists: %d of %d writers carry a mark\n", (int)marked, TESTS * R);
    printf("mean squared error    before   after\n");
    printf("with the workspace     %.3f   %.3f\n", before[0], after[0]);
    printf("workspace cut off      %.3f   %.3f\n", before[1], after[1]);
    HOLDS((double)marked > 0.99 * TESTS * R && after[0] < 0.01 && after[1] > 0.2);
    drop(&m[0]), drop(&m[1]);
    return 0;
}
