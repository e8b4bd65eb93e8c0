/* ranks_nccl.c - one process for each GPU of this machine: build/demo_cuda --gpus 4. The program
 * starts them itself. It forks before anything of CUDA is called, since a process that has used
 * CUDA cannot be forked, and then only watches: rank q is a child with GPU q. */
#define _XOPEN_SOURCE 700
#include "ranks.h"

#include "model.h"

#include <cuda_runtime_api.h>
#include <errno.h>
#include <moe/cuda.h>
#include <moe/nccl.h>
#include <nccl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST_GPUS = 64, GRACE_SECONDS = 5 };

const char ranks_usage[] = "  --gpus N         GPUs of this machine, a rank on each (default 1)\n";

/* ---- the command line ------------------------------------------------------------------------ */

/* Takes "--gpus N" and "--gpus=N" out of the words. */
static int take_gpus(int32_t *gpus, int *argc, char **argv)
{
    const char *value = NULL;
    int kept = 1;
    for (int i = 1; i < *argc; i++) {
        if (strcmp(argv[i], "--gpus") == 0)
            value = i + 1 < *argc ? argv[++i] : "";
        else if (strncmp(argv[i], "--gpus=", 7) == 0)
            value = argv[i] + 7;
        else
            argv[kept++] = argv[i];
    }
    argv[ *argc = kept] = NULL;
    *gpus = 1;
    if (!value) return 0;
    char *end;
    long number = strtol(value, &end, 10);
    *gpus = (int32_t)number;
    if (*value != 0 && *end == 0 && number >= 1 && number <= MOST_GPUS) return 0;
    fprintf(stderr, "--gpus %s: a whole number from 1 to %d is needed\n", value, MOST_GPUS);
    return -1;
}

/* ---- the process that watches ---------------------------------------------------------------- */

static volatile sig_atomic_t came;

static void note_signal(int number) { came = number; }

static void kill_all(const pid_t *child, int32_t size, int number)
{
    for (int32_t q = 0; q < size; q++)
        if (child[q] > 0) kill(child[q], number);
}

/* What a rank that has ended makes the program's exit code. */
static int code_of(int32_t rank, int status)
{
    if (WIFEXITED(status)) return WEXITSTATUS(status);
    fprintf(stderr, "rank %d was ended by signal %d\n", (int)rank, WTERMSIG(status));
    return 128 + WTERMSIG(status);
}

/* Waits until all have ended, and returns the first code that is not 0. After a failure the others
 * have some seconds to find out by themselves and to say so. Rank 0 is told of signals, and tells
 * the rest between two steps. */
static int watch(pid_t *child, int32_t size)
{
    const struct timespec pause = {0, 10000000};
    int32_t left = size, waited = 0;
    int code = 0, status;
    struct sigaction action = {.sa_handler = note_signal};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    while (left > 0) {
        pid_t ended = waitpid(-1, &status, WNOHANG);
        for (int32_t q = 0; q < size; q++) {
            if (ended <= 0 || child[q] != ended) continue;
            if (code == 0) code = code_of(q, status);
            child[q] = 0;
            left--;
        }
        if (ended > 0) continue;
        int number = came;
        came = 0;
        if (number != 0 && child[0] > 0) kill(child[0], number);
        nanosleep(&pause, NULL);
        if (code != 0 && ++waited == GRACE_SECONDS * 100) {
            fprintf(stderr, "a rank failed, and %d still waited after %d s: they are ended\n",
                    (int)left, GRACE_SECONDS);
            kill_all(child, size, SIGKILL);
        }
    }
    return code;
}

/* Starts the ranks, and returns in each of them. The pipe is theirs. */
static int start_ranks(ranks *r, const int *ends)
{
    pid_t child[MOST_GPUS] = {0}, parent = getpid();
    for (r->rank = 0; r->rank < r->size; r->rank++) {
        pid_t made = child[r->rank] = fork();
        if (made == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL); /* never without the one that watches */
            return getppid() == parent ? 0 : -1;
        }
        if (made > 0) continue;
        fprintf(stderr, "rank %d cannot start: %s\n", (int)r->rank, strerror(errno));
        kill_all(child, r->rank, SIGKILL);
        return -1;
    }
    close(ends[0]);
    close(ends[1]);
    exit(watch(child, r->size));
}

