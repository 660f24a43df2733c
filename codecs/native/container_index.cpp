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

// A block, or a part's tables.
struct Entry {
  std::uint32_t position, tokens;
  std::uint64_t offset, length, stored_checksum, raw_checksum;
};

// A part of a layer, and which entries are its own.
struct Part {
  std::uint32_t layer;
  nb::str name;
  std::size_t first, count;
};

// Reads records, each of which must be the one that belongs there.
class Records {
 public:
  Records(const Py_buffer& bytes, std::uint64_t begin, std::uint64_t end, std::uint64_t alignment)
      : data_(static_cast<const char*>(bytes.buf)),
        count_(std::size_t(bytes.len) / sizeof(Record)),
        begin_(begin),
        end_(end),
        alignment_(alignment) {
    entries_.reserve(count_);
  }

  // `position`: the one of the entry's first token, `start` of those that the layer holds.
  void next(std::uint32_t layer, std::uint8_t part, Kind kind, std::uint32_t position,
            std::uint32_t start, std::uint32_t tokens) {
    const std::size_t at = entries_.size();
    if (at == count_)
      throw std::invalid_argument("the index does not fit the shapes in the header");
    Record r;
    std::memcpy(&r, data_ + at * sizeof r, sizeof r);
    if (r.layer != layer || r.part != part || r.kind != kind || r.reserved || r.start != start ||
        r.tokens != tokens)
      throw std::invalid_argument("entry " + std::to_string(at) +
                                  " of the index is not the block that belongs there");
    // What they take up; not more than there is, or sums would overflow.
    const std::uint64_t room = end_ - begin_, taken = std::min(r.length, room) + alignment_ - 1;
    if (r.offset != begin_ || r.length > room || taken - taken % alignment_ > room)
      throw std::invalid_argument(kNotInOrder);
    begin_ += taken - taken % alignment_;
    entries_.push_back({position, r.tokens, r.offset, r.length, r.stored_checksum, r.raw_checksum});
  }

  std::vector<Entry> finish() {
    if (entries_.size() != count_)
      throw std::invalid_argument("the index does not fit the shapes in the header");
    if (begin_ != end_) throw std::invalid_argument(kNotInOrder);
    return std::move(entries_);
  }

 private:
  const char* data_;
  std::size_t count_;
  std::uint64_t begin_, end_, alignment_;
  std::vector<Entry> entries_;
};

// A part's name, the first and last position that it holds, and the step at whose multiples it is
// cut.
using Cut = std::tuple<nb::str, std::uint32_t, std::uint32_t, std::uint32_t>;

nb::object cut_off(nb::handle bytes, std::size_t begin, std::size_t end) {
  nb::object found =
      nb::steal(PySequence_GetSlice(bytes.ptr(), Py_ssize_t(begin), Py_ssize_t(end)));
  if (!found.is_valid()) throw nb::python_error();
  return found;
}

// Whether bytes are those that were stored, with zeros behind them.
void check_stored(const char* data, std::size_t length, std::size_t taken,
                  std::optional<std::uint64_t> checksum) {
  if (std::any_of(data + length, data + taken, [](char byte) { return byte != 0; }))
    throw std::invalid_argument("the bytes behind it are not zeros");
  if (!checksum) return;
  Xxh3 sum;
  sum.update(data, length);
  if (sum.digest() != *checksum) throw std::invalid_argument("its checksum does not match");
}

