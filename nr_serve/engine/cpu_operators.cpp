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
#include <optional>
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

// 1 / sqrt(mean(x^2) + eps) of d values.
template <typename T>
inline Vec norm_scale(const T* x, int64_t d, float eps) {
  Vec squares(0.f);
  each(d, [&](int64_t i, int64_t count) {
    const Vec v = load(x + i, count);
    squares = at::vec::fmadd(v, v, squares);
  });
  return Vec(1.f / std::sqrt(sum(squares) / d + eps));
}

// weight * x / sqrt(mean(x^2) + eps) along the last dimension.
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const int64_t d = weight.numel();
  TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && x.size(-1) == d && x.scalar_type() == weight.scalar_type());
  Tensor y = at::empty_like(x);
  by_type(x, [&](auto type) {
    using T = decltype(type);
    const T *in = x.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
    T* out = y.mutable_data_ptr<T>();
    at::parallel_for(0, x.numel() / d, grain(d), [&](int64_t from, int64_t to) {
      for (int64_t row = from * d; row < to * d; row += d) {
        const Vec scale = norm_scale(in + row, d, static_cast<float>(eps));
        each(d, [&](int64_t i, int64_t count) {
          store(out + row + i, load(in + row + i, count) * scale * load(w + i, count), count);
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

// One head of D values, turned by its token's rotary embedding, behind an RMSNorm if there is a weight for it.
template <typename T>
inline void rotate_head(const T* x, const T* cos, const T* sin, const T* norm, float eps, int64_t half, T* y) {
  const Vec scale = norm ? norm_scale(x, 2 * half, eps) : Vec(1.f);
  each(half, [&](int64_t i, int64_t n) {
    Vec a = load(x + i, n), b = load(x + half + i, n);
    if (norm) {
      a = a * scale * load(norm + i, n);
      b = b * scale * load(norm + half + i, n);
    }
    store(y + i, a * load(cos + i, n) - b * load(sin + i, n), n);
    store(y + half + i, b * load(cos + half + i, n) + a * load(sin + half + i, n), n);
  });
}

// Rotary embedding (Su et al., 2021, in halves as in transformers) of a step's queries and keys, [T, (H + 2K) D],
// normed before if there are weights for it, [D]. Keys and values go to their cells of [C, K, D], queries are
// returned, [T, H, D]. cos and sin: [T, D].
Tensor rotate(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& keys, const Tensor& values,
              const Tensor& cells, const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double eps) {
  const int64_t tokens = cells.numel(), K = keys.size(1), D = keys.size(2);
  const int64_t heads = qkv.numel() / (tokens * D), H = heads - 2 * K;
  for (const Tensor* x : {&qkv, &cos, &sin, &keys, &values, &cells}) TORCH_CHECK(x->is_contiguous());
  for (const Tensor* x : {&cos, &sin, &keys, &values}) TORCH_CHECK(x->scalar_type() == qkv.scalar_type());
  for (const auto* x : {&q_norm, &k_norm})
    TORCH_CHECK(!*x || ((*x)->is_contiguous() && (*x)->numel() == D && (*x)->scalar_type() == qkv.scalar_type()));
  TORCH_CHECK(qkv.numel() == tokens * heads * D && H > 0 && D % 2 == 0 && keys.sizes() == values.sizes());
  TORCH_CHECK(cos.numel() == tokens * D && sin.numel() == tokens * D);
  Tensor query = at::empty({tokens, H, D}, qkv.options());
  by_type(qkv, [&](auto type) {
    using T = decltype(type);
    const T *in = qkv.const_data_ptr<T>(), *c = cos.const_data_ptr<T>(), *s = sin.const_data_ptr<T>();
    const T *qn = q_norm ? q_norm->const_data_ptr<T>() : nullptr, *kn = k_norm ? k_norm->const_data_ptr<T>() : nullptr;
    T *q = query.mutable_data_ptr<T>(), *k = keys.mutable_data_ptr<T>(), *v = values.mutable_data_ptr<T>();
    const int64_t* cell = cells.const_data_ptr<int64_t>();
    at::parallel_for(0, tokens, grain(heads * D), [&](int64_t from, int64_t to) {
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

// `size` columns of W_out, [h, d], times F tokens' hidden values, [F, h], added to columns of their y.
template <int F, typename T>
void add_out(const T* out, int64_t d, int64_t h, const float* hidden, int64_t size, T* const* y) {
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
  int64_t slot, width;
  std::vector<int64_t> tokens;
  std::vector<float> g, x, hidden;
};

// Adds the residues of a layer to y, of the tokens whose gate fired in a slot that is selected; whether any gate is
// open. As in bank.py: x, y [T, d]; the gates' weights [n, d], biases and carries [n]; the logits carried from before
// each piece [P, n], NaN where there are none, and each token's place in its piece [T]; thresholds and selected [T, n];
// m [T, n] is written; W_in and W_gate [S, 2H, d], W_out transposed [S, H, d], and the widths of the slots' blocks [S].
bool add_residues(const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& bias, const Tensor& carry,
                  const Tensor& before, const Tensor& offset, const Tensor& threshold, const Tensor& selected,
                  const Tensor& m, const Tensor& up, const Tensor& out, const Tensor& width) {
  const int64_t tokens = x.size(0), d = x.size(1), n = gate.size(0);
  for (const Tensor* t : {&x, &y, &gate, &bias, &carry, &before, &offset, &m, &width})
    TORCH_CHECK(t->is_contiguous());
  for (const Tensor* t : {&y, &up, &out}) TORCH_CHECK(t->scalar_type() == x.scalar_type());
  TORCH_CHECK(y.sizes() == x.sizes() && gate.size(1) == d && bias.numel() == n && carry.numel() == n);
  TORCH_CHECK(before.size(1) == n && offset.numel() == tokens && m.numel() == tokens * n && width.numel() >= n);
  TORCH_CHECK(threshold.size(0) == tokens && threshold.size(1) == n && selected.sizes() == threshold.sizes());
  TORCH_CHECK(up.stride(2) == 1 && up.stride(1) == d && out.stride(2) == 1 && out.stride(1) == d);
  const float *w = gate.const_data_ptr<float>(), *b = bias.const_data_ptr<float>(), *a = carry.const_data_ptr<float>();
  const float *past = before.const_data_ptr<float>(), *limit = threshold.const_data_ptr<float>();
  const bool* may = selected.const_data_ptr<bool>();
  const int64_t* place = offset.const_data_ptr<int64_t>();
  const int32_t* widths = width.const_data_ptr<int32_t>();
  float* carried = m.mutable_data_ptr<float>();
  bool opened = false;
  by_type(x, [&](auto type) {
    using T = decltype(type);
    const T *ups = up.const_data_ptr<T>(), *outs = out.const_data_ptr<T>();
    std::vector<float> xs(tokens * d);
    std::vector<Fired> fired(n);
    each(tokens * d, [&](int64_t i, int64_t size) { store(xs.data() + i, load(x.const_data_ptr<T>() + i, size), size); });
    for (int64_t t = 0, piece = -1; t < tokens; ++t) {
      piece += place[t] == 0;
      for (int64_t s = 0; s < n; ++s) {
        Vec products(0.f);
        each(d, [&](int64_t i, int64_t size) {
          products = at::vec::fmadd(load(xs.data() + t * d + i, size), load(w + s * d + i, size), products);
        });
        const float z = sum(products) + b[s], last = place[t] ? carried[(t - 1) * n + s] : past[piece * n + s];
        const float now = !place[t] && std::isnan(last) ? z : a[s] * last + (1.f - a[s]) * z;
        carried[t * n + s] = now;
        const float over = now - limit[t * threshold.stride(0) + s * threshold.stride(1)];
        if (!(over > 0)) continue;
        opened = true;
        if (!may[t * selected.stride(0) + s * selected.stride(1)] || !widths[s]) continue;
        fired[s].tokens.push_back(t);
        fired[s].g.push_back(over);
        fired[s].x.insert(fired[s].x.end(), xs.begin() + t * d, xs.begin() + (t + 1) * d);
      }
    }
    for (int64_t s = 0; s < n; ++s) {
      Fired& block = fired[s];
      block.slot = s, block.width = widths[s];
      block.hidden.resize(block.tokens.size() * block.width);
      at::parallel_for(0, block.tokens.empty() ? 0 : block.width, grain(2 * d), [&](int64_t from, int64_t to) {
        const T* in = ups + s * up.stride(0);
        const T* gates = in + block.width * d;
        for (int64_t j = from; j < to; ++j)
          by_heads(block.tokens.size(), [&](auto some, int64_t f) {
            float i[some()], g[some()];
            multiply_up<some()>(in + j * d, gates + j * d, block.x.data() + f * d, d, i, g);
            for (int k = 0; k < some(); ++k)
              block.hidden[(f + k) * block.width + j] = g[k] / (1.f + std::exp(-g[k])) * i[k] * block.g[f + k];
          });
      });
    }
    at::parallel_for(0, (d + VECTORS_AT_ONCE * W - 1) / (VECTORS_AT_ONCE * W), 1, [&](int64_t from, int64_t to) {
      for (const Fired& block : fired)
        for (int64_t i = from * VECTORS_AT_ONCE * W; i < std::min(d, to * VECTORS_AT_ONCE * W); i += VECTORS_AT_ONCE * W)
          by_heads(block.tokens.size(), [&](auto some, int64_t f) {
            T* rows[some()];
            for (int k = 0; k < some(); ++k) rows[k] = y.mutable_data_ptr<T>() + block.tokens[f + k] * d + i;
            const auto add_columns = [&](int64_t size) {
              add_out<some()>(outs + block.slot * out.stride(0) + i, d, block.width, block.hidden.data() + f * block.width,
                              size, rows);
            };
            if (d - i >= VECTORS_AT_ONCE * W)
              add_columns(VECTORS_AT_ONCE * W);  // a constant, so that the sums are registers
            else
              add_columns(d - i);
          });
    });
  });
  return opened;
}

}  // namespace

TORCH_LIBRARY(nr_serve, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def("silu_mul(Tensor gate_up) -> Tensor");
  library.def(
      "rotate(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor cells,"
      " Tensor? q_norm, Tensor? k_norm, float eps) -> Tensor");
  library.def(
      "attend(Tensor query, Tensor keys, Tensor values, Tensor cells, Tensor positions, float scale, int window)"
      " -> Tensor");
  library.def(
      "add_residues(Tensor x, Tensor(a!) y, Tensor gate, Tensor bias, Tensor carry, Tensor before, Tensor offset,"
      " Tensor threshold, Tensor selected, Tensor(b!) m, Tensor up, Tensor out, Tensor width) -> bool");
}

TORCH_LIBRARY_IMPL(nr_serve, CPU, library) {
  library.impl("rms_norm", rms_norm);
  library.impl("silu_mul", silu_mul);
  library.impl("rotate", rotate);
  library.impl("attend", attend);
  library.impl("add_residues", add_residues);
}
