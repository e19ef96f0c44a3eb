// The contract for momentum stored in blocks, and for parameters stored in batches: load -> rule -> reduce over the
// block -> store, whatever the range. Against the formats and the rule, one element after the other.
#include <cmath>

#include "check.h"
#include "cpu/walk.h"
#include "tensors.h"

using namespace fused_sgd;

namespace {

template <class P, class M>
void step(const Tensor& t, const Group& group) {
  std::vector<void*> columns;
  for (const auto& column : t.columns) columns.push_back(column.data());
  const P param(columns.data());
  const BFloat16 grad(columns.data() + P::kColumns);
  const M momentum(columns.data() + P::kColumns + 1);
  const Hyperparameters<float> h(group, Scalars{}, 0);
  for (int64_t block = 0; block * kInt8Block < t.length; ++block) {
    float b[kInt8Block];
    typename M::Reduction reduction{};
    for (int k = 0; k < kInt8Block; ++k) {
      const int64_t i = block * kInt8Block + k;
      float p = param.load(i);
      b[k] = momentum.load(i);
      update(h, grad.load(i), p, b[k]);
      param.store(i, p);
      M::reduce(reduction, b[k]);
    }
    for (int k = 0; k < kInt8Block; ++k) momentum.store(block * kInt8Block + k, b[k], reduction);
    momentum.finish(block, reduction);
  }
}

template <class P>
bool walks_as_one_by_one(int line, const Tensor& given, double lr) {
  Group group;
  group.lr = lr;
  group.momentum = 0.9;
  group.weight_decay = 0.01;
  const Tensor expected = given;
  step<P, Int8>(expected, group);
  for (const cpu::InstructionSet& set : cpu::instruction_sets()) {
    if (!set.runs_here()) continue;
    const Tensor walked = given;
    TablePacker packer;
    packer.start(kMaxColumns);
    void** columns = packer.add_row(walked.length, packer.add_group(group), static_cast<uint32_t>(line));
    for (std::size_t c = 0; c < walked.columns.size(); ++c) columns[c] = walked.columns[c].data();
    const Table table = packer.table();
    for (uint32_t chunk = table.chunk_count(); chunk-- > 0;) set.walk(table, chunk, chunk + 1);
    for (std::size_t c = 0; c < walked.columns.size(); ++c) {
      if (!walked.columns[c].same(expected.columns[c])) return false;
    }
  }
  return true;
}

template <class P>
bool walks_as_one_by_one(int line) {
  for (const int64_t length : {64, 128, 192, 4096, 4160, 9024}) {
    if (!walks_as_one_by_one<P>(line, Tensor(line, length, 0, 0, 0), 0.1)) return false;
  }
  return true;
}

// Numbers for which a batch must not be taken for an ordinary one, at one place of it.
template <class P>
bool walks_special_values(int line) {
  const float nan = std::nanf("");
  for (const double lr : {0.1, 32768.0, 32769.0, 3e38}) {
    for (const int64_t at : {0, 200, 4095}) {
      for (const float x : {1e3f, 0x1.fep39f, 0x1p40f, -3.38e38f, INFINITY, -INFINITY, nan}) {
        for (const int column : {0, P::kColumns}) {
          const Tensor t(line, 4160, 0, 0, 0);
          t.columns[static_cast<std::size_t>(column)].put(at, float_to_bfloat16(x));
          if (!walks_as_one_by_one<P>(line, t, lr)) return false;
        }
      }
      for (const float scale : {0x1.fffp32f, 0x1p33f, kLargestScale, nan, unset_value(float()), -0x1p33f, -0x1p100f}) {
        const Tensor t(line, 4160, 0, 0, 0);
        t.columns[P::kColumns + 2].put(at / kInt8Block, scale);
        if (!walks_as_one_by_one<P>(line, t, lr)) return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  CHECK(walks_as_one_by_one<BFloat16>(Line_BFloat16_BFloat16_Int8));
  CHECK(walks_as_one_by_one<SplitBFloat16>(Line_SplitBFloat16_BFloat16_Int8));
  CHECK(walks_as_one_by_one<StochasticBFloat16>(Line_StochasticBFloat16_BFloat16_Int8));
  CHECK(walks_special_values<BFloat16>(Line_BFloat16_BFloat16_Int8));
  CHECK(walks_special_values<StochasticBFloat16>(Line_StochasticBFloat16_BFloat16_Int8));
  std::printf("blocks: %d failures\n", failures);
  return failures;
}
