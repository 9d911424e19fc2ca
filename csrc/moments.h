// What the operators of moments share on CPUs and GPUs.
#pragma once
#include "common.h"

#include <cmath>
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

// Means and variances of all layers' groups, end to end: uninitialised, or NaN where a layer has no elements.
inline std::tuple<at::Tensor, at::Tensor> empty_moments(const at::TensorList inputs, bool per_image) {
  int64_t groups = 0;
  for (const auto& x : inputs) groups += groups_of(x, per_image);
  const auto mean = at::empty({groups}, inputs[0].options().dtype(accumulator(inputs[0])));
  const auto var = at::empty_like(mean);
  int64_t first = 0;
  for (const auto& x : inputs) {
    const int64_t n = groups_of(x, per_image);
    if (x.numel() == 0 && n > 0)
      for (const auto& moment : {mean, var}) moment.narrow(0, first, n).fill_(NAN);
    first += n;
  }
  return {mean, var};
}

}  // namespace fastkd
