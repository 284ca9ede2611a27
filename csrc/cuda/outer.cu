// The CUDA outer product: kernels, and the launch that chooses among them.
#include "../outer.h"
#include "launch.cuh"
#include "tile.cuh"

namespace gradext {
namespace {

constexpr const char* kOperation = "outer_cuda";

// 16 bytes of the output, the widest store there is.
template <class Out>
union Chunk {
  static constexpr int kSize = 16 / sizeof(Out);
  __device__ Chunk() {}
  Out element[kSize];
  uint4 all;
};

// Stores past the cache, or through it where the result is so small that its reader finds it there.
template <bool kStream, class T>
__device__ __forceinline__ void store(T* to, T value) {
  if constexpr (kStream)
    __stcs(to, value);
  else
    store_cached(to, value);
}

template <class Out>
__device__ __forceinline__ void store_one(Out* to, Out value) {
  __stcs(to, value);
}

// T = 1, contiguous activations, and rows of whole, aligned 16-byte chunks. A thread takes one chunk of a row, loads
// its activations once, and steps down the rows of its sample: one delta, one multiplication and one store for each
// row.
struct Rows {
  const void *delta, *activation;
  void* out;
  std::int64_t delta_b, delta_o, activation_b, out_b, out_o;
  std::int64_t next_delta[5], next_out[5];  // 0 to 4 times y rows further, in bytes
  std::uint32_t chunks, rows, samples;
  std::uint32_t x, y, z;  // threads of a block: chunks, rows, samples
  std::uint32_t steps;    // rows of one thread
  Divisor column_tiles, row_tiles;
  std::uint32_t tiles;
};

template <class T>
__device__ __forceinline__ T* moved(T* pointer, std::int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(pointer) + bytes);
}

template <class In, class Out, bool kStream>
__device__ __forceinline__ void write_rows(const Rows& p, std::uint32_t tile, std::uint32_t x, std::uint32_t y,
                                           std::uint32_t z) {
  constexpr int kSize = Chunk<Out>::kSize;
  using Real = Sum<In>;
  std::uint32_t column_tile = tile;
  std::uint32_t row_tile = p.column_tiles(column_tile);
  const std::uint32_t chunk = column_tile * p.x + x, b = p.row_tiles(row_tile) * p.z + z;
  std::uint32_t row = row_tile * (p.steps * p.y) + y;
  if (chunk >= p.chunks || b >= p.samples || row >= p.rows) return;
  const std::uint32_t end = min(p.rows, row + p.steps * p.y);

  Real a[kSize];
  const In* activation = static_cast<const In*>(p.activation) + b * p.activation_b + std::int64_t{chunk} * kSize;
#pragma unroll
  for (int k = 0; k < kSize; ++k) a[k] = convert<Real>(activation[k]);
  const In* delta = static_cast<const In*>(p.delta) + b * p.delta_b + row * p.delta_o;
  auto* to = reinterpret_cast<uint4*>(static_cast<Out*>(p.out) + b * p.out_b + row * p.out_o) + chunk;

  const auto write = [&](Real d, uint4* at) {
    Chunk<Out> c;
#pragma unroll
    for (int k = 0; k < kSize; ++k) c.element[k] = convert<Out>(d * a[k]);
    store<kStream>(at, c.all);
  };
  constexpr int kAtOnce = 4;  // deltas that are being loaded
  for (; row + (kAtOnce - 1) * p.y < end; row += kAtOnce * p.y) {
    In d[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) d[k] = *(k == 0 ? delta : moved(delta, p.next_delta[k]));
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) write(convert<Real>(d[k]), k == 0 ? to : moved(to, p.next_out[k]));
    delta = moved(delta, p.next_delta[kAtOnce]);
    to = moved(to, p.next_out[kAtOnce]);
  }
  for (; row < end; row += p.y) {
    write(convert<Real>(*delta), to);
    delta = moved(delta, p.next_delta[1]);
    to = moved(to, p.next_out[1]);
  }
}

// One problem.
template <class In, class Out, bool kStream>
__global__ void __launch_bounds__(kThreads, 4) outer_rows(const __grid_constant__ Rows p) {
  for (std::uint32_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x)
    write_rows<In, Out, kStream>(p, tile, threadIdx.x, threadIdx.y, threadIdx.z);
}

