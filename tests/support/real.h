/* real.h - what a suite's numbers are: double, and where a device has none float.
 *
 * A tolerance stands in a suite as it is for double; TOLERANCE makes it as many units of the last
 * place of float. WAITED is around what the library's tables are called for, past its own calls. */
#ifndef SUITE_REAL_H
#define SUITE_REAL_H

#include <moe/moe.h>

#ifdef MOE_TEST_DEVICE
typedef float scalar;
enum { ON_DEVICE = 1, REAL = MOE_DTYPE_F32 };
#define TOLERANCE(of_double) ((of_double)*0x1p29)
#define WAITED(call) device_waited(call)
#else
typedef double scalar;
enum { ON_DEVICE = 0, REAL = MOE_DTYPE_F64 };
#define TOLERANCE(of_double) (of_double)
#define WAITED(call) (call)
#endif

#endif
