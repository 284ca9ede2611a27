// The CPU outer product over a range of the output. setup.py compiles this file once for each instruction
// set, with GRADEXT_ISA as the namespace, so nothing here may be shared with other files: an inline function
// compiled for AVX2 that the linker kept for all would crash older machines.
#include "outer_kernel.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace gradext::GRADEXT_ISA {
namespace {

constexpr std::int64_t kLine = 64;  // bytes of a cache line

template <class Element>
struct VectorOf {
  static constexpr std::int64_t kSize = 8;
  typedef Element type __attribute__((vector_size(kSize * sizeof(Element))));
};
template <>
struct VectorOf<double> {
  static constexpr std::int64_t kSize = 4;
  typedef double type __attribute__((vector_size(32)));
};
template <class Element>
using Vector = typename VectorOf<Element>::type;

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

template <class Element>
inline Vector<Element> load(const Element* from) {
  Vector<Element> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class Element>
inline Vector<Element> broadcast(Element x) {
  return x - Vector<Element>{};  // x + 0 would lose the sign of a negative zero
}

// Converts a vector of sums to the output's type, which is that of the unused pointer.
inline Vector<float> narrow(const float*, Vector<float> v) { return v; }
inline Vector<double> narrow(const double*, Vector<double> v) { return v; }

using Narrow = Vector<std::uint16_t>;

// The low halves of integers below 2^16.
inline Narrow low_halves(Vector<std::uint32_t> v) {
#if defined(__AVX2__)
  const auto bits = (__m256i)v;
  return (Narrow)_mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
#else
  return __builtin_convertvector(v, Narrow);
#endif
}

// Rounds to nearest even by adding just under half of the last kept bit. Not for NaNs: the carry may make them
// infinite.
inline Vector<std::uint32_t> rounded(Vector<float> v) {
  const auto bits = (Vector<std::uint32_t>)v;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

// A NaN is truncated and made quiet.
inline Narrow narrow(const BFloat16*, Vector<float> v) {
  const auto quiet_nan = ((Vector<std::uint32_t>)v >> 16) | 0x40u;
  return low_halves(v == v ? rounded(v) : quiet_nan);
}

inline Narrow narrow(const Half*, Vector<float> v) {
#if defined(__F16C__)
  return (Narrow)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  // The addition rounds: the last mantissa bit of the power of two that is added has the weight of the half's last bit,
  // so that the low bits of the sum are the rounded mantissa. The two scalings turn overflow into infinity.
  const auto bits = (Vector<std::uint32_t>)v;
  const auto sign = bits & 0x80000000u;
  const auto magnitude = bits ^ sign;
  const auto scaled = ((Vector<float>)magnitude * 0x1p+112f) * 0x1p-110f;
  auto exponent = (magnitude << 1) & 0xff000000u;
  exponent = exponent < 0x71000000u ? exponent - exponent + 0x71000000u : exponent;  // subnormal halves share one
  const auto sum = (Vector<std::uint32_t>)((Vector<float>)((exponent >> 1) + 0x07800000u) + scaled);
  const auto half = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
  return low_halves((sign >> 16) | (v == v ? half : half - half + 0x7e00u));
#endif
}

// Stores 16 or 32 bytes; past the cache if kStream, and then `to` must be a multiple of their number.
template <bool kStream, class Bytes>
inline void put(void* to, Bytes v) {
#if defined(__AVX__)
  if constexpr (kStream && sizeof v == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)v);
#endif
#if defined(__SSE2__)
  if constexpr (kStream) {
    __m128i parts[sizeof v / 16];
    std::memcpy(parts, &v, sizeof v);
    for (std::size_t part = 0; part < sizeof v / 16; ++part)
      _mm_stream_si128(static_cast<__m128i*>(to) + part, parts[part]);
    return;
  }
#endif
  std::memcpy(to, &v, sizeof v);
}

#if defined(__AVX2__)

// Converts two vectors of sums to bf16. None may be special (see has_special): special sums are rare, and tested for
// once for four vectors.
#if defined(__AVX512BF16__)
inline __m256i narrow_pair(Vector<float> low, Vector<float> high) {
  return (__m256i)_mm256_cvtne2ps_pbh((__m256)high, (__m256)low);
}
// Whether there are subnormal numbers, which the instruction takes for zeros.
inline bool has_special(const Vector<float> (&sum)[4]) {
  const auto special = [&](int v) { return _mm256_fpclass_ps_mask((__m256)sum[v], 0x20); };
  return (special(0) | special(1) | special(2) | special(3)) != 0;
}
#else
inline __m256i narrow_pair(Vector<float> low, Vector<float> high) {
  const auto packed = _mm256_packus_epi32((__m256i)rounded(low), (__m256i)rounded(high));
  return _mm256_permute4x64_epi64(packed, 0b11'01'10'00);
}
// Whether there are NaNs, by a comparison that takes two vectors.
inline bool has_special(const Vector<float> (&sum)[4]) {
  const __m256 nan = _mm256_or_ps(_mm256_cmp_ps((__m256)sum[0], (__m256)sum[1], _CMP_UNORD_Q),
                                  _mm256_cmp_ps((__m256)sum[2], (__m256)sum[3], _CMP_UNORD_Q));
  return _mm256_movemask_ps(nan) != 0;
}
#endif

// Stores 32 bytes of outputs. If kStream, `to` is a multiple of 16 bytes, and half of the time one of 32.
template <bool kStream>
inline void put_packed(BFloat16* to, __m256i v) {
  if (!kStream || reinterpret_cast<std::uintptr_t>(to) % 32 == 0) return put<kStream>(to, v);
  put<kStream>(to, _mm256_castsi256_si128(v));
  put<kStream>(to + 8, _mm256_extracti128_si256(v, 1));
}

#endif

// Writes neighbouring vectors; past the cache if kStream, and then `to` must be aligned as a vector of outputs.
template <bool kStream, class Out, class Lanes, std::size_t kVectors>
inline void write(Out* to, const Lanes (&sum)[kVectors]) {
  constexpr std::int64_t V = sizeof(Lanes) / sizeof(sum[0][0]);
#if defined(__AVX2__)
  if constexpr (std::is_same_v<Out, BFloat16> && kVectors == 4) {
    if (__builtin_expect(!has_special(sum), 1)) {
      put_packed<kStream>(to, narrow_pair(sum[0], sum[1]));
      put_packed<kStream>(to + 2 * V, narrow_pair(sum[2], sum[3]));
      return;
    }
  }
#endif
  for (std::size_t v = 0; v < kVectors; ++v) put<kStream>(to + static_cast<std::int64_t>(v) * V, narrow(to, sum[v]));
}

// Consecutive rows of one sample's output, or a part of one row: columns [first, first + columns) of each.
template <class Real, class Out>
struct Rows {
  const Real* delta;       // [T, O], at the first row
  const Real* activation;  // [T, I], last stride 1, at column 0
  Out* out;                // at the first row and column
  std::int64_t rows, first, columns;
  std::int64_t T, delta_t, delta_o, activation_t, out_o, I;
};

// How many positions are added up one after the other. The error of such a sum of numbers of one sign grows with the
// root of their number; sums of partial sums keep it small.
constexpr std::int64_t kPiece = 256;

// Adds the products at positions 1 to T - 1 to `sum`, which holds those at position 0; add(t, lanes) adds those at t.
template <class Lanes, std::size_t kVectors, class Add>
inline void add_positions(std::int64_t T, Lanes (&sum)[kVectors], Add add) {
  std::int64_t t = 1;
  for (const std::int64_t last = std::min(T, kPiece); t < last; ++t) add(t, sum);
  while (t < T) {
    Lanes piece[kVectors]{};
    for (const std::int64_t last = std::min(T, t + kPiece); t < last; ++t) add(t, piece);
    for (std::size_t v = 0; v < kVectors; ++v) sum[v] += piece[v];
  }
}

// Writes kVectors vectors of one row: sum_t delta[t] * activation[t, :].
template <int kVectors, bool kStream, bool kOne, class Real, class Out>
inline void tile(const Rows<Real, Out>& r, const Real* delta, Vector<Real> first_delta, const Real* activation,
                 Out* to) {
  constexpr auto V = VectorOf<Real>::kSize;
  Vector<Real> sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = first_delta * load(activation + v * V);
  if constexpr (!kOne)
    add_positions(r.T, sum, [&](std::int64_t t, Vector<Real>(&lanes)[kVectors]) {
      const Real d = delta[t * r.delta_t];
      const Real* a = activation + t * r.activation_t;
      for (int v = 0; v < kVectors; ++v) lanes[v] += d * load(a + v * V);
    });
  write<kStream>(to, sum);
}

// Streaming stores must write whole cache lines, but rows begin and end within lines. Elements that do not fill a line
// are kept here, aligned as their destination is, and are written when the next row has completed the line.
template <class Out>
class Stage {
 public:
  explicit Stage(bool stream) : stream_(stream) {}
  ~Stage() { finish(); }
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;

  // Returns the place for the next n elements, which belong to `destination`. The caller may also write to the line
  // before them and to the line after them.
  Out* reserve(Out* destination, std::int64_t n) {
    auto* to = reinterpret_cast<unsigned char*>(destination);
    if (to != line_ + end_) {
      finish();
      begin_ = end_ = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(to) % kLine);
      line_ = to - begin_;
    }
    auto* place = reinterpret_cast<Out*>(staged() + end_);
    end_ += n * static_cast<std::int64_t>(sizeof(Out));
    return place;
  }

  std::int64_t room() const { return (kBytes - end_) / static_cast<std::int64_t>(sizeof(Out)); }

  // Writes the complete lines and keeps the incomplete one.
  void flush() {
    const std::int64_t first = (begin_ + kLine - 1) / kLine * kLine, last = end_ / kLine * kLine;
    if (first > last) return;
    copy(begin_, first);
    stream_ ? stream(first, last) : copy(first, last);
    std::memcpy(staged(), staged() + last, kLine);
    begin_ = 0;
    end_ -= last;
    line_ += last;
  }

 private:
  void finish() {
    flush();
    copy(begin_, end_);
    begin_ = end_ = 0;
  }

  void copy(std::int64_t from, std::int64_t to) {
    if (from < to) std::memcpy(line_ + from, staged() + from, static_cast<std::size_t>(to - from));
  }

  void stream(std::int64_t from, std::int64_t to) {
#if defined(__SSE2__)
    for (std::int64_t k = from; k < to; k += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(line_ + k),
                       _mm_load_si128(reinterpret_cast<const __m128i*>(staged() + k)));
#else
    copy(from, to);
#endif
  }

  unsigned char* staged() { return buffer_ + kLine; }

  // More would let the write-combining buffers run dry while the stage is filled.
  static constexpr std::int64_t kBytes = 1024;
  alignas(kLine) unsigned char buffer_[kBytes + 3 * kLine];
  unsigned char* line_ = nullptr;     // the line of the output that staged()[0] belongs to
  std::int64_t begin_ = 0, end_ = 0;  // bytes of staged() in use
  const bool stream_;
};

// Stores each row through the cache, directly to its place. Needs I >= a vector.
template <bool kOne, class Real, class Out>
inline void plain_rows(const Rows<Real, Out>& r) {
  constexpr auto V = VectorOf<Real>::kSize;
  const Real* const a = r.activation + r.first;
  const std::int64_t n = r.columns;
  const Real* delta = r.delta;
  Out* to = r.out;
  for (std::int64_t row = 0; row < r.rows; ++row, delta += r.delta_o, to += r.out_o) {
    const Vector<Real> d = broadcast(*delta);
    std::int64_t k = 0;
    for (; k + 4 * V <= n; k += 4 * V) tile<4, false, kOne>(r, delta, d, a + k, to + k);
    for (; k + V <= n; k += V) tile<1, false, kOne>(r, delta, d, a + k, to + k);
    if (k == n) continue;
    if (n >= V) {  // ends with the row: some elements are written twice, with the same value
      tile<1, false, kOne>(r, delta, d, a + n - V, to + n - V);
    } else {  // a part of a row; its row has a vector on one side or the other
      const bool forward = r.first + V <= r.I;
      Out lanes[V];
      tile<1, false, kOne>(r, delta, d, forward ? a : a + n - V, lanes);
      std::memcpy(to, forward ? lanes : lanes + V - n, static_cast<std::size_t>(n) * sizeof(Out));
    }
  }
}

// The lanes of two neighbouring rows: the first `count` from the one, the others from the other.
inline Vector<float> join(std::int64_t count, Vector<float> one, Vector<float> other) {
  constexpr Vector<std::int32_t> lane{0, 1, 2, 3, 4, 5, 6, 7};
  return lane < static_cast<std::int32_t>(count) ? one : other;
}
inline Vector<double> join(std::int64_t count, Vector<double> one, Vector<double> other) {
  typedef std::int64_t Lanes __attribute__((vector_size(32)));
  constexpr Lanes lane{0, 1, 2, 3};
  return lane < count ? one : other;
}

// Stores rows without gaps past the cache, as one range of aligned vectors, some of which lie across two rows. Only
// elements that share a cache line with other ranges go through the stage. Needs I >= a vector, and activations that
// can be read for one vector before and after each row.
template <bool kOne, class Real, class Out>
inline void stream_rows(const Rows<Real, Out>& r, Stage<Out>& stage) {
  constexpr auto V = VectorOf<Real>::kSize;
  constexpr std::int64_t kPerLine = kLine / static_cast<std::int64_t>(sizeof(Out));
  const Real* a = r.activation;
  const Real* delta = r.delta;
  Out* to = r.out;
  std::int64_t i = r.first;

  const auto to_stage = [&](std::int64_t n) {
    Out* place = stage.reserve(to, n);
    to += n;
    while (n > 0) {
      const std::int64_t part = std::min(n, r.I - i);
      for (std::int64_t k = 0; k < part; k += V)
        tile<1, false, kOne>(r, delta, broadcast(*delta), a + i + k, place + k);
      place += part;
      n -= part;
      i += part;
      if (i == r.I) i = 0, delta += r.delta_o;
    }
    stage.flush();
  };

  const std::int64_t elements = r.rows * r.columns;
  const auto begun = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(to) % kLine / sizeof(Out));
  const std::int64_t head = std::min(begun == 0 ? 0 : kPerLine - begun, elements);
  std::int64_t left = (elements - head) / kPerLine * kPerLine;
  const std::int64_t tail = elements - head - left;

  if (head > 0) to_stage(head);
  while (left > 0) {
    const std::int64_t n = std::min((r.I - i) / V * V, left);
    const Vector<Real> d = broadcast(*delta);
    std::int64_t k = 0;
    for (; k + 4 * V <= n; k += 4 * V) tile<4, true, kOne>(r, delta, d, a + i + k, to + k);
    for (; k < n; k += V) tile<1, true, kOne>(r, delta, d, a + i + k, to + k);
    i += n;
    to += n;
    left -= n;
    if (i < r.I && left > 0) {
      const std::int64_t count = r.I - i;
      const auto product = [&](std::int64_t t) {
        const Real* from = a + t * r.activation_t + i;
        return join(count, broadcast(delta[t * r.delta_t]), broadcast(delta[t * r.delta_t + r.delta_o])) *
               join(count, load(from), load(from - r.I));
      };
      Vector<Real> sum[] = {product(0)};
      if constexpr (!kOne)
        add_positions(r.T, sum, [&](std::int64_t t, Vector<Real>(&lanes)[1]) { lanes[0] += product(t); });
      write<true>(to, sum);
      i += V - r.I;
      to += V;
      left -= V;
      delta += r.delta_o;
    } else if (i == r.I) {
      i = 0;
      delta += r.delta_o;
    }
  }
  if (tail > 0) to_stage(tail);
}

// Rows shorter than a vector: each is written to the stage as a whole vector, and the next row overwrites the surplus.
// Needs activations that can be read for one vector after a row.
template <bool kOne, class Real, class Out>
inline void narrow_rows(const Rows<Real, Out>& r, Stage<Out>& stage) {
  const Real* const a = r.activation + r.first;
  const Real* delta = r.delta;
  Out* out = r.out;
  for (std::int64_t left = r.rows; left > 0;) {
    if (stage.room() < r.columns) stage.flush();
    const std::int64_t rows = r.out_o == r.columns ? std::min(left, stage.room() / r.columns) : 1;
    Out* to = stage.reserve(out, rows * r.columns);
    for (std::int64_t row = 0; row < rows; ++row, to += r.columns, delta += r.delta_o)
      tile<1, false, kOne>(r, delta, broadcast(*delta), a, to);
    out += rows * r.out_o;
    left -= rows;
  }
}

#if defined(__AVX2__)  // without a permutation by variable indices, row by row is as fast

// Picks lanes of v by their indices; those of doubles by the indices of their halves.
template <class Real>
inline Vector<Real> permute(Vector<Real> v, Vector<std::int32_t> index) {
  return (Vector<Real>)_mm256_permutevar8x32_ps((__m256)v, (__m256i)index);
}

constexpr std::int64_t kShort = 40;  // elements of the longest row for short_rows

// The vectors of a period of short_rows().
template <class Real>
struct Period {
  static constexpr auto V = VectorOf<Real>::kSize;
  std::int64_t vectors, rows;
  alignas(64) Real activation[kShort * V];
  alignas(64) std::int32_t index[kShort * 8];
  std::int32_t first_row[kShort];  // where to load the deltas

