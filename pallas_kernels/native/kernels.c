// One translation unit: what `pallas_kernels.native` compiles for the machine it runs on.
#include "attention.h"
#include "matmul.h"
#include "norm.h"

XLA_FFI_Error *pallas_kernels_matmul(XLA_FFI_CallFrame *frame) { return matmul(frame); }
XLA_FFI_Error *pallas_kernels_attend(XLA_FFI_CallFrame *frame) { return attend(frame); }
XLA_FFI_Error *pallas_kernels_write_kv(XLA_FFI_CallFrame *frame) { return write_kv(frame); }
XLA_FFI_Error *pallas_kernels_rms_norm(XLA_FFI_CallFrame *frame) { return rms_norm(frame); }
