/* nccl_internal.h - what the files of the fake libnccl share: boards, communicators, operations.
 *
 * The ranks of a communicator meet on its board, a file that all of them map: a seat for each with
 * what it offers and wants, and a room for the bytes it sends. So ranks may be threads or
 * processes. What is a process's own is guarded by the lock of the fake libcudart, a board by its
 * own, taken after the other. */
#ifndef EMU_NCCL_INTERNAL_H
#define EMU_NCCL_INTERNAL_H

#include "internal.h"
#include "nccl_fake.h"

enum { NCCL_RANKS = 64, NCCL_TRANSFERS = 1024, NCCL_PATH = 112 };
#define NCCL_ROOM ((size_t)128 << 20)

/* ---- transfers ------------------------------------------------------------------------------- */

enum nccl_kind {
    NCCL_SEND,
    NCCL_RECEIVE,
    NCCL_ALL_TO_ALL,
    NCCL_ALL_GATHER,
    NCCL_ALL_REDUCE,
    NCCL_REDUCE_SCATTER,
    NCCL_BROADCAST
};

struct nccl_transfer {
    enum nccl_kind kind;
    ncclDataType_t type;
    ncclRedOp_t op;
    int peer; /* or root, or -1 */
    size_t count;
    const void *send;
    void *receive;
    size_t send_bytes, receive_bytes;
    uint64_t call; /* which of the rank's on this communicator, from 1 */
    bool captured;
    /* When it begins: its number in the pair, or among collectives; where its bytes are. */
    uint64_t index;
    size_t at;
    bool done;      /* what is received is there, what is sent was taken */
    int readers;    /* of a collective: ranks that have their result */
    uint64_t taken; /* of an all-to-all: ranks whose block is there */
};

const char *nccl_call_name(enum nccl_kind kind);
const char *nccl_type_name(ncclDataType_t type);
size_t nccl_type_bytes(ncclDataType_t type); /* 0 for none */
/* "call 3, ncclSend to 1, 16 float32" */
void nccl_describe(char *text, size_t bytes, const struct nccl_transfer *t);
/* One rank's buffer of `count` elements each; false for a type that cannot be reduced. */
bool nccl_reduce(void *out, const void *const *in, int ranks, size_t count, ncclDataType_t type,
                 ncclRedOp_t op);

/* ---- boards. nccl_board.c -------------------------------------------------------------------- */

struct nccl_seat {
    int pid; /* 0: nobody joined */
    int device;
    bool shares_device, left, finalized;
    bool to[NCCL_RANKS], from[NCCL_RANKS], ring; /* connections that the rank asked for */
    uint64_t sends[NCCL_RANKS], receives[NCCL_RANKS], collectives; /* begun */
    uint64_t splits;
    int color[2], key[2]; /* of the last two splits */
    bool active;          /* the operation that has begun: */
    int count;
    struct nccl_transfer list[NCCL_TRANSFERS];
};

struct nccl_board {
    int owner; /* of the lock, a pid */
    int ranks, joined;
    struct nccl_seat seat[NCCL_RANKS];
};

struct nccl_world {
    struct nccl_world *next;
    int references;
    char path[NCCL_PATH];
    struct nccl_board *board;
    size_t bytes;
    bool unlinked, remote; /* some rank is another process */
};

bool nccl_id_make(ncclUniqueId *id);
/* The file's path, NULL when the id is none of ours. */
const char *nccl_id_path(const ncclUniqueId *id);
/* Maps the board; NULL with a message when that fails or others say it has other ranks. */
struct nccl_world *nccl_world_open(const char *path, int ranks, bool create);
void nccl_world_close(struct nccl_world *w);
void nccl_world_unlink(struct nccl_world *w);
void nccl_board_lock(struct nccl_board *board);
void nccl_board_unlock(struct nccl_board *board);
unsigned char *nccl_room(const struct nccl_world *w, int rank);

struct nccl_operation {
    struct ncclComm *comm;
    uint64_t ticket, group; /* no ticket when captured */
    int count;
    struct nccl_transfer list[];
};

/* An operation, and the streams it is put on: it runs on the first, the others wait for it. */
struct nccl_launch {
    struct nccl_operation *operation;
    struct CUstream_st **streams;
    int stream_count;
};

/* ---- communicators. nccl_comm.c -------------------------------------------------------------- */

/* Those that share resources fall together. */
struct nccl_family {
    bool dead;
};

/* What a call on a communicator still waits for. */
enum nccl_job { NCCL_NO_JOB, NCCL_JOIN, NCCL_SPLIT, NCCL_CONNECT, NCCL_FINALIZE };

struct nccl_split {
    ncclComm_t *out;
    int color, key;
    bool blocking, shares, posted;
    ncclComm_t child;
};

