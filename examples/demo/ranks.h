/* ranks.h - the processes that train together. Each holds a share of the experts and of every
 * batch, and all else alike.
 *
 * Three files make ranks_begin, ranks_end and ranks_join: ranks_none.c, for a program of one
 * process, ranks_mpi.c, and ranks_nccl.c for GPUs. Every rank makes every call below in the same
 * order; with one rank they cost nothing. Sums are formed in order of rank, so that they are the
 * bytes of one rank that adds the same parts in the same order. */
#ifndef DEMO_RANKS_H
#define DEMO_RANKS_H

#include <moe/moe.h>

enum { MOST_RANKS = 1024 };

typedef struct ranks {
    moe_context *context;
    moe_comm *comm; /* may be NULL with one rank */
    int32_t rank, size;
    void *group; /* what the transport calls them; NULL where it needs nothing */
} ranks;

/* What ranks_begin takes from the command line, as lines of the usage; may be "". */
extern const char ranks_usage[];

/* Before the command line is read: it may take words from it. Only rank 0 has an output afterwards.
 * Where the program starts its ranks itself, this returns in them alone. Returns 0, or -1 with a
 * message on stderr. */
int ranks_begin(ranks *r, int *argc, char ***argv);
/* `code` is the program's exit code. Where ranks did not fail together this ends them all. */
void ranks_end(ranks *r, int code);

/* A communicator of these ranks for the layers of a context; NULL with one rank. Returns 0, or -1
 * with a message on stderr. */
int ranks_join(const ranks *r, moe_context *context, moe_comm **comm);

/* Whether the output is a terminal. Several ranks have none: mpirun may show them one that is a
 * file. */
int ranks_terminal(const ranks *r);

/* The first of n things that are part `part` of `parts`: contiguous, the first ones one larger
 * where they cannot be equal. begin: [parts+1]. */
int64_t ranks_share(int64_t n, int64_t parts, int64_t part);
void ranks_shares(int64_t *begin, int64_t n, int64_t parts);

/* The rest returns 0, or -1 with a message on stderr. */

/* Rows begin[q] to begin[q+1] - 1 of `all` become those of rank q, on every rank, or, with
 * to_first, on rank 0, where alone `all` is needed then. own: this rank's. */
int ranks_gather(const ranks *r, void *all, const int64_t *begin, const void *own,
                 int64_t row_bytes);
int ranks_gather_to_first(const ranks *r, void *all, const int64_t *begin, const void *own,
                          int64_t row_bytes);

/* values[count] become their sums over the ranks, on every rank. */
int ranks_sum_floats(const ranks *r, float *values, int64_t count);
int ranks_sum_doubles(const ranks *r, double *values, int64_t count);

/* What rank 0 has becomes what all have. */
int ranks_broadcast(const ranks *r, void *data, int64_t bytes);

/* Sets *value, >= 0, to the largest of all ranks. */
int ranks_most(const ranks *r, int *value);

/* Whether a call of rank 0 failed there: what rank 0 returned, on every rank; -1 also if it cannot
 * tell. */
int ranks_agree(const ranks *r, int result);

#endif
