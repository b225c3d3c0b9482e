/* x86_sets.h — kernels that one x86 set lends to the next. */
#ifndef CV_X86_SETS_H
#define CV_X86_SETS_H

#include "../kernels.h"

#endif
