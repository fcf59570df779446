// Text that somebody else chose (arguments, paths, what an image or another user's supervisor says), as a terminal may show it.
// What steers a terminal becomes \xNN: control characters, bytes that are not UTF-8, and what changes the direction of writing,
// so that a line reads otherwise than it is. Everything that leaves for a terminal goes through one of these.
#pragma once

#include <string>
#include <string_view>

namespace vmckpt {

// A name, one line; a backslash becomes two.
std::string printable(std::string_view text);

// A message, one line: backslashes stay, since it may hold text that is printable already. Only where kListItem stands in it a
// new line begins.
std::string printable_message(std::string_view text);

// What begins each item of a list in a message. Names of files, arguments and texts of an image have no NUL.
constexpr std::string_view kListItem{"\0", 1};

// The same for text that has lines.
std::string printable_lines(std::string_view text);

// The same for JSON as it was written, which escapes the lowest control characters itself: stays JSON of the same content.
std::string printable_json(std::string_view json);

}  // namespace vmckpt
