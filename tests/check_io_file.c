/* check_io_file.c - moe_file: what a safetensors file says is read, converted and found by name, in
 * one file or several; and whatever else it may say is refused with the reason, with nothing
 * written. */
#include "support/files.h"
#include "support/layer_case.h"
#include "support/suite.h"

#include <moe/io.h>

#include <check.h>
#include <math.h>
#include <sys/stat.h>

static moe_file *must_open(const char *path)
{
    moe_file *file = NULL;
    MUST(moe_file_open(&file, path));
    ck_assert_ptr_nonnull(file);
    return file;
}

static moe_file_record entry(const moe_file *file, const char *name)
{
    moe_file_record r;
    MUST(moe_file_record_init(&r, sizeof r));
    MUST(moe_file_entry(file, moe_file_find(file, name), &r));
    return r;
}

/* ---- good files ------------------------------------------------------------------------------ */

START_TEST(test_file_lists_and_reads)
{
    const char *path = files_path("a.safetensors");
    const float x[6] = {1, -2, 3.5f, 0, -0.0f, 1e30f};
    const int64_t n[2] = {5, -7};
    unsigned char data[24 + 16 + 2];
    float y[6] = {0};
    int64_t m[2];
    int32_t narrow[2];
    double wide[2];
    const char *key = NULL, *value = NULL;
    memcpy(data, x, 24), memcpy(data + 24, n, 16), memcpy(data + 40, "\x80\x3f", 2);
    files_tensors(path,
                  "{\"__metadata__\":{\"b\":\"2\",\"a\":\"one \\u00e9\"},"
                  "\"n\":{\"dtype\":\"I64\",\"shape\":[2],\"data_offsets\":[24,40]},"
                  "\"x\":{\"shape\":[3,2],\"data_offsets\":[0,24],\"dtype\":\"F32\"},"
                  "\"s\":{\"dtype\":\"BF16\",\"shape\":[],\"data_offsets\":[40,42]},"
                  "\"empty\":{\"dtype\":\"F32\",\"shape\":[0,7],\"data_offsets\":[42,42]}}   ",
                  data, sizeof data);
    moe_file *file = must_open(path);
    ck_assert_int_eq(moe_file_count(file), 4);
    ck_assert_int_eq(moe_file_find(file, "x"), 3);
    ck_assert_int_eq(moe_file_find(file, "y"), -1);
    moe_file_record r = entry(file, "x");
    ck_assert_str_eq(r.name, "x");
    ck_assert_str_eq(r.path, path);
    ck_assert(r.dims == 2 && r.shape[0] == 3 && r.shape[1] == 2 && r.shape[2] == 1);
    ck_assert(r.dtype == MOE_DTYPE_F32 && r.bytes == 24 && r.element_count == 6);
    MUST(moe_file_read(file, 3, y, 0, MOE_FILE_ALL, MOE_DTYPE_F32));
    ck_assert_mem_eq(x, y, sizeof x);
    MUST(moe_file_read(file, 3, wide, 1, 1, MOE_DTYPE_F64));
    ck_assert(wide[0] == 3.5 && wide[1] == 0);
    MUST(moe_file_read(file, 1, m, 0, 2, MOE_DTYPE_I64));
    MUST(moe_file_read(file, 1, narrow, 0, 2, MOE_DTYPE_I32));
    ck_assert(m[0] == 5 && m[1] == -7 && narrow[0] == 5 && narrow[1] == -7);
    r = entry(file, "s");
    ck_assert(r.dims == 0 && r.element_count == 1);
    MUST(moe_file_read(file, 2, y, 0, MOE_FILE_ALL, MOE_DTYPE_F32));
    ck_assert(y[0] == 1);
    MUST(moe_file_read(file, 0, NULL, 0, MOE_FILE_ALL, MOE_DTYPE_F32));
    ck_assert_int_eq(moe_file_metadata_count(file), 2);
    MUST(moe_file_metadata(file, 0, &key, &value));
    ck_assert_str_eq(key, "a");
    ck_assert_str_eq(value, "one \xc3\xa9");
    ck_assert_str_eq(moe_file_metadata_find(file, "b"), "2");
    ck_assert_ptr_null(moe_file_metadata_find(file, "c"));
    moe_file_close(file);
}
END_TEST

