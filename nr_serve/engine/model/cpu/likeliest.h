// The likeliest tokens of a step.

#pragma once

#include <limits>

#include "operators.h"
#include "vectors.h"

namespace nr_serve {

constexpr int64_t NOT_A_NUMBER = -1;  // in a token's place

// The index of the highest of V values, the first one if several are equal; NOT_A_NUMBER if one is NaN.
inline int64_t highest(const float* values, int64_t V) {
  constexpr int64_t STRETCH = 64 * W;
  const auto greater = [](Vec a, Vec b) { return at::vec::maximum(a, b); };  // NaN if one of them is
  float best = -std::numeric_limits<float>::infinity();
  int64_t from = 0;
  for (int64_t i = 0; i < V; i += STRETCH) {
    const float own = at::vec::reduce_all<float>(greater, values + i, std::min(STRETCH, V - i));
    if (own != own) return NOT_A_NUMBER;
    if (own > best) best = own, from = i;
  }
  return std::find(values + from, values + V, best) - values;
}

// `highest` of each row of float32 logits [N, V]; int64 [N].
Tensor likeliest(const Tensor& logits) {
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 && logits.scalar_type() == at::kFloat);
  const int64_t N = logits.size(0), V = logits.size(1);
  Tensor tokens = logits.new_empty({N}, at::kLong);
  const Tensor whole = logits.contiguous();
  const float* rows = whole.const_data_ptr<float>();
  int64_t* to = tokens.mutable_data_ptr<int64_t>();
  share(N, grain(V), [&](int64_t from, int64_t end) {
    for (int64_t i = from; i < end; ++i) to[i] = highest(rows + i * V, V);
  });
  return tokens;
}

}  // namespace nr_serve
