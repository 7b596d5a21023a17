// SPDX-License-Identifier: Apache-2.0
// The report as one page: figures are SVG that is drawn here, so that the page needs no script, prints, and reads the
// same in ten years. Colours are CSS variables with a light and a dark set.
#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "base/units.hpp"
#include "trace/export.hpp"
#include "trace/report.hpp"

namespace sluice::trace {
namespace {

using nlohmann::json;

// Room for labels at the size that a phone needs.
constexpr double kWidth = 760, kLeft = 116, kRight = 16, kTop = 16;
constexpr double kLabelHeight = 26;  // of a label's line on a phone
constexpr double kPlotWidth = kWidth - kLeft - kRight;
constexpr size_t kColumns = 300;     // of a figure over all tokens: more than a phone has pixels for

constexpr const char* kStyle = R"(
:root{--bg:#fff;--fg:#1b1f24;--dim:#667;--line:#d5d9df;--ink:#2563a8;--spike:#c2410c;
--s0:#b4452c;--s1:#d9903d;--s2:#8f6bb3;--s3:#2f6f9f;--s4:#3f9b8f;--s5:#7a9b3f;--s6:#a3a9b3;--s7:#5b6270}
@media screen and (prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e4e7eb;--dim:#9aa3ad;--line:#363c44;
--ink:#6aa8e8;--spike:#fb8b4b;
--s0:#e0694d;--s1:#e3a75d;--s2:#b494d6;--s3:#5f9fd0;--s4:#62bdb0;--s5:#a3c465;--s6:#767d87;--s7:#aab1bb}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:60rem;background:var(--bg);color:var(--fg);
font:16px/1.45 system-ui,sans-serif}
h1{font-size:1.4rem;margin:.2rem 0}h2{font-size:1.1rem;margin:1.6rem 0 .3rem}
p,li,ul{margin:.3rem 0}.dim{color:var(--dim)}.warn{color:var(--spike)}
table{border-collapse:collapse;width:100%}
td,th{padding:.15rem .5rem .15rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
td{overflow-wrap:anywhere}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.scroll{overflow-x:auto}
svg{display:block;width:100%;height:auto}
svg text{font-size:13px;fill:var(--dim)}
.axis{stroke:var(--line)}.itl{fill:none;stroke:var(--ink)}.bar{fill:var(--ink)}.spike{fill:var(--spike)}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding:0;margin:.3rem 0;list-style:none}
.key span{display:inline-block;width:.8em;height:.8em;margin-right:.35em;
-webkit-print-color-adjust:exact;print-color-adjust:exact}
@media (max-width:40rem){svg text{font-size:22px}body{padding:.7rem}.n{font-size:.85rem;padding-right:0}}
@media print{:root{color-scheme:light;--fg:#000;--dim:#444;--line:#bbb}body{max-width:none}
h2{break-after:avoid}svg{break-inside:avoid}}
)";

// What a reader tells apart; several parts share a colour where one explains the other.
struct Group {
  const char* name;
  const char* color;
  std::vector<Part> parts;
};
const std::array<Group, 8>& groups() {
  static const std::array<Group, 8> kGroups = {{
      {"disk wait", "--s0", {Part::disk_wait, Part::embed}},
      {"copy wait", "--s1", {Part::copy_wait}},
      {"other sessions", "--s2", {Part::turn_wait}},
      {"matmul", "--s3", {Part::matmul, Part::lm_head}},
      {"attention", "--s4", {Part::attention, Part::rope}},
      {"other operations", "--s5", {Part::norm, Part::activation, Part::finish}},
      {"sampling, text, caller", "--s7", {Part::session, Part::sampling, Part::detokenize, Part::callback}},
      {"tracing and not named", "--s6", {Part::evidence, Part::pass_gap, Part::gap}},
  }};
  return kGroups;
}

std::string escaped(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '&': out += "&amp;"; break;
      case '"': out += "&quot;"; break;
      default: out += c;
    }
  }
  return out;
}

std::string seconds_of(const json& value) { return format_seconds(value.get<double>()); }

// A step of 1, 2 or 5 times a power of ten that divides `range` into at most `most` pieces.
double nice_step(double range, int most) {
  if (!(range > 0)) return 1;
  const double power = std::pow(10.0, std::floor(std::log10(range / most)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (range / (factor * power) <= most) return factor * power;
  }
  return 10 * power;
}

// One figure: a frame with axes, and what is drawn into it.
class Figure {
 public:
  // `lines`: of labels below the frame.
  Figure(std::string label, double height, int lines = 1) : height_(height), bottom_(lines * kLabelHeight + 4) {
    svg_ = fmt::format(R"(<svg viewBox="0 0 {} {}" role="img" aria-label="{}">)", kWidth, height, escaped(label));
  }
  double height() const { return height_ - kTop - bottom_; }
  double below() const { return y(0) + 22; }   // the first line of labels
  double y(double share) const { return kTop + height() * (1 - share); }   // 0: bottom, 1: top
  static double x(double share) { return kLeft + kPlotWidth * share; }

  void add(std::string_view element) { svg_ += element; }
  void text(double x, double y, const char* anchor, std::string_view value) {
    svg_ += fmt::format(R"(<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>)", x, y, anchor, escaped(value));
  }
  void rectangle(const char* style, double x, double y, double width, double height, std::string_view title = {}) {
    svg_ += fmt::format(R"(<rect {} x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}">)", style, x, y,
                        std::max(0.0, width), std::max(0.0, height));
    if (!title.empty()) svg_ += fmt::format("<title>{}</title>", escaped(title));
    svg_ += "</rect>";
  }
  void y_axis(double top, bool seconds) {
    const double step = nice_step(top, 5);
    for (double value = 0; value <= top * 1.001; value += step) {
      y_line(value / top, seconds ? (value == 0 ? "0" : format_seconds(value)) : fmt::format("{:g}", value));
    }
  }
  void y_line(double share, std::string_view label) {
    svg_ += fmt::format(R"(<line class="axis" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>)", kLeft, kWidth - kRight,
                        y(share), y(share));
    text(kLeft - 6, y(share) + 5, "end", label);
  }
  void x_axis(double end, std::string_view unit) {
    const double step = nice_step(end, 6);
    // Numbers at the edges would be cut off or lie on the other axis's if they were centred.
    for (double value = 0; value <= end * 1.001; value += step) {
      const char* anchor = value == 0 ? "start" : value > 0.97 * end ? "end" : "middle";
      text(x(value / end), below(), anchor, fmt::format("{:g}", value));
    }
    text(kWidth - kRight, height_ - 8, "end", unit);
  }
  std::string take() { return std::move(svg_) + "</svg>"; }

 private:
  double height_, bottom_;
  std::string svg_;
};

class Page {
 public:
  Page(const json& report, const Tokens& tokens) : report_(report), clocks_(clocks_of(tokens)) {
    for (const Token& token : tokens.all) {
      if (token.decoded) decoded_.push_back(&token);
    }
  }