// Python objects for all entries take longer to make than the entries to check: they are made when
// somebody asks for them.
class Index {
 public:
  Index(nb::handle data, std::uint64_t begin, std::uint64_t end, std::uint64_t alignment,
        const nb::list& layers)
      : alignment_(alignment) {
    Views views;
    const Py_buffer& bytes = views.add(data, PyBUF_SIMPLE);
    if (bytes.len % Py_ssize_t(sizeof(Record)) || begin > end || !alignment)
      throw std::invalid_argument("no index");
    Records records(bytes, begin, end, alignment);
    std::vector<Cut> cuts;
    nb::handle before;
    std::uint32_t layer = 0;
    std::size_t count = 0;
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
        parts_.push_back({layer, name, count, rows});
        count += rows;
        ++part;
      }
      ++layer;
    }
    entries_ = records.finish();
  }

  std::size_t size() const { return entries_.size(); }

  std::uint64_t shortest() const {
    std::uint64_t least = UINT64_MAX;
    for (const Entry& entry : entries_)
      if (entry.tokens) least = std::min(least, entry.length);
    return least == UINT64_MAX ? 0 : least;
  }

  template <typename T>
  nb::list column(T Entry::* field) const {
    nb::list list = nb::steal<nb::list>(PyList_New(Py_ssize_t(entries_.size())));
    if (!list.is_valid()) throw nb::python_error();
    Py_ssize_t at = 0;
    for (const Entry& entry : entries_) {
      PyObject* const number = PyLong_FromUnsignedLongLong(entry.*field);
      if (!number) throw nb::python_error();
      PyList_SetItem(list.ptr(), at++, number);  // which takes the reference over
    }
    return list;
  }

  nb::tuple keys() const {
    const nb::handle range{reinterpret_cast<PyObject*>(&PyRange_Type)};
    nb::list by_row;
    nb::dict rows;
    for (const Part& part : parts_) {
      const nb::tuple key = nb::make_tuple(part.layer, part.name);
      for (std::size_t i = 0; i < part.count; ++i) by_row.append(key);
      rows[key] = range(part.first, part.first + part.count);
    }
    return nb::make_tuple(by_row, rows);
  }

  nb::list runs(const std::vector<std::size_t>& rows, std::uint64_t most) const {
    nb::list found;
    for (std::size_t i = 0; i < rows.size();) {
      const std::uint64_t begin = entry(rows[i]).offset;
      std::uint64_t end = begin;
      nb::list run;
      do {
        run.append(rows[i]);
        end += taken(entries_[rows[i]]);
        ++i;
      } while (i < rows.size() && entry(rows[i]).offset == end &&
               end - begin + taken(entry(rows[i])) <= most);
      found.append(nb::make_tuple(begin, end - begin, run));
    }
    return found;
  }

  nb::dict stored(nb::handle data, std::uint64_t at, const std::vector<std::size_t>& rows,
                  std::uint64_t most) const {
    Views views;
    const Py_buffer& bytes = views.add(data, PyBUF_SIMPLE);
    const auto* const all = static_cast<const char*>(bytes.buf);
    const auto size = std::uint64_t(bytes.len);
    for (const std::size_t row : rows) {
      const Entry& entry = this->entry(row);
      if (entry.offset < at || entry.offset - at > size ||
          taken(entry) > size - (entry.offset - at))
        throw std::invalid_argument("cut short");
    }
    {
      const Unlocked unlocked;
      for (const std::size_t row : rows) {
        const Entry& entry = entries_[row];
        check_stored(all + (entry.offset - at), entry.length, taken(entry),
                     entry.length && entry.length <= most ? std::optional(entry.stored_checksum)
                                                          : std::nullopt);
      }
    }
    nb::dict found;
    for (const std::size_t row : rows) {
      const std::size_t begin = entries_[row].offset - at;
      found[nb::int_(row)] = cut_off(data, begin, begin + entries_[row].length);
    }
    return found;
  }

 private:
  const Entry& entry(std::size_t row) const {
    if (row >= entries_.size()) throw std::invalid_argument("no such entry");
    return entries_[row];
  }
  // What an entry takes up.
  std::uint64_t taken(const Entry& entry) const {
    return (entry.length + alignment_ - 1) / alignment_ * alignment_;
  }

  std::uint64_t alignment_;
  std::vector<Entry> entries_;
  std::vector<Part> parts_;
};

nb::object stored(nb::handle data, Py_ssize_t length, std::optional<std::uint64_t> checksum) {
  Views views;
  const Py_buffer& bytes = views.add(data, PyBUF_SIMPLE);
  if (length < 0 || length > bytes.len) throw std::invalid_argument("cut short");
  {
    const Unlocked unlocked;
    check_stored(static_cast<const char*>(bytes.buf), std::size_t(length), std::size_t(bytes.len),
                 checksum);
  }
  return cut_off(data, 0, std::size_t(length));
}

}  // namespace

void bind_index(nb::module_& m) {
  m.def("stored", &stored, "data"_a, "length"_a, "checksum"_a = nb::none(),
        "The first `length` bytes of a memoryview, behind which there are zeros only, and whose "
        "XXH3-64 is `checksum` if there is one. Raises ValueError unless it is so.");
  nb::class_<Index>(
      m, "Index",
      "The entries of a file, which fill its bytes `begin` to `end`, each rounded up to a multiple "
      "of `alignment`. `layers`: for each part of each, its name, its first and last position and "
      "the step at whose multiples it is cut. Raises ValueError unless every record is the one "
      "that belongs there.")
      .def(nb::init<nb::handle, std::uint64_t, std::uint64_t, std::uint64_t, const nb::list&>(),
           "records"_a, "begin"_a, "end"_a, "alignment"_a, "layers"_a)
      .def("__len__", &Index::size)
      .def("shortest", &Index::shortest,
           "The least length of a block with tokens, 0 where there is none.")
      .def("positions", [](const Index& self) { return self.column(&Entry::position); })
      .def("tokens", [](const Index& self) { return self.column(&Entry::tokens); })
      .def("offsets", [](const Index& self) { return self.column(&Entry::offset); })
      .def("lengths", [](const Index& self) { return self.column(&Entry::length); })
      .def("stored_checksums",
           [](const Index& self) { return self.column(&Entry::stored_checksum); })
      .def("raw_checksums", [](const Index& self) { return self.column(&Entry::raw_checksum); })
      .def("keys", &Index::keys, "The key of each entry, and the rows of each key.")
      .def("runs", &Index::runs, "rows"_a, "most"_a,
           "Entries in runs of neighbours that take up at most `most` bytes, or are one entry: "
           "where each run begins, its bytes, its rows.")
      .def("stored", &Index::stored, "data"_a, "at"_a, "rows"_a, "most"_a,
           "The bytes of entries by their rows, out of `data`, a memoryview of the file's bytes "
           "from `at` on. "
           "Raises ValueError unless there are zeros only behind each of them, and its checksum, "
           "where it has any bytes and at most `most`, matches.");
}

}  // namespace kvzip
