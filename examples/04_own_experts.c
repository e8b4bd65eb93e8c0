/* 04_own_experts.c - the host's own network as the expert: the library routes, gathers and
 * combines, forward and backward, and never sees what an expert is. Here expert e multiplies by a
 * gain vector and goes through tanh; central differences confirm every gradient.
 *
 * Introduces: moe_gate_forward, moe_gate_backward, moe_dispatch_forward, moe_dispatch_backward,
 * moe_combine_forward, moe_combine_backward, MOE_PLAN_IDS, f64. */
#include "example.h"

#include <math.h>

enum { T = 24, D = 6, E = 5, K = 2, R = T * K };

typedef struct model {
    moe_gate *gate;
    moe_pass *pass;
    double gain[E][D];
    double x[T * D], y[T * D];
    double rows[R * D], out[R * D]; /* in order of expert */
} model;

static moe_rows_args rows_args(void)
{
    moe_rows_args r;
    OK(moe_rows_args_init(&r, sizeof r));
    r.width = D, r.dtype = MOE_DTYPE_F64;
    return r;
}

static moe_plan_view plan_of(const model *m, const moe_plan **plan)
{
    moe_plan_view v;
    OK(moe_pass_plan(m->pass, plan));
    OK(moe_plan_view_init(&v, sizeof v));
    OK(moe_plan_get(*plan, &v));
    return v;
}

/* snippet: own-forward */
/* x -> rows of each expert -> the host's network -> y. `kept` replays an earlier choice. */
static void forward(model *m, const moe_plan *kept)
{
    const moe_plan *plan;
    moe_forward_args f;
    OK(moe_forward_args_init(&f, sizeof f));
    f.tokens = T, f.x = m->x;
    f.plan = kept, f.plan_use = MOE_PLAN_IDS; /* who goes where is kept, weights are not */
    OK(moe_gate_forward(m->gate, m->pass, &f));
    moe_plan_view v = plan_of(m, &plan);

    moe_rows_args gather = rows_args();
    gather.tokens_in = m->x, gather.rows_out = m->rows;
    OK(moe_dispatch_forward(plan, &gather));

    for (int64_t e = 0; e < v.num_experts; e++) /* each expert has its rows side by side */
        for (int64_t r = v.expert_begin[e]; r < v.expert_begin[e + 1]; r++)
            for (int j = 0; j < D; j++)
                m->out[r * D + j] = tanh(m->gain[e][j] * m->rows[r * D + j]);

    moe_rows_args sum = rows_args();
    sum.rows_in = m->out, sum.tokens_out = m->y;
    OK(moe_combine_forward(plan, &sum));
}
/* end snippet */

/* snippet: own-backward */
/* The same way back: dy -> gradients of the rows and of the plan's weights -> dx. */
static void backward(model *m, const double *dy, double *dx, double dgain[E][D])
{
    static double drows[R * D], dweight[R];
    const moe_plan *plan;
    moe_plan_view v = plan_of(m, &plan);

    moe_rows_args spread = rows_args();
    spread.tokens_in = dy, spread.rows_in = m->out;
    spread.rows_out = drows, spread.entry_weight_grad = dweight;
    OK(moe_combine_backward(plan, &spread));

    for (int64_t e = 0; e < v.num_experts; e++)
        for (int64_t r = v.expert_begin[e]; r < v.expert_begin[e + 1]; r++)
            for (int j = 0; j < D; j++) {
                double dz = drows[r * D + j] * (1 - m->out[r * D + j] * m->out[r * D + j]);
                dgain[e][j] += dz * m->rows[r * D + j];
                drows[r * D + j] = dz * m->gain[e][j];
            }

    moe_rows_args gather = rows_args();
    gather.rows_in = drows, gather.tokens_out = dx;
    OK(moe_dispatch_backward(plan, &gather));

    moe_backward_args b; /* the gate's share of dx is added */
    OK(moe_backward_args_init(&b, sizeof b));
    b.flags = MOE_BACKWARD_ADD_DX;
    b.dx = dx, b.entry_weight_grad = dweight;
    OK(moe_gate_backward(m->gate, m->pass, &b));
}
/* end snippet */

static void fill_f64(double *to, int64_t count, uint64_t seed)
{
    for (int64_t i = 0; i < count; i++) to[i] = (double)next_number(&seed);
}

static double value(model *m, const moe_plan *kept, const double *dy)
{
    double sum = 0;
    forward(m, kept);
    for (int i = 0; i < T * D; i++) sum += m->y[i] * dy[i];
    return sum;
}

/* Largest difference between `gradient` and the central differences by `at`. */
static double compare(model *m, const moe_plan *kept, const double *dy, double *at,
                      const double *gradient, int count)
{
    const double h = 1e-6;
    double worst = 0;
    for (int i = 0; i < count; i++) {
        double here = at[i];
        at[i] = here + h;
        double up = value(m, kept, dy);
        at[i] = here - h;
        double down = value(m, kept, dy);
        at[i] = here;
        worst = fmax(worst, fabs((up - down) / (2 * h) - gradient[i]));
    }
    return worst;
}

int main(void)
{
    static model m;
    static double dy[T * D], dx[T * D], dgain[E][D];
    moe_context *context;
    moe_gate_config g;
    moe_parameter_record weight;
    const moe_plan *plan;
    moe_plan *kept;

    OK(moe_context_create(&context, NULL));
    OK(moe_gate_config_init(&g, sizeof g));
    g.d_model = D, g.num_experts = E, g.top_k = K, g.dtype = MOE_DTYPE_F64;
    OK(moe_gate_create(&m.gate, context, &g));
    OK(moe_pass_create_for_gate(&m.pass, m.gate, NULL));
    OK(moe_parameter_record_init(&weight, sizeof weight));
    OK(moe_gate_parameter(m.gate, moe_gate_parameter_find(m.gate, "weight"), &weight));
    fill_f64(weight.data, weight.element_count, 3);
    fill_f64(m.x, T * D, 1), fill_f64(dy, T * D, 2), fill_f64(m.gain[0], E * D, 4);

    forward(&m, NULL);
    backward(&m, dy, dx, dgain);
    OK(moe_plan_create(&kept, context));
    OK(moe_pass_plan(m.pass, &plan));
    OK(moe_plan_copy(kept, plan)); /* the pass's own is gone with its next forward */

    double by_x = compare(&m, kept, dy, m.x, dx, T * D);
    double by_gain = compare(&m, kept, dy, m.gain[0], dgain[0], E * D);
    double by_gate = compare(&m, kept, dy, weight.data, weight.grad, (int)weight.element_count);
    HOLDS(by_x < 1e-7 && by_gain < 1e-7 && by_gate < 1e-7);
    printf(
        "central differences agree to 1e-7: by x, by the experts' gains, by the gate's weight\n");
    printf("dx[0] = %.6f, dgain[0][0] = %.6f\n", dx[0], dgain[0][0]);

    moe_plan_destroy(kept), moe_pass_destroy(m.pass), moe_gate_destroy(m.gate);
    moe_context_destroy(context);
    return 0;
}
