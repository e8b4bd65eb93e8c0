/* pool.h - a pool of experts of a case: its tensors, and the library's layout of them. */
#ifndef VECTOR_POOL_H
#define VECTOR_POOL_H

#include "run.h"

/* One parameter of a pool in the library's layout, with its gradient. */
typedef struct stored {
    void *data, *grad;
    moe_experts *opaque; /* whose parameter `index` is opaque: imported and exported; or NULL */
    int64_t index;
} stored;

typedef struct pool {
    const char *prefix; /* of the tensors' names: "", "s" or "r" */
    int64_t E, D, F, O;
    int gated;
    void *W[4], *b[4];             /* [1..3]: the case's tensors, or NULL */
    stored w1, w3, w2, b1, b3, b2; /* fused orders use w1 and b1 */
} pool;

/* Reads the tensors of a pool (prefix "", "s", "r") and makes it. */
int make_pool(run *r, pool *p, const char *prefix, moe_experts **experts);
/* Binds its parameters in the stored form, with fresh gradients. */
int bind_pool(run *r, moe_experts *experts, pool *p);
/* The gradients of its parameters as results, in the case's own order. */
void show_gradients(run *r, pool *p, const char *suffix);

/* Room for `count` numbers and their gradients. */
void stored_reset(run *r, stored *s, int64_t count);

/* Matrices whose rows lie apart if the storage says so: the stride, a copy with gaps (zeros without
 * `dense`), and back as a result. */
int64_t stride_of(const run *r, int64_t width);
void *spread(run *r, const void *dense, int64_t rows, int64_t width);
int gather(run *r, const char *name, const void *from, int64_t rows, int64_t width);

#endif
