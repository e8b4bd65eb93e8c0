/* moe/check.h - are the gradients right, for this configuration and on this machine?
 *
 * A host that changes a configuration, a compiler or a machine asks the library to compare every
 * gradient of a layer with central differences of its own forward:
 *
 *     (L(a + h) - L(a - h)) / 2h   against   dL/da,      L = sum(y * dy) + losses
 *
 * for elements a of every input and every parameter, in double precision, selections held still. It
 * is the check to run first when a training run misbehaves. */
#ifndef MOE_CHECK_H
#define MOE_CHECK_H

#include <moe/context.h>
#include <moe/layer.h>
#include <moe/status.h>
#include <moe/types.h>

MOE_BEGIN_DECLS

/* With which parameters a layer is checked. */
enum {
    MOE_CHECK_DRAWN = 0,  /* normal numbers from `seed`, so that every gate has an opinion */
    MOE_CHECK_CURRENT = 1 /* the layer's own of this moment, converted to double */
};

/* What to check. Fill with moe_gradient_check_init, then change what you need. */
typedef struct moe_gradient_check {
    uint64_t struct_size;
    int64_t tokens;     /* T >= 1; default 32 */
    int64_t groups;     /* G token groups of about equal size, 1 to T; default 1 */
    int64_t probes;     /* elements of each tensor, half of them those with the largest
                             gradients, half drawn; default 24; 0 = every element */
    uint64_t seed;      /* of everything that is drawn; default 1 */
    double step;        /* h > 0, finite; default 1e-5 */
    double tolerance;   /* largest error that agrees, relative to the largest of both values and
                             of a thousandth of the tensor's largest gradient; what rounding
                             leaves of a difference is allowed on top; >= 0; default 1e-6 */
    int32_t parameters; /* MOE_CHECK_*; default MOE_CHECK_DRAWN */
    int32_t train;      /* 1: as with MOE_FORWARD_TRAIN; 0: without; default 1 */
    moe_log_fn report;  /* receives the report, a line a tensor and two around them, all of
                             MOE_LOG_INFO but those of tensors that disagree, MOE_LOG_ERROR;
                             default NULL */
    void *report_user;  /* handed to it */
} moe_gradient_check;

/* What was found. */
typedef struct moe_gradient_report {
    uint64_t struct_size;
    int64_t tensors;         /* compared: inputs and parameters */
    int64_t probes;          /* elements compared */
    int64_t disagreements;   /* of them, those beyond the tolerance */
    int64_t kinks;           /* elements left out because L is not smooth there (a ReLU at 0, two
                                equal candidates for a threshold): the one-sided differences stay
                                apart as the step shrinks */
    double worst;            /* largest error, relative as above; of those that disagree, if any
                                do */
    const char *worst_name;  /* tensor of `worst`: "x", "gate_x", "logits", "weights" or a
                               parameter's name; lives as long as the layer; NULL if nothing was
                               compared */
    int64_t worst_index;     /* element of that tensor, in row-major order */
    double worst_gradient;   /* the library's gradient there */
    double worst_difference; /* the central difference there */
} moe_gradient_report;

/* Write every default and the caller's size. Return as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_gradient_check_init(moe_gradient_check *check, size_t size);
/* The same for a report (all zero). Since 0.1. */
MOE_API moe_status moe_gradient_report_init(moe_gradient_report *report, size_t size);

/* Checks the gradients of a layer like `layer`: the same gate, pool, losses, capacity and layout,
 * in f64, with inputs drawn from `seed`. The layer itself is read and never changed; its passes may
 * be in flight. The host's own experts are called with dtype f64 and parameters 0. Takes two
 * forwards for each element; memory of a layer of this configuration in f64. A layer on a GPU has
 * this done on the CPU, with its parameters fetched where they are asked for, behind what is on the
 * legacy default stream.
 *   layer   whose configuration is checked. A layer without a gate gets a drawn plan, and the
 *           gradient by its weights is checked too; a gate of width 0 gets drawn logits
 *   check   NULL for all defaults
 *   report  in: struct_size; out: the rest, written with MOE_OK and with MOE_ERROR_WRONG_GRADIENT;
 *           may be NULL
 * Returns MOE_OK if every gradient agrees; MOE_ERROR_WRONG_GRADIENT if one does not, the message
 * names tensor, element and both values; MOE_ERROR_INVALID_STATE with MOE_CHECK_CURRENT if a
 * parameter is not bound; MOE_ERROR_NOT_SUPPORTED for a layer on several ranks (one rank with all
 * experts computes the same); MOE_ERROR_INVALID_ARGUMENT,
 * MOE_ERROR_OUT_OF_MEMORY, MOE_ERROR_CALLBACK or an error of a struct's size. No other thread may
 * be binding the layer's parameters, or writing to them, meanwhile. Since 0.1. */
MOE_API moe_status moe_check_gradients(moe_layer *layer, const moe_gradient_check *check,
                                       moe_gradient_report *report);

MOE_END_DECLS

#endif
