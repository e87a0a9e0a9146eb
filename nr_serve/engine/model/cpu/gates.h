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

// The logits of n gates w [n, d], with biases b [n], on tokens x [T, d], to be written to m [T, n], where they will
// be carried. The work is in tiles, each of LOGIT_GATES gates and LOGIT_TOKENS tokens, that threads may share.
template <typename T>
struct Logits {
  const T* x;
  const float *w, *b;
  int64_t tokens, n, d;
  float* m;

  int64_t tiles() const { return tiles_of(tokens, LOGIT_TOKENS) * tiles_of(n, LOGIT_GATES); }

  // Writes tiles `from` to `to`: eight gates at a time through all tokens, so that they stay in the fastest cache.
  void fill(int64_t from, int64_t to) const {
    const int64_t by_tokens = tiles_of(tokens, LOGIT_TOKENS);
    for (int64_t tile = from; tile < to; ++tile) {
      const int64_t s = tile / by_tokens * LOGIT_GATES, t = tile % by_tokens * LOGIT_TOKENS;
      const float* gates[LOGIT_GATES];
      for (int64_t k = 0; k < LOGIT_GATES; ++k) gates[k] = w + std::min(s + k, n - 1) * d;
      const T* rows[LOGIT_TOKENS];
      for (int64_t k = 0; k < LOGIT_TOKENS; ++k) rows[k] = x + std::min(t + k, tokens - 1) * d;
      float z[W];
      store(z, multiply_gates(rows, gates, d));
      for (int64_t i = t; i < std::min(t + LOGIT_TOKENS, tokens); ++i)
        for (int64_t k = s; k < std::min(s + LOGIT_GATES, n); ++k)
          m[i * n + k] = z[(i - t) * LOGIT_GATES + k - s] + b[k];
    }
  }

  // Writes all of them. A tile needs so little work that a second thread pays only from eight times the usual grain on.
  void fill_all() const {
    share(tiles(), 8 * grain(LOGIT_TOKENS * LOGIT_GATES * d), [&](int64_t from, int64_t to) { fill(from, to); });
  }

 private:
  static int64_t tiles_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
};

}  // namespace nr_serve
