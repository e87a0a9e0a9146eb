// Operators of a model's steps on a CPU. Each replaces several of torch's, whose calls cost more than they
// compute. They compute in float32 and round once, blocks their hidden values too, so they differ from torch's own by
// rounding. A token's result does not depend on what shares its step, except for rounding where oneDNN computes a
// block of many tokens.

#include <torch/library.h>

#include "decoder.h"
#include "operators.h"
#include "residues.h"
#include "threads.h"

TORCH_LIBRARY(nr_serve, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def("silu_mul(Tensor gate_up) -> Tensor");
  library.def(
      "rotate(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor cells,"
      " Tensor? q_norm, Tensor? k_norm, float eps) -> Tensor");
  library.def(
      "attend(Tensor query, Tensor keys, Tensor values, Tensor cells, Tensor positions, float scale, int window)"
      " -> Tensor");
  library.def("likeliest(Tensor logits) -> Tensor");
  library.def("share_among(int threads) -> ()", nr_serve::share_among);
  using at::Tensor;
  library.class_<nr_serve::Residues>("Residues")
      .def(torch::init<c10::Dict<std::string, Tensor>, bool>())
      .def("begin", &nr_serve::Residues::begin)
      .def("add", &nr_serve::Residues::add)
      .def("end", &nr_serve::Residues::end);
#ifdef NR_SERVE_PRODUCTS
  library.def(
      "attend_prompts(Tensor query, Tensor keys, Tensor values, Tensor cells, Tensor positions, float scale,"
      " int window) -> Tensor");
  library.def("multiply(Tensor x, Tensor packed, Tensor? bias, ScalarType type) -> Tensor");
  library.class_<nr_serve::Decoder>("Decoder")
      .def(torch::init<nr_serve::Weights, std::vector<nr_serve::Weights>, std::vector<double>, std::vector<double>,
                       std::vector<int64_t>>())
      .def("forward", &nr_serve::Decoder::forward);
#endif
}

TORCH_LIBRARY_IMPL(nr_serve, CPU, library) {
  library.impl("rms_norm", nr_serve::rms_norm);
  library.impl("silu_mul", nr_serve::silu_mul);
  library.impl("rotate", nr_serve::rotate);
  library.impl("attend", nr_serve::attend);
  library.impl("likeliest", nr_serve::likeliest);
#ifdef NR_SERVE_PRODUCTS
  library.impl("attend_prompts", nr_serve::attend_prompts);
  library.impl("multiply", nr_serve::multiply);
#endif
}
