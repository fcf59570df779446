// What every verb does with its command line: --help, and wrong usage (exit status 2) told in one line.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include <boost/program_options.hpp>

#include "core/result.h"

namespace vmckpt {

constexpr int kExitOk = 0;
constexpr int kExitFailed = 1;
constexpr int kExitUsage = 2;

struct Verb {
  const char* name;
  const char* operands;  // as the synopsis shows them: "IMAGE"
  const char* summary;   // one sentence
};

// argv[0] is the verb. Each of `operands` must be there exactly once (with a '?' behind its name:
// at most once) and ends up in `values` under its name; --help is
// added to `options`. Returns the exit status when the command is to end here.
std::optional<int> parse_command_line(int argc, char** argv, const Verb& verb,
                                      boost::program_options::options_description options,
                                      const std::vector<std::string>& operands,
                                      boost::program_options::variables_map& values);

// Tells an error on stderr; returns kExitFailed.
int fail(const Verb& verb, const Error& error);

}  // namespace vmckpt
