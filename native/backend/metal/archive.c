/* archive.c — compiled pipelines on disk (MTLBinaryArchive), so that only the first start of a version compiles them.
 *
 * One file in the folder that CARAVAN_METAL_CACHE names: KEY-CONTENTS.pipelines. KEY stands for the system's build, the GPU and the kernels'
 * text, CONTENTS for the file's own bytes: what is damaged, cut off or of another system has another name than it should, is deleted unread and
 * made again. Files are written beside and renamed. Who looks for the file or puts one in its place holds the folder's lock, so that of several
 * processes one at a time does, and whoever is last leaves exactly one. Nothing here ends a start or a step: whatever does not work, kernels
 * are compiled. */
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "device_state.h"

/* Steps without a new pipeline before the archive is saved; saves of a process; how long another process is waited for. */
enum { SETTLED_STEPS = 16, MOST_SAVES = 8, PATH = 1024, KEY_DIGITS = 16, PART_SECONDS = 3600, LOCK_TRIES = 200, LOCK_PAUSE_NS = 10 * 1000 * 1000 };
static const char suffix[] = ".pipelines", part[] = ".part";
static const uint64_t FIRST_HASH = 1469598103934665603u;

static uint64_t hash(uint64_t h, const void *p, size_t n) {
    for (size_t i = 0; i < n; i++) h = (h ^ ((const unsigned char *)p)[i]) * 1099511628211u;
    return h;
}

/* Of a whole file; false when it cannot be read. */
static bool hash_file(const char *path, uint64_t *out) {
    FILE *f = fopen(path, "rb");
    if (!f) return false;
    unsigned char block[16384];
    size_t n;
    *out = FIRST_HASH;
    while ((n = fread(block, 1, sizeof block, f)) > 0) *out = hash(*out, block, n);
    bool whole = !ferror(f);
    fclose(f);
    return whole;
}

/* 0: no key, because the system does not say its build. */
static uint64_t key_of(cv_metal_device *d) {
    char build[64];
    cv_objc_setting(&d->objc, "kern.osversion", build, sizeof build);
    if (!*build) return 0;
    id name = CV_SEND0(&d->objc, id, d->device, name);
    const char *gpu = name ? CV_SEND0(&d->objc, const char *, name, utf8) : "";
    uint64_t h = hash(hash(FIRST_HASH, build, strlen(build) + 1), gpu, strlen(gpu) + 1);
    for (int i = 0; i < CV_METAL_FAMILIES; i++) {
        char *text = cv_metal_source(&(cv_metal_part){i, 0, 0});
        if (!text) return 0;
        h = hash(h, text, strlen(text) + 1);
        free(text);
    }
    return h ? h : 1;
}

static void path_of(const cv_metal_archive *a, uint64_t contents, char out[PATH]) {
    snprintf(out, PATH, "%s/%016llx-%016llx%s", a->folder, (unsigned long long)a->key, (unsigned long long)contents, suffix);
}

/* Whether a file's name is of the form that is written here. */
static bool is_ours(const char *name, uint64_t *key, uint64_t *contents) {
    char *end;
    if (strlen(name) != 2 * KEY_DIGITS + 1 + sizeof suffix - 1 || name[KEY_DIGITS] != '-' || strcmp(name + 2 * KEY_DIGITS + 1, suffix)) return false;
    *key = strtoull(name, &end, 16);
    if (end != name + KEY_DIGITS) return false;
    *contents = strtoull(name + KEY_DIGITS + 1, &end, 16);
    return end == name + 2 * KEY_DIGITS + 1;
}

/* Whether a process that is gone left it half written. */
static bool is_left_over(const char *path) {
    struct stat st;
    size_t n = strlen(path);
    return n >= sizeof part && !strcmp(path + n - (sizeof part - 1), part) && !stat(path, &st) && time(NULL) - st.st_mtime > PART_SECONDS;
}

/* The file of this key whose contents are right, into out. Others of the form are deleted, `except` that one. */
static bool find(const cv_metal_archive *a, uint64_t except, char out[PATH]) {
    bool found = false;
    DIR *folder = opendir(a->folder);
    if (!folder) return false;
    for (struct dirent *e; (e = readdir(folder));) {
        uint64_t key, contents, real;
        char path[PATH];
        if (snprintf(path, sizeof path, "%s/%s", a->folder, e->d_name) >= (int)sizeof path) continue;
        if (is_left_over(path)) unlink(path);
        if (!is_ours(e->d_name, &key, &contents)) continue;
        bool wanted = key == a->key && (except ? contents == except : !found && hash_file(path, &real) && real == contents);
        if (!wanted) unlink(path);
        else memcpy(out, path, sizeof path);
        found = found || wanted;
    }
    closedir(folder);
    return found;
}

static id url_of(cv_metal_device *d, const char *path) { return CV_SEND(&d->objc, id, d->objc.get_class("NSURL"), file_url, (id), cv_metal_string(d, path)); }

/* path: NULL for an empty one. */
static id open_archive(cv_metal_device *d, const char *path) {
    id descriptor = cv_metal_new(d, "MTLBinaryArchiveDescriptor"), error = NULL;
    if (!descriptor) return NULL;
    if (path) CV_SEND(&d->objc, void, descriptor, set_url, (id), url_of(d, path));
    id archive = CV_SEND(&d->objc, id, d->device, new_archive, (id, id *), descriptor, &error);
    cv_metal_release(d, descriptor);
    return archive;
}

/* The folder's lock, for unlock; -1 when another process keeps it too long. The system drops it when a process ends. */
static int lock(const cv_metal_archive *a) {
    const struct timespec pause = {0, LOCK_PAUSE_NS};
    char path[PATH];
    snprintf(path, sizeof path, "%s/lock", a->folder);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    for (int i = 0; fd >= 0 && flock(fd, LOCK_EX | LOCK_NB); i++) {
        if (i < LOCK_TRIES) {
            nanosleep(&pause, NULL);
            continue;
        }
        close(fd);
        fd = -1;
    }
    return fd;
}

