// Maps in square blocks, whose products our own kernels form.
#pragma once
#include "cpu/relation_rows.h"
#include "cpu/relation_term.h"

namespace fastkd {
namespace {

// The maps of a group in square blocks: whole panels of rows, as even as possible.
struct RowBlocks {
  int64_t n, count;

  int64_t begin(int64_t k) const { return std::min(n, padded(n) / kPanel * k / count * kPanel); }
  int64_t rows(int64_t k) const { return begin(k + 1) - begin(k); }
  int64_t height() const { return (padded(n) / kPanel + count - 1) / count * kPanel; }
};

// Whether rows are whole vectors of T where they lie.
template <typename T = float>
bool in_vectors(const Groups& x) {
  return x.in_place(CppTypeToScalarType<T>::value) && x.D % kWidth<T> == 0;
}

// Rows [begin, end) of group g as whole vectors.
void copy_rows(const Groups& x, int64_t g, int64_t begin, int64_t end, float* out) {
  const int64_t width = padded(x.D);
  convert_rows<float>(x, g, begin, end, nullptr, out, width);
  for (int64_t i = begin; i < end && x.D < width; ++i) std::fill_n(out + (i - begin) * width + x.D, width - x.D, 0.f);
}

// Inverse norms of `count` rows from the squares of theirs, up to a whole panel.
FASTKD_MULTIVERSION void invert_norms(float* squares, int64_t count, bool normalize, float eps) {
  for (int64_t i = 0; i < count; ++i) {
    const float inverse = inverse_of(std::sqrt(squares[i]), eps);
    squares[i] = normalize ? inverse : 1.f;
  }
  std::fill(squares + count, squares + padded(count), 0.f);
}

// Rows of a group, packed, and their inverse norms; as rows too where asked for.
struct PanelRows {
  Buffer<float> panels, inverse, copy, zeros;
  const float* data = nullptr;  // as rows
  int64_t ld = 0, rows = 0, width = 0;
  bool is_packed = false;

  // Where they lie, for left operands alone, given their inverse norms; false where they cannot be read there.
  bool refer(const Groups& x, int64_t g, int64_t begin, int64_t end, const float* norms) {
    if (!in_vectors(x) || x.across) return false;
    rows = end - begin;
    width = x.D;
    inverse.resize(padded(rows));
    std::copy_n(norms, rows, inverse.data());
    data = x.x.const_data_ptr<float>() + x.offset(g, begin);
    ld = x.ld();
    is_packed = false;
    return true;
  }

  void load(const Groups& x, int64_t g, int64_t begin, int64_t end, bool normalize, double eps, bool as_rows) {
    rows = end - begin;
    width = padded(x.D);
    is_packed = true;
    panels.resize(padded(rows) * width);
    inverse.resize(padded(rows));
    // If rows are far apart, every step of a product would touch a page per row.
    const bool copies = !in_vectors(x) || (as_rows && x.across);
    if (copies) copy.resize((as_rows ? padded(rows) : kPanel) * width);
    zeros.resize(width);
    std::fill_n(zeros.data(), width, 0.f);
    for (int64_t i0 = 0; i0 < rows; i0 += kPanel) {
      const int64_t count = std::min(kPanel, rows - i0);
      const float* block[kPanel];
      std::fill_n(block, kPanel, zeros.data());
      float* copied = copy.data() + (as_rows ? i0 * width : 0);
      if (copies) copy_rows(x, g, begin + i0, begin + i0 + count, copied);
      for (int64_t i = 0; i < count; ++i)
        block[i] = copies ? copied + i * width : x.x.const_data_ptr<float>() + x.offset(g, begin + i0 + i);
      pack_panel(block, width, panels.data() + i0 * width, inverse.data() + i0);
    }
    invert_norms(inverse.data(), rows, normalize, static_cast<float>(eps));
    if (!as_rows) return;
    data = copies ? copy.data() : x.x.const_data_ptr<float>() + x.offset(g, begin);
    ld = copies ? width : x.ld();
  }

