/* archive_test.c — compiled pipelines on disk: the second start compiles nothing; damaged, cut, foreign and old files are made again; what
 * cannot be written or does not exist on a system harms nothing; processes that save at the same moment leave one file. The fake runtime ends
 * the process where it is given a wrong file. */
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../../../native/backend/metal/device.h"
#include "../../../native/backend/metal/kernels/params.h"
#include "../../../native/test/check.h"

enum { N = 64, PATH = 1024 };

static uint64_t (*count)(const char *);
static char folder[PATH];

/* What a start does: steps with kernels in `variants` variants from `first` on; then, where there is one, waits for the end of a pipe. */
typedef struct {
    unsigned steps;
    int first, variants, wait_for;
} work;

/* False when something failed. compiled, found: pipelines. */
static bool start(cv_checks *c, work w, uint64_t *compiled, uint64_t *found) {
    char text[512] = "";
    cv_metal_device *d;
    void *memory = NULL;
    uint64_t before[2] = {count("pipelines"), count("archive_hits")};
    int code = cv_metal_device_open(&d, (cv_err){text, sizeof text});
    if (!code) code = cv_metal_alloc(d, 4096, &memory, (cv_err){text, sizeof text});
    float *x = memory;
    const cv_norm_params params = {.n = 1, .hidden = N, .eps = 1};
    const size_t groups[3] = {1, 1, 1};
    for (unsigned step = 0; !code && step < w.steps; step++) {
        size_t joined;
        cv_metal_begin(d);
        for (int variant = w.first; variant < w.first + w.variants; variant++) {
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
    char byte;
    if (w.wait_for >= 0 && read(w.wait_for, &byte, 1) < 0) code = 1;
    cv_metal_device_close(d);
    return !code;
}

static void expect(cv_checks *c, const char *when, uint64_t compiled, uint64_t found) {
    uint64_t was_compiled = 0, was_found = 0;
    start(c, (work){1, 0, 2, -1}, &was_compiled, &was_found);
    cv_check(c, was_compiled == compiled && was_found == found, "%s: %llu compiled, %llu found", when, (unsigned long long)was_compiled, (unsigned long long)was_found);
}

/* Files in the folder, but for its lock and what makes looking through it slow; the last one's path. */
static int files(char path[PATH]) {
    int n = 0;
    DIR *d = opendir(folder);
    for (struct dirent *e; d && (e = readdir(d));) {
        if (*e->d_name == '.' || !strcmp(e->d_name, "lock") || !strncmp(e->d_name, "slow-", 5)) continue;
        n++;
        snprintf(path, PATH, "%.700s/%.300s", folder, e->d_name);
    }
    if (d) closedir(d);
    return n;
}

static void empty(void) {
    char path[PATH];
    while (files(path) && !unlink(path)) continue;
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
    setenv("CARAVAN_METAL_CACHE", "", 1);
    expect(c, "with an empty name", 2, 0);
    setenv("CARAVAN_METAL_CACHE", saved, 1);
}

/* Where nothing is said it is the folder for what can be made again: of the program, of XDG, of the user. */
static void default_folder(cv_checks *c) {
    static const char *const variables[] = {"CARAVAN_CACHE_DIR", "XDG_CACHE_HOME", "HOME"};
    char saved[PATH], path[PATH], *home = getenv("HOME");
    home = home ? strdup(home) : NULL;
    snprintf(saved, sizeof saved, "%s", folder);
    unsetenv("CARAVAN_METAL_CACHE");
    unsetenv("CARAVAN_CACHE_DIR");
    unsetenv("XDG_CACHE_HOME");
    for (int i = 2; i >= 0; i--) { /* each takes precedence over those before */
        char place[PATH];
        snprintf(place, sizeof place, "%.900s-%d", saved, i);
        setenv(variables[i], place, 1);
        snprintf(folder, sizeof folder, "%.900s%s", place, i == 0 ? "/metal" : i == 1 ? "/caravan/metal" : "/.cache/caravan/metal");
        expect(c, variables[i], 2, 0);
        cv_check(c, files(path) == 1, "%s: %d files in %s", variables[i], files(path), folder);
        expect(c, "again", 0, 2);
        empty();
    }
    setenv("CARAVAN_CACHE_DIR", "~/here", 1);
    snprintf(folder, sizeof folder, "%.900s-2/here/metal", saved);
    expect(c, "below the home", 2, 0);
    cv_check(c, files(path) == 1, "%d files in %s", files(path), folder);
    for (int i = 0; i < 2; i++) unsetenv(variables[i]);
    if (home) setenv("HOME", home, 1);
    free(home);
    snprintf(folder, sizeof folder, "%s", saved);
    setenv("CARAVAN_METAL_CACHE", folder, 1);
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

enum { RANKS = 4, ROUNDS = 6, SLOW = 2000 };

/* Many files to look at between putting one in place and deleting others: what two processes do to each other then is seen. */
static void fill_folder(bool there) {
    char path[PATH];
    for (int i = 0; i < SLOW; i++) {
        snprintf(path, sizeof path, "%.900s/slow-%d.part", folder, i);
        int fd = there ? open(path, O_WRONLY | O_CREAT, 0600) : -1;
        if (fd >= 0) close(fd);
        else unlink(path);
    }
}

/* Ranks that start together, use kernels of their own and one of the others', and end at the same moment. */
static void together(cv_checks *c, uint64_t compiled[RANKS]) {
    int gate[2], answers[2];
    pid_t ranks[RANKS];
    if (!cv_check(c, !pipe(gate) && !pipe(answers), "no pipes")) return;
    for (int i = 0; i < RANKS; i++) {
        ranks[i] = fork();
        if (ranks[i]) continue;
        cv_checks own = {0};
        uint64_t counts[3] = {(uint64_t)i, 0, 0};
        close(gate[1]);
        bool well = start(&own, (work){1, i, 2, gate[0]}, &counts[1], &counts[2]) && write(answers[1], counts, sizeof counts) == sizeof counts;
        _exit(well && counts[1] + counts[2] == 2 ? 0 : 1);
    }
    close(gate[0]);
    nanosleep(&(struct timespec){0, 300 * 1000 * 1000}, NULL); /* most are at the gate then; those that are not end a little later */
    close(gate[1]);
    for (int i = 0; i < RANKS; i++) {
        int status = -1;
        cv_check(c, waitpid(ranks[i], &status, 0) == ranks[i] && WIFEXITED(status) && !WEXITSTATUS(status), "rank %d ended with %d", i, status);
        uint64_t counts[3];
        if (read(answers[0], counts, sizeof counts) == sizeof counts) compiled[counts[0]] = counts[1];
    }
    close(answers[0]);
    close(answers[1]);
}

static void several_processes(cv_checks *c) {
    char path[PATH];
    uint64_t left = 1;
    empty();
    fill_folder(true);
    for (int round = 0; round < ROUNDS; round++) {
        uint64_t compiled[RANKS] = {0};
        together(c, compiled);
        cv_check(c, files(path) == 1, "%d files after round %d", files(path), round);
        left = 0;
        for (int i = 0; i < RANKS; i++) left += compiled[i];
        cv_check(c, round || left == 2 * RANKS, "%llu compiled at the first start", (unsigned long long)left);
    }
    fill_folder(false);
    /* Each start adds at least what the last writer lacked. */
    cv_check(c, left == 0, "after %d starts %llu pipelines are still compiled", ROUNDS, (unsigned long long)left);
}

/* A process that keeps the folder's lock for good: others compile, and leave its files alone. */
static void locked(cv_checks *c) {
    char path[PATH], lock_path[PATH];
    empty();
    expect(c, "first start", 2, 0);
    snprintf(lock_path, sizeof lock_path, "%.1000s/lock", folder);
    int ready[2];
    if (!cv_check(c, !pipe(ready), "no pipe")) return;
    pid_t holder = fork();
    if (!holder) {
        int fd = open(lock_path, O_RDWR);
        _exit(fd < 0 || flock(fd, LOCK_EX) || write(ready[1], "x", 1) != 1 || pause() ? 1 : 0);
    }
    char byte;
    cv_check(c, read(ready[0], &byte, 1) == 1, "no lock");
    expect(c, "while another has the lock", 2, 0);
    cv_check(c, files(path) == 1, "%d files", files(path));
    kill(holder, SIGKILL);
    waitpid(holder, NULL, 0);
    close(ready[0]);
    close(ready[1]);
    expect(c, "when that one has been killed", 0, 2);
}

static int remove_entry(const char *path, const struct stat *st, int kind, struct FTW *at) {
    (void)st, (void)kind, (void)at;
    return remove(path);
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
        {"without a name it is the user's folder for what can be made again", default_folder},
        {"a system without archives compiles", no_archives},
        {"of processes that save at the same moment one file stays, and none of them is disturbed", several_processes},
        {"a lock that another process keeps delays a start, and no more", locked},
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
    *strrchr(folder, '/') = 0;
    nftw(folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    return cv_report(&c);
}
