// The update rule of SGD, for one element. It is written here and nowhere else, in a form for CPUs and one for GPUs'
// packs (which take the CPUs' for single elements). fused_sgd/reference.py is the same rule in PyTorch and is what both
// are tested against.
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

// LARS and its variants, as flags of a group; without kLars the others mean nothing.
enum Lars : uint8_t {
  kLars = 1,               // the gradient is multiplied by the tensor's trust ratio
  kTrustClipped = 2,       // which is at most lr
  kAdaptAlways = 4,        // also where there is no weight decay
  kLrThroughMomentum = 8,  // and by the learning rate, which then goes through the momentum buffer
};

// One param group's hyperparameters as the user gave them, in double, as the table carries them.
struct Group {
  double lr = 0;  // an address if lr_source says so; so is weight_decay
  double momentum = 0;
  double dampening = 0;
  double weight_decay = 0;
  double ema_decay = 0;
  double trust_coeff = 0;
  double trust_eps = 0;
  uint8_t nesterov = 0;  // 0 or 1, like all that have no type of their own
  uint8_t maximize = 0;
  Source lr_source = Source::Value;
  Source weight_decay_source = Source::Value;
  uint8_t decoupled_weight_decay = 0;
  uint8_t has_ema = 0;
  uint8_t lars = 0;  // of Lars
  uint8_t unused = 0;

  // Bits are compared, not numbers: -0.0 is another learning rate than 0.0.
  bool operator==(const Group& other) const {
    struct Words {
      uint64_t word[8];
    };
    const auto a = bit_cast<Words>(*this), b = bit_cast<Words>(other);
    uint64_t difference = 0;
    for (int i = 0; i < 8; ++i) difference |= a.word[i] ^ b.word[i];
    return difference == 0;
  }
};
static_assert(sizeof(Group) == 64);

// What is the same for all tensors of a step and only the step knows. Pointers are null for what there is none of, and
// are the device's where the walk is a GPU's.
struct Scalars {
  const float* grad_scale = nullptr;    // gradients are divided by it
  const float* found_inf = nullptr;     // unless it is 0, the step is skipped
  const double* totals = nullptr;       // of the gradients of the whole step: sum of squares, and how often non-finite
  const double* row_squares = nullptr;  // sums of squares of each row's parameter and gradient, for LARS
  double max_grad_norm = 0;             // 0: gradients are not clipped
  int64_t* skipped_steps = nullptr;     // counts them, on a GPU; a CPU's step is skipped before it begins
  uint32_t* ticket = nullptr;           // on a GPU: how many blocks have read the counts of steps; 0 in between
  uint32_t skip_nonfinite = 0;
  uint32_t unused = 0;
};

FSGD_INLINE bool skips(const Scalars& scalars) {
  if (scalars.found_inf != nullptr && *scalars.found_inf != 0) return true;
  return scalars.skip_nonfinite != 0 && scalars.totals[1] != 0;
}

// The factor of torch.nn.utils.clip_grad_norm_. NaN stays NaN.
FSGD_INLINE double clip_coefficient(const Scalars& scalars) {
  if (scalars.max_grad_norm == 0) return 1;
  const double coefficient = divide(scalars.max_grad_norm, square_root(scalars.totals[0]) + 1e-6);
  return coefficient > 1 ? 1 : coefficient;
}

// The trust ratio of You et al., "Large Batch Training of Convolutional Networks" (2017), in timm's form.
FSGD_INLINE double trust_ratio(const Group& group, double lr, double decay, double param_norm, double grad_norm) {
  if ((group.lars & kAdaptAlways) == 0 && decay == 0) return 1;
  double ratio = 1;
  if (param_norm > 0 && grad_norm > 0) {
    const double shrinks = multiply(param_norm, decay);
    ratio = divide(multiply(group.trust_coeff, param_norm), grad_norm + shrinks + group.trust_eps);
  }
  if ((group.lars & kTrustClipped) != 0) {
    const double clipped = divide(ratio, lr);
    ratio = clipped > 1 ? 1 : clipped;
  }
  return ratio;
}

// A yes or no that is the same for every element. On the CPU it is held as a number of the elements' own type: loops
// with a select on it vectorise beside 16-bit storage, which GCC does not manage with a bool.
#if defined(__CUDA_ARCH__)
template <class T>
using Uniform = bool;
#else
template <class T>
struct Uniform {
  T value;
  FSGD_INLINE Uniform(bool yes) : value(yes ? T(1) : T(0)) {}
  FSGD_INLINE operator bool() const { return value != T(0); }
};
#endif

