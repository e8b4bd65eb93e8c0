/* moe/comm.h - an expert-parallel group of ranks.
 *
 * The layer exchanges rows through a communicator when its experts live on several ranks. So far
 * there is the group of one rank; groups over MPI, NCCL and the host's own collectives come with
 * their modules and use the same handle. */
#ifndef MOE_COMM_H
#define MOE_COMM_H

#include <moe/status.h>
#include <moe/types.h>

MOE_BEGIN_DECLS

/* Creates the group of one rank.
 *   comm     out: the new group; untouched on error
 *   context  holds a reference
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT or MOE_ERROR_OUT_OF_MEMORY. Since 0.1. */
MOE_API moe_status moe_comm_create_self(moe_comm **comm, moe_context *context);

/* Gives up the program's reference. NULL is legal. Since 0.1. */
MOE_API void moe_comm_destroy(moe_comm *comm);

/* Returns the number of this rank, from 0; -1 for NULL. Since 0.1. */
MOE_API int32_t moe_comm_rank(const moe_comm *comm);

/* Returns the number of ranks; 0 for NULL. Since 0.1. */
MOE_API int32_t moe_comm_size(const moe_comm *comm);

MOE_END_DECLS

#endif
