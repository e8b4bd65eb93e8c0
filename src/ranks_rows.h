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
/* Whether rows go to nodes, and on from there. */
static inline bool moe__ranks_relays(const moe_pass *pass)
{
    return pass->layer->where->grid.nodes > 0;
}
static inline bool moe__ranks_on_host(const moe_pass *pass)
{
    return pass->context->memory->is_host;
}

/* The first slot of a chunk among a rank's. */
static inline int64_t moe__chunk_slot(int64_t slots, int64_t chunks, int64_t chunk)
{
    return slots * chunk / chunks; /* slots * MOE_COMM_REQUESTS fits: each has words */
}
/* Its begins, and the position that they count from. */
static inline const int64_t *moe__chunk_begin(const int64_t *begin, int64_t P, int64_t chunk)
{
    return begin + chunk * (P + 1);
}
static inline int64_t moe__chunk_position(const int64_t *begin, int64_t P, int64_t chunk)
{
    int64_t position = 0;
    for (int64_t c = 0; c < chunk; c++) position += moe__chunk_begin(begin, P, c)[P];
    return position;
}

/* ---- memory: ranks_memory.c ------------------------------------------------------------------ */

/* Where a room is. */
enum { MOE__ON_HOST = 0, MOE__ON_BACKEND = 1 };
/* Makes a room at least `bytes` large; what was there is lost. bytes < 0: too many. */
moe_status moe__ranks_room(moe_pass *pass, moe__room *room, int where, int64_t bytes,
                           const char *function);
void moe__ranks_give_back(moe_pass *pass, moe__room *room, int where);
/* Memory for the rows of the counts. save: for a backward too. */
moe_status moe__ranks_lay_out(moe_pass *pass, bool save, const char *function);
/* The tables of positions, in `counts` and beside it. */
int64_t moe__ranks_table_bytes(const moe_pass *pass);
moe_status moe__ranks_make_tables(moe_pass *pass, void *block, const char *function);
/* Rows of a block of MOE_EXCHANGE_PADDED, or -1. */
int64_t moe__ranks_block_rows(const moe_pass *pass);

/* ---- exchanges: ranks_exchange.c ------------------------------------------------------------- */

/* An exchange of the host's memory, waited for, of rows by rank. All exchanges are counted in the
 * report. */
moe_status moe__ranks_exchange(moe_pass *pass, void *recv, const int64_t *recv_begin,
                               const void *send, const int64_t *send_begin, int64_t row_bytes);
/* The same of the backend's memory: what is put on the stream later finds the rows there. Where the
 * transport takes memory of the host alone, they go through `staged`. */
moe_status moe__ranks_move(moe_pass *pass, void *recv, const int64_t *recv_begin, const void *send,
                           const int64_t *send_begin, int64_t row_bytes);
/* Likewise the same bytes from every rank to all. */
moe_status moe__ranks_gather(moe_pass *pass, void *recv, const void *send, int64_t bytes);
/* What the blocks of MOE_EXCHANGE_PADDED begin with. */
typedef struct moe__block_header {
    bool backward;
    moe_status status;
} moe__block_header;
/* Rows of the experts in the present chunk, started, and waited for later. recv, send: where those
 * of the first chunk begin. header: of blocks from `here`; NULL: what goes back has none. */
moe_status moe__ranks_start(moe_pass *pass, void *recv, const void *send, int64_t row_bytes,
                            bool back, const moe__block_header *header);
/* For the exchange that was started first of those not waited for; for those of all chunks. */
moe_status moe__ranks_wait(moe_pass *pass);
moe_status moe__ranks_wait_chunks(moe_pass *pass);
/* An exchange on any of the layer's communicators, waited for likewise. */
moe_status moe__ranks_start_on(moe_pass *pass, moe_comm *comm, moe_exchange *exchange);
/* Gives up what is in flight: whether something was. */
bool moe__ranks_give_up(moe_pass *pass);
/* After a start without a wait: what is put on the stream of the call later runs behind it. Returns
 * `status`, or if that is MOE_OK why it does not. */
moe_status moe__ranks_rejoin(moe_pass *pass, moe_status status);
/* Whether rows go through the host's memory although the backend's is another. */
bool moe__ranks_stages(const moe_pass *pass);
/* Memory for that, of so many bytes out and in; nothing where rows do not. */
moe_status moe__ranks_make_stage(moe_pass *pass, int64_t out, int64_t in, const char *function);

/* ---- words: ranks_words.c -------------------------------------------------------------------- */

