// Text that somebody else chose (arguments, paths, what another user's supervisor says), as a terminal may show it.
#pragma once

#include <string>
#include <string_view>

namespace vmckpt {

// Control characters and bytes that are not UTF-8 become \xNN, a backslash two.
std::string printable(std::string_view text);

// The same for messages, which may have several lines and hold text that is printable already: newlines and backslashes stay.
std::string printable_message(std::string_view text);

}  // namespace vmckpt
