// The CUDA outer product: kernels, and the launch that chooses among them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../outer.h"

namespace gradext {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMaxBlocks = 2147483647;

template <class In>
using Sum = std::conditional_t<std::is_same_v<In, double>, double, float>;  // what a sum is kept in

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

// 16 bytes of the output, the widest store there is; written past the cache, as nothing here reads them
// again.
template <class Out>
union Chunk {
  static constexpr int kSize = 16 / sizeof(Out);
  __device__ Chunk() {}
  Out element[kSize];
  uint4 all;
};

// A 64-bit division takes some hundred instructions, a 32-bit one twenty; nearly all sizes fit.
__device__ __forceinline__ std::int64_t divide(std::int64_t a, std::int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
  return a / b;
}

template <class Out>
__device__ __forceinline__ void store_one(Out* to, Out value) {
  __stcs(to, value);
}

// T = 1. The output falls into runs: stretches of memory without gaps, a sample's [O, I] or, where rows are
// padded, one row. In a run the 16-byte chunks repeat their position relative to the rows every `period`
// rows, the least number of rows that fills whole chunks. So a thread takes one position within the period,
// loads its activations once, and steps from period to period: per store it loads one delta (two where the
// chunk lies across rows), and it divides only before the loop.
struct RunPlan {
  std::int64_t runs, rows;  // runs in all; rows in each
  std::int64_t runs_per_sample;
  std::int64_t period;         // rows
  std::int64_t period_chunks;  // period * I * sizeof(Out) / 16
  std::int64_t column_tiles;   // blocks side by side in a period
  std::int64_t steps;          // periods that one thread takes
  std::int64_t row_tiles;      // blocks below one another in a run
  std::int64_t tiles;          // column_tiles * row_tiles * runs / blockDim.z, rounded up
};

// Block: x = chunk within the period, y = period, z = run.
template <class In, class Out>
__global__ void __launch_bounds__(kThreads, 3) outer_runs(OuterParams p, RunPlan plan) {
  constexpr int kSize = Chunk<Out>::kSize;
  using Real = Sum<In>;
  const std::int64_t length = plan.rows * p.I;
  for (std::int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const std::int64_t run_tile = divide(tile, plan.column_tiles * plan.row_tiles);
    const std::int64_t within = tile - run_tile * plan.column_tiles * plan.row_tiles;
    const std::int64_t row_tile = divide(within, plan.column_tiles);
    const std::int64_t column_tile = within - row_tile * plan.column_tiles;

    const std::int64_t run = run_tile * blockDim.z + threadIdx.z;
    if (run >= plan.runs) continue;
    const std::int64_t b = divide(run, plan.runs_per_sample);
    const std::int64_t first_row = run - b * plan.runs_per_sample;
    const In* delta = static_cast<const In*>(p.delta) + b * p.delta_b + first_row * p.delta_o;
    const In* activation = static_cast<const In*>(p.activation) + b * p.activation_b;
    Out* out = static_cast<Out*>(p.out) + b * p.out_b + first_row * p.out_o;

    // Elements in front of the first 16-byte boundary, and the whole chunks behind it.
    const int misplaced = static_cast<int>(reinterpret_cast<std::uintptr_t>(out) % 16 / sizeof(Out));
    const std::int64_t head = min(static_cast<std::int64_t>(misplaced == 0 ? 0 : kSize - misplaced), length);
    const std::int64_t chunks = (length - head) / kSize;

    if (within == 0) {  // the first block of a run writes its ends, too short for a chunk
      const std::int64_t tail = head + chunks * kSize;
      const std::int64_t ends = head + length - tail;
      for (std::int64_t k = threadIdx.y * blockDim.x + threadIdx.x; k < ends; k += blockDim.x * blockDim.y) {
        const std::int64_t e = k < head ? k : tail + k - head;
        const std::int64_t o = divide(e, p.I);
        store_one(out + e, convert<Out>(convert<Real>(delta[o * p.delta_o]) *
                                        convert<Real>(activation[(e - o * p.I) * p.activation_i])));
      }
    }

    const std::int64_t position = column_tile * blockDim.x + threadIdx.x;
    const std::int64_t period = row_tile * plan.steps * blockDim.y + threadIdx.y;
    std::int64_t chunk = period * plan.period_chunks + position;
    if (position >= plan.period_chunks || chunk >= chunks) continue;

    Real a[kSize];
    int below[kSize];  // rows between the chunk's first element and this one
    const std::int64_t e = head + position * kSize;
    const std::int64_t o = divide(e, p.I);
    std::int64_t i = e - o * p.I;
    int row = 0;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      a[k] = convert<Real>(activation[i * p.activation_i]);
      below[k] = row;
      if (++i == p.I) i = 0, ++row;
    }

    const In* d = delta + (period * plan.period + o) * p.delta_o;
    Out* to = out + head + chunk * kSize;
    const std::int64_t next_delta = plan.period * blockDim.y * p.delta_o;
    const std::int64_t next_chunk = plan.period_chunks * blockDim.y;
#pragma unroll 4
    for (std::int64_t step = 0; step < plan.steps; ++step) {
      if (chunk >= chunks) break;
      Chunk<Out> c;
      if (below[kSize - 1] == 0) {
        const Real d0 = convert<Real>(*d);
#pragma unroll
        for (int k = 0; k < kSize; ++k) c.element[k] = convert<Out>(d0 * a[k]);
      } else {
#pragma unroll
        for (int k = 0; k < kSize; ++k) c.element[k] = convert<Out>(convert<Real>(d[below[k] * p.delta_o]) * a[k]);
      }
      __stcs(reinterpret_cast<uint4*>(to), c.all);
      d += next_delta;
      to += next_chunk * kSize;
      chunk += next_chunk;
    }
  }
}

