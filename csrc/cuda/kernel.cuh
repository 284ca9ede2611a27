// What the kernels share: types, conversions, and the arithmetic of indices.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace gradext {

constexpr int kThreads = 256;  // the most threads that any kernel has in a block
constexpr int kWarp = 32;

template <class In>
using Sum = std::conditional_t<std::is_same_v<In, double>, double, float>;  // the type of a sum

template <class To, class From>
__device__ __forceinline__ To convert(From x) {
  return static_cast<To>(x);
}
template <>
__device__ __forceinline__ float convert<float, __half>(__half x) {
  return __half2float(x);
}
template <>
__device__ __forceinline__ float convert<float, __nv_bfloat16>(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <>
__device__ __forceinline__ __half convert<__half, float>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 convert<__nv_bfloat16, float>(float x) {
  return __float2bfloat16_rn(x);
}

// Divides n < 2^31 by a divisor known on the host, in three instructions: multiplies by 2^(31 + s) / divisor, rounded
// up. Rounding up adds less than 1 to that factor. The result is too large by less than n / 2^(31 + s) < 1 / divisor,
// which does not change its integer part.
struct Divisor {
  std::uint32_t divisor = 1, factor = 0x80000000u;
  int shift = 31;

  Divisor() = default;
  explicit Divisor(std::int64_t by) : divisor(static_cast<std::uint32_t>(by)) {
    int s = 0;
    while ((std::int64_t{1} << s) < by) ++s;
    shift = 31 + s;
    factor = static_cast<std::uint32_t>((std::uint64_t{1} << shift) / divisor + (s > 0));
  }

  // Returns n / divisor and leaves the remainder in n.
  __device__ __forceinline__ std::uint32_t operator()(std::uint32_t& n) const {
    const auto quotient = static_cast<std::uint32_t>((static_cast<std::uint64_t>(n) * factor) >> shift);
    n -= quotient * divisor;
    return quotient;
  }
};

#if defined(__CUDACC__)
template <class T>
__device__ __forceinline__ void store_cached(T* to, T value) {
  *to = value;
}
#endif  // the emulator has its own, which counts stores

// A 64-bit division takes about a hundred instructions, a 32-bit one about twenty. Nearly all sizes fit into 32 bits.
__device__ __forceinline__ std::int64_t divide(std::int64_t a, std::int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
  return a / b;
}

}  // namespace gradext
