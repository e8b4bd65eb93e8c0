/* device_assert.c - Check's assertions, also on the threads of ranks.
 *
 * Without a process of its own for each test Check leaves a test with a longjmp, which no other
 * thread may make: there the program ends, for the other ranks wait for this one. */
#include "support/device/on_device.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>

void of_check(const char *file, int line, const char *expr, const char *msg,
              ...) __asm__("_ck_assert_failed");

static pthread_t first;

static void __attribute__((constructor)) remember_first(void) { first = pthread_self(); }

void _ck_assert_failed(const char *file, int line, const char *expr, const char *msg, ...)
{
    char text[1024] = "";
    va_list arguments;
    va_start(arguments, msg);
    if (msg) (void)vsnprintf(text, sizeof text, msg, arguments);
    va_end(arguments);
    if (pthread_equal(first, pthread_self())) {
        of_check(file, line, expr, msg ? "%s" : NULL, text);
        return; /* Check's does not */
    }
    (void)fprintf(stderr, "%s:%d: on a rank's thread: %s: %s\n", file, line, expr, text);
    _Exit(1);
}
