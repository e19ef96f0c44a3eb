#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>
#include <vector>

#include "launch.h"

namespace fused_sgd::cuda {
namespace {

// A table of one combination has a kernel of its own, which takes few registers; one that mixes them has the switch.
// How many blocks a multiprocessor holds at least bounds the registers: as many as do without spills.
template <int kCombination>
constexpr int kBlocksAtOnce = 2;
template <>
constexpr int kBlocksAtOnce<Line_Float32_Float32_Float32> = 4;
template <>
constexpr int kBlocksAtOnce<Line_BFloat16_BFloat16_BFloat16> = 3;

template <int kCombination, std::size_t kCapacity>
__global__ __launch_bounds__(kThreads, kBlocksAtOnce<kCombination>) void sgd_step(
    const __grid_constant__ Arguments<kCapacity> arguments) {
  walk_thread<kCombination>(arguments.table(), blockIdx.x, threadIdx.x);
}

template <std::size_t kCapacity>
const void* kernel_for(int combination) {
  switch (combination) {
    case Line_Float32_Float32_Float32:
      return reinterpret_cast<const void*>(&sgd_step<Line_Float32_Float32_Float32, kCapacity>);
    case Line_BFloat16_BFloat16_BFloat16:
      return reinterpret_cast<const void*>(&sgd_step<Line_BFloat16_BFloat16_BFloat16, kCapacity>);
    default:
      return reinterpret_cast<const void*>(&sgd_step<kAnyCombination, kCapacity>);
  }
}

void check(cudaError_t error, int device, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // an error that does not stick is not to be found again by whoever asks next
  throw std::runtime_error("fused_sgd, cuda:" + std::to_string(device) + ": " + what +
                           " failed: " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// Makes a device the current one for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), device, "asking for the current device");
    if (before_ == device) return;
    check(cudaSetDevice(device), device, "selecting the device");
    changed_ = true;
  }
  ~OnDevice() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

class RelaxedCapture {
 public:
  RelaxedCapture() : mode_(relax_capture_mode()) {}
  ~RelaxedCapture() { restore_capture_mode(mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  int mode_;
};

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), device, "asking for an attribute of the device");
  return value;
}

}  // namespace

// Of memory that is not pinned, larger copies may wait for the stream (CUDA programming guide, "Concurrent Execution
// between Host and Device"). Pinned memory would have to stay until the copy is done, which the host cannot know.
constexpr std::size_t kMaxAsyncCopy = 64 * 1024;

// A table in device memory, and what it holds.
class Launcher::Memory {
 public:
  Memory(std::size_t bytes, int device) : device_(device), capacity_(bytes) {
    const RelaxedCapture relaxed;
    check(cudaMalloc(&data_, bytes), device, "allocating memory for the table");
    const cudaError_t error = cudaEventCreateWithFlags(&last_use_, cudaEventDisableTiming);
    if (error != cudaSuccess) (void)cudaFree(data_);
    check(error, device, "creating an event");
  }
  ~Memory() {  // errors have nowhere to go: the process may be at its end, and the driver gone
    const RelaxedCapture relaxed;
    (void)cudaEventDestroy(last_use_);
    (void)cudaFree(data_);  // waits for the walks that read it
    (void)cudaGetLastError();
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  const std::byte* data() const { return static_cast<const std::byte*>(data_); }
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

// A copy that was captured would be repeated by each replay, from host memory that is long gone.
void Launcher::write_outside_capture(Memory& memory, const TablePacker& packer) {
  const RelaxedCapture relaxed;
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), device_, "creating a stream");
  try {
    memory.write(packer, stream);
    check(cudaStreamSynchronize(stream), device_, "writing the table");
  } catch (...) {
    (void)cudaStreamDestroy(stream);
    throw;
  }
  (void)cudaStreamDestroy(stream);
}

Launcher::Launcher(int device)
    : device_(device),
      blocks_at_once_(static_cast<uint64_t>(attribute(cudaDevAttrMultiProcessorCount, device)) *
                      kBlocksAtOnce<Line_Float32_Float32_Float32>),
      captured_(std::make_unique<Captured>()) {}

Launcher::~Launcher() = default;

void Launcher::prepare(TablePacker& packer, Stream stream) {
  packer.rechunk(choose_log2_chunk_bytes(packer.parameter_bytes(), blocks_at_once_));
  const std::size_t bytes = packed_bytes(packer);
  captured_->prepared = nullptr;
  if (bytes <= kLargeCapacity) return;
  if (is_capturing(stream)) {
    for (const auto& table : captured_->tables) {
      if (table->holds(packer)) captured_->prepared = table.get();
    }
    if (captured_->prepared != nullptr) return;
    const OnDevice on(device_);
    auto table = std::make_unique<Memory>(bytes, device_);
    write_outside_capture(*table, packer);
    captured_->prepared = table.get();
    captured_->tables.push_back(std::move(table));
    return;
  }
  if (memory_ != nullptr && memory_->holds(packer)) return;
  const OnDevice on(device_);
  if (memory_ == nullptr || memory_->capacity() < bytes) memory_ = std::make_unique<Memory>(2 * bytes, device_);
  const auto current = static_cast<cudaStream_t>(stream);
  memory_->use(current, [&] { memory_->write(packer, current); });
}

void Launcher::launch(const TablePacker& packer, const Scalars& scalars, Stream stream_handle) {
  const OnDevice on(device_);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const dim3 blocks(packer.table(nullptr).chunk_count());
  const int combination = packer.only_combination();
  const std::size_t bytes = packed_bytes(packer);
  const auto go = [&](const void* kernel, const void* arguments) {
    void* pointers[] = {const_cast<void*>(arguments)};
    check(cudaLaunchKernel(kernel, blocks, dim3(kThreads), pointers, 0, stream), device_, "launching the step");
  };
  const auto with_table_in_arguments = [&]<std::size_t kCapacity>(Arguments<kCapacity>& arguments) {
    arguments.head = make_head(packer, scalars, nullptr);
    pack(packer, arguments.bytes);
    go(kernel_for<kCapacity>(combination), &arguments);
  };
  if (bytes <= kSmallCapacity) {
    Arguments<kSmallCapacity> arguments;
    return with_table_in_arguments(arguments);
  }
  if (bytes <= kLargeCapacity) {
    Arguments<kLargeCapacity> arguments;
    return with_table_in_arguments(arguments);
  }
  const auto walk = [&](const Memory& memory) {
    const Arguments<0> arguments{make_head(packer, scalars, memory.data()), {}};
    go(kernel_for<0>(combination), &arguments);
  };
  if (captured_->prepared != nullptr) return walk(*captured_->prepared);  // written and waited for already
  memory_->use(stream, [&] { walk(*memory_); });
}

std::string architectures() { return FSGD_CUDA_ARCHITECTURES; }

std::string obstacle(int device) {
  static std::map<int, std::string> known;  // the GIL guards it
  if (const auto found = known.find(device); found != known.end()) return found->second;
  try {
    // Of this device and no other: asking starts a context, which takes half a gigabyte there.
    const OnDevice on(device);
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel_for<0>(kAnyCombination));
    if (error == cudaSuccess) return known[device] = "";
    (void)cudaGetLastError();
    return known[device] = "cuda:" + std::to_string(device) + " has compute capability " +
                           std::to_string(attribute(cudaDevAttrComputeCapabilityMajor, device)) + "." +
                           std::to_string(attribute(cudaDevAttrComputeCapabilityMinor, device)) +
                           ", the kernels were built for " + architectures() + " (" + cudaGetErrorName(error) + ")";
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
