/* check.c - what a case may contain: every option with its type, every tensor with its shape.
 *
 * Checked before anything runs, so that a damaged or unknown case fails even where the library
 * would answer MOE_ERROR_NOT_SUPPORTED. Shapes are written with the letters of the options (C is
 * capacity, X the experts: E, or A*B), digits stand for themselves, '+' is E+1, '?' any size. */
#include "case.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct rule {
    const char *name, *is;
} rule;

/* i: whole number, b: 0 or 1, f: number, t: text. */
static const rule OPTIONS[] = {{"T", "i"},           {"D", "i"},
                               {"E", "i"},           {"F", "i"},
                               {"K", "i"},           {"A", "i"},
                               {"B", "i"},           {"KP", "i"},
                               {"KS", "i"},          {"m", "i"},
                               {"capacity", "i"},    {"n_groups", "i"},
                               {"topk_groups", "i"}, {"train", "b"},
                               {"cv_ddof", "b"},     {"load_grad", "b"},
                               {"renorm", "b"},      {"expert_sigmoid", "b"},
                               {"out_sigmoid", "b"}, {"renorm_after_drop", "b"},
                               {"noise_eps", "f"},   {"cdf_guard", "f"},
                               {"bias_rate", "f"},   {"renorm_eps", "f"},
                               {"route_scale", "f"}, {"w_importance", "f"},
                               {"w_load", "f"},      {"w_switch", "f"},
                               {"w_gshard", "f"},    {"w_z", "f"},
                               {"w_seqaux", "f"},    {"act", "t"},
                               {"gating", "t"},      {"score", "t"},
                               {"order", "t"},       {"group_score", "t"},
                               {"policy", "t"},      {"seqaux_counts", "t"}};

static const rule TENSORS[] = {{"x", "TD"},
                               {"dy", "TD"},
                               {"Wg", "DE"},
                               {"Wnoise", "DE"},
                               {"noise", "TE"},
                               {"logits", "TE"},
                               {"dgates", "TE"},
                               {"dw", "TK"},
                               {"bias", "E"},
                               {"thr", "E"},
                               {"topk_idx", "TK"},
                               {"topk_w", "TK"},
                               {"prio", "T"},
                               {"offsets", "+"},
                               {"v", "?"},
                               {"W1", "XDF"},
                               {"b1", "XF"},
                               {"W3", "XDF"},
                               {"b3", "XF"},
                               {"W2", "XFD"},
                               {"b2", "XD"},
                               {"sW1", "D?"},
                               {"sb1", "?"},
                               {"sW3", "D?"},
                               {"sb3", "?"},
                               {"sW2", "?D"},
                               {"sb2", "D"},
                               {"rW1", "D?"},
                               {"rb1", "?"},
                               {"rW3", "D?"},
                               {"rb3", "?"},
                               {"rW2", "?D"},
                               {"rb2", "D"},
                               {"wsg", "D"},
                               {"Wc", "D2"},
                               {"bc", "2"},
                               {"Wg_p", "DA"},
                               {"Wnoise_p", "DA"},
                               {"noise_p", "TA"},
                               {"Wg_s", "ADB"},
                               {"Wnoise_s", "ADB"},
                               {"noise_s", "TAB"},
                               {"y", "TD"},
                               {"gates", "TX"},
                               {"clean", "TE"},
                               {"H", "TE"},
                               {"sd", "TE"},
                               {"topk_val", "TK"},
                               {"importance", "E"},
                               {"load", "E"},
                               {"counts", "X"},
                               {"perm_token", "?"},
                               {"keep", "TK"},
                               {"pos", "TK"},
                               {"w_kept", "TK"},
                               {"w_kept_renorm", "TK"},
                               {"bias_next", "E"},
                               {"tok", "EC"},
                               {"w", "EC"},
                               {"gsigma", "TE"},
                               {"mask_batchwise", "TE"},
                               {"mask_threshold", "TE"},
                               {"gates_batchwise", "TE"},
                               {"gates_threshold", "TE"},
                               {"gates_primary", "TA"},
                               {"load_primary", "A"},
                               {"importance_h", "AB"},
                               {"load_h", "AB"},
                               {"loss_batchwise", ""},
                               {"loss_importance", ""},
                               {"loss_load", ""},
                               {"loss_switch", ""},
                               {"loss_gshard", ""},
                               {"loss_zloss", ""},
                               {"loss_seqaux", ""},
                               {"switch", ""},
                               {"gshard", ""},
                               {"zloss", ""},
                               {"seqaux", ""},
                               {"cv2_pop", ""},
                               {"cv2_sample", ""}};

