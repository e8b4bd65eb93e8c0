/* check_context.c - context.h and comm.h: config, memory, log, life, and how many threads there
 * are. */
#include "support/context_host.h"
#include "support/suite.h"

/* ---- config ---------------------------------------------------------------------------------- */

START_TEST(test_config_defaults)
{
    moe_context_config config;
    memset(&config, 0xaa, sizeof config);
    ck_assert_int_eq(moe_context_config_init(&config, sizeof config), MOE_OK);
    ck_assert_uint_eq(config.struct_size, sizeof config);
    ck_assert_int_eq(config.backend, MOE_BACKEND_CPU);
    ck_assert_int_eq(config.isa, MOE_ISA_AUTO);
    ck_assert_int_eq(config.threads, 0);
    ck_assert_int_eq(config.log_level, MOE_LOG_WARNING);
    ck_assert(!config.alloc && !config.free && !config.alloc_user && !config.parallel &&
              !config.parallel_user && !config.log && !config.log_user);
    ck_assert_int_eq(moe_context_config_init(NULL, sizeof config), MOE_ERROR_INVALID_ARGUMENT);
    memset(&config, 0xaa, sizeof config);
    ck_assert_int_eq(moe_context_config_init(&config, 0), MOE_ERROR_STRUCT_SIZE);
    ck_assert_int_eq(moe_context_config_init(&config, sizeof config - 8), MOE_ERROR_STRUCT_TOO_OLD);
    ck_assert_uint_eq(config.struct_size, 0xaaaaaaaaaaaaaaaau);
}
END_TEST

static void expect_refused(const moe_context_config *config, moe_status status, const char *word,
                           const char *value)
{
    moe_context *const untouched = (moe_context *)(uintptr_t)0x40;
    moe_context *context = untouched;
    moe_clear_last_error();
    ck_assert_int_eq(moe_context_create(&context, config), status);
    ck_assert_ptr_eq(context, untouched);
    ck_assert_msg(strncmp(moe_last_error(), "moe_context_create: ", 20) == 0, "%s",
                  moe_last_error());
    ck_assert_msg(strstr(moe_last_error(), word) != NULL, "%s", moe_last_error());
    ck_assert_msg(strstr(moe_last_error(), value) != NULL, "%s", moe_last_error());
}

static int32_t run_none(void *user, int64_t count, moe_task_fn task, void *argument)
{
    (void)user, (void)count, (void)task, (void)argument;
    return 0;
}

START_TEST(test_create_refused)
{
    const moe_status bad = MOE_ERROR_INVALID_ARGUMENT;
    host h;
    moe_context_config c;
    ck_assert_int_eq(moe_context_create(NULL, NULL), bad);
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "context is NULL"));
#define REFUSED(field, number, status, value) \
    c = config_of(2);                         \
    c.field = number;                         \
    expect_refused(&c, status, #field, value)
    REFUSED(backend, 2, bad, "2");
    REFUSED(backend, -1, bad, "-1");
    REFUSED(backend, MOE_BACKEND_CUDA, MOE_ERROR_NOT_SUPPORTED, "MOE_BACKEND_CUDA");
    REFUSED(isa, -7, bad, "-7");
    REFUSED(isa, MOE_ISA_AVX512 + 1, bad, "4");
    REFUSED(threads, -1, bad, "-1");
    REFUSED(threads, 4097, bad, "4097");
    REFUSED(log_level, -1, bad, "-1");
    REFUSED(log_level, 4, bad, "4");
    REFUSED(alloc, host_alloc, bad, "free");
    REFUSED(free, host_free, bad, "alloc");
    REFUSED(struct_size, 0, MOE_ERROR_STRUCT_SIZE, "0");
    REFUSED(struct_size, 16, MOE_ERROR_STRUCT_TOO_OLD, "16");
#undef REFUSED
    c = config_of(0);
    c.parallel = run_none;
    expect_refused(&c, bad, "parallel", "threads is 0");
    c = host_config(&h, -5); /* nothing is allocated before the check */
    expect_refused(&c, bad, "threads", "-5");
    ck_assert_int_eq(h.calls, 0);
}
END_TEST

