/* check_io_import.c - models of each family, made by hand, into layers of every layout: element by
 * element and by a forward against plain loops; and out again. */
#include "support/files.h"
#include "support/layer_case.h"
#include "support/model_file.h"
#include "support/suite.h"

#include <moe/io.h>

#include <check.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>

/* Adds a bf16 tensor of `count` numbers, to be filled. */
static uint16_t *add(files_maker *m, const char *shape, size_t count, const char *format, ...)
{
    char name[200];
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(name, sizeof name, format, arguments);
    va_end(arguments);
    return files_add(m, name, "BF16", shape, 2 * count);
}

/* A matrix [out,in], or [in,out], of numbers. */
static void matrix(files_maker *m, int tensor, int64_t e, int64_t out, int64_t in, const char *name)
{
    char shape[40];
    (void)snprintf(shape, sizeof shape, "%d,%d", (int)out, (int)in);
    uint16_t *x = files_add(m, name, "BF16", shape, (size_t)(2 * out * in));
    for (int64_t j = 0; j < out; j++)
        for (int64_t i = 0; i < in; i++) x[j * in + i] = bf16(number(tensor, e, j, i));
}

static char *name_of(const char *format, ...)
{
    static char names[4][200];
    static int next;
    char *name = names[next++ % 4];
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(name, 200, format, arguments);
    va_end(arguments);
    return name;
}

/* ---- families -------------------------------------------------------------------------------- */

/* Experts 0 to count - 1 with a name for each of three matrices. */
static void experts(files_maker *m, const char *prefix, const char *w1, const char *w3,
                    const char *w2, int64_t first, int64_t count)
{
    for (int64_t e = first; e < first + count; e++) {
        matrix(m, W1, e, F, D, name_of("%s.experts.%d.%s.weight", prefix, (int)e, w1));
        matrix(m, W3, e, F, D, name_of("%s.experts.%d.%s.weight", prefix, (int)e, w3));
        matrix(m, W2, e, D, F, name_of("%s.experts.%d.%s.weight", prefix, (int)e, w2));
    }
}

/* n shared experts side by side: [nF,D], [nF,D], [D,nF]. */
static void side_by_side(files_maker *m, const char *prefix, int64_t n)
{
    char shape[40];
    const char *names[3] = {"gate_proj", "up_proj", "down_proj"};
    for (int k = 0; k < 3; k++) {
        int64_t out = k == 2 ? D : n * F, in = k == 2 ? n * F : D;
        (void)snprintf(shape, sizeof shape, "%d,%d", (int)out, (int)in);
        uint16_t *x = add(m, shape, (size_t)(out * in), "%s.%s.weight", prefix, names[k]);
        for (int64_t j = 0; j < out; j++)
            for (int64_t i = 0; i < in; i++) {
                int64_t e = k == 2 ? i / F : j / F;
                x[j * in + i] = bf16(number(S1 + k, e, k == 2 ? j : j % F, k == 2 ? i % F : i));
            }
    }
}

static void vector(files_maker *m, int tensor, int64_t n, const char *shape, const char *name)
{
    uint16_t *x = add(m, shape, (size_t)n, "%s", name);
    for (int64_t i = 0; i < n; i++) x[i] = bf16(number(tensor, 0, i, 0));
}

static void make_mixtral(files_maker *m, int64_t first, int64_t count)
{
    const char *p = "model.layers.3.block_sparse_moe";
    if (first == 0) matrix(m, GATE, 0, E, D, name_of("%s.gate.weight", p));
    experts(m, p, "w1", "w3", "w2", first, count);
}

static void make_mlp(files_maker *m, int64_t first, int64_t count)
{
    const char *p = "model.layers.3.mlp";
    if (first == 0) matrix(m, GATE, 0, E, D, name_of("%s.gate.weight", p));
    experts(m, p, "gate_proj", "up_proj", "down_proj", first, count);
}

