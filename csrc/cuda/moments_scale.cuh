// Scale and shift of an eval-mode batch norm, which each block forms of its own channels.
#pragma once
#include "cuda/moments_layers.cuh"

namespace fastkd {
namespace {

// A (C) parameter of any dtype and stride.
struct Parameter {
  const void* data = nullptr;
  int64_t stride = 0;
  ScalarType dtype = ScalarType::Undefined;

  Parameter() = default;
  explicit Parameter(const Tensor& x) {
    if (x.defined()) data = x.const_data_ptr(), stride = x.stride(0), dtype = x.scalar_type();
  }

  template <typename acc_t>
  __device__ acc_t at(int64_t c) const {
    switch (dtype) {
      case ScalarType::Double:
        return static_cast<acc_t>(static_cast<const double*>(data)[c * stride]);
      case ScalarType::Half:
        return static_cast<acc_t>(static_cast<const Half*>(data)[c * stride]);
      case ScalarType::BFloat16:
        return static_cast<acc_t>(static_cast<const BFloat16*>(data)[c * stride]);
      default:
        return static_cast<acc_t>(static_cast<const float*>(data)[c * stride]);
    }
  }
};

// An eval-mode batch norm: y = scale x + shift.
struct Norm {
  Parameter running_mean;  // read for shift alone
  Parameter running_var;
  Parameter weight, bias;  // or null
  double eps = 0;

  // scale = weight / √(running_var + eps)
  template <typename acc_t>
  __device__ acc_t scale(int64_t c) const {
    const acc_t inverse = 1 / sqrt(running_var.at<acc_t>(c) + static_cast<acc_t>(eps));
    return weight.data == nullptr ? inverse : inverse * weight.at<acc_t>(c);
  }

  // shift = bias - running_mean scale
  template <typename acc_t>
  __device__ acc_t shift(int64_t c, acc_t scale) const {
    return (bias.data == nullptr ? acc_t(0) : bias.at<acc_t>(c)) - running_mean.at<acc_t>(c) * scale;
  }
};

Norm norm_of(
    const Tensor& running_mean,  // undefined where shift is not wanted
    const Tensor& running_var,
    const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias,
    double eps) {
  const auto read = [](const std::optional<Tensor>& x) { return Parameter(x.value_or(Tensor())); };
  return {Parameter(running_mean), Parameter(running_var), read(weight), read(bias), eps};
}

template <typename acc_t>
struct Affine {
  acc_t scale, shift;

  Affine() = default;
  __device__ Affine(const Norm& norm, int64_t c) : scale(norm.scale<acc_t>(c)), shift(norm.shift<acc_t>(c, scale)) {}
};

// dx = a + b (x - center) + alpha dy of a channel.
template <typename acc_t>
struct Coefficients {
  acc_t a, b, center, alpha;

  Coefficients() = default;
  __device__ Coefficients(
      const Layer& l,
      int64_t items,
      int64_t group,
      const acc_t* dmean,
      const acc_t* dvar,
      const acc_t* mean,
      const Norm& norm) {
    const auto M = static_cast<acc_t>(items);
    const int64_t at = l.first + group;
    a = dmean[at] / M, b = dvar[at] * (2 / M), center = mean[at];
    alpha = l.dy != nullptr ? norm.scale<acc_t>(group) : acc_t(0);
  }
};

}  // namespace
}  // namespace fastkd
