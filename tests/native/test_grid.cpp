// The CUDA kernels' bodies on the host: every thread of every block, through the packer and the arguments of a launch,
// compared with the CPU walk to the bit. Built with sanitizers, an access outside a tensor, or a wide one that is not
// aligned, is an error.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "check.h"
#include "cpu/walk.h"
#include "cuda/arguments.h"
#include "cuda/measure.h"
#include "tensors.h"

using namespace fused_sgd;

namespace {

std::vector<double> memory_lr = {0.03, 0.3};
float memory_decay = 0.02f;

bool with_ema = false;  // the tables of a test have averages

Group make_group(std::size_t i) {
  Group group;
  group.lr = 0.1 / static_cast<double>(i % 3 + 1);
  group.momentum = i % 4 == 3 ? 0 : 0.9;
  group.dampening = i % 5 == 2 ? 0.1 : 0;
  group.weight_decay = i % 2 == 0 ? 0.01 : 0;
  group.nesterov = i % 3 == 1;
  group.maximize = i % 7 == 4;
  group.decoupled_weight_decay = i % 4 == 2;
  if (i % 8 == 6)
    group.lars = kLars | (i % 3 == 0 ? kTrustClipped : 0) | (i % 5 == 0 ? kLrThroughMomentum : kAdaptAlways);
  group.trust_coeff = 0.02;
  group.trust_eps = 1e-8;
  group.has_ema = with_ema && i % 3 != 0;
  group.ema_decay = i % 2 == 0 ? 0.99 : 0.25;
  if (i % 6 == 5) {  // as with a learning rate that is a tensor
    group.lr = bit_cast<double>(reinterpret_cast<uint64_t>(&memory_lr[i % 2]));
    group.lr_source = Source::Float64;
    group.weight_decay = bit_cast<double>(reinterpret_cast<uint64_t>(&memory_decay));
    group.weight_decay_source = Source::Float32;
  }
  return group;
}

void fill(TablePacker& packer, const std::vector<Tensor>& tensors) {
  std::size_t most = 0;
  for (const Tensor& t : tensors) most = std::max(most, t.columns.size());
  packer.start(static_cast<int>(most));
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    const uint32_t group = packer.add_group(make_group(i));
    void** columns = packer.add_row(t.length, group, static_cast<uint32_t>(t.combination));
    for (std::size_t c = 0; c < t.columns.size(); ++c) columns[c] = t.columns[c].data();
    if (make_group(i).momentum == 0) columns[kCombinations[t.combination].momentum_column()] = nullptr;
  }
}

// One phase of a block: every thread of it, one after the other.
struct Phase {
  template <class F>
  void operator()(F f) const {
    for (uint32_t thread = 0; thread < cuda::kMeasureThreads; ++thread) f(thread);
  }
};

template <Lines kLines>
void measure_grid(const Table& table, const cuda::Sums& sums) {
  const auto memory = std::make_unique<cuda::BlockMemory>();
  // Blocks come in any order.
  for (uint32_t block = (table.chunk_count() + cuda::kMeasureChunks - 1) / cuda::kMeasureChunks; block-- > 0;) {
    cuda::measure_block<kLines, false>(table, sums, block, *memory, Phase());
  }
}

template <Lines kLines, bool kEma>
void walk_grid(const Table& table) {
  for (uint32_t block = 0; block < table.chunk_count(); ++block) {
    for (uint32_t thread = 0; thread < cuda::kThreads; ++thread)
      cuda::walk_thread<kLines, kEma, false>(table, block, thread);
  }
}
// Kernels for all combinations only with the code for averages: without it they would double what is compiled here.
template <Lines kLines>
void walk_grid(const Table& table) {
  if constexpr (kLines != kAllLines) {
    if (!with_ema) return walk_grid<kLines, false>(table);
  }
  walk_grid<kLines, true>(table);
}

// Both passes: the sums of the first are what the second reads. Kernels for one combination, for two, and for all.
constexpr Lines kFloat32 = line_bit(Line_Float32_Float32_Float32),
                kBFloat16 = line_bit(Line_BFloat16_BFloat16_BFloat16),
                kPair = kFloat32 | line_bit(Line_Float32_Float32_Int8);
