// Grids: numbers of a wide format that are a code of a narrow format times a scale, rounded.
// The arithmetic is in kvzip/grids/spec.md. Kernels allocate at most a group's numbers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvzip::grid {

// A format of 16 or 32 bits: sign, exponent, and `precision` - 1 bits of the significand.
struct Wide {
  int precision;
  int bias;  // of the exponent field
  int bits;
};

// A format of 4 or 8 bits whose magnitudes, in its smallest step 2^-step, are integers.
struct Narrow {
  const char* name;
  int mantissa;  // bits of the significand that are stored
  int step;
  int sign;      // position of the sign bit
  int largest;   // code of the largest magnitude
  int infinity;  // code of infinity, or -1
  int nan;       // the one code that is NaN and has the sign bit set (fnuz), or -1
  bool integer;  // in two's complement
};

// nullptr for a name that is not known.
const Wide* find_wide(const char* name);
const Narrow* find_narrow(const char* name);

// How a product becomes a wide number: rounded once, or to fp32 and then again.
enum class Rounding { once, through_fp32 };

// A scale is significand * 2^exponent, with a significand of 24 bits of which the first is set.
struct Scale {
  std::uint32_t significand;
  std::int32_t exponent;
};

// Scales as they are stored. `read` is false for what is no positive, normal, finite number.
enum class ScaleFormat { e8m0, bf16, fp32 };
bool read(ScaleFormat format, std::uint32_t bits, Scale& scale);

// [rows, tokens, channels]; a scale holds for group_tokens * group_channels numbers of a row.
struct Shape {
  std::size_t rows, tokens, channels;
  std::size_t group_tokens, group_channels;

  std::size_t scale_rows() const { return tokens ? (tokens - 1) / group_tokens + 1 : 0; }
  std::size_t scale_columns() const { return channels ? (channels - 1) / group_channels + 1 : 0; }
};

// Widens `shape`'s codes to `out`, whose rows and tokens are so many numbers apart. The codes'
// first token is token `first_token` of the part that `scales`, [rows, scale_rows of the part,
// scale_columns], belong to.
template <typename T>
void widen(const Wide& wide, const Narrow& narrow, Rounding rounding, const Shape& shape,
           const std::uint8_t* codes, const Scale* scales, std::size_t part_scale_rows,
           std::size_t first_token, T* out, std::ptrdiff_t row_stride, std::ptrdiff_t token_stride);

// Finds the scale of each group under which most of its numbers are codes, and those codes; a code
// is 0 where there is none. `scales` gets the bits of fp32 numbers; 1 where any would do.
template <typename T>
void fit(const Wide& wide, const Narrow& narrow, Rounding rounding, const Shape& shape,
         const T* numbers, std::uint8_t* codes, std::uint32_t* scales);

// So much of a group must be on the grid if the group is to be.
constexpr double kOfGroup = 0.85;

// What a few numbers of an array say: a cheap test that ordinary caches fail.
enum Suspicion : unsigned {
  kFewAlongChannels = 1,  // few significands among neighbours: 4 bits, e4m3, e5m2
  kFewAlongTokens = 2,
  kEvenAlongChannels = 4,  // multiples of one step, at most 127 of them: int8
  kEvenAlongTokens = 8,
  kHalf = 16,  // fp32 with low bits that are zero: bf16, fp16
};
template <typename T>
unsigned suspicions(const Wide& wide, const T* numbers, int dimensions, const std::size_t* shape,
                    const std::int64_t* strides);

// Whether at least half of the channels, side by side, may each be multiples of one step along the
// tokens, as far as can be seen of few numbers; where it is false, the search finds none.
template <typename T>
bool may_have_even_channels(const Wide& wide, const T* numbers, int dimensions,
                            const std::size_t* shape, const std::int64_t* strides);

}  // namespace kvzip::grid
