/* bench_crew.c - the threads that peers without threads of their own work on.
 *
 * They sleep between jobs, so that they take no core from the peer whose turn it is. */
#include "bench.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct seat {
    bench_crew *crew;
    int thread;
} seat;

struct bench_crew {
    int threads, busy;
    int64_t turn; /* counts jobs */
    bool stop;
    bench_job job;
    void *argument;
    pthread_mutex_t lock;
    pthread_cond_t begin, end;
    pthread_t thread[BENCH_MOST_THREADS];
    seat seats[BENCH_MOST_THREADS];
};

static void *work(void *argument)
{
    seat *s = argument;
    bench_crew *crew = s->crew;
    int64_t turn = 0;
    pthread_mutex_lock(&crew->lock);
    for (;;) {
        while (crew->turn == turn && !crew->stop) pthread_cond_wait(&crew->begin, &crew->lock);
        if (crew->stop) break;
        turn = crew->turn;
        pthread_mutex_unlock(&crew->lock);
        crew->job(crew->argument, s->thread);
        pthread_mutex_lock(&crew->lock);
        if (--crew->busy == 0) pthread_cond_signal(&crew->end);
    }
    pthread_mutex_unlock(&crew->lock);
    return NULL;
}

bench_crew *bench_crew_start(int threads)
{
    bench_crew *crew = calloc(1, sizeof *crew);
    if (!crew) exit(1);
    crew->threads = threads;
    pthread_mutex_init(&crew->lock, NULL);
    pthread_cond_init(&crew->begin, NULL);
    pthread_cond_init(&crew->end, NULL);
    for (int i = 1; i < threads; i++) {
        crew->seats[i] = (seat){crew, i};
        if (pthread_create(&crew->thread[i], NULL, work, &crew->seats[i]) != 0) {
            (void)fprintf(stderr, "bench: %d threads could not be started\n", threads);
            exit(1);
        }
    }
    return crew;
}

void bench_crew_run(bench_crew *crew, bench_job job, void *argument)
{
    pthread_mutex_lock(&crew->lock);
    crew->job = job, crew->argument = argument, crew->busy = crew->threads - 1, crew->turn++;
    pthread_cond_broadcast(&crew->begin);
    pthread_mutex_unlock(&crew->lock);
    job(argument, 0);
    pthread_mutex_lock(&crew->lock);
    while (crew->busy > 0) pthread_cond_wait(&crew->end, &crew->lock);
    pthread_mutex_unlock(&crew->lock);
}

int bench_crew_threads(const bench_crew *crew) { return crew->threads; }

void bench_crew_stop(bench_crew *crew)
{
    pthread_mutex_lock(&crew->lock);
    crew->stop = true;
    pthread_cond_broadcast(&crew->begin);
    pthread_mutex_unlock(&crew->lock);
    for (int i = 1; i < crew->threads; i++) pthread_join(crew->thread[i], NULL);
    pthread_mutex_destroy(&crew->lock);
    pthread_cond_destroy(&crew->begin);
    pthread_cond_destroy(&crew->end);
    free(crew);
}

void bench_share(int64_t count, int threads, int i, int64_t *begin, int64_t *end)
{
    *begin = count * i / threads;
    *end = count * (i + 1) / threads;
}
