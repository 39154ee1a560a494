// The start: reading the costs, and column duals that the search begins from. Included by
// host_solver.h once per instruction set. A problem has n <= m; prices are v <= 0, a lower one
// makes a column less attractive.

// One problem and the memory that is kept from one problem to the next.
template <class T>
struct Work {
  const T* cost;
  int64_t stride;
  int n, m;
  double step;  // duals are rounded to multiples of it before the exact phases

  // Indexed by columns or rows, padded to whole blocks.
  std::vector<double> v, u, mean, masked, distance, scratch, low;
  std::vector<float> share;
  std::vector<int> from, row_of, column_of;

  std::vector<int> free_rows, queue, left;  // the latter two: of the phase that runs
  std::vector<int> tree;                    // the columns that a search is done with
  std::vector<double> reached;       // and how far they were
  std::vector<T> columns;  // columns of costs, copied in groups when the reverse pass asks for them
  std::vector<char> loaded;

  AssignmentCounts counts;

  const T* row(int i) const { return cost + i * stride; }
  double at(int i, int j) const { return static_cast<double>(row(i)[j]); }

  void prepare(const T* c, int64_t row_stride, int rows, int columns_) {
    cost = c, stride = row_stride, n = rows, m = columns_, counts = {};
    const int blocks = std::max(1, (std::max(n, m) + kBlock - 1) / kBlock),
              padded = blocks * kBlock;
    v.assign(padded, -kInfinity);
    std::fill(v.begin(), v.begin() + m, 0.0);
    u.assign(padded, -kInfinity);
    masked.resize(padded), distance.resize(padded), from.resize(padded), scratch.resize(padded);
    mean.assign(padded, 0.0);
    share.resize(padded);
    low.resize(blocks * CROC_LANES);
    row_of.assign(m, -1);
    column_of.assign(n, -1);
    free_rows.clear();
    loaded.clear();
  }
};

// The value of the dual problem at v: what starts are compared by.
template <class T>
double dual_value(const Work<T>& w, const std::vector<double>& v) {
  double total = 0;
  for (int i = 0; i < w.n; ++i) total += row_minimum(w.row(i), v.data(), w.m);
  for (int j = 0; j < w.m; ++j) total += v[j];
  return total;
}

// Checks every cost. Leaves the row minima in u and the column means, forbidden pairs counted as
// the largest cost.
template <class T>
AssignmentStatus read_costs(Work<T>& w) {
  double smallest = kInfinity, largest = -kInfinity;
  bool forbidden = false;
  for (int i = 0; i < w.n; ++i) {
    const RowSummary s = summarize(w.row(i), w.m, 0.0, w.mean.data());
    if (s.invalid) return kInvalid;
    smallest = std::min(smallest, s.smallest), largest = std::max(largest, s.largest);
    forbidden |= s.forbidden;
    w.u[i] = s.smallest;
  }
  const double size = std::max(std::fabs(smallest), std::fabs(largest));
  for (int i = 0; i < w.n; ++i)
    if (w.u[i] == kInfinity) return kInfeasible;
  if (size > 0x1p900) return kTooLarge;
  if (forbidden) {
    std::fill(w.mean.begin(), w.mean.end(), 0.0);
    for (int i = 0; i < w.n; ++i) summarize(w.row(i), w.m, largest, w.mean.data());
  }
  for (int j = 0; j < w.m; ++j) w.mean[j] /= w.n;
  // Costs that are multiples of the step, as those of float32 are down to 2^-22 of the largest,
  // make all later sums exact: 46 of 53 bits hold the costs, the others are for the sums to grow.
  w.step = std::ldexp(1.0, size > 0 ? std::max(std::ilogb(size) + 1 - 46, -1022) : -1022);
  return kOk;
}

// v_j = min(0, g_j - threshold) on the grid; the threshold leaves as many columns below 0 as there
// are rows.
template <class T>
void lower_wanted(Work<T>& w, const std::vector<double>& g, std::vector<double>& v) {
  std::vector<double>& sorted = w.scratch;
  std::copy(g.begin(), g.begin() + w.m, sorted.begin());
  const auto end = sorted.begin() + w.m;
  if (w.n < w.m) std::nth_element(sorted.begin(), sorted.begin() + w.n, end);
  const double threshold = w.n < w.m ? sorted[w.n] : *std::max_element(sorted.begin(), end);
  for (int j = 0; j < w.m; ++j)
    v[j] = std::min(0.0, std::floor((g[j] - threshold) / w.step) * w.step);
}

// Median over some rows of (9th smallest - smallest) reduced cost: how far a row is from changing
// its mind.
template <class T>
double local_scale(Work<T>& w, const std::vector<double>& v) {
  const int rank = std::min(8, w.m - 1), samples = std::min(w.n, kScaleRows);
  double scales[kScaleRows];
  for (int s = 0; s < samples; ++s) {
    const T* c = w.row(static_cast<int>(static_cast<int64_t>(s) * w.n / samples));
    for (int j = 0; j < w.m; ++j) w.scratch[j] = static_cast<double>(c[j]) - v[j];
    std::nth_element(w.scratch.begin(), w.scratch.begin() + rank, w.scratch.begin() + w.m);
    scales[s] =
        w.scratch[rank] - *std::min_element(w.scratch.begin(), w.scratch.begin() + rank + 1);
  }
  std::nth_element(scales, scales + samples / 2, scales + samples);
  return scales[samples / 2];
}

// One step of Sinkhorn's iteration with an extra row of mass m - n for the columns that stay
// unmatched: every row spreads one unit over the columns it likes, and a column that gets more than
// one unit becomes dearer.
template <class T>
void spread(Work<T>& w, double temperature, std::vector<double>& g) {
  const int m = w.m;
  std::vector<double>& load_of = w.scratch;
  const double top = *std::max_element(g.begin(), g.begin() + m);
  double slack = 0;
  for (int j = 0; j < m; ++j) slack += load_of[j] = std::exp((g[j] - top) / temperature);
  for (int j = 0; j < m; ++j) load_of[j] *= (m - w.n) / slack;
  for (int i = 0; i < w.n; ++i) {
    const T* c = w.row(i);
    const double total =
        soft_minimum(c, g.data(), row_minimum(c, g.data(), m), temperature, m, w.share.data());
    const float scale = static_cast<float>(1.0 / total);
    for (int j = 0; j < m; ++j) load_of[j] += static_cast<double>(w.share[j] * scale);
  }
  for (int j = 0; j < m; ++j) g[j] -= temperature * std::log(std::max(load_of[j], 1e-30));
}

// Column duals to start from. Where all rows want the same columns (costs = column offset + little
// else, as at the start of training) the means of the columns tell, and save nearly all of the
// search; where they don't, v = 0.
template <class T>
void warm_start(Work<T>& w, const HostTuning& tuning) {
  if (!tuning.means || w.n == 1) return;
  double cold = 0;
  for (int i = 0; i < w.n; ++i) cold += w.u[i];
  std::vector<double>& start = w.masked;
  std::fill(start.begin(), start.end(), -kInfinity);
  lower_wanted(w, w.mean, start);
  if (!(dual_value(w, start) > cold)) return;
  w.v = start;
  if (w.n < kFewRows) return;
  const double scale = local_scale(w, w.v);
  if (!(scale > 0) || scale == kInfinity) return;
  std::vector<double>& g = w.masked;
  for (int k = 0; k < tuning.spreads; ++k) spread(w, scale * tuning.temperature, g);
  if (tuning.spreads > 0) lower_wanted(w, g, w.v);
}
