/* layer_cases.h - the table of configurations that the layer's suites share. */
#ifndef LAYER_CASES_H
#define LAYER_CASES_H

#include "support/layer_case.h"

#define NOISY MOE_GATE_NOISY_TOP_K
#define DENSE MOE_GATE_SOFTMAX_DENSE
#define ALL_LOSSES {0.1, 0.0, 0.3, 0.2, 0.05, 0.4}
#define NOISY_LOSSES {0.1, 0.2, 0.3, 0.2, 0.05, 0.4}

static const layer_case layer_cases[] = {
    {.name = "plain", .T = 13, .D = 6, .E = 5, .F = 7, .K = 2},
    {.name = "no tokens", .T = 0, .D = 6, .E = 5, .F = 7, .K = 2, .weight = ALL_LOSSES},
    {.name = "no tokens, noisy", .T = 0, .D = 6, .E = 5, .F = 7, .K = 2, .kind = NOISY,
     .weight = NOISY_LOSSES},
    {.name = "one token", .T = 1, .D = 6, .E = 5, .F = 7, .K = 2, .kind = NOISY,
     .weight = NOISY_LOSSES},
    {.name = "one expert", .T = 9, .D = 6, .E = 1, .F = 7, .K = 1, .kind = NOISY,
     .weight = NOISY_LOSSES},
    {.name = "all experts", .T = 9, .D = 6, .E = 4, .F = 7, .K = 4, .kind = NOISY,
     .weight = NOISY_LOSSES},
    {.name = "D 1, F 1", .T = 9, .D = 1, .E = 4, .F = 1, .K = 2, .kind = NOISY,
     .weight = NOISY_LOSSES},
    {.name = "D 3, F 3, O 1", .T = 9, .D = 3, .E = 4, .F = 3, .O = 1, .K = 2, .weight = ALL_LOSSES},
    {.name = "empty experts", .T = 5, .D = 6, .E = 40, .F = 7, .K = 2, .weight = ALL_LOSSES},
    {.name = "dense", .T = 11, .D = 6, .E = 5, .F = 7, .kind = DENSE, .weight = ALL_LOSSES},
    {.name = "dense, sums", .T = 11, .D = 6, .E = 5, .F = 7, .kind = DENSE, .sequence_routed = 1,
     .weight = ALL_LOSSES},
    {.name = "noisy", .T = 21, .D = 9, .E = 8, .F = 11, .K = 3, .kind = NOISY,
     .weight = NOISY_LOSSES},
    {.name = "noisy, sample variance", .T = 21, .D = 9, .E = 8, .F = 11, .K = 3, .kind = NOISY,
     .cv_ddof = 1, .weight = NOISY_LOSSES},
    {.name = "noisy, evaluation", .T = 21, .D = 9, .E = 8, .F = 11, .K = 3, .kind = NOISY,
     .eval = 1, .weight = NOISY_LOSSES},
    {.name = "noisy, bias and groups", .T = 25, .D = 9, .E = 8, .F = 11, .K = 3, .kind = NOISY,
     .router_bias = 1, .groups = 4, .weight = NOISY_LOSSES},
    {.name = "noisy, mask", .T = 25, .D = 9, .E = 8, .F = 11, .K = 3, .kind = NOISY, .masked = 1,
     .groups = 3, .weight = NOISY_LOSSES},
    {.name = "noisy, routed counts", .T = 25, .D = 9, .E = 8, .F = 11, .K = 3, .kind = NOISY,
     .sequence_routed = 1, .weight = NOISY_LOSSES},
    {.name = "noisy, own gate input", .T = 15, .D = 9, .E = 8, .F = 11, .K = 3, .gate_D = 5,
     .kind = NOISY, .weight = NOISY_LOSSES},
    {.name = "noisy, host's logits", .T = 15, .D = 9, .E = 8, .F = 11, .K = 3, .logits_in = 1,
     .kind = NOISY, .weight = NOISY_LOSSES},
    {.name = "noisy, capacity", .T = 30, .D = 9, .E = 8, .F = 11, .K = 3, .kind = NOISY,
     .capacity_kind = MOE_CAPACITY_NUMBER, .capacity = 6, .renormalize_after_drop = 1,
     .weight = NOISY_LOSSES},
    {.name = "softmax after", .T = 14, .D = 8, .E = 6, .F = 9, .K = 3, .order = 1,
     .weight = ALL_LOSSES},
    {.name = "softmax after, renormalised", .T = 14, .D = 8, .E = 6, .F = 9, .K = 3, .order = 1,
     .renormalize = 1, .renormalize_epsilon = 0.01, .route_scale = 2.5, .weight = ALL_LOSSES},
    {.name = "sigmoid", .T = 14, .D = 8, .E = 6, .F = 9, .K = 2, .score = 1, .order = 1,
     .weight = ALL_LOSSES},
    {.name = "sigmoid, renormalised", .T = 14, .D = 8, .E = 6, .F = 9, .K = 2, .score = 1,
     .order = 1, .renormalize = 1, .renormalize_epsilon = 1e-20, .route_scale = 1.5,
     .router_bias = 1, .weight = ALL_LOSSES},
    {.name = "sequence by softmax", .T = 14, .D = 8, .E = 6, .F = 9, .K = 2, .sequence_softmax = 1,
     .groups = 3, .weight = ALL_LOSSES},
    {.name = "capacity 0", .T = 14, .D = 8, .E = 6, .F = 9, .K = 2,
     .capacity_kind = MOE_CAPACITY_NUMBER, .weight = ALL_LOSSES},
    {.name = "factor up", .T = 29, .D = 8, .E = 6, .F = 9, .K = 2, .order = 1,
     .capacity_kind = MOE_CAPACITY_FACTOR, .capacity_factor = 0.8, .groups = 3,
     .weight = ALL_LOSSES},
    {.name = "factor down", .T = 29, .D = 8, .E = 6, .F = 9, .K = 2, .order = 1,
     .capacity_kind = MOE_CAPACITY_FACTOR, .capacity_factor = 0.8, .capacity_rounding = 1,
     .capacity_minimum = 2, .masked = 1, .groups = 3, .weight = ALL_LOSSES},
    {.name = "factor nearest", .T = 29, .D = 8, .E = 6, .F = 9, .K = 2, .order = 1,
     .renormalize_after_drop = 1, .capacity_kind = MOE_CAPACITY_FACTOR, .capacity_factor = 1.1,
     .capacity_rounding = 2, .weight = ALL_LOSSES},
    {.name = "gelu tanh", .T = 14, .D = 8, .E = 6, .F = 9, .K = 2,
     .activation = MOE_ACTIVATION_GELU_TANH, .expert_bias = 1},
    {.name = "gelu erf", .T = 14, .D = 8, .E = 6, .F = 9, .K = 2,
     .activation = MOE_ACTIVATION_GELU_ERF, .expert_bias = 1, .layout = 1},
    {.name = "silu", .T = 14, .D = 8, .E = 6, .F = 9, .K = 2, .activation = MOE_ACTIVATION_SILU,
     .expert_sigmoid = 1},
    {.name = "swiglu", .T = 14, .D = 8, .E = 6, .F = 9, .K = 2,
     .activation = MOE_ACTIVATION_SWIGLU, .O = 5},
    {.name = "swiglu, gate up", .T = 14, .D = 8, .E = 6, .F = 9, .K = 2,
     .activation = MOE_ACTIVATION_SWIGLU, .expert_bias = 1, .glu_order = MOE_GLU_GATE_UP},
    {.name = "geglu tanh, up gate", .T = 14, .D = 8, .E = 6, .F = 9, .K = 2,
     .activation = MOE_ACTIVATION_GEGLU_TANH, .expert_bias = 1, .glu_order = MOE_GLU_UP_GATE,
     .layout = 1},
    {.name = "geglu erf, interleaved", .T = 14, .D = 8, .E = 6, .F = 9, .K = 2,
     .activation = MOE_ACTIVATION_GEGLU_ERF, .expert_bias = 1, .glu_order = MOE_GLU_INTERLEAVED},
    {.name = "reglu, interleaved", .T = 14, .D = 8, .E = 6, .F = 9, .K = 2,
     .activation = MOE_ACTIVATION_REGLU, .glu_order = MOE_GLU_INTERLEAVED, .layout = 1},
    {.name = "layer sigmoid", .T = 21, .D = 9, .E = 8, .F = 11, .K = 4, .kind = NOISY,
     .layer_sigmoid = 1, .weight = NOISY_LOSSES},
    {.name = "both sigmoids, mask", .T = 21, .D = 9, .E = 8, .F = 11, .K = 4, .kind = NOISY,
     .layer_sigmoid = 1, .expert_sigmoid = 1, .masked = 1, .weight = NOISY_LOSSES},
    {.name = "gate alone", .T = 21, .D = 9, .E = 8, .F = 1, .K = 4, .kind = NOISY, .no_experts = 1,
     .weight = NOISY_LOSSES},
    {.name = "gate alone, own input", .T = 21, .D = 9, .E = 8, .F = 1, .K = 4, .gate_D = 4,
     .order = 1, .no_experts = 1, .router_bias = 1, .weight = ALL_LOSSES},
    {.name = "gate alone, capacity", .T = 21, .D = 9, .E = 8, .F = 1, .K = 4, .no_experts = 1,
     .capacity_kind = MOE_CAPACITY_NUMBER, .capacity = 5, .renormalize_after_drop = 1,
     .weight = ALL_LOSSES},
    {.name = "wide", .T = 33, .D = 65, .E = 9, .F = 70, .K = 3, .kind = NOISY,
     .activation = MOE_ACTIVATION_SWIGLU, .expert_bias = 1, .weight = NOISY_LOSSES},
    {.name = "many experts", .T = 40, .D = 17, .E = 300, .F = 5, .K = 7, .order = 1,
     .renormalize = 1, .weight = ALL_LOSSES},
};

enum { LAYER_CASES = sizeof layer_cases / sizeof *layer_cases };

#undef NOISY
#undef DENSE
#undef ALL_LOSSES
#undef NOISY_LOSSES

#endif
