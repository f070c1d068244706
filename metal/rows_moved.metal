// One element of one touched row: what is added to the weight (ADD_W), or the new weight in half precision, given an
// accumulator that has grown already, in whose row targets[row] it stands. The table itself is not read: one with a reader is copied when it is written.
// w_rows: its rows, one unread element where nobody needs them. Adding -0.0f to a table changes no bit.
uint column = thread_position_in_grid.x;
uint row = thread_position_in_grid.y;
ulong columns = threads_per_grid.x;
ulong i = row * columns + column;
ulong target = targets[row];
AdagradScalars s = {lr, eps, weight_decay, scale, low, high, !GATED || apply};
float weight = COUPLED || DECOUPLED || !ADD_W ? float(w_rows[i]) : 0.0f;
float accumulator = float(v[ROW_WISE ? target : target * columns + column]);
float gradient = adagrad_gradient<MAXIMIZE, COUPLED, SCALED, CLIPPED>(weight, g[i], s);
float updated = adagrad_descend<DECOUPLED, EPS_INSIDE_SQRT, EPS_IS_ZERO>(weight, gradient, accumulator, s);
bool acts = live[row] && s.apply;
if (ADD_W) {
  moved[i] = static_cast<W>(acts ? updated - weight : -0.0f);
} else {
  moved[i] = static_cast<W>(acts ? updated : weight);
}
