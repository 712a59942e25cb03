// Host form of the device layer: it computes what a GPU computes, and detects errors that a GPU does not.
#include "check.h"
#include "common/device.h"
#include "device_layer_kernels.h"

namespace {

using namespace scan_fast;
using namespace scan_fast::device_layer_test;

void block_sums() {
  check::Random random{1};
  for (const int threads : {32, 64, 256, 1024}) {
    for (const uint64_t seed : {0, 1, 2}) {
      emu::options() = {.detect_races = true, .seed = seed};
      const int blocks = 5, n = 777;
      std::vector<float> x(blocks * n), out(blocks, NAN);
      for (float& value : x) value = static_cast<float>(random.normal());
      block_sum(x.data(), out.data(), blocks, n, threads, Fault::kNone);
      for (int b = 0; b < blocks; ++b) {
        double expected = 0;
        for (int i = 0; i < n; ++i) expected += static_cast<double>(x[b * n + i]);
        CHECK_NEAR(out[b], expected, 1e-3);
      }
    }
  }
}

void faults_are_reported() {
  std::vector<float> x(512, 1.0f), out(2), swapped(32);
  emu::options() = {.detect_races = true};
  CHECK_THROWS(block_sum(x.data(), out.data(), 2, 256, 128, Fault::kNoBarrier), "race on dynamic shared memory");
  CHECK_THROWS(block_sum(x.data(), out.data(), 2, 256, 128, Fault::kEarlyReturn), "has returned");
  CHECK_THROWS(block_sum(x.data(), out.data(), 2, 256, 128, Fault::kPastTheEnd), "falls outside");
  CHECK_THROWS(block_sum(x.data(), out.data(), 2, 256, 2048, Fault::kNone), "1 to 1024 threads");
  CHECK_THROWS(warp_exchange(swapped.data(), false), "race on static shared memory");
  // The machine is usable after an error.
  block_sum(x.data(), out.data(), 2, 256, 128, Fault::kNone);
  CHECK(out[0] == 256.0f && out[1] == 256.0f);
  warp_exchange(swapped.data(), true);
  for (int lane = 0; lane < 32; ++lane) CHECK(swapped[lane] == static_cast<float>(31 - lane));
}

constexpr size_t kKilobyte = 1024, kFixed = 32 * kKilobyte;

// A kernel has 48 KB without a request, static arrays included; above, CUDA refuses the launch. Each GPU needs a
// request.
void shared_memory_is_asked_for() {
  float floats = 0;
  for (const int device : {0, 1}) {
    emu::options() = {.device = device};
    CHECK_THROWS(shared_sizes(&floats, 16 * kKilobyte + 16, false), "more than the 48 KB");
    shared_sizes(&floats, 16 * kKilobyte, false);
    CHECK(floats == 12 * 1024);
    for (const size_t dynamic : {17 * kKilobyte, 32 * kKilobyte, 33 * kKilobyte, 100 * kKilobyte, 4 * kKilobyte}) {
      shared_sizes(&floats, dynamic, true);
      CHECK(floats == static_cast<float>((kFixed + dynamic) / sizeof(float)));
    }
    // A smaller launch takes nothing away from a larger one of another thread.
    shared_sizes(&floats, 100 * kKilobyte, false);
    CHECK_THROWS(shared_sizes(&floats, 101 * kKilobyte, false), "requested 102400 bytes");
  }
}

void shared_memory_of_a_block_ends() {
  const struct {
    int capability;
    size_t kilobytes;
  } gpus[] = {{75, 64}, {80, 163}, {86, 99}, {87, 163}, {89, 99}, {90, 227}, {100, 227}, {120, 99}};
  float floats = 0;
  for (const auto& gpu : gpus) {
    emu::options() = {.compute_capability = gpu.capability, .device = gpu.capability};
    CHECK(compute_capability() == gpu.capability);
    const size_t limit = gpu.kilobytes * kKilobyte;
    CHECK(shared_memory_limit() == limit);
    shared_sizes(&floats, limit - kFixed, true);
    CHECK(floats == static_cast<float>(limit / sizeof(float)));
    CHECK_THROWS(shared_sizes(&floats, limit - kFixed + 16, true), "are more than");
    CHECK_THROWS(shared_sizes(&floats, limit + 16, true), "are requested");
  }
  emu::options() = {.shared_memory = 40 * kKilobyte, .device = 1000};
  CHECK_THROWS(shared_sizes(&floats, 9 * kKilobyte, true), "are more than");
  emu::options() = {.compute_capability = 30};
  CHECK_THROWS(shared_memory_limit(), "compute capability 30");
}

template <typename T>
void matrix_products(DType dtype) {
  check::Random random{7};
  emu::options() = {.detect_races = true};
  for (const bool transposed : {false, true}) {
    alignas(16) T a[256], b[128];
    for (T& value : a) value = from_float<T>(static_cast<float>(random.normal()));
    for (T& value : b) value = from_float<T>(static_cast<float>(random.normal()));
    std::vector<float> out(128, NAN);
    matrix_product(dtype, a, b, out.data(), transposed, true);
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) {
        double expected = 0;
        for (int k = 0; k < 16; ++k) {
          expected += static_cast<double>(to_float(a[i * 16 + k])) *
                      static_cast<double>(to_float(transposed ? b[j * 16 + k] : b[k * 8 + j]));
        }
        CHECK_NEAR(out[i * 8 + j], expected, 1e-5);
      }
    }
    matrix_product(dtype, a, b, out.data(), transposed, false);
    CHECK(std::isnan(out[0]));  // the copies never landed: the tile still holds the poison
  }
}
void matrix_products_half() { matrix_products<half_t>(DType::kFloat16); }
void matrix_products_bf16() { matrix_products<bf16_t>(DType::kBFloat16); }

