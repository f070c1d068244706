// One row of a dense gradient with one accumulator a row, by one or more simdgroups of one threadgroup: the mean of g²
// over the row, then the row. V_MODE 0: v does not change, and is not written.
uint lane = thread_position_in_grid.x;
uint row = thread_position_in_grid.y;
ulong columns = 1;
for (int axis = 1; axis < w_ndim; ++axis) {
  columns *= ulong(w_shape[axis]);
}
long row_w = long(row) * w_strides[0], row_g = long(row) * g_strides[0];
AdagradScalars s = {lr, eps, weight_decay, scale, low, high, !GATED || apply};
float total = float(v[row * v_strides[0]]);
#ifndef V_MODE
// by a power of two first, which is exact: the sum may overflow where the mean does not
float power = 1.0f;
for (ulong p = 1; p < columns; p <<= 1) {
  power *= 2.0f;
}
float squares = 0.0f;
for (ulong column = lane; column < columns; column += threads_per_grid.x) {
  float weight = COUPLED ? float(w[row_w + adagrad_column(column, w_shape, w_strides, w_ndim)]) : 0.0f;
  float g_here = float(g[row_g + adagrad_column(column, w_shape, g_strides, w_ndim)]);
  float gradient = adagrad_gradient<MAXIMIZE, COUPLED, SCALED, CLIPPED>(weight, g_here, s);
  squares += gradient * gradient * (1.0f / power);
}
squares = simd_sum(squares);
threadgroup float sums[SIMDGROUPS];
if (SIMDGROUPS > 1) {
  if (lane % 32 == 0) {
    sums[lane / 32] = squares;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  squares = 0.0f;
  for (uint i = 0; i < SIMDGROUPS; ++i) {
    squares += sums[i];
  }
}
total += squares * (power / float(columns));
if (lane == 0) {
  new_accumulator[row] =
      s.apply ? static_cast<V>(adagrad_stopped<GUARDED, V>(total)) : static_cast<V>(v[row * v_strides[0]]);
}
#endif
for (ulong column = lane; column < columns; column += threads_per_grid.x) {
  long at_w = row_w + adagrad_column(column, w_shape, w_strides, w_ndim);
  W stored = w[at_w];
  float weight = float(stored);
  float g_here = float(g[row_g + adagrad_column(column, w_shape, g_strides, w_ndim)]);
  float gradient = adagrad_gradient<MAXIMIZE, COUPLED, SCALED, CLIPPED>(weight, g_here, s);
  float updated = adagrad_descend<DECOUPLED, EPS_INSIDE_SQRT, EPS_IS_ZERO, UPDATE_ACCUMULATOR>(
        weight, gradient, total, s);
  new_weights[ulong(row) * columns + column] =
      s.apply && adagrad_fits<GUARDED, W>(updated) ? static_cast<W>(updated) : stored;
}
