/* cuda_host.h - what the suites of a host on a GPU share: a small layer, arrays in plain device
 * memory, the same step on the CPU, cases by name. */
#ifndef MOE_TEST_CUDA_HOST_H
#define MOE_TEST_CUDA_HOST_H

#include "cuda_internal.h"
#include "recorder.h"

#include <moe/moe.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MUST(condition)                                                                      \
    do {                                                                                     \
        if (!(condition)) {                                                                  \
            printf("%s:%d: %s (%s; %s)\n", __FILE__, __LINE__, #condition, moe_last_error(), \
                   emu_last_message());                                                      \
            exit(1);                                                                         \
        }                                                                                    \
    } while (0)
#define GOOD(call) MUST((call) == MOE_OK)
#define CUDA(call) MUST((call) == cudaSuccess)
#define SAID(text) (strstr(moe_last_error(), text) != NULL)

enum { T = 13, D = 8, F = 12, E = 4, K = 2, ROOM = T };

typedef struct model {
    moe_context *context;
    moe_gate *gate;
    moe_experts *experts, *shared;
    moe_layer *layer;
    moe_pass *pass;
} model;

enum { PADDED = 1, SHARED = 2, BIAS = 4 };

/* A step's arrays on a device. */
typedef struct arrays {
    float *x, *y, *dy, *dx;
} arrays;

enum { MOST = 40 };
typedef struct results {
    float y[MOST * D], dx[MOST * D];
    double norm;
} results;

extern int host_cases;

int current(void);
void nothing_left(void);
moe_status try_make(model *m, moe_context *context, int options);
void make(model *m, moe_context *context, int options);
void drop(model *m);
moe_cuda_config config_of(int32_t device);
moe_context *context_of(int32_t device);
void fill(float *a, int count, int salt);
void upload(void *to, const void *from, size_t bytes);
void *on_device(int device, const void *from, size_t bytes);
arrays arrays_on(int device, int tokens, int salt);
void free_arrays(const arrays *a);
moe_forward_args forward_args(const arrays *a, int tokens, uint64_t flags, void *stream);
moe_status forward(const model *m, const arrays *a, int tokens, uint64_t flags, void *stream);
moe_status backward(const model *m, const arrays *a, void *stream);
moe_status losses_of(const model *m);
void on_cpu(results *r, int tokens, int salt, int options);
void near(const float *device, const float *host, int count);
void same_as_cpu(const arrays *a, int tokens, int salt, int options);
void build_plan(moe_plan *plan, const void *ids, int tokens);

/* A case of a suite. */
typedef struct host_test {
    const char *name;
    void (*run)(void);
} host_test;
/* Runs all, or the one that the command line names. Programs of one device shut its memory for the
 * host's code all the time (MOE_EMULATION_PROTECT=1), so that a read of it in a test or in src/ ends
 * the program; those of several ranks by chance, for there it takes most of their time. */
int run_host_tests(const host_test *test, size_t tests, int count, char **arguments);

#endif
