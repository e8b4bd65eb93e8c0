/* nccl_case.c - ranks as threads and as processes, and what their bodies share. */
#include "nccl_case.h"
#include "support/ranks_asked.h"
#include "support/suite.h"

#include <check.h>
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

void sleep_ms(int milliseconds)
{
    struct timespec t = {milliseconds / 1000, (long)(milliseconds % 1000) * 1000000};
    while (nanosleep(&t, &t) != 0 && errno == EINTR) {}
}

double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

void expect(struct rank_case *r, bool holds, const char *what, const char *file, int line)
{
    if (holds) return;
    __atomic_fetch_add(&r->shared->failures, 1, __ATOMIC_ACQ_REL);
    printf("%s:%d: rank %d of %d: not so: %s (%s)\n", file, line, r->rank, r->ranks, what,
           emu_last_message());
}

void meet(struct rank_case *r)
{
    struct shared_case *s = r->shared;
    int turn = __atomic_load_n(&s->turn, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&s->arrived, 1, __ATOMIC_ACQ_REL) == r->ranks) {
        __atomic_store_n(&s->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&s->turn, turn + 1, __ATOMIC_RELEASE);
        return;
    }
    while (__atomic_load_n(&s->turn, __ATOMIC_ACQUIRE) == turn) usleep(100);
}

/* ---- ranks ----------------------------------------------------------------------------------- */

static void run_rank(struct rank_case *r, rank_body *body)
{
    CUDA(cudaSetDevice(r->rank % 8));
    CUDA(cudaStreamCreateWithFlags(&r->stream, cudaStreamNonBlocking));
    body(r);
    CUDA(cudaStreamDestroy(r->stream));
}

struct thread_case {
    struct rank_case rank;
    rank_body *body;
    pthread_t thread;
};

static void *run_thread(void *p)
{
    struct thread_case *t = p;
    run_rank(&t->rank, t->body);
    return NULL;
}

int on_threads(int ranks, rank_body *body)
{
    struct thread_case threads[16];
    struct shared_case shared = {0};
    ncclUniqueId id;
    emu_heal();
    emu_nccl_heal();
    if (ncclGetUniqueId(&id) != ncclSuccess) return 1;
    for (int i = 0; i < ranks; i++) {
        struct thread_case t = {{i, ranks, false, id, NULL, NULL, &shared}, body, 0};
        threads[i] = t;
        if (pthread_create(&threads[i].thread, NULL, run_thread, &threads[i]) != 0) abort();
    }
    for (int i = 0; i < ranks; i++) pthread_join(threads[i].thread, NULL);
    for (int i = 0; i < 1000 && emu_nccl_live() != 0; i++)
        sleep_ms(1); /* other threads may end it */
    return shared.failures + (emu_nccl_live() != 0);
}

/* "program --rank NAME RANK RANKS FILE ID": the file is the shared memory, inherited. */
static void become(const struct named_body *b, int rank, int ranks, int file, int said,
                   const ncclUniqueId *id)
{
    char number[3][16], hex[2 * sizeof *id + 1], tsan[1024];
    for (size_t i = 0; i < sizeof *id; i++) {
        snprintf(hex + 2 * i, 3, "%02x", (unsigned char)id->internal[i]);
    }
    snprintf(number[0], sizeof number[0], "%d", rank);
    snprintf(number[1], sizeof number[1], "%d", ranks);
    snprintf(number[2], sizeof number[2], "%d", file);
    const char *options = getenv("TSAN_OPTIONS");
    snprintf(tsan, sizeof tsan, "%s atexit_sleep_ms=0", options != NULL ? options : "");
    setenv("TSAN_OPTIONS", tsan, 1); /* a thread that runs the streams is there at the end */
    if (b->environment != NULL) setenv("MOE_EMULATION_NCCL", b->environment, 1);
    if (b->ends_with != NULL) dup2(said, STDERR_FILENO);
    execl("/proc/self/exe", "rank", "--rank", b->name, number[0], number[1], number[2], hex,
          (char *)NULL);
    _exit(127);
}

