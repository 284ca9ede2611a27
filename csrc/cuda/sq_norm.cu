// Squared norms of per-sample gradients on CUDA, of all layers in one launch: the kernel, and the choice of routes.
#include "../sq_norm.h"
#include "launch.cuh"
#include "mma.cuh"

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

// The sum over a block of kThreads; only the first thread gets it.
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

// A layer as the kernel sees it. Its blocks are those from first_block to the next layer's first; each writes its
// partial sum to `shares`.
struct Layer {
  const void *delta, *activation;
  std::int64_t delta_b, delta_t, delta_o, activation_b, activation_t, activation_i;
  std::int32_t T, O, I;
  SqNormRoute route;
  std::uint32_t first_block, splits;  // of route `rows`: the warps that read a sample
  std::int64_t first_share;
};

// All are passed as one argument: up to 4 KB, or 32 KB from CUDA 12.1 and its drivers on.
template <int kCapacity>
struct Layers {
  Layer layer[kCapacity];
  std::int64_t B;
  std::int32_t layers;
  std::uint32_t blocks;
};
constexpr int kFew = 40;
static_assert(sizeof(Layers<kFew>) <= 4096 && sizeof(Layers<kMostLayers>) <= 32764);

template <class In>
__device__ __forceinline__ Strided<In> delta_of(const Layer& p, std::int64_t b) {
  return {static_cast<const In*>(p.delta) + b * p.delta_b, p.delta_t, p.delta_o};
}

template <class In>
__device__ __forceinline__ Strided<In> activation_of(const Layer& p, std::int64_t b) {
  return {static_cast<const In*>(p.activation) + b * p.activation_b, p.activation_t, p.activation_i};
}

// The same matrix with rows and columns exchanged: a Gram matrix sums over the features.
template <class In>
__device__ __forceinline__ Strided<In> transposed(const Strided<In>& x) {
  return {x.data, x.stride_n, x.stride_k};
}

// T = 1: |delta[b]|^2 |activation[b]|^2. A sample is read by a team of 1, 2, 4 or 8 warps of a block.
template <class In>
__device__ void rows_of(const Layer& p, std::int64_t B, std::uint32_t block, Sum<In>* shares,
                        Sum<In> (&of_warps)[2][kWarps]) {
  using Real = Sum<In>;
  const int team = static_cast<int>(p.splits);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int member = warp % team;
  const std::int64_t b = std::int64_t{block} * (kWarps / team) + warp / team;
  Real d = 0, a = 0;
  if (b < B) {
    const int begin = member * kWarp + lane, step = team * kWarp;
    d = sum_of_squares(static_cast<const In*>(p.delta) + b * p.delta_b, p.O, p.delta_o, begin, step);
    a = sum_of_squares(static_cast<const In*>(p.activation) + b * p.activation_b, p.I, p.activation_i, begin, step);
  }
  d = warp_sum(d);
  a = warp_sum(a);
  if (team > 1) {
    __syncthreads();  // the shares of an earlier block have been read
    if (lane == 0) of_warps[0][warp] = d, of_warps[1][warp] = a;
    __syncthreads();
  }
  if (member > 0 || lane > 0 || b >= B) return;
  for (int k = 1; k < team; ++k) d += of_warps[0][warp + k], a += of_warps[1][warp + k];
  shares[b] = d * a;
}

// By the gradient: a tile of G is summed over the positions in registers, squared and reduced there, in T O I
// multiply-adds. Returns this thread's partial sum of every `splits`-th tile.
constexpr int kPatch = 4, kTile = kSide * kPatch;

