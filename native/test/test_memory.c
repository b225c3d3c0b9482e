/* test_memory.c — a mapped file keeps its bytes when its pages are read anew as huge ones. Whether they become huge is the
 * system's affair (kernel, file system), so it is printed; what must hold on all is checked. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../engine/memory.h"
#include "check.h"

enum { FILE_BYTES = 40 << 20, PIECE = 4096 };

static uint8_t byte_at(size_t i) { return (uint8_t)(i / PIECE * 31 + i % 251); }

/* A file that was written a page at a time, as downloads are; -1 = could not. Its name is gone at once. */
static int written_file(void) {
    const char *folder = getenv("TMPDIR");
    char path[512];
    snprintf(path, sizeof path, "%s/caravan-memory-XXXXXX", folder ? folder : "/var/tmp");
    const int fd = mkstemp(path);
    if (fd < 0) return -1;
    unlink(path);
    uint8_t piece[PIECE];
    for (size_t at = 0; at < FILE_BYTES; at += PIECE) {
        for (size_t i = 0; i < PIECE; i++) piece[i] = byte_at(at + i);
        if (write(fd, piece, PIECE) != PIECE) {
            close(fd);
            return -1;
        }
    }
    return fsync(fd) ? (close(fd), -1) : fd;
}

static void same_bytes(cv_checks *c, const uint8_t *map, const char *when) {
    size_t wrong = 0;
    for (size_t i = 0; i < FILE_BYTES; i++) wrong += map[i] != byte_at(i);
    cv_check(c, wrong == 0, "%zu bytes differ %s", wrong, when);
}

int main(void) {
    cv_checks c = {0};
    cv_case(&c, "a mapped file has the same bytes after its pages were read anew");
    const int fd = written_file();
    uint8_t *map = fd < 0 ? MAP_FAILED : mmap(NULL, FILE_BYTES, PROT_READ, MAP_PRIVATE, fd, 0);
    if (cv_check(&c, map != MAP_FAILED, "no file of %d bytes to map", (int)FILE_BYTES)) {
        cv_want_huge_pages(map, FILE_BYTES);
        same_bytes(&c, map, "before");
        const size_t before = cv_in_huge_pages(map, FILE_BYTES);
        atomic_bool stop = false;
        _Atomic uint64_t done = 0;
        cv_reread none = {.left_ms = 0, .done = &done, .stop = &stop};
        cv_check(&c, !cv_reread_in_huge_pages(fd, map, FILE_BYTES, &none) && !done, "pages were read anew with no time left for it");
        same_bytes(&c, map, "after a trial");
        cv_reread reread = {.left_ms = CV_REREAD_MS, .done = &done, .stop = &stop};
        const bool did = cv_reread_in_huge_pages(fd, map, FILE_BYTES, &reread);
        cv_check(&c, done == (did ? FILE_BYTES : 0), "%llu bytes count as read", (unsigned long long)done);
        cv_check(&c, did == (reread.left_ms < CV_REREAD_MS), "%llu ms are left", (unsigned long long)reread.left_ms);
        same_bytes(&c, map, "after");
        const size_t after = cv_in_huge_pages(map, FILE_BYTES);
        printf("# read anew: %s; in huge pages %zu MiB before, %zu MiB after\n", did ? "yes" : "no", before >> 20, after >> 20);
        cv_check(&c, !did || after > FILE_BYTES / 2, "pages were read anew and only %zu bytes are in huge ones", after);
        cv_check(&c, !did || !cv_reread_in_huge_pages(fd, map, FILE_BYTES, &reread), "pages that are huge were read anew once more");
        munmap(map, FILE_BYTES);
    }
    if (fd >= 0) close(fd);
    cv_end_case(&c);

    cv_case(&c, "a file that another mapping uses keeps its bytes there while its pages are read anew");
    const int shared = written_file();
    uint8_t *other = shared < 0 ? MAP_FAILED : mmap(NULL, FILE_BYTES, PROT_READ, MAP_SHARED, shared, 0);
    uint8_t *mine = shared < 0 ? MAP_FAILED : mmap(NULL, FILE_BYTES, PROT_READ, MAP_PRIVATE, shared, 0);
    if (cv_check(&c, other != MAP_FAILED && mine != MAP_FAILED, "no file of %d bytes to map twice", (int)FILE_BYTES)) {
        cv_want_huge_pages(mine, FILE_BYTES);
        same_bytes(&c, other, "in the other mapping before");
        atomic_bool stop = true; /* and a stop that comes early leaves nothing undone that matters */
        _Atomic uint64_t done = 0;
        cv_reread reread = {.left_ms = CV_REREAD_MS, .done = &done, .stop = &stop};
        (void)cv_reread_in_huge_pages(shared, mine, FILE_BYTES, &reread);
        cv_check(&c, done == 0, "%llu bytes count as read after the stop", (unsigned long long)done);
        same_bytes(&c, mine, "after");
        same_bytes(&c, other, "in the other mapping after");
    }
    if (other != MAP_FAILED) munmap(other, FILE_BYTES);
    if (mine != MAP_FAILED) munmap(mine, FILE_BYTES);
    if (shared >= 0) close(shared);
    cv_end_case(&c);
    return cv_report(&c);
}
