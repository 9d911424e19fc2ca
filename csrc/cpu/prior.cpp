// Total variation in four directions and the norms of images, and their gradient.
//
// Forward reads each plane once, a row beside the one above it: the four differences that end in a row need no other.
// Backward forms each difference once, adds it to the gradient of its row and takes it from that of the row above, and
// writes each pixel once.
#include "blocks.h"
#include "common.h"
#include "thresholds.h"
#include "vector.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <type_traits>
#include <vector>

namespace fastkd {
namespace {

constexpr int64_t kDirections = 4;  // along a row, a column, the diagonal and the antidiagonal
constexpr int64_t kSums = 9;        // Σ |d_k|, Σ d_k² of the directions, Σ x²

Threshold kGrain{"prior.grain", 1 << 15};  // pixels per task below which threads cost more than they bring
Threshold kPart{"prior.part", 8};          // rows whose sums are kept in float32

struct Sums {
  double of[kSums] = {};
};

// Differences per direction; at least 1, so that a direction without any is 0.
std::array<double, kDirections> counts_of(const Tensor& images) {
  const int64_t H = images.size(2), W = images.size(3), planes = images.size(0) * images.size(1);
  std::array<double, kDirections> counts;
  const int64_t each[] = {H * (W - 1), (H - 1) * W, (H - 1) * (W - 1), (H - 1) * (W - 1)};
  for (int64_t k = 0; k < kDirections; ++k) counts[k] = static_cast<double>(std::max<int64_t>(1, planes * each[k]));
  return counts;
}

// Sums in lanes. Loops of fixed length over lanes become vectors of the widest instruction set.
template <typename acc_t>
struct LaneSums {
  acc_t of[kSums][kLanes];

  FASTKD_INLINE void clear() { std::memset(of, 0, sizeof of); }

  // Adds the differences that end in row x (W), with `above` the row above it or null.
  FASTKD_INLINE void add_row(const acc_t* x, const acc_t* above, int64_t W, Sums* sums) {
    if (above == nullptr)
      add_pairs<false>(x, x, W - 1);
    else
      add_pairs<true>(x, above, W - 1);
    const double end = x[W - 1], d = above == nullptr ? 0 : static_cast<double>(x[W - 1] - above[W - 1]);
    sums->of[1] += std::abs(d);
    sums->of[kDirections + 1] += d * d;
    sums->of[kSums - 1] += end * end;
  }

  // What `part` holds, which starts anew.
  template <typename part_t>
  FASTKD_INLINE void take(LaneSums<part_t>& part) {
    for (int64_t k = 0; k < kSums; ++k)
      for (int64_t l = 0; l < kLanes; ++l) of[k][l] += static_cast<acc_t>(part.of[k][l]);
    part.clear();
  }

  FASTKD_INLINE void fold_into(Sums* sums) {
    for (int64_t k = 0; k < kSums; ++k) sums->of[k] += static_cast<double>(Lanes<acc_t>::load(of[k]).sum());
  }

 private:
  // Of pixels w < pairs and w + 1.
  template <bool has_above>
  FASTKD_INLINE void add_pairs(const acc_t* x, const acc_t* above, int64_t pairs) {
    LaneSums sums = *this;
    int64_t w = 0;
    for (; w + kLanes <= pairs; w += kLanes)
      for (int64_t l = w; l < w + kLanes; ++l) sums.template add<has_above>(x + l, above + l, acc_t(1), l - w);
    // The last vector again, without what has been added: short rows have zeros before them.
    const acc_t* keep = kLast<acc_t> + (pairs - w);
    x += pairs - kLanes, above += pairs - kLanes;
    for (int64_t l = 0; l < kLanes; ++l) sums.template add<has_above>(x + l, above + l, keep[l], l);
    *this = sums;
  }

