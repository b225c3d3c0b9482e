/* fake-verbs.c — a libibverbs without devices behind it: FAKE_VERBS=devices lists three of which one can be used, FAKE_VERBS=hang never
 * comes back, as the library of a wedged port. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../native/transport/verbs_abi.h"

static char first, second, third; /* devices; only their addresses matter */
static struct vb_context contexts[2];

vb_device **ibv_get_device_list(int *n) {
    const char *mode = getenv("FAKE_VERBS");
    if (mode && strcmp(mode, "hang") == 0)
        for (;;) pause();
    vb_device **list = calloc(4, sizeof *list);
    list[0] = (vb_device *)&first;
    list[1] = (vb_device *)&second;
    list[2] = (vb_device *)&third;
    *n = 3;
    return list;
}
void ibv_free_device_list(vb_device **list) { free(list); }
const char *ibv_get_device_name(vb_device *d) { return (char *)d == &first ? "rdma_en3" : (char *)d == &second ? "rdma_en4" : "rdma_en5"; }
vb_context *ibv_open_device(vb_device *d) {
    if ((char *)d == &third) return errno = EBUSY, NULL;
    return &contexts[(char *)d == &second];
}
int ibv_close_device(vb_context *c) { return (void)c, 0; }
int ibv_query_port(vb_context *c, uint8_t port, vb_port_attr *out) {
    (void)port;
    out->state = c == &contexts[0] ? VB_PORT_ACTIVE : 1;
    out->gid_tbl_len = 2;
    return 0;
}
int ibv_query_gid(vb_context *c, uint8_t port, int i, vb_gid *out) {
    static const uint8_t address[16] = {[10] = 0xff, [11] = 0xff, [12] = 169, [13] = 254, [14] = 7, [15] = 9};
    (void)c, (void)port;
    memset(out, 0, sizeof *out);
    if (i == 1) memcpy(out->raw, address, sizeof address);
    return 0;
}
/* Listing needs none of these; they have to exist. */
#define NEVER(name) void ibv_##name(void) { abort(); }
NEVER(alloc_pd) NEVER(dealloc_pd) NEVER(reg_mr) NEVER(dereg_mr) NEVER(create_cq) NEVER(destroy_cq) NEVER(create_qp) NEVER(destroy_qp) NEVER(modify_qp) NEVER(wc_status_str)
