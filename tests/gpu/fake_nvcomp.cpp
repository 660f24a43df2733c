// An nvCOMP that is none, for tests without a GPU: the functions of nvCOMP 6.0 that decode, with
// the host's memory as the GPU's. Chunks are decoded by what the tests give it (`fake_decoder`).
// With a fake driver it puts its work into the stream, as the real one does; without one it does it
// at once.
//
// With REAL_HEADERS the declarations are NVIDIA's own, and compiling shows that ours are theirs.
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef REAL_HEADERS
#include "nvcomp.h"
#else
extern "C" {
typedef struct CUstream_st* cudaStream_t;
typedef enum nvcompStatus_t {
  nvcompSuccess = 0,
  nvcompErrorInvalidValue = 10,
  nvcompErrorCannotDecompress = 12
} nvcompStatus_t;
typedef enum nvcompType_t { NVCOMP_TYPE_CHAR = 0 } nvcompType_t;
typedef enum nvcompBitshuffleMode_t { NVCOMP_BITSHUFFLE_NONE = 0 } nvcompBitshuffleMode_t;
typedef enum nvcompDecompressBackend_t {
  NVCOMP_DECOMPRESS_BACKEND_DEFAULT = 0,
  NVCOMP_DECOMPRESS_BACKEND_CUDA = 2
} nvcompDecompressBackend_t;
typedef struct {
  uint32_t version, cudart_version;
} nvcompProperties_t;
typedef struct {
  size_t input, output, temp;
} nvcompAlignmentRequirements_t;
typedef struct {
  nvcompDecompressBackend_t backend;
  char reserved[60];
} nvcompBatchedZstdDecompressOpts_t;
typedef struct {
  nvcompDecompressBackend_t backend;
  int sort_before_hw_decompress;
  nvcompType_t data_type;
  nvcompBitshuffleMode_t bitshuffle_mode;
  char reserved[48];
} nvcompBatchedLZ4DecompressOpts_t;
}
#endif

#define API extern "C" __attribute__((visibility("default")))

namespace {

// Bytes that were written, -1 where the chunk cannot be decoded; or kNoStatus, and nothing is told.
constexpr long long kNoStatus = -2;
using Decode = long long (*)(int lz4, const void* from, size_t length, void* to, size_t room);
Decode decode;
uint32_t version = 6000;
size_t input_alignment = 1;
int next_status = 0;  // of the next calls that put work into a stream
size_t temporary_of_raw = 3;

void expect(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "fake nvCOMP: %s\n", what);
  std::abort();
}
bool zeros(const char* p, size_t n) {
  for (size_t i = 0; i < n; ++i)
    if (p[i]) return false;
  return true;
}
void check(const nvcompBatchedZstdDecompressOpts_t& o) {
  expect(o.backend == NVCOMP_DECOMPRESS_BACKEND_CUDA && zeros(o.reserved, sizeof o.reserved),
         "other options of Zstd");
}
void check(const nvcompBatchedLZ4DecompressOpts_t& o) {
  expect(o.backend == NVCOMP_DECOMPRESS_BACKEND_CUDA && !o.sort_before_hw_decompress &&
             o.data_type == NVCOMP_TYPE_CHAR && o.bitshuffle_mode == NVCOMP_BITSHUFFLE_NONE &&
             zeros(o.reserved, sizeof o.reserved),
         "other options of LZ4");
}

struct Call {
  int lz4;
  const void* const* from;
  const size_t *lengths, *rooms;
  size_t* written;
  size_t count;
  unsigned char* temporary;
  size_t temporary_bytes;
  void* const* to;
  nvcompStatus_t* statuses;
};
void run(void* handle) {
  const Call* call = static_cast<Call*>(handle);
  size_t largest = 0, total = 0;
  for (size_t i = 0; i < call->count; ++i) {
    largest = call->rooms[i] > largest ? call->rooms[i] : largest;
    total += call->rooms[i];
  }
  expect(call->temporary_bytes == temporary_of_raw * total + largest + call->count,
         "another scratch than was asked for");
  expect(reinterpret_cast<uintptr_t>(call->temporary) % 8 == 0, "scratch that is not aligned");
  std::memset(call->temporary, 0xEE, call->temporary_bytes);
  for (size_t i = 0; i < call->count; ++i) {
    expect(call->lengths[i] && call->rooms[i], "an empty chunk");
    expect(reinterpret_cast<uintptr_t>(call->from[i]) % input_alignment == 0,
           "a chunk that is not aligned");
    expect(reinterpret_cast<uintptr_t>(call->to[i]) % 8 == 0, "a target that is not aligned");
    const long long got =
        decode(call->lz4, call->from[i], call->lengths[i], call->to[i], call->rooms[i]);
    call->written[i] = got < 0 ? call->rooms[i] : size_t(got);
    if (got == kNoStatus) continue;
    call->statuses[i] = got < 0 ? nvcompErrorCannotDecompress : nvcompSuccess;
  }
}

