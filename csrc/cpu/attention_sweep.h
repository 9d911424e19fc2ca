// The sweep over strips of query rows, and how heads and rows are dealt to threads.
#pragma once
#include "cpu/attention_rows.h"
#include "cpu/attention_means.h"
#include "cpu/attention_products.h"

namespace fastkd {
namespace {

// Row i of a bias, and which n of all keys its query sees.
struct BiasRow {
  int64_t b, h, i;
  const std::vector<int64_t>& keys;
  int64_t n;

  bool has_first() const { return n > 0 && keys[n - 1] == n - 1; }  // the first n keys of all
};

// Row i of a bias times bias_scale: its first n keys to out, -inf up to whole vectors.
template <typename T>
void load_bias(const Tensor& bias, const BiasRow& row, T bias_scale, T* out) {
  const auto& keys = row.keys;
  const int64_t n = row.n;
  FASTKD_DISPATCH(bias.scalar_type(), "load_bias", [&] {
    const auto* p = bias.const_data_ptr<scalar_t>() + offset(bias, row.b, row.h, row.i, 0);
    const int64_t stride = bias.size(3) == 1 ? 0 : bias.stride(3);
    if (row.has_first()) {
      convert_row<scalar_t, T>(p, stride, n, bias_scale, out);
    } else {
      for (int64_t j = 0; j < n; ++j) out[j] = static_cast<T>(p[keys[j] * stride]) * bias_scale;
    }
  });
  std::fill(out + n, out + padded(n), kNever<T>);
}

template <typename T>
FASTKD_MULTIVERSION void add_bias(T* z, const T* bias, T m, int64_t n, T scale) {
  for (int64_t j = 0; j < n; ++j) z[j] = z[j] * scale + (bias[j] - m);
}

template <typename T>
void add_bias_gradient(const Problem& problem, const BiasRow& row, const T* dz) {
  T* out = problem.dbias.mutable_data_ptr<T>() + offset(problem.dbias, row.b, row.h, row.i, 0);
  const T scale = static_cast<T>(problem.bias_scale);
  if (problem.dbias.size(3) == 1) {
    *out += std::accumulate(dz, dz + row.n, T(0)) * scale;
  } else if (row.has_first()) {
    add_scaled_row<T>(out, dz, scale, row.n);
  } else {
    for (int64_t j = 0; j < row.n; ++j) out[row.keys[j]] += dz[j] * scale;
  }
}

// A thread's work: the strips of its tasks.
template <typename Products>
struct Sweep {
  using T = typename Products::acc_t;
  const Problem& problem;
  int64_t most_rows;
  Products products;
  Buffer<T> z_s, z_t, room, bias, w;
  std::vector<int64_t> keys;
  std::vector<T> zeros;
  Task task{};

  struct Stream {
    const char* data;
    int64_t rows, stride, bytes;
  };
  std::vector<Stream> streams;  // rows of the next task, fetched while this one's are computed

  static int64_t heads_together(const Problem& problem) {
    return problem.mean_heads ? problem.s.H() + problem.t.H() : 2;
  }

  static int64_t rows_of_strip(const Problem& problem) {
    const int64_t row = padded(problem.N_k()) * heads_together(problem) * Products::bytes_per_score() / 2;
    const auto fit = [&](int64_t bytes) { return bytes / std::max<int64_t>(row, 1); };
    const int64_t rows =
        std::max({fit(kStripBytes), std::min<int64_t>(fit(kSpilledBytes), kFewRows), int64_t(kLeastRows)});
    return std::min({rows, int64_t(kMostRows), problem.N_q()});
  }

  explicit Sweep(const Problem& problem)
      : problem(problem), most_rows(rows_of_strip(problem)), products(problem, most_rows), zeros(problem.s.d()) {}
  ~Sweep() { Products::release(); }

  int64_t heads() const { return problem.mean_heads ? problem.s.H() : 1; }

  void load(const Task& task) {
    this->task = task;
    keys = problem.keys(task.b);
    products.load(task, keys);
    const int64_t ld = pitch_of(keys.size()), heads_s = heads(), heads_t = problem.mean_heads ? problem.t.H() : 1;
    z_s.resize(heads_s * most_rows * ld);
    z_t.resize(heads_t * most_rows * ld);
    room.resize((kMostBlock + 1) * ld);
    bias.resize(ld);
    w.resize(most_rows);
  }

