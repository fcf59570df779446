// vmckpt stop and vmckpt kill: end a target.
#include <csignal>
#include <cstdio>

#include <poll.h>
#include <sys/socket.h>

#include "command_line.h"
#include "commands.h"
#include "core/clock.h"
#include "core/printable.h"
#include "supervisor/control_socket.h"

namespace vmckpt {

namespace po = boost::program_options;

namespace {

constexpr Verb kStop = {"stop", "[NAME|PID]",
                        "Terminates a target with SIGTERM, or with SIGKILL if it has not ended when the timeout expires."};
constexpr Verb kKill = {"kill", "[NAME|PID]", "Kills a target and all its processes with SIGKILL."};
constexpr double kLongestTimeoutS = 1e6;

Result<void> send_signal(int connection, int signal) {
  pb::ControlRequest request;
  request.mutable_signal()->set_signal(signal);
  return send_request(connection, request);
}

// The supervisor ends with its target, and the connection with it. True when it has, within the time. < 0: for ever.
Result<bool> wait_for_end(int connection, int64_t timeout_us) {
  const int64_t deadline_us = monotonic_us() + timeout_us;
  for (;;) {
    const int64_t left_us = deadline_us - monotonic_us();
    if (timeout_us >= 0 && left_us <= 0) return false;
    pollfd poll{connection, POLLIN, 0};
    if (::poll(&poll, 1, timeout_us < 0 ? 1000 : static_cast<int>(std::min<int64_t>(left_us / 1000 + 1, 1000))) <= 0) continue;
    char reply[4096];
    const ssize_t got = ::recv(connection, reply, sizeof reply, 0);
    if (got == 0 || (got < 0 && errno == ECONNRESET)) return true;
    if (got < 0 && errno != EINTR) return errno_error("hear from the supervisor");
    pb::ControlReply answer;
    if (got > 0 && answer.ParseFromArray(reply, static_cast<int>(got)) && answer.has_error())
      return error(printable(answer.error()));
  }
}

Result<Fd> target_of(const po::variables_map& values) {
  return find_target(values.count("TARGET") ? values["TARGET"].as<std::string>() : "");
}

Result<void> stop(const po::variables_map& values, double timeout_s) {
  Fd connection = VMCKPT_TRY(target_of(values));
  VMCKPT_TRY(send_signal(connection.get(), SIGTERM));
  if (VMCKPT_TRY(wait_for_end(connection.get(), static_cast<int64_t>(timeout_s * 1e6)))) return {};
  std::fprintf(stderr, "vmckpt: it has not ended within %g s: it is killed\n", timeout_s);
  VMCKPT_TRY(send_signal(connection.get(), SIGKILL));
  VMCKPT_TRY(wait_for_end(connection.get(), -1));
  return {};
}

Result<void> kill(const po::variables_map& values) {
  Fd connection = VMCKPT_TRY(target_of(values));
  VMCKPT_TRY(send_signal(connection.get(), SIGKILL));
  VMCKPT_TRY(wait_for_end(connection.get(), -1));
  return {};
}

}  // namespace

int cmd_stop(int argc, char** argv) {
  po::options_description options("options");
  options.add_options()("timeout,t", po::value<double>()->default_value(10), "seconds to wait before killing it");
  po::variables_map values;
  if (auto status = parse_command_line(argc, argv, kStop, options, {"TARGET?"}, values)) return *status;
  const double timeout_s = values["timeout"].as<double>();
  if (!(timeout_s >= 0 && timeout_s <= kLongestTimeoutS)) {
    std::fprintf(stderr, "vmckpt: stop: --timeout must be a number of seconds from 0 to %g; see vmckpt stop --help\n",
                 kLongestTimeoutS);
    return kExitUsage;
  }
  auto done = stop(values, timeout_s);
  return done.ok() ? kExitOk : fail(kStop, done.error());
}

int cmd_kill(int argc, char** argv) {
  po::variables_map values;
  if (auto status = parse_command_line(argc, argv, kKill, po::options_description("options"), {"TARGET?"}, values))
    return *status;
  auto done = kill(values);
  return done.ok() ? kExitOk : fail(kKill, done.error());
}

}  // namespace vmckpt
