/* memory.h — what the engine asks of the system for memory that every step reads: huge pages. */
#ifndef CV_ENGINE_MEMORY_H
#define CV_ENGINE_MEMORY_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

/* Bytes of a huge page: what one entry of the processor's address cache then covers instead of 4 KiB. */
enum { CV_HUGE_PAGE = 2 << 20 };

/* Asks for huge pages in a mapping; a system that has none, or does not want to, leaves it as it is. Of a mapped file, pages that
 * come from disk after this call are huge where the file system can; pages that are in memory already stay as they are. */
void cv_want_huge_pages(void *memory, size_t bytes);

/* For a file that is mapped at `memory`, whole and read-only, after cv_want_huge_pages: where its pages lie in memory as small ones
 * (it was written or downloaded a moment ago) and the disk is fast enough to bring all of it again within CV_REREAD_MS, drops
 * them and reads them anew. Returns whether it did. A set `stop` ends it early. Bytes and pointers of the mapping stay valid,
 * and other processes that use the file keep their pages. Linux; elsewhere it does nothing. */
bool cv_reread_in_huge_pages(int fd, void *memory, size_t bytes, const atomic_bool *stop);
enum { CV_REREAD_MS = 3000 };

/* Bytes of [memory, memory+bytes) that huge pages map, or 0 where the system does not tell. */
size_t cv_in_huge_pages(const void *memory, size_t bytes);

#endif
