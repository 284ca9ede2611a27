// The per-sample outer product summed over T,
//
//   out[b, o, i] = sum_t delta[b, t, o] * activation[b, t, i],
//
// as one struct of raw pointers and strides and a launch function per device. Knows neither torch nor Python.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "dtype.h"

namespace gradext {

// All strides are in elements, may be zero or negative, and need not be those of a dense tensor.
struct OuterParams {
  const void* delta;       // [B, T, O]
  const void* activation;  // [B, T, I]
  void* out;               // [B, O, I], last stride 1; its elements must not overlap
  std::int64_t B, T, O, I;
  std::int64_t delta_b, delta_t, delta_o;
  std::int64_t activation_b, activation_t, activation_i;
  std::int64_t out_b, out_o;
  DType in_dtype;  // of delta and activation
  DType out_dtype;
};

// With one input feature every row has one element, the slowest shape on both devices. The same memory read as one row
// of O elements is the fastest. delta and activation have symmetric roles, so this only swaps their names.
inline OuterParams with_long_rows(OuterParams p) {
  if (p.I == 1 && p.out_o == 1) {
    std::swap(p.delta, p.activation);
    std::swap(p.delta_b, p.activation_b);
    std::swap(p.delta_t, p.activation_t);
    std::swap(p.delta_o, p.activation_i);
    std::swap(p.O, p.I);
    p.out_o = p.I;
  }
  return p;
}

// f32 -> f32, f16, bf16 and f64 -> f64. Uses at most `threads` threads, fewer where the work is small. From
// `stream_from` output bytes on the stores go past the cache; negative means three quarters of the last-level cache.
// `isa` selects one of cpu_isas() in place of the best, for tests.
void outer_cpu(const OuterParams& p, int threads, std::int64_t stream_from = -1, const std::string& isa = "");

// Fills [out, out + bytes) with streaming stores by the same threads. Benchmarks compare outer_cpu with its speed.
void nt_fill_cpu(void* out, std::int64_t bytes, int threads);

// Output bytes from which outer_cpu streams past the cache on this machine.
std::int64_t default_stream_from();

// The instruction sets of this machine that outer_cpu was built for, the best first.
std::vector<std::string> cpu_isas();

// f32 -> f32, f16, bf16; f16 -> f16, f32; bf16 -> bf16, f32; f64 -> f64, one such pair for all problems. Problems with
// T = 1 share launches, each of the others has its own. Asynchronous on `stream` (a cudaStream_t).
void outer_cuda(const std::vector<OuterParams>& problems, int device, std::uintptr_t stream);

}  // namespace gradext
