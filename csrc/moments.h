// What the operators of moments share on CPUs and GPUs.
#pragma once
#include "common.h"

#include <cmath>
#include <tuple>

namespace fastkd {

enum class Distance : int { kNorm, kMean, kImage };

inline Distance distance_of(const std::string& name) {
  return name == "l2" ? Distance::kNorm : name == "mse" ? Distance::kMean : Distance::kImage;
}

// The groups of elements that have a moment each: channels, or every image's channels.
inline int64_t groups_of(const Tensor& x, bool per_image) {
  return per_image ? x.size(0) * x.size(1) : x.size(1);
}

// Means and variances of all layers' groups, end to end: uninitialised, or NaN where a layer has no elements.
inline std::tuple<Tensor, Tensor> empty_moments(const std::vector<Tensor>& inputs, bool per_image) {
  int64_t groups = 0;
  for (const auto& x : inputs) groups += groups_of(x, per_image);
  const auto mean = empty(inputs[0], {groups}, accumulator(inputs[0]));
  const auto var = empty_like(mean);
  int64_t first = 0;
  for (const auto& x : inputs) {
    const int64_t n = groups_of(x, per_image);
    if (x.numel() == 0 && n > 0)
      for (const auto& moment : {mean, var}) {
        auto all = moment.handle();
        torch::stable::fill_(torch::stable::narrow(all, 0, first, n), NAN);
      }
    first += n;
  }
  return {mean, var};
}

}  // namespace fastkd
