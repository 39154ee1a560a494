// The order of the phases, and the certificate. Included by host_solver.h once per instruction set.

// Row duals are the row minima of c - v, so that the gap bounds cost - optimum whatever v is.
template <class T>
double certify(const Work<T>& w, double* row_dual) {
  double gap = 0;
  for (int i = 0; i < w.n; ++i) {
    row_dual[i] = row_minimum(w.row(i), w.v.data(), w.m);
    gap += (w.at(i, w.column_of[i]) - w.v[w.column_of[i]]) - row_dual[i];
  }
  for (int j = 0; j < w.m; ++j)
    if (w.row_of[j] < 0) gap -= w.v[j];
  return gap;
}

// Matches the rows that are still free, after an auction if they are many: at once if the bids went
// on and on, and after many steps of paths if they stopped at ties, where paths are often short.
// False if a row has no path.
template <class T>
bool match_rest(Work<T>& w, const HostTuning& tuning, bool tired) {
  bool may_auction = static_cast<int>(w.free_rows.size()) > tuning.rows_for_auction;
  const double patience = tired ? 0.0 : tuning.scans_for_auction * w.n;
  // Measured before paths move v: they make ties everywhere.
  const double scale = may_auction ? local_scale(w, w.v) : 0.0;
  may_auction = scale > 0 && scale < kInfinity;
  for (size_t k = 0; k < w.free_rows.size(); ++k) {
    if (may_auction && static_cast<double>(w.counts.row_scans) >= patience) {
      may_auction = false;
      auction(w, tuning, scale);
      match_tight(w);
      bid(w, tuning);
      k = 0;
      if (w.free_rows.empty()) break;
    }
    if (!augment(w, w.free_rows[k])) return false;
  }
  return true;
}

template <class T>
AssignmentResult solve_prepared(Work<T>& w, const HostTuning& tuning, int64_t* index,
                                double* row_dual, double* column_dual) {
  const AssignmentStatus status = read_costs(w);
  if (status != kOk) return {status, kInfinity};
  warm_start(w, tuning);
  match_tight(w);
  const bool tired = bid(w, tuning);
  if (!match_rest(w, tuning, tired)) return {kInfeasible, kInfinity};
  reverse(w);
  std::copy(w.column_of.begin(), w.column_of.end(), index);
  std::copy(w.v.begin(), w.v.begin() + w.m, column_dual);
  return {kOk, certify(w, row_dual)};
}
