/* One step of Clippy for all float32 parameters of a group, on the CPU. Compiled where it is used, by __init__.py.
 *
 * Memory traffic is the cost, so a tensor takes one of two ways through memory:
 *   try     (its last step was not clipped)  read g once to know that it is finite; then one pass that applies each
 *           chunk whose coordinates all keep their bound. Only if some chunk did not, a second pass scales the rest and
 *           takes back (1 - sigma) of what was applied.
 *   careful (its last step was clipped)      one pass that reads and finds sigma, one that applies.
 * The formulas are those of kernels.py, which is the reference; bounds are compared as
 *   |num| <= (lambda_rel * |w| + lambda_abs) * den + lambda_acc,      step = num / den,
 * which needs no division unless a chunk exceeds.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK 1024            /* coordinates: three arrays of it stay in the first-level cache */
#define BATCH (1 << 21)       /* coordinates of tensors worked on together, so that a gradient read once is still in a cache */
#define TINY 1e-37f           /* keeps 0 / 0 out where nothing was accumulated, and divisions by subnormal numbers */
#define INLINE static inline __attribute__((always_inline))

enum { ADAGRAD = 0, ADAGRAD_DELAYED = 1, ADAGRAD_DELAYED_CLIPPED = 2, ADAM = 3, ADAM_CLIPPED = 4 };

typedef struct {
    int32_t kind;
    float sign; /* -1 to maximize */
    float lr, relative, accumulator_relative, absolute, eps, decay; /* decay = lr * weight_decay */
    float limit;              /* a gradient with a larger coordinate is refused */
    float keep1, new1, keep2, new2; /* beta1, 1 - beta1, beta2, 1 - beta2, each rounded once */
    double beta1, beta2;
} Options;

typedef struct {
    float *weight, *first, *second; /* Adagrad: first = sum. Adam: first = exp_avg, second = exp_avg_sq */
    const float *grad;
    float *factor;      /* clip_factor */
    int64_t *bad_steps;
    const float *step;  /* counts this step already */
    float *bind_frac;   /* NULL unless telemetry is wanted */
    int64_t *binding;
    int64_t size;
} Tensor;

typedef struct { float rate, root; } Scale; /* Adam's bias corrections: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t) */
typedef struct { float num, den; } Step;

typedef struct { /* what the passes find about one tensor */
    Scale scale;
    float worst;      /* largest step over bound */
    int64_t exceeding, worst_chunk;
    int careful, refused;
} Found;

typedef struct {
    int32_t tensor, applied;
    int64_t start, size;
    float worst;
    uint32_t top; /* bits of the largest |g|: NaN and infinity are above every finite number */
    int64_t exceeding;
} Chunk;

/* Stops at the largest number instead of at infinity. */
INLINE float total_of(float total, float g) {
    total += g * g;
    return total > 3.4028234e38f ? 3.4028234e38f : total;
}

/* The step num / den that the base would take for one coordinate. */
INLINE Step step_of(const Options *o, Scale s, int kind, float w, float g, float first, float second) {
    Step out;
    g *= o->sign;
    if (kind >= ADAM) {
        float m = o->keep1 * first + o->new1 * g;
        float v = o->keep2 * second + o->new2 * g * g;
        out.den = sqrtf(v + TINY) * s.root + o->eps;
        out.num = s.rate * m;
    } else {
        float total = kind == ADAGRAD ? total_of(first, g) : first;
        out.den = sqrtf(total + o->eps + TINY);
        out.num = s.rate * g;
    }
    out.num += o->decay * w * out.den;
    return out;
}

INLINE float limit_of(const Options *o, float w, float den) {
    return (o->relative * fabsf(w) + o->absolute) * den + o->accumulator_relative;
}

/* A zero step gives 0; a step whose bound is zero, or too small to divide by, INFINITY; a NaN stays one. */
INLINE float ratio_of(float size, float limit) {
    float ratio = size / (limit < TINY ? TINY : limit);
    return limit < TINY && size > 0.0f ? INFINITY : ratio;
}

/* A NaN in weight or accumulator, or a step beyond all numbers, stops its tensor. */
INLINE float sigma_of(float worst) {
    return worst <= 1.0f ? 1.0f : (worst < INFINITY ? 1.0f / worst : 0.0f);
}

