// CPU kernel of NT-Xent: threads process tiles; a tile is one matrix product and one fused pass of exponentials.
//
// Forward: rows are divided into blocks, and a task is one block against a run of blocks. Its similarities are computed
// in tiles of 128 x 512 that stay in the L2 cache. Each exponential is added to its row and its column (upper triangle
// only). Each task writes row and column sums to separate slots, which are added in a fixed order at the end.
// Backward: W is symmetric, so each tile is computed once and used twice: dZ_I += W Z_J and dZ_J += W^T Z_I. The
// tournament of schedule.h makes this safe and deterministic without a slot per task: no gradient block is in two tasks
// of a round. Rows of other ranks and of a queue need no gradient here; many of them are divided among several tasks per
// block, each with a slot. Tiles of rows without an upstream gradient are skipped.
// Cost: 2 (M^2 D + 3 M^2 D) flops and M^2 exponentials. Plain PyTorch needs 6 M^2 D and 2 M^2, with about twelve passes
// over an M x M matrix. On AVX-512 cores the kernel runs at nearly the rate of the matrix product alone.
// Memory: the slots (M * min(M / 128, 64) floats) and one tile per thread.
//
// One shift, 1/tau, serves every row if exp(-2/tau) is a normal float32. For lower temperatures the forward pass keeps
// a running maximum per row (full matrix, no triangle) and the backward pass shifts rows and columns by their own lse.
// Below about 1e-5 the float32 rounding of the cosines, divided by tau, decides which negative dominates; results stay
// finite.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "common/cpu_gemm.h"
#include "common/parallel.h"
#include "nt_xent/nt_xent.h"
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

double dot(const float* x, const float* y, int64_t count) {
  double sum = 0.0;
  for (int64_t k = 0; k < count; ++k) sum += static_cast<double>(x[k]) * y[k];
  return sum;
}

// Rows per task in the passes that are linear in M.
constexpr int64_t kRowsPerTask = 64;

void for_each_row(int64_t rows, const std::function<void(int64_t)>& body) {
  parallel_for((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    const int64_t end = std::min(rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) body(row);
  });
}

int64_t positive_of(const NTXentProblem& p, int64_t row) { return row < p.samples ? row + p.samples : row - p.samples; }

// log(1 + exp(x)): the loss of an anchor if log(sum of negatives) exceeds the positive by x.
double softplus(double x) { return x > 0.0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

// Unit rows in the precision of the products, and tiles of similarities computed from them.
class Similarities {
 public:
  Similarities(const NTXentProblem& problem, const float* unit, bool reduced)
      : problem_(problem), unit_(unit), reduced_(reduced && cpu_gemm_has_bf16()) {
    if (!reduced_) return;
    const int64_t dim = problem.dim;
    rounded_.reset(new uint16_t[problem.rows() * dim]);
    for_each_row(problem.rows(), [&](int64_t row) {
      SCAN_FAST_BEST_ISA(nt_xent_to_bf16)(unit_ + row * dim, dim, rounded_.get() + row * dim);
    });
  }

  bool reduced() const { return reduced_; }
  static int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16; }

  // tile (rows x columns, ld = padded(columns)) = the cosines. The diagonal, positive pairs and padding are -infinity.
  void make(int64_t row, int64_t rows, int64_t column, int64_t columns, float* tile) const {
    const int64_t dim = problem_.dim, ld = padded(columns);
    if (reduced_) {
      gemm_nt_bf16(rows, columns, dim, 1.0f, rounded_.get() + row * dim, dim, rounded_.get() + column * dim, dim, 0.0f,
                   tile, ld);
    } else {
      gemm_nt(rows, columns, dim, 1.0f, unit_ + row * dim, dim, unit_ + column * dim, dim, 0.0f, tile, ld);
    }
    for (int64_t i = 0; i < rows; ++i) {
      float* values = tile + i * ld;
      for (const int64_t masked : {row + i, positive_of(problem_, row + i)}) {
        if (masked >= column && masked < column + columns) values[masked - column] = -kInfinity;
      }
      for (int64_t j = columns; j < ld; ++j) values[j] = -kInfinity;
    }
  }

  // to (rows x D) += W Z_columns; with `transposed`, to (columns x D) += W^T Z_rows.
  void apply(const float* tile, const uint16_t* tile16, int64_t rows, int64_t columns, int64_t from, bool transposed,
             float* to) const {
    const int64_t dim = problem_.dim, ld = padded(columns);
    const int64_t m = transposed ? columns : rows, k = transposed ? rows : columns;
    if (reduced_) {
      (transposed ? gemm_tn_bf16 : gemm_nn_bf16)(m, dim, k, 1.0f, tile16, ld, rounded_.get() + from * dim, dim, 1.0f,
                                                 to, dim);
    } else {
      (transposed ? gemm_tn : gemm_nn)(m, dim, k, 1.0f, tile, ld, unit_ + from * dim, dim, 1.0f, to, dim);
    }
  }

 private:
  const NTXentProblem& problem_;
  const float* unit_;
  bool reduced_;
  std::unique_ptr<uint16_t[]> rounded_;
};

