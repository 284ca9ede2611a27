// The squared norms of per-sample gradients that are never written, of many layers at once,
//
//   out[l, b] = sum_oi (sum_t delta[b, t, o] * activation[b, t, i])^2
//             = sum_st (delta[b, s] . delta[b, t]) (activation[b, s] . activation[b, t]).
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"

namespace gradext {

// A layer. All strides are in elements, may be zero or negative, and need not be those of a dense tensor.
struct SqNormParams {
  const void* delta;       // [B, T, O]
  const void* activation;  // [B, T, I]
  std::int64_t B, T, O, I;
  std::int64_t delta_b, delta_t, delta_o;
  std::int64_t activation_b, activation_t, activation_i;
};

// How the norms of a layer are computed.
enum class SqNormRoute : int {
  rows,         // T = 1: the product of the factors' own norms
  gradient_64,  // tiles of G, summed over the positions and squared, on the CUDA cores
  gram_16,      // tiles of both T x T Gram matrices, multiplied, on the CUDA cores
  gram_32,
  gram_64,
  mma_gradient_128,  // the same on tensor cores
  mma_gradient_64,
  mma_gram_64,
};
inline constexpr const char* kSqNormRouteNames[] = {"rows",    "gradient_64",      "gram_16",         "gram_32",
                                                    "gram_64", "mma_gradient_128", "mma_gradient_64", "mma_gram_64"};

struct SqNormPlan {
  SqNormRoute route;
  std::int64_t splits;  // blocks that share the tiles of one sample
};

// The plans with the least estimated time on a GPU with so many multiprocessors, which all layers together fill.
std::vector<SqNormPlan> sq_norm_plan(const std::vector<SqNormParams>& layers, DType dtype, int multiprocessors,
                                     int capability);

// The same for the given device.
std::vector<SqNormPlan> sq_norm_plan_for(const std::vector<SqNormParams>& layers, DType dtype, int device);

// One launch for up to kMostLayers layers of one B and type writes the partial sum of each block to `shares`
// [sum of B * splits]; a second one adds them up. out [layers, B] and shares are fp64 for fp64 factors, else fp32. Sums
// are taken in a fixed order: the same call gives the same bits. Asynchronous on `stream` (a cudaStream_t).
constexpr int kMostLayers = 320;
void sq_norm_cuda(const std::vector<SqNormParams>& layers, const std::vector<SqNormPlan>& plans, DType dtype, void* out,
                  void* shares, int device, std::uintptr_t stream);

}  // namespace gradext
