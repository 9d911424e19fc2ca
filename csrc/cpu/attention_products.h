// Operands of a head, and the matrix products of its strips.
#pragma once
#include "cpu/attention_rows.h"

namespace fastkd {
namespace {

struct Network {
  Tensor q, k;                 // (B, H, N_q, d), (B, H, N_k, d)
  std::optional<Tensor> bias;  // (B | 1, H | 1, N_q | 1, N_k | 1)
  double scale;

  int64_t H() const { return q.size(1); }
  int64_t d() const { return q.size(3); }
};

// x[b][h][i][j], where dimensions of size 1 broadcast.
int64_t offset(const Tensor& x, int64_t b, int64_t h, int64_t i, int64_t j) {
  const auto along = [&](int64_t dim, int64_t index) { return x.size(dim) == 1 ? 0 : index * x.stride(dim); };
  return along(0, b) + along(1, h) + along(2, i) + (x.dim() > 3 ? along(3, j) : 0);
}

struct Problem {
  Network s, t;
  Divergence divergence;
  bool mean_heads, causal, shared;
  int64_t row_start, row_step;
  double bias_scale;
  std::optional<Tensor> key_mask;  // (B, N_k), contiguous
  Tensor weight;                   // (B | 1, H_out | 1, N_q | 1) in the accumulation dtype
  double factor;                   // of the weights
  Tensor rows;                     // (B, H_out, N_q) losses; undefined where only the gradient is wanted
  Tensor dq, dk, dbias;            // undefined where not wanted; dbias in the accumulation dtype, of its bias' shape

  int64_t B() const { return s.q.size(0); }
  int64_t H_out() const { return mean_heads ? 1 : s.H(); }
  int64_t N_q() const { return s.q.size(2); }
  int64_t N_k() const { return s.k.size(2); }
  bool has_softmax() const { return divergence != Divergence::kScoreMSE; }
  bool with_grad() const { return dq.defined() || dk.defined() || dbias.defined(); }
  bool with_dk() const { return dk.defined() || (shared && dq.defined()); }

  // Returns the keys of image b that the mask keeps.
  std::vector<int64_t> keys(int64_t b) const {
    std::vector<int64_t> out;
    out.reserve(N_k());
    const bool* mask = key_mask ? key_mask->const_data_ptr<bool>() + b * N_k() : nullptr;
    for (int64_t j = 0; j < N_k(); ++j)
      if (!mask || mask[j]) out.push_back(j);
    return out;
  }

  // Returns the number of an image's keys that row i attends to.
  int64_t visible(const std::vector<int64_t>& keys, int64_t i) const {
    if (!causal) return keys.size();
    return std::upper_bound(keys.begin(), keys.end(), row_start + i * row_step) - keys.begin();
  }
};

// Rows of a (B, H, N, d) tensor, times scale, to out with leading dimension ld.
template <typename T, typename Index>
void load_rows(const Tensor& x, int64_t b, int64_t h, int64_t n, const Index& index, T scale, T* out, int64_t ld) {
  FASTKD_DISPATCH(x.scalar_type(), "load_rows", [&] {
    const auto* p = x.const_data_ptr<scalar_t>() + b * x.stride(0) + h * x.stride(1);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = index(i);
      if (row < 0) {
        std::fill_n(out + i * ld, x.size(3), T(0));
      } else {
        convert_row<scalar_t, T>(p + row * x.stride(2), x.stride(3), x.size(3), scale, out + i * ld);
      }
    }
  });
}

// x times scale, to row i of a contiguous (B, H, N, d) tensor.
template <typename T>
void store_row(const Tensor& out, int64_t b, int64_t h, int64_t i, const T* x, T scale) {
  FASTKD_DISPATCH(out.scalar_type(), "store_row", [&] {
    auto* p = out.mutable_data_ptr<scalar_t>() + ((b * out.size(1) + h) * out.size(2) + i) * out.size(3);
    round_row<T, scalar_t>(x, out.size(3), scale, p);
  });
}

// Subtract the keys' mean. Softmax is invariant to it, and removing a common offset first avoids cancellation.
template <typename T>
FASTKD_MULTIVERSION void centre_rows(T* x, int64_t n, int64_t d, T* mean) {
  std::fill_n(mean, d, T(0));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < d; ++c) mean[c] += x[i * d + c];
  for (int64_t c = 0; c < d; ++c) mean[c] /= static_cast<T>(n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < d; ++c) x[i * d + c] -= mean[c];
}

