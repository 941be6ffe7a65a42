/* What stands between the norm and the conv of a reader, in one pass over rows of channels.
 *
 * Built where there is a C compiler (setup.py: optional); stream_reading.py does the same with PyTorch.
 * Rows are pixels; a row of `cols` channels begins every `ld` elements, so views of a stream are read
 * and written as they lie. GOMP symbols are those of the libgomp that PyTorch has loaded: one pool of
 * threads. Sums are added up thread by thread in a fixed order.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((noinline, target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define CLONES __attribute__((noinline))
#endif

typedef uint16_t bf16;

static inline float load_float(float v) { return v; }
static inline float store_float(float v) { return v; }

static inline float load_bf16(bf16 v)
{
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline bf16 store_bf16(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? (bf16)0x7fc0 : (bf16)rounded;
}

/* NaN passes. */
static inline float relu_float(float v) { return v <= 0.0f ? 0.0f : v; }
static inline bf16 relu_bf16(bf16 v) { return v & 0x8000 ? 0 : v; } /* store_bf16 has no negative NaN */

/* Sums are of single precision over at most BLOCK rows, then of double precision. */
enum { BLOCK = 256 };

/* For each thread (2, cols) sums and, behind them, those of a block of rows. */
static double *workspace(int threads, int64_t cols)
{
    return calloc((size_t)(threads * 3 * cols), sizeof(double));
}

static void flush(double *sums, float *block, int64_t count)
{
    for (int64_t c = 0; c < count; c++) {
        sums[c] += block[c];
        block[c] = 0.0f;
    }
}

static void add_up(double *sums, double *parts, int threads, int64_t cols)
{
    for (int t = 0; t < threads; t++)
        for (int64_t c = 0; c < 2 * cols; c++)
            sums[c] += parts[t * 3 * cols + c];
    free(parts);
}

static int64_t first_row(int64_t rows, int part, int parts) { return rows * part / parts; }