template <typename Options>
nvcompStatus_t aligned(const Options& options, nvcompAlignmentRequirements_t* out) {
  check(options);
  *out = {input_alignment, 1, 8};
  return nvcompSuccess;
}
template <typename Options>
nvcompStatus_t temporary(size_t count, size_t largest, const Options& options, size_t* bytes,
                         size_t total) {
  check(options);
  *bytes = temporary_of_raw * total + largest + count;
  return nvcompSuccess;
}
template <typename Options>
nvcompStatus_t decompress(Call call, const Options& options, cudaStream_t stream) {
  check(options);
  if (next_status) return nvcompStatus_t(next_status);
  auto* kept = new Call(call);  // it may run again
  if (const char* driver = std::getenv("KVZIP_FAKE_DRIVER")) {
    using Host = int (*)(void*, void (*)(void*), void*);
    static const auto put =
        reinterpret_cast<Host>(dlsym(dlopen(driver, RTLD_NOW), "cuLaunchHostFunc"));
    expect(!put(stream, run, kept), "the driver does not take it");
  } else {
    expect(!stream, "a stream without a driver");
    run(kept);
  }
  return nvcompSuccess;
}

}  // namespace

API void fake_decoder(Decode given) { decode = given; }
API void fake_settings(uint32_t v, size_t alignment, int status) {
  version = v;
  input_alignment = alignment;
  next_status = status;
}

API nvcompStatus_t nvcompGetProperties(nvcompProperties_t* out) {
  if (!out) return nvcompErrorInvalidValue;
  return *out = {version, 13000}, nvcompSuccess;
}
API const char* nvcompGetStatusString(nvcompStatus_t status) {
  return status == nvcompSuccess ? "well" : "not well";
}

#define KVZIP_FORM(Name, lz4)                                                                     \
  API nvcompStatus_t nvcompBatched##Name##DecompressGetRequiredAlignments(                        \
      nvcompBatched##Name##DecompressOpts_t options, nvcompAlignmentRequirements_t* out) {        \
    return aligned(options, out);                                                                 \
  }                                                                                               \
  API nvcompStatus_t nvcompBatched##Name##DecompressGetTempSize(                                  \
      size_t count, size_t largest, nvcompBatched##Name##DecompressOpts_t options, size_t* bytes, \
      size_t total, cudaStream_t) {                                                               \
    return temporary(count, largest, options, bytes, total);                                      \
  }                                                                                               \
  API nvcompStatus_t nvcompBatched##Name##DecompressAsync(                                        \
      const void* const* from, const size_t* lengths, const size_t* rooms, size_t* written,       \
      size_t count, void* const scratch, size_t scratch_bytes, void* const* to,                   \
      nvcompBatched##Name##DecompressOpts_t options, nvcompStatus_t* statuses,                    \
      cudaStream_t stream) {                                                                      \
    return decompress({lz4, from, lengths, rooms, written, count,                                 \
                       static_cast<unsigned char*>(scratch), scratch_bytes, to, statuses},        \
                      options, stream);                                                           \
  }
KVZIP_FORM(LZ4, 1)
KVZIP_FORM(Zstd, 0)

// What kvzip/codecs/native/cuda/nvcomp.py takes the structs to be.
#define KVZIP_LAYOUT(type, ...) API const size_t layout_##type[] = {sizeof(type), __VA_ARGS__}
KVZIP_LAYOUT(nvcompProperties_t, offsetof(nvcompProperties_t, version),
             offsetof(nvcompProperties_t, cudart_version));
KVZIP_LAYOUT(nvcompAlignmentRequirements_t, offsetof(nvcompAlignmentRequirements_t, input),
             offsetof(nvcompAlignmentRequirements_t, output),
             offsetof(nvcompAlignmentRequirements_t, temp));
KVZIP_LAYOUT(nvcompBatchedZstdDecompressOpts_t,
             offsetof(nvcompBatchedZstdDecompressOpts_t, backend),
             offsetof(nvcompBatchedZstdDecompressOpts_t, reserved));
KVZIP_LAYOUT(nvcompBatchedLZ4DecompressOpts_t, offsetof(nvcompBatchedLZ4DecompressOpts_t, backend),
             offsetof(nvcompBatchedLZ4DecompressOpts_t, sort_before_hw_decompress),
             offsetof(nvcompBatchedLZ4DecompressOpts_t, data_type),
             offsetof(nvcompBatchedLZ4DecompressOpts_t, bitshuffle_mode),
             offsetof(nvcompBatchedLZ4DecompressOpts_t, reserved));
#ifdef REAL_HEADERS
API const size_t real_limits[] = {NVCOMP_VER, nvcompLZ4DecompressionMaxAllowedChunkSize,
                                  nvcompZstdDecompressionMaxAllowedChunkSize,
                                  NVCOMP_DECOMPRESS_BACKEND_CUDA, nvcompSuccess};
#endif
