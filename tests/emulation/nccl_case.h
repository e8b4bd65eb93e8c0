/* nccl_case.h - a test's body on every rank of a communicator: as threads of one process, or as
 * processes of the same program.
 *
 * A rank has a device of its own, a stream that does not block, and is told an id; it makes the
 * communicator itself. What it expects is counted, for Check's asserts belong to one thread. */
#ifndef EMU_NCCL_CASE_H
#define EMU_NCCL_CASE_H

#include <stdbool.h>
#include <stddef.h>

#include "nccl_fake.h"
#include "recorder.h"

struct shared_case {
    int arrived, turn; /* at the barrier */
    int failures;
    int word[8]; /* for the bodies */
};

struct rank_case {
    int rank, ranks;
    bool process;
    ncclUniqueId id;
    ncclComm_t comm;
    cudaStream_t stream;
    struct shared_case *shared;
};

typedef void rank_body(struct rank_case *r);

struct named_body {
    const char *name;
    rank_body *body;
    int ranks;      /* as threads; 0: on 2, 4 and 8, or of these MOE_TEST_RANKS; -1: none */
    bool processes; /* also as two processes, or of two and four MOE_TEST_RANKS */
    const char *environment; /* MOE_EMULATION_NCCL of these */
    const char *ends_with;   /* what the last process says when it ends with abort() */
};

/* All of them under Check; or, when the program was called for it, one rank of one of them. The
 * list ends with a NULL. MOE_VERBOSE=1 prints how long each took. The program's status. */
int run_bodies(int argc, char **argv, const char *suite, const struct named_body *bodies);

/* What run_bodies is made of: the failures of all ranks; the status of a program that was called
 * with "--rank" and five arguments more. */
int on_threads(int ranks, rank_body *body);
int on_processes(int ranks, const struct named_body *body);
int run_as_rank(char **argv, const struct named_body *bodies);

/* Waits for all ranks, on the host, without CUDA. */
void meet(struct rank_case *r);
void expect(struct rank_case *r, bool holds, const char *what, const char *file, int line);
#define EXPECT(condition) expect(r, condition, #condition, __FILE__, __LINE__)
#define CUDA(call) EXPECT((call) == cudaSuccess)
#define NCCL(call) EXPECT((call) == ncclSuccess)

/* A blocking communicator of all ranks, with every connection made, and its end. */
void make_comm(struct rank_case *r);
void end_comm(struct rank_case *r);
/* What a test's first collectives and pairs wait for. */
void warm_up(struct rank_case *r, ncclComm_t comm);
/* n floats on the device: first, first + 1, ... */
float *floats(struct rank_case *r, size_t n, float first);
/* Waits for the rank's stream. */
void read_floats(struct rank_case *r, float *to, const float *from, size_t n);
/* Still pending after some time of asking? */
bool stays_pending(cudaStream_t stream);
bool all_nan(const float *x, size_t n);
void sleep_ms(int milliseconds);
double seconds(void); /* by a clock that only grows */

/* From then on mistakes are kept, of all ranks that are threads. */
void watch_mistakes(void);
bool mistaken(const char *words); /* whether one of them has these words */

#endif