void run_grid(const Table& table, const cuda::Sums& sums, Lines lines) {
  switch (bits_of(lines)) {
    case bits_of(kFloat32):
      measure_grid<kFloat32>(table, sums);
      return walk_grid<kFloat32>(table);
    case bits_of(kBFloat16):
      measure_grid<kBFloat16>(table, sums);
      return walk_grid<kBFloat16>(table);
    case bits_of(kPair):
      measure_grid<kPair>(table, sums);
      return walk_grid<kPair>(table);
    default:
      measure_grid<kAllLines>(table, sums);
      walk_grid<kAllLines>(table);
      if (table.scalars.ticket == nullptr) return;
      for (uint32_t thread = 0; thread < cuda::kThreads; ++thread) cuda::count_steps_thread(table, thread);
  }
}

// Memory for what a first pass finds.
struct SumMemory {
  std::vector<double> grad_squares, param_squares, row_squares, totals = {-1, -1};
  uint32_t nonfinite = 0, counter = 0, ticket = 0;
  std::vector<uint32_t> row_counters;

  explicit SumMemory(const Table& table)
      : grad_squares(table.chunk_count(), -1),
        param_squares(table.chunk_count(), -1),
        row_squares(2 * table.row_count, -1),
        row_counters(table.row_count) {}
  cuda::Sums sums() {
    return {grad_squares.data(), param_squares.data(), row_squares.data(), totals.data(), &nonfinite, &counter,
            row_counters.data()};
  }
  // The device's flags and counters are 0 again behind each launch.
  bool is_ready() const {
    return nonfinite == 0 && counter == 0 &&
           std::all_of(row_counters.begin(), row_counters.end(), [](uint32_t done) { return done == 0; });
  }
};

template <std::size_t kCapacity>
void run_launch(const TablePacker& packer, const Scalars& scalars, const float* grad_scale, SumMemory& sums) {
  const auto arguments = std::make_unique<cuda::Arguments<kCapacity>>();
  std::vector<std::byte> memory;
  if constexpr (kCapacity == 0) {
    memory.resize(cuda::packed_bytes(packer));
    cuda::pack(packer, memory.data());
  } else {
    cuda::pack_arguments(packer, arguments->bytes);
  }
  arguments->head = cuda::make_head(packer, scalars, grad_scale, sums.sums(), memory.data());
  run_grid(arguments->table(), arguments->head.sums, packer.lines());
}

// As Launcher chooses, but that mixed tables may be small. Returns how the table travelled.
std::size_t launch(const TablePacker& packer, Scalars scalars, const float* grad_scale, SumMemory& sums) {
  scalars.totals = sums.totals.data();
  scalars.row_squares = sums.row_squares.data();
  if (packer.counts_steps()) scalars.ticket = &sums.ticket;
  const std::size_t bytes = cuda::argument_bytes(packer);
  if (bytes <= cuda::kSmallCapacity) {
    return run_launch<cuda::kSmallCapacity>(packer, scalars, grad_scale, sums), cuda::kSmallCapacity;
  }
  if (bytes <= cuda::kLargeCapacity) {
    return run_launch<cuda::kLargeCapacity>(packer, scalars, grad_scale, sums), cuda::kLargeCapacity;
  }
  return run_launch<0>(packer, scalars, grad_scale, sums), 0;
}

// What the CPU finds, for the same table.
void measure_on_cpu(const Table& table, SumMemory& sums) {
  const uint32_t middle = table.chunk_count() / 2;
  const auto measure = cpu::instruction_set().measure;
  bool nonfinite = measure(table, middle, table.chunk_count(), sums.grad_squares.data(), sums.param_squares.data());
  nonfinite |= measure(table, 0, middle, sums.grad_squares.data(), sums.param_squares.data());
  add_up_rows(table, 0, table.row_count, sums.grad_squares.data(), sums.param_squares.data(), sums.row_squares.data());
  sums.totals = {add_up_total(table, sums.row_squares.data()), nonfinite ? 1.0 : 0.0};
}

bool same(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    for (std::size_t c = 0; c < a[i].columns.size(); ++c) {
      if (!a[i].columns[c].same(b[i].columns[c])) {
        std::printf("tensor %zu of %zu, combination %d, %lld elements, column %zu differs\n", i, a.size(),
                    a[i].combination, static_cast<long long>(a[i].length), c);
        return false;
      }
    }
  }
  return true;
}

