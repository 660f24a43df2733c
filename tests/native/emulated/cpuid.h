// A program whose instructions are emulated is told that the processor has all, and that the system
// keeps their registers.
#pragma once
#pragma GCC system_header
#include_next <cpuid.h>

#include <immintrin.h>

namespace emulated {

inline int all_there(unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
  *a = *b = *c = *d = ~0u;
  return 1;
}

}  // namespace emulated

#define __get_cpuid_count(leaf, subleaf, a, b, c, d) emulated::all_there(a, b, c, d)
#define _xgetbv(of) ~0u
