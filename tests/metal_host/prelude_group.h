// Threadgroup memory, barriers and SIMD-group functions: each thread of a group is a fiber that waits in the runner.
#pragma once

extern "C" {
// Memory shared by the group for its declaration number `site`.
threadgroup void* host_threadgroup(int site, ulong bytes);
void host_barrier(void);
// Waits for the lanes of the SIMD-group; fills `all` with their 32 values (0xFF bytes for lanes that are not
// there), `lane` with this thread's own, and returns the mask of active lanes. `kind` tells operations apart.
uint host_exchange(int kind, thread const void* mine, uint size, thread void* all, thread uint* lane);
}

// The body's `threadgroup float x[32];` is rewritten to this: clang takes such a variable only in a plain kernel.
#define HOST_THREADGROUP(site, type, name, ...)                                              \
  threadgroup type(&name) __VA_ARGS__ =                                                      \
      *(threadgroup type(*) __VA_ARGS__)host_threadgroup(site, sizeof(type __VA_ARGS__))

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

template <typename T>
struct Lanes {
  T value[32];
  uint lane, active;
  Lanes(int kind, T mine) { active = host_exchange(kind, &mine, sizeof(T), value, &lane); }
  bool has(uint i) const { return i < 32u && (active >> i & 1u); }
};

// Sums of bf16 are taken in fp32, as MLX's bf16_math.h does.
template <typename T> struct Sum { typedef T type; };
template <> struct Sum<bfloat> { typedef float type; };

inline void threadgroup_barrier(mem_flags) { host_barrier(); }
inline void simdgroup_barrier(mem_flags) { Lanes<uint>(0, 0u); }

#define HOST_SIMD_FOLD(name, kind, start, step)                                              \
  template <typename T> T name(T x) {                                                        \
    Lanes<T> all(kind, x);                                                                   \
    typename Sum<T>::type total = start;                                                     \
    for (uint i = 0; i < 32u; ++i)                                                           \
      if (all.has(i)) total = step(typename Sum<T>::type(all.value[i]));                     \
    return T(total);                                                                         \
  }
#define HOST_ADD(v) total + v
#define HOST_MULTIPLY(v) total * v
#define HOST_MIN(v) min(total, v)
#define HOST_MAX(v) max(total, v)
HOST_SIMD_FOLD(simd_sum, 1, 0, HOST_ADD)
HOST_SIMD_FOLD(simd_product, 2, 1, HOST_MULTIPLY)
HOST_SIMD_FOLD(simd_min, 3, x, HOST_MIN)
HOST_SIMD_FOLD(simd_max, 4, x, HOST_MAX)

// A lane outside the SIMD-group leaves the value as it was; one inside that is not active gives garbage (0xFF).
#define HOST_SIMD_SHUFFLE(name, kind, source)                                                \
  template <typename T> T name(T x, ushort n) {                                              \
    Lanes<T> all(kind, x);                                                                   \
    uint from = source;                                                                      \
    return from < 32u ? all.value[from] : x;                                                 \
  }
HOST_SIMD_SHUFFLE(simd_shuffle, 5, n)
HOST_SIMD_SHUFFLE(simd_shuffle_down, 6, all.lane + n)
HOST_SIMD_SHUFFLE(simd_shuffle_up, 7, all.lane - n)
HOST_SIMD_SHUFFLE(simd_shuffle_xor, 8, all.lane ^ n)
HOST_SIMD_SHUFFLE(simd_broadcast, 9, n)

template <typename T> T simd_broadcast_first(T x) {
  Lanes<T> all(10, x);
  return all.value[__builtin_ctz(all.active)];
}
template <typename T> T simd_prefix_inclusive_sum(T x) {
  Lanes<T> all(11, x);
  typename Sum<T>::type total = 0;
  for (uint i = 0; i <= all.lane; ++i)
    if (all.has(i)) total = total + all.value[i];
  return T(total);
}
template <typename T> T simd_prefix_exclusive_sum(T x) {
  Lanes<T> all(12, x);
  typename Sum<T>::type total = 0;
  for (uint i = 0; i < all.lane; ++i)
    if (all.has(i)) total = total + all.value[i];
  return T(total);
}
inline bool simd_any(bool x) { return simd_max(int(x)) != 0; }
inline bool simd_all(bool x) { return simd_min(int(x)) != 0; }

} // namespace metal

// Words that OpenCL reserves and Metal does not.
#define generic generic_
#define global global_
#define local local_
#define pipe pipe_
