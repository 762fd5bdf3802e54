// The one check macro: throws dsk::Error with the values, not only the condition.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace dsk {

struct Error : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <typename... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw Error(message.str());
}

}  // namespace dsk

// DSK_CHECK(a.k == b.k, "b: expected k = ", a.k, ", got ", b.k): name, expected, actual.
#define DSK_CHECK(condition, ...)  \
  do {                             \
    if (!(condition)) [[unlikely]] \
      ::dsk::fail(__VA_ARGS__);    \
  } while (false)