START_TEST(test_file_calls_refuse)
{
    const char *path = files_path("a.safetensors");
    const int64_t n[2] = {1, (int64_t)1 << 40};
    int32_t narrow[2];
    float y[2];
    moe_file *file = NULL;
    moe_file_record r;
    const char *key = NULL, *value = NULL;
    files_tensors(path, "{\"n\":{\"dtype\":\"I64\",\"shape\":[2],\"data_offsets\":[0,16]}}", n, 16);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_file_open(NULL, path));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_file_open(&file, NULL));
    REFUSED(MOE_ERROR_SYSTEM, moe_file_open(&file, files_path("none")));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "No such file"));
    REFUSED(MOE_ERROR_SYSTEM, moe_file_open(&file, "/dev/null"));
    ck_assert_ptr_null(file);
    file = must_open(path);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_file_read(file, 1, y, 0, 1, MOE_DTYPE_I64));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_file_read(file, 0, y, 1, 2, MOE_DTYPE_I64));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_file_read(file, 0, y, -1, 1, MOE_DTYPE_I64));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_file_read(file, 0, y, 0, -2, MOE_DTYPE_I64));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_file_read(file, 0, NULL, 0, 1, MOE_DTYPE_I64));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_file_read(NULL, 0, y, 0, 1, MOE_DTYPE_I64));
    REFUSED(MOE_ERROR_NOT_SUPPORTED, moe_file_read(file, 0, y, 0, 1, MOE_DTYPE_F32));
    REFUSED(MOE_ERROR_NOT_SUPPORTED, moe_file_read(file, 0, y, 0, 1, 99));
    REFUSED(MOE_ERROR_OVERFLOW, moe_file_read(file, 0, narrow, 0, 2, MOE_DTYPE_I32));
    MUST(moe_file_record_init(&r, sizeof r));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_file_entry(file, -1, &r));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_file_entry(file, 0, NULL));
    r.struct_size = 4;
    REFUSED(MOE_ERROR_STRUCT_SIZE, moe_file_entry(file, 0, &r));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_file_metadata(file, 0, &key, &value));
    ck_assert_int_eq(moe_file_count(NULL), 0);
    ck_assert_int_eq(moe_file_find(NULL, "n"), -1);
    ck_assert_int_eq(moe_file_metadata_count(NULL), 0);
    ck_assert_int_eq(truncate(path, 70), 0); /* since it was opened */
    REFUSED(MOE_ERROR_SYSTEM, moe_file_read(file, 0, y, 0, 2, MOE_DTYPE_I64));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "ends at byte 70"));
    moe_file_close(file), moe_file_close(NULL);
}
END_TEST

/* ---- conversion ------------------------------------------------------------------------------ */

/* Every number of 16 bits through f32 and f64 and back. */
START_TEST(test_file_converts_every_small_number)
{
    static uint16_t small[65536], back[65536];
    static float f[65536];
    static double d[65536];
    const char *names[2] = {"BF16", "F16"};
    const int32_t dtypes[2] = {MOE_DTYPE_BF16, MOE_DTYPE_F16};
    char header[128];
    for (int i = 0; i < 65536; i++) small[i] = (uint16_t)i;
    for (int k = 0; k < 2; k++) {
        (void)snprintf(header, sizeof header,
                       "{\"x\":{\"dtype\":\"%s\",\"shape\":[65536],\"data_offsets\":[0,131072]}}",
                       names[k]);
        files_tensors(files_path("h.safetensors"), header, small, sizeof small);
        moe_file *file = must_open(files_path("h.safetensors"));
        MUST(moe_file_read(file, 0, f, 0, MOE_FILE_ALL, MOE_DTYPE_F32));
        MUST(moe_file_read(file, 0, d, 0, MOE_FILE_ALL, MOE_DTYPE_F64));
        moe_file_close(file);
        int exponent = k ? 5 : 8, fraction = k ? 10 : 7, bias = k ? 15 : 127;
        for (int i = 0; i < 65536; i++) {
            int e = i >> fraction & ((1 << exponent) - 1), m = i & ((1 << fraction) - 1);
            double want = e ? ldexp(1 + ldexp(m, -fraction), e - bias)
                            : ldexp(m, 1 - bias - fraction);
            if (e == (1 << exponent) - 1) want = m ? (double)NAN : (double)INFINITY;
            if (i >> 15) want = -want;
            ck_assert(isnan(want) ? isnan(d[i]) && isnan(f[i])
                                  : d[i] == want && (double)f[i] == want);
        }
        for (int from = 0; from < 2; from++) {
            const void *data = from ? (const void *)d : (const void *)f;
            (void)snprintf(header, sizeof header,
                           "{\"x\":{\"dtype\":\"%s\",\"shape\":[65536],\"data_offsets\":[0,%d]}}",
                           from ? "F64" : "F32", from ? 524288 : 262144);
            files_tensors(files_path("w.safetensors"), header, data, from ? sizeof d : sizeof f);
            file = must_open(files_path("w.safetensors"));
            MUST(moe_file_read(file, 0, back, 0, MOE_FILE_ALL, dtypes[k]));
            moe_file_close(file);
            for (int i = 0; i < 65536; i++) ck_assert(isnan(d[i]) || back[i] == small[i]);
        }
    }
}
END_TEST

