/* check_threads.c - the parallel work of a context: the library's own threads (counts, callers,
 * signals, floating-point environment, fork, idling) and the host's parallel-for. */
#include "support/context_host.h"
#include "support/suite.h"

#include <dirent.h>

/* ---- parallel work --------------------------------------------------------------------------- */

enum { MOST = 1000 };

typedef struct hits {
    atomic_int of[MOST + 1];
    atomic_int running, most_running;
    pid_t process; /* whose tasks these are; 0: not looked at */
} hits;

static void hit(void *argument, int64_t index)
{
    hits *h = argument;
    if (h->process != 0 && h->process != getpid()) _exit(7);
    int running = atomic_fetch_add(&h->running, 1) + 1, most = atomic_load(&h->most_running);
    while (most < running && !atomic_compare_exchange_weak(&h->most_running, &most, running))
        continue;
    atomic_fetch_add(&h->of[index], 1);
    atomic_fetch_sub(&h->running, 1);
}

/* 1 if exactly the first `count` were hit once; clears them. */
static int each_once(hits *h, int64_t count)
{
    int good = 1;
    for (int64_t i = 0; i <= MOST; i++) good &= atomic_exchange(&h->of[i], 0) == (i < count);
    return good;
}

static void check_counts(moe_context *context, int64_t step)
{
    hits h = {0};
    for (int64_t count = 0; count <= MOST; count += step) {
        ck_assert_int_eq(moe__parallel(context, count, hit, &h, "test"), MOE_OK);
        ck_assert_msg(each_once(&h, count), "count %lld", (long long)count);
    }
    ck_assert_int_le(atomic_load(&h.most_running), moe_context_threads(context));
}

START_TEST(test_parallel_every_count)
{
    static const int32_t threads[] = {1, 2, 3, 8, 0};
    moe_context *context = create_threads(threads[_i]);
    check_counts(context, 1);
    moe_context_destroy(context);
}
END_TEST

typedef struct range_hits {
    hits h;
    int64_t grain, count;
    atomic_int wrong;
} range_hits;

static void hit_range(void *argument, int64_t begin, int64_t end)
{
    range_hits *r = argument;
    if (begin >= end || end > r->count || end - begin < moe__min(r->grain, r->count))
        atomic_fetch_add(&r->wrong, 1);
    for (int64_t i = begin; i < end; i++) atomic_fetch_add(&r->h.of[i], 1);
}

START_TEST(test_parallel_range)
{
    static const int64_t grains[] = {1, 3, 64, 999, 1000, 5000};
    range_hits r = {0};
    for (int32_t threads = 1; threads <= 8; threads += 3) {
        moe_context *context = create_threads(threads);
        for (int g = 0; g < 6; g++)
            for (int64_t count = 0; count <= MOST; count += 1 + count / 40) {
                r.grain = grains[g];
                r.count = count;
                ck_assert_int_eq(
                    moe__parallel_range(context, count, grains[g], hit_range, &r, "test"), MOE_OK);
                ck_assert(each_once(&r.h, count));
            }
        moe_context_destroy(context);
    }
    ck_assert_int_eq(atomic_load(&r.wrong), 0);
}
END_TEST

enum { CALLERS = 24 }; /* more than the pool has job slots */

typedef struct caller {
    pthread_t thread;
    moe_context *context;
    int64_t seed;
    int32_t good;
} caller;

static void *call_often(void *argument)
{
    caller *c = argument;
    hits h = {0};
    c->good = 1;
    for (int64_t i = 0; i < 150; i++) {
        int64_t count = (c->seed + i * 37) % (i % 10 == 0 ? 500 : 30);
        c->good &= moe__parallel(c->context, count, hit, &h, "test") == MOE_OK &&
                   each_once(&h, count);
    }
    return NULL;
}

START_TEST(test_parallel_many_callers)
{
    caller callers[CALLERS];
    moe_context *context = create_threads(_i == 0 ? 4 : 2);
    for (int i = 0; i < CALLERS; i++) {
        callers[i].context = context;
        callers[i].seed = i;
        ck_assert_int_eq(pthread_create(&callers[i].thread, NULL, call_often, &callers[i]), 0);
    }
    for (int i = 0; i < CALLERS; i++) {
        ck_assert_int_eq(pthread_join(callers[i].thread, NULL), 0);
        ck_assert_int_eq(callers[i].good, 1);
    }
    moe_context_destroy(context);
}
END_TEST

