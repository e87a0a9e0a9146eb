// The residues of a step. Shape suffixes as in bank.py; F tokens whose gate fired.

#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <torch/custom_class.h>

#include <cmath>
#include <span>
#include <vector>

#include "vectors.h"

namespace nr_serve {

// Logits of so many tokens for so many gates are computed together: what they add to fills a vector of sums.
constexpr int64_t LOGIT_GATES = 8, LOGIT_TOKENS = W / LOGIT_GATES;

// Products of their x and the gates' w, [d] each, in the order of the tokens.
template <typename T>
Vec multiply_gates(const T* const* x, const float* const* w, int64_t d) {
  Vec products[W];
  for (Vec& product : products) product = Vec(0.f);
  for_vectors(d, [&](int64_t i, int64_t count) {
    Vec v[LOGIT_TOKENS];
    for (int64_t t = 0; t < LOGIT_TOKENS; ++t) v[t] = load(x[t] + i, count);
    for (int64_t k = 0; k < LOGIT_GATES; ++k) {
      const Vec gate = load(w[k] + i, count);
      for (int64_t t = 0; t < LOGIT_TOKENS; ++t)
        products[t * LOGIT_GATES + k] = at::vec::fmadd(v[t], gate, products[t * LOGIT_GATES + k]);
    }
  });
  return sum_each(products);
}

// So many tokens meet a row of W_in and one of W_gate together: their products fill a vector of sums.
constexpr int UP_TOKENS = W / 2;

// W_in and W_gate of one hidden value, [d] each, times F tokens' x, [d] each: F products with W_in and, UP_TOKENS
// places on, those with W_gate.
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

// So many vectors of columns of F tokens' sums stay in registers: the more, the longer what is read of a row of W_out.
template <int F>
constexpr int64_t VECTORS_OF = (W == 16 ? 16 : 8) / (F == 1   ? 1
                                                     : F == 2 ? 2
                                                              : 4);

// Columns of W_out, [h, d], times F tokens' hidden values, [F, h], added to the same columns of their y.
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

// The tokens on which one slot fired, and what its block, of width h, makes of them.
struct Fired {
  int64_t slot, h;
  std::vector<int64_t> tokens;
  std::vector<float> g, hidden;
};

// Some of the hidden values of a block, scaled by g: W_in and W_gate are [2h, d]; x [T, d].
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

// With more tokens oneDNN's products are faster than those made for few. They round hidden values.
constexpr int64_t FEW = 40;

// The residues of a step, layer by layer. Of the bank, as in bank.py, and written in its place: gate
// [L, S, d], bias [L, S], carry, ceiling and threshold [S], W_in and W_gate [S, L, 2H, d], W_out transposed
// [S, L, H, d], the blocks' widths [L, S], the carried states by row [L, R, S] and by page [L, N, S], and the
// statistics: tokens each block was selected for, and fired on [L, S], the sum of its g [S], and gates open by label
// and slot [K, S]. n: slots whose gates are evaluated, the first ones.
class Residues : public torch::CustomClassHolder {
 public:
  Residues(Tensor gate, Tensor bias, Tensor carry, Tensor ceiling, Tensor threshold, Tensor up, Tensor out,
           Tensor width, Tensor state, Tensor page_state, Tensor seen, Tensor fired, Tensor mass, Tensor cross)
      : gate_(gate),
        bias_(bias),
        carry_(carry),
        ceiling_(ceiling),
        threshold_(threshold),
        up_(up),
        out_(out),
        width_(width),
        state_(state),
        page_state_(page_state),
        seen_(seen),
        fired_count_(fired),
        mass_(mass),
        cross_(cross),
        layers_(gate.size(0)),
        slots_(gate.size(1)),
        d_(gate.size(2)) {
    for (const Tensor* t : {&gate, &bias, &carry, &ceiling, &threshold, &up, &out, &width, &state, &page_state, &seen,
                            &fired, &mass, &cross})
      TORCH_CHECK(t->is_cpu() && t->is_contiguous());
    for (const Tensor* t : {&bias, &width, &seen, &fired}) TORCH_CHECK(t->numel() == layers_ * slots_);
    for (const Tensor* t : {&carry, &ceiling, &threshold, &mass}) TORCH_CHECK(t->numel() == slots_);
    TORCH_CHECK(cross.dim() == 2 && cross.size(1) == slots_);
    for (const Tensor* t : {&state, &page_state}) TORCH_CHECK(t->size(0) == layers_ && t->size(2) == slots_);
    TORCH_CHECK(up.size(0) == slots_ && up.size(1) == layers_ && up.size(2) == 2 * out.size(2) && up.size(3) == d_);
    TORCH_CHECK(out.size(0) == slots_ && out.size(1) == layers_ && out.size(3) == d_);
    TORCH_CHECK(up.scalar_type() == out.scalar_type());
  }

