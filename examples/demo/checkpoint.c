/* checkpoint.c - the file, all numbers little-endian:
 *
 *     "moe-demo"   8 bytes
 *     version      u64
 *     size         u64, of the whole file
 *     fields       u64 each: what must be the same in the run that goes on (see list_fields)
 *     state        u64 each: step, random state, then three doubles as their bits
 *     parameters   of the MoE model, then of its twin: for each array data, mean, square as f32
 *     checksum     u64, FNV-1a of everything before
 *
 * The experts of all ranks are in it in their order, so that any number of ranks can read it.
 *
 * Wall-clock time is not in it, so that two equal runs have equal files. */
#define _XOPEN_SOURCE 700
#include "checkpoint.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char MAGIC[] = "moe-demo";
enum { VERSION = 1, HEAD_BYTES = 24, FIELDS = 18, STATE_WORDS = 5, CHECKSUM_BYTES = 8 };

/* ---- what must be the same ------------------------------------------------------------------- */

typedef struct field {
    const char *name;
    uint64_t value;
    enum { WHOLE, REAL, HASH } kind;
} field;

static uint64_t bits_of(double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static double real_of(uint64_t bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void list_fields(const trainer *t, field *fields)
{
    const options *o = t->options;
    const field list[FIELDS] = {{"context", CONTEXT, WHOLE},
                                {"embedding", EMBED, WHOLE},
                                {"width", WIDTH, WHOLE},
                                {"bytes a step", (uint64_t)o->batch, WHOLE},
                                {"--report", (uint64_t)o->report, WHOLE},
                                {"held-out batches", HELD_BATCHES, WHOLE},
                                {"--steps", (uint64_t)o->steps, WHOLE},
                                {"--experts", (uint64_t)o->experts, WHOLE},
                                {"--top-k", (uint64_t)o->top_k, WHOLE},
                                {"--hidden", (uint64_t)o->hidden, WHOLE},
                                {"--seed", o->seed, WHOLE},
                                {"--rate", bits_of(o->rate), REAL},
                                {"--balance", bits_of(o->balance), REAL},
                                {"--only (0 both, 1 moe, 2 dense)", (uint64_t)o->only, WHOLE},
                                {"bytes of text", t->text->size, WHOLE},
                                {"bytes of training text", t->text->train_size, WHOLE},
                                {"hash of the text", t->text->hash, HASH},
                                {"library version", (uint64_t)moe_version_number(), WHOLE}};
    memcpy(fields, list, sizeof list);
}

static void print_field(const char *before, const field *f, uint64_t value)
{
    if (f->kind == REAL)
        fprintf(stderr, "%s %.17g", before, real_of(value));
    else if (f->kind == HASH)
        fprintf(stderr, "%s %016llx", before, (unsigned long long)value);
    else
        fprintf(stderr, "%s %llu", before, (unsigned long long)value);
}

/* ---- bytes ----------------------------------------------------------------------------------- */

static uint64_t fnv1a(const uint8_t *bytes, size_t size)
{
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < size; i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
    return hash;
}

static uint8_t *put(uint8_t *to, uint64_t value, int size)
{
    for (int i = 0; i < size; i++) to[i] = (uint8_t)(value >> (8 * i));
    return to + size;
}

static uint64_t get(const uint8_t *from, int size)
{
    uint64_t value = 0;
    for (int i = 0; i < size; i++) value |= (uint64_t)from[i] << (8 * i);
    return value;
}

static uint8_t *put_floats(uint8_t *to, const float *values, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, &values[i], sizeof bits);
        to = put(to, bits, 4);
    }
    return to;
}

static const uint8_t *get_floats(const uint8_t *from, float *values, int64_t count)
{
    for (int64_t i = 0; i < count; i++, from += 4) {
        uint32_t bits = (uint32_t)get(from, 4);
        memcpy(&values[i], &bits, sizeof bits);
    }
    return from;
}

