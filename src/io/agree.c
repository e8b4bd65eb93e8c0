/* agree.c - one verdict for all ranks: each tells its status, and all return the first one that is
 * not MOE_OK, with that rank's message. */
#include "io.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct verdict {
    uint64_t hash;
    int64_t number;
    int32_t status, reserved;
    char text[232];
} verdict;

enum { FEW = 16 }; /* ranks whose verdicts need no allocation */

moe_status moe__io_find_group(moe__io_group *group, moe_comm *comm,
                              const moe_checkpoint_item *items, int64_t count, const char *function)
{
    *group = (moe__io_group){.comm = comm, .size = 1};
    for (int64_t i = 0; items && i < count; i++) {
        moe_layer_config c = {.struct_size = sizeof c};
        const void *at = (const char *)items + (uint64_t)i * items[0].struct_size;
        moe_checkpoint_item item;
        MOE_TRY(MOE__IO_READ(moe__io_item_info, &item, at, function));
        if (!item.layer) continue;
        MOE_TRY(moe_layer_get_config(item.layer, &c));
        if (!c.comm || moe_comm_size(c.comm) == 1) continue;
        if (group->comm && group->comm != c.comm)
            REFUSE(MOE_ERROR_INVALID_ARGUMENT, "the layer of items[%lld] has another communicator",
                   (ll)i);
        group->comm = c.comm;
    }
    if (group->comm) {
        group->rank = moe_comm_rank(group->comm);
        group->size = moe_comm_size(group->comm);
    }
    return MOE_OK;
}

static moe_status judge(const verdict *v, int32_t ranks, int32_t rank, const char *function)
{
    for (int32_t p = 0; p < ranks; p++) {
        if (v[p].status == MOE_OK) continue;
        if (p == rank) return v[p].status; /* the message is this thread's already */
        REFUSE(v[p].status, "rank %d: %s", (int)p, v[p].text);
    }
    for (int32_t p = 1; p < ranks; p++)
        if (v[p].hash != v[0].hash)
            REFUSE(MOE_ERROR_INVALID_ARGUMENT,
                   "rank %d has other names, shapes, dtypes or metadata than rank 0", (int)p);
    return MOE_OK;
}

moe_status moe__io_agree(const moe__io_group *group, moe_status status, uint64_t hash,
                         int64_t *number, const char *function)
{
    verdict few[FEW], own = {.hash = hash, .number = number ? *number : 0, .status = status};
    int64_t few_begin[FEW + 1];
    if (group->size == 1) return status;
    bool many = group->size > FEW;
    size_t P = (size_t)group->size;
    verdict *all = many ? malloc(P * sizeof *all) : few;
    int64_t *begin = many ? malloc((P + 1) * sizeof *begin) : few_begin;
    if (status != MOE_OK) (void)snprintf(own.text, sizeof own.text, "%s", moe_last_error());
    moe_status result;
    if (all && begin) {
        for (size_t p = 0; p <= P; p++) begin[p] = (int64_t)p;
        result = moe_comm_all_gather(group->comm, all, begin, &own, sizeof own);
        if (result == MOE_OK) result = judge(all, group->size, group->rank, function);
        if (result == MOE_OK && number) *number = all[0].number;
    } else {
        moe_comm_abort(group->comm); /* the others must not wait */
        result = moe__io_fail(MOE_ERROR_OUT_OF_MEMORY, function, "no memory");
    }
    if (many) free(all), free(begin);
    return result;
}
