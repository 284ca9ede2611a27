// What the launch functions share: the device, launches and their errors, the dispatch on types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "../dtype.h"

namespace gradext {

constexpr std::int64_t kMaxBlocks = 2147483647;

// Throws the `error` of a CUDA call with the sizes, the device and, where it is known, what to do.
[[noreturn]] void fail(cudaError_t error, const char* call, const char* operation, std::int64_t B, std::int64_t T,
                       std::int64_t O, std::int64_t I, int device);

template <class Params>
void check(cudaError_t error, const char* call, const char* operation, const Params& p, int device) {
  if (error != cudaSuccess) fail(error, call, operation, p.B, p.T, p.O, p.I, device);
}

// Makes a device current; the destructor makes the previous one current again.
class DeviceGuard {
 public:
  template <class Params>
  DeviceGuard(const char* operation, const Params& p, int device) {
    check(cudaGetDevice(&former_), "cudaGetDevice", operation, p, device);
    if (former_ == device) return;
    check(cudaSetDevice(device), "cudaSetDevice", operation, p, device);
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(former_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int former_ = 0;
  bool changed_ = false;
};

// Every kernel steps over its work by the size of the grid, so that a grid may be smaller than the work.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), std::int64_t blocks, dim3 block, cudaStream_t stream,
                   Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min(blocks, kMaxBlocks)));
  config.blockDim = block;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

// How many multiprocessors a GPU has, and the bytes of its L2 cache.
struct Size {
  int multiprocessors, l2_bytes;
};

template <class Params>
Size size_of(int device, const char* operation, const Params& p) {
  Size size{};
  check(cudaDeviceGetAttribute(&size.multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute",
        operation, p, device);
  check(cudaDeviceGetAttribute(&size.l2_bytes, cudaDevAttrL2CacheSize, device), "cudaDeviceGetAttribute", operation, p,
        device);
  return size;
}

inline std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

template <class T>
struct Type {
  using type = T;
};

// Calls `function` with the Type of a code.
template <class Function>
auto with_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::f32:
      return function(Type<float>{});
    case DType::f64:
      return function(Type<double>{});
    case DType::f16:
      return function(Type<__half>{});
    case DType::bf16:
      return function(Type<__nv_bfloat16>{});
  }
  throw std::invalid_argument("gradext: unknown type code " + std::to_string(static_cast<int>(dtype)));
}

}  // namespace gradext
