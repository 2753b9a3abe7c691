// One element's step of AdamW and of the averages of its weights; the same formulas on CPU and GPU.
// Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2; Karras et al., arXiv 2312.02696, equation 127.
#pragma once

#include "maskdiff_kernels.h"
#include "portable.h"

namespace maskdiff {
namespace ISA {

// What an update multiplies with, the same for all elements.
struct AdamFactors {
  float clip;           // gradients
  float keep[2];        // masters, without decay and with it
  float to_exp_avg;     // 1 - beta1
  float beta2;
  float to_exp_avg_sq;  // 1 - beta2
  float rate;           // lr / (1 - beta1^t)
  float root;           // 1 / sqrt(1 - beta2^t)
  float eps;
  float to_ema[2];      // the share of the new weights in each average; 0: it is not due
};

// The norm of gradients whose squares have this sum; says whether it is finite, as a sum in float would be.
MASKDIFF_HD bool finite_norm(double sum, float* norm) {
  const float single = (float)sum;
  const bool finite = (bits_of(single) & 0x7F800000u) != 0x7F800000u;
  *norm = finite ? (float)__builtin_sqrt(sum) : single;
  return finite;
}

// base^count by squaring: the same bits everywhere
MASKDIFF_HD double power(double base, int64_t count) {
  double result = 1.0;
  for (; count > 0; count >>= 1, base *= base) {
    if (count & 1) result *= base;
  }
  return result;
}

// 1 - (1 - 1/k)^exponent for a count k of 1 or more: by series, of operations that IEEE 754 fixes, without cancellation.
MASKDIFF_HD double power_share(double k, double exponent) {
  if (k < 2.0) return 1.0;
  const double z = 1.0 / (2.0 * k - 1.0), square = z * z;  // -ln(1 - 1/k) = 2 artanh(z); z is at most 1/3
  double series = 0.0;
  for (int i = 18; i >= 0; i--) series = series * square + 1.0 / (2 * i + 1);
  double x = exponent * 2.0 * z * series;
  x = (x < 64.0 ? x : 64.0) / 128.0;
  double share = 1.0;  // 1 - exp(-x) by Taylor's series, x at most 1/2
  for (int i = 15; i >= 2; i--) share = 1.0 - share * x * (1.0 / i);
  share *= x;
  for (int i = 0; i < 7; i++) share *= 2.0 - share;  // 1 - exp(-2 x), and so on to 128 x
  return share;
}

// How much of the new weights an average takes up at its update number `seen`, for `every` updates at once: young averages
// take up more, so that they do not stick to their start; those by a power function (gamma of 0 or more) ever less.
MASKDIFF_HD float ema_share(double decay, double gamma, double seen, double every) {
  if (gamma >= 0.0) return (float)power_share(seen / every, gamma + 1.0);  // 1 - ((seen - every) / seen)^(gamma + 1)
  double kept = 1.0;
  for (double k = seen - every + 1.0; k <= seen; k += 1.0) {
    const double young = (1.0 + k) / (10.0 + k);
    kept *= young < decay ? young : decay;
  }
  return (float)(1.0 - kept);
}

// The factors of the update that follows `adam_step` and `ema_step` earlier ones; lr, bound: the two of `hyper`.
MASKDIFF_HD AdamFactors adam_factors(const maskdiff_adamw_numbers& n, float lr, float bound, float norm, float adam_step,
                                     float ema_step) {
  const int64_t t = (int64_t)adam_step + 1;
  const double seen = (double)ema_step + 1.0;
  AdamFactors f;
  f.clip = norm > bound ? bound / norm : 1.0f;
  f.keep[0] = 1.0f;
  f.keep[1] = (float)(1.0 - (double)lr * n.weight_decay);
  f.to_exp_avg = (float)(1.0 - n.beta1);
  f.beta2 = (float)n.beta2;
  f.to_exp_avg_sq = (float)(1.0 - n.beta2);
  f.rate = (float)((double)lr / (1.0 - power(n.beta1, t)));
  f.root = (float)(1.0 / __builtin_sqrt(1.0 - power(n.beta2, t)));
  f.eps = (float)n.eps;
  const bool due = (int64_t)seen % n.ema_every == 0;
  const double every = (double)n.ema_every;
  f.to_ema[0] = due ? ema_share(n.ema_decay, n.ema_gamma, seen, every) : 0.0f;
  f.to_ema[1] = due ? ema_share(n.ema2_decay, n.ema2_gamma, seen, every) : 0.0f;
  return f;
}

// A master and its moments.
struct AdamElement {
  float master, exp_avg, exp_avg_sq;
};

// The element after a step for the gradient g; `keep` is one of f.keep.
MASKDIFF_HD AdamElement adamw(const AdamFactors& f, float keep, float g, AdamElement x) {
  g *= f.clip;
  x.exp_avg += f.to_exp_avg * (g - x.exp_avg);
  x.exp_avg_sq = f.beta2 * x.exp_avg_sq + f.to_exp_avg_sq * g * g;
  x.master = keep * x.master - f.rate * (x.exp_avg / (__builtin_sqrtf(x.exp_avg_sq) * f.root + f.eps));
  return x;
}

}  // namespace ISA
}  // namespace maskdiff
