#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>
#include <utility>
#include <vector>

#include "kernels.h"
#include "launch.h"

namespace fused_sgd::cuda {
namespace {

void check(cudaError_t error, int device, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // an error that does not stick is not to be found again by whoever asks next
  throw std::runtime_error("fused_sgd, cuda:" + std::to_string(device) + ": " + what +
                           " failed: " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

class RelaxedCapture {
 public:
  RelaxedCapture() : mode_(relax_capture_mode()) {}
  ~RelaxedCapture() { restore_capture_mode(mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  int mode_;
};

// Work on a stream of its own, waited for: a capture must not repeat it with each replay.
template <class Work>
void outside_capture(int device, const char* what, Work work) {
  const RelaxedCapture relaxed;
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), device, "creating a stream");
  try {
    work(stream);
    check(cudaStreamSynchronize(stream), device, what);
  } catch (...) {
    (void)cudaStreamDestroy(stream);
    throw;
  }
  (void)cudaStreamDestroy(stream);
}

const void* code_of(const Kernel& kernel) {
  const void* code = nullptr;
  switch (part_of(kernel)) {
#define FSGD_FIND(part)            \
  case Part::part:                 \
    code = find_in_##part(kernel); \
    break;
    FSGD_PARTS(FSGD_FIND)
#undef FSGD_FIND
    case Part::None:
      break;
  }
  if (code == nullptr) throw std::logic_error("fused_sgd: no such kernel was compiled");
  return code;
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), device, "asking for an attribute of the device");
  return value;
}

}  // namespace

// Of memory that is not pinned, larger copies may wait for the stream (CUDA programming guide, "Concurrent Execution
// between Host and Device"). Pinned memory would have to stay until the copy is done, which the host cannot know.
constexpr std::size_t kMaxAsyncCopy = 64 * 1024;

// A table in device memory, and what it holds. The memory is the driver's and not the caller's allocator's: a capture
// would be given memory of its graph's pool, other streams than the one it was made for would have to be made known,
// and at most some megabytes are at stake, 16 bytes or less for each chunk with norms. What the allocator keeps unused
// is asked back where the driver has none left.
class Launcher::Memory {
 public:
  Memory(std::size_t bytes, int device, ReleaseCache release_cache) : device_(device), capacity_(bytes) {
    const RelaxedCapture relaxed;
    cudaError_t error = cudaMalloc(&data_, bytes);
    if (error == cudaErrorMemoryAllocation) {
      (void)cudaGetLastError();
      release_cache();
      error = cudaMalloc(&data_, bytes);
    }
    check(error, device, "allocating memory for the table");
    error = cudaEventCreateWithFlags(&last_use_, cudaEventDisableTiming);
    if (error != cudaSuccess) (void)cudaFree(data_);
    check(error, device, "creating an event");
  }
  // On whatever device is the current one: pointers and events know theirs. Errors have nowhere to go: the process may
  // be at its end, and the driver gone.
  ~Memory() {
    const RelaxedCapture relaxed;
    (void)cudaEventDestroy(last_use_);
    (void)cudaFree(data_);  // waits for the walks that read it
    (void)cudaGetLastError();
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  std::byte* data() const { return static_cast<std::byte*>(data_); }
  std::size_t capacity() const { return capacity_; }
  bool holds(const TablePacker& packer) const {
    const auto groups = std::as_bytes(packer.groups()), rows = packer.rows();
    return content_.size() == groups.size() + rows.size() &&
           std::memcmp(content_.data(), groups.data(), groups.size()) == 0 &&
           std::memcmp(content_.data() + groups.size(), rows.data(), rows.size()) == 0;
  }

  // Brings the packed table here. The host's copy was read when this returns, since it is not pinned.
  void write(const TablePacker& packer, cudaStream_t stream) {
    std::vector<std::byte> content(packed_bytes(packer));
    pack(packer, content.data());
    content_.clear();  // if this fails, nobody knows what the device holds
    for (std::size_t begin = 0; begin < content.size(); begin += kMaxAsyncCopy) {
      const std::size_t bytes = std::min(kMaxAsyncCopy, content.size() - begin);
      check(cudaMemcpyAsync(static_cast<std::byte*>(data_) + begin, content.data() + begin, bytes,
                            cudaMemcpyHostToDevice, stream),
            device_, "writing the table");
    }
    content_ = std::move(content);
  }

  // Work that uses this memory comes behind what used it before, on whatever stream.
  template <class Work>
  void use(cudaStream_t stream, Work work) {
    if (used_ && stream != last_stream_) check(cudaStreamWaitEvent(stream, last_use_), device_, "waiting for a stream");
    work();
    check(cudaEventRecord(last_use_, stream), device_, "recording an event");
    last_stream_ = stream;
    used_ = true;
  }

 private:
  int device_;
  std::size_t capacity_;
  void* data_ = nullptr;
  cudaEvent_t last_use_ = nullptr;
  cudaStream_t last_stream_ = nullptr;
  bool used_ = false;
  std::vector<std::byte> content_;  // empty while unknown
};

// Tables whose addresses CUDA graphs may have kept.
struct Launcher::Captured {
  std::vector<std::unique_ptr<Memory>> tables;
  const Memory* prepared = nullptr;  // for the launch that comes next; null if that is not captured
};

Launcher::Launcher(int device, ReleaseCache release_cache)
    : device_(device), release_cache_(release_cache), captured_(std::make_unique<Captured>()) {}

Launcher::~Launcher() = default;

std::unique_ptr<Launcher::Memory> Launcher::allocate(std::size_t bytes) const {
  return std::make_unique<Memory>(bytes, device_, release_cache_);
}

void Launcher::prepare(const TablePacker& packer, Stream stream, Norms norms) {
  const std::size_t bytes = packed_bytes(packer);
  if (norms != Norms::None || packer.counts_steps()) make_room(packer, norms);
  captured_->prepared = nullptr;
  if (argument_bytes(packer) <= kLargeCapacity) return;
  if (is_capturing(stream)) {
    for (const auto& table : captured_->tables) {
      if (table->holds(packer)) captured_->prepared = table.get();
    }
    if (captured_->prepared != nullptr) return;
    auto table = allocate(bytes);
    outside_capture(device_, "writing the table", [&](cudaStream_t own) { table->write(packer, own); });
    captured_->prepared = table.get();
    captured_->tables.push_back(std::move(table));
    return;
  }
  if (memory_ != nullptr && memory_->holds(packer)) return;
  if (memory_ == nullptr || memory_->capacity() < bytes) memory_ = allocate(2 * bytes);
  const auto current = static_cast<cudaStream_t>(stream);
  memory_->use(current, [&] { memory_->write(packer, current); });
}

void Launcher::make_room(const TablePacker& packer, Norms norms) {
  const auto cleared = [&](std::size_t bytes) {
    auto memory = allocate(bytes);
    outside_capture(device_, "clearing memory for norms", [&](cudaStream_t own) {
      check(cudaMemsetAsync(memory->data(), 0, bytes, own), device_, "clearing memory for norms");
    });
    sum_memory_.push_back(std::move(memory));
    return sum_memory_.back()->data();
  };
  if (packer.counts_steps() && ticket_ == nullptr) ticket_ = reinterpret_cast<uint32_t*>(cleared(sizeof(uint32_t)));
  if (norms == Norms::None) return;
  if (skipped_steps_ == nullptr) skipped_steps_ = reinterpret_cast<int64_t*>(cleared(sizeof(int64_t)));
  const Table table = packer.table();
  const bool params = norms == Norms::GradientsAndParameters;
  if (table.chunk_count() > chunk_capacity_ || table.row_count > row_capacity_ ||
      (params && param_squares_ == nullptr)) {
    const std::size_t chunks = 2 * std::size_t{table.chunk_count()}, rows = 2 * std::size_t{table.row_count};
    const std::size_t doubles = 2 + 2 * rows + (params ? 2 : 1) * chunks, counters = 2 + rows;
    auto* next = reinterpret_cast<double*>(cleared(doubles * sizeof(double) + counters * sizeof(uint32_t)));
    const auto take = [&](std::size_t count) { return std::exchange(next, next + count); };
    sums_.totals = take(2);
    sums_.row_squares = take(2 * rows);
    sums_.grad_squares = take(chunks);
    param_squares_ = params ? take(chunks) : nullptr;
    sums_.nonfinite = reinterpret_cast<uint32_t*>(next);
    sums_.counter = sums_.nonfinite + 1;
    sums_.row_counters = sums_.nonfinite + 2;
    chunk_capacity_ = chunks;
    row_capacity_ = rows;
  }
  sums_.param_squares = params ? param_squares_ : nullptr;
}

void Launcher::measure(const TablePacker& packer, const Scalars& scalars, const float* grad_scale, Stream stream) {
  run(/*measures=*/true, packer, scalars, grad_scale, stream);
}

void Launcher::launch(const TablePacker& packer, const Scalars& scalars, const float* grad_scale, Stream stream) {
  run(/*measures=*/false, packer, scalars, grad_scale, stream);
}

void Launcher::run(bool measures, const TablePacker& packer, const Scalars& scalars, const float* grad_scale,
                   Stream stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const uint32_t chunks = packer.table().chunk_count();
  const dim3 blocks(measures ? (chunks + kMeasureChunks - 1) / kMeasureChunks : chunks);
  const dim3 threads(measures ? kMeasureThreads : kThreads);
  const Kernel kernel = kernel_for(packer, measures);
  const void* code = code_of(kernel);
  const auto go = [&]<std::size_t kCapacity>(Arguments<kCapacity>& arguments) {
    void* pointers[] = {&arguments};
    check(cudaLaunchKernel(code, blocks, threads, pointers, 0, stream), device_,
          measures ? "launching the norms" : "launching the step");
  };
  const auto with_table_in_arguments = [&]<std::size_t kCapacity>(Arguments<kCapacity>& arguments) {
    arguments.head = make_head(packer, scalars, grad_scale, sums_, nullptr);
    pack_arguments(packer, arguments.bytes);
    go(arguments);
  };
  if (kernel.capacity == kSmallCapacity) {
    Arguments<kSmallCapacity> arguments;
    return with_table_in_arguments(arguments);
  }
  if (kernel.capacity == kLargeCapacity) {
    Arguments<kLargeCapacity> arguments;
    return with_table_in_arguments(arguments);
  }
  const auto walk = [&](const Memory& memory) {
    Arguments<0> arguments{make_head(packer, scalars, grad_scale, sums_, memory.data()), {}};
    go(arguments);
  };
  if (captured_->prepared != nullptr) return walk(*captured_->prepared);  // written and waited for already
  memory_->use(stream, [&] { walk(*memory_); });
}

std::string architectures() { return FSGD_CUDA_ARCHITECTURES; }

std::string obstacle(int device) {
  static std::map<int, std::string> known;  // the GIL guards it
  if (const auto found = known.find(device); found != known.end()) return found->second;
  try {
    const auto capability = std::to_string(attribute(cudaDevAttrComputeCapabilityMajor, device)) + "." +
                            std::to_string(attribute(cudaDevAttrComputeCapabilityMinor, device));
    // All modules are loaded here: later, a launch that had to load its own could wait for the device.
    const RelaxedCapture relaxed;
    cudaError_t error = cudaSuccess;
    for (const Kernel& kernel : kOfEachPart) {
      cudaFuncAttributes attributes;
      if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, code_of(kernel));
    }
    if (error == cudaSuccess) return known[device] = "";
    (void)cudaGetLastError();
    return known[device] = "cuda:" + std::to_string(device) + " has compute capability " + capability +
                           ", the kernels were built for " + architectures() + " (" + cudaGetErrorName(error) +
                           "): build on this machine, or with FUSED_SGD_CUDA_ARCHS=all";
  } catch (const std::runtime_error& error) {  // no driver, no such device; not remembered
    return error.what();
  }
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) != cudaSuccess) (void)cudaGetLastError();
  return status != cudaStreamCaptureStatusNone;
}

int relax_capture_mode() {
  auto mode = cudaStreamCaptureModeRelaxed;
  if (cudaThreadExchangeStreamCaptureMode(&mode) != cudaSuccess) (void)cudaGetLastError();
  return static_cast<int>(mode);
}

void restore_capture_mode(int mode) {
  auto previous = static_cast<cudaStreamCaptureMode>(mode);
  if (cudaThreadExchangeStreamCaptureMode(&previous) != cudaSuccess) (void)cudaGetLastError();
}

}  // namespace fused_sgd::cuda
