// Where the time of the CUDA assignment solver goes: one step of a path search by a block, then
// every kernel of a whole solve.
//
//   nvcc -std=c++17 -O3 -arch=native --expt-relaxed-constexpr -I csrc benchmarks/assignment_scan.cu
//   -o scan && ./scan
//
// With arguments, FILE B N M [MANY_ROWS [RUNS]], it solves the float32 costs in the file instead of
// its own. From MANY_ROWS on clusters bid (Plan::many_rows): a small one lets compute-sanitizer see
// them in a small problem, and 1 run is enough for it. Prints one JSON object per line. Times are
// medians over repeated runs, from events; the first runs are dropped. Times of the phases of
// match_rows are of the last run, at the clock the device reports.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "assignment/launch.cuh"
#include "assignment/searches.cuh"

namespace {

using namespace croc::gpu;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(expression) check((expression), #expression)

constexpr int kWarmups = 5;
constexpr int kRuns = 25;

template <class T>
T* on_device(const std::vector<T>& host) {
  T* device = nullptr;
  CHECK(cudaMalloc(&device, host.size() * sizeof(T)));
  CHECK(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return device;
}

float median(std::vector<float> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// The step of the path search, alone: the first n columns are matched, the others forbidden, so
// that a search scans all n rows and gives up.
template <int kGroups>
__global__ void __launch_bounds__(kPathThreads, 1)
    scan_all_rows(Arguments a, int* reads, int* steps) {
  CROC_DYNAMIC_SHARED(shared);
  const Problem<float> p(a);
  State s;
  s.carve(shared, a.max_n(), a.max_m(), kGroups, 1);
  for (int j = threadIdx.x; j < padded(p.m); j += blockDim.x) s.v[j] = 0.0;
  for (int j = threadIdx.x; j < p.m; j += blockDim.x) s.row_of[j] = j < p.n - 1 ? j : -1;
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) s.u[i] = 0.0, s.twin[i] = i;
  if (threadIdx.x == 0) s.list[0] = p.n - 1;
  __syncthreads();
  const RowGraph<float, true> graph{p.costs, s};
  const PathEnd end = shortest_path<float, kGroups>(graph, s.list);
  if (threadIdx.x == 0) reads[blockIdx.x] = end.reads, steps[blockIdx.x] = end.steps;
}

template <int kGroups>
void measure_scan(int batch, int n, int m, int threads) {
  const auto kernel = scan_all_rows<kGroups>;
  std::vector<float> cost(static_cast<size_t>(batch) * n * m);
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform;
  for (size_t k = 0; k < cost.size(); ++k)
    cost[k] =
        static_cast<int>(k % m) < n - 1 ? uniform(random) : std::numeric_limits<float>::infinity();
  Arguments a{};
  a.batch = batch, a.rows = n, a.columns = m, a.cost_bytes = 4, a.vectors = m % 4 == 0;
  const Plan plan = make_plan(batch, n, m, 227 * 1024, kMostBlocks);
  unsigned char* workspace = nullptr;
  CHECK(cudaMalloc(&workspace, plan_workspace(a, plan)));
  a.workspace = workspace;
  float* device_cost = on_device(cost);
  a.cost = device_cost;
  int* reads = on_device(std::vector<int>(batch));
  int* steps = on_device(std::vector<int>(batch));
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(plan.shared)));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int run = 0; run < kWarmups + kRuns; ++run) {
    CHECK(cudaEventRecord(begin));
    kernel<<<batch, threads, plan.shared>>>(a, reads, steps);
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms = 0.0f;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (run >= kWarmups) times.push_back(ms);
  }
  int taken = 0, rows = 0;
  CHECK(cudaMemcpy(&taken, steps, sizeof taken, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(&rows, reads, sizeof rows, cudaMemcpyDeviceToHost));
  std::printf(
      "{\"case\": \"scan\", \"B\": %d, \"N\": %d, \"M\": %d, \"threads\": %d, \"rows\": %d, "
      "\"steps\": %d, \"us_per_row\": %.4f, \"us_per_step\": %.4f}\n",
      batch, n, m, threads, rows, taken, 1e3f * median(times) / rows, 1e3f * median(times) / taken);
  CHECK(cudaFree(workspace));
  CHECK(cudaFree(device_cost));
  CHECK(cudaFree(reads));
  CHECK(cudaFree(steps));
}

// Puts an event after every launch.
struct TimedLauncher {
  std::vector<cudaEvent_t>* events;

