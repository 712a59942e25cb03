// Checks for the C++ tests. A test program calls RUN(function) for each case and returns finish().
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

namespace check {

inline int& failures() {
  static int count = 0;
  return count;
}

inline void report(const char* file, int line, const std::string& message) {
  // The first messages are enough.
  if (++failures() <= 20) std::fprintf(stderr, "%s:%d: %s\n", file, line, message.c_str());
}

template <typename Body>
void run(const char* name, Body body) {
  const int before = failures();
  try {
    body();
  } catch (const std::exception& error) {
    report(name, 0, std::string("unexpected exception: ") + error.what());
  }
  std::printf("%s %s\n", failures() == before ? "ok    " : "FAILED", name);
}

inline int finish() {
  std::printf("%d failed checks\n", failures());
  return failures() == 0 ? 0 : 1;
}

// A small random generator (splitmix64), the same on every platform.
struct Random {
  uint64_t state;
  uint64_t bits() {
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1.0p-53; }
  double normal() { return std::sqrt(-2 * std::log(uniform() + 1e-300)) * std::cos(6.283185307179586 * uniform()); }
};

}  // namespace check

#define RUN(function) check::run(#function, [] { function(); })
#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) check::report(__FILE__, __LINE__, "failed: " #condition); \
  } while (false)
#define CHECK_NEAR(actual, expected, tolerance)                                                             \
  do {                                                                                                      \
    const double a_ = static_cast<double>(actual), e_ = static_cast<double>(expected);                      \
    const bool equal_ = a_ == e_ || std::fabs(a_ - e_) <= (tolerance);                                      \
    if (!equal_) {                                                                                          \
      check::report(__FILE__, __LINE__,                                                                     \
                    #actual " = " + std::to_string(a_) + ", expected " + std::to_string(e_) + ", off by " + \
                        std::to_string(std::fabs(a_ - e_)) + " > " + std::to_string(tolerance));            \
    }                                                                                                       \
  } while (false)
// The statement must throw, with `text` in the message.
#define CHECK_THROWS(statement, text)                                                                         \
  do {                                                                                                        \
    std::string message_ = "nothing was thrown";                                                              \
    try {                                                                                                     \
      statement;                                                                                              \
    } catch (const std::exception& error_) {                                                                  \
      message_ = error_.what();                                                                               \
    }                                                                                                         \
    if (message_.find(text) == std::string::npos) {                                                           \
      check::report(__FILE__, __LINE__, "expected an error with \"" + std::string(text) + "\": " + message_); \
    }                                                                                                         \
  } while (false)
