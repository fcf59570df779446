// JSON as every verb prints it: names that are not UTF-8 have U+FFFD for what is not, and nothing in it steers a terminal.
#pragma once

#include <string>

#include "core/printable.h"

namespace vmckpt {

// `indent` -1: on one line.
template <class Json>
std::string json_text(const Json& json, int indent = -1) {
  return printable_json(json.dump(indent, ' ', false, Json::error_handler_t::replace));
}

}  // namespace vmckpt