static size_t file_size(const trainer *t)
{
    size_t size = HEAD_BYTES + 8 * (FIELDS + STATE_WORDS) + CHECKSUM_BYTES;
    for (int i = 0; i < MODELS; i++) size += 12 * (size_t)model_count_parameters(&t->models[i]);
    return size;
}

/* ---- saving ---------------------------------------------------------------------------------- */

static int out_of_memory(const char *path, size_t size)
{
    fprintf(stderr, "%s: no memory for a checkpoint of %zu bytes\n", path, size);
    return -1;
}

static uint8_t *put_head(const trainer *t, uint8_t *bytes, size_t size)
{
    const trainer_state *s = &t->state;
    const uint64_t state[STATE_WORDS] = {(uint64_t)s->step, s->random, bits_of(s->bits[MOE]),
                                         bits_of(s->bits[DENSE]), bits_of(s->balance_loss)};
    field fields[FIELDS];
    uint8_t *to = bytes;
    memcpy(to, MAGIC, 8);
    to = put(to + 8, VERSION, 8);
    to = put(to, size, 8);
    list_fields(t, fields);
    for (int i = 0; i < FIELDS; i++) to = put(to, fields[i].value, 8);
    for (int i = 0; i < STATE_WORDS; i++) to = put(to, state[i], 8);
    return to;
}

/* The experts' part of all ranks comes to rank 0; whole: there, [the array of all experts]. */
static int put_array(const ranks *r, uint8_t **to, const weights *w, const float *values,
                     float *whole)
{
    int64_t begin[MOST_RANKS + 1], part = w->count / w->parts;
    int shared = w->all_parts != w->parts;
    ranks_shares(begin, w->all_parts, r->size);
    if (shared && ranks_gather_to_first(r, whole, begin, values, part * (int64_t)sizeof *whole))
        return -1;
    if (*to) *to = put_floats(*to, shared ? whole : values, part * w->all_parts);
    return 0;
}

/* bytes, whole: NULL but on rank 0. */
static int fill(const trainer *t, uint8_t *bytes, size_t size, float *whole)
{
    uint8_t *to = bytes ? put_head(t, bytes, size) : NULL;
    for (int i = 0; i < MODELS; i++)
        for (int j = 0; j < t->models[i].parameter_count; j++) {
            const weights *w = &t->models[i].parameters[j];
            if (put_array(t->ranks, &to, w, w->data, whole) != 0 ||
                put_array(t->ranks, &to, w, w->mean, whole) != 0 ||
                put_array(t->ranks, &to, w, w->square, whole) != 0)
                return -1;
        }
    if (to) put(to, fnv1a(bytes, size - CHECKSUM_BYTES), 8);
    return 0;
}

static int write_all(int file, const uint8_t *bytes, size_t size)
{
    while (size > 0) {
        ssize_t written = write(file, bytes, size);
        if (written < 0 && errno == EINTR) continue;
        if (written <= 0) return -1;
        bytes += written;
        size -= (size_t)written;
    }
    return 0;
}

/* The new name is on the disk only once its directory is. File systems that cannot do that say so;
 * the checkpoint is there all the same. */
static void sync_directory(const char *path)
{
    char copy[PATH_MAX];
    snprintf(copy, sizeof copy, "%s", path);
    int directory = open(dirname(copy), O_RDONLY);
    if (directory < 0) return;
    fsync(directory);
    close(directory);
}

static int cannot_save(const char *path)
{
    fprintf(stderr, "%s: cannot save: %s\n", path, strerror(errno));
    return -1;
}

