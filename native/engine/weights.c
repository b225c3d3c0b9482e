/* weights.c — see weights.h. All arithmetic on sizes is 64 bits and checked before it is used: a Maverick expert tensor
 * has more than 2^32 elements, and a hostile plan or file must end in an error. */
#include "weights.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "memory.h"

#include "../backend/cpu/number_formats.h"

typedef struct {
    const char *path;
    const uint8_t *map; /* whole file, read only; NULL until a tensor needs it */
    uint64_t size;
    uint64_t used, copied; /* bytes of tensors that stay in the mapping, and of those that do not */
    int fd;
} file;

typedef struct {
    uint32_t slot;
    int32_t layer;
    cv_weight matrix;
    float *vector;
} tensor;

struct cv_weights {
    file *files;
    size_t n_files;
    tensor *tensors; /* sorted by slot, then layer */
    size_t n_tensors;
    void **copies;
    size_t n_copies;
    uint64_t mapped_bytes, copied_bytes;
    cv_load_progress *progress; /* while loading */
};

/* a*b, false when it does not fit. */
static bool times(uint64_t a, uint64_t b, uint64_t *out) { return !__builtin_mul_overflow(a, b, out); }
static bool plus(uint64_t a, uint64_t b, uint64_t *out) { return !__builtin_add_overflow(a, b, out); }

static const char *slot_name(uint32_t slot) {
    static const char *const names[CV_T_COUNT] = {
        "?", "embed_tokens", "norm", "lm_head", "input_layernorm", "post_attention_layernorm", "q_proj", "k_proj", "v_proj", "o_proj",
        "q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias", "gate_proj", "up_proj", "down_proj", "gate_proj.bias", "up_proj.bias",
        "down_proj.bias", "router", "experts.gate_proj", "experts.up_proj", "experts.down_proj", "shared_expert.gate_proj", "shared_expert.up_proj",
        "shared_expert.down_proj"};
    return slot < CV_T_COUNT ? names[slot] : "?";
}

/* Bytes of a row of codes or values; false for an unknown format or a width that does not fit it. */
static bool row_bytes(const cv_plan_tensor *t, uint64_t *out) {
    uint64_t bits;
    switch (t->format) {
    case CV_FORMAT_F32: bits = 32; break;
    case CV_FORMAT_F16:
    case CV_FORMAT_BF16: bits = 16; break;
    case CV_FORMAT_AFFINE:
        bits = t->bits;
        if (bits < 2 || bits > 8 || bits == 7) return false;
        if (t->scale_type != CV_F32 && t->scale_type != CV_F16 && t->scale_type != CV_BF16) return false;
        if (t->group != 32 && t->group != 64 && t->group != 128) return false;
        break;
    case CV_FORMAT_MXFP4:
        bits = 4;
        if (t->group != 32 || t->scale_type != CV_E8M0) return false;
        break;
    case CV_FORMAT_MXFP8:
        bits = 8;
        if (t->group != 32 || t->scale_type != CV_E8M0) return false;
        break;
    case CV_FORMAT_NVFP4:
        bits = 4;
        if (t->group != 16 || t->scale_type != CV_E4M3) return false;
        break;
    default: return false;
    }
    if (t->format >= CV_FORMAT_AFFINE && t->cols % t->group) return false;
    if (!times(t->cols, bits, out) || *out % 8) return false;
    *out /= 8;
    return true;
}

static size_t element_bytes(const cv_plan_tensor *t) {
    if (t->format == CV_FORMAT_F32) return 4;
    if (t->format == CV_FORMAT_F16 || t->format == CV_FORMAT_BF16) return 2;
    return t->format == CV_FORMAT_MXFP8 ? 1 : 4; /* packed codes are 32-bit words in MLX's files */
}

static size_t scale_bytes(uint32_t type) { return type == CV_F32 ? 4 : type == CV_F16 || type == CV_BF16 ? 2 : 1; }

