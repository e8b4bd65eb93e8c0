/* moe/version.h - the version of libmoe, at compile time and at run time.
 *
 * The public interface is versioned by structs that carry their size and by a symbol map; a program
 * built against an older header runs with every newer library of the same soname. */
#ifndef MOE_VERSION_H
#define MOE_VERSION_H

#include <moe/types.h>

#define MOE_VERSION_MAJOR 0
#define MOE_VERSION_MINOR 1
#define MOE_VERSION_PATCH 0

/* The version as one number: major * 10000 + minor * 100 + patch. */
#define MOE_VERSION_NUMBER (MOE_VERSION_MAJOR * 10000 + MOE_VERSION_MINOR * 100 + MOE_VERSION_PATCH)

MOE_BEGIN_DECLS

/* Returns MOE_VERSION_NUMBER of the library that is loaded, which may be newer than the header.
 * Any thread. Since 0.1. */
MOE_API int32_t moe_version_number(void);

/* Returns the version of the loaded library as text, "0.1.0". Static storage. Any thread. Since
 * 0.1. */
MOE_API const char *moe_version_string(void);

/* Finds a public constant by its name, for callers that cannot read a C header.
 *   value  out: the constant's value; untouched on error
 *   name   the constant as written in these headers, "MOE_GATE_NOISY_TOP_K"
 * Returns MOE_OK, or MOE_ERROR_INVALID_ARGUMENT for a NULL pointer or a name the library does not
 * know. Every constant of these headers can be asked but the version macros. Any thread. Since
 * 0.1. */
MOE_API moe_status moe_constant(int64_t *value, const char *name);

MOE_END_DECLS

#endif
