// Operators of a decoder layer on a CPU. Each replaces several of torch's, whose calls cost more than what they compute.
//
// They compute in float32 and round once, so they differ from torch's own by rounding. A token's result does not
// depend on what shares its step. Shape suffixes as in attention.py: T tokens, B single tokens of requests, N longest
// context, H query heads, K key heads, G = H / K, D head size.

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define CPU_CAPABILITY AVX512
#define CPU_CAPABILITY_AVX512
#elif defined(__AVX2__) && defined(__FMA__)
#define CPU_CAPABILITY AVX2
#define CPU_CAPABILITY_AVX2
#endif

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t W = Vec::size();
constexpr int64_t HEADS_AT_ONCE = 4;    // their sums stay in registers
constexpr int64_t VECTORS_AT_ONCE = 4;  // of a value
constexpr int64_t TOKENS_AT_ONCE = 16;  // of a context

// Loads and stores of the first `count` of W values.

inline Vec load(const float* from, int64_t count = W) {
  return count == W ? Vec::loadu(from) : Vec::loadu(from, count);
}

inline Vec load(const BFloat16* from, int64_t count = W) {
  if (count < W) return std::get<0>(at::vec::convert_bfloat16_float(at::vec::Vectorized<BFloat16>::loadu(from, count)));
  Vec loaded;
  at::vec::load_fp32_from_bf16(from, loaded);
  return loaded;
}

inline void store(float* to, Vec v, int64_t count = W) { v.store(to, count); }

inline void store(BFloat16* to, Vec v, int64_t count = W) {
  at::vec::convert_float_bfloat16(v, v).store(to, count);
}

inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec most(Vec a, Vec b) { return at::vec::maximum(a, b); }
inline float sum(Vec v) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, v);
}

// f(position, count) for every W positions below `size`.
template <typename F>
inline void each(int64_t size, F&& f) {
  int64_t i = 0;
  for (; i + W <= size; i += W) f(i, W);
  if (i < size) f(i, size - i);
}

// f with a value of the tensor's type: float32 or bfloat16.
template <typename F>
void by_type(const Tensor& x, F&& f) {
  if (x.scalar_type() == at::kFloat) return f(float());
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "float32 or bfloat16 is needed, not ", x.scalar_type());
  f(BFloat16());
}

// What one thread takes at least, in items of `size` values.
inline int64_t grain(int64_t size) { return std::max<int64_t>(1, 16384 / size); }

// weight * x / sqrt(mean(x^2) + eps) along the last dimension; x is rounded before the weight, as in transformers.
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const int64_t d = weight.numel();
  TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && x.size(-1) == d && x.scalar_type() == weight.scalar_type());
  Tensor y = at::empty_like(x);
  by_type(x, [&](auto type) {
    using T = decltype(type);
    const T *xs = x.const_data_ptr<T>(), *ws = weight.const_data_ptr<T>();
    T* ys = y.mutable_data_ptr<T>();
    at::parallel_for(0, x.numel() / d, grain(d), [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row) {
        const T* in = xs + row * d;
        T* out = ys + row * d;
        Vec squares(0.f);
        each(d, [&](int64_t i, int64_t count) {
          const Vec v = load(in + i, count);
          squares = at::vec::fmadd(v, v, squares);
        });
        const Vec scale(1.f / std::sqrt(sum(squares) / d + static_cast<float>(eps)));
        each(d, [&](int64_t i, int64_t count) {
          store(out + i, load(in + i, count) * scale, count);
          store(out + i, load(out + i, count) * load(ws + i, count), count);
        });
      }
    });
  });
  return y;
}

// silu(gate) * up, of [..., 2h]: gate and up in turn; [..., h].
Tensor silu_mul(const Tensor& gate_up) {
  const int64_t h = gate_up.size(-1) / 2;
  TORCH_CHECK(gate_up.is_contiguous() && gate_up.size(-1) == 2 * h);
  auto sizes = gate_up.sizes().vec();
  sizes.back() = h;
  Tensor y = at::empty(sizes, gate_up.options());
  by_type(gate_up, [&](auto type) {
    using T = decltype(type);
    const T* in = gate_up.const_data_ptr<T>();
    T* out = y.mutable_data_ptr<T>();
    at::parallel_for(0, y.numel() / h, grain(2 * h), [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row)
        each(h, [&](int64_t i, int64_t count) {
          const Vec gate = load(in + 2 * row * h + i, count), up = load(in + (2 * row + 1) * h + i, count);
          store(out + row * h + i, gate / (Vec(1.f) + gate.neg().exp_u20()) * up, count);
        });
    });
  });
  return y;
}

