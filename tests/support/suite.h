/* suite.h - how every suite is run. */
#ifndef SUITE_H
#define SUITE_H

#include <check.h>

/* Check notes every assertion that holds, and in a suite that does not fork it then copies these
 * notes over and over: minutes, where loops assert. They tell after which line a test died, which
 * AddressSanitizer says as well. */
#ifdef __SANITIZE_ADDRESS__
#define _mark_point(file, line) ((void)0)
#endif

/* With TWIN=1 copies of what kernels write are allocations, and the host's parallel-for is called
 * for both of two kernels: tests that count either are left out. */
#ifdef MOE_TWIN
enum { COUNTS_HOLD = 0 };
#else
enum { COUNTS_HOLD = 1 };
#endif

/* A group of the suite's tests, each of which may take two minutes on a busy machine. */
static inline TCase *add_case(Suite *suite, const char *name)
{
    TCase *tests = tcase_create(name);
    tcase_set_timeout(tests, 120);
    suite_add_tcase(suite, tests);
    return tests;
}

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
