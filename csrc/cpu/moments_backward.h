// Gradients of moments, alone or with those of the batch norm that collected them.
#pragma once
#include "cpu/moments_blocks.h"
#include "cpu/moments_planes.h"

namespace fastkd {
namespace {

// dx = a + b (x - mean) + alpha dy, and what it is made of; dy may be null.
template <typename scalar_t, typename acc_t>
struct Backward {
  int64_t C, H, W;
  bool per_image;
  scalar_t* dx;
  PlaneStrides d;
  const scalar_t* x;
  PlaneStrides s;
  const scalar_t* dy;
  PlaneStrides g;
  const acc_t *a, *b, *mean;  // (C), or (B, C) per image
  const acc_t* alpha;         // (C)
};

// f(wide x, wide dy, first) in place of x over pieces of n adjacent elements of float16, then rounded to dx.
template <typename scalar_t, typename acc_t, typename F>
FASTKD_INLINE void in_pieces(scalar_t* dx, const scalar_t* x, const scalar_t* dy, int64_t n, const F& f) {
  constexpr int64_t kPiece = 1024;
  acc_t wide[kPiece], wide_dy[kPiece];
  for (int64_t first = 0; first < n; first += kPiece) {
    const int64_t m = std::min(kPiece, n - first);
    convert_row<scalar_t, acc_t>(x + first, 1, m, 1, wide);
    if (dy != nullptr) convert_row<scalar_t, acc_t>(dy + first, 1, m, 1, wide_dy);
    f(wide, wide_dy, first, m);
    round_row<acc_t, scalar_t>(wide, m, 1, dx + first);
  }
}

// Channels [begin, end) of image n.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void row_backward(const Backward<scalar_t, acc_t> k, int64_t n, int64_t begin, int64_t end) {
  const bool has_dy = k.dy != nullptr;
  const bool is_adjacent = k.d.w == 1 && k.s.w == 1 && (!has_dy || k.g.w == 1);
  for (int64_t c = begin; c < end; ++c) {
    const int64_t stat = k.per_image ? n * k.C + c : c;
    const acc_t a = k.a[stat], b = k.b[stat], mean = k.mean[stat], alpha = has_dy ? k.alpha[c] : acc_t(0);
    for (int64_t h = 0; h < k.H; ++h) {
      scalar_t* dx = k.dx + n * k.d.b + c * k.d.c + h * k.d.h;
      const scalar_t* x = k.x + n * k.s.b + c * k.s.c + h * k.s.h;
      const scalar_t* dy = has_dy ? k.dy + n * k.g.b + c * k.g.c + h * k.g.h : nullptr;
      if constexpr (kIsHalf<scalar_t, acc_t>) {
        if (is_adjacent) {
          in_pieces<scalar_t, acc_t>(dx, x, dy, k.W, [&](acc_t* v, const acc_t* g, int64_t, int64_t m) {
            for (int64_t i = 0; i < m; ++i) v[i] = a + b * (v[i] - mean);
            for (int64_t i = 0; i < m && has_dy; ++i) v[i] += alpha * g[i];
          });
          continue;
        }
      }
      for (int part = 0; part < 2; ++part) {
        const auto [from, to] = span_of(k.W, part);
        if (is_adjacent && has_dy) {
          for (int64_t w = from; w < to; ++w)
            dx[w] =
                static_cast<scalar_t>(a + b * (static_cast<acc_t>(x[w]) - mean) + alpha * static_cast<acc_t>(dy[w]));
        } else if (is_adjacent) {
          for (int64_t w = from; w < to; ++w) dx[w] = static_cast<scalar_t>(a + b * (static_cast<acc_t>(x[w]) - mean));
        } else {
          for (int64_t w = from; w < to; ++w) {
            acc_t d = a + b * (static_cast<acc_t>(x[w * k.s.w]) - mean);
            if (has_dy) d += alpha * static_cast<acc_t>(dy[w * k.g.w]);
            dx[w * k.d.w] = static_cast<scalar_t>(d);
          }
        }
      }
    }
  }
}

// n adjacent elements, each with its own coefficients.
template <typename scalar_t, typename acc_t>
FASTKD_INLINE void element_backward(
    scalar_t* dx,
    const scalar_t* x,
    const scalar_t* dy,
    const acc_t* a,
    const acc_t* b,
    const acc_t* mean,
    const acc_t* alpha,
    int64_t n) {
  if constexpr (kIsHalf<scalar_t, acc_t>) {
    in_pieces<scalar_t, acc_t>(dx, x, dy, n, [&](acc_t* v, const acc_t* g, int64_t first, int64_t m) {
      for (int64_t i = 0; i < m; ++i) v[i] = a[first + i] + b[first + i] * (v[i] - mean[first + i]);
      for (int64_t i = 0; i < m && dy != nullptr; ++i) v[i] += alpha[first + i] * g[i];
    });
    return;
  }
  for (int part = 0; part < 2; ++part) {
    const auto [from, to] = span_of(n, part);
    if (dy != nullptr) {
      for (int64_t i = from; i < to; ++i)
        dx[i] = static_cast<scalar_t>(
            a[i] + b[i] * (static_cast<acc_t>(x[i]) - mean[i]) + alpha[i] * static_cast<acc_t>(dy[i]));
    } else {
      for (int64_t i = from; i < to; ++i)
        dx[i] = static_cast<scalar_t>(a[i] + b[i] * (static_cast<acc_t>(x[i]) - mean[i]));
    }
  }
}

// Positions [begin, end) of all images, whose channels are adjacent.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void column_backward(const Backward<scalar_t, acc_t> k, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / (k.H * k.W), h = i / k.W % k.H, w = i % k.W, stat = k.per_image ? n * k.C : 0;
    element_backward<scalar_t, acc_t>(
        k.dx + n * k.d.b + h * k.d.h + w * k.d.w,
        k.x + n * k.s.b + h * k.s.h + w * k.s.w,
        k.dy == nullptr ? nullptr : k.dy + n * k.g.b + h * k.g.h + w * k.g.w,
        k.a + stat,
        k.b + stat,
        k.mean + stat,
        k.alpha,
        k.C);
  }
}

