// y = x / sqrt(mean(x^2) + eps) * (w + offset) over the last dimension: x [..., E], w [E], float32.
#pragma once

#include <math.h>

#include "call.h"
#include "vector.h"

static XLA_FFI_Error *rms_norm(XLA_FFI_CallFrame *frame) {
  if (answers_metadata(frame)) return NULL;
  XLA_FFI_Buffer *x = arg_of(frame, 0), *w = arg_of(frame, 1);
  const float *weight = w->data;
  int64_t size = w->dims[0], rows = x->dims[0], whole = size / LANES * LANES;
  float eps = float_of(frame, "eps"), offset = float_of(frame, "offset");
  for (int64_t row = 0; row < rows; row++) {
    const float *from = (const float *)x->data + row * size;
    float *to = (float *)ret_of(frame, 0)->data + row * size;
    Vec parts = {};
    for (int64_t i = 0; i < whole; i += LANES) parts += vec_load(from + i) * vec_load(from + i);
    float sum = vec_sum_lanes(parts);
    for (int64_t i = whole; i < size; i++) sum += from[i] * from[i];
    float scale = 1.0f / sqrtf(sum / (float)size + eps);
    for (int64_t i = 0; i < whole; i += LANES)
      vec_store(to + i, vec_load(from + i) * scale * (vec_load(weight + i) + offset));
    for (int64_t i = whole; i < size; i++) to[i] = from[i] * scale * (weight[i] + offset);
  }
  return NULL;
}
