// Products of a linear layer in bfloat16, two inputs at a time, for any number of tokens.

#pragma once

#include "operators.h"

#ifdef NR_SERVE_PRODUCTS

#include <optional>

#include "tiles.h"

namespace nr_serve {

// R vectors of outputs of all tokens. Weights come from memory once. Weights of a block that was not `fetched` are
// prefetched a little ahead, during its first tile. The next block's weights, unless this is its thread's `last`
// block, are prefetched evenly during the remaining tiles.
template <int R, typename Y>
void multiply_block(const Tiles& tiles, const int32_t* x, int64_t size, const int32_t* weights, const BFloat16* bias,
                    Y* y, int64_t n, bool fetched, bool last) {
  const int64_t own = fetched ? 0 : 1, left = tiles.number() - own;
  const auto prefetch = [&](int64_t i) {
    if (i < own) return Prefetch{weights + 16 * R * W, R};
    return last ? Prefetch{} : Prefetch{weights + (R * size + R * size * (i - own) / left) * W, R, left};
  };
  tiles.multiply<R>(x, size, weights, bias, prefetch, y, n);
}

// x W^T + bias, for x [..., k] and a bias [n]. The weights are packed in blocks of TILE_OUTPUTS outputs, the last
// block smaller if need be, each block [k / 2, outputs, 2]. k is even and positive, n a multiple of W. `type` of
// the result: bfloat16 or float32. Each thread calls then(y, from, to, of) when its blocks `from` to `to` of `of`
// are done.
Tensor multiply_then(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, at::ScalarType type,
                     c10::function_ref<void(const Tensor&, int64_t, int64_t, int64_t)> then) {
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
    const int64_t blocks = (n + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
    share(blocks, grain(TILE_OUTPUTS * k), [&](int64_t from, int64_t to) {
      {
        const Tiles tiles(tokens);
        for (int64_t i = from; i < to; ++i) {
          const int64_t first = i * TILE_OUTPUTS;
          with_constant<TILE_VECTORS>((n - first) / W, [&](auto vectors) {
            multiply_block<vectors()>(tiles, in, size, w + first * size, b ? b + first : nullptr, out + first, n,
                                      tiles.number() > 1 && i > from, i + 1 == to);
          });
        }
      }
      then(y, from, to, blocks);
    });
  });
  return y;
}

Tensor multiply(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, at::ScalarType type) {
  return multiply_then(x, packed, bias, type, [](const Tensor&, int64_t, int64_t, int64_t) {});
}

}  // namespace nr_serve

#endif