static void unlock(int fd) {
    if (fd >= 0) close(fd);
}

/* Where compiled kernels are kept: CARAVAN_METAL_CACHE as it is set, empty for nowhere; else the folder of src/paths.ts. */
static bool choose_folder(char out[CV_METAL_FOLDER]) {
    static const struct {
        const char *variable, *below;
    } places[] = {
        {"CARAVAN_METAL_CACHE", ""},
        {"CARAVAN_CACHE_DIR", "/metal"},
        {"XDG_CACHE_HOME", "/caravan/metal"},
#if defined(__APPLE__)
        {"HOME", "/Library/Caches/caravan/metal"},
#else
        {"HOME", "/.cache/caravan/metal"},
#endif
    };
    const char *home = getenv("HOME");
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        const char *value = getenv(places[i].variable);
        bool in_home = value && home && !strncmp(value, "~/", 2);
        if (!value || (i && *value != '/' && !in_home)) continue;
        return (*value == '/' || in_home) && snprintf(out, CV_METAL_FOLDER, "%s%s%s", in_home ? home : "", in_home ? value + 1 : value, places[i].below) < CV_METAL_FOLDER;
    }
    return false;
}

/* With its parents. */
static bool make_folder(const char *folder) {
    char path[PATH];
    snprintf(path, sizeof path, "%s", folder);
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(path, 0700);
        *slash = '/';
    }
    mkdir(path, 0700);
    return access(folder, W_OK | X_OK) == 0;
}

/* Looks for the archive once, when the first pipeline is made. */
static bool look_for_archive(cv_metal_device *d) {
    cv_metal_archive *a = &d->archive;
    if (a->looked_for) return a->archive != NULL;
    a->looked_for = true;
    if (!choose_folder(a->folder) || !d->objc.get_class("NSURL") || !d->objc.get_class("NSArray")) return false;
    if (!CV_SEND(&d->objc, bool, d->device, responds, (SEL), d->objc.sel.new_archive) || !CV_SEND(&d->objc, bool, d->device, responds, (SEL), d->objc.sel.new_pipeline_of)) return false;
    a->key = key_of(d);
    if (!a->key || !make_folder(a->folder)) return false;
    char path[PATH];
    int held = lock(a);
    if (held >= 0 && find(a, 0, path)) {
        a->archive = open_archive(d, path);
        if (!a->archive) unlink(path);
    }
    unlock(held);
    if (!a->archive) a->archive = open_archive(d, NULL);
    return a->archive != NULL;
}

/* The caller's; NULL without memory. */
static id describe(cv_metal_device *d, id function) {
    id descriptor = cv_metal_new(d, "MTLComputePipelineDescriptor");
    if (descriptor) CV_SEND(&d->objc, void, descriptor, set_function, (id), function);
    return descriptor;
}

id cv_metal_archived_pipeline(cv_metal_device *d, id function) {
    enum { FAIL_ON_MISS = 4 }; /* MTLPipelineOptionFailOnBinaryArchiveMiss */
    id error = NULL, descriptor = look_for_archive(d) ? describe(d, function) : NULL;
    if (!descriptor) return NULL;
    CV_SEND(&d->objc, void, descriptor, set_archives, (id), CV_SEND(&d->objc, id, d->objc.get_class("NSArray"), array_of, (id), d->archive.archive));
    id pipeline = CV_SEND(&d->objc, id, d->device, new_pipeline_of, (id, NSUInteger, void *, id *), descriptor, (NSUInteger)FAIL_ON_MISS, NULL, &error);
    cv_metal_release(d, descriptor);
    return pipeline;
}

void cv_metal_archive_add(cv_metal_device *d, id function) {
    cv_metal_archive *a = &d->archive;
    id error = NULL, descriptor = a->archive ? describe(d, function) : NULL;
    if (!descriptor) return;
    if (CV_SEND(&d->objc, bool, a->archive, add_functions, (id, id *), descriptor, &error)) a->changed = true;
    a->unchanged_steps = 0;
    cv_metal_release(d, descriptor);
}

/* Beside, then renamed: a reader sees a whole file or none. What another process has saved meanwhile goes: it has at the next start what this
 * one compiled, and adds what it lacks. */
static void save(cv_metal_device *d) {
    cv_metal_archive *a = &d->archive;
    char beside[PATH], path[PATH];
    uint64_t contents;
    id error = NULL;
    snprintf(beside, sizeof beside, "%s/%ld-%p%s", a->folder, (long)getpid(), (void *)d, part);
    a->changed = false;
    a->saves++;
    bool written = CV_SEND(&d->objc, bool, a->archive, serialize, (id, id *), url_of(d, beside), &error) && hash_file(beside, &contents);
    int held = written ? lock(a) : -1;
    if (held >= 0) path_of(a, contents, path);
    if (held < 0 || rename(beside, path)) unlink(beside);
    else find(a, contents, path); /* and deletes what it takes the place of */
    if (written && held < 0) { /* another time */
        a->changed = true;
        a->unchanged_steps = 0;
    }
    unlock(held);
}

void cv_metal_archive_step(cv_metal_device *d) {
    cv_metal_archive *a = &d->archive;
    if (a->changed && ++a->unchanged_steps >= SETTLED_STEPS && a->saves < MOST_SAVES) save(d);
}

void cv_metal_archive_close(cv_metal_device *d) {
    if (d->archive.archive && d->archive.changed) save(d);
    cv_metal_release(d, d->archive.archive);
}
