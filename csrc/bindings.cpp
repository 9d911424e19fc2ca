// Import point of fastkd._C: loading it registers the native operators. The schemas are in fastkd/ops/_schemas.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "isa.h"
#include "thresholds.h"

namespace py = pybind11;

// Versions come as bare tokens, which need no quoting on any command line.
#define FASTKD_TEXT_(...) #__VA_ARGS__
#define FASTKD_TEXT(...) FASTKD_TEXT_(__VA_ARGS__)

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " FASTKD_TEXT(_MSC_VER);
#else
  return "unknown";
#endif
}

py::dict build_info() {
  using namespace pybind11::literals;
  py::object cuda = py::none();
  py::list cuda_archs, isa;
#ifdef FASTKD_CUDA_VERSION
  cuda = py::str(FASTKD_TEXT(FASTKD_CUDA_VERSION));
  cuda_archs = py::str(FASTKD_TEXT(FASTKD_CUDA_ARCHS)).attr("split")(",");
#endif
#if FASTKD_HAS_MULTIVERSION
  isa.append("avx512");
  isa.append("avx2");
#endif
  isa.append("default");
  return py::dict(
      "compiler"_a = compiler(),
      "cxx_standard"_a = static_cast<long>(__cplusplus),
      "torch"_a = FASTKD_TEXT(FASTKD_TORCH_VERSION),
      "cuda"_a = cuda,
      "cuda_archs"_a = cuda_archs,
      "isa_compiled"_a = isa,
      "isa_in_use"_a = fastkd::isa_in_use());
}

std::map<std::string, int64_t> read_thresholds() {
  std::map<std::string, int64_t> values;
  for (const auto* threshold : fastkd::thresholds()) values[threshold->name] = threshold->value;
  return values;
}

void set_threshold(const std::string& name, int64_t value) {
  for (auto* threshold : fastkd::thresholds()) {
    if (threshold->name != name) continue;
    if (value < 1) throw py::value_error(name + " must be at least 1, got " + std::to_string(value));
    threshold->value = value;
    return;
  }
  throw py::key_error(name);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operators of fastkd";
  m.def("build_info", &build_info, "What this library was built with and the instruction set it uses here");
  m.def("thresholds", &read_thresholds, "Sizes at which kernels split their work, by name");
  m.def("set_threshold", &set_threshold, "Change such a size for all calls that follow: for tests");
}
