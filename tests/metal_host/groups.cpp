// Kernels that share threadgroup memory, wait at barriers or use SIMD-group functions: one fiber per thread.
#include "runner.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace {

constexpr size_t STACK = 128 << 10, SHARED = 32 << 10, GUARD = 64, MOST_THREADS = 1024;
constexpr uint32_t MANY = UINT32_MAX;

enum State { READY, AT_SIMD, AT_BARRIER, DONE };

struct Fiber : Thread {
  ucontext_t context;
  State state;
  int kind;        // of the SIMD operation it waits at
  uint32_t turns;  // SIMD operations so far: which of the two slot sets is next
  uint32_t barriers, simd_barriers;
};

struct Simdgroup {
  unsigned char slots[2][32][16];
  uint32_t active[2];
};

// The last thread that read or wrote a byte of threadgroup memory, and between which barriers.
struct Visit {
  uint32_t thread, simdgroup, barriers, simd_barriers;
};
struct Array {  // one declaration in threadgroup memory
  int site;
  size_t offset, bytes;
  std::vector<Visit> writer, reader;
};

std::vector<Fiber> fibers;
std::vector<Simdgroup> simdgroups;
std::vector<Array> arrays;
std::vector<uint32_t> turn, group_order;
alignas(64) char shared[SHARED + 64 * GUARD];
char* stacks;
ucontext_t scheduler;

Fiber& self() { return static_cast<Fiber&>(*now); }
uint32_t simdgroup_of(const Thread& t) { return t.ids.simdgroup_index_in_threadgroup[0]; }

void wait(State state) {
  Fiber& me = self();
  me.state = state;
  swapcontext(&me.context, &scheduler);
}

void fiber_main() {
  call_kernel();
  wait(DONE);
}

void start(Fiber& f, size_t i, Point group, Point local) {
  place(f, group, local);
  f.state = READY;
  f.kind = 0;
  f.turns = f.barriers = f.simd_barriers = 0;
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = stacks + i * STACK;
  f.context.uc_stack.ss_size = STACK;
  f.context.uc_link = nullptr;
  f.stack_top = stacks + (i + 1) * STACK;
  makecontext(&f.context, fiber_main, 0);
}

void start_group(Point group) {
  Point extent = group_extent(group);
  size_t n = volume(extent);
  fibers.resize(n);
  simdgroups.assign((n + 31) / 32, {});
  arrays.clear();
  memset(shared, 0xff, sizeof(shared));
  turn.resize(n);
  for (size_t i = 0; i < n; ++i) turn[i] = uint32_t(i), start(fibers[i], i, group, unravel(i, extent));
}

void run_ready() {
  shuffle(turn.data(), turn.size());
  for (uint32_t i : turn) {
    if (fibers[i].state != READY) continue;
    now = &fibers[i];
    swapcontext(&scheduler, &fibers[i].context);
  }
}

// Lets the lanes of one SIMD-group go on when all that still run have come to the same operation.
bool release_simdgroup(size_t first) {
  size_t last = std::min(first + 32, fibers.size());
  uint32_t active = 0;
  const Fiber* waiting = nullptr;
  for (size_t i = first; i < last; ++i)
    if (fibers[i].state == AT_SIMD) active |= 1u << (i - first), waiting = &fibers[i];
  if (!waiting) return false;
  for (size_t i = first; i < last; ++i) {
    Fiber& f = fibers[i];
    now = &f;
    if (f.state == AT_BARRIER || (f.state == AT_SIMD && f.kind != waiting->kind))
      fail("diverges: lanes of its SIMD-group wait at different operations");
    if (f.state == AT_SIMD) f.state = READY;
  }
  simdgroups[first / 32].active[waiting->turns % 2] = active;
  return true;
}

// Returns whether any thread of the group can go on.
bool release() {
  bool any = false;
  for (size_t first = 0; first < fibers.size(); first += 32) any |= release_simdgroup(first);
  if (any) return true;
  size_t done = 0;
  for (Fiber& f : fibers) done += f.state == DONE;
  if (done == fibers.size()) return false;
  for (Fiber& f : fibers) {
    now = &f;
    if (f.state == DONE) fail("returns while other threads of its group wait at threadgroup_barrier");
    f.state = READY;
    ++f.barriers;
  }
  return true;
}