/* Value of a small number. */
static double value_of(uint16_t h, int k)
{
    int fraction = k ? 10 : 7, exponent = k ? 5 : 8, bias = k ? 15 : 127;
    int e = h >> fraction & ((1 << exponent) - 1), m = h & ((1 << fraction) - 1);
    double x = e ? ldexp(1 + ldexp(m, -fraction), e - bias) : ldexp(m, 1 - bias - fraction);
    return h >> 15 ? -x : x; /* the least infinity as the number it would be */
}

/* Drawn numbers go to the nearest of 16 bits, ties to the even one: found by looking at both
 * neighbours. */
START_TEST(test_file_rounds_to_nearest_even)
{
    enum { N = 20000 };
    static double d[N];
    static float f[N];
    static uint16_t h[N];
    char header[128];
    uint64_t state = 7;
    for (int k = 0; k < 2; k++) {
        for (int i = 0; i < N; i++) {
            int span = k ? 28 : 140;
            double x = ldexp(1 + random_uniform(&state),
                             (int)(random_uniform(&state) * span) - (k ? 27 : 136));
            if (i % 5 == 0) { /* half way between two */
                uint16_t low = (uint16_t)(random_uniform(&state) * (k ? 31743 : 32639));
                x = (value_of(low, k) + value_of((uint16_t)(low + 1), k)) / 2;
            }
            d[i] = i % 3 ? x : -x;
            f[i] = (float)d[i];
        }
        for (int from = 0; from < 2; from++) {
            (void)snprintf(header, sizeof header,
                           "{\"x\":{\"dtype\":\"%s\",\"shape\":[%d],\"data_offsets\":[0,%d]}}",
                           from ? "F64" : "F32", N, from ? 8 * N : 4 * N);
            files_tensors(files_path("r.safetensors"), header, from ? (const void *)d : f,
                          from ? sizeof d : sizeof f);
            moe_file *file = must_open(files_path("r.safetensors"));
            MUST(moe_file_read(file, 0, h, 0, N, k ? MOE_DTYPE_F16 : MOE_DTYPE_BF16));
            moe_file_close(file);
            for (int i = 0; i < N; i++) {
                double x = from ? d[i] : (double)f[i], at = fabs(x - value_of(h[i], k));
                uint16_t up = (uint16_t)(h[i] + 1), down = (uint16_t)(h[i] - 1);
                int zero = (h[i] & 0x7fff) == 0;
                double above = fabs(x - value_of(up, k));
                double below = zero ? (double)INFINITY : fabs(x - value_of(down, k));
                ck_assert_msg(at <= above && at <= below && signbit(x) == h[i] >> 15,
                              "%a became %04x", x, h[i]);
                ck_assert_msg((at < above && at < below) || h[i] % 2 == 0, "a tie: %a, %04x", x,
                              h[i]);
            }
        }
    }
}
END_TEST

/* ---- hostile files --------------------------------------------------------------------------- */