/* Many short runs after one another, with pauses of every length around the time workers spin. */
START_TEST(test_parallel_wakes_after_any_pause)
{
    moe_context *context = create_threads(4);
    hits h = {0};
    for (int i = 0; i < 3000; i++) {
        double until = seconds(CLOCK_MONOTONIC) + 1e-6 * (i % 60);
        ck_assert_int_eq(moe__parallel(context, 2 + i % 5, hit, &h, "test"), MOE_OK);
        ck_assert(each_once(&h, 2 + i % 5));
        while (seconds(CLOCK_MONOTONIC) < until) continue;
    }
    moe_context_destroy(context);
}
END_TEST

/* Every task waits until all have begun: only if each has a thread of its own does it end. */
typedef struct meeting {
    int64_t count;
    atomic_int begun, late;
    int32_t thread[64];
} meeting;

static void meet(void *argument, int64_t index)
{
    meeting *m = argument;
    double end = seconds(CLOCK_MONOTONIC) + 20;
    m->thread[index] = thread_number();
    atomic_fetch_add(&m->begun, 1);
    while (atomic_load(&m->begun) < m->count) {
        if (seconds(CLOCK_MONOTONIC) > end) {
            atomic_fetch_add(&m->late, 1);
            return;
        }
        (void)sched_yield();
    }
}

static void meet_all(moe_context *context, meeting *m)
{
    memset(m, 0, sizeof *m);
    m->count = moe_context_threads(context);
    ck_assert_int_le(m->count, 64);
    ck_assert_int_eq(moe__parallel(context, m->count, meet, m, "test"), MOE_OK);
    ck_assert_int_eq(atomic_load(&m->late), 0);
}

/* Threads of this process; ThreadSanitizer adds its own, so that there is nothing to count. */
static int count_threads(void)
{
#ifdef WITH_TSAN
    return 1;
#else
    char line[256];
    int threads = 0;
    FILE *file = fopen("/proc/self/status", "r");
    ck_assert_ptr_nonnull(file);
    while (fgets(line, sizeof line, file)) (void)sscanf(line, "Threads: %d", &threads);
    (void)fclose(file);
    return threads;
#endif
}

static void expect_threads(int count)
{
#ifndef WITH_TSAN
    for (int i = 0; i < 60000 && count_threads() != count; i++) sleep_ms(1);
    ck_assert_int_eq(count_threads(), count);
#else
    (void)count;
#endif
}

START_TEST(test_threads_start_late_and_are_joined)
{
    meeting m;
    int before = count_threads();
    moe_context *context = create_threads(6);
    expect_threads(before);
    meet_all(context, &m);
    expect_threads(before + 5);
    for (int i = 0; i < 6; i++)
        for (int j = 0; j < i; j++) ck_assert_int_ne(m.thread[i], m.thread[j]);
    for (int i = 0; i < 20; i++) {
        meet_all(context, &m);
        sleep_ms(i % 3);
    }
    expect_threads(before + 5);
    moe_context_destroy(context);
    expect_threads(before);
}
END_TEST

#ifndef WITH_TSAN /* has a thread of its own that wakes */
/* Context switches of the process's other threads so far; -1 if one of them runs or wants to. */
static int64_t switches_of_others(void)
{
    int64_t sum = 0;
    int awake = 0;
    DIR *tasks = opendir("/proc/self/task");
    ck_assert_ptr_nonnull(tasks);
    for (struct dirent *entry; (entry = readdir(tasks));) {
        char path[64], line[256], state = 'S';
        long long switches = 0;
        int32_t thread = (int32_t)strtol(entry->d_name, NULL, 10);
        if (thread == 0 || thread == thread_number()) continue;
        (void)snprintf(path, sizeof path, "/proc/self/task/%d/status", (int)thread);
        FILE *file = fopen(path, "r");
        ck_assert_ptr_nonnull(file);
        while (fgets(line, sizeof line, file)) {
            (void)sscanf(line, "State: %c", &state);
            if (sscanf(line, "voluntary_ctxt_switches: %lld", &switches) == 1 ||
                sscanf(line, "nonvoluntary_ctxt_switches: %lld", &switches) == 1)
                sum += switches;
        }
        (void)fclose(file);
        awake |= state != 'S';
    }
    (void)closedir(tasks);
    return awake ? -1 : sum;
}