/* The last byte that a strided view touches must lie in its file. */
static int check_view(const cv_weights *w, const cv_plan_source *s, uint64_t outer, uint64_t rows, uint64_t bytes, const cv_plan_tensor *t, const char *part, cv_err err) {
    if (s->file >= w->n_files) return cv_fail(err, CV_E_PLAN, "layer %d %s: %s are missing", t->layer, slot_name(t->slot), part);
    uint64_t a, b, end;
    if (!times(outer - 1, s->outer_stride, &a) || !times(rows - 1, s->row_stride, &b) || !plus(a, b, &end) || !plus(end, s->offset, &end) || !plus(end, bytes, &end) || end > w->files[s->file].size)
        return cv_fail(err, CV_E_PLAN, "%s: layer %d %s: %s reach beyond the end of the file (%llu bytes)", w->files[s->file].path, t->layer, slot_name(t->slot), part, (unsigned long long)w->files[s->file].size);
    return CV_OK;
}

static int map_file(file *f, cv_err err) {
    if (f->map) return CV_OK;
    void *p = mmap(NULL, (size_t)f->size, PROT_READ, MAP_PRIVATE, f->fd, 0);
    if (p == MAP_FAILED) return cv_fail(err, CV_E_IO, "%s: cannot map %llu bytes: %s", f->path, (unsigned long long)f->size, strerror(errno));
    f->map = p;
    cv_want_huge_pages(p, (size_t)f->size);
    return CV_OK;
}

static void *new_copy(cv_weights *w, uint64_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    if (bytes > SIZE_MAX - 2 * page) return NULL;
    void **list = realloc(w->copies, (w->n_copies + 1) * sizeof *list);
    if (!list) return NULL;
    w->copies = list;
    void *p = NULL;
    /* Pages of its own, as a GPU's buffers need. Kernels may read a vector past the end. */
    if (bytes >= CV_HUGE_PAGE) page = CV_HUGE_PAGE;
    const size_t size = ((size_t)bytes + 64 + page - 1) / page * page;
    if (posix_memalign(&p, page, size)) return NULL;
    if (page == CV_HUGE_PAGE) cv_want_huge_pages(p, size);
    w->copies[w->n_copies++] = p;
    w->copied_bytes += bytes;
    return p;
}

/* Counts n bytes as done; false when loading should stop. */
static bool advance(cv_weights *w, uint64_t n) {
    atomic_fetch_add_explicit(&w->progress->bytes_done, n, memory_order_relaxed);
    return !atomic_load_explicit(&w->progress->stop, memory_order_relaxed);
}

static int stopped(cv_err err) { return cv_fail(err, CV_E_ABORTED, "loading was stopped"); }

/* A view as [outer, rows, bytes]: mapped when its pointers are aligned to `align` and its rows follow each other, else copied and packed. Strips of
 * rows (a rank's columns) are copied because mapping them would keep the other ranks' columns in memory too: they share pages. */
static int place(cv_weights *w, const cv_plan_source *s, uint64_t outer, uint64_t rows, uint64_t bytes, size_t align, const uint8_t **data, size_t *row_stride, size_t *outer_stride, cv_err err) {
    file *f = &w->files[s->file];
    int code = map_file(f, err);
    if (code) return code;
    uint64_t total;
    if (!times(outer, rows, &total) || !times(total, bytes, &total)) return cv_fail(err, CV_E_PLAN, "%s: a tensor is larger than 2^64 bytes", f->path);
    bool aligned = s->offset % align == 0 && (rows == 1 || s->row_stride % align == 0) && (outer == 1 || s->outer_stride % align == 0);
    bool packed = rows == 1 || s->row_stride == bytes;
    if (aligned && packed) {
        *data = f->map + s->offset;
        *row_stride = (size_t)s->row_stride;
        *outer_stride = (size_t)s->outer_stride;
        w->mapped_bytes += total;
        f->used += total; /* done when map_in_huge_pages is */
        return CV_OK;
    }
    uint8_t *to = new_copy(w, total);
    if (!to) return cv_fail(err, CV_E_MEMORY, "%s: no memory for a copy of %llu bytes", f->path, (unsigned long long)total);
    f->copied += total;
    *data = to;
    *row_stride = (size_t)bytes;
    *outer_stride = (size_t)(rows * bytes);
    for (uint64_t e = 0; e < outer; e++) {
        const uint8_t *from = f->map + s->offset + e * s->outer_stride;
        for (uint64_t r = 0; r < rows; r++, to += bytes) {
            memcpy(to, from + r * s->row_stride, (size_t)bytes);
            if (!advance(w, bytes)) return stopped(err);
        }
    }
    return CV_OK;
}

