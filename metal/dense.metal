// One dense tensor: every thread updates N neighbouring elements of a row. Reads w, g, v once, where they lie, and
// writes w, v once, row after row; v not at all if it does not change (V_MODE 0).
uint column = thread_position_in_grid.x * N;
uint columns = uint(w_shape[w_ndim - 1]);
long across_w = w_strides[w_ndim - 1], across_g = g_strides[w_ndim - 1], across_v = v_strides[w_ndim - 1];
ulong blocks = adagrad_blocks(w_shape, w_ndim);
AdagradScalars s = {lr, eps, weight_decay, scale, low, high, !GATED || apply};
for (ulong block = thread_position_in_grid.z; block < blocks; block += threads_per_grid.z) {
  uint row = thread_position_in_grid.y;
  long at_w = adagrad_row(row, block, w_shape, w_strides, w_ndim) + column * across_w;
  long at_g = adagrad_row(row, block, w_shape, g_strides, w_ndim) + column * across_g;
  long at_v = adagrad_row(row, block, w_shape, v_strides, w_ndim) + column * across_v;
  ulong i = (block * threads_per_grid.y + row) * columns + column;
  for (uint k = 0; k < N && column + k < columns; ++k, ++i, at_w += across_w, at_g += across_g, at_v += across_v) {
    W stored = w[at_w];
    float weight = float(stored);
    float gradient = adagrad_gradient<MAXIMIZE, COUPLED, SCALED, CLIPPED>(weight, float(g[at_g]), s);
    float total = adagrad_accumulate<UPDATE_ACCUMULATOR>(float(v[at_v]), gradient);
    float updated = adagrad_descend<DECOUPLED, EPS_INSIDE_SQRT, EPS_IS_ZERO, UPDATE_ACCUMULATOR>(
        weight, gradient, total, s);
    new_weights[i] = s.apply && adagrad_fits<GUARDED, W>(updated) ? static_cast<W>(updated) : stored;
#ifndef V_MODE
    new_accumulator[i] = s.apply ? static_cast<V>(adagrad_stopped<GUARDED, V>(total)) : static_cast<V>(v[at_v]);
#endif
  }
}
