/* context_host.h - a host's allocator, log and contexts; shared by check_context.c and
 * check_threads.c. */
#ifndef CONTEXT_HOST_H
#define CONTEXT_HOST_H

#include "internal.h"
#include "cpus.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define WITH_TSAN 1
#elif __has_feature(address_sanitizer)
#define WITH_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define WITH_TSAN 1
#elif defined(__SANITIZE_ADDRESS__)
#define WITH_ASAN 1
#endif

static inline double seconds(clockid_t clock)
{
    struct timespec t = {0, 0};
    (void)clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline void sleep_ms(long ms)
{
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    while (nanosleep(&t, &t) != 0 && errno == EINTR) continue;
}

static inline int32_t thread_number(void) { return (int32_t)syscall(SYS_gettid); }

/* ---- a host's allocator, log and contexts ---------------------------------------------------- */

/* Counts, remembers sizes, and fails the call number `fail_at` (from 1). */
typedef struct host {
    int64_t calls, fail_at, live, wrong;
    pthread_t thread;
    struct {
        void *memory;
        uint64_t size;
    } block[64];
    int32_t log_calls, log_level;
    char log_text[512];
} host;

static inline void *host_alloc(void *user, uint64_t size, uint64_t alignment)
{
    host *h = user;
    void *memory = NULL;
    if (size == 0 || alignment < 16 || alignment > 4096 || (alignment & (alignment - 1)) != 0)
        h->wrong++;
    if (!pthread_equal(h->thread, pthread_self())) h->wrong++;
    if (++h->calls == h->fail_at) return NULL;
    if (posix_memalign(&memory, (size_t)alignment, (size_t)size) != 0) return NULL;
    memset(memory, 0x5a, (size_t)size);
    for (int i = 0; i < 64; i++)
        if (!h->block[i].memory) {
            h->block[i].memory = memory;
            h->block[i].size = size;
            h->live++;
            return memory;
        }
    free(memory);
    return NULL;
}

static inline void host_free(void *user, void *memory, uint64_t size)
{
    host *h = user;
    for (int i = 0; i < 64; i++)
        if (memory && h->block[i].memory == memory) {
            if (h->block[i].size != size) h->wrong++;
            h->block[i].memory = NULL;
            h->live--;
            memset(memory, 0xa5, (size_t)size);
            free(memory);
            return;
        }
    h->wrong++;
}

static inline void host_log(void *user, int32_t level, const char *text)
{
    host *h = user;
    h->log_calls++;
    h->log_level = level;
    (void)snprintf(h->log_text, sizeof h->log_text, "%s", text);
}

static inline moe_context_config config_of(int32_t threads)
{
    moe_context_config config;
    ck_assert_int_eq(moe_context_config_init(&config, sizeof config), MOE_OK);
    config.threads = threads;
    return config;
}

static inline moe_context_config host_config(host *h, int32_t threads)
{
    moe_context_config config = config_of(threads);
    memset(h, 0, sizeof *h);
    h->thread = pthread_self();
    config.alloc = host_alloc;
    config.free = host_free;
    config.alloc_user = h;
    config.log = host_log;
    config.log_user = h;
    return config;
}

static inline moe_context *create(const moe_context_config *config)
{
    moe_context *context = NULL;
    ck_assert_msg(moe_context_create(&context, config) == MOE_OK, "%s", moe_last_error());
    ck_assert_ptr_nonnull(context);
    return context;
}

static inline moe_context *create_threads(int32_t threads)
{
    moe_context_config config = config_of(threads);
    return create(&config);
}

#endif
