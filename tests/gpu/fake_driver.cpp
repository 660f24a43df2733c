// A CUDA driver that is none: what decoding on a GPU calls of it, with the host's memory as the
// GPU's and the shim for kernels. Like the real one, and unlike the shim alone, it does nothing
// before it must: work waits in its stream, and when somebody waits for an event, streams go on in
// random order until that has come to pass. So a copy or a kernel that should have waited for
// another one shows. Memory that is given back is lost at once, whatever still uses it: the real
// one may wait first, and need not.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace {

struct Event {
  bool recorded = false, done = true;
};
struct Op {
  std::function<void()> run;
  Event* waits = nullptr;
  Event* records = nullptr;
};
using Stream = std::deque<Op>;
using Run = void (*)(unsigned, unsigned, unsigned long, unsigned long long, void**);
struct Function {
  std::string name;
  Run run;
  unsigned arguments;
};

std::recursive_mutex mutex;
Stream legacy;
std::set<Stream*> streams{&legacy}, ended;
std::map<char*, std::size_t> device_memory, host_memory, memory_elsewhere;
std::vector<void*> given_back;  // until nothing runs that might use it
std::mt19937 draw(std::getenv("KVZIP_FAKE_SEED") ? std::atoi(std::getenv("KVZIP_FAKE_SEED")) : 0);
thread_local int contexts = 0;
int the_context = 0;
std::map<std::string, unsigned> most_shared;  // that each function may have

Stream& of(void* handle) {
  // The legacy stream and the two names that it and the thread's own have.
  return reinterpret_cast<std::uintptr_t>(handle) <= 2 ? legacy : *static_cast<Stream*>(handle);
}

// One op of a stream that can go on; false when none can.
bool step() {
  std::deque<Stream*> ready;
  for (Stream* stream : streams)
    if (!stream->empty() && (!stream->front().waits || stream->front().waits->done))
      ready.push_back(stream);
  if (ready.empty()) {
    for (void* p : given_back) std::free(p);
    given_back.clear();
    return false;
  }
  Stream& stream = *ready[draw() % ready.size()];
  const Op op = stream.front();
  stream.pop_front();
  if (op.run) op.run();
  if (op.records) op.records->done = true;
  if (stream.empty() && ended.erase(&stream)) {
    streams.erase(&stream);
    delete &stream;
  }
  return true;
}
void drain() {
  while (step()) {
  }
}
void put(void* stream, std::function<void()> run) { of(stream).push_back({std::move(run)}); }

bool within(const std::map<char*, std::size_t>& memory, const void* p, std::size_t size) {
  auto found = memory.upper_bound(static_cast<char*>(const_cast<void*>(p)));
  if (found == memory.begin()) return false;
  --found;
  return static_cast<const char*>(p) + size <= found->first + found->second;
}
void expect(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "fake driver: %s\n", what);
  std::abort();
}

int allocate(std::map<char*, std::size_t>& memory, void** out, std::size_t size) {
  auto* p = static_cast<char*>(std::aligned_alloc(256, (size + 255) / 256 * 256 + 256));
  std::memset(p, 0xA5, size);
  memory[p] = size;
  *out = p;
  return 0;
}
int release(std::map<char*, std::size_t>& memory, void* p) {
  auto found = memory.find(static_cast<char*>(p));
  expect(found != memory.end(), "memory is freed that was not allocated");
  std::memset(p, 0xDD, found->second);
  memory.erase(found);
  given_back.push_back(p);
  return 0;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) int
#define LOCK const std::lock_guard<std::recursive_mutex> lock(mutex)
#define IN_CONTEXT \
  LOCK;            \
  expect(contexts > 0, "a call outside of the device's context")

