// The rows that a gradient names, in the order that sorts their indices: the sum of each run of equal indices, in fp32
// and always in one order, at the place of its first member, the head; there too g² of that sum, or its mean over the
// row. All other places hold 0, and -0.0f to be added to a row of their own run; indices that name no row come last and
// go with the first run. V_MODE: 0 leaves v alone, 1 is to add to v, 2 makes new rows of a v in half precision.
// w_rows, v_rows: the rows of w and v for each index in its own order; one unread element where nobody needs them.
#define ADAGRAD_ID(p) long(indices[long(order[p]) * indices_strides[0]])
#define ADAGRAD_NAMED(id) ((id) >= 0 && (id) < long(rows))
#define ADAGRAD_VALUE(p, c) float(values[long(order[p]) * values_strides[0] + long(c) * values_strides[1]])
uint lane = thread_position_in_threadgroup.x, lanes = threads_per_threadgroup.x;
uint member = thread_position_in_threadgroup.y, members = threads_per_threadgroup.y;
uint place = thread_position_in_grid.y, places = threads_per_grid.y, columns = uint(values_shape[1]);
uint first = place - member, last = first + members - 1; // places of this threadgroup
long id = ADAGRAD_ID(place), last_id = ADAGRAD_ID(last);
bool named = ADAGRAD_NAMED(id);
bool head = named && (place == 0 || ADAGRAD_ID(place - 1) != id);
AdagradScalars s = {lr, eps, weight_decay, scale, low, high, !GATED || apply};

// A run that begins in this threadgroup and goes on behind it: its members there are shared out among the threads of a
// column, so that no thread reads more than its share however often an index comes.
uint end = last + 1;
if (end < places && ADAGRAD_NAMED(last_id) && ADAGRAD_ID(end) == last_id &&
    (first == 0 || ADAGRAD_ID(first - 1) != last_id)) {
  uint above = places;
  while (above - end > 1) {
    uint middle = end + (above - end) / 2;
    if (ADAGRAD_ID(middle) == last_id) {
      end = middle;
    } else {
      above = middle;
    }
  }
  end = above;
}
bool goes_on = end > last + 1;

threadgroup float shared[256];
ulong origin = order[place];
float squares = 0.0f;
for (uint base = 0; base < columns; base += threads_per_grid.x) {
  uint column = base + thread_position_in_grid.x;
  bool inside = column < columns;
  if (goes_on) {
    float share = 0.0f;
    for (uint p = last + 1 + member; inside && p < end; p += members) {
      share += ADAGRAD_VALUE(p, column);
    }
    shared[member * lanes + lane] = share;
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  float sum = 0.0f;
  for (uint p = place; inside && head && p <= last && ADAGRAD_ID(p) == id; ++p) {
    sum += ADAGRAD_VALUE(p, column);
  }
  if (goes_on) {
    for (uint m = 0; head && id == last_id && m < members; ++m) {
      sum += shared[m * lanes + lane];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (inside) {
    float weight = COUPLED && head ? float(w_rows[origin * columns + column]) : 0.0f;
    float gradient = adagrad_gradient<MAXIMIZE, COUPLED, SCALED, CLIPPED>(weight, sum, s);
    ulong i = ulong(place) * columns + column;
    sums[i] = sum;
    if (ROW_WISE) {
      squares += head ? gradient * gradient : 0.0f;
    }
#if V_MODE == 1
    else {
      new_v[i] = head && s.apply ? gradient * gradient : -0.0f;
    }
#elif V_MODE == 2
    else {
      V stored = v_rows[origin * columns + column];
      float before = float(stored);
      total_v[i] = head && s.apply ? before + gradient * gradient : before;
      new_v[i] = head && s.apply ? static_cast<V>(total_v[i]) : stored;
    }
#endif
  }
}
#if V_MODE > 0
if (ROW_WISE) {
  shared[member * lanes + lane] = squares;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) {
    float total = 0.0f;
    for (uint l = 0; l < lanes; ++l) {
      total += shared[member * lanes + l];
    }
    float mean = total / float(columns);
#if V_MODE == 1
    new_v[place] = head && s.apply ? mean : -0.0f;
#else
    V stored = v_rows[origin];
    float before = float(stored);
    total_v[place] = head && s.apply ? before + mean : before;
    new_v[place] = head && s.apply ? static_cast<V>(total_v[place]) : stored;
#endif
  }
}
#endif
if (thread_position_in_grid.x == 0) {
  uint begin = place; // of the run of this place
  for (uint below = 0; named && !head && below < begin;) {
    uint middle = below + (begin - below) / 2;
    if (ADAGRAD_ID(middle) == id) {
      begin = middle;
    } else {
      below = middle + 1;
    }
  }
  long first_id = ADAGRAD_ID(0);
  heads[place] = named ? int(begin) : 0;
  is_head[place] = head;
  targets[place] = named ? int(id) : ADAGRAD_NAMED(first_id) ? int(first_id) : 0;
}
