#include "command_line.h"

#include <cstdio>
#include <sstream>

#include "core/printable.h"

namespace vmckpt {

namespace po = boost::program_options;

std::optional<int> parse_command_line(int argc, char** argv, const Verb& verb, po::options_description options,
                                      const std::vector<std::string>& operands, po::variables_map& values) {
  options.add_options()("help,h", "print this help");
  po::options_description all;
  all.add(options);
  po::positional_options_description positions;
  auto name_of = [](const std::string& operand) {
    return operand.ends_with('?') ? operand.substr(0, operand.size() - 1) : operand;
  };
  for (const std::string& operand : operands) {
    all.add_options()(name_of(operand).c_str(), po::value<std::string>());
    positions.add(name_of(operand).c_str(), 1);
  }
  auto wrong_usage = [&](const std::string& why) {
    std::fprintf(stderr, "vmckpt: %s: %s; see vmckpt %s --help\n", verb.name, printable_message(why).c_str(), verb.name);
    return kExitUsage;
  };
  try {
    using namespace po::command_line_style;
    // No guessing: `--js` for `--json` would be taken for another option by the next version.
    po::store(po::command_line_parser(argc, argv)
                  .options(all)
                  .positional(positions)
                  .style(unix_style & ~allow_guessing)
                  .run(),
              values);
    po::notify(values);
  } catch (const po::error& problem) {
    return wrong_usage(problem.what());
  }
  if (values.count("help") != 0) {
    std::ostringstream text;
    text << options;
    std::printf("usage: vmckpt %s [OPTION...] %s\n%s\n\n%s", verb.name, verb.operands, verb.summary,
                text.str().c_str());
    return kExitOk;
  }
  for (const std::string& operand : operands) {
    if (operand.ends_with('?')) continue;
    if (values.count(operand) == 0 || values[operand].as<std::string>().empty())
      return wrong_usage(operand + " is missing");
  }
  return std::nullopt;
}

int fail(const Verb& verb, const Error& error) {
  std::fprintf(stderr, "vmckpt: %s: %s\n", verb.name, printable_message(error.message()).c_str());
  return kExitFailed;
}

}  // namespace vmckpt
