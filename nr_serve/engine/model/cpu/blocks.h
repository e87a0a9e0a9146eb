// Residues of the tokens on which gates fired. Shape suffixes as in bank.py; F tokens whose gate fired.

#pragma once

#include <c10/core/InferenceMode.h>

#include <bit>

#include "operators.h"
#include "paired_blocks.h"
#include "vectors.h"

namespace nr_serve {

// Tokens multiplied by a row of W_in and a row of W_gate at once: their products fill one vector.
constexpr int UP_TOKENS = W / 2;

// The rows of W_in and W_gate of one hidden value, [d] each, times the x of F tokens, [d] each. Returns F products
// with W_in and, from index UP_TOKENS on, F products with W_gate.
template <int F, typename T>
Vec multiply_up(const T* in, const T* gate, const T* const* x, int64_t d) {
  Vec products[W];
  for (Vec& product : products) product = Vec(0.f);
  for_vectors<PRODUCTS<T>>(d, [&](int64_t i, int64_t count) {
    for (int f = 0; f < F; ++f) {
      products[f] = multiply_add(x[f] + i, in + i, count, products[f]);
      products[UP_TOKENS + f] = multiply_add(x[f] + i, gate + i, count, products[UP_TOKENS + f]);
    }
  });
  return sum_each(products);
}

// Vectors of columns of F tokens' sums that stay in registers; the more, the longer the runs read from a row of
// W_out.
template <int F>
constexpr int64_t VECTORS_OF = (W == 16 ? 16 : 8) / std::bit_ceil<unsigned>(F);

// Adds F tokens' hidden values [F, h] times some columns of W_out [h, d] to the same columns of the tokens' y.
template <int F, typename T, typename Size>
void add_out(const T* out, int64_t d, int64_t h, const float* hidden, Size size, T* const* y) {
  Vec sums[F][VECTORS_OF<F>];
  for (auto& row : sums)
    for (Vec& s : row) s = Vec(0.f);
  for (int64_t j = 0; j < h; ++j) {
    for (int64_t i = 0; i < size; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(out + (j + 8) * d + i);
    for_vectors(size, [&](int64_t i, int64_t count) {
      const Vec w = load(out + j * d + i, count);
      for (int f = 0; f < F; ++f) sums[f][i / W] = at::vec::fmadd(Vec(hidden[f * h + j]), w, sums[f][i / W]);
    });
  }
  for (int f = 0; f < F; ++f)
    for_vectors(size,
                [&](int64_t i, int64_t count) { store(y[f] + i, load(y[f] + i, count) + sums[f][i / W], count); });
}

// Hidden values `from` to `to` of a block, scaled by g; W_in and W_gate together are [2h, d]; x [T, d].
template <typename T>
void fill_hidden(Fired& block, const T* x, const T* up, int64_t d, int64_t from, int64_t to) {
  for (int64_t j = from; j < to; ++j)
    for_rows<UP_TOKENS>(block.tokens.size(), [&](auto tokens, int64_t f) {
      const T* rows[tokens()];
      for (int k = 0; k < tokens(); ++k) rows[k] = x + block.tokens[f + k] * d;
      float products[W], hidden[W];
      store(products, multiply_up<tokens()>(up + j * d, up + (block.h + j) * d, rows, d));
      store(hidden, load(products, UP_TOKENS) * silu(load(products + UP_TOKENS, UP_TOKENS)), UP_TOKENS);
      for (int k = 0; k < tokens(); ++k) block.hidden[(f + k) * block.h + j] = hidden[k] * block.g[f + k];
    });
}

// With more tokens than this, oneDNN's products are faster than ours for few tokens. oneDNN rounds hidden values.
constexpr int64_t FEW = 40;

template <typename T>
void Blocks::add_many(int64_t layer, const Fired& one, const Tensor& x, T* y) const {
  const int64_t h = one.h, d = out_.size(3);
  const Tensor up = up_[one.slot][layer].narrow(0, 0, 2 * h).t(), out = out_[one.slot][layer].narrow(0, 0, h);
  const T* from_x = x.const_data_ptr<T>();
  share(one.tokens.size(), FEW, [&](int64_t from, int64_t to) {
    const c10::InferenceMode guard;  // set per thread: our own threads do not inherit the caller's
    const int64_t n = to - from;
    const Tensor fired_x = x.new_empty({n, d}), hidden = x.new_empty({n, h});
    for (int64_t i = 0; i < n; ++i)
      std::copy_n(from_x + one.tokens[from + i] * d, d, fired_x.mutable_data_ptr<T>() + i * d);
    const Tensor in_gate = fired_x.mm(up);
    for (int64_t i = 0; i < n; ++i) {
      const T* in = in_gate.const_data_ptr<T>() + i * 2 * h;
      for_vectors(h, [&](int64_t j, int64_t count) {
        const Vec gated = silu(load(in + h + j, count)) * load(in + j, count);
        store(hidden.mutable_data_ptr<T>() + i * h + j, gated * Vec(one.g[from + i]), count);
      });
    }
    const Tensor residues = hidden.mm(out);
    for (int64_t i = 0; i < n; ++i) {
      add_to(y + one.tokens[from + i] * d, residues.const_data_ptr<T>() + i * d, d);
    }
  });
}

template <typename T>
void Blocks::add_few(int64_t layer, std::span<Fired> blocks, const T* x, T* y) const {
  const int64_t d = out_.size(3);
  int64_t rows = 0;
  for (Fired& one : blocks) one.hidden.resize(one.tokens.size() * one.h), rows += one.h;
  share(rows, grain(2 * d), [&](int64_t from, int64_t to) {  // all blocks' rows laid end to end
    for (Fired& one : blocks) {
      fill_hidden(one, x, of_block<T>(up_, one.slot, layer), d, std::max<int64_t>(from, 0), std::min(to, one.h));
      from -= one.h, to -= one.h;
    }
  });
  constexpr int64_t run = VECTORS_AT_ONCE * W;
  share((d + run - 1) / run, 1, [&](int64_t from, int64_t to) {
    for (const Fired& one : blocks)
      for_rows(one.tokens.size(), [&](auto tokens, int64_t f) {
        for_columns<VECTORS_OF<tokens()>>(from * run, std::min(d, to * run), [&](auto size, int64_t i) {
          T* rows[tokens()];
          for (int k = 0; k < tokens(); ++k) rows[k] = y + one.tokens[f + k] * d + i;
          add_out<tokens()>(of_block<T>(out_, one.slot, layer) + i, d, one.h, one.hidden.data() + f * one.h, size,
                            rows);
        });
      });
  });
}

void Blocks::add(int64_t layer, std::vector<Fired>& fired, const Tensor& x, const Tensor& y) const {
  if (fired.empty()) return;
#ifdef NR_SERVE_PRODUCTS
  if (paired_) {
    const PairedBlocks blocks = paired(layer, fired, x);
    blocks.fill_hidden();
    share((blocks.d + TILE_OUTPUTS - 1) / TILE_OUTPUTS, grain(TILE_OUTPUTS * W * blocks.vectors),
          [&](int64_t from, int64_t to) { blocks.add_out(y, from, to); });
    return;
  }
#endif
  const auto many = [](const Fired& one) { return one.tokens.size() > FEW; };
  with_type(x, [&](auto type) {
    using T = decltype(type);
    T* to = y.mutable_data_ptr<T>();
    for (auto next = fired.begin(); next != fired.end();) {
      const auto end = std::find_if(next, fired.end(), many);
      if (next != end) add_few(layer, {next, end}, x.const_data_ptr<T>(), to);
      next = end;
      if (next != fired.end()) add_many(layer, *next++, x, to);
    }
  });
}

}  // namespace nr_serve
