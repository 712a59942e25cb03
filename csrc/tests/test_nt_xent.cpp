// NT-Xent: the tile schedule of the CPU kernel, and the CUDA kernels run on the host, against a double oracle.
#include <algorithm>
#include <set>

#include "check.h"
#include "common/device.h"
#include "nt_xent/cuda_schedule.cuh"
#include "nt_xent/nt_xent.h"
#include "nt_xent/schedule.h"
#include "nt_xent_cases.h"

namespace {

using namespace scan_fast;
using namespace scan_fast::nt_xent_test;

void odd_shapes() {
  emu::options() = {.detect_races = true};
  for (const bool both : {true, false}) {
    for (const auto& [n, d] : std::vector<std::pair<int64_t, int64_t>>{{1, 7}, {3, 1}, {65, 64}, {33, 200}, {5, 130}}) {
      compare(kNTXentPortable, n, d, 0.5, both, false, {0, n}, 3e-6);
      compare(kNTXentPortable, n, d, 0.5, both, true, {0, n}, 2e-3);
    }
  }
}

void several_tiles_and_parts() {
  emu::options() = {.detect_races = true, .seed = 5};
  for (const bool both : {true, false}) {
    compare(kNTXentPortable, 130, 128, 0.1, both, false, {0, 130}, 3e-6);
    compare(kNTXentPortable, 70, 24, 0.1, both, false, {0, 1, 40, 70}, 3e-6);
  }
}

// As an H100 splits the work, and as a GPU with 99 KB of shared memory per block.
void other_gpus() {
  for (const int capability : {90, 86}) {
    emu::options() = {.seed = 7, .multiprocessors = 132, .compute_capability = capability, .device = capability};
    for (const int64_t d : {24, 128, 136}) {
      compare(kNTXentPortable, 130, d, 0.1, true, false, {0, 130}, 3e-6);
      compare(kNTXentPortable, 130, d, 0.1, false, true, {0, 50, 130}, 2e-3);
    }
  }
}

// More dimensions than the registers hold of a gradient, and the upstream gradient of a mean.
void many_dimensions() {
  emu::options() = {.detect_races = true, .seed = 3};
  compare(kNTXentPortable, 33, 129, 0.5, true, false, {0, 33}, 3e-6);
  compare(kNTXentPortable, 70, 260, 0.1, false, true, {0, 20, 70}, 2e-3);
  emu::options() = {};
  compare(kNTXentPortable, 5, 2048, 0.2, true, false, {0, 5}, 3e-6);
  compare(kNTXentPortable, 66, 136, 0.02, true, false, {0, 66}, 3e-6);
}

// Rows that are not whole vectors of 4, also of more than 128 and of more than 512 dimensions; rows of several parts;
// and 1,024 dimensions, which fill the registers.
void rows_of_any_length() {
  emu::options() = {.detect_races = true, .seed = 12};
  for (const int64_t d : {1, 3, 4, 126, 127, 132, 512}) compare(kNTXentPortable, 9, d, 0.3, true, false, {0, 9}, 3e-6);
  for (const int64_t d : {513, 516, 1100}) compare(kNTXentPortable, 3, d, 0.3, false, false, {0, 3}, 3e-6);
}

// Inputs and results at addresses that are no multiples of 16.
void unaligned_rows() {
  emu::options() = {};
  const int64_t n = 9, d = 8;
  const NTXentProblem problem{n, d, 0.2, true, 0, n};
  check::Random random{5};
  std::vector<float> z(2 * n * d + 1), upstream(2 * n, 1.0f), losses(2 * n), lse(2 * n), inv_norm(2 * n);
  for (float& x : z) x = static_cast<float>(random.normal());
  std::vector<std::vector<float>> results;
  for (const int64_t shift : {0, 1}) {
    std::vector<float> in(2 * n * d + shift), unit(2 * n * d + shift), out(2 * n * d + shift);
    std::copy_n(z.begin(), 2 * n * d, in.begin() + shift);
    const Buffer forward(nt_xent_forward_cuda_workspace(problem, false));
    nt_xent_forward_cuda(problem, &in[shift], &in[shift + n * d], DType::kFloat32, false, losses.data(), lse.data(),
                         &unit[shift], inv_norm.data(), forward.aligned, nullptr);
    const Buffer backward(nt_xent_backward_cuda_workspace(problem, false));
    nt_xent_backward_cuda(problem, &unit[shift], inv_norm.data(), losses.data(), lse.data(), {upstream.data(), 1},
                          DType::kFloat32, false, &out[shift], &out[shift + n * d], backward.aligned, nullptr);
    std::vector<float> result(out.begin() + shift, out.end());
    result.insert(result.end(), losses.begin(), losses.end());
    results.push_back(result);
  }
  for (size_t i = 0; i < results[0].size(); ++i) CHECK_NEAR(results[1][i], results[0][i], 1e-6);
}

void wide_outer_tiles() {
  // On one processor there are enough tiles for outer_tiles of 128 rows; 16-bit products only.
  emu::options() = {.detect_races = true, .seed = 4, .multiprocessors = 1};
  for (const bool both : {true, false}) {
    compare(kNTXentPortable, 200, 24, 0.1, both, true, {0, 200}, 2e-3);
    compare(kNTXentPortable, 150, 130, 0.1, both, true, {0, 10, 150}, 2e-3);
  }
}

void one_gradient_for_all_losses() {
  emu::options() = {.detect_races = true};
  const int64_t n = 20, d = 12;
  const NTXentProblem problem{n, d, 0.2, true, 0, n};
  check::Random random{6};
  std::vector<float> z0(n * d), z1(n * d), losses(2 * n), lse(2 * n), unit(2 * n * d), inv_norm(2 * n);
  for (float& x : z0) x = static_cast<float>(random.normal());
  for (float& x : z1) x = static_cast<float>(random.normal());
  const Buffer forward(nt_xent_forward_cuda_workspace(problem, false));
  nt_xent_forward_cuda(problem, z0.data(), z1.data(), DType::kFloat32, false, losses.data(), lse.data(), unit.data(),
                       inv_norm.data(), forward.aligned, nullptr);
  const std::vector<float> one(1, -1.5f), each(2 * n, -1.5f);
  std::vector<float> by_one(2 * n * d, NAN), by_each(2 * n * d, NAN);
  const auto backward = [&](const NTXentUpstream& upstream, std::vector<float>& out) {
    const Buffer workspace(nt_xent_backward_cuda_workspace(problem, false));
    nt_xent_backward_cuda(problem, unit.data(), inv_norm.data(), losses.data(), lse.data(), upstream, DType::kFloat32,
                          false, out.data(), out.data() + n * d, workspace.aligned, nullptr);
  };
  backward({one.data(), 0}, by_one);
  backward({each.data(), 1}, by_each);
  CHECK(by_one == by_each);
}

// More outer tiles than one launch has slots for: the sums so far are kept between launches.
void several_rounds() {
  emu::options() = {.multiprocessors = 40};
  const int64_t n = 2060, d = 3;
  const NTXentProblem problem{n, d, 0.5, true, 0, n};
  check::Random random{8};
  std::vector<float> z0(n * d), z1(n * d), losses(2 * n, NAN), lse(2 * n, NAN), unit(2 * n * d), inv_norm(2 * n);
  for (float& x : z0) x = static_cast<float>(random.normal());
  for (float& x : z1) x = static_cast<float>(random.normal());
  const Buffer workspace(nt_xent_forward_cuda_workspace(problem, false));
  nt_xent_forward_cuda(problem, z0.data(), z1.data(), DType::kFloat32, false, losses.data(), lse.data(), unit.data(),
                       inv_norm.data(), workspace.aligned, nullptr);
  for (int64_t i = 0; i < 2 * n; i += 13) {
    double sum = 0, positive = 0;
    for (int64_t j = 0; j < 2 * n; ++j) {
      double s = 0;
      for (int64_t k = 0; k < d; ++k) s += 2.0 * unit[i * d + k] * unit[j * d + k];
      if (j == (i + n) % (2 * n)) positive = s;
      if (j != i) sum += std::exp(s);
    }
    CHECK_NEAR(losses[i], std::log(sum) - positive, 2e-5);
  }
}

// Every pair of an anchor and another row in exactly one tile, and every slot of a row written once and read once.
template <int kInnerRows>
void forward_schedule_covers_every_tile_once(const std::vector<int>& outer_widths) {
  for (const int64_t anchors : {1, 64, 65, 200, 700}) {
    for (const int64_t others : {0, 1, 130}) {
      for (const int width : outer_widths) {
        for (const int64_t max_blocks : {1, 7, 40, 1000}) {
          const int64_t outer_tiles = (anchors + width - 1) / width;
          std::set<std::pair<int64_t, int64_t>> met;  // (outer tile, inner tile)
          for (int64_t begin = 0; begin < outer_tiles; begin += 3) {
            const int64_t end = std::min(outer_tiles, begin + 3);
            const auto s = make_forward_schedule<kInnerRows>(anchors, others, width, begin, end, max_blocks);
            std::set<std::pair<int64_t, int64_t>> written;  // (slot, inner tile of the row)
            const auto write = [&](int64_t slot, int64_t tile) {
              CHECK(0 <= slot && slot < s.slots());
              CHECK(written.emplace(slot, tile).second);
            };
            CHECK(s.block_begin(0) == 0 && s.block_begin(s.blocks) == s.total() && s.prefix(end) == s.total());
            for (int64_t block = 0; block < s.blocks; ++block) {
              int64_t next = s.block_begin(block);
              CHECK(next < s.block_begin(block + 1));
              for (int64_t outer = s.outer_of(next); next < s.block_begin(block + 1); ++outer) {
                CHECK(begin <= outer && outer < end);
                const int64_t from = next - s.prefix(outer);
                const int64_t tiles = std::min(s.block_begin(block + 1) - next, s.length(outer) - from);
                CHECK(tiles > 0 && from >= 0);
                for (int64_t t = from; t < from + tiles; ++t) {
                  const int64_t inner = s.first_inner(outer) + t;
                  CHECK(inner < s.anchor_tiles + s.other_tiles);
                  CHECK(met.emplace(outer, inner).second);
                  if (inner < s.anchor_tiles && t >= width / kInnerRows) write(s.transposed_slot(outer), inner);
                }
                for (int64_t tile = s.first_inner(outer); tile < s.first_inner(outer + 1); ++tile) {
                  write(s.segment_slot(outer, block), tile);
                }
                next += tiles;
              }
            }
            // The last outer's second half may hold no anchors: its sums are made, and nobody reads them.
            std::set<std::pair<int64_t, int64_t>> read;
            for (int64_t tile = 0; tile < s.anchor_tiles; ++tile) {
              const int outer = static_cast<int>(tile * kInnerRows / width);
              for (int k = 0; k < s.transposed_slots(outer); ++k) {
                CHECK(read.emplace(s.segment_slots + k, tile).second);
              }
              for (int k = 0; k < s.own_segments(outer); ++k) CHECK(read.emplace(k, tile).second);
            }
            for (auto it = written.begin(); it != written.end();) {
              it = it->second >= s.anchor_tiles ? written.erase(it) : std::next(it);
            }
            CHECK(read == written);
          }
          for (int64_t outer = 0; outer < outer_tiles; ++outer) {
            const int64_t tiles = (anchors + kInnerRows - 1) / kInnerRows;
            const int64_t all = tiles + (others + kInnerRows - 1) / kInnerRows;
            for (int64_t inner = 0; inner < all; ++inner) {
              CHECK(met.count({outer, inner}) == (inner >= outer * (width / kInnerRows) ? 1u : 0u));
            }
          }
        }
      }
    }
  }
}
void forward_schedules_cover_every_tile_once() {
  forward_schedule_covers_every_tile_once<64>({64, 128});
  forward_schedule_covers_every_tile_once<128>({128});
}

void low_temperatures() {
  emu::options() = {};
  for (const double temperature : {0.0301, 0.02, 0.005}) {
    compare(kNTXentPortable, 40, 48, temperature, true, false, {0, 40}, 3e-6);
  }
}

// Samples that nobody handles, with zeros for the gradient, loss and lse of their anchors.
void queue_of_negatives() {
  emu::options() = {.detect_races = true, .seed = 11};
  for (const bool both : {true, false}) {
    for (const double temperature : {0.5, 0.02, 0.005}) {
      compare(kNTXentPortable, 100, 24, temperature, both, false, {0, 30}, 3e-6);
    }
    compare(kNTXentPortable, 90, 136, 0.1, both, false, {0, 10, 21}, 3e-6);
    compare(kNTXentPortable, 66, 260, 0.02, both, false, {0, 5}, 3e-6);
    compare(kNTXentPortable, 150, 40, 0.1, both, true, {0, 64}, 2e-3);
  }
}

void repeated_runs_give_the_same_bits() {
  const int64_t n = 70, d = 40;
  const NTXentProblem problem{n, d, 0.1, true, 0, n};
  check::Random random{9};
  std::vector<float> z0(n * d), z1(n * d), upstream(2 * n, 1.0f);
  for (float& x : z0) x = static_cast<float>(random.normal());
  for (float& x : z1) x = static_cast<float>(random.normal());
  std::vector<float> first;
  for (const uint64_t seed : {0, 1, 2}) {
    emu::options() = {.detect_races = false, .seed = seed};  // permutes blocks and threads
    std::vector<float> losses(2 * n), lse(2 * n), unit(2 * n * d), inv_norm(2 * n), out(2 * n * d);
    const Buffer forward(nt_xent_forward_cuda_workspace(problem, false));
    nt_xent_forward_cuda(problem, z0.data(), z1.data(), DType::kFloat32, false, losses.data(), lse.data(), unit.data(),
                         inv_norm.data(), forward.aligned, nullptr);
    const Buffer backward(nt_xent_backward_cuda_workspace(problem, false));
    nt_xent_backward_cuda(problem, unit.data(), inv_norm.data(), losses.data(), lse.data(), {upstream.data(), 1},
                          DType::kFloat32, false, out.data(), out.data() + n * d, backward.aligned, nullptr);
    out.insert(out.end(), losses.begin(), losses.end());
    if (first.empty()) first = out;
    CHECK(out == first);
  }
}

template <typename T>
void sixteen_bit(DType dtype) {
  emu::options() = {};
  const int64_t n = 20, d = 16;
  const NTXentProblem problem{n, d, 0.2, true, 0, n};
  check::Random random{4};
  std::vector<float> z0(n * d), z1(n * d), upstream(2 * n, 1.0f);
  for (float& x : z0) x = to_float(from_float<T>(static_cast<float>(random.normal())));
  for (float& x : z1) x = to_float(from_float<T>(static_cast<float>(random.normal())));
  const Result expected = oracle(z0, z1, n, d, 0.2, true, upstream);
  const std::vector<T> t0 = converted<T>(z0), t1 = converted<T>(z1);
  std::vector<float> losses(2 * n), lse(2 * n), unit(2 * n * d), inv_norm(2 * n);
  std::vector<T> grad_z0(n * d), grad_z1(n * d);
  const Buffer forward(nt_xent_forward_cuda_workspace(problem, false));
  nt_xent_forward_cuda(problem, t0.data(), t1.data(), dtype, false, losses.data(), lse.data(), unit.data(),
                       inv_norm.data(), forward.aligned, nullptr);
  const Buffer backward(nt_xent_backward_cuda_workspace(problem, false));
  nt_xent_backward_cuda(problem, unit.data(), inv_norm.data(), losses.data(), lse.data(), {upstream.data(), 1}, dtype,
                        false, grad_z0.data(), grad_z1.data(), backward.aligned, nullptr);
  for (int64_t i = 0; i < 2 * n; ++i) CHECK_NEAR(losses[i], expected.losses[i], 2e-5);
  for (int64_t i = 0; i < n * d; ++i) {
    CHECK_NEAR(to_float(grad_z0[i]), expected.grad_z0[i], 1e-4 + std::fabs(expected.grad_z0[i]) / 200);
    CHECK_NEAR(to_float(grad_z1[i]), expected.grad_z1[i], 1e-4 + std::fabs(expected.grad_z1[i]) / 200);
  }
}
void half_inputs() { sixteen_bit<half_t>(DType::kFloat16); }
void bfloat16_inputs() { sixteen_bit<bf16_t>(DType::kBFloat16); }

void unusual_rows() {
  emu::options() = {};
  const int64_t n = 6, d = 5;
  const NTXentProblem problem{n, d, 0.3, true, 0, n};
  std::vector<float> losses(2 * n), lse(2 * n), unit(2 * n * d), inv_norm(2 * n), z1(n * d);
  check::Random random{2};
  for (float& x : z1) x = static_cast<float>(random.normal());
  const auto forward = [&](const std::vector<float>& z0) {
    const Buffer workspace(nt_xent_forward_cuda_workspace(problem, false));
    nt_xent_forward_cuda(problem, z0.data(), z1.data(), DType::kFloat32, false, losses.data(), lse.data(), unit.data(),
                         inv_norm.data(), workspace.aligned, nullptr);
    return losses;
  };
  std::vector<float> huge = z1, tiny = z1, zero = z1, bad = z1;
  for (float& x : huge) x *= 1e37f;
  for (float& x : tiny) x *= 1e-11f;
  std::fill_n(zero.begin(), d, 0.0f);
  bad[7] = NAN;
  const std::vector<float> plain = forward(z1), of_huge = forward(huge), of_tiny = forward(tiny);
  for (int64_t i = 0; i < 2 * n; ++i) {
    CHECK_NEAR(of_huge[i], plain[i], 1e-5);
    CHECK_NEAR(of_tiny[i], plain[i], 1e-5);
  }
  const Result expected = oracle(zero, z1, n, d, 0.3, true, std::vector<float>(2 * n, 1.0f));
  const std::vector<float> of_zero = forward(zero), of_bad = forward(bad);
  for (int64_t i = 0; i < 2 * n; ++i) {
    CHECK_NEAR(of_zero[i], expected.losses[i], 1e-5);
    CHECK(std::isnan(of_bad[i]));
  }
}

// Exponentials of which every fourth is a polynomial: tiles of both widths up to 64 dimensions, and low temperatures.
void exponentials_by_polynomial() {
  for (const int multiprocessors : {1, 132}) {
    emu::options() = {.detect_races = true, .seed = 13, .multiprocessors = multiprocessors};
    exact_products(kNTXentPortable, 200, 64, 0.1);
    exact_products(kNTXentPortable, 70, 16, 0.5);
    exact_products(kNTXentPortable, 70, 64, 0.02);
    for (const int64_t row : {0, 3, 69}) nan_row(kNTXentPortable, 70, 20, 0.1, row);
  }
  emu::options() = {};
  for (const double temperature : {0.0301, 0.02, 0.005}) {
    compare(kNTXentPortable, 70, 48, temperature, true, true, {0, 70}, 2e-3);
  }
}

// Every ordered pair (anchor, other row) is served exactly once, and nothing else is.
void forward_tasks_cover_every_pair_once() {
  for (const int64_t n : {1, 5, 17, 40}) {
    for (const bool both : {true, false}) {
      for (const auto& [begin, end] :
           std::vector<std::pair<int64_t, int64_t>>{{0, n}, {n / 3, n}, {n / 3, n / 3 + 1}}) {
        const NTXentProblem problem{n, 1, 1.0, both, begin, end - begin};
        const std::vector<RowBlock> blocks = make_row_blocks(problem, 4);
        std::vector<int> served(4 * n * n, 0);
        std::set<std::pair<int64_t, int64_t>> slots;  // (slot, anchor) written, each by one task only
        for (const ForwardTask& task : make_forward_tasks(blocks, 12)) {
          const RowBlock& rows = blocks[task.row];
          for (int64_t i = rows.begin; i < rows.begin + rows.size; ++i) {
            CHECK(slots.emplace(task.column_begin, rows.anchor + i - rows.begin).second);
            for (int64_t c = task.column_begin; c < task.column_end; ++c) {
              for (int64_t j = blocks[c].begin; j < blocks[c].begin + blocks[c].size; ++j) {
                ++served[i * 2 * n + j];
                if (task.symmetric) ++served[j * 2 * n + i];
              }
            }
          }
          if (!task.symmetric) continue;
          for (int64_t c = task.column_begin; c < task.column_end; ++c) {
            for (int64_t j = 0; j < blocks[c].size; ++j) {
              CHECK(slots.emplace(task.row, blocks[c].anchor + j).second);
              // The kernel writes a run's column sums to consecutive anchors.
              CHECK(blocks[c].anchor - blocks[task.column_begin].anchor ==
                    blocks[c].begin - blocks[task.column_begin].begin);
            }
          }
        }
        for (int64_t i = 0; i < 2 * n; ++i) {
          const int64_t sample = i % n;
          const int wanted = sample >= begin && sample < end && (both || i < n) ? 1 : 0;
          for (int64_t j = 0; j < 2 * n; ++j) CHECK(served[i * 2 * n + j] == wanted);
        }
      }
    }
  }
}

void tournaments_pair_everybody_once() {
  for (int64_t players = 0; players < 20; ++players) {
    std::set<std::pair<int64_t, int64_t>> met;
    for (int64_t round = 0; round < tournament_rounds(players); ++round) {
      std::set<int64_t> busy;
      for (const auto& [x, y] : tournament_round(players, round)) {
        CHECK(0 <= x && x < y && y < players);
        CHECK(busy.insert(x).second && busy.insert(y).second);
        CHECK(met.emplace(x, y).second);
      }
    }
    CHECK(static_cast<int64_t>(met.size()) == players * (players - 1) / 2);
  }
}

}  // namespace

int main() {
  RUN(forward_tasks_cover_every_pair_once);
  RUN(tournaments_pair_everybody_once);
  RUN(forward_schedules_cover_every_tile_once);
  RUN(odd_shapes);
  RUN(several_tiles_and_parts);
  RUN(other_gpus);
  RUN(many_dimensions);
  RUN(rows_of_any_length);
  RUN(unaligned_rows);
  RUN(wide_outer_tiles);
  RUN(one_gradient_for_all_losses);
  RUN(several_rounds);
  RUN(low_temperatures);
  RUN(queue_of_negatives);
  RUN(repeated_runs_give_the_same_bits);
  RUN(half_inputs);
  RUN(bfloat16_inputs);
  RUN(unusual_rows);
  RUN(exponentials_by_polynomial);
  return check::finish();
}
