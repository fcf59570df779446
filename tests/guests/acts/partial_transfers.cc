// Blocking calls that have moved a part of their data when the checkpoint stops them move all of it: a short count is for
// programs with a signal handler that ran (write(2), recv(2), sendfile(2)), and here none does.

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <atomic>
#include <functional>
#include <memory>
#include <thread>

#include "act.h"

constexpr size_t kBytes = 24u << 20;  // more than any pipe or pair of sockets has room for
constexpr int kSegments = 12;

struct Transfer {
  std::string name;
  size_t bytes;
  std::function<ssize_t()> call;
  std::function<void()> other_end;  // act three: takes or gives the rest
  std::atomic<ssize_t> result{-2};
  std::thread thread;
};
static std::vector<std::unique_ptr<Transfer>> transfers;

static std::string data;  // what is sent

static void add(const char* name, size_t bytes, std::function<ssize_t()> call, std::function<void()> other_end) {
  auto transfer = std::make_unique<Transfer>();
  transfer->name = name;
  transfer->bytes = bytes;
  transfer->call = std::move(call);
  transfer->other_end = std::move(other_end);
  transfers.push_back(std::move(transfer));
}

static void expect_data(const std::string& name, int fd, size_t bytes) {
  std::string got;
  while (got.size() < bytes) {
    std::string more = act::read_text(fd, 1 << 20);
    if (more.empty()) break;
    got += more;
  }
  act::expect(name + ": the data arrives", got == data.substr(0, bytes));
}

static std::vector<iovec> segments_of(char* start, size_t bytes) {
  std::vector<iovec> segments(kSegments);
  for (int i = 0; i < kSegments; i++) {
    const size_t from = bytes * static_cast<size_t>(i) / kSegments, to = bytes * static_cast<size_t>(i + 1) / kSegments;
    segments[static_cast<size_t>(i)] = {start + from, to - from};
  }
  return segments;
}

struct Pair {
  int sender, receiver;
};

static Pair unix_pair() {
  int ends[2];
  MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
  return {ends[0], ends[1]};
}

static Pair tcp_pair() {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t bytes = sizeof address;
  int listener = MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  MUST(bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof address));
  MUST(listen(listener, 1));
  MUST(getsockname(listener, reinterpret_cast<sockaddr*>(&address), &bytes));
  int sender = MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  MUST(connect(sender, reinterpret_cast<sockaddr*>(&address), sizeof address));
  int receiver = MUST(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
  close(listener);
  return {sender, receiver};
}

static void add_senders() {
  int pipe_ends[2];
  MUST(pipe2(pipe_ends, O_CLOEXEC));
  add("write to a pipe", kBytes, [to = pipe_ends[1]] { return write(to, data.data(), kBytes); },
      [from = pipe_ends[0]] { expect_data("pipe", from, kBytes); });
  int other_ends[2];
  MUST(pipe2(other_ends, O_CLOEXEC));
  add("writev to a pipe", kBytes, [to = other_ends[1]] { return writev(to, segments_of(data.data(), kBytes).data(), kSegments); },
      [from = other_ends[0]] { expect_data("writev", from, kBytes); });
  const Pair stream = unix_pair(), message = unix_pair(), file = unix_pair();
  add("write to a Unix stream", kBytes, [stream] { return write(stream.sender, data.data(), kBytes); },
      [stream] { expect_data("Unix stream", stream.receiver, kBytes); });
  add("sendmsg to a Unix stream", kBytes, [message] {
    std::vector<iovec> segments = segments_of(data.data(), kBytes);
    msghdr header{};
    header.msg_iov = segments.data();
    header.msg_iovlen = segments.size();
    return sendmsg(message.sender, &header, 0);
  }, [message] { expect_data("sendmsg", message.receiver, kBytes); });
  act::make_file("sent", data.substr(0, 8 << 20));
  add("sendfile", 8 << 20, [file] {
    int from = MUST(open("sent", O_RDONLY | O_CLOEXEC));
    ssize_t sent = sendfile(file.sender, from, nullptr, 8 << 20);
    close(from);
    return sent;
  }, [file] { expect_data("sendfile", file.receiver, 8 << 20); });
}

// Gets "abcd" before the checkpoint and "efghij" after it.
static void add_receiver(const char* name, Pair pair, std::function<ssize_t(int, char*)> receive) {
  auto buffer = std::make_shared<std::string>(10, '-');
  MUST(write(pair.sender, "abcd", 4));
  add(name, 10, [pair, buffer, receive] { return receive(pair.receiver, buffer->data()); }, [name, pair, buffer] {
    MUST(write(pair.sender, "efghij", 6));
    act::eventually(std::string(name) + ": the data is there", [&] { return *buffer == "abcdefghij"; });
  });
}

static void add_receivers() {
  auto receive = [](int from, char* to) { return recv(from, to, 10, MSG_WAITALL); };
  add_receiver("recv of all from a Unix stream", unix_pair(), receive);
  add_receiver("recv of all from TCP", tcp_pair(), receive);
  add_receiver("recvmsg of all", unix_pair(), [](int from, char* to) {
    std::vector<iovec> segments = {{to, 3}, {to + 3, 2}, {to + 5, 5}};
    msghdr header{};
    header.msg_iov = segments.data();
    header.msg_iovlen = segments.size();
    return recvmsg(from, &header, MSG_WAITALL);
  });
}

// One whose handler runs does get a short count: the rest is not written behind its back.
static void expect_short_counts_of_handlers() {
  struct sigaction action {};
  action.sa_handler = [](int) {};
  MUST(sigaction(SIGUSR1, &action, nullptr));
  int ends[2];
  MUST(pipe2(ends, O_CLOEXEC));
  std::atomic<ssize_t> result{-2};
  std::thread writer([&] { result = write(ends[1], data.data(), kBytes); });
  act::sleep_ms(50);
  pthread_kill(writer.native_handle(), SIGUSR1);
  writer.join();
  act::expect("a handler cuts a call short", result > 0 && static_cast<size_t>(result) < kBytes);
}

int main(int argc, char** argv) {
  act::begin(argc, argv);
  data.resize(kBytes);
  act::fill(data.data(), kBytes, act::random_u64());
  add_senders();
  add_receivers();
  for (auto& transfer : transfers) {
    transfer->thread = std::thread([t = transfer.get()] { t->result = t->call(); });
  }
  act::sleep_ms(100);
  act::intermission();
  for (auto& transfer : transfers) {
    act::expect_equal(transfer->name + " still blocks", -2, transfer->result.load());
    transfer->other_end();
    if (act::eventually(transfer->name + " ends", [&] { return transfer->result != -2; })) transfer->thread.join();
    else transfer->thread.detach();
    act::expect_equal(transfer->name, transfer->bytes, transfer->result.load());
  }
  expect_short_counts_of_handlers();
  return act::finish();
}
