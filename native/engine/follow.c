/* follow.c — the compute thread of a rank > 0: receives steps from rank 0 and computes its part of them, until rank 0 lets it go or
 * the group fails. Whatever fails here ends the group: the ranks must not drift apart. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine_state.h"

/* The masks that rank 0 sends behind a step that has said so. *word is to be freed. */
static int take_masks(cv_pass *p, uint64_t ticket, cv_word **word, cv_err err) {
    if (!p->step.n_late) return CV_OK;
    int code = cv_place_receive_word(&p->place, word, err);
    if (code) return code;
    size_t bytes = p->step.n_late * p->step.mask_words * sizeof(uint32_t);
    if ((*word)->kind != CV_WORD_MASKS || (*word)->ticket != ticket || (*word)->step_size < bytes) return cv_fail(err, CV_E_GROUP, "rank 0 sent something else than a step's masks");
    p->step.late = cv_late_bits(*word);
    return CV_OK;
}

static int follow(cv_engine *e, cv_word *word, cv_err err) {
    cv_pass *p = &e->pass;
    cv_place *place = &p->place;
    const cv_step *step = (const cv_step *)(const void *)(word + 1);
    const uint32_t *last = (const uint32_t *)(const void *)((const uint8_t *)(word + 1) + word->step_size);
    uint64_t start = cv_now_ns();
    void *result = NULL;
    size_t size = 0;
    cv_word *masks = NULL;
    place->timeout_ms = word->timeout_ms;
    if (word->step_size < sizeof *step || step->n_rows != word->n_rows) return cv_fail(err, CV_E_GROUP, "rank 0 sent a step of another number of rows than it says");
    int code = cv_pass_parse(p, step, (size_t)word->step_size, last, err);
    if (!code && cv_place_last(place)) code = cv_pass_reserve(p, word->ticket, &result, &size, err);
    if (!code) code = cv_pass_compute(p, &e->stop, err);
    if (!code && cv_place_last(place)) code = take_masks(p, word->ticket, &masks, err);
    if (!code && cv_place_last(place)) {
        code = cv_pass_fill(p, result, err);
        if (!code && place->n_stages > 1 && place->tensor_rank == 0 && (code = cv_place_send_result(place, word->ticket, result, size))) code = cv_place_failed(place, code, err);
    } else if (!code) {
        code = cv_pass_hand_over(p, err);
    }
    free(result);
    free(masks);
    cv_engine_count(e, code ? 0 : p->step.batch.n_tokens, cv_now_ns() - start);
    return code;
}

void *cv_follow_main(void *engine) {
    cv_engine *e = engine;
    cv_place *place = &e->pass.place;
    char text[CV_TEXT] = "";
    cv_err err = {text, sizeof text};
    int code;
    for (bool going = true; going;) {
        cv_word *word = NULL;
        code = cv_place_receive_word(place, &word, err);
        if (!code && word->kind == CV_WORD_MASKS) code = cv_fail(err, CV_E_GROUP, "rank 0 sent masks of no step");
        going = !code && word->kind == CV_WORD_STEP;
        if (going) code = follow(e, word, err);
        free(word);
        going = going && !code;
    }
    if (code) {
        char why[CV_TEXT + 32];
        snprintf(why, sizeof why, "rank %u: %s", place->rank, text);
        cv_group_abort(place->group, why); /* an earlier error of the group stays */
    }
    pthread_mutex_lock(&e->queue.lock);
    e->followed = true;
    e->follow_code = code;
    memcpy(e->follow_text, text, sizeof text);
    pthread_mutex_unlock(&e->queue.lock);
    cv_queue_ring(&e->queue);
    return NULL;
}
