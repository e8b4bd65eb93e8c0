/* errors.c - messages, structs of the caller, and strings. */
#include "io.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

moe_status moe__io_fail(moe_status status, const char *function, const char *format, ...)
{
    char text[480];
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return moe__module_fail(status, function, text);
}

moe_status moe__io_system(const char *function, const char *verb, const char *path, int error)
{
    char buffer[96] = "";
#if defined(__GLIBC__)
    const char *text = strerror_r(error, buffer, sizeof buffer);
#else
    (void)strerror_r(error, buffer, sizeof buffer);
    const char *text = buffer;
#endif
    return moe__io_fail(MOE_ERROR_SYSTEM, function, "cannot %s %.300s: %s", verb, path, text);
}

moe_status moe__io_enter(const char *function)
{
    int32_t version = moe__module_version();
    if (version != MOE__MODULE_VERSION)
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "libmoe has interface %d, this libmoe_io is for %d",
               (int)version, (int)MOE__MODULE_VERSION);
    return MOE_OK;
}

moe_status moe__io_check_out(const moe__struct_info *info, const void *to, const char *function)
{
    uint64_t known[64]; /* larger than any of them */
    if (!to) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "%s is NULL", info->name);
    if (info->size > sizeof known) REFUSE(MOE_ERROR_INTERNAL, "%s is large", info->name);
    return moe__module_struct_read(info, known, to, function);
}

void moe__io_write_out(const moe__struct_info *info, void *to, const void *known)
{
    uint64_t size;
    memcpy(&size, to, sizeof size);
    memset(to, 0, (size_t)size);
    memcpy(to, known, size < info->size ? (size_t)size : info->size);
    memcpy(to, &size, sizeof size);
}

bool moe__io_grow(void **array, int64_t *room, int64_t count, size_t size)
{
    if (count < *room) return true;
    int64_t more = *room < 16 ? 16 : moe__mul(*room, 2);
    int64_t bytes = moe__mul(more, (int64_t)size);
    void *larger = bytes < 0 ? NULL : realloc(*array, (size_t)bytes);
    if (!larger) return false;
    *array = larger;
    *room = more;
    return true;
}

char *moe__io_copy_string(const char *text)
{
    size_t bytes = strlen(text) + 1;
    char *copy = malloc(bytes);
    if (copy) memcpy(copy, text, bytes);
    return copy;
}

bool moe__io_has_control(const char *text)
{
    for (; *text; text++)
        if ((unsigned char)*text < ' ' || *text == 0x7f) return true;
    return false;
}

/* Length of the sequence at `s`, 0 if it is none: no overlong forms, surrogates or numbers beyond
 * 10ffff. */
static int utf8_sequence(const unsigned char *s)
{
    int length = s[0] < 0x80   ? 1
                 : s[0] < 0xc2 ? 0
                 : s[0] < 0xe0 ? 2
                 : s[0] < 0xf0 ? 3
                 : s[0] < 0xf5 ? 4
                               : 0;
    for (int i = 1; i < length; i++)
        if ((s[i] & 0xc0) != 0x80) return 0;
    if (s[0] == 0xe0 && s[1] < 0xa0) return 0;
    if (s[0] == 0xed && s[1] >= 0xa0) return 0;
    if (s[0] == 0xf0 && s[1] < 0x90) return 0;
    if (s[0] == 0xf4 && s[1] >= 0x90) return 0;
    return length;
}

bool moe__io_is_utf8(const char *text)
{
    const unsigned char *s = (const unsigned char *)text;
    while (*s) {
        int length = utf8_sequence(s);
        if (length == 0) return false;
        s += length;
    }
    return true;
}