// Channels [begin, end) of B images, in planes of a few positions that follow each other: a run of planes at a time,
// since those of another image lie pages away.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void small_plane_backward(
    const Backward<scalar_t, acc_t> k,
    int64_t B,
    int64_t begin,
    int64_t end) {
  const int64_t each = std::max<int64_t>(1, std::min<int64_t>(kRun / k.W, end - begin));
  Buffer<acc_t> coefficients(4 * each * k.W);
  acc_t *a = coefficients.data(), *b = a + each * k.W, *mean = b + each * k.W, *alpha = mean + each * k.W;
  for (int64_t c = begin; c < end; c += each) {
    const int64_t n = std::min(each, end - c);
    for (int64_t i = 0, to = 0; i < n; ++i)
      for (int64_t w = 0; w < k.W; ++w, ++to) {
        a[to] = k.a[c + i];
        b[to] = k.b[c + i];
        mean[to] = k.mean[c + i];
        alpha[to] = k.dy == nullptr ? acc_t(0) : k.alpha[c + i];
      }
    for (int64_t image = 0; image < B; ++image)
      element_backward<scalar_t, acc_t>(
          k.dx + image * k.d.b + c * k.W,
          k.x + image * k.s.b + c * k.W,
          k.dy == nullptr ? nullptr : k.dy + image * k.g.b + c * k.W,
          a,
          b,
          mean,
          alpha,
          n * k.W);
  }
}

// Planes [begin, end) of those of all images, W > kLanes positions each, which follow each other.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void plane_backward(const Backward<scalar_t, acc_t> k, int64_t begin, int64_t end) {
  const auto each = [&](auto W) FASTKD_INLINE_LAMBDA {
    int64_t n = begin / k.C, c = begin % k.C;
    for (int64_t i = begin; i < end; ++i, ++c) {
      if (c == k.C) c = 0, ++n;
      const acc_t a = k.a[c], b = k.b[c], mean = k.mean[c];
      const scalar_t* x = k.x + n * k.s.b + c * W;
      scalar_t* dx = k.dx + n * k.d.b + c * W;
      if (k.dy == nullptr) {
#pragma omp simd
        for (int64_t w = 0; w < W; ++w) dx[w] = static_cast<scalar_t>(a + b * (static_cast<acc_t>(x[w]) - mean));
        continue;
      }
      const scalar_t* dy = k.dy + n * k.g.b + c * W;
      const acc_t alpha = k.alpha[c];
#pragma omp simd
      for (int64_t w = 0; w < W; ++w)
        dx[w] = static_cast<scalar_t>(a + b * (static_cast<acc_t>(x[w]) - mean) + alpha * static_cast<acc_t>(dy[w]));
    }
  };
  if (k.W == 49) return each(Width<49>());
  each(k.W);
}

template <typename acc_t>
FASTKD_MULTIVERSION void scale_row(const acc_t* var, const acc_t* weight, acc_t eps, int64_t C, acc_t* out) {
  for (int64_t c = 0; c < C; ++c) out[c] = 1 / std::sqrt(var[c] + eps);
  for (int64_t c = 0; c < C && weight != nullptr; ++c) out[c] *= weight[c];
}

