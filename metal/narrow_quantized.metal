// One block of an accumulator in 8 bits, by one threadgroup, of a tensor or of some rows of it (ROWS). Every thread
// reads N neighbouring elements once, updates them, and writes codes when the largest number of the block is known.
// blocks: elements of a line, blocks of a line, elements of a block.
threadgroup int largest_of[32];
uint block = thread_position_in_grid.y;
uint line = block / uint(blocks[1]), first = block % uint(blocks[1]) * uint(blocks[2]);
uint length = min(uint(blocks[2]), uint(blocks[0]) - first);
ulong start = ulong(line) * ulong(blocks[0]) + first;
uint number = ROWS ? uint(targets[line]) * uint(blocks[0]) + first : uint(start);
AdagradScalars s = {lr, eps, weight_decay, scale, low, high, !GATED || apply};
bool acts = s.apply && (!ROWS || live[line] != 0);
uint exponent = exponents[block];
float totals[N];
int largest = 0;
for (uint k = 0; k < N; ++k) {
  uint j = thread_position_in_threadgroup.x * N + k;
  totals[k] = 0.0f;
  if (j < length) {
    ulong i = start + j;
    float weight = COMPENSATED ? float(w[i]) + float(rest[i]) : float(w[i]);
    float gradient = adagrad_gradient<MAXIMIZE, COUPLED, SCALED, CLIPPED>(weight, float(g[i]), s);
    totals[k] = adagrad_accumulate<UPDATE_ACCUMULATOR>(adagrad_decoded(v[i], exponent), gradient);
    float updated = adagrad_descend<DECOUPLED, EPS_INSIDE_SQRT, EPS_IS_ZERO, UPDATE_ACCUMULATOR>(
        weight, gradient, totals[k], s);
    W rounded = adagrad_weight<W, STOCHASTIC>(updated, number + j, key[0], key[1]);
    if (COMPENSATED) {
      new_rest[i] = acts ? adagrad_rest(updated, rounded) : rest[i];
    }
    new_weights[i] = acts ? rounded : w[i];
    largest = max(largest, as_type<int>(totals[k]));
  }
}
largest = simd_max(largest);
if (thread_index_in_simdgroup == 0) {
  largest_of[simdgroup_index_in_threadgroup] = largest;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint i = 0; i < simdgroups_per_threadgroup; ++i) {
  largest = max(largest, largest_of[i]);
}
uint grown = acts ? max(exponent, adagrad_exponent(largest)) : exponent;
if (thread_position_in_threadgroup.x == 0) {
  new_exponents[block] = uchar(grown);
}
for (uint k = 0; k < N; ++k) {
  uint j = thread_position_in_threadgroup.x * N + k;
  if (j < length) {
    uint bits = adagrad_word(number + j, key[2], key[3]);
    new_accumulator[start + j] = acts ? adagrad_coded(totals[k], grown, bits) : v[start + j];
  }
}
