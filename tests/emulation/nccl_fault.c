/* nccl_fault.c - what shall go wrong, asked for by tests or by MOE_EMULATION_NCCL. */
#include "nccl_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { FAULTS = 64 };

static struct call_fault {
    int rank, left;
    char function[48];
    ncclResult_t result;
} call_faults[FAULTS];

enum trouble { NO_TROUBLE, ASYNC_ERROR, ABSENT, DELAY };

static struct operation_fault {
    enum trouble trouble;
    int rank, left, value;
} operation_faults[FAULTS];

static int polls = -1;
static bool shared_devices, leaks_reported, environment_read, whole;
static uint64_t host_waits;

/* ---- asking ---------------------------------------------------------------------------------- */

static void set_call(int rank, const char *function, int n, int result)
{
    for (int i = 0; i < FAULTS; i++) {
        struct call_fault *f = &call_faults[i];
        if (f->left > 0) continue;
        f->rank = rank;
        f->left = n;
        f->result = (ncclResult_t)result;
        snprintf(f->function, sizeof f->function, "%s", function);
        return;
    }
}

static void set_operation(enum trouble trouble, int rank, int n, int value)
{
    for (int i = 0; i < FAULTS; i++) {
        struct operation_fault *f = &operation_faults[i];
        if (f->trouble != NO_TROUBLE) continue;
        f->trouble = trouble;
        f->rank = rank;
        f->left = n;
        f->value = value;
        return;
    }
}

static bool read_item(const char *item)
{
    char function[48];
    int rank, n, value;
    if (sscanf(item, "fail=%d:%47[^:,]:%d:%d", &rank, function, &n, &value) == 4) {
        set_call(rank, function, n, value);
    } else if (sscanf(item, "async=%d:%d:%d", &rank, &n, &value) == 3) {
        set_operation(ASYNC_ERROR, rank, n, value);
    } else if (sscanf(item, "absent=%d:%d", &rank, &n) == 2) {
        set_operation(ABSENT, rank, n, 0);
    } else if (sscanf(item, "delay=%d:%d:%d", &rank, &n, &value) == 3) {
        set_operation(DELAY, rank, n, value);
    } else if (sscanf(item, "polls=%d", &value) == 1) {
        polls = value;
    } else if (strncmp(item, "share", 5) == 0) {
        shared_devices = true;
    } else if (strncmp(item, "leaks", 5) == 0) {
        leaks_reported = true;
    } else {
        return false;
    }
    return true;
}

static void read_environment(void)
{
    if (environment_read) return;
    environment_read = true;
    for (const char *p = emu_option("MOE_EMULATION_NCCL"); p != NULL;) {
        if (!read_item(p)) emu_mistake("MOE_EMULATION_NCCL: cannot read '%s'", p);
        p = strchr(p, ',');
        if (p != NULL) p++;
    }
}

#define LOCKED(action)      \
    do {                    \
        emu_lock();         \
        read_environment(); \
        action;             \
        emu_unlock();       \
    } while (0)

void emu_nccl_fail(int rank, const char *function, int n, ncclResult_t result)
{
    LOCKED(set_call(rank, function, n, (int)result));
}

void emu_nccl_async_error(int rank, int n, ncclResult_t result)
{
    LOCKED(set_operation(ASYNC_ERROR, rank, n, (int)result));
}

void emu_nccl_absent(int rank, int n) { LOCKED(set_operation(ABSENT, rank, n, 0)); }

void emu_nccl_delay(int rank, int n, int milliseconds)
{
    LOCKED(set_operation(DELAY, rank, n, milliseconds));
}

void emu_nccl_polls(int n) { LOCKED(polls = n); }
void emu_nccl_whole(int on) { LOCKED(whole = on != 0); }
void emu_nccl_share_device(int allowed) { LOCKED(shared_devices = allowed != 0); }
void emu_nccl_report_leaks(int on) { LOCKED(leaks_reported = on != 0); }

void emu_nccl_heal(void)
{
    emu_lock();
    memset(call_faults, 0, sizeof call_faults);
    memset(operation_faults, 0, sizeof operation_faults);
    polls = -1;
    shared_devices = leaks_reported = whole = false;
    environment_read = true;
    host_waits = 0;
    emu_unlock();
}

uint64_t emu_nccl_host_waits(void)
{
    uint64_t waits;
    LOCKED(waits = host_waits);
    return waits;
}

/* ---- playing, under the lock ----------------------------------------------------------------- */

ncclResult_t nccl_fault(int rank, const char *name)
{
    ncclResult_t result = (ncclResult_t)emu_fault(name);
    read_environment();
    for (int i = 0; i < FAULTS && result == ncclSuccess; i++) {
        struct call_fault *f = &call_faults[i];
        if (f->left == 0 || (f->rank >= 0 && f->rank != rank)) continue;
        if (strcmp(f->function, name) == 0 && --f->left == 0) result = f->result;
    }
    return result;
}

struct nccl_misfortune nccl_misfortune(int rank)
{
    struct nccl_misfortune m = {false, 0, ncclSuccess};
    read_environment();
    for (int i = 0; i < FAULTS; i++) {
        struct operation_fault *f = &operation_faults[i];
        if (f->trouble == NO_TROUBLE || (f->rank >= 0 && f->rank != rank)) continue;
        if (f->left > 0) f->left--;
        if (f->left > 0) continue;
        if (f->trouble == ABSENT) m.absent = true;
        if (f->trouble == DELAY) m.delay = f->value;
        if (f->trouble == ASYNC_ERROR) m.error = (ncclResult_t)f->value;
        if (f->trouble != ABSENT) f->trouble = NO_TROUBLE;
    }
    return m;
}

int nccl_polls(bool waits)
{
    read_environment();
    if (polls >= 0) return polls;
    return waits || emu_coin(4);
}

bool nccl_devices_shared(void)
{
    read_environment();
    return shared_devices;
}

bool nccl_whole(void) { return whole; }

void nccl_count_host_wait(void) { host_waits++; }

/* ---- the end --------------------------------------------------------------------------------- */

static void __attribute__((destructor)) report(void)
{
    emu_lock();
    read_environment();
    size_t live = emu_nccl_live(), open = nccl_open_groups();
    if (open > 0) emu_mistake("NCCL: the process ends with %zu groups open", open);
    if (leaks_reported && live > 0) {
        emu_mistake("NCCL: the process ends with %zu communicators not destroyed", live);
    }
    emu_unlock();
}
