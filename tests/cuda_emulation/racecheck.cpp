// Solves problems that reach every phase, for ThreadSanitizer to watch; emulator.py builds it.
// With an argument it runs that mistake of entry.cpp instead, which must be reported.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

extern "C" const char* emulate(const void* cost, int is_double, int batch, int rows, int columns,
                               const void* num_rows, int wide_num_rows, int maximize,
                               int64_t* index, double* row_dual, double* column_dual, double* gap,
                               int32_t* status, int* counters, uint64_t seed, int64_t shared_limit,
                               int blocks);
extern "C" const char* run_mistake(int which, uint64_t seed, int* out);

namespace {

constexpr int kCounters = 22;

float entry(const char* family, int i, int j, double random, double offset) {
  if (std::strcmp(family, "product") == 0) return static_cast<float>((i + 1.0) * (j + 1.0) / 7);
  if (std::strcmp(family, "kinds") == 0) return static_cast<float>((i % 24 + 1.0) * (j + 1.0) / 7);
  if (std::strcmp(family, "offsets") == 0) return static_cast<float>(offset + random / 64);
  if (std::strcmp(family, "integers") == 0) return static_cast<float>(std::floor(4 * random));
  return static_cast<float>(random);
}

bool run(const char* family, int n, int m, int64_t shared_limit, std::vector<int>& most,
         int blocks = 0) {
  std::mt19937 generator(1);
  std::uniform_real_distribution<double> uniform;
  std::vector<double> offsets(m);
  for (double& x : offsets) x = uniform(generator);
  std::vector<float> cost(static_cast<size_t>(n) * m);
  for (size_t k = 0; k < cost.size(); ++k)
    cost[k] = entry(family, static_cast<int>(k / m), static_cast<int>(k % m), uniform(generator),
                    offsets[k % m]);
  if (std::strcmp(family, "equal rows") == 0)
    for (size_t k = 4 * m; k < cost.size(); ++k) cost[k] = cost[k - 4 * m];
  std::vector<int64_t> index(n);
  std::vector<double> u(n), v(m);
  double gap = -1.0;
  int32_t status = -1;
  int counters[kCounters];
  for (const uint64_t seed : {0, 1}) {
    if (seed == 1 && n > 100) break;  // one schedule is enough: ordering is checked, not outcomes
    const char* error = emulate(cost.data(), 0, 1, n, m, nullptr, 0, 0, index.data(), u.data(),
                                v.data(), &gap, &status, counters, seed, shared_limit, blocks);
    if (error != nullptr || status != 0 || !(gap < 1e-3)) {
      std::fprintf(stderr, "%s: %s, status %d, gap %g\n", family, error, status, gap);
      return false;
    }
  }
  for (int c = 0; c < kCounters; ++c) most[c] = std::max(most[c], counters[c]);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    int out[128];
    return run_mistake(std::atoi(argv[1]), 0, out) != nullptr;
  }
  std::vector<int> most(kCounters);
  bool ok = true;
  for (int64_t limit : {int64_t{227 * 1024}, int64_t{0}}) {
    ok = run("offsets", 40, 100, limit, most) && ok;
    ok = run("equal rows", 30, 44, limit, most) && ok;
    ok = run("integers", 33, 35, limit, most) && ok;
    ok = run("product", 40, 60, limit, most) && ok;
    ok = run("uniform", 50, 20, limit, most) && ok;
  }
  ok = run("product", 200, 400, 227 * 1024, most) && ok;  // the auction
  for (int blocks : {-1, -3})                             // the second start
    ok = run("product", 272, 276, 227 * 1024, most, blocks) && ok;
  for (int blocks : {2, 3}) {                             // and that of a cluster
    ok = run("equal rows", 60, 90, 227 * 1024, most, blocks) && ok;
    ok = run("equal rows", 90, 60, 227 * 1024, most, blocks) && ok;
    ok = run("product", 110, 150, 227 * 1024, most, blocks) && ok;
    ok = run("kinds", 120, 128, 227 * 1024, most, blocks) && ok;
  }
  for (int count : most) ok = count > 0 && ok;  // every phase was reached
  std::puts(ok ? "ok" : "failed");
  return ok ? 0 : 1;
}
