/* check.c - moe_check_gradients: every gradient of a layer against central differences.
 *
 *     error = |g - d| / scale,   scale = max(|g|, |d|, largest |gradient| of the tensor / 1000)
 *     agrees if |g - d| <= tolerance scale + rounding
 *
 * g is the library's gradient, d the difference. Where they disagree the step is made smaller
 * twice: L has kinks (ReLU, the maximum in a threshold), and one that the step crossed is left
 * behind. The gap between the one-sided differences tells a kink at the very place: with the step
 * it shrinks where L is smooth and stays where it is not. */
#include "check_twin.h"
#include "numeric.h"
#include "philox.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static void check_defaults(void *instance)
{
    *(moe_gradient_check *)instance = (moe_gradient_check){.tokens = 32,
                                                           .groups = 1,
                                                           .probes = 24,
                                                           .seed = 1,
                                                           .step = 1e-5,
                                                           .tolerance = 1e-6,
                                                           .parameters = MOE_CHECK_DRAWN,
                                                           .train = 1};
}
static void report_defaults(void *instance)
{
    *(moe_gradient_report *)instance = (moe_gradient_report){0};
}

const moe__struct_info moe__gradient_check_info = MOE__STRUCT_INFO(moe_gradient_check,
                                                                   check_defaults);
const moe__struct_info moe__gradient_report_info = MOE__STRUCT_INFO(moe_gradient_report,
                                                                    report_defaults);

moe_status moe_gradient_check_init(moe_gradient_check *check, size_t size)
{
    return moe__struct_init(&moe__gradient_check_info, check, size, __func__);
}
moe_status moe_gradient_report_init(moe_gradient_report *report, size_t size)
{
    return moe__struct_init(&moe__gradient_report_info, report, size, __func__);
}

/* ---- the report ------------------------------------------------------------------------------ */

/* What is found of one element. */
typedef struct verdict {
    double gradient, difference, error;
    bool agrees, kink;
} verdict;

typedef struct check {
    moe_gradient_check asked;
    moe_gradient_report found;
    moe__twin twin;
    int64_t *probe; /* elements to look at */
    int64_t probes; /* room in it */
    bool has_worst;
    verdict worst;
} check;

#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
static void
say(const check *c, int32_t level, const char *format, ...)
{
    char line[256];
    va_list arguments;
    if (!c->asked.report) return;
    va_start(arguments, format);
    (void)vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    c->asked.report(c->asked.report_user, level, line);
}

/* One that disagrees is worse than all that agree. */
static bool is_worse(const verdict *a, const verdict *b)
{
    return a->agrees != b->agrees ? b->agrees : a->error > b->error;
}

static void note(check *c, const moe__twin_tensor *tensor, int64_t index, const verdict *v)
{
    c->found.probes++;
    c->found.kinks += v->kink;
    if (v->kink) return;
    c->found.disagreements += !v->agrees;
    if (c->has_worst && !is_worse(v, &c->worst)) return;
    c->worst = *v;
    c->has_worst = true;
    c->found.worst = v->error;
    c->found.worst_name = tensor->name;
    c->found.worst_index = index;
    c->found.worst_gradient = v->gradient;
    c->found.worst_difference = v->difference;
}

/* ---- which elements -------------------------------------------------------------------------- */

/* The `count` elements with the largest gradients, largest first. */
static void pick_largest(const moe__twin_tensor *tensor, int64_t *pick, int64_t count)
{
    int64_t have = 0;
    for (int64_t i = 0; i < tensor->count; i++) {
        double size = fabs(tensor->grad[i]);
        int64_t place = have < count ? have++ : count;
        if (place == count && (count == 0 || size <= fabs(tensor->grad[pick[count - 1]]))) continue;
        if (place == count) place = count - 1;
        for (; place > 0 && size > fabs(tensor->grad[pick[place - 1]]); place--)
            pick[place] = pick[place - 1];
        pick[place] = i;
    }
}

