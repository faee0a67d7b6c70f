// Memory without the standard library: scratch that measures itself, and plain arrays.
#pragma once
#include <assert.h>
#include <stdint.h>
#include <stdlib.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace hipserve {
namespace HIPSERVE_TIER {

// Memory cut into aligned pieces. An arena without memory only measures what the pieces need.
class Arena {
 public:
  Arena() = default;
  explicit Arena(size_t bytes) : size_(bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, bytes + kAlignment)) abort();
    base_ = (char*)memory;
  }
  ~Arena() {
    close(0, size_, false);
    free(base_);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // The next `count` elements, of any value; null where the arena only measures.
  template <class A> A* take(size_t count) {
    const size_t begin = used_, end = begin + count * sizeof(A);
    used_ = (end + kGap + kAlignment - 1) / kAlignment * kAlignment;
    if (!base_) return nullptr;
    assert(used_ <= size_);
    close(end, used_, true);
    return (A*)(base_ + begin);
  }
  size_t used() const { return used_; }

 private:
  static constexpr size_t kAlignment = 64;
#if defined(__SANITIZE_ADDRESS__)
  // Between pieces are gaps that no kernel may touch.
  static constexpr size_t kGap = 64;
  void close(size_t begin, size_t end, bool closed) {
    if (!base_) return;
    if (closed) __asan_poison_memory_region(base_ + begin, end - begin);
    else __asan_unpoison_memory_region(base_ + begin, end - begin);
  }
#else
  static constexpr size_t kGap = 0;
  void close(size_t, size_t, bool) {}
#endif

  char* base_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

// A record of pieces together with their memory. Its constructor Pieces(arena, args...) runs twice:
// on an arena that only measures, then on one of that size.
template <class Pieces> class Scratch {
 public:
  template <class... Args>
  explicit Scratch(const Args&... args) : arena_(measure(args...)), pieces_(arena_, args...) {}
  Pieces* operator->() { return &pieces_; }
  Pieces& operator*() { return pieces_; }

 private:
  template <class... Args> static size_t measure(const Args&... args) {
    Arena nothing;
    const Pieces pieces(nothing, args...);
    return nothing.used();
  }
  Arena arena_;
  Pieces pieces_;
};

// `count` elements of any value, which may be none.
template <class A> struct Array {
  A* const data;
  explicit Array(int64_t count) : data((A*)malloc(sizeof(A) * (count > 0 ? count : 1))) {
    if (!data) abort();
  }
  ~Array() { free(data); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  A& operator[](int64_t i) { return data[i]; }
  const A& operator[](int64_t i) const { return data[i]; }
};

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