START_TEST(test_create_from_newer_caller)
{
    struct {
        moe_context_config c;
        uint64_t later;
    } newer;
    moe_context *context = NULL;
    ck_assert_int_eq(moe_context_config_init(&newer.c, sizeof newer), MOE_OK);
    ck_assert_uint_eq(newer.later, 0);
    newer.c.threads = 2;
    ck_assert_int_eq(moe_context_create(&context, &newer.c), MOE_OK);
    ck_assert_int_eq(moe_context_threads(context), 2);
    moe_context_destroy(context);
    newer.later = 1;
    ck_assert_int_eq(moe_context_create(&context, &newer.c), MOE_ERROR_STRUCT_TOO_NEW);
}
END_TEST

START_TEST(test_create_defaults_and_queries)
{
    moe_context *context = create(NULL);
    ck_assert_int_eq(moe_context_threads(context), moe__available_threads());
    ck_assert_int_eq(moe_context_isa(context), moe__cpu_best_isa());
    ck_assert_int_eq(moe_context_backend(context), MOE_BACKEND_CPU);
    moe_context_destroy(context);
    moe_context_destroy(NULL);
    ck_assert_int_eq(moe_context_threads(NULL), 0);
    ck_assert_int_eq(moe_context_isa(NULL), 0);
    ck_assert_int_eq(moe_context_backend(NULL), -1);
}
END_TEST

START_TEST(test_create_isa)
{
    static const char *const names[] = {"", "MOE_ISA_PLAIN", "MOE_ISA_AVX2", "MOE_ISA_AVX512"};
    int32_t best = moe__cpu_best_isa();
    ck_assert_int_ge(best, MOE_ISA_PLAIN);
    for (int32_t isa = MOE_ISA_PLAIN; isa <= MOE_ISA_AVX512; isa++) {
        moe_context_config config = config_of(1);
        config.isa = isa;
        if (isa > best) {
            ck_assert_ptr_null(moe__cpu_backend(isa, MOE_DTYPE_F32));
            expect_refused(&config, MOE_ERROR_NOT_SUPPORTED, names[isa], names[best]);
            continue;
        }
        moe_context *context = create(&config);
        ck_assert_int_eq(moe_context_isa(context), isa);
        ck_assert_ptr_nonnull(context->kernels[MOE_DTYPE_F32]);
        ck_assert_ptr_nonnull(context->kernels[MOE_DTYPE_F64]);
        ck_assert_ptr_eq(context->kernels[MOE_DTYPE_F32], moe__cpu_backend(isa, MOE_DTYPE_F32));
        ck_assert_ptr_eq(context->kernels[MOE_DTYPE_F64], moe__cpu_backend(isa, MOE_DTYPE_F64));
        moe_context_destroy(context);
    }
    ck_assert_ptr_null(moe__cpu_backend(MOE_ISA_AUTO, MOE_DTYPE_F32));
    ck_assert_ptr_null(moe__cpu_backend(MOE_ISA_PLAIN, MOE_DTYPE_BF16));
}
END_TEST

/* ---- memory ---------------------------------------------------------------------------------- */

START_TEST(test_host_allocator_every_failure)
{
    for (int64_t n = 1;; n++) {
        host h;
        moe_context_config config = host_config(&h, 8);
        moe_context *context = NULL;
        h.fail_at = n;
        moe_status status = moe_context_create(&context, &config);
        if (status == MOE_OK) {
            ck_assert_int_eq(n, h.calls + 1); /* all failures were tried */
            ck_assert_int_ge(n, 3);           /* the context and its pool come from the host */
            moe_context_destroy(context);
            ck_assert_int_eq(h.live, 0);
            ck_assert_int_eq(h.wrong, 0);
            return;
        }
        ck_assert_int_eq(status, MOE_ERROR_OUT_OF_MEMORY);
        ck_assert_ptr_null(context);
        ck_assert_int_eq(h.live, 0);
        ck_assert_int_eq(h.wrong, 0);
    }
}
END_TEST

static int is_zero(const unsigned char *memory, int64_t bytes)
{
    for (int64_t i = 0; i < bytes; i++)
        if (memory[i] != 0) return 0;
    return 1;
}

