// Squared norms of per-sample gradients on CUDA: kernels, and the choice among them.
#include "../sq_norm.h"
#include "launch.cuh"
#include "tile.cuh"

namespace gradext {
namespace {

constexpr const char* kOperation = "sq_norm_cuda";
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffff;

template <class Real>
__device__ __forceinline__ Real warp_sum(Real value) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(kAllLanes, value, lane);
  return value;
}

// The sum over a block of kThreads, in its first thread.
template <class Real>
__device__ __forceinline__ Real block_sum(Real value, Real (&shares)[kWarps]) {
  const int thread = static_cast<int>(threadIdx.x);
  value = warp_sum(value);
  __syncthreads();  // the shares of an earlier sum have been read
  if (thread % kWarp == 0) shares[thread / kWarp] = value;
  __syncthreads();
  if (thread == 0)
    for (int warp = 1; warp < kWarps; ++warp) value += shares[warp];
  return value;
}

// A sum of squares; rounding of the Gram form can fall below zero when the terms cancel. NaN stays.
template <class Real>
__device__ __forceinline__ Real at_least_zero(Real x) {
  return x < Real(0) ? Real(0) : x;
}

template <class In>
__device__ __forceinline__ Sum<In> sum_of_squares(const In* x, std::int64_t size, std::int64_t stride, int first,
                                                  int step) {
  Sum<In> sum = 0;
  x += first * stride;
#pragma unroll 4
  for (std::int64_t k = first; k < size; k += step, x += step * stride) {
    const auto value = convert<Sum<In>>(*x);
    sum += value * value;
  }
  return sum;
}

// T = 1: out[b] = |delta[b]|^2 |activation[b]|^2. A sample is read by a team of 1, 2, 4 or 8 warps of a block.
template <class In>
__global__ void __launch_bounds__(kThreads) sq_norm_rows(const __grid_constant__ SqNormParams p, int team) {
  using Real = Sum<In>;
  __shared__ Real deltas[kWarps], activations[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int member = warp % team, samples = kWarps / team;
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * samples; first < p.B;
       first += static_cast<std::int64_t>(gridDim.x) * samples) {
    const std::int64_t b = first + warp / team;
    Real d = 0, a = 0;
    if (b < p.B) {
      const int begin = member * kWarp + lane, step = team * kWarp;
      d = sum_of_squares(static_cast<const In*>(p.delta) + b * p.delta_b, p.O, p.delta_o, begin, step);
      a = sum_of_squares(static_cast<const In*>(p.activation) + b * p.activation_b, p.I, p.activation_i, begin, step);
    }
    d = warp_sum(d);
    a = warp_sum(a);
    if (team > 1) {
      __syncthreads();  // the last samples' shares have been read
      if (lane == 0) deltas[warp] = d, activations[warp] = a;
      __syncthreads();
    }
    if (member > 0 || lane > 0 || b >= p.B) continue;
    for (int k = 1; k < team; ++k) d += deltas[warp + k], a += activations[warp + k];
    static_cast<Real*>(p.out)[b] = d * a;
  }
}

template <class In>
__device__ __forceinline__ Strided<In> delta_of(const SqNormParams& p, std::int64_t b) {
  return {static_cast<const In*>(p.delta) + b * p.delta_b, p.delta_t, p.delta_o};
}

template <class In>
__device__ __forceinline__ Strided<In> activation_of(const SqNormParams& p, std::int64_t b) {
  return {static_cast<const In*>(p.activation) + b * p.activation_b, p.activation_t, p.activation_i};
}

// The same matrix with rows and columns exchanged: a Gram matrix sums over the features.
template <class In>
__device__ __forceinline__ Strided<In> transposed(const Strided<In>& x) {
  return {x.data, x.stride_n, x.stride_k};
}

// Through the gradient: a tile of G is summed over the positions in registers, squared and reduced there, T O I
// multiply-adds. shares[b, split] is the share of every `splits`-th tile.
constexpr int kPatch = 4, kTile = kSide * kPatch;

template <class In>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Sum<In>>)
    sq_norm_gradient(const __grid_constant__ SqNormParams p, Sum<In>* shares, std::int64_t splits) {
  using Real = Sum<In>;
  __shared__ Slices<Real, kPatch> slices;
  __shared__ Real of_warps[kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t tiles_i = (p.I + kTile - 1) / kTile, tiles = (p.O + kTile - 1) / kTile * tiles_i;
  for (std::int64_t block = blockIdx.x; block < p.B * splits; block += gridDim.x) {
    const std::int64_t b = divide(block, splits);
    const auto delta = delta_of<In>(p, b), activation = activation_of<In>(p, b);
    Real share = 0;
    for (std::int64_t tile = block - b * splits; tile < tiles; tile += splits) {
      const std::int64_t tile_o = divide(tile, tiles_i);
      const std::int64_t o0 = tile_o * kTile, i0 = (tile - tile_o * tiles_i) * kTile;
      Real gradient[kPatch][kPatch];
      multiply_long_tile(delta, o0, p.O, activation, i0, p.I, p.T, slices, gradient);
      const std::int64_t o = o0 + thread / kSide * kPatch, i = i0 + thread % kSide * kPatch;
      Real squares = 0;
#pragma unroll
      for (int y = 0; y < kPatch; ++y)
#pragma unroll
        for (int x = 0; x < kPatch; ++x)  // beyond the edge zero meets infinity
          if (o + y < p.O && i + x < p.I) squares += gradient[y][x] * gradient[y][x];
      share += squares;
    }
    share = block_sum(share, of_warps);
    if (thread == 0) shares[block] = share;
  }
}

// Through the Gram matrices: tiles of both in registers, multiplied there. They are symmetric: tiles below the
// diagonal count twice and those above are left out, T^2 (O + I) / 2 multiply-adds.
template <class In, int kPatch>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Sum<In>>)
    sq_norm_gram(const __grid_constant__ SqNormParams p, Sum<In>* shares, std::int64_t splits) {
  using Real = Sum<In>;
  constexpr int kTile = kSide * kPatch;
  __shared__ Slices<Real, kPatch> slices;
  __shared__ Real of_warps[kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t tiles = (p.T + kTile - 1) / kTile;  // along one side
  for (std::int64_t block = blockIdx.x; block < p.B * splits; block += gridDim.x) {
    const std::int64_t b = divide(block, splits);
    const auto delta = transposed(delta_of<In>(p, b)), activation = transposed(activation_of<In>(p, b));
    Real share = 0;
    std::int64_t row = 0, column = block - b * splits;
    while (true) {
      while (column > row && row < tiles) column -= ++row;
      if (row >= tiles) break;
      const std::int64_t s0 = row * kTile, t0 = column * kTile;
      Real deltas[kPatch][kPatch];
      multiply_long_tile(delta, s0, p.T, delta, t0, p.T, p.O, slices, deltas);
      const std::int64_t s = s0 + thread / kSide * kPatch, t = t0 + thread % kSide * kPatch;
      Real products = 0;
      for (std::int64_t begin = 0; begin < p.I; begin += kPiece) {
        Real activations[kPatch][kPatch];
        multiply_tile(activation, s0, p.T, activation, t0, p.T, begin, min(begin + kPiece, p.I), slices, activations);
#pragma unroll
        for (int y = 0; y < kPatch; ++y)
#pragma unroll
          for (int x = 0; x < kPatch; ++x)  // beyond the edge zero meets infinity
            if (s + y < p.T && t + x < p.T) products += deltas[y][x] * activations[y][x];
      }
      share += row == column ? products : 2 * products;
      column += splits;
    }
    share = block_sum(share, of_warps);
    if (thread == 0) shares[block] = splits == 1 ? at_least_zero(share) : share;
  }
}

// out[b] = Σ_split shares[b, split], a warp for each sample.
template <class Real>
__global__ void __launch_bounds__(kThreads)
    sum_shares(const Real* shares, Real* out, std::int64_t B, std::int64_t splits) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  for (std::int64_t b = static_cast<std::int64_t>(blockIdx.x) * kWarps + warp; b < B;
       b += static_cast<std::int64_t>(gridDim.x) * kWarps) {
    Real sum = 0;
    for (std::int64_t split = lane; split < splits; split += kWarp) sum += shares[b * splits + split];
    sum = warp_sum(sum);
    if (lane == 0) out[b] = at_least_zero(sum);
  }
}