void warp_collectives() {
  emu::options() = {};
  std::vector<int> out(9 * 32, -1);
  lanes(out.data());
  int thirds = 0;
  for (int l = 0; l < 32; l += 3) thirds |= static_cast<int>(1u << l);
  for (int l = 0; l < 32; ++l) {
    CHECK(out[l] == (l ^ 5));
    CHECK(out[32 + l] == (l + 3 < 32 ? l + 3 : l));
    CHECK(out[64 + l] == (l % 8 >= 3 ? l - 3 : l));
    CHECK(out[96 + l] == (l & 16) + 9);
    CHECK(out[128 + l] == thirds);
    CHECK(out[160 + l] == 1);
    CHECK(out[192 + l] == (l < 16 ? l ^ 1 : l ^ 2));
    CHECK(out[224 + l] == static_cast<int>((1ull << (l < 31 ? l + 1 : 31)) >> 8));
    CHECK(out[256 + l] == 31 + 200 + 32000);
  }
}

void ticket_order() {
  for (const uint64_t seed : {0, 3, 4}) {
    emu::options() = {.detect_races = true, .seed = seed};
    int total = 0, last = 0;
    unsigned ticket = 0;
    tickets(&total, &ticket, &last, 6, 96);
    CHECK(total == 6 * 95 * 96 / 2);
    CHECK(last == 6);
    CHECK(ticket == 6);
  }
}

void chains_of_kernels() {
  float values[64] = {}, out[32] = {};
  emu::options() = {.seed = 3};
  chain_of_kernels(values, out, Chain::kWaits);
  for (int i = 0; i < 32; ++i) CHECK(out[i] == static_cast<float>(2 * i));
  CHECK_THROWS(chain_of_kernels(values, out, Chain::kNeverWaits), "before wait_for_previous_kernel");
  CHECK_THROWS(chain_of_kernels(values, out, Chain::kOneThreadNeverWaits), "before wait_for_previous_kernel");
  CHECK_THROWS(chain_of_kernels(values, out, Chain::kLoadsEarly), "before wait_for_previous_kernel");
  CHECK_THROWS(chain_of_kernels(values, out, Chain::kStoresEarly), "before wait_for_previous_kernel");
  // An older GPU runs the kernels one after the other.
  emu::options() = {.compute_capability = 80};
  chain_of_kernels(values, out, Chain::kNeverWaits);
}

void resident_blocks_are_asked_for() {
  for (const int blocks : {1, 5}) {
    emu::options() = {.resident_blocks = blocks};
    CHECK(resident_blocks_of_a_kernel() == blocks);
  }
  emu::options() = {.resident_blocks = 0};
  CHECK(resident_blocks_of_a_kernel() == 1);
}