  std::string page() {
    header();
    if (!decoded_.empty()) {
      itl_figure();
      findings();
      stages_figure();
      histogram();
      periods();
    }
    tiers();
    configuration();
    return fmt::format(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" "
        "content=\"width=device-width,initial-scale=1\"><meta name=\"color-scheme\" content=\"light dark\">"
        "<link rel=\"icon\" href=\"data:,\"><title>Sluice "
        "trace</title><style>{}</style></head><body>{}</body></html>\n",
        kStyle, html_);
  }

 private:
  void header() {
    const json& run = report_["run"];
    const json model = run.is_object() ? run.value("model", json::object()) : json::object();
    const bool named = model.is_object() && model.contains("name") && model["name"].is_string();
    html_ += fmt::format("<h1>{}</h1>", escaped(named ? model["name"].get<std::string>() : "Trace"));
    html_ += fmt::format("<p class=\"dim\">{} tokens, {} of them decoded in {}; {} records, {} dropped{}</p>",
                         report_["tokens"].get<uint64_t>(), decoded_.size(), seconds_of(report_["decode_seconds"]),
                         report_["records"].get<uint64_t>(), report_["dropped"].get<uint64_t>(),
                         report_["complete"].get<bool>() ? "" : "; the run ended before its trace was finished");
    if (const json& injected = report_["injected"]; !injected.empty()) {
      html_ += "<p class=\"warn\">Faults were injected on purpose:</p><ul class=\"warn\">";
      for (const json& fault : injected)
        html_ += fmt::format("<li>{}, {} times</li>", escaped(fault["text"].get<std::string>()),
                             fault["times"].get<uint64_t>());
      html_ += "</ul>";
    }
    const json& itl = report_["itl"];
    html_ += "<h2>Time between tokens</h2><table><tr>";
    for (const char* name : {"p50", "p90", "p99", "p99.9", "max"})
      html_ += fmt::format("<th class=\"n\">{}</th>", name);
    html_ += "</tr><tr>";
    for (const char* name : {"p50", "p90", "p99", "p99.9", "max"})
      html_ += fmt::format("<td class=\"n\">{}</td>", seconds_of(itl[name]));
    html_ += "</tr></table>";
    html_ += fmt::format("<p class=\"dim\">Named parts explain at least 99% of {:.2f}% of the tokens. {}.</p>",
                         100 * report_["accounting"]["tokens_at_99_percent"].get<double>(), clock_text());
  }

