// The whole way: a small program is launched, checkpointed, killed and restarted as launch, checkpoint and restart do it.
// Whatever a container, security module or file system forbids that no other probe thinks of shows here.
#include <fcntl.h>
#include <linux/close_range.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/fd.h"
#include "core/random.h"
#include "supervisor/checkpoint_sequence.h"
#include "supervisor/doctor_probes.h"
#include "supervisor/launch.h"
#include "supervisor/restart_sequence.h"
#include "supervisor/service.h"
#include "tracer/ledger_reader.h"

namespace vmckpt {
namespace {

constexpr char kProgram[] = "/bin/sleep", kItsSeconds[] = "20";  // ends by itself if this probe is killed

void end_process(pid_t pid) {
  if (pid <= 0) return;
  ::kill(pid, SIGKILL);
  while (::waitpid(pid, nullptr, __WALL) < 0 && errno == EINTR) {
  }
}

// A target that is gone when this is.
class TrialTarget {
 public:
  explicit TrialTarget(Target target) : target_(std::move(target)) {}
  TrialTarget(const TrialTarget&) = delete;
  TrialTarget& operator=(const TrialTarget&) = delete;
  ~TrialTarget() {
    end_process(target_.pid);
    end_process(target_.namespace_init);
  }
  Target& get() { return target_; }

 private:
  Target target_;
};

struct ImageFile {
  std::string path;
  ~ImageFile() { ::unlink(path.c_str()); }
};

// It may still be inside the dynamic linker.
Result<void> wait_for_recorder(pid_t pid) {
  constexpr int64_t kPatienceUs = 5'000'000;
  for (const int64_t until_us = monotonic_us() + kPatienceUs;;) {
    const std::string maps = VMCKPT_TRY(read_whole_file(fmt::format("/proc/{}/maps", pid)));
    auto ledger = find_ledger(pid, maps, RemoteAddr());
    if (ledger.ok()) return {};
    if (monotonic_us() > until_us) return ledger.error();
    ::usleep(1000);
  }
}

Result<void> make_image(const std::string& path) {
  const sigset_t mask = prepare_service();
  LaunchOptions options;
  options.command = {kProgram, kItsSeconds};
  Target target;
  target.name = "doctor";
  target.command = options.command;
  target.target_id = random_id();
  target.pid = VMCKPT_TRY(start_program(options, mask));
  TrialTarget trial(std::move(target));
  VMCKPT_TRY(wait_for_recorder(trial.get().pid));
  CheckpointRequest request;
  request.output = path;
  auto made = checkpoint_target(trial.get(), request);
  if (!made.ok()) return Error{"checkpoint: " + made.error().what, made.error().err, made.error().cure};
  return {};
}

Result<void> restart_image(const std::string& path) {
  RestartRequest request;
  request.image = path;
  request.started_us = monotonic_us();
  auto restarted = restart_target(request);
  if (!restarted.ok()) return Error{"restart: " + restarted.error().what, restarted.error().err, restarted.error().cure};
  TrialTarget trial(std::move(restarted->target));
  siginfo_t ended{};
  if (::waitid(P_PID, static_cast<id_t>(trial.get().pid), &ended, WEXITED | WNOHANG | WNOWAIT | __WALL) != 0)
    return failed("waitid");
  if (ended.si_pid != 0) return error("restart: the restarted program ended immediately");
  return {};
}

}  // namespace

Probe probe_round_trip(const std::string& image_dir) {
  if (auto recorder = find_recorder(); !recorder.ok())
    return limited("not tried: " + why(recorder.error()), "follow that message");
  if (auto program = check_program(kProgram); !program.ok()) return limited("not tried: " + why(program.error()));
  ImageFile image{fmt::format("{}/.vmckpt-doctor-{}.ckpt", image_dir, ::getpid())};
  Result<void> result = in_child([&]() -> Result<void> {
    // The program has nothing but /dev/null open, whatever we were started with.
    const int null = ::open("/dev/null", O_RDWR);
    for (int fd = 0; fd < 3; ++fd) ::dup2(null, fd);
    ::syscall(SYS_close_range, 3, ~0u, CLOSE_RANGE_CLOEXEC);
    VMCKPT_TRY(make_image(image.path));
    return restart_image(image.path);
  });
  if (result) return ok("a small program was launched, checkpointed and restarted");
  return missing(why(result.error()), "see the lines above; if they do not explain it, follow this message");
}

}  // namespace vmckpt
