// The 16-bit conversions, over every bit pattern of 16 bits and, for rounding, over all 2^32 of fp32.
#include <cmath>
#include <limits>

#include "check.h"
#include "core/formats.h"

using namespace fused_sgd;

namespace {

// What a half's bits mean, by the definition of IEEE 754.
double half_value(uint16_t half) {
  const int exponent = half >> 10 & 31;
  const int fraction = half & 1023;
  const double sign = half >> 15 ? -1 : 1;
  if (exponent == 31) return fraction ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

double bfloat16_value(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

// Whether `bits` is the nearest of its neighbours to x, ties to even. Neighbours of a sign-magnitude format differ by
// one in their bits; infinity stands where the next power of two would.
template <double (*kValue)(uint16_t), uint16_t kInfinity>
bool rounds_to_nearest_even(float x, uint16_t bits) {
  const uint16_t magnitude = bits & 0x7FFF;
  if (std::isnan(x)) return magnitude > kInfinity;
  if ((bits >> 15 != 0) != std::signbit(x) || magnitude > kInfinity) return false;
  const auto value = [](uint16_t m) {
    return m == kInfinity ? 2 * kValue(kInfinity - 1) - kValue(kInfinity - 2) : kValue(m);
  };
  const double size = std::fabs(static_cast<double>(x));
  if (std::isinf(x)) return magnitude == kInfinity;
  const double error = std::fabs(value(magnitude) - size);
  if (magnitude > 0) {
    const double below = std::fabs(value(magnitude - 1) - size);
    if (below < error || (below == error && magnitude % 2)) return false;
  }
  if (magnitude < kInfinity) {
    const double above = std::fabs(value(magnitude + 1) - size);
    if (above < error || (above == error && magnitude % 2)) return false;
  } else if (size < value(kInfinity) - (value(kInfinity) - value(kInfinity - 1)) / 2) {
    return false;
  }
  return true;
}

}  // namespace

int main() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    CHECK(same(float16_to_float(half), half_value(half)));
    CHECK(same(bfloat16_to_float(half), bfloat16_value(half)));
    const bool half_nan = std::isnan(half_value(half)), bfloat16_nan = std::isnan(bfloat16_value(half));
    CHECK(float_to_float16(float16_to_float(half)) == (half_nan ? 0x7E00 : half));
    CHECK(bfloat16_nan ? float_to_bfloat16(bfloat16_to_float(half)) == 0x7FC0
                       : float_to_bfloat16(bfloat16_to_float(half)) == half);
  }
  // A stride of 7 reaches every exponent and every low bit pattern around the ties; 2^32 in full takes a minute.
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 7) {
    const float x = bit_cast<float>(static_cast<uint32_t>(bits));
    CHECK((rounds_to_nearest_even<half_value, 0x7C00>(x, float_to_float16(x))));
  }
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 7) {
    const float x = bit_cast<float>(static_cast<uint32_t>(bits));
    const uint16_t rounded = float_to_bfloat16(x);
    CHECK(std::isnan(x) ? rounded == 0x7FC0 : (rounds_to_nearest_even<bfloat16_value, 0x7F80>(x, rounded)));
  }
  // The ties themselves, between every two neighbours.
  for (uint32_t bits = 0; bits < 0x7C00; ++bits) {
    const float low = float16_to_float(static_cast<uint16_t>(bits));
    const float high = bits + 1 == 0x7C00 ? 65536.0f : float16_to_float(static_cast<uint16_t>(bits + 1));
    const float tie = (low + high) / 2;
    CHECK((rounds_to_nearest_even<half_value, 0x7C00>(tie, float_to_float16(tie))));
    CHECK((rounds_to_nearest_even<half_value, 0x7C00>(std::nextafter(tie, 0.0f),
                                                      float_to_float16(std::nextafter(tie, 0.0f)))));
    CHECK((rounds_to_nearest_even<half_value, 0x7C00>(std::nextafter(tie, 1e9f),
                                                      float_to_float16(std::nextafter(tie, 1e9f)))));
  }
  std::printf("formats: %d failures\n", failures);
  return failures;
}
