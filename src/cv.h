/* cv.h - the squared coefficient of variation and its gradient (Shazeer et al. 2017, eq. 6-7).
 *
 *     m = sum(v)/n,  Var = sum (v-m)^2 / d,  d = n or n-1,  cv2 = Var / (m^2 + 1e-10)
 *     dv_i = (2 (v_i - m) / d) / (m^2 + 1e-10)  -  Var (2 m / n) / (m^2 + 1e-10)^2
 *
 * n = 0 gives 0, and so does n = 1 with ddof 1. Feed every element to moe__cv_add, then every
 * element to moe__cv_add_square, then ask. */
#ifndef MOE_CV_H
#define MOE_CV_H

#include <stdint.h>

typedef struct moe__cv {
    int64_t n;
    int32_t ddof;
    double sum, squares;
} moe__cv;

static inline double moe__cv_mean(const moe__cv *cv) { return cv->n ? cv->sum / (double)cv->n : 0; }

static inline void moe__cv_add(moe__cv *cv, double v) { cv->sum += v; }

static inline void moe__cv_add_square(moe__cv *cv, double v)
{
    double from_mean = v - moe__cv_mean(cv);
    cv->squares += from_mean * from_mean;
}

/* 1/d, or 0 where there is no freedom. */
static inline double moe__cv_per_freedom(const moe__cv *cv)
{
    return cv->n > cv->ddof ? 1 / (double)(cv->n - cv->ddof) : 0;
}

static inline double moe__cv_value(const moe__cv *cv)
{
    double mean = moe__cv_mean(cv);
    return cv->squares * moe__cv_per_freedom(cv) / (mean * mean + 1e-10);
}

static inline double moe__cv_gradient(const moe__cv *cv, double v)
{
    double mean = moe__cv_mean(cv), scale = mean * mean + 1e-10;
    double by_variance = 2 * (v - mean) * moe__cv_per_freedom(cv) / scale;
    return by_variance - moe__cv_value(cv) * (2 * mean / (double)cv->n) / scale;
}

/* The same for an array of double: returns cv2; dv (may be NULL) = factor * gradient. */
static inline double moe__cv2(const double *v, int64_t n, int32_t ddof, double factor, double *dv)
{
    moe__cv cv = {.n = n, .ddof = ddof};
    for (int64_t i = 0; i < n; i++) moe__cv_add(&cv, v[i]);
    for (int64_t i = 0; i < n; i++) moe__cv_add_square(&cv, v[i]);
    for (int64_t i = 0; dv && i < n; i++) dv[i] = factor * moe__cv_gradient(&cv, v[i]);
    return moe__cv_value(&cv);
}

#endif