/* Whether the process ended as it should. */
static bool ended_well(const struct named_body *b, int status, int said)
{
    char text[4096] = "";
    if (b->ends_with == NULL) return WIFEXITED(status) && WEXITSTATUS(status) == 0;
    if (pread(said, text, sizeof text - 1, 0) < 0) return false;
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT && strstr(text, b->ends_with) != NULL;
}

int on_processes(int ranks, const struct named_body *b)
{
    int file = memfd_create("ranks", 0), said = memfd_create("said", 0), failures = 0, status;
    ncclUniqueId id;
    pid_t child[16];
    if (file < 0 || said < 0 || ftruncate(file, sizeof(struct shared_case)) != 0) return 1;
    if (ncclGetUniqueId(&id) != ncclSuccess) return 1;
    fflush(stdout);
    for (int i = 0; i < ranks; i++) {
        child[i] = fork();
        if (child[i] == 0) become(b, i, ranks, file, said, &id);
    }
    for (int i = 0; i < ranks; i++) {
        failures += waitpid(child[i], &status, 0) != child[i] || !ended_well(b, status, said);
    }
    close(file);
    close(said);
    return failures;
}

int run_as_rank(char **argv, const struct named_body *bodies)
{
    struct rank_case r = {atoi(argv[3]), atoi(argv[4]), true, {{0}}, NULL, NULL, NULL};
    for (size_t i = 0; i < sizeof r.id; i++) {
        unsigned byte = 0;
        if (sscanf(argv[6] + 2 * i, "%2x", &byte) != 1) return 126;
        r.id.internal[i] = (char)byte;
    }
    r.shared = mmap(NULL, sizeof *r.shared, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(argv[5]), 0);
    if (r.shared == MAP_FAILED) return 126;
    while (bodies->name != NULL && strcmp(bodies->name, argv[2]) != 0) bodies++;
    if (bodies->name == NULL) return 126;
    run_rank(&r, bodies->body);
    bool left = emu_nccl_live() != 0 && bodies->ends_with == NULL;
    return left || __atomic_load_n(&r.shared->failures, __ATOMIC_ACQUIRE) > 0;
}

/* ---- the suite ------------------------------------------------------------------------------- */

static const struct named_body *all;

static void say(const struct named_body *b, int ranks, const char *kind, double begin)
{
    if (getenv("MOE_VERBOSE") == NULL) return;
    printf("%-24s %d %-10s %7.3f s\n", b->name, ranks, kind, seconds() - begin);
    fflush(stdout);
}

START_TEST(test_threads)
{
    const struct named_body *b = &all[_i];
    if (b->ranks < 0) return;
    for (int ranks = b->ranks > 0 ? b->ranks : 2; ranks <= (b->ranks > 0 ? b->ranks : 8);
         ranks *= 2) {
        double begin = seconds();
        if (b->ranks == 0 && !ranks_asked(ranks, true)) continue;
        int failures = on_threads(ranks, b->body);
        say(b, ranks, "threads", begin);
        ck_assert_msg(failures == 0, "%s on %d threads: %d failures", b->name, ranks, failures);
    }
}
END_TEST

START_TEST(test_processes)
{
    if (!all[_i].processes) return;
    for (int ranks = 2; ranks <= 4; ranks *= 2) {
        double begin = seconds();
        if (!ranks_asked(ranks, ranks == 2)) continue;
        int failures = on_processes(ranks, &all[_i]);
        say(&all[_i], ranks, "processes", begin);
        ck_assert_msg(failures == 0, "%s on %d processes: %d failures", all[_i].name, ranks,
                      failures);
    }
}
END_TEST

