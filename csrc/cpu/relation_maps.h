// Whole maps of small groups, and blocks of large ones that threads share.
#pragma once
#include "cpu/relation_rows.h"
#include "cpu/relation_term.h"
#include "cpu/relation_strips.h"
#include "cpu/relation_panels.h"

namespace fastkd {
namespace {

// The whole maps of a group of few rows, from products of its rows as they lie. With all of W at hand the projection of
// the gradient is a part of it: dS = (W - diag(r_i² Σ_j W_ij <s_i, s_j>)) S.
struct WholeMaps {
  const Term<float>& term;
  int64_t n, pitch;
  bool in_place;  // the gradient is formed where it belongs
  Buffer<float> w, pt, r, q, u;

  // A network's rows: what its map is formed from, and the student's as float32, which W multiplies.
  struct Rows {
    RowMap<float> wide{};
    RowMap<BFloat16> narrow{};  // if its x is null, the map is that of wide
    Buffer<float> copy;
    Buffer<BFloat16> narrow_copy;

    void map(int64_t begin, int64_t end, Ahead& ahead) const {
      if (!narrow.x) return map_rows(wide, begin, end, ahead);
      if (kBf16Products > 1) return emulate(begin, end);
      map_rows(narrow, begin, end, ahead);
    }

    void emulate(int64_t begin, int64_t end) const {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = 0; j <= i; ++j) {
          const auto *x = narrow.x + i * narrow.ld, *y = narrow.x + j * narrow.ld;
          float sum = 0;
          for (int64_t d = 0; d < narrow.D; ++d) sum += static_cast<float>(x[d]) * static_cast<float>(y[d]);
          narrow.out[i * narrow.ldo + j] = narrow.out[j * narrow.ldo + i] = sum;
        }
    }
  } s, t;
  Ahead ahead;
  int64_t g = -1;

  explicit WholeMaps(const Term<float>& term)
      : term(term),
        n(term.s.n),
        pitch(PanelSweep::pitch(n)),
        in_place(term.u && term.s.D % kPanel == 0),
        w(padded(n) * pitch),
        pt(padded(n) * pitch),
        r(padded(n)),
        q(padded(n)) {
    for (float* map : {w.data(), pt.data()}) std::fill_n(map, padded(n) * pitch, 0.f);
    if (term.with_grad() && !in_place) u.resize(n * padded(term.s.D));
  }

  // Returns whether rows are so wide that packing them takes longer than adding up the lanes of every product.
  static bool pay(const Term<float>& term) {
    const int64_t n = term.s.n, bytes = n * std::max(term.s.D, term.t.D) * sizeof(float);
    return n <= kPanelRows && bytes <= kPanelBytes && 2 * n <= term.s.D + term.t.D;
  }

  void load(int64_t group) {
    g = group;
    load(term.s, s, w.data(), term.with_grad());
    load(term.t, t, pt.data(), false);
  }

  void load(const Groups& x, Rows& rows, float* out, bool as_float) {
    const int64_t width = padded(x.D);
    if (in_vectors<BFloat16>(x) && has_bf16_pairs() && term.keeps_its_digits_in_bf16()) {
      rows.narrow = {x.x.const_data_ptr<BFloat16>() + x.offset(g, 0), x.ld(), n, x.D, out, pitch};
      if (x.across) {
        rows.narrow_copy.resize(n * x.D);
        for (int64_t i = 0; i < n; ++i) std::copy_n(rows.narrow.x + i * x.ld(), x.D, rows.narrow_copy.data() + i * x.D);
        rows.narrow.x = rows.narrow_copy.data(), rows.narrow.ld = x.D;
      }
      if (!as_float) return;
    } else if (in_vectors(x) && !x.across) {
      rows.wide = {x.x.const_data_ptr<float>() + x.offset(g, 0), x.ld(), n, width, out, pitch};
      return;
    }
    rows.copy.resize(n * width);
    copy_rows(x, g, 0, n, rows.copy.data());
    rows.wide = {rows.copy.data(), width, n, width, out, pitch};
  }

  // Rows [begin, end) of both maps, as map_rows has them.
  void products(int64_t begin, int64_t end, Ahead& ahead) const {
    s.map(begin, end, ahead);
    t.map(begin, end, ahead);
  }

