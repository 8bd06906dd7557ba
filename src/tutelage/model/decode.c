/* One step of decoding for a Llama-like body in fp32 on a processor: a new token for each of some rows of a key-value cache.

   The forward of lean.py, without a framework's calls: PyTorch's matmuls are made for many rows, and with few of them they
   wait for the weights; here the next weights are fetched while the last are multiplied. A product is a sum along the weights'
   rows as they lie, so nothing is laid out anew, and no row's result depends on the rows beside it.

   Built with the package where a C compiler is (GCC's vectors, OpenMP); native.py finds it, lean.py does without. Leaves out:
   other dtypes, prompts (many rows at once), logits' soft caps and all that lean.py leaves out. */

#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int i8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__linux__)
#define KERNEL __attribute__((target_clones("arch=x86-64-v3", "default"))) static
#else
#define KERNEL static
#endif

_Static_assert(sizeof(long) == 8, "as PyTorch's whole numbers and addresses");

enum { BEFORE, Q, K, V, BQ, BK, BV, NORM_Q, NORM_K, O, BO, AFTER, GATE, UP, BGATE, BUP, DOWN, BDOWN, PARTS };
/* A layer's parameters. What a model has not is null. */

typedef struct {
  long layers, width, heads, shared, head, inner; /* D, query heads, key heads, Dh, width of the MLP */
  long slots, length;                             /* of the cache [layers, 2, slots, shared, length, head] */
  long rows, turns, threads;                      /* turns: positions that the angles know */
  float eps, scale;
} Shape;

const long tutelage_sizes[] = {sizeof(Shape), PARTS}; /* what native.py must agree with */

enum { ROWS = 48 };
/* of activations that pass by a piece of the weights: few enough for a core's cache */

INLINE v8 load8(const float *p) { return *(const v8 *)p; }

INLINE v4 sums(v8 a, v8 b, v8 c, v8 d) { /* of each of the four; every shuffle is one instruction of AVX */
  const i8 low = {0, 8, 1, 9, 4, 12, 5, 13}, high = {2, 10, 3, 11, 6, 14, 7, 15};
  v8 ab = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  v8 cd = __builtin_shuffle(c, d, low) + __builtin_shuffle(c, d, high);
  const i8 first = {0, 1, 8, 9, 4, 5, 12, 13}, second = {2, 3, 10, 11, 6, 7, 14, 15};
  union { v8 whole; v4 half[2]; } s = {__builtin_shuffle(ab, cd, first) + __builtin_shuffle(ab, cd, second)};
  return s.half[0] + s.half[1];
}

INLINE float sum8(v8 a) {
  v4 s = sums(a, a, a, a);
  return s[0];
}

INLINE v8 exp8(v8 x) { /* within 2e-7 relative, for |x| <= 87 */
  const v8 magic = (v8){} + 12582912.f;
  v8 n = (x * 1.44269504f + magic) - magic; /* rounds */
  v8 r = x - n * 0.693359375f + n * 2.12194440e-4f, p = (v8){} + 1.9875691500e-4f;
  const float c[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1.f, 1.f};
  for (int i = 0; i < 7; i++) p = p * r + c[i];
  i8 power = (__builtin_convertvector(n, i8) + 127) << 23;
  return p * (v8)power;
}

INLINE v8 larger(v8 a, v8 b) {
  i8 first = ~(a <= b); /* what is not a number stays */
  return (v8)(((i8)a & first) | ((i8)b & ~first));
}

INLINE v8 within(v8 x, float low, float high) { return -larger(-larger(x, (v8){} + low), (v8){} - high); }

/* --- products --- */

typedef struct { const char *next; long step; } Ahead;
/* what to fetch meanwhile: the weights after these */

