// The squared norm of per-sample gradients that are never written,
//
//   out[b] = sum_oi (sum_t delta[b, t, o] * activation[b, t, i])^2
//          = sum_st (delta[b, s] . delta[b, t]) (activation[b, s] . activation[b, t]).
#pragma once

#include <cstdint>

#include "dtype.h"

namespace gradext {

// All strides are in elements, may be zero or negative, and need not be those of a dense tensor.
struct SqNormParams {
  const void* delta;       // [B, T, O]
  const void* activation;  // [B, T, I]
  void* out;               // [B], fp64 for fp64 factors, else fp32
  std::int64_t B, T, O, I;
  std::int64_t delta_b, delta_t, delta_o;
  std::int64_t activation_b, activation_t, activation_i;
  DType dtype;  // of delta and activation
};

// How the norms for T > 1 are computed.
struct SqNormPlan {
  int gram_tile;        // the side of a tile of both T x T Gram matrices, 16, 32 or 64; 0: through 64 x 64 tiles of G
  std::int64_t splits;  // blocks that share the tiles of one sample
};

// The plan of the least counted time on a GPU of so many multiprocessors.
SqNormPlan sq_norm_plan(std::int64_t B, std::int64_t T, std::int64_t O, std::int64_t I, int multiprocessors);

// The same for the given device.
SqNormPlan sq_norm_plan_for(std::int64_t B, std::int64_t T, std::int64_t O, std::int64_t I, int device);

// `shares` [B, splits], of out's type, holds what each block found; unused where splits is 1. For T = 1 the plan has
// no meaning. Sums are taken in a fixed order: the same call gives the same bits. Asynchronous on `stream` (a
// cudaStream_t).
void sq_norm_cuda(const SqNormParams& p, const SqNormPlan& plan, void* shares, int device, std::uintptr_t stream);

}  // namespace gradext
