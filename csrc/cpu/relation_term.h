// One relation loss under way: its groups, its sums, and where its gradient goes.
#pragma once
#include "cpu/relation_rows.h"

namespace fastkd {
namespace {

// One term: the maps of a scope, and what they add to U.
template <typename acc_t>
struct Term {
  Groups s, t;
  Rectify rectify = Rectify::kNone;
  acc_t c = 0;           // factor of the gradient
  acc_t* u = nullptr;    // (B, N, Ds), in ds's layout; null where a strip finishes by itself or no gradient is wanted
  bool add = false;      // u holds earlier terms
  Tensor dstudent = {};  // (B, N, Ds) contiguous: takes the finished gradient, where defined
  bool normalize = true;
  double eps = 0;

  bool with_grad() const { return u || dstudent.defined(); }

  // Whether it is all the same that instructions for bfloat16 take sums of products below 1.2e-38 for 0: those of unit
  // rows are of rows that count as 0, and those of raw rows matter by their sign alone, to similarities that are
  // clamped.
  bool keeps_its_digits_in_bf16() const { return normalize ? eps >= 1e-15 : rectify != Rectify::kBoth; }

  // U of rows [begin, end) of group g, complete for this term, to where it belongs; inverse: their inverse norms, null
  // where this term's rows are projected already.
  void store(int64_t g, int64_t begin, int64_t end, acc_t* rows, int64_t ld, const acc_t* inverse) const {
    for (int64_t i = begin; u && i < end; ++i) {
      acc_t *sum = u + s.token(g, i) * s.D, *own = rows + (i - begin) * ld;
      if (own == sum) break;  // added up where it belongs
      if (add) add_row<acc_t>(own, sum, s.D);
      if (!dstudent.defined()) std::copy_n(own, s.D, sum);
    }
    if (dstudent.defined()) finish(g, begin, end, rows, ld, inverse);
  }

  // dstudent of rows [begin, end) of group g from their U (leading dimension ld).
  void finish(int64_t g, int64_t begin, int64_t end, const acc_t* rows, int64_t ld, const acc_t* inverse) const {
    FASTKD_DISPATCH(s.x.scalar_type(), "finish", [&] {
      using stored_t = std::conditional_t<std::is_same_v<scalar_t, Half>, float, scalar_t>;
      const auto* s_ptr = s.x.const_data_ptr<scalar_t>();
      auto* d_ptr = static_cast<stored_t*>(dstudent.mutable_data_ptr());
      const bool project = normalize && inverse != nullptr;
      if (!project && !s.across && ld == s.D)  // one long row
        return round_all<acc_t, stored_t>(rows, (end - begin) * s.D, d_ptr + s.token(g, begin) * s.D);
      Buffer<acc_t> wide;
      if (kIsHalf<scalar_t, acc_t>) wide.resize(s.D);
      for (int64_t i = begin; i < end; ++i) {
        const auto finish = [&](const auto* row, int64_t stride) {
          finish_row<std::decay_t<decltype(*row)>, acc_t, stored_t>(
              rows + (i - begin) * ld,
              row,
              stride,
              s.D,
              project ? inverse[i - begin] : acc_t(1),
              acc_t(1),
              project,
              d_ptr + s.token(g, i) * s.D);
        };
        const scalar_t* row = s_ptr + s.offset(g, i);
        if (!kIsHalf<scalar_t, acc_t> || !project) {
          finish(row, s.x.stride(2));
        } else {
          convert_row<scalar_t, acc_t>(row, s.x.stride(2), s.D, 1, wide.data());
          finish(static_cast<const acc_t*>(wide.data()), 1);
        }
      }
    });
  }
};

}  // namespace
}  // namespace fastkd
