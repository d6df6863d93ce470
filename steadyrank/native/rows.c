/* Rows of embedding tables, on the CPU: look up, sum what belongs to one row, step. Compiled where it is used, by
 * __init__.py.
 *
 * A table is larger than any cache, so that the time goes into waiting for memory: rows that are needed soon are asked
 * for ahead. Nothing here is proportional to the table.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define AHEAD 16     /* rows asked for ahead of the one at work */
#define DIGIT 11     /* bits sorted by at a time: 2,048 counters stay in the first-level cache */
#define BINS (1 << DIGIT)
#define FEW 2048     /* rows from which on a second thread pays */
#define INLINE static inline __attribute__((always_inline))

INLINE uint16_t to_bf16(float x) { /* to the nearest, ties to even; a NaN stays one */
    union { float number; uint32_t bits; } as = {x};
    uint32_t rounded = (as.bits + 0x7fffu + ((as.bits >> 16) & 1u)) >> 16;
    return (uint16_t)(x != x ? 0x7fc0u : rounded);
}

INLINE float from_bf16(uint16_t x) {
    union { uint32_t bits; float number; } as = {(uint32_t)x << 16};
    return as.number;
}

INLINE void ask_for(const float *row, int64_t width) {
    for (int64_t j = 0; j < width; j += 16) __builtin_prefetch(row + j, 1);
}

/* Nothing is read or written through an id that lies outside of the table. */
static int any_outside(const int64_t *ids, int64_t n, int64_t rows) {
    int outside = 0;
    #pragma omp simd reduction(| : outside)
    for (int64_t i = 0; i < n; i++) outside |= (uint64_t)ids[i] >= (uint64_t)rows;
    return outside;
}

/* out[i] = table[ids[i]], in bfloat16 where asked. Returns 0, or 1 if an id lies outside of the table. */
int steadyrank_look_up(const float *table, int64_t rows, int64_t width, const int64_t *ids, int64_t n, void *out,
                       int bf16, int threads) {
    if (any_outside(ids, n, rows)) return 1;
    #pragma omp parallel for schedule(static) num_threads(threads) if (n > FEW)
    for (int64_t i = 0; i < n; i++) {
        if (i + AHEAD < n) ask_for(table + ids[i + AHEAD] * width, width);
        const float *from = table + ids[i] * width;
        if (bf16) {
            uint16_t *to = (uint16_t *)out + i * width;
            #pragma omp simd
            for (int64_t j = 0; j < width; j++) to[j] = to_bf16(from[j]);
        } else {
            memcpy((float *)out + i * width, from, sizeof(float) * width);
        }
    }
    return 0;
}

/* table[rows[i]] = values[i], of rows that are different. */
void steadyrank_put_back(float *table, int64_t width, const int64_t *rows, int64_t n, const float *values,
                         int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads) if (n > FEW)
    for (int64_t i = 0; i < n; i++) {
        if (i + AHEAD < n) ask_for(table + rows[i + AHEAD] * width, width);
        memcpy(table + rows[i] * width, values + i * width, sizeof(float) * width);
    }
}

/* Sort packed (id, place) by id; stable. Returns where the sorted ones lie: `packed` or `other`. */
static uint64_t *sort(uint64_t *packed, uint64_t *other, int64_t n, uint64_t largest) {
    int64_t counts[BINS];
    for (int shift = 0; shift < 32 && (largest >> shift) > 0; shift += DIGIT) {
        memset(counts, 0, sizeof(counts));
        for (int64_t i = 0; i < n; i++) counts[(packed[i] >> (32 + shift)) & (BINS - 1)]++;
        int64_t start = 0;
        for (int64_t bin = 0; bin < BINS; bin++) {
            int64_t count = counts[bin];
            counts[bin] = start;
            start += count;
        }
        for (int64_t i = 0; i < n; i++) other[counts[(packed[i] >> (32 + shift)) & (BINS - 1)]++] = packed[i];
        uint64_t *sorted = other;
        other = packed;
        packed = sorted;
    }
    return packed;
}

