// Attention losses: divergences of softmax(q kᵀ) maps and their gradients, in one sweep over strips of query rows.
//
// A strip of both maps stays in L2 from its scores to its gradient: Z = Q Kᵀ of both networks, row losses, dZ in the
// place of Z_s, then dQ = dZ K and dK += dZᵀ Q. Keys that the key mask hides are left out when an image's are gathered,
// and causality is a number of keys per row: only a bias can put -inf into a row.
#include "cpu/attention_rows.h"
#include "cpu/attention_means.h"
#include "cpu/attention_products.h"
#include "cpu/attention_sweep.h"
#include "cpu/attention_gram.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

namespace fastkd {
namespace {

bool fits_bf16(const Problem& problem) {
  for (const Network* x : {&problem.s, &problem.t})
    if (x->q.scalar_type() != at::kBFloat16 || x->k.scalar_type() != at::kBFloat16) return false;
  return !problem.mean_heads && has_bf16_products();
}

double run(const Problem& problem, const std::string& algorithm, at::ScalarType acc) {
  if (algorithm == "gram") return gram(problem);
  if (acc == at::kDouble) return sweep<Products<double>>(problem);
  return fits_bf16(problem) ? sweep<ProductsBf16>(problem) : sweep<Products<float>>(problem);
}

at::ScalarType stored(const at::Tensor& x) {
  return x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type();
}

// An uninitialised gradient of x, or nothing.
at::Tensor gradient_of(const at::Tensor& x, bool wanted, at::ScalarType dtype) {
  return at::empty(wanted ? x.sizes() : at::IntArrayRef{0}, x.options().dtype(dtype));
}

using OptionalTensor = std::optional<at::Tensor>;

Problem problem_of(
    const at::Tensor& q_student,
    const OptionalTensor& k_student,
    const at::Tensor& q_teacher,
    const at::Tensor& k_teacher,
    const OptionalTensor& bias_student,
    const OptionalTensor& bias_teacher,
    const OptionalTensor& key_mask,
    const std::string& divergence,
    const std::string& heads,
    double scale_student,
    double scale_teacher,
    double bias_scale,
    bool is_causal,
    int64_t row_start,
    int64_t row_step) {
  Problem p{};
  p.s = {q_student, k_student ? *k_student : q_student, bias_student, scale_student};
  p.t = {q_teacher, k_teacher, bias_teacher, scale_teacher};
  p.divergence = divergence_of(divergence);
  p.mean_heads = heads == "mean";
  p.causal = is_causal;
  p.shared = !k_student;
  p.row_start = row_start;
  p.row_step = row_step;
  p.bias_scale = bias_scale;
  if (key_mask) p.key_mask = key_mask->contiguous();
  return p;
}

at::ScalarType accumulator_of(const Problem& p) {
  auto acc = at::kFloat;
  for (const Network* x : {&p.s, &p.t}) {
    acc = at::promote_types(at::promote_types(acc, x->q.scalar_type()), x->k.scalar_type());
    if (x->bias) acc = at::promote_types(acc, x->bias->scalar_type());
  }
  return acc;
}

// Allocates the gradients that are wanted.
void set_gradients(Problem& p, const at::Tensor& dq, const at::Tensor& dk, bool with_dbias, at::ScalarType acc) {
  if (dq.dim() == 4) p.dq = dq;
  if (dk.dim() == 4) p.dk = dk;
  if (with_dbias && p.s.bias) p.dbias = at::zeros(p.s.bias->sizes(), p.s.bias->options().dtype(acc));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_fwd_cpu(
    const at::Tensor& q_student,         // (B, H, N_q, d)
    const OptionalTensor& k_student,     // (B, H, N_k, d)
    const at::Tensor& q_teacher,         // (B, H', N_q, d')
    const at::Tensor& k_teacher,         // (B, H', N_k, d')
    const OptionalTensor& bias_student,  // (B | 1, H | 1, N_q | 1, N_k | 1)
    const OptionalTensor& bias_teacher,  // (B | 1, H' | 1, N_q | 1, N_k | 1)
    const OptionalTensor& key_mask,      // (B, N_k)
    const OptionalTensor& row_weight,    // (B, N_q)
    std::string reduction,
    std::string algorithm,
    std::string divergence,
    std::string heads,
    double scale_student,
    double scale_teacher,
    double bias_scale,
    bool is_causal,
    int64_t row_start,
    int64_t row_step,
    bool with_dq,
    bool with_dk,
    bool with_dbias) {
  auto p = problem_of(
      q_student,
      k_student,
      q_teacher,
      k_teacher,
      bias_student,
      bias_teacher,
      key_mask,
      divergence,
      heads,
      scale_student,
      scale_teacher,
      bias_scale,
      is_causal,
      row_start,
      row_step);
  const auto acc = accumulator_of(p);
  const auto options = q_student.options().dtype(acc);
  auto dq = gradient_of(p.s.q, with_dq, stored(p.s.q)), dk = gradient_of(p.s.k, with_dk, stored(p.s.k));
  set_gradients(p, dq, dk, with_dbias, acc);
  const bool is_mean = reduction == "mean";
  p.factor = is_mean ? 1.0 / static_cast<double>(p.B() * p.H_out()) : 1.0;
  if (row_weight) {
    p.weight = row_weight->to(acc).contiguous().view({p.B(), 1, p.N_q(), 1});
  } else {
    p.weight = at::full({1, 1, 1, 1}, is_mean ? 1.0 / static_cast<double>(p.N_q()) : 1.0, options);
  }
  if (reduction == "none") p.rows = at::empty({p.B(), p.H_out(), p.N_q()}, options);
  const double sum = run(p, algorithm, acc);
  auto dbias = p.dbias.defined() ? p.dbias.to(stored(*bias_student))
                                 : at::empty({0}, options.dtype(bias_student ? stored(*bias_student) : acc));
  return {p.rows.defined() ? p.rows : scalar_of(sum, options), dq, dk, dbias};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_bwd_cpu(
    const at::Tensor& drows,             // (B, H | 1, N_q)
    const at::Tensor& q_student,         // (B, H, N_q, d)
    const OptionalTensor& k_student,     // (B, H, N_k, d)
    const at::Tensor& q_teacher,         // (B, H', N_q, d')
    const at::Tensor& k_teacher,         // (B, H', N_k, d')
    const OptionalTensor& bias_student,  // (B | 1, H | 1, N_q | 1, N_k | 1)
    const OptionalTensor& bias_teacher,  // (B | 1, H' | 1, N_q | 1, N_k | 1)
    const OptionalTensor& key_mask,      // (B, N_k)
    std::string divergence,
    std::string heads,
    double scale_student,
    double scale_teacher,
    double bias_scale,
    bool is_causal,
    int64_t row_start,
    int64_t row_step,
    bool with_dq,
    bool with_dk,
    bool with_dbias) {
  auto p = problem_of(
      q_student,
      k_student,
      q_teacher,
      k_teacher,
      bias_student,
      bias_teacher,
      key_mask,
      divergence,
      heads,
      scale_student,
      scale_teacher,
      bias_scale,
      is_causal,
      row_start,
      row_step);
  const auto acc = accumulator_of(p);
  auto dq = gradient_of(p.s.q, with_dq, p.s.q.scalar_type()), dk = gradient_of(p.s.k, with_dk, p.s.k.scalar_type());
  set_gradients(p, dq, dk, with_dbias, acc);
  p.factor = 1;
  p.weight = drows.to(acc).contiguous().unsqueeze(-1);
  run(p, "tile", acc);
  const auto dtype = bias_student ? bias_student->scalar_type() : acc;
  auto dbias = p.dbias.defined() ? p.dbias.to(dtype) : at::empty({0}, q_student.options().dtype(dtype));
  return {dq, dk, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("attention_fwd", &attention_fwd_cpu);
  m.impl("attention_bwd", &attention_bwd_cpu);
}

}  // namespace fastkd