  // Rows from i on, of one panel, as the left operand of the products of rows.
  Left left(int64_t i) const {
    if (!is_packed) return {data + i * ld, ld, 1, width};
    return {panels.data() + i / kPanel * kPanel * width + i % kPanel, 1, kPanel, width};
  }
  Right right() const { return {panels.data(), kPanel, kPanel * width}; }
  Right right_rows() const { return {data, ld, kPanel}; }
};

// Returns whether tiles of U are accumulated directly in the gradient.
bool sums_in_place(const Term<float>& term) {
  return term.u && term.s.D % kPanel == 0 && !term.s.across;
}

// Fetch `count` rows from `begin` on of group g: what they read,
void fetch_rows(Ahead& ahead, const Term<float>& term, int64_t g, int64_t begin, int64_t count) {
  if (g == term.s.G) return;
  for (const Groups* x : {&term.s, &term.t}) {
    const int64_t size = x->x.element_size();
    if (x->row_stride < x->D || x->x.stride(2) != 1) continue;
    const auto* first = static_cast<const char*>(x->x.const_data_ptr()) + x->offset(g, begin) * size;
    if (x->row_stride == x->D) {
      ahead.add(first, count * x->D * size);
    } else {
      ahead.add(first, x->D * size, count, x->row_stride * size);
    }
  }
}

// and what they write where sums add up in the gradient itself.
void fetch_sums(Ahead& ahead, const Term<float>& term, int64_t g, int64_t begin, int64_t count) {
  const int64_t bytes = term.s.D * sizeof(float);
  const float* first = term.u + term.s.token(g, begin) * term.s.D;
  if (term.s.across) {
    ahead.add(first, bytes, count, term.s.per_image * bytes);
  } else {
    ahead.add(first, count * bytes);
  }
}

// Multiply-adds per element of the maps, each of which contributes to two rows.
int64_t element_products(const Term<float>& term) {
  return term.s.D + term.t.D + (term.with_grad() ? 2 * term.s.D : 0);
}

// What the blocks of a group share: its inverse norms, and where U adds up: the gradient itself where tiles fit it.
struct GroupSums {
  Buffer<float> r, q, own;
  float* u = nullptr;
  int64_t g = -1, ld = 0;

  void start(const Term<float>& term, int64_t group) {
    g = group;
    r.resize(padded(term.s.n));
    q.resize(padded(term.s.n));
    if (!term.with_grad()) return;
    ld = padded(term.s.D);
    if (sums_in_place(term)) {
      u = term.u + term.s.token(g, 0) * ld;
    } else {
      own.resize(term.s.n * ld);
      u = own.data();
    }
  }
};

// A thread's work in float32, on kernels of our own: blocks of the maps, each of which serves the rows of both sides.
struct PanelSweep {
  const Term<float>& term;
  RowBlocks blocks;
  PanelRows s_i, t_i, s_j, t_j;
  int64_t held_g = -1, held_j = -1;  // whose rows s_j and t_j are
  Buffer<float> w, pt;
  Ahead ahead;
  double sum = 0;   // Σ E²
  GroupSums whole;  // of a group that is this thread's alone

  PanelSweep(const Term<float>& term, RowBlocks blocks)
      : term(term),
        blocks(blocks),
        w(blocks.height() * pitch(blocks.height())),
        pt(kTileRows * pitch(blocks.height())) {}

  // Elements between rows of W: an odd number of cache lines, or a column of it would share a few sets of the cache.
  static int64_t pitch(int64_t columns) { return padded(columns) | kPanel; }

  struct Block {
    int64_t g, k;
  };

  // While `elements` of the maps are formed, each of them known by symmetry to two rows, fetch the rows of the blocks
  // that come next and the gradient that `own` writes first.
  void look_ahead(double elements, const Block* own, torch::headeronly::HeaderOnlyArrayRef<Block> next) {
    ahead.clear();
    if (own && sums_in_place(term)) fetch_sums(ahead, term, own->g, blocks.begin(own->k), blocks.rows(own->k));
    for (const Block& block : next) fetch_rows(ahead, term, block.g, blocks.begin(block.k), blocks.rows(block.k));
    ahead.spread(elements * element_products(term) / (kTileRows * kTileVectors * kPanel));
  }

  void load(Block block, PanelRows& s, PanelRows& t) {
    const int64_t begin = blocks.begin(block.k), end = blocks.begin(block.k + 1);
    s.load(term.s, block.g, begin, end, term.normalize, term.eps, term.with_grad());
    t.load(term.t, block.g, begin, end, term.normalize, term.eps, false);
  }

  // Block j to the right of the products.
  void hold(Block j) {
    if (held_g != j.g || held_j != j.k) load(j, s_j, t_j);
    held_g = j.g;
    held_j = j.k;
  }

