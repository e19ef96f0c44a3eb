// The ceiling of a step on a GPU: SGD with momentum and weight decay over one flat array, 3 reads and 2 writes an
// element. It knows nothing of tensors, param groups or options, so what an optimizer takes beyond it is their price.
// flat_cuda.py compiles and calls it.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 256;

__device__ float load(const float& x) { return x; }
__device__ float load(const __nv_bfloat16& x) { return __bfloat162float(x); }
__device__ void store(float& to, float x) { to = x; }
__device__ void store(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

template <class T>
struct alignas(16) Pack {
  static constexpr int kElements = 16 / sizeof(T);
  T values[kElements];
};

struct Hyperparameters {
  float lr, momentum, weight_decay;
};

template <class T>
__device__ void update(T& param, const T& grad, T& momentum_buffer, const Hyperparameters& h) {
  const float p = load(param);
  const float b = fmaf(h.momentum, load(momentum_buffer), fmaf(h.weight_decay, p, load(grad)));
  store(momentum_buffer, b);
  store(param, fmaf(-h.lr, b, p));
}

// A thread takes kPacks packs of 16 bytes of each array, all of them loaded before the first is stored.
template <class T, int kPacks>
__global__ __launch_bounds__(kThreads) void flat_sgd(Pack<T>* __restrict__ param, const Pack<T>* __restrict__ grad,
                                                     Pack<T>* __restrict__ momentum_buffer, int64_t elements,
                                                     Hyperparameters h) {
  constexpr int kElements = Pack<T>::kElements;
  const int64_t packs = elements / kElements;
  const int64_t first = int64_t{blockIdx.x} * kThreads * kPacks + threadIdx.x;
  Pack<T> p[kPacks], g[kPacks], b[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int64_t at = first + i * kThreads;
    if (at >= packs) continue;
    p[i] = param[at];
    g[i] = grad[at];
    b[i] = momentum_buffer[at];
  }
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int64_t at = first + i * kThreads;
    if (at >= packs) continue;
#pragma unroll
    for (int j = 0; j < kElements; ++j) update(p[i].values[j], g[i].values[j], b[i].values[j], h);
    param[at] = p[i];
    momentum_buffer[at] = b[i];
  }
  // What is left behind the last whole pack: fewer elements than a block has threads.
  const int64_t tail = packs * kElements + threadIdx.x;
  if (blockIdx.x == 0 && tail < elements) {
    update(reinterpret_cast<T*>(param)[tail], reinterpret_cast<const T*>(grad)[tail],
           reinterpret_cast<T*>(momentum_buffer)[tail], h);
  }
}

template <class T, int kPacks>
cudaError_t launch(void* param, const void* grad, void* momentum_buffer, int64_t elements, Hyperparameters h,
                   cudaStream_t stream) {
  const int64_t per_block = int64_t{kThreads} * kPacks * Pack<T>::kElements;
  const int64_t blocks = elements < per_block ? 1 : (elements + per_block - 1) / per_block;
  flat_sgd<T, kPacks><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      static_cast<Pack<T>*>(param), static_cast<const Pack<T>*>(grad), static_cast<Pack<T>*>(momentum_buffer), elements,
      h);
  return cudaGetLastError();
}

template <class T>
const char* run(int device, int packs, void* param, const void* grad, void* momentum_buffer, int64_t elements, float lr,
                float momentum, float weight_decay, void* stream_handle) {
  const Hyperparameters h{lr, momentum, weight_decay};
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    switch (packs) {
      case 1:
        error = launch<T, 1>(param, grad, momentum_buffer, elements, h, stream);
        break;
      case 2:
        error = launch<T, 2>(param, grad, momentum_buffer, elements, h, stream);
        break;
      case 4:
        error = launch<T, 4>(param, grad, momentum_buffer, elements, h, stream);
        break;
      default:
        return "packs must be 1, 2 or 4";
    }
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

// Each returns an error message, or a null pointer.
extern "C" const char* flat_sgd_float32(int device, int packs, void* param, const void* grad, void* momentum_buffer,
                                        int64_t elements, float lr, float momentum, float weight_decay, void* stream) {
  return run<float>(device, packs, param, grad, momentum_buffer, elements, lr, momentum, weight_decay, stream);
}

extern "C" const char* flat_sgd_bfloat16(int device, int packs, void* param, const void* grad, void* momentum_buffer,
                                         int64_t elements, float lr, float momentum, float weight_decay, void* stream) {
  return run<__nv_bfloat16>(device, packs, param, grad, momentum_buffer, elements, lr, momentum, weight_decay, stream);
}