// Rotary embedding (Su et al., 2021, in halves as in transformers) of a step's queries and keys, [T, (H + 2K) D]: keys
// and values go to their cells of [C, K, D], queries are returned, [T, H, D]. cos and sin: [T, D].
Tensor rotate(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& keys, const Tensor& values,
              const Tensor& cells) {
  const int64_t tokens = cells.numel(), K = keys.size(1), D = keys.size(2), half = D / 2;
  const int64_t heads = qkv.numel() / (tokens * D), H = heads - 2 * K;
  for (const Tensor* x : {&qkv, &cos, &sin, &keys, &values, &cells}) TORCH_CHECK(x->is_contiguous());
  for (const Tensor* x : {&cos, &sin, &keys, &values}) TORCH_CHECK(x->scalar_type() == qkv.scalar_type());
  TORCH_CHECK(qkv.numel() == tokens * heads * D && H > 0 && D == 2 * half && keys.sizes() == values.sizes());
  TORCH_CHECK(cos.numel() == tokens * D && sin.numel() == tokens * D);
  Tensor query = at::empty({tokens, H, D}, qkv.options());
  by_type(qkv, [&](auto type) {
    using T = decltype(type);
    const T *in = qkv.const_data_ptr<T>(), *cs = cos.const_data_ptr<T>(), *sn = sin.const_data_ptr<T>();
    T *q = query.mutable_data_ptr<T>(), *k = keys.mutable_data_ptr<T>(), *v = values.mutable_data_ptr<T>();
    const int64_t* cell = cells.const_data_ptr<int64_t>();
    at::parallel_for(0, tokens, grain(heads * D), [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t) {
        const T *c = cs + t * D, *s = sn + t * D;
        for (int64_t head = 0; head < H + K; ++head) {
          const T* x = in + (t * heads + head) * D;
          T* y = head < H ? q + (t * H + head) * D : k + (cell[t] * K + head - H) * D;
          each(half, [&](int64_t i, int64_t n) {
            const Vec a = load(x + i, n), b = load(x + half + i, n);
            store(y + i, a * load(c + i, n) - b * load(s + i, n), n);
            store(y + half + i, b * load(c + half + i, n) + a * load(s + half + i, n), n);
          });
        }
        std::copy_n(in + (t * heads + H + K) * D, K * D, v + cell[t] * K * D);
      }
    });
  });
  return query;
}

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
  for (int64_t d = 0; d < D; d += VECTORS_AT_ONCE * W) {
    const auto add_columns = [&](int64_t size) {
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
    };
    if (D - d >= VECTORS_AT_ONCE * W)
      add_columns(VECTORS_AT_ONCE * W);  // a constant, so that the sums are registers
    else
      add_columns(D - d);
  }
}

// f(G, g) for query heads g to g + G, at most HEADS_AT_ONCE; G is a constant.
template <typename F>
void by_heads(int64_t heads, F&& f) {
  for (int64_t g = 0; g < heads; g += HEADS_AT_ONCE) switch (std::min(HEADS_AT_ONCE, heads - g)) {
      case 1: f(std::integral_constant<int, 1>(), g); break;
      case 2: f(std::integral_constant<int, 2>(), g); break;
      case 3: f(std::integral_constant<int, 3>(), g); break;
      default: f(std::integral_constant<int, HEADS_AT_ONCE>(), g);
    }
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
  const auto by_rows = [&](const T* from, auto&& f) {
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
        by_heads(G, [&](auto some, int64_t g) { f(some, key * G + g, rows + key * D, i, count); });
    }
  };
  each(heads * D, [&](int64_t i, int64_t size) {
    store(query + i, load(q + i, size) * Vec(scale), size);
    store(sums + i, Vec(0.f), size);
  });
  by_rows(k, [&](auto some, int64_t head, const float* row, int64_t i, int64_t count) {
    multiply_keys<some()>(row, width, count, D, query + head * D, logits + head * n + i, n);
  });
  for (int64_t head = 0; head < heads; ++head) {
    float* row = logits + head * n;
    const Vec highest(at::vec::reduce_all<float>(most, row, n));
    at::vec::map<float>([&](Vec x) { return (x - highest).exp_u20(); }, row, row, n);
    total[head] = at::vec::reduce_all<float>(add, row, n);
  }
  by_rows(v, [&](auto some, int64_t head, const float* row, int64_t i, int64_t count) {
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

}  // namespace

TORCH_LIBRARY(nr_serve, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def("silu_mul(Tensor gate_up) -> Tensor");
  library.def(
      "rotate(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor cells) -> Tensor");
  library.def(
      "attend(Tensor query, Tensor keys, Tensor values, Tensor cells, Tensor positions, float scale, int window)"
      " -> Tensor");
}

TORCH_LIBRARY_IMPL(nr_serve, CPU, library) {
  library.impl("rms_norm", rms_norm);
  library.impl("silu_mul", silu_mul);
  library.impl("rotate", rotate);
  library.impl("attend", attend);
}
