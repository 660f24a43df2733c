// What Python sees of the channel codec.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

#include "channel/block_coder.hpp"
#include "channel/device_jobs.hpp"
#include "native/bindings.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvzip::channel {
namespace {

template <typename T>
using Numbers = nb::ndarray<T, nb::ndim<4>, nb::device::cpu>;

template <typename T>
Block<T> block_of(const Numbers<T>& array, const NumberFormat& format) {
  if (format.itemsize() != sizeof(T) || (array.stride(3) != 1 && array.shape(3) > 1))
    throw std::invalid_argument("numbers of another dtype, or not contiguous");
  return {array.data(),    array.shape(0),  array.shape(2),
          array.stride(0), array.stride(1), array.stride(2)};
}

// `part`: what it belongs to.
template <typename T, typename Part>
Block<T> block_of(const Numbers<T>& array, const Part& part) {
  if (array.shape(1) != part.heads() || array.shape(3) != part.dim())
    throw std::invalid_argument("a block of another shape than its tables");
  return block_of<T>(array, part.format());
}

constexpr std::size_t kMostChannels = 65535;
void check_channels(std::size_t heads, std::size_t dim) {
  if (dim && heads > kMostChannels / dim)
    throw std::length_error("more than 65,535 channels in a part");
}

template <typename T>
void bind_for(nb::module_& m, nb::class_<Counts>& counts, nb::class_<PartTables>& tables) {
  m.def(
      "channel_tables",
      [](const Numbers<const T>& numbers, int exponent_bits, int mantissa_bits) {
        const NumberFormat format{exponent_bits, mantissa_bits};
        format.check();
        check_channels(numbers.shape(1), numbers.shape(3));
        const Block<const T> block = block_of<const T>(numbers, format);
        std::vector<std::uint8_t> bytes;
        {
          const Computing computing;
          bytes = make_tables<T>(block, numbers.shape(1), numbers.shape(3), format);
        }
        return nb::bytes(bytes.data(), bytes.size());
      },
      "numbers"_a, "exponent_bits"_a, "mantissa_bits"_a,
      "The tables that fit one layer's keys or values best, as bytes (codecs/channel/spec.md).");
  m.def(
      "channel_bits",
      [](const Numbers<const T>& numbers, int exponent_bits, int mantissa_bits) {
        const NumberFormat format{exponent_bits, mantissa_bits};
        format.check();
        check_channels(numbers.shape(1), numbers.shape(3));
        const Block<const T> block = block_of<const T>(numbers, format);
        const Computing computing;
        return own_bits<T>(block, numbers.shape(1), numbers.shape(3), format);
      },
      "numbers"_a, "exponent_bits"_a, "mantissa_bits"_a,
      "What one layer's keys or values would take, about, under tables of their own.");
  counts.def(
      "add",
      [](Counts& self, const Numbers<const T>& numbers) {
        const Block<const T> block = block_of<const T>(numbers, self);
        const Computing computing;
        self.add<T>(block);
      },
      "numbers"_a, "Count the values of [batch, heads, tokens, dim] numbers.");
  tables.def(
      "encode",
      [](const PartTables& self, const Numbers<const T>& numbers,
         const nb::bytes& head) -> nb::object {
        const Block<const T> block = block_of<const T>(numbers, self);
        static thread_local Encoded coded;
        {
          const Computing computing;
          self.encode<T>(block, &coded);
          if (!coded.size) coded.keep_little();
        }
        if (!coded.size) return nb::none();
        nb::object bytes =
            nb::steal(PyBytes_FromStringAndSize(nullptr, Py_ssize_t(head.size() + coded.size)));
        if (!bytes.is_valid()) throw nb::python_error();
        auto* out = reinterpret_cast<std::uint8_t*>(PyBytes_AsString(bytes.ptr()));
        // Nobody else knows of the bytes yet.
        const Unlocked unlocked;
        std::memcpy(out, head.c_str(), head.size());
        coded.write(out + head.size());
        coded.keep_little();
        return bytes;
      },
      "numbers"_a, "head"_a = nb::bytes("", 0),
      "A coded block's bytes, and `head` before them, or None when they are not shorter than the "
      "numbers.");
}

// Arrays of Python's own.
template <typename U>
using Table = nb::ndarray<nb::numpy, U, nb::ndim<2>>;
template <typename U>
Table<U> table_of(std::vector<U>&& numbers, std::size_t columns) {
  auto* const kept = new std::vector<U>(std::move(numbers));
  const nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<U>*>(p); });
  return Table<U>(kept->data(), {kept->size() / columns, columns}, owner);
}

