// Losses of two rows of logits and their gradients, a row at a time: the KL divergence of their softmaxes, whole or
// split at a target; the normalised loss of a target and the others; the competition of two networks.
#include "common.h"
#include "cpu/blocks.h"
#include "cpu/vector.h"
#include "thresholds.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace fastkd {
namespace {

Threshold kGrain{"logits.grain", 1 << 13};  // logits per task below which threads cost more than they bring

// e^x - 1 for |x| < 1/2.
FASTKD_INLINE float expm1_of(float x) {
  float p = 2.4801587302e-5f;
  p = p * x + 1.9841269841e-4f;
  p = p * x + 1.3888888889e-3f;
  p = p * x + 8.3333333333e-3f;
  p = p * x + 4.1666666667e-2f;
  p = p * x + 1.6666666667e-1f;
  p = p * x + 0.5f;
  return p * (x * x) + x;
}

FASTKD_INLINE double expm1_of(double x) {
  return std::expm1(x);
}

template <typename T>
struct Pair {
  T s, t;  // of the student, of the teacher
};

// Shifts of two rows with maxima m that make their difference exact: the row with the larger offset is moved towards
// the other by a multiple of a power of two.
template <typename T>
Pair<T> moves(Pair<T> m, T step) {
  const T apart = std::rint((m.s - m.t) / step) * step;
  return std::abs(m.s) < std::abs(m.t) ? Pair<T>{0, -apart} : Pair<T>{apart, 0};
}

// e^((s - m_s)/T) in place of s, e^((t - m_t)/T) in place of t, (s - t)/T of the moved rows to d; the sums of both
// exponentials.
template <typename T>
FASTKD_MULTIVERSION Pair<T> exp_rows(T* s, T* t, T* d, int64_t n, Pair<T> m, Pair<T> moved, T inv_temperature) {
  n = n / kLanes * kLanes;
  Lanes<T> l_s(0), l_t(0);
  for_lanes(n, [&](int64_t j, int64_t l) FASTKD_INLINE_LAMBDA {
    d[j] = ((s[j] - moved.s) - (t[j] - moved.t)) * inv_temperature;
    s[j] = exp_of((s[j] - m.s) * inv_temperature);
    t[j] = exp_of((t[j] - m.t) * inv_temperature);
    l_s[l] += s[j];
    l_t[l] += t[j];
  });
  return {l_s.sum(), l_t.sum()};
}

template <typename T>
struct Divergence {
  T kl, excess;  // of a row; Σ (p - q) as computed, which is the rounding of the sums that p and q were divided by
};

// Of e^s, e^t and d: KL = Σ q (e^u - 1 - u), no term of which is negative, with u = d - shift = log(p/q). p - q in
// place of d, as q (e^u - 1) where that has more digits. A class of probability 0 on both sides adds nothing.
template <typename T>
FASTKD_MULTIVERSION Divergence<T> kl_row(const T* s, const T* t, T* d, int64_t n, Pair<T> inv_l, T shift) {
  n = n / kLanes * kLanes;
  Lanes<T> kl(0), excess(0);
  for_lanes(n, [&](int64_t j, int64_t l) FASTKD_INLINE_LAMBDA {
    const T u = d[j] - shift, p = s[j] * inv_l.s, q = t[j] * inv_l.t;
    const T x = std::abs(u) < T(0.5) ? expm1_of(u) * q : p - q;
    kl[l] += x - (q == 0 ? T(0) : u * q);
    excess[l] += x;
    d[j] = x;
  });
  return {kl.sum(), excess.sum()};
}

// e^(z - m) to out; its sum.
template <typename T>
FASTKD_MULTIVERSION T exp_row(const T* z, T* out, int64_t n, T m) {
  n = n / kLanes * kLanes;
  Lanes<T> total(0);
  for_lanes(n, [&](int64_t j, int64_t l) FASTKD_INLINE_LAMBDA {
    out[j] = exp_of(z[j] - m);
    total[l] += out[j];
  });
  return total.sum();
}

template <typename T>
FASTKD_MULTIVERSION double sum_row(const T* x, int64_t n) {
  n = n / kLanes * kLanes;
  Lanes<double> total(0);
  for_lanes(n, [&](int64_t j, int64_t l) FASTKD_INLINE_LAMBDA { total[l] += x[j]; });
  return total.sum();
}

// Σ q (z - m), of the e^t and the factor that q is given by. A class of probability 0 adds nothing.
template <typename T>
FASTKD_MULTIVERSION T mean_row(const T* z, const T* t, int64_t n, T m, T inv_l) {
  n = n / kLanes * kLanes;
  Lanes<T> total(0);
  for_lanes(n, [&](int64_t j, int64_t l) FASTKD_INLINE_LAMBDA {
    const T q = t[j] * inv_l;
    total[l] += q == 0 ? T(0) : q * (z[j] - m);
  });
  return total.sum();
}

// d a - s b to ds.
template <typename T>
FASTKD_MULTIVERSION void gradient_row(const T* d, const T* s, T* ds, int64_t C, T a, T b) {
#pragma omp simd
  for (int64_t j = 0; j < C; ++j) ds[j] = d[j] * a - s[j] * b;
}

// Of log-odds.
double probability(double odds) {
  return 1 / (1 + std::exp(-odds));
}

double log_probability(double odds) {
  return std::min(odds, 0.) - std::log1p(std::exp(-std::abs(odds)));
}

// Of the distributions (q, 1 - q) and (p, 1 - p), each given by its log-odds: KL and p - q.
struct Binary {
  double kl, difference;

