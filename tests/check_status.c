/* check_status.c - status.h, version.h and the rules of structs that grow: names and messages, the
 * thread's last error, every size a caller's struct may have, and the table of constants against
 * the text of the headers. MOE_SOURCE_DIR is the root of the source tree. */
#include "internal.h"

#include "support/suite.h"

#include <check.h>
#include <dirent.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef MOE_SOURCE_DIR
#define MOE_SOURCE_DIR "."
#endif

/* ---- status and message ---------------------------------------------------------------------- */

static const struct {
    int32_t number;
    const char *name;
} STATUSES[] = {
    {0, "MOE_OK"},
    {-1, "MOE_ERROR_INVALID_ARGUMENT"},
    {-2, "MOE_ERROR_OUT_OF_MEMORY"},
    {-3, "MOE_ERROR_INVALID_STATE"},
    {-4, "MOE_ERROR_NOT_SUPPORTED"},
    {-5, "MOE_ERROR_STRUCT_SIZE"},
    {-6, "MOE_ERROR_STRUCT_TOO_OLD"},
    {-7, "MOE_ERROR_STRUCT_TOO_NEW"},
    {-8, "MOE_ERROR_OVERFLOW"},
    {-9, "MOE_ERROR_BUFFER_TOO_SMALL"},
    {-10, "MOE_ERROR_CORRUPT_DATA"},
    {-11, "MOE_ERROR_CALLBACK"},
    {-12, "MOE_ERROR_SYSTEM"},
    {-13, "MOE_ERROR_DEVICE"},
    {-14, "MOE_ERROR_TRANSPORT"},
    {-15, "MOE_ERROR_TIMEOUT"},
    {-16, "MOE_ERROR_INTERNAL"},
    {-17, "MOE_ERROR_WRONG_GRADIENT"},
};

/* The numbers are permanent: they are written out here once more. */
START_TEST(test_status_numbers_are_permanent)
{
    size_t count = sizeof STATUSES / sizeof *STATUSES;
    ck_assert_int_eq(MOE_STATUS_LAST, STATUSES[count - 1].number);
    for (size_t i = 0; i < count; i++) {
        int64_t value = 1;
        ck_assert_str_eq(moe_status_name(STATUSES[i].number), STATUSES[i].name);
        ck_assert_int_eq(moe_constant(&value, STATUSES[i].name), MOE_OK);
        ck_assert_int_eq(value, STATUSES[i].number);
    }
}
END_TEST

START_TEST(test_status_texts_differ)
{
    for (int32_t a = MOE_STATUS_LAST; a <= 0; a++) {
        ck_assert(moe_status_text(a)[0] != 0);
        ck_assert_str_ne(moe_status_text(a), "unknown status");
        for (int32_t b = MOE_STATUS_LAST; b < a; b++)
            ck_assert_str_ne(moe_status_text(a), moe_status_text(b));
    }
}
END_TEST

START_TEST(test_status_unknown)
{
    const int32_t unknown[] = {1, MOE_STATUS_LAST - 1, INT32_MIN, INT32_MAX};
    for (int i = 0; i < 4; i++) {
        ck_assert_str_eq(moe_status_name(unknown[i]), "unknown status");
        ck_assert_str_eq(moe_status_text(unknown[i]), "unknown status");
    }
}
END_TEST

START_TEST(test_error_message_life)
{
    int64_t value;
    moe_clear_last_error(); /* another case of this thread may have failed a call */
    ck_assert_str_eq(moe_last_error(), "");
    ck_assert_int_eq(moe_constant(NULL, "MOE_OK"), MOE_ERROR_INVALID_ARGUMENT);
    ck_assert_str_eq(moe_last_error(), "moe_constant: value is NULL");
    ck_assert_int_eq(moe_constant(&value, "MOE_OK"), MOE_OK); /* a success leaves it alone */
    ck_assert_str_eq(moe_last_error(), "moe_constant: value is NULL");
    ck_assert_int_eq(moe_constant(&value, NULL), MOE_ERROR_INVALID_ARGUMENT);
    ck_assert_str_eq(moe_last_error(), "moe_constant: name is NULL");
    moe_clear_last_error();
    ck_assert_str_eq(moe_last_error(), "");
}
END_TEST

static void *fail_in_thread(void *argument)
{
    char *before = argument;
    (void)snprintf(before, 64, "[%s]", moe_last_error());
    (void)moe__fail(MOE_ERROR_INTERNAL, "there", "number %d", 7);
    return strcmp(moe_last_error(), "there: number 7") == 0 ? argument : NULL;
}

