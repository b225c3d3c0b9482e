/* shm.c — the transport over shared memory, for ranks on one host. One segment holds a ring of bytes for each ordered pair of ranks and
 * channel: the sender moves its head, the receiver its tail. A message is a header, its bytes and a checksum, and begins on a
 * multiple of 64 bytes. Whoever waits spins, then sleeps on its rank's doorbell, which the others ring only while somebody sleeps.
 *
 * The segment has a name only until all ranks have mapped it, so nothing is left behind by a crash. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checksum.h"
#include "doorbell.h"
#include "group.h"

#define SEGMENT_MAGIC 0x31304d5356434e4cull
#define MESSAGE_MAGIC 0x474d5643u /* "CVMG" */
#define LINE 128 /* bytes that two cores may fight for: a pair of cache lines, and one on Apple's */
#define BUDGET (64u << 20)
#define PUBLISH_BYTES (32u << 10) /* so that the receiver works on the start of a large message while its end is written */
#define CACHED_BYTES 4096u /* copied, summed up and added while they are in the first-level cache */
#define TIMED_EVERY 16
#define WHY_BYTES 160

/* Largest rings; with many ranks they are smaller, so that a segment stays below BUDGET. Sums and hidden states of a prompt's piece: a ring that is written
 * again while its lines are still in the other core's own cache costs twice the time (2.6 MB: 2.6 ms with 256 KiB, 1.2 ms with 4 MiB), and a
 * stage that hands over goes on with its next step. */
static const uint32_t ring_most[CV_CHANNEL_COUNT] = {4u << 20, 4u << 20, 64u << 10, 64u << 10};

typedef struct {
    _Alignas(LINE) atomic_uint_fast64_t head; /* bytes written so far, by the sender */
    _Alignas(LINE) atomic_uint_fast64_t tail; /* bytes taken so far, by the receiver */
} ends;

typedef struct {
    uint64_t magic, epoch;
    uint8_t token[16];
    uint32_t size, version;
    _Alignas(LINE) cv_doorbell bells[CV_MAX_RANKS];
} segment_head; /* then ends [size][size][CV_CHANNEL_COUNT], then the rings' bytes */

typedef struct {
    uint32_t magic, channel;
    uint64_t seq, bytes, check; /* check: of the fields before */
    uint64_t reserved[4];
} message_head; /* 64 bytes; then the bytes, then zeros and their checksum to the next multiple of 64 bytes (tail_bytes) */

/* One direction of one pair and channel, as this process sees it. */
typedef struct {
    ends *ends;
    uint8_t *data;
    uint32_t bytes;  /* of the ring, a power of two */
    uint64_t at;     /* own end: head of a sender, tail of a receiver */
    uint64_t others; /* the other end as last seen */
    uint64_t seq;
    bool open;       /* inside a message: its header has been written or read */
    cv_checksum sum;
} lane;

typedef struct {
    void *base;
    size_t bytes;
    segment_head *head;
    lane out[CV_MAX_RANKS][CV_CHANNEL_COUNT], in[CV_MAX_RANKS][CV_CHANNEL_COUNT];
} shm;

/* What rank 0 tells the others when it has made the segment, and they when they have mapped it. */
typedef struct {
    uint32_t made;
    char name[32];
    uint8_t token[16];
    char why[WHY_BYTES];
} offer;

static uint32_t ring_bytes(uint32_t size, uint32_t channel) {
    uint64_t pairs = (uint64_t)size * (size - 1), each = BUDGET / pairs / CV_CHANNEL_COUNT;
    uint32_t bytes = ring_most[channel];
    while (bytes > 4096 && bytes > each) bytes /= 2;
    return bytes;
}

static size_t ends_bytes(uint32_t size) { return (size_t)size * size * CV_CHANNEL_COUNT * sizeof(ends); }