Table<std::uint32_t> entries(const PartTables& tables) {
  std::vector<std::uint32_t> found;
  {
    const Computing computing;
    for (const Decoder& decoder : tables.decoders())
      found.insert(found.end(), std::begin(decoder.entry), std::end(decoder.entry));
  }
  return table_of(std::move(found), 2 * kBuckets);
}

Table<std::uint32_t> channels(const PartTables& tables) {
  return rows_of<std::uint32_t>(tables.device_channels());
}

Table<std::int64_t> streams(const PartTables& tables, nb::handle data, std::size_t batch,
                            std::size_t tokens) {
  Views views;
  const Py_buffer& view = views.add(data, PyBUF_SIMPLE);
  const auto* const bytes = static_cast<const std::uint8_t*>(view.buf);
  std::vector<Coded> streams;
  {
    const Unlocked unlocked;
    tables.find(bytes, std::size_t(view.len), batch, tokens, &streams);
  }
  std::vector<std::int64_t> found;
  for (const Coded& coded : streams) {
    const Stream& stream = coded.stream;
    found.push_back(coded.states - bytes);
    for (const std::size_t n : {stream.first_strip, stream.strips, stream.lanes,
                                stream.stored_mantissas(), coded.word_count, coded.escape_count})
      found.push_back(std::int64_t(n));
  }
  return table_of(std::move(found), 7);
}

// A block to be decoded.
struct Job {
  const PartTables* tables;  // or none
  const Py_buffer *data, *out;
  const Rotation* rotation;  // of keys that RoPE turned, or none
  std::size_t first;         // position of the first token
  std::uint64_t checksum = 0;
};

template <typename T>
void decode_unturned(const Job& job, const Block<T>& block, Workspace* workspace) {
  if constexpr (sizeof(T) == 2) {
    if (!job.tables || !job.rotation || job.tables->format().mantissa_bits != 7)
      throw std::invalid_argument("keys before RoPE, and nothing that says how they are turned");
    const Unturned unturned(static_cast<const std::uint8_t*>(job.data->buf),
                            std::size_t(job.data->len));
    job.tables->decode<T>(unturned.coded, unturned.size, block, workspace);
    unturned.turn(*job.rotation, job.first, job.tables->heads(), job.tables->dim(), block);
  } else {
    throw std::invalid_argument("keys before RoPE in another format than bf16");
  }
}

// Gives the numbers' checksum.
template <typename T>
std::uint64_t decode_one(const Job& job, Workspace* workspace) {
  const Py_buffer& out = *job.out;
  const auto shape = [&](int i) { return std::size_t(out.shape[i]); };
  const auto stride = [&](int i) { return out.strides[i] / std::ptrdiff_t(sizeof(T)); };
  const Block<T> block{
      static_cast<T*>(out.buf), shape(0), shape(2), stride(0), stride(1), stride(2)};
  const auto* data = static_cast<const std::uint8_t*>(job.data->buf);
  const auto size = std::size_t(job.data->len);
  if (size && data[0] == kRawBlock) copy_raw<T>(data, size, shape(1), shape(3), block);
  else if (size && data[0] == kUnturnedBlock) decode_unturned<T>(job, block, workspace);
  else if (job.tables) job.tables->decode<T>(data, size, block, workspace);
  else throw std::invalid_argument("neither raw nor coded");
  return checksum<T>(block, shape(1), shape(3));
}

