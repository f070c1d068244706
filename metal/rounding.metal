// Rounding that loses nothing on average, and the random bits for it.
// Counterpart of mlx_adagrad/update/rounding.py and quantization.py: the same bits for the same numbers.

// 32 random bits for element number i under a key of two words: a keyed lowbias32.
inline uint adagrad_word(uint i, uint key0, uint key1) {
  uint x = i ^ key0;
  x = ((x ^ (x >> 16)) * 0x7FEB352Du) ^ key1;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// 16 random bits: half a word, shared with the neighbour.
inline uint adagrad_half(uint i, uint key0, uint key1) {
  return (adagrad_word(i >> 1, key0, key1) >> ((i & 1u) << 4)) & 0xFFFFu;
}

// x, of which the 16 random bits say which neighbour it becomes in the type of the last argument.
inline void adagrad_round(float x, uint bits, thread bfloat16_t& rounded) {
  uint all = as_type<uint>(x), magnitude = all & 0x7FFFFFFFu;
  bits = magnitude > 0x7F7F0000u ? 0x8000u : bits; // beyond the largest finite number the nearest is taken
  rounded = as_type<bfloat16_t>(ushort((magnitude > 0x7F800000u ? all | 0x400000u : all + bits) >> 16));
}

inline void adagrad_round(float x, uint bits, thread float16_t& rounded) {
  uint all = as_type<uint>(x), magnitude = all & 0x7FFFFFFFu, half_bits;
  if (magnitude > 0x7F800000u) {
    half_bits = 0x7E00u;
  } else if (magnitude >= 0x38800000u) {
    uint added = magnitude > 0x477FE000u ? 0x1000u : bits >> 3;
    half_bits = ((min(magnitude, 0x47800000u) + added) >> 13) - 0x1C000u;
  } else { // below 2^-14 the unit is 2^-24
    uint shift = 126u - (magnitude >> 23), within = min(shift, 31u);
    uint mantissa = magnitude < 0x800000u ? 0u : (magnitude & 0x7FFFFFu) | 0x800000u;
    half_bits = ((mantissa >> min(shift - within, 31u)) + (((bits << 16) | 0x8000u) >> (32u - within))) >> within;
  }
  rounded = as_type<float16_t>(ushort(half_bits | ((all >> 16) & 0x8000u)));
}

inline void adagrad_round(float x, uint, thread float& rounded) {
  rounded = x;
}

// A new weight as it is stored.
template <typename W, bool STOCHASTIC>
inline W adagrad_weight(float x, uint i, uint key0, uint key1) {
  W rounded = static_cast<W>(x);
  if (STOCHASTIC) {
    adagrad_round(x, adagrad_half(i, key0, key1), rounded);
  }
  return rounded;
}

// What a weight that was rounded to the nearest number lacks; nothing where it is not finite.
template <typename W>
inline W adagrad_rest(float x, W rounded) {
  float rest = x - float(rounded);
  return static_cast<W>((as_type<uint>(rest) & 0x7FFFFFFFu) < 0x7F800000u ? rest : 0.0f);
}

// The number that a code stands for, in a block of this exponent.
inline float adagrad_decoded(uint code, uint exponent) {
  uint mantissa = ((code & 15u) | (code < 16u ? 0u : 16u)) << (max(code >> 4, 1u) - 1u);
  return float(mantissa) * as_type<float>((max(exponent, 19u) - 18u) << 23);
}

// The exponent of a block whose largest number has these bits.
inline uint adagrad_exponent(int largest) {
  return clamp(uint(clamp(largest, 0, 0x7F800000) + 0x7FFFF) >> 23, 19u, 255u);
}

// The code of a number >= 0 in a block of this exponent, given 32 random bits.
inline uchar adagrad_coded(float v, uint exponent, uint bits) {
  exponent = max(exponent, 19u);
  float units = v * as_type<float>((272u - exponent) << 23);
  if (units < 16.0f) {
    return uchar((uint(units * 67108864.0f) + (bits >> 6)) >> 26);
  }
  return uchar(((as_type<uint>(v) + (bits >> 13)) >> 19) - ((exponent - 15u) << 4));
}
