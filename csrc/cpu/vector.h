// Row arithmetic that GCC vectorises inside FASTKD_MULTIVERSION functions, and the memory it runs in.
#pragma once

#include "isa.h"

#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#if FASTKD_HAS_MULTIVERSION
#include <immintrin.h>
#endif

// Helpers of versioned functions must be inlined; otherwise they are compiled for the baseline only.
#if defined(__GNUC__)
#define FASTKD_INLINE inline __attribute__((always_inline))
#define FASTKD_INLINE_LAMBDA __attribute__((always_inline))
#else
#define FASTKD_INLINE inline
#define FASTKD_INLINE_LAMBDA
#endif

namespace fastkd {

using torch::headeronly::Half;

// A sum >= 0 that cancellation and rounding can take below 0. NaN passes through.
FASTKD_INLINE double not_negative(double x) {
  return x < 0 ? 0 : x;
}

constexpr int64_t kLanes = 16;  // rows are padded to whole vectors of the widest instruction set

inline int64_t padded(int64_t n) {
  return (n + kLanes - 1) / kLanes * kLanes;
}

// Uninitialised memory aligned to a cache line, since a library may order its sums by the alignment of a row.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) { resize(size); }

  // Keeps the memory if it is large enough; otherwise the contents are lost.
  void resize(int64_t size) {
    if (size <= size_) return;
    data_.reset(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64))));
    size_ = size;
  }

  T* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(static_cast<void*>(p), std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

// A sum or maximum of a row in as many parts as the widest vector holds, folded in halves: one order on every CPU, and
// no chain of additions at the end of a short row.
template <typename T>
class Lanes {
 public:
  FASTKD_INLINE explicit Lanes(T x) {
    for (T& lane : x_) lane = x;
  }
  FASTKD_INLINE static Lanes load(const T* p) {
    Lanes v(0);
    std::memcpy(v.x_, p, sizeof v.x_);
    return v;
  }
  FASTKD_INLINE T& operator[](int64_t l) { return x_[l]; }
  FASTKD_INLINE T sum() {
    fold_sum<kLanes / 2>();
    return x_[0];
  }
  FASTKD_INLINE T max() {
    fold_max<kLanes / 2>();
    return x_[0];
  }

 private:
  template <int64_t half>
  FASTKD_INLINE void fold_sum() {
    for (int64_t l = 0; l < half; ++l) x_[l] += x_[l + half];
    if constexpr (half > 1) fold_sum<half / 2>();
  }
  template <int64_t half>
  FASTKD_INLINE void fold_max() {
    for (int64_t l = 0; l < half; ++l) x_[l] = x_[l] < x_[l + half] ? x_[l + half] : x_[l];
    if constexpr (half > 1) fold_max<half / 2>();
  }

  T x_[kLanes];
};

// Zeros before ones: kLanes from n on end in n ones.
template <typename T>
constexpr T kLast[2 * kLanes] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

template <typename To, typename From>
FASTKD_INLINE To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &x, sizeof out);
  return out;
}

// The polynomial of x with these coefficients, the highest first.
template <typename T>
FASTKD_INLINE T polynomial(T, T last) {
  return last;
}

template <typename T, typename... Lower>
FASTKD_INLINE T polynomial(T x, T first, T second, Lower... lower) {
  return polynomial(x, first * x + second, lower...);
}

// e^x for x <= 0, to about 1 ulp; 0 where it would be subnormal. NaN stays.
FASTKD_INLINE float exp_of(float x) {
  // Adding 1.5 2^23 rounds to an integer, in the low bits; 127 more make it the exponent of its power of two.
  constexpr float kLowest = -87.33f, kMagic = 12582912.f + 127.f;
  const float c = x < kLowest ? kLowest : x;
  const float t = c * 1.442695041f + kMagic, n = t - kMagic;
  float r = c - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = polynomial(
      r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f);
  p = p * (r * r) + r + 1.f;
  const float e = p * bits_of<float>(bits_of<uint32_t>(t) << 23);
  return x < kLowest ? 0.f : e;
}

FASTKD_INLINE double exp_of(double x) {
  return std::exp(x);
}

