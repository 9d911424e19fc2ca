// Products of matrices that stay in L2, for AVX-512: a library's pack and dispatch anew at each call.
//
// Rows are packed 16 together and transposed, [rows / 16][D][16], zeros beyond the last row. A tile of C is up to 8
// rows by 3 vectors: 24 accumulators, and 11 loads for the 24 multiply-adds of a step. A map of few wide rows is formed
// from the rows as they lie, 4 by 4 of its elements in as many vectors that are added up at the end. Tiles are of
// float32 or float64, packed rows of float32, rows of a map of float32. Where has_avx512_bf16(), packed rows and maps
// may be of bfloat16, two adjacent numbers in what is then called a word, and a float32 elsewhere.
#pragma once

#include "cpu/vector.h"
#include "isa.h"
#include "tensor.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

namespace fastkd {

constexpr int64_t kPanel = 16;                      // rows of a panel, columns of a vector
constexpr int64_t kTileRows = 8, kTileVectors = 3;  // of a tile, at most

// Elements of a vector.
template <typename T>
constexpr int64_t kWidth = 64 / sizeof(T);

// Element (i, k) of a left operand is data[i * row + k * step], k < count.
template <typename T>
struct LeftOf {
  const T* data;
  int64_t row, step, count;
};
using Left = LeftOf<float>;

// Row k of vector v of a right operand starts at data[k * step + v * next].
template <typename T>
struct RightOf {
  const T* data;
  int64_t step, next;
};
using Right = RightOf<float>;

// Rows of C, `row` apart: alpha times a product is added to them, or replaces them.
template <typename T>
struct OutOf {
  T* data;
  int64_t row;
  bool add;
  T alpha = 1;
};
using Out = OutOf<float>;

// out_ij = <x_i, x_j> of n rows, D to whole vectors; out has room for whole vectors of them in both directions.
template <typename T>
struct RowMap {
  const T* x;
  int64_t ld, n, D;
  float* out;
  int64_t ldo;
};

// Memory that is prefetched into L2 while a core multiplies, because cache misses would stall the core.
class Ahead {
 public:
  void clear() { pieces_ = at_ = total_ = pace_ = 0; }

  // `rows` of them, `stride` bytes apart.
  void add(const void* first, int64_t bytes, int64_t rows = 1, int64_t stride = 0) {
    if (pieces_ == kMost) return;
    const auto* row = static_cast<const char*>(first);
    piece_[pieces_++] = {row, row, row + bytes, rows, stride};
    total_ += rows * bytes;
  }

  // Everything within so many steps of whole tiles.
  void spread(double steps) { pace_ = static_cast<int64_t>(std::ceil(static_cast<double>(total_) / steps)); }

  // Where a tile of `steps` steps is to fetch from, pace() bytes a step.
  const char* take(int64_t steps) {
    while (at_ < pieces_ && piece_[at_].ends()) ++at_;
    if (at_ == pieces_) {
      pace_ = 0;
      return reinterpret_cast<const char*>(this);
    }
    return std::exchange(piece_[at_].next, piece_[at_].next + steps * pace_);
  }

  int64_t pace() const { return pace_; }

 private:
  static constexpr int64_t kMost = 4;
  struct Piece {
    const char *row, *next, *end;
    int64_t rows, stride;

    // Goes to the next row at the end of one.
    bool ends() {
      if (next < end) return false;
      if (--rows <= 0) return true;
      const int64_t bytes = end - row;
      row += stride;
      next = row;
      end = row + bytes;
      return false;
    }
  };
  Piece piece_[kMost];
  int64_t pieces_ = 0, at_ = 0, total_ = 0, pace_ = 0;
};

#if FASTKD_HAS_MULTIVERSION

typedef float Vector __attribute__((vector_size(64), aligned(2), may_alias));

template <typename T>
struct Wide;
template <>
struct Wide<float> {
  using type = __m512;
};
template <>
struct Wide<double> {
  using type = __m512d;
};

// Loads and stores of the first elements of a vector: `lanes` has a bit for each.
FASTKD_AVX512 FASTKD_INLINE __m512 load(const float* x, __mmask16 lanes) {
  return _mm512_maskz_loadu_ps(lanes, x);
}
FASTKD_AVX512 FASTKD_INLINE __m512d load(const double* x, __mmask16 lanes) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes), x);
}
FASTKD_AVX512 FASTKD_INLINE void store(float* out, __mmask16 lanes, __m512 x) {
  _mm512_mask_storeu_ps(out, lanes, x);
}
FASTKD_AVX512 FASTKD_INLINE void store(double* out, __mmask16 lanes, __m512d x) {
  _mm512_mask_storeu_pd(out, static_cast<__mmask8>(lanes), x);
}

constexpr __mmask16 kAllLanes = 0xffff;

