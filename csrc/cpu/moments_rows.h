// Moments of channels whose positions lie along rows.
#pragma once
#include "cpu/moments_blocks.h"

namespace fastkd {
namespace {

// Mean and Σ (x - mean)² of each of C <= kMostGroup channels.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void row_moments(const Elements<scalar_t> in, const Output<scalar_t, acc_t> out, const Sums to) {
  const auto [x, B, C, H, W, s] = in;
  scalar_t held[kMostBlock];
  acc_t wide[kIsHalf<scalar_t, acc_t> ? kMostBlock : 1];
  Moments moments[kMostGroup];
  Block<acc_t> blocks[kMostGroup];
  const int64_t most = std::min<int64_t>(kBlock, kMostBlock);
  for (int64_t c = 0; c < C; ++c) {
    moments[c] = {0, 0, 0};
    blocks[c].n = 0;
  }
  // Of rows that follow each other, how many elements, and how far ahead of them memory is asked for the next.
  const int64_t span = H == 1 && is_dense(s, W) ? C * W : 0, ahead = std::min<int64_t>(span, 2048);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t c = 0; c < C; ++c)
        for (int64_t i = 0; i < W; i += most) {
          const int64_t m = std::min(most, W - i);
          const scalar_t* p = x + b * s.b + h * s.h + c * s.c + i * s.w;
          const scalar_t* v = p;
          if (s.w != 1) {
            for (int64_t k = 0; k < m; ++k) held[k] = p[k * s.w];
            v = held;
          }
          Block<acc_t>& block = blocks[c];
          if (!block.has_room(m)) block.merge_into(moments + c);
          const int64_t to_end = span - c * W - i;
          const scalar_t* next = p + (to_end > ahead ? ahead : span == 0 ? m : ahead + s.b - span);
          if constexpr (kIsHalf<scalar_t, acc_t>) {
            prefetch(next, m);
            convert_row<scalar_t, acc_t>(v, 1, m, 1, wide);
            block.add(wide, m, wide);
          } else {
            block.add(v, m, next);
          }
          if (out.y != nullptr) {
            const acc_t alpha = out.alpha[c], beta = out.beta[c];
            scalar_t* y = out.y + b * out.s.b + h * out.s.h + c * out.s.c + i * out.s.w;
            for (int part = 0; part < 2; ++part) {
              const auto [from, to] = span_of(m, part);
              if (out.s.w == 1) {
                for (int64_t k = from; k < to; ++k)
                  y[k] = static_cast<scalar_t>(alpha * static_cast<acc_t>(v[k]) + beta);
              } else {
                for (int64_t k = from; k < to; ++k)
                  y[k * out.s.w] = static_cast<scalar_t>(alpha * static_cast<acc_t>(v[k]) + beta);
              }
            }
          }
        }
  for (int64_t c = 0; c < C; ++c) {
    if (blocks[c].n > 0) blocks[c].merge_into(moments + c);
    to.mean[c] = moments[c].mean;
    to.m2[c] = moments[c].m2;
  }
}

}  // namespace
}  // namespace fastkd
