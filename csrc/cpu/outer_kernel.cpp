// The CPU outer product over a range of the output. setup.py compiles this file once for each instruction
// set, with GRADEXT_ISA as the namespace, so nothing here may be shared with other files: an inline function
// compiled for AVX2 that the linker kept for all would crash older machines.
#include "outer_kernel.h"

#include <algorithm>
#include <cstring>
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
  return x - Vector<Element>{};  // plus would lose the sign of a zero
}

inline void store(float* to, Vector<float> v) { std::memcpy(to, &v, sizeof v); }
inline void store(double* to, Vector<double> v) { std::memcpy(to, &v, sizeof v); }

// Round to nearest even by adding just under half of the last kept bit; a NaN would carry into infinity, so
// it is truncated and made quiet instead.
inline void store(BFloat16* to, Vector<float> v) {
  const auto bits = (Vector<std::uint32_t>)v;
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto quiet_nan = (bits >> 16) | 0x40u;
  const auto narrow = __builtin_convertvector(v == v ? rounded : quiet_nan, Vector<std::uint16_t>);
  std::memcpy(to, &narrow, sizeof narrow);
}

inline void store(Half* to, Vector<float> v) {
#if defined(__F16C__)
  const __m128i narrow = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  // The adder rounds for us: adding a power of two whose last mantissa bit weighs what the half's last bit
  // will weigh leaves the rounded mantissa in the low bits. The two scalings turn overflow into infinity.
  const auto bits = (Vector<std::uint32_t>)v;
  const auto sign = bits & 0x80000000u;
  const auto magnitude = bits ^ sign;
  const auto scaled = ((Vector<float>)magnitude * 0x1p+112f) * 0x1p-110f;
  auto exponent = (magnitude << 1) & 0xff000000u;
  exponent =
      exponent < 0x71000000u ? exponent - exponent + 0x71000000u : exponent;  // subnormal halves share one
  const auto sum = (Vector<std::uint32_t>)((Vector<float>)((exponent >> 1) + 0x07800000u) + scaled);
  const auto half = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
  const auto narrow =
      __builtin_convertvector((sign >> 16) | (v == v ? half : half - half + 0x7e00u), Vector<std::uint16_t>);
#endif
  std::memcpy(to, &narrow, sizeof narrow);
}

// Past the cache; `to` lies at a multiple of 16 bytes.
template <class Out, class Real>
inline void stream(Out* to, Vector<Real> v) {
  constexpr int kParts = sizeof(Vector<Real>) / sizeof(Real) * sizeof(Out) / 16;
#if defined(__SSE2__)
  alignas(32) Out lanes[VectorOf<Real>::kSize];
  store(lanes, v);
  for (int part = 0; part < kParts; ++part)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + part, reinterpret_cast<const __m128i*>(lanes)[part]);
#else
  store(to, v);
#endif
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

// Writes kVectors vectors of one row: sum_t delta[t] * activation[t, :].
template <int kVectors, bool kStream, bool kOne, class Real, class Out>
inline void tile(const Rows<Real, Out>& r, const Real* delta, Vector<Real> first_delta,
                 const Real* activation, Out* to) {
  constexpr auto V = VectorOf<Real>::kSize;
  Vector<Real> sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = first_delta * load(activation + v * V);
  if constexpr (!kOne) {
    for (std::int64_t t = 1; t < r.T; ++t) {
      const Real d = delta[t * r.delta_t];
      const Real* a = activation + t * r.activation_t;
      for (int v = 0; v < kVectors; ++v) sum[v] += d * load(a + v * V);
    }
  }
  for (int v = 0; v < kVectors; ++v)
    kStream ? stream<Out, Real>(to + v * V, sum[v]) : store(to + v * V, sum[v]);
}

// Streaming stores must write whole cache lines, but rows begin and end within lines. What does not fill a
// line goes here, aligned as its destination is, and leaves when the next row has completed the line.
template <class Out>
class Stage {
 public:
  explicit Stage(bool stream) : stream_(stream) {}
  ~Stage() { finish(); }
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;

  // Where to put the next n elements, which belong to `destination`. A line before and behind them may be
  // written too.
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

  // Writes the whole lines and keeps the begun one.
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
    std::memcpy(line_ + from, staged() + from, static_cast<std::size_t>(to - from));
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

// Into the cache: each row straight to its place. Needs I >= a vector.
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

// Past the cache: rows without gaps between them, as one stretch of aligned vectors of which some lie across
// two rows. Only what shares a cache line with other stretches goes through the stage. Needs I >= a vector,
// and activations that can be read for a vector before and behind each row.
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
      Vector<Real> sum = product(0);
      if constexpr (!kOne)
        for (std::int64_t t = 1; t < r.T; ++t) sum += product(t);
      stream<Out, Real>(to, sum);
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

// Rows of less than a vector: each by a whole one into the stage, where the next row overwrites what is too
// much. Needs activations that can be read for a vector behind a row.
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
    // As many whole rows as can be done at once, or what the range holds of one row.
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
