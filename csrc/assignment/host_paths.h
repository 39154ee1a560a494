// The exact search: tight matching, bids, shortest augmenting paths, the reverse pass. Included by
// host_solver.h once per instruction set.
//
// Invariant: v <= 0 where n < m, and matched pairs are tight: row i matched to column j has
// c_ij - v_j = min_k (c_ik - v_k). Bids and paths only lower v and keep it. Once every row is
// matched, unmatched columns with v_j < 0 are all that separates the matching from an optimal one;
// the reverse pass removes them one by one. docs/assignment.md has the argument.

template <class T>
void match(Work<T>& w, int i, int j) {
  w.row_of[j] = i;
  w.column_of[i] = j;
}

// Gives every row its best column while that is free.
template <class T>
void match_tight(Work<T>& w) {
  for (int i = 0; i < w.n; ++i) {
    const T* c = w.row(i);
    const double* v = w.v.data();
    const double best = two_minima(c, v, w.m, w.low.data()).first;
    const int j =
        find_column(best, w.low.data(), w.m, w.row_of.data(), [&](int k) { return c[k] - v[k]; });
    if (w.row_of[j] < 0) {
      match(w, i, j);
    } else {
      w.free_rows.push_back(i);
    }
  }
  w.counts.free_rows = w.free_rows.size();
}

// A free row takes its best column and lowers that column's v until the second best is as good; the
// row that had it is free again. Rows that can't gain by it (ties) and those that the limit leaves
// are for augment(). True if the limit ended it.
template <class T>
bool bid(Work<T>& w, const HostTuning& tuning) {
  std::vector<int>& queue = w.queue;
  std::vector<int>& left = w.left;
  queue.swap(w.free_rows);
  left.clear();
  // Short paths are cheaper than many bids: the limit is smaller for few rows.
  const double per_row = std::min(tuning.bids_per_row, w.n / 8.0);
  const int64_t limit = w.counts.bids + static_cast<int64_t>(per_row * queue.size()) + 1;
  size_t head = 0;
  for (; head < queue.size() && w.counts.bids < limit; ++head) {
    const int i = queue[head];
    const T* c = w.row(i);
    double* v = w.v.data();
    const TwoMinima best = two_minima(c, v, w.m, w.low.data());
    ++w.counts.bids;
    const int j = find_column(best.first, w.low.data(), w.m, w.row_of.data(),
                              [&](int k) { return c[k] - v[k]; });
    const int other = w.row_of[j];
    const double lowered = v[j] - (best.second - best.first);
    if (best.second == kInfinity || (other >= 0 && !(lowered < v[j]))) {
      left.push_back(i);
      continue;
    }
    v[j] = lowered;
    match(w, i, j);
    if (other < 0) continue;
    w.column_of[other] = -1;
    queue.push_back(other);
  }
  left.insert(left.end(), queue.begin() + head, queue.end());
  w.free_rows.swap(left);
  w.counts.free_after_bids = w.free_rows.size();
  return w.counts.bids >= limit;
}

// Matches row `root` along a shortest path of reduced costs to a free column. False if there is
// none.
template <class T>
bool augment(Work<T>& w, int root) {
  const int m = w.m;
  std::copy(w.v.begin(), w.v.end(), w.masked.begin());
  std::fill(w.distance.begin(), w.distance.end(), kInfinity);
  w.tree.clear(), w.reached.clear();
  double done = 0;
  for (int i = root, sink = -1;;) {
    const double shift = i == root ? 0.0 : done - (w.at(i, w.column_of[i]) - w.v[w.column_of[i]]);
    done = relax(w.row(i), w.masked.data(), shift, i, m, w.distance.data(), w.from.data(),
                 w.low.data());
    ++w.counts.row_scans;
    if (done == kInfinity) return false;
    const double* distance = w.distance.data();
    const int j =
        find_column(done, w.low.data(), m, w.row_of.data(), [&](int k) { return distance[k]; });
    if (w.row_of[j] < 0) {
      sink = j;
      for (size_t k = 0; k < w.tree.size(); ++k) w.v[w.tree[k]] -= done - w.reached[k];
      for (int row = -1; row != root;) {
        row = w.from[sink];
        const int next = w.column_of[row];
        match(w, row, sink);
        sink = next;
      }
      return true;
    }
    w.tree.push_back(j), w.reached.push_back(done);
    w.distance[j] = kInfinity, w.masked[j] = -kInfinity;
    i = w.row_of[j];
  }
}

