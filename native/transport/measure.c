/* measure.c — what the connection of two ranks gives: round trip of a few bytes, and bytes a second one way. The lower rank sends and keeps the
 * time; bursts grow until one takes long enough that its end does not matter. Both ranks give the same figures. */
#include <stdlib.h>
#include <string.h>

#include "group.h"

#define PINGS 21
#define PIECE ((size_t)256 << 10)
#define FIRST_BURST ((size_t)64 << 10)
#define MOST_BURST ((size_t)256 << 20)
#define CALL_MS 3000

typedef struct {
    double round_trip_us, bandwidth;
} figures;

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Sends or answers one byte count and back. */
static int ping(cv_group *g, bool leads, uint64_t *word) {
    uint32_t peer = leads ? 1 : 0;
    int code = leads ? cv_send(g, peer, CV_CHANNEL_REDUCE, word, sizeof *word, CALL_MS) : cv_recv(g, peer, CV_CHANNEL_REDUCE, word, sizeof *word, CALL_MS);
    if (code != CV_OK) return code;
    uint64_t back = *word;
    return leads ? cv_recv(g, peer, CV_CHANNEL_REDUCE, &back, sizeof back, CALL_MS) : cv_send(g, peer, CV_CHANNEL_REDUCE, &back, sizeof back, CALL_MS);
}

static int burst(cv_group *g, bool leads, uint8_t *piece, uint64_t bytes) {
    int code = CV_OK;
    for (uint64_t done = 0; done < bytes && code == CV_OK;) {
        size_t n = bytes - done < PIECE ? (size_t)(bytes - done) : PIECE;
        code = leads ? cv_send(g, 1, CV_CHANNEL_REDUCE, piece, n, CALL_MS) : cv_recv(g, 0, CV_CHANNEL_REDUCE, piece, n, CALL_MS);
        done += n;
    }
    return code;
}

static int lead(cv_group *g, uint8_t *piece, uint64_t most_ns, figures *out) {
    double times[PINGS];
    uint64_t word = 0;
    int code = CV_OK;
    for (int i = 0; i < PINGS && code == CV_OK; i++) {
        uint64_t start = cv_now();
        code = ping(g, true, &word);
        times[i] = (double)(cv_now() - start) / 1e3;
    }
    if (code != CV_OK) return code;
    qsort(times, PINGS, sizeof *times, by_size);
    out->round_trip_us = times[PINGS / 2];
    uint64_t begun = cv_now();
    for (uint64_t bytes = FIRST_BURST; code == CV_OK; bytes *= 2) {
        uint64_t start = cv_now();
        code = cv_send(g, 1, CV_CHANNEL_REDUCE, &bytes, sizeof bytes, CALL_MS);
        if (code == CV_OK) code = burst(g, true, piece, bytes);
        if (code == CV_OK) code = ping(g, true, &word); /* only what has arrived counts */
        uint64_t now = cv_now();
        double seconds = (double)(now - start) / 1e9 - out->round_trip_us / 1e6;
        out->bandwidth = (double)bytes / (seconds > 1e-9 ? seconds : 1e-9);
        /* The next burst takes twice as long. */
        if ((now - begun) + 2 * (now - start) > most_ns || bytes >= MOST_BURST) break;
    }
    uint64_t end = 0;
    if (code == CV_OK) code = cv_send(g, 1, CV_CHANNEL_REDUCE, &end, sizeof end, CALL_MS);
    return code == CV_OK ? cv_send(g, 1, CV_CHANNEL_REDUCE, out, sizeof *out, CALL_MS) : code;
}

static int answer(cv_group *g, uint8_t *piece, figures *out) {
    uint64_t word = 0;
    int code = CV_OK;
    for (int i = 0; i < PINGS && code == CV_OK; i++) code = ping(g, false, &word);
    for (;;) {
        uint64_t bytes = 0;
        if (code == CV_OK) code = cv_recv(g, 0, CV_CHANNEL_REDUCE, &bytes, sizeof bytes, CALL_MS);
        if (code != CV_OK || bytes == 0) break;
        code = burst(g, false, piece, bytes);
        if (code == CV_OK) code = ping(g, false, &word);
    }
    return code == CV_OK ? cv_recv(g, 0, CV_CHANNEL_REDUCE, out, sizeof *out, CALL_MS) : code;
}

int cv_group_measure(cv_group *g, uint32_t most_ms, double *round_trip_us, double *bandwidth, char *text, size_t text_size) {
    cv_err err = {text, text_size};
    if (!g || !round_trip_us || !bandwidth || g->size != 2 || most_ms == 0 || most_ms > 10000) return cv_fail(err, CV_E_ARGUMENT, "a connected group of two is measured, for 1 to 10,000 ms");
    if (atomic_load(&g->state) != CV_GROUP_READY) return cv_fail(err, CV_E_ARGUMENT, "the group is not connected");
    uint8_t *piece = calloc(1, PIECE);
    if (!piece) return cv_fail(err, CV_E_MEMORY, "no memory to measure with");
    figures found = {0, 0};
    int code = g->rank == 0 ? lead(g, piece, most_ms * CV_MS, &found) : answer(g, piece, &found);
    free(piece);
    if (code != CV_OK) {
        char why[CV_ERROR_BYTES];
        cv_group_error(g, why, sizeof why);
        return cv_fail(err, code, "%s", why[0] ? why : "the other rank does not measure");
    }
    *round_trip_us = found.round_trip_us;
    *bandwidth = found.bandwidth;
    return CV_OK;
}
