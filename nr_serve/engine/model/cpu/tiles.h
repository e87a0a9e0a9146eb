// Products of a linear layer in bfloat16, for a tile of tokens and a few vectors of outputs, by AMX or by AVX-512.
// Sums are float32, rounded once at the end or not at all. A token's result does not depend on the other tokens.

#pragma once

#include "operators.h"

#ifdef NR_SERVE_PRODUCTS

#include <immintrin.h>

#include <array>

#include "vectors.h"

namespace nr_serve {

constexpr int TILE_VECTORS = 3;  // of outputs: times a tile's tokens, as many sums as the registers hold
constexpr int64_t TILE_OUTPUTS = TILE_VECTORS * W;

// Weights to prefetch into the cache during a tile's products: `vectors` for each pair of inputs, evenly shared with
// other tiles. With 3 vectors and 2 tiles, a tile prefetches 2, 1, 2, 1, ... vectors per pair.
struct Prefetch {
  const int32_t* next = nullptr;
  int64_t vectors = 0, tiles = 1, due = 0;  // `due`: in units of 1 / `tiles` of a vector

  void during(int64_t pairs) {
    for (due += pairs * vectors; due > 0; due -= tiles, next += W) __builtin_prefetch(next);
  }
};

inline __m512bh pairs(__m512i bits) { return reinterpret_cast<__m512bh>(bits); }

#ifdef __AMX_BF16__

constexpr int64_t ROWS = 16;   // of a tile register, 64 bytes each: tokens' inputs or sums, or pairs of weights
constexpr int64_t PAIRS = 16;  // of inputs in a row
constexpr int64_t INPUTS = 2 * PAIRS;  // that are summed before they are added to the sum of those before them

// What _tile_loadconfig reads: the shapes of the eight registers.
struct alignas(64) Shapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// By number of tokens in a group: registers 0 to 2 hold its sums, 3 to 5 those of another group, 6 inputs, 7 weights.
inline constexpr auto SHAPES = [] {
  std::array<Shapes, ROWS + 1> shapes;
  for (int64_t tokens = 1; tokens <= ROWS; ++tokens)
    for (int i = 0; i < 8; ++i) {
      shapes[tokens].bytes[i] = 64;
      shapes[tokens].rows[i] = static_cast<uint8_t>(i == 7 ? PAIRS : tokens);
    }
  return shapes;
}();

// Some tokens, in groups of equal size that may overlap by a token; a tile is two groups, the last one maybe one.
// A thread may have one at a time, for it sets the shapes of the thread's registers.
class Tiles {
 public:
  explicit Tiles(int64_t tokens) : tokens_(tokens), groups_((tokens + ROWS - 1) / ROWS) {
    if (tokens > 0) rows_ = (tokens + groups_ - 1) / groups_, _tile_loadconfig(&SHAPES[rows_]);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  int64_t number() const { return (groups_ + 1) / 2; }

  // All tokens' outputs, y [tokens, n], from x [tokens, size, 2]: R vectors, with weights [size, R * W, 2].
  // `prefetch(i)`: what to prefetch during tile i.
  template <int R, typename Y, typename F>
  void multiply(const int32_t* x, int64_t size, const int32_t* weights, const BFloat16* bias, F&& prefetch, Y* y,
                int64_t n) const {
    // A tile's sums are read only after the next tile's products: what was stored from registers is slow to come back.
    alignas(64) float sums[2][2 * ROWS * R * W];
    const auto finish = [&](int64_t tile) {
      const float* from = sums[tile % 2];
      for (int64_t group = 2 * tile; group < std::min(2 * tile + 2, groups_); ++group, from += ROWS * R * W)
        finish_group<R>(from, x + first(group) * size, size, weights, y + first(group) * n, n);
    };
    asm volatile("" : : : "memory");  // GCC does not know that loads of tiles read memory: have it store x before
    for (int64_t tile = 0; tile < number(); ++tile) {
      const int32_t *a = x + first(2 * tile) * size, *b = x + first(2 * tile + 1) * size;
      if (2 * tile + 1 < groups_)
        sum_groups<R, true>(a, b, size, weights, bias, prefetch(tile), sums[tile % 2]);
      else
        sum_groups<R, false>(a, nullptr, size, weights, bias, prefetch(tile), sums[tile % 2]);
      if (tile > 0) finish(tile - 1);
    }
    if (number() > 0) finish(number() - 1);
  }

 private:
  int64_t first(int64_t group) const { return tokens_ * group / groups_; }

  // Stores the sums of the whole rows of inputs of one group of tokens, and with BOTH of another.
  template <int R, bool BOTH>
  static void sum_groups(const int32_t* a, const int32_t* b, int64_t size, const int32_t* weights,
                         const BFloat16* bias, Prefetch prefetch, float* sums) {
    constexpr int64_t ROW = R * 64;  // bytes of a row of weights, and of sums
    if (bias)
      begin_with<R, BOTH>(bias);
    else
      begin<BOTH>();
    for (int64_t k = 0; k + PAIRS <= size; k += PAIRS) {
      const int32_t* w = weights + k * R * W;
      _tile_loadd(6, a + k, size * 4);
      _tile_loadd(7, w, ROW);
      _tile_dpbf16ps(0, 6, 7);
      if constexpr (R > 1) {
        _tile_loadd(7, w + W, ROW);
        _tile_dpbf16ps(1, 6, 7);
      }
      if constexpr (R > 2) {
        _tile_loadd(7, w + 2 * W, ROW);
        _tile_dpbf16ps(2, 6, 7);
      }
      if constexpr (BOTH) {
        _tile_loadd(6, b + k, size * 4);
        _tile_loadd(7, w, ROW);
        _tile_dpbf16ps(3, 6, 7);
        if constexpr (R > 1) {
          _tile_loadd(7, w + W, ROW);
          _tile_dpbf16ps(4, 6, 7);
        }
        if constexpr (R > 2) {
          _tile_loadd(7, w + 2 * W, ROW);
          _tile_dpbf16ps(5, 6, 7);
        }
      }
      prefetch.during(PAIRS);
    }
    _tile_stored(0, sums, ROW);
    if constexpr (R > 1) _tile_stored(1, sums + W, ROW);
    if constexpr (R > 2) _tile_stored(2, sums + 2 * W, ROW);
    if constexpr (BOTH) {
      float* second = sums + ROWS * R * W;
      _tile_stored(3, second, ROW);
      if constexpr (R > 1) _tile_stored(4, second + W, ROW);
      if constexpr (R > 2) _tile_stored(5, second + 2 * W, ROW);
    }
  }

  // Adds to a group's sums what is left of the inputs after the whole rows, and writes its outputs.
  template <int R, typename Y>
  void finish_group(const float* sums, const int32_t* x, int64_t size, const int32_t* weights, Y* y, int64_t n) const {
    for (int64_t t = 0; t < rows_; ++t, sums += R * W, x += size, y += n) {
      __m512 left[R];
      for (int r = 0; r < R; ++r) left[r] = load(sums + r * W);
      for (int64_t k = size / PAIRS * PAIRS; k < size; ++k)
        for (int r = 0; r < R; ++r)
          left[r] = _mm512_dpbf16_ps(left[r], pairs(_mm512_set1_epi32(x[k])),
                                     pairs(_mm512_loadu_si512(weights + (k * R + r) * W)));
      for (int r = 0; r < R; ++r) store(y + r * W, Vec(left[r]));
    }
  }

  // Sets the sums to 0.
  template <bool BOTH>
  static void begin() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    if constexpr (BOTH) {
      _tile_zero(3);
      _tile_zero(4);
      _tile_zero(5);
    }
  }

