/* late_masks.h — masks that come behind their step (CV_ROW_MASK_LATER): made while the step is computed, waited for before it samples. */
#ifndef CV_LATE_MASKS_H
#define CV_LATE_MASKS_H

#include <stdbool.h>

#include "place.h"
#include "step.h"

typedef struct {
    /* What the other ranks receive: the header, then the masks of all rows that wait for some, in their order; NULL: no row does. */
    cv_word *word;
    size_t word_size;
    size_t missing; /* rows whose masks have not come */
    bool *given;    /* [n_rows] */
} cv_late_masks;

/* Room for the masks of a step that has been checked. CV_E_MEMORY. */
int cv_late_open(cv_late_masks *l, const cv_parsed_step *s);
void cv_late_close(cv_late_masks *l);

/* The masks of a row, once; NULL: its sample does not matter, any token will do. CV_E_ARGUMENT: the row waits for none, or for others. */
int cv_late_give(cv_late_masks *l, const cv_step_row *rows, size_t n_rows, size_t vocab, size_t row, const void *masks, size_t size, cv_err err);

/* The masks, as cv_parsed_step.late has them. */
static inline const uint32_t *cv_late_bits(const cv_word *word) { return (const uint32_t *)(const void *)(word + 1); }

#endif