// T = 1 and any rows. The output consists of runs: memory ranges without gaps, each a sample's [O, I] or, where rows
// are padded, one row. In a run the positions of the 16-byte chunks relative to the rows repeat every `period` rows,
// the least number of rows that fills whole chunks. So a thread takes one position within the period, loads its
// activations once, and steps from period to period. For each store it loads two deltas, which differ where the chunk
// lies across rows, or more where rows are shorter than a chunk. Divisions are done by multiplication.
struct Runs {
  const void *delta, *activation;
  void* out;
  std::int64_t delta_b, delta_o, activation_b, activation_i, out_b, out_o;
  std::int64_t next_delta[4];  // 1 to 4 times y periods further, in bytes
  Divisor I, runs_per_sample;
  Divisor column_tiles;         // blocks side by side in a period
  Divisor row_tiles;            // blocks below one another in a run
  std::uint32_t runs, length;   // runs in all; elements in each, at most kMostOfRun
  std::uint32_t period;         // rows
  std::uint32_t period_chunks;  // period * I * sizeof(Out) / 16
  std::uint32_t steps;          // periods that one thread takes
  std::uint32_t tiles;          // column_tiles * row_tiles * runs / z, rounded up
  std::uint32_t x, y, z;        // threads of a block: chunks within the period, periods, runs
};
constexpr std::int64_t kMostOfRun =
    1 << 29;  // so that 32 bits hold a chunk a step behind the last one of the last block

// The part of a tile that the thread (x, y, z) writes. A tile is the work of one block.
template <class In, class Out>
__device__ __forceinline__ void write_runs(const Runs& p, std::uint32_t tile, std::uint32_t x, std::uint32_t y,
                                           std::uint32_t z) {
  constexpr std::uint32_t kSize = Chunk<Out>::kSize;
  using Real = Sum<In>;
  std::uint32_t column_tile = tile;
  std::uint32_t row_tile = p.column_tiles(column_tile);
  std::uint32_t row = p.row_tiles(row_tile) * p.z + z;  // the run, and in it the first row of its sample
  if (row >= p.runs) return;
  const std::uint32_t b = p.runs_per_sample(row);
  const In* delta = static_cast<const In*>(p.delta) + b * p.delta_b + row * p.delta_o;
  const In* activation = static_cast<const In*>(p.activation) + b * p.activation_b;
  Out* out = static_cast<Out*>(p.out) + b * p.out_b + row * p.out_o;

  // The elements before the first 16-byte boundary, and the whole chunks after it.
  const auto misplaced = static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(out) % 16 / sizeof(Out));
  const std::uint32_t head = min((kSize - misplaced) % kSize, p.length);
  const std::uint32_t chunks = (p.length - head) / kSize;

  if (column_tile == 0 && row_tile == 0) {  // the first block of a run writes its ends, too short for a chunk
    const std::uint32_t inside = chunks * kSize;
#pragma unroll 1
    for (std::uint32_t k = y * p.x + x; k < p.length - inside; k += p.x * p.y) {
      const std::uint32_t e = k < head ? k : k + inside;
      std::uint32_t i = e;
      const Real d = convert<Real>(delta[p.I(i) * p.delta_o]);
      store_one(out + e, convert<Out>(d * convert<Real>(activation[i * p.activation_i])));
    }
  }

  const std::uint32_t position = column_tile * p.x + x, period = row_tile * (p.steps * p.y) + y;
  std::uint32_t chunk = period * p.period_chunks + position;
  if (position >= p.period_chunks || chunk >= chunks) return;
  const std::uint32_t next = p.period_chunks * p.y, end = min(chunks, chunk + p.steps * next);

  std::uint32_t i = head + position * kSize;
  const In* d = delta + (period * p.period + p.I(i)) * p.delta_o;
  auto* to = reinterpret_cast<uint4*>(out + head) + chunk;
  const std::uint32_t cut = p.I.divisor - i;  // elements of the chunk's first row
  Real a[kSize];