  // Scores of a row made ready: the bias added, -inf up to whole vectors. Returns what is left to scale them by.
  T prepare_row(bool student, int64_t h, int64_t i, int64_t visible, T* z) {
    const Network& x = student ? problem.s : problem.t;
    T scale = products.scale_of_scores(student);
    if (x.bias) {
      const T bias_scale = static_cast<T>(problem.bias_scale);
      load_bias<T>(*x.bias, {task.b, task.h + h, i, keys, visible}, bias_scale, bias.data());
      // Subtract the bias's maximum, like the keys' mean, to avoid cancellation.
      const T m = problem.has_softmax() ? max_row<T>(bias.data(), padded(visible)) : T(0);
      add_bias<T>(z, bias.data(), m, visible, scale);
      scale = 1;
    }
    std::fill(z + visible, z + padded(visible), kNever<T>);
    return scale;
  }

  void announce(const Task* next) {
    streams.clear();
    if (!next) return;
    for (const Network* x : {&problem.s, &problem.t})
      for (const Tensor* y : {&x->q, &x->k}) {
        if (y->size(2) > kPrefetchedRows || (y == &x->k && y->is_same(x->q))) continue;
        const int64_t size = y->element_size(), first = next->b * y->stride(0) + next->h * y->stride(1);
        const char* data = static_cast<const char*>(y->const_data_ptr()) + first * size;
        streams.push_back({data, y->size(2), y->stride(2) * size, y->size(3) * size});
      }
  }

  // Row i of the next task's operands, on its way to L2.
  void prefetch(int64_t i) const {
    for (const Stream& x : streams)
      if (i < x.rows)
        for (int64_t c = 0; c < x.bytes; c += 64) __builtin_prefetch(x.data + i * x.stride + c, 0, 2);
  }

  // Of the task, among the losses.
  int64_t first_row() const { return (task.b * problem.H_out() + task.h) * problem.N_q(); }

  // Rows [i0, i0 + rows): their losses, and dz in the place of the student's scores. Returns the sum of the losses.
  double rows_of(int64_t i0, int64_t rows, int64_t ld) {
    const int64_t heads_t = problem.mean_heads ? problem.t.H() : 1, stride = most_rows * ld;
    const T N_k = static_cast<T>(problem.N_k());
    T* losses = problem.rows.defined() ? problem.rows.mutable_data_ptr<T>() + first_row() : nullptr;
    double sum = 0;
    const auto take = [&](int64_t i, T loss) {
      sum += static_cast<double>(loss);
      if (losses) losses[i0 + i] = loss;
    };
    Row<T> block[kMostBlock];
    int64_t count = 0;
    const int64_t fit = kBlockBytes / (3 * std::max(ld, kLanes) * sizeof(T));
    const int64_t block_rows = std::clamp<int64_t>(fit, 1, std::min<int64_t>(kBlock, kMostBlock));
    T scale_s = 1, scale_t = 1;
    for (int64_t i = 0; i < rows; ++i) {
      prefetch(i0 + i);
      const int64_t visible = problem.visible(keys, i0 + i);
      const T weight = w.data()[i];
      T *s = z_s.data() + i * ld, *t = z_t.data() + i * ld;
      if (weight == 0 || visible == 0) {
        for (int64_t h = 0; h < heads(); ++h) std::fill_n(s + h * stride, ld, T(0));
        take(i, 0);
      } else {
        for (int64_t h = 0; h < heads(); ++h) scale_s = prepare_row(true, h, i0 + i, visible, s + h * stride);
        for (int64_t h = 0; h < heads_t; ++h) scale_t = prepare_row(false, h, i0 + i, visible, t + h * stride);
        if (problem.mean_heads) {
          take(
              i,
              weight * head_mean_loss<T>(
                           problem.divergence, s, heads(), t, heads_t, stride, visible, N_k, weight, room.data()));
          for (int64_t h = 0; h < heads(); ++h) std::fill(s + h * stride + visible, s + h * stride + ld, T(0));
        } else if (problem.has_softmax()) {
          block[count] = {s, t, room.data() + count * ld, room.data() + kMostBlock * ld, i, visible, weight, 0, 0, {}};
          ++count;
        } else {
          take(i, weight * score_row<T>(s, t, padded(visible), scale_s, scale_t, N_k, weight));
          std::fill(s + visible, s + ld, T(0));
        }
      }
      if (count == block_rows || (count > 0 && i + 1 == rows)) {
        begin_rows<T>(problem.divergence, block, count, scale_s, scale_t);
        for (const Row<T>* row = block; row < block + count; ++row) {
          take(row->i, row->w * finish_row<T>(problem.divergence, *row, N_k));
          std::fill(row->s + row->keys, row->s + ld, T(0));
        }
        count = 0;
      }
    }
    return sum;
  }

