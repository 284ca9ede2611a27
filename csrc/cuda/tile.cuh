// A tile of a matrix product in the registers of a block: a tile of G for many positions, or of a Gram matrix.
#pragma once

#include "kernel.cuh"

namespace gradext {

// A block of kThreads is 16 x 16 threads, each of which makes kPatch x kPatch numbers of the tile. A slice of the
// summed dimension lies in shared memory, for each factor of the product, and its threads' patches as a whole: read
// by 16-byte loads without bank conflicts. The pad behind each row keeps writes down a column to two a bank.
constexpr int kSide = 16, kSlice = 16;
constexpr std::int64_t kPiece = 1024;  // products that are added up one after the other
static_assert(kSide * kSide == kThreads);

// Blocks that a multiprocessor has to hold at once, so that some multiply while others wait for memory.
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
  static constexpr int kUnroll = 4;  // numbers that a thread has on their way

  struct Cursor {
    const In* at;
    std::int64_t step;

    __device__ Sum<In> read() const { return convert<Sum<In>>(*at); }
    __device__ void advance() { at += step; }
  };

  const In* data;
  std::int64_t stride_k, stride_n;

  // Whether its numbers follow each other down a column and not along a row.
  __device__ bool by_columns() const { return stride_k == 1 && stride_n != 1; }
  __device__ Cursor cursor(std::int64_t k, std::int64_t n, int step_k, int step_n) const {
    return {data + k * stride_k + n * stride_n, step_k * stride_k + step_n * stride_n};
  }
};

// x[k0 + k, n0 + n] for k < rows and the n of a tile, zero from n = columns on; neighbouring threads read neighbouring
// numbers.
template <int kPatch, class X, class Patch>
__device__ __forceinline__ void load_slice(const X& x, Patch (&to)[kSlice][kSide + 1], std::int64_t k0, int rows,
                                           std::int64_t n0, int columns) {
  constexpr int kTile = kSide * kPatch;
  const int thread = static_cast<int>(threadIdx.x);
  const bool by_columns = x.by_columns();
  int k = by_columns ? thread % kSlice : thread / kTile, n = by_columns ? thread / kSlice : thread % kTile;
  const int step_k = by_columns ? 0 : kThreads / kTile, step_n = by_columns ? kThreads / kSlice : 0;
  auto cursor = x.cursor(k0 + k, n0 + n, step_k, step_n);
#pragma unroll X::kUnroll
  for (int pass = 0; pass < kPatch; ++pass) {
    if (k < rows) to[k][n / kPatch].element[n % kPatch] = n < columns ? cursor.read() : 0;
    k += step_k;
    n += step_n;
    cursor.advance();
  }
}

// sum[u][v] = Σ_k x[k, x0 + (thread / 16) kPatch + u] · y[k, y0 + (thread % 16) kPatch + v], for begin <= k < end.
// Every thread of the block has to call it.
template <int kPatch, class X, class Y, class Real>
__device__ __forceinline__ void multiply_tile(const X& x, std::int64_t x0, std::int64_t x_size, const Y& y,
                                              std::int64_t y0, std::int64_t y_size, std::int64_t begin,
                                              std::int64_t end, Slices<Real, kPatch>& slices,
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
    __syncthreads();  // the last slice has been read
    load_slice<kPatch>(x, slices.x, k0, rows, x0, x_columns);
    load_slice<kPatch>(y, slices.y, k0, rows, y0, y_columns);
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

// The same for all K, in pieces: beside the running sum of very many products, each of them would lose its last bits.
template <int kPatch, class X, class Y, class Real>
__device__ __forceinline__ void multiply_long_tile(const X& x, std::int64_t x0, std::int64_t x_size, const Y& y,
                                                   std::int64_t y0, std::int64_t y_size, std::int64_t K,
                                                   Slices<Real, kPatch>& slices, Real (&sum)[kPatch][kPatch]) {
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