/* Source [outer][cols][rows] to [outer][rows][cols], in tiles that stay in the cache. */
static int place_transposed(cv_weights *w, const cv_plan_tensor *t, cv_weight *m, cv_err err) {
    file *f = &w->files[t->weight.file];
    size_t size = element_bytes(t);
    int code = map_file(f, err);
    if (code) return code;
    uint64_t total;
    if (!times(t->experts, t->rows, &total) || !times(total, m->row_bytes, &total)) return cv_fail(err, CV_E_PLAN, "%s: a tensor is larger than 2^64 bytes", f->path);
    uint8_t *to = new_copy(w, total);
    if (!to) return cv_fail(err, CV_E_MEMORY, "%s: no memory for a copy of %llu bytes", f->path, (unsigned long long)total);
    f->copied += total;
    m->data = to;
    m->expert_bytes = (size_t)(t->rows * m->row_bytes);
    for (uint64_t e = 0; e < t->experts; e++)
        for (uint64_t r0 = 0; r0 < t->rows; r0 += 32) {
            if (!advance(w, (t->rows - r0 < 32 ? t->rows - r0 : 32) * m->row_bytes)) return stopped(err);
            for (uint64_t c = 0; c < t->cols; c++) {
                const uint8_t *from = f->map + t->weight.offset + e * t->weight.outer_stride + c * t->weight.row_stride;
                for (uint64_t r = r0; r < t->rows && r < r0 + 32; r++) memcpy(to + e * m->expert_bytes + r * m->row_bytes + c * size, from + r * size, size);
            }
        }
    return CV_OK;
}

