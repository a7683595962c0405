// y = x w^T: x [M, K], w [N, K] as checkpoints keep it, y [M, N], float32.
//
// Few rows of x meet a whole weight matrix, so the weight is read from memory exactly once and nothing is repacked:
// a block of TILE_N weight rows stays in the first-level cache while all rows of x pass by, and the next block is
// fetched meanwhile. The order of every sum depends on K alone: a row's result is the same whatever stands beside it.
#pragma once

#include "call.h"
#include "parallel.h"
#include "tile.h"

#define PANEL_BYTES (768 * 1024)  // rows of x that stay in the second-level cache (2 MB where this was measured)
#define SMALL_PRODUCT 400000      // multiplications below which a second thread does not pay

typedef struct {
  const float *x, *w;
  float *y;
  int64_t m, n, k, chunk, panel;
} Product;

static void product_piece(const void *what, int64_t index) {
  const Product *p = what;
  int64_t first = index * p->chunk, last = first + p->chunk < p->n ? first + p->chunk : p->n;
  for (int64_t top = 0; top < p->m; top += p->panel) {
    int64_t bottom = top + p->panel < p->m ? top + p->panel : p->m;
    for (int64_t n = first; n < last; n += TILE_N) {
      int columns = (int)(last - n < TILE_N ? last - n : TILE_N);
      const float *w = p->w + n * p->k;
      // The next block of weights, also where it is the next piece's: most likely a piece's neighbour is ours too.
      int64_t steps = p->k / LANES * ((bottom - top + TILE_M - 1) / TILE_M), lines = TILE_N * p->k / 16;
      int pace = top == 0 && n + 2 * TILE_N <= p->n && steps > 0 ? (int)((lines + steps - 1) / steps) : 0;
      const float *ahead = w + TILE_N * p->k;
      for (int64_t m = top; m < bottom; m += TILE_M) {
        int rows = (int)(bottom - m < TILE_M ? bottom - m : TILE_M);
        tile_any(rows, columns, p->x + m * p->k, p->k, w, p->k, p->k, ahead, pace, p->y + m * p->n + n, p->n);
        ahead += p->k / LANES * pace * 16;
        if (ahead >= w + 2 * TILE_N * p->k) pace = 0;
      }
    }
  }
}

static XLA_FFI_Error *matmul(XLA_FFI_CallFrame *frame) {
  if (answers_metadata(frame)) return NULL;
  XLA_FFI_Buffer *w = arg_of(frame, 0), *x = arg_of(frame, 1);
  Product p = {.x = x->data, .w = w->data, .y = ret_of(frame, 0)->data};
  p.m = x->dims[0], p.n = w->dims[0], p.k = w->dims[1];
  p.panel = PANEL_BYTES / (4 * p.k) / TILE_M * TILE_M;
  if (p.panel < 8 * TILE_M) p.panel = 8 * TILE_M;
  p.chunk = 8 * TILE_N;
  parallel_for(frame, (p.n + p.chunk - 1) / p.chunk, p.m * p.n * p.k < SMALL_PRODUCT, product_piece, &p);
  return NULL;
}
