// Per-channel mean and biased variance of (B, C, ...), and their backward.
//
// Forward reads x once: a block that fits in L1 is summed, then its deviations from its own mean are, so a mean far
// above the spread costs no digits; blocks merge pairwise in double (Chan et al.) in a fixed order, so the
// result does not depend on the number of threads.
#include "common.h"
#include "isa.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace fastkd {
namespace {

constexpr int64_t kBlock = 2048;     // elements of a block along a row: 8 KB of float32
constexpr int64_t kRows = 32;        // rows of a block of columns
constexpr int64_t kColumns = 256;    // channels of a block of columns: 32 KB of float32 with kRows
constexpr int64_t kUnits = 4096;     // about as many units as a forward is cut into
constexpr int64_t kGrain = 1 << 15;  // elements per task below which threads cost more than they bring

struct Moments {
  double count = 0, mean = 0, m2 = 0;

  void merge(double n, double mean_n, double m2_n) {
    const double total = count + n, delta = mean_n - mean;
    mean += delta * (n / total);
    m2 += m2_n + delta * delta * (count * n / total);
    count = total;
  }
};

// Folds in a block from its rounded mean and the sums of deviations and squared deviations from it.
inline void merge_block(Moments* out, int64_t n, double mean, double deviation, double m2) {
  const double count = static_cast<double>(n);
  out->merge(count, mean + deviation / count, m2 - deviation * deviation / count);
}

// n elements, `stride` apart.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void row_moments(const scalar_t* x, int64_t n, int64_t stride, Moments* out) {
  for (int64_t i0 = 0; i0 < n; i0 += kBlock) {
    const int64_t m = std::min(kBlock, n - i0);
    const scalar_t* p = x + i0 * stride;
    acc_t sum = 0, deviation = 0, m2 = 0;
    if (stride == 1) {
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < m; ++i) sum += static_cast<acc_t>(p[i]);
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < m; ++i) sum += static_cast<acc_t>(p[i * stride]);
    }
    const acc_t mean = sum / static_cast<acc_t>(m);
    if (stride == 1) {
#pragma omp simd reduction(+ : deviation, m2)
      for (int64_t i = 0; i < m; ++i) {
        const acc_t d = static_cast<acc_t>(p[i]) - mean;
        deviation += d;
        m2 += d * d;
      }
    } else {
#pragma omp simd reduction(+ : deviation, m2)
      for (int64_t i = 0; i < m; ++i) {
        const acc_t d = static_cast<acc_t>(p[i * stride]) - mean;
        deviation += d;
        m2 += d * d;
      }
    }
    merge_block(out, m, mean, deviation, m2);
  }
}

// n rows, `stride` apart, of C <= kColumns adjacent channels.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void column_moments(const scalar_t* x, int64_t n, int64_t stride, int64_t C, Moments* out) {
  acc_t mean[kColumns], deviation[kColumns], m2[kColumns];
  for (int64_t i0 = 0; i0 < n; i0 += kRows) {
    const int64_t m = std::min(kRows, n - i0);
    const scalar_t* p = x + i0 * stride;
    std::fill_n(mean, C, acc_t(0));
    std::fill_n(deviation, C, acc_t(0));
    std::fill_n(m2, C, acc_t(0));
    for (int64_t i = 0; i < m; ++i)
      for (int64_t c = 0; c < C; ++c) mean[c] += static_cast<acc_t>(p[i * stride + c]);
    for (int64_t c = 0; c < C; ++c) mean[c] /= static_cast<acc_t>(m);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t c = 0; c < C; ++c) {
        const acc_t d = static_cast<acc_t>(p[i * stride + c]) - mean[c];
        deviation[c] += d;
        m2[c] += d * d;
      }
    for (int64_t c = 0; c < C; ++c) merge_block(out + c, m, mean[c], deviation[c], m2[c]);
  }
}

// dx = a + b (x - mean) along a row.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void row_backward(
    scalar_t* dx,
    int64_t stride_d,
    const scalar_t* x,
    int64_t stride_x,
    int64_t n,
    acc_t a,
    acc_t b,
    acc_t mean) {
  if (stride_d == 1 && stride_x == 1) {
    for (int64_t i = 0; i < n; ++i) dx[i] = static_cast<scalar_t>(a + b * (static_cast<acc_t>(x[i]) - mean));
  } else {
    for (int64_t i = 0; i < n; ++i)
      dx[i * stride_d] = static_cast<scalar_t>(a + b * (static_cast<acc_t>(x[i * stride_x]) - mean));
  }
}

// The same along C adjacent channels.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void column_backward(
    scalar_t* dx,
    const scalar_t* x,
    int64_t C,
    const acc_t* a,
    const acc_t* b,
    const acc_t* mean) {
  for (int64_t c = 0; c < C; ++c) dx[c] = static_cast<scalar_t>(a[c] + b[c] * (static_cast<acc_t>(x[c]) - mean[c]));
}