// Computes log of the sum over the negatives of exp(s_ij - 1/tau) per anchor, with one shift for all rows.
std::vector<double> log_negatives_fixed(const NTXentProblem& problem, const Similarities& similarities) {
  const float scale = static_cast<float>(kLog2E / problem.temperature);
  const int64_t block = kTileRows * std::max<int64_t>(1, (problem.rows() + 8191) / 8192);
  const std::vector<RowBlock> blocks = make_row_blocks(problem, block);
  const int64_t run = std::max(block, kTileColumns);
  const std::vector<ForwardTask> tasks = make_forward_tasks(blocks, run);
  const int64_t anchors = problem.local_anchors(), slots = static_cast<int64_t>(blocks.size());
  std::vector<float> partial(slots * anchors, 0.0f);
  const int64_t tile_size = kTileRows * kTileColumns, scratch_size = tile_size + run + 16;
  std::vector<float> scratch(max_threads() * scratch_size);

  parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t index, int thread) {
    const ForwardTask& task = tasks[index];
    const RowBlock& rows = blocks[task.row];
    float* tile = scratch.data() + thread * scratch_size;
    float* column_sum = tile + tile_size;
    const int64_t column_begin = blocks[task.column_begin].begin;
    const int64_t column_end = blocks[task.column_end - 1].begin + blocks[task.column_end - 1].size;
    float* row_slot = partial.data() + task.column_begin * anchors + rows.anchor;
    float tile_sum[kTileRows];
    std::fill_n(column_sum, run + 16, 0.0f);
    for (int64_t i = 0; i < rows.size; i += kTileRows) {
      const int64_t height = std::min(kTileRows, rows.size - i);
      for (int64_t j = column_begin; j < column_end; j += kTileColumns) {
        const int64_t width = std::min(kTileColumns, column_end - j), ld = Similarities::padded(width);
        similarities.make(rows.begin + i, height, j, width, tile);
        SCAN_FAST_BEST_ISA(nt_xent_exp_sums)
        (tile, height, ld, ld, scale, tile_sum, task.symmetric ? column_sum + (j - column_begin) : nullptr);
        for (int64_t r = 0; r < height; ++r) row_slot[i + r] += tile_sum[r];
      }
    }
    if (task.symmetric) {
      std::copy_n(column_sum, column_end - column_begin,
                  partial.data() + task.row * anchors + blocks[task.column_begin].anchor);
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
std::vector<double> log_negatives_online(const NTXentProblem& problem, const Similarities& similarities) {
  const float scale = static_cast<float>(kLog2E / problem.temperature);
  const std::vector<RowBlock> blocks = make_row_blocks(problem, kTileRows);
  std::vector<RowBlock> anchors;
  std::copy_if(blocks.begin(), blocks.end(), std::back_inserter(anchors), [](auto& b) { return b.anchor >= 0; });
  std::vector<float> scratch(max_threads() * kTileRows * kTileColumns);
  std::vector<double> result(problem.local_anchors());

  parallel_for(static_cast<int64_t>(anchors.size()), [&](int64_t index, int thread) {
    const RowBlock& rows = anchors[index];
    float* tile = scratch.data() + thread * kTileRows * kTileColumns;
    float maximum[kTileRows];
    double sum[kTileRows] = {};
    std::fill_n(maximum, kTileRows, -kInfinity);
    for (int64_t j = 0; j < problem.rows(); j += kTileColumns) {
      const int64_t width = std::min(kTileColumns, problem.rows() - j), ld = Similarities::padded(width);
      similarities.make(rows.begin, rows.size, j, width, tile);
      SCAN_FAST_BEST_ISA(nt_xent_online_sums)(tile, rows.size, ld, ld, scale, maximum, sum);
    }
    for (int64_t r = 0; r < rows.size; ++r) {
      const double shift = maximum[r] == -kInfinity ? 0.0 : maximum[r];
      result[rows.anchor + r] = std::log(sum[r]) + shift / kLog2E - 1.0 / problem.temperature;
    }
  });
  return result;
}

}  // namespace

void nt_xent_normalize_cpu(const NTXentProblem& problem, const float* z0, const float* z1, float* unit,
                           float* inv_norm) {
  for_each_row(problem.rows(), [&](int64_t row) {
    const float* x = row < problem.samples ? z0 + row * problem.dim : z1 + (row - problem.samples) * problem.dim;
    // In double, so that neither huge nor tiny rows lose their direction. This order of arguments lets NaN through
    // max().
    const double norm = std::max(std::sqrt(dot(x, x, problem.dim)), kMinNorm);
    for (int64_t k = 0; k < problem.dim; ++k) unit[row * problem.dim + k] = static_cast<float>(x[k] / norm);
    inv_norm[row] = static_cast<float>(1.0 / norm);
  });
}

void nt_xent_forward_cpu(const NTXentProblem& problem, const float* unit, bool reduced, float* losses,
                         float* shifted_lse) {
  const Similarities similarities(problem, unit, reduced);
  const std::vector<double> log_negatives = problem.temperature >= kFixedShiftTemperature
                                                ? log_negatives_fixed(problem, similarities)
                                                : log_negatives_online(problem, similarities);
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
  const Similarities similarities(problem, unit, reduced);
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
  const int64_t block = local_rows >= 4096  ? kBackwardBlock
                        : local_rows >= 512 ? kBackwardBlock / 2
                                            : kBackwardBlock / 4;
  const std::vector<RowBlock> blocks = make_row_blocks(problem, block);
  std::vector<RowBlock> local, foreign;
  for (const RowBlock& b : blocks) (b.local >= 0 ? local : foreign).push_back(b);
  const int64_t tile_size = kBackwardBlock * kBackwardBlock;
  std::vector<float> scratch(max_threads() * tile_size);
  std::vector<uint16_t> scratch16(similarities.reduced() ? max_threads() * tile_size : 0);

  const auto gradient = [&](int64_t local_row) {
    return local_row < problem.sample_count ? grad_z0 + local_row * dim
                                            : grad_z1 + (local_row - problem.sample_count) * dim;
  };
  const auto weighs = [&](const RowBlock& x) {
    const float* first = weight.data() + x.begin;
    return std::any_of(first, first + x.size, [](float w) { return w != 0.0f; });
  };
  const auto has_weight = [&](const RowBlock& x, const RowBlock& y) { return weighs(x) || weighs(y); };
  const auto make_weights = [&](const RowBlock& x, const RowBlock& y, int thread) {
    float* tile = scratch.data() + thread * tile_size;
    const int64_t ld = Similarities::padded(y.size);
    similarities.make(x.begin, x.size, y.begin, y.size, tile);
    if (fixed_shift) {
      SCAN_FAST_BEST_ISA(nt_xent_weights)
      (tile, x.size, ld, ld, scale, weight.data() + x.begin, weight.data() + y.begin);
    } else {
      SCAN_FAST_BEST_ISA(nt_xent_shifted_weights)
      (tile, x.size, ld, ld, scale, shift.data() + x.begin, weight.data() + x.begin, shift.data() + y.begin,
       weight.data() + y.begin);
    }
    if (similarities.reduced()) {
      SCAN_FAST_BEST_ISA(nt_xent_to_bf16)(tile, x.size * ld, scratch16.data() + thread * tile_size);
    }
  };
  const auto add = [&](const RowBlock& x, const RowBlock& y, bool transposed, float* to, int thread) {
    similarities.apply(scratch.data() + thread * tile_size, scratch16.data() + thread * tile_size, x.size, y.size,
                       transposed ? x.begin : y.begin, transposed, to);
  };

  // The first part of the foreign rows adds to the gradients themselves, the others to slots.
  const int64_t others = static_cast<int64_t>(foreign.size());
  const int64_t parts = std::clamp<int64_t>((rows - local_rows) / kForeignRows, 1, kForeignParts);
  std::vector<float> slots((parts - 1) * local_rows * dim, 0.0f);
  parallel_for(static_cast<int64_t>(local.size()) * parts, [&](int64_t index, int thread) {
    const RowBlock& x = local[index / parts];
    const int64_t part = index % parts;
    float* to = part == 0 ? gradient(x.local) : slots.data() + ((part - 1) * local_rows + x.local) * dim;
    if (part == 0) {
      std::fill_n(to, x.size * dim, 0.0f);
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
      const float* slot = slots.data() + ((part - 1) * local_rows + row) * dim;
      std::transform(slot, slot + dim, gradient(row), gradient(row), std::plus<>());
    });
  }
  const int64_t players = static_cast<int64_t>(local.size());
  for (int64_t round = 0; round < tournament_rounds(players); ++round) {
    const auto pairs = tournament_round(players, round);
    parallel_for(static_cast<int64_t>(pairs.size()), [&](int64_t index, int thread) {
      const RowBlock &x = local[pairs[index].first], &y = local[pairs[index].second];
      if (!has_weight(x, y)) return;
      make_weights(x, y, thread);
      add(x, y, false, gradient(x.local), thread);
      add(x, y, true, gradient(y.local), thread);
    });
  }

  for_each_row(2 * problem.sample_count, [&](int64_t local_row) {
    const int64_t view = local_row / problem.sample_count;
    const int64_t row = view * problem.samples + problem.sample_begin + local_row % problem.sample_count;
    const int64_t other = positive_of(problem, row);
    const float *u = unit + row * dim, *u_positive = unit + other * dim;
    double pull = 0.0;
    for (const int64_t anchor : {std::min(row, other), std::max(row, other)}) {
      if (anchor < problem.anchors()) pull += grad_losses[anchor] * std::expm1(-static_cast<double>(losses[anchor]));
    }
    float* gradient_row = gradient(local_row);
    double radial = 0.0;
    for (int64_t k = 0; k < dim; ++k) {
      const double value = (gradient_row[k] + pull * u_positive[k]) / problem.temperature;
      gradient_row[k] = static_cast<float>(value);
      radial += value * u[k];
    }
    // A row shorter than 1e-12 was divided by that constant, so there is no radial part to subtract.
    if (inv_norm[row] >= static_cast<float>(1.0 / kMinNorm)) radial = 0.0;
    for (int64_t k = 0; k < dim; ++k) {
      gradient_row[k] = static_cast<float>((gradient_row[k] - radial * u[k]) * inv_norm[row]);
    }
  });
}

}  // namespace scan_fast
