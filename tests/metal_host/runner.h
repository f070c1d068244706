// What the runner's files share: buffers, the thread that runs now, and how a run fails.
#pragma once
#include <cstddef>
#include <cstdint>

#include "thread_ids.h"

enum : uint32_t { OUTPUT = 1, INITIALISED = 2, ATOMIC = 4 };

struct Buffer {  // mirrored by ctypes in memory.py
  const char* name;
  uint64_t pointer, address, bytes;  // what the kernel gets; the memory around it
  uint32_t item, flags;
  uint64_t loaded, stored;  // bytes, summed over all threads
  uint64_t unwritten;       // elements of an output that no thread stored
};

struct Dispatch {  // mirrored by ctypes in memory.py
  uint32_t grid[3], group[3];
  uint64_t seed;
  uint64_t most_loads;  // out: of one thread, counted by element
  uint64_t flush;       // whether denormal numbers are flushed to 0, as Apple's GPUs do
};

struct Thread {
  HostIds ids;
  uint32_t number;        // 1 + linear position in the grid; 0 means nobody
  const char* stack_top;  // its frames lie below
  uint64_t loads;         // from buffers so far
};

extern "C" void host_kernel(const uint64_t* buffers, const HostIds* ids);  // generated with each kernel

extern Thread* now;
extern Dispatch* dispatch;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void call_kernel();
uint64_t random_below(uint64_t n);
void shuffle(uint32_t* items, size_t n);

struct Point {
  uint32_t x[3];
};
inline Point unravel(uint64_t i, Point size) {
  return {{uint32_t(i % size.x[0]), uint32_t(i / size.x[0] % size.x[1]),
           uint32_t(i / size.x[0] / size.x[1])}};
}
inline uint64_t volume(Point p) { return uint64_t(p.x[0]) * p.x[1] * p.x[2]; }
Point group_size();    // threads in a full group
Point group_counts();  // groups per axis, the partial ones included
Point group_extent(Point group);  // threads in this group
void place(Thread& thread, Point group, Point local);

// access.cpp
void watch(Buffer* buffers, int count);
void count_unwritten();

// groups.cpp: linked only when the kernel shares memory or meets other threads.
__attribute__((weak)) void run_groups();
__attribute__((weak)) bool group_access(uintptr_t address, size_t bytes, bool store);
