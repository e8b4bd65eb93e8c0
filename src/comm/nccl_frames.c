/* nccl_frames.c - rows of host memory in rounds.
 *
 * In round 0 every rank sends every other a frame of one size: a note of what it sends and expects,
 * and as many bytes of the rows as fit. Where NCCL has an all-to-all that is one, and the rank's
 * own frame, a note alone, is among them. Only when the notes agree do later rounds follow, whose
 * sizes both sides then know, a piece of each pair at a time:
 *
 *   round 0                 round 1            round 2
 *   note | bytes 0 to n-1   n to n+piece-1     ...
 *
 * So a rank that disagrees is found, with all numbers, before NCCL is given sizes that differ. */
#include "nccl_internal.h"

#include <stdio.h>
#include <string.h>

static const uint64_t PROTOCOL = 0x6d6f656e63636c33; /* "moenccl3" */

static int64_t bytes_to(const moe__nccl_exchange *x, int32_t p)
{
    return moe__nccl_rows_to(&x->e, p) * x->e.row_bytes;
}
static int64_t bytes_from(const moe__nccl_exchange *x, int32_t p)
{
    return moe__nccl_rows_from(&x->e, p) * x->e.row_bytes;
}

/* What of `bytes` is in the round, and where it begins. */
static int64_t part_of(const moe__nccl_exchange *x, int64_t bytes, int64_t *begin)
{
    int64_t piece = x->group->piece;
    *begin = x->round == 0 ? 0 : MOE__NCCL_INLINE + (x->round - 1) * piece;
    int64_t most = x->round == 0 ? MOE__NCCL_INLINE : piece;
    return moe__max(0, moe__min(most, bytes - *begin));
}

int64_t moe__nccl_last_round(const moe__nccl_exchange *x)
{
    int64_t most = 0, piece = x->group->piece;
    for (int32_t p = 0; p < x->group->size; p++) {
        if (p == x->group->rank) continue;
        most = moe__max(most, moe__max(bytes_to(x, p), bytes_from(x, p)));
    }
    int64_t later = moe__max(0, most - MOE__NCCL_INLINE);
    return later / piece + (later % piece > 0);
}

/* Parts lie one after another, so that each direction is one copy. */
static void lay_out(moe__nccl_exchange *x)
{
    int64_t sent = 0, come = 0, begin;
    for (int32_t p = 0; p < x->group->size; p++) {
        bool other = p != x->group->rank, frame = x->round == 0 && (other || x->together);
        x->send_at[p] = sent;
        x->recv_at[p] = come;
        x->send_bytes[p] = x->recv_bytes[p] = frame ? MOE__NCCL_FRAME : 0;
        if (x->round > 0 && other) {
            x->send_bytes[p] = part_of(x, bytes_to(x, p), &begin);
            x->recv_bytes[p] = part_of(x, bytes_from(x, p), &begin);
        }
        sent += x->send_bytes[p];
        come += x->recv_bytes[p];
    }
    x->send = x->staged_send;
    x->recv = x->staged_recv;
}

void moe__nccl_pack(moe__nccl_exchange *x)
{
    lay_out(x);
    for (int32_t p = 0; p < x->group->size; p++) {
        int64_t begin;
        char *to = x->pinned_send + x->send_at[p];
        int64_t bytes = p == x->group->rank ? 0 : part_of(x, bytes_to(x, p), &begin);
        if (x->round == 0 && x->send_bytes[p] > 0) {
            const moe__nccl_note note = {.protocol = PROTOCOL,
                                         .number = x->number,
                                         .rows = moe__nccl_rows_to(&x->e, p),
                                         .expected = moe__nccl_rows_from(&x->e, p),
                                         .row_bytes = x->e.row_bytes};
            memcpy(to, &note, sizeof note);
            to += sizeof note;
        }
        if (bytes > 0) memcpy(to, moe__nccl_sent(&x->e, p) + begin, (size_t)bytes);
    }
}

/* Compares a note that has come with what is expected. */
static int32_t check_note(moe__nccl_exchange *x, int32_t p)
{
    moe__nccl_group *g = x->group;
    int64_t expected = moe__nccl_rows_from(&x->e, p), sent = moe__nccl_rows_to(&x->e, p);
    moe__nccl_note in;
    memcpy(&in, x->pinned_recv + x->recv_at[p], sizeof in);
    if (in.protocol != PROTOCOL) {
        (void)snprintf(g->why, sizeof g->why,
                       "rank %d has another version of libmoe_nccl, or sends something else (its "
                       "note begins with 0x%llx, not 0x%llx)",
                       (int)p, (unsigned long long)in.protocol, (unsigned long long)PROTOCOL);
        return 1;
    }
    if (in.number == x->number && in.rows == expected && in.expected == sent &&
        in.row_bytes == x->e.row_bytes)
        return 0;
    (void)snprintf(
        g->why, sizeof g->why,
        "in exchange %lld rank %d sends %lld rows of %lld bytes in its exchange %lld and "
        "expects %lld, here %lld of %lld are expected and %lld sent",
        (ll)x->number, (int)p, (ll)in.rows, (ll)in.row_bytes, (ll)in.number, (ll)in.expected,
        (ll)expected, (ll)x->e.row_bytes, (ll)sent);
    return 1;
}

int32_t moe__nccl_unpack(moe__nccl_exchange *x)
{
    for (int32_t p = 0; p < x->group->size && x->round == 0; p++)
        if (p != x->group->rank && check_note(x, p)) return 1;
    for (int32_t p = 0; p < x->group->size; p++) {
        int64_t begin;
        const char *from = x->pinned_recv + x->recv_at[p];
        if (p == x->group->rank) continue;
        int64_t bytes = part_of(x, bytes_from(x, p), &begin);
        if (x->round == 0) from += sizeof(moe__nccl_note);
        if (bytes > 0) memcpy(moe__nccl_received(&x->e, p) + begin, from, (size_t)bytes);
    }
    return 0;
}

bool moe__nccl_has_come(const moe__nccl_exchange *x, const char *frame)
{
    moe__nccl_note in;
    memcpy(&in, frame, sizeof in);
    return in.protocol == PROTOCOL && in.number == x->number;
}
