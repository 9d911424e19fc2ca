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

namespace fastkd {
namespace {

template <typename acc_t>
double visit(const Term<acc_t>& term) {
  if constexpr (std::is_same_v<acc_t, float>) {
    const bool rows_in_place = term.s.in_place(ScalarType::BFloat16) && term.t.in_place(ScalarType::BFloat16);
    const bool fits = rows_in_place && term.s.D % 2 == 0 && term.t.D % 2 == 0;
    const bool fills = term.s.n >= kMatrixRows || !has_avx512();
    if (fits && fills && term.keeps_its_digits_in_bf16() && bf16_products() == Bf16::kTiles) return tile_bf16(term);
    if (has_avx512()) return tile_panels(term);
  }
  return tile(term);
}

// Contiguous, and empty where no gradient is wanted.
Tensor gradient_of(const Tensor& student, bool with_grad) {
  return empty_kept(student, with_grad ? student.sizes() : Sizes{0}, stored_gradient(student));
}

// dstudent itself where it is stored in acc_t, else null.
template <typename acc_t>
acc_t* sums_in(const Tensor& dstudent) {
  return dstudent.scalar_type() == CppTypeToScalarType<acc_t>::value ? dstudent.mutable_data_ptr<acc_t>() : nullptr;
}

// Tokens in float32 with the rows whose squares may leave it scaled by powers of two, which relations do not see.
struct ScaledRows {
  Tensor x;                   // (B, N, D) contiguous
  std::vector<float> scales;  // (B N)

  explicit ScaledRows(const Tensor& from) : x(empty(from, from.sizes(), ScalarType::Float)) {
    constexpr float kSafe = 0x1p30f;  // 2^68 elements of its square fit
    const Groups rows(from, "intra");
    auto* out = x.mutable_data_ptr<float>();
    for (int64_t g = 0; g < rows.G; ++g)
      convert_rows<float>(rows, g, 0, rows.n, nullptr, out + g * rows.n * rows.D, rows.D);
    scales.assign(rows.G * rows.n, 1.f);
    for (float& scale : scales) {
      const auto most = [](float a, float b) { return std::max(a, std::abs(b)); };
      const float largest = std::accumulate(out, out + rows.D, 0.f, most);
      if (largest > kSafe && std::isfinite(largest)) scale = std::ldexp(1.f, -std::ilogb(largest));
      for (int64_t d = 0; d < rows.D; ++d) *out++ *= scale;
    }
  }