std::uint64_t decode_any(const Job& job, Workspace* workspace) {
  switch (job.out->itemsize) {
    case 1: return decode_one<std::uint8_t>(job, workspace);
    case 2: return decode_one<std::uint16_t>(job, workspace);
    default: return decode_one<std::uint32_t>(job, workspace);
  }
}

void check(const Job& job) {
  const Py_buffer& out = *job.out;
  const Py_ssize_t size = out.itemsize;
  bool good = out.ndim == 4 && (size == 1 || size == 2 || size == 4);
  for (int i = 0; good && i < 4; ++i) good = out.strides[i] % size == 0;
  if (!good) throw std::invalid_argument("numbers of another dtype");
  if (const PartTables* tables = job.tables)
    if (std::size_t(out.shape[1]) != tables->heads() ||
        std::size_t(out.shape[3]) != tables->dim() ||
        std::size_t(size) != tables->format().itemsize())
      throw std::invalid_argument("a block of another shape than its tables");
}

// Blocks that are decoded while more of them come. With one thread, all are decoded at the end.
class Decoding {
 public:
  explicit Decoding(std::size_t threads) {
    try {
      for (std::size_t i = 1; i < threads; ++i) others_.emplace_back([this] { work(true); });
    } catch (const std::exception&) {  // the system has no more threads: fewer do it
    }
  }
  Decoding(const Decoding&) = delete;
  ~Decoding() { end(true); }

  // Whether the block is taken: it is if each token's numbers are to lie side by side.
  bool add(nb::object tables, nb::handle data, nb::handle out, nb::object rotation,
           std::size_t first) {
    const Py_buffer& to = views_.add(out, PyBUF_STRIDES | PyBUF_WRITABLE);
    if (to.ndim == 4 && to.strides[3] != to.itemsize && to.shape[3] > 1) return false;
    const Job job{tables.is_none() ? nullptr : nb::cast<const PartTables*>(tables),
                  &views_.add(data, PyBUF_SIMPLE), &to,
                  rotation.is_none() ? nullptr : nb::cast<const Rotation*>(rotation), first};
    check(job);
    held_.push_back(std::move(tables));
    if (job.rotation) held_.push_back(std::move(rotation));
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (ended_) throw std::invalid_argument("finished already");
      jobs_.push_back(job);
    }
    more_.notify_one();
    return true;
  }

  // What is not begun yet is left.
  void stop() {
    const Unlocked unlocked;
    end(true);
  }

  std::vector<std::uint64_t> finish() {
    const Unlocked unlocked;
    work(false);
    end(false);
    if (error_) std::rethrow_exception(error_);
    std::vector<std::uint64_t> checksums;
    for (const Job& job : jobs_) checksums.push_back(job.checksum);
    return checksums;
  }

 private:
  // Decodes until there is nothing left, or, if `waiting`, until nothing more will come.
  void work(bool waiting) {
    const DefaultEnvironment environment;
    Workspace workspace;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (waiting) more_.wait(lock, [&] { return next_ < jobs_.size() || ended_; });
      if (next_ >= jobs_.size()) return;
      Job& job = jobs_[next_++];
      lock.unlock();
      std::exception_ptr error;
      try {
        job.checksum = decode_any(job, &workspace);
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      if (error && !error_) error_ = error;
    }
  }
  void end(bool at_once) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ended_ = true;
      if (at_once) next_ = jobs_.size();
    }
    more_.notify_all();
    for (std::thread& other : others_) other.join();
    others_.clear();
  }

  Views views_;
  std::vector<nb::object> held_;
  std::mutex mutex_;
  std::condition_variable more_;
  std::deque<Job> jobs_;  // where they are, they stay
  std::size_t next_ = 0;
  bool ended_ = false;
  std::exception_ptr error_;
  std::vector<std::thread> others_;
};

}  // namespace

