// The CUDA kernels' bodies on the host: every thread of every block, through the packer and the arguments of a launch,
// compared with the CPU walk to the bit. Built with sanitizers, an access outside a tensor, or a wide one that is not
// aligned, is an error.
#include <sys/mman.h>

#include <cstring>
#include <memory>
#include <random>

#include "check.h"
#include "cpu/walk.h"
#include "cuda/arguments.h"

using namespace fused_sgd;

namespace {

std::mt19937 generator(0);

int element_bytes(Format format) { return format == Format::Float64 ? 8 : format == Format::Float32 ? 4 : 2; }

// One tensor in memory of its own, exactly as long, beginning `offset` elements behind a 16-byte boundary.
class Column {
 public:
  Column(Format format, int64_t length, int64_t offset)
      : skip_(offset * element_bytes(format)), bytes_(length * element_bytes(format)) {
    memory_.reset(static_cast<std::byte*>(std::aligned_alloc(16, (skip_ + bytes_ + 15) / 16 * 16)));
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < length; ++i) {
      const double x = normal(generator);
      switch (format) {
        case Format::Float64:
          put(i, x);
          break;
        case Format::Float32:
          put(i, static_cast<float>(x));
          break;
        case Format::BFloat16:
          put(i, float_to_bfloat16(static_cast<float>(x)));
          break;
        case Format::Float16:
          put(i, float_to_float16(static_cast<float>(x)));
          break;
      }
    }
    // What is not the tensor's holds a pattern that must stay.
    std::memset(memory_.get(), 0x5A, skip_);
  }
  Column(const Column& other) : skip_(other.skip_), bytes_(other.bytes_) {
    const std::size_t all = (skip_ + bytes_ + 15) / 16 * 16;
    memory_.reset(static_cast<std::byte*>(std::aligned_alloc(16, all)));
    std::memcpy(memory_.get(), other.memory_.get(), skip_ + bytes_);
  }
  void* data() const { return memory_.get() + skip_; }
  bool same(const Column& other) const { return std::memcmp(memory_.get(), other.memory_.get(), skip_ + bytes_) == 0; }

 private:
  template <class T>
  void put(int64_t i, T x) {
    std::memcpy(memory_.get() + skip_ + i * sizeof(T), &x, sizeof(T));
  }
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  int64_t skip_, bytes_;
  std::unique_ptr<std::byte, Free> memory_;
};

struct Tensor {
  int combination;
  int64_t length;
  std::vector<Column> columns;  // parameter, gradient, momentum buffer

  Tensor(int line, int64_t elements, int64_t offset_p, int64_t offset_g, int64_t offset_m)
      : combination(line), length(elements) {
    const Combination& c = kCombinations[line];
    columns.reserve(3);
    columns.emplace_back(c.parameter, elements, offset_p);
    columns.emplace_back(c.gradient, elements, offset_g);
    columns.emplace_back(c.momentum, elements, offset_m);
  }
};

std::vector<double> memory_lr = {0.03, 0.3};
float memory_decay = 0.02f;

Group make_group(std::size_t i) {
  Group group;
  group.lr = 0.1 / static_cast<double>(i % 3 + 1);
  group.momentum = i % 4 == 3 ? 0 : 0.9;
  group.dampening = i % 5 == 2 ? 0.1 : 0;
  group.weight_decay = i % 2 == 0 ? 0.01 : 0;
  group.nesterov = i % 3 == 1;
  group.maximize = i % 7 == 4;
  if (i % 6 == 5) {  // as with a learning rate that is a tensor
    group.lr = bit_cast<double>(reinterpret_cast<uint64_t>(&memory_lr[i % 2]));
    group.lr_source = Source::Float64;
    group.weight_decay = bit_cast<double>(reinterpret_cast<uint64_t>(&memory_decay));
    group.weight_decay_source = Source::Float32;
  }
  return group;
}

void fill(TablePacker& packer, const std::vector<Tensor>& tensors) {
  packer.start(kMaxColumns, 12);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    const uint32_t group = packer.add_group(make_group(i));
    void** columns = packer.add_row(t.length, group, static_cast<uint32_t>(t.combination), i % 5 == 0);
    for (int c = 0; c < 3; ++c) columns[c] = t.columns[c].data();
    if (make_group(i).momentum == 0) columns[2] = nullptr;
  }
}

template <int kCombination>
void run_grid(const Table& table) {
  for (uint32_t block = 0; block < table.chunk_count(); ++block) {
    for (uint32_t thread = 0; thread < cuda::kThreads; ++thread) cuda::walk_thread<kCombination>(table, block, thread);
  }
}

void run_grid(const Table& table, int only) {
  switch (only) {
    case Line_Float32_Float32_Float32:
      return run_grid<Line_Float32_Float32_Float32>(table);
    case Line_BFloat16_BFloat16_BFloat16:
      return run_grid<Line_BFloat16_BFloat16_BFloat16>(table);
    default:
      return run_grid<cuda::kAnyCombination>(table);
  }
}

template <std::size_t kCapacity>
void run_launch(const TablePacker& packer, const cuda::Scalars& scalars) {
  const auto arguments = std::make_unique<cuda::Arguments<kCapacity>>();
  std::vector<std::byte> memory;
  if constexpr (kCapacity == 0) {
    memory.resize(cuda::packed_bytes(packer));
    cuda::pack(packer, memory.data());
  } else {
    cuda::pack(packer, arguments->bytes);
  }
  arguments->head = cuda::make_head(packer, scalars, memory.data());
  run_grid(arguments->table(), packer.only_combination());
}

