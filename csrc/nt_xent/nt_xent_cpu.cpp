// CPU kernel of NT-Xent: threads process tiles; a tile is one matrix product and one fused pass of exponentials.
//
// Forward: rows are divided into blocks, and a task is one block against a run of blocks. Its similarities are computed
// in tiles that stay in the L2 cache. Each exponential is added to its row and its column (upper triangle only). Each
// task writes row and column sums to separate slots, which are added in a fixed order at the end.
// Backward: W is symmetric, so each tile is computed once and used twice: dZ_I += W Z_J and dZ_J += W^T Z_I. The
// tournament of schedule.h makes this safe and deterministic without a slot per task: no gradient block is in two tasks
// of a round, and each adds up its tasks in the order of rounds. Rows of other ranks and of a queue need no gradient
// here; many of them are divided among several tasks per block, each with a slot. Tiles of rows without an upstream
// gradient are skipped.
// Cost: M^2 D + 3 M^2 D flops and M^2 exponentials. Plain PyTorch needs 6 M^2 D and 2 M^2, with about twelve passes
// over an M x M matrix.
// Memory: the packed rows (M D floats forward, 2 M D backward), the slots (M * min(M / 192, 64) floats) and one tile
// per thread.
//
// One shift, 1/tau, serves every row if exp(-2/tau) is a normal float32. For lower temperatures the forward pass keeps
// a running maximum per row (full matrix, no triangle) and the backward pass shifts rows and columns by their own lse.
// Below about 1e-5 the float32 rounding of the cosines, divided by tau, decides which negative dominates; results stay
// finite.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <thread>
#include <vector>

#include "common/cpu_gemm.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "nt_xent/nt_xent.h"
#include "nt_xent/nt_xent_cpu_bf16.h"
#include "nt_xent/nt_xent_cpu_kernel.h"
#include "nt_xent/schedule.h"