// C (rows, vectors) = [A A'] B, or added to C; fetches from `ahead` on, `pace` bytes a step. The last vector has
// `lanes`. A and B of words: a step adds both products of a word.
template <typename T, int rows, int vectors, bool words>
FASTKD_AVX512_BF16 void tile(
    const LeftOf<T>& first,
    const LeftOf<T>& second,
    const RightOf<T>& b,
    OutOf<T> c,
    __mmask16 lanes,
    const char* ahead,
    int64_t pace) {
  using Vector = typename Wide<T>::type;
  const auto lanes_of = [lanes](int v) { return v == vectors - 1 ? lanes : kAllLanes; };
  Vector sum[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) sum[i][v] = Vector{};
  const T* y = b.data;
  for (int part = 0; part < 2; ++part) {
    const LeftOf<T> x = part == 0 ? first : second;
    const T* a = x.data;
    for (int64_t k = 0; k < x.count; ++k, a += x.step, y += b.step, ahead += pace) {
      __builtin_prefetch(ahead, 0, 2);
      Vector right[vectors];
#pragma GCC unroll 3
      for (int v = 0; v < vectors; ++v) right[v] = load(y + v * b.next, lanes_of(v));
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        const T left = a[i * x.row];
#pragma GCC unroll 3
        for (int v = 0; v < vectors; ++v) {
          if constexpr (words) {
            sum[i][v] = _mm512_dpbf16_ps(
                sum[i][v], reinterpret_cast<__m512bh>(_mm512_set1_ps(left)), reinterpret_cast<__m512bh>(right[v]));
          } else {
            sum[i][v] += left * right[v];
          }
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) {
      T* out = c.data + i * c.row + v * kWidth<T>;
      const Vector product = c.alpha * sum[i][v];
      store(out, lanes_of(v), c.add ? load(out, lanes_of(v)) + product : product);
    }
}

// Vectors of the next tile, out of those left; a tile of a single vector would wait for its own sums.
inline int64_t tile_width(int64_t left) {
  return left == kTileVectors + 1 ? 2 : std::min(left, kTileVectors);
}

template <typename T>
using Tile = void (*)(const LeftOf<T>&, const LeftOf<T>&, const RightOf<T>&, OutOf<T>, __mmask16, const char*, int64_t);

template <typename T, bool words>
constexpr Tile<T> kTiles[kTileRows][kTileVectors] = {
    {tile<T, 1, 1, words>, tile<T, 1, 2, words>, tile<T, 1, 3, words>},
    {tile<T, 2, 1, words>, tile<T, 2, 2, words>, tile<T, 2, 3, words>},
    {tile<T, 3, 1, words>, tile<T, 3, 2, words>, tile<T, 3, 3, words>},
    {tile<T, 4, 1, words>, tile<T, 4, 2, words>, tile<T, 4, 3, words>},
    {tile<T, 5, 1, words>, tile<T, 5, 2, words>, tile<T, 5, 3, words>},
    {tile<T, 6, 1, words>, tile<T, 6, 2, words>, tile<T, 6, 3, words>},
    {tile<T, 7, 1, words>, tile<T, 7, 2, words>, tile<T, 7, 3, words>},
    {tile<T, 8, 1, words>, tile<T, 8, 2, words>, tile<T, 8, 3, words>}};

// As tile, for up to kTileRows rows and any number of vectors; `lanes` of the last.
template <typename T, bool words = false>
void tile_row(
    int64_t rows,
    int64_t vectors,
    const LeftOf<T>& first,
    const LeftOf<T>& second,
    const RightOf<T>& b,
    OutOf<T> c,
    Ahead& ahead,
    unsigned lanes = kAllLanes) {
  for (int64_t v = 0, width; v < vectors; v += width) {
    width = tile_width(vectors - v);
    const RightOf<T> z{b.data + v * b.next, b.step, b.next};
    const OutOf<T> out{c.data + v * kWidth<T>, c.row, c.add, c.alpha};
    const auto last = static_cast<__mmask16>(v + width == vectors ? lanes : kAllLanes);
    const char* fetched = ahead.take(first.count + second.count);
    kTiles<T, words>[rows - 1][width - 1](first, second, z, out, last, fetched, ahead.pace());
  }
}

// C (rows, columns) = alpha A B, or added to C, for any number of rows, a few columns of B at a time in L1.
template <typename T>
void multiply(int64_t rows, int64_t columns, const LeftOf<T>& a, const RightOf<T>& b, OutOf<T> c, Ahead& ahead) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, vectors = (columns + kWidth<T> - 1) / kWidth<T>;
  const unsigned partial = (1u << (columns - (vectors - 1) * kWidth<T>)) - 1;
  for (int64_t v = 0, width; v < vectors; v += width) {
    width = tile_width(vectors - v);
    const unsigned lanes = v + width == vectors ? partial : kAllLanes;
    for (int64_t k = 0; k < tiles; ++k) {  // as even as possible: a tile of a few rows runs at a fraction of the rate
      const int64_t i = k * rows / tiles, height = (k + 1) * rows / tiles - i;
      const LeftOf<T> left{a.data + i * a.row, a.row, a.step, a.count};
      const RightOf<T> right{b.data + v * b.next, b.step, b.next};
      const OutOf<T> out{c.data + i * c.row + v * kWidth<T>, c.row, c.add, c.alpha};
      tile_row<T>(height, width, left, {}, right, out, ahead, lanes);
    }
  }
}

// The transpose of 16 rows of 16: pairs, then fours of each 128 bits, then those change places.
FASTKD_AVX512 FASTKD_INLINE void transpose(Vector (&x)[kPanel]) {
  Vector y[kPanel];
#pragma GCC unroll 8
  for (int i = 0; i < kPanel; i += 2) {
    y[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    y[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
#pragma GCC unroll 8
  for (int j = 0; j < kPanel / 2; ++j) {  // x[4 j + c]: columns c, c + 4, c + 8, c + 12 of rows 4 j to 4 j + 3
    const int i = j / 2 * 4 + j % 2, r = j % 2;
    x[i + r] = __builtin_shufflevector(y[i], y[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    x[i + r + 1] = __builtin_shufflevector(y[i], y[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const Vector a = __builtin_shufflevector(x[c], x[c + 4], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    const Vector b =
        __builtin_shufflevector(x[c], x[c + 4], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    const Vector d =
        __builtin_shufflevector(x[c + 8], x[c + 12], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    const Vector e =
        __builtin_shufflevector(x[c + 8], x[c + 12], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    y[c] = __builtin_shufflevector(a, d, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    y[c + 4] = __builtin_shufflevector(a, d, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    y[c + 8] = __builtin_shufflevector(b, e, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    y[c + 12] = __builtin_shufflevector(b, e, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kPanel; ++i) x[i] = y[i];
}

// Words (n, k), rows ld bytes apart, transposed to (k, cols), in squares of 16 as far as k has any: returns how far.
FASTKD_AVX512 inline int64_t transpose_words(
    const char* src,
    int64_t ld,
    int64_t n,
    int64_t k,
    int64_t cols,
    float* out) {
  const int64_t whole = k / kPanel * kPanel;
  for (int64_t j = 0; j < n; j += kPanel)
    for (int64_t p = 0; p < whole; p += kPanel) {
      Vector x[kPanel] = {};
#pragma GCC unroll 16
      for (int i = 0; i < kPanel; ++i)
        if (j + i < n) x[i] = *reinterpret_cast<const Vector*>(src + (j + i) * ld + p * sizeof(float));
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < kPanel; ++i) *reinterpret_cast<Vector*>(out + (p + i) * cols + j) = x[i];
    }
  return whole;
}

// Of words: the sum of both squares.
typedef uint32_t Words __attribute__((vector_size(64)));
FASTKD_AVX512 FASTKD_INLINE Vector square_sum(Vector words) {
  const auto bits = reinterpret_cast<Words>(words);
  const auto first = reinterpret_cast<Vector>(bits << 16), second = reinterpret_cast<Vector>(bits & 0xffff0000u);
  return first * first + second * second;
}

// A panel from 16 rows, D to whole vectors; squares: each row's Σ x².
template <bool words>
FASTKD_AVX512 void pack_panel(const float* const* rows, int64_t D, float* out, float* squares) {
  Vector sums[4] = {};
  for (int64_t d = 0; d < D; d += kPanel, out += kPanel * kPanel) {
    Vector x[kPanel];
#pragma GCC unroll 16
    for (int i = 0; i < kPanel; ++i) x[i] = *reinterpret_cast<const Vector*>(rows[i] + d);
    transpose(x);
#pragma GCC unroll 16
    for (int k = 0; k < kPanel; ++k) {
      *reinterpret_cast<Vector*>(out + k * kPanel) = x[k];
      if constexpr (words) {
        sums[k % 4] += square_sum(x[k]);
      } else {
        sums[k % 4] += x[k] * x[k];
      }
    }
  }
  *reinterpret_cast<Vector*>(squares) = (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Element i: the sum of x[i]. Halves, quarters ... of two vectors change places, one blend and one shuffle a pair.
FASTKD_AVX512 FASTKD_INLINE Vector sums(Vector (&x)[kPanel]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // of columns 0 and 1, 2 and 3 ...
    const Vector a = x[2 * i], b = x[2 * i + 1];
    x[i] = __builtin_shufflevector(a, b, 0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31) +
           __builtin_shufflevector(a, b, 1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // of 128 bits
    const Vector a = x[2 * i], b = x[2 * i + 1];
    x[i] = __builtin_shufflevector(a, b, 0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31) +
           __builtin_shufflevector(a, b, 2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29);
  }
  Vector y[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Vector a = x[i], b = x[i + 2];
    y[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23);
  }
  return __builtin_shufflevector(y[0], y[1], 0, 1, 2, 3, 20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31) +
         __builtin_shufflevector(y[0], y[1], 4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
}

// A vector of a row, and what the products of two of them add to each lane's sum.
FASTKD_AVX512_BF16 FASTKD_INLINE __m512 vector_of(const float* x) {
  return _mm512_loadu_ps(x);
}
FASTKD_AVX512_BF16 FASTKD_INLINE __m512bh vector_of(const BFloat16* x) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(x));
}
FASTKD_AVX512_BF16 FASTKD_INLINE __m512 add_products(__m512 sum, __m512 x, __m512 y) {
  return sum + x * y;
}
FASTKD_AVX512_BF16 FASTKD_INLINE __m512 add_products(__m512 sum, __m512bh x, __m512bh y) {
  return _mm512_dpbf16_ps(sum, x, y);
}

// The products of `rows` rows from i on with `columns` from j on, in both triangles; columns beyond n repeat the last.
template <int rows, int columns, typename T>
FASTKD_AVX512_BF16 FASTKD_INLINE void dots(const RowMap<T>& map, int64_t i, int64_t j, Ahead& ahead) {
  const T *a[rows], *b[columns];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) a[r] = map.x + (i + r) * map.ld;
#pragma GCC unroll 8
  for (int c = 0; c < columns; ++c) b[c] = map.x + std::min(j + c, map.n - 1) * map.ld;
  const char* fetched = ahead.take(map.D / kWidth<T>);
  const int64_t pace = ahead.pace();
  Vector sum[kPanel] = {};
  for (int64_t d = 0; d < map.D; d += kWidth<T>, fetched += pace) {
    __builtin_prefetch(fetched, 0, 2);
    decltype(vector_of(a[0])) right[columns];
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) right[c] = vector_of(b[c] + d);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const auto left = vector_of(a[r] + d);
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) sum[r * columns + c] = add_products(sum[r * columns + c], left, right[c]);
    }
  }
  const Vector by_row = sums(sum);
  Vector by_column = by_row;
  if constexpr (rows == 4)
    by_column = __builtin_shufflevector(by_row, by_row, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  if constexpr (rows == 2)
    by_column = __builtin_shufflevector(by_row, by_row, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
  const auto *below = reinterpret_cast<const float*>(&by_row), *above = reinterpret_cast<const float*>(&by_column);
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
    std::memcpy(map.out + (i + r) * map.ldo + j, below + r * columns, columns * sizeof(float));
#pragma GCC unroll 8
  for (int c = 0; c < columns; ++c)
    std::memcpy(map.out + (j + c) * map.ldo + i, above + c * rows, rows * sizeof(float));
}

// Rows [begin, end) of the map up to the diagonal, and the columns that mirror them; begin a multiple of 8, as is end
// unless it is n.
template <typename T>
FASTKD_AVX512_BF16 void map_rows(const RowMap<T>& map, int64_t begin, int64_t end, Ahead& ahead) {
  const int64_t whole = end / 4 * 4;
  for (int64_t i0 = begin; i0 < whole; i0 += 8)  // twice 4 rows stay in L1 while those before them pass
    for (int64_t j = 0, i1 = std::min(i0 + 8, whole); j < i1; j += 4)
      for (int64_t i = std::max(i0, j); i < i1; i += 4) dots<4, 4>(map, i, j, ahead);
  if (end - whole >= 2)
    for (int64_t j = 0; j < whole + 2; j += 8) dots<2, 8>(map, whole, j, ahead);
  if ((end - whole) % 2 == 1)
    for (int64_t j = 0; j < end; j += 8) dots<1, 8>(map, end - 1, j, ahead);
}

#else

template <typename T, bool words = false>
void tile_row(int64_t, int64_t, const LeftOf<T>&, const LeftOf<T>&, const RightOf<T>&, OutOf<T>, Ahead&) {}
template <typename T>
void multiply(int64_t, int64_t, const LeftOf<T>&, const RightOf<T>&, OutOf<T>, Ahead&) {}
template <bool words>
void pack_panel(const float* const*, int64_t, float*, float*) {}
template <typename T>
void map_rows(const RowMap<T>&, int64_t, int64_t, Ahead&) {}
inline int64_t transpose_words(const char*, int64_t, int64_t, int64_t, int64_t, float*) {
  return 0;
}

#endif

}  // namespace fastkd