  // Call this after all products are computed.
  void norms() {
    for (int64_t i = 0; i < n; ++i) {
      r.data()[i] = w.data()[i * (pitch + 1)];
      q.data()[i] = pt.data()[i * (pitch + 1)];
    }
    for (float* squares : {r.data(), q.data()}) invert_norms(squares, n, term.normalize, static_cast<float>(term.eps));
  }

  // Rows [begin, end) of E, W and the gradient. Returns Σ E².
  double rows(int64_t begin, int64_t end, Ahead& ahead) const {
    const float *r_i = r.data() + begin, *q_i = q.data() + begin;
    double sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      float *p = w.data() + i * pitch, *p_t = pt.data() + i * pitch;
      const auto row = with_constant(term.rectify, [&](auto rectify) {
        return whole_row<rectify()>(p, p_t, padded(n), r_i[i - begin], q_i[i - begin], {r.data(), q.data(), term.c});
      });
      sum += static_cast<double>(row.square);
      if (term.normalize) p[i] -= r_i[i - begin] * r_i[i - begin] * row.dot;
    }
    if (!term.with_grad()) return sum;
    const RowMap<float>& x = s.wide;
    const int64_t ld = in_place && term.s.across ? term.s.per_image * x.D : x.D;
    float* out = in_place ? term.u + term.s.token(g, begin) * x.D : u.data() + begin * x.D;
    const Left weights{w.data() + begin * pitch, pitch, 1, n};
    multiply(end - begin, x.D, weights, {x.x, x.ld, kPanel}, {out, ld, in_place && term.add}, ahead);
    if (!in_place || term.add) term.store(g, begin, end, out, ld, term.add ? r_i : nullptr);
    return sum;
  }

  // A whole group; `after` comes next, if there is such a one. Returns Σ E².
  double group(int64_t group, int64_t after) {
    load(group);
    ahead.clear();
    if (in_place) fetch_sums(ahead, term, g, 0, n);
    fetch_rows(ahead, term, after, 0, n);
    const int64_t weighted = term.with_grad() ? term.s.D : 0;
    const auto steps = [](const Rows& x) { return x.narrow.x ? x.narrow.D / 2 : x.wide.D; };
    const double of_products = static_cast<double>(steps(s) + steps(t)) / 2. / (kPanel * kPanel);
    ahead.spread(n * n * (of_products + weighted / static_cast<double>(kTileRows * kTileVectors * kPanel)));
    products(0, n, ahead);
    norms();
    return rows(0, n, ahead);
  }
};

// Groups [0, G), each by one thread with a worker of its own. A thread goes through its share, whose next group it
// knows and fetches, and then helps others with theirs.
template <typename Make>
double whole_groups(const Term<float>& term, int64_t G, int64_t threads, const Make& make_worker) {
  std::vector<double> sums(G);
  std::vector<std::atomic<int64_t>> next(threads);
  for (int64_t k = 0; k < threads; ++k) next[k] = k * G / threads;
  parallel_for(0, threads, 1, [&](int64_t own, int64_t) {
    auto worker = make_worker();
    for (int64_t k = 0; k < threads; ++k) {
      const int64_t share = (own + k) % threads, end = (share + 1) * G / threads;
      for (int64_t g = next[share]++; g < end; g = next[share]++)
        sums[g] = worker.group(g, g + 1 < end ? g + 1 : term.s.G);
    }
  });
  return sum_of(sums);
}

// Groups [first, G) of few rows by all threads: first the maps, then the gradient.
double shared_maps(const Term<float>& term, int64_t first, int64_t threads) {
  constexpr int64_t kRows = 16;  // of a task: whole cache lines also of the columns that mirror them
  const int64_t n = term.s.n, groups = term.s.G - first, strips = (n + kRows - 1) / kRows, tasks = groups * strips;
  std::vector<WholeMaps> maps;
  for (int64_t g = 0; g < groups; ++g) maps.emplace_back(term).load(first + g);
  std::vector<double> sums(tasks);
  const auto each = [&](const auto& f) {
    std::atomic<int64_t> next = tasks;
    parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      Ahead ahead;
      for (int64_t task = --next; task >= 0; task = --next) {  // a map's longest rows first
        const int64_t begin = task / groups * kRows;
        f(task, maps[task % groups], begin, std::min(n, begin + kRows), ahead);
      }
    });
  };
  each([](int64_t, WholeMaps& x, int64_t begin, int64_t end, Ahead& ahead) { x.products(begin, end, ahead); });
  for (auto& x : maps) x.norms();
  each([&](int64_t task, WholeMaps& x, int64_t begin, int64_t end, Ahead& ahead) {
    sums[task] = x.rows(begin, end, ahead);
  });
  return sum_of(sums);
}