template <class In>
__device__ Sum<In> gradient_share(const Layer& p, std::int64_t b, std::uint32_t split,
                                  Slices<Sum<In>, kPatch>& slices) {
  using Real = Sum<In>;
  const int thread = static_cast<int>(threadIdx.x);
  const std::uint32_t tiles_i = (p.I + kTile - 1) / kTile, tiles = (p.O + kTile - 1) / kTile * tiles_i;
  const auto delta = delta_of<In>(p, b), activation = activation_of<In>(p, b);
  Real share = 0;
  for (std::uint32_t tile = split; tile < tiles; tile += p.splits) {
    const std::uint32_t tile_o = tile / tiles_i;
    const std::int64_t o0 = std::int64_t{tile_o} * kTile, i0 = std::int64_t{tile - tile_o * tiles_i} * kTile;
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
  return share;
}

// Calls function(row, column) for every `splits`-th tile on and below the diagonal of a square with so many tiles a
// side.
template <class Function>
__device__ __forceinline__ void visit_triangle(std::uint32_t tiles, std::uint32_t split, std::uint32_t splits,
                                               Function&& function) {
  for (std::uint32_t row = 0, column = split;; column += splits) {
    while (column > row && row < tiles) column -= ++row;
    if (row >= tiles) return;
    function(row, column);
  }
}

// By the Gram matrices: tiles of both are computed and multiplied in registers. The matrices are symmetric: tiles below
// the diagonal count twice and those above are left out, in T^2 (O + I) / 2 multiply-adds.
template <class In, int kPatch>
__device__ Sum<In> gram_share(const Layer& p, std::int64_t b, std::uint32_t split, Slices<Sum<In>, kPatch>& slices) {
  using Real = Sum<In>;
  constexpr int kTile = kSide * kPatch;
  const int thread = static_cast<int>(threadIdx.x);
  const auto delta = transposed(delta_of<In>(p, b)), activation = transposed(activation_of<In>(p, b));
  Real share = 0;
  visit_triangle((p.T + kTile - 1) / kTile, split, p.splits, [&](std::uint32_t row, std::uint32_t column) {
    const std::int64_t s0 = std::int64_t{row} * kTile, t0 = std::int64_t{column} * kTile;
    Real deltas[kPatch][kPatch];
    multiply_long_tile(delta, s0, p.T, delta, t0, p.T, p.O, slices, deltas);
    const std::int64_t s = s0 + thread / kSide * kPatch, t = t0 + thread % kSide * kPatch;
    Real products = 0;
    for (std::int64_t begin = 0; begin < p.I; begin += kPiece) {
      Real activations[kPatch][kPatch];
      const std::int64_t end = min(begin + kPiece, static_cast<std::int64_t>(p.I));
      multiply_tile(activation, s0, p.T, activation, t0, p.T, begin, end, slices, activations);
#pragma unroll
      for (int y = 0; y < kPatch; ++y)
#pragma unroll
        for (int x = 0; x < kPatch; ++x)  // beyond the edge zero meets infinity
          if (s + y < p.T && t + x < p.T) products += deltas[y][x] * activations[y][x];
    }
    share += row == column ? products : 2 * products;
  });
  return share;
}

// The same on tensor cores.
template <class In, int kTile>
__device__ float mma_gradient_share(const Layer& p, std::int64_t b, std::uint32_t split,
                                    typename MmaTile<In, kTile>::Shared& slices) {
  const std::uint32_t tiles_i = (p.I + kTile - 1) / kTile, tiles = (p.O + kTile - 1) / kTile * tiles_i;
  const auto delta = delta_of<In>(p, b), activation = activation_of<In>(p, b);
  float share = 0;
  for (std::uint32_t tile = split; tile < tiles; tile += p.splits) {
    const std::uint32_t tile_o = tile / tiles_i;
    const int o0 = static_cast<int>(tile_o) * kTile, i0 = static_cast<int>(tile - tile_o * tiles_i) * kTile;
    MmaTile<In, kTile> gradient;
    gradient.multiply(delta, o0, p.O, activation, i0, p.I, p.T, slices);
    float squares = 0;
    gradient.visit(p.O - o0, p.I - i0,
                   [&](int u, int v, int k) { squares += gradient.sum[u][v][k] * gradient.sum[u][v][k]; });
    share += squares;
  }
  return share;
}

template <class In, int kTile>
__device__ float mma_gram_share(const Layer& p, std::int64_t b, std::uint32_t split,
                                typename MmaTile<In, kTile>::Shared& slices) {
  const auto delta = transposed(delta_of<In>(p, b)), activation = transposed(activation_of<In>(p, b));
  float share = 0;
  visit_triangle((p.T + kTile - 1) / kTile, split, p.splits, [&](std::uint32_t row, std::uint32_t column) {
    const int s0 = static_cast<int>(row) * kTile, t0 = static_cast<int>(column) * kTile;
    MmaTile<In, kTile> deltas, activations;
    deltas.multiply(delta, s0, p.T, delta, t0, p.T, p.O, slices);
    activations.multiply(activation, s0, p.T, activation, t0, p.T, p.I, slices);
    float products = 0;
    deltas.visit(p.T - s0, p.T - t0,
                 [&](int u, int v, int k) { products += deltas.sum[u][v][k] * activations.sum[u][v][k]; });
    share += row == column ? products : 2 * products;
  });
  return share;
}

template <class In>
constexpr int kNormBlocks = sizeof(In) == 8 ? 1 : 2;  // that a multiprocessor must hold at once

// Which routes a build for an architecture has for a type: from sm_80 on half precision uses tensor cores, in place of
// CUDA cores.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
constexpr bool kHasMma = true, kHalfOnCores = false;
#elif defined(__CUDA_ARCH__)
constexpr bool kHasMma = false, kHalfOnCores = true;
#else
constexpr bool kHasMma = true, kHalfOnCores = true;
#endif

template <class In, int kCapacity>
__global__ void __launch_bounds__(kThreads, kNormBlocks<In>)
    sq_norm_layers(const __grid_constant__ Layers<kCapacity> all, Sum<In>* shares) {
  using Real = Sum<In>;
  union Shared {
    Slices<Real, 4> patches_4;
    Slices<Real, 2> patches_2;
    Slices<Real, 1> patches_1;
    std::conditional_t<sizeof(In) == 2, typename MmaTile<In, 128>::Shared, char> mma_128;
    std::conditional_t<sizeof(In) == 2, typename MmaTile<In, 64>::Shared, char> mma_64;
    __device__ Shared() {}
  };
  alignas(16) __shared__ unsigned char memory[sizeof(Shared)];
  __shared__ Real of_warps[2][kWarps];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  for (std::uint32_t place = blockIdx.x; place < all.blocks; place += gridDim.x) {
    std::int32_t low = 0, high = all.layers - 1;  // finds the last layer that begins at this block or before it
    while (low < high) {
      const std::int32_t middle = (low + high + 1) / 2;
      if (all.layer[middle].first_block <= place)
        low = middle;
      else
        high = middle - 1;
    }
    const Layer& p = all.layer[low];
    Real* const to = shares + p.first_share;
    const std::uint32_t block = place - p.first_block;
    if (p.route == SqNormRoute::rows) {
      rows_of<In>(p, all.B, block, to, of_warps);
      continue;
    }
    const std::uint32_t b = block / p.splits, split = block - b * p.splits;
    Real share = 0;
    if constexpr (sizeof(In) > 2 || kHalfOnCores) {
      if (p.route == SqNormRoute::gram_16) share = gram_share<In, 1>(p, b, split, shared.patches_1);
      if (p.route == SqNormRoute::gram_32) share = gram_share<In, 2>(p, b, split, shared.patches_2);
      if constexpr (sizeof(In) < 8)  // two such tiles of doubles do not fit into the registers
        if (p.route == SqNormRoute::gram_64) share = gram_share<In, 4>(p, b, split, shared.patches_4);
      if (p.route == SqNormRoute::gradient_64) share = gradient_share<In>(p, b, split, shared.patches_4);
    }
    if constexpr (sizeof(In) == 2 && kHasMma) {
      if (p.route == SqNormRoute::mma_gradient_128) share = mma_gradient_share<In, 128>(p, b, split, shared.mma_128);
      if (p.route == SqNormRoute::mma_gradient_64) share = mma_gradient_share<In, 64>(p, b, split, shared.mma_64);
      if (p.route == SqNormRoute::mma_gram_64) share = mma_gram_share<In, 64>(p, b, split, shared.mma_64);
    }
    share = block_sum(share, of_warps[0]);
    if (threadIdx.x == 0) to[block] = share;
  }
}

// out[l, b] = Σ_split shares[b, split] of layer l, a warp for each.
template <class Real, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    sum_shares(const __grid_constant__ Layers<kCapacity> all, const Real* shares, Real* out) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  for (std::int64_t place = static_cast<std::int64_t>(blockIdx.x) * kWarps + warp; place < all.layers * all.B;
       place += static_cast<std::int64_t>(gridDim.x) * kWarps) {
    const std::int64_t layer = divide(place, all.B), b = place - layer * all.B;
    const Layer& p = all.layer[layer];
    const std::int64_t splits = p.route == SqNormRoute::rows ? 1 : p.splits;
    Real sum = 0;
    for (std::int64_t split = lane; split < splits; split += kWarp) sum += shares[p.first_share + b * splits + split];
    sum = warp_sum(sum);
    if (lane == 0) out[place] = at_least_zero(sum);
  }
}

