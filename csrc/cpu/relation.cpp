// Relation loss: 1/(G n²) Σ_g ||f(ŜŜᵀ) - f(T̂T̂ᵀ)||² and its gradient, in one sweep over strips of the maps.
//
// Rows stay as they lie in memory: with r, q the inverse norms, E_ij = r_i r_j <s_i, s_j> - q_i q_j <t_i, t_j>, and
// with W_ij = 4/(G n²) r_i E_ij r_j, U = W S, the gradient is dS_i = U_i - s_i r_i² <s_i, U_i>. W is symmetric: a strip
// of its upper triangle serves the rows it starts in (W S) and, transposed, the rows below (Wᵀ S). U adds up over
// terms. On AVX-512 the float32 maps are formed by kernels of our own: whole ones of few wide rows, others in blocks.
#include "cpu/relation_rows.h"
#include "cpu/relation_term.h"
#include "cpu/relation_strips.h"
#include "cpu/relation_panels.h"
#include "cpu/relation_maps.h"
#include "cpu/relation_gram.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIndexing.h>
#include <ATen/ops/floor_divide.h>
#include <ATen/ops/remainder.h>
#include <torch/library.h>

namespace fastkd {
namespace {

bool both_bf16(const at::Tensor& student, const at::Tensor& teacher) {
  return student.scalar_type() == at::kBFloat16 && teacher.scalar_type() == at::kBFloat16 && has_bf16_products();
}

template <typename acc_t>
double visit(const Term<acc_t>& term) {
  if constexpr (std::is_same_v<acc_t, float>) {
    const bool rows_in_place = term.s.in_place(at::kBFloat16) && term.t.in_place(at::kBFloat16);
    const bool fits = rows_in_place && term.s.D % 2 == 0 && term.t.D % 2 == 0;
    const bool fills = term.s.n >= kMatrixRows || !has_avx512();
    if (both_bf16(term.s.x, term.t.x) && fits && fills) return tile_bf16(term);
    if (has_avx512()) return tile_panels(term);
  }
  return tile(term);
}

// Contiguous, and empty where no gradient is wanted.
at::Tensor gradient_of(const at::Tensor& student, bool with_grad) {
  const auto options = student.options().dtype(stored_gradient(student));
  return empty_kept(with_grad ? student.sizes() : at::IntArrayRef{0}, options);
}

// dstudent itself where it is stored in acc_t, else null.
template <typename acc_t>
acc_t* sums_in(const at::Tensor& dstudent) {
  return dstudent.scalar_type() == c10::CppTypeToScalarType<acc_t>::value ? dstudent.data_ptr<acc_t>() : nullptr;
}

std::tuple<at::Tensor, at::Tensor> relation_fwd_cpu(
    const at::Tensor& student,  // (B, N, Ds)
    const at::Tensor& teacher,  // (B, N, Dt)
    std::string scope,
    bool normalize,
    std::string rectify,
    double eps,
    std::string algorithm,
    bool with_grad) {
  const auto acc = accumulator(student, teacher);
  auto dstudent = gradient_of(student, with_grad);
  if (student.numel() == 0 || teacher.numel() == 0)
    return {at::zeros({}, student.options().dtype(acc)), dstudent.zero_()};
  double loss = 0;
  AT_DISPATCH_FLOATING_TYPES(acc, "relation_fwd_cpu", [&] {
    using acc_t = scalar_t;
    Term<acc_t> term{Groups(student, scope), Groups(teacher, scope)};
    term.eps = eps;
    term.rectify = rectify == "none" ? Rectify::kNone : rectify == "both" ? Rectify::kBoth : Rectify::kTeacher;
    term.normalize = normalize;
    const double elements = static_cast<double>(term.s.G) * term.s.n * term.s.n;
    term.c = static_cast<acc_t>(4 / elements);
    if (with_grad) {
      term.dstudent = dstudent;
      term.u = sums_in<acc_t>(dstudent);
    }
    loss = (algorithm == "gram" ? gram(term) : visit(term)) / elements;
  });
  return {scalar_of(loss, student.options().dtype(acc)), dstudent};
}

// Rows `index` of the flattened batch, as one group.
at::Tensor take_rows(const at::Tensor& x, const at::Tensor& index) {
  const auto N = x.size(1);
  return x.index({at::floor_divide(index, N), at::remainder(index, N)}).unsqueeze(0);
}

// One layer's three terms, into losses[0..2]; they share U where a gradient is wanted.
template <typename acc_t>
void manifold_layer(
    const at::Tensor& student,
    const at::Tensor& teacher,
    const at::Tensor& index,
    const std::array<double, 3>& weights,
    const at::Tensor& dstudent,
    acc_t* losses) {
  constexpr double kEps = 1e-12;
  const bool with_grad = dstudent.numel() > 0;
  const int64_t Ds = student.size(2);
  acc_t* u = with_grad ? sums_in<acc_t>(dstudent) : nullptr;
  std::vector<acc_t> buffer;
  if (with_grad && !u) {
    buffer.resize(student.numel());
    u = buffer.data();
  }
  const auto term_of = [&](const at::Tensor& s, const at::Tensor& t, const char* scope, double weight) {
    Term<acc_t> term{Groups(s, scope), Groups(t, scope)};
    term.eps = kEps;
    term.c = static_cast<acc_t>(4 * weight / (static_cast<double>(term.s.G) * term.s.n * term.s.n));
    return term;
  };
  const auto mean = [](double sum, const Term<acc_t>& term) {
    return static_cast<acc_t>(sum / (static_cast<double>(term.s.G) * term.s.n * term.s.n));
  };
  auto inter = term_of(student, teacher, "inter", weights[1]);
  inter.u = u;
  losses[1] = mean(visit(inter), inter);

  const auto rows_s = take_rows(student, index), rows_t = take_rows(teacher, index);
  const int64_t K = index.numel();
  const auto ids = index.contiguous();
  const auto* id = ids.const_data_ptr<int64_t>();
  std::vector<acc_t> u_k(with_grad ? K * Ds : 0);
  for (int64_t k = 0; k < K; ++k)
    TORCH_CHECK(id[k] >= 0 && id[k] < student.size(0) * student.size(1), "index must lie in [0, B*N), got ", id[k]);
  auto random = term_of(rows_s, rows_t, "intra", weights[2]);
  random.u = with_grad ? u_k.data() : nullptr;
  losses[2] = mean(visit(random), random);
  for (int64_t k = 0; with_grad && k < K; ++k)
    for (int64_t d = 0; d < Ds; ++d) u[id[k] * Ds + d] += u_k[k * Ds + d];

  auto intra = term_of(student, teacher, "intra", weights[0]);
  intra.u = u;
  intra.add = true;
  if (with_grad) intra.dstudent = dstudent;
  losses[0] = mean(visit(intra), intra);
}

std::tuple<at::Tensor, std::vector<at::Tensor>> manifold_fwd_cpu(
    at::TensorList students,  // (B, N, Ds) each
    at::TensorList teachers,  // (B, N, Dt) each
    at::TensorList indices,   // (K) each
    double intra,
    double inter,
    double random,
    bool with_grad) {
  auto acc = at::kFloat;
  for (size_t l = 0; l < students.size(); ++l) acc = at::promote_types(acc, accumulator(students[l], teachers[l]));
  auto terms = at::empty({static_cast<int64_t>(students.size()), 3}, students[0].options().dtype(acc));
  std::vector<at::Tensor> dstudents;
  for (size_t l = 0; l < students.size(); ++l) {
    dstudents.push_back(gradient_of(students[l], with_grad));
    AT_DISPATCH_FLOATING_TYPES(acc, "manifold_fwd_cpu", [&] {
      manifold_layer<scalar_t>(
          students[l],
          teachers[l],
          indices[l],
          {intra, inter, random},
          dstudents[l],
          terms.mutable_data_ptr<scalar_t>() + 3 * l);
    });
  }
  return {terms, dstudents};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("relation_fwd", &relation_fwd_cpu);
  m.impl("manifold_fwd", &manifold_fwd_cpu);
}

}  // namespace fastkd
