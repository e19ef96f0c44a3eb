// Which of the compiled walks this process uses.
#include <cstdlib>
#include <stdexcept>

#include "walk.h"

namespace fused_sgd::cpu {

// Defined by walk.cpp, once per instruction set.
void walk_portable(const Table& table, uint32_t chunk_begin, uint32_t chunk_end);
bool measure_portable(const Table& table, uint32_t chunk_begin, uint32_t chunk_end, double* grad_squares,
                      double* param_squares);
#if defined(FSGD_X86)
void walk_avx2(const Table& table, uint32_t chunk_begin, uint32_t chunk_end);
bool measure_avx2(const Table& table, uint32_t chunk_begin, uint32_t chunk_end, double* grad_squares,
                  double* param_squares);
void walk_avx512(const Table& table, uint32_t chunk_begin, uint32_t chunk_end);
bool measure_avx512(const Table& table, uint32_t chunk_begin, uint32_t chunk_end, double* grad_squares,
                    double* param_squares);
#endif

namespace {

const InstructionSet* choose(const std::string& name) {
  std::string known;
  for (const InstructionSet& set : instruction_sets()) {
    if (name == set.name) {
      if (set.runs_here()) return &set;
      throw std::invalid_argument("FUSED_SGD_ISA: this machine cannot run '" + name + "'");
    }
    known += std::string(known.empty() ? "" : ", ") + set.name;
  }
  throw std::invalid_argument("FUSED_SGD_ISA: unknown instruction set '" + name + "'; compiled in are: " + known);
}

const InstructionSet* choose_at_load() {
  if (const char* name = std::getenv("FUSED_SGD_ISA"); name != nullptr && *name != '\0') return choose(name);
  for (const InstructionSet& set : instruction_sets()) {
    if (set.runs_here()) return &set;
  }
  throw std::logic_error("no instruction set runs here");  // unreachable: portable always does
}

const InstructionSet*& current() {
  static const InstructionSet* set = choose_at_load();
  return set;
}

}  // namespace

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = {
#if defined(FSGD_X86)
      {"avx512", walk_avx512, measure_avx512, true,
       [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
       }},
      {"avx2", walk_avx2, measure_avx2, true,
       [] {
         return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
       }},
#endif
#if defined(__FMA__) || defined(__aarch64__)
      {"portable", walk_portable, measure_portable, true, [] { return true; }},
#else
      {"portable", walk_portable, measure_portable, false, [] { return true; }},
#endif
  };
  return sets;
}

const InstructionSet& instruction_set() { return *current(); }

void select_instruction_set(const std::string& name) { current() = choose(name); }

}  // namespace fused_sgd::cpu