static size_t segment_bytes(uint32_t size) {
    size_t n = sizeof(segment_head) + ends_bytes(size);
    for (uint32_t ch = 0; ch < CV_CHANNEL_COUNT; ch++) n += (size_t)size * (size - 1) * ring_bytes(size, ch);
    return n;
}

/* ---- bytes in and out of a ring ---- */

static void put(lane *l, const void *from, size_t n) {
    size_t at = l->at & (l->bytes - 1), first = l->bytes - at < n ? l->bytes - at : n;
    memcpy(l->data + at, from, first);
    if (n > first) memcpy(l->data, (const uint8_t *)from + first, n - first);
    l->at += n;
}

static void take(lane *l, void *to, size_t n) {
    size_t at = l->at & (l->bytes - 1), first = l->bytes - at < n ? l->bytes - at : n;
    memcpy(to, l->data + at, first);
    if (n > first) memcpy((uint8_t *)to + first, l->data, n - first);
    l->at += n;
}

/* The next bytes that lie together in the ring, at most n and CACHED_BYTES. */
static size_t together(const lane *l, size_t n) {
    size_t to_end = l->bytes - (l->at & (l->bytes - 1));
    if (n > to_end) n = to_end;
    return n < CACHED_BYTES ? n : CACHED_BYTES;
}

/* What checksums take is measured on one message in TIMED_EVERY and counted so many times: two looks at the clock are not free beside a few KB. */
static void add_to_sum(cv_group *g, lane *l, const uint8_t *from, size_t n) {
    if (l->seq % TIMED_EVERY) {
        cv_checksum_add(&l->sum, from, n);
        return;
    }
    uint64_t start = cv_now();
    cv_checksum_add(&l->sum, from, n);
    atomic_fetch_add_explicit(&g->mac_ns, TIMED_EVERY * (cv_now() - start), memory_order_relaxed);
}

static void put_summed(cv_group *g, lane *l, const uint8_t *from, size_t n) {
    for (size_t k; n; n -= k, from += k) {
        k = together(l, n);
        memcpy(l->data + (l->at & (l->bytes - 1)), from, k);
        add_to_sum(g, l, from, k);
        l->at += k;
    }
}

static void take_summed(cv_group *g, lane *l, const cv_transfer *t, size_t n) {
    uint8_t *to = t->data + t->done;
    for (size_t k; n; n -= k, to += k) {
        k = together(l, n);
        const uint8_t *from = l->data + (l->at & (l->bytes - 1));
        add_to_sum(g, l, from, k);
        if (t->behind) cv_add_floats((float *)(void *)to, (const float *)(const void *)from, k / sizeof(float), t->in_first);
        else memcpy(to, from, k);
        l->at += k;
    }
}

/* Zeros and a checksum behind a message of so many bytes. */
static size_t tail_bytes(size_t bytes) { return 8 + (64 - (bytes + 8) % 64) % 64; }

static uint64_t check_of(const message_head *h) {
    cv_checksum c;
    cv_checksum_start(&c);
    cv_checksum_add(&c, h, offsetof(message_head, check));
    return cv_checksum_finish(&c);
}

static void ring_peer(shm *s, uint32_t peer) { cv_doorbell_ring(&s->head->bells[peer]); }

static size_t room(lane *l, size_t wanted) {
    if (l->bytes - (l->at - l->others) < wanted) l->others = atomic_load_explicit(&l->ends->tail, memory_order_acquire);
    return l->bytes - (size_t)(l->at - l->others);
}

static size_t waiting(lane *l, size_t wanted) {
    if (l->others - l->at < wanted) l->others = atomic_load_explicit(&l->ends->head, memory_order_acquire);
    return (size_t)(l->others - l->at);
}