static void make_gpt_oss(files_maker *m, int mx)
{
    const char *p = "model.layers.3.mlp";
    matrix(m, GATE, 0, E, D, name_of("%s.router.weight", p));
    vector(m, GATE_BIAS, E, "4", name_of("%s.router.bias", p));
    uint16_t *b = add(m, "4,64", E * 2 * F, "%s.experts.gate_up_proj_bias", p);
    for (int64_t n = 0; n < E * 2 * F; n++)
        b[n] = bf16(number(n % 2 ? B3 : B1, n / (2 * F), n % (2 * F) / 2, 0));
    b = add(m, "4,64", E * D, "%s.experts.down_proj_bias", p);
    for (int64_t n = 0; n < E * D; n++) b[n] = bf16(number(B2, n / D, n % D, 0));
    if (mx) return;
    uint16_t *x = add(m, "4,64,64", E * D * 2 * F, "%s.experts.gate_up_proj", p);
    for (int64_t n = 0; n < E * D * 2 * F; n++)
        x[n] = bf16(number(n % 2 ? W3 : W1, n / (2 * F * D), n % (2 * F) / 2, n / (2 * F) % D));
    x = add(m, "4,32,64", E * F * D, "%s.experts.down_proj", p);
    for (int64_t n = 0; n < E * F * D; n++) x[n] = bf16(number(W2, n / (F * D), n % D, n / D % F));
}

/* ---- what a layer has ------------------------------------------------------------------------ */

static void check_tensor(const moe_layer *layer, const setup *s, int tensor, int64_t first,
                         int64_t count, int64_t out, int64_t in)
{
    tensor_place p = find_tensor(layer, s, tensor);
    for (int64_t e = first; e < first + count; e++)
        for (int64_t j = 0; j < out; j++)
            for (int64_t i = 0; i < in; i++) {
                double got = element_of(&p, e - first, j, i);
                double want = (double)number(tensor, e, j, i);
                if (got != want)
                    ck_abort_msg("tensor %d [%d,%d,%d] is %g, not %g", tensor, (int)e, (int)j,
                                 (int)i, got, want);
            }
}

static void check_layer(const moe_layer *layer, const setup *s, int64_t first, int64_t count)
{
    check_tensor(layer, s, GATE, 0, 1, E, D);
    check_tensor(layer, s, W1, first, count, F, D), check_tensor(layer, s, W3, first, count, F, D);
    check_tensor(layer, s, W2, first, count, D, F);
    if (s->bias) {
        check_tensor(layer, s, B1, first, count, F, 1);
        check_tensor(layer, s, B3, first, count, F, 1);
        check_tensor(layer, s, B2, first, count, D, 1);
    }
    if (s->gate_bias) check_tensor(layer, s, GATE_BIAS, 0, 1, E, 1);
    if (s->selection_bias) check_tensor(layer, s, SELECTION, 0, 1, E, 1);
    if (s->shared_gate) check_tensor(layer, s, SHARED_GATE, 0, 1, D, 1);
    if (s->shared) {
        check_tensor(layer, s, S1, 0, s->shared, F, D);
        check_tensor(layer, s, S3, 0, s->shared, F, D);
        check_tensor(layer, s, S2, 0, s->shared, D, F);
    }
}

/* ---- a forward by plain loops ---------------------------------------------------------------- */

/* y += weight times an expert of the numbers: W1, W3, W2 at tensor. */
static void expert_forward(double *y, const double *x, double weight, int tensor, int64_t e,
                           int bias)
{
    double h[F];
    for (int64_t f = 0; f < F; f++) {
        double g = bias ? (double)number(B1, e, f, 0) : 0,
               u = bias ? (double)number(B3, e, f, 0) : 0;
        for (int64_t d = 0; d < D; d++) {
            g += x[d] * (double)number(tensor, e, f, d);
            u += x[d] * (double)number(tensor + 1, e, f, d);
        }
        h[f] = silu(g) * u;
    }
    for (int64_t d = 0; d < D; d++) {
        double z = bias ? (double)number(B2, e, d, 0) : 0;
        for (int64_t f = 0; f < F; f++) z += h[f] * (double)number(tensor + 2, e, d, f);
        y[d] += weight * z;
    }
}

