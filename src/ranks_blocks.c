/* ranks_blocks.c - blocks of MOE_EXCHANGE_PADDED: a header of words, then padded_rows rows for each
 * slot, used or not. */
#include "ranks_rows.h"

#include <string.h>

static char *block_of(const moe_pass *pass, char *blocks, int64_t p, int64_t row_bytes)
{
    return blocks + p * moe__ranks_block_rows(pass) * row_bytes;
}

void moe__ranks_write_blocks(moe_pass *pass, const moe__block_header *h, char *blocks,
                             int64_t row_bytes)
{
    moe__ranks *k = &pass->ranks;
    const int64_t *first = pass->layer->where->first_slot;
    int64_t P = moe__pass_comm(pass)->size, word = (int64_t)sizeof(int64_t);
    for (int64_t p = 0; p < P; p++) {
        int64_t header[MOE__RANKS_HEADER];
        char *block = block_of(pass, blocks, p, row_bytes);
        moe__ranks_header(pass, h->backward, h->status, header);
        memcpy(block, header, sizeof header);
        if (!h->backward && first[p + 1] > first[p])
            memcpy(block + sizeof header, k->count + first[p],
                   (size_t)((first[p + 1] - first[p]) * word));
    }
}

moe_status moe__ranks_read_blocks(moe_pass *pass, bool backward, const void *rows,
                                  int64_t row_bytes, const char *function)
{
    moe__ranks *k = &pass->ranks;
    const void *blocks = moe__ranks_stages(pass) ? k->stage_in : rows;
    int64_t P = moe__pass_comm(pass)->size, own = moe__ranks_own(pass), n;
    for (int64_t p = 0; p < P; p++) {
        int64_t header[MOE__RANKS_HEADER];
        const char *block = block_of(pass, (char *)(uintptr_t)blocks, p, row_bytes);
        memcpy(header, block, sizeof header);
        MOE_TRY(moe__ranks_check_header(pass, p, backward, header, function));
        for (int64_t i = 0; i < own && !backward; i++) {
            memcpy(&n, block + sizeof header + i * (int64_t)sizeof n, sizeof n);
            if (n < 0 || n > pass->layer->config.padded_rows)
                REFUSE(MOE_ERROR_TRANSPORT, "rank %lld has %lld rows of %lld", (ll)p, (ll)n,
                       (ll)pass->layer->config.padded_rows);
            k->in_count[p * own + i] = n;
        }
    }
    return backward ? MOE_OK : moe__ranks_find_came(pass, 0);
}
