// What Python tells a GPU's kernels of stored blocks (device_jobs.hpp).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <stdexcept>
#include <vector>

#include "native/bindings.hpp"
#include "native/stored_block.hpp"
#include "predictive/block_parts.hpp"
#include "predictive/device_jobs.hpp"
#include "predictive/device_ranges.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvzip::predictive {
namespace {

using cuda::StoredBlock;
static_assert(kRaw == 0 && kHeaderBytes == cuda::kAsTheyAreHeader, "as of all codecs");

// One part of one layer.
struct Step {
  std::uint32_t number;                // 2 layer + part
  std::array<std::uint64_t, 3> shape;  // batch, heads, dim
  std::uint64_t itemsize;
  std::uint64_t layer;  // address of the DeviceLayer; 0 when the profile has no such part
  std::uint64_t lanes, regions;
  bool last;  // of all that the profile has

  std::uint64_t numbers(std::uint64_t tokens) const {
    return shape[0] * shape[1] * tokens * shape[2];
  }
};

// A block of pairs before RoPE: its job, or none where there are no tokens; and how it rounds.
struct UnturnedBlock {
  static constexpr std::uint32_t kNone = ~0u;
  std::uint32_t job, block, rounding;
};

class Jobs {
 public:
  std::vector<RangeJob> jobs;
  std::vector<std::uint32_t> raw, by_channel, unknown;  // numbers of blocks
  std::vector<UnturnedBlock> unturned;
  std::vector<std::uint64_t> states;  // that ranges begin with, one after the other
  std::vector<std::uint32_t> begun;   // jobs of these ranges: `first_states` is from where on

  // Takes the range on to the next part. Throws std::invalid_argument.
  void add(const Step& step, std::uint32_t number, const StoredBlock& block, DeviceRange* range) {
    if (range->next_part != step.number || range->rows != step.shape[0] ||
        range->tokens != block.tokens)
      range->predicted = 0;
    range->rows = std::uint32_t(step.shape[0]);
    range->tokens = block.tokens;
    range->next_part = step.number + 1;
    if (range->predicted && !step.layer)
      throw std::invalid_argument("the profile is of another model");
    const std::uint8_t* const head = block.bytes();
    if (block.length < kHeaderBytes) {
      unknown.push_back(number);
      return;
    }
    RangeJob job = begin(step, block, *range);
    const std::uint64_t tokens = job.tokens;
    if (head[0] == kRaw) {
      cuda::check_as_they_are(block, step.numbers(block.tokens) * step.itemsize);
      raw.push_back(number);
    } else if (head[0] == kByChannel) {
      by_channel.push_back(number);
    } else if ((head[0] == kPredicted || (head[0] == kUnturned && is_rope_rounding(head[2]))) &&
               range->predicted) {
      find(step, block, range, &job);
      if (head[0] == kUnturned)
        unturned.push_back(
            {tokens ? std::uint32_t(jobs.size()) : UnturnedBlock::kNone, number, head[2]});
    } else {
      unknown.push_back(number);
    }
    if (range->predicted && tokens) jobs.push_back(job);
  }

 private:
  static RangeJob begin(const Step& step, const StoredBlock& block, const DeviceRange& range) {
    RangeJob job{};
    job.layer = step.layer;
    job.inputs = range.inputs;
    job.residual = range.residual;
    job.products = range.products;
    job.energy = range.energy;
    job.states = range.states;
    job.entries = range.entries;
    job.regions = range.regions;
    job.at = step.regions > 1 ? range.at : 0;
    job.tiles = range.tiles;
    job.position = range.position;
    job.tokens = range.rows * range.tokens;
    job.row_tokens = range.tokens;
    job.part = block.part;
    job.first_token = block.first;
    job.values = step.number % 2;
    job.begins = step.number == 0;
    job.row = block.row;
    return job;
  }

