// The processor, the kernel, and what programs may use here that a checkpoint cannot save.
#include <cstdio>

#include <cpuid.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/io_uring.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "core/fd.h"
#include "core/kvm_api.h"
#include "modules/credentials.h"
#include "modules/seccomp.h"
#include "supervisor/doctor_probes.h"

namespace vmckpt {

Probe probe_machine() {
  unsigned eax, ebx, ecx = 0, edx;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0 || (ecx & bit_OSXSAVE) == 0) {
    return missing("the CPU or the kernel has no XSAVE",
                   "run on an x86-64 machine made after 2011, with XSAVE enabled");
  }
  return ok("x86-64 with XSAVE");
}

Probe probe_kernel() {
  utsname name;
  ::uname(&name);
  int major = 0, minor = 0;
  std::sscanf(name.release, "%d.%d", &major, &minor);
  if (major < 5 || (major == 5 && minor < 10)) {
    return missing(fmt::format("Linux {} is older than 5.10", name.release), "run a newer kernel");
  }
  return ok(fmt::format("Linux {}", name.release));
}

Probe probe_seccomp() {
  // Launch's own filter, put in place by launch's own function.
  Result<void> result = in_child([]() -> Result<void> {
    VMCKPT_TRY(install_filter(VMCKPT_TRY(make_launch_filter())));
    io_uring_params parameters{};
    if (::syscall(SYS_io_uring_setup, 1, &parameters) >= 0 || errno != ENOSYS)
      return error("launch's system call filter has no effect");
    return {};
  });
  if (!result) {
    return missing(why(result.error()) + ": launch cannot make programs fall back from io_uring",
                   "allow seccomp in this container and run a kernel with CONFIG_SECCOMP_FILTER, or launch with "
                   "--allow-io-uring");
  }
  const bool privileged = has_capability(CAP_SYS_ADMIN);
  return ok(fmt::format("launch can deny what cannot be checkpointed{}",
                        privileged ? "" : "; without CAP_SYS_ADMIN, set-uid programs then gain no privileges (no_new_privs)"));
}

Probe probe_io_uring() {
  io_uring_params parameters{};
  Fd ring(static_cast<int>(::syscall(SYS_io_uring_setup, 1, &parameters)));
  if (ring) return ok("is enabled; launch denies it to programs, because a ring cannot be checkpointed");
  return ok("is disabled (" + why(errno_error("io_uring_setup")) + "): programs fall back automatically");
}

Probe probe_kvm() {
  Fd kvm(::open("/dev/kvm", O_RDWR | O_CLOEXEC));
  if (!kvm) {
    Error reason = errno_error("open /dev/kvm");
    return limited(why(reason) + ": virtual machines run without KVM, by emulation",
                   reason.err == EACCES ? "add yourself to the group kvm" : "enable virtualization for this machine");
  }
  int version = ::ioctl(kvm.get(), KVM_GET_API_VERSION, 0);
  if (version != KVM_API_VERSION) return limited(fmt::format("/dev/kvm reports API version {}", version));
  return ok("/dev/kvm can be opened");
}

Probe probe_userfaultfd() {
  Fd uffd(static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY)));
  if (!uffd) {
    return limited(
        why(errno_error("userfaultfd")) + ": programs that use it cannot run here; vmckpt itself does not need it",
        "run a kernel with CONFIG_USERFAULTFD");
  }
  uffdio_api api{};
  api.api = UFFD_API;
  if (::ioctl(uffd.get(), UFFDIO_API, &api) < 0) return limited(why(errno_error("UFFDIO_API")));
  return ok(fmt::format("is available, {} write protection",
                        (api.features & UFFD_FEATURE_PAGEFAULT_FLAG_WP) != 0 ? "with" : "without"));
}

}  // namespace vmckpt
