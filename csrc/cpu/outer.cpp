// Chooses instruction set, kind of store and threads for the CPU outer product.
#include "../outer.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "outer_kernel.h"
#include "threads.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace gradext {
namespace {

// Below this size a second thread costs more time than it saves.
constexpr std::int64_t kBytesPerThread = 256 << 10;

// The size of the cache that one core can use. Linux's description of the cache is read first: glibc's sysconf adds up
// the caches of a whole socket on AMD machines, and is 0 on other architectures.
std::int64_t last_level_cache() {
  long kilobytes = 0;
  if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    char text[32];
    if (std::fgets(text, sizeof text, file) != nullptr) kilobytes = std::strtol(text, nullptr, 10);
    std::fclose(file);
  }
  if (kilobytes > 0) return std::int64_t{kilobytes} << 10;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  if (const long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE); bytes > 0) return bytes;
#endif
  return std::int64_t{32} << 20;
}

struct Isa {
  const char* name;
  OuterRange outer_range;
};

// The instruction sets of this machine, the best first.
const std::vector<Isa>& isas() {
  static const std::vector<Isa> found = [] {
    std::vector<Isa> isas;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512dq"))
        isas.push_back({"avx512bf16", avx512bf16::outer_range});
      isas.push_back({"avx2", avx2::outer_range});
    }
#endif
    isas.push_back({"baseline", baseline::outer_range});
    return isas;
  }();
  return found;
}

OuterRange outer_range_of(const std::string& isa) {
  if (isa.empty()) return isas().front().outer_range;
  for (const Isa& each : isas())
    if (isa == each.name) return each.outer_range;
  throw std::invalid_argument("isa: expected one of this machine's, but got " + isa);
}

std::int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

int threads_for(std::int64_t bytes, int threads) {
  return static_cast<int>(std::clamp<std::int64_t>(bytes / kBytesPerThread, 1, std::max(threads, 1)));
}

// There are more parts than threads. A thread may start late, because torch's own threads still spin on its core, or
// may lose its core; it then delays one small part and not its whole share.
constexpr std::int64_t kBytesPerPart = 512 << 10;

int parts_for(std::int64_t bytes, int threads) {
  if (threads == 1) return 1;
  return static_cast<int>(std::clamp<std::int64_t>(bytes / kBytesPerPart, threads, std::int64_t{256} * threads));
}

// The first byte of the given part of [0, bytes), moved to the beginning of a cache line of `out`, so that no two
// threads write to the same line.
std::int64_t part_begin(const void* out, std::int64_t bytes, int part, int parts) {
  const auto offset = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(out) % 64);
  const auto begin = bytes / parts * part;
  return part == 0 ? 0 : part == parts ? bytes : std::max<std::int64_t>((begin + offset) / 64 * 64 - offset, 0);
}

}  // namespace

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Isa& each : isas()) names.emplace_back(each.name);
  return names;
}

// Plain stores are faster up to about the size of the cache, and slower beyond it. A quarter of the cache is left for
// other data.
std::int64_t default_stream_from() {
  static const std::int64_t bytes = last_level_cache() / 4 * 3;
  return bytes;
}

void outer_cpu(const OuterParams& params, int threads, std::int64_t stream_from, const std::string& isa) {
  const OuterParams p = with_long_rows(params);
  const std::int64_t size = element_size(p.out_dtype), bytes = p.B * p.O * p.I * size;
  if (bytes == 0) return;
  if (p.T == 0) {
    for (std::int64_t b = 0; b < p.B; ++b)
      for (std::int64_t o = 0; o < p.O; ++o)
        std::memset(static_cast<char*>(p.out) + (b * p.out_b + o * p.out_o) * size, 0,
                    static_cast<std::size_t>(p.I * size));
    return;
  }
  const bool stream = bytes >= (stream_from < 0 ? default_stream_from() : stream_from);
  threads = threads_for(bytes, threads);
  const int parts = parts_for(bytes, threads);
  const OuterRange outer_range = outer_range_of(isa);
  const auto work = [&](int part) {
    outer_range(p, part_begin(p.out, bytes, part, parts) / size, part_begin(p.out, bytes, part + 1, parts) / size,
                stream);
  };
  parts == 1 ? work(0) : parallel(threads, parts, work);
}

void nt_fill_cpu(void* out, std::int64_t bytes, int threads) {
  threads = threads_for(bytes, threads);
  const int parts = parts_for(bytes, threads);
  parallel(threads, parts, [&](int part) {
    auto* to = static_cast<char*>(out) + part_begin(out, bytes, part, parts);
    auto* const end = static_cast<char*>(out) + part_begin(out, bytes, part + 1, parts);
#if defined(__SSE2__)
    const __m128i ones = _mm_set1_epi8(1);
    for (; to < end && reinterpret_cast<std::uintptr_t>(to) % 16 != 0; ++to) *to = 1;
    for (; to + 16 <= end; to += 16) _mm_stream_si128(reinterpret_cast<__m128i*>(to), ones);
    _mm_sfence();
#endif
    std::memset(to, 1, static_cast<std::size_t>(end - to));
  });
}

}  // namespace gradext
