/* bad_fields.h - tables of struct fields with values that a call must refuse. */
#ifndef BAD_FIELDS_H
#define BAD_FIELDS_H

#include <moe/moe.h>

typedef struct bad_field {
    const char *name;
    size_t at, size;
    moe_status status;
    int64_t integer;     /* the bad value of an integer field */
    double real;         /* of a double */
    const void *pointer; /* of a pointer */
    int kind;            /* 0 integer, 1 double, 2 pointer */
} bad_field;

#define BAD_AT(type, field) #field, offsetof(type, field), sizeof(((type *)0)->field)
#define BAD_INTEGER(type, field, value, status)                    \
    {                                                              \
        BAD_AT(type, field), MOE_ERROR_##status, value, 0, NULL, 0 \
    }
#define BAD_DOUBLE(type, field, value, status)                     \
    {                                                              \
        BAD_AT(type, field), MOE_ERROR_##status, 0, value, NULL, 1 \
    }
#define BAD_POINTER(type, field, value, status)                 \
    {                                                           \
        BAD_AT(type, field), MOE_ERROR_##status, 0, 0, value, 2 \
    }

/* Puts the bad value into a struct. */
void bad_field_put(const bad_field *bad, void *instance);

/* "" if the call gave the status and its message names the field and, for an invalid argument, the
 * value; else what is wrong. Clears the message. */
const char *bad_field_complaint(const bad_field *bad, moe_status got);

#endif
