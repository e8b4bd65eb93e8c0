/* classes.c - see classes.h. ASCII by hand: what isalpha says would depend on the locale. */
#include "classes.h"

#include <string.h>

enum { LOWER, UPPER, DIGIT, UNDERSCORE, SPACE, NEWLINE, BRACKET, OPERATOR, PUNCTUATION, OTHER };

static int is_one_of(const char *set, uint8_t byte)
{
    return byte != 0 && strchr(set, byte) != NULL;
}

int class_of_byte(uint8_t byte)
{
    if (byte >= 'a' && byte <= 'z') return LOWER;
    if (byte >= 'A' && byte <= 'Z') return UPPER;
    if (byte >= '0' && byte <= '9') return DIGIT;
    if (byte == '_') return UNDERSCORE;
    if (is_one_of(" \t", byte)) return SPACE;
    if (is_one_of("\n\r", byte)) return NEWLINE;
    if (is_one_of("()[]{}", byte)) return BRACKET;
    if (is_one_of("+-*/%=<>&|^!~?", byte)) return OPERATOR;
    if (is_one_of(".,;:'\"`#@$\\", byte)) return PUNCTUATION;
    return OTHER;
}

const char *class_name(int which)
{
    static const char *const names[CLASSES] = {"a-z", "A-Z",    "0-9",    "_",     "space",
                                               "\\n", "([{}])", "+-*/<=", ".,;:#", "other"};
    return names[which];
}
