/* ranks_mpi.c - the ranks of an MPI program: mpirun -n 4 build/demo_mpi. Compiled by mpicc, which
 * nothing else of the demo needs; MPI itself is ours to begin and to end. */
#include <mpi.h>

#include "ranks.h"

#include "model.h"

#include <moe/mpi.h>
#include <stdio.h>
#include <string.h>

const char ranks_usage[] = "";

static int make_group(ranks *r)
{
    moe_context_config c;
    TRY(moe_context_config_init(&c, sizeof c));
    c.threads = 1;
    TRY(moe_context_create(&r->context, &c));
    TRY(moe_comm_create_mpi(&r->comm, r->context, MPI_COMM_WORLD, NULL));
    r->rank = moe_comm_rank(r->comm);
    r->size = moe_comm_size(r->comm);
    return 0;
}

int ranks_begin(ranks *r, int *argc, char ***argv)
{
    int level;
    memset(r, 0, sizeof *r);
    if (MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &level) != MPI_SUCCESS) return -1;
    int bad = make_group(r) != 0;
    if (!bad && r->size > MOST_RANKS) {
        if (r->rank == 0)
            fprintf(stderr, "%d ranks: this program takes at most %d\n", (int)r->size, MOST_RANKS);
        bad = 1;
    }
    if (!bad && r->rank > 0 && !freopen("/dev/null", "w", stdout)) bad = 1;
    if (bad) ranks_end(r, 1);
    return bad ? -1 : 0;
}

int ranks_join(const ranks *r, moe_context *context, moe_comm **comm)
{
    *comm = NULL;
    if (r->size > 1) TRY(moe_comm_create_mpi(comm, context, MPI_COMM_WORLD, NULL));
    return 0;
}

/* After a failure the barrier tells whether all ranks are here; if not, waiting for them in
 * MPI_Finalize could last for ever. */
void ranks_end(ranks *r, int code)
{
    if (code == 1 && (!r->comm || moe_comm_barrier(r->comm) != MOE_OK)) {
        fflush(NULL);
        MPI_Abort(MPI_COMM_WORLD, code);
    }
    moe_comm_destroy(r->comm);
    moe_context_destroy(r->context);
    MPI_Finalize();
}
