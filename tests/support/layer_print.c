/* layer_print.c - a case as one line of text. */
#include "support/layer_case.h"

#include <stddef.h>
#include <stdio.h>
#include <string.h>

void layer_case_print(const layer_case *c, char *text, size_t size)
{
    static const struct {
        const char *name;
        size_t at; /* of an int */
    } flags[] = {
#define FLAG(field) {#field, offsetof(layer_case, field)}
        FLAG(kind),
        FLAG(score),
        FLAG(order),
        FLAG(renormalize),
        FLAG(router_bias),
        FLAG(logits_in),
        FLAG(activation),
        FLAG(expert_bias),
        FLAG(expert_sigmoid),
        FLAG(layer_sigmoid),
        FLAG(layout),
        FLAG(glu_order),
        FLAG(no_experts),
        FLAG(eval),
        FLAG(cv_ddof),
        FLAG(sequence_softmax),
        FLAG(sequence_routed),
        FLAG(capacity_kind),
        FLAG(capacity_rounding),
        FLAG(renormalize_after_drop),
        FLAG(masked),
        FLAG(loss_factors),
        FLAG(philox),
        FLAG(per_call),
        FLAG(replay),
        FLAG(no_gate),
        FLAG(strided),
        FLAG(moved),
        FLAG(split),
        FLAG(bound),
        FLAG(packed),
        FLAG(selection_bias),
        FLAG(expert_groups),
        FLAG(top_groups),
        FLAG(group_score),
        FLAG(thresholds),
        FLAG(sinkhorn_iterations),
        FLAG(loss_by_group),
        FLAG(capacity_multiple),
        FLAG(drop_policy),
        FLAG(second_choice),
        FLAG(shared),
        FLAG(shared_gate),
        FLAG(residual),
        FLAG(residual_mix),
        FLAG(branch_activation),
        FLAG(dropped),
        FLAG(position)};
#undef FLAG
    int used = snprintf(text, size, "%s: T %lld D %lld E %lld F %lld O %lld K %lld", c->name,
                        (long long)c->T, (long long)c->D, (long long)c->E, (long long)c->F,
                        (long long)c->p.O, (long long)c->p.K);
    if (c->gate_D && used < (int)size)
        used += snprintf(text + used, size - (size_t)used, " gate_D %lld", (long long)c->gate_D);
    if (c->groups && used < (int)size)
        used += snprintf(text + used, size - (size_t)used, " groups %lld", (long long)c->groups);
    for (size_t i = 0; i < sizeof flags / sizeof *flags && used < (int)size; i++) {
        int value;
        memcpy(&value, (const char *)c + flags[i].at, sizeof value);
        if (value)
            used += snprintf(text + used, size - (size_t)used, " %s %d", flags[i].name, value);
    }
}
