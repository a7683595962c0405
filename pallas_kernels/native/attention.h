// Ragged paged attention and the write of this step's keys and values, float32.
//
// KV layout [P, 2, K, S, D], or [P, 1, K, S, D] where a token's key is its value too: the keys of one head in one page
// are S rows of D, so they are the right side of a tile as they lie. A piece of work is one KV head of some consecutive
// queries of one row; it goes through the row's pages once, a block of keys at a time, with an online softmax. Where
// there are many decode rows, a piece takes all KV heads of one instead: heads lie side by side in a page, and memory
// is read in longer runs.
#pragma once

#include <math.h>

#include "call.h"
#include "parallel.h"
#include "tile.h"

#define TILE_KEYS (TILE_N > 4 ? 4 : TILE_N)  // divides every page
#define BLOCK_KEYS 128    // logits of one block stay in the first-level cache
#define TILE_QUERIES 16   // queries of a prompt chunk that share one pass over the keys
#define WIDE_ROWS 4             // decode rows from which on a piece takes all KV heads of a row
#define SMALL_ATTENTION 60000  // query-key pairs times head size below which a second thread does not pay

typedef struct {
  const float *q, *kv, *sinks;  // q [T, H, D]; sinks [H] or NULL
  float *out;                   // [T, H, D]
  const int32_t *starts, *contexts, *table;
  int64_t rows, tokens, heads, kv_heads, size, page_size, pages_per_row;
  int64_t halves;          // 2, or 1 where keys are the values too
  int64_t span;            // KV heads of a piece
  int64_t offset, window;  // window: 0 for none
  float scale, cap;        // cap: 0 for none
  int32_t *piece_rows, *piece_starts;
} Attention;

typedef struct {
  float *q, *logits, *sums;  // [M, D], [M, BLOCK_KEYS], [M, D]
  float *best, *total;       // [M]
  int32_t *low, *high;       // [M]: the keys each query sees, [low, high)
} Scratch;

static const float *page_of(const Attention *a, int row, int64_t key, int64_t head, int is_value) {
  int64_t page = a->table[row * a->pages_per_row + key / a->page_size] + a->offset;
  int64_t half = is_value ? a->halves - 1 : 0;
  return a->kv + ((page * a->halves + half) * a->kv_heads + head) * a->page_size * a->size;
}

// m: query rows of one KV head; those of the piece's KV heads, from `first` on, follow each other.
static void block_logits(const Attention *a, Scratch *s, int m, int row, int64_t first, int64_t from, int64_t to) {
  for (int64_t key = from; key < to;) {
    int64_t slot = key % a->page_size, count = a->page_size - slot;
    if (count > to - key) count = to - key;
    for (int64_t head = 0; head < a->span; head++) {
      const float *keys = page_of(a, row, key, first + head, 0) + slot * a->size;
      const float *q = s->q + head * m * a->size;
      float *logits = s->logits + head * m * BLOCK_KEYS + (key - from);
      for (int64_t j = 0; j < count; j += TILE_KEYS) {
        int columns = (int)(count - j < TILE_KEYS ? count - j : TILE_KEYS);
        for (int i = 0; i < m; i += TILE_M)
          tile_any(m - i < TILE_M ? m - i : TILE_M, columns, q + i * a->size, a->size, keys + j * a->size, a->size,
                   a->size, NULL, 0, logits + i * BLOCK_KEYS + j, BLOCK_KEYS);
      }
    }
    key += count;
  }
}

// Turns query i's logits of keys [from, to) into weights and rescales what it has summed so far.
static void block_softmax(const Attention *a, Scratch *s, int i, int64_t from, int64_t to) {
  float *logits = s->logits + i * BLOCK_KEYS;
  int low = (int)((s->low[i] > from ? s->low[i] : from) - from);
  int high = (int)((s->high[i] < to ? s->high[i] : to) - from);
  int length = (int)(to - from + LANES - 1) / LANES * LANES;
  if (high <= low) {
    memset(logits, 0, (size_t)length * 4);
    return;
  }
  if (a->cap > 0)
    for (int j = low; j < high; j++) logits[j] = a->cap * tanhf(logits[j] / a->cap);
  for (int j = 0; j < low; j++) logits[j] = -INFINITY;
  for (int j = high; j < length; j++) logits[j] = -INFINITY;
  Vec most = vec_all(s->best[i]);
  for (int j = 0; j < length; j += LANES) most = vec_max(most, vec_load(logits + j));
  float best = vec_max_lane(most);
  if (best > s->best[i]) {
    float shrink = expf(s->best[i] - best);
    s->total[i] *= shrink;
    for (int64_t d = 0; d < a->size; d++) s->sums[i * a->size + d] *= shrink;
    s->best[i] = best;
  }
  Vec total = {};
  for (int j = 0; j < length; j += LANES) {
    Vec weight = vec_exp(vec_load(logits + j) - vec_all(best));
    vec_store(logits + j, weight);
    total += weight;
  }
  s->total[i] += vec_sum_lanes(total);
}

