/* moe/mpi.h - a group of ranks over MPI.
 *
 * In the library libmoe_mpi, one for each MPI (pkg-config moe-mpi); include <mpi.h> before this
 * header, or leave it out and use the Fortran handle, which is a number in every MPI.
 *
 * MPI is the host's: it initialises and finalises it, and its communicator is never freed or
 * aborted; the group has duplicates of it. All messages are between two ranks, so that a wait that
 * ends without one can name who is missing. MPI is called only inside calls of the communicator and
 * of layers that have it, on the thread that made the call: with MPI_THREAD_FUNNELED that is the
 * main thread; groups of several threads need MPI_THREAD_MULTIPLE. Buffers are host memory.
 *
 * A rank that dies takes the others with it in most MPIs unless started otherwise: mpirun
 * --enable-recovery (Open MPI); mpiexec -disable-auto-cleanup with each rank in a shell that
 * ignores SIGUSR1, which the launcher then sends, and a handler for it after MPI_Init (MPICH). The
 * survivors' calls return MOE_ERROR_TIMEOUT or MOE_ERROR_TRANSPORT; they should leave by _exit,
 * since MPI_Finalize would wait for the dead. */
#ifndef MOE_MPI_H
#define MOE_MPI_H

#include <moe/comm.h>
#include <moe/status.h>
#include <moe/types.h>

MOE_BEGIN_DECLS

/* Options of a group over MPI. Fill with moe_mpi_options_init, then change what you need. */
typedef struct moe_mpi_options {
    uint64_t struct_size;
    double timeout; /* seconds that any wait may take, > 0; default 60 */
} moe_mpi_options;

/* Writes every default and the caller's size. Returns as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_mpi_options_init(moe_mpi_options *options, size_t size);

/* Creates a communicator over the ranks of an MPI communicator; every one of them must make this
 * call.
 *   comm     out: the new communicator; untouched on error
 *   context  holds a reference
 *   handle   MPI_Comm_c2f of an intracommunicator, comm.py2f() of mpi4py; duplicated
 *   options  NULL for the defaults
 * Returns MOE_OK or
 *   MOE_ERROR_INVALID_ARGUMENT  also for MPI_COMM_NULL and intercommunicators
 *   MOE_ERROR_INVALID_STATE     MPI is not initialised, or has been finalised
 *   MOE_ERROR_TIMEOUT           not all ranks came
 *   MOE_ERROR_TRANSPORT         MPI failed; the message has its text
 *   MOE_ERROR_OUT_OF_MEMORY, MOE_ERROR_NOT_SUPPORTED if libmoe is of another version
 * Destroy it before MPI_Finalize: after that its duplicates are left to MPI. Since 0.1. */
MOE_API moe_status moe_comm_create_mpi_f(moe_comm **comm, moe_context *context, int32_t handle,
                                         const moe_mpi_options *options);

#ifdef MPI_VERSION
/* The same by the communicator itself. Since 0.1. */
MOE_API moe_status moe_comm_create_mpi(moe_comm **comm, moe_context *context, MPI_Comm handle,
                                       const moe_mpi_options *options);
#endif

MOE_END_DECLS

#endif