// T > 1 (and T = 0). A block makes a 64 x 64 tile of one sample's output, a thread 4 x 4 of it, from slices
// of 16 rows of delta and activation in shared memory. Only the output is written.
constexpr int kTile = 64, kSlice = 16, kPatch = 4;

template <class In, class Out>
__global__ void __launch_bounds__(kThreads) outer_sum(OuterParams p, std::int64_t tiles_o, std::int64_t tiles_i) {
  using Real = Sum<In>;
  __shared__ Real deltas[kSlice][kTile];
  __shared__ Real activations[kSlice][kTile];
  const int thread = static_cast<int>(threadIdx.x);
  const int patch_o = thread / (kTile / kPatch) * kPatch, patch_i = thread % (kTile / kPatch) * kPatch;

  for (std::int64_t tile = blockIdx.x; tile < p.B * tiles_o * tiles_i; tile += gridDim.x) {
    const std::int64_t row_of_tiles = divide(tile, tiles_i);
    const std::int64_t b = divide(row_of_tiles, tiles_o);
    const std::int64_t o0 = (row_of_tiles - b * tiles_o) * kTile, i0 = (tile - row_of_tiles * tiles_i) * kTile;
    const In* delta = static_cast<const In*>(p.delta) + b * p.delta_b;
    const In* activation = static_cast<const In*>(p.activation) + b * p.activation_b;

    Real sum[kPatch][kPatch] = {};
    for (std::int64_t t0 = 0; t0 < p.T; t0 += kSlice) {
      const int slice = static_cast<int>(min(p.T - t0, static_cast<std::int64_t>(kSlice)));
      __syncthreads();  // the last slice has been read
      for (int k = thread; k < slice * kTile; k += kThreads) {
        const int t = k / kTile, n = k % kTile;
        deltas[t][n] = o0 + n < p.O ? convert<Real>(delta[(t0 + t) * p.delta_t + (o0 + n) * p.delta_o]) : Real(0);
        activations[t][n] =
            i0 + n < p.I ? convert<Real>(activation[(t0 + t) * p.activation_t + (i0 + n) * p.activation_i]) : Real(0);
      }
      __syncthreads();
      for (int t = 0; t < slice; ++t) {
#pragma unroll
        for (int y = 0; y < kPatch; ++y)
#pragma unroll
          for (int x = 0; x < kPatch; ++x) sum[y][x] += deltas[t][patch_o + y] * activations[t][patch_i + x];
      }
    }

    const std::int64_t i = i0 + patch_i;
#pragma unroll
    for (int y = 0; y < kPatch; ++y) {
      const std::int64_t o = o0 + patch_o + y;
      if (o >= p.O) break;
      Out* to = static_cast<Out*>(p.out) + b * p.out_b + o * p.out_o + i;
      // Four elements are 8, 16 or 32 bytes: one store, or two of 16 bytes.
      constexpr int kBytes = kPatch * sizeof(Out);
      union Four {
        __device__ Four() {}
        Out element[kPatch];
        uint2 small;
        uint4 large[(kBytes + 15) / 16];
      } four;
#pragma unroll
      for (int x = 0; x < kPatch; ++x) four.element[x] = convert<Out>(sum[y][x]);
      if (i + kPatch <= p.I && reinterpret_cast<std::uintptr_t>(to) % min(kBytes, 16) == 0) {
        if constexpr (kBytes == 8) {
          __stcs(reinterpret_cast<uint2*>(to), four.small);
        } else {
#pragma unroll
          for (int k = 0; k < kBytes / 16; ++k) __stcs(reinterpret_cast<uint4*>(to) + k, four.large[k]);
        }
      } else {
#pragma unroll
        for (int x = 0; x < kPatch; ++x)
          if (i + x < p.I) store_one(to + x, four.element[x]);
      }
    }
  }
}

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t common_divisor(std::int64_t a, std::int64_t b) { return b == 0 ? a : common_divisor(b, a % b); }

