/* cpus.c - affinity mask and cgroup quota: a container with 2 CPUs of 64 gets 2 threads. */
#include "cpus.h"

#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifdef __linux__
#include <sched.h>
#endif

enum { TEXT_SIZE = 256, GROUPS_SIZE = 8192, PATH_SIZE = 4096 };

/* ---- texts ----------------------------------------------------------------------------------- */

static int32_t ratio_up(long long quota, long long period)
{
    if (quota <= 0 || period <= 0) return 0;
    long long cpus = quota / period + (quota % period != 0);
    return cpus > INT32_MAX ? INT32_MAX : (int32_t)cpus;
}

int32_t moe__parse_cpu_max(const char *text)
{
    char *end;
    long long quota = strtoll(text, &end, 10);
    if (end == text || *end != ' ') return 0;
    return ratio_up(quota, strtoll(end, NULL, 10));
}

int32_t moe__parse_cfs_quota(const char *quota, const char *period)
{
    return ratio_up(strtoll(quota, NULL, 10), strtoll(period, NULL, 10));
}

/* Whether a list "cpu,cpuacct" of `length` characters has the word "cpu". */
static int has_cpu(const char *list, size_t length)
{
    const char *end = list + length;
    while (list < end) {
        const char *comma = memchr(list, ',', (size_t)(end - list));
        const char *stop = comma ? comma : end;
        if (stop - list == 3 && memcmp(list, "cpu", 3) == 0) return 1;
        list = stop + 1;
    }
    return 0;
}

const char *moe__parse_cgroup_line(const char *line, int32_t *v2)
{
    const char *list = strchr(line, ':');
    const char *group = list ? strchr(list + 1, ':') : NULL;
    if (!group || group[1] != '/') return NULL;
    size_t length = (size_t)(group - list) - 1;
    *v2 = length == 0;
    return *v2 || has_cpu(list + 1, length) ? group + 1 : NULL;
}

/* ---- files ----------------------------------------------------------------------------------- */

/* Reads a small file whole, or its beginning; 0 if there is none. */
static int read_text(const char *path, char *text, size_t size)
{
    size_t used = 0;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    while (used < size - 1) {
        ssize_t got = read(file, text + used, size - 1 - used);
        if (got <= 0) break;
        used += (size_t)got;
    }
    (void)close(file);
    text[used] = 0;
    return used > 0;
}

/* Limit of one cgroup directory, v2 or v1; 0 for none. */
static int32_t limit_of_group(const char *directory)
{
    char path[PATH_SIZE + 32], text[TEXT_SIZE], period[TEXT_SIZE];
    (void)snprintf(path, sizeof path, "%s/cpu.max", directory);
    if (read_text(path, text, sizeof text)) return moe__parse_cpu_max(text);
    (void)snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", directory);
    if (!read_text(path, text, sizeof text)) return 0;
    (void)snprintf(path, sizeof path, "%s/cpu.cfs_period_us", directory);
    return read_text(path, period, sizeof period) ? moe__parse_cfs_quota(text, period) : 0;
}

static int32_t tighter(int32_t a, int32_t b) { return a == 0 || (b > 0 && b < a) ? b : a; }

int32_t moe__cgroup_limit_at(const char *root, const char *group)
{
    char path[PATH_SIZE];
    int32_t tightest = 0;
    int length = snprintf(path, sizeof path, "%s%s", root, group);
    if (length < 0 || length >= PATH_SIZE) return 0;
    for (;;) {
        tightest = tighter(tightest, limit_of_group(path));
        if (strlen(path) <= strlen(root)) return tightest;
        *strrchr(path, '/') = 0;
    }
}

/* Limit of this process's own groups. */
static int32_t cgroup_limit(void)
{
    char text[GROUPS_SIZE], *rest = NULL;
    int32_t tightest = 0, v2;
    if (!read_text("/proc/self/cgroup", text, sizeof text)) return 0;
    for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        const char *group = moe__parse_cgroup_line(line, &v2);
        if (!group) continue;
        const char *root = v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu";
        tightest = tighter(tightest, moe__cgroup_limit_at(root, group));
    }
    return tightest;
}

static int32_t affinity_count(void)
{
#ifdef __linux__
    cpu_set_t sets[64]; /* 65536 CPUs; the call refuses a mask smaller than the machine's */
    if (sched_getaffinity(0, sizeof sets, sets) == 0) {
        int count = CPU_COUNT_S(sizeof sets, sets);
        if (count > 0) return count;
    }
#endif
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 && online < MOE__MAX_THREADS ? (int32_t)online : 1;
}

int32_t moe__available_threads(void)
{
    int32_t cpus = tighter(affinity_count(), cgroup_limit());
    return cpus < MOE__MAX_THREADS ? cpus : MOE__MAX_THREADS;
}
