/* ranks_rows.h - rows that travel: memory, positions, packing. Used by the ranks_*.c alone. */
#ifndef MOE_RANKS_ROWS_H
#define MOE_RANKS_ROWS_H

#include "pass_state.h"

/* Makes *memory at least `bytes` long; what was there is lost. bytes < 0: too many. */
moe_status moe__ranks_room(moe_pass *pass, void **memory, int64_t *capacity, int64_t bytes,
                           const char *function);
/* Memory for the rows of the counts. save: for a backward too. */
moe_status moe__ranks_lay_out(moe_pass *pass, bool save, const char *function);

/* An exchange, waited for; or started, and waited for later. Both are counted in the report. */
moe_status moe__ranks_exchange(moe_pass *pass, const moe_exchange *e);
moe_status moe__ranks_start(moe_pass *pass, void *recv, const void *send, int64_t row_bytes,
                            bool back);
moe_status moe__ranks_wait(moe_pass *pass);

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

/* Rows of this rank's plan in the round to their positions in `here`. */
moe_status moe__ranks_pack_here(moe_pass *pass, const moe__column *columns, int count,
                                int64_t row_bytes);
/* Rows of the owner's plan to their positions in `there`. */
moe_status moe__ranks_pack_there(moe_pass *pass, const moe__column *columns, int count,
                                 int64_t row_bytes);
/* What came back in the round, to where all of it meets. */
void moe__ranks_collect(moe_pass *pass, int64_t row_bytes);
/* Makes `rows`, in the order of the plan, of what has been collected: slices are added. */
moe_status moe__ranks_merge(moe_pass *pass, int64_t width);

#endif
