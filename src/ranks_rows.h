/* ranks_rows.h - rows that travel: memory, positions, packing. Used by the ranks_*.c alone. */
#ifndef MOE_RANKS_ROWS_H
#define MOE_RANKS_ROWS_H

#include "pass_state.h"

/* Slots of this rank, and whether rows travel in blocks. */
static inline int64_t moe__ranks_own(const moe_pass *pass)
{
    return pass->experts->config.num_experts;
}
static inline bool moe__ranks_padded(const moe_pass *pass)
{
    return pass->layer->config.exchange == MOE_EXCHANGE_PADDED;
}

/* Makes *memory at least `bytes` long; what was there is lost. bytes < 0: too many. */
moe_status moe__ranks_room(moe_pass *pass, void **memory, int64_t *capacity, int64_t bytes,
                           const char *function);
void moe__ranks_give_back(moe_pass *pass, void **memory, int64_t *bytes);
/* Memory for the rows of the counts. save: for a backward too. */
moe_status moe__ranks_lay_out(moe_pass *pass, bool save, const char *function);

/* An exchange, waited for, of rows by rank or of the same bytes from every rank to all; or one of
 * rows started, and waited for later. All are counted in the report. */
moe_status moe__ranks_exchange(moe_pass *pass, void *recv, const int64_t *recv_begin,
                               const void *send, const int64_t *send_begin, int64_t row_bytes);
moe_status moe__ranks_gather(moe_pass *pass, void *recv, const void *send, int64_t bytes);
moe_status moe__ranks_start(moe_pass *pass, void *recv, const void *send, int64_t row_bytes,
                            bool back);
moe_status moe__ranks_wait(moe_pass *pass);

/* Rows for each slot, or group; those of rank p from first[p] on; own: this rank's.
 * ranks_words.c */
typedef struct moe__counts {
    const int64_t *rows, *first;
    int64_t own;
} moe__counts;
/* Exchanges headers with `status`, and counts (NULL: none). Every rank fails if one does: this one
 * with its own status if it has one. Then reads [P,own] of them. */
moe_status moe__ranks_exchange_words(moe_pass *pass, bool backward, const moe__counts *counts,
                                     moe_status status, const char *function);
moe_status moe__ranks_read_counts(moe_pass *pass, int64_t own, int64_t *in_count, int64_t *in_rows,
                                  const char *function);
/* Another rank's failure `word`, which all ranks know of. */
moe_status moe__ranks_failed_elsewhere(moe_pass *pass, int64_t rank, int64_t word,
                                       const char *function);
/* All ranks go on, or none does. */
moe_status moe__ranks_agree_on(moe_pass *pass, moe_status status, const char *function);

/* ranks_bound.c: max_received. The weights of all rows at their owners, before; what this owner
 * makes of the rows that would come: in_count and limit; then, with the answers, entries that lose
 * their slot: whether there are any. */
moe_status moe__bound_fetch_scores(moe_pass *pass, const char *function);
moe_status moe__bound_rows(moe_pass *pass, const char *function);
moe_status moe__bound_drop(moe_pass *pass, bool *dropped);

/* ranks_second.c: memory to take part; what a rank that declines says it has; the end. */
moe_status moe__second_prepare(moe_pass *pass, const char *function);
moe__counts moe__second_counts(const moe_pass *pass);
void moe__second_free(moe_pass *pass);
void moe__second_trim(moe_pass *pass);

/* Finds ranges and positions of a round. */
void moe__ranks_set_round(moe_pass *pass, int64_t round);
/* Fills counts of blocks of MOE_EXCHANGE_PADDED from their headers, or writes the headers. */
moe_status moe__ranks_read_blocks(moe_pass *pass, bool backward, const char *block,
                                  int64_t row_bytes, const char *function);
void moe__ranks_write_blocks(moe_pass *pass, bool backward, moe_status status, char *block,
                             int64_t row_bytes);
/* The owner's plan of what came in the round. */
void moe__ranks_order(moe_pass *pass);

/* Columns of a row: row r has `bytes` at from + (index ? index[r] : r) * stride. */
typedef struct moe__column {
    const void *from;
    const int64_t *index;
    int64_t stride, bytes;
} moe__column;

/* Rows `row` and on, one after another in `to`, or row r at place[r]. */
moe_status moe__ranks_pack(moe_pass *pass, void *to, const int64_t *place, int64_t row,
                           int64_t rows, const moe__column *columns, int count);
/* Rows of this rank's plan in the round to their positions in `here`. */
moe_status moe__ranks_pack_here(moe_pass *pass, const moe__column *columns, int count);
/* Rows of the owner's plan to their positions in `there`. */
moe_status moe__ranks_pack_there(moe_pass *pass, const moe__column *columns, int count);
/* What came back in the round, to where all of it meets. */
void moe__ranks_collect(moe_pass *pass, int64_t row_bytes);
/* Makes `rows`, in the order of the plan, of what has been collected: slices are added. */
moe_status moe__ranks_merge(moe_pass *pass, int64_t width);

#endif
