// What Python sees of the channel codec.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "channel/part.hpp"
#include "native/bindings.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvzip::channel {
namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Numbers = nb::ndarray<T, nb::ndim<4>, nb::device::cpu>;

template <typename T>
Block<T> block_of(const Numbers<T>& array, const Form& form) {
  if (form.itemsize() != sizeof(T) || (array.stride(3) != 1 && array.shape(3) > 1))
    throw std::invalid_argument("numbers of another dtype, or not contiguous");
  return {array.data(),    array.shape(0),  array.shape(2),
          array.stride(0), array.stride(1), array.stride(2)};
}

template <typename T>
Block<T> block_of(const Numbers<T>& array, const PartTables& tables) {
  if (array.shape(1) != tables.heads() || array.shape(3) != tables.dim())
    throw std::invalid_argument("a block of another shape than its tables");
  return block_of<T>(array, tables.form());
}

template <typename T>
void bind_for(nb::module_& m, nb::class_<PartTables>& tables) {
  m.def(
      "channel_tables",
      [](const Numbers<const T>& numbers, int exponent_bits, int mantissa_bits) {
        const Form form{exponent_bits, mantissa_bits};
        form.check();
        if (numbers.shape(1) * numbers.shape(3) >= 1u << 16)
          throw std::length_error("more than 65,535 channels in a part");
        const Block<const T> block = block_of<const T>(numbers, form);
        std::vector<std::uint8_t> bytes;
        {
          nb::gil_scoped_release released;
          bytes = make_tables<T>(block, numbers.shape(1), numbers.shape(3), form);
        }
        return nb::bytes(bytes.data(), bytes.size());
      },
      "numbers"_a, "exponent_bits"_a, "mantissa_bits"_a,
      "The tables that fit one layer's keys or values best, as bytes (codecs/channel/spec.md).");
  tables.def(
      "encode",
      [](const PartTables& self, const Numbers<const T>& numbers) -> nb::object {
        const Block<const T> block = block_of<const T>(numbers, self);
        Encoded coded;
        {
          nb::gil_scoped_release released;
          coded = self.encode<T>(block);
        }
        if (!coded.size) return nb::none();
        nb::object bytes = nb::steal(PyBytes_FromStringAndSize(nullptr, Py_ssize_t(coded.size)));
        if (!bytes.is_valid()) throw nb::python_error();
        auto* out = reinterpret_cast<std::uint8_t*>(PyBytes_AS_STRING(bytes.ptr()));
        // Nobody else knows of the bytes yet.
        nb::gil_scoped_release released;
        coded.write(out);
        return bytes;
      },
      "numbers"_a, "A coded block's bytes, or None when they are not shorter than the numbers.");
  tables.def(
      "decode",
      [](const PartTables& self, const Bytes& data, const Numbers<T>& out) {
        const Block<T> block = block_of<T>(out, self);
        nb::gil_scoped_release released;
        self.decode<T>(data.data(), data.size(), block);
      },
      "data"_a, "out"_a, "Fill `out` from a coded block's bytes; raises ValueError.");
}

}  // namespace

void bind(nb::module_& m) {
  nb::class_<PartTables> tables(m, "ChannelTables");
  tables.def(
      "__init__",
      [](PartTables* self, const Bytes& data, std::size_t heads, std::size_t dim, int exponent_bits,
         int mantissa_bits) {
        const Form form{exponent_bits, mantissa_bits};
        form.check();
        new (self) PartTables(data.data(), data.size(), heads, dim, form);
      },
      "data"_a, "heads"_a, "dim"_a, "exponent_bits"_a, "mantissa_bits"_a);
  bind_for<std::uint8_t>(m, tables);
  bind_for<std::uint16_t>(m, tables);
  bind_for<std::uint32_t>(m, tables);
}

}  // namespace kvzip::channel
