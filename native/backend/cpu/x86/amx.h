/* amx.h — the quantized product on AMX's tiles, and whether this process may and should use it. */
#ifndef CV_X86_AMX_H
#define CV_X86_AMX_H

#include <stdbool.h>

#include "../kernels.h"

/* From here on products are computed on tiles; of fewer activation rows the VNNI set's kernels compute them. By calculation, not
 * measured on hardware (amx_tile.c): a tile has 16 rows, and so many 4-bit products of activation rows vnni_batch.c makes in one pass
 * over the weights without unpacking them. */
enum { CV_AMX_FROM = 17 };

/* Many activation rows; any number is right. AFFINE 4, 6 and 8 bits, group 32, 64, 128. Needs VNNI and permission for tiles; leaves the tiles released. */
void cv_amx_tile(const cv_weight *w, size_t expert, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch);
size_t cv_amx_tile_scratch(size_t cols);

typedef enum {
    CV_AMX_ABSENT,  /* the processor has no AMX int8, or the system does not save its tiles */
    CV_AMX_REFUSED, /* it has, but the system gives this process no permission */
    CV_AMX_WRONG,   /* its products are not the VNNI kernel's */
    CV_AMX_READY
} cv_amx_state;

/* Asks processor and system, takes the permission, and computes a few small products on tiles and without. Some 100 µs. */
cv_amx_state cv_amx_find(void);

typedef void (*cv_qmatmul_fn)(const cv_weight *w, size_t expert, size_t row0, size_t row1, const cv_qact *a, float *out, size_t ldo, void *scratch);

/* Whether `product` gives the bits of cv_vnni_tile for small products of all formats. Its scratch: cv_amx_tile_scratch. False also where there is
 * no memory to try it. */
bool cv_amx_agrees(cv_qmatmul_fn product);

#endif
