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

template <class T>
AssignmentResult solve_prepared(Work<T>& w, const HostTuning& tuning, int64_t* index,
                                double* row_dual, double* column_dual) {
  const AssignmentStatus status = read_costs(w);
  if (status != kOk) return {status, kInfinity};
  warm_start(w, tuning);
  match_tight(w);
  bid(w, tuning);
  if (static_cast<int>(w.free_rows.size()) > tuning.rows_for_auction && auction(w, tuning)) {
    match_tight(w);
    bid(w, tuning);
  }
  for (int i : w.free_rows)
    if (!augment(w, i)) return {kInfeasible, kInfinity};
  reverse(w);
  std::copy(w.column_of.begin(), w.column_of.end(), index);
  std::copy(w.v.begin(), w.v.begin() + w.m, column_dual);
  return {kOk, certify(w, row_dual)};
}
