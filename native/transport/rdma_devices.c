/* rdma_devices.c — this machine's RDMA devices: which there are, whether a cable is in, and which of them reaches which rank. Apple's
 * devices are one for each cable, so a mesh of machines has one for each other machine; behind a switch one reaches all. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "rdma.h"

#define MTU_1024 3u

const char *cv_rdma_explain(int error) {
    switch (error) {
    case EBUSY: return "all its queue pairs are in use, or left over from a process that was killed (restart the Mac)";
    case EINVAL: return "the port has no usable address, or it is part of a bridge (Thunderbolt Bridge must be off)";
    case ETIMEDOUT: return "the other rank's address is not reachable on this cable: is it the right cable?";
    case EOPNOTSUPP: return "the device does not do that";
    default: return strerror(error);
    }
}

/* Index of the first IPv4-mapped GID, -1 without one. Indices move when links come back: asked each time. */
static int find_gid(cv_verbs *v, vb_context *c, const vb_port_attr *port, vb_gid *out) {
    static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};
    for (int i = 0; i < port->gid_tbl_len && i < 256; i++)
        if (v->query_gid(v, c, 1, i, out) == 0 && memcmp(out->raw, mapped, sizeof mapped) == 0) return i;
    return -1;
}

/* Opens a device and looks at its port; false with the reason. out->port_state is set as soon as the port answers. */
static bool open_device(cv_verbs *v, vb_device *d, cv_rdma_device *out, char *why, size_t why_size) {
    memset(out, 0, sizeof *out);
    const char *name = v->device_name(v, d);
    snprintf(out->name, sizeof out->name, "%s", name ? name : "?");
    out->context = v->open_device(v, d);
    if (!out->context) {
        snprintf(why, why_size, "%s cannot be opened: %s", out->name, cv_rdma_explain(errno));
        return false;
    }
    vb_port_attr port;
    int error = v->query_port(v, out->context, 1, &port);
    if (!error) out->port_state = port.state;
    if (error) snprintf(why, why_size, "%s does not answer: %s", out->name, cv_rdma_explain(error));
    else if (port.state != VB_PORT_ACTIVE) snprintf(why, why_size, "%s has no active port (is the cable in?)", out->name);
    else if ((out->gid_index = find_gid(v, out->context, &port, &out->gid)) < 0) snprintf(why, why_size, "%s has no IPv4 address", out->name);
    else {
        out->lid = port.lid;
        out->mtu = port.active_mtu;
#if defined(__APPLE__)
        out->mtu = MTU_1024;
#endif
        return true;
    }
    v->close_device(v, out->context);
    out->context = NULL;
    return false;
}

/* The device's name for a peer as the options give it; "" = whichever is nearest. */
void cv_rdma_name_for(const cv_group *g, uint32_t peer, char out[64]) {
    const char *o = g->options.rdma_device;
    size_t n = 0;
    if (strchr(o, ',')) {
        for (uint32_t k = 0; k < peer && o; k++) o = strchr(o, ',') ? strchr(o, ',') + 1 : NULL;
        if (o) n = strcspn(o, ",");
        if (n > 63) n = 63; /* no device has such a name: it will not be found */
        memcpy(out, o ? o : "", n);
        out[n] = 0;
        return;
    }
    for (; *o && n < 60; o++) {
        if (o[0] == '%' && (o[1] == 'r' || o[1] == 'p')) n += (size_t)snprintf(out + n, 64 - n, "%u", *++o == 'r' ? g->rank : peer);
        else out[n++] = *o;
    }
    out[n < 63 ? n : 63] = 0;
}

/* Whether any rank needs this device by name, or names are left to us. */
static bool wanted(const cv_group *g, const char *name) {
    for (uint32_t r = 0; r < g->size; r++) {
        char want[64];
        if (r == g->rank) continue;
        cv_rdma_name_for(g, r, want);
        if (!want[0] || strcmp(want, name) == 0) return true;
    }
    return false;
}