  // The sections of a predicted block, all that can be seen of them without decoding checked.
  void find(const Step& step, const StoredBlock& block, DeviceRange* range, RangeJob* job) {
    const std::uint8_t* const head = block.bytes();
    Span<std::uint8_t> left{head + kHeaderBytes, std::size_t(block.length) - kHeaderBytes};
    if (step.itemsize == 4) {
      const std::uint64_t low = 2 * step.numbers(block.tokens), all = round16(low);
      if (left.size < all || !all_zero(left.data + low, left.data + all))
        throw std::invalid_argument("cut short");
      job->low = block.address + kHeaderBytes;
      left.data += all;
      left.size -= all;
    }
    if (!range->coded) {
      std::vector<std::uint64_t> found;
      if (!unpack_states(&left, job->tokens * step.lanes, &found))
        throw std::invalid_argument("states that make no sense");
      if (job->tokens) begun.push_back(std::uint32_t(jobs.size()));
      job->first_states = 8 * states.size();
      states.insert(states.end(), found.begin(), found.end());
      range->coded = 1;
    }
    job->header = block.address;
    job->counts = block.address + std::uint64_t(left.data - head);
    job->bytes = left.size;
    job->ends = step.last;
    job->rounds_products = head[0] == kUnturned && rounds_products(RopeRounding(head[2]));
    if (head[1] > kMostCountBits || (head[0] == kPredicted && head[2]) || head[3])
      throw std::invalid_argument("counts of words that make no sense");
    if (!job->tokens && (left.size || !all_zero(head + 1, head + kHeaderBytes)))
      throw std::invalid_argument("words of no token");
  }
};

using Which = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

nb::tuple jobs_of(nb::handle blocks, const Which& which, nb::handle ranges, std::uint32_t number,
                  const std::array<std::uint64_t, 3>& shape, std::uint64_t itemsize,
                  std::uint64_t layer, std::uint64_t lanes, std::uint64_t regions, bool last) {
  const Step step{number, shape, itemsize, layer, lanes, regions, last};
  Views views;
  const std::vector<StoredBlock> stored = records_of<StoredBlock>(&views, blocks);
  const Py_buffer& view = views.add(ranges, PyBUF_WRITABLE);
  auto* const kept = static_cast<DeviceRange*>(view.buf);
  const std::size_t count = std::size_t(view.len) / sizeof(DeviceRange);
  if (which.shape(0) != stored.size()) throw std::out_of_range("want a range of each block");
  Jobs jobs;
  {
    const Unlocked unlocked;
    for (std::size_t i = 0; i < stored.size(); ++i) {
      const auto place = std::size_t(which(i));
      if (place >= count) throw std::out_of_range("no such range");
      jobs.add(step, std::uint32_t(i), stored[i], &kept[place]);
    }
  }
  return nb::make_tuple(rows_of<std::uint8_t>(std::move(jobs.jobs)), jobs.raw, jobs.by_channel,
                        jobs.unknown, rows_of<std::uint32_t>(std::move(jobs.unturned)),
                        rows_of<std::uint8_t>(std::move(jobs.states)), jobs.begun);
}

}  // namespace

void bind_gpu(nb::module_& m) {
  m.def("predictive_jobs", &jobs_of, "blocks"_a, "which"_a, "ranges"_a, "number"_a, "shape"_a,
        "itemsize"_a, "layer"_a, "lanes"_a, "regions"_a, "last"_a,
        "Jobs for stored blocks of one part of one layer, `number` 2 layer + part, of `shape` "
        "batch, heads, dim. `blocks` are records as native/cuda/work.py's BLOCK; `which` says of "
        "each its record in `ranges`, `DeviceRange` (device_ranges.hpp), which is taken on to the "
        "next part. `layer` is the address of the profile's layer, 0 where it has no such part; "
        "`last`, whether no part comes behind. "
        "The jobs, uint8 [jobs, 176], `RangeJob` (device_jobs.hpp), where `first_states` counts "
        "from the states' beginning; the numbers of the blocks that are stored as they are, of "
        "those that `channel` coded, and of those of no kind that there is; of those of pairs "
        "before RoPE, uint32 [blocks, 3], their jobs or 2^32 - 1, their numbers, how they are "
        "rounded; the states that ranges begin with, uint8 [states, 8]; and which jobs have some. "
        "Blocks' bytes must lie where the records say. Raises ValueError where a decoder would "
        "before it looks into streams.");
}

}  // namespace kvzip::predictive
