/* own_expert.c - the host's experts are its own: out = tanh(x a_e), one vector a_e per expert. The
 * library routes, dispatches and combines, forward and backward; central differences confirm the
 * whole. In f64. */
#include "host.h"

#include <math.h>

enum { N = 20, W = 5, EXPERTS = 4, TOP = 2 };

typedef struct model {
    moe_context *context;
    moe_gate *gate;
    moe_pass *pass;
    double a[EXPERTS][W], x[N * W], dy[N * W];
    double rows[N * TOP * W], out[N * TOP * W], y[N * W];
} model;

static moe_rows_args rows_args(void)
{
    moe_rows_args r;
    OK(moe_rows_args_init(&r, sizeof r));
    r.width = W, r.dtype = MOE_DTYPE_F64;
    return r;
}

static moe_plan_view view_of(const moe_plan *plan)
{
    moe_plan_view v;
    OK(moe_plan_view_init(&v, sizeof v));
    OK(moe_plan_get(plan, &v));
    return v;
}

/* Routes (or replays `kept`), gathers, runs the own experts, combines; returns sum(y dy) +
 * losses. */
static double forward(model *m, const moe_plan *kept)
{
    moe_forward_args f = forward_args(NULL, NULL, N);
    moe_rows_args r = rows_args();
    moe_losses losses;
    const moe_plan *plan;
    double value = 0;
    f.x = m->x;
    f.plan = kept, f.plan_use = MOE_PLAN_IDS;
    OK(moe_gate_forward(m->gate, m->pass, &f));
    OK(moe_pass_plan(m->pass, &plan));
    moe_plan_view v = view_of(plan);
    r.tokens_in = m->x, r.rows_out = m->rows;
    OK(moe_dispatch_forward(plan, &r));
    for (int64_t e = 0; e < v.num_experts; e++)
        for (int64_t row = v.expert_begin[e]; row < v.expert_begin[e + 1]; row++)
            for (int j = 0; j < W; j++)
                m->out[row * W + j] = tanh(m->rows[row * W + j] * m->a[e][j]);
    r = rows_args();
    r.rows_in = m->out, r.tokens_out = m->y;
    OK(moe_combine_forward(plan, &r));
    OK(moe_losses_init(&losses, sizeof losses));
    OK(moe_pass_losses(m->pass, &losses));
    for (int i = 0; i < N * W; i++) value += m->y[i] * m->dy[i];
    return value + losses.total;
}

/* Gradients by x and by the own parameters. */
static void backward(model *m, double *dx, double da[EXPERTS][W])
{
    static double drows[N * TOP * W], dweight[N * TOP];
    moe_backward_args b = backward_args(NULL, NULL);
    moe_rows_args r = rows_args();
    const moe_plan *plan;
    OK(moe_pass_plan(m->pass, &plan));
    moe_plan_view v = view_of(plan);
    r.tokens_in = m->dy, r.rows_in = m->out, r.rows_out = drows, r.entry_weight_grad = dweight;
    OK(moe_combine_backward(plan, &r));
    for (int64_t e = 0; e < v.num_experts; e++)
        for (int64_t row = v.expert_begin[e]; row < v.expert_begin[e + 1]; row++)
            for (int j = 0; j < W; j++) {
                int64_t at = row * W + j;
                double dz = drows[at] * (1 - m->out[at] * m->out[at]);
                da[e][j] += dz * m->rows[at];
                drows[at] = dz * m->a[e][j];
            }
    r = rows_args();
    r.rows_in = drows, r.tokens_out = dx;
    OK(moe_dispatch_backward(plan, &r));
    b.dx = dx, b.flags = MOE_BACKWARD_ADD_DX, b.entry_weight_grad = dweight;
    OK(moe_gate_backward(m->gate, m->pass, &b));
}

static void make(model *m)
{
    moe_gate_config g = gate_config();
    moe_parameter_record p;
    float numbers[N * W * 2];
    OK(moe_context_create(&m->context, NULL));
    g.d_model = W, g.num_experts = EXPERTS, g.top_k = TOP, g.dtype = MOE_DTYPE_F64,
    g.z_weight = 0.1;
    OK(moe_gate_create(&m->gate, m->context, &g));
    OK(moe_pass_create_for_gate(&m->pass, m->gate, NULL));
    fill(numbers, N * W * 2, 5);
    for (int i = 0; i < N * W; i++)
        m->x[i] = (double)numbers[i], m->dy[i] = (double)numbers[N * W + i];
    for (int i = 0; i < EXPERTS * W; i++) m->a[i / W][i % W] = 0.3 + 0.1 * i;
    OK(moe_parameter_record_init(&p, sizeof p));
    for (int64_t i = 0; i < moe_gate_parameter_count(m->gate); i++) {
        OK(moe_gate_parameter(m->gate, i, &p));
        for (int64_t j = 0; j < p.element_count; j++)
            ((double *)p.data)[j] = (double)numbers[j + 7 * (i + 1)];
    }
}

int main(void)
{
    static model m;
    const moe_plan *plan;
    moe_plan *kept;
    double dx[N * W], da[EXPERTS][W] = {{0}}, worst = 0;
    const double h = 1e-6;
    make(&m);
    (void)forward(&m, NULL);
    backward(&m, dx, da);
    OK(moe_pass_plan(m.pass, &plan));
    OK(moe_plan_create(&kept, m.context));
    OK(moe_plan_copy(kept, plan));
    for (int i = 0; i < N * W + EXPERTS * W; i++) {
        double *at = i < N * W ? &m.x[i] : &m.a[(i - N * W) / W][(i - N * W) % W];
        double gradient = i < N * W ? dx[i] : da[(i - N * W) / W][(i - N * W) % W], here = *at,
               value[2];
        for (int side = 0; side < 2; side++) {
            *at = here + (side ? -h : h);
            value[side] = forward(&m, kept); /* the selection is held still */
        }
        *at = here;
        worst = fmax(worst,
                     fabs((value[0] - value[1]) / (2 * h) - gradient) / fmax(1, fabs(gradient)));
    }
    SHOW(worst < 1e-6);
    moe_plan_destroy(kept), moe_pass_destroy(m.pass), moe_gate_destroy(m.gate),
        moe_context_destroy(m.context);
    printf(
        "the host's own experts between dispatch and combine: central differences agree to %.1e; ok\n",
        worst);
    return 0;
}
