/* device_nccl.h - ranks as threads in a group over NCCL, which the program links. */
#ifndef MOE_TEST_DEVICE_NCCL_H
#define MOE_TEST_DEVICE_NCCL_H

#include <moe/moe.h>

enum { DEVICE_NCCL_MOST = 16 };

/* What one rank makes is in its place; the id is every rank's. */
typedef struct device_nccl {
    int32_t ranks;
    char id[128]; /* an ncclUniqueId */
    void *nccl[DEVICE_NCCL_MOST];
} device_nccl;

void device_nccl_open(device_nccl *n, int32_t ranks);
/* On the rank's thread, with all others: the communicator; NULL on an error. */
moe_comm *device_nccl_connect(device_nccl *n, moe_context *context, int32_t rank, double timeout);
/* When the groups are gone. */
void device_nccl_close(device_nccl *n);

#endif
