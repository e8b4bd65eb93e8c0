/* case.h - one reference case in memory: its options and its tensors, and what was used of them. */
#ifndef VECTOR_CASE_H
#define VECTOR_CASE_H

#include <stdint.h>

enum { MAX_TENSORS = 128, MAX_KEYS = 96, MAX_DIMS = 4 };

typedef struct tensor {
    char role[4], name[40], dtype[4];
    int dims;
    int64_t dim[MAX_DIMS], count;
    void *data;            /* float, double or int32_t as dtype says */
    double maxabs, f32err; /* of the tol line */
    int used;
} tensor;

typedef struct vector_case {
    char name[128], op[64];
    char key[MAX_KEYS][40], value[MAX_KEYS][256];
    int key_used[MAX_KEYS];
    int keys, tensors;
    tensor t[MAX_TENSORS];
} vector_case;

/* Reads DIRECTORY/case.txt and its files. Returns 0, or -1 with the reason in error[256]. */
int case_read(vector_case *c, const char *directory, char *error);
/* Checks names, option values and shapes. Returns 0, or -1 with the reason in error[256]. */
int case_check(const vector_case *c, char *error);
void case_free(vector_case *c);

/* A tensor by role and name, marked as used; NULL if there is none. */
tensor *case_tensor(vector_case *c, const char *role, const char *name);

/* An option as text or number, marked as used; fallback if there is none. */
const char *case_text(vector_case *c, const char *key, const char *fallback);
double case_number(vector_case *c, const char *key, double fallback);
int64_t case_integer(vector_case *c, const char *key, int64_t fallback);
int case_has(const vector_case *c, const char *key);

#endif
