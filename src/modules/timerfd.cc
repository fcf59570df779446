// timerfd(2): a timer that is read.
//
// Made by timerfd_create, changed by timerfd_settime and, since it counts expirations, by every read. Saved from
// fdinfo: clock, flags of the last settime, time left, interval, expirations not read yet ("ticks").
//
// Time left is what is saved even of absolute timers: whether the monotonic clock goes on across the restart is another
// module's affair. Only a timer set to an absolute time of CLOCK_REALTIME keeps that time, since it means a point of
// the calendar: it may have passed meanwhile and then expires at once. TFD_TIMER_CANCEL_ON_SET is kept with it.
//
// An expired periodic timer that nobody has read is not running inside the kernel (the next read or gettime sets it
// going again and counts what was missed), and fdinfo shows no time left; timerfd_gettime tells the phase then. It
// changes nothing that the program can see.
//
// A timer that is due, but whose interrupt is late (a processor that its host took away), shows no time left and no
// ticks yet, as a disarmed one does. A moment later it has ticked: so these are looked at again. For a periodic one,
// which programs hardly ever disarm without clearing its interval, up to 5 ms pass.
//
// Restored: create, settime, then ticks with TFD_IOC_SET_TICKS (Linux 3.17, needs CONFIG_CHECKPOINT_RESTORE, which
// distributions have). Sources: timerfd_create(2), proc_pid_fdinfo(5), fs/timerfd.c.
#include <cinttypes>
#include <cstdio>
#include <ctime>

#include <poll.h>
#include <sys/ioctl.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/proc.h"
#include "modules/descriptor_module.h"
#include "modules/timerfd.pb.h"