template <class In, class Out>
void launch(const OuterParams& p, cudaStream_t stream) {
  if (p.T != 1) {
    const std::int64_t tiles_o = divide_up(p.O, kTile), tiles_i = divide_up(p.I, kTile);
    const auto blocks = static_cast<unsigned>(std::min(p.B * tiles_o * tiles_i, kMaxBlocks));
    outer_sum<In, Out><<<blocks, kThreads, 0, stream>>>(p, tiles_o, tiles_i);
    return;
  }
  constexpr std::int64_t kSize = 16 / sizeof(Out);
  const bool joined = p.O == 1 || p.out_o == p.I;
  RunPlan plan{};
  plan.runs_per_sample = joined ? 1 : p.O;
  plan.rows = joined ? p.O : 1;
  plan.runs = p.B * plan.runs_per_sample;
  plan.period = kSize / common_divisor(kSize, p.I);
  plan.period_chunks = plan.period * p.I / kSize;
  const std::int64_t periods = divide_up(plan.rows, plan.period);

  // x takes a period in blocks as even as can be, y what x leaves of the threads, z what the run leaves.
  plan.column_tiles = divide_up(plan.period_chunks, kThreads);
  dim3 block;
  block.x = static_cast<unsigned>(divide_up(plan.period_chunks, plan.column_tiles));
  block.y = static_cast<unsigned>(std::min<std::int64_t>(periods, kThreads / block.x));
  block.z = static_cast<unsigned>(std::min<std::int64_t>(plan.runs, std::min(kThreads / (block.x * block.y), 64u)));

  // More steps a thread spread its preparation over more stores, as long as every multiprocessor keeps
  // several blocks.
  constexpr std::int64_t kEnoughBlocks = 8192, kMaxSteps = 16;
  const std::int64_t rows_of_blocks = divide_up(periods, block.y);
  const std::int64_t others = plan.column_tiles * divide_up(plan.runs, block.z);
  plan.steps =
      std::clamp<std::int64_t>(rows_of_blocks * others / kEnoughBlocks, 1, std::min(kMaxSteps, rows_of_blocks));
  plan.row_tiles = divide_up(rows_of_blocks, plan.steps);
  plan.tiles = others * plan.row_tiles;
  outer_runs<In, Out><<<static_cast<unsigned>(std::min(plan.tiles, kMaxBlocks)), block, 0, stream>>>(p, plan);
}

