// Tables as they are stored, spec.md "Tables".
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "channel/kernels.hpp"
#include "channel/shape_clustering.hpp"

namespace kvzip::channel {

// What tables are of: `dim` channels a head; numbers of `value_bits` (sign and exponent), and of
// `number_bits` in all.
struct TableFormat {
  std::size_t channels, dim;
  int value_bits, number_bits;
};

struct StoredTables {
  ShapeLevels shapes;
  std::vector<Channel> channels;
};

// At most 65,535 channels. Shapes that no channel has are left out.
std::vector<std::uint8_t> write_tables(const StoredTables& tables, const TableFormat& format);

// The reverse, up to the order and signs of the shapes. Throws std::invalid_argument for what
// write_tables does not write.
StoredTables read_tables(const std::uint8_t* data, std::size_t size, const TableFormat& format);

}  // namespace kvzip::channel
