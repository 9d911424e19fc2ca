// Tensors and operators through PyTorch's stable interface: what is compiled here runs under any torch from 2.10 on.
//
// implement() registers a function of tensors, numbers and strings. Nothing here includes ATen or c10.
#pragma once

#include "signatures.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

// Weak: it came with torch 2.13; before, PyTorch prints the message.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fastkd {

// Throws what a function of PyTorch's stable interface has caught.
inline void require(AOTITorchError code) {
  if (code == TORCH_SUCCESS) return;
  const bool has_message = torch_exception_get_what_without_backtrace != nullptr;
  throw std::runtime_error(has_message ? torch_exception_get_what_without_backtrace() : "PyTorch printed an error");
}

using torch::headeronly::BFloat16;
using torch::headeronly::CppTypeToScalarType;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using Handle = torch::stable::Tensor;

inline int32_t shim_dtype(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// A tensor with what loops read of it, because each question to PyTorch is a call. It is undefined by default. Only
// tensors made here are written.
class Tensor {
 public:
  Tensor() = default;
  Tensor(const Handle& handle) : handle_(handle) {
    int64_t *sizes = nullptr, *strides = nullptr, dim = 0;
    require(aoti_torch_get_dim(handle.get(), &dim));
    require(aoti_torch_get_sizes(handle.get(), &sizes));
    require(aoti_torch_get_strides(handle.get(), &strides));
    sizes_ = {sizes, static_cast<size_t>(dim)}, strides_ = {strides, static_cast<size_t>(dim)};
    dtype_ = handle.scalar_type();
    data_ = const_cast<void*>(handle.const_data_ptr());
    numel_ = std::accumulate(sizes, sizes + dim, int64_t(1), std::multiplies<int64_t>());
  }
  explicit Tensor(AtenTensorHandle owned) : Tensor(Handle(owned)) {}

  bool defined() const { return handle_.has_value(); }
  bool is_same(const Tensor& other) const { return handle_->get() == other.handle_->get(); }
  const Handle& handle() const { return *handle_; }
  int32_t device_index() const { return handle_->get_device_index(); }
  int64_t dim() const { return sizes_.size(); }
  int64_t numel() const { return numel_; }
  Sizes sizes() const { return sizes_; }
  Sizes strides() const { return strides_; }
  int64_t size(int64_t d) const { return sizes_[d]; }
  int64_t stride(int64_t d) const { return strides_[d]; }
  ScalarType scalar_type() const { return dtype_; }
  int64_t element_size() const { return aoti_torch_dtype_element_size(shim_dtype(dtype_)); }
  size_t nbytes() const { return static_cast<size_t>(numel_ * element_size()); }

  const void* const_data_ptr() const { return data_; }
  void* mutable_data_ptr() const { return data_; }
  template <typename T>
  const T* const_data_ptr() const {
    return mutable_data_ptr<T>();
  }
  template <typename T>
  T* mutable_data_ptr() const {
    STD_TORCH_CHECK(
        dtype_ == CppTypeToScalarType<T>::value,
        "a tensor of ",
        torch::headeronly::toString(dtype_),
        " read as another");
    return static_cast<T*>(data_);
  }

  // Copies by copy_, as an operator that is called by its name is first looked up.
  inline Tensor to(ScalarType dtype) const;
  inline Tensor contiguous() const;
  const Tensor& copy_(const Tensor& other) const {
    require(aoti_torch_copy_(handle_->get(), other.handle_->get(), 0));
    return *this;
  }
  const Tensor& zero_() const {
    require(aoti_torch_zero_(handle_->get()));
    return *this;
  }

  // Whether the elements fill a piece of memory, each in a place of its own.
  bool is_dense() const {
    int64_t expected = 1, left = 0;
    for (int64_t d = 0; d < dim(); ++d) left += sizes_[d] != 1;
    for (; left > 0; --left) {
      int64_t d = 0;  // the dimension that follows
      while (d < dim() && (sizes_[d] == 1 || strides_[d] != expected)) ++d;
      if (d == dim()) return false;
      expected *= sizes_[d];
    }
    return true;
  }

 private:
  std::optional<Handle> handle_;
  Sizes sizes_, strides_;
  ScalarType dtype_ = ScalarType::Undefined;
  void* data_ = nullptr;
  int64_t numel_ = 0;
};

inline std::array<int64_t, 8> contiguous_strides(Sizes sizes) {
  std::array<int64_t, 8> strides;
  STD_TORCH_CHECK(sizes.size() <= strides.size(), "a tensor made here has 8 dimensions at most");
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  return strides;
}

// On the device of `like`.
inline Tensor empty_strided(const Tensor& like, Sizes sizes, Sizes strides, ScalarType dtype) {
  int32_t type = 0;
  require(aoti_torch_get_device_type(like.handle().get(), &type));
  AtenTensorHandle out = nullptr;
  require(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(), shim_dtype(dtype), type, like.device_index(), &out));
  return Tensor(out);
}

