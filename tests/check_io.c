/* check_io.c - checkpoints: every kind of layer in every layout to a file and back; the same bytes
 * whatever the layout, and for any number of ranks; what does not fit is refused with nothing
 * written. */
#include "support/family.h"
#include "support/files.h"
#include "support/layer_case.h"
#include "support/suite.h"

#include <moe/io.h>

#include <check.h>
#include <pthread.h>
#include <stdbool.h>
#include <sys/stat.h>

enum { KINDS = MOE_GATE_SINKHORN + 1, MOST = 4 };

static moe_checkpoint_item item_of(const char *name, moe_layer *layer)
{
    moe_checkpoint_item item;
    MUST(moe_checkpoint_item_init(&item, sizeof item));
    item.name = name, item.layer = layer;
    return item;
}

static void save(const char *path, const char *name, moe_layer *layer)
{
    moe_checkpoint_item item = item_of(name, layer);
    MUST(moe_checkpoint_save(path, &item, 1, NULL));
}

static void load(const char *path, const char *name, moe_layer *layer)
{
    moe_checkpoint_item item = item_of(name, layer);
    MUST(moe_checkpoint_load(path, &item, 1, NULL, NULL));
}

static moe_parameter_record record_of(const moe_layer *layer, int64_t index)
{
    moe_parameter_record r;
    MUST(moe_parameter_record_init(&r, sizeof r));
    MUST(moe_layer_parameter(layer, index, &r));
    return r;
}

static void clear(moe_layer *layer, int byte)
{
    for (int64_t i = 0; i < moe_layer_parameter_count(layer); i++) {
        moe_parameter_record r = record_of(layer, i);
        if (r.opaque) byte = 0; /* what fills it up must stay 0 */
        memset(r.data, byte, (size_t)r.element_count * (r.data_dtype == MOE_DTYPE_F64 ? 8 : 4));
    }
}

/* All owned parameters, one after the other. */
static uint64_t hash_of(const moe_layer *layer)
{
    uint64_t hash = 0xcbf29ce484222325u;
    for (int64_t i = 0; i < moe_layer_parameter_count(layer); i++) {
        moe_parameter_record r = record_of(layer, i);
        int64_t bytes = r.element_count * (r.data_dtype == MOE_DTYPE_F64 ? 8 : 4);
        for (int64_t b = 0; b < bytes; b++)
            hash = (hash ^ ((const unsigned char *)r.data)[b]) * 0x100000001b3u;
    }
    return hash;
}

/* ---- every kind, layout and GLU order -------------------------------------------------------- */

static const int ACTIVATIONS[] = {MOE_ACTIVATION_RELU, MOE_ACTIVATION_SWIGLU,
                                  MOE_ACTIVATION_GEGLU_ERF};

/* Another way of keeping the same layer. */
static void vary(family *f, int way)
{
    const moe_experts_config *all[] = {&f->e, &f->shared, &f->residual};
    for (int i = 0; i < 3; i++) {
        moe_experts_config *e = (moe_experts_config *)(uintptr_t)all[i];
        int w = way + i;
        e->weight_layout = w % 2 ? MOE_WEIGHT_OUT_IN : MOE_WEIGHT_IN_OUT;
        e->glu_order = e->activation >= MOE_ACTIVATION_SWIGLU ? w / 2 % 4 : MOE_GLU_SEPARATE;
        e->storage = e->kind == MOE_EXPERTS_FEED_FORWARD ? w % 3 : MOE_STORAGE_ROW_MAJOR;
    }
    f->gate = NULL, f->layer = NULL, f->experts = f->shared_experts = f->residual_experts = NULL;
}

static void round_trip(int32_t kind, uint64_t number)
{
    moe_context *context = new_context();
    family f, g;
    family_draw(&f, kind, number, number % 2 ? MOE_DTYPE_F32 : MOE_DTYPE_F64);
    f.e.activation = ACTIVATIONS[number % 3];
    f.e.activation_alpha = f.e.activation_limit = f.e.activation_offset = 0;
    vary(&f, (int)(number * 5 % 8));
    family_make(&f, context);
    save(files_path("a"), "layers.0.", f.layer);
    uint64_t before = hash_of(f.layer);
    clear(f.layer, 0xee);
    load(files_path("a"), "layers.0.", f.layer);
    ck_assert_msg(hash_of(f.layer) == before, "%s", f.text);
    for (int way = 0; way < 8; way++) { /* kept otherwise, the file is the same */
        g = f;
        vary(&g, way);
        family_make(&g, context);
        clear(g.layer, 0xee);
        load(files_path("a"), "layers.0.", g.layer);
        save(files_path("b"), "layers.0.", g.layer);
        ck_assert_msg(files_equal(files_path("a"), files_path("b")), "way %d, %s", way, f.text);
        family_free(&g);
    }
    family_free(&f);
    moe_context_destroy(context);
}

START_TEST(test_checkpoint_of_every_kind_comes_back)
{
    for (uint64_t number = 0; number < 12; number++) round_trip(_i, number);
    ck_assert_int_eq(files_count(0), 2);
}
END_TEST

/* ---- names, shapes and order ----------------------------------------------------------------- */

