/* group.c — a group's life: opening, the first error, abort, statistics, closing. See group.h for the other parts. */
#include "group.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#define ADDRESS_MAGIC 0x52444143u /* "CADR" */
#define SUSPECT_MS 200

_Static_assert(sizeof(cv_address) <= CV_ADDRESS_BYTES, "addresses are small");

uint32_t cv_group_rank(const cv_group *g) { return g ? g->rank : 0; }
uint32_t cv_group_size(const cv_group *g) { return g ? g->size : 0; }

/* ---- the first error ---- */

int cv_group_fail(cv_group *g, int code, int culprit, const char *format, ...) {
    char text[CV_ERROR_BYTES];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    pthread_mutex_lock(&g->lock);
    bool first = atomic_load(&g->code) == CV_OK;
    if (first) {
        memcpy(g->error, text, sizeof text);
        g->culprit = culprit;
        atomic_store(&g->code, code);
        if (write(g->wake[1], "x", 1) < 0) { /* cannot fail: the pipe is empty. Sleepers look at the code every 100 ms anyway. */
        }
    }
    const cv_wire *wire = g->wire;
    code = atomic_load(&g->code);
    if (first && wire && wire->wake) wire->wake(g);
    pthread_mutex_unlock(&g->lock);
    if (first) cv_monitor_look(g);
    return code;
}

int cv_group_suspect(cv_group *g, uint32_t peer, const char *why) {
    struct pollfd fd = {.fd = g->wake[0], .events = POLLIN};
    for (int waited = 0; waited < SUSPECT_MS && atomic_load(&g->code) == CV_OK && !atomic_load(&g->peers[peer].left); waited += 5) poll(&fd, 1, 5);
    if (atomic_load(&g->peers[peer].left)) return cv_group_fail(g, CV_E_GROUP, (int)peer, "rank %u left the group", peer);
    return cv_group_fail(g, CV_E_GROUP, (int)peer, "rank %u is gone: %s", peer, why);
}

void cv_group_error(cv_group *g, char *out, size_t size) {
    if (!out || !size) return;
    out[0] = 0;
    if (!g) return;
    pthread_mutex_lock(&g->lock);
    snprintf(out, size, "%s", g->error);
    pthread_mutex_unlock(&g->lock);
}

void cv_group_abort(cv_group *g, const char *why) {
    if (g) cv_group_fail(g, CV_E_ABORTED, (int)g->rank, "%s", why && *why ? why : "aborted");
}

/* ---- opening ---- */

static int make_pipe(int fds[2]) {
    if (pipe(fds)) return -1;
    for (int i = 0; i < 2; i++) {
        fcntl(fds[i], F_SETFD, FD_CLOEXEC);
        fcntl(fds[i], F_SETFL, O_NONBLOCK);
    }
    return 0;
}

/* An id of the running system; two ranks with the same one share its memory, unless containers keep them apart (then mapping fails). */
static void host_id(char *out, size_t size) {
    out[0] = 0;
#if defined(__APPLE__)
    size_t n = size - 1;
    if (sysctlbyname("kern.bootsessionuuid", out, &n, NULL, 0)) out[0] = 0;
    else out[n < size - 1 ? n : size - 1] = 0;
#else
    FILE *f = fopen("/proc/sys/kernel/random/boot_id", "r");
    if (!f) return;
    if (!fgets(out, (int)size, f)) out[0] = 0;
    fclose(f);
    out[strcspn(out, "\n")] = 0;
#endif
}

/* The numeric address that other ranks dial. Names are refused: resolving one may block for longer than any deadline here. */
static int parse_host(const char *host, cv_address *out) {
    if (!*host) host = "127.0.0.1";
    if (inet_pton(AF_INET, host, out->ip) == 1) out->family = 4;
    else if (inet_pton(AF_INET6, host, out->ip) == 1) out->family = 6;
    else return -1;
    return 0;
}

static int check_options(const cv_group_options *o, cv_err err) {
    if (o->version != CV_ABI_VERSION) return cv_fail(err, CV_E_ARGUMENT, "the group's options are of version %u, not %u", o->version, CV_ABI_VERSION);
    if (o->size < 1 || o->size > CV_MAX_RANKS || o->rank >= o->size) return cv_fail(err, CV_E_ARGUMENT, "rank %u of %u: there may be 1 to %u ranks", o->rank, o->size, CV_MAX_RANKS);
    if (o->transport > CV_TRANSPORT_TCP) return cv_fail(err, CV_E_ARGUMENT, "there is no transport %u", o->transport);
    if (memchr(o->host, 0, sizeof o->host) == NULL || memchr(o->rdma_device, 0, sizeof o->rdma_device) == NULL || memchr(o->no_rdma, 0, sizeof o->no_rdma) == NULL)
        return cv_fail(err, CV_E_ARGUMENT, "a text among the group's options has no end");
    return CV_OK;
}