START_TEST(test_error_message_is_of_the_thread)
{
    pthread_t thread;
    char before[64];
    void *good = NULL;
    ck_assert_int_eq(moe__fail(MOE_ERROR_TIMEOUT, "here", "%s", "first"), MOE_ERROR_TIMEOUT);
    ck_assert_int_eq(pthread_create(&thread, NULL, fail_in_thread, before), 0);
    ck_assert_int_eq(pthread_join(thread, &good), 0);
    ck_assert_ptr_nonnull(good);
    ck_assert_str_eq(before, "[]");
    ck_assert_str_eq(moe_last_error(), "here: first");
}
END_TEST

START_TEST(test_error_message_long_and_odd)
{
    char text[2000];
    memset(text, 'x', sizeof text);
    text[sizeof text - 1] = 0;
    (void)moe__fail(MOE_ERROR_INTERNAL, "f", "%s", text);
    ck_assert_uint_eq(strlen(moe_last_error()), 511);
    (void)moe__fail(MOE_ERROR_INTERNAL, text, "%s", text);
    ck_assert_uint_eq(strlen(moe_last_error()), 511);
    (void)moe__fail(MOE_ERROR_INTERNAL, "f", "a\nb\tc");
    ck_assert_str_eq(moe_last_error(), "f: a b c");
    (void)moe__fail(MOE_ERROR_INTERNAL, "g", "[%s]", moe_last_error());
    ck_assert_str_eq(moe_last_error(), "g: [f: a b c]");
}
END_TEST

/* ---- structs --------------------------------------------------------------------------------- */

/* A struct of two releases: `a` and `b` were in the first. */
typedef struct grown {
    uint64_t struct_size;
    int64_t a;
    double b;
    int64_t c;
    const char *d;
} grown;

enum { GROWN_FIRST = 24, GROWN_SIZE = 40 };

static void grown_defaults(void *instance)
{
    grown *g = instance;
    g->a = 1;
    g->b = 2.0;
    g->c = 3;
    g->d = "four";
}

static const moe__struct_info GROWN = {"grown", sizeof(grown), GROWN_FIRST, grown_defaults};

/* Room for a struct of a release to come. */
typedef union room {
    grown g;
    unsigned char bytes[256];
} room;

static int all_bytes(const void *memory, size_t from, size_t to, unsigned char value)
{
    for (size_t i = from; i < to; i++)
        if (((const unsigned char *)memory)[i] != value) return 0;
    return 1;
}

START_TEST(test_struct_init_every_size)
{
    for (size_t size = 0; size <= sizeof(room); size++) {
        room r;
        memset(&r, 0xaa, sizeof r);
        moe_status status = moe__struct_init(&GROWN, &r, size, "init");
        if (size < GROWN_FIRST) {
            ck_assert_int_eq(status, size < 8 ? MOE_ERROR_STRUCT_SIZE : MOE_ERROR_STRUCT_TOO_OLD);
            ck_assert(all_bytes(&r, 0, sizeof r, 0xaa));
            continue;
        }
        ck_assert_int_eq(status, MOE_OK);
        ck_assert_uint_eq(r.g.struct_size, size);
        ck_assert_int_eq(r.g.a, 1);
        ck_assert(r.g.b == 2.0);
        if (size >= 32) ck_assert_int_eq(r.g.c, 3);
        if (size >= GROWN_SIZE) ck_assert_str_eq(r.g.d, "four");
        if (size > GROWN_SIZE) ck_assert(all_bytes(&r, GROWN_SIZE, size, 0));
        ck_assert(all_bytes(&r, size, sizeof r, 0xaa));
    }
}
END_TEST

START_TEST(test_struct_init_refused)
{
    room r;
    memset(&r, 0xaa, sizeof r);
    ck_assert_int_eq(moe__struct_init(&GROWN, NULL, GROWN_SIZE, "init"),
                     MOE_ERROR_INVALID_ARGUMENT);
    ck_assert_str_eq(moe_last_error(), "init: grown is NULL");
    ck_assert_int_eq(moe__struct_init(&GROWN, &r, ((size_t)1 << 20) + 1, "init"),
                     MOE_ERROR_STRUCT_SIZE);
    ck_assert_int_eq(moe__struct_init(&GROWN, &r, SIZE_MAX, "init"), MOE_ERROR_STRUCT_SIZE);
    ck_assert(all_bytes(&r, 0, sizeof r, 0xaa));
    void *large = malloc((size_t)1 << 20);
    ck_assert_ptr_nonnull(large);
    ck_assert_int_eq(moe__struct_init(&GROWN, large, (size_t)1 << 20, "init"), MOE_OK);
    free(large);
}
END_TEST

