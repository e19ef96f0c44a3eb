// The ceiling of a step: SGD with momentum and weight decay as a plain loop over one flat array. It knows nothing of
// tensors, param groups or options, so what an optimizer takes beyond it is the price of those.
// flat_loop.py compiles and calls it.
#include <bit>
#include <cstdint>

namespace {

// A second thread costs more than it saves below this; torch's own loops have the same limit.
constexpr int64_t kSerialBelow = 32768;

float load(const float& x) { return x; }
void store(float& to, float x) { to = x; }

// bfloat16 is the upper half of a float; storing rounds to nearest, ties to even. NaN does not occur here.
float load(const uint16_t& x) { return std::bit_cast<float>(uint32_t{x} << 16); }
void store(uint16_t& to, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  to = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class T>
void sgd(T* __restrict param, const T* __restrict grad, T* __restrict momentum_buffer, int64_t elements, float lr,
         float momentum, float weight_decay, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads) if (parallel : elements >= kSerialBelow)
  for (int64_t i = 0; i < elements; ++i) {
    const float p = load(param[i]);
    const float b = momentum * load(momentum_buffer[i]) + (load(grad[i]) + weight_decay * p);
    store(momentum_buffer[i], b);
    store(param[i], p - lr * b);
  }
}

}  // namespace

extern "C" void flat_sgd_float32(float* param, const float* grad, float* momentum_buffer, int64_t elements, float lr,
                                 float momentum, float weight_decay, int threads) {
  sgd(param, grad, momentum_buffer, elements, lr, momentum, weight_decay, threads);
}

extern "C" void flat_sgd_bfloat16(uint16_t* param, const uint16_t* grad, uint16_t* momentum_buffer, int64_t elements,
                                  float lr, float momentum, float weight_decay, int threads) {
  sgd(param, grad, momentum_buffer, elements, lr, momentum, weight_decay, threads);
}
