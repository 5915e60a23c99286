/* A sentence for each status. */
#include "edgetok/base.h"

const char *etk_strerror(etk_status status) {
  switch (status) {
    case ETK_OK: return "ok";
    case ETK_NOTE_NONFINITE: return "ok; NaN or infinity in an input was mapped to a finite value";
    case ETK_NOTE_EMPTY_ROWS: return "ok; at least one row sees no key";
    case ETK_E_NULL: return "a required pointer is null";
    case ETK_E_STRUCT: return "struct_size is unknown, or bytes past the known fields are not zero";
    case ETK_E_SHAPE: return "a dimension is negative, over a limit, or does not match another";
    case ETK_E_STRIDE: return "a stride that cannot be used; the last axis must be dense";
    case ETK_E_DTYPE: return "an element type that is not taken here";
    case ETK_E_ALIGN: return "a pointer is not aligned as required";
    case ETK_E_RANGE: return "an index or a parameter is out of range, unsorted or duplicated";
    case ETK_E_OVERFLOW: return "dimensions times strides overflow, or exceed the tensor's capacity";
    case ETK_E_WORKSPACE: return "the workspace is too small or misaligned";
    case ETK_E_UNSUPPORTED: return "valid, but not offered by this version";
    case ETK_E_ISA: return "the asked instruction set does not run here, or EDGETOK_MAX_ISA names none that is known";
    case ETK_E_NONFINITE: return "an input holds NaN or infinity";
    case ETK_E_ALIAS: return "an output overlaps an input";
    case ETK_E_CUDA: return "a CUDA call failed";
    case ETK_E_CANCELLED: return "cancelled; outputs are unspecified";
    case ETK_E_MEMORY: return "out of memory";
    case ETK_E_FULL: return "the KV cache has no page left";
    default: return "unknown status";
  }
}