// Groups [first, G) by all threads: in each round every block is in exactly one pair, so no two threads write a row.
double shared_groups(const Term<float>& term, int64_t first, int64_t threads) {
  using Block = PanelSweep::Block;
  const int64_t groups = term.s.G - first, panels = padded(term.s.n) / kPanel;
  const int64_t even = 2 * threads / std::gcd(groups, threads);  // blocks that give every thread as many pairs
  const int64_t least = panel_blocks(term);
  const int64_t count = std::min((least + even - 1) / even * even, panels / 2 * 2);
  const int64_t pairs = count / 2, tasks = groups * pairs;
  std::vector<GroupSums> sums;
  sums.reserve(groups);
  for (int64_t g = 0; g < groups; ++g) sums.emplace_back(term).start(term, first + g, count, groups);
  parallel_for(0, groups * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t row = k % panels * kPanel;
      sums[k / panels].widen(row, std::min(term.s.n, row + kPanel));
    }
  });
  std::vector<PanelSweep> sweeps;
  for (int64_t k = 0; k < threads; ++k) sweeps.emplace_back(term, RowBlocks{term.s.n, count});
  // Round robin: one block stays and the others rotate, such that the pairs of round 0 are adjacent.
  const auto pair = [&](int64_t round, int64_t task) -> std::array<Block, 2> {
    const int64_t g = first + task / pairs, k = task % pairs, others = count - 1;
    const auto block = [&](int64_t place) { return Block{g, place < pairs ? 2 * place : 2 * (others - place) + 1}; };
    return {block((round + k) % others), block(k == 0 ? others : (round + others - k) % others)};
  };
  for (int64_t round = 0; round < count - 1; ++round)
    parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        const int64_t from = thread * tasks / threads, to = (thread + 1) * tasks / threads;
        for (int64_t task = from; task < to; ++task) {
          auto& sweep = sweeps[thread];
          auto& own = sums[task / pairs];
          const auto [i, j] = pair(round, task);
          if (round == 0) {
            sweep.diagonal(own, i.k, j);
            sweep.diagonal(own, j.k, i);
          }
          sweep.pair(own, i.k, j.k, task + 1 < to ? pair(round, task + 1) : pair(round + 1, from));
          if (round < count - 2) continue;
          for (const auto& x : {i, j}) sweep.store(own, sweep.blocks.begin(x.k), sweep.blocks.begin(x.k + 1));
        }
      }
    });
  return std::accumulate(sweeps.begin(), sweeps.end(), 0.0, [](double x, const PanelSweep& y) { return x + y.sum; });
}

double tile_panels(const Term<float>& term) {
  const int64_t G = term.s.G, n = term.s.n, threads = get_num_threads();
  const int64_t work = n * n * (3 * term.s.D + term.t.D);
  const bool few_rows = WholeMaps::pay(term);
  // Groups left over after an equal number per thread are shared if that saves more than the waiting costs.
  const bool worth =
      few_rows ? work > kSharedMaps : work > kSharedBlocks && n >= std::max<int64_t>(kSharedRows, kPanel + 1);
  const int64_t whole = worth && G < kFewGroups * threads ? G / threads * threads : G;
  double sum = 0;
  if (whole < G) sum = few_rows ? shared_maps(term, whole, threads) : shared_groups(term, whole, threads);
  if (whole == 0) return sum;
  if (few_rows) return sum + whole_groups(term, whole, threads, [&] { return WholeMaps(term); });
  const RowBlocks blocks{n, panel_blocks(term)};
  return sum + whole_groups(term, whole, threads, [&] { return PanelSweep(term, blocks); });
}

}  // namespace
}  // namespace fastkd
