// Reading XLA's call frame: the C side of its foreign function interface.
#pragma once

#include <stdint.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

// True when XLA only asks which version of the interface the handler was compiled for.
static int answers_metadata(XLA_FFI_CallFrame *frame) {
  XLA_FFI_Extension_Base *extension = frame->extension_start;
  if (extension == NULL || extension->type != XLA_FFI_Extension_Metadata) return 0;
  XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)extension)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  return 1;
}

static XLA_FFI_Buffer *arg_of(XLA_FFI_CallFrame *frame, int index) { return frame->args.args[index]; }
static XLA_FFI_Buffer *ret_of(XLA_FFI_CallFrame *frame, int index) { return frame->rets.rets[index]; }

static const XLA_FFI_Scalar *scalar_of(XLA_FFI_CallFrame *frame, const char *name) {
  for (int64_t i = 0; i < frame->attrs.size; i++) {
    XLA_FFI_ByteSpan *told = frame->attrs.names[i];
    if (strlen(name) == told->len && memcmp(name, told->ptr, told->len) == 0) return frame->attrs.attrs[i];
  }
  return NULL;
}

static float float_of(XLA_FFI_CallFrame *frame, const char *name) {
  const XLA_FFI_Scalar *scalar = scalar_of(frame, name);
  return scalar == NULL ? 0.0f : *(const float *)scalar->value;
}

static int32_t int_of(XLA_FFI_CallFrame *frame, const char *name) {
  const XLA_FFI_Scalar *scalar = scalar_of(frame, name);
  return scalar == NULL ? 0 : *(const int32_t *)scalar->value;
}

static XLA_FFI_Error *refuse(XLA_FFI_CallFrame *frame, const char *message) {
  XLA_FFI_Error_Create_Args args = {.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
                                    .message = message,
                                    .errc = XLA_FFI_Error_Code_INVALID_ARGUMENT};
  return frame->api->XLA_FFI_Error_Create(&args);
}
