// SPDX-License-Identifier: Apache-2.0
// Messages to the text that a chat model expects, by the template that came with the model.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/result.hpp"

namespace sluice::model {

// One message: role ("system", "user", "assistant") and UTF-8 text.
struct ChatTurn {
  std::string role, content;
};

struct ChatOptions {
  bool add_generation_prompt = true;  // end with the head of an answer
  std::string bos_token, eos_token;   // as text; empty where the tokenizer has none
  std::string date_string;            // "26 Jul 2024", what templates call today; empty: the local date
  std::vector<std::pair<std::string, bool>> flags;  // further variables: {"enable_thinking", false}
};

// A template in Jinja as Hugging Face's apply_chat_template() runs it (trim_blocks, lstrip_blocks, loop controls,
// raise_exception, strftime_now; no tools, no documents). Immutable after create; any thread may call render at any
// time.
class ChatTemplate {
 public:
  // Parses `source`. What is no template is `corrupt`; a construct outside of the subset is `unsupported`. Both name
  // the line.
  static Result<ChatTemplate> create(std::string source);
  ChatTemplate(ChatTemplate&&) noexcept;
  ChatTemplate& operator=(ChatTemplate&&) noexcept;
  ~ChatTemplate();

  // The text for `messages`. Malformed UTF-8 in them counts as U+FFFD. `usage` where the template refuses the
  // messages, by raise_exception or by an operation that its values do not have; `unsupported` for a filter, test or
  // method outside of the subset and for a template that takes more than about a second, 256 MiB on the way or 64 MiB
  // of text.
  Result<std::string> render(std::span<const ChatTurn> messages, const ChatOptions& options) const;

 private:
  struct Parts;
  explicit ChatTemplate(std::unique_ptr<const Parts> parts);
  std::unique_ptr<const Parts> parts_;
};

}  // namespace sluice::model
