/* convert.c - element types of files, and conversion between them.
 *
 * bf16 and f16 are rounded to nearest even once, from the f32 or f64 they come from. */
#include "io.h"

#include <string.h>

typedef struct dtype {
    int32_t number, size;
    const char *name;
} dtype;

static const dtype DTYPES[] = {{MOE_DTYPE_F32, 4, "F32"},        {MOE_DTYPE_F64, 8, "F64"},
                               {MOE_DTYPE_BF16, 2, "BF16"},      {MOE_DTYPE_F16, 2, "F16"},
                               {MOE_DTYPE_I32, 4, "I32"},        {MOE_DTYPE_I64, 8, "I64"},
                               {MOE_FILE_BOOL, 1, "BOOL"},       {MOE_FILE_U8, 1, "U8"},
                               {MOE_FILE_I8, 1, "I8"},           {MOE_FILE_U16, 2, "U16"},
                               {MOE_FILE_I16, 2, "I16"},         {MOE_FILE_U32, 4, "U32"},
                               {MOE_FILE_U64, 8, "U64"},         {MOE_FILE_F8_E4M3, 1, "F8_E4M3"},
                               {MOE_FILE_F8_E5M2, 1, "F8_E5M2"}, {MOE_FILE_F8_E8M0, 1, "F8_E8M0"},
                               {MOE_FILE_C64, 8, "C64"}};

enum { DTYPE_COUNT = sizeof DTYPES / sizeof *DTYPES };

static const dtype *find(int32_t number)
{
    for (int i = 0; i < DTYPE_COUNT; i++)
        if (DTYPES[i].number == number) return &DTYPES[i];
    return NULL;
}

int64_t moe__io_dtype_size(int32_t number)
{
    const dtype *d = find(number);
    return d ? d->size : 0;
}

const char *moe__io_dtype_name(int32_t number)
{
    const dtype *d = find(number);
    return d ? d->name : "no dtype";
}

int32_t moe__io_dtype_of_name(const char *name)
{
    for (int i = 0; i < DTYPE_COUNT; i++)
        if (strcmp(DTYPES[i].name, name) == 0) return DTYPES[i].number;
    return -1;
}

bool moe__io_is_float(int32_t number) { return number >= MOE_DTYPE_F32 && number <= MOE_DTYPE_F16; }

static bool is_integer(int32_t number)
{
    return number == MOE_DTYPE_I32 || number == MOE_DTYPE_I64;
}

bool moe__io_convertible(int32_t to, int32_t from)
{
    return to == from || (moe__io_is_float(to) && moe__io_is_float(from)) ||
           (is_integer(to) && is_integer(from));
}

/* ---- small formats --------------------------------------------------------------------------- */

static double from_bits64(uint64_t bits)
{
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Sign, `exponent` bits, `fraction` bits from a double. The significand as an integer of 53 bits is
 * cut to what the format holds at this exponent, the rest rounds to nearest even; a carry runs into
 * the exponent as it should. */
static uint16_t to_small(double x, int exponent, int fraction)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t sign = (uint32_t)(bits >> 63) << (exponent + fraction);
    uint32_t infinite = (((uint32_t)1 << exponent) - 1) << fraction;
    int bias = (1 << (exponent - 1)) - 1, least = 1 - bias;
    int e = (int)(bits >> 52 & 0x7ff) - 1023;
    uint64_t m = bits & (((uint64_t)1 << 52) - 1);
    if (e == 1024) {
        uint32_t quiet = (uint32_t)1 << (fraction - 1);
        return (uint16_t)(sign | infinite | (m ? quiet | (uint32_t)(m >> (52 - fraction)) : 0));
    }
    if (e < least - fraction - 1) return (uint16_t)sign; /* less than half of the least number */
    m |= (uint64_t)1 << 52;
    int shift = 52 - fraction + (e < least ? least - e : 0);
    uint64_t q = m >> shift, rest = m & (((uint64_t)1 << shift) - 1);
    uint64_t half = (uint64_t)1 << (shift - 1);
    q += rest > half || (rest == half && (q & 1));
    uint32_t value = (uint32_t)q;
    if (e >= least) value += (uint32_t)(e - least) << fraction;
    return (uint16_t)(sign | (value < infinite ? value : infinite));
}

