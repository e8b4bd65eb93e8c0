/* storage_unit.h - a pool in one of the storage modes with a plan, inputs and outputs, whose
 * parameters are set and read by their meaning: W1, W3, W2 as [E,in,out] and b1, b3, b2 as [E,out],
 * whatever the mode, the layout and the GLU order. */
#ifndef STORAGE_UNIT_H
#define STORAGE_UNIT_H

#include <moe/moe.h>

#define MUST(call) ck_assert_msg((call) == MOE_OK, "%s", moe_last_error())
#define REFUSED(status, words, call)                                                    \
    do {                                                                                \
        ck_assert_int_eq(call, status);                                                 \
        ck_assert_msg(strstr(moe_last_error(), words) != NULL, "%s", moe_last_error()); \
    } while (0)

enum { UNIT_W1, UNIT_W3, UNIT_W2, UNIT_B1, UNIT_B3, UNIT_B2, UNIT_TENSORS };
/* Where the parameters of a unit live: in the pool, in strided memory of the test, or there with a
 * pointer for each expert. */
enum { UNIT_OWNED = 0, UNIT_STRIDED = 1, UNIT_EACH = 2 };

enum { UNIT_EXPERTS_MOST = 8 };

/* Memory of a bound parameter. */
typedef struct unit_memory {
    char *data, *grad;
    void *data_each[UNIT_EXPERTS_MOST], *grad_each[UNIT_EXPERTS_MOST];
    moe_binding binding;
} unit_memory;

typedef struct storage_unit {
    moe_experts_config e;
    int64_t T, K;
    int32_t where; /* UNIT_* */
    moe_context *context;
    moe_experts *pool;
    moe_pass *pass;
    moe_plan *plan;
    moe_forward_args f;
    moe_backward_args b;
    void *x, *y, *dy, *dx, *dw;
    int64_t x_bytes, y_bytes, w_bytes;
    unit_memory memory[UNIT_TENSORS];
} storage_unit;

/* A small pool of odd sizes: E 4, D 37, F 45, O 70, with biases; T 33 tokens of 2 experts each. */
moe_experts_config storage_config(int32_t activation, int32_t storage, int32_t dtype);

/* Makes pool (parameters drawn from `seed`), pass and batch; context NULL: the defaults.
 * e->parameters is set by `where`. */
void storage_unit_make(storage_unit *u, const moe_context_config *context,
                       const moe_experts_config *e, int32_t where, uint64_t seed);
void storage_unit_free(storage_unit *u);

/* Elements of a tensor, 0 if it is not there. */
int64_t storage_unit_count(const storage_unit *u, int tensor);
/* All of a tensor's data, or gradient; malloc'd. */
double *storage_unit_read(const storage_unit *u, int tensor, int32_t what);
/* Sets a tensor's data by an import, or in the test's own memory. */
void storage_unit_write(storage_unit *u, int tensor, const double *values);
/* Draws every tensor anew. */
void storage_unit_draw(storage_unit *u, uint64_t seed);

/* A forward and a backward. */
void storage_unit_step(storage_unit *u, uint64_t backward_flags);
/* "" if outputs, and with `gradients` these too, have the same bytes in both; else what differs. */
const char *storage_unit_compare(const storage_unit *a, const storage_unit *b, int gradients);
/* How many elements of opaque data and gradients lie beyond the shape and are not 0; -1: fewer lie
 * there than should. */
int64_t storage_unit_filling(const storage_unit *u);

#endif