template <class In, int kCapacity>
void launch_layers(const SqNormParams* layers, const SqNormPlan* plans, int count, void* out, void* shares, int device,
                   cudaStream_t stream) {
  Layers<kCapacity> all{};
  all.B = layers[0].B, all.layers = count;
  std::int64_t blocks = 0, share = 0;
  for (int k = 0; k < count; ++k) {
    const SqNormParams& p = layers[k];
    const SqNormPlan& plan = plans[k];
    const bool rows = plan.route == SqNormRoute::rows;
    all.layer[k] = {p.delta,
                    p.activation,
                    p.delta_b,
                    p.delta_t,
                    p.delta_o,
                    p.activation_b,
                    p.activation_t,
                    p.activation_i,
                    static_cast<std::int32_t>(p.T),
                    static_cast<std::int32_t>(p.O),
                    static_cast<std::int32_t>(p.I),
                    plan.route,
                    static_cast<std::uint32_t>(blocks),
                    static_cast<std::uint32_t>(plan.splits),
                    share};
    blocks += rows ? divide_up(p.B, kWarps / plan.splits) : p.B * plan.splits;
    share += rows ? p.B : p.B * plan.splits;
    if (std::max({p.T, p.O, p.I, blocks}) > kMaxBlocks - kThreads)
      fail(cudaErrorInvalidValue, "a size beyond 2^31", kOperation, p.B, p.T, p.O, p.I, device);
  }
  all.blocks = static_cast<std::uint32_t>(blocks);
  auto* const to = static_cast<Sum<In>*>(share == all.B * count ? out : shares);
  check(launch(sq_norm_layers<In, kCapacity>, blocks, dim3(kThreads), stream, all, to), "kernel launch", kOperation,
        layers[0], device);
  // With one split the Gram form has not been clamped yet.
  check(launch(sum_shares<Sum<In>, kCapacity>, divide_up(all.B * count, kWarps), dim3(kThreads), stream, all,
               static_cast<const Sum<In>*>(to), static_cast<Sum<In>*>(out)),
        "kernel launch", kOperation, layers[0], device);
}