/* A layer of E experts with biases; shared 1: a shared one, too. */
static moe_layer *make_placed(moe_context *context, int layout, int glu_order, int32_t dtype,
                              int shared, moe_comm *comm, const int64_t *placement, int64_t experts,
                              int64_t all)
{
    moe_gate *gate;
    moe_experts *pool, *other = NULL;
    moe_layer *layer;
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    MUST(moe_gate_config_init(&g, sizeof g));
    g.d_model = 3, g.num_experts = all, g.top_k = 2, g.dtype = dtype, g.bias = 1;
    MUST(moe_gate_create(&gate, context, &g));
    MUST(moe_experts_config_init(&e, sizeof e));
    e.d_model = 3, e.d_hidden = 5, e.num_experts = experts, e.dtype = dtype, e.bias = 1;
    e.activation = MOE_ACTIVATION_SWIGLU, e.weight_layout = layout, e.glu_order = glu_order;
    MUST(moe_experts_create(&pool, context, &e));
    e.num_experts = 2, e.bias = 0;
    if (comm) e.weight_layout = MOE_WEIGHT_IN_OUT, e.glu_order = MOE_GLU_SEPARATE; /* alike */
    if (shared) MUST(moe_experts_create(&other, context, &e));
    MUST(moe_layer_config_init(&l, sizeof l));
    l.gate = gate, l.experts = pool, l.shared = other, l.shared_gate = shared, l.comm = comm;
    l.placement = placement;
    MUST(moe_layer_create(&layer, &l));
    MUST(moe_layer_init_parameters(layer, 7));
    moe_gate_destroy(gate), moe_experts_destroy(pool), moe_experts_destroy(other);
    return layer;
}

static moe_layer *make_layer(moe_context *context, int layout, int glu_order, int32_t dtype,
                             int shared, moe_comm *comm, int64_t experts, int64_t all)
{
    return make_placed(context, layout, glu_order, dtype, shared, comm, NULL, experts, all);
}

static void expect(const moe_file *file, const char *name, int32_t dims, int64_t a, int64_t b)
{
    moe_file_record r;
    MUST(moe_file_record_init(&r, sizeof r));
    ck_assert_msg(moe_file_find(file, name) >= 0, "%s", name);
    MUST(moe_file_entry(file, moe_file_find(file, name), &r));
    ck_assert_msg(r.dims == dims && r.shape[0] == a && r.shape[1] == b && r.offset % 4 == 0, "%s",
                  name);
}

START_TEST(test_checkpoint_has_the_documented_names_and_order)
{
    moe_context *context = new_context();
    moe_layer *layer = make_layer(context, MOE_WEIGHT_IN_OUT, MOE_GLU_INTERLEAVED, MOE_DTYPE_F32, 1,
                                  NULL, 4, 4);
    moe_file *file = NULL;
    float w[15], v[10];
    save(files_path("a"), "m.", layer);
    MUST(moe_file_open(&file, files_path("a")));
    ck_assert_int_eq(moe_file_count(file), 2 + 4 * 6 + 2 * 3 + 1);
    expect(file, "m.gate.weight", 2, 3, 4), expect(file, "m.gate.bias", 1, 4, 1);
    expect(file, "m.experts.3.w1", 2, 5, 3), expect(file, "m.experts.0.w2", 2, 3, 5);
    expect(file, "m.experts.2.b3", 1, 5, 1), expect(file, "m.experts.2.b2", 1, 3, 1);
    expect(file, "m.shared.1.w3", 2, 5, 3), expect(file, "m.shared_gate", 1, 3, 1);
    ck_assert_str_eq(moe_file_metadata_find(file, "libmoe.checkpoint"), "1");
    moe_parameter_record r = record_of(layer, moe_layer_parameter_find(layer, "experts.w13"));
    moe_parameter_record b = record_of(layer, moe_layer_parameter_find(layer, "experts.b13"));
    for (int half = 0; half < 2; half++) {
        MUST(moe_file_read(file, moe_file_find(file, half ? "m.experts.2.w3" : "m.experts.2.w1"), w,
                           0, MOE_FILE_ALL, MOE_DTYPE_F32));
        for (int in = 0; in < 3; in++)
            for (int out = 0; out < 5; out++)
                ck_assert(w[out * 3 + in] == ((float *)r.data)[(2 * 3 + in) * 10 + 2 * out + half]);
        MUST(moe_file_read(file, moe_file_find(file, half ? "m.experts.2.b3" : "m.experts.2.b1"), v,
                           0, MOE_FILE_ALL, MOE_DTYPE_F32));
        for (int out = 0; out < 5; out++)
            ck_assert(v[out] == ((float *)b.data)[2 * 10 + 2 * out + half]);
    }
    moe_file_close(file), moe_layer_destroy(layer), moe_context_destroy(context);
}
END_TEST

/* ---- host tensors, values, metadata, dtypes -------------------------------------------------- */

