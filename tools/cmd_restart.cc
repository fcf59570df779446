// vmckpt restart: an image becomes a running target again, with this process as its supervisor.
#include <cstdio>
#include <optional>

#include <nlohmann/json.hpp>
#include <fcntl.h>
#include <unistd.h>

#include "command_line.h"
#include "commands.h"
#include "core/clock.h"
#include "core/printable.h"
#include "json_text.h"
#include "supervisor/control_socket.h"
#include "supervisor/detach.h"
#include "supervisor/detached_stdio.h"
#include "supervisor/patience.h"
#include "supervisor/restart_sequence.h"
#include "supervisor/service.h"

namespace vmckpt {

namespace po = boost::program_options;

namespace {

constexpr Verb kVerb = {"restart", "IMAGE", "Restarts the target saved in IMAGE, and remains running as its supervisor."};

std::string to_json(const RestartResult& result) {
  nlohmann::ordered_json phases = nlohmann::ordered_json::object();
  for (const auto& [name, us] : result.phases) phases[name] = us;
  nlohmann::ordered_json json;
  json["name"] = result.target.name;
  json["pid"] = result.target.pid;
  json["restart_us"] = result.restart_us;
  json["generation"] = result.target.generation;
  json["phases_us"] = phases;
  json["notes"] = result.notes;
  return json_text(json) + "\n";
}

}  // namespace

int cmd_restart(int argc, char** argv) {
  RestartRequest request;
  request.started_us = monotonic_us();
  po::options_description options("options");
  options.add_options()
      ("name,n", po::value<std::string>(), "the target's new name (default: its old name, numbered if taken)")
      ("detach",
       "return when it is running, and print NAME PID, or the JSON object. Its output is handled as by launch --detach")
      ("terminal", "with --detach: give it a new terminal for `vmckpt attach`")
      ("cpu-check", po::value<std::string>()->default_value("strict"),
       "strict: the processor must have all features that the old one had; guest: all that a KVM guest was shown; none: only "
       "print a note about missing features")
      ("changed-files", po::value<std::string>()->default_value("refuse"),
       "files that the program writes to and that have changed: refuse the restart, or accept them as they are")
      ("missing-files", po::value<std::string>()->default_value("refuse"),
       "open files that are missing and whose content is not in the image: refuse the restart, or create empty files")
      ("shared-files", po::value<std::string>()->default_value("restore"),
       "files mapped shared whose content was saved. restore: write it back if no other data can be overwritten; overwrite: "
       "always write it back; leave: continue with their current content")
      ("guest-clock", po::value<std::string>()->default_value("continue"),
       "clocks of a KVM guest. continue: from their values at the checkpoint; advance: advanced by the time since then")
      ("json", "print one JSON object (in the foreground: on standard error)");
  po::variables_map values;
  if (auto status = parse_command_line(argc, argv, kVerb, options, {"IMAGE"}, values)) return *status;
  request.image = values["IMAGE"].as<std::string>();
  request.detached = values.count("detach") != 0;
  const bool terminal_wanted = values.count("terminal") != 0;
  if (terminal_wanted && !request.detached) {
    std::fprintf(stderr, "vmckpt: restart: --terminal requires --detach; see vmckpt restart --help\n");
    return kExitUsage;
  }
  const bool json = values.count("json") != 0;
  const std::string cpu_check = values["cpu-check"].as<std::string>();
  if (cpu_check != "strict" && cpu_check != "guest" && cpu_check != "none") {
    std::fprintf(stderr, "vmckpt: restart: --cpu-check must be strict, guest or none; see vmckpt restart --help\n");
    return kExitUsage;
  }
  const std::string guest_clock = values["guest-clock"].as<std::string>();
  if (guest_clock != "continue" && guest_clock != "advance") {
    std::fprintf(stderr, "vmckpt: restart: --guest-clock must be continue or advance; see vmckpt restart --help\n");
    return kExitUsage;
  }
  request.guest_clock = guest_clock == "advance" ? GuestClock::kAdvance : GuestClock::kContinue;
  request.cpu_check = cpu_check == "none" ? CpuCheck::kNone : cpu_check == "guest" ? CpuCheck::kGuest : CpuCheck::kStrict;
  const std::string shared_files = values["shared-files"].as<std::string>();
  if (shared_files != "restore" && shared_files != "overwrite" && shared_files != "leave") {
    std::fprintf(stderr, "vmckpt: restart: --shared-files must be restore, overwrite or leave; see vmckpt restart --help\n");
    return kExitUsage;
  }
  request.files.shared_files = shared_files == "leave"       ? SharedFiles::kLeave
                               : shared_files == "overwrite" ? SharedFiles::kOverwrite
                                                             : SharedFiles::kRestore;

  auto choose = [&](const char* option, const char* other, bool* chosen) {
    const std::string given = values[option].as<std::string>();
    *chosen = given == other;
    if (given == "refuse" || *chosen) return true;
    std::fprintf(stderr, "vmckpt: restart: --%s must be refuse or %s; see vmckpt restart --help\n", option, other);
    return false;
  };
  if (!choose("changed-files", "accept", &request.files.accept_changed)) return kExitUsage;
  if (!choose("missing-files", "empty", &request.files.empty_missing)) return kExitUsage;

  auto sockets = runtime_directory();
  if (!sockets.ok()) return fail(kVerb, sockets.error());
  auto detacher = Detacher::detach(request.detached);
  if (!detacher.ok()) return fail(kVerb, detacher.error());
  auto give_up = [&](const Error& error) {
    detacher->report_failure("vmckpt: restart: " + error.message());
    return kExitFailed;
  };
  TerminalControl terminal;
  if (values.count("name")) request.name = values["name"].as<std::string>();
  if (auto checked = check_name(request.name.empty() ? "x" : request.name); !checked.ok()) return give_up(checked.error());
  std::optional<ControlListener> listener;
  std::optional<Service> service;
  Target target;  // as far as it is known
  DetachedStdio stdio;
  request.claim_name = [&](const pb::Target& saved) -> Result<void> {
    // Until now a signal ends this command as any other; from now on there is something to clean up. The target gets the masks of
    // its image.
    (void)prepare_service();
    if (request.name.empty()) request.name = free_name(*sockets, saved.name());
    listener.emplace(VMCKPT_TRY(ControlListener::create(request.name)));
    target.name = request.name;
    target.image_dir = saved.image_dir();
    target.command.assign(saved.command().begin(), saved.command().end());
    target.generation = saved.generation() + 1;
    service.emplace(target, *listener, terminal, request.detached);
    if (request.detached) stdio = VMCKPT_TRY(take_detached_stdio(saved.image_dir(), request.name, terminal_wanted));
    return {};
  };
  Fd callers_stderr(::fcntl(2, F_DUPFD_CLOEXEC, 3));  // with --detach 2 is the target's by then
  request.tell_notes = [&](const std::vector<std::string>& notes) {
    // In the foreground a terminal is the target's screen by now: what is said there would stand in its midst (--json tells it
    // all the same).
    if (json || (!request.detached && ::isatty(callers_stderr.get()))) return;
    for (const std::string& note : notes) ::dprintf(callers_stderr.get(), "vmckpt: note: %s\n", printable(note).c_str());
  };
  request.look_after_others = [&] { return service->look_after_clients(); };
  auto result = restart_target(request);
  if (!result.ok()) {
    give_up(result.error());
    service.reset();
    listener.reset();
    if (int signal = pending_end_signal(); signal != 0) end_by(signal);
    return kExitFailed;
  }
  callers_stderr.reset();
  target = result->target;
  Fd terminal_master = std::move(stdio.terminal_master ? stdio.terminal_master : result->terminal_master);
  if (!stdio.log.empty()) target.log = stdio.log;
  if (terminal_master && target.log.empty()) {
    if (auto log = choose_log(target.image_dir, target.name); log.ok()) target.log = *log;
  }
  if (json && !request.detached) std::fputs(to_json(*result).c_str(), stderr);
  detacher->report_running(json ? to_json(*result) : fmt::format("{} {}\n", target.name, target.pid));
  return exit_status_of(service->serve(std::move(terminal_master)));
}

}  // namespace vmckpt
