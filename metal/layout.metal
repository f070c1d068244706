// Where the elements of a strided array lie. An array of any number of axes is a grid: its last axis runs along x, the
// one before it along y, all others, as one, along z; so at most three axes take no division.

// Where row y of block z begins, in elements from the start of the array.
inline long adagrad_row(
    uint y, ulong z, constant const int* shape, constant const int64_t* strides, int ndim) {
  long at = ndim > 1 ? long(y) * strides[ndim - 2] : 0;
  for (int axis = ndim - 3; axis > 0; --axis) {
    at += long(z % ulong(shape[axis])) * strides[axis];
    z /= ulong(shape[axis]);
  }
  return ndim > 2 ? at + long(z) * strides[0] : at;
}

// How many blocks there are: the product of all axes but the last two.
inline ulong adagrad_blocks(constant const int* shape, int ndim) {
  ulong blocks = 1;
  for (int axis = 0; axis < ndim - 2; ++axis) {
    blocks *= ulong(shape[axis]);
  }
  return blocks;
}

// Where element i of one row of a table lies, the axes behind the first taken as one.
inline long adagrad_column(
    ulong i, constant const int* shape, constant const int64_t* strides, int ndim) {
  long at = 0;
  for (int axis = ndim - 1; axis > 1; --axis) {
    at += long(i % ulong(shape[axis])) * strides[axis];
    i /= ulong(shape[axis]);
  }
  return at + long(i) * strides[1];
}