// The time that a multiprocessor takes for one step of the summed dimension of a tile, relative to that of 128 x 128
// numbers on tensor cores. For CUDA cores it is counted from multiply-adds and loads from shared memory, not measured.
struct Cost {
  SqNormRoute route;
  int tile;
  bool gram;
  double step;
};
constexpr Cost kMmaCosts[] = {{SqNormRoute::mma_gradient_128, 128, false, 1.0},
                              {SqNormRoute::mma_gradient_64, 64, false, 0.5},
                              {SqNormRoute::mma_gram_64, 64, true, 0.5}};
constexpr Cost kCosts[] = {{SqNormRoute::gradient_64, 64, false, 18},
                           {SqNormRoute::gram_16, 16, true, 3},
                           {SqNormRoute::gram_32, 32, true, 6},
                           {SqNormRoute::gram_64, 64, true, 18}};

}  // namespace

std::vector<SqNormPlan> sq_norm_plan(const std::vector<SqNormParams>& layers, DType dtype, int multiprocessors,
                                     int capability) {
  const bool half = dtype == DType::f16 || dtype == DType::bf16;
  const std::int64_t slots = (dtype == DType::f64 ? 1 : 2) * std::int64_t{multiprocessors};
  struct Choice {
    std::int64_t tiles = 1;
    double work = 0, time = 0;  // of one sample; of all samples, if every layer had an equal part of the GPU
  };
  std::vector<SqNormPlan> plans;
  std::vector<Choice> choices;
  double total = 0;
  for (const SqNormParams& p : layers) {
    if (p.T == 1) {
      // About eight numbers for each thread, so that more warps have enough work.
      int team = 1;
      while (team < kWarps && std::max(p.O, p.I) > 8 * kWarp * team) team *= 2;
      plans.push_back({SqNormRoute::rows, team});
      choices.push_back({});
      continue;
    }
    SqNormPlan best{};
    Choice chosen;
    const auto consider = [&](const Cost& cost) {
      const std::int64_t side = divide_up(p.T, cost.tile);
      const std::int64_t tiles =
          cost.gram ? side * (side + 1) / 2 : divide_up(p.O, cost.tile) * divide_up(p.I, cost.tile);
      const double one = cost.step * static_cast<double>(cost.gram ? p.O + p.I : p.T);
      const double work = one * static_cast<double>(tiles);
      // The layer's part of the GPU does all the work, and the last tile ends one tile's time later.
      const double time = static_cast<double>(p.B * layers.size()) * work / static_cast<double>(slots) + one;
      if (chosen.time == 0 || time < chosen.time)
        best = {cost.route, 1}, chosen = {std::max<std::int64_t>(tiles, 1), work, time};
    };
    if (half && capability >= 80)
      for (const Cost& cost : kMmaCosts) consider(cost);
    else
      for (const Cost& cost : kCosts)
        if (dtype != DType::f64 || cost.route != SqNormRoute::gram_64) consider(cost);
    total += chosen.work * static_cast<double>(p.B);
    plans.push_back(best);
    choices.push_back(chosen);
  }
  // Blocks of equal work, twice as many as the GPU holds at once, so that those that start later fill the gaps.
  const double block = total / static_cast<double>(2 * slots);
  for (std::size_t k = 0; k < plans.size(); ++k)
    if (choices[k].work > 0 && block > 0)
      plans[k].splits =
          std::clamp<std::int64_t>(static_cast<std::int64_t>(choices[k].work / block + 0.999), 1, choices[k].tiles);
  return plans;
}

