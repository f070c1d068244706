// One element of a row at one place of rows_accumulate: what is added to the weight (ADD_W), -0.0f but at heads; or the
// new weight in half precision, the same at all places of a run. The table itself is not read: one with a reader would
// be copied when it is written. V_AT_HEAD: v holds new rows at the places of heads, else it is the table.
uint column = thread_position_in_grid.x;
uint place = thread_position_in_grid.y;
ulong columns = threads_per_grid.x;
uint head = uint(heads[place]);
bool acts = ADD_W ? is_head[place] : is_head[head];
AdagradScalars s = {lr, eps, weight_decay, scale, low, high, !GATED || apply};
acts = acts && s.apply;
ulong i = place * columns + column, origin = ulong(order[head]) * columns + column;
float updated = 0.0f, weight = 0.0f;
if (acts) {
  ulong row = V_AT_HEAD ? head : uint(targets[place]);
  float accumulator = float(v[ROW_WISE ? row : row * columns + column]);
  weight = COUPLED || DECOUPLED || !ADD_W ? float(w_rows[origin]) : 0.0f;
  float gradient = adagrad_gradient<MAXIMIZE, COUPLED, SCALED, CLIPPED>(weight, g[head * columns + column], s);
  updated = adagrad_descend<DECOUPLED, EPS_INSIDE_SQRT, EPS_IS_ZERO, UPDATE_ACCUMULATOR>(
        weight, gradient, accumulator, s);
}
if (ADD_W) {
  new_w[i] = static_cast<W>(acts ? updated - weight : -0.0f);
} else {
  W stored = w_rows[origin];
  new_w[i] = acts ? static_cast<W>(updated) : stored;
}