// ---- Threadgroup memory: bounds, reads before any write, races between barriers.
bool unordered(const Visit& v, const Visit& me) {
  return v.thread && v.thread != me.thread && v.barriers == me.barriers &&
         (v.simdgroup != me.simdgroup || v.simd_barriers == me.simd_barriers);
}

void visit(Array& a, size_t i, const Visit& me, bool store) {
  Visit &writer = a.writer[i], &reader = a.reader[i];
  if (!store && !writer.thread)
    fail("reads byte %zu of threadgroup array %d before it is written", i, a.site);
  if (unordered(writer, me) || (store && unordered(reader, me)))
    fail("race: byte %zu of threadgroup array %d is %s without a barrier in between", i, a.site,
         store ? "written after another thread used it" : "read after another thread wrote it");
  if (store) {
    writer = me;
    return;
  }
  bool together = unordered(reader, me);
  uint32_t simdgroup = together && reader.simdgroup != me.simdgroup ? MANY : me.simdgroup;
  reader = {together ? MANY : me.thread, simdgroup, me.barriers, me.simd_barriers};
}

}  // namespace

bool group_access(uintptr_t address, size_t bytes, bool store) {
  size_t offset = address - uintptr_t(shared);
  if (offset >= sizeof(shared)) return false;
  Fiber& f = self();
  Visit me = {f.number, simdgroup_of(f), f.barriers, f.simd_barriers};
  for (Array& a : arrays) {
    if (offset < a.offset || offset + bytes > a.offset + a.bytes) continue;
    for (size_t i = offset - a.offset; i < offset - a.offset + bytes; ++i) visit(a, i, me, store);
    return true;
  }
  fail("out of bounds: %s %zu bytes of threadgroup memory outside its arrays",
       store ? "stores" : "loads", bytes);
}

void make_stacks() {  // once: a failed run never comes back here
  void* memory = mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for %zu stacks", MOST_THREADS);
  stacks = static_cast<char*>(memory);
}

void run_groups() {
  Point counts = group_counts();
  if (!stacks) make_stacks();
  group_order.resize(volume(counts));
  for (size_t i = 0; i < group_order.size(); ++i) group_order[i] = uint32_t(i);
  shuffle(group_order.data(), group_order.size());
  for (uint32_t g : group_order) {
    start_group(unravel(g, counts));
    do run_ready();
    while (release());
  }
}

extern "C" {

void* host_threadgroup(int site, uint64_t bytes) {
  size_t end = 0, used = 0;
  for (const Array& a : arrays) {
    if (a.site == site) return shared + a.offset;
    end = a.offset + a.bytes;
    used += a.bytes;
  }
  if (used + bytes > SHARED) fail("more than 32 KB of threadgroup memory");
  size_t offset = (end + GUARD + 15) / 16 * 16;
  arrays.push_back({site, offset, bytes, std::vector<Visit>(bytes), std::vector<Visit>(bytes)});
  return shared + offset;
}

void host_barrier() { wait(AT_BARRIER); }

uint32_t host_exchange(int kind, const void* mine, uint32_t size, void* all, uint32_t* lane) {
  Fiber& me = self();
  Simdgroup& group = simdgroups[simdgroup_of(me)];
  uint32_t set = me.turns % 2;
  *lane = me.ids.thread_index_in_simdgroup[0];
  memcpy(group.slots[set][*lane], mine, size);
  me.kind = kind;
  wait(AT_SIMD);
  ++me.turns;
  if (kind == 0) ++me.simd_barriers;
  uint32_t active = group.active[set];
  memset(all, 0xff, 32 * size);
  for (uint32_t i = 0; i < 32; ++i)
    if (active >> i & 1) memcpy(static_cast<char*>(all) + i * size, group.slots[set][i], size);
  return active;
}
}
