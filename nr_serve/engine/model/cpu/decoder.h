// A model up to its output head in one call, by our own products: Python's work between operators took a fifth of a
// step, and between two calls other threads of Python may hold up the step.

#pragma once

#include "operators.h"

#ifdef NR_SERVE_PRODUCTS

#include <ATen/ops/cat.h>
#include <ATen/ops/index_select.h>

#include <optional>
#include <string>
#include <vector>

#include "residues.h"

namespace nr_serve {

// Tensors by name.
using Weights = c10::Dict<std::string, std::optional<Tensor>>;

// A linear layer, with weights packed as `multiply` needs them.
struct Linear {
  Tensor packed;
  std::optional<Tensor> bias;

  Linear(const Weights& weights, const std::string& name)
      : packed(weights.at(name).value()), bias(weights.at(name + "_bias")) {}

  Tensor operator()(const Tensor& x) const { return multiply(x, packed, bias, at::kBFloat16); }

  // Each thread calls then(y, from, to, of) after its parts `from` to `to` of `of`, as in `multiply_then`.
  template <typename F>
  Tensor operator()(const Tensor& x, F&& then) const {
    return multiply_then(x, packed, bias, at::kBFloat16, then);
  }
};

// A layer's attention and FFN, each after an RMSNorm and added to the stream. Queries, keys and values are one
// product; gate and up are another.
struct Layer {
  Tensor attention_norm, ffn_norm;
  std::optional<Tensor> q_norm, k_norm;
  Linear qkv, out, gate_up, down;
  double eps, scale;
  int64_t window;

  Layer(const Weights& weights, double eps, double scale, int64_t window)
      : attention_norm(weights.at("attention_norm").value()),
        ffn_norm(weights.at("ffn_norm").value()),
        q_norm(weights.at("q_norm")),
        k_norm(weights.at("k_norm")),
        qkv(weights, "qkv"),
        out(weights, "out"),
        gate_up(weights, "gate_up"),
        down(weights, "down"),
        eps(eps),
        scale(scale),
        window(window) {}
};

// A model's embedding, all its decoder layers and the norm after them.
class Decoder : public torch::CustomClassHolder {
 public:
  // `ends`: the embedding [V, d], the last norm's weights, and cos and sin of the rotary embedding at all positions,
  // [P, D]. Of each layer: the weights of the RMSNorms (for queries and keys only if the model has them), and each
  // linear layer's packed weights and bias (or none). `eps` and `scales` are of the layers; the last `eps` is of the
  // last norm.
  Decoder(const Weights& ends, const std::vector<Weights>& weights, const std::vector<double>& eps,
          const std::vector<double>& scales, const std::vector<int64_t>& windows)
      : embedding_(ends.at("embedding").value()),
        norm_(ends.at("norm").value()),
        cos_(ends.at("cos").value()),
        sin_(ends.at("sin").value()) {
    TORCH_CHECK(weights.size() + 1 == eps.size() && weights.size() == scales.size() && scales.size() == windows.size());
    eps_ = eps.back();
    for (size_t i = 0; i < weights.size(); ++i) layers_.emplace_back(weights[i], eps[i], scales[i], windows[i]);
  }

  // What the output head is multiplied with, for tokens `ids` at `places` of their texts, [1, T] both: [1, N, d] of
  // those at the indices `wanted` [N], or of all. Cells as in `rotate`; keys and values of all layers, [L, C, K, D].
  // A step's tokens are groups laid end to end, each with the cells [B, N] of its contexts and the positions [B, n]
  // of its tokens in them. If a step of `residues` is under way, they are added.
  Tensor forward(const Tensor& ids, const Tensor& places, const Tensor& keys, const Tensor& values, const Tensor& cells,
                 const std::vector<Tensor>& contexts, const std::vector<Tensor>& positions,
                 const std::optional<Tensor>& wanted,
                 const c10::optional<c10::intrusive_ptr<Residues>>& residues) {
    const auto L = static_cast<int64_t>(layers_.size());
    TORCH_CHECK(keys.size(0) == L && values.size(0) == L && contexts.size() == positions.size());
    const Tensor rows = places.view(-1), cos = cos_.index_select(0, rows), sin = sin_.index_select(0, rows);
    Tensor stream = embedding_.index_select(0, ids.view(-1)).unsqueeze(0);
    // Here, for between products the code of each call into torch is gone from the cache.
    const std::vector<Tensor> keys_by_layer = keys.unbind(), values_by_layer = values.unbind();
    for (int64_t i = 0; i < L; ++i) {
      const Layer& layer = layers_[i];
      const Tensor &own_keys = keys_by_layer[i], &own_values = values_by_layer[i];
      const Tensor query = rotate(layer.qkv(rms_norm(stream, layer.attention_norm, layer.eps)), cos, sin, own_keys,
                                  own_values, cells, layer.q_norm, layer.k_norm, layer.eps);
      std::vector<Tensor> outputs;
      int64_t first = 0;
      for (size_t group = 0; group < contexts.size(); ++group) {
        const auto by = positions[group].size(1) == 1 ? attend : attend_prompts;
        const Tensor own_query = query.narrow(0, first, positions[group].numel());
        outputs.push_back(
            by(own_query, own_keys, own_values, contexts[group], positions[group], layer.scale, layer.window));
        first += positions[group].numel();
      }
      const Tensor attended = (outputs.size() == 1 ? outputs[0] : at::cat(outputs)).view({1, query.size(0), -1});
      const Tensor residual = add(stream, layer.out(attended)), x = rms_norm(residual, layer.ffn_norm, layer.eps);
      // Each thread computes a part of the logits, and later of the residues, after its part of a product. As operators
      // of their own they would make threads wait for each other twice more.
      const auto logits = residues ? (*residues)->logits<BFloat16>(i, x) : Logits<BFloat16>{};
      const Tensor gate_up = layer.gate_up(x, [&](const Tensor&, int64_t from, int64_t to, int64_t of) {
        logits.fill(logits.tiles() * from / of, logits.tiles() * to / of);
      });
      const PairedBlocks blocks = residues ? (*residues)->paired(i, x) : PairedBlocks{};
      blocks.fill_hidden();
      const Tensor y = layer.down(silu_mul(gate_up), [&](const Tensor& all, int64_t from, int64_t to, int64_t) {
        blocks.add_out(all, from, to);
      });
      stream = add(residual, y);
    }
    return rms_norm(wanted ? stream.index_select(1, *wanted) : stream, norm_, eps_);
  }

 private:
  Tensor embedding_, norm_, cos_, sin_;
  double eps_;
  std::vector<Layer> layers_;
};

}  // namespace nr_serve

#endif