void conversions() {
  emu::options() = {};
  const std::vector<float> x = {0.0f,     -0.0f,    1.0f,     1.0f / 3,       -2.5f,          65504.0f,
                                65519.0f, 65520.0f, 1e6f,     6.1e-5f,        5.9e-8f,        2.98e-8f,
                                2.99e-8f, 1e-9f,    INFINITY, -INFINITY,      3.0e38f,        3.4e38f,
                                2048.0f,  2049.0f,  2051.0f,  1.00048828125f, 0.00097656255f, 123.456f};
  std::vector<float> half(x.size()), bf16(x.size()), same(x.size());
  round_trip(DType::kFloat16, x.data(), half.data(), static_cast<int>(x.size()));
  round_trip(DType::kBFloat16, x.data(), bf16.data(), static_cast<int>(x.size()));
  round_trip(DType::kFloat32, x.data(), same.data(), static_cast<int>(x.size()));
  CHECK(same == x);
  CHECK(half[3] == 0.333251953125f && half[5] == 65504.0f && half[6] == 65504.0f && std::isinf(half[7]));
  CHECK(half[11] == 0.0f && half[12] == 5.9604644775390625e-08f && half[13] == 0.0f);  // half of the smallest: to even
  CHECK(half[18] == 2048.0f && half[19] == 2048.0f && half[20] == 2052.0f);
  CHECK(std::isinf(half[14]) && half[15] == -INFINITY && std::signbit(half[1]));
  CHECK(bf16[3] == 0.333984375f && bf16[4] == -2.5f && std::isinf(bf16[17]) && bf16[15] == -INFINITY);
  for (size_t i = 0; i < x.size(); ++i) {
    if (std::fabs(x[i]) > 6.2e-5f && std::fabs(x[i]) < 65504.0f) CHECK_NEAR(half[i], x[i], std::fabs(x[i]) / 2048);
    if (std::fabs(x[i]) < 3.0e38f) CHECK_NEAR(bf16[i], x[i], std::fabs(x[i]) / 256);
  }
  for (uint32_t bits = 0; bits < 65536; ++bits) {  // every 16-bit value survives the way there and back
    const half_t h{static_cast<uint16_t>(bits)};
    const bf16_t b{static_cast<uint16_t>(bits)};
    if (!std::isnan(to_float(h))) CHECK(from_float<half_t>(to_float(h)).bits == bits);
    if (!std::isnan(to_float(b))) CHECK(from_float<bf16_t>(to_float(b)).bits == bits);
  }
}

// The error of exp2_polynomial, also on both sides of each change of the integer part, and the ends of its range.
void powers_by_polynomial() {
  emu::options() = {};
  std::vector<float> x;
  for (uint32_t bits = 0; bits <= 0x3f000000u; bits += 10007) {  // up to 1/2, where the polynomial is used
    x.push_back(__uint_as_float(bits));
    x.push_back(-__uint_as_float(bits));
  }
  for (int i = -152 * 512; i < 127 * 512 + 256; ++i) x.push_back(static_cast<float>(i) / 512);
  for (int j = -130; j < 127; ++j) {
    const float half = static_cast<float>(j) + 0.5f;
    x.push_back(std::nextafter(half, -200.0f));
    x.push_back(std::nextafter(half, 200.0f));
  }
  std::vector<float> power(x.size(), -1.0f);
  powers_of_two(x.data(), power.data(), static_cast<int>(x.size()));
  const double smallest = std::ldexp(1.0, -126);
  double largest = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = std::exp2(static_cast<double>(x[i])), error = std::fabs(power[i] - exact);
    if (exact < smallest) {
      CHECK(power[i] >= 0 && error <= smallest);
    } else {
      largest = std::max(largest, error / exact);
    }
    if (x[i] <= -126.5f) CHECK(power[i] == 0);
    if (x[i] >= -126 && x[i] == std::round(x[i])) CHECK(power[i] == static_cast<float>(exact));
  }
  CHECK(largest <= 1.5 * std::ldexp(1.0, -23));
  const std::vector<float> ends = {NAN, -NAN, -INFINITY, -3.4e38f, -1e-45f, 0.0f, -0.0f, 127.0f};
  powers_of_two(ends.data(), power.data(), static_cast<int>(ends.size()));
  CHECK(std::isnan(power[0]) && std::isnan(power[1]) && power[2] == 0 && power[3] == 0);
  CHECK(power[4] == 1 && power[5] == 1 && power[6] == 1 && power[7] == std::ldexp(1.0f, 127));
}

}  // namespace

int main() {
  RUN(block_sums);
  RUN(faults_are_reported);
  RUN(shared_memory_is_asked_for);
  RUN(shared_memory_of_a_block_ends);
  RUN(matrix_products_half);
  RUN(matrix_products_bf16);
  RUN(warp_collectives);
  RUN(ticket_order);
  RUN(chains_of_kernels);
  RUN(resident_blocks_are_asked_for);
  RUN(conversions);
  RUN(powers_by_polynomial);
  return check::finish();
}