std::string version_name(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// What the user can do about an error, where that is known.
std::string advice(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
      return "; gradext was not built for this GPU: install it again with GRADEXT_CUDA_ARCHS=native on this "
             "machine";
    case cudaErrorInsufficientDriver:
      return "; the NVIDIA driver is missing or older than the CUDA runtime that gradext was built with: "
             "update it, or "
             "build gradext with an older CUDA toolkit";
    default:
      return "";
  }
}

void check(cudaError_t error, const char* call, const OuterParams& p, int device) {
  if (error == cudaSuccess) return;
  std::string arch = "unknown";
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess)
    arch = "sm_" + std::to_string(major * 10 + minor);
  cudaGetLastError();  // neither this error nor one of the queries above must be found by the next caller
  throw std::runtime_error(std::string("gradext outer_cuda: ") + call + " failed: " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ", B=" + std::to_string(p.B) + ", T=" + std::to_string(p.T) +
                           ", O=" + std::to_string(p.O) + ", I=" + std::to_string(p.I) + ", device " +
                           std::to_string(device) + ", " + arch + ")" + advice(error));
}

// Makes a device current and, on every way out, the former one again.
class DeviceGuard {
 public:
  DeviceGuard(const OuterParams& p, int device) {
    check(cudaGetDevice(&former_), "cudaGetDevice", p, device);
    if (former_ == device) return;
    check(cudaSetDevice(device), "cudaSetDevice", p, device);
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

template <class In>
void launch_to(const OuterParams& p, cudaStream_t stream) {
  if (p.out_dtype == p.in_dtype) return launch<In, In>(p, stream);
  if constexpr (std::is_same_v<In, float>) {
    if (p.out_dtype == DType::f16) return launch<In, __half>(p, stream);
    if (p.out_dtype == DType::bf16) return launch<In, __nv_bfloat16>(p, stream);
  } else if constexpr (!std::is_same_v<In, double>) {
    if (p.out_dtype == DType::f32) return launch<In, float>(p, stream);
  }
  throw std::invalid_argument("gradext outer_cuda: no kernel for this pair of input and output types");
}

}  // namespace

void outer_cuda(const OuterParams& params, int device, std::uintptr_t stream_handle) {
  const OuterParams p = with_long_rows(params);
  if (p.B == 0 || p.O == 0 || p.I == 0) return;
  const DeviceGuard guard(p, device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  switch (p.in_dtype) {
    case DType::f32:
      launch_to<float>(p, stream);
      break;
    case DType::f64:
      launch_to<double>(p, stream);
      break;
    case DType::f16:
      launch_to<__half>(p, stream);
      break;
    case DType::bf16:
      launch_to<__nv_bfloat16>(p, stream);
      break;
  }
  check(cudaGetLastError(), "kernel launch", p, device);
}

CudaStatus cuda_status() noexcept {
  CudaStatus status{};
  cudaRuntimeGetVersion(&status.runtime_version);
  cudaDriverGetVersion(&status.driver_version);
  const cudaError_t error = cudaGetDeviceCount(&status.device_count);
  if (error == cudaSuccess && status.device_count > 0) return status;
  cudaGetLastError();
  status.device_count = 0;
  if (status.driver_version == 0)
    status.reason = "no NVIDIA driver is installed";
  else if (error == cudaErrorInsufficientDriver)
    status.reason = "the NVIDIA driver supports CUDA " + version_name(status.driver_version) +
                    ", gradext was built with CUDA " + version_name(status.runtime_version) +
                    ": update the driver, or build gradext with an older toolkit";
  else if (error == cudaSuccess || error == cudaErrorNoDevice)
    status.reason = "no GPU is visible (CUDA_VISIBLE_DEVICES?)";
  else
    status.reason = std::string("cudaGetDeviceCount failed: ") + cudaGetErrorString(error);
  return status;
}

}  // namespace gradext
