/* Index kernel, baseline of the processor family: law and loops in index_kernel_body.h. */
#define INDEX_NAME etk_index_f32_scalar_64
#define INDEX_TEXT "index_f32_scalar_64"
#define INDEX_ISA ETK_ISA_SCALAR
#include "index_kernel_body.h"
