// A loop shared between the calling thread and XLA's own thread pool.
//
// The caller takes part and waits only for pieces that somebody has begun: were every thread of the pool busy, it
// would do the whole loop itself, so the pool can never be waited on by all its threads. A helper that comes late
// finds no piece left; the last to let go of the job frees it.
#pragma once

#include <stdatomic.h>
#include <stdlib.h>

#include "xla/ffi/api/c_api.h"

typedef void (*Piece)(const void *what, int64_t index);

typedef struct {
  Piece piece;
  const void *what;
  int64_t count;
  atomic_llong next, done;
  atomic_int holders;
} Job;

static void job_release(Job *job) {
  if (atomic_fetch_sub(&job->holders, 1) == 1) free(job);
}

static void job_work(Job *job) {
  for (;;) {
    int64_t index = atomic_fetch_add(&job->next, 1);
    if (index >= job->count) return;
    job->piece(job->what, index);
    atomic_fetch_add_explicit(&job->done, 1, memory_order_release);
  }
}

static void job_help(void *data) {
  Job *job = data;
  job_work(job);
  job_release(job);
}

static inline void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static int64_t pool_threads(const XLA_FFI_CallFrame *frame) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args = {.struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE,
                                             .ctx = frame->ctx,
                                             .num_threads = &threads};
  XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_NumThreads(&args);
  if (error != NULL) {
    XLA_FFI_Error_Destroy_Args destroy = {.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, .error = error};
    frame->api->XLA_FFI_Error_Destroy(&destroy);
    return 1;
  }
  return threads;
}

// Calls piece(what, i) for every i below count; `is_small` says that waking a thread would cost more than it gives.
static void parallel_for(const XLA_FFI_CallFrame *frame, int64_t count, int is_small, Piece piece, const void *what) {
  int64_t helpers = is_small || count < 2 ? 0 : pool_threads(frame) - 1;
  if (helpers > count - 1) helpers = count - 1;
  Job *job = helpers > 0 ? malloc(sizeof *job) : NULL;
  if (job == NULL) {
    for (int64_t i = 0; i < count; i++) piece(what, i);
    return;
  }
  *job = (Job){.piece = piece, .what = what, .count = count};
  atomic_init(&job->holders, (int)helpers + 1);
  for (int64_t i = 0; i < helpers; i++) {
    XLA_FFI_ThreadPool_Schedule_Args args = {.struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE,
                                             .ctx = frame->ctx,
                                             .task = job_help,
                                             .data = job};
    XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_Schedule(&args);
    if (error != NULL) {
      XLA_FFI_Error_Destroy_Args destroy = {.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, .error = error};
      frame->api->XLA_FFI_Error_Destroy(&destroy);
      job_release(job);
    }
  }
  job_work(job);
  while (atomic_load_explicit(&job->done, memory_order_acquire) < count) relax();
  job_release(job);
}