INLINE void accumulate(const Options *o, int kind, float sigma, float g, float *first, float *second) {
    g *= o->sign;
    if (kind == ADAGRAD_DELAYED_CLIPPED || kind == ADAM_CLIPPED) g *= sigma;
    if (kind >= ADAM) {
        *first = o->keep1 * *first + o->new1 * g;
        *second = o->keep2 * *second + o->new2 * g * g;
    } else {
        *first = total_of(*first, g);
    }
}

INLINE uint32_t chunk_top(const float *grad, int64_t n) {
    const uint32_t *bits = (const uint32_t *)grad;
    uint32_t top = 0;
    #pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; i++) {
        uint32_t size = bits[i] & 0x7fffffffu;
        top = size > top ? size : top;
    }
    return top;
}

/* Apply the chunk if every coordinate keeps its bound; say whether it was applied. */
INLINE int chunk_try(const Options *o, Scale s, int kind, float *restrict w, const float *restrict g,
                     float *restrict first, float *restrict second, int64_t n) {
    float old_w[CHUNK], old_first[CHUNK], old_second[CHUNK];
    int exceeds = 0;
    #pragma omp simd reduction(| : exceeds)
    for (int64_t i = 0; i < n; i++) {
        Step d = step_of(o, s, kind, w[i], g[i], first[i], kind >= ADAM ? second[i] : 0.0f);
        exceeds |= !(fabsf(d.num) <= limit_of(o, w[i], d.den)); /* a NaN exceeds too */
        old_w[i] = w[i];
        old_first[i] = first[i];
        if (kind >= ADAM) old_second[i] = second[i];
        accumulate(o, kind, 1.0f, g[i], first + i, second + i);
        w[i] -= d.num / d.den;
    }
    if (!exceeds) return 1;
    memcpy(w, old_w, sizeof(float) * n);
    memcpy(first, old_first, sizeof(float) * n);
    if (kind >= ADAM) memcpy(second, old_second, sizeof(float) * n);
    return 0;
}

INLINE float chunk_worst(const Options *o, Scale s, int kind, const float *restrict w, const float *restrict g,
                         const float *restrict first, const float *restrict second, int64_t n, int64_t *exceeding) {
    union { uint32_t bits; float number; } worst = {0};
    uint32_t top = 0;
    int32_t count = 0;
    #pragma omp simd reduction(max : top) reduction(+ : count)
    for (int64_t i = 0; i < n; i++) {
        Step d = step_of(o, s, kind, w[i], g[i], first[i], kind >= ADAM ? second[i] : 0.0f);
        float size = fabsf(d.num), limit = limit_of(o, w[i], d.den);
        float ratio = ratio_of(size, limit);
        union { float number; uint32_t bits; } as = {ratio};
        count += !(ratio <= 1.0f);
        top = as.bits > top ? as.bits : top; /* in the order of the ratios, which are not negative; a NaN above all */
    }
    *exceeding = count;
    worst.bits = top & 0x7fffffffu;
    return worst.number;
}

INLINE void chunk_apply(const Options *o, Scale s, int kind, float sigma, float *restrict w, const float *restrict g,
                        float *restrict first, float *restrict second, int64_t n) {
    #pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        Step d = step_of(o, s, kind, w[i], g[i], first[i], kind >= ADAM ? second[i] : 0.0f);
        accumulate(o, kind, sigma, g[i], first + i, second + i);
        w[i] = sigma > 0.0f ? w[i] - sigma * d.num / d.den : w[i]; /* selected: 0 * infinity is NaN */
    }
}

/* Take back `back` = 1 - sigma of a step that was applied whole; its states are new already, so they give it again. */
INLINE void chunk_take_back(const Options *o, Scale s, int kind, float back, float *restrict w,
                            const float *restrict g, const float *restrict first, const float *restrict second,
                            int64_t n) {
    #pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float den = kind >= ADAM ? sqrtf(second[i] + TINY) * s.root + o->eps : sqrtf(first[i] + o->eps + TINY);
        float num = s.rate * (kind >= ADAM ? first[i] : o->sign * g[i]);
        w[i] += back * num / den;
    }
}

