/* bench_remote.c - peers that are programs of their own: a script that takes its turn when asked.
 *
 * It is started with the shape, the pass, the threads and a file of the routings. It says "ready",
 * and to each line it gets it answers the milliseconds of one call, of one routing after another.
 * Between its turns it is stopped: its threads would spin through those of the others. */
#include "bench.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct remote_peer {
    const char *name;
    pid_t child;
    FILE *ask, *answer;
    char routing[64];
} remote_peer;

static void end(bench_peer *p)
{
    remote_peer *r = p->state;
    if (r->child > 0) (void)kill(r->child, SIGCONT);
    if (r->ask) (void)fclose(r->ask);
    if (r->answer) (void)fclose(r->answer);
    if (r->child > 0) waitpid(r->child, NULL, 0);
    free(r);
}

static double run(bench_peer *p, int64_t call)
{
    remote_peer *r = p->state;
    char line[128];
    (void)call;
    (void)kill(r->child, SIGCONT);
    if (fputs("go\n", r->ask) < 0 || fflush(r->ask) != 0 || !fgets(line, sizeof line, r->answer)) {
        (void)fprintf(stderr, "bench: %s ended early\n", r->name);
        exit(1);
    }
    (void)kill(r->child, SIGSTOP);
    return 1e-3 * atof(line);
}

static bool write_routing(remote_peer *r, const bench_work *w)
{
    int file = mkstemp(strcpy(r->routing, "/tmp/bench-routing-XXXXXX"));
    FILE *to = file < 0 ? NULL : fdopen(file, "w");
    if (!to) return false;
    for (int64_t i = 0; i < w->routings * w->R; i++)
        (void)fprintf(to, "%d%c", (int)w->ids[i], (i + 1) % w->o->K == 0 ? '\n' : ' ');
    return fclose(to) == 0;
}

static void become(const char *script, const bench_options *o, const char *routing)
{
    char shape[128], threads[16];
    (void)snprintf(shape, sizeof shape, "%lld,%lld,%lld,%lld,%lld,%s", (long long)o->T,
                   (long long)o->D, (long long)o->F, (long long)o->E, (long long)o->K,
                   o->gated ? "swiglu" : "relu");
    (void)snprintf(threads, sizeof threads, "%d", o->threads);
    execlp(o->python, o->python, script, "--shape", shape, "--routing", routing, "--pass",
           o->backward ? "fwdbwd" : "fwd", "--threads", threads, "--serve", (char *)NULL);
    _exit(127);
}

static bool start(remote_peer *r, const char *script, const bench_options *o)
{
    int to[2], from[2];
    char line[128];
    /* Not to be held open by the next program, or this one would never see its end. */
    if (pipe2(to, O_CLOEXEC) != 0 || pipe2(from, O_CLOEXEC) != 0) return false;
    r->child = fork();
    if (r->child == 0) {
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL); /* also one that is stopped */
        dup2(to[0], 0), dup2(from[1], 1);
        become(script, o, r->routing);
    }
    close(to[0]), close(from[1]);
    r->ask = fdopen(to[1], "w"), r->answer = fdopen(from[0], "r");
    bool ready = r->child > 0 && r->ask && r->answer && fgets(line, sizeof line, r->answer) &&
                 strcmp(line, "ready\n") == 0;
    if (ready) (void)kill(r->child, SIGSTOP);
    return ready;
}

bool bench_remote_peer(bench_peer *p, bench_work *w, const char *name)
{
    remote_peer *r = calloc(1, sizeof *r);
    char script[1024];
    if (!r) exit(1);
    r->name = name;
    (void)signal(SIGPIPE, SIG_IGN);
    (void)snprintf(script, sizeof script, "%s/tests/bench/%s", MOE_SOURCE_DIR,
                   name[0] == 't' ? "torch_peer.py" : "ggml_peer.py");
    *p = (bench_peer){.name = name, .state = r, .run = run, .end = end};
    p->amount = bench_flops(w->o);
    bool started = write_routing(r, w) && start(r, script, w->o);
    (void)unlink(r->routing); /* it has been read */
    if (started) return true;
    (void)fprintf(stderr, "bench: %s left out: not installed for %s\n", name, w->o->python);
    end(p);
    return false;
}