void cv_rdma_look(const cv_group *g, cv_rdma *s, cv_rdma_survey *mine) {
    cv_verbs *v = s->verbs;
    int n = 0;
    vb_device **list = v->get_device_list(v, &n);
    snprintf(mine->why, sizeof mine->why, "%s", list && n > 0 ? "none of the RDMA devices is the one that was asked for" : "there is no RDMA device");
    for (int i = 0; list && i < n && s->n_devices < CV_RDMA_LISTED; i++) {
        const char *name = v->device_name(v, list[i]);
        if (!name || !wanted(g, name)) continue;
        cv_rdma_device *d = &s->devices[s->n_devices];
        if (!open_device(v, list[i], d, mine->why, sizeof mine->why)) continue;
        memcpy(mine->ip[s->n_devices], d->gid.raw + 12, 4);
        s->n_devices++;
    }
    if (list) v->free_device_list(v, list);
    mine->n = s->n_devices;
    mine->works = s->n_devices > 0;
}

static int equal_bits(const uint8_t a[4], const uint8_t b[4]) {
    int n = 0;
    for (int i = 0; i < 32 && !((a[i / 8] ^ b[i / 8]) & (0x80 >> i % 8)); i++) n++;
    return n;
}

/* The device towards a peer: by name, else that of the pair with the longest common prefix of addresses; both ends choose the same pair. */
cv_rdma_device *cv_rdma_choose_device(const cv_group *g, cv_rdma *s, uint32_t peer, const cv_rdma_survey *all) {
    char want[64];
    cv_rdma_name_for(g, peer, want);
    if (want[0]) {
        for (uint32_t i = 0; i < s->n_devices; i++)
            if (strcmp(s->devices[i].name, want) == 0) return &s->devices[i];
        return NULL;
    }
    uint32_t low = g->rank < peer ? g->rank : peer, high = g->rank < peer ? peer : g->rank, best_low = 0, best_high = 0;
    int best = -1;
    for (uint32_t i = 0; i < all[low].n && i < CV_RDMA_LISTED; i++)
        for (uint32_t j = 0; j < all[high].n && j < CV_RDMA_LISTED; j++) {
            int bits = equal_bits(all[low].ip[i], all[high].ip[j]);
            if (bits <= best) continue;
            best = bits;
            best_low = i;
            best_high = j;
        }
    return &s->devices[g->rank == low ? best_low : best_high];
}

/* ---- for people and nodes ---- */

/* One line: name, port state, IPv4 address or "", what is wrong or "". Returns its bytes; what does not fit is cut off. */
static size_t describe(cv_verbs *v, vb_device *d, char *out, size_t size) {
    cv_rdma_device at;
    char why[CV_RDMA_WHY_BYTES] = "", address[16] = "";
    if (open_device(v, d, &at, why, sizeof why)) {
        const uint8_t *ip = at.gid.raw + 12;
        snprintf(address, sizeof address, "%u.%u.%u.%u", ip[0], ip[1], ip[2], ip[3]);
        v->close_device(v, at.context);
    }
    int n = snprintf(out, size, "%s\t%u\t%s\t%s\n", at.name, at.port_state, address, why);
    return n < 0 ? 0 : (size_t)n < size ? (size_t)n : size - 1;
}

int cv_rdma_devices(char *out, size_t out_size, char *text, size_t text_size) {
    cv_err err = {text, text_size};
    char why[CV_RDMA_WHY_BYTES] = "";
    if (!out || !out_size) return cv_fail(err, CV_E_ARGUMENT, "nowhere to put the devices");
    out[0] = 0;
    cv_verbs *v = cv_verbs_load(why, sizeof why);
    if (!v) return cv_fail(err, CV_E_UNSUPPORTED, "%s", why);
    int n = 0;
    vb_device **list = v->get_device_list(v, &n);
    size_t used = 0;
    for (int i = 0; list && i < n && i < 4 * CV_RDMA_LISTED && used + 1 < out_size; i++) used += describe(v, list[i], out + used, out_size - used);
    if (list) v->free_device_list(v, list);
    v->release(v);
    return CV_OK;
}
