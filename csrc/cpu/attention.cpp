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

namespace fastkd {
namespace {

bool fits_bf16(const Problem& problem) {
  for (const Network* x : {&problem.s, &problem.t})
    if (x->q.scalar_type() != ScalarType::BFloat16 || x->k.scalar_type() != ScalarType::BFloat16) return false;
  if (problem.mean_heads) return false;
  const Bf16 has = bf16_products();
  return has == Bf16::kTiles || (has == Bf16::kPairs && problem.N_k() >= kPairKeys);
}

double run(const Problem& problem, const std::string& algorithm, ScalarType acc) {
  if (algorithm == "gram") return gram(problem);
  if (acc == ScalarType::Double) return sweep<Products<double>>(problem);
  return fits_bf16(problem) ? sweep<ProductsBf16>(problem) : sweep<Products<float>>(problem);
}

// An uninitialised gradient of x, or nothing.
Tensor gradient_of(const Tensor& x, bool wanted) {
  return empty(x, wanted ? x.sizes() : Sizes{0}, stored_gradient(x));
}

using OptionalTensor = std::optional<Tensor>;

ScalarType accumulator_of(const Problem& p) {
  auto acc = accumulator(p.s.q, p.s.k, p.t.q, p.t.k);
  for (const Network* x : {&p.s, &p.t})
    if (x->bias && x->bias->scalar_type() == ScalarType::Double) acc = ScalarType::Double;
  return acc;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_fwd_cpu(
    const Tensor& q_student,             // (B, H, N_q, d)
    const OptionalTensor& k_student,     // (B, H, N_k, d)
    const Tensor& q_teacher,             // (B, H', N_q, d')
    const Tensor& k_teacher,             // (B, H', N_k, d')
    const OptionalTensor& bias_student,  // (B | 1, H | 1, N_q | 1, N_k | 1)
    const OptionalTensor& bias_teacher,  // (B | 1, H' | 1, N_q | 1, N_k | 1)
    const OptionalTensor& key_mask,      // (B, N_k)
    const OptionalTensor& row_weight,    // (B, 1 | H, N_q)
    std::string reduction,
    std::string algorithm,
    std::string divergence,
    std::string heads,
    const std::vector<double>& scales,  // of student, teacher and bias
    bool is_causal,
    const std::vector<int64_t>& rows,   // start, step
    const std::vector<bool>& wanted) {  // dq, dk, dbias
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
  auto dq = gradient_of(p.s.q, wanted[0]), dk = gradient_of(p.s.k, wanted[1]);
  if (wanted[0]) p.dq = dq;
  if (wanted[1]) p.dk = dk;
  if (wanted[2] && p.s.bias) p.dbias = empty(*p.s.bias, p.s.bias->sizes(), acc).zero_();
  const bool is_mean = reduction == "mean";
  p.factor = is_mean ? 1.0 / static_cast<double>(p.B() * p.H_out()) : 1.0;
  if (row_weight) {
    p.weight = row_weight->to(acc).contiguous();
  } else {
    p.weight = full(q_student, {1, 1, 1}, is_mean ? 1.0 / static_cast<double>(p.N_q()) : 1.0, acc);
  }
  if (reduction == "none") p.rows = empty(q_student, {p.B(), p.H_out(), p.N_q()}, acc);
  const double sum = run(p, algorithm, acc);
  auto dbias = p.dbias.defined() ? p.dbias.to(stored_gradient(*bias_student))
                                 : empty(q_student, {0}, bias_student ? stored_gradient(*bias_student) : acc);
  return {p.rows.defined() ? p.rows : full(q_student, {}, sum, acc), dq, dk, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  implement<attention_fwd_cpu>(m, "attention_fwd");
}

}  // namespace fastkd
