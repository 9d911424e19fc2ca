// Import point of fastkd._C: loading it registers the native operators. The schemas are in fastkd/ops/_schemas.py.
//
// The module is written in CPython's limited interface, so that one build serves every Python.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string>

#include "isa.h"
#include "signatures.h"
#include "thresholds.h"

// Versions come as bare tokens, which need no quoting on any command line.
#define FASTKD_TEXT_(...) #__VA_ARGS__
#define FASTKD_TEXT(...) FASTKD_TEXT_(__VA_ARGS__)

namespace {

const char* compiler() {
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

PyObject* build_info(PyObject*, PyObject*) {
#ifdef FASTKD_CUDA_VERSION
  const char *cuda = FASTKD_TEXT(FASTKD_CUDA_VERSION), *cuda_archs = FASTKD_TEXT(FASTKD_CUDA_ARCHS);
#else
  const char *cuda = nullptr, *cuda_archs = "";
#endif
  return Py_BuildValue(
      "{s:s, s:l, s:s, s:z, s:s, s:s, s:s}",
      "compiler",
      compiler(),
      "cxx_standard",
      static_cast<long>(__cplusplus),
      "torch",
      FASTKD_TEXT(FASTKD_TORCH_VERSION),
      "cuda",
      cuda,
      "cuda_archs",
      cuda_archs,
      "isa_compiled",
      FASTKD_HAS_MULTIVERSION ? "avx512,avx2,default" : "default",
      "isa_in_use",
      fastkd::isa_in_use());
}

PyObject* thresholds(PyObject*, PyObject*) {
  PyObject* values = PyDict_New();
  for (const auto* threshold : fastkd::thresholds()) {
    PyObject* value = PyLong_FromLongLong(threshold->value);
    if (value == nullptr || PyDict_SetItemString(values, threshold->name, value) != 0) return nullptr;
    Py_DECREF(value);
  }
  return values;
}

PyObject* signatures(PyObject*, PyObject*) {
  PyObject* all = PyDict_New();
  for (const auto& [name, types] : fastkd::signatures()) {
    PyObject* value = PyUnicode_FromString(types.c_str());
    if (value == nullptr || PyDict_SetItemString(all, name.c_str(), value) != 0) return nullptr;
    Py_DECREF(value);
  }
  return all;
}

PyObject* set_threshold(PyObject*, PyObject* arguments) {
  const char* name = nullptr;
  long long value = 0;
  if (!PyArg_ParseTuple(arguments, "sL", &name, &value)) return nullptr;
  for (auto* threshold : fastkd::thresholds()) {
    if (std::string(threshold->name) != name) continue;
    if (value < 1) return PyErr_Format(PyExc_ValueError, "%s must be at least 1, got %lld", name, value);
    threshold->value = value;
    Py_RETURN_NONE;
  }
  PyErr_SetString(PyExc_KeyError, name);
  return nullptr;
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "What this library was built with and the instruction set it uses here"},
    {"signatures", signatures, METH_NOARGS, "The types that each operator takes and returns"},
    {"thresholds", thresholds, METH_NOARGS, "Sizes at which kernels split their work, by name"},
    {"set_threshold", set_threshold, METH_VARARGS, "Change such a size for all calls that follow: for tests"},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Native operators of fastkd", -1, methods, {}, {}, {}, {}};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  return PyModule_Create(&module);
}
