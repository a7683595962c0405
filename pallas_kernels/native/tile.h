// The inner loop of every product here: dot products of a few rows with a few rows, kept in registers.
#pragma once

#include "vector.h"

// Rows of the left and right side in one tile: TILE_M * TILE_N sums and one row of each side fill the registers.
#define TILE_M 4
#if REGISTERS == 32
#define TILE_N 6
#else
#define TILE_N 2
#endif

// out[i * out_stride + j] = sum_k x[i * x_stride + k] * w[j * w_stride + k] for i < M, j < N.
// Meanwhile `pace` cache lines per step are asked for from `ahead` on. Evenly: a burst would fill the line buffers that
// loads from the second-level cache need too, and the hardware's own prefetcher follows only a steady stream.
INLINE void tile(const int M, const int N, const float *x, int64_t x_stride, const float *w, int64_t w_stride,
                 int64_t size, const float *ahead, int pace, float *out, int64_t out_stride) {
  Vec sums[(TILE_M * 8 + LANES) / LANES * LANES];
  for (int i = 0; i < (M * N + LANES - 1) / LANES * LANES; i++) sums[i] = (Vec){};
  int64_t k = 0;
  for (; k + LANES <= size; k += LANES) {
    Vec left[TILE_M];
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) left[i] = vec_load(x + i * x_stride + k);
    for (int i = 0; i < pace; i++, ahead += 16) __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
      Vec right = vec_load(w + j * w_stride + k);
#pragma GCC unroll 4
      for (int i = 0; i < M; i++) sums[i * N + j] += left[i] * right;
    }
  }
  if (k < size)
    for (int j = 0; j < N; j++) {
      Vec right = vec_load_part(w + j * w_stride + k, (int)(size - k));
      for (int i = 0; i < M; i++) sums[i * N + j] += vec_load_part(x + i * x_stride + k, (int)(size - k)) * right;
    }
  float flat[(TILE_M * 8 + LANES) / LANES * LANES];
#pragma GCC unroll 8
  for (int base = 0; base < M * N; base += LANES) vec_store(flat + base, vec_sums(sums + base));
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) out[i * out_stride + j] = flat[i * N + j];
}

// The same for any rows <= TILE_M and columns <= TILE_N.
static void tile_any(int rows, int columns, const float *x, int64_t x_stride, const float *w, int64_t w_stride,
                     int64_t size, const float *ahead, int pace, float *out, int64_t out_stride) {
#define CASE(m, n)                                                                      \
  case (m) * 16 + (n):                                                                  \
    tile(m, n, x, x_stride, w, w_stride, size, ahead, pace, out, out_stride);                 \
    break;
#define COLUMNS(n) CASE(1, n) CASE(2, n) CASE(3, n) CASE(4, n)
  switch (rows * 16 + columns) {
    COLUMNS(1)
    COLUMNS(2)
#if TILE_N == 6
    COLUMNS(3)
    COLUMNS(4)
    COLUMNS(5)
    COLUMNS(6)
#endif
  }
#undef COLUMNS
#undef CASE
}