template <class In>
cudaError_t launch_tiles(const SqNormParams& p, const SqNormPlan& plan, void* shares, cudaStream_t stream) {
  auto* const to = static_cast<Sum<In>*>(plan.splits == 1 ? p.out : shares);
  const auto kernel = plan.gram_tile == 0    ? sq_norm_gradient<In>
                      : plan.gram_tile == 16 ? sq_norm_gram<In, 1>
                      : plan.gram_tile == 32 ? sq_norm_gram<In, 2>
                                             : sq_norm_gram<In, 4>;
  const cudaError_t error = launch(kernel, p.B * plan.splits, dim3(kThreads), stream, p, to, plan.splits);
  if (error != cudaSuccess || plan.splits == 1) return error;
  return launch(sum_shares<Sum<In>>, divide_up(p.B, kWarps), dim3(kThreads), stream, to, static_cast<Sum<In>*>(p.out),
                p.B, plan.splits);
}

template <class In>
cudaError_t launch_rows(const SqNormParams& p, cudaStream_t stream) {
  // About eight numbers a thread, so that a team of more warps has something to share.
  int team = 1;
  while (team < kWarps && std::max(p.O, p.I) > 8 * kWarp * team) team *= 2;
  return launch(sq_norm_rows<In>, divide_up(p.B, kWarps / team), dim3(kThreads), stream, p, team);
}

}  // namespace