static void plain_forward(double *y, const double *x, const setup *s)
{
    double logit[E], sum = 0, most = -1e300, kept = 0, p[E];
    for (int e = 0; e < E; e++) {
        logit[e] = s->gate_bias ? (double)number(GATE_BIAS, 0, e, 0) : 0;
        for (int d = 0; d < D; d++) logit[e] += x[d] * (double)number(GATE, 0, e, d);
        most = fmax(most, logit[e]);
    }
    for (int e = 0; e < E; e++) sum += p[e] = exp(logit[e] - most);
    int chosen[E] = {0};
    for (int k = 0; k < K; k++) {
        int best = -1;
        double high = -1e300;
        for (int e = 0; e < E; e++) {
            double score = p[e] / sum +
                           (s->selection_bias ? (double)number(SELECTION, 0, e, 0) : 0);
            if (!chosen[e] && score > high) best = e, high = score;
        }
        chosen[best] = 1, kept += p[best] / sum;
    }
    for (int d = 0; d < D; d++) y[d] = 0;
    for (int e = 0; e < E; e++)
        if (chosen[e]) expert_forward(y, x, p[e] / sum / kept, W1, e, s->bias);
    double factor = 1, dot = 0;
    for (int d = 0; d < D && s->shared_gate; d++)
        dot += x[d] * (double)number(SHARED_GATE, 0, d, 0);
    if (s->shared_gate) factor = 1 / (1 + exp(-dot));
    for (int e = 0; e < s->shared; e++) expert_forward(y, x, factor, S1, e, 0);
}

static void check_forward(moe_layer *layer, const setup *s)
{
    double x[T * D], y[T * D], want[D];
    uint64_t state = 5;
    moe_pass *pass = NULL;
    moe_forward_args f;
    for (int i = 0; i < T * D; i++) x[i] = random_normal(&state) / 4;
    MUST(moe_pass_create(&pass, layer, NULL));
    MUST(moe_forward_args_init(&f, sizeof f));
    f.tokens = T, f.x = x, f.y = y;
    MUST(moe_layer_forward(layer, pass, &f));
    for (int t = 0; t < T; t++) {
        plain_forward(want, x + t * D, s);
        for (int d = 0; d < D; d++) ck_assert_double_eq_tol(y[t * D + d], want[d], 1e-12);
    }
    moe_pass_destroy(pass);
}

/* Into layers of every layout and GLU order; out again and in once more. */
static void import_all(const char *path, int32_t family, setup s)
{
    moe_context *context = new_context();
    moe_file *file = NULL;
    MUST(moe_file_open(&file, path));
    for (int way = 0; way < 8; way++) {
        s.layout = way % 2, s.glu_order = way / 2, s.dtype = MOE_DTYPE_F64;
        moe_layer *layer = make_layer(context, &s);
        MUST(moe_import(layer, file, family, 3, NULL));
        check_layer(layer, &s, 0, E);
        check_forward(layer, &s);
        moe_save_options o;
        moe_file *again = NULL;
        MUST(moe_save_options_init(&o, sizeof o));
        o.store_dtype = MOE_DTYPE_BF16;
        MUST(moe_export(files_path("exported"), layer, family, 8, NULL, &o));
        MUST(moe_file_open(&again, files_path("exported")));
        s.dtype = MOE_DTYPE_F32, s.layout = !s.layout, s.glu_order = (s.glu_order + 1) % 4;
        moe_layer *other = make_layer(context, &s);
        MUST(moe_import(other, again, family, 8, NULL));
        check_layer(other, &s, 0, E);
        moe_file_close(again), moe_layer_destroy(layer), moe_layer_destroy(other);
    }
    moe_file_close(file), moe_context_destroy(context);
}

START_TEST(test_import_of_mixtral)
{
    files_maker m = {.used = 0};
    make_mixtral(&m, 0, E), files_finish(&m, files_path("m"));
    import_all(files_path("m"), MOE_FAMILY_MIXTRAL, (setup){0});
}
END_TEST

START_TEST(test_import_of_qwen3_moe)
{
    files_maker m = {.used = 0};
    make_mlp(&m, 0, E), files_finish(&m, files_path("m"));
    import_all(files_path("m"), MOE_FAMILY_QWEN3_MOE, (setup){0});
}
END_TEST

