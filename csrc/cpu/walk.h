// The CPU backend: walks a range of a table's chunks on the calling thread. It starts no thread; whoever owns the
// thread pool splits [0, chunk_count()) into ranges. Results do not depend on how it is split.
#pragma once

#include <string>
#include <vector>

#include "../core/table.h"

namespace fused_sgd::cpu {

// The step.
using Walk = void (*)(const Table& table, uint32_t chunk_begin, uint32_t chunk_end);

// The sums of squares of each chunk of the gradients and, if asked for, of the parameters; null if not. They go to
// [chunk]. Returns whether a gradient is not finite.
using Measure = bool (*)(const Table& table, uint32_t chunk_begin, uint32_t chunk_end, double* grad_squares,
                         double* param_squares);

struct InstructionSet {
  const char* name;  // "avx512", "avx2" or "portable"
  Walk walk;
  Measure measure;
  bool fast_fma;  // whether std::fma is one instruction; where it is not, results are the same and slow
  bool (*runs_here)();
};

// What was compiled in, best first; "portable" is always the last.
const std::vector<InstructionSet>& instruction_sets();

// The one in use: the best that runs here, or what the environment variable FUSED_SGD_ISA names.
// Throws std::invalid_argument when that is unknown or does not run on this machine.
const InstructionSet& instruction_set();

// Chooses another one for this process; for tests. Throws like instruction_set().
void select_instruction_set(const std::string& name);

}  // namespace fused_sgd::cpu
