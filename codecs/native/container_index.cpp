// The index of a .kvz file (docs/format.md), as columns.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "native/bindings.hpp"
#include "native/xxh3.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvzip {
namespace {

struct Record {
  std::uint32_t layer;
  std::uint8_t part, kind;
  std::uint16_t reserved;
  std::uint32_t start, tokens;
  std::uint64_t offset, length, stored_checksum, raw_checksum;
};
static_assert(sizeof(Record) == 48 && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "kvzip is for little-endian processors");
constexpr char kNotInOrder[] = "the blocks do not follow each other without gap or overlap";
enum Kind : std::uint8_t { kBlock = 0, kTables = 1 };

// Items of Python lists, one after the other.
class Column {
 public:
  explicit Column(std::size_t size) : list_(nb::steal<nb::list>(PyList_New(Py_ssize_t(size)))) {
    if (!list_.is_valid()) throw nb::python_error();
  }
  void add(std::uint64_t value) {
    PyObject* const number = PyLong_FromUnsignedLongLong(value);
    if (!number) throw nb::python_error();
    PyList_SetItem(list_.ptr(), at_++, number);  // which takes the reference over
  }
  const nb::list& list() const { return list_; }

 private:
  nb::list list_;
  Py_ssize_t at_ = 0;
};

// The keys of all entries, and the rows of each key.
class Keys {
 public:
  // `rows`: how many entries the part has.
  void add(std::uint32_t layer, const nb::str& part, std::size_t rows) {
    const nb::tuple key = nb::make_tuple(layer, part);
    const std::size_t first = by_row_.size();
    for (std::size_t i = 0; i < rows; ++i) by_row_.append(key);
    rows_[key] = range_(first, first + rows);
  }
  const nb::list& by_row() const { return by_row_; }
  const nb::dict& rows() const { return rows_; }

 private:
  nb::handle range_{reinterpret_cast<PyObject*>(&PyRange_Type)};
  nb::list by_row_;
  nb::dict rows_;
};

// Reads records, each of which must be the one that belongs there.
class Records {
 public:
  Records(const Py_buffer& bytes, std::uint64_t begin, std::uint64_t end, std::uint64_t alignment)
      : data_(static_cast<const char*>(bytes.buf)),
        count_(std::size_t(bytes.len) / sizeof(Record)),
        begin_(begin),
        end_(end),
        alignment_(alignment),
        columns_{Column(count_), Column(count_), Column(count_),
                 Column(count_), Column(count_), Column(count_)} {}

  // `position`: the one of the entry's first token, `start` of those that the layer holds.
  void next(std::uint32_t layer, std::uint8_t part, Kind kind, std::uint32_t position,
            std::uint32_t start, std::uint32_t tokens) {
    if (at_ == count_)
      throw std::invalid_argument("the index does not fit the shapes in the header");
    Record r;
    std::memcpy(&r, data_ + at_ * sizeof r, sizeof r);
    if (r.layer != layer || r.part != part || r.kind != kind || r.reserved || r.start != start ||
        r.tokens != tokens)
      throw std::invalid_argument("entry " + std::to_string(at_) +
                                  " of the index is not the block that belongs there");
    // What they take up; not more than there is, or sums would overflow.
    const std::uint64_t room = end_ - begin_, taken = std::min(r.length, room) + alignment_ - 1;
    if (r.offset != begin_ || r.length > room || taken - taken % alignment_ > room)
      throw std::invalid_argument(kNotInOrder);
    begin_ += taken - taken % alignment_;
    const std::uint64_t fields[] = {position, r.tokens,          r.offset,
                                    r.length, r.stored_checksum, r.raw_checksum};
    for (int i = 0; i < 6; ++i) columns_[i].add(fields[i]);
    if (r.tokens) shortest_ = std::min(shortest_, r.length);
    ++at_;
  }