  // The gradients of a strip; dk: sums of each head's, or null; dq: (heads, N_q, d) where they are to be added to dk.
  void gradients(int64_t i0, int64_t rows, int64_t columns, int64_t ld, bool add, T* dk, T* dq) {
    const int64_t d = problem.s.d(), N_q = problem.N_q();
    const bool merges = dk && Products::merges(problem);
    T* out = nullptr;  // of dQ, where it needs no rounding
    if (merges) {
      out = dk + i0 * d;
    } else if (dq) {
      out = dq + i0 * d;
    } else if (problem.dq.defined() && problem.dq.scalar_type() == CppTypeToScalarType<T>::value) {
      out = problem.dq.mutable_data_ptr<T>() + ((task.b * problem.s.H() + task.h) * N_q + i0) * d;
    }
    for (int64_t h = 0; h < heads(); ++h) {
      T* dz = z_s.data() + h * most_rows * ld;
      if (problem.dbias.defined())
        for (int64_t i = 0; i < rows; ++i)
          add_bias_gradient<T>(problem, {task.b, task.h + h, i0 + i, keys, columns}, dz + i * ld);
      if (columns > 0) products.prepare_gradient(rows, columns, dz, ld);
      if (dk && columns > 0) products.keys_gradient(h, rows, columns, dz, ld, add, dk + h * products.dk_size());
      if (!problem.dq.defined() || (merges && columns == 0)) continue;
      T* out_h = out ? out + h * N_q * d : nullptr;
      std::pair<const T*, int64_t> product(zeros.data(), 0);
      if (columns > 0) product = products.queries_gradient(h, rows, columns, dz, ld, merges, out_h);
      const auto [u, ldu] = product;
      for (int64_t i = 0; i < rows && u != out_h; ++i) {
        if (out_h) {
          std::copy_n(u + i * ldu, d, out_h + i * d);
        } else {
          store_row<T>(problem.dq, task.b, task.h + h, i0 + i, u + i * ldu, 1);
        }
      }
    }
  }

  // Rows [begin, end) of the task. Fills dk with their sums, and their part of dq; returns the sum of the losses.
  double run(int64_t begin, int64_t end, T* dk, T* dq) {
    const int64_t strips = (end - begin + most_rows - 1) / most_rows, ld = pitch_of(keys.size());
    const T factor = static_cast<T>(problem.factor);
    const T* weights = problem.weight.const_data_ptr<T>();
    double sum = 0;
    const bool adds = problem.causal || keys.empty();  // no strip writes every key's sums first
    if (dk && adds) std::fill_n(dk, heads() * products.dk_size(), T(0));
    for (int64_t k = 0; k < strips; ++k) {
      const int64_t i0 = begin + (end - begin) * k / strips, rows = begin + (end - begin) * (k + 1) / strips - i0;
      const int64_t columns = problem.visible(keys, i0 + rows - 1);
      for (int64_t i = 0; i < rows; ++i)
        w.data()[i] = weights[offset(problem.weight, task.b, task.h, i0 + i, 0)] * factor;
      if (columns > 0) {
        for (int64_t h = 0; h < heads(); ++h)
          products.scores(true, h, i0, rows, columns, w.data(), z_s.data() + h * most_rows * ld, ld);
        for (int64_t h = 0; h < (problem.mean_heads ? problem.t.H() : 1); ++h)
          products.scores(false, h, i0, rows, columns, w.data(), z_t.data() + h * most_rows * ld, ld);
      }
      sum += rows_of(i0, rows, ld);
      if (problem.with_grad()) gradients(i0, rows, columns, ld, adds || k > 0, dk, dq);
    }
    return sum;
  }

