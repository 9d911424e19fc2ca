// Helpers shared by all C++ operators: accumulation types, folding of layouts.
#pragma once

// Not ATen/ATen.h, which declares every operator and takes seconds to read in each file.
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/promote_types.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <array>
#include <optional>

namespace fastkd {

// float64 keeps itself, everything else sums in float32.
template <typename scalar_t>
using acc_type = at::opmath_type<scalar_t>;

template <typename... Tensors>
at::ScalarType accumulator(const at::Tensor& x, const Tensors&... others) {
  auto acc = at::promote_types(x.scalar_type(), at::kFloat);
  ((acc = at::promote_types(acc, others.scalar_type())), ...);
  return acc;
}

// float16 gradients wait in float32, since GradScaler's scale must precede the rounding.
inline at::ScalarType stored_gradient(const at::Tensor& x) {
  return x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type();
}

// A 0-dimensional tensor. at::full refuses numbers beyond its dtype, which are infinities here.
inline at::Tensor scalar_of(double x, const at::TensorOptions& options) {
  return at::full({}, x, options.dtype(at::kDouble)).to(options.dtype());
}

// Strides of a (B, C, ...) tensor whose positions are folded to (H, W).
struct PlaneStrides {
  int64_t b, c, h, w;
};

// A (B, C, ...) tensor, or two of one shape, seen as (B, C, H, W).
template <size_t n>
struct Planes {
  int64_t B, C, H, W;
  std::array<PlaneStrides, n> strides;
};

// Merges positions that are adjacent in memory in every tensor; nullopt if more than two dimensions are left.
template <size_t n>
std::optional<Planes<n>> fold_planes(const std::array<at::Tensor, n>& xs) {
  const auto sizes = xs[0].sizes();
  Planes<n> p{sizes[0], sizes[1], 1, 1, {}};
  for (size_t i = 0; i < n; ++i) p.strides[i] = {xs[i].stride(0), xs[i].stride(1), 0, 1};
  int left = 0;  // folded dimensions so far
  for (int64_t d = xs[0].dim() - 1; d >= 2; --d) {
    if (sizes[d] == 1) continue;
    const int64_t inner = left == 2 ? p.H : p.W;
    bool adjacent = left > 0;
    for (size_t i = 0; i < n && adjacent; ++i)
      adjacent = xs[i].stride(d) == inner * (left == 2 ? p.strides[i].h : p.strides[i].w);
    if (!adjacent && ++left > 2) return std::nullopt;
    (left == 2 ? p.H : p.W) *= sizes[d];
    if (adjacent) continue;
    for (size_t i = 0; i < n; ++i) (left == 2 ? p.strides[i].h : p.strides[i].w) = xs[i].stride(d);
  }
  return p;
}

}  // namespace fastkd
