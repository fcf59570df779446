#include "core/printable.h"

#include <algorithm>

#include <fmt/format.h>

namespace vmckpt {
namespace {

// Length of the valid UTF-8 character at the start of `text`, 0 when there is none (overlong forms, surrogates
// included).
size_t utf8_length(std::string_view text) {
  auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) return 1;
  size_t length = first >= 0xc2 && first < 0xe0   ? 2
                  : first >= 0xe0 && first < 0xf0 ? 3
                  : first >= 0xf0 && first < 0xf5 ? 4
                                                  : 0;
  if (length == 0 || text.size() < length) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
  }
  if (first == 0xe0 && byte(1) < 0xa0) return 0;
  if (first == 0xed && byte(1) >= 0xa0) return 0;
  if (first == 0xf0 && byte(1) < 0x90) return 0;
  if (first == 0xf4 && byte(1) >= 0x90) return 0;
  return length;
}

std::string escape(std::string_view text, std::string_view stays) {
  std::string shown;
  for (size_t at = 0; at < text.size();) {
    const auto byte = static_cast<unsigned char>(text[at]);
    const size_t length = utf8_length(text.substr(at));
    // C1 control characters (U+0080 to U+009F) steer terminals too.
    const bool control =
        byte < 0x20 || byte == 0x7f || (byte == 0xc2 && length == 2 && static_cast<unsigned char>(text[at + 1]) < 0xa0);
    if (stays.find(text[at]) == std::string_view::npos && (length == 0 || control || byte == '\\')) {
      for (size_t end = at + std::max<size_t>(length, 1); at < end; ++at) {
        shown += text[at] == '\\' ? "\\\\" : fmt::format("\\x{:02x}", static_cast<unsigned char>(text[at]));
      }
    } else {
      shown += text.substr(at, std::max<size_t>(length, 1));
      at += std::max<size_t>(length, 1);
    }
  }
  return shown;
}

}  // namespace

std::string printable(std::string_view text) { return escape(text, ""); }

std::string printable_message(std::string_view text) { return escape(text, "\n\\"); }

}  // namespace vmckpt
