// SPDX-License-Identifier: Apache-2.0
// Runs a parsed template.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "model/jinja_context.hpp"
#include "model/jinja_program.hpp"

namespace sluice::model::jinja {

// The text that `program` gives where `variables` are defined, whose values may come from `context`. The functions
// range, namespace, dict, raise_exception and strftime_now are defined as well. `usage` where the template raises or
// does not fit its variables; `unsupported` where it asks for what this subset lacks or for more than the limits of
// `context`.
Result<std::string> render(const Program& program, Context& context,
                           const std::vector<std::pair<std::string_view, Value>>& variables);

}  // namespace sluice::model::jinja
