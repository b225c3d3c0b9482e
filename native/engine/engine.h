/* engine.h — opening an engine, for cv_open (in the caller's thread) and the loader (in its own). */
#ifndef CV_ENGINE_H
#define CV_ENGINE_H

#include "error.h"
#include "weights.h"

/* cv_open with progress and a way to stop. */
int cv_engine_open(const void *plan, size_t plan_size, cv_group *group, cv_load_progress *progress, cv_engine **out, cv_err err);

#endif