/* Opens the temporary file beside `path`. Returns -1 with the reason in errno. */
static int open_temporary(const char *path, char temporary[PATH_MAX])
{
    int length = snprintf(temporary, PATH_MAX, "%s.new", path);
    if (length >= 0 && length < PATH_MAX)
        return open(temporary, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    errno = ENAMETOOLONG;
    return -1;
}

/* Whether the file begins as a checkpoint does, however damaged it is, or is empty. */
static int may_be_replaced(const char *path)
{
    char begin[8];
    FILE *file = fopen(path, "rb");
    if (!file) return 0;
    size_t got = fread(begin, 1, sizeof begin, file);
    int bad = ferror(file);
    fclose(file);
    return !bad && memcmp(begin, MAGIC, got) == 0;
}

int checkpoint_probe(const char *path)
{
    char temporary[PATH_MAX];
    struct stat old;
    if (stat(path, &old) == 0 && (!S_ISREG(old.st_mode) || !may_be_replaced(path))) {
        fprintf(stderr, "%s: cannot save: it is there and no checkpoint\n", path);
        return -1;
    }
    int file = open_temporary(path, temporary);
    if (file < 0) return cannot_save(path);
    close(file);
    unlink(temporary);
    return 0;
}

static int replace(const char *path, const uint8_t *bytes, size_t size)
{
    char temporary[PATH_MAX];
    int file = open_temporary(path, temporary);
    if (file < 0) return -1;
    int bad = write_all(file, bytes, size) != 0 || fsync(file) != 0;
    int reason = errno;
    if (close(file) != 0 && !bad) bad = 1, reason = errno;
    if (!bad && rename(temporary, path) != 0) bad = 1, reason = errno;
    if (bad) {
        unlink(temporary);
        errno = reason;
        return -1;
    }
    sync_directory(path);
    return 0;
}

int checkpoint_save(const trainer *t, const char *path)
{
    const ranks *r = t->ranks;
    size_t size = file_size(t);
    int first = r->rank == 0;
    uint8_t *bytes = first ? malloc(size) : NULL;
    float *whole = first ? malloc(size) : NULL; /* room for the largest array */
    int result = first && (!bytes || !whole) ? out_of_memory(path, size) : 0;
    result = ranks_agree(r, result);
    if (result == 0) result = fill(t, bytes, size, whole);
    if (result == 0)
        result = ranks_agree(r, first && replace(path, bytes, size) ? cannot_save(path) : 0);
    free(bytes);
    free(whole);
    return result;
}

/* ---- loading --------------------------------------------------------------------------------- */

/* The bytes of an open file, or NULL with the reason in errno. */
static uint8_t *read_all(FILE *file, size_t *size)
{
    struct stat s;
    if (fstat(fileno(file), &s) != 0) return NULL;
    if (S_ISDIR(s.st_mode)) return errno = EISDIR, NULL;
    *size = (size_t)s.st_size;
    uint8_t *bytes = malloc(*size + 1);
    if (bytes && fread(bytes, 1, *size, file) == *size) return bytes;
    free(bytes);
    return NULL;
}

static uint8_t *read_file(const char *path, size_t *size)
{
    FILE *file = fopen(path, "rb");
    uint8_t *bytes = file ? read_all(file, size) : NULL;
    if (!bytes) fprintf(stderr, "%s: cannot read: %s\n", path, strerror(errno));
    if (file) fclose(file);
    return bytes;
}

static int check_whole(const char *path, const uint8_t *bytes, size_t size)
{
    if (size < 8 || memcmp(bytes, MAGIC, 8) != 0) {
        fprintf(stderr, "%s: not a checkpoint of this program\n", path);
        return -1;
    }
    if (size < HEAD_BYTES + CHECKSUM_BYTES || get(bytes + 16, 8) > size) {
        fprintf(stderr, "%s: cut short: %zu bytes", path, size);
        if (size >= HEAD_BYTES) fprintf(stderr, " of %llu", (unsigned long long)get(bytes + 16, 8));
        fprintf(stderr, "\n");
        return -1;
    }
    uint64_t version = get(bytes + 8, 8), claimed = get(bytes + 16, 8);
    uint64_t stored = get(bytes + size - CHECKSUM_BYTES, 8);
    uint64_t found = fnv1a(bytes, size - CHECKSUM_BYTES);
    if (claimed < size || stored != found) {
        fprintf(stderr, "%s: damaged: checksum %016llx, its bytes give %016llx\n", path,
                (unsigned long long)stored, (unsigned long long)found);
        return -1;
    }
    if (version == VERSION) return 0;
    fprintf(stderr, "%s: format version %llu, this program reads %d\n", path,
            (unsigned long long)version, VERSION);
    return -1;
}

static int check_fields(const trainer *t, const char *path, const uint8_t *bytes, size_t size)
{
    field fields[FIELDS];
    list_fields(t, fields);
    if (size < HEAD_BYTES + 8 * (FIELDS + STATE_WORDS) + CHECKSUM_BYTES) {
        fprintf(stderr, "%s: %zu bytes are too few for a checkpoint\n", path, size);
        return -1;
    }
    for (int i = 0; i < FIELDS; i++) {
        uint64_t saved = get(bytes + HEAD_BYTES + 8 * i, 8);
        if (saved == fields[i].value) continue;
        fprintf(stderr, "%s: made with %s", path, fields[i].name);
        print_field("", &fields[i], saved);
        print_field(", this run has", &fields[i], fields[i].value);
        fprintf(stderr, "\n");
        return -1;
    }
    if (size == file_size(t)) return 0;
    fprintf(stderr, "%s: %zu bytes, %zu expected\n", path, size, file_size(t));
    return -1;
}

/* An array of all experts, of which this rank keeps its part. */
static const uint8_t *get_array(const ranks *r, const uint8_t *from, const weights *w,
                                float *values)
{
    int64_t part = w->count / w->parts, all = part * w->all_parts, skipped = 0;
    if (w->all_parts != w->parts) skipped = part * ranks_share(w->all_parts, r->size, r->rank);
    get_floats(from + 4 * skipped, values, w->count);
    return from + 4 * all;
}

static int take(trainer *t, const uint8_t *from)
{
    trainer_state *s = &t->state;
    s->step = (int64_t)get(from, 8);
    s->random = get(from + 8, 8);
    s->bits[MOE] = real_of(get(from + 16, 8));
    s->bits[DENSE] = real_of(get(from + 24, 8));
    s->balance_loss = real_of(get(from + 32, 8));
    from += 8 * STATE_WORDS;
    for (int i = 0; i < MODELS; i++) {
        for (int j = 0; j < t->models[i].parameter_count; j++) {
            weights *w = &t->models[i].parameters[j];
            from = get_array(t->ranks, from, w, w->data);
            from = get_array(t->ranks, from, w, w->mean);
            from = get_array(t->ranks, from, w, w->square);
        }
        if (model_place(&t->models[i]) != 0) return -1;
    }
    return 0;
}

static int check_step(const trainer *t, const char *path, const uint8_t *bytes)
{
    uint64_t step = get(bytes + HEAD_BYTES + 8 * FIELDS, 8);
    if (step <= (uint64_t)t->options->steps) return 0;
    fprintf(stderr, "%s: step %llu is after the last, %lld\n", path, (unsigned long long)step,
            (long long)t->options->steps);
    return -1;
}

/* The bytes of a file that this run can go on from; NULL with a message on stderr. */
static uint8_t *read_checked(const trainer *t, const char *path)
{
    size_t size;
    uint8_t *bytes = read_file(path, &size);
    if (!bytes) return NULL;
    if (check_whole(path, bytes, size) == 0 && check_fields(t, path, bytes, size) == 0 &&
        check_step(t, path, bytes) == 0)
        return bytes;
    free(bytes);
    return NULL;
}

int checkpoint_load(trainer *t, const char *path)
{
    int first = t->ranks->rank == 0;
    size_t size = file_size(t);
    uint8_t *bytes = first ? read_checked(t, path) : NULL;
    if (ranks_agree(t->ranks, first && !bytes ? -1 : 0) != 0) return -1;
    if (!bytes) bytes = malloc(size);
    int bad = bytes ? ranks_broadcast(t->ranks, bytes, (int64_t)size) : out_of_memory(path, size);
    if (bad == 0) bad = take(t, bytes + HEAD_BYTES + 8 * FIELDS);
    free(bytes);
    return bad;
}
