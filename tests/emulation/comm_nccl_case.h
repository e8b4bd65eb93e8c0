/* comm_nccl_case.h - a rank of a group over NCCL on an emulated device: its context, its
 * communicators, rows of host and device memory whose bytes tell where they come from. */
#ifndef EMU_COMM_NCCL_CASE_H
#define EMU_COMM_NCCL_CASE_H

#include "nccl_case.h"

#include <moe/cuda.h>
#include <moe/moe.h>
#include <moe/nccl.h>

#define GOOD(call)                                                              \
    do {                                                                        \
        moe_status good_status = (call);                                        \
        expect(r, good_status == MOE_OK, moe_last_error(), __FILE__, __LINE__); \
    } while (0)
#define REFUSED(code, call) EXPECT((call) == (code))
/* The message of the last refusal has the text. */
#define SAID(text) said(r, text, __FILE__, __LINE__)

enum { MOST_RANKS = 8, NARROW = 12, WIDE = 9000 };

/* How a group is made. */
enum { NOT_BLOCKING = 1, DUPLICATE = 2, COLD = 4 };

typedef struct rank_comm {
    moe_context *context;
    moe_comm *comm;
    moe_comm *node_comm, *rail_comm; /* of layers in two stages, or NULL */
    moe_nccl_config config;
} rank_comm;

/* Rows to and from every rank: some pairs have none. */
typedef struct rank_rows {
    moe_exchange e;
    int64_t recv_begin[MOST_RANKS + 1], send_begin[MOST_RANKS + 1];
    unsigned char *recv, *send; /* of the host */
    void *device_recv, *device_send;
} rank_rows;

void said(struct rank_case *r, const char *text, const char *file, int line);

/* What a program's main begins with. */
void begin_program(void);

/* The host's communicator, without any connection. */
void make_nccl(struct rank_case *r, int how);
/* A context on the rank's device. */
moe_context *context_of_rank(struct rank_case *r);
/* Both, and the config of a group; then the group. */
void prepare(struct rank_case *r, rank_comm *c, int how, double timeout);
void join(struct rank_case *r, rank_comm *c, int how, double timeout);
/* The group is not made, and the message has the text. */
void refuse(struct rank_case *r, const rank_comm *c, moe_status code, const char *text);
/* From now on no call of the group waits longer, and twice as long for the device. */
void shorten(moe_comm *comm, double timeout);
/* The end of all of it, the host's communicator aborted or destroyed. */
void leave(struct rank_case *r, rank_comm *c);
void leave_after_failure(struct rank_case *r, rank_comm *c);
/* Device and pinned memory, streams, events and communicators: nothing is left, soon: threads of
 * creations give back what they have when they are out of NCCL. */
bool all_is_gone(void);

void fill_rows(struct rank_case *r, rank_rows *m, int n, int64_t row_bytes);
void check_rows(struct rank_case *r, const rank_rows *m, int n);
/* The same rows in device memory, put there; and what came back to m->recv. */
void rows_to_device(struct rank_case *r, rank_rows *m);
void rows_from_device(struct rank_case *r, rank_rows *m);
void free_rows(struct rank_case *r, rank_rows *m);

#endif
