// A decoder layer by products of our own, in one call: what Python does between operators takes a fifth of a step.

#pragma once

#include "products.h"

#ifdef NR_SERVE_PRODUCTS

#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>

#include "attention.h"
#include "layer.h"
#include "prompts.h"
#include "residues.h"

namespace nr_serve {

// A linear layer, packed as `multiply` has it.
struct Linear {
  Tensor packed;
  std::optional<Tensor> bias;

  Tensor operator()(const Tensor& x) const { return multiply(x, packed, bias, at::kBFloat16); }
};

// Attention and FFN, each behind an RMSNorm and added to the stream; queries, keys and values are one product, gate and
// up another. `index`: which layer of the model it is.
class Layer : public torch::CustomClassHolder {
 public:
  Layer(int64_t index, Tensor attention_norm, Tensor ffn_norm, double eps, std::optional<Tensor> q_norm,
        std::optional<Tensor> k_norm, double scale, int64_t window, Tensor qkv, std::optional<Tensor> qkv_bias,
        Tensor out, std::optional<Tensor> out_bias, Tensor gate_up, std::optional<Tensor> gate_up_bias, Tensor down,
        std::optional<Tensor> down_bias)
      : index_(index),
        attention_norm_(attention_norm),
        ffn_norm_(ffn_norm),
        eps_(eps),
        q_norm_(q_norm),
        k_norm_(k_norm),
        scale_(scale),
        window_(window),
        qkv_{qkv, qkv_bias},
        out_{out, out_bias},
        gate_up_{gate_up, gate_up_bias},
        down_{down, down_bias} {}

  // The stream behind the layer, from that before it, [1, T, d]. cos, sin and cells as in `rotate`; keys and values
  // [L, C, K, D] of all layers. A step's tokens are groups end to end, each with cells [B, N] of its contexts and
  // positions [B, n] of its tokens in them. The residues of a step under way are added, if there is one.
  Tensor forward(const Tensor& stream, const Tensor& cos, const Tensor& sin, const Tensor& keys, const Tensor& values,
                 const Tensor& cells, const std::vector<Tensor>& contexts, const std::vector<Tensor>& positions,
                 const c10::optional<c10::intrusive_ptr<Residues>>& residues) {
    TORCH_CHECK(0 <= index_ && index_ < keys.size(0) && index_ < values.size(0));
    TORCH_CHECK(contexts.size() == positions.size());
    const Tensor own_keys = keys.select(0, index_), own_values = values.select(0, index_);
    const Tensor query = rotate(qkv_(rms_norm(stream, attention_norm_, eps_)), cos, sin, own_keys, own_values, cells,
                                q_norm_, k_norm_, eps_);
    std::vector<Tensor> outputs;
    int64_t first = 0;
    for (size_t i = 0; i < contexts.size(); ++i) {
      const auto by = positions[i].size(1) == 1 ? attend : attend_prompts;
      const Tensor own_query = query.narrow(0, first, positions[i].numel());
      outputs.push_back(by(own_query, own_keys, own_values, contexts[i], positions[i], scale_, window_));
      first += positions[i].numel();
    }
    const Tensor attended = at::cat(outputs).view({1, query.size(0), -1});
    const Tensor behind = at::add(stream, out_(attended)), x = rms_norm(behind, ffn_norm_, eps_);
    const Tensor y = down_(silu_mul(gate_up_(x)));
    if (residues) (*residues)->add(index_, x, y);
    return at::add(behind, y);
  }

 private:
  int64_t index_;
  Tensor attention_norm_, ffn_norm_;
  double eps_;
  std::optional<Tensor> q_norm_, k_norm_;
  double scale_;
  int64_t window_;
  Linear qkv_, out_, gate_up_, down_;
};

}  // namespace nr_serve

#endif
