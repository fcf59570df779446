// vmckpt list: the targets that can be controlled, one line each.
#include <cstdio>

#include <nlohmann/json.hpp>

#include "command_line.h"
#include "commands.h"
#include "supervisor/control_socket.h"

namespace vmckpt {

namespace po = boost::program_options;

namespace {

constexpr Verb kVerb = {"list", "", "Shows the running targets."};

nlohmann::ordered_json to_json(const pb::Status& status) {
  return {{"name", status.name()},
          {"pid", status.pid()},
          {"supervisor_pid", status.supervisor_pid()},
          {"state", status.state()},
          {"processes", status.processes()},
          {"generation", status.generation()},
          {"checkpoints", status.checkpoints()},
          {"last_image", status.last_image()},
          {"image_dir", status.image_dir()},
          {"command", std::vector<std::string>(status.command().begin(), status.command().end())}};
}

std::string join(const google::protobuf::RepeatedPtrField<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : " ") + word;
  return text;
}

}  // namespace

int cmd_list(int argc, char** argv) {
  po::options_description options("options");
  options.add_options()("json", "print a JSON array");
  po::variables_map values;
  if (auto status = parse_command_line(argc, argv, kVerb, options, {}, values)) return *status;
  const bool json = values.count("json") != 0;
  nlohmann::ordered_json array = nlohmann::ordered_json::array();
  if (!json) std::printf("%-20s %8s %-14s %4s  %s\n", "NAME", "PID", "STATE", "CKPT", "COMMAND");
  for (const std::string& socket : list_sockets()) {
    auto status = ask_status(socket);
    if (!status.ok()) {
      if (status.error().err == ECONNREFUSED) remove_if_stale(socket);  // left by a supervisor that was killed
      continue;
    }
    if (json) array.push_back(to_json(*status));
    else std::printf("%-20s %8d %-14s %4u  %s\n", status->name().c_str(), status->pid(), status->state().c_str(), status->checkpoints(), join(status->command()).c_str());
  }
  if (json) std::printf("%s\n", array.dump(2, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
  return kExitOk;
}

}  // namespace vmckpt
