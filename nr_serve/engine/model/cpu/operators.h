// Declarations of what compute.cpp compiles; the operators are explained where they are defined.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <memory>
#include <optional>
#include <span>
#include <vector>

#ifdef __AVX512BF16__
#define NR_SERVE_PRODUCTS
#endif

namespace nr_serve {

using at::Tensor;

// layer.h
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps);
Tensor silu_mul(const Tensor& gate_up);
Tensor add(const Tensor& a, const Tensor& b);
Tensor rotate(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& keys, const Tensor& values,
              const Tensor& cells, const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm,
              double eps);

// attention.h
Tensor attend(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& cells,
              const Tensor& positions, double scale, int64_t window);

// likeliest.h
Tensor likeliest(const Tensor& logits);

// The weights of one slot's block in one layer, of `weights` [S, L, ...].
template <typename T>
const T* of_block(const Tensor& weights, int64_t slot, int64_t layer) {
  return weights.const_data_ptr<T>() + slot * weights.stride(0) + layer * weights.stride(1);
}

constexpr int64_t PAIRED_OUTPUTS = 16;  // of paired weights there are a multiple of these

// blocks.h
// The tokens on which one slot fired, with their gates and hidden values; h is the width of the slot's block.
struct Fired {
  int64_t slot, h;
  std::vector<int64_t> tokens;
  std::vector<float> g, hidden;
};

#ifdef NR_SERVE_PRODUCTS
// paired_blocks.h
// One block of paired weights and the tokens on which it fired. h: its width, rounded up to whole vectors; what was
// added is 0.
struct PairedBlock {
  const int32_t *up, *out;  // W_in and W_gate, W rows of one and of the other in turn, so 2 W outputs each; and W_out
  int64_t tokens, h;
  const float* g;
  const int64_t* rows;  // of the tokens, in the step
  std::unique_ptr<at::BFloat16[]> gathered, hidden;
  const int32_t* x;  // [tokens, d / 2, 2]

  // Hidden values, scaled by g, of vectors `from` to `to`; then outputs, added to y [T, d], of tiles `from` to `to`.
  void fill_hidden(int64_t d, int64_t from, int64_t to) const;
  void add_out(at::BFloat16* y, int64_t d, int64_t from, int64_t to) const;
};

// The blocks that fired in one layer. Their work is in two steps.
struct PairedBlocks {
  std::vector<PairedBlock> blocks;
  int64_t d = 0, vectors = 0;  // `vectors`: of hidden values, of all blocks

  // Computes hidden values, scaled by g; threads share them.
  void fill_hidden() const;

  // Then adds outputs of the residues, in tiles `from` to `to`, to y [T, d].
  void add_out(const Tensor& y, int64_t from, int64_t to) const;
};
#endif

// The blocks of all slots and layers: W_in and W_gate [S, L, 2H, d], and W_out transposed, [S, L, H, d]. If they are
// `paired`, the same memory holds what PairedBlock reads, as CpuBank writes it.
class Blocks {
 public:
  Blocks(Tensor up, Tensor out, int64_t S, int64_t L, int64_t d, bool paired) : up_(up), out_(out), paired_(paired) {
    const int64_t H = out.size(2);
    TORCH_CHECK(up.sizes() == at::IntArrayRef({S, L, 2 * H, d}) && out.sizes() == at::IntArrayRef({S, L, H, d}));
    TORCH_CHECK(up.scalar_type() == out.scalar_type());
#ifdef NR_SERVE_PRODUCTS
    TORCH_CHECK(!paired || (up.scalar_type() == at::kBFloat16 && d % PAIRED_OUTPUTS == 0 && H % PAIRED_OUTPUTS == 0));
#else
    TORCH_CHECK(!paired, "no products of our own here");
#endif
  }

  at::ScalarType type() const { return up_.scalar_type(); }

  // Adds the residues of the slots that fired, in one layer, for inputs x [T, d], to y [T, d].
  void add(int64_t layer, std::vector<Fired>& fired, const Tensor& x, const Tensor& y) const;

#ifdef NR_SERVE_PRODUCTS
  // The same blocks for `fill_hidden` and `add_out`, if weights are paired; `fired` and x must outlive them.
  PairedBlocks paired(int64_t layer, const std::vector<Fired>& fired, const Tensor& x) const;
#endif

 private:
  // Adds to y [T, d] the residues of one block on many tokens of x [T, d].
  template <typename T>
  void add_many(int64_t layer, const Fired& one, const Tensor& x, T* y) const;

  // Adds to y [T, d] the residues of blocks on few tokens each of x [T, d].
  template <typename T>
  void add_few(int64_t layer, std::span<Fired> blocks, const T* x, T* y) const;

  Tensor up_, out_;
  bool paired_;
};

#ifdef NR_SERVE_PRODUCTS
// products.h
Tensor multiply(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, at::ScalarType type);
Tensor multiply_then(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, at::ScalarType type,
                     c10::function_ref<void(const Tensor&, int64_t, int64_t, int64_t)> then);

// prompts.h
Tensor attend_prompts(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& cells,
                      const Tensor& positions, double scale, int64_t window);
#endif

}  // namespace nr_serve
