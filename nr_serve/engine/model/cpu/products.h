// Products of a linear layer in bfloat16, two inputs at a time; sums in float32, rounded once at the end or not at
// all.

#pragma once

#include "operators.h"

#ifdef NR_SERVE_PRODUCTS

#include <immintrin.h>

#include <optional>

#include "vectors.h"

namespace nr_serve {

// A tile of 8 tokens by 3 vectors of outputs: its sums and their operands fill the registers.
constexpr int TILE_TOKENS = 8, TILE_VECTORS = 3;
constexpr int64_t TILE_OUTPUTS = TILE_VECTORS * W;

inline __m512bh pairs(__m512i bits) { return reinterpret_cast<__m512bh>(bits); }

// Outputs y [T, n] of T tokens, from their inputs x [T, pairs]: R vectors of outputs, with weights [pairs, R * W].
// Meanwhile weights at `next` are prefetched into the cache. `sharing` tiles together prefetch as many weights as
// one tile uses, so each prefetches R / sharing vectors per pair: with R = 3, two tiles prefetch 2, 1, 2, 1, ...
// vectors. With `sharing` 0 nothing is prefetched.
template <int T, int R, typename Y>
void multiply_tile(const int32_t* x, int64_t size, const int32_t* weights, const BFloat16* bias, const int32_t* next,
                   int64_t sharing, Y* y, int64_t n) {
  __m512 sums[T][R];
  for (int r = 0; r < R; ++r) {
    const __m512 first = bias ? __m512(load(bias + r * W)) : _mm512_setzero_ps();
    for (int t = 0; t < T; ++t) sums[t][r] = first;
  }
  const int64_t due_a_pair = sharing ? R : 0;  // in units of 1 / `sharing` of a vector
  for (int64_t k = 0, due = 0; k < size; ++k) {
    __m512bh w[R];
    for (int r = 0; r < R; ++r) w[r] = pairs(_mm512_loadu_si512(weights + (k * R + r) * W));
    for (due += due_a_pair; due > 0; due -= sharing, next += W) __builtin_prefetch(next);
    for (int t = 0; t < T; ++t) {
      const __m512bh both = pairs(_mm512_set1_epi32(x[t * size + k]));
      for (int r = 0; r < R; ++r) sums[t][r] = _mm512_dpbf16_ps(sums[t][r], both, w[r]);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) store(y + t * n + r * W, Vec(sums[t][r]));
}

// As `multiply_tile`, for any number of tokens, in tiles whose sizes differ by at most one token. Weights come
// from memory once. Weights of a block that was not `fetched` are prefetched a little ahead, during its first
// tile. The next block's weights, unless this is its thread's `last` block, are prefetched evenly during the
// remaining tiles.
template <int R, typename Y>
void multiply_block(const int32_t* x, int64_t tokens, int64_t size, const int32_t* weights, const BFloat16* bias, Y* y,
                    int64_t n, bool fetched, bool last) {
  const int64_t tiles = (tokens + TILE_TOKENS - 1) / TILE_TOKENS, own = fetched ? 0 : 1, left = tiles - own;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t t = tokens * i / tiles;
    const int32_t* next = weights + (i < own ? 16 * R : R * size + R * size * (i - own) / left) * W;
    with_constant<TILE_TOKENS>(tokens * (i + 1) / tiles - t, [&](auto count) {
      multiply_tile<count(), R>(x + t * size, size, weights, bias, next, i < own ? 1 : last ? 0 : left, y + t * n, n);
    });
  }
}

// x W^T + bias, for x [..., k] and a bias [n]. The weights are packed in blocks of TILE_OUTPUTS outputs, the last
// block smaller if need be, each block [k / 2, outputs, 2]. k is even and positive, n a multiple of W. `type` of
// the result: bfloat16 or float32.
Tensor multiply(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, at::ScalarType type) {
  const int64_t k = x.size(-1);
  TORCH_CHECK(x.is_contiguous() && packed.is_contiguous() && k > 0 && k % 2 == 0);
  const int64_t n = packed.numel() / k, size = k / 2, tokens = x.numel() / k;
  TORCH_CHECK(n % W == 0 && packed.numel() == n * k);
  for (const Tensor* t : {&x, &packed}) TORCH_CHECK(t->scalar_type() == at::kBFloat16);
  TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == n && bias->scalar_type() == at::kBFloat16));
  auto sizes = x.sizes().vec();
  sizes.back() = n;
  Tensor y = x.new_empty(sizes, type);
  const auto* in = static_cast<const int32_t*>(x.const_data_ptr());
  const auto* w = static_cast<const int32_t*>(packed.const_data_ptr());
  const BFloat16* b = bias ? bias->const_data_ptr<BFloat16>() : nullptr;
  with_type(y, [&](auto value) {
    auto* out = y.mutable_data_ptr<decltype(value)>();
    share((n + TILE_OUTPUTS - 1) / TILE_OUTPUTS, grain(TILE_OUTPUTS * k), [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t first = i * TILE_OUTPUTS;
        with_constant<TILE_VECTORS>((n - first) / W, [&](auto vectors) {
          multiply_block<vectors()>(in, tokens, size, w + first * size, b ? b + first : nullptr, out + first, n,
                                    tokens > TILE_TOKENS && i > from, i + 1 == to);
        });
      }
    });
  });
  return y;
}

}  // namespace nr_serve

#endif
