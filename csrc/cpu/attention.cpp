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

// An uninitialised gradient of x, or nothing.
at::Tensor gradient_of(const at::Tensor& x, bool wanted) {
  return at::empty(wanted ? x.sizes() : at::IntArrayRef{0}, x.options().dtype(stored_gradient(x)));
}

using OptionalTensor = std::optional<at::Tensor>;

at::ScalarType accumulator_of(const Problem& p) {
  auto acc = accumulator(p.s.q, p.s.k, p.t.q, p.t.k);
  for (const Network* x : {&p.s, &p.t})
    if (x->bias) acc = at::promote_types(acc, x->bias->scalar_type());
  return acc;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_fwd_cpu(
    const at::Tensor& q_student,         // (B, H, N_q, d)
    const OptionalTensor& k_student,     // (B, H, N_k, d)
    const at::Tensor& q_teacher,         // (B, H', N_q, d')
    const at::Tensor& k_teacher,         // (B, H', N_k, d')
    const OptionalTensor& bias_student,  // (B | 1, H | 1, N_q | 1, N_k | 1)
    const OptionalTensor& bias_teacher,  // (B | 1, H' | 1, N_q | 1, N_k | 1)
    const OptionalTensor& key_mask,      // (B, N_k)
    const OptionalTensor& row_weight,    // (B, 1 | H, N_q)
    std::string reduction,
    std::string algorithm,
    std::string divergence,
    std::string heads,
    at::ArrayRef<double> scales,  // of student, teacher and bias
    bool is_causal,
    at::IntArrayRef rows,          // start, step
    std::array<bool, 3> wanted) {  // dq, dk, dbias
  Problem p{};
  p.s = {q_student, k_student ? *k_student : q_student, bias_student, scales[0]};
  p.t = {q_teacher, k_teacher, bias_teacher, scales[1]};
  p.divergence = divergence_of(divergence);
  p.mean_heads = heads == "mean";
  p.causal = is_causal;
  p.shared = !k_student;
  p.row_start = rows[0];
  p.row_step = rows[1];
  p.bias_scale = scales[2];
  if (key_mask) p.key_mask = key_mask->contiguous();
  const auto acc = accumulator_of(p);
  const auto options = q_student.options().dtype(acc);
  auto dq = gradient_of(p.s.q, wanted[0]), dk = gradient_of(p.s.k, wanted[1]);
  if (wanted[0]) p.dq = dq;
  if (wanted[1]) p.dk = dk;
  if (wanted[2] && p.s.bias) p.dbias = at::zeros(p.s.bias->sizes(), p.s.bias->options().dtype(acc));
  const bool is_mean = reduction == "mean";
  p.factor = is_mean ? 1.0 / static_cast<double>(p.B() * p.H_out()) : 1.0;
  if (row_weight) {
    p.weight = row_weight->to(acc).contiguous().unsqueeze(-1);
  } else {
    p.weight = at::full({1, 1, 1, 1}, is_mean ? 1.0 / static_cast<double>(p.N_q()) : 1.0, options);
  }
  if (reduction == "none") p.rows = at::empty({p.B(), p.H_out(), p.N_q()}, options);
  const double sum = run(p, algorithm, acc);
  auto dbias = p.dbias.defined() ? p.dbias.to(stored_gradient(*bias_student))
                                 : at::empty({0}, options.dtype(bias_student ? stored_gradient(*bias_student) : acc));
  return {p.rows.defined() ? p.rows : scalar_of(sum, options), dq, dk, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("attention_fwd", &attention_fwd_cpu);
}

}  // namespace fastkd
