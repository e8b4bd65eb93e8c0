/* moe/status.h - error codes and the message that goes with them.
 *
 * A call that fails for its arguments, for memory or for a wrong state has written nothing. A call
 * that fails in the middle because a host callback, a device or a transport failed leaves its
 * outputs and gradients unspecified; the pass is then marked failed until its next forward, and
 * everything can still be destroyed. The library never exits, aborts or prints. */
#ifndef MOE_STATUS_H
#define MOE_STATUS_H

#include <moe/types.h>

/* Every status: X(name, number, meaning). Numbers are permanent. */
#define MOE_STATUS_LIST(X)                                                                         \
    X(MOE_OK, 0, "success")                                                                        \
    X(MOE_ERROR_INVALID_ARGUMENT, -1, "an argument or a field has a value that is not allowed")    \
    X(MOE_ERROR_OUT_OF_MEMORY, -2, "the allocator returned NULL")                                  \
    X(MOE_ERROR_INVALID_STATE, -3, "the object is not in a state that allows this call")           \
    X(MOE_ERROR_NOT_SUPPORTED, -4, "known, but not available in this build or on this backend")    \
    X(MOE_ERROR_STRUCT_SIZE, -5, "struct_size is no plausible size; was the init call forgotten?") \
    X(MOE_ERROR_STRUCT_TOO_OLD, -6, "struct_size is smaller than in the first release")            \
    X(MOE_ERROR_STRUCT_TOO_NEW, -7, "a field unknown to this library is not zero")                 \
    X(MOE_ERROR_OVERFLOW, -8, "a size does not fit in 63 bits or in the address space")            \
    X(MOE_ERROR_BUFFER_TOO_SMALL, -9, "memory supplied by the host is too small")                  \
    X(MOE_ERROR_CORRUPT_DATA, -10, "saved data is damaged or breaks an invariant")                 \
    X(MOE_ERROR_CALLBACK, -11, "a callback of the host reported failure")                          \
    X(MOE_ERROR_SYSTEM, -12, "the operating system refused a resource, such as a thread")          \
    X(MOE_ERROR_DEVICE, -13, "a device or its runtime failed")                                     \
    X(MOE_ERROR_TRANSPORT, -14, "communication between ranks failed")                              \
    X(MOE_ERROR_TIMEOUT, -15, "a wait exceeded its deadline")                                      \
    X(MOE_ERROR_INTERNAL, -16, "a defect of the library")                                          \
    X(MOE_ERROR_WRONG_GRADIENT, -17, "a gradient disagrees with central differences")

#define MOE__STATUS_ENUMERATOR(name, number, meaning) name = number,
enum { MOE_STATUS_LIST(MOE__STATUS_ENUMERATOR) MOE_STATUS_LAST = -17 };
#undef MOE__STATUS_ENUMERATOR

MOE_BEGIN_DECLS

/* Returns the name of a status, "MOE_ERROR_OUT_OF_MEMORY", or "unknown status". Static storage.
 * Any thread. Since 0.1. */
MOE_API const char *moe_status_name(moe_status status);

/* Returns the meaning of a status in a few words, or "unknown status". Static storage. Any thread.
 * Since 0.1. */
MOE_API const char *moe_status_text(moe_status status);

/* Returns the message of the last failed call of this thread: one line with the function, the
 * reason and the offending values, or "" if no call has failed. Calls that succeed leave it alone.
 * The text belongs to the library and lives until this thread's next failing call. Since 0.1. */
MOE_API const char *moe_last_error(void);

/* Makes moe_last_error() of this thread return "". Since 0.1. */
MOE_API void moe_clear_last_error(void);

MOE_END_DECLS

#endif
