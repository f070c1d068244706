// Runs a kernel over its grid in shuffled order, as plain calls.
#include "runner.h"

#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <vector>

Thread* now;
Dispatch* dispatch;

namespace {

std::vector<uint64_t> pointers;
std::vector<uint32_t> order;
Thread plain;
uint64_t random_state;
jmp_buf stop;
char* message;
size_t message_size;

}  // namespace

void fail(const char* format, ...) {
  int n = 0;
  if (now) {
    const unsigned* p = now->ids.thread_position_in_grid;
    n = snprintf(message, message_size, "thread (%u, %u, %u): ", p[0], p[1], p[2]);
  }
  va_list args;
  va_start(args, format);
  vsnprintf(message + n, message_size - n, format, args);
  va_end(args);
  longjmp(stop, 1);
}

uint64_t random_below(uint64_t n) {  // splitmix64
  uint64_t z = (random_state += 0x9e3779b97f4a7c15);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return uint64_t((__uint128_t(z ^ (z >> 31)) * n) >> 64);
}

void shuffle(uint32_t* items, size_t n) {
  for (size_t i = n; i > 1; --i) {
    size_t j = random_below(i);
    uint32_t item = items[i - 1];
    items[i - 1] = items[j];
    items[j] = item;
  }
}

void call_kernel() { host_kernel(pointers.data(), &now->ids); }

// ---- Where a thread stands. Metal trims the group to the grid, and the last group of an axis may be partial.
Point group_size() {
  Point size;
  for (int a = 0; a < 3; ++a)
    size.x[a] = dispatch->group[a] < dispatch->grid[a] ? dispatch->group[a] : dispatch->grid[a];
  return size;
}

Point group_counts() {
  Point size = group_size(), counts;
  for (int a = 0; a < 3; ++a) counts.x[a] = (dispatch->grid[a] + size.x[a] - 1) / size.x[a];
  return counts;
}

Point group_extent(Point group) {
  Point size = group_size(), extent;
  for (int a = 0; a < 3; ++a) {
    uint32_t left = dispatch->grid[a] - group.x[a] * size.x[a];
    extent.x[a] = left < size.x[a] ? left : size.x[a];
  }
  return extent;
}

void place(Thread& thread, Point group, Point local) {
  Point size = group_size(), counts = group_counts(), extent = group_extent(group);
  HostIds& ids = thread.ids;
  auto put = [](unsigned (&to)[3], uint32_t x) { to[0] = x, to[1] = to[2] = 0; };
  for (int a = 0; a < 3; ++a) {
    ids.dispatch_threads_per_threadgroup[a] = size.x[a];
    ids.grid_origin[a] = 0;
    ids.grid_size[a] = ids.threads_per_grid[a] = dispatch->grid[a];
    ids.thread_position_in_grid[a] = group.x[a] * size.x[a] + local.x[a];
    ids.thread_position_in_threadgroup[a] = local.x[a];
    ids.threadgroup_position_in_grid[a] = group.x[a];
    ids.threadgroups_per_grid[a] = counts.x[a];
    ids.threads_per_threadgroup[a] = extent.x[a];
  }
  uint32_t index = (local.x[2] * extent.x[1] + local.x[1]) * extent.x[0] + local.x[0];
  uint32_t full = volume(size), here = volume(extent);
  put(ids.thread_index_in_threadgroup, index);
  put(ids.thread_index_in_simdgroup, index % 32);
  put(ids.simdgroup_index_in_threadgroup, index / 32);
  put(ids.simdgroups_per_threadgroup, (here + 31) / 32);
  put(ids.dispatch_simdgroups_per_threadgroup, (full + 31) / 32);
  put(ids.thread_index_in_quadgroup, index % 4);
  put(ids.quadgroup_index_in_threadgroup, index / 4);
  put(ids.quadgroups_per_threadgroup, (here + 3) / 4);
  put(ids.dispatch_quadgroups_per_threadgroup, (full + 3) / 4);
  put(ids.threads_per_simdgroup, 32);
  put(ids.thread_execution_width, 32);
  const unsigned* p = ids.thread_position_in_grid;
  thread.loads = 0;
  thread.number = 1 + (p[2] * dispatch->grid[1] + p[1]) * dispatch->grid[0] + p[0];
}

namespace {

void run_plain() {
  Point grid = {{dispatch->grid[0], dispatch->grid[1], dispatch->grid[2]}}, size = group_size();
  order.resize(volume(grid));
  for (size_t i = 0; i < order.size(); ++i) order[i] = uint32_t(i);
  shuffle(order.data(), order.size());
  for (uint32_t i : order) {
    Point at = unravel(i, grid), group, local;
    for (int a = 0; a < 3; ++a) group.x[a] = at.x[a] / size.x[a], local.x[a] = at.x[a] % size.x[a];
    place(plain, group, local);
    now = &plain;
    call_kernel();
  }
}

}  // namespace

// Sets the processor to flush denormal numbers, read and computed, and back.
class Flushed {
 public:
  explicit Flushed(bool flush) : before(get()) {
    if (flush) set(before | FLUSH);
  }
  ~Flushed() { set(before); }

 private:
#ifdef __x86_64__
  static constexpr uint64_t FLUSH = 0x8040;
  static uint64_t get() { return __builtin_ia32_stmxcsr(); }
  static void set(uint64_t bits) { __builtin_ia32_ldmxcsr(uint32_t(bits)); }
#else
  static constexpr uint64_t FLUSH = 1 << 24;
  static uint64_t get() { return __builtin_aarch64_get_fpcr(); }
  static void set(uint64_t bits) { __builtin_aarch64_set_fpcr(uint32_t(bits)); }
#endif
  uint64_t before;
};

extern "C" int host_run(Buffer* buffers, int count, Dispatch* how, char* text, size_t size) {
  message = text, message_size = size;
  dispatch = how, random_state = how->seed, now = nullptr;
  pointers.clear();
  for (int i = 0; i < count; ++i) pointers.push_back(buffers[i].pointer);
  plain.stack_top = static_cast<const char*>(__builtin_frame_address(0));
  watch(buffers, count);
  Flushed flushed(how->flush);
  if (setjmp(stop)) return 1;
  if (run_groups) run_groups();
  else run_plain();
  count_unwritten();
  return 0;
}
