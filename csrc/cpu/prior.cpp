// Total variation in four directions and the norms of images, and their gradient.
//
// Forward reads each plane once, a row beside the one above it: the four differences that end in a row need no other.
// Backward forms the eight differences around a row from three rows and writes each pixel once.
#include "common.h"
#include "vector.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

namespace fastkd {
namespace {

constexpr int64_t kDirections = 4;   // along a row, a column, the diagonal and the antidiagonal
constexpr int64_t kGrain = 1 << 15;  // pixels per task below which threads cost more than they bring
constexpr int64_t kSums = 9;         // Σ |d_k|, Σ d_k² of the directions, Σ x²

struct Sums {
  double of[kSums] = {};
};

// Differences per direction; at least 1, so that a direction without any is 0.
std::array<double, kDirections> counts_of(const at::Tensor& images) {
  const int64_t H = images.size(2), W = images.size(3), planes = images.size(0) * images.size(1);
  std::array<double, kDirections> counts;
  const int64_t each[] = {H * (W - 1), (H - 1) * W, (H - 1) * (W - 1), (H - 1) * (W - 1)};
  for (int64_t k = 0; k < kDirections; ++k) counts[k] = static_cast<double>(std::max<int64_t>(1, planes * each[k]));
  return counts;
}

template <typename acc_t>
FASTKD_INLINE void add_difference(acc_t d, acc_t& absolute, acc_t& square) {
  absolute += d < 0 ? -d : d;
  square += d * d;
}

// Folds the differences that end in row x (W), with `above` the row above it or null, into `sums`.
template <typename acc_t>
FASTKD_INLINE void add_row(const acc_t* x, const acc_t* above, int64_t W, Sums* sums) {
  acc_t part[kSums][kLanes] = {};
  const auto add = [&](int64_t w, int64_t l) __attribute__((always_inline)) {
    part[8][l] += x[w] * x[w];
    add_difference(x[w + 1] - x[w], part[0][l], part[4][l]);
    if (above == nullptr) return;
    add_difference(x[w] - above[w], part[1][l], part[5][l]);
    add_difference(x[w + 1] - above[w], part[2][l], part[6][l]);
    add_difference(x[w] - above[w + 1], part[3][l], part[7][l]);
  };
  const int64_t whole = (W - 1) / kLanes * kLanes;
  for (int64_t w = 0; w < whole; w += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) add(w + l, l);
  for (int64_t w = whole; w < W - 1; ++w) add(w, w - whole);
  part[8][0] += x[W - 1] * x[W - 1];
  if (above != nullptr) add_difference(x[W - 1] - above[W - 1], part[1][0], part[5][0]);
  for (int64_t k = 0; k < kSums; ++k) {
    Lanes<acc_t> lanes(0);
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = part[k][l];
    sums->of[k] += static_cast<double>(lanes.sum());
  }
}

// Rows [h0, h1) of a plane, and the differences that end in them.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void add_plane(
    const scalar_t* x,
    const PlaneStrides s,
    int64_t h0,
    int64_t h1,
    int64_t W,
    acc_t* held,  // 2 rows
    Sums* sums) {
  const acc_t* above = nullptr;
  for (int64_t h = std::max<int64_t>(h0 - 1, 0); h < h1; ++h) {
    acc_t* row = held + h % 2 * W;
    const scalar_t* p = x + h * s.h;
    if (s.w == 1) {
      for (int64_t w = 0; w < W; ++w) row[w] = static_cast<acc_t>(p[w]);
    } else {
      for (int64_t w = 0; w < W; ++w) row[w] = static_cast<acc_t>(p[w * s.w]);
    }
    if (h >= h0) add_row(row, above, W, sums);
    above = row;
  }
}

PlaneStrides strides_of(const at::Tensor& x) {
  return {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> prior_fwd_cpu(const at::Tensor& images) {  // (B, C, H, W)
  const int64_t B = images.size(0), C = images.size(1), H = images.size(2), W = images.size(3);
  const auto options = images.options().dtype(accumulator(images));
  auto tv_l1 = at::empty({kDirections}, options), tv_l2 = at::empty_like(tv_l1), norms = at::empty({B}, options);
  const auto s = strides_of(images);
  // Large planes are cut into bands of rows, so that few of them still keep all threads busy.
  const int64_t bands = std::clamp<int64_t>(H * W / kGrain, 1, H), units = B * C * bands;
  std::vector<Sums> partial(units);  // (B, C, bands)
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, images.scalar_type(), "prior_fwd_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    const auto* x = images.const_data_ptr<scalar_t>();
    const int64_t each = std::max<int64_t>(1, H * W / bands);
    at::parallel_for(0, units, std::max<int64_t>(1, kGrain / each), [&](int64_t begin, int64_t end) {
      Buffer<acc_t> held(2 * W);
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

// What a difference adds to the pixel it ends in: a sign(d) + e d.
template <typename acc_t>
struct Slope {
  acc_t a, e;

  FASTKD_INLINE acc_t operator()(acc_t d) const {
    const acc_t sign = d > 0 ? a : -a;
    return (d == 0 ? acc_t(0) : sign) + e * d;
  }
};

// dx of a row between the rows above and below it, null at the edges; rows have a column of padding at each end.
template <typename acc_t>
FASTKD_INLINE void gradient_row(
    const acc_t* x,
    const acc_t* above,
    const acc_t* below,
    int64_t W,
    const Slope<acc_t>* slopes,  // (4)
    acc_t of_image,
    acc_t* dx) {
  const auto row = slopes[0], column = slopes[1], diagonal = slopes[2], antidiagonal = slopes[3];
  for (int64_t w = 0; w < W; ++w) dx[w] = of_image * x[w];
  for (int64_t w = 1; w < W - 1; ++w) dx[w] += row(x[w] - x[w - 1]) - row(x[w + 1] - x[w]);
  if (W > 1) {
    dx[0] -= row(x[1] - x[0]);
    dx[W - 1] += row(x[W - 1] - x[W - 2]);
  }
  if (above != nullptr) {
    for (int64_t w = 1; w < W - 1; ++w)
      dx[w] += column(x[w] - above[w]) + diagonal(x[w] - above[w - 1]) + antidiagonal(x[w] - above[w + 1]);
    dx[0] += column(x[0] - above[0]);
    if (W > 1) {
      dx[0] += antidiagonal(x[0] - above[1]);
      dx[W - 1] += column(x[W - 1] - above[W - 1]) + diagonal(x[W - 1] - above[W - 2]);
    }
  }
  if (below != nullptr) {
    for (int64_t w = 1; w < W - 1; ++w)
      dx[w] -= column(below[w] - x[w]) + diagonal(below[w + 1] - x[w]) + antidiagonal(below[w - 1] - x[w]);
    dx[0] -= column(below[0] - x[0]);
    if (W > 1) {
      dx[0] -= diagonal(below[1] - x[0]);
      dx[W - 1] -= column(below[W - 1] - x[W - 1]) + antidiagonal(below[W - 2] - x[W - 1]);
    }
  }
}

// Rows [h0, h1) of a plane of the gradient.
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
    acc_t* held) {  // 4 rows: three of x and one of dx
  acc_t* out = held + 3 * W;
  for (int64_t h = std::max<int64_t>(h0 - 1, 0); h < std::min(h1 + 1, H) + 1; ++h) {
    if (h < std::min(h1 + 1, H)) {
      acc_t* row = held + h % 3 * W;
      const scalar_t* p = x + h * s.h;
      if (s.w == 1) {
        for (int64_t w = 0; w < W; ++w) row[w] = static_cast<acc_t>(p[w]);
      } else {
        for (int64_t w = 0; w < W; ++w) row[w] = static_cast<acc_t>(p[w * s.w]);
      }
    }
    const int64_t at = h - 1;  // the row whose neighbours are now held
    if (at < h0 || at >= h1) continue;
    const acc_t* above = at == 0 ? nullptr : held + (at - 1) % 3 * W;
    const acc_t* below = at == H - 1 ? nullptr : held + (at + 1) % 3 * W;
    gradient_row(held + at % 3 * W, above, below, W, slopes, of_image, out);
    scalar_t* q = dx + at * d.h;
    if (d.w == 1) {
      for (int64_t w = 0; w < W; ++w) q[w] = static_cast<scalar_t>(out[w]);
    } else {
      for (int64_t w = 0; w < W; ++w) q[w * d.w] = static_cast<scalar_t>(out[w]);
    }
  }
}

at::Tensor prior_bwd_cpu(
    const at::Tensor& dtv_l1_in,  // (4)
    const at::Tensor& dtv_l2_in,  // (4)
    const at::Tensor& dnorms_in,  // (B)
    const at::Tensor& images,     // (B, C, H, W)
    const at::Tensor& tv_l2,      // (4)
    const at::Tensor& norms) {    // (B)
  const int64_t B = images.size(0), C = images.size(1), H = images.size(2), W = images.size(3);
  auto dimages = at::empty_like(images);
  const auto dtype = accumulator(images);
  const auto dtv_l1 = dtv_l1_in.to(dtype).contiguous(), dtv_l2 = dtv_l2_in.to(dtype).contiguous();
  const auto dnorms = dnorms_in.to(dtype).contiguous();
  const auto s = strides_of(images), d = strides_of(dimages);
  const int64_t bands = std::clamp<int64_t>(H * W / kGrain, 1, H);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, images.scalar_type(), "prior_bwd_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    const auto counts = counts_of(images);
    Slope<acc_t> slopes[kDirections];
    for (int64_t k = 0; k < kDirections; ++k) {
      const acc_t norm = tv_l2.const_data_ptr<acc_t>()[k];
      slopes[k].a = dtv_l1.const_data_ptr<acc_t>()[k] / static_cast<acc_t>(counts[k]);
      slopes[k].e = norm == 0 ? acc_t(0) : dtv_l2.const_data_ptr<acc_t>()[k] / norm;
    }
    const auto* x = images.const_data_ptr<scalar_t>();
    auto* dx = dimages.mutable_data_ptr<scalar_t>();
    const int64_t each = std::max<int64_t>(1, H * W / bands);
    at::parallel_for(0, B * C * bands, std::max<int64_t>(1, kGrain / each), [&](int64_t begin, int64_t end) {
      Buffer<acc_t> held(4 * W);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / bands / C, c = unit / bands % C, band = unit % bands;
        const acc_t norm = norms.const_data_ptr<acc_t>()[b];
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
            norm == 0 ? acc_t(0) : dnorms.const_data_ptr<acc_t>()[b] / norm,
            held.data());
      }
    });
  });
  return dimages;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("prior_fwd", &prior_fwd_cpu);
  m.impl("prior_bwd", &prior_bwd_cpu);
}

}  // namespace fastkd
