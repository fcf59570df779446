// A C++ program full of heap objects goes on allocating, throwing, catching, loading libraries and making threads:
// the unwinder, the allocator, the dynamic linker and thread-local destructors find everything where they left it.

#include <dlfcn.h>

#include <atomic>
#include <future>
#include <map>
#include <memory>
#include <stdexcept>
#include <thread>

#include "act.h"

struct Node {
  uint64_t value = 0;
  std::string text;
  std::unique_ptr<Node> left, right;
};

static std::unique_ptr<Node> grow(int depth, uint64_t& seed) {
  if (depth == 0) return nullptr;
  auto node = std::make_unique<Node>();
  node->value = act::next_word(seed);
  node->text.assign(node->value % 100, 'x');
  node->left = grow(depth - 1, seed);
  node->right = grow(depth - 1, seed);
  return node;
}

static uint64_t sum(const Node* node) {
  return node == nullptr ? 0 : node->value + node->text.size() + 3 * sum(node->left.get()) + 5 * sum(node->right.get());
}

[[gnu::noinline]] static int dive(int depth) {
  if (depth == 0) throw std::runtime_error("from the depths");
  std::vector<int> guard(static_cast<size_t>(depth % 7 + 1), depth);
  return dive(depth - 1) + guard.back();
}

static bool throws_and_catches() {
  try {
    dive(200);
  } catch (const std::exception& error) {
    return std::string(error.what()) == "from the depths";
  }
  return false;
}

static std::atomic<int> thread_local_destructors{0};
struct Counted {
  int value = 1;
  ~Counted() { thread_local_destructors += value; }
};
static thread_local Counted counted;

int main(int argc, char** argv) {
  act::begin(argc, argv);
  uint64_t seed = act::random_u64();
  auto tree = grow(14, seed);
  uint64_t tree_sum = sum(tree.get());
  std::map<std::string, std::vector<int>> table;
  for (int i = 0; i < 2000; i++) table["key " + std::to_string(i)].assign(static_cast<size_t>(i % 50), i);

  std::atomic<int> proceed{0};
  std::promise<std::string> promise;
  std::thread heap_user([&] {
    counted.value = 10;
    auto own = grow(10, seed);
    uint64_t own_sum = sum(own.get());
    proceed.wait(0);
    act::expect_equal("tree of another arena", own_sum, sum(own.get()));
    act::expect("exception in a thread", throws_and_catches());
    promise.set_value("kept promise");
  });
  void* early = dlopen("libresolv.so.2", RTLD_NOW);
  act::expect("library loaded before", early != nullptr);

  act::intermission();

  act::expect_equal("tree", tree_sum, sum(tree.get()));
  act::expect_equal("table", static_cast<size_t>(49), table.at("key 1999").size());
  act::expect("exception", throws_and_catches());
  proceed = 1;
  proceed.notify_all();
  act::expect_equal("future", std::string("kept promise"), promise.get_future().get());
  heap_user.join();
  act::expect_equal("thread-local destructor", 10, thread_local_destructors.load());

  tree = grow(15, seed);
  uint64_t bigger_sum = sum(tree.get());
  act::expect_equal("tree grown after restart", bigger_sum, sum(tree.get()));
  table.clear();
  act::expect_equal("std::async", 42, std::async(std::launch::async, [] { return 42; }).get());
  act::expect("library loaded before, symbol looked up after", dlsym(early, "ns_initparse") != nullptr);
  void* late = dlopen("libnss_compat.so.2", RTLD_LAZY);
  act::expect("library loaded after", late != nullptr && dlsym(late, "_nss_compat_setpwent") != nullptr);
  return act::finish();
}
