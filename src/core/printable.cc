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

// The number of one valid UTF-8 character.
uint32_t code_point(std::string_view character) {
  const auto first = static_cast<unsigned char>(character[0]);
  if (character.size() == 1) return first;
  uint32_t code = first & (0x7fu >> character.size());
  for (char byte : character.substr(1)) code = code << 6 | (static_cast<unsigned char>(byte) & 0x3fu);
  return code;
}

// Control characters, and those that change the direction of writing.
bool steers(uint32_t code) {
  return code < 0x20 || (code >= 0x7f && code <= 0x9f) || (code >= 0x202a && code <= 0x202e) ||
         (code >= 0x2066 && code <= 0x2069);
}

std::string escape(std::string_view text, std::string_view stays) {
  std::string shown;
  for (size_t at = 0; at < text.size();) {
    const size_t length = utf8_length(text.substr(at)), bytes = std::max<size_t>(length, 1);
    const std::string_view character = text.substr(at, bytes);
    const bool plain = length != 0 && !steers(code_point(character)) && character != "\\";
    if (plain || stays.find(text[at]) != std::string_view::npos) {
      shown += character;
    } else {
      for (char byte : character) shown += byte == '\\' ? "\\\\" : fmt::format("\\x{:02x}", static_cast<unsigned char>(byte));
    }
    at += bytes;
  }
  return shown;
}

}  // namespace

std::string printable(std::string_view text) { return escape(text, ""); }

std::string printable_message(std::string_view text) {
  std::string shown;
  for (size_t end; (end = text.find(kListItem)) != std::string_view::npos; text.remove_prefix(end + kListItem.size())) {
    shown += escape(text.substr(0, end), "\\") + "\n  - ";
  }
  return shown + escape(text, "\\");
}

std::string printable_lines(std::string_view text) { return escape(text, "\n\\"); }

std::string printable_json(std::string_view json) {
  std::string shown;
  for (size_t at = 0; at < json.size();) {
    const size_t length = utf8_length(json.substr(at)), bytes = std::max<size_t>(length, 1);
    const std::string_view character = json.substr(at, bytes);
    const uint32_t code = code_point(character);
    // Below U+0020 it is JSON's own layout. What is left stands within strings.
    if (length != 0 && code >= 0x20 && steers(code)) shown += fmt::format("\\u{:04x}", code);
    else shown += character;
    at += bytes;
  }
  return shown;
}

}  // namespace vmckpt
