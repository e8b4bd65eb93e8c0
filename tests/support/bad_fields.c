/* bad_fields.c - see bad_fields.h. */
#include "support/bad_fields.h"

#include <stdio.h>
#include <string.h>

void bad_field_put(const bad_field *bad, void *instance)
{
    char *at = (char *)instance + bad->at;
    int32_t narrow = (int32_t)bad->integer;
    if (bad->kind == 1)
        memcpy(at, &bad->real, sizeof bad->real);
    else if (bad->kind == 2)
        memcpy(at, &bad->pointer, sizeof bad->pointer);
    else if (bad->size == sizeof narrow)
        memcpy(at, &narrow, sizeof narrow);
    else
        memcpy(at, &bad->integer, sizeof bad->integer);
}

static int names_value(const bad_field *bad, const char *message)
{
    char decimal[64], hexadecimal[64];
    if (bad->kind == 2) return bad->pointer != NULL || strstr(message, "NULL") != NULL;
    if (bad->kind == 1) {
        (void)snprintf(decimal, sizeof decimal, "%g", bad->real);
        return strstr(message, decimal) != NULL;
    }
    (void)snprintf(decimal, sizeof decimal, "%lld", (long long)bad->integer);
    (void)snprintf(hexadecimal, sizeof hexadecimal, "0x%llx", (unsigned long long)bad->integer);
    return strstr(message, decimal) || strstr(message, hexadecimal) || strstr(message, "MOE_");
}

const char *bad_field_complaint(const bad_field *bad, moe_status got)
{
    static char complaint[512];
    char message[256];
    (void)snprintf(message, sizeof message, "%s", moe_last_error());
    moe_clear_last_error();
    /* A message about a clash names constants instead. */
    const char *name = strcmp(bad->name, "struct_size") == 0 ? "size" : bad->name;
    const char *problem = got != bad->status ? "another status"
                          : !strstr(message, name) && !strstr(message, "MOE_")
                              ? "the field is not named"
                          : !names_value(bad, message) && got == MOE_ERROR_INVALID_ARGUMENT
                              ? "the value is missing"
                              : NULL;
    if (!problem) return "";
    (void)snprintf(complaint, sizeof complaint, "%s = %lld or %g: %s: %s, want %s (\"%s\")",
                   bad->name, (long long)bad->integer, bad->real, problem, moe_status_name(got),
                   moe_status_name(bad->status), message);
    return complaint;
}