static void check_memory(moe_context *context)
{
    const int64_t mib = (int64_t)1 << 20;
    const int64_t sizes[] = {1, 63, 64, 4097, mib - 1, mib, mib + 1, 9 * mib + 5};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int round = 0; round < 2; round++) {
            unsigned char *plain = moe__alloc(context, sizes[i]);
            unsigned char *zeroed = moe__alloc_zeroed(context, sizes[i]);
            ck_assert(plain && zeroed && (uintptr_t)plain % 64 == 0 && (uintptr_t)zeroed % 64 == 0);
            ck_assert(is_zero(zeroed, sizes[i]));
            memset(plain, 0xff, (size_t)sizes[i]);
            memset(zeroed, 0xff, (size_t)sizes[i]);
            moe__free(context, plain, sizes[i]);
            moe__free(context, zeroed, sizes[i]);
        }
    moe__free(context, NULL, 0);
    moe__free(context, NULL, 100);
    ck_assert_ptr_null(moe__alloc(context, 0));
    ck_assert_ptr_null(moe__alloc(context, -1));
    ck_assert_ptr_null(moe__alloc_zeroed(context, -1));
}

START_TEST(test_memory_default_and_host)
{
    host h;
    moe_context_config config = host_config(&h, 1);
    moe_context *context = create(&config);
    check_memory(context);
    h.fail_at = h.calls + 1;
    ck_assert_ptr_null(moe__alloc_zeroed(context, 100));
    moe_context_destroy(context);
    ck_assert_int_eq(h.live, 0);
    ck_assert_int_eq(h.wrong, 0);
    context = create_threads(1);
    check_memory(context);
    ck_assert_ptr_null(moe__alloc(context, INT64_MAX));
    moe_context_destroy(context);
}
END_TEST

static long resident_kib(void)
{
    struct rusage usage;
    ck_assert_int_eq(getrusage(RUSAGE_SELF, &usage), 0);
    return usage.ru_maxrss;
}

START_TEST(test_memory_untouched_pages_cost_nothing)
{
    moe_context *context = create_threads(1);
    long before = resident_kib();
    unsigned char *memory = moe__alloc_zeroed(context, (int64_t)1 << 30);
    ck_assert_ptr_nonnull(memory);
    ck_assert_int_eq(memory[12345678], 0);
    ck_assert_int_lt(resident_kib() - before, 32 << 10);
    moe__free(context, memory, (int64_t)1 << 30);
    moe_context_destroy(context);
}
END_TEST

/* ---- log, life, comm ------------------------------------------------------------------------- */

START_TEST(test_log_levels)
{
    for (int32_t most = MOE_LOG_ERROR; most <= MOE_LOG_DEBUG; most++) {
        host h;
        moe_context_config config = host_config(&h, 1);
        config.log_level = most;
        moe_context *context = create(&config);
        for (int32_t level = MOE_LOG_ERROR; level <= MOE_LOG_DEBUG; level++) {
            h.log_calls = 0;
            moe__log(context, level, "level %d", (int)level);
            ck_assert_int_eq(h.log_calls, level <= most);
            if (level > most) continue;
            ck_assert_int_eq(h.log_level, level);
            ck_assert_int_eq(h.log_text[6], '0' + level);
            ck_assert_ptr_null(strchr(h.log_text, '\n'));
        }
        moe_context_destroy(context);
    }
    moe_context *silent = create_threads(1);
    moe__log(silent, MOE_LOG_ERROR, "nobody listens");
    moe_context_destroy(silent);
}
END_TEST

START_TEST(test_life_of_references)
{
    host h;
    moe_context_config config = host_config(&h, 3);
    moe_context *context = create(&config);
    moe_comm *comm = NULL;
    ck_assert_int_eq(moe_comm_create_self(&comm, context), MOE_OK);
    ck_assert_int_eq(moe_comm_rank(comm), 0);
    ck_assert_int_eq(moe_comm_size(comm), 1);
    moe__context_retain(context);
    moe_context_destroy(context);
    moe_context_destroy(context);
    ck_assert_int_gt(h.live, 0); /* the group holds it */
    moe__comm_retain(comm);
    moe_comm_destroy(comm);
    ck_assert_int_eq(moe_comm_size(comm), 1);
    moe_comm_destroy(comm);
    ck_assert_int_eq(h.live, 0);
    ck_assert_int_eq(h.wrong, 0);
}
END_TEST

