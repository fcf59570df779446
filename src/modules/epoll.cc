// epoll(7): an interest list of open files, each registered under the number it had at that time.
//
// Made by epoll_create, changed by epoll_ctl and, for EPOLLONESHOT, by every epoll_wait. Saved: all registrations from
// fdinfo (number, events, data). The number may have been closed or reused since, while the file lives on under another
// one: the kernel tells which file is meant with kcmp(2) KCMP_EPOLL_TFD (Linux 4.13). A file that no number of the
// process leads to any more (another process holds it) cannot be registered again: refused.
//
// Restored last, when all files have their numbers. A registration whose number belongs to another file by now borrows
// that number for a moment. A one-shot registration that has fired shows no events; epoll_ctl cannot make one like that
// (the kernel always adds EPOLLERR and EPOLLHUP), so it is armed for everything and made to fire by an epoll_wait while
// it is the only one there. A file that is ready for nothing then stays armed for errors and hang-up alone.
//
// Which ready events had been reported already under EPOLLET is not shown; after a restart they are reported once more,
// which edge-triggered programs must expect anyway. Sources: epoll(7), proc_pid_fdinfo(5), fs/eventpoll.c.
#include <cstring>

#include <linux/kcmp.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core/proc.h"
#include "modules/descriptor_module.h"
#include "modules/epoll.pb.h"

namespace vmckpt {
namespace {

// Bits that are not events; a one-shot registration that has fired has nothing else.
constexpr uint32_t kPrivateBits =
    (1u << 28) /* EPOLLEXCLUSIVE */ | (1u << 29) /* EPOLLWAKEUP */ | EPOLLONESHOT | EPOLLET;

// struct epoll_params, EPIOCSPARAMS and EPIOCGPARAMS (linux/eventpoll.h of Linux 6.9).
struct BusyPoll {
  uint32_t microseconds;
  uint16_t budget;
  uint8_t prefer;
  uint8_t padding;
};
constexpr unsigned long kSetBusyPoll = _IOW(0x8a, 0x01, BusyPoll), kGetBusyPoll = _IOR(0x8a, 0x02, BusyPoll);

bool recognise(const TargetFile& file) { return file.is_anonymous("[eventpoll]"); }

bool is_disarmed(const pb::EpollRegistration& registration) { return (registration.events() & ~kPrivateBits) == 0; }

// Whether `file` is what the epoll file has registered as the `offset`th one under `number`. -1: the kernel does not
// tell.
int is_registered(const SaveContext& context, const TargetFile& file, const TargetFile& epoll, int number,
                  uint32_t offset) {
  kcmp_epoll_slot slot{static_cast<uint32_t>(epoll.lowest()), static_cast<uint32_t>(number), offset};
  long order = ::syscall(SYS_kcmp, context.pid(), context.pid(), KCMP_EPOLL_TFD, file.lowest(), &slot);
  return order < 0 ? -1 : order == 0;
}

// An inode of one file only. All anonymous files share a single inode.
bool has_own_inode(const TargetFile& file) { return S_ISSOCK(file.status.st_mode); }

const TargetFile* find_registered(const SaveContext& context, const TargetFile& epoll, int number, uint64_t inode,
                                  uint32_t offset) {
  const TargetFile* candidate = context.find_number(number);
  if (candidate != nullptr && candidate->status.st_ino == inode) {
    if (has_own_inode(*candidate) || is_registered(context, *candidate, epoll, number, offset) != 0) return candidate;
  }
  for (const TargetFile& file : context.files) {
    if (file.status.st_ino == inode && is_registered(context, file, epoll, number, offset) == 1) return &file;
  }
  return nullptr;
}

Result<void> save(SaveContext& context, const TargetFile& file, int fd, pb::OpenFile* saved) {
  pb::Epoll* epoll = saved->MutableExtension(pb::epoll);
  BusyPoll busy_poll{};
  if (::ioctl(fd, kGetBusyPoll, &busy_poll) == 0 && (busy_poll.microseconds | busy_poll.budget | busy_poll.prefer) != 0) {
    epoll->set_busy_poll(&busy_poll, sizeof busy_poll);
  }
  std::map<int, uint32_t> same_number;
  // "tfd:        7 events:       19 data:   100000007  pos:0 ino:1a2b sdev:8"
  for (std::string_view line : fdinfo_lines(file.fdinfo, "tfd:")) {
    int number = static_cast<int>(parse_number(word_after(line, "tfd:")));
    uint64_t inode = parse_hex(word_after(line, " ino:"));
    const TargetFile* target = find_registered(context, file, number, inode, same_number[number]++);
    if (target == nullptr) {
      return error(fmt::format("{} watches a file that was descriptor {} and is open in another process only",
                               file.describe(), number),
                   "checkpoint again when that process has ended");
    }
    pb::EpollRegistration* registration = epoll->add_registrations();
    registration->set_number(number);
    registration->set_target(target->file_id());
    registration->set_events(static_cast<uint32_t>(parse_hex(word_after(line, "events:"))));
    registration->set_data(parse_hex(word_after(line, "data:")));
  }
  return {};
}

Result<void> restore(RestoreContext& context) {
  for (const pb::OpenFile& file : context.image.open_files()) {
    if (!file.HasExtension(pb::epoll)) continue;
    Fd fd(::epoll_create1(EPOLL_CLOEXEC));
    if (!fd) return errno_error("make the epoll file of " + describe(file));
    BusyPoll busy_poll{};
    if (file.GetExtension(pb::epoll).busy_poll().size() == sizeof busy_poll) {
      // It costs speed alone where the kernel does not know it, or asks for CAP_NET_ADMIN.
      std::memcpy(&busy_poll, file.GetExtension(pb::epoll).busy_poll().data(), sizeof busy_poll);
      (void)::ioctl(fd.get(), kSetBusyPoll, &busy_poll);
    }
    VMCKPT_TRY(context.put(file, std::move(fd)));
  }
  return {};
}

// Makes `number` lead to `file` until it goes out of scope.
class BorrowedNumber {
 public:
  static Result<BorrowedNumber> borrow(RestoreContext& context, int number, uint32_t file) {
    BorrowedNumber borrowed;
    borrowed.flags_ = ::fcntl(number, F_GETFD);
    if (borrowed.flags_ >= 0) {
      borrowed.owner_ = Fd(::fcntl(number, F_DUPFD_CLOEXEC, context.restore.first_service_fd));
      if (!borrowed.owner_) return errno_error(fmt::format("set descriptor {} aside", number));
    }
    if (::dup3(context.fd(file), number, O_CLOEXEC) < 0) {
      return errno_error(fmt::format("put a file that epoll watches at number {} for a moment", number));
    }
    borrowed.number_ = number;
    return borrowed;
  }
  BorrowedNumber(BorrowedNumber&& other) noexcept
      : number_(other.number_), flags_(other.flags_), owner_(std::move(other.owner_)) {
    other.number_ = -1;
  }
  BorrowedNumber& operator=(BorrowedNumber&&) = delete;
  ~BorrowedNumber() {
    if (number_ < 0) return;
    if (owner_) ::dup3(owner_.get(), number_, (flags_ & FD_CLOEXEC) ? O_CLOEXEC : 0);
    else ::close(number_);
  }