// A head of an image, or all of them (h = 0) where they are averaged.
struct Task {
  int64_t b, h;
};

// Operands of a task and the products of its strips, for any dtypes, in float32 or float64.
template <typename T>
struct Products {
  using acc_t = T;
  const Problem& problem;
  Buffer<T> q_s, q_t, k_s, k_t, dq, mean;
  std::vector<RightRows<T>> right_s, right_t;  // the keys of each head
  int64_t b = 0, h0 = 0, n = 0, most_rows = 0;

  Products(const Problem& problem, int64_t most_rows) : problem(problem), most_rows(most_rows) {}

  static int64_t bytes_per_score() { return 2 * sizeof(T); }
  int64_t heads(const Network& x) const { return problem.mean_heads ? x.H() : 1; }
  // Size of a head's dK.
  int64_t dk_size() const { return problem.N_k() * problem.s.d(); }

  void load_keys(const Network& x, const std::vector<int64_t>& keys, Buffer<T>& k, std::vector<RightRows<T>>& right) {
    const int64_t d = x.d();
    k.resize(heads(x) * n * d);
    right.resize(heads(x));
    mean.resize(d);
    for (int64_t h = 0; h < heads(x); ++h) {
      T* out = k.data() + h * n * d;
      load_rows<T>(x.k, b, h0 + h, n, [&](int64_t j) { return keys[j]; }, 1, out, d);
      if (problem.has_softmax() && n > 0) centre_rows<T>(out, n, d, mean.data());
      right[h].assign(out, d, n, d);
    }
  }

  void load(const Task& task, const std::vector<int64_t>& keys) {
    b = task.b, h0 = task.h, n = keys.size();
    load_keys(problem.s, keys, k_s, right_s);
    load_keys(problem.t, keys, k_t, right_t);
    q_s.resize(heads(problem.s) * most_rows * problem.s.d());
    q_t.resize(most_rows * problem.t.d());
    dq.resize(most_rows * problem.s.d());
  }

  // Scores of rows [i0, i0 + rows), of which those with weight 0 count as 0, with the first `columns` keys.
  void scores(bool student, int64_t h, int64_t i0, int64_t rows, int64_t columns, const T* w, T* z, int64_t ld) {
    const Network& x = student ? problem.s : problem.t;
    const int64_t d = x.d();
    T* q = student ? q_s.data() + h * most_rows * d : q_t.data();
    load_rows<T>(
        x.q, b, h0 + h, rows, [&](int64_t i) { return w[i] == 0 ? -1 : i0 + i; }, static_cast<T>(x.scale), q, d);
    (student ? right_s : right_t)[h].multiply(rows, q, d, 0, columns, z, ld);
  }
  T scale_of_scores(bool) const { return 1; }

  // dQ of the strip. Returns where it is and its leading dimension: in `out` (rows, d) if that is given.
  std::pair<const T*, int64_t> queries_gradient(
      int64_t h,
      int64_t rows,
      int64_t columns,
      const T* dz,
      int64_t ld,
      bool add,
      T* out) {
    const int64_t d = problem.s.d();
    const T *k = k_s.data() + h * n * d, scale = static_cast<T>(problem.s.scale);
    out = out ? out : dq.data();
    gemm<T>(Op::kAsIs, rows, d, columns, scale, dz, ld, k, d, add, out, d);
    return {out, d};
  }
  // dK, or what the strip adds to it.
  void keys_gradient(int64_t h, int64_t rows, int64_t columns, const T* dz, int64_t ld, bool add, T* dk) {
    const int64_t d = problem.s.d();
    const T* q = q_s.data() + h * most_rows * d;
    gemm<T>(Op::kTransposed, columns, d, rows, 1, dz, ld, q, d, add, dk, d);
  }
  void prepare_gradient(int64_t, int64_t, T*, int64_t) {}
  // dK as rows of d.
  const T* finish_keys_gradient(T* dk) { return dk; }
  // If keys are the queries: whether dQ is added directly to dK.
  static bool merges(const Problem& problem) { return problem.shared && !problem.key_mask; }
  // Whether sums of dK may lie in the output itself.
  static bool sums_in_place(const Problem& problem) {
    const Tensor& out = problem.shared ? problem.dq : problem.dk;
    return out.defined() && out.scalar_type() == CppTypeToScalarType<T>::value && !problem.key_mask;
  }
  static void release() {}
};