namespace scan_fast {
namespace {

constexpr double kMinNorm = 1e-12;
constexpr double kFixedShiftTemperature = 0.03;  // exp(-2 / 0.03) = 1e-29: room for weights and sums on both sides
constexpr double kLog2E = 1.4426950408889634;
constexpr int64_t kTileRows = 128, kTileColumns = 512;
constexpr int64_t kBackwardBlock = 256;
constexpr int64_t kForeignRows = 8192, kForeignParts = 8;  // rows of a part, and most parts, in the backward pass
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Rows per task in the passes that are linear in M.
constexpr int64_t kRowsPerTask = 64;

void for_rows(int64_t rows, const std::function<void(int64_t begin, int64_t end)>& body) {
  parallel_for((rows + kRowsPerTask - 1) / kRowsPerTask,
               [&](int64_t task, int) { body(task * kRowsPerTask, std::min(rows, (task + 1) * kRowsPerTask)); });
}

template <typename Body>
void for_each_row(int64_t rows, Body body) {
  for_rows(rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

int64_t positive_of(const NTXentProblem& p, int64_t row) { return row < p.samples ? row + p.samples : row - p.samples; }

// log(1 + exp(x)): the loss of an anchor if log(sum of negatives) exceeds the positive by x.
double softplus(double x) { return x > 0.0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

int64_t padded(int64_t rows) { return (rows + kNTXentPadding - 1) / kNTXentPadding * kNTXentPadding; }

// Rows of two blocks whose similarities form a tile.
struct Piece {
  int64_t block;  // index in the list of blocks
  int64_t begin;  // first row, in [0, 2N)
  int64_t size;
  int64_t skipped;  // rows of the block before the first
};

// Unit rows as operands of the products, and tiles of similarities computed from them. Four ways to multiply:
//   register tiles (common/register_tiles.h) of rows that are packed once, block by block
//   float32 products of MKL, which packs its operands in every call
//   bfloat16 products of MKL on AMX tiles, for reduced precision
//   register tiles of bfloat16 pairs, for reduced precision on processors with AVX-512-BF16 but no AMX
class Similarities {
 public:
  Similarities(const NTXentProblem& problem, const float* unit, bool reduced, const std::vector<RowBlock>& blocks,
               bool gathers)
      : problem_(problem),
        unit_(unit),
        reduced_(reduced && cpu_gemm_has_bf16()),
        tiles_(uses_tiles(reduced)),
        words_(uses_words(reduced)) {
    const int64_t dim = problem.dim;
    if (tiles_) {
      int64_t rows = 0;
      for (const RowBlock& block : blocks) {
        first_.push_back(rows);
        rows += padded(block.size);
        padded_.push_back(padded(block.size));
      }
      slice_dim_ = (dim + kNTXentMaxWidth - 1) / kNTXentMaxWidth * kNTXentMaxWidth;
      panel_dim_ = words_ ? (dim + 1) / 2 : dim;
      if (words_) slice_dim_ /= 2;
      panels_ = Scratch<float>(rows * panel_dim_);
      if (gathers) slices_ = Scratch<float>(rows * slice_dim_);
      parallel_for(static_cast<int64_t>(blocks.size()), [&](int64_t b, int) {
        if (words_) {
          SCAN_FAST_BF16_ISA(nt_xent_pack_bf16)
          (unit_ + blocks[b].begin * dim, blocks[b].size, dim, words(panels_, first_[b] * panel_dim_),
           gathers ? words(slices_, first_[b] * slice_dim_) : nullptr);
          return;
        }
        SCAN_FAST_BEST_ISA(nt_xent_pack)
        (unit_ + blocks[b].begin * dim, blocks[b].size, dim, panels_.get() + first_[b] * dim,
         gathers ? slices_.get() + first_[b] * slice_dim_ : nullptr);
      });
    }
    if (!reduced_) return;
    rounded_ = Scratch<uint16_t>(problem.rows() * dim);
    for_each_row(problem.rows(), [&](int64_t row) {
      SCAN_FAST_BEST_ISA(nt_xent_to_bf16)(unit_ + row * dim, dim, rounded_.get() + row * dim);
    });
  }

  static bool uses_words(bool reduced) { return reduced && !cpu_gemm_has_bf16() && cpu_multiplies_bf16_vectors(); }
  static bool uses_tiles(bool reduced) {
    if (uses_words(reduced)) return true;
    return !(reduced && cpu_gemm_has_bf16()) && !cpu_gemm_is_used();
  }
  bool reduced() const { return reduced_; }
  bool words() const { return words_; }
  // Columns of a tile that are written and finite or -infinity, and its leading dimension, which is not a power of two:
  // a column of the tile should not fall into a few sets of the L1 cache.
  static int64_t used(int64_t columns) { return (columns + 15) / 16 * 16; }
  int64_t ld(int64_t columns) const { return tiles_ ? padded(columns) + 16 : used(columns); }
  int64_t tile_size(int64_t rows, int64_t columns) const { return padded(rows) * ld(columns); }

  // tile (rows x columns) = the cosines. The diagonal, positive pairs and padding are -infinity.
  void make(const Piece& rows, const Piece& columns, float* tile) const {
    const int64_t dim = problem_.dim, step = ld(columns.size);
    if (words_) {
      SCAN_FAST_BF16_ISA(nt_xent_similarities_bf16)
      (words(panels_, (first_[rows.block] + rows.skipped) * panel_dim_), rows.size,
       words(panels_, (first_[columns.block] + columns.skipped) * panel_dim_), columns.size, dim, tile, step);
    } else if (tiles_) {
      SCAN_FAST_BEST_ISA(nt_xent_similarities)
      (panels_.get() + (first_[rows.block] + rows.skipped) * dim, rows.size,
       panels_.get() + (first_[columns.block] + columns.skipped) * dim, columns.size, dim, tile, step);
    } else if (reduced_) {
      gemm_nt_bf16(rows.size, columns.size, dim, 1.0f, rounded_.get() + rows.begin * dim, dim,
                   rounded_.get() + columns.begin * dim, dim, 0.0f, tile, step);
    } else {
      gemm_nt(rows.size, columns.size, dim, 1.0f, unit_ + rows.begin * dim, dim, unit_ + columns.begin * dim, dim, 0.0f,
              tile, step);
    }
    for (int64_t i = 0; i < rows.size; ++i) {
      float* values = tile + i * step;
      for (const int64_t masked : {rows.begin + i, positive_of(problem_, rows.begin + i)}) {
        if (masked >= columns.begin && masked < columns.begin + columns.size) {
          values[masked - columns.begin] = -kInfinity;
        }
      }
      for (int64_t j = columns.size; j < used(columns.size); ++j) values[j] = -kInfinity;
    }
  }

  // to (rows x D) += W Z_columns; with `transposed`, to (columns x D) += W^T Z_rows.
  void apply(const float* tile, const uint16_t* tile16, const Piece& rows, const Piece& columns, bool transposed,
             float* to) const {
    const int64_t dim = problem_.dim, step = ld(columns.size);
    const Piece& from = transposed ? rows : columns;
    const int64_t m = transposed ? columns.size : rows.size;
    if (words_) {
      // The words that pair columns, then those that pair rows.
      const uint32_t* const weights = reinterpret_cast<const uint32_t*>(tile16);
      SCAN_FAST_BF16_ISA(nt_xent_gather_bf16)
      (transposed ? weights + padded(rows.size) * (step / 2) : weights, step, m, from.size, transposed,
       words(slices_, first_[from.block] * slice_dim_), padded_[from.block], dim, to);
    } else if (tiles_) {
      SCAN_FAST_BEST_ISA(nt_xent_gather)
      (tile, step, m, from.size, transposed, slices_.get() + first_[from.block] * slice_dim_, padded_[from.block], dim,
       to);
    } else if (reduced_) {
      (transposed ? gemm_tn_bf16 : gemm_nn_bf16)(m, dim, from.size, 1.0f, tile16, step,
                                                 rounded_.get() + from.begin * dim, dim, 1.0f, to, dim);
    } else {
      (transposed ? gemm_tn : gemm_nn)(m, dim, from.size, 1.0f, tile, step, unit_ + from.begin * dim, dim, 1.0f, to,
                                       dim);
    }
  }

 private:
  const NTXentProblem& problem_;
  const float* unit_;
  static uint32_t* words(const Scratch<float>& memory, int64_t at) {
    static_assert(sizeof(uint32_t) == sizeof(float));
    return static_cast<uint32_t*>(static_cast<void*>(memory.get() + at));
  }

  bool reduced_, tiles_, words_;
  int64_t panel_dim_ = 0, slice_dim_ = 0;  // words or floats per packed row
  std::vector<int64_t> first_, padded_;    // of each block: packed rows before it, and its own
  Scratch<float> panels_, slices_;
  Scratch<uint16_t> rounded_;
};

// Rows of a block of register tiles: two blocks, a tile and two blocks of gradients should fit into the L2 cache.
int64_t tile_block(int64_t rows, int64_t dim) {
  return rows >= 4096 && dim <= 256 ? 4 * kNTXentPadding : rows >= 768 ? 2 * kNTXentPadding : kNTXentPadding;
}

// Calls body(piece) for pieces of at most `most` rows: of each block in [begin, end), or if whole blocks need not be
// kept apart, of all their rows.
template <typename Body>
void for_pieces(const std::vector<RowBlock>& blocks, int64_t begin, int64_t end, int64_t most, bool apart, Body body) {
  for (int64_t b = begin; b < end;) {
    const int64_t next = apart ? b + 1 : end;
    const int64_t first = blocks[b].begin, last = blocks[next - 1].begin + blocks[next - 1].size;
    for (int64_t row = first; row < last; row += most) body(Piece{b, row, std::min(most, last - row), row - first});
    b = next;
  }
}

// Computes log of the sum over the negatives of exp(s_ij - 1/tau) per anchor, with one shift for all rows.
std::vector<double> log_negatives_fixed(const NTXentProblem& problem, const float* unit, bool reduced) {
  const float scale = static_cast<float>(kLog2E / problem.temperature);
  const bool tiles = Similarities::uses_tiles(reduced);
  const int64_t piece = tiles ? tile_block(problem.rows(), problem.dim) : kTileRows;
  const int64_t width = tiles ? piece : kTileColumns;
  const int64_t block = piece * std::max<int64_t>(1, (problem.rows() + 64 * piece - 1) / (64 * piece));
  const std::vector<RowBlock> blocks = make_row_blocks(problem, block, tiles ? kNTXentPadding : 1);
  const Similarities similarities(problem, unit, reduced, blocks, /*gathers=*/false);
  const int64_t run = std::max(block, kTileColumns);
  const std::vector<ForwardTask> tasks = make_forward_tasks(blocks, run);
  const int64_t anchors = problem.local_anchors(), slots = static_cast<int64_t>(blocks.size());
  const Scratch<float> partial(slots * anchors);
  std::fill_n(partial.get(), slots * anchors, 0.0f);
  const int64_t tile_size = similarities.tile_size(piece, width), scratch_size = tile_size + run + 16;
  const Scratch<float> scratch(max_threads() * scratch_size);

  parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t index, int thread) {
    const ForwardTask& task = tasks[index];
    float* tile = scratch.get() + thread * scratch_size;
    float* column_sum = tile + tile_size;
    const int64_t column_begin = blocks[task.column_begin].begin;
    const int64_t column_end = blocks[task.column_end - 1].begin + blocks[task.column_end - 1].size;
    float* row_slot = partial.get() + task.column_begin * anchors + blocks[task.row].anchor;
    float tile_sum[std::max(kTileRows, 4 * kNTXentPadding)];
    std::fill_n(column_sum, run + 16, 0.0f);
    for_pieces(blocks, task.row, task.row + 1, piece, tiles, [&](const Piece& rows) {
      for_pieces(blocks, task.column_begin, task.column_end, width, tiles, [&](const Piece& columns) {
        similarities.make(rows, columns, tile);
        SCAN_FAST_BEST_ISA(nt_xent_exp_sums)
        (tile, rows.size, Similarities::used(columns.size), similarities.ld(columns.size), scale, tile_sum,
         task.symmetric ? column_sum + (columns.begin - column_begin) : nullptr);
        for (int64_t r = 0; r < rows.size; ++r) row_slot[rows.skipped + r] += tile_sum[r];
      });
    });
    if (task.symmetric) {
      std::copy_n(column_sum, column_end - column_begin,
                  partial.get() + task.row * anchors + blocks[task.column_begin].anchor);
    }
  });

  std::vector<double> result(anchors);
  for_each_row(anchors, [&](int64_t anchor) {
    double sum = 0.0;
    for (int64_t slot = 0; slot < slots; ++slot) sum += partial[slot * anchors + anchor];
    result[anchor] = std::log(sum);
  });
  return result;
}

// The same for low temperatures, with a running maximum per row.
std::vector<double> log_negatives_online(const NTXentProblem& problem, const float* unit, bool reduced) {
  const float scale = static_cast<float>(kLog2E / problem.temperature);
  const bool tiles = Similarities::uses_tiles(reduced);
  const int64_t height = tiles ? tile_block(problem.rows(), problem.dim) : kTileRows;
  const int64_t width = tiles ? height : kTileColumns;
  const std::vector<RowBlock> blocks = make_row_blocks(problem, height, tiles ? kNTXentPadding : 1);
  const Similarities similarities(problem, unit, reduced, blocks, /*gathers=*/false);
  const int64_t tile_size = similarities.tile_size(height, width), count = static_cast<int64_t>(blocks.size());
  const Scratch<float> scratch(max_threads() * tile_size);
  std::vector<double> result(problem.local_anchors());

  parallel_for(count, [&](int64_t index, int thread) {
    const RowBlock& block = blocks[index];
    if (block.anchor < 0) return;
    float* tile = scratch.get() + thread * tile_size;
    float maximum[std::max(kTileRows, 4 * kNTXentPadding)];
    double sum[std::max(kTileRows, 4 * kNTXentPadding)] = {};
    std::fill_n(maximum, block.size, -kInfinity);
    const Piece rows{index, block.begin, block.size, 0};
    for_pieces(blocks, 0, count, width, tiles, [&](const Piece& columns) {
      similarities.make(rows, columns, tile);
      SCAN_FAST_BEST_ISA(nt_xent_online_sums)
      (tile, rows.size, Similarities::used(columns.size), similarities.ld(columns.size), scale, maximum, sum);
    });
    for (int64_t r = 0; r < block.size; ++r) {
      const double shift = maximum[r] == -kInfinity ? 0.0 : maximum[r];
      result[block.anchor + r] = std::log(sum[r]) + shift / kLog2E - 1.0 / problem.temperature;
    }
  });
  return result;
}

}  // namespace

void nt_xent_normalize_cpu(const NTXentProblem& problem, const float* z0, const float* z1, float* unit,
                           float* inv_norm) {
  const int64_t dim = problem.dim;
  const auto unit_rows = SCAN_FAST_BEST_ISA(nt_xent_unit_rows);
  for (int64_t view = 0; view < 2; ++view) {
    const float* const x = view == 0 ? z0 : z1;
    for_rows(problem.samples, [&](int64_t begin, int64_t end) {
      const int64_t first = view * problem.samples + begin;
      unit_rows(x + begin * dim, end - begin, dim, unit + first * dim, inv_norm + first);
    });
  }
}

void nt_xent_forward_cpu(const NTXentProblem& problem, const float* unit, bool reduced, float* losses,
                         float* shifted_lse) {
  const std::vector<double> log_negatives = problem.temperature >= kFixedShiftTemperature
                                                ? log_negatives_fixed(problem, unit, reduced)
                                                : log_negatives_online(problem, unit, reduced);
  const auto dot = SCAN_FAST_BEST_ISA(nt_xent_dot);
  for_each_row(problem.local_anchors(), [&](int64_t anchor) {
    const int64_t view = anchor / problem.sample_count;
    const int64_t row = view * problem.samples + problem.sample_begin + anchor % problem.sample_count;
    const float* positive = unit + positive_of(problem, row) * problem.dim;
    const double shifted = (dot(unit + row * problem.dim, positive, problem.dim) - 1.0) / problem.temperature;
    const double loss = softplus(log_negatives[anchor] - shifted);
    losses[anchor] = static_cast<float>(loss);
    shifted_lse[anchor] = static_cast<float>(loss + shifted);
  });
}

void nt_xent_backward_cpu(const NTXentProblem& problem, const float* unit, const float* inv_norm, const float* losses,
                          const float* shifted_lse, const float* grad_losses, bool reduced, float* grad_z0,
                          float* grad_z1) {
  const int64_t dim = problem.dim, rows = problem.rows();
  const bool fixed_shift = problem.temperature >= kFixedShiftTemperature;
  const float scale = static_cast<float>(kLog2E / problem.temperature);

  // exp(s_ij - lse_i) g_i = 2^(scale * cos_ij - scale) * weight_i, or with a shift per row 2^(scale * cos_ij - shift_i)
  // g_i. Padded to the width of a tile; the padding is multiplied by zeros only.
  std::vector<float> weight(rows + 16, 0.0f), shift(rows + 16, scale);
  for_each_row(problem.anchors(), [&](int64_t row) {
    const double lse = shifted_lse[row];
    weight[row] = static_cast<float>(fixed_shift ? grad_losses[row] * std::exp(-lse) : grad_losses[row]);
    shift[row] = static_cast<float>((lse + 1.0 / problem.temperature) * kLog2E);
  });

  const int64_t local_rows = 2 * problem.sample_count;
  const bool tiles = Similarities::uses_tiles(reduced);
  const int64_t block = tiles                ? tile_block(local_rows, dim)
                        : local_rows >= 4096 ? kBackwardBlock
                        : local_rows >= 512  ? kBackwardBlock / 2
                                             : kBackwardBlock / 4;
  const std::vector<RowBlock> blocks = make_row_blocks(problem, block, tiles ? kNTXentPadding : 1);
  const Similarities similarities(problem, unit, reduced, blocks, /*gathers=*/true);
  std::vector<int64_t> local, foreign;
  for (size_t b = 0; b < blocks.size(); ++b)
    (blocks[b].local >= 0 ? local : foreign).push_back(static_cast<int64_t>(b));
  const auto piece = [&](int64_t b) { return Piece{b, blocks[b].begin, blocks[b].size, 0}; };
  const int64_t tile_size = similarities.tile_size(block, block);
  const Scratch<float> scratch(max_threads() * tile_size);
  // Rounded weights: once, or as words in both orders.
  const int64_t size16 = similarities.reduced() ? tile_size : similarities.words() ? 2 * tile_size : 0;
  const Scratch<uint16_t> scratch16(max_threads() * size16);

  const auto gradient = [&](int64_t local_row) {
    return local_row < problem.sample_count ? grad_z0 + local_row * dim
                                            : grad_z1 + (local_row - problem.sample_count) * dim;
  };
  std::vector<uint8_t> weighs(blocks.size());
  for (size_t b = 0; b < blocks.size(); ++b) {
    const float* first = weight.data() + blocks[b].begin;
    weighs[b] = std::any_of(first, first + blocks[b].size, [](float w) { return w != 0.0f; });
  }
  const auto has_weight = [&](int64_t x, int64_t y) { return weighs[x] || weighs[y]; };
  const auto make_weights = [&](int64_t of_rows, int64_t of_columns, int thread) {
    const Piece x = piece(of_rows), y = piece(of_columns);
    float* tile = scratch.get() + thread * tile_size;
    const int64_t ld = similarities.ld(y.size), columns = Similarities::used(y.size);
    similarities.make(x, y, tile);
    if (fixed_shift) {
      SCAN_FAST_BEST_ISA(nt_xent_weights)
      (tile, x.size, columns, ld, scale, weight.data() + x.begin, weight.data() + y.begin);
    } else {
      SCAN_FAST_BEST_ISA(nt_xent_shifted_weights)
      (tile, x.size, columns, ld, scale, shift.data() + x.begin, weight.data() + x.begin, shift.data() + y.begin,
       weight.data() + y.begin);
    }
    uint16_t* const tile16 = scratch16.get() + thread * size16;
    if (similarities.reduced()) {
      SCAN_FAST_BEST_ISA(nt_xent_to_bf16)(tile, x.size * ld, tile16);
    } else if (similarities.words()) {
      uint32_t* const across = reinterpret_cast<uint32_t*>(tile16);
      SCAN_FAST_BF16_ISA(nt_xent_pair_weights)
      (tile, x.size, columns, ld, across, across + padded(x.size) * (ld / 2));
    }
  };
  const auto add = [&](int64_t x, int64_t y, bool transposed, float* to, int thread) {
    similarities.apply(scratch.get() + thread * tile_size, scratch16.get() + thread * size16, piece(x), piece(y),
                       transposed, to);
  };

  // The first part of the foreign rows adds to the gradients themselves, the others to slots.
  const int64_t others = static_cast<int64_t>(foreign.size());
  const int64_t parts = std::clamp<int64_t>((rows - local_rows) / kForeignRows, 1, kForeignParts);
  const Scratch<float> slots((parts - 1) * local_rows * dim);
  std::fill_n(slots.get(), (parts - 1) * local_rows * dim, 0.0f);
  parallel_for(static_cast<int64_t>(local.size()) * parts, [&](int64_t index, int thread) {
    const int64_t x = local[index / parts], first = blocks[x].local, part = index % parts;
    float* to = part == 0 ? gradient(first) : slots.get() + ((part - 1) * local_rows + first) * dim;
    if (part == 0) {
      std::fill_n(to, blocks[x].size * dim, 0.0f);
      if (has_weight(x, x)) {
        make_weights(x, x, thread);
        add(x, x, false, to, thread);
      }
    }
    for (int64_t i = others * part / parts; i < others * (part + 1) / parts; ++i) {
      if (!has_weight(x, foreign[i])) continue;
      make_weights(x, foreign[i], thread);
      add(x, foreign[i], false, to, thread);
    }
  });
  for (int64_t part = 1; part < parts; ++part) {
    for_each_row(local_rows, [&](int64_t row) {
      const float* slot = slots.get() + ((part - 1) * local_rows + row) * dim;
      std::transform(slot, slot + dim, gradient(row), gradient(row), std::plus<>());
    });
  }
  // The matches in the order of rounds. A match begins when both blocks have finished their previous ones, which come
  // earlier in the order: the earliest unfinished match never waits, so there is no deadlock.
  const int64_t players = static_cast<int64_t>(local.size());
  struct Match {
    int64_t x, y, x_before, y_before;  // players, and the matches that each must have finished
  };
  std::vector<Match> matches;
  std::vector<int64_t> played(players, 0);
  for (int64_t round = 0; round < tournament_rounds(players); ++round) {
    for (const auto& [x, y] : tournament_round(players, round)) matches.push_back({x, y, played[x]++, played[y]++});
  }
  std::vector<std::atomic<int64_t>> finished(players);
  std::atomic<int64_t> next{0};
  const int64_t count = static_cast<int64_t>(matches.size());
  parallel_for(std::min<int64_t>(max_threads(), count), [&](int64_t, int thread) {
    for (int64_t index = next++; index < count; index = next++) {
      const Match& match = matches[index];
      while (finished[match.x].load(std::memory_order_acquire) != match.x_before) std::this_thread::yield();
      while (finished[match.y].load(std::memory_order_acquire) != match.y_before) std::this_thread::yield();
      const int64_t x = local[match.x], y = local[match.y];
      if (has_weight(x, y)) {
        make_weights(x, y, thread);
        add(x, y, false, gradient(blocks[x].local), thread);
        add(x, y, true, gradient(blocks[y].local), thread);
      }
      finished[match.x].store(match.x_before + 1, std::memory_order_release);
      finished[match.y].store(match.y_before + 1, std::memory_order_release);
    }
  });

  const auto finish_row = SCAN_FAST_BEST_ISA(nt_xent_finish_row);
  for_each_row(2 * problem.sample_count, [&](int64_t local_row) {
    const int64_t view = local_row / problem.sample_count;
    const int64_t row = view * problem.samples + problem.sample_begin + local_row % problem.sample_count;
    const int64_t other = positive_of(problem, row);
    const float *u = unit + row * dim, *u_positive = unit + other * dim;
    double pull = 0.0;
    for (const int64_t anchor : {std::min(row, other), std::max(row, other)}) {
      if (anchor < problem.anchors()) pull += grad_losses[anchor] * std::expm1(-static_cast<double>(losses[anchor]));
    }
    // A row shorter than 1e-12 was divided by that constant, so there is no radial part to subtract.
    const bool radial = !(inv_norm[row] >= static_cast<float>(1.0 / kMinNorm));
    finish_row(u, u_positive, dim, pull, problem.temperature, inv_norm[row], radial, gradient(local_row));
  });
}

}  // namespace scan_fast
