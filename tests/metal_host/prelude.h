// What Metal's standard library and MLX's utils.h give a kernel, for clang's C++ for OpenCL.
// Only what kernels here need: a name that is missing fails to compile, it never runs as something else.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#include "thread_ids.h"

#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#define METAL_FUNC inline
#define MLX_MTL_PRAGMA_UNROLL _Pragma("clang loop unroll(full)")
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define FLT_MAX __FLT_MAX__
#define M_PI_F 3.14159265358979323846f

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef half float16_t;
typedef __bf16 bfloat;
typedef __bf16 bfloat16_t;

template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));

// Metal aligns float4 to 16 bytes (so a load through it relies on that), packed_float4 only to its element.
#define HOST_VECTORS(T)                                                              \
  typedef T T##2 __attribute__((ext_vector_type(2)));                                \
  typedef T T##3 __attribute__((ext_vector_type(3)));                                \
  typedef T T##4 __attribute__((ext_vector_type(4)));                                \
  typedef T packed_##T##2 __attribute__((ext_vector_type(2), aligned(sizeof(T))));   \
  typedef T packed_##T##4 __attribute__((ext_vector_type(4), aligned(sizeof(T))));
HOST_VECTORS(char) HOST_VECTORS(uchar) HOST_VECTORS(short) HOST_VECTORS(ushort)
HOST_VECTORS(int) HOST_VECTORS(uint) HOST_VECTORS(long) HOST_VECTORS(ulong)
HOST_VECTORS(half) HOST_VECTORS(bfloat) HOST_VECTORS(float)

// Metal builds vectors by a call, which C++ for OpenCL does not know.
template <typename T, int N, typename... A>
vec<T, N> host_vector(A... x) {
  static_assert(sizeof...(A) == 1 || sizeof...(A) == N, "one value, or one for each element");
  if constexpr (sizeof...(A) == 1) return vec<T, N>(T(x...));
  else return vec<T, N>{T(x)...};
}
#define float2(...) host_vector<float, 2>(__VA_ARGS__)
#define float3(...) host_vector<float, 3>(__VA_ARGS__)
#define float4(...) host_vector<float, 4>(__VA_ARGS__)
#define half4(...) host_vector<half, 4>(__VA_ARGS__)
#define uint2(...) host_vector<uint, 2>(__VA_ARGS__)
#define uint3(...) host_vector<uint, 3>(__VA_ARGS__)
#define uint4(...) host_vector<uint, 4>(__VA_ARGS__)

// clang calls this to round fp32 to bf16 (nearest, ties to even) where the processor cannot.
extern "C" __attribute__((weak, used)) bfloat __truncsfbf2(float x) {
  uint bits = __builtin_astype(x, uint);
  uint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_astype(ushort(x != x ? (bits >> 16) | 0x40u : rounded), bfloat);
}

template <typename T, typename U>
T as_type(U x) {
  return __builtin_astype(x, T);
}

namespace metal {

template <bool B, typename T, typename F> struct conditional { typedef T type; };
template <typename T, typename F> struct conditional<false, T, F> { typedef F type; };
template <bool B, typename T, typename F> using conditional_t = typename conditional<B, T, F>::type;
template <bool B, typename T = void> struct enable_if {};
template <typename T> struct enable_if<true, T> { typedef T type; };
template <bool B, typename T = void> using enable_if_t = typename enable_if<B, T>::type;
template <typename A, typename B> struct is_same { enum { value = false }; };
template <typename A> struct is_same<A, A> { enum { value = true }; };
template <typename A, typename B> static constexpr constant bool is_same_v = is_same<A, B>::value;

template <typename T> struct numeric_limits;
#define HOST_FLOAT_LIMITS(T, largest, smallest, step)                                \
  template <> struct numeric_limits<T> {                                             \
    static constexpr T max() { return T(largest); }                                  \
    static constexpr T lowest() { return T(-largest); }                              \
    static constexpr T min() { return T(smallest); }                                 \
    static constexpr T epsilon() { return T(step); }                                 \
    static constexpr T infinity() { return T(__builtin_inff()); }                    \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }                 \
  };
HOST_FLOAT_LIMITS(float, __FLT_MAX__, __FLT_MIN__, __FLT_EPSILON__)
HOST_FLOAT_LIMITS(half, 65504.0f, 0x1p-14f, 0x1p-10f)
HOST_FLOAT_LIMITS(bfloat, 0x1.fep127f, 0x1p-126f, 0x1p-7f)
#define HOST_INTEGER_LIMITS(T, lowest_, largest)                                     \
  template <> struct numeric_limits<T> {                                             \
    static constexpr T max() { return largest; }                                     \
    static constexpr T lowest() { return lowest_; }                                  \
    static constexpr T min() { return lowest_; }                                     \
  };
HOST_INTEGER_LIMITS(int, -2147483647 - 1, 2147483647)
HOST_INTEGER_LIMITS(uint, 0u, 4294967295u)
HOST_INTEGER_LIMITS(long, -9223372036854775807L - 1, 9223372036854775807L)
HOST_INTEGER_LIMITS(ulong, 0ul, 18446744073709551615ul)