/* What an older program leaves out keeps its default. */
START_TEST(test_struct_read_shorter)
{
    room from;
    grown known;
    memset(&from, 0xaa, sizeof from);
    ck_assert_int_eq(moe__struct_init(&GROWN, &from, GROWN_FIRST, "init"), MOE_OK);
    from.g.a = 10;
    ck_assert_int_eq(moe__struct_read(&GROWN, &known, &from, false, "read"), MOE_OK);
    ck_assert_uint_eq(known.struct_size, GROWN_SIZE);
    ck_assert_int_eq(known.a, 10);
    ck_assert(known.b == 2.0);
    ck_assert_int_eq(known.c, 3);
    ck_assert_str_eq(known.d, "four");
}
END_TEST

START_TEST(test_struct_read_longer)
{
    room from;
    grown known;
    for (size_t bad = GROWN_SIZE; bad < sizeof from; bad++) {
        char expected[160];
        ck_assert_int_eq(moe__struct_init(&GROWN, &from, sizeof from, "init"), MOE_OK);
        from.g.d = "five";
        ck_assert_int_eq(moe__struct_read(&GROWN, &known, &from, false, "read"), MOE_OK);
        ck_assert_str_eq(known.d, "five");
        ck_assert_uint_eq(known.struct_size, GROWN_SIZE);
        from.bytes[bad] = 1;
        memset(&known, 0xaa, sizeof known);
        ck_assert_int_eq(moe__struct_read(&GROWN, &known, &from, false, "read"),
                         MOE_ERROR_STRUCT_TOO_NEW);
        (void)snprintf(
            expected, sizeof expected,
            "read: grown has struct_size 256, this library knows 40, and byte %zu is not 0", bad);
        ck_assert_str_eq(moe_last_error(), expected);
    }
}
END_TEST

START_TEST(test_struct_read_refused)
{
    room from;
    grown known;
    memset(&from, 0, sizeof from);
    ck_assert_int_eq(moe__struct_read(&GROWN, &known, &from, false, "read"), MOE_ERROR_STRUCT_SIZE);
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "struct_size 0"));
    ck_assert_int_eq(moe__struct_read(&GROWN, &known, NULL, false, "read"),
                     MOE_ERROR_INVALID_ARGUMENT);
    ck_assert_int_eq(moe__struct_read(&GROWN, &known, NULL, true, "read"), MOE_OK);
    ck_assert_int_eq(known.c, 3);
    ck_assert_uint_eq(known.struct_size, GROWN_SIZE);
    from.g.struct_size = 7;
    ck_assert_int_eq(moe__struct_read(&GROWN, &known, &from, true, "read"), MOE_ERROR_STRUCT_SIZE);
    from.g.struct_size = 8;
    ck_assert_int_eq(moe__struct_read(&GROWN, &known, &from, true, "read"),
                     MOE_ERROR_STRUCT_TOO_OLD);
    ck_assert_str_eq(moe_last_error(), "read: grown has struct_size 8, the first release had 24");
    from.g.struct_size = GROWN_FIRST - 1;
    ck_assert_int_eq(moe__struct_read(&GROWN, &known, &from, true, "read"),
                     MOE_ERROR_STRUCT_TOO_OLD);
    from.g.struct_size = ((uint64_t)1 << 20) + 1;
    ck_assert_int_eq(moe__struct_read(&GROWN, &known, &from, true, "read"), MOE_ERROR_STRUCT_SIZE);
    from.g.struct_size = UINT64_MAX;
    ck_assert_int_eq(moe__struct_read(&GROWN, &known, &from, true, "read"), MOE_ERROR_STRUCT_SIZE);
}
END_TEST

START_TEST(test_struct_write_every_size)
{
    const grown known = {GROWN_SIZE, 10, 20.0, 30, "forty"};
    for (size_t size = GROWN_FIRST; size <= sizeof(room); size++) {
        room to;
        memset(&to, 0xaa, sizeof to);
        to.g.struct_size = size;
        ck_assert_int_eq(moe__struct_check_out(&GROWN, &to, "out"), MOE_OK);
        moe__struct_write(&GROWN, &to, &known);
        ck_assert_uint_eq(to.g.struct_size, size);
        ck_assert_int_eq(to.g.a, 10);
        if (size >= 32) ck_assert_int_eq(to.g.c, 30);
        if (size >= GROWN_SIZE) ck_assert_str_eq(to.g.d, "forty");
        if (size > GROWN_SIZE) ck_assert(all_bytes(&to, GROWN_SIZE, size, 0));
        ck_assert(all_bytes(&to, size, sizeof to, 0xaa));
    }
}
END_TEST