/* Soon after the last work all sleep, and none wakes to look for more. */
START_TEST(test_threads_are_parked_when_idle)
{
    moe_context *context = create_threads(8);
    meeting m;
    int64_t before = -1, after = -2;
    meet_all(context, &m);
    for (int i = 0; i < 200 && (before < 0 || before != after); i++) {
        before = switches_of_others();
        sleep_ms(100);
        after = switches_of_others();
    }
    ck_assert_int_ge(before, 0);
    ck_assert_int_eq(before, after);
    moe_context_destroy(context);
}
END_TEST
#endif

#if !defined(WITH_ASAN) && !defined(WITH_TSAN)
static int64_t address_space(void)
{
    long long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    ck_assert_ptr_nonnull(file);
    ck_assert_int_eq(fscanf(file, "%lld", &pages), 1);
    (void)fclose(file);
    return (int64_t)pages * sysconf(_SC_PAGESIZE);
}

/* With room for a few stacks only, the run goes on with the threads it got and says so. */
START_TEST(test_threads_refused)
{
    host h;
    struct rlimit limit, stack;
    ck_assert_int_eq(getrlimit(RLIMIT_STACK, &stack), 0);
    if (stack.rlim_cur == RLIM_INFINITY || stack.rlim_cur < (1 << 20)) return;
    moe_context_config config = host_config(&h, 256);
    moe_context *context = create(&config);
    ck_assert_int_eq(getrlimit(RLIMIT_AS, &limit), 0);
    struct rlimit small_limit = {(rlim_t)address_space() + 5 * stack.rlim_cur, limit.rlim_max};
    ck_assert_int_eq(setrlimit(RLIMIT_AS, &small_limit), 0);
    check_counts(context, 50);
    ck_assert_int_eq(setrlimit(RLIMIT_AS, &limit), 0);
    ck_assert_int_eq(h.log_calls, 1);
    ck_assert_int_eq(h.log_level, MOE_LOG_WARNING);
    ck_assert_ptr_nonnull(strstr(h.log_text, "of 255 threads"));
    ck_assert_int_lt(count_threads(), 10);
    moe_context_destroy(context);
}
END_TEST
#endif

/* ---- signals --------------------------------------------------------------------------------- */

static uint64_t blocked_signals(int32_t thread)
{
    char path[64], line[256];
    unsigned long long mask = 0;
    (void)snprintf(path, sizeof path, "/proc/self/task/%d/status", (int)thread);
    FILE *file = fopen(path, "r");
    ck_assert_ptr_nonnull(file);
    while (fgets(line, sizeof line, file)) (void)sscanf(line, "SigBlk: %llx", &mask);
    (void)fclose(file);
    return mask;
}

static atomic_int signals_seen, signals_elsewhere, main_thread;

static void on_signal(int number)
{
    (void)number;
    atomic_fetch_add(&signals_seen, 1);
    if (thread_number() != atomic_load(&main_thread)) atomic_fetch_add(&signals_elsewhere, 1);
}

START_TEST(test_signals_are_blocked_in_workers)
{
    moe_context *context = create_threads(6);
    sigset_t own, before, after;
    meeting m;
    sigemptyset(&before);
    sigaddset(&before, SIGUSR2);
    ck_assert_int_eq(pthread_sigmask(SIG_BLOCK, &before, &own), 0);
    ck_assert_int_eq(pthread_sigmask(SIG_SETMASK, NULL, &before), 0);
    meet_all(context, &m);
    ck_assert_int_eq(pthread_sigmask(SIG_SETMASK, NULL, &after), 0);
    for (int number = 1; number <= SIGRTMAX; number++)
        ck_assert_int_eq(sigismember(&before, number), sigismember(&after, number));
    ck_assert_int_eq(pthread_sigmask(SIG_SETMASK, &own, NULL), 0);
    for (int i = 0; i < 6; i++) {
        if (m.thread[i] == thread_number()) continue;
        uint64_t blocked = blocked_signals(m.thread[i]);
        for (int number = 1; number <= SIGRTMAX; number++) {
            if (number == SIGKILL || number == SIGSTOP || (number > 31 && number < SIGRTMIN))
                continue;
            ck_assert_msg(blocked >> (number - 1) & 1, "signal %d is not blocked", number);
        }
    }
    moe_context_destroy(context);
}
END_TEST

