/* Low-rank updates of runs of tokens, with factors that are read where they lie.
 *
 *     y[t] += scale * B f(A x[t] + d)    for t in each run, with the factors A and B, d and f of its update
 *
 * A is [rank, in] and B is [out, rank], of which the columns lie behind each other, as the rows of A do; d is [rank], or
 * not there.
 *
 * Factors are float32, bfloat16 or float16, x and y float32 or bfloat16; sums are in float32. What a token gets does not
 * depend on the run it stands in, to the bit: each sum is taken in one order, whatever is computed beside it.
 *
 * Plain C with the vectors of GCC and Clang, which any processor has; the caller checks everything that it points to.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define WIDTH 8    /* floats of a vector */
#define TOKENS 4   /* tokens that are multiplied together */
#define BESIDE 4   /* rows of A, or vectors of a row of y, that are beside each other in registers */
#define CHUNK 1024 /* columns of x that are multiplied at a time, so that they stay in the cache */
#define RANK 1024  /* the largest */

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t bits __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t half __attribute__((vector_size(2 * WIDTH)));

enum type { FLOAT32, BFLOAT16, FLOAT16 };
enum function { IDENTITY, RELU, GELU, GELU_TANH, SILU, TANH };

typedef struct {
    const void *a, *b, *d;
    int64_t rank;
    float scale;
    int32_t type, f, reads_output;
} update;

typedef struct {
    int32_t start, stop, update;
} run;

typedef struct {
    const update *updates;
    const run *runs;
    int64_t count, in, out;
    int32_t type, threads;
} product;

/* ---------------------------------------------------------------------- numbers */

INLINE vec widened(half h, int type)
{
    bits u = __builtin_convertvector(h, bits);
    if (type == BFLOAT16)
        return (vec)(u << 16);
    vec f = (vec)((u & 0x7fff) << 13) * 0x1p112f;  /* the exponent's bias is 127 in place of 15 */
    bits special = (bits)((u & 0x7c00) == 0x7c00) & 0x7f800000;
    return (vec)((bits)f | special | (u & 0x8000) << 16);
}

/* Eight numbers from place i on. */
INLINE vec load(const void *p, int64_t i, int type)
{
    if (type == FLOAT32) {
        vec f;
        memcpy(&f, (const float *)p + i, sizeof f);
        return f;
    }
    half h;
    memcpy(&h, (const uint16_t *)p + i, sizeof h);
    return widened(h, type);
}

/* The first n of them, and zeros. */
static vec load_some(const void *p, int64_t i, int64_t n, int type)
{
    int64_t size = type == FLOAT32 ? 4 : 2;
    char held[4 * WIDTH] = {0};
    memcpy(held, (const char *)p + i * size, n * size);
    return load(held, 0, type);
}

INLINE half rounded(vec f)
{
    bits u = (bits)f, nan = (bits)(f != f);
    bits r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  /* to the nearest, ties to even */
    return __builtin_convertvector((r & ~nan) | (0x7fc0 & nan), half);
}

INLINE void store(void *p, int64_t i, vec f, int type)
{
    half h;
    if (type == FLOAT32) {
        memcpy((float *)p + i, &f, sizeof f);
    } else {
        h = rounded(f);
        memcpy((uint16_t *)p + i, &h, sizeof h);
    }
}

/* Add to the numbers from place i on, of which there are at least n. */
INLINE void add(void *y, int64_t i, int64_t n, vec f, int type)
{
    int64_t size = type == FLOAT32 ? 4 : 2;
    char held[4 * WIDTH];
    if (n >= WIDTH) {
        store(y, i, f + load(y, i, type), type);
    } else {
        store(held, 0, f + load_some(y, i, n, type), type);
        memcpy((char *)y + i * size, held, n * size);
    }
}

/* Numbers of bfloat16 as floats, in memory that is there. */
static const float *as_floats(const void *p, int64_t count, float *into)
{
    for (int64_t i = 0; i < count; i++) {
        uint32_t u = (uint32_t)((const uint16_t *)p)[i] << 16;
        memcpy(into + i, &u, sizeof u);
    }
    return into;
}

INLINE float sum(vec f)
{
    return ((f[0] + f[4]) + (f[2] + f[6])) + ((f[1] + f[5]) + (f[3] + f[7]));
}

/* ---------------------------------------------------------------------- products */

/* h[t][i] += A[i] x[t] over some columns, for n tokens and rows rows of A; a is the first of these. */
INLINE void shrink(const void *a, int64_t in, int64_t columns, const float *x[TOKENS], float (*h)[RANK], int64_t n,
                   int64_t rows, int type)
{
    vec s[TOKENS][BESIDE] = {{{0}}};
    int64_t k = 0, left;
    for (; k + WIDTH <= columns; k += WIDTH)
        for (int64_t r = 0; r < rows; r++) {
            vec f = load(a, r * in + k, type);
            for (int64_t t = 0; t < n; t++)
                s[t][r] += f * load(x[t], k, FLOAT32);
        }
    if ((left = columns - k))
        for (int64_t r = 0; r < rows; r++) {
            vec f = load_some(a, r * in + k, left, type);
            for (int64_t t = 0; t < n; t++)
                s[t][r] += f * load_some(x[t], k, left, FLOAT32);
        }
    for (int64_t t = 0; t < n; t++)
        for (int64_t r = 0; r < rows; r++)
            h[t][r] += sum(s[t][r]);
}