// sums[i] += weights[i, j] * values[j] for M queries and VECS vectors of the head size, in registers.
INLINE void weigh(const int M, const int VECS, const float *weights, const float *values, int64_t count, int64_t size,
                  float *sums) {
  Vec sum[TILE_M * 4];
  for (int i = 0; i < M; i++)
    for (int d = 0; d < VECS; d++) sum[i * VECS + d] = vec_load(sums + i * size + d * LANES);
  for (int64_t j = 0; j < count; j++) {
    Vec value[4];
    for (int d = 0; d < VECS; d++) value[d] = vec_load(values + j * size + d * LANES);
    for (int i = 0; i < M; i++)
      for (int d = 0; d < VECS; d++) sum[i * VECS + d] += weights[i * BLOCK_KEYS + j] * value[d];
  }
  for (int i = 0; i < M; i++)
    for (int d = 0; d < VECS; d++) vec_store(sums + i * size + d * LANES, sum[i * VECS + d]);
}

static void weigh_any(int rows, int vecs, const float *weights, const float *values, int64_t count, int64_t size,
                      float *sums) {
#define CASE(m, v)                                          \
  case (m) * 8 + (v):                                       \
    weigh(m, v, weights, values, count, size, sums);        \
    break;
  switch (rows * 8 + vecs) {
    CASE(1, 1) CASE(1, 2) CASE(1, 4) CASE(2, 1) CASE(2, 2) CASE(2, 4)
    CASE(3, 1) CASE(3, 2) CASE(3, 4) CASE(4, 1) CASE(4, 2) CASE(4, 4)
  }
#undef CASE
}

static void block_values(const Attention *a, Scratch *s, int m, int row, int64_t first, int64_t from, int64_t to) {
  for (int64_t key = from; key < to;) {
    int64_t slot = key % a->page_size, count = a->page_size - slot;
    if (count > to - key) count = to - key;
    for (int64_t head = 0; head < a->span; head++) {
      const float *values = page_of(a, row, key, first + head, 1) + slot * a->size;
      const float *weights = s->logits + head * m * BLOCK_KEYS + (key - from);
      float *sums = s->sums + head * m * a->size;
      for (int i = 0; i < m; i += TILE_M) {
        int rows = m - i < TILE_M ? m - i : TILE_M;
        for (int64_t d = 0; d < a->size;) {
          int left = (int)((a->size - d) / LANES), vecs = left >= 4 ? 4 : left >= 2 ? 2 : 1;
          weigh_any(rows, vecs, weights + i * BLOCK_KEYS, values + d, count, a->size, sums + i * a->size + d);
          d += vecs * LANES;
        }
      }
    }
    key += count;
  }
}

static int64_t scratch_floats(int64_t m, int64_t size) { return m * (2 * size + BLOCK_KEYS) + 4 * (m + 15) + 64; }

static Scratch lay_out(float *memory, int64_t m, int64_t size) {
  float *logits = memory, *q = logits + m * BLOCK_KEYS, *sums = q + m * size, *best = sums + m * size;
  int32_t *low = (int32_t *)(best + 2 * m);
  return (Scratch){.q = q, .logits = logits, .sums = sums, .best = best, .total = best + m, .low = low, .high = low + m};
}

static void attention_piece(const void *what, int64_t index) {
  const Attention *a = what;
  int64_t group = a->heads / a->kv_heads, spans = a->kv_heads / a->span;
  int64_t first = index % spans * a->span, item = index / spans;
  int row = a->piece_rows[item];
  int64_t begin = a->piece_starts[item], end = a->starts[row + 1];
  int queries = (int)(end - begin < TILE_QUERIES ? end - begin : TILE_QUERIES);
  int of_head = queries * (int)group, m = of_head * (int)a->span;
  int64_t position = a->contexts[row] - (end - begin);  // of the first query
  float *memory = aligned_alloc(64, (size_t)scratch_floats(m, a->size) / 16 * 64);
  Scratch s = lay_out(memory, m, a->size);
  for (int i = 0; i < m; i++) {
    int query = i % of_head / (int)group;
    int64_t h = (first + i / of_head) * group + i % group, last = position + query;
    const float *q = a->q + ((begin + query) * a->heads + h) * a->size;
    for (int64_t d = 0; d < a->size; d++) s.q[i * a->size + d] = q[d] * a->scale;
    s.low[i] = a->window > 0 && last >= a->window ? (int32_t)(last - a->window + 1) : 0;
    s.high[i] = (int32_t)last + 1;
    s.best[i] = a->sinks == NULL ? -INFINITY : a->sinks[h];
    s.total[i] = a->sinks == NULL ? 0.0f : 1.0f;
  }
  memset(s.sums, 0, (size_t)(m * a->size) * 4);
  for (int64_t from = s.low[0], stop = s.high[m - 1]; from < stop; from += BLOCK_KEYS) {
    int64_t to = from + BLOCK_KEYS < stop ? from + BLOCK_KEYS : stop;
    block_logits(a, &s, of_head, row, first, from, to);
    for (int i = 0; i < m; i++) block_softmax(a, &s, i, from, to);
    block_values(a, &s, of_head, row, first, from, to);
  }
  for (int i = 0; i < m; i++) {
    int64_t token = begin + i % of_head / group, h = (first + i / of_head) * group + i % group;
    float *out = a->out + (token * a->heads + h) * a->size;
    for (int64_t d = 0; d < a->size; d++) out[d] = s.sums[i * a->size + d] / s.total[i];
  }
  free(memory);
}

