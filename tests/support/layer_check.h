/* layer_check.h - for suites: one forward and backward of a case against the reference. */
#ifndef LAYER_CHECK_H
#define LAYER_CHECK_H

#include "support/layer_case.h"

#include <check.h>

static inline void layer_case_check(layer_case *c, uint64_t seed, int32_t dtype)
{
    layer_run r;
    ref_result want;
    layer_case_make(c, seed);
    ref_run(&c->p, &want, 1);
    layer_run_make(&r, c, dtype, NULL);
    ck_assert_msg(layer_run_forward(&r) == MOE_OK, "%s: %s", c->name, moe_last_error());
    ck_assert_msg(layer_run_backward(&r) == MOE_OK, "%s: %s", c->name, moe_last_error());
    const char *difference = layer_run_compare(&r, &want);
    ck_assert_msg(difference[0] == 0, "%s (seed %llu)", difference, (unsigned long long)seed);
    layer_run_free(&r);
    ref_free(&want);
    layer_case_free(c);
}

#endif
