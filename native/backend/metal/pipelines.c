/* pipelines.c — kernels: compiled from their embedded text by family and type, when the first of them is needed, made into pipelines by name and function constants, kept in a table. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../include/caravan.h"
#include "device_state.h"
#include "kernels/params.h"

/* Without fast math: it lets the compiler sum in another order in each variant of a kernel, and then a row would have other bits
 * in a batch than alone. The products are fma by fma anyway; where speed needs it, kernels say fast::exp. */
static id library(cv_metal_device *d, const char *kernel) {
    cv_metal_part part;
    if (!cv_metal_part_of(kernel, d->type, &part)) return NULL;
    for (size_t i = 0; i < d->n_libraries; i++) {
        const cv_metal_part *p = &d->libraries[i].part;
        if (p->family == part.family && p->type == part.type && p->head_dim == part.head_dim) return d->libraries[i].library;
    }
    char *source = d->n_libraries < CV_METAL_LIBRARIES ? cv_metal_source(&part) : NULL;
    if (!source) return NULL;
    id error = NULL, options = cv_metal_new(d, "MTLCompileOptions");
    if (options) CV_SEND(&d->objc, void, options, fast_math, (bool), false);
    id made = CV_SEND(&d->objc, id, d->device, new_library, (id, id, id *), cv_metal_string(d, source), options, &error);
    if (!made) cv_metal_fail(d, CV_E_UNSUPPORTED, "Metal cannot compile the kernels", error);
    else {
        d->libraries[d->n_libraries].part = part;
        d->libraries[d->n_libraries++].library = made;
    }
    cv_metal_release(d, options);
    free(source);
    return made;
}

static id constant_values(cv_metal_device *d, const cv_metal_constants *c) {
    enum { TYPE_UINT = 33, TYPE_BOOL = 53 }; /* MTLDataType */
    const struct { const void *value; NSUInteger type, index; } others[] = {
        {&c->same_formats, TYPE_BOOL, CV_FC_SAME_FORMATS}, {&c->norm, TYPE_BOOL, CV_FC_NORM}, {&c->input_float, TYPE_BOOL, CV_FC_INPUT_FLOAT}, {&c->output, TYPE_UINT, CV_FC_OUTPUT},
        {&c->bias, TYPE_BOOL, CV_FC_BIAS}, {&c->rows, TYPE_BOOL, CV_FC_ROWS}, {&c->swiglu, TYPE_BOOL, CV_FC_SWIGLU}, {&c->experts, TYPE_UINT, CV_FC_EXPERTS}, {&c->layer, TYPE_UINT, CV_FC_LAYER},
    };
    id values = cv_metal_new(d, "MTLFunctionConstantValues");
    for (NSUInteger i = 0; values && i < 16; i++) CV_SEND(&d->objc, void, values, set_constant, (const void *, NSUInteger, NSUInteger), &c->formats[i], TYPE_UINT, i);
    for (size_t i = 0; values && i < sizeof others / sizeof others[0]; i++) CV_SEND(&d->objc, void, values, set_constant, (const void *, NSUInteger, NSUInteger), others[i].value, others[i].type, others[i].index);
    return values;
}

static void make_pipeline(cv_metal_device *d, cv_metal_pipeline *p) {
    id lib = library(d, p->name), error = NULL;
    if (!lib) {
        cv_metal_refuse(d, CV_E_UNSUPPORTED, "no such kernel family");
        return;
    }
    id values = constant_values(d, &p->constants);
    id function = CV_SEND(&d->objc, id, lib, new_function, (id, id, id *), cv_metal_string(d, p->name), values, &error);
    if (!function) cv_metal_fail(d, CV_E_UNSUPPORTED, p->name, error);
    else {
        p->pipeline = cv_metal_archived_pipeline(d, function);
        if (!p->pipeline) {
            p->pipeline = CV_SEND(&d->objc, id, d->device, new_pipeline, (id, id *), function, &error);
            if (p->pipeline) cv_metal_archive_add(d, function);
        }
        if (!p->pipeline) cv_metal_fail(d, CV_E_UNSUPPORTED, p->name, error);
        else p->max_threads = CV_SEND0(&d->objc, NSUInteger, p->pipeline, max_threads);
    }
    cv_metal_release(d, function);
    cv_metal_release(d, values);
}

/* The named members: what follows them in memory is not defined. */
static const size_t CONSTANT_BYTES = offsetof(cv_metal_constants, swiglu) + sizeof(bool);

static size_t hash(const char *name, const cv_metal_constants *c) {
    uint64_t h = 1469598103934665603u;
    for (; *name; name++) h = (h ^ (unsigned char)*name) * 1099511628211u;
    for (size_t i = 0; i < CONSTANT_BYTES; i++) h = (h ^ ((const unsigned char *)c)[i]) * 1099511628211u;
    return (size_t)(h % CV_METAL_PIPELINES);
}

void cv_metal_use(cv_metal_device *d, const char *kernel, const cv_metal_constants *constants) {
    if (d->code) return;
    size_t at = hash(kernel, constants);
    for (size_t i = 0; i < CV_METAL_PIPELINES; i++, at = (at + 1) % CV_METAL_PIPELINES) {
        cv_metal_pipeline *p = &d->pipelines[at];
        if (!p->pipeline) {
            snprintf(p->name, sizeof p->name, "%s", kernel);
            p->constants = *constants;
            make_pipeline(d, p);
        } else if (strcmp(p->name, kernel) || memcmp(&p->constants, constants, CONSTANT_BYTES)) continue;
        d->current = p;
        if (!d->code) CV_SEND(&d->objc, void, d->encoder, set_pipeline, (id), p->pipeline);
        return;
    }
    cv_metal_refuse(d, CV_E_UNSUPPORTED, "the model needs more kernel variants than the table has");
}