INLINE void add_row(float *restrict sum, const void *values, int bf16, int64_t place, int64_t width, int first) {
    if (bf16) {
        const uint16_t *row = (const uint16_t *)values + place * width;
        #pragma omp simd
        for (int64_t j = 0; j < width; j++) sum[j] = (first ? 0.0f : sum[j]) + from_bf16(row[j]);
    } else {
        const float *row = (const float *)values + place * width;
        #pragma omp simd
        for (int64_t j = 0; j < width; j++) sum[j] = (first ? 0.0f : sum[j]) + row[j];
    }
}

/* Sum the rows of `values` [n, width] that have the same id, in their order, into `sums`; the ids, rising, into `rows`.
 * The table's rows and n are below 2^32. Returns how many there are, -1 if there was no memory, or -2 if an id lies
 * outside of the table. */
int64_t steadyrank_sum_rows(const int64_t *ids, int64_t n, int64_t table_rows, const void *values, int bf16,
                            int64_t width, int64_t *rows, float *sums, int threads) {
    if (any_outside(ids, n, table_rows)) return -2;
    uint64_t *packed = malloc(sizeof(uint64_t) * 2 * (n + 1)), *sorted, largest = 0;
    int64_t *starts = malloc(sizeof(int64_t) * (n + 1)), found = 0;
    if (packed == NULL || starts == NULL) { free(packed); free(starts); return -1; }
    for (int64_t i = 0; i < n; i++) {
        packed[i] = (uint64_t)ids[i] << 32 | (uint64_t)i;
        largest = (uint64_t)ids[i] > largest ? (uint64_t)ids[i] : largest;
    }
    sorted = sort(packed, packed + n, n, largest);
    for (int64_t i = 0; i < n; i++)
        if (i == 0 || sorted[i] >> 32 != sorted[i - 1] >> 32) {
            rows[found] = (int64_t)(sorted[i] >> 32);
            starts[found++] = i;
        }
    starts[found] = n;
    #pragma omp parallel for schedule(static) num_threads(threads) if (n > FEW)
    for (int64_t r = 0; r < found; r++)
        for (int64_t i = starts[r]; i < starts[r + 1]; i++)
            add_row(sums + r * width, values, bf16, (int64_t)(sorted[i] & 0xffffffffu), width, i == starts[r]);
    free(packed);
    free(starts);
    return found;
}

/* One step of row-wise Adagrad on the rows of a table:
 *   total += mean(g^2),   w -= lr * g / (sqrt(total) + eps)
 * Returns 1 if a coordinate is larger than `limit` or a NaN, 2 if a row lies outside of the table, and nothing was
 * changed then; else 0. */
int steadyrank_rowwise_adagrad(float *table, float *total, int64_t table_rows, int64_t width, const int64_t *rows,
                               int64_t n, const float *grads, float lr, float eps, float limit, int threads) {
    if (any_outside(rows, n, table_rows)) return 2;
    int bad = 0;
    #pragma omp parallel for simd schedule(static) reduction(| : bad) num_threads(threads) if (n > FEW)
    for (int64_t i = 0; i < n * width; i++) bad |= !(fabsf(grads[i]) <= limit);
    if (bad) return 1;
    #pragma omp parallel for schedule(static) num_threads(threads) if (n > FEW)
    for (int64_t i = 0; i < n; i++) {
        if (i + AHEAD < n) {
            ask_for(table + rows[i + AHEAD] * width, width);
            ask_for(total + rows[i + AHEAD], 1);
        }
        const float *g = grads + i * width;
        float *w = table + rows[i] * width, squares = 0.0f;
        #pragma omp simd reduction(+ : squares)
        for (int64_t j = 0; j < width; j++) squares += g[j] * g[j];
        float sum = total[rows[i]] + squares / (float)(width > 0 ? width : 1);
        sum = sum > 3.4028234e38f ? 3.4028234e38f : sum;
        float rate = lr / (sqrtf(sum) + eps);
        total[rows[i]] = sum;
        #pragma omp simd
        for (int64_t j = 0; j < width; j++) w[j] -= rate * g[j];
    }
    return 0;
}
