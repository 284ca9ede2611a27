// A tile of a matrix product in the registers of a block: a tile of G for many positions, or of a Gram matrix.
#pragma once

#include "kernel.cuh"

namespace gradext {

// A block of kThreads is 16 x 16 threads, each of which computes kPatch x kPatch numbers of the tile. A slice of the
// summed dimension lies in shared memory, for each factor of the product, and its threads' patches as a whole: read
// by 16-byte loads without bank conflicts. The pad behind each row keeps writes down a column to two a bank.
constexpr int kSide = 16, kSlice = 16;
constexpr std::int64_t kPiece = 1024;  // how many products are added up one after the other
static_assert(kSide * kSide == kThreads);

// Blocks that a multiprocessor must hold at once, so that some multiply while others wait for memory.
template <class Real>
constexpr int kResidentBlocks = sizeof(Real) == 4 ? 3 : 2;

template <class Real, int kPatch>
struct Slices {
  struct alignas(sizeof(Real) * kPatch < 16 ? sizeof(Real) * kPatch : 16) Patch {
    Real element[kPatch];
  };
  Patch x[kSlice][kSide + 1], y[kSlice][kSide + 1];
};

// A factor of the product, [K, N]: numbers in memory.
template <class In>
struct Strided {
  const In* data;
  std::int64_t stride_k, stride_n;

  // Whether its numbers are contiguous along a column, not along a row.
  __device__ bool by_columns() const { return stride_k == 1 && stride_n != 1; }
};

// Where a thread's numbers lie in a slice of kSlice rows and a tile's columns: neighbouring threads read neighbouring
// numbers.
template <int kPatch>
struct Place {
  int k, n, step_k, step_n;

  __device__ __forceinline__ explicit Place(bool by_columns) {
    constexpr int kTile = kSide * kPatch;
    const int thread = static_cast<int>(threadIdx.x);
    k = by_columns ? thread % kSlice : thread / kTile, n = by_columns ? thread / kSlice : thread % kTile;
    step_k = by_columns ? 0 : kThreads / kTile, step_n = by_columns ? kThreads / kSlice : 0;
  }
};

// A thread's numbers of a slice, x[k0 + k, n0 + n], in registers: all loads are started before the first number is
// stored. Zero for k >= rows and for n >= columns.
template <class In, int kPatch>
__device__ __forceinline__ void load_slice(const Strided<In>& x, std::int64_t k0, int rows, std::int64_t n0,
                                           int columns, In (&staged)[kPatch]) {
  const Place<kPatch> place(x.by_columns());
  const In* at = x.data + (k0 + place.k) * x.stride_k + (n0 + place.n) * x.stride_n;
  const std::int64_t step = place.step_k * x.stride_k + place.step_n * x.stride_n;
#pragma unroll
  for (int pass = 0; pass < kPatch; ++pass, at += step) {
    staged[pass] = In(0.0f);
    if (place.k + pass * place.step_k < rows && place.n + pass * place.step_n < columns) staged[pass] = *at;
  }
}

template <class In, int kPatch, class Patch>
__device__ __forceinline__ void store_slice(const Strided<In>& x, const In (&staged)[kPatch],
                                            Patch (&to)[kSlice][kSide + 1]) {
  const Place<kPatch> place(x.by_columns());
#pragma unroll
  for (int pass = 0; pass < kPatch; ++pass) {
    const int column = place.n + pass * place.step_n;
    to[place.k + pass * place.step_k][column / kPatch].element[column % kPatch] = convert<Sum<In>>(staged[pass]);
  }
}

// sum[u][v] = Σ_k x[k, x0 + (thread / 16) kPatch + u] · y[k, y0 + (thread % 16) kPatch + v], for begin <= k < end.
// Every thread of the block must call it.
template <int kPatch, class In, class Real>
__device__ __forceinline__ void multiply_tile(const Strided<In>& x, std::int64_t x0, std::int64_t x_size,
                                              const Strided<In>& y, std::int64_t y0, std::int64_t y_size,
                                              std::int64_t begin, std::int64_t end, Slices<Real, kPatch>& slices,
                                              Real (&sum)[kPatch][kPatch]) {
  const int row = static_cast<int>(threadIdx.x) / kSide, column = static_cast<int>(threadIdx.x) % kSide;
#pragma unroll
  for (int u = 0; u < kPatch; ++u)
#pragma unroll
    for (int v = 0; v < kPatch; ++v) sum[u][v] = 0;
  constexpr std::int64_t kTile = kSide * kPatch;
  const int x_columns = static_cast<int>(min(x_size - x0, kTile)),
            y_columns = static_cast<int>(min(y_size - y0, kTile));
  for (std::int64_t k0 = begin; k0 < end; k0 += kSlice) {
    const int rows = static_cast<int>(min(end - k0, std::int64_t{kSlice}));
    In xs[kPatch], ys[kPatch];
    load_slice(x, k0, rows, x0, x_columns, xs);
    load_slice(y, k0, rows, y0, y_columns, ys);
    __syncthreads();  // the last slice has been read
    store_slice(x, xs, slices.x);
    store_slice(y, ys, slices.y);
    __syncthreads();
#pragma unroll(8 / kPatch)
    for (int k = 0; k < rows; ++k) {
      const auto left = slices.x[k][row], right = slices.y[k][column];
#pragma unroll
      for (int u = 0; u < kPatch; ++u)
#pragma unroll
        for (int v = 0; v < kPatch; ++v) sum[u][v] += left.element[u] * right.element[v];
    }
  }
}

// The same for all K, in pieces: added to the running sum of very many products, each would lose its last bits.
template <int kPatch, class In, class Real>
__device__ __forceinline__ void multiply_long_tile(const Strided<In>& x, std::int64_t x0, std::int64_t x_size,
                                                   const Strided<In>& y, std::int64_t y0, std::int64_t y_size,
                                                   std::int64_t K, Slices<Real, kPatch>& slices,
                                                   Real (&sum)[kPatch][kPatch]) {
#pragma unroll
  for (int u = 0; u < kPatch; ++u)
#pragma unroll
    for (int v = 0; v < kPatch; ++v) sum[u][v] = 0;
  for (std::int64_t begin = 0; begin < K; begin += kPiece) {
    Real piece[kPatch][kPatch];
    multiply_tile(x, x0, x_size, y, y0, y_size, begin, min(begin + kPiece, K), slices, piece);
#pragma unroll
    for (int u = 0; u < kPatch; ++u)
#pragma unroll
      for (int v = 0; v < kPatch; ++v) sum[u][v] += piece[u][v];
  }
}

}  // namespace gradext
