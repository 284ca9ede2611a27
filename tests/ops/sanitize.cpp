// The CPU kernels, threads and workspace without Python, for the sanitizers: test_sanitizers.py builds and runs it.
// Every kind of shape, type, stride and store is checked against a plain loop, in buffers that end where the tensor
// ends.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/threads.h"
#include "../../csrc/cpu/workspace.h"
#include "../../csrc/outer.h"

namespace {

using gradext::DType;
using gradext::OuterParams;

void expect(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

float widened(const unsigned char* from, DType dtype) {
  if (dtype == DType::f32) {
    float value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, from, sizeof bits);
  if (dtype == DType::bf16) {
    const std::uint32_t wide = std::uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  const float magnitude = (bits & 0x7c00) == 0
                              ? std::ldexp(static_cast<float>(bits & 0x3ff), -24)
                              : std::ldexp(static_cast<float>((bits & 0x3ff) | 0x400), ((bits >> 10) & 31) - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// One call with inputs of the given steps and gaps between the rows of the output, each in memory of just its size.
template <class Real>
void check(std::int64_t B, std::int64_t T, std::int64_t O, std::int64_t I, std::int64_t step, std::int64_t gap,
           DType out_dtype, int threads, bool stream, const std::string& isa = "") {
  const auto room = [](std::int64_t n, std::int64_t by) {
    return static_cast<std::size_t>(n > 0 ? (n - 1) * by + 1 : 0);
  };
  std::vector<Real> delta(room(B * T * O, step)), activation(room(B * T * I, step));
  std::mt19937 generator(static_cast<unsigned>(B + 10 * T + 100 * O + 1000 * I));
  std::uniform_real_distribution<Real> uniform(-2, 2);
  for (Real& x : delta) x = uniform(generator);
  for (Real& x : activation) x = uniform(generator);
  const std::int64_t size = out_dtype == DType::f64 ? 8 : out_dtype == DType::f32 ? 4 : 2, row = I + gap;
  const std::size_t bytes = B * O * I == 0 ? 0 : static_cast<std::size_t>(((B * O - 1) * row + I) * size);
  const std::unique_ptr<unsigned char[]> out(new unsigned char[bytes + 1]);
  std::memset(out.get(), 0xa5, bytes + 1);

  OuterParams p{};
  p.delta = delta.data(), p.activation = activation.data(), p.out = out.get();
  p.B = B, p.T = T, p.O = O, p.I = I;
  p.delta_b = T * O * step, p.delta_t = O * step, p.delta_o = step;
  p.activation_b = T * I * step, p.activation_t = I * step, p.activation_i = step;
  p.out_b = O * row, p.out_o = row;
  p.in_dtype = sizeof(Real) == 8 ? DType::f64 : DType::f32, p.out_dtype = out_dtype;
  gradext::outer_cpu(p, threads, stream ? 0 : INT64_MAX, isa);

  const double eps = out_dtype == DType::f64 ? 1e-15 : out_dtype == DType::f32 ? 1e-6 : 1e-2;
  for (std::int64_t b = 0; b < B; ++b)
    for (std::int64_t o = 0; o < O; ++o) {
      for (std::int64_t i = 0; i < I; ++i) {
        double exact = 0, terms = 0;
        for (std::int64_t t = 0; t < T; ++t) {
          const double term = static_cast<double>(delta[static_cast<std::size_t>(((b * T + t) * O + o) * step)]) *
                              static_cast<double>(activation[static_cast<std::size_t>(((b * T + t) * I + i) * step)]);
          exact += term, terms += std::abs(term);
        }
        const unsigned char* from = out.get() + ((b * O + o) * row + i) * size;
        double found;
        if (out_dtype == DType::f64)
          std::memcpy(&found, from, sizeof found);
        else
          found = static_cast<double>(widened(from, out_dtype));
        expect(std::abs(found - exact) <= eps * (terms + 1e-4), "a product");
      }
      const std::int64_t end = ((b * O + o) * row + I) * size;
      for (std::int64_t k = end; b * O + o + 1 < B * O && k < end + gap * size; ++k)
        expect(out[static_cast<std::size_t>(k)] == 0xa5, "a gap was written");
    }
  expect(out[bytes] == 0xa5, "the byte behind");
}

void shapes() {
  const std::int64_t inner[] = {1, 2, 3, 5, 7, 8, 9, 16, 17, 20, 31, 33, 39, 40, 64, 65, 300, 1030};
  for (const std::string& isa : gradext::cpu_isas())
    for (const bool stream : {false, true})
      for (const std::int64_t I : inner)
        for (const std::int64_t O : {1, 2, 7, 33})
          for (const std::int64_t T : {1, 2, 5})
            for (const std::int64_t step : {1, 2})
              for (const std::int64_t gap : {0, 3})
                for (const DType dtype : {DType::f64, DType::f32, DType::f16, DType::bf16}) {
                  if (dtype == DType::f64)
                    check<double>(3, T, O, I, step, gap, dtype, 1, stream, isa);
                  else
                    check<float>(3, T, O, I, step, gap, dtype, 1, stream, isa);
                }
  for (const std::int64_t zero : {0, 1, 2, 3})
    check<float>(zero == 0 ? 0 : 2, zero == 1 ? 0 : 2, zero == 2 ? 0 : 3, zero == 3 ? 0 : 4, 1, 0, DType::f32, 2,
                 false);
}

void threads() {
  for (const bool stream : {false, true}) {
    check<float>(5, 1, 301, 783, 1, 0, DType::f32, 3, stream);
    check<float>(900, 1, 40, 33, 1, 0, DType::bf16, 4, stream);
    check<float>(9, 2, 300, 201, 1, 1, DType::f32, 3, stream);
    check<double>(1, 1, 1, 300'001, 1, 0, DType::f64, 4, stream);
  }
  // Calls from several threads at once: one of them has the workers, the others run alone.
  std::vector<std::thread> callers;
  for (int k = 0; k < 4; ++k)
    callers.emplace_back([] {
      for (int n = 0; n < 10; ++n) check<float>(4, 1, 301, 203, 1, 0, DType::f32, 3, n % 2 == 0);
    });
  for (std::thread& caller : callers) caller.join();

  std::vector<unsigned char> fill(3'000'001);
  gradext::nt_fill_cpu(fill.data() + 3, 2'999'998, 3);
  for (std::size_t k = 0; k < fill.size(); ++k) expect(fill[k] == (k < 3 ? 0 : 1), "the fill");

  int caught = 0;
  for (int n = 0; n < 50; ++n) {
    try {
      gradext::parallel(3, 20, [](int part) {
        if (part % 7 == 3) throw std::runtime_error("from a part");
      });
    } catch (const std::runtime_error&) {
      ++caught;
    }
  }
  expect(caught == 50, "an exception of a part");
}

void workspace() {
  std::vector<std::thread> takers;
  for (int k = 0; k < 4; ++k)
    takers.emplace_back([k] {
      for (int n = 0; n < 50; ++n) {
        const std::size_t bytes = static_cast<std::size_t>((k + n) % 5 + 1) << 20;
        const gradext::WorkspaceBlock block = gradext::workspace_take(bytes);
        expect(block.size >= bytes, "the size of a block");
        static_cast<unsigned char*>(block.data)[0] = 1;
        static_cast<unsigned char*>(block.data)[bytes - 1] = 1;
        gradext::workspace_give_back(block);
        if (n % 10 == 0) gradext::workspace_empty_cache();
      }
    });
  for (std::thread& taker : takers) taker.join();
  expect(gradext::workspace_stats().bytes_in_use == 0, "blocks in use");
  gradext::workspace_empty_cache();
  expect(gradext::workspace_stats().bytes_cached == 0, "blocks cached");
  try {
    gradext::workspace_take(SIZE_MAX - 5);
    expect(false, "too large a block");
  } catch (const std::bad_alloc&) {
  }
}

}  // namespace

int main() {
  shapes();
  threads();
  workspace();
  std::puts("right");
}
