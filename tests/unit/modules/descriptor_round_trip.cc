#include "modules/descriptor_round_trip.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <set>
#include <tuple>

#include <fcntl.h>
#include <linux/close_range.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <google/protobuf/text_format.h>

#include "core/proc.h"
#include "image/one_process.h"
#include "image/reader.h"
#include "image/tiny_image.h"
#include "image/writer.h"
#include "modules/epoll.pb.h"
#include "modules/inet_socket.pb.h"
#include "modules/pidfd.pb.h"
#include "modules/pipe.pb.h"
#include "modules/terminal.pb.h"
#include "modules/timerfd.pb.h"
#include "modules/unix_socket.pb.h"
#include "tracer/interrupted_calls.h"

namespace vmckpt::test {
namespace {

constexpr int kFirstServiceFd = 400;
constexpr int kTerminalMasterFd = 900;  // where the new process leaves it for the test
constexpr int64_t kFreezeTimeoutUs = 5'000'000;

// Memory that parent and child share: how far the child is, and what it has to say.
struct Report {
  enum State : int { kBusy, kRestored, kDone, kFailed };
  volatile int state;
  volatile int terminal_master;
  char text[4096];
};

class SharedReport {
 public:
  SharedReport()
      : report_(static_cast<Report*>(
            ::mmap(nullptr, sizeof(Report), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0))) {
    report_->terminal_master = -1;
  }
  ~SharedReport() { ::munmap(report_, sizeof(Report)); }
  Report* operator->() { return report_; }

  void fail(const std::string& text) {
    std::snprintf(report_->text, sizeof report_->text, "%s", text.c_str());
    report_->state = Report::kFailed;
  }
  // Waits until the child has something to say.
  void wait(pid_t child) {
    for (int i = 0; i < 10'000 && report_->state == Report::kBusy; ++i) {
      int status;
      if (::waitpid(child, &status, WNOHANG) == child)
        return fail(fmt::format("the process ended with status {:#x}", status));
      ::usleep(1000);
    }
    if (report_->state == Report::kBusy) fail("the process did not answer for 10 s");
  }

