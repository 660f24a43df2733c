// What kernels use of a GPU, in one place: by CUDA's own means when nvcc or NVRTC compiles them, by
// the shim's on a CPU. All threads of a warp take part in every meeting.
#pragma once

#include "native/cuda/device_part.hpp"

#ifdef __CUDACC__
#define KVZIP_DEVICE __device__ __forceinline__
#define KVZIP_DEVICE_CALL __device__ __noinline__
#define KVZIP_KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#else
#include "native/cuda/shim.hpp"
#define KVZIP_DEVICE inline
#define KVZIP_DEVICE_CALL inline
#define KVZIP_KERNEL(threads, blocks) inline void
#endif

namespace kvzip::cuda {

constexpr unsigned kWarp = 32;

#ifdef __CUDACC__
constexpr unsigned kAll = 0xFFFFFFFFu;
KVZIP_DEVICE unsigned thread() { return threadIdx.x; }
KVZIP_DEVICE unsigned block() { return blockIdx.x; }
KVZIP_DEVICE unsigned threads_of_block() { return blockDim.x; }
KVZIP_DEVICE unsigned shuffle(unsigned v, unsigned lane) { return __shfl_sync(kAll, v, int(lane)); }
KVZIP_DEVICE unsigned shuffle_xor(unsigned v, unsigned lane) {
  return __shfl_xor_sync(kAll, v, int(lane));
}
KVZIP_DEVICE unsigned ballot(bool v) { return __ballot_sync(kAll, v); }
KVZIP_DEVICE bool any(bool v) { return __any_sync(kAll, v); }
KVZIP_DEVICE void sync_warp() { __syncwarp(); }
KVZIP_DEVICE void sync_block() { __syncthreads(); }
KVZIP_DEVICE unsigned ones(unsigned v) { return unsigned(__popc(v)); }
KVZIP_DEVICE unsigned high_product(unsigned a, unsigned b) { return __umulhi(a, b); }
KVZIP_DEVICE unsigned bytes_of(unsigned a, unsigned b, unsigned which) {
  return __byte_perm(a, b, which);
}
KVZIP_DEVICE void set_flag(uint32_t* flag) { atomicOr(flag, 1u); }
// Adds to a number, and gives what it was before.
KVZIP_DEVICE unsigned fetch_add(uint32_t* number, unsigned more) { return atomicAdd(number, more); }
// Steps of IEEE 754, each rounded once, to the nearest. A product is never -0.
KVZIP_DEVICE float product(float a, float b) { return __fmaf_rn(a, b, 0.0f); }
// As a CPU has it: -0, too.
KVZIP_DEVICE float signed_product(float a, float b) { return __fmul_rn(a, b); }
KVZIP_DEVICE float quotient(float a, float b) { return __fdiv_rn(a, b); }
KVZIP_DEVICE float sum(float a, float b) { return __fadd_rn(a, b); }
KVZIP_DEVICE float difference(float a, float b) { return __fsub_rn(a, b); }
KVZIP_DEVICE float as_float(unsigned bits) { return __uint_as_float(bits); }
KVZIP_DEVICE unsigned bits_of(float v) { return __float_as_uint(v); }
// The same of two numbers of bf16 in a word.
KVZIP_DEVICE unsigned bf16_fma(unsigned a, unsigned b, unsigned c) {
  unsigned v;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
  return v;
}
KVZIP_DEVICE unsigned bf16_products(unsigned a, unsigned b) { return bf16_fma(a, b, 0); }
KVZIP_DEVICE unsigned bf16_sums(unsigned a, unsigned b) { return bf16_fma(a, 0x3F803F80u, b); }
KVZIP_DEVICE unsigned bf16_differences(unsigned a, unsigned b) {
  return bf16_fma(b, 0xBF80BF80u, a);
}
KVZIP_DEVICE unsigned to_bf16(float lower, float upper) {
  unsigned v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(upper), "f"(lower));
  return v;
}
// The dynamic shared memory of the block.
KVZIP_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char room[];
  return room;
}
// What no kernel writes while this one runs.
template <typename V>
KVZIP_DEVICE V constant(const V* p) {
  return __ldg(p);
}
// Stores that are read by nobody here.
template <typename V>
KVZIP_DEVICE void stream(V* p, V v) {
  __stcs(p, v);
}
// Into the second-level cache.
KVZIP_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
// 16 bytes to shared memory, of which the first `there` (0 to 16) come from `from` and the rest are
// zeros; they land at the wait for their group.
KVZIP_DEVICE void copy16(void* to, const void* from, unsigned there) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(unsigned(__cvta_generic_to_shared(to))),
      "l"(from), "r"(there)
      : "memory");
}
KVZIP_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `N` groups of this thread's are under way.
template <int N>
KVZIP_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#else
inline unsigned thread() { return shim::state().current->thread.x; }
inline unsigned block() { return shim::state().block_index.x; }
inline unsigned threads_of_block() { return shim::state().block_dim.x; }
inline unsigned shuffle(unsigned v, unsigned lane) {
  return unsigned(shim::meet("shuffle", v)[lane % kWarp]);
}
inline unsigned shuffle_xor(unsigned v, unsigned lane) {
  const unsigned own = thread() % kWarp;
  return unsigned(shim::meet("shuffle_xor", v)[(own ^ lane) % kWarp]);
}
inline unsigned ballot(bool v) {
  const auto* all = shim::meet("ballot", v);
  unsigned votes = 0;
  for (unsigned i = 0; i < kWarp; ++i) votes |= unsigned(all[i] != 0) << i;
  return votes;
}
inline bool any(bool v) { return ballot(v) != 0; }
inline void sync_warp() { shim::meet("sync", 0); }
inline void sync_block() { shim::meet_block(); }
inline unsigned ones(unsigned v) { return unsigned(__builtin_popcount(v)); }
inline unsigned high_product(unsigned a, unsigned b) {
  return unsigned(std::uint64_t(a) * b >> 32);
}
inline unsigned bytes_of(unsigned a, unsigned b, unsigned which) {
  const std::uint64_t all = std::uint64_t(b) << 32 | a;
  unsigned v = 0;
  for (int i = 0; i < 4; ++i) v |= unsigned(all >> 8 * (which >> 4 * i & 7) & 0xFF) << 8 * i;
  return v;
}
inline void set_flag(uint32_t* flag) { *flag |= 1; }
inline unsigned fetch_add(uint32_t* number, unsigned more) {
  const unsigned before = *number;
  *number += more;
  return before;
}
inline float product(float a, float b) { return a * b + 0.0f; }
inline float signed_product(float a, float b) { return a * b; }
inline float quotient(float a, float b) { return a / b; }
inline float sum(float a, float b) { return a + b; }
inline float difference(float a, float b) { return a - b; }
inline float as_float(unsigned bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
inline unsigned bits_of(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline unsigned to_bf16(float v) {
  const unsigned bits = bits_of(v);
  return v != v ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline unsigned to_bf16(float lower, float upper) { return to_bf16(lower) | to_bf16(upper) << 16; }
// fp32 holds products of bf16, and sums as far as it matters when they are rounded again.
template <typename Step>
inline unsigned bf16_each(unsigned a, unsigned b, Step step) {
  return to_bf16(step(as_float(a << 16), as_float(b << 16)),
                 step(as_float(a & 0xFFFF0000u), as_float(b & 0xFFFF0000u)));
}
inline unsigned bf16_products(unsigned a, unsigned b) { return bf16_each(a, b, product); }
inline unsigned bf16_sums(unsigned a, unsigned b) { return bf16_each(a, b, sum); }
inline unsigned bf16_differences(unsigned a, unsigned b) { return bf16_each(a, b, difference); }
inline unsigned char* shared_memory() { return shim::state().shared; }
template <typename V>
inline V constant(const V* p) {
  if (reinterpret_cast<std::uintptr_t>(p) % sizeof(V)) shim::fail("a load that is not aligned");
  return *p;
}
template <typename V>
inline void stream(V* p, V v) {
  if (reinterpret_cast<std::uintptr_t>(p) % sizeof(V)) shim::fail("a store that is not aligned");
  *p = v;
}
inline void prefetch(const void*) {}
inline void copy16(void* to, const void* from, unsigned there) {
  if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) % 16)
    shim::fail("a copy that is not aligned");
  shim::PendingCopy copy{static_cast<unsigned char*>(to), {}};
  std::memcpy(copy.bytes, from, there);
  std::memset(to, 0xA5, 16);
  shim::state().current->groups.back().push_back(copy);
}
inline void commit_copies() { shim::state().current->groups.emplace_back(); }
template <int N>
inline void wait_copies() {
  auto& groups = shim::state().current->groups;  // the last is not committed yet
  while (groups.size() > N + 1) {
    for (const auto& copy : groups.front()) std::memcpy(copy.to, copy.bytes, 16);
    groups.erase(groups.begin());
  }
}
#endif

// Vectors that are loaded and stored at once.
struct alignas(8) Two {
  unsigned v[2];
};
struct alignas(16) Four {
  unsigned v[4];
};

#ifdef __CUDACC__
KVZIP_DEVICE Two constant(const Two* p) {
  const uint2 a = __ldg(reinterpret_cast<const uint2*>(p));
  return {{a.x, a.y}};
}
KVZIP_DEVICE Four constant(const Four* p) {
  const uint4 a = __ldg(reinterpret_cast<const uint4*>(p));
  return {{a.x, a.y, a.z, a.w}};
}
KVZIP_DEVICE void stream(Two* p, Two v) {
  __stcs(reinterpret_cast<uint2*>(p), make_uint2(v.v[0], v.v[1]));
}
KVZIP_DEVICE void stream(Four* p, Four v) {
  __stcs(reinterpret_cast<uint4*>(p), make_uint4(v.v[0], v.v[1], v.v[2], v.v[3]));
}
#endif

}  // namespace kvzip::cuda