START_TEST(test_checkpoint_holds_what_belongs_to_training)
{
    moe_context *context = new_context();
    moe_layer *layer = make_layer(context, 0, MOE_GLU_GATE_UP, MOE_DTYPE_F32, 0, NULL, 4, 4);
    int64_t count = moe_layer_parameter_count(layer), step = 77;
    uint8_t random[5] = {1, 2, 3, 4, 5};
    double table[6] = {1, 2, 3, 4, 5, 1e-300};
    void **values = calloc((size_t)count, sizeof *values);
    const char *keys[] = {"run", "quote\"\\"}, *texts[] = {"seven", "line\nend \xe2\x82\xac"};
    for (int64_t i = 0; i < count; i++) {
        moe_parameter_record r = record_of(layer, i);
        float *v = values[i] = malloc((size_t)r.element_count * 4);
        for (int64_t n = 0; n < r.element_count; n++) v[n] = (float)(100 * i + n);
    }
    free(values[1]), values[1] = NULL; /* no moments for it */
    moe_checkpoint_item items[5] = {item_of("a.", layer), item_of("adam.m.a.", layer),
                                    item_of("step", NULL), item_of("random", NULL),
                                    item_of("table", NULL)};
    items[1].values = values;
    items[2].data = &step, items[2].dtype = MOE_DTYPE_I64;
    items[3].data = random, items[3].dtype = MOE_FILE_U8, items[3].dims = 1, items[3].shape[0] = 5;
    items[4].data = table, items[4].dtype = MOE_DTYPE_F64, items[4].dims = 2;
    items[4].shape[0] = 2, items[4].shape[1] = 3;
    moe_save_options o;
    MUST(moe_save_options_init(&o, sizeof o));
    o.metadata_keys = keys, o.metadata_values = texts, o.metadata_count = 2;
    MUST(moe_checkpoint_save(files_path("a"), items, 5, &o));
    moe_file *file = NULL;
    MUST(moe_file_open(&file, files_path("a")));
    ck_assert_str_eq(moe_file_metadata_find(file, keys[1]), texts[1]);
    moe_file_close(file);
    clear(layer, 0), step = 0, memset(random, 0, 5), memset(table, 0, sizeof table);
    for (int64_t i = 0; i < count; i++)
        if (values[i]) memset(values[i], 0, (size_t)record_of(layer, i).element_count * 4);
    moe_load_report report;
    MUST(moe_load_report_init(&report, sizeof report));
    MUST(moe_checkpoint_load(files_path("a"), items, 5, NULL, &report));
    ck_assert(step == 77 && random[4] == 5 && table[5] == 1e-300);
    ck_assert(report.missing == 0 && report.unexpected == 0 && report.loaded == 26 + 25 + 3);
    for (int64_t i = 0; i < count; i++)
        for (int64_t n = 0; values[i] && n < record_of(layer, i).element_count; n++)
            ck_assert(((float *)values[i])[n] == (float)(100 * i + n));
    MUST(moe_checkpoint_save(files_path("b"), items, 5, &o));
    ck_assert(files_equal(files_path("a"), files_path("b")));
    for (int64_t i = 0; i < count; i++) free(values[i]);
    free(values), moe_layer_destroy(layer), moe_context_destroy(context);
}
END_TEST

START_TEST(test_checkpoint_of_another_dtype)
{
    moe_context *context = new_context();
    const int32_t stored[] = {MOE_DTYPE_F32, MOE_DTYPE_F64, MOE_DTYPE_BF16, MOE_DTYPE_F16};
    const double allowed[] = {1e-7, 0, 4e-3, 5e-4};
    moe_layer *from = make_layer(context, 0, 0, MOE_DTYPE_F64, 1, NULL, 4, 4);
    moe_layer *to = make_layer(context, 1, 3, MOE_DTYPE_F64, 1, NULL, 4, 4);
    moe_layer *narrow = make_layer(context, 1, 3, MOE_DTYPE_F32, 1, NULL, 4, 4);
    moe_save_options o;
    moe_load_options l;
    MUST(moe_save_options_init(&o, sizeof o));
    MUST(moe_load_options_init(&l, sizeof l));
    for (int i = 0; i < 4; i++) {
        moe_checkpoint_item item = item_of("", from);
        o.store_dtype = stored[i];
        MUST(moe_checkpoint_save(files_path("a"), &item, 1, &o));
        clear(to, 0), clear(narrow, 0);
        item.layer = to;
        if (i != 1) {
            REFUSED(MOE_ERROR_INVALID_ARGUMENT,
                    moe_checkpoint_load(files_path("a"), &item, 1, NULL, NULL));
            ck_assert_ptr_nonnull(strstr(moe_last_error(), "convert is 0"));
        }
        l.convert = 1;
        MUST(moe_checkpoint_load(files_path("a"), &item, 1, &l, NULL));
        moe_parameter_record x = record_of(from, moe_layer_parameter_find(from, "experts.w2"));
        moe_parameter_record y = record_of(to, moe_layer_parameter_find(to, "experts.w2"));
        for (int64_t e = 0; e < 4; e++) /* [E,F,D] and [E,D,F] */
            for (int64_t f = 0; f < 5; f++)
                for (int64_t d = 0; d < 3; d++) {
                    double a = ((double *)x.data)[(e * 5 + f) * 3 + d];
                    double b = ((double *)y.data)[(e * 3 + d) * 5 + f];
                    ck_assert_double_le(a > b ? a - b : b - a, allowed[i] * (a < 0 ? -a : a));
                }
        item.layer = narrow;
        MUST(moe_checkpoint_load(files_path("a"), &item, 1, &l, NULL));
    }
    moe_layer_destroy(from), moe_layer_destroy(to), moe_layer_destroy(narrow);
    moe_context_destroy(context);
}
END_TEST

