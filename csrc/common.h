// Helpers shared by all C++ operators: accumulation types, folding of layouts.
#pragma once

#include "tensor.h"

#include <torch/headeronly/core/Dispatch.h>

#include <array>
#include <optional>
#include <type_traits>

// Calls the lambda with scalar_t as the C++ type of a dtype: of an accumulator, or of any floating-point tensor.
#define FASTKD_DISPATCH_ACC(dtype, name, ...) \
  THO_DISPATCH_SWITCH(                        \
      dtype,                                  \
      name,                                   \
      THO_DISPATCH_CASE(ScalarType::Float, __VA_ARGS__) THO_DISPATCH_CASE(ScalarType::Double, __VA_ARGS__))
#define FASTKD_DISPATCH(dtype, name, ...)                                                                  \
  THO_DISPATCH_SWITCH(                                                                                     \
      dtype,                                                                                               \
      name,                                                                                                \
      THO_DISPATCH_CASE(ScalarType::Float, __VA_ARGS__) THO_DISPATCH_CASE(ScalarType::Double, __VA_ARGS__) \
          THO_DISPATCH_CASE(ScalarType::Half, __VA_ARGS__) THO_DISPATCH_CASE(ScalarType::BFloat16, __VA_ARGS__))

namespace fastkd {

// float64 keeps itself, everything else sums in float32.
template <typename scalar_t>
using acc_type = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename... Tensors>
ScalarType accumulator(const Tensors&... xs) {
  return ((xs.scalar_type() == ScalarType::Double) || ...) ? ScalarType::Double : ScalarType::Float;
}

// float16 gradients wait in float32, since GradScaler's scale must precede the rounding.
inline ScalarType stored_gradient(const Tensor& x) {
  return x.scalar_type() == ScalarType::Half ? ScalarType::Float : x.scalar_type();
}

// On a CPU. Numbers beyond the range of an accumulator are infinities.
inline Tensor full(const Tensor& like, Sizes sizes, double value, ScalarType acc) {
  const auto out = empty(like, sizes, acc);
  FASTKD_DISPATCH_ACC(
      acc, "full", [&] { std::fill_n(out.mutable_data_ptr<scalar_t>(), out.numel(), static_cast<scalar_t>(value)); });
  return out;
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
std::optional<Planes<n>> fold_planes(const std::array<Tensor, n>& xs) {
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