  std::string clock_text() const {
    const json& clock = report_["clock"];
    const auto within = [&](const char* name) { return format_seconds(clock[name].get<double>() * 1e-9); };
    std::string text = "The clocks are known to within " + within("host_error_ns");
    if (!clock["device_error_ns"].is_null())
      text += "; the GPU's clock is known to within " + within("device_error_ns") + " in nine of ten passes";
    return text;
  }

  size_t columns() const { return std::min(kColumns, decoded_.size()); }
  // Tokens [begin, end) of a column.
  std::pair<size_t, size_t> column(size_t c) const {
    return {c * decoded_.size() / columns(), (c + 1) * decoded_.size() / columns()};
  }

  void itl_figure() {
    const double top = report_["itl"]["max"].get<double>() * 1.05;
    Figure figure("Inter-token latency over tokens", 260, 2);
    figure.y_axis(top, true);
    figure.x_axis(static_cast<double>(decoded_.size()), "token");
    std::string path;
    for (size_t c = 0; c < columns(); ++c) {
      const auto [begin, end] = column(c);
      double low = 1e300, high = 0;
      for (size_t i = begin; i < end; ++i)
        low = std::min(low, decoded_[i]->total()), high = std::max(high, decoded_[i]->total());
      const double x = Figure::x((static_cast<double>(c) + 0.5) / static_cast<double>(columns()));
      path += fmt::format("{}{:.1f} {:.1f}L{:.1f} {:.1f}", c == 0 ? "M" : "L", x, figure.y(low / top), x,
                          figure.y(high / top));
    }
    figure.add(fmt::format(R"(<path class="itl" d="{}"/>)", path));
    for (const json& index : report_["spikes"]) {
      const auto i = index.get<size_t>();
      const double x = Figure::x((static_cast<double>(i) + 0.5) / static_cast<double>(decoded_.size()));
      figure.add(
          fmt::format(R"(<circle class="spike" cx="{:.1f}" cy="{:.1f}" r="3"><title>token {}: {}</title></circle>)", x,
                      figure.y(decoded_[i]->total() / top), i, format_seconds(decoded_[i]->total())));
    }
    html_ += "<h2>Latency of each token</h2>" + figure.take();
  }