static double number_of(const moe_layer *layer, int64_t i, int64_t n)
{
    moe_parameter_record r = record_of(layer, i);
    return number_at(r.data, n, r.data_dtype);
}

/* What is in 16 bits stays so; to f32 it is widened, from f32 rounded once. */
START_TEST(test_checkpoint_of_a_16_bit_layer)
{
    int32_t dtype = _i ? MOE_DTYPE_F16 : MOE_DTYPE_BF16;
    moe_context *context = new_context();
    moe_layer *from = make_layer(context, 0, 0, dtype, 1, NULL, 4, 4);
    moe_layer *to = make_layer(context, 0, 0, dtype, 1, NULL, 4, 4);
    moe_layer *wide = make_layer(context, 0, 0, MOE_DTYPE_F32, 1, NULL, 4, 4);
    moe_checkpoint_item item = item_of("", from);
    moe_load_options l;
    MUST(moe_load_options_init(&l, sizeof l));
    l.convert = 1;
    for (int step = 0; step < 3; step++) { /* 16 bits to 16, to f32, and from f32 */
        item.layer = step < 2 ? from : wide;
        MUST(moe_checkpoint_save(files_path("a"), &item, 1, NULL));
        item.layer = step == 1 ? wide : to;
        if (step != 1) MUST(moe_layer_init_parameters(to, 99));
        MUST(moe_checkpoint_load(files_path("a"), &item, 1, step ? &l : NULL, NULL));
        for (int64_t i = 0; i < moe_layer_parameter_count(from); i++)
            for (int64_t n = 0; n < record_of(from, i).element_count; n++)
                ck_assert(number_of(from, i, n) == number_of(item.layer, i, n));
    }
    MUST(moe_layer_init_parameters(wide, 5));
    item.layer = wide;
    MUST(moe_checkpoint_save(files_path("a"), &item, 1, NULL));
    item.layer = to;
    MUST(moe_checkpoint_load(files_path("a"), &item, 1, &l, NULL));
    for (int64_t i = 0; i < moe_layer_parameter_count(to); i++)
        for (int64_t n = 0; n < record_of(to, i).element_count; n++) {
            double rounded;
            number_set(&rounded, 0, record_of(to, i).data_dtype, number_of(wide, i, n));
            ck_assert(number_at(&rounded, 0, record_of(to, i).data_dtype) == number_of(to, i, n));
        }
    moe_layer_destroy(from), moe_layer_destroy(to), moe_layer_destroy(wide);
    moe_context_destroy(context);
}
END_TEST

/* Parts of other width and kind behind one gate: experts have the numbers that the gate knows. */
START_TEST(test_checkpoint_of_a_pool_of_parts)
{
    moe_context *context = new_context();
    moe_experts *parts[3], *pool;
    moe_experts_config e;
    moe_gate_config g;
    moe_gate *gate;
    moe_layer *layer;
    moe_layer_config l;
    moe_file *file = NULL;
    for (int i = 0; i < 3; i++) {
        MUST(moe_experts_config_init(&e, sizeof e));
        e.d_model = 3, e.num_experts = 2, e.d_hidden = i == 1 ? 0 : 4 + i;
        e.kind = i == 1 ? MOE_EXPERTS_IDENTITY : MOE_EXPERTS_FEED_FORWARD;
        e.activation = i ? MOE_ACTIVATION_RELU : MOE_ACTIVATION_SWIGLU;
        e.weight_layout = i == 2, e.glu_order = i ? 0 : MOE_GLU_UP_GATE;
        MUST(moe_experts_create(&parts[i], context, &e));
    }
    MUST(moe_experts_create_parts(&pool, parts, 3));
    MUST(moe_gate_config_init(&g, sizeof g));
    g.d_model = 3, g.num_experts = 6, g.top_k = 2;
    MUST(moe_gate_create(&gate, context, &g));
    MUST(moe_layer_config_init(&l, sizeof l));
    l.gate = gate, l.experts = pool;
    MUST(moe_layer_create(&layer, &l));
    MUST(moe_layer_init_parameters(layer, 3));
    uint64_t before = hash_of(layer);
    save(files_path("a"), "", layer);
    MUST(moe_file_open(&file, files_path("a")));
    ck_assert_int_eq(moe_file_count(file), 1 + 2 * 3 + 2 * 2);
    expect(file, "experts.1.w3", 2, 4, 3), expect(file, "experts.5.w1", 2, 6, 3);
    ck_assert_int_eq(moe_file_find(file, "experts.2.w1"), -1);
    moe_file_close(file);
    clear(layer, 0);
    load(files_path("a"), "", layer);
    ck_assert_uint_eq(hash_of(layer), before);
    moe_layer_destroy(layer), moe_gate_destroy(gate), moe_experts_destroy(pool);
    for (int i = 0; i < 3; i++) moe_experts_destroy(parts[i]);
    moe_context_destroy(context);
}
END_TEST

