// SPDX-License-Identifier: Apache-2.0
// Result<T>: what every Sluice call that can fail returns. Nothing throws across the API.
#pragma once

#include <cstdlib>
#include <new>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>

namespace sluice {

// What went wrong, by what the caller can do about it. The CLI's exit code is this number.
enum class ErrorCode : int {
  usage = 2,           // the arguments contradict each other or are out of range
  not_found = 3,       // a file, tensor or device that was asked for is not there
  io = 4,              // the operating system refused a read or a write (os_code holds errno)
  corrupt = 5,         // the bytes are there and are not what they must be
  unsupported = 6,     // valid input that this version does not handle
  budget = 7,          // a memory budget is too small; the message says which would do
  out_of_memory = 8,   // the machine refused an allocation
  numeric = 9,         // a non-finite value appeared where none may be
  device = 10,         // a device API failed (os_code holds its code)
  cancelled = 11,      // the caller asked to stop
  internal = 12,       // a bug in Sluice
};

// A failure: its kind, the OS or device code if one was involved, and one sentence that names what, where, and what
// to do.
struct Error {
  ErrorCode code = ErrorCode::internal;
  std::string message;
  int os_code = 0;
};

// Marks a value as the failure of a Result<T> of any T.
struct Unexpected {
  Error error;
};

inline Unexpected fail(ErrorCode code, std::string message, int os_code = 0) {
  return Unexpected{Error{code, std::move(message), os_code}};
}
inline Unexpected fail(Error error) { return Unexpected{std::move(error)}; }

// Holds a T or an Error; the member names are those of std::expected. Reading the wrong one aborts.
template <class T>
class [[nodiscard]] Result {
 public:
  using value_type = T;

  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}  // NOLINT: implicit, as in std::expected
  Result(Unexpected failure) : state_(std::in_place_index<1>, std::move(failure.error)) {}  // NOLINT

  bool has_value() const { return state_.index() == 0; }
  explicit operator bool() const { return has_value(); }

  T& value() & { return checked(); }
  const T& value() const& { return const_cast<Result*>(this)->checked(); }
  T&& value() && { return std::move(checked()); }
  T& operator*() & { return checked(); }
  const T& operator*() const& { return const_cast<Result*>(this)->checked(); }
  T&& operator*() && { return std::move(checked()); }
  T* operator->() { return &checked(); }
  const T* operator->() const { return &const_cast<Result*>(this)->checked(); }

  Error& error() {
    if (has_value()) std::abort();
    return std::get<1>(state_);
  }
  const Error& error() const { return const_cast<Result*>(this)->error(); }

 private:
  T& checked() {
    if (!has_value()) std::abort();
    return std::get<0>(state_);
  }

  std::variant<T, Error> state_;
};

template <>
class [[nodiscard]] Result<void> {
 public:
  using value_type = void;

  Result() = default;
  Result(Unexpected failure) : failed_(true), error_(std::move(failure.error)) {}  // NOLINT: implicit

  bool has_value() const { return !failed_; }
  explicit operator bool() const { return !failed_; }
  Error& error() {
    if (!failed_) std::abort();
    return error_;
  }
  const Error& error() const { return const_cast<Result*>(this)->error(); }

 private:
  bool failed_ = false;
  Error error_;
};

using Status = Result<void>;

}  // namespace sluice

// Returns from the enclosing function with the error of `expr` if it has one.
#define SLUICE_TRY(expr)                                                         \
  do {                                                                           \
    if (auto sluice_try_ = (expr); !sluice_try_) {                               \
      return ::sluice::Unexpected{std::move(sluice_try_.error())};               \
    }                                                                            \
  } while (0)

// Declares `var` with the value of `expr`, or returns from the enclosing function with its error.
#define SLUICE_TRY_ASSIGN(var, expr)                                             \
  auto var##_result_ = (expr);                                                   \
  if (!var##_result_) return ::sluice::Unexpected{std::move(var##_result_.error())}; \
  auto var = std::move(*var##_result_)
