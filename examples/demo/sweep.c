/* sweep.c - see sweep.h. The rates are half, once and twice --rate, the seeds --seed and the two
 * after it; a seed sets parameters, batches and noise. The spread is the sample standard deviation
 * over seeds. */
#define _XOPEN_SOURCE 700
#include "sweep.h"

#include "train.h"

#include <math.h>
#include <stdio.h>

enum { RATES = 3, SEEDS = 3 };
static const double FACTORS[RATES] = {0.5, 1, 2};

/* held-out bits of [model][rate][seed] */
typedef double results[MODELS][RATES][SEEDS];

typedef struct spread {
    double mean, deviation;
} spread;

static spread spread_of(const double *values)
{
    spread s = {0, 0};
    for (int i = 0; i < SEEDS; i++) s.mean += values[i] / SEEDS;
    for (int i = 0; i < SEEDS; i++)
        s.deviation += (values[i] - s.mean) * (values[i] - s.mean) / (SEEDS - 1);
    s.deviation = sqrt(s.deviation);
    return s;
}

/* The spread of dense - MoE, seed by seed. */
static spread spread_of_difference(const double *moe, const double *dense)
{
    double difference[SEEDS];
    for (int i = 0; i < SEEDS; i++) difference[i] = dense[i] - moe[i];
    return spread_of(difference);
}

static int run_one(const options *o, const text *corpus, const ranks *r, held_out *held)
{
    trainer t;
    int result = trainer_create(&t, o, corpus, r) != 0 ? TRAIN_FAILED : train(&t);
    if (result == TRAIN_DONE && trainer_measure(&t, FINAL_BATCHES, held, NULL, NULL) != 0)
        result = TRAIN_FAILED;
    trainer_destroy(&t);
    return result;
}

static int run_all(const options *o, const text *corpus, const ranks *r, results bits)
{
    printf("\n| rate | seed | MoE | dense twin | dense - MoE | busiest / mean | idle experts |\n"
           "|---:|---:|---:|---:|---:|---:|---:|\n");
    for (int rate = 0; rate < RATES; rate++)
        for (int seed = 0; seed < SEEDS; seed++) {
            options one = *o;
            held_out held;
            one.rate = FACTORS[rate] * o->rate;
            one.seed = o->seed + (uint64_t)seed;
            one.quiet = 1;
            fflush(stdout);
            int result = run_one(&one, corpus, r, &held);
            if (result != TRAIN_DONE) return result;
            for (int i = 0; i < MODELS; i++) bits[i][rate][seed] = held.bits[i];
            printf("| %g | %llu | %.4f | %.4f | %+.4f | %.2f | %lld |\n", one.rate,
                   (unsigned long long)one.seed, held.bits[MOE], held.bits[DENSE],
                   held.bits[DENSE] - held.bits[MOE], held.sharing.busiest,
                   (long long)held.sharing.idle);
        }
    return TRAIN_DONE;
}

static int best_rate(double bits[RATES][SEEDS])
{
    int best = 0;
    for (int rate = 1; rate < RATES; rate++)
        if (spread_of(bits[rate]).mean < spread_of(bits[best]).mean) best = rate;
    return best;
}

int sweep(const options *o, const text *corpus, const ranks *r)
{
    results bits;
    int result = run_all(o, corpus, r, bits), best[MODELS];
    if (result != TRAIN_DONE) return result;
    printf("\n| rate | MoE | dense twin | dense - MoE |\n|---:|---:|---:|---:|\n");
    for (int rate = 0; rate < RATES; rate++) {
        spread moe = spread_of(bits[MOE][rate]), dense = spread_of(bits[DENSE][rate]);
        spread d = spread_of_difference(bits[MOE][rate], bits[DENSE][rate]);
        printf("| %g | %.4f +- %.4f | %.4f +- %.4f | %+.4f +- %.4f |\n", FACTORS[rate] * o->rate,
               moe.mean, moe.deviation, dense.mean, dense.deviation, d.mean, d.deviation);
    }
    for (int i = 0; i < MODELS; i++) best[i] = best_rate(bits[i]);
    spread moe = spread_of(bits[MOE][best[MOE]]), dense = spread_of(bits[DENSE][best[DENSE]]);
    spread d = spread_of_difference(bits[MOE][best[MOE]], bits[DENSE][best[DENSE]]);
    printf(
        "\nheld-out bits per byte at the best rate of each, mean and standard deviation over %d "
        "seeds:\nMoE %.4f +- %.4f (rate %g), dense twin %.4f +- %.4f (rate %g), difference %+.4f "
        "+- %.4f\n",
        SEEDS, moe.mean, moe.deviation, FACTORS[best[MOE]] * o->rate, dense.mean, dense.deviation,
        FACTORS[best[DENSE]] * o->rate, d.mean, d.deviation);
    return TRAIN_DONE;
}
