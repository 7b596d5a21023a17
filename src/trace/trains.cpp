// SPDX-License-Identifier: Apache-2.0
#include "trace/trains.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <optional>
#include <random>

#include "trace/statistics.hpp"

namespace sluice::trace {
namespace {

constexpr double kLeastPlaces = 6;
constexpr size_t kLeastMembers = 6;
constexpr double kLeastFilled = 0.55;      // of the places: fewer are a harmonic or chance
constexpr double kStepsPerCycle = 3;       // of frequency: a grid is off by a sixth of a period at most over the series
constexpr size_t kPeaks = 6;               // frequencies that are looked at closely
constexpr double kLevelFactor = 1.5;       // from one height of events to the next
constexpr double kWidestPlace = 0.15;      // a place reaches this share of the period to both sides
constexpr double kTokenWidth = 0.55;  // ... but at least this many tokens: where in a token it happened is not known
constexpr double kTooWide = 0.25;          // ... and never more than this share of the period
// A clock is as good as the best one where its jitter is larger by less than this share and this much of a period.
constexpr double kSameJitterShare = 0.15, kSameJitter = 0.002;

struct Grid {
  double score = 0;
  double period = 0, phase = 0, jitter = 0, places = 0, filled = 0, width = 0;
};

double kl(double c, double q) {
  const auto term = [](double a, double b) { return a > 0 ? a * std::log(a / b) : 0.0; };
  return term(c, q) + term(1 - c, 1 - q);
}

// One clock with what of it every search needs.
class Axis {
 public:
  explicit Axis(std::span<const double> at) : at_(at) {
    std::vector<double> gaps(at.size() > 1 ? at.size() - 1 : 0);
    for (size_t i = 0; i < gaps.size(); ++i) gaps[i] = at[i + 1] - at[i];
    spacing_ = median(gaps);
    usable_ = spacing_ > 0 && std::isfinite(span());
  }

  bool usable() const { return usable_; }
  double span() const { return at_.empty() ? 0 : at_.back() - at_.front(); }
  double at(size_t i) const { return at_[i]; }
  size_t size() const { return at_.size(); }

  // The best grid for events at these positions, ascending.
  Grid best_grid(std::span<const double> events) const {
    Grid best;
    for (const double frequency : peaks(events)) {
      for (const double multiple : {1.0, 2.0, 3.0}) {
        const Grid grid = fit(events, multiple / frequency);
        if (grid.score > best.score) best = grid;
      }
    }
    return best;
  }

  // The grid next to a period, and how good it is. Score 0: none.
  Grid fit(std::span<const double> events, double period) const {
    Grid grid;
    if (!(period >= 1.9 * spacing_) || span() < kLeastPlaces * period) return grid;
    grid.period = period;
    grid.phase = circular_mean(events, period);
    for (int round = 0; round < 4; ++round) {
      if (!regress(events, grid, round < 2 ? kTooWide : kWidestPlace)) return Grid();
    }
    grid.width = std::clamp(3 * grid.jitter * grid.period, kTokenWidth * spacing_, kTooWide * grid.period);
    if (grid.width > kWidestPlace * grid.period)
      grid.width = std::max(kWidestPlace * grid.period, kTokenWidth * spacing_);
    grid.width = std::min(grid.width, kTooWide * grid.period);
    rate(events, grid);
    return grid;
  }

  // Whether an event at `x` lies on a place of the grid.
  static bool on(const Grid& grid, double x) { return std::abs(distance(grid, x)) <= grid.width; }

 private:
  static double distance(const Grid& grid, double x) {
    const double cycles = (x - grid.phase) / grid.period;
    return (cycles - std::round(cycles)) * grid.period;
  }

  // Frequencies at which the events' phases agree most (Rayleigh's statistic), from kLeastPlaces cycles over the series
  // up to one in two tokens.
  std::vector<double> peaks(std::span<const double> events) const {
    const double step = 1 / (kStepsPerCycle * span());
    const double first = kLeastPlaces / span();
    const auto count = static_cast<size_t>(std::max(0.0, (0.5 / spacing_ - first) / step)) + 1;
    const size_t m = events.size();
    std::vector<float> re(m), im(m), turn_re(m), turn_im(m);
    const auto turns = [&](double frequency, size_t i) {
      return 2 * std::numbers::pi * frequency * (events[i] - at_.front());
    };
    std::vector<float> power(count);
    for (size_t f = 0; f < count; ++f) {
      if (f % 256 == 0) {  // rotating in single precision drifts: begin anew
        for (size_t i = 0; i < m; ++i) {
          const double angle = turns(first + step * static_cast<double>(f), i), turn = turns(step, i);
          re[i] = static_cast<float>(std::cos(angle)), im[i] = static_cast<float>(std::sin(angle));
          turn_re[i] = static_cast<float>(std::cos(turn)), turn_im[i] = static_cast<float>(std::sin(turn));
        }
      }
      float sum_re = 0, sum_im = 0;
      for (size_t i = 0; i < m; ++i) {
        sum_re += re[i], sum_im += im[i];
        const float next = re[i] * turn_re[i] - im[i] * turn_im[i];
        im[i] = re[i] * turn_im[i] + im[i] * turn_re[i];
        re[i] = next;
      }
      power[f] = sum_re * sum_re + sum_im * sum_im;
    }
    std::vector<size_t> order;
    for (size_t f = 0; f < count; ++f) {
      if ((f == 0 || power[f] >= power[f - 1]) && (f + 1 == count || power[f] >= power[f + 1])) order.push_back(f);
    }
    const size_t kept = std::min(kPeaks, order.size());
    std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(kept), order.end(),
                      [&](size_t a, size_t b) { return power[a] > power[b]; });
    std::vector<double> frequencies;
    for (size_t i = 0; i < kept; ++i) frequencies.push_back(first + step * static_cast<double>(order[i]));
    return frequencies;
  }