/* The coordinate whose step is furthest beyond its bound, among those of one chunk. */
static int64_t chunk_binding(const Options *o, Scale s, const Tensor *t, const Chunk *c) {
    float worst = -1.0f;
    int64_t found = c->start;
    for (int64_t i = c->start; i < c->start + c->size; i++) {
        Step d = step_of(o, s, o->kind, t->weight[i], t->grad[i], t->first[i], o->kind >= ADAM ? t->second[i] : 0.0f);
        float size = fabsf(d.num), limit = limit_of(o, t->weight[i], d.den);
        float ratio = ratio_of(size, limit);
        if (!isnan(worst) && !(ratio <= worst)) { worst = ratio; found = i; }
    }
    return found;
}

INLINE void first_pass(const Options *o, int kind, const Tensor *t, const Found *f, Chunk *c) {
    float *w = t->weight + c->start, *first = t->first + c->start;
    float *second = kind >= ADAM ? t->second + c->start : NULL;
    const float *g = t->grad + c->start;
    if (f->careful) c->top = chunk_top(g, c->size);
    if (!f->careful && chunk_try(o, f->scale, kind, w, g, first, second, c->size)) c->applied = 1;
    else c->worst = chunk_worst(o, f->scale, kind, w, g, first, second, c->size, &c->exceeding);
}

INLINE void second_pass(const Options *o, int kind, const Tensor *t, const Found *f, const Chunk *c) {
    float *w = t->weight + c->start, *first = t->first + c->start;
    float *second = kind >= ADAM ? t->second + c->start : NULL;
    const float *g = t->grad + c->start;
    float sigma = sigma_of(f->worst);
    if (!c->applied) chunk_apply(o, f->scale, kind, sigma, w, g, first, second, c->size);
    else if (sigma < 1.0f) chunk_take_back(o, f->scale, kind, 1.0f - sigma, w, g, first, second, c->size);
}

#define BY_KIND(call)                                                            \
    switch (o->kind) {                                                           \
    case ADAGRAD: call(ADAGRAD); break;                                          \
    case ADAGRAD_DELAYED: call(ADAGRAD_DELAYED); break;                          \
    case ADAGRAD_DELAYED_CLIPPED: call(ADAGRAD_DELAYED_CLIPPED); break;          \
    case ADAM: call(ADAM); break;                                                \
    default: call(ADAM_CLIPPED);                                                 \
    }

static void run_first(const Options *o, const Tensor *t, const Found *f, Chunk *c) {
#define CALL(kind) first_pass(o, kind, t, f, c)
    BY_KIND(CALL)
#undef CALL
}

static void run_second(const Options *o, const Tensor *t, const Found *f, const Chunk *c) {
#define CALL(kind) second_pass(o, kind, t, f, c)
    BY_KIND(CALL)
#undef CALL
}

static void prepare(const Options *o, const Tensor *t, Found *f) {
    double steps = (double)*t->step - (double)*t->bad_steps;
    *f = (Found){{o->lr, 1.0f}, 0.0f, 0, -1, 0, 0};
    if (o->kind >= ADAM) {
        f->scale.rate = (float)(o->lr / (1.0 - pow(o->beta1, steps)));
        f->scale.root = (float)(1.0 / sqrt(1.0 - pow(o->beta2, steps)));
    }
    /* A step can only be taken back if its states do not depend on sigma and it can be found again from them. */
    f->careful = *t->factor < 1.0f || o->decay != 0.0f || (o->kind != ADAGRAD && o->kind != ADAM);
}

static void conclude(const Options *o, const Tensor *t, Found *f, const Chunk *chunks) {
    if (f->refused) {
        *t->bad_steps += 1;
        *t->factor = 0.0f;
    } else {
        *t->factor = sigma_of(f->worst);
    }
    if (t->bind_frac != NULL) {
        *t->bind_frac = t->size && !f->refused ? (float)((double)f->exceeding / (double)t->size) : 0.0f;
        *t->binding = f->exceeding && !f->refused ? chunk_binding(o, f->scale, t, chunks + f->worst_chunk) : -1;
    }
}