static int send_some(cv_group *g, shm *s, lane *l, cv_transfer *t) {
    if (l->others > l->at || l->at - l->others > l->bytes) return cv_group_fail(g, CV_E_GROUP, (int)t->peer, "rank %u broke the protocol: its shared memory is damaged", t->peer);
    uint64_t start = l->at;
    if (!l->open) {
        if (room(l, sizeof(message_head)) < sizeof(message_head)) return 0;
        message_head h = {.magic = MESSAGE_MAGIC, .channel = t->channel, .seq = l->seq, .bytes = t->bytes};
        h.check = check_of(&h);
        put(l, &h, sizeof h);
        cv_checksum_start(&l->sum);
        l->open = true;
    }
    while (t->done < t->bytes) {
        size_t left = t->bytes - t->done, n = left < PUBLISH_BYTES ? left : PUBLISH_BYTES, free_bytes = room(l, n);
        if (n > free_bytes) n = free_bytes;
        if (!n) break;
        put_summed(g, l, t->data + t->done, n);
        t->done += n;
        if (t->done < t->bytes) {
            atomic_store_explicit(&l->ends->head, l->at, memory_order_release);
            ring_peer(s, t->peer);
        }
    }
    size_t tail = tail_bytes(t->bytes);
    if (t->done == t->bytes && room(l, tail) >= tail) {
        const uint8_t zeros[64] = {0};
        uint64_t sum = cv_checksum_finish(&l->sum);
        put(l, zeros, tail - sizeof sum);
        put(l, &sum, sizeof sum);
        l->open = false;
        l->seq++;
        t->finished = true;
    }
    if (l->at == start) return 0;
    atomic_store_explicit(&l->ends->head, l->at, memory_order_release);
    ring_peer(s, t->peer);
    return 1;
}

static int damaged(cv_group *g, const cv_transfer *t, const char *what) {
    return cv_group_fail(g, CV_E_GROUP, (int)t->peer, "rank %u broke the protocol: %s", t->peer, what);
}

static int take_message_head(cv_group *g, lane *l, cv_transfer *t) {
    message_head h;
    take(l, &h, sizeof h);
    if (h.magic != MESSAGE_MAGIC || h.check != check_of(&h) || h.channel != t->channel) return damaged(g, t, "its shared memory is damaged");
    if (h.seq != l->seq) return damaged(g, t, "a message out of sequence");
    if (t->any) {
        if (h.bytes > t->most) return damaged(g, t, "a message larger than the receiver takes");
        t->bytes = (size_t)h.bytes;
        t->data = malloc(t->bytes ? t->bytes : 1);
        if (!t->data) return cv_group_fail(g, CV_E_MEMORY, (int)g->rank, "rank %u has no memory for a message of %zu bytes", g->rank, t->bytes);
    } else if (h.bytes != t->bytes)
        return cv_group_fail(g, CV_E_GROUP, (int)t->peer, "rank %u broke the protocol: a message of %llu bytes where %zu were expected", t->peer, (unsigned long long)h.bytes, t->bytes);
    cv_checksum_start(&l->sum);
    l->open = true;
    return CV_OK;
}

static int receive_some(cv_group *g, shm *s, lane *l, cv_transfer *t) {
    uint64_t start = l->at;
    if (!l->open) {
        if (waiting(l, sizeof(message_head)) < sizeof(message_head)) return 0;
        if (l->others - l->at > l->bytes) return damaged(g, t, "its shared memory is damaged");
        int code = take_message_head(g, l, t);
        if (code != CV_OK) return code;
    }
    while (t->done < t->bytes) {
        size_t left = t->bytes - t->done, n = waiting(l, left < PUBLISH_BYTES ? left : PUBLISH_BYTES);
        if (n > l->bytes) return damaged(g, t, "its shared memory is damaged");
        if (n > left) n = left;
        if (n > PUBLISH_BYTES) n = PUBLISH_BYTES;
        if (t->behind) {
            if (n > t->behind->done - t->done) n = t->behind->done - t->done;
            n -= n % sizeof(float);
        }
        if (!n) break;
        take_summed(g, l, t, n);
        t->done += n;
        if (t->done < t->bytes) {
            atomic_store_explicit(&l->ends->tail, l->at, memory_order_release);
            ring_peer(s, t->peer);
        }
    }
    size_t tail = tail_bytes(t->bytes);
    if (t->done == t->bytes && waiting(l, tail) >= tail) {
        uint64_t sum;
        l->at += tail - sizeof sum;
        take(l, &sum, sizeof sum);
        if (sum != cv_checksum_finish(&l->sum)) return damaged(g, t, "a message whose checksum is wrong");
        l->open = false;
        l->seq++;
        t->finished = true;
    }
    if (l->at == start) return 0;
    atomic_store_explicit(&l->ends->tail, l->at, memory_order_release);
    ring_peer(s, t->peer);
    return 1;
}

