// Forward and reverse auction for problems that leave many rows free after the bids. Included by
// host_solver.h once per instruction set.
//
// Rows bid for columns as in bid(), but lower v by epsilon more than they must, so that ties cost
// them something; then unmatched columns with v < 0 bid for rows: with n < m a forward auction
// alone would leave them behind. Only v is kept, as a start like any other: the exact phases that
// follow need nothing else from it. Every loop is bounded by a number of bids.

// Every row bids until all have a column. u_i becomes c - v of the pair.
template <class T>
void forward_auction(Work<T>& w, double epsilon, int64_t limit) {
  std::vector<int> queue(w.n);
  std::iota(queue.begin(), queue.end(), 0);
  double* v = w.v.data();
  for (size_t head = 0; head < queue.size() && w.counts.auction_bids < limit; ++head) {
    const int i = queue[head];
    const T* c = w.row(i);
    const TwoMinima best = two_minima(c, v, w.m, w.low.data());
    ++w.counts.auction_bids;
    const int j = find_column(best.first, w.low.data(), w.m, w.row_of.data(),
                              [&](int k) { return c[k] - v[k]; });
    const double second = best.second < kInfinity ? best.second : best.first;
    const int other = w.row_of[j];
    v[j] -= second - best.first + epsilon;
    w.u[i] = second + epsilon;
    match(w, i, j);
    if (other >= 0) w.column_of[other] = -1, queue.push_back(other);
  }
}

// Unmatched columns with v < 0 offer rows a lower cost, until v = 0 or a row comes.
template <class T>
void reverse_auction(Work<T>& w, double epsilon, int64_t limit) {
  std::vector<int> queue;
  for (int j = 0; j < w.m; ++j)
    if (w.row_of[j] < 0 && w.v[j] < 0) queue.push_back(j);
  for (size_t head = 0; head < queue.size() && w.counts.auction_bids < limit; ++head) {
    const int j = queue[head];
    const T* c = column(w, j);
    const double* u = w.u.data();
    const TwoMinima best = two_minima(c, u, w.n, w.low.data());
    ++w.counts.auction_bids;
    // -first is the price at which the keenest row would take the column.
    if (-best.first <= epsilon) {
      w.v[j] = 0;
      continue;
    }
    const int i = find_column(best.first, w.low.data(), w.n, w.column_of.data(),
                              [&](int k) { return c[k] - u[k]; });
    const double price = std::min(-best.first, std::max(0.0, -best.second - epsilon));
    const int other = w.column_of[i];
    w.v[j] = -price;
    w.u[i] = static_cast<double>(c[i]) + price;
    match(w, i, j);
    if (other < 0) continue;
    w.row_of[other] = -1;
    if (w.v[other] < 0) queue.push_back(other);
  }
}

template <class T>
void unmatch_all(Work<T>& w) {
  std::fill(w.row_of.begin(), w.row_of.end(), -1);
  std::fill(w.column_of.begin(), w.column_of.end(), -1);
  w.free_rows.clear();
}

// Replaces v by the prices of an auction, with nothing matched.
template <class T>
void auction(Work<T>& w, const HostTuning& tuning, double scale) {
  const int64_t limit = tuning.auction_bids * (static_cast<int64_t>(w.n) + w.m);
  double epsilon = scale * tuning.epsilon;
  for (int phase = 0; phase < tuning.auction_phases; ++phase, epsilon *= tuning.epsilon_factor) {
    unmatch_all(w);
    forward_auction(w, epsilon, limit);
    if (w.counts.auction_bids >= limit) break;
    reverse_auction(w, epsilon, limit);
  }
  unmatch_all(w);
  for (int j = 0; j < w.m; ++j) w.v[j] = std::min(0.0, std::floor(w.v[j] / w.step) * w.step);
}
