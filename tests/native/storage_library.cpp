// The storage formats behind C functions, for tests/test_storage.py to compare with their reference in PyTorch.
#include "core/int8.h"
#include "core/master.h"
#include "core/stochastic.h"

using namespace fused_sgd;

extern "C" {

void split_round(const float* x, int64_t n, uint16_t* high, int16_t* low) {
  void* columns[] = {high, low};
  const SplitBFloat16 format(columns);
  for (int64_t i = 0; i < n; ++i) format.store(i, x[i]);
}

void split_join(uint16_t* high, int16_t* low, int64_t n, float* x) {
  void* columns[] = {high, low};
  const SplitBFloat16 format(columns);
  for (int64_t i = 0; i < n; ++i) x[i] = format.load(i);
}

void round_bfloat16(const float* x, int64_t n, StochasticRecord record, uint16_t* rounded) {
  void* columns[] = {rounded, &record};
  const StochasticBFloat16 format(columns);
  for (int64_t i = 0; i < n; ++i) format.store(i, x[i]);
}

void round_float16(const float* x, int64_t n, StochasticRecord record, uint16_t* rounded) {
  void* columns[] = {rounded, &record};
  const StochasticFloat16 format(columns);
  for (int64_t i = 0; i < n; ++i) format.store(i, x[i]);
}

// n: whole blocks.
void int8_quantize(const float* x, int64_t n, int8_t* codes, float* scales) {
  using Format = Int8;
  void* columns[] = {codes, scales};
  const Format format(columns);
  for (int64_t begin = 0; begin < n; begin += kInt8Block) {
    Format::Reduction reduction;
    for (int64_t i = begin; i < begin + kInt8Block; ++i) Format::reduce(reduction, x[i]);
    for (int64_t i = begin; i < begin + kInt8Block; ++i) format.store(i, x[i], reduction);
    format.finish(begin / kInt8Block, reduction);
  }
}

void int8_dequantize(int8_t* codes, float* scales, int64_t n, float* x) {
  void* columns[] = {codes, scales};
  const Int8 format(columns);
  for (int64_t i = 0; i < n; ++i) x[i] = format.load(i);
}

int int8_block() { return kInt8Block; }

}  // extern "C"
