/* fake_objc.c — a stand-in for libobjc: objc_msgSend looks a selector up in a table of C functions and jumps there. */
#define _GNU_SOURCE
#include "fake_archive.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_CLASSES = 64, POOL_SLOTS = 65536 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static fake_class classes[MOST_CLASSES], metas[MOST_CLASSES];
static int n_classes;

void fake_misuse(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("fake Metal: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    abort();
}

static fake_class *class_named(const char *name) {
    for (int i = 0; i < n_classes; i++)
        if (!strcmp(classes[i].name, name)) return &classes[i];
    if (n_classes == MOST_CLASSES) fake_misuse("too many classes");
    metas[n_classes] = (fake_class){.name = name, .meta = true};
    classes[n_classes] = (fake_class){.isa = &metas[n_classes], .name = name};
    return &classes[n_classes++];
}

object *fake_new(const char *class_name) {
    object *o = calloc(1, sizeof *o);
    if (!o) fake_misuse("no memory");
    pthread_mutex_lock(&lock);
    o->isa = class_named(class_name);
    o->references = 1;
    o->isa->live++;
    pthread_mutex_unlock(&lock);
    return o;
}

void fake_check_alive(const object *o, const char *doing) {
    if (o && __atomic_load_n(&o->references, __ATOMIC_RELAXED) <= 0) fake_misuse("%s a freed %s", doing, o->isa->name);
}

object *fake_retain(object *o) {
    if (!o) return o;
    pthread_mutex_lock(&lock);
    fake_check_alive(o, "retain of");
    __atomic_add_fetch(&o->references, 1, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&lock);
    return o;
}

void fake_release(object *o) {
    if (!o) return;
    pthread_mutex_lock(&lock);
    fake_check_alive(o, "release of");
    bool last = __atomic_sub_fetch(&o->references, 1, __ATOMIC_RELAXED) == 0;
    if (last) o->isa->live--;
    pthread_mutex_unlock(&lock);
    if (last) fake_dispose(o);
}

/* Objects of class_name that are alive. */
API int fakemetal_live(const char *class_name) {
    pthread_mutex_lock(&lock);
    int n = class_named(class_name)->live;
    pthread_mutex_unlock(&lock);
    return n;
}

/* ---- autorelease pools, one stack a thread ---- */

static _Thread_local object **pool;
static _Thread_local int pool_used, pools_open;

API void *objc_autoreleasePoolPush(void) {
    if (!pool) pool = calloc(POOL_SLOTS, sizeof *pool);
    pools_open++;
    return (void *)(intptr_t)(pool_used + 1);
}

API void objc_autoreleasePoolPop(void *token) {
    int keep = (int)(intptr_t)token - 1;
    if (pools_open-- <= 0 || keep < 0 || keep > pool_used) fake_misuse("an autorelease pool is popped that was not pushed");
    while (pool_used > keep) fake_release(pool[--pool_used]);
}

object *fake_autorelease(object *o) {
    if (!pools_open) fake_misuse("a %s is autoreleased without a pool: it would leak", o->isa->name);
    if (pool_used == POOL_SLOTS) fake_misuse("an autorelease pool holds %d objects", POOL_SLOTS);
    pool[pool_used++] = o;
    return o;
}

/* ---- messages ---- */

static object *method_alloc(fake_class *c, SEL s) {
    (void)s;
    return fake_new(c->name);
}
static object *method_init(object *o, SEL s) {
    (void)s;
    return o;
}
static object *method_retain(object *o, SEL s) {
    (void)s;
    return fake_retain(o);
}
static void method_release(object *o, SEL s) {
    (void)s;
    fake_release(o);
}
static object *method_autorelease(object *o, SEL s) {
    (void)s;
    return fake_autorelease(o);
}
static bool method_responds(object *o, SEL s, SEL asked) {
    (void)s;
    if (fake_lacks(asked)) return false;
    const fake_method *const tables[] = {fake_methods, fake_archive_methods};
    for (int t = 0; t < 2; t++)
        for (const fake_method *m = tables[t]; m->class_name; m++)
            if (!strcmp(m->class_name, o->isa->name) && !strcmp(m->selector, asked)) return true;
    return false;
}
static long method_of_nil(void) { return 0; }

/* A class object's isa is its meta class. */
__attribute__((used)) HIDDEN void *fake_lookup(object *self, SEL s) {
    if (!self) return (void *)method_of_nil;
    fake_class *c = self->isa;
    if (!c->meta && __atomic_load_n(&self->references, __ATOMIC_RELAXED) <= 0) fake_misuse("message %s to a freed %s", s, c->name);
    const fake_method *const tables[] = {fake_methods, fake_archive_methods};
    for (int t = 0; t < 2; t++)
        for (const fake_method *m = tables[t]; m->class_name && !fake_lacks(s); m++) {
            bool meta = *m->class_name == '+';
            if (meta == c->meta && !strcmp(m->class_name + meta, c->name) && !strcmp(m->selector, s)) return m->function;
        }
    if (c->meta && !strcmp(s, "alloc")) return (void *)method_alloc;
    if (!c->meta) {
        if (!strcmp(s, "init")) return (void *)method_init;
        if (!strcmp(s, "retain")) return (void *)method_retain;
        if (!strcmp(s, "release")) return (void *)method_release;
        if (!strcmp(s, "autorelease")) return (void *)method_autorelease;
        if (!strcmp(s, "respondsToSelector:")) return (void *)method_responds;
    }
    fake_misuse("unrecognized selector %c[%s %s]", c->meta ? '+' : '-', c->name, s);
}

/* Keeps every argument register, asks fake_lookup, jumps to the method with the stack as it was. */
#if defined(__x86_64__)
__asm__(".text\n.globl objc_msgSend\n.type objc_msgSend,@function\n"
        "objc_msgSend:\n push %rbp\n mov %rsp,%rbp\n sub $208,%rsp\n"
        " mov %rdi,-8(%rbp)\n mov %rsi,-16(%rbp)\n mov %rdx,-24(%rbp)\n mov %rcx,-32(%rbp)\n mov %r8,-40(%rbp)\n mov %r9,-48(%rbp)\n"
        " movups %xmm0,-64(%rbp)\n movups %xmm1,-80(%rbp)\n movups %xmm2,-96(%rbp)\n movups %xmm3,-112(%rbp)\n"
        " movups %xmm4,-128(%rbp)\n movups %xmm5,-144(%rbp)\n movups %xmm6,-160(%rbp)\n movups %xmm7,-176(%rbp)\n"
        " call fake_lookup\n mov %rax,%r11\n"
        " mov -8(%rbp),%rdi\n mov -16(%rbp),%rsi\n mov -24(%rbp),%rdx\n mov -32(%rbp),%rcx\n mov -40(%rbp),%r8\n mov -48(%rbp),%r9\n"
        " movups -64(%rbp),%xmm0\n movups -80(%rbp),%xmm1\n movups -96(%rbp),%xmm2\n movups -112(%rbp),%xmm3\n"
        " movups -128(%rbp),%xmm4\n movups -144(%rbp),%xmm5\n movups -160(%rbp),%xmm6\n movups -176(%rbp),%xmm7\n"
        " leave\n jmp *%r11\n");
#elif defined(__aarch64__)
__asm__(".text\n.globl objc_msgSend\n"
        "objc_msgSend:\n stp x29,x30,[sp,#-208]!\n mov x29,sp\n"
        " stp x0,x1,[sp,#16]\n stp x2,x3,[sp,#32]\n stp x4,x5,[sp,#48]\n stp x6,x7,[sp,#64]\n str x8,[sp,#80]\n stp q0,q1,[sp,#96]\n stp q2,q3,[sp,#128]\n"
        " bl fake_lookup\n mov x16,x0\n"
        " ldp x0,x1,[sp,#16]\n ldp x2,x3,[sp,#32]\n ldp x4,x5,[sp,#48]\n ldp x6,x7,[sp,#64]\n ldr x8,[sp,#80]\n ldp q0,q1,[sp,#96]\n ldp q2,q3,[sp,#128]\n"
        " ldp x29,x30,[sp],#208\n br x16\n");
#endif

API void *objc_getClass(const char *name) {
    for (int i = 0; fake_known_classes[i]; i++)
        if (!strcmp(fake_known_classes[i], name)) {
            pthread_mutex_lock(&lock);
            fake_class *c = class_named(fake_known_classes[i]);
            pthread_mutex_unlock(&lock);
            return c;
        }
    return NULL;
}

API SEL sel_registerName(const char *name) {
    static char *names[512];
    static int n;
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < n && strcmp(names[i], name)) i++;
    if (i == n && n < 512) names[n++] = strdup(name);
    SEL s = i < 512 ? names[i] : NULL;
    pthread_mutex_unlock(&lock);
    if (!s) fake_misuse("too many selectors");
    return s;
}
