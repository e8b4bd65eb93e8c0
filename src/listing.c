/* listing.c - the parameters of pools and layers in one numbering, under the names these have for
 * them: "experts.w1", "experts.0.w1". */
#include "internal.h"

#include <stdio.h>
#include <string.h>

moe_status moe__listing_create(moe__listing *listing, moe_context *context, int64_t room,
                               const char *function)
{
    *listing = (moe__listing){.room = room};
    if (room == 0) return MOE_OK;
    listing->entry = moe__alloc(context, room * (int64_t)sizeof *listing->entry);
    if (!listing->entry)
        REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no memory for the names of %lld parameters", (ll)room);
    return MOE_OK;
}

void moe__listing_free(moe__listing *listing, moe_context *context)
{
    moe__free(context, listing->entry, listing->room * (int64_t)sizeof *listing->entry);
}

static void add(moe__listing *listing, moe__parameter_list *list, int64_t index, const char *prefix,
                const char *name)
{
    moe__listed *entry = &listing->entry[listing->count++];
    *entry = (moe__listed){.list = list, .index = index};
    (void)snprintf(entry->name, sizeof entry->name, "%s%s", prefix, name);
}

void moe__listing_add(moe__listing *listing, const char *prefix, moe__parameter_list *list)
{
    for (int64_t i = 0; i < list->count; i++) add(listing, list, i, prefix, list->p[i].name);
}

void moe__listing_add_all(moe__listing *listing, const char *prefix, const moe__listing *from)
{
    for (int64_t i = 0; i < from->count; i++)
        add(listing, from->entry[i].list, from->entry[i].index, prefix, from->entry[i].name);
}

int64_t moe__listing_find(const moe__listing *listing, const char *name)
{
    for (int64_t i = 0; i < listing->count; i++)
        if (strcmp(listing->entry[i].name, name) == 0) return i;
    return -1;
}