  void findings() {
    html_ += "<h2>What stood out</h2>";
    for (const json& train : report_["trains"]) train_text(train);
    const json& loose = report_["loose_spikes"];
    std::string causes;
    for (const auto& [cause, count] : loose["causes"].items())
      causes += fmt::format(" {} {},", count.get<uint64_t>(), cause);
    if (!causes.empty()) causes.back() = '.';
    html_ += fmt::format("<p>{} spikes without a period, {:.1f}% of the time.{}</p>", loose["count"].get<uint64_t>(),
                         100 * loose["share_of_time"].get<double>(), causes);
    const json& steps = report_["steps"];
    if (const auto count = steps["count"].get<uint64_t>(); count > steps["largest"].size()) {
      html_ += fmt::format("<p>The level changes {} times; the largest:</p>", count);
    }
    for (const json& step : steps["largest"]) {
      html_ += fmt::format("<p>The level changes at token {}: {} before, {} after.</p>", step["token"].get<uint64_t>(),
                           seconds_of(step["before"]), seconds_of(step["after"]));
    }
    if (const json& trend = report_["trend"]; trend.is_object()) {
      html_ += fmt::format("<p>The median token takes {} at {} tokens of context and {} at {}.</p>",
                           seconds_of(trend["first"]), trend["context_first"].get<uint64_t>(),
                           seconds_of(trend["last"]), trend["context_last"].get<uint64_t>());
    }
  }

  void train_text(const json& train) {
    const std::string cause = train["cause"], evidence = train["evidence"];
    html_ += fmt::format(
        "<p><b>Every {}</b> (phase {}): {} spikes in {:.0f} places, {} each, {:.1f}% of the time. Cause: "
        "<b>{}</b> ({}): {}. {}",
        on_its_clock(train, "period"), on_its_clock(train, "phase"), train["tokens"].size(),
        train["places"].get<double>(), seconds_of(train["excess_each"]), 100 * train["share_of_time"].get<double>(),
        escaped(cause), train["grade"].get<std::string>(), escaped(train["cause_text"].get<std::string>()),
        escaped(train["meaning"].get<std::string>()));
    if (!evidence.empty()) html_ += fmt::format(" Found: {}.", escaped(evidence));
    if (train.contains("confirmation"))
      html_ += fmt::format(" {}.", escaped(train["confirmation"]["text"].get<std::string>()));
    std::string also;
    for (const json& clock : train["also"]) also += (also.empty() ? "" : " and ") + clock.get<std::string>();
    if (!also.empty())
      html_ += fmt::format(" It keeps the {} clock; on {} it is as regular.", train["clock"].get<std::string>(), also);
    html_ += "</p>";
  }

  // A train's period or phase.
  static std::string on_its_clock(const json& train, const char* which) {
    const auto value = train[which].get<double>();
    if (train["clock"] == "token") return fmt::format("{:.1f} tokens", value);
    if (train["clock"] == "time") return format_seconds(value);
    return format_bytes(static_cast<uint64_t>(value)) + " read";
  }

  static double seconds_in(const Token& token, const Group& group) {
    return std::accumulate(group.parts.begin(), group.parts.end(), 0.0,
                           [&](double sum, Part part) { return sum + token[part]; });
  }

