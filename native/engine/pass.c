/* pass.c — see pass.h. */
#include "pass.h"

#include <stdlib.h>
#include <string.h>

#include "../backend/metal/metal.h"

/* The GPU is told beforehand of all memory that it will read: weights and cache. */
static int open_metal(cv_model *m, cv_backend **out, cv_err err) {
    for (size_t i = 0; i < m->n_layers; i++)
        if (!m->layers[i].moe.gate != !m->layers[i].moe.shared_gate)
            return cv_fail(err, CV_E_UNSUPPORTED, "layer %u: the Metal kernels need a part of the experts and of the shared expert on every rank, or none of both", m->layers[i].index);
    size_t n = cv_weights_extents(m->weights, NULL, 0);
    cv_memory *all = malloc((n + 2) * sizeof *all);
    if (!all) return cv_fail(err, CV_E_MEMORY, "no memory for the list of weights");
    cv_weights_extents(m->weights, all, n);
    for (size_t i = 0; i < 2; i++)
        if (m->pools[i].memory) all[n++] = (cv_memory){m->pools[i].memory, m->pools[i].bytes};
    int code = cv_backend_metal_open(&m->shape, all, n, out, err.text, err.size);
    free(all);
    return code;
}

int cv_pass_open(const void *plan, size_t plan_size, cv_group *group, cv_load_progress *progress, cv_pass *p, cv_err err) {
    int code = cv_model_open(plan, plan_size, progress, &p->model, err);
    if (code) return code;
    uint32_t device = ((const cv_plan *)plan)->device;
    code = cv_place_open(plan, group, &p->place, err);
    if (!code) code = device == CV_DEVICE_METAL ? open_metal(p->model, &p->backend, err) : cv_backend_cpu_open(&p->model->shape, &p->backend, err.text, err.size);
    if (!code) code = cv_graph_open(p->model, p->backend, &p->act, err);
    if (!code && (cv_step_open(p->model, &p->step) || cv_output_open(p->model, &p->output))) code = cv_fail(err, CV_E_MEMORY, "no memory for step tables");
    return code;
}

void cv_pass_close(cv_pass *p) {
    if (p->backend) {
        cv_graph_close(p->backend, &p->act);
        p->backend->ops->close(p->backend);
    }
    cv_step_close(&p->step);
    cv_output_close(&p->output);
    cv_model_close(p->model);
}

int cv_pass_parse(cv_pass *p, const void *bytes, size_t size, const uint32_t *last, cv_err err) { return cv_step_parse(p->model, bytes, size, last, &p->step, err); }

static void copy_pages(cv_model *m, const cv_parsed_step *s) {
    for (size_t i = 0; i < s->head->n_copies; i++) {
        const cv_step_copy *c = &s->copies[i];
        cv_kv_pool *p = &m->pools[c->pool];
        if (c->from != c->to && p->memory) memcpy((char *)p->memory + c->to * p->page_bytes, (char *)p->memory + c->from * p->page_bytes, p->page_bytes);
    }
}

int cv_pass_compute(cv_pass *p, const atomic_bool *stop, cv_err err) {
    size_t values = p->step.batch.n_tokens * p->model->shape.hidden;
    copy_pages(p->model, &p->step);
    int code = CV_OK;
    if (!cv_place_first(&p->place) && (code = cv_place_take_over(&p->place, p->act.h, values))) return cv_place_failed(&p->place, code, err);
    code = cv_graph_run(p->model, p->backend, &p->act, &p->place, &p->step.batch, p->step.logit_rows, p->step.n_logits, stop, &p->kernel_ns, err);
    if (!code && p->place.check && cv_place_splits(&p->place)) code = cv_place_compare(&p->place, p->act.h, values, err);
    return code;
}

int cv_pass_hand_over(cv_pass *p, cv_err err) {
    int code = cv_place_hand_over(&p->place, p->act.h, p->step.batch.n_tokens * p->model->shape.hidden);
    return code ? cv_place_failed(&p->place, code, err) : CV_OK;
}

int cv_pass_reserve(cv_pass *p, uint64_t ticket, void **result, size_t *size, cv_err err) {
    return cv_output_reserve(p->model, &p->step, ticket, result, size) ? cv_fail(err, CV_E_MEMORY, "no memory for the step's result") : CV_OK;
}

int cv_pass_fill(cv_pass *p, void *result, cv_err err) { return cv_output_fill(&p->output, p->model, &p->place, &p->step, p->act.logits, result, err); }
