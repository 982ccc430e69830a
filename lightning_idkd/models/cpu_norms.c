/* Forward and backward passes of EvoNorm-S0, and of GroupNorm with what follows it in a residual block: the shortcut is
 * added, then ReLU.
 *
 * Images are channels-last [B, P, C], with P pixels, float32 or, with `half`, bfloat16; all else is float32, and so is all
 * arithmetic. C is a multiple of 16; a group has 1, 2, 4, 8, or a multiple of 16 channels. torch's separate operations read
 * and write the batch about ten times; here a block of channels of one image stays in the cache from its statistics to its
 * result. Statistics, and the sums for the parameters' gradients, are returned per image and channel [B, C], so no sum
 * depends on the number of threads.
 */
#include <math.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int mask __attribute__((vector_size(4 * LANES)));
typedef unsigned bits __attribute__((vector_size(4 * LANES)));
typedef unsigned short halves __attribute__((vector_size(2 * LANES)));

INLINE vec load(const float *from) {
    vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE void store(float *to, vec v) { memcpy(to, &v, sizeof v); }

INLINE vec all(float a) { return a - (vec){0}; }

INLINE vec choose(mask which, vec yes, vec no) { return (vec)((which & (mask)yes) | (~which & (mask)no)); }

/* Values i to i + 15 of an image. A bfloat16 is the upper half of a float. */
INLINE vec read(const void *image, long i, int half) {
    if (!half) return load((const float *)image + i);
    halves h;
    memcpy(&h, (const short *)image + i, sizeof h);
    return (vec)(__builtin_convertvector(h, bits) << 16);
}

INLINE void write(void *image, long i, vec v, int half) {
    if (!half) return store((float *)image + i, v);
    bits b = (bits)v;
    b = (bits)choose(v != v, (vec)(b | 0x400000), (vec)(b + 0x7fff + (b >> 16 & 1))); /* to the nearest, ties to even */
    halves h = __builtin_convertvector(b >> 16, halves);
    memcpy((short *)image + i, &h, sizeof h);
}

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

/* For every channel of the block that begins at value `at`, the mean over its group in one image: of the values, or with
 * `means` of their squared distances to `means`. */
INLINE void group_mean(const void *x, long at, const float *means, float *out, int P, int C, int group, int half) {
    for (int c = 0; c < block(group); c += LANES) {
        vec sum = {0}, mean = means ? load(means + c) : sum;
        for (int p = 0; p < P; p++) {
            vec d = read(x, at + (long)p * C + c, half) - mean;
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
INLINE void statistics(const void *x, long at, float *mean, float *rstd, int P, int C, int group, float eps, int half) {
    group_mean(x, at, 0, mean, P, C, group, half);
    group_mean(x, at, mean, rstd, P, C, group, half);
    for (int c = 0; c < block(group); c++) rstd[c] = 1 / sqrtf(rstd[c] + eps);
}

/* Runs a function for every block of channels of every image; `half` is a constant in either call, so loops do not ask. */
#define EACH_BLOCK(function, ...)                                                                                         \
    _Pragma("omp parallel for collapse(2)") for (int b = 0; b < B; b++)                                                   \
        for (int from = 0; from < C; from += block(group))                                                                \
            half ? function(__VA_ARGS__, b, from, P, C, group, 1) : function(__VA_ARGS__, b, from, P, C, group, 0)

/* y = x sigmoid(v x) rstd gamma + beta */
INLINE void evonorm(const void *x, const float *v, const float *gamma, const float *beta, void *y, float *mean, float *rstd,
                    float eps, int b, int from, int P, int C, int group, int half) {
    long image = (long)b * P * C, row = (long)b * C;
    statistics(x, image + from, mean + row + from, rstd + row + from, P, C, group, eps, half);
    for (int c = from; c < from + block(group); c += LANES) {
        vec vc = load(v + c), scale = load(gamma + c) * load(rstd + row + c), shift = load(beta + c);
        for (long i = image + c; i < image + (long)P * C; i += C) {
            vec xi = read(x, i, half);
            write(y, i, xi * sigmoid(xi * vc) * scale + shift, half);
        }
    }
}

void evonorm_forward(const void *x, const float *v, const float *gamma, const float *beta, void *y, float *mean, float *rstd,
                     int B, int P, int C, int group, int half, float eps) {
    EACH_BLOCK(evonorm, x, v, gamma, beta, y, mean, rstd, eps);
}

/* With `half`, dx is rounded twice: the part without the standard deviation, and the whole. */
INLINE void evonorm_gradients(const void *g, const void *x, const float *v, const float *gamma, const float *mean,
                              const float *rstd, void *dx, float *dv, float *dgamma, float *dbeta, int b, int from, int P, int C,
                              int group, int half) {
    long image = (long)b * P * C, row = (long)b * C;
    for (int c = from; c < from + block(group); c += LANES) {
        vec vc = load(v + c), r = load(rstd + row + c), scale = load(gamma + c) * r;
        vec along = {0}, bent = {0}, sum = {0};
        for (long i = image + c; i < image + (long)P * C; i += C) {
            vec gi = read(g, i, half), xi = read(x, i, half), gate = sigmoid(xi * vc), gated = xi * gate;
            vec slope = gated - gated * gate; /* x gate', gate' = gate (1 - gate) */
            sum += gi;
            along += gi * gated;
            bent += gi * slope * xi;
            write(dx, i, (slope * vc + gate) * gi * scale, half);
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
        for (long i = image + c; i < image + (long)P * C; i += C)
            write(dx, i, read(dx, i, half) + (read(x, i, half) - m) * s, half);
    }
}

void evonorm_backward(const void *g, const void *x, const float *v, const float *gamma, const float *mean, const float *rstd,
                      void *dx, float *dv, float *dgamma, float *dbeta, int B, int P, int C, int group, int half) {
    EACH_BLOCK(evonorm_gradients, g, x, v, gamma, mean, rstd, dx, dv, dgamma, dbeta);
}

/* y = (x - mean) rstd gamma + beta, plus the shortcut unless it is null, then ReLU if `relu` */
INLINE void group_norm(const void *x, const float *gamma, const float *beta, const void *shortcut, void *y, float *mean,
                       float *rstd, int relu, float eps, int b, int from, int P, int C, int group, int half) {
    long image = (long)b * P * C, row = (long)b * C;
    statistics(x, image + from, mean + row + from, rstd + row + from, P, C, group, eps, half);
    for (int c = from; c < from + block(group); c += LANES) {
        vec m = load(mean + row + c), scale = load(gamma + c) * load(rstd + row + c), shift = load(beta + c);
        for (long i = image + c; i < image + (long)P * C; i += C) {
            vec yi = (read(x, i, half) - m) * scale + shift;
            if (shortcut) yi += read(shortcut, i, half);
            write(y, i, relu ? choose(yi < 0.f, all(0.f), yi) : yi, half); /* nan stays nan */
        }
    }
}

void group_norm_forward(const void *x, const float *gamma, const float *beta, const void *shortcut, void *y, float *mean,
                        float *rstd, int B, int P, int C, int group, int half, int relu, float eps) {
    EACH_BLOCK(group_norm, x, gamma, beta, shortcut, y, mean, rstd, relu, eps);
}

/* `through` receives the gradient by the input of ReLU, which is also the shortcut's; without `relu`, `y` and `through`
 * are unused. */
INLINE void group_norm_gradients(const void *g, const void *x, const void *y, const float *gamma, const float *mean,
                                 const float *rstd, void *dx, void *through, float *dgamma, float *dbeta, int relu, int b,
                                 int from, int P, int C, int group, int half) {
    long image = (long)b * P * C, row = (long)b * C;
    const void *before = relu ? through : g;
    for (int c = from; c < from + block(group); c += LANES) {
        vec m = load(mean + row + c), along = {0}, sum = {0};
        for (long i = image + c; i < image + (long)P * C; i += C) {
            vec gi = read(g, i, half);
            if (relu) write(through, i, gi = choose(read(y, i, half) <= 0.f, all(0.f), gi), half);
            sum += gi;
            along += gi * (read(x, i, half) - m);
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
            write(dx, i, read(before, i, half) * scale + (read(x, i, half) - m) * s + a, half);
    }
}

void group_norm_backward(const void *g, const void *x, const void *y, const float *gamma, const float *mean, const float *rstd,
                         void *dx, void *through, float *dgamma, float *dbeta, int B, int P, int C, int group, int half,
                         int relu) {
    EACH_BLOCK(group_norm_gradients, g, x, y, gamma, mean, rstd, dx, through, dgamma, dbeta, relu);
}