  // The differences between a pixel, its right neighbour and those above them.
  template <bool has_above>
  FASTKD_INLINE void add(const acc_t* x, const acc_t* above, acc_t keep, int64_t l) {
    const acc_t d[] = {
        x[1] - x[0],
        has_above ? x[0] - above[0] : acc_t(0),
        has_above ? x[1] - above[0] : acc_t(0),
        has_above ? x[0] - above[1] : acc_t(0)};
    for (int64_t k = 0; k < (has_above ? kDirections : 1); ++k) {
      const acc_t e = keep == 0 ? acc_t(0) : d[k];  // an infinity times 0 is NaN
      of[k][l] += std::abs(e);
      of[kDirections + k][l] += e * e;
    }
    of[kSums - 1][l] += keep == 0 ? acc_t(0) : x[0] * x[0];
  }
};

// A row as acc_t: itself, or in `held`, which lies behind kLanes zeros, as a short one has to.
template <typename scalar_t, typename acc_t>
FASTKD_INLINE const acc_t* row_of(const scalar_t* x, int64_t stride, int64_t W, acc_t* held) {
  if constexpr (std::is_same_v<scalar_t, acc_t>)
    if (stride == 1 && W > kLanes) return x;
  convert_row<scalar_t, acc_t>(x, stride, W, 1, held);
  return held;
}

// Rows [h0, h1) of a plane, and the differences that end in them.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void add_plane(
    const scalar_t* x,
    const PlaneStrides s,
    int64_t h0,
    int64_t h1,
    int64_t W,
    acc_t* held,  // 2 rows, each behind kLanes zeros
    Sums* sums) {
  const acc_t* above = nullptr;
  const int64_t most = kPart;
  LaneSums<acc_t> part;  // of a few rows; few, so that float32 holds them
  LaneSums<double> total;
  part.clear();
  total.clear();
  for (int64_t h = std::max<int64_t>(h0 - 1, 0); h < h1; ++h) {
    const scalar_t* p = x + h * s.h;
    const acc_t* row = row_of(p, s.w, W, held + h % 2 * (kLanes + W) + kLanes);
    if (h >= h0) part.add_row(row, above, W, sums);
    if (h % most == most - 1) total.take(part);
    above = row;
  }
  total.take(part);
  total.fold_into(sums);
}

PlaneStrides strides_of(const Tensor& x) {
  return {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

std::tuple<Tensor, Tensor, Tensor> prior_fwd_cpu(const Tensor& images) {  // (B, C, H, W)
  const int64_t B = images.size(0), C = images.size(1), H = images.size(2), W = images.size(3);
  const auto acc = accumulator(images);
  auto tv_l1 = empty(images, {kDirections}, acc), tv_l2 = empty_like(tv_l1), norms = empty(images, {B}, acc);
  const auto s = strides_of(images);
  // Large planes are cut into bands of rows, so that few of them still keep all threads busy.
  const int64_t bands = std::clamp<int64_t>(H * W / kGrain, 1, H), units = B * C * bands;
  std::vector<Sums> partial(units);  // (B, C, bands)
  FASTKD_DISPATCH(images.scalar_type(), "prior_fwd_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    const auto* x = images.const_data_ptr<scalar_t>();
    const int64_t each = std::max<int64_t>(1, H * W / bands);
    parallel_for(0, units, std::max<int64_t>(1, kGrain / each), [&](int64_t begin, int64_t end) {
      Buffer<acc_t> held(2 * (kLanes + W));
      std::fill_n(held.data(), 2 * (kLanes + W), acc_t(0));
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t plane = unit / bands, band = unit % bands;
        const auto* p = x + plane / C * s.b + plane % C * s.c;
        add_plane<scalar_t, acc_t>(p, s, band * H / bands, (band + 1) * H / bands, W, held.data(), &partial[unit]);
      }
    });
    Sums total;
    for (int64_t b = 0; b < B; ++b) {
      double squares = 0;
      for (int64_t unit = b * C * bands; unit < (b + 1) * C * bands; ++unit) {
        for (int64_t k = 0; k < kSums - 1; ++k) total.of[k] += partial[unit].of[k];
        squares += partial[unit].of[kSums - 1];
      }
      norms.mutable_data_ptr<acc_t>()[b] = static_cast<acc_t>(std::sqrt(squares));
    }
    const auto counts = counts_of(images);
    for (int64_t k = 0; k < kDirections; ++k) {
      tv_l1.mutable_data_ptr<acc_t>()[k] = static_cast<acc_t>(total.of[k] / counts[k]);
      tv_l2.mutable_data_ptr<acc_t>()[k] = static_cast<acc_t>(std::sqrt(total.of[kDirections + k]));
    }
  });
  return {tv_l1, tv_l2, norms};
}

// The weighted sum of what forward gives, and its slopes by each of those numbers. A term of weight 0 does not count,
// even if it is infinite; without any term, such norms make NaN.
std::tuple<Tensor, Tensor> prior_loss_cpu(
    const Tensor& tv_l1_in,  // (4)
    const Tensor& tv_l2_in,  // (4)
    const Tensor& norms_in,  // (B)
    double of_tv_l1,
    double of_tv_l2,
    double of_norm,
    bool per_image) {
  const auto tv_l1 = tv_l1_in.contiguous(), tv_l2 = tv_l2_in.contiguous(), norms = norms_in.contiguous();
  const int64_t B = norms.numel();
  auto loss = empty(norms, {}), slopes = empty(norms, {2 * kDirections + B});
  FASTKD_DISPATCH(norms.scalar_type(), "prior_loss_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    const auto *absolute = tv_l1.const_data_ptr<acc_t>(), *squared = tv_l2.const_data_ptr<acc_t>();
    const auto* norm_of = norms.const_data_ptr<acc_t>();
    auto* slope = slopes.mutable_data_ptr<acc_t>();
    double terms[3] = {};
    for (int64_t k = 0; k < kDirections; ++k) {
      terms[0] += absolute[k], terms[1] += squared[k];
      slope[k] = static_cast<acc_t>(of_tv_l1), slope[kDirections + k] = static_cast<acc_t>(of_tv_l2);
    }
    slope += 2 * kDirections;
    // One norm of all images has slope 0 at 0; at subnormal norms it would be infinite.
    const auto held = [&](int64_t b) {
      return norm_of[b] < std::numeric_limits<acc_t>::min() ? 0.0 : static_cast<double>(norm_of[b]);
    };
    for (int64_t b = 0; b < B; ++b) terms[2] += per_image ? norm_of[b] : held(b) * held(b);
    terms[2] = per_image ? terms[2] / static_cast<double>(B) : std::sqrt(terms[2]);
    for (int64_t b = 0; b < B; ++b) {
      const double whole = terms[2] == 0 ? 0 : held(b) / terms[2];
      const double each = per_image ? 1 / static_cast<double>(B) : whole;
      slope[b] = static_cast<acc_t>(of_norm == 0 ? 0 : of_norm * each);
    }
    const double weights[] = {of_tv_l1, of_tv_l2, of_norm};
    const bool is_nothing = of_tv_l1 == 0 && of_tv_l2 == 0 && of_norm == 0;
    double total = is_nothing ? 0 * terms[2] : 0;
    for (int64_t i = 0; i < 3; ++i) total += weights[i] == 0 ? 0 : weights[i] * terms[i];
    *loss.mutable_data_ptr<acc_t>() = static_cast<acc_t>(total);
  });
  return {loss, slopes};
}