#pragma unroll
  for (std::uint32_t k = 0; k < kSize; ++k) {
    a[k] = convert<Real>(activation[i * p.activation_i]);
    if (++i == p.I.divisor) i = 0;
  }

  if (p.I.divisor < kSize) {
#pragma unroll 1
    for (; chunk < end; chunk += next, to += next, d = moved(d, p.next_delta[0])) {
      Chunk<Out> c;
      const In* at = d;
      std::uint32_t left = cut;
#pragma unroll
      for (std::uint32_t k = 0; k < kSize; ++k) {
        if (left == 0) at += p.delta_o, left = p.I.divisor;
        --left;
        c.element[k] = convert<Out>(convert<Real>(*at) * a[k]);
      }
      __stcs(to, c.all);
    }
    return;
  }
  const std::int64_t below = cut < kSize ? p.delta_o : 0;
  const auto write = [&](In first, In second, uint4* at) {
    const Real d0 = convert<Real>(first), d1 = convert<Real>(second);
    Chunk<Out> c;
#pragma unroll
    for (std::uint32_t k = 0; k < kSize; ++k) c.element[k] = convert<Out>((k < cut ? d0 : d1) * a[k]);
    __stcs(at, c.all);
  };
  constexpr std::uint32_t kAtOnce = 4;  // pairs of deltas that are being loaded
  for (; chunk + (kAtOnce - 1) * next < end; chunk += kAtOnce * next) {
    In first[kAtOnce], second[kAtOnce];
#pragma unroll
    for (std::uint32_t k = 0; k < kAtOnce; ++k) {
      const In* at = k == 0 ? d : moved(d, p.next_delta[k - 1]);
      first[k] = *at, second[k] = at[below];
    }
#pragma unroll
    for (std::uint32_t k = 0; k < kAtOnce; ++k) write(first[k], second[k], to + k * next);
    d = moved(d, p.next_delta[kAtOnce - 1]);
    to += kAtOnce * next;
  }
#pragma unroll 1
  for (; chunk < end; chunk += next) {
    write(*d, d[below], to);
    d = moved(d, p.next_delta[0]);
    to += next;
  }
}

// One problem.
template <class In, class Out>
__global__ void __launch_bounds__(kThreads, 4) outer_runs(const __grid_constant__ Runs p) {
  for (std::uint32_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x)
    write_runs<In, Out>(p, tile, threadIdx.x, threadIdx.y, threadIdx.z);
}

// Several problems. All are passed as one argument, of at most 4 KB before CUDA 12.1.
constexpr int kGroup = 16;
struct Problem {
  bool by_rows;
  Divisor x, y;  // threads of a block, which here has one dimension
  std::uint32_t z;
  union {
    Rows rows;
    Runs runs;
  };
  Problem() : by_rows(false), z(0), runs{} {}
  __host__ __device__ std::uint32_t tiles() const { return by_rows ? rows.tiles : runs.tiles; }
};
struct Group {
  Problem problem[kGroup];
  int problems = 0;
};
static_assert(sizeof(Group) <= 4096);

template <class In, class Out, bool kStream>
__global__ void __launch_bounds__(kThreads, 3) outer_group(const __grid_constant__ Group group) {
  std::int64_t before = 0;  // tiles of the problems before this one
  int problem = 0;
  for (std::int64_t tile = blockIdx.x;; tile += gridDim.x) {
    while (problem < group.problems && tile - before >= group.problem[problem].tiles())
      before += group.problem[problem++].tiles();
    if (problem == group.problems) return;
    const Problem& p = group.problem[problem];
    std::uint32_t x = threadIdx.x, y = p.x(x);
    const std::uint32_t z = p.y(y);
    if (z >= p.z) continue;
    if (p.by_rows)
      write_rows<In, Out, kStream>(p.rows, static_cast<std::uint32_t>(tile - before), x, y, z);
    else
      write_runs<In, Out>(p.runs, static_cast<std::uint32_t>(tile - before), x, y, z);
  }
}

// T > 1 (and T = 0). A block computes a 64 x 64 tile of one sample's output. Nothing else is written.
constexpr int kPatch = 4, kTile = kSide * kPatch;

template <class In, class Out>
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
    multiply_long_tile(delta, o0, p.O, activation, i0, p.I, p.T, slices, sum);

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

// A thread prepares once for all of its steps. With somewhat more blocks than can be resident each thread has many
// steps and no part of the GPU is idle.
#ifndef GRADEXT_BLOCKS  // set to try other numbers
#define GRADEXT_BLOCKS 12
#endif
constexpr std::int64_t kBlocksOfMultiprocessor = GRADEXT_BLOCKS;

std::int64_t steps_of(std::int64_t blocks_of_one_step, std::int64_t rows_of_blocks, int multiprocessors) {
  return std::clamp<std::int64_t>(divide_up(blocks_of_one_step, kBlocksOfMultiprocessor * multiprocessors), 1,
                                  std::max<std::int64_t>(rows_of_blocks, 1));
}

