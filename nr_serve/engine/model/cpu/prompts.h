// Attention of prompts in bfloat16, by the products of tiles.h. Shape suffixes as in attention.py.

#pragma once

#include "attention.h"
#include "tiles.h"

#ifdef NR_SERVE_PRODUCTS

#include <numeric>

namespace nr_serve {

// A tile begins and ends at a multiple of so many positions, so that no sum depends on where others end.
constexpr int64_t STRETCH = std::lcm(TILE_OUTPUTS, INPUTS);
constexpr int64_t ROWS_OF_LOGITS = 48;  // of one tile (tokens times heads): few enough for a core's cache

// The keys and values of one key head in one context, laid out as the packed weights of a product.
struct Context {
  const BFloat16 *keys, *values;  // of all cells, starting at this head
  int64_t stride, D;              // size of a cell; size of a head
  const int64_t* cells;
  int64_t tokens, padded;  // `padded`: rounded up to a multiple of W and INPUTS, filled with 0
  int32_t *packed_keys, *packed_values;

  const BFloat16* row(const BFloat16* from, int64_t token) const { return from + cells[token] * stride; }

  // Packs keys `first` to `first` + TILE_OUTPUTS, the outputs of a product over D, as [D / 2, outputs, 2].
  void pack_keys(int64_t first) const {
    const int64_t outputs = std::min(TILE_OUTPUTS, padded - first);
    int32_t* to = packed_keys + first * (D / 2);
    for (int64_t i = 0; i < outputs; ++i) {
      const auto* pairs = first + i < tokens ? reinterpret_cast<const int32_t*>(row(keys, first + i)) : nullptr;
      for (int64_t p = 0; p < D / 2; ++p) to[p * outputs + i] = pairs ? pairs[p] : 0;
    }
  }

  // Packs the same tokens' values, the inputs of a product with D outputs, as [padded / 2, outputs, 2] per output
  // block.
  void pack_values(int64_t first) const {
    const auto bits = [&](int64_t token, int64_t d) -> uint32_t {
      return token < tokens ? row(values, token)[d].x : 0;
    };
    for (int64_t token = first; token < std::min(padded, first + TILE_OUTPUTS); token += 2)
      for (int64_t block = 0; block < D; block += TILE_OUTPUTS) {
        const int64_t outputs = std::min(TILE_OUTPUTS, D - block);
        int32_t* to = packed_values + block * (padded / 2) + token / 2 * outputs;
        for (int64_t d = 0; d < outputs; ++d) to[d] = bits(token, block + d) | bits(token + 1, block + d) << 16;
      }
  }
};

// float32 y [rows, n], from x [rows, size, 2] and the weights of R * W outputs.
template <int R>
void multiply_rows(const Tiles& rows, const BFloat16* x, int64_t size, const int32_t* weights, float* y, int64_t n) {
  const auto* in = reinterpret_cast<const int32_t*>(x);
  rows.multiply<R>(in, size, weights, nullptr, [](int64_t) { return Prefetch{}; }, y, n);
}

// Attention of some tokens of a prompt in the G query heads of one key head, with a thread's memory for it.
struct PromptTile {
  std::unique_ptr<BFloat16[]> queries, weights;
  std::unique_ptr<float[]> logits, sums, totals;

  PromptTile(int64_t rows, int64_t padded, int64_t D)
      : queries(room_for<BFloat16>(rows * D)),
        weights(room_for<BFloat16>(rows * padded)),
        logits(room_for<float>(rows * padded)),
        sums(room_for<float>(rows * D)),
        totals(room_for<float>(rows)) {}

  // Attention of `count` tokens at `position`. q and out are the tokens' rows, `stride` apart, with G heads of D
  // values.
  void attend(const Context& context, const BFloat16* q, BFloat16* out, int64_t stride, const int64_t* position,
              int64_t count, int64_t G, float scale, int64_t window) {
    const int64_t D = context.D, rows = count * G, size = G * D;
    const int64_t from = std::max<int64_t>(0, position[0] + 1 - window) / STRETCH * STRETCH;
    const int64_t after = (position[count - 1] / STRETCH + 1) * STRETCH;
    const int64_t n = std::min(context.padded, after) - from;
    const Tiles tiles(rows);
    for (int64_t t = 0; t < count; ++t) std::copy_n(q + t * stride, size, queries.get() + t * size);
    for (int64_t i = 0; i < n; i += TILE_OUTPUTS)
      with_constant<TILE_VECTORS>((context.padded - from - i) / W, [&](auto vectors) {
        multiply_rows<vectors()>(tiles, queries.get(), D / 2, context.packed_keys + (from + i) * (D / 2),
                                 logits.get() + i, n);
      });
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t end = position[row / G] + 1;
      softmax(row, n, std::max(from, end - window) - from, end - from, scale);
    }
    for (int64_t block = 0; block < D; block += TILE_OUTPUTS)
      with_constant<TILE_VECTORS>((D - block) / W, [&](auto vectors) {
        multiply_rows<vectors()>(tiles, weights.get(), n / 2,
                                 context.packed_values + block * (context.padded / 2) + from / 2 * vectors() * W,
                                 sums.get() + block, D);
      });
    for (int64_t row = 0; row < rows; ++row)
      for_vectors(D, [&](int64_t d, int64_t count) {
        store(out + row / G * stride + row % G * D + d, load(sums.get() + row * D + d) / Vec(totals[row]), count);
      });
  }