/* Fills c->probe for a tensor and returns how many there are. */
static int64_t pick_probes(const check *c, const moe__twin_tensor *tensor)
{
    int64_t wanted = c->asked.probes;
    if (wanted == 0 || wanted >= tensor->count) {
        for (int64_t i = 0; i < tensor->count; i++) c->probe[i] = i;
        return tensor->count;
    }
    int64_t largest = (wanted + 1) / 2;
    pick_largest(tensor, c->probe, largest);
    for (int64_t i = largest; i < wanted; i++) {
        uint32_t word[4];
        moe__counter(word, moe__stream(1, 0, MOE__PURPOSE_CHECK),
                     (uint32_t)(tensor - c->twin.tensor), 0, (uint32_t)i);
        moe__philox(c->asked.seed, word, word);
        c->probe[i] = (int64_t)(((uint64_t)word[0] << 32 | word[1]) % (uint64_t)tensor->count);
    }
    return wanted;
}

static int64_t most_probes(const check *c)
{
    int64_t most = 0;
    for (int64_t i = 0; i < c->twin.tensors; i++) {
        int64_t count = c->twin.tensor[i].count;
        most = moe__max(most, c->asked.probes ? moe__min(count, c->asked.probes) : count);
    }
    return most;
}

/* ---- comparing ------------------------------------------------------------------------------- */

static double largest_gradient(const moe__twin_tensor *tensor)
{
    double largest = 0;
    for (int64_t i = 0; i < tensor->count; i++) largest = fmax(largest, fabs(tensor->grad[i]));
    return largest;
}

/* Sets error and agrees; a number that is none agrees with nothing. */
static void judge(verdict *v, double tolerance, double rounding, double largest)
{
    double off = fabs(v->gradient - v->difference);
    double scale = fmax(fmax(fabs(v->gradient), fabs(v->difference)), largest / 1000);
    v->agrees = off <= tolerance * scale + rounding;
    v->error = off == 0 ? 0 : off - off == 0 ? off / scale : INFINITY;
}

static moe_status look_at(check *c, const moe__twin_tensor *tensor, int64_t index, double largest,
                          verdict *v)
{
    double step = c->asked.step, side[2] = {0, 0}, gap = 0, first_gap = 0, rounding = 0;
    *v = (verdict){.gradient = tensor->grad[index]};
    for (int tries = 0; tries < 3 && !v->agrees; tries++, step /= 10) {
        MOE_TRY(moe__twin_differences(&c->twin, tensor, index, step, side));
        rounding = c->twin.rounding / step;
        v->difference = (side[0] + side[1]) / 2;
        judge(v, c->asked.tolerance, rounding, largest);
        gap = fabs(side[0] - side[1]);
        if (tries == 0) first_gap = gap;
    }
    bool number = v->gradient - v->gradient == 0; /* neither NaN nor infinite */
    v->kink = !v->agrees && number && gap > first_gap / 2 && gap > 4 * rounding;
    return MOE_OK;
}

static moe_status check_tensor(check *c, const moe__twin_tensor *tensor)
{
    verdict v, worst = {.agrees = true};
    double largest = largest_gradient(tensor);
    int64_t count = pick_probes(c, tensor), at = -1, bad = 0, kinks = 0;
    for (int64_t i = 0; i < count; i++) {
        MOE_TRY(look_at(c, tensor, c->probe[i], largest, &v));
        note(c, tensor, c->probe[i], &v);
        kinks += v.kink;
        bad += !v.agrees && !v.kink;
        if (v.kink || (at >= 0 && !is_worse(&v, &worst))) continue;
        worst = v;
        at = c->probe[i];
    }
    say(c, bad ? MOE_LOG_ERROR : MOE_LOG_INFO, "  %-20s %9lld %7lld %9.1e %9lld %16.9e %16.9e  %s",
        tensor->name, (ll)tensor->count, (ll)(count - kinks), worst.error, (ll)at, worst.gradient,
        worst.difference, bad ? "DISAGREES" : "agrees");
    return MOE_OK;
}

