/* on_device.h - makes a suite that was written for host memory run on a CUDA context.
 *
 * It is included before everything else in every file of a suite (-include). Memory of the suite is
 * managed memory, so that host and device see the same arrays; contexts are CUDA contexts that
 * allocate managed memory too, so that plans and parameters can be read; calls that compute run on
 * a stream and are waited for. What the suite says stays as it is. */
#ifndef MOE_TEST_ON_DEVICE_H
#define MOE_TEST_ON_DEVICE_H

#define MOE_TEST_DEVICE 1

#include <moe/moe.h>

#include <stdlib.h>
#include <string.h>

void *device_malloc(size_t bytes);
void *device_calloc(size_t count, size_t bytes);
void *device_aligned_alloc(size_t alignment, size_t bytes);
int device_posix_memalign(void **memory, size_t alignment, size_t bytes);
void device_free(void *memory); /* of either of these, or of the C library */

moe_status device_context_create(moe_context **context, const moe_context_config *config);
/* The status, once everything on every stream is done. */
moe_status device_waited(moe_status status);
/* Of a call that is started, and of its end: what it was given stays until then. */
moe_status device_started(moe_status status);
moe_status device_finished(moe_status status);
/* The stream that calls run on. */
void *device_stream(void);
void *device_stream_for(void *given); /* that, or the former for NULL */
/* From now on this thread is a rank: what it makes is on the device, with a stream of its own
 * there; and again on the one that all have. */
void device_take_stream(int device);
void device_give_stream(void);

/* The arguments with that stream, and with copies of arrays that the device could not read, if the
 * caller's struct has a plausible size; in static storage of the thread. One object of the three is
 * given, the others are NULL. */
const moe_forward_args *device_forward_args(const moe_layer *layer, const moe_gate *gate,
                                            const moe_experts *experts,
                                            const moe_forward_args *args);
const moe_backward_args *device_backward_args(const moe_layer *layer, const moe_gate *gate,
                                              const moe_experts *experts, const moe_pass *pass,
                                              const moe_backward_args *args);
const moe_rows_args *device_rows_args(const moe_plan *plan, const moe_rows_args *args);
const moe_plan_args *device_plan_args(const moe_plan_args *args);
/* [E] of a gate. */
const int64_t *device_counts(const moe_gate *gate, const int64_t *counts);

/* What Check calls for an assertion that does not hold is this program's own, on any thread. */
void _ck_assert_failed(const char *file, int line, const char *expr, const char *msg,
                       ...) __asm__("device_assert_failed");

#ifndef MOE_TEST_ON_DEVICE_C
#define malloc(bytes) device_malloc(bytes)
#define calloc(count, bytes) device_calloc(count, bytes)
#define free(memory) device_free(memory)
#define moe_context_create(context, config) device_context_create(context, config)

#define aligned_alloc(alignment, bytes) device_aligned_alloc(alignment, bytes)
#define posix_memalign(m, alignment, bytes) device_posix_memalign(m, alignment, bytes)
#define moe_layer_forward(o, p, a) \
    device_waited((moe_layer_forward)(o, p, device_forward_args(o, NULL, NULL, a)))
#define moe_gate_forward(o, p, a) \
    device_waited((moe_gate_forward)(o, p, device_forward_args(NULL, o, NULL, a)))
#define moe_experts_forward(o, p, a) \
    device_waited((moe_experts_forward)(o, p, device_forward_args(NULL, NULL, o, a)))
#define moe_layer_backward(o, p, a) \
    device_waited((moe_layer_backward)(o, p, device_backward_args(o, NULL, NULL, p, a)))
#define moe_gate_backward(o, p, a) \
    device_waited((moe_gate_backward)(o, p, device_backward_args(NULL, o, NULL, p, a)))
#define moe_experts_backward(o, p, a) \
    device_waited((moe_experts_backward)(o, p, device_backward_args(NULL, NULL, o, p, a)))
#define moe_layer_forward_start(o, p, a) \
    device_started((moe_layer_forward_start)(o, p, device_forward_args(o, NULL, NULL, a)))
#define moe_layer_backward_start(o, p, a) \
    device_started((moe_layer_backward_start)(o, p, device_backward_args(o, NULL, NULL, p, a)))
#define moe_layer_forward_finish(o, p) device_finished((moe_layer_forward_finish)(o, p))
#define moe_layer_backward_finish(o, p) device_finished((moe_layer_backward_finish)(o, p))
#define moe_dispatch_forward(p, a) device_waited((moe_dispatch_forward)(p, device_rows_args(p, a)))
#define moe_dispatch_backward(p, a) \
    device_waited((moe_dispatch_backward)(p, device_rows_args(p, a)))
#define moe_combine_forward(p, a) device_waited((moe_combine_forward)(p, device_rows_args(p, a)))
#define moe_combine_backward(p, a) device_waited((moe_combine_backward)(p, device_rows_args(p, a)))
#define moe_plan_build(p, a) device_waited((moe_plan_build)(p, device_plan_args(a)))
#define moe_gate_update_selection_bias(o, counts, rate) \
    device_waited((moe_gate_update_selection_bias)(o, device_counts(o, counts), rate))
#define moe_gate_zero_gradients(o, s) device_waited((moe_gate_zero_gradients)(o, s))
#define moe_experts_zero_gradients(o, s) device_waited((moe_experts_zero_gradients)(o, s))
#define moe_layer_zero_gradients(o, s) device_waited((moe_layer_zero_gradients)(o, device_stream()))
#define moe_experts_zero_touched_gradients(o, s) \
    device_waited((moe_experts_zero_touched_gradients)(o, s))
#define moe_layer_zero_touched_gradients(o, s) \
    device_waited((moe_layer_zero_touched_gradients)(o, s))
#define moe_gate_init_parameters(o, s) device_waited((moe_gate_init_parameters)(o, s))
#define moe_experts_init_parameters(o, s) device_waited((moe_experts_init_parameters)(o, s))
#define moe_layer_reduce_gradients(o, s) \
    device_waited((moe_layer_reduce_gradients)(o, device_stream()))
#define moe_layer_gradient_norm(o, n, s) \
    device_waited((moe_layer_gradient_norm)(o, n, device_stream_for(s)))
#define moe_layer_init_parameters(o, s) device_waited((moe_layer_init_parameters)(o, s))
#endif

#endif
