// A build without CUDA kernels.
#include <stdexcept>

#include "launch.h"

namespace fused_sgd::cuda {
namespace {

[[noreturn]] void refuse() { throw std::logic_error("this build has no CUDA kernels"); }

}  // namespace

class Launcher::Memory {};
struct Launcher::Captured {};

Launcher::Launcher(int device, ReleaseCache) : device_(device) { refuse(); }
Launcher::~Launcher() = default;
void Launcher::prepare(const TablePacker&, Stream, Norms) { refuse(); }
void Launcher::measure(const TablePacker&, const Scalars&, const float*, Stream) { refuse(); }
void Launcher::launch(const TablePacker&, const Scalars&, const float*, Stream) { refuse(); }

std::string architectures() { return ""; }
std::string obstacle(int) { return "fused_sgd was built without CUDA kernels"; }
bool is_capturing(Stream) { return false; }
int relax_capture_mode() { return 0; }
void restore_capture_mode(int) {}

}  // namespace fused_sgd::cuda