  Binary(double of_p, double of_q) {
    const double p = probability(of_p), q = probability(of_q), other_q = probability(-of_q);
    const double of_target = log_probability(of_q) - log_probability(of_p);
    const double of_others = log_probability(-of_q) - log_probability(-of_p);
    kl = (q == 0 ? 0 : q * of_target) + (other_q == 0 ? 0 : other_q * of_others);
    difference = p - q;
  }
};

// Row b in the accumulation dtype, -inf up to a whole vector.
template <typename acc_t>
void load_row(const Tensor& x, int64_t b, acc_t* out) {
  const int64_t C = x.size(1);
  FASTKD_DISPATCH(x.scalar_type(), "logits", [&] {
    convert_row<scalar_t, acc_t>(x.const_data_ptr<scalar_t>() + b * x.stride(0), x.stride(1), C, 1, out);
  });
  std::fill(out + C, out + padded(C), kNever<acc_t>);
}

// Of row b: α KL(target | the others) + β KL(among the others); without a target, β KL of the whole rows.
template <typename acc_t>
struct Rows {
  const Tensor &student, &teacher;
  const int64_t* target;  // null: none
  acc_t* dstudent;        // null: not wanted
  double alpha, beta;
  acc_t inv_temperature, step;  // step: a power of two about T

  acc_t operator()(int64_t b, acc_t* s, acc_t* t, acc_t* d) const {
    const int64_t C = student.size(1), n = padded(C);
    load_row(student, b, s);
    load_row(teacher, b, t);
    Pair<acc_t> at_target{};
    if (target != nullptr) {
      at_target = {s[target[b]], t[target[b]]};
      s[target[b]] = t[target[b]] = kNever<acc_t>;
    }
    const Pair<acc_t> m{max_row<acc_t>(s, n), max_row<acc_t>(t, n)};
    const auto moved = moves(m, step);
    const auto sums = exp_rows<acc_t>(s, t, d, n, m, moved, inv_temperature);
    // A network that has switched all other classes off has no distribution among them.
    const bool none_s = target != nullptr && sums.s == 0, none_t = target != nullptr && sums.t == 0;
    const Pair<acc_t> l{none_s ? 1 : sums.s, none_t ? 1 : sums.t};
    const acc_t shift = ((m.s - moved.s) - (m.t - moved.t)) * inv_temperature + std::log(l.s / l.t);
    auto [kl, excess] = kl_row<acc_t>(s, t, d, n, {1 / l.s, 1 / l.t}, shift);
    if (none_s || none_t) {
      kl = none_t ? 0 : -kNever<acc_t>;
      excess = 0;
      std::fill_n(d, n, acc_t(0));
    }

    const auto odds = [&](double z, double of_max, double sum) {
      return (z - of_max) * inv_temperature - std::log(sum);
    };
    double whole = 0, difference = 0;
    if (target != nullptr) {
      const Binary binary(odds(at_target.s, m.s, sums.s), odds(at_target.t, m.t, sums.t));
      whole = alpha == 0 ? 0 : alpha * binary.kl;
      difference = alpha * binary.difference;
    }
    if (dstudent != nullptr) {
      acc_t* ds = dstudent + b * C;
      const auto of_p = static_cast<acc_t>((beta * excess + difference) / l.s) * inv_temperature;
      gradient_row<acc_t>(d, s, ds, C, static_cast<acc_t>(beta) * inv_temperature, of_p);
      if (target != nullptr) ds[target[b]] = static_cast<acc_t>(difference) * inv_temperature;
    }
    // A term of weight 0 may be infinite.
    const double among = beta == 0 ? 0 : beta * kl;
    return static_cast<acc_t>(among + whole);
  }
};

// Of row b: -q_y log p_y + γ T² Σ_{i≠y} -q'_i log p'_i, with the dashed softmaxes those of the other classes at T.
template <typename acc_t>
struct NormalisedRows {
  const Tensor &student, &teacher;
  const int64_t* target;
  acc_t* dstudent;  // null: not wanted
  double gamma, temperature;
  acc_t step;  // a power of two about T

