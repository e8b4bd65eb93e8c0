/* main.c - run_vectors: runs reference cases through the public calls of libmoe and compares.
 *
 *     run_vectors [--dtype f32|f64|both] [--threads N] [--isa plain|avx2|avx512]
 *                 [--layout NAME] [-v] PATH...
 *
 * A PATH is a case (a directory with case.txt) or a directory of cases. Every case with experts
 * runs in every weight layout and GLU order, or in the one --layout names. The last line is "N
 * passed, M failed, S skipped"; a case is skipped only if the library answered
 * MOE_ERROR_NOT_SUPPORTED. Ends with 0 if something passed and nothing failed. */
#include "run.h"

#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

typedef struct totals {
    int passed, failed, skipped;
} totals;

static const storage STORAGES[] = {
    {"in_out", MOE_WEIGHT_IN_OUT, MOE_GLU_SEPARATE, 0, MOE_STORAGE_ROW_MAJOR},
    {"out_in", MOE_WEIGHT_OUT_IN, MOE_GLU_SEPARATE, 0, MOE_STORAGE_ROW_MAJOR},
    {"gaps", MOE_WEIGHT_IN_OUT, MOE_GLU_SEPARATE, 1, MOE_STORAGE_ROW_MAJOR},
    {"gate_up", MOE_WEIGHT_IN_OUT, MOE_GLU_GATE_UP, 0, MOE_STORAGE_ROW_MAJOR},
    {"up_gate", MOE_WEIGHT_OUT_IN, MOE_GLU_UP_GATE, 1, MOE_STORAGE_ROW_MAJOR},
    {"interleaved", MOE_WEIGHT_OUT_IN, MOE_GLU_INTERLEAVED, 0, MOE_STORAGE_ROW_MAJOR},
#ifndef MOE_TEST_DEVICE
    {"prepacked", MOE_WEIGHT_IN_OUT, MOE_GLU_SEPARATE, 0, MOE_STORAGE_PREPACKED},
    {"panels", MOE_WEIGHT_OUT_IN, MOE_GLU_UP_GATE, 1, MOE_STORAGE_PANELS},
#endif
};

static const struct {
    const char *op;
    int (*run)(run *r);
    int has_experts;
} OPS[] = {{"cv", op_cv, 0},
           {"capacity", op_capacity, 0},
           {"gate_softmax", op_gate, 0},
           {"gate_noisy_topk", op_gate, 0},
           {"gate_balanced", op_balanced, 0},
           {"route_topk", op_route, 0},
           {"route_expert_choice", op_expert_choice, 0},
           {"aux_losses", op_aux_losses, 0},
           {"ffn_grouped", op_ffn_grouped, 1},
           {"moe_layer", op_layer, 1},
           {"moe_hier", op_hier, 1}};

/* ---- comparison ------------------------------------------------------------------------------ */

static const result *find_result(const run *r, const char *name)
{
    for (int i = 0; i < r->result_count; i++)
        if (strcmp(r->results[i].name, name) == 0) return &r->results[i];
    return NULL;
}

static double want_at(const tensor *t, int64_t i)
{
    return strcmp(t->dtype, "f64") == 0 ? ((const double *)t->data)[i]
                                        : (double)((const float *)t->data)[i];
}

static int compare_reals(run *r, const tensor *t, const result *got)
{
    double tolerance = r->o.dtype == MOE_DTYPE_F64 ? 1e-11 * t->maxabs + 1e-12
                                                   : 32 * t->f32err + 4e-6 * t->maxabs + 1e-8;
    double largest = 0;
    for (int64_t i = 0; i < t->count; i++) {
        double want = want_at(t, i), error = fabs(got->real[i] - want);
        int both_nan = isnan(want) && isnan(got->real[i]);
        if (both_nan || want == got->real[i]) continue;
        if (!(error <= tolerance))
            return run_fail(r, "%s[%lld] is %.17g, want %.17g, tolerance %.3g", t->name,
                            (long long)i, got->real[i], want, tolerance);
        largest = error > largest ? error : largest;
    }
    if (r->o.verbose) printf("    %-20s %.3g of %.3g allowed\n", t->name, largest, tolerance);
    return 0;
}