  // A row's unnormalised weights: exp of the logits from `first` to `end`, which it may attend to, and 0
  // elsewhere.
  void softmax(int64_t row, int64_t n, int64_t first, int64_t end, float scale) {
    const float* logit = logits.get() + row * n;
    BFloat16* weight = weights.get() + row * n;
    const Vec highest(at::vec::reduce_all<float>(vec_max, logit + first, end - first)), factor(scale);
    std::fill(weight, weight + first, 0), std::fill(weight + end, weight + n, 0);
    Vec total(0.f);
    for_vectors(end - first, [&](int64_t i, int64_t count) {
      const Vec e = exp((load(logit + first + i, count) - highest) * factor);
      store(weight + first + i, e, count);
      total = total + Vec::set(Vec(0.f), e, count);
    });
    totals[row] = sum(total);
  }
};

// Attention of B prompts over their requests' pages: query [B * n, H, D], keys and values [C, K, D], cells [B, N]
// of the contexts, positions [B, n] of the tokens in them, consecutive. Each token attends to its last `window`
// positions. Returns the shape of query. D is a multiple of W.
Tensor attend_prompts(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& cells,
                      const Tensor& positions, double scale, int64_t window) {
  const int64_t B = cells.size(0), N = cells.size(1), n = positions.size(1), H = query.size(1), D = query.size(2);
  const int64_t K = keys.size(1);
  TORCH_CHECK(K > 0 && D > 0 && B > 0 && n > 0 && window > 0);
  constexpr int64_t STEP = std::lcm(W, INPUTS);
  const int64_t G = H / K, padded = (N + STEP - 1) / STEP * STEP, packed = padded * D / 2;
  for (const Tensor* x : {&query, &keys, &values, &cells, &positions}) TORCH_CHECK(x->is_contiguous());
  for (const Tensor* x : {&query, &keys, &values}) TORCH_CHECK(x->scalar_type() == at::kBFloat16 && x->size(2) == D);
  TORCH_CHECK(query.size(0) == B * n && positions.size(0) == B && keys.sizes() == values.sizes());
  TORCH_CHECK(H == G * K && D % W == 0 && cells.scalar_type() == at::kLong && positions.scalar_type() == at::kLong);
  check_positions(positions, N);
  Tensor out = query.new_empty(query.sizes());
  const BFloat16 *q = query.const_data_ptr<BFloat16>(), *k = keys.const_data_ptr<BFloat16>();
  const BFloat16* v = values.const_data_ptr<BFloat16>();
  BFloat16* o = out.mutable_data_ptr<BFloat16>();
  const int64_t *cell = cells.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  const auto room = room_for<int32_t>(2 * B * K * packed);
  const auto context = [&](int64_t b, int64_t head) {
    const int64_t tokens = position[(b + 1) * n - 1] + 1;
    int32_t* own = room.get() + (b * K + head) * 2 * packed;
    return Context{k + head * D, v + head * D, K * D, D, cell + b * N, tokens, padded, own, own + packed};
  };
  const int64_t blocks = (padded + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
  share(B * K * blocks, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const Context own = context(i / blocks / K, i / blocks % K);
      own.pack_keys(i % blocks * TILE_OUTPUTS), own.pack_values(i % blocks * TILE_OUTPUTS);
    }
  });
  const int64_t count = std::max<int64_t>(1, ROWS_OF_LOGITS / G), tiles = (n + count - 1) / count, all = B * K * tiles;
  share(all, 1, [&](int64_t from, int64_t to) {
    PromptTile tile(count * G, padded, D);
    for (int64_t i = from; i < to; ++i) {
      // The last tokens see the longest contexts: take tiles from both ends in turn, so that threads share the
      // work evenly.
      const int64_t which = i % 2 ? all - 1 - i / 2 : i / 2, b = which / K % B, head = which % K;
      const int64_t t = which / (K * B) * count, offset = ((b * n + t) * H + head * G) * D;
      tile.attend(context(b, head), q + offset, o + offset, H * D, position + b * n + t, std::min(count, n - t), G,
                  static_cast<float>(scale), window);
    }
  });
  return out;
}

}  // namespace nr_serve

#endif
