// Kernel objects without a module: what they are called, and what to do so that the program can be checkpointed.
#include <sys/socket.h>

#include "modules/descriptor_module.h"

namespace vmckpt {
namespace {

struct RefusedObject {
  std::string_view prefix;  // of the link in /proc/PID/fd
  std::string_view what;
  std::string_view cure;
};

constexpr RefusedObject kRefused[] = {
    {"anon_inode:[io_uring]", "an io_uring ring",
     "tell the program to use something else (QEMU: aio=threads or aio=native), or launch it without --allow-io-uring"},
    {"anon_inode:[userfaultfd]", "a userfaultfd", "end the migration or snapshot that uses it first"},
    {"anon_inode:[perf_event]", "a performance counter", "stop the profiling first"},
    {"anon_inode:bpf", "a BPF program, map or link", "let the program close it before the checkpoint"},
    {"anon_inode:[fanotify]", "a fanotify group", "let the program use inotify, or close it before the checkpoint"},
    {"anon_inode:kvm-", "a device inside KVM that no module saves", "run the VMM without it (VFIO, for one)"},
    {"/dev/vhost", "an in-kernel virtio device (vhost)",
     "run QEMU with vhost=off, so that it emulates the device itself"},
    {"/dev/vfio", "a passed-through device (VFIO)", "remove the device from the guest before the checkpoint"},
    {"anon_inode:[vfio", "a passed-through device (VFIO)", "remove the device from the guest before the checkpoint"},
    {"anon_inode:[iommu", "a passed-through device (IOMMUFD)",
     "remove the device from the guest before the checkpoint"},
    {"/dev/net/tun", "a TUN or TAP interface", "run QEMU with user networking (-netdev user)"},
    {"/dev/fuse", "a FUSE connection", "unmount the file system that the program serves first"},
    {"/dev/dri", "a graphics device", "run the program without hardware graphics"},
    {"/dev/snd", "a sound device", "run the program without sound (QEMU: -audiodev none)"},
    {"/dev/bus/usb", "a USB device", "remove the device from the guest before the checkpoint"},
    {"/dmabuf:", "a buffer shared with a device (dma-buf)", "run the program without hardware graphics"},
    {"/secretmem", "secret memory (memfd_secret), which nobody outside may read", "let the program close it first"},
    {"anon_inode:[landlock-ruleset]", "a Landlock rule set", "let the program close it once it is in force"},
    {"anon_inode:seccomp notify", "a seccomp listener", "checkpoint the program without its sandbox supervisor"},
    {"anon_inode:[fscontext]", "a file system being configured", "checkpoint again when the mount is done"},
    {"anon_inode:sync_file", "a graphics fence", "run the program without hardware graphics"},
    {"mnt:[", "a namespace", "let the program close it before the checkpoint"},
    {"net:[", "a namespace", "let the program close it before the checkpoint"},
    {"pid:[", "a namespace", "let the program close it before the checkpoint"},
    {"user:[", "a namespace", "let the program close it before the checkpoint"},
    {"uts:[", "a namespace", "let the program close it before the checkpoint"},
    {"ipc:[", "a namespace", "let the program close it before the checkpoint"},
    {"time:[", "a namespace", "let the program close it before the checkpoint"},
    {"cgroup:[", "a namespace", "let the program close it before the checkpoint"},
};

struct RefusedSocket {
  int domain;
  std::string_view what;
  std::string_view cure;
};

constexpr RefusedSocket kRefusedSockets[] = {
    {AF_NETLINK, "a netlink socket of a protocol for which the kernel keeps more than it shows",
     "let the program close it; short-lived ones: checkpoint again"},
    {AF_PACKET, "a packet socket (raw network access)",
     "let the program close it before the checkpoint; QEMU: user networking (-netdev user)"},
    {AF_VSOCK, "a VM socket", "let the program close it before the checkpoint"},
    {AF_ALG, "a connection to the kernel's cryptography", "run the program without it (OpenSSL: no afalg engine)"},
    {AF_XDP, "an XDP socket", "let the program close it before the checkpoint"},
    {AF_BLUETOOTH, "a Bluetooth socket", "let the program close it before the checkpoint"},
    {AF_CAN, "a CAN bus socket", "let the program close it before the checkpoint"},
};

Error socket_refusal(const TargetFile& file) {
  for (const RefusedSocket& socket : kRefusedSockets) {
    if (socket.domain != file.socket_domain) continue;
    return error(fmt::format("{} is {}, which cannot be saved", file.describe(), socket.what),
                 std::string(socket.cure));
  }
  const char* what = file.socket_type == SOCK_RAW ? "a raw socket" : "a socket of a kind that vmckpt has no module for";
  return error(fmt::format("{} is {} (domain {}, type {}, protocol {})", file.describe(), what, file.socket_domain,
                           file.socket_type, file.socket_protocol),
               "let the program close it before the checkpoint");
}

}  // namespace

Error refusal(const TargetFile& file) {
  if (file.socket_domain >= 0) return socket_refusal(file);
  for (const RefusedObject& object : kRefused) {
    if (!std::string_view(file.link).starts_with(object.prefix)) continue;
    return error(fmt::format("{} is {}, which cannot be saved", file.describe(), object.what),
                 std::string(object.cure));
  }
  if (S_ISREG(file.status.st_mode)) {
    return error(
        fmt::format("{} is a POSIX message queue or another object that only looks like a file, which cannot be saved",
                    file.describe()),
        "let the program close it before the checkpoint");
  }
  if (S_ISCHR(file.status.st_mode)) {
    return error(fmt::format("{} is a device that vmckpt has no module for", file.describe()),
                 "let the program close it before the checkpoint, or run it without that device");
  }
  return error(fmt::format("{} is a kernel object that vmckpt has no module for", file.describe()),
               "let the program close it before the checkpoint");
}

}  // namespace vmckpt
