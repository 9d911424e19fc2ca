// Sizes at which kernels split their work. Tests lower them, so that small inputs are split as large ones are.
#pragma once

#include <cstdint>
#include <vector>

namespace fastkd {

struct Threshold;

inline std::vector<Threshold*>& thresholds() {
  static std::vector<Threshold*> all;
  return all;
}

// A named size of namespace scope: reads as an integer. It is only written between calls of operators, so reading it
// takes no lock. What bounds an array on the stack stays constexpr; its threshold is clamped to it where it is read.
struct Threshold {
  Threshold(const char* name, int64_t value) : name(name), value(value) { thresholds().push_back(this); }
  Threshold(const Threshold&) = delete;
  Threshold& operator=(const Threshold&) = delete;
  operator int64_t() const { return value; }

  const char* const name;  // "<stem>.<what>"
  int64_t value;
};

}  // namespace fastkd
