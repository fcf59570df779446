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

// Control characters, U+0080 to U+009F among them, and those that change the direction of writing (U+202A to U+202E, U+2066 to
// U+2069). `text` is one UTF-8 character.
bool steers(std::string_view text) {
  auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  if (text.size() == 1) return byte(0) < 0x20 || byte(0) == 0x7f;
  if (text.size() == 2) return byte(0) == 0xc2 && byte(1) < 0xa0;
  if (text.size() != 3 || byte(0) != 0xe2) return false;
  return (byte(1) == 0x80 && byte(2) >= 0xaa && byte(2) <= 0xae) || (byte(1) == 0x81 && byte(2) >= 0xa6 && byte(2) <= 0xa9);
}

std::string escape(std::string_view text, std::string_view stays) {
  std::string shown;
  for (size_t at = 0; at < text.size();) {
    const size_t length = utf8_length(text.substr(at)), bytes = std::max<size_t>(length, 1);
    const std::string_view character = text.substr(at, bytes);
    const bool plain = length != 0 && !steers(character) && character != "\\";
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
    const size_t bytes = std::max<size_t>(utf8_length(json.substr(at)), 1);
    const std::string_view character = json.substr(at, bytes);
    // Below U+0020 it is JSON's own layout. What is left stands within strings.
    if (static_cast<unsigned char>(json[at]) < 0x20 || !steers(character)) {
      shown += character;
    } else {
      unsigned code = bytes == 1 ? 0x7f : bytes == 2 ? 0x80 : 0x2000;
      if (bytes == 2) code = 0x80 + (static_cast<unsigned char>(character[1]) & 0x3f);
      if (bytes == 3)
        code = 0x2000 + ((static_cast<unsigned char>(character[1]) & 0x3fu) << 6) +
               (static_cast<unsigned char>(character[2]) & 0x3f);
      shown += fmt::format("\\u{:04x}", code);
    }
    at += bytes;
  }
  return shown;
}

}  // namespace vmckpt