static int progress(cv_group *g, cv_transfer *t) {
    shm *s = g->wire_state;
    if (t->sending) return send_some(g, s, &s->out[t->peer][t->channel], t);
    return receive_some(g, s, &s->in[t->peer][t->channel], t);
}

static bool can_move(shm *s, cv_transfer *t) {
    if (t->finished) return false;
    lane *l = t->sending ? &s->out[t->peer][t->channel] : &s->in[t->peer][t->channel];
    if (t->sending) return room(l, sizeof(message_head)) >= sizeof(message_head);
    return waiting(l, 1) >= (l->open ? 1 : sizeof(message_head));
}

static void wait_for(cv_group *g, cv_transfer *t, size_t n, uint64_t until_ns, uint64_t idle_ns) {
    (void)idle_ns;
    shm *s = g->wire_state;
    cv_doorbell *bell = &s->head->bells[g->rank];
    uint32_t seen = cv_doorbell_lie_down(bell);
    bool ready = atomic_load(&g->code) != CV_OK;
    for (size_t i = 0; i < n && !ready; i++) ready = can_move(s, &t[i]);
    if (!ready) cv_doorbell_sleep(bell, seen, until_ns);
    cv_doorbell_get_up(bell);
}

static void wake(cv_group *g) {
    shm *s = g->wire_state;
    cv_doorbell_ring(&s->head->bells[g->rank]);
}

static void close_segment(cv_group *g) {
    shm *s = g->wire_state;
    if (s->base) munmap(s->base, s->bytes);
    free(s);
    g->wire_state = NULL;
}

static const cv_wire wire = {.kind = CV_TRANSPORT_SHM, .progress = progress, .wait = wait_for, .wake = wake, .close = close_segment, .one_shot_bytes = 16u << 10, .adds = true};

/* ---- making and mapping the segment ---- */

static void lay_out(cv_group *g, shm *s) {
    s->head = s->base;
    uint8_t *at = (uint8_t *)s->base + sizeof(segment_head);
    ends *all = (ends *)at;
    at += ends_bytes(g->size);
    for (uint32_t a = 0; a < g->size; a++)
        for (uint32_t b = 0; b < g->size; b++)
            for (uint32_t ch = 0; ch < CV_CHANNEL_COUNT; ch++) {
                if (a == b) continue;
                uint32_t bytes = ring_bytes(g->size, ch);
                lane l = {.ends = &all[((size_t)a * g->size + b) * CV_CHANNEL_COUNT + ch], .data = at, .bytes = bytes};
                if (a == g->rank) s->out[b][ch] = l;
                if (b == g->rank) s->in[a][ch] = l;
                at += bytes;
            }
}

