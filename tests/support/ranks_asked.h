/* ranks_asked.h - which numbers of ranks a program runs: MOE_TEST_RANKS, a list such as 2,4. */
#ifndef TESTS_SUPPORT_RANKS_ASKED_H
#define TESTS_SUPPORT_RANKS_ASKED_H

#include <stdbool.h>
#include <stdlib.h>

/* Whether the list has the number; `otherwise` without a list. */
static inline bool ranks_asked(int ranks, bool otherwise)
{
    const char *list = getenv("MOE_TEST_RANKS");
    char *end = NULL;
    bool found = false;
    if (!list) return otherwise;
    for (long number = strtol(list, &end, 10); end != list; number = strtol(list, &end, 10)) {
        found = found || number == ranks;
        list = end + (*end == ',');
    }
    return found;
}

#endif
