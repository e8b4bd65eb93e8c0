/* cpus.c - affinity mask and cgroup quota: a container with 2 CPUs of 64 gets 2 threads. */
#include "cpus.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifdef __linux__
#include <sched.h>
#endif

enum { TEXT_SIZE = 256, PATH_SIZE = 4096, MOST_CPUS = 1 << 16 };

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

/* The first line of a small file; 0 if there is none. */
static int read_line(const char *path, char text[TEXT_SIZE])
{
    FILE *f = fopen(path, "re");
    if (!f) return 0;
    int got = fgets(text, TEXT_SIZE, f) != NULL;
    (void)fclose(f);
    return got;
}

/* Limit of one cgroup directory, v2 or v1; 0 for none. */
static int32_t limit_of_group(const char *directory)
{
    char path[PATH_SIZE + 32], text[TEXT_SIZE], period[TEXT_SIZE];
    (void)snprintf(path, sizeof path, "%s/cpu.max", directory);
    if (read_line(path, text)) return moe__parse_cpu_max(text);
    (void)snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", directory);
    if (!read_line(path, text)) return 0;
    (void)snprintf(path, sizeof path, "%s/cpu.cfs_period_us", directory);
    return read_line(path, period) ? moe__parse_cfs_quota(text, period) : 0;
}

/* The tightest limit from `group` below `root` up to `root` itself. */
static int32_t limit_of_path(const char *root, const char *group)
{
    char path[PATH_SIZE];
    int32_t tightest = 0;
    int length = snprintf(path, sizeof path, "%s%s", root, group);
    if (length < 0 || length >= PATH_SIZE) return 0;
    for (;;) {
        int32_t limit = limit_of_group(path);
        if (limit > 0 && (tightest == 0 || limit < tightest)) tightest = limit;
        if (strlen(path) <= strlen(root)) return tightest;
        *strrchr(path, '/') = 0;
    }
}

/* Limit of this process's own groups: "0::/path" is v2, "4:cpu,cpuacct:/path" is v1. */
static int32_t cgroup_limit(void)
{
    char line[PATH_SIZE];
    int32_t tightest = 0;
    FILE *f = fopen("/proc/self/cgroup", "re");
    if (!f) return 0;
    while (fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = 0;
        char *controllers = strchr(line, ':');
        char *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) continue;
        *group++ = 0;
        int v2 = controllers[1] == 0;
        if (!v2 && !strstr(controllers, "cpu")) continue;
        int32_t limit = limit_of_path(v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu", group);
        if (limit > 0 && (tightest == 0 || limit < tightest)) tightest = limit;
    }
    (void)fclose(f);
    return tightest;
}

static int32_t affinity_count(void)
{
#ifdef __linux__
    for (size_t cpus = 1024; cpus <= MOST_CPUS; cpus *= 2) {
        cpu_set_t *set = CPU_ALLOC(cpus);
        size_t size = CPU_ALLOC_SIZE(cpus);
        if (!set) break;
        int got = sched_getaffinity(0, size, set) == 0 ? CPU_COUNT_S(size, set) : 0;
        CPU_FREE(set);
        if (got > 0) return got;
    }
#endif
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 && online < MOST_CPUS ? (int32_t)online : 1;
}

int32_t moe__available_threads(void)
{
    int32_t cpus = affinity_count(), limit = cgroup_limit();
    return limit > 0 && limit < cpus ? limit : cpus;
}
