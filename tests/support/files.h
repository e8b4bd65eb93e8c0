/* files.h - a directory for a test's files, whole files in memory, and hand-made safetensors. */
#ifndef FILES_H
#define FILES_H

#include <check.h>
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char files_directory[64];

static inline void files_begin(void)
{
    (void)snprintf(files_directory, sizeof files_directory, "/tmp/check_io.XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(files_directory));
}

/* How many files there are, without "." and ".."; removed if asked. */
static inline int files_count(int and_remove)
{
    char path[400];
    int count = 0;
    struct dirent *e;
    DIR *d = opendir(files_directory);
    ck_assert_ptr_nonnull(d);
    while ((e = readdir(d)) != NULL) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
        count++;
        (void)snprintf(path, sizeof path, "%s/%s", files_directory, e->d_name);
        if (and_remove) (void)unlink(path);
    }
    (void)closedir(d);
    return count;
}

static inline void files_end(void)
{
    (void)files_count(1);
    (void)rmdir(files_directory);
}

/* The path of a file in the directory; sixteen of them live at once. */
static inline const char *files_path(const char *name)
{
    static _Thread_local char paths[16][256];
    static _Thread_local unsigned next;
    char *path = paths[next++ % 16];
    (void)snprintf(path, sizeof paths[0], "%s/%s", files_directory, name);
    return path;
}

static inline void files_write(const char *path, const void *bytes, size_t count)
{
    FILE *f = fopen(path, "wb");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fwrite(bytes, 1, count, f), count);
    ck_assert_int_eq(fclose(f), 0);
}

/* The whole of a file, malloc'd. */
static inline unsigned char *files_read(const char *path, size_t *count)
{
    FILE *f = fopen(path, "rb");
    ck_assert_msg(f != NULL, "%s", path);
    ck_assert_int_eq(fseek(f, 0, SEEK_END), 0);
    *count = (size_t)ftell(f);
    rewind(f);
    unsigned char *bytes = malloc(*count + 1);
    ck_assert_ptr_nonnull(bytes);
    ck_assert_uint_eq(fread(bytes, 1, *count, f), *count);
    bytes[*count] = 0;
    (void)fclose(f);
    return bytes;
}

static inline int files_equal(const char *a, const char *b)
{
    size_t m, n;
    unsigned char *x = files_read(a, &m), *y = files_read(b, &n);
    int equal = m == n && memcmp(x, y, m) == 0;
    free(x), free(y);
    return equal;
}

/* Header and data as a safetensors file. */
static inline void files_tensors(const char *path, const char *header, const void *data,
                                 size_t bytes)
{
    size_t n = strlen(header);
    unsigned char *all = malloc(n + bytes + 8);
    ck_assert_ptr_nonnull(all);
    for (int i = 0; i < 8; i++) all[i] = (unsigned char)((uint64_t)n >> (8 * i));
    memcpy(all + 8, header, n);
    if (bytes) memcpy(all + 8 + n, data, bytes);
    files_write(path, all, n + bytes + 8);
    free(all);
}

/* A safetensors file made tensor by tensor. */
typedef struct files_maker {
    char header[1 << 16];
    unsigned char *data;
    size_t used, bytes, room;
} files_maker;

static inline void *files_add(files_maker *m, const char *name, const char *dtype,
                              const char *shape, size_t bytes)
{
    if (m->bytes + bytes > m->room) {
        m->room = 2 * (m->bytes + bytes);
        m->data = realloc(m->data, m->room);
        ck_assert_ptr_nonnull(m->data);
    }
    m->used += (size_t)snprintf(
        m->header + m->used, sizeof m->header - m->used,
        "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}",
        m->used ? "," : "{", name, dtype, shape, m->bytes, m->bytes + bytes);
    ck_assert_uint_lt(m->used, sizeof m->header);
    m->bytes += bytes;
    return m->data + m->bytes - bytes;
}

static inline void files_finish(files_maker *m, const char *path)
{
    m->used += (size_t)snprintf(m->header + m->used, sizeof m->header - m->used, "%s}",
                                m->used ? "" : "{");
    files_tensors(path, m->header, m->data, m->bytes);
    free(m->data);
    memset(m, 0, sizeof *m);
}

#endif
