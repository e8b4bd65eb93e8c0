/* printer.c - see printer.h. */
#include "printer.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void put(moe__printer *p, const char *bytes, int64_t count)
{
    if (p->text && p->used + count <= p->capacity) memcpy(p->text + p->used, bytes, (size_t)count);
    p->used += count;
}

static void put_string(moe__printer *p, const char *text) { put(p, text, (int64_t)strlen(text)); }

static void put_integer(moe__printer *p, int64_t value)
{
    char text[24];
    (void)snprintf(text, sizeof text, "%lld", (long long)value);
    put_string(p, text);
}

/* The fewest digits that read back as |value|, and the power of ten of the first. */
static int32_t shortest(double value, char digits[20], int32_t *exponent)
{
    char text[40];
    int32_t count = 0;
    for (int precision = 0; precision < 17; precision++) {
        (void)snprintf(text, sizeof text, "%.*e", precision, value);
        if (strtod(text, NULL) == value) break;
    }
    const char *at = text;
    for (; *at != 'e' && *at; at++) /* what is between is the locale's decimal point */
        if (*at >= '0' && *at <= '9' && count < 19) digits[count++] = *at;
    *exponent = *at ? atoi(at + 1) : 0;
    while (count > 1 && digits[count - 1] == '0') count--;
    return count;
}

static void put_number(moe__printer *p, double value)
{
    char digits[20];
    int32_t exponent, point, count;
    if (value < 0) put(p, "-", 1), value = -value;
    if (!(value <= 1.7976931348623157e308)) {
        put_string(p, value > 0 ? "inf" : "nan");
        return;
    }
    count = shortest(value, digits, &exponent);
    point = exponent >= -4 && exponent < 9 ? exponent : 0;
    for (int32_t i = point; i < 0; i++) put_string(p, i == point ? "0." : "0");
    for (int32_t i = 0; i < count || i <= point; i++) {
        put(p, i < count ? &digits[i] : "0", 1);
        if (i == point && i + 1 < count) put(p, ".", 1);
    }
    if (exponent != point) {
        put(p, "e", 1);
        put_integer(p, exponent);
    }
}

void moe__print(moe__printer *p, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    for (const char *at = format; *at; at++) {
        if (*at != '%') {
            put(p, at, 1);
            continue;
        }
        switch (*++at) {
        case 's': put_string(p, va_arg(arguments, const char *)); break;
        case 'd': put_integer(p, va_arg(arguments, int64_t)); break;
        case 'g': put_number(p, va_arg(arguments, double)); break;
        default: put(p, at, 1);
        }
    }
    va_end(arguments);
}
