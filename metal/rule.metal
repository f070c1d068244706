// The Adagrad update of one element: the only place in Metal that knows the formula.
// Counterpart of mlx_adagrad/rule.py; every helper takes scalars, since a buffer may be in device or constant space.

// The numbers of one step, in the order of rule.Scalars.
struct AdagradScalars {
  float lr;
  float eps;
  float weight_decay;
  float scale;
  float low;
  float high;
  bool apply;
};

// rule.SMALLEST_NORMAL: stands in for a v of 0, and so keeps 0/0 out of the update.
constant constexpr float ADAGRAD_SMALLEST_NORMAL = 1.17549435e-38f;

// The gradient that Adagrad squares: unscaled, clipped, turned round for maximize, then decayed.
template <bool MAXIMIZE, bool COUPLED, bool SCALED, bool CLIPPED>
inline float adagrad_gradient(float w, float g, const thread AdagradScalars& s) {
  if (SCALED) {
    g = g * s.scale;
  }
  if (CLIPPED) { // comparisons, not clamp: a NaN stays a NaN
    g = g < s.low ? s.low : g;
    g = g > s.high ? s.high : g;
  }
  if (MAXIMIZE) {
    g = -g;
  }
  if (COUPLED) {
    g = g + s.weight_decay * w;
  }
  return g;
}

// v + g², for the gradient of adagrad_gradient.
template <bool UPDATE_ACCUMULATOR>
inline float adagrad_accumulate(float v, float g) {
  return UPDATE_ACCUMULATOR ? v + g * g : v;
}

// sqrt(v) + eps or sqrt(v + eps); infinite where both are 0, which makes the update 0.
template <bool EPS_INSIDE_SQRT, bool EPS_IS_ZERO>
inline float adagrad_denominator(float v, const thread AdagradScalars& s) {
  if (EPS_INSIDE_SQRT) {
    v = v + s.eps;
  }
  if (EPS_IS_ZERO && v == 0.0f) {
    return INFINITY;
  }
  float root = metal::precise::sqrt(v == 0.0f ? ADAGRAD_SMALLEST_NORMAL : v);
  return EPS_INSIDE_SQRT ? root : root + s.eps;
}

// w - lr g / denominator(v), for the gradient of adagrad_gradient and the v that already holds its square.
template <bool DECOUPLED, bool EPS_INSIDE_SQRT, bool EPS_IS_ZERO>
inline float adagrad_descend(float w, float g, float v, const thread AdagradScalars& s) {
  float decayed = DECOUPLED ? w - s.lr * s.weight_decay * w : w;
  return decayed - s.lr * g / adagrad_denominator<EPS_INSIDE_SQRT, EPS_IS_ZERO>(v, s);
}