  nb::tuple finish(const Keys& keys) const {
    if (at_ != count_)
      throw std::invalid_argument("the index does not fit the shapes in the header");
    if (begin_ != end_) throw std::invalid_argument(kNotInOrder);
    return nb::make_tuple(columns_[0].list(), columns_[1].list(), columns_[2].list(),
                          columns_[3].list(), columns_[4].list(), columns_[5].list(), keys.by_row(),
                          keys.rows(), shortest_ == UINT64_MAX ? 0 : shortest_);
  }

 private:
  const char* data_;
  std::size_t count_, at_ = 0;
  std::uint64_t begin_, end_, alignment_;
  Column columns_[6];
  std::uint64_t shortest_ = UINT64_MAX;  // of the blocks that hold any number
};

// A part's name, the first and last position that it holds, and the step at whose multiples it is
// cut.
using Cut = std::tuple<nb::str, std::uint32_t, std::uint32_t, std::uint32_t>;

nb::tuple read_index(nb::handle data, std::uint64_t begin, std::uint64_t end,
                     std::uint64_t alignment, const nb::list& layers) {
  Views views;
  const Py_buffer& bytes = views.add(data, PyBUF_SIMPLE);
  if (bytes.len % Py_ssize_t(sizeof(Record)) || begin > end || !alignment)
    throw std::invalid_argument("no index");
  Records records(bytes, begin, end, alignment);
  Keys keys;
  std::vector<Cut> cuts;
  nb::handle before;
  std::uint32_t layer = 0;
  for (nb::handle item : layers) {
    if (!item.is(before)) cuts = nb::cast<std::vector<Cut>>(item);  // most are one object
    before = item;
    std::uint8_t part = 0;
    for (const auto& [name, first, stop, step] : cuts) {
      if (!step) throw std::invalid_argument("no index");
      std::size_t rows = 1;
      records.next(layer, part, kTables, first, 0, 0);
      for (std::uint32_t at = first, to; at < stop; at = to, ++rows) {
        // Layers that begin at different positions are cut at the same ones.
        to = std::uint32_t(std::min<std::uint64_t>((std::uint64_t(at) / step + 1) * step, stop));
        records.next(layer, part, kBlock, at, at - first, to - at);
      }
      keys.add(layer, name, rows);
      ++part;
    }
    ++layer;
  }
  return records.finish(keys);
}

nb::object stored(nb::handle data, Py_ssize_t length, std::optional<std::uint64_t> checksum) {
  Views views;
  const Py_buffer& bytes = views.add(data, PyBUF_SIMPLE);
  if (length < 0 || length > bytes.len) throw std::invalid_argument("cut short");
  const auto* const all = static_cast<const char*>(bytes.buf);
  if (std::any_of(all + length, all + bytes.len, [](char byte) { return byte != 0; }))
    throw std::invalid_argument("the bytes behind it are not zeros");
  if (checksum) {
    nb::gil_scoped_release released;
    Xxh3 sum;
    sum.update(all, std::size_t(length));
    if (sum.digest() != *checksum) throw std::invalid_argument("its checksum does not match");
  }
  nb::object found = nb::steal(PySequence_GetSlice(data.ptr(), 0, length));
  if (!found.is_valid()) throw nb::python_error();
  return found;
}

}  // namespace

void bind_index(nb::module_& m) {
  m.def("stored", &stored, "data"_a, "length"_a, "checksum"_a = nb::none(),
        "The first `length` bytes of a memoryview, behind which there are zeros only, and whose "
        "XXH3-64 is `checksum` if there is one. Raises ValueError unless it is so.");
  m.def("read_index", &read_index, "records"_a, "begin"_a, "end"_a, "alignment"_a, "layers"_a,
        "Of records of a file whose entries fill bytes `begin` to `end`, each rounded up to a "
        "multiple of `alignment`, the columns position, tokens, offset, length, stored and raw "
        "checksum, and key; the rows of each key; and the least length of a block with tokens, "
        "0 where there is none. `layers`: for each part of each, its name, "
        "its first and last position and the step at whose multiples it is cut. Raises ValueError "
        "unless every record is the one that belongs there.");
}

}  // namespace kvzip