// The pieces of a batch, one per row and TILE_QUERIES queries; returns how many, and their query-key pairs.
static int64_t list_pieces(Attention *a, int64_t *pairs) {
  int64_t count = 0;
  *pairs = 0;
  for (int64_t row = 0; row < a->rows; row++) {
    *pairs += (int64_t)(a->starts[row + 1] - a->starts[row]) * a->contexts[row];
    for (int32_t token = a->starts[row]; token < a->starts[row + 1]; token += TILE_QUERIES) {
      a->piece_rows[count] = (int32_t)row;
      a->piece_starts[count++] = token;
    }
  }
  return count;
}

// (q, kv, query_starts, context_lens, page_table, page_offset, sinks [H] or [0]) -> out
static XLA_FFI_Error *attend(XLA_FFI_CallFrame *frame) {
  if (answers_metadata(frame)) return NULL;
  XLA_FFI_Buffer *q = arg_of(frame, 0), *kv = arg_of(frame, 1), *table = arg_of(frame, 4), *sinks = arg_of(frame, 6);
  Attention a = {.q = q->data,
                 .kv = kv->data,
                 .sinks = sinks->dims[0] > 0 ? sinks->data : NULL,
                 .out = ret_of(frame, 0)->data,
                 .starts = arg_of(frame, 2)->data,
                 .contexts = arg_of(frame, 3)->data,
                 .table = table->data,
                 .rows = table->dims[0],
                 .pages_per_row = table->dims[1],
                 .tokens = q->dims[0],
                 .heads = q->dims[1],
                 .size = q->dims[2],
                 .halves = kv->dims[1],
                 .kv_heads = kv->dims[2],
                 .page_size = kv->dims[3],
                 .offset = *(int32_t *)arg_of(frame, 5)->data,
                 .window = int_of(frame, "window"),
                 .scale = float_of(frame, "scale"),
                 .cap = float_of(frame, "cap")};
  int64_t most = a.rows + a.tokens / TILE_QUERIES, pairs, live = a.starts[a.rows];
  a.piece_rows = malloc((size_t)most * 8 + 8);
  if (a.piece_rows == NULL) return refuse(frame, "out of memory for the list of rows");
  a.piece_starts = a.piece_rows + most;
  int64_t pieces = list_pieces(&a, &pairs);
  memset(a.out + live * a.heads * a.size, 0, (size_t)((a.tokens - live) * a.heads * a.size) * 4);
  // Decode rows only, and enough of them to share among the threads.
  a.span = live == pieces && pieces >= WIDE_ROWS ? a.kv_heads : 1;
  parallel_for(frame, pieces * (a.kv_heads / a.span), pairs * a.heads * a.size < SMALL_ATTENTION, attention_piece, &a);
  free(a.piece_rows);
  return NULL;
}

// (kv, k [T, K, D], v, query_starts, context_lens, page_table, page_offset) -> kv, in place
static XLA_FFI_Error *write_kv(XLA_FFI_CallFrame *frame) {
  if (answers_metadata(frame)) return NULL;
  XLA_FFI_Buffer *kv = ret_of(frame, 0), *k = arg_of(frame, 1), *table = arg_of(frame, 5);
  if (arg_of(frame, 0)->data != kv->data) return refuse(frame, "the KV pool is not donated: it must be updated in place");
  const float *sides[2] = {k->data, arg_of(frame, 2)->data};
  const int32_t *starts = arg_of(frame, 3)->data, *contexts = arg_of(frame, 4)->data, *pages = table->data;
  int64_t offset = *(int32_t *)arg_of(frame, 6)->data;
  int64_t halves = kv->dims[1], heads = kv->dims[2], page_size = kv->dims[3], size = kv->dims[4];
  for (int64_t row = 0; row < table->dims[0]; row++)
    for (int64_t token = starts[row]; token < starts[row + 1]; token++) {
      int64_t position = contexts[row] - starts[row + 1] + token;
      int64_t page = pages[row * table->dims[1] + position / page_size] + offset;
      for (int side = 0; side < halves; side++)
        for (int64_t head = 0; head < heads; head++)
          memcpy((float *)kv->data + (((page * halves + side) * heads + head) * page_size + position % page_size) * size,
                 sides[side] + (token * heads + head) * size, (size_t)size * 4);
    }
  return NULL;
}