START_TEST(test_signals_reach_main)
{
    moe_context *context = create_threads(6);
    struct sigaction action = {.sa_handler = on_signal}, before;
    hits h = {0};
    meeting m;
    atomic_store(&main_thread, thread_number());
    ck_assert_int_eq(sigaction(SIGUSR1, &action, &before), 0);
    meet_all(context, &m);
    for (int i = 1; i <= 50; i++) {
        ck_assert_int_eq(kill(getpid(), SIGUSR1), 0);
        ck_assert_int_eq(moe__parallel(context, 20, hit, &h, "test"), MOE_OK);
        ck_assert(each_once(&h, 20));
        for (int wait = 0; wait < 60000 && atomic_load(&signals_seen) < i; wait++) sleep_ms(1);
        ck_assert_int_eq(atomic_load(&signals_seen), i);
    }
    ck_assert_int_eq(atomic_load(&signals_elsewhere), 0);
    ck_assert_int_eq(sigaction(SIGUSR1, &before, NULL), 0);
    moe_context_destroy(context);
}
END_TEST

/* ---- floating-point environment -------------------------------------------------------------- */

typedef struct fenv_check {
    meeting m;
    atomic_int wrong;
} fenv_check;

static volatile float small = FLT_MIN, third = 3;

/* Default: to nearest, denormal results kept, no exception flags from outside. */
static void check_fenv(void *argument, int64_t index)
{
    fenv_check *c = argument;
    if (c->m.count > 0) meet(&c->m, index);
    float denormal = small / 4, down = 1 / third, up = -1 / third;
    if (fegetround() != FE_TONEAREST || denormal == 0 || down != -up)
        atomic_fetch_add(&c->wrong, 1);
    if (fetestexcept(FE_DIVBYZERO)) atomic_fetch_add(&c->wrong, 1);
    (void)feraiseexcept(FE_OVERFLOW);
}

static void set_odd_environment(void)
{
    (void)feclearexcept(FE_ALL_EXCEPT);
    (void)feraiseexcept(FE_DIVBYZERO);
    ck_assert_int_eq(fesetround(FE_UPWARD), 0);
#if defined(__x86_64__)
    _mm_setcsr(_mm_getcsr() | 0x8040); /* flush to zero, denormals are zero */
#endif
}

static void check_odd_environment(void)
{
    ck_assert_int_eq(fegetround(), FE_UPWARD);
    ck_assert_int_ne(fetestexcept(FE_DIVBYZERO), 0);
    ck_assert_int_eq(fetestexcept(FE_OVERFLOW), 0);
#if defined(__x86_64__)
    ck_assert_uint_eq(_mm_getcsr() & 0x8040, 0x8040);
    ck_assert(small / 4 == 0);
#endif
}

static int32_t run_in_order(void *user, int64_t count, moe_task_fn task, void *argument)
{
    (void)user;
    for (int64_t i = 0; i < count; i++) task(argument, i);
    return 0;
}

START_TEST(test_fenv_is_the_default_in_tasks)
{
    moe_context_config config = config_of(_i == 0 ? 1 : 4);
    if (_i == 2) config.parallel = run_in_order;
    moe_context *context = create(&config);
    fenv_t kept;
    (void)fegetenv(&kept);
    for (int64_t count = 1; count <= 4; count++) {
        fenv_check c = {0};
        if (_i == 1 && count == 4) c.m.count = 4; /* on all threads of the pool */
        set_odd_environment();
        moe_status status = moe__parallel(context, count, check_fenv, &c, "test");
        check_odd_environment();
        (void)fesetenv(&kept);
        ck_assert_int_eq(status, MOE_OK);
        ck_assert_int_eq(atomic_load(&c.wrong), 0);
    }
    moe_context_destroy(context);
}
END_TEST

/* ---- the host's parallel-for ----------------------------------------------------------------- */

enum { HOST_THREADS = 7 };

typedef struct host_loop {
    int64_t calls, count, skip, twice, beyond;
    int32_t result;
    moe_task_fn task;
    void *argument;
    _Atomic int64_t next;
} host_loop;

/* A number coprime to `count`, so that i * stride mod count visits every index once. */
static int64_t stride_of(int64_t count)
{
    for (int64_t stride = count / 2 + 1;; stride++) {
        int64_t a = stride, b = count;
        while (b != 0) {
            int64_t rest = a % b;
            a = b;
            b = rest;
        }
        if (a == 1) return stride;
    }
}

