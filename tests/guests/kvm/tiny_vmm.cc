// SPDX-License-Identifier: Apache-2.0
//
// A small virtual machine monitor for the tests' own guests: what any VMM does with KVM, and nothing that knows of
// checkpoints. Its output is lines: NONCE, whatever the guest prints, BEAT every 30 ms, and a JSON object at the end.
// Status 0: the guest and the device found everything right.

#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include <cerrno>
#include <chrono>
#include <cstddef>
#include <fstream>
#include <iterator>
#include <memory>
#include <optional>
#include <thread>

#include "../lock_in.h"
#include "device.h"
#include "machine.h"
#include "options.h"
#include "state_dump.h"
#include "strangers.h"
#include "vcpu.h"

namespace tiny {
namespace {

constexpr auto kPoll = std::chrono::milliseconds(5);
constexpr auto kBeat = std::chrono::milliseconds(30);
constexpr uint32_t kAllStages = 1u << 30;

std::optional<std::string> text_of_file(const std::string& path) {
  std::ifstream file(path);
  if (!file) return std::nullopt;
  std::string text;
  std::getline(file, text);
  return text;
}

// From here on this process and its threads get EIO for this request, those too that somebody else makes in them.
void fail_ioctl(uint32_t request) {
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_ioctl, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args[1])),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, request, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EIO),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter = {std::size(program), program};
  must("PR_SET_NO_NEW_PRIVS", prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
  must("PR_SET_SECCOMP", prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter));
}

void say(const std::string& line) {
  std::puts(line.c_str());
  std::fflush(stdout);
}

// What this program calls once the guest runs, and nothing else.
void lock_in_with(const std::string& whose) {
  std::vector<long> calls = {
      SYS_read, SYS_write, SYS_openat, SYS_close, SYS_fstat, SYS_newfstatat, SYS_access, SYS_lseek, SYS_clock_nanosleep,
      SYS_nanosleep, SYS_futex, SYS_getpid, SYS_tgkill, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn,
      SYS_rt_sigtimedwait, SYS_restart_syscall, SYS_mmap, SYS_munmap, SYS_mprotect, SYS_madvise, SYS_brk, SYS_clone3, SYS_clone,
      SYS_set_robust_list, SYS_rseq, SYS_exit, SYS_exit_group,
  };
  std::vector<uint32_t> ioctls = {KVM_RUN, KVM_NMI, KVM_SIGNAL_MSI, KVM_SET_SIGNAL_MASK};
  if (whose == "checkpoint") {
    calls.insert(calls.end(), lock_in::kCallsOfACheckpoint.begin(), lock_in::kCallsOfACheckpoint.end());
    ioctls.clear();
  }
  must("install a system call filter", lock_in::install(lock_in::allow_list(calls, ioctls)));
}

class Vmm {
 public:
  explicit Vmm(const Options& options) : options_(options), machine_(options), device_(options, machine_) {
    Vcpu::install_signal_handler();
    int count = options.vcpus + (options.spare && machine_.has_lapic() ? 1 : 0);
    for (int index = 0; index < count; index++) {
      vcpus_.push_back(std::make_unique<Vcpu>(options, machine_, device_, control_, index));
    }
    if (options.unplug) unplugged_.emplace(machine_, count);
  }

  int run() {
    if (options_.fail_ioctl != 0) fail_ioctl(static_cast<uint32_t>(options_.fail_ioctl));
    if (!options_.locked_in.empty()) lock_in_with(options_.locked_in);
    for (auto& vcpu : vcpus_) vcpu->start();
    auto next_beat = std::chrono::steady_clock::now();
    while (!device_.has_ended() && !control_.end) {
      look_at_files();
      if (!control_.pause) device_.raise_interrupts();
      if (std::chrono::steady_clock::now() >= next_beat) {
        say("BEAT " + device_.counts());
        next_beat = std::chrono::steady_clock::now() + kBeat;
      }
      std::this_thread::sleep_for(kPoll);
    }
    set(control_.end, true);
    for (auto& vcpu : vcpus_) vcpu->join();
    bool untouched = !unplugged_ || unplugged_->is_untouched();
    for (auto& vcpu : vcpus_) untouched = untouched && vcpu->strangers_are_untouched();
    if (!untouched) device_.fail(0, "memory that is not the vCPU's has changed");
    say(device_.counts());
    return device_.is_right() ? 0 : 1;
  }

 private:
  void look_at_files() {
    if (auto text = text_of_file(options_.go_file)) {
      device_.set_permit(text->empty() ? kAllStages : static_cast<uint32_t>(std::stoul(*text)));
    }
    control_.slow = access((options_.go_file + ".slow").c_str(), F_OK) == 0;
    bool pause = access((options_.go_file + ".pause").c_str(), F_OK) == 0;
    if (pause != control_.pause) {
      set(control_.pause, pause);
      if (pause) wait_until_parked();
      say(pause ? "PAUSED" : "RESUMED");
    }
    if (!control_.pause) return;
    const std::string request = options_.go_file + ".dump";
    if (auto path = text_of_file(request); path && !path->empty()) {
      std::vector<int> fds;
      for (auto& vcpu : vcpus_) fds.push_back(vcpu->fd());
      std::ofstream(*path) << dump_state(machine_, fds);
      must("unlink", unlink(request.c_str()));
      say("DUMPED " + *path);
    }
  }

  void set(std::atomic<bool>& flag, bool value) {
    std::unique_lock lock(control_.mutex);
    flag = value;
    control_.changed.notify_all();
    lock.unlock();
    if (value) {
      for (auto& vcpu : vcpus_) vcpu->kick();
    }
  }

  void wait_until_parked() {
    if (options_.parks_in_handler) {
      while (Vcpu::count_parked_in_handler() != static_cast<int>(vcpus_.size())) {
        std::this_thread::sleep_for(kPoll);
        for (auto& vcpu : vcpus_) vcpu->kick();  // one that was not in KVM_RUN does not park
      }
      return;
    }
    std::unique_lock lock(control_.mutex);
    control_.changed.wait(lock, [&] { return control_.parked == static_cast<int>(vcpus_.size()); });
  }

  const Options options_;
  Machine machine_;
  Device device_;
  Control control_;
  std::vector<std::unique_ptr<Vcpu>> vcpus_;
  std::optional<UnpluggedVcpu> unplugged_;
};

}  // namespace
}  // namespace tiny

int main(int argc, char** argv) {
  return tiny::Vmm(tiny::parse_options(argc, argv)).run();
}
