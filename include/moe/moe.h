/* moe/moe.h - all of libmoe's core in one include.
 *
 * Read the headers in this order: types.h (words and rules), status.h (errors), context.h (where
 * work runs), gate.h, experts.h and layer.h (the objects), pass.h (a step), plan.h (a routing, and
 * dispatch and combine around a host's own experts), parameter.h (weights and gradients), comm.h,
 * check.h (are the gradients right), preset.h (conventions by name, a configuration in words). */
#ifndef MOE_MOE_H
#define MOE_MOE_H

#include <moe/check.h>
#include <moe/comm.h>
#include <moe/context.h>
#include <moe/experts.h>
#include <moe/gate.h>
#include <moe/layer.h>
#include <moe/parameter.h>
#include <moe/pass.h>
#include <moe/plan.h>
#include <moe/preset.h>
#include <moe/status.h>
#include <moe/types.h>
#include <moe/version.h>

#endif