START_TEST(test_import_of_qwen2_moe)
{
    files_maker m = {.used = 0};
    make_mlp(&m, 0, E), side_by_side(&m, "model.layers.3.mlp.shared_expert", 1);
    vector(&m, SHARED_GATE, D, "1,64", "model.layers.3.mlp.shared_expert_gate.weight");
    files_finish(&m, files_path("m"));
    import_all(files_path("m"), MOE_FAMILY_QWEN2_MOE, (setup){.shared = 1, .shared_gate = 1});
}
END_TEST

START_TEST(test_import_of_deepseek_v3)
{
    files_maker m = {.used = 0};
    make_mlp(&m, 0, E), side_by_side(&m, "model.layers.3.mlp.shared_experts", 2);
    vector(&m, SELECTION, E, "4", "model.layers.3.mlp.gate.e_score_correction_bias");
    files_finish(&m, files_path("m"));
    import_all(files_path("m"), MOE_FAMILY_DEEPSEEK_V3, (setup){.shared = 2, .selection_bias = 1});
}
END_TEST

START_TEST(test_import_of_gpt_oss)
{
    files_maker m = {.used = 0};
    make_gpt_oss(&m, 0), files_finish(&m, files_path("m"));
    import_all(files_path("m"), MOE_FAMILY_GPT_OSS, (setup){.bias = 1, .gate_bias = 1});
}
END_TEST

/* ---- quantised ------------------------------------------------------------------------------- */

/* Numbers of four bits with a scale for 32: blocks [E,out,in/32,16] and scales [E,out,in/32]. */
static const double FOUR[16] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.0, -.5, -1, -1.5, -2, -3, -4, -6};
static int nibble(int64_t n) { return (int)((uint64_t)n * 2654435761u >> 7 & 15); }
static int scale_byte(int64_t n) { return 120 + (int)(n % 11); }
static double four(int64_t n) { return ldexp(FOUR[nibble(n)], scale_byte(n / 32) - 127); }

START_TEST(test_import_of_mxfp4)
{
    files_maker m = {.used = 0};
    moe_context *context = new_context();
    moe_file *file = NULL;
    const char *names[2] = {"gate_up_proj", "down_proj"};
    const char *blocks[2] = {"4,64,2,16", "4,64,1,16"}, *scales[2] = {"4,64,2", "4,64,1"};
    make_gpt_oss(&m, 1);
    for (int k = 0; k < 2; k++) {
        int64_t count = E * 64 * (k ? F : D);
        uint8_t *b = files_add(&m, name_of("model.layers.3.mlp.experts.%s_blocks", names[k]), "U8",
                               blocks[k], (size_t)count / 2);
        for (int64_t n = 0; n < count; n++)
            b[n / 2] = (uint8_t)(n % 2 ? b[n / 2] | nibble(n) << 4 : nibble(n));
        uint8_t *c = files_add(&m, name_of("model.layers.3.mlp.experts.%s_scales", names[k]), "U8",
                               scales[k], (size_t)count / 32);
        for (int64_t n = 0; n < count / 32; n++) c[n] = (uint8_t)scale_byte(n);
    }
    files_finish(&m, files_path("m"));
    MUST(moe_file_open(&file, files_path("m")));
    for (int way = 0; way < 8; way++) {
        setup s = {.layout = way % 2,
                   .glu_order = way / 2,
                   .bias = 1,
                   .gate_bias = 1,
                   .dtype = way % 3 ? MOE_DTYPE_F32 : MOE_DTYPE_F64};
        moe_layer *layer = make_layer(context, &s);
        MUST(moe_import(layer, file, MOE_FAMILY_GPT_OSS, 3, NULL));
        tensor_place w1 = find_tensor(layer, &s, W1), w3 = find_tensor(layer, &s, W3),
                     w2 = find_tensor(layer, &s, W2);
        for (int64_t e = 0; e < E; e++)
            for (int64_t f = 0; f < F; f++)
                for (int64_t d = 0; d < D; d++) {
                    int64_t g = (e * 64 + 2 * f) * D + d, u = g + D, w = (e * D + d) * F + f;
                    int same = element_of(&w1, e, f, d) == four(g) &&
                               element_of(&w3, e, f, d) == four(u) &&
                               element_of(&w2, e, d, f) == four(w);
                    if (!same) ck_abort_msg("expert %d, %d, %d", (int)e, (int)f, (int)d);
                }
        moe_layer_destroy(layer);
    }
    moe_file_close(file), moe_context_destroy(context);
}
END_TEST