int cv_group_open(const void *options, size_t options_size, void *address, size_t *address_size, cv_group **out, char *text, size_t text_size) {
    cv_err err = {text, text_size};
    if (!options || options_size != sizeof(cv_group_options) || !address || !address_size || !out)
        return cv_fail(err, CV_E_ARGUMENT, "no options, or of the wrong size, or nowhere to put the group");
    if (*address_size < sizeof(cv_address)) return cv_fail(err, CV_E_BUFFER, "an address needs %zu bytes", sizeof(cv_address));
    cv_group_options o;
    memcpy(&o, options, sizeof o);
    int code = check_options(&o, err);
    if (code != CV_OK) return code;
    cv_group *g = calloc(1, sizeof *g);
    if (!g) return cv_fail(err, CV_E_MEMORY, "no memory for a group");
    g->options = o;
    if (!g->options.silence_ms) g->options.silence_ms = CV_DEFAULT_SILENCE_MS;
    if (!g->options.max_message) g->options.max_message = CV_DEFAULT_MAX_MESSAGE;
    g->rank = o.rank;
    g->size = o.size;
    g->culprit = -1;
    g->listener = g->wake[0] = g->wake[1] = g->monitor_wake[0] = g->monitor_wake[1] = -1;
    for (uint32_t r = 0; r < CV_MAX_RANKS; r++) g->peers[r].control.fd = -1;
    pthread_mutex_init(&g->lock, NULL);
    pthread_mutex_init(&g->scratch_lock, NULL);
    g->self = (cv_address){.magic = ADDRESS_MAGIC, .version = CV_ABI_VERSION, .rank = o.rank, .size = o.size, .epoch = o.epoch};
    memcpy(g->self.instance, o.instance, sizeof o.instance);
    host_id(g->self.host_id, sizeof g->self.host_id);
    if (make_pipe(g->wake) || make_pipe(g->monitor_wake)) code = cv_fail(err, CV_E_IO, "cannot make a pipe: %s", strerror(errno));
    else if (parse_host(o.host, &g->self)) code = cv_fail(err, CV_E_ARGUMENT, "%s is no IPv4 or IPv6 address (names and scoped addresses cannot be used here)", o.host);
    else code = cv_listen(g, err);
    if (code != CV_OK) {
        cv_group_close(g);
        return code;
    }
    memcpy(address, &g->self, sizeof g->self);
    *address_size = sizeof g->self;
    *out = g;
    return CV_OK;
}

/* ---- connecting ---- */

/* Takes all ranks' addresses over, or says which one does not belong to this group. */
static int take_addresses(cv_group *g, const uint8_t *bytes, const uint64_t *sizes, cv_err err) {
    for (uint32_t r = 0; r < g->size; r++) {
        cv_address *a = &g->addresses[r];
        if (sizes[r] != sizeof *a) return cv_fail(err, CV_E_ARGUMENT, "the address of rank %u has %llu bytes, not %zu", r, (unsigned long long)sizes[r], sizeof *a);
        memcpy(a, bytes, sizeof *a);
        bytes += sizeof *a;
        if (a->magic != ADDRESS_MAGIC || a->version != CV_ABI_VERSION) return cv_fail(err, CV_E_ARGUMENT, "the address of rank %u is of another version of caravan", r);
        if (a->rank != r || a->size != g->size) return cv_fail(err, CV_E_ARGUMENT, "address %u is that of rank %u of %u", r, a->rank, a->size);
        if (a->epoch != g->options.epoch || memcmp(a->instance, g->options.instance, sizeof a->instance))
            return cv_fail(err, CV_E_ARGUMENT, "rank %u is in another epoch (%llu, here %llu) or instance", r, (unsigned long long)a->epoch, (unsigned long long)g->options.epoch);
        a->host_id[sizeof a->host_id - 1] = 0;
    }
    return CV_OK;
}

static int begin_connecting(cv_group *g, const void *addresses, const uint64_t *sizes, uint32_t timeout_ms, cv_err err) {
    if (!g || !addresses || !sizes || !timeout_ms) return cv_fail(err, CV_E_ARGUMENT, "no group, no addresses or no time to connect");
    if (atomic_load(&g->state) != CV_GROUP_OPEN) return cv_fail(err, CV_E_ARGUMENT, "the group is connected or being connected already");
    int code = take_addresses(g, addresses, sizes, err);
    if (code != CV_OK) return code;
    g->connect_until = cv_now() + timeout_ms * CV_MS;
    atomic_store(&g->state, CV_GROUP_CONNECTING);
    return CV_OK;
}

