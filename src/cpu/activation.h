/* activation.h - the activations of src/cpu/activation.c, for the file that calls them. */
#ifndef MOE_CPU_ACTIVATION_H
#define MOE_CPU_ACTIVATION_H

#include "internal.h"
#include "cpu/real.h"

/* An activation as the loops want it. */
typedef struct activation {
    int32_t kind;
    real alpha, limit, offset; /* of the clamped one */
} activation;

activation MOE_KERNEL(activation_of)(const moe_experts_config *c);

/* Of `count` elements: h = act(z1), or act(z1) * z3 if z3 is given; h may be z1. */
void MOE_KERNEL(activate)(const activation *act, int64_t count, element *h, const element *z1,
                          const element *z3);
/* From dh: dh becomes dz1, dz3 is written if z3 is given, and h is computed again. */
void MOE_KERNEL(activate_backward)(const activation *act, int64_t count, element *dh, element *dz3,
                                   element *h, const element *z1, const element *z3);

/* The same of [rows,F] dense on the context's threads; h may be dh, which becomes dz1. */
moe_status MOE_KERNEL(activation_forward)(const moe__workers *workers, const moe_experts_config *c,
                                          int64_t count, element *h, const element *z1,
                                          const element *z3);
moe_status MOE_KERNEL(activation_backward)(const moe__workers *workers, const moe_experts_config *c,
                                           int64_t count, element *dh, element *dz3, element *h,
                                           const element *z1, const element *z3);

#endif