static double eight(int bits)
{
    int e = bits >> 3 & 15, m = bits & 7;
    double x = e ? ldexp(1 + m / 8.0, e - 7) : ldexp(m / 8.0, -6);
    return bits & 128 ? -x : x;
}

/* F8_E4M3 with a scale for 128 x 128, of a width that is no multiple. */
START_TEST(test_import_of_f8)
{
    enum { WIDE = 200, HIDDEN = 136 };
    files_maker m = {.used = 0};
    moe_context *context = new_context();
    moe_file *file = NULL;
    setup s = {.d_model = WIDE, .width = HIDDEN, .dtype = MOE_DTYPE_F64, .layout = 1};
    const char *names[3] = {"gate_proj", "up_proj", "down_proj"};
    const int tensors[3] = {W1, W3, W2};
    float *g = files_add(&m, "model.layers.0.mlp.gate.weight", "F32", "4,200", 4 * E * WIDE);
    for (int i = 0; i < E * WIDE; i++) g[i] = 0;
    for (int e = 0; e < E; e++)
        for (int k = 0; k < 3; k++) {
            uint8_t *x = files_add(&m,
                                   name_of("model.layers.0.mlp.experts.%d.%s.weight", e, names[k]),
                                   "F8_E4M3", k == 2 ? "200,136" : "136,200", WIDE * HIDDEN);
            for (int i = 0; i < WIDE * HIDDEN; i++) x[i] = (uint8_t)((i * 7 + e + k) % 127);
        }
    for (int e = 0; e < E; e++) /* aligned for floats: the bytes so far are a multiple of 4 */
        for (int k = 0; k < 3; k++) {
            float *c = files_add(
                &m, name_of("model.layers.0.mlp.experts.%d.%s.weight_scale_inv", e, names[k]),
                "F32", "2,2", 16);
            for (int i = 0; i < 4; i++) c[i] = (float)(1 + i + e) / 8;
        }
    files_finish(&m, files_path("m"));
    MUST(moe_file_open(&file, files_path("m")));
    moe_layer *layer = make_layer(context, &s);
    MUST(moe_import(layer, file, MOE_FAMILY_DEEPSEEK_V3, 0, NULL));
    for (int e = 0; e < E; e++)
        for (int k = 0; k < 3; k++) {
            int rows = k == 2 ? WIDE : HIDDEN, cols = k == 2 ? HIDDEN : WIDE;
            tensor_place p = find_tensor(layer, &s, tensors[k]);
            for (int j = 0; j < rows; j++)
                for (int i = 0; i < cols; i++) {
                    double scale = (1 + j / 128 * 2 + i / 128 + e) / 8.0;
                    double want = scale * eight(((j * cols + i) * 7 + e + k) % 127);
                    if (element_of(&p, e, j, i) != want)
                        ck_abort_msg("matrix %d of expert %d, %d, %d", k, e, j, i);
                }
        }
    moe_layer_destroy(layer), moe_file_close(file), moe_context_destroy(context);
}
END_TEST

/* ---- shards, ranks, names of one's own ------------------------------------------------------- */

static void make_sharded(void)
{
    files_maker m = {.used = 0};
    char index[8192];
    size_t used = 0;
    const char *w[3] = {"w1", "w3", "w2"};
    make_mixtral(&m, 0, 2), files_finish(&m, files_path("m-1.safetensors"));
    make_mixtral(&m, 2, 2), files_finish(&m, files_path("m-2.safetensors"));
    used += (size_t)snprintf(index, sizeof index,
                             "{\"weight_map\":{\"%s.gate.weight\":"
                             "\"m-1.safetensors\"",
                             "model.layers.3.block_sparse_moe");
    for (int e = 0; e < E; e++)
        for (int k = 0; k < 3; k++)
            used += (size_t)snprintf(index + used, sizeof index - used,
                                     ",\"model.layers.3.block_sparse_moe.experts.%d.%s.weight\":"
                                     "\"m-%d.safetensors\"",
                                     e, w[k], 1 + e / 2);
    used += (size_t)snprintf(index + used, sizeof index - used, "}}");
    files_write(files_path("model.safetensors.index.json"), index, used);
}