INLINE void tile(const int R, const float *w, long apart, const float *x, long xs, long n, const float *bias, int add, float *y,
                 long ys, Ahead ahead) {
  /* w [4, n] with rows so far apart, x [R, n] -> y [R, 4] */
  v8 acc[3][4] = {};
  long k = 0;
  for (; k + 8 <= n; k += 8, ahead.next += ahead.step) {
    __builtin_prefetch(ahead.next);
    v8 a = load8(w + k), b = load8(w + apart + k), c = load8(w + 2 * apart + k), d = load8(w + 3 * apart + k);
#pragma GCC unroll 3
    for (int r = 0; r < R; r++) {
      v8 u = load8(x + r * xs + k);
      acc[r][0] += a * u, acc[r][1] += b * u, acc[r][2] += c * u, acc[r][3] += d * u;
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < R; r++) {
    v4 s = sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
    for (long i = k; i < n; i++) s += (v4){w[i], w[apart + i], w[2 * apart + i], w[3 * apart + i]} * x[r * xs + i];
    if (bias) s += *(const v4 *)bias;
    if (add) s += *(v4 *)(y + r * ys);
    *(v4 *)(y + r * ys) = s;
  }
}

KERNEL void linear_part(const float *w, const float *bias, const float *x, long M, long n, int add, float *y, long ys, long from,
                        long to) {
  /* w [.., n], x [M, n] -> columns from..to of y [M, ys], added to what is there or in its place */
  long pieces = M % 3 == 1 && M > 1 ? M / 3 + 1 : (M + 2) / 3;
  Ahead ahead = {0, 128 / pieces};
  for (; from + 4 <= to; from += 4) {
    const float *row = w + from * n, *b = bias ? bias + from : 0;
    float *out = y + from;
    long m = 0, piece = 0;
    for (int R; m < M; m += R, piece++) {
      R = M - m >= 3 && M - m != 4 ? 3 : M - m >= 2 ? 2 : 1;
      ahead.next = (const char *)(row + 4 * n) + piece * (16 * n / pieces);
      if (R == 3) tile(3, row, n, x + m * n, n, n, b, add, out + m * ys, ys, ahead);
      if (R == 2) tile(2, row, n, x + m * n, n, n, b, add, out + m * ys, ys, ahead);
      if (R == 1) tile(1, row, n, x + m * n, n, n, b, add, out + m * ys, ys, ahead);
    }
  }
  for (; from < to; from++) /* what is left of a width that four does not divide */
    for (long m = 0; m < M; m++) {
      float s = bias ? bias[from] : 0.f;
      for (long k = 0; k < n; k++) s += w[from * n + k] * x[m * n + k];
      y[m * ys + from] = add ? y[m * ys + from] + s : s;
    }
}

static long begin(long n, long me, long of) { /* of a thread's part, whole vectors but for the last one's */
  return me == of ? n : n / 8 * me / of * 8;
}

static void linear(const float *w, const float *bias, const float *x, long M, long n, int add, float *y, long N, long me, long of) {
  /* this thread's columns of y [M, N] */
  for (long m = 0; m < M; m += ROWS)
    linear_part(w, bias, x + m * n, M - m < ROWS ? M - m : ROWS, n, add, y + m * N, N, begin(N, me, of), begin(N, me + 1, of));
}

/* --- the rest of a layer --- */

KERNEL void norm(const float *weight, float eps, const float *x, long n, float *y) {
  v8 s = {};
  float rest = 0.f;
  long k = 0;
  for (; k + 8 <= n; k += 8) s += load8(x + k) * load8(x + k);
  for (; k < n; k++) rest += x[k] * x[k];
  float by = 1.f / sqrtf((sum8(s) + rest) / n + eps);
  for (k = 0; k < n; k++) y[k] = x[k] * by * weight[k];
}

KERNEL void turn(const float *cos, const float *sin, float *x, long n) {
  /* x [n] by its position's angles, whose sines are signed for the half that they meet */
  long half = n / 2;
  for (long d = 0; d < half; d++) {
    float a = x[d], b = x[d + half];
    x[d] = a * cos[d] + b * sin[d];
    x[d + half] = b * cos[d + half] + a * sin[d + half];
  }
}

INLINE void blend(const int C, const float *p, const float *values, long from, long to, long n, float *y) {
  v8 acc[4] = {}, more[4] = {};
  long t = from;
  for (; t + 2 <= to; t += 2)
    for (int c = 0; c < C; c++) {
      acc[c] += load8(values + t * n + 8 * c) * p[t];
      more[c] += load8(values + (t + 1) * n + 8 * c) * p[t + 1];
    }
  for (int c = 0; c < C; c++) {
    if (t < to) acc[c] += load8(values + t * n + 8 * c) * p[t];
    *(v8 *)(y + 8 * c) = acc[c] + more[c];
  }
}

KERNEL void attend(const float *q, const float *keys, const float *values, long group, long from, long to, long n, float *p,
                   float *y) {
  /* q [group, n], scaled, over keys and values from..to of [.., n] -> y [group, n]; p has room for group × (to + 16) */
  long room = to + 16;
  Ahead none = {(const char *)keys, 0};
  for (long t = from; t + 4 <= to; t += 4) {
    long g = 0;
    for (; g + 3 <= group; g += 3) tile(3, keys + t * n, n, q + g * n, n, n, 0, 0, p + g * room + t, room, none);
    for (; g < group; g++) tile(1, keys + t * n, n, q + g * n, n, n, 0, 0, p + g * room + t, room, none);
  }
  for (long g = 0; g < group; g++) {
    float *own = p + g * room, most = -1e30f;
    for (long t = to - (to - from) % 4; t < to; t++) { /* the keys that no tile held whole */
      float s = 0.f;
      for (long d = 0; d < n; d++) s += q[g * n + d] * keys[t * n + d];
      own[t] = s;
    }
    for (long t = to; t < to + 8; t++) own[t] = -1e30f;
    v8 peak = load8(own + from), sum = {};
    for (long t = from + 8; t < to; t += 8) peak = larger(peak, load8(own + t));
    for (int i = 0; i < 8; i++) most = peak[i] > most ? peak[i] : most;
    for (long t = from; t < to; t += 8) {
      v8 e = exp8(within(load8(own + t) - most, -87.f, 0.f));
      *(v8 *)(own + t) = e;
      sum += e;
    }
    float total = sum8(sum);
    for (long d = 0; d < n;) {
      long left = (n - d) / 8;
      if (left >= 4) blend(4, own, values + d, from, to, n, y + g * n + d), d += 32;
      else if (left == 3) blend(3, own, values + d, from, to, n, y + g * n + d), d += 24;
      else if (left == 2) blend(2, own, values + d, from, to, n, y + g * n + d), d += 16;
      else blend(1, own, values + d, from, to, n, y + g * n + d), d += 8;
    }
    for (long d = 0; d < n; d++) y[g * n + d] /= total;
  }
}

KERNEL void gated(float *gate, const float *up, long from, long to) { /* silu(gate) · up */
  long k = from;
  for (; k + 8 <= to; k += 8) {
    v8 g = load8(gate + k);
    *(v8 *)(gate + k) = g / (1.f + exp8(within(-g, -87.f, 87.f))) * load8(up + k);
  }
  for (; k < to; k++) gate[k] = gate[k] / (1.f + expf(-gate[k])) * up[k];
}

/* --- a step --- */

typedef struct { float *q, *k, *v, *mixed, *gate, *up; } Between;
/* what the threads of a step hand each other, [rows, ..] */

static void heads_of(const Shape *s, const float *const *w, Between b, float *cache, long window, const long *pos,
                     const float *turns, long item, float *p) {
  /* a row's queries that share a key head: norm, angles, the new key and value into the cache, attention */
  long n = s->head, group = s->heads / s->shared, row = item / s->shared, one = item % s->shared, at = pos[row];
  const float *cos = turns + at * n, *sin = cos + s->turns * n;
  float *q = b.q + (row * s->heads + one * group) * n, *k = b.k + item * n;
  float *keys = cache + (row * s->shared + one) * s->length * n, *values = keys + s->slots * s->shared * s->length * n;
  if (w[NORM_K]) norm(w[NORM_K], s->eps, k, n, k);
  turn(cos, sin, k, n);
  memcpy(keys + at * n, k, n * sizeof(float));
  memcpy(values + at * n, b.v + item * n, n * sizeof(float));
  for (long g = 0; g < group; g++, q += n) {
    if (w[NORM_Q]) norm(w[NORM_Q], s->eps, q, n, q);
    turn(cos, sin, q, n);
    for (long d = 0; d < n; d++) q[d] *= s->scale;
  }
  long from = window && at + 1 > window ? at + 1 - window : 0;
  attend(q - group * n, keys, values, group, from, at + 1, n, p, b.mixed + (row * s->heads + one * group) * n);
}

static void normed(const Shape *s, const float *weight, const float *stream, float *y) {
  for (long m = 0; m < s->rows; m++) norm(weight, s->eps, stream + m * s->width, s->width, y + m * s->width);
}

static void barrier(void) {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

static void layer(const Shape *s, const float *const *w, Between b, float *cache, long window, const long *pos, const float *turns,
                  float *stream, float *own, long me, long of) {
  long M = s->rows, D = s->width, Hq = s->heads * s->head, Hk = s->shared * s->head, F = s->inner;
  normed(s, w[BEFORE], stream, own);
  linear(w[Q], w[BQ], own, M, D, 0, b.q, Hq, me, of);
  linear(w[K], w[BK], own, M, D, 0, b.k, Hk, me, of);
  linear(w[V], w[BV], own, M, D, 0, b.v, Hk, me, of);
  barrier();
  for (long item = me; item < M * s->shared; item += of) heads_of(s, w, b, cache, window, pos, turns, item, own);
  barrier();
  linear(w[O], w[BO], b.mixed, M, Hq, 1, stream, D, me, of);
  barrier();
  normed(s, w[AFTER], stream, own);
  linear(w[GATE], w[BGATE], own, M, D, 0, b.gate, F, me, of);
  linear(w[UP], w[BUP], own, M, D, 0, b.up, F, me, of);
  for (long m = 0; m < M; m++) gated(b.gate, b.up, m * F + begin(F, me, of), m * F + begin(F, me + 1, of));
  barrier();
  linear(w[DOWN], w[BDOWN], b.gate, M, F, 1, stream, D, me, of);
  barrier();
}

int tutelage_step(const Shape *s, const float *const *weights, const long *windows, float *cache, const long *ids,
                  const long *pos, const float *embedded, const float *turns, const float *last, float *stream) {
  /* tokens ids [rows] at positions pos [rows] -> the last hidden states, stream [rows, width]; not 0: no memory.
     embedded [vocabulary, width], turns [2, turns, head], last: the norm after the layers */
  long M = s->rows, Hq = s->heads * s->head, Hk = s->shared * s->head;
  long scores = s->heads / s->shared * (s->length + 16), private = M * s->width > scores ? M * s->width : scores;
  float *room = malloc((M * (2 * Hq + 2 * Hk + 2 * s->inner) + s->threads * private) * sizeof(float));
  if (!room) return 1;
  Between b = {room};
  b.k = b.q + M * Hq, b.v = b.k + M * Hk, b.mixed = b.v + M * Hk, b.gate = b.mixed + M * Hq, b.up = b.gate + M * s->inner;
  for (long m = 0; m < M; m++) memcpy(stream + m * s->width, embedded + ids[m] * s->width, s->width * sizeof(float));
#ifdef _OPENMP
#pragma omp parallel num_threads(s->threads)
#endif
  {
    long me = 0, of = 1;
#ifdef _OPENMP
    me = omp_get_thread_num(), of = omp_get_num_threads();
#endif
    float *own = b.up + M * s->inner + me * private;
    for (long i = 0; i < s->layers; i++)
      layer(s, weights + i * PARTS, b, cache + i * 2 * s->slots * Hk * s->length, windows[i], pos, turns, stream, own, me, of);
  }
  for (long m = 0; m < M; m++) norm(last, s->eps, stream + m * s->width, s->width, stream + m * s->width);
  free(room);
  return 0;
}

void tutelage_linear(const float *w, const float *bias, const float *x, float *y, long rows, long n, long columns, long threads) {
  /* w [columns, n], x [rows, n] -> y [rows, columns] */
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  linear(w, bias, x, rows, n, 0, y, columns, omp_get_thread_num(), omp_get_num_threads());
#else
  linear(w, bias, x, rows, n, 0, y, columns, 0, 1);
#endif
}