static int place_tensor(cv_weights *w, const cv_plan_tensor *t, tensor *out, cv_err err) {
    cv_weight *m = &out->matrix;
    out->slot = t->slot;
    out->layer = t->layer;
    uint64_t bytes, scales;
    if (t->slot == 0 || t->slot >= CV_T_COUNT) return cv_fail(err, CV_E_PLAN, "tensor slot %u is unknown", t->slot);
    if (!t->experts || !t->rows || !t->cols || t->rows > UINT32_MAX || t->cols > UINT32_MAX || t->experts > 65536)
        return cv_fail(err, CV_E_PLAN, "layer %d %s: shape [%llu, %llu, %llu] is not possible", t->layer, slot_name(t->slot), (unsigned long long)t->experts, (unsigned long long)t->rows, (unsigned long long)t->cols);
    if (!row_bytes(t, &bytes)) return cv_fail(err, CV_E_UNSUPPORTED, "layer %d %s: format %u with %u bits, groups of %u and %llu columns is not supported", t->layer, slot_name(t->slot), t->format, t->bits, t->group, (unsigned long long)t->cols);
    *m = (cv_weight){.format = t->format, .bits = t->bits, .group = t->group, .scale_type = t->scale_type, .experts = (size_t)t->experts, .rows = (size_t)t->rows, .cols = (size_t)t->cols, .row_bytes = (size_t)bytes};
    int code;
    if (t->flags & CV_TENSOR_TRANSPOSED) {
        if (t->format > CV_FORMAT_BF16) return cv_fail(err, CV_E_UNSUPPORTED, "layer %d %s: only float tensors can be stored transposed", t->layer, slot_name(t->slot));
        code = check_view(w, &t->weight, t->experts, t->cols, t->rows * element_bytes(t), t, "weights", err);
        return code ? code : place_transposed(w, t, m, err);
    }
    if ((code = check_view(w, &t->weight, t->experts, t->rows, bytes, t, "weights", err))) return code;
    if ((code = place(w, &t->weight, t->experts, t->rows, bytes, element_bytes(t), &m->data, &m->row_bytes, &m->expert_bytes, err))) return code;
    if (t->format < CV_FORMAT_AFFINE) return CV_OK;
    size_t size = scale_bytes(t->scale_type);
    scales = t->cols / t->group * size;
    if ((code = check_view(w, &t->scales, t->experts, t->rows, scales, t, "scales", err))) return code;
    if ((code = place(w, &t->scales, t->experts, t->rows, scales, size, &m->scales, &m->scale_row_bytes, &m->expert_scale_bytes, err))) return code;
    if (t->format == CV_FORMAT_AFFINE) {
        size_t row = 0, outer = 0;
        if ((code = check_view(w, &t->biases, t->experts, t->rows, scales, t, "biases", err))) return code;
        if ((code = place(w, &t->biases, t->experts, t->rows, scales, size, &m->biases, &row, &outer, err))) return code;
        if ((t->rows > 1 && row != m->scale_row_bytes) || (t->experts > 1 && outer != m->expert_scale_bytes)) { /* one was copied, or they are sliced differently: give both the packed form */
            cv_plan_source s = t->scales, b = t->biases;
            size_t unaligned = SIZE_MAX / 2 + 1; /* no offset but 0 is a multiple: forces a copy */
            if (s.offset) code = place(w, &s, t->experts, t->rows, scales, unaligned, &m->scales, &m->scale_row_bytes, &m->expert_scale_bytes, err);
            if (!code && b.offset) code = place(w, &b, t->experts, t->rows, scales, unaligned, &m->biases, &row, &outer, err);
            if (code) return code;
            if (row != m->scale_row_bytes) return cv_fail(err, CV_E_PLAN, "layer %d %s: scales and biases are laid out differently", t->layer, slot_name(t->slot));
        }
    }
    if (t->format == CV_FORMAT_NVFP4 && t->global_scale.file != CV_NO_FILE) {
        size_t row, outer;
        const uint8_t *data;
        if ((code = check_view(w, &t->global_scale, 1, 1, t->experts * 4, t, "global scales", err))) return code;
        if ((code = place(w, &t->global_scale, 1, 1, t->experts * 4, 4, &data, &row, &outer, err))) return code;
        m->global_scale = (const float *)(const void *)data;
    }
    return CV_OK;
}

/* Vectors are few and small: always float32, padded to 16. */
static int place_vector(cv_weights *w, const cv_plan_tensor *t, tensor *out, cv_err err) {
    if (t->rows != 1 || t->experts != 1 || t->format > CV_FORMAT_BF16 || t->flags) return cv_fail(err, CV_E_PLAN, "layer %d %s: a plain float vector is expected", t->layer, slot_name(t->slot));
    int code = place_tensor(w, t, out, err);
    if (code) return code;
    out->vector = new_copy(w, (t->cols + 16) * sizeof(float));
    if (!out->vector) return cv_fail(err, CV_E_MEMORY, "no memory for layer %d %s", t->layer, slot_name(t->slot));
    memset(out->vector, 0, (size_t)(t->cols + 16) * sizeof(float));
    uint32_t type = t->format == CV_FORMAT_F32 ? CV_F32 : t->format == CV_FORMAT_F16 ? CV_F16 : CV_BF16;
    for (uint64_t i = 0; i < t->cols; i++) out->vector[i] = cv_scale_to_f32(out->matrix.data, (size_t)i, type);
    return CV_OK;
}

