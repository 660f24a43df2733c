#include "predictive/kernels.hpp"

#include "native/simd.hpp"

namespace kvzip::predictive {

const Kernels& kernels() {
#ifdef KVZIP_X86
  if (simd::level() == simd::Level::avx512) return avx512_kernels();
  if (simd::level() == simd::Level::avx2) return avx2_kernels();
#endif
  return scalar_kernels();
}

}  // namespace kvzip::predictive