START_TEST(test_struct_check_out_refused)
{
    room to;
    memset(&to, 0, sizeof to);
    ck_assert_int_eq(moe__struct_check_out(&GROWN, NULL, "out"), MOE_ERROR_INVALID_ARGUMENT);
    ck_assert_int_eq(moe__struct_check_out(&GROWN, &to, "out"), MOE_ERROR_STRUCT_SIZE);
    to.g.struct_size = GROWN_FIRST - 1;
    ck_assert_int_eq(moe__struct_check_out(&GROWN, &to, "out"), MOE_ERROR_STRUCT_TOO_OLD);
}
END_TEST

/* The library's own structs fit the buffer that struct.c writes defaults into. */
START_TEST(test_struct_infos)
{
    static const moe__struct_info *const infos[] = {&moe__context_config_info,
                                                    &moe__gate_config_info,
                                                    &moe__experts_config_info,
                                                    &moe__layer_config_info,
                                                    &moe__pass_config_info,
                                                    &moe__binding_info,
                                                    &moe__forward_args_info,
                                                    &moe__parameter_record_info,
                                                    &moe__backward_args_info,
                                                    &moe__losses_info,
                                                    &moe__stats_info,
                                                    &moe__tensor_view_info,
                                                    &moe__plan_args_info,
                                                    &moe__plan_view_info,
                                                    &moe__rows_args_info,
                                                    &moe__cost_query_info,
                                                    &moe__cost_info};
    for (size_t i = 0; i < sizeof infos / sizeof *infos; i++) {
        uint64_t memory[128];
        ck_assert_uint_le(infos[i]->first_size, infos[i]->size);
        ck_assert_uint_eq(infos[i]->size % 8, 0);
        ck_assert_int_eq(moe__struct_init(infos[i], memory, infos[i]->size, "init"), MOE_OK);
        ck_assert_uint_eq(memory[0], infos[i]->size);
    }
    static const moe__struct_info huge = {"huge", 2048, 8, grown_defaults};
    static char memory[4096];
    ck_assert_int_eq(moe__struct_init(&huge, memory, sizeof memory, "init"), MOE_ERROR_INTERNAL);
}
END_TEST

/* ---- version and constants ------------------------------------------------------------------- */

START_TEST(test_version)
{
    char text[32];
    ck_assert_int_eq(moe_version_number(), MOE_VERSION_NUMBER);
    ck_assert_int_eq(MOE_VERSION_NUMBER,
                     MOE_VERSION_MAJOR * 10000 + MOE_VERSION_MINOR * 100 + MOE_VERSION_PATCH);
    (void)snprintf(text, sizeof text, "%d.%d.%d", MOE_VERSION_MAJOR, MOE_VERSION_MINOR,
                   MOE_VERSION_PATCH);
    ck_assert_str_eq(moe_version_string(), text);
}
END_TEST

START_TEST(test_constant_unknown)
{
    const char *names[] = {"",        "MOE_",    "MOE_NOTHING",      "moe_ok",
                           "MOE_OK ", " MOE_OK", "MOE_VERSION_MAJOR"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        int64_t value = 77;
        ck_assert_int_eq(moe_constant(&value, names[i]), MOE_ERROR_INVALID_ARGUMENT);
        ck_assert_int_eq(value, 77);
        ck_assert_ptr_nonnull(strstr(moe_last_error(), names[i]));
    }
}
END_TEST

START_TEST(test_constant_values)
{
    int64_t value = 0;
    ck_assert_int_eq(moe_constant(&value, "MOE_GATE_NOISY_TOP_K"), MOE_OK);
    ck_assert_int_eq(value, MOE_GATE_NOISY_TOP_K);
    ck_assert_int_eq(moe_constant(&value, "MOE_INIT_DEFAULT"), MOE_OK);
    ck_assert(value == (int64_t)MOE_INIT_DEFAULT && (double)value == MOE_INIT_DEFAULT);
}
END_TEST

