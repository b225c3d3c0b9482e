// lines.cpp — how many 128-byte lines of memory the loads of a simdgroup touch, and how few would do.
//
// A load is what all lanes of a simdgroup read when they pass one place of the code for the n-th time. What a lane reads soon after and
// directly behind it belongs to the same load: a GPU's compiler joins such reads into one of up to 16 bytes, and a lane that walks over
// 64 bytes finds its line in the cache each time. The least is the distinct bytes over 128, rounded up. What several lanes read at one
// place in one load comes from memory once: `distinct` sums the distinct bytes of all loads.
#include <string.h>
#include <sys/mman.h>

#include "state.h"

enum { LINE = 128, MOST_JOINED = 64, OPEN_RUNS = 8, TABLE = 1 << 20 };
static running_dispatch& R = msl_running;

// Tables with open addressing, for one threadgroup: an entry of another group is free.
struct pass_entry { uint64_t key; uint32_t group, count; };            // (pc, thread): how often it came by
struct load_entry { uint64_t key; uint32_t group, buffer, bytes, lines; }; // (pc, pass, simdgroup)
struct line_entry { uint64_t load; uintptr_t line; uint64_t words[LINE / 64]; uint32_t group; };
struct tables { pass_entry passes[TABLE]; load_entry loads[TABLE]; line_entry lines[TABLE]; };
struct lane_run { uintptr_t end, start; uint64_t load; uint32_t group; };

static tables* t;
static lane_run last[MAX_THREADS][OPEN_RUNS]; // of each lane, the latest first
static uint32_t used[TABLE], n_used, counted_group; // loads of the group

static uint64_t mix(uint64_t a, uint64_t b) {
  uint64_t h = (a ^ b * 0x9e3779b97f4a7c15ull) * 0xff51afd7ed558ccdull;
  return h ^ h >> 32;
}

// At the end of a threadgroup.
static void count_loads() {
  for (uint32_t i = 0; i < n_used; i++) {
    const load_entry& l = t->loads[used[i]];
    R.d->distinct[l.buffer] += l.bytes;
    R.d->lines_touched[l.buffer] += l.lines;
    R.d->lines_least[l.buffer] += (l.bytes + LINE - 1) / LINE;
  }
  n_used = 0;
}

void msl_lines_begin() {
  memset(R.d->lines_touched, 0, sizeof R.d->lines_touched);
  memset(R.d->lines_least, 0, sizeof R.d->lines_least);
  memset(R.d->distinct, 0, sizeof R.d->distinct);
  memset(last, 0, sizeof last);
  counted_group = n_used = 0;
  if (!(R.d->flags & MSL_LINES)) return;
  if (t) munmap(t, sizeof *t);
  t = (tables*)mmap(nullptr, sizeof *t, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

void msl_lines_end() {
  if (t) count_loads();
}

static void full() {
  msl_report("LINES: a threadgroup has more loads than can be counted");
  R.fatal = true;
}

static load_entry* load_of(uint64_t key, int buffer) {
  for (uint64_t i = 0; i < TABLE; i++) {
    uint64_t at = (key + i) % TABLE;
    load_entry& l = t->loads[at];
    if (l.group == R.group && l.key == key) return &l;
    if (l.group == R.group) continue;
    l = {key, R.group, (uint32_t)buffer, 0, 0};
    used[n_used++] = (uint32_t)at;
    return &l;
  }
  return nullptr;
}

static line_entry* line_of(load_entry* l, uintptr_t line) {
  uint64_t key = mix(l->key, line);
  for (uint64_t i = 0; i < TABLE; i++) {
    line_entry& e = t->lines[(key + i) % TABLE];
    if (e.group == R.group && e.load == l->key && e.line == line) return &e;
    if (e.group == R.group) continue;
    e = {l->key, line, {0, 0}, R.group};
    l->lines++;
    return &e;
  }
  return nullptr;
}

static uint64_t load_key(uintptr_t pc, unsigned thread) {
  uint64_t key = mix(pc, thread);
  for (uint64_t i = 0; i < TABLE; i++) {
    pass_entry& e = t->passes[(key + i) % TABLE];
    if (e.group == R.group && e.key != key) continue;
    if (e.group != R.group) e = {key, R.group, 0};
    return mix(mix(pc, ++e.count), thread / 32);
  }
  return 0;
}

void msl_lines_read(uintptr_t p, size_t n, int buffer, unsigned thread, uintptr_t pc) {
  if (R.group != counted_group) {
    count_loads();
    counted_group = R.group;
  }
  lane_run* runs = last[thread];
  int k = 0;
  while (k < OPEN_RUNS && !(runs[k].group == R.group && runs[k].end == p && p + n - runs[k].start <= MOST_JOINED)) k++;
  lane_run run = k < OPEN_RUNS ? runs[k] : lane_run{p, p, load_key(pc, thread), R.group};
  memmove(&runs[1], &runs[0], (size_t)(k < OPEN_RUNS ? k : OPEN_RUNS - 1) * sizeof run);
  run.end = p + n;
  runs[0] = run;
  load_entry* l = load_of(run.load, buffer);
  for (size_t i = 0; l && i < n; i++) {
    line_entry* e = line_of(l, (p + i) / LINE);
    if (!e) return full();
    uint64_t bit = 1ull << (p + i) % 64, &word = e->words[(p + i) % LINE / 64];
    l->bytes += !(word & bit);
    word |= bit;
  }
  if (!l) full();
}