/* A hang ends the program. */
int run_bodies(int argc, char **argv, const char *name, const struct named_body *bodies)
{
    int count = 0;
    setenv("MOE_EMULATION_DEVICES", "8", 1);
    alarm(300);
    if (argc == 7 && strcmp(argv[1], "--rank") == 0) return run_as_rank(argv, bodies);
    all = bodies;
    while (bodies[count].name != NULL) count++;
    Suite *suite = suite_create(name);
    TCase *tcase = tcase_create(name);
    tcase_set_timeout(tcase, 300);
    tcase_add_loop_test(tcase, test_threads, 0, count);
    tcase_add_loop_test(tcase, test_processes, 0, count);
    suite_add_tcase(suite, tcase);
    return run_suite(suite, 1);
}

/* ---- what bodies need ------------------------------------------------------------------------ */

void warm_up(struct rank_case *r, ncclComm_t comm)
{
    int ranks = 0;
    float *send = floats(r, 32, 0.0f), *receive = floats(r, 32, 0.0f);
    NCCL(ncclCommCount(comm, &ranks));
    NCCL(ncclGroupStart());
    for (int p = 0; p < ranks; p++) {
        NCCL(ncclSend(send + p, 1, ncclFloat, p, comm, r->stream));
        NCCL(ncclRecv(receive + p, 1, ncclFloat, p, comm, r->stream));
    }
    NCCL(ncclGroupEnd());
    NCCL(ncclAllReduce(send, receive, 1, ncclFloat, ncclSum, comm, r->stream));
    CUDA(cudaStreamSynchronize(r->stream));
    CUDA(cudaFree(send));
    CUDA(cudaFree(receive));
}

void make_comm(struct rank_case *r)
{
    NCCL(ncclCommInitRank(&r->comm, r->ranks, r->id, r->rank));
    warm_up(r, r->comm);
    meet(r);
}

void end_comm(struct rank_case *r)
{
    NCCL(ncclCommDestroy(r->comm));
    r->comm = NULL;
}

float *floats(struct rank_case *r, size_t n, float first)
{
    float *p = NULL, *host = malloc(n * sizeof *host);
    for (size_t i = 0; i < n; i++) host[i] = first + (float)i;
    CUDA(cudaMalloc((void **)&p, n * sizeof *p));
    CUDA(cudaMemcpyAsync(p, host, n * sizeof *p, cudaMemcpyHostToDevice, r->stream));
    CUDA(cudaStreamSynchronize(r->stream));
    free(host);
    return p;
}

void read_floats(struct rank_case *r, float *to, const float *from, size_t n)
{
    CUDA(cudaMemcpyAsync(to, from, n * sizeof *to, cudaMemcpyDeviceToHost, r->stream));
}

bool stays_pending(cudaStream_t stream)
{
    for (int i = 0; i < 30; i++) {
        if (cudaStreamQuery(stream) != cudaErrorNotReady) return false;
        sleep_ms(1);
    }
    cudaGetLastError();
    return true;
}

bool all_nan(const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (!isnan(x[i])) return false;
    }
    return true;
}

/* ---- mistakes -------------------------------------------------------------------------------- */

enum { MOST_MISTAKES = 64 };

static pthread_mutex_t mistake_mutex = PTHREAD_MUTEX_INITIALIZER;
static int mistake_count;
static char mistake_text[MOST_MISTAKES][1024];

static void on_mistake(const char *message)
{
    pthread_mutex_lock(&mistake_mutex);
    if (mistake_count < MOST_MISTAKES)
        snprintf(mistake_text[mistake_count], sizeof mistake_text[0], "%s", message);
    mistake_count++;
    pthread_mutex_unlock(&mistake_mutex);
}

void watch_mistakes(void)
{
    pthread_mutex_lock(&mistake_mutex);
    mistake_count = 0;
    pthread_mutex_unlock(&mistake_mutex);
    emu_on_mistake(on_mistake);
}

bool mistaken(const char *words)
{
    bool found = false;
    pthread_mutex_lock(&mistake_mutex);
    for (int i = 0; i < mistake_count && i < MOST_MISTAKES && !found; i++)
        found = strstr(mistake_text[i], words) != NULL;
    pthread_mutex_unlock(&mistake_mutex);
    return found;
}