typedef struct hostile {
    const char *header;
    int bytes; /* of data */
    const char *why;
} hostile;

#define T(name, dtype, shape, begin, end)                                                          \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":[" shape "],\"data_offsets\":[" begin "," end \
    "]}"

static const hostile HOSTILE[] = {
    {"{" T("x", "F32", "2", "0", "8") "}", 7, "ends at byte 8 of 7"},
    {"{" T("x", "F32", "2", "0", "8") "}", 9, "9 after its header"},
    {"{" T("x", "F32", "2", "0", "8"), 8, "JSON"},
    {"[" T("x", "F32", "2", "0", "8") "]", 8, "does not begin with {"},
    {" {" T("x", "F32", "2", "0", "8") "}", 8, "does not begin with {"},
    {"{" T("x", "F32", "2", "0", "8") "} x", 8, "JSON"},
    {"{" T("x", "F32", "2", "0", "8") "," T("x", "F32", "2", "0", "8") "}", 8, "duplicate"},
    {"{" T("x", "F32", "2", "0", "8") "," T("x", "F32", "1", "8", "12") "}", 12, "duplicate"},
    {"{\"x\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4,
     "duplicate"},
    {"{" T("x", "F33", "2", "0", "8") "}", 8, "unknown dtype F33"},
    {"{" T("x", "f32", "2", "0", "8") "}", 8, "unknown dtype f32"},
    {"{" T("x", "F4", "16", "0", "8") "}", 8, "unknown dtype F4"},
    {"{" T("x", "F32", "4611686018427387904,4", "0", "8") "}", 8, "does not fit in 63 bits"},
    {"{" T("x", "F32", "9223372036854775807", "0", "8") "}", 8, "does not fit in 63 bits"},
    {"{" T("x", "F32", "0,4611686018427387904,4", "0", "0") "}", 0, "does not fit in 63 bits"},
    {"{" T("x", "F32", "18446744073709551618", "0", "8") "}", 8, "JSON"},
    {"{" T("x", "F32", "-2", "0", "8") "}", 8, "is no size: -2"},
    {"{" T("x", "F32", "-1,-2", "0", "8") "}", 8, "is no size: -1"},
    {"{" T("x", "F32", "2.0", "0", "8") "}", 8, "is no size"},
    {"{" T("x", "F32", "\"2\"", "0", "8") "}", 8, "is no size"},
    {"{" T("x", "F32", "[2]", "0", "8") "}", 8, "nested deeper than 3"},
    {"{" T("x", "F32", "1,1,1,1,1,1,1,1,2", "0", "8") "}", 8, "9 dimensions"},
    {"{" T("x", "F32", "1,1,1,1,1,1,1,1,1,1,1,2", "0", "8") "}", 8, "more than 9 elements"},
    {"{" T("x", "F32", "2", "8", "0") "}", 8, "are 8 and 0"},
    {"{" T("x", "F32", "2", "-8", "0") "}", 8, "are -8 and 0"},
    {"{" T("x", "F32", "2", "0", "12") "}", 8, "ends at byte 12 of 8"},
    {"{" T("x", "F32", "2", "9223372036854775800", "9223372036854775807") "}", 8, "of 8 bytes"},
    {"{" T("x", "F32", "2", "0", "4") "}", 4, "4 bytes by its offsets, 8 by its shape"},
    {"{" T("x", "BF16", "2", "0", "8") "}", 8, "8 bytes by its offsets, 4 by its shape"},
    {"{" T("x", "F32", "2", "0", "8") "," T("y", "F32", "2", "4", "12") "}", 12, "inside x"},
    {"{" T("x", "F32", "2", "0", "8") "," T("y", "F32", "2", "0", "8") "}", 8, "inside"},
    {"{" T("x", "F32", "2", "0", "8") "," T("y", "F32", "2", "12", "20") "}", 20,
     "bytes 8 to 11 of the data"},
    {"{" T("x", "F32", "2", "4", "12") "}", 12, "bytes 0 to 3 of the data"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,8]}}", 8, "two integers"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":{\"a\":0}}}", 8, "two integers"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8.5]}}", 8, "two integers"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":2,\"data_offsets\":[0,8]}}", 8, "is no array"},
    {"{\"x\":{\"dtype\":7,\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "not just dtype"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8, "not just dtype"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"more\":1}}", 8,
     "not just dtype"},
    {"{\"x\":[0,8]}", 8, "is no object"},
    {"{\"x\\u0000y\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "JSON"},
    {"{\"x\\ny\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "control"},
    {"{\"x\xff\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "JSON"},
    {"{\"__metadata__\":[1]," T("x", "F32", "2", "0", "8") "}", 8, "__metadata__ is no object"},
    {"{\"__metadata__\":{\"a\":1}," T("x", "F32", "2", "0", "8") "}", 8, "a is no string"},
    {"{\"__metadata__\":{\"a\":{\"b\":{\"c\":{}}}}," T("x", "F32", "2", "0", "8") "}", 8, "nested"},
    {"{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{", 0, "nested deeper than 3"},
    {"{\"a\":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[", 0, "nested deeper than 3"},
    {"{\"a\":{},\"b\":{},\"c\":{},\"d\":{},\"e\":{},\"f\":{},\"g\":{},\"h\":{}}", 0, "no tensors"},
    {"{}", 4, "0 bytes, the file has 4"}};

/* Refused, with `why`, by an open and by a load, which writes nothing. */
static void refused(const char *path, const char *why)
{
    moe_file *file = NULL;
    float data[2] = {3, 4};
    moe_checkpoint_item item;
    moe_status status = moe_file_open(&file, path);
    ck_assert_msg(status == MOE_ERROR_CORRUPT_DATA && !file, "%s: %s", why, moe_last_error());
    ck_assert_msg(strstr(moe_last_error(), why) != NULL, "not \"%s\": %s", why, moe_last_error());
    MUST(moe_checkpoint_item_init(&item, sizeof item));
    item.name = "x", item.data = data, item.dims = 1, item.shape[0] = 2;
    REFUSED(MOE_ERROR_CORRUPT_DATA, moe_checkpoint_load(path, &item, 1, NULL, NULL));
    ck_assert(data[0] == 3 && data[1] == 4);
}

START_TEST(test_file_refuses_hostile_headers)
{
    static const char zeros[64];
    const char *path = files_path("bad.safetensors");
    for (size_t i = 0; i < COUNT(HOSTILE); i++) {
        files_tensors(path, HOSTILE[i].header, zeros, (size_t)HOSTILE[i].bytes);
        refused(path, HOSTILE[i].why);
    }
}
END_TEST

START_TEST(test_file_refuses_hostile_lengths)
{
    const char *path = files_path("bad.safetensors");
    const uint64_t lengths[] = {0, 1, 3, 100000000, 100000001, (uint64_t)1 << 63, UINT64_MAX};
    const char *why[] = {"would have 0",     "would have 1",      "would have 3",
                         "would have 10",    "at most 100000000", "at most 100000000",
                         "at most 100000000"};
    unsigned char bytes[10] = {0, 0, 0, 0, 0, 0, 0, 0, '{', '}'};
    for (size_t n = 0; n < 8; n++) {
        files_write(path, bytes, n);
        refused(path, "too few for a header");
    }
    for (size_t i = 0; i < COUNT(lengths); i++) {
        for (int b = 0; b < 8; b++) bytes[b] = (unsigned char)(lengths[i] >> (8 * b));
        files_write(path, bytes, sizeof bytes);
        refused(path, why[i]);
    }
    memset(bytes, 0, 8), bytes[0] = 2; /* the least file there is */
    files_write(path, bytes, sizeof bytes);
    moe_file *file = must_open(path);
    ck_assert_int_eq(moe_file_count(file), 0);
    moe_file_close(file);
}
END_TEST

/* ---- several files --------------------------------------------------------------------------- */

static void make_shards(void)
{
    const float a[2] = {1, 2}, b[1] = {3};
    files_tensors(files_path("m-1.safetensors"), "{" T("a", "F32", "2", "0", "8") "}", a, 8);
    files_tensors(files_path("m-2.safetensors"), "{" T("b", "F32", "1", "0", "4") "}", b, 4);
}

static void write_index(const char *text)
{
    files_write(files_path("model.safetensors.index.json"), text, strlen(text));
}

START_TEST(test_shards_are_one_file)
{
    float x[2];
    make_shards();
    write_index("{\"metadata\":{\"total_size\":12,\"format\":\"pt\",\"deep\":{\"x\":[1]}},"
                "\"weight_map\":{\"a\":\"m-1.safetensors\",\"b\":\"m-2.safetensors\"}}");
    for (int i = 0; i < 2; i++) {
        moe_file *file = must_open(i ? files_directory
                                     : files_path("model.safetensors.index.json"));
        ck_assert_int_eq(moe_file_count(file), 2);
        MUST(moe_file_read(file, moe_file_find(file, "a"), x, 0, MOE_FILE_ALL, MOE_DTYPE_F32));
        ck_assert(x[0] == 1 && x[1] == 2);
        MUST(moe_file_read(file, moe_file_find(file, "b"), x, 0, MOE_FILE_ALL, MOE_DTYPE_F32));
        ck_assert(x[0] == 3);
        ck_assert_ptr_nonnull(strstr(entry(file, "b").path, "m-2.safetensors"));
        ck_assert_str_eq(moe_file_metadata_find(file, "total_size"), "12");
        ck_assert_str_eq(moe_file_metadata_find(file, "format"), "pt");
        moe_file_close(file);
    }
}
END_TEST

START_TEST(test_directories_have_one_file)
{
    moe_file *file = NULL;
    const float x = 1;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_file_open(&file, files_directory));
    files_tensors(files_path("x.safetensors"), "{" T("x", "F32", "", "0", "4") "}", &x, 4);
    moe_file_close(must_open(files_directory));
    files_tensors(files_path("y.safetensors"), "{" T("y", "F32", "", "0", "4") "}", &x, 4);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_file_open(&file, files_directory));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "2 files"));
    files_tensors(files_path("model.safetensors"), "{" T("z", "F32", "", "0", "4") "}", &x, 4);
    file = must_open(files_directory);
    ck_assert_int_eq(moe_file_find(file, "z"), 0);
    moe_file_close(file);
}
END_TEST

