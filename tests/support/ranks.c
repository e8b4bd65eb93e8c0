/* ranks.c - the work of one rank shared out over several: ranks.h. */
#include "support/ranks.h"
#include "support/layer_case.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

int64_t ranks_tokens(int32_t ranks, int32_t rank)
{
    static const int64_t TOKENS[RANKS_MOST + 1][RANKS_MOST] = {[1] = {19},
                                                               [2] = {12, 7},
                                                               [3] = {0, 13, 6},
                                                               [4] = {5, 0, 11, 3},
                                                               [8] = {2, 0, 5, 1, 0, 4, 3, 4}};
    return TOKENS[ranks][rank];
}

/* Losses are of a rank's own tokens, so they are off. */
void whole_make(whole *w, int32_t kind, uint64_t number, int32_t ranks)
{
    memset(w, 0, sizeof *w);
    w->context = new_context();
    family_draw(&w->f, kind, number, number % 2 ? MOE_DTYPE_F32 : MOE_DTYPE_F64);
    moe_gate_config *g = &w->f.g;
    g->importance_weight = g->load_weight = g->switch_weight = g->gshard_weight = 0;
    g->z_weight = g->sequence_weight = g->threshold_weight = 0;
    w->f.T = RANKS_TOKENS, w->f.G = ranks;
    family_make(&w->f, w->context);
    family_batch_make(&w->b, &w->f);
    for (int32_t r = 0; r < ranks; r++)
        w->b.group_begin[r + 1] = w->b.group_begin[r] + ranks_tokens(ranks, r);
    w->D = w->f.e.d_model, w->O = w->b.y_bytes / RANKS_TOKENS;
    w->element = w->f.g.dtype == MOE_DTYPE_F64 ? 8 : 4;
    w->O /= w->element;
}

void whole_run(whole *w)
{
    MUST(moe_pass_create(&w->pass, w->f.layer, NULL));
    MUST(moe_layer_forward(w->f.layer, w->pass, &w->b.fwd));
    MUST(moe_layer_backward(w->f.layer, w->pass, &w->b.bwd));
}

void whole_free(whole *w)
{
    moe_pass_destroy(w->pass), family_batch_free(&w->b), family_free(&w->f);
    moe_context_destroy(w->context);
}

/* ---- a rank ---------------------------------------------------------------------------------- */

/* The parameters of the whole layer, of experts those of this rank. */
static void copy_parameters(part *p)
{
    moe_parameter_record to, from;
    MUST(moe_parameter_record_init(&to, sizeof to));
    MUST(moe_parameter_record_init(&from, sizeof from));
    for (int64_t i = 0; i < moe_layer_parameter_count(p->f.layer); i++) {
        MUST(moe_layer_parameter(p->f.layer, i, &to));
        MUST(moe_layer_parameter(p->w->f.layer, i, &from));
        int64_t each = strncmp(to.name, "experts.", 8) == 0 ? to.element_count / p->experts : 0;
        memcpy(to.data, (const char *)from.data + p->first_expert * each * p->w->element,
               (size_t)(to.element_count * p->w->element));
    }
}

static void make_part(part *p)
{
    moe_context_config c;
    family *f = &p->f;
    *f = p->w->f;
    f->gate = NULL, f->experts = f->shared_experts = f->residual_experts = NULL, f->layer = NULL;
    MUST(moe_context_config_init(&c, sizeof c));
    c.threads = 1 + p->rank % 2;
    MUST(moe_context_create(&p->context, &c));
    p->comm = p->connect(p);
    MUST(moe_gate_create(&f->gate, p->context, &f->g));
    f->e.num_experts = p->experts;
    MUST(moe_experts_create(&f->experts, p->context, &f->e));
    if (f->has_shared) MUST(moe_experts_create(&f->shared_experts, p->context, &f->shared));
    if (f->has_residual) MUST(moe_experts_create(&f->residual_experts, p->context, &f->residual));
    f->l.gate = f->gate, f->l.experts = f->experts, f->l.comm = p->comm;
    f->l.shared = f->shared_experts, f->l.residual = f->residual_experts;
    MUST(moe_layer_create(&f->layer, &f->l));
    copy_parameters(p);
}

