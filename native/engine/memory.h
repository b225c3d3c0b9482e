/* memory.h — what the engine asks of the system for memory that every step reads: huge pages. */
#ifndef CV_ENGINE_MEMORY_H
#define CV_ENGINE_MEMORY_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Bytes of a huge page: what one entry of the processor's address cache then covers instead of 4 KiB. */
enum { CV_HUGE_PAGE = 2 << 20 };

/* Asks for huge pages in a mapping; a system that has none, or does not want to, leaves it as it is. Of a mapped file, pages that
 * come from disk after this call are huge where the file system can; pages that are in memory already stay as they are. */
void cv_want_huge_pages(void *memory, size_t bytes);

/* What reading anew may cost, over all files of a load, and where it says how far it is. */
typedef struct {
    uint64_t left_ms;        /* to begin with CV_REREAD_MS; what a file took is taken off */
    _Atomic uint64_t *done;  /* bytes that were read are added */
    const atomic_bool *stop; /* ends it early when set */
} cv_reread;
enum { CV_REREAD_MS = 3000 };

/* For a file that is mapped at `memory`, whole and read-only, after cv_want_huge_pages: where its pages lie in memory as small ones
 * (it was written or downloaded a moment ago) and the disk is fast enough to bring all of it again in the time that is left, drops
 * them and reads them anew. Returns whether it did. Bytes and pointers of the mapping stay valid, and other processes that use
 * the file keep their pages. Linux; elsewhere it does nothing. */
bool cv_reread_in_huge_pages(int fd, void *memory, size_t bytes, cv_reread *reread);

/* Bytes of [memory, memory+bytes) that huge pages map, or 0 where the system does not tell. */
size_t cv_in_huge_pages(const void *memory, size_t bytes);

#endif