 private:
  Report* report_;
};

void run_and_report(SharedReport& report, const std::function<void()>& body) {
  try {
    body();
    report->state = Report::kDone;
  } catch (const std::exception& failure) {
    report.fail(failure.what());
  }
  for (;;) ::pause();
}

void only_dev_null() {
  int null = ::open("/dev/null", O_RDWR);
  for (int fd : {0, 1, 2}) ::dup2(null, fd);
  ::syscall(SYS_close_range, 3, ~0u, 0);
}

void end_process(pid_t pid) {
  if (pid <= 0) return;
  ::kill(pid, SIGKILL);
  ::waitpid(pid, nullptr, 0);
}

}  // namespace

TemporaryFolder::TemporaryFolder() {
  char name[] = "/tmp/vmckpt-test-XXXXXX";
  path_ = ::mkdtemp(name);
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

RoundTrip::RoundTrip(const std::function<void()>& build) {
  ledger = static_cast<Ledger*>(::calloc(1, sizeof(Ledger)));
  SharedReport report;
  target_ = ::fork();
  if (target_ == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    run_and_report(report, [&] {
      only_dev_null();
      build();
    });
  }
  report.wait(target_);
  if (report->state != Report::kDone) throw std::runtime_error(fmt::format("building: {}", report->text));
}

RoundTrip::~RoundTrip() {
  kill_target();
  ::free(ledger);
}

void RoundTrip::kill_target() {
  end_process(target_);
  target_ = -1;
}

Result<void> RoundTrip::save() {
  saved.Clear();
  notes.clear();
  return save_process(target_, &saved, &notes, folder_ / "image");
}

Result<void> RoundTrip::save_process(pid_t pid, pb::Image* into, Notes* found,
                                     const std::string& image_stem) {
  ImageDestination destination;
  destination.numbered_stem = image_stem;
  ImageWriter writer = VMCKPT_TRY(ImageWriter::create(destination, tiny_identity()));
  CapturedFiles captured(writer, uint64_t{1} << 30);
  {
    InterruptedCalls interrupted;
    StoppedWorld world = VMCKPT_TRY(freeze(pid, Waiting::up_to(kFreezeTimeoutUs), interrupted));
    DescriptorSave save{world, *ledger, captured, *found};
    VMCKPT_TRY(save_descriptors(save, *into));
  }
  pb::Image metadata = tiny_metadata();
  metadata.clear_captured_files();
  metadata.mutable_address_spaces(0)->mutable_mappings()->RemoveLast();  // the one of the captured file
  for (const auto& [id, file] : captured.files()) *metadata.add_captured_files() = file;
  *metadata.mutable_open_files() = into->open_files();
  *metadata.mutable_objects() = into->objects();
  *metadata.mutable_descriptor_tables() = into->descriptor_tables();
  image_ = VMCKPT_TRY(test::finish(writer, metadata));
  return {};
}

std::vector<Error> RoundTrip::check() {
  std::vector<Error> problems;
  check_descriptors(saved, FileAccess(), {}, problems, notes);
  return problems;
}

namespace {

void check_open_numbers(const pb::DescriptorTable& table) {
  std::set<int> wanted;
  for (const pb::Descriptor& descriptor : table.descriptors()) wanted.insert(descriptor.number());
  for (int fd = 0; fd < kFirstServiceFd; ++fd) {
    if ((wanted.count(fd) != 0) != (::fcntl(fd, F_GETFD) >= 0)) {
      throw std::runtime_error(fmt::format("number {} is wrongly open or closed", fd));
    }
  }
}

// The part of the new process; what it has to note is left in `notes_report`.
void restore_in_child(const std::string& image_path, const std::array<int, 3>& restart_stdio,
                      SharedReport& notes_report, SharedReport& report) {
  auto service = [](int fd) { return ::fcntl(fd, F_DUPFD_CLOEXEC, kFirstServiceFd); };
  std::array<int, 3> stdio;
  for (size_t i = 0; i < 3; ++i)
    stdio[i] = service(restart_stdio[i] < 0 ? ::open("/dev/null", O_RDWR) : restart_stdio[i]);
  auto image = ImageReader::open(image_path);
  if (!image.ok()) throw std::runtime_error("image: " + image.error().message());
  RebuiltFiles files;
  image->use_fd(Fd(service(image->fd())));
  auto rebuilt = files.rebuild(*image, kFirstServiceFd, FileAccess());
  if (!rebuilt.ok()) throw std::runtime_error("captured files: " + rebuilt.error().message());
  Notes notes;
  const FileAccess access;
  DescriptorRestore restore{files, access, stdio, kFirstServiceFd, notes};
  auto restored = restore_descriptors(image->metadata(), restore);
  std::string text;
  for (const std::string& note : notes) text += note + "\n";
  notes_report.fail(text);
  if (!restored.ok()) throw std::runtime_error("restore: " + restored.error().message());
  check_open_numbers(one_process(image->metadata()).descriptors);
  if (restore.terminal_master) {
    ::dup2(restore.terminal_master.get(), kTerminalMasterFd);
    report->terminal_master = kTerminalMasterFd;
  }
  ::syscall(SYS_close_range, kFirstServiceFd, kTerminalMasterFd - 1, 0);
}

// "" or the first file, pipe or terminal that differs, as both have it.
std::string first_difference(const std::string& first, const std::string& second) {
  auto entries = [](const std::string& text) {
    std::vector<std::string> all;
    for (std::string_view line : split_lines(text)) {
      if (!line.starts_with(" ") && !line.starts_with("}")) all.emplace_back();
      all.back() += std::string(line) + "\n";
    }
    return all;
  };
  std::vector<std::string> a = entries(first), b = entries(second);
  a.resize(std::max(a.size(), b.size()));
  b.resize(a.size());
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i]) return "the second generation differs:\n--- first\n" + a[i] + "\n--- second\n" + b[i];
  }
  return "";
}

}  // namespace

std::string RoundTrip::compare_with(pid_t restored) {
  pb::Image again;
  Notes ignored;
  std::string first_image = image_;
  auto result = save_process(restored, &again, &ignored, folder_ / "second");
  image_ = first_image;
  if (!result.ok()) return "second save: " + result.error().message();
  return first_difference(comparable(saved), comparable(again));
}

