/* suite.h - how every suite is run. */
#ifndef SUITE_H
#define SUITE_H

#include <check.h>

/* Runs a suite, each test in a process of its own unless `fork` is 0, prints Check's closing line
 * and returns what main returns. */
static inline int run_suite(Suite *suite, int fork)
{
    SRunner *runner = srunner_create(suite);
    if (!fork) srunner_set_fork_status(runner, CK_NOFORK);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}

#endif