typedef struct part {
    moe_world *world;
    int32_t rank;
    moe_status status;
} part;

static void *part_thread(void *argument)
{
    static const int64_t first[3] = {0, 1, 3}, local[3] = {1, 2, 1};
    part *p = argument;
    moe_context *context = new_context();
    moe_comm *comm = NULL;
    moe_file *file = NULL;
    MUST(moe_comm_create_in_world(&comm, p->world, context, p->rank, 120));
    setup s = {.layout = p->rank % 2, .glu_order = p->rank, .comm = comm, .local = local[p->rank]};
    moe_layer *layer = make_layer(context, &s);
    MUST(moe_file_open(&file, files_directory));
    p->status = moe_import(layer, file, MOE_FAMILY_MIXTRAL, 3, NULL);
    if (p->status == MOE_OK) check_layer(layer, &s, first[p->rank], local[p->rank]);
    MUST(moe_export(files_path("exported"), layer, MOE_FAMILY_MIXTRAL, 3, NULL, NULL));
    moe_file_close(file), moe_layer_destroy(layer), moe_comm_destroy(comm);
    moe_context_destroy(context);
    return NULL;
}

START_TEST(test_import_of_shards_on_ranks)
{
    moe_context *context = new_context();
    moe_world *world = NULL;
    pthread_t thread[3];
    part parts[3];
    make_sharded();
    import_all(files_directory, MOE_FAMILY_MIXTRAL, (setup){0});
    (void)unlink(files_path("exported"));
    MUST(moe_world_create(&world, context, 3));
    for (int32_t r = 0; r < 3; r++) {
        parts[r] = (part){.world = world, .rank = r};
        ck_assert_int_eq(pthread_create(&thread[r], NULL, part_thread, &parts[r]), 0);
    }
    for (int32_t r = 0; r < 3; r++) {
        ck_assert_int_eq(pthread_join(thread[r], NULL), 0);
        ck_assert_int_eq(parts[r].status, MOE_OK);
    }
    setup s = {0};
    moe_layer *layer = make_layer(context, &s);
    moe_file *file = NULL;
    MUST(moe_file_open(&file, files_directory));
    MUST(moe_import(layer, file, MOE_FAMILY_MIXTRAL, 3, NULL));
    moe_file_close(file);
    MUST(moe_export(files_path("whole"), layer, MOE_FAMILY_MIXTRAL, 3, NULL, NULL));
    ck_assert(files_equal(files_path("whole"), files_path("exported")));
    moe_layer_destroy(layer), moe_world_destroy(world), moe_context_destroy(context);
}
END_TEST

/* Stacked, up before gate, and [in,out]. */
START_TEST(test_names_of_ones_own)
{
    moe_context *context = new_context();
    moe_tensor_names n;
    moe_import_options o;
    for (int way = 0; way < 12; way++) {
        setup s = {.layout = way % 2, .glu_order = way % 4, .bias = 1, .shared = 2};
        setup other = {.layout = !s.layout, .glu_order = 3 - s.glu_order, .bias = 1, .shared = 2};
        moe_layer *a = make_layer(context, &s), *b = make_layer(context, &other);
        moe_file *file = NULL;
        MUST(moe_layer_init_parameters(a, 4));
        MUST(moe_tensor_names_init(&n, sizeof n));
        n.gate = "{layer}/router", n.w13 = way < 6 ? "{layer}/up_gate" : "{layer}/{expert}/up_gate";
        n.b13 = "{layer}/{expert}/b13", n.w2 = "{layer}/down", n.b2 = "{layer}/down_bias";
        n.shared_w1 = way < 6 ? "s/{expert}/1" : "s/1", n.shared_w3 = "s/3", n.shared_w2 = "s/2";
        n.weight_layout = way % 3 == 0, n.glu_order = 1 + way % 3;
        MUST(moe_export(files_path("m"), a, 0, 12, &n, NULL));
        MUST(moe_file_open(&file, files_path("m")));
        ck_assert_int_ge(moe_file_find(file, "12/router"), 0);
        MUST(moe_import_options_init(&o, sizeof o));
        o.names = &n;
        MUST(moe_import(b, file, -1, 12, &o));
        for (int t = W1; t <= B2; t++)
            for (int64_t e = 0; e < E; e++)
                for (int64_t j = 0; j < F; j++)
                    ck_assert(element(a, &s, t, e, j, j % 9 * (t <= W2)) ==
                              element(b, &other, t, e, j, j % 9 * (t <= W2)));
        for (int t = S1; t <= S2; t++)
            for (int64_t e = 0; e < 2; e++)
                for (int64_t j = 0; j < F; j++)
                    ck_assert(element(a, &s, t, e, j, j % 9) == element(b, &other, t, e, j, j % 9));
        moe_file_close(file), moe_layer_destroy(a), moe_layer_destroy(b);
    }
    moe_context_destroy(context);
}
END_TEST