/* ---- bound memory ---------------------------------------------------------------------------- */

/* Odd strides and a pointer for each expert, by the support of the layer suites. */
START_TEST(test_checkpoint_honours_bindings)
{
    for (int bound = 1; bound <= 2; bound++) {
        layer_case c = {.T = 4,
                        .D = 3,
                        .E = 4,
                        .F = 5,
                        .K = 2,
                        .activation = MOE_ACTIVATION_SWIGLU,
                        .layout = bound == 1,
                        .glu_order = bound,
                        .expert_bias = 1,
                        .shared = 2};
        layer_case d = c;
        layer_run r, owned;
        moe_load_options o;
        c.bound = bound;
        layer_run_begin(&r, &c, MOE_DTYPE_F32);
        layer_run_begin(&owned, &d, MOE_DTYPE_F32);
        save(files_path("a"), "", r.layer);
        clear(owned.layer, 0);
        load(files_path("a"), "", owned.layer);
        save(files_path("b"), "", owned.layer);
        ck_assert(files_equal(files_path("a"), files_path("b")));
        moe_checkpoint_item item = item_of("", r.layer);
        REFUSED(MOE_ERROR_INVALID_STATE,
                moe_checkpoint_load(files_path("a"), &item, 1, NULL, NULL));
        ck_assert_ptr_nonnull(strstr(moe_last_error(), "write_bound is 0"));
        MUST(moe_layer_init_parameters(owned.layer, 99));
        save(files_path("b"), "", owned.layer);
        MUST(moe_load_options_init(&o, sizeof o));
        o.write_bound = 1;
        MUST(moe_checkpoint_load(files_path("b"), &item, 1, &o, NULL));
        save(files_path("c"), "", r.layer);
        ck_assert(files_equal(files_path("b"), files_path("c")));
        layer_run_end(&r, &c), layer_run_end(&owned, &d);
    }
}
END_TEST

/* ---- ranks ----------------------------------------------------------------------------------- */

static const int64_t SHARE[MOST + 1][MOST] = {{0}, {9}, {2, 7}, {4, 1, 4}, {1, 3, 2, 3}};

/* Half of the runs place the experts anyhow: number 4 v mod 9 is place v of all. */
static int64_t placement_of(int32_t ranks, int32_t rank, int64_t numbers[9])
{
    int64_t first = 0, count = SHARE[ranks][rank];
    for (int32_t r = 0; r < rank; r++) first += SHARE[ranks][r];
    for (int64_t i = 0; i < count; i++) numbers[i] = (first + i) * 4 % 9;
    return count;
}

typedef struct part {
    moe_world *world;
    int32_t rank, ranks, trouble;
    bool placed;
    const char *in, *out;
    moe_status status;
    char error[512];
    uint64_t loaded;
} part;

enum { FINE, OTHER_METADATA, OTHER_STEP_TENSOR, NO_DIRECTORY, UNWRITABLE_ON_ONE };

/* Loads `in`, saves it as `out`. */
static void *part_thread(void *argument)
{
    part *p = argument;
    moe_context *context = new_context();
    moe_comm *comm = NULL;
    int64_t step = 5, bad = 0;
    const char *key = "k", *value = p->trouble == OTHER_METADATA && p->rank == 1 ? "w" : "v";
    MUST(moe_comm_create_in_world(&comm, p->world, context, p->rank, 120));
    int64_t numbers[9], experts = placement_of(p->ranks, p->rank, numbers);
    moe_layer *layer = make_placed(context, p->rank % 2, p->rank, MOE_DTYPE_F32, 1, comm,
                                   p->placed ? numbers : NULL, experts, 9);
    moe_checkpoint_item items[3] = {item_of("x.", layer), item_of("step", NULL),
                                    item_of("y", NULL)};
    items[1].data = &step, items[1].dtype = MOE_DTYPE_I64;
    items[2].data = &bad, items[2].dtype = MOE_DTYPE_I64;
    if (p->trouble == OTHER_STEP_TENSOR && p->rank == 1) items[2].dims = 9;
    moe_save_options o;
    MUST(moe_save_options_init(&o, sizeof o));
    o.metadata_keys = &key, o.metadata_values = &value, o.metadata_count = 1;
    clear(layer, 0xee);
    step = 0;
    p->status = moe_checkpoint_load(p->in, items, 3, NULL, NULL);
    if (p->status == MOE_OK) ck_assert_int_eq(step, 5);
    p->loaded = hash_of(layer);
    if (p->status == MOE_OK) p->status = moe_checkpoint_save(p->out, items, 3, &o);
    (void)snprintf(p->error, sizeof p->error, "%s", moe_last_error());
    moe_layer_destroy(layer), moe_comm_destroy(comm), moe_context_destroy(context);
    return NULL;
}

static void run_parts(part *parts, int32_t ranks, bool placed, int32_t trouble, const char *in,
                      const char *out)
{
    moe_context *context = new_context();
    moe_world *world = NULL;
    pthread_t thread[MOST];
    MUST(moe_world_create(&world, context, ranks));
    for (int32_t r = 0; r < ranks; r++) {
        parts[r] = (part){.world = world,
                          .rank = r,
                          .ranks = ranks,
                          .trouble = trouble,
                          .placed = placed,
                          .in = in,
                          .out = out};
        ck_assert_int_eq(pthread_create(&thread[r], NULL, part_thread, &parts[r]), 0);
    }
    for (int32_t r = 0; r < ranks; r++) ck_assert_int_eq(pthread_join(thread[r], NULL), 0);
    moe_world_destroy(world), moe_context_destroy(context);
}