  static double circular_mean(std::span<const double> events, double period) {
    double re = 0, im = 0;
    for (const double x : events) {
      const double angle = 2 * std::numbers::pi * std::fmod(x / period, 1.0);
      re += std::cos(angle), im += std::sin(angle);
    }
    return std::atan2(im, re) / (2 * std::numbers::pi) * period;
  }

  // Least squares of position over place number, by the events within `width` of a place.
  static bool regress(std::span<const double> events, Grid& grid, double width) {
    double n = 0, sum_k = 0, sum_x = 0, sum_kk = 0, sum_kx = 0;
    const double base = std::round((events.front() - grid.phase) / grid.period);
    const double origin = grid.phase + base * grid.period;
    const auto place = [&](double x) { return std::round((x - origin) / grid.period); };
    for (const double x : events) {
      if (std::abs(distance(grid, x)) > width * grid.period) continue;
      const double k = place(x), y = x - origin;
      ++n, sum_k += k, sum_x += y, sum_kk += k * k, sum_kx += k * y;
    }
    const double spread = n * sum_kk - sum_k * sum_k;
    if (n < static_cast<double>(kLeastMembers) || spread <= 0) return false;
    const double period = (n * sum_kx - sum_k * sum_x) / spread;
    const double phase = origin + (sum_x - period * sum_k) / n;
    if (!(period > 0.8 * grid.period) || !(period < 1.25 * grid.period)) return false;
    grid.period = period;
    grid.phase = phase;
    double squares = 0, members = 0;
    for (const double x : events) {
      const double off = distance(grid, x) / period;
      if (std::abs(off) <= width) ++members, squares += off * off;
    }
    if (members == 0) return false;
    grid.jitter = std::sqrt(squares / members);
    return true;
  }

  void rate(std::span<const double> events, Grid& grid) const {
    const double begin = at_.front() - 0.5 * spacing_, end = at_.back() + 0.5 * spacing_;
    const double first = std::ceil((begin - grid.phase) / grid.period),
                 last = std::floor((end - grid.phase) / grid.period);
    grid.places = last - first + 1;
    double previous = -1e300;
    for (const double x : events) {
      const double k = std::round((x - grid.phase) / grid.period);
      if (!on(grid, x) || k == previous || k < first || k > last) continue;
      ++grid.filled;
      previous = k;
    }
    if (grid.places < kLeastPlaces || grid.filled < static_cast<double>(kLeastMembers)) return;
    size_t within = 0;   // tokens on which an event would count
    for (const double x : at_) within += on(grid, x) ? 1 : 0;
    const double share = static_cast<double>(within) / static_cast<double>(at_.size());
    const double chance = 1 - std::exp(-static_cast<double>(events.size()) * share / grid.places);
    const double filled = std::min(1.0, grid.filled / grid.places);
    if (filled < kLeastFilled || filled <= chance || chance <= 0) return;
    grid.score = std::max(0.0, grid.places * kl(filled, std::min(chance, 1 - 1e-9)) - 1.5 * std::log(grid.places));
  }

  std::span<const double> at_;
  double spacing_ = 0;
  bool usable_ = false;
};

class Search {
 public:
  Search(std::span<const double> scores, const Clocks& clocks, const TrainOptions& options)
      : scores_(scores), options_(options), random_(options.seed) {
    for (size_t clock = 0; clock < kClocks; ++clock) {
      if (clocks.at[clock].size() == scores.size())
        axes_.push_back({static_cast<Clock>(clock), Axis(clocks.at[clock])});
    }
    std::erase_if(axes_, [](const Named& named) { return !named.axis.usable(); });
  }