#define MAP(text) "{\"weight_map\":{" text "}}"
static const hostile INDEXES[] = {
    {MAP("\"a\":\"../m-1.safetensors\""), 0, "outside its directory"},
    {MAP("\"a\":\"/etc/passwd\""), 0, "outside its directory"},
    {MAP("\"a\":\"sub/m-1.safetensors\""), 0, "outside its directory"},
    {MAP("\"a\":\"..\""), 0, "outside its directory"},
    {MAP("\"a\":\".hidden.safetensors\""), 0, "outside its directory"},
    {MAP("\"a\":\"passwd\""), 0, "is no .safetensors"},
    {MAP("\"a\":\"\""), 0, "is no .safetensors"},
    {MAP("\"a\":1"), 0, "is no string"},
    {MAP(""), 0, "is empty"},
    {MAP("\"a\":\"m-2.safetensors\",\"b\":\"m-2.safetensors\""), 0, "it is not there"},
    {MAP("\"a\":\"m-2.safetensors\",\"b\":\"m-1.safetensors\""), 0, "it is in"},
    {MAP("\"a\":\"m-1.safetensors\",\"c\":\"m-2.safetensors\""), 0, "it is not there"},
    {MAP("\"a\":\"m-1.safetensors\",\"b\":\"m-3.safetensors\""), 0, "is in"},
    {MAP("\"a\":\"m-1.safetensors\",\"a\":\"m-1.safetensors\""), 0, "duplicate"},
    {"{\"weight_map\":[]}", 0, "no weight_map"},
    {"[]", 0, "no weight_map"},
    {"{}", 0, "no weight_map"},
    {"", 0, "JSON"},
    {"{\"metadata\":3,\"weight_map\":{\"a\":\"m-1.safetensors\"}}", 0, "metadata"},
    {"[[[[[[[[[[[[[[[[[[[[[[[[[[[", 0, "nested deeper than 16"}};

