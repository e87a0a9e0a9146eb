// The residues of a step of few tokens. Shape suffixes as in bank.py; F tokens whose gate fired.

#pragma once

#include <cmath>
#include <vector>

#include "vectors.h"

namespace nr_serve {

// W_in and W_gate of one hidden value, [d] each, times F tokens' x, [F, d].
template <int F, typename T>
void multiply_up(const T* in, const T* gate, const float* x, int64_t d, float* ins, float* gates) {
  Vec in_sums[F], gate_sums[F];
  for (int f = 0; f < F; ++f) in_sums[f] = gate_sums[f] = Vec(0.f);
  each(d, [&](int64_t i, int64_t size) {
    const Vec u = load(in + i, size), v = load(gate + i, size);
    for (int f = 0; f < F; ++f) {
      const Vec some = load(x + f * d + i, size);
      in_sums[f] = at::vec::fmadd(some, u, in_sums[f]);
      gate_sums[f] = at::vec::fmadd(some, v, gate_sums[f]);
    }
  });
  for (int f = 0; f < F; ++f) ins[f] = sum(in_sums[f]), gates[f] = sum(gate_sums[f]);
}

// Columns of W_out, [h, d], times F tokens' hidden values, [F, h], added to the same columns of their y.
template <int F, typename T, typename Size>
void add_out(const T* out, int64_t d, int64_t h, const float* hidden, Size size, T* const* y) {
  Vec sums[F][VECTORS_AT_ONCE];
  for (auto& row : sums)
    for (Vec& s : row) s = Vec(0.f);
  for (int64_t j = 0; j < h; ++j) {
    __builtin_prefetch(out + (j + 8) * d);
    each(size, [&](int64_t i, int64_t some) {
      const Vec w = load(out + j * d + i, some);
      for (int f = 0; f < F; ++f) sums[f][i / W] = at::vec::fmadd(Vec(hidden[f * h + j]), w, sums[f][i / W]);
    });
  }
  for (int f = 0; f < F; ++f)
    each(size, [&](int64_t i, int64_t some) { store(y[f] + i, load(y[f] + i, some) + sums[f][i / W], some); });
}

// The tokens for which one slot's block is to be computed.
struct Fired {
  std::vector<int64_t> tokens;
  std::vector<float> g, x, hidden;
};

// The gates of a layer: weights [n, d], biases, carries and ceilings [n]; the logits carried from before each piece
// [P, n] and each token's place in its piece [T]; thresholds and who is selected [T, n]; block widths.
struct Gates {
  const Tensor &weight, &bias, &carry, &ceiling, &before, &offset, &threshold, &selected, &width;

