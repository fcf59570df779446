// vmckpt checkpoint: asks the target's supervisor for an image and waits until it is there.
#include <cstdio>
#include <filesystem>

#include <nlohmann/json.hpp>
#include <unistd.h>

#include "command_line.h"
#include "commands.h"
#include "core/printable.h"
#include "json_text.h"
#include "supervisor/control_socket.h"

namespace vmckpt {

namespace po = boost::program_options;

namespace {

constexpr Verb kVerb = {"checkpoint", "[NAME|PID]", "Writes an image of a running target; the target keeps running."};

std::string to_json(const pb::CheckpointDone& done) {
  auto by_name = [](const google::protobuf::RepeatedPtrField<pb::Phase>& durations) {
    nlohmann::ordered_json us = nlohmann::ordered_json::object();
    for (const pb::Phase& duration : durations) us[duration.name()] = duration.us();
    return us;
  };
  nlohmann::ordered_json json;
  json["image"] = done.image();
  json["pause_us"] = done.pause_us();
  json["total_us"] = done.total_us();
  json["image_bytes"] = done.image_bytes();
  json["memory_bytes_saved"] = done.memory_bytes_saved();
  json["phases_us"] = by_name(done.phases());
  json["modules_us"] = by_name(done.modules());
  json["notes"] = std::vector<std::string>(done.notes().begin(), done.notes().end());
  return json_text(json);
}

void show_progress(const pb::Progress& progress) {
  double share = progress.bytes_total() == 0
                     ? 0
                     : 100.0 * static_cast<double>(progress.bytes_done()) / static_cast<double>(progress.bytes_total());
  if (progress.phase() != "write") std::fprintf(stderr, "\r\033[K%s", printable(progress.phase()).c_str());
  else
    std::fprintf(stderr, "\r\033[Kwrite: %3.0f %%, %.0f MiB saved", share,
                 static_cast<double>(progress.bytes_saved()) / (1 << 20));
  std::fflush(stderr);
}

Result<pb::CheckpointDone> wait_for_image(int fd) {
  const bool on_terminal = ::isatty(2);
  bool shown = false;
  for (;;) {
    pb::ControlReply reply = VMCKPT_TRY(receive_reply(fd));
    if (reply.has_progress()) {
      if (on_terminal) show_progress(reply.progress());
      shown = on_terminal;
      continue;
    }
    if (shown) std::fputs("\r\033[K", stderr);
    if (reply.has_error()) return error(printable(reply.error()));
    return reply.done();
  }
}

// Not given: left as it is. False: given, and no number of seconds.
bool read_seconds(const po::variables_map& values, const char* option, int64_t* us) {
  if (!values.count(option)) return true;
  constexpr double kMostSeconds = 1e9;
  const double seconds = values[option].as<double>();
  if (seconds >= 1e-6 && seconds <= kMostSeconds) {
    *us = static_cast<int64_t>(seconds * 1e6);
    return true;
  }
  std::fprintf(stderr, "vmckpt: checkpoint: --%s must be a number of seconds greater than 0; see vmckpt checkpoint --help\n",
               option);
  return false;
}

}  // namespace

int cmd_checkpoint(int argc, char** argv) {
  po::options_description options("options");
  options.add_options()
      ("output,o", po::value<std::string>(), "file to write the image to (default: IMAGE_DIR/NAME-N.ckpt)")
      ("stop", "stop the target, and leave it stopped when the image is complete (kill -CONT resumes it)")
      ("kill", "stop the target, and kill it when the image is complete")
      ("self-contained", "also save the pages of mapped files: restart then needs no program or library files")
      ("shared-files", po::value<std::string>()->default_value("memory"),
       "files mapped shared for writing whose content is saved: memory (on tmpfs, or a VMM's RAM), all or none")
      ("shared-limit", po::value<uint64_t>(),
       "MiB of shared memory and deleted files that may be copied during the pause (default 1024)")
      ("freeze-timeout", po::value<double>(), "maximum seconds to wait for a thread that does not stop (default 10)")
      ("timeout", po::value<double>(), "maximum seconds for the whole checkpoint, after which it is aborted (default: no limit)")
      ("json", "print the result as one JSON object");
  po::variables_map values;
  if (auto status = parse_command_line(argc, argv, kVerb, options, {"TARGET?"}, values)) return *status;
  pb::ControlRequest request;
  pb::CheckpointOrder* order = request.mutable_checkpoint();
  if (values.count("output"))
    order->set_output(std::filesystem::absolute(values["output"].as<std::string>()).lexically_normal().string());
  if (values.count("stop") && values.count("kill")) {
    std::fprintf(stderr, "vmckpt: checkpoint: --stop and --kill are mutually exclusive; see vmckpt checkpoint --help\n");
    return kExitUsage;
  }
  order->set_afterwards(values.count("kill") ? pb::IS_KILLED : values.count("stop") ? pb::STAYS_STOPPED : pb::RUNS);
  order->set_self_contained(values.count("self-contained") != 0);
  const std::string shared_files = values["shared-files"].as<std::string>();
  if (shared_files != "memory" && shared_files != "all" && shared_files != "none") {
    std::fprintf(stderr, "vmckpt: checkpoint: --shared-files must be memory, all or none; see vmckpt checkpoint --help\n");
    return kExitUsage;
  }
  order->set_shared_files(shared_files == "all" ? pb::ALL : shared_files == "none" ? pb::NONE : pb::MEMORY);
  if (values.count("shared-limit")) order->set_shared_limit_bytes(values["shared-limit"].as<uint64_t>() << 20);
  int64_t freeze_timeout_us = 0, timeout_us = 0;
  if (!read_seconds(values, "freeze-timeout", &freeze_timeout_us) || !read_seconds(values, "timeout", &timeout_us))
    return kExitUsage;
  order->set_freeze_timeout_us(freeze_timeout_us);
  order->set_timeout_us(timeout_us);

  auto connection = find_target(values.count("TARGET") ? values["TARGET"].as<std::string>() : "");
  if (!connection.ok()) return fail(kVerb, connection.error());
  if (auto sent = send_request(connection->get(), request); !sent.ok()) return fail(kVerb, sent.error());
  auto done = wait_for_image(connection->get());
  if (!done.ok()) return fail(kVerb, done.error());
  if (done->afterwards() != order->afterwards()) {
    return fail(kVerb,
                error(fmt::format("the target's supervisor is of a different release that does not support --{}: the target runs "
                                  "on; its image is {}",
                                  values.count("kill") ? "kill" : "stop", printable(done->image()))));
  }
  if (values.count("json")) {
    std::printf("%s\n", to_json(*done).c_str());
    return kExitOk;
  }
  std::printf("%s\n", printable(done->image()).c_str());
  std::fprintf(stderr, "vmckpt: %.1f MiB in %.0f ms; the target was paused for %.2f ms\n",
               static_cast<double>(done->image_bytes()) / (1 << 20), static_cast<double>(done->total_us()) / 1e3,
               static_cast<double>(done->pause_us()) / 1e3);
  for (const std::string& note : done->notes()) std::fprintf(stderr, "vmckpt: note: %s\n", printable(note).c_str());
  return kExitOk;
}

}  // namespace vmckpt