#define KERNELS(T)                                                                                  \
    CLONES static void norm_relu_rows_##T(const T *restrict x, int64_t ldx, const float *restrict scale, \
                                          const float *restrict shift, T *restrict out, int64_t rows,    \
                                          int64_t cols)                                             \
    {                                                                                               \
        for (int64_t r = 0; r < rows; r++, x += ldx, out += cols)                                   \
            for (int64_t c = 0; c < cols; c++) {                                                    \
                T y = store_##T(load_##T(x[c]) * scale[c] + shift[c]);                              \
                out[c] = relu_##T(y);                                                               \
            }                                                                                       \
    }                                                                                               \
                                                                                                    \
    CLONES static void backward_rows_##T(const T *restrict d, const T *restrict x, int64_t ldx,     \
                                         const float *restrict scale, const float *restrict shift,  \
                                         T *restrict into, int64_t ldi, float *restrict sum,        \
                                         float *restrict sum_x, int64_t rows, int64_t cols)         \
    {                                                                                               \
        for (int64_t r = 0; r < rows; r++, d += cols, x += ldx, into += ldi)                        \
            for (int64_t c = 0; c < cols; c++) {                                                    \
                float v = load_##T(x[c]), g = load_##T(d[c]);                                       \
                g = v * scale[c] + shift[c] <= 0.0f ? 0.0f : g;                                     \
                sum[c] += g;                                                                        \
                sum_x[c] += g * v;                                                                  \
                into[c] = store_##T(load_##T(into[c]) + g * scale[c]);                              \
            }                                                                                       \
    }                                                                                               \
                                                                                                    \
    CLONES static void moments_rows_##T(const T *restrict x, int64_t ldx,                           \
                                        const float *restrict pivot, float *restrict sum,           \
                                        float *restrict sum_squares, int64_t rows, int64_t cols)    \
    {                                                                                               \
        for (int64_t r = 0; r < rows; r++, x += ldx)                                                \
            for (int64_t c = 0; c < cols; c++) {                                                    \
                float v = load_##T(x[c]) - pivot[c];                                                \
                sum[c] += v;                                                                        \
                sum_squares[c] += v * v;                                                            \
            }                                                                                       \
    }                                                                                               \
                                                                                                    \
    CLONES static void settle_rows_##T(const T *restrict grad, int64_t ldg, const T *restrict x,    \
                                       int64_t ldx, const float *restrict constant,                 \
                                       const float *restrict by_x, T *restrict out, int64_t rows,   \
                                       int64_t cols)                                                \
    {                                                                                               \
        for (int64_t r = 0; r < rows; r++, grad += ldg, x += ldx, out += cols)                      \
            for (int64_t c = 0; c < cols; c++)                                                      \
                out[c] = store_##T(load_##T(grad[c]) - constant[c] - load_##T(x[c]) * by_x[c]);     \
    }                                                                                               \
                                                                                                    \
    void norm_relu_##T(const T *x, int64_t ldx, const float *scale, const float *shift, T *out,     \
                       int64_t rows, int64_t cols, int threads)                                     \
    {                                                                                               \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                           \
        for (int t = 0; t < threads; t++) {                                                         \
            int64_t a = first_row(rows, t, threads), b = first_row(rows, t + 1, threads);           \
            norm_relu_rows_##T(x + a * ldx, ldx, scale, shift, out + a * cols, b - a, cols);        \
        }                                                                                           \
    }                                                                                               \
                                                                                                    \
    /* sums: (2, cols), added to. Returns 0, or 1 where there is no memory. */                      \
    int backward_##T(const T *d, const T *x, int64_t ldx, const float *scale, const float *shift,   \
                     T *into, int64_t ldi, double *sums, int64_t rows, int64_t cols, int threads)   \
    {                                                                                               \
        double *parts = workspace(threads, cols);                                                   \
        if (parts == NULL)                                                                          \
            return 1;                                                                               \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                           \
        for (int t = 0; t < threads; t++) {                                                         \
            int64_t end = first_row(rows, t + 1, threads);                                          \
            double *part = parts + t * 3 * cols;                                                    \
            float *block = (float *)(part + 2 * cols);                                              \
            for (int64_t r = first_row(rows, t, threads); r < end; r += BLOCK) {                    \
                int64_t some = end - r < BLOCK ? end - r : BLOCK;                                   \
                backward_rows_##T(d + r * cols, x + r * ldx, ldx, scale, shift, into + r * ldi,     \
                                  ldi, block, block + cols, some, cols);                            \
                flush(part, block, 2 * cols);                                                       \
            }                                                                                       \
        }                                                                                           \
        add_up(sums, parts, threads, cols);                                                         \
        return 0;                                                                                   \
    }                                                                                               \
                                                                                                    \
    /* sums: (2, cols), of x - pivot and of its square. Returns 0, or 1 where there is no memory. */     \
    int moments_##T(const T *x, int64_t ldx, const float *pivot, double *sums, int64_t rows,        \
                    int64_t cols, int threads)                                                      \
    {                                                                                               \
        double *parts = workspace(threads, cols);                                                   \
        if (parts == NULL)                                                                          \
            return 1;                                                                               \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                           \
        for (int t = 0; t < threads; t++) {                                                         \
            int64_t end = first_row(rows, t + 1, threads);                                          \
            double *part = parts + t * 3 * cols;                                                    \
            float *block = (float *)(part + 2 * cols);                                              \
            for (int64_t r = first_row(rows, t, threads); r < end; r += BLOCK) {                    \
                int64_t some = end - r < BLOCK ? end - r : BLOCK;                                   \
                moments_rows_##T(x + r * ldx, ldx, pivot, block, block + cols, some, cols);         \
                flush(part, block, 2 * cols);                                                       \
            }                                                                                       \
        }                                                                                           \
        add_up(sums, parts, threads, cols);                                                         \
        return 0;                                                                                   \
    }                                                                                               \
                                                                                                    \
    void settle_##T(const T *grad, int64_t ldg, const T *x, int64_t ldx, const float *constant,     \
                    const float *by_x, T *out, int64_t rows, int64_t cols, int threads)             \
    {                                                                                               \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                           \
        for (int t = 0; t < threads; t++) {                                                         \
            int64_t a = first_row(rows, t, threads), b = first_row(rows, t + 1, threads);           \
            settle_rows_##T(grad + a * ldg, ldg, x + a * ldx, ldx, constant, by_x, out + a * cols,  \
                            b - a, cols);                                                           \
        }                                                                                           \
    }

KERNELS(float)
KERNELS(bf16)