static int compare_tensor(run *r, const tensor *t)
{
    const result *got = find_result(r, t->name);
    int is_int = strcmp(t->dtype, "i32") == 0;
    if (!got) return run_fail(r, "no call gives the tensor %s", t->name);
    if (got->is_int != is_int || got->count != t->count)
        return run_fail(r, "%s has %lld elements, want %lld", t->name, (long long)got->count,
                        (long long)t->count);
    if (!is_int) return compare_reals(r, t, got);
    for (int64_t i = 0; i < t->count; i++)
        if (got->integer[i] != ((const int32_t *)t->data)[i])
            return run_fail(r, "%s[%lld] is %d, want %d", t->name, (long long)i,
                            (int)got->integer[i], (int)((const int32_t *)t->data)[i]);
    return 0;
}

static int compare(run *r)
{
    const vector_case *c = r->c;
    int bad = 0;
    for (int i = 0; i < c->tensors; i++) {
        if (strcmp(c->t[i].role, "out") == 0) {
            if (compare_tensor(r, &c->t[i]) != 0) bad++, printf("    %s\n", r->why);
        } else if (!c->t[i].used) {
            return run_fail(r, "input %s was not used", c->t[i].name);
        }
    }
    for (int i = 0; i < c->keys; i++)
        if (!c->key_used[i]) return run_fail(r, "option %s has no meaning here", c->key[i]);
    return bad ? run_fail(r, "%d tensors differ", bad) : 0;
}

/* ---- runs ------------------------------------------------------------------------------------ */

static int make_context(run *r)
{
    moe_context_config k;
    CALL(r, moe_context_config_init(&k, sizeof k));
    k.threads = r->o.threads;
    k.isa = r->o.isa;
    CALL(r, moe_context_create(&r->context, &k));
    return 0;
}

static void free_run(run *r)
{
    moe_pass_destroy(r->pass);
    moe_plan_destroy(r->plan);
    moe_layer_destroy(r->layer);
    moe_gate_destroy(r->gate);
    moe_experts_destroy(r->experts);
    moe_experts_destroy(r->shared);
    moe_experts_destroy(r->residual);
    moe_context_destroy(r->context);
    for (int i = 0; i < r->block_count; i++) free(r->blocks[i]);
}

/* Runs a case once; 0 passed, 1 failed, 2 skipped. */
static int run_once(vector_case *c, const run_options *o, int (*op)(run *), char why[1024])
{
    static run r; /* large, and one at a time */
    memset(&r, 0, sizeof r);
    r.c = c;
    r.o = *o;
    (void)(make_context(&r) == 0 && op(&r) == 0 && compare(&r) == 0);
    (void)snprintf(why, 1024, "%s", r.why);
    free_run(&r);
    return r.failed ? 1 : r.skipped ? 2 : 0;
}

/* A case in all storages its experts can have. */
static int run_case(vector_case *c, run_options o, char why[1024])
{
    const char *act = case_text(c, "act", "relu");
    int gated = strstr(act, "glu") != NULL;
    for (size_t i = 0; i < sizeof OPS / sizeof *OPS; i++) {
        if (strcmp(OPS[i].op, c->op) != 0) continue;
        for (size_t s = 0; s < sizeof STORAGES / sizeof *STORAGES; s++) {
            char inner[1024];
            int same = STORAGES[s].glu_order && !gated && !STORAGES[s].mode;
            if (s > 0 && (!OPS[i].has_experts || same)) continue;
            if (o.layout && OPS[i].has_experts && strcmp(o.layout, STORAGES[s].name) != 0) continue;
            o.storage = STORAGES[s];
            int outcome = run_once(c, &o, OPS[i].run, inner);
            if (outcome == 0) continue;
            (void)snprintf(why, 1024, "%.200s%s%.800s", s ? STORAGES[s].name : "", s ? ": " : "",
                           inner);
            return outcome;
        }
        return 0;
    }
    (void)snprintf(why, 1024, "unknown operation %s", c->op);
    return 1;
}