// As Launcher::launch() chooses. Returns how the table travelled.
std::size_t launch(const TablePacker& packer, const cuda::Scalars& scalars) {
  const std::size_t bytes = cuda::packed_bytes(packer);
  if (bytes <= cuda::kSmallCapacity) return run_launch<cuda::kSmallCapacity>(packer, scalars), cuda::kSmallCapacity;
  if (bytes <= cuda::kLargeCapacity) return run_launch<cuda::kLargeCapacity>(packer, scalars), cuda::kLargeCapacity;
  return run_launch<0>(packer, scalars), 0;
}

bool same(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    for (int c = 0; c < 3; ++c) {
      if (!a[i].columns[c].same(b[i].columns[c])) {
        std::printf("tensor %zu of %zu, combination %d, %lld elements, column %d differs\n", i, a.size(),
                    a[i].combination, static_cast<long long>(a[i].length), c);
        return false;
      }
    }
  }
  return true;
}

// Whether the grid gives what the CPU walk gives, for every chunk size a launch may choose.
bool grid_equals_walk(const std::vector<Tensor>& tensors, const float* grad_scale, std::size_t expected_capacity) {
  std::vector<Tensor> expected = tensors;
  TablePacker packer;
  fill(packer, expected);
  const Table table = packer.table(grad_scale);
  cpu::instruction_set().walk(table, 0, table.chunk_count());
  for (uint32_t log2 : {13u, 16u}) {
    std::vector<Tensor> walked = tensors;
    fill(packer, walked);
    packer.rechunk(log2);
    cuda::Scalars scalars;
    if (log2 == 13) {
      scalars.grad_scale = grad_scale;
    } else if (grad_scale != nullptr) {
      scalars.grad_scale_value = *grad_scale;
      scalars.has_grad_scale_value = true;
    }
    const float fine = 0;
    scalars.found_inf = &fine;
    if (launch(packer, scalars) != expected_capacity || !same(walked, expected)) return false;
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
  const float scale = 3;

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
  }

  // Tables around the limits of the arguments.
  for (const int line : {int{Line_Float32_Float32_Float32}, int{Line_Float64_Float64_Float64}}) {
    TablePacker packer;
    std::size_t last_small = 0, last_large = 0;  // how many tensors fit
    for (std::size_t count = 1; last_large == 0; ++count) {
      packer.start(kMaxColumns, 12);
      for (std::size_t i = 0; i < count; ++i) packer.add_row(1, packer.add_group(make_group(i)), line, false);
      if (cuda::packed_bytes(packer) <= cuda::kSmallCapacity) last_small = count;
      if (cuda::packed_bytes(packer) > cuda::kLargeCapacity) last_large = count - 1;
    }
    CHECK(grid_equals_walk(many(last_small, line, 3), nullptr, cuda::kSmallCapacity));
    CHECK(grid_equals_walk(many(last_small + 1, line, 3), nullptr, cuda::kLargeCapacity));
    CHECK(grid_equals_walk(many(last_large, line, 3), nullptr, cuda::kLargeCapacity));
    CHECK(grid_equals_walk(many(last_large + 1, line, 3), nullptr, 0));
    CHECK(grid_equals_walk(many(3000, line, 2), &scale, 0));
  }

  // An overflow skips the step, whatever GradScaler summed over devices.
  for (const float found : {1.0f, 2.0f, -1.0f}) {
    std::vector<Tensor> tensors = many(3, 0, 1000), before = tensors;
    TablePacker packer;
    fill(packer, tensors);
    cuda::Scalars scalars;
    scalars.found_inf = &found;
    launch(packer, scalars);
    CHECK(same(tensors, before));
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
    packer.start(kMaxColumns, 12);
    Group group;
    group.lr = 0.5;
    group.momentum = 0.5;
    void** columns = packer.add_row(length, packer.add_group(group), Line_BFloat16_BFloat16_BFloat16, false);
    for (int c = 0; c < 3; ++c) columns[c] = data[c];
    packer.rechunk(16);
    const Table table = packer.table(nullptr);
    CHECK(table.chunk_count() == static_cast<uint32_t>((length + 32767) / 32768));
    for (const int64_t i : {int64_t{0}, length / 2, length - 1}) {
      data[0][i] = float_to_bfloat16(4);
      data[1][i] = float_to_bfloat16(2);
      data[2][i] = float_to_bfloat16(8);
      const auto block = static_cast<uint32_t>(i / 32768);
      for (uint32_t thread = 0; thread < cuda::kThreads; ++thread) {
        cuda::walk_thread<Line_BFloat16_BFloat16_BFloat16>(table, block, thread);
      }
      CHECK(bfloat16_to_float(data[2][i]) == 6);
      CHECK(bfloat16_to_float(data[0][i]) == 1);
    }
    for (auto& column : data) munmap(column, bytes);
  }

  // Chunks: never smaller than a block's first load, larger when all blocks have work.
  CHECK(cuda::choose_log2_chunk_bytes(0, 528) == 13);
  CHECK(cuda::choose_log2_chunk_bytes(uint64_t{25600000} * 4, 528) == 16);
  CHECK(cuda::choose_log2_chunk_bytes(uint64_t{528} << 14, 528) == 14);
  CHECK(cuda::choose_log2_chunk_bytes(uint64_t{1} << 40, 528) == 16);

  std::printf("grid: %d failures\n", failures);
  return failures;
}