static int map(shm *s, int fd) {
    s->base = mmap(NULL, s->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (s->base == MAP_FAILED) s->base = NULL;
    return s->base ? 0 : -1;
}

/* Rank 0. The memory is reserved here: a page that is missing later would be a crash, not an error. */
static int make(cv_group *g, shm *s, offer *o) {
    uint8_t random[8];
    if (cv_random_fill(random, sizeof random) || cv_random_fill(o->token, sizeof o->token)) return -1;
    int n = snprintf(o->name, sizeof o->name, "/cv%02x%02x.%llx.", g->options.instance[0], g->options.instance[1], (unsigned long long)(g->options.epoch & 0xffffffff));
    for (int i = 0; i < 4; i++) n += snprintf(o->name + n, sizeof o->name - (size_t)n, "%02x", random[i]); /* at most 26: macOS takes 31 */
    int fd = shm_open(o->name, O_RDWR | O_CREAT | O_EXCL, 0600);
    if (fd < 0) {
        o->name[0] = 0;
        return -1;
    }
    int failed = ftruncate(fd, (off_t)s->bytes);
#if defined(__linux__)
    if (!failed && (errno = posix_fallocate(fd, 0, (off_t)s->bytes)) != 0) failed = -1;
#endif
    if (!failed) failed = map(s, fd);
    int why = errno;
    close(fd);
    errno = why;
    if (failed) return -1;
    segment_head *h = s->base;
    h->epoch = g->options.epoch;
    h->size = g->size;
    h->version = CV_ABI_VERSION;
    memcpy(h->token, o->token, sizeof h->token);
    h->magic = SEGMENT_MAGIC;
    o->made = 1;
    return 0;
}

static int open_made(cv_group *g, shm *s, offer *o) {
    o->name[sizeof o->name - 1] = 0;
    int fd = shm_open(o->name, O_RDWR, 0);
    if (fd < 0) return -1;
    struct stat info;
    int failed = fstat(fd, &info);
    if (!failed && (size_t)info.st_size < s->bytes) {
        errno = EINVAL;
        failed = -1;
    }
    if (!failed) failed = map(s, fd);
    int why = errno;
    close(fd);
    errno = why;
    if (failed) return -1;
    const segment_head *h = s->base;
    if (h->magic == SEGMENT_MAGIC && h->epoch == g->options.epoch && h->size == g->size && h->version == CV_ABI_VERSION && memcmp(h->token, o->token, sizeof h->token) == 0) return 0;
    errno = EINVAL;
    return -1;
}

int cv_shm_try(cv_group *g, uint64_t until_ns, char *why, size_t why_size) {
    shm *s = calloc(1, sizeof *s);
    offer *all = calloc(g->size, sizeof *all), mine = {0};
    int code = CV_OK, works = 0;
    if (!s || !all) code = cv_group_fail(g, CV_E_MEMORY, (int)g->rank, "rank %u has no memory to connect", g->rank);
    if (code == CV_OK) {
        s->bytes = segment_bytes(g->size);
        if (g->rank == 0 && make(g, s, &mine)) snprintf(mine.why, sizeof mine.why, "cannot make a shared segment of %zu bytes: %s", s->bytes, strerror(errno));
        code = cv_gather(g, &mine, sizeof mine, all, until_ns);
        if (code == CV_OK && !all[0].made) {
            all[0].why[WHY_BYTES - 1] = 0;
            snprintf(why, why_size, "%s", all[0].why);
        } else if (code == CV_OK) {
            if (g->rank != 0 && open_made(g, s, &all[0])) snprintf(why, why_size, "cannot map rank 0's segment: %s", strerror(errno));
            else works = 1;
            uint32_t mapped = 1, everybody[CV_MAX_RANKS]; /* only then may the name go */
            code = cv_gather(g, &mapped, sizeof mapped, everybody, until_ns);
        }
        if (g->rank == 0 && mine.name[0]) shm_unlink(mine.name);
    }
    free(all);
    if (code == CV_OK && works) {
        lay_out(g, s);
        pthread_mutex_lock(&g->lock);
        g->wire_state = s;
        g->wire = &wire;
        pthread_mutex_unlock(&g->lock);
        return 1;
    }
    if (s && s->base) munmap(s->base, s->bytes);
    free(s);
    return code;
}