// gradient / norm, which scales what the norm was taken of; 0 for a norm of 0. Norms that are subnormal count as 0, and
// the quotient is at most the inverse of the smallest other: times a difference of 0, an infinity would be NaN.
template <typename acc_t>
acc_t ratio(acc_t gradient, acc_t norm) {
  constexpr acc_t least = std::numeric_limits<acc_t>::min();
  return norm < least ? acc_t(0) : gradient / std::max(norm, std::abs(gradient) * least);
}

// What a difference adds to the pixel it ends in: a sign(d) + e d.
template <typename acc_t>
struct Slope {
  acc_t a, e;

  FASTKD_INLINE acc_t operator()(acc_t d) const {
    const acc_t sign = d > 0 ? a : -a;
    return (d == 0 ? acc_t(0) : sign) + e * d;
  }
};

// Rows of a plane, each of W elements between kLanes zeros. Loops go over whole vectors, so what lies behind a row is
// written too, and only its first element is read.
template <typename acc_t>
struct Rows {
  acc_t *x[2], *dx[2];                            // this row and the one above, by the parity of their number
  acc_t *row, *column, *diagonal, *antidiagonal;  // slopes of the differences, 0 beside their ends

  static int64_t stride(int64_t W) { return padded(W) + 2 * kLanes; }
  static int64_t size(int64_t W) { return 8 * stride(W); }