/* One rank's file through layers of P and then Q ranks, whose pools are kept in other ways. */
static void save_whole(const char *path)
{
    moe_context *context = new_context();
    moe_layer *layer = make_layer(context, 0, 0, MOE_DTYPE_F32, 1, NULL, 9, 9);
    int64_t step = 5, bad = 0;
    const char *key = "k", *value = "v";
    moe_checkpoint_item items[3] = {item_of("x.", layer), item_of("step", NULL),
                                    item_of("y", NULL)};
    items[1].data = &step, items[1].dtype = MOE_DTYPE_I64;
    items[2].data = &bad, items[2].dtype = MOE_DTYPE_I64;
    moe_save_options o;
    MUST(moe_save_options_init(&o, sizeof o));
    o.metadata_keys = &key, o.metadata_values = &value, o.metadata_count = 1;
    MUST(moe_checkpoint_save(path, items, 3, &o));
    moe_layer_destroy(layer), moe_context_destroy(context);
}

START_TEST(test_checkpoint_is_the_same_for_any_number_of_ranks)
{
    part parts[MOST];
    const char *whole = files_path("whole");
    save_whole(whole);
    for (int32_t P = 1; P <= MOST; P++)
        for (int32_t Q = 1; Q <= MOST; Q++) {
            const char *a = files_path("p"), *b = files_path("q");
            run_parts(parts, P, (P + Q) % 2, FINE, whole, a);
            for (int32_t r = 0; r < P; r++)
                ck_assert_msg(parts[r].status == MOE_OK, "%s", parts[r].error);
            run_parts(parts, Q, P > 2, FINE, a, b);
            for (int32_t r = 0; r < Q; r++)
                ck_assert_msg(parts[r].status == MOE_OK, "%s", parts[r].error);
            ck_assert(files_equal(whole, a) && files_equal(whole, b));
        }
    ck_assert_int_eq(files_count(0), 3);
}
END_TEST

/* A hierarchical gate of three groups of two experts; groups 0: replicated, all experts here. */
static moe_layer *make_two_levels(moe_context *context, moe_comm *comm, int64_t groups)
{
    moe_gate *gate;
    moe_experts *pool;
    moe_layer *layer;
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    MUST(moe_gate_config_init(&g, sizeof g));
    MUST(moe_experts_config_init(&e, sizeof e));
    MUST(moe_layer_config_init(&l, sizeof l));
    g.kind = MOE_GATE_HIERARCHICAL, g.d_model = 3, g.num_experts = 6, g.expert_groups = 3;
    g.init_std = 0.5;
    if (comm) g.secondary = MOE_SECONDARY_WITH_GROUP, g.local_groups = groups;
    e.d_model = 3, e.d_hidden = 2, e.num_experts = comm ? 2 * groups : 6;
    MUST(moe_gate_create(&gate, context, &g));
    MUST(moe_experts_create(&pool, context, &e));
    l.gate = gate, l.experts = pool, l.comm = comm;
    MUST(moe_layer_create(&layer, &l));
    moe_gate_destroy(gate), moe_experts_destroy(pool);
    return layer;
}

/* First values are those of one rank; the file comes back as it was. */
static void *two_level_thread(void *argument)
{
    part *p = argument;
    moe_context *context = new_context();
    moe_comm *comm = NULL;
    MUST(moe_comm_create_in_world(&comm, p->world, context, p->rank, 120));
    moe_layer *layer = make_two_levels(context, comm, p->rank + 1);
    MUST(moe_layer_init_parameters(layer, 7));
    save(p->out, "m.", layer);
    uint64_t drawn = hash_of(layer);
    clear(layer, 0xee);
    load(p->in, "m.", layer);
    p->loaded = hash_of(layer) == drawn;
    moe_layer_destroy(layer), moe_comm_destroy(comm), moe_context_destroy(context);
    return NULL;
}

START_TEST(test_checkpoint_of_secondary_gates_with_their_groups)
{
    moe_context *context = new_context();
    moe_layer *whole = make_two_levels(context, NULL, 0);
    moe_world *world = NULL;
    part parts[2];
    pthread_t thread[2];
    MUST(moe_layer_init_parameters(whole, 7));
    save(files_path("whole"), "m.", whole);
    MUST(moe_world_create(&world, context, 2));
    for (int32_t r = 0; r < 2; r++) {
        parts[r] =
            (part){.world = world, .rank = r, .in = files_path("whole"), .out = files_path("p")};
        ck_assert_int_eq(pthread_create(&thread[r], NULL, two_level_thread, &parts[r]), 0);
    }
    for (int32_t r = 0; r < 2; r++) ck_assert_int_eq(pthread_join(thread[r], NULL), 0);
    ck_assert(files_equal(files_path("whole"), files_path("p")));
    for (int32_t r = 0; r < 2; r++) ck_assert(parts[r].loaded == 1);
    moe_world_destroy(world), moe_layer_destroy(whole), moe_context_destroy(context);
}
END_TEST

