/* archive_test.c — compiled pipelines on disk: the second start compiles nothing; damaged, cut, foreign and old files are made again; what
 * cannot be written or does not exist on a system harms nothing. The fake runtime ends the process where it is given a wrong file. */
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../../../native/backend/metal/device.h"
#include "../../../native/backend/metal/kernels/params.h"
#include "../../../native/test/check.h"

enum { N = 64, PATH = 1024 };

static uint64_t (*count)(const char *);
static char folder[PATH];

/* A start with a step that uses two kernels, in two variants. False when something failed. compiled, found: pipelines. */
static bool start(cv_checks *c, unsigned steps, uint64_t *compiled, uint64_t *found) {
    char text[512] = "";
    cv_metal_device *d;
    void *memory = NULL;
    uint64_t before[2] = {count("pipelines"), count("archive_hits")};
    int code = cv_metal_device_open(&d, (cv_err){text, sizeof text});
    if (!code) code = cv_metal_alloc(d, 4096, &memory, (cv_err){text, sizeof text});
    float *x = memory;
    const cv_norm_params params = {.n = 1, .hidden = N, .eps = 1};
    const size_t groups[3] = {1, 1, 1};
    for (unsigned step = 0; !code && step < steps; step++) {
        size_t joined;
        cv_metal_begin(d);
        for (int variant = 0; variant < 2; variant++) {
            cv_metal_constants constants;
            memset(&constants, 0, sizeof constants);
            constants.layer = (uint32_t)variant;
            cv_metal_use(d, "rms_norm_f32", &constants);
            for (unsigned i = 0; i < 4; i++) cv_metal_bind(d, i, x + N * i, N * sizeof(float));
            cv_metal_bytes(d, 4, &params, sizeof params);
            cv_metal_dispatch(d, groups, 32, 0);
        }
        code = cv_metal_finish(d, &joined, (cv_err){text, sizeof text});
    }
    cv_check(c, !code, "%d %s", code, text);
    *compiled = count("pipelines") - before[0];
    *found = count("archive_hits") - before[1];
    cv_metal_device_close(d);
    return !code;
}

static void expect(cv_checks *c, const char *when, uint64_t compiled, uint64_t found) {
    uint64_t was_compiled = 0, was_found = 0;
    start(c, 1, &was_compiled, &was_found);
    cv_check(c, was_compiled == compiled && was_found == found, "%s: %llu compiled, %llu found", when, (unsigned long long)was_compiled, (unsigned long long)was_found);
}

/* Files in the folder; the last one's path. */
static int files(char path[PATH]) {
    int n = 0;
    DIR *d = opendir(folder);
    for (struct dirent *e; d && (e = readdir(d));) {
        if (*e->d_name == '.') continue;
        n++;
        snprintf(path, PATH, "%.700s/%.300s", folder, e->d_name);
    }
    if (d) closedir(d);
    return n;
}

static void empty(void) {
    char path[PATH];
    while (files(path)) unlink(path);
}

static void again(cv_checks *c) {
    char path[PATH];
    empty();
    expect(c, "first start", 2, 0);
    cv_check(c, files(path) == 1, "%d files", files(path));
    expect(c, "second start", 0, 2);
    expect(c, "third start", 0, 2);
    cv_check(c, files(path) == 1, "%d files", files(path));
}

static void damaged(cv_checks *c) {
    for (int kind = 0; kind < 4; kind++) {
        char path[PATH], other[PATH];
        struct stat st;
        empty();
        expect(c, "first start", 2, 0);
        if (!cv_check(c, files(path) == 1 && !stat(path, &st), "no file")) return;
        if (kind == 0) cv_check(c, !truncate(path, st.st_size - 3), "truncate");
        if (kind == 1) cv_check(c, !truncate(path, 0), "truncate");
        if (kind == 2) { /* another file's contents */
            FILE *f = fopen(path, "w");
            fputs("#!/bin/sh\n", f);
            fclose(f);
        }
        if (kind == 3) { /* a byte differs */
            int f = open(path, O_RDWR);
            cv_check(c, pwrite(f, "X", 1, st.st_size / 2) == 1, "write");
            close(f);
        }
        expect(c, "with the damaged file", 2, 0);
        cv_check(c, files(other) == 1, "%d files", files(other));
        expect(c, "after it", 0, 2);
    }
}

static void other_system(cv_checks *c) {
    char path[PATH];
    empty();
    expect(c, "first start", 2, 0);
    setenv("FAKEMETAL_BUILD", "25A354", 1);
    expect(c, "after an update of the system", 2, 0);
    expect(c, "again", 0, 2);
    cv_check(c, files(path) == 1, "%d files", files(path));
    unsetenv("FAKEMETAL_BUILD");
    expect(c, "back on the old one", 2, 0);
}

