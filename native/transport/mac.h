/* mac.h — what proves that a frame comes from a rank of this group: keys derived from the session key, tags, random numbers.
 * The primitives are Monocypher's (monocypher.c, vendored unchanged); nothing here is a cipher of our own:
 *   - keys and handshake tags: keyed BLAKE2b with 32-byte results;
 *   - frame tags: Poly1305 under a one-time key, the first 32 bytes of ChaCha20(connection key, nonce = sequence number), which is
 *     how RFC 8439, section 2.6, makes such keys. A sequence number is never used twice under a connection key. */
#ifndef CV_TRANSPORT_MAC_H
#define CV_TRANSPORT_MAC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "monocypher.h"

#define CV_KEY_BYTES 32
#define CV_TAG_BYTES 16

typedef struct {
    crypto_poly1305_ctx poly;
} cv_mac;

/* A tag or key of 32 bytes over `data`, bound to its purpose. */
void cv_mac_derive(uint8_t out[CV_KEY_BYTES], const uint8_t key[CV_KEY_BYTES], const char *purpose, const void *data, size_t bytes);
bool cv_mac_equal32(const uint8_t a[32], const uint8_t b[32]);

/* The tag of frame number `seq` of a connection, taken in pieces. */
void cv_mac_start(cv_mac *m, const uint8_t key[CV_KEY_BYTES], uint64_t seq);
void cv_mac_add(cv_mac *m, const void *data, size_t bytes);
void cv_mac_finish(cv_mac *m, uint8_t tag[CV_TAG_BYTES]);
bool cv_mac_equal16(const uint8_t a[16], const uint8_t b[16]);

/* At most 256 bytes from the system's generator. 0, or -1 when it has none. */
int cv_random_fill(void *out, size_t bytes);

#endif