// w of rows r and r + 1 as sums of two bfloat16: one alone would show in the gradient. Truncated, which the second
// makes good. As rows, and as the pairs that the tile unit reads; the second row may be absent.
FASTKD_MULTIVERSION void split_rows(
    const float* first,
    const float* second,
    int64_t n,
    uint16_t* high,
    uint16_t* low,
    int64_t ld,
    uint32_t* high_pairs,
    uint32_t* low_pairs) {
  n = n / kLanes * kLanes;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t a = bits_of<uint32_t>(first[j]), b = second ? bits_of<uint32_t>(second[j]) : 0u;
    const float a_top = bits_of<float>(a & 0xffff0000u), b_top = bits_of<float>(b & 0xffff0000u);
    const uint32_t a_rest = bits_of<uint32_t>(first[j] - a_top);
    const uint32_t b_rest = second ? bits_of<uint32_t>(second[j] - b_top) : 0u;
    high[j] = static_cast<uint16_t>(a >> 16);
    low[j] = static_cast<uint16_t>(a_rest >> 16);
    if (second) {
      high[ld + j] = static_cast<uint16_t>(b >> 16);
      low[ld + j] = static_cast<uint16_t>(b_rest >> 16);
    }
    high_pairs[j] = a >> 16 | (b & 0xffff0000u);
    low_pairs[j] = a_rest >> 16 | (b_rest & 0xffff0000u);
  }
}

// The same for bfloat16 networks where the CPU has instructions for them. Scales come after the products.
struct ProductsBf16 {
  using acc_t = float;
  const Problem& problem;
  Buffer<BFloat16> rows_buffer, q_s, q_t, q_columns;  // (n, d), (rows, d), (d, rows); d, rows made even
  Buffer<BFloat16> k_s_columns, k_t_columns, k_rows;  // packed Kᵀ (d, n), K (n, d)
  Buffer<uint16_t> high, low;                         // (rows, ld)
  Buffer<uint32_t> high_pairs, low_pairs;             // (rows / 2, ld)
  Buffer<float> dq, dk_rows;
  int64_t b = 0, h0 = 0, n = 0, most_rows = 0;

  ProductsBf16(const Problem& problem, int64_t most_rows) : problem(problem), most_rows(most_rows) {}

  static int64_t bytes_per_score() { return 2 * sizeof(float) + 4 * sizeof(BFloat16); }
  static int64_t even(int64_t d) { return (d + 1) / 2 * 2; }
  int64_t heads(const Network&) const { return 1; }
  int64_t dk_size() const { return problem.s.d() * padded(problem.N_k()); }

  template <typename Index>
  static void load_rows(const Tensor& x, int64_t b, int64_t h, int64_t n, const Index& index, BFloat16* out) {
    const int64_t d = x.size(3), ld = even(d), stride = x.stride(3);
    const auto* p = x.const_data_ptr<BFloat16>() + b * x.stride(0) + h * x.stride(1);
    for (int64_t i = 0; i < n; ++i, out += ld) {
      const int64_t row = index(i);
      const auto* src = p + row * x.stride(2);
      if (ld > d) out[d] = 0;
      if (row < 0) {
        std::fill_n(out, d, BFloat16(0));
      } else if (stride == 1) {
        std::memcpy(static_cast<void*>(out), src, d * sizeof *src);
      } else {
        for (int64_t c = 0; c < d; ++c) out[c] = src[c * stride];
      }
    }
  }

  void load_keys(const Network& x, const std::vector<int64_t>& keys, Buffer<BFloat16>& columns, bool as_rows) {
    const int64_t d = even(x.d()), width = padded(n);
    rows_buffer.resize(n * d);
    load_rows(x.k, b, h0, n, [&](int64_t j) { return keys[j]; }, rows_buffer.data());
    columns.resize(d * width);
    pack_bf16(rows_buffer.data(), d, d, n, /*transposed=*/true, columns.data());
    if (!as_rows) return;
    const int64_t row = packed_columns(d) * 2, pairs = (n + 1) / 2;
    k_rows.resize(width / 2 * row);
    pack_bf16(rows_buffer.data(), d, n, d, /*transposed=*/false, k_rows.data());
    std::fill_n(k_rows.data() + pairs * row, (width / 2 - pairs) * row, BFloat16(0));
  }