/* Rows for each slot, or group; those of rank p from first[p] on; own: this rank's. */
typedef struct moe__counts {
    const int64_t *rows, *first;
    int64_t own;
    bool relayed; /* of experts' rows, with a grid: more words for ranks of the rail */
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
/* expert_begin of one of the pass's plans, on the host. */
moe_status moe__ranks_plan_counts(moe_pass *pass, const moe__plan_arrays *plan,
                                  const int64_t **expert_begin);

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

/* ---- by way of nodes: ranks_relay.c, ranks_relay_places.c ------------------------------------ */

/* Bytes of a record: the index among its block's rows, then the weight. */
enum { MOE__RECORD = 16, MOE__RECORD_WEIGHT = 8 };
static inline const moe__grid *moe__relay_grid(const moe_pass *pass)
{
    return &pass->layer->where->grid;
}
/* Bytes of a token's row on the rail. */
int64_t moe__relay_bytes(const moe_pass *pass, bool backward);
/* Slots of a rank of a node, from *first on; those of the node are rank by rank. */
int64_t moe__relay_slots(const moe_pass *pass, int64_t node, int64_t number, int64_t *first);
/* Arrays of `counts`, of the tables and of the rows, and what goes through the host's memory. */
void moe__relay_lay_out_counts(moe_pass *pass, moe__arena *arena);
void moe__relay_lay_out_tables(const moe_pass *pass, moe__tables *t, moe__arena *arena);
void moe__relay_make_tables(const moe_pass *pass, moe__tables *t);
void moe__relay_lay_out_rows(moe_pass *pass, moe__arena *arena, bool save);
void moe__relay_stage(const moe_pass *pass, bool save, int64_t *out, int64_t *in);
/* Which tokens go to which node. */
moe_status moe__relay_count(moe_pass *pass, const char *function);
/* Words after those that every rank is told: how many, and what they are; then those that came. */
int64_t moe__relay_words(const moe_pass *pass, int64_t rank, int64_t node);
void moe__relay_say(const moe_pass *pass, int64_t rank, bool rows, int64_t *words);
moe_status moe__relay_read(moe_pass *pass, const char *function);
/* Positions of both stages of the call; those at which rows come to their experts. */
void moe__relay_find_places(moe_pass *pass);
void moe__relay_find_came(moe_pass *pass);
/* The first stage; then the second, and its end. */
moe_status moe__relay_send(moe_pass *pass);
moe_status moe__relay_wait(moe_pass *pass);

/* ---- rows: ranks_rows.c, ranks_blocks.c ------------------------------------------------------ */

/* Finds ranges and positions of a round, and tells the backend. */
moe_status moe__ranks_set_round(moe_pass *pass, int64_t round);
/* Positions of blocks, or of ranges by chunk: at[slots], begin[C,P+1]. */
void moe__ranks_place_rows(const moe_pass *pass, const moe__range *range, const int64_t *first_slot,
                           int64_t own, int64_t *at, int64_t *begin);
/* The same for what comes, whose counts are known later. */
moe_status moe__ranks_find_came(moe_pass *pass, int64_t round);
/* Fills counts of blocks of MOE_EXCHANGE_PADDED that came to `rows` from their headers, or writes
 * the headers. */
moe_status moe__ranks_read_blocks(moe_pass *pass, bool backward, const void *rows,
                                  int64_t row_bytes, const char *function);
void moe__ranks_write_blocks(moe_pass *pass, const moe__block_header *header, char *blocks,
                             int64_t row_bytes);
/* ranks_blind.c: blocks that nobody waits for. Positions in them, which are always the same; the
 * beginning of a call; headers of blocks that go, with rows of this rank's plan in a forward; of
 * those that came; a rank that declines. */
void moe__ranks_place_blocks(moe_pass *pass);
moe_status moe__blind_begin(moe_pass *pass);
moe_status moe__blind_write(moe_pass *pass, bool backward, bool rows, moe_status status);
moe_status moe__blind_read(moe_pass *pass, bool backward);
moe_status moe__blind_decline(moe_pass *pass, bool backward, moe_status status);
/* Makes the job's plan that of the present chunk; the owner's plan of what came there in the
 * round. */
void moe__ranks_set_view(moe_pass *pass);
moe_status moe__ranks_order(moe_pass *pass);

/* Packs columns into rows of row_bytes. */
moe_status moe__ranks_pack(moe_pass *pass, const moe__moves *moves, void *to, int64_t row_bytes,
                           const moe__column *columns, int64_t count);
/* Rows of this rank's plan in the round to their positions in `here`. */
moe_status moe__ranks_pack_here(moe_pass *pass, int64_t row_bytes, const moe__column *columns,
                                int64_t count);
/* Rows of the owner's plan in the present chunk to their positions in `there`. */
moe_status moe__ranks_pack_there(moe_pass *pass, int64_t row_bytes, const moe__column *columns,
                                 int64_t count);
/* Rows of this rank's plan by slot. */
moe__moves moe__ranks_moves_here(const moe_pass *pass);
/* Before any round: all of them, one after the other; numbers [slots] of the caller, or NULL, are
 * then in there_tables.back_to. */
moe_status moe__ranks_all_moves(moe_pass *pass, const int64_t *numbers, moe__moves *moves);
/* What came back in the round, to where all of it meets. */
moe_status moe__ranks_collect(moe_pass *pass, int64_t row_bytes);
/* Makes `back_rows`, in the order of the plan, of what has been collected: slices are added.
 * `width` elements of a row, and a real at real_at or -1. */
moe_status moe__ranks_merge(moe_pass *pass, int64_t row_bytes, int64_t width, int64_t real_at);

#endif
