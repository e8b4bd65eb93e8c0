/* recorder.c - counts and lists the calls, and plays the faults that tests ask for. */
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { FAULTS = 32 };

static struct {
    struct emu_call *list;
    size_t count, room;
    uint64_t calls[EMU_CALL_KINDS], bytes[EMU_CALL_KINDS];
    bool on;
    struct ran {
        const void *stream;
        const char *name;
    } * ran;
    size_t ran_count, ran_room;
} record;

static struct fault {
    char function[64];
    int left, error;
} faults[FAULTS];
static int kernel_fault;
static bool environment_read;

/* ---- calls ----------------------------------------------------------------------------------- */

void emu_record(enum emu_kind kind, const char *name, const void *stream, size_t bytes,
                const void *to, const void *from)
{
    struct emu_call call = {kind, name, stream, bytes, to, from, emu_device(), NULL, 0, 0, 0};
    emu_record_call(&call);
}

void emu_record_call(const struct emu_call *call)
{
    record.calls[call->kind]++;
    record.bytes[call->kind] += call->bytes;
    if (!record.on) return;
    if (record.count == record.room) {
        size_t room = record.room > 0 ? 2 * record.room : 256;
        struct emu_call *list = realloc(record.list, room * sizeof *list);
        if (list == NULL) abort();
        record.list = list;
        record.room = room;
    }
    record.list[record.count++] = *call;
}

void emu_record_start(void)
{
    emu_lock();
    record.count = record.ran_count = 0;
    memset(record.calls, 0, sizeof record.calls);
    memset(record.bytes, 0, sizeof record.bytes);
    record.on = true;
    emu_unlock();
}

void emu_record_stop(void)
{
    emu_lock();
    record.on = false;
    emu_unlock();
}

size_t emu_calls(const struct emu_call **list)
{
    *list = record.list;
    return record.count;
}

uint64_t emu_count(enum emu_kind kind) { return record.calls[kind]; }
uint64_t emu_count_bytes(enum emu_kind kind) { return record.bytes[kind]; }

const char *emu_kind_name(enum emu_kind kind)
{
    static const char *const names[EMU_CALL_KINDS] = {
        "launch",  "gemm",     "to device",     "from device",   "on device",
        "on host", "set",      "synchronize",   "query",         "record",
        "wait",    "allocate", "free",          "allocate host", "free host",
        "object",  "graph",    "host function", "nccl"};
    return (unsigned)kind < EMU_CALL_KINDS ? names[kind] : "?";
}

/* ---- what was done --------------------------------------------------------------------------- */

void emu_record_ran(const char *name, const void *stream)
{
    if (!record.on) return;
    if (record.ran_count == record.ran_room) {
        size_t room = record.ran_room > 0 ? 2 * record.ran_room : 256;
        struct ran *list = realloc(record.ran, room * sizeof *list);
        if (list == NULL) abort();
        record.ran = list;
        record.ran_room = room;
    }
    record.ran[record.ran_count++] = (struct ran){stream, name};
}

size_t emu_ran(const void *stream, const char *name)
{
    size_t count = 0;
    emu_lock();
    for (size_t i = 0; i < record.ran_count; i++) {
        const struct ran *r = &record.ran[i];
        count += r->stream == stream && (name == NULL || strcmp(r->name, name) == 0);
    }
    emu_unlock();
    return count;
}

/* ---- faults ---------------------------------------------------------------------------------- */

static void set_fault(const char *function, int n, int error)
{
    int slot = -1;
    for (int i = 0; i < FAULTS; i++) {
        if (strcmp(faults[i].function, function) == 0)
            slot = i;
        else if (slot < 0 && faults[i].left == 0)
            slot = i;
    }
    if (slot < 0) return;
    snprintf(faults[slot].function, sizeof faults[slot].function, "%s", function);
    faults[slot].left = n;
    faults[slot].error = error;
}

static int usual_error(const char *function)
{
    if (strncmp(function, "cublas", 6) == 0) return 14; /* CUBLAS_STATUS_INTERNAL_ERROR */
    if (strncmp(function, "nccl", 4) == 0) return 2;    /* ncclSystemError */
    if (strstr(function, "Malloc") != NULL || strstr(function, "Alloc") != NULL) {
        return cudaErrorMemoryAllocation;
    }
    return strcmp(function, "kernel") == 0 ? cudaErrorLaunchFailure : cudaErrorUnknown;
}

/* "cudaMalloc:3,kernel:1:719,fault:2": function, which call, error; "fault" is emu_fail_kernel. */
static void read_environment(void)
{
    const char *p = emu_option("MOE_EMULATION_FAIL");
    environment_read = true;
    while (p != NULL && *p != 0) {
        char function[64];
        int n = 1, error = -1;
        if (sscanf(p, "%63[^:,]:%d:%d", function, &n, &error) < 1) return;
        if (strcmp(function, "fault") == 0)
            kernel_fault = n;
        else
            set_fault(function, n, error >= 0 ? error : usual_error(function));
        p = strchr(p, ',');
        p = p != NULL ? p + 1 : NULL;
    }
}

cudaError_t emu_fault(const char *name)
{
    if (!environment_read) read_environment();
    for (int i = 0; i < FAULTS; i++) {
        struct fault *f = &faults[i];
        if (f->left == 0 || strcmp(f->function, name) != 0) continue;
        return --f->left == 0 ? (cudaError_t)f->error : cudaSuccess;
    }
    return cudaSuccess;
}

bool emu_take_kernel_fault(void)
{
    if (!environment_read) read_environment();
    return kernel_fault > 0 && --kernel_fault == 0;
}

void emu_fail(const char *function, int n, int error)
{
    emu_lock();
    set_fault(function, n, error);
    emu_unlock();
}

void emu_fail_kernel(int n)
{
    emu_lock();
    kernel_fault = n;
    emu_unlock();
}

void emu_heal(void)
{
    emu_lock();
    memset(faults, 0, sizeof faults);
    kernel_fault = 0;
    environment_read = true;
    emu_clear_sticky();
    emu_unlock();
}