  void load(const Task& task, const std::vector<int64_t>& keys) {
    b = task.b, h0 = task.h, n = keys.size();
    load_keys(problem.s, keys, k_s_columns, problem.with_grad());
    load_keys(problem.t, keys, k_t_columns, false);
    const int64_t d = even(problem.s.d()), ld = pitch_of(n), rows = even(most_rows);
    q_s.resize(rows * d);
    q_columns.resize(rows * d);
    q_t.resize(rows * even(problem.t.d()));
    high.resize(rows * ld);
    low.resize(rows * ld);
    high_pairs.resize(rows / 2 * ld);
    low_pairs.resize(rows / 2 * ld);
    dq.resize(rows * packed_columns(d));
  }

  void scores(bool student, int64_t, int64_t i0, int64_t rows, int64_t columns, const float* w, float* z, int64_t ld) {
    const Network& x = student ? problem.s : problem.t;
    const int64_t d = even(x.d());
    auto* q = (student ? q_s : q_t).data();
    load_rows(x.q, b, h0, rows, [&](int64_t i) { return w[i] == 0 ? -1 : i0 + i; }, q);
    const auto* k = (student ? k_s_columns : k_t_columns).data();
    gemm_bf16(rows, padded(columns), d, q, d, k, padded(n), false, z, ld);
  }
  float scale_of_scores(bool student) const { return static_cast<float>((student ? problem.s : problem.t).scale); }

  void prepare_gradient(int64_t rows, int64_t columns, float* dz, int64_t ld) {
    for (int64_t i = 0; i < rows; i += 2)
      split_rows(
          dz + i * ld,
          i + 1 < rows ? dz + (i + 1) * ld : nullptr,
          padded(columns),
          high.data() + i * ld,
          low.data() + i * ld,
          ld,
          high_pairs.data() + i / 2 * ld,
          low_pairs.data() + i / 2 * ld);
  }

  std::pair<const float*, int64_t> queries_gradient(
      int64_t,
      int64_t rows,
      int64_t columns,
      const float*,
      int64_t ld,
      bool,
      float*) {
    const int64_t width = packed_columns(even(problem.s.d()));
    const auto product = [&](const Buffer<uint16_t>& dz, bool add) {
      const auto* a = reinterpret_cast<const BFloat16*>(dz.data());
      gemm_bf16(rows, width, padded(columns), a, ld, k_rows.data(), width, add, dq.data(), width);
    };
    product(high, false);
    product(low, true);
    round_row<float, float>(dq.data(), rows * width, static_cast<float>(problem.s.scale), dq.data());
    return {dq.data(), width};
  }

  // dKᵀ += Qᵀ dZ.
  void keys_gradient(int64_t, int64_t rows, int64_t columns, const float*, int64_t ld, bool add, float* dk) {
    const int64_t d = problem.s.d(), ld_q = even(d), pairs = even(rows);
    if (pairs > rows) std::fill_n(q_s.data() + rows * ld_q, ld_q, BFloat16(0));
    transpose(q_s.data(), pairs, d, ld_q, q_columns.data(), pairs);
    const auto product = [&](const Buffer<uint32_t>& dz, bool add) {
      const auto* packed = reinterpret_cast<const BFloat16*>(dz.data());
      gemm_bf16(d, padded(columns), pairs, q_columns.data(), pairs, packed, ld, add, dk, padded(n));
    };
    product(high_pairs, add);
    product(low_pairs, true);
  }
  const float* finish_keys_gradient(float* dk) {
    const int64_t d = problem.s.d(), width = padded(n);
    dk_rows.resize(n * d);
    transpose(dk, d, n, width, dk_rows.data(), d);
    round_row<float, float>(dk_rows.data(), n * d, static_cast<float>(problem.s.scale), dk_rows.data());
    return dk_rows.data();
  }
  static bool merges(const Problem&) { return false; }
  static bool sums_in_place(const Problem&) { return false; }
  static void release() { release_bf16(); }
};

}  // namespace
}  // namespace fastkd
