// The CUDA backend: brings a table to the device and walks it in one launch, or two with norms. It knows no torch;
// streams are handles.
// Where the build has no nvcc, absent.cpp stands in for launch.cu.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "arguments.h"
#include "measure.h"

namespace fused_sgd::cuda {

using Stream = void*;  // cudaStream_t

enum class Norms : uint8_t { None, Gradients, GradientsAndParameters };

// One optimizer's launches on one device. Every function throws std::runtime_error, naming the device and the cause.
//
// Callers make the device the current one, for all of this header that works on a device. Nothing here selects one:
// selecting the one from before again would start a context there, half a gigabyte on a GPU that nobody may use.
// (The runtime works in the thread's current context, so this copy of it, linked statically, and torch's agree.)
class Launcher {
 public:
  // release_cache: gives memory of the device that the caller only keeps for later back to the driver; called where the
  // driver has none left.
  using ReleaseCache = void (*)();
  Launcher(int device, ReleaseCache release_cache);
  ~Launcher();
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;

  // Brings the table into device memory if it is too large for the arguments and not what the device already holds;
  // makes room for the sums of measure(), if they are asked for, and for the ticket.
  // Whatever can fail fails here, before anything is written.
  void prepare(const TablePacker& packer, Stream stream, Norms norms);
  // The first pass, over what was prepared last: leaves its sums where totals() and row_squares() say.
  void measure(const TablePacker& packer, const Scalars& scalars, const float* grad_scale, Stream stream);
  // The step, over what was prepared last. grad_scale: a number on the host, or null.
  void launch(const TablePacker& packer, const Scalars& scalars, const float* grad_scale, Stream stream);

  double* totals() const { return sums_.totals; }            // 2
  double* row_squares() const { return sums_.row_squares; }  // 2 a row
  int64_t* skipped_steps() const { return skipped_steps_; }
  uint32_t* ticket() const { return ticket_; }  // where the table counts steps

 private:
  class Memory;
  struct Captured;
  std::unique_ptr<Memory> allocate(std::size_t bytes) const;
  void make_room(const TablePacker& packer, Norms norms);
  void run(bool measures, const TablePacker& packer, const Scalars& scalars, const float* grad_scale, Stream stream);

  int device_;
  ReleaseCache release_cache_;
  std::unique_ptr<Memory> memory_;  // of a table too large for the arguments; rewritten when it changed
  // A CUDA graph keeps the address of a table that it saw: such tables stay, unchanged, for as long as the optimizer.
  std::unique_ptr<Captured> captured_;
  // Of the first pass, the ticket and the count of skipped steps. What it outgrew stays as well: a graph may hold it.
  // Steps that use it must be ordered: nothing here makes one stream wait for another.
  std::vector<std::unique_ptr<Memory>> sum_memory_;
  Sums sums_;
  int64_t* skipped_steps_ = nullptr;
  uint32_t* ticket_ = nullptr;
  double* param_squares_ = nullptr;
  std::size_t chunk_capacity_ = 0, row_capacity_ = 0;
};

// Compute capabilities the kernels were built for, as in "75;80;90"; empty when there are none.
std::string architectures();

// Why no kernel can run on a device, the current one, or an empty string.
std::string obstacle(int device);

bool is_capturing(Stream stream);

// Lets this thread do what a capture would forbid (allocate, wait for another stream); returns what to give back.
int relax_capture_mode();
void restore_capture_mode(int mode);

}  // namespace fused_sgd::cuda
