// Gradients of the operators that run once a layer: in Python they would take longer than the kernels of a small one.
//
// Calling fastkd::moments_fwd or fastkd::batch_norm_fwd on tensors that require a gradient records these nodes, of
// whatever device. PyTorch's stable interface has no autograd, so this is a library of its own, which serves the torch
// it was built with. Where it is missing fastkd/ops/moments.py has the same in Python.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <ATen/ops/promote_types.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>

namespace fastkd {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

template <typename Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Call first in backward: grad mode is on there only under create_graph=True.
void refuse_double_backward(const char* function) {
  TORCH_CHECK(
      !at::GradMode::is_enabled(),
      function,
      " cannot be differentiated twice: its gradient is a constant here. Use fastkd.reference.",
      function,
      " for gradient penalties");
}

// PyTorch has no loop over batched gradients (is_grads_batched=True) for an operator that returns a list.
void refuse_batched(const char* function, const variable_list& grads) {
  for (const auto& x : grads)
    TORCH_CHECK(
        !x.defined() || !x.key_set().has(at::DispatchKey::Batched),
        function,
        " takes no batched gradients (is_grads_batched=True, vectorize=True): call torch.autograd.grad once for each, "
        "or use fastkd.reference.",
        function);
}

bool wants_grad(const Tensor& x) {
  return x.requires_grad() && at::GradMode::is_enabled();
}

bool wants_grad(const std::optional<Tensor>& x) {
  return x && wants_grad(*x);
}

// What autograd may save: a copy of a tensor that was made under torch.inference_mode().
Tensor savable(const Tensor& x) {
  return x.is_inference() ? x.clone() : x;
}

using Moments = std::tuple<Tensor, Tensor>;

Moments moments_fwd(at::TensorList inputs, bool per_image) {
  static const auto fwd = op<Moments(at::TensorList, bool)>("fastkd::moments_fwd");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return fwd.call(inputs, per_image);
}

struct MomentsNode : Function<MomentsNode> {
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs, bool per_image) {
    auto [mean, var] = moments_fwd(inputs, per_image);
    variable_list saved;
    for (const auto& x : inputs) saved.push_back(savable(x));
    saved.push_back(mean);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["per_image"] = per_image;
    return {mean, var};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {  // of mean and var
    refuse_double_backward("batch_moments");
    refuse_batched("batch_moments", grads);
    static const auto bwd =
        op<variable_list(const Tensor&, const Tensor&, at::TensorList, const Tensor&, bool)>("fastkd::moments_bwd");
    auto inputs = ctx->get_saved_variables();
    const Tensor mean = std::move(inputs.back());
    inputs.pop_back();
    const at::AutoDispatchBelowADInplaceOrView guard;  // else PyTorch boxes the call, to look for what it should record
    auto dinputs = bwd.call(grads[0], grads[1], inputs, mean, ctx->saved_data["per_image"].toBool());
    dinputs.emplace_back();  // per_image has none
    return dinputs;
  }
};

Moments moments_autograd(at::TensorList inputs, bool per_image) {
  if (std::none_of(inputs.begin(), inputs.end(), [](const Tensor& x) { return wants_grad(x); }))
    return moments_fwd(inputs, per_image);
  const auto outputs = MomentsNode::apply(inputs, per_image);
  return {outputs[0], outputs[1]};
}

using Normalised = std::tuple<Tensor, Tensor, Tensor>;  // y, mean, var

Normalised batch_norm_fwd(
    const Tensor& x,
    const Tensor& running_mean,
    const Tensor& running_var,
    const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias,
    double eps) {
  static const auto fwd = op<Normalised(
      const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&, double)>(
      "fastkd::batch_norm_fwd");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return fwd.call(x, running_mean, running_var, weight, bias, eps);
}

struct BatchNormNode : Function<BatchNormNode> {
  static variable_list forward(
      AutogradContext* ctx,
      const Tensor& x,
      const Tensor& running_mean,
      const Tensor& running_var,
      const std::optional<Tensor>& weight,
      const std::optional<Tensor>& bias,
      double eps) {
    auto [y, mean, var] = batch_norm_fwd(x, running_mean, running_var, weight, bias, eps);
    const auto saved_weight = weight ? savable(*weight) : Tensor();
    ctx->save_for_backward({savable(x), mean, savable(running_mean), savable(running_var), saved_weight});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["has_bias"] = bias.has_value();
    return {y, mean, var};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {  // of y, mean and var
    refuse_double_backward("batch_norm_moments");
    static const auto bwd = op<Tensor(
        const Tensor&,
        const Tensor&,
        const Tensor&,
        const Tensor&,
        const Tensor&,
        const Tensor&,
        const std::optional<Tensor>&,
        double)>("fastkd::batch_norm_bwd");
    const auto saved = ctx->get_saved_variables();
    const Tensor &dy = grads[0], &x = saved[0], &mean = saved[1], &running_mean = saved[2], &running_var = saved[3];
    const auto weight = saved[4].defined() ? std::optional(saved[4]) : std::nullopt;
    const double eps = ctx->saved_data["eps"].toDouble();
    // Edges are those of the tensors that were given: x, running_mean, running_var, then weight and bias.
    const bool with_dweight = weight && ctx->needs_input_grad(3);
    const bool with_dbias = ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(weight ? 4 : 3);
    Tensor dx, dweight, dbias;
    if (ctx->needs_input_grad(0)) {
      const at::AutoDispatchBelowADInplaceOrView guard;
      dx = bwd.call(dy, grads[1], grads[2], x, mean, running_var, weight, eps);
    }
    if (with_dweight || with_dbias) {
      // Gradients of weight and bias are rarely wanted, so PyTorch sums them in separate passes.
      // Contiguous, because PyTorch sums some planes of one row or column wrongly if dy and x differ in layout, and
      // reads past the end of expanded statistics of a (B, C).
      const auto acc = at::promote_types(x.scalar_type(), at::kFloat);
      const auto wide_weight = weight ? std::optional(weight->to(acc).contiguous()) : std::nullopt;
      std::tie(std::ignore, dweight, dbias) = at::native_batch_norm_backward(
          dy.to(acc).contiguous(),
          x.to(acc).contiguous(),
          wide_weight,
          running_mean.to(acc).contiguous(),
          running_var.to(acc).contiguous(),
          {},
          {},
          /*train=*/false,
          eps,
          {false, with_dweight, with_dbias});
    }
    return {dx, {}, {}, dweight, dbias, {}};  // autograd casts them to the dtypes of weight and bias
  }
};

Normalised batch_norm_autograd(
    const Tensor& x,
    const Tensor& running_mean,
    const Tensor& running_var,
    const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias,
    double eps) {
  if (!wants_grad(x) && !wants_grad(weight) && !wants_grad(bias))
    return batch_norm_fwd(x, running_mean, running_var, weight, bias, eps);
  const auto outputs = BatchNormNode::apply(x, running_mean, running_var, weight, bias, eps);
  return {outputs[0], outputs[1], outputs[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastkd, Autograd, m) {
  m.impl("moments_fwd", &moments_autograd);
  m.impl("batch_norm_fwd", &batch_norm_autograd);
}

}  // namespace fastkd
