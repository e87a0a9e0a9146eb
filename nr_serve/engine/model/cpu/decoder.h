// A whole decoder layer in one call, by our own products: Python's work between operators takes a fifth of a step.

#pragma once

#include "operators.h"

#ifdef NR_SERVE_PRODUCTS

#include <ATen/ops/cat.h>

#include <optional>
#include <string>
#include <vector>

#include "residues.h"

namespace nr_serve {

// A layer's tensors by name.
using Weights = c10::Dict<std::string, std::optional<Tensor>>;

// A linear layer, with weights packed as `multiply` needs them.
struct Linear {
  Tensor packed;
  std::optional<Tensor> bias;

  Linear(const Weights& weights, const std::string& name)
      : packed(weights.at(name).value()), bias(weights.at(name + "_bias")) {}

  Tensor operator()(const Tensor& x) const { return multiply(x, packed, bias, at::kBFloat16); }
};

// Attention and FFN, each after an RMSNorm and added to the stream. Queries, keys and values are one product; gate
// and up are another.
class Layer : public torch::CustomClassHolder {
 public:
  // `index`: the layer's index in the model. `weights`: those of the RMSNorms (for queries and keys only if the
  // model has them), and each linear layer's packed weights and bias (or none).
  Layer(int64_t index, const Weights& weights, double eps, double scale, int64_t window)
      : index_(index),
        attention_norm_(weights.at("attention_norm").value()),
        ffn_norm_(weights.at("ffn_norm").value()),
        q_norm_(weights.at("q_norm")),
        k_norm_(weights.at("k_norm")),
        qkv_(weights, "qkv"),
        out_(weights, "out"),
        gate_up_(weights, "gate_up"),
        down_(weights, "down"),
        eps_(eps),
        scale_(scale),
        window_(window) {}

  // The residual stream after the layer, from `stream` before it, both [1, T, d]. cos, sin and cells as in
  // `rotate`; keys and values of all layers, [L, C, K, D]. A step's tokens are groups laid end to end, each with
  // the cells [B, N] of its contexts and the positions [B, n] of its tokens in them. If a step of `residues` is
  // under way, they are added.
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
    const Tensor attended = (outputs.size() == 1 ? outputs[0] : at::cat(outputs)).view({1, query.size(0), -1});
    const Tensor residual = add(stream, out_(attended)), x = rms_norm(residual, ffn_norm_, eps_);
    const Tensor y = down_(silu_mul(gate_up_(x)));
    if (residues) (*residues)->add(index_, x, y);
    return add(residual, y);
  }

 private:
  int64_t index_;
  Tensor attention_norm_, ffn_norm_;
  std::optional<Tensor> q_norm_, k_norm_;
  Linear qkv_, out_, gate_up_, down_;
  double eps_, scale_;
  int64_t window_;
};

}  // namespace nr_serve

#endif
