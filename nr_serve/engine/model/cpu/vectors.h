// SIMD vectors through torch's own library: float32, and bfloat16 that is converted to float32 on loading.

#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define CPU_CAPABILITY AVX512
#define CPU_CAPABILITY_AVX512
#elif defined(__AVX2__) && defined(__FMA__)
#define CPU_CAPABILITY AVX2
#define CPU_CAPABILITY_AVX2
#endif

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "threads.h"

namespace nr_serve {

using at::BFloat16;
using at::Tensor;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t W = Vec::size();
constexpr int64_t ROWS_AT_ONCE = 4, VECTORS_AT_ONCE = 4;  // as many sums as stay in registers

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
#ifdef __AVX512BF16__
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1U << count) - 1), (__m256i)_mm512_cvtneps_pbh(v));
#else
  at::vec::convert_float_bfloat16(v, v).store(to, count);
#endif
}

inline Vec vec_add(Vec a, Vec b) { return a + b; }
inline Vec vec_max(Vec a, Vec b) {
#ifdef CPU_CAPABILITY_AVX512
  return _mm512_max_ps(a, b);  // unlike torch's it may drop a NaN, but the values it is subtracted from have it
#else
  return at::vec::maximum(a, b);
#endif
}

// e^x as 2^n 2^f, for the integer n nearest to x / log(2); 2^f by a polynomial through Chebyshev's nodes. It takes half
// the instructions of torch's exp_u20. Relative errors grow with |x|: 5e-7 at -10, 4e-6 at -87.
inline Vec exp(Vec x) {
#ifdef CPU_CAPABILITY_AVX512
  const __m512 powers = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), f = _mm512_reduce_ps(powers, 0);
  __m512 y = _mm512_set1_ps(0.00133908633f);
  for (const float coefficient : {0.00967603177f, 0.0555035695f, 0.240221068f, 0.693147182f, 1.f})
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(coefficient));
  return _mm512_scalef_ps(y, _mm512_roundscale_ps(powers, 0));
#else
  return x.exp_u20();
#endif
}

inline Vec silu(Vec x) { return x / (Vec(1.f) + exp(x.neg())); }

inline float sum(Vec v) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, v);
}

// Four vectors' sums, in parts that `sum_fours` adds.
inline Vec sum_four(const Vec* v) {
#ifdef CPU_CAPABILITY_AVX512
  const auto two = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
  const __m512d a = _mm512_castps_pd(two(v[0], v[1])), b = _mm512_castps_pd(two(v[2], v[3]));
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
#else
  float sums[W] = {};
  for (int64_t i = 0; i < 4; ++i) sums[i] = sum(v[i]);
  return Vec::loadu(sums);
#endif
}

// The sums of W vectors from those of every four of them.
inline Vec sum_fours(const Vec* fours) {
#ifdef CPU_CAPABILITY_AVX512
  const auto halves = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return halves(halves(fours[0], fours[1]), halves(fours[2], fours[3]));
#else
  float sums[W];
  for (int64_t i = 0; i < W / 4; ++i) store(sums + 4 * i, fours[i], 4);
  return Vec::loadu(sums);
#endif
}

// The sum of each of W vectors, as one vector.
inline Vec sum_each(const Vec* v) {
  Vec fours[W / 4];
  for (int64_t i = 0; i < W / 4; ++i) fours[i] = sum_four(v + 4 * i);
  return sum_fours(fours);
}

// Calls f(position, count) for runs of STEP positions below `size`, the last run maybe shorter.
template <int64_t STEP = W, typename F>
inline void for_vectors(int64_t size, F&& f) {
  int64_t i = 0;
  for (; i + STEP <= size; i += STEP) f(i, STEP);
  if (i < size) f(i, size - i);
}

#ifdef __AVX512BF16__
// Number of products that `multiply_add` computes at once.
template <typename T>
constexpr int64_t PRODUCTS = std::is_same_v<T, BFloat16> ? 2 * W : W;
#else
template <typename T>
constexpr int64_t PRODUCTS = W;
#endif

// sum + a * b of the first `count` values, at most PRODUCTS<T>. Only the total is defined, not each lane of the
// result.
template <typename T>
inline Vec multiply_add(const T* a, const T* b, int64_t count, Vec sum) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __mmask32 first = count == 2 * W ? ~0U : (1U << count) - 1;
    const auto values = [&](const T* x) { return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(first, x)); };
    return _mm512_dpbf16_ps(sum, values(a), values(b));
  }
#endif
  return at::vec::fmadd(load(a, count), load(b, count), sum);
}

// Calls f with a value of the tensor's type: float32 or bfloat16.
template <typename F>
void with_type(const Tensor& x, F&& f) {
  if (x.scalar_type() == at::kFloat) return f(float());
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "float32 or bfloat16 is needed, not ", x.scalar_type());
  f(BFloat16());
}

// y + x, in y, of `size` values.
template <typename T, typename X>
void add_to(T* y, const X* x, int64_t size) {
  for_vectors(size, [&](int64_t i, int64_t count) { store(y + i, load(y + i, count) + load(x + i, count), count); });
}

// Uninitialised memory for `size` values, which must be written before they are read.
template <typename T>
std::unique_ptr<T[]> room_for(int64_t size) {
  return std::unique_ptr<T[]>(new T[size]);
}

// Least number of items of `size` values that is worth a thread.
inline int64_t grain(int64_t size) { return std::max<int64_t>(1, 16384 / size); }

// Calls f(N) with the compile-time constant N = min(n, MOST), for n >= 1.
template <int MOST, typename F>
void with_constant(int64_t n, F&& f) {
  if constexpr (MOST > 1)
    if (n < MOST) return with_constant<MOST - 1>(n, f);
  f(std::integral_constant<int, MOST>());
}

// Calls f(N, first) for items [first, first + N), in runs of at most MOST; N is a compile-time constant.
template <int MOST = ROWS_AT_ONCE, typename F>
void for_rows(int64_t items, F&& f) {
  for (int64_t i = 0; i < items; i += MOST) with_constant<MOST>(items - i, [&](auto rows) { f(rows, i); });
}

// Calls f(size, column) for the columns of a row, in runs of MOST vectors, then of half as many, and so on. The
// size of a run is a compile-time constant, except for the last run if it is shorter than a vector. MOST is a
// power of 2.
template <int64_t MOST = VECTORS_AT_ONCE, typename F>
void for_columns(int64_t from, int64_t to, F&& f) {
  for (; from + MOST * W <= to; from += MOST * W) f(std::integral_constant<int64_t, MOST * W>(), from);
  if constexpr (MOST > 1) {
    for_columns<MOST / 2>(from, to, f);
  } else if (from < to) {
    f(to - from, from);
  }
}

}  // namespace nr_serve
