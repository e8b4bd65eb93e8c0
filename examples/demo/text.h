/* text.h - real text of this machine, cut into a training and a held-out part. */
#ifndef DEMO_TEXT_H
#define DEMO_TEXT_H

#include <stddef.h>
#include <stdint.h>

typedef struct text {
    uint8_t *bytes;
    size_t size, room, limit;
    size_t train_size;     /* bytes[0..train_size) to train on, the rest is held out */
    size_t files, skipped; /* skipped: not readable, or with a zero byte and so no text */
    uint64_t hash;         /* of the bytes and of where they are cut */
} text;

/* The least text that can be cut into two parts worth the name. */
enum { TEXT_MINIMUM = 4096 };

/* Reads a file, whatever is in it, or every text file below a directory in sorted order, up to
 * `limit` bytes. About a tenth is held out, in whole files; where that is not possible, or of fewer
 * than ten files, the last tenth of all bytes. Returns 0, or -1 with a message on stderr. */
int text_read(text *t, const char *path, size_t limit);
void text_free(text *t);

/* Bits per byte of the held-out part if bytes were independent, with the training part's
 * frequencies. */
double text_unigram_bits(const text *t);

#endif
