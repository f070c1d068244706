// Watches every load and store of a kernel: bounds, bytes, races, elements that nobody wrote.
#include "runner.h"

#include <cstring>
#include <vector>

namespace {

constexpr uint32_t MANY = UINT32_MAX;
struct Shadow {  // who touched each element of an output
  std::vector<uint32_t> writer, reader;
};

Buffer* buffers;
int buffer_count;
std::vector<Shadow> shadows;

void touch_element(Buffer& b, Shadow& shadow, uint64_t i, bool store) {
  uint32_t me = now->number, &writer = shadow.writer[i], &reader = shadow.reader[i];
  bool shared = b.flags & ATOMIC, initialised = b.flags & INITIALISED;
  if (!shared && writer && writer != me)
    fail("race: element %lu of '%s' is %s here and written by another thread", i, b.name,
         store ? "written" : "read");
  if (store && !shared && reader && reader != me)
    fail("race: element %lu of '%s' is written here and read by another thread", i, b.name);
  if (!store && !writer && !initialised) fail("reads element %lu of '%s' before it is written", i, b.name);
  if (store) writer = me;
  else reader = reader && reader != me ? MANY : me;
}

void touch_output(Buffer& b, uint64_t offset, size_t n, bool store) {
  if (offset % b.item || n % b.item)
    fail("touches %zu bytes at byte %lu of '%s': not whole elements of %u bytes", n, offset, b.name, b.item);
  Shadow& shadow = shadows[&b - buffers];
  for (uint64_t i = offset / b.item; i < (offset + n) / b.item; ++i) touch_element(b, shadow, i, store);
}

[[noreturn]] void out_of_bounds(uintptr_t address, size_t n, bool store) {
  const Buffer* nearest = nullptr;
  uint64_t best = UINT64_MAX;
  for (const Buffer* b = buffers; b < buffers + buffer_count; ++b) {
    uint64_t away = address < b->address ? b->address - address : address - b->address - b->bytes;
    if (address - b->address < b->bytes) away = 0;
    if (away < best) best = away, nearest = b;
  }
  if (!nearest) fail("%s %zu bytes outside every buffer", store ? "stores" : "loads", n);
  fail("out of bounds: %s %zu bytes at byte %ld of '%s', which has %lu", store ? "stores" : "loads", n,
       long(address - nearest->address), nearest->name, nearest->bytes);
}

extern "C" __attribute__((visibility("hidden"))) char __ehdr_start, __bss_start;

// A kernel's own variables, and its constant tables, which lie in this library.
bool own_memory(uintptr_t address, bool store) {
  uintptr_t frame = uintptr_t(__builtin_frame_address(0)), top = uintptr_t(now->stack_top);
  bool table = address >= uintptr_t(&__ehdr_start) && address < uintptr_t(&__bss_start);
  return (address >= frame && address < top) || (table && !store);
}

void touch(uintptr_t address, size_t n, bool store) {
  for (Buffer* b = buffers; b < buffers + buffer_count; ++b) {
    uint64_t offset = address - b->address;
    if (offset >= b->bytes) continue;
    if (offset + n > b->bytes) out_of_bounds(address, n, store);
    (store ? b->stored : b->loaded) += n;
    if (!store && ++now->loads > dispatch->most_loads) dispatch->most_loads = now->loads;
    if (b->flags & OUTPUT) touch_output(*b, offset, n, store);
    else if (store) fail("stores into the input '%s'", b->name);
    return;
  }
  if (group_access && group_access(address, n, store)) return;
  if (!own_memory(address, store)) out_of_bounds(address, n, store);
}

}  // namespace

void watch(Buffer* bufs, int count) {
  buffers = bufs, buffer_count = count;
  shadows.assign(count, {});
  for (int i = 0; i < count; ++i) {
    if (!(bufs[i].flags & OUTPUT)) continue;
    shadows[i].writer.assign(bufs[i].bytes / bufs[i].item, 0);
    shadows[i].reader.assign(bufs[i].bytes / bufs[i].item, 0);
  }
}

void count_unwritten() {
  for (int i = 0; i < buffer_count; ++i)
    for (uint32_t writer : shadows[i].writer) buffers[i].unwritten += writer == 0;
  shadows.clear();
}

extern "C" {

// Called by the code that -fsanitize=kernel-address puts in front of each access.
#define ACCESS(n)                                                                            \
  void __asan_load##n##_noabort(uintptr_t a) { touch(a, n, false); }                         \
  void __asan_store##n##_noabort(uintptr_t a) { touch(a, n, true); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
void __asan_loadN_noabort(uintptr_t a, size_t n) { touch(a, n, false); }
void __asan_storeN_noabort(uintptr_t a, size_t n) { touch(a, n, true); }
void __asan_handle_no_return() {}
void* __asan_memcpy(void* to, const void* from, size_t n) {
  if (n) touch(uintptr_t(from), n, false), touch(uintptr_t(to), n, true);
  return memcpy(to, from, n);
}
void* __asan_memmove(void* to, const void* from, size_t n) {
  if (n) touch(uintptr_t(from), n, false), touch(uintptr_t(to), n, true);
  return memmove(to, from, n);
}
void* __asan_memset(void* to, int byte, size_t n) {
  if (n) touch(uintptr_t(to), n, true);
  return memset(to, byte, n);
}

// Called by -fsanitize=alignment,... where the language leaves the result undefined.
struct Where {
  const char* file;
  uint32_t line, column;
};
#define UNDEFINED(kind, what)                                                                \
  void __ubsan_handle_##kind##_abort(const Where* at) {                                      \
    fail("line %u of the source: %s", at->line, what);                                       \
  }
UNDEFINED(type_mismatch_v1, "a misaligned load or store")
UNDEFINED(out_of_bounds, "an index out of its array's bounds")
UNDEFINED(divrem_overflow, "an integer division by zero, or one that overflows")
UNDEFINED(add_overflow, "a signed integer addition overflows")
UNDEFINED(sub_overflow, "a signed integer subtraction overflows")
UNDEFINED(mul_overflow, "a signed integer multiplication overflows")
UNDEFINED(negate_overflow, "a signed integer negation overflows")
}
