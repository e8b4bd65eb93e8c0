/* mapped.c - weights in files, one read-only mapping an expert; only some experts are
 * fine-tuned. */
#include "host.h"

#include <sys/mman.h>
#include <unistd.h>

typedef struct mapping {
    void *memory[E];
    size_t bytes;
} mapping;

/* Writes each expert's part of a parameter to a file of its own and maps it read-only. */
static mapping map_experts(const moe_parameter_record *p)
{
    mapping m = {.bytes = (size_t)(p->element_count / E) * sizeof(float)};
    for (int e = 0; e < E; e++) {
        char path[] = "/tmp/moe-expert-XXXXXX";
        int fd = mkstemp(path);
        SHOW(fd >= 0 && unlink(path) == 0);
        SHOW(write(fd, (char *)p->data + (size_t)e * m.bytes, m.bytes) == (ssize_t)m.bytes);
        m.memory[e] = mmap(NULL, m.bytes, PROT_READ, MAP_PRIVATE, fd, 0);
        SHOW(m.memory[e] != MAP_FAILED && close(fd) == 0);
    }
    return m;
}

int main(void)
{
    small owner, host;
    mapping maps[8];
    float *gradients[8][E];
    float *x = floats(T * D), *dy = floats(T * D);
    float *y[2] = {floats(T * D), floats(T * D)}, *dx[2] = {floats(T * D), floats(T * D)};
    fill(x, T * D, 1), fill(dy, T * D, 2);
    small_make(&owner, NULL, MOE_PARAMETERS_OWNED), small_make(&host, NULL, MOE_PARAMETERS_OWNED);
    set_gate(owner.layer), set_gate(host.layer);
    int64_t count = moe_experts_parameter_count(owner.experts);
    for (int64_t i = 0; i < count; i++) {
        moe_parameter_record p;
        moe_binding b;
        const void *data[E];
        void *grad[E];
        OK(moe_parameter_record_init(&p, sizeof p));
        OK(moe_experts_parameter(owner.experts, i, &p));
        maps[i] = map_experts(&p);
        for (int e = 0; e < E; e++) {
            gradients[i][e] = e % 2 == 0 ? floats(p.element_count / E)
                                         : NULL; /* odd experts are frozen */
            data[e] = maps[i].memory[e], grad[e] = gradients[i][e];
        }
        OK(moe_binding_init(&b, sizeof b));
        b.data_per_expert = data, b.grad_per_expert = grad;
        OK(moe_experts_bind(host.experts, i, &b));
    }
    for (int which = 0; which < 2; which++) {
        small *s = which ? &host : &owner;
        moe_forward_args f = forward_args(x, y[which], T);
        moe_backward_args b = backward_args(dy, dx[which]);
        OK(moe_layer_forward(s->layer, s->pass, &f));
        OK(moe_layer_backward(s->layer, s->pass, &b));
    }
    SHOW(same(y[0], y[1], T * D) && same(dx[0], dx[1], T * D));
    for (int64_t i = 0; i < count; i++) {
        moe_parameter_record p;
        OK(moe_parameter_record_init(&p, sizeof p));
        OK(moe_experts_parameter(owner.experts, i, &p));
        int64_t part = p.element_count / E;
        for (int e = 0; e < E; e++) {
            SHOW(!gradients[i][e] || same((float *)p.grad + e * part, gradients[i][e], part));
            free(gradients[i][e]);
            SHOW(munmap(maps[i].memory[e], maps[i].bytes) == 0);
        }
    }
    small_free(&host), small_free(&owner);
    free(x), free(dy), free(y[0]), free(y[1]), free(dx[0]), free(dx[1]);
    printf("one read-only mapping per expert, half of them frozen: the same bytes; ok\n");
    return 0;
}
