// Holds something that a checkpoint does not support, named by the first argument. The checkpoint must say so; the
// program then goes on as if nothing had been tried.

#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/landlock.h>
#include <linux/netlink.h>
#include <linux/perf_event.h>
#include <mqueue.h>
#include <net/ethernet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <sys/fanotify.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <atomic>
#include <thread>

#include "act.h"

static std::atomic<bool> over{false};
static std::thread helper;
static const char* program;
static pid_t child = -1;

static void need(long result, const char* what) {
  if (result < 0) act::skip(std::string(what) + " is not to be had here: " + strerror(errno));
}

// A descriptor sent over a socket pair and not yet received: it exists nowhere else.
static void send_descriptor(int over_socket, int fd) {
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof fd)] = {};
  char byte = 'd';
  iovec data{&byte, 1};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof fd);
  memcpy(CMSG_DATA(header), &fd, sizeof fd);
  MUST(sendmsg(over_socket, &message, 0));
}

// Bytes on both sides of an urgent one, and nobody reads.
static void send_urgent(int from, int to) {
  MUST(act::write_text(from, "before"));
  if (send(from, "!", 1, MSG_OOB) != 1) act::skip("MSG_OOB");
  MUST(act::write_text(from, "behind"));
  pollfd urgent{to, POLLPRI, 0};
  MUST(poll(&urgent, 1, 1000) == 1 ? 0 : -1);
}

