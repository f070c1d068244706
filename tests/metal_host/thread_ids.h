// What Metal tells a thread about its place. Each field bears the name of the Metal attribute that it answers.
// Read by the runner (C++) and by the entry point of the kernel (C++ for OpenCL).
#pragma once

struct HostIds {
  unsigned dispatch_quadgroups_per_threadgroup[3];
  unsigned dispatch_simdgroups_per_threadgroup[3];
  unsigned dispatch_threads_per_threadgroup[3];
  unsigned grid_origin[3];
  unsigned grid_size[3];
  unsigned quadgroup_index_in_threadgroup[3];
  unsigned quadgroups_per_threadgroup[3];
  unsigned simdgroup_index_in_threadgroup[3];
  unsigned simdgroups_per_threadgroup[3];
  unsigned thread_execution_width[3];
  unsigned thread_index_in_quadgroup[3];
  unsigned thread_index_in_simdgroup[3];
  unsigned thread_index_in_threadgroup[3];
  unsigned thread_position_in_grid[3];
  unsigned thread_position_in_threadgroup[3];
  unsigned threadgroup_position_in_grid[3];
  unsigned threadgroups_per_grid[3];
  unsigned threads_per_grid[3];
  unsigned threads_per_simdgroup[3];
  unsigned threads_per_threadgroup[3];
};
