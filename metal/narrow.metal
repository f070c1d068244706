// One dense tensor, or some rows of a table (ROWS), whose weights or accumulator are rounded with care; else as
// dense.metal. The number of an element in the whole tensor is what its random bits depend on.
uint column = thread_position_in_grid.x * N;
uint columns = uint(w_shape[w_ndim - 1]);
long across_w = w_strides[w_ndim - 1], across_g = g_strides[w_ndim - 1];
long across_v = v_strides[w_ndim - 1], across_rest = rest_strides[w_ndim - 1];
ulong blocks = adagrad_blocks(w_shape, w_ndim);
AdagradScalars s = {lr, eps, weight_decay, scale, low, high, !GATED || apply};
uint row = thread_position_in_grid.y;
bool acts = s.apply && (!ROWS || live[row] != 0);
for (ulong block = thread_position_in_grid.z; block < blocks; block += threads_per_grid.z) {
  long at_w = adagrad_row(row, block, w_shape, w_strides, w_ndim) + column * across_w;
  long at_g = adagrad_row(row, block, w_shape, g_strides, w_ndim) + column * across_g;
  long at_v = adagrad_row(row, block, w_shape, v_strides, w_ndim) + column * across_v;
  long at_rest = adagrad_row(row, block, w_shape, rest_strides, w_ndim) + column * across_rest;
  ulong i = (block * threads_per_grid.y + row) * columns + column;
  uint number = ROWS ? uint(targets[row]) * columns + column : uint(i);
  for (uint k = 0; k < N && column + k < columns; ++k, ++i, ++number) {
    float weight = COMPENSATED ? float(w[at_w]) + float(rest[at_rest]) : float(w[at_w]);
    float gradient = adagrad_gradient<MAXIMIZE, COUPLED, SCALED, CLIPPED>(weight, float(g[at_g]), s);
    float total = adagrad_accumulate<UPDATE_ACCUMULATOR>(float(v[at_v]), gradient);
    float updated = adagrad_descend<DECOUPLED, EPS_INSIDE_SQRT, EPS_IS_ZERO, UPDATE_ACCUMULATOR>(
        weight, gradient, total, s);
    W rounded = adagrad_weight<W, STOCHASTIC>(updated, number, key[0], key[1]);
    if (COMPENSATED) {
      new_rest[i] = acts ? adagrad_rest(updated, rounded) : rest[at_rest];
    }
    new_weights[i] = acts ? rounded : w[at_w];
    new_accumulator[i] = acts ? adagrad_weight<V, RANDOM_V>(total, number, key[2], key[3]) : static_cast<V>(v[at_v]);
    at_w += across_w;
    at_g += across_g;
    at_v += across_v;
    at_rest += across_rest;
  }
}
