// The residues of a step of few tokens. Shape suffixes as in bank.py; F tokens whose gate fired.

#pragma once

#include <torch/custom_class.h>

#include <cmath>
#include <vector>

#include "vectors.h"

namespace nr_serve {

// W_in and W_gate of one hidden value, [d] each, times F tokens' x, [d] each.
template <int F, typename T>
void multiply_up(const T* in, const T* gate, const T* const* x, int64_t d, float* ins, float* gates) {
  Vec in_sums[F], gate_sums[F];
  for (int f = 0; f < F; ++f) in_sums[f] = gate_sums[f] = Vec(0.f);
  each<PRODUCTS<T>>(d, [&](int64_t i, int64_t size) {
    for (int f = 0; f < F; ++f) {
      in_sums[f] = multiply_add(x[f] + i, in + i, size, in_sums[f]);
      gate_sums[f] = multiply_add(x[f] + i, gate + i, size, gate_sums[f]);
    }
  });
  for (int f = 0; f < F; ++f) ins[f] = sum(in_sums[f]), gates[f] = sum(gate_sums[f]);
}

// So many vectors of columns of F tokens' sums stay in registers: the more, the longer what is read of a row of W_out.
template <int F>
constexpr int64_t VECTORS_OF = (W == 16 ? 16 : 8) / (F == 1 ? 1 : F == 2 ? 2 : 4);

// Columns of W_out, [h, d], times F tokens' hidden values, [F, h], added to the same columns of their y.
template <int F, typename T, typename Size>
void add_out(const T* out, int64_t d, int64_t h, const float* hidden, Size size, T* const* y) {
  Vec sums[F][VECTORS_OF<F>];
  for (auto& row : sums)
    for (Vec& s : row) s = Vec(0.f);
  for (int64_t j = 0; j < h; ++j) {
    for (int64_t i = 0; i < size; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(out + (j + 8) * d + i);
    each(size, [&](int64_t i, int64_t some) {
      const Vec w = load(out + j * d + i, some);
      for (int f = 0; f < F; ++f) sums[f][i / W] = at::vec::fmadd(Vec(hidden[f * h + j]), w, sums[f][i / W]);
    });
  }
  for (int f = 0; f < F; ++f)
    each(size, [&](int64_t i, int64_t some) { store(y[f] + i, load(y[f] + i, some) + sums[f][i / W], some); });
}

// The tokens on which one slot fired, and what its block makes of them.
struct Fired {
  int64_t slot;
  std::vector<int64_t> tokens;
  std::vector<float> g, hidden;
};

// The hidden values of a block of width h, scaled by g: W_in and W_gate are [2h, d]; x [T, d].
template <typename T>
void fill_hidden(Fired& block, const T* x, const T* up, int64_t h, int64_t d) {
  const int64_t tokens = block.tokens.size();
  block.hidden.resize(tokens * h);
  if (tokens == 0) return;
  at::parallel_for(0, h, grain(2 * d), [&](int64_t from, int64_t to) {
    for (int64_t j = from; j < to; ++j)
      by_rows(tokens, [&](auto some, int64_t f) {
        const T* rows[some()];
        for (int k = 0; k < some(); ++k) rows[k] = x + block.tokens[f + k] * d;
        float in[some()], gate[some()];
        multiply_up<some()>(up + j * d, up + (h + j) * d, rows, d, in, gate);
        for (int k = 0; k < some(); ++k)
          block.hidden[(f + k) * h + j] = gate[k] / (1.f + std::exp(-gate[k])) * in[k] * block.g[f + k];
      });
  });
}

// The residues of a step, layer by layer. As in bank.py, of the bank: gate [L, S, d], bias [L, S], carry and ceiling
// [S], W_in and W_gate [S, L, 2H, d], W_out transposed [S, L, H, d] and the blocks' widths [L, S]; of the step: the
// logits carried from before each piece [L, P, n], NaN where nothing came before, and each token's place in its piece
// [T], thresholds and who is selected [T, n], and the carried logits m [L, T, n], which are written. n: slots whose gates are evaluated.
class Residues : public torch::CustomClassHolder {
 public:
  Residues(Tensor gate, Tensor bias, Tensor carry, Tensor ceiling, Tensor up, Tensor out, Tensor width, Tensor before,
           Tensor offset, Tensor threshold, Tensor selected, Tensor m)
      : gate_(gate),
        bias_(bias),
        carry_(carry),
        ceiling_(ceiling),
        up_(up),
        out_(out),
        width_(width),
        before_(before),
        offset_(offset),
        threshold_(threshold),
        selected_(selected),
        m_(m),
        layers_(gate.size(0)),
        d_(gate.size(2)),
        tokens_(offset.numel()),
        n_(m.size(2)) {
    const int64_t slots = gate.size(1);
    for (const Tensor* t : {&gate, &bias, &carry, &ceiling, &up, &out, &width, &before, &offset, &m})
      TORCH_CHECK(t->is_contiguous());
    TORCH_CHECK(n_ <= slots && bias.numel() == layers_ * slots && width.sizes() == bias.sizes());
    TORCH_CHECK(carry.numel() == slots && ceiling.numel() == slots && up.scalar_type() == out.scalar_type());
    TORCH_CHECK(up.size(0) == slots && up.size(1) == layers_ && up.size(2) == 2 * out.size(2) && up.size(3) == d_);
    TORCH_CHECK(out.size(0) == slots && out.size(1) == layers_ && out.size(3) == d_);
    TORCH_CHECK(before.size(0) == layers_ && before.size(2) == n_ && m.size(0) == layers_ && m.size(1) == tokens_);
    for (const Tensor* t : {&gate, &bias, &carry, &ceiling, &width, &before, &offset, &threshold, &selected, &m, &up})
      TORCH_CHECK(t->is_cpu());
    const auto* place = offset.const_data_ptr<int64_t>();
    TORCH_CHECK(tokens_ > 0 && place[0] == 0 && std::count(place, place + tokens_, 0) == before.size(1));
    TORCH_CHECK(threshold.size(0) == tokens_ && threshold.size(1) == n_ && selected.sizes() == threshold.sizes());
  }

  // Adds a layer's residues to y [..., d], of the tokens whose gate fired in a slot that is selected; whether any gate
  // is open, selected or not.
  bool add(int64_t layer, const Tensor& x, const Tensor& y) {
    TORCH_CHECK(0 <= layer && layer < layers_ && x.is_contiguous() && y.is_contiguous() && x.sizes() == y.sizes());
    TORCH_CHECK(x.numel() == tokens_ * d_ && x.scalar_type() == up_.scalar_type() &&
                y.scalar_type() == x.scalar_type());
    bool opened = false;
    by_type(x, [&](auto type) {
      using T = decltype(type);
      xs_.resize(tokens_ * d_);
      each(tokens_ * d_,
           [&](int64_t i, int64_t size) { store(xs_.data() + i, load(x.const_data_ptr<T>() + i, size), size); });
      fired_.clear();
      opened = open(layer);
      if (!fired_.empty()) add_blocks(layer, x.const_data_ptr<T>(), y.mutable_data_ptr<T>());
    });
    return opened;
  }

 private:
  // Fills the layer's m; whether any gate is open. Who fired in a selected slot is noted.
  bool open(int64_t layer) {
    const int64_t slots = gate_.size(1);
    const float *w = gate_.const_data_ptr<float>() + layer * slots * d_,
                *b = bias_.const_data_ptr<float>() + layer * slots;
    const float *a = carry_.const_data_ptr<float>(),
                *past = before_.const_data_ptr<float>() + layer * before_.stride(0);
    const float* limit = threshold_.const_data_ptr<float>();
    const int64_t* place = offset_.const_data_ptr<int64_t>();
    const int64_t by_token = threshold_.stride(0), by_slot = threshold_.stride(1);
    float* m = m_.mutable_data_ptr<float>() + layer * tokens_ * n_;
    bool opened = false;
    for (int64_t t = 0, piece = -1; t < tokens_; ++t, m += n_) {
      piece += place[t] == 0;
      const float *x = xs_.data() + t * d_, *last = place[t] ? m - n_ : past + piece * n_;
      by_rows<8>(n_, [&](auto some, int64_t s) {
        Vec products[some()];
        for (Vec& product : products) product = Vec(0.f);
        each(d_, [&](int64_t i, int64_t size) {
          const Vec v = load(x + i, size);
          for (int k = 0; k < some(); ++k)
            products[k] = at::vec::fmadd(v, load(w + (s + k) * d_ + i, size), products[k]);
        });
        for (int k = 0; k < some(); ++k) {
          const bool starts = !place[t] && std::isnan(last[s + k]);
          m[s + k] = starts ? 0.f : a[s + k] * last[s + k] + (1.f - a[s + k]) * (sum(products[k]) + b[s + k]);
        }
      });
      for (int64_t s = 0; s < n_; ++s)
        if (const float over = m[s] - limit[t * by_token + s * by_slot]; over > 0)
          opened = true, note(layer, t, s, over);
    }
    return opened;
  }

  // Notes a token whose carried logit is so far over the threshold, if the slot may act on it.
  void note(int64_t layer, int64_t t, int64_t s, float over) {
    const bool selected = selected_.const_data_ptr<bool>()[t * selected_.stride(0) + s * selected_.stride(1)];
    if (!selected || width(layer, s) == 0) return;
    auto at = std::find_if(fired_.begin(), fired_.end(), [&](const Fired& each) { return each.slot == s; });
    if (at == fired_.end()) at = fired_.insert(at, Fired{s});
    at->tokens.push_back(t);
    at->g.push_back(std::min(over, ceiling_.const_data_ptr<float>()[s]));
  }

  template <typename T>
  void add_blocks(int64_t layer, const T* x, T* y) {
    // In the order of the slots, so that a token's sum does not depend on what shares its step.
    std::sort(fired_.begin(), fired_.end(), [](const Fired& a, const Fired& b) { return a.slot < b.slot; });
    const auto block = [&](const Tensor& weights, int64_t slot) {
      return weights.const_data_ptr<T>() + slot * weights.stride(0) + layer * weights.stride(1);
    };
    for (Fired& one : fired_) fill_hidden(one, x, block(up_, one.slot), width(layer, one.slot), d_);
    constexpr int64_t run = VECTORS_AT_ONCE * W;
    at::parallel_for(0, (d_ + run - 1) / run, 1, [&](int64_t from, int64_t to) {
      for (const Fired& one : fired_)
        by_rows(one.tokens.size(), [&](auto some, int64_t f) {
          by_columns<VECTORS_OF<some()>>(from * run, std::min(d_, to * run), [&](auto size, int64_t i) {
            const int64_t h = width(layer, one.slot);
            T* rows[some()];
            for (int k = 0; k < some(); ++k) rows[k] = y + one.tokens[f + k] * d_ + i;
            add_out<some()>(block(out_, one.slot) + i, d_, h, one.hidden.data() + f * h, size, rows);
          });
        });
    });
  }

  int64_t width(int64_t layer, int64_t slot) const {
    return width_.const_data_ptr<int32_t>()[layer * gate_.size(1) + slot];
  }

  Tensor gate_, bias_, carry_, ceiling_, up_, out_, width_, before_, offset_, threshold_, selected_, m_;
  int64_t layers_, d_, tokens_, n_;
  std::vector<float> xs_;     // the layer's x, in float32
  std::vector<Fired> fired_;  // in the layer
};

}  // namespace nr_serve
