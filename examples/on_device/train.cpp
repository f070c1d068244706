// Trains with a step that mlx_adagrad.export_step wrote:  train FOLDER BATCHES.safetensors [END.safetensors]
// BATCHES holds the arrays of the batch by name, all batches along a first axis. Prints the loss of each step.
#include <cstdio>
#include <exception>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

#include "mlx/mlx.h"

namespace mx = mlx::core;
using Arrays = std::unordered_map<std::string, mx::array>;

// The names of what the step returns, in order: a line each in the file's metadata.
std::vector<std::string> output_names(const mx::ImportedFunction& step) {
  std::istringstream lines(step.metadata());
  std::vector<std::string> names;
  for (std::string name; std::getline(lines, name);) {
    names.push_back(name);
  }
  return names;
}

int train(const std::string& folder, const std::string& batches_file, const char* end_file) {
  auto step = mx::import_function(folder + "/step.mlxfn");
  auto names = output_names(step);
  Arrays state = mx::load_safetensors(folder + "/start.safetensors").first;
  const Arrays batches = mx::load_safetensors(batches_file).first;
  if (batches.empty()) {
    throw std::invalid_argument(batches_file + " holds no arrays");
  }
  for (int t = 0; t < batches.begin()->second.shape(0); ++t) {
    Arrays inputs = state;
    for (const auto& [name, all] : batches) {
      inputs.insert_or_assign(name, mx::take(all, t, 0));
    }
    auto outputs = step(inputs); // throws where the batch has another shape than the step was exported for
    mx::eval(outputs);
    for (size_t i = 0; i < names.size(); ++i) {
      if (names[i] == "loss") {
        std::printf("step %d loss %.9g\n", t, mx::astype(outputs[i], mx::float32).item<float>());
      } else {
        state.insert_or_assign(names[i], outputs[i]);
      }
    }
  }
  if (end_file) {
    mx::save_safetensors(end_file, state);
  }
  return 0;
}

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s FOLDER BATCHES.safetensors [END.safetensors]\n", argv[0]);
    return 2;
  }
  try {
    return train(argv[1], argv[2], argc > 3 ? argv[3] : nullptr);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