  Rows(acc_t* memory, int64_t W) {
    std::fill_n(memory, size(W), acc_t(0));
    acc_t** const each[] = {&x[0], &x[1], &dx[0], &dx[1], &row, &column, &diagonal, &antidiagonal};
    for (size_t i = 0; i < std::size(each); ++i) *each[i] = memory + i * stride(W) + kLanes;
  }
};

// Starts the gradient of row h by what lies within it.
template <typename acc_t>
FASTKD_INLINE void add_within(const Rows<acc_t>& rows, int64_t h, int64_t W, const Slope<acc_t> slope, acc_t of_image) {
  const acc_t* x = rows.x[h % 2];
  acc_t *dx = rows.dx[h % 2], *g = rows.row;
#pragma omp simd
  for (int64_t w = 0; w < padded(W); ++w) g[w] = slope(x[w + 1] - x[w]);
  g[W - 1] = 0;
#pragma omp simd
  for (int64_t w = 0; w < padded(W); ++w) dx[w] = of_image * x[w] + (g[w - 1] - g[w]);
}

// Adds the differences of row h and the row above it to the gradients of both.
template <typename acc_t>
FASTKD_INLINE void add_between(const Rows<acc_t>& rows, int64_t h, int64_t W, const Slope<acc_t>* slopes) {
  const auto of_column = slopes[1], of_diagonal = slopes[2], of_antidiagonal = slopes[3];
  const acc_t *x = rows.x[h % 2], *above = rows.x[1 - h % 2];
  acc_t *dx = rows.dx[h % 2], *dabove = rows.dx[1 - h % 2];
  acc_t *c = rows.column, *d = rows.diagonal, *a = rows.antidiagonal;
#pragma omp simd
  for (int64_t w = 0; w < padded(W); ++w) {
    c[w] = of_column(x[w] - above[w]);
    d[w] = of_diagonal(x[w + 1] - above[w]);
    a[w] = of_antidiagonal(x[w] - above[w + 1]);
  }
  d[W - 1] = a[W - 1] = 0;
#pragma omp simd
  for (int64_t w = 0; w < padded(W); ++w) {
    dx[w] += c[w] + d[w - 1] + a[w];
    dabove[w] -= c[w] + d[w] + a[w - 1];
  }
}

