/* sort.h - entries of a plan in the order of some digits. sort.cu */
#ifndef MOE_CUDA_SORT_H
#define MOE_CUDA_SORT_H

#include "elements.h"

/* The numbers an entry is sorted by. While entries ask for rows, slot_of_entry holds
 * group << 32 | key, or -1 for one that does not ask. */
enum {
    MOE_DIGIT_EXPERT,
    MOE_DIGIT_GROUP,
    MOE_DIGIT_KEY,   /* small first */
    MOE_DIGIT_CHOICE /* the entry's place in its token; 0 in groups without a limit */
};

enum { MOE_SORT_TILE = 1024, MOE_SORT_BINS = 256 };

typedef struct moe_sort_key {
    int32_t source; /* MOE_DIGIT_* */
    int64_t most;   /* no number is larger */
} moe_sort_key;

/* Sorts the entries whose slot is not -1, equal ones in order of entry, by keys [keys], the last
 * key first. Ids in plan->entry_of_row, how many in plan->expert_begin[E]; token_of_row and
 * row_of_entry are scratch. plan->entries > 0; group_capacity only with MOE_DIGIT_CHOICE. */
moe_status moe__cuda_sort_entries(const moe__workers *workers, const moe__plan_arrays *plan,
                                  const int64_t *group_capacity, const moe_sort_key *keys,
                                  int32_t count);

#endif