  Vector<Real> product(const Real* delta, std::int64_t v) const {
    return permute<Real>(load(delta + first_row[v]), load(index + v * 8)) * load(activation + v * V);
  }

  // Writes `count` vectors from vector v on; `delta` is that of row 0.
  template <bool kStream, class Out>
  void write_vectors(Out* to, const Real* delta, std::int64_t v, std::int64_t count) const {
    while (count > 0) {
      const std::int64_t last = std::min(vectors, v + count);
      count -= last - v;
      for (; v + 4 <= last; v += 4, to += 4 * V)
        write<kStream>(to, {product(delta, v), product(delta, v + 1), product(delta, v + 2), product(delta, v + 3)});
      for (; v < last; ++v, to += V) write<kStream>(to, {product(delta, v)});
      v = 0;
      delta += rows;
    }
  }
};

// Rows so short that the work for each row would take more time than that for each element. Needs T = 1 and an output
// without gaps, which is then one range of aligned vectors, whatever rows and samples their lanes belong to.
//
// The features and rows of the lanes repeat with a period of vectors. They are laid out once for one period: the
// activations of each vector, and for the deltas where to load and how to permute. This is done for a block of rows of
// one sample; positions count from the first element of its first row. Vector 0 begins `lead` elements before it.
template <bool kStream, class Real, class Out>
void short_rows(const OuterParams& p, std::int64_t begin, std::int64_t end) {
  constexpr auto V = VectorOf<Real>::kSize;
  constexpr std::int32_t kHalves = sizeof(Real) / sizeof(float);
  constexpr std::int64_t kBlock = 1024;  // rows whose deltas are copied, so that loads may reach past them

  Period<Real> period;
  period.vectors = p.I / std::gcd(p.I, V);
  period.rows = V / std::gcd(p.I, V);
  while (period.vectors < 16) period.vectors *= 2, period.rows *= 2;  // to have something to unroll
  alignas(64) Real delta_room[kBlock + 2 * V] = {};
  Real* const delta = delta_room + V;
  std::int32_t row_room[(kShort + 1) * V];
  std::int32_t* const row_at = row_room + V;  // by position
  const std::int64_t rows_before = (V + p.I - 1) / p.I;
  std::int64_t next = -rows_before * p.I;  // where the next row begins; a division for each lane would take longer
  for (std::int64_t x = -V, row = -rows_before - 1; x < period.vectors * V; ++x) {
    for (; next <= x; next += p.I) ++row;
    row_at[x] = static_cast<std::int32_t>(row);
  }

  Out* const out = static_cast<Out*>(p.out);
  const auto phase = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(out) / sizeof(Out) % V);
  std::int64_t skip = (phase + begin) % V;  // lanes of the first vector that are not of this range
  Out* to = out + begin - skip;
  Vector<Real> begun{};  // the vector at `to`, as far as earlier blocks have filled it
  const auto write_part = [&](std::int64_t last) {
    Out lanes[V];
    write<false>(lanes, {begun});
    std::memcpy(to + skip, lanes + skip, static_cast<std::size_t>(last - skip) * sizeof(Out));
    skip = 0;
  };

