#include "predictive/kernels.hpp"

#include "native/simd.hpp"

namespace kvzip::predictive {

#if defined(KVZIP_X86) || defined(KVZIP_NEON)
namespace {

Kernels with(Kernels kernels, const Products& products) {
  kernels.products = products;
  return kernels;
}

}  // namespace
#endif

const Kernels& kernels() {
#ifdef KVZIP_X86
  static const Kernels amx =
      with(avx512_kernels(), {false, avx512_vnni_products.of_four, &amx_unit});
  static const Kernels vnni =
      with(avx2_kernels(), simd::has_avx_vnni() ? vnni_products : avx512_vnni_products);
  switch (simd::level()) {
    case simd::Level::amx: return simd::amx_is_allowed() ? amx : avx512_kernels();
    case simd::Level::avx512: return avx512_kernels();
    case simd::Level::vnni: return vnni;
    case simd::Level::avx2: return avx2_kernels();
    default: break;
  }
#endif
#ifdef KVZIP_NEON
  static const Kernels neon = simd::has_i8mm()      ? with(neon_kernels(), i8mm_products)
                              : simd::has_dotprod() ? with(neon_kernels(), dotprod_products)
                                                    : neon_kernels();
  if (simd::level() == simd::Level::neon) return neon;
#endif
  return scalar_kernels();
}

}  // namespace kvzip::predictive