  void operator()(Kernel kernel, dim3 grid, int threads, int64_t shared, const Arguments& a,
                  int cluster = 1) const {
    CHECK(launch_kernel(kernel, grid, threads, shared, cluster, nullptr, a));
    cudaEvent_t event;
    CHECK(cudaEventCreate(&event));
    CHECK(cudaEventRecord(event));
    events->push_back(event);
  }
};

// The order of solve(): write it here again, so that a change there shows as a wrong number of
// launches.
const char* const kNames[] = {
    "prepare",          "column_means",        "start_from_means", "compare_rows",
    "choose_start",     "sinkhorn_rows",       "sinkhorn_columns", "sinkhorn_rows",
    "sinkhorn_columns", "start_from_sinkhorn", "nearest_columns",  "find_twins",
    "anneal",           "nearest_again",       "match_rows",       "measure_slack",
    "write_results"};

// In the order of Counter.
const char* const kCounterNames[] = {
    "anneal_steps", "rounds",       "bids",         "column_rounds", "column_bids", "forests",
    "forest_scans", "forest_steps", "paths",        "row_scans",     "row_steps",   "raise_rounds",
    "raise_bids",   "released",     "column_scans", "column_steps",  "bid_us",      "forest_us",
    "auction_us",   "path_us",      "raise_us",     "release_us"};
static_assert(sizeof kCounterNames / sizeof *kCounterNames == kCounters);
constexpr size_t kLaunches = sizeof kNames / sizeof *kNames;

// Column offsets and small noise as at the start of training, or uniform costs.
std::vector<float> make_costs(const std::string& family, int batch, int n, int m) {
  std::vector<float> cost(static_cast<size_t>(batch) * n * m), offset(m);
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  for (float& x : offset) x = 64.0f + 0.7f * normal(random);
  for (size_t k = 0; k < cost.size(); ++k)
    cost[k] = family == "init" ? offset[k % m] + normal(random) / 64.0f : uniform(random);
  return cost;
}

// Of the indices and column duals (FNV-1a): equal solutions have equal digests.
uint64_t digest_of(const Arguments& a) {
  std::vector<int64_t> words(static_cast<size_t>(a.batch) * (a.rows + a.columns));
  int64_t* duals = words.data() + static_cast<int64_t>(a.batch) * a.rows;
  CHECK(cudaMemcpy(words.data(), a.index, int64_t{8} * a.batch * a.rows, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(duals, a.column_dual, int64_t{8} * a.batch * a.columns, cudaMemcpyDeviceToHost));
  uint64_t digest = 14695981039346656037u;
  for (const int64_t word : words) digest = (digest ^ static_cast<uint64_t>(word)) * 1099511628211u;
  return digest;
}

void measure_solve(const std::string& name, const std::vector<float>& cost, int batch, int n, int m,
                   int many_rows = kManyRows, int runs = kWarmups + kRuns) {
  Arguments a{};
  a.batch = batch, a.rows = n, a.columns = m, a.cost_bytes = 4, a.vectors = m % 4 == 0;
  float* device_cost = on_device(cost);
  a.cost = device_cost;
  const int64_t rows = static_cast<int64_t>(batch) * n, columns = static_cast<int64_t>(batch) * m;
  CHECK(cudaMalloc(&a.index, rows * 8));
  CHECK(cudaMalloc(&a.row_dual, rows * 8));
  CHECK(cudaMalloc(&a.column_dual, columns * 8));
  CHECK(cudaMalloc(&a.gap, batch * 8));
  CHECK(cudaMalloc(&a.status, batch * 4));
  const Plan plan = make_plan(batch, a.max_n(), a.max_m(), 227 * 1024, kMostBlocks, many_rows);
  CHECK(cudaMalloc(&a.workspace, plan_workspace(a, plan)));
  std::vector<std::vector<float>> times(kLaunches + 1);
  for (int run = 0; run < runs; ++run) {
    std::vector<cudaEvent_t> events(1);
    CHECK(cudaEventCreate(&events[0]));
    CHECK(cudaEventRecord(events[0]));
    solve<float>(TimedLauncher{&events}, a, plan);
    CHECK(cudaDeviceSynchronize());
    if (events.size() != kLaunches + 1)
      check(cudaErrorUnknown, "kNames does not list the launches of solve()");
    for (size_t k = 0; k <= kLaunches; ++k) {
      float ms = 0.0f;
      const cudaEvent_t from = k < kLaunches ? events[k] : events[0];
      CHECK(cudaEventElapsedTime(&ms, from, events[k < kLaunches ? k + 1 : kLaunches]));
      if (run >= std::min(kWarmups, runs - 1)) times[k].push_back(ms);
    }
    for (cudaEvent_t event : events) CHECK(cudaEventDestroy(event));
  }
  std::vector<unsigned char> workspace(plan_workspace(a, plan));
  CHECK(cudaMemcpy(workspace.data(), a.workspace, workspace.size(), cudaMemcpyDeviceToHost));
  std::vector<double> gaps(batch);
  CHECK(cudaMemcpy(gaps.data(), a.gap, batch * 8, cudaMemcpyDeviceToHost));
  // Of each counter the most of a problem, then those of the problem that took longest.
  int clock_khz = 0, most[kCounters] = {}, slowest[kCounters] = {};
  CHECK(cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, 0));
  int64_t longest = -1;
  for (int b = 0; b < batch; ++b) {
    Workspace w;
    w.carve(workspace.data() + b * a.workspace_stride, a);
    int* counters = w.scalars->counters;
    int64_t cycles = 0;
    for (int c = kBidTime; c < kCounters; ++c) {
      cycles += counters[c];
      counters[c] = static_cast<int>(1e3 * counters[c] / clock_khz);
    }
    for (int c = 0; c < kCounters; ++c) most[c] = std::max(most[c], counters[c]);
    if (cycles > longest) std::copy_n(counters, kCounters, slowest);
    longest = std::max(longest, cycles);
  }
  std::printf("{\"case\": \"%s\", \"B\": %d, \"N\": %d, \"M\": %d, \"ms\": %.4f, ", name.c_str(),
              batch, n, m, median(times[kLaunches]));
  std::printf("\"max_gap\": %g, \"digest\": \"%016llx\"",
              *std::max_element(gaps.begin(), gaps.end()),
              static_cast<unsigned long long>(digest_of(a)));
  for (const auto& [which, counters] : {std::pair("most", most), std::pair("slowest", slowest)}) {
    std::printf(", \"%s\": {", which);
    for (int c = 0; c < kCounters; ++c)
      std::printf("%s\"%s\": %d", c > 0 ? ", " : "", kCounterNames[c], counters[c]);
    std::printf("}");
  }
  std::printf(", \"us\": {");
  std::map<std::string, float> by_name;
  for (size_t k = 0; k < kLaunches; ++k) by_name[kNames[k]] += 1e3f * median(times[k]);
  const char* separator = "";
  for (const auto& [name, us] : by_name)
    std::printf("%s\"%s\": %.1f", separator, name.c_str(), us), separator = ", ";
  std::printf("}}\n");
  for (void* p :
       {static_cast<void*>(device_cost), static_cast<void*>(a.index),
        static_cast<void*>(a.row_dual), static_cast<void*>(a.column_dual),
        static_cast<void*>(a.gap), static_cast<void*>(a.status), static_cast<void*>(a.workspace)})
    CHECK(cudaFree(p));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc >= 5) {
    const int batch = std::atoi(argv[2]), n = std::atoi(argv[3]), m = std::atoi(argv[4]);
    std::vector<float> cost(static_cast<size_t>(batch) * n * m);
    std::FILE* file = std::fopen(argv[1], "rb");
    if (file == nullptr || std::fread(cost.data(), 4, cost.size(), file) != cost.size()) {
      std::fprintf(stderr, "%s: no %zu costs in it\n", argv[1], cost.size());
      return 1;
    }
    const int many_rows = argc > 5 ? std::atoi(argv[5]) : kManyRows;
    const int runs = argc > 6 ? std::atoi(argv[6]) : kWarmups + kRuns;
    measure_solve(argv[1], cost, batch, n, m, std::max(many_rows, 1), std::max(runs, 1));
    return 0;
  }
  for (int batch : {4, 32, 128}) {
    measure_scan<1>(batch, 432, 2048, 512);
    measure_scan<4>(batch, 432, 2048, 128);
  }
  for (int batch : {4, 32, 128})
    for (const char* family : {"init", "uniform"})
      measure_solve(family, make_costs(family, batch, 432, 2048), batch, 432, 2048);
  measure_solve("init", make_costs("init", 4, 2016, 2048), 4, 2016, 2048);
}