struct ncclComm {
    struct ncclComm *next;
    enum { NCCL_LIVE, NCCL_DESTROYED, NCCL_ABORTED } life;
    struct nccl_world *world;
    struct nccl_family *family;
    int rank, ranks, device;
    bool blocking, revoked, finalized;
    const void *user; /* the thread that makes a call, or has it in an open group */
    enum nccl_job job;
    struct nccl_split split;
    struct nccl_launch *launch; /* waits for connections */
    int polls;                  /* that still answer ncclInProgress */
    struct CUstream_st **reserved;
    int reserved_count;
    ncclResult_t error; /* asynchronous */
    uint64_t calls, groups, splits;
    uint64_t tickets, tickets_done; /* operations not captured: put, complete */
    int operations;                 /* that hold it, in queues and graphs */
    int captured;                   /* of these, in graphs */
    bool active;                    /* one has begun */
};

extern struct ncclComm *nccl_comms;

/* Aborted, destroyed, revoked, or one of the family was aborted: nothing moves any more. */
bool nccl_dead(const struct ncclComm *comm);
/* The board may go when nothing can touch it. */
void nccl_comm_release(struct ncclComm *comm);
struct nccl_seat *nccl_seat(const struct ncclComm *comm);

enum nccl_need {
    NCCL_ANY,   /* legal at any time, from any thread */
    NCCL_READY, /* nothing of it is in progress, and no other thread uses it */
    NCCL_USABLE /* it also takes transfers, and its device is the thread's */
};

/* Begins a call: locks, plays the faults of its name, checks the communicator (NULL: there is none)
 * as far as needed. Ends with nccl_leave, after an error too. */
ncclResult_t nccl_enter(const char *name, struct ncclComm *comm, enum nccl_need need);
/* Of a rank that has no communicator yet. */
ncclResult_t nccl_enter_as(const char *name, int rank);
ncclResult_t nccl_leave(struct ncclComm *comm, ncclResult_t result);
ncclResult_t nccl_refuse(ncclResult_t result, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
void nccl_record_comm(const char *name, const struct ncclComm *comm);

/* What a split that ends without one hands out: good for its abort. */
struct ncclComm *nccl_stillborn(struct ncclComm *parent);
/* Takes a seat on a board, with a communicator whose job is to wait for the others. */
ncclResult_t nccl_join(struct ncclComm **out, const char *path, int ranks, int rank, int device,
                       bool create);

/* ---- groups and jobs. nccl_group.c, nccl_job.c ----------------------------------------------- */

/* Inside a group it is kept until the end, else it is a group of its own. */
ncclResult_t nccl_put(struct ncclComm *comm, const struct nccl_transfer *t, cudaStream_t stream);
/* The communicator has a job: over when the call or the group returns, or it goes on by itself. */
ncclResult_t nccl_put_job(struct ncclComm *comm);
bool nccl_in_group(void);
size_t nccl_open_groups(void);
const void *nccl_this_thread(void);

/* A call that fails makes its group fail. */
void nccl_group_failed(ncclResult_t result);

bool nccl_job_over(struct ncclComm *comm, ncclResult_t *result);
/* A split is over, whatever came of it: hands out a communicator. */
void nccl_split_ends(struct ncclComm *comm);
/* Waits on the host, without the lock, until the job is over. */
ncclResult_t nccl_job_wait(struct ncclComm *comm);
/* What a call on a communicator that does not block returns. */
ncclResult_t nccl_job_answer(struct ncclComm *comm, bool waits);
bool nccl_in_progress(const struct ncclComm *comm);
void nccl_reserve(struct ncclComm *comm, const struct nccl_launch *launch);
void nccl_unreserve(struct ncclComm *comm);
/* Whether the peers of an operation asked for its connections; asks them first. */
bool nccl_connected(struct ncclComm *comm, const struct nccl_launch *launch, bool ask);
/* Puts comm->launch on its streams. */
ncclResult_t nccl_launch_now(struct ncclComm *comm);
void nccl_launch_drop(struct ncclComm *comm);
/* From now on jobs go on whenever something runs, and streams by themselves for other processes. */
void nccl_job_watch(bool remote);

/* ---- operations. nccl_call.c, nccl_match.c, nccl_operation.c --------------------------------- */

bool nccl_overlap(const void *p, size_t n, const void *q, size_t m);
/* No two transfers of an operation may write one place, or write what another sends. */
ncclResult_t nccl_check_overlaps(const struct nccl_operation *o);
/* Memory that was freed since the call: a mistake, which nccl_deliver reports. */
bool nccl_buffers_gone(const struct ncclComm *comm, const struct nccl_transfer *t);
bool nccl_is_collective(const struct nccl_transfer *t);
/* Moves what can move, for every rank of the process: their threads may do nothing. Then reports
 * the first mistake that was found. */
bool nccl_deliver(const struct nccl_world *w);
struct emu_work *nccl_work(const struct nccl_operation *o);

/* ---- faults. nccl_fault.c -------------------------------------------------------------------- */

ncclResult_t nccl_fault(int rank, const char *name);
/* Of the operation that begins now. */
struct nccl_misfortune {
    bool absent;
    int delay;
    ncclResult_t error;
};
struct nccl_misfortune nccl_misfortune(int rank);
/* How many polls a call answers ncclInProgress at least. */
int nccl_polls(bool waits);
bool nccl_devices_shared(void);
bool nccl_whole(void); /* all-to-alls move all at once */
void nccl_count_host_wait(void);

#endif