static void *host_worker(void *argument)
{
    host_loop *l = argument;
    int64_t stride = stride_of(l->count);
    for (;;) {
        int64_t i = atomic_fetch_add(&l->next, 1);
        if (i >= l->count) return NULL;
        i = (i * stride + 5) % l->count;
        if (i != l->skip) l->task(l->argument, i);
        if (i == l->twice) l->task(l->argument, i);
    }
}

/* All tasks in shuffled order on seven threads. */
static int32_t run_shuffled(void *user, int64_t count, moe_task_fn task, void *argument)
{
    host_loop *l = user;
    pthread_t threads[HOST_THREADS];
    l->calls++;
    l->count = count;
    l->task = task;
    l->argument = argument;
    atomic_store(&l->next, 0);
    for (int i = 0; i < HOST_THREADS; i++)
        if (pthread_create(&threads[i], NULL, host_worker, l) != 0) return -99;
    for (int i = 0; i < HOST_THREADS; i++) (void)pthread_join(threads[i], NULL);
    if (l->beyond != 0) task(argument, l->beyond < 0 ? -1 : count);
    return l->result;
}

static moe_context *create_with_loop(host_loop *loop)
{
    moe_context_config config = config_of(HOST_THREADS);
    memset(loop, 0, sizeof *loop);
    loop->skip = loop->twice = -1;
    config.parallel = run_shuffled;
    config.parallel_user = loop;
    return create(&config);
}

START_TEST(test_host_parallel_shuffled)
{
    host_loop loop;
    moe_context *context = create_with_loop(&loop);
    int before = count_threads();
    ck_assert_int_eq(moe_context_threads(context), HOST_THREADS);
    check_counts(context, 23);
    ck_assert_int_gt(loop.calls, 0);
    expect_threads(before); /* none of the library's own */
    int64_t calls = loop.calls;
    hits h = {0};
    ck_assert_int_eq(moe__parallel(context, 1, hit, &h, "test"), MOE_OK); /* in place */
    ck_assert_int_eq(moe__parallel(context, 0, hit, &h, "test"), MOE_OK);
    ck_assert_int_eq(loop.calls, calls);
    moe_context_destroy(context);
}
END_TEST

START_TEST(test_host_parallel_fails)
{
    host_loop loop;
    moe_context *context = create_with_loop(&loop);
    hits h = {0};
    loop.result = -1234;
    ck_assert_int_eq(moe__parallel(context, 10, hit, &h, "caller"), MOE_ERROR_CALLBACK);
    ck_assert_str_eq(moe_last_error(), "caller: the host's parallel-for returned -1234");
    loop.result = 0;
    loop.skip = 3;
    ck_assert_int_eq(moe__parallel(context, 10, hit, &h, "caller"), MOE_ERROR_CALLBACK);
    ck_assert_str_eq(moe_last_error(), "caller: the host's parallel-for ran 9 of 10 tasks");
    loop.skip = -1;
    loop.twice = 3;
    ck_assert_int_eq(moe__parallel(context, 10, hit, &h, "caller"), MOE_ERROR_CALLBACK);
    ck_assert_str_eq(moe_last_error(), "caller: the host's parallel-for ran 11 of 10 tasks");
    loop.twice = -1;
    (void)each_once(&h, 0);
    for (loop.beyond = -1; loop.beyond <= 1; loop.beyond += 2) {
        ck_assert_int_eq(moe__parallel(context, 10, hit, &h, "caller"), MOE_ERROR_CALLBACK);
        ck_assert(each_once(&h, 10)); /* an index outside reaches no task */
    }
    loop.beyond = 0;
    ck_assert_int_eq(moe__parallel(context, 10, hit, &h, "caller"), MOE_OK);
    ck_assert(each_once(&h, 10));
    moe_context_destroy(context);
}
END_TEST

/* ---- fork ------------------------------------------------------------------------------------ */

/* ThreadSanitizer knows no threads in the child of a process with threads. */
#ifndef WITH_TSAN
static void use(moe_context *context)
{
    hits h = {.process = getpid()};
    for (int64_t count = 0; count < 200; count++)
        if (moe__parallel(context, count, hit, &h, "test") != MOE_OK || !each_once(&h, count))
            _exit(3);
}

static void *use_in_thread(void *context)
{
    use(context);
    return NULL;
}

/* Uses all threads of a pool in the child; exits with 4 if some are missing. Also stands before a
 * fork: the C library copies its locks well, a sanitizer's allocator does not if threads are just
 * starting. */
