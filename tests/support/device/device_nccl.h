/* device_nccl.h - ranks as threads in a group over NCCL, each with a device of its own, in programs
 * that are compiled with MOE_TEST_NCCL. */
#ifndef MOE_TEST_DEVICE_NCCL_H
#define MOE_TEST_DEVICE_NCCL_H

#include <moe/moe.h>

#include <stdbool.h>

enum { DEVICE_NCCL_MOST = 8 };

#ifdef MOE_TEST_NCCL
#include <pthread.h>

enum { OVER_NCCL = 1 };

/* What one rank makes is in its place; the id is every rank's. */
typedef struct device_nccl {
    int32_t ranks;
    char id[128]; /* an ncclUniqueId */
    void *nccl[DEVICE_NCCL_MOST];
    bool broken[DEVICE_NCCL_MOST];
    pthread_barrier_t all;
} device_nccl;

void device_nccl_open(device_nccl *n, int32_t ranks);
/* On the rank's thread, with all others: the communicator; NULL on an error. */
moe_comm *device_nccl_connect(device_nccl *n, moe_context *context, int32_t rank, double timeout);
/* On every rank's thread, before its objects go: after a failure of any rank NCCL's communicators
 * are aborted, so that nothing is under way. */
void device_nccl_leave(device_nccl *n, int32_t rank, moe_comm *comm);
/* When the groups are gone. */
void device_nccl_close(device_nccl *n);
#else
enum { OVER_NCCL = 0 };

typedef int device_nccl;
static inline void device_nccl_open(device_nccl *n, int32_t ranks) { (void)n, (void)ranks; }
static inline moe_comm *device_nccl_connect(device_nccl *n, moe_context *context, int32_t rank,
                                            double timeout)
{
    (void)n, (void)context, (void)rank, (void)timeout;
    return NULL;
}
static inline void device_nccl_leave(device_nccl *n, int32_t rank, moe_comm *comm)
{
    (void)n, (void)rank, (void)comm;
}
static inline void device_nccl_close(device_nccl *n) { (void)n; }
#endif

#endif
