// The CUDA backend: brings a table to the device and walks it in one launch. It knows no torch; streams are handles.
// Where the build has no nvcc, absent.cpp stands in for launch.cu.
#pragma once

#include <memory>
#include <string>

#include "arguments.h"

namespace fused_sgd::cuda {

using Stream = void*;  // cudaStream_t

// One optimizer's launches on one device. Every function throws std::runtime_error, naming the device and the cause.
class Launcher {
 public:
  explicit Launcher(int device);
  ~Launcher();
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;

  // Chooses the size of the chunks and, if the table is too large for the arguments and not what the device already
  // holds, brings it into device memory. Whatever can fail fails here, before anything is written.
  void prepare(TablePacker& packer, Stream stream);
  // Walks what was prepared last.
  void launch(const TablePacker& packer, const Scalars& scalars, Stream stream);

 private:
  class Memory;
  struct Captured;
  void write_outside_capture(Memory& memory, const TablePacker& packer);

  int device_;
  uint64_t blocks_at_once_ = 0;
  std::unique_ptr<Memory> memory_;  // of a table too large for the arguments; rewritten when it changed
  // A CUDA graph keeps the address of a table that it saw: such tables stay, unchanged, for as long as the optimizer.
  std::unique_ptr<Captured> captured_;
};

// Compute capabilities the kernels were built for, as in "75;80;90"; empty when there are none.
std::string architectures();

// Why no kernel can run on a device, or an empty string.
std::string obstacle(int device);

bool is_capturing(Stream stream);

// Lets this thread do what a capture would forbid (allocate, wait for another stream); returns what to give back.
int relax_capture_mode();
void restore_capture_mode(int mode);

}  // namespace fused_sgd::cuda