static double from_f16(uint16_t h)
{
    uint64_t sign = (uint64_t)(h >> 15) << 63, e = h >> 10 & 31, m = h & 1023;
    if (e == 31) return from_bits64(sign | (uint64_t)0x7ff << 52 | m << 42);
    if (e == 0) {
        double x = (double)m * 0x1p-24;
        return sign ? -x : x;
    }
    return from_bits64(sign | (e + 1008) << 52 | m << 42);
}

static float from_bf16(uint16_t h)
{
    uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

float moe__io_f8_e4m3(uint8_t bits)
{
    int e = bits >> 3 & 15, m = bits & 7;
    float x;
    if (e == 15 && m == 7) return from_bf16(0x7fc0); /* the format's only other value is NaN */
    if (e == 0)
        x = (float)m * 0x1p-9f;
    else {
        uint32_t word = (uint32_t)(e + 120) << 23 | (uint32_t)m << 20;
        memcpy(&x, &word, sizeof x);
    }
    return bits & 0x80 ? -x : x;
}

/* ---- arrays ---------------------------------------------------------------------------------- */

double moe__io_element(const void *from, int32_t number, int64_t i)
{
    uint16_t h;
    float f;
    double d;
    switch (number) {
    case MOE_DTYPE_F32: memcpy(&f, (const char *)from + 4 * i, 4); return (double)f;
    case MOE_DTYPE_F64: memcpy(&d, (const char *)from + 8 * i, 8); return d;
    case MOE_DTYPE_BF16: memcpy(&h, (const char *)from + 2 * i, 2); return (double)from_bf16(h);
    default: memcpy(&h, (const char *)from + 2 * i, 2); return from_f16(h);
    }
}

void moe__io_set_element(void *to, int32_t number, int64_t i, double x)
{
    uint16_t h;
    float f = (float)x;
    switch (number) {
    case MOE_DTYPE_F32: memcpy((char *)to + 4 * i, &f, 4); return;
    case MOE_DTYPE_F64: memcpy((char *)to + 8 * i, &x, 8); return;
    case MOE_DTYPE_BF16: h = to_small(x, 8, 7); break;
    default: h = to_small(x, 5, 10);
    }
    memcpy((char *)to + 2 * i, &h, 2);
}

/* The two ways that matter for time. */
static void bf16_to_f32(void *to, const void *from, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, (const char *)from + 2 * i, 2);
        uint32_t bits = (uint32_t)h << 16;
        memcpy((char *)to + 4 * i, &bits, 4);
    }
}

static void f32_to_bf16(void *to, const void *from, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t u;
        memcpy(&u, (const char *)from + 4 * i, 4);
        uint32_t nan = (u & 0x7fffffff) > 0x7f800000;
        uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
        uint16_t h = (uint16_t)(nan ? (u >> 16 | 0x40) : rounded);
        memcpy((char *)to + 2 * i, &h, 2);
    }
}

static int64_t convert_integers(void *to, int32_t to_dtype, const void *from, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        int64_t wide;
        int32_t narrow;
        if (to_dtype == MOE_DTYPE_I64) {
            memcpy(&narrow, (const char *)from + 4 * i, 4);
            wide = narrow;
            memcpy((char *)to + 8 * i, &wide, 8);
        } else {
            memcpy(&wide, (const char *)from + 8 * i, 8);
            if (wide < INT32_MIN || wide > INT32_MAX) return i;
            narrow = (int32_t)wide;
            memcpy((char *)to + 4 * i, &narrow, 4);
        }
    }
    return -1;
}

int64_t moe__io_convert(void *to, int32_t to_dtype, const void *from, int32_t from_dtype, int64_t n)
{
    fenv_t saved;
    if (is_integer(to_dtype)) return convert_integers(to, to_dtype, from, n);
    if (to_dtype == MOE_DTYPE_F32 && from_dtype == MOE_DTYPE_BF16) {
        bf16_to_f32(to, from, n);
    } else if (to_dtype == MOE_DTYPE_BF16 && from_dtype == MOE_DTYPE_F32) {
        f32_to_bf16(to, from, n);
    } else {
        moe__fenv_enter(&saved);
        for (int64_t i = 0; i < n; i++)
            moe__io_set_element(to, to_dtype, i, moe__io_element(from, from_dtype, i));
        moe__fenv_leave(&saved);
    }
    return -1;
}
