/* example.h - what the examples share so that they can be about one thing each: ending with the
 * library's message when a call fails, and numbers to compute with. */
#ifndef EXAMPLE_H
#define EXAMPLE_H

#include <moe/moe.h>

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

/* Every fallible call returns a status; the message of the last failure is the thread's own. */
#define OK(call)                                                                  \
    do {                                                                          \
        if ((call) != MOE_OK) {                                                   \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, moe_last_error()); \
            exit(1);                                                              \
        }                                                                         \
    } while (0)

/* What an example says about the library must be so. */
#define HOLDS(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                                \
        }                                                                           \
    } while (0)

/* The next number of a sequence, uniform in [-1, 1): a linear congruential generator (Knuth's
 * constants), the same on every machine. */
static inline float next_number(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(*state >> 40) / 8388608.0f - 1.0f;
}

static inline void fill(float *to, int64_t count, uint64_t seed)
{
    for (int64_t i = 0; i < count; i++) to[i] = next_number(&seed);
}

#endif