API cuInit(unsigned) { return 0; }
API cuDriverGetVersion(int* v) {
  const char* const version = std::getenv("KVZIP_FAKE_VERSION");
  return *v = version ? std::atoi(version) : 13000, 0;
}
API cuDeviceGetCount(int* n) { return *n = 1, 0; }
API cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal ? 101 : 0; }
API cuDeviceGetAttribute(int* value, int attribute, int) {
  return *value = attribute == 75 ? 9 : 0, 0;
}
API cuDeviceGetName(char* name, int length, int) {
  return std::strncpy(name, "a driver of the tests", length), 0;
}
API cuDeviceTotalMem(std::size_t* bytes, int) { return *bytes = std::size_t{3} << 29, 0; }
API cuDevicePrimaryCtxRetain(void** context, int) { return *context = &the_context, 0; }
API cuCtxPushCurrent(void* context) {
  LOCK;
  expect(context == &the_context, "another context");
  return ++contexts, 0;
}
API cuCtxPopCurrent(void** context) {
  LOCK;
  *context = &the_context;
  return --contexts, 0;
}
API cuCtxSynchronize() {
  IN_CONTEXT;
  return drain(), 0;
}
API cuMemAlloc(void** out, std::size_t size) {
  IN_CONTEXT;
  return size ? allocate(device_memory, out, size) : 1;
}
API cuMemFree(void* p) {
  IN_CONTEXT;
  return release(device_memory, p);
}
API cuMemHostAlloc(void** out, std::size_t size, unsigned) {
  IN_CONTEXT;
  return size ? allocate(host_memory, out, size) : 1;
}
API cuMemFreeHost(void* p) {
  IN_CONTEXT;
  return release(host_memory, p);
}
API cuPointerGetAttribute(void* value, int attribute, void* p) {
  IN_CONTEXT;
  const bool host = within(host_memory, p, 1), elsewhere = within(memory_elsewhere, p, 1);
  if (!host && !elsewhere && !within(device_memory, p, 1)) return 1;
  switch (attribute) {
    case 2: return *static_cast<unsigned*>(value) = host ? 1 : 2, 0;  // the kind of memory
    case 8: return *static_cast<bool*>(value) = false, 0;             // managed
    case 9: return *static_cast<int*>(value) = elsewhere, 0;          // the device's number
    default: return 1;
  }
}
// Memory of another device.
API fake_elsewhere(void** out, std::size_t size) {
  LOCK;
  return allocate(memory_elsewhere, out, size);
}
API cuMemcpyHtoDAsync(void* to, const void* from, std::size_t size, void* stream) {
  IN_CONTEXT;
  expect(within(device_memory, to, size), "a copy to memory that is not the device's");
  expect(within(host_memory, from, size), "a copy from memory that is not pinned");
  expect(size, "nothing is copied");
  put(stream, [=] {
    expect(within(device_memory, to, size) && within(host_memory, from, size), "memory is gone");
    std::memcpy(to, from, size);
  });
  return 0;
}
API cuMemcpyDtoHAsync(void* to, const void* from, std::size_t size, void* stream) {
  IN_CONTEXT;
  expect(within(device_memory, from, size), "a copy from memory that is not the device's");
  expect(within(host_memory, to, size), "a copy to memory that is not pinned");
  expect(size, "nothing is copied");
  put(stream, [=] {
    expect(within(host_memory, to, size) && within(device_memory, from, size), "memory is gone");
    std::memcpy(to, from, size);
  });
  return 0;
}
API cuMemsetD8Async(void* to, unsigned char value, std::size_t size, void* stream) {
  IN_CONTEXT;
  expect(within(device_memory, to, size), "memory is cleared that is not the device's");
  expect(size, "nothing is cleared");
  put(stream, [=] {
    expect(within(device_memory, to, size), "memory is gone");
    std::memset(to, value, size);
  });
  return 0;
}
API cuStreamCreate(void** stream, unsigned) {
  IN_CONTEXT;
  auto* made = new Stream();
  streams.insert(made);
  *stream = made;
  return 0;
}
API cuEventCreate(void** event, unsigned) {
  IN_CONTEXT;
  *event = new Event();
  return 0;
}
API cuStreamDestroy(void* handle) {
  IN_CONTEXT;
  auto* stream = static_cast<Stream*>(handle);
  expect(streams.count(stream) && !ended.count(stream), "no such stream");
  if (stream->empty()) {
    streams.erase(stream);
    delete stream;
  } else {
    ended.insert(stream);  // what is in it is done
  }
  return 0;
}
API cuEventDestroy(void*) {  // work may still name it
  IN_CONTEXT;
  return 0;
}
API cuEventRecord(void* handle, void* stream) {
  IN_CONTEXT;
  auto* event = static_cast<Event*>(handle);
  event->recorded = true;
  event->done = false;
  of(stream).push_back({nullptr, nullptr, event});
  return 0;
}
API cuStreamWaitEvent(void* stream, void* event, unsigned) {
  IN_CONTEXT;
  of(stream).push_back({nullptr, static_cast<Event*>(event)});
  return 0;
}
API cuEventSynchronize(void* handle) {
  IN_CONTEXT;
  const auto* event = static_cast<Event*>(handle);
  while (!event->done) expect(step(), "an event is waited for that nothing brings about");
  return 0;
}
API cuModuleLoadData(void** module, const void* image) {
  IN_CONTEXT;
  // The image is the name of a folder.
  *module = new std::string(static_cast<const char*>(image));
  return 0;
}
API cuModuleGetFunction(void** function, void* module, const char* name) {
  IN_CONTEXT;
  const std::string path = *static_cast<std::string*>(module) + "/" + name + ".so";
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) return 500;
  const auto* arguments = static_cast<const unsigned*>(dlsym(library, "kvzip_arguments"));
  *function = new Function{name, reinterpret_cast<Run>(dlsym(library, "kvzip_run")), *arguments};
  return 0;
}
API cuFuncSetAttribute(void* function, int attribute, int value) {
  IN_CONTEXT;
  if (attribute != 8) return 1;
  most_shared[static_cast<Function*>(function)->name] = unsigned(value);
  return 0;
}
API cuLaunchKernel(void* function, unsigned grid, unsigned, unsigned, unsigned block, unsigned,
                   unsigned, unsigned shared, void* stream, void** parameters, void**) {
  IN_CONTEXT;
  if (!grid || !block) return 1;
  // Parameters are copied at once, as the driver does: eight bytes of each, though some have four.
  const Function called = *static_cast<Function*>(function);
  const auto most = most_shared.find(called.name);
  if (shared > (most == most_shared.end() ? 48u << 10 : most->second)) return 1;
  std::vector<std::uint64_t> values;
  for (unsigned i = 0; i < called.arguments; ++i)
    values.push_back(*static_cast<std::uint64_t*>(parameters[i]));
  put(stream, [=]() mutable {
    std::vector<void*> at;
    for (std::uint64_t& value : values) at.push_back(&value);
    called.run(grid, block, shared, 0, at.data());
  });
  return 0;
}
API fake_streams() {
  LOCK;
  return int(streams.size() - ended.size());
}
// How much was put into streams and is not done.
API fake_pending() {
  LOCK;
  std::size_t count = 0;
  for (const Stream* stream : streams) count += stream->size();
  return int(count);
}
API cuLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
  IN_CONTEXT;
  put(stream, [=] { function(data); });
  return 0;
}
API cuGetErrorName(int, const char** name) { return *name = "AN_ERROR", 0; }
API cuGetErrorString(int, const char** name) { return *name = "an error", 0; }

API cuGetProcAddress_v2(const char* symbol, void** function, int, std::uint64_t, int* status) {
  static void* const self = dlopen(std::getenv("KVZIP_FAKE_DRIVER"), RTLD_NOW);
  *function = dlsym(self, symbol);
  if (status) *status = *function ? 0 : 1;
  return 0;
}
API cuGetProcAddress(const char* symbol, void** function, int version, std::uint64_t flags) {
  return cuGetProcAddress_v2(symbol, function, version, flags, nullptr);
}
