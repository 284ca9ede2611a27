// Stands for the CUDA runtime where g++ compiles csrc/cuda/*.cu as plain C++: the kernels run on the CPU, a block's
// threads as fibers that change at barriers only. Types and error codes are the toolkit's own.
#pragma once

#include <driver_types.h>
#include <math.h>
#include <vector_types.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one after the other
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulator {

enum class Barrier { none, warp, block };

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);
void wait(Barrier barrier);
void* lane_slot(int lane);  // 8 bytes of this thread's warp
int lane();
void count_store(const void* to, std::size_t bytes);

}  // namespace emulator

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return emulator::launch(*config, [&] { kernel(arguments...); });
}

inline void __syncthreads() { emulator::wait(emulator::Barrier::block); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  std::memcpy(emulator::lane_slot(emulator::lane()), &value, sizeof(T));
  emulator::wait(emulator::Barrier::warp);
  std::memcpy(&value, emulator::lane_slot(emulator::lane() ^ mask), sizeof(T));
  emulator::wait(emulator::Barrier::warp);
  return value;
}

template <class T>
void __stcs(T* to, T value) {
  emulator::count_store(to, sizeof(T));
  *to = value;
}

template <class T>
T __ldg(const T* from) {
  return *from;
}

// As PTX lays out mma.m16n8k16: a warp's lanes hold a [16, 16] by rows, b [16, 8] by columns and d [16, 8] by rows.
template <class In>
void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  static std::uint32_t held[32][32][6];  // of each warp and lane
  auto& warp = held[threadIdx.x / 32];
  const int lane = emulator::lane(), group = lane / 4, pair = lane % 4;
  std::copy(a, a + 4, warp[lane]);
  std::copy(b, b + 2, warp[lane] + 4);
  emulator::wait(emulator::Barrier::warp);
  const auto number = [](std::uint32_t word, int half) {
    const auto bits = static_cast<std::uint16_t>(word >> (16 * half));
    In value;
    std::memcpy(static_cast<void*>(&value), &bits, sizeof(value));
    return static_cast<float>(value);
  };
  for (int n = 0; n < 4; ++n) {
    const int row = group + n / 2 * 8, column = pair * 2 + n % 2;
    for (int k = 0; k < 16; ++k) {
      const auto& left = warp[row % 8 * 4 + k % 8 / 2];
      const auto& right = warp[column * 4 + k % 8 / 2];
      d[n] += number(left[k / 8 * 2 + row / 8], k % 2) * number(right[4 + k / 8], k % 2);
    }
  }
  emulator::wait(emulator::Barrier::warp);
}

template <class T>
void store_cached(T* to, T value) {
  __stcs(to, value);
}

extern "C" {
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
}