  // Starts a step: its tokens' rows and places in their pieces [T], who is selected [T, S]. From token `first` on a
  // slot has another threshold; none, if that is T. `add` follows for every layer, in order.
  void begin(const Tensor& row, const Tensor& offset, const Tensor& selected, int64_t n, int64_t first, int64_t slot,
             double threshold) {
    tokens_ = row.numel(), n_ = n, done_ = 0, opened_ = false;
    TORCH_CHECK(0 < n && n <= slots_ && tokens_ > 0 && offset.numel() == tokens_);
    TORCH_CHECK(0 <= first && first <= tokens_ && 0 <= slot && slot < n);
    TORCH_CHECK(row.is_contiguous() && offset.is_contiguous() && selected.size(0) == tokens_ &&
                selected.size(1) == slots_);
    selected_ = selected;
    const auto *rows = row.const_data_ptr<int64_t>(), *places = offset.const_data_ptr<int64_t>();
    rows_.assign(rows, rows + tokens_);
    places_.assign(places, places + tokens_);
    TORCH_CHECK(places_[0] == 0);
    for (const int64_t r : rows_) TORCH_CHECK(0 <= r && r < state_.size(1));
    const auto* of_slots = threshold_.const_data_ptr<float>();
    limits_.assign(of_slots, of_slots + n_);
    on_trial_ = limits_;
    on_trial_[slot] = threshold;
    first_ = first;
    m_.resize(layers_ * tokens_ * n_);
  }

  // Adds a layer's residues to y [..., d], of the tokens whose gate fired in a slot that is selected.
  void add(int64_t layer, const Tensor& x, const Tensor& y) {
    TORCH_CHECK(0 <= layer && layer < layers_ && x.is_contiguous() && y.is_contiguous() && x.sizes() == y.sizes());
    TORCH_CHECK(x.numel() == tokens_ * d_ && x.scalar_type() == up_.scalar_type() &&
                y.scalar_type() == x.scalar_type());
    with_type(x, [&](auto type) {
      using T = decltype(type);
      fill_logits(layer, x.const_data_ptr<T>());
      fired_.clear();
      open(layer);
      // In the order of the slots, so that the order of a token's sum does not depend on what shares its step.
      std::sort(fired_.begin(), fired_.end(), [](const Fired& a, const Fired& b) { return a.slot < b.slot; });
      const auto many = [](const Fired& one) { return one.tokens.size() > FEW; };
      for (auto next = fired_.begin(); next != fired_.end();) {
        const auto end = std::find_if(next, fired_.end(), many);
        if (next != end) add_blocks(layer, {next, end}, x.const_data_ptr<T>(), y.mutable_data_ptr<T>());
        next = end;
        if (next != fired_.end()) add_block_of_many(layer, *next++, x, y.mutable_data_ptr<T>());
      }
    });
    done_ = layer + 1;
  }

  // Ends a step: the states are kept, of each piece's last token by row and of the tokens `ends` by page [E], and the
  // first `counted` tokens are counted, each under its label [T]. Layers whose gate was open by token and slot,
  // selected or not, int32 [T, S]; nothing, if no gate was. Of a step that was cut short nothing is kept.
  c10::optional<Tensor> end(const Tensor& label, int64_t counted, const c10::optional<Tensor>& ends,
                            const c10::optional<Tensor>& pages) {
    TORCH_CHECK(0 <= counted && counted <= tokens_ && label.is_contiguous() && label.numel() == tokens_);
    if (done_ < layers_) return c10::nullopt;
    for (int64_t t = 0; t < tokens_; ++t)
      if (t + 1 == tokens_ || places_[t + 1] == 0) keep(state_, rows_[t], t);
    if (ends && pages) {
      TORCH_CHECK(ends->is_contiguous() && pages->is_contiguous() && ends->numel() == pages->numel());
      for (int64_t e = 0; e < ends->numel(); ++e)
        keep(page_state_, pages->const_data_ptr<int64_t>()[e], ends->const_data_ptr<int64_t>()[e]);
    }
    for (int64_t s = 0; s < slots_; ++s) {
      int64_t count = 0;
      for (int64_t t = 0; t < counted; ++t) count += is_selected(t, s);
      for (int64_t layer = 0; count && layer < layers_; ++layer)
        if (width(layer, s)) seen_.mutable_data_ptr<int64_t>()[layer * slots_ + s] += count;
    }
    if (!opened_) return c10::nullopt;
    return count_open(label.const_data_ptr<int64_t>(), counted);
  }