void bind(nb::module_& m) {
  nb::class_<Counts> counts(m, "ChannelCounts",
                            "Values of one layer's keys or values, added up over documents.");
  counts
      .def(
          "__init__",
          [](Counts* self, std::size_t heads, std::size_t dim, int exponent_bits,
             int mantissa_bits) {
            const NumberFormat format{exponent_bits, mantissa_bits};
            format.check();
            check_channels(heads, dim);
            new (self) Counts(heads, dim, format);
          },
          "heads"_a, "dim"_a, "exponent_bits"_a, "mantissa_bits"_a)
      .def(
          "bits",
          [](const Counts& self) {
            const Computing computing;
            return self.bits();
          },
          "What others like them would take, about, under the tables that they are drawn from.")
      .def(
          "tables",
          [](const Counts& self) {
            std::vector<std::uint8_t> bytes;
            {
              const Computing computing;
              bytes = self.tables();
            }
            return nb::bytes(bytes.data(), bytes.size());
          },
          "Tables that can code any numbers, and those that were counted best, as bytes. Raises "
          "ValueError when nothing was counted.");
  nb::class_<PartTables> tables(m, "ChannelTables");
  tables.def(
      "__init__",
      [](PartTables* self, nb::handle data, std::size_t heads, std::size_t dim, int exponent_bits,
         int mantissa_bits, bool lasting) {
        const NumberFormat format{exponent_bits, mantissa_bits};
        format.check();
        check_channels(heads, dim);
        Views views;
        const Py_buffer& bytes = views.add(data, PyBUF_SIMPLE);
        new (self) PartTables(static_cast<const std::uint8_t*>(bytes.buf), std::size_t(bytes.len),
                              heads, dim, format, lasting);
      },
      "data"_a, "heads"_a, "dim"_a, "exponent_bits"_a, "mantissa_bits"_a, "lasting"_a = false);
  tables
      .def("entries", &entries,
           "What each shape's slots say, uint32 [shapes, 64]: `Decoder::entry` (kernels.hpp).")
      .def(
          "channels", &channels,
          "Of each channel its shape and its base, or 0xFFFFFFFF and the number that it always is: "
          "uint32 [heads * dim, 2], `DeviceChannel` (device_jobs.hpp).")
      .def("streams", &streams, "data"_a, "batch"_a, "tokens"_a,
           "The streams of a coded block of [batch, heads, tokens, dim], int64 [streams, 7]: "
           "where each begins in the block, its first strip, strips, lanes, bytes of mantissas as "
           "stored, words, escapes (StreamJob in device_jobs.hpp). Raises ValueError where a "
           "decoder would before it looks into the streams.");
  bind_for<std::uint8_t>(m, counts, tables);
  bind_for<std::uint16_t>(m, counts, tables);
  bind_for<std::uint32_t>(m, counts, tables);
  nb::class_<Decoding>(m, "ChannelDecoding",
                       "Decodes blocks on threads of its own, while more come.")
      .def(nb::init<std::size_t>(), "threads"_a)
      .def("add", &Decoding::add, "tables"_a.none(), "data"_a, "out"_a,
           "rotation"_a.none() = nb::none(), "first"_a = 0,
           "Fill `out`, [batch, heads, tokens, dim], from a block's bytes and its tables, or None, "
           "by the end. `rotation`: what turns its keys, of which the first token stands at the "
           "position `first`. False, and nothing of it is done, where a token's numbers do not lie "
           "side by side. Raises ValueError.")
      .def("finish", &Decoding::finish,
           "Wait for all of them; the XXH3-64 of the numbers of each. Raises ValueError.")
      .def("stop", &Decoding::stop, "Begin no other block, and wait for those that are begun.");
}

}  // namespace kvzip::channel
