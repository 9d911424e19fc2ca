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

// A network's rows of a group: how they enter products, and as float32 in whole vectors where they do not lie so.
struct GroupRows {
  const Groups& x;
  int64_t g;
  bool in_words;                // maps are of bfloat16 rows
  const float* wide = nullptr;  // (n, padded(D)): of a group in several blocks, or null

  int64_t width() const { return padded(x.D); }
  // Elements of a row in the products of maps.
  int64_t depth() const { return in_words ? x.D / 2 : width(); }
  // Whether a product may read them where they are: if rows are far apart, every step would touch a page per row.
  bool lies_near() const { return wide != nullptr || (in_vectors(x) && !x.across); }
  const float* row(int64_t i) const { return wide ? wide + i * width() : x.x.const_data_ptr<float>() + x.offset(g, i); }
  const float* words(int64_t i) const {
    return reinterpret_cast<const float*>(x.x.const_data_ptr<BFloat16>() + x.offset(g, i));
  }
};

// Whether maps can be of a network's bfloat16 rows, in words.
bool in_words(const Term<float>& term, const Groups& x) {
  if (!has_bf16_pairs() || !term.keeps_its_digits_in_bf16() || !in_vectors<BFloat16>(x)) return false;
  const auto address = reinterpret_cast<uintptr_t>(x.x.const_data_ptr());
  return address % 4 == 0 && x.ld() % 2 == 0 && x.group_stride % 2 == 0;
}

// Rows of a group, packed, and their inverse norms; as rows too where asked for.
struct PanelRows {
  Buffer<float> panels, inverse, copy, zeros;
  const float *data = nullptr, *words = nullptr;  // as rows
  int64_t ld = 0, words_ld = 0, rows = 0, depth = 0;
  bool is_packed = false, in_words = false;

  // Where they lie, for left operands alone, given their inverse norms; false where they cannot be read there, by maps
  // or, as_rows, by what W multiplies.
  bool refer(const GroupRows& from, int64_t begin, int64_t end, const float* norms, bool as_rows) {
    const Groups& x = from.x;
    in_words = from.in_words;
    if ((in_words && x.across) || ((as_rows || !in_words) && !from.lies_near())) return false;
    rows = end - begin;
    depth = from.depth();
    inverse.resize(padded(rows));
    std::copy_n(norms, rows, inverse.data());
    is_packed = false;
    if (in_words) {
      words = from.words(begin);
      words_ld = x.ld() / 2;
    }
    if (from.lies_near()) {
      data = from.row(begin);
      ld = from.wide ? from.width() : x.ld();
    }
    return true;
  }

  void load(const GroupRows& from, int64_t begin, int64_t end, bool normalize, double eps, bool as_rows) {
    const Groups& x = from.x;
    const int64_t width = from.width();
    rows = end - begin;
    depth = from.depth();
    in_words = from.in_words;
    is_packed = true;
    panels.resize(padded(rows) * depth);
    inverse.resize(padded(rows));
    const bool copies = as_rows ? !from.lies_near() : !in_words && !from.wide && !in_vectors(x);
    if (copies) copy.resize((as_rows ? padded(rows) : kPanel) * width);
    zeros.resize(depth);
    std::fill_n(zeros.data(), depth, 0.f);
    for (int64_t i0 = 0; i0 < rows; i0 += kPanel) {
      const int64_t count = std::min(kPanel, rows - i0);
      const float* block[kPanel];
      std::fill_n(block, kPanel, zeros.data());
      float* copied = copy.data() + (as_rows ? i0 * width : 0);
      if (copies) copy_rows(x, from.g, begin + i0, begin + i0 + count, copied);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = begin + i0 + i;
        block[i] = in_words ? from.words(row) : copies ? copied + i * width : from.row(row);
      }
      const auto pack = in_words ? pack_panel<true> : pack_panel<false>;
      pack(block, depth, panels.data() + i0 * depth, inverse.data() + i0);
    }
    invert_norms(inverse.data(), rows, normalize, static_cast<float>(eps));
    if (!as_rows) return;
    data = copies ? copy.data() : from.row(begin);
    ld = copies || from.wide ? width : x.ld();
  }

  // Rows from i on, of one panel, as the left operand of the products of rows.
  Left left(int64_t i) const {
    if (is_packed) return {panels.data() + i / kPanel * kPanel * depth + i % kPanel, 1, kPanel, depth};
    return in_words ? Left{words + i * words_ld, words_ld, 1, depth} : Left{data + i * ld, ld, 1, depth};
  }
  Right right() const { return {panels.data(), kPanel, kPanel * depth}; }
  Right right_rows() const { return {data, ld, kPanel}; }
};