START_TEST(test_index_refuses_what_it_must_not_name)
{
    const float a[2] = {1, 2};
    make_shards();
    files_tensors(files_path("m-3.safetensors"), "{" T("a", "F32", "2", "0", "8") "}", a, 8);
    for (size_t i = 0; i < COUNT(INDEXES); i++) {
        write_index(INDEXES[i].header);
        refused(files_path("model.safetensors.index.json"), INDEXES[i].why);
    }
    moe_file *file = NULL;
    write_index(MAP("\"a\":\"m-9.safetensors\""));
    REFUSED(MOE_ERROR_SYSTEM, moe_file_open(&file, files_path("model.safetensors.index.json")));
}
END_TEST

/* ---- damage ---------------------------------------------------------------------------------- */

static void read_all(const moe_file *file)
{
    static unsigned char buffer[4096];
    moe_file_record r;
    MUST(moe_file_record_init(&r, sizeof r));
    for (int64_t i = 0; i < moe_file_count(file); i++) {
        MUST(moe_file_entry(file, i, &r));
        ck_assert_int_le(r.bytes, (int64_t)sizeof buffer);
        MUST(moe_file_read(file, i, buffer, 0, MOE_FILE_ALL, r.dtype));
        (void)strlen(r.name);
    }
}

/* Flipped bits, cut and repeated bytes: what is opened is whole, all else is refused. */
START_TEST(test_file_survives_damage)
{
    static const char data[28];
    const char *path = files_path("f.safetensors");
    uint64_t state = 11;
    size_t count;
    int opened = 0, rounds = getenv("MOE_LONG") ? 200000 : 6000;
    files_tensors(path,
                  "{\"__metadata__\":{\"k\":\"v\"}," T("x", "F32", "2,2", "0", "16") "," T(
                      "yy", "I64", "", "16", "24") "," T("z", "F16", "1,2", "24", "28") "}  ",
                  data, sizeof data);
    unsigned char *good = files_read(path, &count), *bad = malloc(2 * count);
    ck_assert_ptr_nonnull(bad);
    for (int round = 0; round < rounds; round++) {
        size_t n = count;
        memcpy(bad, good, count);
        for (int flips = 1 + (int)(random_uniform(&state) * 3); flips > 0; flips--) {
            size_t at = (size_t)(random_uniform(&state) * (double)n);
            switch ((int)(random_uniform(&state) * 6)) {
            case 0: bad[at] = (unsigned char)(random_uniform(&state) * 256); break;
            case 1: n = at ? at : 1; break;
            case 2:
                bad[at] = (unsigned char)"{}[],:\"\\0-9e."[(int)(random_uniform(&state) * 13)];
                break;
            case 3: bad[at % 8] ^= (unsigned char)(1u << (int)(random_uniform(&state) * 8)); break;
            case 4: memmove(bad + at, bad, n - at); break;
            default: bad[at] ^= (unsigned char)(1u << (int)(random_uniform(&state) * 8));
            }
        }
        files_write(path, bad, n);
        moe_file *file = NULL;
        moe_status status = moe_file_open(&file, path);
        ck_assert((status == MOE_OK) == (file != NULL));
        ck_assert_msg(status == MOE_OK || status == MOE_ERROR_CORRUPT_DATA, "%s", moe_last_error());
        if (file) read_all(file), opened++;
        moe_file_close(file);
    }
    ck_assert_int_gt(opened, rounds / 50); /* bytes of data or metadata */
    free(good), free(bad);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("io_file");
    TCase *c = tcase_create("file");
    tcase_set_timeout(c, 300);
    tcase_add_checked_fixture(c, files_begin, files_end);
    tcase_add_test(c, test_file_lists_and_reads);
    tcase_add_test(c, test_file_calls_refuse);
    tcase_add_test(c, test_file_converts_every_small_number);
    tcase_add_test(c, test_file_rounds_to_nearest_even);
    tcase_add_test(c, test_file_refuses_hostile_headers);
    tcase_add_test(c, test_file_refuses_hostile_lengths);
    tcase_add_test(c, test_shards_are_one_file);
    tcase_add_test(c, test_directories_have_one_file);
    tcase_add_test(c, test_index_refuses_what_it_must_not_name);
    tcase_add_test(c, test_file_survives_damage);
    suite_add_tcase(suite, c);
    return run_suite(suite, 1);
}
