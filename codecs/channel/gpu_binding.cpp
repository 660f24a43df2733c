// What Python tells a GPU's kernels of stored blocks (device_jobs.hpp).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "channel/block_coder.hpp"
#include "channel/device_jobs.hpp"
#include "native/bindings.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvzip::channel {
namespace {

// BLOCK of native/cuda/work.py.
struct StoredBlock {
  std::uint64_t host, address, length;
  std::uint32_t part, first, tokens, row;
};
static_assert(sizeof(StoredBlock) == 40 && sizeof(StreamJob) == 48 && sizeof(DevicePart) == 80 &&
                  sizeof(TurnJob) == 40 && sizeof(ExceptionJob) == 40,
              "as Python has them");

constexpr std::size_t kHeader = 16;

// Whether a block's numbers are stored as they are. Throws std::invalid_argument when it is neither
// that nor coded.
bool is_raw(const StoredBlock& block, std::uint64_t numbers, std::size_t itemsize) {
  const auto* const data = reinterpret_cast<const std::uint8_t*>(block.host);
  if (!block.length) throw std::invalid_argument("cut short");
  if (data[0] != kRawBlock) return false;
  if (block.length < kHeader || block.length - kHeader != numbers * itemsize)
    throw std::invalid_argument("numbers of another size");
  if (std::any_of(data, data + kHeader, [](std::uint8_t byte) { return byte != 0; }))
    throw std::invalid_argument("its padding is not zeros");
  return true;
}

// A block of keys before RoPE: its number, how keys are rounded, how many exceptions there are.
struct UnturnedBlock {
  std::uint32_t block, rounding, exceptions;
};

// Numbers of Python's own, a row each.
template <typename U, typename Row>
auto rows_of(std::vector<Row>&& rows) {
  auto* const kept = new std::vector<Row>(std::move(rows));
  const nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<Row>*>(p); });
  return nb::ndarray<nb::numpy, U, nb::ndim<2>>(reinterpret_cast<U*>(kept->data()),
                                                {kept->size(), sizeof(Row) / sizeof(U)}, owner);
}

nb::tuple jobs_of(nb::object tables, nb::handle blocks, std::size_t batch, std::size_t heads,
                  std::size_t dim, std::size_t itemsize) {
  const auto* const part = tables.is_none() ? nullptr : nb::cast<const PartTables*>(tables);
  Views views;
  const Py_buffer& view = views.add(blocks, PyBUF_SIMPLE);
  const auto count = std::size_t(view.len) / sizeof(StoredBlock);
  std::vector<StoredBlock> stored(count);
  if (count) std::memcpy(stored.data(), view.buf, count * sizeof(StoredBlock));
  auto* const jobs = new std::vector<StreamJob>();
  const nb::capsule owner(jobs,
                          [](void* p) noexcept { delete static_cast<std::vector<StreamJob>*>(p); });
  std::vector<std::size_t> raw;
  std::vector<UnturnedBlock> unturned;
  {
    nb::gil_scoped_release released;
    std::vector<Coded> streams;
    for (std::size_t i = 0; i < count; ++i) {
      const StoredBlock& block = stored[i];
      if (is_raw(block, std::uint64_t(batch) * heads * block.tokens * dim, itemsize)) {
        raw.push_back(i);
        continue;
      }
      if (!part) throw std::invalid_argument("neither raw nor coded");
      const auto* const data = reinterpret_cast<const std::uint8_t*>(block.host);
      const std::uint8_t* coded_data = data;
      auto size = std::size_t(block.length);
      if (data[0] == kUnturnedBlock) {
        const Unturned found(data, size);
        unturned.push_back({std::uint32_t(i), std::uint32_t(found.rounding),
                            std::uint32_t(found.exception_count)});
        coded_data = found.coded;
        size = found.size;
      }
      part->find(coded_data, size, batch, block.tokens, &streams);
      for (const Coded& coded : streams) {
        const Stream& stream = coded.stream;
        StreamJob job;
        job.stream = block.address + std::uint64_t(coded.states - data);
        job.part = block.part;
        job.first_token = block.first;
        job.tokens = block.tokens;
        job.first_strip = std::uint32_t(stream.first_strip);
        job.strips = std::uint32_t(stream.strips);
        job.lanes = std::uint32_t(stream.lanes);
        job.mantissas = std::uint32_t(stream.stored_mantissas());
        job.words = std::uint32_t(coded.word_count);
        job.escapes = std::uint32_t(coded.escape_count);
        job.row = block.row;
        jobs->push_back(job);
      }
    }
  }
  nb::list indices;
  for (const std::size_t i : raw) indices.append(i);
  using Bytes = nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<2>>;
  auto* const bytes = reinterpret_cast<std::uint8_t*>(jobs->data());
  return nb::make_tuple(Bytes(bytes, {jobs->size(), sizeof(StreamJob)}, owner), indices,
                        rows_of<std::uint32_t>(std::move(unturned)));
}

nb::object encoders_of(const PartTables& tables) {
  std::vector<DeviceEncoder> made;
  bool all = true;
  {
    const Computing computing;
    all = tables.make_device_encoders(&made);
  }
  return all ? nb::cast(rows_of<std::uint32_t>(std::move(made))) : nb::none();
}

auto plan_of(const PartTables& tables, std::size_t batch, std::size_t tokens) {
  std::vector<std::array<std::int64_t, 4>> found;
  for (const Stream& stream : tables.streams(batch, tokens))
    found.push_back({std::int64_t(stream.first_strip), std::int64_t(stream.strips),
                     std::int64_t(stream.lanes), std::int64_t(stream.stored_mantissas())});
  return rows_of<std::int64_t>(std::move(found));
}

}  // namespace

void bind_gpu(nb::module_& m) {
  m.def("channel_jobs", &jobs_of, "tables"_a.none(), "blocks"_a, "batch"_a, "heads"_a, "dim"_a,
        "itemsize"_a,
        "The streams of a part's blocks, which are records as native/cuda/work.py's BLOCK: uint8 "
        "[streams, 48], `StreamJob` (device_jobs.hpp); which blocks are stored as they are; and "
        "which are of keys before RoPE: uint32 [blocks, 3], their numbers, how keys are rounded, "
        "and how many exceptions stand behind the first 16 bytes. "
        "Their bytes must lie where the records say. Raises ValueError where a decoder would "
        "before it looks into streams and exceptions.");
  m.def("channel_encoders", &encoders_of, "tables"_a,
        "What a GPU's encoder looks up, uint32 [shapes, 160], `DeviceEncoder` (device_jobs.hpp); "
        "None when a shape has more than the 32 exponents that it takes.");
  m.def("channel_plan", &plan_of, "tables"_a, "batch"_a, "tokens"_a,
        "How a block of so many tokens is cut into streams, int64 [streams, 4]: the first strip, "
        "how many there are, lanes, bytes of the mantissas as they are stored.");
}

}  // namespace kvzip::channel
