/* case.c - reads a case: text lines, and raw little-endian files beside them. */
#include "case.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_COUNT = 1 << 28 }; /* elements of a tensor */

static int64_t element_size(const char *dtype) { return strcmp(dtype, "f64") == 0 ? 8 : 4; }

static int known_dtype(const char *dtype)
{
    return strcmp(dtype, "f32") == 0 || strcmp(dtype, "f64") == 0 || strcmp(dtype, "i32") == 0;
}

/* "role name dtype ndim dim ... file" */
static int read_tensor(vector_case *c, const char *directory, const char *text, char *error)
{
    char file[256], path[4096];
    int at = 0, step = 0;
    if (c->tensors == MAX_TENSORS)
        return snprintf(error, 256, "more than %d tensors", MAX_TENSORS), -1;
    tensor *t = &c->t[c->tensors];
    memset(t, 0, sizeof *t);
    if (sscanf(text, "%3s %39s %3s %d%n", t->role, t->name, t->dtype, &t->dims, &at) != 4 ||
        t->dims < 0 || t->dims > MAX_DIMS || !known_dtype(t->dtype))
        return snprintf(error, 256, "bad tensor line: %.200s", text), -1;
    t->count = 1;
    for (int d = 0; d < t->dims; d++, at += step) {
        long long dim;
        if (sscanf(text + at, "%lld%n", &dim, &step) != 1 || dim < 0)
            return snprintf(error, 256, "bad tensor line: %.200s", text), -1;
        if (dim > 0 && t->count > MAX_COUNT / dim)
            return snprintf(error, 256, "too large: %.200s", text), -1;
        t->dim[d] = dim;
        t->count *= dim;
    }
    if (sscanf(text + at, "%255s", file) != 1)
        return snprintf(error, 256, "bad tensor line: %.200s", text), -1;
    size_t size = (size_t)(t->count * element_size(t->dtype));
    (void)snprintf(path, sizeof path, "%s/%s", directory, file);
    t->data = calloc(size + 8, 1);
    c->tensors++;
    FILE *f = t->count ? fopen(path, "rb") : NULL;
    if (!t->data || (t->count && (!f || fread(t->data, 1, size, f) != size || fgetc(f) != EOF))) {
        if (f) fclose(f);
        return snprintf(error, 256, "%.180s is not there or has not %zu bytes", file, size), -1;
    }
    if (f) fclose(f);
    return 0;
}

static tensor *find(vector_case *c, const char *role, const char *name)
{
    for (int i = 0; i < c->tensors; i++)
        if (strcmp(c->t[i].role, role) == 0 && strcmp(c->t[i].name, name) == 0) return &c->t[i];
    return NULL;
}

static int read_line(vector_case *c, const char *directory, char *line, char *error)
{
    char *rest = strchr(line, ' ');
    if (!rest) return snprintf(error, 256, "bad line: %.200s", line), -1;
    *rest++ = 0;
    if (strcmp(line, "format") == 0)
        return strcmp(rest, "1") == 0 ? 0 : (snprintf(error, 256, "format %.50s", rest), -1);
    if (strcmp(line, "name") == 0) return snprintf(c->name, sizeof c->name, "%s", rest), 0;
    if (strcmp(line, "op") == 0) return snprintf(c->op, sizeof c->op, "%s", rest), 0;
    if (strcmp(line, "note") == 0) return 0;
    if (strcmp(line, "tensor") == 0) return read_tensor(c, directory, rest, error);
    if (strcmp(line, "tol") == 0) {
        char name[40];
        double maxabs, f32err;
        tensor *t = NULL;
        if (sscanf(rest, "%39s %lf %lf", name, &maxabs, &f32err) == 3) t = find(c, "out", name);
        if (!t || !isfinite(maxabs) || !isfinite(f32err))
            return snprintf(error, 256, "bad tol line: %.200s", rest), -1;
        t->maxabs = maxabs;
        t->f32err = f32err;
        return 0;
    }
    if (c->keys == MAX_KEYS) return snprintf(error, 256, "more than %d options", MAX_KEYS), -1;
    (void)snprintf(c->key[c->keys], sizeof c->key[0], "%.39s", line);
    (void)snprintf(c->value[c->keys++], sizeof c->value[0], "%.255s", rest);
    return 0;
}

int case_read(vector_case *c, const char *directory, char *error)
{
    char line[1024], path[4096];
    int result = 0, ended = 0;
    memset(c, 0, sizeof *c);
    (void)snprintf(path, sizeof path, "%s/case.txt", directory);
    FILE *f = fopen(path, "r");
    if (!f) return snprintf(error, 256, "there is no case.txt"), -1;
    while (result == 0 && !ended && fgets(line, sizeof line, f)) {
        line[strcspn(line, "\r\n")] = 0;
        if (line[0] == 0) continue;
        ended = strcmp(line, "end") == 0;
        if (!ended) result = read_line(c, directory, line, error);
    }
    fclose(f);
    if (result == 0 && !ended) result = (snprintf(error, 256, "case.txt has no end line"), -1);
    if (result == 0 && (!c->op[0] || !c->name[0]))
        result = (snprintf(error, 256, "no name or op"), -1);
    return result;
}

void case_free(vector_case *c)
{
    for (int i = 0; i < c->tensors; i++) free(c->t[i].data);
    c->tensors = 0;
}

tensor *case_tensor(vector_case *c, const char *role, const char *name)
{
    tensor *t = find(c, role, name);
    if (t) t->used = 1;
    return t;
}

const char *case_text(vector_case *c, const char *key, const char *fallback)
{
    for (int i = 0; i < c->keys; i++) {
        if (strcmp(c->key[i], key) != 0) continue;
        c->key_used[i] = 1;
        return c->value[i];
    }
    return fallback;
}

double case_number(vector_case *c, const char *key, double fallback)
{
    const char *text = case_text(c, key, NULL);
    return text ? strtod(text, NULL) : fallback;
}

int64_t case_integer(vector_case *c, const char *key, int64_t fallback)
{
    const char *text = case_text(c, key, NULL);
    return text ? (int64_t)strtoll(text, NULL, 10) : fallback;
}

int case_has(const vector_case *c, const char *key)
{
    for (int i = 0; i < c->keys; i++)
        if (strcmp(c->key[i], key) == 0) return 1;
    return 0;
}