/* ---- a rank ---------------------------------------------------------------------------------- */

static int cuda_failed(const char *what, const char *why)
{
    fprintf(stderr, "%s: %s\n", what, why);
    return -1;
}

/* Every rank has the same answer; one says it. */
static int count_gpus(const ranks *r)
{
    int count = 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaSuccess && count >= r->size) return 0;
    if (r->rank > 0) return -1;
    if (status != cudaSuccess) return cuda_failed("no GPU", cudaGetErrorString(status));
    fprintf(stderr, "--gpus %d: this machine has %d\n", (int)r->size, count);
    return -1;
}

/* NCCL's name of the group: rank 0 makes it and writes it for each of the others into a pipe. */
static int share_id(const ranks *r, const int *ends, ncclUniqueId *id)
{
    if (r->rank > 0) {
        close(ends[1]); /* if rank 0 ends, so does the pipe */
        return read(ends[0], id, sizeof *id) == (ssize_t)sizeof *id ? 0 : -1;
    }
    ncclResult_t result = ncclGetUniqueId(id);
    if (result != ncclSuccess) return cuda_failed("NCCL", ncclGetErrorString(result));
    for (int32_t q = 1; q < r->size; q++)
        if (write(ends[1], id, sizeof *id) != (ssize_t)sizeof *id)
            return cuda_failed("NCCL's id", strerror(errno));
    return 0;
}

int ranks_join(const ranks *r, moe_context *context, moe_comm **comm)
{
    moe_nccl_config c;
    *comm = NULL;
    if (r->size == 1) return 0;
    TRY(moe_nccl_config_init(&c, sizeof c));
    c.comm = r->group;
    c.duplicate = 1; /* a group that fails lets its streams go on */
    TRY(moe_comm_create_nccl(comm, context, &c));
    return 0;
}

static int make_group(ranks *r, const int *ends)
{
    ncclUniqueId id;
    ncclComm_t comm;
    if (count_gpus(r) != 0) return -1;
    cudaError_t status = cudaSetDevice(r->rank);
    if (status != cudaSuccess) return cuda_failed("cudaSetDevice", cudaGetErrorString(status));
    if (share_id(r, ends, &id) != 0) return -1;
    ncclResult_t result = ncclCommInitRank(&comm, r->size, id, r->rank);
    if (result != ncclSuccess) return cuda_failed("NCCL", ncclGetErrorString(result));
    r->group = comm;
    TRY(moe_cuda_context_create(&r->context, NULL));
    return ranks_join(r, r->context, &r->comm);
}

int ranks_begin(ranks *r, int *argc, char ***argv)
{
    int ends[2];
    memset(r, 0, sizeof *r);
    if (take_gpus(&r->size, argc, *argv) != 0) return -1;
    if (r->size == 1) return 0;
    if (pipe(ends) != 0) return cuda_failed("a pipe", strerror(errno));
    if (start_ranks(r, ends) != 0 || make_group(r, ends) != 0) return -1;
    close(ends[0]);
    if (r->rank == 0) close(ends[1]);
    return !r->rank || freopen("/dev/null", "w", stdout) ? 0 : -1;
}

/* After a failure the barrier tells whether all ranks are here; if not, taking the group down could
 * last for ever, and the process that watches ends the others. */
void ranks_end(ranks *r, int code)
{
    if (r->size == 1) return;
    if (code == 1 && moe_comm_barrier(r->comm) != MOE_OK) {
        fflush(NULL);
        _exit(code);
    }
    moe_comm_destroy(r->comm);
    moe_context_destroy(r->context);
    ncclCommDestroy(r->group);
}