std::vector<SqNormPlan> sq_norm_plan_for(const std::vector<SqNormParams>& layers, DType dtype, int device) {
  if (layers.empty()) return {};
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute",
        kOperation, layers[0], device);
  // The architecture for which the running code was compiled, here or by the driver: code for an older GPU has no
  // routes of tensor cores.
  const DeviceGuard guard(kOperation, layers[0], device);
  cudaFuncAttributes attributes{};
  const auto kernel = reinterpret_cast<const void*>(&sq_norm_layers<__half, kFew>);
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes", kOperation, layers[0], device);
  return sq_norm_plan(layers, dtype, multiprocessors, attributes.ptxVersion);
}

void sq_norm_cuda(const std::vector<SqNormParams>& layers, const std::vector<SqNormPlan>& plans, DType dtype, void* out,
                  void* shares, int device, std::uintptr_t stream_handle) {
  if (layers.empty() || layers[0].B == 0) return;
  const DeviceGuard guard(kOperation, layers[0], device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  with_type(dtype, [&](auto in) {
    using In = typename decltype(in)::type;
    for (std::size_t first = 0; first < layers.size(); first += kMostLayers) {
      const int count = static_cast<int>(std::min<std::size_t>(layers.size() - first, kMostLayers));
      const auto run = count <= kFew ? launch_layers<In, kFew> : launch_layers<In, kMostLayers>;
      run(&layers[first], &plans[first], count, static_cast<Sum<In>*>(out) + first * layers[0].B, shares, device,
          stream);
    }
  });
}

}  // namespace gradext
