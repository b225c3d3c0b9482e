/* device.h — a Metal device from C: messages, buffers over memory, pipelines, command buffers. No Objective-C, no SDK: all
 * entry points are found with dlopen.
 *
 * Not thread-safe: one thread at a time. The first failure is kept as text; calls after it do nothing until the next begin. */
#ifndef CV_METAL_DEVICE_H
#define CV_METAL_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../../engine/error.h"
#include "../backend.h"

typedef struct cv_metal_device cv_metal_device;

/* Function constants of a kernel, by the numbers of params.h. */
typedef struct {
    uint32_t formats[16]; /* weights A to D: format, bits, group, scale type */
    uint32_t output, experts, layer;
    bool same_formats, norm, input_float, bias, rows, swiglu;
} cv_metal_constants;

int cv_metal_device_open(cv_metal_device **out, cv_err err);
void cv_metal_device_close(cv_metal_device *d);

/* Whether kernels may use bfloat16 (macOS 14). */
bool cv_metal_has_bfloat(const cv_metal_device *d);

/* Kernels without a type of activations ("embed") are compiled together with those of this one: f32, f16 or bf16. */
void cv_metal_prefer_type(cv_metal_device *d, const char *type);

/* Memory that host and GPU share, zeroed. */
int cv_metal_alloc(cv_metal_device *d, size_t bytes, void **out, cv_err err);
void cv_metal_free(cv_metal_device *d, void *p);
/* Lets commands use many pieces of memory, joined into as few buffers as the GPU's largest allows; none is cut. */
int cv_metal_share_all(cv_metal_device *d, const cv_memory *pieces, size_t n, cv_err err);
/* Asks the system to make all memory so far resident, where it has residency sets. */
void cv_metal_make_resident(cv_metal_device *d);
/* Lets commands use memory of the host, without copying: whole pages around it. */
int cv_metal_share(cv_metal_device *d, const void *p, size_t bytes, cv_err err);

/* Commands: begin, then for each dispatch use, bind/bytes and dispatch; then finish. */
int cv_metal_begin(cv_metal_device *d);
void cv_metal_use(cv_metal_device *d, const char *kernel, const cv_metal_constants *constants);
/* Binds p; memory that is not known yet is shared first. */
void cv_metal_bind(cv_metal_device *d, unsigned index, const void *p, size_t bytes);
void cv_metal_bytes(cv_metal_device *d, unsigned index, const void *p, size_t bytes);
/* work: multiply-adds. When much has been gathered the command buffer is committed and another begun: none runs for long. */
void cv_metal_dispatch(cv_metal_device *d, const size_t groups[3], size_t threads, double work);
/* Work of the host between what has been recorded and what follows, on x [n] of memory from cv_metal_alloc. With up to `most` numbers it is
 * recorded, where the GPU can wait for the host, and done in finish; else it is done at once. work's pointers stay valid until finish. */
int cv_metal_join(cv_metal_device *d, const cv_host_work *work, float *x, size_t n, size_t most);
/* Waits for all commands. CV_E_STEP with the reason of the first failure. CV_E_AGAIN: the host came later to a join than the GPU waits;
 * the first *joined are done, x of the last of them has the host's numbers, and the step must be recorded again from behind it, once. */
int cv_metal_finish(cv_metal_device *d, size_t *joined, cv_err err);
/* Whether something has failed since begin. */
int cv_metal_failed(const cv_metal_device *d);
/* Records a failure of the caller's own. */
void cv_metal_refuse(cv_metal_device *d, int code, const char *text);

/* How a step hands over to the host and back. WAIT and LOOK: a command buffer ends there, the host waits for it or looks at an event that it
 * signals, and the next one is committed when the host is done; the GPU waits for nobody. EVENT and SPIN: within a command buffer the GPU waits
 * for an event that the host signals, or a kernel looks at a word that the host writes; both for a bounded time. */
typedef enum { CV_METAL_WAIT, CV_METAL_LOOK, CV_METAL_EVENT, CV_METAL_SPIN, CV_METAL_WAYS } cv_metal_way;
const char *cv_metal_way_name(cv_metal_way way);
/* Measures them for n numbers: ns[way], 0 where one is not possible. Returns the one that steps take. */
cv_metal_way cv_metal_measure_ways(cv_metal_device *d, size_t n, uint64_t ns[CV_METAL_WAYS]);

#endif
