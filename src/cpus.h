/* cpus.h - how many threads this process may use. */
#ifndef MOE_CPUS_H
#define MOE_CPUS_H

#include <stdint.h>

enum { MOE__MAX_THREADS = 4096 };

/* CPUs of the affinity mask, at most the cgroup's quota rounded up; from 1 to MOE__MAX_THREADS.
 * Allocates nothing. */
int32_t moe__available_threads(void);

/* CPUs that the text of a cgroup v2 cpu.max allows, rounded up ("250000 100000" is 3); 0 for no
 * limit ("max 100000") or text that is none. */
int32_t moe__parse_cpu_max(const char *text);

/* The same for cgroup v1's cpu.cfs_quota_us ("-1" is no limit) and cpu.cfs_period_us. */
int32_t moe__parse_cfs_quota(const char *quota, const char *period);

/* The group in a line of /proc/self/cgroup, and in *v2 whether the line is of cgroup v2; NULL for a
 * line that has no say about CPU time: "0::/a" is "/a" of v2, "4:cpu,cpuacct:/b" "/b" of v1,
 * "3:cpuset:/c" none. */
const char *moe__parse_cgroup_line(const char *line, int32_t *v2);

/* The tightest limit of `group` and its parents up to the root, where the root of the hierarchy is
 * mounted at `root`; 0 for none. */
int32_t moe__cgroup_limit_at(const char *root, const char *group);

#endif
