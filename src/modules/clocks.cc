#include "modules/clocks.h"

#include <cstring>

#include <fcntl.h>
#include <linux/sched.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/fd.h"
#include "modules/module.h"

namespace vmckpt {
namespace {

std::string offset_line(const char* clock, int64_t offset_ns) {
  int64_t seconds = offset_ns / kNsPerSecond, rest = offset_ns % kNsPerSecond;
  if (rest < 0) {
    rest += kNsPerSecond;
    --seconds;
  }
  return fmt::format("{} {} {}\n", clock, seconds, rest);
}

struct ClockAnswers {
  TapeWord realtime, monotonic, boottime;  // where they will be
};

Result<void> ask(Questions& questions) {
  TapeDraft& tape = questions.leader();
  auto ask = [&](clockid_t clock) {
    const TapeWord answer = tape.room(sizeof(timespec));
    tape.call(SYS_clock_gettime, {static_cast<uint64_t>(clock), answer}, true, "read a clock");
    return answer;
  };
  const ClockAnswers answers{ask(CLOCK_REALTIME), ask(CLOCK_MONOTONIC), ask(CLOCK_BOOTTIME)};
  questions.when_answered([answers](const std::vector<TapeDraft>& tapes, pb::Image& image) {
    const TapeDraft& played = tapes.front();
    pb::Host* host = image.mutable_host();
    host->set_realtime_ns(to_ns(played.as<timespec>(answers.realtime)));
    host->set_monotonic_ns(to_ns(played.as<timespec>(answers.monotonic)));
    host->set_boottime_ns(to_ns(played.as<timespec>(answers.boottime)));
  });
  return {};
}

}  // namespace

extern const StateModule kClocksModule{.name = "clocks", .ask = ask};

void advance_clocks(int64_t by_ns, pb::Host* host) {
  host->set_realtime_ns(host->realtime_ns() + by_ns);
  host->set_monotonic_ns(host->monotonic_ns() + by_ns);
  host->set_boottime_ns(host->boottime_ns() + by_ns);
}

void enter_saved_time(const pb::Host& host, std::vector<std::string>& notes) {
  int64_t gap_ns = clock_ns(CLOCK_REALTIME) - host.realtime_ns();
  // Opened first: after the caller has entered other namespaces /proc/self may lead nowhere.
  Fd offsets(::open("/proc/self/timens_offsets", O_WRONLY | O_CLOEXEC));
  if (!offsets || ::unshare(CLONE_NEWTIME) != 0) {
    notes.push_back(fmt::format("no time namespace ({}): the target's monotonic clock jumps by {:.1f} s",
                                std::strerror(errno),
                                static_cast<double>(clock_ns(CLOCK_MONOTONIC) - host.monotonic_ns()) / 1e9));
    return;
  }
  // This process still reads the host's clocks: only its children are in the new namespace.
  std::string text = offset_line("monotonic", host.monotonic_ns() - clock_ns(CLOCK_MONOTONIC)) +
                     offset_line("boottime", host.boottime_ns() - clock_ns(CLOCK_BOOTTIME));
  if (auto written = write_exactly(offsets.get(), text.data(), text.size(), "/proc/self/timens_offsets"); !written.ok()) {
    notes.push_back("the target's monotonic clock jumps: " + written.error().message());
    return;
  }
  constexpr int64_t kWorthTellingNs = kNsPerSecond;
  if (gap_ns < kWorthTellingNs) return;
  notes.push_back(fmt::format("the target was away for {:.1f} s; its monotonic clock goes on without the gap",
                              static_cast<double>(gap_ns) / 1e9));
}

}  // namespace vmckpt