static void hold(const std::string& kind) {
  if (kind == "netlink") {
    need(socket(AF_NETLINK, SOCK_RAW, NETLINK_GENERIC), "a netlink socket");
  } else if (kind == "detached-mount") {
    MUST(mkdir("tree", 0700));
    need(syscall(SYS_open_tree, AT_FDCWD, "tree", 1 /* OPEN_TREE_CLONE */ | O_CLOEXEC), "a detached mount");
  } else if (kind == "packet-socket") {
    need(socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL)), "a packet socket");
  } else if (kind == "bpf-map") {
    bpf_attr attributes{};
    attributes.map_type = BPF_MAP_TYPE_ARRAY;
    attributes.key_size = attributes.value_size = 4;
    attributes.max_entries = 1;
    need(syscall(SYS_bpf, BPF_MAP_CREATE, &attributes, sizeof attributes), "a BPF map");
  } else if (kind == "lease-breaking") {
    signal(SIGIO, SIG_IGN);
    act::make_file("leased", "content");
    need(fcntl(MUST(open("leased", O_RDWR)), F_SETLEASE, F_WRLCK), "a lease");
    int opened = open("leased", O_RDONLY | O_NONBLOCK);
    need(opened >= 0 || errno != EWOULDBLOCK ? -1 : 0, "a lease that is being broken");
  } else if (kind == "userfaultfd") {
    need(syscall(SYS_userfaultfd, O_CLOEXEC), "userfaultfd");
  } else if (kind == "fanotify") {
    need(fanotify_init(FAN_CLASS_NOTIF, O_RDONLY), "fanotify");
  } else if (kind == "message-queue") {
    std::string name = "/vmckpt-act-" + std::to_string(act::random_u64());
    need(mq_open(name.c_str(), O_RDWR | O_CREAT, 0600, nullptr), "a POSIX message queue");
    mq_unlink(name.c_str());
  } else if (kind == "perf-event") {
    perf_event_attr attributes{};
    attributes.type = PERF_TYPE_SOFTWARE;
    attributes.size = sizeof attributes;
    attributes.config = PERF_COUNT_SW_TASK_CLOCK;
    attributes.exclude_kernel = 1;
    need(syscall(SYS_perf_event_open, &attributes, 0, -1, -1, 0), "perf_event_open");
  } else if (kind == "huge-page") {
    void* page = mmap(nullptr, 2 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
    need(page == MAP_FAILED ? -1 : 0, "a reserved huge page");
    memset(page, 1, 2 << 20);
  } else if (kind == "own-descriptor-table") {
    std::atomic<bool> ready{false};
    helper = std::thread([&ready] {
      MUST(unshare(CLONE_FILES));
      MUST(open("/dev/null", O_RDONLY));
      ready = true;
      while (!over) act::sleep_ms(1);
    });
    while (!ready) act::sleep_ms(1);
  } else if (kind == "own-directory") {
    std::atomic<bool> ready{false};
    helper = std::thread([&ready] {
      MUST(unshare(CLONE_FS));
      MUST(chdir("/"));
      ready = true;
      while (!over) act::sleep_ms(1);
    });
    while (!ready) act::sleep_ms(1);
  } else if (kind == "landlock" || kind == "landlock-before-exec") {
    if (kind == "landlock-before-exec" && getenv("RESTRICTED") != nullptr) return;
    landlock_ruleset_attr attributes{};
    attributes.handled_access_fs = LANDLOCK_ACCESS_FS_MAKE_SOCK;
    int rules = static_cast<int>(syscall(SYS_landlock_create_ruleset, &attributes, sizeof attributes, 0));
    need(rules, "Landlock");
    MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    MUST(syscall(SYS_landlock_restrict_self, rules, 0));
    close(rules);
    if (kind == "landlock") return;
    const char* arguments[] = {program, act::go_file, kind.c_str(), nullptr};
    const char* environment[] = {"RESTRICTED=1", nullptr};
    MUST(execve(program, const_cast<char**>(arguments), const_cast<char**>(environment)));
  } else if (kind == "descriptor-in-flight") {
    int pair[2];
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    int fd = MUST(open("/dev/zero", O_RDONLY));
    send_descriptor(pair[0], fd);
    close(fd);
  } else if (kind == "tcp-not-accepted" || kind == "unix-not-accepted") {
    int family = kind[0] == 't' ? AF_INET : AF_UNIX;
    sockaddr_storage address{};
    address.ss_family = static_cast<sa_family_t>(family);
    if (family == AF_INET) reinterpret_cast<sockaddr_in*>(&address)->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int listener = MUST(socket(family, SOCK_STREAM, 0)), client = MUST(socket(family, SOCK_STREAM, 0));
    MUST(bind(listener, reinterpret_cast<sockaddr*>(&address), family == AF_INET ? sizeof(sockaddr_in) : sizeof(sa_family_t)));
    MUST(listen(listener, 8));
    socklen_t bytes = sizeof address;
    MUST(getsockname(listener, reinterpret_cast<sockaddr*>(&address), &bytes));
    MUST(connect(client, reinterpret_cast<sockaddr*>(&address), bytes));
    MUST(act::write_text(client, "unread"));
  } else if (kind == "deep-path") {
    const std::string name(250, 'd');
    int home = MUST(open(".", O_PATH | O_DIRECTORY | O_CLOEXEC)), opened = -1;
    for (int depth = 0; depth < 20; depth++) {
      MUST(mkdir(name.c_str(), 0700));
      MUST(chdir(name.c_str()));
    }
    opened = MUST(open("file", O_RDWR | O_CREAT, 0600));
    MUST(fchdir(home));
    close(home);
    MUST(fcntl(opened, F_GETFD));
  } else if (kind == "tcp-urgent") {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int listener = MUST(socket(AF_INET, SOCK_STREAM, 0)), client = MUST(socket(AF_INET, SOCK_STREAM, 0));
    MUST(bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof address));
    MUST(listen(listener, 1));
    socklen_t bytes = sizeof address;
    MUST(getsockname(listener, reinterpret_cast<sockaddr*>(&address), &bytes));
    MUST(connect(client, reinterpret_cast<sockaddr*>(&address), bytes));
    send_urgent(client, MUST(accept(listener, nullptr, nullptr)));
  } else if (kind == "unix-urgent") {
    int ends[2];
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
    send_urgent(ends[0], ends[1]);
  } else if (kind == "child") {
    child = MUST(fork());
    if (child == 0) {
      for (;;) pause();
    }
  } else if (kind == "not-dumpable") {
    MUST(prctl(PR_SET_DUMPABLE, 0, 0, 0, 0));
  } else if (kind == "directory-removed") {
    MUST(mkdir("short-lived", 0755));
    MUST(chdir("short-lived"));
    MUST(rmdir("../short-lived"));
  } else {
    std::fprintf(stderr, "unknown kind \"%s\"\n", kind.c_str());
    std::exit(2);
  }
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  program = argv[0];
  uint64_t secret = act::random_u64();
  volatile uint64_t copy = secret;
  hold(act::args.empty() ? "netlink" : act::args[0]);

  act::intermission();

  over = true;
  if (helper.joinable()) helper.join();
  if (child > 0) {
    act::expect_equal("the child lives", 0, kill(child, 0));
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
  }
  act::expect_equal("secret", secret, static_cast<uint64_t>(copy));
  return act::finish();
}
