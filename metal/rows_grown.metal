// One row of a coalesced gradient, by one simdgroup: g² or its mean over the row, to be added to the accumulator (ADD_V)
// or added here to the rows of an accumulator in half precision, not rounded yet. Adding -0.0f to a table changes no bit.
// w_rows, v_rows: one unread element where nobody needs them.
uint lane = thread_position_in_grid.x;
uint row = thread_position_in_grid.y;
uint columns = g_shape[1];
AdagradScalars s = {lr, eps, weight_decay, scale, low, high, !GATED || apply};
bool acts = live[row] && s.apply;
float total = 0.0f;
for (uint column = lane; column < columns; column += threads_per_grid.x) {
  ulong i = ulong(row) * columns + column;
  float gradient = adagrad_gradient<MAXIMIZE, COUPLED, SCALED, CLIPPED>(COUPLED ? float(w_rows[i]) : 0.0f, g[i], s);
  float square = gradient * gradient;
  if (ROW_WISE) {
    total += square;
  } else {
    float before = ADD_V ? -0.0f : float(v_rows[i]);
    grown[i] = acts ? before + square : before;
  }
}
if (ROW_WISE) {
  total = simd_sum(total);
  if (lane == 0) {
    float before = ADD_V ? -0.0f : float(v_rows[row]);
    grown[row] = acts ? before + total / columns : before;
  }
}
