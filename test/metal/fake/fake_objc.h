/* fake_objc.h — inside of the fake runtime: objects with counted references, classes, autorelease pools. Mistakes that crash a
 * Mac (or corrupt it silently) stop the process with a message. Objects are never freed, so that use after release is seen. */
#ifndef FAKE_OBJC_H
#define FAKE_OBJC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))
#define HIDDEN __attribute__((visibility("hidden")))

typedef const char *SEL;
typedef struct fake_class fake_class;
typedef struct object object;

struct fake_class {
    fake_class *isa; /* of a class: its meta class; of a meta class: NULL */
    const char *name;
    bool meta;
    int live; /* objects with references */
};

/* The meaning of the members differs by class: fake_metal.c says which. */
struct object {
    fake_class *isa;
    int references;
    void *memory;
    size_t size;
    object *first, *second;
    void *extra;
    int state;
};

typedef struct {
    const char *class_name; /* "+Name": a class method */
    const char *selector;
    void *function;
} fake_method;

/* The methods of all classes, ended by a NULL class_name. */
extern const fake_method fake_methods[] HIDDEN;
/* Classes that objc_getClass finds, ended by NULL. */
extern const char *const fake_known_classes[] HIDDEN;

/* Whether the macOS that is played has no such method. */
bool fake_lacks(const char *selector) HIDDEN;

_Noreturn void fake_misuse(const char *format, ...) __attribute__((format(printf, 1, 2))) HIDDEN;
object *fake_new(const char *class_name) HIDDEN; /* one reference, the caller's */
object *fake_retain(object *o) HIDDEN;
void fake_release(object *o) HIDDEN;
object *fake_autorelease(object *o) HIDDEN;
/* Called when the last reference goes. */
void fake_dispose(object *o) HIDDEN;
void fake_check_alive(const object *o, const char *doing) HIDDEN;

#endif