/* ---- refused --------------------------------------------------------------------------------- */

static void not_imported(moe_context *context, const setup *s, int32_t family, const char *why)
{
    moe_file *file = NULL;
    moe_layer *layer = make_layer(context, s);
    MUST(moe_layer_init_parameters(layer, 5));
    MUST(moe_file_open(&file, files_path("m")));
    uint64_t before = hash_of(layer);
    moe_status status = moe_import(layer, file, family, 3, NULL);
    ck_assert_msg(status == MOE_ERROR_INVALID_ARGUMENT && strstr(moe_last_error(), why),
                  "not \"%s\": %s", why, moe_last_error());
    ck_assert_uint_eq(hash_of(layer), before);
    moe_file_close(file), moe_layer_destroy(layer);
}

START_TEST(test_import_refuses_what_does_not_fit)
{
    files_maker m = {.used = 0};
    moe_context *context = new_context();
    make_mixtral(&m, 0, E), files_finish(&m, files_path("m"));
    not_imported(context, &(setup){.experts = 5}, MOE_FAMILY_MIXTRAL,
                 "gate.weight should have shape [5,64] and has [4,64]");
    not_imported(context, &(setup){.width = 33}, MOE_FAMILY_MIXTRAL,
                 "w1.weight should have shape [33,64] and has [32,64]");
    not_imported(context, &(setup){.d_model = 60}, MOE_FAMILY_MIXTRAL, "should have shape [4,60]");
    not_imported(context, &(setup){.bias = 1}, MOE_FAMILY_MIXTRAL,
                 "nothing for the layer's experts.b1");
    not_imported(context, &(setup){.gate_bias = 1}, MOE_FAMILY_MIXTRAL,
                 "nothing for the layer's gate.bias");
    not_imported(context, &(setup){.shared = 1}, MOE_FAMILY_MIXTRAL, "shared.w1");
    not_imported(context, &(setup){.activation = MOE_ACTIVATION_SILU}, MOE_FAMILY_MIXTRAL,
                 "experts.0.w3.weight, the layer has no parameter for it");
    not_imported(context, &(setup){0}, MOE_FAMILY_QWEN3_MOE,
                 "the file has no model.layers.3.mlp.gate.weight");
    not_imported(context, &(setup){0}, 99, "family is 99");
    make_mlp(&m, 0, E), side_by_side(&m, "model.layers.3.mlp.shared_experts", 2);
    vector(&m, SELECTION, E, "4", "model.layers.3.mlp.gate.e_score_correction_bias");
    files_finish(&m, files_path("m"));
    not_imported(context, &(setup){.shared = 2}, MOE_FAMILY_DEEPSEEK_V3, "e_score_correction_bias");
    not_imported(context, &(setup){.selection_bias = 1}, MOE_FAMILY_DEEPSEEK_V3,
                 "shared_experts.gate_proj.weight, the layer has no parameter for it");
    not_imported(context, &(setup){.selection_bias = 1, .shared = 3}, MOE_FAMILY_DEEPSEEK_V3,
                 "should have shape [96,64] and has [64,64]");
    make_gpt_oss(&m, 0), files_finish(&m, files_path("m"));
    not_imported(context, &(setup){.gate_bias = 1}, MOE_FAMILY_GPT_OSS, "_bias, the layer has no");
    not_imported(context, &(setup){.activation = MOE_ACTIVATION_SILU, .gate_bias = 1, .bias = 1},
                 MOE_FAMILY_GPT_OSS, "are not gated");
    make_gpt_oss(&m, 1), files_finish(&m, files_path("m"));
    not_imported(context, &(setup){.gate_bias = 1, .bias = 1}, MOE_FAMILY_GPT_OSS,
                 "the file has no model.layers.3.mlp.experts.gate_up_proj");
    make_gpt_oss(&m, 1);
    (void)files_add(&m, "model.layers.3.mlp.experts.gate_up_proj_blocks", "U8", "4,64,1,16", 4096);
    (void)files_add(&m, "model.layers.3.mlp.experts.gate_up_proj_scales", "U8", "4,64,1", 256);
    files_finish(&m, files_path("m"));
    not_imported(context, &(setup){.gate_bias = 1, .bias = 1}, MOE_FAMILY_GPT_OSS,
                 "gate_up_proj_blocks should have shape [4,64,2,16] and has [4,64,1,16]");
    make_mixtral(&m, 0, E), experts(&m, "model.layers.3.block_sparse_moe", "w1", "w3", "w2", E, 1);
    files_finish(&m, files_path("m"));
    not_imported(context, &(setup){0}, MOE_FAMILY_MIXTRAL,
                 "experts.4.w1.weight, the layer has 4 experts");
    moe_context_destroy(context);
}
END_TEST

