// One row of a dense gradient with one accumulator a row, by one simdgroup: the mean of g² over the row, then the row.
uint lane = thread_position_in_grid.x;
uint row = thread_position_in_grid.y;
uint columns = w_shape[1];
AdagradScalars s = {
    scalars[0], scalars[1], scalars[2], scalars[3], scalars[4], scalars[5], !GATED || scalars[6] != 0.0f};
float squares = 0.0f;
for (uint column = lane; column < columns; column += threads_per_grid.x) {
  ulong i = ulong(row) * columns + column;
  float gradient = adagrad_gradient<MAXIMIZE, COUPLED, SCALED, CLIPPED>(float(w[i]), float(g[i]), s);
  squares += gradient * gradient;
}
float accumulator = float(v[row]);
float total = UPDATE_ACCUMULATOR ? accumulator + simd_sum(squares) / columns : accumulator;
if (lane == 0) {
  new_accumulator[row] = static_cast<V>(s.apply ? total : accumulator);
}
for (uint column = lane; column < columns; column += threads_per_grid.x) {
  ulong i = ulong(row) * columns + column;
  float weight = float(w[i]);
  float gradient = adagrad_gradient<MAXIMIZE, COUPLED, SCALED, CLIPPED>(weight, float(g[i]), s);
  float updated = adagrad_descend<DECOUPLED, EPS_INSIDE_SQRT, EPS_IS_ZERO>(weight, gradient, total, s);
  new_weights[i] = static_cast<W>(s.apply ? updated : weight);
}