  // held: 4 rows, and a fifth for the student's at a temperature of 1 if T is another.
  acc_t operator()(int64_t b, acc_t* held) const {
    const int64_t C = student.size(1), n = padded(C), y = target[b];
    acc_t *s = held, *t = held + n, *d = held + 2 * n, *raw = held + 3 * n, *plain = s;
    const auto inv_temperature = static_cast<acc_t>(1 / temperature);
    load_row(student, b, s);
    load_row(teacher, b, t);
    const Pair<acc_t> at_target{s[y], t[y]};
    s[y] = t[y] = kNever<acc_t>;
    std::copy_n(s, n, raw);
    const Pair<acc_t> m{max_row<acc_t>(s, n), max_row<acc_t>(t, n)};
    Pair<acc_t> whole{};  // sums at a temperature of 1
    if (temperature != 1) {
      plain = held + 4 * n;
      whole.t = exp_row<acc_t>(t, plain, n, m.t);
      whole.s = exp_row<acc_t>(s, plain, n, m.s);
    }
    const auto moved = moves(m, step);
    const auto sums = exp_rows<acc_t>(s, t, d, n, m, moved, inv_temperature);
    if (temperature == 1) whole = sums;
    // A network that has switched all other classes off has no distribution among them.
    const bool none_s = sums.s == 0, none_t = sums.t == 0;

    const auto log_odds = [](double z, double of_max, double sum) {
      return z == -kNever<double> ? std::numeric_limits<double>::quiet_NaN() : (z - of_max) - std::log(sum);
    };
    const double q = probability(log_odds(at_target.t, m.t, whole.t)), odds = log_odds(at_target.s, m.s, whole.s);
    double loss = q == 0 ? 0 : -q * log_probability(odds), weight = 0, excess = 0;
    if (gamma != 0 && !none_t) {
      if (none_s) {
        loss -= kNever<double>;
      } else {
        const acc_t inv_l = 1 / sums.t;
        const acc_t cross = mean_row<acc_t>(raw, t, n, m.s, inv_l) * inv_temperature;
        loss += gamma * temperature * temperature * (std::log(double(sums.s)) - cross);
        const acc_t shift = ((m.s - moved.s) - (m.t - moved.t)) * inv_temperature + std::log(sums.s / sums.t);
        excess = kl_row<acc_t>(s, t, d, n, {1 / sums.s, inv_l}, shift).excess;
        weight = gamma * temperature;
      }
    }
    if (dstudent != nullptr) {
      acc_t* ds = dstudent + b * C;
      // Times e^s at a temperature of 1, whose sum has to be exact for the gradients of a row to cancel.
      const double lost = q * probability(-odds), of_others = none_s ? lost : lost / sum_row<acc_t>(plain, n);
      const double of_p = weight == 0 ? 0 : weight * excess / sums.s;
      if (weight == 0) std::fill_n(d, n, acc_t(0));
      if (plain == s) {
        gradient_row<acc_t>(d, s, ds, C, static_cast<acc_t>(weight), static_cast<acc_t>(of_p - of_others));
      } else {
        gradient_row<acc_t>(d, s, ds, C, static_cast<acc_t>(weight), static_cast<acc_t>(of_p));
        add_scaled_row<acc_t>(ds, plain, static_cast<acc_t>(of_others), C);
      }
      ds[y] = static_cast<acc_t>(-lost);
    }
    return static_cast<acc_t>(loss);
  }
};

std::tuple<Tensor, Tensor> softmax_kl_cpu(
    const Tensor& student,                // (B, C)
    const Tensor& teacher,                // (B, C)
    const std::optional<Tensor>& target,  // (B), int64
    double alpha,
    double beta,
    double temperature,
    bool with_grad) {
  const int64_t B = student.size(0), C = student.size(1), n = padded(C);
  const auto acc = accumulator(student, teacher);
  auto kl = empty(student, {B}, acc);
  auto dstudent = with_grad ? empty_kept(student, {B, C}, acc) : empty(student, {0}, acc);
  if (student.numel() == 0) return {kl.zero_(), dstudent};
  const auto index = target ? target->contiguous() : Tensor();
  FASTKD_DISPATCH_ACC(kl.scalar_type(), "softmax_kl_cpu", [&] {
    const Rows<scalar_t> rows{
        student,
        teacher,
        target ? index.const_data_ptr<int64_t>() : nullptr,
        with_grad ? dstudent.mutable_data_ptr<scalar_t>() : nullptr,
        alpha,
        beta,
        static_cast<scalar_t>(1 / temperature),
        static_cast<scalar_t>(std::exp2(std::floor(std::log2(temperature))))};
    auto* out = kl.mutable_data_ptr<scalar_t>();
    parallel_for(0, B, std::max<int64_t>(1, kGrain / C), [&](int64_t begin, int64_t end) {
      Buffer<scalar_t> held(3 * n);
      for (int64_t b = begin; b < end; ++b) out[b] = rows(b, held.data(), held.data() + n, held.data() + 2 * n);
    });
  });
  return {kl, dstudent};
}

std::tuple<Tensor, Tensor> nkd_cpu(
    const Tensor& student,  // (B, C)
    const Tensor& teacher,  // (B, C)
    const Tensor& target,   // (B), int64
    double gamma,
    double temperature,
    bool with_grad) {
  const int64_t B = student.size(0), C = student.size(1), n = padded(C);
  const auto acc = accumulator(student, teacher);
  auto loss = empty(student, {B}, acc);
  auto dstudent = with_grad ? empty_kept(student, {B, C}, acc) : empty(student, {0}, acc);
  if (student.numel() == 0) return {loss.zero_(), dstudent};
  const auto index = target.contiguous();
  FASTKD_DISPATCH_ACC(acc, "nkd_cpu", [&] {
    const NormalisedRows<scalar_t> rows{
        student,
        teacher,
        index.const_data_ptr<int64_t>(),
        with_grad ? dstudent.mutable_data_ptr<scalar_t>() : nullptr,
        gamma,
        temperature,
        static_cast<scalar_t>(std::exp2(std::floor(std::log2(temperature))))};
    auto* out = loss.mutable_data_ptr<scalar_t>();
    parallel_for(0, B, std::max<int64_t>(1, kGrain / C), [&](int64_t begin, int64_t end) {
      Buffer<scalar_t> held(5 * n);
      for (int64_t b = begin; b < end; ++b) out[b] = rows(b, held.data());
    });
  });
  return {loss, dstudent};
}

template <typename T>
struct Agreement {
  T j, of_p, of_q;  // of a row: J, and the sums of each network's probabilities times the slopes by them
};

constexpr double kLeast = 0.01, kMost = 0.99;  // probability that counts

// Of e^s and e^t: p and q in their place, the slopes of J by them to a and b. J = ½ Σ M log(M² / PQ) with P, Q and
// M = (P + Q)/2 clamped; a clamped probability has slope 0. Where none is, M² / PQ is 1 + (p - q)² / 4pq, and the slope
// by p has (p - q) / 4p: they keep the digits of p - q.
template <typename T>
FASTKD_MULTIVERSION Agreement<T> agreement_row(T* s, T* t, T* a, T* b, int64_t n, Pair<T> inv_l) {
  n = n / kLanes * kLanes;
  constexpr T least = kLeast, most = kMost;
  Lanes<T> j_sum(0), of_p(0), of_q(0);
  for_lanes(n, [&](int64_t j, int64_t l) FASTKD_INLINE_LAMBDA {
    const T p = s[j] * inv_l.s, q = t[j] * inv_l.t, m = (p + q) * T(0.5), apart = p - q;
    const T low_p = p < least ? least : p, low_q = q < least ? least : q, low_m = m < least ? least : m;
    const T held_p = low_p > most ? most : low_p, held_q = low_q > most ? most : low_q;
    const T held_m = low_m > most ? most : low_m;
    const bool in_p = held_p == p, in_q = held_q == q, in_m = held_m == m;
    const T product = held_p * held_q;
    const T near = apart * apart / (4 * product), far = held_m * held_m / product;
    const bool is_near = in_p && in_q && in_m;
    const T log_ratio = log_of(is_near ? 1 + near : far, is_near ? near : far - 1);
    const T by_m = in_m ? T(0.25) * log_ratio : T(0), of_m = in_m ? T(0.5) : T(0);
    const T by_p = in_p && in_m ? apart / (4 * held_p) : of_m - (in_p ? held_m / (2 * held_p) : T(0));
    const T by_q = in_q && in_m ? -apart / (4 * held_q) : of_m - (in_q ? held_m / (2 * held_q) : T(0));
    j_sum[l] += held_m * log_ratio;
    s[j] = p, t[j] = q, a[j] = by_m + by_p, b[j] = by_m + by_q;
    of_p[l] += p * a[j];
    of_q[l] += q * b[j];
  });
  return {T(0.5) * j_sum.sum(), of_p.sum(), of_q.sum()};
}

// scale p (a - mean): a softmax's gradient of slopes a by its probabilities.
template <typename T>
FASTKD_MULTIVERSION void softmax_gradient_row(const T* p, const T* a, T* out, int64_t C, T mean, T scale) {
#pragma omp simd
  for (int64_t j = 0; j < C; ++j) out[j] = scale * (p[j] * (a[j] - mean));
}

std::tuple<Tensor, Tensor, Tensor> competition_cpu(
    const Tensor& student,  // (B, C)
    const Tensor& teacher,  // (B, C)
    double temperature,
    const std::vector<bool>& wanted) {
  const int64_t B = student.size(0), C = student.size(1), n = padded(C);
  const auto acc = accumulator(student, teacher);
  const auto gradient = [&](const Tensor& x, bool is_wanted) {
    return is_wanted ? empty_kept(x, {B, C}, acc) : empty(x, {0}, acc);
  };
  auto rows = empty(student, {B}, acc);
  auto dstudent = gradient(student, wanted[0]), dteacher = gradient(teacher, wanted[1]);
  if (student.numel() == 0) return {rows.zero_(), dstudent, dteacher};
  FASTKD_DISPATCH_ACC(acc, "competition_cpu", [&] {
    const auto inv_temperature = static_cast<scalar_t>(1 / temperature);
    auto* out = rows.mutable_data_ptr<scalar_t>();
    auto *ds = dstudent.mutable_data_ptr<scalar_t>(), *dt = dteacher.mutable_data_ptr<scalar_t>();
    parallel_for(0, B, std::max<int64_t>(1, kGrain / C), [&](int64_t begin, int64_t end) {
      Buffer<scalar_t> held(4 * n);
      scalar_t *s = held.data(), *t = s + n, *a = s + 2 * n, *b = s + 3 * n;
      for (int64_t row = begin; row < end; ++row) {
        load_row(student, row, s);
        load_row(teacher, row, t);
        const Pair<scalar_t> m{max_row<scalar_t>(s, n), max_row<scalar_t>(t, n)};
        const auto l = exp_rows<scalar_t>(s, t, a, n, m, {}, inv_temperature);
        const auto found = agreement_row<scalar_t>(s, t, a, b, n, {1 / l.s, 1 / l.t});
        out[row] = found.j;
        if (wanted[0]) softmax_gradient_row<scalar_t>(s, a, ds + row * C, C, found.of_p, inv_temperature);
        if (wanted[1]) softmax_gradient_row<scalar_t>(t, b, dt + row * C, C, found.of_q, inv_temperature);
      }
    });
  });
  return {rows, dstudent, dteacher};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  implement<softmax_kl_cpu>(m, "softmax_kl");
  implement<nkd_cpu>(m, "nkd");
  implement<competition_cpu>(m, "competition");
}

}  // namespace fastkd