// Rows [h0, h1) of a plane of the gradient. Each difference is formed once, and by both bands where it joins two.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void gradient_plane(
    const scalar_t* x,
    const PlaneStrides s,
    scalar_t* dx,
    const PlaneStrides d,
    int64_t h0,
    int64_t h1,
    int64_t H,
    int64_t W,
    const Slope<acc_t>* slopes,
    acc_t of_image,
    const Rows<acc_t> rows) {
  const int64_t first = std::max<int64_t>(h0 - 1, 0), last = std::min(h1, H - 1);
  for (int64_t h = first; h <= last; ++h) {
    acc_t* row = rows.x[h % 2];
    const scalar_t* p = x + h * s.h;
    if (s.w == 1) {
      for (int64_t w = 0; w < W; ++w) row[w] = static_cast<acc_t>(p[w]);
    } else {
      for (int64_t w = 0; w < W; ++w) row[w] = static_cast<acc_t>(p[w * s.w]);
    }
    add_within(rows, h, W, slopes[0], of_image);
    if (h > first) add_between(rows, h, W, slopes);
    for (int64_t at = h - 1; at <= h; ++at) {  // the row above is complete now, and the last of the plane is too
      if (at < h0 || at >= h1 || (at == h && h != H - 1)) continue;
      const acc_t* out = rows.dx[at % 2];
      scalar_t* q = dx + at * d.h;
      if (d.w == 1) {
        for (int64_t w = 0; w < W; ++w) q[w] = static_cast<scalar_t>(out[w]);
      } else {
        for (int64_t w = 0; w < W; ++w) q[w * d.w] = static_cast<scalar_t>(out[w]);
      }
    }
  }
}

Tensor prior_bwd_cpu(
    const Tensor& dtv_l1_in,  // (4)
    const Tensor& dtv_l2_in,  // (4)
    const Tensor& dnorms_in,  // (B)
    const Tensor& images,     // (B, C, H, W)
    const Tensor& tv_l2,      // (4)
    const Tensor& norms) {    // (B)
  const int64_t B = images.size(0), C = images.size(1), H = images.size(2), W = images.size(3);
  auto dimages = empty_kept(images);
  const auto dtype = accumulator(images);
  const auto dtv_l1 = dtv_l1_in.to(dtype).contiguous(), dtv_l2 = dtv_l2_in.to(dtype).contiguous();
  const auto dnorms = dnorms_in.to(dtype).contiguous();
  const auto tv_norms = tv_l2.contiguous(), norm_of = norms.contiguous();
  const auto s = strides_of(images), d = strides_of(dimages);
  const int64_t bands = std::clamp<int64_t>(H * W / kGrain, 1, H);
  FASTKD_DISPATCH(images.scalar_type(), "prior_bwd_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    const auto counts = counts_of(images);
    Slope<acc_t> slopes[kDirections];
    for (int64_t k = 0; k < kDirections; ++k) {
      const acc_t norm = tv_norms.const_data_ptr<acc_t>()[k];
      slopes[k].a = dtv_l1.const_data_ptr<acc_t>()[k] / static_cast<acc_t>(counts[k]);
      slopes[k].e = ratio(dtv_l2.const_data_ptr<acc_t>()[k], norm);
    }
    const auto* x = images.const_data_ptr<scalar_t>();
    auto* dx = dimages.mutable_data_ptr<scalar_t>();
    const int64_t each = std::max<int64_t>(1, H * W / bands);
    parallel_for(0, B * C * bands, std::max<int64_t>(1, kGrain / each), [&](int64_t begin, int64_t end) {
      Buffer<acc_t> held(Rows<acc_t>::size(W));
      const Rows<acc_t> rows(held.data(), W);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / bands / C, c = unit / bands % C, band = unit % bands;
        gradient_plane<scalar_t, acc_t>(
            x + b * s.b + c * s.c,
            s,
            dx + b * d.b + c * d.c,
            d,
            band * H / bands,
            (band + 1) * H / bands,
            H,
            W,
            slopes,
            ratio(dnorms.const_data_ptr<acc_t>()[b], norm_of.const_data_ptr<acc_t>()[b]),
            rows);
      }
    });
  });
  return dimages;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  implement<prior_fwd_cpu>(m, "prior_fwd");
  implement<prior_loss_cpu>(m, "prior_loss");
  implement<prior_bwd_cpu>(m, "prior_bwd");
}

}  // namespace fastkd