  // Sets the sums of every token to the bias.
  template <int R, bool BOTH>
  static void begin_with(const BFloat16* bias) {
    alignas(64) float row[R * W];
    for (int r = 0; r < R; ++r) store(row + r * W, load(bias + r * W));
    asm volatile("" : : "r"(row) : "memory");
    _tile_loadd(0, row, 0);  // this row again and again
    if constexpr (R > 1) _tile_loadd(1, row + W, 0);
    if constexpr (R > 2) _tile_loadd(2, row + 2 * W, 0);
    if constexpr (BOTH) {
      _tile_loadd(3, row, 0);
      if constexpr (R > 1) _tile_loadd(4, row + W, 0);
      if constexpr (R > 2) _tile_loadd(5, row + 2 * W, 0);
    }
  }

  int64_t tokens_, groups_, rows_ = 0;
};

#else

constexpr int64_t TILE_TOKENS = 8;
constexpr int64_t INPUTS = 2;  // that are summed before they are added to the sum of those before them

// Some tokens, in tiles whose sizes differ by at most one token.
class Tiles {
 public:
  explicit Tiles(int64_t tokens) : tokens_(tokens), number_((tokens + TILE_TOKENS - 1) / TILE_TOKENS) {}

  int64_t number() const { return number_; }

  // All tokens' outputs, y [tokens, n], from x [tokens, size, 2]: R vectors, with weights [size, R * W, 2].
  // `prefetch(i)`: what to prefetch during tile i.
  template <int R, typename Y, typename F>
  void multiply(const int32_t* x, int64_t size, const int32_t* weights, const BFloat16* bias, F&& prefetch, Y* y,
                int64_t n) const {
    for (int64_t tile = 0; tile < number_; ++tile) {
      const int64_t first = tokens_ * tile / number_, after = tokens_ * (tile + 1) / number_;
      with_constant<TILE_TOKENS>(after - first, [&](auto count) {
        multiply_tokens<count(), R>(x + first * size, size, weights, bias, prefetch(tile), y + first * n, n);
      });
    }
  }

 private:
  template <int T, int R, typename Y>
  static void multiply_tokens(const int32_t* x, int64_t size, const int32_t* weights, const BFloat16* bias,
                              Prefetch prefetch, Y* y, int64_t n) {
    __m512 sums[T][R];
    for (int r = 0; r < R; ++r) {
      const __m512 first = bias ? __m512(load(bias + r * W)) : _mm512_setzero_ps();
      for (int t = 0; t < T; ++t) sums[t][r] = first;
    }
    for (int64_t k = 0; k < size; ++k) {
      __m512bh w[R];
      for (int r = 0; r < R; ++r) w[r] = pairs(_mm512_loadu_si512(weights + (k * R + r) * W));
      prefetch.during(1);
      for (int t = 0; t < T; ++t) {
        const __m512bh both = pairs(_mm512_set1_epi32(x[t * size + k]));
        for (int r = 0; r < R; ++r) sums[t][r] = _mm512_dpbf16_ps(sums[t][r], both, w[r]);
      }
    }
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < R; ++r) store(y + t * n + r * W, Vec(sums[t][r]));
  }

  int64_t tokens_, number_;
};

#endif

}  // namespace nr_serve

#endif
