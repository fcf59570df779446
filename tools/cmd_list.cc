// vmckpt list: the targets that can be controlled, one line each, and those that have ended lately.
#include <cstdio>
#include <set>

#include <nlohmann/json.hpp>
#include <sys/wait.h>

#include "command_line.h"
#include "commands.h"
#include "core/printable.h"
#include "json_text.h"
#include "supervisor/control_socket.h"
#include "supervisor/ended_targets.h"

namespace vmckpt {

namespace po = boost::program_options;

namespace {

constexpr Verb kVerb = {"list", "", "Lists running targets and targets that have ended within the last day."};

std::vector<std::string> words_of(const google::protobuf::RepeatedPtrField<std::string>& words) {
  return {words.begin(), words.end()};
}

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
          {"log", status.log()},
          {"has_terminal", status.has_terminal()},
          {"command", words_of(status.command())}};
}

nlohmann::ordered_json to_json(const pb::EndedTarget& ended) {
  nlohmann::ordered_json json = {{"name", ended.name()}, {"pid", ended.pid()}, {"state", "exited"}};
  if (WIFSIGNALED(ended.wait_status())) json["signal"] = WTERMSIG(ended.wait_status());
  else json["status"] = WEXITSTATUS(ended.wait_status());
  json["ended_s"] = ended.ended_s();
  json["last_image"] = ended.last_image();
  json["image_dir"] = ended.image_dir();
  json["log"] = ended.log();
  json["command"] = words_of(ended.command());
  return json;
}

std::string join(const google::protobuf::RepeatedPtrField<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : " ") + printable(word);
  return text;
}

std::vector<pb::Status> running_targets() {
  std::vector<pb::Status> running;
  for (const std::string& socket : list_sockets()) {
    auto status = ask_status(socket);
    if (status.ok()) {
      running.push_back(std::move(*status));
      continue;
    }
    if (status.error().err == ECONNREFUSED) remove_if_stale(socket);  // left by a supervisor that was killed
  }
  return running;
}

void print_table(const std::vector<pb::Status>& running, const std::vector<pb::EndedTarget>& ended) {
  std::printf("%-20s %8s %-14s %4s  %s\n", "NAME", "PID", "STATE", "CKPT", "COMMAND");
  for (const pb::Status& status : running) {
    std::printf("%-20s %8d %-14s %4u  %s\n", printable(status.name()).c_str(), status.pid(), printable(status.state()).c_str(),
                status.checkpoints(), join(status.command()).c_str());
  }
  for (const pb::EndedTarget& target : ended) {
    std::printf("%-20s %8s %-14s %4s  %s\n", printable(target.name()).c_str(), "-", "exited", "",
                (how_it_ended(target) + ": " + join(target.command())).c_str());
  }
}

}  // namespace

int cmd_list(int argc, char** argv) {
  po::options_description options("options");
  options.add_options()
      ("all,a", "with --json: also include targets that have ended within the last day (state \"exited\")")
      ("names", "print only the names of the running targets")
      ("json", "print a JSON array");
  po::variables_map values;
  if (auto status = parse_command_line(argc, argv, kVerb, options, {}, values)) return *status;
  const std::vector<pb::Status> running = running_targets();
  if (values.count("names")) {
    for (const pb::Status& status : running) std::printf("%s\n", printable(status.name()).c_str());
    return kExitOk;
  }
  std::set<std::string> names;
  for (const pb::Status& status : running) names.insert(status.name());
  std::vector<pb::EndedTarget> ended = list_ended();
  std::erase_if(ended, [&](const pb::EndedTarget& target) { return names.contains(target.name()); });
  if (!values.count("json")) {
    print_table(running, ended);
    return kExitOk;
  }
  nlohmann::ordered_json array = nlohmann::ordered_json::array();
  for (const pb::Status& status : running) array.push_back(to_json(status));
  for (size_t i = 0; values.count("all") && i < ended.size(); ++i) array.push_back(to_json(ended[i]));
  std::printf("%s\n", json_text(array, 2).c_str());
  return kExitOk;
}

}  // namespace vmckpt
