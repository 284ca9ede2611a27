// The CUDA outer product: kernels, and the launch that chooses among them.
#include "../outer.h"
#include "epilogue.cuh"
#include "launch.cuh"
#include "tile.cuh"

namespace gradext {
namespace {

constexpr const char* kOperation = "outer_cuda";

// 16 bytes of the output, the widest store there is; written past the cache, as nothing here reads them
// again.
template <class Out>
union Chunk {
  static constexpr int kSize = 16 / sizeof(Out);
  __device__ Chunk() {}
  Out element[kSize];
  uint4 all;
};

template <class Out>
__device__ __forceinline__ void store_one(Out* to, Out value) {
  __stcs(to, value);
}

// T = 1. The output falls into runs: stretches of memory without gaps, a sample's [O, I] or, where rows are
// padded, one row. In a run the 16-byte chunks repeat their position relative to the rows every `period`
// rows, the least number of rows that fills whole chunks. So a thread takes one position within the period,
// loads its activations once, and steps from period to period: per store it loads one delta (two where the
// chunk lies across rows), and it divides only before the loop.
struct Runs {
  const void *delta, *activation, *operand;
  void* out;
  std::int64_t I;
  std::int64_t delta_b, delta_o, activation_b, activation_i, operand_b, operand_o, out_b, out_o;
  std::int64_t runs, rows;  // runs in all; rows in each
  std::int64_t runs_per_sample;
  std::int64_t period;         // rows
  std::int64_t period_chunks;  // period * I * sizeof(Out) / 16
  std::int64_t column_tiles;   // blocks side by side in a period
  std::int64_t steps;          // periods that one thread takes
  std::int64_t row_tiles;      // blocks below one another in a run
  std::int64_t tiles;          // column_tiles * row_tiles * runs / z, rounded up
  unsigned x, y, z;            // threads of a block: chunks within the period, periods, runs
  Epilogue epilogue;
};

// What the thread (x, y, z) writes of a tile: one block's share.
template <class In, class Out, bool kFused>
__device__ __forceinline__ void write_runs(const Runs& p, std::int64_t tile, unsigned x, unsigned y, unsigned z) {
  constexpr int kSize = Chunk<Out>::kSize;
  using Real = Sum<In>;
  const std::int64_t length = p.rows * p.I;
  const std::int64_t run_tile = divide(tile, p.column_tiles * p.row_tiles);
  const std::int64_t within = tile - run_tile * p.column_tiles * p.row_tiles;
  const std::int64_t row_tile = divide(within, p.column_tiles);
  const std::int64_t column_tile = within - row_tile * p.column_tiles;

  const std::int64_t run = run_tile * p.z + z;
  if (run >= p.runs) return;
  const std::int64_t b = divide(run, p.runs_per_sample);
  const std::int64_t first_row = run - b * p.runs_per_sample;
  const In* delta = static_cast<const In*>(p.delta) + b * p.delta_b + first_row * p.delta_o;
  const In* activation = static_cast<const In*>(p.activation) + b * p.activation_b;
  Out* out = static_cast<Out*>(p.out) + b * p.out_b + first_row * p.out_o;
  const In* operand = nullptr;
  if constexpr (kFused) operand = static_cast<const In*>(p.operand) + b * p.operand_b + first_row * p.operand_o;

  // Elements in front of the first 16-byte boundary, and the whole chunks behind it.
  const int misplaced = static_cast<int>(reinterpret_cast<std::uintptr_t>(out) % 16 / sizeof(Out));
  const std::int64_t head = min(static_cast<std::int64_t>(misplaced == 0 ? 0 : kSize - misplaced), length);
  const std::int64_t chunks = (length - head) / kSize;

  if (within == 0) {  // the first block of a run writes its ends, too short for a chunk
    const std::int64_t tail = head + chunks * kSize;
    const std::int64_t ends = head + length - tail;
    for (std::int64_t k = y * p.x + x; k < ends; k += p.x * p.y) {
      const std::int64_t e = k < head ? k : tail + k - head;
      const std::int64_t o = divide(e, p.I);
      Real d = convert<Real>(delta[o * p.delta_o]);
      if constexpr (kFused) d = apply(p.epilogue, d, convert<Real>(operand[o * p.operand_o]));
      store_one(out + e, convert<Out>(d * convert<Real>(activation[(e - o * p.I) * p.activation_i])));
    }
  }

  const std::int64_t position = column_tile * p.x + x;
  const std::int64_t period = row_tile * p.steps * p.y + y;
  std::int64_t chunk = period * p.period_chunks + position;
  if (position >= p.period_chunks || chunk >= chunks) return;

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

  const In* d = delta + (period * p.period + o) * p.delta_o;
  const In* z0 = nullptr;
  if constexpr (kFused) z0 = operand + (period * p.period + o) * p.operand_o;
  Out* to = out + head + chunk * kSize;
  const std::int64_t next_delta = p.period * p.y * p.delta_o;
  const std::int64_t next_operand = p.period * p.y * p.operand_o;
  const std::int64_t next_chunk = p.period_chunks * p.y;
#pragma unroll(kFused ? 1 : 4)
  for (std::int64_t step = 0; step < p.steps; ++step) {
    if (chunk >= chunks) break;
    Chunk<Out> c;
    if constexpr (kFused) {
      // Once for each row, not for each element: an epilogue costs more than the rest.
#pragma unroll 1
      for (int r = 0; r <= below[kSize - 1]; ++r) {
        const Real d0 = apply(p.epilogue, convert<Real>(d[r * p.delta_o]), convert<Real>(z0[r * p.operand_o]));
#pragma unroll
        for (int k = 0; k < kSize; ++k)
          if (below[k] == r) c.element[k] = convert<Out>(d0 * a[k]);
      }
      z0 += next_operand;
    } else if (below[kSize - 1] == 0) {
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

// One problem without an epilogue.
template <class In, class Out>
__global__ void __launch_bounds__(kThreads, 3) outer_runs(const __grid_constant__ Runs p) {
  for (std::int64_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x)
    write_runs<In, Out, false>(p, tile, threadIdx.x, threadIdx.y, threadIdx.z);
}

// Several problems, or one with an epilogue. All cross as one argument, which may take 4 KB before CUDA 12.1.
constexpr int kGroup = 16;
struct Group {
  Runs problem[kGroup];
  int problems;
};
static_assert(sizeof(Group) <= 4096);

template <class In, class Out>
__global__ void __launch_bounds__(kThreads, 3) outer_group(const __grid_constant__ Group group) {
  std::int64_t before = 0;  // tiles of the problems before this one
  int problem = 0;
  for (std::int64_t tile = blockIdx.x;; tile += gridDim.x) {
    while (problem < group.problems && tile - before >= group.problem[problem].tiles)
      before += group.problem[problem++].tiles;
    if (problem == group.problems) return;
    const Runs& p = group.problem[problem];
    const unsigned x = threadIdx.x % p.x, row = threadIdx.x / p.x, y = row % p.y, z = row / p.y;
    if (z >= p.z) continue;
    if (p.epilogue == Epilogue::none)
      write_runs<In, Out, false>(p, tile - before, x, y, z);
    else
      write_runs<In, Out, true>(p, tile - before, x, y, z);
  }
}

// T > 1 (and T = 0). A block makes a 64 x 64 tile of one sample's output. Only the output is written.
constexpr int kPatch = 4, kTile = kSide * kPatch;

// delta under its epilogue, [T, O].
template <class In>
struct Fused {
  static constexpr int kUnroll = 1;  // the epilogues are long

  struct Cursor {
    typename Strided<In>::Cursor delta, operand;
    Epilogue epilogue;

    __device__ Sum<In> read() const { return apply(epilogue, delta.read(), operand.read()); }
    __device__ void advance() { delta.advance(), operand.advance(); }
  };

  Strided<In> delta, operand;
  Epilogue epilogue;

  __device__ bool by_columns() const { return delta.by_columns(); }
  __device__ Cursor cursor(std::int64_t t, std::int64_t o, int step_t, int step_o) const {
    return {delta.cursor(t, o, step_t, step_o), operand.cursor(t, o, step_t, step_o), epilogue};
  }
};

template <class In, class Out, bool kFused>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Sum<In>>)
    outer_sum(const __grid_constant__ OuterParams p, std::int64_t tiles_o, std::int64_t tiles_i) {
  using Real = Sum<In>;
  __shared__ Slices<Real, kPatch> slices;
  const int thread = static_cast<int>(threadIdx.x);

  for (std::int64_t tile = blockIdx.x; tile < p.B * tiles_o * tiles_i; tile += gridDim.x) {
    const std::int64_t row_of_tiles = divide(tile, tiles_i);
    const std::int64_t b = divide(row_of_tiles, tiles_o);
    const std::int64_t o0 = (row_of_tiles - b * tiles_o) * kTile, i0 = (tile - row_of_tiles * tiles_i) * kTile;
    const Strided<In> delta{static_cast<const In*>(p.delta) + b * p.delta_b, p.delta_t, p.delta_o};
    const Strided<In> activation{static_cast<const In*>(p.activation) + b * p.activation_b, p.activation_t,
                                 p.activation_i};
    Real sum[kPatch][kPatch];
    if constexpr (kFused) {
      const Strided<In> operand{static_cast<const In*>(p.operand) + b * p.operand_b, p.operand_t, p.operand_o};
      multiply_long_tile(Fused<In>{delta, operand, p.epilogue}, o0, p.O, activation, i0, p.I, p.T, slices, sum);
    } else {
      multiply_long_tile(delta, o0, p.O, activation, i0, p.I, p.T, slices, sum);
    }

    const std::int64_t i = i0 + thread % kSide * kPatch;
#pragma unroll
    for (int y = 0; y < kPatch; ++y) {
      const std::int64_t o = o0 + thread / kSide * kPatch + y;
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

std::int64_t common_divisor(std::int64_t a, std::int64_t b) { return b == 0 ? a : common_divisor(b, a % b); }

Runs plan_runs(const OuterParams& p, std::int64_t element_size) {
  const std::int64_t kSize = 16 / element_size;
  const bool joined = p.O == 1 || p.out_o == p.I;
  Runs r{};
  r.delta = p.delta, r.activation = p.activation, r.operand = p.operand, r.out = p.out, r.I = p.I;
  r.delta_b = p.delta_b, r.delta_o = p.delta_o, r.activation_b = p.activation_b, r.activation_i = p.activation_i;
  r.operand_b = p.operand_b, r.operand_o = p.operand_o, r.out_b = p.out_b, r.out_o = p.out_o;
  r.epilogue = p.epilogue;
  r.runs_per_sample = joined ? 1 : p.O;
  r.rows = joined ? p.O : 1;
  r.runs = p.B * r.runs_per_sample;
  r.period = kSize / common_divisor(kSize, p.I);
  r.period_chunks = r.period * p.I / kSize;
  const std::int64_t periods = divide_up(r.rows, r.period);

  // x takes a period in blocks as even as can be, y what x leaves of the threads, z what the run leaves.
  r.column_tiles = divide_up(r.period_chunks, kThreads);
  r.x = static_cast<unsigned>(divide_up(r.period_chunks, r.column_tiles));
  r.y = static_cast<unsigned>(std::min<std::int64_t>(periods, kThreads / r.x));
  r.z = static_cast<unsigned>(std::min<std::int64_t>(r.runs, std::min(kThreads / (r.x * r.y), 64u)));

  // More steps a thread spread its preparation over more stores, as long as every multiprocessor keeps
  // several blocks.
  constexpr std::int64_t kEnoughBlocks = 8192, kMaxSteps = 16;
  const std::int64_t rows_of_blocks = divide_up(periods, r.y);
  const std::int64_t others = r.column_tiles * divide_up(r.runs, r.z);
  r.steps = std::clamp<std::int64_t>(rows_of_blocks * others / kEnoughBlocks, 1, std::min(kMaxSteps, rows_of_blocks));
  r.row_tiles = divide_up(rows_of_blocks, r.steps);
  r.tiles = others * r.row_tiles;
  return r;
}

template <class In, class Out>
void launch_outer(const std::vector<OuterParams>& problems, int device, cudaStream_t stream) {
  Group group{};
  std::int64_t tiles = 0;
  const auto launch_group = [&](const OuterParams& last) {
    if (group.problems == 0) return;
    const Runs& first = group.problem[0];
    const cudaError_t error = group.problems == 1 && first.epilogue == Epilogue::none
                                  ? launch(outer_runs<In, Out>, tiles, dim3(first.x, first.y, first.z), stream, first)
                                  : launch(outer_group<In, Out>, tiles, dim3(kThreads), stream, group);
    check(error, "kernel launch", kOperation, last, device);
    group.problems = 0;
    tiles = 0;
  };
  for (const OuterParams& params : problems) {
    const OuterParams p = with_long_rows(params);
    if (p.B == 0 || p.O == 0 || p.I == 0) continue;
    if (p.T == 1) {
      const Runs& runs = group.problem[group.problems++] = plan_runs(p, sizeof(Out));
      tiles += runs.tiles;
      if (group.problems == kGroup) launch_group(p);
      continue;
    }
    const std::int64_t tiles_o = divide_up(p.O, kTile), tiles_i = divide_up(p.I, kTile);
    const auto kernel = p.epilogue == Epilogue::none ? outer_sum<In, Out, false> : outer_sum<In, Out, true>;
    check(launch(kernel, p.B * tiles_o * tiles_i, dim3(kThreads), stream, p, tiles_o, tiles_i), "kernel launch",
          kOperation, p, device);
  }
  launch_group(problems.back());
}

}  // namespace

void outer_cuda(const std::vector<OuterParams>& problems, int device, std::uintptr_t stream_handle) {
  if (problems.empty()) return;
  const DType in_dtype = problems[0].in_dtype, out_dtype = problems[0].out_dtype;
  for (const OuterParams& p : problems)
    if (p.in_dtype != in_dtype || p.out_dtype != out_dtype)
      throw std::invalid_argument("gradext outer_cuda: expected one pair of types for all problems of a call");
  const DeviceGuard guard(kOperation, problems[0], device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  with_type(in_dtype, [&](auto in) {
    with_type(out_dtype, [&](auto out) {
      using In = typename decltype(in)::type;
      using Out = typename decltype(out)::type;
      constexpr bool kHalf = sizeof(In) == 2, kFloat = std::is_same_v<In, float>;
      if constexpr (std::is_same_v<In, Out> || (kFloat && sizeof(Out) == 2) || (kHalf && std::is_same_v<Out, float>))
        launch_outer<In, Out>(problems, device, stream);
      else
        throw std::invalid_argument("gradext outer_cuda: no kernel for this pair of input and output types");
    });
  });
}

}  // namespace gradext