static bool is_vector(uint32_t slot) {
    return slot == CV_T_FINAL_NORM || slot == CV_T_ATTN_NORM || slot == CV_T_FFN_NORM || (slot >= CV_T_Q_BIAS && slot <= CV_T_O_BIAS) || (slot >= CV_T_GATE_BIAS && slot <= CV_T_DOWN_BIAS);
}

static int by_slot_and_layer(const void *x, const void *y) {
    const tensor *a = x, *b = y;
    if (a->slot != b->slot) return a->slot < b->slot ? -1 : 1;
    return a->layer < b->layer ? -1 : a->layer > b->layer;
}

static int open_files(cv_weights *w, const uint8_t *plan, const cv_plan *head, cv_err err) {
    const cv_plan_file *records = (const cv_plan_file *)(const void *)(plan + head->files_offset);
    for (size_t i = 0; i < head->n_files; i++) {
        file *f = &w->files[i];
        f->fd = -1;
        w->n_files = i + 1;
        if (records[i].path_offset >= head->total_size || !memchr(plan + records[i].path_offset, 0, (size_t)(head->total_size - records[i].path_offset)))
            return cv_fail(err, CV_E_PLAN, "the path of file %zu is not in the plan", i);
        char *path = strdup((const char *)plan + records[i].path_offset);
        if (!path) return cv_fail(err, CV_E_MEMORY, "no memory for a path");
        f->path = path;
        struct stat st;
        f->fd = open(path, O_RDONLY | O_CLOEXEC);
        if (f->fd < 0 || fstat(f->fd, &st)) return cv_fail(err, CV_E_IO, "%s: cannot open: %s", path, strerror(errno));
        f->size = (uint64_t)st.st_size;
        if (!S_ISREG(st.st_mode)) return cv_fail(err, CV_E_IO, "%s: not a plain file", path);
        if (f->size != records[i].size) return cv_fail(err, CV_E_IO, "%s: has %llu bytes, %llu are expected: it is incomplete or was changed", path, (unsigned long long)f->size, (unsigned long long)records[i].size);
        if (!f->size) return cv_fail(err, CV_E_IO, "%s: is empty", path);
    }
    return CV_OK;
}

/* Tensors that stay in their file are read by every step. Of a file that is copied for the most part nothing is gained: it is read once. */
static int map_in_huge_pages(cv_weights *w, cv_err err) {
    cv_reread reread = {.left_ms = CV_REREAD_MS, .done = &w->progress->bytes_done, .stop = &w->progress->stop};
    for (size_t i = 0; i < w->n_files; i++) {
        file *f = &w->files[i];
        const uint64_t before = atomic_load_explicit(&w->progress->bytes_done, memory_order_relaxed);
        /* Where it does not, steps are slower and nothing else. */
        if (f->used > f->copied) (void)cv_reread_in_huge_pages(f->fd, (void *)(uintptr_t)f->map, (size_t)f->size, &reread);
        /* In the end the file's tensors count, whatever else lies in it. */
        atomic_store_explicit(&w->progress->bytes_done, before + f->used, memory_order_relaxed);
        if (!advance(w, 0)) return stopped(err);
    }
    return CV_OK;
}

