// Products of small integers: of four bytes, and of matrices on the tensor cores.
#pragma once

#include "native/cuda/device.cuh"

namespace kvzip::cuda {

#ifdef __CUDACC__
// sum + the products of four signed bytes each.
KVZIP_DEVICE int dot4(unsigned a, unsigned b, int sum) { return __dp4a(int(a), int(b), sum); }
// Adds to a number in shared memory, whoever else does.
KVZIP_DEVICE void add_shared(int* to, int v) { atomicAdd(to, v); }
// d + a b, which the warp holds together: a has 16 rows and 32 columns of signed bytes, b 32 rows
// and 8 columns, d 16 rows and 8 columns. With g = thread / 4 and q = thread % 4, a thread holds
//   a[0], a[1]  row g and row g + 8, columns 4q ... 4q + 3
//   a[2], a[3]  the same rows, columns 16 + 4q ...
//   b0, b1      column g, rows 4q ... and rows 16 + 4q ...
//   d[0], d[1]  row g, columns 2q and 2q + 1
//   d[2], d[3]  row g + 8, the same columns
KVZIP_DEVICE void multiply_add(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#else
inline int dot4(unsigned a, unsigned b, int sum) {
  for (int i = 0; i < 32; i += 8)
    sum = int(unsigned(sum) + unsigned(int(std::int8_t(a >> i)) * int(std::int8_t(b >> i))));
  return sum;
}
inline void add_shared(int* to, int v) { *to += v; }
struct Operands {
  unsigned a[4], b[2];
};
inline void multiply_add(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const Operands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto* all = shim::meet("multiply_add", reinterpret_cast<std::uintptr_t>(&mine));
  const auto of = [&](unsigned lane) { return reinterpret_cast<const Operands*>(all[lane]); };
  const unsigned g = thread() % kWarp / 4, q = thread() % 4;
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned k = 0; k < 8; ++k)  // columns of a, four at a time
      d[i] = dot4(of(4 * g + k % 4)->a[i / 2 + k / 4 * 2],
                  of(4 * (2 * q + i % 2) + k % 4)->b[k / 4], d[i]);
  shim::meet("multiply_add", 0);  // all have looked at each other's operands
}
#endif

}  // namespace kvzip::cuda