// Of those whose inverses are normal numbers, too. Scales of gradients are.
FSGD_INLINE bool is_power_of_two(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return (bits & 0x7FFFFFu) == 0 && bits >= 1u << 23 && bits <= 253u << 23;
}

FSGD_INLINE float inverse_of_power(float x) { return bit_cast<float>((254u << 23) - bit_cast<uint32_t>(x)); }

// The same for all elements of a tensor, cast ONCE to the accumulation type T (float for fp32, bf16 and fp16; double
// for fp64). Whether a term exists is decided in double, before the cast, as torch does: a weight decay of 1e-60 is
// there, and is zero in float. A factor of 1 changes no bit, so what is multiplied needs no flag.
template <class T>
struct Hyperparameters {
  T neg_lr;
  T momentum;
  T one_minus_dampening;
  T weight_decay;
  T grad_scale;
  T grad_inverse;  // of grad_scale, if that is a power of two and the inverse exact; else 1
  T grad_factor;   // 1 or, to maximize, -1; times the clip coefficient
  T decay_factor;  // 1 - lr * weight decay where that is decoupled
  T trust_ratio;
  T ema_weight;  // of torch's lerp, which begins at the nearer end: of the average, or minus that of the parameter
  Uniform<T> has_momentum;
  Uniform<T> has_weight_decay;
  Uniform<T> has_grad_scale;
  Uniform<T> has_grad_inverse;  // or no scale
  Uniform<T> nesterov;
  Uniform<T> has_ema;
  Uniform<T> ema_from_parameter;

  // row: this tensor's number in the table.
  FSGD_INLINE Hyperparameters(const Group& group, const Scalars& scalars, uint32_t row)
      : Hyperparameters(group, scalars, row, read(group.lr, group.lr_source),
                        read(group.weight_decay, group.weight_decay_source)) {}

 private:
  FSGD_INLINE Hyperparameters(const Group& group, const Scalars& scalars, uint32_t row, double lr, double decay)
      : neg_lr(static_cast<T>(-lr)),
        momentum(static_cast<T>(group.momentum)),
        one_minus_dampening(static_cast<T>(1 - group.dampening)),
        weight_decay(static_cast<T>(decay)),
        grad_scale(scalars.grad_scale != nullptr ? static_cast<T>(*scalars.grad_scale) : T(1)),
        grad_inverse(1),
        grad_factor(1),
        decay_factor(1),
        trust_ratio(1),
        ema_weight(static_cast<T>(1 - group.ema_decay)),
        has_momentum(group.momentum != 0),
        has_weight_decay(decay != 0 && group.decoupled_weight_decay == 0),
        has_grad_scale(scalars.grad_scale != nullptr),
        has_grad_inverse(scalars.grad_scale == nullptr || is_power_of_two(*scalars.grad_scale)),
        nesterov(group.nesterov != 0 && group.momentum != 0),
        has_ema(group.has_ema != 0),
        ema_from_parameter(ema_weight >= T(0.5)) {
    if (has_grad_inverse) grad_inverse = static_cast<T>(inverse_of_power(static_cast<float>(grad_scale)));
    const double clip = clip_coefficient(scalars);
    grad_factor = static_cast<T>(group.maximize != 0 ? -clip : clip);
    if (group.decoupled_weight_decay != 0) decay_factor = static_cast<T>(1 - multiply(lr, decay));
    if ((group.lars & kLars) != 0) {
      double ratio = fused_sgd::trust_ratio(group, lr, decay, square_root(scalars.row_squares[2 * row]),
                                            multiply(square_root(scalars.row_squares[2 * row + 1]), clip));
      if ((group.lars & kLrThroughMomentum) != 0) {
        ratio = multiply(ratio, lr);
        neg_lr = T(-1);
      }
      trust_ratio = static_cast<T>(ratio);
    }
    if (ema_from_parameter) ema_weight = subtract(ema_weight, T(1));
  }
};

// Of moderate numbers update() makes finite ones: parameter, gradient and momentum of magnitudes below kModerate,
// beside hyperparameters for which moderate() is true. (A grad_scale divides, and may enlarge without bound.) Nothing
// overflows then, and nothing is NaN or unset:
//   d  is below 2^40 * 2^15 + 2^40 * 2^15 = 2^56, times the trust ratio 2^71
//   b  below 2^71 * 2^15 + 2^40 * 2^15 < 2^87, and with Nesterov momentum d then below 2^87 * 2^15 + 2^71 < 2^103
//   p  below 2^40 * 2^15 + 2^103 * 2^15 < 2^119
inline constexpr float kModerate = 0x1p40f;