// Whether the grid gives what the CPU walk gives.
bool grid_equals_walk(const std::vector<Tensor>& tensors, const float* grad_scale, std::size_t expected_capacity) {
  std::vector<Tensor> expected = tensors;
  TablePacker packer;
  fill(packer, expected);
  Table table = packer.table();
  SumMemory cpu_sums(table);
  table.scalars.grad_scale = grad_scale;
  measure_on_cpu(table, cpu_sums);
  Scalars scalars;
  scalars.max_grad_norm = grad_scale != nullptr ? 2 : 0;
  table.scalars.max_grad_norm = scalars.max_grad_norm;
  table.scalars.totals = cpu_sums.totals.data();
  table.scalars.row_squares = cpu_sums.row_squares.data();
  cpu::instruction_set().walk(table, 0, table.chunk_count());
  count_steps(table, 0, 1);
  const float fine = 0;
  scalars.found_inf = &fine;
  for (const bool scale_on_device : {false, true}) {
    std::vector<Tensor> walked = tensors;
    fill(packer, walked);
    SumMemory sums(packer.table());
    scalars.grad_scale = scale_on_device ? grad_scale : nullptr;
    const float* number = scale_on_device ? nullptr : grad_scale;
    if (launch(packer, scalars, number, sums) != expected_capacity) return false;
    if (sums.row_squares != cpu_sums.row_squares || sums.totals != cpu_sums.totals || !sums.is_ready()) {
      std::printf("the sums of squares differ: %.17g, on the CPU %.17g\n", sums.totals[0], cpu_sums.totals[0]);
      return false;
    }
    if (!same(walked, expected)) return false;
  }
  return true;
}

std::vector<Tensor> many(std::size_t count, int line, int64_t length) {
  std::vector<Tensor> tensors;
  for (std::size_t i = 0; i < count; ++i) tensors.emplace_back(line, length, 0, 0, 0);
  return tensors;
}

}  // namespace

