/* late_masks.c — see late_masks.h. */
#include "late_masks.h"

#include <stdlib.h>
#include <string.h>

static const size_t alignment = 64;

int cv_late_open(cv_late_masks *l, const cv_parsed_step *s) {
    *l = (cv_late_masks){0};
    if (!s->n_late) return CV_OK;
    size_t bytes = (s->n_late * s->mask_words * sizeof(uint32_t) + 7) & ~(size_t)7;
    void *word = NULL;
    l->given = calloc(s->head->n_rows, sizeof *l->given);
    if (!l->given || posix_memalign(&word, alignment, sizeof(cv_word) + bytes)) {
        cv_late_close(l);
        return CV_E_MEMORY;
    }
    l->word = word;
    l->word_size = sizeof(cv_word) + bytes;
    *l->word = (cv_word){.kind = CV_WORD_MASKS, .step_size = bytes};
    for (uint32_t i = 0; i < s->head->n_rows; i++) l->missing += (s->rows[i].flags & CV_ROW_MASK_LATER) != 0;
    return CV_OK;
}

void cv_late_close(cv_late_masks *l) {
    free(l->word);
    free(l->given);
    *l = (cv_late_masks){0};
}

int cv_late_give(cv_late_masks *l, const cv_step_row *rows, size_t n_rows, size_t vocab, size_t row, const void *masks, size_t size, cv_err err) {
    if (row >= n_rows || !(rows[row].flags & CV_ROW_MASK_LATER) || l->given[row]) return cv_fail(err, CV_E_ARGUMENT, "row %zu waits for no masks", row);
    size_t words = cv_mask_words(vocab), first = 0;
    for (size_t i = 0; i < row; i++) first += rows[i].flags & CV_ROW_MASK_LATER ? cv_row_masks(&rows[i]) : 0;
    size_t bytes = cv_row_masks(&rows[row]) * words * sizeof(uint32_t);
    if (masks && size != bytes) return cv_fail(err, CV_E_ARGUMENT, "row %zu: masks of %zu bytes instead of %zu", row, size, bytes);
    uint32_t *out = (uint32_t *)(void *)(l->word + 1) + first * words;
    if (masks) memcpy(out, masks, bytes);
    else memset(out, 0xff, bytes);
    l->given[row] = true;
    l->missing--;
    return CV_OK;
}
