// vmckpt verify: checksums and structure of an image, without running anything.
#include <cstdio>

#include <nlohmann/json.hpp>

#include "command_line.h"
#include "commands.h"
#include "core/printable.h"
#include "image/reader.h"
#include "json_text.h"

namespace vmckpt {

namespace po = boost::program_options;

namespace {

constexpr Verb kVerb = {"verify", "IMAGE", "Checks the structure and every checksum of an image; nothing in it is run."};

Result<PageIndex::Size> verify(const std::string& path) {
  ImageReader reader = VMCKPT_TRY(ImageReader::open(path));
  VMCKPT_TRY(reader.verify_pages());
  return reader.pages().size();
}

}  // namespace

int cmd_verify(int argc, char** argv) {
  po::options_description options("Options");
  options.add_options()("json", "print one JSON object");
  po::variables_map values;
  if (auto status = parse_command_line(argc, argv, kVerb, options, {"IMAGE"}, values)) return *status;

  const std::string path = values["IMAGE"].as<std::string>();
  Result<PageIndex::Size> verified = verify(path);
  if (values.count("json") != 0) {
    nlohmann::ordered_json answer = {{"image", printable(path)}, {"ok", verified.ok()}};
    if (verified) {
      answer["runs"] = verified->records;
      answer["page_bytes"] = verified->bytes;
    } else {
      answer["error"] = verified.error().message();
    }
    std::printf("%s\n", json_text(answer, 2).c_str());
    return verified ? kExitOk : kExitFailed;
  }
  if (!verified) return fail(kVerb, verified.error());
  std::printf("%s is whole: %llu runs of pages, %llu bytes checked\n", printable(path).c_str(),
              static_cast<unsigned long long>(verified->records), static_cast<unsigned long long>(verified->bytes));
  return kExitOk;
}

}  // namespace vmckpt