int main() {
  cpu::select_instruction_set("portable");
  // By a power of two a GPU multiplies, and by any other number it divides.
  const float scale = 3, power = 1024;

  // Every storage combination: sizes around packs, blocks and chunks; every misalignment, all columns alike and not.
  for (int line = 0; line < kCombinationCount; ++line) {
    std::vector<Tensor> tensors;
    for (int64_t length : {1, 2, 3, 7, 8, 9, 31, 257, 1023, 4097, 8192, 20011})
      tensors.emplace_back(line, length, 0, 0, 0);
    for (int64_t offset = 1; offset < 9; ++offset) {
      tensors.emplace_back(line, 5, offset, offset, offset);
      tensors.emplace_back(line, 4099, offset, offset, offset);
      tensors.emplace_back(line, 4099, offset, offset + 1, 2 * offset);
      tensors.emplace_back(line, 4099, 0, offset, 0);
      tensors.emplace_back(line, 4099, 0, 0, offset);
    }
    for (const bool ema : {false, true}) {
      with_ema = ema;
      for (const float* grad_scale : {static_cast<const float*>(nullptr), &scale, &power}) {
        CHECK(grid_equals_walk(tensors, grad_scale, cuda::kSmallCapacity));
      }
    }
  }

  // Two of them, as where momentum in 8 bits stays wide beside what has no whole blocks.
  {
    std::vector<Tensor> tensors;
    for (int64_t length : {64, 9, 4096, 4099, 20032}) {
      const bool in_blocks = length % 64 == 0;
      tensors.emplace_back(in_blocks ? Line_Float32_Float32_Int8 : Line_Float32_Float32_Float32, length, 0, 0, 0);
    }
    CHECK(grid_equals_walk(tensors, nullptr, cuda::kSmallCapacity));
    CHECK(grid_equals_walk(tensors, &scale, cuda::kSmallCapacity));
  }

  // All of them in one table, which is one launch.
  {
    std::vector<Tensor> tensors;
    for (int line = 0; line < kCombinationCount; ++line) {
      tensors.emplace_back(line, 1 + 997 * line, line % 3, line % 5, line % 2);
    }
    CHECK(grid_equals_walk(tensors, &scale, cuda::kSmallCapacity));
    with_ema = false;
  }

  // Tables around the limits of the arguments.
  for (const int line : {int{Line_Float32_Float32_Float32}, int{Line_Float64_Float64_Float64}}) {
    TablePacker packer;
    std::size_t last_small = 0, last_large = 0;  // how many tensors fit
    for (std::size_t count = 1; last_large == 0; ++count) {
      packer.start(4);
      for (std::size_t i = 0; i < count; ++i) packer.add_row(1, packer.add_group(make_group(i)), line);
      if (cuda::argument_bytes(packer) <= cuda::kSmallCapacity) last_small = count;
      if (cuda::argument_bytes(packer) > cuda::kLargeCapacity) last_large = count - 1;
    }
    CHECK(grid_equals_walk(many(last_small, line, 3), nullptr, cuda::kSmallCapacity));
    CHECK(grid_equals_walk(many(last_small + 1, line, 3), nullptr, cuda::kLargeCapacity));
    CHECK(grid_equals_walk(many(last_large, line, 3), nullptr, cuda::kLargeCapacity));
    CHECK(grid_equals_walk(many(last_large + 1, line, 3), nullptr, 0));
    CHECK(grid_equals_walk(many(3000, line, 2), &scale, 0));
  }

  // An overflow skips the step, whatever GradScaler summed over devices; so does what the first pass finds.
  for (const float found : {1.0f, 2.0f, -1.0f, 0.0f}) {
    std::vector<Tensor> tensors = many(3, 0, 5000);
    tensors.emplace_back(Line_StochasticBFloat16_BFloat16_BFloat16, 100, 0, 0, 0);  // whose steps are not counted then
    if (found == 0) static_cast<float*>(tensors[1].columns[1].data())[4321] = -INFINITY;
    const std::vector<Tensor> before = tensors;
    TablePacker packer;
    fill(packer, tensors);
    SumMemory sums(packer.table());
    Scalars scalars;
    scalars.found_inf = &found;
    scalars.skip_nonfinite = found == 0;
    int64_t skipped = 7;
    scalars.skipped_steps = &skipped;
    launch(packer, scalars, nullptr, sums);
    CHECK(same(tensors, before));
    CHECK(sums.totals[1] == (found == 0 ? 1 : 0));
    CHECK(skipped == 8);
  }

  // A tensor of more tiles than lanes, and more rows than threads: the trees of a long row and of all, against plain
  // sums.
  {
    std::vector<Tensor> tensors = many(600, 0, 3);
    tensors.emplace_back(0, 300 * kTile + 77, 0, 0, 0);
    TablePacker packer;
    fill(packer, tensors);
    const Table table = packer.table();
    SumMemory on_gpu(table), on_cpu(table);
    measure_grid<kAllLines>(table, on_gpu.sums());
    measure_on_cpu(table, on_cpu);
    CHECK(on_gpu.row_squares == on_cpu.row_squares);
    CHECK(on_gpu.totals == on_cpu.totals);
    long double sum = 0;
    for (const Tensor& t : tensors) {
      for (int64_t i = 0; i < t.length; ++i) {
        const long double x = static_cast<const float*>(t.columns[1].data())[i];
        sum += x * x;
      }
    }
    CHECK(std::fabs(static_cast<double>(sum) - on_cpu.totals[0]) <= 1e-14 * on_cpu.totals[0]);
  }

  // Beyond 2^31 elements, in memory that is only reserved: the first, a middle and the last chunk.
  {
    const int64_t length = (int64_t{1} << 31) + 12345;
    const std::size_t bytes = length * 2;
    uint16_t* data[3];
    for (auto& column : data) {
      void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      CHECK(memory != MAP_FAILED);
      column = static_cast<uint16_t*>(memory);
    }
    TablePacker packer;
    packer.start(4);
    Group group;
    group.lr = 0.5;
    group.momentum = 0.5;
    void** columns = packer.add_row(length, packer.add_group(group), Line_BFloat16_BFloat16_BFloat16);
    for (int c = 0; c < 3; ++c) columns[c] = data[c];
    const Table table = packer.table();
    CHECK(table.chunk_count() == static_cast<uint32_t>((length + kChunk - 1) / kChunk));
    for (const int64_t i : {int64_t{0}, length / 2, length - 1}) {
      data[0][i] = float_to_bfloat16(4);
      data[1][i] = float_to_bfloat16(2);
      data[2][i] = float_to_bfloat16(8);
      const auto block = static_cast<uint32_t>(i / kChunk);
      for (uint32_t thread = 0; thread < cuda::kThreads; ++thread) {
        cuda::walk_thread<kBFloat16, false, false>(table, block, thread);
      }
      CHECK(bfloat16_to_float(data[2][i]) == 6);
      CHECK(bfloat16_to_float(data[0][i]) == 1);
    }
    for (auto& column : data) munmap(column, bytes);
  }

  // The longest tensor that a packer takes is within a grid's 2^31 - 1 blocks.
  TablePacker packer;
  packer.start(3);
  packer.add_row(int64_t{0x7FFFFFFF} * kChunk, packer.add_group(Group()), 0);
  CHECK(packer.table().chunk_count() == (1u << 31) - 1);

  std::printf("grid: %d failures\n", failures);
  return failures;
}