/* A file of the right name that Metal itself would refuse cannot be made without its hash; one of another key can be renamed. */
static void renamed(cv_checks *c) {
    char path[PATH], other[PATH];
    empty();
    setenv("FAKEMETAL_BUILD", "25A354", 1);
    expect(c, "on another system", 2, 0);
    unsetenv("FAKEMETAL_BUILD");
    files(path);
    empty();
    expect(c, "here", 2, 0);
    files(other);
    /* the other system's contents under this one's key */
    char name[PATH];
    snprintf(name, sizeof name, "%s", other);
    memcpy(strrchr(name, '/') + 1 + 17, strrchr(path, '/') + 1 + 17, 16);
    cv_check(c, !rename(other, name), "rename");
    expect(c, "with a foreign file", 2, 0);
}

static void cannot_write(cv_checks *c) {
    char path[PATH], saved[PATH];
    empty();
    setenv("FAKEMETAL_DISK_FULL", "1", 1);
    expect(c, "on a full disk", 2, 0);
    cv_check(c, files(path) == 0, "%d files", files(path));
    unsetenv("FAKEMETAL_DISK_FULL");
    snprintf(saved, sizeof saved, "%s", folder);
    setenv("CARAVAN_METAL_CACHE", "/proc/none/metal", 1);
    expect(c, "where no folder can be made", 2, 0);
    setenv("CARAVAN_METAL_CACHE", "relative", 1);
    expect(c, "with a relative folder", 2, 0);
    unsetenv("CARAVAN_METAL_CACHE");
    expect(c, "without a folder", 2, 0);
    setenv("CARAVAN_METAL_CACHE", saved, 1);
}

static void no_archives(cv_checks *c) {
    empty();
    setenv("FAKEMETAL_NO_ARCHIVES", "1", 1);
    expect(c, "on a system without archives", 2, 0);
    unsetenv("FAKEMETAL_NO_ARCHIVES");
}

/* A process that is killed has saved what it compiled when steps had stopped adding to it. */
static void saved_before_the_end(cv_checks *c) {
    char path[PATH], text[512] = "";
    cv_metal_device *d;
    void *memory = NULL;
    empty();
    int code = cv_metal_device_open(&d, (cv_err){text, sizeof text});
    if (!code) code = cv_metal_alloc(d, 4096, &memory, (cv_err){text, sizeof text});
    if (!cv_check(c, !code, "%s", text)) return;
    float *x = memory;
    const cv_norm_params params = {.n = 1, .hidden = N, .eps = 1};
    const size_t groups[3] = {1, 1, 1};
    cv_metal_constants none;
    memset(&none, 0, sizeof none);
    for (int step = 0; step < 20 && !code; step++) {
        size_t joined;
        cv_metal_begin(d);
        cv_metal_use(d, "rms_norm_f32", &none);
        for (unsigned i = 0; i < 4; i++) cv_metal_bind(d, i, x + N * i, N * sizeof(float));
        cv_metal_bytes(d, 4, &params, sizeof params);
        cv_metal_dispatch(d, groups, 32, 0);
        code = cv_metal_finish(d, &joined, (cv_err){text, sizeof text});
        if (step == 3) cv_check(c, files(path) == 0, "%d files after 4 steps", files(path));
    }
    cv_check(c, !code && files(path) == 1, "%d %s, %d files after 20 steps", code, text, files(path));
    cv_metal_device_close(d);
}

int main(void) {
    static const struct {
        const char *name;
        void (*run)(cv_checks *);
    } cases[] = {
        {"the second start compiles nothing", again},
        {"a file that is cut off, empty, foreign or damaged is made again", damaged},
        {"an archive of another build of the system is not opened", other_system},
        {"nor one that was renamed", renamed},
        {"a full disk or a folder that cannot be made harms nothing", cannot_write},
        {"a system without archives compiles", no_archives},
        {"what was compiled is saved while the process runs", saved_before_the_end},
    };
    const char *library = getenv("CARAVAN_METAL_LIBRARY");
    void *fake = library ? dlopen(library, RTLD_NOW) : NULL;
    if (fake) *(void **)&count = dlsym(fake, "fakemetal_count");
    snprintf(folder, sizeof folder, "/tmp/caravan-archive-test-%ld/metal", (long)getpid());
    if (!count) {
        fprintf(stderr, "CARAVAN_METAL_LIBRARY must name the fake runtime\n");
        return 3;
    }
    setenv("CARAVAN_METAL_CACHE", folder, 1);
    cv_checks c = {0};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        cv_case(&c, cases[i].name);
        cases[i].run(&c);
        cv_end_case(&c);
    }
    empty();
    rmdir(folder);
    *strrchr(folder, '/') = 0;
    rmdir(folder);
    return cv_report(&c);
}
