// A tile of a matrix product of half-precision factors on tensor cores, summed in fp32.
#pragma once

#include "tile.cuh"

namespace gradext {

constexpr int kMmaSlice = 32;             // of the summed dimension
constexpr int kMmaPitch = kMmaSlice + 8;  // of a row in shared memory: eight rows of four words have no bank conflict
constexpr int kMmaRows = 4, kMmaColumns = 2;  // of warps in a block
static_assert(kMmaRows * kMmaColumns * kWarp == kThreads);

#if defined(__CUDACC__)
// d += a b for a [16, 16], b [16, 8] and d [16, 8], spread over a warp as PTX says of mma.m16n8k16.
template <class In>
__device__ __forceinline__ void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<In, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
#endif  // the emulator has its own

// A slice of a factor, [kTile, kMmaSlice], contiguous along the summed dimension.
template <class In, int kTile>
struct alignas(16) MmaSlice {
  In row[kTile][kMmaPitch];

  // Two neighbours along the summed dimension.
  __device__ __forceinline__ std::uint32_t pair(int n, int k) const {
    return *reinterpret_cast<const std::uint32_t*>(&row[n][k]);
  }
};

// A thread's part of a slice x[k0 + k, n0 + n], which is zero for n >= columns and for k >= rows. It is twice eight
// contiguous numbers, along the summed dimension or, for two neighbours along it, along the tile. All are loaded into
// registers before the first is stored; those that are not aligned, or lie across an edge, are read one by one when
// they are stored.
template <class In, int kTile>
struct MmaStaged {
  static constexpr int kEights = kTile * kMmaSlice / 8 / kThreads;  // 2 or 1, along the summed dimension
  uint4 value[2];

  struct Place {
    const In* from;
    std::int64_t stride;
    int n, k, count;  // count: how many of the numbers exist
    bool whole;
  };

  __device__ __forceinline__ static bool along_sum(const Strided<In>& x) { return x.stride_k == 1 || x.stride_n != 1; }

  __device__ __forceinline__ static Place place(const Strided<In>& x, int v, int k0, int rows, int n0, int columns) {
    const int thread = static_cast<int>(threadIdx.x);
    const bool along = along_sum(x), aligned = reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0;
    Place p;
    if (along) {
      const int eight = thread + v * kThreads;
      p.n = eight / (kMmaSlice / 8), p.k = eight % (kMmaSlice / 8) * 8;
      p.count = p.n < columns ? min(rows - p.k, 8) : 0;
      p.stride = x.stride_k;
      p.whole = aligned && x.stride_k == 1 && x.stride_n % 8 == 0 && p.count == 8;
    } else {
      p.k = thread % (kMmaSlice / 2) * 2 + v, p.n = thread / (kMmaSlice / 2) * 8;
      p.count = p.k < rows ? min(columns - p.n, 8) : 0;
      p.stride = 1;
      p.whole = aligned && x.stride_k % 8 == 0 && p.count == 8;
    }
    p.from = x.data + std::int64_t{k0 + p.k} * x.stride_k + std::int64_t{n0 + p.n} * x.stride_n;
    return p;
  }

  __device__ __forceinline__ static bool takes_part(const Strided<In>& x, int v) {
    return along_sum(x) ? v < kEights : static_cast<int>(threadIdx.x) / (kMmaSlice / 2) * 8 < kTile;
  }