/* What stands after the name of a gradient: the scalar it is of. */
static const char *const SCALARS[] = {"",        "_gates",  "_imp",   "_load",   "_lb",  "_aux",
                                      "_switch", "_gshard", "_zloss", "_seqaux", "_pop", "_sample"};

static int whole(const char *text, long long *out)
{
    char *end;
    *out = strtoll(text, &end, 10);
    return *text && *end == 0;
}

static int fits(const char *text, char type)
{
    long long i;
    char *end;
    if (type == 't') return *text != 0;
    if (type == 'i') return whole(text, &i) && i >= 0;
    if (type == 'b') return whole(text, &i) && (i == 0 || i == 1);
    return (void)strtod(text, &end), *text && *end == 0;
}

static int check_options(const vector_case *c, char *error)
{
    for (int i = 0; i < c->keys; i++) {
        const char *type = NULL;
        for (size_t o = 0; o < sizeof OPTIONS / sizeof *OPTIONS; o++)
            if (strcmp(OPTIONS[o].name, c->key[i]) == 0) type = OPTIONS[o].is;
        if (!type) return snprintf(error, 256, "unknown key %s", c->key[i]), -1;
        if (!fits(c->value[i], *type))
            return snprintf(error, 256, "key %s has the bad value %.100s", c->key[i], c->value[i]),
                   -1;
        for (int j = 0; j < i; j++)
            if (strcmp(c->key[j], c->key[i]) == 0)
                return snprintf(error, 256, "key %s is given twice", c->key[i]), -1;
    }
    return 0;
}

/* The size a letter stands for, or -1 if the case does not say. */
static int64_t size_of(const vector_case *c, char letter)
{
    char key[] = {letter, 0};
    if (letter >= '0' && letter <= '9') return letter - '0';
    if (letter == '+') return size_of(c, 'E') < 0 ? -1 : size_of(c, 'E') + 1;
    if (letter == 'X' && case_has(c, "A")) return size_of(c, 'A') * size_of(c, 'B');
    if (letter == 'X') return size_of(c, 'E');
    const char *name = letter == 'C' ? "capacity" : key;
    for (int i = 0; i < c->keys; i++)
        if (strcmp(c->key[i], name) == 0) return strtoll(c->value[i], NULL, 10);
    return -1;
}

static const char *shape_of_name(const char *name, size_t length)
{
    for (size_t i = 0; i < sizeof TENSORS / sizeof *TENSORS; i++)
        if (strlen(TENSORS[i].name) == length && strncmp(TENSORS[i].name, name, length) == 0)
            return TENSORS[i].is;
    return NULL;
}

/* The shape of a tensor; a gradient d<name><scalar> has the shape of <name>. */
static const char *shape_of(const tensor *t)
{
    size_t length = strlen(t->name);
    const char *shape = shape_of_name(t->name, length);
    if (shape || strcmp(t->role, "out") != 0 || t->name[0] != 'd') return shape;
    for (size_t i = 0; i < sizeof SCALARS / sizeof *SCALARS && !shape; i++) {
        size_t tail = strlen(SCALARS[i]);
        if (length > tail + 1 && strcmp(t->name + length - tail, SCALARS[i]) == 0)
            shape = shape_of_name(t->name + 1, length - 1 - tail);
    }
    return shape;
}

static int check_tensor(const vector_case *c, const tensor *t, char *error)
{
    const char *shape = shape_of(t);
    if (!shape || (strcmp(t->role, "in") != 0 && strcmp(t->role, "out") != 0))
        return snprintf(error, 256, "unknown tensor %s %s", t->role, t->name), -1;
    if (t->dims != (int)strlen(shape))
        return snprintf(error, 256, "%s has %d dimensions, want %zu", t->name, t->dims,
                        strlen(shape)),
               -1;
    for (int d = 0; d < t->dims; d++) {
        int64_t want = shape[d] == '?' ? t->dim[d] : size_of(c, shape[d]);
        if (t->dim[d] != want)
            return snprintf(error, 256, "dimension %d of %s is %lld, want %lld", d, t->name,
                            (long long)t->dim[d], (long long)want),
                   -1;
    }
    return 0;
}

int case_check(const vector_case *c, char *error)
{
    if (check_options(c, error) != 0) return -1;
    for (int i = 0; i < c->tensors; i++) {
        if (check_tensor(c, &c->t[i], error) != 0) return -1;
        for (int j = 0; j < i; j++)
            if (strcmp(c->t[i].role, c->t[j].role) == 0 && strcmp(c->t[i].name, c->t[j].name) == 0)
                return snprintf(error, 256, "tensor %s is given twice", c->t[i].name), -1;
    }
    return 0;
}
