/* status.c - names of errors, and the message of a thread's last failed call. */
#include "internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { MESSAGE_SIZE = MOE__MESSAGE_SIZE };

static _Thread_local char last_error[MESSAGE_SIZE];

const char *moe_status_name(moe_status status)
{
#define NAME(name, number, meaning) \
    case number: return #name;
    switch (status) {
        MOE_STATUS_LIST(NAME)
    default: return "unknown status";
    }
#undef NAME
}

const char *moe_status_text(moe_status status)
{
#define TEXT(name, number, meaning) \
    case number: return meaning;
    switch (status) {
        MOE_STATUS_LIST(TEXT)
    default: return "unknown status";
    }
#undef TEXT
}

const char *moe_last_error(void) { return last_error; }

void moe_clear_last_error(void) { last_error[0] = 0; }

void moe__restore_message(const char message[MOE__MESSAGE_SIZE])
{
    memcpy(last_error, message, MOE__MESSAGE_SIZE);
}

moe_status moe__fail(moe_status status, const char *function, const char *format, ...)
{
    char text[MESSAGE_SIZE]; /* apart: an argument may be moe_last_error() itself */
    va_list arguments;
    va_start(arguments, format);
    int used = snprintf(text, sizeof text, "%s: ", function);
    if (used > 0 && used < MESSAGE_SIZE)
        (void)vsnprintf(text + used, sizeof text - (size_t)used, format, arguments);
    va_end(arguments);
    /* One line, whatever a caller's string holds. */
    for (char *c = text; *c; c++)
        if ((unsigned char)*c < ' ') *c = ' ';
    memcpy(last_error, text, strlen(text) + 1);
    return status;
}