  // Fills the carried logits m [T, n] of x [T, d]; whether any gate is open. Who fired in a selected slot is noted.
  bool open(const std::vector<float>& x, float* m, std::vector<Fired>& fired) const {
    const int64_t n = weight.size(0), d = weight.size(1), tokens = offset.numel();
    const float *w = weight.const_data_ptr<float>(), *b = bias.const_data_ptr<float>();
    const float *a = carry.const_data_ptr<float>(), *past = before.const_data_ptr<float>();
    const float *limit = threshold.const_data_ptr<float>(), *highest = ceiling.const_data_ptr<float>();
    const bool* may = selected.const_data_ptr<bool>();
    const int64_t* place = offset.const_data_ptr<int64_t>();
    const int32_t* widths = width.const_data_ptr<int32_t>();
    bool opened = false;
    for (int64_t t = 0, piece = -1; t < tokens; ++t) {
      piece += place[t] == 0;
      for (int64_t s = 0; s < n; ++s) {
        Vec products(0.f);
        each(d, [&](int64_t i, int64_t size) {
          products = at::vec::fmadd(load(x.data() + t * d + i, size), load(w + s * d + i, size), products);
        });
        const float z = sum(products) + b[s], last = place[t] ? m[(t - 1) * n + s] : past[piece * n + s];
        m[t * n + s] = a[s] * last + (1.f - a[s]) * z;
        const float over = m[t * n + s] - limit[t * threshold.stride(0) + s * threshold.stride(1)];
        if (!(over > 0)) continue;
        opened = true;
        if (!may[t * selected.stride(0) + s * selected.stride(1)] || !widths[s]) continue;
        fired[s].tokens.push_back(t);
        fired[s].g.push_back(std::min(over, highest[s]));
        fired[s].x.insert(fired[s].x.end(), x.begin() + t * d, x.begin() + (t + 1) * d);
      }
    }
    return opened;
  }
};

// The hidden values of a block of width h, scaled by g: W_in and W_gate are [2h, d].
template <typename T>
void fill_hidden(Fired& block, const T* up, int64_t h, int64_t d) {
  const int64_t tokens = block.tokens.size();
  block.hidden.resize(tokens * h);
  if (tokens == 0) return;
  at::parallel_for(0, h, grain(2 * d), [&](int64_t from, int64_t to) {
    for (int64_t j = from; j < to; ++j)
      by_rows(tokens, [&](auto some, int64_t f) {
        float in[some()], gate[some()];
        multiply_up<some()>(up + j * d, up + (h + j) * d, block.x.data() + f * d, d, in, gate);
        for (int k = 0; k < some(); ++k)
          block.hidden[(f + k) * h + j] = gate[k] / (1.f + std::exp(-gate[k])) * in[k] * block.g[f + k];
      });
  });
}

// Adds the residues of a layer to y, of the tokens whose gate fired in a slot that is selected; whether any gate is
// open. As in bank.py: x, y [T, d]; `Gates`; m [T, n] is written; W_in and W_gate [S, 2H, d], W_out transposed
// [S, H, d], and the widths of the slots' blocks [S].
bool add_residues(const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& bias, const Tensor& carry,
                  const Tensor& ceiling, const Tensor& before, const Tensor& offset, const Tensor& threshold,
                  const Tensor& selected, const Tensor& m, const Tensor& up, const Tensor& out, const Tensor& width) {
  const int64_t tokens = x.size(0), d = x.size(1), n = gate.size(0);
  for (const Tensor* t : {&x, &y, &gate, &bias, &carry, &ceiling, &before, &offset, &m, &width}) TORCH_CHECK(t->is_contiguous());
  for (const Tensor* t : {&y, &up, &out}) TORCH_CHECK(t->scalar_type() == x.scalar_type());
  TORCH_CHECK(y.sizes() == x.sizes() && gate.size(1) == d && bias.numel() == n && carry.numel() == n && ceiling.numel() == n);
  TORCH_CHECK(before.size(1) == n && offset.numel() == tokens && m.numel() == tokens * n && width.numel() >= n);
  TORCH_CHECK(threshold.size(0) == tokens && threshold.size(1) == n && selected.sizes() == threshold.sizes());
  TORCH_CHECK(up.stride(2) == 1 && up.stride(1) == d && out.stride(2) == 1 && out.stride(1) == d);
  const int32_t* h = width.const_data_ptr<int32_t>();
  bool opened = false;
  by_type(x, [&](auto type) {
    using T = decltype(type);
    const T *ups = up.const_data_ptr<T>(), *outs = out.const_data_ptr<T>();
    T* ys = y.mutable_data_ptr<T>();
    std::vector<float> xs(tokens * d);
    each(tokens * d, [&](int64_t i, int64_t size) { store(xs.data() + i, load(x.const_data_ptr<T>() + i, size), size); });
    std::vector<Fired> fired(n);
    const Gates gates{gate, bias, carry, ceiling, before, offset, threshold, selected, width};
    opened = gates.open(xs, m.mutable_data_ptr<float>(), fired);
    for (int64_t s = 0; s < n; ++s) fill_hidden(fired[s], ups + s * up.stride(0), h[s], d);
    constexpr int64_t run = VECTORS_AT_ONCE * W;
    at::parallel_for(0, (d + run - 1) / run, 1, [&](int64_t from, int64_t to) {
      for (int64_t s = 0; s < n; ++s)
        by_columns(from * run, std::min(d, to * run), [&](auto size, int64_t i) {
          by_rows(fired[s].tokens.size(), [&](auto some, int64_t f) {
            T* rows[some()];
            for (int k = 0; k < some(); ++k) rows[k] = ys + fired[s].tokens[f + k] * d + i;
            add_out<some()>(outs + s * out.stride(0) + i, d, h[s], fired[s].hidden.data() + f * h[s], size, rows);
          });
        });
    });
  });
  return opened;
}

}  // namespace nr_serve
