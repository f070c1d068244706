// One dense tensor: every thread updates N neighbouring elements. Reads w, g, v once, writes w, v once.
ulong first_element =
    (ulong(thread_position_in_grid.y) * threads_per_grid.x + thread_position_in_grid.x) * N;
ulong tensor_size = 1;
for (int d = 0; d < w_ndim; ++d) {
  tensor_size *= ulong(w_shape[d]);
}
AdagradScalars s = {
    scalars[0], scalars[1], scalars[2], scalars[3], scalars[4], scalars[5], !GATED || scalars[6] != 0.0f};
for (int k = 0; k < N; ++k) {
  ulong i = first_element + k;
  if (i < tensor_size) {
    float weight = float(w[i]);
    float accumulator = float(v[i]);
    float gradient = adagrad_gradient<MAXIMIZE, COUPLED, SCALED, CLIPPED>(weight, float(g[i]), s);
    float total = UPDATE_ACCUMULATOR ? accumulator + gradient * gradient : accumulator;
    float updated = adagrad_descend<DECOUPLED, EPS_INSIDE_SQRT, EPS_IS_ZERO>(weight, gradient, total, s);
    new_weights[i] = static_cast<W>(s.apply ? updated : weight);
    new_accumulator[i] = static_cast<V>(s.apply ? total : accumulator);
  }
}