std::string RoundTrip::restore(const std::function<void()>& verify) {
  SharedReport report, notes_report;
  pid_t child = ::fork();
  if (child == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    run_and_report(report, [&] {
      restore_in_child(image_, restart_stdio, notes_report, report);
      report->state = Report::kRestored;
      while (report->state == Report::kRestored) ::usleep(200);
      verify();
    });
  }
  report.wait(child);
  for (std::string_view line : split_lines(notes_report->text)) notes.emplace_back(line);
  std::string result;
  if (report->state == Report::kRestored) {
    if (report->terminal_master >= 0) {
      Fd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, child, 0)));
      terminal_master = Fd(static_cast<int>(::syscall(SYS_pidfd_getfd, pidfd.get(), kTerminalMasterFd, 0)));
    } else if (compare_generations) {
      result = compare_with(child);
    }
    report->state = Report::kBusy;
    report.wait(child);
  }
  if (report->state == Report::kFailed) result = report->text + (result.empty() ? "" : "\n" + result);
  end_process(child);
  return result;
}

std::string read_now(int fd, size_t bytes) {
  std::string text(bytes, '\0');
  ssize_t got = ::read(fd, text.data(), text.size());
  return got < 0 ? fmt::format("error {}", strerrorname_np(errno)) : text.substr(0, static_cast<size_t>(got));
}

void write_all(int fd, const std::string& text) {
  EXPECT(::write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size()));
}

void put_at(int fd, int number) {
  EXPECT(fd >= 0);
  if (fd == number) return;
  EXPECT(::dup2(fd, number) == number);
  ::close(fd);
}

short poll_now(int fd, short events) {
  pollfd ask{fd, events, 0};
  ::poll(&ask, 1, 0);
  return ask.revents;
}

bool mentions(const Notes& notes, const std::string& text) {
  return std::any_of(notes.begin(), notes.end(),
                     [&](const std::string& note) { return note.find(text) != std::string::npos; });
}

std::string comparable(const pb::Image& original) {
  pb::Image image = original;
  pb::KernelObjects& objects = *image.mutable_objects();
  objects.clear_checkpoint_realtime_ns();
  for (pb::PipeBuffer& pipe : *objects.MutableRepeatedExtension(pb::pipes)) pipe.clear_inode();
  for (pb::Terminal& terminal : *objects.MutableRepeatedExtension(pb::terminals)) {
    terminal.clear_path();  // the number may have been taken meanwhile
    terminal.clear_index();
  }
  for (pb::OpenFile& file : *image.mutable_open_files()) {
    if (file.name().starts_with("/dev/pts/")) file.clear_name();
    if (file.name().starts_with("pipe:[") || file.name().starts_with("socket:[")) file.clear_name();
    if (file.HasExtension(pb::timerfd)) {
      file.MutableExtension(pb::timerfd)->clear_remaining_ns();
      file.MutableExtension(pb::timerfd)->clear_expires_at_ns();
      file.MutableExtension(pb::timerfd)->clear_settime_flags();
    }
    if (file.HasExtension(pb::unix_socket)) file.MutableExtension(pb::unix_socket)->clear_inode();
    if (file.HasExtension(pb::pidfd)) file.MutableExtension(pb::pidfd)->clear_inode();
    if (file.HasExtension(pb::inet_socket)) {
      pb::InetSocket& socket = *file.MutableExtension(pb::inet_socket);
      socket.clear_inode();
      if (socket.state() == TCP_FIN_WAIT1) socket.set_state(TCP_FIN_WAIT2);  // a matter of milliseconds
      if (socket.peer() == pb::PEER_CLOSED) socket.clear_local_address();
    }
    if (file.HasExtension(pb::epoll)) {  // the kernel's order is that of addresses
      auto* registrations = file.MutableExtension(pb::epoll)->mutable_registrations();
      std::sort(registrations->begin(), registrations->end(), [](const auto& a, const auto& b) {
        return std::tuple(a.target(), a.number()) < std::tuple(b.target(), b.number());
      });
    }
    if (file.HasExtension(pb::pidfd)) file.MutableExtension(pb::pidfd)->clear_pid();
  }
  std::string text;
  google::protobuf::TextFormat::PrintToString(image, &text);
  return text;
}

}  // namespace vmckpt::test
