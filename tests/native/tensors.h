// Tensors in memory of their own, in any storage combination, for tests of the walks.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string_view>
#include <vector>

#include "core/table.h"

inline std::mt19937 generator(0);

// What stands in a column: numbers, or what a stochastic format takes its random bits from.
enum class Kind { F64, F32, BF16, F16, I16, I8, Rounding };

inline std::vector<Kind> columns_of(std::string_view format) {
  if (format == "Float64") return {Kind::F64};
  if (format == "Float32") return {Kind::F32};
  if (format == "BFloat16") return {Kind::BF16};
  if (format == "Float16") return {Kind::F16};
  if (format == "SplitBFloat16") return {Kind::BF16, Kind::I16};
  if (format == "MasterBFloat16") return {Kind::BF16, Kind::F32};
  if (format == "MasterFloat16") return {Kind::F16, Kind::F32};
  if (format == "StochasticBFloat16") return {Kind::BF16, Kind::Rounding};
  if (format == "StochasticFloat16") return {Kind::F16, Kind::Rounding};
  if (format == "Int8") return {Kind::I8, Kind::F32};
  std::abort();  // a format this test does not know
}

inline int64_t element_bytes(Kind kind) {
  switch (kind) {
    case Kind::F64:
      return 8;
    case Kind::F32:
      return 4;
    case Kind::I8:
      return 1;
    case Kind::Rounding:
      return sizeof(fused_sgd::StochasticRecord);
    default:
      return 2;
  }
}

// Memory exactly as long as its content, which begins `offset` elements behind a 16-byte boundary.
class Memory {
 public:
  Memory(Kind kind, int64_t length, int64_t offset)
      : kind_(kind), skip_(offset * element_bytes(kind)), bytes_(length * element_bytes(kind)) {
    allocate();
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < length; ++i) {
      const double x = normal(generator);
      switch (kind) {
        case Kind::F64:
          put(i, x);
          break;
        case Kind::F32:
          put(i, static_cast<float>(x));
          break;
        case Kind::BF16:
          put(i, fused_sgd::float_to_bfloat16(static_cast<float>(x)));
          break;
        case Kind::F16:
          put(i, fused_sgd::float_to_float16(static_cast<float>(x)));
          break;
        case Kind::I16:
          put(i, static_cast<int16_t>(x * 10000));
          break;
        case Kind::I8:
          put(i, static_cast<int8_t>(x * 30));
          break;
        case Kind::Rounding:
          put(i, fused_sgd::StochasticRecord{generator(), generator(), generator() + (uint64_t{1} << 33), 0});
          break;
      }
    }
    std::memset(memory_.get(), 0x5A, skip_);  // what is not the tensor's must stay
  }
  Memory(const Memory& other) : kind_(other.kind_), skip_(other.skip_), bytes_(other.bytes_) {
    allocate();
    std::memcpy(memory_.get(), other.memory_.get(), skip_ + bytes_);
  }
  // Nothing was accumulated yet in element i.
  void unset(int64_t i) {
    if (bytes_ == 0) return;
    switch (kind_) {
      case Kind::F64:
        return put(i, fused_sgd::unset_value(double()));
      case Kind::F32:
        return put(i, fused_sgd::unset_value(float()));
      case Kind::BF16:
        return put(i, static_cast<uint16_t>(0x7FEE));
      case Kind::F16:
        return put(i, static_cast<uint16_t>(0x7F70));
      default:
        return;
    }
  }
  template <class T>
  void put(int64_t i, T x) const {
    std::memcpy(memory_.get() + skip_ + i * static_cast<int64_t>(sizeof(T)), &x, sizeof(T));
  }
  void* data() const { return memory_.get() + skip_; }
  bool same(const Memory& other) const { return std::memcmp(memory_.get(), other.memory_.get(), skip_ + bytes_) == 0; }

 private:
  void allocate() {
    const int64_t all = (skip_ + bytes_ + 15) / 16 * 16;
    memory_.reset(static_cast<std::byte*>(std::aligned_alloc(16, static_cast<std::size_t>(all))));
  }
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  Kind kind_;
  int64_t skip_, bytes_;
  std::unique_ptr<std::byte, Free> memory_;
};

struct Tensor {
  int combination;
  int64_t length;
  std::vector<Memory> columns;  // of the parameter, the gradient, the momentum buffer, the average

  // Offsets of parameter, gradient and momentum. Tensors in blocks are whole blocks.
  Tensor(int line, int64_t elements, int64_t offset_p, int64_t offset_g, int64_t offset_m)
      : combination(line), length(elements) {
    using namespace fused_sgd;
    const Combination& c = kCombinations[line];
    const bool blocks = std::string_view(c.momentum) == "Int8";
    if (blocks) length = (length + kInt8Block - 1) / kInt8Block * kInt8Block;
    columns.reserve(kMaxColumns);
    const auto add = [&](std::string_view format, int64_t offset) {
      for (const Kind kind : columns_of(format)) {
        const bool record = kind == Kind::Rounding, scales = blocks && format == "Int8" && kind == Kind::F32;
        const int64_t count = record ? 1 : scales ? length / kInt8Block : length;
        columns.emplace_back(kind, count, record || scales ? 0 : offset);
      }
    };
    add(c.parameter, offset_p);
    add(c.gradient, offset_g);
    add(c.momentum, offset_m);
    columns[static_cast<std::size_t>(c.ema_column() - 1)].unset(blocks ? length / kInt8Block / 3 : length / 3);
    add(c.computed_in_double ? "Float64" : "Float32", offset_p);
    columns.back().unset(length / 2);
  }
};