#define HOST_UNARY(name, builtin) template <typename T> T name(T x) { return builtin(x); }
HOST_UNARY(abs, __builtin_elementwise_abs)
HOST_UNARY(fabs, __builtin_elementwise_abs)
HOST_UNARY(sqrt, __builtin_elementwise_sqrt)
HOST_UNARY(exp, __builtin_elementwise_exp)
HOST_UNARY(exp2, __builtin_elementwise_exp2)
HOST_UNARY(log, __builtin_elementwise_log)
HOST_UNARY(log2, __builtin_elementwise_log2)
HOST_UNARY(sin, __builtin_elementwise_sin)
HOST_UNARY(cos, __builtin_elementwise_cos)
HOST_UNARY(tanh, __builtin_elementwise_tanh)
HOST_UNARY(floor, __builtin_elementwise_floor)
HOST_UNARY(ceil, __builtin_elementwise_ceil)
HOST_UNARY(trunc, __builtin_elementwise_trunc)
HOST_UNARY(round, __builtin_elementwise_round)
HOST_UNARY(rint, __builtin_elementwise_roundeven)
HOST_UNARY(popcount, __builtin_elementwise_popcount)

template <typename T> T rsqrt(T x) { return T(1.0f) / sqrt(x); }
template <typename T> T pow(T x, T y) { return __builtin_elementwise_pow(x, y); }
template <typename T> T fma(T x, T y, T z) { return __builtin_elementwise_fma(x, y, z); }
template <typename T> T copysign(T x, T y) { return __builtin_elementwise_copysign(x, y); }
template <typename T> auto isnan(T x) { return x != x; }
template <typename T> auto isinf(T x) { return fabs(x) == T(INFINITY); }
template <typename T> auto isfinite(T x) { return fabs(x) < T(INFINITY); }
template <typename T> auto signbit(T x) { return copysign(T(1.0f), x) < T(0.0f); }
template <typename T, typename C> T select(T a, T b, C c) { return c ? b : a; }

// Metal: where one argument is NaN the other is returned; clamp is min(max(x, lo), hi), so NaN gives lo.
template <typename T> T min(T x, T y) { return x != x ? y : y < x ? y : x; }
template <typename T> T max(T x, T y) { return x != x ? y : x < y ? y : x; }
template <typename T> T fmin(T x, T y) { return min(x, y); }
template <typename T> T fmax(T x, T y) { return max(x, y); }
template <typename T> T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }
template <typename T> T saturate(T x) { return clamp(x, T(0.0f), T(1.0f)); }
template <typename T> T mix(T x, T y, T a) { return x + (y - x) * a; }
template <typename T> T sign(T x) { return x > T(0.0f) ? T(1.0f) : x < T(0.0f) ? T(-1.0f) : x == x ? x : T(0.0f); }

inline uint mulhi(uint x, uint y) { return uint((ulong(x) * y) >> 32); }
inline uint rotate(uint x, uint n) { return (x << (n & 31u)) | (x >> ((32u - n) & 31u)); }
inline uint clz(uint x) { return x ? uint(__builtin_clz(x)) : 32u; }

namespace precise {
using metal::exp; using metal::exp2; using metal::log; using metal::log2; using metal::pow;
using metal::rsqrt; using metal::sqrt; using metal::tanh; using metal::fmin; using metal::fmax;
} // namespace precise
namespace fast = precise;

// Threads run one at a time, so a plain read-modify-write is atomic here.
enum memory_order { memory_order_relaxed };
template <typename T> struct atomic { T value; };
#define HOST_ATOMIC(name, result)                                                    \
  template <typename T>                                                              \
  T atomic_##name##_explicit(device atomic<T>* p, T x, memory_order) {               \
    T old = p->value;                                                                \
    p->value = result;                                                               \
    return old;                                                                      \
  }
HOST_ATOMIC(exchange, x) HOST_ATOMIC(fetch_add, old + x) HOST_ATOMIC(fetch_sub, old - x)
HOST_ATOMIC(fetch_min, min(old, x)) HOST_ATOMIC(fetch_max, max(old, x))
HOST_ATOMIC(fetch_and, old & x) HOST_ATOMIC(fetch_or, old | x) HOST_ATOMIC(fetch_xor, old ^ x)
template <typename T>
T atomic_load_explicit(const device atomic<T>* p, memory_order) {
  return p->value;
}
template <typename T>
void atomic_store_explicit(device atomic<T>* p, T x, memory_order) {
  p->value = x;
}

} // namespace metal

using namespace metal;

// MLX's utils.h: where element `elem` of a strided array lies.
template <typename IdxT = int64_t>
IdxT elem_to_loc(IdxT elem, constant const int* shape, constant const int64_t* strides, int ndim) {
  IdxT loc = 0;
  for (int i = ndim - 1; i >= 0 && elem > 0; --i) {
    loc += (elem % shape[i]) * IdxT(strides[i]);
    elem /= shape[i];
  }
  return loc;
}