std::tuple<at::Tensor, at::Tensor> moments_fwd_cpu(
    const at::Tensor& x_in,  // (B, C, ...)
    bool per_image) {
  auto x = x_in;
  auto folded = fold_planes<1>({x});
  if (!folded) {
    x = x.contiguous();
    folded = fold_planes<1>({x});
  }
  int64_t B = folded->B, W = folded->W;
  const int64_t C = folded->C, H = folded->H;
  auto s = folded->strides[0];
  const auto options = x.options().dtype(accumulator(x));
  auto mean = per_image ? at::empty({B, C}, options) : at::empty({C}, options);
  auto var = at::empty_like(mean);
  if (x.numel() == 0) return {mean, var};
  if (!per_image && H == 1 && (W == 1 || s.b == W * s.w)) {  // images follow each other: one long row
    s.w = W == 1 ? s.b : s.w;
    W *= std::exchange(B, 1);
  }
  const bool columns = s.c == 1 && C > 1;

  // A unit is one channel (or block of channels) of some images or of a part of a row. Their number depends on the
  // shape alone, and is small: each costs a merge.
  const int64_t wanted = std::max(kUnits / C, int64_t(16));
  const int64_t sets = per_image ? B : std::min(wanted, B);
  const int64_t block = columns ? kRows : kBlock;
  const int64_t parts = per_image ? 1 : std::clamp(wanted / sets, int64_t(1), (W + block - 1) / block);
  const int64_t tiles = columns ? (C + kColumns - 1) / kColumns : C;
  const int64_t elements = x.numel() / (sets * parts * tiles);
  std::vector<Moments> partial(sets * parts * C);  // (sets, parts, C)
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "moments_fwd_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    const auto* x_ptr = x.const_data_ptr<scalar_t>();
    at::parallel_for(0, sets * parts * tiles, std::max<int64_t>(1, kGrain / elements), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t set = unit / tiles / parts, part = unit / tiles % parts;
        const int64_t c = unit % tiles * (columns ? kColumns : 1);
        const int64_t w0 = part * W / parts, w1 = (part + 1) * W / parts;
        Moments* out = &partial[unit / tiles * C + c];
        for (int64_t b = set * B / sets; b < (set + 1) * B / sets; ++b)
          for (int64_t h = 0; h < H; ++h) {
            const scalar_t* p = x_ptr + b * s.b + c * s.c + h * s.h + w0 * s.w;
            if (columns)
              column_moments<scalar_t, acc_t>(p, w1 - w0, s.w, std::min(kColumns, C - c), out);
            else
              row_moments<scalar_t, acc_t>(p, w1 - w0, s.w, out);
          }
      }
    });
    if (!per_image)  // in order into the first
      for (size_t i = C; i < partial.size(); ++i)
        partial[i % C].merge(partial[i].count, partial[i].mean, partial[i].m2);
    auto* mean_ptr = mean.mutable_data_ptr<acc_t>();
    auto* var_ptr = var.mutable_data_ptr<acc_t>();
    for (int64_t i = 0; i < mean.numel(); ++i) {
      mean_ptr[i] = static_cast<acc_t>(partial[i].mean);
      var_ptr[i] = static_cast<acc_t>(partial[i].m2 / partial[i].count);
    }
  });
  return {mean, var};
}

at::Tensor moments_bwd_cpu(
    const at::Tensor& dmean,  // (C) or (B, C)
    const at::Tensor& dvar,   // as dmean
    const at::Tensor& x_in,   // (B, C, ...)
    const at::Tensor& mean,   // as dmean
    bool per_image) {
  const auto& x = x_in;
  auto dx = at::empty_like(x);
  if (x.numel() == 0) return dx;
  auto folded = fold_planes<2>({x, dx});
  if (!folded) return dx.copy_(moments_bwd_cpu(dmean, dvar, x.contiguous(), mean, per_image));
  const int64_t B = folded->B, C = folded->C, H = folded->H, W = folded->W;
  const auto s = folded->strides[0], d = folded->strides[1];
  const double M = static_cast<double>(per_image ? H * W : B * H * W);
  const auto dtype = accumulator(x);
  const auto a = (dmean.to(dtype) / M).contiguous(), b = (dvar.to(dtype) * (2 / M)).contiguous();
  const auto center = mean.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "moments_bwd_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    const auto* x_ptr = x.const_data_ptr<scalar_t>();
    auto* dx_ptr = dx.mutable_data_ptr<scalar_t>();
    const auto *a_ptr = a.const_data_ptr<acc_t>(), *b_ptr = b.const_data_ptr<acc_t>();
    const auto* mean_ptr = center.const_data_ptr<acc_t>();
    if (s.c == 1 && d.c == 1 && C > 1) {
      at::parallel_for(0, B * H * W, std::max<int64_t>(1, kGrain / C), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / (H * W), h = i / W % H, w = i % W, stat = per_image ? n * C : 0;
          column_backward<scalar_t, acc_t>(
              dx_ptr + n * d.b + h * d.h + w * d.w,
              x_ptr + n * s.b + h * s.h + w * s.w,
              C,
              a_ptr + stat,
              b_ptr + stat,
              mean_ptr + stat);
        }
      });
    } else {
      at::parallel_for(0, B * C, std::max<int64_t>(1, kGrain / (H * W)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / C, c = i % C, stat = per_image ? i : c;
          for (int64_t h = 0; h < H; ++h)
            row_backward<scalar_t, acc_t>(
                dx_ptr + n * d.b + c * d.c + h * d.h,
                d.w,
                x_ptr + n * s.b + c * s.c + h * s.h,
                s.w,
                W,
                a_ptr[stat],
                b_ptr[stat],
                mean_ptr[stat]);
        }
      });
    }
  });
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("moments_fwd", &moments_fwd_cpu);
  m.impl("moments_bwd", &moments_bwd_cpu);
}

}  // namespace fastkd