// log u for u > 0, to about 1 ulp, given also f = u - 1, which near u = 1 holds digits that u does not.
FASTKD_INLINE float log_of(float u, float f) {
  const uint32_t shifted = bits_of<uint32_t>(u) - 0x3f3504f3u;  // sqrt(1/2): mantissas from there to sqrt(2)
  const int32_t e = static_cast<int32_t>(shifted) >> 23;
  const float n = static_cast<float>(e);
  const float m = bits_of<float>((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.f;
  const float x = e == 0 ? f : m, z = x * x;
  const float p = polynomial(
      x,
      7.0376836292e-2f,
      -1.1514610310e-1f,
      1.1676998740e-1f,
      -1.2420140846e-1f,
      1.4249322787e-1f,
      -1.6668057665e-1f,
      2.0000714765e-1f,
      -2.4999993993e-1f,
      3.3333331174e-1f);
  float y = p * x * z - n * 2.12194440e-4f;
  y = y - 0.5f * z + x;
  return y + n * 0.693359375f;
}

FASTKD_INLINE double log_of(double u, double f) {
  return u > 0.5 && u < 2 ? std::log1p(f) : std::log(u);
}

// body(j, l) for each of the first n elements, whole vectors of them: j is of lane l.
template <typename Body>
FASTKD_INLINE void for_lanes(int64_t n, Body body) {
  for (int64_t first = 0; first < n; first += kLanes)
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) body(first + l, l);
}

template <typename T>
static FASTKD_MULTIVERSION void add_row(T* to, const T* from, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] += from[j];
}

template <typename T>
static FASTKD_MULTIVERSION void add_scaled_row(T* to, const T* from, T scale, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] += from[j] * scale;
}

// Whether a row is float16 that becomes float32: GCC vectorises no such conversion, and AVX-512 has an instruction.
template <typename scalar_t, typename acc_t>
constexpr bool kIsHalf = std::is_same_v<scalar_t, Half> && std::is_same_v<acc_t, float>;

#if FASTKD_HAS_MULTIVERSION

// A mask of the elements that a vector has from i on.
FASTKD_AVX512 inline __mmask16 lanes_from(int64_t i, int64_t n) {
  return static_cast<__mmask16>(n - i >= kLanes ? 0xffff : (1 << (n - i)) - 1);
}

// n adjacent elements times scale.
FASTKD_AVX512 inline void widen_row(const Half* src, int64_t n, float scale, float* out) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < n; i += kLanes) {
    const __mmask16 lanes = lanes_from(i, n);
    const __m512 x = _mm512_maskz_cvtph_ps(lanes, _mm256_maskz_loadu_epi16(lanes, src + i));
    _mm512_mask_storeu_ps(out + i, lanes, _mm512_mul_ps(x, factor));
  }
}

// n elements times scale, rounded to nearest even.
FASTKD_AVX512 inline void narrow_row(const float* src, int64_t n, float scale, Half* out) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < n; i += kLanes) {
    const __mmask16 lanes = lanes_from(i, n);
    const __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, src + i), factor);
    _mm256_mask_storeu_epi16(
        out + i, lanes, _mm512_maskz_cvtps_ph(lanes, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

#else

inline void widen_row(const Half*, int64_t, float, float*) {}
inline void narrow_row(const float*, int64_t, float, Half*) {}

#endif

// D elements, `stride` apart, times scale.
template <typename scalar_t, typename acc_t>
static FASTKD_MULTIVERSION void convert_row(const scalar_t* src, int64_t stride, int64_t D, acc_t scale, acc_t* out) {
  if constexpr (kIsHalf<scalar_t, acc_t>)
    if (stride == 1 && has_avx512()) return widen_row(src, D, scale, out);
  if (stride == 1) {
    for (int64_t d = 0; d < D; ++d) out[d] = static_cast<acc_t>(src[d]) * scale;
  } else {
    for (int64_t d = 0; d < D; ++d) out[d] = static_cast<acc_t>(src[d * stride]) * scale;
  }
}

template <typename T>
constexpr T kNever = -std::numeric_limits<T>::infinity();

// The maximum of z, whole vectors long, 0 where that is -inf.
template <typename T>
static FASTKD_MULTIVERSION T max_row(const T* z, int64_t n) {
  n = n / kLanes * kLanes;
  Lanes<T> lanes(kNever<T>);
  for_lanes(n, [&](int64_t j, int64_t l) FASTKD_INLINE_LAMBDA { lanes[l] = lanes[l] < z[j] ? z[j] : lanes[l]; });
  const T m = lanes.max();
  return m == kNever<T> ? T(0) : m;
}

// x times scale, rounded once.
template <typename acc_t, typename out_t>
static FASTKD_MULTIVERSION void round_row(const acc_t* x, int64_t D, acc_t scale, out_t* out) {
  if constexpr (kIsHalf<out_t, acc_t>)
    if (has_avx512()) return narrow_row(x, D, scale, out);
  for (int64_t d = 0; d < D; ++d) out[d] = static_cast<out_t>(x[d] * scale);
}

}  // namespace fastkd
