// Residues by the products of tiles.h, of any number of tokens.

#pragma once

#include "operators.h"

#ifdef NR_SERVE_PRODUCTS

#include "products.h"

namespace nr_serve {

void PairedBlock::fill_hidden(int64_t d, int64_t from, int64_t to) const {
  if (from >= to) return;
  constexpr int64_t BOTH = 2 * W;
  const Tiles tiles(tokens);
  const auto products = room_for<float>(tokens * BOTH);
  for (int64_t i = from; i < to; ++i) {
    multiply_block<2>(tiles, x, d / 2, up + i * BOTH * (d / 2), nullptr, products.get(), BOTH,
                      tiles.number() > 1 && i > from, i + 1 == to);
    for (int64_t t = 0; t < tokens; ++t) {
      const float* product = products.get() + t * BOTH;
      store(hidden.get() + t * h + i * W, load(product) * silu(load(product + W)) * Vec(g[t]));
    }
  }
}

void PairedBlock::add_out(BFloat16* y, int64_t d, int64_t from, int64_t to) const {
  const Tiles tiles(tokens);
  const auto* in = reinterpret_cast<const int32_t*>(hidden.get());
  const auto residues = room_for<float>(tokens * TILE_OUTPUTS);
  for (int64_t i = from; i < to; ++i) {
    const int64_t first = i * TILE_OUTPUTS;
    with_constant<TILE_VECTORS>((d - first) / W, [&](auto vectors) {
      constexpr int64_t size = vectors() * W;
      multiply_block<vectors()>(tiles, in, h / 2, out + first * (h / 2), nullptr, residues.get(), size,
                                tiles.number() > 1 && i > from, i + 1 == to);
      for (int64_t t = 0; t < tokens; ++t) add_to(y + rows[t] * d + first, residues.get() + t * size, size);
    });
  }
}

void PairedBlocks::fill_hidden() const {
  if (blocks.empty()) return;
  share(vectors, grain(2 * W * d), [&](int64_t from, int64_t to) {
    for (const PairedBlock& block : blocks) {  // laid end to end
      const int64_t own = block.h / W;
      block.fill_hidden(d, std::max<int64_t>(from, 0), std::min(to, own));
      from -= own, to -= own;
    }
  });
}

void PairedBlocks::add_out(const Tensor& y, int64_t from, int64_t to) const {
  for (const PairedBlock& block : blocks) block.add_out(y.mutable_data_ptr<BFloat16>(), d, from, to);
}

PairedBlocks Blocks::paired(int64_t layer, const std::vector<Fired>& fired, const Tensor& x) const {
  TORCH_CHECK(paired_);
  const int64_t d = out_.size(3), T = x.numel() / d;
  const auto weights = [&](const Tensor& of, int64_t slot) {
    return reinterpret_cast<const int32_t*>(of_block<BFloat16>(of, slot, layer));
  };
  static_assert(PAIRED_OUTPUTS == W);
  const BFloat16* all_x = x.const_data_ptr<BFloat16>();
  PairedBlocks all{{}, d};
  for (const Fired& one : fired) {
    const int64_t tokens = one.tokens.size(), h = (one.h + W - 1) / W * W;
    PairedBlock block{weights(up_, one.slot), weights(out_, one.slot), tokens, h, one.g.data(), one.tokens.data()};
    block.hidden = room_for<BFloat16>(tokens * h);
    if (tokens < T) {
      block.gathered = room_for<BFloat16>(tokens * d);
      share(tokens, grain(d), [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) std::copy_n(all_x + one.tokens[i] * d, d, block.gathered.get() + i * d);
      });
    }
    block.x = reinterpret_cast<const int32_t*>(tokens < T ? block.gathered.get() : all_x);
    all.vectors += h / W;
    all.blocks.push_back(std::move(block));
  }
  return all;
}

}  // namespace nr_serve

#endif
