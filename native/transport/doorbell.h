/* doorbell.h — sleeping on a word of shared memory until another process rings: futex on Linux, os_sync_wait_on_address on macOS 14.4 and
 * later, short naps elsewhere. A sleeper lies down, looks once more whether there is something to do, and only then sleeps, so that
 * no ring is missed. */
#ifndef CV_TRANSPORT_DOORBELL_H
#define CV_TRANSPORT_DOORBELL_H

#include <stdatomic.h>
#include <stdint.h>

typedef struct {
    _Alignas(128) _Atomic uint32_t rings;
    _Atomic uint32_t sleepers;
} cv_doorbell;

/* Wakes all sleepers; costs next to nothing while there are none. */
void cv_doorbell_ring(cv_doorbell *b);

/* lie_down gives what sleep takes; between the two the caller looks. get_up ends both. sleep ends at until_ns (CV_NEVER: within a second) or
 * earlier without a reason. */
uint32_t cv_doorbell_lie_down(cv_doorbell *b);
void cv_doorbell_sleep(cv_doorbell *b, uint32_t seen, uint64_t until_ns);
void cv_doorbell_get_up(cv_doorbell *b);

#endif
