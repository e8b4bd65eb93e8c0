/* nccl_board.c - where the ranks of a communicator meet: a file that each process maps once.
 *
 * The unique id is the file's path. The file is sparse and loses its name when all ranks have
 * joined, so nothing is left behind by a process that dies. */
#include "nccl_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static const char id_magic[8] = "moenccl";
static struct nccl_world *worlds;

/* Names of files that nobody has unlinked yet. */
static struct pending {
    struct pending *next;
    int pid;
    char path[NCCL_PATH];
} * unused;

/* ---- ids ------------------------------------------------------------------------------------- */

bool nccl_id_make(ncclUniqueId *id)
{
    const char *dir = emu_option("TMPDIR");
    char *path = id->internal + sizeof id_magic;
    memset(id, 0, sizeof *id);
    memcpy(id->internal, id_magic, sizeof id_magic);
    int length = snprintf(path, NCCL_PATH, "%s/moe-nccl-%d-XXXXXX", dir != NULL ? dir : "/tmp",
                          (int)getpid());
    int file = length < NCCL_PATH ? mkstemp(path) : -1;
    if (file < 0) return false;
    close(file);
    struct pending *p = calloc(1, sizeof *p);
    if (p == NULL) abort();
    p->pid = (int)getpid();
    memcpy(p->path, path, NCCL_PATH);
    p->next = unused;
    unused = p;
    return true;
}

const char *nccl_id_path(const ncclUniqueId *id)
{
    const char *path = id->internal + sizeof id_magic;
    if (memcmp(id->internal, id_magic, sizeof id_magic) != 0) return NULL;
    return memchr(path, 0, NCCL_PATH) != NULL ? path : NULL;
}

static void forget(const char *path)
{
    for (struct pending **p = &unused; *p != NULL; p = &(*p)->next) {
        struct pending *found = *p;
        if (strcmp(found->path, path) != 0) continue;
        *p = found->next;
        free(found);
        return;
    }
}

/* A forked child has the list, not the files. */
static void __attribute__((destructor)) remove_unused(void)
{
    for (struct pending *p = unused; p != NULL; p = p->next) {
        if (p->pid == (int)getpid()) unlink(p->path);
    }
}

/* ---- maps ------------------------------------------------------------------------------------ */

unsigned char *nccl_room(const struct nccl_world *w, int rank)
{
    size_t begin = (sizeof *w->board + 4095) & ~(size_t)4095;
    return (unsigned char *)w->board + begin + (size_t)rank * NCCL_ROOM;
}

/* By system call: the sanitizers need not know of so large a map. */
static bool map(struct nccl_world *w, int ranks, bool create)
{
    int file = open(w->path, O_RDWR | O_CLOEXEC | (create ? O_CREAT : 0), 0600);
    w->bytes = ((sizeof *w->board + 4095) & ~(size_t)4095) + (size_t)ranks * NCCL_ROOM;
    long p = -1;
    if (file >= 0 && ftruncate(file, (off_t)w->bytes) == 0) {
        p = syscall(SYS_mmap, NULL, w->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
                    file, 0);
    }
    if (p == -1) emu_refuse(cudaErrorUnknown, "NCCL: %s: %s", w->path, strerror(errno));
    if (file >= 0) close(file);
    w->board = p != -1 ? (struct nccl_board *)p : NULL;
    return p != -1;
}

static struct nccl_world *find(const char *path)
{
    for (struct nccl_world *w = worlds; w != NULL; w = w->next) {
        if (strcmp(w->path, path) == 0) return w;
    }
    return NULL;
}

static bool agree(struct nccl_world *w, int ranks)
{
    nccl_board_lock(w->board);
    if (w->board->ranks == 0) w->board->ranks = ranks;
    int said = w->board->ranks;
    nccl_board_unlock(w->board);
    if (said == ranks) return true;
    emu_refuse(cudaErrorUnknown, "NCCL: one rank says there are %d ranks, another %d", ranks, said);
    return false;
}

struct nccl_world *nccl_world_open(const char *path, int ranks, bool create)
{
    struct nccl_world *w = find(path);
    if (w == NULL) {
        w = calloc(1, sizeof *w);
        if (w == NULL) abort();
        snprintf(w->path, sizeof w->path, "%s", path);
        if (!map(w, ranks, create)) {
            free(w);
            return NULL;
        }
        w->next = worlds;
        worlds = w;
    }
    w->references++;
    if (agree(w, ranks)) return w;
    nccl_world_close(w);
    return NULL;
}

void nccl_world_unlink(struct nccl_world *w)
{
    if (w->unlinked) return;
    w->unlinked = true;
    unlink(w->path);
    forget(w->path);
}

void nccl_world_close(struct nccl_world *w)
{
    if (--w->references > 0) return;
    struct nccl_world **p = &worlds;
    while (*p != w) p = &(*p)->next;
    *p = w->next;
    syscall(SYS_munmap, w->board, w->bytes);
    free(w);
}

/* ---- the lock -------------------------------------------------------------------------------- */

/* Dead, whether or not its parent knows. */
static bool gone(int pid)
{
    char path[32], text[256] = "";
    if (kill(pid, 0) != 0) return errno == ESRCH;
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t bytes = file >= 0 ? read(file, text, sizeof text - 1) : 0;
    if (file >= 0) close(file);
    const char *name_end = bytes > 0 ? strrchr(text, ')') : NULL;
    return name_end != NULL && (name_end[2] == 'Z' || name_end[2] == 'X');
}

static bool take(struct nccl_board *board, int *owner)
{
    return __atomic_compare_exchange_n(&board->owner, owner, (int)getpid(), false, __ATOMIC_ACQUIRE,
                                       __ATOMIC_RELAXED);
}

/* One process at a time; its threads have the lock of the process already. The lock of a process
 * that died is taken. */
void nccl_board_lock(struct nccl_board *board)
{
    for (int tries = 1, owner = 0; !take(board, &owner); tries++, owner = 0) {
        if (tries % 1000 == 0 && owner != 0 && gone(owner) && take(board, &owner)) return;
        usleep(20);
    }
}

void nccl_board_unlock(struct nccl_board *board)
{
    __atomic_store_n(&board->owner, 0, __ATOMIC_RELEASE);
}
