// The table and the walk without torch: packing, splitting, and bounds. Built with sanitizers, a read or write outside
// a tensor is an error.
#include <cmath>
#include <memory>
#include <random>

#include "check.h"
#include "cpu/walk.h"

using namespace fused_sgd;

namespace {

struct Tensor {
  std::vector<float> values[3];  // parameter, gradient, momentum buffer; exactly as long as the tensor
};

std::vector<Tensor> make_tensors(const std::vector<int64_t>& lengths) {
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  std::vector<Tensor> tensors(lengths.size());
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    for (auto& column : tensors[i].values) {
      column.resize(lengths[i]);
      for (float& x : column) x = normal(random);
    }
  }
  return tensors;
}

bool is_first(std::size_t i) { return i % 5 == 0; }  // nothing was accumulated yet

void pack(TablePacker& packer, std::vector<Tensor>& tensors) {
  packer.start(kMaxColumns);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    Group group;
    group.lr = 0.1 / static_cast<double>(i % 3 + 1);
    group.momentum = i % 4 == 3 ? 0 : 0.9;
    group.weight_decay = 0.01;
    const auto length = static_cast<int64_t>(tensors[i].values[0].size());
    void** columns = packer.add_row(length, packer.add_group(group), 0);
    for (int c = 0; c < 3; ++c) columns[c] = tensors[i].values[c].data();
    if (is_first(i)) std::fill(tensors[i].values[2].begin(), tensors[i].values[2].end(), unset_value(float()));
  }
}

// The rule, element by element, with nothing of the walk.
void expect(std::vector<Tensor>& tensors) {
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const auto lr = static_cast<float>(-0.1 / static_cast<double>(i % 3 + 1));
    for (std::size_t k = 0; k < tensors[i].values[0].size(); ++k) {
      float &p = tensors[i].values[0][k], &b = tensors[i].values[2][k];
      float d = std::fma(p, 0.01f, tensors[i].values[1][k]);
      if (i % 4 != 3) {
        const float t = b * 0.9f;
        d = b = is_first(i) ? d : std::fma(d, 1.0f, t);
      }
      p = std::fma(d, lr, p);
    }
  }
}

bool equal(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    for (int c = 0; c < 3; ++c) {
      if (a[i].values[c] != b[i].values[c]) return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  const std::vector<int64_t> lengths = {1, 4095, 4096, 4097, 7, 16384, 20000, 31, 2, 16, 400000, 3};
  auto expected = make_tensors(lengths);
  expect(expected);

  for (const cpu::InstructionSet& set : cpu::instruction_sets()) {
    if (!set.runs_here()) continue;
    cpu::select_instruction_set(set.name);
    for (uint32_t parts : {1u, 2u, 3u, 7u, 64u, 1000u}) {
      auto tensors = make_tensors(lengths);
      TablePacker packer;
      pack(packer, tensors);
      const Table table = packer.table();
      const uint32_t chunks = table.chunk_count();
      for (uint32_t part = 0; part < parts; ++part) {
        cpu::instruction_set().walk(table, static_cast<uint32_t>(uint64_t{chunks} * part / parts),
                                    static_cast<uint32_t>(uint64_t{chunks} * (part + 1) / parts));
      }
      CHECK(equal(tensors, expected));
    }
  }

  // Every chunk belongs to the row whose running sum says so.
  auto tensors = make_tensors(lengths);
  TablePacker packer;
  pack(packer, tensors);
  const Table table = packer.table();
  CHECK(table.chunk_count() == 1 + 1 + 1 + 2 + 1 + 4 + 5 + 1 + 1 + 1 + 98 + 1);
  for (uint32_t chunk = 0; chunk < table.chunk_count(); ++chunk) {
    const uint32_t row = table.find_row(chunk);
    CHECK(table.chunk_begin(row) <= chunk && chunk < table.row(row).chunk_end);
  }

  // A guide narrows the search and changes nothing: of one chunk, of a few and of more than it has entries, of rows of
  // many chunks and of many rows.
  for (const int64_t length : {int64_t{1}, kChunk + 1, 300 * kChunk}) {
    for (const uint32_t rows : {1u, 2u, 127u, 128u, 129u, 1000u}) {
      packer.start(kMaxColumns);
      for (uint32_t i = 0; i < rows; ++i) packer.add_row(i % 7 == 3 ? 1 : length, packer.add_group(Group{}), 0);
      Table guided = packer.table();
      CHECK(packer.guide().size() <= kMaxGuide);
      guided.guide = packer.guide().data();
      guided.guide_count = static_cast<uint32_t>(packer.guide().size());
      guided.guide_shift = packer.guide_shift();
      for (uint32_t chunk = 0; chunk < guided.chunk_count(); ++chunk) {
        CHECK(guided.find_row(chunk) == packer.table().find_row(chunk));
      }
    }
  }

  // Equal hyperparameters share a row; sizes beyond 2^31 elements are counted right; limits are errors.
  packer.start(kMaxColumns);
  Group group;
  const uint32_t first = packer.add_group(group);
  group.lr = 1;
  CHECK(packer.add_group(group) != first);
  CHECK(packer.add_group(Group{}) == first);
  packer.add_row((int64_t{1} << 42) + 1, first, 0);
  CHECK(packer.table().chunk_count() == (1u << 30) + 1);
  CHECK(packer.table().row(0).length == (int64_t{1} << 42) + 1);
  bool thrown = false;
  try {
    packer.add_row(int64_t{1} << 44, first, 0);
  } catch (const std::length_error&) {
    thrown = true;
  }
  CHECK(thrown);
  thrown = false;
  try {
    for (int i = 0; i < 70000; ++i) {
      group.lr = i + 2;
      packer.add_group(group);
    }
  } catch (const std::length_error&) {
    thrown = true;
  }
  CHECK(thrown);

  std::printf("walk: %d failures\n", failures);
  return failures;
}