  // The most significant train among `spikes`, or none.
  std::optional<Train> find(std::span<const size_t> spikes) {
    Grid best;
    std::vector<size_t> best_events;
    size_t before = 0;
    for (double level = kLowest; ; level *= kLevelFactor) {
      std::vector<size_t> events;
      for (const size_t i : spikes) {
        if (scores_[i] >= level) events.push_back(i);
      }
      if (events.size() < kLeastMembers) break;
      if (events.size() == before) continue;   // the same ones
      before = events.size();
      const Grid grid = best_over_clocks(events);
      if (grid.score > best.score) best = grid, best_events = std::move(events);
    }
    if (best.score <= 0) return std::nullopt;
    const double p = p_value(best.score, best_events.size());
    if (p > options_.most_p) return std::nullopt;
    return train_of(best_events, p);
  }

 private:
  static constexpr double kLowest = 6;
  struct Named {
    Clock clock;
    Axis axis;
  };

  static std::vector<double> positions(const Axis& axis, std::span<const size_t> events) {
    std::vector<double> at;
    for (const size_t i : events) at.push_back(axis.at(i));
    return at;
  }

  Grid best_over_clocks(std::span<const size_t> events) const {
    Grid best;
    for (const Named& named : axes_) {
      const Grid grid = named.axis.best_grid(positions(named.axis, events));
      if (grid.score > best.score) best = grid;
    }
    return best;
  }

  // How often chance alone would score as high: as many events anywhere, the same search; Gumbel's law through the mean
  // and deviation of what they score.
  double p_value(double score, size_t events) {
    std::vector<size_t> all(scores_.size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = i;
    double sum = 0, squares = 0, highest = 0;
    for (uint32_t round = 0; round < options_.shuffles; ++round) {
      for (size_t i = 0; i < events; ++i) std::swap(all[i], all[i + random_() % (all.size() - i)]);
      std::vector<size_t> drawn(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(events));
      std::sort(drawn.begin(), drawn.end());
      const double chance = best_over_clocks(drawn).score;
      sum += chance, squares += chance * chance;
      highest = std::max(highest, chance);
      if (highest >= score) return 1;
    }
    const double n = options_.shuffles, mean = sum / n;
    // Scores of chance are cut off at 0 where few events are: a width of at least one nat, that of a likelihood ratio.
    const double scale =
        std::max(1.0, std::sqrt(std::max(0.0, squares / n - mean * mean)) * std::sqrt(6.0) / std::numbers::pi);
    return -std::expm1(-std::exp(-(score - (mean - 0.5772 * scale)) / scale));
  }

  // Which clock the events keep: the one on which they lie closest to their places.
  std::optional<Train> train_of(std::span<const size_t> events, double p) const {
    struct Fit {
      Clock clock;
      const Axis* axis;
      Grid grid;
    };
    std::vector<Fit> fits;
    for (const Named& named : axes_) {
      const Grid grid = named.axis.best_grid(positions(named.axis, events));
      if (grid.score > 0) fits.push_back({named.clock, &named.axis, grid});
    }
    if (fits.empty()) return std::nullopt;
    // A grid that leaves events out may lie closer to the rest: the members count first.
    const auto most = std::max_element(fits.begin(), fits.end(),
                                       [](const Fit& a, const Fit& b) { return a.grid.score < b.grid.score; });
    const double least_score = 0.75 * most->grid.score;
    std::erase_if(fits, [&](const Fit& fit) { return fit.grid.score < least_score; });
    const auto best = std::min_element(fits.begin(), fits.end(),
                                       [](const Fit& a, const Fit& b) { return a.grid.jitter < b.grid.jitter; });
    Train train;
    const Grid& grid = best->grid;
    train.clock = best->clock;
    train.period = grid.period;
    train.phase = grid.phase - std::floor(grid.phase / grid.period) * grid.period;
    train.jitter = grid.jitter;
    train.places = grid.places;
    train.filled = grid.filled;
    train.p_value = p;
    for (const size_t i : events) {
      if (Axis::on(grid, best->axis->at(i))) train.members.push_back(i);
    }
    for (const Fit& fit : fits) {
      if (fit.clock != train.clock && fit.grid.jitter <= grid.jitter * (1 + kSameJitterShare) + kSameJitter)
        train.also.push_back(fit.clock);
    }
    return train;
  }

  std::span<const double> scores_;
  TrainOptions options_;
  std::mt19937_64 random_;
  std::vector<Named> axes_;
};

}  // namespace

const char* name_of(Clock clock) {
  switch (clock) {
    case Clock::token: return "token";
    case Clock::time: return "time";
    case Clock::bytes: return "bytes";
  }
  return "unknown";
}

std::vector<Train> trains_of(std::span<const double> scores, std::span<const size_t> spikes, const Clocks& clocks,
                             const TrainOptions& options) {
  Search search(scores, clocks, options);
  std::vector<size_t> left(spikes.begin(), spikes.end());
  std::vector<Train> trains;
  while (trains.size() < options.most_trains && left.size() >= kLeastMembers) {
    std::optional<Train> train = search.find(left);
    if (!train) break;
    std::erase_if(left, [&](size_t i) { return std::binary_search(train->members.begin(), train->members.end(), i); });
    trains.push_back(std::move(*train));
  }
  return trains;
}

}  // namespace sluice::trace
