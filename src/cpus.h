/* cpus.h - how many threads this process may use. */
#ifndef MOE_CPUS_H
#define MOE_CPUS_H

#include <stdint.h>

/* CPUs of the affinity mask, at most the cgroup's quota rounded up; at least 1. */
int32_t moe__available_threads(void);

/* CPUs that the text of a cgroup v2 cpu.max allows ("200000 100000" is 2, "max 100000" no limit);
 * 0 for no limit or text that is none. */
int32_t moe__parse_cpu_max(const char *text);

/* The same for cgroup v1's cpu.cfs_quota_us and cpu.cfs_period_us. */
int32_t moe__parse_cfs_quota(const char *quota, const char *period);

#endif