// What tile_row makes of words.
void emulate_words(int64_t rows, int64_t columns, const Left& a, const Right& b, Out c) {
  const auto number = [](const float* word, int64_t half) {
    return static_cast<float>(reinterpret_cast<const BFloat16*>(word)[half]);
  };
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      float sum = 0;
      for (int64_t k = 0; k < a.count; ++k) {
        const float *x = a.data + i * a.row + k * a.step, *y = b.data + j / kPanel * b.next + k * b.step + j % kPanel;
        for (int64_t half = 0; half < 2; ++half) sum += number(x, half) * number(y, half);
      }
      c.data[i * c.row + j] = sum;
    }
}

// The products of up to kTileRows rows from i on with the columns of `right`, `vectors` of them.
void map_row(
    int64_t rows,
    int64_t vectors,
    const PanelRows& left,
    int64_t i,
    const PanelRows& right,
    Out out,
    Ahead& ahead) {
  if (!right.in_words) {
    tile_row(rows, vectors, left.left(i), {}, right.right(), out, ahead);
  } else if (kBf16Products > 1) {
    emulate_words(rows, vectors * kPanel, left.left(i), right.right(), out);
  } else {
    tile_row<float, true>(rows, vectors, left.left(i), {}, right.right(), out, ahead);
  }
}

// Returns whether tiles of U are accumulated directly in the gradient.
bool sums_in_place(const Term<float>& term) {
  return term.u && term.s.D % kPanel == 0 && !term.s.across;
}

// Fetch `count` rows from `begin` on of a network's group g, where they lie.
void fetch_rows(Ahead& ahead, const Groups& x, int64_t g, int64_t begin, int64_t count) {
  const int64_t size = x.x.element_size();
  if (x.row_stride < x.D || x.x.stride(2) != 1) return;
  const auto* first = static_cast<const char*>(x.x.const_data_ptr()) + x.offset(g, begin) * size;
  if (x.row_stride == x.D) {
    ahead.add(first, count * x.D * size);
  } else {
    ahead.add(first, x.D * size, count, x.row_stride * size);
  }
}

// What is read of rows of both networks,
void fetch_rows(Ahead& ahead, const Term<float>& term, int64_t g, int64_t begin, int64_t count) {
  if (g == term.s.G) return;
  for (const Groups* x : {&term.s, &term.t}) fetch_rows(ahead, *x, g, begin, count);
}

