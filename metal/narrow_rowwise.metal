// One row with one accumulator, by one simdgroup, of a tensor or of some rows (ROWS), whose weights or accumulator
// are rounded with care; else as rowwise.metal, but that rows lie one after another.
uint lane = thread_position_in_grid.x;
uint row = thread_position_in_grid.y;
ulong columns = 1;
for (int axis = 1; axis < w_ndim; ++axis) {
  columns *= ulong(w_shape[axis]);
}
AdagradScalars s = {lr, eps, weight_decay, scale, low, high, !GATED || apply};
bool acts = s.apply && (!ROWS || live[row] != 0);
uint number = ROWS ? uint(targets[row]) : row;
float squares = 0.0f;
for (ulong i = row * columns + lane; i < (row + 1) * columns; i += threads_per_grid.x) {
  float weight = COMPENSATED ? float(w[i]) + float(rest[i]) : float(w[i]);
  float gradient = adagrad_gradient<MAXIMIZE, COUPLED, SCALED, CLIPPED>(weight, float(g[i]), s);
  squares += gradient * gradient;
}
float mean = simd_sum(squares) / float(columns);
float total = UPDATE_ACCUMULATOR ? float(v[row]) + mean : float(v[row]);
if (lane == 0) {
  new_accumulator[row] = acts ? adagrad_weight<V, RANDOM_V>(total, number, key[2], key[3]) : static_cast<V>(v[row]);
}
for (ulong column = lane; column < columns; column += threads_per_grid.x) {
  ulong i = row * columns + column;
  float weight = COMPENSATED ? float(w[i]) + float(rest[i]) : float(w[i]);
  float gradient = adagrad_gradient<MAXIMIZE, COUPLED, SCALED, CLIPPED>(weight, float(g[i]), s);
  float updated = adagrad_descend<DECOUPLED, EPS_INSIDE_SQRT, EPS_IS_ZERO, UPDATE_ACCUMULATOR>(
        weight, gradient, total, s);
  W rounded = adagrad_weight<W, STOCHASTIC>(updated, number * uint(columns) + uint(column), key[0], key[1]);
  if (COMPENSATED) {
    new_rest[i] = acts ? adagrad_rest(updated, rounded) : rest[i];
  }
  new_weights[i] = acts ? rounded : w[i];
}