// Costs of column j, one after the other. Copied with its neighbours: they share the cache lines.
template <class T>
const T* column(Work<T>& w, int j) {
  constexpr int kGroup = 64 / sizeof(T);
  const int groups = (w.m + kGroup - 1) / kGroup, group = j / kGroup;
  if (w.loaded.empty()) {
    w.loaded.assign(groups, 0);
    w.columns.resize(static_cast<size_t>(groups) * kGroup * w.n);
  }
  T* to = w.columns.data() + static_cast<size_t>(group) * kGroup * w.n;
  if (!w.loaded[group]) {
    w.loaded[group] = 1;
    const int begin = group * kGroup, width = std::min(kGroup, w.m - begin);
    for (int i = 0; i < w.n; ++i) {
      const T* c = w.row(i) + begin;
      for (int k = 0; k < width; ++k) to[static_cast<size_t>(k) * w.n + i] = c[k];
    }
  }
  return to + static_cast<size_t>(j % kGroup) * w.n;
}

// Column `root` is unmatched with v < 0: raises v along shortest paths between columns until `root`
// is matched and another column unmatched at v = 0 in its place, or v of `root` is 0.
template <class T>
void raise(Work<T>& w, int root) {
  const int n = w.n;
  std::copy(w.u.begin(), w.u.end(), w.masked.begin());
  std::fill(w.distance.begin(), w.distance.end(), kInfinity);
  std::vector<int>& rows =
      w.tree;  // row k of the tree was reached at w.reached[k], and its column follows it
  rows.clear(), w.reached.clear();
  double done = 0, best = -w.v[root];
  int end = root;
  for (int j = root;;) {
    done = relax(column(w, j), w.masked.data(), done - w.v[j], j, n, w.distance.data(),
                 w.from.data(), w.low.data());
    ++w.counts.column_scans;
    if (!(done < best)) break;
    const double* distance = w.distance.data();
    const int i =
        find_column(done, w.low.data(), n, w.column_of.data(), [&](int k) { return distance[k]; });
    rows.push_back(i), w.reached.push_back(done);
    w.distance[i] = kInfinity, w.masked[i] = -kInfinity;
    j = w.column_of[i];
    if (done - w.v[j] < best) best = done - w.v[j], end = j;
  }
  w.v[root] += best;
  for (size_t k = 0; k < rows.size(); ++k) {
    if (!(w.reached[k] < best)) continue;
    double& v = w.v[w.column_of[rows[k]]];
    v = std::min(0.0, v + (best - w.reached[k]));  // rounding must not leave it above 0
    w.u[rows[k]] -= best - w.reached[k];
  }
  w.v[end] = 0;
  if (end == root) return;
  for (int row = w.row_of[end], j = -1; j != root;) {
    j = w.from[row];
    const int previous = w.row_of[j];
    match(w, row, j);
    row = previous;
  }
  w.row_of[end] = -1;
}

// Makes v_j = 0 on every unmatched column: what is left to be optimal.
template <class T>
void reverse(Work<T>& w) {
  std::vector<int>& below = w.queue;
  below.clear();
  for (int j = 0; j < w.m; ++j)
    if (w.row_of[j] < 0 && w.v[j] < 0) below.push_back(j);
  if (below.empty()) return;
  for (int i = 0; i < w.n; ++i) w.u[i] = w.at(i, w.column_of[i]) - w.v[w.column_of[i]];
  // First as far up as the rows allow without any change of the matching, all at once.
  std::fill(w.scratch.begin(), w.scratch.end(), kInfinity);
  for (int i = 0; i < w.n; ++i) {
    const T* c = w.row(i);
    const double dual = w.u[i];
    for (int j = 0; j < w.m; ++j) {
      const double slack = static_cast<double>(c[j]) - dual;
      w.scratch[j] = slack < w.scratch[j] ? slack : w.scratch[j];
    }
  }
  for (int j : below) w.v[j] = std::min(0.0, std::max(w.v[j], w.scratch[j]));
  for (int j : below)
    if (w.v[j] < 0) raise(w, j);
}