/* A header's text with comments and preprocessor lines blanked; the caller frees it. */
static char *read_header(const char *name)
{
    char path[4096];
    long size;
    (void)snprintf(path, sizeof path, "%s/include/moe/%s", MOE_SOURCE_DIR, name);
    FILE *file = fopen(path, "rb");
    ck_assert_msg(file != NULL, "cannot read %s", path);
    ck_assert_int_eq(fseek(file, 0, SEEK_END), 0);
    size = ftell(file);
    rewind(file);
    char *text = calloc((size_t)size + 1, 1);
    ck_assert_ptr_nonnull(text);
    ck_assert_uint_eq(fread(text, 1, (size_t)size, file), (size_t)size);
    (void)fclose(file);
    for (char *at = text; (at = strstr(at, "/*")) != NULL;) {
        char *end = strstr(at, "*/");
        ck_assert_ptr_nonnull(end);
        memset(at, ' ', (size_t)(end + 2 - at));
    }
    for (char *line = text; *line;) {
        char *end = line + strcspn(line, "\n");
        while (*line == '#' && *end && end[-1] == '\\') end += 1 + strcspn(end + 1, "\n");
        if (*line == '#') memset(line, ' ', (size_t)(end - line));
        line = *end ? end + 1 : end;
    }
    return text;
}

/* Every enumerator in an enum's body must be known with the value written there; how many. */
static int check_enum(const char *header, const char *body, const char *end)
{
    int count = 0;
    for (const char *at = body; at < end;) {
        char name[128];
        size_t length = strspn(at, "ABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789");
        if (length == 0 || length >= sizeof name) {
            at++;
            continue;
        }
        memcpy(name, at, length);
        name[length] = 0;
        at += length;
        if (strncmp(name, "MOE_", 4) != 0 || name[4] == '_') continue; /* a macro of the list */
        if (*at == '(') continue;
        int64_t value = 0;
        ck_assert_msg(moe_constant(&value, name) == MOE_OK, "%s of %s is not known", name, header);
        at += strspn(at, " ");
        ck_assert_msg(*at == '=', "%s of %s has no value", name, header);
        char *stop;
        long long written = strtoll(at + 1, &stop, 0);
        ck_assert_msg(stop != at + 1 && written == value, "%s of %s is %lld, not %lld", name,
                      header, written, (long long)value);
        at = stop;
        count++;
    }
    return count;
}

START_TEST(test_constants_are_complete)
{
    int count = 0;
    DIR *directory = opendir(MOE_SOURCE_DIR "/include/moe");
    ck_assert_msg(directory != NULL, "cannot open %s/include/moe", MOE_SOURCE_DIR);
    for (struct dirent *entry; (entry = readdir(directory)) != NULL;) {
        const char *header = entry->d_name, *dot = strrchr(header, '.');
        if (!dot || strcmp(dot, ".h") != 0) continue;
        char *text = read_header(header);
        for (char *at = text; (at = strstr(at, "enum")) != NULL;) {
            at += 4;
            char *open = at + strspn(at, " \n");
            if (*open != '{') continue;
            char *close = strchr(open, '}');
            ck_assert_ptr_nonnull(close);
            count += check_enum(header, open, close);
        }
        free(text);
    }
    (void)closedir(directory);
    ck_assert_msg(count > 80, "only %d enumerators found in %s/include/moe", count, MOE_SOURCE_DIR);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("status");
    TCase *status = add_case(suite, "status"), *structs = add_case(suite, "structs"),
          *constants = add_case(suite, "constants");
    tcase_add_test(status, test_status_numbers_are_permanent);
    tcase_add_test(status, test_status_texts_differ);
    tcase_add_test(status, test_status_unknown);
    tcase_add_test(status, test_error_message_life);
    tcase_add_test(status, test_error_message_is_of_the_thread);
    tcase_add_test(status, test_error_message_long_and_odd);
    tcase_add_test(structs, test_struct_init_every_size);
    tcase_add_test(structs, test_struct_init_refused);
    tcase_add_test(structs, test_struct_read_shorter);
    tcase_add_test(structs, test_struct_read_longer);
    tcase_add_test(structs, test_struct_read_refused);
    tcase_add_test(structs, test_struct_write_every_size);
    tcase_add_test(structs, test_struct_check_out_refused);
    tcase_add_test(structs, test_struct_infos);
    tcase_add_test(constants, test_version);
    tcase_add_test(constants, test_constant_unknown);
    tcase_add_test(constants, test_constant_values);
    tcase_add_test(constants, test_constants_are_complete);
    return run_suite(suite, 1);
}
