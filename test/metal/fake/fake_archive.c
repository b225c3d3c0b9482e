/* fake_archive.c — MTLBinaryArchive and what it needs: pipelines remembered in a file, for the system that wrote it. A file is text: a first line,
 * the system's build, a pipeline a line, a last line. A host must not give Metal a file that is damaged or of another system: Apple does not
 * say what happens then, so here it ends the process.
 *
 * Members of `object` by class:
 *   NSURL                        memory: path
 *   NSArray                      first: its one object
 *   MTLBinaryArchiveDescriptor   first: NSURL or NULL
 *   MTLBinaryArchive             extra: archive_state
 *   MTLComputePipelineDescriptor first: function; second: NSArray or NULL */
#define _GNU_SOURCE
#include "fake_archive.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LINE = 512, MOST = 1024 };
static const char first_line[] = "fake archive\n", last_line[] = "end\n";

typedef struct {
    int n;
    char *all[MOST];
} archive_state;

#define UNUSED(x) (void)(x)

static object *url_with_path(fake_class *c, SEL s, object *path) {
    UNUSED(c), UNUSED(s);
    if (!path) fake_misuse("fileURLWithPath: nil");
    object *o = fake_new("NSURL");
    o->memory = strdup(path->memory);
    return fake_autorelease(o);
}
static object *array_with_object(fake_class *c, SEL s, object *one) {
    UNUSED(c), UNUSED(s);
    if (!one) fake_misuse("arrayWithObject: nil");
    object *o = fake_new("NSArray");
    o->first = fake_retain(one);
    return fake_autorelease(o);
}
static void set_first(object *o, SEL s, object *value) {
    UNUSED(s);
    fake_release(o->first);
    o->first = fake_retain(value);
}
static void set_second(object *o, SEL s, object *value) {
    UNUSED(s);
    fake_release(o->second);
    o->second = fake_retain(value);
}

/* What tells a pipeline from others: its kernel and its constants. */
static void line_of(const object *descriptor, char out[LINE]) {
    const object *f = descriptor->first;
    if (!f) fake_misuse("a pipeline descriptor without a function");
    const fake_constants *c = f->extra;
    size_t at = (size_t)snprintf(out, LINE, "%s", (const char *)f->memory);
    for (int i = 0; c && i < c->n && at + 16 < LINE; i++) {
        unsigned value = 0;
        memcpy(&value, c->all[i].value, c->all[i].size);
        at += (size_t)snprintf(out + at, LINE - at, " %d=%x", c->all[i].index, value);
    }
    snprintf(out + at, LINE - at, "\n");
}

static bool contains(const archive_state *a, const char *line) {
    for (int i = 0; i < a->n; i++)
        if (!strcmp(a->all[i], line)) return true;
    return false;
}

static void add_line(archive_state *a, const char *line) {
    if (contains(a, line)) return;
    if (a->n == MOST) fake_misuse("an archive has more than %d pipelines", MOST);
    a->all[a->n++] = strdup(line);
}

static void read_archive(archive_state *a, const char *path) {
    FILE *f = fopen(path, "r");
    char line[LINE], build[LINE];
    if (!f) fake_misuse("newBinaryArchiveWithDescriptor: there is no %s", path);
    bool whole = fgets(line, sizeof line, f) && !strcmp(line, first_line) && fgets(line, sizeof line, f), ended = false;
    snprintf(build, sizeof build, "%s\n", fake_build());
    if (!whole) fake_misuse("newBinaryArchiveWithDescriptor: %s is damaged", path);
    if (strcmp(line, build)) fake_misuse("newBinaryArchiveWithDescriptor: %s was made under another system", path);
    while (!ended && fgets(line, sizeof line, f)) {
        ended = !strcmp(line, last_line);
        if (!ended) add_line(a, line);
    }
    fclose(f);
    if (!ended) fake_misuse("newBinaryArchiveWithDescriptor: %s is damaged", path);
}

static object *device_archive(object *o, SEL s, object *descriptor, object **e) {
    UNUSED(o), UNUSED(s), UNUSED(e);
    if (!descriptor) fake_misuse("newBinaryArchiveWithDescriptor: descriptor must not be nil");
    object *r = fake_new("MTLBinaryArchive");
    archive_state *a = calloc(1, sizeof *a);
    r->extra = a;
    if (!descriptor->first) return r;
    read_archive(a, descriptor->first->memory);
    __atomic_add_fetch(&fake_count.archives_opened, 1, __ATOMIC_SEQ_CST);
    return r;
}

static bool archive_add(object *o, SEL s, object *descriptor, object **e) {
    char line[LINE];
    UNUSED(s), UNUSED(e);
    line_of(descriptor, line);
    add_line(o->extra, line);
    return true;
}

static bool archive_serialize(object *o, SEL s, object *url, object **e) {
    UNUSED(s);
    const archive_state *a = o->extra;
    FILE *f = url && !getenv("FAKEMETAL_DISK_FULL") ? fopen(url->memory, "w") : NULL;
    if (!f) {
        if (e) *e = fake_autorelease(fake_error("the archive cannot be written"));
        return false;
    }
    fprintf(f, "%s%s\n", first_line, fake_build());
    for (int i = 0; i < a->n; i++) fputs(a->all[i], f);
    fputs(last_line, f);
    return !fclose(f);
}

/* Options: 4 = fail when no archive has the pipeline. */
static object *device_pipeline_described(object *o, SEL s, object *descriptor, unsigned long options, void *reflection, object **e) {
    char line[LINE];
    UNUSED(o), UNUSED(s), UNUSED(reflection);
    line_of(descriptor, line);
    const object *archives = descriptor->second;
    bool found = archives && contains(archives->first->extra, line);
    if (!found && options & 4) {
        if (e) *e = fake_autorelease(fake_error("no archive has the pipeline"));
        return NULL;
    }
    __atomic_add_fetch(found ? &fake_count.archive_hits : &fake_count.pipelines, 1, __ATOMIC_SEQ_CST);
    object *p = fake_new("MTLComputePipelineState");
    p->first = fake_retain(descriptor->first);
    return p;
}

bool fake_archive_dispose(object *o) {
    const char *c = o->isa->name;
    if (!strcmp(c, "NSArray") || !strcmp(c, "MTLBinaryArchiveDescriptor") || !strcmp(c, "MTLComputePipelineDescriptor")) {
        fake_release(o->first);
        fake_release(o->second);
        return true;
    }
    return false;
}

#define METHOD(c, s, f) {c, s, (void *)f}
const fake_method fake_archive_methods[] = {
    METHOD("+NSURL", "fileURLWithPath:", url_with_path),
    METHOD("+NSArray", "arrayWithObject:", array_with_object),
    METHOD("MTLDevice", "newBinaryArchiveWithDescriptor:error:", device_archive),
    METHOD("MTLDevice", "newComputePipelineStateWithDescriptor:options:reflection:error:", device_pipeline_described),
    METHOD("MTLBinaryArchiveDescriptor", "setUrl:", set_first),
    METHOD("MTLComputePipelineDescriptor", "setComputeFunction:", set_first),
    METHOD("MTLComputePipelineDescriptor", "setBinaryArchives:", set_second),
    METHOD("MTLBinaryArchive", "addComputePipelineFunctionsWithDescriptor:error:", archive_add),
    METHOD("MTLBinaryArchive", "serializeToURL:error:", archive_serialize),
    {NULL, NULL, NULL},
};