  void stages_figure() {
    std::vector<std::array<double, 8>> stacks(columns());
    double top = 0;
    for (size_t c = 0; c < columns(); ++c) {
      const auto [begin, end] = column(c);
      double sum = 0;
      for (size_t g = 0; g < groups().size(); ++g) {
        for (size_t i = begin; i < end; ++i)
          stacks[c][g] += seconds_in(*decoded_[i], groups()[g]) / static_cast<double>(end - begin);
        sum += stacks[c][g];
      }
      top = std::max(top, sum * 1.05);
    }
    Figure figure("Time of a token by stage", 260, 2);
    figure.y_axis(top, true);
    figure.x_axis(static_cast<double>(decoded_.size()), "token");
    const double width = kPlotWidth / static_cast<double>(columns());
    for (size_t g = 0; g < groups().size(); ++g) {
      std::string path;
      for (size_t c = 0; c < columns(); ++c) {
        const double below =
            std::accumulate(stacks[c].begin(), stacks[c].begin() + static_cast<std::ptrdiff_t>(g), 0.0);
        const double bottom = figure.y(below / top), height = figure.height() * stacks[c][g] / top;
        if (height > 0.05)
          path += fmt::format("M{:.1f} {:.1f}h{:.2f}v{:.2f}h{:.2f}z", Figure::x(0) + width * static_cast<double>(c),
                              bottom, width, -height, -width);
      }
      figure.add(fmt::format("<path style=\"fill:var({})\" d=\"{}\"><title>{}</title></path>", groups()[g].color, path,
                             groups()[g].name));
    }
    html_ += "<h2>Where the time goes</h2>" + figure.take() + "<ul class=\"key\">";
    const double all = report_["decode_seconds"].get<double>();
    for (const Group& group : groups()) {
      double sum = 0;
      for (const Token* token : decoded_) sum += seconds_in(*token, group);
      html_ += fmt::format("<li><span style=\"background:var({})\"></span>{} {:.1f}%</li>", group.color, group.name,
                           all > 0 ? 100 * sum / all : 0);
    }
    html_ += "</ul>";
  }

  // Bars over a logarithmic axis: a tail is visible beside the bulk.
  void histogram() {
    constexpr size_t kBars = 60;
    double low = 1e300, high = 0;
    for (const Token* token : decoded_) low = std::min(low, token->total()), high = std::max(high, token->total());
    if (!(low > 0) || !(high > low * 1.0001)) return;
    std::array<double, kBars> bars{};
    const double range = std::log(high / low);
    for (const Token* token : decoded_) {
      ++bars[std::min(kBars - 1, static_cast<size_t>(std::log(token->total() / low) / range * kBars))];
    }
    const double top = std::log1p(*std::max_element(bars.begin(), bars.end())) * 1.05;
    Figure figure("Histogram of latencies, both axes logarithmic", 174);
    // 0, then 1, 3, 10, 30 and so on where their labels have room.
    figure.y_line(0, "0");
    double last = 0;
    for (int i = 0; i < 20; ++i) {
      const double count = std::pow(10.0, i / 2) * (i % 2 == 0 ? 1 : 3), at = std::log1p(count) / top;
      if (at > 1 || figure.height() * (at - last) < kLabelHeight) continue;
      figure.y_line(at, fmt::format("{:g}", count));
      last = at;
    }
    for (size_t i = 0; i < kBars; ++i) {
      const double height = figure.height() * std::log1p(bars[i]) / top;
      figure.rectangle("class=\"bar\"", Figure::x(static_cast<double>(i) / kBars), figure.y(0) - height,
                       kPlotWidth / kBars - 1, height, fmt::format("{:.0f} tokens", bars[i]));
    }
    for (const double share : {0.0, 1.0 / 3, 2.0 / 3, 1.0}) {   // as many as a telephone has room for
      figure.text(Figure::x(share), figure.below(),
                  share == 0   ? "start"
                  : share == 1 ? "end"
                               : "middle",
                  format_seconds(low * std::exp(range * share)));
    }
    html_ += "<h2>How latencies are spread</h2>" + figure.take() + 
             "<p class=\"dim\">How many tokens took so long; both axes are logarithmic.</p>";
  }