  std::int64_t b = begin / (p.O * p.I), o = begin / p.I % p.O, first = begin % p.I;
  std::int64_t laid_lead = -1, laid_vectors = 0;
  for (bool new_sample = true; begin < end;) {
    const std::int64_t lead = (phase + begin + V * p.I - first) % V;
    const std::int64_t rows = std::min(p.O - o, kBlock), stop = std::min(rows * p.I, first + end - begin);
    const std::int64_t vectors = std::min(period.vectors, (lead + stop + V - 1) / V);

    const Real* from = static_cast<const Real*>(p.delta) + b * p.delta_b + o * p.delta_o;
    if (p.delta_o == 1)
      std::memcpy(delta, from, static_cast<std::size_t>(rows) * sizeof(Real));
    else
      for (std::int64_t row = 0; row < rows; ++row) delta[row] = from[row * p.delta_o];

    if (laid_lead != lead || laid_vectors < vectors) {
      for (std::int64_t v = 0; v < vectors; ++v) {
        const std::int32_t* row = row_at + v * V - lead;
        period.first_row[v] = row[0];
        for (std::int32_t k = 0; k < 8; ++k)
          period.index[v * 8 + k] = (row[k / kHalves] - row[0]) * kHalves + k % kHalves;
      }
      laid_lead = lead;
      laid_vectors = vectors;
    }
    if (new_sample) {
      from = static_cast<const Real*>(p.activation) + b * p.activation_b;
      std::int64_t x = 0, n = vectors * V, i = (V * p.I - lead) % p.I;
      Real* const laid = period.activation;
      for (; x < std::min(p.I, n); ++x, i = i + 1 == p.I ? 0 : i + 1) laid[x] = from[i * p.activation_i];
      for (std::int64_t part; x < n; x += part) {  // what is laid out doubles each time
        part = std::min(x / p.I * p.I, n - x);
        std::memcpy(laid + x, laid, static_cast<std::size_t>(part) * sizeof(Real));
      }
    }

    // The vectors from the incomplete one to the one that the next block will complete.
    const std::int64_t begun_at = (lead + first) / V, whole = (lead + stop) / V;
    const auto row_0 = [&](std::int64_t v) { return delta + v / period.vectors * period.rows; };
    begun = join((lead + first) % V, begun, period.product(row_0(begun_at), begun_at % period.vectors));
    if (begun_at < whole) {
      skip > 0 ? write_part(V) : write<kStream>(to, {begun});
      const std::int64_t v = begun_at + 1;
      period.template write_vectors<kStream>(to + V, row_0(v), v % period.vectors, whole - v);
      to += (whole - begun_at) * V;
      if ((lead + stop) % V > 0) begun = period.product(row_0(whole), whole % period.vectors);
    }

    begin += stop - first;
    first = 0;
    o += rows;
    new_sample = o == p.O;
    if (new_sample) o = 0, ++b;
  }
  if ((phase + end) % V > 0) write_part((phase + end) % V);
  if constexpr (kStream) _mm_sfence();  // streaming stores are not ordered before the thread's other stores
}

