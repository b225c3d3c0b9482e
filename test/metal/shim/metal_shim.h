// metal_shim.h — the compute part of Metal Shading Language 3.2 for clang on Linux, force-included before a kernel file.
//
// Address spaces are clang's OpenCL attributes: they are part of the type, so mixing them is an error as in Metal, but they
// all lower to ordinary memory, so the same object code runs on the CPU and can be instrumented. What Metal's standard
// library does is done here (math, vectors) or asked of the executor (barriers, simdgroup operations).
//
// Stricter than Metal, so keep kernels inside these rules: class values are not copied across address spaces (use scalars,
// vectors or members), no array parameters with an address space, no C-style casts to vectors, bfloat conversions explicit.
#pragma once
#pragma clang system_header
#define __METAL__ 1
#define __METAL_VERSION__ 320
#define __HAVE_BFLOAT__ 1
#define device __attribute__((opencl_global))
#define threadgroup __attribute__((opencl_local))
#define constant const __attribute__((opencl_constant))
#define thread
#define kernel
#define METAL_FUNC inline
#define coherent(scope) // memory is coherent on a CPU
#define MSL_INLINE inline __attribute__((always_inline, artificial, nodebug))
// Bodies of simdgroup operations run on the executor's behalf, outside any GPU thread.
#define MSL_EXECUTOR_SIDE __attribute__((no_sanitize("thread"), noinline))

#include "shim_types.h"
#include "shim_runtime.h"
#include "shim_math.h"
#include "shim_simdgroup.h"
#include "shim_matrix.h"
#include "shim_atomics.h"
#include "shim_arguments.h"
#include "shim_constructors.h"
