// Vectors of floats as the compiler's own type, so that one source serves AVX-512, AVX2, NEON and whatever comes.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define REGISTERS 32
#elif defined(__AVX__)
#define LANES 8
#define REGISTERS 16
#elif defined(__aarch64__)
#define LANES 4
#define REGISTERS 32
#else
#define LANES 4
#define REGISTERS 16
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));

INLINE Vec vec_load(const float *p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE void vec_store(float *p, Vec v) { memcpy(p, &v, sizeof v); }

INLINE Vec vec_all(float x) { return x - (Vec){}; }

// The first `count` lanes from p, the others zero; reads nothing behind them.
INLINE Vec vec_load_part(const float *p, int count) {
  Vec v = {};
  memcpy(&v, p, (size_t)count * 4);
  return v;
}

INLINE Vec vec_select(IntVec mask, Vec a, Vec b) { return (Vec)((mask & (IntVec)a) | (~mask & (IntVec)b)); }

INLINE Vec vec_max(Vec a, Vec b) { return vec_select(a > b, a, b); }

INLINE float vec_max_lane(Vec v) {
  float best = v[0];
  for (int i = 1; i < LANES; i++) best = v[i] > best ? v[i] : best;
  return best;
}

INLINE float vec_sum_lanes(Vec v) {
  float parts[LANES];
  vec_store(parts, v);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) parts[i] += parts[i + width];
  return parts[0];
}

// Where vec_fold takes its lanes from, for segments of LANES, LANES / 2, ... 2 lanes: lanes of a, then of b.
static const IntVec FOLDS[][2] = {
#if LANES == 16
    {{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
     {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31}},
    {{0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},
     {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31}},
    {{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
     {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31}},
    {{0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30},
     {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31}},
#elif LANES == 8
    {{0, 1, 2, 3, 8, 9, 10, 11},
     {4, 5, 6, 7, 12, 13, 14, 15}},
    {{0, 1, 8, 9, 4, 5, 12, 13},
     {2, 3, 10, 11, 6, 7, 14, 15}},
    {{0, 8, 2, 10, 4, 12, 6, 14},
     {1, 9, 3, 11, 5, 13, 7, 15}},
#else
    {{0, 1, 4, 5},
     {2, 3, 6, 7}},
    {{0, 4, 2, 6},
     {1, 5, 3, 7}},
#endif
};

#if defined(__clang__)
INLINE Vec vec_shuffle(Vec a, Vec b, IntVec from) {
  Vec result;
  for (int i = 0; i < LANES; i++) result[i] = from[i] < LANES ? a[from[i]] : b[from[i] - LANES];
  return result;
}
#else
#define vec_shuffle(a, b, from) __builtin_shuffle(a, b, from)
#endif

// Halves each segment of lanes by adding its halves: a's segments before b's.
INLINE Vec vec_fold(Vec a, Vec b, int level) {
  return vec_shuffle(a, b, FOLDS[level][0]) + vec_shuffle(a, b, FOLDS[level][1]);
}

// The sums of LANES vectors, in order, as one vector. Destroys v.
INLINE Vec vec_sums(Vec *v) {
  int level = 0;
#pragma GCC unroll 4
  for (int count = LANES; count > 1; count /= 2, level++)
#pragma GCC unroll 16
    for (int i = 0; i < count / 2; i++) v[i] = vec_fold(v[i], v[i + count / 2], level);
  return v[0];
}

// exp(x) for x <= 0 within 2 units in the last place; 0 below -87. Range reduction by ln 2 in two parts, then the
// Taylor polynomial of degree 7 on [-ln2/2, ln2/2], whose error there is below 6e-9.
INLINE Vec vec_exp(Vec x) {
  const Vec tiny = vec_all(-87.0f), round = vec_all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  IntVec live = x >= tiny;
  x = vec_select(live, x, tiny);
  Vec shifted = x * 1.44269504088896341f + round;
  Vec n = shifted - round;
  Vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec p = vec_all(1.9841270e-4f);
  p = p * r + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  IntVec exponent = ((IntVec)shifted - (IntVec)round + 127) << 23;
  Vec result = p * (Vec)exponent;
  return (Vec)(live & (IntVec)result);
}