// Whether `Rows` can describe it: whole, aligned chunks, and indices that fit.
bool by_rows(const OuterParams& p, std::int64_t element_size) {
  const std::int64_t kSize = 16 / element_size;
  return p.activation_i == 1 && p.I % kSize == 0 && reinterpret_cast<std::uintptr_t>(p.out) % 16 == 0 &&
         (p.O == 1 || p.out_o % kSize == 0) && (p.B == 1 || p.out_b % kSize == 0) && p.I / kSize < (1 << 30) &&
         p.O < (1 << 30) && p.B < (1 << 30) && p.B * p.O < kMaxBlocks * 16 / (1 + p.I / kSize / kThreads);
}

Rows plan_rows(const OuterParams& p, std::int64_t element_size, std::int64_t in_size, int multiprocessors) {
  const std::int64_t chunks = p.I * element_size / 16;
  Rows r{};
  r.delta = p.delta, r.activation = p.activation, r.out = p.out;
  r.delta_b = p.delta_b, r.delta_o = p.delta_o, r.activation_b = p.activation_b;
  r.out_b = p.out_b, r.out_o = p.out_o;
  r.chunks = static_cast<std::uint32_t>(chunks), r.rows = static_cast<std::uint32_t>(p.O);
  r.samples = static_cast<std::uint32_t>(p.B);
  // x divides a row into blocks as evenly as possible, y takes the threads that x leaves, z those that the sample
  // leaves.
  const std::int64_t column_tiles = divide_up(chunks, kThreads);
  r.x = static_cast<std::uint32_t>(divide_up(chunks, column_tiles));
  r.y = static_cast<std::uint32_t>(std::min<std::int64_t>(p.O, kThreads / r.x));
  r.z = static_cast<std::uint32_t>(std::min<std::int64_t>(p.B, std::min(kThreads / (r.x * r.y), 64u)));
  const std::int64_t rows_of_blocks = divide_up(p.O, r.y), others = column_tiles * divide_up(p.B, r.z);
  r.steps = static_cast<std::uint32_t>(steps_of(rows_of_blocks * others, rows_of_blocks, multiprocessors));
  const std::int64_t row_tiles = divide_up(rows_of_blocks, r.steps);
  r.column_tiles = Divisor(column_tiles), r.row_tiles = Divisor(row_tiles);
  r.tiles = static_cast<std::uint32_t>(row_tiles * others);
  for (int k = 0; k < 5; ++k)
    r.next_delta[k] = k * r.y * p.delta_o * in_size, r.next_out[k] = k * r.y * p.out_o * element_size;
  return r;
}

Runs plan_runs(const OuterParams& p, std::int64_t element_size, std::int64_t in_size, int multiprocessors) {
  const std::int64_t kSize = 16 / element_size;
  const bool joined = p.O == 1 || p.out_o == p.I;
  const std::int64_t rows = joined ? p.O : 1, runs = p.B * (joined ? 1 : p.O);
  const std::int64_t period = kSize / common_divisor(kSize, p.I), period_chunks = period * p.I / kSize;
  const std::int64_t periods = divide_up(rows, period);
  // x divides a period into blocks as evenly as possible, y takes the threads that x leaves, z those that the run
  // leaves.
  const std::int64_t column_tiles = divide_up(period_chunks, kThreads);
  const std::int64_t x = divide_up(period_chunks, column_tiles), y = std::min(periods, kThreads / x);
  const std::int64_t z = std::min<std::int64_t>(runs, std::min<std::int64_t>(kThreads / (x * y), 64));

  const std::int64_t rows_of_blocks = divide_up(periods, y), others = column_tiles * divide_up(runs, z);
  const std::int64_t steps = steps_of(rows_of_blocks * others, rows_of_blocks, multiprocessors);
  const std::int64_t row_tiles = divide_up(rows_of_blocks, steps);

  Runs r{};
  r.delta = p.delta, r.activation = p.activation, r.out = p.out;
  r.delta_b = p.delta_b, r.delta_o = p.delta_o, r.activation_b = p.activation_b, r.activation_i = p.activation_i;
  r.out_b = p.out_b, r.out_o = p.out_o;
  for (int k = 0; k < 4; ++k) r.next_delta[k] = (k + 1) * period * y * p.delta_o * in_size;
  r.I = Divisor(p.I), r.runs_per_sample = Divisor(joined ? 1 : p.O);
  r.column_tiles = Divisor(column_tiles), r.row_tiles = Divisor(row_tiles);
  const auto set = [](std::uint32_t& to, std::int64_t value) { to = static_cast<std::uint32_t>(value); };
  set(r.runs, runs), set(r.length, rows * p.I), set(r.period, period), set(r.period_chunks, period_chunks);
  set(r.steps, steps), set(r.tiles, row_tiles * others), set(r.x, x), set(r.y, y), set(r.z, z);
  return r;
}