static moe_status check_all(check *c, const char *function)
{
    c->probes = most_probes(c);
    c->probe = moe__alloc(c->twin.context, moe__mul(c->probes, (int64_t)sizeof *c->probe));
    if (!c->probe) REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no memory for %lld probes", (ll)c->probes);
    c->found.tensors = c->twin.tensors;
    say(c, MOE_LOG_INFO, "gradients of %lld tensors in f64, %lld tokens, step %g, tolerance %g",
        (ll)c->twin.tensors, (ll)c->twin.tokens, c->asked.step, c->asked.tolerance);
    say(c, MOE_LOG_INFO, "  %-20s %9s %7s %9s %9s %16s %16s", "tensor", "elements", "probes",
        "error", "at", "gradient", "difference");
    for (int64_t i = 0; i < c->twin.tensors; i++) MOE_TRY(check_tensor(c, &c->twin.tensor[i]));
    say(c, c->found.disagreements ? MOE_LOG_ERROR : MOE_LOG_INFO,
        "%lld of %lld probes disagree, %lld at kinks; largest error %.1e",
        (ll)c->found.disagreements, (ll)c->found.probes, (ll)c->found.kinks, c->found.worst);
    return MOE_OK;
}

/* ---- the call -------------------------------------------------------------------------------- */

static moe_status check_question(const moe_gradient_check *q, const char *function)
{
    MOE_TRY(moe__check_range("tokens", q->tokens, 1, INT64_MAX, function));
    MOE_TRY(moe__check_range("groups", q->groups, 1, q->tokens, function));
    MOE_TRY(moe__check_range("probes", q->probes, 0, INT64_MAX, function));
    MOE_TRY(moe__check_range("parameters", q->parameters, MOE_CHECK_DRAWN, MOE_CHECK_CURRENT,
                             function));
    MOE_TRY(moe__check_range("train", q->train, 0, 1, function));
    if (!(q->step > 0 && q->step < INFINITY))
        REFUSE_ARGUMENT("step is %g; it must be finite and above 0", q->step);
    if (!(q->tolerance >= 0 && q->tolerance < INFINITY))
        REFUSE_ARGUMENT("tolerance is %g; it must be finite and not negative", q->tolerance);
    return MOE_OK;
}

moe_status moe_check_gradients(moe_layer *layer, const moe_gradient_check *asked,
                               moe_gradient_report *report)
{
    const char *function = __func__;
    check c;
    fenv_t saved;
    memset(&c, 0, sizeof c);
    if (!layer) REFUSE_ARGUMENT("layer is NULL");
    if (layer->where)
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "the layer's experts live on %d ranks",
               (int)layer->comm->size);
    MOE_TRY(moe__struct_read(&moe__gradient_check_info, &c.asked, asked, true, function));
    MOE_TRY(check_question(&c.asked, function));
    if (report) MOE_TRY(moe__struct_check_out(&moe__gradient_report_info, report, function));

    moe__fenv_enter(&saved);
    moe_status status = moe__twin_create(&c.twin, layer, &c.asked, function);
    if (status == MOE_OK) status = check_all(&c, function);
    moe__fenv_leave(&saved);
    if (c.probe) moe__free(c.twin.context, c.probe, moe__mul(c.probes, (int64_t)sizeof *c.probe));
    moe__twin_free(&c.twin);
    if (status != MOE_OK) return status;
    if (report) moe__struct_write(&moe__gradient_report_info, report, &c.found);
    if (c.found.disagreements > 0)
        REFUSE(MOE_ERROR_WRONG_GRADIENT,
               "%s[%lld]: the gradient is %.9g, the central difference %.9g", c.found.worst_name,
               (ll)c.found.worst_index, c.found.worst_gradient, c.found.worst_difference);
    return MOE_OK;
}
