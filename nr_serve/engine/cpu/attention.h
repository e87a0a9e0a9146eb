// Attention of single tokens over KV pages. Shape suffixes as in attention.py; n tokens of a context.

#pragma once

#include <ATen/ops/empty_like.h>

#include <vector>

#include "vectors.h"

namespace nr_serve {

constexpr int64_t TOKENS_AT_ONCE = 16;  // of a context: for all heads they fit into a core's cache

// Products of G query heads, [G, D], with `count` keys of one head; logits are [G, n].
template <int G>
void multiply_keys(const float* keys, int64_t stride, int64_t count, int64_t D, const float* query, float* logits,
                   int64_t n) {
  for (int64_t i = 0; i < count; ++i) {
    const float* key = keys + i * stride;
    Vec sums[G];
    for (Vec& s : sums) s = Vec(0.f);
    each(D, [&](int64_t d, int64_t size) {
      const Vec k = load(key + d, size);
      for (int g = 0; g < G; ++g) sums[g] = at::vec::fmadd(load(query + g * D + d, size), k, sums[g]);
    });
    for (int g = 0; g < G; ++g) logits[g * n + i] = sum(sums[g]);
  }
}

// Adds `count` values of one head, times the weights [G, n] of G query heads, to `out`, [G, D].
template <int G>
void add_values(const float* values, int64_t stride, int64_t count, int64_t D, const float* weights, float* out,
                int64_t n) {
  by_columns(0, D, [&](auto size, int64_t d) {
    Vec sums[G][VECTORS_AT_ONCE];
    for (int g = 0; g < G; ++g)
      each(size, [&](int64_t j, int64_t some) { sums[g][j / W] = load(out + g * D + d + j, some); });
    for (int64_t i = 0; i < count; ++i)
      each(size, [&](int64_t j, int64_t some) {
        const Vec v = load(values + i * stride + d + j, some);
        for (int g = 0; g < G; ++g) sums[g][j / W] = at::vec::fmadd(Vec(weights[g * n + i]), v, sums[g][j / W]);
      });
    for (int g = 0; g < G; ++g)
      each(size, [&](int64_t j, int64_t some) { store(out + g * D + d + j, sums[g][j / W], some); });
  });
}

// One token's attention in some heads: `keys` key heads with G query heads each; q and out are [keys * G, D], and
// k and v [C, stride] begin with the first key head. `room` is the thread's own.
template <typename T>
void attend_token(const T* q, const T* k, const T* v, int64_t stride, const int64_t* cells, int64_t n, int64_t keys,
                  int64_t G, int64_t D, float scale, std::vector<float>& room, T* out) {
  const int64_t heads = keys * G, width = keys * D;
  room.resize(heads * (2 * D + n + 1) + TOKENS_AT_ONCE * width);
  float *query = room.data(), *sums = query + heads * D, *logits = sums + heads * D, *total = logits + heads * n;
  float* rows = total + heads;
  // Rows are read end to end, as memory likes it, and a few tokens' stay in the core's cache for all heads. The next
  // ones are asked for meanwhile: their page lies anywhere.
  const auto by_tokens = [&](const T* from, auto&& f) {
    for (int64_t i = 0; i < n; i += TOKENS_AT_ONCE) {
      const int64_t count = std::min(TOKENS_AT_ONCE, n - i);
      for (int64_t j = 0; j < count; ++j)
        each(width, [&](int64_t d, int64_t size) {
          store(rows + j * width + d, load(from + cells[i + j] * stride + d, size), size);
        });
      for (int64_t j = i + count; j < std::min(i + count + TOKENS_AT_ONCE, n); ++j)
        for (int64_t d = 0; d < width; d += 64 / static_cast<int64_t>(sizeof(T)))
          __builtin_prefetch(from + cells[j] * stride + d);
      for (int64_t key = 0; key < keys; ++key)
        by_rows(G, [&](auto some, int64_t g) { f(some, key * G + g, rows + key * D, i, count); });
    }
  };
  each(heads * D, [&](int64_t i, int64_t size) {
    store(query + i, load(q + i, size) * Vec(scale), size);
    store(sums + i, Vec(0.f), size);
  });
  by_tokens(k, [&](auto some, int64_t head, const float* row, int64_t i, int64_t count) {
    multiply_keys<some()>(row, width, count, D, query + head * D, logits + head * n + i, n);
  });
  for (int64_t head = 0; head < heads; ++head) {
    float* row = logits + head * n;
    const Vec highest(at::vec::reduce_all<float>(most, row, n));
    at::vec::map<float>([&](Vec x) { return (x - highest).exp_u20(); }, row, row, n);
    total[head] = at::vec::reduce_all<float>(add, row, n);
  }
  by_tokens(v, [&](auto some, int64_t head, const float* row, int64_t i, int64_t count) {
    add_values<some()>(row, width, count, D, logits + head * n + i, sums + head * D, n);
  });
  for (int64_t head = 0; head < heads; ++head)
    each(D, [&](int64_t d, int64_t size) {
      store(out + head * D + d, load(sums + head * D + d, size) / Vec(total[head]), size);
    });
}

// Attention of single tokens over the pages of their requests: query [B, H, D], keys and values [C, K, D], cells
// [B, N] of the contexts, positions [B] of the tokens in them. No further back than `window` positions; [B, H, D].
Tensor attend(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& cells,
              const Tensor& positions, double scale, int64_t window) {
  const int64_t B = cells.size(0), N = cells.size(1), H = query.size(1), D = query.size(2), K = keys.size(1), G = H / K;
  for (const Tensor* x : {&query, &keys, &values, &cells, &positions}) TORCH_CHECK(x->is_contiguous());
  for (const Tensor* x : {&keys, &values}) TORCH_CHECK(x->scalar_type() == query.scalar_type() && x->size(2) == D);
  TORCH_CHECK(query.size(0) == B && positions.numel() == B && H == G * K && keys.sizes() == values.sizes());
  Tensor out = at::empty_like(query);
  by_type(query, [&](auto type) {
    using T = decltype(type);
    const T *q = query.const_data_ptr<T>(), *k = keys.const_data_ptr<T>(), *v = values.const_data_ptr<T>();
    T* o = out.mutable_data_ptr<T>();
    const int64_t *cell = cells.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
    at::parallel_for(0, B * K, grain(N * D), [&](int64_t from, int64_t to) {
      std::vector<float> room;
      for (int64_t z = from; z < to;) {
        const int64_t b = z / K, head = z % K, some = std::min(K - head, to - z), at = (b * K + head) * G * D;
        const int64_t end = position[b] + 1, first = std::max<int64_t>(0, end - window);
        attend_token(q + at, k + head * D, v + head * D, K * D, cell + b * N + first, end - first, some, G, D,
                     static_cast<float>(scale), room, o + at);
        z += some;
      }
    });
  });
  return out;
}

}  // namespace nr_serve