START_TEST(test_comm_refused)
{
    host h;
    moe_context_config config = host_config(&h, 1);
    moe_context *context = create(&config);
    moe_comm *const untouched = (moe_comm *)(uintptr_t)0x40;
    moe_comm *comm = untouched;
    ck_assert_int_eq(moe_comm_create_self(NULL, context), MOE_ERROR_INVALID_ARGUMENT);
    ck_assert_str_eq(moe_last_error(), "moe_comm_create_self: comm is NULL");
    ck_assert_int_eq(moe_comm_create_self(&comm, NULL), MOE_ERROR_INVALID_ARGUMENT);
    ck_assert_str_eq(moe_last_error(), "moe_comm_create_self: context is NULL");
    h.fail_at = h.calls + 1;
    ck_assert_int_eq(moe_comm_create_self(&comm, context), MOE_ERROR_OUT_OF_MEMORY);
    ck_assert_ptr_eq(comm, untouched);
    moe_comm_destroy(NULL);
    ck_assert_int_eq(moe_comm_rank(NULL), -1);
    ck_assert_int_eq(moe_comm_size(NULL), 0);
    moe_context_destroy(context); /* the failed create holds no reference */
    ck_assert_int_eq(h.live, 0);
}
END_TEST
/* ---- how many threads ------------------------------------------------------------------------ */

START_TEST(test_cpus_parse_texts)
{
    ck_assert_int_eq(moe__parse_cpu_max("max 100000\n"), 0);
    ck_assert_int_eq(moe__parse_cpu_max("200000 100000\n"), 2);
    ck_assert_int_eq(moe__parse_cpu_max("250000 100000\n"), 3);
    ck_assert_int_eq(moe__parse_cpu_max("200001 100000"), 3);
    ck_assert_int_eq(moe__parse_cpu_max("1000 100000\n"), 1);
    ck_assert_int_eq(moe__parse_cpu_max("50000 50000\n"), 1);
    ck_assert_int_eq(moe__parse_cpu_max(""), 0);
    ck_assert_int_eq(moe__parse_cpu_max("\n"), 0);
    ck_assert_int_eq(moe__parse_cpu_max("max"), 0);
    ck_assert_int_eq(moe__parse_cpu_max("100000"), 0);
    ck_assert_int_eq(moe__parse_cpu_max("100000 0\n"), 0);
    ck_assert_int_eq(moe__parse_cpu_max("-1 100000\n"), 0);
    ck_assert_int_eq(moe__parse_cpu_max("99999999999999999999 1\n"), INT32_MAX);
    ck_assert_int_eq(moe__parse_cfs_quota("-1\n", "100000\n"), 0);
    ck_assert_int_eq(moe__parse_cfs_quota("150000\n", "100000\n"), 2);
    ck_assert_int_eq(moe__parse_cfs_quota("400000\n", "100000\n"), 4);
    ck_assert_int_eq(moe__parse_cfs_quota("0\n", "100000\n"), 0);
    ck_assert_int_eq(moe__parse_cfs_quota("", ""), 0);
}
END_TEST

START_TEST(test_cpus_parse_groups)
{
    int32_t v2 = -1;
    ck_assert_str_eq(moe__parse_cgroup_line("0::/", &v2), "/");
    ck_assert_int_eq(v2, 1);
    ck_assert_str_eq(moe__parse_cgroup_line("0::/user.slice/a:b", &v2), "/user.slice/a:b");
    ck_assert_int_eq(v2, 1);
    ck_assert_str_eq(moe__parse_cgroup_line("4:cpu,cpuacct:/docker/1", &v2), "/docker/1");
    ck_assert_int_eq(v2, 0);
    ck_assert_str_eq(moe__parse_cgroup_line("4:cpuacct,cpu:/x", &v2), "/x");
    ck_assert_str_eq(moe__parse_cgroup_line("1:cpu:/", &v2), "/");
    ck_assert_ptr_null(moe__parse_cgroup_line("3:cpuset:/c", &v2));
    ck_assert_ptr_null(moe__parse_cgroup_line("3:cpuacct:/c", &v2));
    ck_assert_ptr_null(moe__parse_cgroup_line("9:name=systemd:/", &v2));
    ck_assert_ptr_null(moe__parse_cgroup_line("1:name=cpu:/", &v2));
    ck_assert_ptr_null(moe__parse_cgroup_line("", &v2));
    ck_assert_ptr_null(moe__parse_cgroup_line("0:", &v2));
    ck_assert_ptr_null(moe__parse_cgroup_line("0::", &v2));
}
END_TEST

static void write_file(const char *root, const char *name, const char *text)
{
    char path[256];
    (void)snprintf(path, sizeof path, "%s%s", root, name);
    FILE *file = fopen(path, "w");
    ck_assert_ptr_nonnull(file);
    ck_assert_int_ge(fputs(text, file), 0);
    ck_assert_int_eq(fclose(file), 0);
}

