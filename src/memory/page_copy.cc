#include "memory/page_copy.h"

#include <condition_variable>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace vmckpt {
namespace {

struct Load {
  PagePiece piece;
  std::unique_ptr<uint8_t[]> content = std::make_unique_for_overwrite<uint8_t[]>(kMaxRecordBytes);
};

// Gives loads to the sink, in threads of its own, so that reading and writing overlap. One load is not worth a thread: small
// files are copied while the target stands still.
class SinkThreads {
 public:
  SinkThreads(PageSink& sink, DumpProgress& progress)
      : sink_(sink), progress_(progress), most_threads_(sink.most_threads()), most_loads_(kSpareLoads + most_threads_) {}
  ~SinkThreads() {
    {
      std::lock_guard lock(mutex_);
      full_.clear();
      finished_ = true;
      changed_.notify_all();
    }
    join();
  }
  SinkThreads(const SinkThreads&) = delete;
  SinkThreads& operator=(const SinkThreads&) = delete;

  // An empty load to fill; null when the sink has failed.
  std::unique_ptr<Load> take() {
    std::unique_lock lock(mutex_);
    if (result_.ok() && free_.empty() && loads_ < most_loads_) {
      ++loads_;
      return std::make_unique<Load>();
    }
    changed_.wait(lock, [&] { return !free_.empty() || !result_.ok(); });
    if (!result_.ok()) return nullptr;
    auto load = std::move(free_.back());
    free_.pop_back();
    return load;
  }

  void put(std::unique_ptr<Load> load) {
    {
      std::lock_guard lock(mutex_);
      full_.push_back(std::move(load));
      changed_.notify_all();
      if (full_.size() < kLoadsWorthAThread) return;
    }
    if (threads_.size() < most_threads_) {
      try {
        threads_.emplace_back([this] { run(); });
      } catch (const std::system_error&) {
        most_threads_ = threads_.size();  // no more are to be had
      }
    }
    if (threads_.empty()) write_here();
  }

  // Waits until the sink has everything.
  Result<void> finish() {
    if (threads_.empty()) write_here();
    {
      std::lock_guard lock(mutex_);
      finished_ = true;
      changed_.notify_all();
    }
    join();
    return result_;
  }

 private:
  static constexpr size_t kSpareLoads = 7, kLoadsWorthAThread = 2;

  void join() {
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

  // What there is, in the caller's thread.
  void write_here() {
    finished_ = true;
    run();
    finished_ = false;
  }

  // An exception would end the supervisor here; in a thread that serves a checkpoint it only ends that.
  Result<uint64_t> put_into_sink(const Load& load) {
    try {
      return sink_.put(load.piece, load.content.get());
    } catch (const std::exception& problem) {
      return error(fmt::format("write pages into the image: {}", problem.what()), "free memory and try again");
    }
  }

  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return !full_.empty() || finished_ || !result_.ok(); });
      if (full_.empty() || !result_.ok()) return;
      auto load = std::move(full_.front());
      full_.pop_front();
      lock.unlock();
      auto written = put_into_sink(*load);
      if (written.ok()) progress_.bytes_saved += *written;
      lock.lock();
      if (!written.ok() && result_.ok()) result_ = written.error();
      free_.push_back(std::move(load));
      changed_.notify_all();
      if (!result_.ok()) return;
    }
  }

  PageSink& sink_;
  DumpProgress& progress_;
  size_t most_threads_;
  const size_t most_loads_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::unique_ptr<Load>> free_;
  std::deque<std::unique_ptr<Load>> full_;
  size_t loads_ = 0;
  bool finished_ = false;
  Result<void> result_;
  std::vector<std::thread> threads_;
};

}  // namespace

Result<void> copy_pages(PageSource& source, PageSink& sink, DumpProgress& progress) {
  SinkThreads writing(sink, progress);
  VMCKPT_TRY(source.find([&](const PagePiece& piece) -> Result<void> {
    if (progress.cancelled) return error("the checkpoint was cancelled: who asked for it has gone");
    auto load = writing.take();
    if (load == nullptr) return writing.finish();
    for (size_t page = 0, end; page < piece.pages(); page = end) {
      end = piece.end_of_span(page);
      if (!piece.wanted[page]) std::memset(load->content.get() + page * kImagePageBytes, 0, (end - page) * kImagePageBytes);
    }
    load->piece = piece;
    VMCKPT_TRY(source.read(piece, load->content.get()));
    writing.put(std::move(load));
    progress.bytes_done = source.bytes_looked_at();
    return {};
  }));
  progress.bytes_done = source.bytes_looked_at();
  return writing.finish();
}

}  // namespace vmckpt
