// What the operators of moments share on CPUs and GPUs.
#pragma once
#include "common.h"

#include <tuple>

namespace fastkd {

enum class Distance : int { kNorm, kMean, kImage };

inline Distance distance_of(c10::string_view name) {
  return name == "l2" ? Distance::kNorm : name == "mse" ? Distance::kMean : Distance::kImage;
}

// The groups of elements that have a moment each: channels, or every image's channels.
inline int64_t groups_of(const at::Tensor& x, bool per_image) {
  return per_image ? x.size(0) * x.size(1) : x.size(1);
}

// Uninitialised means and variances of all layers' groups, end to end.
inline std::tuple<at::Tensor, at::Tensor> empty_moments(const at::TensorList inputs, bool per_image) {
  int64_t groups = 0;
  for (const auto& x : inputs) groups += groups_of(x, per_image);
  const auto mean = at::empty({groups}, inputs[0].options().dtype(accumulator(inputs[0])));
  return {mean, at::empty_like(mean)};
}

}  // namespace fastkd
