// The operators between a decoder layer's products. Shape suffixes as in attention.py.

#pragma once

#include <cmath>
#include <optional>

#include "operators.h"
#include "vectors.h"

namespace nr_serve {

// 1 / sqrt(mean(x^2) + eps) of d values.
template <typename T>
inline Vec norm_scale(const T* x, int64_t d, float eps) {
  Vec squares(0.f);
  for_vectors(d, [&](int64_t i, int64_t count) {
    const Vec v = load(x + i, count);
    squares = at::vec::fmadd(v, v, squares);
  });
  return Vec(1.f / std::sqrt(sum(squares) / d + eps));
}

// weight * x / sqrt(mean(x^2) + eps) along the last dimension.
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const int64_t d = weight.numel();
  TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && x.size(-1) == d &&
              x.scalar_type() == weight.scalar_type());
  TORCH_CHECK(d > 0);
  Tensor y = x.new_empty(x.sizes());
  with_type(x, [&](auto type) {
    using T = decltype(type);
    const T *in = x.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
    T* out = y.mutable_data_ptr<T>();
    share(x.numel() / d, grain(d), [&](int64_t from, int64_t to) {
      for (int64_t row = from * d; row < to * d; row += d) {
        const Vec scale = norm_scale(in + row, d, static_cast<float>(eps));
        for_vectors(d, [&](int64_t i, int64_t count) {
          store(out + row + i, load(in + row + i, count) * scale * load(w + i, count), count);
        });
      }
    });
  });
  return y;
}

// a + b, of the same type and shape.
Tensor add(const Tensor& a, const Tensor& b) {
  TORCH_CHECK(a.is_contiguous() && b.is_contiguous() && a.numel() == b.numel() && a.scalar_type() == b.scalar_type());
  Tensor y = a.new_empty(a.sizes());
  with_type(a, [&](auto type) {
    using T = decltype(type);
    const T *left = a.const_data_ptr<T>(), *right = b.const_data_ptr<T>();
    T* out = y.mutable_data_ptr<T>();
    share(a.numel(), grain(1), [&](int64_t from, int64_t to) {
      for_vectors(to - from, [&](int64_t i, int64_t count) {
        store(out + from + i, load(left + from + i, count) + load(right + from + i, count), count);
      });
    });
  });
  return y;
}

// silu(gate) * up, [..., h], from gate and up side by side, [..., 2h].
Tensor silu_mul(const Tensor& gate_up) {
  const int64_t h = gate_up.size(-1) / 2;
  TORCH_CHECK(gate_up.is_contiguous() && h > 0 && gate_up.size(-1) == 2 * h);
  auto sizes = gate_up.sizes().vec();
  sizes.back() = h;
  Tensor y = gate_up.new_empty(sizes);
  with_type(gate_up, [&](auto type) {
    using T = decltype(type);
    const T* in = gate_up.const_data_ptr<T>();
    T* out = y.mutable_data_ptr<T>();
    share(y.numel() / h, grain(2 * h), [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row)
        for_vectors(h, [&](int64_t i, int64_t count) {
          const Vec gate = load(in + 2 * row * h + i, count), up = load(in + (2 * row + 1) * h + i, count);
          store(out + row * h + i, silu(gate) * up, count);
        });
    });
  });
  return y;
}

// Rotary embedding of one head of D values at one token, after an RMSNorm if `norm` is given.
template <typename T>
inline void rotate_head(const T* x, const T* cos, const T* sin, const T* norm, float eps, int64_t half, T* y) {
  const Vec scale = norm ? norm_scale(x, 2 * half, eps) : Vec(1.f);
  for_vectors(half, [&](int64_t i, int64_t count) {
    Vec a = load(x + i, count), b = load(x + half + i, count);
    if (norm) {
      a = a * scale * load(norm + i, count);
      b = b * scale * load(norm + half + i, count);
    }
    store(y + i, a * load(cos + i, count) - b * load(sin + i, count), count);
    store(y + half + i, b * load(cos + half + i, count) + a * load(sin + half + i, count), count);
  });
}

// Rotary embedding (Su et al., 2021, in halves as in transformers) of a step's queries and keys, [T, (H + 2K) D],
// after an RMSNorm if weights [D] are given. Keys and values are written to their cells of [C, K, D]; queries are
// returned, [T, H, D]. cos and sin: [T, D].
Tensor rotate(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& keys, const Tensor& values,
              const Tensor& cells, const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm,
              double eps) {
  const int64_t tokens = cells.numel(), K = keys.size(1), D = keys.size(2);
  TORCH_CHECK(tokens > 0 && D > 0);
  const int64_t heads = qkv.numel() / (tokens * D), H = heads - 2 * K;
  for (const Tensor* x : {&qkv, &cos, &sin, &keys, &values, &cells}) TORCH_CHECK(x->is_contiguous());
  for (const Tensor* x : {&cos, &sin, &keys, &values}) TORCH_CHECK(x->scalar_type() == qkv.scalar_type());
  for (const auto* x : {&q_norm, &k_norm})
    TORCH_CHECK(!*x || ((*x)->is_contiguous() && (*x)->numel() == D && (*x)->scalar_type() == qkv.scalar_type()));
  TORCH_CHECK(qkv.numel() == tokens * heads * D && H > 0 && D % 2 == 0 && keys.sizes() == values.sizes());
  TORCH_CHECK(cos.numel() == tokens * D && sin.numel() == tokens * D);
  Tensor query = qkv.new_empty({tokens, H, D});
  with_type(qkv, [&](auto type) {
    using T = decltype(type);
    const T *in = qkv.const_data_ptr<T>(), *c = cos.const_data_ptr<T>(), *s = sin.const_data_ptr<T>();
    const T *qn = q_norm ? q_norm->const_data_ptr<T>() : nullptr, *kn = k_norm ? k_norm->const_data_ptr<T>() : nullptr;
    T *q = query.mutable_data_ptr<T>(), *k = keys.mutable_data_ptr<T>(), *v = values.mutable_data_ptr<T>();
    const int64_t* cell = cells.const_data_ptr<int64_t>();
    share(tokens, grain(heads * D), [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t) {
        const T* x = in + t * heads * D;
        for (int64_t head = 0; head < H; ++head, x += D)
          rotate_head(x, c + t * D, s + t * D, qn, static_cast<float>(eps), D / 2, q + (t * H + head) * D);
        for (int64_t head = 0; head < K; ++head, x += D)
          rotate_head(x, c + t * D, s + t * D, kn, static_cast<float>(eps), D / 2, k + (cell[t] * K + head) * D);
        std::copy_n(x, K * D, v + cell[t] * K * D);
      }
    });
  });
  return query;
}

}  // namespace nr_serve