SqNormPlan sq_norm_plan(std::int64_t B, std::int64_t T, std::int64_t O, std::int64_t I, int multiprocessors) {
  const std::int64_t slots = std::int64_t{kResidentBlocks<float>} * multiprocessors;
  // The last of the waves of blocks through the GPU ends after `time` steps; two waves fill the gaps between them.
  const auto plan = [&](int gram_tile, std::int64_t tiles, std::int64_t steps, int patch, double& time) {
    const std::int64_t splits = std::clamp<std::int64_t>(divide_up(2 * slots, std::max<std::int64_t>(B, 1)), 1,
                                                         std::max<std::int64_t>(tiles, 1));
    // A step costs a thread its multiply-adds and two loads from shared memory.
    time = static_cast<double>(divide_up(B * splits, slots)) * divide_up(tiles, splits) * steps * (patch * patch + 2);
    return SqNormPlan{gram_tile, splits};
  };
  const int patch = T <= 16 ? 1 : T <= 32 ? 2 : 4;
  const std::int64_t side = divide_up(T, kSide * patch);
  double by_gradient = 0, by_gram = 0;
  const SqNormPlan gradient = plan(0, divide_up(O, kTile) * divide_up(I, kTile), T, kPatch, by_gradient);
  const SqNormPlan gram = plan(kSide * patch, side * (side + 1) / 2, O + I, patch, by_gram);
  return by_gram < by_gradient ? gram : gradient;
}

SqNormPlan sq_norm_plan_for(std::int64_t B, std::int64_t T, std::int64_t O, std::int64_t I, int device) {
  int multiprocessors = 0;
  const SqNormParams sizes{nullptr, nullptr, nullptr, B, T, O, I, 0, 0, 0, 0, 0, 0, DType::f32};
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute",
        kOperation, sizes, device);
  return sq_norm_plan(B, T, O, I, multiprocessors);
}

void sq_norm_cuda(const SqNormParams& p, const SqNormPlan& plan, void* shares, int device,
                  std::uintptr_t stream_handle) {
  if (p.B == 0) return;
  const DeviceGuard guard(kOperation, p, device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  const cudaError_t error = with_type(p.dtype, [&](auto in) {
    using In = typename decltype(in)::type;
    return p.T == 1 ? launch_rows<In>(p, stream) : launch_tiles<In>(p, plan, shares, stream);
  });
  check(error, "kernel launch", kOperation, p, device);
}

}  // namespace gradext
