// What Python tells a GPU's kernels of stored blocks (device_jobs.hpp).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "channel/block_coder.hpp"
#include "channel/device_jobs.hpp"
#include "native/bindings.hpp"
#include "native/stored_block.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvzip::channel {
namespace {

using cuda::StoredBlock;
static_assert(sizeof(StoredBlock) == 40 && sizeof(StreamJob) == 48 && sizeof(DevicePart) == 80 &&
                  sizeof(TurnJob) == 40 && sizeof(ExceptionJob) == 40,
              "as Python has them");

// Whether a block's numbers are stored as they are. Throws std::invalid_argument when it is neither
// that nor coded.
bool is_raw(const StoredBlock& block, std::uint64_t numbers, std::size_t itemsize) {
  if (!block.length) throw std::invalid_argument("cut short");
  if (block.bytes()[0] != kRawBlock) return false;
  cuda::check_as_they_are(block, numbers * itemsize);
  return true;
}

// A block of keys before RoPE: its number, how keys are rounded, how many exceptions there are.
struct UnturnedBlock {
  std::uint32_t block, rounding, exceptions;
};

// What Python tells of the parts that blocks are of: batch, heads, dim of each.
using Shapes = nb::ndarray<const std::int64_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu>;

// What the jobs of a part look up, and where that lies: -1 where the part has none.
struct LookedUp {
  std::int64_t channels = -1, tables = -1;
};

// Jobs for the blocks of many parts, in one go: told part by part from Python, they would take
// longer than PCIe takes to bring the blocks.
class Jobs {
 public:
  std::vector<StreamJob> streams;
  std::vector<std::uint32_t> raw;  // numbers of the blocks that are stored as they are
  std::vector<UnturnedBlock> unturned;
  std::vector<std::uint8_t> data;
  std::vector<LookedUp> looked_up;

  // Blocks first ... first + count - 1, all of one part. Throws std::invalid_argument.
  void add(const PartTables* tables, const StoredBlock* blocks, std::size_t first,
           std::size_t count, const std::int64_t* shape, std::size_t itemsize) {
    const auto batch = std::size_t(shape[0]), heads = std::size_t(shape[1]),
               dim = std::size_t(shape[2]), before = streams.size();
    for (std::size_t i = first; i < first + count; ++i) {
      const StoredBlock& block = blocks[i];
      if (is_raw(block, std::uint64_t(batch) * heads * block.tokens * dim, itemsize)) {
        raw.push_back(std::uint32_t(i));
        continue;
      }
      if (!tables) throw std::invalid_argument("neither raw nor coded");
      const std::uint8_t *const bytes = block.bytes(), *coded = bytes;
      auto size = std::size_t(block.length);
      if (bytes[0] == kUnturnedBlock) {
        const Unturned found(bytes, size);
        unturned.push_back({std::uint32_t(i), std::uint32_t(found.rounding),
                            std::uint32_t(found.exception_count)});
        coded = found.coded;
        size = found.size;
      }
      tables->find(coded, size, batch, block.tokens, &found_);
      for (const Coded& stream : found_) streams.push_back(job_of(block, stream));
    }
    looked_up.emplace_back();
    if (streams.size() > before) look_up(*tables);
  }

 private:
  static StreamJob job_of(const StoredBlock& block, const Coded& coded) {
    const Stream& stream = coded.stream;
    StreamJob job;
    job.stream = block.address +
                 (std::uint64_t(reinterpret_cast<std::uintptr_t>(coded.states)) - block.host);
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
    return job;
  }

  // Room for so many bytes, all of them zeros, at a multiple of 256: where it begins.
  std::size_t room(std::size_t size) {
    const std::size_t at = (data.size() + 255) / 256 * 256;
    data.resize(at + size);
    return at;
  }

  // There is one shape at least, and of a bucket what is its own stands beside what is another's.
  void look_up(const PartTables& tables) {
    const std::vector<DeviceChannel> channels = tables.device_channels();
    const std::vector<Decoder> decoders = tables.decoders();
    const std::size_t channels_at = room(channels.size() * sizeof(DeviceChannel));
    std::memcpy(data.data() + channels_at, channels.data(),
                channels.size() * sizeof(DeviceChannel));
    const std::size_t size = 2 * kBuckets * sizeof(std::uint32_t);
    const std::size_t tables_at = room(std::max<std::size_t>(decoders.size(), 1) * size);
    std::uint8_t* out = data.data() + tables_at;
    for (const Decoder& decoder : decoders)
      for (int bucket = 0; bucket < kBuckets; ++bucket)
        for (const int of : {bucket, kBuckets + bucket}) {
          std::memcpy(out, &decoder.entry[of], sizeof(std::uint32_t));
          out += sizeof(std::uint32_t);
        }
    looked_up.back() = {std::int64_t(channels_at), std::int64_t(tables_at)};
  }

  std::vector<Coded> found_;
};

nb::tuple jobs_of(const std::vector<nb::object>& tables, nb::handle blocks, const Shapes& shapes,
                  std::size_t itemsize) {
  std::vector<const PartTables*> parts;
  for (const nb::object& part : tables)
    parts.push_back(part.is_none() ? nullptr : nb::cast<const PartTables*>(part));
  if (shapes.shape(0) != parts.size()) throw std::out_of_range("want a shape of each part");
  Views views;
  const std::vector<StoredBlock> stored = records_of<StoredBlock>(&views, blocks);
  Jobs jobs;
  {
    const Unlocked unlocked;
    std::size_t first = 0;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      std::size_t end = first;
      while (end < stored.size() && stored[end].part == stored[first].part) ++end;
      jobs.add(parts[i], stored.data(), first, end - first, shapes.data() + 3 * i, itemsize);
      first = end;
    }
    if (first != stored.size()) throw std::out_of_range("blocks of more parts than these");
  }
  return nb::make_tuple(rows_of<std::uint8_t>(std::move(jobs.streams)), jobs.raw,
                        rows_of<std::uint32_t>(std::move(jobs.unturned)),
                        rows_of<std::uint8_t>(std::move(jobs.data)),
                        rows_of<std::int64_t>(std::move(jobs.looked_up)));
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
  m.def("channel_jobs", &jobs_of, "tables"_a, "blocks"_a, "shapes"_a, "itemsize"_a,
        "Jobs for stored blocks of some parts. `blocks` are records as native/cuda/work.py's "
        "BLOCK, part after part; `tables` and `shapes`, int64 [parts, 3], batch, heads and dim, "
        "are of these parts in that order. "
        "The streams, uint8 [streams, 48], `StreamJob` (device_jobs.hpp); the numbers of the "
        "blocks that are stored as they are; of those of keys before RoPE, uint32 [blocks, 3], "
        "their numbers, how keys are rounded, and how many exceptions stand behind the first 16 "
        "bytes; bytes that the streams' kernels look up, uint8 [bytes, 1]; and of each part where "
        "its channels and its tables begin in these, int64 [parts, 2], -1 where it needs none. "
        "Blocks' bytes must lie where the records say. Raises ValueError where a decoder would "
        "before it looks into streams and exceptions.");
  m.def("channel_encoders", &encoders_of, "tables"_a,
        "What a GPU's encoder looks up, uint32 [shapes, 160], `DeviceEncoder` (device_jobs.hpp); "
        "None when a shape has more than the 32 exponents that it takes.");
  m.def("channel_plan", &plan_of, "tables"_a, "batch"_a, "tokens"_a,
        "How a block of so many tokens is cut into streams, int64 [streams, 4]: the first strip, "
        "how many there are, lanes, bytes of the mantissas as they are stored.");
}

}  // namespace kvzip::channel