  // Each train folded over its period on its clock: a train is a column of dots, drift a slope.
  void periods() {
    for (const json& train : report_["trains"]) {
      const std::vector<double>& at = clocks_[clock_of(train)];
      if (at.empty()) continue;
      const double period = train["period"].get<double>(), phase = train["phase"].get<double>();
      Figure figure("Spikes folded over their period", 174);
      figure.add(fmt::format(R"(<rect class="axis" fill="none" x="{}" y="{}" width="{}" height="{}"/>)", kLeft, kTop,
                             kPlotWidth, figure.height()));
      const double cycles = std::max(1.0, train["places"].get<double>());
      for (const json& index : report_["spikes"]) {
        const double place = (at[index.get<size_t>()] - phase) / period + 0.5;
        const double row = std::floor(place) - std::floor((at.front() - phase) / period + 0.5);
        figure.add(fmt::format(R"(<circle class="spike" cx="{:.1f}" cy="{:.1f}" r="3"/>)",
                               Figure::x(place - std::floor(place)),
                               figure.y(1 - std::clamp((row + 0.5) / (cycles + 1), 0.0, 1.0))));
      }
      figure.text(Figure::x(0), figure.below(), "start", "half a period before");
      figure.text(Figure::x(1), figure.below(), "end", "half after");
      html_ += fmt::format(
          "<h2>Spikes every {}</h2>{}<p class=\"dim\">One line a period, the {} clock from side to side: a column is a "
          "train, and what lies beside it came by itself.</p>",
          on_its_clock(train, "period"), figure.take(), train["clock"].get<std::string>());
    }
  }

  static Clock clock_of(const json& train) {
    for (const Clock clock : {Clock::time, Clock::bytes}) {
      if (train["clock"] == name_of(clock)) return clock;
    }
    return Clock::token;
  }

  void tiers() {
    const json& run = report_["run"];
    if (!run.is_object() || !run.contains("tiers") || !run["tiers"].is_array() || run["tiers"].empty()) return;
    const json& layers = run["tiers"];
    const auto bytes = [](const json& layer, const char* tier) {
      return layer.is_object() && layer.contains(tier) && layer[tier].is_number() ? layer[tier].get<double>() : 0.0;
    };
    constexpr std::array<std::pair<const char*, const char*>, 4> kTiers = {
        {{"device", "--s3"}, {"host", "--s1"}, {"disk", "--s0"}, {"rows", "--s6"}}};
    double top = 0;
    for (const json& layer : layers) {
      double sum = 0;
      for (const auto& [tier, color] : kTiers) sum += bytes(layer, tier);
      top = std::max(top, sum);
    }
    if (!(top > 0)) return;
    Figure figure("Tiers of each layer", 174);
    const double width = kPlotWidth / static_cast<double>(layers.size());
    for (size_t i = 0; i < layers.size(); ++i) {
      double below = 0;
      for (const auto& [tier, color] : kTiers) {
        const double height = figure.height() * bytes(layers[i], tier) / top;
        figure.rectangle(
            fmt::format("style=\"fill:var({})\"", color).c_str(), Figure::x(0) + width * static_cast<double>(i),
            figure.y(0) - below - height, width * 0.9, height,
            fmt::format("{}: {}", tier,
                        format_bytes(static_cast<uint64_t>(std::clamp(bytes(layers[i], tier), 0.0, 1e18)))));
        below += height;
      }
    }
    figure.text(Figure::x(0), figure.below(), "start",
                fmt::format("embedding, layers, head; the largest {}",
                            format_bytes(static_cast<uint64_t>(std::clamp(top, 0.0, 1e18)))));
    html_ += "<h2>Where the weights are</h2>" + figure.take() + "<ul class=\"key\">";
    for (const auto& [tier, color] : kTiers)
      html_ += fmt::format("<li><span style=\"background:var({})\"></span>{}</li>", color, tier);
    html_ += "</ul>";
  }

  void configuration() {
    const json& run = report_["run"];
    if (!run.is_object()) return;
    html_ += "<h2>The run</h2><table>";
    rows(run, "");
    html_ += "</table>";
    if (run.contains("rerun") && run["rerun"].is_object()) {
      html_ += "<h2>What was asked for</h2><table>";
      asked(run["rerun"]);
      html_ += "</table>";
    }
  }

  void row(std::string_view name, std::string_view text) {
    html_ += fmt::format("<tr><td>{}</td><td>{}</td></tr>", escaped(name), escaped(text));
  }