/* What a gradient's chunk holds must be known of the whole tensor before anything of it is written. */
static void look(const Tensor *tensors, const Found *found, Chunk *c) {
    if (!found[c->tensor].careful) c->top = chunk_top(tensors[c->tensor].grad + c->start, c->size);
}

static void refuse(const Options *o, Found *found, const Chunk *chunks, int64_t count) {
    union { float number; uint32_t bits; } limit = {o->limit};
    for (int64_t k = 0; k < count; k++)
        if (chunks[k].top > limit.bits) found[chunks[k].tensor].refused = 1;
}

static void run_batch(const Options *o, const Tensor *tensors, Found *found, Chunk *chunks, int64_t count,
                      int threads) {
    int64_t k;
    #pragma omp parallel for schedule(static) num_threads(threads) if (count > 8)
    for (k = 0; k < count; k++) look(tensors, found, chunks + k);
    refuse(o, found, chunks, count);
    #pragma omp parallel for schedule(static) num_threads(threads) if (count > 8)
    for (k = 0; k < count; k++) {
        Chunk *c = chunks + k;
        if (!found[c->tensor].refused) run_first(o, tensors + c->tensor, found + c->tensor, c);
    }
    refuse(o, found, chunks, count);
    int again = 0;
    for (k = 0; k < count; k++) {
        Found *f = found + chunks[k].tensor;
        if (f->refused) continue;
        f->exceeding += chunks[k].exceeding;
        if (f->worst_chunk < 0 || (!isnan(f->worst) && !(chunks[k].worst <= f->worst))) { f->worst = chunks[k].worst; f->worst_chunk = k; }
        again |= f->careful || !(f->worst <= 1.0f) || !chunks[k].applied;
    }
    for (k = 0; k < count; k++)
        if (k == 0 || chunks[k].tensor != chunks[k - 1].tensor)
            conclude(o, tensors + chunks[k].tensor, found + chunks[k].tensor, chunks);
    if (!again) return;
    #pragma omp parallel for schedule(static) num_threads(threads) if (count > 8)
    for (k = 0; k < count; k++) {
        const Chunk *c = chunks + k;
        if (!found[c->tensor].refused) run_second(o, tensors + c->tensor, found + c->tensor, c);
    }
}

/* Lay out the chunks of all tensors; return how many there are. */
static int64_t lay_out(const Tensor *tensors, int64_t count, Chunk *chunks) {
    int64_t here = 0;
    for (int64_t i = 0; i < count; i++)
        for (int64_t start = 0; start < tensors[i].size; start += CHUNK) {
            int64_t left = tensors[i].size - start;
            chunks[here++] = (Chunk){(int32_t)i, 0, start, left < CHUNK ? left : CHUNK, 0.0f, 0, 0};
        }
    return here;
}

/* How many chunks from `from` on make a batch: whole tensors, until there are enough coordinates. */
static int64_t batch_size(const Chunk *chunks, int64_t from, int64_t count) {
    int64_t end = from, coordinates = 0;
    while (end < count && (coordinates < BATCH || chunks[end].tensor == chunks[end - 1].tensor))
        coordinates += chunks[end++].size;
    return end - from;
}

/* Returns 0, or 1 if there was no memory for the bookkeeping; nothing was changed then. */
int steadyrank_clippy_step(const Options *o, const Tensor *tensors, int64_t count, int threads) {
    int64_t most = 1;
    for (int64_t i = 0; i < count; i++) most += (tensors[i].size + CHUNK - 1) / CHUNK;
    Found *found = malloc(sizeof(Found) * (count + 1));
    Chunk *chunks = malloc(sizeof(Chunk) * most);
    if (found == NULL || chunks == NULL) { free(found); free(chunks); return 1; }
    for (int64_t i = 0; i < count; i++) {
        prepare(o, tensors + i, found + i);
        if (tensors[i].size == 0) conclude(o, tensors + i, found + i, NULL);
    }
    int64_t all = lay_out(tensors, count, chunks);
    for (int64_t from = 0; from < all;) {
        int64_t size = batch_size(chunks, from, all);
        run_batch(o, tensors, found, chunks + from, size, threads);
        from += size;
    }
    free(found);
    free(chunks);
    return 0;
}
