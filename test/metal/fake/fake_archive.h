/* fake_archive.h — archives of pipelines: the methods, and what the rest of the fake runtime does for them. */
#ifndef FAKE_ARCHIVE_H
#define FAKE_ARCHIVE_H

#include "fake_gpu.h"

/* Ended by a NULL class_name. */
extern const fake_method fake_archive_methods[] HIDDEN;
/* True when the object was one of these classes. */
bool fake_archive_dispose(object *o) HIDDEN;
/* The system's build, as sysctl gives it (fake_metal.c). */
const char *fake_build(void) HIDDEN;

#endif
