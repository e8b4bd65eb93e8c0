/* errors.c - how calls begin and end: the lock, errors that stay, refusals, mistakes, devices.
 *
 * A refusal is what the real library would not do either, or would do wrongly: the call returns an
 * error and the reason is kept for emu_last_message. A mistake is what no correct program does
 * where CUDA has no error to return: the program ends, or the test's handler is called. */
#include "internal.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { PATIENCE = 5000000 /* ns */ };

static pthread_mutex_t mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int holds; /* how often the thread that has the lock took it */
static cudaError_t sticky[EMU_DEVICES];
static bool peers[EMU_DEVICES][EMU_DEVICES];
static char message[1024];
static void (*handler)(const char *message);
static __thread cudaError_t last;
static __thread int current_device;
static __thread bool in_host_function;
static __thread int depth;

void emu_lock(void)
{
    pthread_mutex_lock(&mutex);
    holds++;
}

void emu_unlock(void)
{
    holds--;
    pthread_mutex_unlock(&mutex);
}

void emu_wait(void)
{
    int kept = holds;
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += PATIENCE;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    while (holds > 1) emu_unlock();
    holds = 0;
    pthread_cond_timedwait(&changed, &mutex, &until);
    holds = 1;
    while (holds < kept) emu_lock();
}

void emu_notify(void) { pthread_cond_broadcast(&changed); }
bool *emu_in_host_function(void) { return &in_host_function; }

/* ---- devices --------------------------------------------------------------------------------- */

int emu_device_count(void)
{
    const char *option = emu_option("MOE_EMULATION_DEVICES");
    int n = option != NULL ? atoi(option) : 2;
    return n > EMU_DEVICES ? EMU_DEVICES : n;
}

int emu_device(void) { return current_device; }
void emu_set_device(int device) { current_device = device; }
bool emu_peers(int device, int other) { return device == other || peers[device][other]; }

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer)
{
    cudaError_t status = emu_enter("cudaDeviceCanAccessPeer", EMU_SAFE);
    if (status == cudaSuccess) *can = device != peer;
    return emu_leave(status);
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags)
{
    cudaError_t status = emu_enter("cudaDeviceEnablePeerAccess", EMU_SAFE);
    (void)flags;
    if (status == cudaSuccess) {
        if (peer < 0 || peer >= emu_device_count() || peer == current_device) {
            status = cudaErrorInvalidDevice;
        } else if (peers[current_device][peer]) {
            status = cudaErrorPeerAccessAlreadyEnabled;
        } else {
            peers[current_device][peer] = true;
        }
    }
    return emu_leave(status);
}

cudaError_t cudaDeviceDisablePeerAccess(int peer)
{
    cudaError_t status = emu_enter("cudaDeviceDisablePeerAccess", EMU_SAFE);
    if (status == cudaSuccess) peers[current_device][peer] = false;
    return emu_leave(status);
}

/* ---- calls ----------------------------------------------------------------------------------- */

static cudaError_t no_device(void)
{
    if (emu_option("MOE_EMULATION_NO_DRIVER") != NULL) return cudaErrorInsufficientDriver;
    return emu_device_count() > 0 ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t emu_enter(const char *name, enum emu_safety safety)
{
    emu_lock();
    if (depth++ > 0) return cudaSuccess;
    if (in_host_function) return emu_refuse(cudaErrorNotPermitted, "%s in a host function", name);
    cudaError_t status = no_device();
    if (status == cudaSuccess) status = emu_fault(name);
    if (status == cudaSuccess && safety != EMU_QUIET) status = sticky[current_device];
    if (status == cudaSuccess && safety == EMU_UNSAFE && emu_capture_forbids()) {
        status = emu_refuse(cudaErrorStreamCaptureUnsupported, "%s while a stream captures", name);
    }
    if (status == cudaSuccess && safety != EMU_QUIET) emu_jitter();
    return status;
}

cudaError_t emu_leave(cudaError_t status)
{
    if (--depth == 0 && status != cudaSuccess) last = status;
    emu_unlock();
    return status;
}

cudaError_t cudaGetLastError(void)
{
    cudaError_t status = last;
    last = sticky[current_device];
    return status;
}

cudaError_t cudaPeekAtLastError(void) { return last; }

void emu_make_sticky(int device, cudaError_t status)
{
    if (sticky[device] == cudaSuccess) sticky[device] = status;
    emu_kill_streams(device);
}

cudaError_t emu_sticky(int device) { return sticky[device]; }

void emu_clear_sticky(void)
{
    for (int d = 0; d < EMU_DEVICES; d++) sticky[d] = cudaSuccess;
    last = cudaSuccess;
}

/* ---- messages -------------------------------------------------------------------------------- */

cudaError_t emu_refuse(cudaError_t status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    if (emu_option("MOE_EMULATION_QUIET") == NULL) {
        fprintf(stderr, "emulation: refused: %s (seed %llu)\n", message,
                (unsigned long long)emu_seed());
    }
    return status;
}

void emu_mistake(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    if (handler != NULL) {
        handler(message);
        return;
    }
    fprintf(stderr, "emulation: %s (MOE_EMULATION_SEED=%llu)\n", message,
            (unsigned long long)emu_seed());
    abort();
}

void emu_on_mistake(void (*f)(const char *message)) { handler = f; }
const char *emu_last_message(void) { return message; }