/* y[t] += B h[t] for n tokens and count vectors of outputs, from output o on. */
INLINE void expand(const update *u, int64_t out, int64_t o, void *y, float (*h)[RANK], int64_t n, int64_t count,
                   int y_type, int type)
{
    vec s[TOKENS][BESIDE] = {{{0}}};
    int64_t left = out - o;
    for (int64_t i = 0; i < u->rank; i++)
        for (int64_t v = 0; v < count; v++) {
            int64_t at = i * out + o + v * WIDTH;
            vec f = left < WIDTH ? load_some(u->b, at, left, type) : load(u->b, at, type);
            for (int64_t t = 0; t < n; t++)
                s[t][v] += h[t][i] * f;
        }
    for (int64_t t = 0; t < n; t++)
        for (int64_t v = 0; v < count; v++)
            add(y, t * out + o + v * WIDTH, left, s[t][v], y_type);
}

static float of(float z, int32_t f)
{
    switch (f) {
    case RELU: return z > 0 || z != z ? z : 0;
    case GELU: return 0.5f * z * (1 + erff(z * 0.70710678f));
    case GELU_TANH: return 0.5f * z * (1 + tanhf(0.79788456f * (z + 0.044715f * z * z * z)));
    case SILU: return z / (1 + expf(-z));
    case TANH: return tanhf(z);
    }
    return z;
}

/* h[t] = scale * f(h[t] + d) for n tokens. */
INLINE void between(const update *u, float (*h)[RANK], int64_t n, int type)
{
    for (int64_t i = 0; i < u->rank; i++) {
        float d = u->d ? load_some(u->d, i, 1, type)[0] : 0;
        for (int64_t t = 0; t < n; t++)
            h[t][i] = u->scale * (u->f ? of(h[t][i] + d, u->f) : h[t][i] + d);
    }
}

/* Both products for n tokens from token t on. */
INLINE void both(const product *p, const update *u, const char *x, char *y, int64_t n, int type)
{
    float h[TOKENS][RANK], held[TOKENS][CHUNK];
    const float *part[TOKENS];
    const int64_t beside = n == 1 ? BESIDE : BESIDE / 2;  /* there are sixteen registers */
    int64_t size = p->type == FLOAT32 ? 4 : 2, o = 0;
    for (int64_t t = 0; t < n; t++)
        memset(h[t], 0, u->rank * sizeof(float));
    for (int64_t k = 0; k < p->in; k += CHUNK) {
        int64_t columns = p->in - k < CHUNK ? p->in - k : CHUNK, i = 0;
        for (int64_t t = 0; t < n; t++) {
            const char *row = x + (t * p->in + k) * size;
            part[t] = p->type == FLOAT32 ? (const float *)row : as_floats(row, columns, held[t]);
        }
        const char *a = (const char *)u->a + k * (type == FLOAT32 ? 4 : 2);
        int64_t next = p->in * (type == FLOAT32 ? 4 : 2);
        for (; i + beside <= u->rank; i += beside)
            shrink(a + i * next, p->in, columns, part, (float(*)[RANK])(h[0] + i), n, beside, type);
        for (; i < u->rank; i++)
            shrink(a + i * next, p->in, columns, part, (float(*)[RANK])(h[0] + i), n, 1, type);
    }
    between(u, h, n, type);
    for (; o + beside * WIDTH <= p->out; o += beside * WIDTH)
        expand(u, p->out, o, y, h, n, beside, p->type, type);
    for (; o < p->out; o += WIDTH)
        expand(u, p->out, o, y, h, n, 1, p->type, type);
}

INLINE void whole(const product *p, const run *r, const char *x, char *y, int type)
{
    const update *u = p->updates + r->update;
    int64_t size = p->type == FLOAT32 ? 4 : 2, t = u->rank ? r->start : r->stop;
    for (; t + TOKENS <= r->stop; t += TOKENS)
        both(p, u, x + t * p->in * size, y + t * p->out * size, TOKENS, type);
    for (; t < r->stop; t++)
        both(p, u, x + t * p->in * size, y + t * p->out * size, 1, type);
}

/* Compute all runs, which do not overlap; an update of rank 0 adds nothing. x is [tokens, in] and y [tokens, out], both
 * contiguous and of the product's type. */
void adapterlab_product(const product *p, const void *x, void *y)
{
#pragma omp parallel for schedule(dynamic) num_threads(p->threads) if (p->threads > 1)
    for (int64_t i = 0; i < p->count; i++) {
        const run *r = p->runs + i;
        switch (p->updates[r->update].type) {
        case FLOAT32: whole(p, r, x, y, FLOAT32); break;
        case BFLOAT16: whole(p, r, x, y, BFLOAT16); break;
        case FLOAT16: whole(p, r, x, y, FLOAT16); break;
        }
    }
}
