// The logits of a layer's gates. Shape suffixes as in bank.py.

#pragma once

#include "vectors.h"

namespace nr_serve {

// Logits of LOGIT_TOKENS tokens for LOGIT_GATES gates are computed together: their sums fill one vector.
constexpr int64_t LOGIT_GATES = std::min<int64_t>(8, W), LOGIT_TOKENS = W / LOGIT_GATES;
static_assert(LOGIT_TOKENS > 0);

// Products of the tokens' x with the gates' w, [d] each; all of a token's products, then the next token's.
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

// Logits z [T, n], written where the carried m will be, of tokens x [T, d] for gates w [n, d] with biases b [n].
template <typename T>
void fill_logits(const T* x, int64_t tokens, const float* w, const float* b, int64_t n, int64_t d, float* m) {
  // A thread takes eight gates at a time through its tokens, so that the gates stay in the fastest cache. Each
  // token needs so little work that a second thread pays only from eight times the usual grain on.
  const int64_t tiles = (tokens + LOGIT_TOKENS - 1) / LOGIT_TOKENS;
  share(tiles, 8 * grain(LOGIT_TOKENS * n * d), [&](int64_t from, int64_t to) {
    for (int64_t s = 0; s < n; s += LOGIT_GATES) {
      const float* gates[LOGIT_GATES];
      for (int64_t k = 0; k < LOGIT_GATES; ++k) gates[k] = w + std::min(s + k, n - 1) * d;
      for (int64_t t = from * LOGIT_TOKENS; t < to * LOGIT_TOKENS; t += LOGIT_TOKENS) {
        const T* rows[LOGIT_TOKENS];
        for (int64_t k = 0; k < LOGIT_TOKENS; ++k) rows[k] = x + std::min(t + k, tokens - 1) * d;
        float z[W];
        store(z, multiply_gates(rows, gates, d));
        for (int64_t i = t; i < std::min(t + LOGIT_TOKENS, tokens); ++i)
          for (int64_t k = s; k < std::min(s + LOGIT_GATES, n); ++k)
            m[i * n + k] = z[(i - t) * LOGIT_GATES + k - s] + b[k];
      }
    }
  });
}

}  // namespace nr_serve