// weight / sqrt(running_var + eps), for all channels.
template <typename acc_t>
std::vector<acc_t> scale_of(const std::optional<Tensor>& weight, const Tensor& running_var, double eps) {
  constexpr auto dtype = CppTypeToScalarType<acc_t>::value;
  const Tensor var = running_var.to(dtype).contiguous();
  const Tensor w = weight ? weight->to(dtype).contiguous() : Tensor();
  std::vector<acc_t> scale(var.numel());
  scale_row<acc_t>(
      var.const_data_ptr<acc_t>(),
      w.defined() ? w.const_data_ptr<acc_t>() : nullptr,
      static_cast<acc_t>(eps),
      var.numel(),
      scale.data());
  return scale;
}

// The batch norm's part of the gradient: dy times a scale that follows from the other arguments.
struct Normalised {
  Tensor dy;           // as x
  Tensor running_var;  // (C)
  std::optional<Tensor> weight;
  double eps;
};

// dx of one layer.
Tensor layer_backward(
    const Tensor& dmean,  // (Σ C) or (Σ B C), this layer's from `first` on
    const Tensor& dvar,   // as dmean
    const Tensor& x,      // (B, C, ...)
    const Tensor& mean,   // as dmean
    int64_t first,
    bool per_image,
    const Normalised& norm = {}) {
  auto dx = empty_kept(x);
  if (x.numel() == 0) return dx;
  const auto& dy = norm.dy;
  const bool has_dy = dy.defined();
  auto folded = fold_planes<3>({x, dx, has_dy ? dy : x});
  if (!folded) {
    auto dense = norm;
    if (has_dy) dense.dy = dy.contiguous();
    return dx.copy_(layer_backward(dmean, dvar, x.contiguous(), mean, first, per_image, dense));
  }
  const int64_t B = folded->B, C = folded->C, H = folded->H, W = folded->W, groups = groups_of(x, per_image);
  const auto s = folded->strides[0], d = folded->strides[1], g = folded->strides[2];
  FASTKD_DISPATCH(x.scalar_type(), "moments_bwd_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    const auto M = static_cast<acc_t>(per_image ? H * W : B * H * W);
    std::vector<acc_t> a(groups), b(groups);
    const auto *dm = dmean.const_data_ptr<acc_t>() + first, *dv = dvar.const_data_ptr<acc_t>() + first;
    for (int64_t i = 0; i < groups; ++i) {
      a[i] = dm[i] / M;
      b[i] = dv[i] * (2 / M);
    }
    const auto scale = has_dy ? scale_of<acc_t>(norm.weight, norm.running_var, norm.eps) : std::vector<acc_t>();
    const Backward<scalar_t, acc_t> k{
        C,
        H,
        W,
        per_image,
        dx.mutable_data_ptr<scalar_t>(),
        d,
        x.const_data_ptr<scalar_t>(),
        s,
        has_dy ? dy.const_data_ptr<scalar_t>() : nullptr,
        g,
        a.data(),
        b.data(),
        mean.const_data_ptr<acc_t>() + first,
        scale.data()};
    if (s.c == 1 && d.c == 1 && (!has_dy || g.c == 1) && C > 1)
      parallel_for(0, B * H * W, std::max<int64_t>(1, kGrain / C), [&](int64_t begin, int64_t end) {
        column_backward(k, begin, end);
      });
    else if (!per_image && H == 1 && is_small(W) && is_dense(s, W) && is_dense(d, W) && (!has_dy || is_dense(g, W))) {
      if (std::is_same_v<scalar_t, acc_t> && W > kLanes)
        return parallel_for(0, B * C, std::max<int64_t>(1, kGrain / W), [&](int64_t begin, int64_t end) {
          plane_backward(k, begin, end);
        });
      parallel_for(0, C, std::max<int64_t>(1, kGrain / (B * W)), [&](int64_t begin, int64_t end) {
        small_plane_backward(k, B, begin, end);
      });
    } else if (!per_image && B * H * W < 2 * kPart)  // as forward cuts it: what a core reads it still has in its cache
      parallel_for(0, C, std::max<int64_t>(1, kGrain / (B * H * W)), [&](int64_t begin, int64_t end) {
        for (int64_t n = 0; n < B; ++n) row_backward(k, n, begin, end);
      });
    else
      parallel_for(0, B * C, std::max<int64_t>(1, kGrain / (H * W)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin, m; i < end; i += m) {
          m = std::min(end, (i / C + 1) * C) - i;
          row_backward(k, i / C, i % C, i % C + m);
        }
      });
  });
  return dx;
}

}  // namespace
}  // namespace fastkd
