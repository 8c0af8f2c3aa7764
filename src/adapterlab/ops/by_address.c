/* Low-rank updates of runs of tokens, with factors that are read where they lie.
 *
 *     y[t] += scale * B (A x[t])    for t in each run, with the factors A [rank, in] and B [out, rank] of its update
 *
 * Factors are float32, bfloat16 or float16, x and y float32 or bfloat16; sums are in float32. What a token gets does not
 * depend on the run it stands in, to the bit: each sum is taken in one order, whatever is computed beside it.
 *
 * Plain C with the vectors of GCC and Clang, which any processor has; the caller checks everything that it points to.
 */

#include <stdint.h>
#include <string.h>

#define WIDTH 8    /* floats of a vector */
#define TOKENS 4   /* tokens, and rows of A, that are multiplied together */
#define CHUNK 1024 /* columns of x that are multiplied at a time, so that they stay in the cache */
#define RANK 1024  /* the largest */

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t bits __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t half __attribute__((vector_size(2 * WIDTH)));

enum type { FLOAT32, BFLOAT16, FLOAT16 };

typedef struct {
    const void *a, *b;
    int64_t rank;
    float scale;
    int32_t type;
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

/* Add to the n numbers from place i on; y has no type but these two. */
INLINE void add_some(void *y, int64_t i, int64_t n, vec f, int type)
{
    if (type == FLOAT32) {
        f += n == WIDTH ? load(y, i, FLOAT32) : load_some(y, i, n, FLOAT32);
        memcpy((float *)y + i, &f, n == WIDTH ? sizeof f : n * sizeof(float));
    } else {
        half h = rounded(f + (n == WIDTH ? load(y, i, BFLOAT16) : load_some(y, i, n, BFLOAT16)));
        memcpy((uint16_t *)y + i, &h, n == WIDTH ? sizeof h : n * sizeof(uint16_t));
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

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define PICK(x, y, ...) __builtin_shuffle(x, y, (ints){__VA_ARGS__})
#endif

/* Make columns of eight rows. */
INLINE void transpose(vec t[WIDTH])
{
    vec u[WIDTH], v[WIDTH];
    for (int i = 0; i < WIDTH; i += 2) {
        u[i] = PICK(t[i], t[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        u[i + 1] = PICK(t[i], t[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < WIDTH; i += 4)
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = PICK(u[i + j], u[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            v[i + 2 * j + 1] = PICK(u[i + j], u[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        t[i] = PICK(v[i], v[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        t[i + 4] = PICK(v[i], v[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* ---------------------------------------------------------------------- products */

/* h[t][i] += A[i] x[t] over some columns, for n tokens and rows rows of A; a is the first of these. */
INLINE void shrink(const void *a, int64_t in, int64_t columns, const float *x[TOKENS], float (*h)[RANK], int64_t n,
                   int64_t rows, int type)
{
    vec s[TOKENS][TOKENS] = {{{0}}};
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

/* Eight rows of B from row o on, and eight columns from column i on, as columns. */
INLINE void tile(const update *u, int64_t out, int64_t o, int64_t i, vec b[WIDTH], int type)
{
    static const ints place = {0, 1, 2, 3, 4, 5, 6, 7};
    int64_t rank = u->rank, left = rank - i;
    if ((o + WIDTH - 1) * rank + i + WIDTH <= out * rank) {
        for (int r = 0; r < WIDTH; r++)
            b[r] = load(u->b, (o + r) * rank + i, type);
        if (left < WIDTH) {  /* what was read of the next row does not count, whatever it is */
            bits own = (bits)(place < (int32_t)left);
            for (int r = 0; r < WIDTH; r++)
                b[r] = (vec)((bits)b[r] & own);
        }
    } else {
        vec held[WIDTH] = {{0}};
        for (int64_t r = 0; r < WIDTH && o + r < out; r++)
            held[r] = load_some(u->b, (o + r) * rank + i, left < WIDTH ? left : WIDTH, type);
        memcpy(b, held, sizeof held);
    }
    transpose(b);
}

/* y[t] += B h[t] for n tokens, whose rows of y are out numbers apart. */
INLINE void expand(const update *u, int64_t out, void *y, float (*h)[RANK], int64_t n, int y_type, int type)
{
    for (int64_t o = 0; o < out; o += WIDTH) {
        vec s[TOKENS] = {{0}};
        for (int64_t i = 0; i < u->rank; i += WIDTH) {
            vec b[WIDTH];
            tile(u, out, o, i, b, type);
            for (int64_t t = 0; t < n; t++)
                for (int r = 0; r < WIDTH; r++)
                    s[t] += h[t][i + r] * b[r];
        }
        for (int64_t t = 0; t < n; t++)
            add_some(y, t * out + o, out - o < WIDTH ? out - o : WIDTH, s[t], y_type);
    }
}

/* Both for n tokens from token t on. */
INLINE void both(const product *p, const update *u, const char *x, char *y, int64_t n, int type)
{
    float h[TOKENS][RANK], held[TOKENS][CHUNK];
    const float *part[TOKENS];
    int64_t size = p->type == FLOAT32 ? 4 : 2, padded = (u->rank + WIDTH - 1) / WIDTH * WIDTH;
    for (int64_t t = 0; t < n; t++)
        memset(h[t], 0, padded * sizeof(float));
    for (int64_t k = 0; k < p->in; k += CHUNK) {
        int64_t columns = p->in - k < CHUNK ? p->in - k : CHUNK, i = 0;
        for (int64_t t = 0; t < n; t++) {
            const char *row = x + (t * p->in + k) * size;
            part[t] = p->type == FLOAT32 ? (const float *)row : as_floats(row, columns, held[t]);
        }
        const char *a = (const char *)u->a + k * (type == FLOAT32 ? 4 : 2);
        int64_t next = p->in * (type == FLOAT32 ? 4 : 2);
        for (; i + TOKENS <= u->rank; i += TOKENS)
            shrink(a + i * next, p->in, columns, part, (float(*)[RANK])(h[0] + i), n, TOKENS, type);
        for (; i < u->rank; i++)
            shrink(a + i * next, p->in, columns, part, (float(*)[RANK])(h[0] + i), n, 1, type);
    }
    for (int64_t t = 0; t < n; t++)
        for (int64_t i = 0; i < u->rank; i++)
            h[t][i] *= u->scale;
    expand(u, p->out, y, h, n, p->type, type);
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