static void run_directory(const char *path, const run_options *o, int32_t dtypes, totals *sum)
{
    static vector_case c;
    char why[1024];
    if (case_read(&c, path, why) != 0 || case_check(&c, why) != 0) {
        printf("FAIL %s: %s\n", path, why);
        sum->failed++;
        case_free(&c);
        return;
    }
    for (int32_t dtype = MOE_DTYPE_F32; dtype <= MOE_DTYPE_F64; dtype++) {
        run_options one = *o;
        one.dtype = dtype;
        if (!(dtypes & (1 << dtype))) continue;
        int outcome = run_case(&c, one, why);
        const char *type = dtype == MOE_DTYPE_F64 ? "f64" : "f32";
        if (outcome == 0) sum->passed++;
        if (outcome == 1) sum->failed++;
        if (outcome == 2) sum->skipped++;
        if (outcome != 0)
            printf("%s %s %s: %s\n", outcome == 1 ? "FAIL" : "SKIP", c.name, type, why);
        if (outcome == 0) printf("PASS %s %s\n", c.name, type);
    }
    case_free(&c);
}

static int is_case(const char *path)
{
    char file[4096];
    struct stat s;
    (void)snprintf(file, sizeof file, "%s/case.txt", path);
    return stat(file, &s) == 0;
}

static void run_path(const char *path, const run_options *o, int32_t dtypes, totals *sum)
{
    struct dirent **entries;
    int before = sum->passed + sum->failed + sum->skipped;
    if (is_case(path)) {
        run_directory(path, o, dtypes, sum);
        return;
    }
    int count = scandir(path, &entries, NULL, alphasort);
    for (int i = 0; i < count; i++) {
        char child[4096];
        (void)snprintf(child, sizeof child, "%s/%s", path, entries[i]->d_name);
        if (entries[i]->d_name[0] != '.' && is_case(child)) run_directory(child, o, dtypes, sum);
        free(entries[i]);
    }
    if (count >= 0) free(entries);
    if (sum->passed + sum->failed + sum->skipped == before) {
        printf("FAIL %s: no case there\n", path);
        sum->failed++;
    }
}

/* ---- options --------------------------------------------------------------------------------- */

static int usage(void)
{
    fprintf(stderr,
            "usage: run_vectors [--dtype f32|f64|both] [--threads N] [--isa plain|avx2|avx512] "
            "[--layout NAME] [-v] PATH...\n");
    return 2;
}

static int read_option(const char *name, const char *value, run_options *o, int32_t *dtypes)
{
    if (strcmp(name, "--dtype") == 0) {
        *dtypes = strcmp(value, "f32") == 0 ? 1 : strcmp(value, "f64") == 0 ? 2 : 3;
        return *dtypes != 3 || strcmp(value, "both") == 0 ? 0 : -1;
    }
    if (strcmp(name, "--threads") == 0) return (o->threads = (int32_t)atoi(value)) > 0 ? 0 : -1;
    if (strcmp(name, "--layout") == 0) {
        for (size_t s = 0; s < sizeof STORAGES / sizeof *STORAGES; s++)
            if (strcmp(value, STORAGES[s].name) == 0) o->layout = STORAGES[s].name;
        return o->layout ? 0 : -1;
    }
    if (strcmp(name, "--isa") != 0) return -1;
    o->isa = strcmp(value, "plain") == 0    ? MOE_ISA_PLAIN
             : strcmp(value, "avx2") == 0   ? MOE_ISA_AVX2
             : strcmp(value, "avx512") == 0 ? MOE_ISA_AVX512
                                            : MOE_ISA_AUTO;
    return o->isa != MOE_ISA_AUTO ? 0 : -1;
}

int main(int argc, char **argv)
{
    run_options o = {0};
    int32_t dtypes = 3;
    totals sum = {0};
    int at = 1;
    for (; at < argc && argv[at][0] == '-'; at++) {
        if (strcmp(argv[at], "-v") == 0) {
            o.verbose = 1;
            continue;
        }
        if (at + 1 >= argc || read_option(argv[at], argv[at + 1], &o, &dtypes) != 0) return usage();
        at++;
    }
    if (at == argc) return usage();
    for (; at < argc; at++) run_path(argv[at], &o, dtypes, &sum);
    printf("%d passed, %d failed, %d skipped\n", sum.passed, sum.failed, sum.skipped);
    return sum.failed != 0 || sum.passed == 0;
}
