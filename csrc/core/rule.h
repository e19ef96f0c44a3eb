// The update rule of SGD, for one element. It is written here and nowhere else: every instruction set of the CPU and
// every GPU compiles this function. fused_sgd/reference.py is the same rule in PyTorch and is what it is tested
// against.
#pragma once

#include "arithmetic.h"

namespace fused_sgd {

// Where a hyperparameter stands: in the group itself, or in memory that the backend reads when the step runs.
enum class Source : uint8_t { Value, Float32, Float64 };

// A hyperparameter from wherever it stands. One that stands in memory is stored as its address.
FSGD_INLINE double read(double stored, Source source) {
  if (source == Source::Value) return stored;
  const auto address = bit_cast<uint64_t>(stored);
  if (source == Source::Float32) return static_cast<double>(*reinterpret_cast<const float*>(address));
  return *reinterpret_cast<const double*>(address);
}

// One param group's hyperparameters as the user gave them, in double, as the table carries them.
struct Group {
  double lr = 0;  // an address if lr_source says so; so is weight_decay
  double momentum = 0;
  double dampening = 0;
  double weight_decay = 0;
  uint8_t nesterov = 0;  // 0 or 1, like maximize
  uint8_t maximize = 0;
  Source lr_source = Source::Value;
  Source weight_decay_source = Source::Value;
  uint32_t unused = 0;

  // Bits are compared, not numbers: -0.0 is another learning rate than 0.0.
  bool operator==(const Group& other) const {
    struct Words {
      uint64_t word[5];
    };
    const auto a = bit_cast<Words>(*this), b = bit_cast<Words>(other);
    uint64_t difference = 0;
    for (int i = 0; i < 5; ++i) difference |= a.word[i] ^ b.word[i];
    return difference == 0;
  }
};
static_assert(sizeof(Group) == 40);

// A yes or no that is the same for every element, held as a number of the elements' own type: loops with a select on it
// vectorise beside 16-bit storage, which GCC does not manage with a bool.
template <class T>
struct Uniform {
  T value;
  FSGD_INLINE Uniform(bool yes) : value(yes ? T(1) : T(0)) {}
  FSGD_INLINE operator bool() const { return value != T(0); }
};

// The same, cast ONCE to the accumulation type T (float for fp32, bf16 and fp16; double for fp64). Whether a term
// exists is decided in double, before the cast, as torch does: a weight decay of 1e-60 is there, and is zero in float.
template <class T>
struct Hyperparameters {
  T neg_lr;
  T momentum;
  T one_minus_dampening;
  T weight_decay;
  T grad_scale;
  Uniform<T> has_momentum;
  Uniform<T> has_weight_decay;
  Uniform<T> has_grad_scale;
  Uniform<T> nesterov;
  Uniform<T> maximize;
  Uniform<T> first_step;  // of this parameter: no momentum was accumulated yet

  // grad_scale: one float, or null when gradients are not scaled.
  FSGD_INLINE Hyperparameters(const Group& group, const float* grad_scale_pointer, bool is_first_step)
      : Hyperparameters(group, read(group.lr, group.lr_source), read(group.weight_decay, group.weight_decay_source),
                        grad_scale_pointer, is_first_step) {}

 private:
  FSGD_INLINE Hyperparameters(const Group& group, double lr, double decay, const float* grad_scale_pointer,
                              bool is_first_step)
      : neg_lr(static_cast<T>(-lr)),
        momentum(static_cast<T>(group.momentum)),
        one_minus_dampening(static_cast<T>(1 - group.dampening)),
        weight_decay(static_cast<T>(decay)),
        grad_scale(grad_scale_pointer ? static_cast<T>(*grad_scale_pointer) : T(1)),
        has_momentum(group.momentum != 0),
        has_weight_decay(decay != 0),
        has_grad_scale(grad_scale_pointer != nullptr),
        nesterov(group.nesterov != 0),
        maximize(group.maximize != 0),
        first_step(is_first_step) {}
};

// p: parameter, b: momentum buffer; both are read and written. The hyperparameters are the same for a whole tensor, so
// the branches cost nothing: compilers hoist them out of the loop or turn them into selects.
template <class T>
FSGD_INLINE void update(const Hyperparameters<T>& h, T grad, T& p, T& b) {
  const T g = h.has_grad_scale ? divide(grad, h.grad_scale) : grad;
  T d = h.maximize ? -g : g;
  d = h.has_weight_decay ? fma(p, h.weight_decay, d) : d;
  if (h.has_momentum) {
    b = h.first_step ? d : fma(d, h.one_minus_dampening, multiply(b, h.momentum));
    d = h.nesterov ? fma(b, h.momentum, d) : b;
  }
  p = fma(d, h.neg_lr, p);
}

}  // namespace fused_sgd