static int connect_now(cv_group *g) {
    int code = cv_connect_all(g, g->connect_until);
    if (code != CV_OK) cv_monitor_tell_all(g);
    return code;
}

static int end_connecting(cv_group *g, int code, char *note, size_t note_size, cv_err err) {
    atomic_store(&g->state, code == CV_OK ? CV_GROUP_READY : CV_GROUP_OVER);
    if (note && note_size) snprintf(note, note_size, "%s", g->note);
    if (code == CV_OK) return CV_OK;
    char text[CV_ERROR_BYTES];
    cv_group_error(g, text, sizeof text);
    return cv_fail(err, code, "%s", text);
}

int cv_group_connect(cv_group *g, const void *addresses, const uint64_t *sizes, uint32_t timeout_ms, char *note, size_t note_size, char *text, size_t text_size) {
    cv_err err = {text, text_size};
    int code = begin_connecting(g, addresses, sizes, timeout_ms, err);
    if (code != CV_OK) return code;
    return end_connecting(g, connect_now(g), note, note_size, err);
}

static void *connector(void *arg) {
    cv_group *g = arg;
    g->connect_code = connect_now(g);
    atomic_store(&g->connect_ended, true);
    return NULL;
}

int cv_group_connect_start(cv_group *g, const void *addresses, const uint64_t *sizes, uint32_t timeout_ms, char *text, size_t text_size) {
    cv_err err = {text, text_size};
    int code = begin_connecting(g, addresses, sizes, timeout_ms, err);
    if (code != CV_OK) return code;
    if (pthread_create(&g->connector, NULL, connector, g)) {
        atomic_store(&g->state, CV_GROUP_OPEN);
        return cv_fail(err, CV_E_MEMORY, "cannot start the connecting thread");
    }
    g->connector_running = true;
    return CV_OK;
}

int cv_group_connect_poll(cv_group *g, char *note, size_t note_size, char *text, size_t text_size) {
    cv_err err = {text, text_size};
    if (!g || !g->connector_running) return cv_fail(err, CV_E_ARGUMENT, "the group is not being connected");
    if (!atomic_load(&g->connect_ended)) return CV_E_AGAIN;
    pthread_join(g->connector, NULL);
    g->connector_running = false;
    return end_connecting(g, g->connect_code, note, note_size, err);
}

/* ---- statistics and the end ---- */

int cv_group_stats(cv_group *g, cv_group_stats_record *out, char *text, size_t text_size) {
    if (!g || !out) return CV_E_ARGUMENT;
    pthread_mutex_lock(&g->lock);
    const cv_wire *wire = g->wire;
    pthread_mutex_unlock(&g->lock);
    *out = (cv_group_stats_record){
        .transport = wire ? wire->kind : CV_TRANSPORT_AUTO,
        .failed = atomic_load(&g->code) != CV_OK,
        .reduces = atomic_load(&g->reduces),
        .reduce_ns = atomic_load(&g->reduce_ns),
        .reduce_bytes = atomic_load(&g->reduce_bytes),
        .messages = atomic_load(&g->messages),
        .message_bytes = atomic_load(&g->message_bytes),
        .mac_ns = atomic_load(&g->mac_ns),
        .round_trip_us = atomic_load(&g->round_trip_us),
        .strangers = (uint32_t)atomic_load(&g->strangers),
    };
    cv_group_error(g, text, text_size);
    return CV_OK;
}

void cv_group_close(cv_group *g) {
    if (!g) return;
    if (g->connector_running) {
        if (!atomic_load(&g->connect_ended)) cv_group_abort(g, "the group was closed while it connected");
        pthread_join(g->connector, NULL);
    }
    if (atomic_load(&g->calls) > 0) {
        cv_group_abort(g, "the group was closed while it was in use");
        while (atomic_load(&g->calls) > 0) poll(NULL, 0, 1); /* they end at once: every wait looks at the group's code */
    }
    if (g->monitor_running) {
        atomic_store(&g->closing, true);
        cv_monitor_look(g);
        pthread_join(g->monitor, NULL);
    }
    if (g->wire && g->wire->close) g->wire->close(g);
    for (uint32_t r = 0; r < g->size; r++) cv_conn_close(&g->peers[r].control);
    if (g->listener >= 0) close(g->listener);
    for (int i = 0; i < 2; i++) {
        if (g->wake[i] >= 0) close(g->wake[i]);
        if (g->monitor_wake[i] >= 0) close(g->monitor_wake[i]);
    }
    free(g->scratch);
    pthread_mutex_destroy(&g->lock);
    pthread_mutex_destroy(&g->scratch_lock);
    crypto_wipe(&g->options.key, sizeof g->options.key);
    free(g);
}
