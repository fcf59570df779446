// vmckpt launch: check, start, supervise.
#include <cstdio>
#include <filesystem>
#include <iostream>

#include <sys/stat.h>
#include <unistd.h>

#include "command_line.h"
#include "commands.h"
#include "core/random.h"
#include "supervisor/control_socket.h"
#include "supervisor/detach.h"
#include "supervisor/detached_stdio.h"
#include "supervisor/launch.h"
#include "supervisor/service.h"

namespace vmckpt {

namespace po = boost::program_options;

namespace {

constexpr Verb kVerb = {"launch", "-- COMMAND [ARG...]",
                        "Starts COMMAND so that it can be checkpointed, and remains running as its supervisor."};
constexpr int kExitCannotStart = 127;

// Everything behind "--" (or behind the first word that is no option of ours) belongs to the command.
int first_command_word(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    std::string word = argv[i];
    if (word == "--") return i + 1;
    if (word[0] != '-') return i;
    if (word == "-n" || word == "--name" || word == "-d" || word == "--image-dir") ++i;
  }
  return argc;
}

Result<std::string> image_directory(const po::variables_map& values) {
  std::string given = values.count("image-dir") ? values["image-dir"].as<std::string>() : ".";
  std::error_code missing;
  std::filesystem::path path = std::filesystem::canonical(given, missing);
  if (missing)
    return error(fmt::format("the image directory {} cannot be used: {}", given, missing.message()), "create it first");
  if (!std::filesystem::is_directory(path)) return error(fmt::format("{} is not a directory", given));
  return path.string();
}

// A program that was told to use io_uring may end instead of falling back, with a message of its own that does not name us.
void warn_of_io_uring(const std::vector<std::string>& command) {
  for (const std::string& word : command) {
    if (word.find("io_uring") == std::string::npos) continue;
    std::fputs("vmckpt: note: io_uring cannot be checkpointed and is denied to the program, whose arguments ask for it; "
               "tell it to use something else (QEMU: aio=threads or aio=native; fio: --ioengine=libaio)\n",
               stderr);
    return;
  }
}

}  // namespace

int cmd_launch(int argc, char** argv) {
  po::options_description options("options");
  options.add_options()
      ("name,n", po::value<std::string>(), "the target's name (default: the command's)")
      ("image-dir,d", po::value<std::string>(), "directory for its images (default: the current directory)")
      ("detach",
       "return when it is running, and print NAME PID. Its output goes to IMAGE_DIR/NAME.log unless redirected to a file")
      ("terminal", "with --detach: give it a new terminal for `vmckpt attach` (it has one if launched from a terminal)")
      ("allow-io-uring", "do not deny io_uring; while a ring exists, checkpoints are refused")
      ("allow-devices", "do not hide vhost, VFIO and similar devices; while one is open, checkpoints are refused");
  int command_word = first_command_word(argc, argv);
  bool separator = command_word > 1 && command_word <= argc && std::string(argv[command_word - 1]) == "--";
  po::variables_map values;
  if (auto status = parse_command_line(separator ? command_word - 1 : command_word, argv, kVerb, options, {}, values))
    return *status;
  if (command_word >= argc) {
    std::fprintf(stderr, "vmckpt: launch: COMMAND is missing; see vmckpt launch --help\n");
    return kExitUsage;
  }
  LaunchOptions launch;
  launch.command.assign(argv + command_word, argv + argc);
  launch.filter = !values.count("allow-io-uring");
  launch.allow_devices = values.count("allow-devices") != 0;
  const bool detached = values.count("detach") != 0, terminal_wanted = values.count("terminal") != 0;
  if (terminal_wanted && !detached) {
    std::fprintf(stderr, "vmckpt: launch: --terminal requires --detach; see vmckpt launch --help\n");
    return kExitUsage;
  }

  Target target;
  target.command = launch.command;
  target.target_id = random_id();
  target.launch_filter = launch.filter;
  auto directory = image_directory(values);
  if (!directory.ok()) return fail(kVerb, directory.error());
  target.image_dir = *directory;
  if (auto checked = check_program(launch.command[0]); !checked.ok()) return fail(kVerb, checked.error());
  if (launch.filter) warn_of_io_uring(launch.command);
  auto sockets = runtime_directory();
  if (!sockets.ok()) return fail(kVerb, sockets.error());
  target.name = values.count("name") ? values["name"].as<std::string>() : free_name(*sockets, launch.command[0]);

  auto detacher = Detacher::detach(detached);
  if (!detacher.ok()) return fail(kVerb, detacher.error());
  auto give_up = [&](const Error& error) {
    detacher->report_failure("vmckpt: launch: " + error.message());
    return kExitFailed;
  };
  auto listener = ControlListener::create(target.name);
  if (!listener.ok()) return give_up(listener.error());
  DetachedStdio stdio;
  if (detached) {
    auto taken = take_detached_stdio(target.image_dir, target.name, terminal_wanted);
    if (!taken.ok()) return give_up(taken.error());
    stdio = std::move(*taken);
    target.log = stdio.log;
  }
  TerminalControl terminal;
  sigset_t mask = prepare_service();
  auto pid = start_program(launch, mask);
  if (!pid.ok()) {
    give_up(pid.error());
    return kExitCannotStart;
  }
  target.pid = *pid;
  detacher->report_running(fmt::format("{} {}\n", target.name, target.pid));
  return exit_status_of(Service(target, *listener, terminal, detached).serve(std::move(stdio.terminal_master)));
}

}  // namespace vmckpt
