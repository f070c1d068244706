// One element of one row of a coalesced gradient: the sum of a run of equal indices, in fp32 and always in one order.
uint column = thread_position_in_grid.x;
uint row = thread_position_in_grid.y;
ulong columns = threads_per_grid.x;
int places = run_shape[0];
float sum = 0.0f;
for (int place = start[row]; place < places && run[place] == int(row); ++place) {
  sum += float(values[ulong(order[place]) * columns + column]);
}
sums[ulong(row) * columns + column] = sum;
