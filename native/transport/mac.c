/* mac.c — see mac.h. */
#include "mac.h"

#include <string.h>
#if defined(__APPLE__)
#include <sys/random.h>
#else
#include <unistd.h>
#endif

void cv_mac_derive(uint8_t out[CV_KEY_BYTES], const uint8_t key[CV_KEY_BYTES], const char *purpose, const void *data, size_t bytes) {
    crypto_blake2b_ctx ctx;
    crypto_blake2b_keyed_init(&ctx, CV_KEY_BYTES, key, CV_KEY_BYTES);
    /* The zero behind the purpose keeps "a" + "bc" and "ab" + "c" apart. */
    crypto_blake2b_update(&ctx, (const uint8_t *)purpose, strlen(purpose) + 1);
    crypto_blake2b_update(&ctx, data, bytes);
    crypto_blake2b_final(&ctx, out);
}

bool cv_mac_equal32(const uint8_t a[32], const uint8_t b[32]) { return crypto_verify32(a, b) == 0; }

void cv_mac_start(cv_mac *m, const uint8_t key[CV_KEY_BYTES], uint64_t seq) {
    uint8_t nonce[12] = {0}, once[32];
    for (int i = 0; i < 8; i++) nonce[4 + i] = (uint8_t)(seq >> (8 * i));
    crypto_chacha20_ietf(once, NULL, sizeof once, key, nonce, 0);
    crypto_poly1305_init(&m->poly, once);
    crypto_wipe(once, sizeof once);
}

void cv_mac_add(cv_mac *m, const void *data, size_t bytes) { crypto_poly1305_update(&m->poly, data, bytes); }

void cv_mac_finish(cv_mac *m, uint8_t tag[CV_TAG_BYTES]) { crypto_poly1305_final(&m->poly, tag); }

bool cv_mac_equal16(const uint8_t a[16], const uint8_t b[16]) { return crypto_verify16(a, b) == 0; }

int cv_random_fill(void *out, size_t bytes) { return getentropy(out, bytes); }