static void use_all(moe_context *context)
{
    meeting m = {.count = moe_context_threads(context)};
    if (moe__parallel(context, m.count, meet, &m, "test") != MOE_OK || atomic_load(&m.late))
        _exit(4);
}

enum { CHILD_USES = 1, CHILD_USES_TWICE_AT_ONCE = 2, CHILD_FORKS = 4 };

static void use_in_child(moe_context *context, int what)
{
    pthread_t other;
    (void)signal(SIGALRM, SIG_DFL);
    (void)alarm(60);
    if (what & CHILD_USES_TWICE_AT_ONCE) {
        if (pthread_create(&other, NULL, use_in_thread, context) != 0) _exit(5);
        use(context);
        if (pthread_join(other, NULL) != 0) _exit(5);
    }
    if (what & CHILD_USES) {
        use(context);
        use_all(context);
    }
}

static void run_child(moe_context *context, int what)
{
    use_in_child(context, what);
    if (what & CHILD_FORKS) {
        int status = 0;
        if (what != CHILD_FORKS) use_all(context); /* as below */
        pid_t grandchild = fork();
        if (grandchild == 0) {
            use_in_child(context, CHILD_USES);
            moe_context_destroy(context);
            _exit(0);
        }
        if (waitpid(grandchild, &status, 0) != grandchild || status != 0) _exit(6);
    }
    moe_context_destroy(context);
    _exit(0);
}

static void expect_child_good(moe_context *context, int what)
{
    int status = -1;
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) run_child(context, what);
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    ck_assert_msg(WIFEXITED(status), "child of kind %d ended by signal %d", what, WTERMSIG(status));
    ck_assert_msg(WEXITSTATUS(status) == 0, "child of kind %d exited with %d", what,
                  WEXITSTATUS(status));
}

START_TEST(test_fork_before_and_after_use)
{
    moe_context *context = create_threads(4);
    for (int what = 0; what < 8; what++) expect_child_good(context, what);
    use(context);
    use_all(context);
    for (int what = 0; what < 8; what++) {
        expect_child_good(context, what);
        use(context);
    }
    use_all(context);
    moe_context_destroy(context);
}
END_TEST

static atomic_int stop_using;

static void *use_until_stopped(void *context)
{
    while (!atomic_load(&stop_using)) use(context);
    return NULL;
}

/* The lock and the jobs are copied in whatever state other threads had them, and no task of theirs
 * runs in the child. */
START_TEST(test_fork_while_others_work)
{
    moe_context *context = create_threads(4);
    pthread_t threads[2];
    for (int i = 0; i < 2; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, use_until_stopped, context), 0);
    use_all(context);
    sleep_ms(50);
    for (int i = 0; i < 25; i++) expect_child_good(context, i % 8);
    atomic_store(&stop_using, 1);
    for (int i = 0; i < 2; i++) ck_assert_int_eq(pthread_join(threads[i], NULL), 0);
    moe_context_destroy(context);
}
END_TEST
#endif
static void add_thread_tests(Suite *suite)
{
    TCase *threads = add_case(suite, "threads");
    tcase_add_loop_test(threads, test_parallel_every_count, 0, 5);
    tcase_add_test(threads, test_parallel_range);
    tcase_add_loop_test(threads, test_parallel_many_callers, 0, 2);
    tcase_add_test(threads, test_parallel_wakes_after_any_pause);
    tcase_add_test(threads, test_threads_start_late_and_are_joined);
#ifndef WITH_TSAN
    tcase_add_test(threads, test_threads_are_parked_when_idle);
#endif
#if !defined(WITH_ASAN) && !defined(WITH_TSAN)
    tcase_add_test(threads, test_threads_refused);
#endif
    tcase_add_test(threads, test_signals_are_blocked_in_workers);
    tcase_add_test(threads, test_signals_reach_main);
    tcase_add_loop_test(threads, test_fenv_is_the_default_in_tasks, 0, 3);
    tcase_add_test(threads, test_host_parallel_shuffled);
    tcase_add_test(threads, test_host_parallel_fails);
#ifndef WITH_TSAN
    tcase_add_test(threads, test_fork_before_and_after_use);
    tcase_add_test(threads, test_fork_while_others_work);
#endif
}

int main(void)
{
    Suite *suite = suite_create("threads");
    add_thread_tests(suite);
    return run_suite(suite, 1);
}