  // Writes the gradient of the given rows, from that of these.
  void scale_gradient(Tensor& dx, const Tensor& dgiven) const {
    auto* from = dx.mutable_data_ptr<float>();
    const int64_t D = x.size(2);
    FASTKD_DISPATCH(dgiven.scalar_type(), "scale_gradient", [&] {
      auto* to = dgiven.mutable_data_ptr<scalar_t>();
      for (const float scale : scales)
        for (int64_t d = 0; d < D; ++d) *to++ = static_cast<scalar_t>(*from++ * scale);
    });
  }
};

// What visit(student, teacher, dstudent) leaves behind, whose result says whether all losses are finite: rows beyond
// float32 are rare, so they are scaled only where one of them made a loss no number.
template <typename Visit>
void with_rows_in_range(const Tensor& student, const Tensor& teacher, const Tensor& dstudent, const Visit& visit) {
  if (visit(student, teacher, dstudent) || accumulator(student, teacher) == ScalarType::Double) return;
  const ScaledRows s(student), t(teacher);
  auto gradient = gradient_of(s.x, dstudent.numel() > 0);
  visit(s.x, t.x, gradient);
  if (gradient.numel() > 0) s.scale_gradient(gradient, dstudent);
}

std::tuple<Tensor, Tensor> relation_fwd_cpu(
    const Tensor& student,  // (B, N, Ds)
    const Tensor& teacher,  // (B, N, Dt)
    std::string scope,
    bool normalize,
    std::string rectify,
    double eps,
    std::string algorithm,
    bool with_grad) {
  const auto acc = accumulator(student, teacher);
  auto dstudent = gradient_of(student, with_grad);
  if (student.numel() == 0 || teacher.numel() == 0) return {full(student, {}, 0, acc), dstudent.zero_()};
  double loss = 0;
  const auto relate = [&](const Tensor& s, const Tensor& t, const Tensor& ds) {
    FASTKD_DISPATCH_ACC(acc, "relation_fwd_cpu", [&] {
      using acc_t = scalar_t;
      Term<acc_t> term{Groups(s, scope), Groups(t, scope)};
      term.eps = eps;
      term.rectify = rectify == "none" ? Rectify::kNone : rectify == "both" ? Rectify::kBoth : Rectify::kTeacher;
      term.normalize = normalize;
      const double elements = static_cast<double>(term.s.G) * term.s.n * term.s.n;
      term.c = static_cast<acc_t>(4 / elements);
      if (with_grad) {
        term.dstudent = ds;
        term.u = sums_in<acc_t>(ds);
      }
      loss = (algorithm == "gram" ? gram(term) : visit(term)) / elements;
    });
    return std::isfinite(loss) || !normalize;
  };
  with_rows_in_range(student, teacher, dstudent, relate);
  return {full(student, {}, loss, acc), dstudent};
}

// Rows `index` (K), contiguous, of the flattened batch, as one group.
Tensor take_rows(const Tensor& x, const Tensor& index) {
  const int64_t N = x.size(1), D = x.size(2), K = index.numel(), size = x.element_size();
  const auto out = empty(x, {1, K, D});
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t k = 0; k < K; ++k) {
    const int64_t i = index.const_data_ptr<int64_t>()[k];
    const char* row = from + (i / N * x.stride(0) + i % N * x.stride(1)) * size;
    for (int64_t d = 0; d < D; ++d, to += size) std::memcpy(to, row + d * x.stride(2) * size, size);
  }
  return out;
}

// One layer's three terms, into losses; they share U where a gradient is wanted.
template <typename acc_t>
void manifold_layer(
    const Tensor& student,
    const Tensor& teacher,
    const Tensor& index,
    const std::array<double, 3>& weights,
    const Tensor& dstudent,
    std::array<double, 3>& losses) {
  constexpr double kEps = 1e-12;
  const bool with_grad = dstudent.numel() > 0;
  const int64_t Ds = student.size(2);
  acc_t* u = with_grad ? sums_in<acc_t>(dstudent) : nullptr;
  Tensor buffer;
  if (with_grad && !u) {
    buffer = empty_kept(student, student.sizes(), CppTypeToScalarType<acc_t>::value);
    u = buffer.mutable_data_ptr<acc_t>();
  }
  const auto term_of = [&](const Tensor& s, const Tensor& t, const char* scope, double weight) {
    Term<acc_t> term{Groups(s, scope), Groups(t, scope)};
    term.eps = kEps;
    term.c = static_cast<acc_t>(4 * weight / (static_cast<double>(term.s.G) * term.s.n * term.s.n));
    return term;
  };
  const auto mean = [](double sum, const Term<acc_t>& term) {
    return sum / (static_cast<double>(term.s.G) * term.s.n * term.s.n);
  };
  auto inter = term_of(student, teacher, "inter", weights[1]);
  inter.u = u;
  losses[1] = mean(visit(inter), inter);

  const int64_t K = index.numel(), tokens = student.size(0) * student.size(1);
  const auto ids = index.contiguous();
  const auto* id = ids.const_data_ptr<int64_t>();
  std::vector<acc_t> u_k(with_grad ? K * Ds : 0);
  for (int64_t k = 0; k < K; ++k)
    STD_TORCH_CHECK(id[k] >= 0 && id[k] < tokens, "index must lie in [0, B*N = ", tokens, "), got ", id[k]);
  const auto rows_s = take_rows(student, ids), rows_t = take_rows(teacher, ids);
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

std::tuple<Tensor, Tensor, std::vector<Tensor>> manifold_fwd_cpu(
    const std::vector<Tensor>& students,  // (B, N, Ds) each
    const std::vector<Tensor>& teachers,  // (B, N, Dt) each
    const std::vector<Tensor>& indices,   // (K) each
    double intra,
    double inter,
    double random,
    bool with_grad) {
  auto acc = ScalarType::Float;
  for (size_t l = 0; l < students.size(); ++l)
    if (accumulator(students[l], teachers[l]) == ScalarType::Double) acc = ScalarType::Double;
  auto loss = empty(students[0], {}, acc), means = empty(students[0], {3}, acc);
  std::vector<Tensor> dstudents;
  FASTKD_DISPATCH_ACC(acc, "manifold_fwd_cpu", [&] {
    const auto n_layers = static_cast<double>(students.size());
    std::array<double, 3> sums{};
    for (size_t l = 0; l < students.size(); ++l) {
      dstudents.push_back(gradient_of(students[l], with_grad));
      std::array<double, 3> losses;
      const auto relate = [&](const Tensor& s, const Tensor& t, const Tensor& ds) {
        manifold_layer<scalar_t>(s, t, indices[l], {intra / n_layers, inter / n_layers, random / n_layers}, ds, losses);
        return std::all_of(losses.begin(), losses.end(), [](double each) { return std::isfinite(each); });
      };
      with_rows_in_range(students[l], teachers[l], dstudents[l], relate);
      for (int i = 0; i < 3; ++i) sums[i] += losses[i];
    }
    for (int i = 0; i < 3; ++i) means.mutable_data_ptr<scalar_t>()[i] = static_cast<scalar_t>(sums[i] / n_layers);
    *loss.mutable_data_ptr<scalar_t>() =
        static_cast<scalar_t>((intra * sums[0] + inter * sums[1] + random * sums[2]) / n_layers);
  });
  return {loss, means, dstudents};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  implement<relation_fwd_cpu>(m, "relation_fwd");
  implement<manifold_fwd_cpu>(m, "manifold_fwd");
}

}  // namespace fastkd