  void rows(const json& object, const std::string& prefix) {
    for (const auto& [name, value] : object.items()) {
      if (name == "tiers" || name == "rerun") continue;
      if (value.is_object() && prefix.empty()) {
        rows(value, name + " ");
        continue;
      }
      std::string text =
          value.is_string() ? value.get<std::string>() : value.dump(-1, ' ', false, json::error_handler_t::replace);
      if (prefix == "bytes " && value.is_number_unsigned()) text = format_bytes(value.get<uint64_t>());
      row(prefix + name, text);
    }
  }

  // What the run can be made again with. A setting that is missing or of another type has no row.
  void asked(const json& rerun) {
    if (rerun.contains("prompt") && rerun["prompt"].is_array())
      row("prompt", fmt::format("{} tokens", rerun["prompt"].size()));
    const json generate = rerun.value("generate", json::object()), options = rerun.value("options", json::object());
    const auto number = [&](const json& of, const char* key, const char* name, const char* unless_positive) {
      if (!of.is_object() || !of.contains(key) || !of[key].is_number()) return;
      const auto value = of[key].get<double>();
      const bool said = unless_positive == nullptr || value > 0;
      row(name, !said ? unless_positive : of[key].is_number_float() ? fmt::format("{:g}", value) : of[key].dump());
    };
    // Of sampling a negative number is the model's own setting, and 0 one like any other.
    const auto sampling = [&](const char* key, const char* name) {
      const bool given = generate.is_object() && generate.contains(key) && generate[key].is_number();
      if (given && generate[key].get<double>() < 0) row(name, "the model's own");
      else number(generate, key, name, nullptr);
    };
    number(generate, "max_tokens", "most tokens", nullptr);
    sampling("temperature", "temperature");
    sampling("top_k", "top k");
    sampling("top_p", "top p");
    sampling("min_p", "min p");
    sampling("repeat_penalty", "repeat penalty");
    number(generate, "seed", "seed", "1");
    const auto flag = [&](const json& of, const char* key, const char* name, std::array<const char*, 2> words) {
      if (!of.is_object() || !of.contains(key)) return;
      const json& value = of[key];
      if (value.is_boolean()) row(name, words[value.get<bool>() ? 1 : 0]);
      else if (value.is_number_unsigned() && value.get<uint64_t>() < 2) row(name, words[value.get<uint64_t>()]);
    };
    flag(generate, "ignore_eos", "end of text", {"ends it", "is ignored"});
    if (generate.is_object() && generate.contains("stop")) {
      for (const json& text : generate["stop"])
        row("stops at", text.is_string() ? text.get<std::string>() : text.dump());
    }
    const auto budget = [&](const char* key, const char* name, const char* otherwise) {
      if (!options.is_object() || !options.contains(key)) return;
      const json& value = options[key];
      if (value.is_number_unsigned() && value.get<uint64_t>() > 0) row(name, format_bytes(value.get<uint64_t>()));
      else row(name, otherwise);
    };
    budget("device_memory", "device memory", "what the model needs, as far as it is free");
    budget("host_memory", "host memory", "none");
    number(options, "context", "context", "the model's own, at most 4096");
    number(options, "sessions", "sessions", nullptr);
    number(options, "max_rows", "rows of a prefill pass", "the planner's choice");
    number(options, "threads", "threads", "one per core");
    flag(options, "precision", "precision", {"int4", "fine"});
    flag(options, "cpu_activations", "CPU activations", {"int8", "f32"});
    flag(options, "verify", "mapped weights", {"checked at opening", "not checked"});
    for (const json& fault : report_["injected"]) row("fault", fault["text"].get<std::string>());
  }

  const json& report_;
  const Clocks clocks_;
  std::vector<const Token*> decoded_;
  std::string html_;
};

}  // namespace

std::string html_report(const json& report, const Tokens& tokens) { return Page(report, tokens).page(); }

}  // namespace sluice::trace