  // W of a block, s and t its rows, s_j and t_j its columns. A diagonal block is formed up to the panel that each row
  // is in, which its symmetry leaves to know; what lies off the map's diagonal counts twice.
  void maps(const PanelRows& s, const PanelRows& t, bool diagonal) {
    const int64_t ld = pitch(s_j.rows);
    for (int64_t i = 0; i < s.rows; i += kTileRows) {
      const int64_t rows = std::min(kTileRows, s.rows - i), own = i / kPanel * kPanel;
      const int64_t columns = diagonal ? own + kPanel : padded(s_j.rows), twice = diagonal ? own : columns;
      float* p = w.data() + i * ld;
      tile_row(rows, columns / kPanel, t.left(i), {}, t_j.right(), {pt.data(), ld, false}, ahead);
      tile_row(rows, columns / kPanel, s.left(i), {}, s_j.right(), {p, ld, false}, ahead);
      const float *r_i = s.inverse.data() + i, *q_i = t.inverse.data() + i;
      const Scales scales{s_j.inverse.data(), t_j.inverse.data(), term.c};
      sum += static_cast<double>(with_constant(term.rectify, [&](auto rectify) {
        return difference_rows<rectify()>(p, pt.data(), ld, rows, columns, twice, r_i, q_i, scales);
      }));
    }
  }

  // Block j of the diagonal, before others of its row or column: writes its rows of U.
  void diagonal(GroupSums& sums, int64_t j, torch::headeronly::HeaderOnlyArrayRef<Block> next) {
    const Block own{sums.g, j};
    hold(own);
    const int64_t n = s_j.rows, begin = blocks.begin(j), ld = pitch(n), width = padded(term.s.D);
    std::copy_n(s_j.inverse.data(), n, sums.r.data() + begin);
    std::copy_n(t_j.inverse.data(), n, sums.q.data() + begin);
    look_ahead(n * n / 2.0, &own, next);
    maps(s_j, t_j, true);
    if (!term.with_grad()) return;
    const bool add = term.add && sums_in_place(term);
    for (int64_t i = 0; i < n; i += kTileRows) {
      const int64_t rows = std::min(kTileRows, n - i), known = std::min(n, i / kPanel * kPanel + kPanel);
      const Left row{w.data() + i * ld, ld, 1, known}, column{w.data() + known * ld + i, 1, ld, n - known};
      float* u = sums.u + (begin + i) * sums.ld;
      tile_row(rows, width / kPanel, row, column, s_j.right_rows(), {u, sums.ld, add}, ahead);
    }
  }

  // Blocks (i, j) and, by symmetry, (j, i).
  void pair(GroupSums& sums, int64_t i, int64_t j, torch::headeronly::HeaderOnlyArrayRef<Block> next) {
    hold({sums.g, j});
    const int64_t begin = blocks.begin(i), end = blocks.begin(i + 1);
    if (!s_i.refer(term.s, sums.g, begin, end, sums.r.data() + begin) ||
        !t_i.refer(term.t, sums.g, begin, end, sums.q.data() + begin))
      load({sums.g, i}, s_i, t_i);
    look_ahead(s_i.rows * s_j.rows, nullptr, next);
    maps(s_i, t_i, false);
    if (!term.with_grad()) return;
    const int64_t ld = pitch(s_j.rows);
    const int64_t width = padded(term.s.D);
    const auto add = [&](const Left& weights, const PanelRows& to, const PanelRows& from, int64_t first) {
      multiply(to.rows, width, weights, from.right_rows(), {sums.u + first * sums.ld, sums.ld, true}, ahead);
    };
    add({w.data(), ld, 1, s_j.rows}, s_i, s_j, begin);
    add({w.data(), 1, ld, s_i.rows}, s_j, s_i, blocks.begin(j));
  }

  // Rows of U that are complete.
  void store(const GroupSums& sums, int64_t begin, int64_t end) const {
    if (term.with_grad()) term.store(sums.g, begin, end, sums.u + begin * sums.ld, sums.ld, sums.r.data() + begin);
  }

  // A whole group; `after` comes next, if there is such a one. Returns Σ E².
  double group(int64_t g, int64_t after) {
    sum = 0;
    whole.start(term, g);
    const auto block = [&](int64_t k) { return k < blocks.count ? Block{g, k} : Block{after, 0}; };
    for (int64_t j = 0; j < blocks.count; ++j) {
      diagonal(whole, j, block(j == 0 ? 1 : 0));
      for (int64_t i = 0; i < j; ++i) pair(whole, i, j, block(i + 1 < j ? i + 1 : j + 1));
    }
    store(whole, 0, blocks.n);
    return sum;
  }
};

// Returns the number of blocks whose panels fit in L2.
int64_t panel_blocks(int64_t n, int64_t width) {
  const int64_t fit = std::max<int64_t>(kPanelBytes / (width * sizeof(float)), 4 * kPanel);
  const int64_t most = std::max<int64_t>(std::min<int64_t>(fit, kPanelRows), kPanel);
  return (n + most - 1) / most;
}

}  // namespace
}  // namespace fastkd
