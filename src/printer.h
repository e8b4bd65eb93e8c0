/* printer.h - text into memory of the caller, counted whether it fits or not; the same bytes in
 * every locale. */
#ifndef MOE_PRINTER_H
#define MOE_PRINTER_H

#include <stdint.h>

typedef struct moe__printer {
    char *text; /* NULL: only count */
    int64_t capacity, used;
} moe__printer;

/* %s, %d (int64_t, through an int64_t argument), %g (double, the shortest digits that read back as
 * it), %%. */
void moe__print(moe__printer *printer, const char *format, ...);

#endif