 private:
  BorrowedNumber() = default;
  int number_ = -1;
  int flags_ = -1;
  Fd owner_;
};

Result<void> control(int epoll, int operation, const pb::EpollRegistration& registration, uint32_t events) {
  epoll_event event{};
  event.events = events;
  event.data.u64 = registration.data();
  if (::epoll_ctl(epoll, operation, registration.number(), &event) != 0) {
    return errno_error(fmt::format("register descriptor {} with epoll", registration.number()));
  }
  return {};
}

Result<void> register_disarmed(int epoll, const pb::EpollRegistration& registration) {
  uint32_t everything = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLPRI;
  VMCKPT_TRY(control(epoll, EPOLL_CTL_ADD, registration, registration.events() | everything));
  epoll_event fired;
  if (::epoll_wait(epoll, &fired, 1, 0) == 1) return {};
  return control(epoll, EPOLL_CTL_MOD, registration, registration.events());
}

Result<void> register_file(int epoll, const pb::EpollRegistration& registration) {
  if (is_disarmed(registration)) return register_disarmed(epoll, registration);
  return control(epoll, EPOLL_CTL_ADD, registration, registration.events());
}

using NumberOwners = std::map<int, uint32_t>;  // number -> id of its OpenFile

Result<void> restore_registrations(RestoreContext& context, const NumberOwners& owners, const pb::OpenFile& file,
                                   bool disarmed) {
  int epoll = context.fd(file.id());
  for (const pb::EpollRegistration& registration : file.GetExtension(pb::epoll).registrations()) {
    if (is_disarmed(registration) != disarmed) continue;
    if (!context.has(registration.target())) {
      return error(fmt::format("{} watches the open file {}, which the image does not have", describe(file),
                               registration.target()));
    }
    auto owner = owners.find(registration.number());
    if (owner != owners.end() && owner->second == registration.target()) {
      VMCKPT_TRY(register_file(epoll, registration));
    } else {
      BorrowedNumber borrowed =
          VMCKPT_TRY(BorrowedNumber::borrow(context, registration.number(), registration.target()));
      VMCKPT_TRY(register_file(epoll, registration));
    }
  }
  return {};
}

}  // namespace

Result<void> restore_epoll_registrations(RestoreContext& context) {
  NumberOwners owners;
  for (const pb::Descriptor& descriptor : one_process(context.image).descriptors.descriptors()) {
    owners[descriptor.number()] = descriptor.file();
  }
  for (bool disarmed : {true, false}) {  // the disarmed ones fire once: nothing else must be registered yet
    for (const pb::OpenFile& file : context.image.open_files()) {
      if (file.HasExtension(pb::epoll)) VMCKPT_TRY(restore_registrations(context, owners, file, disarmed));
    }
  }
  return {};
}

const DescriptorModule kEpollModule{"epoll", recognise, save, nullptr, nullptr, restore};

}  // namespace vmckpt