 private:
  void keep(const Tensor& states, int64_t to, int64_t t) {
    TORCH_CHECK(0 <= to && to < states.size(1) && 0 <= t && t < tokens_);
    for (int64_t layer = 0; layer < layers_; ++layer)
      std::copy_n(m_.data() + (layer * tokens_ + t) * n_, n_,
                  states.mutable_data_ptr<float>() + (layer * states.size(1) + to) * slots_);
  }

  Tensor count_open(const int64_t* labels, int64_t counted) {
    const Tensor open = at::zeros({tokens_, slots_}, at::kInt);
    auto *fired = fired_count_.mutable_data_ptr<int64_t>(), *cross = cross_.mutable_data_ptr<int64_t>();
    for (int64_t t = 0; t < tokens_; ++t) TORCH_CHECK(0 <= labels[t] && labels[t] < cross_.size(0));
    const float* m = m_.data();
    for (int64_t layer = 0; layer < layers_; ++layer)
      for (int64_t t = 0; t < tokens_; ++t, m += n_)
        for (int64_t s = 0; s < n_; ++s) {
          const float over = m[s] - limits(t)[s];
          if (!(over > 0)) continue;
          open.mutable_data_ptr<int32_t>()[t * slots_ + s] += 1;
          if (t >= counted) continue;
          cross[labels[t] * slots_ + s] += 1;
          if (!is_selected(t, s)) continue;
          fired[layer * slots_ + s] += 1;
          // A stream or a gate gone wild must not leave infinity in the totals for ever.
          const float g = std::min(over, ceiling_.const_data_ptr<float>()[s]);
          if (std::isfinite(g)) mass_.mutable_data_ptr<double>()[s] += g;
        }
    return open;
  }

  // Fills the layer's m with logits, not yet carried.
  template <typename T>
  void fill_logits(int64_t layer, const T* x) {
    const float *w = gate_.const_data_ptr<float>() + layer * slots_ * d_,
                *b = bias_.const_data_ptr<float>() + layer * slots_;
    float* m = m_.data() + layer * tokens_ * n_;
    // A thread's tokens meet eight gates after eight, which stay in the fastest cache. So little is done for each that
    // a second thread pays only for eight times the usual grain.
    const int64_t tiles = (tokens_ + LOGIT_TOKENS - 1) / LOGIT_TOKENS;
    at::parallel_for(0, tiles, 8 * grain(LOGIT_TOKENS * n_ * d_), [&](int64_t from, int64_t to) {
      for (int64_t s = 0; s < n_; s += LOGIT_GATES) {
        const float* gates[LOGIT_GATES];
        for (int64_t k = 0; k < LOGIT_GATES; ++k) gates[k] = w + std::min(s + k, n_ - 1) * d_;
        for (int64_t t = from * LOGIT_TOKENS; t < to * LOGIT_TOKENS; t += LOGIT_TOKENS) {
          const T* rows[LOGIT_TOKENS];
          for (int64_t k = 0; k < LOGIT_TOKENS; ++k) rows[k] = x + std::min(t + k, tokens_ - 1) * d_;
          float z[W];
          store(z, multiply_gates(rows, gates, d_));
          for (int64_t i = t; i < std::min(t + LOGIT_TOKENS, tokens_); ++i)
            for (int64_t k = s; k < std::min(s + LOGIT_GATES, n_); ++k)
              m[i * n_ + k] = z[(i - t) * LOGIT_GATES + k - s] + b[k];
        }
      }
    });
  }

  // Carries the layer's logits, and notes who fired in a selected slot.
  void open(int64_t layer) {
    const float *a = carry_.const_data_ptr<float>(),
                *past = state_.const_data_ptr<float>() + layer * state_.size(1) * slots_;
    float* m = m_.data() + layer * tokens_ * n_;
    for (int64_t t = 0; t < tokens_; ++t, m += n_) {
      const float *last = places_[t] ? m - n_ : past + rows_[t] * slots_, *limit = limits(t);
      bool any = false;
      for (int64_t s = 0; s < n_; ++s) {
        m[s] = a[s] * last[s] + (1.f - a[s]) * m[s];
        any |= m[s] > limit[s];
      }
      if (!places_[t])
        for (int64_t s = 0; s < n_; ++s)
          if (std::isnan(last[s])) m[s] = 0.f, any |= 0.f > limit[s];
      if (!any) continue;
      opened_ = true;
      for (int64_t s = 0; s < n_; ++s)
        if (m[s] > limit[s]) note(layer, t, s, m[s] - limit[s]);
    }
  }

  // Thresholds of a token, [n].
  const float* limits(int64_t t) const { return (t < first_ ? limits_ : on_trial_).data(); }