int cv_weights_open(const uint8_t *plan, const cv_plan *head, cv_load_progress *progress, cv_weights **out, cv_err err) {
    cv_weights *w = calloc(1, sizeof *w);
    if (!w) return cv_fail(err, CV_E_MEMORY, "no memory");
    w->progress = progress;
    w->files = calloc(head->n_files ? head->n_files : 1, sizeof *w->files);
    w->tensors = calloc(head->n_tensors ? head->n_tensors : 1, sizeof *w->tensors);
    int code = w->files && w->tensors ? open_files(w, plan, head, err) : cv_fail(err, CV_E_MEMORY, "no memory for the tensor table");
    const cv_plan_tensor *records = (const cv_plan_tensor *)(const void *)(plan + head->tensors_offset);
    for (size_t i = 0; !code && i < head->n_tensors; i++) {
        w->n_tensors = i + 1;
        code = is_vector(records[i].slot) ? place_vector(w, &records[i], &w->tensors[i], err) : place_tensor(w, &records[i], &w->tensors[i], err);
    }
    if (!code) code = map_in_huge_pages(w, err);
    if (code) {
        cv_weights_close(w);
        return code;
    }
    qsort(w->tensors, w->n_tensors, sizeof *w->tensors, by_slot_and_layer);
    for (size_t i = 1; i < w->n_tensors; i++)
        if (!by_slot_and_layer(&w->tensors[i - 1], &w->tensors[i])) {
            code = cv_fail(err, CV_E_PLAN, "layer %d %s is there twice", w->tensors[i].layer, slot_name(w->tensors[i].slot));
            cv_weights_close(w);
            return code;
        }
    w->progress = NULL;
    *out = w;
    return CV_OK;
}

void cv_weights_close(cv_weights *w) {
    if (!w) return;
    for (size_t i = 0; i < w->n_copies; i++) free(w->copies[i]);
    free(w->copies);
    for (size_t i = 0; i < w->n_files; i++) {
        file *f = &w->files[i];
        if (f->map) munmap((void *)(uintptr_t)f->map, (size_t)f->size);
        if (f->fd >= 0) close(f->fd);
        free((char *)(uintptr_t)f->path);
    }
    free(w->files);
    free(w->tensors);
    free(w);
}

static const tensor *find(const cv_weights *w, uint32_t slot, int32_t layer) {
    tensor key = {.slot = slot, .layer = layer};
    return bsearch(&key, w->tensors, w->n_tensors, sizeof key, by_slot_and_layer);
}

const cv_weight *cv_weights_matrix(const cv_weights *w, uint32_t slot, int32_t layer) {
    const tensor *t = find(w, slot, layer);
    return t ? &t->matrix : NULL;
}

const float *cv_weights_vector(const cv_weights *w, uint32_t slot, int32_t layer) {
    const tensor *t = find(w, slot, layer);
    return t ? t->vector : NULL;
}

/* Bytes from the first to the last of a strided part. */
static size_t span(const cv_weight *m, size_t outer, size_t row_stride, size_t bytes) { return (m->experts - 1) * outer + (m->rows - 1) * row_stride + bytes; }

static void add_extent(const void *p, size_t bytes, cv_memory *out, size_t room, size_t *n) {
    if (!p) return;
    if (*n < room) out[*n] = (cv_memory){p, bytes};
    ++*n;
}

size_t cv_weights_extents(const cv_weights *w, cv_memory *out, size_t room) {
    size_t n = 0;
    for (size_t i = 0; i < w->n_tensors; i++) {
        const cv_weight *m = &w->tensors[i].matrix;
        if (w->tensors[i].vector) {
            add_extent(w->tensors[i].vector, m->cols * sizeof(float), out, room, &n);
            continue;
        }
        cv_plan_tensor t = {.format = m->format, .bits = m->bits, .group = m->group, .scale_type = m->scale_type, .cols = m->cols};
        uint64_t bytes = 0;
        if (!row_bytes(&t, &bytes)) continue;
        size_t scales = m->group ? m->cols / m->group * scale_bytes(m->scale_type) : 0;
        add_extent(m->data, span(m, m->expert_bytes, m->row_bytes, (size_t)bytes), out, room, &n);
        add_extent(m->scales, span(m, m->expert_scale_bytes, m->scale_row_bytes, scales), out, room, &n);
        add_extent(m->biases, span(m, m->expert_scale_bytes, m->scale_row_bytes, scales), out, room, &n);
        add_extent(m->global_scale, m->experts * sizeof(float), out, room, &n);
    }
    return n;
}

uint64_t cv_weights_mapped_bytes(const cv_weights *w) { return w->mapped_bytes; }
uint64_t cv_weights_copied_bytes(const cv_weights *w) { return w->copied_bytes; }