// the same of a group under way,
void fetch_rows(Ahead& ahead, const GroupRows& x, int64_t begin, int64_t count) {
  if (x.wide) ahead.add(x.row(begin), count * x.width() * sizeof(float));
  if (!x.wide || x.in_words) fetch_rows(ahead, x.x, x.g, begin, count);
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

// What the blocks of a group share: its rows, their inverse norms, and where U adds up: the gradient itself where tiles
// fit it.
struct GroupSums {
  GroupRows s, t;
  Buffer<float> r, q, own, wide_s, wide_t;
  float* u = nullptr;
  int64_t ld = 0;

  explicit GroupSums(const Term<float>& term)
      : s{term.s, -1, in_words(term, term.s)}, t{term.t, -1, in_words(term, term.t)} {}

  // Of one of `groups` that are under way; call widen for all rows before they are read.
  void start(const Term<float>& term, int64_t group, int64_t blocks, int64_t groups = 1) {
    s.g = t.g = group;
    r.resize(padded(term.s.n));
    q.resize(padded(term.s.n));
    const bool fits = groups * term.s.n * (s.width() + t.width()) * static_cast<int64_t>(sizeof(float)) <= kWideBytes;
    const auto make_room = [&](GroupRows& x, Buffer<float>& room, bool as_rows) {
      x.wide = nullptr;
      if (blocks == 1 || !fits || x.lies_near() || (x.in_words && !as_rows)) return;
      room.resize(x.x.n * x.width());
      x.wide = room.data();
    };
    make_room(s, wide_s, term.with_grad());
    make_room(t, wide_t, false);
    if (!term.with_grad()) return;
    ld = padded(term.s.D);
    if (sums_in_place(term)) {
      u = term.u + term.s.token(group, 0) * ld;
    } else {
      own.resize(term.s.n * ld);
      u = own.data();
    }
  }

  void widen(int64_t begin, int64_t end) {
    if (s.wide) copy_rows(s.x, s.g, begin, end, wide_s.data() + begin * s.width());
    if (t.wide) copy_rows(t.x, t.g, begin, end, wide_t.data() + begin * t.width());
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
        pt(kTileRows * pitch(blocks.height())),
        whole(term) {}

  // Elements between rows of W: an odd number of cache lines, or a column of it would share a few sets of the cache.
  static int64_t pitch(int64_t columns) { return padded(columns) | kPanel; }

  struct Block {
    int64_t g, k;
  };

  // While `elements` of the maps are formed, each of them known by symmetry to two rows, fetch the rows of the blocks
  // that come next and the gradient that `own` writes first.
  void look_ahead(
      double elements,
      const GroupSums& sums,
      const Block* own,
      torch::headeronly::HeaderOnlyArrayRef<Block> next) {
    ahead.clear();
    if (own && sums_in_place(term)) fetch_sums(ahead, term, own->g, blocks.begin(own->k), blocks.rows(own->k));
    for (const Block& block : next) {
      const int64_t begin = blocks.begin(block.k), count = blocks.rows(block.k);
      if (block.g == sums.s.g) {
        fetch_rows(ahead, sums.s, begin, count);
        fetch_rows(ahead, sums.t, begin, count);
      } else {
        fetch_rows(ahead, term, block.g, begin, count);
      }
    }
    // An element of the maps contributes to two rows.
    const int64_t steps = whole.s.depth() + whole.t.depth() + (term.with_grad() ? 2 * term.s.D : 0);
    ahead.spread(elements * steps / (kTileRows * kTileVectors * kPanel));
  }

  void load(const GroupSums& sums, int64_t k, PanelRows& s, PanelRows& t) {
    const int64_t begin = blocks.begin(k), end = blocks.begin(k + 1);
    s.load(sums.s, begin, end, term.normalize, term.eps, term.with_grad());
    t.load(sums.t, begin, end, term.normalize, term.eps, false);
  }

  // Block j to the right of the products.
  void hold(const GroupSums& sums, int64_t j) {
    if (held_g != sums.s.g || held_j != j) load(sums, j, s_j, t_j);
    held_g = sums.s.g;
    held_j = j;
  }

  // W of a block, s and t its rows, s_j and t_j its columns. A diagonal block is formed up to the panel that each row
  // is in, which its symmetry leaves to know; what lies off the map's diagonal counts twice.
  void maps(const PanelRows& s, const PanelRows& t, bool diagonal) {
    const int64_t ld = pitch(s_j.rows);
    for (int64_t i = 0; i < s.rows; i += kTileRows) {
      const int64_t rows = std::min(kTileRows, s.rows - i), own = i / kPanel * kPanel;
      const int64_t columns = diagonal ? own + kPanel : padded(s_j.rows), twice = diagonal ? own : columns;
      float* p = w.data() + i * ld;
      map_row(rows, columns / kPanel, t, i, t_j, {pt.data(), ld, false}, ahead);
      map_row(rows, columns / kPanel, s, i, s_j, {p, ld, false}, ahead);
      const float *r_i = s.inverse.data() + i, *q_i = t.inverse.data() + i;
      const Scales scales{s_j.inverse.data(), t_j.inverse.data(), term.c};
      sum += static_cast<double>(with_constant(term.rectify, [&](auto rectify) {
        return difference_rows<rectify()>(p, pt.data(), ld, rows, columns, twice, r_i, q_i, scales);
      }));
    }
  }

  // Block j of the diagonal, before others of its row or column: writes its rows of U.
  void diagonal(GroupSums& sums, int64_t j, torch::headeronly::HeaderOnlyArrayRef<Block> next) {
    const Block own{sums.s.g, j};
    hold(sums, j);
    const int64_t n = s_j.rows, begin = blocks.begin(j), ld = pitch(n), width = padded(term.s.D);
    std::copy_n(s_j.inverse.data(), n, sums.r.data() + begin);
    std::copy_n(t_j.inverse.data(), n, sums.q.data() + begin);
    look_ahead(n * n / 2.0, sums, &own, next);
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
    hold(sums, j);
    const int64_t begin = blocks.begin(i), end = blocks.begin(i + 1);
    if (!s_i.refer(sums.s, begin, end, sums.r.data() + begin, term.with_grad()) ||
        !t_i.refer(sums.t, begin, end, sums.q.data() + begin, false))
      load(sums, i, s_i, t_i);
    look_ahead(s_i.rows * s_j.rows, sums, nullptr, next);
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
    if (term.with_grad()) term.store(sums.s.g, begin, end, sums.u + begin * sums.ld, sums.ld, sums.r.data() + begin);
  }

  // A whole group; `after` comes next, if there is such a one. Returns Σ E².
  double group(int64_t g, int64_t after) {
    sum = 0;
    whole.start(term, g, blocks.count);
    whole.widen(0, blocks.n);
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
int64_t panel_blocks(const Term<float>& term) {
  const auto bytes = [&](const Groups& x) -> int64_t {
    return x.D * (in_words(term, x) ? sizeof(BFloat16) : sizeof(float));
  };
  const int64_t n = term.s.n, fit = std::max<int64_t>(kPanelBytes / (bytes(term.s) + bytes(term.t)), 4 * kPanel);
  const int64_t most = std::max<int64_t>(std::min<int64_t>(fit, kPanelRows), kPanel);
  return (n + most - 1) / most;
}

}  // namespace
}  // namespace fastkd
