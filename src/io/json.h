/* json.h - parsing, for the files that include jansson. */
#ifndef MOE_IO_JSON_H
#define MOE_IO_JSON_H

#include "io.h"

#include <jansson.h>

/* Parses text without duplicate keys; NULL on error with *status set. */
json_t *moe__io_parse_json(const char *text, int64_t bytes, const char *path, moe_status *status,
                           const char *function);

#endif