// Calls function(part) for parts of a problem whose runs, and number of runs, fit into 32 bits: usually one part.
template <class In, class Out, class Function>
void in_parts(const OuterParams& p, Function&& function) {
  const std::int64_t I = std::min(p.I, kMostOfRun), O = std::clamp<std::int64_t>(kMostOfRun / I, 1, p.O);
  const std::int64_t B = std::clamp<std::int64_t>((1 << 30) / O, 1, p.B);
  for (std::int64_t b = 0; b < p.B; b += B)
    for (std::int64_t o = 0; o < p.O; o += O)
      for (std::int64_t i = 0; i < p.I; i += I) {
        OuterParams part = p;
        part.B = std::min(B, p.B - b), part.O = std::min(O, p.O - o), part.I = std::min(I, p.I - i);
        part.delta = static_cast<const In*>(p.delta) + b * p.delta_b + o * p.delta_o;
        part.activation = static_cast<const In*>(p.activation) + b * p.activation_b + i * p.activation_i;
        part.out = static_cast<Out*>(p.out) + b * p.out_b + o * p.out_o + i;
        function(part);
      }
}

template <class In, class Out>
void launch_outer(const std::vector<OuterParams>& problems, int device, cudaStream_t stream) {
  const Size size = size_of(device, kOperation, problems[0]);
  Group group{};
  std::int64_t tiles = 0, bytes = 0;
  const auto launch_group = [&](const OuterParams& last) {
    if (group.problems == 0) return;
    const bool streams = bytes > size.l2_bytes / 2;
    const Problem& first = group.problem[0];
    cudaError_t error;
    if (group.problems > 1)
      error = launch(streams ? outer_group<In, Out, true> : outer_group<In, Out, false>, tiles, dim3(kThreads), stream,
                     group);
    else if (first.by_rows)
      error = launch(streams ? outer_rows<In, Out, true> : outer_rows<In, Out, false>, tiles,
                     dim3(first.rows.x, first.rows.y, first.rows.z), stream, first.rows);
    else
      error = launch(outer_runs<In, Out>, tiles, dim3(first.runs.x, first.runs.y, first.runs.z), stream, first.runs);
    check(error, "kernel launch", kOperation, last, device);
    group.problems = 0;
    tiles = bytes = 0;
  };
  const auto add = [&](const OuterParams& p) {
    Problem& problem = group.problem[group.problems++];
    problem.by_rows = by_rows(p, sizeof(Out));
    const auto divide_block = [&](const auto& plan) {
      problem.x = Divisor(plan.x), problem.y = Divisor(plan.y), problem.z = plan.z;
    };
    if (problem.by_rows)
      divide_block(problem.rows = plan_rows(p, sizeof(Out), sizeof(In), size.multiprocessors));
    else
      divide_block(problem.runs = plan_runs(p, sizeof(Out), sizeof(In), size.multiprocessors));
    tiles += problem.tiles();
    bytes += p.B * p.O * p.I * static_cast<std::int64_t>(sizeof(Out));
    if (group.problems == kGroup) launch_group(p);
  };
  for (const OuterParams& params : problems) {
    const OuterParams p = with_long_rows(params);
    if (p.B == 0 || p.O == 0 || p.I == 0) continue;
    if (p.T == 1 && by_rows(p, sizeof(Out))) {
      add(p);
    } else if (p.T == 1) {
      in_parts<In, Out>(p, add);
    } else {
      const std::int64_t tiles_o = divide_up(p.O, kTile), tiles_i = divide_up(p.I, kTile);
      check(launch(outer_sum<In, Out>, p.B * tiles_o * tiles_i, dim3(kThreads), stream, p, tiles_o, tiles_i),
            "kernel launch", kOperation, p, device);
    }
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