START_TEST(test_checkpoint_has_one_verdict)
{
    part parts[MOST];
    const char *whole = files_path("whole"), *out = files_path("out");
    save_whole(whole);
    for (int32_t P = 2; P <= MOST; P++) {
        files_write(out, "old", 3);
        run_parts(parts, P, false, OTHER_METADATA, whole, out);
        for (int32_t r = 0; r < P; r++) {
            ck_assert_int_eq(parts[r].status, MOE_ERROR_INVALID_ARGUMENT);
            ck_assert_msg(strstr(parts[r].error, "rank 1 has other names") != NULL, "%s",
                          parts[r].error);
        }
        run_parts(parts, P, false, OTHER_STEP_TENSOR, whole, out);
        for (int32_t r = 0; r < P; r++) {
            ck_assert_int_eq(parts[r].status, MOE_ERROR_INVALID_ARGUMENT);
            ck_assert_msg(strstr(parts[r].error, "dims is 9") != NULL, "%s", parts[r].error);
            ck_assert_msg((strstr(parts[r].error, "rank 1: ") != NULL) == (r != 1), "%s",
                          parts[r].error);
        }
        run_parts(parts, P, false, NO_DIRECTORY, whole, files_path("none/out"));
        for (int32_t r = 0; r < P; r++) {
            ck_assert_int_eq(parts[r].status, MOE_ERROR_SYSTEM);
            ck_assert_msg(strstr(parts[r].error, "No such file") != NULL, "%s", parts[r].error);
        }
        size_t count;
        unsigned char *old = files_read(out, &count);
        ck_assert(count == 3 && memcmp(old, "old", 3) == 0);
        free(old);
        ck_assert_int_eq(files_count(0), 2);
    }
}
END_TEST

/* ---- what does not fit ----------------------------------------------------------------------- */

static int lines;
static void count_line(void *user, int32_t level, const char *text)
{
    (void)user, (void)level;
    lines += strncmp(text, "missing ", 8) == 0 || strncmp(text, "unexpected ", 11) == 0;
}

START_TEST(test_checkpoint_refuses_what_does_not_fit)
{
    moe_context *context = new_context();
    moe_layer *layer = make_layer(context, 0, 0, MOE_DTYPE_F32, 0, NULL, 4, 4);
    moe_layer *five = make_layer(context, 0, 0, MOE_DTYPE_F32, 0, NULL, 5, 5);
    moe_layer *more = make_layer(context, 0, 0, MOE_DTYPE_F32, 1, NULL, 4, 4);
    moe_load_options o;
    moe_load_report report;
    MUST(moe_load_options_init(&o, sizeof o));
    MUST(moe_load_report_init(&report, sizeof report));
    save(files_path("a"), "x.", layer);
    moe_checkpoint_item item = item_of("x.", five);
    uint64_t before = hash_of(five);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_checkpoint_load(files_path("a"), &item, 1, NULL, NULL));
    ck_assert_msg(strstr(moe_last_error(), "x.gate.weight should have shape [3,5] and has [3,4]") !=
                      NULL,
                  "%s", moe_last_error());
    ck_assert_uint_eq(hash_of(five), before);
    item.layer = more, before = hash_of(more);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_checkpoint_load(files_path("a"), &item, 1, NULL, NULL));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "the file has no x.shared.0.w1"));
    ck_assert_uint_eq(hash_of(more), before);
    o.lenient = 1, o.report = count_line;
    MUST(moe_checkpoint_load(files_path("a"), &item, 1, &o, &report));
    ck_assert(report.missing == 7 && report.unexpected == 0 && report.loaded == 26 && lines == 7);
    save(files_path("b"), "x.", more);
    item.layer = layer, before = hash_of(layer);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_checkpoint_load(files_path("b"), &item, 1, NULL, NULL));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "the file has x.shared.0.w1"));
    MUST(moe_checkpoint_load(files_path("b"), &item, 1, &o, &report));
    ck_assert(report.missing == 0 && report.unexpected == 7 && report.loaded == 26 && lines == 14);
    ck_assert_uint_eq(hash_of(layer), before);
    moe_layer_destroy(layer), moe_layer_destroy(five), moe_layer_destroy(more);
    moe_context_destroy(context);
}
END_TEST

