// Distances of all layers' moments to running statistics, with their gradients.
#pragma once
#include "cpu/moments_backward.h"

namespace fastkd {
namespace {

// Σ weight (‖V - var‖ + ‖M - mean‖) and its like, with gradients; moments of all layers end to end.
std::tuple<Tensor, Tensor, Tensor> bn_distance_cpu(
    const Tensor& mean_in,                 // (Σ rows_l C_l)
    const Tensor& var_in,                  // as mean
    const Tensor& running_mean,            // (Σ C_l)
    const Tensor& running_var,             // as running_mean
    const std::vector<int64_t>& channels,  // C_l
    const std::vector<int64_t>& rows,      // 1, or images of "image"
    const std::vector<int64_t>& counts,    // elements of a moment
    const std::vector<double>& weights,
    const std::string& name) {
  const auto mean = mean_in.contiguous(), var = var_in.contiguous();
  const auto dtype = mean.scalar_type();
  const auto target_mean = running_mean.to(dtype).contiguous(), target_var = running_var.to(dtype).contiguous();
  auto loss = empty(mean, {}), dmean = empty_like(mean), dvar = empty_like(mean);
  const auto distance = distance_of(name);
  FASTKD_DISPATCH_ACC(dtype, "bn_distance_cpu", [&] {
    const auto *m = mean.const_data_ptr<scalar_t>(), *v = var.const_data_ptr<scalar_t>();
    const auto *M = target_mean.const_data_ptr<scalar_t>(), *V = target_var.const_data_ptr<scalar_t>();
    auto *dm = dmean.mutable_data_ptr<scalar_t>(), *dv = dvar.mutable_data_ptr<scalar_t>();
    double total = 0;
    for (size_t l = 0; l < channels.size(); ++l) {
      const int64_t C = channels[l], n = rows[l] * C;
      double of_mean = 0, of_var = 0;
      if (distance == Distance::kImage) {
        const double count = static_cast<double>(counts[l]), unbias = count / (count - 1);
        for (int64_t i = 0; i < n; ++i) {
          const double sigma = std::sqrt(v[i] * unbias + 1e-6), e = sigma - std::sqrt(V[i % C] + 1e-6);
          const double d = static_cast<double>(m[i]) - M[i % C], w = weights[l] / static_cast<double>(rows[l]);
          of_mean += d * d;
          of_var += e * e;
          dm[i] = static_cast<scalar_t>(2 * w * d);
          dv[i] = static_cast<scalar_t>(w * unbias * e / sigma);
        }
        total += weights[l] / static_cast<double>(rows[l]) * (of_mean + of_var);
      } else {
        for (int64_t i = 0; i < n; ++i) {
          const double d = static_cast<double>(m[i]) - M[i], e = static_cast<double>(v[i]) - V[i];
          of_mean += d * d;
          of_var += e * e;
        }
        double w_mean = 2 * weights[l] / static_cast<double>(channels.size() * C), w_var = w_mean;
        if (distance == Distance::kNorm) {
          const double norm_mean = std::sqrt(of_mean), norm_var = std::sqrt(of_var);
          total += weights[l] * (norm_mean + norm_var);
          w_mean = norm_mean == 0 ? 0 : weights[l] / norm_mean;
          w_var = norm_var == 0 ? 0 : weights[l] / norm_var;
        } else {
          total += w_mean / 2 * (of_mean + of_var);
        }
        for (int64_t i = 0; i < n; ++i) {
          dm[i] = static_cast<scalar_t>(w_mean * (static_cast<double>(m[i]) - M[i]));
          dv[i] = static_cast<scalar_t>(w_var * (static_cast<double>(v[i]) - V[i]));
        }
      }
      m += n, v += n, dm += n, dv += n, M += C, V += C;
    }
    *loss.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(total);
  });
  return {loss, dmean, dvar};
}

}  // namespace
}  // namespace fastkd
