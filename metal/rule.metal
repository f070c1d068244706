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

// rule.SMALLEST_NORMAL: a v below it counts as 0, whether or not the GPU flushes denormals; and rule.STAND_IN.
constant constexpr float ADAGRAD_SMALLEST_NORMAL = 1.17549435e-38f;
constant constexpr float ADAGRAD_STAND_IN = 5.16987883e-26f;

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

// rule.LARGEST: the largest number of each type that weights and v are stored in.
inline float adagrad_largest(float) {
  return 3.40282347e38f;
}
inline float adagrad_largest(float16_t) {
  return 65504.0f;
}
inline float adagrad_largest(bfloat16_t) {
  return 3.38953139e38f;
}

// What is stored of a new v: in a guarded step it stops at the largest number that it is stored in, T.
template <bool GUARDED, typename T>
inline float adagrad_stopped(float total) {
  return GUARDED && total > adagrad_largest(T(0.0f)) ? adagrad_largest(T(0.0f)) : total;
}

// Whether a new weight is to be stored as a T: not where a guarded step would make it infinite.
template <bool GUARDED, typename T>
inline bool adagrad_fits(float updated) {
  return !GUARDED || (updated <= adagrad_largest(T(0.0f)) && updated >= -adagrad_largest(T(0.0f)));
}

// g / (sqrt(v) + eps) or g / sqrt(v + eps); 0 where eps and v are both 0, but a NaN stays one.
template <bool EPS_INSIDE_SQRT, bool EPS_IS_ZERO, bool UPDATE_ACCUMULATOR>
inline float adagrad_divided(float g, float v, const thread AdagradScalars& s) {
  if (EPS_INSIDE_SQRT) {
    v = v + s.eps;
  }
  bool none = v < ADAGRAD_SMALLEST_NORMAL;
  if (EPS_IS_ZERO) {
    return none ? g - g : g / metal::precise::sqrt(v);
  }
  float stand_in = UPDATE_ACCUMULATOR ? ADAGRAD_STAND_IN : ADAGRAD_SMALLEST_NORMAL;
  float root = metal::precise::sqrt(none ? stand_in : v);
  return g / (EPS_INSIDE_SQRT ? root : root + s.eps);
}

// w - lr g / (sqrt(v) + eps), for the gradient of adagrad_gradient and the v that already holds its square.
template <bool DECOUPLED, bool EPS_INSIDE_SQRT, bool EPS_IS_ZERO, bool UPDATE_ACCUMULATOR>
inline float adagrad_descend(float w, float g, float v, const thread AdagradScalars& s) {
  float decayed = DECOUPLED ? w - s.lr * s.weight_decay * w : w;
  return decayed - adagrad_divided<EPS_INSIDE_SQRT, EPS_IS_ZERO, UPDATE_ACCUMULATOR>(s.lr * g, v, s);
}