namespace vmckpt {
namespace {

constexpr unsigned long kSetTicks =
    _IOW('T', 0, uint64_t);  // TFD_IOC_SET_TICKS; linux/timerfd.h clashes with libc's fcntl.h

bool is_realtime(int clock) { return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_ALARM; }

bool recognise(const TargetFile& file) { return file.is_anonymous("[timerfd]"); }

// "(seconds, nanoseconds)"
Result<int64_t> parse_time(const TargetFile& file, std::string_view name) {
  std::string text(fdinfo_field(file.fdinfo, name));
  uint64_t seconds = 0, ns = 0;
  if (std::sscanf(text.c_str(), "(%" SCNu64 ", %" SCNu64 ")", &seconds, &ns) != 2) {
    return error(fmt::format("{} has no {} in /proc/PID/fdinfo", file.describe(), name));
  }
  return static_cast<int64_t>(seconds) * kNsPerSecond + static_cast<int64_t>(ns);
}

// `file` gets what describes `seen`, with an fdinfo of now if the first one could mean two things.
Result<void> look_until_decided(SaveContext& context, const TargetFile& seen, TargetFile* file) {
  constexpr int64_t kLateUs = 5000;
  const int64_t begin_us = monotonic_us();
  file->numbers = seen.numbers;
  file->link = seen.link;
  file->fdinfo = seen.fdinfo;
  for (;;) {
    const bool ticked = parse_number(fdinfo_field(file->fdinfo, "ticks")) != 0;
    if (ticked || VMCKPT_TRY(parse_time(*file, "it_value")) != 0) return {};
    const bool periodic = VMCKPT_TRY(parse_time(*file, "it_interval")) != 0;
    file->fdinfo = VMCKPT_TRY(read_whole_file(fmt::format("/proc/{}/fdinfo/{}", context.pid(), seen.lowest())));
    if (!periodic || monotonic_us() - begin_us > kLateUs) return {};
    ::usleep(50);
  }
}

Result<void> save(SaveContext& context, const TargetFile& seen, int fd, pb::OpenFile* saved) {
  pb::TimerFd* timer = saved->MutableExtension(pb::timerfd);
  TargetFile file;
  VMCKPT_TRY(look_until_decided(context, seen, &file));
  timer->set_clock(static_cast<int>(parse_number(fdinfo_field(file.fdinfo, "clockid"))));
  timer->set_ticks(static_cast<uint64_t>(parse_number(fdinfo_field(file.fdinfo, "ticks"))));
  timer->set_settime_flags(static_cast<uint32_t>(parse_octal(fdinfo_field(file.fdinfo, "settime flags"))));
  timer->set_remaining_ns(VMCKPT_TRY(parse_time(file, "it_value")));
  timer->set_interval_ns(VMCKPT_TRY(parse_time(file, "it_interval")));
  if (timer->remaining_ns() == 0 && timer->interval_ns() != 0 && timer->ticks() != 0) {
    itimerspec now{};
    if (::timerfd_gettime(fd, &now) != 0) return errno_error("read the timer of " + file.describe());
    timer->set_remaining_ns(std::max<int64_t>(to_ns(now.it_value), 1));
    // gettime has moved the timer on by whole intervals and added them to its ticks.
    std::string info = VMCKPT_TRY(read_whole_file(fmt::format("/proc/{}/fdinfo/{}", context.pid(), file.lowest())));
    timer->set_ticks(static_cast<uint64_t>(parse_number(fdinfo_field(info, "ticks"))));
  }
  if (is_realtime(timer->clock()) && (timer->settime_flags() & TFD_TIMER_ABSTIME) != 0 && timer->remaining_ns() != 0) {
    timespec now{};
    ::clock_gettime(CLOCK_REALTIME, &now);
    timer->set_expires_at_ns(to_ns(now) + timer->remaining_ns());
  }
  return {};
}

Result<Fd> make_timer(RestoreContext& context, const pb::OpenFile& file) {
  int clock = file.GetExtension(pb::timerfd).clock();
  Fd fd(::timerfd_create(clock, TFD_CLOEXEC | TFD_NONBLOCK));
  if (!fd && errno == EPERM && (clock == CLOCK_REALTIME_ALARM || clock == CLOCK_BOOTTIME_ALARM)) {
    context.note(describe(file) + " no longer wakes the computer from sleep: that needs CAP_WAKE_ALARM");
    fd = Fd(
        ::timerfd_create(clock == CLOCK_REALTIME_ALARM ? CLOCK_REALTIME : CLOCK_BOOTTIME, TFD_CLOEXEC | TFD_NONBLOCK));
  }
  if (!fd) return errno_error("make the timer of " + describe(file));
  return fd;
}

Result<void> set_ticks(RestoreContext& context, const pb::OpenFile& file, int fd) {
  uint64_t ticks = file.GetExtension(pb::timerfd).ticks();
  if (ticks == 0 || ::ioctl(fd, kSetTicks, &ticks) == 0) return {};
  if (errno != ENOTTY) return errno_error("set the expirations of " + describe(file));
  // A kernel without the call. A timer that is not set otherwise can really expire once.
  itimerspec at_once{{0, 0}, {0, 1}};
  pollfd expired{fd, POLLIN, 0};
  bool free = file.GetExtension(pb::timerfd).remaining_ns() == 0;
  if (free && (::timerfd_settime(fd, 0, &at_once, nullptr) != 0 || ::poll(&expired, 1, 1000) != 1)) {
    return errno_error("let the timer of " + describe(file) + " expire");
  }
  context.note(fmt::format("{} had {} expirations to read and has {} now: this kernel cannot set more", describe(file),
                           ticks, free ? 1 : 0));
  return {};
}

Result<void> restore(RestoreContext& context) {
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (!file.HasExtension(pb::timerfd)) continue;
    const pb::TimerFd& timer = file.GetExtension(pb::timerfd);
    Fd fd = VMCKPT_TRY(make_timer(context, file));
    if (timer.remaining_ns() != 0) {
      bool absolute = timer.expires_at_ns() != 0;
      itimerspec when{to_timespec(timer.interval_ns()),
                      to_timespec(absolute ? timer.expires_at_ns() : timer.remaining_ns())};
      int flags = absolute ? static_cast<int>(timer.settime_flags()) : 0;
      if (::timerfd_settime(fd.get(), flags, &when, nullptr) != 0)
        return errno_error("set the timer of " + describe(file));
    }
    VMCKPT_TRY(set_ticks(context, file, fd.get()));  // after settime, which sets them to zero
    VMCKPT_TRY(context.put(file, std::move(fd)));
  }
  return {};
}

}  // namespace

const DescriptorModule kTimerfdModule{"timerfd", recognise, save, nullptr, nullptr, restore};

}  // namespace vmckpt