  // The task's dK from its sums, and where keys are the queries the whole gradient.
  void finish(T* dk, T* dq) {
    const int64_t d = problem.s.d();
    const Tensor& out = problem.shared ? problem.dq : problem.dk;
    for (int64_t h = 0; h < heads(); ++h) {
      const T* rows = products.finish_keys_gradient(dk + h * products.dk_size());
      if (dq) {
        T* all = dq + h * problem.N_q() * d;
        for (size_t j = 0; j < keys.size(); ++j) add_row<T>(all + keys[j] * d, rows + j * d, d);
        for (int64_t i = 0; i < problem.N_q(); ++i) store_row<T>(problem.dq, task.b, task.h + h, i, all + i * d, 1);
      } else {
        size_t j = 0;
        for (int64_t i = 0; i < problem.N_k(); ++i) {
          const bool is_seen = j < keys.size() && keys[j] == i;
          store_row<T>(out, task.b, task.h + h, i, is_seen ? rows + j * d : zeros.data(), 1);
          j += is_seen;
        }
      }
    }
  }
};

// Chains of tasks that may run side by side, in waves that follow each other. Tasks that add to the same elements of
// the bias' gradient are in one chain, or, where those would be too few for the threads, in different waves.
std::vector<std::vector<std::vector<Task>>> waves(const Problem& problem) {
  const int64_t B = problem.B(), H = problem.H_out();
  const bool b_meet = problem.dbias.defined() && problem.dbias.size(0) == 1;
  const bool h_meet = problem.dbias.defined() && problem.dbias.size(1) == 1;
  const int64_t apart = (b_meet ? 1 : B) * (h_meet ? 1 : H);
  const bool chained = apart >= get_num_threads();
  std::vector<std::vector<std::vector<Task>>> out(chained ? 1 : B * H / apart);
  for (auto& wave : out) wave.resize(apart);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h) {
      const int64_t wave = (b_meet ? b : 0) * (h_meet ? H : 1) + (h_meet ? h : 0);
      out[chained ? 0 : wave][(b_meet ? 0 : b) * (h_meet ? 1 : H) + (h_meet ? 0 : h)].push_back({b, h});
    }
  return out;
}

// Returns the number of row ranges per task, so that all threads have work.
int64_t parts_of(const Problem& problem, int64_t tasks) {
  const int64_t threads = get_num_threads();
  if (tasks % threads == 0 || tasks >= 4 * threads) return 1;
  if (problem.dbias.defined() && problem.dbias.size(2) == 1) return 1;  // ranges of rows would meet
  return std::min((4 * threads + tasks - 1) / tasks, (problem.N_q() + kFewestRows - 1) / kFewestRows);
}

// Returns the sum of the losses.
template <typename Products>
double sweep(const Problem& problem) {
  using T = typename Products::acc_t;
  const int64_t N_q = problem.N_q(), heads = problem.mean_heads ? problem.s.H() : 1;
  const int64_t dk_size = heads * Products(problem, 0).dk_size();
  const int64_t dq_size = problem.shared && !Products::merges(problem) ? heads * N_q * problem.s.d() : 0;
  double total = 0;
  for (const auto& chains : waves(problem)) {
    const int64_t n = chains.size(), parts = chains[0].size() == 1 ? parts_of(problem, n) : 1;
    std::vector<double> sums(n * parts);
    if (parts == 1) {
      parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
        Sweep<Products> sweep(problem);
        const bool in_place = Products::sums_in_place(problem);
        const Tensor& out = problem.shared ? problem.dq : problem.dk;
        Buffer<T> dk(problem.with_dk() && !in_place ? dk_size : 0), dq(problem.with_dk() ? dq_size : 0);
        for (int64_t k = begin; k < end; ++k)
          for (size_t i = 0; i < chains[k].size(); ++i) {
            const Task& task = chains[k][i];
            sweep.load(task);
            sweep.announce(i + 1 < chains[k].size() ? &chains[k][i + 1] : k + 1 < end ? &chains[k + 1][0] : nullptr);
            if (in_place) {
              const int64_t first = task.b * problem.s.H() + task.h;
              sums[k] += sweep.run(0, N_q, out.mutable_data_ptr<T>() + first * (dk_size / heads), nullptr);
              continue;
            }
            sums[k] += sweep.run(0, N_q, dk.data(), dq.data());
            if (dk.data()) sweep.finish(dk.data(), dq.data());
          }
      });
    } else {
      Buffer<T> dk(problem.with_dk() ? n * parts * dk_size : 0), dq(problem.with_dk() ? n * dq_size : 0);
      parallel_for(0, n * parts, 1, [&](int64_t begin, int64_t end) {
        Sweep<Products> sweep(problem);
        for (int64_t k = begin; k < end; ++k) {
          const int64_t task = k / parts, part = k % parts;
          if (part == 0 || k == begin) sweep.load(chains[task][0]);
          T* dk_k = dk.data() ? dk.data() + k * dk_size : nullptr;
          T* dq_k = dq.data() ? dq.data() + task * dq_size : nullptr;
          sums[k] = sweep.run(part * N_q / parts, (part + 1) * N_q / parts, dk_k, dq_k);
        }
      });
      if (dk.data()) {
        parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
          Sweep<Products> sweep(problem);
          for (int64_t k = begin; k < end; ++k) {
            T* first = dk.data() + k * parts * dk_size;
            for (int64_t part = 1; part < parts; ++part) add_row<T>(first, first + part * dk_size, dk_size);
            sweep.task = chains[k][0];
            sweep.keys = problem.keys(sweep.task.b);
            sweep.products.n = sweep.keys.size();
            sweep.finish(first, dq.data() ? dq.data() + k * dq_size : nullptr);
          }
        });
      }
    }
    total += std::accumulate(sums.begin(), sums.end(), 0.0);
  }
  return total;
}

}  // namespace
}  // namespace fastkd