/* Its tokens through its layer. */
static void run_part(part *p)
{
    const family_batch *b = &p->w->b;
    moe_pass *pass = NULL;
    moe_forward_args fwd = b->fwd;
    moe_backward_args bwd = b->bwd;
    int64_t x = p->w->D * p->w->element, o = p->w->O * p->w->element, first = p->first_token;
    MUST(moe_pass_create(&pass, p->f.layer, NULL));
    p->y = calloc((size_t)(p->tokens * o) + 1, 1), p->dx = calloc((size_t)(p->tokens * x) + 1, 1);
    ck_assert(p->y && p->dx);
    fwd.tokens = p->tokens, fwd.token_first += first, fwd.groups = 1, fwd.group_begin = NULL;
    fwd.x = (const char *)b->x + first * x, fwd.y = p->y;
    if (fwd.logits_in)
        fwd.logits_in = (const char *)fwd.logits_in + first * p->f.g.num_experts * p->w->element;
    if (fwd.token_key) fwd.token_key += first;
    if (fwd.token_mask) fwd.token_mask += first;
    bwd.dy = (const char *)b->dy + first * o, bwd.dx = p->dx;
    MUST(moe_layer_forward(p->f.layer, pass, &fwd));
    MUST(moe_layer_backward(p->f.layer, pass, &bwd));
    MUST(moe_layer_reduce_gradients(p->f.layer, NULL));
    MUST(moe_layer_gradient_norm(p->f.layer, &p->squared, NULL));
    moe_pass_destroy(pass);
}

void part_run(part *p)
{
    make_part(p);
    run_part(p);
}

void part_free(part *p)
{
    free(p->y), free(p->dx);
    family_free(&p->f);
    moe_comm_destroy(p->comm), moe_context_destroy(p->context);
}

/* ---- comparison ------------------------------------------------------------------------------ */

/* Gradients of experts are the bytes of their range, of replicated parameters those of one rank. */
static void compare_gradients(const part *p)
{
    const whole *w = p->w;
    moe_parameter_record want, got;
    MUST(moe_parameter_record_init(&want, sizeof want));
    MUST(moe_parameter_record_init(&got, sizeof got));
    for (int64_t i = 0; i < moe_layer_parameter_count(w->f.layer); i++) {
        MUST(moe_layer_parameter(w->f.layer, i, &want));
        MUST(moe_layer_parameter(p->f.layer, i, &got));
        if (!want.grad) continue;
        int64_t first = 0;
        if (strncmp(want.name, "experts.", 8) == 0)
            first = p->first_expert * (got.element_count / p->experts);
        ck_assert_msg(memcmp(got.grad, (const char *)want.grad + first * w->element,
                             (size_t)(got.element_count * w->element)) == 0,
                      "%s of rank %d of %d, %s", want.name, (int)p->rank, (int)p->ranks, w->f.text);
    }
}

void part_compare(const part *p)
{
    const whole *w = p->w;
    int64_t x = w->D * w->element, o = w->O * w->element;
    if (w->f.l.dropped != MOE_DROPPED_UNTOUCHED)
        ck_assert_msg(
            memcmp(p->y, (const char *)w->b.y + p->first_token * o, (size_t)(p->tokens * o)) == 0,
            "y of rank %d of %d, %s", (int)p->rank, (int)p->ranks, w->f.text);
    ck_assert_msg(
        memcmp(p->dx, (const char *)w->b.dx + p->first_token * x, (size_t)(p->tokens * x)) == 0,
        "dx of rank %d of %d, %s", (int)p->rank, (int)p->ranks, w->f.text);
    compare_gradients(p);
    double squared = -1;
    MUST(moe_layer_gradient_norm(w->f.layer, &squared, NULL));
    ck_assert_msg(memcmp(&squared, &p->squared, sizeof squared) == 0,
                  "norm %.17g, %.17g on rank %d", squared, p->squared, (int)p->rank);
}

bool parts_share(part *parts, const whole *w, uint64_t number, int32_t ranks)
{
    int64_t token = 0, expert = 0;
    if (w->f.g.num_experts < ranks) return false;
    for (int32_t r = 0; r < ranks; r++) {
        int64_t left = w->f.g.num_experts - expert, others = ranks - 1 - r;
        int64_t own = others == 0 ? left : 1 + (int64_t)(number + (uint64_t)r) % (left - others);
        parts[r] = (part){.w = w,
                          .rank = r,
                          .ranks = ranks,
                          .first_token = token,
                          .tokens = ranks_tokens(ranks, r),
                          .first_expert = expert,
                          .experts = own};
        token += parts[r].tokens, expert += own;
    }
    return true;
}