START_TEST(test_import_calls_refuse)
{
    moe_context *context = new_context();
    setup s = {0};
    moe_layer *layer = make_layer(context, &s);
    moe_tensor_names n;
    moe_import_options o;
    moe_file *file = NULL;
    files_maker m = {.used = 0};
    make_mixtral(&m, 0, E), files_finish(&m, files_path("m"));
    MUST(moe_file_open(&file, files_path("m")));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_import(NULL, file, 0, 3, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_import(layer, NULL, 0, 3, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_import(layer, file, 0, -1, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_export(NULL, layer, 0, 3, NULL, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_export("x", NULL, 0, 3, NULL, NULL));
    MUST(moe_tensor_names_init(&n, sizeof n));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_family_names(&n, 5));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_family_names(NULL, 0));
    MUST(moe_family_names(&n, MOE_FAMILY_MIXTRAL));
    MUST(moe_import_options_init(&o, sizeof o));
    o.names = &n;
    MUST(moe_import(layer, file, 0, 3, &o));
    n.gate = "{block}";
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_import(layer, file, 0, 3, &o));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "braces around something else"));
    n.gate = NULL;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_import(layer, file, 0, 3, &o));
    o.lenient = 1;
    MUST(moe_import(layer, file, 0, 3, &o));
    n.glu_order = 0;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_import(layer, file, 0, 3, &o));
    n.glu_order = 1, n.weight_layout = 2;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_import(layer, file, 0, 3, &o));
    n.weight_layout = 1, o.lenient = 2;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_import(layer, file, 0, 3, &o));
    moe_file_close(file), moe_layer_destroy(layer), moe_context_destroy(context);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("io_import");
    TCase *c = tcase_create("models");
    tcase_set_timeout(c, 300);
    tcase_add_checked_fixture(c, files_begin, files_end);
    tcase_add_test(c, test_import_of_mixtral);
    tcase_add_test(c, test_import_of_qwen3_moe);
    tcase_add_test(c, test_import_of_qwen2_moe);
    tcase_add_test(c, test_import_of_deepseek_v3);
    tcase_add_test(c, test_import_of_gpt_oss);
    tcase_add_test(c, test_import_of_mxfp4);
    tcase_add_test(c, test_import_of_f8);
    tcase_add_test(c, test_import_of_shards_on_ranks);
    tcase_add_test(c, test_names_of_ones_own);
    tcase_add_test(c, test_import_refuses_what_does_not_fit);
    tcase_add_test(c, test_import_calls_refuse);
    suite_add_tcase(suite, c);
    return run_suite(suite, 1);
}