START_TEST(test_cpus_walk_the_groups)
{
    static const char *const files[] = {"/a/b/cpu.max", "/a/cpu.max", "/cpu.cfs_quota_us",
                                        "/cpu.cfs_period_us"};
    static const char *const directories[] = {"/a/b", "/a", ""};
    char root[] = "/tmp/check_context.XXXXXX", path[256];
    ck_assert_ptr_nonnull(mkdtemp(root));
    for (int i = 1; i >= 0; i--) {
        (void)snprintf(path, sizeof path, "%s%s", root, directories[i]);
        ck_assert_int_eq(mkdir(path, 0700), 0);
    }
    ck_assert_int_eq(moe__cgroup_limit_at(root, "/a/b"), 0);
    write_file(root, files[0], "max 100000\n");
    write_file(root, files[1], "300000 100000\n");
    ck_assert_int_eq(moe__cgroup_limit_at(root, "/a/b"), 3); /* of the parent */
    write_file(root, files[0], "700000 100000\n");
    ck_assert_int_eq(moe__cgroup_limit_at(root, "/a/b"), 3); /* the tighter of both */
    ck_assert_int_eq(moe__cgroup_limit_at(root, "/"), 0);
    write_file(root, files[2], "150000\n");
    write_file(root, files[3], "100000\n");
    ck_assert_int_eq(moe__cgroup_limit_at(root, "/"), 2);
    ck_assert_int_eq(moe__cgroup_limit_at(root, "/a/b"), 2);
    ck_assert_int_eq(moe__cgroup_limit_at(root, "/not/there"), 2);
    for (int i = 0; i < 4; i++) {
        (void)snprintf(path, sizeof path, "%s%s", root, files[i]);
        ck_assert_int_eq(unlink(path), 0);
    }
    for (int i = 0; i < 3; i++) {
        (void)snprintf(path, sizeof path, "%s%s", root, directories[i]);
        ck_assert_int_eq(rmdir(path), 0);
    }
}
END_TEST

START_TEST(test_cpus_affinity)
{
    cpu_set_t sets[64], one;
    ck_assert_int_eq(sched_getaffinity(0, sizeof sets, sets), 0);
    int32_t all = CPU_COUNT_S(sizeof sets, sets);
    ck_assert_int_ge(moe__available_threads(), 1);
    ck_assert_int_le(moe__available_threads(), all);
    int cpu = sched_getcpu();
    ck_assert(cpu >= 0 && cpu < CPU_SETSIZE);
    CPU_ZERO(&one);
    CPU_SET((size_t)cpu, &one);
    ck_assert_int_eq(sched_setaffinity(0, sizeof one, &one), 0);
    int32_t available = moe__available_threads();
    moe_context *context = create(NULL);
    ck_assert_int_eq(sched_setaffinity(0, sizeof sets, sets), 0);
    ck_assert_int_eq(available, 1);
    ck_assert_int_eq(moe_context_threads(context), 1);
    moe_context_destroy(context);
}
END_TEST
static void add_object_tests(Suite *suite)
{
    TCase *object = add_case(suite, "object");
    tcase_add_test(object, test_config_defaults);
    tcase_add_test(object, test_create_refused);
    tcase_add_test(object, test_create_from_newer_caller);
    tcase_add_test(object, test_create_defaults_and_queries);
    tcase_add_test(object, test_create_isa);
    tcase_add_test(object, test_host_allocator_every_failure);
    tcase_add_test(object, test_memory_default_and_host);
    tcase_add_test(object, test_memory_untouched_pages_cost_nothing);
    tcase_add_test(object, test_log_levels);
    tcase_add_test(object, test_life_of_references);
    tcase_add_test(object, test_comm_refused);
}

static void add_cpus_tests(Suite *suite)
{
    TCase *cpus = add_case(suite, "cpus");
    tcase_add_test(cpus, test_cpus_parse_texts);
    tcase_add_test(cpus, test_cpus_parse_groups);
    tcase_add_test(cpus, test_cpus_walk_the_groups);
    tcase_add_test(cpus, test_cpus_affinity);
}

int main(void)
{
    Suite *suite = suite_create("context");
    add_object_tests(suite);
    add_cpus_tests(suite);
    return run_suite(suite, 1);
}