FSGD_INLINE bool moderate(const Hyperparameters<float>& h) {
  constexpr float kLargest = 0x1p15f;
  const float all[] = {h.neg_lr,      h.momentum,     h.one_minus_dampening, h.weight_decay,
                       h.grad_factor, h.decay_factor, h.trust_ratio};
  bool below = !h.has_grad_scale;
  for (const float x : all) below = below && -kLargest <= x && x <= kLargest;
  return below;
}

// What a momentum buffer or an average holds where nothing was accumulated yet: a NaN that no arithmetic makes. It is
// told by its bits, element by element, so that a step which the device skipped, or a graph repeats, needs no flag.
// Its lower bits are zero: bf16 and fp16 hold it too.
FSGD_INLINE float unset_value(float) { return bit_cast<float>(0x7FEE0000u); }
FSGD_INLINE double unset_value(double) { return bit_cast<double>(uint64_t{0x7FFDC00000000000u}); }
FSGD_INLINE bool is_unset(float x) { return bit_cast<uint32_t>(x) == 0x7FEE0000u; }
FSGD_INLINE bool is_unset(double x) { return bit_cast<uint64_t>(x) == 0x7FFDC00000000000u; }

// yes ? a : b. In float by bits, so that a CPU's compilers see a select and no branch: two of them in one loop they
// would unroll into four ways through it.
#if defined(__CUDA_ARCH__)
FSGD_INLINE float choose(bool yes, float a, float b) { return yes ? a : b; }
#else
FSGD_INLINE float choose(bool yes, float a, float b) {
  const uint32_t mask = yes ? ~0u : 0u;
  return bit_cast<float>((bit_cast<uint32_t>(a) & mask) | (bit_cast<uint32_t>(b) & ~mask));
}
#endif
FSGD_INLINE double choose(bool yes, double a, double b) { return yes ? a : b; }

// yes ? a : b, where yes is the same for a whole tensor. Of the plain form GPUs branch around a, and CPUs' compilers
// make a loop for either answer, as long as loops are short; of longer ones they compute all that follows twice, for
// either answer, and select in the end. So those may ask to have both computed and to select at once. (A macro, since a
// lambda's code is not sure to be inlined. average() asks is_unset() of each element in the same form.)
#define FSGD_EITHER(yes, a, b) (kSelects ? choose(yes, a, b) : (yes) ? (a) : (b))

// p: parameter, b: momentum buffer; both are read and written. kIsSet: the buffer is known not to be unset.
template <bool kSelects = false, bool kIsSet = false, class T>
FSGD_INLINE void update(const Hyperparameters<T>& h, T grad, T& p, T& b) {
  const T g = FSGD_EITHER(h.has_grad_scale, divide(grad, h.grad_scale), grad);
  T d = multiply(g, h.grad_factor);
  d = FSGD_EITHER(h.has_weight_decay, fma(p, h.weight_decay, d), d);
  p = multiply(p, h.decay_factor);
  d = multiply(d, h.trust_ratio);
  if (h.has_momentum) {
    const T accumulated = fma(d, h.one_minus_dampening, multiply(b, h.momentum));
    b = kIsSet ? accumulated : choose(is_unset(b), d, accumulated);
    d = FSGD_EITHER(h.nesterov, fma(b, h.momentum, d), b);
  }
  p = fma(d, h.neg_lr, p);
}

// The same for elements that a GPU's thread computes one after the other: with as few branches as can be, since what
// comes behind one waits for it. Without momentum b is written, too, and means nothing.
// kDivides: by a scale of gradients, rather than to multiply by its inverse, which is exact.
template <bool kDivides, class T>
FSGD_INLINE void update_straight(const Hyperparameters<T>& h, T grad, T& p, T& b) {
  const T g = kDivides ? divide(grad, h.grad_scale) : multiply(grad, h.grad_inverse);
  T d = multiply(g, h.grad_factor);
  d = h.has_weight_decay ? fma(p, h.weight_decay, d) : d;
  p = multiply(p, h.decay_factor);
  d = multiply(d, h.trust_ratio);
  const T accumulated = fma(d, h.one_minus_dampening, multiply(b, h.momentum));
  b = !h.has_momentum || is_unset(b) ? d : accumulated;
  d = h.nesterov ? fma(b, h.momentum, d) : b;
  p = fma(d, h.neg_lr, p);
}

// e: the exponential moving average of the parameter, read and written. p: the parameter as it was stored.
template <bool kSelects = false, class T>
FSGD_INLINE void average(const Hyperparameters<T>& h, T p, T& e) {
  const T blended = fma(h.ema_weight, subtract(p, e), FSGD_EITHER(h.ema_from_parameter, p, e));
  e = FSGD_EITHER(is_unset(e), p, blended);
}

#undef FSGD_EITHER

}  // namespace fused_sgd