#endif

template <bool kOne, class Real, class Out>
void range(const OuterParams& p, std::int64_t begin, std::int64_t end, bool stream) {
  constexpr auto V = VectorOf<Real>::kSize;
  const bool narrow = p.I < V;
  const bool gather = narrow || stream || p.activation_i != 1;
  std::vector<Real> gathered(gather ? static_cast<std::size_t>(p.T * p.I + 3 * V) : 0);
  Stage<Out> stage(stream);

  std::int64_t b = begin / (p.O * p.I), o = begin / p.I % p.O, i = begin % p.I;
  for (bool new_sample = true; begin < end;) {
    const Real* activation = static_cast<const Real*>(p.activation) + b * p.activation_b;
    if (gather) {
      Real* const copy = gathered.data() + V;
      for (std::int64_t t = 0; new_sample && t < p.T; ++t) {
        const Real* from = activation + t * p.activation_t;
        if (p.activation_i == 1)
          std::memcpy(copy + t * p.I, from, static_cast<std::size_t>(p.I) * sizeof(Real));
        else
          for (std::int64_t k = 0; k < p.I; ++k) copy[t * p.I + k] = from[k * p.activation_i];
      }
      activation = copy;
    }
    // As many whole rows as can be done at once, or the part of one row that lies in the range.
    const bool whole = i == 0 && end - begin >= p.I;
    const bool apart = stream && p.out_o != p.I;
    const std::int64_t rows = whole && !apart ? std::min(p.O - o, (end - begin) / p.I) : 1;
    const std::int64_t columns = std::min(p.I - i, end - begin);
    const Rows<Real, Out> r{static_cast<const Real*>(p.delta) + b * p.delta_b + o * p.delta_o,
                            activation,
                            static_cast<Out*>(p.out) + b * p.out_b + o * p.out_o + i,
                            rows,
                            i,
                            columns,
                            p.T,
                            p.delta_t,
                            p.delta_o,
                            gather ? p.I : p.activation_t,
                            p.out_o,
                            p.I};
    if (narrow)
      narrow_rows<kOne>(r, stage);
    else if (stream)
      stream_rows<kOne>(r, stage);
    else
      plain_rows<kOne>(r);
    begin += rows * columns;
    i = (i + columns) % p.I;
    if (i == 0) o += rows;
    new_sample = o == p.O;
    if (new_sample) o = 0, ++b;
  }
#if defined(__SSE2__)
  if (stream) _mm_sfence();  // streaming stores are not ordered before the thread's other stores
#endif
}

template <class Real, class Out>
void range(const OuterParams& p, std::int64_t begin, std::int64_t end, bool stream) {
#if defined(__AVX2__)
  const bool gapless = (p.O == 1 || p.out_o == p.I) && (p.B == 1 || p.out_b == p.O * p.I);
  if (p.T == 1 && p.I <= kShort && gapless)
    return stream ? short_rows<true, Real, Out>(p, begin, end) : short_rows<false, Real, Out>(p, begin, end);
#endif
  p.T == 1 ? range<true, Real, Out>(p, begin, end, stream) : range<false, Real, Out>(p, begin, end, stream);
}

}  // namespace

void outer_range(const OuterParams& p, std::int64_t begin, std::int64_t end, bool stream) {
  switch (p.out_dtype) {
    case DType::f32:
      return range<float, float>(p, begin, end, stream);
    case DType::f64:
      return range<double, double>(p, begin, end, stream);
    case DType::f16:
      return range<float, Half>(p, begin, end, stream);
    case DType::bf16:
      return range<float, BFloat16>(p, begin, end, stream);
  }
}

}  // namespace gradext::GRADEXT_ISA