  __device__ __forceinline__ void load(const Strided<In>& x, int k0, int rows, int n0, int columns) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      value[v] = uint4{0, 0, 0, 0};
      if (!takes_part(x, v)) continue;
      const Place p = place(x, v, k0, rows, n0, columns);
      if (p.whole) value[v] = *reinterpret_cast<const uint4*>(p.from);
    }
  }

  __device__ __forceinline__ void store(const Strided<In>& x, int k0, int rows, int n0, int columns,
                                        MmaSlice<In, kTile>& to) const {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if (!takes_part(x, v)) continue;
      const Place p = place(x, v, k0, rows, n0, columns);
      const bool along = along_sum(x);
      if (p.whole && along) {
        *reinterpret_cast<uint4*>(&to.row[p.n][p.k]) = value[v];
      } else if (p.whole) {
        const std::uint32_t words[4] = {value[v].x, value[v].y, value[v].z, value[v].w};
#pragma unroll
        for (int j = 0; j < 8; ++j)
          *reinterpret_cast<std::uint16_t*>(&to.row[p.n + j][p.k]) =
              static_cast<std::uint16_t>(words[j / 2] >> (j % 2 * 16));
      } else {
#pragma unroll 4
        for (int j = 0; j < 8; ++j)
          to.row[p.n + (along ? 0 : j)][p.k + (along ? j : 0)] = j < p.count ? __ldg(p.from + j * p.stride) : In(0.0f);
      }
    }
  }
};

// The part of a tile [kTile, kTile] of Σ_k x[k, x0 + ...] y[k, y0 + ...] that a warp computes, 16 x 8 numbers at a
// time.
template <class In, int kTile>
struct MmaTile {
  static constexpr int kX = kTile / kMmaRows / 16, kY = kTile / kMmaColumns / 8;
  struct Shared {
    MmaSlice<In, kTile> x, y;
  };
  float sum[kX][kY][4];

  // Every thread of the block must call it.
  __device__ __forceinline__ void multiply(const Strided<In>& x, int x0, int x_size, const Strided<In>& y, int y0,
                                           int y_size, int K, Shared& slices) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, group = lane / 4, pair = lane % 4 * 2;
    const int first_x = thread / kWarp / kMmaColumns * (kX * 16) + group;
    const int first_y = thread / kWarp % kMmaColumns * (kY * 8) + group;
#pragma unroll
    for (int u = 0; u < kX; ++u)
#pragma unroll
      for (int v = 0; v < kY; ++v)
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[u][v][k] = 0;
    MmaStaged<In, kTile> xs, ys;
    for (int k0 = 0; k0 < K; k0 += kMmaSlice) {
      xs.load(x, k0, K - k0, x0, x_size - x0);
      ys.load(y, k0, K - k0, y0, y_size - y0);
      __syncthreads();  // the last slice has been read
      xs.store(x, k0, K - k0, x0, x_size - x0, slices.x);
      ys.store(y, k0, K - k0, y0, y_size - y0, slices.y);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kMmaSlice; k += 16) {
        std::uint32_t left[kX][4];
#pragma unroll
        for (int u = 0; u < kX; ++u) {
          const int n = first_x + u * 16;
          left[u][0] = slices.x.pair(n, k + pair), left[u][1] = slices.x.pair(n + 8, k + pair);
          left[u][2] = slices.x.pair(n, k + pair + 8), left[u][3] = slices.x.pair(n + 8, k + pair + 8);
        }
#pragma unroll
        for (int v = 0; v < kY; ++v) {
          const int n = first_y + v * 8;
          const std::uint32_t right[2] = {slices.y.pair(n, k + pair), slices.y.pair(n, k + pair + 8)};
#pragma unroll
          for (int u = 0; u < kX; ++u) mma<In>(sum[u][v], left[u], right);
        }
      }
    }
  }

  // Calls function(x, y, number) for each number of this thread that lies within [columns_x, columns_y] of the tile.
  template <class Function>
  __device__ __forceinline__ void visit(int columns_x, int columns_y, Function&& function) const {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
    const int first_x = thread / kWarp / kMmaColumns * (kX * 16) + lane / 4;
    const int first_y = thread / kWarp % kMmaColumns * (kY * 8) + lane % 4 * 2;
#pragma unroll
    for (int u = 0; u < kX; ++u)
#pragma unroll
      for (int v = 0; v < kY; ++v)
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (first_x + u * 16 + k / 2 * 8 < columns_x && first_y + v * 8 + k % 2 < columns_y) function(u, v, k);
  }
};

}  // namespace gradext