  bool is_selected(int64_t t, int64_t s) const {
    return selected_.const_data_ptr<bool>()[t * selected_.stride(0) + s * selected_.stride(1)];
  }

  // Notes a token whose carried logit is so far over the threshold, if the slot may act on it.
  void note(int64_t layer, int64_t t, int64_t s, float over) {
    if (!is_selected(t, s) || width(layer, s) == 0) return;
    auto block = std::find_if(fired_.begin(), fired_.end(), [&](const Fired& one) { return one.slot == s; });
    if (block == fired_.end()) block = fired_.insert(block, Fired{s, width(layer, s)});
    block->tokens.push_back(t);
    block->g.push_back(std::min(over, ceiling_.const_data_ptr<float>()[s]));
  }

  // Adds a block's residues to y [T, d] of many tokens.
  template <typename T>
  void add_block_of_many(int64_t layer, const Fired& one, const Tensor& x, T* y) {
    const int64_t h = one.h, count = one.tokens.size(), d = d_;
    const auto for_tokens = [&](int64_t size, auto&& f) {
      at::parallel_for(0, count, grain(size), [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) f(i, one.tokens[i]);
      });
    };
    const Tensor fired_x = at::empty({count, d}, x.options()), hidden = at::empty({count, h}, x.options());
    for_tokens(d, [&](int64_t i, int64_t t) {
      std::copy_n(x.const_data_ptr<T>() + t * d, d, fired_x.mutable_data_ptr<T>() + i * d);
    });
    const Tensor in_gate = at::linear(fired_x, up_[one.slot][layer].narrow(0, 0, 2 * h));
    for_tokens(2 * h, [&](int64_t i, int64_t) {
      const T* in = in_gate.const_data_ptr<T>() + i * 2 * h;
      for_vectors(h, [&](int64_t j, int64_t size) {
        const Vec gated = silu(load(in + h + j, size)) * load(in + j, size);
        store(hidden.mutable_data_ptr<T>() + i * h + j, gated * Vec(one.g[i]), size);
      });
    });
    const Tensor residues = hidden.mm(out_[one.slot][layer].narrow(0, 0, h));
    for_tokens(d, [&](int64_t i, int64_t t) {
      const T* residue = residues.const_data_ptr<T>() + i * d;
      for_vectors(d, [&](int64_t j, int64_t size) {
        store(y + t * d + j, load(y + t * d + j, size) + load(residue + j, size), size);
      });
    });
  }

  // Adds to y [T, d] what blocks with few tokens make of x [T, d].
  template <typename T>
  void add_blocks(int64_t layer, std::span<Fired> blocks, const T* x, T* y) {
    const auto block = [&](const Tensor& weights, int64_t slot) {
      return weights.const_data_ptr<T>() + slot * weights.stride(0) + layer * weights.stride(1);
    };
    int64_t rows = 0;
    for (Fired& one : blocks) one.hidden.resize(one.tokens.size() * one.h), rows += one.h;
    at::parallel_for(0, rows, grain(2 * d_), [&](int64_t from, int64_t to) {  // the blocks' rows end to end
      for (Fired& one : blocks) {
        fill_hidden(one, x, block(up_, one.slot), d_, std::max<int64_t>(from, 0), std::min(to, one.h));
        from -= one.h, to -= one.h;
      }
    });
    constexpr int64_t run = VECTORS_AT_ONCE * W;
    at::parallel_for(0, (d_ + run - 1) / run, 1, [&](int64_t from, int64_t to) {
      for (const Fired& one : blocks)
        for_rows(one.tokens.size(), [&](auto tokens, int64_t f) {
          for_columns<VECTORS_OF<tokens()>>(from * run, std::min(d_, to * run), [&](auto size, int64_t i) {
            T* rows[tokens()];
            for (int k = 0; k < tokens(); ++k) rows[k] = y + one.tokens[f + k] * d_ + i;
            add_out<tokens()>(block(out_, one.slot) + i, d_, one.h, one.hidden.data() + f * one.h, size, rows);
          });
        });
    });
  }

  int64_t width(int64_t layer, int64_t slot) const { return width_.const_data_ptr<int32_t>()[layer * slots_ + slot]; }

  Tensor gate_, bias_, carry_, ceiling_, threshold_, up_, out_, width_, state_, page_state_;
  Tensor seen_, fired_count_, mass_, cross_;
  int64_t layers_, slots_, d_;
  // Of the step.
  int64_t tokens_ = 0, n_ = 0, done_ = 0;  // layers
  bool opened_ = false;
  Tensor selected_;
  std::vector<int64_t> rows_, places_;
  int64_t first_ = 0;  // token on trial
  std::vector<float> limits_, on_trial_, m_;
  std::vector<Fired> fired_;  // in the layer
};

}  // namespace nr_serve
