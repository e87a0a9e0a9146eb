// The residues of a step: which gates fire on which tokens, the carried states and the statistics. Shape suffixes
// as in bank.py.

#pragma once

#include <ATen/ops/zeros.h>
#include <torch/custom_class.h>

#include <cmath>
#include <string>
#include <vector>

#include "gates.h"
#include "operators.h"

namespace nr_serve {

// The residues of a step, layer by layer. n: number of slots whose gates are evaluated, from slot 0 on.
class Residues : public torch::CustomClassHolder {
 public:
  // `bank`: its tensors, by their names in bank.py. They are read and written in place. `paired`: how its blocks'
  // weights are laid out.
  Residues(const c10::Dict<std::string, Tensor>& bank, bool paired)
      : gate_(bank.at("gate_LSd")),
        bias_(bank.at("bias_LS")),
        carry_(bank.at("carry_S")),
        ceiling_(bank.at("ceiling_S")),
        threshold_(bank.at("threshold_S")),
        width_(bank.at("width_LS")),
        state_(bank.at("state_LRS")),
        page_state_(bank.at("page_state_LNS")),
        seen_(bank.at("_seen_LS")),
        fired_count_(bank.at("_fired_LS")),
        mass_(bank.at("_mass_S")),
        cross_(bank.at("_cross_KS")),
        layers_(gate_.size(0)),
        slots_(gate_.size(1)),
        d_(gate_.size(2)),
        blocks_(bank.at("w_up_SLud"), bank.at("w_out_SLhd"), slots_, layers_, d_, paired) {
    for (const auto& named : bank) TORCH_CHECK(named.value().is_cpu() && named.value().is_contiguous(), named.key());
    for (const Tensor& t : {bias_, width_, seen_, fired_count_}) TORCH_CHECK(t.numel() == layers_ * slots_);
    for (const Tensor& t : {carry_, ceiling_, threshold_, mass_}) TORCH_CHECK(t.numel() == slots_);
    TORCH_CHECK(cross_.dim() == 2 && cross_.size(1) == slots_);
    for (const Tensor& t : {state_, page_state_}) TORCH_CHECK(t.size(0) == layers_ && t.size(2) == slots_);
  }

  // Starts a step: its tokens' rows and offsets in their pieces [T], and which slots they select [T, S]. From
  // token `first` on, `slot` has the given threshold instead of its own (`first` = T: no token does). For
  // every layer, in order, `add` must follow, or `logits`, which are written, and `paired`.
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

  // Adds a layer's residues to y [..., d], for tokens whose gate fired in a selected slot.
  void add(int64_t layer, const Tensor& x, const Tensor& y) {
    TORCH_CHECK(y.is_contiguous() && x.sizes() == y.sizes() && y.scalar_type() == x.scalar_type());
    with_type(x, [&](auto type) { logits<decltype(type)>(layer, x).fill_all(); });
    fire(layer);
    blocks_.add(layer, fired_, x, y);
  }

  // The logits of a layer's gates, for x [..., d], which must outlive them.
  template <typename T>
  Logits<T> logits(int64_t layer, const Tensor& x) {
    TORCH_CHECK(0 <= layer && layer < layers_ && x.is_contiguous());
    TORCH_CHECK(tokens_ > 0 && x.numel() == tokens_ * d_ && x.scalar_type() == blocks_.type());
    return {x.const_data_ptr<T>(),
            gate_.const_data_ptr<float>() + layer * slots_ * d_,
            bias_.const_data_ptr<float>() + layer * slots_,
            tokens_,
            n_,
            d_,
            m_.data() + layer * tokens_ * n_};
  }

#ifdef NR_SERVE_PRODUCTS
  // The blocks whose residues `add` would add, for x [..., d], which must outlive them, once `logits` are written.
  PairedBlocks paired(int64_t layer, const Tensor& x) {
    fire(layer);
    return blocks_.paired(layer, fired_, x);
  }
#endif

  // Ends a step. Keeps the carried states of each piece's last token, by row, and of the tokens `ends`, by page
  // [E]. Counts the first `counted` tokens, each under its label [T]. Returns the number of layers whose gate was
  // open, by token and slot, selected or not, int32 [T, S]; nothing if no gate was open. Keeps nothing of a step
  // cut short.
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
  // Finds out which selected slots fire in a layer, from its logits.
  void fire(int64_t layer) {
    fired_.clear();
    open(layer);
    // By slot, so that a token's residues are summed in an order that does not depend on what shares its step.
    std::sort(fired_.begin(), fired_.end(), [](const Fired& a, const Fired& b) { return a.slot < b.slot; });
    done_ = layer + 1;
  }

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
          // A diverged stream or gate must not leave infinity in the totals for ever.
          const float g = std::min(over, ceiling_.const_data_ptr<float>()[s]);
          if (std::isfinite(g)) mass_.mutable_data_ptr<double>()[s] += g;
        }
    return open;
  }

  // Carries the layer's logits on, and notes which selected slots fired.
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

  // Thresholds of all evaluated slots for one token, [n].
  const float* limits(int64_t t) const { return (t < first_ ? limits_ : on_trial_).data(); }

  bool is_selected(int64_t t, int64_t s) const {
    return selected_.const_data_ptr<bool>()[t * selected_.stride(0) + s * selected_.stride(1)];
  }

  // Notes that a slot fired on a token, with its logit `over` above the threshold, if the slot is selected.
  void note(int64_t layer, int64_t t, int64_t s, float over) {
    if (!is_selected(t, s) || width(layer, s) == 0) return;
    auto block = std::find_if(fired_.begin(), fired_.end(), [&](const Fired& one) { return one.slot == s; });
    if (block == fired_.end()) block = fired_.insert(block, Fired{s, width(layer, s)});
    block->tokens.push_back(t);
    block->g.push_back(std::min(over, ceiling_.const_data_ptr<float>()[s]));
  }

  int64_t width(int64_t layer, int64_t slot) const { return width_.const_data_ptr<int32_t>()[layer * slots_ + slot]; }

  Tensor gate_, bias_, carry_, ceiling_, threshold_, width_, state_, page_state_;
  Tensor seen_, fired_count_, mass_, cross_;  // statistics
  int64_t layers_, slots_, d_;
  Blocks blocks_;
  // State of the current step.
  int64_t tokens_ = 0, n_ = 0, done_ = 0;  // `done_`: layers done
  bool opened_ = false;
  Tensor selected_;
  std::vector<int64_t> rows_, places_;
  int64_t first_ = 0;  // first token on trial
  std::vector<float> limits_, on_trial_, m_;
  std::vector<Fired> fired_;  // in the current layer
};

}  // namespace nr_serve