// Contiguous.
inline Tensor empty(const Tensor& like, Sizes sizes, ScalarType dtype) {
  const auto strides = contiguous_strides(sizes);
  return empty_strided(like, sizes, {strides.data(), sizes.size()}, dtype);
}

inline Tensor empty(const Tensor& like, Sizes sizes) {
  return empty(like, sizes, like.scalar_type());
}

// In the layout of x.
inline Tensor empty_like(const Tensor& x) {
  if (x.is_dense()) return empty_strided(x, x.sizes(), x.strides(), x.scalar_type());
  return Tensor(torch::stable::empty_like(x.handle()));
}

Tensor Tensor::to(ScalarType dtype) const {
  if (dtype == dtype_) return *this;
  return (is_dense() ? empty_strided(*this, sizes_, strides_, dtype) : empty(*this, sizes_, dtype)).copy_(*this);
}

Tensor Tensor::contiguous() const {
  return handle_->is_contiguous() ? *this : empty(*this, sizes_).copy_(*this);
}

inline int64_t get_num_threads() {
  return torch::stable::get_num_threads();
}

template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  if (end - begin <= std::max<int64_t>(grain, 1)) return f(begin, end);
  torch::stable::parallel_for(begin, end, grain, f);
}

// An argument of an operator, and a result, as PyTorch passes them; kType is its type in a schema as PyTorch prints it.
template <typename T>
struct Plain {
  static T take(StableIValue x) { return torch::stable::detail::to<T>(x); }
  static StableIValue give(const T& x) { return torch::stable::detail::from(x); }
};

template <typename T>
struct Passed;

template <>
struct Passed<bool> : Plain<bool> {
  static constexpr const char* kType = "bool";
};
template <>
struct Passed<double> : Plain<double> {
  static constexpr const char* kType = "float";
};
template <>
struct Passed<std::string> : Plain<std::string> {
  static constexpr const char* kType = "str";
};
template <>
struct Passed<std::vector<bool>> : Plain<std::vector<bool>> {
  static constexpr const char* kType = "List[bool]";
};
template <>
struct Passed<std::vector<int64_t>> : Plain<std::vector<int64_t>> {
  static constexpr const char* kType = "List[int]";
};
template <>
struct Passed<std::vector<double>> : Plain<std::vector<double>> {
  static constexpr const char* kType = "List[float]";
};

template <>
struct Passed<Tensor> {
  static constexpr const char* kType = "Tensor";
  static Tensor take(StableIValue x) { return Tensor(torch::stable::detail::to<Handle>(x)); }
  static StableIValue give(const Tensor& x) { return torch::stable::detail::from(x.handle()); }
};

template <>
struct Passed<std::optional<Tensor>> {
  static constexpr const char* kType = "Optional[Tensor]";
  static std::optional<Tensor> take(StableIValue x) {
    const auto handle = torch::stable::detail::to<std::optional<Handle>>(x);
    return handle ? std::optional<Tensor>(*handle) : std::nullopt;
  }
};

template <>
struct Passed<std::vector<Tensor>> {
  static constexpr const char* kType = "List[Tensor]";
  static std::vector<Tensor> take(StableIValue x) {
    const auto handles = torch::stable::detail::to<std::vector<Handle>>(x);
    return {handles.begin(), handles.end()};
  }
  static StableIValue give(const std::vector<Tensor>& xs) {
    std::vector<Handle> handles;
    for (const Tensor& x : xs) handles.push_back(x.handle());
    return torch::stable::detail::from(handles);
  }
};

template <typename T>
struct Results {
  static std::string types() { return Passed<T>::kType; }
  static void give(StableIValue* stack, const T& x) { *stack = Passed<T>::give(x); }
};

template <typename... T>
struct Results<std::tuple<T...>> {
  static std::string types() { return ((std::string(Passed<T>::kType) + " ") + ...); }
  static void give(StableIValue* stack, const std::tuple<T...>& xs) {
    std::apply([&](const auto&... x) { ((*stack++ = Passed<T>::give(x)), ...); }, xs);
  }
};

// A function as PyTorch calls it: arguments are taken from the stack, results are put there.
template <auto function>
struct Boxed;

template <typename Result, typename... Arguments, Result (*function)(Arguments...)>
struct Boxed<function> {
  // Arguments and results by type: PyTorch compares no boxed function with its schema.
  static std::string types() {
    return ((std::string(Passed<std::decay_t<Arguments>>::kType) + " ") + ...) + "-> " + Results<Result>::types();
  }

  static void call(StableIValue* stack, uint64_t, uint64_t) { run(stack, std::index_sequence_for<Arguments...>()); }

 private:
  template <size_t... i>
  static void run(StableIValue* stack, std::index_sequence<i...>) {
    std::tuple<std::decay_t<Arguments>...> arguments{Passed<std::decay_t<Arguments>>::take(stack[i])...};
    Results<Result>::give(stack, std::apply(function, std::move(arguments)));
  }
};

template <auto function>
void implement(torch::stable::detail::StableLibrary& library, const char* name) {
  library.impl(name, &Boxed<function>::call);
  signatures()[name] = Boxed<function>::types();
}

}  // namespace fastkd