START_TEST(test_checkpoint_calls_refuse)
{
    moe_context *context = new_context();
    moe_layer *layer = make_layer(context, 0, 0, MOE_DTYPE_F32, 0, NULL, 4, 4);
    const char *path = files_path("a"), *keys[2] = {"a", "a"}, *texts[2] = {"b", "c"};
    moe_checkpoint_item good = item_of("x.", layer), items[2] = {good, good}, bad;
    moe_save_options o, defaults;
    moe_load_options l, load_defaults;
    float x = 0;
    MUST(moe_save_options_init(&defaults, sizeof defaults));
    MUST(moe_load_options_init(&load_defaults, sizeof load_defaults));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_checkpoint_save(NULL, &good, 1, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_checkpoint_save(path, NULL, 1, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_checkpoint_save(path, &good, 0, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_checkpoint_save(path, items, 2, NULL));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "two tensors have the name x.experts.0.b1"));
#define BAD_ITEM(change) \
    bad = good;          \
    change;              \
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_checkpoint_save(path, &bad, 1, NULL))
    BAD_ITEM(bad.name = NULL);
    BAD_ITEM(bad.name = "a\nb");
    BAD_ITEM(bad.name = "a\xff");
    BAD_ITEM((bad.layer = NULL, bad.data = &x, bad.name = ""));
    BAD_ITEM((bad.layer = NULL, bad.data = &x, bad.name = "__metadata__"));
    BAD_ITEM((bad.layer = NULL, bad.data = NULL));
    BAD_ITEM((bad.layer = NULL, bad.data = &x, bad.dims = 9));
    BAD_ITEM((bad.layer = NULL, bad.data = &x, bad.dims = -1));
    BAD_ITEM((bad.layer = NULL, bad.data = &x, bad.dtype = 7));
    BAD_ITEM((bad.layer = NULL, bad.data = &x, bad.dims = 1, bad.shape[0] = -1));
    bad = good, bad.layer = NULL, bad.data = &x, bad.dims = 2;
    bad.shape[0] = bad.shape[1] = (int64_t)1 << 40;
    REFUSED(MOE_ERROR_OVERFLOW, moe_checkpoint_save(path, &bad, 1, NULL));
    bad = good, bad.struct_size = 3;
    REFUSED(MOE_ERROR_STRUCT_SIZE, moe_checkpoint_save(path, &bad, 1, NULL));
    items[1].struct_size = 0;
    REFUSED(MOE_ERROR_STRUCT_SIZE, moe_checkpoint_save(path, items, 2, NULL));
#define BAD_SAVE(change) \
    o = defaults;        \
    change;              \
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_checkpoint_save(path, &good, 1, &o))
    BAD_SAVE(o.store_dtype = MOE_DTYPE_I32);
    BAD_SAVE(o.reserved = 1);
    BAD_SAVE(o.metadata_count = -1);
    BAD_SAVE(o.metadata_count = 1);
    BAD_SAVE((o.metadata_count = 2, o.metadata_keys = keys, o.metadata_values = texts));
    keys[0] = "libmoe.x";
    BAD_SAVE((o.metadata_count = 1, o.metadata_keys = keys, o.metadata_values = texts));
    keys[0] = "\xc0\x80";
    BAD_SAVE((o.metadata_count = 1, o.metadata_keys = keys, o.metadata_values = texts));
    ck_assert_int_eq(files_count(0), 0);
    save(path, "x.", layer);
#define BAD_LOAD(change) \
    l = load_defaults;   \
    change;              \
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_checkpoint_load(path, &good, 1, &l, NULL))
    BAD_LOAD(l.lenient = 2);
    BAD_LOAD(l.convert = -1);
    BAD_LOAD(l.write_bound = 3);
    BAD_LOAD(l.reserved = 1);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_checkpoint_load(NULL, &good, 1, NULL, NULL));
    REFUSED(MOE_ERROR_SYSTEM, moe_checkpoint_load(files_path("no"), &good, 1, NULL, NULL));
    moe_layer_destroy(layer), moe_context_destroy(context);
}
END_TEST

START_TEST(test_checkpoint_keeps_the_mode_of_the_file)
{
    moe_context *context = new_context();
    moe_layer *layer = make_layer(context, 0, 0, MOE_DTYPE_F32, 0, NULL, 4, 4);
    struct stat status;
    save(files_path("a"), "x.", layer);
    ck_assert_int_eq(chmod(files_path("a"), 0600), 0);
    save(files_path("a"), "x.", layer);
    ck_assert_int_eq(stat(files_path("a"), &status), 0);
    ck_assert_int_eq(status.st_mode & 0777, 0600);
    moe_layer_destroy(layer), moe_context_destroy(context);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("io");
    TCase *c = tcase_create("checkpoint");
    tcase_set_timeout(c, 300);
    tcase_add_checked_fixture(c, files_begin, files_end);
    tcase_add_loop_test(c, test_checkpoint_of_every_kind_comes_back, 0, KINDS);
    tcase_add_test(c, test_checkpoint_has_the_documented_names_and_order);
    tcase_add_test(c, test_checkpoint_holds_what_belongs_to_training);
    tcase_add_test(c, test_checkpoint_of_another_dtype);
    tcase_add_loop_test(c, test_checkpoint_of_a_16_bit_layer, 0, 2);
    tcase_add_test(c, test_checkpoint_of_a_pool_of_parts);
    tcase_add_test(c, test_checkpoint_honours_bindings);
    tcase_add_test(c, test_checkpoint_is_the_same_for_any_number_of_ranks);
    tcase_add_test(c, test_checkpoint_of_secondary_gates_with_their_groups);
    tcase_add_test(c, test_checkpoint_has_one_verdict);
    tcase_add_test(c, test_checkpoint_refuses_what_does_not_fit);
    tcase_add_test(c, test_checkpoint_calls_refuse);
    tcase_add_test(c, test_checkpoint_keeps_the_mode_of_the_file);
    suite_add_tcase(suite, c);
    return run_suite(suite, 1);
}
