/* Forward and backward passes of EvoNorm-S0, and of GroupNorm with what follows it in a residual block: the shortcut is
 * added, then ReLU.
 *
 * Images are float32, channels-last [B, P, C], with P pixels; C is a multiple of 16; a group has 1, 2, 4, 8, or a
 * multiple of 16 channels. torch's separate operations read and write the batch about ten times; here a block of
 * channels of one image stays in the cache from its statistics to its result. Statistics, and the sums for the
 * parameters' gradients, are returned per image and channel [B, C], so no sum depends on the number of threads.
 */
#include <math.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int mask __attribute__((vector_size(4 * LANES)));

INLINE vec load(const float *from) {
    vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE void store(float *to, vec v) { memcpy(to, &v, sizeof v); }

INLINE vec all(float a) { return a - (vec){0}; }

INLINE vec choose(mask which, vec yes, vec no) { return (vec)((which & (mask)yes) | (~which & (mask)no)); }

/* 1 / (1 + exp(-z)), exact to a few units in the last place: exp is a power of two times a Taylor polynomial. */
INLINE vec sigmoid(vec z) {
    vec t = choose(z > 87.f, all(-87.f), choose(z < -87.f, all(87.f), -z));
    vec shifted = t * 1.44269504f + 12582912.f; /* adding 1.5 * 2^23 rounds to an integer */
    vec whole = shifted - 12582912.f;
    vec r = t - whole * 0.693145752f - whole * 1.42860677e-6f; /* log 2 in two parts */
    vec e = r * 1.98412698e-4f + 1.38888889e-3f;
    e = r * e + 8.33333333e-3f;
    e = r * e + .0416666667f;
    e = r * e + .166666667f;
    e = r * e + .5f;
    e = r * (r * e + 1.f) + 1.f;
    return 1.f / (1.f + (vec)((mask)e + (((mask)shifted - 0x4b400000) << 23)));
}

/* Channels of a block: whole groups and whole vectors. */
INLINE int block(int group) { return group < LANES ? LANES : group; }

/* For every channel of a block, the mean over its group in one image: of the values, or with `means` of their squared
 * distances to `means`. */
INLINE void group_mean(const float *x, const float *means, float *out, int P, int C, int group) {
    for (int c = 0; c < block(group); c += LANES) {
        vec sum = {0}, mean = means ? load(means + c) : sum;
        for (int p = 0; p < P; p++) {
            vec d = load(x + (long)p * C + c) - mean;
            sum += means ? d * d : d;
        }
        store(out + c, sum);
    }
    for (int c = 0; c < block(group); c += group) {
        float sum = 0;
        for (int k = c; k < c + group; k++) sum += out[k];
        for (int k = c; k < c + group; k++) out[k] = sum / ((float)P * group);
    }
}

/* Mean and 1 / standard deviation, in two passes, so that a large mean does not cost precision. */
INLINE void statistics(const float *x, float *mean, float *rstd, int P, int C, int group, float eps) {
    group_mean(x, 0, mean, P, C, group);
    group_mean(x, mean, rstd, P, C, group);
    for (int c = 0; c < block(group); c++) rstd[c] = 1 / sqrtf(rstd[c] + eps);
}

/* y = x sigmoid(v x) rstd gamma + beta */
void evonorm_forward(const float *x, const float *v, const float *gamma, const float *beta, float *y, float *mean, float *rstd,
                     int B, int P, int C, int group, float eps) {
#pragma omp parallel for collapse(2)
    for (int b = 0; b < B; b++)
        for (int from = 0; from < C; from += block(group)) {
            long image = (long)b * P * C, row = (long)b * C;
            statistics(x + image + from, mean + row + from, rstd + row + from, P, C, group, eps);
            for (int c = from; c < from + block(group); c += LANES) {
                vec vc = load(v + c), scale = load(gamma + c) * load(rstd + row + c), shift = load(beta + c);
                for (long i = image + c; i < image + (long)P * C; i += C) {
                    vec xi = load(x + i);
                    store(y + i, xi * sigmoid(xi * vc) * scale + shift);
                }
            }
        }
}

void evonorm_backward(const float *g, const float *x, const float *v, const float *gamma, const float *mean, const float *rstd,
                      float *dx, float *dv, float *dgamma, float *dbeta, int B, int P, int C, int group) {
#pragma omp parallel for collapse(2)
    for (int b = 0; b < B; b++)
        for (int from = 0; from < C; from += block(group)) {
            long image = (long)b * P * C, row = (long)b * C;
            for (int c = from; c < from + block(group); c += LANES) {
                vec vc = load(v + c), r = load(rstd + row + c), scale = load(gamma + c) * r;
                vec along = {0}, bent = {0}, sum = {0};
                for (long i = image + c; i < image + (long)P * C; i += C) {
                    vec gi = load(g + i), xi = load(x + i), gate = sigmoid(xi * vc), gated = xi * gate;
                    vec slope = gated - gated * gate; /* x gate', gate' = gate (1 - gate) */
                    sum += gi;
                    along += gi * gated;
                    bent += gi * slope * xi;
                    store(dx + i, (slope * vc + gate) * gi * scale);
                }
                store(dv + row + c, bent * scale);
                store(dgamma + row + c, along * r);
                store(dbeta + row + c, sum);
            }
            float slope[block(group)]; /* factor of x - mean in dx, from the standard deviation */
            for (int c = 0; c < block(group); c += group) {
                const float *along = dgamma + row + from + c, *of = gamma + from + c;
                float r = rstd[row + from + c], sum = 0;
                for (int k = 0; k < group; k++) sum += along[k] * of[k];
                for (int k = 0; k < group; k++) slope[c + k] = -sum * r * r / ((float)P * group);
            }
            for (int c = from; c < from + block(group); c += LANES) {
                vec s = load(slope + c - from), m = load(mean + row + c);
                for (long i = image + c; i < image + (long)P * C; i += C) store(dx + i, load(dx + i) + (load(x + i) - m) * s);
            }
        }
}

/* y = (x - mean) rstd gamma + beta, plus the shortcut unless it is null, then ReLU if `relu` */
void group_norm_forward(const float *x, const float *gamma, const float *beta, const float *shortcut, float *y, float *mean,
                        float *rstd, int B, int P, int C, int group, int relu, float eps) {
#pragma omp parallel for collapse(2)
    for (int b = 0; b < B; b++)
        for (int from = 0; from < C; from += block(group)) {
            long image = (long)b * P * C, row = (long)b * C;
            statistics(x + image + from, mean + row + from, rstd + row + from, P, C, group, eps);
            for (int c = from; c < from + block(group); c += LANES) {
                vec m = load(mean + row + c), scale = load(gamma + c) * load(rstd + row + c), shift = load(beta + c);
                for (long i = image + c; i < image + (long)P * C; i += C) {
                    vec yi = (load(x + i) - m) * scale + shift;
                    if (shortcut) yi += load(shortcut + i);
                    store(y + i, relu ? choose(yi < 0.f, all(0.f), yi) : yi); /* nan stays nan */
                }
            }
        }
}

/* `through` receives the gradient by the input of ReLU, which is also the shortcut's; without `relu`, `y` and `through`
 * are unused. */
void group_norm_backward(const float *g, const float *x, const float *y, const float *gamma, const float *mean,
                         const float *rstd, float *dx, float *through, float *dgamma, float *dbeta, int B, int P, int C,
                         int group, int relu) {
#pragma omp parallel for collapse(2)
    for (int b = 0; b < B; b++)
        for (int from = 0; from < C; from += block(group)) {
            long image = (long)b * P * C, row = (long)b * C;
            const float *before = relu ? through : g;
            for (int c = from; c < from + block(group); c += LANES) {
                vec m = load(mean + row + c), along = {0}, sum = {0};
                for (long i = image + c; i < image + (long)P * C; i += C) {
                    vec gi = load(g + i);
                    if (relu) store(through + i, gi = choose(load(y + i) <= 0.f, all(0.f), gi));
                    sum += gi;
                    along += gi * (load(x + i) - m);
                }
                store(dgamma + row + c, along * load(rstd + row + c));
                store(dbeta + row + c, sum);
            }
            /* dx has a constant part from the mean, and a multiple of x - mean from the standard deviation */
            float level[block(group)], slope[block(group)];
            for (int c = 0; c < block(group); c += group) {
                long at = row + from + c;
                float r = rstd[at], sum = 0, along = 0, N = (float)P * group;
                for (int k = 0; k < group; k++) {
                    sum += dbeta[at + k] * gamma[from + c + k];
                    along += dgamma[at + k] * gamma[from + c + k];
                }
                for (int k = 0; k < group; k++) {
                    level[c + k] = -sum * r / N;
                    slope[c + k] = -along * r * r / N;
                }
            }
            for (int c = from; c < from + block(group); c += LANES) {
                vec m = load(mean + row + c), scale = load(gamma + c) * load(rstd + row + c);
                vec a = load(level + c - from), s = load(slope + c - from);
                for (long i = image + c; i < image + (long)P * C; i += C)
                    store(dx + i, load(before + i) * scale + (load(x + i) - m) * s + a);
            }
        }
}
