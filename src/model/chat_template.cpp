// SPDX-License-Identifier: Apache-2.0
#include "model/chat_template.hpp"

#include <fmt/format.h>

#include <ctime>

#include "model/jinja_renderer.hpp"
#include "model/utf8.hpp"

namespace sluice::model {

struct ChatTemplate::Parts {
  jinja::Program program;
};

namespace {

using jinja::Value;

// The local time, or the beginning of the day that `date` names.
Result<std::tm> time_of(const std::string& date) {
  std::tm day{};
  if (date.empty()) {
    const std::time_t now = std::time(nullptr);
    if (::localtime_r(&now, &day) == nullptr) return fail(ErrorCode::internal, "the local time is not known");
    return day;
  }
  const char* end = ::strptime(date.c_str(), "%d %b %Y", &day);
  if (end == nullptr || *end != '\0') {
    return fail(ErrorCode::usage, fmt::format("'{}' is no date; it must be like '26 Jul 2024'", date));
  }
  ::timegm(&day);  // fills in the weekday
  return day;
}

// `text`, valid and in the arena where it had to be repaired.
Result<Value> borrowed(jinja::Context& context, std::string_view text) {
  std::string repaired;
  const std::string_view valid = valid_utf8(text, repaired);
  if (repaired.empty()) return Value::of(valid);
  return context.text(std::move(repaired));
}

Result<Value> message_list(jinja::Context& context, std::span<const ChatTurn> messages) {
  std::vector<Value> items;
  items.reserve(messages.size());
  for (const ChatTurn& message : messages) {
    SLUICE_TRY_ASSIGN(role, borrowed(context, message.role));
    SLUICE_TRY_ASSIGN(content, borrowed(context, message.content));
    SLUICE_TRY_ASSIGN(item, context.dict({{Value::of("role"), role}, {Value::of("content"), content}}));
    items.push_back(item);
  }
  return context.list(std::move(items));
}

}  // namespace

ChatTemplate::ChatTemplate(std::unique_ptr<const Parts> parts) : parts_(std::move(parts)) {}
ChatTemplate::ChatTemplate(ChatTemplate&&) noexcept = default;
ChatTemplate& ChatTemplate::operator=(ChatTemplate&&) noexcept = default;
ChatTemplate::~ChatTemplate() = default;

Result<ChatTemplate> ChatTemplate::create(std::string source) {
  auto parts = std::make_unique<Parts>();
  SLUICE_TRY(jinja::parse(std::move(source), parts->program));
  return ChatTemplate(std::move(parts));
}

Result<std::string> ChatTemplate::render(std::span<const ChatTurn> messages, const ChatOptions& options) const {
  SLUICE_TRY_ASSIGN(now, time_of(options.date_string));
  jinja::Context context({}, now);
  SLUICE_TRY_ASSIGN(list, message_list(context, messages));
  std::vector<std::pair<std::string_view, Value>> variables = {
      {"messages", list},
      {"tools", Value::none()},
      {"documents", Value::none()},
      {"add_generation_prompt", Value::of(options.add_generation_prompt)},
  };
  for (const auto& [name, token] : {std::pair<std::string_view, const std::string&>("bos_token", options.bos_token),
                                    {"eos_token", options.eos_token}}) {
    if (!token.empty()) variables.emplace_back(name, Value::of(std::string_view(token)));
  }
  if (!options.date_string.empty()) {
    variables.emplace_back("date_string", Value::of(std::string_view(options.date_string)));
  }
  for (const auto& [name, flag] : options.flags) variables.emplace_back(name, Value::of(flag));
  return jinja::render(parts_->program, context, variables);
}

}  // namespace sluice::model
