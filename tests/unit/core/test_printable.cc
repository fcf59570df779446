#include "core/printable.h"

#include "catch.h"

using namespace vmckpt;

namespace {

const std::string kOverride = "\xe2\x80\xae", kIsolate = "\xe2\x81\xa6";  // U+202E, U+2066
const std::string kNames = "Übung 日本語 🎉 e\u0301 Ω";

}  // namespace

TEST_CASE("what steers a terminal is shown, names in any language stay as they are") {
  for (auto* shows : {printable, printable_message, printable_lines}) {
    CHECK(shows(kNames) == kNames);
    CHECK(shows("a\x1b[2Jb\rc\x7f") == "a\\x1b[2Jb\\x0dc\\x7f");
    CHECK(shows("\xc2\x9b" "31m") == "\\xc2\\x9b31m");  // CSI in one character
    CHECK(shows("a" + kOverride + "b" + kIsolate) == "a\\xe2\\x80\\xaeb\\xe2\\x81\\xa6");
    CHECK(shows("\xff\xe2\x80") == "\\xff\\xe2\\x80");
    CHECK(shows("\xe2\x80\xa9\xe2\x80\xaf\xe2\x81\xa5\xe2\x81\xaa") == "\xe2\x80\xa9\xe2\x80\xaf\xe2\x81\xa5\xe2\x81\xaa");
  }
}

TEST_CASE("a name and a message are one line, a list in a message has one for each item") {
  CHECK(printable("a\nb\\") == "a\\x0ab\\\\");
  CHECK(printable_message("a\nb\\") == "a\\x0ab\\");
  CHECK(printable_lines("a\nb\\") == "a\nb\\");
  const std::string list = std::string("refused").append(kListItem) + "one\n  - false" + std::string(kListItem) + "two";
  CHECK(printable_message(list) == "refused\n  - one\\x0a  - false\n  - two");
  CHECK(printable(std::string(kListItem)) == "\\x00");
}

TEST_CASE("JSON keeps its layout and its content, and nothing in it steers a terminal") {
  CHECK(printable_json("{\n  \"" + kNames + "\": 1\n}") == "{\n  \"" + kNames + "\": 1\n}");
  CHECK(printable_json("\"\x7f\xc2\x9b" + kOverride + kIsolate + "\"") == "\"\\u007f\\u009b\\u202e\\u2066\"");
}
