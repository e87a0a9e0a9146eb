// Attention of single tokens over KV pages. Shape suffixes as in attention.py; n tokens of a context.

#pragma once

#include <vector>

#include "operators.h"
#include "vectors.h"

namespace nr_serve {

constexpr int64_t TOKENS_AT_ONCE = 16;  // of a context: few enough to stay in a core's cache for all heads
static_assert(TOKENS_AT_ONCE % W == 0);

// Rows of the current tokens and of the next ones. Pages lie anywhere in memory, so next rows are prefetched by
// hand.
template <typename T>
struct Rows {
  const T *now[TOKENS_AT_ONCE], *next[TOKENS_AT_ONCE];

  // The row of token i from d on, D values long; prefetches the same part of the next token's row.
  const T* row(int64_t i, int64_t d, int64_t D) const {
    for (int64_t j = 0; j < D; j += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(next[i] + d + j);
    return now[i] + d;
  }
};

// Products of G query heads, [G, D], with the keys of `tokens` tokens in one head, at offset `d` of their rows.
// Logits are [G, n] and are written W at a time.
template <int G, typename T>
void multiply_keys(const Rows<T>& rows, int64_t d, int64_t tokens, int64_t D, const T* query, float scale,
                   float* logits, int64_t n) {
  for (int64_t i = 0; i < tokens; i += W) {
    Vec fours[G][W / 4];
    for (auto& row : fours)
      for (Vec& s : row) s = Vec(0.f);
    for (int64_t four = 0; 4 * four < std::min(W, tokens - i); ++four) {
      Vec sums[G][4];
      for (auto& row : sums)
        for (Vec& s : row) s = Vec(0.f);
      const T* key[4];
      for (int64_t j = 0; j < 4; ++j) key[j] = rows.row(i + 4 * four + j, d, D);
      for_vectors<PRODUCTS<T>>(D, [&](int64_t k, int64_t count) {
        for (int g = 0; g < G; ++g)
          for (int64_t j = 0; j < 4; ++j)
            sums[g][j] = multiply_add(query + g * D + k, key[j] + k, count, sums[g][j]);
      });
      for (int g = 0; g < G; ++g) fours[g][four] = sum_four(sums[g]);
    }
    for (int g = 0; g < G; ++g) store(logits + g * n + i, sum_fours(fours[g]) * Vec(scale));
  }
}

// Adds the values of `tokens` tokens in one head, at offset `d` of their rows, weighted by `weights` [G, n] for G
// query heads, to `out`, [G, D].
template <int G, typename T>
void add_values(const Rows<T>& rows, int64_t d, int64_t tokens, int64_t D, const float* weights, int64_t n,
                float* out) {
  for_columns(0, D, [&](auto size, int64_t column) {
    Vec sums[G][VECTORS_AT_ONCE];
    for (int g = 0; g < G; ++g)
      for_vectors(size, [&](int64_t j, int64_t count) { sums[g][j / W] = load(out + g * D + column + j, count); });
    for (int64_t i = 0; i < tokens; ++i) {
      const T* value = rows.row(i, d + column, size);
      for_vectors(size, [&](int64_t j, int64_t count) {
        const Vec v = load(value + j, count);
        for (int g = 0; g < G; ++g) sums[g][j / W] = at::vec::fmadd(Vec(weights[g * n + i]), v, sums[g][j / W]);
      });
    }
    for (int g = 0; g < G; ++g)
      for_vectors(size, [&](int64_t j, int64_t count) { store(out + g * D + column + j, sums[g][j / W], count); });
  });
}

// One token's attention in `keys` key heads with G query heads each. q and out are [keys * G, D]; k and v [C,
// stride] start at the first of these key heads. `room` is the thread's scratch memory.
template <typename T>
void attend_token(const T* q, const T* k, const T* v, int64_t stride, const int64_t* cells, int64_t n, int64_t keys,
                  int64_t G, int64_t D, float scale, std::vector<float>& room, T* out) {
  const int64_t heads = keys * G, padded = (n + W - 1) / W * W;
  room.resize(heads * (D + padded + 1));
  float *sums = room.data(), *logits = sums + heads * D, *total = logits + heads * padded;
  // Takes a few tokens through all heads at a time, as a token's heads lie end to end in memory.
  const auto by_tokens = [&](const T* from, auto&& f) {
    Rows<T> rows;
    for (int64_t i = 0; i < n; i += TOKENS_AT_ONCE) {
      for (int64_t j = 0; j < TOKENS_AT_ONCE; ++j) {
        rows.now[j] = from + cells[std::min(i + j, n - 1)] * stride;
        rows.next[j] = from + cells[std::min(i + j + TOKENS_AT_ONCE, n - 1)] * stride;
      }
      for (int64_t key = 0; key < keys; ++key)
        for_rows(G, [&](auto heads_at_once, int64_t g) {
          f(heads_at_once, key * G + g, rows, key * D, i, std::min(TOKENS_AT_ONCE, n - i));
        });
    }
  };
  for_vectors(heads * D, [&](int64_t i, int64_t count) { store(sums + i, Vec(0.f), count); });
  by_tokens(k, [&](auto heads_at_once, int64_t head, const Rows<T>& rows, int64_t d, int64_t i, int64_t tokens) {
    multiply_keys<heads_at_once()>(rows, d, tokens, D, q + head * D, scale, logits + head * padded + i, padded);
  });
  for (int64_t head = 0; head < heads; ++head) {
    float* row = logits + head * padded;
    const Vec highest(at::vec::reduce_all<float>(vec_max, row, n));
    at::vec::map<float>([&](Vec x) { return exp(x - highest); }, row, row, n);
    total[head] = at::vec::reduce_all<float>(vec_add, row, n);
  }
  by_tokens(v, [&](auto heads_at_once, int64_t head, const Rows<T>& rows, int64_t d, int64_t i, int64_t tokens) {
    add_values<heads_at_once()>(rows, d, tokens, D, logits + head * padded + i, padded, sums + head * D);
  });
  for (int64_t head = 0; head < heads; ++head)
    for_vectors(D, [&](int64_t d, int64_t count) {
      store(out + head * D + d, load(sums + head * D + d, count) / Vec(total[head]), count);
    });
}

// Refuses positions outside a context of N tokens.
inline void check_positions(const Tensor& positions, int64_t N) {
  const auto* position = positions.const_data_ptr<int64_t>();
  TORCH_CHECK(std::all_of(position, position + positions.numel(), [&](int64_t p) { return 0 <= p && p < N; }));
}

// Attention of single tokens over their requests' pages: query [B, H, D], keys and values [C, K, D], cells [B, N]
// of the contexts, positions [B] of the tokens in them. Each attends to its last `window` positions. Returns [B,
// H, D].
Tensor attend(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& cells,
              const Tensor& positions, double scale, int64_t window) {
  const int64_t B = cells.size(0), N = cells.size(1), H = query.size(1), D = query.size(2), K = keys.size(1);
  TORCH_CHECK(K > 0 && D > 0 && window > 0);
  const int64_t G = H / K;
  for (const Tensor* x : {&query, &keys, &values, &cells, &positions}) TORCH_CHECK(x->is_contiguous());
  for (const Tensor* x : {&keys, &values}) TORCH_CHECK(x->scalar_type() == query.scalar_type() && x->size(2) == D);
  TORCH_CHECK(query.size(0) == B && positions.numel() == B && H == G * K && keys.sizes() == values.sizes());
  check_positions(positions, N);
  Tensor out = query.new_empty(query.sizes());
  with_type(query, [&](auto type) {
    using T = decltype(type);
    const T *q = query.const_data_ptr<T>(), *k = keys.const_data_ptr<T>(), *v = values.const_data_ptr<T>();
    T* o = out.mutable_data_ptr<T>();
    const int64_t *cell = cells.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
    const auto context = [&](int64_t b) { return std::min(position[b] + 1, window); };
    int64_t all = 0;
    for (int64_t b = 0; b < B; ++b) all += context(b) * K;
    // Contexts differ in length, so threads divide the contexts' tokens: each takes the heads that begin in its
    // part.
    share(all, grain(D), [&](int64_t from, int64_t to) {
      std::vector<float> room;
      for (int64_t b = 0, before = 0; b < B; ++b) {
        const int64_t n = context(b), first = position[b] + 1 - n;
        const auto heads_before = [&](int64_t end) { return std::clamp<int64_t>((end - before + n - 1) / n, 0, K); };
        const int64_t head = heads_before(from), heads = heads_before(to) - head, begin = (b * K + head) * G * D;
        if (heads > 0)
          attend_token(q + begin, k + head * D, v + head * D, K * D, cell + b * N + first, n, heads, G, D,
                       static_cast<float>(scale), room, o + begin);
        before += n * K;
      }
    });
  });
  return out;
}

}  // namespace nr_serve
