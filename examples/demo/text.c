/* text.c - finds text: C headers, or what the user names.
 *
 * Files are taken in sorted order so that a run can be repeated. Below a directory a file with a
 * zero byte is no text and is left out; a file that is named is taken as it is. */
#define _XOPEN_SOURCE 700
#include "text.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Two parts that grow while files are read; text_read joins them. */
typedef struct parts {
    text train, held;
    size_t files, skipped;
    int any; /* bytes of every value are welcome */
} parts;

static int append(text *t, const uint8_t *bytes, size_t size)
{
    if (t->size + size > t->room) {
        size_t room = (t->size + size) * 2;
        uint8_t *grown = realloc(t->bytes, room);
        if (!grown) return -1;
        t->bytes = grown;
        t->room = room;
    }
    memcpy(t->bytes + t->size, bytes, size);
    t->size += size;
    return 0;
}

/* Adds one file to the held-out part as long as that has less than a tenth, else to the other.
 * Unreadable files and files that are no text are left out. */
static int add_file(parts *p, const char *path, size_t limit)
{
    uint8_t buffer[65536];
    size_t taken = p->train.size + p->held.size, got;
    text *to = p->held.size < p->train.size / 9 ? &p->held : &p->train;
    size_t before = to->size;
    FILE *f = fopen(path, "rb");
    if (!f) {
        p->skipped++;
        return 0;
    }
    while (taken < limit && (got = fread(buffer, 1, sizeof buffer, f)) > 0) {
        if (got > limit - taken) got = limit - taken;
        if (!p->any && memchr(buffer, 0, got)) {
            to->size = before;
            p->skipped++;
            fclose(f);
            return 0;
        }
        if (append(to, buffer, got) != 0) {
            fclose(f);
            return -1;
        }
        taken += got;
    }
    fclose(f);
    p->files += to->size > before;
    return 0;
}

static int by_name(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name);
}

static int add_path(parts *p, const char *path, size_t limit, int depth)
{
    struct stat s;
    struct dirent **entries;
    int result = 0;
    if (p->train.size + p->held.size >= limit || depth > 16 || stat(path, &s) != 0) return 0;
    if (S_ISREG(s.st_mode)) return add_file(p, path, limit);
    if (!S_ISDIR(s.st_mode)) return 0; /* a pipe or a device might never end */
    int count = scandir(path, &entries, NULL, by_name);
    for (int i = 0; i < count; i++) {
        char child[4096];
        const char *name = entries[i]->d_name;
        int length = snprintf(child, sizeof child, "%s/%s", path, name);
        if (result == 0 && name[0] != '.' && length > 0 && (size_t)length < sizeof child)
            result = add_path(p, child, limit, depth + 1);
        free(entries[i]);
    }
    if (count >= 0) free(entries);
    return result;
}

static int join(text *t, parts *p)
{
    size_t all = p->train.size + p->held.size;
    /* Too few files, or of too different sizes: hold out the last tenth of all bytes. */
    if (p->files < 10 || p->held.size < all / 20 || p->held.size > all / 5) {
        if (append(&p->train, p->held.bytes, p->held.size) != 0) return -1;
        p->held.size = 0;
        t->train_size = p->train.size - p->train.size / 10;
    } else {
        t->train_size = p->train.size;
        if (append(&p->train, p->held.bytes, p->held.size) != 0) return -1;
    }
    t->bytes = p->train.bytes;
    t->size = p->train.size;
    t->files = p->files;
    t->skipped = p->skipped;
    p->train.bytes = NULL;
    return 0;
}

/* FNV-1a. */
static uint64_t hash(const text *t)
{
    uint64_t h = 0xcbf29ce484222325u ^ t->train_size;
    for (size_t i = 0; i < t->size; i++) h = (h ^ t->bytes[i]) * 0x100000001b3u;
    return h;
}

int text_read(text *t, const char *path, size_t limit)
{
    struct stat s;
    parts p = {0};
    memset(t, 0, sizeof *t);
    if (stat(path, &s) != 0 || access(path, R_OK) != 0) {
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
        return -1;
    }
    p.any = S_ISREG(s.st_mode);
    p.train.bytes = malloc(1);
    p.held.bytes = malloc(1);
    int bad = !p.train.bytes || !p.held.bytes || add_path(&p, path, limit, 0) != 0 ||
              join(t, &p) != 0;
    free(p.held.bytes);
    free(p.train.bytes);
    if (bad) {
        fprintf(stderr, "%s: out of memory\n", path);
        return -1;
    }
    if (t->size < TEXT_MINIMUM || t->size - t->train_size < TEXT_MINIMUM / 16) {
        fprintf(
            stderr,
            "%s: %zu bytes of text in %zu files (%zu left out), %zu of them to hold out; at least "
            "%d and %d are needed\n",
            path, t->size, t->files, t->skipped, t->size - t->train_size, TEXT_MINIMUM,
            TEXT_MINIMUM / 16);
        text_free(t);
        return -1;
    }
    t->hash = hash(t);
    return 0;
}

void text_free(text *t)
{
    free(t->bytes);
    t->bytes = NULL;
}

double text_unigram_bits(const text *t)
{
    double count[256], bits = 0;
    for (int b = 0; b < 256; b++) count[b] = 1; /* no byte is impossible */
    for (size_t i = 0; i < t->train_size; i++) count[t->bytes[i]] += 1;
    for (size_t i = t->train_size; i < t->size; i++)
        bits -= log2(count[t->bytes[i]] / ((double)t->train_size + 256));
    return bits / (double)(t->size - t->train_size);
}
